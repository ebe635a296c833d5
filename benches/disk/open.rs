//! `disk.open`, `disk.index_memory`: a store of a million records in 8,000 files comes back, out of a cold page
//! cache and with 1,024 descriptors; and again from its payload files alone.
//!
//! The tree is complete when [`Cache::open`] returns. Its parts are told: RocksDB's own opening, the
//! rest of the tier's, the tree's. Beside it the plain reading of as many bytes as the opening read.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stemkv::{Cache, Config, DiskConfig};
use stemkv_store::disk::RocksDisk;
use stemkv_store::{
    Checksummer, CodecId, DiskTier, Dtype, HostArena, Key, KvGeometry, LayerId, RecordHeader,
    RecordId, Slot, SystemClock,
};

use crate::chunks::Random;
use crate::harness::{Goal, Samples, figure};
use crate::{Settings, table};

const CAPACITY: u64 = 64 << 30;
const DESCRIPTORS: u64 = 1024;
/// Records of a file.
const BATCH: usize = 125;
/// Blocks of a system prompt, and of each conversation behind it.
const PROMPT: u32 = 40;
const TURNS: u32 = 50;
/// Conversations that share a system prompt.
const SHARING: u32 = 100;

pub fn run(settings: &Settings) {
    let (files, rounds) = match settings.is_test {
        true => (16, 1),
        false => (8000, 5),
    };
    let records = files * BATCH;
    let limit = limit_descriptors();
    let folder = settings.folder("open");
    let dir = folder.path().join("store");
    let begun = Instant::now();
    build(&dir, records);
    println!(
        "open: {records} records in {files} files, made in {:.0} s; {} MiB, {} KiB of them beside the \
         payload files; at most {limit} descriptors",
        begun.elapsed().as_secs_f64(),
        files_below(&dir).map(|(_, bytes)| bytes).sum::<u64>() >> 20,
        beside_payload(&dir).map(|(_, bytes)| bytes).sum::<u64>() >> 10,
    );

    let (mut whole, mut database, mut tier_rest, mut tree) =
        <(Samples, Samples, Samples, Samples)>::default();
    let (mut plain, mut read) = <(Samples, Samples)>::default();
    for _ in 0..rounds {
        let way = drop_page_cache(&dir);
        let before = read_bytes();
        let begun = Instant::now();
        let cache = Cache::open(config(&dir)).expect("it opens");
        whole.add(begun.elapsed());
        read.push((read_bytes() - before) as f64);
        let stats = cache.stats();
        assert_eq!(
            stats.index.disk_blocks, records as u64,
            "the tree is complete"
        );
        let descriptors = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        println!(
            "  {:.3} s with {descriptors} descriptors, {:.1} MiB read from the disk ({way})",
            whole.last(),
            read.last() / (1 << 20) as f64
        );
        cache.close_blocking().expect("closed");

        // Again in its parts.
        drop_page_cache(&dir);
        let begun = Instant::now();
        let tier = open_tier(&dir);
        let opened = begun.elapsed();
        database.add(tier.database_opened_in());
        tier_rest.add(opened - tier.database_opened_in());
        let tier: Arc<dyn DiskTier> = Arc::new(tier);
        let begun = Instant::now();
        let cache = Cache::builder(config(&dir)).disk(tier).open();
        tree.add(begun.elapsed());
        cache.expect("it opens").close_blocking().expect("closed");

        drop_page_cache(&dir);
        let begun = Instant::now();
        read_plainly(&dir);
        plain.add(begun.elapsed());
    }
    println!(
        "  of it: RocksDB {:.3} s, the rest of the tier {:.3} s, the tree (and the tier's scan) {:.3} s; \
         {:.1} MiB read, while reading all there is beside the payload takes {:.3} s",
        database.median(),
        tier_rest.median(),
        tree.median(),
        read.median() / (1 << 20) as f64,
        plain.median(),
    );
    table::row(
        format!("open a store of {records} records, cold"),
        format!("{:.3} s to read its index", plain.median()),
        format!("{:.3} s", whole.median()),
        String::new(),
    );
    figure("disk.open", whole.median(), "s", Goal::AtMost(1.0));
    figure(
        "disk.open_files",
        files as f64,
        "files",
        Goal::AtLeast(8000.0),
    );

    memory(&dir, records);

    let mut warm = Samples::default();
    for _ in 0..rounds {
        let cache = warm.time(|| Cache::open(config(&dir)).expect("it opens"));
        cache.close_blocking().expect("closed");
    }
    figure("disk.open_again", warm.median(), "s", Goal::None);
    rebuild(&dir, records);
}

