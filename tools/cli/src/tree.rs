//! The records of a store as the tree that they make.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Serialize;
use stemkv::index::Index;
use stemkv_store::{Key, RecordId, RecordInfo, SystemClock};

use crate::text;

/// Records by key, with their children.
pub(crate) struct Tree {
    pub(crate) records: Vec<RecordInfo>,
    by_key: HashMap<Key, usize>,
    children: HashMap<Key, Vec<usize>>,
}

/// Blocks of some range of depths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DepthBlocks {
    /// Position of the block in its prefix, first …
    pub from: u32,
    /// … to last.
    pub to: u32,
    /// Blocks there.
    pub blocks: u64,
}

/// Blocks with some number of children.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Branching {
    /// Children.
    pub children: u64,
    /// Blocks that have so many.
    pub blocks: u64,
}

/// The shape of the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Path-compressed nodes, as an open store has them.
    pub runs: u64,
    /// Blocks without a parent.
    pub first_blocks: u64,
    /// Records that cannot be reached from a first block: the next opening drops them.
    pub unreachable: u64,
    /// Blocks by depth, in ranges that double.
    pub depths: Vec<DepthBlocks>,
    /// Blocks by the number of their children; 0 is a leaf.
    pub branching: Vec<Branching>,
}

impl Tree {
    pub(crate) fn new(records: Vec<RecordInfo>) -> Self {
        let mut by_key = HashMap::with_capacity(records.len());
        let mut children: HashMap<Key, Vec<usize>> = HashMap::new();
        for (i, record) in records.iter().enumerate() {
            // The newest of several for one block counts, as at opening.
            let newest = by_key.entry(record.key).or_insert(i);
            if records[*newest].id < record.id {
                *newest = i;
            }
        }
        for &i in by_key.values() {
            children.entry(records[i].parent).or_default().push(i);
        }
        Tree {
            records,
            by_key,
            children,
        }
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&RecordInfo> {
        self.by_key.get(key).map(|&i| &self.records[i])
    }

    /// How many blocks directly follow this one.
    pub(crate) fn children(&self, key: &Key) -> u64 {
        self.children
            .get(key)
            .map_or(0, |children| children.len() as u64)
    }

    /// The records whose key begins with these digits.
    pub(crate) fn find(&self, digits: &str) -> Vec<&RecordInfo> {
        let mut found: Vec<_> = self
            .by_key
            .iter()
            .filter(|(key, _)| text::begins_with(key, digits))
            .map(|(_, &i)| &self.records[i])
            .collect();
        found.sort_by_key(|record| record.key);
        found
    }

    /// The blocks from the first one to `record`; and the key of the ancestor that is missing, where
    /// one is.
    pub(crate) fn path<'a>(&'a self, record: &'a RecordInfo) -> (Vec<&'a RecordInfo>, Option<Key>) {
        let mut path = vec![record];
        let mut last = record;
        while last.parent != last.namespace {
            match self.get(&last.parent) {
                // A record may claim any parent: depths that do not descend would never end.
                Some(parent) if parent.depth < last.depth => {
                    path.push(parent);
                    last = parent;
                }
                _ => {
                    path.reverse();
                    return (path, Some(last.parent));
                }
            }
        }
        path.reverse();
        (path, None)
    }

    /// An index with these records, and the records that cannot be reached in it.
    pub(crate) fn index(records: Vec<RecordInfo>) -> (Arc<Index>, Vec<RecordId>) {
        let index = Arc::new(Index::new(Arc::new(SystemClock::default())));
        let unreachable = index.restore(records);
        (index, unreachable)
    }

    pub(crate) fn shape(&self) -> Shape {
        let (index, unreachable) = Self::index(self.records.clone());
        let mut depths: Vec<DepthBlocks> = Vec::new();
        let mut branching = std::collections::BTreeMap::new();
        let mut first_blocks = 0;
        for &i in self.by_key.values() {
            let record = &self.records[i];
            // 0, 1, 2–3, 4–7, …
            let range = record
                .depth
                .checked_ilog2()
                .map_or(0, |log| log as usize + 1);
            while depths.len() <= range {
                let from = if depths.is_empty() {
                    0
                } else {
                    1_u32 << (depths.len() - 1)
                };
                let to = if depths.is_empty() {
                    0
                } else {
                    from + (from - 1)
                };
                depths.push(DepthBlocks {
                    from,
                    to,
                    blocks: 0,
                });
            }
            depths[range].blocks += 1;
            first_blocks += u64::from(record.parent == record.namespace);
            *branching.entry(self.children(&record.key)).or_insert(0) += 1;
        }
        Shape {
            runs: index.stats().runs as u64,
            first_blocks,
            unreachable: unreachable.len() as u64,
            depths,
            branching: branching
                .into_iter()
                .map(|(children, blocks)| Branching { children, blocks })
                .collect(),
        }
    }
}
