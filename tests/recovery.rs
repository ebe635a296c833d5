//! `kill -9` of a process under load, on the real disk tier: afterwards the store opens, what was
//! reported durable before the kill is there and byte-equal, and nothing else that hits is wrong.
//!
//! How: this test's binary runs itself again as a child that saves, loads and evicts from several
//! threads and writes one line for each prompt whose `durable()` resolved. The parent kills it
//! after a few lines (the seed says how many), at whatever point it is then, and compares.
#![cfg(feature = "rocksdb")]

mod support;

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use stemkv::{Cache, DiskConfig, OpenNamespace};
use support::{Engine, config, load, mix, namespace, save};

const CHILD_DIR: &str = "STEMKV_RECOVERY_DIR";
const CHILD_CAPACITY: &str = "STEMKV_RECOVERY_CAPACITY";
const CHILD_FIRST: &str = "STEMKV_RECOVERY_FIRST";
const CHILD_TEST: &str = "the_child_that_is_killed";

/// A store whose host tier is small, so that loads come from disk.
fn open(dir: &Path, capacity_bytes: u64) -> (Cache, OpenNamespace) {
    let mut disk = DiskConfig::new(dir, capacity_bytes);
    disk.batch_delay_ms = 1;
    let config = config(300).with_disk(disk);
    let cache = Cache::open(config).expect("a store opens after any kill");
    let namespace = cache.namespace(&namespace()).expect("the store's geometry");
    (cache, namespace)
}

/// The prompt of a number: one of five trunks, left at one of its first 16 blocks.
fn tokens(number: u32) -> Vec<u32> {
    support::tree_prompt(number, 5, 80)
}

/// Does nothing but in the child.
#[test]
fn the_child_that_is_killed() {
    let Ok(dir) = std::env::var(CHILD_DIR) else {
        return;
    };
    let number = |name| -> u64 {
        let value = std::env::var(name).expect("set by the parent");
        value.parse().expect("a number")
    };
    let (cache, namespace) = open(Path::new(&dir), number(CHILD_CAPACITY));
    let next = AtomicU32::new(number(CHILD_FIRST) as u32);
    report("open");
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let engine = Engine::new(200);
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let tokens = tokens(number);
                    // The second half is saved while the first is on its way to the disk.
                    let saves = [&tokens[..tokens.len() / 2], &tokens[..]].map(|tokens| {
                        pollster::block_on(save(&cache, &namespace, &engine, tokens))
                    });
                    let is_whole = saves.each_ref().map(|saved| {
                        let durability = saved.durable_blocking();
                        durability.durable_blocks == saved.report().new_blocks
                            && saved.report().declined_blocks == 0
                    });
                    // Blocks that another save was bringing are durable when that one says so.
                    cache.flush_blocking();
                    if is_whole == [true, true] {
                        report(&format!("durable {number}"));
                    }
                    drop(saves);
                    if number.is_multiple_of(16) {
                        let compacted = pollster::block_on(cache.compact(1 << 20));
                        compacted.expect("the disk works");
                    }
                    let other =
                        self::tokens(number.wrapping_sub(mix(u64::from(number)) as u32 % 40));
                    drop(pollster::block_on(load(
                        &cache, &namespace, &engine, &other,
                    )));
                }
            });
        }
    });
}

/// One line in one write: a kill leaves it whole or not at all.
fn report(line: &str) {
    let line = format!("\n@{line}\n");
    std::io::stderr()
        .write_all(line.as_bytes())
        .expect("the parent reads");
}

