//! The store's side: an arena full of chunks, an engine's pages, transfers between the two.

use std::time::{Duration, Instant};

use stemkv_store::device::CudaDevice;
use stemkv_store::*;

use crate::cuda::Memory;
use crate::report::median;

pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) geometry: KvGeometry,
    pub(crate) page_tokens: u32,
    pub(crate) tokens: u32,
    /// What loads and saves are to reach, of one contiguous copy.
    pub(crate) goal: f64,
}

pub(crate) fn models() -> Vec<Model> {
    let gqa = |layers, heads, block| {
        KvGeometry::gqa(layers, heads, 128, Dtype::Bf16, block).expect("valid")
    };
    let model = |name, geometry, page_tokens, tokens, goal| Model {
        name,
        geometry,
        page_tokens,
        tokens,
        goal,
    };
    vec![
        model("llama3_8b", gqa(32, 8, 16), 16, 32 << 10, 0.95),
        model("llama3_70b_tp8", gqa(80, 1, 64), 16, 32 << 10, 0.85),
        model("llama3_70b_tp8_block16", gqa(80, 1, 16), 16, 32 << 10, 0.85),
        model("qwen25_7b", gqa(28, 4, 16), 16, 32 << 10, 0.95),
        model(
            "deepseek_v3_mla",
            KvGeometry::mla(61, 576, Dtype::Bf16, 32).expect("valid"),
            64,
            32 << 10,
            0.95,
        ),
    ]
}

/// splitmix64.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub(crate) fn shuffle(&mut self, ids: &mut [PageId]) {
        for i in (1..ids.len()).rev() {
            ids.swap(i, (self.next() % (i as u64 + 1)) as usize);
        }
    }
}

/// An engine's pages in GPU memory, `[layer][plane][page][token][head]`.
pub(crate) struct Pages {
    pub(crate) memory: Memory,
    pub(crate) kv: PagedKv,
}

impl Pages {
    pub(crate) fn new(geometry: &KvGeometry, page_tokens: u32, pages: u32) -> Pages {
        let tokens = page_tokens as usize * pages as usize;
        let layer_bytes = geometry.token_bytes() * tokens;
        let memory = Memory::new(layer_bytes * geometry.layers as usize);
        let strides: Vec<_> = geometry
            .planes
            .iter()
            .map(|plane| PlaneStrides::nhd(plane, page_tokens))
            .collect();
        let mut before = 0;
        let mut bases = Vec::new();
        for plane in &geometry.planes {
            bases.extend(
                (0..geometry.layers as usize)
                    .map(|layer| memory.address + (layer * layer_bytes + before * tokens) as u64),
            );
            before += plane.token_bytes();
        }
        // SAFETY: the bases lie within `memory`, which every transfer's fence is waited for before it
        // is dropped, and which nobody touches meanwhile.
        let kv = unsafe { PagedKv::register(geometry, page_tokens, pages, &strides, &bases) };
        Pages {
            memory,
            kv: kv.expect("valid"),
        }
    }

    pub(crate) fn table(&self, pages: Vec<PageId>) -> PageTable {
        PageTable {
            kv: self.kv.clone(),
            pages: pages.into(),
        }
    }
}

pub(crate) fn header(geometry: &KvGeometry) -> RecordHeader {
    RecordHeader {
        namespace: Key([1; 32]),
        parent: Key([2; 32]),
        key: Key([3; 32]),
        depth: 0,
        tokens: geometry.block_tokens,
        geometry: geometry.fingerprint(),
        layers: 0..geometry.layers,
        codec: CodecId::Raw,
        slabs: Vec::new(),
    }
}

pub(crate) fn open_arena(geometry: &KvGeometry, chunks: usize) -> HostArena {
    let slot = geometry.payload_bytes().next_multiple_of(4096) + RecordHeader::BYTES;
    HostArena::open(geometry, chunks * slot, |_, _| {}).expect("memory")
}

/// Submits every layer of a transfer, as many at once as the device wants, and waits for the end.
/// A load must have brought what its slots say.
pub(crate) fn execute(device: &CudaDevice, transfer: &Transfer) -> Duration {
    let start = Instant::now();
    let layers = take_all(device, transfer);
    let took = start.elapsed();
    for submitted in layers {
        if let SlabSums::Compared(ask) = submitted.sums {
            assert_eq!(ask().expect("a sound GPU"), None, "a slab's sum differs");
        }
    }
    took
}

/// Submits every layer and waits for the end.
pub(crate) fn take_all(device: &CudaDevice, transfer: &Transfer) -> Vec<Submitted> {
    let mut layers = Vec::new();
    submit(device, transfer, |submitted| layers.push(submitted));
    for submitted in &layers {
        let arrived = submitted.fence.point().wait(Duration::from_secs(30));
        assert!(arrived.expect("a sound GPU"), "a fence hangs");
    }
    layers
}

