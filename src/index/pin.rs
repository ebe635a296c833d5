//! Pins and claims: what a caller holds while it uses or fills blocks.

use std::ops::Range;
use std::sync::Arc;

use stemkv_store::{DeviceSlotId, RecordId, SlotId};

use super::node::{Node, PinId, Places, Pool};
use super::tree::Tree;
use super::waiting::Wakes;
use super::{BlockState, Evicted, Index};
use crate::placement::RunId;

/// How a pin holds its blocks.
pub(super) enum Hold {
    /// One entry covers the path from the root on; `None` for no block.
    Chained(Option<PinId>),
    /// An entry for each block.
    Flat(Vec<PinId>),
}

impl Hold {
    fn locate(&self, tree: &Tree, i: usize) -> (RunId, usize) {
        match self {
            Hold::Chained(pin) => tree.locate(pin.expect("a pin of no block has none to find"), i),
            Hold::Flat(pins) => (tree.pin(pins[i]).node, 0),
        }
    }

    /// The nodes and offsets of blocks `range`, first to last.
    fn locate_range(&self, tree: &Tree, range: Range<usize>) -> Vec<(RunId, usize)> {
        let mut places = Vec::with_capacity(range.len());
        if range.is_empty() {
            return places;
        }
        match self {
            Hold::Flat(_) => places.extend(range.map(|i| self.locate(tree, i))),
            Hold::Chained(_) => {
                let (mut id, mut at) = self.locate(tree, range.end - 1);
                for _ in range {
                    places.push((id, at));
                    if at == 0 {
                        let parent = tree.node(id).parent;
                        id = parent.expect("a run with blocks has a parent");
                        at = tree.node(id).len();
                    }
                    at = at.wrapping_sub(1);
                }
                places.reverse();
            }
        }
        places
    }
}

/// A pin of the first `blocks` blocks of a path. Nothing it covers is evicted until it drops; the
/// nodes under it may split and merge. Dropping it counts as a use, but for a pin that only moves
/// chunks between tiers.
pub struct Pin {
    index: Arc<Index>,
    hold: Hold,
    blocks: usize,
    is_use: bool,
}

impl Pin {
    pub(super) fn new(index: Arc<Index>, hold: Hold, blocks: usize) -> Self {
        Pin {
            index,
            hold,
            blocks,
            is_use: true,
        }
    }

    /// A pin that is no use of what it covers.
    pub(super) fn for_a_move(index: Arc<Index>, hold: Hold, blocks: usize) -> Self {
        let mut pin = Pin::new(index, hold, blocks);
        pin.is_use = false;
        pin
    }

    /// Is it a pin of this index?
    pub fn is_of(&self, index: &Arc<Index>) -> bool {
        Arc::ptr_eq(&self.index, index)
    }

    /// Blocks that are pinned.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Where the chunks of blocks `range` are now for the first device, in one lock acquisition.
    ///
    /// # Panics
    /// Where `range` reaches beyond [`Pin::blocks`]; so do the methods below for `i`.
    pub fn states(&self, range: Range<usize>) -> Vec<BlockState> {
        self.states_on(0, range)
    }

    /// The same for the device with this number.
    ///
    /// # Panics
    /// As [`Pin::states`].
    pub fn states_on(&self, device: usize, range: Range<usize>) -> Vec<BlockState> {
        self.assert_covers(range.end);
        let tree = self.index.lock();
        let places = self.hold.locate_range(&tree, range);
        let state = |(id, at): (RunId, usize)| BlockState::new(tree.node(id), at, device);
        places.into_iter().map(state).collect()
    }

    /// Publishes a host copy of block `i` (a promotion). `false`, and nothing changes, where the
    /// block has one already or a claim is filling it: the caller keeps its slot.
    pub fn set_host(&self, i: usize, slot: SlotId) -> bool {
        self.change(i, |node, at| {
            let chunk = node.chunks[at];
            let is_free = chunk.host().is_none() && !chunk.is_pending();
            is_free.then(|| chunk.with_host(slot).into())
        })
        .is_some()
    }

    /// Publishes a copy of block `i` on a device. `false`, and nothing changes, where the block has one
    /// there already, or no copy anywhere else (any more): the caller keeps its slot.
    ///
    /// # Panics
    /// Where the index was not made for so many devices.
    pub fn set_device(&self, i: usize, device: usize, slot: DeviceSlotId) -> bool {
        self.change(i, |node, at| {
            let is_welcome =
                node.device_slot(at, device).is_none() && node.chunks[at].is_resident();
            is_welcome.then(|| node.with_device(at, device, slot))
        })
        .is_some()
    }

