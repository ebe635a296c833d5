//! Eight hits that arrive together, beside a decode loop: when does each have its first token?

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use stemkv_store::device::CudaDevice;
use stemkv_store::transfer::QueueLimits;
use stemkv_store::*;

use crate::cuda::{self, Memory};
use crate::link::Ceiling;
use crate::llama::{LAYERS, LayerKv, Llama};
use crate::report::{Goal, figure, median};
use crate::store::{Pages, load_transfer, open_arena, save};

const HITS: usize = 8;
const TOKENS: usize = 8 << 10;
/// New tokens of each.
const ROWS: usize = 64;
const PAGE: usize = 16;
const DECODE_ROWS: usize = 8;
const STEP_INPUT: usize = 64 << 10;
const ROUNDS: usize = 10;
/// Bytes of a token in one plane of one layer.
const TOKEN_BYTES: usize = 8 * 128 * 2;

/// How the loads of a round are scheduled.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// No load: the prefixes are in place.
    InPlace,
    /// By the transfer queue.
    Queue,
    /// A few layers of every hit in turn, and the compute in the same order.
    InTurns,
}

struct Bed {
    device: Arc<CudaDevice>,
    queue: TransferQueue,
    llama: Llama,
    pages: Pages,
    tables: Vec<PageTable>,
    slots: Vec<Vec<Slot>>,
    results: Memory,
}

/// One round, in seconds from the arrival.
struct Round {
    begun: Instant,
    ended: Instant,
    /// By hit.
    ttft: Vec<f64>,
    loaded: f64,
}

pub(crate) fn hits_at_once() {
    let Some(bed) = Bed::new() else {
        println!("SKIPPED: no cuBLAS on this machine");
        return;
    };
    let ceiling = Ceiling::new(1 << 30);
    let stop = AtomicBool::new(false);
    let (tell_quiet, hear_quiet) = mpsc::channel();
    thread::scope(|scope| {
        let stop = &stop;
        let decoder = scope.spawn(move || decode_until(stop, &tell_quiet));
        let quiet: f64 = hear_quiet.recv().expect("it decodes");
        println!(
            "eight hits at once; decode step, ms: quiet {:.2}",
            quiet * 1e3
        );
        let before = ceiling.up();
        let in_place = bed.rounds(Order::InPlace, None);
        let expected = bed.results();
        let queued = bed.rounds(Order::Queue, Some(&expected));
        let in_turns = bed.rounds(Order::InTurns, None);
        let link = (before + ceiling.up()) / 2.0;
        stop.store(true, Ordering::Relaxed);
        let steps = decoder.join().expect("no panic");
        let bytes = (HITS * TOKENS * LAYERS * 2 * TOKEN_BYTES) as f64;
        let names = ["prefixes in place", "loads by the queue", "loads in turns"];
        for (name, rounds) in names.into_iter().zip([&in_place, &queued, &in_turns]) {
            let mut all: Vec<f64> = rounds
                .iter()
                .flat_map(|round| &round.ttft)
                .copied()
                .collect();
            let p50 = median(&mut all) * 1e3;
            let p99 = all[(all.len() * 99).div_ceil(100) - 1] * 1e3;
            let mut longest: Vec<f64> = rounds.iter().map(|round| round.longest(&steps)).collect();
            let mut middle: Vec<f64> = rounds.iter().map(|round| round.middle(&steps)).collect();
            let mut rates: Vec<f64> = rounds
                .iter()
                .map(|round| bytes / round.loaded / 1e9)
                .collect();
            let (longest, middle) = (median(&mut longest) / quiet, median(&mut middle) / quiet);
            let rate = median(&mut rates);
            println!(
                "  {name}: TTFT P50 {p50:.1} ms, P99 {p99:.1} ms; decode step x {middle:.3}, longest x \
                 {longest:.3}; loads {rate:.2} of {link:.2} GB/s"
            );
            if name == names[1] {
                figure("hits_ttft_p50", p50, "ms", Goal::None);
                figure("hits_ttft_p99", p99, "ms", Goal::None);
                let share = rate / link;
                figure("hits_rate", share, "of the link", Goal::AtLeast(0.85));
                figure(
                    "hits_decode",
                    longest,
                    "x the quiet step, the longest",
                    Goal::None,
                );
            }
        }
        let turn = |hit: usize| (hit + 1) as f64 * bytes / HITS as f64 / link / 1e6;
        println!(
            "  one after the other at the link's own rate they would have arrived after {:.1} (the fifth) \
             and {:.1} ms (the last)",
            turn(HITS / 2),
            turn(HITS - 1)
        );
    });
}

