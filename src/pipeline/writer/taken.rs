//! What was taken from the queue, until it is durable or is not.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::WriteItem;
use crate::pipeline::{DiskSide, Shared};
use crate::stats::Counter;

/// Items that were taken from the queue together.
pub(super) struct TakenItems {
    pub(super) number: u64,
    pub(super) items: u64,
    pub(super) has_ended: bool,
}

/// Items that were taken from the queue. Dropped, it tells who waits how many chunks of each became
/// durable.
pub(super) struct Taken {
    shared: Arc<Shared>,
    pub(super) number: u64,
    pub(super) bytes: u64,
    pub(super) items: Vec<WriteItem>,
    written: Mutex<WrittenChunks>,
}

pub(super) struct WrittenChunks {
    /// Of each item.
    pub(super) durable: Vec<usize>,
    pub(super) has_failed: bool,
}

impl Taken {
    /// Takes the first items of the queue: at least one, and no more than `limit` bytes.
    pub(super) fn take(shared: &Arc<Shared>, disk: &DiskSide, limit: u64) -> Taken {
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

    pub(super) fn written(&self) -> MutexGuard<'_, WrittenChunks> {
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
