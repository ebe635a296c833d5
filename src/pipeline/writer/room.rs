//! Room on disk: what is evicted for what is to be written.

use std::sync::Arc;

use stemkv_store::RecordId;

use crate::Result;
use crate::index::{Pin, Pool};
use crate::pipeline::{DiskSide, Shared, removing};
use crate::stats::Counter;

/// Batches that room is made for beyond the next one, and the part of the capacity, one in so many bytes,
/// that this may be at most.
const AHEAD_BATCHES: u64 = 3;
const AHEAD_SHARE: u64 = 64;

/// Bytes to make room for beyond the next `batch` bytes: removing and cleaning sync the disk, once for
/// however much. A small part of the store at most, for what is evicted too early is missed.
pub(super) fn room_ahead(disk: &DiskSide, batch: u64) -> u64 {
    let most = disk.tier.usage().capacity_bytes / AHEAD_SHARE;
    (AHEAD_BATCHES * batch).min(most)
}

/// What [`make_room`] came to.
pub(crate) struct Room {
    /// Records that were evicted or could not be reached, and files that could not be read and were given up.
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
            match make_room(&shared, disk, over(disk), 0, &[]).await {
                // All that is left is leased.
                Ok(room) if room.evicted == 0 => return,
                Ok(_) => {}
                // Saves try again.
                Err(error) => return tracing::warn!(%error, "the disk tier is above its capacity"),
            }
        }
    });
}

/// Evicts cold records of `missing` bytes, after what nobody can read now, and has the tier give space back
/// until `wanted` bytes could be written, as far as it can. Where `later` names something, only records that were
/// used before it go.
pub(crate) async fn make_room(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    missing: u64,
    wanted: u64,
    later: &[Arc<Pin>],
) -> Result<Room> {
    // Where nothing can be removed, nothing is evicted.
    removing::remove_now(shared, disk, Vec::new()).await?;
    let (given_up, bytes) = match missing > 0 && later.is_empty() {
        true => removing::give_up_unread(shared, disk).await?,
        false => (0, 0),
    };
    let missing = missing.saturating_sub(bytes);
    let usage = disk.tier.usage();
    // Encoded ones are shorter than their chunks.
    let record_bytes = usage.live_bytes / usage.records.max(1);
    let count = missing.div_ceil(record_bytes.max(1)) as usize;
    let records: Vec<RecordId> = shared
        .index
        .evict_colder(Pool::Disk, count, later)
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
        evicted: evicted + given_up,
        free_bytes,
    })
}
