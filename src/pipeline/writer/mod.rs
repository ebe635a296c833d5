//! Host → disk: published chunks, in batches, in the background.
//!
//! A child becomes durable after its ancestors, so an item's missing ancestors that are still in the
//! host tier go with it, and behind one that is not there nothing is written. What is taken from the queue
//! is cut into batches of a bounded size, parents first. Two batches are under way
//! at a time: while one is synced and taken in, the next one's bytes go to the disk. The tier makes them
//! durable in the order in which they began, which is that of the queue; a batch that holds children of
//! one under way says so, and is not written where that one is not.
//!
//! | file | question |
//! |---|---|
//! | `taken.rs` | what became of what was taken from the queue, and who is told? |
//! | `plan.rs` | which chunks does a batch need? |
//! | `batch.rs` | how is one written? |
//! | `room.rs` | what goes for it? |
//! | `declined.rs` | what becomes of what there was no room for? |

mod batch;
mod declined;
mod plan;
mod room;
mod taken;

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stemkv_store::{BatchId, Key, Slot};
use tokio::sync::Notify;
use tracing::Instrument as _;

use self::batch::write;
use self::declined::{Declined, Run};
pub(crate) use self::room::{make_room, trim};
use self::taken::{Taken, TakenItems};
use crate::index::Pin;
use crate::pipeline::{DiskSide, HashedPath, Shared};
use crate::stats::Counter;

/// Batches that are under way at a time.
const UNDER_WAY_MAX: usize = 2;

/// Chunks that were just published, with the pin that keeps them there until they are written.
pub(crate) struct WriteItem {
    pub(crate) pin: Arc<Pin>,
    pub(crate) path: HashedPath,
    /// Positions, ascending, with their chunks.
    pub(crate) chunks: Vec<(usize, Slot)>,
    /// Last, so that whoever is told finds nothing pinned, also where the item is dropped.
    pub(crate) answer: Answer,
}

impl WriteItem {
    /// Tells who waits, with nothing pinned any more.
    fn finish(self, durable: usize) {
        let WriteItem {
            pin,
            chunks,
            answer,
            ..
        } = self;
        drop((pin, chunks));
        answer.give(durable);
    }
}

/// Told once how many of an item's chunks became durable, and how many did not. Dropped (with its
/// runtime), it says none.
pub(crate) struct Answer {
    chunks: usize,
    tell: Option<Box<dyn FnOnce(usize, usize) + Send + Sync>>,
}

impl Answer {
    pub(crate) fn new(
        chunks: usize,
        tell: impl FnOnce(usize, usize) + Send + Sync + 'static,
    ) -> Self {
        let tell: Box<dyn FnOnce(usize, usize) + Send + Sync> = Box::new(tell);
        Answer {
            chunks,
            tell: Some(tell),
        }
    }

    /// One that nobody waits for.
    fn nobody(chunks: usize) -> Self {
        Answer { chunks, tell: None }
    }

    fn give(mut self, durable: usize) {
        if let Some(tell) = self.tell.take() {
            tell(durable, self.chunks - durable);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(tell) = self.tell.take() {
            tell(0, self.chunks);
        }
    }
}

/// The write queue.
#[derive(Default)]
pub(crate) struct Writer {
    state: Mutex<State>,
    /// Wakes a batch that waits for company.
    hurry: Notify,
    /// Wakes whoever waits for what was enqueued before, or for a batch to end.
    ended: Notify,
}

#[derive(Default)]
struct State {
    queue: VecDeque<WriteItem>,
    /// Of the queue and the batches under way.
    bytes: u64,
    /// Of the queue alone.
    queued: u64,
    writing: bool,
    flushing: usize,
    /// What was taken from the queue, in its order. What ended before its predecessor stays until that
    /// one ends.
    taken: VecDeque<TakenItems>,
    under_way: Vec<UnderWay>,
    /// Of what was taken, and of the batches.
    next_number: u64,
    /// Items ever enqueued, and how many of them were dealt with, with all before them.
    enqueued: u64,
    dealt_with: u64,
    /// When the last batch that was written ended.
    written_at: Duration,
    declined: Declined,
}

/// What is known of a batch under way.
struct UnderWay {
    number: u64,
    /// Once it has begun: what will be there if it is written.
    begun: Option<(BatchId, Arc<HashSet<Key>>)>,
}

impl State {
    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// May what was declined be taken up? Not beside anything else: saves are to find room. A flush is to find
    /// nothing pinned, and a close not to wait for more than what was begun.
    fn may_take_up(&self, shared: &Shared) -> bool {
        let is_idle = self.bytes == 0 && self.flushing == 0;
        is_idle && self.declined.may_be_taken_up() && shared.check_open().is_ok()
    }
}

impl Writer {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that wait or are being written.
    pub(crate) fn queued_bytes(&self) -> u64 {
        self.state().bytes
    }

    /// Lets a batch that waits for company go.
    pub(crate) fn hurry(&self) {
        self.hurry.notify_one();
    }

    /// Waits until another batch may be under way, which it then is.
    async fn place(&self, shared: &Arc<Shared>) -> Place {
        loop {
            let ended = self.ended.notified();
            {
                let mut state = self.state();
                if state.under_way.len() < UNDER_WAY_MAX {
                    let number = state.number();
                    let begun = None;
                    state.under_way.push(UnderWay { number, begun });
                    let shared = shared.clone();
                    return Place { shared, number };
                }
            }
            ended.await;
        }
    }

