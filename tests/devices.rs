//! Several devices on one store: what one saved the other loads, each has its own tier and its own order in
//! it, and what befalls one does not touch the other.
#![cfg(feature = "sim")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use stemkv::{
    Cache, ErrorKind, Extent, HostCodec, LoadOptions, LoadReport, OpenNamespace, PrefetchGoal,
};
use stemkv_store::*;
use support::devices::RawOnly;
use support::machine::{DEVICE_CHUNK, MODES, Machine, Mode, assert_balanced, soon};
use support::{Engine, config, load, namespace, prompt, save_durably};

/// Six blocks each.
const TOKENS: usize = 24;
const BLOCKS: usize = 6;

/// A machine of so many devices, and the store on it as each of them sees it.
fn open(machine: &mut Machine, devices: usize) -> (Vec<Cache>, OpenNamespace) {
    machine.further.resize_with(devices - 1, SimDevice::sound);
    let (cache, namespace) = machine.open();
    let on = |number| cache.on_device(number).expect("driven");
    ((0..devices).map(on).collect(), namespace)
}

async fn load_prompt(on: &Cache, namespace: &OpenNamespace, name: u32) -> LoadReport {
    let report = load(on, namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
    assert_eq!(report.tokens, TOKENS, "{report:?}");
    report
}

/// Blocks of a load by where they came from.
fn parts(report: &LoadReport) -> [usize; 3] {
    [report.device_blocks, report.host_blocks, report.disk_blocks]
}

/// Blocks in each device's tier.
fn on_devices(cache: &Cache) -> Vec<u64> {
    let stats = cache.stats();
    stats.devices.iter().map(|device| device.blocks).collect()
}

/// Tokens that each device finds in its own tier.
fn in_own_tiers(on: &[Cache], namespace: &OpenNamespace, name: u32) -> Vec<usize> {
    let tokens = prompt(name, TOKENS);
    let own = |cache: &Cache| {
        let matched = cache.match_prefix(&mut namespace.prompt(&tokens));
        assert_eq!(matched.device_tokens + matched.host_tokens, TOKENS);
        matched.device_tokens
    };
    on.iter().map(own).collect()
}

#[tokio::test]
async fn what_one_device_saved_all_load_and_each_has_its_own_copy_of_what_is_hot() {
    for devices in [2, 3] {
        let (on, namespace) = open(
            &mut Machine::with_device_tier(Mode::Inline, 12, 64),
            devices,
        );
        save_durably(&on[1], &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
        let expected: Vec<u64> = (0..devices).map(|it| 6 * u64::from(it == 1)).collect();
        assert_eq!(on_devices(&on[0]), expected);
        let own = in_own_tiers(&on, &namespace, 1);
        assert_eq!(own.iter().sum::<usize>(), TOKENS);
        assert_eq!(own[1], TOKENS);
        assert_eq!(
            parts(&load_prompt(&on[1], &namespace, 1).await),
            [BLOCKS, 0, 0]
        );
        // The second hit is what moves it up there, too.
        assert_eq!(
            parts(&load_prompt(&on[0], &namespace, 1).await),
            [0, BLOCKS, 0]
        );
        assert_eq!(
            parts(&load_prompt(&on[0], &namespace, 1).await),
            [BLOCKS, 0, 0]
        );
        assert_eq!(
            parts(&load_prompt(&on[1], &namespace, 1).await),
            [BLOCKS, 0, 0]
        );
        assert_eq!(on_devices(&on[0])[..2], [6, 6]);
        let stats = on[0].stats();
        assert_eq!(stats.index.device_blocks, 6, "blocks, not copies");
        assert_eq!(
            stats.device.expect("there is one").published_bytes,
            12 * DEVICE_CHUNK
        );
        assert_balanced(&on[0]);
        soon(on[0].close()).await.expect("nothing hangs");
        assert_balanced(&on[0]);
    }
}

#[tokio::test]
async fn a_device_makes_room_in_its_own_tier_alone() {
    let (on, namespace) = open(&mut Machine::with_device_tier(Mode::Inline, 12, 64), 2);
    save_durably(&on[0], &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
    for name in 2..6 {
        save_durably(&on[1], &namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
        assert_balanced(&on[0]);
    }
    assert_eq!(on_devices(&on[0]), [6, 12]);
    assert_eq!(on[0].stats().counter("evicted_device_blocks"), 12);
    // The coldest of all is still where nobody needed its room.
    assert_eq!(
        parts(&load_prompt(&on[0], &namespace, 1).await),
        [BLOCKS, 0, 0]
    );
    assert_eq!(
        parts(&load_prompt(&on[1], &namespace, 2).await),
        [0, BLOCKS, 0]
    );
    assert_eq!(
        parts(&load_prompt(&on[1], &namespace, 5).await),
        [BLOCKS, 0, 0]
    );
    soon(on[1].close()).await.expect("nothing hangs");
    assert_balanced(&on[0]);
}

/// No disk, and a host tier that holds less than a device's: devices come to hold chunks alone.
fn without_disk(
    mode: Mode,
    devices: &[SimDevice],
    host_chunks: u64,
) -> (Vec<Cache>, OpenNamespace) {
    let mut config = config(host_chunks);
    config.device.capacity_bytes = 14 * DEVICE_CHUNK;
    let all = devices
        .iter()
        .map(|device| Arc::new(device.clone()) as Arc<dyn Device>);
    let builder = Cache::builder(config).devices(all);
    let runtime = tokio::runtime::Handle::current();
    let builder = match mode {
        Mode::Threads => builder,
        Mode::Inline => builder.inline_on(runtime, || Duration::ZERO),
    };
    let cache = builder.open().expect("valid");
    let namespace = cache.namespace(&namespace()).expect("its own");
    let on = (0..devices.len()).map(|number| cache.on_device(number).expect("driven"));
    (on.collect(), namespace)
}

#[tokio::test]
async fn what_another_device_alone_has_comes_by_the_host_tier() {
    let (on, namespace) = without_disk(Mode::Inline, &[SimDevice::sound(), SimDevice::sound()], 8);
    save_durably(&on[0], &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
    save_durably(&on[0], &namespace, &Engine::new(64), &prompt(2, TOKENS)).await;
    assert_eq!(
        on[0].stats().index.host_blocks,
        8,
        "four are on the device alone"
    );
    let tokens = prompt(1, TOKENS);
    let matched = on[1].match_prefix(&mut namespace.prompt(&tokens));
    assert_eq!((matched.tokens, matched.device_tokens), (TOKENS, 0));
    assert_eq!(
        parts(&load_prompt(&on[1], &namespace, 1).await),
        [0, BLOCKS, 0]
    );
    assert!(on[0].stats().counter("demoted_blocks") >= 4);
    assert_balanced(&on[0]);
    for name in 3..20 {
        let one = name as usize % 2;
        save_durably(
            &on[one],
            &namespace,
            &Engine::new(64),
            &prompt(name, TOKENS),
        )
        .await;
        assert_balanced(&on[0]);
        load_prompt(&on[1 - one], &namespace, name).await;
        assert_balanced(&on[0]);
    }
    soon(on[0].close()).await.expect("nothing hangs");
    assert_balanced(&on[0]);
}

#[tokio::test]
async fn what_several_ask_of_another_device_comes_down_once() {
    let owner = SimDevice::sound();
    let devices = [owner.clone(), SimDevice::sound()];
    let (on, namespace) = without_disk(Mode::Threads, &devices, 14);
    save_durably(&on[0], &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
    save_durably(&on[0], &namespace, &Engine::new(64), &prompt(2, TOKENS)).await;
    // The host tier is filled with others, and the first two are on the device alone.
    for name in 3..6 {
        save_durably(&on[1], &namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
    }
    let tokens = prompt(1, TOKENS);
    let engine = Engine::new(64);
    let before = owner.trace().len();
    owner.hold();
    let loads: Vec<_> = (0..3)
        .map(|_| {
            let lease = on[1].lease(&mut namespace.prompt(&tokens)).expect("open");
            let table = engine.table(TOKENS);
            let load = on[1].load(&lease, table.clone(), LoadOptions::default());
            (lease, table, load.expect("valid"))
        })
        .collect();
    owner.release();
    for (lease, table, load) in loads {
        let report = soon(load.finish()).await;
        assert_eq!(report.tokens, TOKENS, "{report:?}");
        engine.verify(&table, &tokens, 0..TOKENS);
        engine.free(table);
        drop(lease);
    }
    let copied = owner.trace().split_off(before);
    let copied = copied.iter().filter(|line| line.contains("Save"));
    assert_eq!(copied.count(), support::geometry().layers as usize);
    assert_balanced(&on[0]);
    // And again, once it has gone from there.
    for name in 6..9 {
        save_durably(&on[1], &namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
    }
    load_prompt(&on[1], &namespace, 1).await;
    assert_balanced(&on[0]);
}

#[tokio::test]
async fn what_a_dead_device_alone_has_is_a_miss_for_the_others() {
    let died = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_dead = died.clone();
    let mortal = SimDevice::new(true, move |_| {
        let is_dead = is_dead.load(std::sync::atomic::Ordering::SeqCst);
        is_dead.then_some(SimDeviceFault::Submit)
    });
    let (on, namespace) = without_disk(Mode::Inline, &[mortal, SimDevice::sound()], 8);
    save_durably(&on[0], &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
    save_durably(&on[0], &namespace, &Engine::new(64), &prompt(2, TOKENS)).await;
    died.store(true, std::sync::atomic::Ordering::SeqCst);
    let engine = Engine::new(64);
    let report = load(&on[1], &namespace, &engine, &prompt(1, TOKENS)).await;
    assert!(report.tokens < TOKENS && report.cut.is_some(), "{report:?}");
    assert_balanced(&on[0]);
    // The living one goes on as ever.
    save_durably(&on[1], &namespace, &Engine::new(64), &prompt(3, TOKENS)).await;
    assert_eq!(
        parts(&load_prompt(&on[1], &namespace, 3).await),
        [BLOCKS, 0, 0]
    );
    let report = load(&on[0], &namespace, &engine, &prompt(3, TOKENS)).await;
    assert_eq!(
        (report.tokens, report.cut.as_deref()),
        (0, Some("unavailable"))
    );
    soon(on[0].close()).await.expect("nothing hangs");
    assert_balanced(&on[0]);
}

#[tokio::test]
async fn a_device_that_stands_still_holds_no_other_up() {
    let mut machine = Machine::with_device_tier(Mode::Threads, 12, 64);
    let (on, namespace) = open(&mut machine, 2);
    save_durably(&on[0], &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
    machine.device.hold();
    let engine = Engine::new(64);
    let tokens = prompt(1, TOKENS);
    let lease = on[0].lease(&mut namespace.prompt(&tokens)).expect("open");
    let table = engine.table(TOKENS);
    let options = LoadOptions::default();
    let stuck = on[0].load(&lease, table.clone(), options).expect("valid");
    let saving = on[0].save(
        &mut namespace.prompt(&prompt(7, TOKENS)),
        engine.table(TOKENS),
    );
    let saving = saving.expect("open");
    saving.all_layers(Fence::reached()).expect("once");
    for name in 2..5 {
        soon(save_durably(
            &on[1],
            &namespace,
            &Engine::new(64),
            &prompt(name, TOKENS),
        ))
        .await;
        soon(load_prompt(&on[1], &namespace, name)).await;
    }
    assert_eq!(
        parts(&soon(load_prompt(&on[1], &namespace, 1)).await),
        [0, BLOCKS, 0]
    );
    assert!(!stuck.pages_free().is_free() && !saving.pages_free().is_free());
    machine.device.release();
    assert_eq!(soon(stuck.finish()).await.tokens, TOKENS);
    engine.verify(&table, &tokens, 0..TOKENS);
    soon(saving.durable()).await;
    drop((lease, saving));
    soon(on[0].close()).await.expect("nothing hangs");
    assert_balanced(&on[0]);
}

/// Loads on both devices at once, dropped or leaked while nothing moves; then a close.
#[tokio::test]
async fn handles_may_be_dropped_or_leaked_on_every_device() {
    for mode in MODES {
        for is_leaked in [false, true] {
            let mut machine = Machine::with_device_tier(mode, 12, 64);
            let (on, namespace) = open(&mut machine, 3);
            save_durably(&on[0], &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
            let devices = || std::iter::once(&machine.device).chain(&machine.further);
            devices().for_each(SimDevice::hold);
            let tokens = prompt(1, TOKENS);
            let engine = Engine::new(128);
            let mut free = Vec::new();
            for cache in &on {
                let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
                let table = engine.table(TOKENS);
                let load = cache.load(&lease, table, LoadOptions::default());
                let load = load.expect("valid");
                free.push(load.pages_free());
                match is_leaked {
                    true => std::mem::forget(load),
                    false => drop(load),
                }
            }
            devices().for_each(SimDevice::release);
            on[0].turn();
            for pages in free {
                soon(pages.wait()).await.expect("the devices work");
            }
            soon(on[2].close()).await.expect("nothing hangs");
            assert_balanced(&on[0]);
            let lease = on[1].lease(&mut namespace.prompt(&tokens));
            assert_eq!(lease.expect_err("closed").kind(), ErrorKind::Closed);
        }
    }
}

#[tokio::test]
async fn a_prefetch_brings_chunks_into_the_tier_of_the_device_that_asked() {
    let mut machine = Machine::with_device_tier(Mode::Inline, 6, 64);
    let (on, namespace) = open(&mut machine, 2);
    for name in 1..3 {
        save_durably(&on[0], &namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
    }
    // The first device has this one in its tier.
    let tokens = prompt(2, TOKENS);
    let lease = on[1].lease(&mut namespace.prompt(&tokens)).expect("open");
    let goal = PrefetchGoal {
        device_budget_bytes: u64::MAX,
        ..PrefetchGoal::default()
    };
    let report = on[1].prefetch(&lease, goal).expect("open").finish().await;
    assert_eq!(
        (report.device_tokens, report.promoted_blocks),
        (TOKENS, BLOCKS)
    );
    assert_eq!(on_devices(&on[0]), [6, 6]);
    assert_eq!(in_own_tiers(&on, &namespace, 1), [0, 0]);
    assert_eq!(in_own_tiers(&on, &namespace, 2), [TOKENS, TOKENS]);
    drop(lease);
    soon(on[0].close()).await.expect("nothing hangs");
    assert_balanced(&on[0]);
}

/// Each device decides by its own link: what was measured of one says nothing of the other.
#[tokio::test]
async fn what_pays_is_decided_by_the_devices_own_speed() {
    let mut machine = Machine::with_device_tier(Mode::Inline, 0, 64);
    machine.prefill = Some(1e6);
    // A layer takes device 0 a second.
    let clock = machine.clock.clone();
    machine.device = SimDevice::new(true, move |_| {
        clock.advance(Duration::from_secs(1));
        None
    });
    let (on, namespace) = open(&mut machine, 2);
    save_durably(&on[0], &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
    load_prompt(&on[0], &namespace, 1).await;
    let lease = |on: &Cache| {
        let tokens = prompt(1, TOKENS);
        on.lease(&mut namespace.prompt(&tokens)).expect("open")
    };
    let engine = Engine::new(64);
    let options = || LoadOptions {
        extent: Extent::WhatPays,
        ..LoadOptions::default()
    };
    let mut verdicts = Vec::new();
    for cache in &on {
        let load = cache.load(&lease(cache), engine.table(TOKENS), options());
        let report = load.expect("valid").finish().await;
        verdicts.push(report.choice.expect("asked for").verdict);
    }
    use stemkv::Verdict::{Nothing, Unmeasured};
    assert_eq!(verdicts, [Nothing, Unmeasured]);
    let links = on[0].stats().devices;
    assert!(links[0].link_bytes_per_second.is_some() && links[1].link_bytes_per_second.is_none());
    soon(on[0].close()).await.expect("nothing hangs");
}

#[tokio::test]
async fn nothing_is_encoded_that_some_device_does_not_decode() {
    let mut config = config(64);
    config.host.codec = HostCodec::Lossless;
    let devices: [Arc<dyn Device>; 2] = [Arc::new(CpuDevice::new()), Arc::new(RawOnly::default())];
    let cache = Cache::builder(config)
        .devices(devices)
        .open()
        .expect("valid");
    let namespace = cache.namespace(&namespace()).expect("its own");
    let words: Vec<String> = cache
        .stats()
        .devices
        .into_iter()
        .map(|it| it.save)
        .collect();
    let expected = [
        "raw: another device does not decode",
        "raw: the device does not encode, or not fast enough for its link",
    ];
    assert_eq!(words, expected);
    save_durably(&cache, &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
    assert_eq!(cache.stats().counter("saved_encoded_blocks"), 0);
    let on = cache.on_device(1).expect("driven");
    assert_eq!(
        parts(&load_prompt(&on, &namespace, 1).await),
        [0, BLOCKS, 0]
    );
    cache.close().await.expect("nothing hangs");
}

#[tokio::test]
async fn what_does_not_fit_together_is_refused_with_words() {
    let refused = |devices: Vec<Arc<dyn Device>>| {
        let opened = Cache::builder(config(64)).devices(devices).open();
        let error = opened.err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.to_string()
    };
    assert!(refused(Vec::new()).contains("1 to 64 devices"));
    let twice: Arc<dyn Device> = Arc::new(SimDevice::sound());
    let words = refused(vec![twice.clone(), Arc::new(SimDevice::sound()), twice]);
    assert!(words.contains("device=2, first=0"), "{words}");

    let devices: [Arc<dyn Device>; 2] = [
        Arc::new(CpuDevice::new()),
        Arc::new(RawOnly {
            unreached_pages: Some(32),
            ..RawOnly::default()
        }),
    ];
    let cache = Cache::builder(config(64))
        .devices(devices)
        .open()
        .expect("valid");
    let error = cache.on_device(2).err().expect("there are two");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("device=2, devices=2"), "{error}");
    let on = cache.on_device(1).expect("driven");
    assert_eq!((cache.device(), on.device()), (0, 1));
    // Pages that the device does not reach, found out before anything moves.
    let namespace = cache.namespace(&namespace()).expect("its own");
    save_durably(&cache, &namespace, &Engine::new(64), &prompt(1, TOKENS)).await;
    let (engine, tokens) = (Engine::new(32), prompt(1, TOKENS));
    let mut path = namespace.prompt(&tokens);
    let lease = on.lease(&mut path).expect("open");
    let loaded = on.load(&lease, engine.table(TOKENS), LoadOptions::default());
    assert_eq!(loaded.err().expect("refused").kind(), ErrorKind::Invalid);
    let saved = on.save(&mut path, engine.table(TOKENS));
    assert_eq!(saved.err().expect("refused").kind(), ErrorKind::Invalid);
    drop(lease);
    assert_balanced(&cache);
    cache.close().await.expect("nothing hangs");
}
