//! Loads and saves beside compute: decode steps, prefill products, and a load hidden behind a prefill.

mod products;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use stemkv_store::device::{Calibration, CudaDevice};
use stemkv_store::*;

use crate::cuda::{self, Event, Memory};
use crate::link::Ceiling;
use crate::llama::{LAYERS, LayerKv, Llama};
use crate::report::{Goal, figure, figure_of, median};
use crate::store::{
    Pages, Random, encoded_save, execute, load_transfer, open_arena, rate, save, save_transfer,
    submit_in,
};

const PREFIX: usize = 32 << 10;
const PAGE: usize = 16;
const ROWS_MAX: usize = 512;
const DECODE_ROWS: usize = 8;
/// Tokens of a prefill's step that are saved when it is done.
const CHUNK_TOKENS: usize = 512;
/// GB/s at which a prefill makes KV, at most.
const KV_RATE: f64 = 4.8;
const ROUNDS: usize = 5;

pub(crate) struct Bed {
    llama: Llama,
    arena: HostArena,
    pages: Pages,
    slots: Vec<Slot>,
    in_order: PageTable,
    shuffled: PageTable,
    /// What each decode step copies to the GPU for itself.
    step_input: (u64, Memory),
}

const STEP_INPUT: usize = 64 << 10;
/// Decode steps that are launched ahead.
const STEPS_AHEAD: usize = 3;

pub(crate) fn beside_compute(decode: bool, ttft: bool, variants: bool) {
    let Some(llama) = Llama::new(ROWS_MAX, PREFIX + ROWS_MAX) else {
        println!("SKIPPED: no cuBLAS on this machine");
        return;
    };
    let geometry = KvGeometry::gqa(LAYERS as u32, 8, 128, Dtype::Bf16, 16).expect("valid");
    let blocks = PREFIX / 16;
    let count = (PREFIX + ROWS_MAX) / PAGE;
    let arena = open_arena(&geometry, 2 * blocks + 64);
    let device = CudaDevice::open(0).expect("there was one a moment ago");
    device.attach(&arena).expect("pinned");
    let calibration = device.calibration().expect("attached");
    let pages = Pages::new(&geometry, PAGE as u32, count as u32);
    llama.fill(pages.memory.address, pages.memory.bytes / 2, 5, 65536);
    let mut bed = Bed::new(&device, llama, arena, pages);
    let kv = bed.layer_kv(0);
    bed.llama.check_fused(ROWS_MAX, PREFIX, kv);
    bed.llama.start(ROWS_MAX);
    let ceiling = Ceiling::new(1 << 30);
    if decode {
        bed.decode_figures(&device, &ceiling);
    }
    if ttft {
        let torch = std::env::var("TORCH_512_MS").ok();
        let torch: Option<f64> = torch.and_then(|ms| ms.parse().ok());
        let goals = [
            (64, Goal::AtMost(30.0), Goal::AtMost(86.0)),
            (
                512,
                torch.map_or(Goal::None, |ms| Goal::AtMost(1.1 * ms)),
                Goal::None,
            ),
        ];
        let unsummed = Calibration {
            sums: false,
            ..calibration.clone()
        };
        let unsummed = CudaDevice::with_calibration(0, unsummed).expect("there is a GPU");
        unsummed.attach(&bed.arena).expect("pinned");
        for (rows, compute_goal, goal) in goals {
            let (alone, expected) = bed.compute_alone(&device, rows);
            figure(&format!("compute_{rows}"), alone * 1e3, "ms", compute_goal);
            let default = |transfer: &Transfer, first| device.layers_at_once(transfer, first);
            let ttft = bed.ttft(&device, rows, (alone, &expected), &default, true);
            figure(&format!("ttft_{rows}_ms"), ttft * 1e3, "ms", goal);
            println!("  without sums:");
            bed.ttft(&unsummed, rows, (alone, &expected), &default, false);
            for group in [1, 2, 4] {
                println!("  {group} layers at once:");
                bed.ttft(&device, rows, (alone, &expected), &|_, _| group, false);
            }
        }
    }
    drop(device);
    if variants {
        bed.variants(&calibration, &ceiling);
    }
}

