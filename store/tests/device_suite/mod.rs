//! What every `Device` must do, as functions over any device and its memory.
//!
//! Each case moves random bytes between slots and pages and compares the whole of both sides, byte by
//! byte, with a model that knows nothing of plans, pieces or pitches: it asks for the address of one
//! byte at a time. Destinations are poisoned first, so that a byte that was not written and a byte
//! that should not have been written both show. Seeds are in the name of each case that fails.

// Each test binary uses its own part of the suite.
#![allow(dead_code)]

pub(crate) mod coded;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use stemkv_store::*;

/// One allocation in the memory that a device copies from and to.
pub(crate) trait DeviceMemory: Send + Sync {
    /// Its first byte, in the device's address space.
    fn address(&self) -> u64;
    /// All of it, after everything that was submitted before.
    fn read(&self) -> Vec<u8>;
    /// Replaces all of it.
    fn write(&self, bytes: &[u8]);
}

/// A device under test and where its pages come from.
pub(crate) struct Subject<'a> {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) allocate: &'a dyn Fn(usize) -> Arc<dyn DeviceMemory>,
}

/// Ordinary memory, for devices that copy with the CPU.
pub(crate) struct HostMemory(Box<[AtomicU64]>);

impl HostMemory {
    pub(crate) fn new(bytes: usize) -> Self {
        HostMemory((0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect())
    }
}

impl DeviceMemory for HostMemory {
    fn address(&self) -> u64 {
        self.0.as_ptr().expose_provenance() as u64
    }
    fn read(&self) -> Vec<u8> {
        let words = self.0.iter();
        words
            .flat_map(|word| word.load(std::sync::atomic::Ordering::SeqCst).to_ne_bytes())
            .collect()
    }
    fn write(&self, bytes: &[u8]) {
        for (word, bytes) in self.0.iter().zip(bytes.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(
                u64::from_ne_bytes(whole),
                std::sync::atomic::Ordering::SeqCst,
            );
        }
    }
}

/// How an engine lays its pages out in one allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[layer][plane][page][token][head]`
    Nhd,
    /// `[layer][plane][page][head][token]`
    Hnd,
    /// `[layer][plane][head][page][token]`
    HeadsOutermost,
    /// `[layer][page][plane][token][head]`: K and V of a page in one allocation.
    PlanesInPage,
    /// `[layer][page][token][plane][head]`: K and V of a token side by side.
    PlanesInToken,
    /// `[page][layer][plane][token][head]`: a page holds every layer.
    LayersInPage,
    /// As `Nhd`, with 48 unused bytes behind each token and 80 behind each page.
    Padded,
}

pub(crate) const LAYOUTS: [Layout; 7] = [
    Layout::Nhd,
    Layout::Hnd,
    Layout::HeadsOutermost,
    Layout::PlanesInPage,
    Layout::PlanesInToken,
    Layout::LayersInPage,
    Layout::Padded,
];

/// splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    pub(crate) fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
    /// `count` different numbers below `n`.
    pub(crate) fn pick(&mut self, count: usize, n: usize) -> Vec<PageId> {
        let mut all: Vec<u32> = (0..n as u32).collect();
        for i in 0..count {
            let j = i + self.below(n - i);
            all.swap(i, j);
        }
        all[..count].iter().map(|&id| PageId(id)).collect()
    }
}

/// Paged memory of a device, with the address of every single byte.
pub(crate) struct Pages {
    pub(crate) geometry: KvGeometry,
    pub(crate) page_tokens: usize,
    shape: Shape,
    pub(crate) memory: Arc<dyn DeviceMemory>,
    pub(crate) kv: PagedKv,
}

impl Pages {
    pub(crate) fn new(
        subject: &Subject<'_>,
        geometry: &KvGeometry,
        layout: Layout,
        page_tokens: usize,
        pages: usize,
    ) -> Self {
        let shape = Shape::of(geometry, layout, page_tokens, pages);
        let memory = (subject.allocate)(shape.total);
        let bases: Vec<u64> = shape
            .starts
            .iter()
            .flatten()
            .map(|&start| memory.address() + start as u64)
            .collect();
        // SAFETY: `Shape` keeps every byte within the allocation, which `Pages` owns and outlives
        // every transfer: the tests wait for fences before they drop it or look at it.
        let kv = unsafe {
            PagedKv::register(
                geometry,
                page_tokens as u32,
                pages as u32,
                &shape.strides,
                &bases,
            )
        };
        Pages {
            geometry: geometry.clone(),
            page_tokens,
            shape,
            memory,
            kv: kv.unwrap_or_else(|error| panic!("{layout:?}: {error}")),
        }
    }

    /// Where a byte of a token is in the allocation.
    fn at(&self, layer: usize, plane: usize, page: PageId, token: usize, byte: usize) -> usize {
        let head_bytes = self.geometry.planes[plane].head_bytes as usize;
        let strides = self.shape.strides[plane];
        self.shape.starts[plane][layer]
            + page.0 as usize * strides.page
            + token * strides.token
            + byte / head_bytes * strides.head
            + byte % head_bytes
    }

    /// (offset in the slab, offset in the allocation) of each byte of the block at prompt position
    /// `block`, but for tokens below `from`.
    fn bytes_of(
        &self,
        table: &[PageId],
        layer: usize,
        block: usize,
        from: usize,
    ) -> Vec<(usize, usize)> {
        let mut bytes = Vec::new();
        let mut in_slab = 0;
        for (plane, shape) in self.geometry.planes.iter().enumerate() {
            for token in block..block + self.geometry.block_tokens as usize {
                let page = table.get(token / self.page_tokens);
                for byte in 0..shape.token_bytes() {
                    if token >= from {
                        let page = *page.expect("the table covers the block");
                        let at = self.at(layer, plane, page, token % self.page_tokens, byte);
                        bytes.push((in_slab, at));
                    }
                    in_slab += 1;
                }
            }
        }
        bytes
    }
}

struct Shape {
    total: usize,
    strides: Vec<PlaneStrides>,
    /// By plane, by layer.
    starts: Vec<Vec<usize>>,
}

