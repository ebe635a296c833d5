//! Chunks that go to disk encoded: what comes back is the same to the bit, whichever device loads it,
//! beside chunks that do not shrink; and the store says what it chose and why.
//!
//! How: the whole store over a simulated disk; half of the blocks of a prompt are like KV, the other
//! half noise.
#![cfg(feature = "sim")]

use std::sync::Arc;
use std::time::Duration;

use stemkv::{Cache, Config, DiskCodec, DiskConfig, LoadOptions, Namespace};
use stemkv_store::{
    CpuDevice, Device, DeviceInfo, Dtype, Fence, HostArena, HostPages, KvGeometry, LayerId, PageId,
    PageTable, Result, SimDisk, SimMedium, Stream, Submitted, SystemClock, Transfer,
};

const BLOCKS: usize = 8;

fn geometry(dtype: Dtype) -> KvGeometry {
    KvGeometry::gqa(3, 2, 64, dtype, 32).expect("valid")
}

/// Copies like the CPU device, but only raw slabs, as a GPU without the codec's kernels does.
struct RawOnly(CpuDevice);

impl Device for RawOnly {
    fn info(&self) -> DeviceInfo {
        self.0.info()
    }
    fn attach(&self, arena: &HostArena) -> Result<()> {
        self.0.attach(arena)
    }
    fn record(&self, stream: Stream) -> Result<Fence> {
        self.0.record(stream)
    }
    fn order(&self, stream: Stream, fence: &Fence) -> Result<()> {
        self.0.order(stream, fence)
    }
    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted> {
        for index in 0..transfer.moves().len() {
            transfer.slab_offset(index, layer)?;
        }
        self.0.submit(transfer, layer, after)
    }
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
    let mut state = 9_u64;
    for layer in geometry.layer_ids() {
        pages.write(layer, |planes| {
            for plane in planes {
                let noise = plane.len() / 2;
                for (at, byte) in plane.iter_mut().enumerate() {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    // The high byte of a value, whatever its size: sign and two bits vary.
                    let high = at % geometry.dtype.bytes() == geometry.dtype.bytes() - 1;
                    *byte = match high && at >= noise {
                        true => (state >> 32) as u8 & 0x83 | 0x3c,
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

        let devices: [Arc<dyn Device>; 2] = [
            Arc::new(CpuDevice::new()),
            Arc::new(RawOnly(CpuDevice::new())),
        ];
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
                true => format!("{name}: nothing was measured yet"),
                false => "raw: the device does not decode".to_owned(),
            };
            assert_eq!(codec, expected);
            cache.close().await.expect("nothing hangs");
        }
    }
}
