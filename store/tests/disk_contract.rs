//! The contract of `DiskTier`, sentence by sentence, over every implementation.
//!
//! Each function below shows one promise of the trait's documentation; the macro at the end runs
//! all of them on all tiers. "Reopening" closes nothing that it need not: the tier is dropped and
//! the same folder or medium opened again.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU64;
use std::sync::{Arc, Barrier};

use stemkv_store::{
    CodecId, DiskTier, ErrorKind, Key, META_BYTES_MAX, RecordId, RecordInfo, Result,
};
use support::*;

/// A place where tiers of one kind can be opened again and again.
trait Home: Sync {
    fn open(&self, capacity_bytes: u64) -> Result<Arc<dyn DiskTier>>;

    /// Flips a bit of the image stored under `key`.
    fn flip_bit(&self, key: &Key, bit: usize);
}

const ROOMY: u64 = 64 << 20;

fn a_written_record_is_visible_on_return_and_after_reopening(home: &dyn Home) {
    let arena = arena(32);
    let tier = home.open(ROOMY).unwrap();
    let ids = tier.write(&chain(&arena, 1, 5)).unwrap().unwrap();
    assert_eq!(ids.len(), 5);
    let before = assert_all_right(&*tier, &arena);
    assert_eq!(before.len(), 5);
    drop(tier);
    let tier = home.open(ROOMY).unwrap();
    let after = assert_all_right(&*tier, &arena);
    assert_eq!(
        after
            .iter()
            .map(|info| (info.key, info.parent, info.depth, info.bytes))
            .collect::<Vec<_>>(),
        before
            .iter()
            .map(|info| (info.key, info.parent, info.depth, info.bytes))
            .collect::<Vec<_>>(),
    );
}

fn an_empty_batch_and_an_empty_read_are_fine(home: &dyn Home) {
    let tier = home.open(ROOMY).unwrap();
    assert_eq!(tier.write(&[]).unwrap().unwrap(), []);
    assert!(read_all(&*tier, Vec::new()).is_empty());
    tier.remove(&[]).unwrap();
    tier.touch(&[], 1).unwrap();
}

fn ids_ascend_in_the_order_of_writing(home: &dyn Home) {
    let arena = arena(32);
    let tier = home.open(ROOMY).unwrap();
    let mut all = Vec::new();
    for family in 0..4 {
        all.extend(tier.write(&chain(&arena, family, 3)).unwrap().unwrap());
    }
    assert!(all.is_sorted_by(|a, b| a < b), "{all:?}");
    drop(tier);
    let tier = home.open(ROOMY).unwrap();
    let later = tier.write(&chain(&arena, 9, 3)).unwrap().unwrap();
    assert_eq!(scan(&*tier).0.len(), 15);
    assert!(later.is_sorted_by(|a, b| a < b), "{later:?}");
}

/// Checks a tier, and once more after it was closed and opened again.
fn before_and_after_reopening(
    home: &dyn Home,
    tier: Arc<dyn DiskTier>,
    check: impl Fn(&dyn DiskTier, bool),
) {
    check(&*tier, false);
    tier.close().unwrap();
    check(&*home.open(ROOMY).unwrap(), true);
}

fn a_scan_reports_every_record_also_where_a_parent_was_written_again(home: &dyn Home) {
    let arena = arena(32);
    let tier = home.open(ROOMY).unwrap();
    let ids = tier.write(&chain(&arena, 1, 4)).unwrap().unwrap();
    tier.write(&chain(&arena, 2, 4)).unwrap().unwrap();
    tier.remove(&ids[1..2]).unwrap();
    tier.write(&[chunk(&arena, 1, 1)]).unwrap().unwrap();
    before_and_after_reopening(home, tier, |tier, _| {
        let (records, found) = scan(tier);
        assert_eq!((records.len(), found.dropped), (8, 0));
        let mut known: HashSet<_> = records.iter().map(|info| info.key).collect();
        assert_eq!(known.len(), 8);
        known.insert(root());
        for info in records {
            assert!(known.contains(&info.parent), "{info:?} has no parent");
        }
    });
}

fn every_read_is_answered_once_under_its_own_number(home: &dyn Home) {
    let arena = arena(64);
    let tier = home.open(ROOMY).unwrap();
    for family in 0..5 {
        tier.write(&chain(&arena, family, 4)).unwrap().unwrap();
    }
    let (mut records, _) = scan(&*tier);
    let mut random = Random(7);
    for i in (1..records.len()).rev() {
        records.swap(i, random.below(i + 1));
    }
    let reads = records
        .iter()
        .map(|info| (info.clone(), filling(&arena, info)))
        .collect();
    let answers = read_all(&*tier, reads);
    for (answer, info) in answers.iter().zip(&records) {
        assert_right(answer.as_ref().unwrap(), info);
    }
}

