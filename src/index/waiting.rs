//! Waiting for another caller's save (delayed hits), without a callback under the lock.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stemkv_store::Key;
use tokio::sync::Notify;

use super::node::KeyBuildHasher;

#[derive(Default)]
struct Waited {
    is_over: AtomicBool,
    notify: Notify,
}

/// The end of a block's pending: it was published or abandoned. Match again to see which.
pub struct PendingWait(Arc<Waited>);

impl PendingWait {
    /// Is the block no longer pending?
    pub fn is_over(&self) -> bool {
        self.0.is_over.load(Ordering::Acquire)
    }

    /// Waits until the block is no longer pending. There is no deadline: set one around it.
    ///
    /// # Cancel safety
    /// Dropping the future changes nothing; the wait can be begun again.
    pub async fn wait(&self) {
        // Made before the flag is read: a notification between the two is not missed.
        let notified = self.0.notify.notified();
        if !self.is_over() {
            notified.await;
        }
    }
}

/// Waits by block, made on demand: a save that nobody waits for costs one look at an empty map.
#[derive(Default)]
pub(super) struct Waiters(HashMap<Key, Arc<Waited>, KeyBuildHasher>);

impl Waiters {
    /// A wait for `key`, which is pending.
    pub(super) fn wait(&mut self, key: Key) -> PendingWait {
        PendingWait(Arc::clone(self.0.entry(key).or_default()))
    }

    /// `key` is no longer pending.
    pub(super) fn end(&mut self, key: &Key, ended: &mut Wakes) {
        if !self.0.is_empty()
            && let Some(waited) = self.0.remove(key)
        {
            ended.0.push(waited);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Those to wake, once the lock is released: declare it before the guard, so that it drops after.
#[derive(Default)]
pub(super) struct Wakes(Vec<Arc<Waited>>);

impl Drop for Wakes {
    fn drop(&mut self) {
        for waited in self.0.drain(..) {
            waited.is_over.store(true, Ordering::Release);
            waited.notify.notify_waiters();
        }
    }
}
