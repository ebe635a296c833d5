//! What a transfer needs on the GPU besides its bytes: made once, used for each of its layers.

use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::driver::{Context, DeviceBuffer, OwnStream, PinnedBuffer, Place, Rows, copy_rows};
use super::kernels::{Job, LAYERS_MAX, PLANES_MAX, Piece, tasks, vector_for};
use super::runs::runs;
use crate::{Error, LayerId, Result, SlabMove, Transfer};

/// Descriptors on the GPU, and where the slabs of each move are.
pub(super) struct Prepared {
    pub(super) device: u64,
    pieces: Pieces,
    slabs: Slabs,
    /// Pieces, then the offset of each move's slab; `None` where nothing moves.
    descriptors: Option<Descriptors>,
    /// Moves that move something, and their evenly spaced runs, as the first layers found them.
    spacing: OnceLock<(usize, usize)>,
}

/// The plan as the kernels read it.
struct Pieces {
    all: Vec<Piece>,
    /// Where the pieces of each move end.
    ends: Vec<usize>,
    /// Bitwise or of all offsets, rows and pitches.
    bits: u64,
    /// Bytes of the longest.
    longest: u64,
}

impl Pieces {
    fn new(transfer: &Transfer) -> Pieces {
        let plan = transfer.plan();
        let mut pieces = Pieces {
            all: Vec::new(),
            ends: Vec::with_capacity(plan.moves()),
            bits: 0,
            longest: 0,
        };
        for index in 0..plan.moves() {
            for piece in plan.pieces(index) {
                pieces.bits |=
                    u64::from(piece.row_bytes) | u64::from(piece.slab_offset) | piece.page_offset;
                if piece.rows > 1 {
                    let pitch = plan.pitch(piece.plane);
                    pieces.bits |= (pitch.slab | pitch.page) as u64;
                }
                let bytes = u64::from(piece.rows) * u64::from(piece.row_bytes);
                pieces.longest = pieces.longest.max(bytes);
                pieces.all.push(Piece {
                    page_offset: piece.page_offset,
                    slab_offset: piece.slab_offset,
                    slab: index as u32,
                    rows: piece.rows,
                    row_bytes: piece.row_bytes,
                    plane: piece.plane,
                    unused: 0,
                });
            }
            pieces.ends.push(pieces.all.len());
        }
        pieces
    }

    /// The pieces of some moves.
    fn of(&self, moves: &Range<usize>) -> Range<usize> {
        let end = |index: usize| index.checked_sub(1).map_or(0, |before| self.ends[before]);
        end(moves.start)..end(moves.end)
    }
}

/// Where the slabs are in the arena's mapping.
struct Slabs {
    /// By move: where the slab of layer 0 is or would be (modulo 2⁶⁴), raw slabs being one stride
    /// apart from layer to layer.
    layer_0: Vec<u64>,
    /// For these layers that holds in every move.
    layers: Range<u32>,
    /// Bitwise or of `layer_0`.
    bits: u64,
}

impl Slabs {
    fn new(transfer: &Transfer) -> Slabs {
        let geometry = transfer.table().kv.geometry();
        let stride = geometry.slab_stride() as u64;
        let mut slabs = Slabs {
            layer_0: Vec::with_capacity(transfer.moves().len()),
            layers: 0..geometry.layers,
            bits: 0,
        };
        for (index, slab_move) in transfer.moves().iter().enumerate() {
            let at = |layer: u32| {
                let offset = transfer.slab_offset(index, LayerId(layer)).ok()?;
                Some((offset as u64).wrapping_sub(u64::from(layer) * stride))
            };
            let whole = match slab_move {
                SlabMove::Save { .. }
                | SlabMove::LoadDevice { .. }
                | SlabMove::SaveDevice { .. } => at(0),
                SlabMove::Load { slot, .. } => slot.regular_offset().map(|offset| offset as u64),
            };
            let whole = whole.map(|offset| (offset, 0..geometry.layers));
            let regular = whole.or_else(|| {
                let (first, offset) =
                    (0..geometry.layers).find_map(|layer| Some((layer, at(layer)?)))?;
                let end = (first..geometry.layers)
                    .find(|&layer| at(layer) != Some(offset))
                    .unwrap_or(geometry.layers);
                Some((offset, first..end))
            });
            let (offset, layers) = regular.unwrap_or((0, 0..0));
            slabs.layer_0.push(offset);
            slabs.bits |= offset;
            let both = slabs.layers.start.max(layers.start)..slabs.layers.end.min(layers.end);
            slabs.layers = both;
        }
        slabs
    }
}

