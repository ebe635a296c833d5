//! Warming after opening: what was used last comes into RAM by itself, within its bounds, and gives way.
//! Shown on a simulated disk that holds three prompts of ten blocks, used one minute after another.
#![cfg(feature = "sim")]

mod support;

use std::time::Duration;

use stemkv::{Cache, HashPath as _, OpenNamespace, Stats, Warming};
use stemkv_store::SimDiskCall;
use support::machine::{CHUNK, Gate, MODES, Machine, Mode, assert_balanced, soon};
use support::{Engine, load, prompt, save};

const TOKENS: usize = 40;

/// Prompt 2 is the hottest, then 3, then 1: by use, not by age.
const BY_HEAT: [u32; 3] = [2, 3, 1];

async fn with_prompts_on_disk(mode: Mode, host_chunks: u64, warm_chunks: u64) -> Machine {
    let mut machine = Machine::new(mode, 64, 256);
    let (cache, namespace) = machine.open();
    let engine = Engine::new(64);
    for name in 1..4 {
        let saved = save(&cache, &namespace, &engine, &prompt(name, TOKENS)).await;
        assert_eq!(saved.durable().await.durable_blocks, 10);
        machine.clock.advance(Duration::from_secs(60));
    }
    load(&cache, &namespace, &engine, &prompt(2, TOKENS)).await;
    cache.close().await.expect("nothing hangs");
    machine.host_chunks = host_chunks;
    machine.disk.warm_bytes = warm_chunks * CHUNK;
    machine
}

/// Waits until warming has ended.
async fn warmed(cache: &Cache) -> (Warming, Stats) {
    let ended = async {
        loop {
            let stats = cache.stats();
            let warming = stats.disk.as_ref().expect("a disk tier").warming;
            if warming != Warming::UnderWay {
                return (warming, stats);
            }
            tokio::task::yield_now().await;
        }
    };
    soon(ended).await
}

/// Leading blocks in RAM of each prompt, the hottest first.
fn in_ram(cache: &Cache, namespace: &OpenNamespace) -> [usize; 3] {
    BY_HEAT.map(|name| {
        let tokens = prompt(name, TOKENS);
        cache
            .match_prefix(&mut namespace.prompt(&tokens))
            .host_tokens
            / 4
    })
}

#[tokio::test]
async fn the_hottest_prefixes_come_first_and_no_more_than_was_asked_for() {
    for mode in MODES {
        for (warm, expected, how) in [
            (4, [4, 0, 0], Warming::Limit),
            (15, [10, 5, 0], Warming::Limit),
            (30, [10, 10, 10], Warming::Complete),
            (1000, [10, 10, 10], Warming::Complete),
        ] {
            let machine = with_prompts_on_disk(mode, 64, warm).await;
            let (cache, namespace) = machine.open();
            let (ended, stats) = warmed(&cache).await;
            assert_eq!(in_ram(&cache, &namespace), expected, "{mode:?} {warm}");
            let blocks = expected.iter().sum::<usize>() as u64;
            let counted = (
                stats.counter("warmed_blocks"),
                stats.counter("warmed_bytes"),
                stats.counter("promoted_blocks"),
            );
            assert_eq!((ended, counted), (how, (blocks, blocks * CHUNK, blocks)));
            assert_balanced(&cache);
            let engine = Engine::new(64);
            let report = load(&cache, &namespace, &engine, &prompt(2, TOKENS)).await;
            assert_eq!(
                (report.tokens, report.disk_blocks),
                (TOKENS, 10 - expected[0])
            );
            cache.close().await.expect("nothing hangs");
        }
    }
}

#[tokio::test]
async fn nothing_is_warmed_unless_it_is_asked_for() {
    let machine = with_prompts_on_disk(Mode::Inline, 64, 0).await;
    let (cache, namespace) = machine.open();
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(warmed(&cache).await.0, Warming::Off);
    assert_eq!(in_ram(&cache, &namespace), [0, 0, 0]);
}

#[tokio::test]
async fn an_eighth_of_ram_stays_free_and_nobody_is_evicted_for_it() {
    for mode in MODES {
        let machine = with_prompts_on_disk(mode, 16, 1000).await;
        let (cache, namespace) = machine.open();
        let (ended, stats) = warmed(&cache).await;
        assert_eq!(ended, Warming::NoRoom);
        assert_eq!(in_ram(&cache, &namespace), [10, 4, 0], "{mode:?}");
        assert_eq!(stats.host.free_bytes, 2 * CHUNK);
        assert_eq!(stats.counter("evicted_host_blocks"), 0);
        assert_balanced(&cache);
    }
}

