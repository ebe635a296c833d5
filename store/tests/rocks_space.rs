//! The cap of the RocksDB tier, in bytes that the file system has allocated: never passed, whatever
//! goes on at once, and space comes back where it is asked for.
//!
//! How: a thread adds up, as often as it can, the blocks of everything below the store's folder and of
//! files from there that are unlinked and still open, while writers, readers and cleaning drive a small
//! store into its cap, opening after opening.

#![cfg(all(feature = "rocksdb", feature = "sim"))]
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime};

use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier, HostArena, RecordId};
use support::*;

const CAPACITY: u64 = 24 << 20;

/// Batches of each writer in one opening.
const ROUNDS: usize = 70;

const BATCH_MAX: usize = 40;

/// How space comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// What is removed leaves holes.
    Holes,
    /// Records are moved, as where the file system makes no holes.
    Moving,
}

fn open(dir: &Path, way: Way) -> RocksDisk {
    let tier = RocksDisk::open(dir, &geometry(), CAPACITY, sim_clock()).unwrap();
    match way {
        Way::Holes => tier,
        Way::Moving => tier.without_holes(),
    }
}

/// An inode: numbers are used again, so with its birth.
type Inode = (u64, u64, Option<SystemTime>);

/// Adds up what a folder takes on disk.
struct Witness {
    dir: PathBuf,
    before: HashMap<Inode, u64>,
}

impl Witness {
    fn new(dir: &Path) -> Self {
        Witness {
            dir: dir.canonicalize().unwrap(),
            before: HashMap::new(),
        }
    }

    /// Bytes that were allocated at one moment: files come and go while they are looked at, so only
    /// those count that were there in this look and in the one before, and with the fewer bytes.
    fn look(&mut self) -> u64 {
        let now = self.inodes();
        let before = std::mem::replace(&mut self.before, now);
        let in_both = self.before.iter().filter_map(|(inode, bytes)| {
            let then = before.get(inode)?;
            Some(*bytes.min(then))
        });
        in_both.sum()
    }

    /// What a store that stands still takes.
    fn settled(&mut self) -> u64 {
        self.look();
        self.look()
    }

    fn inodes(&self) -> HashMap<Inode, u64> {
        let mut found = HashMap::new();
        let mut add = |meta: &fs::Metadata| {
            let inode = (meta.dev(), meta.ino(), meta.created().ok());
            found.insert(inode, meta.blocks() * 512);
        };
        let mut folders = vec![self.dir.clone()];
        while let Some(folder) = folders.pop() {
            if let Ok(meta) = fs::metadata(&folder) {
                add(&meta);
            }
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.metadata() {
                    Ok(meta) if meta.is_dir() => folders.push(entry.path()),
                    Ok(meta) => add(&meta),
                    // Gone since it was listed.
                    Err(_) => {}
                }
            }
        }
        for descriptor in fs::read_dir("/proc/self/fd").unwrap().flatten() {
            let target = fs::read_link(descriptor.path()).unwrap_or_default();
            let is_unlinked = target.to_string_lossy().ends_with(" (deleted)");
            if is_unlinked
                && target.starts_with(&self.dir)
                && let Ok(meta) = fs::metadata(descriptor.path())
            {
                add(&meta);
            }
        }
        found
    }
}

/// What the threads of one opening share.
#[derive(Default)]
struct Life {
    /// Records that nobody has removed, oldest first.
    live: Mutex<BTreeSet<RecordId>>,
    /// Batches that were tried.
    rounds: Mutex<usize>,
    turned: Condvar,
    refused: AtomicUsize,
    read: AtomicUsize,
}

impl Life {
    /// Takes records of so many bytes out: most of them the oldest, so that files die, and some from
    /// anywhere, so that files become sparse.
    fn coldest(&self, bytes: u64, random: &mut Random) -> Vec<RecordId> {
        let mut live = self.live.lock().unwrap();
        let count = (bytes.div_ceil(RECORD_BYTES) as usize).min(live.len());
        let mut gone = Vec::with_capacity(count);
        for _ in 0..count {
            let at = match random.below(3) {
                0 => random.below(live.len()),
                _ => 0,
            };
            let id = *live.iter().nth(at).unwrap();
            live.remove(&id);
            gone.push(id);
        }
        gone
    }

    fn turn(&self) {
        *self.rounds.lock().unwrap() += 1;
        self.turned.notify_all();
    }

