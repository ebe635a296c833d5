//! Slabs of codec `exp` on the GPU: the kernels of `kernels/exp.cu`, what they are told of the slots, and
//! loads by way of them.
//!
//! Encoded slabs cross the link as they are stored. One layer of a run of evenly spaced slots whose slabs
//! start at the same place in each is one pitched copy, its rows as wide as the widest slab of the run;
//! elsewhere a slab, or several layers of a slot at once, is a copy of its own. The kernel that decodes
//! from staging memory into the pages sums the stored bytes too.
//!
//! The GPU reads from the slots' header pages itself where their slabs are. The host looks at few entries
//! of a page, and only when it is that slot's turn to be copied: pages are rarely in a CPU cache.

use std::ffi::CString;
use std::ops::Range;
use std::sync::Arc;

use super::driver::{
    Context, Function, Module, OwnStream, Place, Rows, copy_rows, launch, launch_with,
};
use super::encode::{TILES_MAX, WARP_TILES};
use super::kernels::{Job, LAYERS_MAX, OfWidths, PIECE, PLANES_MAX, THREADS, WARP, grid};
use super::lane::{Lane, Work};
use super::pin::crossing;
use super::runs::{Run, runs};
use crate::codec::exp::{ExpShape, TILE_BYTES};
use crate::{CodecId, Error, KvGeometry, LayerId, RecordHeader, Result, SlabMove, Slot, Transfer};

const PTX: &str = include_str!("../../../kernels/exp.ptx");

/// `Stored` of `slab.cuh`, which the GPU alone reads and writes.
pub(super) struct Stored;

impl Stored {
    pub(super) const BYTES: usize = 8;
}

/// `CodedPlane` of `exp.cuh`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct CodedPlane {
    start: u32,
    end: u32,
    groups: u32,
    first_group: u32,
    first_tile: u32,
    unused: u32,
}

/// As the kernels want them.
pub(super) fn planes_of(shape: &ExpShape) -> Result<[CodedPlane; PLANES_MAX]> {
    let mut planes = [CodedPlane::default(); PLANES_MAX];
    for (index, place) in shape.plane_places().enumerate() {
        let plane = planes
            .get_mut(index)
            .ok_or_else(|| Error::internal("a kernel takes fewer planes"))?;
        *plane = CodedPlane {
            start: place.raw.start as u32,
            end: place.raw.end as u32,
            groups: place.groups as u32,
            first_group: place.first_group as u32,
            first_tile: place.first_tile as u32,
            unused: 0,
        };
    }
    Ok(planes)
}

/// `Coded` of `exp.cu`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Coded {
    pub(super) job: Job,
    pub(super) stored: u64,
    plane: [CodedPlane; PLANES_MAX],
    tiles: u32,
    groups: u32,
    pieces: u32,
    unused: u32,
}

impl Coded {
    /// The parameter for slabs of this shape; job, `stored` and `pieces` are left out.
    fn of_shape(shape: &ExpShape) -> Result<Coded> {
        Ok(Coded {
            plane: planes_of(shape)?,
            tiles: shape.tiles() as u32,
            groups: shape.groups() as u32,
            ..Coded::default()
        })
    }
}

pub(super) struct ExpKernels {
    _module: Module,
    decode: Function,
    /// For slabs that are too large for that, or pages that do not allow the widest vectors.
    decode_large: OfWidths,
}

impl ExpKernels {
    pub(super) fn new(context: &Arc<Context>) -> Result<ExpKernels> {
        let ptx = CString::new(PTX).map_err(|_| Error::internal("the PTX has a zero byte"))?;
        let module = Module::new(context, &ptx)?;
        let decode = module.function(c"decode")?;
        module.allow_shared(decode, TILES_MAX * TILE_BYTES as u32)?;
        Ok(ExpKernels {
            decode,
            decode_large: OfWidths::get(&module, c"decode_large", c"decode_narrow")?,
            _module: module,
        })
    }