/// Records of several lengths and codecs between each other, as adaptive encoding leaves them.
fn encoded_records_come_back_as_they_were_written_whatever_their_length(home: &dyn Home) {
    let arena = arena(200);
    let tier = home.open(ROOMY).unwrap();
    let raw: Vec<_> = (0..40)
        .map(|depth| kv_chunk(&arena, 1, depth, depth as usize % 8))
        .collect();
    let codecs = [CodecId::Raw, CodecId::Planes, CodecId::Planes];
    let batch: Vec<_> = (0..)
        .zip(&raw)
        .map(|(depth, slot)| {
            let room = |bytes| arena.allocate(bytes, 1)?.pop();
            let coded = slot.encoded(codecs[depth % 3], room).unwrap();
            assert_eq!(coded.is_some(), depth % 3 != 0, "chunk {depth}");
            coded.unwrap_or_else(|| slot.clone())
        })
        .collect();
    let ids = tier.write(&batch).unwrap().unwrap();
    before_and_after_reopening(home, tier, |tier, reopened| {
        let infos = match reopened {
            false => infos_of(tier, &ids),
            true => scan(tier).0,
        };
        assert_eq!(infos.len(), batch.len());
        let lengths: HashSet<u32> = infos.iter().map(|info| info.bytes).collect();
        assert!(lengths.len() > 2, "{lengths:?}");
        // Each into a slot that it just fits, and into one for a whole chunk.
        for is_tight in [true, false] {
            let reads = infos.iter().map(|info| {
                assert_eq!(tier.image_bytes(info), Some(info.bytes));
                let bytes = match is_tight {
                    true => info.bytes,
                    false => RECORD_BYTES as u32,
                };
                let slot = RecordInfo {
                    bytes,
                    ..info.clone()
                };
                (info.clone(), filling(&arena, &slot))
            });
            for (i, answer) in read_all(tier, reads.collect()).into_iter().enumerate() {
                let slot = answer.unwrap();
                let bytes = infos[i].bytes as usize;
                assert!(
                    slot.image()[..bytes] == batch[i].image()[..bytes],
                    "record {i}, tight: {is_tight}"
                );
                let decoded = match slot.codec() {
                    CodecId::Raw => slot,
                    _ => slot
                        .decoded(filling(
                            &arena,
                            &RecordInfo {
                                bytes: RECORD_BYTES as u32,
                                ..infos[i].clone()
                            },
                        ))
                        .unwrap(),
                };
                assert!(decoded.image() == raw[i].image(), "record {i}");
            }
        }
    });
}

fn records_are_handed_over_while_the_rest_is_still_filling(home: &dyn Home) {
    let arena = arena(64);
    let tier = home.open(ROOMY).unwrap();
    let ids = tier.write(&chain(&arena, 1, 40)).unwrap().unwrap();
    let infos = infos_of(&*tier, &ids);
    let reads = infos
        .iter()
        .map(|info| (info.clone(), filling(&arena, info)));
    let mut filling_bytes = Vec::new();
    tier.read(reads.collect(), &mut |i, answer| {
        assert_right(&answer.unwrap(), &infos[i]);
        filling_bytes.push(arena.usage().filling_bytes as u64);
    });
    let expected: Vec<_> = (0..40).rev().map(|left| left * RECORD_BYTES).collect();
    assert_eq!(filling_bytes, expected);
}

fn a_panic_in_the_answer_frees_every_slot(home: &dyn Home) {
    let arena = arena(64);
    let tier = home.open(ROOMY).unwrap();
    let ids = tier.write(&chain(&arena, 1, 40)).unwrap().unwrap();
    let infos = infos_of(&*tier, &ids);
    let reads = infos
        .iter()
        .map(|info| (info.clone(), filling(&arena, info)));
    let reads = reads.collect();
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        tier.read(reads, &mut |_, _| panic!("the caller's own"));
    }));
    assert!(unwound.is_err());
    let usage = arena.usage();
    assert_eq!((usage.filling_bytes, usage.published_bytes), (0, 0));
    assert_eq!(assert_all_right(&*tier, &arena).len(), 40);
}

