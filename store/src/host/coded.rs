//! From raw slots to encoded ones and back.

use std::cell::RefCell;

use super::slot::{Filling, Slot};
use crate::{Checksummer, CodecId, Error, KvGeometry, LayerId, RecordHeader, Result, SlabEntry};

thread_local! {
    // Fresh memory of a chunk's size costs more in page faults than the encoding.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Calls `run` with `bytes` bytes that hold anything.
pub(crate) fn with_scratch<R>(bytes: usize, run: impl FnOnce(&mut [u8]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < bytes {
            scratch.resize(bytes, 0);
        }
        run(&mut scratch[..bytes])
    })
}

impl Slot {
    /// The same chunk encoded with `codec`, in a slot of its own that is as short as it can be: `room`
    /// is asked for one with so many bytes of payload.
    ///
    /// `None` where it is encoded already, would not take fewer 4 KiB, or there is no room.
    ///
    /// # Errors
    /// `Corrupt` where a slab or the header does not verify any more: memory was damaged, and what
    /// would be encoded is not what was saved.
    pub fn encoded(
        &self,
        codec: CodecId,
        room: impl FnOnce(usize) -> Option<Filling>,
    ) -> Result<Option<Slot>> {
        let header = self.header()?;
        if header.codec != CodecId::Raw || codec == CodecId::Raw {
            return Ok(None);
        }
        let raw_bytes = header.payload_bytes();
        with_scratch(raw_bytes, |payload| {
            let mut coded = RecordHeader {
                codec,
                slabs: Vec::with_capacity(header.slabs.len()),
                ..header.clone()
            };
            let mut end = 0_usize;
            for (layer, slab) in header.layers.clone().zip(&header.slabs) {
                let raw = self.slab_bytes(LayerId(layer)).unwrap_or_default();
                if Checksummer::of(raw) != slab.checksum {
                    return Err(
                        Error::corrupt("a slab in memory does not match its checksum")
                            .with("key", header.key)
                            .with("layer", layer),
                    );
                }
                let start = end.next_multiple_of(KvGeometry::SLAB_ALIGN);
                payload[end..start].fill(0);
                let codecs = self.arena().codecs();
                let (bytes, checksum) = match codecs.encode(codec, raw, &mut payload[start..]) {
                    Some(bytes) => (bytes, Checksummer::of(&payload[start..start + bytes])),
                    None => {
                        payload[start..start + raw.len()].copy_from_slice(raw);
                        (raw.len(), slab.checksum)
                    }
                };
                coded.slabs.push(SlabEntry {
                    offset: start as u32,
                    bytes: bytes as u32,
                    checksum,
                });
                end = start + bytes;
            }
            let fewer = end.div_ceil(RecordHeader::BYTES) < raw_bytes.div_ceil(RecordHeader::BYTES);
            let Some(filling) = fewer.then(|| room(end)).flatten() else {
                return Ok(None);
            };
            filling.seal_coded(&coded, &payload[..end]).map(Some)
        })
    }

    /// The same chunk with every slab raw, in `filling`.
    ///
    /// # Errors
    /// `Corrupt` where a slab does not match its checksum or does not decode; else as
    /// [`Filling::seal`].
    pub fn decoded(&self, mut filling: Filling) -> Result<Slot> {
        let header = self.header()?;
        let geometry = self.arena().geometry();
        let (slab_bytes, stride) = (geometry.slab_bytes(), geometry.slab_stride());
        for (layer, slab) in header.layers.clone().zip(&header.slabs) {
            let stored = self.slab_bytes(LayerId(layer)).unwrap_or_default();
            if Checksummer::of(stored) != slab.checksum {
                return Err(
                    Error::corrupt("a slab in memory does not match its checksum")
                        .with("key", header.key)
                        .with("layer", layer),
                );
            }
            let start = RecordHeader::BYTES + layer as usize * stride;
            let image = filling.image_mut()?;
            let raw = image.get_mut(start..start + slab_bytes).ok_or_else(|| {
                Error::internal("a slot is too short for the raw chunk").with("layer", layer)
            })?;
            self.arena().codecs().decode(header.codec, stored, raw)?;
            let checksum = Checksummer::of(raw);
            filling.set_slab(LayerId(layer), checksum);
        }
        filling.seal(RecordHeader {
            codec: CodecId::Raw,
            slabs: Vec::new(),
            ..header
        })
    }

