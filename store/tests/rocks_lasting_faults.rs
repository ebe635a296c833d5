//! Faults that last: a folder that nobody may write to, a sector that cannot be read, no thread to be had.
//! The tier answers, serves what it can, loses nothing, and works again once the fault is over.

#![cfg(all(feature = "rocksdb", feature = "sim"))]
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/failing.rs"]
mod failing;
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use failing::{
    CAPACITY, Fault, HANGS, assert_unavailable, fail, failed, heal, lasting, open, store_of_child,
};
use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier, ErrorKind, Key, SimClock};
use support::*;

/// Runs the test `name` of this file in a process whose calls can fail.
fn run_child(name: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let text = failing::run_child(name, scratch.path());
    assert!(text.contains("the child did it"), "{text}");
}

fn keys(tier: &RocksDisk) -> BTreeSet<Key> {
    let right = assert_all_right(tier, &arena(1));
    right.into_iter().map(|info| info.key).collect()
}

/// The name of the payload file that has a record of this key.
fn file_of(store: &Path, wanted: Key) -> &'static str {
    let mut found = None;
    RocksDisk::salvage(store, &mut |path, _, header| {
        if header.key == wanted {
            found = path
                .file_name()
                .map(|name| name.to_str().unwrap().to_owned());
        }
    })
    .unwrap();
    found.expect("it has a file").leak()
}

/// Does nothing but in a child.
#[test]
fn the_child_whose_folder_is_read_only() {
    let Some(store) = store_of_child() else {
        return;
    };
    let arena = arena(64);
    let known = sample(&store, &arena, |dir| open(dir).unwrap());
    let before = files(&store);

    fail(lasting("change", "/store/", libc::EROFS));
    let error = open(&store).expect_err("it cannot be written");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("/store"), "{error}");
    let reader = RocksDisk::open_read_only(&store, sim_clock()).expect("for reading it opens");
    assert_eq!(keys(&reader), known);
    drop(reader);
    assert!(heal().1 > 0);
    assert_eq!(files(&store), before);

    // It becomes so under an open store.
    let tier = open(&store).unwrap();
    let (infos, _) = scan(&tier);
    fail(lasting("change", "/store/", libc::EROFS));
    assert_unavailable(tier.write(&chain(&arena, 500, 3)));
    assert_unavailable(tier.remove(&[infos[0].id]));
    assert_unavailable(tier.touch(&[infos[0].id], 7));
    assert_unavailable(tier.put_meta(&root(), b"no"));
    assert_eq!(keys(&tier), known);
    heal();
    let batch = chain(&arena, 501, 3);
    let written = tier.write(&batch).or_else(|_| tier.write(&batch));
    written.expect("the fault is over").unwrap();
    let now = keys(&tier);
    assert_eq!(now.len(), known.len() + 3);
    tier.close().unwrap();
    assert_eq!(keys(&open(&store).unwrap()), now);
    println!("the child did it");
}

#[test]
fn a_read_only_folder_is_refused_by_name_read_and_used_again_when_it_is_not() {
    run_child("the_child_whose_folder_is_read_only");
}

