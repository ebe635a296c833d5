//! The header of a record: who a chunk is, how it is laid out, what its bytes must sum to.
//!
//! A record is the *image* of a chunk: one 4 KiB header page, then the payload. It has the same
//! bytes in a host slot and on disk, so that a write is one buffer and a read needs no assembly.
//! The bytes are specified in `docs/format.md`.

use std::ops::Range;

use crate::{Checksum, Checksummer, Dtype, Error, Key, KvGeometry, LayerId, Result};

/// The version of everything on disk. A store of another version is refused by name, never wiped.
pub const FORMAT_VERSION: u16 = 0;

/// How a slab's bytes are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
#[non_exhaustive]
pub enum CodecId {
    /// As the engine had them.
    Raw = 0,
    /// bf16 with short codes for exponents: [`codec::exp`](crate::codec::exp).
    Exp = 1,
    /// Byte planes, compressed where that helps: [`codec::planes`](crate::codec::planes).
    Planes = 2,
}

impl CodecId {
    /// The codec of that number, `None` where this build does not know it.
    pub const fn from_number(number: u16) -> Option<Self> {
        match number {
            0 => Some(CodecId::Raw),
            1 => Some(CodecId::Exp),
            2 => Some(CodecId::Planes),
            _ => None,
        }
    }
}

/// One layer's part of a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlabEntry {
    /// From the start of the payload; a multiple of [`KvGeometry::SLAB_ALIGN`].
    pub offset: u32,
    /// Stored (encoded) bytes.
    pub bytes: u32,
    /// Of the stored bytes.
    pub checksum: Checksum,
}

impl SlabEntry {
    /// The entry of a raw slab in its place.
    pub fn raw(geometry: &KvGeometry, layer: LayerId, checksum: Checksum) -> SlabEntry {
        SlabEntry {
            offset: (layer.0 as usize * geometry.slab_stride()) as u32,
            bytes: geometry.slab_bytes() as u32,
            checksum,
        }
    }

    /// Is it stored raw?
    pub fn is_raw(&self, geometry: &KvGeometry) -> bool {
        self.bytes as usize == geometry.slab_bytes()
    }

    /// Where the slab's bytes are within the payload.
    pub fn range(&self) -> Range<usize> {
        self.offset as usize..self.offset as usize + self.bytes as usize
    }
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

const MAGIC: &[u8; 8] = b"stemkvRC";

/// Byte offsets within the header page. Magic, version and checksum stay where they are in every
/// version, so that an unknown version can be told from damage.
mod at {
    pub(super) const VERSION: usize = 8;
    pub(super) const CODEC: usize = 10;
    pub(super) const RESERVED_CODEC: usize = 12;
    pub(super) const CHECKSUM: usize = 16;
    pub(super) const NAMESPACE: usize = 24;
    pub(super) const PARENT: usize = 56;
    pub(super) const KEY: usize = 88;
    pub(super) const DEPTH: usize = 120;
    pub(super) const TOKENS: usize = 124;
    pub(super) const GEOMETRY: usize = 128;
    pub(super) const LAYERS_START: usize = 136;
    pub(super) const LAYERS_END: usize = 140;
    pub(super) const RESERVED: usize = 144;
    pub(super) const SLABS: usize = 256;
    pub(super) const SLAB_BYTES: usize = 16;
}

const _: () = assert!(
    at::SLABS + KvGeometry::LAYERS_MAX as usize * at::SLAB_BYTES == RecordHeader::BYTES,
    "the longest slab table fills the page"
);
const _: () = assert!(at::LAYERS_END == at::LAYERS_START + 4);

impl RecordHeader {
    /// Bytes of the header page.
    pub const BYTES: usize = 4096;

    /// The entry of `layer`, `None` where the record does not hold it.
    pub fn slab(&self, layer: LayerId) -> Option<&SlabEntry> {
        let index = layer.0.checked_sub(self.layers.start)?;
        self.slabs.get(index as usize)
    }

    /// The entry of `layer` in a page that was made by [`RecordHeader::encode`] or passed
    /// [`RecordHeader::decode`], without reading the rest.
    pub(crate) fn slab_in_page(page: &[u8], layer: LayerId) -> Option<SlabEntry> {
        let layers = u32_at(page, at::LAYERS_START)..u32_at(page, at::LAYERS_END);
        let index = layer.0.checked_sub(layers.start)? as usize;
        if !layers.contains(&layer.0) || index >= KvGeometry::LAYERS_MAX as usize {
            return None;
        }
        Some(slab_at(page, at::SLABS + index * at::SLAB_BYTES))
    }

