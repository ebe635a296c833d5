//! Chunks that go to disk encoded: what comes back is the same to the bit, whichever device loads it,
//! beside chunks that do not shrink; and the store says what it chose and why.
//!
//! How: the whole store over a simulated disk; half of the blocks of a prompt are like KV, the other
//! half noise.
#![cfg(feature = "sim")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use stemkv::{
    Cache, Config, DiskCodec, DiskConfig, HostCodec, LoadOptions, Namespace, OpenNamespace,
};
use stemkv_store::{
    CpuDevice, Device, Dtype, Fence, HostPages, KvGeometry, PageId, PageTable, SimDisk, SimMedium,
    SystemClock,
};
use support::devices::RawOnly;

const BLOCKS: usize = 8;

fn geometry(dtype: Dtype) -> KvGeometry {
    KvGeometry::gqa(3, 2, 64, dtype, 32).expect("valid")
}

fn open(medium: &SimMedium, dtype: Dtype, codec: DiskCodec, device: Arc<dyn Device>) -> Cache {
    let geometry = geometry(dtype);
    let clock = Arc::new(SystemClock::default());
    let disk = SimDisk::open(medium, &geometry, 16 << 20, clock).expect("not open");
    let mut config = DiskConfig::new("simulated", 16 << 20);
    config.batch_delay_ms = 0;
    config.codec = codec;
    let host = 16 * (geometry.payload_bytes() as u64 + 8192);
    Cache::builder(Config::in_memory(geometry, host).with_disk(config))
        .device(device)
        .disk(Arc::new(disk))
        .open()
        .expect("valid")
}

fn pages(geometry: &KvGeometry) -> (HostPages, PageTable) {
    let pages = HostPages::new(geometry, 16, 2 * BLOCKS as u32).expect("memory");
    let table = PageTable {
        kv: pages.paged(),
        pages: (0..2 * BLOCKS as u32).rev().map(PageId).collect(),
    };
    (pages, table)
}

/// The pages of the prompt's second half hold noise, the others values with few exponents.
fn fill(geometry: &KvGeometry, pages: &HostPages) {
    fill_from(geometry, pages, BLOCKS / 2);
}

/// The pages of the prompt's last `noisy` blocks hold noise, the others values with few exponents.
fn fill_from(geometry: &KvGeometry, pages: &HostPages, noisy: usize) {
    let mut state = 9_u64;
    for layer in geometry.layer_ids() {
        pages.write(layer, |planes| {
            for plane in planes {
                // The last blocks have the first pages.
                let noise = plane.len() / BLOCKS * noisy;
                for (at, byte) in plane.iter_mut().enumerate() {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    // The high byte of a value, whatever its size: sign and one bit vary.
                    let high = at % geometry.dtype.bytes() == geometry.dtype.bytes() - 1;
                    *byte = match high && at >= noise {
                        true => (state >> 32) as u8 & 0x81 | 0x3c,
                        false => (state >> 32) as u8,
                    };
                }
            }
        });
    }
}

fn bytes(geometry: &KvGeometry, pages: &HostPages) -> Vec<Vec<u8>> {
    let layers = geometry.layer_ids();
    layers
        .map(|layer| pages.read(layer, |planes| planes.concat()))
        .collect()
}

