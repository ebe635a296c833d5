//! Whatever fails: the job ends, its slots go or are lost, others go on.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::AtomicUsize;

use super::*;

fn fails_at(number: u64, fault: SimDeviceFault, sums: bool) -> SimDevice {
    SimDevice::new(sums, move |n| (n == number).then_some(fault))
}

#[test]
fn whatever_fails_at_whichever_layer_the_job_ends_once_and_lets_its_slots_go() {
    for direction in [Direction::Load, Direction::Save] {
        for sums in [true, false] {
            for bad in 0..u64::from(LAYERS) {
                for fault in [SimDeviceFault::Submit, SimDeviceFault::Fence] {
                    let bench = Bench::new(fails_at(bad, fault, sums), 1);
                    let log = Log::new();
                    let job = match direction {
                        Direction::Load => bench.load(&bench.slots(2), &log),
                        Direction::Save => bench.save(&bench.fillings(2), &log),
                    };
                    bench.queue.submit(job).expect("room");
                    let mut expected = up_to(bad, "0: unavailable", "true");
                    if (direction, fault, sums) == (Direction::Load, SimDeviceFault::Fence, false) {
                        // Reported when it was submitted: the engine's stream waits, and learns it.
                        expected.insert(bad as usize, format!("layer {bad}"));
                    }
                    assert_eq!(log.finish(), expected, "{direction:?} {fault:?} {sums}");
                    assert!(bench.is_empty(), "{direction:?} {fault:?} {sums} {bad}");
                }
            }
        }
    }
}

#[test]
fn a_device_that_panics_fails_the_job_and_its_slots_are_never_used_again() {
    for bad in 0..u64::from(LAYERS) {
        let bench = Bench::new(fails_at(bad, SimDeviceFault::Panic, true), 1);
        let log = Log::new();
        bench
            .queue
            .submit(bench.load(&bench.slots(1), &log))
            .expect("room");
        assert_eq!(log.finish().last().expect("an end"), "done, settled false");
        assert!(!bench.is_empty());
        let next = Log::new();
        bench
            .queue
            .submit(bench.load(&bench.slots(1), &next))
            .expect("room");
        assert_eq!(
            next.finish().len(),
            LAYERS as usize + 1,
            "the queue goes on"
        );
    }
}

#[test]
fn a_device_that_fails_and_cannot_tell_what_still_moves_gives_nothing_back() {
    for direction in [Direction::Load, Direction::Save] {
        for bad in 0..u64::from(LAYERS) {
            let bench = Bench::new(fails_at(bad, SimDeviceFault::Stuck, true), 1);
            let log = Log::new();
            let job = match direction {
                Direction::Load => bench.load(&bench.slots(1), &log),
                Direction::Save => bench.save(&bench.fillings(1), &log),
            };
            bench.queue.submit(job).expect("room");
            assert_eq!(log.finish(), up_to(bad, "0: unavailable", "false"));
            assert!(!bench.is_empty(), "its slots are never used again");
        }
    }
}

/// Takes longer over a submission than a fence may take, and its fences are reached later still.
struct Slow(Arc<SimClock>, Gate);

impl Device for Slow {
    fn info(&self) -> DeviceInfo {
        CpuDevice::new().info()
    }
    fn attach(&self, _: &HostArena) -> Result<()> {
        Ok(())
    }
    fn record(&self, stream: Stream) -> Result<Fence> {
        CpuDevice::new().record(stream)
    }
    fn order(&self, stream: Stream, fence: &Fence) -> Result<()> {
        CpuDevice::new().order(stream, fence)
    }
    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted> {
        let submitted = CpuDevice::new().submit(transfer, layer, after)?;
        self.0.advance(2 * TIMEOUT);
        Ok(Submitted {
            fence: Fence::new(self.1.clone()),
            ..submitted
        })
    }
}

#[test]
fn a_fence_has_its_time_from_when_the_device_took_the_layer() {
    let (clock, gate) = (Arc::new(SimClock::default()), Gate::default());
    let bench = Bench::timed(
        Arc::new(Slow(clock.clone(), gate.clone())),
        1,
        clock.clone(),
    );
    let log = Log::new();
    let fillings = bench.fillings(1);
    let mut job = bench.save(&fillings, &log);
    job.layers = 0..1;
    bench.queue.submit(job).expect("room");
    clock.advance(TIMEOUT / 2);
    bench.queue.turn();
    assert!(log.lines().is_empty(), "it is not late: {:?}", log.lines());
    gate.0.store(true, Ordering::SeqCst);
    bench.queue.turn();
    assert_eq!(log.finish(), ["layer 0", "done, settled true"]);
}