impl Shape {
    fn of(geometry: &KvGeometry, layout: Layout, page_tokens: usize, pages: usize) -> Shape {
        let layers = geometry.layers as usize;
        let token = |plane: &Plane| plane.token_bytes();
        let (token_pad, page_pad) = match layout {
            Layout::Padded => (48, 80),
            _ => (0, 0),
        };
        let all = geometry.token_bytes();
        let mut shape = Shape {
            total: 0,
            strides: Vec::new(),
            starts: Vec::new(),
        };
        // Bytes of all planes before this one, in one token.
        let mut before = 0;
        for plane in &geometry.planes {
            let (head, own) = (plane.head_bytes as usize, token(plane));
            let page = (own + token_pad) * page_tokens + page_pad;
            shape.strides.push(match layout {
                Layout::Nhd | Layout::Padded => PlaneStrides {
                    page,
                    token: own + token_pad,
                    head,
                },
                Layout::Hnd => PlaneStrides::hnd(plane, page_tokens as u32),
                Layout::HeadsOutermost => PlaneStrides {
                    page: head * page_tokens,
                    token: head,
                    head: head * page_tokens * pages,
                },
                Layout::PlanesInPage => PlaneStrides {
                    page: all * page_tokens,
                    token: own,
                    head,
                },
                Layout::PlanesInToken => PlaneStrides {
                    page: all * page_tokens,
                    token: all,
                    head,
                },
                Layout::LayersInPage => PlaneStrides {
                    page: all * page_tokens * layers,
                    token: own,
                    head,
                },
            });
            let padded_all = all + token_pad * geometry.planes.len();
            let whole_layer =
                padded_all * page_tokens * pages + page_pad * pages * geometry.planes.len();
            let plane_pads = shape.starts.len() * (token_pad * page_tokens + page_pad) * pages;
            shape.starts.push(
                (0..layers)
                    .map(|layer| match layout {
                        Layout::Nhd | Layout::Hnd | Layout::HeadsOutermost | Layout::Padded => {
                            layer * whole_layer + before * page_tokens * pages + plane_pads
                        }
                        Layout::PlanesInPage => layer * whole_layer + before * page_tokens,
                        Layout::PlanesInToken => layer * whole_layer + before,
                        Layout::LayersInPage => (layer * all + before) * page_tokens,
                    })
                    .collect(),
            );
            shape.total = whole_layer * layers;
            before += own;
        }
        shape
    }
}

pub(crate) fn header(geometry: &KvGeometry, number: u8) -> RecordHeader {
    RecordHeader {
        namespace: Key([1; 32]),
        parent: Key([2; 32]),
        key: Key([number; 32]),
        depth: u32::from(number),
        tokens: geometry.block_tokens,
        geometry: geometry.fingerprint(),
        layers: 0..geometry.layers,
        codec: CodecId::Raw,
        slabs: Vec::new(),
    }
}

/// Geometries with every size of element, one and two planes, planes of different sizes, one head.
pub(crate) fn geometries() -> Vec<KvGeometry> {
    let two_sizes = KvGeometry {
        layers: 2,
        planes: vec![
            Plane {
                heads: 1,
                head_bytes: 72,
            },
            Plane {
                heads: 3,
                head_bytes: 8,
            },
        ],
        block_tokens: 12,
        dtype: Dtype::Bf16,
    };
    let gqa = |heads, dim, dtype| KvGeometry::gqa(2, heads, dim, dtype, 12).expect("valid");
    vec![
        gqa(3, 16, Dtype::Bf16),
        gqa(1, 8, Dtype::F16),
        gqa(2, 96, Dtype::F32),
        gqa(2, 24, Dtype::Fp8E4m3),
        gqa(2, 13, Dtype::Opaque),
        KvGeometry::mla(3, 576, Dtype::Bf16, 12).expect("valid"),
        two_sizes,
    ]
}

/// Submits one layer and waits for it.
pub(crate) fn move_layer(
    device: &dyn Device,
    transfer: &Transfer,
    layer: LayerId,
) -> Option<Vec<Checksum>> {
    let submitted = device.submit(transfer, layer, &[]).expect("a sound device");
    let arrived = submitted.fence.point().wait(Duration::from_secs(30));
    assert!(arrived.expect("a sound device"), "the fence arrives");
    match submitted.sums {
        SlabSums::Unknown => None,
        SlabSums::Known(sums) => Some(sums),
        SlabSums::AfterFence(ask) => Some(ask().expect("a sound device")),
        SlabSums::Stored(_) => panic!("no save was to be encoded"),
        SlabSums::Compared(ask) => {
            let first_wrong = ask().expect("a sound device");
            assert_eq!(first_wrong, None, "what was saved is what is loaded");
            None
        }
    }
}

/// Saves the blocks at `positions` out of `pages`, one layer after the other, and seals them.
pub(crate) fn save(
    device: &dyn Device,
    arena: &HostArena,
    pages: &Pages,
    table: &[PageId],
    positions: &[usize],
) -> Vec<Slot> {
    let geometry = &pages.geometry;
    let mut fillings = arena
        .allocate(geometry.payload_bytes(), positions.len())
        .expect("room");
    for filling in &mut fillings {
        filling.image_mut().expect("sole").fill(0xa5);
    }
    let moves = positions.iter().zip(&fillings);
    let moves = moves.map(|(&token, filling)| SlabMove::Save {
        slot: filling.writer(),
        token: token as u32,
    });
    let table = PageTable {
        kv: pages.kv.clone(),
        pages: table.into(),
    };
    let transfer = Transfer::new(Direction::Save, table, moves.collect(), 0).expect("valid");
    let sums: Vec<_> = geometry
        .layer_ids()
        .map(|layer| move_layer(device, &transfer, layer))
        .collect();
    drop(transfer);
    let seal = |(number, mut filling): (usize, Filling)| {
        let image = filling.image_mut().expect("the transfer is gone").to_vec();
        for layer in geometry.layer_ids() {
            let start = RecordHeader::BYTES + layer.0 as usize * geometry.slab_stride();
            let sum = Checksummer::of(&image[start..start + geometry.slab_bytes()]);
            if let Some(sums) = &sums[layer.0 as usize] {
                assert_eq!(sums[number], sum, "what the device saw is what it stored");
            }
            filling.set_slab(layer, sum);
        }
        filling.seal(header(geometry, number as u8)).expect("whole")
    };
    fillings.into_iter().enumerate().map(seal).collect()
}

pub(crate) fn load(
    slots: &[Slot],
    pages: &Pages,
    table: &[PageId],
    at: &[usize],
    from: usize,
) -> Transfer {
    let moves = slots.iter().zip(at).map(|(slot, &token)| SlabMove::Load {
        slot: slot.clone(),
        token: token as u32,
    });
    let table = PageTable {
        kv: pages.kv.clone(),
        pages: table.into(),
    };
    Transfer::new(Direction::Load, table, moves.collect(), from as u32).expect("valid")
}

pub(crate) fn arena(geometry: &KvGeometry, slots: usize) -> HostArena {
    let slot = RecordHeader::BYTES + geometry.payload_bytes().next_multiple_of(4096);
    HostArena::open(geometry, slots * slot, |_, _| {}).expect("small")
}

fn assert_same(got: &[u8], expected: &[u8], case: &str) {
    if got != expected {
        let at = got
            .iter()
            .zip(expected)
            .position(|(got, expected)| got != expected);
        let wrong = got
            .iter()
            .zip(expected)
            .filter(|(got, expected)| got != expected);
        panic!(
            "{case}: {} bytes differ, the first at {at:?}",
            wrong.count()
        );
    }
}

