//! One load, as its jobs and its gathering task see it.

use std::mem;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use stemkv_store::{
    CodecId, DeviceSlot, Direction, Job, JobEvent, PageTable, SlabMove, Slot, Tier, Urgency,
};
use tokio::sync::watch;

use crate::ErrorKind;
use crate::index::{BlockState, Pin};
use crate::pipeline::device::{self, Lowering};
use crate::pipeline::pace::Begun;
use crate::pipeline::reader::{self, Ticket};
use crate::pipeline::{Driven, GivenBack, HashedPath, Meter, Pages, Priority, Shared};
use crate::placement::Choice;
use crate::stats::{Counter, Stage};

use super::progress::Progress;
use super::{LoadOptions, LoadReport};

pub(super) struct Run {
    pub(super) shared: Arc<Shared>,
    pub(super) on: Arc<Driven>,
    /// Given up before the pages are reported free, so that who waited for that finds nothing pinned, but
    /// for what goes up into the device tier then.
    pub(super) pin: Mutex<Option<Arc<Pin>>>,
    pub(super) table: PageTable,
    pub(super) options: LoadOptions,
    /// One past the last block that the lease covers, and that is to be loaded.
    pub(super) leased: usize,
    pub(super) asked: usize,
    pub(super) choice: Option<Choice>,
    pub(super) begun: Duration,
    pub(super) cancelled: Arc<AtomicBool>,
    pub(super) cancel: watch::Sender<bool>,
    /// Blocks below this one are the engine's, where nothing was submitted of them.
    pub(super) watermark: watch::Sender<usize>,
    pub(super) progress: watch::Sender<Progress>,
    pub(super) pages: watch::Sender<Pages>,
    /// From the call to the last byte, once that is known.
    pub(super) took: OnceLock<Duration>,
}

/// Where a block's chunk comes from.
pub(super) enum Source {
    Device(DeviceSlot),
    Host(Slot),
    /// On its way down from another device, which alone has it.
    Lowering(Arc<Lowering>),
    Disk(Ticket),
    Missing,
}

impl Source {
    pub(super) fn tier(&self) -> Tier {
        match self {
            Source::Device(_) => Tier::Device,
            Source::Host(_) | Source::Lowering(_) => Tier::Host,
            Source::Disk(_) | Source::Missing => Tier::Disk,
        }
    }
}

/// A chunk that can be submitted.
pub(super) struct Chunk {
    pub(super) position: usize,
    /// The tier that it came from.
    pub(super) from: Tier,
    pub(super) at: Place,
}

/// The positions of chunks, and the tiers that they came from.
fn blocks_of(chunks: &[Chunk]) -> Vec<(usize, Tier)> {
    let block = |chunk: &Chunk| (chunk.position, chunk.from);
    chunks.iter().map(block).collect()
}

/// What became of chunks that were submitted together.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Submitted {
    /// They are under way.
    All,
    /// Some are, and the others were declined: all count as coming, for the pages of some are being written, and
    /// the load fails from its first layer on.
    Part,
    /// None are: the transfer queue is full or closed.
    Nothing,
}

/// Where a chunk is when it is submitted.
pub(super) enum Place {
    Device(DeviceSlot),
    Host(Slot),
}

impl Place {
    /// Where it is in the host tier's arena; `None` for a device's slot.
    fn offset(&self) -> Option<usize> {
        match self {
            Place::Device(_) => None,
            Place::Host(slot) => Some(slot.offset()),
        }
    }
}

impl Source {
    /// What can be submitted at once.
    pub(super) fn ready(self) -> Option<Place> {
        match self {
            Source::Device(slot) => Some(Place::Device(slot)),
            Source::Host(slot) => Some(Place::Host(slot)),
            Source::Lowering(_) | Source::Disk(_) | Source::Missing => None,
        }
    }
}

