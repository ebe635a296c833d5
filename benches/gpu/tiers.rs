//! Measures a whole store on a GPU machine: hits out of the device tier, and disk → host → GPU. Needs
//! neither cargo nor files there.
//!
//! `tiers [device_tier] [disk_to_gpu] [never_worse]`; the last wants real KV (`--kv`). The disk tier is a folder in the working directory. Every rate
//! stands beside its ceiling, measured in the same run. What is measured and why is in
//! docs/benchmarks.md.

#[allow(dead_code, reason = "shared with the benchmark of the device alone")]
mod cuda;
#[allow(dead_code, reason = "shared with the benchmark of the device alone")]
mod report;
#[allow(dead_code, reason = "shared with the benchmark of the device alone")]
mod store;

mod kv;
mod never_worse;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use cuda::{Memory, Stream};
use report::{Goal, figure, median};
use stemkv::{Cache, Config, DiskConfig, LoadOptions, Namespace, OpenNamespace, PrefetchGoal};
use stemkv_store::device::CudaDevice;
use stemkv_store::{Dtype, Fence, KvGeometry, PageId, PageTable, PagedKv, PlaneStrides};

const TOKENS: usize = 32 << 10;
const PAGE_TOKENS: u32 = 16;
const REPEATS: usize = 15;
const DISK_REPEATS: usize = 3;
const FOLDER: &str = "tiers-bench-store";

/// Llama-3-8B: 128 KiB of KV a token.
fn geometry() -> KvGeometry {
    KvGeometry::gqa(32, 8, 128, Dtype::Bf16, 16).expect("valid")
}

/// Bytes of the prompt's KV.
fn prompt_bytes() -> usize {
    TOKENS / 16 * geometry().payload_bytes()
}

/// An engine's pages, `[layer][plane][page][token][head]`, handed out in no order.
struct Engine {
    memory: Memory,
    table: PageTable,
}

impl Engine {
    fn new(seed: u64) -> Engine {
        let (geometry, pages) = (geometry(), TOKENS as u32 / PAGE_TOKENS);
        let plane_bytes = geometry.planes[0].token_bytes() * TOKENS;
        let memory = Memory::new(prompt_bytes());
        let strides: Vec<_> = geometry
            .planes
            .iter()
            .map(|plane| PlaneStrides::nhd(plane, PAGE_TOKENS))
            .collect();
        let planes = geometry.planes.len();
        let bases: Vec<u64> = (0..planes)
            .flat_map(|plane| {
                (0..geometry.layers as usize).map(move |layer| layer * planes + plane)
            })
            .map(|area| memory.address + (area * plane_bytes) as u64)
            .collect();
        // SAFETY: the areas lie within `memory`, which lives as long as the table; every load and save
        // is waited for before the bytes are looked at or anything is dropped.
        let kv = unsafe { PagedKv::register(&geometry, PAGE_TOKENS, pages, &strides, &bases) };
        let mut ids: Vec<PageId> = (0..pages).map(PageId).collect();
        let mut state = seed;
        for i in (1..ids.len()).rev() {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ids.swap(i, (state >> 33) as usize % (i + 1));
        }
        Engine {
            memory,
            table: PageTable {
                kv: kv.expect("valid"),
                pages: ids.into(),
            },
        }
    }

    /// Fills every page with bytes that differ from place to place.
    fn fill(&self) {
        let mut words = 0x9e37_79b9_u64;
        let noise: Vec<u8> = (0..(64 << 20) / 8)
            .flat_map(|_| {
                words ^= words << 13;
                words ^= words >> 7;
                words ^= words << 17;
                words.to_le_bytes()
            })
            .collect();
        for (at, turn) in (0..self.memory.bytes).step_by(noise.len()).zip(1..) {
            self.memory.write(at, &(turn as u64).to_le_bytes());
            self.memory.write(at + 8, &noise[8..]);
        }
    }

    /// The bytes of one page in every plane and layer.
    fn page(&self, number: usize) -> Vec<u8> {
        let geometry = geometry();
        let plane = geometry.planes[0].token_bytes();
        let (page_bytes, areas) = (plane * PAGE_TOKENS as usize, 2 * geometry.layers as usize);
        let mut bytes = vec![0; page_bytes * areas];
        let page = self.table.pages[number].0 as usize;
        for (area, part) in bytes.chunks_mut(page_bytes).enumerate() {
            self.memory
                .read(area * plane * TOKENS + page * page_bytes, part);
        }
        bytes
    }

    fn assert_same(&self, other: &Engine) {
        for number in (0..self.table.pages.len()).step_by(7) {
            assert!(
                self.page(number) == other.page(number),
                "page {number} differs"
            );
        }
    }
}

