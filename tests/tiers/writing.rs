//! What becomes durable, within the bounds of disk and queue.

use super::*;

#[tokio::test]
async fn a_full_disk_makes_room_and_never_passes_its_bound() {
    for mode in MODES {
        let machine = Machine::new(mode, 64, 24);
        let engine = Engine::new(512);
        let (cache, namespace) = machine.open();
        for name in 0..12 {
            let durable = save_durably(&cache, &namespace, &engine, &prompt(name, 40)).await;
            assert_eq!(durable, 10, "{mode:?} {name}");
            let disk = cache.stats().disk.expect("there is one");
            assert!(disk.used_bytes <= 24 * CHUNK, "{disk:?}");
        }
        cache.close().await.expect("nothing hangs");
        let (cache, namespace) = machine.open();
        for name in 10..12 {
            let report = load_all(&cache, &namespace, &prompt(name, 40)).await;
            assert_eq!(report.tokens, 40, "the last saves are there");
        }
        // All that is there is leased: no room can be made.
        let leases: Vec<_> = (0..12)
            .map(|name| {
                cache
                    .lease(&mut namespace.prompt(&prompt(name, 40)))
                    .expect("open")
            })
            .collect();
        let saved = save(&cache, &namespace, &engine, &prompt(20, 40)).await;
        let durability = saved.durable().await;
        let leased: usize = leases.iter().map(|lease| lease.tokens() / 4).sum();
        assert_eq!(
            durability.durable_blocks,
            24 - leased,
            "what fits is kept, its head first"
        );
        assert_eq!(durability.undurable_blocks, 10 - (24 - leased));
        drop(saved);
        for name in 10..12 {
            let report = load_all(&cache, &namespace, &prompt(name, 40)).await;
            assert_eq!(report.tokens, 40, "what is leased stays");
        }
        drop(leases);
        assert_eq!(
            save_durably(&cache, &namespace, &engine, &prompt(21, 40)).await,
            10
        );
        cache.close().await.expect("nothing hangs");
        assert_balanced(&cache);
    }
}

#[tokio::test]
async fn compact_gives_what_there_is_and_ends_where_more_was_asked_for() {
    let machine = Machine::new(Mode::Inline, 64, 24);
    let engine = Engine::new(512);
    let (cache, namespace) = machine.open();
    for name in 0..2 {
        save_durably(&cache, &namespace, &engine, &prompt(name, 40)).await;
    }
    let report = cache.compact(6 * CHUNK).await.expect("the disk works");
    assert_eq!(
        (report.records_evicted, report.free_bytes),
        (2, 6 * CHUNK),
        "four were free"
    );
    let lease = cache
        .lease(&mut namespace.prompt(&prompt(1, 40)))
        .expect("open");
    let report = cache.compact(u64::MAX).await.expect("the disk works");
    assert_eq!(
        (report.records_evicted, report.free_bytes),
        (8, 14 * CHUNK),
        "all but what is leased"
    );
    drop(lease);
    assert_eq!(
        load_all(&cache, &namespace, &prompt(1, 40)).await.tokens,
        40
    );
}

#[tokio::test]
async fn records_that_a_dropped_compact_was_to_remove_are_removed_by_the_next_one() {
    for polls in 1..8 {
        let machine = Machine::new(Mode::Inline, 64, 24);
        let engine = Engine::new(512);
        let (cache, namespace) = machine.open();
        for name in 0..2 {
            save_durably(&cache, &namespace, &engine, &prompt(name, 40)).await;
        }
        let mut compact = Box::pin(cache.compact(12 * CHUNK));
        for _ in 0..polls {
            if poll_once(compact.as_mut()).is_ready() {
                break;
            }
        }
        drop(compact);
        let report = cache.compact(u64::MAX).await.expect("the disk works");
        assert_eq!(report.free_bytes, 24 * CHUNK, "after {polls} polls");
        assert_eq!(cache.stats().disk.expect("there is one").records, 0);
    }
}