#[test]
fn a_header_that_rots_in_memory_fails_its_own_move() {
    let devices: [Arc<dyn Device>; 2] = [Arc::new(CpuDevice::new()), Arc::new(SimDevice::sound())];
    for device in devices {
        let bench = Bench::over(device, 1);
        let slots = bench.slots(3);
        let memory = File::from(bench.arena.as_fd().try_clone_to_owned().expect("open"));
        // Where the slab of layer 2 starts: far behind its slot.
        let entry = slots[1].offset() + 256 + 2 * 16;
        memory
            .write_all_at(&[0xff; 4], entry as u64)
            .expect("mapped");
        let log = Log::new();
        bench.queue.submit(bench.load(&slots, &log)).expect("room");
        assert_eq!(log.finish(), up_to(2, "1: corrupt", "true"));
    }
}

#[test]
fn a_fence_that_never_arrives_fails_the_job_in_time_and_its_slots_are_never_used_again() {
    let bench = Bench::new(fails_at(1, SimDeviceFault::Never, true), 1);
    let log = Log::new();
    let fillings = bench.fillings(1);
    bench
        .queue
        .submit(bench.save(&fillings, &log))
        .expect("room");
    drop(fillings);
    bench.clock.advance(TIMEOUT - Duration::from_nanos(1));
    bench.queue.turn();
    assert_eq!(log.lines(), ["layer 0"]);
    bench.clock.advance(Duration::from_nanos(1));
    bench.queue.turn();
    assert_eq!(log.finish(), up_to(1, "0: unavailable", "false"));
    assert!(bench.arena.usage().filling_bytes > 0);
}

#[test]
fn a_slab_that_does_not_match_fails_its_layer_with_the_moves_before_it_good() {
    let devices: [Arc<dyn Device>; 2] = [Arc::new(CpuDevice::new()), Arc::new(SimDevice::sound())];
    for device in devices {
        let bench = Bench::over(device, 1);
        let mut slots = bench.slots(3);
        // The second one says something else of its layer 2.
        let header = slots[1].header().expect("sealed");
        let mut filling = bench.fillings(1).remove(0);
        for layer in bench.pages.geometry.layer_ids() {
            let mut checksum = header.slab(layer).expect("there").checksum;
            checksum.0 ^= u64::from(layer.0 == 2);
            filling.set_slab(layer, checksum);
        }
        let image = slots[1].image()[4096..].to_vec();
        filling.image_mut().expect("sole")[4096..].copy_from_slice(&image);
        slots[1] = filling.seal(header).expect("whole");
        let log = Log::new();
        bench.queue.submit(bench.load(&slots, &log)).expect("room");
        let expected = [
            "layer 0",
            "layer 1",
            "failed 2 after 1: corrupt",
            "layer 2",
            "layer 3",
            "done, settled true",
        ];
        assert_eq!(log.finish(), expected, "it goes on for the first one");
        let log = Log::new();
        bench
            .queue
            .submit(bench.load(&slots[1..], &log))
            .expect("room");
        assert_eq!(log.finish(), up_to(2, "0: corrupt", "true"));
    }
}

#[test]
fn a_load_that_is_compared_on_the_way_is_reported_before_its_fence_and_fails_behind_it() {
    let fence = Gate::default();
    let device = Compares {
        wrong: (LayerId(1), 2),
        fence: fence.clone(),
    };
    let bench = Bench::new(device, 1);
    let log = Log::new();
    bench
        .queue
        .submit(bench.load(&bench.slots(3), &log))
        .expect("room");
    let reported = ["layer 0", "layer 1", "layer 2", "layer 3"];
    assert_eq!(log.lines(), reported, "nobody waits for the fence");
    fence.0.store(true, Ordering::SeqCst);
    bench.queue.turn();
    let end = ["failed 1 after 2: corrupt", "done, settled true"];
    assert_eq!(log.finish(), [&reported[..], &end[..]].concat());
    assert!(bench.is_empty());
}