    /// Waits until so many batches were tried, or all.
    fn wait_for(&self, round: usize) {
        let late = Duration::from_secs(60);
        let until = round.min(2 * ROUNDS);
        let rounds = self.rounds.lock().unwrap();
        let waited = self
            .turned
            .wait_timeout_while(rounds, late, |at| *at < until);
        assert!(!waited.unwrap().1.timed_out(), "the writers are stuck");
    }

    fn round(&self) -> usize {
        *self.rounds.lock().unwrap()
    }

    fn is_over(&self) -> bool {
        self.round() >= 2 * ROUNDS
    }
}

/// Lets the others end where a writer panics.
struct EndsAll<'a>(&'a Life);

impl Drop for EndsAll<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            if let Ok(mut rounds) = self.0.rounds.lock() {
                *rounds = 2 * ROUNDS;
            }
            self.0.turned.notify_all();
        }
    }
}

/// Writes more than fits, and removes what the tier asks for.
fn overload(tier: &RocksDisk, life: &Life, families: u64, seed: u64) {
    let _ends = EndsAll(life);
    let (arena, mut random) = (arena(BATCH_MAX), Random(seed));
    for round in 0..ROUNDS {
        let blocks = match random.below(4) {
            0 => 1 + random.below(BATCH_MAX),
            _ => 1 + random.below(4),
        };
        let batch = chain(&arena, families + round as u64, blocks as u32);
        for _attempt in 0..8 {
            match tier.write(&batch).unwrap() {
                Ok(ids) => {
                    life.live.lock().unwrap().extend(ids);
                    break;
                }
                Err(asked) => {
                    life.refused.fetch_add(1, SeqCst);
                    let gone = life.coldest(asked.missing_bytes, &mut random);
                    tier.remove(&gone).unwrap();
                    tier.reclaim(blocks as u64 * RECORD_BYTES).unwrap();
                }
            }
        }
        life.turn();
    }
}

/// Reads `count` records at once, again and again, and holds the files of each read until writers have
/// gone `hold` batches on.
fn read_on(tier: &RocksDisk, life: &Life, count: usize, hold: usize, seed: u64) {
    let (arena, mut random) = (arena(count), Random(seed));
    while !life.is_over() {
        let mut infos = scan(tier).0;
        if hold > 0 {
            // Those that go next.
            infos.sort_by_key(|info| info.id);
        } else {
            let at = random.below(infos.len().max(1));
            infos.rotate_left(at);
        }
        infos.truncate(count);
        let reads: Vec<_> = infos
            .iter()
            .map(|info| (info.clone(), filling(&arena, info)))
            .collect();
        let mut wait = hold > 0;
        tier.read(reads, &mut |i, answer| {
            let info = &infos[i];
            match answer {
                Ok(slot) => {
                    assert_right(&slot, info);
                    life.read.fetch_add(1, SeqCst);
                }
                // Moved it may have been meanwhile, but not lost.
                Err(error) => assert!(
                    tier.image_bytes(info).is_none(),
                    "a record that is there was not read: {error:?}"
                ),
            }
            if std::mem::take(&mut wait) {
                life.wait_for(life.round() + hold);
            }
        });
    }
}

fn fill(tier: &RocksDisk, arena: &HostArena, families: std::ops::RangeFrom<u64>) -> usize {
    let mut batches = families.map(|family| tier.write(&chain(arena, family, 20)).unwrap());
    batches.position(|written| written.is_err()).unwrap()
}

#[test]
fn no_look_finds_more_than_the_capacity_whatever_goes_on_at_once() {
    overload_stays_below_the_capacity(Way::Holes);
}

#[test]
fn no_look_finds_more_than_the_capacity_while_records_are_moved() {
    overload_stays_below_the_capacity(Way::Moving);
}

