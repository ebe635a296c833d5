//! What goes before what, and who waits for whom.

use super::*;

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
        let has_arrived = matches!(event, JobEvent::Layer { .. });
        sink(event);
        if has_arrived && let Some(load) = load.take() {
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
        let has_layer = matches!(event, JobEvent::Layer { .. });
        sink(event);
        if has_layer && let Some(job) = waiting.take() {
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
fn a_job_begins_when_its_fences_are_reached_and_no_layer_goes_before() {
    let devices: [Arc<dyn Device>; 2] = [Arc::new(CpuDevice::new()), Arc::new(SimDevice::sound())];
    for device in devices {
        let bench = Bench::over(device, 2);
        let (log, gate) = (Log::new(), Gate::default());
        let fillings = bench.fillings(1);
        let mut job = bench.save(&fillings, &log);
        job.after = vec![Fence::new(gate.clone())];
        bench.queue.submit(job).expect("room");
        bench.queue.turn();
        assert_eq!(log.begun(), None);
        gate.0.store(true, Ordering::SeqCst);
        bench.queue.turn();
        assert_eq!(log.begun(), Some(0));
        assert_eq!(log.finish().len(), LAYERS as usize + 1);
    }
    // One that never begins says nothing of it.
    let bench = Bench::new(CpuDevice::new(), 2);
    let (log, slots) = (Log::new(), bench.slots(1));
    let mut job = bench.load(&slots, &log);
    job.after = vec![Fence::new(Gate::default())];
    let cancelled = job.cancelled.clone();
    bench.queue.submit(job).expect("room");
    cancelled.store(true, Ordering::SeqCst);
    bench.queue.turn();
    assert_eq!(log.finish(), ["done, settled true"]);
    assert_eq!(log.begun(), None);
}
