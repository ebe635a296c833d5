//! Saves that encode with `exp` on the GPU: the kernels of `kernels/exp_save.cu`, and what is done with
//! what they answer.
//!
//! A slice of raw slabs is gathered into GPU memory and encoded there; how long its slabs have become is
//! told to the host, which puts the copies into the slots on the link: evenly spaced rows as wide as the
//! longest, so the slabs of a layer start at one place in every slot of the slice. Slices are encoded
//! ahead while earlier ones cross, so the link does not wait for the host's turn, nor the engine for
//! either.

use std::collections::VecDeque;
use std::ffi::CString;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{
    Context, DeviceBuffer, Event, Function, Module, OwnStream, PinnedBuffer, Place, Rows,
    copy_rows, launch,
};
use super::exp::{CodedPlane, planes_of, too_large};
use super::fence::poll;
use super::kernels::{LAYERS_MAX, PLANES_MAX, THREADS, WARP};
use super::lane::{HOST_WAIT_MAX, Lane, RING, Shared, Work};
use super::pin::crossing;
use super::prepared::Answers;
use super::runs::{Run, runs};
use crate::codec::exp::{ExpShape, HEADER_BYTES};
use crate::device::EncodedSave;
use crate::{Checksummer, Direction, Error, KvGeometry, LayerId, Result, SlabEntry, SlabMove};

const PTX: &str = include_str!("../../../kernels/exp_save.ptx");
/// Slabs of a slice, at most.
const SLABS_MAX: usize = 4096;
/// `Written` of `exp_save.cu`: sum, offset, bytes.
const WRITTEN_BYTES: usize = 16;

/// `Encode` of `exp_save.cu`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Encode {
    raw: u64,
    move_step: u64,
    layer_step: u64,
    rows: u64,
    headers: u64,
    sizes: u64,
    widest: u64,
    written: u64,
    answers: u64,
    plane: [CodedPlane; PLANES_MAX],
    planes: u32,
    tiles: u32,
    groups: u32,
    slab_bytes: u32,
    count: u32,
    slabs: u32,
    aligned: u32,
}

pub(super) struct SaveKernels {
    _module: Module,
    measure: Function,
    widen: Function,
    encode: Function,
    answer: Function,
}

impl SaveKernels {
    pub(super) fn new(context: &Arc<Context>) -> Result<SaveKernels> {
        let ptx = CString::new(PTX).map_err(|_| Error::internal("the PTX has a zero byte"))?;
        let module = Module::new(context, &ptx)?;
        Ok(SaveKernels {
            measure: module.function(c"measure")?,
            widen: module.function(c"widen")?,
            encode: module.function(c"encode")?,
            answer: module.function(c"answer")?,
            _module: module,
        })
    }

    /// Puts the kernels on `stream`. Nothing is cleared for them: the driver may leave that to a copy
    /// engine, where it waits behind the copies that keep the link busy.
    ///
    /// # Safety
    /// Everything that `job` names is valid for them until they have ended; slabs and rows start on
    /// multiples of 256 bytes, and a row has room for its raw slabs.
    unsafe fn encode(&self, stream: &OwnStream, job: &Encode, layers: u32) -> Result<()> {
        let grid = (job.count, layers);
        // So many that each has some tens of values.
        let threads = (job.slab_bytes / 64)
            .next_multiple_of(WARP)
            .clamp(4 * WARP, THREADS);
        // SAFETY: `Encode` mirrors the parameter; the rest is the caller's promise.
        unsafe {
            launch(stream, self.measure, grid, threads, job)?;
            launch(stream, self.widen, (layers, 1), THREADS, job)?;
            launch(stream, self.encode, grid, threads, job)?;
            let blocks = job.slabs.div_ceil(THREADS);
            launch(stream, self.answer, (blocks, 1), THREADS, job)
        }
    }
}

/// What a lane keeps to encode with. Slices take turns with all but `written`.
pub(super) struct Encoder {
    raw: DeviceBuffer,
    scratch: DeviceBuffer,
    /// By staging slot.
    written: PinnedBuffer,
}

