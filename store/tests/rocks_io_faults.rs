//! The operating system says no to the RocksDB tier: the N-th call fails for every N, of every class of
//! calls, once or until further notice, while a store is used, opened or rebuilt. Each call of the tier is answered; what was acknowledged before
//! stays and is right, what was answered with an error is not visible, and once the fault is over the
//! tier takes records again, without being closed.

#![cfg(all(feature = "rocksdb", feature = "sim"))]
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/failing.rs"]
mod failing;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::{env, fs};

use failing::{CAPACITY, Fault, fail, heal, open, run_child, store_of_child};
use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier, ErrorKind, HostArena, Key};
use support::*;

/// What must be there, and what must not.
#[derive(Default)]
struct Known {
    must: BTreeSet<Key>,
    /// Written or removed with an error: either way is right after the next opening.
    unsure: BTreeSet<Key>,
    /// Families of four blocks, written as two batches.
    pairs: Vec<u64>,
}

impl Known {
    fn keys(family: u64, blocks: u32) -> impl Iterator<Item = Key> {
        (0..blocks).map(move |depth| key(family, depth))
    }

    /// Compares what the tier serves. While it fails, it may also answer errors.
    fn check(&self, tier: &RocksDisk, arena: &HostArena, what: &str, is_failing: bool) {
        let mut infos = Vec::new();
        let scanned = tier.scan(&mut |info| infos.push(info));
        match scanned {
            Err(error) if is_failing => return assert_is_of_the_disk(&error, what),
            scanned => drop(scanned.unwrap_or_else(|error| panic!("{what}: {error:?}"))),
        }
        let mut right = BTreeSet::new();
        for info in &infos {
            match read(tier, arena, info) {
                Ok(slot) => {
                    assert_right(&slot, info);
                    right.insert(info.key);
                }
                Err(error) if is_failing => assert_is_of_the_disk(&error, what),
                Err(error) => panic!("{what}: {error:?}"),
            }
        }
        let strange: Vec<_> = right
            .iter()
            .filter(|key| !self.must.contains(*key) && !self.unsure.contains(*key))
            .collect();
        assert!(
            strange.is_empty(),
            "{what}: {strange:?} should not be there"
        );
        for &family in self.pairs.iter().filter(|_| !is_failing) {
            assert!(
                right.contains(&key(family, 1)) || !right.contains(&key(family, 2)),
                "{what}: children of {family} without their parents"
            );
        }
        let lost: Vec<_> = self.must.difference(&right).collect();
        assert!(is_failing || lost.is_empty(), "{what}: {lost:?} are lost");
    }
}

fn assert_is_of_the_disk(error: &stemkv_store::Error, what: &str) {
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{what}: {error:?}");
}

/// A closed store of some files, with more in the log.
fn sample(dir: &Path, arena: &HostArena) -> Known {
    let mut known = Known::default();
    for opening in 0..2 {
        let tier = open(dir).unwrap();
        for family in 0..3 {
            let family = opening * 10 + family;
            let ids = tier.write(&chain(arena, family, 3)).unwrap().unwrap();
            known.must.extend(Known::keys(family, 3));
            if family % 10 == 1 {
                tier.remove(&ids[1..]).unwrap();
                known.must.remove(&key(family, 1));
                known.must.remove(&key(family, 2));
            }
        }
        tier.put_meta(&root(), b"a value").unwrap();
        tier.close().unwrap();
    }
    known
}

/// Everything that a tier can be asked for, while calls fail.
fn use_it(tier: &RocksDisk, arena: &HostArena, known: &mut Known, what: &str) {
    for family in 100..103 {
        match tier.write(&chain(arena, family, 3)) {
            Ok(ids) => {
                let ids = ids.expect("the capacity is large");
                known.must.extend(Known::keys(family, 3));
                if family == 101 {
                    let keys = [key(family, 2)];
                    match tier.remove(&ids[2..]) {
                        Ok(()) => drop(known.must.remove(&keys[0])),
                        Err(error) => {
                            assert_is_of_the_disk(&error, what);
                            known.must.remove(&keys[0]);
                            known.unsure.extend(keys);
                        }
                    }
                }
            }
            Err(error) => {
                assert_is_of_the_disk(&error, what);
                known.unsure.extend(Known::keys(family, 3));
            }
        }
        write_two(tier, arena, known, 100 + family, what);
        let mut ids = Vec::new();
        match tier.scan(&mut |info| ids.push(info.id)) {
            Ok(_) => {}
            Err(error) => assert_is_of_the_disk(&error, what),
        }
        for answer in [
            tier.touch(&ids, 7),
            tier.put_meta(&key(family, 0), b"another value"),
            tier.reclaim(CAPACITY).map(drop),
        ] {
            if let Err(error) = answer {
                assert_is_of_the_disk(&error, what);
            }
        }
        known.check(tier, arena, what, true);
    }
}