fn overload_stays_below_the_capacity(way: Way) {
    let dir = tempfile::tempdir().unwrap();
    let (most, looks, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let mut witness = Witness::new(dir.path());
    let mut rewritten = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut witness = Witness::new(dir.path());
            while !done.load(SeqCst) {
                most.fetch_max(witness.look(), SeqCst);
                looks.fetch_add(1, SeqCst);
            }
        });
        // The looks end also where an assertion fails.
        let ended = scope.spawn(|| {
            for opening in 0..4 {
                let tier = open(dir.path(), way);
                let life = Life::default();
                let there = scan(&tier).0.into_iter().map(|info| info.id);
                life.live.lock().unwrap().extend(there);
                std::thread::scope(|scope| {
                    let (tier, life) = (&tier, &life);
                    let seed = opening * 10;
                    scope.spawn(move || overload(tier, life, seed * 1000, seed));
                    scope.spawn(move || overload(tier, life, seed * 1000 + 500, seed + 1));
                    scope.spawn(move || read_on(tier, life, 64, 20, seed + 2));
                    scope.spawn(move || read_on(tier, life, 256, 0, seed + 3));
                    scope.spawn(move || {
                        while !life.is_over() {
                            life.wait_for(life.round() + 5);
                            tier.reclaim(CAPACITY / 4).unwrap();
                        }
                    });
                });
                let usage = tier.usage();
                assert!(usage.used_bytes <= CAPACITY, "{usage:?}");
                assert_counted(&tier, &mut witness);
                rewritten += usage.rewritten_bytes;
                let right = assert_all_right(&tier, &arena(1)).len();
                let known = life.live.into_inner().unwrap();
                assert_eq!(right, known.len(), "every record that was not removed");
                let (refused, read) = (life.refused.into_inner(), life.read.into_inner());
                println!("opening {opening}: {refused} refused, {read} read, {usage:?}");
                assert!(opening == 0 || refused > 20, "no overload: {refused}");
                assert!(read > 0, "nothing was read");
                if opening % 2 == 0 {
                    tier.close().unwrap();
                }
            }
        });
        let ended = ended.join();
        done.store(true, SeqCst);
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let (most, looks) = (most.into_inner(), looks.into_inner());
    println!("{looks} looks, at most {most} of {CAPACITY} bytes, {rewritten} moved");
    assert!(way == Way::Holes || rewritten > 0, "nothing was cleaned");
    assert!(looks > 100, "only {looks} looks");
    assert!(most <= CAPACITY, "{most} of {CAPACITY} bytes");
    assert!(
        most >= CAPACITY * 3 / 4,
        "{most} of {CAPACITY} bytes: the capacity is not used"
    );
}

/// The store says that it takes what it takes, once it has measured what RocksDB did in the background.
fn assert_counted(tier: &RocksDisk, witness: &mut Witness) {
    let begun = Instant::now();
    loop {
        tier.remove(&[]).unwrap();
        let (usage, taken) = (tier.usage(), witness.settled());
        if taken <= usage.used_bytes {
            return;
        }
        let late = begun.elapsed() > Duration::from_secs(10);
        assert!(!late, "{taken} bytes, {usage:?}");
    }
}

/// Waits until the folder has at most `bytes`.
fn wait_for_bytes(witness: &mut Witness, bytes: u64, what: &str) {
    let begun = Instant::now();
    loop {
        let now = witness.settled();
        if now <= bytes {
            println!("{what}: {now} bytes after {:?} more", begun.elapsed());
            return;
        }
        let late = begun.elapsed() > Duration::from_secs(30);
        assert!(!late, "{what}: {now} bytes, not {bytes}");
        std::thread::yield_now();
    }
}

#[test]
fn removed_records_give_their_space_back_also_where_every_file_is_half_live() {
    let dir = tempfile::tempdir().unwrap();
    let mut witness = Witness::new(dir.path());
    let tier = open(dir.path(), Way::Moving);
    let arena = arena(20);
    assert!(fill(&tier, &arena, 0..) > 20);
    let full = witness.settled();
    assert!(full > CAPACITY * 3 / 4, "{full} bytes are no full store");

    // Every second record: no file is dead.
    let (records, _) = scan(&tier);
    let half = records.iter().filter(|info| info.depth % 2 == 0);
    let begun = Instant::now();
    tier.remove(&half.map(|info| info.id).collect::<Vec<_>>())
        .unwrap();
    let free = tier.reclaim(u64::MAX).unwrap();
    println!(
        "{full} bytes; half of it removed and reclaimed in {:?}",
        begun.elapsed()
    );
    wait_for_bytes(&mut witness, full * 6 / 10, "half is left");
    // What is free by the answer can be written.
    assert!(free > CAPACITY * 35 / 100, "{free} bytes are free");
    let batches = free / (20 * RECORD_BYTES);
    for family in 0..batches {
        let batch = chain(&arena, 100_000 + family, 20);
        tier.write(&batch).unwrap().expect("it was said to be free");
    }

    // All that was there: whole files die.
    let (records, _) = scan(&tier);
    let ids: Vec<_> = records.iter().map(|info| info.id).collect();
    let begun = Instant::now();
    tier.remove(&ids).unwrap();
    println!("all removed in {:?}", begun.elapsed());
    wait_for_bytes(&mut witness, CAPACITY / 16, "nothing is left");
}

