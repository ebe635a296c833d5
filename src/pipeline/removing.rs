//! Records that go from disk. One that cannot be removed now is tried again before room is made: until
//! then it takes room that nobody can evict.

use std::sync::{Arc, Mutex, PoisonError};

use stemkv_store::RecordId;

use crate::Result;
use crate::pipeline::{DiskSide, Shared};

/// Records that are in no index any more, and still on disk.
#[derive(Default)]
pub(crate) struct Removing {
    left: Mutex<Vec<RecordId>>,
}

impl Removing {
    fn take(&self) -> Vec<RecordId> {
        std::mem::take(&mut self.left.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put_back(&self, records: &[RecordId]) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.extend_from_slice(records);
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

/// Removes records, with those that could not be removed before. Where it fails, all of them are kept
/// for the next time; those of a process that ends are met again at the next opening.
pub(crate) async fn remove_now(
    shared: &Shared,
    disk: &DiskSide,
    records: Vec<RecordId>,
) -> Result<()> {
    let mut all = disk.removing.take();
    all.extend(records);
    if all.is_empty() {
        return Ok(());
    }
    let all: Arc<[RecordId]> = all.into();
    let (tier, removed) = (disk.tier.clone(), all.clone());
    let outcome = shared.tasks.blocking(move || tier.remove(&removed)).await;
    let outcome = outcome.and_then(|outcome| outcome);
    if outcome.is_err() {
        disk.removing.put_back(&all);
    }
    outcome
}