    /// Publishes a record of block `i`. `false` where it has one already.
    pub fn set_record(&self, i: usize, record: RecordId) -> bool {
        self.change(i, |node, at| {
            let chunk = node.chunks[at];
            chunk
                .record()
                .is_none()
                .then(|| chunk.with_record(record).into())
        })
        .is_some()
    }

    /// The chunk of block `i` is lost in `pool`: it did not verify, or its file is gone. Returns
    /// what must be given back; `None` where it is not there (any more). In no pool any more, the
    /// block stays as a hole.
    pub fn lost(&self, i: usize, pool: Pool) -> Option<Evicted> {
        let mut lost = None;
        self.change(i, |node, at| {
            let after = node
                .has(at, pool.number())
                .then(|| node.without(at, pool))?;
            lost = Some(Evicted::new(node, at, after, pool));
            Some(after)
        })?;
        lost
    }

    /// Gives up all but the first `blocks` blocks.
    pub fn truncate(&mut self, blocks: usize) {
        if blocks < self.blocks {
            let now = self.index.unix_ms();
            let index = Arc::clone(&self.index);
            self.shorten(&mut index.lock(), blocks, now);
        }
    }

    /// When the end of what it covers was last used, of flat blocks the one used longest ago.
    pub(super) fn last_use(&self, tree: &Tree) -> Option<u64> {
        let use_of = |&pin: &PinId| tree.node(tree.pin(pin).node).used.tick;
        match &self.hold {
            Hold::Chained(pin) => pin.as_ref().map(use_of),
            Hold::Flat(pins) => pins.iter().map(use_of).min(),
        }
    }

    fn assert_covers(&self, blocks: usize) {
        assert!(
            blocks <= self.blocks,
            "the pin covers {} blocks, not {blocks}",
            self.blocks
        );
    }

    /// Changes where a block's chunk is as `change` says; `None` where it says that nothing changes.
    fn change(&self, i: usize, change: impl FnOnce(&Node, usize) -> Option<Places>) -> Option<()> {
        self.assert_covers(i + 1);
        let mut tree = self.index.lock();
        let (id, at) = self.hold.locate(&tree, i);
        let after = change(tree.node(id), at)?;
        tree.set_chunk(id, at, after);
        Some(())
    }

    fn shorten(&mut self, tree: &mut Tree, blocks: usize, unix_ms: u64) {
        match &mut self.hold {
            Hold::Flat(pins) => {
                let now = self.is_use.then(|| tree.next(unix_ms));
                for pin in pins.drain(blocks..) {
                    let node = tree.unlink(pin);
                    if let Some(now) = now {
                        tree.touch(node, now, false);
                    }
                    tree.settle(node);
                }
            }
            Hold::Chained(hold) => {
                let Some(old) = *hold else { return };
                // The shorter pin first: what it covers must not look free in between.
                *hold = blocks.checked_sub(1).map(|last| {
                    let (id, at) = tree.locate(old, last);
                    tree.link(id, at + 1)
                });
                let node = tree.unlink(old);
                if blocks == 0 && self.is_use {
                    let now = tree.next(unix_ms);
                    tree.touch(node, now, false);
                }
                tree.settle(node);
            }
        }
        self.blocks = blocks;
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if self.blocks == 0 {
            return;
        }
        let now = self.index.unix_ms();
        let index = Arc::clone(&self.index);
        // A poisoned index serves nobody any more; a second panic here would abort the engine.
        if let Ok(mut tree) = index.tree.lock() {
            self.shorten(&mut tree, 0, now);
        }
    }
}

/// A save's claim: the blocks of a path that this caller is to fill. They are *pending* until
/// published or abandoned; all the blocks that were asked for are pinned. Dropping abandons what is
/// not published.
pub struct Claim {
    pin: Pin,
    positions: Vec<usize>,
    /// What became of each position.
    fills: Vec<Fill>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fill {
    Open,
    Published,
    Abandoned,
}

impl Claim {
    pub(super) fn new(pin: Pin, positions: Vec<usize>) -> Self {
        let fills = vec![Fill::Open; positions.len()];
        Claim {
            pin,
            positions,
            fills,
        }
    }