/// Every geometry, layout and size of page against a block of 12 tokens; blocks that are not aligned
/// to pages; tables in order and at random; loads that start at, before, within and behind blocks.
pub(crate) fn a_move_writes_every_byte_of_its_tokens_and_no_other(subject: &Subject<'_>) {
    let device = &*subject.device;
    let mut seed = 0;
    for geometry in geometries() {
        let block = geometry.block_tokens as usize;
        let arena = arena(&geometry, 3);
        device.attach(&arena).expect("a sound device");
        for layout in LAYOUTS {
            for page_tokens in [1, 5, 12, 32] {
                seed += 1;
                let case = format!("{layout:?}, {page_tokens} a page, seed {seed}, {geometry:?}");
                let mut random = Random(seed);
                let at = [block, 2 * block, 4 * block];
                let needed = (5 * block).div_ceil(page_tokens);
                let count = needed + 2;
                let pages = Pages::new(subject, &geometry, layout, page_tokens, count);
                let table = |random: &mut Random| match random.below(3) {
                    0 => (0..needed as u32).map(PageId).collect(),
                    _ => random.pick(needed, count),
                };

                let before = random.bytes(pages.memory.read().len());
                pages.memory.write(&before);
                let source = table(&mut random);
                let slots = save(device, &arena, &pages, &source, &at);
                assert_same(&pages.memory.read()[..before.len()], &before, &case);
                for (slot, &block) in slots.iter().zip(&at) {
                    for layer in geometry.layer_ids() {
                        let mut expected = vec![0; geometry.slab_bytes()];
                        for (to, from) in pages.bytes_of(&source, layer.0 as usize, block, 0) {
                            expected[to] = before[from];
                        }
                        assert_same(slot.slab_bytes(layer).expect("there"), &expected, &case);
                    }
                }

                for from in [0, block, block + 5, 3 * block, 5 * block - 1, 5 * block] {
                    let mut expected = vec![0x5a; before.len()];
                    pages.memory.write(&expected);
                    let target = table(&mut random);
                    let transfer = load(&slots, &pages, &target, &at, from);
                    for layer in geometry.layer_ids().rev() {
                        let sums = move_layer(device, &transfer, layer);
                        for (index, (slot, &block)) in slots.iter().zip(&at).enumerate() {
                            let slab = slot.slab_bytes(layer).expect("there");
                            for (of, to) in pages.bytes_of(&target, layer.0 as usize, block, from) {
                                expected[to] = slab[of];
                            }
                            if let Some(sums) = &sums {
                                let whole = slot.slab(layer).expect("there").checksum;
                                assert_eq!(sums[index], whole, "{case}, from {from}");
                            }
                        }
                        // After each layer: the others are not touched.
                        let got = pages.memory.read();
                        assert_same(
                            &got[..expected.len()],
                            &expected,
                            &format!("{case}, from {from}"),
                        );
                    }
                }
            }
        }
    }
}

/// A slot that does not hold the layer is refused before anything moves.
pub(crate) fn a_layer_that_is_not_there_is_invalid_and_moves_nothing(subject: &Subject<'_>) {
    let device = &*subject.device;
    let geometry = &geometries()[0];
    let arena = arena(geometry, 2);
    device.attach(&arena).expect("a sound device");
    let pages = Pages::new(subject, geometry, Layout::Nhd, 12, 2);
    let table = [PageId(1), PageId(0)];
    let slots = save(device, &arena, &pages, &table, &[0, 12]);
    let poison = vec![0x5a; pages.memory.read().len()];
    pages.memory.write(&poison);
    let transfer = load(&slots, &pages, &table, &[0, 12], 0);
    let answer = device.submit(&transfer, LayerId(geometry.layers), &[]);
    let error = answer.err().expect("no such layer");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(pages.memory.read(), poison);
}

/// The device's own clone of a transfer keeps slots alive; dropping every other handle right after
/// the submission changes nothing.
pub(crate) fn handles_may_be_dropped_while_a_layer_is_under_way(subject: &Subject<'_>) {
    let device = &*subject.device;
    let geometry = &geometries()[0];
    let arena = arena(geometry, 1);
    device.attach(&arena).expect("a sound device");
    let pages = Pages::new(subject, geometry, Layout::Nhd, 12, 1);
    let bytes = Random(7).bytes(pages.memory.read().len());
    pages.memory.write(&bytes);
    let slots = save(device, &arena, &pages, &[PageId(0)], &[0]);
    pages.memory.write(&vec![0x5a; bytes.len()]);
    let transfer = load(&slots, &pages, &[PageId(0)], &[0], 0);
    drop(slots);
    let fences: Vec<_> = geometry
        .layer_ids()
        .map(|layer| device.submit(&transfer, layer, &[]).expect("sound").fence)
        .collect();
    drop(transfer);
    for fence in fences {
        let arrived = fence.point().wait(Duration::from_secs(30));
        assert!(arrived.expect("a sound device"));
    }
    assert_eq!(pages.memory.read(), bytes);
    assert_eq!(arena.usage().free_bytes, arena.usage().capacity_bytes);
}

/// Fences are reached in the end, and streams can be ordered behind them.
pub(crate) fn a_recorded_point_is_reached_and_orders_a_stream(subject: &Subject<'_>) {
    let fence = subject.device.record(Stream::HOST).expect("sound");
    assert!(fence.point().is_reached().expect("sound"));
    subject.device.order(Stream::HOST, &fence).expect("sound");
}

