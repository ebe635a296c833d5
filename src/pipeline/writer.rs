//! Host → disk: published chunks, in batches, in the background.
//!
//! A child becomes durable after its ancestors, so an item's missing ancestors that are still in the
//! host tier go with it, and behind one that is not there nothing is written. Two batches are under way
//! at a time: while one is synced and taken in, the next one's bytes go to the disk. The tier makes them
//! durable in the order in which they began, which is that of the queue; a batch that holds children of
//! one under way says so, and is not written where that one is not.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stemkv_store::{BatchId, BatchTooLarge, Key, RecordId, Slot};
use tokio::sync::{Notify, oneshot};
use tracing::Instrument as _;

use crate::index::{Pin, Pool};
use crate::pipeline::{DiskSide, HashedPath, Shared, coding, removing};
use crate::stats::{Counter, Stage};
use crate::{Error, Result};

/// Batches that are under way at a time.
const UNDER_WAY_MAX: usize = 2;

/// Batches that room is made for beyond the next one, and the part of the capacity, one in so many bytes,
/// that this may be at most.
const AHEAD_BATCHES: u64 = 3;
const AHEAD_SHARE: u64 = 64;

/// How often a batch that did not fit is tried again after room was made.
const ROOM_ATTEMPTS: usize = 4;

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
    tell: Option<Box<dyn FnOnce(usize, usize) + Send>>,
}

impl Answer {
    pub(crate) fn new(chunks: usize, tell: impl FnOnce(usize, usize) + Send + 'static) -> Self {
        let tell: Box<dyn FnOnce(usize, usize) + Send> = Box::new(tell);
        Answer {
            chunks,
            tell: Some(tell),
        }
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
    /// In the order of the queue. One that ended before its predecessor stays until that one ends.
    under_way: VecDeque<UnderWay>,
    taken_batches: u64,
    /// Items ever enqueued, and how many of them were dealt with, with all before them.
    enqueued: u64,
    dealt_with: u64,
    /// When the last batch that was written ended.
    written_at: Duration,
}

/// What is known of a batch that was taken from the queue.
struct UnderWay {
    number: u64,
    items: u64,
    has_ended: bool,
    /// Once it has begun: what will be there if it is written.
    begun: Option<(BatchId, Arc<HashSet<Key>>)>,
}

impl State {
    fn under_way(&mut self, number: u64) -> Option<&mut UnderWay> {
        self.under_way
            .iter_mut()
            .find(|batch| batch.number == number)
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

    /// Waits until another batch may be under way.
    async fn room(&self) {
        loop {
            let ended = self.ended.notified();
            if self.under_way() < UNDER_WAY_MAX {
                return;
            }
            ended.await;
        }
    }

    fn under_way(&self) -> usize {
        let state = self.state();
        let under_way = state.under_way.iter().filter(|batch| !batch.has_ended);
        under_way.count()
    }

    /// What will be on disk if the batches that have begun are written.
    fn begun(&self) -> Vec<(BatchId, Arc<HashSet<Key>>)> {
        let state = self.state();
        let under_way = state.under_way.iter().filter(|batch| !batch.has_ended);
        under_way.filter_map(|batch| batch.begun.clone()).collect()
    }

    /// Waits until everything that was enqueued before is durable or declined.
    pub(crate) async fn flush(&self) {
        struct Flushing<'a>(&'a Writer);
        impl Drop for Flushing<'_> {
            fn drop(&mut self) {
                self.0.state().flushing -= 1;
            }
        }
        let until = {
            let mut state = self.state();
            state.flushing += 1;
            state.enqueued
        };
        let _flushing = Flushing(self);
        self.hurry.notify_one();
        loop {
            let ended = self.ended.notified();
            if self.state().dealt_with >= until {
                return;
            }
            ended.await;
        }
    }
}

