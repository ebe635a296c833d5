//! The arena: which bytes of the mapping are free, and which belong to which slot.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::extent::FreeExtents;
use super::mapping::Mapping;
use super::slot::{Complete, Filling, Handle, Slot};
use super::table::{Entry, GRANULES_END, SlotTable};
use crate::codec::SlabCodecs;
use crate::{Error, KvGeometry, RecordHeader, Result};

/// Slots start on multiples of this and are rounded up to it.
pub(super) const GRANULE: usize = 4096;

/// Slots that are published or ended under one acquisition of the lock: more would keep others waiting.
const AT_ONCE: usize = 128;

/// Locks that keep two CPU copies out of one slot; any number will do.
const WRITE_LOCKS: usize = 64;

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
    /// The longest slot that could be cut now, header page included.
    pub largest_free_bytes: usize,
}

/// A bounded arena of chunk slots in one shared mapping (a `memfd`), sized at open.
///
/// Clones share the arena; it is unmapped when the last clone, slot and filling are gone.
#[derive(Clone)]
pub struct HostArena(Arc<Inner>);

struct Inner {
    mapping: Mapping,
    geometry: KvGeometry,
    table: SlotTable,
    codecs: SlabCodecs,
    state: Mutex<State>,
    write_locks: [Mutex<()>; WRITE_LOCKS],
}

/// Everything that changes when a slot begins, is sealed or ends. Sizes in granules.
struct State {
    extents: FreeExtents,
    filling: u32,
    published: u32,
    published_slots: usize,
    /// Numbers of slots that are gone, to be used again first.
    free_ids: Vec<u32>,
    /// Numbers below this one have been used.
    next_id: u32,
}

/// A sealed slot's number within its arena, for callers that keep many: four bytes instead of a
/// handle. It counts as a handle: see [`Slot::into_id`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

impl HostArena {
    /// Maps `capacity_bytes` (rounded down to 4 KiB) and touches every page of it with several
    /// threads, calling `progress(touched, total)` now and then, so that no later access faults.
    ///
    /// # Errors
    /// `Invalid` for a capacity below one slot of `geometry` or above this machine's memory;
    /// `Unavailable` where the memory cannot be had.
    pub fn open(
        geometry: &KvGeometry,
        capacity_bytes: usize,
        progress: impl Fn(usize, usize) + Sync,
    ) -> Result<Self> {
        geometry.validate()?;
        let slot_bytes = slot_granules(geometry.payload_bytes())
            .expect("validate bounds the payload to 1 GiB") as usize
            * GRANULE;
        if capacity_bytes < slot_bytes {
            return Err(Error::invalid(
                "the host tier is smaller than one chunk with its header: give it more bytes",
            )
            .with("capacity_bytes", capacity_bytes)
            .with("slot_bytes", slot_bytes));
        }
        let granules = u32::try_from(capacity_bytes / GRANULE)
            .ok()
            .filter(|&granules| granules < 1 << 31)
            .ok_or_else(|| {
                Error::invalid("the host tier can have at most 8 TiB: give it fewer bytes")
                    .with("capacity_bytes", capacity_bytes)
            })?;
        let mapping = Mapping::new(granules as usize * GRANULE, progress)?;
        Ok(HostArena(Arc::new(Inner {
            mapping,
            geometry: geometry.clone(),
            codecs: SlabCodecs::new(geometry),
            table: SlotTable::new(),
            state: Mutex::new(State {
                extents: FreeExtents::new(granules),
                filling: 0,
                published: 0,
                published_slots: 0,
                free_ids: Vec::new(),
                next_id: 0,
            }),
            write_locks: [const { Mutex::new(()) }; WRITE_LOCKS],
        })))
    }

    /// The geometry of the chunks that it holds.
    pub fn geometry(&self) -> &KvGeometry {
        &self.0.geometry
    }

    /// The codecs of its slabs.
    pub(crate) fn codecs(&self) -> &SlabCodecs {
        &self.0.codecs
    }

