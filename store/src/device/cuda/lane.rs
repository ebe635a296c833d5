//! One direction of a GPU's link: its streams, its staging memory, and what is under way on it.
//!
//! A load goes slice by slice: DMA from the slots into a staging slot, then a kernel from there into
//! the pages. Slices take turns on two streams, each behind the end of the one before: at most one is
//! runnable at a time, so that a copy of the engine's own comes in between two of them instead of
//! behind the whole load, and the GPU goes from one to the next without the host. A save goes the
//! other way round.

use std::collections::VecDeque;
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::driver::{Context, DeviceBuffer, Event, EventPool, OwnStream, Place, Rows, copy_rows};
use super::encode::{Encoder, SLABS_MAX, SaveKernels};
use super::exp::{ExpKernels, too_large};
use super::exp_save::Told;
use super::fence::{CudaFence, poll};
use super::kernels::{Kernels, LAYERS_MAX};
use super::pin::{PinnedArena, crossing};
use super::prepared::{DescriptorPool, Prepared};
use super::rates::{Calibration, LinkRates, Load, Way};
use super::runs::{Run, runs};
use crate::{Direction, Error, Fence, FencePoint, KvGeometry, Result, Stream, Transfer};

/// Staging slots: as many slices as can be under way, and one that is emptied.
pub(super) const RING: usize = 4;
/// Slots of a slice that is encoded.
pub(super) const ENCODED_SLOTS: usize = 2;
/// Slices that are put on the link ahead of the one that runs.
const AHEAD: usize = RING - 1;
/// A slice that takes longer than this is not waited for any more: the next is put behind it. The
/// staging slots stay in order on the GPU.
const PACE_MAX: Duration = Duration::from_secs(1);
/// How long a host thread waits for a fence that only the host can wait for.
pub(super) const HOST_WAIT_MAX: Duration = Duration::from_secs(60);
/// How long a failed submission waits for what it had put on the streams.
pub(super) const SETTLE_MAX: Duration = Duration::from_secs(10);

/// What both lanes use.
pub(super) struct Shared {
    pub(super) id: u64,
    pub(super) kernels: Kernels,
    pub(super) exp: ExpKernels,
    pub(super) exp_save: SaveKernels,
    pub(super) events: Arc<EventPool>,
    pub(super) descriptors: Arc<DescriptorPool>,
    pub(super) context: Arc<Context>,
}

pub(super) struct Lane {
    pub(super) direction: Direction,
    /// Slices take turns.
    pub(super) copies: [OwnStream; 2],
    pub(super) kernels: OwnStream,
    pub(super) staging: DeviceBuffer,
    pub(super) slot_bytes: usize,
    /// By staging slot: after this it may be written again.
    pub(super) emptied: [Option<Event>; RING],
    next_slot: usize,
    pub(super) turn: usize,
    /// Ends of the slices that were put on the link, the last one behind.
    pub(super) copied: VecDeque<Event>,
    in_flight: VecDeque<CudaFence>,
    /// Did a slice of this submission take longer than [`PACE_MAX`]? Then no other is waited for.
    is_late: bool,
    /// Of the lane of saves.
    pub(super) encoder: Option<Encoder>,
}

/// One submission.
pub(super) struct Work<'a> {
    pub(super) shared: &'a Shared,
    pub(super) pinned: &'a PinnedArena,
    pub(super) calibration: &'a Calibration,
    pub(super) transfer: &'a Transfer,
    pub(super) prepared: &'a Prepared,
    pub(super) layers: Range<u32>,
}

impl Lane {
    pub(super) fn new(
        shared: &Shared,
        direction: Direction,
        slot_bytes: usize,
        priority: i32,
    ) -> Result<Lane> {
        let kernels = OwnStream::new(&shared.context, priority)?;
        Ok(Lane {
            direction,
            copies: [
                OwnStream::new(&shared.context, priority)?,
                OwnStream::new(&shared.context, priority)?,
            ],
            staging: DeviceBuffer::new(&shared.context, slot_bytes * RING)?,
            slot_bytes,
            emptied: [const { None }; RING],
            next_slot: 0,
            turn: 0,
            copied: VecDeque::new(),
            in_flight: VecDeque::new(),
            is_late: false,
            encoder: match direction {
                Direction::Load => None,
                Direction::Save => Some(Encoder::new(&shared.context, &kernels)?),
            },
            kernels,
        })
    }

