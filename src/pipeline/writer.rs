//! Host → disk: published chunks, in batches, in the background.
//!
//! A child becomes durable after its ancestors, so an item's missing ancestors that are still in the
//! host tier go with it, and behind one that is not there nothing is written. One batch is under way
//! at a time: the order of the queue is the order of durability.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stemkv_store::{RecordId, Slot, Tier};
use tokio::sync::Notify;
use tracing::Instrument as _;

use crate::index::Pin;
use crate::pipeline::{DiskSide, HashedPath, Shared, coding, reader};
use crate::stats::{Counter, Stage};
use crate::{Error, Result};

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
    /// Wakes whoever waits for what was enqueued before.
    written: Notify,
}

#[derive(Default)]
struct State {
    queue: VecDeque<WriteItem>,
    /// Of the queue and the batch under way.
    bytes: u64,
    /// Of the queue alone.
    queued: u64,
    writing: bool,
    flushing: usize,
    /// Items ever enqueued, and how many of them were dealt with.
    enqueued: u64,
    dealt_with: u64,
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

    fn dealt_with(&self, items: u64, bytes: u64) {
        let mut state = self.state();
        state.bytes -= bytes;
        state.dealt_with += items;
        drop(state);
        self.written.notify_waiters();
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
            let written = self.written.notified();
            if self.state().dealt_with >= until {
                return;
            }
            written.await;
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

/// The task that writes. Where its runtime ends first, what it leaves is declined.
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
        let mut state = disk.writer.state();
        let queue = std::mem::take(&mut state.queue);
        state.dealt_with = state.enqueued;
        (state.bytes, state.queued, state.writing) = (0, 0, false);
        drop(state);
        drop(queue);
        disk.writer.written.notify_waiters();
    }
}

async fn drain(mut draining: Draining) {
    let shared = draining.shared.clone();
    let Some(disk) = &shared.disk else { return };
    loop {
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
        let batch = disk.writer.next_batch(&shared);
        let span = tracing::debug_span!("disk_write", items = batch.len());
        write(&shared, disk, batch).instrument(span).await;
    }
}

