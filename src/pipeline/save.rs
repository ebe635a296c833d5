//! Save: pages → host, layer by layer, published last; then on to disk in the background.

use std::collections::BTreeSet;
use std::mem;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use stemkv_store::{
    CodecId, Direction, EncodedSave, Fence, Filling, Job, JobEvent, LayerId, PageTable,
    RecordHeader, SlabEntry, SlabMove, Slot, SlotId, Urgency,
};
use tokio::sync::watch;

use crate::hash::HashPath;
use crate::index::Claim;
use crate::pipeline::device::Keeping;
use crate::pipeline::load::{Arrival, Load};
use crate::pipeline::pace::TimedSave;
use crate::pipeline::packing;
use crate::pipeline::tasks::Running;
use crate::pipeline::writer::{self, Answer, WriteItem};
use crate::pipeline::{Driven, GivenBack, HashedPath, Pages, PagesFree, Shared};
use crate::stats::{Counter, Stage};
use crate::{Error, Result};

/// Blocks that are published under one acquisition of the index's mutex.
const PUBLISHED_AT_ONCE: usize = 256;

/// What a save covers, known when it is submitted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SaveReport {
    /// Tokens of the prompt's full blocks.
    pub tokens: usize,
    /// Blocks that were in some tier already, or that another save is bringing.
    pub known_blocks: usize,
    /// Blocks that this save brings.
    pub new_blocks: usize,
    /// Blocks left out, because no room could be made in the host tier.
    pub declined_blocks: usize,
}

/// What became durable of a save's new blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Durability {
    /// Blocks that survive a power cut from now on.
    pub durable_blocks: usize,
    /// Blocks that are in RAM alone: there is no disk tier, or it declined or failed. Those that are written
    /// later, once there is room, are not told of here.
    pub undurable_blocks: usize,
    /// Blocks that were given up: a copy failed, the save was dropped before its last layer, or a load that
    /// it was computed from did not come whole.
    pub abandoned_blocks: usize,
}

/// A save under way.
///
/// Three moments: the engine hands each layer over as it is written ([`Save::layer`]), its pages are
/// free when they were copied ([`Save::pages_free`]), and the blocks are durable when they are
/// synced ([`Save::durable`]). Dropped before the last layer was handed over, a save is given up;
/// after it, it completes in the background.
#[must_use = "a save that gets no layers is given up when it is dropped"]
pub struct Save(Arc<Run>);

struct Run {
    shared: Arc<Shared>,
    on: Arc<Driven>,
    path: HashedPath,
    table: PageTable,
    /// Encoded with this where that makes slabs smaller.
    codec: Option<CodecId>,
    report: SaveReport,
    begun: Duration,
    timed: Arc<TimedSave>,
    cancelled: Arc<AtomicBool>,
    state: Mutex<State>,
    pages: watch::Sender<Pages>,
    durable: watch::Sender<Option<Durability>>,
}

struct State {
    /// `None` once everything is published or given up.
    claim: Option<Claim>,
    /// The slots of the claimed blocks, with their positions, ascending.
    fillings: Vec<(usize, Filling)>,
    /// What goes into the device tier besides.
    keeping: Option<Keeping>,
    handed_over: Vec<bool>,
    /// Shared by the jobs that encode.
    encoded: Option<EncodedSave>,
    /// The fillings that the jobs write, by their index.
    moving: Vec<usize>,
    /// Those of them whose slots are too short.
    overflowed: BTreeSet<usize>,
    /// Layers of `moving` that arrived.
    layers_done: usize,
    /// Of the fillings, so many were cleared ahead.
    cleared: usize,
    /// Blocks that were left out on the way.
    abandoned: usize,
    jobs_open: usize,
    failed: bool,
    /// A copy did not end in time.
    lost: bool,
    /// What is saved was computed from these.
    computed_from: Vec<Arrival>,
    /// From the last hand-over to the end: a close waits for it.
    running: Option<Running>,
}