/// Hands chunks over to be written; over the bound they are declined and stay in RAM alone.
pub(crate) fn enqueue(shared: &Arc<Shared>, item: WriteItem) {
    let decline = |item: WriteItem| {
        let count = item.chunks.len();
        shared.recorder.add(Counter::UndurableBlocks, count);
        item.finish(0);
    };
    let Some(disk) = shared.disk.as_ref().filter(|_| !item.chunks.is_empty()) else {
        return decline(item);
    };
    let bytes = item.chunks.len() as u64 * shared.config.image_bytes();
    let mut state = disk.writer.state();
    if state.bytes + bytes > disk.config.queue_bytes {
        drop(state);
        return decline(item);
    }
    state.bytes += bytes;
    state.queued += bytes;
    state.enqueued += 1;
    state.queue.push_back(item);
    let (start, full) = (!state.writing, state.queued >= disk.config.batch_bytes);
    state.writing = true;
    drop(state);
    if full {
        disk.writer.hurry.notify_one();
    }
    if start {
        shared.tasks.spawn(drain(Draining {
            shared: shared.clone(),
            ended: false,
        }));
    }
}

/// The task that begins batches. Where its runtime ends first, what it leaves is declined.
struct Draining {
    shared: Arc<Shared>,
    /// The queue was empty, and another task will be started for what comes.
    ended: bool,
}

impl Drop for Draining {
    fn drop(&mut self) {
        let Some(disk) = self.shared.disk.as_ref().filter(|_| !self.ended) else {
            return;
        };
        disk.writer.state().writing = false;
        drop(Batch::take(&self.shared, disk, u64::MAX));
    }
}

async fn drain(mut draining: Draining) {
    let shared = draining.shared.clone();
    let Some(disk) = &shared.disk else { return };
    loop {
        disk.writer.room().await;
        let wait = {
            let mut state = disk.writer.state();
            if state.queue.is_empty() {
                state.writing = false;
                draining.ended = true;
                return;
            }
            state.queued < disk.config.batch_bytes && state.flushing == 0
        };
        if wait && shared.check_open().is_ok() {
            let hurry = disk.writer.hurry.notified();
            let _ = tokio::time::timeout(disk.config.batch_delay(), hurry).await;
        }
        let batch = Batch::take(&shared, disk, disk.config.batch_bytes);
        let span = tracing::debug_span!("disk_write", items = batch.items.len());
        if let Some(writing) = begin(&shared, disk, batch).instrument(span.clone()).await {
            shared
                .tasks
                .spawn(finish(shared.clone(), writing).instrument(span));
        }
    }
}

/// Items that were taken from the queue. Dropped, they are declined.
struct Batch {
    shared: Arc<Shared>,
    number: u64,
    bytes: u64,
    items: Vec<WriteItem>,
}

impl Batch {
    /// Takes the first items of the queue: at least one, and no more than `limit` bytes.
    fn take(shared: &Arc<Shared>, disk: &DiskSide, limit: u64) -> Batch {
        let mut state = disk.writer.state();
        let (mut items, mut bytes) = (Vec::new(), 0);
        while let Some(item) = state.queue.front() {
            let item_bytes = item.chunks.len() as u64 * shared.config.image_bytes();
            if bytes > 0 && bytes + item_bytes > limit {
                break;
            }
            bytes += item_bytes;
            items.extend(state.queue.pop_front());
        }
        state.queued -= bytes;
        let number = state.taken_batches;
        state.taken_batches += 1;
        state.under_way.push_back(UnderWay {
            number,
            items: items.len() as u64,
            has_ended: false,
            begun: None,
        });
        Batch {
            shared: shared.clone(),
            number,
            bytes,
            items,
        }
    }