impl Prepared {
    /// Uploads the descriptors by way of `stream`; kernels that use them must run on it too.
    pub(super) fn new(
        device: u64,
        transfer: &Transfer,
        pool: &Arc<DescriptorPool>,
        stream: &OwnStream,
    ) -> Result<Prepared> {
        let pieces = Pieces::new(transfer);
        let slabs = Slabs::new(transfer);
        let descriptors = match pieces.all.is_empty() {
            true => None,
            false => {
                let mut list =
                    Vec::with_capacity(pieces.all.len() * Piece::BYTES + slabs.layer_0.len() * 8);
                for piece in &pieces.all {
                    list.extend_from_slice(&piece.to_bytes());
                }
                for offset in &slabs.layer_0 {
                    list.extend_from_slice(&offset.to_le_bytes());
                }
                Some(pool.upload(&list, stream)?)
            }
        };
        Ok(Prepared {
            device,
            pieces,
            slabs,
            descriptors,
            spacing: OnceLock::new(),
        })
    }

    /// Moves that move something, and how many evenly spaced runs of rows with `row_bytes` they make
    /// at `offsets`. Layers differ little in that: only the first to ask has it counted.
    pub(super) fn spacing(&self, offsets: &[u64], row_bytes: u64) -> (usize, usize) {
        *self.spacing.get_or_init(|| {
            let runs = runs(offsets, 0..offsets.len(), row_bytes, |index| {
                self.skips(index)
            });
            (runs.iter().map(|run| run.count).sum(), runs.len())
        })
    }

    /// Does nothing move?
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.all.is_empty()
    }

    /// Does nothing of this move move?
    pub(super) fn skips(&self, index: usize) -> bool {
        self.pieces.of(&(index..index + 1)).is_empty()
    }

    /// Do the slabs of `layers` lie one stride apart in every slot?
    pub(super) fn is_regular(&self, layers: &Range<u32>) -> bool {
        self.slabs.layers.start <= layers.start && layers.end <= self.slabs.layers.end
    }

    /// Where the slab of `layer` is in the mapping, for every move.
    ///
    /// # Errors
    /// `Invalid` where a slot does not hold the layer as raw bytes.
    pub(super) fn slab_offsets(&self, transfer: &Transfer, layer: u32) -> Result<Vec<u64>> {
        if self.is_regular(&(layer..layer + 1)) {
            let stride = transfer.table().kv.geometry().slab_stride() as u64;
            let offsets = self.slabs.layer_0.iter();
            return Ok(offsets
                .map(|offset| offset.wrapping_add(u64::from(layer) * stride))
                .collect());
        }
        (0..transfer.moves().len())
            .map(|index| {
                transfer
                    .slab_offset(index, LayerId(layer))
                    .map(|at| at as u64)
            })
            .collect()
    }

    /// The kernels' parameter for some moves and layers, but for the slabs' place, and the width of
    /// its vectors as far as the pages allow.
    pub(super) fn job(
        &self,
        transfer: &Transfer,
        moves: &Range<usize>,
        layers: &Range<u32>,
    ) -> Result<(Job, u32)> {
        let kv = &transfer.table().kv;
        let planes = kv.geometry().planes.len();
        if planes > PLANES_MAX || layers.len() > LAYERS_MAX {
            return Err(Error::internal("a kernel takes fewer planes and layers"));
        }
        let descriptors = self.descriptors.as_ref();
        let address = descriptors.map_or(0, |descriptors| descriptors.address());
        let pieces = self.pieces.of(moves);
        let stride = kv.geometry().slab_stride() as u64;
        // Staging and strides are multiples of more than the widest vector.
        let mut bits = self.pieces.bits | self.slabs.bits;
        let mut job = Job {
            pieces: address + (pieces.start * Piece::BYTES) as u64,
            slab_step: stride,
            layer_step: stride,
            first_slab: moves.start as u32,
            count: pieces.len() as u32,
            ..Job::default()
        };
        for plane in 0..planes {
            let pitch = transfer.plan().pitch(plane as u32);
            job.slab_pitch[plane] = pitch.slab as u64;
            job.page_pitch[plane] = pitch.page as u64;
            for (index, layer) in layers.clone().enumerate() {
                let base = kv.base(plane, LayerId(layer));
                job.page_bases[index][plane] = base;
                bits |= base;
            }
        }
        let vector = vector_for(bits);
        job.tasks = tasks(self.pieces.longest, vector);
        Ok((job, vector))
    }

    /// Address on the GPU of the offset of every move's slab of layer 0.
    pub(super) fn slab_offsets_address(&self) -> u64 {
        let pieces = (self.pieces.all.len() * Piece::BYTES) as u64;
        self.descriptors
            .as_ref()
            .map_or(0, |descriptors| descriptors.address() + pieces)
    }
}

