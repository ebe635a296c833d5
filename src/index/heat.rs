//! Which prefixes to have in RAM first: the last used ones.

use std::cmp::Reverse;
use std::sync::Arc;

use stemkv_store::{DiskTier, Key, RecordId, RecordInfo};

use super::node::DISK;
use super::pin::{Hold, Pin};
use super::{BlockState, Index};
use crate::placement::RunId;

/// Nodes that [`Index::hottest`] looks at under one lock acquisition.
const LOOK_NODES: usize = 4096;

/// The runs of an index that have records, the last used first and none before what it hangs on: see
/// [`Index::hottest`].
pub struct Hottest {
    index: Arc<Index>,
    runs: std::vec::IntoIter<Listed>,
    left_bytes: u64,
    is_cut: bool,
}

/// A run as it was when it was listed.
struct Listed {
    node: RunId,
    depth: u32,
    /// One past its last block.
    end: u32,
    /// Its last block: found again after splits and merges.
    last: Key,
    last_use_ms: u64,
}

/// A run to bring into RAM, pinned. The pin is no use of it.
pub struct HotRun {
    /// The namespace root.
    pub namespace: Key,
    /// The blocks of its prefix, from the first one to the run's last.
    pub keys: Vec<Key>,
    /// Its blocks that are on disk alone, in order.
    pub records: Vec<HotRecord>,
    /// When it was last used, milliseconds since 1970.
    pub last_use_ms: u64,
    /// Covers the prefix.
    pub pin: Pin,
}

/// A block of a [`HotRun`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotRecord {
    /// Its position in the prefix.
    pub position: usize,
    /// Its record.
    pub record: RecordId,
    /// Bytes of the record.
    pub bytes: u64,
}

impl Index {
    /// Lists what would be worth bringing from disk into RAM, up to `bytes` of records. A run that
    /// changes before its turn may be left out. Looks at every run; the lock is held for a few thousand
    /// at a time.
    pub fn hottest(self: &Arc<Self>, bytes: u64) -> Hottest {
        let mut runs = Vec::new();
        let mut next = 0;
        loop {
            let tree = self.lock();
            let nodes = tree.nodes.iter().enumerate().skip(next).take(LOOK_NODES);
            for (id, node) in nodes.filter(|(_, node)| node.book(DISK).count > 0) {
                let Some(&last) = node.keys.last() else {
                    continue;
                };
                runs.push(Listed {
                    node: RunId(id as u32),
                    depth: node.depth,
                    end: node.depth + node.len() as u32,
                    last,
                    last_use_ms: node.last_use_ms,
                });
            }
            next += LOOK_NODES;
            if next >= tree.nodes.len() {
                break;
            }
        }
        // No run was used after the one that it hangs on; of those used together that one comes first.
        runs.sort_unstable_by_key(|run| (Reverse(run.last_use_ms), run.depth, run.last));
        Hottest {
            index: Arc::clone(self),
            runs: runs.into_iter(),
            left_bytes: bytes,
            is_cut: false,
        }
    }

    /// Pins the prefix that ends with a listed run, where that is still there.
    fn pin_listed(self: &Arc<Self>, run: &Listed) -> Option<(Pin, Key, Vec<Key>)> {
        let mut tree = self.lock();
        let node = tree.nodes.get(run.node.0 as usize)?;
        let len = run.end.checked_sub(node.depth)? as usize;
        let last = node.keys.get(len.checked_sub(1)?)?;
        let root = node.root.filter(|_| *last == run.last)?;
        let namespace = tree.node(root).namespace.as_ref()?.key;
        let mut parts = Vec::new();
        let (mut at, mut part) = (run.node, len);
        loop {
            let node = tree.node(at);
            parts.push(&node.keys[..part]);
            let Some(parent) = node.parent else { break };
            (at, part) = (parent, tree.node(parent).len());
        }
        parts.reverse();
        let keys = parts.concat();
        let hold = Hold::Chained(Some(tree.link(run.node, len)));
        drop(tree);
        let pin = Pin::for_a_move(Arc::clone(self), hold, run.end as usize);
        Some((pin, namespace, keys))
    }
}

impl Hottest {
    /// The next run of which something is on disk alone and can be reached, as far as the bytes go that
    /// are left; `tier` knows how long the records are.
    pub fn next(&mut self, tier: &dyn DiskTier) -> Option<HotRun> {
        while !self.is_cut {
            let listed = self.runs.next()?;
            let Some((pin, namespace, keys)) = self.index.pin_listed(&listed) else {
                continue;
            };
            let states = pin.states(0..keys.len());
            let is_there = |state: &&BlockState| state.is_resident();
            let reached = states.iter().take_while(is_there).count();
            let mut records = Vec::new();
            for position in listed.depth as usize..reached {
                let Some(record) = states[position].record else {
                    continue;
                };
                if states[position].is_in_ram() {
                    continue;
                }
                let info = RecordInfo {
                    id: record,
                    namespace,
                    parent: position
                        .checked_sub(1)
                        .map_or(namespace, |above| keys[above]),
                    key: keys[position],
                    depth: position as u32,
                    bytes: 0,
                    last_use_ms: listed.last_use_ms,
                };
                // What is behind a record that has gone cannot be reached.
                let Some(bytes) = tier.image_bytes(&info).map(u64::from) else {
                    break;
                };
                self.is_cut = bytes > self.left_bytes;
                if self.is_cut {
                    break;
                }
                self.left_bytes -= bytes;
                records.push(HotRecord {
                    position,
                    record,
                    bytes,
                });
            }
            if !records.is_empty() {
                return Some(HotRun {
                    namespace,
                    keys,
                    records,
                    last_use_ms: listed.last_use_ms,
                    pin,
                });
            }
        }
        None
    }

    /// Bytes that were listed and did not come: others may take their place.
    pub fn give_back(&mut self, bytes: u64) {
        self.left_bytes += bytes;
    }

    /// Did it end because the bytes were used up?
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }
}
