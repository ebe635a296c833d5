//! The logits of a Llama-shaped model with and without a load, equal to the bit.
//!
//! The model computes a prefix itself, into pages in random order, and a suffix behind it. The prefix is
//! saved, everything is poisoned, and the suffix is computed again behind the prefix as the transfer queue
//! loads it into other pages.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use stemkv_store::device::CudaDevice;
use stemkv_store::transfer::QueueLimits;
use stemkv_store::*;

use crate::cuda::{self, Memory};
use crate::hits::through;
use crate::llama::{LAYERS, LayerKv, Llama, Paging};
use crate::store::{Pages, Random, open_arena, save};

const PREFIX: usize = 2048;
/// Tokens of the prefix that are computed together, and of the suffix.
const STEP: usize = 512;
const ROWS: usize = 64;
const PAGE: usize = 16;
const PREFIX_PAGES: usize = PREFIX / PAGE;
/// Bytes of a token in one plane of one layer.
const TOKEN_BYTES: usize = 8 * 128 * 2;

/// Pages in an order of their own.
struct Order {
    table: PageTable,
    on_gpu: Memory,
}

impl Order {
    fn new(pages: &Pages, random: &mut Random) -> Order {
        // Twice as many pages as are needed: what is not in order stays poisoned.
        let mut ids: Vec<PageId> = (0..2 * PREFIX_PAGES as u32).map(PageId).collect();
        random.shuffle(&mut ids);
        ids.truncate(PREFIX_PAGES);
        let on_gpu = Memory::new(PREFIX_PAGES * 4);
        let numbers: Vec<u8> = ids.iter().flat_map(|id| id.0.to_le_bytes()).collect();
        on_gpu.write(0, &numbers);
        Order {
            table: pages.table(ids),
            on_gpu,
        }
    }

    fn paging(&self) -> Paging {
        Paging {
            table: self.on_gpu.address,
            page_bytes: PAGE * TOKEN_BYTES,
        }
    }
}

struct Bed {
    llama: Llama,
    pages: Pages,
    /// One layer's tokens, contiguous: what attention reads.
    keys: Memory,
    values: Memory,
}

pub(crate) fn with_and_without_a_load() {
    let Some(llama) = Llama::new(STEP, PREFIX + STEP) else {
        println!("SKIPPED: no cuBLAS on this machine");
        return;
    };
    let geometry = KvGeometry::gqa(LAYERS as u32, 8, 128, Dtype::Bf16, 16).expect("valid");
    let tokens = || Memory::new((PREFIX + STEP) * TOKEN_BYTES);
    let bed = Bed {
        llama,
        pages: Pages::new(&geometry, PAGE as u32, 2 * PREFIX_PAGES as u32),
        keys: tokens(),
        values: tokens(),
    };
    let head = bed.llama.head();
    let mut random = Random(11);
    let orders: Vec<Order> = (0..3)
        .map(|_| Order::new(&bed.pages, &mut random))
        .collect();
    let arena = open_arena(&geometry, 2 * PREFIX / 16);
    let device = Arc::new(CudaDevice::open(0).expect("there was one a moment ago"));
    device.attach(&arena).expect("pinned");
    let limits = QueueLimits {
        jobs: 8,
        fence_timeout: Duration::from_secs(30),
    };
    let clock = Arc::new(SystemClock::default());
    let queue = TransferQueue::spawn(device.clone(), clock, limits).expect("threads");

    bed.pages.memory.fill(0x7f);
    bed.compute_prefix(&orders[0]);
    bed.compute_suffix(&orders[0], |_| {});
    let alone = bed.llama.logits(&head, ROWS);
    let slots = save(&device, &arena, &orders[0].table, (PREFIX / 16) as u32);
    for order in &orders[1..] {
        bed.poison();
        let (fences, arrivals) = mpsc::channel::<Fence>();
        let stream = Stream(bed.llama.stream.0);
        thread::scope(|scope| {
            let (queue, slots, table) = (&queue, &slots, &order.table);
            scope.spawn(move || {
                let (slots, table) = (std::slice::from_ref(slots), std::slice::from_ref(table));
                through(queue, slots, table, vec![fences]);
            });
            bed.compute_suffix(order, |_| {
                let fence = arrivals.recv().expect("every layer comes");
                device.order(stream, &fence).expect("a sound GPU");
            });
        });
        let loaded = bed.llama.logits(&head, ROWS);
        assert!(loaded == alone, "other logits with a load");
    }
    bed.poison();
    bed.compute_suffix(&orders[1], |_| {});
    assert!(bed.llama.logits(&head, ROWS) != alone, "the prefix matters");
    println!(
        "logits of {ROWS} tokens behind {PREFIX}, {} values, equal to the bit with the prefix computed and \
         with it loaded into two other orders of pages; behind poison they differ",
        alone.len() / 2
    );
}

impl Bed {
    fn pages_of(&self, layer: usize) -> LayerKv {
        let layer = LayerId(layer as u32);
        LayerKv {
            keys: self.pages.kv.base(0, layer),
            values: self.pages.kv.base(1, layer),
        }
    }

    fn tokens(&self) -> LayerKv {
        LayerKv {
            keys: self.keys.address,
            values: self.values.address,
        }
    }

    /// Large numbers, not NaN: products with them differ, and are equal to themselves.
    fn poison(&self) {
        for memory in [&self.pages.memory, &self.keys, &self.values] {
            memory.fill(0x42);
        }
        cuda::synchronize();
    }

    fn compute_prefix(&self, order: &Order) {
        for first in (0..PREFIX).step_by(STEP) {
            self.llama.begin(STEP, 1 + first as u64);
            let (before, new) = (first / PAGE, STEP / PAGE);
            for layer in 0..LAYERS {
                let (pages, tokens) = (self.pages_of(layer), self.tokens());
                let turn = |which, back| {
                    self.llama
                        .turn_pages(order.paging(), pages, tokens, which, back);
                };
                turn((0, before), false);
                self.llama.layer(layer, STEP, first, tokens);
                turn((before, new), true);
            }
        }
        self.llama.stream.synchronize();
    }

    /// Calls `ready` before anything is read of a layer.
    fn compute_suffix(&self, order: &Order, ready: impl Fn(usize)) {
        self.llama.begin(ROWS, 0);
        for layer in 0..LAYERS {
            ready(layer);
            let (pages, tokens) = (self.pages_of(layer), self.tokens());
            let all = (0, PREFIX_PAGES);
            self.llama
                .turn_pages(order.paging(), pages, tokens, all, false);
            self.llama.layer(layer, ROWS, PREFIX, tokens);
        }
    }
}