/// The same with real values (`fill` puts them into the pages) in slots that hold encoded slabs, as
/// `encode` makes them.
pub(crate) fn encoded_beside_compute(
    fill: impl Fn(&Pages),
    encode: impl Fn(&HostArena, &[Slot]) -> Vec<Slot>,
) {
    let Some(llama) = Llama::new(ROWS_MAX, PREFIX + ROWS_MAX) else {
        println!("SKIPPED: no cuBLAS on this machine");
        return;
    };
    let geometry = KvGeometry::gqa(LAYERS as u32, 8, 128, Dtype::Bf16, 16).expect("valid");
    let arena = open_arena(&geometry, 3 * (PREFIX / 16) + 64);
    let device = CudaDevice::open(0).expect("there was one a moment ago");
    device.attach(&arena).expect("pinned");
    let count = (PREFIX + ROWS_MAX) / PAGE;
    let pages = Pages::new(&geometry, PAGE as u32, count as u32);
    fill(&pages);
    let mut bed = Bed::new(&device, llama, arena, pages);
    bed.slots = encode(&bed.arena, &bed.slots);
    let kv = bed.layer_kv(0);
    bed.llama.check_fused(ROWS_MAX, PREFIX, kv);
    bed.llama.start(ROWS_MAX);
    let (slots, table, arena) = (&bed.slots, &bed.shuffled, &bed.arena);
    let load = || moved(&device, &load_transfer(slots, table));
    let save = || {
        let (transfer, _fillings) = encoded_save(arena, table, (PREFIX / 16) as u32);
        moved(&device, &transfer)
    };
    let loads: (&str, &(dyn Fn() -> f64 + Sync)) = ("load", &load);
    let saves: (&str, &(dyn Fn() -> f64 + Sync)) = ("save", &save);
    bed.prefill(5);
    bed.decode(20);
    let ceiling = Ceiling::new(1 << 30);
    let slices = || ceiling.slices(16 << 20);
    for (name, move_once) in [loads, saves] {
        // A GPU that gets warm gets slow, and what bare copies cost differs from one minute to the next: in
        // turns, each beside the quiet time right before and after.
        let (mut bare, mut own, mut rates) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let times = |move_once: &(dyn Fn() -> f64 + Sync)| {
                let before = median(&mut bed.prefill(10));
                let (mut passes, rate) = bed.beside(move_once, || bed.prefill(15));
                let quiet = (before + median(&mut bed.prefill(10))) / 2.0;
                (median(&mut passes) / quiet, rate)
            };
            bare.push(times(&slices).0);
            let (times, rate) = times(move_once);
            own.push(times);
            rates.push(rate);
        }
        println!(
            "  products beside an encoded {name} at {:.2} GB/s: {own:.3?}; beside bare slices up {bare:.3?}, median {:.3}",
            median(&mut rates),
            median(&mut bare)
        );
        figure_of(
            "link",
            &format!("gemm_under_{name}"),
            median(&mut own),
            "x the quiet time",
            Goal::AtMost(1.10),
        );
        let mut quiet = bed.decode(100);
        let quiet_step = median(&mut quiet);
        let (mut steps, rate) = bed.beside(move_once, || bed.decode(100));
        let middle = median(&mut steps);
        println!(
            "  decode beside an encoded {name} at {rate:.2} GB/s: median {:.3} x, longest two {:.3} {:.3}; beside \
             nothing {:.3} {:.3}",
            middle / quiet_step,
            steps[98] / quiet_step,
            steps[99] / quiet_step,
            quiet[98] / quiet_step,
            quiet[99] / quiet_step
        );
        figure_of(
            "link",
            &format!("decode_under_{name}"),
            steps[99] / quiet_step,
            "x the quiet step",
            Goal::AtMost(1.3),
        );
    }
    // What was loaded is in the shuffled pages: bring it to where the attention looks.
    fill(&bed.pages);
    let (alone, expected) = bed.compute_in_place(64);
    let at_once = |transfer: &Transfer, first| device.layers_at_once(transfer, first);
    let ttft = bed.ttft(&device, 64, (alone, &expected), &at_once, false);
    figure_of("link", "ttft_64", ttft * 1e3, "ms", Goal::AtMost(65.0));
}

impl Bed {
    fn new(device: &CudaDevice, llama: Llama, arena: HostArena, pages: Pages) -> Bed {
        let mut ids: Vec<PageId> = (0..(PREFIX / PAGE) as u32).map(PageId).collect();
        let in_order = pages.table(ids.clone());
        Random(3).shuffle(&mut ids);
        let shuffled = pages.table(ids);
        Bed {
            slots: save(device, &arena, &in_order, (PREFIX / 16) as u32),
            llama,
            arena,
            pages,
            in_order,
            shuffled,
            step_input: (cuda::pinned(STEP_INPUT), Memory::new(STEP_INPUT)),
        }
    }

