//! `disk.codec_effective`: how fast real KV comes from a cold disk into an engine's pages, encoded and
//! not, in raw bytes a second, beside plain O_DIRECT reads of the same files in the same round.
//!
//! One store for each of the two, written by saves and opened anew before each round, so that
//! nothing is in RAM. The sequences are prefetched as an engine does for its waiting queue, and loaded
//! one after the other.

#[allow(dead_code, reason = "each benchmark uses its own part")]
#[path = "../disk/chunks.rs"]
pub mod chunks;
#[allow(dead_code, reason = "each benchmark uses its own part")]
#[path = "../disk/raw.rs"]
mod raw;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use raw::{RawFile, RawWay, ring, slot};
use stemkv::{
    Cache, Config, DiskCodec, DiskConfig, LoadOptions, Namespace, OpenNamespace, PrefetchGoal,
};
use stemkv_store::{Fence, HostArena, HostPages, KvGeometry, PageId, PageTable};

use crate::harness::{Goal, Samples, figure, table};
use crate::kv::Kv;

const PAGE_TOKENS: u32 = 16;
/// Plain reads, as the store makes them: of so many bytes, so many of them under way for each of two
/// readers, so that the disk is never without one between two runs.
const PIECE: usize = 512 << 10;
const DEPTH: usize = 16;
const RUN: usize = 32 << 20;
const READERS: usize = 2;

/// A sequence in an engine's pages, in whole blocks.
pub struct Sequence {
    pub tokens: Vec<u32>,
    pages: HostPages,
    pub table: PageTable,
}

impl Sequence {
    pub fn new(geometry: &KvGeometry, tokens: Vec<u32>) -> Sequence {
        let count = tokens.len() as u32 / PAGE_TOKENS;
        let pages = HostPages::new(geometry, PAGE_TOKENS, count).expect("memory");
        Sequence {
            table: PageTable {
                kv: pages.paged(),
                pages: (0..count).map(PageId).collect(),
            },
            tokens,
            pages,
        }
    }

    /// Its KV in fresh pages.
    pub fn of(kv: &Kv, number: u32) -> Sequence {
        let block = kv.geometry.block_tokens as usize;
        let count = (kv.tokens / block * block) as u32;
        let tokens = (0..count).map(|token| token + (number << 24)).collect();
        let sequence = Sequence::new(&kv.geometry, tokens);
        for layer in kv.geometry.layer_ids() {
            sequence.pages.write(layer, |planes| {
                for (plane, bytes) in planes.iter_mut().enumerate() {
                    let from = kv.plane_start(layer, plane);
                    let length = count as usize * kv.geometry.planes[plane].token_bytes();
                    bytes[..length].copy_from_slice(&kv.bytes[from..from + length]);
                }
            });
        }
        sequence
    }

    fn bytes(&self, geometry: &KvGeometry) -> usize {
        self.tokens.len() * geometry.token_bytes() * geometry.layers as usize
    }

    pub fn assert_same(&self, geometry: &KvGeometry, other: &Sequence) {
        for layer in geometry.layer_ids() {
            self.pages.read(layer, |ours| {
                other.pages.read(layer, |theirs| assert!(ours == theirs))
            });
        }
    }
}

/// A store with one way of writing.
struct Store<'a> {
    dir: &'a Path,
    codec: DiskCodec,
    geometry: &'a KvGeometry,
    host_bytes: u64,
}

impl Store<'_> {
    fn path(&self) -> PathBuf {
        self.dir.join(format!("{:?}", self.codec).to_lowercase())
    }

    fn open(&self) -> (Cache, OpenNamespace) {
        let mut disk = DiskConfig::new(self.path(), 4 * self.host_bytes + (1 << 30));
        disk.codec = self.codec;
        disk.queue_bytes = self.host_bytes;
        let config = Config::in_memory(self.geometry.clone(), self.host_bytes).with_disk(disk);
        let cache = Cache::open(config).expect("a valid configuration");
        let namespace = Namespace::new("a model", "1", "none", self.geometry.clone());
        let namespace = cache.namespace(&namespace).expect("its geometry");
        (cache, namespace)
    }

    /// Returns raw bytes over bytes on disk.
    fn fill(&self, all: &[Sequence]) -> f64 {
        let (cache, namespace) = self.open();
        for sequence in all {
            let save = cache.save(
                &mut namespace.prompt(&sequence.tokens),
                sequence.table.clone(),
            );
            let save = save.expect("open");
            save.all_layers(Fence::reached()).expect("once");
            save.pages_free().wait_blocking().expect("memory");
            assert_eq!(save.durable_blocking().undurable_blocks, 0);
        }
        let raw: usize = all
            .iter()
            .map(|sequence| sequence.bytes(self.geometry))
            .sum();
        let disk = cache.stats().disk.expect("there is one");
        let ratio = raw as f64 / disk.used_bytes as f64;
        cache.close_blocking().expect("nothing hangs");
        ratio
    }

    /// Loads all of them from a cold store; seconds from the first request on.
    fn load(&self, all: &[Sequence], targets: &[Sequence]) -> f64 {
        let (cache, namespace) = self.open();
        let begun = Instant::now();
        let lease = |sequence: &Sequence| {
            let lease = cache.lease(&mut namespace.prompt(&sequence.tokens));
            let lease = lease.expect("open");
            assert_eq!(lease.matched().disk_tokens, sequence.tokens.len());
            lease
        };
        let leases: Vec<_> = all.iter().map(lease).collect();
        let prefetch = |lease| {
            cache
                .prefetch(lease, PrefetchGoal::default())
                .expect("open")
        };
        let prefetches: Vec<_> = leases.iter().map(prefetch).collect();
        for ((lease, prefetch), target) in leases.iter().zip(prefetches).zip(targets) {
            let load = cache.load(lease, target.table.clone(), LoadOptions::default());
            let report = load.expect("valid").finish_blocking();
            assert_eq!(report.tokens, target.tokens.len(), "{report:?}");
            drop(prefetch);
        }
        let seconds = begun.elapsed().as_secs_f64();
        drop(leases);
        cache.close_blocking().expect("nothing hangs");
        seconds
    }
}

