//! Host tier: how near saves and loads come to plain memcpy, what a miss costs the engine, and what a save
//! costs the store for each chunk besides the copies.
//!
//! Geometry of Llama-3-8B (blocks of 16 tokens: chunks of 2 MiB; pages of 16 tokens in random
//! order: pieces of 32 KiB), CPU device, one transfer thread, checksums included. The ceiling is one
//! contiguous memcpy of the same bytes, measured in turn with each run.
//!
//! What a save costs besides: prompts of 256 MiB in slabs of 16 KiB and 4 KiB, into a tier of three of them, so
//! that others have to go; a device that moves nothing says at once that it has, and how long slabs are
//! encoded. Hashing is left out.
//!
//! `host [moves|miss|save_chunk]` measures one of these alone.
//!
//! Not measured: a GPU (benches/gpu.rs), more than one prompt at a time, disk.

mod harness;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use harness::{Goal, Samples, figure, is_test};
use stemkv::{Cache, Config, HostCodec, LoadOptions, Namespace};
use stemkv_store::{
    Checksum, CodecId, Device, DeviceInfo, Dtype, Fence, HostArena, HostPages, KvGeometry, LayerId,
    PageId, PageTable, Result, SlabEntry, SlabSums, Stream, Submitted, Transfer,
};

fn main() {
    // A figure of a small run would mislead, so the small run only has to work.
    let wanted = std::env::args()
        .skip(1)
        .find(|name| !name.starts_with("--"));
    let wants = |name: &str| wanted.as_ref().is_none_or(|wanted| wanted == name);
    if wants("moves") {
        let (blocks, rounds) = if is_test() { (4, 2) } else { (128, 15) };
        moves(blocks, rounds, HostCodec::Auto, false);
        for codec in [HostCodec::Raw, HostCodec::Lossless] {
            moves(blocks, rounds, codec, true);
        }
    }
    if wants("miss") {
        miss(if is_test() { 2 } else { 200 });
    }
    if wants("save_chunk") {
        let (chunks, rounds) = if is_test() { (16, 4) } else { (1024, 48) };
        save_chunks("16k", 2, 16, chunks, rounds);
        save_chunks("4k", 1, 8, 4 * chunks, rounds);
    }
}

/// Moves nothing, and says that it has: what is left of a save is the store's own work.
struct NoCopies {
    /// Of some saves, by layer: where slabs would be stored.
    stored: Vec<Vec<Vec<SlabEntry>>>,
    layers_taken: AtomicUsize,
    /// When it took the last layer.
    last: Mutex<Instant>,
}

impl NoCopies {
    /// Of saves of so many chunks.
    fn new(geometry: &KvGeometry, chunks: usize) -> Self {
        let slab = geometry.slab_bytes() as u32;
        let mut noise = 0x2545_f491_4f6c_dd1d_u64;
        let mut save = || {
            let mut ends = vec![0_u32; chunks];
            let mut layer = || {
                let stored = ends.iter_mut().map(|end| {
                    noise ^= noise << 13;
                    noise ^= noise >> 7;
                    noise ^= noise << 17;
                    // 0.70 to 0.73 of a raw slab, as real KV takes.
                    let bytes = slab * 70 / 100 + noise as u32 % (slab * 3 / 100);
                    let offset = end.next_multiple_of(KvGeometry::SLAB_ALIGN as u32);
                    *end = offset + bytes;
                    SlabEntry {
                        offset,
                        bytes,
                        checksum: Checksum(noise),
                    }
                });
                stored.collect()
            };
            (0..geometry.layers).map(|_| layer()).collect()
        };
        NoCopies {
            stored: (0..7).map(|_| save()).collect(),
            layers_taken: AtomicUsize::new(0),
            last: Mutex::new(Instant::now()),
        }
    }
}

impl Device for NoCopies {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            name: "no copies".into(),
            blocking: true,
            on_cpu: false,
        }
    }
    fn attach(&self, _: &HostArena) -> Result<()> {
        Ok(())
    }
    fn record(&self, _: Stream) -> Result<Fence> {
        Ok(Fence::reached())
    }
    fn order(&self, _: Stream, _: &Fence) -> Result<()> {
        Ok(())
    }
    fn decodes(&self, _: CodecId) -> bool {
        true
    }
    fn encodes(&self, codec: CodecId) -> bool {
        codec != CodecId::Raw
    }
    fn submit(&self, transfer: &Transfer, layer: LayerId, _: &[Fence]) -> Result<Submitted> {
        let layers = transfer.table().kv.geometry().layers as usize;
        let save = self.layers_taken.fetch_add(1, Ordering::Relaxed) / layers;
        let stored = &self.stored[save % self.stored.len()][layer.0 as usize];
        let sums = match transfer.encoded() {
            None => SlabSums::Known(vec![Checksum(1); transfer.moves().len()]),
            Some(_) => {
                let stored = stored.clone();
                SlabSums::Stored(Box::new(move || Ok(stored)))
            }
        };
        *self.last.lock().expect("no panic") = Instant::now();
        Ok(Submitted {
            fence: Fence::reached(),
            sums,
        })
    }
}