#[test]
fn a_store_above_a_smaller_capacity_asks_for_all_that_is_over_it() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path(), Way::Holes);
    let arena = arena(20);
    fill(&tier, &arena, 0..);
    tier.close().unwrap();
    let smaller = CAPACITY / 2;
    let tier = RocksDisk::open(dir.path(), &geometry(), smaller, sim_clock()).unwrap();
    let before = tier.usage();
    let over = before.used_bytes - smaller;
    let batch = chain(&arena, 90_000, 20);
    let asked = tier.write(&batch).unwrap().unwrap_err();
    let in_records = over as f64 * before.live_bytes as f64 / before.used_bytes as f64;
    assert!(
        asked.missing_bytes as f64 >= in_records,
        "{asked:?} are less than what is over, {in_records}"
    );
    let mut records = scan(&tier).0;
    records.sort_by_key(|info| info.id);
    let mut coldest = records.into_iter().map(|info| info.id);
    let mut missing = asked.missing_bytes;
    for attempt in 0.. {
        assert!(attempt < 3, "{missing} bytes are still missing");
        let gone = coldest
            .by_ref()
            .take(missing.div_ceil(RECORD_BYTES) as usize);
        tier.remove(&gone.collect::<Vec<_>>()).unwrap();
        tier.reclaim(20 * RECORD_BYTES).unwrap();
        match tier.write(&batch).unwrap() {
            Ok(_) => break,
            Err(asked) => missing = asked.missing_bytes,
        }
    }
    let usage = tier.usage();
    assert!(usage.used_bytes <= smaller, "{usage:?}");
    assert!(usage.live_bytes > smaller / 2, "too much went: {usage:?}");
    assert!(Witness::new(dir.path()).settled() <= smaller);
}

/// Whoever asks for space has it when the call returns: in the answer and on the disk.
#[test]
fn space_that_is_asked_for_is_free_on_the_disk_when_the_call_returns() {
    let dir = tempfile::tempdir().unwrap();
    let mut witness = Witness::new(dir.path());
    let (arena, mut random) = (arena(20), Random(5));
    let mut families = 0..;
    let wanted = CAPACITY / 8;
    let mut tier = open(dir.path(), Way::Holes);
    for round in 0..8 {
        if round == 4 {
            tier.close().unwrap();
            tier = open(dir.path(), Way::Moving);
        }
        let life = Life::default();
        while tier
            .write(&chain(&arena, families.next().unwrap(), 20))
            .unwrap()
            .is_ok()
        {}
        let there = scan(&tier).0.into_iter().map(|info| info.id);
        life.live.lock().unwrap().extend(there);
        let before = witness.settled();
        let already = tier.reclaim(0).unwrap();
        let mut free = tier.reclaim(already + wanted).unwrap();
        while free < already + wanted {
            let gone = life.coldest(already + wanted - free, &mut random);
            tier.remove(&gone).unwrap();
            free = tier.reclaim(already + wanted).unwrap();
        }
        let after = witness.settled();
        assert!(
            after + wanted <= before,
            "round {round}: {before} bytes, then {after}; {wanted} were asked for"
        );
    }
    assert!(tier.usage().rewritten_bytes > 0, "nothing was sparse");
}

#[test]
fn a_batch_that_cleaning_could_not_move_as_one_file_is_written_as_several() {
    let dir = tempfile::tempdir().unwrap();
    let mut witness = Witness::new(dir.path());
    let tier = open(dir.path(), Way::Moving);
    // 3 MiB, of which half is more than a sixteenth of the capacity.
    let slots = arena(150);
    let mut batches = 0..;
    let full = batches.find(|&family| tier.write(&chain(&slots, family, 150)).unwrap().is_err());
    assert!(full >= Some(5), "{full:?}");
    let (records, _) = scan(&tier);
    let half = records.iter().filter(|info| info.depth % 2 == 0);
    tier.remove(&half.map(|info| info.id).collect::<Vec<_>>())
        .unwrap();
    let free = tier.reclaim(u64::MAX).unwrap();
    assert!(free > CAPACITY * 35 / 100, "{free} bytes are free");
    let left = assert_all_right(&tier, &arena(1)).len();
    assert_eq!(left, records.len() / 2);
    // In their order, and all of them or none.
    let batch = chain(&slots, 1000, 150);
    let ids = tier.write(&batch).unwrap().expect("there is room");
    assert_eq!(ids.len(), 150);
    assert!(ids.is_sorted());
    tier.close().unwrap();
    let tier = open(dir.path(), Way::Moving);
    assert_eq!(assert_all_right(&tier, &arena(1)).len(), left + 150);
    assert!(witness.settled() <= CAPACITY);
}