/// What the tier keeps in memory beside the tree, of everything that its opening leaves.
fn memory(dir: &Path, records: usize) {
    let before = resident_bytes();
    let tier = open_tier(dir);
    let opened = resident_bytes();
    let mut seen = 0;
    tier.scan(&mut |_| seen += 1).expect("readable");
    let scanned = resident_bytes();
    assert_eq!(seen, records);
    println!(
        "  the tier's memory: {:.1} MiB once opened, {:.1} MiB once scanned",
        (opened - before) / (1 << 20) as f64,
        (scanned - before) / (1 << 20) as f64,
    );
    let bytes = (scanned - before) / records as f64;
    figure(
        "disk.index_memory",
        bytes,
        "B a record",
        Goal::AtMost(100.0),
    );
    tier.close().expect("closed");
}

/// RocksDB's database is lost: everything comes from the payload files.
fn rebuild(dir: &Path, records: usize) {
    fs::remove_file(dir.join("db-0/CURRENT")).expect("an opened store has one");
    drop_page_cache(dir);
    let before = read_bytes();
    let begun = Instant::now();
    let cache = Cache::open(config(dir)).expect("it is made again");
    let took = begun.elapsed().as_secs_f64();
    assert_eq!(cache.stats().index.disk_blocks, records as u64);
    println!(
        "  made again from its payload files, reading {:.1} MiB",
        (read_bytes() - before) as f64 / (1 << 20) as f64
    );
    figure("disk.rebuild", took, "s", Goal::None);
    cache.close_blocking().expect("closed");
}

/// Two slabs of 2 KiB: with its header a record is 8 KiB, and 12 in its file.
fn geometry() -> KvGeometry {
    KvGeometry::gqa(1, 1, 64, Dtype::Bf16, 16).expect("valid")
}

fn config(dir: &Path) -> Config {
    Config::in_memory(geometry(), 1 << 20).with_disk(DiskConfig::new(dir, CAPACITY))
}

fn open_tier(dir: &Path) -> RocksDisk {
    let clock = Arc::new(SystemClock::default());
    RocksDisk::open(dir, &geometry(), CAPACITY, clock).expect("it opens")
}

/// Writes the store through the tier, as saves do: prefixes that branch, each batch to durable, and a
/// tenth of the records used later.
fn build(dir: &Path, records: usize) {
    let tier = open_tier(dir);
    let arena_bytes = 4 * BATCH * 2 * (RecordHeader::BYTES + geometry().payload_bytes());
    let arena = HostArena::open(&geometry(), arena_bytes, |_, _| {}).expect("memory");
    let mut blocks =
        (0..records as u64).scan(Prefixes::default(), |prefixes, _| Some(prefixes.next()));
    let mut touched: Vec<RecordId> = Vec::new();
    // Two batches are written side by side.
    let (send, receive) = std::sync::mpsc::sync_channel::<Vec<Slot>>(1);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let receive = std::sync::Mutex::new(receive);
            std::thread::scope(|scope| {
                let write = || {
                    let mut used = Vec::new();
                    loop {
                        let turn = receive.lock().expect("no panic");
                        let Ok(batch) = turn.recv() else { return used };
                        drop(turn);
                        let ids = tier.write(&batch).expect("the disk works").expect("room");
                        used.extend(ids.into_iter().step_by(10));
                    }
                };
                let writers = [scope.spawn(write), scope.spawn(write)];
                writers
                    .map(|writer| writer.join().expect("no panic"))
                    .concat()
            })
        });
        loop {
            let batch: Vec<_> = blocks.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                break;
            }
            send.send(seal(&arena, &batch)).expect("the writers live");
        }
        drop(send);
        touched = writer.join().expect("no panic");
    });
    let now = 1_900_000_000_000;
    for (minutes, some) in (0..).zip(touched.chunks(4096)) {
        tier.touch(some, now + 60_000 * minutes)
            .expect("the disk works");
    }
    tier.close().expect("closed");
}

/// A block: its own key, its parent's, its depth.
type Block = (Key, Key, u32);

/// System prompts, and conversations behind them.
struct Prefixes {
    random: Random,
    prompt_end: Key,
    last: Key,
    at: u32,
}

const ROOT: Key = Key([0xbe; 32]);

