use std::sync::Arc;

use crate::{Checksum, Error, KvGeometry, LayerId, RecordHeader, Result, SlabEntry};

/// Where the bytes of an arena are: free + filling + published = capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ArenaUsage {
    /// Bytes of the mapping that slots can be cut from.
    pub capacity_bytes: usize,
    /// Not in any slot.
    pub free_bytes: usize,
    /// In slots that are being written.
    pub filling_bytes: usize,
    /// In sealed slots.
    pub published_bytes: usize,
    /// Sealed slots.
    pub published_slots: usize,
    /// The longest slot that could be cut now.
    pub largest_free_bytes: usize,
}

/// A bounded arena of chunk slots in one shared mapping (a `memfd`), sized at open.
///
/// Clones share the arena; it is unmapped when the last clone, slot and filling are gone.
#[derive(Clone)]
pub struct HostArena(Arc<()>);

/// A sealed slot's number within its arena, for callers that keep many: four bytes instead of a
/// handle. It counts as a handle: see [`Slot::into_id`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

impl HostArena {
    /// Maps `capacity_bytes` (rounded down to 4 KiB) and touches every page of it with several
    /// threads, calling `progress(touched, total)` now and then, so that no later access faults.
    ///
    /// # Errors
    /// `Invalid` for a capacity below one page; `Unavailable` where the memory cannot be had.
    pub fn open(
        geometry: &KvGeometry,
        capacity_bytes: usize,
        progress: impl Fn(usize, usize) + Sync,
    ) -> Result<Self> {
        let _ = (geometry, capacity_bytes, progress);
        Err(Error::internal("todo"))
    }

    /// Cuts `count` slots of `payload_bytes` (plus header page) each, consecutive in memory where
    /// the free space allows, else in as few runs as possible. All or nothing.
    ///
    /// `None` where the space is not there: evict, or decline.
    pub fn allocate(&self, payload_bytes: usize, count: usize) -> Option<Vec<Filling>> {
        let _ = (payload_bytes, count);
        None
    }

    /// The slot that `id` stands for, as one more handle.
    ///
    /// # Panics
    /// Where no handle to it exists (an `id` used after [`HostArena::release`]).
    pub fn slot(&self, id: SlotId) -> Slot {
        let _ = id;
        unimplemented!()
    }

    /// Gives up the handle that `id` stands for.
    pub fn release(&self, id: SlotId) {
        let _ = id;
    }

    /// Where the bytes are now.
    pub fn usage(&self) -> ArenaUsage {
        ArenaUsage::default()
    }
}

/// A slot that is being written, owned by one writer. Dropping it frees the slot.
pub struct Filling(());

/// A further handle to a [`Filling`], for the transfer that writes its slabs. The slot is not freed
/// while one exists, even if the `Filling` is dropped in the middle of a copy.
#[derive(Clone)]
pub struct FillingRef(());

impl Filling {
    /// A handle for a transfer that writes into this slot.
    pub fn writer(&self) -> FillingRef {
        unimplemented!()
    }

    /// Notes where a slab was stored and what its bytes sum to.
    pub fn set_slab(&mut self, layer: LayerId, checksum: Checksum) {
        let _ = (layer, checksum);
    }

    /// Writes the header page and publishes the slot: from here on it is read-only.
    ///
    /// # Errors
    /// `Internal`, with the slot freed, where a [`FillingRef`] still exists or a slab is missing.
    pub fn seal(self, header: RecordHeader) -> Result<Slot> {
        let _ = header;
        unimplemented!()
    }
}

/// A sealed slot: a complete chunk image that does not change. Clones share it; the last one frees
/// it, so a copy that is under way keeps its bytes whatever else happens.
#[derive(Clone)]
pub struct Slot(Arc<()>);

impl Slot {
    /// The header, as it was sealed.
    pub fn header(&self) -> Result<RecordHeader> {
        unimplemented!()
    }

    /// Turns this handle into a number that still counts as one. Give it back with
    /// [`HostArena::release`].
    pub fn into_id(self) -> SlotId {
        unimplemented!()
    }

    /// One slab's entry.
    pub fn slab(&self, layer: LayerId) -> Option<SlabEntry> {
        let _ = layer;
        None
    }
}
