//! Rebuilding the tree from a disk tier's records (I3): the index is derived.

use std::hash::BuildHasher as _;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use stemkv_store::{Key, RecordId, RecordInfo};

use super::Index;
use super::node::{Chunk, DISK, KeyBuildHasher, Node};
use super::tree::{RUN_BLOCKS_MAX, Tree};
use crate::placement::{RunId, RunUse};

/// No record.
const NONE: u32 = u32::MAX;

/// What is known of a record's place, beside the record itself.
#[derive(Clone, Copy)]
struct Link {
    /// The latest use of it and of everything behind it.
    last_use_ms: u64,
    parent: u32,
    first_child: u32,
    next_sibling: u32,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing leads to it, as far as is known.
    Unreached,
    /// There is a newer record of its block.
    Superseded,
    /// The namespace's root leads to it.
    Reached,
}

impl Index {
    /// Builds the tree from a disk tier's records, in any order; the fastest where most come right
    /// behind their parents. Records whose ancestors are missing, or whose position or namespace
    /// contradicts their parent's, and all but the newest of several for one block are returned: they
    /// can never be reached and should be removed.
    ///
    /// The order of eviction follows the records' last use; runs that were last used together
    /// become one run.
    ///
    /// # Panics
    /// Where the index is not empty.
    pub fn restore(&self, records: Vec<RecordInfo>) -> Vec<RecordId> {
        let fresh = |record: &RecordInfo| Link {
            last_use_ms: record.last_use_ms,
            parent: NONE,
            first_child: NONE,
            next_sibling: NONE,
            state: State::Unreached,
        };
        let mut links: Vec<Link> = records.iter().map(fresh).collect();
        let by_key = ByKey::of_newest(&records, &mut links);
        let mut order = link_up(&records, &mut links, &by_key);
        drop(by_key);
        let first_blocks = order.len();
        // Depths ascend from each to its children, so this ends.
        let mut at = 0;
        while let Some(&i) = order.get(at) {
            links[i as usize].state = State::Reached;
            let mut child = links[i as usize].first_child;
            while child != NONE {
                order.push(child);
                child = links[child as usize].next_sibling;
            }
            at += 1;
        }
        for &i in order.iter().rev() {
            let link = links[i as usize];
            if link.parent != NONE {
                let of_parent = &mut links[link.parent as usize].last_use_ms;
                *of_parent = link.last_use_ms.max(*of_parent);
            }
        }
        order.truncate(first_blocks);
        let mut tree = self.lock();
        assert!(tree.roots.is_empty(), "only an empty index can be restored");
        build(&mut tree, &records, &links, order);
        drop(tree);
        let unreachable = links.iter().zip(&records);
        unreachable
            .filter(|(link, _)| link.state != State::Reached)
            .map(|(_, record)| record.id)
            .collect()
    }
}

/// Hangs each record that has a fitting parent below it; returns the first blocks.
fn link_up(records: &[RecordInfo], links: &mut [Link], by_key: &ByKey) -> Vec<u32> {
    let mut first_blocks = Vec::with_capacity(records.len());
    for (i, record) in (0_u32..).zip(records) {
        if links[i as usize].state == State::Superseded {
            continue;
        }
        if record.parent == record.namespace {
            if record.depth == 0 {
                first_blocks.push(i);
            }
            continue;
        }
        let is_parent = |&above: &u32| {
            records[above as usize].key == record.parent
                && links[above as usize].state != State::Superseded
        };
        let parent = i
            .checked_sub(1)
            .filter(is_parent)
            .or_else(|| by_key.get(&record.parent, records));
        let Some(parent) = parent else { continue };
        let of_parent = &records[parent as usize];
        if of_parent.namespace == record.namespace
            && of_parent.depth.checked_add(1) == Some(record.depth)
        {
            let sibling = std::mem::replace(&mut links[parent as usize].first_child, i);
            links[i as usize].next_sibling = sibling;
            links[i as usize].parent = parent;
        }
    }
    first_blocks
}

