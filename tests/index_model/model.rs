//! The index as a plain map: one entry for each known path.

use super::*;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) devices: [Option<u32>; DEVICES],
    pub(super) host: Option<u32>,
    pub(super) record: Option<u64>,
    pub(super) pending: bool,
}

impl Block {
    pub(super) fn is_on_device(&self) -> bool {
        self.devices.iter().any(Option::is_some)
    }

    pub(super) fn is_in_ram(&self) -> bool {
        self.is_on_device() || self.host.is_some()
    }

    pub(super) fn is_resident(&self) -> bool {
        self.is_in_ram() || self.record.is_some()
    }

    pub(super) fn has(&self, pool: Pool) -> bool {
        self.without(pool) != *self
    }

    pub(super) fn without(&self, pool: Pool) -> Block {
        let mut block = *self;
        match pool {
            Pool::Device(device) => block.devices[device] = None,
            Pool::Host => block.host = None,
            Pool::Disk => block.record = None,
        }
        block
    }
}

#[derive(Default)]
pub(super) struct Model {
    pub(super) blocks: BTreeMap<Path, Block>,
    /// Paths that pins and claims cover, by their number.
    pub(super) pinned: BTreeMap<u64, Path>,
}

impl Model {
    pub(super) fn matched(&self, path: &[u32], device: usize) -> Matched {
        let mut matched = Matched::default();
        let block = |n: usize| self.blocks.get(&path[..n]).copied();
        while matched.blocks < path.len()
            && let Some(found) = block(matched.blocks + 1)
            && found.is_resident()
        {
            let own = found.devices[device].is_some();
            let in_reach =
                own || found.host.is_some() || (found.is_on_device() && found.record.is_none());
            if in_reach && matched.ram_blocks == matched.blocks {
                matched.ram_blocks += 1;
            }
            matched.device_blocks += usize::from(own);
            matched.disk_only_blocks += usize::from(!in_reach);
            matched.blocks += 1;
        }
        let mut next = matched.blocks + 1;
        matched.ended = match next <= path.len() {
            false => Ended::Complete,
            true => match block(next) {
                None => Ended::Unknown,
                Some(found) if found.pending => Ended::Pending,
                Some(_) => Ended::Hole,
            },
        };
        while next <= path.len()
            && let Some(found) = block(next)
            && found.pending
            && !found.is_resident()
        {
            matched.pending_blocks += 1;
            next += 1;
        }
        matched
    }

    pub(super) fn is_pinned(&self, path: &[u32]) -> bool {
        self.pinned.values().any(|pinned| pinned.starts_with(path))
    }

    /// Holes that nothing follows and nobody pins are forgotten.
    pub(super) fn forget(&mut self) {
        loop {
            let gone: Vec<Path> = self
                .blocks
                .iter()
                .filter(|(path, block)| {
                    !block.is_resident() && !block.pending && !self.is_pinned(path)
                })
                .filter(|(path, _)| !self.has_descendant(path, |_| true))
                .map(|(path, _)| path.clone())
                .collect();
            if gone.is_empty() {
                return;
            }
            for path in gone {
                self.blocks.remove(&path);
            }
        }
    }

    pub(super) fn has_descendant(&self, path: &[u32], wanted: impl Fn(&Block) -> bool) -> bool {
        self.blocks.iter().any(|(other, block)| {
            other.len() > path.len() && other.starts_with(path) && wanted(block)
        })
    }

    /// Follows one eviction, if it was legal.
    pub(super) fn evict(&mut self, key_evicted: Key, pool: Pool) -> Block {
        let found = self.blocks.keys().find(|path| key(path) == key_evicted);
        let path = found.expect("evicted what is known").clone();
        assert!(!self.is_pinned(&path), "{path:?} is pinned");
        let before = self.blocks[&path];
        let after = before.without(pool);
        assert_ne!(before, after, "{path:?} was not in {pool:?}");
        assert!(
            !self.has_descendant(&path, |block| block.has(pool)),
            "{path:?}: descendants go first"
        );
        if !after.is_resident() {
            assert!(
                !self.has_descendant(&path, Block::is_resident),
                "{path:?}: I2"
            );
        }
        self.blocks.insert(path, after);
        before
    }
}
