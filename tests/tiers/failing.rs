//! Whatever the disk does: a miss or a shorter load, and what was durable stays.

use super::*;

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
            // With threads a life may have fewer calls than the first one had.
            machine.medium.fail_all(false);
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
