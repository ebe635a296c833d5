//! The pipelines over the CPU device, host tier alone: what is saved comes back byte for byte under
//! exactly its own prefix, and whatever handle is dropped whenever, pins and slots come back.
//!
//! The test engine's KV of a token depends on every token up to it (`support`), so a wrong hit of
//! any kind is a wrong byte.

mod support;

use stemkv::{Cache, ErrorKind, ExtraKey, LoadOptions, OpenNamespace, Salt};
use stemkv_store::{Dtype, Fence, KvGeometry, LayerId};
use support::{Engine, config, load, namespace, prompt, save};

fn open(chunks: u64) -> (Cache, OpenNamespace) {
    let cache = Cache::open(config(chunks)).expect("a valid configuration");
    let namespace = cache.namespace(&namespace()).expect("the store's geometry");
    (cache, namespace)
}

/// Pins, filling slots and pending blocks are RAII: with no handle left there are none.
#[track_caller]
fn assert_balanced(cache: &Cache) {
    let stats = cache.stats();
    assert_eq!(
        (
            stats.index.pins,
            stats.index.pending_blocks,
            stats.host.filling_bytes
        ),
        (0, 0, 0),
        "{stats:?}"
    );
    let published = stats.host.published_bytes / (stats.host.capacity_bytes / chunks_of(cache));
    assert_eq!(
        published, stats.index.host_blocks,
        "every slot belongs to a block"
    );
}

fn chunks_of(cache: &Cache) -> u64 {
    let geometry = &cache.config().geometry;
    cache.config().host.capacity_bytes
        / (4096 + geometry.payload_bytes().next_multiple_of(4096) as u64)
}

#[tokio::test]
async fn what_was_saved_comes_back_under_its_own_prefix_alone() {
    let (cache, namespace) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 4 * 6 + 3);
    let saved = save(&cache, &namespace, &engine, &tokens).await;
    assert_eq!((saved.report().tokens, saved.report().new_blocks), (24, 6));
    drop(saved);
    let report = load(&cache, &namespace, &engine, &tokens).await;
    assert_eq!(
        (report.tokens, report.host_blocks, report.cut),
        (24, 6, None)
    );

    // The same first three blocks, then others: only the shared part may come.
    let mut fork = tokens.clone();
    fork[13] = 7;
    assert_eq!(load(&cache, &namespace, &engine, &fork).await.tokens, 12);
    assert_eq!(
        load(&cache, &namespace, &engine, &prompt(2, 24))
            .await
            .tokens,
        0
    );
    // The same tokens without the first one are another prefix.
    assert_eq!(
        load(&cache, &namespace, &engine, &tokens[1..]).await.tokens,
        0
    );
    assert_balanced(&cache);
}

#[tokio::test]
async fn a_prompt_that_forks_saves_its_own_blocks_alone() {
    let (cache, namespace) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 32);
    drop(save(&cache, &namespace, &engine, &tokens).await);
    let mut fork = tokens.clone();
    fork[20..].fill(9);
    let saved = save(&cache, &namespace, &engine, &fork).await;
    assert_eq!(
        (saved.report().known_blocks, saved.report().new_blocks),
        (5, 3)
    );
    drop(saved);
    for tokens in [&tokens, &fork] {
        assert_eq!(load(&cache, &namespace, &engine, tokens).await.tokens, 32);
    }
    assert_eq!(cache.stats().index.host_blocks, 11);
}

#[tokio::test]
async fn another_salt_adapter_or_extra_key_never_hits() {
    let (cache, plain) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 16);
    drop(save(&cache, &plain, &engine, &tokens).await);
    let mut salted = namespace();
    salted.salt = Some(Salt::new("a tenant's secret"));
    let mut adapted = namespace();
    adapted.adapter = Some("lora-7".into());
    for other in [salted, adapted] {
        let other = cache.namespace(&other).expect("the store's geometry");
        assert_eq!(cache.match_prefix(&mut other.prompt(&tokens)).tokens, 0);
    }
    let image = ExtraKey::new(6..10, *b"an image");
    let mut with_image = plain
        .prompt(&tokens)
        .with_extra_keys(vec![image])
        .expect("a valid key");
    assert_eq!(
        cache.match_prefix(&mut with_image).tokens,
        4,
        "the block before the image is the same"
    );
}

