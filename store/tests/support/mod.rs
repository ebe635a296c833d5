//! Chunks to store: everything about one follows from its place in a family of prefixes.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test binary uses a part of this"
)]

mod random;
#[cfg(feature = "rocksdb")]
mod rocks;

use std::sync::Arc;

use stemkv_store::{
    BatchTooLarge, Checksummer, Clock, CodecId, DiskScan, DiskTier, Dtype, Filling, HostArena, Key,
    KvGeometry, RecordHeader, RecordId, RecordInfo, Result, Slot,
};

pub use random::Random;
#[cfg(feature = "rocksdb")]
#[allow(unused_imports, reason = "each test binary uses a part of this")]
pub use rocks::{allocated_bytes, copy, files, flip_record_bit, sample};

/// Four layers of 4 KiB: a record has 20 KiB.
pub fn geometry() -> KvGeometry {
    KvGeometry::gqa(4, 2, 32, Dtype::Bf16, 16).unwrap()
}

/// Bytes of a record of [`geometry`].
pub const RECORD_BYTES: u64 = 20 << 10;

pub fn arena(slots: usize) -> HostArena {
    HostArena::open(&geometry(), slots * RECORD_BYTES as usize, |_, _| {}).unwrap()
}

pub fn root() -> Key {
    Key([0xaa; 32])
}

/// The key of block `depth` of prefix `family`.
pub fn key(family: u64, depth: u32) -> Key {
    let mut bytes = [0x5c; 32];
    bytes[..8].copy_from_slice(&family.to_le_bytes());
    bytes[8..12].copy_from_slice(&depth.to_le_bytes());
    Key(bytes)
}

pub fn parent(family: u64, depth: u32) -> Key {
    depth
        .checked_sub(1)
        .map_or(root(), |above| key(family, above))
}

/// The only payload that is right under `key`.
fn payload(key: &Key, bytes: &mut [u8]) {
    let mut random = Random(Checksummer::of(&key.0).0);
    for word in bytes.chunks_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]);
    }
}

/// Block `depth` of prefix `family`, sealed in `arena`.
pub fn chunk(arena: &HostArena, family: u64, depth: u32) -> Slot {
    chunk_of(arena, &geometry(), family, depth)
}

/// As [`chunk`], of another geometry.
pub fn chunk_of(arena: &HostArena, geometry: &KvGeometry, family: u64, depth: u32) -> Slot {
    chunk_with(arena, geometry, family, depth, payload)
}

/// As [`chunk`], with values close to each other in size, as KV has them, of which only the first
/// `noisy` in eight have any noise: codecs make records of several lengths out of it.
pub fn kv_chunk(arena: &HostArena, family: u64, depth: u32, noisy: usize) -> Slot {
    chunk_with(arena, &geometry(), family, depth, |key, bytes| {
        payload(key, bytes);
        for (i, value) in bytes.chunks_exact_mut(2).enumerate() {
            value[0] &= match i % 8 < noisy {
                true => 0xff,
                false => 0,
            };
            value[1] = (value[1] & 0x80) | 0x3c;
        }
    })
}

fn chunk_with(
    arena: &HostArena,
    geometry: &KvGeometry,
    family: u64,
    depth: u32,
    fill: impl Fn(&Key, &mut [u8]),
) -> Slot {
    let mut filling = arena
        .allocate(geometry.payload_bytes(), 1)
        .and_then(|mut fillings| fillings.pop())
        .expect("the test's arena is large enough");
    let key = key(family, depth);
    let image = filling.image_mut().unwrap();
    fill(
        &key,
        &mut image[RecordHeader::BYTES..][..geometry.payload_bytes()],
    );
    let sums: Vec<_> = image[RecordHeader::BYTES..]
        .chunks_exact(geometry.slab_stride())
        .take(geometry.layers as usize)
        .map(|slab| Checksummer::of(&slab[..geometry.slab_bytes()]))
        .collect();
    for (layer, sum) in geometry.layer_ids().zip(sums) {
        filling.set_slab(layer, sum);
    }
    filling
        .seal(RecordHeader {
            namespace: root(),
            parent: parent(family, depth),
            key,
            depth,
            tokens: geometry.block_tokens,
            geometry: geometry.fingerprint(),
            layers: 0..geometry.layers,
            codec: CodecId::Raw,
            slabs: Vec::new(),
        })
        .unwrap()
}

