//! Keys and values of the index column family. `docs/format.md` specifies the bytes.
//!
//! The index has two entries a payload file: what is in it, written once, and what became of that,
//! written again when a record is removed, moved or used. So it is small, and read in one go.

use std::num::NonZeroU64;

use crate::{Checksummer, Key, RecordId, RecordInfo};

/// First byte of a key: what the entry is.
pub(super) const FILE: u8 = b'F';
pub(super) const META: u8 = b'M';
/// The next place that no file has used, in a key of its own.
pub(super) const NEXT: u8 = b'N';
/// Behind a file's key: what became of its records.
const LIVE: u8 = b'L';

const CHECKSUM_BYTES: usize = 8;
/// Images start and end on it.
const PAGE_BYTES: u32 = 4096;

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

/// The key of what became of a payload file's records: right behind [`file_key`].
pub(super) fn live_key(first: u64) -> [u8; 10] {
    let mut key = [LIVE; 10];
    key[..9].copy_from_slice(&file_key(first));
    key
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

/// One record of a payload file: who it is, and where its image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileRecord {
    pub(super) info: RecordInfo,
    /// Where its image starts in the file, in pages of 4 KiB.
    pub(super) page: u32,
}

/// The number that a record has which is written at `slot` of the file that starts at `first`; one that
/// was moved there keeps its own.
pub(super) fn own_id(first: u64, slot: usize) -> u64 {
    first + 2 * slot as u64 + 1
}

/// The value of [`file_key`].
pub(super) fn encode_file(first: u64, records: &[FileRecord]) -> Vec<u8> {
    let mut bytes = vec![0; CHECKSUM_BYTES];
    put_varint(&mut bytes, records.len() as u64);
    let mut namespaces: Vec<Key> = Vec::new();
    let (mut end, mut last_use_ms) = (0, 0);
    for (slot, FileRecord { info, page }) in records.iter().enumerate() {
        let is_own = info.id.0.get() == own_id(first, slot);
        put_varint(&mut bytes, if is_own { 0 } else { info.id.0.get() });
        let known = namespaces.iter().position(|key| *key == info.namespace);
        put_varint(&mut bytes, known.unwrap_or(namespaces.len()) as u64);
        if known.is_none() {
            bytes.extend_from_slice(&info.namespace.0);
            namespaces.push(info.namespace);
        }
        let above = records[..slot]
            .iter()
            .rposition(|above| above.info.key == info.parent);
        let parent = match above {
            _ if info.parent == info.namespace => 0,
            Some(above) => slot - above,
            None => slot + 1,
        };
        put_varint(&mut bytes, parent as u64);
        if parent > slot {
            bytes.extend_from_slice(&info.parent.0);
        }
        bytes.extend_from_slice(&info.key.0);
        put_varint(&mut bytes, info.depth.into());
        put_signed(&mut bytes, u64::from(*page).wrapping_sub(end));
        let pages = info.bytes / PAGE_BYTES;
        debug_assert_eq!(pages * PAGE_BYTES, info.bytes, "images are whole pages");
        put_varint(&mut bytes, pages.into());
        end = u64::from(*page) + u64::from(pages);
        put_signed(&mut bytes, info.last_use_ms.wrapping_sub(last_use_ms));
        last_use_ms = info.last_use_ms;
    }
    seal(bytes)
}

