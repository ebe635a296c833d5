//! A store on the real disk tier whose file calls fail or hang: what is durable stays, nothing is given up
//! unsaid, and a store that says that it is closed is.
//!
//! How: a child process whose file calls a preloaded library fails.
#![cfg(all(feature = "rocksdb", feature = "sim"))]
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use stemkv::{Cache, DiskConfig, ErrorKind, HashPath as _, OpenNamespace};
use stemkv_store::Key;
use stemkv_store::disk::RocksDisk;
use support::filecalls::{self, Fault, HANGS, fail, failed, heal, store_of_child};
use support::{Engine, config, load, namespace, prompt, save, save_durably};

const CAPACITY: u64 = 16 << 20;
const TOKENS: usize = 80;

fn run_child(name: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let text = filecalls::run_child(name, scratch.path());
    assert!(text.contains("the child did it"), "{text}");
}

fn open(store: &Path) -> (Cache, OpenNamespace) {
    let config = config(64).with_disk(DiskConfig::new(store, CAPACITY));
    let cache = Cache::open(config).expect("it opens");
    let namespace = cache.namespace(&namespace()).expect("valid");
    (cache, namespace)
}

fn close(cache: Cache) {
    cache.close_blocking().expect("nothing hangs");
}

fn loaded(cache: &Cache, namespace: &OpenNamespace) -> usize {
    let tokens = prompt(1, TOKENS);
    pollster::block_on(load(cache, namespace, &Engine::new(64), &tokens)).tokens
}

/// A store with a prompt of 20 blocks: the first four in one payload file, the others in a second one, of
/// which the medium does not give the first while it is opened.
fn opened_without_the_first_blocks(store: &Path) -> (Cache, OpenNamespace) {
    let tokens = prompt(1, TOKENS);
    let (cache, namespace) = open(store);
    for part in [16, TOKENS] {
        let engine = Engine::new(64);
        pollster::block_on(save_durably(&cache, &namespace, &engine, &tokens[..part]));
    }
    assert_eq!(cache.stats().disk.unwrap().files, 2);
    let first: Key = {
        let mut path = namespace.prompt(&tokens);
        path.hash_to(1);
        path.hashed()[0]
    };
    close(cache);
    let mut bad = None;
    RocksDisk::salvage(store, &mut |path, _, header| {
        if header.key == first {
            bad = Some(format!("{}", path.file_name().unwrap().display()));
        }
    })
    .unwrap();
    fail(Fault {
        class: "read",
        path: bad.unwrap().leak(),
        nth: 1,
        times: None,
        errno: libc::EIO,
    });
    let opened = open(store);
    assert!(heal().1 > 0);
    let disk = opened.0.stats().disk.unwrap();
    assert_eq!((disk.unread_files, disk.records), (1, 16), "{disk:?}");
    assert_eq!(loaded(&opened.0, &opened.1), 0);
    opened
}

/// Does nothing but in a child.
#[test]
fn the_child_that_cannot_read_its_first_blocks() {
    let Some(store) = store_of_child() else {
        return;
    };
    let (cache, _) = opened_without_the_first_blocks(&store);
    // What cleaning gives is enough.
    let report = cache.compact_blocking(1).unwrap();
    let gone = (report.records_evicted, report.unread_files_dropped);
    assert_eq!(gone, (0, 0), "{report:?}");
    close(cache);
    let (cache, namespace) = open(&store);
    assert_eq!(cache.stats().disk.unwrap().unread_files, 0);
    assert_eq!(loaded(&cache, &namespace), TOKENS);
    close(cache);
    println!("the child did it");
}

#[test]
fn descendants_of_what_cannot_be_read_now_are_kept() {
    run_child("the_child_that_cannot_read_its_first_blocks");
}

/// Does nothing but in a child.
#[test]
fn the_child_that_needs_the_room_of_a_file_that_cannot_be_read() {
    let Some(store) = store_of_child() else {
        return;
    };
    let (cache, namespace) = opened_without_the_first_blocks(&store);
    let dropped = |cache: &Cache| cache.stats().counter("dropped_unread_files");
    for name in 2.. {
        let engine = Engine::new(64);
        let tokens = prompt(name, TOKENS);
        pollster::block_on(save_durably(&cache, &namespace, &engine, &tokens));
        let disk = cache.stats().disk.unwrap();
        assert!(disk.used_bytes <= CAPACITY, "{disk:?}");
        assert_eq!(dropped(&cache), u64::from(disk.unread_files == 0));
        if disk.unread_files == 0 {
            break;
        }
        assert!(name < 1000, "it is never full: {disk:?}");
    }
    // With the records behind it.
    let stats = cache.stats();
    let disk = stats.disk.as_ref().unwrap();
    assert_eq!(disk.records, stats.index.disk_blocks, "{stats:?}");
    close(cache);

    // Or where somebody asks for it, before any block that can be read.
    fs::remove_dir_all(&store).unwrap();
    let (cache, _) = opened_without_the_first_blocks(&store);
    let free = cache.compact_blocking(1).unwrap().free_bytes;
    let report = cache.compact_blocking(free + 1).unwrap();
    let gone = (report.records_evicted, report.unread_files_dropped);
    assert_eq!(gone, (16, 1), "{report:?}");
    assert!(report.free_bytes > free, "{report:?}");
    close(cache);
    println!("the child did it");
}

#[test]
fn a_file_that_cannot_be_read_is_given_up_for_room_and_counted() {
    run_child("the_child_that_needs_the_room_of_a_file_that_cannot_be_read");
}

/// Does nothing but in a child.
#[test]
fn the_child_that_is_closed_while_a_write_hangs() {
    let Some(store) = store_of_child() else {
        return;
    };
    // Its clock stands still while a call hangs, but where it is told.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let config = config(64).with_disk(DiskConfig::new(&store, CAPACITY));
        let builder = Cache::builder(config).runtime(tokio::runtime::Handle::current());
        let cache = builder.open().expect("it opens");
        let namespace = cache.namespace(&namespace()).expect("valid");
        let tick = async || {
            tokio::time::advance(Duration::from_secs(1)).await;
            std::thread::sleep(Duration::from_millis(1));
        };
        fail(Fault {
            class: "sync",
            path: "/store/",
            nth: 1,
            times: None,
            errno: HANGS,
        });
        let save = save(&cache, &namespace, &Engine::new(64), &prompt(1, 16)).await;
        while failed() == 0 {
            tick().await;
        }
        let close = || {
            let cache = cache.clone();
            tokio::spawn(async move { cache.close().await })
        };
        // The disk tier says by itself that it cannot be closed.
        let first = close();
        for _ in 0..70 {
            tick().await;
        }
        let error = first.await.unwrap().expect_err("a write hangs");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        let again = close();
        while !again.is_finished() {
            tick().await;
        }
        let error = again.await.unwrap().expect_err("it hangs still");
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(RocksDisk::holder(&store).is_some());

        assert!(heal().1 > 0);
        let begun = Instant::now();
        while RocksDisk::holder(&store).is_some() {
            let late = begun.elapsed() > Duration::from_secs(60);
            assert!(!late, "nobody closes the tier");
            tick().await;
        }
        cache.close().await.expect("nothing hangs any more");
        drop(save);
        // While the closed one lives.
        let (reopened, _) = open(&store);
        reopened.close().await.expect("nothing hangs");
        cache.close().await.expect("closed");
    });
    println!("the child did it");
}

#[test]
fn a_store_that_was_closed_while_a_write_hung_is_closed_once_that_ends() {
    run_child("the_child_that_is_closed_while_a_write_hangs");
}
