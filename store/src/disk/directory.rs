//! The directory: the last value of each payload file, which says what else is in it.
//!
//! From the directories alone the index can be made again. `docs/format.md` specifies the bytes.

use crate::{Checksummer, Error, FORMAT_VERSION, KvGeometry, RecordHeader, RecordId, Result};
use std::num::NonZeroU64;

const MAGIC: &[u8; 8] = b"stemkvDR";
const HEAD_BYTES: usize = 24;
const ENTRY_BYTES: usize = 24;
const CHECKSUM_AT: usize = 16;

/// One record of a payload file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DirectoryEntry {
    pub(super) id: RecordId,
    /// When it was last used, as far as was known when the file was written.
    pub(super) last_use_ms: u64,
    /// Where its image starts in the file, in pages of 4 KiB.
    pub(super) page: u32,
    pub(super) header: RecordHeader,
}

/// Bytes of a directory of records with `layers` layers each.
pub(super) fn directory_bytes(records: usize, layers: usize) -> usize {
    HEAD_BYTES + records * (ENTRY_BYTES + 256 + 16 * layers)
}

pub(super) fn encode(entries: &[DirectoryEntry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&[0; 8]);
    for entry in entries {
        let used = entry.header.used_bytes();
        bytes.extend_from_slice(&entry.id.0.get().to_le_bytes());
        bytes.extend_from_slice(&entry.last_use_ms.to_le_bytes());
        bytes.extend_from_slice(&entry.page.to_le_bytes());
        bytes.extend_from_slice(&(used as u32).to_le_bytes());
        bytes.extend_from_slice(&entry.header.encode()[..used]);
    }
    let checksum = Checksummer::of(&bytes);
    bytes[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&checksum.0.to_le_bytes());
    bytes
}

/// Reads a directory, as hostile input.
///
/// # Errors
/// As [`RecordHeader::decode`].
pub(super) fn decode(bytes: &[u8], geometry: &KvGeometry) -> Result<Vec<DirectoryEntry>> {
    let wrong = || Error::corrupt("a directory does not verify");
    let mut unsummed = bytes.to_vec();
    let sum = unsummed
        .get_mut(CHECKSUM_AT..HEAD_BYTES)
        .ok_or_else(wrong)?;
    let stored = u64::from_le_bytes(sum.try_into().map_err(|_| wrong())?);
    sum.fill(0);
    if !bytes.starts_with(MAGIC) || Checksummer::of(&unsummed).0 != stored {
        return Err(wrong());
    }
    let mut rest = &bytes[MAGIC.len()..];
    let version = u16::from_le_bytes(take(&mut rest).ok_or_else(wrong)?);
    if version != FORMAT_VERSION {
        return Err(Error::invalid("a payload file has another format version")
            .with("file_version", version)
            .with("our_version", FORMAT_VERSION));
    }
    let _reserved: [u8; 2] = take(&mut rest).ok_or_else(wrong)?;
    let count = u32::from_le_bytes(take(&mut rest).ok_or_else(wrong)?);
    let _checksum: [u8; 8] = take(&mut rest).ok_or_else(wrong)?;
    let mut entries = Vec::new();
    for _ in 0..count {
        let id = u64::from_le_bytes(take(&mut rest).ok_or_else(wrong)?);
        let last_use_ms = u64::from_le_bytes(take(&mut rest).ok_or_else(wrong)?);
        let page = u32::from_le_bytes(take(&mut rest).ok_or_else(wrong)?);
        let used = u32::from_le_bytes(take(&mut rest).ok_or_else(wrong)?) as usize;
        let mut header_page = [0; RecordHeader::BYTES];
        let (used, behind) = rest.split_at_checked(used).ok_or_else(wrong)?;
        rest = behind;
        header_page
            .get_mut(..used.len())
            .ok_or_else(wrong)?
            .copy_from_slice(used);
        entries.push(DirectoryEntry {
            id: NonZeroU64::new(id).map(RecordId).ok_or_else(wrong)?,
            last_use_ms,
            page,
            header: RecordHeader::decode(&header_page, geometry)?,
        });
    }
    match rest.is_empty() {
        true => Ok(entries),
        false => Err(wrong()),
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Checksum, CodecId, Dtype, Key, SlabEntry};

    fn geometry() -> KvGeometry {
        KvGeometry::gqa(3, 2, 32, Dtype::Bf16, 8).expect("valid")
    }

    fn entries() -> Vec<DirectoryEntry> {
        let geometry = geometry();
        (1..5)
            .map(|i| DirectoryEntry {
                id: RecordId(NonZeroU64::new(i * 2).expect("not zero")),
                last_use_ms: 1000 * i,
                page: i as u32,
                header: RecordHeader {
                    namespace: Key([1; 32]),
                    parent: Key([i as u8; 32]),
                    key: Key([i as u8 + 1; 32]),
                    depth: i as u32,
                    tokens: 8,
                    geometry: geometry.fingerprint(),
                    layers: 0..3,
                    codec: CodecId::Raw,
                    slabs: (0..3)
                        .map(|l| SlabEntry {
                            offset: l * geometry.slab_stride() as u32,
                            bytes: geometry.slab_bytes() as u32,
                            checksum: Checksum(u64::from(l) * i),
                        })
                        .collect(),
                },
            })
            .collect()
    }

    #[test]
    fn a_directory_reads_back_and_has_the_promised_size() {
        let bytes = encode(&entries());
        assert_eq!(bytes.len(), directory_bytes(4, 3));
        assert_eq!(decode(&bytes, &geometry()).expect("ours"), entries());
        assert_eq!(decode(&encode(&[]), &geometry()).expect("ours"), []);
    }

    /// Exhaustive over every bit and every cut.
    #[test]
    fn any_flipped_bit_and_any_cut_is_refused() {
        let bytes = encode(&entries());
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            decode(&bytes, &geometry()).expect_err("a flipped bit");
        }
        for cut in 0..bytes.len() {
            decode(&bytes[..cut], &geometry()).expect_err("a cut");
        }
    }
}