/// Does nothing but in a child.
#[test]
fn the_child_with_a_bad_sector() {
    let Some(store) = store_of_child() else {
        return;
    };
    let arena = arena(64);
    let clock = Arc::new(SimClock::default());
    let tier = RocksDisk::open(&store, &geometry(), CAPACITY, clock.clone()).unwrap();
    let tier = tier.without_holes();
    let mut kept = BTreeSet::new();
    // The first file is the sparsest.
    for (family, live) in [(1, 1), (2, 3), (3, 3)] {
        let ids = tier.write(&chain(&arena, family, 4)).unwrap().unwrap();
        tier.remove(&ids[live as usize..]).unwrap();
        kept.extend((0..live).map(|depth| key(family, depth)));
    }
    let bad = file_of(&store, key(1, 0));

    fail(lasting("read", bad, libc::EIO));
    tier.reclaim(CAPACITY).expect("other files give space");
    let usage = tier.usage();
    assert_eq!((usage.files, usage.records), (2, 7), "{usage:?}");
    // It is left alone for a while.
    let (_, failed) = heal();
    assert!(failed > 0);
    tier.reclaim(CAPACITY).unwrap();
    assert_eq!(tier.usage(), usage);
    assert_eq!(keys(&tier), kept);
    clock.advance(Duration::from_secs(60));
    tier.reclaim(CAPACITY).unwrap();
    let moved = tier.usage().rewritten_bytes - usage.rewritten_bytes;
    assert_eq!(moved, RECORD_BYTES);
    assert_eq!(keys(&tier), kept);

    // Where nothing can be read, that is said.
    let ids = tier.write(&chain(&arena, 4, 4)).unwrap().unwrap();
    tier.remove(&ids[1..]).unwrap();
    fail(lasting("read", "/payload/", libc::EIO));
    // Told from a system that refuses: the store above drops a record for it.
    let (records, _) = scan(&tier);
    assert!(!records.is_empty());
    for info in &records {
        let error = read(&tier, &arena, info).expect_err("nothing can be read");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.is_unreadable(), "{error:?}");
    }
    for attempt in 0..3 {
        let answer = tier.reclaim(CAPACITY);
        let first = attempt == 0;
        assert!(
            first || answer.is_ok(),
            "there is nothing left to try: {answer:?}"
        );
    }
    heal();
    println!("the child did it");
}

#[test]
fn a_file_with_a_bad_sector_does_not_keep_others_from_being_cleaned() {
    run_child("the_child_with_a_bad_sector");
}

/// Does nothing but in a child.
#[test]
fn the_child_whose_file_system_makes_no_holes() {
    let Some(store) = store_of_child() else {
        return;
    };
    let (arena, tier) = (arena(64), open(&store).unwrap());
    let mut kept = BTreeSet::new();
    let mut thin_out = |family| {
        let ids = tier.write(&chain(&arena, family, 12)).unwrap().unwrap();
        tier.remove(&ids[5..]).unwrap();
        kept.extend((0..5).map(|depth| key(family, depth)));
    };
    // Something fails: what is left in that file is moved, and the other one gets its holes.
    thin_out(1);
    thin_out(2);
    fail(Fault {
        times: Some(1),
        ..lasting("allocate", "/payload/", libc::EIO)
    });
    let before = tier.usage();
    tier.reclaim(CAPACITY).unwrap();
    assert_eq!(heal(), (8, 1));
    let after = tier.usage();
    assert_eq!(after.files, 2, "{after:?}");
    assert_eq!(after.rewritten_bytes, 5 * RECORD_BYTES, "{after:?}");
    let gained = before.used_bytes - after.used_bytes;
    assert!(gained >= 12 * RECORD_BYTES, "{gained} bytes");

    // None can be made: records are moved.
    thin_out(3);
    fail(lasting("allocate", "/payload/", libc::EOPNOTSUPP));
    tier.reclaim(CAPACITY).unwrap();
    assert_eq!(heal(), (1, 1));
    let usage = tier.usage();
    assert_eq!(usage.files, 2, "{usage:?}");
    assert_eq!(usage.rewritten_bytes, 15 * RECORD_BYTES);
    assert_eq!(keys(&tier), kept);
    assert_all_right(&tier, &arena);
    tier.close().unwrap();
    assert_eq!(keys(&open(&store).unwrap()), kept);
    println!("the child did it");
}

#[test]
fn records_are_moved_where_the_file_system_makes_no_holes() {
    run_child("the_child_whose_file_system_makes_no_holes");
}

