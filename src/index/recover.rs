//! Rebuilding the tree from a disk tier's records (I3): the index is derived.

use std::collections::HashMap;

use stemkv_store::{Key, RecordId, RecordInfo, Tier};

use super::Index;
use super::node::{Chunk, KeyBuildHasher, Node, tier_number};
use super::tree::{RUN_BLOCKS_MAX, Tree};
use crate::placement::{RunId, RunUse};

/// What is known of a record's place, beside the record itself.
#[derive(Clone, Copy, Default)]
struct Link {
    /// Reached from the namespace's root?
    is_reachable: bool,
    parent: Option<u32>,
    first_child: Option<u32>,
    next_sibling: Option<u32>,
    /// The latest use of it and of everything behind it.
    last_use_ms: u64,
}

impl Index {
    /// Builds the tree from a disk tier's records, in any order. Records whose ancestors are
    /// missing, or whose position or namespace contradicts their parent's, and all but the newest of
    /// several for one block are returned: they can never be reached and should be removed.
    ///
    /// The order of eviction follows the records' last use; runs that were last used together
    /// become one run.
    ///
    /// # Panics
    /// Where the index is not empty.
    pub fn restore(&self, records: Vec<RecordInfo>) -> Vec<RecordId> {
        let mut links = vec![Link::default(); records.len()];
        let by_key = newest_by_key(&records);
        let mut order: Vec<u32> = by_key.values().copied().collect();
        order.sort_unstable_by_key(|&i| records[i as usize].depth);
        let mut first_blocks = Vec::new();
        for &i in &order {
            let record = &records[i as usize];
            let mut link = Link {
                last_use_ms: record.last_use_ms,
                ..Link::default()
            };
            if record.parent == record.namespace {
                if record.depth == 0 {
                    link.is_reachable = true;
                    first_blocks.push(i);
                }
            } else if let Some(&parent) = by_key.get(&record.parent) {
                let of_parent = &records[parent as usize];
                // Sorted by depth: what is known of the parent is final.
                if links[parent as usize].is_reachable
                    && of_parent.namespace == record.namespace
                    && of_parent.depth.checked_add(1) == Some(record.depth)
                {
                    link.is_reachable = true;
                    link.parent = Some(parent);
                    link.next_sibling = links[parent as usize].first_child.replace(i);
                }
            }
            links[i as usize] = link;
        }
        for &i in order.iter().rev() {
            let link = links[i as usize];
            if let Some(parent) = link.parent {
                let of_parent = &mut links[parent as usize].last_use_ms;
                *of_parent = link.last_use_ms.max(*of_parent);
            }
        }
        let mut tree = self.lock();
        assert!(tree.roots.is_empty(), "only an empty index can be restored");
        build(&mut tree, &records, &links, first_blocks);
        drop(tree);
        let unreachable = links.iter().zip(&records);
        unreachable
            .filter(|(link, _)| !link.is_reachable)
            .map(|(_, record)| record.id)
            .collect()
    }
}

fn newest_by_key(records: &[RecordInfo]) -> HashMap<Key, u32, KeyBuildHasher> {
    let mut by_key: HashMap<Key, u32, KeyBuildHasher> =
        HashMap::with_capacity_and_hasher(records.len(), KeyBuildHasher::default());
    for (i, record) in (0u32..).zip(records) {
        let newest = by_key.entry(record.key).or_insert(i);
        if records[*newest as usize].id < record.id {
            *newest = i;
        }
    }
    by_key
}

/// Makes the runs, from the roots down, and lists them in the order of their use.
fn build(tree: &mut Tree, records: &[RecordInfo], links: &[Link], first_blocks: Vec<u32>) {
    let disk = tier_number(Tier::Disk).expect("the disk tier is kept");
    let mut times: Vec<u64> = links.iter().map(|link| link.last_use_ms).collect();
    times.sort_unstable();
    times.dedup();
    tree.tick = times.len() as u64;

    let mut runs: Vec<RunId> = Vec::new();
    let mut waiting: Vec<(RunId, u32)> = Vec::new();
    for i in first_blocks {
        waiting.push((tree.root(records[i as usize].namespace), i));
    }
    while let Some((parent, first)) = waiting.pop() {
        let last_use_ms = links[first as usize].last_use_ms;
        let mut node = Node {
            parent: Some(parent),
            root: tree.node(parent).root,
            depth: records[first as usize].depth,
            used: RunUse {
                // Ticks start at 1, in the order of the times.
                tick: times.partition_point(|&time| time <= last_use_ms) as u64,
                hits: 0,
            },
            last_use_ms,
            ..Node::default()
        };
        let mut last = first;
        loop {
            let record = &records[last as usize];
            node.keys.push(record.key);
            node.chunks.push(Chunk::HOLE.with_record(record.id));
            match links[last as usize].first_child {
                Some(child)
                    if links[child as usize].next_sibling.is_none()
                        && links[child as usize].last_use_ms == last_use_ms
                        && node.len() < RUN_BLOCKS_MAX =>
                {
                    last = child;
                }
                _ => break,
            }
        }
        node.keys.shrink_to_fit();
        node.chunks.shrink_to_fit();
        let len = node.len();
        node.count[disk] = len as u32;
        node.end[disk] = len as u32;
        let run = tree.adopt(parent, node);
        tree.node_mut(parent).live[disk] += 1;
        let stats = tree.stats(run);
        stats.blocks += len;
        stats.count_in_tier(disk, len);
        runs.push(run);
        let mut child = links[last as usize].first_child;
        while let Some(i) = child {
            waiting.push((run, i));
            child = links[i as usize].next_sibling;
        }
    }
    runs.sort_unstable_by_key(|&run| tree.node(run).used);
    for run in runs {
        tree.refresh(run);
    }
}