pub(crate) fn save(
    shared: &Arc<Shared>,
    on: &Arc<Driven>,
    prompt: &mut dyn HashPath,
    table: PageTable,
) -> Result<Save> {
    shared.check_open()?;
    shared.check_path(prompt)?;
    shared.check_pages(on, &table.kv)?;
    let begun = shared.clock.now();
    let blocks = prompt.blocks();
    prompt.hash_to(blocks);
    // Hashing is the same for raw and encoded, and often done before.
    let hashed = shared.clock.now();
    let block_tokens = shared.config.geometry.block_tokens as usize;
    let mut claim = shared.index.claim(prompt, blocks);
    let claimed = claim.positions().to_vec();
    if let Some(&first) = claimed.first() {
        table.check((first * block_tokens) as u64..(blocks * block_tokens) as u64)?;
    }
    let (codec, fillings) = match claimed.len() {
        0 => (None, Vec::new()),
        count => {
            let codec = packing::next(shared, on, count);
            (codec, packing::allocate(shared, codec, count))
        }
    };
    let declined = claimed.len() - fillings.len();
    if declined > 0 {
        claim.abandon_from(claimed[fillings.len()]);
    }
    shared.recorder.add(Counter::Saves, 1);
    shared.recorder.add(Counter::DeclinedBlocks, declined);
    let report = SaveReport {
        tokens: blocks * block_tokens,
        known_blocks: blocks - claimed.len(),
        new_blocks: fillings.len(),
        declined_blocks: declined,
    };
    let new = &claimed[..fillings.len()];
    let keeping = match new.is_empty() {
        true => None,
        false => Keeping::new(shared, on, new),
    };
    let path = HashedPath {
        root: prompt.root(),
        flat: prompt.is_flat(),
        keys: prompt.hashed()[..blocks].into(),
    };
    let run = Arc::new(Run {
        shared: shared.clone(),
        on: on.clone(),
        path,
        table,
        codec,
        report,
        begun,
        timed: Arc::new(TimedSave::new(shared, on, hashed, codec.is_some())),
        cancelled: Arc::default(),
        state: Mutex::new(State {
            claim: Some(claim),
            encoded: codec.map(EncodedSave::new),
            moving: (0..fillings.len()).collect(),
            overflowed: BTreeSet::new(),
            fillings: claimed.into_iter().zip(fillings).collect(),
            keeping,
            handed_over: vec![false; shared.config.geometry.layers as usize],
            layers_done: 0,
            cleared: 0,
            abandoned: 0,
            jobs_open: 0,
            failed: false,
            lost: false,
            computed_from: Vec::new(),
            running: None,
        }),
        pages: watch::Sender::new(Pages::InUse),
        durable: watch::Sender::new(None),
    });
    if run.report.new_blocks == 0 {
        run.give_up(run.state());
    }
    Ok(Save(run))
}

impl Run {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hand_over(self: &Arc<Self>, layers: Range<u32>, written: Fence) -> Result<()> {
        let all = self.shared.config.geometry.layers;
        if layers.is_empty() || layers.end > all {
            return Err(Error::invalid("no such layer").with("layer", layers.start));
        }
        let mut state = self.state();
        let slice = layers.start as usize..layers.end as usize;
        if state.handed_over[slice.clone()].contains(&true) {
            return Err(
                Error::invalid("the layer was handed over before").with("layer", layers.start)
            );
        }
        state.handed_over[slice].fill(true);
        if !state.handed_over.contains(&false) && state.claim.is_some() {
            state.running = Some(self.shared.tasks.begin());
        }
        if state.claim.is_none() || state.failed {
            // Nothing to save, or nothing to be saved any more: the caller goes on as always.
            return Ok(());
        }
        let block_tokens = self.shared.config.geometry.block_tokens;
        let mut kept = None;
        let keep = state.keeping.as_ref().filter(|keeping| !keeping.failed);
        let keep = keep.map(|keeping| keeping.moves(block_tokens));
        if let Some(moves) = keep {
            let run = self.clone();
            let job = Job {
                direction: Direction::Save,
                layers: layers.clone(),
                table: self.table.clone(),
                moves,
                urgency: Urgency::Demand,
                from_token: 0,
                encoded: None,
                after: vec![written.clone()],
                begin_by: None,
                events: Box::new(move |event| run.kept(event)),
                cancelled: self.cancelled.clone(),
            };
            kept = Some(job);
            state.jobs_open += 1;
        }
        let job = self.job(&state, layers, vec![written]);
        state.jobs_open += 1;
        drop(state);
        // Outside the lock: an inline queue runs the job, events included, before it returns.
        if let Some(job) = kept
            && let Err(error) = self.on.transfers.submit(job)
        {
            tracing::debug!(%error, "a save into the device tier was declined");
            self.kept_ended(|keeping| keeping.failed = true);
        }
        self.submit(job);
        Ok(())
    }

