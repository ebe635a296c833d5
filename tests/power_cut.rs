//! The power goes, on the real disk tier: whatever the medium kept, the store opens, what had been
//! reported durable is there and byte-equal, nothing else is served.
//!
//! How: a child runs the tier, or a whole store on it, with its file calls recorded
//! (`support/filecalls.c`). The parent replays them into a model of a medium (`support/medium.rs`, in
//! words at its top), cuts before and behind every sync and every report, and at each cut builds the
//! folder from what was synced and seeded parts of what was not, opens it, and compares.
//!
//! `STEMKV_SEED=N` repeats a run's choices. A failure names the cut and the part, and keeps the log;
//! `STEMKV_CRASH_LOG=PATH` looks at that one again. `STEMKV_CRASH=all` tries every cut, and more parts
//! of each.
#![cfg(all(feature = "rocksdb", feature = "sim"))]
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../store/tests/support/mod.rs"]
mod chunks;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, mpsc};
use std::{env, fs};

use chunks::Random;
use stemkv::{Cache, DiskConfig, OpenNamespace};
use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier, ErrorKind, HostArena, Key, SystemClock};
use support::filecalls::{self, Call, mark};
use support::medium::{Image, Luck, Medium};
use support::{Engine, load, mix, save};

/// What is compared when the power came back.
trait Workload: Clone + Send + Sync {
    /// Learns from a mark of the child.
    fn hear(&mut self, mark: &str);
    /// Panics unless the store in `dir` is one that a power cut now may leave. Was it rebuilt?
    fn check(&self, dir: &Path, thorough: bool) -> bool;
}

/// A folder in memory where there is one: nobody needs these bytes after the next second.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

fn seed() -> u64 {
    let seed = match env::var("STEMKV_SEED") {
        Ok(seed) => seed.parse().expect("STEMKV_SEED is a number"),
        Err(_) => u64::from(std::process::id()),
    };
    println!("STEMKV_SEED={seed}");
    seed
}

fn all_cuts() -> bool {
    env::var("STEMKV_CRASH").is_ok_and(|value| value == "all")
}

/// Runs the child `name`, or takes an earlier log. The recorded folder holds the store as `store`.
fn recorded(name: &str) -> (tempfile::TempDir, PathBuf, Vec<Call>) {
    let dir = scratch();
    let root = dir.path().join("root");
    if let Some(log) = env::var_os("STEMKV_CRASH_LOG") {
        let calls = filecalls::calls(Path::new(&log));
        return (dir, root, calls);
    }
    fs::create_dir(&root).unwrap();
    let (log, marks) = (dir.path().join("log"), dir.path().join("marks"));
    let output = filecalls::child(name, &root, Some(&log), &marks)
        .env("STEMKV_SEED", seed().to_string())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let calls = filecalls::calls(&log);
    fs::remove_dir_all(&root).unwrap();
    (dir, root, calls)
}

/// One image to look at: which cut, what luck, what must be.
struct Job<W> {
    cut: usize,
    luck: Luck,
    image: Image,
    expected: W,
}

