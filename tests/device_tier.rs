//! The device tier above the others: what was saved or is hit again is there, by recency, within its
//! bound; what it holds alone moves down before it goes; a copy that fails there fails there alone.
#![cfg(feature = "sim")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stemkv::{Cache, LoadOptions, LoadReport, OpenNamespace};
use stemkv_store::{
    CodecId, Device, DeviceArena, DeviceInfo, Fence, HostArena, KvGeometry, LayerId, Result,
    SimDevice, SimDeviceFault, Stream, Submitted, Transfer,
};
use support::machine::{Machine, Mode, assert_balanced, soon};
use support::{Engine, load, prompt, save_durably};

/// Six blocks each.
const TOKENS: usize = 24;

async fn load_prompt(cache: &Cache, namespace: &OpenNamespace, name: u32) -> LoadReport {
    load(cache, namespace, &Engine::new(64), &prompt(name, TOKENS)).await
}

fn parts(report: &LoadReport) -> (usize, usize, usize) {
    (report.device_blocks, report.host_blocks, report.disk_blocks)
}

#[tokio::test]
async fn what_was_just_saved_comes_from_the_device_tier_and_the_coldest_goes_first() {
    let machine = Machine::with_device_tier(Mode::Inline, 12, 64);
    let (cache, namespace) = machine.open();
    for name in 1..4 {
        save_durably(&cache, &namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
        assert_balanced(&cache);
    }
    assert_eq!(cache.stats().counter("evicted_device_blocks"), 6);
    let tokens = prompt(3, TOKENS);
    let matched = cache.match_prefix(&mut namespace.prompt(&tokens));
    assert_eq!((matched.device_tokens, matched.host_tokens), (TOKENS, 0));
    for (name, expected) in [(1, (0, 6, 0)), (2, (6, 0, 0)), (3, (6, 0, 0))] {
        let report = load_prompt(&cache, &namespace, name).await;
        assert_eq!(
            (report.tokens, parts(&report)),
            (TOKENS, expected),
            "{name}"
        );
    }
    cache.close().await.expect("nothing hangs");
    assert_balanced(&cache);
}

#[tokio::test]
async fn what_is_hit_again_moves_up_and_what_is_hit_once_does_not() {
    let machine = Machine::with_device_tier(Mode::Inline, 6, 64);
    let (cache, namespace) = machine.open();
    for name in 1..3 {
        save_durably(&cache, &namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
    }
    for expected in [(0, 6, 0), (0, 6, 0), (6, 0, 0)] {
        let report = load_prompt(&cache, &namespace, 1).await;
        assert_eq!(parts(&report), expected);
        assert_balanced(&cache);
    }
    // It took the place of the other one, which is still in the host tier.
    assert_eq!(parts(&load_prompt(&cache, &namespace, 2).await), (0, 6, 0));
    cache.close().await.expect("nothing hangs");
    // The device tier is empty after a restart.
    drop((cache, namespace));
    let (cache, namespace) = machine.open();
    assert_eq!(parts(&load_prompt(&cache, &namespace, 1).await), (0, 0, 6));
    cache.close().await.expect("nothing hangs");
}

/// The host tier holds eight chunks and there is no disk: the device tier comes to hold chunks alone.
#[tokio::test]
async fn an_only_copy_moves_down_before_it_goes() {
    let mut config = support::config(8);
    config.device.capacity_bytes = 14 * support::machine::DEVICE_CHUNK;
    let device = SimDevice::sound();
    let builder = Cache::builder(config).device(Arc::new(device));
    let cache = builder
        .inline_on(tokio::runtime::Handle::current(), || {
            std::time::Duration::ZERO
        })
        .open()
        .expect("valid");
    let namespace = cache.namespace(&support::namespace()).expect("its own");
    save_durably(&cache, &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
    save_durably(&cache, &namespace, &Engine::new(64), &prompt(2, TOKENS)).await;
    // Of the first one's copies in the host tier four had to go; on the device both are whole.
    assert_eq!(cache.stats().index.host_blocks, 8);
    assert_eq!(parts(&load_prompt(&cache, &namespace, 1).await), (6, 0, 0));
    assert_eq!(parts(&load_prompt(&cache, &namespace, 2).await), (6, 0, 0));
    // Two chunks are free there; the coldest are only copies, so the rest stays in the host tier.
    save_durably(&cache, &namespace, &Engine::new(64), &prompt(3, TOKENS)).await;
    assert_balanced(&cache);
    assert!(
        cache.stats().counter("demoted_blocks") > 0,
        "{:?}",
        cache.stats()
    );
    let mut whole = 0;
    for name in 1..4 {
        let report = load_prompt(&cache, &namespace, name).await;
        whole += report.tokens;
    }
    // Room for 22 chunks in all, and none of the 18 was forgotten.
    assert_eq!(whole, 3 * TOKENS, "{:?}", cache.stats());
    for name in 4..20 {
        save_durably(&cache, &namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
        assert_balanced(&cache);
        let report = load_prompt(&cache, &namespace, name).await;
        assert_eq!(report.tokens, TOKENS, "{name}: {:?}", cache.stats());
    }
    cache.close().await.expect("nothing hangs");
    assert_balanced(&cache);
}

/// The n-th layer that the device is given fails, for every n of a save and of a load, in every way.
#[tokio::test]
async fn what_fails_in_the_device_tier_is_served_by_the_host_tier() {
    use SimDeviceFault::{Corrupt, Fence, Submit};
    for fault in [Corrupt, Fence, Submit] {
        for bad in 0..12 {
            let what = format!("{fault:?} at {bad}");
            let mut machine = Machine::with_device_tier(Mode::Inline, 12, 64);
            let at = Arc::new(AtomicU64::new(u64::MAX));
            let script = at.clone();
            machine.device = SimDevice::new(true, move |n| {
                (n == script.load(Ordering::SeqCst)).then_some(fault)
            });
            at.store(bad, Ordering::SeqCst);
            let (cache, namespace) = machine.open();
            // Three layers into the host tier, three into the device tier, and as many of a load.
            save_durably(&cache, &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
            let submitted = machine.device.trace().len() as u64;
            let report = load_prompt(&cache, &namespace, 1).await;
            let again = load_prompt(&cache, &namespace, 1).await;
            let once_more = load_prompt(&cache, &namespace, 1).await;
            if submitted > 0
                && machine
                    .device
                    .trace()
                    .iter()
                    .any(|line| line.contains("Load"))
            {
                // A load that failed said so; the next one is whole.
                assert!(report.tokens == TOKENS || report.cut.is_some(), "{what}");
                // What was damaged on its way into the host tier is gone there and on disk.
                let least = if fault == Corrupt { TOKENS - 4 } else { TOKENS };
                let last = again.tokens.max(once_more.tokens);
                assert!(last >= least, "{what}: {:?}", cache.stats());
            }
            cache.flush().await;
            assert_balanced(&cache);
            cache.close().await.expect("nothing hangs");
        }
    }
}

#[tokio::test]
async fn a_device_copy_that_rots_is_dropped_and_the_host_tier_serves() {
    let mut machine = Machine::with_device_tier(Mode::Inline, 12, 64);
    let at = Arc::new(AtomicU64::new(u64::MAX));
    let script = at.clone();
    machine.device = SimDevice::new(true, move |n| {
        (n == script.load(Ordering::SeqCst)).then_some(SimDeviceFault::Corrupt)
    });
    let (cache, namespace) = machine.open();
    save_durably(&cache, &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
    assert_eq!(cache.stats().index.device_blocks, 6);
    // The second layer of the next load arrives damaged.
    let submitted = |line: &&String| line.contains(" layer ");
    let trace = machine.device.trace();
    at.store(
        trace.iter().filter(submitted).count() as u64 + 1,
        Ordering::SeqCst,
    );
    let report = load_prompt(&cache, &namespace, 1).await;
    // The last block's slab: those before it are whole, in the layers behind it too.
    let cut = (report.tokens, report.cut.as_deref());
    assert_eq!(cut, (TOKENS - 4, Some("corrupt")));
    assert_eq!(cache.stats().index.device_blocks, 5);
    assert_eq!(cache.stats().counter("corrupt_blocks"), 1);
    let report = load_prompt(&cache, &namespace, 1).await;
    assert_eq!((report.tokens, parts(&report)), (TOKENS, (5, 1, 0)));
    cache.close().await.expect("nothing hangs");
    assert_balanced(&cache);
}

#[tokio::test]
async fn a_chunk_that_is_damaged_on_its_way_up_keeps_none_before_it_from_moving_up() {
    let mut machine = Machine::with_device_tier(Mode::Inline, 6, 64);
    let at = Arc::new(AtomicU64::new(u64::MAX));
    let script = at.clone();
    machine.device = SimDevice::new(true, move |n| {
        (n == script.load(Ordering::SeqCst)).then_some(SimDeviceFault::Corrupt)
    });
    let (cache, namespace) = machine.open();
    for name in 1..3 {
        save_durably(&cache, &namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
    }
    load_prompt(&cache, &namespace, 1).await;
    // Behind the next load's three layers: the second one of the promotion, whose last block it is.
    let trace = machine.device.trace();
    let submitted = trace.iter().filter(|line| line.contains(" layer ")).count();
    at.store(submitted as u64 + 4, Ordering::SeqCst);
    let report = load_prompt(&cache, &namespace, 1).await;
    assert_eq!((report.tokens, parts(&report)), (TOKENS, (0, 6, 0)));
    assert_eq!(cache.stats().counter("corrupt_blocks"), 1);
    let report = load_prompt(&cache, &namespace, 1).await;
    assert_eq!((report.tokens, parts(&report)), (TOKENS, (5, 0, 1)));
    cache.close().await.expect("nothing hangs");
    assert_balanced(&cache);
}

#[tokio::test]
async fn pages_of_a_save_are_free_once_the_device_tier_has_them_too() {
    let machine = Machine::with_device_tier(Mode::Threads, 12, 64);
    let (cache, namespace) = machine.open();
    let engine = Engine::new(64);
    let tokens = prompt(1, TOKENS);
    let table = engine.table(TOKENS);
    engine.compute(&table, &tokens, 0);
    machine.device.hold();
    let saving = cache
        .save(&mut namespace.prompt(&tokens), table)
        .expect("open");
    saving
        .all_layers(stemkv_store::Fence::reached())
        .expect("once");
    let pages = saving.pages_free();
    assert!(!pages.is_free());
    machine.device.release();
    pages.wait().await.expect("the device works");
    let stats = cache.stats();
    assert_eq!(stats.index.device_blocks, 6);
    cache.close().await.expect("nothing hangs");
    assert_balanced(&cache);
}

/// A promotion is behind every load, and a whole job of chunks: it may take as long as there are loads.
#[tokio::test]
async fn a_load_of_what_is_on_its_way_up_comes_out_of_the_host_tier_at_once() {
    let mut machine = Machine::with_device_tier(Mode::Inline, 6, 64);
    let at = Arc::new(AtomicU64::new(u64::MAX));
    let script = at.clone();
    machine.device = SimDevice::new(true, move |n| {
        (n == script.load(Ordering::SeqCst)).then_some(SimDeviceFault::Never)
    });
    let (cache, namespace) = machine.open();
    for name in 1..3 {
        save_durably(&cache, &namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
    }
    assert_eq!(parts(&load_prompt(&cache, &namespace, 1).await), (0, 6, 0));
    let submitted = |line: &&String| line.contains(" layer ");
    let submitted = machine.device.trace().iter().filter(submitted).count() as u64;
    // Three layers of this load, and three of the promotion that follows it: the second does not end.
    at.store(submitted + 4, Ordering::SeqCst);
    assert_eq!(parts(&load_prompt(&cache, &namespace, 1).await), (0, 6, 0));
    let report = soon(load_prompt(&cache, &namespace, 1)).await;
    assert_eq!((report.tokens, parts(&report)), (TOKENS, (0, 6, 0)));
    assert_eq!(
        cache.stats().index.device_blocks,
        0,
        "it is still on its way"
    );
}

/// A device whose word on codecs, which is asked for before a promotion, can be made a panic.
struct Speechless(SimDevice, Arc<AtomicBool>);

impl Device for Speechless {
    fn info(&self) -> DeviceInfo {
        self.0.info()
    }
    fn attach(&self, arena: &HostArena) -> Result<()> {
        self.0.attach(arena)
    }
    fn arena(&self, geometry: &KvGeometry, capacity_bytes: u64) -> Result<DeviceArena> {
        self.0.arena(geometry, capacity_bytes)
    }
    fn record(&self, stream: Stream) -> Result<Fence> {
        self.0.record(stream)
    }
    fn order(&self, stream: Stream, fence: &Fence) -> Result<()> {
        self.0.order(stream, fence)
    }
    fn decodes(&self, codec: CodecId) -> bool {
        assert!(!self.1.load(Ordering::SeqCst), "it was not to be asked now");
        self.0.decodes(codec)
    }
    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted> {
        self.0.submit(transfer, layer, after)
    }
}

#[tokio::test]
async fn a_loads_pages_are_free_whatever_becomes_of_the_promotion_behind_it() {
    let mut config = support::config(64);
    config.device.capacity_bytes = 6 * support::machine::DEVICE_CHUNK;
    let (sim, panics) = (SimDevice::sound(), Arc::new(AtomicBool::new(false)));
    let device = Speechless(sim.clone(), panics.clone());
    let cache = Cache::builder(config).device(Arc::new(device)).open();
    let cache = cache.expect("valid");
    let namespace = cache.namespace(&support::namespace()).expect("its own");
    let engine = Engine::new(128);
    for name in 1..3 {
        save_durably(&cache, &namespace, &engine, &prompt(name, TOKENS)).await;
    }
    panics.store(true, Ordering::SeqCst);
    let tokens = prompt(1, TOKENS);
    for _ in 0..3 {
        let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
        let table = engine.table(TOKENS);
        let load = cache.load(&lease, table.clone(), LoadOptions::default());
        let report = soon(load.expect("valid").finish()).await;
        assert_eq!((report.tokens, parts(&report)), (TOKENS, (0, 6, 0)));
        engine.verify(&table, &tokens, 0..TOKENS);
        engine.free(table);
    }
    // Nothing is left of those promotions: the next one goes its way.
    panics.store(false, Ordering::SeqCst);
    assert_balanced(&cache);
    let report = soon(load_prompt(&cache, &namespace, 1)).await;
    assert_eq!(report.tokens, TOKENS);
    let moved_up = async {
        while cache.stats().index.device_blocks < 6 || cache.stats().index.pins > 0 {
            tokio::task::yield_now().await;
        }
    };
    soon(moved_up).await;
    let report = soon(load_prompt(&cache, &namespace, 1)).await;
    assert_eq!((report.tokens, parts(&report)), (TOKENS, (6, 0, 0)));
    cache.close().await.expect("nothing hangs");
    assert_balanced(&cache);
}

/// Without threads it is the engine's one that ends a load, in the call that begins it.
#[tokio::test]
async fn what_moves_up_behind_a_load_is_not_planned_on_the_engines_thread() {
    let machine = Machine::with_device_tier(Mode::Inline, 6, 64);
    let (cache, namespace) = machine.open();
    let engine = Engine::new(64);
    for name in 1..3 {
        save_durably(&cache, &namespace, &engine, &prompt(name, TOKENS)).await;
    }
    let tokens = prompt(1, TOKENS);
    load_prompt(&cache, &namespace, 1).await;
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let before = machine.device.trace().len();
    let load = cache.load(&lease, engine.table(TOKENS), LoadOptions::default());
    let load = load.expect("valid");
    assert!(load.pages_free().is_free());
    let trace = machine.device.trace();
    let submitted = |line: &&String| line.contains(" layer ");
    let layers = trace[before..].iter().filter(submitted).count();
    assert_eq!(layers, 3, "those of the load alone: {trace:?}");
    assert_eq!(load.finish().await.host_blocks, 6);
    tokio::task::yield_now().await;
    assert_eq!(cache.stats().index.device_blocks, 6);
    drop(lease);
    assert_balanced(&cache);
    cache.close().await.expect("nothing hangs");
}
