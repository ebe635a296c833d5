//! Host → disk: published chunks, in batches, in the background.
//!
//! A child becomes durable after its ancestors, so an item's missing ancestors that are still in the
//! host tier go with it, and behind one that is not there nothing is written. What is taken from the queue
//! is cut into batches of a bounded size, parents first. Two batches are under way
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
}

/// Items that were taken from the queue together.
struct TakenItems {
    number: u64,
    items: u64,
    has_ended: bool,
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

/// Hands chunks over to be written: as many leading ones as the queue has room for, and at least one where
/// it is empty. The others are declined and stay in RAM alone.
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
        let taken = Taken::take(&shared, disk, disk.config.batch_bytes);
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

/// Items that were taken from the queue. Dropped, it tells who waits how many chunks of each became
/// durable.
struct Taken {
    shared: Arc<Shared>,
    number: u64,
    bytes: u64,
    items: Vec<WriteItem>,
    written: Mutex<WrittenChunks>,
}

struct WrittenChunks {
    /// Of each item.
    durable: Vec<usize>,
    has_failed: bool,
}

impl Taken {
    /// Takes the first items of the queue: at least one, and no more than `limit` bytes.
    fn take(shared: &Arc<Shared>, disk: &DiskSide, limit: u64) -> Taken {
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
        let number = state.number();
        state.taken.push_back(TakenItems {
            number,
            items: items.len() as u64,
            has_ended: false,
        });
        Taken {
            shared: shared.clone(),
            number,
            bytes,
            written: Mutex::new(WrittenChunks {
                durable: vec![0; items.len()],
                has_failed: false,
            }),
            items,
        }
    }

    fn written(&self) -> MutexGuard<'_, WrittenChunks> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let durable = std::mem::take(&mut self.written().durable);
        for (item, durable) in self.items.drain(..).zip(durable) {
            let recorder = &self.shared.recorder;
            recorder.add(Counter::DurableBlocks, durable);
            recorder.add(Counter::UndurableBlocks, item.chunks.len() - durable);
            item.finish(durable);
        }
        let Some(disk) = &self.shared.disk else {
            return;
        };
        let mut state = disk.writer.state();
        state.bytes -= self.bytes;
        let mut taken = state.taken.iter_mut();
        if let Some(taken) = taken.find(|taken| taken.number == self.number) {
            taken.has_ended = true;
        }
        while let Some(taken) = state.taken.pop_front_if(|taken| taken.has_ended) {
            state.dealt_with += taken.items;
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
    taken: Arc<Taken>,
    place: Place,
    id: BatchId,
    /// Those that are being written.
    entries: Vec<Entry>,
    bytes: u64,
    begun_at: Duration,
    written: Written,
}

type Written = oneshot::Receiver<Result<Result<Vec<RecordId>, BatchTooLarge>>>;

/// Writes what was taken from the queue, batch by batch, each behind the one before it; returns when the
/// last one has begun. Where one fails or is cut, what comes after it is not written.
async fn write(shared: &Arc<Shared>, disk: &DiskSide, mut taken: Taken, place: Place) {
    let (mut entries, mut after) = plan(shared, disk, &mut taken);
    let taken = Arc::new(taken);
    let batch_chunks = disk.config.batch_bytes / shared.config.image_bytes();
    let batch_chunks = batch_chunks.max(1) as usize;
    let mut first = Some(place);
    while !entries.is_empty() {
        let place = match first.take() {
            Some(place) => place,
            None => disk.writer.place(shared).await,
        };
        if taken.written().has_failed {
            return;
        }
        let rest = entries.split_off(batch_chunks.min(entries.len()));
        let count = entries.len();
        let begun = begin_write(shared, disk, taken.clone(), place, entries, after).await;
        let writing = match begun {
            Ok(writing) => writing,
            Err(error) => {
                tracing::warn!(%error, chunks = count + rest.len(), "a batch was not written");
                return;
            }
        };
        after = Some(writing.id);
        let is_whole = writing.entries.len() == count;
        let span = tracing::Span::current();
        shared
            .tasks
            .spawn(finish(shared.clone(), writing).instrument(span));
        if !is_whole {
            return;
        }
        entries = rest;
    }
}

/// What is to be written: each item's chunks that have no record yet, their missing ancestors
/// first, nothing behind a gap, nothing twice. And the batch under way that holds ancestors of them.
///
/// Ancestors count as queued from here on. There are as many as the queue has room for, but a batch at least: what is
/// behind the others comes with a later save.
fn plan(shared: &Shared, disk: &DiskSide, taken: &mut Taken) -> (Vec<Entry>, Option<BatchId>) {
    // Before the states: what ends in between has a record in them, or fails what follows it.
    let under_way = disk.writer.begun();
    let image_bytes = shared.config.image_bytes();
    let (queue_bytes, batch_bytes) = (disk.config.queue_bytes, disk.config.batch_bytes);
    let room = queue_bytes.saturating_sub(disk.writer.queued_bytes());
    let mut room = room.max(batch_bytes) / image_bytes;
    let mut ancestors = 0;
    let mut entries: Vec<Entry> = Vec::new();
    let mut after = None;
    let mut planned = HashSet::new();
    for (index, item) in taken.items.iter().enumerate() {
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
                Some(_) if !is_own && room == 0 => break,
                Some(slot) => {
                    if !is_own {
                        (room, ancestors) = (room - 1, ancestors + 1);
                    }
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
    taken.bytes += ancestors * image_bytes;
    disk.writer.state().bytes += ancestors * image_bytes;
    (entries, after)
}

/// Begins to write one batch, making room where it does not fit; of one that still does not fit, as
/// many leading chunks as do.
async fn begin_write(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    taken: Arc<Taken>,
    place: Place,
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
    let root = |entry: &Entry| taken.items[entry.item].path.root;
    let roots: HashSet<Key> = entries.iter().map(root).collect();
    let preparing = shared.clone();
    let slots: Arc<[Slot]> = shared
        .tasks
        .blocking(move || match &preparing.disk {
            Some(disk) => {
                disk.descriptions.keep(&preparing, disk, &roots);
                coding::encode(&preparing, disk, &slots)
            }
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
            place.begun(id, entries.iter().map(|entry| entry.slot.key()).collect());
            let bytes = slots[..count].iter().map(|slot| slot.image().len() as u64);
            return Ok(Writing {
                taken,
                place,
                id,
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
        taken,
        place,
        id: _,
        entries,
        bytes,
        begun_at,
        written,
    } = writing;
    let outcome = outcome_of(written).await;
    let outcome = outcome.and_then(|records| {
        records.map_err(|_| Error::internal("a batch that had begun did not fit"))
    });
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
                taken.written().durable[entry.item] += usize::from(entry.own);
                let pin = &taken.items[entry.item].pin;
                if !pin.set_record(entry.position, record) {
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
            taken.written().has_failed = true;
        }
    }
    drop(entries);
    drop(place);
    drop(taken);
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