/// Two batches under way, of which the second holds the first one's children.
fn write_two(tier: &RocksDisk, arena: &HostArena, known: &mut Known, family: u64, what: &str) {
    let (first, second) = write_in_two(tier, &chain(arena, family, 4), 2, || {});
    let is_there = first.is_ok();
    for (written, depths) in [(Some(first), 0..2), (second, 2..4)] {
        let keys = depths.map(|depth| key(family, depth));
        match written {
            Some(Ok(ids)) => {
                ids.expect("the capacity is large");
                assert!(is_there, "{what}: children without their parents");
                known.must.extend(keys);
            }
            Some(Err(error)) => {
                assert_is_of_the_disk(&error, what);
                known.unsure.extend(keys);
            }
            None => {}
        }
    }
    known.pairs.push(family);
}

/// Does nothing but in a child.
#[test]
fn the_child_whose_calls_fail() {
    let Some(store) = store_of_child() else {
        return;
    };
    let arena = arena(32);
    let mut tried = BTreeMap::new();
    let faults = [
        ("write", "/store/", libc::ENOSPC),
        ("write", "/staging/", libc::EIO),
        ("write", "/MANIFEST-", libc::EIO),
        ("write", ".log", libc::EIO),
        ("allocate", "/staging/", libc::ENOSPC),
        ("sync", "/store/", libc::EIO),
        ("open", "/store/", libc::EMFILE),
        ("change", "/store/", libc::EROFS),
        ("open", "/store/", libc::EACCES),
        ("read", "/store/", libc::EIO),
        ("rename", "/store/", libc::EIO),
        ("link", "/store/", libc::ENOSPC),
        ("unlink", "/store/", libc::EIO),
        ("mkdir", "/store/", libc::ENOSPC),
        ("truncate", "/store/", libc::EIO),
        ("any", "/store/", libc::EIO),
    ];
    let all = env::var("STEMKV_CRASH").is_ok_and(|value| value == "all");
    for (class, path, errno) in faults {
        for times in [Some(1), Some(3), None] {
            for when in [When::Used, When::Opened, When::Rebuilt] {
                let mut nth = 1;
                loop {
                    let fault = Fault {
                        class,
                        path,
                        nth,
                        times,
                        errno,
                    };
                    let what = format!("{fault:?}, while it is {when:?}");
                    let (matched, failed) = one(&store, &arena, fault, when, &what);
                    *tried.entry(class).or_insert(0) += failed.min(1);
                    if failed == 0 {
                        break;
                    }
                    // Everything in a long run; else each of the first, and then ever fewer.
                    nth += if all { 1 } else { 1 + nth / 4 + matched / 12 };
                }
            }
        }
    }
    println!("calls that failed, by class: {tried:?}");
    assert!(tried.values().all(|&tried| tried > 0), "{tried:?}");
}

/// What is done with the store while calls fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Used,
    Opened,
    /// Opened without RocksDB's `CURRENT`, so that it is made again from its payload files.
    Rebuilt,
}

/// One run with one fault. Returns how many calls matched, and failed.
fn one(store: &Path, arena: &HostArena, fault: Fault, when: When, what: &str) -> (usize, usize) {
    let _ = fs::remove_dir_all(store);
    let mut known = sample(store, arena);
    if when == When::Rebuilt {
        fs::remove_file(store.join("db-0/CURRENT")).unwrap();
        // What was removed may come back.
        for family in [1, 11] {
            known.unsure.extend(Known::keys(family, 3));
        }
    }
    // A medium that does not give what is asked of it, insistently, may cost the index, and records until
    // the next opening.
    let may_lose = when != When::Used
        && fault.errno == libc::EIO
        && matches!(fault.class, "read" | "any")
        && fault.times != Some(1);
    let counts;
    let tier = if when != When::Used {
        fail(fault);
        let opened = open(store);
        if may_lose {
            known.unsure.append(&mut known.must);
            for family in [1, 11] {
                known.unsure.extend(Known::keys(family, 3));
            }
        }
        if let Ok(tier) = &opened {
            use_it(tier, arena, &mut known, what);
        }
        if let Err(error) = &opened {
            assert_is_of_the_disk(error, what);
        }
        counts = heal();
        opened.unwrap_or_else(|_| open(store).unwrap_or_else(|error| panic!("{what}: {error:?}")))
    } else {
        let tier = open(store).unwrap();
        fail(fault);
        use_it(&tier, arena, &mut known, what);
        counts = heal();
        tier
    };
    // Over: it takes more, at the latest at the second attempt, and serves what it had.
    let batch = chain(arena, 200, 2);
    let again = tier.write(&batch).or_else(|_| tier.write(&batch));
    again
        .unwrap_or_else(|error| panic!("{what}: it does not come back: {error:?}"))
        .unwrap();
    known.must.extend(Known::keys(200, 2));
    known.unsure.extend(Known::keys(200, 2));
    known.check(&tier, arena, what, false);
    tier.close()
        .unwrap_or_else(|error| panic!("{what}: {error:?}"));
    let tier = open(store).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    known.check(&tier, arena, what, false);
    let is_rebuilt = !store.join("db-0").exists();
    let must_be = when == When::Rebuilt;
    assert!(
        may_lose && is_rebuilt >= must_be || is_rebuilt == must_be,
        "{what}"
    );
    counts
}