    /// Puts the decoding of one job, over `layers` layers, on `stream`.
    ///
    /// # Safety
    /// Everything that `coded` names is valid for the kernel until it has ended: the slabs as far as
    /// `stored` says and to the next multiple of 16 bytes, starting on multiples of 256 bytes; the
    /// pages as far as the job's `width` divides their addresses, offsets, pitches and rows.
    pub(super) unsafe fn decode(
        &self,
        stream: &OwnStream,
        coded: &Coded,
        layers: u32,
        blocks_max: u32,
    ) -> Result<()> {
        debug_assert!(layers as usize <= LAYERS_MAX);
        if coded.job.is_wide() && coded.tiles <= TILES_MAX {
            let threads = coded.tiles.div_ceil(WARP_TILES) * WARP;
            let shared = coded.job.slab_bytes.next_multiple_of(16);
            // SAFETY: `Coded` mirrors the parameter; the rest is the caller's promise.
            return unsafe {
                launch_with(
                    stream,
                    self.decode,
                    (coded.job.count, layers),
                    threads,
                    shared,
                    coded,
                )
            };
        }
        let parts = u64::from(coded.tiles) + u64::from(coded.pieces);
        let tasks = u64::from(coded.job.count) * parts;
        let grid = grid(tasks, layers, blocks_max);
        // SAFETY: `Coded` mirrors the parameter; the rest is the caller's promise.
        unsafe {
            launch(
                stream,
                self.decode_large.of(&coded.job),
                grid,
                THREADS,
                coded,
            )
        }
    }
}

/// A load some of whose slots hold encoded slabs.
pub(super) struct StoredSlabs {
    shape: ExpShape,
}

impl StoredSlabs {
    /// `None` where every slot holds raw slabs, or slabs that only the CPU decodes.
    pub(super) fn of(transfer: &Transfer) -> Option<StoredSlabs> {
        let is_coded = |slab_move: &SlabMove| match slab_move {
            SlabMove::Load { slot, .. } => {
                slot.regular_offset().is_none() && slot.codec() == CodecId::Exp
            }
            _ => false,
        };
        let shape = || ExpShape::new(transfer.table().kv.geometry());
        let shape = transfer
            .moves()
            .iter()
            .any(is_coded)
            .then(shape)
            .flatten()?;
        Some(StoredSlabs { shape })
    }
}

/// Where `layers` are in a slot's payload, from the first one's first byte to the last one's last; `None`
/// where the slot does not hold them so that a GPU decodes them. The page may have been damaged in memory
/// since it was sealed: what lies between those two is for the GPU to check.
fn row_of(slot: &Slot, layers: &Range<u32>) -> Option<Range<usize>> {
    let geometry = slot.arena().geometry();
    let (first, last) = (layers.start, layers.end - 1);
    if slot.regular_offset().is_some() {
        let start = |layer: u32| layer as usize * geometry.slab_stride();
        return Some(start(first)..start(last) + geometry.slab_bytes());
    }
    let page = &slot.image()[..RecordHeader::BYTES];
    let room = slot.image().len() - RecordHeader::BYTES;
    let entry = |layer: u32| {
        RecordHeader::slab_in_page(page, LayerId(layer)).filter(|slab| {
            (slab.offset as usize).is_multiple_of(KvGeometry::SLAB_ALIGN)
                && (1..=geometry.slab_bytes()).contains(&(slab.bytes as usize))
                && slab.range().end <= room
        })
    };
    let row = entry(first)?.range().start..entry(last)?.range().end;
    let is_raw = |layer: u32| entry(layer).is_some_and(|slab| slot.is_raw(&slab));
    let decodes = slot.codec() == CodecId::Exp || layers.clone().all(is_raw);
    (decodes && !row.is_empty()).then_some(row)
}

