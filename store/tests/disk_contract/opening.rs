//! What scans, metas and touches tell, and what opening and closing do.

use super::*;

/// Checks a tier, and once more after it was closed and opened again.
pub(super) fn before_and_after_reopening(
    home: &dyn Home,
    tier: Arc<dyn DiskTier>,
    check: impl Fn(&dyn DiskTier, bool),
) {
    check(&*tier, false);
    tier.close().unwrap();
    check(&*home.open(ROOMY).unwrap(), true);
}

pub(super) fn a_scan_reports_every_record_also_where_a_parent_was_written_again(home: &dyn Home) {
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

pub(super) fn a_touch_is_reported_by_scans_and_found_by_the_next_opening(home: &dyn Home) {
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

pub(super) fn metas_are_kept_replaced_removed_and_bounded(home: &dyn Home) {
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

pub(super) fn after_close_every_call_answers_closed(home: &dyn Home) {
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

pub(super) fn a_second_writer_is_refused_while_the_first_is_open(home: &dyn Home) {
    let first = home.open(ROOMY).unwrap();
    let error = home.open(ROOMY).err().expect("open already");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    first.close().unwrap();
    home.open(ROOMY).unwrap();
}