    /// How the slabs are encoded, in such a page.
    pub(crate) fn codec_in_page(page: &[u8]) -> CodecId {
        CodecId::from_number(u16_at(page, at::CODEC)).unwrap_or(CodecId::Raw)
    }

    /// The chunk's own key in such a page.
    pub(crate) fn key_in_page(page: &[u8]) -> Key {
        Key(array_at(page, at::KEY))
    }

    /// Where a GPU finds the layers of a header page (two numbers of 32 bits), the first slab's entry
    /// (offset and length of 32 bits each, a checksum of 64), and from there the next one's.
    #[cfg(feature = "cuda")]
    pub(crate) const LAYERS_AT: usize = at::LAYERS_START;
    #[cfg(feature = "cuda")]
    pub(crate) const SLABS_AT: usize = at::SLABS;
    #[cfg(feature = "cuda")]
    pub(crate) const SLAB_ENTRY_BYTES: usize = at::SLAB_BYTES;

    /// Bytes of the payload: the end of its last slab.
    pub fn payload_bytes(&self) -> usize {
        self.slabs.last().map_or(0, |slab| slab.range().end)
    }

    /// Where the chunk's own key is within the page.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) const KEY_AT: Range<usize> = at::KEY..at::KEY + 32;

    /// Bytes of the page that are in use: everything behind them is zero.
    pub(crate) fn used_bytes(&self) -> usize {
        at::SLABS + self.slabs.len() * at::SLAB_BYTES
    }

    /// Writes the header page, its own checksum included.
    ///
    /// # Panics
    /// Where `slabs` has another length than `layers`, or more than [`KvGeometry::LAYERS_MAX`].
    pub fn encode(&self) -> Box<[u8; Self::BYTES]> {
        let mut page = Box::new([0; Self::BYTES]);
        self.write(&mut page);
        page
    }

    /// As [`RecordHeader::encode`], into a page of zeros.
    ///
    /// # Panics
    /// As [`RecordHeader::encode`].
    pub(crate) fn write(&self, page: &mut [u8; Self::BYTES]) {
        assert_eq!(
            self.slabs.len(),
            self.layers.len(),
            "one slab for each layer"
        );
        assert!(self.slabs.len() <= KvGeometry::LAYERS_MAX as usize);
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(at::VERSION, &FORMAT_VERSION.to_le_bytes());
        put(at::CODEC, &(self.codec as u16).to_le_bytes());
        put(at::NAMESPACE, &self.namespace.0);
        put(at::PARENT, &self.parent.0);
        put(at::KEY, &self.key.0);
        put(at::DEPTH, &self.depth.to_le_bytes());
        put(at::TOKENS, &self.tokens.to_le_bytes());
        put(at::GEOMETRY, &self.geometry.to_le_bytes());
        put(at::LAYERS_START, &self.layers.start.to_le_bytes());
        put(at::LAYERS_END, &self.layers.end.to_le_bytes());
        for (i, slab) in self.slabs.iter().enumerate() {
            let entry = at::SLABS + i * at::SLAB_BYTES;
            put(entry, &slab.offset.to_le_bytes());
            put(entry + 4, &slab.bytes.to_le_bytes());
            put(entry + 8, &slab.checksum.0.to_le_bytes());
        }
        let checksum = Checksummer::of_zero_padded(&page[..self.used_bytes()]);
        page[at::CHECKSUM..at::CHECKSUM + 8].copy_from_slice(&checksum.0.to_le_bytes());
    }