/// Chunks go from the host tier into device slots, from there into pages, from pages into device slots
/// and back into the host tier, and every byte is the same; nothing else is written.
pub(crate) fn chunks_move_between_the_tiers_and_pages(subject: &Subject<'_>) {
    let device = &*subject.device;
    let mut seed = 1000;
    for geometry in geometries() {
        let block = geometry.block_tokens as usize;
        for (layout, page_tokens) in [
            (Layout::Hnd, 5),
            (Layout::PlanesInToken, 16),
            (Layout::Padded, 1),
        ] {
            seed += 1;
            let case = format!("seed {seed}, {geometry:?}, {layout:?}, pages of {page_tokens}");
            let mut random = Random(seed);
            let (blocks, from) = (3, random.below(2 * block));
            let at: Vec<usize> = (0..blocks).map(|number| number * block).collect();
            let host = arena(&geometry, 2 * blocks);
            device.attach(&host).expect("a sound device");
            let chunk = geometry.payload_bytes() as u64;
            let slots = device
                .arena(&geometry, chunk * (2 * blocks as u64) + 1)
                .expect("a small arena");
            assert_eq!(slots.usage().free_bytes, chunk * 2 * blocks as u64);
            let count = (blocks * block).div_ceil(page_tokens) + 2;
            let pages = Pages::new(subject, &geometry, layout, page_tokens, count);
            let bytes = random.bytes(pages.memory.read().len());
            pages.memory.write(&bytes);
            let table = random.pick(count, count);
            let saved = save(device, &host, &pages, &table, &at);
            // Some slots are in use, so that the others are not in order.
            let mut spare = slots.allocate(2 * blocks);
            let mut fillings: Vec<DeviceFilling> = Vec::new();
            while fillings.len() < blocks {
                fillings.push(spare.swap_remove(random.below(spare.len())));
            }
            drop(spare);

            // Host tier to device slots.
            let moves = saved.iter().zip(&at).map(|(slot, &token)| SlabMove::Load {
                slot: slot.clone(),
                token: token as u32,
            });
            let to_fill = slots.table_to_fill(&fillings).expect("its own");
            let up = Transfer::new(Direction::Load, to_fill, moves.collect(), 0).expect("valid");
            for layer in geometry.layer_ids() {
                move_layer(device, &up, layer);
            }
            drop(up);
            let resident = seal_device(fillings, &saved);

            // Device slots to pages, from within a block on.
            pages.memory.write(&vec![0x5a; bytes.len()]);
            let moves = resident.iter().zip(&at);
            let moves = moves.map(|(slot, &token)| SlabMove::LoadDevice {
                slot: slot.clone(),
                token: token as u32,
            });
            let page_table = || PageTable {
                kv: pages.kv.clone(),
                pages: table.clone().into(),
            };
            let down = Transfer::new(Direction::Load, page_table(), moves.collect(), from as u32);
            let down = down.expect("valid");
            for layer in geometry.layer_ids() {
                if let Some(sums) = move_layer(device, &down, layer) {
                    let expected = resident.iter().map(|slot| slot.checksum(layer));
                    assert!(expected.eq(sums.into_iter().map(Some)), "{case}");
                }
            }
            let mut expected = vec![0x5a; bytes.len()];
            for layer in 0..geometry.layers as usize {
                for &start in &at {
                    for (_, place) in pages.bytes_of(&table, layer, start, from) {
                        expected[place] = bytes[place];
                    }
                }
            }
            assert_same(&pages.memory.read(), &expected, &case);
            drop((down, resident));

            // Pages to device slots, and those to the host tier.
            pages.memory.write(&bytes);
            let fillings = slots.allocate(blocks);
            let moves = fillings.iter().zip(&at);
            let moves = moves.map(|(filling, &token)| SlabMove::SaveDevice {
                slot: filling.writer(),
                token: token as u32,
            });
            let keep = Transfer::new(Direction::Save, page_table(), moves.collect(), 0);
            let keep = keep.expect("valid");
            for layer in geometry.layer_ids() {
                move_layer(device, &keep, layer);
            }
            drop(keep);
            let resident = seal_device(fillings, &saved);
            let mut images = host
                .allocate(geometry.payload_bytes(), blocks)
                .expect("room");
            for image in &mut images {
                image.image_mut().expect("sole").fill(0xa5);
            }
            let moves = images.iter().zip(&at);
            let moves = moves.map(|(filling, &token)| SlabMove::Save {
                slot: filling.writer(),
                token: token as u32,
            });
            let to_read = slots.table_to_read(&resident).expect("its own");
            let back = Transfer::new(Direction::Save, to_read.clone(), moves.collect(), 0);
            let back = back.expect("valid");
            for layer in geometry.layer_ids() {
                move_layer(device, &back, layer);
            }
            drop(back);
            for (mut image, slot) in images.into_iter().zip(&saved) {
                let image = image.image_mut().expect("the transfer is gone").to_vec();
                for layer in geometry.layer_ids() {
                    let start = RecordHeader::BYTES + layer.0 as usize * geometry.slab_stride();
                    let sum = Checksummer::of(&image[start..start + geometry.slab_bytes()]);
                    assert_eq!(
                        Some(sum),
                        slot.slab(layer).map(|slab| slab.checksum),
                        "{case}"
                    );
                }
            }

            // What is sealed does not change, and slots do not go to slots.
            let into_sealed = saved.iter().zip(&at).map(|(slot, &token)| SlabMove::Load {
                slot: slot.clone(),
                token: token as u32,
            });
            let into_sealed = into_sealed.collect();
            let refused = Transfer::new(Direction::Load, to_read.clone(), into_sealed, 0);
            assert_eq!(refused.err().expect("sealed").kind(), ErrorKind::Invalid);
            let within = resident.iter().zip(&at);
            let within = within.map(|(slot, &token)| SlabMove::LoadDevice {
                slot: slot.clone(),
                token: token as u32,
            });
            let refused = Transfer::new(Direction::Load, to_read.clone(), within.collect(), 0);
            assert_eq!(
                refused.err().expect("both are slots").kind(),
                ErrorKind::Invalid
            );
            drop((resident, to_read));
            let usage = slots.usage();
            assert_eq!(usage.free_bytes, usage.capacity_bytes, "{case}");
        }
    }
}

fn seal_device(fillings: Vec<DeviceFilling>, saved: &[Slot]) -> Vec<DeviceSlot> {
    let seal = |(filling, slot): (DeviceFilling, &Slot)| {
        let header = slot.header().expect("sealed");
        filling.seal(header).expect("whole")
    };
    fillings.into_iter().zip(saved).map(seal).collect()
}

/// Everything of a load out of the device tier is leaked in the middle of it, and the bytes arrive.
pub(crate) fn everything_of_a_device_transfer_may_be_leaked(subject: &Subject<'_>) {
    let device = &*subject.device;
    let geometry = &KvGeometry::gqa(4, 8, 128, Dtype::Bf16, 16).expect("valid");
    let chunk = geometry.payload_bytes() as u64;
    let host = arena(geometry, 32);
    device.attach(&host).expect("a sound device");
    let slots = device.arena(geometry, 32 * chunk).expect("small");
    let pages = Pages::new(subject, geometry, Layout::Nhd, 16, 32);
    let bytes = Random(11).bytes(pages.memory.read().len());
    pages.memory.write(&bytes);
    let table = Random(12).pick(32, 32);
    let at: Vec<usize> = (0..32).map(|block| block * 16).collect();
    let saved = save(device, &host, &pages, &table, &at);
    let fillings = slots.allocate(32);
    let page_table = || PageTable {
        kv: pages.kv.clone(),
        pages: table.clone().into(),
    };
    let moves = fillings.iter().zip(&at);
    let moves = moves.map(|(filling, &token)| SlabMove::SaveDevice {
        slot: filling.writer(),
        token: token as u32,
    });
    let keep = Transfer::new(Direction::Save, page_table(), moves.collect(), 0).expect("valid");
    for layer in geometry.layer_ids() {
        move_layer(device, &keep, layer);
    }
    drop(keep);
    let resident = seal_device(fillings, &saved);
    pages.memory.write(&vec![0x5a; bytes.len()]);
    let moves = resident.into_iter().zip(&at);
    let moves = moves.map(|(slot, &token)| SlabMove::LoadDevice {
        slot,
        token: token as u32,
    });
    let load = Transfer::new(Direction::Load, page_table(), moves.collect(), 0).expect("valid");
    let mut last = None;
    for layer in geometry.layer_ids() {
        let submitted = device.submit(&load, layer, &[]).expect("sound");
        std::mem::forget(last.replace(submitted.fence));
    }
    std::mem::forget((load, slots));
    let arrived = last.expect("four layers");
    let arrived = arrived.point().wait(Duration::from_secs(30));
    assert!(arrived.expect("a sound device"));
    assert_same(&pages.memory.read(), &bytes, "a leaked load");
}

