//! The RocksDB tier where things go wrong around it: `kill -9`, overload, a full file system, a foreign
//! folder, a second process. `rocks_damage.rs` shows what damage to its files does.

#![cfg(all(feature = "rocksdb", feature = "sim"))]
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier, ErrorKind, HostArena, Key, KvGeometry, RecordHeader, Result};
use support::*;

const CAPACITY: u64 = 64 << 20;

fn open(dir: &Path) -> Result<RocksDisk> {
    RocksDisk::open(dir, &geometry(), CAPACITY, sim_clock())
}

/// Allocated bytes of everything in `dir`, each file once.
fn real_bytes(dir: &Path) -> u64 {
    let mut inodes = BTreeMap::new();
    for file in files(dir) {
        // A file may go between the listing and the look.
        if let Ok(meta) = fs::metadata(dir.join(file)) {
            inodes.insert(meta.ino(), meta.blocks() * 512);
        }
    }
    inodes.values().sum()
}

/// An image of the folder taken while it is open is what `kill -9` leaves. One after each call.
#[test]
fn what_a_call_acknowledged_is_in_the_folder_without_a_close() {
    let arena = arena(64);
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path()).unwrap();
    let check = |expected: &BTreeSet<Key>, meta: &[u8]| {
        let image = tempfile::tempdir().unwrap();
        copy(dir.path(), image.path());
        let tier = open(image.path()).unwrap();
        let found: BTreeSet<Key> = assert_all_right(&tier, &arena)
            .into_iter()
            .map(|info| info.key)
            .collect();
        assert_eq!(&found, expected);
        let mut metas = Vec::new();
        tier.scan_meta(&mut |_, value| metas.extend_from_slice(value))
            .unwrap();
        assert_eq!(metas, meta);
    };
    let mut expected = BTreeSet::new();
    for family in 0..4 {
        let ids = tier.write(&chain(&arena, family, 3)).unwrap().unwrap();
        expected.extend((0..3).map(|depth| key(family, depth)));
        check(&expected, if family == 0 { b"" } else { b"m" });
        tier.remove(&ids[2..]).unwrap();
        expected.remove(&key(family, 2));
        tier.put_meta(&root(), b"m").unwrap();
        check(&expected, b"m");
        tier.reclaim(CAPACITY).unwrap();
        check(&expected, b"m");
    }
}

const CHILD: &str = "STEMKV_TEST_CHILD_DIR";
const FIRST: &str = "STEMKV_TEST_CHILD_FIRST";

/// Not a test of its own: the process that `acknowledged_records_survive_kill_9` kills.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Ok(dir) = env::var(CHILD) else {
        return;
    };
    let tier = open(Path::new(&dir)).unwrap();
    // A family of its own for each child and writer.
    let first = env::var(FIRST).unwrap().parse::<u64>().unwrap();
    std::thread::scope(|scope| {
        for writer in 0..2 {
            let tier = &tier;
            scope.spawn(move || write_and_remove(tier, first + writer));
        }
        // Cleans and touches what the others write.
        loop {
            let ids: Vec<_> = scan(&tier).0.iter().map(|info| info.id).collect();
            tier.touch(&ids, ids.len() as u64).unwrap();
            tier.reclaim(CAPACITY).unwrap();
        }
    });
}

/// One line in one write: a kill leaves it whole or not at all.
fn say(line: &str) {
    use std::io::Write as _;
    let line = format!("\n{line}\n");
    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
    std::io::stdout().flush().unwrap();
}

/// Writes every other family from `first` on, and removes blocks of some, of those that are before.
fn write_and_remove(tier: &RocksDisk, first: u64) {
    let arena = arena(16);
    let mut mine = std::collections::VecDeque::new();
    for family in (first..).step_by(2) {
        match tier.write(&chain(&arena, family, 4)).unwrap() {
            Ok(ids) => {
                say(&format!("wrote {family}"));
                mine.push_back((family, ids));
            }
            Err(_) if mine.is_empty() => return,
            Err(_) => {}
        }
        let is_full = mine.len() > 60;
        if is_full || family.is_multiple_of(3) {
            let at = if is_full { 0 } else { mine.len() - 1 };
            let from = if is_full { 0 } else { 3 };
            let Some((family, ids)) = mine.get_mut(at).filter(|(_, ids)| ids.len() > from) else {
                continue;
            };
            say(&format!("remove {family} {from}"));
            let gone: Vec<_> = ids.drain(from..).rev().collect();
            tier.remove(&gone).unwrap();
            say(&format!("removed {family} {from}"));
        }
        while mine.front().is_some_and(|(_, ids)| ids.is_empty()) {
            mine.pop_front();
        }
    }
}

