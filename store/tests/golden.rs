//! A small store as the present format has it lies in `golden/v0`: raw records and ones of both codecs, of
//! two namespaces, one removed, one touched, a value of the layer above. It opens, every byte is as it was
//! saved, and what is written today is the same bytes: a change of the format cannot slip by.
//!
//! Where the format is meant to change: `cargo test … --test golden -- --ignored` makes it anew.

#![cfg(all(feature = "rocksdb", feature = "sim"))]
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use stemkv_store::disk::RocksDisk;
use stemkv_store::{
    Checksummer, Clock as _, CodecId, DiskTier, HostArena, Key, RecordHeader, RecordInfo, SimClock,
    Slot,
};
use support::{Random, arena, copy, files, geometry, read, scan};

const CAPACITY: u64 = 16 << 20;
const VALUE: &[u8] = b"a value of the layer above";

/// A record: its namespace, its depth there, its codec.
type Record = (u8, u32, CodecId);

/// By payload file. What zstd makes of the `planes` of the last one is its own choice.
const FILES: [&[Record]; 3] = [
    &[(1, 0, CodecId::Raw), (1, 1, CodecId::Exp)],
    &[(2, 0, CodecId::Exp), (2, 1, CodecId::Raw)],
    &[(1, 2, CodecId::Planes)],
];
const REMOVED: Record = (2, 1, CodecId::Raw);
const TOUCHED: Record = (1, 0, CodecId::Raw);

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v0")
}

fn open(dir: &Path) -> (RocksDisk, Arc<SimClock>) {
    let clock = Arc::new(SimClock::default());
    let tier = RocksDisk::open(dir, &geometry(), CAPACITY, clock.clone()).unwrap();
    (tier, clock)
}

fn namespace(number: u8) -> Key {
    Key([number; 32])
}

fn key((number, depth, _): Record) -> Key {
    let mut key = [number; 32];
    key[0] = 0x80 | depth as u8;
    Key(key)
}

/// Values whose exponents are close to each other, as those of KV are, with some far away.
fn payload(record: Record) -> Vec<u8> {
    let mut random = Random(Checksummer::of(&key(record).0).0);
    let value = |_| {
        let bits = random.next();
        let exponent = match bits >> 58 {
            0 => 3 + (bits >> 56) as u16 % 16,
            _ => 118 + (bits >> 50) as u16 % 6,
        };
        ((bits as u16 & 0x807f) | (exponent << 7)).to_le_bytes()
    };
    let values = geometry().payload_bytes() / 2;
    (0..values).flat_map(value).collect()
}

fn slot(arena: &HostArena, record: Record) -> Slot {
    let (number, depth, codec) = record;
    let geometry = geometry();
    let room = |payload: usize| arena.allocate(payload, 1).and_then(|mut slots| slots.pop());
    let mut filling = room(geometry.payload_bytes()).unwrap();
    let bytes = payload(record);
    filling.image_mut().unwrap()[RecordHeader::BYTES..][..bytes.len()].copy_from_slice(&bytes);
    for layer in geometry.layer_ids() {
        let at = layer.0 as usize * geometry.slab_stride();
        let sum = Checksummer::of(&bytes[at..][..geometry.slab_bytes()]);
        filling.set_slab(layer, sum);
    }
    let parent = depth.checked_sub(1);
    let raw = filling.seal(RecordHeader {
        namespace: namespace(number),
        parent: parent.map_or(namespace(number), |above| key((number, above, codec))),
        key: key(record),
        depth,
        tokens: geometry.block_tokens - depth,
        geometry: geometry.fingerprint(),
        layers: 0..geometry.layers,
        codec: CodecId::Raw,
        slabs: Vec::new(),
    });
    match codec {
        CodecId::Raw => raw.unwrap(),
        codec => {
            let coded = raw.unwrap().encoded(codec, room).unwrap();
            coded.expect("it shrinks by a page")
        }
    }
}

