//! Raw or encoded is chosen by how long saves and loads take, whole: not by how long the engine computes before
//! it hands a layer over, in which order it does so, or by what was measured long ago. And no save keeps
//! others from the link while its next layer is not written.
//!
//! How: a simulated device takes each transfer, and the test's clock says how long that lasts.
#![cfg(feature = "sim")]

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use stemkv::{Cache, Config, LoadOptions, Namespace, OpenNamespace};
use stemkv_store::{
    Clock, CodecId, Device, DeviceInfo, Dtype, Fence, FencePoint, HostArena, HostPages, KvGeometry,
    LayerId, PageId, PageTable, Result, SimClock, SimDevice, Stream, Submitted, Transfer,
};

const BLOCKS: u32 = 8;
const TOKENS: u32 = 32 * BLOCKS;
const LAYERS: usize = 3;
/// Saves after which one goes the way that was not chosen.
const RETRY: u32 = 16;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Blocks, and is no CPU, as a GPU does and is; counts what it takes.
#[derive(Clone)]
struct Gpu {
    sim: SimDevice,
    layers_taken: Arc<AtomicUsize>,
    clock: Arc<SimClock>,
    /// So long it takes for a layer of a chunk that moves alone.
    alone: Duration,
}

impl Device for Gpu {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            blocking: true,
            ..self.sim.info()
        }
    }
    fn attach(&self, arena: &HostArena) -> Result<()> {
        self.sim.attach(arena)
    }
    fn record(&self, stream: Stream) -> Result<Fence> {
        self.sim.record(stream)
    }
    fn order(&self, stream: Stream, fence: &Fence) -> Result<()> {
        self.sim.order(stream, fence)
    }
    fn decodes(&self, codec: CodecId) -> bool {
        self.sim.decodes(codec)
    }
    fn encodes(&self, codec: CodecId) -> bool {
        self.sim.encodes(codec)
    }
    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted> {
        let submitted = self.sim.submit(transfer, layer, after);
        if transfer.moves().len() == 1 {
            self.clock.advance(self.alone);
        }
        self.layers_taken.fetch_add(1, SeqCst);
        submitted
    }
}

/// A point of the engine's stream that the test reaches.
#[derive(Clone, Default)]
struct Written(Arc<AtomicBool>);

