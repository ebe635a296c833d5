//! The device tier's memory: chunk slots of one size in a device's own memory.
//!
//! A slot holds one raw chunk, layer-major, without the header page: what the header of its copy in the
//! host tier says is kept beside it in RAM, also where that copy is encoded. Its life is that of a slot in
//! the host tier: allocated as a [`DeviceFilling`],
//! sealed to a [`DeviceSlot`] that does not change any more, free when the last hold on it is gone.
//!
//! To its own copies between the tiers a slot is an engine's page of one block: see
//! [`DeviceArena::table_to_fill`].

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::{ptr, slice};

use memmap2::{MmapMut, MmapRaw};

use crate::record::slabs_fit;
use crate::{
    Checksum, Checksummer, Error, Key, KvGeometry, LayerId, PageId, PageTable, PagedKv,
    RecordHeader, Result,
};

/// A bounded arena of chunk slots in one device's memory, sized at open. Clones share it; its memory
/// is given back when the last clone, slot, filling and transfer are gone.
#[derive(Clone)]
pub struct DeviceArena(Arc<Inner>);

struct Inner {
    geometry: KvGeometry,
    /// Of the first slot, in the device's address space.
    base: u64,
    slots: u32,
    /// Where the CPU copies: keeps two of its copies out of one layer.
    locks: Option<Vec<RwLock<()>>>,
    state: Mutex<State>,
    /// Keeps the memory; dropped last.
    _memory: Box<dyn Any + Send + Sync>,
}

struct State {
    free: Vec<u32>,
    entries: Vec<Entry>,
    published: u32,
}

/// One slot: who holds it, and what it holds once it is sealed.
#[derive(Default)]
struct Entry {
    handles: u32,
    /// Handles that were turned into numbers.
    ids: u32,
    sealed: Option<Arc<Sealed>>,
}

/// What is known of a sealed slot.
#[derive(Debug)]
struct Sealed {
    header: RecordHeader,
    /// Of the raw slabs, where they are known.
    sums: Vec<Option<Checksum>>,
}

/// Where the bytes of an arena are: free + filling + published = capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DeviceArenaUsage {
    /// Bytes of all slots.
    pub capacity_bytes: u64,
    /// Not in use.
    pub free_bytes: u64,
    /// In slots that are being written.
    pub filling_bytes: u64,
    /// In sealed slots.
    pub published_bytes: u64,
}

/// A sealed device slot's number within its arena. It counts as a handle: see
/// [`DeviceSlot::into_id`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceSlotId(pub u32);

impl DeviceArena {
    /// An arena over `slots` slots at `base`.
    ///
    /// # Safety
    /// `base` is valid for reads and writes over as many bytes as the slots have, in the address
    /// space of the device that will copy, for as long as `memory` lives, and nobody else uses them.
    /// With `on_cpu` that is the process's own memory, exposed and initialised.
    pub(super) unsafe fn over(
        geometry: &KvGeometry,
        base: u64,
        slots: u32,
        on_cpu: bool,
        memory: Box<dyn Any + Send + Sync>,
    ) -> DeviceArena {
        let layers = 0..geometry.layers;
        DeviceArena(Arc::new(Inner {
            geometry: geometry.clone(),
            base,
            slots,
            locks: on_cpu.then(|| layers.map(|_| RwLock::new(())).collect()),
            state: Mutex::new(State {
                free: (0..slots).rev().collect(),
                entries: (0..slots).map(|_| Entry::default()).collect(),
                published: 0,
            }),
            _memory: memory,
        }))
    }

    /// An arena in ordinary memory, for devices that copy with the CPU.
    pub(super) fn in_host_memory(
        geometry: &KvGeometry,
        capacity_bytes: u64,
    ) -> Result<DeviceArena> {
        let slots = slots_in(geometry, capacity_bytes)?;
        let bytes = slots as usize * geometry.payload_bytes();
        let memory = MmapMut::map_anon(bytes).map_err(|error| {
            Error::unavailable("the memory of the device tier cannot be had")
                .with("bytes", bytes)
                .caused_by(error)
        })?;
        let memory = MmapRaw::from(memory);
        let base = memory.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: the mapping has so many bytes, zeroed, is ours, and goes with the box.
        Ok(unsafe { Self::over(geometry, base, slots, true, Box::new(memory)) })
    }

