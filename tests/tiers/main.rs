//! Host and disk tier together: what was durable comes back byte for byte after any restart, and
//! whatever the disk does, the answer is a miss or a shorter load, never a wrong byte or a hang.
//!
//! How: the whole store over a simulated disk, with its threads and without; the test engine's KV of
//! a token depends on every token up to it (`support`), so a wrong hit is a wrong byte. Slow disks
//! are gates that the test opens, not time.
#![cfg(feature = "sim")]

mod batches;
mod declined;
mod describing;
mod failing;
mod hanging;
#[path = "../support/mod.rs"]
mod support;
mod writing;

use std::sync::Arc;
use std::time::{Duration, Instant};

use stemkv::{Cache, LoadOptions, LoadReport, OpenNamespace, PrefetchGoal};
use stemkv_store::{DiskTier, RecordHeader, RecordInfo, SimDiskCall, SimMedium};
use support::machine::{CHUNK, Gate, MODES, Machine, Mode, assert_balanced, soon};
use support::{Engine, load, prompt, save, save_durably};
use tokio::runtime::Handle;

async fn load_all(cache: &Cache, namespace: &OpenNamespace, tokens: &[u32]) -> LoadReport {
    load(cache, namespace, &Engine::new(512), tokens).await
}

fn poll_once<F: Future>(future: std::pin::Pin<&mut F>) -> std::task::Poll<F::Output> {
    future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
}

fn reads(medium: &SimMedium) -> usize {
    medium
        .trace()
        .lines()
        .filter(|line| line.contains(" Read "))
        .count()
}

#[tokio::test]
async fn what_was_durable_is_there_after_a_restart() {
    for mode in MODES {
        let machine = Machine::new(mode, 64, 256);
        let engine = Engine::new(512);
        let (tokens, mut fork) = (prompt(1, 40), prompt(1, 40));
        fork[22..].fill(7);
        let (cache, namespace) = machine.open();
        assert_eq!(
            save_durably(&cache, &namespace, &engine, &tokens).await,
            10,
            "{mode:?}"
        );
        assert_eq!(save_durably(&cache, &namespace, &engine, &fork).await, 5);
        assert_balanced(&cache);
        cache.close().await.expect("nothing hangs");

        let (cache, namespace) = machine.open();
        let matched = cache.match_prefix(&mut namespace.prompt(&tokens));
        assert_eq!(
            (matched.tokens, matched.disk_tokens),
            (40, 40),
            "the index needs no payload"
        );
        let report = load_all(&cache, &namespace, &tokens).await;
        assert_eq!((report.tokens, report.disk_blocks), (40, 10));
        let report = load_all(&cache, &namespace, &fork).await;
        assert_eq!(
            (report.tokens, report.disk_blocks, report.host_blocks),
            (40, 5, 5),
            "promoted"
        );
        assert_eq!(reads(&machine.medium), 15, "each record once");
        assert_eq!(load_all(&cache, &namespace, &prompt(2, 40)).await.tokens, 0);
        let known = save(&cache, &namespace, &engine, &tokens).await;
        assert_eq!(known.report().new_blocks, 0, "nothing is saved twice");
        drop(known);
        assert_balanced(&cache);
        cache.close().await.expect("nothing hangs");
    }
}

#[tokio::test]
async fn a_prefetch_brings_what_the_load_then_finds_in_ram() {
    for mode in MODES {
        let machine = Machine::new(mode, 64, 256);
        let (cache, namespace) = machine.open();
        let tokens = prompt(1, 40);
        save_durably(&cache, &namespace, &Engine::new(64), &tokens).await;
        cache.close().await.expect("nothing hangs");
        let (cache, namespace) = machine.open();
        let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
        let goal = PrefetchGoal {
            budget_bytes: 4 * CHUNK,
            ..PrefetchGoal::default()
        };
        let report = cache.prefetch(&lease, goal).expect("open").finish().await;
        assert_eq!(
            (report.tokens, report.read_blocks, report.missing_blocks),
            (16, 4, 6)
        );
        let goal = PrefetchGoal::default();
        let report = cache.prefetch(&lease, goal).expect("open").finish().await;
        assert_eq!(
            (report.tokens, report.read_blocks, report.missing_blocks),
            (40, 6, 0)
        );
        let report = load_all(&cache, &namespace, &tokens).await;
        assert_eq!(
            (report.tokens, report.host_blocks, report.disk_blocks),
            (40, 10, 0)
        );
        drop(lease);
        assert_balanced(&cache);
        cache.close().await.expect("nothing hangs");
    }
}

#[tokio::test]
async fn more_than_the_host_tier_holds_comes_from_disk() {
    for mode in MODES {
        let machine = Machine::new(mode, 12, 256);
        let engine = Engine::new(512);
        let (cache, namespace) = machine.open();
        for name in 0..8 {
            let durable = save_durably(&cache, &namespace, &engine, &prompt(name, 40)).await;
            assert_eq!(durable, 10, "{mode:?} {name}");
        }
        let before = cache.stats();
        assert_eq!(before.index.blocks, 80);
        assert!(before.index.host_blocks <= 12);
        for _ in 0..2 {
            for name in 0..8 {
                let report = load_all(&cache, &namespace, &prompt(name, 40)).await;
                assert_eq!((report.tokens, report.cut), (40, None), "{mode:?} {name}");
            }
        }
        assert!(cache.stats().counter("promoted_blocks") >= 140);
        assert_balanced(&cache);
        cache.close().await.expect("nothing hangs");
    }
}