/// Every second record of a full store, by id, is removed from it.
fn thin_out(tier: &RocksDisk) -> Vec<RecordId> {
    let (records, _) = scan(tier);
    let half = records.iter().filter(|info| info.depth % 2 == 0);
    let ids: Vec<_> = half.map(|info| info.id).collect();
    tier.remove(&ids).unwrap();
    ids
}

#[test]
fn removed_records_leave_holes_where_nothing_has_to_be_moved() {
    for is_reopened in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut witness = Witness::new(dir.path());
        let mut tier = open(dir.path(), Way::Holes);
        let arena = arena(20);
        assert!(fill(&tier, &arena, 0..) > 20);
        let removed = thin_out(&tier).len() as u64 * RECORD_BYTES;
        if is_reopened {
            tier.close().unwrap();
            tier = open(dir.path(), Way::Holes);
        }
        let before = witness.settled();
        let already = tier.reclaim(0).unwrap();
        // No more than what was asked for: what is left may die with its file.
        tier.reclaim(already + removed / 4).unwrap();
        let after = witness.settled();
        assert!(
            after + removed / 4 <= before,
            "{before} bytes, then {after}"
        );
        assert!(
            after + removed / 2 >= before,
            "{before} bytes, then {after}"
        );
        // Of which padding and directories take a part when it is written again.
        let most = removed * 6 / 10;
        let free = tier.reclaim(already + most).unwrap();
        assert!(free >= already + most, "{free} bytes are free");
        let after = witness.settled();
        assert!(after + most <= before, "{before} bytes, then {after}");
        let usage = tier.usage();
        assert_eq!(usage.rewritten_bytes, 0);
        assert!(after <= usage.used_bytes, "{after} bytes, {usage:?}");
        let left = assert_all_right(&tier, &arena).len();
        assert_eq!(left as u64, usage.records);
        for family in 0..free / (20 * RECORD_BYTES) {
            let batch = chain(&arena, 100_000 + family, 20);
            tier.write(&batch).unwrap().expect("it was said to be free");
        }
        assert!(witness.settled() <= CAPACITY);
        tier.close().unwrap();
        let tier = open(dir.path(), Way::Holes);
        let now = assert_all_right(&tier, &arena).len() as u64;
        assert_eq!(now, left as u64 + free / (20 * RECORD_BYTES) * 20);
    }
}

#[test]
fn what_left_a_hole_does_not_come_back_when_the_store_is_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path(), Way::Holes);
    let arena = arena(20);
    fill(&tier, &arena, 0..);
    thin_out(&tier);
    tier.reclaim(CAPACITY).unwrap();
    let left = assert_all_right(&tier, &arena);
    tier.close().unwrap();
    fs::remove_file(dir.path().join("db-0/CURRENT")).unwrap();
    let tier = open(dir.path(), Way::Holes);
    assert!(dir.path().join("db-1").exists(), "it was rebuilt");
    assert_eq!(assert_all_right(&tier, &arena), left);
}

/// A file of which hardly anything is left is worth moving also beside holes: its padding and directory
/// are most of it.
#[test]
fn a_file_that_is_nearly_all_holes_is_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let tier = open(dir.path(), Way::Holes);
    let arena = arena(40);
    let mut gone = Vec::new();
    for family in 0..20 {
        let ids = tier.write(&chain(&arena, family, 40)).unwrap().unwrap();
        gone.extend_from_slice(&ids[1..]);
    }
    tier.remove(&gone).unwrap();
    tier.reclaim(CAPACITY).unwrap();
    let usage = tier.usage();
    assert_eq!((usage.files, usage.records), (1, 20), "{usage:?}");
    assert_eq!(usage.rewritten_bytes, 20 * RECORD_BYTES);
    assert_all_right(&tier, &arena);
}