/// Does nothing but in a child.
#[test]
fn the_child_in_which_a_hole_fails() {
    let Some(store) = store_of_child() else {
        return;
    };
    let clock = Arc::new(SimClock::default());
    let tier = RocksDisk::open(&store, &geometry(), CAPACITY, clock.clone()).unwrap();
    let arena = arena(64);
    // So few that the rest is not worth moving.
    let ids = tier.write(&chain(&arena, 1, 12)).unwrap().unwrap();
    tier.remove(&ids[8..]).unwrap();
    for (what, nth, made) in [("open", 1, 0), ("allocate", 2, 1), ("allocate", 1, 0)] {
        fail(Fault {
            nth,
            times: Some(1),
            ..lasting(what, file_of(&store, key(1, 0)), libc::EIO)
        });
        let before = tier.usage();
        tier.reclaim(CAPACITY).unwrap();
        assert_eq!(heal().1, 1, "{what}");
        let gained = before.used_bytes - tier.usage().used_bytes;
        assert_eq!(gained, made * RECORD_BYTES, "{what}");
        // For a while it is not tried again.
        tier.reclaim(CAPACITY).unwrap();
        assert_eq!(tier.usage().used_bytes, before.used_bytes - gained);
        clock.advance(Duration::from_secs(60));
    }
    let before = tier.usage();
    tier.reclaim(CAPACITY).unwrap();
    let gained = before.used_bytes - tier.usage().used_bytes;
    // The file system may take a page for where the holes are.
    assert!(gained + 4096 >= 3 * RECORD_BYTES, "{gained} bytes");
    assert_eq!(tier.usage().rewritten_bytes, 0);
    assert_eq!(keys(&tier).len(), 8);
    println!("the child did it");
}

#[test]
fn space_that_did_not_come_back_once_comes_back_later() {
    run_child("the_child_in_which_a_hole_fails");
}

/// Does nothing but in a child.
#[test]
fn the_child_without_threads() {
    let Some(store) = store_of_child() else {
        return;
    };
    let arena = arena(64);
    let known = sample(&store, &arena, |dir| open(dir).unwrap());
    // Every directory is read.
    fs::remove_file(store.join("db-0/CURRENT")).unwrap();
    fail(lasting("thread", "/", libc::EAGAIN));
    let tier = open(&store).expect("one thread can open it");
    assert!(keys(&tier).is_superset(&known));
    tier.write(&chain(&arena, 500, 40)).unwrap().unwrap();
    tier.reclaim(CAPACITY).unwrap();
    assert!(keys(&tier).is_superset(&known));
    let (_, failed) = heal();
    assert!(failed > 0, "no thread was asked for");
    println!("the child did it");
}

#[test]
fn a_store_opens_and_works_where_no_thread_can_be_had() {
    run_child("the_child_without_threads");
}

/// Does nothing but in a child.
#[test]
fn the_child_that_lacks_a_descriptor_once() {
    let Some(store) = store_of_child() else {
        return;
    };
    let pristine = tempfile::tempdir().unwrap();
    let known = sample(pristine.path(), &arena(64), |dir| open(dir).unwrap());
    for errno in [libc::EMFILE, libc::EACCES, libc::ENOMEM] {
        let mut nth = 1;
        loop {
            let _ = fs::remove_dir_all(&store);
            copy(pristine.path(), &store);
            fail(Fault {
                nth,
                times: Some(1),
                ..lasting("open", "/store/", errno)
            });
            let opened = open(&store);
            let (_, failed) = heal();
            let what = format!("{errno} at call {nth}");
            match opened {
                Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{what}: {error:?}"),
                Ok(tier) => assert_eq!(keys(&tier), known, "{what}"),
            }
            assert!(!store.join("db-1").exists(), "{what}: it was rebuilt");
            assert_eq!(keys(&open(&store).unwrap()), known, "{what}, opened again");
            if failed == 0 {
                break;
            }
            nth += 1;
        }
        assert!(nth > 10);
    }
    println!("the child did it");
}

#[test]
fn an_opening_that_lacks_a_descriptor_rebuilds_nothing() {
    run_child("the_child_that_lacks_a_descriptor_once");
}