#[tokio::test]
async fn what_was_encoded_comes_back_beside_what_was_not_on_any_device() {
    for (dtype, name) in [(Dtype::Bf16, "exp"), (Dtype::F32, "planes")] {
        let geometry = geometry(dtype);
        let medium = SimMedium::default();
        let tokens: Vec<u32> = (0..32 * BLOCKS as u32).collect();
        let described = Namespace::new("model", "1", "none", geometry.clone());
        let (source, table) = pages(&geometry);
        fill(&geometry, &source);

        let cache = open(
            &medium,
            dtype,
            DiskCodec::Lossless,
            Arc::new(CpuDevice::new()),
        );
        let namespace = cache.namespace(&described).expect("same geometry");
        let save = cache
            .save(&mut namespace.prompt(&tokens), table)
            .expect("open");
        save.all_layers(Fence::reached()).expect("once");
        assert_eq!(save.durable().await.durable_blocks, BLOCKS);
        let stats = cache.stats();
        assert_eq!(stats.counter("encoded_blocks"), BLOCKS as u64 / 2);
        let disk = stats.disk.clone().expect("configured");
        assert_eq!(disk.codec, format!("{name}: as configured"));
        let raw = BLOCKS as u64 * (geometry.payload_bytes() as u64 + 4096);
        let saved = stats.counter("encoded_bytes_saved");
        assert!(saved > raw / 20);
        assert_eq!(disk.written_bytes, raw - saved);
        cache.close().await.expect("nothing hangs");

        let devices: [Arc<dyn Device>; 2] =
            [Arc::new(CpuDevice::new()), Arc::new(RawOnly::default())];
        for device in devices {
            let decodes = device.decodes(stemkv_store::CodecId::lossless(dtype));
            let cache = open(&medium, dtype, DiskCodec::Auto, device);
            let namespace = cache.namespace(&described).expect("same geometry");
            // Once from disk, once from RAM.
            for _ in 0..2 {
                let (target, table) = pages(&geometry);
                let mut prompt = namespace.prompt(&tokens);
                let lease = cache.lease(&mut prompt).expect("open");
                let load = cache
                    .load(&lease, table, LoadOptions::default())
                    .expect("valid");
                let report = tokio::time::timeout(Duration::from_secs(60), load.finish());
                let report = report.await.expect("ends");
                assert_eq!(report.tokens, tokens.len());
                assert!(
                    bytes(&geometry, &target) == bytes(&geometry, &source),
                    "{name}"
                );
            }
            // Encoded chunks take less of the host tier.
            let stats = cache.stats();
            let published = stats.host.published_bytes;
            assert_eq!(published, if decodes { raw - saved } else { raw });
            let codec = stats.disk.expect("configured").codec;
            let expected = match decodes {
                true => format!("{name}: not compared with the disk's speed yet"),
                false => "raw: the device does not decode".to_owned(),
            };
            assert_eq!(codec, expected);
            cache.close().await.expect("nothing hangs");
        }
    }
}

/// A store in RAM alone, or over `medium`, with room for so many raw chunks.
fn open_host(codec: HostCodec, chunks: u64, medium: Option<&SimMedium>) -> Cache {
    let geometry = geometry(Dtype::Bf16);
    let image = geometry.payload_bytes() as u64 + 4096;
    let mut config = Config::in_memory(geometry.clone(), chunks * image);
    config.host.codec = codec;
    let Some(medium) = medium else {
        return Cache::open(config).expect("valid");
    };
    let clock = Arc::new(SystemClock::default());
    let disk = SimDisk::open(medium, &geometry, 16 << 20, clock).expect("not open");
    let mut of_disk = DiskConfig::new("simulated", 16 << 20);
    of_disk.batch_delay_ms = 0;
    let builder = Cache::builder(config.with_disk(of_disk));
    builder.disk(Arc::new(disk)).open().expect("valid")
}

fn namespace(cache: &Cache) -> OpenNamespace {
    let described = Namespace::new("model", "1", "none", geometry(Dtype::Bf16));
    cache.namespace(&described).expect("same geometry")
}

/// Saves a prompt of its own whose first `like_kv` of [`BLOCKS`] blocks are like KV.
async fn save(cache: &Cache, number: u32, like_kv: usize) -> (Vec<u32>, HostPages) {
    let geometry = geometry(Dtype::Bf16);
    let tokens: Vec<u32> = (0..32 * BLOCKS as u32)
        .map(|token| token + 1000 * number)
        .collect();
    let (source, table) = pages(&geometry);
    fill_from(&geometry, &source, BLOCKS - like_kv);
    let namespace = namespace(cache);
    let save = cache
        .save(&mut namespace.prompt(&tokens), table)
        .expect("open");
    save.all_layers(Fence::reached()).expect("once");
    save.pages_free().wait().await.expect("a sound device");
    (tokens, source)
}

/// Tokens of a prompt that come back, all of them right.
async fn load(cache: &Cache, tokens: &[u32], source: &HostPages) -> usize {
    let geometry = geometry(Dtype::Bf16);
    let (target, table) = pages(&geometry);
    let lease = cache
        .lease(&mut namespace(cache).prompt(tokens))
        .expect("open");
    let load = cache
        .load(&lease, table, LoadOptions::default())
        .expect("valid");
    let report = load.finish().await;
    for layer in geometry.layer_ids() {
        target.read(layer, |got| {
            source.read(layer, |expected| {
                for (got, expected) in got.iter().zip(expected.iter()) {
                    // The first blocks have the last pages.
                    let from = got.len() - got.len() / tokens.len() * report.tokens;
                    assert!(got[from..] == expected[from..]);
                }
            });
        });
    }
    report.tokens
}