/// The store's own work for a chunk of a save, in slabs of so many KV heads of 128 values.
fn save_chunks(name: &str, heads: u32, block: u32, chunks: usize, rounds: u32) {
    for codec in [HostCodec::Raw, HostCodec::Lossless] {
        let geometry = KvGeometry::gqa(16, heads, 128, Dtype::Bf16, block).expect("valid");
        let capacity = (3 * chunks as u64 + 64) * (geometry.payload_bytes() as u64 + 4096);
        let mut config = Config::in_memory(geometry.clone(), capacity);
        config.host.codec = codec;
        let device = Arc::new(NoCopies::new(&geometry, chunks));
        let cache = Cache::builder(config)
            .device(device.clone())
            .open()
            .expect("valid");
        let described = Namespace::new("bench", "1", "none", geometry.clone());
        let namespace = cache.namespace(&described).expect("same geometry");
        // No byte of it is ever read.
        let pages = HostPages::new(&geometry, block, chunks as u32).expect("memory");
        let table = PageTable {
            kv: pages.paged(),
            pages: shuffled(chunks as u32).into(),
        };
        let (mut whole, mut begin, mut hand_over) =
            (Samples::default(), Samples::default(), Samples::default());
        let mut behind = Samples::default();
        for round in 0..rounds + 8 {
            let tokens = (0..chunks as u32 * block).map(|token| token ^ (round << 22));
            let mut prompt = namespace.prompt(&tokens.collect::<Vec<_>>()).into_hashed();
            let (mut first, mut second) = (Samples::default(), Samples::default());
            let mut all = Samples::default();
            all.time(|| {
                let save = first.time(|| cache.save(&mut prompt, table.clone()).expect("open"));
                assert_eq!(save.report().new_blocks, chunks, "others go for it");
                second.time(|| save.all_layers(Fence::reached()).expect("once"));
                save.pages_free().wait_blocking().expect("the device works");
            });
            let last = *device.last.lock().expect("no panic");
            let waited = last.elapsed();
            // The tier is full after a few.
            if round >= 8 {
                whole.push(all.last());
                begin.push(first.last());
                hand_over.push(second.last());
                behind.add(waited);
            }
        }
        let each = |samples: &Samples| samples.median() * 1e6 / chunks as f64;
        println!(
            "{chunks} chunks of {} KiB, host.codec {codec:?}: {:.3} us each until save returns, {:.3} until all layers are handed over, {:.3} behind the last one",
            geometry.payload_bytes() >> 10,
            each(&begin),
            each(&begin) + each(&hand_over),
            each(&behind),
        );
        let way = format!("{codec:?}").to_lowercase();
        figure(
            &format!("host.save_chunk.{name}.{way}"),
            each(&whole),
            "us",
            Goal::AtMost(1.0),
        );
        cache.close_blocking().expect("nothing hangs");
    }
}

fn shuffled(pages: u32) -> Vec<PageId> {
    let mut ids: Vec<PageId> = (0..pages).map(PageId).collect();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for i in (1..ids.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ids.swap(i, (state % (i as u64 + 1)) as usize);
    }
    ids
}