    /// Reads a header page, as hostile input: every length, offset and overlap is checked against
    /// `geometry` and the page itself before it is used.
    ///
    /// # Errors
    /// `Corrupt` where the bytes do not verify; `Invalid`, naming both versions or both geometries,
    /// where they verify but are not ours.
    pub fn decode(page: &[u8], geometry: &KvGeometry) -> Result<Self> {
        let page: &[u8; Self::BYTES] = page.first_chunk().ok_or_else(|| {
            Error::corrupt("a header page is cut short").with("bytes", page.len())
        })?;
        if !page.starts_with(MAGIC) {
            return Err(Error::corrupt(
                "a header page does not start with its magic",
            ));
        }
        let mut unsummed = *page;
        unsummed[at::CHECKSUM..at::CHECKSUM + 8].fill(0);
        if Checksummer::of(&unsummed).0 != u64_at(page, at::CHECKSUM) {
            return Err(Error::corrupt("a header page does not match its checksum"));
        }
        let version = u16_at(page, at::VERSION);
        if version != FORMAT_VERSION {
            return Err(Error::invalid(
                "the record has another format version: use the release that wrote it",
            )
            .with("record_version", version)
            .with("our_version", FORMAT_VERSION));
        }
        let fingerprint = u64_at(page, at::GEOMETRY);
        if fingerprint != geometry.fingerprint() {
            return Err(Error::invalid("the record has another geometry")
                .with("difference", told_difference(page, geometry))
                .with("record_geometry", format_args!("{fingerprint:016x}"))
                .with(
                    "our_geometry",
                    format_args!("{:016x}", geometry.fingerprint()),
                ));
        }
        let codec_number = u16_at(page, at::CODEC);
        let codec = CodecId::from_number(codec_number).ok_or_else(|| {
            Error::invalid("the record has an unknown codec").with("codec", codec_number)
        })?;
        if codec == CodecId::Exp && geometry.dtype != Dtype::Bf16 {
            return Err(Error::corrupt("a header page has wrong codec").with("codec", codec_number));
        }
        let layers = u32_at(page, at::LAYERS_START)..u32_at(page, at::LAYERS_END);
        let tokens = u32_at(page, at::TOKENS);
        let count = layers.len();
        let wrong = |what: &str| Err(Error::corrupt(format!("a header page has wrong {what}")));
        if layers.is_empty()
            || layers.end > geometry.layers
            || count > KvGeometry::LAYERS_MAX as usize
        {
            return wrong("layers");
        }
        if !(1..=geometry.block_tokens).contains(&tokens) {
            return wrong("tokens");
        }
        let table_end = at::SLABS + count * at::SLAB_BYTES;
        let unused = [
            &page[at::RESERVED_CODEC..at::CHECKSUM],
            &page[at::RESERVED..at::SLABS],
            &page[table_end..],
        ];
        if unused.into_iter().flatten().any(|&byte| byte != 0) {
            return wrong("bytes where there must be zeros");
        }
        let slabs: Vec<SlabEntry> = page[at::SLABS..table_end]
            .chunks_exact(at::SLAB_BYTES)
            .map(|entry| slab_at(entry, 0))
            .collect();
        if !slabs_fit(codec, &slabs, geometry) {
            return wrong("slabs");
        }
        Ok(RecordHeader {
            namespace: key_at(page, at::NAMESPACE),
            parent: key_at(page, at::PARENT),
            key: key_at(page, at::KEY),
            depth: u32_at(page, at::DEPTH),
            tokens,
            geometry: fingerprint,
            layers,
            codec,
            slabs,
        })
    }
}

/// What a sound page tells of the difference between its record's geometry and another one: it has only a
/// fingerprint of the whole.
fn told_difference(page: &[u8], geometry: &KvGeometry) -> String {
    let layers = u32_at(page, at::LAYERS_START)..u32_at(page, at::LAYERS_END);
    let tokens = u32_at(page, at::TOKENS);
    let slab = slab_at(page, at::SLABS);
    let is_raw = u16_at(page, at::CODEC) == CodecId::Raw as u16;
    let mut told = Vec::new();
    if layers != (0..geometry.layers) {
        told.push(format!(
            "layers: 0..{} here, {layers:?} there",
            geometry.layers
        ));
    }
    if tokens != geometry.block_tokens {
        told.push(format!(
            "block_tokens: {} here, {tokens} there",
            geometry.block_tokens
        ));
    }
    if is_raw && slab.bytes as usize != geometry.slab_bytes() {
        let here = geometry.slab_bytes();
        told.push(format!(
            "bytes of a layer: {here} here, {} there",
            slab.bytes
        ));
    }
    match told.is_empty() {
        true => "heads, dtype or another field that a record does not spell out".into(),
        false => told.join("; "),
    }
}

/// Do the slabs, of layers from the record's first on, lie where their codec has them? Raw ones one
/// stride apart; encoded ones in order, and none beginning behind where it would raw.
pub(crate) fn slabs_fit(codec: CodecId, slabs: &[SlabEntry], geometry: &KvGeometry) -> bool {
    let mut end = 0;
    slabs.iter().enumerate().all(|(index, slab)| {
        let (start, raw_start) = (slab.offset as usize, index * geometry.slab_stride());
        let fits = match codec {
            CodecId::Raw => start == raw_start && slab.bytes as usize == geometry.slab_bytes(),
            CodecId::Exp | CodecId::Planes => {
                start.is_multiple_of(KvGeometry::SLAB_ALIGN)
                    && (end..=raw_start).contains(&start)
                    && (1..=geometry.slab_bytes()).contains(&(slab.bytes as usize))
            }
        };
        end = slab.range().end;
        fits
    })
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..]
        .first_chunk()
        .expect("offsets are constants within the length checked before")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn slab_at(bytes: &[u8], at: usize) -> SlabEntry {
    SlabEntry {
        offset: u32_at(bytes, at),
        bytes: u32_at(bytes, at + 4),
        checksum: Checksum(u64_at(bytes, at + 8)),
    }
}

fn key_at(bytes: &[u8], at: usize) -> Key {
    Key(array_at(bytes, at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ErrorKind;

    fn geometry() -> KvGeometry {
        KvGeometry::gqa(4, 2, 20, Dtype::Bf16, 8).expect("valid")
    }

    fn header(seed: u8, layers: Range<u32>) -> RecordHeader {
        let geometry = geometry();
        RecordHeader {
            namespace: Key([seed; 32]),
            parent: Key([seed ^ 1; 32]),
            key: Key([seed ^ 2; 32]),
            depth: u32::from(seed) * 7,
            tokens: 1 + u32::from(seed) % 8,
            geometry: geometry.fingerprint(),
            slabs: (0..layers.len())
                .map(|i| SlabEntry {
                    offset: (i * geometry.slab_stride()) as u32,
                    bytes: geometry.slab_bytes() as u32,
                    checksum: Checksum(u64::from(seed) << 32 | i as u64),
                })
                .collect(),
            layers,
            codec: CodecId::Raw,
        }
    }

    /// A page whose checksum is right, whatever its bytes say: what a hostile writer would make.
    fn resummed(mut page: Box<[u8; RecordHeader::BYTES]>) -> Box<[u8; RecordHeader::BYTES]> {
        page[at::CHECKSUM..at::CHECKSUM + 8].fill(0);
        let sum = Checksummer::of(&page[..]);
        page[at::CHECKSUM..at::CHECKSUM + 8].copy_from_slice(&sum.0.to_le_bytes());
        page
    }

    proptest! {
        #[test]
        fn decode_gives_back_what_encode_was_given(seed: u8, start in 0_u32..4, count in 1_u32..5) {
            let header = header(seed, start..(start + count).min(4));
            prop_assert_eq!(RecordHeader::decode(&header.encode()[..], &geometry()).expect("ours"), header);
        }

        /// Hostile input: any bytes behind a right magic, version, geometry and checksum.
        #[test]
        fn decode_never_panics_and_what_it_accepts_encodes_to_the_same_page(
            seed: u8,
            edits in prop::collection::vec((8_usize..RecordHeader::BYTES, any::<u8>()), 0..6),
        ) {
            let mut page = header(seed, 0..4).encode();
            for (at, byte) in edits {
                page[at] = byte;
            }
            let page = resummed(page);
            if let Ok(accepted) = RecordHeader::decode(&page[..], &geometry()) {
                prop_assert_eq!(accepted.encode(), page);
            }
        }
    }

    /// Every single bit of the page, one after the other: exhaustive, so no seed.
    #[test]
    fn any_flipped_bit_of_the_page_is_corrupt() {
        let page = header(9, 1..4).encode();
        for bit in 0..RecordHeader::BYTES * 8 {
            let mut page = page.clone();
            page[bit / 8] ^= 1 << (bit % 8);
            let error = RecordHeader::decode(&page[..], &geometry()).expect_err("a flipped bit");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "bit {bit}: {error}");
        }
    }

    #[test]
    fn a_page_cut_short_is_corrupt() {
        let page = header(9, 0..4).encode();
        for bytes in [0, 7, 8, 255, RecordHeader::BYTES - 1] {
            let error = RecordHeader::decode(&page[..bytes], &geometry()).expect_err("short");
            assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn another_version_is_refused_naming_both() {
        let mut page = header(9, 0..4).encode();
        page[at::VERSION] = 7;
        let error = RecordHeader::decode(&resummed(page)[..], &geometry()).expect_err("version 7");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(
            error
                .to_string()
                .ends_with("record_version=7, our_version=0"),
            "{error}"
        );
    }

    #[test]
    fn another_geometry_is_refused_naming_both() {
        let other = KvGeometry::gqa(4, 2, 20, Dtype::F16, 8).expect("valid");
        let error =
            RecordHeader::decode(&header(9, 0..4).encode()[..], &other).expect_err("another");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        for fingerprint in [geometry().fingerprint(), other.fingerprint()] {
            assert!(
                error.to_string().contains(&format!("{fingerprint:016x}")),
                "{error}"
            );
        }
    }
}
