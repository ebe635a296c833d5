//! Host tier: how near saves and loads come to plain memcpy, and what a miss costs the engine.
//!
//! Geometry of Llama-3-8B (blocks of 16 tokens: chunks of 2 MiB; pages of 16 tokens in random
//! order: pieces of 32 KiB), CPU device, one transfer thread, checksums included. The ceiling is one
//! contiguous memcpy of the same bytes, measured in turn with each run.
//!
//! Not measured: a GPU (benches/gpu.rs), more than one prompt at a time, disk.

mod harness;

use harness::{Goal, Samples, figure, is_test};
use stemkv::{Cache, Config, HostCodec, LoadOptions, Namespace};
use stemkv_store::{Dtype, Fence, HostPages, KvGeometry, PageId, PageTable};

fn main() {
    // A figure of a small run would mislead, so the small run only has to work.
    let (blocks, rounds) = if is_test() { (4, 2) } else { (128, 15) };
    moves(blocks, rounds, HostCodec::Auto, false);
    for codec in [HostCodec::Raw, HostCodec::Lossless] {
        moves(blocks, rounds, codec, true);
    }
    miss(if is_test() { 2 } else { 200 });
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
