//! What an engine may get wrong: it is told so by name, and neither its tokens nor what the store holds suffer.
#![cfg(feature = "sim")]

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use stemkv::{
    Cache, Config, DeviceConfig, DiskConfig, ErrorKind, HashPath, LoadOptions, Namespace, Prompt,
};
use stemkv_store::{Dtype, Fence, HostPages, Key, KvGeometry, PageId, PageTable};
use support::machine::{Machine, Mode, assert_balanced, soon};
use support::{Engine, config, load, prompt, save, save_durably};

const TOKENS: usize = 24;

/// Whose blocks are shorter than the store's: two prompts that part behind one of them would share a chunk.
#[tokio::test]
async fn a_prompt_in_blocks_of_another_store_is_refused() {
    let (cache, _) = Machine::new(Mode::Threads, 64, 64).open();
    let geometry = KvGeometry::gqa(3, 2, 8, Dtype::Bf16, 2).expect("valid");
    let other = Cache::open(Config::in_memory(geometry.clone(), 1 << 20)).expect("it opens");
    let named = Namespace::new("test-model", "1", "bytes", geometry);
    let foreign = other.namespace(&named).expect("its geometry");
    let engine = Engine::new(64);
    let one = prompt(1, 8);
    let saved = cache.save(&mut foreign.prompt(&one), engine.table(16));
    let error = saved.err().expect("its blocks are not the store's");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("block_tokens=2"), "{error}");
    let leased = cache.lease(&mut foreign.prompt(&one));
    assert_eq!(leased.expect_err("nor here").kind(), ErrorKind::Invalid);
    assert_eq!(cache.match_prefix(&mut foreign.prompt(&one)).tokens, 0);
    assert!(cache.pending(&mut foreign.prompt(&one)).is_none());
    for mut keys in [
        foreign.chained_keys(vec![b"a"]).expect("valid"),
        foreign.flat_keys(vec![b"a"]).expect("valid"),
        foreign.prompt(&one).into_hashed(),
    ] {
        let error = cache.lease(&mut keys).expect_err("their blocks neither");
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    assert_balanced(&cache);
}

#[tokio::test]
async fn a_lease_of_another_store_is_refused_and_costs_nobody_a_record() {
    let machines = [1, 2].map(|_| Machine::new(Mode::Threads, 64, 64));
    let engine = Engine::new(256);
    for (name, machine) in (1..).zip(&machines) {
        let (cache, namespace) = machine.open();
        let durable = save_durably(&cache, &namespace, &engine, &prompt(name, TOKENS)).await;
        assert_eq!(durable, 6);
        cache.close().await.expect("nothing hangs");
    }
    let [(one, of_one), (two, of_two)] = machines.each_ref().map(|machine| machine.open());
    let tokens = prompt(1, TOKENS);
    let lease = one.lease(&mut of_one.prompt(&tokens)).expect("open");
    assert_eq!(lease.tokens(), TOKENS);
    let refused = [
        two.load(&lease, engine.table(TOKENS), LoadOptions::default())
            .err(),
        two.prefetch(&lease, Default::default()).err(),
        two.look_ahead(stemkv::LookAheadLimits {
            host_bytes: u64::MAX,
            device_bytes: 0,
            deadline: None,
        })
        .set(std::slice::from_ref(&lease))
        .err(),
    ];
    for error in refused {
        assert_eq!(error.expect("another's").kind(), ErrorKind::Invalid);
    }
    let report = load(&two, &of_two, &engine, &prompt(2, TOKENS)).await;
    assert_eq!(report.tokens, TOKENS);
    drop(lease);
    for cache in [one, two] {
        cache.close().await.expect("nothing hangs");
        assert_balanced(&cache);
        assert_eq!(cache.stats().disk.expect("there is one").records, 6);
    }
}