    /// Puts some layers of a transfer on the link. Returns when its last DMA copy is there. Answers
    /// are there behind the fence.
    pub(super) fn submit(
        &mut self,
        shared: &Shared,
        pinned: &PinnedArena,
        calibration: &Calibration,
        transfer: &Transfer,
        layers: Range<u32>,
        after: &[Fence],
    ) -> Result<(CudaFence, Option<Told>)> {
        self.reap();
        self.is_late = false;
        let (event, answers) = self
            .enqueue(shared, pinned, calibration, transfer, layers, after)
            .inspect_err(|_| settle(self.streams(), transfer))?;
        let fence = CudaFence::new(event, Some(transfer.clone()));
        self.in_flight.push_back(fence.clone());
        Ok((fence, answers))
    }

    fn enqueue(
        &mut self,
        shared: &Shared,
        pinned: &PinnedArena,
        calibration: &Calibration,
        transfer: &Transfer,
        layers: Range<u32>,
        after: &[Fence],
    ) -> Result<(Event, Option<Told>)> {
        for fence in after {
            order(self.kernels.as_stream(), fence)?;
        }
        let prepared = transfer.prepared(|| {
            let (stream, base) = (&self.kernels, pinned.base());
            let with_sums = calibration.sums && transfer.encoded().is_none();
            Prepared::new(shared, transfer, stream, base, with_sums)
        })?;
        if prepared.device != shared.id {
            return Err(Error::invalid(
                "a transfer is executed by the device that took its first layer",
            ));
        }
        if self.direction == Direction::Save {
            prepared.begin_sums(&layers, &self.kernels)?;
        }
        let mut staged = false;
        let mut encoded = Vec::new();
        let mut next = layers.start;
        while next < layers.end && !prepared.is_empty() {
            let end = layers.end.min(next + LAYERS_MAX as u32);
            let is_encoded = prepared.stored().is_some() || transfer.encoded().is_some();
            let end = if is_encoded || prepared.is_regular(&(next..end)) {
                end
            } else {
                next + 1
            };
            let work = Work {
                shared,
                pinned,
                calibration,
                transfer,
                prepared,
                layers: next..end,
            };
            match (prepared.stored(), transfer.encoded()) {
                (Some(stored), _) => self.load_stored(&work, stored)?,
                (_, Some(save)) => {
                    encoded.extend(self.save_encoded(&work, save)?);
                    staged = true;
                }
                (None, None) => staged |= self.enqueue_layers(&work)?,
            }
            next = end;
        }
        let sums = prepared.finish_sums(shared, transfer, &layers, &self.kernels)?;
        let answers = match transfer.encoded() {
            Some(_) => Some(Told::Stored(Arc::new(encoded), layers.start)),
            None => sums.map(Told::Sums),
        };
        let event = shared.events.record(self.kernels.as_stream())?;
        if self.direction == Direction::Load || !staged {
            return Ok((event, answers));
        }
        let last = self.copies[self.turn].as_stream();
        event.order(last)?;
        Ok((shared.events.record(last)?, answers))
    }

    /// By way of staging memory?
    fn enqueue_layers(&mut self, work: &Work<'_>) -> Result<bool> {
        let offsets = work
            .prepared
            .slab_offsets(work.transfer, work.layers.start)?;
        let row_bytes = work.row_bytes();
        let (rows, runs) = work.prepared.spacing(&offsets, row_bytes as u64);
        let load = Load {
            row_bytes,
            rows,
            runs,
        };
        let regular = work.prepared.is_regular(&work.layers);
        let fits = work.step() <= self.slot_bytes;
        let way = match (fits, regular) {
            (true, true) => work.rates(self.direction).choose(load),
            (true, false) => Way::Staged { cuts: 1 },
            (false, true) => Way::Direct,
            (false, false) => return Err(too_large(work.step(), self.slot_bytes)),
        };
        match way {
            Way::Direct => self.direct(work).map(|()| false),
            Way::Staged { cuts } => self.staged(work, &offsets, cuts).map(|()| true),
        }
    }

