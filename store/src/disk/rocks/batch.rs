//! Writes one payload file: padding, image, padding, image, …, directory.
//!
//! An uncompressed SST with one value a block is also a flat file, and one that can be written without
//! RocksDB: each image goes to the disk from where it lies in the host tier, past the page cache and
//! without a copy. What stands between two images fills whole pages, made in a buffer of its own; the
//! padding in it is a value too, as long as it must be for the image to start on 4 KiB.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use memmap2::MmapMut;

use super::output::{self, ImageBlock, Stretch};
use super::sst::{
    BLOCK_TAIL_BYTES, BlockSum, ENTRY_HEAD_BYTES, ONE_RESTART, Tail, entry_head, varint_bytes,
};
use super::table::image_place;
use crate::disk::directory::{self, DirectoryEntry, directory_bytes};
use crate::disk::manifest::{unreadable, unwritable};
use crate::disk::verify::{RECORD_ALIGN, record_bytes};
use crate::{Error, RecordHeader, RecordId, Result};

/// One record to write.
pub(super) struct NewRecord<'a> {
    pub(super) id: RecordId,
    pub(super) last_use_ms: u64,
    pub(super) header: RecordHeader,
    /// On a page of memory, or the file is written through the page cache.
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
    // Two index entries a record; properties, of them up to a page and a half of padding; footer.
    let rest = directory_bytes(records, layers) + 2 * 64 * records + 8192;
    let padded = record_bytes + records * RECORD_ALIGN;
    (padded + RECORD_ALIGN + rest.next_multiple_of(RECORD_ALIGN)) as u64
}

/// How many records go into each of the files that a batch takes, in its order: so many that none is
/// longer than `file_bytes_most`, but for one of a single record.
pub(super) fn parts<'a>(
    headers: impl Iterator<Item = &'a RecordHeader>,
    file_bytes_most: u64,
) -> Vec<usize> {
    let mut parts = Vec::new();
    let (mut records, mut bytes, mut layers) = (0, 0, 0);
    for header in headers {
        bytes += record_bytes(header);
        layers = layers.max(header.slabs.len());
        if records > 0 && bytes_max(records + 1, bytes, layers) > file_bytes_most {
            parts.push(records);
            (records, bytes, layers) = (0, record_bytes(header), header.slabs.len());
        }
        records += 1;
    }
    parts.extend((records > 0).then_some(records));
    parts
}

/// The places that `records` records and their directory take.
pub(super) fn places(records: usize) -> u64 {
    2 * records as u64 + 1
}

/// Lays out a file whose first place is `first`. Returns its directory, too.
///
/// # Errors
/// `Internal` for records that are too long; `Unavailable` where there is no memory.
pub(super) fn lay_out(
    first: u64,
    records: Vec<NewRecord<'_>>,
) -> Result<(Layout<'_>, Vec<DirectoryEntry>)> {
    let layers = records.iter().map(|record| record.header.slabs.len());
    let scratch = bytes_max(records.len(), 0, layers.max().unwrap_or(0)) as usize;
    let mut layout = Layout::new(scratch + records.len() * RECORD_ALIGN)?;
    let mut tail = Tail::default();
    let mut entries = Vec::with_capacity(records.len());
    let zeros = [0; 2 * RECORD_ALIGN];
    for (slot, record) in (0_u32..).zip(records) {
        let place = image_place(first, slot);
        let block = tail.data_bytes() as usize;
        let padding = zeros
            .get(..padding_before(block, record.image.len()))
            .ok_or_else(|| Error::internal("a record is too long"))?;
        layout.add_block(place - 1, padding);
        tail.add_block(place - 1, padding.len());
        let start = layout.add_image(place, record.image)?;
        tail.add_block(place, record.image.len());
        entries.push(DirectoryEntry {
            id: record.id,
            last_use_ms: record.last_use_ms,
            page: u32::try_from(start / RECORD_ALIGN as u64)
                .map_err(|_| Error::internal("a payload file is too long"))?,
            header: record.header,
        });
    }
    let directory = directory::encode(&entries);
    let last = first + 2 * entries.len() as u64;
    layout.add_block(last, &directory);
    tail.add_block(last, directory.len());
    layout.add(&tail.finish(first, RECORD_ALIGN));
    layout.end()?;
    Ok((layout, entries))
}

/// What a file consists of: images where they lie, and whole pages of everything else.
pub(super) struct Layout<'a> {
    /// Starts on a page of memory.
    scratch: MmapMut,
    used: usize,
    /// For each stretch of the file, the end of its pages in `scratch`, and what follows them.
    stretches: Vec<(usize, Option<ImageBlock<'a>>)>,
    bytes: u64,
}