/// Payload files after which the log of the index is synced.
const SYNCED_EACH: u64 = 64;

/// Keys of the records that can be read.
fn readable(tier: &RocksDisk, arena: &HostArena) -> BTreeSet<Key> {
    let (infos, _) = scan(tier);
    let read = infos
        .into_iter()
        .filter(|info| match read(tier, arena, info) {
            Ok(slot) => {
                assert_right(&slot, info);
                true
            }
            Err(_) => false,
        });
    read.map(|info| info.key).collect()
}

/// Does nothing but in a child.
#[test]
fn the_child_whose_cleaning_fails() {
    let Some(store) = store_of_child() else {
        return;
    };
    let arena = arena(8);
    let mut failed_at = Vec::new();
    for (class, path) in [("sync", ".log"), ("write", ".log"), ("sync", "/store/")] {
        // Without and with a sync of the log when the cleaned file is committed.
        for files in [SYNCED_EACH - 1, 5] {
            for nth in 1.. {
                let fault = Fault {
                    class,
                    path,
                    nth,
                    times: Some(1),
                    errno: libc::EIO,
                };
                let what = format!("{fault:?}, behind {files} files");
                if !cleaning_fails(&store, &arena, files, fault, &what) {
                    break;
                }
                failed_at.push((class, path, nth));
            }
        }
    }
    println!("calls that failed: {failed_at:?}");
    assert!(failed_at.len() > 8, "{failed_at:?}");
}

/// One cleaning of a store of so many files, of which one call fails, if it comes to it.
fn cleaning_fails(store: &Path, arena: &HostArena, files: u64, fault: Fault, what: &str) -> bool {
    let killed = store.with_file_name("killed");
    let tier = open(store).unwrap().without_holes();
    let ids = tier.write(&chain(arena, 1, 8)).unwrap().unwrap();
    tier.remove(&ids[4..]).unwrap();
    for family in 0..files {
        tier.write(&chain(arena, 100 + family, 1)).unwrap().unwrap();
    }
    let known = readable(&tier, arena);
    assert_eq!(known.len() as u64, 4 + files);
    fail(fault);
    if let Err(error) = tier.reclaim(u64::MAX) {
        assert_is_of_the_disk(&error, what);
    }
    let (_, failed) = heal();
    // What is there for the next process, were this one killed now.
    copy(store, &killed);
    assert_eq!(readable(&tier, arena), known, "{what}");
    let back = chain(arena, 99, 1);
    let written = tier.write(&back).or_else(|_| tier.write(&back));
    written.unwrap().unwrap();
    tier.reclaim(u64::MAX).unwrap();
    let mut more = known.clone();
    more.insert(key(99, 0));
    assert_eq!(readable(&tier, arena), more, "{what}, once it is over");
    tier.close().unwrap();
    for (store, known, when) in [(store, more, "closed"), (&*killed, known, "killed")] {
        let tier = open(store).unwrap();
        let mut found = readable(&tier, arena);
        if when == "killed" && !store.join("db-0").exists() {
            // Rebuilt: what was removed may come back.
            Known::keys(1, 8)
                .skip(4)
                .for_each(|key| _ = found.remove(&key));
        }
        assert!(found == known, "{what}, {when}: {found:?}");
        assert_eq!(scan(&tier).1.dropped, 0, "{what}, {when}");
        tier.close().unwrap();
        fs::remove_dir_all(store).unwrap();
    }
    failed > 0
}

/// Does nothing but in a child.
#[test]
fn the_child_that_drops_files() {
    let Some(store) = store_of_child() else {
        return;
    };
    let arena = arena(2);
    let tier = open(&store).unwrap();
    let written = (0..60).map(|family| tier.write(&chain(&arena, family, 2)).unwrap().unwrap());
    let ids: Vec<_> = written.flatten().collect();
    // None fails: they are counted.
    fail(Fault {
        class: "sync",
        path: "MANIFEST",
        nth: 10_000,
        times: Some(1),
        errno: libc::EIO,
    });
    // Fifty-eight files go, in two stretches.
    tier.remove(&[&ids[..40], &ids[42..118]].concat()).unwrap();
    let (syncs, _) = heal();
    assert_eq!(tier.usage().files, 2);
    assert_eq!(readable(&tier, &arena).len(), 4);
    assert!((1..=2).contains(&syncs), "{syncs} syncs of the manifest");
    println!("calls that failed: none, {syncs} syncs");
}

#[test]
fn files_that_lie_together_are_dropped_with_one_sync() {
    run("the_child_that_drops_files");
}

#[test]
fn a_call_that_fails_while_records_are_moved_loses_none() {
    run("the_child_whose_cleaning_fails");
}

#[test]
fn a_call_that_fails_is_answered_and_the_tier_comes_back() {
    run("the_child_whose_calls_fail");
}

fn run(name: &str) {
    let memory = Path::new("/dev/shm");
    let dir = match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    };
    let text = run_child(name, dir.path());
    let summary = text.lines().find(|line| line.contains("calls that failed"));
    println!("{}", summary.expect("the child did something"));
}