    /// The geometry of the chunks that it holds.
    pub fn geometry(&self) -> &KvGeometry {
        &self.0.geometry
    }

    /// Bytes of one slot.
    pub fn slot_bytes(&self) -> usize {
        self.0.geometry.payload_bytes()
    }

    /// Takes up to `count` free slots. Fewer where there are no more: evict, or do without.
    pub fn allocate(&self, count: usize) -> Vec<DeviceFilling> {
        let mut state = self.0.state();
        let take = count.min(state.free.len());
        let numbers: Vec<u32> = (0..take).filter_map(|_| state.free.pop()).collect();
        for &number in &numbers {
            state.entries[number as usize].handles = 1;
        }
        drop(state);
        let fillings = numbers.into_iter().map(|number| {
            DeviceFilling(Handle {
                arena: self.clone(),
                number,
            })
        });
        fillings.collect()
    }

    /// The sealed slot that `id` stands for, as one more handle, where it still holds `key`.
    pub fn find(&self, id: DeviceSlotId, key: &Key) -> Option<DeviceSlot> {
        let mut state = self.0.state();
        let entry = state.entries.get_mut(id.0 as usize)?;
        let sealed = entry.sealed.clone()?;
        if entry.ids == 0 || sealed.header.key != *key {
            return None;
        }
        entry.handles += 1;
        drop(state);
        let handle = Handle {
            arena: self.clone(),
            number: id.0,
        };
        Some(DeviceSlot { handle, sealed })
    }

    /// Gives up the handle that `id` stands for.
    ///
    /// # Panics
    /// Where no handle to it exists.
    pub fn release(&self, id: DeviceSlotId) {
        let mut state = self.0.state();
        let entry = &mut state.entries[id.0 as usize];
        assert!(entry.ids > 0, "device slot {} is not held", id.0);
        entry.ids -= 1;
        state.let_go(id.0);
    }

    /// Where the bytes are now.
    pub fn usage(&self) -> DeviceArenaUsage {
        let state = self.0.state();
        let bytes = |slots: u32| u64::from(slots) * self.slot_bytes() as u64;
        let (free, published) = (state.free.len() as u32, state.published);
        DeviceArenaUsage {
            capacity_bytes: bytes(self.0.slots),
            free_bytes: bytes(free),
            filling_bytes: bytes(self.0.slots - free - published),
            published_bytes: bytes(published),
        }
    }

    /// Do both share one memory?
    pub fn is_same(&self, other: &DeviceArena) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The slots of `fillings` as an engine's pages, block `i` of a prompt in filling `i`: a load into
    /// them brings chunks from the host tier. The table keeps the slots.
    ///
    /// # Errors
    /// `Invalid` where a filling is of another arena.
    pub fn table_to_fill(&self, fillings: &[DeviceFilling]) -> Result<PageTable> {
        self.table(fillings.iter().map(|filling| &filling.0), true)
    }

    /// The same for sealed slots: a save out of them brings chunks into the host tier.
    ///
    /// # Errors
    /// `Invalid` where a slot is of another arena.
    pub fn table_to_read(&self, slots: &[DeviceSlot]) -> Result<PageTable> {
        self.table(slots.iter().map(|slot| &slot.handle), false)
    }