/// 1024 keys again and again, and one behind them whose first token is the 2^32nd.
#[tokio::test]
async fn a_prompt_of_more_tokens_than_can_be_counted_is_refused() {
    let geometry = KvGeometry::gqa(1, 1, 1, Dtype::Opaque, 4096).expect("valid");
    let cache = Cache::open(Config::in_memory(geometry.clone(), 64 << 20)).expect("it opens");
    let named = Namespace::new("long", "1", "bytes", geometry.clone());
    let namespace = cache.namespace(&named).expect("its geometry");
    let pages = HostPages::new(&geometry, 4096, 2).expect("pages");
    let table = |pages_of_prompt: Vec<PageId>| PageTable {
        kv: pages.paged(),
        pages: pages_of_prompt.into(),
    };
    let names: Vec<[u8; 4]> = (0_u32..1024).map(u32::to_le_bytes).collect();
    let mut keys: Vec<&[u8]> = names.iter().map(|name| &name[..]).collect();
    let mut flat = namespace.flat_keys(keys.clone()).expect("valid");
    let saved = cache.save(&mut flat, table(vec![PageId(0); 1024]));
    let saved = saved.expect("4 Mi tokens are few");
    saved.all_layers(Fence::reached()).expect("once");
    saved.pages_free().wait().await.expect("the device works");
    keys = keys.repeat(1024);
    keys.push(b"last");
    let mut pages_of_prompt = vec![PageId(0); 1 << 20];
    pages_of_prompt.push(PageId(1));
    let mut flat = namespace.flat_keys(keys).expect("valid");
    let saved = cache.save(&mut flat, table(pages_of_prompt));
    assert_eq!(saved.err().expect("too long").kind(), ErrorKind::Invalid);
    cache.check();
}

#[tokio::test]
async fn a_closed_store_matches_nothing() {
    let (cache, namespace) = Machine::new(Mode::Threads, 64, 64).open();
    let engine = Engine::new(64);
    let tokens = prompt(1, TOKENS);
    drop(save(&cache, &namespace, &engine, &tokens).await);
    let (part, _pages) = {
        let table = engine.table(TOKENS);
        let mut other = namespace.prompt(&[7; TOKENS]);
        (cache.save(&mut other, table.clone()).expect("open"), table)
    };
    assert_eq!(
        cache.match_prefix(&mut namespace.prompt(&tokens)).tokens,
        TOKENS
    );
    assert!(cache.pending(&mut namespace.prompt(&[7; TOKENS])).is_some());
    cache.close().await.expect("nothing hangs");
    let matched = cache.match_prefix(&mut namespace.prompt(&tokens));
    assert_eq!((matched.tokens, matched.tokens_asked), (0, TOKENS));
    assert!(cache.pending(&mut namespace.prompt(&[7; TOKENS])).is_none());
    drop(part);
}

/// A path of the engine's own making that panics when it is asked something for the n-th time.
struct Fused<'a> {
    path: Prompt<'a>,
    left: std::cell::Cell<u32>,
}

impl Fused<'_> {
    fn look(&self) {
        let left = self.left.get();
        assert_ne!(left, 0, "the fuse burns");
        self.left.set(left - 1);
    }
}

impl HashPath for Fused<'_> {
    fn root(&self) -> Key {
        self.look();
        self.path.root()
    }
    fn blocks(&self) -> usize {
        self.look();
        self.path.blocks()
    }
    fn hashed(&self) -> &[Key] {
        self.look();
        self.path.hashed()
    }
    fn hash_to(&mut self, blocks: usize) {
        self.look();
        self.path.hash_to(blocks);
    }
    fn is_flat(&self) -> bool {
        self.look();
        self.path.is_flat()
    }
}

#[tokio::test]
async fn a_path_that_panics_takes_the_store_with_it_nowhere() {
    let (cache, namespace) = Machine::new(Mode::Threads, 64, 64).open();
    let engine = Engine::new(128);
    let known = prompt(1, TOKENS);
    drop(save(&cache, &namespace, &engine, &known).await);
    let table = engine.table(TOKENS);
    let keys = || vec![b"a".as_slice(), b"b", b"c"];
    let paths = || {
        let flat = namespace.flat_keys(keys()).expect("valid");
        [
            namespace.prompt(&known),
            namespace.prompt(&[9; TOKENS]),
            flat,
        ]
    };
    type Call<'a> = &'a dyn Fn(&mut Fused);
    let calls: [Call; 4] = [
        &|path| {
            cache.match_prefix(path);
        },
        &|path| drop(cache.lease(path).expect("open")),
        &|path| drop(cache.save(path, table.clone()).expect("open")),
        &|path| drop(cache.pending(path)),
    ];
    for which in 0..paths().len() {
        // The pending blocks that are waited for.
        let waited = cache
            .save(&mut paths()[which], table.clone())
            .expect("open");
        for call in calls {
            for left in 0.. {
                let mut path = Fused {
                    path: paths()[which].clone(),
                    left: left.into(),
                };
                let called = catch_unwind(AssertUnwindSafe(|| call(&mut path)));
                cache.check();
                if called.is_ok() {
                    break;
                }
            }
        }
        drop(waited);
    }
    let report = load(&cache, &namespace, &engine, &known).await;
    assert_eq!(report.tokens, TOKENS);
    cache.flush().await;
    assert_balanced(&cache);
}

/// One that does not hash what it is asked for.
struct Lazy(Key);