    /// Cuts `count` slots of `payload_bytes` (plus header page) each, consecutive in memory where
    /// the free space allows, else in as few runs as possible. All or nothing.
    ///
    /// `None` where the space is not there: evict, or decline.
    pub fn allocate(&self, payload_bytes: usize, count: usize) -> Option<Vec<Filling>> {
        let granules = slot_granules(payload_bytes)?;
        let mut state = self.0.lock();
        let offsets = state.extents.take(granules, u32::try_from(count).ok()?)?;
        state.filling += granules * offsets.len() as u32;
        let fillings = offsets.into_iter().map(|granule| {
            let id = state.free_ids.pop().unwrap_or_else(|| {
                state.next_id += 1;
                state.next_id - 1
            });
            self.0.table.get_or_make(id).begin(granule, granules);
            Filling::new(Handle::counted(self, id))
        });
        Some(fillings.collect())
    }

    /// Bytes that are not in any slot.
    pub fn free_bytes(&self) -> usize {
        self.0.lock().extents.free() as usize * GRANULE
    }

    /// How many slots of `payload_bytes` (plus header page) could be cut now, counted no further than
    /// `most`.
    pub fn room(&self, payload_bytes: usize, most: usize) -> usize {
        slot_granules(payload_bytes).map_or(0, |granules| {
            let state = self.0.lock();
            state.extents.room(granules, most)
        })
    }

    /// Seals several chunks as [`Filling::seal`] does, with fewer acquisitions of the arena's lock; the
    /// answers are in their order. Those that were not sealed are freed.
    ///
    /// # Errors
    /// Of each chunk, as [`Filling::seal`]; `Internal` where its slot is in another arena.
    pub fn seal_all(
        &self,
        chunks: impl IntoIterator<Item = (Filling, RecordHeader)>,
    ) -> Vec<Result<Slot>> {
        let chunks = chunks.into_iter().map(|(filling, header)| {
            if !filling.arena().is_same(self) {
                return Err(Error::internal(
                    "a slot is sealed by the arena that it is in",
                ));
            }
            filling.complete(self, header)
        });
        let chunks: Vec<Result<Complete>> = chunks.collect();
        self.publish(chunks.iter().flatten());
        let sealed = chunks.into_iter().map(|chunk| chunk.map(Complete::sealed));
        sealed.collect()
    }

    /// The slot that `id` stands for, as one more handle.
    ///
    /// # Panics
    /// Where no handle to it exists (an `id` used after [`HostArena::release`]).
    pub fn slot(&self, id: SlotId) -> Slot {
        let held = self
            .0
            .table
            .get(id.0)
            .is_some_and(|entry| entry.handle_from_id());
        assert!(held, "slot id {} is not held", id.0);
        Slot(Handle::counted(self, id.0))
    }

    /// As [`HostArena::slot`], for an `id` that may have been released, and even given to another
    /// slot, since it was read: `None`, or a slot whose [`Slot::key`] tells what it is.
    pub fn find(&self, id: SlotId) -> Option<Slot> {
        let held = self.0.table.get(id.0)?.handle_from_id();
        held.then(|| Slot(Handle::counted(self, id.0)))
    }

    /// Gives up the handle that `id` stands for.
    ///
    /// # Panics
    /// Where no handle to it exists.
    pub fn release(&self, id: SlotId) {
        self.release_all([id]);
    }

    /// Gives up the handles that `ids` stand for.
    ///
    /// # Panics
    /// Where no handle to one of them exists.
    pub fn release_all(&self, ids: impl IntoIterator<Item = SlotId>) {
        let was_last = |id: &SlotId| {
            let last = self.0.table.get(id.0).and_then(|entry| entry.drop_id());
            last.unwrap_or_else(|| panic!("slot id {} is not held", id.0))
        };
        let ids = ids.into_iter().filter(was_last).map(|id| id.0);
        let mut ended: Vec<u32> = ids.collect();
        // Neighbours in memory become one extent at once.
        ended.sort_unstable_by_key(|&id| self.entry(id).granule());
        self.end(&ended);
    }

