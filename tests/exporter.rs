//! What the process gives the store may panic, its recorder of the `metrics` facade or its clock: saves and
//! loads go on, byte for byte, and pages come back.
//!
//! How: a recorder that panics in one kind of metric after the other, and a clock that panics once, right
//! after the recorder was told of saved blocks. The recorder is the process's: one test at a time.

mod support;

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use metrics::{
    Counter, CounterFn, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder,
    SharedString, Unit,
};
use stemkv::{Cache, LoadOptions};
use stemkv_store::{Clock, Fence, SystemClock};
use support::{Engine, config, namespace, prompt};

/// The metric that panics, by its place in [`METRICS`]; behind its end none does.
static PANICKING: AtomicU8 = AtomicU8::new(u8::MAX);

const METRICS: [&str; 5] = [
    "stemkv_saved_blocks_total",
    "stemkv_abandoned_blocks_total",
    "stemkv_stage_seconds",
    "stemkv_transfer_layer_seconds",
    "stemkv_transfer_bytes_total",
];

thread_local! {
    /// Was this thread the last to say how many blocks were saved?
    static SAVED: Cell<bool> = const { Cell::new(false) };
}

/// The recorder, for one test at a time.
fn recorder() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // Set by the other test already.
    let _ = metrics::set_global_recorder(Panicking);
    alone
}

struct Panicking;
struct Metric(u8);

impl Metric {
    fn of(key: &Key) -> Option<Arc<Metric>> {
        let place = METRICS.iter().position(|name| *name == key.name())?;
        Some(Arc::new(Metric(place as u8)))
    }

    fn told(&self) {
        SAVED.set(METRICS[self.0 as usize] == "stemkv_saved_blocks_total");
        assert_ne!(PANICKING.load(SeqCst), self.0, "an exporter's panic");
    }
}

impl CounterFn for Metric {
    fn increment(&self, _: u64) {
        self.told();
    }
    fn absolute(&self, _: u64) {}
}

impl HistogramFn for Metric {
    fn record(&self, _: f64) {
        self.told();
    }
}

impl Recorder for Panicking {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Metric::of(key).map_or_else(Counter::noop, Counter::from_arc)
    }
    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }
    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Metric::of(key).map_or_else(Histogram::noop, Histogram::from_arc)
    }
}

/// What a thread of its own says, which is not waited for without end.
fn answered<T: Send + 'static>(what: &str, wait: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(wait()));
    let answer = told.recv_timeout(Duration::from_secs(20));
    answer.unwrap_or_else(|_| panic!("{what} never ends"))
}

#[test]
fn saves_and_loads_go_on_where_an_exporter_panics() {
    let _alone = recorder();
    for (place, name) in METRICS.into_iter().enumerate() {
        let cache = Cache::open(config(64)).expect("valid");
        let namespace = cache.namespace(&namespace()).expect("valid");
        let (engine, tokens) = (Engine::new(64), prompt(1, 24));
        let table = engine.table(24);
        engine.compute(&table, &tokens, 0);
        PANICKING.store(place as u8, SeqCst);
        for given_up in [true, false] {
            let save = cache.save(&mut namespace.prompt(&tokens), table.clone());
            let save = save.expect("valid");
            let layers = if given_up { 2 } else { 3 };
            (0..layers).for_each(|layer| save.layer(layer, Fence::reached()).expect("once"));
            let free = save.pages_free();
            if given_up {
                drop(save);
                let freed = answered(name, move || free.wait_blocking());
                freed.expect("the device works");
                continue;
            }
            let freed = answered(name, move || free.wait_blocking());
            freed.expect("the device works");
            let durability = answered(name, move || save.durable_blocking());
            assert_eq!(durability.undurable_blocks, 6, "{name}");
        }
        engine.free(table);
        let table = engine.table(24);
        let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
        let load = cache.load(&lease, table.clone(), LoadOptions::default());
        let load = load.expect("valid");
        let report = answered(name, move || load.finish_blocking());
        assert_eq!(report.tokens, 24, "{name}");
        engine.verify(&table, &tokens, 0..24);
        PANICKING.store(u8::MAX, SeqCst);
        cache.close_blocking().expect("nothing hangs");
    }
}

/// Panics once, where the save's thread looks at it right after it said how many blocks were saved.
#[derive(Default)]
struct Fuse {
    clock: SystemClock,
    has_burnt: AtomicBool,
}

impl Clock for Fuse {
    fn now(&self) -> Duration {
        if SAVED.take() {
            let burns = !self.has_burnt.swap(true, SeqCst);
            assert!(!burns, "the fuse burns");
        }
        self.clock.now()
    }
    fn unix_ms(&self) -> u64 {
        self.clock.unix_ms()
    }
}

#[test]
fn a_save_gives_its_pages_back_and_answers_whatever_happens_while_it_is_published() {
    let _alone = recorder();
    let fuse = Arc::new(Fuse::default());
    let builder = Cache::builder(config(64)).clock(fuse.clone());
    let cache = builder.open().expect("valid");
    let namespace = cache.namespace(&namespace()).expect("valid");
    let engine = Engine::new(128);
    for name in 1..=2 {
        let (tokens, table) = (prompt(name, 24), engine.table(24));
        engine.compute(&table, &tokens, 0);
        let save = cache.save(&mut namespace.prompt(&tokens), table);
        let save = save.expect("valid");
        save.all_layers(Fence::reached()).expect("once");
        let free = save.pages_free();
        let freed = answered("a copy", move || free.wait_blocking());
        freed.expect("the device works");
        let durability = answered("a save", move || save.durable_blocking());
        let given_up = durability.abandoned_blocks;
        assert_eq!(given_up, if name == 1 { 6 } else { 0 });
        assert!(fuse.has_burnt.load(SeqCst));
    }
    let stats = cache.stats();
    let held = (
        stats.index.pins,
        stats.index.pending_blocks,
        stats.host.filling_bytes,
    );
    assert_eq!(held, (0, 0, 0), "{stats:?}");
}
