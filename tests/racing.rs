//! Engines on several threads and devices that do everything at once on a store with faults, which is closed
//! under their hands: whatever hits is byte-equal, what a save said it would bring is counted once, and nothing is
//! held in the end.
#![cfg(feature = "sim")]

mod support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use stemkv::{Cache, LoadOptions, LookAheadLimits, OpenNamespace, PrefetchGoal, Prompt, Stats};
use stemkv_store::{Fence, SimDevice, SimDeviceFault};
use support::machine::{CHUNK, DEVICE_CHUNK, Machine, Mode, assert_balanced};
use support::{Engine, mix, tree_prompt};

const TOKENS: usize = 40;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = mix(self.0);
        (self.0 >> 16) % bound
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// One engine: until the store is closed, or so many turns.
struct Racer {
    cache: Cache,
    namespace: OpenNamespace,
    engine: Engine,
    random: Random,
    /// Blocks that saves said they would bring.
    promised: Arc<AtomicU64>,
}

impl Racer {
    fn run(mut self, turns: u32) {
        let limits = LookAheadLimits {
            host_bytes: 12 * CHUNK,
            device_bytes: 4 * DEVICE_CHUNK,
            deadline: Some(Duration::from_secs(5)),
        };
        let look_ahead = self.cache.look_ahead(limits);
        for _ in 0..turns {
            let tokens = tree_prompt(self.random.below(24) as u32, 3, TOKENS);
            // By its keys, too: those hit what was saved by the same keys alone.
            let names: Vec<Vec<u8>> = (1..=TOKENS / 4)
                .map(|blocks| format!("{:?}", &tokens[..4 * blocks]).into_bytes())
                .map(|name| short(&name).to_vec())
                .collect();
            let keys: Vec<&[u8]> = names.iter().map(Vec::as_slice).collect();
            let mut path = match self.random.below(6) {
                0 => self.namespace.flat_keys(keys).expect("valid"),
                1 => self.namespace.chained_keys(keys).expect("valid"),
                _ => self.namespace.prompt(&tokens),
            };
            let done = match self.random.below(8) {
                0..=2 => self.pass(&mut path, &tokens),
                3 | 4 => self.load(&mut path, &tokens),
                5 => self.prefetch(&mut path),
                6 => {
                    let ahead = (0..3).map(|_| self.cache.lease(&mut path));
                    let ahead: Option<Vec<_>> = ahead.map(Result::ok).collect();
                    ahead.and_then(|ahead| look_ahead.set(&ahead).ok())
                }
                _ => self.look(&mut path),
            };
            if done.is_none() {
                break;
            }
        }
    }

    /// Loads what there is, computes the rest beside it, and saves it.
    fn pass(&mut self, path: &mut Prompt, tokens: &[u32]) -> Option<()> {
        let lease = self.cache.lease(path).ok()?;
        let table = self.engine.table(TOKENS);
        let load = self
            .cache
            .load(&lease, table.clone(), LoadOptions::default());
        let load = load.ok();
        drop(lease);
        let coming = load.as_ref().map_or(0, |load| load.tokens_blocking());
        let save = match self.cache.save(path, table.clone()) {
            Ok(save) => save,
            Err(_) => {
                let pages = load.map(|load| load.cancel());
                pages.inspect(|pages| pages.wait_blocking().expect("it ends"));
                self.engine.free(table);
                return None;
            }
        };
        let new_blocks = save.report().new_blocks as u64;
        self.promised.fetch_add(new_blocks, Ordering::Relaxed);
        if let Some(load) = &load {
            save.computed_from(load).expect("in time");
        }
        let mut layers = [0, 1, 2];
        layers.rotate_left(self.random.below(3) as usize);
        let given_up = self.random.one_in(4).then(|| self.random.below(3));
        let mut is_sound = true;
        for (layer, at) in (0..3).zip(0_u64..) {
            if given_up == Some(at) {
                break;
            }
            is_sound &= load
                .as_ref()
                .is_none_or(|load| load.layer_blocking(layer).is_ok());
            if !is_sound {
                break;
            }
            let id = stemkv_store::LayerId(layer);
            self.engine.compute_layer(&table, tokens, coming, id);
        }
        if is_sound {
            for (layer, at) in layers.into_iter().zip(0_u64..) {
                if given_up == Some(at) {
                    break;
                }
                save.layer(layer, Fence::reached()).expect("once");
            }
        }
        let (saved, durable) = (save.pages_free(), self.random.one_in(3));
        if durable && given_up.is_none() && is_sound {
            save.durable_blocking();
        }
        drop(save);
        let loaded = load.as_ref().map(|load| load.pages_free());
        match load {
            Some(load) if !self.random.one_in(4) => {
                let report = load.finish_blocking();
                self.engine.verify(&table, tokens, 0..report.tokens);
            }
            load => drop(load),
        }
        saved.wait_blocking().expect("it ends");
        loaded.inspect(|pages| pages.wait_blocking().expect("it ends"));
        self.engine.free(table);
        Some(())
    }