#[tokio::test]
async fn a_save_that_encodes_holds_more_in_ram_and_writes_that_to_disk_as_it_is() {
    let medium = SimMedium::default();
    let cache = open_host(HostCodec::Lossless, 64, Some(&medium));
    let (tokens, source) = save(&cache, 0, BLOCKS / 2).await;
    cache.flush().await;
    let stats = cache.stats();
    let half = BLOCKS as u64 / 2;
    assert_eq!(stats.counter("saved_encoded_blocks"), half);
    assert_eq!(stats.codec.save, "exp: as configured");
    let raw = BLOCKS as u64 * (geometry(Dtype::Bf16).payload_bytes() as u64 + 4096);
    assert_eq!(stats.host.raw_bytes, raw);
    assert!(stats.host.published_bytes < raw * 95 / 100);
    // The encoded half is not encoded a second time, and the noise does not shrink there either.
    assert_eq!(stats.counter("encoded_blocks"), 0);
    let disk = stats.disk.expect("configured");
    assert_eq!(disk.written_bytes, stats.host.published_bytes);
    assert_eq!(load(&cache, &tokens, &source).await, tokens.len());
    let factor = raw as f64 / stats.host.published_bytes as f64;
    assert_eq!(
        stats.codec.ram,
        format!(
            "{raw} bytes of raw chunks are held in {}, a factor of {factor:.2}",
            stats.host.published_bytes
        )
    );
    cache.close().await.expect("nothing hangs");
    let cache = open_host(HostCodec::Raw, 64, Some(&medium));
    assert_eq!(load(&cache, &tokens, &source).await, tokens.len());
    assert_eq!(cache.stats().codec.save, "raw: as configured");
    cache.close().await.expect("nothing hangs");
}

#[tokio::test]
async fn a_cpu_encodes_once_ram_is_full_and_then_more_tokens_fit() {
    let full = 4 * BLOCKS as u64;
    let raw = open_host(HostCodec::Raw, full, None);
    let auto = open_host(HostCodec::Auto, full, None);
    let mut saved = Vec::new();
    for number in 0..12 {
        save(&raw, number, BLOCKS).await;
        saved.push(save(&auto, number, BLOCKS).await);
        let stats = auto.stats();
        if number < 3 {
            let why = "raw: RAM is not full, and the CPU copies faster than it encodes";
            assert_eq!(stats.codec.save, why);
            assert_eq!(stats.counter("saved_encoded_blocks"), 0);
        }
    }
    let stats = auto.stats();
    assert!(
        stats.codec.save.starts_with("exp: RAM is full, and 1."),
        "{}",
        stats.codec.save
    );
    assert!(stats.counter("saved_encoded_blocks") >= 7 * BLOCKS as u64);
    let (more, fewer) = (stats.index.host_blocks, raw.stats().index.host_blocks);
    assert!(
        fewer <= full && more >= fewer * 9 / 8,
        "{more} beside {fewer}"
    );
    let (mut with, mut without) = (0, 0);
    for (tokens, source) in saved.iter().rev() {
        with += load(&auto, tokens, source).await;
        without += load(&raw, tokens, source).await;
    }
    assert!(
        with > without,
        "{with} tokens come back, {without} without the codec"
    );
}

#[tokio::test]
async fn chunks_that_do_not_fit_where_shorter_ones_were_expected_are_saved_again() {
    let cache = open_host(HostCodec::Lossless, 64, None);
    let (short, short_source) = save(&cache, 0, BLOCKS).await;
    // Slots are now cut for what shrinks; three of these do not.
    let (long, long_source) = save(&cache, 1, BLOCKS - 3).await;
    let stats = cache.stats();
    assert_eq!(stats.counter("resaved_blocks"), 3);
    assert_eq!(stats.counter("saved_encoded_blocks"), 2 * BLOCKS as u64 - 3);
    assert_eq!(load(&cache, &short, &short_source).await, short.len());
    assert_eq!(load(&cache, &long, &long_source).await, long.len());
    cache.check();
}