impl Default for Prefixes {
    fn default() -> Self {
        Prefixes {
            random: Random(1),
            prompt_end: ROOT,
            last: ROOT,
            at: 0,
        }
    }
}

impl Prefixes {
    fn next(&mut self) -> Block {
        let at = self.at % (PROMPT + SHARING * TURNS);
        self.at += 1;
        let turn = at.checked_sub(PROMPT).map(|at| at % TURNS);
        let (parent, depth) = match turn {
            None if at == 0 => (ROOT, 0),
            None => (self.last, at),
            Some(0) => (self.prompt_end, PROMPT),
            Some(turn) => (self.last, PROMPT + turn),
        };
        let mut key = Key([0; 32]);
        self.random.fill(&mut key.0);
        self.last = key;
        if at + 1 == PROMPT {
            self.prompt_end = key;
        }
        (key, parent, depth)
    }
}

fn seal(arena: &HostArena, blocks: &[Block]) -> Vec<Slot> {
    let geometry = geometry();
    let slots = loop {
        if let Some(slots) = arena.allocate(geometry.payload_bytes(), blocks.len()) {
            break slots;
        }
        std::thread::yield_now();
    };
    let sealed = slots
        .into_iter()
        .zip(blocks)
        .map(|(mut slot, &(key, parent, depth))| {
            let image = slot.image_mut().expect("ours alone");
            let payload = &mut image[RecordHeader::BYTES..][..geometry.payload_bytes()];
            payload[..32].copy_from_slice(&key.0);
            let sum = Checksummer::of(&payload[..geometry.slab_bytes()]);
            slot.set_slab(LayerId(0), sum);
            let header = RecordHeader {
                namespace: ROOT,
                parent,
                key,
                depth,
                tokens: geometry.block_tokens,
                geometry: geometry.fingerprint(),
                layers: 0..geometry.layers,
                codec: CodecId::Raw,
                slabs: Vec::new(),
            };
            slot.seal(header).expect("complete")
        });
    sealed.collect()
}

/// Takes every page of the store out of the page cache; says how.
fn drop_page_cache(dir: &Path) -> &'static str {
    // Dirty pages stay otherwise.
    // SAFETY: no arguments, no memory.
    unsafe { libc::sync() };
    if fs::write("/proc/sys/vm/drop_caches", "3").is_ok() {
        return "page, inode and name caches dropped";
    }
    for (path, _) in files_below(dir) {
        use std::os::fd::AsRawFd as _;
        let Ok(file) = File::open(path) else { continue };
        // SAFETY: the descriptor is open through the call, which touches no memory of ours.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }
    "page cache dropped file by file"
}

fn read_plainly(dir: &Path) {
    let mut buffer = vec![0; 1 << 20];
    for (path, _) in beside_payload(dir) {
        let Ok(mut file) = File::open(path) else {
            continue;
        };
        while file.read(&mut buffer).is_ok_and(|bytes| bytes > 0) {}
    }
}

fn beside_payload(dir: &Path) -> impl Iterator<Item = (PathBuf, u64)> {
    files_below(dir).filter(|(path, _)| {
        !path
            .parent()
            .is_some_and(|folder| folder.ends_with("payload"))
    })
}

/// The files of a folder with their allocated bytes.
fn files_below(dir: &Path) -> impl Iterator<Item = (PathBuf, u64)> {
    let mut folders = vec![dir.to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("ours").flatten() {
            let meta = entry.metadata().expect("nobody deletes meanwhile");
            match meta.is_dir() {
                true => folders.push(entry.path()),
                false => files.push((entry.path(), meta.blocks() * 512)),
            }
        }
    }
    files.into_iter()
}

/// Bytes that this process had read from disks.
fn read_bytes() -> u64 {
    let text = fs::read_to_string("/proc/self/io").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("read_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// Bytes of memory that this process has, free lists given back.
fn resident_bytes() -> f64 {
    // What the allocator keeps after large buffers is not the tier's.
    // SAFETY: any argument is valid.
    unsafe { libc::malloc_trim(0) };
    std::thread::sleep(Duration::from_millis(50));
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) as f64 * 4096.0
}

/// Lets this process have [`DESCRIPTORS`] descriptors from here on; returns what it may have.
fn limit_descriptors() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to the struct above, which lives through the call.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    limit.rlim_cur = limit.rlim_cur.min(DESCRIPTORS);
    // SAFETY: as above.
    unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    limit.rlim_cur
}