    fn table<'a>(
        &self,
        handles: impl Iterator<Item = &'a Handle>,
        is_writable: bool,
    ) -> Result<PageTable> {
        let handles: Vec<Handle> = handles.cloned().collect();
        if !handles.iter().all(|handle| handle.arena.is_same(self)) {
            return Err(Error::invalid("a device slot is of another arena"));
        }
        let pages = handles.iter().map(|handle| PageId(handle.number)).collect();
        let slots = SlotPages {
            arena: self.clone(),
            _handles: handles,
            is_writable,
        };
        Ok(PageTable {
            kv: PagedKv::of_slots(slots, self.0.base, self.0.slots),
            pages,
        })
    }

    /// Can the CPU copy from and to it?
    pub(crate) fn is_host_memory(&self) -> bool {
        self.0.locks.is_some()
    }

    /// The address of the first slot on the device.
    #[cfg(feature = "cuda")]
    pub(super) fn base(&self) -> u64 {
        self.0.base
    }

    pub(crate) fn read(&self, layer: LayerId) -> Option<RwLockReadGuard<'_, ()>> {
        let lock = self.0.locks.as_ref()?.get(layer.0 as usize)?;
        Some(lock.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn write(&self, layer: LayerId) -> Option<RwLockWriteGuard<'_, ()>> {
        let lock = self.0.locks.as_ref()?.get(layer.0 as usize)?;
        Some(lock.write().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for DeviceArena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeviceArena").field(&self.usage()).finish()
    }
}