/// Decodes until told to stop: says what a quiet step takes, in seconds, and returns when each step
/// began and what it took.
fn decode_until(stop: &AtomicBool, quiet: &mpsc::Sender<f64>) -> Vec<(Instant, f64)> {
    cuda::enter();
    let llama = Llama::new(DECODE_ROWS, 8).expect("there was cuBLAS a moment ago");
    let (host, device) = (cuda::pinned(STEP_INPUT), Memory::new(STEP_INPUT));
    let step = || {
        let start = Instant::now();
        // SAFETY: both sides are of that size and live on.
        unsafe { llama.stream.copy(device.address, host, STEP_INPUT) };
        for layer in 0..LAYERS {
            llama.products(layer, DECODE_ROWS);
        }
        llama.stream.synchronize();
        (start, start.elapsed().as_secs_f64())
    };
    let mut steps: Vec<f64> = (0..120).map(|_| step().1).skip(20).collect();
    quiet.send(median(&mut steps)).expect("somebody listens");
    let mut steps = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        steps.push(step());
    }
    steps
}

impl Round {
    /// What steps took that ran within the round.
    fn steps(&self, steps: &[(Instant, f64)]) -> Vec<f64> {
        let within = steps
            .iter()
            .filter(|(at, _)| *at >= self.begun && *at < self.ended);
        within.map(|&(_, took)| took).collect()
    }

    fn longest(&self, steps: &[(Instant, f64)]) -> f64 {
        self.steps(steps).into_iter().fold(0.0, f64::max)
    }

    fn middle(&self, steps: &[(Instant, f64)]) -> f64 {
        median(&mut self.steps(steps))
    }
}

impl Bed {
    fn new() -> Option<Bed> {
        let llama = Llama::new(ROWS, TOKENS + ROWS)?;
        let geometry = KvGeometry::gqa(LAYERS as u32, 8, 128, Dtype::Bf16, 16).expect("valid");
        let blocks = TOKENS / 16;
        let arena = open_arena(&geometry, HITS * blocks + 64);
        let device = Arc::new(CudaDevice::open(0).expect("there was one a moment ago"));
        device.attach(&arena).expect("pinned");
        let each = (TOKENS + ROWS) / PAGE;
        let pages = Pages::new(&geometry, PAGE as u32, (HITS * each) as u32);
        llama.fill(pages.memory.address, pages.memory.bytes / 2, 5, 65536);
        let table = |hit: usize| {
            let first = (hit * each) as u32;
            pages.table(
                (first..first + (TOKENS / PAGE) as u32)
                    .map(PageId)
                    .collect(),
            )
        };
        let tables: Vec<PageTable> = (0..HITS).map(table).collect();
        let slots = tables
            .iter()
            .map(|table| save(&device, &arena, table, blocks as u32));
        let slots = slots.collect();
        let limits = QueueLimits {
            jobs: 64,
            fence_timeout: Duration::from_secs(30),
        };
        let clock = Arc::new(SystemClock::default());
        Some(Bed {
            queue: TransferQueue::spawn(device.clone(), clock, limits).expect("threads"),
            device,
            llama,
            pages,
            tables,
            slots,
            results: Memory::new(HITS * Llama::result_bytes(ROWS)),
        })
    }

    fn kv(&self, hit: usize, layer: usize) -> LayerKv {
        let at = (hit * (TOKENS + ROWS) * TOKEN_BYTES) as u64;
        let layer = LayerId(layer as u32);
        LayerKv {
            keys: self.pages.kv.base(0, layer) + at,
            values: self.pages.kv.base(1, layer) + at,
        }
    }

