//! `disk.warm`: how fast warming brings the hottest prefixes into RAM, beside plain reads of as many bytes of
//! the same files; and how long a hit takes that comes from disk meanwhile, beside the same hits in a
//! store that does not warm.
//!
//! One store for all of it, opened anew each time, so that nothing is in RAM, and read past the page
//! cache. Hits are the coldest prompts, which are not warmed, loaded into an engine's pages one after the other
//! with pauses. Each is the hottest afterwards.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stemkv::{
    Cache, Config, DiskCodec, DiskConfig, LoadOptions, Namespace, OpenNamespace, Warming,
};
use stemkv_store::disk::ReadSizes;
use stemkv_store::{Fence, HostArena, HostPages, KvGeometry, PageId, PageTable, RecordHeader};

use crate::chunks::{self, Random};
use crate::harness::{Goal, Samples, figure};
use crate::raw::{RawFile, RawWay, ring, slot};
use crate::read::RUN;
use crate::{Settings, table};

const CHUNK_BYTES: usize = 1 << 20;
const RUN_BYTES: usize = RUN * CHUNK_BYTES;
/// Between two hits.
const PAUSE: Duration = Duration::from_millis(50);

/// Sizes of one run of the benchmark.
struct Sizes {
    rounds: usize,
    /// Prompts that are warmed, and those that are not.
    hot: usize,
    cold: usize,
}

pub fn run(settings: &Settings) {
    let sizes = match settings.is_test {
        true => Sizes {
            rounds: 1,
            hot: 2,
            cold: 2,
        },
        false => Sizes {
            rounds: 7,
            hot: 48,
            cold: 16,
        },
    };
    let folder = settings.folder("warm");
    let mut store = Store::new(folder.path(), &sizes);
    let plain = RawFile::of_store(&store.dir, CHUNK_BYTES);
    let arena = HostArena::open(&store.geometry, RUN_BYTES + (8 << 20), |_, _| {});
    let arena = arena.expect("memory");
    let mut memory = slot(&arena, RUN_BYTES);
    let memory = &mut memory.image_mut().expect("ours alone")[..RUN_BYTES];
    let ReadSizes {
        depth,
        piece_bytes_max,
        ..
    } = ReadSizes::default();
    let mut ring = ring(depth);
    ring.know(memory);
    let warm_bytes = store.warm_bytes;
    let mut read_plainly = || {
        let bytes = plain.bytes().min(warm_bytes);
        let begun = Instant::now();
        for offset in (0..bytes).step_by(RUN_BYTES) {
            let length = RUN_BYTES.min((plain.bytes() - offset) as usize);
            let part = &mut memory[..length];
            let way = RawWay::Ring;
            plain.read(way, &mut ring, part, offset, piece_bytes_max, depth);
        }
        bytes as f64 / begun.elapsed().as_secs_f64()
    };
    let [mut plain, mut alone, mut shares, mut beside] = [(); 4].map(|()| Samples::default());
    let [mut quiet, mut busy] = [(); 2].map(|()| Samples::default());
    for round in 0..sizes.rounds {
        for turn in 0..4 {
            match (round + turn) % 4 {
                0 => plain.push(read_plainly()),
                1 => alone.push(store.warm()),
                2 => {
                    let (cache, namespace) = store.open(0);
                    for _ in 0..sizes.cold {
                        store.hit(&cache, &namespace, &mut quiet);
                        std::thread::sleep(PAUSE);
                    }
                    cache.close_blocking().expect("nothing hangs");
                }
                _ => beside.push(store.warm_beside_hits(&mut busy)),
            }
        }
        shares.push(alone.last() / plain.last());
    }
    let ms = |seconds: f64| seconds * 1e3;
    println!(
        "warming of {} MiB: {:.2} GB/s, plain reads {:.2} GB/s; with hits beside it {:.2} GB/s",
        warm_bytes >> 20,
        alone.median() / 1e9,
        plain.median() / 1e9,
        beside.median() / 1e9,
    );
    println!(
        "  a hit of {} MiB from disk, ms: quiet P50 {:.1}, P99 {:.1}; while it warms P50 {:.1}, P99 {:.1}, \
         of {} hits",
        RUN_BYTES >> 20,
        ms(quiet.median()),
        ms(quiet.p99()),
        ms(busy.median()),
        ms(busy.p99()),
        busy.values().count(),
    );
    table::row(
        "warming RAM after a restart",
        table::rate(plain.median()),
        table::rate(alone.median()),
        table::percent(shares.median()),
    );
    table::row(
        format!("… a {} MiB hit from disk meanwhile", RUN_BYTES >> 20),
        String::new(),
        format!(
            "{:.0} ms (quiet {:.0})",
            ms(busy.median()),
            ms(quiet.median())
        ),
        String::new(),
    );
    figure("disk.warm", shares.median(), "of raw", Goal::None);
    figure(
        "disk.warm_hit",
        busy.median() / quiet.median(),
        "of the quiet median",
        Goal::None,
    );
    figure(
        "disk.warm_hit_p99",
        busy.p99() / quiet.median(),
        "of the quiet median",
        Goal::None,
    );
}

/// A prompt of one run.
#[derive(Clone, Copy)]
struct Prompt(u32);

