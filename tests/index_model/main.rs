//! Shown: the index answers as a plain map does, whatever the order of calls, and never breaks a
//! structural invariant (`Index::check`) or prefix closure (I2).
//!
//! How: random operations run against the index and against a model that keeps one entry for each
//! known path and knows nothing of runs, splits, merges or recency. After each operation every path
//! is matched in both. Eviction may choose what it likes; the model checks that the choice was legal
//! and then follows it. The order of eviction is pinned down in `tests/index_replay.rs`.

#![cfg(feature = "sim")]

mod model;

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::sync::Arc;

use model::{Block, Model};
use proptest::prelude::*;
use stemkv::index::{Claim, Ended, Evicted, Index, Matched, Pin, Pool};
use stemkv::{HashPath, Prompt};
use stemkv_store::{DeviceSlotId, Key, RecordId, RecordInfo, SlotId, SystemClock, Tier};

/// Devices that the index is for.
const DEVICES: usize = 3;

const POOLS: [Pool; 5] = [
    Pool::Device(0),
    Pool::Device(1),
    Pool::Device(2),
    Pool::Host,
    Pool::Disk,
];

const ROOT: Key = Key([5; 32]);

/// A prompt of blocks, each of one token: few different ones, so that prefixes are shared.
type Path = Vec<u32>;

fn prompt(path: &[u32]) -> Prompt<'_> {
    Prompt::tokens(ROOT, 1, path)
}

fn key(path: &[u32]) -> Key {
    prompt(path).get(path.len() - 1).expect("not empty")
}

#[derive(Clone, Debug)]
enum Op {
    /// By a device.
    Pin(Path, usize),
    Claim(Path, usize),
    /// Publishes the next block of a claim, or several.
    Publish(usize, usize),
    Abandon(usize, usize),
    IntoPin(usize),
    Drop(usize),
    Truncate(usize, usize),
    SetRecord(usize, usize),
    SetHost(usize, usize),
    SetDevice(usize, usize, usize),
    Lost(usize, usize, Pool),
    /// Any chunk, or only copies.
    Evict(Pool, usize, bool),
    /// Moves the coldest only copies of a device's tier down, as far as they are still there.
    Demote(usize, usize),
    Restart,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let path = || prop::collection::vec(0u32..3, 1..9);
    let n = || 0usize..9;
    let pool = || prop::sample::select(&POOLS[..]);
    let device = || 0..DEVICES;
    let op = prop_oneof![
        3 => (path(), device()).prop_map(|(path, device)| Op::Pin(path, device)),
        6 => (path(), 1usize..9).prop_map(|(path, n)| Op::Claim(path, n)),
        8 => (n(), 1usize..9).prop_map(|(at, n)| Op::Publish(at, n)),
        2 => (n(), n()).prop_map(|(at, n)| Op::Abandon(at, n)),
        3 => n().prop_map(Op::IntoPin),
        6 => n().prop_map(Op::Drop),
        1 => (n(), n()).prop_map(|(at, n)| Op::Truncate(at, n)),
        6 => (n(), n()).prop_map(|(at, n)| Op::SetRecord(at, n)),
        2 => (n(), n()).prop_map(|(at, n)| Op::SetHost(at, n)),
        6 => (n(), n(), device()).prop_map(|(at, n, device)| Op::SetDevice(at, n, device)),
        2 => (n(), n(), pool()).prop_map(|(at, n, pool)| Op::Lost(at, n, pool)),
        6 => (pool(), 0usize..6, any::<bool>()).prop_map(|(pool, n, all)| Op::Evict(pool, n, all)),
        1 => (0usize..6, device()).prop_map(|(n, device)| Op::Demote(n, device)),
        1 => Just(Op::Restart),
    ];
    prop::collection::vec(op, 1..80)
}

struct Held<T> {
    number: u64,
    path: Path,
    /// Positions that a claim still has to fill.
    open: Vec<usize>,
    /// Those that it filled.
    published: Vec<usize>,
    it: T,
}

struct World {
    index: Arc<Index>,
    model: Model,
    pins: Vec<Held<Pin>>,
    claims: Vec<Held<Claim>>,
    paths: BTreeSet<Path>,
    next: u64,
}