/// Where each of some blocks, from `first` on, comes from; asks for those on disk, and for those that
/// another device alone has.
pub(super) fn sources(
    shared: &Arc<Shared>,
    on: &Arc<Driven>,
    pin: &Arc<Pin>,
    path: &HashedPath,
    first: usize,
    states: &[BlockState],
) -> Vec<(usize, Source)> {
    let in_ram = |state: &BlockState| {
        let tier = on.tier.as_ref();
        if let Some(slot) = tier.and_then(|tier| tier.slot(state)) {
            return Some(Source::Device(slot));
        }
        // Also where it is on its way up: that is behind every load, and for a whole job of chunks.
        let slot = state.host.and_then(|id| shared.slot(id, &state.key))?;
        Some(Source::Host(slot))
    };
    let mut sources: Vec<Option<Source>> = states.iter().map(in_ram).collect();
    for other in shared
        .devices
        .iter()
        .filter(|other| other.number != on.number)
    {
        let has_alone = |(i, state): &(usize, &BlockState)| {
            state.elsewhere == Some(other.number) && state.record.is_none() && sources[*i].is_none()
        };
        let states = states.iter().enumerate();
        let positions: Vec<usize> = states.filter(has_alone).map(|(i, _)| first + i).collect();
        if !positions.is_empty() {
            let coming = device::fetch_down(shared, other, pin, &positions);
            for (position, lowering) in positions.iter().zip(coming) {
                sources[position - first] = Some(Source::Lowering(lowering));
            }
        }
    }
    let wanted: Vec<_> = states
        .iter()
        .enumerate()
        .filter(|(i, _)| sources[*i].is_none())
        .map_while(|(i, state)| state.record.map(|record| (first + i, record)))
        .collect();
    if let Some(disk) = shared.disk.as_ref().filter(|_| !wanted.is_empty()) {
        let tickets = reader::request(shared, disk, pin, path, &wanted, Priority::DEMAND);
        for ((position, _), ticket) in wanted.iter().zip(tickets) {
            sources[position - first] = Some(Source::Disk(ticket));
        }
    }
    let sources = sources.into_iter().enumerate();
    sources
        .map(|(i, source)| (first + i, source.unwrap_or(Source::Missing)))
        .collect()
}

