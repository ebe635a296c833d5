//! Chunks that saves put into RAM encoded, beside raw ones: random operations on one store, in which
//! whatever a load calls whole is compared byte by byte with what was computed for those tokens, while
//! saves are cut off, chunks are evicted, written, read back, promoted and demoted, the power goes, and
//! single bits flip in RAM and on disk. A miss is always right; a wrong byte never is.
//!
//! How: the KV of a block is a function of the tokens up to its end, so there is nothing to remember.
//! Some blocks are noise, some are noise in one layer, some are zeros, the rest is like KV. A failure
//! prints its seed.
#![cfg(feature = "sim")]

#[path = "../store/tests/support/random.rs"]
mod random;

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use random::Random;
use stemkv::{
    Cache, Config, DiskCodec, DiskConfig, HashPath as _, HostCodec, LoadOptions, Namespace,
    OpenNamespace,
};
use stemkv_store::{
    CodecId, CpuDevice, Device, DeviceArena, DeviceInfo, Dtype, Fence, HostArena, HostPages,
    KvGeometry, LayerId, PageId, PageTable, Result, SimDevice, SimDisk, SimMedium, Stream,
    Submitted, SystemClock, Transfer,
};

const BLOCK: usize = 32;
const PAGE: usize = 16;
const BLOCKS_MAX: usize = 10;
/// Of one token in a plane.
const TOKEN_BYTES: usize = 256;
const POISON: u8 = 0x5a;

fn geometry() -> KvGeometry {
    KvGeometry::gqa(3, 2, 64, Dtype::Bf16, BLOCK as u32).expect("valid")
}

fn image_bytes() -> u64 {
    4096 + geometry().payload_bytes() as u64
}

impl Random {
    fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// A prompt of a small tree.
    fn prompt(&mut self) -> Vec<u32> {
        let blocks = 1 + self.below(BLOCKS_MAX);
        let mut tokens = Vec::new();
        for _ in 0..blocks {
            let branch = self.below(3).saturating_sub(1) as u32;
            tokens.extend((0..BLOCK as u32).map(|token| token + 100 * branch));
        }
        tokens
    }
}

/// The KV of the last block of `prefix` in one layer: K, then V.
fn kv(prefix: &[u32], layer: u32) -> Vec<u8> {
    let mut seed = Random(u64::from(layer));
    let mut kind = Random(0);
    for &token in prefix {
        seed.0 ^= u64::from(token) + 1;
        kind.0 ^= u64::from(token) + 1;
        seed.next();
        kind.next();
    }
    let mut bytes: Vec<u8> = (0..geometry().slab_bytes() / 8)
        .flat_map(|_| seed.next().to_le_bytes())
        .collect();
    let kind = kind.next() % 6;
    match (kind, layer) {
        (0, _) | (1, 1) => {}
        (2, _) => bytes[100..].fill(0),
        _ => bytes
            .iter_mut()
            .skip(1)
            .step_by(2)
            .for_each(|high| *high = *high & 0x83 | 0x3c),
    }
    bytes
}

/// An engine's pages, in an order of its own.
struct Engine {
    pages: HostPages,
    table: Vec<PageId>,
}

impl Engine {
    fn new(random: &mut Random) -> Self {
        let count = (BLOCKS_MAX * BLOCK / PAGE) as u32;
        let pages = HostPages::new(&geometry(), PAGE as u32, count).expect("memory");
        let mut table: Vec<PageId> = (0..count).map(PageId).collect();
        for i in (1..table.len()).rev() {
            table.swap(i, random.below(i + 1));
        }
        Engine { pages, table }
    }

    fn table(&self) -> PageTable {
        PageTable {
            kv: self.pages.paged(),
            pages: self.table.clone().into(),
        }
    }

    /// Where a token's bytes are in a plane.
    fn at(&self, token: usize) -> usize {
        let page = self.table[token / PAGE].0 as usize;
        (page * PAGE + token % PAGE) * TOKEN_BYTES
    }

    fn compute(&self, tokens: &[u32]) {
        for layer in geometry().layer_ids() {
            let blocks = tokens.len() / BLOCK;
            let kv: Vec<_> = (1..=blocks)
                .map(|end| kv(&tokens[..end * BLOCK], layer.0))
                .collect();
            self.pages.write(layer, |planes| {
                for (plane, bytes) in planes.iter_mut().enumerate() {
                    for token in 0..blocks * BLOCK {
                        let of = (plane * BLOCK + token % BLOCK) * TOKEN_BYTES;
                        let at = self.at(token);
                        bytes[at..at + TOKEN_BYTES]
                            .copy_from_slice(&kv[token / BLOCK][of..of + TOKEN_BYTES]);
                    }
                }
            });
        }
    }

