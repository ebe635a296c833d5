//! Random operations on a whole store, against a plain set of the prefixes that were saved: what
//! hits was saved and is byte-equal, what is leased stays, and in a store that is large enough
//! everything that was saved hits, also after it was opened again.
//!
//! The store runs in the order of one thread over a simulated disk, so a failure shrinks.
#![cfg(feature = "sim")]

mod support;

use std::collections::HashSet;

use proptest::prelude::*;
use stemkv::{Cache, Lease, LoadOptions, OpenNamespace, PrefetchGoal};
use stemkv_store::Fence;
use support::machine::{CHUNK, DEVICE_CHUNK, Machine, Mode, assert_balanced};
use support::{Engine, prompt};

/// A prompt of a small tree: one of three roots, which leaves it at some token.
#[derive(Clone, Debug)]
struct Path {
    root: u32,
    fork: usize,
    branch: u32,
    tokens: usize,
}

impl Path {
    fn tokens(&self) -> Vec<u32> {
        let mut tokens = prompt(self.root, self.tokens);
        for token in tokens.iter_mut().skip(self.fork) {
            *token += 1000 * self.branch;
        }
        tokens
    }
}

#[derive(Clone, Debug)]
enum Step {
    Save(Path),
    /// Given up after some layers.
    SaveInPart(Path, u32),
    Load(Path, usize),
    DropLoad(Path),
    Lease(Path),
    Prefetch(Path, u64),
    /// One of the leases that are held.
    DropLease(usize),
    LoadLeased(usize),
    Flush,
    Compact(u64),
    Reopen,
}