/// The store that `golden/v0` is.
fn make(dir: &Path) {
    let (arena, (tier, clock)) = (arena(8), open(dir));
    for records in FILES {
        clock.advance(Duration::from_secs(1));
        let batch: Vec<_> = records.iter().map(|record| slot(&arena, *record)).collect();
        tier.write(&batch).unwrap().unwrap();
    }
    let ids: BTreeMap<Key, _> = scan(&tier)
        .0
        .iter()
        .map(|info| (info.key, info.id))
        .collect();
    tier.remove(&[ids[&key(REMOVED)]]).unwrap();
    tier.touch(&[ids[&key(TOUCHED)]], clock.unix_ms() + 7)
        .unwrap();
    tier.put_meta(&namespace(1), VALUE).unwrap();
    tier.close().unwrap();
    // What no opening needs, and what says where it was made.
    for file in files(dir) {
        let name = file.file_name().unwrap().to_str().unwrap();
        let is_needless = ["LOG", "LOCK", "IDENTITY", "OPTIONS", "stemkv.lock"];
        if is_needless
            .iter()
            .any(|needless| name.starts_with(needless))
        {
            fs::remove_file(dir.join(&file)).unwrap();
        }
    }
}

// Not a check: run by hand, it rewrites the data that the test below compares, after a wanted change of
// the format.
#[test]
#[ignore = "makes the golden store anew"]
fn make_it_anew() {
    let _ = fs::remove_dir_all(golden());
    make(&golden());
    fs::remove_dir(golden().join("staging")).unwrap();
    let bytes: u64 = files(&golden())
        .iter()
        .map(|file| fs::metadata(golden().join(file)).unwrap().len())
        .sum();
    assert!(bytes < 200_000, "{bytes} bytes are much for a repository");
}

#[test]
fn the_golden_store_opens_and_every_byte_is_as_it_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    copy(&golden(), dir.path());
    let (tier, clock) = open(dir.path());
    let arena = arena(8);
    let (infos, found) = scan(&tier);
    assert_eq!((infos.len(), found.dropped), (4, 0), "{infos:?}");
    let by_key: BTreeMap<Key, RecordInfo> =
        infos.into_iter().map(|info| (info.key, info)).collect();
    let mut second = 0;
    for records in FILES {
        second += 1000;
        for &record in records.iter().filter(|record| **record != REMOVED) {
            let info = &by_key[&key(record)];
            let ours = slot(&arena, record);
            let header = ours.header().unwrap();
            assert_eq!(info.namespace, header.namespace);
            assert_eq!((info.parent, info.depth), (header.parent, header.depth));
            let used_at = match record == TOUCHED {
                true => 3000 + 7,
                false => second,
            };
            assert_eq!(info.last_use_ms, clock.unix_ms() + used_at, "{record:?}");
            let stored = read(&tier, &arena, info).unwrap();
            let room = |bytes: usize| arena.allocate(bytes, 1).and_then(|mut slots| slots.pop());
            let raw = match record.2 {
                CodecId::Raw => stored.clone(),
                _ => {
                    let room = room(geometry().payload_bytes()).unwrap();
                    stored.decoded(room).unwrap()
                }
            };
            let bytes = payload(record);
            assert!(
                raw.image()[RecordHeader::BYTES..][..bytes.len()] == bytes,
                "{record:?}"
            );
            if record.2 != CodecId::Planes {
                assert_eq!(stored.header().unwrap(), header, "{record:?}");
                assert!(
                    stored.image() == ours.image(),
                    "{record:?} is encoded otherwise"
                );
            }
        }
    }
    let mut metas = Vec::new();
    tier.scan_meta(&mut |key, value| metas.push((key, value.to_vec())))
        .unwrap();
    assert_eq!(metas, [(namespace(1), VALUE.to_vec())]);
}

#[test]
fn what_is_written_today_are_the_golden_stores_bytes() {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path());
    let manifest = |dir: &Path| fs::read_to_string(dir.join("stemkv.json")).unwrap();
    assert_eq!(manifest(dir.path()), manifest(&golden()));
    let payload = |dir: &Path| -> Vec<Vec<u8>> {
        let folder = dir.join("db-0/payload");
        let names = files(&folder).into_iter().take(2);
        names
            .map(|name| fs::read(folder.join(name)).unwrap())
            .collect()
    };
    let (ours, theirs) = (payload(dir.path()), payload(&golden()));
    assert_eq!(ours.len(), 2);
    assert!(ours == theirs, "a payload file has other bytes");
}