/// What a job reported, for the thread that waits for its end.
pub(crate) struct Log(Mutex<Vec<JobEvent>>, Condvar);

impl Log {
    pub(crate) fn new() -> Arc<Log> {
        Arc::new(Log(Mutex::default(), Condvar::new()))
    }

    pub(crate) fn sink(self: &Arc<Self>) -> Box<dyn FnMut(JobEvent) + Send> {
        let log = Arc::clone(self);
        Box::new(move |event| {
            log.0.lock().expect("no panic").push(event);
            log.1.notify_all();
        })
    }

    /// Waits for `Done`, checks that it came last and once, and gives the events as lines.
    pub(crate) fn finish(&self) -> Vec<String> {
        let events = self.0.lock().expect("no panic");
        let undone =
            |events: &mut Vec<JobEvent>| !matches!(events.last(), Some(JobEvent::Done { .. }));
        let limit = Duration::from_secs(60);
        let (events, late) = self
            .1
            .wait_timeout_while(events, limit, undone)
            .expect("no panic");
        assert!(!late.timed_out(), "a job hangs");
        let ends = events
            .iter()
            .filter(|event| matches!(event, JobEvent::Done { .. }));
        assert_eq!(ends.count(), 1, "a job ends once");
        lines(&events)
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        lines(&self.0.lock().expect("no panic"))
    }

    /// The slabs that a save reported, by layer.
    pub(crate) fn slabs(&self) -> Vec<(LayerId, Vec<SlabEntry>)> {
        let events = self.0.lock().expect("no panic");
        let slabs = events.iter().filter_map(|event| match event {
            JobEvent::Layer { layer, slabs, .. } => Some((*layer, slabs.clone())),
            _ => None,
        });
        slabs.collect()
    }
}

fn lines(events: &[JobEvent]) -> Vec<String> {
    let line = |event: &JobEvent| match event {
        JobEvent::Layer { layer, .. } => format!("layer {layer}"),
        JobEvent::Failed {
            layer,
            good_moves,
            error,
        } => format!("failed {layer} after {good_moves}: {}", error.kind()),
        JobEvent::Done { settled } => format!("done, settled {settled}"),
    };
    events.iter().map(line).collect()
}

pub(crate) fn limits(jobs: usize) -> QueueLimits {
    QueueLimits {
        jobs,
        fence_timeout: Duration::from_secs(30),
    }
}

/// Ten threads save and load through one queue, each with pages of its own in one arena. Every load
/// brings back what its thread saved, and at the end the arena is empty.
pub(crate) fn ten_threads_share_a_queue(subject: &Subject<'_>) {
    let geometry = &geometries()[0];
    let arena = arena(geometry, 20);
    subject.device.attach(&arena).expect("a sound device");
    let clock = Arc::new(SystemClock::default());
    let queue =
        TransferQueue::spawn(Arc::clone(&subject.device), clock, limits(64)).expect("a thread");
    let all: Vec<Pages> = (0..10)
        .map(|_| Pages::new(subject, geometry, Layout::Hnd, 5, 8))
        .collect();
    thread::scope(|scope| {
        for (number, pages) in all.iter().enumerate() {
            let (queue, arena) = (&queue, &arena);
            scope.spawn(move || {
                let mut random = Random(number as u64);
                for _ in 0..5 {
                    let bytes = random.bytes(pages.memory.read().len());
                    pages.memory.write(&bytes);
                    let table = random.pick(8, 8);
                    let slots = save_by_queue(queue, arena, pages, &table, &[0, 12]);
                    pages.memory.write(&vec![0x5a; bytes.len()]);
                    let log = Log::new();
                    queue
                        .submit(load_job(&slots, pages, &table, &[0, 12], 3, &log))
                        .expect("room");
                    assert_eq!(log.finish(), ["layer 0", "layer 1", "done, settled true"]);
                    let mut expected = vec![0x5a; bytes.len()];
                    for layer in 0..2 {
                        for block in [0, 12] {
                            for (_, at) in pages.bytes_of(&table, layer, block, 3) {
                                expected[at] = bytes[at];
                            }
                        }
                    }
                    assert_same(&pages.memory.read(), &expected, &format!("thread {number}"));
                }
            });
        }
    });
    queue.close();
    assert_eq!(arena.usage().free_bytes, arena.usage().capacity_bytes);
}

pub(crate) fn load_job(
    slots: &[Slot],
    pages: &Pages,
    table: &[PageId],
    at: &[usize],
    from: u32,
    log: &Arc<Log>,
) -> Job {
    let moves = slots.iter().zip(at).map(|(slot, &token)| SlabMove::Load {
        slot: slot.clone(),
        token: token as u32,
    });
    job(Direction::Load, pages, table, moves.collect(), from, log)
}

pub(crate) fn job(
    direction: Direction,
    pages: &Pages,
    table: &[PageId],
    moves: Vec<SlabMove>,
    from_token: u32,
    log: &Arc<Log>,
) -> Job {
    Job {
        direction,
        layers: 0..pages.geometry.layers,
        table: PageTable {
            kv: pages.kv.clone(),
            pages: table.into(),
        },
        moves,
        from_token,
        encoded: None,
        after: Vec::new(),
        events: log.sink(),
        urgency: Urgency::Demand,
        begin_by: None,
        cancelled: Arc::default(),
    }
}