fn path() -> impl Strategy<Value = Path> {
    (0..3_u32, 0..48_usize, 0..3_u32, 0..48_usize).prop_map(|(root, fork, branch, tokens)| Path {
        root,
        fork,
        branch,
        tokens,
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => path().prop_map(Step::Save),
        2 => (path(), 0..3_u32).prop_map(|(path, layers)| Step::SaveInPart(path, layers)),
        8 => (path(), 0..24_usize).prop_map(|(path, from)| Step::Load(path, from)),
        1 => path().prop_map(Step::DropLoad),
        3 => path().prop_map(Step::Lease),
        2 => (path(), 0..12_u64).prop_map(|(path, budget)| Step::Prefetch(path, budget)),
        2 => any::<usize>().prop_map(Step::DropLease),
        2 => any::<usize>().prop_map(Step::LoadLeased),
        1 => Just(Step::Flush),
        1 => (0..16_u64).prop_map(Step::Compact),
        1 => Just(Step::Reopen),
    ]
}

struct Run {
    machine: Machine,
    cache: Cache,
    namespace: OpenNamespace,
    engine: Engine,
    /// Every prefix of whole blocks that a completed save covered.
    saved: HashSet<Vec<u32>>,
    leases: Vec<(Vec<u32>, Lease)>,
    /// Is there room for everything?
    ample: bool,
}

impl Run {
    async fn step(&mut self, step: &Step) {
        match step {
            Step::Save(path) => self.save(&path.tokens(), 3).await,
            Step::SaveInPart(path, layers) => self.save(&path.tokens(), *layers).await,
            Step::Load(path, from) => {
                let tokens = path.tokens();
                let lease = self.lease(&tokens);
                let whole = self.load(&tokens, &lease, *from).await;
                // Without a disk that is full of leases nothing of it can be missing.
                assert!(whole || !self.ample);
            }
            Step::DropLoad(path) => {
                let tokens = path.tokens();
                let lease = self.lease(&tokens);
                let table = self.engine.table(tokens.len());
                let load = self
                    .cache
                    .load(&lease, table.clone(), LoadOptions::default());
                let pages = load.expect("valid").cancel();
                pages.wait().await.expect("the device works");
                self.engine.free(table);
            }
            Step::Lease(path) => {
                let tokens = path.tokens();
                let lease = self.lease(&tokens);
                if self.leases.len() < 3 {
                    self.leases.push((tokens, lease));
                }
            }
            Step::Prefetch(path, budget) => {
                let goal = PrefetchGoal {
                    budget_bytes: budget * CHUNK,
                    device_budget_bytes: budget * DEVICE_CHUNK,
                    ..PrefetchGoal::default()
                };
                let lease = self.lease(&path.tokens());
                let prefetch = self.cache.prefetch(&lease, goal).expect("open");
                let report = prefetch.finish().await;
                assert!(report.read_blocks as u64 <= *budget);
                assert!(report.tokens <= lease.tokens());
            }
            Step::DropLease(i) => {
                if !self.leases.is_empty() {
                    self.leases.swap_remove(i % self.leases.len());
                }
            }
            Step::LoadLeased(i) => {
                if !self.leases.is_empty() {
                    let (tokens, lease) = self.leases[i % self.leases.len()].clone();
                    self.load(&tokens, &lease, 0).await;
                }
            }
            Step::Flush => self.cache.flush().await,
            // Of a store with room for everything, nothing has to go.
            Step::Compact(_) if self.ample => {
                self.cache.compact(1).await.expect("the disk works");
            }
            Step::Compact(chunks) => {
                self.cache
                    .compact(chunks * CHUNK)
                    .await
                    .expect("the disk works");
            }
            Step::Reopen => {
                self.leases.clear();
                self.cache.close().await.expect("nothing hangs");
                assert_balanced(&self.cache);
                (self.cache, self.namespace) = self.machine.open();
            }
        }
        self.cache.check();
        let disk = self.cache.stats().disk.expect("there is one");
        assert!(disk.used_bytes <= disk.capacity_bytes, "{disk:?}");
    }

    async fn save(&mut self, tokens: &[u32], layers: u32) {
        let table = self.engine.table(tokens.len());
        self.engine.compute(&table, tokens, 0);
        let save = self
            .cache
            .save(&mut self.namespace.prompt(tokens), table.clone())
            .expect("open");
        for layer in 0..layers {
            save.layer(layer, Fence::reached()).expect("once");
        }
        let report = save.report().clone();
        assert!(report.declined_blocks == 0 || !self.ample, "{report:?}");
        let pages = save.pages_free();
        drop(save);
        pages.wait().await.expect("the device works");
        self.engine.free(table);
        if layers == 3 {
            self.saved
                .extend((1..=tokens.len() / 4).map(|blocks| tokens[..4 * blocks].to_vec()));
        }
    }

    fn lease(&self, tokens: &[u32]) -> Lease {
        let matched = self
            .cache
            .match_prefix(&mut self.namespace.prompt(tokens))
            .tokens;
        let lease = self
            .cache
            .lease(&mut self.namespace.prompt(tokens))
            .expect("open");
        assert_eq!(lease.tokens(), matched, "a lease is a match that is pinned");
        let known = (0..=tokens.len() / 4)
            .rev()
            .map(|blocks| 4 * blocks)
            .find(|&length| length == 0 || self.saved.contains(&tokens[..length]))
            .expect("0 is always known");
        match self.ample {
            true => assert_eq!(lease.tokens(), known, "everything saved hits: {tokens:?}"),
            false => assert!(lease.tokens() <= known, "never saved: {tokens:?}"),
        }
        lease
    }

    /// Loads what is leased and compares it; did all of it come?
    async fn load(&self, tokens: &[u32], lease: &Lease, from: usize) -> bool {
        let options = LoadOptions {
            from_token: from.min(lease.tokens()),
            ..LoadOptions::default()
        };
        let from = options.from_token;
        let table = self.engine.table(tokens.len());
        let load = self.cache.load(lease, table.clone(), options);
        let report = load.expect("valid").finish().await;
        self.engine.verify(&table, tokens, from..report.tokens);
        let kept = (0..from).all(|token| self.engine.is_untouched(&table, token));
        assert!(kept, "tokens below from_token are left alone");
        self.engine.free(table);
        let whole = report.tokens == lease.tokens();
        // Nothing fails here, so only room in the host tier can be missing.
        assert!(whole || report.cut.as_deref() == Some("busy"), "{report:?}");
        whole
    }
}

fn run(steps: &[Step], device_chunks: u64, host_chunks: u64, disk_chunks: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut machine = Machine::new(Mode::Inline, host_chunks, disk_chunks);
        machine.device_chunks = device_chunks;
        let (cache, namespace) = machine.open();
        let mut run = Run {
            machine,
            cache,
            namespace,
            engine: Engine::new(64),
            saved: HashSet::new(),
            leases: Vec::new(),
            ample: disk_chunks >= 4000,
        };
        for step in steps {
            run.step(step).await;
        }
        run.leases.clear();
        run.cache.flush().await;
        assert_balanced(&run.cache);
        run.cache.close().await.expect("nothing hangs");
    });
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 150,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn with_room_for_everything_all_that_was_saved_hits(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        run(&steps, 20, 1000, 4000);
    }

    #[test]
    fn a_small_host_tier_over_a_large_disk_loses_nothing_either(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        // The largest load and the leases fit; what is not durable yet is pinned, so flush decides.
        run(&steps, 0, 96, 4000);
    }

    #[test]
    fn with_little_room_a_hit_was_saved_and_is_equal(
        steps in prop::collection::vec(step(), 1..80), device in 0..30_u64, host in 4..24_u64,
        disk in 8..40_u64,
    ) {
        run(&steps, device, host, disk);
    }
}