fn assert_evicted(evicted: &Evicted, before: Block, pool: Pool) {
    let device = match pool {
        Pool::Device(device) => before.devices[device],
        _ => None,
    };
    assert_eq!(evicted.device.map(|slot| slot.0), device);
    let host = before.host.filter(|_| pool == Pool::Host);
    assert_eq!(evicted.host.map(|slot| slot.0), host);
    let record = before.record.filter(|_| pool == Pool::Disk);
    assert_eq!(evicted.record.map(|record| record.0.get()), record);
    assert_eq!(evicted.forgotten, !before.without(pool).is_resident());
}

fn new_index() -> Arc<Index> {
    Arc::new(Index::for_devices(
        Arc::new(SystemClock::default()),
        DEVICES,
    ))
}

impl World {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn block(&mut self, path: &[u32]) -> &mut Block {
        self.model.blocks.get_mut(path).expect("pinned, so known")
    }

    fn publish(&mut self, at: usize, count: usize) {
        let mut slots = Vec::new();
        for _ in 0..count.min(self.claims[at].open.len()) {
            let slot = self.number() as u32;
            let i = self.claims[at].open.remove(0);
            slots.push((i, SlotId(slot)));
            self.claims[at].published.push(i);
            let path = self.claims[at].path[..=i].to_vec();
            *self.block(&path) = Block {
                host: Some(slot),
                pending: false,
                ..*self.block(&path)
            };
        }
        match slots[..] {
            [(i, slot)] => self.claims[at].it.publish(i, slot),
            _ => self.claims[at].it.publish_all(&slots),
        }
    }