impl Lane {
    /// Puts some layers of a load whose slots hold encoded slabs on the link.
    pub(super) fn load_stored(&mut self, work: &Work<'_>, stored: &StoredSlabs) -> Result<()> {
        self.load_stored_from(work, stored, 0)
    }

    /// The same for the moves from `start` on.
    fn load_stored_from(
        &mut self,
        work: &Work<'_>,
        stored: &StoredSlabs,
        start: usize,
    ) -> Result<()> {
        let slice_bytes = self.slot_bytes.min(work.calibration.slice_bytes);
        let mut start = start;
        while start < work.transfer.moves().len() {
            let rows = RowsInSlots::new(work, start, slice_bytes)?;
            let step = rows.step();
            if step > self.slot_bytes {
                let layers = &work.layers;
                let half = layers.start + layers.len() as u32 / 2;
                if half == layers.start {
                    return Err(too_large(step, self.slot_bytes));
                }
                self.load_stored_from(&work.of(layers.start..half), stored, start)?;
                return self.load_stored_from(&work.of(half..layers.end), stored, start);
            }
            let moves = start..start + rows.starts.len();
            start = moves.end;
            let skips = |index| work.prepared.skips(moves.start + index);
            let slice = runs(&rows.starts, 0..moves.len(), rows.widest, skips);
            if slice.is_empty() {
                continue;
            }
            let copy = |lane: &Lane, slot| {
                let staged = lane.slot_address(slot);
                slice.iter().try_for_each(|run| {
                    let first = (run.first * step) as u64;
                    lane.copy_stored(work, &rows, run, staged + first, step)
                })
            };
            let decode = |lane: &Lane, slot| lane.decode(work, stored, slot, &moves, step);
            self.load_slice(work, copy, decode)?;
        }
        Ok(())
    }

    /// Puts the copies of one run into staging memory on the stream, rows `step` apart there.
    fn copy_stored(
        &self,
        work: &Work<'_>,
        rows: &RowsInSlots,
        run: &Run,
        staged: u64,
        step: usize,
    ) -> Result<()> {
        let copy = |start: u64, staged: u64, bytes: u64, count: usize| {
            let rows = Rows {
                row_bytes: bytes as usize,
                rows: count,
                from_pitch: run.step as usize,
                to_pitch: step,
            };
            let from = Place::Host(work.pinned.base() + start);
            // SAFETY: the rows start with slabs of the transfer's slots and end within the mapping, in one
            // pinned segment (see below, `runs` and `crossing`); what a row reads behind its own slot
            // means nothing, and the device only reads it. They fit into a staging slot that the streams'
            // order gives to this slice alone. The submission's fence keeps the slots.
            unsafe { copy_rows(&self.copies[self.turn], from, Place::Device(staged), rows) }
        };
        let of_run = &rows.bytes[run.first..run.first + run.count];
        let width = of_run.iter().copied().max().unwrap_or(0);
        // The last row may be narrower than the widest, and end where the mapping does.
        let last = run.offset + run.step * (run.count as u64 - 1);
        let (count, alone) = match run.count > 1 && last + width <= work.pinned.bytes() {
            true => (run.count, None),
            false => (run.count - 1, of_run.last()),
        };
        if count > 0 {
            copy(run.offset, staged, width, count)?;
        }
        let Some(&bytes) = alone else { return Ok(()) };
        let to = staged + (count * step) as u64;
        match crossing(&(last..last + bytes)) {
            None => copy(last, to, bytes, 1),
            Some(cut) => {
                copy(last, to, cut - last, 1)?;
                copy(cut, to + cut - last, last + bytes - cut, 1)
            }
        }
    }

