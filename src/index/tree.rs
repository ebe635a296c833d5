//! The tree itself: what holds under the lock, and the few operations that change its shape.
//!
//! Every change goes through [`Tree::set_chunk`], [`Tree::split`], [`Tree::merge`],
//! [`Tree::extend`] or [`Tree::settle`]; they keep the counts, the eviction policies and the pins
//! right (`check.rs` says what right means).

use std::collections::HashMap;

use stemkv_store::Key;

use super::node::{
    Book, Children, Chunk, DEVICE, KeyBuildHasher, NamespaceRoot, Node, POOLS, PinId, Places,
};
use super::report::NamespaceStats;
use super::waiting::Waiters;
use crate::placement::{EvictionPolicy, RunId};

/// The longest run. It bounds what a split or a merge moves under the lock (11 KB), and costs a long
/// path one node for so many blocks.
pub(super) const RUN_BLOCKS_MAX: usize = 256;

/// A pin: the path from the root to the first `len` blocks of `node`.
#[derive(Clone, Copy)]
pub(super) struct PinEntry {
    pub(super) node: RunId,
    pub(super) len: u32,
    /// Its position in the node's list of pins that end there.
    at: u32,
}

/// Now, in the index's own count of uses and on the wall clock.
#[derive(Clone, Copy)]
pub(super) struct Now {
    pub(super) tick: u64,
    pub(super) unix_ms: u64,
}

pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    pub(super) free_nodes: Vec<RunId>,
    pub(super) roots: HashMap<Key, RunId, KeyBuildHasher>,
    pub(super) pins: Vec<Option<PinEntry>>,
    free_pins: Vec<PinId>,
    /// By pool.
    pub(super) policies: Vec<Box<dyn EvictionPolicy>>,
    /// Blocks on each device.
    pub(super) device_blocks: Vec<usize>,
    pub(super) tick: u64,
    /// Runs that were used since the last flush. A number is in here at most once, by the flags
    /// beside it, which outlive the run.
    pub(super) touched: Vec<RunId>,
    pub(super) is_touched: Vec<bool>,
    pub(super) waiters: Waiters,
}

impl Tree {
    /// A tree with a policy for each of its pools.
    pub(super) fn new(policies: Vec<Box<dyn EvictionPolicy>>) -> Self {
        Tree {
            device_blocks: vec![0; policies.len() + 1 - POOLS],
            nodes: Vec::new(),
            free_nodes: Vec::new(),
            roots: HashMap::default(),
            pins: Vec::new(),
            free_pins: Vec::new(),
            policies,
            tick: 0,
            touched: Vec::new(),
            is_touched: Vec::new(),
            waiters: Waiters::default(),
        }
    }