    /// Is this the chunk that `header` describes, byte for byte, however either is stored? Slabs that are
    /// stored alike are compared by their checksums, others are encoded or decoded for it.
    ///
    /// # Errors
    /// `Corrupt` where a slab does not match its own checksum or does not decode.
    pub fn holds(&self, header: &RecordHeader) -> Result<bool> {
        let (own, geometry) = (self.header()?, self.arena().geometry());
        let identity = |header: &RecordHeader| {
            let tree = (header.namespace, header.parent, header.key, header.depth);
            (tree, header.tokens, header.layers.clone())
        };
        if identity(&own) != identity(header) || own.slabs.len() != header.slabs.len() {
            return Ok(false);
        }
        let layers = own.layers.clone().map(LayerId);
        for (layer, (slab, other)) in layers.zip(own.slabs.iter().zip(&header.slabs)) {
            let is_same = match (slab.is_raw(geometry), other.is_raw(geometry)) {
                (true, true) => slab.checksum == other.checksum,
                (false, false) => {
                    own.codec == header.codec
                        && (slab.bytes, slab.checksum) == (other.bytes, other.checksum)
                }
                (is_raw, _) => with_scratch(geometry.slab_bytes(), |scratch| {
                    let stored = self.slab_bytes(layer).unwrap_or_default();
                    if Checksummer::of(stored) != slab.checksum {
                        return Err(
                            Error::corrupt("a slab in memory does not match its checksum")
                                .with("layer", layer),
                        );
                    }
                    let codecs = self.arena().codecs();
                    let bytes = match is_raw {
                        true => codecs.encode(header.codec, stored, scratch),
                        false => {
                            codecs.decode(own.codec, stored, scratch)?;
                            Some(scratch.len())
                        }
                    };
                    let sum = bytes.map(|bytes| Checksummer::of(&scratch[..bytes]));
                    Ok(sum == Some(other.checksum))
                })?,
            };
            if !is_same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Decodes the slab of `layer`, which is not raw, into `out`, a raw slab's length.
    ///
    /// # Errors
    /// `Corrupt` where it does not decode.
    pub(crate) fn decode_slab(&self, stored: &[u8], out: &mut [u8]) -> Result<()> {
        self.arena().codecs().decode(self.codec(), stored, out)
    }
}

/// Shown: a chunk that was encoded and decoded again is the same to the byte, header and all, for
/// every dtype; what does not shrink stays; damage is noticed before it is carried on.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, HostArena, Key};

    fn geometry(dtype: Dtype) -> KvGeometry {
        KvGeometry::gqa(3, 2, 64, dtype, 32).expect("valid")
    }

    /// A slab of noise in the middle of two that shrink.
    fn sealed(arena: &HostArena) -> Slot {
        let geometry = arena.geometry().clone();
        let mut filling = arena
            .allocate(geometry.payload_bytes(), 1)
            .expect("room")
            .remove(0);
        let mut state = 77_u64;
        for layer in geometry.layer_ids() {
            let start = RecordHeader::BYTES + layer.0 as usize * geometry.slab_stride();
            let image = filling.image_mut().expect("sole");
            let slab = &mut image[start..start + geometry.slab_bytes()];
            for (at, byte) in slab.iter_mut().enumerate() {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *byte = match (layer.0, at % geometry.dtype.bytes()) {
                    (1, _) => state as u8,
                    (_, 0) if geometry.dtype.bytes() > 1 => state as u8,
                    _ => (state & 0x83) as u8 | 0x3c,
                };
            }
            let checksum = Checksummer::of(slab);
            filling.set_slab(layer, checksum);
        }
        filling
            .seal(RecordHeader {
                namespace: Key([1; 32]),
                parent: Key([2; 32]),
                key: Key([3; 32]),
                depth: 4,
                tokens: 32,
                geometry: geometry.fingerprint(),
                layers: 0..3,
                codec: CodecId::Raw,
                slabs: Vec::new(),
            })
            .expect("complete")
    }

    #[test]
    fn a_chunk_that_was_encoded_decodes_to_the_same_image() {
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::Fp8E4m3] {
            let arena = HostArena::open(&geometry(dtype), 1 << 20, |_, _| {}).expect("room");
            let slot = sealed(&arena);
            let room = |bytes| Some(arena.allocate(bytes, 1)?.remove(0));
            let codec = CodecId::lossless(dtype);
            let coded = slot.encoded(codec, room).expect("sound").expect("shrinks");
            assert!(coded.image().len() < slot.image().len());
            let header = coded.header().expect("sealed");
            assert_eq!(header.codec, codec);
            let raw =
                |layer: usize| header.slabs[layer].bytes as usize == geometry(dtype).slab_bytes();
            assert_eq!([raw(0), raw(1), raw(2)], [false, true, false]);
            assert!(coded.encoded(codec, |_| None).expect("sound").is_none());
            // As from a disk.
            let mut read = arena
                .allocate(geometry(dtype).payload_bytes(), 1)
                .expect("room")
                .remove(0);
            read.image_mut().expect("sole")[..coded.image().len()].copy_from_slice(coded.image());
            let read = read.seal_image(|_| Ok(())).expect("verifies");
            let room = arena
                .allocate(geometry(dtype).payload_bytes(), 1)
                .expect("room")
                .remove(0);
            let back = read.decoded(room).expect("sound");
            assert!(back.image() == slot.image(), "{dtype:?}");
        }
    }