#[tokio::test]
async fn keys_of_the_engine_work_with_and_without_their_chain() {
    let (cache, namespace) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 12);
    let keys: Vec<&[u8]> = vec![b"first", b"second", b"third"];
    let table = engine.table(12);
    engine.compute(&table, &tokens, 0);
    for flat in [false, true] {
        let prompt = || match flat {
            false => namespace.chained_keys(keys.clone()).expect("valid keys"),
            true => namespace.flat_keys(keys.clone()).expect("valid keys"),
        };
        assert_eq!(cache.match_prefix(&mut prompt()).tokens, 0, "flat={flat}");
        let save = cache.save(&mut prompt(), table.clone()).expect("open");
        save.all_layers(Fence::reached()).expect("once");
        save.pages_free().wait().await.expect("the device works");
        let lease = cache.lease(&mut prompt()).expect("open");
        assert_eq!(lease.tokens(), 12, "flat={flat}");
        let destination = engine.table(12);
        let report = cache
            .load(&lease, destination.clone(), LoadOptions::default())
            .expect("valid")
            .finish()
            .await;
        assert_eq!(report.tokens, 12);
        engine.verify(&destination, &tokens, 0..12);
        engine.free(destination);
    }
    // A flat key stands for itself; a chained one only behind its chain.
    let last = vec![keys[2]];
    assert_eq!(
        cache
            .match_prefix(&mut namespace.flat_keys(last.clone()).expect("valid"))
            .tokens,
        4
    );
    assert_eq!(
        cache
            .match_prefix(&mut namespace.chained_keys(last).expect("valid"))
            .tokens,
        0
    );
    assert_balanced(&cache);
}

#[tokio::test]
async fn a_load_leaves_tokens_below_from_token_alone() {
    let (cache, namespace) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 16);
    drop(save(&cache, &namespace, &engine, &tokens).await);
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    for from_token in [1, 4, 6, 15, 16] {
        let table = engine.table(16);
        let options = LoadOptions {
            from_token,
            ..LoadOptions::default()
        };
        let report = cache
            .load(&lease, table.clone(), options)
            .expect("valid")
            .finish()
            .await;
        assert_eq!(report.tokens, 16);
        engine.verify(&table, &tokens, from_token..16);
        assert!(
            (0..from_token).all(|token| engine.is_untouched(&table, token)),
            "from_token={from_token}"
        );
        engine.free(table);
    }
}

#[tokio::test]
async fn each_layer_can_be_used_as_soon_as_it_is_answered() {
    let (cache, namespace) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 16);
    let table = engine.table(16);
    let save = cache
        .save(&mut namespace.prompt(&tokens), table.clone())
        .expect("open");
    for layer in [2, 0, 1] {
        assert_eq!(
            cache.match_prefix(&mut namespace.prompt(&tokens)).tokens,
            0,
            "published last"
        );
        assert_eq!(
            cache
                .match_prefix(&mut namespace.prompt(&tokens))
                .pending_tokens,
            16,
            "visible as pending"
        );
        engine.compute_layer(&table, &tokens, 0, LayerId(layer));
        save.layer(layer, Fence::reached()).expect("once");
    }
    save.pages_free().wait().await.expect("the device works");
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let destination = engine.table(16);
    let load = cache
        .load(&lease, destination.clone(), LoadOptions::default())
        .expect("valid");
    assert_eq!(load.tokens().await, 16);
    for layer in 0..3 {
        load.layer(layer).await.expect("the device works");
        engine.verify_layer(&destination, &tokens, 0..16, LayerId(layer));
    }
    assert_eq!(
        load.layer(3).await.expect_err("there are 3").kind(),
        ErrorKind::Invalid
    );
}

#[tokio::test]
async fn a_second_save_of_the_same_prefix_brings_nothing_twice() {
    let (cache, namespace) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 16);
    let table = engine.table(16);
    engine.compute(&table, &tokens, 0);
    let first = cache
        .save(&mut namespace.prompt(&tokens), table.clone())
        .expect("open");
    let second = cache
        .save(&mut namespace.prompt(&tokens), table.clone())
        .expect("open");
    assert_eq!(
        (first.report().new_blocks, second.report().new_blocks),
        (4, 0)
    );
    assert!(second.pages_free().is_free(), "nothing is copied for it");
    second
        .all_layers(Fence::reached())
        .expect("an engine need not know");
    // The first is given up: what it claimed can be claimed again.
    drop(first);
    assert_balanced(&cache);
    let third = cache
        .save(&mut namespace.prompt(&tokens), table.clone())
        .expect("open");
    assert_eq!(third.report().new_blocks, 4);
    third.all_layers(Fence::reached()).expect("once");
    third.pages_free().wait().await.expect("the device works");
    assert_eq!(load(&cache, &namespace, &engine, &tokens).await.tokens, 16);
}

