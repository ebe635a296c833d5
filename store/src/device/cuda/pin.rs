//! The host arena, pinned.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::driver::{Context, pin, unpin};
use crate::{HostArena, Result};

/// Pinned at a time. A copy must not cross from one to the next: the driver knows each for itself.
const SEGMENT: u64 = 1 << 30;

/// A pinned arena; it stays mapped as long as this lives.
pub(super) struct PinnedArena {
    context: Arc<Context>,
    arena: HostArena,
    base: u64,
    /// Bytes that are pinned, from the base on.
    bytes: u64,
}

impl PinnedArena {
    /// Pins all of `arena`, calling `progress(pinned, total)` after each segment. Devices share what
    /// one of them has pinned: the driver pins a page once, for every GPU.
    pub(super) fn new(
        context: &Arc<Context>,
        arena: &HostArena,
        progress: impl Fn(usize, usize),
    ) -> Result<Arc<PinnedArena>> {
        static PINNED: Mutex<Vec<Weak<PinnedArena>>> = Mutex::new(Vec::new());
        // Held while pinning: a second device waits for the first one's.
        let mut all = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|pinned| pinned.strong_count() > 0);
        let found = all.iter().filter_map(Weak::upgrade);
        if let Some(pinned) = found.into_iter().find(|pinned| pinned.is_of(arena)) {
            return Ok(pinned);
        }
        let pinned = Arc::new(Self::pin(context, arena, progress)?);
        all.push(Arc::downgrade(&pinned));
        Ok(pinned)
    }

    fn pin(
        context: &Arc<Context>,
        arena: &HostArena,
        progress: impl Fn(usize, usize),
    ) -> Result<PinnedArena> {
        let (base, bytes) = arena.mapping();
        let mut pinned = PinnedArena {
            context: Arc::clone(context),
            arena: arena.clone(),
            base: base.as_ptr().expose_provenance() as u64,
            bytes: 0,
        };
        while pinned.bytes < bytes as u64 {
            let length = SEGMENT.min(bytes as u64 - pinned.bytes);
            // SAFETY: within the mapping, which stays while `pinned` holds the arena; its `drop`
            // unpins first.
            unsafe { pin(context, pinned.base + pinned.bytes, length as usize)? };
            pinned.bytes += length;
            progress(pinned.bytes as usize, bytes);
        }
        Ok(pinned)
    }

    pub(super) fn is_of(&self, arena: &HostArena) -> bool {
        self.arena.is_same(arena)
    }

    /// The address of the mapping's first byte, for the host and the GPU alike.
    pub(super) fn base(&self) -> u64 {
        self.base
    }

    /// Bytes that are pinned, from there on: all of the mapping.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for PinnedArena {
    fn drop(&mut self) {
        for start in (0..self.bytes).step_by(SEGMENT as usize) {
            unpin(&self.context, self.base + start);
        }
    }
}

/// Where `bytes`, offsets in the mapping, must be cut so that no part crosses two segments.
pub(super) fn crossing(bytes: &Range<u64>) -> Option<u64> {
    let boundary = (bytes.start / SEGMENT + 1) * SEGMENT;
    (boundary < bytes.end).then_some(boundary)
}

/// Shown: a cut is made exactly where a segment ends within the bytes.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_cut_only_where_a_segment_ends_within_them() {
        assert_eq!(crossing(&(0..SEGMENT)), None);
        assert_eq!(crossing(&(1..SEGMENT + 1)), Some(SEGMENT));
        assert_eq!(crossing(&(SEGMENT..SEGMENT + 5)), None);
        assert_eq!(
            crossing(&(2 * SEGMENT - 1..2 * SEGMENT + 1)),
            Some(2 * SEGMENT)
        );
    }
}