/// Cuts the power at a sample of the moments of a log, and at each keeps some of what was not synced.
fn cut_everywhere<W: Workload>(name: &str, expected: W, seldom: u64) {
    let (dir, root, calls) = recorded(name);
    // A child that runs in another folder than this one: its log says which.
    let root = calls
        .iter()
        .find_map(|call| match call {
            Call::MakeFolder { path } => path.parent().map(Path::to_owned),
            _ => None,
        })
        .unwrap_or(root);
    let (seed, all) = (seed(), all_cuts());
    let (jobs, queue) = mpsc::sync_channel::<Job<W>>(2);
    let queue = Mutex::new(queue);
    let (failed, rebuilt) = (Mutex::new(None), AtomicU32::new(0));
    let (mut syncs, mut images) = (0, 0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Ok(job) = { queue.lock().unwrap().recv() } {
                    let dir = scratch();
                    job.image.write(dir.path());
                    let store = dir.path().join("store");
                    let thorough = job.luck == Luck::None || mix(job.cut as u64).is_multiple_of(8);
                    let check = || {
                        if job.expected.check(&store, thorough) {
                            // Its manifest was torn out of order: what is whole needs no rebuilding.
                            assert!(matches!(job.luck, Luck::Seed(_)), "it was rebuilt");
                            rebuilt.fetch_add(1, Ordering::Relaxed);
                        }
                    };
                    if catch_unwind(AssertUnwindSafe(check)).is_err() {
                        failed
                            .lock()
                            .unwrap()
                            .get_or_insert((job.cut, job.luck, dir.keep()));
                    }
                }
            });
        }
        let mut medium = Medium::new(&root);
        let mut state = expected;
        for (cut, call) in calls.iter().enumerate() {
            let is_sync = matches!(call, Call::Sync { .. } | Call::SyncAll);
            let is_mark = matches!(call, Call::Mark(_));
            syncs += usize::from(is_sync);
            let here = is_sync || is_mark || all && mix(seed ^ cut as u64).is_multiple_of(8);
            if here && (all || mix(seed ^ cut as u64).is_multiple_of(seldom)) {
                // Before the call: nothing of it promised yet, anything of it may be there.
                let parts = if all { 8 } else { 1 };
                let seeded = (0..parts).map(|part| Luck::Seed(mix(seed ^ cut as u64) ^ part));
                for luck in [Luck::None, Luck::All].into_iter().chain(seeded) {
                    images += 1;
                    let job = Job {
                        cut,
                        luck,
                        image: medium.cut(luck),
                        expected: state.clone(),
                    };
                    if failed.lock().unwrap().is_some() || jobs.send(job).is_err() {
                        break;
                    }
                }
            }
            if let Call::Mark(text) = call {
                state.hear(text);
            }
            medium.apply(call);
        }
        drop(jobs);
    });
    if let Some((cut, luck, left)) = failed.into_inner().unwrap() {
        let kept = dir.keep();
        panic!(
            "the power went before call {cut} ({:?}), {luck:?}: see {}, and the log {}",
            Brief(&calls[cut]),
            left.display(),
            kept.join("log").display()
        );
    }
    println!(
        "{name}: {} calls, {syncs} syncs, {images} images, of them {} rebuilt",
        calls.len(),
        rebuilt.into_inner()
    );
    assert!(syncs > 100 && images > 100, "the child did something");
}

/// A call without its bytes.
struct Brief<'a>(&'a Call);

impl std::fmt::Debug for Brief<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Call::Write { offset, bytes, .. } => write!(f, "write {} at {offset}", bytes.len()),
            other => write!(f, "{other:?}"),
        }
    }
}

/// Small enough that logs, manifests and table files change, and files are cleaned.
const TIER_BYTES: u64 = 5 << 20;

fn open_tier(dir: &Path) -> RocksDisk {
    let clock = std::sync::Arc::new(SystemClock::default());
    RocksDisk::open(dir, &chunks::geometry(), TIER_BYTES, clock).expect("a store opens")
}

/// The one value under which a child keeps version `version` of value `number`.
fn meta(number: u64, version: u64) -> Vec<u8> {
    let mut random = Random(number * 1000 + version);
    let bytes = 1 + random.below(9000);
    let mut value = format!("{number} {version} ").into_bytes();
    value.resize_with(value.len() + bytes, || random.next() as u8);
    value
}

/// Does nothing but in the child of `every_power_cut_of_the_tier…`.
#[test]
fn the_tier_whose_calls_are_recorded() {
    let Some(dir) = filecalls::store_of_child() else {
        return;
    };
    let seed = seed();
    for opening in 0..3_u64 {
        let tier = open_tier(&dir);
        mark("open");
        std::thread::scope(|scope| {
            for writer in 0..2_u64 {
                let tier = &tier;
                scope.spawn(move || work(tier, seed, opening, writer));
            }
        });
        tier.close().unwrap();
        mark("closed");
    }
}

