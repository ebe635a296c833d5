//! The link alone: loads and saves of every geometry, and what else needs no compute beside it.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use stemkv_store::device::{Calibration, CudaDevice};
use stemkv_store::*;

use crate::cuda::{self, Memory, Stream};
use crate::report::{Goal, figure, median};
use crate::store::{
    Model, Pages, Random, execute, load_transfer, models, open_arena, rate, save, save_transfer,
    submit,
};

const REPEATS: usize = 7;

/// One contiguous copy between memory that the driver pinned and the GPU: measured right before and
/// right after what is compared with it, because the link of a virtual machine is not steady.
pub(crate) struct Ceiling {
    host: u64,
    device: Memory,
    stream: Stream,
    other: Stream,
}

impl Ceiling {
    pub(crate) fn new(bytes: usize) -> Ceiling {
        Ceiling {
            host: cuda::pinned(bytes),
            device: Memory::new(bytes),
            stream: Stream::new(),
            other: Stream::new(),
        }
    }

    pub(crate) fn up(&self) -> f64 {
        self.rate(self.device.address, self.host)
    }

    pub(crate) fn down(&self) -> f64 {
        self.rate(self.host, self.device.address)
    }

    /// GB/s, median of seven.
    fn rate(&self, to: u64, from: u64) -> f64 {
        let mut rates: Vec<f64> = (0..REPEATS).map(|_| self.once(to, from)).collect();
        median(&mut rates)
    }

    fn once(&self, to: u64, from: u64) -> f64 {
        let start = Instant::now();
        // SAFETY: both sides have as many bytes and live on.
        unsafe { self.stream.copy(to, from, self.device.bytes) };
        self.stream.synchronize();
        self.device.bytes as f64 / start.elapsed().as_nanos() as f64
    }

    /// GB/s of one copy up.
    pub(crate) fn once_up(&self) -> f64 {
        self.once(self.device.address, self.host)
    }

    /// GB/s of one copy down.
    pub(crate) fn once_down(&self) -> f64 {
        self.once(self.host, self.device.address)
    }

    /// The same bytes up in slices, each behind the one before but on another stream, a few of them
    /// put there ahead.
    pub(crate) fn slices(&self, slice: usize) -> f64 {
        let (start, others) = (Instant::now(), [self.stream, self.other]);
        for (index, offset) in (0..self.device.bytes).step_by(slice).enumerate() {
            let [now, before] = [others[index % 2], others[(index + 1) % 2]];
            now.order_behind(before);
            let bytes = slice.min(self.device.bytes - offset);
            // SAFETY: within both sides, which live on.
            unsafe {
                now.copy(
                    self.device.address + offset as u64,
                    self.host + offset as u64,
                    bytes,
                );
            }
        }
        self.stream.synchronize();
        self.other.synchronize();
        self.device.bytes as f64 / start.elapsed().as_nanos() as f64
    }

    /// `once` in turns with single copies: the medians of its share of the copies right before and after,
    /// of its rate, and of theirs.
    fn in_turns(&self, up: bool, once: impl Fn() -> f64) -> (f64, f64, f64) {
        let copy = || if up { self.once_up() } else { self.once_down() };
        let (mut shares, mut rates, mut copies) = (Vec::new(), Vec::new(), Vec::new());
        // The first turn makes what later ones use again.
        for turn in 0..=REPEATS {
            let before = copy();
            let rate = once();
            let link = (before + copy()) / 2.0;
            if turn > 0 {
                shares.push(rate / link);
                rates.push(rate);
                copies.push(link);
            }
        }
        (median(&mut shares), median(&mut rates), median(&mut copies))
    }

    /// `measure`'s rate over the mean of the ceiling before and after; all three.
    pub(crate) fn beside(&self, up: bool, measure: impl FnOnce() -> f64) -> (f64, f64, f64) {
        let ceiling = || if up { self.up() } else { self.down() };
        let before = ceiling();
        let rate = measure();
        let ceiling = (before + ceiling()) / 2.0;
        (rate / ceiling, rate, ceiling)
    }
}

pub(crate) fn loads_and_saves() {
    let ceiling = Ceiling::new(1 << 30);
    for model in models() {
        one_model(&model, &ceiling);
    }
}

