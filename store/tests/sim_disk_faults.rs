//! What the simulated disk loses, and what it does not: power cut at every sync, failure of every
//! call. The same schedule of writes, removals, touches and metas is run for each n; an oracle knows
//! what had been acknowledged, what was under way, and what may be there afterwards.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeSet;

use stemkv_store::{DiskTier, Key, RecordId, Result, SimDisk, SimMedium};
use support::*;

/// What must and what may be on the medium.
#[derive(Default)]
struct Oracle {
    /// Acknowledged and not asked to be removed.
    must: BTreeSet<Key>,
    /// Was ever handed to the tier and not acknowledged as removed.
    may: BTreeSet<Key>,
}

fn open(medium: &SimMedium) -> Result<SimDisk> {
    SimDisk::open(medium, &geometry(), 4 << 20, sim_clock())
}

/// Runs the schedule; a failing step is skipped and the rest goes on, as an engine would.
fn run(medium: &SimMedium, arena: &stemkv_store::HostArena, oracle: &mut Oracle) {
    let tier = open(medium).unwrap();
    let mut random = Random(11);
    let mut written: Vec<(RecordId, Key)> = Vec::new();
    for family in 0..6 {
        let batch = chain(arena, family, 1 + random.below(4) as u32);
        let keys: Vec<Key> = batch
            .iter()
            .map(|slot| slot.header().unwrap().key)
            .collect();
        oracle.may.extend(&keys);
        if let Ok(Ok(ids)) = tier.write(&batch) {
            oracle.must.extend(&keys);
            written.extend(ids.into_iter().zip(keys));
        }
        if random.below(2) == 0
            && let Some((id, key)) = written.pop()
        {
            oracle.must.remove(&key);
            if tier.remove(&[id]).is_ok() {
                oracle.may.remove(&key);
            }
        }
        if let Some((id, _)) = written.first() {
            let _ = tier.touch(&[*id], family);
        }
        let _ = tier.put_meta(&Key([family as u8; 32]), b"meta");
        let _ = tier.reclaim(1);
        for (id, key) in &written {
            let info = infos_of(&tier, &[*id]).pop().unwrap();
            assert_eq!(info.key, *key);
            if let Ok(slot) = read(&tier, arena, &info) {
                assert_right(&slot, &info);
            }
        }
    }
}

fn check(medium: &SimMedium, arena: &stemkv_store::HostArena, oracle: &Oracle, what: &str) {
    let tier = open(medium).unwrap();
    let found: BTreeSet<Key> = assert_all_right(&tier, arena)
        .into_iter()
        .map(|info| info.key)
        .collect();
    assert!(
        oracle.must.is_subset(&found),
        "{what}: acknowledged records are lost"
    );
    assert!(
        found.is_subset(&oracle.may),
        "{what}: records that nobody wrote, or removed ones"
    );
    tier.write(&chain(arena, 99, 2)).unwrap().unwrap();
    assert_eq!(
        assert_all_right(&tier, arena).len(),
        found.len() + 2,
        "{what}"
    );
}

#[test]
fn a_power_cut_at_any_sync_keeps_what_was_acknowledged_and_invents_nothing() {
    let arena = arena(64);
    let medium = SimMedium::default();
    run(&medium, &arena, &mut Oracle::default());
    let syncs = medium.syncs();
    assert!(syncs > 12, "{syncs}");
    for n in 1..=syncs {
        let (medium, mut oracle) = (SimMedium::default(), Oracle::default());
        medium.cut_power_at_sync(n);
        run(&medium, &arena, &mut oracle);
        for seed in 0..16 {
            let left = medium.after_power_cut(seed);
            check(
                &left,
                &arena,
                &oracle,
                &format!("cut at sync {n}, seed {seed}"),
            );
        }
    }
}

#[test]
fn any_failing_call_loses_only_its_own_step() {
    let arena = arena(64);
    let medium = SimMedium::default();
    run(&medium, &arena, &mut Oracle::default());
    let calls = medium.calls();
    assert!(calls > 40, "{calls}");
    for n in 1..=calls {
        let (medium, mut oracle) = (SimMedium::default(), Oracle::default());
        medium.fail_call(n);
        run(&medium, &arena, &mut oracle);
        assert_eq!(
            arena.usage().published_bytes + arena.usage().filling_bytes,
            0
        );
        check(&medium, &arena, &oracle, &format!("call {n} fails"));
    }
}

#[test]
fn the_same_calls_give_the_same_trace() {
    let traces = [(), ()].map(|()| {
        let medium = SimMedium::default();
        medium.fail_call(9);
        run(&medium, &arena(64), &mut Oracle::default());
        medium.trace()
    });
    assert!(traces[0].lines().count() > 40 && traces[0].contains("fails"));
    assert_eq!(traces[0], traces[1]);
}

#[test]
fn another_geometry_is_refused_with_what_differs() {
    let medium = SimMedium::default();
    drop(open(&medium).unwrap());
    let mut other = geometry();
    other.block_tokens = 32;
    let error = SimDisk::open(&medium, &other, 1 << 20, sim_clock())
        .err()
        .unwrap();
    assert!(
        error
            .to_string()
            .contains("block_tokens: 32 here, 16 there"),
        "{error}"
    );
    drop(open(&medium).unwrap());
}