    pub(super) fn node(&self, id: RunId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub(super) fn node_mut(&mut self, id: RunId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    pub(super) fn next(&mut self, unix_ms: u64) -> Now {
        self.tick += 1;
        Now {
            tick: self.tick,
            unix_ms,
        }
    }

    fn add_node(&mut self, node: Node) -> RunId {
        if let Some(id) = self.free_nodes.pop() {
            *self.node_mut(id) = node;
            return id;
        }
        let id =
            RunId(u32::try_from(self.nodes.len()).expect("fewer than 2^32 runs fit in memory"));
        self.nodes.push(node);
        self.is_touched.push(false);
        id
    }

    /// The node of a namespace's root, made where it is not there.
    pub(super) fn root(&mut self, namespace: Key) -> RunId {
        if let Some(&root) = self.roots.get(&namespace) {
            return root;
        }
        let id = self.add_node(Node {
            namespace: Some(Box::new(NamespaceRoot {
                key: namespace,
                stats: NamespaceStats::default(),
            })),
            ..Node::default()
        });
        self.node_mut(id).root = Some(id);
        self.roots.insert(namespace, id);
        id
    }

    pub(super) fn stats(&mut self, id: RunId) -> &mut NamespaceStats {
        let root = self.node(id).root.expect("every node knows its root");
        let namespace = self.node_mut(root).namespace.as_mut();
        &mut namespace.expect("a root has a namespace").stats
    }

    pub(super) fn child(&self, parent: RunId, key: &Key) -> Option<RunId> {
        match &self.node(parent).children {
            Children::None => None,
            Children::One(child) => (self.node(*child).keys[0] == *key).then_some(*child),
            Children::Many(map) => map.get(key).copied(),
        }
    }

    /// Adds a node below `parent`.
    pub(super) fn adopt(&mut self, parent: RunId, node: Node) -> RunId {
        let child = self.add_node(node);
        self.attach(parent, child);
        child
    }

    /// Puts `child` below `parent`, which has no child with the same first key.
    fn attach(&mut self, parent: RunId, child: RunId) {
        let key = self.node(child).keys[0];
        let only = self.node(parent).children.only();
        let only = only.map(|only| (self.node(only).keys[0], only));
        let children = &mut self.node_mut(parent).children;
        match (&mut *children, only) {
            (Children::Many(map), _) => {
                map.insert(key, child);
            }
            (_, Some(only)) => {
                *children = Children::Many([only, (key, child)].into_iter().collect());
            }
            (_, None) => *children = Children::One(child),
        }
    }

    fn detach(&mut self, parent: RunId, key: &Key) {
        let children = &mut self.node_mut(parent).children;
        match children {
            Children::None => {}
            Children::One(_) => *children = Children::None,
            Children::Many(map) => {
                map.remove(key);
                if map.len() == 1 {
                    let last = map.values().next().copied();
                    *children = last.map_or(Children::None, Children::One);
                } else if map.len() * 4 < map.capacity() {
                    map.shrink_to_fit();
                }
            }
        }
    }

    /// Puts the run into the policies where it is evictable, and takes it out where it is not.
    pub(super) fn refresh(&mut self, id: RunId) {
        // The pools of every store by their constant numbers: what else a run has is rare.
        for pool in 0..POOLS {
            self.refresh_in(id, pool);
        }
        for pool in self.node(id).further_pools() {
            self.refresh_in(id, pool);
        }
    }

    #[inline(always)]
    fn refresh_in(&mut self, id: RunId, pool: usize) {
        let node = &mut self.nodes[id.0 as usize];
        let evictable = node.is_evictable(pool);
        let listed = node.listed_mut(pool);
        if evictable != *listed {
            *listed = evictable;
            match evictable {
                true => self.policies[pool].insert(id, node.used),
                false => self.policies[pool].remove(id, node.used),
            }
        }
    }

    fn unlist(&mut self, id: RunId) {
        let node = &mut self.nodes[id.0 as usize];
        for pool in node.pools() {
            if std::mem::take(node.listed_mut(pool)) {
                self.policies[pool].remove(id, node.used);
            }
        }
    }

    /// The one way in which a block's residency changes. Settle the node afterwards where the block
    /// may have become a hole that nobody needs.
    pub(super) fn set_chunk(&mut self, id: RunId, at: usize, new: impl Into<Places>) {
        let new: Places = new.into();
        let node = self.node_mut(id);
        let was_live: [bool; POOLS] = std::array::from_fn(|pool| node.is_live(pool));
        let further = new.further().map(|(pool, is_there)| {
            let was = (node.has(at, pool), node.is_live(pool));
            (pool, was, is_there)
        });
        let old = node.put(at, new);
        let on_first = &mut self.device_blocks[0];
        *on_first += usize::from(new.chunk.has(DEVICE));
        *on_first -= usize::from(old.has(DEVICE));
        if let Some((pool, (was_there, _), is_there)) = further {
            let on_device = &mut self.device_blocks[1 + pool - POOLS];
            *on_device += usize::from(is_there);
            *on_device -= usize::from(was_there);
        }
        let stats = self.stats(id);
        stats.count(old, -1);
        stats.count(new.chunk, 1);
        self.refresh(id);
        for (pool, was_live) in was_live.into_iter().enumerate() {
            self.note_liveness(id, pool, was_live);
        }
        if let Some((pool, (_, was_live), _)) = further {
            self.note_liveness(id, pool, was_live);
        }
    }

    /// Tells the ancestors where a node began or ceased to hold something of `pool`.
    fn note_liveness(&mut self, mut id: RunId, pool: usize, mut was_live: bool) {
        loop {
            let is_live = self.node(id).is_live(pool);
            let Some(parent) = self.node(id).parent else {
                return;
            };
            if is_live == was_live {
                return;
            }
            let node = self.node_mut(parent);
            was_live = node.is_live(pool);
            let live = &mut node.book_mut(pool).live;
            match is_live {
                true => *live += 1,
                false => *live -= 1,
            }
            self.refresh(parent);
            id = parent;
        }
    }

    /// Appends pending blocks behind the last block of `id`: to its own run where nothing else hangs
    /// there and there is room, then in new runs. Returns the node that holds the last one.
    ///
    /// The caller touches the path: a run has one time of last use.
    pub(super) fn extend(&mut self, mut id: RunId, mut keys: &[Key]) -> RunId {
        let stats = self.stats(id);
        stats.blocks += keys.len();
        stats.pending_blocks += keys.len();
        let node = self.node_mut(id);
        if !node.is_root() && node.children.len() == 0 {
            let room = RUN_BLOCKS_MAX.saturating_sub(node.len());
            let (here, rest) = keys.split_at(room.min(keys.len()));
            if node.keys.capacity() - node.keys.len() < here.len() {
                // Grows by an eighth at least: little slack, few moves for a long conversation.
                let more = here.len().max(node.len() / 8);
                node.keys.reserve_exact(more);
                node.chunks.reserve_exact(more);
            }
            node.keys.extend_from_slice(here);
            node.chunks.resize(node.keys.len(), Chunk::PENDING);
            keys = rest;
        }
        for run in keys.chunks(RUN_BLOCKS_MAX) {
            let node = self.node(id);
            let child = Node {
                parent: Some(id),
                root: node.root,
                depth: node.depth + node.len() as u32,
                keys: run.to_vec(),
                chunks: vec![Chunk::PENDING; run.len()],
                ..Node::default()
            };
            id = self.adopt(id, child);
        }
        id
    }

    /// Cuts a run in two before its block `at`. The first part becomes a new node, which is
    /// returned; `id` keeps the rest, so that children and pins further down stay as they are.
    pub(super) fn split(&mut self, id: RunId, at: usize) -> RunId {
        let lower = self.node_mut(id);
        debug_assert!(0 < at && at < lower.len(), "both parts have blocks");
        let mut upper = Node {
            parent: lower.parent,
            root: lower.root,
            depth: lower.depth,
            children: Children::One(id),
            pinned: lower.pinned.min(at as u32),
            used: lower.used,
            last_use_ms: lower.last_use_ms,
            ..lower.split_off_front(at)
        };
        lower.depth += at as u32;
        lower.pinned = lower.pinned.saturating_sub(at as u32);
        for pool in lower.pools() {
            let whole = lower.book(pool);
            let count = match whole.count as usize == lower.len() + at {
                true => at as u32,
                false => (0..at).filter(|&i| upper.has(i, pool)).count() as u32,
            };
            let end = match whole.end <= at as u32 {
                true => whole.end,
                false => upper.end_below(pool, at),
            };
            let book = lower.book_mut(pool);
            book.count -= count;
            book.end = whole.end.saturating_sub(at as u32);
            *upper.book_mut(pool) = Book {
                count,
                end,
                live: u32::from(lower.is_live(pool)),
            };
        }
        let ends = std::mem::take(&mut lower.ends);
        let (parent, through) = (lower.parent, lower.through);
        let upper_id = self.add_node(upper);
        self.node_mut(id).parent = Some(upper_id);
        for pin in ends {
            let entry = self.pins[pin as usize]
                .as_mut()
                .expect("a listed pin exists");
            if entry.len as usize <= at {
                entry.node = upper_id;
            } else {
                entry.len -= at as u32;
            }
            let list = &mut self.nodes[entry.node.0 as usize].ends;
            entry.at = list.len() as u32;
            list.push(pin);
        }
        let below = self.node(id).ends.len() as u32;
        self.node_mut(upper_id).through = through + below;
        // The parent still knows the upper part's first key, with the lower part's number.
        let parent = parent.expect("a run with blocks has a parent");
        self.replace_child(parent, upper_id);
        if self.is_touched[id.0 as usize] {
            self.note_touched(upper_id);
        }
        self.refresh(id);
        self.refresh(upper_id);
        upper_id
    }

    fn replace_child(&mut self, parent: RunId, child: RunId) {
        let key = self.node(child).keys[0];
        match &mut self.node_mut(parent).children {
            Children::Many(map) => {
                map.insert(key, child);
            }
            children => *children = Children::One(child),
        }
    }

    /// Joins a run to its only child, where both were last used together and the run does not get too
    /// long. The child's number stays.
    /// Returns whether it was done.
    fn merge(&mut self, upper_id: RunId) -> bool {
        let upper = self.node(upper_id);
        let Some(id) = upper.children.only() else {
            return false;
        };
        let lower = self.node(id);
        if upper.is_root()
            || upper.used.tick != lower.used.tick
            || upper.len() + lower.len() > RUN_BLOCKS_MAX
        {
            return false;
        }
        self.unlist(upper_id);
        self.unlist(id);
        let mut upper = std::mem::take(self.node_mut(upper_id));
        let shift = upper.len() as u32;
        let lower = self.node_mut(id);
        lower.prepend(&mut upper);
        lower.parent = upper.parent;
        lower.depth = upper.depth;
        lower.used.hits = lower.used.hits.max(upper.used.hits);
        lower.pinned = match lower.pinned {
            0 => upper.pinned,
            pinned => pinned + shift,
        };
        for &pin in &self.nodes[id.0 as usize].ends {
            self.pins[pin as usize]
                .as_mut()
                .expect("a listed pin exists")
                .len += shift;
        }
        for pin in upper.ends {
            let list = &mut self.nodes[id.0 as usize].ends;
            let entry = self.pins[pin as usize]
                .as_mut()
                .expect("a listed pin exists");
            entry.node = id;
            entry.at = list.len() as u32;
            list.push(pin);
        }
        self.replace_child(upper.parent.expect("not a root"), id);
        if self.is_touched[upper_id.0 as usize] {
            self.note_touched(id);
        }
        self.free_nodes.push(upper_id);
        self.refresh(id);
        true
    }

    /// Puts a node right after blocks of it became holes or a pin went: holes that nothing follows
    /// and nobody pins go, empty runs with them, and a run left with one child joins it.
    pub(super) fn settle(&mut self, mut id: RunId) {
        loop {
            let node = self.node(id);
            if let Some(namespace) = &node.namespace {
                if node.children.len() == 0 {
                    let key = namespace.key;
                    self.roots.remove(&key);
                    *self.node_mut(id) = Node::default();
                    self.free_nodes.push(id);
                }
                return;
            }
            if node.children.len() == 0 {
                let ends = node.pools().map(|pool| node.book(pool).end);
                let keep = ends.fold(node.pinned, u32::max) as usize;
                let holes = node.len() - keep;
                if holes > 0 {
                    let stats = self.stats(id);
                    stats.blocks -= holes;
                    stats.hole_blocks -= holes;
                }
                if keep == 0 {
                    self.unlist(id);
                    let node = std::mem::take(self.node_mut(id));
                    self.free_nodes.push(id);
                    let parent = node.parent.expect("not a root");
                    self.detach(parent, &node.keys[0]);
                    id = parent;
                    continue;
                }
                if holes > 0 {
                    self.node_mut(id).truncate(keep);
                }
            }
            let child = self.node(id).children.only();
            if self.merge(id) {
                id = child.expect("merged with it");
            }
            self.refresh(id);
            return;
        }
    }

    fn note_touched(&mut self, id: RunId) {
        if !std::mem::replace(&mut self.is_touched[id.0 as usize], true) {
            self.touched.push(id);
        }
    }

    /// Notes a use of the path that ends with `id`, and joins runs that are used together.
    pub(super) fn touch(&mut self, id: RunId, now: Now, hit: bool) {
        let mut next = Some(id);
        while let Some(id) = next {
            let node = &mut self.nodes[id.0 as usize];
            if node.is_root() {
                break;
            }
            let old = node.used;
            node.used.tick = now.tick;
            node.used.hits = old.hits.saturating_add(u32::from(hit));
            node.last_use_ms = now.unix_ms;
            for pool in 0..POOLS {
                if node.listed[pool] {
                    self.policies[pool].remove(id, old);
                    self.policies[pool].insert(id, node.used);
                }
            }
            for pool in node.further_pools() {
                if node.is_listed(pool) {
                    self.policies[pool].remove(id, old);
                    self.policies[pool].insert(id, node.used);
                }
            }
            next = node.parent;
            if hit {
                self.note_touched(id);
            }
        }
        let mut below = id;
        while let Some(parent) = self.node(below).parent {
            if !self.merge(parent) {
                below = parent;
            }
        }
    }

    /// Pins the path to the first `len` blocks of `node`.
    pub(super) fn link(&mut self, node: RunId, len: usize) -> PinId {
        let entry = PinEntry {
            node,
            len: len as u32,
            at: self.node(node).ends.len() as u32,
        };
        let pin = match self.free_pins.pop() {
            Some(pin) => {
                self.pins[pin as usize] = Some(entry);
                pin
            }
            None => {
                self.pins.push(Some(entry));
                self.pins.len() as PinId - 1
            }
        };
        self.node_mut(node).ends.push(pin);
        self.set_pinned(node, self.node(node).pinned.max(entry.len));
        let mut next = self.node(node).parent;
        while let Some(ancestor) = next {
            self.node_mut(ancestor).through += 1;
            self.set_pinned(ancestor, self.node(ancestor).len() as u32);
            next = self.node(ancestor).parent;
        }
        pin
    }

    /// Takes a pin away and returns the node where it ended. Settle that node.
    pub(super) fn unlink(&mut self, pin: PinId) -> RunId {
        let entry = self.pins[pin as usize]
            .take()
            .expect("a pin is dropped once");
        self.free_pins.push(pin);
        let ends = &mut self.nodes[entry.node.0 as usize].ends;
        ends.swap_remove(entry.at as usize);
        if let Some(&moved) = ends.get(entry.at as usize) {
            let moved = self.pins[moved as usize].as_mut();
            moved.expect("a listed pin exists").at = entry.at;
        }
        if ends.is_empty() {
            *ends = Vec::new();
        }
        self.update_pinned(entry.node);
        let mut next = self.node(entry.node).parent;
        while let Some(ancestor) = next {
            self.node_mut(ancestor).through -= 1;
            self.update_pinned(ancestor);
            next = self.node(ancestor).parent;
        }
        entry.node
    }

    /// A pin went that covered blocks of the run.
    fn update_pinned(&mut self, id: RunId) {
        let node = self.node(id);
        if node.through > 0 {
            return;
        }
        // No other was longer. Many requests share a prefix, and their pins all end there: the first one
        // will do.
        let mut pinned = 0;
        for &pin in &node.ends {
            pinned = self.pin(pin).len.max(pinned);
            if pinned == node.pinned {
                return;
            }
        }
        self.set_pinned(id, pinned);
    }

    fn set_pinned(&mut self, id: RunId, pinned: u32) {
        let old = std::mem::replace(&mut self.node_mut(id).pinned, pinned);
        if old != pinned {
            let stats = self.stats(id);
            stats.pinned_blocks = stats.pinned_blocks + pinned as usize - old as usize;
            self.refresh(id);
        }
    }

    pub(super) fn pin(&self, pin: PinId) -> PinEntry {
        self.pins[pin as usize].expect("a pin is used while it exists")
    }

    /// The node and offset of block `i` on the path that `pin` covers.
    pub(super) fn locate(&self, pin: PinId, i: usize) -> (RunId, usize) {
        let mut id = self.pin(pin).node;
        while self.node(id).depth as usize > i {
            id = self.node(id).parent.expect("depth 0 is above every block");
        }
        (id, i - self.node(id).depth as usize)
    }
}