/// Pairs of pinned and GPU buffers, used again and again.
pub(super) struct DescriptorPool {
    context: Arc<Context>,
    free: Mutex<Vec<Pair>>,
}

struct Pair {
    device: DeviceBuffer,
    host: PinnedBuffer,
}

/// Buffers are at least this large, and powers of two.
const PAIR_BYTES_MIN: usize = 256 << 10;
/// Pairs that are kept for later.
const PAIRS_MAX: usize = 8;

impl DescriptorPool {
    pub(super) fn new(context: &Arc<Context>) -> Arc<DescriptorPool> {
        Arc::new(DescriptorPool {
            context: Arc::clone(context),
            free: Mutex::new(Vec::new()),
        })
    }

    /// Copies `list` to the GPU by way of `stream`: what runs on it afterwards can use it.
    pub(super) fn upload(self: &Arc<Self>, list: &[u8], stream: &OwnStream) -> Result<Descriptors> {
        let mut descriptors = self.take(list.len())?;
        let pair = descriptors.pair.as_mut().expect("taken only in drop");
        pair.host.bytes_mut()[..list.len()].copy_from_slice(list);
        let rows = Rows {
            row_bytes: list.len(),
            rows: 1,
            from_pitch: list.len(),
            to_pitch: list.len(),
        };
        let (from, to) = (pair.host.address(), pair.device.address());
        // SAFETY: both buffers are at least as long and belong to the result alone, which whoever
        // asked for it keeps until the stream has come past.
        unsafe { copy_rows(stream, Place::Host(from), Place::Device(to), rows)? };
        Ok(descriptors)
    }

    fn take(self: &Arc<Self>, bytes: usize) -> Result<Descriptors> {
        let found = {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let found = free.iter().position(|pair| pair.device.len() >= bytes);
            found.map(|index| free.swap_remove(index))
        };
        let pair = match found {
            Some(pair) => pair,
            None => {
                let bytes = bytes.next_power_of_two().max(PAIR_BYTES_MIN);
                Pair {
                    device: DeviceBuffer::new(&self.context, bytes)?,
                    host: PinnedBuffer::new(&self.context, bytes)?,
                }
            }
        };
        Ok(Descriptors {
            pool: Arc::clone(self),
            pair: Some(pair),
        })
    }
}

/// A pair in use. It lives as long as the transfer, which the fences of its layers keep.
pub(super) struct Descriptors {
    pool: Arc<DescriptorPool>,
    pair: Option<Pair>,
}

impl Descriptors {
    pub(super) fn address(&self) -> u64 {
        let pair = self.pair.as_ref().expect("taken only in drop");
        pair.device.address()
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        let pair = self.pair.take();
        let mut free = self
            .pool
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if free.len() < PAIRS_MAX {
            free.extend(pair);
        }
    }
}