/// Where the parts of [`Encoder::scratch`] start.
const SIZES_AT: usize = SLABS_MAX * HEADER_BYTES;
const WIDEST_AT: usize = SIZES_AT + SLABS_MAX * 4;
const WRITTEN_AT: usize = WIDEST_AT + LAYERS_MAX * 4;
/// A slice is encoded while as many before it are, or wait for the host.
const ENCODED_AHEAD: usize = 2;

impl Encoder {
    pub(super) fn new(shared: &Shared, slot_bytes: usize) -> Result<Encoder> {
        let context = &shared.context;
        Ok(Encoder {
            raw: DeviceBuffer::new(context, slot_bytes)?,
            scratch: DeviceBuffer::new(context, WRITTEN_AT + SLABS_MAX * WRITTEN_BYTES)?,
            written: PinnedBuffer::new(context, RING * SLABS_MAX * WRITTEN_BYTES)?,
        })
    }

    /// The kernels' parameter for `count` moves of `layers` layers, `step` bytes apart, into the rows of
    /// staging slot `slot`, which start at `rows`.
    fn job(
        &self,
        geometry: &KvGeometry,
        (count, layers): (usize, usize),
        step: usize,
        slot: usize,
        rows: u64,
    ) -> Result<Encode> {
        let shape = ExpShape::new(geometry)
            .ok_or_else(|| Error::invalid("only bf16 is encoded with exp"))?;
        let scratch = self.scratch.address();
        let mut starts = shape.plane_places().map(|plane| plane.raw.start);
        Ok(Encode {
            raw: self.raw.address(),
            move_step: step as u64,
            layer_step: geometry.slab_stride() as u64,
            rows,
            headers: scratch,
            sizes: scratch + SIZES_AT as u64,
            widest: scratch + WIDEST_AT as u64,
            written: scratch + WRITTEN_AT as u64,
            answers: self.written.address() + (slot * SLABS_MAX * WRITTEN_BYTES) as u64,
            plane: planes_of(&shape)?,
            planes: geometry.planes.len() as u32,
            tiles: shape.tiles() as u32,
            groups: shape.groups() as u32,
            slab_bytes: geometry.slab_bytes() as u32,
            count: count as u32,
            slabs: (count * layers) as u32,
            aligned: u32::from(starts.all(|start| start.is_multiple_of(16))),
        })
    }

    /// What the GPU says of a slab, to be asked for once it has said so.
    fn written(&self, slot: usize, slab: usize) -> Written {
        let at = (slot * SLABS_MAX + slab) * WRITTEN_BYTES;
        let word = |index: usize| self.written.word(at + 4 * index);
        Written {
            sum: u64::from(word(0)) | u64::from(word(1)) << 32,
            offset: word(2),
            bytes: word(3),
        }
    }
}

struct Written {
    /// Of its pieces.
    sum: u64,
    /// In its row.
    offset: u32,
    bytes: u32,
}

/// What all transfers of one save share: how full its slots are.
struct Filled {
    device: u64,
    slots: Mutex<Slots>,
}

struct Slots {
    /// The layer that comes next.
    next: u32,
    /// By move: where its last slab ends in the payload; `None` once one did not fit.
    ends: Vec<Option<usize>>,
}

/// What a lane says of the slabs of some layers.
#[derive(Clone)]
pub(super) enum Told {
    /// To be asked for behind the fence.
    Sums(Answers),
    /// From the first layer on, by move.
    Stored(Arc<Vec<Vec<SlabEntry>>>, u32),
}

/// A slice that is being encoded.
struct Slice {
    slot: usize,
    moves: Range<usize>,
    encoded: Event,
}