    fn load(&mut self, path: &mut Prompt, tokens: &[u32]) -> Option<()> {
        let lease = self.cache.lease(path).ok()?;
        let deadline = match self.random.below(4) {
            0 => Some(Duration::ZERO),
            1 => None,
            _ => Some(Duration::from_secs(10)),
        };
        let options = LoadOptions {
            from_token: self.random.below(lease.tokens() as u64 + 1) as usize,
            deadline,
            ..LoadOptions::default()
        };
        let from = options.from_token;
        let table = self.engine.table(TOKENS);
        self.engine.compute(&table, &tokens[..from], 0);
        let Ok(load) = self.cache.load(&lease, table.clone(), options) else {
            self.engine.free(table);
            return None;
        };
        if self.random.one_in(2) {
            drop(lease);
        }
        let pages = load.pages_free();
        match self.random.below(3) {
            0 => drop(load),
            1 => {
                let own = load.computed_up_to(self.random.below(TOKENS as u64) as usize);
                for layer in 0..3 {
                    let id = stemkv_store::LayerId(layer);
                    let own = own.start.max(from)..own.end.max(from);
                    self.engine
                        .compute_layer(&table, &tokens[..own.end], own.start, id);
                }
                let report = load.finish_blocking();
                self.engine
                    .verify(&table, tokens, 0..report.tokens.max(from));
            }
            _ => {
                let report = load.finish_blocking();
                assert!(report.tokens >= from);
                self.engine.verify(&table, tokens, 0..report.tokens);
            }
        }
        pages.wait_blocking().expect("it ends");
        self.engine.free(table);
        Some(())
    }

    fn prefetch(&mut self, path: &mut Prompt) -> Option<()> {
        let lease = self.cache.lease(path).ok()?;
        let goal = PrefetchGoal {
            budget_bytes: self.random.below(12) * CHUNK,
            device_budget_bytes: self.random.below(12) * DEVICE_CHUNK,
            deadline: (!self.random.one_in(3)).then_some(Duration::from_secs(5)),
            ..PrefetchGoal::default()
        };
        let prefetch = self.cache.prefetch(&lease, goal).ok()?;
        match self.random.below(3) {
            0 => drop(prefetch),
            _ => drop(prefetch.finish_blocking()),
        }
        Some(())
    }

    fn look(&mut self, path: &mut Prompt) -> Option<()> {
        match self.random.below(6) {
            0 => self.cache.flush_blocking(),
            1 => {
                let bytes = self.random.below(8) * CHUNK;
                let _ = pollster::block_on(self.cache.compact(bytes));
            }
            2 => drop(self.cache.stats()),
            3 => {
                // Whoever is waited for waits for nobody.
                if let Some(pending) = self.cache.pending(path) {
                    pollster::block_on(pending.wait());
                }
            }
            _ => {
                self.cache.match_prefix(path);
            }
        }
        self.cache.lease(path).ok().map(drop)
    }
}

/// Short enough for a key.
fn short(name: &[u8]) -> [u8; 8] {
    let state = name
        .iter()
        .fold(7, |state, &byte| mix(state ^ u64::from(byte)));
    state.to_le_bytes()
}

