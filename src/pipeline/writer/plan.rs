//! Which chunks are to be written for what was taken from the queue.

use std::collections::HashSet;

use stemkv_store::{BatchId, Slot};

use super::taken::Taken;
use crate::pipeline::{DiskSide, Shared};

/// One chunk of a batch, and where its record goes.
pub(super) struct Entry {
    pub(super) item: usize,
    pub(super) position: usize,
    /// Was it saved by the item, or is it an ancestor that was not on disk?
    pub(super) own: bool,
    pub(super) slot: Slot,
}

/// What is to be written: each item's chunks that have no record yet, their missing ancestors
/// first, nothing behind a gap, nothing twice. And the batch under way that holds ancestors of them.
///
/// Ancestors count as queued from here on. There are as many as the queue has room for, but a batch at least: what is
/// behind the others comes with a later save.
pub(super) fn plan(
    shared: &Shared,
    disk: &DiskSide,
    taken: &mut Taken,
) -> (Vec<Entry>, Option<BatchId>) {
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