/// Slots that fit into `capacity_bytes`.
pub(super) fn slots_in(geometry: &KvGeometry, capacity_bytes: u64) -> Result<u32> {
    geometry.validate()?;
    let slot_bytes = geometry.payload_bytes() as u64;
    match u32::try_from(capacity_bytes / slot_bytes) {
        Ok(0) => Err(Error::invalid(
            "the device tier is smaller than one chunk: give it more bytes",
        )
        .with("capacity_bytes", capacity_bytes)
        .with("chunk_bytes", slot_bytes)),
        // Numbers that the index uses for something else come behind.
        Ok(slots) => Ok(slots.min(u32::MAX / 2)),
        Err(_) => Ok(u32::MAX / 2),
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing under the lock panics half way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Frees a slot that nobody holds any more.
    fn let_go(&mut self, number: u32) {
        let entry = &mut self.entries[number as usize];
        if entry.handles > 0 || entry.ids > 0 {
            return;
        }
        if entry.sealed.take().is_some() {
            self.published -= 1;
        }
        self.free.push(number);
    }
}

/// One hold on a slot.
struct Handle {
    arena: DeviceArena,
    number: u32,
}

impl Handle {
    /// Bytes from the arena's base to the slab of `layer`.
    fn slab_offset(&self, layer: LayerId) -> Option<usize> {
        let geometry = self.arena.geometry();
        let in_slot = layer.0 as usize * geometry.slab_stride();
        let slot = self.number as usize * self.arena.slot_bytes();
        (layer.0 < geometry.layers).then_some(slot + in_slot)
    }

    fn slab(&self, layer: LayerId) -> Option<*mut u8> {
        let offset = self.slab_offset(layer)?;
        let address = self.arena.0.base as usize + offset;
        Some(ptr::with_exposed_provenance_mut(address))
    }

    /// Calls `read` with the slab of `layer`; `None` where there is none that the CPU reaches.
    fn read_slab<R>(&self, layer: LayerId, read: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let _shared = self.arena.read(layer)?;
        let bytes = self.arena.geometry().slab_bytes();
        let slab = self.slab(layer)?;
        // SAFETY: as in `write_slab`; the layer's lock, taken for reading, keeps writers away.
        Some(read(unsafe { slice::from_raw_parts(slab, bytes) }))
    }
}

impl Clone for Handle {
    fn clone(&self) -> Self {
        self.arena.0.state().entries[self.number as usize].handles += 1;
        Handle {
            arena: self.arena.clone(),
            number: self.number,
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut state = self.arena.0.state();
        state.entries[self.number as usize].handles -= 1;
        state.let_go(self.number);
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device slot {}", self.number)
    }
}

/// A device slot that is being written, owned by one writer. Dropping it frees the slot once no
/// transfer has it.
#[derive(Debug)]
pub struct DeviceFilling(Handle);

/// A further handle to a [`DeviceFilling`], for the transfer that writes it.
#[derive(Clone, Debug)]
pub struct DeviceFillingRef(Handle);

impl DeviceFilling {
    /// A handle for a transfer that writes into this slot.
    pub fn writer(&self) -> DeviceFillingRef {
        DeviceFillingRef(self.0.clone())
    }

    /// Publishes the slot: from here on it does not change. `header` is that of the same chunk in the
    /// host tier, raw or encoded. The checksums of raw slabs are those of the bytes that were written
    /// here; of others the bytes are summed, where the CPU reaches them.
    ///
    /// # Errors
    /// `Internal`, with the slot freed, where a transfer still holds it, or the header is not one of a
    /// whole chunk.
    pub fn seal(self, header: RecordHeader) -> Result<DeviceSlot> {
        let geometry = self.0.arena.geometry();
        let is_whole = header.layers == (0..geometry.layers)
            && header.slabs.len() == geometry.layers as usize
            && slabs_fit(header.codec, &header.slabs, geometry);
        if !is_whole {
            return Err(Error::internal("a device slot holds a whole chunk"));
        }
        let slabs = geometry.layer_ids().zip(&header.slabs);
        let sums = slabs.map(|(layer, slab)| match slab.is_raw(geometry) {
            true => Some(slab.checksum),
            false => self.0.read_slab(layer, Checksummer::of),
        });
        let sums = sums.collect();
        let sealed = Arc::new(Sealed { header, sums });
        let mut state = self.0.arena.0.state();
        let entry = &mut state.entries[self.0.number as usize];
        if entry.handles != 1 {
            return Err(Error::internal(
                "a transfer still holds the device slot: wait for its fence",
            ));
        }
        entry.sealed = Some(Arc::clone(&sealed));
        state.published += 1;
        drop(state);
        Ok(DeviceSlot {
            handle: self.0,
            sealed,
        })
    }
}

impl DeviceFillingRef {
    /// The arena that it is in.
    pub fn arena(&self) -> &DeviceArena {
        &self.0.arena
    }

    pub(super) fn slab_offset(&self, layer: LayerId) -> Option<usize> {
        self.0.slab_offset(layer)
    }

    /// Calls `write` with the slab of `layer`; `None` where there is none that the CPU reaches.
    pub(super) fn write_slab<R>(
        &self,
        layer: LayerId,
        write: impl FnOnce(&mut [u8]) -> R,
    ) -> Option<R> {
        let _exclusive = self.0.arena.write(layer)?;
        let (slab, bytes) = (self.0.slab(layer)?, self.arena().geometry().slab_bytes());
        // SAFETY: the slab lies within the arena's memory, which the handle keeps, and which is the
        // process's own and initialised where there are locks. The layer's lock, taken for writing,
        // keeps every other reference into this layer away.
        Some(write(unsafe { slice::from_raw_parts_mut(slab, bytes) }))
    }
}

/// A sealed device slot: a complete chunk that does not change. Clones share it; the last one frees
/// it, so a copy that is under way keeps its bytes.
#[derive(Clone, Debug)]
pub struct DeviceSlot {
    handle: Handle,
    sealed: Arc<Sealed>,
}

impl DeviceSlot {
    /// The arena that it is in.
    pub fn arena(&self) -> &DeviceArena {
        &self.handle.arena
    }

    /// What the chunk says about itself: the header of its copy in the host tier.
    pub fn header(&self) -> &RecordHeader {
        &self.sealed.header
    }

    /// The chunk's key.
    pub fn key(&self) -> Key {
        self.sealed.header.key
    }

    /// What the slab of `layer` sums to; `None` where that is not known, because the chunk came from an
    /// encoded one into memory that the CPU does not reach.
    pub fn checksum(&self, layer: LayerId) -> Option<Checksum> {
        *self.sealed.sums.get(layer.0 as usize)?
    }

    /// Turns this handle into a number that still counts as one. Give it back with
    /// [`DeviceArena::release`].
    pub fn into_id(self) -> DeviceSlotId {
        let number = self.handle.number;
        // The number needs a count of its own before the handle's goes.
        self.arena().0.state().entries[number as usize].ids += 1;
        DeviceSlotId(number)
    }

    pub(super) fn slab_offset(&self, layer: LayerId) -> Option<usize> {
        self.handle.slab_offset(layer)
    }

    /// Calls `read` with the slab of `layer`; `None` where there is none that the CPU reaches.
    pub(super) fn read_slab<R>(&self, layer: LayerId, read: impl FnOnce(&[u8]) -> R) -> Option<R> {
        self.handle.read_slab(layer, read)
    }
}

/// Slots that a transfer between the tiers takes for pages.
pub(crate) struct SlotPages {
    pub(crate) arena: DeviceArena,
    _handles: Vec<Handle>,
    pub(crate) is_writable: bool,
}

/// Shown: slots come back whoever holds them last, and are named by key alone. (That bytes arrive is
/// for the contract suite.)
#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CodecId, Dtype, SlabEntry};

    fn geometry() -> KvGeometry {
        KvGeometry::gqa(2, 1, 8, Dtype::Bf16, 4).expect("valid")
    }

    fn header(number: u8) -> RecordHeader {
        let geometry = geometry();
        let slab = |layer: u32| SlabEntry {
            offset: layer * geometry.slab_stride() as u32,
            bytes: geometry.slab_bytes() as u32,
            checksum: Checksum::default(),
        };
        RecordHeader {
            namespace: Key([1; 32]),
            parent: Key([2; 32]),
            key: Key([number; 32]),
            depth: 1,
            tokens: 4,
            geometry: geometry.fingerprint(),
            layers: 0..2,
            codec: CodecId::Raw,
            slabs: vec![slab(0), slab(1)],
        }
    }

    fn free(arena: &DeviceArena) -> u64 {
        let usage = arena.usage();
        assert_eq!(
            usage.free_bytes + usage.filling_bytes + usage.published_bytes,
            usage.capacity_bytes
        );
        usage.free_bytes / arena.slot_bytes() as u64
    }

    #[test]
    fn slots_come_back_when_nobody_holds_them_and_not_before() {
        let chunk = geometry().payload_bytes() as u64;
        let arena = DeviceArena::in_host_memory(&geometry(), 3 * chunk + 5).expect("small");
        let mut fillings = arena.allocate(5);
        assert_eq!((fillings.len(), free(&arena)), (3, 0));
        let writer = fillings[0].writer();
        fillings.truncate(1);
        assert_eq!(free(&arena), 2);
        let filling = fillings.remove(0);
        assert!(filling.seal(header(1)).is_err(), "a transfer holds it");
        assert_eq!(free(&arena), 2, "and still does");
        drop(writer);
        assert_eq!(free(&arena), 3);

        let slot = arena.allocate(1).remove(0).seal(header(1)).expect("whole");
        assert_eq!(slot.header().slabs[1].offset as usize, 256);
        let other = slot.clone();
        let id = slot.into_id();
        assert!(arena.find(id, &Key([2; 32])).is_none());
        let found = arena.find(id, &Key([1; 32])).expect("held by its number");
        let table = arena
            .table_to_read(std::slice::from_ref(&found))
            .expect("its own");
        arena.release(id);
        assert!(arena.find(id, &Key([1; 32])).is_none());
        drop((other, found));
        assert_eq!(free(&arena), 2);
        drop(table);
        assert_eq!(free(&arena), 3);
    }

    #[test]
    fn what_is_no_whole_raw_chunk_is_not_sealed() {
        let chunk = geometry().payload_bytes() as u64;
        let arena = DeviceArena::in_host_memory(&geometry(), chunk).expect("small");
        let mut headers = [header(1), header(1), header(1)];
        headers[0].slabs.pop();
        headers[1].layers = 0..1;
        headers[2].slabs[1].bytes -= 1;
        for header in headers {
            assert!(arena.allocate(1).remove(0).seal(header).is_err());
            assert_eq!(free(&arena), 1);
        }
        assert!(DeviceArena::in_host_memory(&geometry(), chunk - 1).is_err());
    }
}
