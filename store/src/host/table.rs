//! The slot table: 16 bytes a slot, read without a lock, grown without moving.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Entries of the first segment; each further one is as large as all before it.
const FIRST: u32 = 1024;
const SEGMENTS: usize = 22;

const HANDLE: u64 = 1;
const ID: u64 = 1 << 32;
const HALF_MASK: u64 = ID - 1;
/// Far from an overflow into the other half, and never reached but by leaking handles in a loop.
const HANDLES_MAX: u64 = 1 << 30;

const SEALED: u32 = 1 << 31;
const REGULAR: u32 = 1 << 30;
/// A slot has fewer granules than this.
pub(super) const GRANULES_END: u32 = REGULAR;

/// One slot: where it is, whether it is sealed, and who holds it.
///
/// Handles (clones of `Slot`, a `Filling`, its `FillingRef`s) and ids (handles turned into numbers)
/// are counted apart, so that giving an id back twice cannot pull a slot from under a handle.
#[derive(Debug, Default)]
pub(super) struct Entry {
    /// Ids in the upper half, handles in the lower one.
    counts: AtomicU64,
    granule: AtomicU32,
    /// Granules, [`SEALED`] and [`REGULAR`].
    extent: AtomicU32,
}

impl Entry {
    /// A new slot that is being filled, with one handle. Only for an entry that nobody holds.
    pub(super) fn begin(&self, granule: u32, granules: u32) {
        debug_assert!(granules < GRANULES_END, "the arena bounds its granules");
        self.granule.store(granule, Ordering::Relaxed);
        self.extent.store(granules, Ordering::Relaxed);
        self.counts.store(HANDLE, Ordering::Release);
    }

    pub(super) fn granule(&self) -> u32 {
        self.granule.load(Ordering::Relaxed)
    }

    pub(super) fn granules(&self) -> u32 {
        self.extent.load(Ordering::Relaxed) & (GRANULES_END - 1)
    }

    pub(super) fn is_sealed(&self) -> bool {
        self.extent.load(Ordering::Relaxed) & SEALED != 0
    }

    #[cfg(any(test, feature = "cuda"))]
    /// Does it hold every layer as raw bytes, one stride apart?
    pub(super) fn is_regular(&self) -> bool {
        self.extent.load(Ordering::Relaxed) & REGULAR != 0
    }

    /// Sealed, with so many granules of those that it began with. Only by the one handle of a filling
    /// slot.
    pub(super) fn set_sealed(&self, granules: u32, regular: bool) {
        debug_assert!(granules <= self.granules(), "a slot does not grow");
        let regular = if regular { REGULAR } else { 0 };
        self.extent
            .store(granules | SEALED | regular, Ordering::Release);
    }

    /// Is the caller's handle the only thing that holds the slot?
    pub(super) fn is_sole(&self) -> bool {
        self.counts.load(Ordering::Acquire) == HANDLE
    }

    /// One more handle, made by one that exists.
    pub(super) fn add_handle(&self) {
        let before = self.counts.fetch_add(HANDLE, Ordering::Relaxed);
        assert!(before & HALF_MASK < HANDLES_MAX, "slot handles leak");
    }

    /// One handle less; `true` where that was the last hold.
    pub(super) fn drop_handle(&self) -> bool {
        Self::was_last(self.counts.fetch_sub(HANDLE, Ordering::Release), HANDLE)
    }

    /// One more id, made by a handle that exists. Whoever takes a handle on the strength of it sees the sealed slot,
    /// also where it has kept the number from an earlier one.
    pub(super) fn add_id(&self) {
        let before = self.counts.fetch_add(ID, Ordering::Release);
        assert!(before >> 32 < HANDLES_MAX, "slot ids leak");
    }

    /// One more handle on the strength of an id; `false` where no id of a sealed slot is out.
    pub(super) fn handle_from_id(&self) -> bool {
        let more = |counts| (counts >= ID).then_some(counts + HANDLE);
        // An id exists only of a sealed slot, and Acquire shows what was written before it.
        let held = self
            .counts
            .try_update(Ordering::Acquire, Ordering::Relaxed, more)
            .is_ok();
        debug_assert!(!held || self.is_sealed());
        held
    }

    /// One id less: `None` where none is out, `Some(true)` where that was the last hold.
    pub(super) fn drop_id(&self) -> Option<bool> {
        let less = |counts: u64| counts.checked_sub(ID);
        self.counts
            .try_update(Ordering::Release, Ordering::Relaxed, less)
            .ok()
            .map(|before| Self::was_last(before, ID))
    }

    fn was_last(before: u64, dropped: u64) -> bool {
        let last = before == dropped;
        if last {
            // Whoever frees the slot sees everything that its other holders did with it.
            fence(Ordering::Acquire);
        }
        last
    }
}

/// Entries by slot number.
#[derive(Debug)]
pub(super) struct SlotTable {
    segments: [OnceLock<Box<[Entry]>>; SEGMENTS],
}

impl SlotTable {
    pub(super) fn new() -> Self {
        SlotTable {
            segments: [const { OnceLock::new() }; SEGMENTS],
        }
    }

    /// The entry of `id`, `None` where it was never made.
    pub(super) fn get(&self, id: u32) -> Option<&Entry> {
        let (segment, index) = Self::place(id);
        self.segments.get(segment)?.get()?.get(index)
    }

    /// The entry of `id`, its segment made if need be.
    pub(super) fn get_or_make(&self, id: u32) -> &Entry {
        let (segment, index) = Self::place(id);
        let entries = self.segments[segment].get_or_init(|| {
            let len = FIRST << segment.saturating_sub(1);
            (0..len).map(|_| Entry::default()).collect()
        });
        &entries[index]
    }

    /// Segment 0 holds `0..FIRST`, segment k ≥ 1 holds `FIRST << (k - 1)..FIRST << k`.
    fn place(id: u32) -> (usize, usize) {
        if id < FIRST {
            return (0, id as usize);
        }
        let segment = (id.ilog2() - FIRST.ilog2() + 1) as usize;
        (segment, (id - (FIRST << (segment - 1))) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_takes_16_bytes() {
        assert_eq!(size_of::<Entry>(), 16);
    }

    #[test]
    fn every_number_has_a_place_of_its_own() {
        let table = SlotTable::new();
        for id in 0..5000 {
            table.get_or_make(id).begin(id, 1);
        }
        for id in 0..5000 {
            assert_eq!(table.get(id).map(Entry::granule), Some(id));
        }
        assert!(table.get(9000).is_none());
        let (segment, index) = SlotTable::place((1 << 31) - 1);
        assert_eq!((segment, index), (21, (1 << 30) - 1));
    }

    #[test]
    fn an_id_given_back_twice_does_not_free_what_a_handle_holds() {
        let entry = Entry::default();
        entry.begin(0, 1);
        entry.set_sealed(1, true);
        assert_eq!((entry.granules(), entry.is_regular()), (1, true));
        entry.add_id();
        assert!(!entry.drop_handle());
        assert!(entry.handle_from_id());
        assert_eq!(entry.drop_id(), Some(false));
        assert_eq!(entry.drop_id(), None);
        assert!(!entry.handle_from_id());
        assert!(entry.drop_handle());
    }
}
