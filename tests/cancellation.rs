//! Whatever is dropped, whenever: pins, slots and pending blocks come back, the store goes on, and
//! nobody who waits waits for ever (I7).
//!
//! How: every public future is polled k times and dropped, for every k until it completes, with the
//! device holding its copies back for the first polls; every handle is dropped, or forgotten, at
//! every stage, which gates before the device and the disk hold open. No test sleeps.
#![cfg(feature = "sim")]

mod support;

use std::pin::pin;
use std::task::{Context, Waker};

use stemkv::{Cache, LoadOptions, OpenNamespace, PrefetchGoal, Save};
use stemkv_store::{Fence, PageTable, SimDiskCall};
use support::machine::{Gate, Machine, Mode, assert_balanced, soon};
use support::{Engine, load, prompt, save};

const TOKENS: usize = 40;

/// A machine whose disk holds prompt 1, and whose tiers in RAM are empty.
async fn with_a_prompt_on_disk(mode: Mode) -> Machine {
    with_tiers(mode, 0).await
}

/// The same with a device tier of some chunks.
async fn with_tiers(mode: Mode, device_chunks: u64) -> Machine {
    let mut machine = Machine::new(mode, 24, 256);
    machine.device_chunks = device_chunks;
    let (cache, namespace) = machine.open();
    let saved = save(&cache, &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
    assert_eq!(saved.durable().await.durable_blocks, 10);
    drop(saved);
    cache.close().await.expect("nothing hangs");
    machine
}

/// Begins to save prompt `name`; its pages are not given back.
fn begin_save(
    cache: &Cache,
    namespace: &OpenNamespace,
    engine: &Engine,
    name: u32,
) -> (Save, PageTable) {
    let tokens = prompt(name, TOKENS);
    let table = engine.table(TOKENS);
    engine.compute(&table, &tokens, 0);
    let save = cache.save(&mut namespace.prompt(&tokens), table.clone());
    (save.expect("open"), table)
}

#[track_caller]
fn all_layers(save: &Save) {
    save.all_layers(Fence::reached()).expect("once");
}

/// The store works: what is on disk comes back, and something new can be saved and loaded.
async fn assert_works(cache: &Cache, namespace: &OpenNamespace, what: &str) {
    let engine = Engine::new(128);
    let report = load(cache, namespace, &engine, &prompt(1, TOKENS)).await;
    assert_eq!(report.tokens, TOKENS, "{what}: {report:?}");
    let saved = save(cache, namespace, &engine, &prompt(9, TOKENS)).await;
    assert_eq!(saved.report().declined_blocks, 0, "{what}");
    drop(saved);
    let report = load(cache, namespace, &engine, &prompt(9, TOKENS)).await;
    assert_eq!(report.tokens, TOKENS, "{what}: {report:?}");
}

/// Polls a future `polls` times, the runtime's other tasks in between, and lets the device move what
/// it holds after the third. Did it end?
async fn poll_times<F: Future>(future: F, polls: usize, machine: &Machine, cache: &Cache) -> bool {
    let mut future = pin!(future);
    for poll in 0..polls {
        let mut context = Context::from_waker(Waker::noop());
        if future.as_mut().poll(&mut context).is_ready() {
            return true;
        }
        tokio::task::yield_now().await;
        if poll == 3 {
            machine.device.release();
            cache.turn();
        }
    }
    false
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Waited {
    LoadTokens,
    LoadLayer,
    LoadFinish,
    LoadPagesFree,
    PrefetchFinish,
    SavePagesFree,
    SaveDurable,
    Pending,
    Flush,
    Compact,
    Close,
}

const WAITED: [Waited; 11] = [
    Waited::LoadTokens,
    Waited::LoadLayer,
    Waited::LoadFinish,
    Waited::LoadPagesFree,
    Waited::PrefetchFinish,
    Waited::SavePagesFree,
    Waited::SaveDurable,
    Waited::Pending,
    Waited::Flush,
    Waited::Compact,
    Waited::Close,
];

/// Begins everything at once, waits for one of them for some polls, and drops it all. Did it end?
async fn wait_and_drop(
    waited: Waited,
    polls: usize,
    machine: &Machine,
    (cache, namespace): (&Cache, &OpenNamespace),
    engine: &Engine,
) -> bool {
    let tokens = prompt(1, TOKENS);
    machine.device.hold();
    let (save, _pages) = begin_save(cache, namespace, engine, 2);
    all_layers(&save);
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let goal = PrefetchGoal {
        device_budget_bytes: u64::MAX,
        ..PrefetchGoal::default()
    };
    let prefetch = cache.prefetch(&lease, goal).expect("open");
    let load = cache
        .load(&lease, engine.table(TOKENS), LoadOptions::default())
        .expect("valid");
    drop(lease);
    let pending = cache
        .pending(&mut namespace.prompt(&prompt(2, TOKENS)))
        .expect("the save is in flight");
    match waited {
        Waited::LoadTokens => poll_times(load.tokens(), polls, machine, cache).await,
        Waited::LoadLayer => poll_times(load.layer(1), polls, machine, cache).await,
        Waited::LoadFinish => poll_times(load.finish(), polls, machine, cache).await,
        Waited::LoadPagesFree => poll_times(load.pages_free().wait(), polls, machine, cache).await,
        Waited::PrefetchFinish => poll_times(prefetch.finish(), polls, machine, cache).await,
        Waited::SavePagesFree => poll_times(save.pages_free().wait(), polls, machine, cache).await,
        Waited::SaveDurable => poll_times(save.durable(), polls, machine, cache).await,
        Waited::Pending => poll_times(pending.wait(), polls, machine, cache).await,
        Waited::Flush => poll_times(cache.flush(), polls, machine, cache).await,
        Waited::Compact => poll_times(cache.compact(1 << 20), polls, machine, cache).await,
        Waited::Close => poll_times(cache.close(), polls, machine, cache).await,
    }
}

#[tokio::test]
async fn every_future_can_be_dropped_after_every_poll() {
    for (waited, device_chunks) in WAITED
        .into_iter()
        .flat_map(|waited| [(waited, 0), (waited, 16)])
    {
        let mut polls = 0;
        loop {
            let what = format!("{waited:?} after {polls} polls, {device_chunks} on the device");
            let machine = with_tiers(Mode::Inline, device_chunks).await;
            let engine = Engine::new(256);
            let (cache, namespace) = machine.open();
            let store = (&cache, &namespace);
            let ended = wait_and_drop(waited, polls, &machine, store, &engine).await;
            machine.device.release();
            cache.turn();
            if waited == Waited::Close {
                // Refuses new work from its first poll on; a second close ends what it began.
                cache.close().await.expect("nothing hangs");
                let (cache, namespace) = machine.open();
                assert_works(&cache, &namespace, &what).await;
                cache.flush().await;
                assert_balanced(&cache);
                cache.close().await.expect("nothing hangs");
            } else {
                cache.flush().await;
                assert_works(&cache, &namespace, &what).await;
                cache.flush().await;
                assert_balanced(&cache);
                let report = load(&cache, &namespace, &engine, &prompt(2, TOKENS)).await;
                assert_eq!(
                    report.tokens, TOKENS,
                    "{what}: all layers were handed over, so the save completes"
                );
                cache.close().await.expect("nothing hangs");
                assert_balanced(&cache);
            }
            if ended {
                break;
            }
            polls += 1;
            assert!(polls < 500, "{what}: it never ends");
        }
    }
}

/// A store that was used, with everything of the test's dropped: nothing is held, and after a
/// restart prompt 2 is there or not, as `saved` says.
async fn assert_nothing_is_held(
    machine: &Machine,
    cache: Cache,
    namespace: OpenNamespace,
    saved: bool,
    what: &str,
) {
    assert_works(&cache, &namespace, what).await;
    cache.close().await.expect("nothing hangs");
    assert_balanced(&cache);
    drop((cache, namespace));
    let (cache, namespace) = machine.open();
    assert_works(&cache, &namespace, what).await;
    let engine = Engine::new(64);
    let report = load(&cache, &namespace, &engine, &prompt(2, TOKENS)).await;
    assert_eq!(report.tokens, if saved { TOKENS } else { 0 }, "{what}");
    cache.close().await.expect("nothing hangs");
    assert_balanced(&cache);
}

#[tokio::test]
async fn a_save_dropped_before_its_last_layer_is_given_up() {
    for layers in 0..3 {
        for held in [false, true] {
            let what = format!("{layers} layers, held={held}");
            let machine = with_a_prompt_on_disk(Mode::Threads).await;
            let (cache, namespace) = machine.open();
            let engine = Engine::new(128);
            if held {
                machine.device.hold();
            }
            let (save, _pages) = begin_save(&cache, &namespace, &engine, 2);
            for layer in 0..layers {
                save.layer(layer, Fence::reached()).expect("once");
            }
            let pages = save.pages_free();
            let pending = cache
                .pending(&mut namespace.prompt(&prompt(2, TOKENS)))
                .expect("in flight");
            drop(save);
            assert!(!held || layers == 0 || !pages.is_free(), "{what}");
            machine.device.release();
            pages.wait().await.expect("the device works");
            pending.wait().await;
            assert_balanced(&cache);
            assert_nothing_is_held(&machine, cache, namespace, false, &what).await;
        }
    }
}

#[tokio::test]
async fn a_save_dropped_after_its_last_layer_completes() {
    for gate in [None, Some(SimDiskCall::Append), Some(SimDiskCall::Sync)] {
        let what = format!("{gate:?}");
        let machine = with_a_prompt_on_disk(Mode::Threads).await;
        let (cache, namespace) = machine.open();
        let engine = Engine::new(128);
        let gate = gate.map(|kind| Gate::close(&machine.medium, kind));
        if gate.is_none() {
            machine.device.hold();
        }
        let (save, _pages) = begin_save(&cache, &namespace, &engine, 2);
        all_layers(&save);
        if let Some(gate) = &gate {
            gate.wait();
        }
        let pages = save.pages_free();
        drop(save);
        assert_eq!(pages.is_free(), gate.is_some(), "{what}");
        machine.device.release();
        pages.wait().await.expect("the device works");
        drop(gate);
        assert_nothing_is_held(&machine, cache, namespace, true, &what).await;
    }
}

#[tokio::test]
async fn loads_and_prefetches_dropped_behind_a_gate_let_everything_go() {
    let tokens = prompt(1, TOKENS);
    for handles in 1..8 {
        let what = format!("handles {handles:03b}");
        let machine = with_a_prompt_on_disk(Mode::Threads).await;
        let (cache, namespace) = machine.open();
        let engine = Engine::new(128);
        let gate = Gate::close(&machine.medium, SimDiskCall::Read);
        let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
        // Each handle alone, and together: they share the flights.
        let prefetch = (handles & 1 != 0).then(|| {
            cache
                .prefetch(&lease, PrefetchGoal::default())
                .expect("open")
        });
        let begin = || {
            cache
                .load(&lease, engine.table(TOKENS), LoadOptions::default())
                .expect("valid")
        };
        let first = (handles & 2 != 0).then(begin);
        let second = (handles & 4 != 0).then(begin);
        gate.wait();
        drop((prefetch, first));
        drop(lease);
        // One that stays is not disturbed by those that went.
        let stays = second.map(|load| std::thread::spawn(move || load.finish_blocking()));
        drop(gate);
        if let Some(stays) = stays {
            assert_eq!(stays.join().expect("no panic").tokens, TOKENS, "{what}");
        }
        assert_nothing_is_held(&machine, cache, namespace, false, &what).await;
    }
}

#[tokio::test]
async fn a_load_dropped_while_the_device_copies_gives_its_pages_back_after_the_copy() {
    let tokens = prompt(1, TOKENS);
    let machine = with_a_prompt_on_disk(Mode::Threads).await;
    let (cache, namespace) = machine.open();
    let engine = Engine::new(128);
    load(&cache, &namespace, &engine, &tokens).await;
    machine.device.hold();
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let load = cache
        .load(&lease, engine.table(TOKENS), LoadOptions::default())
        .expect("valid");
    drop(lease);
    while machine
        .device
        .trace()
        .iter()
        .all(|line| !line.contains("Load layer 0"))
    {
        std::thread::yield_now();
    }
    let pages = load.cancel();
    assert!(!pages.is_free(), "a copy is under way");
    machine.device.release();
    pages.wait().await.expect("the device works");
    assert_balanced(&cache);
    assert_nothing_is_held(&machine, cache, namespace, false, "a load").await;
}

#[tokio::test]
async fn what_a_dropped_load_or_prefetch_has_not_begun_to_read_is_not_read() {
    let mut machine = Machine::new(Mode::Threads, 64, 256);
    machine.disk.reads_in_flight = 1;
    let (cache, namespace) = machine.open();
    let engine = Engine::new(256);
    for name in 1..4 {
        drop(save(&cache, &namespace, &engine, &prompt(name, TOKENS)).await);
    }
    cache.close().await.expect("nothing hangs");
    let (cache, namespace) = machine.open();
    let gate = Gate::close(&machine.medium, SimDiskCall::Read);
    let lease = |name| {
        let tokens = prompt(name, TOKENS);
        cache.lease(&mut namespace.prompt(&tokens)).expect("open")
    };
    let begin = |name| {
        let options = LoadOptions::default();
        let load = cache.load(&lease(name), engine.table(TOKENS), options);
        load.expect("valid")
    };
    let first = begin(1);
    gate.wait();
    let second = begin(2);
    let goal = PrefetchGoal::default();
    let third = cache.prefetch(&lease(3), goal).expect("open");
    let pages = second.cancel();
    drop(third);
    // Behind a disk that does not answer, all the same.
    soon(pages.wait()).await.expect("the device works");
    drop(gate);
    assert_eq!(first.finish().await.tokens, TOKENS);
    cache.close().await.expect("nothing hangs");
    assert_balanced(&cache);
    let trace = machine.medium.trace();
    let reads = trace.lines().filter(|line| line.contains(" Read "));
    assert_eq!(reads.count(), 10, "of the first alone");
}

#[tokio::test]
async fn a_load_that_is_done_pins_nothing_although_its_handle_lives() {
    let machine = with_a_prompt_on_disk(Mode::Threads).await;
    let (cache, namespace) = machine.open();
    let engine = Engine::new(64);
    let tokens = prompt(1, TOKENS);
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let load = cache
        .load(&lease, engine.table(TOKENS), LoadOptions::default())
        .expect("valid");
    drop(lease);
    load.pages_free().wait().await.expect("the device works");
    assert_balanced(&cache);
    assert_eq!(load.finish().await.tokens, TOKENS);
}

#[tokio::test]
async fn close_ends_whatever_is_under_way() {
    // Everything in flight at once, none of it held by a gate when the store closes.
    let machine = with_a_prompt_on_disk(Mode::Threads).await;
    let (cache, namespace) = machine.open();
    let engine = Engine::new(256);
    let tokens = prompt(1, TOKENS);
    let (whole, _pages) = begin_save(&cache, &namespace, &engine, 2);
    let (part, _more_pages) = begin_save(&cache, &namespace, &engine, 3);
    part.layer(0, Fence::reached()).expect("once");
    all_layers(&whole);
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let prefetch = cache
        .prefetch(&lease, PrefetchGoal::default())
        .expect("open");
    let table = engine.table(TOKENS);
    let load = cache
        .load(&lease, table.clone(), LoadOptions::default())
        .expect("valid");
    cache.close().await.expect("nothing hangs");
    assert_eq!(whole.durable().await.durable_blocks, 10);
    part.layer(1, Fence::reached())
        .expect("the engine need not know");
    part.layer(2, Fence::reached())
        .expect("the engine need not know");
    assert_eq!(part.durable().await.abandoned_blocks, 10);
    part.pages_free().wait().await.expect("the device works");
    prefetch.finish().await;
    let report = load.finish().await;
    engine.verify(&table, &tokens, 0..report.tokens);
    drop((whole, part, lease));
    assert_balanced(&cache);
    drop((cache, namespace));
    let (cache, namespace) = machine.open();
    assert_nothing_is_held(&machine, cache, namespace, true, "close").await;
}

#[tokio::test]
async fn forgotten_handles_cost_room_and_nothing_else() {
    let machine = with_a_prompt_on_disk(Mode::Threads).await;
    let (cache, namespace) = machine.open();
    let engine = Engine::new(512);
    let tokens = prompt(1, TOKENS);
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    std::mem::forget(
        cache
            .prefetch(&lease, PrefetchGoal::default())
            .expect("open"),
    );
    let table = engine.table(TOKENS);
    let load = cache
        .load(&lease, table.clone(), LoadOptions::default())
        .expect("valid");
    let pages = load.pages_free();
    std::mem::forget(load);
    pages.wait().await.expect("the device works");
    engine.verify(&table, &tokens, 0..TOKENS);
    std::mem::forget(lease);
    let (part, _pages) = begin_save(&cache, &namespace, &engine, 2);
    part.layer(0, Fence::reached()).expect("once");
    std::mem::forget(part);

    // Ten chunks of 24 are leased for ever and ten pending for ever: four are left to use.
    for name in 3..9 {
        let saved = save(&cache, &namespace, &engine, &prompt(name, TOKENS)).await;
        assert_eq!(saved.report().new_blocks, 4);
        assert_eq!(saved.durable().await.durable_blocks, 4);
        drop(saved);
        let report = support::load(&cache, &namespace, &engine, &prompt(name, TOKENS)).await;
        assert_eq!(report.tokens, 16);
        let report = support::load(&cache, &namespace, &engine, &tokens).await;
        assert_eq!(report.tokens, TOKENS);
        let report = support::load(&cache, &namespace, &engine, &prompt(2, TOKENS)).await;
        assert_eq!(report.tokens, 0, "never published");
        cache.check();
    }
    cache.close().await.expect("nothing hangs");
    drop((cache, namespace));
    let (cache, namespace) = machine.open();
    assert_nothing_is_held(&machine, cache, namespace, false, "forgotten").await;
}

#[test]
fn a_runtime_that_ends_takes_nobody_with_it() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_time()
            .build()
            .expect("threads")
    };
    let machine = pollster::block_on(with_a_prompt_on_disk(Mode::Threads));
    let engine = Engine::new(256);
    let tokens = prompt(1, TOKENS);

    let mortal = runtime();
    let (cache, namespace) = machine.open_with(machine.builder().runtime(mortal.handle().clone()));
    let gate = Gate::close(&machine.medium, SimDiskCall::Read);
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let begin = |table| {
        cache
            .load(&lease, table, LoadOptions::default())
            .expect("valid")
    };
    let prefetch = cache
        .prefetch(&lease, PrefetchGoal::default())
        .expect("open");
    let load = begin(engine.table(TOKENS));
    gate.wait();
    mortal.shutdown_background();
    assert_eq!(prefetch.finish_blocking().tokens, 0);
    assert_eq!(load.tokens_blocking(), 0);
    let report = load.finish_blocking();
    assert_eq!(
        (report.tokens, report.cut.as_deref()),
        (0, Some("unavailable"))
    );
    // Begun when there is no runtime any more.
    assert_eq!(begin(engine.table(TOKENS)).finish_blocking().tokens, 0);
    drop(gate);
    drop((lease, cache));

    let machine = pollster::block_on(with_a_prompt_on_disk(Mode::Threads));
    let mortal = runtime();
    let (cache, namespace) = machine.open_with(machine.builder().runtime(mortal.handle().clone()));
    let gate = Gate::close(&machine.medium, SimDiskCall::Append);
    let (writing, _pages) = begin_save(&cache, &namespace, &engine, 2);
    all_layers(&writing);
    gate.wait();
    let (queued, _more_pages) = begin_save(&cache, &namespace, &engine, 3);
    all_layers(&queued);
    queued
        .pages_free()
        .wait_blocking()
        .expect("the device works");
    mortal.shutdown_background();
    assert_eq!(writing.durable_blocking().undurable_blocks, 10);
    assert_eq!(queued.durable_blocking().undurable_blocks, 10);
    cache.flush_blocking();
    drop(gate);
    drop((writing, queued));
    assert_balanced(&cache);
}