    fn direct(&mut self, work: &Work<'_>) -> Result<()> {
        let moves = 0..work.transfer.moves().len();
        let mut job = work.prepared.job(work.transfer, &moves, &work.layers)?;
        job.slab_base = work.pinned.base() + u64::from(work.layers.start) * job.layer_step;
        // SAFETY: the pages are valid by `PagedKv::register`'s promises, and the plan lies within
        // them; the slots lie within the pinned mapping, and the fence of this submission keeps them
        // and the descriptors, which this stream uploaded. `width` divides what the job names.
        unsafe {
            work.shared.kernels.launch(
                &self.kernels,
                self.direction,
                &job,
                work.layers.len() as u32,
                work.calibration.direct_blocks,
            )
        }
    }

    fn staged(&mut self, work: &Work<'_>, offsets: &[u64], cuts: usize) -> Result<()> {
        let per_slice = (self.slot_bytes.min(work.calibration.slice_bytes) / work.step()).max(1);
        let mut start = 0;
        while start < offsets.len() {
            let end = offsets.len().min(start + per_slice);
            let slice = runs(offsets, start..end, work.row_bytes() as u64, |index| {
                work.prepared.skips(index)
            });
            if !slice.is_empty() {
                match self.direction {
                    Direction::Load => self.load_slice(
                        work,
                        |lane, slot| lane.copy(work, slot, start, &slice, cuts),
                        |lane, slot| lane.launch(work, slot, &(start..end)),
                    )?,
                    Direction::Save => self.save_slice(work, start..end, &slice, cuts)?,
                }
            }
            start = end;
        }
        Ok(())
    }

    /// Brings a slice into a staging slot with what `copy` puts on the stream, and into the pages with
    /// what `launch` does.
    pub(super) fn load_slice(
        &mut self,
        work: &Work<'_>,
        copy: impl FnOnce(&Lane, usize) -> Result<()>,
        launch: impl FnOnce(&Lane, usize) -> Result<()>,
    ) -> Result<()> {
        let slot = self.take_slot();
        self.take_turn(work)?;
        if let Some(emptied) = &self.emptied[slot] {
            emptied.order(self.copies[self.turn].as_stream())?;
        }
        copy(self, slot)?;
        let copied = work
            .shared
            .events
            .record(self.copies[self.turn].as_stream())?;
        copied.order(self.kernels.as_stream())?;
        self.copied.push_back(copied);
        launch(self, slot)?;
        self.emptied[slot] = Some(work.shared.events.record(self.kernels.as_stream())?);
        Ok(())
    }

    fn save_slice(
        &mut self,
        work: &Work<'_>,
        moves: Range<usize>,
        slice: &[Run],
        cuts: usize,
    ) -> Result<()> {
        let slot = self.take_slot();
        if let Some(emptied) = &self.emptied[slot] {
            emptied.order(self.kernels.as_stream())?;
        }
        self.launch(work, slot, &moves)?;
        let gathered = work.shared.events.record(self.kernels.as_stream())?;
        self.take_turn(work)?;
        gathered.order(self.copies[self.turn].as_stream())?;
        self.copy(work, slot, moves.start, slice, cuts)?;
        let stream = self.copies[self.turn].as_stream();
        self.copied.push_back(work.shared.events.record(stream)?);
        self.emptied[slot] = Some(work.shared.events.record(stream)?);
        Ok(())
    }

    pub(super) fn take_slot(&mut self) -> usize {
        let slot = self.next_slot;
        self.next_slot = (slot + 1) % RING;
        slot
    }