#[tokio::test]
async fn a_save_larger_than_the_disk_keeps_its_head() {
    for mode in MODES {
        let machine = Machine::new(mode, 64, 8);
        let engine = Engine::new(512);
        let (cache, namespace) = machine.open();
        assert_eq!(
            save_durably(&cache, &namespace, &engine, &prompt(1, 40)).await,
            8
        );
        cache.close().await.expect("nothing hangs");
        let (cache, namespace) = machine.open();
        assert_eq!(
            load_all(&cache, &namespace, &prompt(1, 40)).await.tokens,
            32
        );
        cache.close().await.expect("nothing hangs");
    }
}

#[tokio::test]
async fn over_the_bound_of_the_write_queue_blocks_stay_in_ram_and_are_counted() {
    let machine = Machine::new(Mode::Threads, 400, 1000);
    let engine = Engine::new(1024);
    let (cache, namespace) = machine.open();
    let gate = Gate::close(&machine.medium, SimDiskCall::Append);
    // The queue takes 1 MiB, 128 chunks: of the second save there is room for the head, for none of the third.
    let first = save(&cache, &namespace, &engine, &prompt(1, 400)).await;
    gate.wait();
    let second = save(&cache, &namespace, &engine, &prompt(2, 400)).await;
    let third = save(&cache, &namespace, &engine, &prompt(3, 40)).await;
    assert_eq!(soon(third.durable()).await.undurable_blocks, 10);
    assert_eq!(cache.stats().counter("undurable_blocks"), 72 + 10);
    assert_eq!(
        cache.stats().disk.expect("there is one").queued_bytes,
        128 * CHUNK
    );
    drop(gate);
    assert_eq!(first.durable().await.durable_blocks, 100);
    let durability = second.durable().await;
    assert_eq!(
        (durability.durable_blocks, durability.undurable_blocks),
        (28, 72)
    );
    drop((first, second, third));
    let written_later = async {
        while cache.stats().counter("durable_later_blocks") < 82 {
            tokio::task::yield_now().await;
        }
    };
    soon(written_later).await;
    cache.flush().await;
    assert_eq!(cache.stats().disk.expect("there is one").queued_bytes, 0);
    assert_eq!(
        load(&cache, &namespace, &engine, &prompt(2, 400))
            .await
            .tokens,
        400,
        "from RAM"
    );
    let longer = prompt(2, 404);
    assert_eq!(save_durably(&cache, &namespace, &engine, &longer).await, 1);
    cache.close().await.expect("nothing hangs");
    let (cache, namespace) = machine.open();
    assert_eq!(
        load(&cache, &namespace, &engine, &longer).await.tokens,
        404,
        "nothing is kept without its ancestors"
    );
    cache.close().await.expect("nothing hangs");
}

#[tokio::test]
async fn close_makes_what_was_saved_durable() {
    for mode in MODES {
        let mut machine = Machine::new(mode, 64, 256);
        // A batch that would wait for company for longer than any test does.
        machine.disk.batch_delay_ms = 60_000;
        let engine = Engine::new(512);
        let (cache, namespace) = machine.open();
        for name in 0..4 {
            drop(save(&cache, &namespace, &engine, &prompt(name, 40)).await);
        }
        cache.close().await.expect("nothing hangs");
        assert_balanced(&cache);
        let (cache, namespace) = machine.open();
        for name in 0..4 {
            assert_eq!(
                load_all(&cache, &namespace, &prompt(name, 40)).await.tokens,
                40
            );
        }
        cache.close().await.expect("nothing hangs");
    }
}

