//! The header of a record: who a chunk is, how it is laid out, what its bytes must sum to.
//!
//! A record is the *image* of a chunk: one 4 KiB header page, then the payload. It has the same
//! bytes in a host slot and on disk, so that a write is one buffer and a read needs no assembly.
//! The bytes are specified in `docs/format.md`.

use std::ops::Range;

use crate::{Checksum, Key, KvGeometry, LayerId, Result};

/// The version of everything on disk. A store of another version is refused by name, never wiped.
pub const FORMAT_VERSION: u16 = 0;

/// How a slab's bytes are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
#[non_exhaustive]
pub enum CodecId {
    /// As the engine had them.
    Raw = 0,
}

/// One layer's part of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlabEntry {
    /// From the start of the payload; a multiple of [`KvGeometry::SLAB_ALIGN`].
    pub offset: u32,
    /// Stored (encoded) bytes.
    pub bytes: u32,
    /// Of the stored bytes.
    pub checksum: Checksum,
}

/// Everything a record says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// The namespace root under which the chunk was saved.
    pub namespace: Key,
    /// The parent block's key; the namespace root for a first block.
    pub parent: Key,
    /// The chunk's own key.
    pub key: Key,
    /// Position of the block in its prefix: 0 for a first block.
    pub depth: u32,
    /// Tokens of the block.
    pub tokens: u32,
    /// [`KvGeometry::fingerprint`] of the store.
    pub geometry: u64,
    /// The layers that the record holds.
    pub layers: Range<u32>,
    /// How the slabs are encoded.
    pub codec: CodecId,
    /// One entry for each layer of `layers`.
    pub slabs: Vec<SlabEntry>,
}

impl RecordHeader {
    /// Bytes of the header page.
    pub const BYTES: usize = 4096;

    /// The entry of `layer`, `None` where the record does not hold it.
    pub fn slab(&self, layer: LayerId) -> Option<&SlabEntry> {
        let index = layer.0.checked_sub(self.layers.start)?;
        self.slabs.get(index as usize)
    }

    /// Bytes of the payload: the end of its last slab.
    pub fn payload_bytes(&self) -> usize {
        self.slabs
            .last()
            .map_or(0, |slab| slab.offset as usize + slab.bytes as usize)
    }

    /// Writes the header page, its own checksum included.
    pub fn encode(&self) -> Box<[u8; Self::BYTES]> {
        unimplemented!()
    }

    /// Reads a header page, as hostile input: every length, offset and overlap is checked against
    /// `geometry` and the page itself before it is used.
    ///
    /// # Errors
    /// `Corrupt` where the bytes do not verify; `Invalid`, naming both versions or both geometries,
    /// where they verify but are not ours.
    pub fn decode(page: &[u8], geometry: &KvGeometry) -> Result<Self> {
        let _ = (page, geometry);
        unimplemented!()
    }
}