    #[test]
    fn noise_and_a_full_arena_leave_the_chunk_as_it_is() {
        let geometry = geometry(Dtype::Bf16);
        let arena = HostArena::open(&geometry, 60 << 10, |_, _| {}).expect("room");
        let slot = sealed(&arena);
        let room = |bytes| Some(arena.allocate(bytes, 1)?.remove(0));
        let free = arena.usage().largest_free_bytes - 4096;
        let rest = arena.allocate(free, 1).expect("room");
        assert!(slot.encoded(CodecId::Exp, room).expect("sound").is_none());
        drop(rest);
        assert!(slot.encoded(CodecId::Raw, room).expect("sound").is_none());
    }

    /// One bit in each stretch of every encoded slab, so in each area of it: header, mantissas or lengths,
    /// codes, offsets, escapes, pieces.
    #[test]
    fn a_flipped_bit_in_any_area_of_an_encoded_slab_is_corrupt() {
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::Fp8E5m2] {
            let geometry = geometry(dtype);
            let arena = HostArena::open(&geometry, 1 << 20, |_, _| {}).expect("room");
            let slot = sealed(&arena);
            let room = |bytes| Some(arena.allocate(bytes, 1)?.remove(0));
            let coded = slot.encoded(CodecId::lossless(dtype), room);
            let coded = coded.expect("sound").expect("shrinks");
            let slabs = coded.header().expect("sealed").slabs;
            let mut tried = 0;
            for slab in &slabs {
                let start = RecordHeader::BYTES + slab.offset as usize;
                for at in (start..start + slab.bytes as usize).step_by(61) {
                    let mut read = room(geometry.payload_bytes()).expect("room");
                    let image = read.image_mut().expect("sole");
                    image[..coded.image().len()].copy_from_slice(coded.image());
                    image[at] ^= 1 << (at % 8);
                    let Err(error) = read.seal_image(|_| Ok(())) else {
                        panic!("{dtype:?}: byte {at} was not looked at");
                    };
                    assert_eq!(error.kind(), crate::ErrorKind::Corrupt, "{dtype:?} {at}");
                    tried += 1;
                }
            }
            assert!(tried > 100);
        }
    }
}