/// Writes, removes, touches, keeps values and cleans, saying so before and after each.
fn work(tier: &RocksDisk, seed: u64, opening: u64, writer: u64) {
    let arena = chunks::arena(16);
    let mut random = Random(mix(seed ^ opening) ^ writer);
    let mut mine: Vec<(u64, u32, Vec<stemkv_store::RecordId>)> = Vec::new();
    let remove = |mine: &mut Vec<(u64, u32, Vec<_>)>, at: usize, from: u32| {
        let (family, blocks, ids) = &mut mine[at];
        mark(&format!("remove {family} {from}"));
        let gone: Vec<_> = ids.drain(from as usize..).rev().collect();
        tier.remove(&gone).unwrap();
        mark(&format!("removed {family} {from}"));
        *blocks = from;
        if from == 0 {
            mine.swap_remove(at);
        }
    };
    for step in 0..40_u64 {
        let family = (opening * 2 + writer) * 1000 + step;
        let blocks = 1 + random.below(6) as u32;
        mark(&format!("write {family} {blocks}"));
        let chain = chunks::chain(&arena, family, blocks);
        let written = match random.below(blocks as usize) {
            0 => tier.write(&chain).unwrap(),
            split => {
                let wrote_first = || mark(&format!("part {family} {split}"));
                let (first, second) = chunks::write_in_two(tier, &chain, split, wrote_first);
                let more = second.and_then(|second| second.unwrap().ok());
                let both = first.unwrap();
                both.map(|ids| ids.into_iter().chain(more.into_iter().flatten()).collect())
            }
        };
        match written {
            Ok(ids) => {
                let blocks = ids.len() as u32;
                mark(&format!("wrote {family} {blocks}"));
                mine.push((family, blocks, ids));
            }
            Err(_) => {
                mark(&format!("wrote {family} 0"));
                for _ in 0..4.min(mine.len()) {
                    let at = random.below(mine.len());
                    remove(&mut mine, at, 0);
                }
                tier.reclaim(8 * chunks::RECORD_BYTES).unwrap();
            }
        }
        if random.below(3) == 0 && !mine.is_empty() {
            let at = random.below(mine.len());
            let from = random.below(mine[at].1 as usize) as u32;
            remove(&mut mine, at, from);
        }
        match random.below(5) {
            0 => {
                let ids: Vec<_> = mine.iter().flat_map(|(_, _, ids)| ids.clone()).collect();
                tier.touch(&ids, 1000 + step).unwrap();
            }
            1 => {
                let (number, version) =
                    (writer * 10 + random.below(3) as u64, opening * 100 + step);
                mark(&format!("keep {number} {version}"));
                let value = meta(number, version);
                tier.put_meta(&chunks::key(number, 0), &value).unwrap();
                mark(&format!("kept {number} {version}"));
            }
            2 => drop(tier.reclaim(TIER_BYTES).unwrap()),
            _ => {}
        }
    }
}

/// What became of one chain of blocks.
#[derive(Clone, Copy, Default)]
struct Family {
    /// Blocks that were ever there.
    written: u32,
    /// Blocks that may be there.
    begun: u32,
    /// Blocks that must be.
    durable: u32,
}

#[derive(Clone, Default)]
struct TierRecords {
    families: BTreeMap<u64, Family>,
    /// Versions of each value that may be found: the last durable one and what came after.
    metas: BTreeMap<u64, BTreeSet<Option<u64>>>,
}

impl Workload for TierRecords {
    fn hear(&mut self, mark: &str) {
        let mut words = mark.split(' ');
        let what = words.next().unwrap();
        let mut number = || words.next().unwrap().parse::<u64>().unwrap();
        if ["open", "closed"].contains(&what) {
            return;
        }
        let (name, count) = (number(), number());
        match what {
            "keep" => {
                let versions = self.metas.entry(name).or_insert_with(|| [None].into());
                versions.insert(Some(count));
            }
            "kept" => drop(self.metas.insert(name, [Some(count)].into())),
            _ => {
                let (family, count) = (self.families.entry(name).or_default(), count as u32);
                match what {
                    "write" => (family.written, family.begun) = (count, count),
                    "part" => family.durable = count,
                    "wrote" => (family.begun, family.durable) = (count, count),
                    "remove" => family.durable = count,
                    "removed" => family.begun = count,
                    other => panic!("{other}"),
                }
            }
        }
    }