    fn results(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.results.bytes];
        self.results.read(0, &mut bytes);
        bytes
    }

    fn rounds(&self, order: Order, expected: Option<&[u8]>) -> Vec<Round> {
        let round = |_| {
            if order != Order::InPlace {
                self.pages.memory.fill(0x7f);
            }
            thread::sleep(Duration::from_millis(30));
            let round = self.round(order);
            if let Some(expected) = expected {
                assert!(self.results() == expected, "other activations with a load");
            }
            round
        };
        // The first one makes what later ones use again.
        (0..=ROUNDS).map(round).skip(1).collect()
    }

    fn round(&self, order: Order) -> Round {
        let (senders, fences): (Vec<_>, Vec<_>) = (0..HITS).map(|_| mpsc::channel()).unzip();
        let (finish, finished) = mpsc::channel::<(usize, Fence)>();
        let begun = Instant::now();
        thread::scope(|scope| {
            let (queue, device) = (&self.queue, &self.device);
            let (slots, tables) = (&self.slots, &self.tables);
            let loader = scope.spawn(move || {
                match order {
                    Order::InPlace => {}
                    Order::Queue => through(queue, slots, tables, senders),
                    Order::InTurns => in_turns(device, slots, tables, &senders),
                }
                begun.elapsed().as_secs_f64()
            });
            let watcher = scope.spawn(move || {
                let mut ttft = vec![0.0; HITS];
                for (hit, fence) in finished {
                    let reached = fence.point().wait(Duration::from_secs(30));
                    assert!(reached.expect("a sound GPU"));
                    ttft[hit] = begun.elapsed().as_secs_f64();
                }
                ttft
            });
            let stream = Stream(self.llama.stream.0);
            let compute = |hit: usize, layer: usize| {
                if layer == 0 {
                    self.llama.begin(ROWS, 0);
                }
                if order != Order::InPlace {
                    let fence: Fence = fences[hit].recv().expect("every layer comes");
                    device.order(stream, &fence).expect("a sound GPU");
                }
                self.llama.layer(layer, ROWS, TOKENS, self.kv(hit, layer));
                if layer == LAYERS - 1 {
                    let at = hit * Llama::result_bytes(ROWS);
                    self.llama.keep(ROWS, &self.results, at);
                    let end = device.record(stream).expect("a sound GPU");
                    finish.send((hit, end)).expect("it watches");
                }
            };
            match order {
                // All in one batch, so to say; they share their activations, which are then nobody's.
                Order::InTurns => (0..LAYERS * HITS).for_each(|i| compute(i % HITS, i / HITS)),
                _ => (0..LAYERS * HITS).for_each(|i| compute(i / LAYERS, i % LAYERS)),
            }
            drop(finish);
            let loaded = loader.join().expect("no panic");
            let ttft = watcher.join().expect("no panic");
            Round {
                begun,
                ended: Instant::now(),
                ttft,
                loaded,
            }
        })
    }
}

/// Hands all loads to the queue at once, and returns when the last one is done.
pub(crate) fn through(
    queue: &TransferQueue,
    slots: &[Vec<Slot>],
    tables: &[PageTable],
    fences: Vec<mpsc::Sender<Fence>>,
) {
    let (done, wait) = mpsc::channel();
    for ((slots, table), fences) in slots.iter().zip(tables).zip(fences) {
        let moves = slots.iter().enumerate();
        let moves = moves.map(|(index, slot)| SlabMove::Load {
            slot: slot.clone(),
            token: index as u32 * 16,
        });
        let done = done.clone();
        let job = Job {
            direction: Direction::Load,
            layers: 0..LAYERS as u32,
            table: table.clone(),
            moves: moves.collect(),
            urgency: Urgency::Demand,
            from_token: 0,
            encoded: None,
            after: Vec::new(),
            begin_by: None,
            events: Box::new(move |event| match event {
                JobEvent::Begun => {}
                JobEvent::Layer { fence, .. } => fences.send(fence).expect("it computes"),
                JobEvent::Failed { error, .. } => panic!("{error}"),
                JobEvent::Done { settled } => done.send(settled).expect("somebody waits"),
            }),
            cancelled: Arc::default(),
        };
        queue.submit(job).expect("room");
    }
    drop(done);
    assert_eq!(wait.iter().filter(|&settled| settled).count(), slots.len());
}

fn in_turns(
    device: &CudaDevice,
    slots: &[Vec<Slot>],
    tables: &[PageTable],
    fences: &[mpsc::Sender<Fence>],
) {
    let transfers = slots.iter().zip(tables);
    let transfers: Vec<Transfer> = transfers
        .map(|(slots, table)| load_transfer(slots, table))
        .collect();
    let mut last = None;
    let mut first = 0;
    while first < LAYERS as u32 {
        let end = (LAYERS as u32).min(first + device.layers_at_once(&transfers[0], first));
        for (transfer, fences) in transfers.iter().zip(fences) {
            for submitted in device
                .submit_layers(transfer, first..end, &[])
                .expect("a sound GPU")
            {
                fences.send(submitted.fence.clone()).expect("it computes");
                last = Some(submitted.fence);
            }
        }
        first = end;
    }
    let last = last.expect("there are layers");
    let reached = last.point().wait(Duration::from_secs(30));
    assert!(reached.expect("a sound GPU"));
}
