//! One slot: filled by one writer, sealed, then read by all.

use std::ptr::NonNull;
use std::{fmt, slice};

use super::arena::{GRANULE, HostArena, SlotId, slot_granules};
use super::table::Entry;
use crate::record::slabs_fit;
use crate::{
    Checksum, Checksummer, CodecId, Error, Key, KvGeometry, LayerId, RecordHeader, Result,
    SlabEntry,
};

/// One hold on a slot, counted in the table.
pub(super) struct Handle {
    arena: HostArena,
    id: u32,
}

impl Handle {
    /// The hold that the slot's entry already counts.
    pub(super) fn counted(arena: &HostArena, id: u32) -> Handle {
        Handle {
            arena: arena.clone(),
            id,
        }
    }

    fn entry(&self) -> &Entry {
        self.arena.entry(self.id)
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
        unsafe { self.arena.mapping().0.add(self.offset()) }
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
            self.arena.end(self.id);
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
    pub(super) fn new(handle: Handle) -> Filling {
        Filling {
            handle,
            slabs: Vec::new(),
        }
    }

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
                return Err(
                    Error::corrupt("a slab does not match its checksum").with("layer", layer)
                );
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
        let granules = self.handle.entry().granules();
        let kept = slot_granules(end).map_or(granules, |kept| kept.min(granules));
        self.handle.arena.publish(self.handle.id, kept, regular);
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
        let _turn = self.0.arena.write_turn(self.0.id);
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
pub struct Slot(pub(super) Handle);

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
