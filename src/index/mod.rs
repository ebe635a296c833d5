//! The prefix index: which blocks are known, where their chunks are, what may go.
//!
//! One mutex around a path-compressed radix tree. Under it: no I/O, no await, no callback.
//!
//! This is the contract that the pipelines are written against; bodies follow.

use std::ops::Range;
use std::sync::Arc;

use stemkv_store::{Key, RecordId, RecordInfo, SlotId, Tier};

pub use crate::hash::HashPath;

/// Where one block's chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockState {
    /// The block's sequence hash.
    pub key: Key,
    /// Its slot in the host tier.
    pub host: Option<SlotId>,
    /// Its record in the disk tier.
    pub record: Option<RecordId>,
    /// A save of it is in flight.
    pub pending: bool,
}

/// How far a prompt is known, and what ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Matched {
    /// Leading blocks whose chunk is in some tier.
    pub blocks: usize,
    /// Of those, leading blocks in the host tier.
    pub host_blocks: usize,
    /// Of those, blocks in the disk tier alone.
    pub disk_only_blocks: usize,
    /// Blocks directly behind the match whose save is in flight (delayed hits).
    pub pending_blocks: usize,
    /// What stands at the first block that did not match.
    pub ended: Ended,
}

/// What ended a match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
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

/// The index.
pub struct Index(());

/// A pin of the first `blocks` blocks of a path. Nothing it covers is evicted until it drops; the
/// nodes under it may split and merge.
pub struct Pin(Arc<Index>);

/// A save's claim: the blocks of a path that this caller is to fill. They are *pending* until
/// published or abandoned; everything up to them is pinned. Dropping abandons what is not published.
pub struct Claim(Arc<Index>);

/// What eviction took out of a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evicted {
    /// The block.
    pub key: Key,
    /// Its slot, when it was taken out of the host tier: give it back to the arena.
    pub host: Option<SlotId>,
    /// Its record, when it was taken out of the disk tier: remove it there.
    pub record: Option<RecordId>,
    /// Is the block gone from every tier?
    pub forgotten: bool,
}

impl Index {
    /// How far `path` is known. No pin, no touch.
    pub fn match_prefix(&self, path: &mut dyn HashPath) -> Matched {
        let _ = path;
        unimplemented!()
    }

    /// Match, pin and touch (one move in the recency order) in one lock acquisition.
    pub fn pin(self: &Arc<Self>, path: &mut dyn HashPath) -> (Pin, Matched) {
        let _ = path;
        unimplemented!()
    }

    /// Claims, of the first `blocks` blocks of `path`, those that are in no tier and not pending
    /// (new blocks and holes). Everything before the last claimed block is pinned.
    pub fn claim(self: &Arc<Self>, path: &mut dyn HashPath, blocks: usize) -> Claim {
        let _ = (path, blocks);
        unimplemented!()
    }

    /// Takes up to `want` chunks out of `tier`, coldest leaf run first, each run from its tail.
    /// Never a pinned or pending block; never one whose going would leave a descendant without its
    /// ancestor in the union of tiers. Host copies of blocks that are also on disk may go although
    /// they have descendants.
    pub fn evict(&self, tier: Tier, want: usize) -> Vec<Evicted> {
        let _ = (tier, want);
        unimplemented!()
    }

    /// Builds the tree from a disk tier's records, in any order. Records whose ancestors are missing
    /// are returned: they can never be reached and should be removed.
    pub fn restore(&self, records: Vec<RecordInfo>) -> Vec<RecordId> {
        let _ = records;
        unimplemented!()
    }

    /// Panics where a structural invariant does not hold. For tests.
    #[doc(hidden)]
    pub fn check(&self) {}
}

impl Pin {
    /// Blocks that are pinned.
    pub fn blocks(&self) -> usize {
        unimplemented!()
    }

    /// Where the chunks of blocks `range` are now, in one lock acquisition.
    pub fn states(&self, range: Range<usize>) -> Vec<BlockState> {
        let _ = range;
        unimplemented!()
    }

    /// Publishes a host copy of block `i` (a promotion). `false`, and nothing changes, where the
    /// block has one already: the caller keeps its slot.
    pub fn set_host(&self, i: usize, slot: SlotId) -> bool {
        let _ = (i, slot);
        unimplemented!()
    }

    /// Publishes a record of block `i`. `false` where it has one already.
    pub fn set_record(&self, i: usize, record: RecordId) -> bool {
        let _ = (i, record);
        unimplemented!()
    }

    /// The chunk of block `i` is lost in `tier`: it did not verify, or its file is gone. Returns
    /// what must be given back. In no tier any more, the block stays as a hole.
    pub fn lost(&self, i: usize, tier: Tier) -> Option<Evicted> {
        let _ = (i, tier);
        unimplemented!()
    }
}

impl Claim {
    /// Positions of the blocks to fill, ascending.
    pub fn positions(&self) -> &[usize] {
        unimplemented!()
    }

    /// Publishes block `i` in the host tier: from here on others match it.
    ///
    /// # Panics
    /// Where `i` was not claimed or is published already.
    pub fn publish(&mut self, i: usize, slot: SlotId) {
        let _ = (i, slot);
        unimplemented!()
    }

    /// Gives up the claimed blocks from position `from` on (no room, or a failed copy). Their nodes
    /// go, unless another claim needs them.
    pub fn abandon_from(&mut self, from: usize) {
        let _ = from;
        unimplemented!()
    }

    /// The pin alone, once everything is published or abandoned: covers the leading blocks of the
    /// path that are in some tier. For writing them to disk.
    pub fn into_pin(self) -> Pin {
        unimplemented!()
    }
}
