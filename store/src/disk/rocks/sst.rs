//! What RocksDB takes for a table file: a block-based table of format version 5, uncompressed, with
//! one value a block, XXH3 checksums, a binary-search index, and the properties that ingestion asks
//! for. After RocksDB's own description of its formats (its sources `table/format.cc` and
//! `table/block_based/`); a test compares with what `SstFileWriter` makes.

use xxhash_rust::xxh3::Xxh3;

use crate::disk::entry::put_varint;

/// Bytes behind each block: compression type, checksum.
const TRAILER_BYTES: usize = 1 + 4;
/// What a block ends with that has one restart, at its start: the restart, their number.
pub(super) const ONE_RESTART: [u8; 8] = [0, 0, 0, 0, 1, 0, 0, 0];
/// Bytes of a block beside its one entry: restart array and trailer.
pub(super) const BLOCK_TAIL_BYTES: usize = ONE_RESTART.len() + TRAILER_BYTES;
/// Bytes of an entry beside its value and the value's length: two lengths, key, sequence number.
pub(super) const ENTRY_HEAD_BYTES: usize = 1 + 1 + INTERNAL_KEY_BYTES;

const INTERNAL_KEY_BYTES: usize = 8 + 8;
const FORMAT_VERSION: u32 = 5;
const CHECKSUM_XXH3: u8 = 4;
const MAGIC: u64 = 0x88e2_41b7_85f4_cff7;
/// By how much the lengths and offsets in a table's tail may grow with its padding.
const LENGTHS_GROW_BY: usize = 8;
/// A put with sequence number 0.
const PUT: [u8; 8] = [1, 0, 0, 0, 0, 0, 0, 0];

/// Bytes of LEB128, as RocksDB writes lengths.
pub(super) fn varint_bytes(mut value: u64) -> usize {
    let mut bytes = 1;
    while value >= 0x80 {
        value >>= 7;
        bytes += 1;
    }
    bytes
}

/// What stands before the value in a block of one entry.
pub(super) fn entry_head(place: u64, value_bytes: usize) -> Vec<u8> {
    let mut head = vec![0, INTERNAL_KEY_BYTES as u8];
    put_varint(&mut head, value_bytes as u64);
    head.extend_from_slice(&place.to_be_bytes());
    head.extend_from_slice(&PUT);
    head
}

/// The checksum of a block that is not in one piece.
pub(super) struct BlockSum(Xxh3);

impl BlockSum {
    pub(super) fn new() -> BlockSum {
        BlockSum(Xxh3::new())
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// What stands behind the block.
    pub(super) fn trailer(&self) -> [u8; TRAILER_BYTES] {
        // The compression type is mixed into the checksum by a multiplication; "none" is 0.
        let mut trailer = [0; TRAILER_BYTES];
        trailer[1..].copy_from_slice(&(self.0.digest() as u32).to_le_bytes());
        trailer
    }
}

/// Where a block is: its bytes without the trailer.
#[derive(Clone, Copy)]
struct Handle {
    offset: u64,
    bytes: u64,
}

impl Handle {
    fn encode(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(12);
        put_varint(&mut bytes, self.offset);
        put_varint(&mut bytes, self.bytes);
        bytes
    }
}

/// A block of several entries without a value in common.
#[derive(Default)]
struct Block {
    bytes: Vec<u8>,
    restarts: Vec<u32>,
}

impl Block {
    /// Adds an entry. Keys are written whole, so that every entry may be a restart.
    fn add(&mut self, key: &[u8], value: &[u8], with_length: bool) {
        self.restarts.push(self.bytes.len() as u32);
        put_varint(&mut self.bytes, 0);
        put_varint(&mut self.bytes, key.len() as u64);
        if with_length {
            put_varint(&mut self.bytes, value.len() as u64);
        }
        self.bytes.extend_from_slice(key);
        self.bytes.extend_from_slice(value);
    }

