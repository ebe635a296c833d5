//! What the index can tell about itself: counts, runs, and which records were used.

use stemkv_store::{Key, RecordId, Tier};

use super::node::{Chunk, DISK, HOST};
use super::{BlockState, Index};
use crate::placement::RunId;

/// Blocks of one namespace, or of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NamespaceStats {
    /// Blocks in the tree: those in some tier, pending ones and holes.
    pub blocks: usize,
    /// Blocks that a pin covers.
    pub pinned_blocks: usize,
    /// Blocks that a claim is filling.
    pub pending_blocks: usize,
    /// Blocks in no tier that nobody is filling.
    pub hole_blocks: usize,
    device_blocks: usize,
    host_blocks: usize,
    disk_blocks: usize,
}

impl NamespaceStats {
    /// Blocks whose chunk is in `tier`; in the device tier, on any device.
    pub fn tier_blocks(&self, tier: Tier) -> usize {
        match tier {
            Tier::Device => self.device_blocks,
            Tier::Host => self.host_blocks,
            Tier::Disk => self.disk_blocks,
            _ => 0,
        }
    }

    /// Counts a block in or out, but for its being in the tree.
    pub(super) fn count(&mut self, chunk: Chunk, by: isize) {
        let add = |count: &mut usize, is: bool| {
            if is {
                *count = count.wrapping_add_signed(by);
            }
        };
        add(&mut self.pending_blocks, chunk.is_pending());
        add(&mut self.hole_blocks, chunk.is_hole());
        add(&mut self.device_blocks, chunk.is_on_device());
        add(&mut self.host_blocks, chunk.has(HOST));
        add(&mut self.disk_blocks, chunk.has(DISK));
    }

    /// Counts `blocks` more in the disk tier.
    pub(super) fn count_on_disk(&mut self, blocks: usize) {
        self.disk_blocks += blocks;
    }

    fn add(&mut self, other: &NamespaceStats) {
        self.blocks += other.blocks;
        self.pinned_blocks += other.pinned_blocks;
        self.pending_blocks += other.pending_blocks;
        self.hole_blocks += other.hole_blocks;
        self.device_blocks += other.device_blocks;
        self.host_blocks += other.host_blocks;
        self.disk_blocks += other.disk_blocks;
    }
}

/// The index in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct IndexStats {
    /// Blocks of all namespaces.
    pub total: NamespaceStats,
    /// Namespaces with any block.
    pub namespaces: usize,
    /// Runs: nodes of the tree.
    pub runs: usize,
    /// Pins that exist, those of claims included.
    pub pins: usize,
    /// Blocks that somebody waits for.
    pub waited_blocks: usize,
}

/// One run of blocks, as it was when it was looked at.
#[derive(Clone, Debug)]
pub struct RunInfo {
    /// The namespace root.
    pub namespace: Key,
    /// The key of the block before the first one; the namespace root for a first block.
    pub parent: Key,
    /// Position of the first block in its prefix.
    pub depth: usize,
    /// Its blocks, in order.
    pub blocks: Vec<BlockState>,
    /// Leading blocks that a pin covers.
    pub pinned_blocks: usize,
    /// Runs that follow it.
    pub children: usize,
    /// Leases that covered it.
    pub hits: u32,
    /// When it was last used, milliseconds since 1970.
    pub last_use_ms: u64,
}

/// Blocks that [`Index::visit`] copies under one lock acquisition, but for the last run.
const VISIT_BLOCKS: usize = 4096;

impl Index {
    /// Counts of all namespaces together.
    pub fn stats(&self) -> IndexStats {
        let tree = self.lock();
        let mut total = NamespaceStats::default();
        for &root in tree.roots.values() {
            let namespace = tree.node(root).namespace.as_ref();
            total.add(&namespace.expect("a root").stats);
        }
        IndexStats {
            total,
            namespaces: tree.roots.len(),
            runs: tree.nodes.len() - tree.free_nodes.len() - tree.roots.len(),
            pins: tree.pins.iter().flatten().count(),
            waited_blocks: tree.waiters.len(),
        }
    }

    /// Blocks on each device, by its number.
    pub fn device_blocks(&self) -> Vec<usize> {
        self.lock().device_blocks.clone()
    }

    /// Is any block of this namespace in the tree?
    pub fn has_namespace(&self, root: &Key) -> bool {
        self.lock().roots.contains_key(root)
    }

    /// Counts of each namespace, by its root.
    pub fn namespaces(&self) -> Vec<(Key, NamespaceStats)> {
        let tree = self.lock();
        let stats = tree.roots.iter().map(|(&key, &root)| {
            let namespace = tree.node(root).namespace.as_ref();
            (key, namespace.expect("a root").stats)
        });
        stats.collect()
    }

    /// Shows every run, in no particular order. The lock is held for a few thousand blocks at a time
    /// and not while `visit` runs: a run that changes meanwhile may be shown in its old and its new
    /// shape, or not at all.
    pub fn visit(&self, visit: &mut dyn FnMut(RunInfo)) {
        let mut next = 0;
        loop {
            let mut infos = Vec::new();
            {
                let tree = self.lock();
                let mut blocks = 0;
                while next < tree.nodes.len() && blocks < VISIT_BLOCKS {
                    let node = &tree.nodes[next];
                    next += 1;
                    // An empty node costs a look, too.
                    blocks += node.len().max(1);
                    let (Some(root), Some(parent)) = (node.root, node.parent) else {
                        continue;
                    };
                    let namespace = tree.node(root).namespace.as_ref();
                    let namespace = namespace.expect("a root").key;
                    infos.push(RunInfo {
                        namespace,
                        parent: *tree.node(parent).keys.last().unwrap_or(&namespace),
                        depth: node.depth as usize,
                        blocks: (0..node.len())
                            .map(|i| BlockState::new(node, i, 0))
                            .collect(),
                        pinned_blocks: node.pinned as usize,
                        children: node.children.len(),
                        hits: node.used.hits,
                        last_use_ms: node.last_use_ms,
                    });
                }
                if infos.is_empty() && next >= tree.nodes.len() {
                    return;
                }
            }
            infos.into_iter().for_each(&mut *visit);
        }
    }

    /// Records whose block was leased since they were last given out here: for
    /// [`stemkv_store::DiskTier::touch`]. At most about `max` at a time; empty when there are no more.
    pub fn take_touched(&self, max: usize) -> Vec<RecordId> {
        let mut tree = self.lock();
        let mut records = Vec::new();
        while records.len() < max
            && let Some(RunId(id)) = tree.touched.pop()
        {
            tree.is_touched[id as usize] = false;
            let chunks = &tree.nodes[id as usize].chunks;
            records.extend(chunks.iter().filter_map(|chunk| chunk.record()));
        }
        records
    }
}