/// GB/s of one contiguous copy of the prompt's size, median.
fn contiguous(stream: Stream, to: u64, from: u64, bytes: usize) -> f64 {
    let mut rates: Vec<f64> = (0..9)
        .map(|_| {
            let start = Instant::now();
            // SAFETY: both sides have so many bytes, and the stream is waited for.
            unsafe { stream.copy(to, from, bytes) };
            stream.synchronize();
            bytes as f64 / start.elapsed().as_nanos() as f64
        })
        .collect();
    median(&mut rates)
}

struct Bench {
    tokens: Vec<u32>,
    source: Engine,
    target: Engine,
    stream: Stream,
}

impl Bench {
    fn new() -> Bench {
        let bench = Bench {
            tokens: (0..TOKENS as u32).collect(),
            source: Engine::new(1),
            target: Engine::new(2),
            stream: Stream::new(),
        };
        bench.source.fill();
        bench
    }

    fn open(&self, device_bytes: usize, disk: Option<&Path>) -> (Cache, OpenNamespace) {
        let slot = geometry().payload_bytes() + 4096;
        let mut config = Config::in_memory(geometry(), ((TOKENS / 16 + 64) * slot) as u64);
        config.device.capacity_bytes = device_bytes as u64;
        if let Some(path) = disk {
            let mut disk = DiskConfig::new(path, 12 << 30);
            disk.queue_bytes = 6 << 30;
            config = config.with_disk(disk);
        }
        let device = CudaDevice::open(0).expect("a GPU");
        let cache = Cache::builder(config)
            .device(Arc::new(device))
            .open()
            .expect("a valid configuration");
        let namespace = Namespace::new("llama-3-8b", "1", "none", geometry());
        let namespace = cache.namespace(&namespace).expect("its geometry");
        (cache, namespace)
    }

    fn save(&self, cache: &Cache, namespace: &OpenNamespace) {
        let save = cache
            .save(
                &mut namespace.prompt(&self.tokens),
                self.source.table.clone(),
            )
            .expect("open");
        assert_eq!(save.report().new_blocks, TOKENS / 16, "room for all");
        save.all_layers(Fence::reached()).expect("once");
        save.pages_free().wait_blocking().expect("the device works");
        if cache.config().disk.is_some() {
            assert_eq!(save.durable_blocking().undurable_blocks, 0);
        }
    }

    /// A hit as an engine sees it: milliseconds from the call to the first layer's order, and to the
    /// end of the last layer on the engine's stream.
    fn load(&self, cache: &Cache, namespace: &OpenNamespace) -> (f64, f64, stemkv::LoadReport) {
        let lease = cache
            .lease(&mut namespace.prompt(&self.tokens))
            .expect("open");
        let options = LoadOptions {
            stream: stemkv_store::Stream(self.stream.0),
            ..LoadOptions::default()
        };
        let start = Instant::now();
        let load = cache
            .load(&lease, self.target.table.clone(), options)
            .expect("valid");
        load.layer_blocking(0).expect("it comes");
        let first = start.elapsed().as_secs_f64() * 1e3;
        for layer in 1..geometry().layers {
            load.layer_blocking(layer).expect("it comes");
        }
        self.stream.synchronize();
        let all = start.elapsed().as_secs_f64() * 1e3;
        let report = load.finish_blocking();
        assert_eq!(report.tokens, TOKENS, "{report:?}");
        (first, all, report)
    }

    /// A hit of 32k tokens, all of it in our own GPU memory.
    fn device_tier(&self) {
        let bytes = prompt_bytes();
        let (cache, namespace) = self.open(bytes + (64 << 20), None);
        self.save(&cache, &namespace);
        self.target.memory.fill(0xa5);
        let (_, _, report) = self.load(&cache, &namespace);
        assert_eq!(report.device_blocks, TOKENS / 16, "{report:?}");
        self.source.assert_same(&self.target);
        let ceiling = contiguous(
            self.stream,
            self.target.memory.address,
            self.source.memory.address,
            bytes,
        );
        let (mut whole, mut copy, mut first) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..REPEATS {
            let (to_first, all, _) = self.load(&cache, &namespace);
            first.push(to_first);
            whole.push(bytes as f64 / all / 1e6);
            let layers = f64::from(geometry().layers);
            copy.push(bytes as f64 * (layers - 1.0) / layers / (all - to_first) / 1e6);
        }
        let (whole, copy) = (median(&mut whole), median(&mut copy));
        println!("one contiguous copy within the GPU: {ceiling:.0} GB/s of KV");
        println!(
            "from the call to the first layer's order: {:.2} ms",
            median(&mut first)
        );
        println!(
            "from the first layer on: {copy:.0} GB/s, {:.2} of the copy; from the call on: {whole:.0} GB/s",
            copy / ceiling
        );
        figure("device_tier", copy, "GB/s", Goal::AtLeast(1000.0));
        figure("device_tier_from_the_call", whole, "GB/s", Goal::None);
        cache.close_blocking().expect("nothing hangs");
    }