/// Kills of this test: `make crash` wants more.
fn kills() -> usize {
    let kills = env::var("STEMKV_KILLS");
    kills.map_or(50, |kills| kills.parse().expect("a number"))
}

/// A process that writes from two threads, removes, touches and cleans is killed at random moments,
/// again and again in the same folder.
#[test]
fn acknowledged_records_survive_kill_9_and_removed_ones_stay_away() {
    let arena = arena(64);
    let dir = tempfile::tempdir().unwrap();
    let (mut must, mut must_not) = (BTreeSet::new(), BTreeSet::new());
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut random = Random(seed);
    let mut heard_at_all = 0;
    for round in 0..kills() {
        let mut child = Command::new(env::current_exe().unwrap())
            .args([
                "--exact",
                "child_that_writes_until_it_is_killed",
                "--nocapture",
            ])
            .env(CHILD, dir.path())
            .env(FIRST, (round * 1_000_000).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut note = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let number = |at: usize| words[at].parse::<u64>().unwrap();
            let keys = |from: u64| (from as u32..4).map(|depth| key(number(1), depth));
            match words.first() {
                Some(&"wrote") => must.extend(keys(0)),
                Some(&"remove") => must.retain(|key| keys(number(2)).all(|gone| gone != *key)),
                Some(&"removed") => must_not.extend(keys(number(2))),
                _ => return false,
            }
            true
        };
        // A report, and up to 2 ms: between reports too.
        let kill_after = random.below(40);
        let mut heard = 0;
        while heard < kill_after {
            let line = lines.next().expect("it writes until it is killed").unwrap();
            heard += usize::from(note(&line));
        }
        std::thread::sleep(std::time::Duration::from_micros(random.below(2000) as u64));
        child.kill().unwrap();
        // What it acknowledged between the last line we waited for and the kill counts as well.
        for line in lines.map_while(|line| line.ok()) {
            heard += usize::from(note(&line));
        }
        heard_at_all += heard;
        child.wait().unwrap();
        let tier = open(dir.path()).unwrap_or_else(|error| panic!("round {round}: {error:?}"));
        let found: BTreeSet<Key> = assert_all_right(&tier, &arena)
            .into_iter()
            .map(|info| info.key)
            .collect();
        let lost: Vec<_> = must.difference(&found).collect();
        assert!(lost.is_empty(), "round {round}: {lost:?} are lost");
        let back: Vec<_> = must_not.intersection(&found).collect();
        assert!(back.is_empty(), "round {round}: {back:?} are back");
        assert!(!dir.path().join("db-1").exists(), "a kill damages nothing");
        let usage = tier.usage();
        assert!(usage.used_bytes <= CAPACITY, "{usage:?}");
        // Old ones go, so that a thousand rounds fit.
        let (records, _) = scan(&tier);
        if records.len() > 500 {
            let gone: Vec<_> = records.iter().rev().map(|info| info.id).collect();
            tier.remove(&gone).unwrap();
            must_not.extend(std::mem::take(&mut must));
        }
        tier.close().unwrap();
    }
    println!("{} kills, {heard_at_all} reports", kills());
    assert!(heard_at_all > 10 * kills(), "the children did something");
}

/// The bytes that the file system counts never pass the capacity, at any moment that a second thread
/// looks, while the store is driven into its cap.
#[test]
fn the_capacity_holds_in_real_bytes_under_overload_cleaning_and_restart() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    let capacity = 6 << 20;
    let arena = arena(256);
    let dir = tempfile::tempdir().unwrap();
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let (most, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                most.fetch_max(real_bytes_now(dir.path()), Ordering::SeqCst);
            }
        });
        // The looks end also where an assertion fails.
        let ends = Ends(&done);
        let mut random = Random(3);
        let mut refused = 0;
        for opening in 0..3 {
            let tier = RocksDisk::open(dir.path(), &geometry(), capacity, sim_clock()).unwrap();
            for round in 0..120 {
                let family = opening * 1000 + round;
                let batch = chain(&arena, family, 1 + random.below(12) as u32);
                if tier.write(&batch).unwrap().is_err() {
                    refused += 1;
                    let (records, _) = scan(&tier);
                    let gone = records.iter().rev().filter(|_| random.below(3) == 0);
                    let gone: Vec<_> = gone.map(|info| info.id).collect();
                    tier.remove(&gone).unwrap();
                    tier.reclaim(12 * RECORD_BYTES).unwrap();
                }
                let usage = tier.usage();
                assert!(usage.used_bytes <= capacity, "{usage:?}");
                assert!(real_bytes(dir.path()) <= usage.used_bytes, "{usage:?}");
            }
            assert_all_right(&tier, &arena);
        }
        drop(ends);
        watcher.join().unwrap();
        assert!(
            refused > 10,
            "only {refused} batches were refused: no overload"
        );
    });
    let most = most.into_inner();
    assert!(
        most <= capacity,
        "{most} of {capacity} bytes were allocated"
    );
    assert!(
        most >= capacity / 2,
        "{most} of {capacity} bytes: the capacity is not used"
    );
}