    fn finish(mut self) -> Vec<u8> {
        for restart in &self.restarts {
            self.bytes.extend_from_slice(&restart.to_le_bytes());
        }
        let count = self.restarts.len() as u32;
        self.bytes.extend_from_slice(&count.to_le_bytes());
        self.bytes
    }
}

/// What a table says about its blocks, gathered while they are laid out.
#[derive(Default)]
pub(super) struct Tail {
    index: Block,
    blocks: u64,
    value_bytes: u64,
    data_bytes: u64,
}

impl Tail {
    /// The next block: of one entry, whose value has `value_bytes`.
    pub(super) fn add_block(&mut self, place: u64, value_bytes: usize) {
        let bytes =
            ENTRY_HEAD_BYTES + varint_bytes(value_bytes as u64) + value_bytes + ONE_RESTART.len();
        let handle = Handle {
            offset: self.data_bytes,
            bytes: bytes as u64,
        };
        // The index is of the kind that encodes a handle as a difference where it is not a restart,
        // and gives no length.
        self.index
            .add(&place.to_be_bytes(), &handle.encode(), false);
        self.blocks += 1;
        self.value_bytes += value_bytes as u64;
        self.data_bytes += (bytes + TRAILER_BYTES) as u64;
    }

    /// Bytes of all blocks so far.
    pub(super) fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Everything behind the last block, so long that the whole file is a multiple of `align`. `first`
    /// makes the file's identity: places are never used twice.
    pub(super) fn finish(self, first: u64, align: usize) -> Vec<u8> {
        let data_bytes = self.data_bytes as usize;
        let (index, facts) = self.end(first);
        let lay_out = |padding| facts.lay_out(&index, padding);
        let shortest = (data_bytes + lay_out(0).len()).wrapping_neg() % align;
        // A longer padding may have longer lengths and offsets around it: then some bytes less. Where
        // one of them grows just there, no padding fits, and the next page is tried.
        let mut tails = (0..)
            .map(|pages| shortest + pages * align)
            .flat_map(|padding| (padding.saturating_sub(LENGTHS_GROW_BY)..=padding).rev())
            .map(lay_out);
        tails
            .find(|tail| (data_bytes + tail.len()).is_multiple_of(align))
            .expect("lengths grow at few places, and pages do not end")
    }

    fn end(self, first: u64) -> (Vec<u8>, Facts) {
        let index = self.index.finish();
        let facts = Facts {
            first,
            blocks: self.blocks,
            value_bytes: self.value_bytes,
            data_bytes: self.data_bytes,
            index_bytes: (index.len() + TRAILER_BYTES) as u64,
        };
        (index, facts)
    }
}

/// What a table says of itself.
struct Facts {
    first: u64,
    blocks: u64,
    value_bytes: u64,
    data_bytes: u64,
    index_bytes: u64,
}

impl Facts {
    fn lay_out(&self, index: &[u8], padding: usize) -> Vec<u8> {
        let mut tail = Vec::new();
        let mut append = |contents: &[u8]| {
            let handle = Handle {
                offset: self.data_bytes + tail.len() as u64,
                bytes: contents.len() as u64,
            };
            let mut sum = BlockSum::new();
            sum.add(contents);
            tail.extend_from_slice(contents);
            tail.extend_from_slice(&sum.trailer());
            handle
        };
        let index = append(index);
        let properties = append(&self.properties(padding));
        let mut meta = Block::default();
        meta.add(b"rocksdb.properties", &properties.encode(), true);
        let meta = append(&meta.finish());
        let mut footer = vec![CHECKSUM_XXH3];
        footer.extend(meta.encode());
        footer.extend(index.encode());
        footer.resize(1 + 40, 0);
        footer.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        footer.extend_from_slice(&MAGIC.to_le_bytes());
        tail.extend(footer);
        tail
    }