impl HashPath for Lazy {
    fn root(&self) -> Key {
        self.0
    }
    fn blocks(&self) -> usize {
        7
    }
    fn hashed(&self) -> &[Key] {
        &[]
    }
    fn hash_to(&mut self, _: usize) {}
}

#[tokio::test]
async fn a_path_that_does_not_hash_is_a_miss() {
    let (cache, namespace) = Machine::new(Mode::Threads, 64, 64).open();
    let root = namespace.root();
    let looking = cache.clone();
    let matched = tokio::task::spawn_blocking(move || looking.match_prefix(&mut Lazy(root)));
    assert_eq!(soon(matched).await.expect("no panic").tokens, 0);
    assert_eq!(cache.lease(&mut Lazy(root)).expect("open").tokens(), 0);
}

#[test]
fn a_configuration_beyond_all_bounds_is_refused_by_name() {
    type Change = (&'static str, fn(&mut Config));
    let changes: [Change; 8] = [
        ("host", |config| config.host.capacity_bytes = u64::MAX),
        ("host", |config| config.host.capacity_bytes = 1 << 62),
        ("device", |config| {
            config.device = DeviceConfig {
                capacity_bytes: u64::MAX,
            }
        }),
        ("batch_delay_ms", |config| {
            disk(config).batch_delay_ms = u64::MAX
        }),
        ("batch_bytes", |config| disk(config).batch_bytes = u64::MAX),
        ("reads_in_flight", |config| {
            disk(config).reads_in_flight = usize::MAX
        }),
        ("heads", |config| config.geometry.planes[0].heads = u32::MAX),
        ("head_bytes", |config| {
            config.geometry.planes[0].head_bytes = u32::MAX
        }),
    ];
    for (named, change) in changes {
        let mut changed = config(64).with_disk(DiskConfig::new("simulated", 16 << 20));
        change(&mut changed);
        let machine = Machine::new(Mode::Threads, 64, 64);
        let opened = Cache::builder(changed)
            .disk(std::sync::Arc::new(machine.open_disk()))
            .open();
        let error = opened.err().expect(named);
        assert!(
            [ErrorKind::Invalid, ErrorKind::Unavailable].contains(&error.kind()),
            "{named}: {error}"
        );
        assert!(error.to_string().contains(named), "{named}: {error}");
    }
}

fn disk(config: &mut Config) -> &mut DiskConfig {
    config.disk.as_mut().expect("it has one")
}

/// Bounds that are no bounds.
#[tokio::test]
async fn a_store_without_bounds_works() {
    let mut machine = Machine::new(Mode::Threads, 64, 64);
    machine.disk.capacity_bytes = u64::MAX;
    machine.disk.queue_bytes = u64::MAX;
    machine.disk.warm_bytes = u64::MAX;
    machine.prefill = Some(f64::MAX);
    let engine = Engine::new(128);
    let tokens = prompt(1, TOKENS);
    let (cache, namespace) = machine.open();
    let durable = save_durably(&cache, &namespace, &engine, &tokens).await;
    assert_eq!(durable, 6);
    cache.close().await.expect("nothing hangs");
    for prefill in [f64::MAX, f64::MIN_POSITIVE, 5e-324] {
        machine.prefill = Some(prefill);
        let (cache, namespace) = machine.open();
        let report = load(&cache, &namespace, &engine, &tokens).await;
        assert_eq!(report.tokens, TOKENS);
        let lease = cache.lease(&mut namespace.prompt(&tokens)).expect("open");
        let options = LoadOptions {
            extent: stemkv::Extent::WhatPays,
            deadline: Some(Duration::MAX),
            ..LoadOptions::default()
        };
        let table = engine.table(TOKENS);
        let load = cache.load(&lease, table.clone(), options).expect("valid");
        let report = soon(load.finish()).await;
        engine.verify(&table, &tokens, 0..report.tokens);
        engine.free(table);
        let compacted = cache.compact(u64::MAX).await.expect("the disk works");
        assert_eq!(compacted.records_evicted, 0, "all is leased");
        drop(lease);
        cache.close().await.expect("nothing hangs");
        assert_balanced(&cache);
    }
}

#[test]
fn a_geometry_beyond_all_bounds_is_refused() {
    let wide = KvGeometry::gqa(3, 2, (1 << 31) + 8, Dtype::Bf16, 4);
    assert_eq!(wide.expect_err("too wide").kind(), ErrorKind::Invalid);
    let wide = KvGeometry::mla(3, (1 << 30) + 8, Dtype::F32, 4);
    assert_eq!(wide.expect_err("too wide").kind(), ErrorKind::Invalid);
}