/// As [`real_bytes`], while files come and go.
fn real_bytes_now(dir: &Path) -> u64 {
    let mut inodes = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else {
                continue;
            };
            match meta.is_dir() {
                true => folders.push(entry.path()),
                false => drop(inodes.insert(meta.ino(), meta.blocks() * 512)),
            }
        }
    }
    inodes.values().sum()
}

/// Mounts a small file system, which takes root; says so where it cannot.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(megabytes: u32) -> Option<SmallDisk> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={megabytes}m");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(dir.path())
            .status();
        match mounted.is_ok_and(|status| status.success()) {
            true => Some(SmallDisk(dir)),
            false => {
                println!("SKIPPED: mounting a small file system takes root");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_file_system_refuses_writes_and_loses_nothing_that_was_acknowledged() {
    let Some(small) = SmallDisk::mount(4) else {
        return;
    };
    let arena = arena(64);
    let dir = small.0.path().join("store");
    let tier = open(&dir).unwrap();
    let mut written = Vec::new();
    let error = loop {
        let family = written.len() as u64;
        match tier.write(&chain(&arena, family, 8)) {
            Ok(ids) => written.push(ids.expect("the file system is full before the capacity is")),
            Err(error) => break error,
        }
        assert!(written.len() < 1000);
    };
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(written.len() > 5);
    let before = assert_all_right(&tier, &arena);
    assert_eq!(before.len(), written.len() * 8);
    drop(tier);
    // With space made by whoever owns the file system, everything is there and takes more.
    let status = Command::new("mount")
        .args(["-o", "remount,size=32m"])
        .arg(small.0.path())
        .status();
    assert!(status.unwrap().success());
    let tier = open(&dir).unwrap();
    let after = assert_all_right(&tier, &arena);
    let keys = |infos: &[stemkv_store::RecordInfo]| -> BTreeSet<Key> {
        infos.iter().map(|info| info.key).collect()
    };
    assert!(keys(&after).is_superset(&keys(&before)));
    tier.write(&chain(&arena, 5000, 8)).unwrap().unwrap();
    drop(tier);
}

#[test]
fn a_store_is_read_beside_its_writer_and_its_holder_is_named() {
    let arena = arena(32);
    let dir = tempfile::tempdir().unwrap();
    let writer = open(dir.path()).unwrap();
    writer.write(&chain(&arena, 1, 4)).unwrap().unwrap();
    writer.put_meta(&root(), b"a namespace").unwrap();
    let reader = RocksDisk::open_read_only(dir.path(), sim_clock()).unwrap();
    assert_eq!(reader.geometry(), &geometry());
    assert_eq!(assert_all_right(&reader, &arena).len(), 4);
    let mut metas = 0;
    reader.scan_meta(&mut |_, _| metas += 1).unwrap();
    assert_eq!(metas, 1);
    assert_eq!(RocksDisk::holder(dir.path()), Some(std::process::id()));
    reader.write(&chain(&arena, 2, 1)).expect_err("read only");
    reader
        .remove(&[scan(&reader).0[0].id])
        .expect_err("read only");
    writer.write(&chain(&arena, 3, 4)).unwrap().unwrap();
    drop(reader);
    let reader = RocksDisk::open_read_only(dir.path(), sim_clock()).unwrap();
    assert_eq!(assert_all_right(&reader, &arena).len(), 8);
    let error = open(dir.path()).err().unwrap();
    assert!(
        error
            .to_string()
            .contains(&format!("pid={}", std::process::id())),
        "{error}"
    );
    drop(writer);
    assert_eq!(RocksDisk::holder(dir.path()), None);
}

#[test]
fn another_geometry_version_or_a_strangers_folder_is_refused_and_left_as_it_is() {
    let arena = arena(32);
    let dir = tempfile::tempdir().unwrap();
    sample(dir.path(), &arena, |dir| open(dir).unwrap());
    let state = |dir: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        let files = files(dir).into_iter();
        files
            .map(|file| (file.clone(), fs::read(dir.join(file)).unwrap()))
            .collect()
    };
    let before = state(dir.path());
    let mut other = geometry();
    other.block_tokens = 32;
    let error = RocksDisk::open(dir.path(), &other, CAPACITY, sim_clock())
        .err()
        .unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(
        error
            .to_string()
            .contains("block_tokens: 32 here, 16 there"),
        "{error}"
    );
    assert_eq!(state(dir.path()), before);

    let manifest = dir.path().join("stemkv.json");
    let text = fs::read_to_string(&manifest).unwrap();
    let newer = text.replace("\"format_version\": 0", "\"format_version\": 9");
    assert_ne!(newer, text);
    fs::write(&manifest, newer).unwrap();
    let before = state(dir.path());
    let error = open(dir.path()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(
        error.to_string().contains("store_version=9, our_version=0"),
        "{error}"
    );
    assert_eq!(state(dir.path()), before);

    let stranger = tempfile::tempdir().unwrap();
    fs::write(stranger.path().join("thesis.tex"), "words").unwrap();
    let error = open(stranger.path()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("thesis.tex"), "{error}");
    assert_eq!(files(stranger.path()).len(), 1);
}

/// The offsets are computed before RocksDB writes a byte; here they are compared with its file, for
/// images on both sides of 2 MiB, where the length before a value grows by a byte.
#[test]
fn every_image_is_one_piece_of_the_file_on_4_kib() {
    for (layers, head_dim, block) in [(4, 32, 16), (3, 40, 7), (16, 128, 255), (16, 128, 256)] {
        let geometry =
            KvGeometry::gqa(layers, 1, head_dim, stemkv_store::Dtype::Bf16, block).unwrap();
        let image_bytes = (RecordHeader::BYTES + geometry.payload_bytes()).next_multiple_of(4096);
        let arena = HostArena::open(&geometry, 6 * image_bytes, |_, _| {}).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let tier = RocksDisk::open(dir.path(), &geometry, CAPACITY, sim_clock()).unwrap();
        let batch: Vec<_> = (0..3)
            .map(|depth| chunk_of(&arena, &geometry, 1, depth))
            .collect();
        tier.write(&batch[..2]).unwrap().unwrap();
        tier.write(&batch[2..]).unwrap().unwrap();
        let mut found = 0;
        RocksDisk::salvage(dir.path(), &mut |path, offset, header| {
            assert_eq!(offset % 4096, 0);
            let mut bytes = vec![0; image_bytes];
            fs::File::open(path)
                .unwrap()
                .read_exact_at(&mut bytes, offset)
                .unwrap();
            assert!(bytes == batch[header.depth as usize].image()[..image_bytes]);
            found += 1;
        })
        .unwrap();
        assert_eq!(found, 3, "{geometry:?}");
    }
}

/// A file that RocksDB refuses for its places is no damaged one.
#[test]
fn a_file_that_cannot_be_taken_in_now_waits_until_it_can() {
    let (arena, dir) = (arena(64), tempfile::tempdir().unwrap());
    let tier = open(dir.path()).unwrap();
    tier.write(&chain(&arena, 1, 4)).unwrap().unwrap();
    let ids = tier.write(&chain(&arena, 2, 4)).unwrap().unwrap();
    let all = assert_all_right(&tier, &arena);
    tier.close().unwrap();
    drop(tier);
    let mut file = None;
    RocksDisk::salvage(dir.path(), &mut |path, _, header| {
        if header.key == key(2, 0) {
            file = Some(path.to_owned());
        }
    })
    .unwrap();
    fs::create_dir(dir.path().join("unread")).unwrap();
    fs::copy(file.unwrap(), dir.path().join("unread/db-7-000009.sst")).unwrap();
    let waits = |tier: &RocksDisk| {
        let usage = tier.usage();
        assert_eq!(usage.unread_files, 1, "{usage:?}");
        assert!(usage.unread_bytes > 4 * RECORD_BYTES, "{usage:?}");
        assert!(real_bytes(dir.path()) <= usage.used_bytes, "{usage:?}");
    };
    let tier = open(dir.path()).unwrap();
    waits(&tier);
    assert_eq!(assert_all_right(&tier, &arena), all);
    tier.close().unwrap();
    drop(tier);
    // Neither does a rebuilding drop it.
    fs::remove_file(dir.path().join("db-0/CURRENT")).unwrap();
    let tier = open(dir.path()).unwrap();
    waits(&tier);
    tier.remove(&ids).unwrap();
    assert_eq!(tier.usage().files, 1);
    tier.close().unwrap();
    drop(tier);
    let tier = open(dir.path()).unwrap();
    assert_eq!(tier.usage().unread_files, 0);
    assert_eq!(assert_all_right(&tier, &arena), all);
}