/// Calls `took` with each layer as soon as it is submitted.
pub(crate) fn submit(device: &CudaDevice, transfer: &Transfer, took: impl FnMut(Submitted)) {
    submit_in(
        device,
        transfer,
        |first| device.layers_at_once(transfer, first),
        took,
    );
}

/// The same, with as many layers at once from each on as `at_once` says.
pub(crate) fn submit_in(
    device: &CudaDevice,
    transfer: &Transfer,
    at_once: impl Fn(u32) -> u32,
    took: impl FnMut(Submitted),
) {
    let mut took = took;
    let layers = transfer.table().kv.geometry().layers;
    let mut first = 0;
    while first < layers {
        let end = layers.min(first + at_once(first));
        let submitted = device.submit_layers(transfer, first..end, &[]);
        submitted
            .expect("a sound GPU")
            .into_iter()
            .for_each(&mut took);
        first = end;
    }
}

/// GB/s of a whole transfer, median of `repeats` after one for nothing. Each repeat plans anew.
pub(crate) fn rate(device: &CudaDevice, make: &dyn Fn() -> Transfer, repeats: usize) -> f64 {
    execute(device, &make());
    let mut rates: Vec<f64> = (0..repeats)
        .map(|_| {
            let transfer = make();
            let bytes = transfer.plan().bytes() * u64::from(transfer.table().kv.geometry().layers);
            bytes as f64 / execute(device, &transfer).as_nanos() as f64
        })
        .collect();
    median(&mut rates)
}

/// Saves all blocks out of the pages into fresh slots, to be sealed or dropped.
pub(crate) fn save_transfer(
    arena: &HostArena,
    table: &PageTable,
    blocks: u32,
) -> (Transfer, Vec<Filling>) {
    let geometry = arena.geometry();
    let fillings = arena
        .allocate(geometry.payload_bytes(), blocks as usize)
        .expect("room");
    let moves = fillings
        .iter()
        .enumerate()
        .map(|(index, filling)| SlabMove::Save {
            slot: filling.writer(),
            token: index as u32 * geometry.block_tokens,
        });
    let transfer = Transfer::new(Direction::Save, table.clone(), moves.collect(), 0);
    (transfer.expect("valid"), fillings)
}

/// The same, encoded on the way.
pub(crate) fn encoded_save(
    arena: &HostArena,
    table: &PageTable,
    blocks: u32,
) -> (Transfer, Vec<Filling>) {
    let (raw, fillings) = save_transfer(arena, table, blocks);
    let encoded = EncodedSave::new(CodecId::Exp);
    let moves = raw.moves().to_vec();
    let transfer = Transfer::encoded_save(table.clone(), moves, encoded);
    (transfer.expect("valid"), fillings)
}

/// Seals what such a save brought.
pub(crate) fn seal_encoded(layers: Vec<Submitted>, fillings: Vec<Filling>) -> Vec<Slot> {
    let geometry = fillings[0].arena().geometry().clone();
    let mut fillings = fillings;
    for (layer, submitted) in geometry.layer_ids().zip(layers) {
        let SlabSums::Stored(ask) = submitted.sums else {
            panic!("a GPU says where it stored the slabs");
        };
        for (filling, slab) in fillings.iter_mut().zip(ask().expect("a sound GPU")) {
            filling.set_stored(layer, slab);
        }
    }
    let seal = |filling: Filling| {
        let header = RecordHeader {
            codec: CodecId::Exp,
            ..header(&geometry)
        };
        filling.seal(header).expect("whole")
    };
    fillings.into_iter().map(seal).collect()
}

pub(crate) fn load_transfer(slots: &[Slot], table: &PageTable) -> Transfer {
    let block_tokens = slots[0].arena().geometry().block_tokens;
    let moves = slots
        .iter()
        .enumerate()
        .map(|(index, slot)| SlabMove::Load {
            slot: slot.clone(),
            token: index as u32 * block_tokens,
        });
    Transfer::new(Direction::Load, table.clone(), moves.collect(), 0).expect("valid")
}

/// Saves all blocks out of the pages and publishes them with the sums that the GPU made.
pub(crate) fn save(
    device: &CudaDevice,
    arena: &HostArena,
    table: &PageTable,
    blocks: u32,
) -> Vec<Slot> {
    let (transfer, mut fillings) = save_transfer(arena, table, blocks);
    let layers = take_all(device, &transfer);
    drop(transfer);
    let geometry = arena.geometry();
    for (layer, submitted) in geometry.layer_ids().zip(layers) {
        let SlabSums::AfterFence(ask) = submitted.sums else {
            panic!("a GPU sums what it saves");
        };
        for (filling, sum) in fillings.iter_mut().zip(ask().expect("a sound GPU")) {
            filling.set_slab(layer, sum);
        }
    }
    let seal = |filling: Filling| filling.seal(header(geometry)).expect("whole");
    fillings.into_iter().map(seal).collect()
}
