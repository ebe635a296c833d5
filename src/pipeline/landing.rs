//! What several wait for and one brings.

use std::sync::OnceLock;

use tokio::sync::Notify;

/// A value that comes once. Those who wait are woken in the order in which they came.
pub(crate) struct Landing<T> {
    value: OnceLock<T>,
    landed: Notify,
}

impl<T> Default for Landing<T> {
    fn default() -> Self {
        Landing {
            value: OnceLock::new(),
            landed: Notify::new(),
        }
    }
}

impl<T: Clone> Landing<T> {
    /// It has come; what comes later is dropped.
    pub(crate) fn land(&self, value: T) {
        let _ = self.value.set(value);
        self.landed.notify_waiters();
    }

    pub(crate) fn landed(&self) -> Option<T> {
        self.value.get().cloned()
    }

    pub(crate) async fn wait(&self) -> T {
        loop {
            // Made before the look: a notification between the two is not missed.
            let notified = self.landed.notified();
            if let Some(value) = self.landed() {
                return value;
            }
            notified.await;
        }
    }
}
