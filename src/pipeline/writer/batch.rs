//! One batch: begun, made durable, and taken into the index.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use stemkv_store::{BatchId, BatchTooLarge, Key, RecordId, Slot};
use tokio::sync::oneshot;
use tracing::Instrument as _;

use super::Place;
use super::plan::{Entry, plan};
use super::room::{make_room, room_ahead};
use super::taken::Taken;
use crate::pipeline::{DiskSide, Shared, coding, removing};
use crate::stats::{Counter, Stage};
use crate::{Error, Result};

/// How often a batch that did not fit is tried again after room was made.
const ROOM_ATTEMPTS: usize = 4;

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
pub(super) async fn write(shared: &Arc<Shared>, disk: &DiskSide, mut taken: Taken, place: Place) {
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
    let later = taken.later();
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
                let ahead = match later.is_empty() {
                    true => room_ahead(disk, wanted),
                    false => 0,
                };
                let go = missing + if missing > 0 { ahead } else { 0 };
                let room = make_room(shared, disk, go, wanted + ahead, &later).await;
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
            let before = {
                let mut state = disk.writer.state();
                state.declined.written();
                std::mem::replace(&mut state.written_at, now)
            };
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
