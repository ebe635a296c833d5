//! What was taken from the queue, or of what was declined, until it is durable or is not.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::declined::{self, Run};
use super::{WriteItem, resume};
use crate::index::Pin;
use crate::pipeline::{DiskSide, Shared};
use crate::stats::Counter;

/// Items that were taken from the queue together.
pub(super) struct TakenItems {
    pub(super) number: u64,
    pub(super) items: u64,
    pub(super) has_ended: bool,
}

/// Items that were taken from the queue, or a lot of what was declined. Dropped, it tells who waits how many
/// chunks of each became durable, and what did not is declined.
pub(super) struct Taken {
    shared: Arc<Shared>,
    pub(super) number: u64,
    pub(super) bytes: u64,
    pub(super) items: Vec<WriteItem>,
    /// Of a lot: what its items are of.
    lot: Option<Vec<Run>>,
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
            lot: None,
        }
    }

    /// A lot, of nothing yet.
    pub(super) fn lot(shared: &Arc<Shared>) -> Taken {
        Taken {
            shared: shared.clone(),
            number: 0,
            bytes: 0,
            items: Vec::new(),
            lot: Some(Vec::new()),
            written: Mutex::new(WrittenChunks {
                durable: Vec::new(),
                has_failed: false,
            }),
        }
    }

    /// Adds an item of a run to a lot.
    pub(super) fn push(&mut self, disk: &DiskSide, item: WriteItem, run: Run) {
        let bytes = item.chunks.len() as u64 * self.shared.config.image_bytes();
        self.bytes += bytes;
        disk.writer.state().bytes += bytes;
        self.items.push(item);
        self.written().durable.push(0);
        self.lot.get_or_insert_default().push(run);
    }

    /// What is written of what was declined: only colder records go for it. Of what is saved, none.
    pub(super) fn later(&self) -> Vec<Arc<Pin>> {
        let items = self.items.iter().filter(|_| self.lot.is_some());
        items.map(|item| item.pin.clone()).collect()
    }

    pub(super) fn written(&self) -> MutexGuard<'_, WrittenChunks> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let durable = std::mem::take(&mut self.written().durable);
        let (is_lot, had_items) = (self.lot.is_some(), !self.items.is_empty());
        let runs: Vec<Option<Run>> = match self.lot.take() {
            Some(runs) => runs.into_iter().map(Some).collect(),
            None => {
                let items = self.items.iter();
                items
                    .map(|item| Run::of(&item.path, &item.chunks))
                    .collect()
            }
        };
        let recorder = &self.shared.recorder;
        let mut failed = Vec::new();
        for ((item, durable), run) in self.items.drain(..).zip(durable).zip(runs) {
            let undurable = item.chunks.len() - durable;
            recorder.add(Counter::DurableBlocks, durable);
            match is_lot {
                true => recorder.add(Counter::DurableLaterBlocks, durable),
                false => recorder.add(Counter::UndurableBlocks, undurable),
            }
            failed.extend(run.filter(|_| undurable > 0));
            item.finish(durable);
        }
        let Some(disk) = &self.shared.disk else {
            return;
        };
        let mut state = disk.writer.state();
        state.bytes -= self.bytes;
        if is_lot {
            state.declined.lot_ended(failed);
        } else if !failed.is_empty() {
            state.declined.save_failed(failed);
        }
        let mut taken = state.taken.iter_mut();
        if let Some(taken) = taken.find(|taken| taken.number == self.number) {
            taken.has_ended = true;
        }
        while let Some(taken) = state.taken.pop_front_if(|taken| taken.has_ended) {
            state.dealt_with += taken.items;
        }
        let pause = state.declined.pause();
        drop(state);
        disk.writer.ended.notify_waiters();
        if let Some(pause) = pause {
            declined::resume_after(&self.shared, pause);
        }
        if had_items {
            resume(&self.shared, disk);
        }
    }
}