    fn abandon(&mut self, at: usize, from: usize) {
        let claim = &mut self.claims[at];
        let (kept, gone): (Vec<_>, Vec<_>) = claim.open.drain(..).partition(|&i| i < from);
        claim.open = kept;
        let (path, number) = (claim.path.clone(), claim.number);
        if gone.is_empty() {
            return;
        }
        for i in gone {
            self.block(&path[..=i]).pending = false;
        }
        // What remains pinned: up to `from`, and what the claim filled or fills behind it.
        let held = &self.claims[at];
        let kept = held.open.iter().chain(&held.published).max();
        let keep = kept.map_or(0, |last| last + 1).max(from).min(path.len());
        self.claims[at].path.truncate(keep);
        self.model.pinned.insert(number, path[..keep].to_vec());
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Pin(path, device) => {
                let (pin, matched) = self.index.pin_on(*device, &mut prompt(path));
                assert_eq!(matched, self.model.matched(path, *device));
                assert_eq!(pin.blocks(), matched.blocks);
                let path = path[..matched.blocks].to_vec();
                let number = self.number();
                self.model.pinned.insert(number, path.clone());
                self.pins.push(Held {
                    number,
                    path,
                    open: vec![],
                    published: vec![],
                    it: pin,
                });
            }
            Op::Claim(path, blocks) => {
                let path = path[..path.len().min(*blocks)].to_vec();
                let claim = self.index.claim(&mut prompt(&path), *blocks);
                let mut mine = Vec::new();
                for i in 0..path.len() {
                    let block = self.model.blocks.entry(path[..=i].to_vec()).or_default();
                    if !block.is_resident() && !block.pending {
                        block.pending = true;
                        mine.push(i);
                    }
                }
                assert_eq!(claim.positions(), mine);
                let number = self.number();
                self.model.pinned.insert(number, path.clone());
                self.claims.push(Held {
                    number,
                    path,
                    open: mine,
                    published: vec![],
                    it: claim,
                });
            }
            Op::Publish(at, count) if !self.claims.is_empty() => {
                self.publish(at % self.claims.len(), *count);
            }
            Op::Abandon(at, from) if !self.claims.is_empty() => {
                let at = at % self.claims.len();
                self.claims[at].it.abandon_from(*from);
                self.abandon(at, *from);
            }
            Op::IntoPin(at) if !self.claims.is_empty() => {
                let at = at % self.claims.len();
                self.abandon(at, 0);
                let held = self.claims.swap_remove(at);
                let pin = held.it.into_pin();
                let resident = self.model.matched(&held.path, 0).blocks;
                assert_eq!(pin.blocks(), resident);
                let path = held.path[..resident].to_vec();
                self.model.pinned.insert(held.number, path.clone());
                self.pins.push(Held {
                    path,
                    it: pin,
                    number: held.number,
                    open: vec![],
                    published: vec![],
                });
            }
            Op::Drop(at) if at % 2 == 0 && !self.claims.is_empty() => {
                let at = at % self.claims.len();
                self.abandon(at, 0);
                let held = self.claims.swap_remove(at);
                self.model.pinned.remove(&held.number);
            }
            Op::Drop(at) if !self.pins.is_empty() => {
                let held = self.pins.swap_remove(at % self.pins.len());
                self.model.pinned.remove(&held.number);
            }
            Op::Truncate(at, blocks) if !self.pins.is_empty() => {
                let at = at % self.pins.len();
                let held = &mut self.pins[at];
                held.it.truncate(*blocks);
                held.path.truncate(*blocks);
                assert_eq!(held.it.blocks(), held.path.len());
                self.model.pinned.insert(held.number, held.path.clone());
            }
            Op::SetRecord(at, i)
            | Op::SetHost(at, i)
            | Op::SetDevice(at, i, _)
            | Op::Lost(at, i, _)
                if !self.pins.is_empty() =>
            {
                let at = at % self.pins.len();
                if self.pins[at].path.is_empty() {
                    return;
                }
                let i = i % self.pins[at].path.len();
                let path = self.pins[at].path[..=i].to_vec();
                let number = self.number();
                let pin = &self.pins[at].it;
                let block = self.model.blocks.get_mut(&path).expect("pinned, so known");
                match op {
                    Op::SetRecord(..) => {
                        let record = RecordId(NonZeroU64::new(number).expect("from 1 on"));
                        assert_eq!(pin.set_record(i, record), block.record.is_none());
                        block.record.get_or_insert(number);
                    }
                    Op::SetHost(..) => {
                        let free = block.host.is_none() && !block.pending;
                        assert_eq!(pin.set_host(i, SlotId(number as u32)), free);
                        if free {
                            block.host = Some(number as u32);
                        }
                    }
                    Op::SetDevice(_, _, device) => {
                        let welcome = block.devices[*device].is_none() && block.is_resident();
                        let slot = DeviceSlotId(number as u32);
                        assert_eq!(pin.set_device(i, *device, slot), welcome);
                        if welcome {
                            block.devices[*device] = Some(number as u32);
                        }
                    }
                    Op::Lost(_, _, pool) => {
                        let lost = pin.lost(i, *pool);
                        assert_eq!(lost.is_some(), block.has(*pool));
                        let before = std::mem::replace(block, block.without(*pool));
                        if let Some(lost) = lost {
                            assert_evicted(&lost, before, *pool);
                        }
                    }
                    _ => unreachable!("the pattern above"),
                }
            }
            Op::Evict(pool, count, all) => {
                let evicted = match all {
                    true => self.index.evict(*pool, *count),
                    false => self.index.evict_copies(*pool, *count),
                };
                for evicted in &evicted {
                    let before = self.model.evict(evicted.key, *pool);
                    assert_evicted(evicted, before, *pool);
                    assert!(*all || !evicted.forgotten, "only copies stay");
                }
                assert!(evicted.len() <= *count);
            }
            Op::Demote(count, device) => {
                let pool = Pool::Device(*device);
                let Some((pin, positions)) = self.index.coldest_only_copies(pool, *count) else {
                    return;
                };
                assert!(positions.len() <= *count && positions.is_sorted());
                for i in positions {
                    let state = pin.states(i..i + 1)[0];
                    let slot = self.number() as u32;
                    assert!(pin.set_host(i, SlotId(slot)));
                    let found = self.model.blocks.iter_mut();
                    let (_, block) = found
                        .into_iter()
                        .find(|(path, _)| key(path) == state.key)
                        .expect("known");
                    assert!(block.has(pool) && !block.without(pool).is_resident());
                    block.host = Some(slot);
                }
            }
            Op::Restart => self.restart(),
            _ => {}
        }
    }

    /// All that is left is what the disk tier's records say.
    fn restart(&mut self) {
        self.pins.clear();
        self.claims.clear();
        self.model.pinned.clear();
        self.index.check();
        let mut records: Vec<RecordInfo> = Vec::new();
        for (path, block) in &self.model.blocks {
            if let Some(record) = block.record {
                records.push(RecordInfo {
                    id: RecordId(NonZeroU64::new(record).expect("from 1 on")),
                    namespace: ROOT,
                    parent: if path.len() > 1 {
                        key(&path[..path.len() - 1])
                    } else {
                        ROOT
                    },
                    key: key(path),
                    depth: path.len() as u32 - 1,
                    bytes: 4096,
                    last_use_ms: record % 7,
                });
            }
        }
        records.sort_by_key(|record| record.id.0.get().wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let all: BTreeMap<Path, Block> = std::mem::take(&mut self.model.blocks);
        let on_disk = |path: &[u32]| all.get(path).is_some_and(|block| block.record.is_some());
        let mut unreachable = BTreeSet::new();
        for (path, block) in &all {
            let Some(record) = block.record else { continue };
            if (1..path.len()).all(|n| on_disk(&path[..n])) {
                let block = Block {
                    devices: [None; DEVICES],
                    host: None,
                    pending: false,
                    ..*block
                };
                self.model.blocks.insert(path.clone(), block);
            } else {
                unreachable.insert(record);
            }
        }
        self.index = new_index();
        let told = self.index.restore(records);
        assert_eq!(
            told.iter().map(|id| id.0.get()).collect::<BTreeSet<_>>(),
            unreachable
        );
    }

    fn compare(&mut self) {
        self.index.check();
        self.model.forget();
        for path in &self.paths {
            for device in 0..DEVICES {
                let matched = self.index.match_prefix_on(device, &mut prompt(path));
                assert_eq!(matched, self.model.matched(path, device), "{path:?}");
            }
        }
        let stats = self.index.stats().total;
        let blocks = &self.model.blocks;
        let count = |wanted: &dyn Fn(&Path, &Block) -> bool| {
            blocks
                .iter()
                .filter(|(path, block)| wanted(path, block))
                .count()
        };
        assert_eq!(stats.blocks, blocks.len());
        assert_eq!(stats.pending_blocks, count(&|_, block| block.pending));
        assert_eq!(
            stats.hole_blocks,
            count(&|_, block| !block.is_resident() && !block.pending)
        );
        assert_eq!(
            stats.pinned_blocks,
            count(&|path, _| self.model.is_pinned(path))
        );
        let by_tier = Tier::ALL.map(|tier| stats.tier_blocks(tier));
        let expected = [
            count(&|_, block| block.is_on_device()),
            count(&|_, block| block.host.is_some()),
            count(&|_, block| block.record.is_some()),
        ];
        assert_eq!(by_tier, expected);
        let on_device = |device: usize| count(&|_, block| block.devices[device].is_some());
        let on_devices: Vec<usize> = (0..DEVICES).map(on_device).collect();
        assert_eq!(self.index.device_blocks(), on_devices);
        for held in &self.pins {
            let by_device = |device| held.it.states_on(device, 0..held.path.len());
            let states = (0..DEVICES).flat_map(|device| {
                let states = by_device(device).into_iter().enumerate();
                states.map(move |(i, state)| (device, i, state))
            });
            for (device, i, state) in states {
                let block = blocks[&held.path[..=i]];
                assert_eq!(state.key, key(&held.path[..=i]));
                assert_eq!(state.device.map(|slot| slot.0), block.devices[device]);
                let others = (0..DEVICES).filter(|&other| other != device);
                let elsewhere = others
                    .into_iter()
                    .find(|&other| block.devices[other].is_some());
                assert_eq!(state.elsewhere, elsewhere);
                assert_eq!(state.host.map(|slot| slot.0), block.host);
                assert_eq!(state.record.map(|record| record.0.get()), block.record);
                assert_eq!(state.pending, block.pending);
            }
        }
        let mut visited = 0;
        self.index.visit(&mut |run| visited += run.blocks.len());
        assert_eq!(visited, blocks.len());
    }
}

fn run(ops: &[Op]) {
    let mut world = World {
        index: new_index(),
        model: Model::default(),
        pins: Vec::new(),
        claims: Vec::new(),
        paths: BTreeSet::new(),
        next: 0,
    };
    for op in ops {
        if let Op::Pin(path, _) | Op::Claim(path, _) = op {
            world.paths.insert(path.clone());
        }
        world.apply(op);
        world.compare();
    }
    world.pins.clear();
    while !world.claims.is_empty() {
        world.abandon(0, 0);
        world.claims.swap_remove(0);
    }
    world.model.pinned.clear();
    world.compare();
    // Nothing is held: all that is left can go. Where a path's only copies alternate between the
    // tiers, each pass frees the next.
    while world.index.stats().total.blocks > 0 {
        let mut gone = 0;
        for pool in POOLS.into_iter().rev() {
            for evicted in world.index.evict(pool, usize::MAX) {
                world.model.evict(evicted.key, pool);
                gone += 1;
            }
            world.compare();
        }
        assert!(gone > 0, "something is stuck for ever");
    }
    assert_eq!(world.index.stats(), Default::default());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]
    #[test]
    fn the_index_agrees_with_a_map_and_never_breaks_an_invariant(ops in ops()) {
        run(&ops);
    }
}