/// Saves through a queue and seals with the checksums that it reports.
pub(crate) fn save_by_queue(
    queue: &TransferQueue,
    arena: &HostArena,
    pages: &Pages,
    table: &[PageId],
    at: &[usize],
) -> Vec<Slot> {
    let geometry = &pages.geometry;
    let mut fillings = arena
        .allocate(geometry.payload_bytes(), at.len())
        .expect("room");
    let moves = at
        .iter()
        .zip(&fillings)
        .map(|(&token, filling)| SlabMove::Save {
            slot: filling.writer(),
            token: token as u32,
        });
    let log = Log::new();
    let moves = moves.collect();
    queue
        .submit(job(Direction::Save, pages, table, moves, 0, &log))
        .expect("room");
    assert_eq!(log.finish().last().expect("an end"), "done, settled true");
    for (layer, slabs) in log.slabs() {
        for (filling, slab) in fillings.iter_mut().zip(slabs) {
            filling.set_stored(layer, slab);
        }
    }
    let sealed = fillings.into_iter().enumerate().map(|(number, filling)| {
        let slot = filling.seal(header(geometry, number as u8)).expect("whole");
        for layer in geometry.layer_ids() {
            let sum = Checksummer::of(slot.slab_bytes(layer).expect("there"));
            assert_eq!(slot.slab(layer).expect("there").checksum, sum);
        }
        slot
    });
    sealed.collect()
}

/// A load that mixes raw and encoded chunks writes every byte as it was saved, in every layout; with
/// damage in an encoded slab, the sums differ.
pub(crate) fn raw_and_encoded_chunks_load_side_by_side(subject: &Subject<'_>) {
    let device = &*subject.device;
    for dtype in [Dtype::Bf16, Dtype::F16] {
        if !device.decodes(CodecId::lossless(dtype)) {
            continue;
        }
        for layout in LAYOUTS {
            let geometry = KvGeometry::gqa(2, 3, 80, dtype, 12).expect("valid");
            let arena = arena(&geometry, 12);
            device.attach(&arena).expect("attaches");
            let mut random = Random(layout as u64);
            let source = Pages::new(subject, &geometry, layout, 4, 12);
            let bytes = random.bytes(source.memory.read().len());
            // The high byte of each value keeps few bits, in all but the last third of the pages.
            let kept = bytes.len() * 2 / 3;
            let bytes: Vec<u8> = bytes
                .into_iter()
                .enumerate()
                .map(|(at, byte)| match at < kept && at % 2 == 1 {
                    true => byte & 0x83 | 0x3c,
                    false => byte,
                })
                .collect();
            source.memory.write(&bytes);
            let table: Vec<PageId> = (0..12).map(PageId).collect();
            let raw = save(device, &arena, &source, &table, &[0, 12, 24, 36]);
            let mut encoded = 0;
            let mixed: Vec<Slot> = raw
                .iter()
                .enumerate()
                .map(|(index, slot)| {
                    let room = |bytes| Some(arena.allocate(bytes, 1)?.remove(0));
                    let coded = slot.encoded(CodecId::lossless(dtype), room).expect("sound");
                    encoded += usize::from(coded.is_some() && index != 1);
                    coded.filter(|_| index != 1).unwrap_or_else(|| slot.clone())
                })
                .collect();
            if layout == Layout::Nhd {
                assert!((1..4).contains(&encoded), "{encoded} of 4 are encoded");
            }
            for from in [0, 17] {
                let load_into = |slots: &[Slot]| {
                    let target = Pages::new(subject, &geometry, layout, 4, 12);
                    target.memory.write(&vec![0x77; bytes.len()]);
                    let transfer = load(slots, &target, &table, &[0, 12, 24, 36], from);
                    for layer in geometry.layer_ids() {
                        if let Some(sums) = move_layer(device, &transfer, layer) {
                            for (sum, slot) in sums.iter().zip(slots) {
                                let stored = slot.slab(layer).expect("there").checksum;
                                assert_eq!(*sum, stored, "of what is stored");
                            }
                        }
                    }
                    drop(transfer);
                    target.memory.read()
                };
                let case = format!("{dtype:?} {layout:?} from {from}");
                assert_same(&load_into(&mixed), &load_into(&raw), &case);
            }
        }
    }
}

/// Saves whose slabs are encoded on the way hold what raw saves of the same pages hold, slab by slab,
/// in the codec's own bytes, beside slabs and chunks that do not shrink; whichever transfers bring the
/// layers; what no slab covers is zero; and they load again.
pub(crate) fn an_encoded_save_stores_what_a_raw_one_does(subject: &Subject<'_>) {
    let device = &*subject.device;
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let codec = CodecId::lossless(dtype);
        if !device.encodes(codec) {
            eprintln!("SKIPPED: the device does not encode {codec:?}");
            continue;
        }
        for (layout, page_tokens) in LAYOUTS.into_iter().zip([4, 12, 5, 32, 1, 4, 12]) {
            let case = format!("{dtype:?} {layout:?} {page_tokens} a page");
            let geometry = KvGeometry::gqa(4, 3, 80, dtype, 12).expect("valid");
            let arena = arena(&geometry, 16);
            device.attach(&arena).expect("attaches");
            let mut random = Random(77 + layout as u64);
            let count = 72_usize.div_ceil(page_tokens);
            let pages = Pages::new(subject, &geometry, layout, page_tokens, count);
            let at = [0, 12, 24, 48];
            let table = random.pick(count, count);
            pages.memory.write(&like_kv(&mut random, &pages, &table));
            let raw = save(device, &arena, &pages, &table, &at);
            let expected: Vec<Slot> = raw
                .iter()
                .map(|slot| {
                    let room = |bytes| Some(arena.allocate(bytes, 1)?.remove(0));
                    let coded = slot.encoded(codec, room).expect("sound");
                    coded.unwrap_or_else(|| slot.clone())
                })
                .collect();
            let kept: Vec<usize> = expected.iter().map(|slot| slot.image().len()).collect();
            let shrunken = kept.iter().filter(|&&bytes| bytes < raw[0].image().len());
            assert_eq!(shrunken.count(), 3, "{case}: {kept:?}");

            let payload = geometry.payload_bytes();
            let mut fillings = arena.allocate(payload, at.len()).expect("room");
            for filling in &mut fillings {
                filling.image_mut().expect("sole").fill(0xa5);
            }
            save_encoded(device, codec, &pages, &table, &at, &mut fillings, 2);
            let slots: Vec<Slot> = fillings
                .into_iter()
                .enumerate()
                .map(|(number, filling)| {
                    let header = RecordHeader {
                        codec,
                        ..header(&geometry, number as u8)
                    };
                    filling.seal(header).expect("whole")
                })
                .collect();
            for (number, slot) in slots.iter().enumerate() {
                let mut uncovered = slot.image().to_vec();
                uncovered[..RecordHeader::BYTES].fill(0);
                let header = slot.header().expect("reads back");
                for layer in geometry.layer_ids() {
                    let slab = header.slab(layer).expect("there");
                    uncovered[RecordHeader::BYTES..][slab.range()].fill(0);
                    let stored = slot.slab_bytes(layer).expect("there");
                    assert_eq!(Checksummer::of(stored), slab.checksum, "{case}");
                    let expected = expected[number].slab_bytes(layer).expect("there");
                    assert_same(stored, expected, &format!("{case}, chunk {number}"));
                }
                assert!(uncovered.iter().all(|&byte| byte == 0), "{case}");
                // What is behind the last slab was given back.
                let end = header.payload_bytes().next_multiple_of(4096);
                assert_eq!(slot.image().len(), RecordHeader::BYTES + end, "{case}");
            }
            let filled: usize = slots.iter().map(|slot| slot.image().len()).sum();
            drop((raw, expected));
            assert_eq!(arena.usage().published_bytes, filled, "{case}");
            assert_eq!(arena.usage().filling_bytes, 0, "{case}");

            if device.decodes(codec) {
                let before = pages.memory.read();
                let mut expected = vec![0x5a; before.len()];
                pages.memory.write(&expected);
                let transfer = load(&slots, &pages, &table, &at, 17);
                for layer in geometry.layer_ids() {
                    move_layer(device, &transfer, layer);
                    for block in at {
                        for (_, at) in pages.bytes_of(&table, layer.0 as usize, block, 17) {
                            expected[at] = before[at];
                        }
                    }
                }
                assert_same(&pages.memory.read(), &expected, &case);
            }
        }
    }
}