    fn load(&self) -> Transfer {
        load_transfer(&self.slots, &self.shuffled)
    }

    /// Seconds of each decode step, on the GPU. Steps are launched a few ahead, so that a host thread that is
    /// held up for a while does not count.
    fn decode(&self, steps: usize) -> Vec<f64> {
        let stream = self.llama.stream;
        let ends: Vec<Event> = (0..=steps).map(|_| Event::new()).collect();
        ends[0].record(stream);
        for step in 1..=steps {
            let (host, device) = &self.step_input;
            // SAFETY: both sides are of that size and live on.
            unsafe { stream.copy(device.address, *host, STEP_INPUT) };
            for layer in 0..LAYERS {
                self.llama.products(layer, DECODE_ROWS);
            }
            ends[step].record(stream);
            ends[step.saturating_sub(STEPS_AHEAD)].synchronize();
        }
        stream.synchronize();
        ends.windows(2)
            .map(|step| step[1].seconds_since(&step[0]))
            .collect()
    }

    /// Seconds of each pass over a prefill's products.
    fn prefill(&self, passes: usize) -> Vec<f64> {
        (0..passes)
            .map(|_| {
                let start = Instant::now();
                for layer in 0..LAYERS {
                    self.llama.products(layer, ROWS_MAX);
                }
                self.llama.stream.synchronize();
                start.elapsed().as_secs_f64()
            })
            .collect()
    }

    /// Runs `compute` while `move_once` moves bytes again and again; its answer and the median GB/s.
    fn beside<R>(
        &self,
        move_once: impl Fn() -> f64 + Sync,
        compute: impl FnOnce() -> R,
    ) -> (R, f64) {
        let stop = AtomicBool::new(false);
        let (begun, wait) = mpsc::channel();
        thread::scope(|scope| {
            let (stop, move_once) = (&stop, &move_once);
            let mover = scope.spawn(move || {
                cuda::enter();
                let mut rates = Vec::new();
                while !stop.load(Ordering::Relaxed) || rates.is_empty() {
                    let _ = begun.send(());
                    rates.push(move_once());
                }
                median(&mut rates)
            });
            wait.recv().expect("it begins");
            let answer = compute();
            stop.store(true, Ordering::Relaxed);
            (answer, mover.join().expect("no panic"))
        })
    }

    fn decode_figures(&self, device: &CudaDevice, ceiling: &Ceiling) {
        self.decode(20);
        let mut quiet = self.decode(100);
        let quiet = median(&mut quiet);
        println!("decode step, ms: quiet {:.2}", quiet * 1e3);
        let steps_beside = |name: &str, count: usize, move_once: &(dyn Fn() -> f64 + Sync)| {
            let (mut steps, rate) = self.beside(move_once, || self.decode(count));
            let middle = median(&mut steps);
            println!(
                "  beside {name}: {:.2} = {:.3} x, longest five {:.2?}; {rate:.2} GB/s",
                middle * 1e3,
                middle / quiet,
                steps[count - 5..]
                    .iter()
                    .map(|step| step * 1e3)
                    .collect::<Vec<_>>()
            );
            (middle / quiet, steps[count - 1] / quiet, rate)
        };
        // Not `self`, which stays with the thread that computes.
        let (slots, table, arena) = (&self.slots, &self.shuffled, &self.arena);
        let load = || moved(device, &load_transfer(slots, table));
        steps_beside("copies of 1 GiB", 40, &|| ceiling.once_up());
        // A single long step may be the machine's: rounds, and what happens without a load between.
        let (mut longest, mut shares) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let bare = self.decode(100).into_iter().fold(0.0, f64::max);
            println!("  without anything: longest {:.2}", bare * 1e3);
            steps_beside("bare slices of 16 MiB", 60, &|| ceiling.slices(16 << 20));
            let (share, _, _) = ceiling.beside(true, || {
                let (_, most, rate) = steps_beside("loads", 100, &load);
                longest.push(most);
                rate
            });
            shares.push(share);
        }
        println!("  longest beside loads in each round, x quiet: {longest:.3?}");
        figure(
            "decode_under_load",
            median(&mut longest),
            "x the quiet step",
            Goal::AtMost(1.3),
        );
        figure(
            "decode_under_load_worst",
            longest[ROUNDS - 1],
            "x the quiet step",
            Goal::AtMost(1.3),
        );
        figure(
            "decode_under_load_rate",
            median(&mut shares),
            "of the link",
            Goal::AtLeast(0.85),
        );
        let blocks = (PREFIX / 16) as u32;
        let save = || {
            let (transfer, _fillings) = save_transfer(arena, table, blocks);
            moved(device, &transfer)
        };
        steps_beside("saves at full speed", 150, &save);
        let chunk = (CHUNK_TOKENS / 16) as u32;
        let paced = || {
            let start = Instant::now();
            let (transfer, _fillings) = save_transfer(arena, table, chunk);
            moved(device, &transfer);
            let bytes = (transfer.plan().bytes() * LAYERS as u64) as f64;
            let due = Duration::from_secs_f64(bytes / KV_RATE / 1e9);
            thread::sleep(due.saturating_sub(start.elapsed()));
            bytes / start.elapsed().as_nanos() as f64
        };
        let (middle, _, _) = steps_beside("saves as a prefill makes KV", 300, &paced);
        figure(
            "save_interference_decode",
            middle,
            "x the quiet step",
            Goal::AtMost(1.03),
        );