impl Run {
    pub(super) fn pin(&self) -> MutexGuard<'_, Option<Arc<Pin>>> {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_computed(&self, position: usize) -> bool {
        self.progress.borrow().is_computed(position)
    }

    /// Hands chunks to the transfer queue, those of each arena in a job of their own, but for those that
    /// the engine computed meanwhile.
    pub(super) fn submit(self: &Arc<Self>, chunks: Vec<Chunk>) -> Submitted {
        let is_local = |chunk: &Chunk| matches!(chunk.at, Place::Device(_));
        let (local, over_the_link): (Vec<Chunk>, Vec<Chunk>) =
            chunks.into_iter().partition(is_local);
        let is_alone = local.is_empty();
        if !is_alone && !self.submit_job(local, true) {
            return Submitted::Nothing;
        }
        let refused = blocks_of(&over_the_link);
        if over_the_link.is_empty() || self.submit_job(over_the_link, false) {
            return Submitted::All;
        }
        if is_alone {
            return Submitted::Nothing;
        }
        self.progress
            .send_modify(|progress| progress.refuse(&refused, ErrorKind::Busy));
        Submitted::Part
    }

    /// `false` where the queue is full or closed.
    fn submit_job(self: &Arc<Self>, chunks: Vec<Chunk>, is_local: bool) -> bool {
        let blocks = blocks_of(&chunks);
        let mut opened = None;
        self.progress
            .send_modify(|progress| opened = progress.open(&blocks));
        let Some((part, taken)) = opened else {
            return true;
        };
        let opened = Opened {
            progress: &self.progress,
            part,
        };
        let geometry = &self.shared.config.geometry;
        let mut left = taken.iter().peekable();
        let mut sources = Vec::with_capacity(taken.len());
        let taken_chunks = chunks
            .into_iter()
            .filter(|chunk| left.next_if_eq(&&chunk.position).is_some());
        let moves: Vec<SlabMove> = taken_chunks
            .map(|chunk| {
                let token = chunk.position as u32 * geometry.block_tokens;
                sources.push((chunk.position, chunk.at.offset()));
                match chunk.at {
                    Place::Device(slot) => SlabMove::LoadDevice { slot, token },
                    Place::Host(slot) => SlabMove::Load { slot, token },
                }
            })
            .collect();
        let layer_bytes = geometry.slab_bytes() as u64 * taken.len() as u64;
        let mut timed = Timed::new(
            self.shared.clone(),
            self.on.clone(),
            is_local,
            uniform(&moves),
            layer_bytes,
            geometry.layers,
        );
        let run = self.clone();
        let job = Job {
            direction: Direction::Load,
            layers: 0..geometry.layers,
            table: self.table.clone(),
            moves,
            urgency: Urgency::Demand,
            from_token: self.options.from_token as u32,
            encoded: None,
            after: self.options.after.clone(),
            begin_by: self
                .options
                .deadline
                .and_then(|deadline| self.begun.checked_add(deadline)),
            events: Box::new(move |event| {
                timed.event(&event);
                run.event(part, &sources, event);
            }),
            cancelled: self.cancelled.clone(),
        };
        match self.on.transfers.submit(job) {
            Ok(()) => {
                mem::forget(opened);
                true
            }
            Err(error) => {
                tracing::debug!(%error, "a load was declined");
                false
            }
        }
    }

    /// Called from a transfer thread.
    fn event(&self, part: usize, sources: &[(usize, Option<usize>)], event: JobEvent) {
        match event {
            JobEvent::Begun => {}
            JobEvent::Layer { layer, fence, .. } => self
                .progress
                .send_modify(|progress| progress.layer(part, layer, fence)),
            JobEvent::Failed {
                layer,
                good_moves,
                error,
            } => {
                tracing::warn!(%error, %layer, "a layer could not be loaded");
                self.failed(sources.get(good_moves), error.kind());
                self.progress
                    .send_modify(|progress| progress.fail(part, layer, good_moves, error.kind()));
            }
            JobEvent::Done { settled } => {
                self.progress.send_modify(|progress| {
                    progress.close(part);
                    progress.lost |= !settled;
                });
                self.settle_pages();
            }
        }
    }

    /// `first`: the first block that is wrong, and where its chunk is in the host tier.
    fn failed(&self, first: Option<&(usize, Option<usize>)>, kind: ErrorKind) {
        match kind {
            ErrorKind::Corrupt => {
                let pin = self.pin().clone();
                if let (Some(pin), Some(&(position, offset))) = (pin, first) {
                    match offset {
                        None => device::drop_corrupt(&self.shared, &self.on, &pin, position),
                        Some(offset) => self.shared.drop_corrupt_host(&pin, position, offset),
                    }
                }
            }
            // Late by its own deadline.
            ErrorKind::Busy => {}
            _ => self.shared.recorder.add(Counter::TransferErrors, 1),
        }
    }

    pub(super) fn settle_target(&self, target: usize, cut: Option<ErrorKind>) {
        self.progress.send_modify(|progress| {
            progress.target = Some(target);
            progress.cut = cut;
        });
        self.settle_pages();
    }

    /// Once nothing is under way and nothing more will come, the pages are the engine's again.
    fn settle_pages(&self) {
        let pages = match &*self.progress.borrow() {
            progress if !progress.is_settled() => return,
            progress if progress.lost => Pages::Lost,
            _ => Pages::Free,
        };
        // Whoever takes the pin is the one that settles.
        let Some(pin) = self.pin().take() else {
            return;
        };
        // Whatever happens from here on, the engine gets its pages.
        let given_back = GivenBack(&self.pages, pages);
        let first = self.options.from_token / self.shared.config.geometry.block_tokens as usize;
        let whole = self.progress.borrow().whole();
        let rising = self.on.tier.as_ref().map(|_| pin);
        let took = self.shared.clock.now().saturating_sub(self.begun);
        let took = *self.took.get_or_init(|| took);
        let report = self.report();
        let recorder = &self.shared.recorder;
        recorder.time(Stage::Load, took, report.bytes);
        recorder.add(
            Counter::LoadedTokens,
            report.tokens - self.options.from_token,
        );
        recorder.add(Counter::LoadsCut, usize::from(report.cut.is_some()));
        drop(given_back);
        // Planning that takes a while: neither the engine's thread, which may be the one that settles, nor
        // the transfer thread, for which the next load waits, is to do it.
        if let Some(pin) = rising {
            let (shared, on) = (self.shared.clone(), self.on.clone());
            self.shared.tasks.spawn(async move {
                device::promote_hot(&shared, &on, &pin, first..whole);
            });
        }
    }

    pub(super) fn report(&self) -> LoadReport {
        let progress = self.progress.borrow();
        let geometry = &self.shared.config.geometry;
        let block_tokens = geometry.block_tokens as usize;
        let whole = progress.whole();
        LoadReport {
            tokens: (whole * block_tokens).max(self.options.from_token),
            tokens_asked: self.leased * block_tokens,
            device_blocks: progress.came_from(Tier::Device, whole),
            host_blocks: progress.came_from(Tier::Host, whole),
            disk_blocks: progress.came_from(Tier::Disk, whole),
            computed_blocks: progress.own(whole),
            bytes: (progress.slabs() * geometry.slab_bytes()) as u64,
            cut: progress.why(self.asked).map(|kind| kind.to_string()),
            choice: self.choice.clone(),
            seconds: self.took.get().map_or(0.0, Duration::as_secs_f64),
        }
    }
}

