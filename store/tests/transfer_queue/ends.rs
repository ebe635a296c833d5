//! Jobs that are refused, cancelled, late or closed.

use super::*;

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
fn the_bound_of_one_road_is_nothing_to_the_others() {
    let sim = SimDevice::sound();
    let bench = Bench::new(sim.clone(), 2);
    let (slots, fillings) = (bench.slots(1), bench.fillings(1));
    sim.hold();
    let (saves, loads) = ([Log::new(), Log::new()], [Log::new(), Log::new()]);
    for log in &saves {
        let job = bench.save(&fillings, log);
        bench.queue.submit(job).expect("room");
    }
    let job = bench.save(&fillings, &Log::new());
    let error = bench.queue.submit(job).expect_err("full");
    assert_eq!(error.kind(), ErrorKind::Busy);
    for log in &loads {
        let job = bench.load(&slots, log);
        bench.queue.submit(job).expect("another road");
    }
    let job = bench.load(&slots, &Log::new());
    let error = bench.queue.submit(job).expect_err("full");
    assert_eq!(error.kind(), ErrorKind::Busy);
    sim.release();
    bench.queue.turn();
    for log in saves.iter().chain(&loads) {
        assert_eq!(log.finish().len(), 5);
    }
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