    /// Slots that lie one behind the other, for a slice that is encoded.
    pub(super) fn take_encoded_slots(&mut self) -> Range<usize> {
        let first = self.next_slot.next_multiple_of(ENCODED_SLOTS) % RING;
        self.next_slot = (first + ENCODED_SLOTS) % RING;
        first..first + ENCODED_SLOTS
    }

    pub(super) fn slot_address(&self, slot: usize) -> u64 {
        self.staging.address() + (slot * self.slot_bytes) as u64
    }

    /// Slabs of `geometry` that one slice encodes.
    pub(super) fn slabs_at_once(&self, geometry: &KvGeometry) -> usize {
        (ENCODED_SLOTS * self.slot_bytes / geometry.slab_stride()).min(SLABS_MAX)
    }

    /// Makes the other stream the next slice's, behind the last slice, once few enough are under way.
    /// Whether those ended well is the fences' business; one that has not ended stays the one to be
    /// behind.
    pub(super) fn take_turn(&mut self, work: &Work<'_>) -> Result<()> {
        let ahead = work.calibration.ahead.clamp(1, AHEAD);
        while self.copied.len() >= ahead
            && let Some(oldest) = self.copied.front()
        {
            let patience = if self.is_late {
                Duration::ZERO
            } else {
                PACE_MAX
            };
            if let Ok(false) = poll(patience, || oldest.is_reached()) {
                self.is_late = true;
                if self.copied.len() == 1 {
                    break;
                }
            }
            self.copied.pop_front();
        }
        self.turn = 1 - self.turn;
        match self.copied.back() {
            Some(last) => last.order(self.copies[self.turn].as_stream()),
            None => Ok(()),
        }
    }