/// A job's part that is open and whose job was not accepted yet. Dropped, also by a panic on the way
/// there, its blocks wait again: an open part would keep the load from ever ending.
struct Opened<'a> {
    progress: &'a watch::Sender<Progress>,
    part: usize,
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.progress
            .send_modify(|progress| progress.take_back(self.part));
    }
}

/// Measures one job: its whole for the statistics, and for decisions the link alone, from when nothing
/// stands before it any more.
struct Timed {
    shared: Arc<Shared>,
    on: Arc<Driven>,
    is_local: bool,
    submitted: Duration,
    layer_bytes: u64,
    layers: u64,
    /// Layers that came.
    seen: u64,
    is_measured: bool,
    /// Are all of its chunks encoded, or all raw? Then it tells how fast those are.
    codec: Option<bool>,
    /// Since the job began, where that is measured.
    of_codec: Option<Begun>,
    is_done: bool,
}

/// Are all of them encoded, or all of them raw? `None` for what is mixed or not of the host tier.
fn uniform(moves: &[SlabMove]) -> Option<bool> {
    let mut all = moves.iter().map(|slab_move| match slab_move {
        SlabMove::Load { slot, .. } => Some(slot.codec() != CodecId::Raw),
        _ => None,
    });
    let first = all.next()??;
    all.all(|other| other == Some(first)).then_some(first)
}

impl Timed {
    fn new(
        shared: Arc<Shared>,
        on: Arc<Driven>,
        is_local: bool,
        codec: Option<bool>,
        layer_bytes: u64,
        layers: u32,
    ) -> Self {
        let layers = u64::from(layers);
        let timed = Timed {
            submitted: shared.clock.now(),
            shared,
            on,
            is_local,
            layer_bytes,
            layers,
            seen: 0,
            is_measured: false,
            codec,
            of_codec: None,
            is_done: false,
        };
        timed.meter().queue(layer_bytes * layers);
        timed
    }

    fn meter(&self) -> &Meter {
        match self.is_local {
            true => &self.on.local,
            false => &self.on.link,
        }
    }

    fn begin(&mut self) {
        let now = self.shared.clock.now();
        self.is_measured = true;
        self.meter().begin(now);
        self.of_codec = self.codec.map(|_| self.on.pace.loads.begin(now));
    }

    fn event(&mut self, event: &JobEvent) {
        match event {
            JobEvent::Begun => self.begin(),
            JobEvent::Layer { .. } => self.seen += 1,
            JobEvent::Failed { .. } => {}
            JobEvent::Done { .. } => {
                self.is_done = true;
                let took = self.shared.clock.now().saturating_sub(self.submitted);
                let bytes = self.layer_bytes * self.seen;
                let stage = match self.is_local {
                    true => Stage::DeviceCopy,
                    false => Stage::LoadCopy,
                };
                self.shared.recorder.time(stage, took, bytes);
                self.stop();
            }
        }
    }

    fn stop(&mut self) {
        self.meter().unqueue(self.layer_bytes * self.layers);
        let (now, bytes) = (self.shared.clock.now(), self.layer_bytes * self.seen);
        if mem::take(&mut self.is_measured) {
            self.meter().end(now, bytes);
        }
        if let (Some(begun), Some(is_encoded)) = (self.of_codec.take(), self.codec) {
            let whole = if self.seen == self.layers { bytes } else { 0 };
            self.on.pace.loads.end(now, begun, whole, is_encoded);
        }
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        if !self.is_done {
            self.stop();
        }
    }
}