fn a_batch_over_the_capacity_is_refused_whole_and_fits_after_removal(home: &dyn Home) {
    let capacity = 8 << 20;
    let arena = arena(700);
    let tier = home.open(capacity).unwrap();
    let mut written = Vec::new();
    let missing = loop {
        let family = written.len() as u64;
        let usage = tier.usage();
        assert!(usage.used_bytes <= usage.capacity_bytes, "{usage:?}");
        match tier.write(&chain(&arena, family, 16)).unwrap() {
            Ok(ids) => written.push(ids),
            Err(refused) => break refused.missing_bytes,
        }
        assert!(written.len() < 1000, "the capacity never refuses");
    };
    assert!(missing > 0);
    assert!(written.len() >= 8, "only {} batches fit", written.len());
    assert_eq!(assert_all_right(&*tier, &arena).len(), written.len() * 16);
    tier.remove(&written[0]).unwrap();
    tier.remove(&written[1]).unwrap();
    tier.remove(&written[2]).unwrap();
    assert!(tier.reclaim(16 * RECORD_BYTES).unwrap() >= 16 * RECORD_BYTES);
    tier.write(&chain(&arena, 5000, 16)).unwrap().unwrap();
    assert_eq!(
        assert_all_right(&*tier, &arena).len(),
        (written.len() - 2) * 16
    );
    let usage = tier.usage();
    assert_eq!(
        (usage.capacity_bytes, usage.records),
        (capacity, (written.len() as u64 - 2) * 16)
    );
    assert!(
        usage.used_bytes <= capacity && usage.live_bytes <= usage.used_bytes,
        "{usage:?}"
    );
    assert_eq!(usage.live_bytes, usage.records * RECORD_BYTES);
}

fn removed_records_are_gone_also_after_reopening_and_unknown_ids_are_ignored(home: &dyn Home) {
    let arena = arena(32);
    let tier = home.open(ROOMY).unwrap();
    let ids = tier.write(&chain(&arena, 1, 6)).unwrap().unwrap();
    let infos = infos_of(&*tier, &ids);
    let unknown = RecordId(NonZeroU64::new(1 << 40).unwrap());
    tier.remove(&[ids[5], unknown, ids[4], ids[4]]).unwrap();
    tier.remove(&[unknown, ids[5]]).unwrap();
    let error = read(&*tier, &arena, &infos[5]).expect_err("removed");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert_right(&read(&*tier, &arena, &infos[3]).unwrap(), &infos[3]);
    drop(tier);
    let tier = home.open(ROOMY).unwrap();
    let left = assert_all_right(&*tier, &arena);
    assert_eq!(
        left.iter().map(|info| info.depth).collect::<Vec<_>>(),
        [0, 1, 2, 3]
    );
}

fn ids_stay_the_same_and_readable_when_cleaning_moves_the_bytes(home: &dyn Home) {
    let capacity = 8 << 20;
    let arena = arena(700);
    let tier = home.open(capacity).unwrap();
    let mut ids = Vec::new();
    while let Ok(more) = tier.write(&chain(&arena, ids.len() as u64, 8)).unwrap() {
        ids.extend(more);
    }
    // One record of each batch stays: every file is sparse, none is dead.
    let (keep, go): (Vec<_>, Vec<_>) = ids.iter().enumerate().partition(|(i, _)| i % 8 == 0);
    let keep: Vec<RecordId> = keep.into_iter().map(|(_, id)| *id).collect();
    let go: Vec<RecordId> = go.into_iter().map(|(_, id)| *id).collect();
    let infos = infos_of(&*tier, &keep);
    tier.remove(&go).unwrap();
    let want = capacity / 2;
    let free = tier.reclaim(want).unwrap();
    assert!(free >= want, "{free} of {want} bytes: {:?}", tier.usage());
    assert!(tier.usage().used_bytes <= capacity);
    for info in &infos {
        assert_right(&read(&*tier, &arena, info).unwrap(), info);
    }
    assert_eq!(infos_of(&*tier, &keep), infos);
    let mut batches = 0;
    while let Ok(_more) = tier.write(&chain(&arena, 10_000 + batches, 8)).unwrap() {
        batches += 1;
    }
    assert!(batches * 8 * RECORD_BYTES >= want, "the space was promised");
    drop(tier);
    let tier = home.open(capacity).unwrap();
    assert_eq!(
        assert_all_right(&*tier, &arena).len() as u64,
        keep.len() as u64 + batches * 8
    );
}