impl Lane {
    /// Encodes some layers of a save and puts them on the link; what is stored of each, by layer and
    /// move. Waits until the last slice is encoded.
    pub(super) fn save_encoded(
        &mut self,
        work: &Work<'_>,
        encoded: &EncodedSave,
    ) -> Result<Vec<Vec<SlabEntry>>> {
        let count = work.transfer.moves().len();
        let filled = encoded.prepared(|| {
            Ok(Filled {
                device: work.shared.id,
                slots: Mutex::new(Slots {
                    next: 0,
                    ends: vec![Some(0); count],
                }),
            })
        })?;
        let mut slots = filled.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let is_next = slots.next == work.layers.start && slots.ends.len() == count;
        if !is_next || filled.device != work.shared.id {
            return Err(Error::invalid(
                "the layers of an encoded save come in ascending order, each with the same moves",
            )
            .with("layer", LayerId(work.layers.start))
            .with("next_layer", slots.next));
        }
        // After an error no later layer has its turn.
        slots.next = u32::MAX;
        let stored = self.encode_layers(work, &mut slots.ends)?;
        slots.next = work.layers.end;
        Ok(stored)
    }

    fn encode_layers(
        &mut self,
        work: &Work<'_>,
        ends: &mut [Option<usize>],
    ) -> Result<Vec<Vec<SlabEntry>>> {
        let (layers, step) = (&work.layers, work.step());
        if step > self.slot_bytes {
            let half = layers.start + layers.len() as u32 / 2;
            if half == layers.start {
                return Err(too_large(step, self.slot_bytes));
            }
            let mut stored = self.encode_layers(&work.of(layers.start..half), ends)?;
            stored.extend(self.encode_layers(&work.of(half..layers.end), ends)?);
            return Ok(stored);
        }
        let mut stored = vec![vec![SlabEntry::default(); ends.len()]; layers.len()];
        let slice_bytes = self.slot_bytes.min(work.calibration.slice_bytes);
        let per_slice = (slice_bytes / step).min(SLABS_MAX / layers.len()).max(1);
        let mut ahead = VecDeque::new();
        for start in (0..ends.len()).step_by(per_slice) {
            ahead.push_back(self.encode_slice(work, start..ends.len().min(start + per_slice))?);
            if ahead.len() > ENCODED_AHEAD
                && let Some(first) = ahead.pop_front()
            {
                self.store(work, &first, ends, &mut stored)?;
            }
        }
        for slice in ahead {
            self.store(work, &slice, ends, &mut stored)?;
        }
        Ok(stored)
    }

    /// Puts the kernels that gather and encode a slice on the stream.
    fn encode_slice(&mut self, work: &Work<'_>, moves: Range<usize>) -> Result<Slice> {
        let geometry = work.transfer.table().kv.geometry();
        let slot = self.take_slot();
        if let Some(emptied) = &self.emptied[slot] {
            emptied.order(self.kernels.as_stream())?;
        }
        let encoder = self.encoder()?;
        let step = work.step();
        let (mut job, vector) = work.prepared.job(work.transfer, &moves, &work.layers)?;
        job.slab_base = encoder.raw.address();
        job.slab_step = step as u64;
        let rows = self.slot_address(slot);
        let slabs = (moves.len(), work.layers.len());
        let encode = encoder.job(geometry, slabs, step, slot, rows)?;
        let layers = work.layers.len() as u32;
        // SAFETY: the pages are valid by `PagedKv::register`'s promises, and the plan lies within them; the
        // raw slabs of a slice fit into a staging slot, which `raw` is as long as, and so do the encoded
        // ones, which are no longer. All of this lane's kernels run on one stream, so `raw` and the
        // scratch are this slice's alone, and the staging slot is by the streams' order; `written` is
        // read before the slot's next turn. There is room for `SLABS_MAX` slabs and `LAYERS_MAX`
        // layers. The caller keeps the transfer until the kernels have ended.
        unsafe {
            work.shared.kernels.launch(
                &self.kernels,
                Direction::Save,
                vector,
                &job,
                layers,
                work.calibration.staging_blocks,
            )?;
            work.shared
                .exp_save
                .encode(&self.kernels, &encode, layers)?;
        }
        Ok(Slice {
            slot,
            moves,
            encoded: work.shared.events.record(self.kernels.as_stream())?,
        })
    }