#[tokio::test]
async fn two_loads_of_one_prefix_read_each_record_once() {
    let machine = Machine::new(Mode::Threads, 64, 256);
    let (cache, namespace) = machine.open();
    let (tokens, mut fork) = (prompt(1, 40), prompt(1, 40));
    fork[20..].fill(7);
    let engine = Engine::new(512);
    save_durably(&cache, &namespace, &engine, &tokens).await;
    save_durably(&cache, &namespace, &engine, &fork).await;
    cache.close().await.expect("nothing hangs");

    let (cache, namespace) = machine.open();
    let gate = Gate::close(&machine.medium, SimDiskCall::Read);
    let mut loads = Vec::new();
    for tokens in [&tokens, &fork, &tokens] {
        let lease = cache.lease(&mut namespace.prompt(tokens)).expect("open");
        let goal = PrefetchGoal::default();
        let prefetch = cache.prefetch(&lease, goal).expect("open");
        let table = engine.table(40);
        let load = cache.load(&lease, table.clone(), LoadOptions::default());
        loads.push((tokens, prefetch, load.expect("valid"), table));
    }
    gate.wait();
    drop(gate);
    for (tokens, prefetch, load, table) in loads {
        assert_eq!(prefetch.finish().await.tokens, 40);
        assert_eq!(load.finish().await.tokens, 40);
        engine.verify(&table, tokens, 0..40);
    }
    assert_eq!(
        reads(&machine.medium),
        15,
        "10 blocks, and 5 of the fork's own"
    );
    assert_balanced(&cache);
}

#[tokio::test]
async fn a_deadline_cuts_what_a_slow_disk_does_not_bring() {
    let machine = Machine::new(Mode::Threads, 64, 256);
    let (cache, namespace) = machine.open();
    let tokens = prompt(1, 40);
    let engine = Engine::new(512);
    save_durably(&cache, &namespace, &engine, &tokens).await;
    cache.close().await.expect("nothing hangs");

    let (cache, namespace) = machine.open();
    // Four blocks are in RAM, the others behind a disk that does not answer.
    let head = cache
        .lease(&mut namespace.prompt(&tokens[..16]))
        .expect("open");
    let goal = PrefetchGoal::default();
    assert_eq!(
        cache
            .prefetch(&head, goal)
            .expect("open")
            .finish()
            .await
            .tokens,
        16
    );
    drop(head);
    let gate = Gate::close(&machine.medium, SimDiskCall::Read);
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let deadline = Some(Duration::from_millis(5));
    let goal = PrefetchGoal {
        deadline,
        ..PrefetchGoal::default()
    };
    let report = soon(cache.prefetch(&lease, goal).expect("open").finish()).await;
    assert_eq!(
        (report.tokens, report.read_blocks, report.missing_blocks),
        (16, 0, 6)
    );
    let table = engine.table(40);
    let options = LoadOptions {
        deadline,
        ..LoadOptions::default()
    };
    let load = cache.load(&lease, table.clone(), options).expect("valid");
    assert_eq!(soon(load.tokens()).await, 16);
    load.layer(2).await.expect("the device works");
    let report = load.finish().await;
    assert_eq!((report.tokens, report.cut.as_deref()), (16, Some("busy")));
    engine.verify(&table, &tokens, 0..16);
    gate.wait();
    drop(gate);
    // The disk answers again: nothing of it was spoilt.
    let report = load_all(&cache, &namespace, &tokens).await;
    assert_eq!((report.tokens, report.cut), (40, None));
    drop(lease);
    cache.close().await.expect("nothing hangs");
    assert_balanced(&cache);
}

#[tokio::test]
async fn a_store_that_is_opened_with_less_room_on_disk_evicts_what_is_over_it() {
    for mode in MODES {
        let mut machine = Machine::new(mode, 64, 256);
        let engine = Engine::new(512);
        let (cache, namespace) = machine.open();
        for name in 0..5 {
            let durable = save_durably(&cache, &namespace, &engine, &prompt(name, 40)).await;
            assert_eq!(durable, 10);
        }
        cache.close().await.expect("nothing hangs");

        machine.disk_chunks = 20;
        let (cache, namespace) = machine.open();
        let used = || cache.stats().disk.expect("a disk").used_bytes;
        soon(async {
            while used() > 20 * CHUNK {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        // What is left can be read, and no more was evicted than that.
        let mut left = 0;
        for name in 0..5 {
            left += load_all(&cache, &namespace, &prompt(name, 40)).await.tokens / 4;
        }
        assert!((10..=20).contains(&left), "{mode:?}: {left} blocks");
        assert_balanced(&cache);
        cache.close().await.expect("nothing hangs");
    }
}