/// Does nothing but in a child.
#[test]
fn the_child_whose_folders_cannot_be_listed() {
    let Some(store) = store_of_child() else {
        return;
    };
    let (arena, tier) = (arena(64), open(&store).unwrap());
    let unlisted = lasting("list", "/db-", libc::EMFILE);
    let assert_all_counts = |what: &str| {
        // By us it can be.
        heal();
        let (used, taken) = (tier.usage().used_bytes, allocated_bytes(&store));
        fail(unlisted);
        assert!(
            taken <= used,
            "{what}: {taken} bytes are there, {used} count"
        );
        assert!(taken <= CAPACITY, "{what}: {taken} of {CAPACITY} bytes");
    };
    let mut ids = Vec::new();
    for family in 0..40 {
        ids.extend(tier.write(&chain(&arena, family, 8)).unwrap().unwrap());
    }
    let reader = RocksDisk::open_read_only(&store, sim_clock()).unwrap();
    fail(unlisted);
    // The log of the index grows, files die and stay while another has them open.
    for round in 0..400 {
        tier.touch(&ids, round).unwrap();
    }
    assert_all_counts("touched");
    let before = tier.usage().used_bytes;
    tier.remove(&ids[..160]).unwrap();
    assert!(
        tier.usage().used_bytes >= before,
        "nobody knows that they are gone"
    );
    let mut refused = false;
    for family in 100..200 {
        // Where it cannot be measured, more may be refused.
        refused |= tier.write(&chain(&arena, family, 8)).unwrap().is_err();
        assert_all_counts("written");
    }
    assert!(refused, "it was not full");
    tier.touch(&ids[160..], 7).unwrap();
    assert!(heal().1 > 0);
    drop(reader);
    // Measured again, all of it can be used.
    tier.remove(&[]).unwrap();
    assert_all_counts("listed again");
    heal();
    tier.write(&chain(&arena, 300, 8)).unwrap().expect("room");
    println!("the child did it");
}

#[test]
fn what_cannot_be_listed_goes_on_to_count() {
    run_child("the_child_whose_folders_cannot_be_listed");
}

/// Does nothing but in a child.
#[test]
fn the_child_that_cannot_remove_what_failed() {
    let Some(store) = store_of_child() else {
        return;
    };
    let (arena, tier) = (arena(128), open(&store).unwrap());
    let assert_all_counts = |what: &str| {
        let (used, taken) = (tier.usage().used_bytes, allocated_bytes(&store));
        assert!(
            taken <= used,
            "{what}: {taken} bytes are there, {used} count"
        );
    };
    let batch = chain(&arena, 1, 60);
    // RocksDB would be opened again without its manifest: the file has a second name until then.
    fail(lasting("sync", "/MANIFEST-", libc::EIO));
    assert_unavailable(tier.write(&batch));
    assert_all_counts("a file that was not taken in");
    assert_unavailable(tier.write(&batch));
    assert_all_counts("another one");
    heal();
    tier.write(&batch).unwrap().expect("room");
    assert_all_counts("taken in");

    // A file that was cut off, and cannot be removed.
    let used = tier.usage().used_bytes;
    fail(Fault {
        nth: 2,
        ..lasting("write", "/staging/", libc::EIO)
    });
    let batch = chain(&arena, 2, 60);
    assert_unavailable(tier.write(&batch));
    heal();
    assert_eq!(tier.usage().used_bytes, used, "it is removed");
    fail(lasting("unlink", "/staging/", libc::EIO));
    fs::write(
        store.join("staging/00000000000000000001.sst"),
        vec![7; 1 << 20],
    )
    .unwrap();
    tier.close().unwrap();
    drop(tier);
    let tier = open(&store).unwrap();
    let (used, taken) = (tier.usage().used_bytes, allocated_bytes(&store));
    assert!(
        taken <= used && taken > 1 << 20,
        "{taken} bytes are there, {used} count"
    );
    heal();
    tier.remove(&[]).unwrap();
    assert!(
        tier.usage().used_bytes + (1 << 20) <= used,
        "it is removed later"
    );
    assert!(
        files(&store)
            .iter()
            .all(|path| !path.starts_with("staging"))
    );
    println!("the child did it");
}

#[test]
fn what_failed_and_cannot_be_removed_counts_until_it_is() {
    run_child("the_child_that_cannot_remove_what_failed");
}

