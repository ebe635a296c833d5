//! The prefix index: which blocks are known, where their chunks are, what may go.
//!
//! One mutex around a path-compressed radix tree. Under it: no I/O, no await, no hashing and no call
//! into other people's code but the eviction policy. It is a leaf in the order of locks: nothing
//! else is locked while it is held.
//!
//! A node is a *run* of blocks. Runs split where a prompt leaves them, where a pin ends inside them
//! (so that the part that was used gets a recency of its own), and merge again when they are used
//! together or a sibling goes. A pin is (node, length): splits and merges move it.
//!
//! | file | question |
//! |---|---|
//! | `node.rs` | what is a run? |
//! | `tree.rs` | how does its shape change? |
//! | `walk.rs` | how far is a path known? |
//! | `pin.rs` | what does a caller hold? |
//! | `waiting.rs` | how does it wait for another's save? |
//! | `recover.rs` | how is it rebuilt from records? |
//! | `heat.rs` | what is worth having in RAM first? |
//! | `report.rs`, `check.rs` | what does it look like; is it right? |

mod check;
mod heat;
mod node;
mod pin;
mod recover;
mod report;
#[cfg(all(test, feature = "sim"))]
mod tests;
mod tree;
mod waiting;
mod walk;

use std::sync::{Arc, Mutex, MutexGuard};

use serde::Serialize;
use stemkv_store::{Clock, DeviceSlotId, Key, RecordId, Residency, SlotId, Tier};

pub use self::heat::{HotRecord, HotRun, Hottest};
pub use self::node::{KeyBuildHasher, KeyHasher, Pool};
pub use self::pin::{Claim, Pin};
pub use self::report::{IndexStats, NamespaceStats, RunInfo};
pub use self::waiting::PendingWait;
pub use crate::hash::HashPath;
use crate::placement::{EvictionPolicy, Recency, RunId};

use self::node::{Chunk, Node, Places};
use self::pin::Hold;
use self::tree::{Now, Tree};

/// Where one block's chunk is, as one device sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockState {
    /// The block's sequence hash.
    pub key: Key,
    /// Its slot in that device's tier.
    pub device: Option<DeviceSlotId>,
    /// The number of another device that has it in its tier, the first of several.
    pub elsewhere: Option<usize>,
    /// Its slot in the host tier.
    pub host: Option<SlotId>,
    /// Its record in the disk tier.
    pub record: Option<RecordId>,
    /// A save of it is in flight.
    pub pending: bool,
    /// How many leases covered the run that it is in.
    pub hits: u32,
}

/// How far a prompt is known, and what ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Matched {
    /// Leading blocks whose chunk is in some tier.
    pub blocks: usize,
    /// Of those, leading blocks in RAM: in the host tier or in some device's tier.
    pub ram_blocks: usize,
    /// Of those, blocks in the tier of the device that was asked for.
    pub device_blocks: usize,
    /// Of those, blocks in the disk tier alone.
    pub disk_only_blocks: usize,
    /// Blocks directly behind the match whose save is in flight (delayed hits).
    pub pending_blocks: usize,
    /// What stands at the first block that did not match.
    pub ended: Ended,
}

/// What ended a match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// Every full block of the prompt matched.
    #[default]
    Complete,
    /// The block is not in the tree.
    Unknown,
    /// A save of it is in flight.
    Pending,
    /// It is known but its chunk was lost (quarantined or dropped).
    Hole,
}

/// What eviction took out of a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evicted {
    /// The block.
    pub key: Key,
    /// Its slot, when it was taken out of a device's tier: give it back to that device's arena.
    pub device: Option<DeviceSlotId>,
    /// Its slot, when it was taken out of the host tier: give it back to the arena.
    pub host: Option<SlotId>,
    /// Its record, when it was taken out of the disk tier: remove it there.
    pub record: Option<RecordId>,
    /// Is the block gone from every tier of every device?
    pub forgotten: bool,
}

impl BlockState {
    fn new(node: &Node, at: usize, device: usize) -> Self {
        let chunk = node.chunks[at];
        BlockState {
            key: node.keys[at],
            device: node.device_slot(at, device),
            elsewhere: node.device_of(at, Some(device)),
            host: chunk.host(),
            record: chunk.record(),
            pending: chunk.is_pending(),
            hits: node.used.hits,
        }
    }

    /// Is it in any tier, of any device?
    pub fn is_resident(&self) -> bool {
        self.is_in_ram() || self.elsewhere.is_some() || self.record.is_some()
    }

    /// Is it in the host tier or in the device's own?
    pub fn is_in_ram(&self) -> bool {
        self.device.is_some() || self.host.is_some()
    }