impl FencePoint for Written {
    fn is_reached(&self) -> Result<bool> {
        Ok(self.0.load(SeqCst))
    }
    fn wait(&self, _: Duration) -> Result<bool> {
        self.is_reached()
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct Store {
    cache: Cache,
    namespace: OpenNamespace,
    clock: Arc<SimClock>,
    gpu: Gpu,
    pages: HostPages,
    table: PageTable,
}

impl Store {
    fn open() -> Store {
        Self::with(ms(0))
    }

    /// A store on a device that takes so long for a layer of a chunk that moves alone.
    fn with(alone: Duration) -> Store {
        let geometry = KvGeometry::gqa(LAYERS as u32, 2, 64, Dtype::Bf16, 32).expect("valid");
        let clock = Arc::new(SimClock::default());
        let gpu = Gpu {
            sim: SimDevice::sound(),
            layers_taken: Arc::default(),
            clock: clock.clone(),
            alone,
        };
        let room = 64 * u64::from(BLOCKS) * (geometry.payload_bytes() as u64 + 4096);
        let cache = Cache::builder(Config::in_memory(geometry.clone(), room))
            .device(Arc::new(gpu.clone()))
            .clock(clock.clone() as Arc<dyn Clock>)
            .open()
            .expect("valid");
        let described = Namespace::new("model", "1", "none", geometry.clone());
        let namespace = cache.namespace(&described).expect("same geometry");
        let pages = HostPages::new(&geometry, 32, BLOCKS).expect("memory");
        for layer in geometry.layer_ids() {
            // Sign and one bit of the exponent vary, and all of the mantissa.
            pages.write(layer, |planes| {
                for (at, byte) in planes
                    .iter_mut()
                    .flat_map(|plane| plane.iter_mut().enumerate())
                {
                    let noise = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
                    *byte = if at % 2 == 1 {
                        noise as u8 & 0x81 | 0x3c
                    } else {
                        noise as u8
                    };
                }
            });
        }
        let table = PageTable {
            kv: pages.paged(),
            pages: (0..BLOCKS).map(PageId).collect(),
        };
        Store {
            cache,
            namespace,
            clock,
            gpu,
            pages,
            table,
        }
    }

    /// Fills one block with what does not shrink.
    fn fill_with_noise(&self, block: usize) {
        for layer in self.pages.paged().geometry().layer_ids() {
            self.pages.write(layer, |planes| {
                for plane in planes {
                    let bytes = plane.len() / BLOCKS as usize;
                    let mut noise = 0x9e37_79b9_7f4a_7c15_u64 + u64::from(layer.0);
                    for byte in &mut plane[block * bytes..][..bytes] {
                        noise ^= noise << 13;
                        noise ^= noise >> 7;
                        noise ^= noise << 17;
                        *byte = (noise >> 32) as u8;
                    }
                }
            });
        }
    }

    fn tokens(number: u32) -> Vec<u32> {
        (0..TOKENS).map(|token| 1000 * number + token).collect()
    }

    /// What `begin` begins moves for so long, in all layers.
    fn takes<T>(&self, moving: Duration, begin: impl FnOnce() -> T) -> T {
        self.gpu.sim.hold();
        let taken = self.gpu.layers_taken.load(SeqCst) + LAYERS;
        let begun = begin();
        let since = Instant::now();
        while self.gpu.layers_taken.load(SeqCst) < taken {
            assert!(
                since.elapsed() < Duration::from_secs(60),
                "nothing is submitted"
            );
            thread::yield_now();
        }
        self.clock.advance(moving);
        self.gpu.sim.release();
        begun
    }

    fn is_raw(number: u32) -> bool {
        number % RETRY == RETRY - 1
    }

    /// Saves prompt `number`; before an encoded one the engine computes for so long.
    fn save(&self, number: u32, computing: Duration, moving: [Duration; 2], in_order: bool) {
        let save = self.cache.save(
            &mut self.namespace.prompt(&Self::tokens(number)),
            self.table.clone(),
        );
        let save = save.expect("open");
        let is_raw = Self::is_raw(number);
        self.takes(moving[usize::from(!is_raw)], || {
            let written = Written::default();
            match in_order {
                true => save.all_layers(Fence::new(written.clone())).expect("once"),
                false => {
                    for layer in (1..LAYERS as u32).rev() {
                        save.layer(layer, Fence::reached()).expect("once");
                    }
                    if !is_raw {
                        self.clock.advance(computing);
                    }
                    save.layer(0, Fence::new(written.clone())).expect("once");
                }
            }
            if !is_raw {
                self.clock.advance(computing);
            }
            written.0.store(true, SeqCst);
        });
        save.pages_free().wait_blocking().expect("a sound device");
    }

    fn load(&self, number: u32, moving: Duration) {
        let lease = self
            .cache
            .lease(&mut self.namespace.prompt(&Self::tokens(number)));
        let load = self.takes(moving, || {
            let lease = lease.expect("open");
            self.cache
                .load(&lease, self.table.clone(), LoadOptions::default())
                .expect("valid")
        });
        assert_eq!(load.finish_blocking().tokens, TOKENS as usize);
    }

    /// The device's verdict on saves.
    fn choice(&self) -> String {
        self.cache.stats().codec.save
    }
}

#[test]
fn how_long_the_engine_computes_before_it_hands_over_does_not_matter() {
    for in_order in [true, false] {
        let store = Store::open();
        for number in 0..2 * RETRY + 2 {
            store.save(number, Duration::from_secs(1), [ms(14), ms(10)], in_order);
        }
        let choice = store.choice();
        let slab = store.pages.paged().geometry().slab_bytes();
        let bytes = (slab * BLOCKS as usize * LAYERS) as f64;
        let (raw, encoded) = (bytes / 14e6, bytes / 10e6);
        assert!(choice.starts_with("exp: "), "{choice}");
        let words = format!("saving reaches {encoded:.2} GB/s, raw {raw:.2} GB/s");
        assert!(choice.ends_with(&words), "{choice}, not {words}");
        let blocks = store.cache.stats().counter("saved_encoded_blocks");
        assert_eq!(blocks, u64::from(2 * RETRY * BLOCKS), "raw was tried twice");
    }
}

#[test]
fn a_verdict_against_encoded_loads_ends_when_none_was_measured_for_a_minute() {
    let store = Store::open();
    for number in 0..RETRY {
        store.save(number, Duration::ZERO, [ms(14), ms(10)], true);
    }
    store.load(RETRY - 1, ms(10));
    store.load(0, ms(50));
    let choice = store.choice();
    assert!(
        choice.starts_with("raw: loading encoded reaches "),
        "{choice}"
    );
    store.clock.advance(Duration::from_secs(59));
    assert!(store.choice().starts_with("raw: "));
    store.clock.advance(Duration::from_secs(2));
    assert!(store.choice().starts_with("exp: "), "{}", store.choice());
}

/// Encoded saves move faster than raw ones, but each has a chunk that must be saved once more.
#[test]
fn what_a_save_takes_besides_its_copies_counts() {
    let store = Store::with(ms(10));
    store.fill_with_noise(3);
    for number in 0..RETRY {
        store.save(number, Duration::ZERO, [ms(14), ms(10)], true);
    }
    // Into the first one's slots, which were cut for raw chunks, everything fits.
    let again = store.cache.stats().counter("resaved_blocks");
    assert_eq!(again, u64::from(RETRY - 2), "one of each, and no other");
    let choice = store.choice();
    let slab = store.pages.paged().geometry().slab_bytes();
    let bytes = (slab * BLOCKS as usize * LAYERS) as f64;
    let (raw, encoded) = (bytes / 14e6, bytes / 40e6);
    let words = format!("raw: saving encoded reaches {encoded:.2} GB/s, raw {raw:.2} GB/s");
    assert_eq!(choice, words);
}

#[test]
fn a_save_whose_next_layer_is_not_written_keeps_no_other_from_the_link() {
    let store = Store::open();
    let save = |number| {
        let mut prompt = store.namespace.prompt(&Store::tokens(number)).into_hashed();
        store.cache.save(&mut prompt, store.table.clone())
    };
    let written = Written::default();
    let (one, other) = (save(0).expect("open"), save(1).expect("open"));
    // Of one save the second layer is not written, of the other the first is not handed over.
    one.layer(0, Fence::reached()).expect("once");
    one.layer(1, Fence::new(written.clone())).expect("once");
    one.layer(2, Fence::reached()).expect("once");
    other.layer(1, Fence::reached()).expect("once");
    other.layer(2, Fence::reached()).expect("once");
    let third = save(2).expect("open");
    third.all_layers(Fence::reached()).expect("once");
    until("the third save", || third.pages_free().is_free());
    assert!(!one.pages_free().is_free() && !other.pages_free().is_free());
    other.layer(0, Fence::reached()).expect("once");
    until("the second save", || other.pages_free().is_free());
    written.0.store(true, SeqCst);
    until("the first save", || one.pages_free().is_free());
    let blocks = store.cache.stats().counter("saved_encoded_blocks");
    assert_eq!(blocks, u64::from(3 * BLOCKS), "all of them");
}

fn until(what: &str, done: impl Fn() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(
            since.elapsed() < Duration::from_secs(60),
            "{what} does not end"
        );
        thread::yield_now();
    }
}
