//! Many transfers: jobs of a queue, and what they report.

use std::sync::{Condvar, Mutex};
use std::thread;

use super::*;

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

    /// Where among the events the job's beginning was reported; `None` before it was.
    pub(crate) fn begun(&self) -> Option<usize> {
        let events = self.0.lock().expect("no panic");
        let is_begin = |event: &&JobEvent| matches!(event, JobEvent::Begun);
        assert!(
            events.iter().filter(is_begin).count() <= 1,
            "a job begins once"
        );
        events.iter().position(|event| is_begin(&event))
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
        JobEvent::Begun => None,
        JobEvent::Layer { layer, .. } => Some(format!("layer {layer}")),
        JobEvent::Failed {
            layer,
            good_moves,
            error,
        } => Some(format!(
            "failed {layer} after {good_moves}: {}",
            error.kind()
        )),
        JobEvent::Done { settled } => Some(format!("done, settled {settled}")),
    };
    events.iter().filter_map(line).collect()
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