fn one_model(model: &Model, ceiling: &Ceiling) {
    let geometry = &model.geometry;
    let blocks = model.tokens / geometry.block_tokens;
    let count = model.tokens / model.page_tokens;
    let arena = open_arena(geometry, 2 * blocks as usize + 64);
    let device = CudaDevice::open(0).expect("there was one a moment ago");
    let start = Instant::now();
    device.attach(&arena).expect("pinned");
    println!(
        "{}: {:.2} GiB pinned and measured in {:.2} s",
        model.name,
        arena.usage().capacity_bytes as f64 / (1 << 30) as f64,
        start.elapsed().as_secs_f64()
    );
    let calibration = device.calibration().expect("attached");
    for (name, rates) in [("load", &calibration.load), ("save", &calibration.save)] {
        let pitched: Vec<String> = rates
            .pitched
            .iter()
            .map(|(row, rate)| format!("{}K:{rate:.1}", *row as f64 / 1024.0))
            .collect();
        println!(
            "  measured {name}: contiguous {:.1}, kernel {:.1}, rows {}",
            rates.contiguous,
            rates.direct,
            pitched.join(" ")
        );
    }
    let pages = Pages::new(geometry, model.page_tokens, count);
    let mut random = Random(1);
    let mut ids: Vec<PageId> = (0..count).map(PageId).collect();
    random.shuffle(&mut ids);
    let source = pages.table(ids.clone());
    random.shuffle(&mut ids);
    let target = pages.table(ids);
    let pattern: Vec<u8> = (0..1 << 20)
        .flat_map(|_| random.next().to_le_bytes())
        .collect();
    for offset in (0..pages.memory.bytes).step_by(pattern.len()) {
        let end = pattern.len().min(pages.memory.bytes - offset);
        pages.memory.write(offset, &pattern[..end]);
    }

    // Bytes first: out of the pages and back, to the same places, over poison.
    let slots = save(&device, &arena, &source, blocks);
    pages.memory.fill(0x5a);
    execute(&device, &load_transfer(&slots, &source));
    let mut got = vec![0; pattern.len()];
    for offset in (0..pages.memory.bytes).step_by(pattern.len()) {
        let end = pattern.len().min(pages.memory.bytes - offset);
        pages.memory.read(offset, &mut got[..end]);
        assert!(
            got[..end] == pattern[..end],
            "{}: other bytes at {offset}",
            model.name
        );
    }

    let loading = |device: &CudaDevice| {
        let bytes = pages.memory.bytes as f64;
        let start = Instant::now();
        execute(device, &load_transfer(&slots, &target));
        bytes / start.elapsed().as_nanos() as f64
    };
    let (load_share, loads, up) = ceiling.in_turns(true, || loading(&device));
    let saving = || {
        let (transfer, _fillings) = save_transfer(&arena, &source, blocks);
        pages.memory.bytes as f64 / execute(&device, &transfer).as_nanos() as f64
    };
    let (save_share, saves, down) = ceiling.in_turns(false, saving);
    println!("  load {loads:.2} of {up:.2} GB/s, save {saves:.2} of {down:.2}");
    figure(
        &format!("load_{}", model.name),
        load_share,
        "of the link",
        Goal::AtLeast(model.goal),
    );
    figure(
        &format!("save_{}", model.name),
        save_share,
        "of the link",
        Goal::AtLeast(model.goal),
    );

    // What the sums cost.
    if model.name == "llama3_8b" {
        drop(device);
        let unsummed = Calibration {
            sums: false,
            ..calibration.clone()
        };
        let device = CudaDevice::with_calibration(0, unsummed).expect("there is a GPU");
        device.attach(&arena).expect("pinned");
        let (without_share, without, up) = ceiling.in_turns(true, || loading(&device));
        println!("  load without sums: {without:.2} of {up:.2} GB/s");
        println!(
            "  scatter on the GPU: {:.0} GB/s, {:.0} without sums",
            calibration.scatter_summed, calibration.scatter
        );
        figure(
            "sums_cost",
            load_share / without_share,
            "x a load without sums",
            Goal::AtLeast(0.99),
        );
    }

    // The host's own time, by the way that never waits: plan, descriptors, launches.
    if model.name == "llama3_8b" {
        let mut kernel_only = calibration.clone();
        for rates in [&mut kernel_only.load, &mut kernel_only.save] {
            rates.direct = 1e9;
        }
        let device = CudaDevice::with_calibration(0, kernel_only).expect("there is a GPU");
        device.attach(&arena).expect("pinned");
        let kernels = rate(&device, &|| load_transfer(&slots, &target), REPEATS);
        println!("  load by a kernel over pinned memory alone: {kernels:.2} GB/s");
        let mut plans = Vec::new();
        let mut submits = Vec::new();
        for _ in 0..REPEATS {
            let start = Instant::now();
            let transfer = load_transfer(&slots, &target);
            plans.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(count));
            let start = Instant::now();
            let mut fences = Vec::new();
            submit(&device, &transfer, |submitted| fences.push(submitted.fence));
            submits.push(start.elapsed().as_secs_f64() * 1e6 / f64::from(count));
            for fence in fences {
                let arrived = fence.point().wait(std::time::Duration::from_secs(30));
                assert!(arrived.expect("a sound GPU"));
            }
        }
        println!("  plan of a load: {:.3} us a page", median(&mut plans));
        figure(
            "host_time",
            median(&mut submits),
            "us a page",
            Goal::AtMost(1.0),
        );
    }
}

const KERNELS: [(&str, &str); 3] = [
    ("pages", include_str!("../../store/kernels/pages.ptx")),
    ("exp", include_str!("../../store/kernels/exp.ptx")),
    ("exp_save", include_str!("../../store/kernels/exp_save.ptx")),
];

/// How long the driver compiles the store's kernels where it never saw them; it keeps what it made for later.
pub(crate) fn open_kernels() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.expect("after 1970").as_nanos();
    let mut all = 0.0;
    for (name, ptx) in KERNELS {
        // Other text than any before.
        let fresh = format!("{ptx}// {now}\n");
        let load = || {
            let start = Instant::now();
            cuda::Kernels::load(&fresh);
            start.elapsed().as_secs_f64() * 1e3
        };
        let (first, again) = (load(), load());
        println!(
            "  {name}: {} KiB of PTX, compiled in {first:.1} ms, again {again:.1}",
            ptx.len() >> 10
        );
        all += first;
    }
    figure("open_kernels", all, "ms, the first time", Goal::None);
}

/// What needs the whole machine for a while.
pub(crate) fn others() {
    let geometry = KvGeometry::gqa(32, 8, 128, Dtype::Bf16, 16).expect("valid");
    let start = Instant::now();
    let arena = HostArena::open(&geometry, 64 << 30, |_, _| {}).expect("64 GiB of memory");
    let touched = start.elapsed();
    let device = CudaDevice::open(0).expect("there was one a moment ago");
    let start = Instant::now();
    device.attach(&arena).expect("pinned");
    let touched = touched.as_secs_f64();
    figure("open_touch", touched, "s to touch 64 GiB", Goal::None);
    figure(
        "open",
        start.elapsed().as_secs_f64(),
        "s to pin 64 GiB",
        Goal::None,
    );
}
