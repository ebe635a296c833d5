//! What a load can be asked for: the part that pays, all but what the engine computes meanwhile, and
//! an end in time. Bytes are compared with the engine's own, and what is left out is still poisoned. And what
//! was computed from a load that turns out damaged is not saved.
#![cfg(feature = "sim")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use stemkv::{
    Cache, CacheBuilder, Durability, ErrorKind, Extent, Load, LoadOptions, LoadReport,
    OpenNamespace, PrefetchGoal, Save, Verdict,
};
use stemkv_store::{
    Clock, CodecId, Device, DeviceInfo, Fence, FencePoint, HostArena, LayerId, PageTable, SimClock,
    SimDevice, SimDeviceFault, SimDiskCall, SlabMove, SlabSums, Stream, Submitted, Transfer,
};
use support::machine::{Gate, Machine, Mode, assert_balanced, soon};
use support::{Engine, config, load, prompt, save};

/// Ten blocks; of the other prompt the first five are the same.
fn prompts() -> [Vec<u32>; 2] {
    let one = prompt(1, 40);
    let mut other = one.clone();
    other[20..].fill(7);
    [one, other]
}

/// A machine whose disk holds both prompts, and whose host tier is empty.
async fn with_both_on_disk() -> Machine {
    let machine = Machine::new(Mode::Threads, 64, 256);
    let (cache, namespace) = machine.open();
    for tokens in prompts() {
        let saved = save(&cache, &namespace, &Engine::new(64), &tokens).await;
        assert_eq!(saved.durable().await.undurable_blocks, 0);
    }
    cache.close().await.expect("nothing hangs");
    machine
}

async fn load_what_pays(
    cache: &Cache,
    namespace: &OpenNamespace,
    tokens: &[u32],
) -> (LoadReport, Verdict) {
    let engine = Engine::new(64);
    let lease = cache.lease(&mut namespace.prompt(tokens)).expect("open");
    let table = engine.table(tokens.len());
    let options = LoadOptions {
        extent: Extent::WhatPays,
        ..LoadOptions::default()
    };
    let load = cache.load(&lease, table.clone(), options).expect("valid");
    let report = load.finish().await;
    engine.verify(&table, tokens, 0..report.tokens);
    for token in report.tokens..tokens.len() {
        assert!(engine.is_untouched(&table, token), "token {token}");
    }
    let verdict = report.choice.as_ref().expect("asked for").verdict;
    (report, verdict)
}

/// Each layer takes 10 ms and each record 400 ms, as measured by the first load. A block has 4 tokens,
/// which the engine computes in 40 ms: more than from RAM, less than from disk.
#[tokio::test]
async fn a_load_takes_what_is_faster_loaded_than_computed_once_it_knows() {
    let mut machine = with_both_on_disk().await;
    let clock = machine.clock.clone();
    machine.device = SimDevice::new(true, move |_| {
        clock.advance(Duration::from_millis(10));
        None
    });
    machine.prefill = Some(100.0);
    let (cache, namespace) = machine.open();
    let clock = machine.clock.clone();
    machine.medium.on_call(move |call| {
        if call == SimDiskCall::Read {
            clock.advance(Duration::from_millis(400));
        }
    });
    let [one, other] = prompts();
    // Reads and copies one after the other: the clock is moved by both.
    let lease = cache.lease(&mut namespace.prompt(&one)).expect("open");
    let goal = PrefetchGoal::default();
    let fetched = cache.prefetch(&lease, goal).expect("open").finish().await;
    assert_eq!(fetched.read_blocks, 10);
    drop(lease);
    let (report, verdict) = load_what_pays(&cache, &namespace, &one).await;
    assert_eq!(verdict, Verdict::Unmeasured);
    assert_eq!((report.tokens, report.host_blocks), (40, 10));

    let (report, verdict) = load_what_pays(&cache, &namespace, &other).await;
    assert_eq!(verdict, Verdict::Part, "{report:?}");
    assert_eq!((report.tokens, report.host_blocks), (20, 5));
    assert_eq!((report.tokens_asked, report.cut), (40, None));
    let choice = report.choice.expect("asked for");
    assert!(choice.recompute_seconds.expect("known") > choice.load_seconds);
    assert_eq!(choice.slowest, Some("host"));

    // What was measured long ago speaks against nothing any more.
    machine.clock.advance(Duration::from_secs(60));
    let (report, verdict) = load_what_pays(&cache, &namespace, &other).await;
    assert_eq!((report.tokens, verdict), (40, Verdict::Unmeasured));
    assert!(machine.clock.now() > Duration::from_secs(60));
    assert_balanced(&cache);
}