    fn poison(&self) {
        for layer in geometry().layer_ids() {
            self.pages.write(layer, |planes| {
                planes.iter_mut().for_each(|bytes| bytes.fill(POISON));
            });
        }
    }

    /// Tokens `from..to` hold their KV, and those below `from` were left alone.
    fn check(&self, tokens: &[u32], from: usize, to: usize) {
        for layer in geometry().layer_ids() {
            self.pages.read(layer, |planes| {
                let mut block = Vec::new();
                for token in 0..to {
                    if token % BLOCK == 0 {
                        block = kv(&tokens[..token - token % BLOCK + BLOCK], layer.0);
                    }
                    for (plane, bytes) in planes.iter().enumerate() {
                        let got = &bytes[self.at(token)..][..TOKEN_BYTES];
                        let of = (plane * BLOCK + token % BLOCK) * TOKEN_BYTES;
                        let is_right = match token < from {
                            true => got.iter().all(|&byte| byte == POISON),
                            false => got == &block[of..of + TOKEN_BYTES],
                        };
                        assert!(is_right, "token {token}, layer {layer}, plane {plane}");
                    }
                }
            });
        }
    }
}

/// A device that remembers the host tier's arena, so that its memory can be damaged.
struct Spy {
    device: Arc<dyn Device>,
    /// As a GPU without the codec's kernels.
    copies_only: bool,
    /// As a GPU, which is no CPU all the same.
    is_blocking: bool,
    arena: Arc<Mutex<Option<HostArena>>>,
}

impl Device for Spy {
    fn info(&self) -> DeviceInfo {
        let info = self.device.info();
        DeviceInfo {
            blocking: info.blocking || self.is_blocking,
            ..info
        }
    }
    fn attach(&self, arena: &HostArena) -> Result<()> {
        *self.arena.lock().expect("no panic") = Some(arena.clone());
        self.device.attach(arena)
    }
    fn arena(&self, geometry: &KvGeometry, capacity_bytes: u64) -> Result<DeviceArena> {
        self.device.arena(geometry, capacity_bytes)
    }
    fn record(&self, stream: Stream) -> Result<Fence> {
        self.device.record(stream)
    }
    fn order(&self, stream: Stream, fence: &Fence) -> Result<()> {
        self.device.order(stream, fence)
    }
    fn decodes(&self, codec: CodecId) -> bool {
        codec == CodecId::Raw || !self.copies_only && self.device.decodes(codec)
    }
    fn encodes(&self, codec: CodecId) -> bool {
        !self.copies_only && self.device.encodes(codec)
    }
    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted> {
        assert!(!self.copies_only || transfer.encoded().is_none());
        self.device.submit(transfer, layer, after)
    }
}

/// How a store is set up.
#[derive(Clone, Copy, Debug)]
struct Setup {
    host: HostCodec,
    /// `None` for a store in RAM alone.
    disk: Option<DiskCodec>,
    device_chunks: u64,
    is_sim: bool,
    copies_only: bool,
    is_blocking: bool,
}

impl Setup {
    fn any(random: &mut Random) -> Setup {
        let host = [HostCodec::Lossless, HostCodec::Auto, HostCodec::Raw];
        let disk = [DiskCodec::Lossless, DiskCodec::Auto, DiskCodec::Raw];
        Setup {
            host: host[random.below(4).saturating_sub(1)],
            disk: disk.get(random.below(4)).copied(),
            device_chunks: [0, 5, 20][random.below(3)],
            is_sim: random.once_in(3),
            copies_only: random.once_in(8),
            is_blocking: false,
        }
    }
}

struct World {
    cache: Cache,
    namespace: OpenNamespace,
    arena: HostArena,
    medium: SimMedium,
}