#[tokio::test]
async fn a_second_request_can_wait_for_a_save_in_flight_and_then_hits() {
    let (cache, namespace) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 16);
    let table = engine.table(16);
    engine.compute(&table, &tokens, 0);
    assert!(cache.pending(&mut namespace.prompt(&tokens)).is_none());
    let save = cache
        .save(&mut namespace.prompt(&tokens), table)
        .expect("open");
    let pending = cache
        .pending(&mut namespace.prompt(&tokens))
        .expect("a save is in flight");
    assert!(!pending.is_over());
    save.all_layers(Fence::reached()).expect("once");
    pending.wait().await;
    assert_eq!(load(&cache, &namespace, &engine, &tokens).await.tokens, 16);
}

#[tokio::test]
async fn what_is_leased_stays_and_what_does_not_fit_is_declined() {
    let (cache, namespace) = open(8);
    let engine = Engine::new(400);
    let kept = prompt(1, 20);
    drop(save(&cache, &namespace, &engine, &kept).await);
    let lease = cache.lease(&mut namespace.prompt(&kept)).expect("open");
    assert_eq!(lease.tokens(), 20);
    // Five of eight slots are leased: of any other prompt three blocks fit, the leading ones.
    for name in 2..6 {
        let other = prompt(name, 20);
        let saved = save(&cache, &namespace, &engine, &other).await;
        assert_eq!(
            (saved.report().new_blocks, saved.report().declined_blocks),
            (3, 2)
        );
        drop(saved);
        assert_eq!(load(&cache, &namespace, &engine, &other).await.tokens, 12);
        assert_eq!(load(&cache, &namespace, &engine, &kept).await.tokens, 20);
    }
    drop(lease);
    drop(save(&cache, &namespace, &engine, &prompt(9, 32)).await);
    assert_eq!(
        load(&cache, &namespace, &engine, &prompt(9, 32))
            .await
            .tokens,
        32
    );
    assert_eq!(
        load(&cache, &namespace, &engine, &kept).await.tokens,
        0,
        "all eight slots went to the other"
    );
    assert_balanced(&cache);
}

#[tokio::test]
async fn eviction_takes_tails_first_so_that_what_is_left_can_be_reached() {
    let (cache, namespace) = open(8);
    let engine = Engine::new(400);
    drop(save(&cache, &namespace, &engine, &prompt(1, 24)).await);
    drop(save(&cache, &namespace, &engine, &prompt(2, 16)).await);
    let left = load(&cache, &namespace, &engine, &prompt(1, 24))
        .await
        .tokens;
    assert_eq!(left, 16, "two of six blocks made room for four");
    assert_eq!(
        load(&cache, &namespace, &engine, &prompt(2, 16))
            .await
            .tokens,
        16
    );
}

#[tokio::test]
async fn a_dropped_load_gives_its_pages_and_pins_back() {
    let (cache, namespace) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 64);
    drop(save(&cache, &namespace, &engine, &tokens).await);
    for _ in 0..50 {
        let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
        let table = engine.table(64);
        let load = cache
            .load(&lease, table.clone(), LoadOptions::default())
            .expect("valid");
        drop(lease);
        let pages = load.cancel();
        pages.wait().await.expect("the device works");
        engine.free(table);
    }
    assert_balanced(&cache);
}

#[tokio::test]
async fn wrong_calls_are_named_and_change_nothing() {
    let (cache, namespace) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 16);
    drop(save(&cache, &namespace, &engine, &tokens).await);
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let short = engine.table(12);
    let error = cache
        .load(&lease, short.clone(), LoadOptions::default())
        .err()
        .expect("four tokens short");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let options = LoadOptions {
        from_token: 17,
        ..LoadOptions::default()
    };
    assert_eq!(
        cache
            .load(&lease, engine.table(16), options)
            .err()
            .expect("behind")
            .kind(),
        ErrorKind::Invalid
    );
    let other = prompt(2, 16);
    assert_eq!(
        cache
            .save(&mut namespace.prompt(&other), short)
            .err()
            .expect("short")
            .kind(),
        ErrorKind::Invalid
    );
    let save = cache
        .save(&mut namespace.prompt(&other), engine.table(16))
        .expect("valid");
    save.layer(0, Fence::reached()).expect("once");
    assert_eq!(
        save.layer(0, Fence::reached()).expect_err("twice").kind(),
        ErrorKind::Invalid
    );
    assert_eq!(
        save.layer(3, Fence::reached())
            .expect_err("there are 3")
            .kind(),
        ErrorKind::Invalid
    );
    drop(save);
    let mut foreign = support::namespace();
    foreign.geometry.block_tokens = 8;
    let error = cache.namespace(&foreign).expect_err("another geometry");
    assert!(
        error.to_string().contains("block_tokens: 8 here, 4 there"),
        "{error}"
    );
}