    /// What will be on disk if the batches that have begun are written.
    fn begun(&self) -> Vec<(BatchId, Arc<HashSet<Key>>)> {
        let state = self.state();
        let begun = state.under_way.iter().map(|batch| batch.begun.clone());
        begun.flatten().collect()
    }
}

/// Nothing that was declined is taken up until it is dropped.
pub(crate) struct Flushing(Arc<Shared>);

impl Drop for Flushing {
    fn drop(&mut self) {
        if let Some(disk) = &self.0.disk {
            disk.writer.state().flushing -= 1;
            resume(&self.0, disk);
        }
    }
}

/// Waits until everything that was enqueued before is durable or declined, and nothing that was declined
/// is being written.
pub(crate) async fn flush(shared: &Arc<Shared>, disk: &DiskSide) -> Flushing {
    let until = {
        let mut state = disk.writer.state();
        state.flushing += 1;
        state.enqueued
    };
    let flushing = Flushing(shared.clone());
    disk.writer.hurry.notify_one();
    loop {
        let ended = disk.writer.ended.notified();
        {
            let state = disk.writer.state();
            if state.dealt_with >= until && !state.declined.is_trying {
                return flushing;
            }
        }
        ended.await;
    }
}

/// Hands chunks over to be written: as many leading ones as the queue has room for, and at least one where
/// it is empty. The others are declined: they stay in RAM alone until there is room for them.
pub(crate) fn enqueue(shared: &Arc<Shared>, mut item: WriteItem) {
    let decline = |count: usize| shared.recorder.add(Counter::UndurableBlocks, count);
    let Some(disk) = shared.disk.as_ref().filter(|_| !item.chunks.is_empty()) else {
        decline(item.chunks.len());
        return item.finish(0);
    };
    let image_bytes = shared.config.image_bytes();
    let mut state = disk.writer.state();
    let room = disk.config.queue_bytes.saturating_sub(state.bytes) / image_bytes;
    let room = room.max(u64::from(state.bytes == 0)) as usize;
    let over = item.chunks.split_off(room.min(item.chunks.len()));
    decline(over.len());
    if let Some(run) = Run::of(&item.path, &over) {
        state.declined.add(run);
    }
    if item.chunks.is_empty() {
        drop(state);
        drop(over);
        return item.finish(0);
    }
    let bytes = item.chunks.len() as u64 * image_bytes;
    state.bytes += bytes;
    state.queued += bytes;
    state.enqueued += 1;
    state.queue.push_back(item);
    let (start, full) = (!state.writing, state.queued >= disk.config.batch_bytes);
    state.writing = true;
    drop(state);
    drop(over);
    if full {
        disk.writer.hurry.notify_one();
    }
    if start {
        spawn_drain(shared);
    }
}

/// Goes on with what was declined, where nothing else is to be written.
fn resume(shared: &Arc<Shared>, disk: &DiskSide) {
    let mut state = disk.writer.state();
    if state.writing || !state.may_take_up(shared) {
        return;
    }
    state.writing = true;
    drop(state);
    spawn_drain(shared);
}

fn spawn_drain(shared: &Arc<Shared>) {
    shared.tasks.spawn(drain(Draining {
        shared: shared.clone(),
        ended: false,
    }));
}

/// The task that begins batches. Where its runtime ends first, what it leaves is declined.
struct Draining {
    shared: Arc<Shared>,
    /// There was nothing to write, and another task will be started for what comes.
    ended: bool,
}

impl Drop for Draining {
    fn drop(&mut self) {
        let Some(disk) = self.shared.disk.as_ref().filter(|_| !self.ended) else {
            return;
        };
        let mut state = disk.writer.state();
        state.writing = false;
        state.declined.clear();
        drop(state);
        drop(Taken::take(&self.shared, disk, u64::MAX));
    }
}

async fn drain(mut draining: Draining) {
    let shared = draining.shared.clone();
    let Some(disk) = &shared.disk else { return };
    loop {
        let place = disk.writer.place(&shared).await;
        let wait = {
            let mut state = disk.writer.state();
            if !state.queue.is_empty() {
                Some(state.queued < disk.config.batch_bytes && state.flushing == 0)
            } else if state.may_take_up(&shared) {
                state.declined.is_trying = true;
                None
            } else {
                state.writing = false;
                draining.ended = true;
                return;
            }
        };
        if wait == Some(true) && shared.check_open().is_ok() {
            let hurry = disk.writer.hurry.notified();
            let _ = tokio::time::timeout(disk.config.batch_delay(), hurry).await;
        }
        let taken = match wait {
            Some(_) => Taken::take(&shared, disk, disk.config.batch_bytes),
            None => match declined::take_up(&shared, disk) {
                Some(lot) => lot,
                None => {
                    tokio::task::yield_now().await;
                    continue;
                }
            },
        };
        let span = tracing::debug_span!("disk_write", items = taken.items.len());
        write(&shared, disk, taken, place).instrument(span).await;
    }
}

/// A batch's place among those under way, until it is dropped.
struct Place {
    shared: Arc<Shared>,
    number: u64,
}

impl Place {
    /// The batch has begun.
    fn begun(&self, id: BatchId, keys: HashSet<Key>) {
        let Some(disk) = &self.shared.disk else {
            return;
        };
        let mut state = disk.writer.state();
        let mut under_way = state.under_way.iter_mut();
        if let Some(batch) = under_way.find(|batch| batch.number == self.number) {
            batch.begun = Some((id, Arc::new(keys)));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(disk) = &self.shared.disk else {
            return;
        };
        let mut state = disk.writer.state();
        state.under_way.retain(|batch| batch.number != self.number);
        drop(state);
        disk.writer.ended.notify_waiters();
    }
}