    /// Some layers of the chunks that move, into the host tier.
    fn job(self: &Arc<Self>, state: &State, layers: Range<u32>, after: Vec<Fence>) -> Job {
        let block_tokens = self.shared.config.geometry.block_tokens;
        let moves = state.moving.iter().map(|&index| {
            let (position, filling) = &state.fillings[index];
            SlabMove::Save {
                slot: filling.writer(),
                token: *position as u32 * block_tokens,
            }
        });
        let mut timed = self.timed.job();
        let run = self.clone();
        Job {
            direction: Direction::Save,
            layers,
            table: self.table.clone(),
            moves: moves.collect(),
            urgency: Urgency::Demand,
            from_token: 0,
            encoded: state.encoded.clone(),
            after,
            begin_by: None,
            events: Box::new(move |event| {
                timed.event(&event);
                run.event(event);
            }),
            cancelled: self.cancelled.clone(),
        }
    }

    /// Submits a job that counts as open already.
    fn submit(self: &Arc<Self>, job: Job) {
        if let Err(error) = self.on.transfers.submit(job) {
            tracing::debug!(%error, "a save was declined");
            let mut state = self.state();
            state.jobs_open -= 1;
            state.failed = true;
            self.settle(state);
        }
    }

    /// Brings the chunks that did not fit once more, raw: their pages are the save's until it ends.
    fn save_again(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        // Counts as open, so that nobody else settles meanwhile.
        state.jobs_open += 1;
        let mut again: Vec<usize> = mem::take(&mut state.overflowed).into_iter().collect();
        drop(state);
        let began = self.shared.clock.now();
        let geometry = &self.shared.config.geometry;
        let all = self.report.new_blocks;
        let packing = &self.shared.packing;
        packing.did_not_fit(again.len(), all, geometry.payload_bytes());
        self.shared
            .recorder
            .add(Counter::ResavedBlocks, again.len());
        let room = self.shared.allocate(again.len());
        self.timed.worked_since(began);
        let mut state = self.state();
        if let Some(&lost) = again.get(room.len()) {
            let position = state.fillings[lost].0;
            if let Some(claim) = &mut state.claim {
                claim.abandon_from(position);
            }
            state.abandoned += state.fillings.len() - lost;
            state.fillings.truncate(lost);
            again.truncate(room.len());
        }
        for (&index, filling) in again.iter().zip(room) {
            state.fillings[index].1 = filling;
        }
        state.encoded = None;
        state.moving = again;
        if state.moving.is_empty() {
            state.jobs_open -= 1;
            return self.settle(state);
        }
        state.layers_done = 0;
        let job = self.job(&state, 0..geometry.layers, Vec::new());
        drop(state);
        self.submit(job);
    }

    /// Called from the transfer thread, for the device tier: what fails there fails there alone.
    fn kept(self: &Arc<Self>, event: JobEvent) {
        match event {
            JobEvent::Begun => {}
            JobEvent::Layer { layer, slabs, .. } => {
                if let Some(keeping) = &mut self.state().keeping {
                    keeping.layer(layer.0, slabs);
                }
            }
            JobEvent::Failed { error, .. } => {
                tracing::warn!(%error, "a layer could not be saved into the device tier");
                self.shared.recorder.add(Counter::TransferErrors, 1);
                if let Some(keeping) = &mut self.state().keeping {
                    keeping.failed = true;
                }
            }
            JobEvent::Done { settled } => {
                if !settled {
                    self.state().lost = true;
                }
                self.kept_ended(|keeping| keeping.failed |= !settled);
            }
        }
    }