impl Prompt {
    fn tokens(self, geometry: &KvGeometry) -> Vec<u32> {
        let count = RUN as u32 * geometry.block_tokens;
        (0..count).map(|token| self.0 << 16 | token).collect()
    }
}

/// A store of prompts on disk, and an engine's pages for one.
struct Store {
    dir: PathBuf,
    geometry: KvGeometry,
    host_bytes: u64,
    disk_bytes: u64,
    warm_bytes: u64,
    cold: usize,
    /// The coldest first.
    prompts: VecDeque<Prompt>,
    _pages: HostPages,
    table: PageTable,
}

impl Store {
    fn new(folder: &Path, sizes: &Sizes) -> Store {
        let geometry = chunks::geometry(CHUNK_BYTES);
        let pages = HostPages::new(&geometry, geometry.block_tokens, RUN as u32).expect("memory");
        let mut random = Random(11);
        for layer in geometry.layer_ids() {
            pages.write(layer, |planes| {
                planes.iter_mut().for_each(|plane| random.fill(plane));
            });
        }
        let record_bytes = (RecordHeader::BYTES + CHUNK_BYTES) as u64;
        let run_bytes = RUN as u64 * record_bytes;
        let all_bytes = (sizes.hot + sizes.cold) as u64 * run_bytes;
        let store = Store {
            dir: folder.join("store"),
            // An eighth stays free of what is warmed.
            host_bytes: all_bytes * 5 / 4 + (64 << 20),
            disk_bytes: 2 * all_bytes + (1 << 30),
            warm_bytes: sizes.hot as u64 * run_bytes,
            cold: sizes.cold,
            prompts: (0..(sizes.hot + sizes.cold) as u32).map(Prompt).collect(),
            table: PageTable {
                kv: pages.paged(),
                pages: (0..RUN as u32).map(PageId).collect(),
            },
            _pages: pages,
            geometry,
        };
        let (cache, namespace) = store.open(0);
        for prompt in &store.prompts {
            let tokens = prompt.tokens(&store.geometry);
            let save = cache.save(&mut namespace.prompt(&tokens), store.table.clone());
            let save = save.expect("open");
            save.all_layers(Fence::reached()).expect("once");
            save.pages_free().wait_blocking().expect("memory");
            assert_eq!(save.durable_blocking().durable_blocks, RUN);
        }
        cache.close_blocking().expect("nothing hangs");
        store
    }

    /// Opens it with nothing in RAM.
    fn open(&self, warm_bytes: u64) -> (Cache, OpenNamespace) {
        let mut disk = DiskConfig::new(self.dir.clone(), self.disk_bytes);
        disk.codec = DiskCodec::Raw;
        disk.warm_bytes = warm_bytes;
        let config = Config::in_memory(self.geometry.clone(), self.host_bytes).with_disk(disk);
        let cache = Cache::open(config).expect("a valid configuration");
        let namespace = Namespace::new("a model", "1", "none", self.geometry.clone());
        let namespace = cache.namespace(&namespace).expect("its geometry");
        (cache, namespace)
    }

    /// Loads the coldest prompt, which is on disk alone.
    fn hit(&mut self, cache: &Cache, namespace: &OpenNamespace, samples: &mut Samples) {
        let Some(prompt) = self.prompts.pop_front() else {
            return;
        };
        let tokens = prompt.tokens(&self.geometry);
        let report = samples.time(|| {
            let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
            let load = cache.load(&lease, self.table.clone(), LoadOptions::default());
            load.expect("valid").finish_blocking()
        });
        assert_eq!(report.disk_blocks, RUN, "{report:?}");
        self.prompts.push_back(prompt);
    }

    /// Opens and warms; bytes a second.
    fn warm(&mut self) -> f64 {
        self.warm_with(&mut |_, _, _| std::thread::sleep(Duration::from_millis(1)))
    }

    fn warm_beside_hits(&mut self, busy: &mut Samples) -> f64 {
        let mut left = self.cold;
        self.warm_with(&mut |store, cache, namespace| {
            if left > 0 {
                left -= 1;
                store.hit(cache, namespace, busy);
            }
            let paused = Instant::now();
            while paused.elapsed() < PAUSE && is_warming(cache) {
                std::thread::sleep(Duration::from_millis(1));
            }
        })
    }

    /// `meanwhile` again and again until it has ended.
    fn warm_with(&mut self, meanwhile: &mut dyn FnMut(&mut Store, &Cache, &OpenNamespace)) -> f64 {
        let begun = Instant::now();
        let (cache, namespace) = self.open(self.warm_bytes);
        let opened = begun.elapsed();
        while is_warming(&cache) {
            meanwhile(self, &cache, &namespace);
        }
        let took = begun.elapsed() - opened;
        let stats = cache.stats();
        let warming = stats.disk.as_ref().map(|disk| disk.warming);
        assert_eq!(warming, Some(Warming::Limit));
        let bytes = stats.counter("warmed_bytes");
        assert_eq!(bytes, self.warm_bytes);
        cache.close_blocking().expect("nothing hangs");
        bytes as f64 / took.as_secs_f64()
    }
}

fn is_warming(cache: &Cache) -> bool {
    let disk = cache.stats().disk;
    disk.is_some_and(|disk| disk.warming == Warming::UnderWay)
}