    fn check(&self, dir: &Path, thorough: bool) -> bool {
        let tier = open_tier(dir);
        // Then what was removed may come back, over the capacity too, and values are lost.
        let is_rebuilt = is_rebuilt(dir);
        let arena: HostArena = chunks::arena(4);
        if is_rebuilt {
            self.drop_half_removed(&tier, &arena);
        }
        let found: BTreeMap<Key, _> = chunks::assert_all_right(&tier, &arena)
            .into_iter()
            .map(|info| (info.key, info))
            .collect();
        let mut may = 0;
        for (&name, family) in &self.families {
            for depth in 0..if is_rebuilt {
                family.written
            } else {
                family.begun
            } {
                let is_there = found.contains_key(&chunks::key(name, depth));
                may += usize::from(is_there);
                assert!(
                    is_there || depth >= family.durable,
                    "block {depth} of {name} was durable"
                );
            }
        }
        assert_eq!(
            may,
            found.len(),
            "records that nobody wrote, or that were removed"
        );
        for info in found.values().filter(|info| info.depth > 0) {
            assert!(
                is_rebuilt || found.contains_key(&info.parent),
                "a child without its parent"
            );
        }
        let mut metas: BTreeMap<Key, Vec<u8>> = BTreeMap::new();
        tier.scan_meta(&mut |key, value| drop(metas.insert(key, value.to_vec())))
            .unwrap();
        for (&number, versions) in &self.metas {
            let value = metas.remove(&chunks::key(number, 0));
            let is_one = versions.iter().any(|version| match version {
                Some(version) => value.as_deref() == Some(&meta(number, *version)),
                None => value.is_none(),
            });
            assert!(
                is_one || is_rebuilt && value.is_none(),
                "value {number} is none of {versions:?}"
            );
        }
        assert!(metas.is_empty(), "values that nobody kept");
        let usage = tier.usage();
        assert!(is_rebuilt || usage.used_bytes <= TIER_BYTES, "{usage:?}");
        if thorough {
            // It goes on, also with a number that nothing else has, and comes back once more.
            let ids: BTreeSet<_> = found.values().map(|info| info.id).collect();
            if let Ok(new) = tier.write(&chunks::chain(&arena, 1 << 40, 2)).unwrap() {
                assert!(
                    new.iter().all(|id| !ids.contains(id)),
                    "a number comes twice"
                );
                tier.close().unwrap();
                let tier = open_tier(dir);
                let again = chunks::assert_all_right(&tier, &arena);
                assert_eq!(again.len(), found.len() + 2);
            }
        }
        is_rebuilt
    }
}

impl TierRecords {
    /// A removed record that comes back may have lost a part of its bytes already, where no hole shows it: as of
    /// any that does not verify, whoever reads it gets nothing, and removes it.
    fn drop_half_removed(&self, tier: &RocksDisk, arena: &HostArena) {
        let (records, _) = chunks::scan(tier);
        for info in &records {
            let is_removed = self.families.iter().any(|(&name, family)| {
                (family.durable..family.written).any(|depth| chunks::key(name, depth) == info.key)
            });
            if is_removed && let Err(error) = chunks::read(tier, arena, info) {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                tier.remove(&[info.id]).unwrap();
            }
        }
    }
}

/// Did RocksDB refuse what it found?
fn is_rebuilt(dir: &Path) -> bool {
    dir.join("db-1").exists()
}

#[test]
fn every_power_cut_of_the_tier_leaves_all_that_was_durable_and_nothing_else() {
    cut_everywhere(
        "the_tier_whose_calls_are_recorded",
        TierRecords::default(),
        6,
    );
}

fn open_store(dir: &Path) -> (Cache, OpenNamespace) {
    let mut disk = DiskConfig::new(dir, 64 << 20);
    disk.batch_delay_ms = 1;
    disk.batch_bytes = 1 << 20;
    let cache = Cache::open(support::config(40).with_disk(disk)).expect("a store opens");
    let namespace = cache
        .namespace(&support::namespace())
        .expect("its geometry");
    (cache, namespace)
}

/// The prompt of a number: one of three trunks, left at one of its first 12 blocks.
fn tokens(number: u32) -> Vec<u32> {
    support::tree_prompt(number, 3, 64)
}

/// Does nothing but in the child of `every_power_cut_of_a_store…`.
#[test]
fn the_store_whose_calls_are_recorded() {
    let Some(dir) = filecalls::store_of_child() else {
        return;
    };
    let next = AtomicU32::new(0);
    for opening in 1..3_u32 {
        let (cache, namespace) = open_store(&dir);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let engine = Engine::new(80);
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= opening * 30 {
                            return;
                        }
                        mark(&format!("save {number}"));
                        let tokens = tokens(number);
                        // The second half is saved while the first is on its way to the disk.
                        let saves = [&tokens[..tokens.len() / 2], &tokens[..]].map(|tokens| {
                            pollster::block_on(save(&cache, &namespace, &engine, tokens))
                        });
                        let is_durable = saves.map(|saved| {
                            let durability = saved.durable_blocking();
                            let report = saved.report();
                            durability.durable_blocks == report.new_blocks
                                && report.declined_blocks == 0
                        });
                        // Blocks that another save was bringing are durable when that one says so.
                        cache.flush_blocking();
                        if is_durable == [true, true] {
                            mark(&format!("durable {number}"));
                        }
                    }
                });
            }
        });
        cache.close_blocking().unwrap();
        mark("closed");
    }
}

