//! One slot: filled by one writer, sealed, then read by all.

use std::ptr::NonNull;
use std::{fmt, mem, slice};

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
            self.arena.end(&[self.id]);
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
    /// By layer; grown as slabs are noted. One of no bytes was not.
    slabs: Vec<SlabEntry>,
    /// Where the slabs end behind whose gaps were zeroed, as the header page was.
    cleared: Option<usize>,
}

/// A slot that holds a whole image and is to be published, with the only handle to it. Dropped before that,
/// it is freed.
pub(super) struct Complete {
    handle: Handle,
    /// Bytes of the payload that are the chunk's.
    end: usize,
    is_regular: bool,
}

impl Complete {
    pub(super) fn id(&self) -> u32 {
        self.handle.id
    }

    /// Of the slot's granules, those that the chunk takes.
    pub(super) fn kept(&self, granules: u32) -> u32 {
        slot_granules(self.end).map_or(granules, |kept| kept.min(granules))
    }

    pub(super) fn is_regular(&self) -> bool {
        self.is_regular
    }

    /// The slot, which was published.
    pub(super) fn sealed(self) -> Slot {
        Slot(self.handle)
    }

    /// Publishes it.
    fn publish(self) -> Slot {
        self.handle.arena.publish([&self]);
        self.sealed()
    }
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
            cleared: None,
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
        self.cleared = None;
        if !self.handle.entry().is_sole() {
            return Err(still_written());
        }
        // SAFETY: the extent belongs to this slot alone; the only handle is `self`, borrowed mutably
        // for as long as the slice lives, so that no `FillingRef` can be made and no `Slot` exists.
        // The bytes were touched at open and are initialised.
        Ok(unsafe { slice::from_raw_parts_mut(self.handle.image().as_ptr(), self.handle.len()) })
    }

    /// Zeroes the header page and what lies between the leading slabs that were noted, as far as they lie in
    /// order: a part of what [`Filling::seal`] does, for while later slabs are on their way, which are
    /// written behind them.
    pub fn clear_ahead(&mut self) {
        let capacity = self.payload_capacity();
        let _turn = self.handle.arena.write_turn(self.handle.id);
        let zero = |start: usize, bytes: usize| {
            // SAFETY: the bytes lie in the slot's extent, which is this slot's alone: below they are within
            // the header page, or end no later than `capacity` behind it. Other writers of the slot on
            // this side, `FillingRef`s, wait for the lock; there is no `Slot` of a slot that is being filled,
            // and the only `Filling` of it is borrowed mutably.
            unsafe {
                self.handle
                    .image()
                    .add(start)
                    .as_ptr()
                    .write_bytes(0, bytes)
            }
        };
        if self.cleared.is_none() {
            zero(0, RecordHeader::BYTES);
        }
        let mut covered = self.cleared.unwrap_or(0);
        for slab in self.slabs.iter().take_while(|slab| slab.bytes > 0) {
            let (start, end) = (slab.offset as usize, slab.range().end);
            if end <= covered {
                continue;
            }
            if start < covered || end > capacity {
                break;
            }
            zero(RecordHeader::BYTES + covered, start - covered);
            covered = end;
        }
        self.cleared = Some(covered);
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
        if self.slabs.is_empty() {
            let layers = self.arena().geometry().layers as usize;
            self.slabs.reserve_exact(layers);
        }
        if self.slabs.len() <= index {
            self.slabs.resize(index + 1, SlabEntry::default());
        }
        if (slab.offset as usize) < self.cleared.unwrap_or(0) {
            // It was noted before: the gaps around it may be others now.
            self.cleared = Some(0);
        }
        self.slabs[index] = slab;
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
    pub fn seal(self, header: RecordHeader) -> Result<Slot> {
        let arena = self.arena().clone();
        Ok(self.complete(&arena, header)?.publish())
    }

    /// What [`Filling::seal`] does before the slot is published by its `arena`. Without a locked
    /// instruction: it would wait until everything that was written to far memory has got there.
    pub(super) fn complete(
        mut self,
        arena: &HostArena,
        mut header: RecordHeader,
    ) -> Result<Complete> {
        let geometry = arena.geometry();
        if header.layers.start != 0 || !(1..=geometry.layers).contains(&header.layers.end) {
            return Err(Error::internal("a slot holds layers from 0 on")
                .with("layers", format_args!("{:?}", header.layers)));
        }
        let is_there = |&layer: &u32| {
            let slab = self.slabs.get(layer as usize);
            slab.is_some_and(|slab| slab.bytes > 0)
        };
        if let Some(layer) = header.layers.clone().find(|layer| !is_there(layer)) {
            return Err(
                Error::internal("a slot was sealed without one of its slabs").with("layer", layer),
            );
        }
        header.slabs = mem::take(&mut self.slabs);
        header.slabs.truncate(header.layers.len());
        let are_raw = slabs_fit(CodecId::Raw, &header.slabs, geometry);
        if are_raw {
            header.codec = CodecId::Raw;
        }
        let end = payload_end(&header, are_raw, geometry);
        let fits = are_raw || slabs_fit(header.codec, &header.slabs, geometry);
        if end > self.payload_capacity() || !fits {
            return Err(Error::internal("the slabs do not lie within their slot")
                .with("payload_bytes", end)
                .with("capacity_bytes", self.payload_capacity()));
        }
        let cleared = self.cleared;
        let (page, payload) = split_image(self.image_mut()?)?;
        if cleared.is_none() {
            page.fill(0);
        }
        header.write(page);
        // The gaps would show an earlier chunk's bytes, perhaps another tenant's, to the disk.
        let cleared = cleared.unwrap_or(0);
        let mut covered = cleared;
        let slabs = header.slabs.iter();
        for slab in slabs.skip_while(|slab| slab.range().end <= cleared) {
            payload[covered..slab.offset as usize].fill(0);
            covered = slab.range().end;
        }
        payload[covered..end.next_multiple_of(GRANULE)].fill(0);
        Ok(Complete {
            is_regular: are_raw && header.layers.end == geometry.layers,
            handle: self.handle,
            end,
        })
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
        let arena = self.arena().clone();
        let geometry = arena.geometry();
        let image = self.image_mut()?;
        let (page, payload) = image.split_at_mut(RecordHeader::BYTES);
        let header = RecordHeader::decode(page, geometry)?;
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
        let are_raw = slabs_fit(CodecId::Raw, &header.slabs, geometry);
        let end = payload_end(&header, are_raw, geometry);
        let covered = header.payload_bytes();
        payload[covered..end.next_multiple_of(GRANULE).max(covered)].fill(0);
        let complete = Complete {
            is_regular: are_raw && header.layers == (0..geometry.layers),
            handle: self.handle,
            end,
        };
        Ok(complete.publish())
    }

    /// Publishes an encoded chunk whose slab table is that of `header`.
    pub(super) fn seal_coded(mut self, header: &RecordHeader, payload: &[u8]) -> Result<Slot> {
        let (page, room) = split_image(self.image_mut()?)?;
        page.fill(0);
        header.write(page);
        room[..payload.len()].copy_from_slice(payload);
        room[payload.len()..].fill(0);
        let complete = Complete {
            handle: self.handle,
            end: payload.len(),
            is_regular: false,
        };
        Ok(complete.publish())
    }
}

/// The header page and the payload.
fn split_image(image: &mut [u8]) -> Result<(&mut [u8; RecordHeader::BYTES], &mut [u8])> {
    let parts = image.split_first_chunk_mut();
    parts.ok_or_else(|| Error::internal("a slot is shorter than a header page"))
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