    /// Waits until a slice is encoded, notes where its slabs go, and puts the copies on the link.
    fn store(
        &mut self,
        work: &Work<'_>,
        slice: &Slice,
        ends: &mut [Option<usize>],
        stored: &mut [Vec<SlabEntry>],
    ) -> Result<()> {
        if !poll(HOST_WAIT_MAX, || slice.encoded.is_reached())? {
            return Err(Error::unavailable("the GPU does not finish encoding")
                .with("seconds", HOST_WAIT_MAX.as_secs()));
        }
        let rows = self.place(work, slice, ends, stored)?;
        let evenly = runs(&rows.starts, 0..rows.starts.len(), rows.widest, |index| {
            rows.bytes[index] == 0
        });
        if evenly.is_empty() {
            return Ok(());
        }
        self.take_turn(work)?;
        for run in &evenly {
            self.copy_encoded(work, slice.slot, &rows, run)?;
        }
        let stream = self.copies[self.turn].as_stream();
        self.copied.push_back(work.shared.events.record(stream)?);
        self.emptied[slice.slot] = Some(work.shared.events.record(stream)?);
        Ok(())
    }

    /// Where the slabs of an encoded slice go.
    fn place(
        &self,
        work: &Work<'_>,
        slice: &Slice,
        ends: &mut [Option<usize>],
        stored: &mut [Vec<SlabEntry>],
    ) -> Result<RowsToSlots> {
        let (encoder, count) = (self.encoder()?, slice.moves.len());
        let slab_bytes = work.transfer.table().kv.geometry().slab_bytes();
        let of_slice = ends[slice.moves.clone()].iter().flatten();
        let start = of_slice.copied().max().unwrap_or(0);
        let start = start.next_multiple_of(KvGeometry::SLAB_ALIGN);
        let slots = work.transfer.moves()[slice.moves.clone()]
            .iter()
            .map(|slab_move| match slab_move {
                SlabMove::Save { slot, .. } => Ok(slot.payload()),
                _ => Err(Error::internal("chunks are encoded into the host tier")),
            })
            .collect::<Result<Vec<_>>>()?;
        let mut row_ends = vec![start; count];
        for (layer, stored) in stored.iter_mut().enumerate() {
            let stored = &mut stored[slice.moves.clone()];
            let ends = ends[slice.moves.clone()].iter_mut();
            for (index, (stored, end)) in stored.iter_mut().zip(ends).enumerate() {
                let written = encoder.written(slice.slot, layer * count + index);
                let (offset, bytes) = (start + written.offset as usize, written.bytes as usize);
                let in_row = written.offset as usize + bytes;
                if bytes == 0 || bytes > slab_bytes || in_row > work.step() {
                    return Err(Error::internal(
                        "the GPU encodes a slab to an impossible length",
                    ));
                }
                if end.is_none() || offset + bytes > slots[index].1 {
                    *end = None;
                    continue;
                }
                *stored = SlabEntry {
                    offset: offset as u32,
                    bytes: bytes as u32,
                    checksum: Checksummer::of_pieces(written.sum, bytes),
                };
                row_ends[index] = offset + bytes;
                *end = Some(offset + bytes);
            }
        }
        let mut rows = RowsToSlots::default();
        for ((payload, room), end) in slots.into_iter().zip(row_ends) {
            // Copies of odd lengths are slow, and a slot goes on to the next multiple.
            let bytes = (end - start).next_multiple_of(KvGeometry::SLAB_ALIGN) as u64;
            rows.starts.push((payload + start) as u64);
            rows.bytes.push(bytes);
            rows.rooms.push(room.saturating_sub(start) as u64);
            rows.widest = rows.widest.max(bytes);
        }
        Ok(rows)
    }