/// Does nothing but in a child.
#[test]
fn the_child_whose_index_cannot_be_read() {
    let Some(store) = store_of_child() else {
        return;
    };
    let pristine = tempfile::tempdir().unwrap();
    let arena = arena(64);
    let known = sample(pristine.path(), &arena, |dir| open(dir).unwrap());
    let fresh = || {
        let _ = fs::remove_dir_all(&store);
        copy(pristine.path(), &store);
    };
    // The payload is in a folder of its own.
    for bad in ["/db-0/0", "/stemkv.json"] {
        // A moment's trouble.
        fresh();
        fail(Fault {
            times: Some(1),
            ..lasting("read", bad, libc::EIO)
        });
        let tier = open(&store).expect("it is read again");
        assert!(heal().1 > 0, "{bad}: nothing was read");
        assert_eq!(keys(&tier), known, "{bad}");
        assert!(store.join("db-0").exists(), "{bad}: it was rebuilt");
        drop(tier);
        // No trouble of the medium's.
        fresh();
        fail(lasting("open", bad, libc::EMFILE));
        assert_unavailable(open(&store));
        assert!(heal().1 > 0, "{bad}: nothing was opened");
        assert_eq!(keys(&open(&store).unwrap()), known, "{bad}");
        assert!(store.join("db-0").exists(), "{bad}: it was rebuilt");
        // A bad sector.
        fresh();
        fail(lasting("read", bad, libc::EIO));
        let tier = open(&store).unwrap_or_else(|error| panic!("{bad}: {error:?}"));
        let found = keys(&tier);
        assert!(found.is_superset(&known), "{bad}: records are lost");
        assert_eq!(tier.usage().unread_files, 0, "{bad}");
        tier.write(&chain(&arena, 700, 3)).unwrap().expect("room");
        tier.close().unwrap();
        heal();
        let again = open(&store).unwrap();
        assert_eq!(keys(&again).len(), found.len() + 3, "{bad}");
    }
    println!("the child did it");
}

#[test]
fn a_store_whose_index_cannot_be_read_comes_back_from_its_payload_files() {
    run_child("the_child_whose_index_cannot_be_read");
}

/// Does nothing but in a child.
#[test]
fn the_child_with_an_unreadable_directory() {
    let Some(store) = store_of_child() else {
        return;
    };
    let (pristine, arena) = (tempfile::tempdir().unwrap(), arena(64));
    let tier = open(pristine.path()).unwrap();
    for family in 0..3 {
        tier.write(&chain(&arena, family, 4)).unwrap().unwrap();
    }
    // Its last file's places are followed by those of the next one.
    const LAST: u64 = 2;
    let all = keys(&tier);
    let fresh = || {
        let _ = fs::remove_dir_all(&store);
        copy(pristine.path(), &store);
        // What the index has of its files is in its log alone.
        for log in files(&store.join("db-0")) {
            if log.extension().is_some_and(|extension| extension == "log") {
                fs::remove_file(store.join("db-0").join(log)).unwrap();
            }
        }
    };
    fresh();
    let bad = file_of(&store, key(LAST, 0));
    let without: BTreeSet<_> = all
        .iter()
        .filter(|own| (0..4).all(|depth| **own != key(LAST, depth)))
        .copied()
        .collect();
    let assert_all_counts = |tier: &RocksDisk| {
        let (used, taken) = (tier.usage().used_bytes, allocated_bytes(&store));
        assert!(taken <= used, "{taken} bytes are there, {used} count");
    };

    let (mut in_place, mut rebuilt) = (0, 0);
    // RocksDB reads the file's end when it opens, before we read its directory.
    for nth in 1.. {
        fresh();
        fail(Fault {
            nth,
            ..lasting("read", bad, libc::EIO)
        });
        let tier = open(&store).expect("the rest is there");
        if heal().1 == 0 {
            break;
        }
        if tier.usage().unread_files > 0 {
            match store.join("db-0").exists() {
                true => in_place += 1,
                false => rebuilt += 1,
            }
            assert_eq!(keys(&tier), without, "read {nth}");
            assert_eq!(tier.usage().files, 2, "read {nth}");
            assert!(tier.usage().unread_bytes > 4 * RECORD_BYTES, "read {nth}");
            assert_all_counts(&tier);
            tier.close().unwrap();
            // Under the name that it was put aside with.
            fail(lasting("read", bad, libc::EIO));
            let tier = open(&store).expect("the rest is there");
            assert_eq!(keys(&tier), without, "read {nth}");
            assert_eq!(tier.usage().unread_files, 1, "read {nth}");
            assert!(heal().1 > 0);
            // It goes on meanwhile.
            tier.write(&chain(&arena, 9, 4)).unwrap().unwrap();
            tier.close().unwrap();
        }
        drop(tier);
        let tier = open(&store).unwrap();
        let mut found = keys(&tier);
        found.retain(|own| (0..4).all(|depth| *own != key(9, depth)));
        assert_eq!(found, all, "read {nth}");
        assert_eq!(tier.usage().unread_files, 0, "read {nth}");
    }
    assert!(in_place > 0 && rebuilt > 0, "{in_place}, {rebuilt}");

    // Then room is needed.
    fresh();
    fs::remove_file(store.join("db-0/CURRENT")).unwrap();
    fail(lasting("read", bad, libc::EIO));
    let tier = open(&store).expect("the rest is there");
    assert_eq!(keys(&tier), without);
    assert_eq!(tier.usage().unread_files, 1);
    assert_all_counts(&tier);
    let mut family = 100;
    let asked = loop {
        match tier.write(&chain(&arena, family, 8)).unwrap() {
            Ok(_) => family += 1,
            Err(asked) => break asked,
        }
    };
    assert_all_counts(&tier);
    // Cleaning has nothing to give, and gives nothing up.
    let before = tier.usage();
    let had = tier.reclaim(u64::MAX).unwrap();
    assert!(had < 8 * RECORD_BYTES, "{asked:?}");
    assert_eq!(tier.usage(), before);
    assert_eq!(tier.drop_unread().unwrap(), 1);
    let free = tier.reclaim(4 * RECORD_BYTES).unwrap();
    assert!(free > had, "{had}, then {free}");
    let after = tier.usage();
    assert_eq!(after.unread_files, 0);
    assert!(
        after.used_bytes + before.unread_bytes <= before.used_bytes,
        "{before:?}, then {after:?}"
    );
    assert!(files(&store).iter().all(|path| !path.starts_with("unread")));
    assert_all_counts(&tier);
    heal();
    println!("the child did it");
}

