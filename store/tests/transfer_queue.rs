//! The rules of the transfer queue: every accepted job ends exactly once, whatever the device does,
//! and holds its slots no longer than it must, and no shorter.
//!
//! Most run on an inline queue over the simulated device: no threads and no time but the test's own,
//! so each shows an exact order of events. `Log::finish` checks that `Done` came once and last.

#![cfg(feature = "sim")]

mod device_suite;

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use device_suite::*;
use stemkv_store::transfer::QueueLimits;
use stemkv_store::*;

const LAYERS: u32 = 4;
const TIMEOUT: Duration = Duration::from_secs(5);

/// A queue over a device, pages with random bytes, and an arena of four slots.
struct Bench {
    clock: Arc<SimClock>,
    queue: TransferQueue,
    arena: HostArena,
    pages: Pages,
    table: Vec<PageId>,
}

impl Bench {
    fn new(device: impl Device, jobs: usize) -> Self {
        Self::over(Arc::new(device), jobs)
    }

    fn over(device: Arc<dyn Device>, jobs: usize) -> Self {
        let geometry = KvGeometry::gqa(LAYERS, 2, 16, Dtype::Bf16, 8).expect("valid");
        let subject = Subject {
            device: Arc::clone(&device),
            allocate: &|bytes| Arc::new(HostMemory::new(bytes)),
        };
        let pages = Pages::new(&subject, &geometry, Layout::Nhd, 4, 8);
        let bytes = Random(1).bytes(pages.memory.read().len());
        pages.memory.write(&bytes);
        let clock = Arc::new(SimClock::default());
        let limits = QueueLimits {
            jobs,
            fence_timeout: TIMEOUT,
        };
        Bench {
            queue: TransferQueue::inline(device, clock.clone(), limits),
            clock,
            arena: arena(&geometry, 4),
            pages,
            table: (0..8).map(PageId).collect(),
        }
    }

    /// Sealed slots for the blocks at positions 0, 8, …, saved by the CPU.
    fn slots(&self, count: usize) -> Vec<Slot> {
        save(
            &CpuDevice::new(),
            &self.arena,
            &self.pages,
            &self.table,
            &Self::at(count),
        )
    }

    fn at(count: usize) -> Vec<usize> {
        (0..count).map(|block| block * 8).collect()
    }

    fn load(&self, slots: &[Slot], log: &Arc<Log>) -> Job {
        load_job(
            slots,
            &self.pages,
            &self.table,
            &Self::at(slots.len()),
            0,
            log,
        )
    }

    fn save(&self, fillings: &[Filling], log: &Arc<Log>) -> Job {
        let moves = fillings.iter().zip(Self::at(fillings.len()));
        let moves = moves.map(|(filling, token)| SlabMove::Save {
            slot: filling.writer(),
            token: token as u32,
        });
        job(
            Direction::Save,
            &self.pages,
            &self.table,
            moves.collect(),
            0,
            log,
        )
    }

    fn fillings(&self, count: usize) -> Vec<Filling> {
        let bytes = self.pages.geometry.payload_bytes();
        self.arena.allocate(bytes, count).expect("room")
    }

    fn is_empty(&self) -> bool {
        let usage = self.arena.usage();
        usage.free_bytes == usage.capacity_bytes
    }
}

fn fails_at(number: u64, fault: SimDeviceFault, sums: bool) -> SimDevice {
    SimDevice::new(sums, move |n| (n == number).then_some(fault))
}

/// Lines of a job of which layer `bad` fails.
fn up_to(bad: u64, failed: &str, end: &str) -> Vec<String> {
    let layers = (0..bad).map(|layer| format!("layer {layer}"));
    let failed = format!("failed {bad} after {failed}");
    layers
        .chain([failed, format!("done, settled {end}")])
        .collect()
}

/// A fence that the test reaches.
#[derive(Clone, Default)]
struct Gate(Arc<AtomicBool>);