    /// Puts the DMA copies between the slots of `slice` and a staging slot on the stream.
    fn copy(
        &self,
        work: &Work<'_>,
        slot: usize,
        first_move: usize,
        slice: &[Run],
        cuts: usize,
    ) -> Result<()> {
        let geometry = work.transfer.table().kv.geometry();
        // Bytes between slabs are nobody's: where there are some, layers are copied one by one.
        let (parts, part_bytes) = match geometry.slab_bytes() == geometry.slab_stride() {
            true => (cuts, work.row_bytes() / cuts),
            false => (work.layers.len(), geometry.slab_bytes()),
        };
        let part_step = match geometry.slab_bytes() == geometry.slab_stride() {
            true => part_bytes,
            false => geometry.slab_stride(),
        };
        for run in slice {
            for part in 0..parts {
                let part_offset = (part * part_step) as u64;
                let staged = self.slot_address(slot)
                    + ((run.first - first_move) * work.step()) as u64
                    + part_offset;
                let start = run.offset + part_offset;
                let cut = match run.count {
                    1 => crossing(&(start..start + part_bytes as u64)),
                    _ => None,
                };
                let copy = |skip: u64, bytes: u64, rows: usize| {
                    let host = Place::Host(work.pinned.base() + start + skip);
                    let device = Place::Device(staged + skip);
                    let (from, to, from_pitch, to_pitch) = match self.direction {
                        Direction::Load => (host, device, run.step as usize, work.step()),
                        Direction::Save => (device, host, work.step(), run.step as usize),
                    };
                    let rows = Rows {
                        row_bytes: bytes as usize,
                        rows,
                        from_pitch,
                        to_pitch,
                    };
                    // SAFETY: the rows are slabs of the transfer's slots, within one pinned segment
                    // (see `runs` and `crossing`), and of a staging slot that the streams' order
                    // gives to this slice alone. The submission's fence keeps the slots.
                    unsafe { copy_rows(&self.copies[self.turn], from, to, rows) }
                };
                match cut {
                    None => copy(0, part_bytes as u64, run.count)?,
                    Some(at) => {
                        copy(0, at - start, 1)?;
                        copy(at - start, start + part_bytes as u64 - at, 1)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Puts the kernel between a staging slot and the pages on the stream.
    fn launch(&self, work: &Work<'_>, slot: usize, moves: &Range<usize>) -> Result<()> {
        let mut job = work.prepared.job(work.transfer, moves, &work.layers)?;
        job.slab_base = self.slot_address(slot);
        job.slab_step = work.step() as u64;
        // SAFETY: as in `direct`, but that slabs are in a staging slot that the streams' order gives
        // to this slice alone, and that starts on a multiple of the widest vector.
        unsafe {
            work.shared.kernels.launch(
                &self.kernels,
                self.direction,
                &job,
                work.layers.len() as u32,
                work.calibration.staging_blocks,
            )
        }
    }

    /// Forgets what has arrived. Fences that somebody waited for have freed their transfers already.
    fn reap(&mut self) {
        self.in_flight
            .retain(|fence| matches!(fence.is_reached(), Ok(false)));
    }

    fn streams(&self) -> [&OwnStream; 3] {
        let [even, odd] = &self.copies;
        [even, odd, &self.kernels]
    }

    /// Waits until nothing is under way; `false` after `timeout`.
    pub(super) fn drain(&mut self, timeout: Duration) -> bool {
        let in_flight = mem::take(&mut self.in_flight);
        drain(self.streams(), in_flight, timeout)
    }
}

/// After a failed submission: returns when nothing of it moves any more. Where that does not come to
/// pass, what it uses is never freed, and the transfer says so.
pub(super) fn settle<'a>(streams: impl IntoIterator<Item = &'a OwnStream>, transfer: &Transfer) {
    if !is_idle_within(SETTLE_MAX, streams) {
        mem::forget(transfer.clone());
        transfer.mark_unsettled();
    }
}

/// Waits until everything on `streams` has ended, also what belongs to submissions that failed and have no
/// fence; `false` after `timeout`: what `fences` hold is never freed then.
pub(super) fn drain<'a>(
    streams: impl IntoIterator<Item = &'a OwnStream>,
    fences: VecDeque<CudaFence>,
    timeout: Duration,
) -> bool {
    let is_idle = is_idle_within(timeout, streams);
    if !is_idle {
        mem::forget(fences);
    }
    is_idle
}

/// Does nothing run on `streams` any more? `false` after `timeout`. The streams themselves are asked: to record
/// an event takes what may just have run out.
pub(super) fn is_idle_within<'a>(
    timeout: Duration,
    streams: impl IntoIterator<Item = &'a OwnStream>,
) -> bool {
    let mut busy: Vec<&OwnStream> = streams.into_iter().collect();
    let idle = || {
        busy.retain(|stream| matches!(stream.is_idle(), Ok(false)));
        Ok(busy.is_empty())
    };
    matches!(poll(timeout, idle), Ok(true))
}

impl Work<'_> {
    /// The same for some of its layers.
    pub(super) fn of(&self, layers: Range<u32>) -> Work<'_> {
        Work { layers, ..*self }
    }

    /// Bytes of one move in a staging slot.
    pub(super) fn step(&self) -> usize {
        self.layers.len() * self.transfer.table().kv.geometry().slab_stride()
    }

    /// Bytes from the first layer's first byte to the last one's last in a slot.
    fn row_bytes(&self) -> usize {
        let geometry = self.transfer.table().kv.geometry();
        (self.layers.len() - 1) * geometry.slab_stride() + geometry.slab_bytes()
    }

    fn rates(&self, direction: Direction) -> &LinkRates {
        match direction {
            Direction::Load => &self.calibration.load,
            Direction::Save => &self.calibration.save,
        }
    }
}

/// Orders `stream` behind a fence; one that is not this kind of device's is waited for.
pub(super) fn order(stream: Stream, fence: &Fence) -> Result<()> {
    let point = fence.point();
    match point.as_any().downcast_ref::<CudaFence>() {
        Some(fence) => fence.event().order(stream),
        None => wait_on_host(point),
    }
}

pub(super) fn wait_on_host(point: &dyn FencePoint) -> Result<()> {
    match point.wait(HOST_WAIT_MAX)? {
        true => Ok(()),
        false => Err(Error::unavailable("a fence did not arrive in time")
            .with("seconds", HOST_WAIT_MAX.as_secs())),
    }
}
