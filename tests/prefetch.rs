//! Prefetch through its stages, and over a queue of waiting requests: what arrives is used, what is
//! under way is joined, bounds hold, and whatever is dropped, nothing stays held.
#![cfg(feature = "sim")]

mod support;

use std::time::Duration;

use stemkv::{Cache, Lease, LoadOptions, LoadReport, LookAheadLimits, OpenNamespace, PrefetchGoal};
use stemkv_store::{SimDevice, SimDiskCall};
use support::machine::{CHUNK, DEVICE_CHUNK, Gate, Machine, Mode, assert_balanced, soon};
use support::{Engine, prompt, save};

/// Ten blocks each.
const TOKENS: usize = 40;

/// A machine whose disk holds prompts 1 to 3, and whose tiers in RAM are empty.
async fn with_prompts_on_disk(mode: Mode, device_chunks: u64) -> Machine {
    let mut machine = Machine::new(mode, 64, 256);
    machine.device_chunks = device_chunks;
    let (cache, namespace) = machine.open();
    for name in 1..4 {
        let saved = save(&cache, &namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
        assert_eq!(saved.durable().await.durable_blocks, 10);
    }
    cache.close().await.expect("nothing hangs");
    machine
}

fn lease(cache: &Cache, namespace: &OpenNamespace, name: u32) -> Lease {
    let tokens = prompt(name, TOKENS);
    cache.lease(&mut namespace.prompt(&tokens)).expect("open")
}

async fn load_leased(cache: &Cache, lease: &Lease, name: u32) -> LoadReport {
    let engine = Engine::new(64);
    let table = engine.table(TOKENS);
    let load = cache
        .load(lease, table.clone(), LoadOptions::default())
        .expect("valid");
    let report = soon(load.finish()).await;
    engine.verify(&table, &prompt(name, TOKENS), 0..report.tokens);
    report
}

fn to_the_device(chunks: u64) -> PrefetchGoal {
    PrefetchGoal {
        device_budget_bytes: chunks * DEVICE_CHUNK,
        ..PrefetchGoal::default()
    }
}

#[tokio::test]
async fn a_prefetch_goes_through_the_host_tier_into_the_device_tier_as_far_as_it_may() {
    for (budget, room, expected) in [(100, 16, 10), (4, 16, 4), (100, 6, 6), (0, 16, 0)] {
        let machine = with_prompts_on_disk(Mode::Threads, room).await;
        let (cache, namespace) = machine.open();
        let lease = lease(&cache, &namespace, 1);
        let prefetch = cache.prefetch(&lease, to_the_device(budget)).expect("open");
        let report = soon(prefetch.finish()).await;
        let tokens = (report.tokens, report.device_tokens);
        assert_eq!(
            tokens,
            (TOKENS, 4 * expected),
            "{budget} {room}: {report:?}"
        );
        assert_eq!((report.read_blocks, report.promoted_blocks), (10, expected));
        let report = load_leased(&cache, &lease, 1).await;
        assert_eq!((report.tokens, report.device_blocks), (TOKENS, expected));
        assert_eq!(report.disk_blocks, 0);
        drop(lease);
        assert_balanced(&cache);
        cache.close().await.expect("nothing hangs");
    }
}

/// The device reports a layer when it takes it: the chunks' way up has begun when the load comes.
#[tokio::test]
async fn a_load_does_not_wait_for_what_is_on_its_way_up() {
    let mut machine = with_prompts_on_disk(Mode::Inline, 16).await;
    machine.device = SimDevice::new(false, |_| None);
    let (cache, namespace) = machine.open();
    let lease = lease(&cache, &namespace, 1);
    let to_host = cache
        .prefetch(&lease, PrefetchGoal::default())
        .expect("open");
    assert_eq!(soon(to_host.finish()).await.tokens, TOKENS);
    machine.device.hold();
    let prefetch = cache.prefetch(&lease, to_the_device(10)).expect("open");
    while machine.device.trace().is_empty() {
        tokio::task::yield_now().await;
    }
    let engine = Engine::new(64);
    let table = engine.table(TOKENS);
    let load = cache
        .load(&lease, table.clone(), LoadOptions::default())
        .expect("valid");
    let submitted = machine.device.trace().len();
    assert_eq!(soon(load.tokens()).await, TOKENS);
    machine.device.release();
    cache.turn();
    let report = soon(load.finish()).await;
    assert_eq!((report.tokens, report.host_blocks), (TOKENS, 10));
    engine.verify(&table, &prompt(1, TOKENS), 0..TOKENS);
    assert_eq!(
        submitted, 6,
        "three layers on their way up, and at once three into the pages"
    );
    assert_eq!(soon(prefetch.finish()).await.device_tokens, TOKENS);
    drop(lease);
    assert_balanced(&cache);
}

#[tokio::test]
async fn a_prefetch_dropped_or_late_at_any_stage_lets_everything_go() {
    for (stage, late) in [(0, false), (0, true), (1, false), (1, true)] {
        let what = format!("stage {stage}, late={late}");
        let machine = with_prompts_on_disk(Mode::Threads, 16).await;
        let (cache, namespace) = machine.open();
        let lease = lease(&cache, &namespace, 1);
        let gate = (stage == 0).then(|| Gate::close(&machine.medium, SimDiskCall::Read));
        if stage == 1 {
            machine.device.hold();
        }
        let goal = PrefetchGoal {
            deadline: late.then_some(Duration::from_millis(5)),
            ..to_the_device(10)
        };
        let prefetch = cache.prefetch(&lease, goal).expect("open");
        match &gate {
            Some(gate) => gate.wait(),
            None => {
                while machine.device.trace().is_empty() && !prefetch.is_finished() {
                    std::thread::yield_now();
                    tokio::task::yield_now().await;
                }
            }
        }
        match late {
            // Behind a disk or a device that does not answer, all the same.
            true => assert_eq!(soon(prefetch.finish()).await.device_tokens, 0, "{what}"),
            false => drop(prefetch),
        }
        drop(gate);
        machine.device.release();
        let report = load_leased(&cache, &lease, 1).await;
        assert_eq!(report.tokens, TOKENS, "{what}");
        drop(lease);
        cache.close().await.expect("nothing hangs");
        assert_balanced(&cache);
    }
}

#[tokio::test]
async fn a_queue_of_waiting_requests_is_prefetched_in_its_order_and_within_its_bounds() {
    let machine = with_prompts_on_disk(Mode::Threads, 16).await;
    let (cache, namespace) = machine.open();
    let leases: Vec<Lease> = (1..4).map(|name| lease(&cache, &namespace, name)).collect();
    let look_ahead = cache.look_ahead(LookAheadLimits {
        host_bytes: 12 * CHUNK,
        device_bytes: 10 * DEVICE_CHUNK,
        deadline: None,
    });
    let finished = async |requests: usize| {
        let all = async {
            while look_ahead.report().finished < requests {
                tokio::task::yield_now().await;
            }
        };
        soon(all).await;
        look_ahead.report()
    };
    look_ahead.set(&leases).expect("open");
    let report = finished(2).await;
    assert_eq!((report.waiting, report.in_reach), (3, 2));
    assert_eq!(report.host_bytes, 12 * CHUNK);
    assert_eq!(report.device_bytes, 10 * DEVICE_CHUNK);
    let matched = |name: u32| {
        let tokens = prompt(name, TOKENS);
        let matched = cache.match_prefix(&mut namespace.prompt(&tokens));
        (
            matched.device_tokens,
            matched.host_tokens,
            matched.disk_tokens,
        )
    };
    assert_eq!(matched(1), (TOKENS, 0, 0));
    assert_eq!(matched(2), (0, 8, 32));
    assert_eq!(matched(3), (0, 0, TOKENS));

    // The first one is dispatched, and what it had is the next one's.
    let report = load_leased(&cache, &leases[0], 1).await;
    assert_eq!((report.tokens, report.device_blocks), (TOKENS, 10));
    look_ahead.set(&leases[1..]).expect("open");
    finished(2).await;
    assert_eq!(matched(2).2, 0);
    assert_eq!(matched(3), (0, 8, 32));

    // Given up: nothing is held for them.
    look_ahead.set(&[]).expect("open");
    assert_eq!(look_ahead.report().waiting, 0);
    drop((leases, look_ahead));
    assert_balanced(&cache);
    cache.close().await.expect("nothing hangs");
}