#[tokio::test]
async fn what_the_engine_computes_before_it_is_submitted_is_not_loaded() {
    let machine = with_both_on_disk().await;
    let (cache, namespace) = machine.open();
    let engine = Engine::new(128);
    let [one, other] = prompts();
    // The first five blocks are in RAM, the others are not.
    support::load(&cache, &namespace, &engine, &one).await;
    let gate = Gate::close(&machine.medium, SimDiskCall::Read);
    let lease = cache.lease(&mut namespace.prompt(&other)).expect("open");
    let table = engine.table(40);
    let load = cache
        .load(&lease, table.clone(), LoadOptions::default())
        .expect("valid");
    gate.wait();
    assert_eq!(load.computed_up_to(27), 20..24, "whole blocks");
    assert_eq!(load.computed_up_to(12), 12..12, "those were submitted");
    assert_eq!(load.computed_up_to(32), 20..32);
    drop(gate);
    assert_eq!(soon(load.tokens()).await, 40);
    for layer in 0..3 {
        soon(load.layer(layer)).await.expect("both parts came");
    }
    let report = load.finish().await;
    assert_eq!((report.tokens, report.cut.as_deref()), (40, None));
    let parts = (
        report.host_blocks,
        report.disk_blocks,
        report.computed_blocks,
    );
    assert_eq!(parts, (5, 2, 3));
    engine.verify(&table, &other, 0..20);
    engine.verify(&table, &other, 32..40);
    assert!((20..32).all(|token| engine.is_untouched(&table, token)));
    drop(lease);
    assert_balanced(&cache);
}

#[tokio::test]
async fn an_engine_that_is_faster_than_the_disk_ends_the_load() {
    let machine = with_both_on_disk().await;
    let (cache, namespace) = machine.open();
    let engine = Engine::new(128);
    let [one, _] = prompts();
    let gate = Gate::close(&machine.medium, SimDiskCall::Read);
    let lease = cache.lease(&mut namespace.prompt(&one)).expect("open");
    let table = engine.table(40);
    let load = cache
        .load(&lease, table.clone(), LoadOptions::default())
        .expect("valid");
    gate.wait();
    assert_eq!(load.computed_up_to(40), 0..40);
    // Behind a disk that does not answer, all the same.
    let report = soon(load.finish()).await;
    assert_eq!((report.tokens, report.computed_blocks), (40, 10));
    assert_eq!((report.bytes, report.cut), (0, None));
    drop((lease, gate));
    cache.close().await.expect("nothing hangs");
    assert_balanced(&cache);
}

/// A point that is never reached.
struct Never;