/// A slot that is too short for its chunk is said to be, from the slab on that does not fit; what is
/// said to be whole is, and nothing is written behind the slots.
pub(crate) fn an_encoded_chunk_that_does_not_fit_is_told(subject: &Subject<'_>) {
    let device = &*subject.device;
    if !device.encodes(CodecId::Exp) {
        eprintln!("SKIPPED: the device does not encode");
        return;
    }
    let geometry = KvGeometry::gqa(4, 3, 80, Dtype::Bf16, 12).expect("valid");
    let arena = arena(&geometry, 8);
    device.attach(&arena).expect("attaches");
    let pages = Pages::new(subject, &geometry, Layout::Nhd, 12, 6);
    let table: Vec<PageId> = (0..6).map(PageId).collect();
    let mut random = Random(5);
    let bytes = like_kv(&mut random, &pages, &table);
    pages.memory.write(&bytes);
    // Blocks 0 and 24 shrink to less than 80 %, the one at 48 does not.
    let at = [0, 48, 24];
    let room = geometry.payload_bytes() * 8 / 10;
    let mut fillings = arena.allocate(room, 3).expect("room");
    for filling in &mut fillings {
        filling.image_mut().expect("sole").fill(0xa5);
    }
    // Behind the last of them.
    let mut guard = arena.allocate(4096, 1).expect("room").remove(0);
    guard.image_mut().expect("sole").fill(0xa5);
    let slabs = save_encoded(device, CodecId::Exp, &pages, &table, &at, &mut fillings, 1);
    let is_stored = |layer: &Vec<SlabEntry>, chunk: usize| layer[chunk].bytes > 0;
    // Where chunks share their starts, a raw one among them pushes the others out too.
    let shared = slabs.iter().all(|layer| layer[0].offset == layer[2].offset)
        && slabs[1][0].offset as usize == geometry.slab_stride();
    for chunk in 0..3 {
        let first = slabs.iter().position(|layer| !is_stored(layer, chunk));
        assert!(first.is_some() || chunk != 1, "a raw chunk does not fit");
        assert!(first.is_none() || chunk == 1 || shared, "chunk {chunk}");
        let rest = &slabs[first.unwrap_or(slabs.len())..];
        assert!(!rest.iter().any(|layer| is_stored(layer, chunk)));
    }
    let untouched = guard.image_mut().expect("sole");
    assert!(untouched.iter().all(|&byte| byte == 0xa5));
    for (number, filling) in fillings.into_iter().enumerate() {
        let sealed = filling.seal(RecordHeader {
            codec: CodecId::Exp,
            ..header(&geometry, number as u8)
        });
        match sealed {
            Ok(slot) => {
                let room = arena.allocate(geometry.payload_bytes(), 1).expect("room");
                let raw = slot.decoded(room.into_iter().next().expect("one"));
                let raw = raw.expect("sound");
                for layer in geometry.layer_ids() {
                    let slab = raw.slab_bytes(layer).expect("there");
                    for (of, from) in pages.bytes_of(&table, layer.0 as usize, at[number], 0) {
                        assert_eq!(slab[of], bytes[from], "chunk {number}, layer {layer}");
                    }
                }
            }
            Err(error) => {
                assert!(slabs.iter().any(|layer| !is_stored(layer, number)));
                assert_eq!(error.kind(), ErrorKind::Internal);
            }
        }
    }
}

/// A layer whose turn it is not is refused.
pub(crate) fn the_layers_of_an_encoded_save_come_in_order(subject: &Subject<'_>) {
    let device = &*subject.device;
    if !device.encodes(CodecId::Exp) {
        eprintln!("SKIPPED: the device does not encode");
        return;
    }
    let geometry = KvGeometry::gqa(3, 3, 80, Dtype::Bf16, 12).expect("valid");
    let arena = arena(&geometry, 1);
    device.attach(&arena).expect("attaches");
    let pages = Pages::new(subject, &geometry, Layout::Nhd, 12, 1);
    let fillings = arena.allocate(geometry.payload_bytes(), 1).expect("room");
    let encoded = EncodedSave::new(CodecId::Exp);
    let transfer = encoded_transfer(&pages, &[PageId(0)], &[0], &fillings, &encoded);
    let submit = |layer| {
        let submitted = device.submit(&transfer, LayerId(layer), &[])?;
        let arrived = submitted.fence.point().wait(Duration::from_secs(30))?;
        assert!(arrived, "the fence arrives");
        Ok::<_, Error>(())
    };
    submit(0).expect("the first");
    assert!(submit(2).is_err(), "layer 1 is missing");
    assert!(submit(0).is_err(), "it was there");
}

/// Random bytes in every page, of which the values of all blocks but that at token 48 have few
/// exponents, but for layer 1 of the block at token 12.
fn like_kv(random: &mut Random, pages: &Pages, table: &[PageId]) -> Vec<u8> {
    let mut bytes = random.bytes(pages.memory.read().len());
    for layer in 0..pages.geometry.layers as usize {
        for block in [0, 12, 24] {
            if (layer, block) == (1, 12) {
                continue;
            }
            for (of, at) in pages.bytes_of(table, layer, block, 0) {
                if of % 2 == 1 {
                    bytes[at] = bytes[at] & 0x83 | 0x3c;
                }
            }
        }
    }
    bytes
}

fn encoded_transfer(
    pages: &Pages,
    table: &[PageId],
    at: &[usize],
    fillings: &[Filling],
    encoded: &EncodedSave,
) -> Transfer {
    let moves = at
        .iter()
        .zip(fillings)
        .map(|(&token, filling)| SlabMove::Save {
            slot: filling.writer(),
            token: token as u32,
        });
    let table = PageTable {
        kv: pages.kv.clone(),
        pages: table.into(),
    };
    Transfer::encoded_save(table, moves.collect(), encoded.clone()).expect("valid")
}

