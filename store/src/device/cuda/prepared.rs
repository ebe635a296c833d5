//! What a transfer needs on the GPU besides its bytes: made once, used for each of its layers.

use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::driver::{Context, DeviceBuffer, OwnStream, PinnedBuffer, Place, Rows, copy_rows, zero};
use super::exp::{Stored, StoredSlabs};
use super::kernels::{
    ALWAYS_ZERO, Ends, Job, LAYERS_MAX, Move, PLANES_MAX, Plane, Slots, magic, vector_for,
};
use super::lane::{SETTLE_MAX, Shared, is_idle_within};
use super::runs::runs;
use crate::{
    Checksum, Checksummer, Direction, Error, LayerId, RecordHeader, Result, SlabMove, Transfer,
};

/// Descriptors on the GPU, and where the slabs of each move are.
pub(super) struct Prepared {
    pub(super) device: u64,
    /// By move: is any of its tokens moved?
    moved: Vec<bool>,
    slabs: Slabs,
    /// Of a load whose slots hold encoded slabs; `slabs` says nothing then.
    stored: Option<StoredSlabs>,
    /// Are slabs summed? Whether encoded ones are well formed is told in the sums' place all the same.
    are_summed: bool,
    /// `None` where nothing moves.
    descriptors: Option<Arc<Descriptors>>,
    parts: Parts,
    /// What every launch has in common, and the bitwise or of all that its vectors must divide.
    job: Job,
    bits: u64,
    /// By layer of a save: are there sums already?
    summed_before: Vec<AtomicBool>,
    /// Moves that move something, and their evenly spaced runs, as the first layers found them.
    spacing: OnceLock<(usize, usize)>,
}

/// Where the parts of the descriptors start, in bytes: first what is uploaded (moves, page numbers), then
/// what the GPU works with. Answers are in the pinned buffer, at the place of the sums.
#[derive(Clone, Copy)]
struct Parts {
    pages: usize,
    sums: usize,
    expected: usize,
    stored: usize,
    bytes: usize,
}

impl Parts {
    fn new(transfer: &Transfer, pages: usize, is_stored: bool, with_sums: bool) -> Parts {
        let moves = transfer.moves().len();
        let slabs = moves * transfer.table().kv.geometry().layers as usize;
        let numbers = moves * Move::BYTES;
        let sums = (numbers + pages * 4).next_multiple_of(8);
        let row = if with_sums { slabs * 8 } else { 0 };
        let expected = sums + row;
        let stored = match transfer.direction() {
            Direction::Load => expected + row,
            Direction::Save => expected,
        };
        let entries = if is_stored { slabs * Stored::BYTES } else { 0 };
        Parts {
            pages: numbers,
            sums,
            expected,
            stored,
            bytes: stored + entries,
        }
    }
}

/// Where the slabs are in the arena's mapping; where some are encoded, nothing.
#[derive(Default)]
struct Slabs {
    /// By move: where the slab of layer 0 is or would be (modulo 2⁶⁴), raw slabs being one stride
    /// apart from layer to layer.
    layer_0: Vec<u64>,
    /// For these layers that holds in every move.
    layers: Range<u32>,
}

impl Slabs {
    fn new(transfer: &Transfer) -> Slabs {
        let geometry = transfer.table().kv.geometry();
        let stride = geometry.slab_stride() as u64;
        let mut slabs = Slabs {
            layer_0: Vec::with_capacity(transfer.moves().len()),
            layers: 0..geometry.layers,
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
            let both = slabs.layers.start.max(layers.start)..slabs.layers.end.min(layers.end);
            slabs.layers = both;
        }
        slabs
    }
}