impl Writer {
    fn next_batch(&self, shared: &Shared) -> Vec<WriteItem> {
        let mut state = self.state();
        let (mut batch, mut bytes) = (Vec::new(), 0);
        let limit = shared
            .disk
            .as_ref()
            .map_or(0, |disk| disk.config.batch_bytes);
        while let Some(item) = state.queue.front() {
            let item_bytes = item.chunks.len() as u64 * shared.config.image_bytes();
            if bytes > 0 && bytes + item_bytes > limit {
                break;
            }
            bytes += item_bytes;
            batch.extend(state.queue.pop_front());
        }
        state.queued -= bytes;
        batch
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

async fn write(shared: &Arc<Shared>, disk: &DiskSide, batch: Vec<WriteItem>) {
    let entries = plan(shared, &batch);
    let outcome = match entries.is_empty() {
        true => Ok(Vec::new()),
        false => {
            write_batch(
                shared,
                disk,
                entries.iter().map(|entry| entry.slot.clone()).collect(),
            )
            .await
        }
    };
    let mut durable = vec![0; batch.len()];
    match outcome {
        Ok(records) => {
            let mut doubles = Vec::new();
            for (entry, record) in entries.iter().zip(records) {
                durable[entry.item] += usize::from(entry.own);
                if !batch[entry.item].pin.set_record(entry.position, record) {
                    doubles.push(record);
                }
            }
            if !doubles.is_empty() {
                reader::remove(shared, doubles);
            }
        }
        Err(error) => tracing::warn!(%error, chunks = entries.len(), "a batch was not written"),
    }
    drop(entries);
    let bytes: u64 = batch
        .iter()
        .map(|item| item.chunks.len() as u64 * shared.config.image_bytes())
        .sum();
    let items = batch.len() as u64;
    for (item, durable) in batch.into_iter().zip(durable) {
        let undurable = item.chunks.len() - durable;
        shared.recorder.add(Counter::DurableBlocks, durable);
        shared.recorder.add(Counter::UndurableBlocks, undurable);
        item.finish(durable);
    }
    disk.writer.dealt_with(items, bytes);
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

/// What a batch consists of: each item's chunks that have no record yet, their missing ancestors
/// first, nothing behind a gap, nothing twice.
fn plan(shared: &Shared, batch: &[WriteItem]) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut planned = std::collections::HashSet::new();
    for (index, item) in batch.iter().enumerate() {
        let Some(&(last, _)) = item.chunks.last() else {
            continue;
        };
        // Behind another save's pending block the pin ends: what is there must wait for it.
        let end = (last + 1).min(item.pin.blocks());
        let mut own = item.chunks.iter().peekable();
        for (position, state) in item.pin.states(0..end).into_iter().enumerate() {
            let chunk = own
                .next_if(|(own, _)| *own == position)
                .map(|(_, slot)| slot.clone());
            if state.record.is_some() || !planned.insert(state.key) {
                continue;
            }
            let is_own = chunk.is_some();
            let slot = chunk.or_else(|| state.host.and_then(|id| shared.slot(id, &state.key)));
            match slot {
                Some(slot) => entries.push(Entry {
                    item: index,
                    position,
                    own: is_own,
                    slot,
                }),
                None if item.path.flat => continue,
                None => {
                    planned.remove(&state.key);
                    break;
                }
            }
        }
    }
    entries
}

/// Writes one batch, making room where it does not fit; of one that still does not fit, as many
/// leading chunks as do.
async fn write_batch(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    slots: Vec<Slot>,
) -> Result<Vec<RecordId>> {
    if disk.health.is_paused(shared.clock.now()) {
        shared.recorder.add(Counter::DiskSkipped, slots.len());
        return Err(Error::unavailable(
            "the disk failed a moment ago and is left alone for now",
        ));
    }
    let image_bytes = shared.config.image_bytes();
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
        let begun = shared.clock.now();
        let (tier, batch) = (disk.tier.clone(), slots.clone());
        let written = shared
            .tasks
            .blocking(move || tier.write(&batch[..count]))
            .await
            .and_then(|written| written);
        let outcome = match written {
            Ok(Ok(records)) => {
                disk.health.worked();
                let took = shared.clock.now().saturating_sub(begun);
                let bytes = slots[..count].iter().map(|slot| slot.image().len() as u64);
                let bytes = bytes.sum();
                disk.coding.wrote(bytes, took);
                shared.recorder.time(Stage::DiskWrite, took, bytes);
                return Ok(records);
            }
            Ok(Err(full)) => {
                let wanted = count as u64 * image_bytes;
                // What cleaning could not give, eviction does.
                let missing = full.missing_bytes.max(lacking);
                let room = make_room(shared, disk, missing, wanted).await;
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
                disk.health.failed(shared.clock.now());
                return Err(error);
            }
        }
    }
    Err(Error::busy("no room could be made on disk"))
}

/// What [`make_room`] came to.
pub(crate) struct Room {
    /// Records that were evicted.
    pub(crate) evicted: usize,
    /// Bytes that can be written now.
    pub(crate) free_bytes: u64,
}

/// Evicts cold records of `missing` bytes and has the tier give space back until `wanted` bytes could
/// be written, as far as it can.
pub(crate) async fn make_room(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    missing: u64,
    wanted: u64,
) -> Result<Room> {
    let usage = disk.tier.usage();
    // Encoded ones are shorter than their chunks.
    let record_bytes = usage.live_bytes / usage.records.max(1);
    let count = missing.div_ceil(record_bytes.max(1)) as usize;
    let records: Vec<RecordId> = shared
        .index
        .evict(Tier::Disk, count)
        .into_iter()
        .filter_map(|evicted| evicted.record)
        .collect();
    let evicted = records.len();
    shared.recorder.add(Counter::EvictedDisk, evicted);
    let tier = disk.tier.clone();
    let reclaim = move || tier.remove(&records).and_then(|()| tier.reclaim(wanted));
    let free_bytes = shared.tasks.blocking(reclaim).await.and_then(|free| free)?;
    Ok(Room {
        evicted,
        free_bytes,
    })
}