impl FencePoint for Never {
    fn is_reached(&self) -> stemkv::Result<bool> {
        Ok(false)
    }
    fn wait(&self, _: Duration) -> stemkv::Result<bool> {
        Ok(false)
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// The CPU device waits for a load's fences before it begins; one of them never comes.
#[tokio::test]
async fn a_load_that_cannot_begin_in_time_ends_and_gives_its_pages_back() {
    let cache = Cache::open(support::config(64)).expect("valid");
    let namespace = cache.namespace(&support::namespace()).expect("its own");
    let engine = Engine::new(128);
    let [one, _] = prompts();
    drop(save(&cache, &namespace, &engine, &one).await);
    let lease = cache.lease(&mut namespace.prompt(&one)).expect("open");
    let table = engine.table(40);
    let options = LoadOptions {
        after: vec![Fence::new(Never)],
        deadline: Some(Duration::from_millis(20)),
        ..LoadOptions::default()
    };
    let load = cache.load(&lease, table.clone(), options).expect("valid");
    let error = soon(load.layer(0)).await.expect_err("it did not come");
    assert_eq!(error.kind(), stemkv::ErrorKind::Busy);
    soon(load.pages_free().wait()).await.expect("nothing moves");
    let report = load.finish().await;
    assert_eq!((report.tokens, report.cut.as_deref()), (0, Some("busy")));
    assert!((0..40).all(|token| engine.is_untouched(&table, token)));
}

#[tokio::test]
async fn a_deadline_beyond_all_time_is_none() {
    let machine = with_both_on_disk().await;
    machine.clock.advance(Duration::from_secs(1));
    let (cache, namespace) = machine.open();
    let [one, other] = prompts();
    let lease = cache.lease(&mut namespace.prompt(&other)).expect("open");
    let goal = PrefetchGoal {
        deadline: Some(Duration::MAX),
        ..PrefetchGoal::default()
    };
    let prefetch = cache.prefetch(&lease, goal).expect("open");
    assert_eq!(soon(prefetch.finish()).await.tokens, other.len());
    // Half from RAM and half from disk, then all from RAM.
    for _ in 0..2 {
        let engine = Engine::new(64);
        let lease = cache.lease(&mut namespace.prompt(&one)).expect("open");
        let table = engine.table(one.len());
        let options = LoadOptions {
            deadline: Some(Duration::MAX),
            ..LoadOptions::default()
        };
        let load = cache.load(&lease, table.clone(), options).expect("valid");
        assert_eq!(soon(load.finish()).await.tokens, one.len());
        engine.verify(&table, &one, 0..one.len());
    }
    drop(lease);
    assert_balanced(&cache);
}

/// A clock that panics once, when a task of the store has looked at it so many times.
struct Fuse {
    clock: Arc<SimClock>,
    looks: AtomicU64,
}

impl Clock for Fuse {
    fn now(&self) -> Duration {
        if std::thread::current().name() == Some("stemkv") {
            let left = self.looks.fetch_sub(1, Ordering::SeqCst);
            assert_ne!(left, 0, "the fuse burns");
        }
        self.clock.now()
    }
    fn unix_ms(&self) -> u64 {
        self.clock.unix_ms()
    }
}

#[tokio::test]
async fn a_load_ends_wherever_a_task_of_the_store_panics() {
    let [one, _] = prompts();
    let mut looks = 0;
    for _ in 0..1000 {
        let machine = with_both_on_disk().await;
        let fuse = Arc::new(Fuse {
            clock: machine.clock.clone(),
            looks: AtomicU64::new(u64::MAX),
        });
        let builder = machine.builder().clock(fuse.clone());
        let (cache, namespace) = machine.open_with(builder);
        fuse.looks.store(looks, Ordering::SeqCst);
        let engine = Engine::new(64);
        let lease = cache.lease(&mut namespace.prompt(&one)).expect("open");
        let table = engine.table(one.len());
        let load = cache.load(&lease, table.clone(), LoadOptions::default());
        let report = soon(load.expect("valid").finish()).await;
        engine.verify(&table, &one, 0..report.tokens);
        match fuse.looks.load(Ordering::SeqCst) <= looks {
            false => looks += 1,
            true if looks > 2 => {
                assert_eq!(report.tokens, one.len());
                return;
            }
            // The load was over before the task had looked so often.
            true => {}
        }
    }
    panic!("it is not looked at");
}

/// Each record takes 400 ms, but for the first, whose read panics: nobody asks for an hour after that.
#[tokio::test]
async fn a_disk_whose_read_panicked_is_idle_afterwards() {
    let mut machine = with_both_on_disk().await;
    let clock = machine.clock.clone();
    machine.device = SimDevice::new(true, move |_| {
        clock.advance(Duration::from_millis(10));
        None
    });
    let (cache, namespace) = machine.open();
    let (clock, has_panicked) = (machine.clock.clone(), AtomicBool::new(false));
    machine.medium.on_call(move |call| {
        if call == SimDiskCall::Read {
            let before = has_panicked.swap(true, Ordering::SeqCst);
            assert!(before, "the first read panics");
            clock.advance(Duration::from_millis(400));
        }
    });
    let [one, other] = prompts();
    let lease = cache.lease(&mut namespace.prompt(&one)).expect("open");
    for expected in [0, 10] {
        let prefetch = cache.prefetch(&lease, PrefetchGoal::default());
        let report = soon(prefetch.expect("open").finish()).await;
        assert_eq!(report.read_blocks, expected);
        if expected == 0 {
            // A read that panicked has ended before anybody is told so; one that did not may still be ending.
            machine.clock.advance(Duration::from_secs(3600));
        }
    }
    drop(lease);
    let report = support::load(&cache, &namespace, &Engine::new(64), &one).await;
    assert_eq!((report.tokens, report.host_blocks), (40, 10));
    // Five of its blocks are on disk alone.
    let matched = cache.match_prefix(&mut namespace.prompt(&other));
    assert_eq!((matched.tokens, matched.disk_tokens), (40, 20));
    let seconds = matched.load_seconds.expect("measured");
    assert!((1.9..2.1).contains(&seconds), "{seconds} s");
}

/// An engine that launches its passes ahead hands over more layers than may wait for the device: 4,098 of
/// 1,366 prompts, as 52 prompts of a model with 80 layers come to.
#[tokio::test]
async fn layers_of_saves_that_are_still_computed_keep_no_load_from_coming() {
    let machine = Machine::new(Mode::Threads, 2000, 256);
    let config = support::config(2000);
    let builder = Cache::builder(config).device(Arc::new(SimDevice::sound()));
    let (cache, namespace) = machine.open_with(builder);
    let engine = Engine::new(4096);
    let tokens = prompt(1, 24);
    drop(save(&cache, &namespace, &engine, &tokens).await);
    let computed = Told::default();
    let mut saves = Vec::new();
    for name in 2..1368 {
        let table = engine.table(4);
        let save = cache.save(&mut namespace.prompt(&prompt(name, 4)), table);
        let save = save.expect("open");
        for layer in 0..3 {
            let fence = Fence::new(computed.clone());
            save.layer(layer, fence).expect("each layer once");
        }
        saves.push(save);
    }
    let report = support::load(&cache, &namespace, &engine, &tokens).await;
    assert_eq!((report.tokens, report.cut), (24, None));
    computed.reach();
    for save in saves {
        // Over the bound a save is given up, and its pages are free at once.
        soon(save.pages_free().wait()).await.expect("it works");
    }
    assert_balanced(&cache);
}

/// What a load says is not coming must not come: the engine computes there, and saves it.
#[tokio::test]
async fn a_load_writes_nothing_behind_what_it_says_is_coming() {
    const TOKENS: usize = 24;
    let machine = Machine::with_device_tier(Mode::Threads, 2, 24);
    let (cache, namespace) = machine.open();
    let engine = Engine::new(64);
    let tokens = prompt(1, TOKENS);
    drop(save(&cache, &namespace, &engine, &tokens).await);
    cache.flush().await;
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    assert_eq!(lease.matched().device_tokens, 8);
    machine.device.hold();
    // The road over the link is full; the one within the device is not.
    let of_host = LoadOptions {
        from_token: 8,
        ..LoadOptions::default()
    };
    let shared = engine.table(TOKENS);
    let begin = |_| cache.load(&lease, shared.clone(), of_host.clone());
    let others: Vec<_> = (0..4096).map(begin).collect();
    let table = engine.table(TOKENS);
    let load = cache.load(&lease, table.clone(), LoadOptions::default());
    let load = load.expect("valid");
    let coming = soon(load.tokens()).await;
    let layer = soon(load.layer(0)).await;
    assert_eq!(layer.expect_err("not all can").kind(), ErrorKind::Busy);
    machine.device.release();
    let report = soon(load.finish()).await;
    engine.verify(&table, &tokens, 0..report.tokens);
    assert_eq!(report.cut.as_deref(), Some("busy"));
    for token in coming..TOKENS {
        assert!(engine.is_untouched(&table, token), "token {token}");
    }
    for other in others {
        soon(other.expect("valid").finish()).await;
    }
    drop(lease);
    assert_balanced(&cache);
}

/// Reached once the test says so.
#[derive(Clone, Default)]
struct Told(Arc<AtomicBool>);

impl Told {
    fn reach(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl FencePoint for Told {
    fn is_reached(&self) -> stemkv::Result<bool> {
        Ok(self.0.load(Ordering::SeqCst))
    }
    fn wait(&self, _: Duration) -> stemkv::Result<bool> {
        self.is_reached()
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

/// Two loads hold a chunk that is damaged in RAM; when the second finds out, a sound copy is there.
#[tokio::test]
async fn a_damaged_chunk_is_dropped_once_and_not_what_took_its_place() {
    let mut machine = Machine::new(Mode::Threads, 64, 64);
    // The first device saves three layers, and then loads a damaged one; so does the second one.
    let damaged = |at| SimDevice::new(true, move |n| (n == at).then_some(SimDeviceFault::Corrupt));
    (machine.device, machine.further) = (damaged(3), vec![damaged(0)]);
    let (cache, namespace) = machine.open();
    let engine = Engine::new(64);
    let tokens = prompt(1, 16);
    let saved = save(&cache, &namespace, &engine, &tokens).await;
    assert_eq!(saved.durable().await.durable_blocks, 4);
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let other = cache.on_device(1).expect("driven");
    machine.further[0].hold();
    let late = other.load(&lease, engine.table(16), LoadOptions::default());
    let late = late.expect("valid");
    assert_eq!(soon(late.tokens()).await, 16);
    let report = load(&cache, &namespace, &engine, &tokens).await;
    assert_eq!(
        (report.tokens, report.cut.as_deref()),
        (12, Some("corrupt"))
    );
    let report = load(&cache, &namespace, &engine, &tokens).await;
    assert_eq!((report.tokens, report.disk_blocks), (16, 1));
    machine.further[0].release();
    assert_eq!(soon(late.finish()).await.tokens, 12);
    let report = load(&cache, &namespace, &engine, &tokens).await;
    assert_eq!((report.tokens, report.disk_blocks), (16, 0), "it is in RAM");
    assert_eq!(cache.stats().counter("corrupt_blocks"), 1);
    drop((saved, lease));
    assert_balanced(&cache);
}

/// Compares what it loads on the way, as a GPU does: a layer is answered when it is submitted, and whether
/// it is damaged is known behind its fence.
struct Compares(SimDevice);

impl Device for Compares {
    fn info(&self) -> DeviceInfo {
        self.0.info()
    }
    fn attach(&self, arena: &HostArena) -> stemkv::Result<()> {
        self.0.attach(arena)
    }
    fn record(&self, stream: Stream) -> stemkv::Result<Fence> {
        self.0.record(stream)
    }
    fn order(&self, _: Stream, _: &Fence) -> stemkv::Result<()> {
        Ok(()) // The engine's stream waits, not the host.
    }
    fn decodes(&self, codec: CodecId) -> bool {
        self.0.decodes(codec)
    }
    fn submit(
        &self,
        transfer: &Transfer,
        layer: LayerId,
        after: &[Fence],
    ) -> stemkv::Result<Submitted> {
        let Submitted { fence, sums } = self.0.submit(transfer, layer, after)?;
        let is_load = |slab_move: &SlabMove| matches!(slab_move, SlabMove::Load { .. });
        let sums = match sums {
            SlabSums::AfterFence(ask) if transfer.moves().iter().all(is_load) => {
                let transfer = transfer.clone();
                let is_wrong = move |(slab_move, sum): (&SlabMove, _)| match slab_move {
                    SlabMove::Load { slot, .. } => {
                        slot.slab(layer).map(|slab| slab.checksum) != Some(sum)
                    }
                    _ => false,
                };
                SlabSums::Compared(Box::new(move || {
                    let sums = ask()?;
                    Ok(transfer.moves().iter().zip(sums).position(is_wrong))
                }))
            }
            sums => sums,
        };
        Ok(Submitted { fence, sums })
    }
}

/// A pass that loads four blocks, computes two with them and has handed all layers of those over, while
/// nobody knows yet whether what was loaded is sound.
struct Overlap {
    cache: Cache,
    namespace: OpenNamespace,
    engine: Engine,
    tokens: Vec<u32>,
    loading: Load,
    saving: Save,
    /// The loaded layers move behind it.
    told: Told,
}

impl Overlap {
    async fn begin(damaged: bool, build: impl FnOnce(CacheBuilder) -> CacheBuilder) -> Self {
        // The known blocks' save submits three layers, then comes the load's first one; behind it the two
        // take turns as they like.
        let script = move |n| (damaged && n == 3).then_some(SimDeviceFault::Corrupt);
        let device = Arc::new(Compares(SimDevice::new(true, script)));
        let builder = build(Cache::builder(config(64)).device(device));
        let cache = builder.open().expect("valid");
        let namespace = cache.namespace(&support::namespace()).expect("valid");
        let engine = Engine::new(128);
        let tokens = prompt(1, 24);
        drop(save(&cache, &namespace, &engine, &tokens[..16]).await);

        let table = engine.table(24);
        let known = cache.lease(&mut namespace.prompt(&tokens[..16]));
        let told = Told::default();
        let options = LoadOptions {
            after: vec![Fence::new(told.clone())],
            ..LoadOptions::default()
        };
        let loading = cache.load(&known.expect("open"), table.clone(), options);
        let loading = loading.expect("valid");
        assert_eq!(loading.tokens().await, 16);
        let saving = cache.save(&mut namespace.prompt(&tokens), table.clone());
        let saving = saving.expect("valid");
        assert_eq!(saving.report().new_blocks, 2);
        saving.computed_from(&loading).expect("in time");
        for layer in 0..3 {
            soon(loading.layer(layer)).await.expect("on its way");
            compute(&engine, &table, &tokens, LayerId(layer), damaged);
            saving.layer(layer, Fence::reached()).expect("once");
        }
        let late = saving.computed_from(&loading);
        let late = late.expect_err("it cannot be taken back any more");
        assert_eq!(late.kind(), ErrorKind::Invalid);
        Overlap {
            cache,
            namespace,
            engine,
            tokens,
            loading,
            saving,
            told,
        }
    }
}

/// The last eight tokens' KV in a layer: out of damaged KV it is anything but what is right.
fn compute(engine: &Engine, table: &PageTable, tokens: &[u32], layer: LayerId, damaged: bool) {
    let mut computed_with = tokens.to_vec();
    if damaged {
        computed_with[0] += 1;
    }
    engine.compute_layer(table, &computed_with, 16, layer);
}

#[tokio::test]
async fn what_was_computed_from_a_damaged_load_is_not_saved() {
    for (damaged, dropped) in [(false, false), (true, false), (false, true), (true, true)] {
        let overlap = Overlap::begin(damaged, |builder| builder).await;
        let Overlap {
            cache,
            namespace,
            engine,
            tokens,
            loading,
            saving,
            told,
        } = overlap;
        let free = saving.pages_free();
        soon(free.wait()).await.expect("the device works");
        let matched = cache.match_prefix(&mut namespace.prompt(&tokens));
        assert_eq!(
            (matched.tokens, matched.pending_tokens),
            (16, 8),
            "nobody knows"
        );
        let pending = cache.pending(&mut namespace.prompt(&tokens));
        let pending = pending.expect("in flight");
        let save = (!dropped).then_some(saving);
        told.reach();
        let report = soon(loading.finish()).await;
        assert_eq!(report.tokens, if damaged { 12 } else { 16 }, "{report:?}");
        soon(pending.wait()).await;
        if let Some(save) = save {
            let (abandoned_blocks, undurable_blocks) = if damaged { (2, 0) } else { (0, 2) };
            let durability = Durability {
                durable_blocks: 0,
                undurable_blocks,
                abandoned_blocks,
            };
            assert_eq!(soon(save.durable()).await, durability);
        }
        let abandoned = cache.stats().counter("abandoned_blocks");
        assert_eq!(abandoned, if damaged { 2 } else { 0 });
        let matched = cache.match_prefix(&mut namespace.prompt(&tokens));
        assert_eq!(matched.tokens, if damaged { 12 } else { 24 });
        // Computed anew where it was given up.
        drop(support::save(&cache, &namespace, &engine, &tokens).await);
        assert_eq!(load(&cache, &namespace, &engine, &tokens).await.tokens, 24);
        assert_balanced(&cache);
    }
}

#[tokio::test]
async fn a_close_waits_for_a_save_that_waits_for_its_load() {
    for damaged in [false, true] {
        let overlap = Overlap::begin(damaged, |builder| builder).await;
        soon(overlap.saving.pages_free().wait())
            .await
            .expect("the device works");
        let cache = overlap.cache.clone();
        let closing = std::thread::spawn(move || cache.close_blocking());
        while overlap
            .cache
            .lease(&mut overlap.namespace.prompt(&overlap.tokens))
            .is_ok()
        {
            tokio::task::yield_now().await;
        }
        drop(overlap.saving);
        overlap.told.reach();
        closing.join().expect("no panic").expect("nothing hangs");
        let saved = overlap.cache.stats().counter("saved_blocks");
        assert_eq!(saved, if damaged { 4 } else { 6 });
        drop(overlap.loading);
        assert_balanced(&overlap.cache);
    }
}

#[test]
fn a_save_that_waits_for_its_load_ends_with_its_runtime() {
    let mortal = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build()
        .expect("threads");
    let handle = mortal.handle().clone();
    let overlap = mortal.block_on(Overlap::begin(false, |builder| builder.runtime(handle)));
    let free = overlap.saving.pages_free();
    free.wait_blocking().expect("the device works");
    mortal.shutdown_background();
    assert_eq!(overlap.saving.durable_blocking().abandoned_blocks, 2);
    overlap.told.reach();
    assert_eq!(overlap.loading.finish_blocking().tokens, 16);
    drop(overlap.saving);
    assert_balanced(&overlap.cache);
}