#[test]
fn a_payload_file_that_cannot_be_read_is_put_aside_until_it_is_given_up() {
    run_child("the_child_with_an_unreadable_directory");
}

/// Does nothing but in a child.
#[test]
fn the_child_whose_moved_records_cannot_be_read_for_a_while() {
    let Some(store) = store_of_child() else {
        return;
    };
    let (arena, tier) = (arena(64), open(&store).unwrap().without_holes());
    for family in 1..4 {
        let ids = tier.write(&chain(&arena, family, 4)).unwrap().unwrap();
        tier.remove(&ids[2..]).unwrap();
    }
    tier.reclaim(u64::MAX).unwrap();
    assert_eq!(tier.usage().files, 1, "all were moved into one file");
    tier.write(&chain(&arena, 9, 4)).unwrap().unwrap();
    let all = keys(&tier);
    tier.close().unwrap();
    drop(tier);
    let bad = file_of(&store, key(1, 0));
    // The database has to be rebuilt, while the file cannot be read.
    fs::remove_file(store.join("db-0/CURRENT")).unwrap();
    fail(lasting("read", bad, libc::EIO));
    let tier = open(&store).expect("the rest is there");
    assert_eq!(tier.usage().unread_files, 1);
    assert_eq!(keys(&tier).len(), 4);
    tier.close().unwrap();
    drop(tier);
    heal();
    // An opening that takes it in and ends before the index has its records.
    fail(lasting("sync", ".log", libc::EIO));
    assert_unavailable(open(&store));
    assert!(heal().1 > 0);
    for _ in 0..2 {
        let tier = open(&store).unwrap();
        assert_eq!(tier.usage().unread_files, 0);
        assert_eq!(keys(&tier), all);
        assert!(files(&store).iter().all(|path| !path.starts_with("unread")));
        tier.close().unwrap();
    }
    println!("the child did it");
}