    /// Positions of the blocks to fill, ascending.
    pub fn positions(&self) -> &[usize] {
        &self.positions
    }

    /// Publishes block `i` in the host tier: from here on others match it.
    ///
    /// # Panics
    /// Where `i` was not claimed or is published or abandoned already.
    pub fn publish(&mut self, i: usize, slot: SlotId) {
        self.publish_all(&[(i, slot)]);
    }

    /// Publishes several blocks in one lock acquisition, in the order given.
    ///
    /// # Panics
    /// As [`Claim::publish`].
    pub fn publish_all(&mut self, slots: &[(usize, SlotId)]) {
        for &(i, _) in slots {
            let at = self.positions.binary_search(&i);
            let fill = at.ok().and_then(|at| self.fills.get_mut(at));
            let open = fill.filter(|fill| **fill == Fill::Open);
            *open.expect("only a block that this claim is to fill can be published") =
                Fill::Published;
        }
        let mut wakes = Wakes::default();
        let mut tree = self.pin.index.lock();
        // Neighbours are usually in one run: look a run up once.
        let mut run: Option<(RunId, Range<usize>)> = None;
        for &(i, slot) in slots {
            let (id, start) = match &run {
                Some((id, range)) if range.contains(&i) => (*id, range.start),
                _ => {
                    let (id, at) = self.pin.hold.locate(&tree, i);
                    let len = match self.pin.hold {
                        Hold::Chained(_) => tree.node(id).len(),
                        Hold::Flat(_) => 1,
                    };
                    run = Some((id, i - at..i - at + len));
                    (id, i - at)
                }
            };
            fill(&mut tree, (id, i - start), slot, &mut wakes);
        }
    }

    /// Gives up the claimed blocks from position `from` on (no room, or a failed copy), and the pin
    /// behind the last block that this claim filled or still fills. Their nodes go, unless another
    /// claim or pin needs them.
    pub fn abandon_from(&mut self, from: usize) {
        let first = self.positions.partition_point(|&i| i < from);
        let mut given_up = Vec::new();
        for (&i, fill) in self.positions[first..].iter().zip(&mut self.fills[first..]) {
            if *fill == Fill::Open {
                *fill = Fill::Abandoned;
                given_up.push(i);
            }
        }
        if given_up.is_empty() {
            return;
        }
        let unix_ms = self.pin.index.unix_ms();
        let mut wakes = Wakes::default();
        let index = Arc::clone(&self.pin.index);
        let Ok(mut tree) = index.tree.lock() else {
            return;
        };
        for &i in &given_up {
            let (id, at) = self.pin.hold.locate(&tree, i);
            let (chunk, key) = (tree.node(id).chunks[at], tree.node(id).keys[at]);
            tree.set_chunk(id, at, chunk.without_host());
            tree.waiters.end(&key, &mut wakes);
        }
        if matches!(self.pin.hold, Hold::Chained(_)) {
            let kept = self.fills.iter().rposition(|&fill| fill != Fill::Abandoned);
            let keep = kept.map_or(0, |last| self.positions[last] + 1).max(from);
            if keep < self.pin.blocks {
                self.pin.shorten(&mut tree, keep, unix_ms);
            }
        }
    }

    /// The pin alone; abandons what is not published. Covers the leading blocks of the path that are
    /// in some tier. For writing them to disk.
    pub fn into_pin(mut self) -> Pin {
        self.abandon_from(0);
        let none = Pin::new(Arc::clone(&self.pin.index), Hold::Chained(None), 0);
        let mut pin = std::mem::replace(&mut self.pin, none);
        let resident = {
            let tree = pin.index.lock();
            let places = pin.hold.locate_range(&tree, 0..pin.blocks);
            let resident = |&&(id, at): &&(RunId, usize)| tree.node(id).chunks[at].is_resident();
            places.iter().take_while(resident).count()
        };
        pin.truncate(resident);
        pin
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.abandon_from(0);
    }
}

fn fill(tree: &mut Tree, (id, at): (RunId, usize), slot: SlotId, wakes: &mut Wakes) {
    let node = tree.node(id);
    let (chunk, key) = (node.chunks[at], node.keys[at]);
    debug_assert!(chunk.is_pending(), "only its claim ends a block's pending");
    tree.set_chunk(id, at, chunk.with_host(slot));
    tree.waiters.end(&key, wakes);
}