/// Saves encoded, `at_once` layers a transfer, and notes what the device answers; by layer.
fn save_encoded(
    device: &dyn Device,
    codec: CodecId,
    pages: &Pages,
    table: &[PageId],
    at: &[usize],
    fillings: &mut [Filling],
    at_once: u32,
) -> Vec<Vec<SlabEntry>> {
    let encoded = EncodedSave::new(codec);
    let mut all = Vec::new();
    let layers = pages.geometry.layers;
    for first in (0..layers).step_by(at_once as usize) {
        let transfer = encoded_transfer(pages, table, at, fillings, &encoded);
        let group = first..layers.min(first + at_once);
        let submitted = device.submit_layers(&transfer, group, &[]).expect("sound");
        for submitted in submitted {
            let arrived = submitted.fence.point().wait(Duration::from_secs(30));
            assert!(arrived.expect("a sound device"), "the fence arrives");
            let SlabSums::Stored(ask) = submitted.sums else {
                panic!("the device does not say where it put the slabs");
            };
            all.push(ask().expect("a sound device"));
        }
    }
    for (layer, slabs) in pages.geometry.layer_ids().zip(&all) {
        assert_eq!(slabs.len(), fillings.len(), "an answer for each move");
        for (filling, slab) in fillings.iter_mut().zip(slabs) {
            filling.set_stored(layer, *slab);
        }
    }
    all
}

/// Encoded chunks go up into device slots, where they are raw, from there into pages, and back down
/// encoded or raw; what comes down is known to be what went up, and what is not that is noticed.
pub(crate) fn encoded_chunks_rise_into_the_device_tier_and_sink_again(subject: &Subject<'_>) {
    let device = &*subject.device;
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let codec = CodecId::lossless(dtype);
        if !device.decodes(codec) {
            continue;
        }
        let geometry = KvGeometry::gqa(4, 3, 80, dtype, 12).expect("valid");
        let host = arena(&geometry, 16);
        device.attach(&host).expect("attaches");
        let chunk = geometry.payload_bytes() as u64;
        let slots = device.arena(&geometry, 4 * chunk).expect("small");
        let pages = Pages::new(subject, &geometry, Layout::Hnd, 5, 15);
        let mut random = Random(31);
        let (table, at) = (random.pick(15, 15), [0, 12, 24, 48]);
        let bytes = like_kv(&mut random, &pages, &table);
        pages.memory.write(&bytes);
        let raw = save(device, &host, &pages, &table, &at);
        let coded = raw.iter().map(|slot| {
            let room = |bytes| Some(host.allocate(bytes, 1)?.remove(0));
            let coded = slot.encoded(codec, room).expect("sound");
            coded.unwrap_or_else(|| slot.clone())
        });
        let coded: Vec<Slot> = coded.collect();
        let fillings = slots.allocate(4);
        let moves = coded.iter().zip(&at).map(|(slot, &token)| SlabMove::Load {
            slot: slot.clone(),
            token: token as u32,
        });
        let to_fill = slots.table_to_fill(&fillings).expect("its own");
        let token = |index: usize| index as u32 * 12;
        let moves = moves.enumerate().map(|(index, slab_move)| match slab_move {
            SlabMove::Load { slot, .. } => SlabMove::Load {
                slot,
                token: token(index),
            },
            other => other,
        });
        let up = Transfer::new(Direction::Load, to_fill, moves.collect(), 0).expect("valid");
        for layer in geometry.layer_ids() {
            move_layer(device, &up, layer);
        }
        drop(up);
        let resident = seal_device(fillings, &coded);
        for (slot, raw) in resident.iter().zip(&raw) {
            for layer in geometry.layer_ids() {
                let known = slot.checksum(layer);
                let expected = raw.slab(layer).expect("there").checksum;
                assert!(known.is_none_or(|known| known == expected));
            }
        }

        pages.memory.write(&vec![0x5a; bytes.len()]);
        let moves = resident.iter().zip(&at);
        let moves = moves.map(|(slot, &token)| SlabMove::LoadDevice {
            slot: slot.clone(),
            token: token as u32,
        });
        let page_table = PageTable {
            kv: pages.kv.clone(),
            pages: table.clone().into(),
        };
        let load = Transfer::new(Direction::Load, page_table, moves.collect(), 0).expect("valid");
        let mut expected = vec![0x5a; bytes.len()];
        for layer in geometry.layer_ids() {
            move_layer(device, &load, layer);
            for start in at {
                for (_, place) in pages.bytes_of(&table, layer.0 as usize, start, 0) {
                    expected[place] = bytes[place];
                }
            }
        }
        assert_same(&pages.memory.read(), &expected, "out of the device tier");
        drop(load);

        for is_encoded in [false, true] {
            if is_encoded && !device.encodes(codec) {
                eprintln!("SKIPPED: the device does not encode {codec:?}");
                continue;
            }
            let mut fillings = host.allocate(chunk as usize, 4).expect("room");
            let moves = fillings.iter().enumerate();
            let moves = moves.map(|(index, filling)| SlabMove::Save {
                slot: filling.writer(),
                token: token(index),
            });
            let (moves, to_read) = (moves.collect(), slots.table_to_read(&resident));
            let to_read = to_read.expect("its own");
            let down = match is_encoded {
                false => Transfer::new(Direction::Save, to_read, moves, 0),
                true => Transfer::encoded_save(to_read, moves, EncodedSave::new(codec)),
            };
            let down = down.expect("valid");
            for layer in geometry.layer_ids() {
                let submitted = device.submit(&down, layer, &[]).expect("sound");
                let arrived = submitted.fence.point().wait(Duration::from_secs(30));
                assert!(arrived.expect("sound"));
                if let SlabSums::Stored(ask) = submitted.sums {
                    for (filling, slab) in fillings.iter_mut().zip(ask().expect("sound")) {
                        filling.set_stored(layer, slab);
                    }
                    continue;
                }
                for (filling, slot) in fillings.iter_mut().zip(&raw) {
                    filling.set_slab(layer, slot.slab(layer).expect("there").checksum);
                }
            }
            drop(down);
            for (number, filling) in fillings.into_iter().enumerate() {
                let slot = filling.seal(resident[number].header().clone());
                let slot = slot.expect("whole");
                // The last one does not shrink.
                assert_eq!(slot.codec() != CodecId::Raw, is_encoded && number < 3);
                for (other, header) in resident.iter().map(DeviceSlot::header).enumerate() {
                    assert_eq!(slot.holds(header).expect("sound"), number == other);
                }
                let mut damaged = resident[number].header().clone();
                damaged.slabs[2].checksum.0 ^= 1;
                assert!(!slot.holds(&damaged).expect("sound"));
            }
        }
    }
}
