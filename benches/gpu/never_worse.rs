//! Raw or encoded over the link, for slabs of many sizes and values of three kinds: is what a store chooses
//! by itself ever slower than raw?
//!
//! Three stores take turns, two that are told to stay raw and one with `host.codec = auto`, each saving a prompt
//! of its own and loading it: a slow moment of the link strikes all. What the last one chooses comes out of
//! what it measured of its own saves and loads, none of which is handed to it. What the second one comes to,
//! beside the first, is what such a comparison is worth: they do the same.

use std::sync::Arc;
use std::time::Instant;

use stemkv::{Cache, Config, HostCodec, LoadOptions, Namespace, OpenNamespace};
use stemkv_store::device::CudaDevice;
use stemkv_store::{Device, Dtype, Fence, KvGeometry, PageId, PageTable};

use crate::kv::{Sample, layers_of};
use crate::report::{Goal, figure_of, median};
use crate::store::{Pages, Random};

/// Bytes of KV of a prompt.
const BYTES: usize = 256 << 20;
const LAYERS: u32 = 16;
/// KV heads of 128 values, tokens of a block and of a page: slabs of 4, 16, 32, 64 and 256 KiB.
const SHAPES: [(u32, u32, u32); 5] = [
    (1, 8, 8),
    (2, 16, 16),
    (4, 16, 16),
    (8, 16, 16),
    (8, 64, 16),
];
/// Turns after which both ways were tried, and those that count: one of them goes the other way again.
const WARM: u32 = 34;
const TURNS: u32 = 18;
/// Turns after which a store is full, and evicts for each save.
const FULL: u32 = 4;

#[derive(Clone, Copy, Debug)]
enum Values {
    Real,
    Noise,
    Constant,
}

pub(crate) fn never_worse() {
    let Some(sample) = Sample::open() else { return };
    println!(
        "slab KiB, values: save raw and auto GB/s, auto and raw again of raw; load the same; saves \
         encoded, and why"
    );
    let mut worst = [f64::MAX; 2];
    for (heads, block, page) in SHAPES {
        for values in [Values::Real, Values::Noise, Values::Constant] {
            let shares = one_cell(heads, block, page, values, &sample);
            worst = [worst[0].min(shares[0]), worst[1].min(shares[1])];
        }
    }
    figure_of(
        "link",
        "never_worse_control",
        worst[1],
        "x raw in pairs, the worst of a second raw store",
        Goal::None,
    );
    figure_of(
        "link",
        "never_worse",
        worst[0],
        "x raw in pairs, the worst of what a store chooses",
        Goal::AtLeast(0.97),
    );
}

/// A store of some prompts in RAM.
struct Store<'a> {
    cache: Cache,
    namespace: OpenNamespace,
    table: &'a PageTable,
    tokens: u32,
}

impl<'a> Store<'a> {
    fn open(
        device: &Arc<CudaDevice>,
        codec: HostCodec,
        table: &'a PageTable,
        tokens: u32,
    ) -> Store<'a> {
        let geometry = table.kv.geometry();
        let chunks = 3 * tokens / geometry.block_tokens + 64;
        let slot = geometry.payload_bytes().next_multiple_of(4096) + 4096;
        let mut config = Config::in_memory(geometry.clone(), u64::from(chunks) * slot as u64);
        config.host.codec = codec;
        let device: Arc<dyn Device> = device.clone();
        let cache = Cache::builder(config).device(device).open().expect("valid");
        let described = Namespace::new("never-worse", "1", "none", geometry.clone());
        Store {
            namespace: cache.namespace(&described).expect("its geometry"),
            cache,
            table,
            tokens,
        }
    }

    /// Saves prompt `number` and loads it: GB/s of both, from the call to the end.
    fn turn(&self, number: u32) -> [f64; 2] {
        let tokens: Vec<u32> = (0..self.tokens)
            .map(|token| token + (number << 20))
            .collect();
        let mut prompt = self.namespace.prompt(&tokens);
        let bytes = self.tokens as usize * self.table.kv.geometry().token_bytes() * LAYERS as usize;
        let rate = |since: Instant| bytes as f64 / since.elapsed().as_nanos() as f64;
        let start = Instant::now();
        let save = self
            .cache
            .save(&mut prompt, self.table.clone())
            .expect("open");
        assert_eq!(save.report().declined_blocks, 0, "there is room");
        save.all_layers(Fence::reached()).expect("once");
        save.pages_free().wait_blocking().expect("a sound GPU");
        let saved = rate(start);
        let lease = self.cache.lease(&mut prompt).expect("open");
        let start = Instant::now();
        let load = self
            .cache
            .load(&lease, self.table.clone(), LoadOptions::default());
        let report = load.expect("valid").finish_blocking();
        assert_eq!(report.tokens, self.tokens as usize, "{report:?}");
        [saved, rate(start)]
    }
}

