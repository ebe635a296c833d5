//! Records that go from disk. One that cannot be removed now is tried again before room is made: until
//! then it takes room that nobody can evict.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stemkv_store::RecordId;

use crate::Result;
use crate::pipeline::{DiskSide, Shared};
use crate::stats::Counter;

/// Records that are in no index any more, and still on disk.
#[derive(Default)]
pub(crate) struct Removing {
    left: Mutex<Vec<RecordId>>,
    /// What leads to these may be in files that could not be read at opening. They go when those are given up.
    behind_unread: Mutex<Vec<RecordId>>,
}

impl Removing {
    /// Keeps records that cannot be reached for as long as there are files that could not be read.
    pub(crate) fn with_unread(&self, mut records: Vec<RecordId>) {
        self.behind_unread().append(&mut records);
    }

    fn behind_unread(&self) -> MutexGuard<'_, Vec<RecordId>> {
        self.behind_unread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Records that are being removed. Dropped before they are, they are left for the next time.
struct Taken {
    shared: Arc<Shared>,
    records: Vec<RecordId>,
}

impl Taken {
    fn left(shared: &Shared) -> Option<MutexGuard<'_, Vec<RecordId>>> {
        let removing = &shared.disk.as_ref()?.removing;
        Some(removing.left.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Those that are left and `records`.
    fn with(shared: &Arc<Shared>, mut records: Vec<RecordId>) -> Taken {
        let mut all =
            Taken::left(shared).map_or_else(Vec::new, |mut left| std::mem::take(&mut *left));
        all.append(&mut records);
        Taken {
            shared: shared.clone(),
            records: all,
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(mut left) = Taken::left(&self.shared).filter(|_| !self.records.is_empty()) {
            left.append(&mut self.records);
        }
    }
}

/// Removes records in the background.
pub(crate) fn remove(shared: &Arc<Shared>, records: Vec<RecordId>) {
    let shared = shared.clone();
    shared.clone().tasks.spawn(async move {
        let Some(disk) = &shared.disk else {
            return;
        };
        if let Err(error) = remove_now(&shared, disk, records).await {
            tracing::warn!(%error, "records could not be removed");
        }
    });
}

/// Removes records, with those that could not be removed before. Where it fails, or is dropped before it
/// began, all of them are kept for the next time; those of a process that ends are met again at the next
/// opening.
pub(crate) async fn remove_now(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    records: Vec<RecordId>,
) -> Result<()> {
    let mut taken = Taken::with(shared, records);
    if taken.records.is_empty() {
        return Ok(());
    }
    let tier = disk.tier.clone();
    let remove = move || -> Result<()> {
        tier.remove(&taken.records)?;
        taken.records.clear();
        Ok(())
    };
    shared.tasks.blocking(remove).await?
}

/// Gives up the files that could not be read at opening, and the records that cannot be reached without them:
/// before a block is evicted that can be. Returns how many they all were, and their bytes.
pub(crate) async fn give_up_unread(shared: &Arc<Shared>, disk: &DiskSide) -> Result<(usize, u64)> {
    let usage = disk.tier.usage();
    if usage.unread_files == 0 {
        return Ok((0, 0));
    }
    let behind = std::mem::take(&mut *disk.removing.behind_unread());
    let records = behind.len();
    shared.recorder.add(Counter::EvictedDisk, records);
    remove_now(shared, disk, behind).await?;
    let record_bytes = usage.live_bytes / usage.records.max(1);
    let bytes = usage.unread_bytes + records as u64 * record_bytes;
    let tier = disk.tier.clone();
    let files = shared.tasks.blocking(move || tier.drop_unread()).await??;
    shared
        .recorder
        .add(Counter::DroppedUnreadFiles, files as usize);
    Ok((files as usize + records, bytes))
}