fn a_touch_is_reported_by_scans_and_found_by_the_next_opening(home: &dyn Home) {
    let arena = arena(32);
    let tier = home.open(ROOMY).unwrap();
    let ids = tier.write(&chain(&arena, 1, 3)).unwrap().unwrap();
    let unknown = RecordId(NonZeroU64::new(1 << 40).unwrap());
    tier.touch(&[ids[0], unknown], 2_000_000_000_000).unwrap();
    tier.touch(&[ids[2]], 3_000_000_000_000).unwrap();
    tier.touch(&[ids[2]], 4_000_000_000_000).unwrap();
    let uses = |tier: &dyn DiskTier| -> Vec<u64> {
        scan(tier).0.iter().map(|info| info.last_use_ms).collect()
    };
    let before = uses(&*tier);
    assert_eq!(
        (before[0], before[2]),
        (2_000_000_000_000, 4_000_000_000_000)
    );
    assert_ne!(before[1], 0, "a write is a use");
    tier.close().unwrap();
    let tier = home.open(ROOMY).unwrap();
    assert_eq!(uses(&*tier), before);
}

fn metas_are_kept_replaced_removed_and_bounded(home: &dyn Home) {
    let tier = home.open(ROOMY).unwrap();
    let metas = |tier: &dyn DiskTier| {
        let mut all = Vec::new();
        tier.scan_meta(&mut |key, value| all.push((key, value.to_vec())))
            .unwrap();
        all
    };
    let long = vec![7; META_BYTES_MAX];
    tier.put_meta(&Key([2; 32]), b"old").unwrap();
    tier.put_meta(&Key([2; 32]), &long).unwrap();
    tier.put_meta(&Key([1; 32]), b"one").unwrap();
    tier.put_meta(&Key([3; 32]), b"gone").unwrap();
    tier.put_meta(&Key([3; 32]), b"").unwrap();
    let error = tier
        .put_meta(&Key([1; 32]), &vec![0; META_BYTES_MAX + 1])
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let expected = vec![(Key([1; 32]), b"one".to_vec()), (Key([2; 32]), long)];
    assert_eq!(metas(&*tier), expected);
    drop(tier);
    assert_eq!(metas(&*home.open(ROOMY).unwrap()), expected);
}

fn after_close_every_call_answers_closed(home: &dyn Home) {
    let arena = arena(8);
    let tier = home.open(ROOMY).unwrap();
    let ids = tier.write(&chain(&arena, 1, 2)).unwrap().unwrap();
    let infos = infos_of(&*tier, &ids);
    tier.close().unwrap();
    tier.close().unwrap();
    let closed = ErrorKind::Closed;
    assert_eq!(tier.write(&chain(&arena, 2, 1)).unwrap_err().kind(), closed);
    assert_eq!(
        read(&*tier, &arena, &infos[0]).err().unwrap().kind(),
        closed
    );
    assert_eq!(tier.remove(&ids).unwrap_err().kind(), closed);
    assert_eq!(tier.reclaim(1).unwrap_err().kind(), closed);
    assert_eq!(tier.touch(&ids, 1).unwrap_err().kind(), closed);
    assert_eq!(tier.scan(&mut |_| {}).unwrap_err().kind(), closed);
    assert_eq!(tier.put_meta(&Key::ZERO, b"x").unwrap_err().kind(), closed);
    assert_eq!(tier.scan_meta(&mut |_, _| {}).unwrap_err().kind(), closed);
    assert_eq!(
        arena.usage().filling_bytes,
        0,
        "a refused read frees its slot"
    );
    assert_eq!(
        assert_all_right(&*home.open(ROOMY).unwrap(), &arena).len(),
        2
    );
}

fn a_second_writer_is_refused_while_the_first_is_open(home: &dyn Home) {
    let first = home.open(ROOMY).unwrap();
    let error = home.open(ROOMY).err().expect("open already");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    first.close().unwrap();
    home.open(ROOMY).unwrap();
}