    /// Tells who waits how many chunks of each item became durable.
    fn finish(mut self, durable: Vec<usize>) {
        for (item, durable) in std::mem::take(&mut self.items).into_iter().zip(durable) {
            let recorder = &self.shared.recorder;
            recorder.add(Counter::DurableBlocks, durable);
            recorder.add(Counter::UndurableBlocks, item.chunks.len() - durable);
            item.finish(durable);
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.items.clear();
        let Some(disk) = &self.shared.disk else {
            return;
        };
        let mut state = disk.writer.state();
        state.bytes -= self.bytes;
        if let Some(batch) = state.under_way(self.number) {
            batch.has_ended = true;
        }
        while let Some(batch) = state.under_way.pop_front_if(|batch| batch.has_ended) {
            state.dealt_with += batch.items;
        }
        drop(state);
        disk.writer.ended.notify_waiters();
    }
}

/// One chunk of a batch, and where its record goes.
struct Entry {
    item: usize,
    position: usize,
    /// Was it saved by the item, or is it an ancestor that was not on disk?
    own: bool,
    slot: Slot,
}

/// A batch that has begun.
struct Writing {
    batch: Batch,
    /// Those that are being written.
    entries: Vec<Entry>,
    bytes: u64,
    begun_at: Duration,
    written: Written,
}

type Written = oneshot::Receiver<Result<Result<Vec<RecordId>, BatchTooLarge>>>;

/// Begins to write a batch; `None` where nothing of it is to be written.
async fn begin(shared: &Arc<Shared>, disk: &DiskSide, batch: Batch) -> Option<Writing> {
    let (entries, after) = plan(shared, disk, &batch.items);
    let count = entries.len();
    let begun = match entries.is_empty() {
        true => Ok(None),
        false => begin_write(shared, disk, batch, entries, after)
            .await
            .map(Some),
    };
    begun.unwrap_or_else(|error| {
        tracing::warn!(%error, chunks = count, "a batch was not written");
        None
    })
}

/// What a batch consists of: each item's chunks that have no record yet, their missing ancestors
/// first, nothing behind a gap, nothing twice. And the batch under way that holds ancestors of them.
fn plan(shared: &Shared, disk: &DiskSide, batch: &[WriteItem]) -> (Vec<Entry>, Option<BatchId>) {
    // Before the states: what ends in between has a record in them, or fails what follows it.
    let under_way = disk.writer.begun();
    let mut entries: Vec<Entry> = Vec::new();
    let mut after = None;
    let mut planned = HashSet::new();
    for (index, item) in batch.iter().enumerate() {
        let Some(&(last, _)) = item.chunks.last() else {
            continue;
        };
        // Behind another save's pending block the pin ends: what is there must wait for it.
        let end = (last + 1).min(item.pin.blocks());
        let mut own = item.chunks.iter().peekable();
        let mut above = None;
        for (position, state) in item.pin.states(0..end).into_iter().enumerate() {
            let chunk = own
                .next_if(|(own, _)| *own == position)
                .map(|(_, slot)| slot.clone());
            if state.record.is_some() || planned.contains(&state.key) {
                continue;
            }
            let written = under_way.iter().find(|(_, keys)| keys.contains(&state.key));
            if let Some((id, _)) = written {
                above = above.max(Some(*id));
                continue;
            }
            let is_own = chunk.is_some();
            let slot = chunk.or_else(|| state.host.and_then(|id| shared.slot(id, &state.key)));
            match slot {
                Some(slot) => {
                    planned.insert(state.key);
                    after = after.max(above.filter(|_| !item.path.flat));
                    entries.push(Entry {
                        item: index,
                        position,
                        own: is_own,
                        slot,
                    });
                }
                None if item.path.flat => continue,
                None => break,
            }
        }
    }
    (entries, after)
}

/// Begins to write one batch, making room where it does not fit; of one that still does not fit, as
/// many leading chunks as do.
async fn begin_write(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    batch: Batch,
    mut entries: Vec<Entry>,
    after: Option<BatchId>,
) -> Result<Writing> {
    if disk.writes.is_paused(shared.clock.now()) {
        shared.recorder.add(Counter::DiskSkipped, entries.len());
        return Err(Error::unavailable(
            "the disk failed a moment ago and is left alone for now",
        ));
    }
    let image_bytes = shared.config.image_bytes();
    let slots: Vec<_> = entries.iter().map(|entry| entry.slot.clone()).collect();
    let coding = shared.clone();
    let slots: Arc<[Slot]> = shared
        .tasks
        .blocking(move || match &coding.disk {
            Some(disk) => coding::encode(&coding, disk, &slots),
            None => slots,
        })
        .await?
        .into();
    let (mut count, mut attempts, mut lacking) = (slots.len(), ROOM_ATTEMPTS, 0);
    while count > 0 {
        let begun_at = shared.clock.now();
        let (begun, written) = start(shared, disk, slots.clone(), count, after);
        if let Ok(id) = begun.await {
            entries.truncate(count);
            let keys = entries.iter().map(|entry| entry.slot.key()).collect();
            if let Some(batch) = disk.writer.state().under_way(batch.number) {
                batch.begun = Some((id, Arc::new(keys)));
            }
            let bytes = slots[..count].iter().map(|slot| slot.image().len() as u64);
            return Ok(Writing {
                batch,
                entries,
                bytes: bytes.sum(),
                begun_at,
                written,
            });
        }
        let outcome = match outcome_of(written).await {
            Ok(Ok(_)) => Err(Error::internal("a batch was written that had not begun")),
            Ok(Err(full)) => {
                let wanted = count as u64 * image_bytes;
                // What cleaning could not give, eviction does.
                let missing = full.missing_bytes.max(lacking);
                let ahead = room_ahead(disk, wanted);
                let go = missing + if missing > 0 { ahead } else { 0 };
                let room = make_room(shared, disk, go, wanted + ahead).await;
                room.map(|room| {
                    // Twice: what is evicted may lie in files that are not worth cleaning yet.
                    lacking = 2 * lacking.max(wanted.saturating_sub(room.free_bytes));
                    room.evicted > 0 || room.free_bytes >= wanted || missing == 0
                })
            }
            Err(error) => Err(error),
        };
        attempts -= 1;
        match outcome {
            Ok(true) if attempts > 0 => {}
            Ok(_) => {
                let usage = disk.tier.usage();
                let free = usage.capacity_bytes.saturating_sub(usage.used_bytes) / image_bytes;
                count = match (free as usize) < count {
                    true => free as usize,
                    // Its own bookkeeping takes room too.
                    false => count / 2,
                };
                (attempts, lacking) = (ROOM_ATTEMPTS, 0);
            }
            Err(error) => {
                shared.recorder.add(Counter::DiskWriteErrors, 1);
                disk.writes.failed(shared.clock.now());
                return Err(error);
            }
        }
    }
    Err(Error::busy("no room could be made on disk"))
}

/// Has the first `count` chunks written in a task of its own. The first answer says that the batch has
/// its place in the order, the second how it ended.
fn start(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    slots: Arc<[Slot]>,
    count: usize,
    after: Option<BatchId>,
) -> (oneshot::Receiver<BatchId>, Written) {
    let (tell_begun, begun) = oneshot::channel();
    let (tell_written, written) = oneshot::channel();
    let (tier, task) = (disk.tier.clone(), shared.clone());
    shared.tasks.spawn(async move {
        let write = move || {
            let mut tell = Some(tell_begun);
            tier.write_after(&slots[..count], after, &mut |id| {
                if let Some(tell) = tell.take() {
                    let _ = tell.send(id);
                }
            })
        };
        let outcome = task.tasks.blocking(write).await;
        let _ = tell_written.send(outcome.and_then(|outcome| outcome));
    });
    (begun, written)
}

async fn outcome_of(written: Written) -> Result<Result<Vec<RecordId>, BatchTooLarge>> {
    let ended = written.await;
    ended.unwrap_or_else(|_| Err(Error::internal("the task that writes was cut off")))
}

/// Waits until a batch is written, and gives its chunks their records.
async fn finish(shared: Arc<Shared>, writing: Writing) {
    let Some(disk) = &shared.disk else { return };
    let Writing {
        batch,
        entries,
        bytes,
        begun_at,
        written,
    } = writing;
    let outcome = outcome_of(written).await;
    let outcome = outcome.and_then(|records| {
        records.map_err(|_| Error::internal("a batch that had begun did not fit"))
    });
    let mut durable = vec![0; batch.items.len()];
    match outcome {
        Ok(records) => {
            disk.writes.worked();
            let now = shared.clock.now();
            let before = std::mem::replace(&mut disk.writer.state().written_at, now);
            // Beside another one it is half as fast as the disk.
            disk.coding
                .wrote(bytes, now.saturating_sub(before.max(begun_at)));
            let took = now.saturating_sub(begun_at);
            shared.recorder.time(Stage::DiskWrite, took, bytes);
            let mut doubles = Vec::new();
            for (entry, record) in entries.iter().zip(records) {
                durable[entry.item] += usize::from(entry.own);
                if !batch.items[entry.item]
                    .pin
                    .set_record(entry.position, record)
                {
                    doubles.push(record);
                }
            }
            if !doubles.is_empty() {
                removing::remove(&shared, doubles);
            }
        }
        Err(error) => {
            tracing::warn!(%error, chunks = entries.len(), "a batch was not written");
            shared.recorder.add(Counter::DiskWriteErrors, 1);
            disk.writes.failed(shared.clock.now());
        }
    }
    drop(entries);
    batch.finish(durable);
    let notes = shared.clone();
    let noted = shared.tasks.blocking(move || {
        if let Some(disk) = &notes.disk {
            notes.note_uses(disk);
        }
    });
    if let Err(error) = noted.await {
        tracing::warn!(%error, "the last uses of some records were not noted");
    }
}

/// Bytes to make room for beyond the next `batch` bytes: removing and cleaning sync the disk, once for
/// however much. A small part of the store at most, for what is evicted too early is missed.
fn room_ahead(disk: &DiskSide, batch: u64) -> u64 {
    let most = disk.tier.usage().capacity_bytes / AHEAD_SHARE;
    (AHEAD_BATCHES * batch).min(most)
}

/// What [`make_room`] came to.
pub(crate) struct Room {
    /// Records that were evicted.
    pub(crate) evicted: usize,
    /// Bytes that can be written now.
    pub(crate) free_bytes: u64,
}

/// Evicts in the background what a disk tier holds above its capacity: it had a larger one before, or was
/// rebuilt and has records again that had been removed.
pub(crate) fn trim(shared: &Arc<Shared>) {
    let over = |disk: &DiskSide| {
        let usage = disk.tier.usage();
        usage.used_bytes.saturating_sub(usage.capacity_bytes)
    };
    if shared.disk.as_ref().is_none_or(|disk| over(disk) == 0) {
        return;
    }
    let store = shared.clone();
    shared.tasks.spawn(async move {
        let shared = store;
        let Some(disk) = &shared.disk else { return };
        while over(disk) > 0 && shared.check_open().is_ok() {
            match make_room(&shared, disk, over(disk), 0).await {
                // All that is left is leased.
                Ok(room) if room.evicted == 0 => return,
                Ok(_) => {}
                // Saves try again.
                Err(error) => return tracing::warn!(%error, "the disk tier is above its capacity"),
            }
        }
    });
}

/// Evicts cold records of `missing` bytes and has the tier give space back until `wanted` bytes could
/// be written, as far as it can.
pub(crate) async fn make_room(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    missing: u64,
    wanted: u64,
) -> Result<Room> {
    // Where nothing can be removed, nothing is evicted.
    removing::remove_now(shared, disk, Vec::new()).await?;
    let usage = disk.tier.usage();
    // Encoded ones are shorter than their chunks.
    let record_bytes = usage.live_bytes / usage.records.max(1);
    let count = missing.div_ceil(record_bytes.max(1)) as usize;
    let records: Vec<RecordId> = shared
        .index
        .evict(Pool::Disk, count)
        .into_iter()
        .filter_map(|evicted| evicted.record)
        .collect();
    let evicted = records.len();
    shared.recorder.add(Counter::EvictedDisk, evicted);
    removing::remove_now(shared, disk, records).await?;
    let tier = disk.tier.clone();
    let reclaim = move || tier.reclaim(wanted);
    let free_bytes = shared.tasks.blocking(reclaim).await.and_then(|free| free)?;
    Ok(Room {
        evicted,
        free_bytes,
    })
}