    /// The tiers that hold its chunk within the device's reach.
    pub fn residency(&self) -> Residency {
        let mut residency = Residency::NONE;
        if self.device.is_some() {
            residency = residency.with(Tier::Device);
        }
        if self.host.is_some() {
            residency = residency.with(Tier::Host);
        }
        if self.record.is_some() {
            residency = residency.with(Tier::Disk);
        }
        residency
    }
}

impl Evicted {
    /// What `pool` loses when block `at` of `node` goes to where `after` says.
    fn new(node: &Node, at: usize, after: Places, pool: Pool) -> Self {
        let before = node.chunks[at];
        let device = match pool {
            Pool::Device(device) => node.device_slot(at, device),
            _ => None,
        };
        Evicted {
            key: node.keys[at],
            device,
            host: before.host().filter(|_| pool == Pool::Host),
            record: before.record().filter(|_| pool == Pool::Disk),
            forgotten: !after.chunk.is_resident(),
        }
    }
}

/// The index: see the [module](self).
pub struct Index {
    tree: Mutex<Tree>,
    clock: Arc<dyn Clock>,
}

/// Blocks hashed before the first look at the tree, before the second, and how many times more
/// before each next one: a miss at block 0 hashes one block, a long hit looks only a few times.
const HASHED_FIRST: usize = 1;
const HASHED_SECOND: usize = 16;
const HASHED_GROWTH: usize = 4;