impl World {
    fn open(setup: Setup, medium: SimMedium, host_chunks: u64) -> World {
        let device: Arc<dyn Device> = match setup.is_sim {
            true => Arc::new(SimDevice::sound()),
            false => Arc::new(CpuDevice::new()),
        };
        let arena = Arc::default();
        let spy = Spy {
            device,
            copies_only: setup.copies_only,
            is_blocking: setup.is_blocking,
            arena: Arc::clone(&arena),
        };
        let mut config = Config::in_memory(geometry(), host_chunks * image_bytes());
        config.host.codec = setup.host;
        config.device.capacity_bytes = setup.device_chunks * geometry().payload_bytes() as u64;
        let builder = match setup.disk {
            None => Cache::builder(config),
            Some(codec) => {
                let capacity = 24 << 20;
                let clock = Arc::new(SystemClock::default());
                let disk = SimDisk::open(&medium, &geometry(), capacity, clock);
                let mut of_disk = DiskConfig::new("simulated", capacity);
                of_disk.batch_delay_ms = 0;
                of_disk.codec = codec;
                Cache::builder(config.with_disk(of_disk)).disk(Arc::new(disk.expect("not open")))
            }
        };
        let cache = builder.device(Arc::new(spy)).open().expect("valid");
        let described = Namespace::new("model", "1", "none", geometry());
        let namespace = cache.namespace(&described).expect("same geometry");
        let arena = arena.lock().expect("no panic").clone().expect("attached");
        World {
            cache,
            namespace,
            arena,
            medium,
        }
    }

    /// Saves a prompt; now and then with its layers in any order, or given up in the middle.
    fn save(&self, random: &mut Random, engine: &Engine, tokens: &[u32]) {
        engine.compute(tokens);
        let mut prompt = self.namespace.prompt(tokens);
        let save = self.cache.save(&mut prompt, engine.table()).expect("open");
        let free = save.pages_free();
        let mut layers = [0, 1, 2];
        layers.rotate_left(random.below(3));
        let is_given_up = random.once_in(4);
        let handed_over = if is_given_up { random.below(3) } else { 3 };
        match random.once_in(3) {
            true if !is_given_up => save.all_layers(Fence::reached()).expect("once"),
            _ => {
                for &layer in &layers[..handed_over] {
                    save.layer(layer, Fence::reached()).expect("once");
                }
            }
        }
        if is_given_up || random.once_in(3) {
            drop(save);
        }
        free.wait_blocking().expect("a sound device");
    }

    /// Loads what there is of a prompt, and compares it.
    fn load(&self, random: &mut Random, engine: &Engine, tokens: &[u32]) -> usize {
        engine.poison();
        let mut prompt = self.namespace.prompt(tokens);
        let lease = self.cache.lease(&mut prompt).expect("open");
        let from = match random.once_in(2) {
            true => random.below(lease.tokens() + 1),
            false => 0,
        };
        let options = LoadOptions {
            from_token: from,
            ..LoadOptions::default()
        };
        let load = self.cache.load(&lease, engine.table(), options);
        let load = load.expect("valid");
        if random.once_in(10) {
            load.cancel().wait_blocking().expect("a sound device");
            return 0;
        }
        let report = load.finish_blocking();
        engine.check(tokens, from, report.tokens);
        report.tokens
    }

    /// Nothing moves any more.
    fn settle(&self) {
        self.cache.flush_blocking();
        let begun = Instant::now();
        loop {
            let stats = self.cache.stats();
            let of_device = stats.device.map_or(0, |device| device.filling_bytes);
            if stats.host.filling_bytes + of_device == 0 && stats.index.pins == 0 {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(60), "something hangs");
            thread::yield_now();
        }
    }

    /// Flips one bit of the host tier's memory: of a header where there is one, or of anything.
    fn flip_in_ram(&self, random: &mut Random) {
        let file = File::from(self.arena.as_fd().try_clone_to_owned().expect("open"));
        let bytes = self.arena.usage().capacity_bytes;
        let mut memory = vec![0; bytes];
        file.read_exact_at(&mut memory, 0).expect("mapped");
        let headers: Vec<usize> = (0..bytes)
            .step_by(4096)
            .filter(|&at| memory[at..].starts_with(b"stemkvRC"))
            .collect();
        let at = match headers.is_empty() || random.once_in(2) {
            true => random.below(bytes),
            false => headers[random.below(headers.len())] + random.below(256 + 3 * 16),
        };
        let flipped = memory[at] ^ 1 << random.below(8);
        file.write_all_at(&[flipped], at as u64).expect("mapped");
    }

    fn flip_on_disk(&self, random: &mut Random, tokens: &[u32]) {
        let mut prompt = self.namespace.prompt(tokens);
        let blocks = prompt.blocks();
        prompt.hash_to(blocks);
        let key = prompt.hashed()[random.below(blocks)];
        let bit = random.below(8 * image_bytes() as usize);
        self.medium.flip_bit(&key, bit);
    }

