use std::fmt;

/// A place where a chunk's bytes can be, fastest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Tier {
    /// GPU memory of our own (not the engine's pages).
    Device,
    /// Pinned host memory.
    Host,
    /// RocksDB on NVMe.
    Disk,
}

impl Tier {
    /// Every tier, fastest first.
    pub const ALL: [Tier; 3] = [Tier::Device, Tier::Host, Tier::Disk];

    /// The name used in metrics, tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Tier::Device => "device",
            Tier::Host => "host",
            Tier::Disk => "disk",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The set of tiers that hold a block's chunk.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Residency(u8);

impl Residency {
    /// In no tier: a hole.
    pub const NONE: Residency = Residency(0);

    /// This set and `tier`.
    #[must_use]
    pub const fn with(self, tier: Tier) -> Self {
        Residency(self.0 | tier.bit())
    }

    /// This set without `tier`.
    #[must_use]
    pub const fn without(self, tier: Tier) -> Self {
        Residency(self.0 & !tier.bit())
    }

    /// Is the chunk in `tier`?
    pub const fn has(self, tier: Tier) -> bool {
        self.0 & tier.bit() != 0
    }

    /// Is it nowhere?
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// The fastest tier that holds it.
    pub fn fastest(self) -> Option<Tier> {
        Tier::ALL.into_iter().find(|&tier| self.has(tier))
    }
}

impl fmt::Debug for Residency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set()
            .entries(Tier::ALL.into_iter().filter(|&tier| self.has(tier)))
            .finish()
    }
}
