//! What happens around a store's folder while the store is open: the process changes its working folder,
//! somebody takes the folder away or puts another one in its place. The store goes on where it was opened,
//! and touches nothing else.

#![cfg(all(feature = "rocksdb", feature = "sim"))]
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{env, fs};

use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier, ErrorKind, HostArena};
use support::*;

const CAPACITY: u64 = 16 << 20;

fn open(dir: &Path) -> RocksDisk {
    RocksDisk::open(dir, &geometry(), CAPACITY, sim_clock()).expect("it opens")
}

/// A closed store with records of its own, and every byte of it.
fn other_store(dir: &Path, arena: &HostArena) -> BTreeMap<PathBuf, Vec<u8>> {
    let other = open(dir);
    other.write(&chain(arena, 7, 12)).unwrap().unwrap();
    other.close().unwrap();
    bytes(dir)
}

fn bytes(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = files(dir).into_iter();
    files
        .map(|path| (path.clone(), fs::read(dir.join(path)).unwrap()))
        .collect()
}

/// The only test of this file that uses, or moves, the working folder.
#[test]
fn a_store_of_a_relative_path_stays_where_it_was_opened() {
    let scratch = tempfile::tempdir().unwrap();
    let (here, elsewhere) = (
        scratch.path().join("here"),
        scratch.path().join("elsewhere"),
    );
    for folder in [&here, &elsewhere] {
        fs::create_dir(folder).unwrap();
    }
    let arena = arena(64);
    env::set_current_dir(&here).unwrap();
    let tier = open(Path::new("store"));
    let ids = tier.write(&chain(&arena, 1, 12)).unwrap().unwrap();
    // Of the same name, and somebody else's.
    let other = other_store(&elsewhere.join("store"), &arena);
    let reader = RocksDisk::open_read_only(Path::new("store"), sim_clock()).unwrap();
    env::set_current_dir(&elsewhere).unwrap();

    tier.write(&chain(&arena, 2, 3))
        .expect("it is where it was")
        .unwrap();
    tier.remove(&ids[4..]).unwrap();
    tier.reclaim(CAPACITY).unwrap();
    assert_eq!(assert_all_right(&tier, &arena).len(), 4 + 3);
    let (infos, _) = scan(&reader);
    assert_eq!(infos.len(), 12);
    assert_right(&read(&reader, &arena, &infos[0]).unwrap(), &infos[0]);
    tier.close().unwrap();
    assert!(bytes(&elsewhere.join("store")) == other);
    assert_eq!(
        assert_all_right(&open(&here.join("store")), &arena).len(),
        4 + 3
    );
    env::set_current_dir("/").unwrap();
}

/// An unmounted disk leaves an empty folder, which is on another file system.
#[test]
fn nothing_is_written_where_the_folder_was_taken_away() {
    let scratch = tempfile::tempdir().unwrap();
    let (dir, moved) = (scratch.path().join("store"), scratch.path().join("moved"));
    let arena = arena(64);
    let tier = open(&dir);
    let ids = tier.write(&chain(&arena, 1, 4)).unwrap().unwrap();
    fs::rename(&dir, &moved).unwrap();
    for is_there in [false, true] {
        if is_there {
            fs::create_dir(&dir).unwrap();
        }
        for round in 0..3 {
            let errors = [
                tier.write(&chain(&arena, 2 + round, 3)).err(),
                tier.remove(&ids[2..]).err(),
                tier.touch(&ids, 7).err(),
                tier.put_meta(&root(), b"no").err(),
                tier.reclaim(CAPACITY).err(),
            ];
            for error in errors {
                let error = error.expect("there is no such folder");
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
                let text = error.to_string();
                assert!(text.contains(dir.to_str().unwrap()), "{text}");
            }
        }
        assert_eq!(dir.exists(), is_there);
        assert!(!is_there || files(&dir).is_empty());
    }
    fs::remove_dir(&dir).unwrap();
    fs::rename(&moved, &dir).unwrap();
    tier.write(&chain(&arena, 9, 3))
        .expect("it is back")
        .unwrap();
    assert_eq!(assert_all_right(&tier, &arena).len(), 4 + 3);
    tier.close().unwrap();
    assert_eq!(assert_all_right(&open(&dir), &arena).len(), 4 + 3);
}

#[test]
fn a_store_that_was_put_in_the_place_of_an_open_one_stays_as_it_is() {
    let scratch = tempfile::tempdir().unwrap();
    let (dir, moved) = (scratch.path().join("store"), scratch.path().join("moved"));
    let arena = arena(64);
    let tier = open(&dir);
    let ids = tier.write(&chain(&arena, 1, 12)).unwrap().unwrap();
    let other = other_store(&scratch.path().join("other"), &arena);
    fs::rename(&dir, &moved).unwrap();
    fs::rename(scratch.path().join("other"), &dir).unwrap();

    for round in 0..2 {
        let errors = [
            tier.write(&chain(&arena, 2 + round, 3)).err(),
            tier.remove(&ids[4..]).err(),
            tier.reclaim(CAPACITY).err(),
        ];
        assert!(bytes(&dir) == other, "{errors:?}");
        assert!(errors.iter().all(Option::is_some), "{errors:?}");
    }
    let error = tier.close().expect_err("it is not there");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(bytes(&dir) == other);
    assert_eq!(assert_all_right(&open(&dir), &arena).len(), 12);
    // Nor was the one that was moved away harmed.
    assert_eq!(assert_all_right(&open(&moved), &arena).len(), 12);
}