    /// Everything in RAM is lost, and of the disk what was not synced, or part of it.
    fn cut_power(self, setup: Setup, random: &mut Random, host_chunks: u64) -> World {
        let medium = self.medium.after_power_cut(random.next());
        drop(self);
        World::open(setup, medium, host_chunks)
    }
}

#[test]
fn whatever_is_loaded_is_what_was_computed() {
    let (mut loaded, mut encoded, mut corrupt, mut evicted) = (0, 0, 0, 0);
    let (mut risen, mut sunk, mut again) = (0, 0, 0);
    let seeds = std::env::var("CODED_SEEDS").map_or(48, |seeds| seeds.parse().expect("a number"));
    for seed in 0..seeds {
        let random = &mut Random(seed);
        let setup = Setup::any(random);
        println!("seed {seed}: {setup:?}");
        let host_chunks = 8 + random.below(16) as u64;
        let mut world = World::open(setup, SimMedium::default(), host_chunks);
        let engine = Engine::new(random);
        let damages = random.once_in(2);
        for _ in 0..60 {
            let tokens = random.prompt();
            match random.below(12) {
                0..4 => world.save(random, &engine, &tokens),
                4..9 => loaded += world.load(random, &engine, &tokens),
                9 if damages => {
                    world.settle();
                    for _ in 0..6 {
                        world.flip_in_ram(random);
                    }
                }
                10 if damages => {
                    world.settle();
                    world.flip_on_disk(random, &tokens);
                }
                11 if random.once_in(4) => {
                    let stats = world.cache.stats();
                    corrupt += stats.counter("corrupt_blocks");
                    world = world.cut_power(setup, random, host_chunks);
                }
                _ => world.cache.flush_blocking(),
            }
        }
        world.settle();
        world.cache.check();
        let stats = world.cache.stats();
        encoded += stats.counter("saved_encoded_blocks");
        corrupt += stats.counter("corrupt_blocks");
        evicted += stats.counter("evicted_host_blocks");
        risen += stats.counter("device_blocks");
        sunk += stats.counter("demoted_blocks");
        again += stats.counter("resaved_blocks");
        assert!(stats.host.raw_bytes >= stats.host.published_bytes || setup.copies_only);
        world.cache.close_blocking().expect("nothing hangs");
    }
    println!(
        "{loaded} tokens, {encoded} encoded, {again} again, {corrupt} corrupt, {evicted} evicted, {risen} up, {sunk} down"
    );
    for (what, count) in [
        ("loaded", loaded as u64),
        ("encoded", encoded),
        ("saved again", again),
        ("corrupt", corrupt),
        ("evicted", evicted),
        ("promoted", risen),
        ("demoted", sunk),
    ] {
        assert!(
            count > 0,
            "nothing was {what}: the test shows nothing of it"
        );
    }
}

/// A device that blocks while bytes move need not be a CPU: it encodes before RAM is full.
#[test]
fn a_blocking_gpu_encodes_though_ram_is_not_full() {
    for (is_sim, expected) in [(true, "exp: "), (false, "raw: ")] {
        let setup = Setup {
            host: HostCodec::Auto,
            disk: None,
            device_chunks: 0,
            is_sim,
            copies_only: false,
            is_blocking: true,
        };
        let world = World::open(setup, SimMedium::default(), 8);
        let codec = world.cache.stats().codec.save;
        assert!(codec.starts_with(expected), "{codec}");
    }
}

#[test]
fn ten_threads_save_and_load_raw_and_encoded_chunks() {
    for (seed, is_sim) in [(100, false), (101, true)] {
        let setup = Setup {
            host: HostCodec::Lossless,
            disk: Some(DiskCodec::Auto),
            device_chunks: 6,
            is_sim,
            copies_only: false,
            is_blocking: false,
        };
        let world = World::open(setup, SimMedium::default(), 24);
        thread::scope(|scope| {
            for number in 0..10 {
                let world = &world;
                scope.spawn(move || {
                    let random = &mut Random(seed * 1000 + number);
                    let engine = Engine::new(random);
                    for _ in 0..25 {
                        let tokens = random.prompt();
                        match random.below(3) {
                            0 => world.save(random, &engine, &tokens),
                            _ => drop(world.load(random, &engine, &tokens)),
                        }
                    }
                });
            }
        });
        world.settle();
        world.cache.check();
        let stats = world.cache.stats();
        assert!(stats.counter("saved_encoded_blocks") > 0);
        assert_eq!(stats.counter("corrupt_blocks"), 0);
        world.cache.close_blocking().expect("nothing hangs");
    }
}