#[cfg(test)]
mod tests {
    //! Shown: a tree is rebuilt from its records in any order (I3), and what cannot be reached is
    //! told. How: records of small known trees, shuffled, then asked for by their paths.

    use std::num::NonZeroU64;
    use std::sync::Arc;

    use stemkv_store::SystemClock;

    use super::*;
    use crate::hash::Prompt;
    use crate::index::Ended;

    const ROOT: Key = Key([9; 32]);

    fn key(n: u8) -> Key {
        Key([n; 32])
    }

    fn record(id: u64, parent: Key, own: u8, depth: u32, last_use_ms: u64) -> RecordInfo {
        RecordInfo {
            id: RecordId(NonZeroU64::new(id).expect("not 0")),
            namespace: ROOT,
            parent,
            key: key(own),
            depth,
            bytes: 1,
            last_use_ms,
        }
    }

    fn index() -> Arc<Index> {
        Arc::new(Index::new(Arc::new(SystemClock::default())))
    }

    fn matched(index: &Index, path: &[u8]) -> (usize, Ended) {
        let keys = path.iter().map(|&n| key(n)).collect();
        let matched = index.match_prefix(&mut Prompt::from_hashes(ROOT, keys));
        (matched.blocks, matched.ended)
    }

    #[test]
    fn records_in_any_order_become_the_same_tree_and_go_in_the_order_of_their_use() {
        let records = [
            record(1, ROOT, 1, 0, 50),
            record(2, key(1), 2, 1, 10),
            record(3, key(2), 3, 2, 10),
            record(4, key(1), 4, 1, 50),
            record(5, ROOT, 5, 0, 20),
        ];
        for turn in 0..records.len() {
            let mut records = records.to_vec();
            records.rotate_left(turn);
            let index = index();
            assert!(index.restore(records).is_empty());
            index.check();
            assert_eq!(matched(&index, &[1, 2, 3]), (3, Ended::Complete));
            assert_eq!(matched(&index, &[1, 4, 3]), (2, Ended::Unknown));
            assert_eq!(matched(&index, &[5]), (1, Ended::Complete));
            let evicted = index.evict(Tier::Disk, usize::MAX);
            let order: Vec<Key> = evicted.iter().map(|evicted| evicted.key).collect();
            assert_eq!(order, [3, 2, 5, 4, 1].map(key));
            index.check();
            assert_eq!(index.stats(), Default::default());
        }
    }

    #[test]
    fn records_that_cannot_be_reached_are_told_and_not_matched() {
        let mut foreign = record(7, key(1), 7, 1, 0);
        foreign.namespace = key(8);
        let records = vec![
            record(1, ROOT, 1, 0, 0),
            record(2, key(1), 2, 2, 0),  // its parent is at 0
            record(3, key(99), 3, 1, 0), // no parent
            record(4, key(3), 4, 2, 0),  // nor does its parent have one
            record(5, key(5), 5, 1, 0),  // its own parent
            record(6, ROOT, 6, 1, 0),    // not a first block
            foreign,                     // its parent is in another namespace
            record(8, ROOT, 1, 0, 0),    // newer than record 1
        ];
        let index = index();
        let mut unreachable = index.restore(records);
        index.check();
        unreachable.sort_unstable();
        let ids: Vec<u64> = unreachable.iter().map(|id| id.0.get()).collect();
        assert_eq!(ids, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(index.stats().total.blocks, 1);
        for n in 2..8 {
            assert_eq!(matched(&index, &[n]), (0, Ended::Unknown));
        }
    }
}