    /// A prompt of 32k tokens from disk through the host tier into the device tier, by prefetch.
    fn disk_to_gpu(&self) {
        let path = PathBuf::from(FOLDER);
        let _ = fs::remove_dir_all(&path);
        let bytes = prompt_bytes();
        {
            let (cache, namespace) = self.open(0, Some(&path));
            let start = Instant::now();
            self.save(&cache, &namespace);
            let seconds = start.elapsed().as_secs_f64();
            println!(
                "saved and durable: {:.2} GB/s",
                bytes as f64 / seconds / 1e9
            );
            cache.close_blocking().expect("nothing hangs");
        }
        let pinned = cuda::pinned(256 << 20);
        let link = contiguous(self.stream, self.target.memory.address, pinned, 256 << 20);
        let (mut rates, mut disks) = (Vec::new(), Vec::new());
        for _ in 0..DISK_REPEATS {
            disks.push(raw_read(&path));
            let (cache, namespace) = self.open(bytes + (64 << 20), Some(&path));
            let lease = cache
                .lease(&mut namespace.prompt(&self.tokens))
                .expect("open");
            assert_eq!(lease.matched().disk_tokens, TOKENS);
            let goal = PrefetchGoal {
                device_budget_bytes: u64::MAX,
                ..PrefetchGoal::default()
            };
            let start = Instant::now();
            let prefetch = cache.prefetch(&lease, goal).expect("open");
            let report = prefetch.finish_blocking();
            rates.push(bytes as f64 / start.elapsed().as_nanos() as f64);
            assert_eq!(report.device_tokens, TOKENS, "{report:?}");
            self.target.memory.fill(0xa5);
            let (_, _, report) = self.load(&cache, &namespace);
            assert_eq!(report.device_blocks, TOKENS / 16, "{report:?}");
            self.source.assert_same(&self.target);
            drop(lease);
            cache.close_blocking().expect("nothing hangs");
        }
        let (rate, disk) = (median(&mut rates), median(&mut disks));
        let slower = disk.min(link);
        println!("raw O_DIRECT reads of the same files: {disk:.2} GB/s; the link: {link:.1} GB/s");
        println!(
            "disk to GPU: {rate:.2} GB/s, {:.2} of the slower",
            rate / slower
        );
        figure(
            "disk_to_gpu",
            rate / slower,
            "of the slower",
            Goal::AtLeast(0.9),
        );
        let _ = fs::remove_dir_all(&path);
    }
}

/// GB/s of plain O_DIRECT reads of 8 MiB over every large file of a folder, four at once.
fn raw_read(folder: &Path) -> f64 {
    const READ: usize = 8 << 20;
    const O_DIRECT: i32 = 0x4000;
    let mut reads: Vec<(PathBuf, u64)> = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("the store's folder").flatten() {
            let (path, meta) = (entry.path(), entry.metadata().expect("it exists"));
            if meta.is_dir() {
                folders.push(path);
            } else if meta.len() >= READ as u64 {
                let ends = meta.len() / READ as u64;
                reads.extend((0..ends).map(|at| (path.clone(), at * READ as u64)));
            }
        }
    }
    let open = |path: &Path| -> File {
        let direct = OpenOptions::new()
            .read(true)
            .custom_flags(O_DIRECT)
            .open(path);
        direct.or_else(|_| File::open(path)).expect("readable")
    };
    let next = AtomicUsize::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut buffer = vec![0_u8; READ + 4096];
                let skip = buffer.as_ptr().align_offset(4096);
                let mut opened: Option<(PathBuf, File)> = None;
                while let Some((path, at)) = reads.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let file = match opened.take() {
                        Some((of, file)) if of == *path => file,
                        _ => open(path),
                    };
                    let read = file.read_at(&mut buffer[skip..skip + READ], *at);
                    assert_eq!(read.expect("readable"), READ);
                    opened = Some((path.clone(), file));
                }
            });
        }
    });
    (reads.len() * READ) as f64 / start.elapsed().as_nanos() as f64
}

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .take_while(|argument| !argument.starts_with("--"))
        .collect();
    match CudaDevice::open(0) {
        Ok(device) => println!("{}", stemkv_store::Device::info(&device).name),
        Err(error) => {
            println!("SKIPPED: {error}");
            return;
        }
    }
    cuda::enter();
    let wants =
        |name: &str| arguments.is_empty() || arguments.iter().any(|argument| argument == name);
    if wants("never_worse") {
        never_worse::never_worse();
    }
    if !wants("device_tier") && !wants("disk_to_gpu") {
        return;
    }
    let bench = Bench::new();
    if wants("device_tier") {
        bench.device_tier();
    }
    if wants("disk_to_gpu") {
        bench.disk_to_gpu();
    }
}