/// Reads the value of a [`file_key`], as hostile input.
pub(super) fn decode_file(first: u64, bytes: &[u8]) -> Option<Vec<FileRecord>> {
    let mut rest = unseal(bytes)?;
    let count = usize::try_from(take_varint(&mut rest)?).ok()?;
    // Each has a key at least.
    if count > rest.len() / 32 {
        return None;
    }
    let mut records: Vec<FileRecord> = Vec::with_capacity(count);
    let mut namespaces: Vec<Key> = Vec::new();
    let (mut end, mut last_use_ms) = (0_u64, 0_u64);
    for slot in 0..count {
        let id = match take_varint(&mut rest)? {
            0 => own_id(first, slot),
            id => id,
        };
        let known = usize::try_from(take_varint(&mut rest)?).ok()?;
        if known == namespaces.len() {
            namespaces.push(take_key(&mut rest)?);
        }
        let namespace = *namespaces.get(known)?;
        let parent = match usize::try_from(take_varint(&mut rest)?).ok()? {
            0 => namespace,
            above if above <= slot => records[slot - above].info.key,
            above if above == slot + 1 => take_key(&mut rest)?,
            _ => return None,
        };
        let key = take_key(&mut rest)?;
        let depth = take_varint(&mut rest)?.try_into().ok()?;
        let page = u32::try_from(end.wrapping_add(take_signed(&mut rest)?)).ok()?;
        let pages = u32::try_from(take_varint(&mut rest)?).ok()?;
        end = u64::from(page) + u64::from(pages);
        last_use_ms = last_use_ms.wrapping_add(take_signed(&mut rest)?);
        records.push(FileRecord {
            info: RecordInfo {
                id: RecordId(NonZeroU64::new(id)?),
                namespace,
                parent,
                key,
                depth,
                bytes: pages.checked_mul(PAGE_BYTES)?,
                last_use_ms,
            },
            page,
        });
    }
    rest.is_empty().then_some(records)
}

/// The value of [`live_key`]: for each record of the file when it was last used, `None` where it is not
/// live (there) any more.
pub(super) fn encode_live(uses: &[Option<u64>]) -> Vec<u8> {
    let mut bytes = vec![0; CHECKSUM_BYTES];
    put_varint(&mut bytes, uses.len() as u64);
    for eight in uses.chunks(8) {
        let bits = eight.iter().enumerate();
        bytes.push(bits.fold(0, |bits, (i, used)| bits | u8::from(used.is_some()) << i));
    }
    let mut last_use_ms = 0;
    for used in uses.iter().flatten() {
        put_signed(&mut bytes, used.wrapping_sub(last_use_ms));
        last_use_ms = *used;
    }
    seal(bytes)
}

/// Reads the value of a [`live_key`], as hostile input.
pub(super) fn decode_live(bytes: &[u8]) -> Option<Vec<Option<u64>>> {
    let mut rest = unseal(bytes)?;
    let count = usize::try_from(take_varint(&mut rest)?).ok()?;
    let (bits, behind) = rest.split_at_checked(count.div_ceil(8))?;
    rest = behind;
    let mut last_use_ms = 0_u64;
    let mut uses = Vec::with_capacity(count);
    for i in 0..count {
        uses.push(match bits[i / 8] >> (i % 8) & 1 {
            0 => None,
            _ => {
                last_use_ms = last_use_ms.wrapping_add(take_signed(&mut rest)?);
                Some(last_use_ms)
            }
        });
    }
    rest.is_empty().then_some(uses)
}

fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let checksum = Checksummer::of(&bytes[CHECKSUM_BYTES..]);
    bytes[..CHECKSUM_BYTES].copy_from_slice(&checksum.0.to_le_bytes());
    bytes
}

fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (checksum, rest) = bytes.split_first_chunk()?;
    (Checksummer::of(rest).0 == u64::from_le_bytes(*checksum)).then_some(rest)
}

/// LEB128: seven bits a byte, the lowest first.
pub(super) fn put_varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, behind) = rest.split_first()?;
        *rest = behind;
        let bits = u64::from(byte & 0x7f);
        if bits << shift >> shift != bits {
            return None;
        }
        value |= bits << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// A difference modulo 2^64, short where it is small in either direction (zigzag).
fn put_signed(bytes: &mut Vec<u8>, difference: u64) {
    let signed = difference.cast_signed();
    put_varint(bytes, (signed << 1 ^ signed >> 63).cast_unsigned());
}

fn take_signed(rest: &mut &[u8]) -> Option<u64> {
    let value = take_varint(rest)?;
    Some(value >> 1 ^ (value & 1).wrapping_neg())
}

