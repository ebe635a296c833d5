//! What is written, moved and removed.

use super::*;

pub(super) fn a_written_record_is_visible_on_return_and_after_reopening(home: &dyn Home) {
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

pub(super) fn an_empty_batch_and_an_empty_read_are_fine(home: &dyn Home) {
    let tier = home.open(ROOMY).unwrap();
    assert_eq!(tier.write(&[]).unwrap().unwrap(), []);
    assert!(read_all(&*tier, Vec::new()).is_empty());
    tier.remove(&[]).unwrap();
    tier.touch(&[], 1).unwrap();
}

pub(super) fn ids_ascend_in_the_order_of_writing(home: &dyn Home) {
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

pub(super) fn a_batch_over_the_capacity_is_refused_whole_and_fits_after_removal(home: &dyn Home) {
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

pub(super) fn removed_records_are_gone_also_after_reopening_and_unknown_ids_are_ignored(
    home: &dyn Home,
) {
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

pub(super) fn ids_stay_the_same_and_readable_when_cleaning_moves_the_bytes(home: &dyn Home) {
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

pub(super) fn a_batch_can_be_begun_behind_one_under_way_and_becomes_durable_after_it(
    home: &dyn Home,
) {
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
pub(super) fn ten_threads_leave_exactly_what_was_written_and_not_removed(home: &dyn Home) {
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