impl FencePoint for Gate {
    fn is_reached(&self) -> Result<bool> {
        Ok(self.0.load(Ordering::SeqCst))
    }
    fn wait(&self, _: Duration) -> Result<bool> {
        self.is_reached()
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
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

/// A device that compares a load's sums on the way, as a GPU does: it moves the bytes at once, and
/// says behind the fence which move of which layer is wrong.
struct Compares {
    wrong: (LayerId, usize),
    fence: Gate,
}

impl Device for Compares {
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
        CpuDevice::new().submit(transfer, layer, after)?;
        let first_wrong = (layer == self.wrong.0).then_some(self.wrong.1);
        Ok(Submitted {
            fence: Fence::new(self.fence.clone()),
            sums: SlabSums::Compared(Box::new(move || Ok(first_wrong))),
        })
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
fn cancelling_takes_effect_between_two_layers() {
    let bench = Bench::new(CpuDevice::new(), 1);
    let slots = bench.slots(1);
    let poison = vec![0x5a; bench.pages.memory.read().len()];
    bench.pages.memory.write(&poison);
    let log = Log::new();
    let mut job = bench.load(&slots, &log);
    let cancelled = Arc::clone(&job.cancelled);
    let mut sink = log.sink();
    job.events = Box::new(move |event| {
        if matches!(
            event,
            JobEvent::Layer {
                layer: LayerId(1),
                ..
            }
        ) {
            cancelled.store(true, Ordering::SeqCst);
        }
        sink(event);
    });
    bench.queue.submit(job).expect("room");
    assert_eq!(log.finish(), ["layer 0", "layer 1", "done, settled true"]);
    let memory = bench.pages.memory.read();
    let half = memory.len() / 2;
    assert!(memory[..half].iter().any(|&byte| byte != 0x5a));
    assert_eq!(
        memory[half..],
        poison[half..],
        "layers 2 and 3 did not move"
    );
}

#[test]
fn loads_go_before_saves_also_between_the_layers_of_a_save() {
    let sim = SimDevice::sound();
    let bench = Bench::new(sim.clone(), 2);
    let slots = bench.slots(1);
    let (save_log, load_log) = (Log::new(), Log::new());
    let fillings = bench.fillings(1);
    let mut save = bench.save(&fillings, &save_log);
    let mut load = Some(bench.load(&slots, &load_log));
    let (queue, mut sink) = (bench.queue.clone(), save_log.sink());
    save.events = Box::new(move |event| {
        sink(event);
        if let Some(load) = load.take() {
            queue.submit(load).expect("room");
        }
    });
    bench.queue.submit(save).expect("room");
    assert_eq!(save_log.finish().len(), 5);
    assert_eq!(load_log.finish().len(), 5);
    let trace = sim.trace();
    let order = trace.iter().filter_map(|line| {
        let (_, rest) = line.split_once(' ')?;
        rest.split_once(',').map(|(what, _)| what)
    });
    let expected = [
        "Save layer 0", // Its arrival submits the load, seen one layer later.
        "Save layer 1",
        "Load layer 0",
        "Load layer 1",
        "Load layer 2",
        "Load layer 3",
        "Save layer 2",
        "Save layer 3",
    ];
    assert_eq!(order.collect::<Vec<_>>(), expected);
}

/// Jobs of three blocks and of one: the small one comes when the large one has its first layer, so much
/// later.
fn large_and_small(later: Duration) -> Vec<String> {
    let sim = SimDevice::sound();
    let bench = Bench::new(sim.clone(), 2);
    let slots = bench.slots(3);
    let (large, small) = (Log::new(), Log::new());
    let mut job = bench.load(&slots, &large);
    let mut waiting = Some(bench.load(&slots[..1], &small));
    let (queue, clock, mut sink) = (bench.queue.clone(), bench.clock.clone(), large.sink());
    job.events = Box::new(move |event| {
        sink(event);
        if let Some(job) = waiting.take() {
            clock.advance(later);
            queue.submit(job).expect("room");
        }
    });
    bench.queue.submit(job).expect("room");
    for log in [large, small] {
        assert_eq!(log.finish().len(), LAYERS as usize + 1);
    }
    let trace = sim.trace();
    let what = trace.iter().filter_map(|line| line.split_once(' '));
    what.map(|(_, what)| what.to_owned())
        .filter(|what| what.starts_with("Load"))
        .collect()
}

#[test]
fn a_small_load_goes_before_the_rest_of_a_large_one_but_not_once_that_has_waited_as_long_as_it_takes()
 {
    let small = |layer| format!("Load layer {layer}, 1 moves");
    let position = |lines: &[String], line: &str| {
        let at = lines.iter().position(|other| other.starts_with(line));
        at.unwrap_or_else(|| panic!("no {line} in {lines:?}"))
    };
    let at_once = large_and_small(Duration::ZERO);
    assert!(
        position(&at_once, &small(3)) < position(&at_once, "Load layer 2, 3 moves"),
        "{at_once:?}"
    );
    let late = large_and_small(Duration::from_micros(1));
    assert!(
        position(&late, "Load layer 3, 3 moves") < position(&late, &small(0)),
        "{late:?}"
    );
}

/// Its loads wait until they are let go.
struct HaltsLoads {
    begun: Mutex<mpsc::Sender<()>>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl Device for HaltsLoads {
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
        if transfer.direction() == Direction::Load {
            let told = self.begun.lock().expect("no panic").send(());
            told.expect("the test listens");
            let go_on = self.go_on.lock().expect("no panic").recv();
            go_on.expect("the test lets it go");
        }
        CpuDevice::new().submit(transfer, layer, after)
    }
}

#[test]
fn a_save_does_not_wait_for_a_load_that_the_device_is_busy_with() {
    let bench = Bench::new(CpuDevice::new(), 1);
    let (tell, begun) = mpsc::channel();
    let (let_go, go_on) = mpsc::channel();
    let device = HaltsLoads {
        begun: Mutex::new(tell),
        go_on: Mutex::new(go_on),
    };
    let clock = Arc::new(SystemClock::default());
    let queue = TransferQueue::spawn(Arc::new(device), clock, limits(2)).expect("threads");
    // Goes before the queue, so that a failed test ends too.
    let let_go = let_go;
    let (load_log, save_log) = (Log::new(), Log::new());
    let slots = bench.slots(1);
    queue.submit(bench.load(&slots, &load_log)).expect("room");
    begun.recv().expect("the load begins");
    let (end, ended) = mpsc::channel();
    let fillings = bench.fillings(1);
    let mut save = bench.save(&fillings, &save_log);
    let mut sink = save_log.sink();
    save.events = Box::new(move |event| {
        let is_done = matches!(event, JobEvent::Done { .. });
        sink(event);
        if is_done {
            end.send(()).expect("the test listens");
        }
    });
    queue.submit(save).expect("room");
    let waited = ended.recv_timeout(Duration::from_secs(30));
    assert!(waited.is_ok(), "the save waits for the load");
    assert_eq!(save_log.finish().len(), LAYERS as usize + 1);
    assert!(load_log.lines().is_empty());
    for _ in 0..LAYERS {
        let_go.send(()).expect("the load listens");
    }
    queue.close();
    assert_eq!(load_log.finish().len(), LAYERS as usize + 1);
}

/// As two GPUs above one host tier, each with threads of its own.
#[test]
fn what_one_device_saves_into_a_host_arena_another_one_loads_from_it() {
    let sims = [SimDevice::sound(), SimDevice::sound()];
    let [one, other] = sims.clone().map(|sim| Bench::new(sim, 2));
    for sim in &sims {
        sim.attach(&one.arena).expect("both reach it");
    }
    let saved = one.pages.memory.read();
    let slots = save(&sims[0], &one.arena, &one.pages, &one.table, &Bench::at(4));
    other.pages.memory.write(&vec![0x5a; saved.len()]);
    let log = Log::new();
    other.queue.submit(other.load(&slots, &log)).expect("room");
    assert_eq!(log.finish().len(), LAYERS as usize + 1);
    assert!(other.pages.memory.read() == saved);
    let of_two = sims.iter().map(|sim| sim.trace());
    let of_two: Vec<Vec<String>> = of_two.collect();
    assert!(of_two[0].iter().all(|line| !line.contains("Load")));
    assert!(of_two[1].iter().all(|line| !line.contains("Save")));
}

#[test]
fn a_job_whose_fences_are_late_holds_nobody_up() {
    let bench = Bench::new(CpuDevice::new(), 2);
    let slots = bench.slots(1);
    let gate = Gate::default();
    let (late, prompt) = (Log::new(), Log::new());
    let mut job = bench.load(&slots, &late);
    job.after = vec![Fence::reached(), Fence::new(gate.clone())];
    bench.queue.submit(job).expect("room");
    bench
        .queue
        .submit(bench.load(&slots, &prompt))
        .expect("room");
    assert_eq!(prompt.finish().len(), 5);
    assert!(late.lines().is_empty());
    gate.0.store(true, Ordering::SeqCst);
    bench.queue.turn();
    assert_eq!(late.finish().len(), 5);
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
fn nothing_moves_before_the_fences_that_a_device_was_given() {
    let sim = SimDevice::sound();
    let bench = Bench::new(sim, 1);
    let slots = bench.slots(1);
    let poison = vec![0x5a; bench.pages.memory.read().len()];
    bench.pages.memory.write(&poison);
    let (gate, log) = (Gate::default(), Log::new());
    let mut job = bench.load(&slots, &log);
    job.after = vec![Fence::new(gate.clone())];
    bench.queue.submit(job).expect("room");
    drop(slots);
    assert_eq!(bench.pages.memory.read(), poison);
    assert!(!bench.is_empty(), "the transfer keeps its slots");
    gate.0.store(true, Ordering::SeqCst);
    bench.queue.turn();
    assert_eq!(log.finish().len(), 5);
    assert_ne!(bench.pages.memory.read(), poison);
    assert!(bench.is_empty());
}

#[test]
fn over_the_bound_a_job_is_refused_and_an_end_makes_room() {
    let sim = SimDevice::sound();
    let bench = Bench::new(sim.clone(), 2);
    let slots = bench.slots(1);
    sim.hold();
    let logs = [Log::new(), Log::new(), Log::new()];
    bench
        .queue
        .submit(bench.load(&slots, &logs[0]))
        .expect("room");
    bench
        .queue
        .submit(bench.load(&slots, &logs[1]))
        .expect("room");
    let error = bench
        .queue
        .submit(bench.load(&slots, &logs[2]))
        .expect_err("full");
    assert_eq!(error.kind(), ErrorKind::Busy);
    sim.release();
    bench.queue.turn();
    assert_eq!(logs[0].finish().len(), 5);
    bench
        .queue
        .submit(bench.load(&slots, &logs[2]))
        .expect("room again");
    assert_eq!(logs[2].finish().len(), 5);
}

#[test]
fn close_finishes_what_has_begun_ends_the_rest_and_refuses_more() {
    let bench = Bench::new(CpuDevice::new(), 3);
    let slots = bench.slots(1);
    let (begun, waiting) = (Log::new(), Log::new());
    let mut late = bench.load(&slots, &waiting);
    late.after = vec![Fence::new(Gate::default())];
    bench.queue.submit(late).expect("room");
    let (queue, mut sink) = (bench.queue.clone(), begun.sink());
    let mut job = bench.load(&slots, &begun);
    job.events = Box::new(move |event| {
        sink(event);
        queue.close();
    });
    bench.queue.submit(job).expect("room");
    assert_eq!(begun.finish().len(), 5);
    assert_eq!(waiting.finish(), ["done, settled true"]);
    let error = bench
        .queue
        .submit(bench.load(&slots, &Log::new()))
        .expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed);
}

#[test]
fn closing_a_thread_waits_for_its_jobs_but_not_from_within_an_event() {
    let sim = SimDevice::sound();
    let bench = Bench::new(sim.clone(), 1);
    let slots = bench.slots(1);
    let clock = Arc::new(SystemClock::default());
    let queue = TransferQueue::spawn(Arc::new(sim), clock, limits(2)).expect("a thread");
    let log = Log::new();
    let (begun, has_begun) = mpsc::channel();
    let mut job = bench.load(&slots, &log);
    let (own, mut sink) = (queue.clone(), log.sink());
    job.events = Box::new(move |event| {
        if matches!(event, JobEvent::Done { .. }) {
            own.close();
        }
        sink(event);
    });
    let gate = Gate::default();
    job.after = vec![Fence::new(Tell(gate.clone(), Mutex::new(Some(begun))))];
    queue.submit(job).expect("room");
    has_begun.recv().expect("the device looks at the fence");
    thread::scope(|scope| {
        let closing = scope.spawn(|| queue.close());
        gate.0.store(true, Ordering::SeqCst);
        closing.join().expect("no panic");
        assert_eq!(log.lines().len(), 5, "close waited for the end");
    });
}

/// A gate that tells when it is first looked at.
struct Tell(Gate, Mutex<Option<mpsc::Sender<()>>>);

impl FencePoint for Tell {
    fn is_reached(&self) -> Result<bool> {
        if let Some(tell) = self.1.lock().expect("no panic").take() {
            tell.send(()).expect("the test listens");
        }
        self.0.is_reached()
    }
    fn wait(&self, _: Duration) -> Result<bool> {
        self.is_reached()
    }
    fn as_any(&self) -> &dyn Any {
        &self.0
    }
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
fn a_job_that_does_not_fit_together_is_invalid_and_hears_nothing() {
    let bench = Bench::new(CpuDevice::new(), 1);
    let slots = bench.slots(2);
    let fillings = bench.fillings(1);
    let other = KvGeometry::gqa(LAYERS, 2, 16, Dtype::F16, 8).expect("valid");
    let foreign = arena(&other, 1);
    let foreign = foreign.allocate(1, 1).expect("room");
    let poison = vec![0x5a; bench.pages.memory.read().len()];
    bench.pages.memory.write(&poison);
    type Spoil<'a> = &'a dyn Fn(&mut Job);
    let spoil: [(&str, Spoil<'_>); 6] = [
        ("does not exist", &|job| {
            job.table.pages = [0, 1, 2, 8].map(PageId).into()
        }),
        ("too short", &|job| {
            job.table.pages = [0, 1, 2].map(PageId).into()
        }),
        ("layer that does not exist", &|job| job.layers.end += 1),
        ("one direction", &|job| job.direction = Direction::Save),
        ("whole blocks", &|job| {
            job.direction = Direction::Save;
            job.from_token = 1;
            let slot = fillings[0].writer();
            job.moves = vec![SlabMove::Save { slot, token: 0 }];
        }),
        ("another geometry", &|job| {
            job.direction = Direction::Save;
            let slot = foreign[0].writer();
            job.moves = vec![SlabMove::Save { slot, token: 0 }];
        }),
    ];
    for (reason, spoil) in spoil {
        let log = Log::new();
        let mut job = bench.load(&slots, &log);
        spoil(&mut job);
        let error = bench.queue.submit(job).expect_err(reason);
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(reason), "{error}");
        assert!(log.lines().is_empty());
        assert_eq!(bench.pages.memory.read(), poison, "{reason}");
    }
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

#[test]
fn a_job_that_cannot_begin_by_its_time_is_given_up_and_one_that_began_is_not() {
    // The CPU device waits for `after` before it begins.
    let bench = Bench::new(CpuDevice::new(), 2);
    let slots = bench.slots(2);
    let (late, early) = (Log::new(), Log::new());
    let begin_by = Some(TIMEOUT / 2);
    let mut job = bench.load(&slots, &late);
    job.begin_by = begin_by;
    job.after = vec![Fence::new(Gate::default())];
    bench.queue.submit(job).expect("room");
    let mut job = bench.load(&slots, &early);
    job.begin_by = begin_by;
    bench.queue.submit(job).expect("room");
    assert_eq!(early.finish().len(), LAYERS as usize + 1);
    assert!(late.lines().is_empty(), "it waits");
    bench.clock.advance(TIMEOUT / 2);
    bench.queue.turn();
    assert_eq!(late.finish(), up_to(0, "0: busy", "true"));
    drop(slots);
    assert!(bench.is_empty());
}

#[test]
fn what_is_for_later_waits_for_loads_and_saves_that_came_after_it() {
    let sim = SimDevice::sound();
    let bench = Bench::new(sim.clone(), 3);
    let slots = bench.slots(2);
    let (begun, later, demand) = (Log::new(), Log::new(), Log::new());
    let mut for_later = bench.load(&slots, &later);
    for_later.urgency = Urgency::Later;
    let mut waiting = vec![bench.load(&slots[..1], &demand), for_later];
    let (queue, mut sink) = (bench.queue.clone(), begun.sink());
    let mut job = bench.save(&bench.fillings(1), &begun);
    job.events = Box::new(move |event| {
        sink(event);
        while let Some(job) = waiting.pop() {
            queue.submit(job).expect("room");
        }
    });
    bench.queue.submit(job).expect("room");
    for log in [&begun, &later, &demand] {
        assert_eq!(log.finish().len(), LAYERS as usize + 1);
    }
    let trace = sim.trace();
    let first = |what: &str| trace.iter().position(|line| line.contains(what));
    let last = |what: &str| trace.iter().rposition(|line| line.contains(what));
    assert!(last("Load layer 3, 1 moves") < first("Load layer 0, 2 moves"));
    assert!(last("Save layer 3") < first("Load layer 0, 2 moves"));
}

/// The layers of one encoded save, each a job of its own.
fn encoded_jobs(bench: &Bench, fillings: &[Filling], log: &Arc<Log>) -> Vec<Job> {
    let encoded = EncodedSave::new(CodecId::Exp);
    let layers = 0..bench.pages.geometry.layers;
    let job = |layer| Job {
        layers: layer..layer + 1,
        encoded: Some(encoded.clone()),
        ..bench.save(fillings, log)
    };
    layers.map(job).collect()
}

#[test]
fn the_layers_of_an_encoded_save_arrive_in_order_however_they_were_handed_over() {
    let devices: [Arc<dyn Device>; 2] = [Arc::new(CpuDevice::new()), Arc::new(SimDevice::sound())];
    for device in devices {
        let bench = Bench::over(device, 16);
        let logs: Vec<_> = (0..2).map(|_| Log::new()).collect();
        let fillings = [bench.fillings(2), bench.fillings(1)];
        let mut first = encoded_jobs(&bench, &fillings[0], &logs[0]);
        let mut second = encoded_jobs(&bench, &fillings[1], &logs[1]);
        let layers = first.len();
        first.reverse();
        second.rotate_left(1);
        // Two saves at once do not get into each other's way.
        for job in first.into_iter().zip(second).flat_map(|(a, b)| [a, b]) {
            bench.queue.submit(job).expect("room");
        }
        for (log, moves) in logs.iter().zip([2, 1]) {
            let arrived = log.slabs();
            let order: Vec<u32> = arrived.iter().map(|(layer, _)| layer.0).collect();
            assert_eq!(order, (0..layers as u32).collect::<Vec<_>>());
            assert!(arrived.iter().all(|(_, slabs)| slabs.len() == moves));
        }
        drop(fillings);
        assert!(bench.is_empty());
    }
}

#[test]
fn a_layer_of_an_encoded_save_that_is_not_coming_fails_those_behind_it_and_nobody_waits() {
    // Refused by the device, cancelled, over the bound, and invalid.
    for way in 0..4 {
        let script = move |number| (way == 0 && number == 0).then_some(SimDeviceFault::Submit);
        let device = Arc::new(SimDevice::new(true, script));
        let bench = Bench::over(device.clone(), if way == 2 { 2 } else { 16 });
        let log = Log::new();
        let fillings = bench.fillings(1);
        let mut jobs = encoded_jobs(&bench, &fillings, &log);
        let last = jobs.pop().expect("more than one layer");
        let middle = jobs.pop().expect("more than one layer");
        let mut first = jobs.swap_remove(0);
        if way == 3 {
            first.layers.end = u32::MAX;
        }
        if way == 1 {
            first
                .cancelled
                .store(true, std::sync::atomic::Ordering::Relaxed);
        }
        bench.queue.submit(last).expect("room");
        bench.queue.submit(middle).expect("room");
        let answer = bench.queue.submit(first);
        assert_eq!(answer.is_err(), way >= 2);
        bench.queue.turn();
        let lines = log.lines();
        let done = lines.iter().filter(|line| **line == "done, settled true");
        assert_eq!(done.count(), if way >= 2 { 2 } else { 3 }, "{lines:?}");
        assert!(log.slabs().is_empty());
        drop((fillings, jobs));
        assert!(bench.is_empty());
    }
}

#[test]
fn a_device_that_does_not_encode_is_not_asked_to() {
    let device = Compares {
        wrong: (LayerId(0), 0),
        fence: Gate::default(),
    };
    let bench = Bench::new(device, 16);
    let log = Log::new();
    let fillings = bench.fillings(1);
    let job = encoded_jobs(&bench, &fillings, &log).remove(0);
    let error = bench.queue.submit(job).expect_err("it copies raw slabs");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(log.lines().is_empty());
}
