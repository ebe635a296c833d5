//! Host and disk tier together: what was durable comes back byte for byte after any restart, and
//! whatever the disk does, the answer is a miss or a shorter load, never a wrong byte or a hang.
//!
//! How: the whole store over a simulated disk, with its threads and without; the test engine's KV of
//! a token depends on every token up to it (`support`), so a wrong hit is a wrong byte. Slow disks
//! are gates that the test opens, not time.
#![cfg(feature = "sim")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use stemkv::{Cache, LoadOptions, LoadReport, OpenNamespace, PrefetchGoal};
use stemkv_store::{DiskTier, RecordHeader, RecordInfo, SimDiskCall, SimMedium};
use support::machine::{CHUNK, Gate, MODES, Machine, Mode, assert_balanced, soon};
use support::{Engine, load, prompt, save};
use tokio::runtime::Handle;

/// Saves a prompt and waits until it is durable; how many of its blocks are?
async fn save_durably(
    cache: &Cache,
    namespace: &OpenNamespace,
    engine: &Engine,
    tokens: &[u32],
) -> usize {
    let save = save(cache, namespace, engine, tokens).await;
    save.durable().await.durable_blocks
}

async fn load_all(cache: &Cache, namespace: &OpenNamespace, tokens: &[u32]) -> LoadReport {
    load(cache, namespace, &Engine::new(512), tokens).await
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

/// One life of a store with everything in it; returns the prompts of which all was durable.
async fn life(machine: &Machine, names: std::ops::Range<u32>) -> Vec<Vec<u32>> {
    let engine = Engine::new(512);
    let (cache, namespace) = machine.open();
    let mut durable = Vec::new();
    for name in names {
        // Pairs share their first 20 tokens.
        let mut tokens = prompt(name / 2, 40);
        tokens[20..].iter_mut().for_each(|token| *token += name % 2);
        let saved = save(&cache, &namespace, &engine, &tokens).await;
        if saved.durable().await.durable_blocks == saved.report().new_blocks
            && saved.report().declined_blocks == 0
            && (saved.report().known_blocks == 0 || name % 2 == 1 && durable.len() == name as usize)
        {
            durable.push(tokens.clone());
        }
        drop(saved);
        load_all(&cache, &namespace, &prompt(0, 40)).await;
        load_all(&cache, &namespace, &tokens).await;
        machine.forgive();
    }
    cache.flush().await;
    let lease = cache
        .lease(&mut namespace.prompt(&prompt(0, 40)))
        .expect("open");
    let goal = PrefetchGoal::default();
    cache.prefetch(&lease, goal).expect("open").finish().await;
    drop(lease);
    // A failing disk may fail the close too; the store is closed all the same.
    let _ = cache.close().await;
    assert_balanced(&cache);
    durable
}

/// Opens a machine and compares all of the prompts with what is there; the durable ones must be.
async fn assert_kept(machine: &Machine, durable: &[Vec<u32>], what: &str) {
    let (cache, namespace) = machine.open();
    for name in 0..8 {
        let mut tokens = prompt(name / 2, 40);
        tokens[20..].iter_mut().for_each(|token| *token += name % 2);
        let report = load_all(&cache, &namespace, &tokens).await;
        assert!(
            report.tokens == 40 || !durable.contains(&tokens),
            "{what}: {tokens:?} was durable, {report:?}"
        );
        assert_eq!(report.tokens % 4, 0);
    }
    assert_balanced(&cache);
    cache.close().await.expect("the disk works again");
}

#[tokio::test]
async fn whichever_call_to_the_disk_fails_the_answer_is_a_miss_or_right() {
    for mode in MODES {
        let clean = Machine::new(mode, 14, 256);
        assert_eq!(life(&clean, 0..6).await.len(), 6);
        let calls = clean.medium.calls();
        assert!(calls > 30, "{}", clean.medium.trace());
        for n in 1..=calls {
            let machine = Machine::new(mode, 14, 256);
            machine.medium.fail_call(n);
            let durable = life(&machine, 0..6).await;
            machine.forgive();
            assert_kept(
                &machine,
                &durable,
                &format!("call {n} of {calls}, {mode:?}"),
            )
            .await;
        }
        // And a disk that fails for good.
        let machine = Machine::new(mode, 14, 256);
        machine.medium.fail_all(true);
        assert_eq!(life(&machine, 0..6).await, Vec::<Vec<u32>>::new());
        machine.medium.fail_all(false);
        machine.forgive();
        assert_eq!(life(&machine, 0..6).await.len(), 6, "it is used again");
    }
}

#[tokio::test]
async fn a_power_cut_at_any_sync_keeps_what_was_durable_and_nothing_wrong() {
    for mode in MODES {
        let clean = Machine::new(mode, 14, 256);
        life(&clean, 0..6).await;
        let syncs = clean.medium.syncs();
        assert!(syncs > 6, "{}", clean.medium.trace());
        for n in 1..=syncs {
            let machine = Machine::new(mode, 14, 256);
            machine.medium.cut_power_at_sync(n);
            let durable = life(&machine, 0..6).await;
            for seed in 0..4 {
                let after = machine.with_medium(machine.medium.after_power_cut(seed));
                assert_kept(
                    &after,
                    &durable,
                    &format!("sync {n}, seed {seed}, {mode:?}"),
                )
                .await;
            }
        }
    }
}

#[tokio::test]
async fn a_corrupt_record_is_dropped_and_a_later_save_fills_the_hole() {
    let machine = Machine::new(Mode::Inline, 64, 256);
    let tokens = prompt(1, 24);
    let engine = Engine::new(512);
    let (cache, namespace) = machine.open();
    save_durably(&cache, &namespace, &engine, &tokens).await;
    cache.close().await.expect("nothing hangs");
    let mut hashes = namespace.prompt(&tokens);
    stemkv::HashPath::hash_to(&mut hashes, 6);
    let key = stemkv::HashPath::hashed(&hashes)[3];

    // Every field of the header page, and in the payload both ends of each slab.
    let header = (0..304).chain([1000, RecordHeader::BYTES - 1]);
    let slab = support::geometry().slab_bytes();
    let payload = (0..3).flat_map(|layer| {
        let start = RecordHeader::BYTES + layer * slab;
        [start, start + slab / 2, start + slab - 1]
    });
    for byte in header.chain(payload) {
        for before_opening in [false, true] {
            let machine = machine.with_medium(machine.medium.after_power_cut(0));
            let flip = || assert!(machine.medium.flip_bit(&key, byte * 8 + byte % 8));
            if before_opening {
                flip();
            }
            let (cache, namespace) = machine.open();
            if !before_opening {
                flip();
            }
            let report = load_all(&cache, &namespace, &tokens).await;
            assert_eq!(report.tokens, 12, "byte {byte}");
            cache.flush().await;
            let stats = cache.stats();
            let disk = stats.disk.as_ref().expect("there is one");
            if !before_opening || byte >= RecordHeader::BYTES {
                assert_eq!(
                    report.cut.as_deref(),
                    Some("corrupt"),
                    "byte {byte}: {report:?}"
                );
                assert_eq!(stats.counter("corrupt_blocks"), 1, "byte {byte}");
                assert_eq!(disk.records, 5, "the record was removed");
                assert!(!disk.paused, "rot is no failure of the disk");
                let saved = save(&cache, &namespace, &engine, &tokens).await;
                assert_eq!(
                    (saved.report().known_blocks, saved.report().new_blocks),
                    (5, 1)
                );
                assert_eq!(saved.durable().await.durable_blocks, 1);
            } else {
                // A header that does not verify is met at opening; what is behind it goes with it.
                assert_eq!(disk.records, 3);
                save_durably(&cache, &namespace, &engine, &tokens).await;
            }
            assert_eq!(load_all(&cache, &namespace, &tokens).await.tokens, 24);
            cache.close().await.expect("nothing hangs");
            let (cache, namespace) = machine.open();
            assert_eq!(
                load_all(&cache, &namespace, &tokens).await.tokens,
                24,
                "byte {byte}"
            );
            cache.close().await.expect("nothing hangs");
        }
    }
}

/// Cleaning drops what does not verify without a word to the index, which goes on naming the record.
#[tokio::test]
async fn a_record_that_the_disk_dropped_by_itself_is_a_lost_chunk_and_no_failure_of_the_disk() {
    let machine = Machine::new(Mode::Inline, 64, 256);
    let tokens = prompt(1, 24);
    let engine = Engine::new(512);
    let (cache, namespace) = machine.open();
    save_durably(&cache, &namespace, &engine, &tokens).await;
    cache.close().await.expect("nothing hangs");

    let disk = Arc::new(machine.open_disk());
    let builder = machine.builder_on(disk.clone());
    let (cache, namespace) =
        machine.open_with(builder.inline_on(Handle::current(), || Duration::ZERO));
    let mut dropped = Vec::new();
    let mut visit = |info: RecordInfo| dropped.extend((info.depth == 3).then_some(info.id));
    disk.scan(&mut visit).expect("readable");
    disk.remove(&dropped).expect("writable");
    assert_eq!(dropped.len(), 1);

    let report = load_all(&cache, &namespace, &tokens).await;
    assert_eq!(report.tokens, 12, "{report:?}");
    cache.flush().await;
    let stats = cache.stats();
    assert_eq!(stats.counter("corrupt_blocks"), 1, "{stats:?}");
    assert_eq!(stats.counter("disk_read_errors"), 0, "{stats:?}");
    assert!(!stats.disk.as_ref().expect("there is one").paused);
    // It is known to be lost: what is behind it waits for it to be saved again.
    let matched = cache.match_prefix(&mut namespace.prompt(&tokens));
    assert_eq!(matched.tokens, 12);
    let saved = save(&cache, &namespace, &engine, &tokens).await;
    let report = saved.report();
    assert_eq!((report.known_blocks, report.new_blocks), (5, 1));
    assert_eq!(saved.durable().await.durable_blocks, 1);
    assert_eq!(load_all(&cache, &namespace, &tokens).await.tokens, 24);
    assert_balanced(&cache);
    cache.close().await.expect("nothing hangs");
}

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
    // The queue takes 1 MiB, 128 chunks: the second save is over it.
    let first = save(&cache, &namespace, &engine, &prompt(1, 400)).await;
    gate.wait();
    let second = save(&cache, &namespace, &engine, &prompt(2, 400)).await;
    assert_eq!(soon(second.durable()).await.undurable_blocks, 100);
    assert_eq!(cache.stats().counter("undurable_blocks"), 100);
    assert_eq!(
        cache.stats().disk.expect("there is one").queued_bytes,
        100 * CHUNK
    );
    drop(gate);
    assert_eq!(first.durable().await.durable_blocks, 100);
    drop((first, second));
    cache.flush().await;
    assert_eq!(cache.stats().disk.expect("there is one").queued_bytes, 0);
    assert_eq!(
        load(&cache, &namespace, &engine, &prompt(2, 400))
            .await
            .tokens,
        400,
        "from RAM"
    );
    // A longer prompt brings its ancestors along.
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

fn poll_once<F: Future>(future: std::pin::Pin<&mut F>) -> std::task::Poll<F::Output> {
    future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop()))
}