/// Blocks `0..blocks` of prefix `family`, parents first.
pub fn chain(arena: &HostArena, family: u64, blocks: u32) -> Vec<Slot> {
    (0..blocks)
        .map(|depth| chunk(arena, family, depth))
        .collect()
}

/// How a batch ended.
pub type Written = Result<Result<Vec<RecordId>, BatchTooLarge>>;

/// Writes a chain as two batches, the second one begun while the first is under way; the second is not
/// tried where the first does not begin. Calls `wrote_first` as soon as the first is durable.
pub fn write_in_two(
    tier: &dyn DiskTier,
    blocks: &[Slot],
    split: usize,
    wrote_first: impl FnOnce() + Send,
) -> (Written, Option<Written>) {
    let (head, tail) = blocks.split_at(split);
    let (begin, begun) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let first = scope.spawn(move || {
            let written = tier.write_after(head, None, &mut |id| begin.send(id).unwrap());
            if let Ok(Ok(_)) = written {
                wrote_first();
            }
            written
        });
        let second = begun.recv().ok();
        let second = second.map(|first| tier.write_after(tail, Some(first), &mut |_| {}));
        (first.join().unwrap(), second)
    })
}

/// Every record, in the order of the scan.
pub fn scan(tier: &dyn DiskTier) -> (Vec<RecordInfo>, DiskScan) {
    let mut records = Vec::new();
    let scan = tier
        .scan(&mut |info| records.push(info))
        .expect("the index can be read");
    assert_eq!(scan.records, records.len() as u64);
    (records, scan)
}

pub fn filling(arena: &HostArena, info: &RecordInfo) -> Filling {
    arena
        .allocate(info.bytes as usize - RecordHeader::BYTES, 1)
        .and_then(|mut fillings| fillings.pop())
        .expect("the test's arena is large enough")
}

pub fn read(tier: &dyn DiskTier, arena: &HostArena, info: &RecordInfo) -> Result<Slot> {
    let mut answers = read_all(tier, vec![(info.clone(), filling(arena, info))]);
    answers.pop().unwrap()
}

/// Every answer, in the order of the reads. Panics unless there is one for each.
pub fn read_all(tier: &dyn DiskTier, reads: Vec<(RecordInfo, Filling)>) -> Vec<Result<Slot>> {
    let mut answers: Vec<_> = reads.iter().map(|_| None).collect();
    tier.read(reads, &mut |i, answer| {
        assert!(
            answers[i].replace(answer).is_none(),
            "read {i} is answered twice"
        );
    });
    let answers = answers.into_iter().enumerate();
    answers
        .map(|(i, answer)| answer.unwrap_or_else(|| panic!("read {i} has no answer")))
        .collect()
}

/// Panics unless `slot` holds what belongs under the key of `info`, byte for byte.
pub fn assert_right(slot: &Slot, info: &RecordInfo) {
    let header = slot.header().expect("a sealed slot has a header");
    assert_eq!((header.key, header.parent), (info.key, info.parent));
    assert_eq!(
        (header.namespace, header.depth),
        (info.namespace, info.depth)
    );
    let mut expected = vec![0; geometry().payload_bytes()];
    payload(&info.key, &mut expected);
    assert_eq!(
        &slot.image()[RecordHeader::BYTES..][..expected.len()],
        expected
    );
}

/// Reads every record and checks every byte of it.
pub fn assert_all_right(tier: &dyn DiskTier, arena: &HostArena) -> Vec<RecordInfo> {
    let (records, _) = scan(tier);
    for info in &records {
        assert_right(
            &read(tier, arena, info).expect("a reported record can be read"),
            info,
        );
    }
    records
}

/// The infos whose ids are `ids`, in that order.
pub fn infos_of(tier: &dyn DiskTier, ids: &[stemkv_store::RecordId]) -> Vec<RecordInfo> {
    let (records, _) = scan(tier);
    ids.iter()
        .map(|id| {
            records
                .iter()
                .find(|info| info.id == *id)
                .expect("written")
                .clone()
        })
        .collect()
}

/// A clock that a test moves.
pub fn sim_clock() -> Arc<dyn Clock> {
    Arc::new(stemkv_store::SimClock::default())
}
