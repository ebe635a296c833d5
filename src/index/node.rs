//! Nodes of the tree: runs of blocks, and what hangs below them.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::num::NonZeroU64;

use stemkv_store::{DeviceSlotId, Key, RecordId, SlotId, Tier};

use super::report::NamespaceStats;
use crate::placement::{RunId, RunUse};

/// The tiers that the index keeps, by their number in the arrays below.
pub(super) const TIERS: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Disk];

/// The numbers of the tiers in RAM.
pub(super) const DEVICE: usize = 0;
pub(super) const HOST: usize = 1;
const _: () = assert!(matches!(TIERS[DEVICE], Tier::Device));
const _: () = assert!(matches!(TIERS[HOST], Tier::Host));

/// A value for each tier.
pub(super) type PerTier<T> = [T; TIERS.len()];

/// The number of `tier`; `None` where the index does not keep it.
pub(super) fn tier_number(tier: Tier) -> Option<usize> {
    TIERS.iter().position(|&kept| kept == tier)
}

/// Hashes what is uniform already (keys) or small (run numbers): the first eight bytes are the hash.
#[derive(Default)]
pub struct KeyHasher(u64);

/// Builds [`KeyHasher`]s.
pub type KeyBuildHasher = BuildHasherDefault<KeyHasher>;

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    /// A slice's length, before its bytes: the same for all keys.
    fn write_usize(&mut self, _: usize) {}

    fn write_u32(&mut self, number: u32) {
        // Run numbers are dense; the table wants its top bits different too.
        self.0 = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Where one block's chunk is, in 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(Rust, packed(4))]
pub(super) struct Chunk {
    /// A record's number; 0 for none.
    record: u64,
    /// A slot's number, [`Chunk::NO_SLOT`] or [`Chunk::PENDING_SLOT`].
    host: u32,
    /// A device slot's number or [`Chunk::NO_SLOT`].
    device: u32,
}

impl Chunk {
    const NO_SLOT: u32 = u32::MAX;
    const PENDING_SLOT: u32 = u32::MAX - 1;

    /// In no tier, and nobody is filling it.
    pub(super) const HOLE: Chunk = Chunk {
        record: 0,
        host: Self::NO_SLOT,
        device: Self::NO_SLOT,
    };
    /// A claim is filling it.
    pub(super) const PENDING: Chunk = Chunk {
        record: 0,
        host: Self::PENDING_SLOT,
        device: Self::NO_SLOT,
    };

    pub(super) fn device(self) -> Option<DeviceSlotId> {
        (self.device != Self::NO_SLOT).then_some(DeviceSlotId(self.device))
    }

    pub(super) fn host(self) -> Option<SlotId> {
        (self.host < Self::PENDING_SLOT).then_some(SlotId(self.host))
    }

    pub(super) fn record(self) -> Option<RecordId> {
        NonZeroU64::new(self.record).map(RecordId)
    }

    pub(super) fn is_pending(self) -> bool {
        self.host == Self::PENDING_SLOT
    }

    pub(super) fn is_resident(self) -> bool {
        self.is_in_ram() || self.record != 0
    }

    /// Is it in the host tier or in the device tier?
    pub(super) fn is_in_ram(self) -> bool {
        self.host < Self::PENDING_SLOT || self.device != Self::NO_SLOT
    }

    pub(super) fn is_hole(self) -> bool {
        !self.is_resident() && !self.is_pending()
    }

    pub(super) fn has(self, tier: usize) -> bool {
        match TIERS[tier] {
            Tier::Disk => self.record != 0,
            Tier::Device => self.device != Self::NO_SLOT,
            _ => self.host < Self::PENDING_SLOT,
        }
    }

    /// # Panics
    /// For the two highest slot numbers, which stand for something else here.
    pub(super) fn with_host(self, slot: SlotId) -> Self {
        assert!(
            slot.0 < Self::PENDING_SLOT,
            "slot numbers end below {}",
            Self::PENDING_SLOT
        );
        Chunk {
            host: slot.0,
            ..self
        }
    }

    /// # Panics
    /// For the highest slot number, which stands for none here.
    pub(super) fn with_device(self, slot: DeviceSlotId) -> Self {
        assert!(slot.0 != Self::NO_SLOT, "slot numbers end below");
        Chunk {
            device: slot.0,
            ..self
        }
    }

    pub(super) fn with_record(self, record: RecordId) -> Self {
        Chunk {
            record: record.0.get(),
            ..self
        }
    }

    pub(super) fn with_pending(self) -> Self {
        Chunk {
            host: Self::PENDING_SLOT,
            ..self
        }
    }

    /// Without its copy in `tier`. In the host tier that ends pending, too.
    pub(super) fn without(self, tier: usize) -> Self {
        match TIERS[tier] {
            Tier::Disk => Chunk { record: 0, ..self },
            Tier::Device => Chunk {
                device: Self::NO_SLOT,
                ..self
            },
            _ => Chunk {
                host: Self::NO_SLOT,
                ..self
            },
        }
    }
}

/// A pin's number in the pin table.
pub(super) type PinId = u32;

/// A run of blocks: one edge of the path-compressed tree.
///
/// A namespace's root is a node with an empty run, a [`NamespaceRoot`] and no parent.
#[derive(Default)]
pub(super) struct Node {
    pub(super) parent: Option<RunId>,
    /// The node of the namespace's root.
    pub(super) root: Option<RunId>,
    /// Position of the run's first block in its prefix.
    pub(super) depth: u32,
    pub(super) keys: Vec<Key>,
    /// As long as `keys`.
    pub(super) chunks: Vec<Chunk>,
    pub(super) children: Children,
    /// Pins that end in descendants: they cover the whole run.
    pub(super) through: u32,
    /// Pins that end in this run.
    pub(super) ends: Vec<PinId>,
    /// Leading blocks that some pin covers.
    pub(super) pinned: u32,
    pub(super) used: RunUse,
    pub(super) last_use_ms: u64,
    /// Blocks of the run in each tier.
    pub(super) count: PerTier<u32>,
    /// One past the last block of the run in each tier.
    pub(super) end: PerTier<u32>,
    /// Children with anything in each tier, in themselves or below.
    pub(super) live: PerTier<u32>,
    /// Is it in the tier's eviction policy?
    pub(super) listed: PerTier<bool>,
    pub(super) namespace: Option<Box<NamespaceRoot>>,
}

/// What only a namespace's root has.
pub(super) struct NamespaceRoot {
    pub(super) key: Key,
    pub(super) stats: NamespaceStats,
}

impl Node {
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn is_root(&self) -> bool {
        self.namespace.is_some()
    }

    /// Is anything of it, or below it, in `tier`?
    pub(super) fn is_live(&self, tier: usize) -> bool {
        self.count[tier] > 0 || self.live[tier] > 0
    }

    /// May the last block of the run in `tier` leave it? Descendants' copies in the tier go first;
    /// and where it is the block's only copy, nothing in any tier may be behind it (I2).
    pub(super) fn is_evictable(&self, tier: usize) -> bool {
        let end = self.end[tier];
        if self.count[tier] == 0 || self.live[tier] > 0 || end <= self.pinned {
            return false;
        }
        let only_copy = self.chunks[end as usize - 1].without(tier).is_hole();
        !only_copy || (0..TIERS.len()).all(|other| self.end[other] <= end && self.live[other] == 0)
    }

    /// One past the last block before `below` that is in `tier`.
    pub(super) fn end_below(&self, tier: usize, below: usize) -> u32 {
        let last = self.chunks[..below]
            .iter()
            .rposition(|chunk| chunk.has(tier));
        last.map_or(0, |last| last as u32 + 1)
    }
}

/// The children of a node, by their first key.
#[derive(Default)]
pub(super) enum Children {
    #[default]
    None,
    One(RunId),
    Many(HashMap<Key, RunId, KeyBuildHasher>),
}

impl Children {
    pub(super) fn len(&self) -> usize {
        match self {
            Children::None => 0,
            Children::One(_) => 1,
            Children::Many(map) => map.len(),
        }
    }

    pub(super) fn only(&self) -> Option<RunId> {
        match self {
            Children::One(child) => Some(*child),
            _ => None,
        }
    }

    pub(super) fn ids(&self) -> Vec<RunId> {
        match self {
            Children::None => Vec::new(),
            Children::One(child) => vec![*child],
            Children::Many(map) => map.values().copied().collect(),
        }
    }
}