    fn kept_ended(self: &Arc<Self>, note: impl FnOnce(&mut Keeping)) {
        let mut state = self.state();
        state.jobs_open -= 1;
        if let Some(keeping) = &mut state.keeping {
            note(keeping);
        }
        self.settle(state);
    }

    /// Called from the transfer thread.
    fn event(self: &Arc<Self>, event: JobEvent) {
        let mut state = self.state();
        match event {
            JobEvent::Begun => {}
            JobEvent::Layer { layer, slabs, .. } => state.layer_arrived(layer, &slabs),
            JobEvent::Failed { layer, error, .. } => {
                tracing::warn!(%error, %layer, "a layer could not be saved");
                self.shared.recorder.add(Counter::TransferErrors, 1);
                state.failed = true;
            }
            JobEvent::Done { settled } => {
                state.jobs_open -= 1;
                state.failed |= !settled;
                state.lost |= !settled;
                self.settle(state);
            }
        }
    }

    /// Publishes when the last layer has arrived, gives up when that cannot happen any more.
    fn settle(self: &Arc<Self>, state: MutexGuard<'_, State>) {
        if state.jobs_open > 0 || state.claim.is_none() {
            return;
        }
        let complete = state.layers_done == self.shared.config.geometry.layers as usize;
        if complete && !state.failed && !state.overflowed.is_empty() {
            return self.save_again(state);
        }
        // A queue that is closed ends a job without its layers and without a failure.
        let ended = !state.handed_over.contains(&false);
        if complete && !state.failed {
            match state.is_of_whole_loads() {
                None => self.wait_for_loads(state),
                Some(true) => self.publish(state),
                Some(false) => self.give_up(state),
            }
        } else if state.failed || ended {
            self.give_up(state);
        }
    }

    /// Everything is copied, and a load that it was computed from has not ended: the pages are the
    /// engine's, and a task waits for what the load says.
    fn wait_for_loads(self: &Arc<Self>, state: MutexGuard<'_, State>) {
        let (loads, pages) = (state.computed_from.clone(), state.pages());
        drop(state);
        self.pages.send_replace(pages);
        let waiting = Waiting(self.clone());
        self.shared.tasks.spawn(async move {
            for load in loads {
                if !load.wait().await {
                    break;
                }
            }
            drop(waiting);
        });
    }

    fn give_up(&self, mut state: MutexGuard<'_, State>) {
        let (claim, fillings) = (state.claim.take(), mem::take(&mut state.fillings));
        let keeping = state.keeping.take();
        let _running = state.running.take();
        let left_out = state.abandoned;
        let pages = state.pages();
        drop(state);
        // Whatever happens from here on, the engine gets its pages and an answer.
        let given_back = GivenBack(&self.pages, pages);
        let abandoned_blocks = fillings.len() + left_out;
        let answered = Answered(&self.durable, abandoned_blocks);
        let recorder = &self.shared.recorder;
        recorder.add(Counter::AbandonedBlocks, abandoned_blocks);
        drop((claim, fillings, keeping));
        drop(given_back);
        drop(answered);
    }