/// One bit in each kind of region: magic, version, every identity field, the tables, each slab.
fn a_flipped_bit_in_any_region_of_a_record_is_corrupt_and_the_rest_stays(home: &dyn Home) {
    let arena = arena(64);
    let header_bytes = [
        0, 8, 10, 16, 24, 56, 88, 120, 124, 128, 136, 140, 200, 256, 268, 319, 4000,
    ];
    let payload_bytes = (0..4).flat_map(|slab| [4096 + slab * 4096, 4096 + slab * 4096 + 4095]);
    let at_bytes: Vec<usize> = header_bytes.into_iter().chain(payload_bytes).collect();
    let tier = home.open(ROOMY).unwrap();
    for (family, _) in at_bytes.iter().enumerate() {
        tier.write(&[chunk(&arena, family as u64, 0)])
            .unwrap()
            .unwrap();
    }
    let healthy = tier.write(&chain(&arena, 1000, 1)).unwrap().unwrap();
    let (records, _) = scan(&*tier);
    for (family, at) in at_bytes.iter().enumerate() {
        home.flip_bit(&key(family as u64, 0), at * 8 + family % 8);
    }
    for info in &records {
        if info.id == healthy[0] {
            assert_right(&read(&*tier, &arena, info).unwrap(), info);
            continue;
        }
        let error = read(&*tier, &arena, info).expect_err("a flipped bit");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert_eq!(arena.usage().filling_bytes, 0);
        tier.remove(&[info.id]).unwrap();
    }
    assert_eq!(assert_all_right(&*tier, &arena).len(), 1);
    drop(tier);
    assert_eq!(
        assert_all_right(&*home.open(ROOMY).unwrap(), &arena).len(),
        1
    );
}

/// A record is asked for with the wrong identity, as a caller's bug or a stale entry would.
fn a_record_is_not_served_under_another_identity(home: &dyn Home) {
    let arena = arena(8);
    let tier = home.open(ROOMY).unwrap();
    let ids = tier.write(&chain(&arena, 1, 2)).unwrap().unwrap();
    let right = infos_of(&*tier, &ids)[1].clone();
    let mut wrong = vec![right.clone(); 3];
    wrong[0].key = key(7, 7);
    wrong[1].parent = key(7, 7);
    wrong[2].namespace = key(7, 7);
    for info in &wrong {
        let error = read(&*tier, &arena, info).expect_err("another identity");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
    assert_right(&read(&*tier, &arena, &right).unwrap(), &right);
}

fn a_batch_can_be_begun_behind_one_under_way_and_becomes_durable_after_it(home: &dyn Home) {
    let arena = arena(8);
    let tier = home.open(ROOMY).unwrap();
    for family in 0..20 {
        let blocks = chain(&arena, family, 6);
        let (begin, begun) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                let tell = &mut |id| begin.send(id).unwrap();
                tier.write_after(&blocks[..3], None, tell).unwrap().unwrap()
            });
            let first_id = begun.recv().unwrap();
            let mut second_id = None;
            let tell = &mut |id| second_id = Some(id);
            let second = tier
                .write_after(&blocks[3..], Some(first_id), tell)
                .unwrap()
                .unwrap();
            // Once the children are there, so are their parents.
            let there: HashSet<Key> = scan(&*tier).0.into_iter().map(|info| info.key).collect();
            assert!((0..6).all(|depth| there.contains(&key(family, depth))));
            assert!(second_id > Some(first_id));
            assert!(first.join().unwrap().iter().max() < second.iter().min());
        });
    }
    assert_all_right(&*tier, &arena);
}

/// Writers, readers, removers and a cleaner at once; then every record that was written and not
/// removed is there, and nothing else.
fn ten_threads_leave_exactly_what_was_written_and_not_removed(home: &dyn Home) {
    let capacity = 48 << 20;
    let arena = arena(1600);
    let tier = home.open(capacity).unwrap();
    let start = Barrier::new(10);
    let kept: HashMap<Key, u32> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..10_u64)
            .map(|thread| {
                let (tier, arena, start) = (&tier, &arena, &start);
                scope.spawn(move || {
                    let mut random = Random(thread);
                    let mut kept = Vec::new();
                    start.wait();
                    for round in 0..12 {
                        let family = thread * 1000 + round;
                        let blocks = 1 + random.below(8) as u32;
                        let ids = tier.write(&chain(arena, family, blocks)).unwrap().unwrap();
                        let infos = infos_of(&**tier, &ids);
                        for info in &infos {
                            assert_right(&read(&**tier, arena, info).unwrap(), info);
                        }
                        let stay = random.below(ids.len() + 1);
                        tier.remove(&ids[stay..]).unwrap();
                        kept.extend(infos[..stay].iter().map(|info| (info.key, info.depth)));
                        if round % 4 == 3 {
                            tier.reclaim(capacity).unwrap();
                        }
                    }
                    kept
                })
            })
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap())
            .collect()
    });
    for reopened in [false, true] {
        let fresh;
        let tier = if reopened {
            tier.close().unwrap();
            fresh = home.open(capacity).unwrap();
            &fresh
        } else {
            &tier
        };
        let found: HashMap<Key, u32> = assert_all_right(&**tier, &arena)
            .into_iter()
            .map(|info| (info.key, info.depth))
            .collect();
        assert_eq!(found, kept, "reopened: {reopened}");
        assert_eq!(tier.usage().records, kept.len() as u64);
    }
}