        self.products_figures(ceiling, &load, &save);
        let (quiet, beside, rate) = self.prefill_and_save(device);
        println!(
            "  each layer saved when it is computed: {:.2} = {:.3} x {:.2}; {rate:.2} GB/s",
            beside * 1e3,
            beside / quiet,
            quiet * 1e3
        );
        figure(
            "save_interference_prefill",
            beside / quiet,
            "x the quiet time",
            Goal::AtMost(1.03),
        );
    }

    fn layer_kv(&self, layer: usize) -> LayerKv {
        LayerKv {
            keys: self.pages.kv.base(0, LayerId(layer as u32)),
            values: self.pages.kv.base(1, LayerId(layer as u32)),
        }
    }

    /// Seconds of the suffix alone, its prefix in place, and the activations that it ends with.
    fn compute_alone(&self, device: &CudaDevice, rows: usize) -> (f64, Vec<u8>) {
        self.llama.fill(
            self.pages.memory.address,
            self.pages.memory.bytes / 2,
            5,
            65536,
        );
        let saved = save(device, &self.arena, &self.in_order, (PREFIX / 16) as u32);
        let same = |slots: &[Slot]| slots[0].slab(LayerId(0)).map(|slab| slab.checksum);
        assert_eq!(
            same(&saved),
            same(&self.slots),
            "the prefix is what was saved"
        );
        self.compute_in_place(rows)
    }

    /// The same where the prefix is in its pages already.
    fn compute_in_place(&self, rows: usize) -> (f64, Vec<u8>) {
        let compute = || {
            self.llama.start(rows);
            let start = Instant::now();
            for layer in 0..LAYERS {
                self.llama.layer(layer, rows, PREFIX, self.layer_kv(layer));
            }
            self.llama.stream.synchronize();
            start.elapsed().as_secs_f64()
        };
        let mut alone: Vec<f64> = (0..7).map(|_| compute()).skip(1).collect();
        (median(&mut alone), self.llama.result(rows))
    }

    /// A prefix is loaded layer by layer while a suffix of `rows` tokens is computed; seconds. `alone`
    /// is what the compute takes by itself and ends with, `at_once` how many layers are submitted
    /// together from each on.
    fn ttft(
        &self,
        device: &CudaDevice,
        rows: usize,
        alone: (f64, &[u8]),
        at_once: &(dyn Fn(&Transfer, u32) -> u32 + Sync),
        is_figure: bool,
    ) -> f64 {
        let (alone, expected) = alone;
        let (slots, table) = (&self.slots, &self.in_order);
        let make = || load_transfer(slots, table);
        let bytes = (make().plan().bytes() * LAYERS as u64) as f64;
        let repeats = if is_figure { 8 } else { 4 };
        let load = bytes / rate(device, &make, repeats - 1) / 1e9;
        let mut times = Vec::new();
        let mut first = Vec::new();
        for _ in 0..repeats {
            self.pages.memory.fill(0x7f);
            self.llama.start(rows);
            cuda::synchronize();
            let (fences, arrivals) = mpsc::channel::<Fence>();
            let start = Instant::now();
            thread::scope(|scope| {
                let loader = scope.spawn(|| {
                    let transfer = make();
                    let mut sums = Vec::new();
                    submit_in(
                        device,
                        &transfer,
                        |first| at_once(&transfer, first),
                        |submitted| {
                            fences.send(submitted.fence).expect("somebody waits");
                            sums.push(submitted.sums);
                        },
                    );
                    sums
                });
                for layer in 0..LAYERS {
                    let fence = arrivals.recv().expect("every layer comes");
                    if layer == 0 {
                        first.push(start.elapsed().as_secs_f64());
                    }
                    device
                        .order(Stream(self.llama.stream.0), &fence)
                        .expect("a sound GPU");
                    self.llama.layer(layer, rows, PREFIX, self.layer_kv(layer));
                }
                self.llama.stream.synchronize();
                times.push(start.elapsed().as_secs_f64());
                for sums in loader.join().expect("no panic") {
                    if let SlabSums::Compared(ask) = sums {
                        assert_eq!(ask().expect("a sound GPU"), None, "a slab's sum differs");
                    }
                }
            });
            assert!(
                self.llama.result(rows) == expected,
                "other activations with a load"
            );
            thread::sleep(Duration::from_millis(5));
        }
        let ttft = median(&mut times);
        let bound = alone.max(load) + load / LAYERS as f64;
        println!(
            "  {rows} new tokens behind {PREFIX}, ms: compute alone {:.2}, load alone {:.2}, first layer \
             submitted after {:.2}, TTFT {:.2} = {:.3} x (best {:.2}, worst {:.2}); activations equal to the bit",
            alone * 1e3,
            load * 1e3,
            median(&mut first) * 1e3,
            ttft * 1e3,
            ttft / bound,
            times[0] * 1e3,
            times[times.len() - 1] * 1e3
        );
        if is_figure {
            figure(
                &format!("ttft_{rows}"),
                ttft / bound,
                "x (the longer + the first layer's load)",
                Goal::AtMost(1.05),
            );
        }
        ttft
    }

    fn variants(&self, measured: &Calibration, ceiling: &Ceiling) {
        let up = ceiling.up();
        println!("ceiling {up:.2} GB/s");
        println!(
            "variants: ahead, slice MiB, blocks; load alone GB/s; decode longest, 2nd and \
             median x, load beside it GB/s; products x (settled), load beside them; decode beside saves x, save GB/s"
        );
        for (ahead, slice, blocks) in [
            (3, 4, 256),
            (3, 8, 256),
            (3, 16, 128),
            (3, 16, 256),
            (3, 32, 512),
            (3, 64, 1024),
            (2, 16, 256),
        ] {
            let calibration = Calibration {
                ahead,
                slice_bytes: slice << 20,
                staging_blocks: blocks,
                ..measured.clone()
            };
            let device = CudaDevice::with_calibration(0, calibration).expect("there is a GPU");
            device.attach(&self.arena).expect("pinned");
            let alone = rate(&device, &|| self.load(), 5);
            let (slots, table, arena) = (&self.slots, &self.shuffled, &self.arena);
            let load = || moved(&device, &load_transfer(slots, table));
            let save = || {
                let (transfer, _fillings) = save_transfer(arena, table, (PREFIX / 16) as u32);
                moved(&device, &transfer)
            };
            // Right before: a GPU that gets warm gets slow.
            let quiet = median(&mut self.decode(60));
            let (mut steps, beside) = self.beside(load, || self.decode(100));
            let middle = median(&mut steps);
            let (products, beside_products) = self.settled_products(&load);
            let (mut saved, save_rate) = self.beside(save, || self.decode(100));
            println!(
                "  {ahead} {slice:>2} {blocks:>3}; {alone:.2}; {:.3} {:.3} {:.3}, {beside:.2} ({:.3}); \
                 {:.3}, {beside_products:.2}; {:.3}, {save_rate:.2}",
                steps[99] / quiet,
                steps[98] / quiet,
                middle / quiet,
                beside / up,
                products,
                median(&mut saved) / quiet
            );
        }
    }
}

/// GB/s of a whole transfer.
fn moved(device: &CudaDevice, transfer: &Transfer) -> f64 {
    let layers = u64::from(transfer.table().kv.geometry().layers);
    let bytes = (transfer.plan().bytes() * layers) as f64;
    bytes / execute(device, transfer).as_nanos() as f64
}