pub fn run(dir: &Path, all: &[Kv], rounds: usize) {
    let dir = dir.join("stemkv-bench-codec");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("--dir names a folder to write to");
    measure(&dir, all, rounds);
    std::fs::remove_dir_all(&dir).expect("ours");
}

fn measure(dir: &Path, all: &[Kv], rounds: usize) {
    let geometry = &all[0].geometry;
    let sequences: Vec<_> = (0..).zip(all).map(|(n, kv)| Sequence::of(kv, n)).collect();
    let empty = |sequence: &Sequence| Sequence::new(geometry, sequence.tokens.clone());
    let targets: Vec<_> = sequences.iter().map(empty).collect();
    let total: usize = sequences
        .iter()
        .map(|sequence| sequence.bytes(geometry))
        .sum();
    let stores = [DiskCodec::Lossless, DiskCodec::Raw].map(|codec| Store {
        dir,
        codec,
        geometry,
        host_bytes: (total + total / 8 + (64 << 20)) as u64,
    });
    let ratios = [&stores[0], &stores[1]].map(|store| store.fill(&sequences));
    let arena_bytes = READERS * (RUN + (8 << 20));
    let arena = HostArena::open(geometry, arena_bytes, |_, _| {}).expect("memory");
    let plain = [&stores[0], &stores[1]].map(|store| RawFile::of_store(&store.path(), PIECE));
    let mut slots = [(); READERS].map(|()| slot(&arena, RUN));
    // Bytes a second.
    let mut read = |plain: &RawFile| {
        let next = AtomicU64::new(0);
        let readers = slots.each_mut().map(|slot| {
            let memory = &mut slot.image_mut().expect("ours alone")[..RUN];
            let mut ring = ring(DEPTH);
            ring.know(memory);
            (ring, memory)
        });
        let begun = Instant::now();
        std::thread::scope(|scope| {
            for (mut ring, memory) in readers {
                let next = &next;
                scope.spawn(move || {
                    loop {
                        let offset = next.fetch_add(RUN as u64, Ordering::Relaxed);
                        let Some(rest) = plain.bytes().checked_sub(offset).filter(|&rest| rest > 0)
                        else {
                            return;
                        };
                        let part = &mut memory[..RUN.min(rest as usize)];
                        plain.read(RawWay::Ring, &mut ring, part, offset, PIECE, DEPTH);
                    }
                });
            }
        });
        plain.bytes() as f64 / begun.elapsed().as_secs_f64()
    };
    let mut rates = [(); 4].map(|()| Samples::default());
    let [mut gain, mut raw_gain, mut against] = [(); 3].map(|()| Samples::default());
    for round in 0..rounds {
        for turn in 0..4 {
            let side = (round + turn) % 4;
            let rate = match side {
                0 | 1 => total as f64 / stores[side].load(&sequences, &targets),
                _ => read(&plain[side - 2]),
            };
            rates[side].push(rate);
            if side < 2 {
                for (source, target) in sequences.iter().zip(&targets) {
                    source.assert_same(geometry, target);
                }
            }
        }
        let [encoded, raw, encoded_plain, raw_plain] = rates.each_ref().map(Samples::last);
        gain.push(encoded / encoded_plain);
        raw_gain.push(raw / raw_plain);
        against.push(encoded / raw);
    }
    let [encoded, raw, encoded_plain, raw_plain] =
        rates.each_ref().map(|rates| rates.median() / 1e9);
    println!(
        "{:.1} MB of KV from a cold disk into pages, GB/s of raw bytes: encoded {encoded:.2} (x{:.3} \
         smaller on disk; plain reads of its files {encoded_plain:.2}), raw {raw:.2} (x{:.3}; \
         {raw_plain:.2})",
        total as f64 / 1e6,
        ratios[0],
        ratios[1],
    );
    for (what, disk, stemkv, share) in [
        (
            "real KV from a cold disk, encoded there, raw bytes",
            encoded_plain,
            encoded,
            &gain,
        ),
        ("… not encoded", raw_plain, raw, &raw_gain),
    ] {
        table::row(
            what,
            table::rate(disk * 1e9),
            table::rate(stemkv * 1e9),
            table::percent(share.median()),
        );
    }
    figure(
        "disk.codec_effective",
        gain.median(),
        "of plain reads",
        Goal::AtLeast(1.25),
    );
    figure(
        "disk.raw_effective",
        raw_gain.median(),
        "of plain reads, without a codec",
        Goal::None,
    );
    figure(
        "disk.codec_gain",
        against.median(),
        "of a store without a codec",
        Goal::None,
    );
}