impl Index {
    /// An empty index for a store that drives one device. It evicts by recency.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self::for_devices(clock, 1)
    }

    /// An empty index for a store that drives so many devices, at least one.
    pub fn for_devices(clock: Arc<dyn Clock>, devices: usize) -> Self {
        Self::with_policy(clock, devices, &|_| Box::new(Recency::default()))
    }

    /// An empty index with a policy of its own for each pool.
    pub fn with_policy(
        clock: Arc<dyn Clock>,
        devices: usize,
        policy: &dyn Fn(Pool) -> Box<dyn EvictionPolicy>,
    ) -> Self {
        Index {
            tree: Mutex::new(Tree::new(Pool::all(devices).map(policy).collect())),
            clock,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tree> {
        self.tree
            .lock()
            .expect("no operation on the tree panics once it has begun to change it")
    }

    fn unix_ms(&self) -> u64 {
        self.clock.unix_ms()
    }

    /// Locks the tree and asks `look`, which says how many of the hashes the tree knew and answers;
    /// where it knew all and there are more, hashes more, without the lock, and asks again. A path that does
    /// not hash what it is asked for ends there.
    fn look<T>(
        &self,
        path: &mut dyn HashPath,
        look: impl Fn(&Tree, &Key, &[Key]) -> (usize, T),
    ) -> (MutexGuard<'_, Tree>, T) {
        let (namespace, blocks) = (path.root(), path.blocks());
        let mut wanted = HASHED_FIRST;
        loop {
            path.hash_to(wanted);
            let hashed = path.hashed();
            let tree = self.lock();
            let (known, found) = look(&tree, &namespace, hashed);
            if known < hashed.len() || hashed.len() >= blocks || hashed.len() < wanted {
                return (tree, found);
            }
            wanted = (hashed.len() * HASHED_GROWTH).max(HASHED_SECOND);
        }
    }

    /// How far `path` is known. No pin, no touch.
    pub fn match_prefix(&self, path: &mut dyn HashPath) -> Matched {
        self.match_prefix_on(0, path)
    }

    /// The same, with the blocks of the device with this number.
    pub fn match_prefix_on(&self, device: usize, path: &mut dyn HashPath) -> Matched {
        let is_flat = path.is_flat();
        let (_guard, matched) = self.look(path, |tree, namespace, keys| match is_flat {
            true => {
                let (matched, known) = tree.walk_flat(namespace, keys, device);
                (known.len(), matched)
            }
            false => {
                let walk = tree.walk(namespace, keys, device);
                (walk.known, walk.matched)
            }
        });
        matched
    }

    /// Match, pin and touch (one move in the recency order) in one lock acquisition.
    pub fn pin(self: &Arc<Self>, path: &mut dyn HashPath) -> (Pin, Matched) {
        self.pin_on(0, path)
    }

    /// The same, with the match of the device with this number.
    pub fn pin_on(self: &Arc<Self>, device: usize, path: &mut dyn HashPath) -> (Pin, Matched) {
        let unix_ms = self.unix_ms();
        if path.is_flat() {
            let (mut tree, (matched, known)) = self.look(path, |tree, namespace, keys| {
                let (matched, known) = tree.walk_flat(namespace, keys, device);
                (known.len(), (matched, known))
            });
            let known = &known[..matched.blocks];
            let hold = hold_flat(&mut tree, known, unix_ms, true);
            return (Pin::new(Arc::clone(self), hold, known.len()), matched);
        }
        let (mut tree, walk) = self.look(path, |tree, namespace, keys| {
            let walk = tree.walk(namespace, keys, device);
            (walk.known, walk)
        });
        let hold = walk.matched_end.map(|end| {
            let now = tree.next(unix_ms);
            hold_path(&mut tree, end, now, true)
        });
        let blocks = walk.matched.blocks;
        let pin = Pin::new(Arc::clone(self), Hold::Chained(hold), blocks);
        (pin, walk.matched)
    }

    /// Pins the leading blocks of a path that are in some tier, to move their chunks. It is no use of them.
    pub fn pin_to_move(self: &Arc<Self>, namespace: &Key, keys: &[Key], is_flat: bool) -> Pin {
        let mut tree = self.lock();
        let (hold, blocks) = if is_flat {
            let (matched, known) = tree.walk_flat(namespace, keys, 0);
            let known = known[..matched.blocks].iter();
            let pins: Vec<_> = known.map(|&node| tree.link(node, 1)).collect();
            (Hold::Flat(pins), matched.blocks)
        } else {
            let walk = tree.walk(namespace, keys, 0);
            let pin = walk.matched_end.map(|end| tree.link(end.node, end.len));
            (Hold::Chained(pin), walk.matched.blocks)
        };
        drop(tree);
        Pin::for_a_move(Arc::clone(self), hold, blocks)
    }

    /// Claims, of the first `blocks` blocks of `path`, those that are in no tier and not pending
    /// (new blocks and holes). The first `blocks` blocks are pinned, others' pending ones among
    /// them, and touched.
    pub fn claim(self: &Arc<Self>, path: &mut dyn HashPath, blocks: usize) -> Claim {
        path.hash_to(blocks);
        // The path is the caller's code: what it says is asked for without the lock.
        let (namespace, is_flat) = (path.root(), path.is_flat());
        let hashed = path.hashed();
        let keys = &hashed[..blocks.min(hashed.len())];
        let unix_ms = self.unix_ms();
        let mut positions = Vec::new();
        if keys.is_empty() {
            return Claim::new(
                Pin::new(Arc::clone(self), Hold::Chained(None), 0),
                positions,
            );
        }
        let mut tree = self.lock();
        let root = tree.root(namespace);
        if is_flat {
            let mut nodes = Vec::with_capacity(keys.len());
            for (i, key) in keys.iter().enumerate() {
                let (id, is_mine) = match tree.child(root, key) {
                    Some(id) => (id, claim_hole(&mut tree, id, 0)),
                    None => (tree.extend(root, &[*key]), true),
                };
                if is_mine {
                    positions.push(i);
                }
                nodes.push(id);
            }
            let hold = hold_flat(&mut tree, &nodes, unix_ms, false);
            return Claim::new(Pin::new(Arc::clone(self), hold, keys.len()), positions);
        }
        let walk = tree.walk(&namespace, keys, 0);
        let now = tree.next(unix_ms);
        if walk.matched.blocks < walk.known {
            let end = walk.known_end.expect("some blocks are known");
            positions = claim_holes(&mut tree, end);
        }
        let end = match walk.known_end {
            Some(end) if walk.known == keys.len() => end,
            known_end => {
                positions.extend(walk.known..keys.len());
                let mut end = known_end.unwrap_or(walk::Place { node: root, len: 0 });
                if end.len < tree.node(end.node).len() {
                    end.node = tree.split(end.node, end.len);
                }
                let node = tree.extend(end.node, &keys[walk.known..]);
                let len = tree.node(node).len();
                walk::Place { node, len }
            }
        };
        let pin = hold_path(&mut tree, end, now, false);
        let pin = Pin::new(Arc::clone(self), Hold::Chained(Some(pin)), keys.len());
        Claim::new(pin, positions)
    }

    /// A wait for the end of block `i`'s pending; `None` where it is not pending. Wait for the last
    /// pending block of a match, then match again.
    pub fn wait_pending(&self, path: &mut dyn HashPath, i: usize) -> Option<PendingWait> {
        path.hash_to(i + 1);
        let (namespace, is_flat) = (path.root(), path.is_flat());
        let keys = path.hashed().get(..=i)?;
        let mut tree = self.lock();
        let (id, at) = match is_flat {
            true => (tree.child(*tree.roots.get(&namespace)?, &keys[i])?, 0),
            false => {
                let walk = tree.walk(&namespace, keys, 0);
                let end = walk.known_end.filter(|_| walk.known == keys.len())?;
                (end.node, end.len - 1)
            }
        };
        let is_pending = tree.node(id).chunks[at].is_pending();
        is_pending.then(|| tree.waiters.wait(keys[i]))
    }

    /// Takes up to `want` chunks out of `pool`, coldest leaf run first, each run from its tail.
    /// Never a pinned or pending block; never one whose going would leave a descendant without its
    /// ancestor in the union of tiers. Host copies of blocks that are also on disk may go although
    /// they have descendants, once no descendant has a host copy.
    pub fn evict(&self, pool: Pool, want: usize) -> Vec<Evicted> {
        self.evict_while(pool, want, |_, _| true)
    }

    /// As [`Index::evict`], but only runs that were last used before all that `than` covers. Without any pin
    /// every run may go.
    pub fn evict_colder(&self, pool: Pool, want: usize, than: &[Arc<Pin>]) -> Vec<Evicted> {
        let tree = self.lock();
        let uses = than.iter().filter_map(|pin| pin.last_use(&tree));
        let first = uses.min().unwrap_or(u64::MAX);
        drop(tree);
        self.evict_while(pool, want, |node, _| node.used.tick < first)
    }

    /// As [`Index::evict`], but only copies of chunks that another pool holds too. Ends at the first
    /// one that does not: move that one first ([`Index::coldest_only_copies`]).
    pub fn evict_copies(&self, pool: Pool, want: usize) -> Vec<Evicted> {
        self.evict_while(pool, want, |_, rest| rest.is_resident())
    }

    /// Pins the coldest run of `pool`, and says which of its last `want` blocks there no other pool
    /// holds. The pin is no use of them. `None` where no run could be evicted.
    pub fn coldest_only_copies(
        self: &Arc<Self>,
        pool: Pool,
        want: usize,
    ) -> Option<(Pin, Vec<usize>)> {
        let number = pool.number();
        let mut tree = self.lock();
        let id = tree.policies[number].coldest()?;
        let node = tree.node(id);
        let (depth, len) = (node.depth as usize, node.len());
        let only =
            |&at: &usize| node.has(at, number) && !node.without(at, pool).chunk.is_resident();
        let evictable = node.pinned as usize..node.book(number).end as usize;
        let positions = evictable.rev().filter(only).take(want);
        let mut positions: Vec<usize> = positions.map(|at| depth + at).collect();
        positions.reverse();
        let pin = tree.link(id, len);
        drop(tree);
        let hold = Hold::Chained(Some(pin));
        Some((
            Pin::for_a_move(Arc::clone(self), hold, depth + len),
            positions,
        ))
    }

    /// Evicts as long as `may` says so of the run and of what is left of the chunk.
    fn evict_while(
        &self,
        pool: Pool,
        want: usize,
        may: impl Fn(&Node, Chunk) -> bool,
    ) -> Vec<Evicted> {
        let number = pool.number();
        let mut evicted = Vec::new();
        let mut tree = self.lock();
        let mut more = true;
        while more
            && evicted.len() < want
            && let Some(id) = tree.policies[number].coldest()
        {
            while evicted.len() < want && tree.node(id).is_evictable(number) {
                let node = tree.node(id);
                let at = node.book(number).end as usize - 1;
                let after = node.without(at, pool);
                if !may(node, after.chunk) {
                    more = false;
                    break;
                }
                evicted.push(Evicted::new(node, at, after, pool));
                tree.set_chunk(id, at, after);
            }
            tree.settle(id);
        }
        evicted
    }
}

/// Makes a hole pending. Returns whether it was one.
fn claim_hole(tree: &mut Tree, id: RunId, at: usize) -> bool {
    let chunk = tree.node(id).chunks[at];
    let is_hole = chunk.is_hole();
    if is_hole {
        tree.set_chunk(id, at, chunk.with_pending());
    }
    is_hole
}

/// Makes all holes on the path to `end` pending, and returns their positions.
fn claim_holes(tree: &mut Tree, end: walk::Place) -> Vec<usize> {
    let mut positions = Vec::new();
    let (mut next, mut len) = (Some(end.node), end.len);
    while let Some(id) = next {
        for at in (0..len).rev() {
            if claim_hole(tree, id, at) {
                positions.push(tree.node(id).depth as usize + at);
            }
        }
        next = tree.node(id).parent;
        len = next.map_or(0, |parent| tree.node(parent).len());
    }
    positions.reverse();
    positions
}

/// Pins and touches the path to `end`. What is behind it in the run keeps its own recency.
fn hold_path(tree: &mut Tree, end: walk::Place, now: Now, hit: bool) -> node::PinId {
    let node = tree.node(end.node);
    let mut pools = node.pools();
    let rest_is_resident = pools.any(|pool| node.book(pool).end as usize > end.len);
    let node = match rest_is_resident {
        true => tree.split(end.node, end.len),
        false => end.node,
    };
    let pin = tree.link(node, end.len);
    tree.touch(node, now, hit);
    pin
}

fn hold_flat(tree: &mut Tree, nodes: &[RunId], unix_ms: u64, hit: bool) -> Hold {
    let now = tree.next(unix_ms);
    let pins = nodes.iter().map(|&node| {
        let pin = tree.link(node, 1);
        tree.touch(node, now, hit);
        pin
    });
    Hold::Flat(pins.collect())
}