/// What warming brought goes before what was used since, the coldest first.
#[tokio::test]
async fn what_was_warmed_is_evicted_by_its_last_use() {
    let machine = with_prompts_on_disk(Mode::Inline, 32, 1000).await;
    let (cache, namespace) = machine.open();
    warmed(&cache).await;
    assert_eq!(in_ram(&cache, &namespace), [10, 10, 8]);
    let engine = Engine::new(64);
    drop(save(&cache, &namespace, &engine, &prompt(4, TOKENS)).await);
    assert_eq!(in_ram(&cache, &namespace), [10, 10, 2]);
}

#[tokio::test]
async fn closing_or_stopping_ends_it_with_the_reads_under_way() {
    for close in [true, false] {
        let machine = with_prompts_on_disk(Mode::Threads, 64, 1000).await;
        let gate = Gate::close(&machine.medium, SimDiskCall::Read);
        let (cache, namespace) = machine.open();
        gate.wait();
        let closing = cache.clone();
        let closing = match close {
            true => tokio::spawn(async move { closing.close().await.expect("nothing hangs") }),
            false => tokio::spawn(async move { closing.stop_warming() }),
        };
        tokio::task::yield_now().await;
        drop(gate);
        soon(closing).await.expect("no panic");
        let (ended, stats) = warmed(&cache).await;
        assert_eq!(ended, Warming::Stopped, "{close}");
        // The second read may have begun, the third has not.
        let blocks = stats.counter("warmed_blocks") as usize;
        assert!([10, 20].contains(&blocks), "{close}: {blocks}");
        assert_eq!(stats.index.host_blocks as usize, blocks, "{close}");
        if !close {
            assert_eq!(in_ram(&cache, &namespace), [10, blocks - 10, 0]);
        }
        assert_balanced(&cache);
        cache.close().await.expect("nothing hangs");
    }
}

#[tokio::test]
async fn a_damaged_record_is_dropped_and_the_next_prefix_comes() {
    for mode in MODES {
        let machine = with_prompts_on_disk(mode, 64, 15).await;
        let tokens = prompt(2, TOKENS);
        let (cache, namespace) = Machine {
            disk: stemkv::DiskConfig {
                warm_bytes: 0,
                ..machine.disk.clone()
            },
            ..machine.clone()
        }
        .open();
        let key = {
            let mut prompt = namespace.prompt(&tokens);
            prompt.hash_to(10);
            prompt.hashed()[3]
        };
        cache.close().await.expect("nothing hangs");
        assert!(machine.medium.flip_bit(&key, 8 * 4100));
        let (cache, namespace) = machine.open();
        let (ended, stats) = warmed(&cache).await;
        assert_eq!(ended, Warming::Limit);
        // The next prefix was asked for before the gap was met.
        assert_eq!(in_ram(&cache, &namespace), [3, 5, 0], "{mode:?}");
        assert_eq!(stats.counter("warmed_blocks"), 14);
        assert_eq!(stats.counter("corrupt_blocks"), 1);
        cache.flush().await;
        assert_balanced(&cache);
    }
}

#[tokio::test]
async fn a_disk_that_fails_ends_it() {
    let machine = with_prompts_on_disk(Mode::Inline, 64, 1000).await;
    let (cache, namespace) = machine.open();
    machine.medium.fail_all(true);
    let (ended, stats) = warmed(&cache).await;
    assert_eq!(ended, Warming::DiskFailed);
    assert_eq!(stats.counter("warmed_blocks"), 0);
    assert_eq!(in_ram(&cache, &namespace), [0, 0, 0]);
    machine.medium.fail_all(false);
    assert_balanced(&cache);
}

#[tokio::test]
async fn what_arrives_after_the_disk_failed_is_counted() {
    let mut machine = with_prompts_on_disk(Mode::Threads, 64, 20).await;
    machine.disk.reads_in_flight = 3;
    let gate = Gate::close(&machine.medium, SimDiskCall::Read);
    let (cache, namespace) = machine.open();
    gate.wait();
    // One prompt is held, all of the other is there.
    let other = async {
        while cache.stats().counter("promoted_blocks") < 10 {
            tokio::task::yield_now().await;
        }
    };
    soon(other).await;
    machine.medium.fail_all(true);
    drop(gate);
    let (ended, stats) = warmed(&cache).await;
    assert_eq!(ended, Warming::DiskFailed);
    assert_eq!(stats.counter("warmed_blocks"), 10);
    assert_eq!(stats.counter("warmed_bytes"), 10 * CHUNK);
    let arrived = in_ram(&cache, &namespace);
    assert_eq!(arrived.iter().sum::<usize>(), 10, "{arrived:?}");
    machine.medium.fail_all(false);
    assert_balanced(&cache);
}