    /// Publish last: sealed with its header, then visible in the index, then on its way to disk.
    fn publish(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        let Some(mut claim) = state.claim.take() else {
            return;
        };
        let fillings = mem::take(&mut state.fillings);
        let keeping = state.keeping.take();
        let pages = state.pages();
        let _running = state.running.take();
        let left_out = state.abandoned;
        drop(state);
        let began = self.shared.clock.now();
        let count = fillings.len();
        // Whatever happens from here on, the engine gets its pages and an answer.
        let _given_back = GivenBack(&self.pages, pages);
        let answered = Answered(&self.durable, left_out + count);
        let header = self.path.headers(&self.shared.config);
        let (positions, chunks): (Vec<usize>, Vec<_>) = fillings
            .into_iter()
            .map(|(position, filling)| {
                let header = RecordHeader {
                    codec: self.codec.unwrap_or(CodecId::Raw),
                    ..header(position)
                };
                (position, (filling, header))
            })
            .unzip();
        let sealed = self.shared.arena.seal_all(chunks);
        let mut published: Vec<(usize, Slot)> = Vec::with_capacity(count);
        for (position, slot) in positions.into_iter().zip(sealed) {
            match slot {
                Ok(slot) => published.push((position, slot)),
                Err(error) => {
                    tracing::error!(%error, "a chunk could not be sealed");
                    claim.abandon_from(position);
                    break;
                }
            }
        }
        for chunks in published.chunks(PUBLISHED_AT_ONCE) {
            let with_id = |(position, slot): &(usize, Slot)| (*position, slot.clone().into_id());
            let slots: Vec<(usize, SlotId)> = chunks.iter().map(with_id).collect();
            claim.publish_all(&slots);
        }
        let abandoned = left_out + count - published.len();
        let bytes = published.len() as u64 * self.shared.config.image_bytes();
        let recorder = &self.shared.recorder;
        recorder.add(Counter::SavedBlocks, published.len());
        recorder.add(Counter::AbandonedBlocks, abandoned);
        if self.codec.is_some() {
            let is_encoded = |(_, slot): &&(usize, Slot)| slot.codec() != CodecId::Raw;
            let encoded = published.iter().filter(is_encoded).count();
            recorder.add(Counter::SavedEncodedBlocks, encoded);
            let raw_payload = self.shared.config.geometry.payload_bytes();
            self.shared.packing.published(raw_payload, &published);
        }
        recorder.time(
            Stage::SaveCopy,
            self.shared.clock.now().saturating_sub(self.begun),
            bytes,
        );
        let run = self.clone();
        let answer = Answer::new(published.len(), move |durable_blocks, undurable_blocks| {
            let durability = Durability {
                durable_blocks,
                undurable_blocks,
                abandoned_blocks: abandoned,
            };
            run.durable.send_replace(Some(durability));
        });
        // The answer says so from here on, also where it is dropped.
        mem::forget(answered);
        let pin = Arc::new(claim.into_pin());
        if let Some(keeping) = keeping {
            keeping.publish(&self.shared, &self.on, &pin, &self.path, &published);
        }
        let item = WriteItem {
            pin,
            path: self.path.clone(),
            chunks: published,
            answer,
        };
        let geometry = &self.shared.config.geometry;
        let saved = item.chunks.len() * geometry.slab_bytes() * geometry.layers as usize;
        writer::enqueue(&self.shared, item);
        self.timed.worked_since(began);
        self.timed.saved(saved as u64);
    }
}

/// Blocks of a save that are told to be given up when it is dropped: also by a panic on the way.
struct Answered<'a>(&'a watch::Sender<Option<Durability>>, usize);

impl Drop for Answered<'_> {
    fn drop(&mut self) {
        self.0.send_replace(Some(Durability {
            abandoned_blocks: self.1,
            ..Durability::default()
        }));
    }
}

/// A complete save that waits for the loads that it was computed from. Dropped before they have
/// ended, as by a runtime that shuts down, it is given up.
struct Waiting(Arc<Run>);

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.failed |= state.is_of_whole_loads().is_none();
        self.0.settle(state);
    }
}

impl State {
    /// Whose the pages are once no job is open.
    fn pages(&self) -> Pages {
        match self.lost {
            true => Pages::Lost,
            false => Pages::Free,
        }
    }

    /// Did everything that it was computed from come whole? `None` while that is not known.
    fn is_of_whole_loads(&self) -> Option<bool> {
        let loads = || self.computed_from.iter().map(Arrival::is_whole);
        match loads().any(|load| load == Some(false)) {
            true => Some(false),
            false => loads().all(|load| load.is_some()).then_some(true),
        }
    }

    fn layer_arrived(&mut self, layer: LayerId, slabs: &[SlabEntry]) {
        for (&index, slab) in self.moving.iter().zip(slabs) {
            match slab.bytes {
                0 => drop(self.overflowed.insert(index)),
                _ => self.fillings[index].1.set_stored(layer, *slab),
            }
        }
        self.layers_done += 1;
        self.clear_ahead();
    }