    /// Puts the copies of one run into its slots on the stream.
    fn copy_encoded(
        &self,
        work: &Work<'_>,
        slot: usize,
        rows: &RowsToSlots,
        run: &Run,
    ) -> Result<()> {
        let step = work.step();
        let copy = |index: usize, skip: u64, bytes: u64, count: usize| {
            let from = self.slot_address(slot) + (index * step) as u64 + skip;
            let to = work.pinned.base() + rows.starts[index] + skip;
            let of_copy = Rows {
                row_bytes: bytes as usize,
                rows: count,
                from_pitch: step,
                to_pitch: run.step as usize,
            };
            // SAFETY: the rows lie within what is left of the transfer's slots (see below), which are
            // being filled and whose payload behind the slabs before is this save's to write, in one
            // pinned segment (see `runs` and `crossing`), and within a staging slot that is this
            // slice's alone until the stream has come past. The submission's fence keeps the slots.
            unsafe {
                copy_rows(
                    &self.copies[self.turn],
                    Place::Device(from),
                    Place::Host(to),
                    of_copy,
                )
            }
        };
        let of_run = run.first..run.first + run.count;
        let width = of_run.clone().map(|index| rows.bytes[index]).max();
        let width = width.unwrap_or(0);
        if run.count > 1 && of_run.clone().all(|index| width <= rows.rooms[index]) {
            return copy(run.first, 0, width, run.count);
        }
        of_run.into_iter().try_for_each(|index| {
            let (start, bytes) = (rows.starts[index], rows.bytes[index]);
            match crossing(&(start..start + bytes)) {
                None => copy(index, 0, bytes, 1),
                Some(cut) => {
                    copy(index, 0, cut - start, 1)?;
                    copy(index, cut - start, start + bytes - cut, 1)
                }
            }
        })
    }

    /// Brings values from pinned memory into the GPU's, over and over, to be encoded there by
    /// [`Lane::encode_once`]: so many bytes from `values` on.
    ///
    /// # Safety
    /// They are pinned in one piece, and stay as they are until the stream has come past.
    pub(super) unsafe fn take_values(&self, values: u64, bytes: usize) -> Result<()> {
        let raw = &self.encoder()?.raw;
        for start in (0..raw.len()).step_by(bytes) {
            let row_bytes = bytes.min(raw.len() - start);
            let rows = Rows {
                row_bytes,
                rows: 1,
                from_pitch: row_bytes,
                to_pitch: row_bytes,
            };
            let to = Place::Device(raw.address() + start as u64);
            // SAFETY: within `raw`, which the kernels stream alone uses; the rest is the caller's promise.
            unsafe { copy_rows(&self.kernels, Place::Host(values), to, rows)? };
        }
        Ok(())
    }

    /// Slabs that [`Lane::encode_once`] encodes.
    pub(super) fn slabs_at_once(&self, geometry: &KvGeometry) -> usize {
        (self.slot_bytes / geometry.slab_stride()).min(SLABS_MAX)
    }

    /// Encodes what [`Lane::take_values`] brought into a staging slot, for nothing but the time that it
    /// takes.
    pub(super) fn encode_once(&self, shared: &Shared, geometry: &KvGeometry) -> Result<()> {
        let count = self.slabs_at_once(geometry);
        let (step, rows) = (geometry.slab_stride(), self.slot_address(0));
        let encode = self.encoder()?.job(geometry, (count, 1), step, 0, rows)?;
        // SAFETY: as in `encode_slice`, for one layer of the first staging slot; the lane is locked, so
        // that no slice is submitted meanwhile, and what came before is ordered by the one stream.
        unsafe { shared.exp_save.encode(&self.kernels, &encode, 1) }
    }

    fn encoder(&self) -> Result<&Encoder> {
        let encoder = self.encoder.as_ref();
        encoder.ok_or_else(|| Error::internal("only saves are encoded"))
    }
}

/// What a slice brings to each slot, by move of the slice.
#[derive(Default)]
struct RowsToSlots {
    /// Where in the mapping.
    starts: Vec<u64>,
    bytes: Vec<u64>,
    /// Bytes to the slot's end.
    rooms: Vec<u64>,
    widest: u64,
}

/// Shown: the PTX was made from the sources beside it, and its parameter has the size that is passed.
#[cfg(test)]
mod tests {
    use super::super::kernels::tests::source_line;
    use super::*;

    #[test]
    fn the_ptx_names_the_hash_of_its_source() {
        let source = include_bytes!("../../../kernels/exp_save.cu");
        assert_eq!(PTX.lines().next(), Some(&*source_line(source)));
    }

    #[test]
    fn the_parameter_is_as_large_as_the_kernels_take() {
        let size = format!("_param_0[{}]", size_of::<Encode>());
        assert_eq!(PTX.matches(&size).count(), 4);
    }
}