impl<'a> Layout<'a> {
    fn new(scratch_bytes: usize) -> Result<Layout<'a>> {
        let scratch = MmapMut::map_anon(scratch_bytes)
            .map_err(|e| Error::unavailable("no memory for a batch").caused_by(e))?;
        Ok(Layout {
            scratch,
            used: 0,
            stretches: Vec::new(),
            bytes: 0,
        })
    }

    fn add(&mut self, bytes: &[u8]) {
        self.scratch[self.used..][..bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
        self.bytes += bytes.len() as u64;
    }

    fn add_block(&mut self, place: u64, value: &[u8]) {
        let mut sum = BlockSum::new();
        for bytes in [&entry_head(place, value.len()), value, &ONE_RESTART] {
            sum.add(bytes);
            self.add(bytes);
        }
        self.add(&sum.trailer());
    }

    /// Adds the block of an image, but for its checksum; returns where in the file the image starts.
    fn add_image(&mut self, place: u64, image: &'a [u8]) -> Result<u64> {
        self.add(&entry_head(place, image.len()));
        self.check_page(image.len())?;
        let start = self.bytes;
        self.stretches
            .push((self.used, Some(ImageBlock { place, image })));
        self.bytes += image.len() as u64;
        self.add(&[0; BLOCK_TAIL_BYTES]);
        Ok(start)
    }

    fn end(&mut self) -> Result<()> {
        self.check_page(0)?;
        self.stretches.push((self.used, None));
        Ok(())
    }

    /// What was laid out is what is computed: offsets go into the index.
    fn check_page(&self, image_bytes: usize) -> Result<()> {
        let is_page = |bytes: usize| bytes.is_multiple_of(RECORD_ALIGN);
        match is_page(self.bytes as usize) && is_page(self.used) && is_page(image_bytes) {
            true => Ok(()),
            false => Err(
                Error::internal("an image would not fill whole pages of its file")
                    .with("offset", self.bytes),
            ),
        }
    }

    /// Writes the file. Returns its allocated bytes. It is not synced: ingestion does that.
    ///
    /// # Errors
    /// `Unavailable` where the disk fails.
    pub(super) fn write(&mut self, path: &Path) -> Result<u64> {
        let flags = match self.images_are_aligned() {
            true => libc::O_DIRECT,
            false => 0,
        };
        let written = match output::write(path, flags, self.stretches()) {
            // Not every file system has direct I/O.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                output::write(path, 0, self.stretches())
            }
            written => written,
        };
        written.map_err(|error| unwritable(path, error))?;
        let meta = fs::metadata(path).map_err(|e| unreadable(path, e))?;
        Ok(meta.blocks() * 512)
    }

    fn images_are_aligned(&self) -> bool {
        let mut images = self.stretches.iter().filter_map(|(_, block)| *block);
        images.all(|block| block.image.as_ptr().addr().is_multiple_of(RECORD_ALIGN))
    }

    fn stretches(&mut self) -> Vec<Stretch<'_>> {
        let mut rest = &mut self.scratch[..];
        let (mut begun, mut before) = (0, None);
        let mut stretches = Vec::with_capacity(self.stretches.len());
        for &(end, image) in &self.stretches {
            let (pages, behind) = rest.split_at_mut(end - begun);
            stretches.push(Stretch {
                before: std::mem::replace(&mut before, image),
                pages,
                image: image.map_or(&[], |block| block.image),
            });
            (rest, begun) = (behind, end);
        }
        stretches
    }
}