    /// Puts the kernel from a staging slot into the pages on the stream.
    fn decode(
        &self,
        work: &Work<'_>,
        stored: &StoredSlabs,
        slot: usize,
        moves: &Range<usize>,
        step: usize,
    ) -> Result<()> {
        let mut job = work.prepared.job(work.transfer, moves, &work.layers)?;
        job.slab_base = self.slot_address(slot);
        job.slab_step = step as u64;
        let pieces = match work.prepared.are_summed() {
            true => job.slab_bytes.div_ceil(PIECE),
            false => 0,
        };
        let coded = Coded {
            job,
            stored: work.prepared.stored_address(),
            pieces,
            ..Coded::of_shape(&stored.shape)?
        };
        // SAFETY: the pages are valid by `PagedKv::register`'s promises, and the plan lies within them; the
        // slabs are in a staging slot, `step` apart, which is a multiple of 256 and no less than what
        // they take; the streams' order gives it to this slice alone. The fence of this submission
        // keeps the descriptors, which this stream uploaded. `width` divides what the job names.
        unsafe {
            work.shared.exp.decode(
                &self.kernels,
                &coded,
                work.layers.len() as u32,
                work.calibration.staging_blocks,
            )
        }
    }
}

/// What some layers take in each slot of a slice.
struct RowsInSlots {
    /// By move of the slice: where the row starts in the mapping.
    starts: Vec<u64>,
    bytes: Vec<u64>,
    /// Bytes of the longest row that moves.
    widest: u64,
}

impl RowsInSlots {
    /// As many moves from `start` on as fit into `slice_bytes`, but at least one.
    fn new(work: &Work<'_>, start: usize, slice_bytes: usize) -> Result<RowsInSlots> {
        let mut rows = RowsInSlots {
            starts: Vec::new(),
            bytes: Vec::new(),
            widest: 0,
        };
        let moves = work.transfer.moves().iter().enumerate().skip(start);
        for (index, slab_move) in moves {
            let SlabMove::Load { slot, .. } = slab_move else {
                return Err(Error::internal("chunks are decoded out of the host tier"));
            };
            let moves = !work.prepared.skips(index);
            let row = match moves {
                true => row_of(slot, &work.layers).ok_or_else(|| {
                    Error::invalid("a slot of the transfer does not hold the layers")
                        .with("move", index)
                        .with("layers", format_args!("{:?}", work.layers))
                })?,
                false => 0..0,
            };
            // Copies of odd lengths are slow, and a slot goes on to the next multiple.
            let bytes = row.len().next_multiple_of(KvGeometry::SLAB_ALIGN) as u64;
            let widest = rows.widest.max(bytes);
            let count = rows.starts.len() + 1;
            if count > 1 && count as u64 * widest > slice_bytes as u64 {
                break;
            }
            let payload = slot.offset() + RecordHeader::BYTES;
            rows.starts.push((payload + row.start) as u64);
            rows.bytes.push(bytes);
            rows.widest = widest;
        }
        Ok(rows)
    }

    /// From one row to the next in staging memory.
    fn step(&self) -> usize {
        self.widest as usize
    }
}

pub(super) fn too_large(slab_bytes: usize, staging_bytes: usize) -> Error {
    Error::invalid("a slab is larger than the GPU's staging memory: make blocks smaller")
        .with("slab_bytes", slab_bytes)
        .with("staging_bytes", staging_bytes)
}

/// Shown: the PTX was made from the sources beside it, and parameters have the sizes of `exp.cu`.
#[cfg(test)]
mod tests {
    use super::super::kernels::tests::source_line;
    use super::*;

    #[test]
    fn the_ptx_names_the_hash_of_its_source() {
        let source = include_bytes!("../../../kernels/exp.cu");
        assert_eq!(PTX.lines().next(), Some(&*source_line(source)));
    }

    #[test]
    fn parameters_are_as_large_as_the_kernels_take() {
        let kernels = |bytes: usize| PTX.matches(&format!("_param_0[{bytes}]")).count();
        assert_eq!(kernels(size_of::<Coded>()), 3);
        assert_eq!(size_of::<CodedPlane>(), 24);
    }
}