impl Prepared {
    /// Uploads the descriptors by way of `stream`; kernels that use them must run on it too. Where
    /// `with_sums` is set, slabs are summed. `base` is where the pinned arena starts.
    pub(super) fn new(
        shared: &Shared,
        transfer: &Transfer,
        stream: &OwnStream,
        base: u64,
        with_sums: bool,
    ) -> Result<Prepared> {
        let stored = StoredSlabs::of(transfer);
        let slabs = match stored.is_some() || transfer.encoded().is_some() {
            true => Slabs::default(),
            false => Slabs::new(transfer),
        };
        // What is decoded may be malformed, which shows in the sums.
        let are_summed = with_sums;
        let with_sums = with_sums || stored.is_some();
        let plan = transfer.plan();
        let moved: Vec<bool> = (0..plan.moves())
            .map(|index| !plan.pieces(index).is_empty())
            .collect();
        let pages = needed_pages(transfer, &moved)?;
        let parts = Parts::new(transfer, pages.len(), stored.is_some(), with_sums);
        let (mut job, bits) = job(transfer);
        job.first_page = pages.start as u32;
        let descriptors = match pages.is_empty() {
            true => None,
            false => {
                let mut list = Vec::with_capacity(parts.sums);
                for (index, slab_move) in transfer.moves().iter().enumerate() {
                    let on_gpu = Move {
                        slab_offset: slabs.layer_0.get(index).copied().unwrap_or(0),
                        header_offset: match slab_move {
                            SlabMove::Load { slot, .. } => slot.offset() as u64,
                            _ => 0,
                        },
                        token: slab_move.token(),
                        moved: u32::from(moved[index]),
                    };
                    list.extend_from_slice(&on_gpu.to_bytes());
                }
                for page in &transfer.table().pages[pages] {
                    list.extend_from_slice(&page.0.to_le_bytes());
                }
                Some(Arc::new(shared.descriptors.upload(
                    &list,
                    parts.bytes,
                    stream,
                )?))
            }
        };
        let prepared = Prepared {
            device: shared.id,
            moved,
            slabs,
            stored,
            are_summed,
            descriptors,
            parts,
            job,
            bits,
            summed_before: (0..transfer.table().kv.geometry().layers)
                .map(|_| AtomicBool::new(false))
                .collect(),
            spacing: OnceLock::new(),
        };
        prepared
            .prepare_sums(shared, transfer, stream, base)
            .inspect_err(|_| {
                // Not before the upload has ended does another transfer, maybe on another stream, get them.
                if !is_idle_within(SETTLE_MAX, [stream]) {
                    mem::forget(prepared.descriptors.clone());
                }
            })?;
        Ok(prepared)
    }

    /// Zeroes the sums and fetches what the slots of a load say of their slabs.
    fn prepare_sums(
        &self,
        shared: &Shared,
        transfer: &Transfer,
        stream: &OwnStream,
        base: u64,
    ) -> Result<()> {
        let Some(descriptors) = self.summed() else {
            return Ok(());
        };
        let (parts, count) = (self.parts, self.moved.len() as u32);
        descriptors.zero(parts.sums..parts.expected, stream)?;
        if transfer.direction() == Direction::Save {
            return Ok(());
        }
        let slots = Slots {
            moves: descriptors.address(),
            expected: descriptors.address() + parts.expected as u64,
            stored: self.stored_address(),
            base,
            count,
            layers: transfer.table().kv.geometry().layers,
            layers_at: RecordHeader::LAYERS_AT as u32,
            slabs_at: RecordHeader::SLABS_AT as u32,
            entry_bytes: RecordHeader::SLAB_ENTRY_BYTES as u32,
            unused: 0,
        };
        // SAFETY: `upload` put moves and pages on this stream, `expected` and `stored` have room for
        // every layer and move, and header pages lie in slots of the pinned arena, sealed and kept by the
        // transfer, whose first fence comes behind this on the stream.
        unsafe { shared.kernels.expect(stream, &slots) }
    }

    /// The descriptors, where slabs are summed.
    fn summed(&self) -> Option<&Arc<Descriptors>> {
        let descriptors = self.descriptors.as_ref();
        descriptors.filter(|_| self.parts.expected > self.parts.sums)
    }

    /// Zeroes what an earlier submission of the same layers of a save left.
    pub(super) fn begin_sums(&self, layers: &Range<u32>, stream: &OwnStream) -> Result<()> {
        let Some(descriptors) = self.summed() else {
            return Ok(());
        };
        let before = &self.summed_before[layers.start as usize..layers.end as usize];
        let again = before
            .iter()
            .any(|layer| layer.swap(true, Ordering::Relaxed));
        match again {
            true => descriptors.zero(self.rows(layers), stream),
            false => Ok(()),
        }
    }