    /// Where the bytes are now.
    pub fn usage(&self) -> ArenaUsage {
        let state = self.0.lock();
        let bytes = |granules: u32| granules as usize * GRANULE;
        let usage = ArenaUsage {
            capacity_bytes: self.0.mapping.len(),
            free_bytes: bytes(state.extents.free()),
            filling_bytes: bytes(state.filling),
            published_bytes: bytes(state.published),
            published_slots: state.published_slots,
            largest_free_bytes: bytes(state.extents.largest()),
        };
        #[cfg(any(test, debug_assertions, feature = "sim"))]
        {
            assert!(state.extents.is_consistent(), "free extents are consistent");
            assert_eq!(
                usage.free_bytes + usage.filling_bytes + usage.published_bytes,
                usage.capacity_bytes,
                "free + filling + published = capacity"
            );
        }
        usage
    }

    /// The mapping, for devices that pin it: its first byte and its length. It stays where it is
    /// until the last clone, slot and filling are gone.
    pub fn mapping(&self) -> (NonNull<u8>, usize) {
        (self.0.mapping.base(), self.0.mapping.len())
    }

    /// Do both share one mapping?
    pub fn is_same(&self, other: &HostArena) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The entry of a slot that is held.
    pub(super) fn entry(&self, id: u32) -> &Entry {
        self.0.table.get(id).expect("a held slot has an entry")
    }

    /// Keeps every other writer of the slot out.
    pub(super) fn write_turn(&self, id: u32) -> MutexGuard<'_, ()> {
        let lock = &self.0.write_locks[id as usize % WRITE_LOCKS];
        lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on the slots are sealed, and give back what they do not keep.
    pub(super) fn publish<'a>(&self, chunks: impl IntoIterator<Item = &'a Complete>) {
        let mut chunks = chunks.into_iter().peekable();
        while chunks.peek().is_some() {
            let mut state = self.0.lock();
            for chunk in chunks.by_ref().take(AT_ONCE) {
                let entry = self.entry(chunk.id());
                let (granule, granules) = (entry.granule(), entry.granules());
                let kept = chunk.kept(granules);
                state.filling -= granules;
                state.published += kept;
                state.published_slots += 1;
                if kept < granules {
                    let tail = (granule + kept, granules - kept);
                    state.extents.give_back([tail]);
                }
                entry.set_sealed(kept, chunk.is_regular());
            }
        }
    }

    /// Ends slots whose last hold is gone. Their places ascend.
    pub(super) fn end(&self, ids: &[u32]) {
        for ids in ids.chunks(AT_ONCE) {
            let mut state = self.0.lock();
            let entries = ids.iter().map(|&id| self.entry(id));
            for entry in entries.clone() {
                if entry.is_sealed() {
                    state.published -= entry.granules();
                    state.published_slots -= 1;
                } else {
                    state.filling -= entry.granules();
                }
            }
            let pieces = entries.map(|entry| (entry.granule(), entry.granules()));
            state.extents.give_back(pieces);
            state.free_ids.extend_from_slice(ids);
        }
    }
}

/// The file behind the mapping, for other processes to map.
impl AsFd for HostArena {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.mapping.as_fd()
    }
}

impl fmt::Debug for HostArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HostArena").field(&self.usage()).finish()
    }
}

/// Granules of a slot with `payload_bytes`, `None` where no arena has that many.
pub(super) fn slot_granules(payload_bytes: usize) -> Option<u32> {
    let granules = payload_bytes.div_ceil(GRANULE) + RecordHeader::BYTES / GRANULE;
    u32::try_from(granules)
        .ok()
        .filter(|&granules| granules < GRANULES_END)
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock can only come from an assertion of ours; what it leaves is at
        // worst space that is lost, and the engine must go on.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