/// Where the value of a block that starts at `block` starts.
fn value_start(block: usize, value_bytes: usize) -> usize {
    block + ENTRY_HEAD_BYTES + varint_bytes(value_bytes as u64)
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
    use super::super::db::{Db, Sizing};
    use super::*;
    use crate::{Checksum, CodecId, Dtype, Key, KvGeometry, SlabEntry};

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

    fn header(geometry: &KvGeometry, place: u8) -> RecordHeader {
        RecordHeader {
            namespace: Key([1; 32]),
            parent: Key([1; 32]),
            key: Key([place; 32]),
            depth: 0,
            tokens: geometry.block_tokens,
            geometry: geometry.fingerprint(),
            layers: 0..geometry.layers,
            codec: CodecId::Raw,
            slabs: geometry
                .layer_ids()
                .map(|_| SlabEntry {
                    offset: 0,
                    bytes: 0,
                    checksum: Checksum(0),
                })
                .collect(),
        }
    }

    /// The places of `images` with what belongs there, and the file that was made of them.
    fn written(dir: &Path, images: &[Vec<u8>]) -> (Vec<(u64, Vec<u8>)>, std::path::PathBuf) {
        let geometry = KvGeometry::gqa(2, 2, 32, Dtype::Bf16, 8).expect("valid");
        let first = 1025;
        let path = dir.join("ours.sst");
        let records = (0_u8..)
            .zip(images)
            .map(|(i, image)| NewRecord {
                id: RecordId((u64::from(i) + 1).try_into().expect("not 0")),
                last_use_ms: u64::from(i),
                header: header(&geometry, i),
                image,
            })
            .collect();
        let (mut layout, entries) = lay_out(first, records).expect("short");
        let disk_bytes = layout.write(&path).expect("written");
        let bytes = fs::read(&path).expect("there");
        assert_eq!(bytes.len() % RECORD_ALIGN, 0, "the file is whole pages");
        assert!(disk_bytes >= bytes.len() as u64);
        let mut expected = Vec::new();
        let mut block = 0;
        for (slot, (image, entry)) in (0_u32..).zip(images.iter().zip(&entries)) {
            let padding = padding_before(block, image.len());
            block += block_bytes(padding) + block_bytes(image.len());
            let place = image_place(first, slot);
            expected.push((place - 1, vec![0; padding]));
            expected.push((place, image.clone()));
            let at = entry.page as usize * RECORD_ALIGN;
            assert!(bytes[at..].starts_with(image), "the image is one piece");
        }
        let last = first + 2 * images.len() as u64;
        expected.push((last, directory::encode(&entries)));
        (expected, path)
    }

    fn images() -> Vec<Vec<u8>> {
        let mut byte = 0_u8;
        let mut image = |bytes: usize| {
            let next = || {
                byte = byte.wrapping_mul(31).wrapping_add(7);
                byte
            };
            std::iter::repeat_with(next).take(bytes).collect()
        };
        [8 << 10, 4 << 10, (2 << 20) - 4096, 2 << 20, 12 << 10]
            .map(&mut image)
            .into()
    }

    /// Shown by comparison with RocksDB's own writer: all blocks, then the index.
    #[test]
    fn a_file_has_the_bytes_that_rocksdb_itself_would_write() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (values, ours) = written(dir.path(), &images());
        let mut blocks = rocksdb::BlockBasedOptions::default();
        blocks.set_block_size(1);
        blocks.set_format_version(5);
        blocks.set_checksum_type(rocksdb::ChecksumType::XXH3);
        let mut options = rocksdb::Options::default();
        options.set_block_based_table_factory(&blocks);
        options.set_compression_type(rocksdb::DBCompressionType::None);
        let mut writer = rocksdb::SstFileWriter::create(&options);
        let theirs = dir.path().join("theirs.sst");
        writer.open(&theirs).expect("open");
        for (place, value) in &values {
            writer.put(place.to_be_bytes(), value).expect("put");
        }
        writer.finish().expect("finished");
        let [ours, theirs] = [ours, theirs].map(|path| fs::read(path).expect("there"));
        let data: usize = values
            .iter()
            .map(|(_, value)| block_bytes(value.len()))
            .sum();
        assert!(ours[..data] == theirs[..data], "the blocks differ");
        // Restart array and entries, of 8 bytes of key and two lengths each.
        let index = values.len() * (2 + 8 + 2 + 4);
        assert!(
            ours[data..][..index] == theirs[data..][..index],
            "the index differs"
        );
    }

    #[test]
    fn rocksdb_takes_a_file_in_and_reads_every_value_with_its_checksums_verified() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (values, path) = written(dir.path(), &images());
        let db = Db::open(&dir.path().join("db"), Sizing::of(64 << 20)).expect("opened");
        db.ingest(&[&path]).expect("ingested");
        assert!(!db.has_undroppable_payload());
        let live = db.live_payload().expect("listed");
        assert_eq!(live.len(), 1);
        assert_eq!(
            (live[0].first, live[0].last),
            (values[0].0, values[values.len() - 1].0)
        );
        let all = db.verified_payload().expect("sound");
        assert!(all == values);
    }

    #[test]
    fn a_value_starts_where_it_was_measured_to() {
        assert_eq!(value_start(0, 1 << 20), 21);
        assert_eq!(value_start(0, 2 << 20), 22);
    }
}