    /// Where the sums of `layers` are.
    fn rows(&self, layers: &Range<u32>) -> Range<usize> {
        let row = self.moved.len() * 8;
        self.parts.sums + layers.start as usize * row..self.parts.sums + layers.end as usize * row
    }

    /// Puts the end of the sums of `layers` on `stream`, behind the kernels that made them. `None`
    /// where nothing was summed.
    pub(super) fn finish_sums(
        &self,
        shared: &Shared,
        transfer: &Transfer,
        layers: &Range<u32>,
        stream: &OwnStream,
    ) -> Result<Option<Answers>> {
        let Some(descriptors) = self.summed() else {
            return Ok(None);
        };
        let (address, parts) = (descriptors.address(), self.parts);
        let slab_bytes = transfer.table().kv.geometry().slab_bytes();
        match transfer.direction() {
            Direction::Load => {
                let ends = Ends {
                    moves: address,
                    sums: address + parts.sums as u64,
                    expected: address + parts.expected as u64,
                    stored: self.stored_address(),
                    answers: descriptors.host_address() + parts.sums as u64,
                    slab_bytes: slab_bytes as u32,
                    count: self.moved.len() as u32,
                    first_layer: layers.start,
                    are_summed: u32::from(self.are_summed),
                };
                // SAFETY: sums, expected sums, stored slabs and answers have room for every layer and move; answers
                // are in pinned memory, read only behind the fence that comes behind this.
                unsafe { shared.kernels.finish(stream, &ends, layers.len() as u32)? };
            }
            // No kernel: each would hold up those that the engine runs.
            Direction::Save => descriptors.bring_back(self.rows(layers), stream)?,
        }
        Ok(Some(Answers {
            descriptors: Arc::clone(descriptors),
            start: parts.sums,
            moves: self.moved.len(),
            slab_bytes,
        }))
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

    /// Are slabs summed on the GPU?
    pub(super) fn are_summed(&self) -> bool {
        self.are_summed
    }

    /// Does nothing move?
    pub(super) fn is_empty(&self) -> bool {
        self.descriptors.is_none()
    }

    /// Does nothing of this move move?
    pub(super) fn skips(&self, index: usize) -> bool {
        !self.moved[index]
    }

    /// Where the slabs are, where some of them are encoded.
    pub(super) fn stored(&self) -> Option<&StoredSlabs> {
        self.stored.as_ref()
    }

    /// The same on the GPU, as the slots say: by layer, then by move. 0 where all slabs are raw.
    pub(super) fn stored_address(&self) -> u64 {
        let descriptors = self.descriptors.as_ref().filter(|_| self.stored.is_some());
        descriptors.map_or(0, |descriptors| {
            descriptors.address() + self.parts.stored as u64
        })
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

    /// The kernels' parameter for some moves and layers, but for the slabs' place; its vectors as wide as the
    /// pages allow.
    pub(super) fn job(
        &self,
        transfer: &Transfer,
        moves: &Range<usize>,
        layers: &Range<u32>,
    ) -> Result<Job> {
        let kv = &transfer.table().kv;
        let planes = kv.geometry().planes.len();
        if planes > PLANES_MAX || layers.len() > LAYERS_MAX {
            return Err(Error::internal("a kernel takes fewer planes and layers"));
        }
        let mut job = self.job;
        let mut bits = self.bits;
        if let Some(descriptors) = &self.descriptors {
            job.moves = descriptors.address();
            job.pages = descriptors.address() + self.parts.pages as u64;
        }
        if let Some(descriptors) = self.summed() {
            job.sums = descriptors.address() + self.parts.sums as u64;
        }
        job.first_move = moves.start as u32;
        job.count = moves.len() as u32;
        job.first_layer = layers.start;
        for (index, layer) in layers.clone().enumerate() {
            for plane in 0..planes {
                let base = kv.base(plane, LayerId(layer));
                job.page_bases[index][plane] = base;
                bits |= base;
            }
        }
        job.width = vector_for(bits);
        Ok(job)
    }
}

/// Which entries of the page table are looked at.
///
/// # Errors
/// `Invalid` where a token's position has more than 32 bits.
fn needed_pages(transfer: &Transfer, moved: &[bool]) -> Result<Range<usize>> {
    let page_tokens = u64::from(transfer.table().kv.page_tokens());
    let block_tokens = u64::from(transfer.table().kv.geometry().block_tokens);
    let mut tokens: Option<Range<u64>> = None;
    for (slab_move, _) in transfer
        .moves()
        .iter()
        .zip(moved)
        .filter(|(_, moved)| **moved)
    {
        let start = u64::from(slab_move.token());
        let end = start + block_tokens;
        if end > u64::from(u32::MAX) {
            return Err(Error::invalid("a prompt has fewer tokens on a GPU").with("token", start));
        }
        tokens = Some(match tokens {
            None => start..end,
            Some(tokens) => tokens.start.min(start)..tokens.end.max(end),
        });
    }
    let Some(tokens) = tokens else {
        return Ok(0..0);
    };
    // A block that begins below `from_token` may begin before the table does.
    let first = tokens.start.max(u64::from(transfer.from_token()));
    let end = tokens.end.div_ceil(page_tokens);
    Ok((first / page_tokens) as usize..end as usize)
}

/// What does not depend on moves and layers, and the bitwise or of all that vectors must divide.
fn job(transfer: &Transfer) -> (Job, u64) {
    let kv = &transfer.table().kv;
    let geometry = kv.geometry();
    let mut job = Job {
        layer_step: geometry.slab_stride() as u64,
        page_magic: magic(kv.page_tokens()),
        page_tokens: kv.page_tokens(),
        from_token: transfer.from_token(),
        all_moves: transfer.moves().len() as u32,
        planes: geometry.planes.len() as u32,
        slab_bytes: geometry.slab_bytes() as u32,
        ..Job::default()
    };
    let mut bits = 0;
    let mut long_runs = true;
    for (index, shape) in geometry.planes.iter().enumerate().take(PLANES_MAX) {
        let strides = kv.strides(index);
        // Heads that lie next to each other are one.
        let whole = shape.heads == 1 || strides.head == shape.head_bytes as usize;
        let token_bytes = shape.token_bytes() as u32;
        let slab_start = geometry.plane_offset(index) as u32;
        job.plane[index] = Plane {
            page_step: strides.page as u64,
            token_step: strides.token as u64,
            head_step: strides.head as u64,
            token_magic: magic(token_bytes),
            head_magic: if whole {
                ALWAYS_ZERO
            } else {
                magic(shape.head_bytes)
            },
            slab_start,
            token_bytes,
            head_bytes: shape.head_bytes,
            unused: 0,
        };
        let page_bytes = token_bytes as usize * kv.page_tokens() as usize;
        let piece = Checksummer::PIECE_BYTES;
        long_runs &= whole
            && page_bytes >= piece
            && (slab_start as usize).is_multiple_of(piece)
            && (kv.page_tokens() == 1 || strides.token == token_bytes as usize);
        bits |= u64::from(slab_start) | strides.page as u64 | u64::from(token_bytes);
        if kv.page_tokens() > 1 {
            bits |= strides.token as u64;
        }
        if !whole {
            bits |= strides.head as u64 | u64::from(shape.head_bytes);
        }
    }
    job.long_runs = u32::from(long_runs);
    (job, bits)
}

/// What the GPU said of the sums of some layers, to be read behind their fence.
#[derive(Clone)]
pub(super) struct Answers {
    descriptors: Arc<Descriptors>,
    start: usize,
    moves: usize,
    slab_bytes: usize,
}

impl Answers {
    /// Of a load: the first move whose slab does not match its slot.
    pub(super) fn first_wrong(&self, layer: u32) -> Option<usize> {
        let first = self.descriptors.answer(self.start + layer as usize * 4) as usize;
        (first != self.moves).then_some(first)
    }

    /// Of a save: what each slab sums to.
    pub(super) fn sums(&self, layer: u32) -> Vec<Checksum> {
        let start = self.start + layer as usize * self.moves * 8;
        let half = |at: usize| u64::from(self.descriptors.answer(at));
        (0..self.moves)
            .map(|index| start + index * 8)
            .map(|at| Checksummer::of_pieces(half(at) | half(at + 4) << 32, self.slab_bytes))
            .collect()
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

impl Pair {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Pair> {
        Ok(Pair {
            device: DeviceBuffer::new(context, bytes)?,
            host: PinnedBuffer::new(context, bytes)?,
        })
    }
}

/// Buffers are at least this large, and powers of two: enough for 32k tokens of an 8B model.
const PAIR_BYTES_MIN: usize = 2 << 20;
/// Pairs that are made at open: making one stops everything that the GPU does.
const PAIRS_AT_OPEN: usize = 4;
/// Pairs that are kept for later.
const PAIRS_MAX: usize = 8;

impl DescriptorPool {
    /// # Errors
    /// `Unavailable` where there is no memory for the first pairs.
    pub(super) fn new(context: &Arc<Context>) -> Result<Arc<DescriptorPool>> {
        let pairs: Result<Vec<Pair>> = (0..PAIRS_AT_OPEN)
            .map(|_| Pair::new(context, PAIR_BYTES_MIN))
            .collect();
        Ok(Arc::new(DescriptorPool {
            context: Arc::clone(context),
            free: Mutex::new(pairs?),
        }))
    }

    /// Copies `list` to the GPU by way of `stream`: what runs on it afterwards can use it. There are
    /// `bytes` bytes on both sides, and at least as many as in `list`.
    pub(super) fn upload(
        self: &Arc<Self>,
        list: &[u8],
        bytes: usize,
        stream: &OwnStream,
    ) -> Result<Descriptors> {
        let mut descriptors = self.take(bytes.max(list.len()))?;
        let pair = descriptors.pair.as_mut().expect("taken only in drop");
        pair.host.bytes_mut()[..list.len()].copy_from_slice(list);
        descriptors.send(list.len(), stream)?;
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
                Pair::new(&self.context, bytes)?
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
        self.pair().device.address()
    }

    /// Copies the first bytes of the pinned side to the GPU by way of `stream`.
    fn send(&self, bytes: usize, stream: &OwnStream) -> Result<()> {
        let rows = Rows {
            row_bytes: bytes,
            rows: 1,
            from_pitch: bytes,
            to_pitch: bytes,
        };
        let (from, to) = (self.host_address(), self.address());
        // SAFETY: both buffers are at least as long and belong to this alone, which whoever asked for it
        // keeps until the stream has come past.
        unsafe { copy_rows(stream, Place::Host(from), Place::Device(to), rows) }
    }

    fn host_address(&self) -> u64 {
        self.pair().host.address()
    }

    fn pair(&self) -> &Pair {
        self.pair.as_ref().expect("taken only in drop")
    }

    /// Zeroes some bytes on the GPU by way of `stream`.
    fn zero(&self, bytes: Range<usize>, stream: &OwnStream) -> Result<()> {
        // SAFETY: within the buffer, which belongs to this alone and lives as long as the transfer.
        unsafe { zero(stream, self.address() + bytes.start as u64, bytes.len()) }
    }

    /// Copies some bytes to the same place on the pinned side by way of `stream`.
    fn bring_back(&self, bytes: Range<usize>, stream: &OwnStream) -> Result<()> {
        let rows = Rows {
            row_bytes: bytes.len(),
            rows: 1,
            from_pitch: bytes.len(),
            to_pitch: bytes.len(),
        };
        let from = Place::Device(self.address() + bytes.start as u64);
        let to = Place::Host(self.host_address() + bytes.start as u64);
        // SAFETY: within both buffers, which belong to this alone; nobody reads what arrives before
        // the fence that comes behind this on the stream.
        unsafe { copy_rows(stream, from, to, rows) }
    }

    /// The four bytes at `offset` of the pinned side.
    fn answer(&self, offset: usize) -> u32 {
        self.pair().host.word(offset)
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
