//! What must hold of the tree between any two operations.

use std::collections::HashSet;

use super::Index;
use super::node::{Children, Node, Pool};
use super::report::NamespaceStats;
use super::tree::{RUN_BLOCKS_MAX, Tree};
use crate::placement::RunId;

impl Index {
    /// Panics where a structural invariant does not hold. For tests: it looks at every block.
    #[doc(hidden)]
    pub fn check(&self) {
        let tree = self.lock();
        let mut seen = HashSet::new();
        let mut listed = vec![0; tree.policies.len()];
        let mut on_devices = vec![0; tree.device_blocks.len()];
        for (key, &root) in &tree.roots {
            let namespace = tree.node(root).namespace.as_ref().expect("a root");
            assert_eq!(namespace.key, *key);
            let mut counted = NamespaceStats::default();
            let mut stack = vec![root];
            while let Some(id) = stack.pop() {
                assert!(seen.insert(id), "{id:?} is reached twice");
                let node = tree.node(id);
                check_links(&tree, id, root);
                check_counts(&tree, id, &mut counted);
                for (pool, listed) in listed.iter_mut().enumerate() {
                    let is_listed = node.is_listed(pool);
                    assert_eq!(is_listed, node.is_evictable(pool), "{id:?} in {pool}");
                    *listed += usize::from(is_listed);
                }
                for (device, blocks) in on_devices.iter_mut().enumerate() {
                    *blocks += node.book(Pool::Device(device).number()).count as usize;
                }
                stack.extend(node.children.ids());
            }
            assert!(
                tree.node(root).children.len() > 0,
                "an empty namespace is forgotten"
            );
            assert_eq!(counted, namespace.stats);
        }
        assert_eq!(
            seen.len() + tree.free_nodes.len(),
            tree.nodes.len(),
            "a node leaked"
        );
        assert_eq!(on_devices, tree.device_blocks);
        for (pool, listed) in listed.into_iter().enumerate() {
            let policy = &tree.policies[pool];
            assert_eq!(policy.len(), listed);
            if let Some(coldest) = policy.coldest() {
                assert!(tree.node(coldest).is_listed(pool));
            }
        }
        for (pin, entry) in (0..).zip(&tree.pins) {
            if let Some(entry) = entry {
                let ends = &tree.node(entry.node).ends;
                assert_eq!(ends.iter().filter(|&&listed| listed == pin).count(), 1);
            }
        }
        let flagged = tree.is_touched.iter().filter(|&&touched| touched).count();
        assert_eq!(flagged, tree.touched.len());
    }
}

fn children(tree: &Tree, id: RunId) -> impl Iterator<Item = &Node> {
    let ids = tree.node(id).children.ids();
    ids.into_iter().map(|child| tree.node(child))
}

fn check_links(tree: &Tree, id: RunId, root: RunId) {
    let node = tree.node(id);
    assert_eq!(node.root, Some(root));
    assert_eq!(node.is_root(), id == root);
    assert_eq!(node.len() == 0, id == root, "only a root's run is empty");
    assert_eq!(node.chunks.len(), node.len());
    assert!(node.len() <= RUN_BLOCKS_MAX);
    if let Children::Many(map) = &node.children {
        assert!(map.len() > 1);
        assert!(
            map.iter()
                .all(|(key, &child)| tree.node(child).keys[0] == *key)
        );
    }
    for child in children(tree, id) {
        assert_eq!(child.parent, Some(id));
        assert_eq!(child.depth, node.depth + node.len() as u32);
        assert!(
            id == root || child.used.tick <= node.used.tick,
            "a descendant is never warmer"
        );
    }
    // Pins: by its own list, and by what ends below.
    let lens = node.ends.iter().map(|&pin| {
        let entry = tree.pin(pin);
        assert_eq!(entry.node, id);
        assert!((1..=node.len()).contains(&(entry.len as usize)));
        entry.len
    });
    let longest = lens.max().unwrap_or(0);
    let below = children(tree, id).map(|child| child.through as usize + child.ends.len());
    assert_eq!(node.through as usize, below.sum::<usize>());
    let pinned = if node.through > 0 {
        node.len() as u32
    } else {
        longest
    };
    assert_eq!(node.pinned, pinned);
}

fn check_counts(tree: &Tree, id: RunId, counted: &mut NamespaceStats) {
    let node = tree.node(id);
    for pool in 0..tree.policies.len() {
        let book = node.book(pool);
        let has = (0..node.len()).filter(|&i| node.has(i, pool)).count();
        assert_eq!(book.count as usize, has);
        assert_eq!(book.end, node.end_below(pool, node.len()));
        let live = children(tree, id)
            .filter(|child| child.is_live(pool))
            .count();
        assert_eq!(book.live as usize, live);
    }
    assert!(node.pools().end <= tree.policies.len(), "a device too many");
    for (i, chunk) in node.chunks.iter().enumerate() {
        assert_eq!(chunk.is_on_device(), node.device_of(i, None).is_some());
        counted.count(*chunk, 1);
        assert!(
            !chunk.is_pending() || i < node.pinned as usize,
            "its claim pins a pending block"
        );
    }
    counted.blocks += node.len();
    counted.pinned_blocks += node.pinned as usize;
    if node.children.len() == 0
        && let Some(last) = node.chunks.last()
    {
        let is_needed = last.is_resident() || node.pinned as usize == node.len();
        assert!(is_needed, "a hole that nothing follows goes");
    }
}