/// `like_kv`: random mantissas, and exponents as frequent as in real KV (seven of them cover 96 %).
fn moves(blocks: usize, rounds: usize, codec: HostCodec, like_kv: bool) {
    let geometry = KvGeometry::gqa(32, 8, 128, Dtype::Bf16, 16).expect("valid");
    let tokens_len = blocks * 16;
    let bytes = blocks * geometry.payload_bytes();
    let capacity = (2 * blocks as u64) * (geometry.payload_bytes() as u64 + 4096);
    let mut config = Config::in_memory(geometry.clone(), capacity);
    config.host.codec = codec;
    let cache = Cache::open(config).expect("memory");
    let namespace = cache
        .namespace(&Namespace::new("bench", "1", "none", geometry.clone()))
        .expect("same geometry");
    let pages = HostPages::new(&geometry, 16, blocks as u32).expect("memory");
    for layer in geometry.layer_ids() {
        pages.write(layer, |planes| {
            for plane in planes {
                for (i, value) in plane.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    let noise = (i as u32 + 1).wrapping_mul(2_654_435_761);
                    let noise = noise ^ noise >> 15;
                    *value = match like_kv {
                        true => kv_value(noise),
                        false => noise as u16,
                    }
                    .to_le_bytes();
                }
            }
        });
    }
    let table = PageTable {
        kv: pages.paged(),
        pages: shuffled(blocks as u32).into(),
    };
    let (source, mut target) = (vec![1_u8; bytes], vec![0_u8; bytes]);
    let mut checked = 0_u64;

    let (mut copy, mut save, mut load) =
        (Samples::default(), Samples::default(), Samples::default());
    let (mut save_ratio, mut load_ratio) = (Samples::default(), Samples::default());
    for round in 0..rounds as u32 {
        copy.time(|| target.copy_from_slice(&source));
        checked += u64::from(target[round as usize]);
        let tokens: Vec<u32> = (0..tokens_len as u32).map(|i| i ^ (round << 24)).collect();
        let mut prompt = namespace.prompt(&tokens).into_hashed();
        save.time(|| {
            let save = cache.save(&mut prompt, table.clone()).expect("open");
            assert_eq!(save.report().new_blocks, blocks, "room for two prompts");
            save.all_layers(Fence::reached()).expect("once");
            save.pages_free().wait_blocking().expect("the device works");
        });
        save_ratio.push(copy.last() / save.last());
        copy.time(|| target.copy_from_slice(&source));
        let lease = cache.lease(&mut prompt).expect("open");
        load.time(|| {
            let load = cache
                .load(&lease, table.clone(), LoadOptions::default())
                .expect("valid");
            let report = load.finish_blocking();
            assert_eq!(report.tokens, tokens_len);
            checked += report.bytes;
        });
        load_ratio.push(copy.last() / load.last());
    }
    let rate = |samples: &Samples| bytes as f64 / samples.median() / 1e9;
    println!(
        "{} MiB in {blocks} chunks, {rounds} rounds, check value {checked}",
        bytes >> 20
    );
    let stats = cache.stats();
    println!(
        "{} values, host.codec {codec:?}: memcpy {:.2} GB/s, save {:.2} GB/s, load {:.2} GB/s; {} chunks in RAM; {}; {}",
        if like_kv { "KV-like" } else { "random" },
        rate(&copy),
        rate(&save),
        rate(&load),
        stats.index.host_blocks,
        stats.codec.save,
        stats.codec.ram
    );
    if like_kv {
        return;
    }
    figure(
        "host.save",
        save_ratio.median(),
        "of memcpy",
        Goal::AtLeast(0.85),
    );
    figure(
        "host.load",
        load_ratio.median(),
        "of memcpy",
        Goal::AtLeast(0.85),
    );
}

/// A value whose exponent is one less as often again, from a number with random bits.
fn kv_value(noise: u32) -> u16 {
    let exponent = 127 - (noise >> 16).trailing_zeros().min(20) as u16;
    (noise as u16 & 0x807f) | exponent << 7
}

fn miss(rounds: usize) {
    // Qwen2.5-0.5B: 24 layers, 2 KV heads of 64; blocks of 64 tokens are chunks of 768 KiB.
    let geometry = KvGeometry::gqa(24, 2, 64, Dtype::Bf16, 64).expect("valid");
    let tokens_len = 10_000;
    let cache = Cache::open(Config::in_memory(geometry.clone(), 512 << 20)).expect("memory");
    let namespace = cache
        .namespace(&Namespace::new("bench", "1", "none", geometry.clone()))
        .expect("same geometry");
    let pages = HostPages::new(&geometry, 16, 625).expect("memory");
    let table = PageTable {
        kv: pages.paged(),
        pages: shuffled(625).into(),
    };
    let mut samples = Samples::default();
    for round in 0..rounds as u32 {
        let tokens: Vec<u32> = (0..tokens_len).map(|i| i ^ (round << 20)).collect();
        let save = samples.time(|| {
            let mut prompt = namespace.prompt(&tokens);
            let lease = cache.lease(&mut prompt).expect("open");
            assert_eq!(lease.tokens(), 0);
            cache.save(&mut prompt, table.clone()).expect("open")
        });
        assert_eq!(save.report().new_blocks, 156);
        save.all_layers(Fence::reached()).expect("once");
        save.pages_free().wait_blocking().expect("the device works");
    }
    println!(
        "a miss of {tokens_len} tokens: P99 {:.0} us",
        samples.p99() * 1e6
    );
    figure(
        "host.miss",
        samples.median() * 1e6,
        "us",
        Goal::AtMost(150.0),
    );
}