/// The newest record of each key, by number: the keys stay in the records.
struct ByKey(HashTable<u32>);

impl ByKey {
    /// Marks the others as superseded.
    fn of_newest(records: &[RecordInfo], links: &mut [Link]) -> ByKey {
        assert!(records.len() < NONE as usize, "fewer than 2^32 records");
        let key_of = |i: u32| &records[i as usize].key;
        let mut newest = HashTable::with_capacity(records.len());
        for (i, record) in (0_u32..).zip(records) {
            let is_same = |&other: &u32| *key_of(other) == record.key;
            match newest.entry(hash(&record.key), is_same, |&other| hash(key_of(other))) {
                Entry::Vacant(free) => drop(free.insert(i)),
                Entry::Occupied(mut known) => {
                    let is_newer = records[*known.get() as usize].id < record.id;
                    let older = match is_newer {
                        true => std::mem::replace(known.get_mut(), i),
                        false => i,
                    };
                    links[older as usize].state = State::Superseded;
                }
            }
        }
        ByKey(newest)
    }

    fn get(&self, key: &Key, records: &[RecordInfo]) -> Option<u32> {
        let is_it = |&i: &u32| records[i as usize].key == *key;
        self.0.find(hash(key), is_it).copied()
    }
}

fn hash(key: &Key) -> u64 {
    KeyBuildHasher::default().hash_one(key)
}

/// Makes the runs, from the roots down, and lists them in the order of their use.
fn build(tree: &mut Tree, records: &[RecordInfo], links: &[Link], first_blocks: Vec<u32>) {
    let mut runs: Vec<RunId> = Vec::new();
    let mut waiting: Vec<(RunId, u32)> = Vec::with_capacity(first_blocks.len());
    for i in first_blocks {
        waiting.push((tree.root(records[i as usize].namespace), i));
    }
    let mut blocks: Vec<u32> = Vec::with_capacity(RUN_BLOCKS_MAX);
    while let Some((parent, first)) = waiting.pop() {
        let last_use_ms = links[first as usize].last_use_ms;
        blocks.clear();
        blocks.push(first);
        let mut last = &links[first as usize];
        while last.first_child != NONE && blocks.len() < RUN_BLOCKS_MAX {
            let child = &links[last.first_child as usize];
            if child.next_sibling != NONE || child.last_use_ms != last_use_ms {
                break;
            }
            blocks.push(last.first_child);
            last = child;
        }
        let of_blocks = || blocks.iter().map(|&i| &records[i as usize]);
        let len = blocks.len();
        let mut node = Node {
            parent: Some(parent),
            root: tree.node(parent).root,
            depth: records[first as usize].depth,
            last_use_ms,
            keys: of_blocks().map(|record| record.key).collect(),
            chunks: of_blocks()
                .map(|record| Chunk::HOLE.with_record(record.id))
                .collect(),
            ..Node::default()
        };
        let book = node.book_mut(DISK);
        (book.count, book.end) = (len as u32, len as u32);
        let run = tree.adopt(parent, node);
        tree.node_mut(parent).book_mut(DISK).live += 1;
        let stats = tree.stats(run);
        stats.blocks += len;
        stats.count_on_disk(len);
        runs.push(run);
        let mut child = last.first_child;
        while child != NONE {
            waiting.push((run, child));
            child = links[child as usize].next_sibling;
        }
    }
    // Ticks start at 1, in the order of the times.
    runs.sort_by_key(|&run| tree.node(run).last_use_ms);
    let mut before = None;
    for run in runs {
        let last_use_ms = tree.node(run).last_use_ms;
        if before.replace(last_use_ms) != Some(last_use_ms) {
            tree.tick += 1;
        }
        tree.node_mut(run).used = RunUse {
            tick: tree.tick,
            hits: 0,
        };
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
    use crate::index::{Ended, Pool};

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
            let evicted = index.evict(Pool::Disk, usize::MAX);
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