/// Runs a child until it has reported `lines` lines, and kills it. Returns what it called durable.
fn run_and_kill(dir: &Path, capacity_bytes: u64, first: u32, lines: usize) -> BTreeSet<u32> {
    let mut child = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", CHILD_TEST, "--nocapture", "--test-threads=1"])
        .env(CHILD_DIR, dir)
        .env(CHILD_CAPACITY, capacity_bytes.to_string())
        .env(CHILD_FIRST, first.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("this test runs");
    let mut durable = BTreeSet::new();
    let (mut seen, mut rest) = (0, String::new());
    let stderr = BufReader::new(child.stderr.take().expect("piped"));
    let mut killed = lines == 0;
    if killed {
        child.kill().expect("it is ours");
    }
    // What it wrote before it was killed counts too.
    for line in stderr.lines() {
        let line = line.expect("text");
        match line.strip_prefix('@') {
            Some(report) => {
                seen += 1;
                durable.extend(
                    report
                        .strip_prefix("durable ")
                        .map(|number| number.parse::<u32>().expect("a number")),
                );
            }
            None => rest += &line,
        }
        if seen == lines && !killed {
            killed = true;
            child.kill().expect("it is ours");
        }
    }
    child.wait().expect("it is ours");
    assert!(killed, "the child ended by itself: {rest}");
    durable
}

fn seed() -> u64 {
    let seed = match std::env::var("STEMKV_SEED") {
        Ok(seed) => seed.parse().expect("STEMKV_SEED is a number"),
        Err(_) => u64::from(std::process::id()),
    };
    eprintln!("STEMKV_SEED={seed}");
    seed
}

/// Opens what a kill left and compares: the durable ones must be there, of others what hits must be
/// right.
fn compare(dir: &Path, capacity_bytes: u64, durable: &BTreeSet<u32>, tried: u32) -> usize {
    let (cache, namespace) = open(dir, capacity_bytes);
    let engine = Engine::new(200);
    let mut hits = 0;
    for number in (0..tried)
        .step_by(1 + tried as usize / 400)
        .chain(durable.iter().copied())
    {
        let tokens = tokens(number);
        let report = pollster::block_on(load(&cache, &namespace, &engine, &tokens));
        assert!(
            report.tokens == tokens.len() || !durable.contains(&number),
            "{number} was durable: {report:?}"
        );
        hits += usize::from(report.tokens > 0);
    }
    let stats = cache.stats();
    assert_eq!(stats.counter("corrupt_blocks"), 0, "a kill rots nothing");
    let disk = stats.disk.expect("there is one");
    assert!(disk.used_bytes <= capacity_bytes, "{disk:?}");
    cache.close_blocking().expect("nothing hangs");
    hits
}

/// Rounds of a test that has `few` in a quick run; `STEMKV_KILLS=50` is one.
fn kills(few: u64) -> u64 {
    let kills = std::env::var("STEMKV_KILLS");
    kills.map_or(few, |kills| {
        few * kills.parse::<u64>().expect("a number") / 50
    })
}

/// What the disk tier declined at first, too, once it was written.
#[test]
fn what_the_queue_had_no_room_for_is_on_disk_a_little_later() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut disk = DiskConfig::new(dir.path().join("store"), 64 << 20);
    disk.batch_bytes = 1 << 20;
    disk.queue_bytes = 1 << 20;
    let config = config(300).with_disk(disk);
    let open = || {
        let cache = Cache::open(config.clone()).expect("a folder of its own");
        let namespace = cache.namespace(&namespace()).expect("the store's geometry");
        (cache, namespace)
    };
    let (engine, tokens) = (Engine::new(400), support::prompt(1, 4 * 200));
    let (cache, namespace) = open();
    let saved = pollster::block_on(save(&cache, &namespace, &engine, &tokens));
    let late = Instant::now() + Duration::from_secs(20);
    let declined = saved.durable_blocking().undurable_blocks as u64;
    assert!(declined > 0, "a chunk is 8 KiB");
    while cache.stats().counter("durable_later_blocks") < declined {
        assert!(Instant::now() < late, "{:?}", cache.stats());
        std::thread::yield_now();
    }
    cache.close_blocking().expect("nothing hangs");
    drop((saved, cache, namespace));
    let (cache, namespace) = open();
    let report = pollster::block_on(load(&cache, &namespace, &engine, &tokens));
    assert_eq!((report.tokens, report.disk_blocks), (4 * 200, 200));
    cache.close_blocking().expect("nothing hangs");
}

/// Numbers that one child may use.
const NUMBERS: u32 = 10_000;

#[test]
fn what_was_durable_survives_kills() {
    let (seed, dir) = (seed(), tempfile::tempdir().expect("a folder"));
    let dir = dir.path().join("store");
    let capacity_bytes = 4 << 30;
    let mut durable = BTreeSet::new();
    for round in 0..kills(10) {
        // From a kill before it has opened to one in full swing.
        let lines = mix(seed ^ round) as usize % 40;
        let first = round as u32 * NUMBERS;
        let new = run_and_kill(&dir, capacity_bytes, first, lines);
        assert!(new.len() + 1 >= lines, "{new:?}");
        durable.extend(new);
        compare(&dir, capacity_bytes, &durable, 0);
    }
    assert!(durable.len() > 20, "the children did something");
}

#[test]
fn a_full_store_survives_kills_while_it_makes_room() {
    let (seed, dir) = (seed(), tempfile::tempdir().expect("a folder"));
    let dir = dir.path().join("store");
    // A save is up to 160 KiB: full after some hundred.
    let capacity_bytes = 16 << 20;
    let mut hits = 0;
    for round in 0..kills(4) {
        let lines = 150 + mix(seed ^ round) as usize % 100;
        run_and_kill(&dir, capacity_bytes, 0, lines);
        hits += compare(&dir, capacity_bytes, &BTreeSet::new(), 400);
    }
    assert!(hits > 0, "something is kept");
}