    fn properties(&self, padding: usize) -> Vec<u8> {
        let Facts {
            first,
            blocks,
            value_bytes,
            data_bytes,
            index_bytes,
        } = *self;
        enum Value {
            Number(u64),
            Bytes(Vec<u8>),
        }
        use Value::{Bytes, Number};
        let text = |text: &str| Bytes(text.as_bytes().to_vec());
        // In the order of the names.
        let properties = [
            ("rocksdb.block.based.table.index.type", Bytes(vec![0; 4])),
            ("rocksdb.block.based.table.prefix.filtering", text("0")),
            ("rocksdb.block.based.table.whole.key.filtering", text("1")),
            ("rocksdb.column.family.id", Number(0x7fff_ffff)),
            ("rocksdb.comparator", text("leveldb.BytewiseComparator")),
            ("rocksdb.compression", text("NoCompression")),
            // RocksDB makes a table's identity of these two and the file's number.
            ("rocksdb.creating.db.identity", text("stemkv")),
            (
                "rocksdb.creating.session.identity",
                text("STEMKV00000000000000"),
            ),
            ("rocksdb.data.block.restart.interval", Number(16)),
            ("rocksdb.data.size", Number(data_bytes)),
            ("rocksdb.deleted.keys", Number(0)),
            ("rocksdb.external_sst_file.global_seqno", Bytes(vec![0; 8])),
            (
                "rocksdb.external_sst_file.version",
                Bytes(2_u32.to_le_bytes().to_vec()),
            ),
            ("rocksdb.filter.size", Number(0)),
            ("rocksdb.fixed.key.length", Number(0)),
            ("rocksdb.format.version", Number(0)),
            ("rocksdb.index.block.restart.interval", Number(1)),
            ("rocksdb.index.key.is.user.key", Number(1)),
            ("rocksdb.index.size", Number(index_bytes)),
            ("rocksdb.index.value.is.delta.encoded", Number(1)),
            ("rocksdb.key.largest.seqno", Number(0)),
            ("rocksdb.key.smallest.seqno", Number(0)),
            ("rocksdb.merge.operands", Number(0)),
            ("rocksdb.merge.operator", text("nullptr")),
            ("rocksdb.num.data.blocks", Number(blocks)),
            ("rocksdb.num.entries", Number(blocks)),
            ("rocksdb.num.filter_entries", Number(0)),
            ("rocksdb.num.range-deletions", Number(0)),
            ("rocksdb.original.file.number", Number(first)),
            ("rocksdb.prefix.extractor.name", text("nullptr")),
            ("rocksdb.property.collectors", text("[]")),
            (
                "rocksdb.raw.key.size",
                Number(blocks * INTERNAL_KEY_BYTES as u64),
            ),
            ("rocksdb.raw.value.size", Number(value_bytes)),
            ("rocksdb.tail.start.offset", Number(data_bytes)),
            // Ours: what makes the file whole pages.
            ("stemkv.padding", Bytes(vec![0; padding])),
        ];
        let mut block = Block::default();
        for (name, value) in properties {
            let value = match value {
                Number(number) => {
                    let mut bytes = Vec::new();
                    put_varint(&mut bytes, number);
                    bytes
                }
                Bytes(bytes) => bytes,
            };
            block.add(name.as_bytes(), &value, true);
        }
        block.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_whole_pages_and_hardly_ever_has_one_more_than_it_must() {
        const PAGE: usize = 4096;
        let mut one_more = 0;
        for value in 0..PAGE {
            let tail = || {
                let mut tail = Tail::default();
                tail.add_block(1, value);
                tail
            };
            let data_bytes = tail().data_bytes() as usize;
            let file = data_bytes + tail().finish(1, PAGE).len();
            assert!(file.is_multiple_of(PAGE));
            let (index, facts) = tail().end(1);
            let least = (data_bytes + facts.lay_out(&index, 0).len()).next_multiple_of(PAGE);
            // The lengths of the padding itself may need another page, too.
            one_more += (file - least) / PAGE;
        }
        assert!(
            one_more <= 8,
            "{one_more} pages more than needed in {PAGE} files"
        );
    }
}