#[test]
fn a_load_that_arrives_damaged_is_not_reported_as_loaded() {
    let bench = Bench::new(fails_at(1, SimDeviceFault::Corrupt, true), 1);
    let log = Log::new();
    bench
        .queue
        .submit(bench.load(&bench.slots(2), &log))
        .expect("room");
    let expected = [
        "layer 0",
        "failed 1 after 1: corrupt",
        "layer 1",
        "layer 2",
        "layer 3",
        "done, settled true",
    ];
    assert_eq!(log.finish(), expected);
}

#[test]
fn a_fence_to_wait_for_that_never_arrives_fails_the_job_before_anything_moved() {
    let bench = Bench::new(CpuDevice::new(), 1);
    let log = Log::new();
    let mut job = bench.load(&bench.slots(1), &log);
    job.after = vec![Fence::new(Gate::default())];
    bench.queue.submit(job).expect("room");
    bench.clock.advance(TIMEOUT);
    bench.queue.turn();
    assert_eq!(log.finish(), up_to(0, "0: unavailable", "true"));
    assert!(bench.is_empty());
}

#[test]
fn events_that_panic_stop_their_own_job_alone() {
    let bench = Bench::new(CpuDevice::new(), 2);
    let slots = bench.slots(1);
    let mut job = bench.load(&slots, &Log::new());
    job.events = Box::new(|_| panic!("the caller's own fault"));
    bench.queue.submit(job).expect("room");
    let log = Log::new();
    bench.queue.submit(bench.load(&slots, &log)).expect("room");
    assert_eq!(log.finish().len(), 5);
    drop(slots);
    assert!(bench.is_empty());
}

#[test]
fn the_same_faults_give_the_same_trace() {
    let run = |seed| {
        let mut random = Random(seed);
        let sim = SimDevice::new(true, move |_| match random.below(9) {
            0 => Some(SimDeviceFault::Submit),
            1 => Some(SimDeviceFault::Fence),
            2 => Some(SimDeviceFault::Corrupt),
            _ => None,
        });
        let bench = Bench::new(sim.clone(), 4);
        let slots = bench.slots(2);
        let mut lines = Vec::new();
        for _ in 0..10 {
            let (load, save) = (Log::new(), Log::new());
            let fillings = bench.fillings(1);
            bench
                .queue
                .submit(bench.save(&fillings, &save))
                .expect("room");
            bench.queue.submit(bench.load(&slots, &load)).expect("room");
            lines.extend(save.finish());
            lines.extend(load.finish());
        }
        (sim.trace(), lines)
    };
    for seed in 0..20 {
        assert_eq!(run(seed), run(seed), "seed {seed}");
    }
    assert_ne!(run(0), run(1));
}

/// Panics in a transfer thread, once, at the `at`-th look.
struct Panicking {
    clock: SystemClock,
    looks: AtomicUsize,
    at: usize,
}

impl Clock for Panicking {
    fn now(&self) -> Duration {
        let is_transfer_thread = thread::current()
            .name()
            .is_some_and(|name| name.starts_with("stemkv-"));
        if is_transfer_thread {
            let look = self.looks.fetch_add(1, Ordering::SeqCst);
            assert_ne!(look, self.at, "a clock's panic");
        }
        self.clock.now()
    }
    fn unix_ms(&self) -> u64 {
        self.clock.unix_ms()
    }
}

/// The engine waits for `Done`: it comes also where the thread that was to say so panics, and the thread goes on.
#[test]
fn a_transfer_thread_that_panics_ends_its_jobs_and_goes_on() {
    for at in 0..12 {
        let bench = Bench::new(SimDevice::sound(), 1);
        let slots = bench.slots(1);
        let clock = Arc::new(Panicking {
            clock: SystemClock::default(),
            looks: AtomicUsize::new(0),
            at,
        });
        let device = Arc::new(SimDevice::sound());
        let queue = TransferQueue::spawn(device, clock.clone(), limits(1)).expect("threads");
        // Until it has panicked, and once more.
        let has_panicked = || clock.looks.load(Ordering::SeqCst) > at;
        let mut is_last = false;
        while !is_last {
            is_last = has_panicked();
            let log = Log::new();
            queue.submit(bench.load(&slots, &log)).expect("room");
            let lines = log.finish();
            if is_last {
                assert_eq!(lines.last().expect("an end"), "done, settled true");
                assert_eq!(lines.len(), LAYERS as usize + 1, "{at}: {lines:?}");
            }
        }
    }
}
