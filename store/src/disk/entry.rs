//! Keys and values of the index column family. `docs/format.md` specifies the bytes.
//!
//! Records are ordered by (depth, id): a scan meets parents before children, also where a parent
//! was written again after its child.

use crate::{Key, RecordId};
use std::num::NonZeroU64;

/// First byte of a key: what the entry is.
pub(super) const FILE: u8 = b'F';
pub(super) const META: u8 = b'M';
/// The next place that no file has used, in a key of its own.
pub(super) const NEXT: u8 = b'N';
pub(super) const RECORD: u8 = b'R';
pub(super) const USE: u8 = b'U';

/// The key of a record's entry ([`RECORD`]) or last use ([`USE`]).
pub(super) fn record_key(tag: u8, depth: u32, id: RecordId) -> [u8; 13] {
    let mut key = [tag; 13];
    key[1..5].copy_from_slice(&depth.to_be_bytes());
    key[5..].copy_from_slice(&id.0.get().to_be_bytes());
    key
}

/// Reads a key made by [`record_key`].
pub(super) fn record_of_key(key: &[u8]) -> Option<(u32, RecordId)> {
    let (_tag, rest) = key.split_first()?;
    let (depth, id) = rest.split_first_chunk()?;
    let id = NonZeroU64::new(u64::from_be_bytes(id.try_into().ok()?))?;
    Some((u32::from_be_bytes(*depth), RecordId(id)))
}

/// The key of a payload file's entry.
pub(super) fn file_key(first: u64) -> [u8; 9] {
    let mut key = [FILE; 9];
    key[1..].copy_from_slice(&first.to_be_bytes());
    key
}

/// Reads a key made by [`file_key`].
pub(super) fn file_of_key(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(1..)?.try_into().ok()?))
}

/// The key of a meta value.
pub(super) fn meta_key(key: &Key) -> [u8; 33] {
    let mut bytes = [META; 33];
    bytes[1..].copy_from_slice(&key.0);
    bytes
}

/// Reads a key made by [`meta_key`].
pub(super) fn meta_of_key(key: &[u8]) -> Option<Key> {
    Some(Key(key.get(1..)?.try_into().ok()?))
}

/// A record's entry: who it is and where its image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RecordEntry {
    pub(super) namespace: Key,
    pub(super) parent: Key,
    pub(super) key: Key,
    /// The first place of its payload file.
    pub(super) file: u64,
    /// Its number within the file.
    pub(super) slot: u32,
    /// Where its image starts in the file, in pages of 4 KiB.
    pub(super) page: u32,
    /// Bytes of the image.
    pub(super) bytes: u32,
    /// When it was written or, for a record that cleaning moved, last used.
    pub(super) last_use_ms: u64,
}

const RECORD_ENTRY_BYTES: usize = 3 * 32 + 8 + 3 * 4 + 8;

impl RecordEntry {
    pub(super) fn encode(&self) -> [u8; RECORD_ENTRY_BYTES] {
        let mut bytes = [0; RECORD_ENTRY_BYTES];
        bytes[..32].copy_from_slice(&self.namespace.0);
        bytes[32..64].copy_from_slice(&self.parent.0);
        bytes[64..96].copy_from_slice(&self.key.0);
        bytes[96..104].copy_from_slice(&self.file.to_le_bytes());
        bytes[104..108].copy_from_slice(&self.slot.to_le_bytes());
        bytes[108..112].copy_from_slice(&self.page.to_le_bytes());
        bytes[112..116].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[116..].copy_from_slice(&self.last_use_ms.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; RECORD_ENTRY_BYTES] = bytes.try_into().ok()?;
        let key = |at: usize| Some(Key(*bytes[at..].first_chunk()?));
        let word = |at: usize| Some(u32::from_le_bytes(*bytes[at..].first_chunk()?));
        let long = |at: usize| Some(u64::from_le_bytes(*bytes[at..].first_chunk()?));
        Some(RecordEntry {
            namespace: key(0)?,
            parent: key(32)?,
            key: key(64)?,
            file: long(96)?,
            slot: word(104)?,
            page: word(108)?,
            bytes: word(112)?,
            last_use_ms: long(116)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_and_keys_read_back_and_record_keys_sort_by_depth_then_id() {
        let id = |n| RecordId(NonZeroU64::new(n).expect("not zero"));
        let entry = RecordEntry {
            namespace: Key([1; 32]),
            parent: Key([2; 32]),
            key: Key([3; 32]),
            file: 0x0102_0304_0506_0708,
            slot: 4,
            page: 5,
            bytes: 6,
            last_use_ms: 7,
        };
        assert_eq!(RecordEntry::decode(&entry.encode()), Some(entry.clone()));
        assert_eq!(RecordEntry::decode(&entry.encode()[1..]), None);
        assert_eq!(record_of_key(&record_key(USE, 3, id(9))), Some((3, id(9))));
        assert_eq!(record_of_key(&record_key(USE, 3, id(9))[1..]), None);
        assert_eq!(file_of_key(&file_key(77)), Some(77));
        assert_eq!(meta_of_key(&meta_key(&Key([8; 32]))), Some(Key([8; 32])));
        assert!(record_key(RECORD, 1, id(u64::MAX)) < record_key(RECORD, 256, id(1)));
        assert!(record_key(RECORD, 1, id(255)) < record_key(RECORD, 1, id(256)));
    }
}