#[derive(Clone, Default)]
struct Prompts {
    begun: BTreeSet<u32>,
    durable: BTreeSet<u32>,
}

impl Workload for Prompts {
    fn hear(&mut self, mark: &str) {
        let mut words = mark.split(' ');
        let (what, number) = (words.next(), words.next().map(|number| number.parse()));
        match what {
            Some("save") => drop(self.begun.insert(number.unwrap().unwrap())),
            Some("durable") => drop(self.durable.insert(number.unwrap().unwrap())),
            _ => {}
        }
    }

    fn check(&self, dir: &Path, _thorough: bool) -> bool {
        let (cache, namespace) = open_store(dir);
        let engine = Engine::new(40);
        for &number in &self.begun {
            // Compares every byte that it brings.
            let tokens = tokens(number);
            let report = pollster::block_on(load(&cache, &namespace, &engine, &tokens));
            let is_whole = report.tokens == tokens.len();
            assert!(
                is_whole || !self.durable.contains(&number),
                "{number} was durable: {report:?}"
            );
        }
        assert_eq!(cache.stats().counter("corrupt_blocks"), 0);
        cache.close_blocking().expect("nothing hangs");
        is_rebuilt(dir)
    }
}

#[test]
fn every_power_cut_of_a_store_leaves_all_that_was_durable_and_nothing_else() {
    cut_everywhere("the_store_whose_calls_are_recorded", Prompts::default(), 3);
}

#[test]
fn a_medium_keeps_what_was_synced_and_any_part_of_the_rest() {
    let root = Path::new("/root");
    let path = |name: &str| root.join(name);
    let create = |name: &str, inode| Call::Create {
        path: path(name),
        inode,
    };
    let write = |inode, byte| Call::Write {
        inode,
        offset: 0,
        bytes: vec![byte; 1500],
        direct: false,
    };
    let sync = |name: &str, inode| Call::Sync {
        path: path(name),
        inode,
    };
    let mut medium = Medium::new(root);
    for call in [
        create("a", 1),
        write(1, b'1'),
        sync("a", 1),
        write(1, b'2'),
        create("b", 2),
        write(2, b'3'),
        Call::Rename {
            from: path("b"),
            to: path("a"),
        },
    ] {
        medium.apply(&call);
    }
    type Files = BTreeMap<String, Vec<u8>>;
    let left = |image: &Image| -> Files {
        let files = image.contents().into_iter();
        files
            .map(|(path, bytes)| (path.display().to_string(), bytes.to_vec()))
            .collect()
    };
    let nothing = left(&medium.cut(Luck::None));
    assert_eq!(nothing, [("a".to_owned(), vec![b'1'; 1500])].into());
    let all = left(&medium.cut(Luck::All));
    assert_eq!(all, [("a".to_owned(), vec![b'3'; 1500])].into());
    let some: Vec<_> = (0..1000)
        .map(|seed| left(&medium.cut(Luck::Seed(seed))))
        .collect();
    let is_torn = |bytes: &[u8]| bytes.starts_with(b"1") && bytes[512] == b'2';
    let has = |what: &str, is: &dyn Fn(&Files) -> bool| {
        assert!(some.iter().any(is), "{what}");
    };
    has("torn", &|files| is_torn(&files["a"]) && files.len() == 1);
    has("both", &|files| files.len() == 2 && files["a"][0] != b'3');
    has("empty", &|files| {
        files.get("a").is_some_and(|a| a.is_empty())
    });
    has("zeros", &|files| files["a"].starts_with(&[0]));
    assert!(
        some.iter().all(|files| files.contains_key("a")),
        "a rename is one change"
    );
    // The sync of the folder keeps the names and no bytes.
    medium.apply(&Call::Sync {
        path: root.to_owned(),
        inode: 9,
    });
    assert_eq!(
        left(&medium.cut(Luck::None)),
        [("a".to_owned(), vec![])].into()
    );
}
