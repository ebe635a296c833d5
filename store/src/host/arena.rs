use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, slice};

use super::extent::FreeExtents;
use super::mapping::Mapping;
use super::table::{Entry, GRANULES_END, SlotTable};
use crate::codec::SlabCodecs;
use crate::record::slabs_fit;
use crate::{
    Checksum, Checksummer, CodecId, Error, Key, KvGeometry, LayerId, RecordHeader, Result,
    SlabEntry,
};

/// Slots start on multiples of this and are rounded up to it.
pub(super) const GRANULE: usize = 4096;

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
            Filling {
                handle: Handle {
                    arena: self.clone(),
                    id,
                },
                slabs: Vec::new(),
            }
        });
        Some(fillings.collect())
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
        Slot(Handle {
            arena: self.clone(),
            id: id.0,
        })
    }

    /// As [`HostArena::slot`], for an `id` that may have been released, and even given to another
    /// slot, since it was read: `None`, or a slot whose [`Slot::key`] tells what it is.
    pub fn find(&self, id: SlotId) -> Option<Slot> {
        let held = self.0.table.get(id.0)?.handle_from_id();
        held.then(|| {
            Slot(Handle {
                arena: self.clone(),
                id: id.0,
            })
        })
    }

    /// Gives up the handle that `id` stands for.
    ///
    /// # Panics
    /// Where no handle to it exists.
    pub fn release(&self, id: SlotId) {
        match self.0.table.get(id.0).and_then(|entry| entry.drop_id()) {
            Some(true) => self.0.free(id.0),
            Some(false) => {}
            None => panic!("slot id {} is not held", id.0),
        }
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
fn slot_granules(payload_bytes: usize) -> Option<u32> {
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

    /// Ends a slot whose last hold is gone.
    fn free(&self, id: u32) {
        let entry = self.table.get(id).expect("a held slot has an entry");
        let (granule, granules) = (entry.granule(), entry.granules());
        let mut state = self.lock();
        if entry.is_sealed() {
            state.published -= granules;
            state.published_slots -= 1;
        } else {
            state.filling -= granules;
        }
        state.extents.give_back(granule, granules);
        state.free_ids.push(id);
    }
}

/// One hold on a slot, counted in the table.
struct Handle {
    arena: HostArena,
    id: u32,
}

impl Handle {
    fn entry(&self) -> &Entry {
        self.arena
            .0
            .table
            .get(self.id)
            .expect("a held slot has an entry")
    }

    fn offset(&self) -> usize {
        self.entry().granule() as usize * GRANULE
    }

    fn len(&self) -> usize {
        self.entry().granules() as usize * GRANULE
    }

    /// The first byte of the image.
    fn image(&self) -> NonNull<u8> {
        // SAFETY: the table holds only extents within the mapping, and the mapping lives as long as
        // `self.arena`.
        unsafe { self.arena.0.mapping.base().add(self.offset()) }
    }

    /// Where the raw slab of `layer` is from the image's start, `None` where the slot is too short.
    fn raw_slab(&self, layer: LayerId) -> Option<usize> {
        let geometry = self.arena.geometry();
        let start = layer.0 as usize * geometry.slab_stride();
        (RecordHeader::BYTES + start + geometry.slab_bytes() <= self.len())
            .then_some(RecordHeader::BYTES + start)
    }
}

impl Clone for Handle {
    fn clone(&self) -> Self {
        self.entry().add_handle();
        Handle {
            arena: self.arena.clone(),
            id: self.id,
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.entry().drop_handle() {
            self.arena.0.free(self.id);
        }
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{} at {:#x}+{:#x}", self.id, self.offset(), self.len())
    }
}

/// A slot that is being written, owned by one writer. Dropping it frees the slot.
#[derive(Debug)]
pub struct Filling {
    handle: Handle,
    /// By layer; grown as slabs are noted.
    slabs: Vec<Option<SlabEntry>>,
}

/// A further handle to a [`Filling`], for the transfer that writes its slabs. The slot is not freed
/// while one exists, even if the `Filling` is dropped in the middle of a copy.
#[derive(Clone, Debug)]
pub struct FillingRef(Handle);

impl Filling {
    /// A handle for a transfer that writes into this slot.
    pub fn writer(&self) -> FillingRef {
        FillingRef(self.handle.clone())
    }

    /// The arena that it is in.
    pub fn arena(&self) -> &HostArena {
        &self.handle.arena
    }

    /// Bytes of the payload that fit.
    pub fn payload_capacity(&self) -> usize {
        self.handle.len() - RecordHeader::BYTES
    }

    /// The whole slot, header page first, to be filled with an image from elsewhere. It starts on
    /// 4 KiB, has a multiple of 4 KiB, and holds whatever was there before.
    ///
    /// # Errors
    /// `Internal` where a [`FillingRef`] still exists.
    pub fn image_mut(&mut self) -> Result<&mut [u8]> {
        if !self.handle.entry().is_sole() {
            return Err(still_written());
        }
        // SAFETY: the extent belongs to this slot alone; the only handle is `self`, borrowed mutably
        // for as long as the slice lives, so that no `FillingRef` can be made and no `Slot` exists.
        // The bytes were touched at open and are initialised.
        Ok(unsafe { slice::from_raw_parts_mut(self.handle.image().as_ptr(), self.handle.len()) })
    }

    /// Notes that the raw slab of `layer` is in place, and what its bytes sum to.
    pub fn set_slab(&mut self, layer: LayerId, checksum: Checksum) {
        let geometry = self.arena().geometry();
        let entry = SlabEntry::raw(geometry, layer, checksum);
        self.set_stored(layer, entry);
    }

    /// Notes where the slab of `layer` is, and what its stored bytes sum to.
    pub fn set_stored(&mut self, layer: LayerId, slab: SlabEntry) {
        let index = layer.0 as usize;
        if self.slabs.len() <= index {
            self.slabs.resize(index + 1, None);
        }
        self.slabs[index] = Some(slab);
    }

    /// Writes the header page, zeroes what no slab covers, gives back what lies behind the last slab,
    /// and publishes the slot: from here on it is read-only.
    ///
    /// The slab table of `header` is made here, from [`Filling::set_slab`] and [`Filling::set_stored`];
    /// what it held is ignored. A chunk whose slabs are all raw and in their places is published as
    /// raw, whatever codec `header` names.
    ///
    /// # Errors
    /// `Internal`, with the slot freed, where a [`FillingRef`] still exists, a slab of
    /// `header.layers` is missing or was not stored, the layers do not start at 0, or the slabs do not
    /// lie as the codec has them within the slot.
    pub fn seal(mut self, mut header: RecordHeader) -> Result<Slot> {
        let geometry = self.arena().geometry().clone();
        if header.layers.start != 0 || !(1..=geometry.layers).contains(&header.layers.end) {
            return Err(Error::internal("a slot holds layers from 0 on")
                .with("layers", format_args!("{:?}", header.layers)));
        }
        header.slabs.clear();
        for layer in header.layers.clone() {
            let slab = self.slabs.get(layer as usize).copied().flatten();
            let slab = slab.filter(|slab| slab.bytes > 0).ok_or_else(|| {
                Error::internal("a slot was sealed without one of its slabs").with("layer", layer)
            })?;
            header.slabs.push(slab);
        }
        let are_raw = slabs_fit(CodecId::Raw, &header.slabs, &geometry);
        if are_raw {
            header.codec = CodecId::Raw;
        }
        let end = payload_end(&header, are_raw, &geometry);
        if end > self.payload_capacity() || !slabs_fit(header.codec, &header.slabs, &geometry) {
            return Err(Error::internal("the slabs do not lie within their slot")
                .with("payload_bytes", end)
                .with("capacity_bytes", self.payload_capacity()));
        }
        let (page, payload) = self.image_mut()?.split_at_mut(RecordHeader::BYTES);
        page.copy_from_slice(&header.encode()[..]);
        // The gaps would show an earlier chunk's bytes, perhaps another tenant's, to the disk.
        let mut covered = 0;
        for slab in &header.slabs {
            payload[covered..slab.offset as usize].fill(0);
            covered = slab.range().end;
        }
        payload[covered..end.next_multiple_of(GRANULE)].fill(0);
        let regular = are_raw && header.layers.end == geometry.layers;
        Ok(self.publish(end, regular))
    }

    /// Publishes an image that was read from elsewhere into [`Filling::image_mut`], if it verifies:
    /// the header page, then `identity`, then the checksum of every slab. What is behind the last
    /// slab is zeroed and, but for the last 4 KiB begun, given back.
    ///
    /// # Errors
    /// With the slot freed: `Corrupt` or `Invalid` as [`RecordHeader::decode`], `Corrupt` where a
    /// slab does not match its checksum or does not fit the slot, whatever `identity` answers, and
    /// `Internal` where a [`FillingRef`] still exists.
    pub fn seal_image(
        mut self,
        identity: impl FnOnce(&RecordHeader) -> Result<()>,
    ) -> Result<Slot> {
        let geometry = self.arena().geometry().clone();
        let image = self.image_mut()?;
        let (page, payload) = image.split_at_mut(RecordHeader::BYTES);
        let header = RecordHeader::decode(page, &geometry)?;
        identity(&header)?;
        for (index, slab) in header.slabs.iter().enumerate() {
            let layer = header.layers.start + index as u32;
            let bytes = payload
                .get(slab.offset as usize..slab.offset as usize + slab.bytes as usize)
                .ok_or_else(|| {
                    Error::corrupt("a slab lies outside of its record").with("layer", layer)
                })?;
            if Checksummer::of(bytes) != slab.checksum {
                return Err(Error::corrupt("a slab does not match its checksum")
                    .with("key", header.key.to_hex())
                    .with("layer", layer));
            }
        }
        let are_raw = slabs_fit(CodecId::Raw, &header.slabs, &geometry);
        let end = payload_end(&header, are_raw, &geometry);
        let covered = header.payload_bytes();
        payload[covered..end.next_multiple_of(GRANULE).max(covered)].fill(0);
        let regular = are_raw && header.layers == (0..geometry.layers);
        Ok(self.publish(end, regular))
    }

    /// Publishes an encoded chunk whose slab table is that of `header`.
    pub(super) fn seal_coded(mut self, header: &RecordHeader, payload: &[u8]) -> Result<Slot> {
        let (page, room) = self.image_mut()?.split_at_mut(RecordHeader::BYTES);
        page.copy_from_slice(&header.encode()[..]);
        room[..payload.len()].copy_from_slice(payload);
        room[payload.len()..].fill(0);
        Ok(self.publish(payload.len(), false))
    }

    /// Publishes what the payload's first `end` bytes take and gives the rest back. The caller has
    /// checked that this is the only handle.
    fn publish(self, end: usize, regular: bool) -> Slot {
        let entry = self.handle.entry();
        let granules = entry.granules();
        let kept = slot_granules(end).map_or(granules, |kept| kept.min(granules));
        {
            let mut state = self.handle.arena.0.lock();
            state.filling -= granules;
            state.published += kept;
            state.published_slots += 1;
            if kept < granules {
                let tail = entry.granule() + kept;
                state.extents.give_back(tail, granules - kept);
            }
            entry.set_sealed(kept, regular);
        }
        Slot(self.handle)
    }
}

/// Bytes of the payload that a slot keeps: a raw chunk has as many as a raw slot.
fn payload_end(header: &RecordHeader, are_raw: bool, geometry: &KvGeometry) -> usize {
    match are_raw {
        true => header.layers.len() * geometry.slab_stride(),
        false => header.payload_bytes(),
    }
}

fn still_written() -> Error {
    Error::internal("a transfer still holds the slot: wait for its fence")
}

impl FillingRef {
    /// The arena that it is in.
    pub fn arena(&self) -> &HostArena {
        &self.0.arena
    }

    /// Bytes from the start of [`HostArena::mapping`] to the slot's payload, and how many there are.
    pub fn payload(&self) -> (usize, usize) {
        let (start, header) = (self.0.offset(), RecordHeader::BYTES);
        (start + header, self.0.len() - header)
    }

    /// Bytes from the start of [`HostArena::mapping`] to the raw slab of `layer`; `None` where the
    /// slot is too short for it.
    pub fn slab_offset(&self, layer: LayerId) -> Option<usize> {
        Some(self.0.offset() + self.0.raw_slab(layer)?)
    }

    /// Calls `write` with the raw slab of `layer`; `None` where the slot is too short for it. Writers of
    /// one slot take turns.
    pub(crate) fn write_slab<R>(
        &self,
        layer: LayerId,
        write: impl FnOnce(&mut [u8]) -> R,
    ) -> Option<R> {
        let start = self.0.raw_slab(layer)? - RecordHeader::BYTES;
        let slab_bytes = self.0.arena.geometry().slab_bytes();
        self.write_from(start, |room| write(&mut room[..slab_bytes]))
    }

    /// Calls `write` with the payload from `start` on, as far as the slot goes; `None` where it does not
    /// go so far. Writers of one slot take turns.
    pub(crate) fn write_from<R>(
        &self,
        start: usize,
        write: impl FnOnce(&mut [u8]) -> R,
    ) -> Option<R> {
        let start = RecordHeader::BYTES + start;
        let bytes = self.0.len().checked_sub(start)?;
        let lock = &self.0.arena.0.write_locks[self.0.id as usize % WRITE_LOCKS];
        let _turn = lock.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the range is within the slot's extent, which is this slot's alone. While a
        // `FillingRef` exists there is no other reference into it: `Filling::image_mut` refuses, a
        // `Slot` cannot come to be, and other `FillingRef`s wait for the lock. Bytes of the mapping
        // are initialised.
        let room = unsafe { slice::from_raw_parts_mut(self.0.image().add(start).as_ptr(), bytes) };
        Some(write(room))
    }
}

/// A sealed slot: a complete chunk image that does not change. Clones share it; the last one frees
/// it, so a copy that is under way keeps its bytes whatever else happens.
#[derive(Clone, Debug)]
pub struct Slot(Handle);

impl Slot {
    /// The header, as it was sealed.
    ///
    /// # Errors
    /// `Corrupt` where the page does not verify any more: memory was damaged.
    pub fn header(&self) -> Result<RecordHeader> {
        RecordHeader::decode(self.page(), self.0.arena.geometry())
    }

    /// The chunk's key, as it was sealed.
    pub fn key(&self) -> Key {
        RecordHeader::key_in_page(self.page())
    }

    /// How its slabs are encoded, but for those that did not shrink: [`Slot::is_raw`].
    pub fn codec(&self) -> CodecId {
        RecordHeader::codec_in_page(self.page())
    }

    /// Is the slab of that entry stored raw?
    pub fn is_raw(&self, slab: &SlabEntry) -> bool {
        slab.bytes as usize == self.arena().geometry().slab_bytes()
    }

    /// Turns this handle into a number that still counts as one. Give it back with
    /// [`HostArena::release`].
    pub fn into_id(self) -> SlotId {
        let id = self.0.id;
        // The number needs a count of its own before the handle's goes.
        self.0.entry().add_id();
        SlotId(id)
    }

    /// One slab's entry.
    pub fn slab(&self, layer: LayerId) -> Option<SlabEntry> {
        RecordHeader::slab_in_page(self.page(), layer)
    }

    #[cfg(any(test, feature = "cuda"))]
    /// Bytes from the start of [`HostArena::mapping`] to the raw slab of layer 0, where the slot holds
    /// every layer raw, each a [`KvGeometry::slab_stride`] behind the one before. Answered without a
    /// look at the header page, which is rarely in a CPU cache.
    pub(crate) fn regular_offset(&self) -> Option<usize> {
        let regular = self.0.entry().is_regular();
        regular.then(|| self.0.offset() + RecordHeader::BYTES)
    }

    /// The arena that it is in.
    pub fn arena(&self) -> &HostArena {
        &self.0.arena
    }

    /// The whole slot, header page first, a multiple of 4 KiB from 4 KiB on; what is behind the
    /// last slab is zero.
    pub fn image(&self) -> &[u8] {
        // SAFETY: the extent belongs to this slot alone and is sealed: nobody writes to it before
        // the last handle is gone, and the slice borrows one.
        unsafe { slice::from_raw_parts(self.0.image().as_ptr(), self.0.len()) }
    }

    /// The stored bytes of one slab.
    pub fn slab_bytes(&self, layer: LayerId) -> Option<&[u8]> {
        let slab = self.slab(layer)?;
        let start = RecordHeader::BYTES + slab.offset as usize;
        self.image().get(start..start + slab.bytes as usize)
    }

    /// Bytes from the start of [`HostArena::mapping`] to this slot's image.
    pub fn offset(&self) -> usize {
        self.0.offset()
    }

    fn page(&self) -> &[u8] {
        &self.image()[..RecordHeader::BYTES]
    }
}

/// Shown: the life of a slot in every order of dropping its handles, that nothing of an earlier
/// chunk is left in a sealed image, and that the books balance at every moment under ten threads.
#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread;

    use super::*;
    use crate::{Dtype, ErrorKind};

    /// Slabs of 160 B at a stride of 256: with gaps.
    fn geometry() -> KvGeometry {
        KvGeometry::gqa(3, 2, 10, Dtype::Bf16, 2).expect("valid")
    }

    fn open(slots: usize) -> HostArena {
        HostArena::open(&geometry(), slots * 8192, |_, _| {}).expect("small")
    }

    fn header(key: u8) -> RecordHeader {
        RecordHeader {
            namespace: Key([1; 32]),
            parent: Key([2; 32]),
            key: Key([key; 32]),
            depth: 0,
            tokens: 2,
            geometry: geometry().fingerprint(),
            layers: 0..3,
            codec: CodecId::Raw,
            slabs: Vec::new(),
        }
    }

    fn filled(arena: &HostArena, byte: u8) -> Filling {
        let bytes = geometry().payload_bytes();
        let mut filling = arena.allocate(bytes, 1).expect("room").remove(0);
        let writer = filling.writer();
        for layer in geometry().layer_ids() {
            let sum = writer.write_slab(layer, |slab| {
                slab.fill(byte);
                Checksummer::of(slab)
            });
            filling.set_slab(layer, sum.expect("fits"));
        }
        filling
    }

    fn sealed(arena: &HostArena, byte: u8) -> Slot {
        filled(arena, byte).seal(header(byte)).expect("complete")
    }

    #[test]
    fn open_reports_progress_to_the_end_and_every_page_is_there() {
        let last = AtomicUsize::new(0);
        let arena = HostArena::open(&geometry(), (70 << 20) + 5, |touched, total| {
            assert_eq!(total, 70 << 20);
            last.fetch_max(touched, Ordering::Relaxed);
        })
        .expect("room");
        assert_eq!(last.into_inner(), 70 << 20);
        assert_eq!(arena.usage().capacity_bytes, 70 << 20);
        assert_eq!(arena.mapping().1, 70 << 20);
    }

    #[test]
    fn silly_sizes_are_refused_with_a_reason() {
        for bytes in [0, 4096, 8191, usize::MAX / 2, 1 << 42] {
            let error = HostArena::open(&geometry(), bytes, |_, _| {}).expect_err("silly");
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains("host tier"), "{error}");
        }
    }

    #[test]
    fn slots_of_one_allocation_are_consecutive_and_all_or_nothing() {
        let arena = open(4);
        let bytes = geometry().payload_bytes();
        assert!(arena.allocate(bytes, 5).is_none());
        assert!(arena.allocate(usize::MAX, 1).is_none());
        assert!(arena.allocate(bytes, usize::MAX).is_none());
        let mut fillings = arena.allocate(bytes, 4).expect("room");
        let offsets: Vec<_> = fillings.iter().map(|f| f.handle.offset()).collect();
        assert_eq!(offsets, [0, 8192, 16384, 24576]);
        assert!(arena.allocate(bytes, 1).is_none());
        fillings.remove(1);
        assert_eq!(arena.usage().largest_free_bytes, 8192);
        assert_eq!(
            arena.allocate(bytes, 1).expect("a hole")[0].handle.offset(),
            8192
        );
    }

    #[test]
    fn a_sealed_slot_reads_back_and_holds_nothing_of_an_earlier_chunk() {
        let arena = open(1);
        let mut dirty = arena.allocate(4096, 1).expect("room").remove(0);
        dirty.image_mut().expect("sole").fill(0xee);
        drop(dirty);
        let slot = sealed(&arena, 7);
        let read = slot.header().expect("sealed");
        assert_eq!(read.key, Key([7; 32]));
        let mut expected = vec![0; 8192];
        expected[..4096].copy_from_slice(&read.encode()[..]);
        for layer in geometry().layer_ids() {
            let slab = slot.slab(layer).expect("there");
            assert_eq!(Some(&slab), read.slab(layer));
            let regular = slot.regular_offset().expect("sealed whole and raw");
            let start = slot.offset() + RecordHeader::BYTES + slab.offset as usize;
            assert_eq!(regular + layer.0 as usize * 256, start);
            assert_eq!(slot.slab_bytes(layer), Some(&[7; 160][..]));
            assert_eq!(slab.checksum, Checksummer::of(&[7; 160]));
            expected[4096 + slab.offset as usize..][..160].fill(7);
        }
        assert_eq!(slot.slab(LayerId(3)), None);
        assert_eq!(slot.image(), expected);
    }

    #[test]
    fn a_slot_lives_as_long_as_its_last_handle_or_id() {
        let arena = open(2);
        let slot = sealed(&arena, 1);
        let clone = slot.clone();
        let id = slot.into_id();
        drop(clone);
        assert_eq!(arena.usage().published_slots, 1);
        let again = arena.slot(id);
        arena.release(id);
        assert_eq!(again.header().expect("held").key, Key([1; 32]));
        drop(again);
        assert_eq!(arena.usage().free_bytes, 2 * 8192);
        let gone = thread::scope(|scope| scope.spawn(|| arena.slot(id)).join().is_err());
        assert!(gone, "an id that was given back names nothing");
    }

    #[test]
    fn a_dropped_filling_is_not_reused_while_a_transfer_holds_it() {
        let arena = open(1);
        let mut filling = filled(&arena, 1);
        let writer = filling.writer();
        assert!(filling.image_mut().is_err());
        let error = filling.seal(header(1)).expect_err("a writer exists");
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert_eq!(arena.usage().filling_bytes, 8192);
        assert!(arena.allocate(1, 1).is_none());
        drop(writer);
        assert_eq!(arena.usage().free_bytes, 8192);
    }

    #[test]
    fn a_slot_without_all_of_its_slabs_is_not_sealed() {
        let arena = open(1);
        let mut filling = arena.allocate(4096, 1).expect("room").remove(0);
        filling.set_slab(LayerId(0), Checksum(1));
        filling.set_slab(LayerId(2), Checksum(1));
        let error = filling.seal(header(1)).expect_err("layer 1 is missing");
        assert!(error.to_string().ends_with("layer=1"), "{error}");
        assert_eq!(arena.usage().free_bytes, 8192);
    }

    #[test]
    fn an_image_read_from_elsewhere_is_sealed_only_if_all_of_it_verifies() {
        let arena = open(2);
        let original = sealed(&arena, 5);
        let image = original.image().to_vec();
        let read = |edit: &dyn Fn(&mut [u8])| {
            let mut filling = arena.allocate(4096, 1).expect("room").remove(0);
            let bytes = filling.image_mut().expect("sole");
            bytes.copy_from_slice(&image);
            edit(bytes);
            filling.seal_image(|header| {
                (header.key == Key([5; 32]))
                    .then_some(())
                    .ok_or_else(|| Error::corrupt("another chunk"))
            })
        };
        // Only what is behind the last slab may differ, and is cleaned.
        let same = read(&|bytes| bytes[8000] = 1).expect("verifies");
        assert_eq!(same.image(), image);
        drop(same);
        for at in [8, 60, 300, 4096, 4096 + 159, 4096 + 256, 4096 + 512 + 159] {
            let error = read(&|bytes| bytes[at] ^= 1).expect_err("damaged");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{at}");
        }
        let other = header(6);
        let page = RecordHeader {
            slabs: original.header().expect("sealed").slabs,
            ..other
        };
        let error = read(&|bytes| bytes[..4096].copy_from_slice(&page.encode()[..]));
        assert!(
            error
                .expect_err("key 6")
                .to_string()
                .contains("another chunk")
        );
        assert_eq!(arena.usage().free_bytes, 8192);
    }

    /// Slabs of 12,800 B, so that an encoded chunk takes fewer granules.
    fn large() -> KvGeometry {
        KvGeometry::gqa(3, 2, 100, Dtype::Bf16, 16).expect("valid")
    }

    /// A filling full of an earlier chunk, with slabs of so many bytes of 7 at such offsets.
    fn coded(arena: &HostArena, slabs: &[(u32, u32)]) -> Filling {
        let bytes = large().payload_bytes();
        let mut filling = arena.allocate(bytes, 1).expect("room").remove(0);
        let image = filling.image_mut().expect("sole");
        image.fill(0xee);
        for &(offset, bytes) in slabs {
            image[RecordHeader::BYTES + offset as usize..][..bytes as usize].fill(7);
        }
        for (layer, &(offset, bytes)) in large().layer_ids().zip(slabs) {
            filling.set_stored(
                layer,
                SlabEntry {
                    offset,
                    bytes,
                    checksum: Checksummer::of(&vec![7; bytes as usize]),
                },
            );
        }
        filling
    }

    #[test]
    fn a_slot_of_an_encoded_chunk_gives_its_tail_back_and_shows_nothing_of_an_earlier_one() {
        let bytes = large().payload_bytes();
        let arena = HostArena::open(&large(), 4096 + bytes.next_multiple_of(4096), |_, _| {});
        let arena = arena.expect("small");
        let header = RecordHeader {
            codec: CodecId::Exp,
            geometry: large().fingerprint(),
            ..header(3)
        };
        // The last slab is raw, and starts where a longer neighbour's would.
        let slabs = [(0, 700), (1024, 900), (2560, 12_800)];
        let sealed = coded(&arena, &slabs)
            .seal(header.clone())
            .expect("lies right");
        assert_eq!(sealed.image().len(), 4096 + 16_384);
        let mut expected = vec![0; 16_384];
        for (offset, bytes) in slabs {
            expected[offset as usize..][..bytes as usize].fill(7);
        }
        assert!(sealed.image()[4096..] == expected);
        assert_eq!(sealed.header().expect("reads back").codec, CodecId::Exp);
        assert!(sealed.is_raw(&sealed.slab(LayerId(2)).expect("there")));
        assert_eq!(sealed.regular_offset(), None);
        let usage = arena.usage();
        assert_eq!(usage.published_bytes, 4096 + 16_384);
        assert_eq!(usage.free_bytes, usage.capacity_bytes - 4096 - 16_384);
        assert_eq!(usage.largest_free_bytes, usage.free_bytes);
        drop(sealed);
        assert_eq!(arena.usage().largest_free_bytes, usage.capacity_bytes);

        // Raw after all, in its places: the codec is not needed.
        let stride = large().slab_stride() as u32;
        let raw = [(0, 12_800), (stride, 12_800), (2 * stride, 12_800)];
        let sealed = coded(&arena, &raw).seal(header.clone()).expect("whole");
        assert_eq!(sealed.codec(), CodecId::Raw);
        assert!(sealed.regular_offset().is_some());
        drop(sealed);

        // Unaligned, overlapping, behind the raw place, longer than raw, not stored, behind the end.
        for wrong in [
            [(0, 700), (1000, 900), (2560, 100)],
            [(0, 1100), (1024, 900), (2560, 100)],
            [(0, 700), (1024, 900), (2 * stride + 256, 100)],
            [(0, 700), (1024, 12_801), (stride + 256, 100)],
            [(0, 700), (1024, 0), (2560, 100)],
            [(256, 700), (1024, 900), (2560, 100)],
        ] {
            let error = coded(&arena, &wrong)
                .seal(header.clone())
                .expect_err("lies wrong");
            assert_eq!(error.kind(), ErrorKind::Internal, "{wrong:?}");
            assert_eq!(arena.usage().free_bytes, usage.capacity_bytes);
        }
    }

    #[test]
    fn the_mapping_outlives_the_arena_while_a_slot_is_held() {
        let arena = open(1);
        let slot = sealed(&arena, 9);
        drop(arena);
        assert_eq!(slot.slab_bytes(LayerId(2)), Some(&[9; 160][..]));
    }

    #[test]
    fn free_filling_and_published_add_up_under_ten_threads() {
        let arena = open(40);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            // `usage` asserts the sum.
            let watcher = scope.spawn(|| {
                let mut looks = 0_u32;
                // One look at least, also where the workers are done before this thread runs.
                loop {
                    arena.usage();
                    looks += 1;
                    if done.load(Ordering::Relaxed) {
                        break looks;
                    }
                    thread::yield_now();
                }
            });
            let workers: Vec<_> = (0..10_u8)
                .map(|worker| {
                    let arena = &arena;
                    scope.spawn(move || {
                        for round in 0..200_usize {
                            let bytes = 1 + (round * 977 + usize::from(worker) * 131) % 12_000;
                            let Some(fillings) = arena.allocate(bytes, 1 + round % 3) else {
                                continue;
                            };
                            drop(fillings);
                            let Some(mut fillings) = arena.allocate(4096, 1) else {
                                continue;
                            };
                            drop(fillings.remove(0));
                            if arena.usage().free_bytes < 8192 * 12 {
                                continue;
                            }
                            let slot = sealed(arena, worker);
                            let ids = [slot.clone().into_id(), slot.into_id()];
                            arena.release(ids[0]);
                            let slot = arena.slot(ids[1]);
                            arena.release(ids[1]);
                            assert_eq!(slot.slab_bytes(LayerId(1)), Some(&[worker; 160][..]));
                        }
                    })
                })
                .collect();
            for worker in workers {
                worker.join().expect("no worker panics");
            }
            done.store(true, Ordering::Relaxed);
            assert!(watcher.join().expect("the sum holds") > 0);
        });
        assert_eq!(arena.usage().free_bytes, arena.usage().capacity_bytes);
    }
}
