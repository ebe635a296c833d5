//! What the disk tier had no room for is written once there is room, as long as it is in RAM; and what there
//! stays no room for is not tried for ever.

use super::*;

const HOUR: u64 = 3600;

/// Lets time pass, the disk's pauses and the runtime's together.
async fn pass(machine: &Machine, seconds: u64) {
    for _ in 0..4 * seconds {
        machine.clock.advance(Duration::from_millis(250));
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

fn later(cache: &Cache) -> u64 {
    cache.stats().counter("durable_later_blocks")
}

/// Waits until so many blocks were written later.
async fn written_later(cache: &Cache, blocks: u64) {
    let written = async {
        while later(cache) < blocks {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon(written).await;
    assert_eq!(later(cache), blocks);
}

async fn save_all(cache: &Cache, namespace: &OpenNamespace, name: u32, blocks: usize) -> usize {
    let engine = Engine::new(4 * blocks as u32);
    save_durably(cache, namespace, &engine, &prompt(name, 4 * blocks)).await
}

/// Leading blocks of a prompt that come back from its disk alone.
async fn on_disk(machine: &Machine, name: u32, blocks: usize) -> usize {
    let (cache, namespace) = machine.open();
    let tokens = prompt(name, 4 * blocks);
    let report = load(&cache, &namespace, &Engine::new(4 * blocks as u32), &tokens).await;
    assert_balanced(&cache);
    cache.close().await.expect("nothing hangs");
    report.tokens / 4
}

#[tokio::test]
async fn what_the_queue_had_no_room_for_is_written_when_it_is_empty() {
    for mode in MODES {
        let machine = Machine::new(mode, 800, 2000);
        let (cache, namespace) = machine.open();
        // Of each save the queue takes 128 blocks at most.
        assert_eq!(save_all(&cache, &namespace, 1, 200).await, 128, "{mode:?}");
        written_later(&cache, 72).await;
        cache.flush().await;
        assert_eq!(save_all(&cache, &namespace, 2, 400).await, 128, "{mode:?}");
        written_later(&cache, 72 + 272).await;
        let stats = cache.stats();
        assert_eq!(stats.counter("undurable_blocks"), 72 + 272);
        assert_eq!(stats.counter("durable_blocks"), 600);
        cache.flush().await;
        assert_balanced(&cache);
        cache.close().await.expect("nothing hangs");
        assert_eq!(on_disk(&machine, 1, 200).await, 200, "{mode:?}");
        assert_eq!(on_disk(&machine, 2, 400).await, 400, "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_full_disk_had_no_room_for_is_written_when_something_may_go() {
    let machine = Machine::new(Mode::Inline, 64, 24);
    let (cache, namespace) = machine.open();
    let mut leases = Vec::new();
    for name in 0..2 {
        assert_eq!(save_all(&cache, &namespace, name, 10).await, 10);
        let tokens = prompt(name, 40);
        leases.push(cache.lease(&mut namespace.prompt(&tokens)).expect("open"));
    }
    assert_eq!(save_all(&cache, &namespace, 2, 10).await, 4, "what fits");
    pass(&machine, 4).await;
    assert_eq!(later(&cache), 0, "all else is leased");
    leases.remove(0);
    pass(&machine, 10).await;
    assert_eq!(later(&cache), 0, "and what is free was used since");
    // Used after the others, its end too.
    let tokens = prompt(2, 40);
    drop(cache.lease(&mut namespace.prompt(&tokens)).expect("open"));
    pass(&machine, 30).await;
    assert_eq!(later(&cache), 6);
    let disk = cache.stats().disk.expect("there is one");
    assert!(disk.used_bytes <= disk.capacity_bytes, "{disk:?}");
    drop(leases);
    cache.flush().await;
    assert_balanced(&cache);
    cache.close().await.expect("nothing hangs");
    assert_eq!(on_disk(&machine, 2, 10).await, 10);
    assert_eq!(on_disk(&machine, 1, 10).await, 10, "what was leased stays");
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_fails_is_asked_ever_less_often_and_after_a_while_no_more() {
    let machine = Machine::new(Mode::Inline, 64, 256);
    let (cache, namespace) = machine.open();
    machine.medium.fail_all(true);
    assert_eq!(save_all(&cache, &namespace, 1, 10).await, 0);
    let mut tried_at = Vec::new();
    let mut calls = machine.medium.calls();
    for second in 1..=HOUR {
        pass(&machine, 1).await;
        if std::mem::replace(&mut calls, machine.medium.calls()) != calls {
            tried_at.push(second);
        }
    }
    assert_eq!(tried_at.len(), 7, "{tried_at:?}");
    let pauses: Vec<u64> = tried_at.windows(2).map(|at| at[1] - at[0]).collect();
    assert_eq!(pauses, [2, 4, 8, 16, 32, 64]);
    let stats = cache.stats();
    assert_eq!(stats.counter("disk_write_errors"), 8, "{stats:?}");
    assert_eq!(stats.counter("disk_skipped"), 0, "{stats:?}");
    assert_eq!(stats.counter("undurable_blocks"), 10, "each once");
    assert_balanced(&cache);
    // That it works again shows with the next save.
    machine.medium.fail_all(false);
    pass(&machine, HOUR).await;
    assert_eq!(machine.medium.calls(), calls);
    assert_eq!(save_all(&cache, &namespace, 2, 10).await, 10);
    pass(&machine, 1).await;
    assert_eq!(later(&cache), 10);
    cache.close().await.expect("nothing hangs");
    assert_eq!(on_disk(&machine, 1, 10).await, 10);
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_fails_for_a_while_is_found_to_work_again() {
    let machine = Machine::new(Mode::Inline, 64, 256);
    let (cache, namespace) = machine.open();
    machine.medium.fail_all(true);
    assert_eq!(save_all(&cache, &namespace, 1, 10).await, 0);
    assert_eq!(save_all(&cache, &namespace, 2, 10).await, 0);
    pass(&machine, 5).await;
    machine.medium.fail_all(false);
    pass(&machine, 5).await;
    assert_eq!(later(&cache), 20);
    cache.close().await.expect("nothing hangs");
    for name in 1..3 {
        assert_eq!(on_disk(&machine, name, 10).await, 10);
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_evicted_from_ram_is_not_written_and_nothing_behind_it() {
    let machine = Machine::new(Mode::Inline, 16, 256);
    let (cache, namespace) = machine.open();
    machine.medium.fail_all(true);
    for name in 1..3 {
        assert_eq!(save_all(&cache, &namespace, name, 10).await, 0);
    }
    // Of the first one six blocks are still there.
    assert_eq!(cache.stats().index.host_blocks, 16);
    machine.medium.fail_all(false);
    pass(&machine, 5).await;
    assert_eq!(later(&cache), 16);
    cache.close().await.expect("nothing hangs");
    assert_eq!(on_disk(&machine, 1, 10).await, 6);
    assert_eq!(on_disk(&machine, 2, 10).await, 10);
}

/// The disk holds less than RAM: what is worth less does not take the place of what is worth more.
#[tokio::test(start_paused = true)]
async fn nothing_is_written_and_evicted_in_turns() {
    let machine = Machine::new(Mode::Inline, 64, 8);
    let (cache, namespace) = machine.open();
    for name in 1..4 {
        assert_eq!(save_all(&cache, &namespace, name, 10).await, 8);
        pass(&machine, 20).await;
    }
    pass(&machine, HOUR).await;
    let calls = machine.medium.calls();
    pass(&machine, HOUR).await;
    assert_eq!(machine.medium.calls(), calls);
    let stats = cache.stats();
    assert_eq!(stats.counter("durable_later_blocks"), 0, "{stats:?}");
    assert_eq!(stats.counter("evicted_disk_blocks"), 16, "{stats:?}");
    assert_balanced(&cache);
    cache.close().await.expect("nothing hangs");
    assert_eq!(on_disk(&machine, 3, 10).await, 8, "the last one");
}

#[tokio::test]
async fn a_power_cut_before_or_while_it_is_written_leaves_whole_prefixes() {
    let machine = Machine::new(Mode::Threads, 400, 1000);
    let (cache, namespace) = machine.open();
    let first = Gate::close(&machine.medium, SimDiskCall::Append);
    let engine = Engine::new(800);
    let saved = save(&cache, &namespace, &engine, &prompt(1, 800)).await;
    first.wait();
    let second = Gate::close(&machine.medium, SimDiskCall::Sync);
    drop(first);
    // The sync of what the queue took, and then that of what it did not.
    second.wait();
    let third = Gate::close(&machine.medium, SimDiskCall::Sync);
    drop(second);
    assert_eq!(soon(saved.durable()).await.durable_blocks, 128);
    third.wait();
    for seed in 0..8 {
        let after = machine.with_medium(machine.medium.after_power_cut(seed));
        let blocks = on_disk(&after, 1, 200).await;
        assert!((128..=200).contains(&blocks), "seed {seed}: {blocks}");
    }
    drop(third);
    written_later(&cache, 72).await;
    drop(saved);
    cache.close().await.expect("nothing hangs");
    let after = machine.with_medium(machine.medium.after_power_cut(0));
    assert_eq!(on_disk(&after, 1, 200).await, 200);
}

#[tokio::test]
async fn a_close_does_not_wait_for_what_was_declined() {
    let machine = Machine::new(Mode::Threads, 800, 2000);
    let (cache, namespace) = machine.open();
    let engine = Engine::new(4 * 400);
    let gate = Gate::close(&machine.medium, SimDiskCall::Append);
    let mut saves = Vec::new();
    for name in 1..4 {
        saves.push(save(&cache, &namespace, &engine, &prompt(name, 400)).await);
        if name == 1 {
            gate.wait();
        }
    }
    assert_eq!(cache.stats().counter("undurable_blocks"), 172);
    let mut close = Box::pin(cache.close());
    assert!(poll_once(close.as_mut()).is_pending());
    drop(gate);
    soon(close).await.expect("nothing hangs");
    drop(saves);
    assert_balanced(&cache);
    assert_eq!(later(&cache), 0);
    for (name, blocks) in [(1, 100), (2, 28), (3, 0)] {
        assert_eq!(on_disk(&machine, name, 100).await, blocks);
    }
}

#[tokio::test(start_paused = true)]
async fn a_close_does_not_wait_for_a_pause() {
    let machine = Machine::new(Mode::Inline, 64, 256);
    let (cache, namespace) = machine.open();
    machine.medium.fail_all(true);
    assert_eq!(save_all(&cache, &namespace, 1, 10).await, 0);
    pass(&machine, 20).await;
    machine.medium.fail_all(false);
    let begun = tokio::time::Instant::now();
    cache.close().await.expect("nothing hangs");
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_balanced(&cache);
    pass(&machine, HOUR).await;
    assert_eq!(later(&cache), 0);
    assert_eq!(on_disk(&machine, 1, 10).await, 0);
}

#[tokio::test]
async fn a_flush_finds_nothing_pinned_and_what_was_declined_goes_on_behind_it() {
    let machine = Machine::new(Mode::Inline, 800, 1000);
    let (cache, namespace) = machine.open();
    for turns in 0..20 {
        assert_eq!(save_all(&cache, &namespace, turns, 140).await, 128);
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        cache.flush().await;
        assert_balanced(&cache);
        written_later(&cache, 12 * u64::from(turns + 1)).await;
        cache.compact(1000 * CHUNK).await.expect("the disk works");
    }
    cache.close().await.expect("nothing hangs");
}