    /// Does a part of the sealing while further layers are on their way: the engine waits for what is done
    /// behind the last one. Little by little in the second half, when there is the most to be done at a time
    /// for each chunk, and what is left then before the last layer.
    fn clear_ahead(&mut self) {
        let (all, done) = (self.handed_over.len(), self.layers_done);
        if done <= all / 2 || done >= all {
            return;
        }
        let until = self.fillings.len() * (done - all / 2) / (all - 1 - all / 2);
        let from = if done == all - 1 { 0 } else { self.cleared };
        let fillings = self.fillings.iter_mut().take(until).skip(from);
        fillings.for_each(|(_, filling)| filling.clear_ahead());
        self.cleared = self.cleared.max(until);
    }
}

impl Save {
    /// What the save covers.
    pub fn report(&self) -> &SaveReport {
        &self.0.report
    }

    /// Hands one layer over: the engine has written its KV of all new blocks, at `written`. Any
    /// order, each layer once. Does not wait.
    ///
    /// A failure of ours is not reported here: the save is given up and the engine goes on.
    ///
    /// With the last layer the save can no longer be taken back. A pass that overlaps a load hands it
    /// over before [`Load::finish`] can say whether what it computes with is whole: it says so first, with
    /// [`Save::computed_from`].
    ///
    /// # Errors
    /// `Invalid` for a layer out of range or handed over before.
    pub fn layer(&self, layer: u32, written: Fence) -> Result<()> {
        self.0.hand_over(layer..layer.saturating_add(1), written)
    }

    /// [`Save::layer`] for all layers at once: for KV whose loads, if it was computed from any, were
    /// called whole by [`Load::finish`], or were named to [`Save::computed_from`].
    ///
    /// # Errors
    /// `Invalid` where a layer was handed over before.
    pub fn all_layers(&self, written: Fence) -> Result<()> {
        self.0
            .hand_over(0..self.0.shared.config.geometry.layers, written)
    }

    /// Says that what is saved is computed from what `load` brings: the save is published only once that
    /// load has ended with all of [`Load::tokens`] whole, and is given up otherwise, also where the load is
    /// cancelled before that. Of several loads all must be whole. Needed where layers are handed over before
    /// [`Load::finish`] has answered, since a GPU finds damage behind a layer that was answered already.
    ///
    /// Does not wait, and neither do layers: the pages are free once they were copied, and the save goes on
    /// when the load, which has its own bounds, has ended. The handles may be dropped as always.
    ///
    /// # Errors
    /// `Invalid` where the last layer was handed over already.
    pub fn computed_from(&self, load: &Load) -> Result<()> {
        let mut state = self.0.state();
        if !state.handed_over.contains(&false) {
            return Err(Error::invalid(
                "the last layer was handed over before it was said what it was computed from",
            ));
        }
        state.computed_from.push(load.arrival());
        Ok(())
    }

    /// Tells when every copy out of the pages is done; works also after the save was dropped.
    ///
    /// By then what was saved can be matched: whoever gives the pages to another request finds the blocks in
    /// the store. That takes half a microsecond to two and a half for each, behind the last copy.
    pub fn pages_free(&self) -> PagesFree {
        PagesFree(self.0.pages.subscribe())
    }

    /// Waits until the save's new blocks are durable, or it is known that they will not be.
    ///
    /// # Cancel safety
    /// May be dropped and called again; the save goes on.
    pub async fn durable(&self) -> Durability {
        let mut durable = self.0.durable.subscribe();
        durable
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|durable| *durable)
            .unwrap_or_default()
    }

    /// [`Save::durable`] for a thread.
    pub fn durable_blocking(&self) -> Durability {
        pollster::block_on(self.durable())
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        let mut state = self.0.state();
        if state.handed_over.contains(&false) {
            self.0.cancelled.store(true, Ordering::Release);
            state.failed = true;
            self.0.settle(state);
        }
    }
}
