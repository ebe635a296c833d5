//! Loads and saves at once, through the transfer queue, beside contiguous copies both ways at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use stemkv_store::device::CudaDevice;
use stemkv_store::transfer::QueueLimits;
use stemkv_store::*;

use crate::cuda;
use crate::link::Ceiling;
use crate::report::{Goal, figure, median};
use crate::store::{Pages, Random, open_arena, save};

const LAYERS: u32 = 32;
const TOKENS: u32 = 16 << 10;
const BLOCKS: usize = (TOKENS / 16) as usize;
const WINDOW: Duration = Duration::from_millis(500);
const ROUNDS: usize = 3;
/// Jobs of a direction that are handed over ahead.
const AHEAD: usize = 2;

pub(crate) fn both_ways() {
    let geometry = KvGeometry::gqa(LAYERS, 8, 128, Dtype::Bf16, 16).expect("valid");
    let arena = open_arena(&geometry, (2 + AHEAD) * BLOCKS);
    let device = Arc::new(CudaDevice::open(0).expect("there was one a moment ago"));
    device.attach(&arena).expect("pinned");
    let mut random = Random(7);
    let pages = || Pages::new(&geometry, 16, TOKENS / 16);
    let [loaded, saved] = [pages(), pages()];
    let mut table = |pages: &Pages| {
        let mut ids: Vec<PageId> = (0..TOKENS / 16).map(PageId).collect();
        random.shuffle(&mut ids);
        pages.table(ids)
    };
    let (loaded_table, saved_table) = (table(&loaded), table(&saved));
    saved.memory.fill(0x33);
    let slots = save(&device, &arena, &saved_table, BLOCKS as u32);
    let clock = Arc::new(SystemClock::default());
    let limits = QueueLimits {
        jobs: 64,
        fence_timeout: Duration::from_secs(30),
    };
    let queue = TransferQueue::spawn(device.clone(), clock, limits).expect("threads");
    let load = || {
        let moves = slots.iter().enumerate();
        let moves = moves.map(|(index, slot)| SlabMove::Load {
            slot: slot.clone(),
            token: index as u32 * 16,
        });
        (moves.collect(), Vec::new())
    };
    let save = || {
        let fillings = arena
            .allocate(geometry.payload_bytes(), BLOCKS)
            .expect("room");
        let moves = fillings.iter().enumerate();
        let moves = moves.map(|(index, filling)| SlabMove::Save {
            slot: filling.writer(),
            token: index as u32 * 16,
        });
        (moves.collect(), fillings)
    };
    let ups = |stop: &AtomicBool| keep_busy(&queue, Direction::Load, &loaded_table, &load, stop);
    let downs = |stop: &AtomicBool| keep_busy(&queue, Direction::Save, &saved_table, &save, stop);
    let (up, down) = (Ceiling::new(1 << 30), Ceiling::new(1 << 30));
    let copies_up = |stop: &AtomicBool| copies(stop, || up.once_up());
    let copies_down = |stop: &AtomicBool| copies(stop, || down.once_down());
    let mut shares = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        let bare = together(&copies_up, &copies_down);
        let ours = together(&ups, &downs);
        let alone = [alone(&ups), alone(&downs)];
        println!(
            "  both ways at once, up / down GB/s: copies {:.1} / {:.1}, loads and saves {:.1} / {:.1}; \
             one after the other {:.1} / {:.1}",
            bare[0], bare[1], ours[0], ours[1], alone[0], alone[1]
        );
        for (shares, (ours, bare)) in shares.iter_mut().zip(ours.iter().zip(bare)) {
            shares.push(ours / bare);
        }
    }
    let [mut loads, mut saves] = shares;
    let unit = "of copies both ways at once";
    figure("duplex_load", median(&mut loads), unit, Goal::AtLeast(0.9));
    figure("duplex_save", median(&mut saves), unit, Goal::AtLeast(0.9));
}

type Busy<'a> = &'a (dyn Fn(&AtomicBool) -> f64 + Sync);

fn alone(busy: Busy<'_>) -> f64 {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let busy = scope.spawn(|| {
            cuda::enter();
            busy(&stop)
        });
        thread::sleep(WINDOW);
        stop.store(true, Ordering::Relaxed);
        busy.join().expect("no panic")
    })
}

/// GB/s of each while both are busy.
fn together(up: Busy<'_>, down: Busy<'_>) -> [f64; 2] {
    thread::scope(|scope| {
        let [up, down] = [up, down].map(|busy| scope.spawn(move || alone(busy)));
        [up, down].map(|rate| rate.join().expect("no panic"))
    })
}

fn copies(stop: &AtomicBool, once: impl Fn() -> f64) -> f64 {
    let mut rates = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        rates.push(once());
    }
    // The last one may have run alone.
    rates.pop();
    median(&mut rates)
}

/// GB/s of one job behind the other, from the first one's end to the last one's that ended in time.
fn keep_busy(
    queue: &TransferQueue,
    direction: Direction,
    table: &PageTable,
    make: &(dyn Fn() -> (Vec<SlabMove>, Vec<Filling>) + Sync),
    stop: &AtomicBool,
) -> f64 {
    let (done, wait) = mpsc::channel::<Instant>();
    let mut held = std::collections::VecDeque::new();
    let submit = || {
        let (moves, fillings) = make();
        let done = done.clone();
        let job = Job {
            direction,
            layers: 0..LAYERS,
            table: table.clone(),
            moves,
            urgency: Urgency::Demand,
            from_token: 0,
            encoded: None,
            after: Vec::new(),
            begin_by: None,
            events: Box::new(move |event| match event {
                JobEvent::Begun | JobEvent::Layer { .. } => {}
                JobEvent::Failed { error, .. } => panic!("{error}"),
                JobEvent::Done { .. } => drop(done.send(Instant::now())),
            }),
            cancelled: Arc::default(),
        };
        queue.submit(job).expect("room");
        fillings
    };
    held.extend((0..AHEAD).map(|_| submit()));
    let mut ends = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        ends.push(wait.recv().expect("it ends"));
        held.pop_front();
        held.push_back(submit());
    }
    for _ in &held {
        wait.recv().expect("it ends");
    }
    let bytes = u64::from(TOKENS) * table.kv.geometry().token_bytes() as u64 * u64::from(LAYERS);
    let took = ends[ends.len() - 1] - ends[0];
    (bytes * (ends.len() as u64 - 1)) as f64 / took.as_nanos() as f64
}