#[tokio::test]
async fn a_flush_ends_although_others_go_on_saving() {
    let machine = Machine::new(Mode::Threads, 400, 1000);
    let engine = Engine::new(1024);
    let (cache, namespace) = machine.open();
    let gate = Gate::close(&machine.medium, SimDiskCall::Append);
    drop(save(&cache, &namespace, &engine, &prompt(1, 40)).await);
    gate.wait();
    let mut flush = Box::pin(cache.flush());
    assert!(poll_once(flush.as_mut()).is_pending());
    // Enqueued after the flush began, and not written before it ends.
    let later = save(&cache, &namespace, &engine, &prompt(2, 40)).await;
    let second = Gate::close(&machine.medium, SimDiskCall::Append);
    drop(gate);
    second.wait();
    soon(flush).await;
    drop(second);
    assert_eq!(later.durable().await.durable_blocks, 10);
}

/// Waits until batches of so many chunks are on disk or on their way there.
fn wait_for_used(cache: &Cache, chunks: u64) {
    let late = Instant::now() + Duration::from_secs(20);
    while cache.stats().disk.expect("there is one").used_bytes < chunks * CHUNK {
        assert!(Instant::now() < late, "the second batch does not begin");
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn of_two_batches_under_way_the_second_fails_with_the_first_only_if_it_holds_its_children() {
    for is_child in [true, false] {
        let machine = Machine::new(Mode::Threads, 400, 1000);
        let engine = Engine::new(1024);
        let (cache, namespace) = machine.open();
        let gate = Gate::close(&machine.medium, SimDiskCall::Append);
        let first = save(&cache, &namespace, &engine, &prompt(1, 40)).await;
        gate.wait();
        let tokens = prompt(if is_child { 1 } else { 2 }, 80);
        let second = save(&cache, &namespace, &engine, &tokens).await;
        let blocks = second.report().new_blocks;
        wait_for_used(&cache, 10 + blocks as u64);
        machine.medium.fail_call(1);
        drop(gate);
        assert_eq!(soon(first.durable()).await.durable_blocks, 0);
        let durable = soon(second.durable()).await.durable_blocks;
        assert_eq!(durable, if is_child { 0 } else { blocks });
        drop((first, second));
        // What failed is written with what comes after it.
        machine.forgive();
        let longer = prompt(1, 84);
        let blocks = if is_child { 1 } else { 11 };
        assert_eq!(
            save_durably(&cache, &namespace, &engine, &longer).await,
            blocks
        );
        soon(cache.close()).await.expect("nothing hangs");
        assert_balanced(&cache);
        let (cache, namespace) = machine.open();
        for tokens in [&longer, &tokens] {
            assert_eq!(
                load_all(&cache, &namespace, tokens).await.tokens,
                tokens.len()
            );
        }
        cache.close().await.expect("nothing hangs");
    }
}

#[tokio::test]
async fn two_batches_are_under_way_and_no_third_and_a_close_waits_for_both() {
    let machine = Machine::new(Mode::Threads, 400, 1000);
    let engine = Engine::new(1024);
    let (cache, namespace) = machine.open();
    let gate = Gate::close(&machine.medium, SimDiskCall::Append);
    let mut saves = Vec::new();
    for (tokens, under_way) in [(40, 10), (80, 20), (120, 20)] {
        saves.push(save(&cache, &namespace, &engine, &prompt(1, tokens)).await);
        wait_for_used(&cache, under_way);
    }
    gate.wait();
    let mut flush = Box::pin(cache.flush());
    let mut close = Box::pin(cache.close());
    assert!(poll_once(flush.as_mut()).is_pending() && poll_once(close.as_mut()).is_pending());
    let disk = cache.stats().disk.expect("there is one");
    assert_eq!(
        (disk.used_bytes, disk.queued_bytes),
        (20 * CHUNK, 30 * CHUNK)
    );
    drop(gate);
    soon(close).await.expect("nothing hangs");
    soon(flush).await;
    for save in &saves {
        assert_eq!(soon(save.durable()).await.durable_blocks, 10);
    }
    drop(saves);
    assert_balanced(&cache);
}
