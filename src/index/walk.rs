//! Following a path down the tree: how far it is known, and where that is.

use stemkv_store::Key;

use super::node::{HOST, Node, Pool};
use super::tree::Tree;
use super::{Ended, Matched};
use crate::placement::RunId;

/// A place in the tree: behind the first `len` blocks of `node`.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) node: RunId,
    pub(super) len: usize,
}

/// What following a path found.
pub(super) struct Walk {
    pub(super) matched: Matched,
    /// Blocks of the path that are in the tree, in a tier or not.
    pub(super) known: usize,
    /// Behind the last block that matched; `None` where none did.
    pub(super) matched_end: Option<Place>,
    /// Behind the last block that is known; `None` where none is.
    pub(super) known_end: Option<Place>,
}

/// Counts a path's blocks one after the other, as one device sees them.
struct Count {
    device: usize,
    matched: Matched,
    stage: Stage,
}

#[derive(Default, PartialEq, Eq)]
enum Stage {
    /// Every block so far is in the host tier or on the device, or comes down from another one.
    #[default]
    Ram,
    /// Every block so far is in some tier.
    Resident,
    /// Behind the match: every block since is pending.
    Pending,
    Over,
}

impl Count {
    fn new(device: usize) -> Self {
        Count {
            device,
            matched: Matched::default(),
            stage: Stage::default(),
        }
    }

    fn block(&mut self, node: &Node, at: usize) {
        let chunk = node.chunks[at];
        let own = node.device_slot(at, self.device).is_some();
        // What another device holds comes from there only where it is not on disk too.
        let ram = own || chunk.is_in_host() || (chunk.is_on_device() && chunk.record().is_none());
        match self.stage {
            Stage::Ram | Stage::Resident if chunk.is_resident() => {
                self.matched.blocks += 1;
                self.matched.disk_only_blocks += usize::from(!ram);
                self.matched.device_blocks += usize::from(own);
                if !ram {
                    self.stage = Stage::Resident;
                } else if self.stage == Stage::Ram {
                    self.matched.ram_blocks += 1;
                }
            }
            Stage::Ram | Stage::Resident if chunk.is_pending() => {
                self.matched.ended = Ended::Pending;
                self.matched.pending_blocks = 1;
                self.stage = Stage::Pending;
            }
            Stage::Ram | Stage::Resident => {
                self.matched.ended = Ended::Hole;
                self.stage = Stage::Over;
            }
            Stage::Pending if chunk.is_pending() && !chunk.is_resident() => {
                self.matched.pending_blocks += 1;
            }
            Stage::Pending | Stage::Over => self.stage = Stage::Over,
        }
    }

    /// The first `n` blocks of a run.
    fn run(&mut self, node: &Node, n: usize) {
        let all = node.len() as u32;
        let on_device = node.book(Pool::Device(self.device).number()).count;
        if self.stage == Stage::Ram
            && (on_device == all || (on_device == 0 && node.book(HOST).count == all))
        {
            self.matched.blocks += n;
            self.matched.ram_blocks += n;
            self.matched.device_blocks += if on_device == all { n } else { 0 };
            return;
        }
        for at in 0..n {
            if self.stage == Stage::Over {
                return;
            }
            self.block(node, at);
        }
    }

    fn is_matching(&self) -> bool {
        matches!(self.stage, Stage::Ram | Stage::Resident)
    }

    fn finish(mut self, is_complete: bool) -> Matched {
        if self.is_matching() {
            self.matched.ended = match is_complete {
                true => Ended::Complete,
                false => Ended::Unknown,
            };
        }
        self.matched
    }
}

/// Leading hashes that are equal. A hash determines all that is before it in its path (`hash.rs` says
/// why), so what is before two equal ones is equal: few are looked at, each whole.
fn common(here: &[Key], there: &[Key]) -> usize {
    let len = here.len().min(there.len());
    let (mut equal, mut differ) = (0, len);
    // Usually all are.
    let mut middle = len.saturating_sub(1);
    while equal < differ {
        match here[middle] == there[middle] {
            true => equal = middle + 1,
            false => differ = middle,
        }
        middle = equal + (differ - equal) / 2;
    }
    equal
}

impl Tree {
    /// Follows a chained path, for one device.
    pub(super) fn walk(&self, namespace: &Key, keys: &[Key], device: usize) -> Walk {
        let mut count = Count::new(device);
        let mut walk = Walk {
            matched: Matched::default(),
            known: 0,
            matched_end: None,
            known_end: None,
        };
        let mut at = self.roots.get(namespace).copied();
        while let Some(parent) = at
            && let Some(key) = keys.get(walk.known)
        {
            at = self.child(parent, key);
            let Some(id) = at else { break };
            let node = self.node(id);
            let n = common(&node.keys, &keys[walk.known..]);
            walk.known_end = Some(Place { node: id, len: n });
            walk.known += n;
            if count.is_matching() {
                let before = count.matched.blocks;
                count.run(node, n);
                let len = count.matched.blocks - before;
                if len > 0 {
                    walk.matched_end = Some(Place { node: id, len });
                }
            } else {
                count.run(node, n);
            }
            if n < node.len() {
                break;
            }
        }
        walk.matched = count.finish(walk.known == keys.len());
        walk
    }

    /// The places of the leading flat keys that are known, and how far they match.
    pub(super) fn walk_flat(
        &self,
        namespace: &Key,
        keys: &[Key],
        device: usize,
    ) -> (Matched, Vec<RunId>) {
        let mut count = Count::new(device);
        let mut known = Vec::new();
        if let Some(&root) = self.roots.get(namespace) {
            for key in keys {
                let Some(id) = self.child(root, key) else {
                    break;
                };
                count.run(self.node(id), 1);
                known.push(id);
            }
        }
        let is_complete = known.len() == keys.len();
        (count.finish(is_complete), known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every length of two paths, and every block at which they part.
    #[test]
    fn what_two_paths_have_in_common_ends_where_they_part() {
        let path = |len: usize, parts: usize, other: u8| -> Vec<Key> {
            let key =
                |at| Key([if at < parts { 0 } else { other }; 32].map(|byte| byte ^ at as u8));
            (0..len).map(key).collect()
        };
        for len in 0..20 {
            for other_len in 0..20 {
                for parts in 0..=20 {
                    let (one, other) = (path(len, parts, 64), path(other_len, parts, 128));
                    let expected = parts.min(len).min(other_len);
                    assert_eq!(common(&one, &other), expected, "{len} {other_len} {parts}");
                }
            }
        }
    }
}