/// The share of raw that a store reaches by what it chooses, and one that stays raw too, the lower of both
/// directions.
fn one_cell(heads: u32, block: u32, page: u32, values: Values, sample: &Sample) -> [f64; 2] {
    let geometry = KvGeometry::gqa(LAYERS, heads, 128, Dtype::Bf16, block).expect("valid");
    let tokens = (BYTES / geometry.payload_bytes()) as u32 * block;
    let pages = Pages::new(&geometry, page, tokens / page);
    let mut random = Random(3);
    match values {
        Values::Real => layers_of(&pages, &geometry, sample, |at, bytes| {
            pages.memory.write(at, bytes);
        }),
        Values::Noise => {
            let noise: Vec<u8> = (0..1 << 20)
                .flat_map(|_| random.next().to_le_bytes())
                .collect();
            for at in (0..pages.memory.bytes).step_by(noise.len()) {
                let rest = pages.memory.bytes - at;
                pages.memory.write(at, &noise[..noise.len().min(rest)]);
            }
        }
        Values::Constant => pages.memory.fill(0x3f),
    }
    let mut ids: Vec<PageId> = (0..tokens / page).map(PageId).collect();
    random.shuffle(&mut ids);
    let table = pages.table(ids);
    let device = Arc::new(CudaDevice::open(0).expect("there was one a moment ago"));
    let stores = [HostCodec::Raw, HostCodec::Raw, HostCodec::Auto]
        .map(|codec| Store::open(&device, codec, &table, tokens));
    let [raw, again, auto] = &stores;
    for number in 0..WARM {
        auto.turn(number);
    }
    for number in 0..FULL {
        raw.turn(number);
        again.turn(number);
    }
    let encoded = || auto.cache.stats().counter("saved_encoded_blocks");
    let before = encoded();
    // By direction: raw and auto, then auto and raw again over raw.
    let mut rates = [const { [const { Vec::new() }; 4] }; 2];
    for number in WARM..WARM + TURNS {
        let mut turns = [[0.0; 2]; 3];
        // Each comes first, second and last as often.
        for store in (0..3).map(|place| (number as usize + place) % 3) {
            turns[store] = stores[store].turn(number);
        }
        for (direction, rates) in rates.iter_mut().enumerate() {
            let [raw, again, auto] = turns.map(|rates| rates[direction]);
            for (rates, rate) in rates.iter_mut().zip([raw, auto, auto / raw, again / raw]) {
                rates.push(rate);
            }
        }
    }
    let chosen = auto.cache.stats().codec.save;
    let encoded = (encoded() - before) / u64::from(tokens / block);
    let [saves, loads] = rates.map(|ways| ways.map(|mut rates| median(&mut rates)));
    let text =
        |[raw, auto, share, again]: [f64; 4]| format!("{raw:.2} {auto:.2} {share:.3} {again:.3}");
    println!(
        "  {:>3} {values:?}: {}; {}; {encoded} of {TURNS}; {chosen}",
        geometry.slab_bytes() >> 10,
        text(saves),
        text(loads),
    );
    for store in &stores {
        store.cache.close_blocking().expect("nothing hangs");
    }
    [saves[2].min(loads[2]), saves[3].min(loads[3])]
}
