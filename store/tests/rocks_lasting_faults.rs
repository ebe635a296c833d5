//! Faults that last: a folder that nobody may write to, a sector that cannot be read, no thread to be had.
//! The tier answers, serves what it can, loses nothing, and works again once the fault is over.

#![cfg(all(feature = "rocksdb", feature = "sim"))]
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../tests/support/filecalls.rs"]
mod filecalls;
mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs};

use filecalls::{Fault, fail, heal};
use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier, ErrorKind, Key, Result, SimClock};
use support::*;

const CHILD_DIR: &str = "STEMKV_FAULTS_DIR";
const CAPACITY: u64 = 16 << 20;

fn open(dir: &Path) -> Result<RocksDisk> {
    RocksDisk::open(dir, &geometry(), CAPACITY, sim_clock())
}

fn lasting(class: &'static str, path: &'static str, errno: i32) -> Fault {
    Fault {
        class,
        path,
        nth: 1,
        times: None,
        errno,
    }
}

/// Runs the test `name` of this file in a process whose calls can fail.
fn run_child(name: &str) {
    let dir = tempfile::tempdir().unwrap();
    let (marks, root) = (dir.path().join("marks"), dir.path().join("root"));
    fs::create_dir(&root).unwrap();
    let output = filecalls::child(name, &root, None, &marks)
        .env(CHILD_DIR, &root)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{error}");
    assert!(text.contains("the child did it"), "{text}\n{error}");
}

/// In a child: its store's folder.
fn store_of_child() -> Option<std::path::PathBuf> {
    let dir = env::var_os(CHILD_DIR).filter(|_| filecalls::is_child())?;
    Some(Path::new(&dir).join("store"))
}

fn assert_unavailable<T>(answer: Result<T>) {
    let error = answer.err().expect("it cannot be done");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
}

fn keys(tier: &RocksDisk) -> BTreeSet<Key> {
    let right = assert_all_right(tier, &arena(1));
    right.into_iter().map(|info| info.key).collect()
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
    let mut kept = BTreeSet::new();
    // The first file is the sparsest.
    for (family, live) in [(1, 1), (2, 3), (3, 3)] {
        let ids = tier.write(&chain(&arena, family, 4)).unwrap().unwrap();
        tier.remove(&ids[live as usize..]).unwrap();
        kept.extend((0..live).map(|depth| key(family, depth)));
    }
    let mut bad = None;
    RocksDisk::salvage(&store, &mut |path, _, header| {
        if header.key == key(1, 0) {
            bad = path
                .file_name()
                .map(|name| name.to_str().unwrap().to_owned());
        }
    })
    .unwrap();
    let bad: &'static str = bad.expect("it has a file").leak();

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
    let mut nth = 1;
    loop {
        let _ = fs::remove_dir_all(&store);
        copy(pristine.path(), &store);
        fail(Fault {
            nth,
            times: Some(1),
            ..lasting("open", "/store/", libc::EMFILE)
        });
        let opened = open(&store);
        let (_, failed) = heal();
        if let Err(error) = opened {
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        }
        assert!(!store.join("db-1").exists(), "call {nth}: it was rebuilt");
        if failed == 0 {
            break;
        }
        nth += 1;
    }
    assert!(nth > 10);
    assert_eq!(keys(&open(&store).unwrap()), known);
    println!("the child did it");
}

#[test]
fn an_opening_that_lacks_a_descriptor_rebuilds_nothing() {
    run_child("the_child_that_lacks_a_descriptor_once");
}
