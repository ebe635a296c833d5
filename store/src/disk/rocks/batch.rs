//! Writes one payload file: padding, image, padding, image, …, directory.
//!
//! An uncompressed SST with one value a block is also a flat file. Each image is put as it lies in
//! the host tier, without a copy of ours; the padding before it is a value of its own, as long as it
//! must be for the image to start on 4 KiB.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rocksdb::SstFileWriter;

use super::db::{payload_options, unavailable};
use super::table::image_place;
use crate::disk::directory::{self, DirectoryEntry, directory_bytes};
use crate::disk::manifest::unreadable;
use crate::disk::verify::{RECORD_ALIGN, record_bytes};
use crate::{Error, RecordHeader, RecordId, Result};

/// Bytes of a block beside its one value's entry: restart array, its length, block trailer.
const BLOCK_TAIL_BYTES: usize = 4 + 4 + 5;
/// Bytes of an entry beside its value and the value's length: two varints, key, sequence number.
const ENTRY_HEAD_BYTES: usize = 1 + 1 + 8 + 8;

/// One record to write.
pub(super) struct NewRecord<'a> {
    pub(super) id: RecordId,
    pub(super) last_use_ms: u64,
    pub(super) header: RecordHeader,
    pub(super) image: &'a [u8],
}

/// Bytes that a file of these records takes at most.
pub(super) fn file_bytes_max<'a>(headers: impl Iterator<Item = &'a RecordHeader>) -> u64 {
    let (mut bytes, mut layers, mut records) = (0, 0, 0);
    for header in headers {
        // One block of padding fills up to the next page but one.
        bytes += record_bytes(header) + RECORD_ALIGN;
        layers = layers.max(header.slabs.len());
        records += 1;
    }
    bytes_max(records, bytes - records * RECORD_ALIGN, layers)
}

/// The same for `records` records of `record_bytes` together and at most `layers` layers each.
pub(super) fn bytes_max(records: usize, record_bytes: usize, layers: usize) -> u64 {
    // Two index entries a record, properties and footer.
    let rest = directory_bytes(records, layers) + 2 * 64 * records + 4096;
    let padded = record_bytes + records * RECORD_ALIGN;
    (padded + RECORD_ALIGN + rest.next_multiple_of(RECORD_ALIGN)) as u64
}

/// The places that `records` records and their directory take.
pub(super) fn places(records: usize) -> u64 {
    2 * records as u64 + 1
}

/// Writes and syncs a file whose first place is `first`. Returns its directory and allocated bytes.
///
/// # Errors
/// `Unavailable` where the disk fails.
pub(super) fn write_file(
    path: &Path,
    first: u64,
    records: Vec<NewRecord<'_>>,
) -> Result<(Vec<DirectoryEntry>, u64)> {
    let options = payload_options();
    let mut writer = SstFileWriter::create(&options);
    let failed = || unavailable("cannot write a payload file");
    writer.open(path).map_err(failed())?;
    let mut block = 0;
    let mut entries = Vec::with_capacity(records.len());
    let zeros = [0; 2 * RECORD_ALIGN];
    for (slot, record) in (0_u32..).zip(records) {
        let place = image_place(first, slot);
        let padding = padding_before(block, record.image.len());
        let padding = zeros
            .get(..padding)
            .ok_or_else(|| Error::internal("a record is too long"))?;
        writer
            .put((place - 1).to_be_bytes(), padding)
            .map_err(failed())?;
        block += block_bytes(padding.len());
        writer
            .put(place.to_be_bytes(), record.image)
            .map_err(failed())?;
        // The block of the last value is still open: what was written so far ends before it.
        if writer.file_size() != block as u64 {
            return Err(
                Error::internal("RocksDB lays blocks out in another way than we know")
                    .with("expected", block)
                    .with("found", writer.file_size()),
            );
        }
        entries.push(DirectoryEntry {
            id: record.id,
            last_use_ms: record.last_use_ms,
            page: u32::try_from(value_start(block, record.image.len()) / RECORD_ALIGN)
                .map_err(|_| Error::internal("a payload file is too long"))?,
            header: record.header,
        });
        block += block_bytes(record.image.len());
    }
    let last = first + 2 * entries.len() as u64;
    writer
        .put(last.to_be_bytes(), directory::encode(&entries))
        .map_err(failed())?;
    writer.finish().map_err(failed())?;
    let disk_bytes = fs::metadata(path)
        .map_err(|e| unreadable(path, e))?
        .blocks()
        * 512;
    Ok((entries, disk_bytes))
}

/// Bytes of LEB128, as RocksDB writes lengths.
fn varint_bytes(mut value: usize) -> usize {
    let mut bytes = 1;
    while value >= 0x80 {
        value >>= 7;
        bytes += 1;
    }
    bytes
}

/// Where the value of a block that starts at `block` starts.
fn value_start(block: usize, value_bytes: usize) -> usize {
    block + ENTRY_HEAD_BYTES + varint_bytes(value_bytes)
}

/// Bytes of a block that holds one value.
fn block_bytes(value_bytes: usize) -> usize {
    value_start(0, value_bytes) + value_bytes + BLOCK_TAIL_BYTES
}

/// The shortest padding which, as a block at `block`, lets the next block's value of `image_bytes`
/// start on [`RECORD_ALIGN`].
fn padding_before(block: usize, image_bytes: usize) -> usize {
    let start = |padding: usize| value_start(block + block_bytes(padding), image_bytes);
    let shortest = start(0).next_multiple_of(RECORD_ALIGN) - start(0);
    // A longer padding has a longer length, which moves the value on by a byte: then one less.
    (shortest.saturating_sub(2)..=shortest + RECORD_ALIGN)
        .find(|&padding| start(padding).is_multiple_of(RECORD_ALIGN))
        .expect("lengths grow by one byte at few places, so a page further on one fits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_aligns_any_image_at_any_block() {
        for block in (0..3 * RECORD_ALIGN).chain([(1 << 31) - 7]) {
            for image in [
                8 << 10,
                16 << 10,
                1 << 20,
                (2 << 20) - 4096,
                2 << 20,
                64 << 20,
            ] {
                let padding = padding_before(block, image);
                assert!(padding < 2 * RECORD_ALIGN);
                let start = value_start(block + block_bytes(padding), image);
                assert_eq!(start % RECORD_ALIGN, 0, "block {block}, image {image}");
            }
        }
    }

    #[test]
    fn a_value_starts_where_it_was_measured_to() {
        assert_eq!(value_start(0, 1 << 20), 21);
        assert_eq!(value_start(0, 2 << 20), 22);
    }
}