fn take_key(rest: &mut &[u8]) -> Option<Key> {
    let (key, behind) = rest.split_first_chunk()?;
    *rest = behind;
    Some(Key(*key))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: u64 = 1025;

    fn record(id: u64, namespace: u8, parent: u8, key: u8, depth: u32, page: u32) -> FileRecord {
        FileRecord {
            info: RecordInfo {
                id: RecordId(NonZeroU64::new(id).expect("not zero")),
                namespace: Key([namespace; 32]),
                parent: Key([parent; 32]),
                key: Key([key; 32]),
                depth,
                bytes: 5 * PAGE_BYTES,
                last_use_ms: 1_900_000_000_000 + u64::from(key) * 7 % 3,
            },
            page,
        }
    }

    /// Every way of naming a parent, a number and a namespace.
    fn records() -> Vec<FileRecord> {
        let mut records = vec![
            record(FIRST + 1, 9, 9, 1, 0, 1),   // a first block
            record(FIRST + 3, 9, 1, 2, 1, 7),   // behind it
            record(77, 9, 50, 3, 300, 13),      // moved here, its parent elsewhere
            record(FIRST + 7, 8, 2, 4, 2, 19),  // of another namespace
            record(FIRST + 9, 9, 1, 5, 1, 900), // far behind, in the file and in its tree
            record(FIRST + 11, 9, 9, 5, 0, 3),  // before others in the file
        ];
        records[3].info.last_use_ms = u64::MAX;
        records[4].info.last_use_ms = 0;
        records
    }

    #[test]
    fn keys_read_back_and_what_became_of_a_file_is_right_behind_it() {
        assert_eq!(file_of_key(&file_key(77)), Some(77));
        assert_eq!(file_of_key(&live_key(77)), None);
        assert_eq!(meta_of_key(&meta_key(&Key([8; 32]))), Some(Key([8; 32])));
        assert!(file_key(255)[..] < live_key(255)[..] && live_key(255)[..] < file_key(256)[..]);
    }

    #[test]
    fn entries_read_back() {
        let records = records();
        for count in 0..=records.len() {
            let bytes = encode_file(FIRST, &records[..count]);
            let decoded = decode_file(FIRST, &bytes);
            assert_eq!(decoded.as_deref(), Some(&records[..count]));
        }
        for count in 0..20 {
            let uses: Vec<_> = (0..count)
                .map(|i| (i % 3 != 1).then_some(u64::MAX >> (i * 5)))
                .collect();
            assert_eq!(decode_live(&encode_live(&uses)), Some(uses));
        }
    }

    #[test]
    fn a_run_of_blocks_takes_forty_bytes_each() {
        let run: Vec<_> = (0..100_u8)
            .map(|i| {
                let id = own_id(FIRST, i.into());
                record(id, 200, i.wrapping_sub(1), i, i.into(), 6 * u32::from(i))
            })
            .collect();
        assert!(encode_file(FIRST, &run).len() <= 40 * run.len() + 64);
        assert!(encode_live(&vec![Some(1_900_000_000_000); 100]).len() <= 2 * 100);
    }

    /// Exhaustive over every bit and every cut.
    #[test]
    fn any_flipped_bit_and_any_cut_is_refused() {
        let file = encode_file(FIRST, &records());
        let live = encode_live(&[Some(1 << 40), None, Some(7)]);
        let is_read = |bytes: &[u8]| {
            [
                decode_file(FIRST, bytes).is_some(),
                decode_live(bytes).is_some(),
            ]
        };
        for (bytes, kind) in [(file, 0), (live, 1)] {
            assert!(is_read(&bytes)[kind]);
            for bit in 0..bytes.len() * 8 {
                let mut bytes = bytes.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert!(!is_read(&bytes)[kind], "bit {bit}");
            }
            for cut in 0..bytes.len() {
                assert!(!is_read(&bytes[..cut])[kind], "cut at {cut}");
            }
        }
    }

    /// With a right checksum: what the fields themselves refuse, and that nothing panics.
    #[test]
    fn whatever_the_fields_say_is_refused_or_read() {
        let bytes = encode_file(FIRST, &records());
        for at in CHECKSUM_BYTES..bytes.len() {
            for byte in [0, 1, 2, 0x7f, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] = byte;
                let _ = decode_file(FIRST, &seal(bytes.clone()));
                let _ = decode_live(&seal(bytes));
            }
        }
        let mut wide = vec![0; CHECKSUM_BYTES];
        put_varint(&mut wide, u64::MAX);
        assert_eq!(decode_file(FIRST, &seal(wide.clone())), None);
        assert_eq!(decode_live(&seal(wide)), None);
    }
}