#[tokio::test]
async fn pages_of_another_geometry_are_refused_by_name() {
    let (cache, namespace) = open(64);
    let tokens = prompt(1, 24);
    drop(save(&cache, &namespace, &Engine::new(64), &tokens).await);
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let larger = KvGeometry::gqa(3, 2, 8, Dtype::Bf16, 8).expect("valid");
    let wider = KvGeometry::gqa(3, 4, 8, Dtype::Bf16, 4).expect("valid");
    for (other, named) in [
        (larger, "block_tokens: 8 here, 4 there"),
        (wider, "planes: "),
    ] {
        let pages = Engine::with_geometry(&other, 64, 2);
        let load = cache.load(&lease, pages.table(24), LoadOptions::default());
        let mut unsaved = namespace.prompt(&[9; 24]);
        let saved = cache.save(&mut unsaved, pages.table(24));
        for error in [load.err(), saved.err()] {
            let error = error.expect("nothing of it would fit");
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(named), "{error}");
        }
    }
    drop(lease);
    assert_balanced(&cache);
}

#[tokio::test]
async fn a_closed_store_answers_closed() {
    let (cache, namespace) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 16);
    drop(save(&cache, &namespace, &engine, &tokens).await);
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    cache.close().await.expect("nothing hangs");
    cache.close().await.expect("a second close is nothing");
    let kinds = [
        cache.lease(&mut namespace.prompt(&tokens)).err(),
        cache
            .load(&lease, engine.table(16), LoadOptions::default())
            .err(),
        cache
            .save(&mut namespace.prompt(&tokens), engine.table(16))
            .err(),
        cache.namespace(&support::namespace()).err(),
    ];
    for error in kinds {
        assert_eq!(error.expect("closed").kind(), ErrorKind::Closed);
    }
}

#[test]
fn an_engine_thread_without_a_runtime_can_do_everything() {
    let (cache, namespace) = open(64);
    let engine = Engine::new(200);
    let tokens = prompt(1, 16);
    let table = engine.table(16);
    engine.compute(&table, &tokens, 0);
    let save = cache
        .save(&mut namespace.prompt(&tokens), table.clone())
        .expect("open");
    save.all_layers(Fence::reached()).expect("once");
    save.pages_free().wait_blocking().expect("the device works");
    assert_eq!(
        save.durable_blocking().undurable_blocks,
        4,
        "there is no disk tier"
    );
    let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
    let prefetch = cache
        .prefetch(&lease, stemkv::PrefetchGoal::default())
        .expect("open");
    assert_eq!(prefetch.finish_blocking().tokens, 16);
    let load = cache
        .load(&lease, table.clone(), LoadOptions::default())
        .expect("valid");
    assert_eq!(load.tokens_blocking(), 16);
    load.layer_blocking(2).expect("the device works");
    assert_eq!(load.finish_blocking().tokens, 16);
    cache.flush_blocking();
    cache.close_blocking().expect("nothing hangs");
}

#[test]
fn ten_threads_share_prefixes_without_a_wrong_byte() {
    let (cache, namespace) = open(48);
    std::thread::scope(|scope| {
        for thread in 0..10_u64 {
            let (cache, namespace) = (&cache, &namespace);
            scope.spawn(move || {
                let engine = Engine::new(64);
                for round in 0..60_u64 {
                    let random = support::mix(thread * 1000 + round);
                    // A few roots, forks at block bounds: threads meet on the same prefixes.
                    let mut tokens = prompt((random % 3) as u32, 32);
                    let fork = 4 * (random >> 8) as usize % 32;
                    tokens[fork..]
                        .iter_mut()
                        .for_each(|token| *token += (random >> 16) as u32 % 3);
                    match random >> 32 & 1 {
                        0 => drop(pollster::block_on(save(cache, namespace, &engine, &tokens))),
                        _ => drop(pollster::block_on(load(cache, namespace, &engine, &tokens))),
                    }
                }
            });
        }
    });
    assert!(cache.stats().counter("loaded_tokens") > 0);
    assert!(
        cache.stats().counter("evicted_host_blocks") > 0,
        "48 slots are fewer than the prompts need"
    );
    assert_balanced(&cache);
}