fn assert_counted(stats: &Stats, promised: u64) {
    let count = |name| stats.counter(name);
    let saved = count("saved_blocks");
    assert_eq!(promised, saved + count("abandoned_blocks"), "{stats:?}");
    let durable = count("durable_blocks") - count("durable_later_blocks");
    assert_eq!(saved, durable + count("undurable_blocks"), "{stats:?}");
}

fn race(seed: u64) {
    let mut random = Random(seed);
    let is_faulty = random.one_in(2);
    let mut machine = Machine::with_device_tier(Mode::Threads, 6, 24);
    machine.disk_chunks = 40;
    machine.disk.reads_in_flight = 1 + random.below(3) as usize;
    machine.disk.warm_bytes = random.below(2) * 8 * CHUNK;
    let device = |n: u64| {
        let seed = seed.wrapping_mul(31).wrapping_add(n);
        SimDevice::new(true, move |number| {
            let random = mix(seed ^ mix(number));
            match random % 60 {
                _ if !is_faulty => None,
                0 => Some(SimDeviceFault::Submit),
                1 => Some(SimDeviceFault::Fence),
                2 => Some(SimDeviceFault::Corrupt),
                _ => None,
            }
        })
    };
    machine.device = device(1);
    machine.further = vec![device(2)];
    for round in 0..3 {
        // In place of a close, a runtime that ends.
        let mortal = random.one_in(2).then(|| {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_time()
                .build()
                .expect("threads")
        });
        let builder = match &mortal {
            Some(runtime) => machine.builder().runtime(runtime.handle().clone()),
            None => machine.builder(),
        };
        let (cache, namespace) = machine.open_with(builder);
        if is_faulty {
            machine.medium.fail_call(1 + random.below(60));
        }
        let promised = Arc::new(AtomicU64::new(0));
        let racers: Vec<_> = (0..4)
            .map(|number| {
                let racer = Racer {
                    cache: cache.on_device(number % 2).expect("driven"),
                    namespace: namespace.clone(),
                    engine: Engine::new(64),
                    random: Random(mix(seed ^ (round * 16 + number as u64))),
                    promised: promised.clone(),
                };
                std::thread::spawn(move || racer.run(40))
            })
            .collect();
        std::thread::sleep(Duration::from_micros(random.below(8000)));
        if let Some(runtime) = mortal {
            runtime.shutdown_background();
        } else if round < 2 {
            let others = cache.clone();
            let other = std::thread::spawn(move || others.close_blocking());
            let closed = [cache.close_blocking(), other.join().expect("no panic")];
            for closed in closed {
                assert!(closed.is_ok() || is_faulty, "{closed:?}");
            }
        }
        for racer in racers {
            racer.join().expect("no panic");
        }
        cache.flush_blocking();
        let closed = cache.close_blocking();
        assert!(closed.is_ok() || is_faulty, "{closed:?}");
        // Of a runtime that has ended, calls may still be on their way back.
        let late = Instant::now() + Duration::from_secs(20);
        while cache.stats().index.pins > 0 && Instant::now() < late {
            std::thread::yield_now();
        }
        assert_balanced(&cache);
        assert_counted(&cache.stats(), promised.load(Ordering::Relaxed));
    }
}

#[test]
fn a_store_that_is_closed_under_the_hands_of_many_holds_nothing() {
    let seeds = std::env::var("STEMKV_RACES").ok();
    let seeds: u64 = seeds.map_or(8, |seeds| seeds.parse().expect("a number"));
    let first: u64 = std::env::var("STEMKV_SEED").map_or(0, |seed| seed.parse().expect("a number"));
    for seed in first..first + seeds {
        let (tell, told) = mpsc::channel::<()>();
        let racing = std::thread::spawn(move || {
            race(seed);
            drop(tell);
        });
        if let Err(mpsc::RecvTimeoutError::Timeout) = told.recv_timeout(Duration::from_secs(50)) {
            panic!("seed {seed} hangs");
        }
        assert!(racing.join().is_ok(), "seed {seed}");
    }
}