#[test]
fn records_that_had_been_moved_come_back_with_a_file_that_could_not_be_read() {
    run_child("the_child_whose_moved_records_cannot_be_read_for_a_while");
}

/// Does nothing but in a child.
#[test]
fn the_child_that_is_compacted_while_a_file_cannot_be_read() {
    let Some(store) = store_of_child() else {
        return;
    };
    let (arena, tier) = (arena(64), open(&store).unwrap());
    for family in 1..3 {
        tier.write(&chain(&arena, family, 4)).unwrap().unwrap();
    }
    let all = keys(&tier);
    tier.close().unwrap();
    drop(tier);
    let bad = file_of(&store, key(2, 0));
    fs::remove_file(store.join("db-0/CURRENT")).unwrap();
    fail(lasting("read", bad, libc::EIO));
    // With no bound, as a store is opened that is only looked after.
    let tier = RocksDisk::open(&store, &geometry(), u64::MAX / 4, sim_clock()).unwrap();
    assert_eq!(tier.usage().unread_files, 1);
    tier.reclaim(u64::MAX).unwrap();
    assert_eq!(tier.usage().unread_files, 1);
    tier.close().unwrap();
    drop(tier);
    heal();
    assert_eq!(keys(&open(&store).unwrap()), all);
    println!("the child did it");
}

#[test]
fn compacting_gives_up_no_file_that_cannot_be_read() {
    run_child("the_child_that_is_compacted_while_a_file_cannot_be_read");
}

/// Does nothing but in a child.
#[test]
fn the_child_whose_calls_hang() {
    let Some(store) = store_of_child() else {
        return;
    };
    let (arena, tier) = (arena(64), open(&store).unwrap());
    tier.write(&chain(&arena, 1, 4)).unwrap().unwrap();
    let (infos, _) = scan(&tier);
    let brief = Duration::from_millis(20);
    let assert_hangs = |what: &str| {
        while failed() == 0 {
            std::thread::yield_now();
        }
        let error = tier.close_within(brief).expect_err("something hangs");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains(what), "{error}");
        // The folder is this process's as long as something may be written there.
        let busy = open(&store).expect_err("it is not closed");
        assert_eq!(busy.kind(), ErrorKind::Busy);
        // Nothing begins any more.
        let late = tier.write(&chain(&arena, 9, 1)).expect_err("it is closing");
        assert_eq!(late.kind(), ErrorKind::Closed);
        let late = read(&tier, &arena, &infos[1]).expect_err("it is closing");
        assert_eq!(late.kind(), ErrorKind::Closed);
        assert!(heal().1 > 0);
    };
    // What hangs ends also where an assertion fails.
    struct Heals;
    impl Drop for Heals {
        fn drop(&mut self) {
            heal();
        }
    }
    std::thread::scope(|scope| {
        let _heals = Heals;
        fail(lasting("read", "/payload/", HANGS));
        let reading = scope.spawn(|| read(&tier, &arena, &infos[0]));
        assert_hangs("reads=1, writes=0");
        let slot = reading.join().unwrap().expect("it had begun");
        assert_right(&slot, &infos[0]);
    });
    tier.close().expect("nothing hangs any more");
    tier.close().expect("closed");

    let tier = open(&store).unwrap();
    let batch = chain(&arena, 2, 4);
    std::thread::scope(|scope| {
        let _heals = Heals;
        fail(lasting("write", "/staging/", HANGS));
        let writing = scope.spawn(|| tier.write(&batch));
        while failed() == 0 {
            std::thread::yield_now();
        }
        let error = tier.close_within(brief).expect_err("something hangs");
        assert!(error.to_string().contains("reads=0, writes=1"), "{error}");
        assert!(heal().1 > 0);
        writing
            .join()
            .unwrap()
            .expect("it had begun")
            .expect("room");
    });
    tier.close().expect("nothing hangs any more");
    assert_eq!(keys(&open(&store).unwrap()).len(), 8);
    println!("the child did it");
}

#[test]
fn a_close_waits_for_no_call_that_hangs_and_names_it() {
    run_child("the_child_whose_calls_hang");
}