macro_rules! suite {
    ($home:expr; $($promise:ident)*) => {
        $(#[test]
        fn $promise() {
            crate::$promise(&$home);
        })*
    };
}

macro_rules! on_every_tier {
    ($($promise:ident)*) => {
        mod sim {
            suite!(super::SimHome::default(); $($promise)*);
        }
        #[cfg(feature = "rocksdb")]
        mod rocks {
            suite!(super::RocksHome::default(); $($promise)*);

            // Whatever the system refuses, down to RocksDB's own reads.
            mod threads {
                use stemkv_store::disk::ReadWay;
                suite!(super::super::RocksHome::reading(ReadWay::Threads); $($promise)*);
            }
            mod buffered {
                use stemkv_store::disk::ReadWay;
                suite!(super::super::RocksHome::reading(ReadWay::Buffered); $($promise)*);
            }
            mod get {
                use stemkv_store::disk::ReadWay;
                suite!(super::super::RocksHome::reading(ReadWay::Get); $($promise)*);
            }
        }
    };
}

on_every_tier! {
    a_written_record_is_visible_on_return_and_after_reopening
    an_empty_batch_and_an_empty_read_are_fine
    ids_ascend_in_the_order_of_writing
    a_scan_reports_every_record_also_where_a_parent_was_written_again
    every_read_is_answered_once_under_its_own_number
    encoded_records_come_back_as_they_were_written_whatever_their_length
    records_are_handed_over_while_the_rest_is_still_filling
    a_panic_in_the_answer_frees_every_slot
    a_batch_over_the_capacity_is_refused_whole_and_fits_after_removal
    removed_records_are_gone_also_after_reopening_and_unknown_ids_are_ignored
    ids_stay_the_same_and_readable_when_cleaning_moves_the_bytes
    a_touch_is_reported_by_scans_and_found_by_the_next_opening
    metas_are_kept_replaced_removed_and_bounded
    after_close_every_call_answers_closed
    a_batch_can_be_begun_behind_one_under_way_and_becomes_durable_after_it
    a_second_writer_is_refused_while_the_first_is_open
    a_flipped_bit_in_any_region_of_a_record_is_corrupt_and_the_rest_stays
    a_record_is_not_served_under_another_identity
    ten_threads_leave_exactly_what_was_written_and_not_removed
}

#[derive(Default)]
struct SimHome(stemkv_store::SimMedium);

impl Home for SimHome {
    fn open(&self, capacity_bytes: u64) -> Result<Arc<dyn DiskTier>> {
        let tier = stemkv_store::SimDisk::open(&self.0, &geometry(), capacity_bytes, sim_clock())?;
        Ok(Arc::new(tier))
    }

    fn flip_bit(&self, key: &Key, bit: usize) {
        assert!(self.0.flip_bit(key, bit), "the record is stored");
    }
}

#[cfg(feature = "rocksdb")]
struct RocksHome {
    dir: tempfile::TempDir,
    /// `None`: the best that there is.
    way: Option<stemkv_store::disk::ReadWay>,
}

#[cfg(feature = "rocksdb")]
impl Default for RocksHome {
    fn default() -> Self {
        RocksHome {
            dir: tempfile::tempdir().unwrap(),
            way: None,
        }
    }
}

#[cfg(feature = "rocksdb")]
impl RocksHome {
    fn reading(way: stemkv_store::disk::ReadWay) -> Self {
        RocksHome {
            way: Some(way),
            ..Self::default()
        }
    }
}

#[cfg(feature = "rocksdb")]
impl Home for RocksHome {
    fn open(&self, capacity_bytes: u64) -> Result<Arc<dyn DiskTier>> {
        use stemkv_store::disk::{ReadSizes, RocksDisk};
        let tier = RocksDisk::open(self.dir.path(), &geometry(), capacity_bytes, sim_clock())?;
        Ok(Arc::new(match self.way {
            None => tier,
            Some(way) => {
                let tier = tier.with_read_way(way, ReadSizes::default());
                assert_eq!(tier.read_way(), way);
                tier
            }
        }))
    }

    fn flip_bit(&self, key: &Key, bit: usize) {
        flip_record_bit(self.dir.path(), key, bit);
    }
}
