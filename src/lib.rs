#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod cache;
mod config;
pub mod hash;
pub mod index;
mod lease;
pub mod namespace;
mod pipeline;
pub mod placement;
mod stats;

pub use cache::{Cache, CacheBuilder, CompactReport, OpenNamespace};
pub use config::{
    Config, DeviceConfig, DiskCodec, DiskConfig, EngineConfig, HostCodec, HostConfig, parse_bytes,
};
pub use hash::{ExtraKey, FOREIGN_KEY_BYTES_MAX, HashPath, Prompt};
pub use index::{Ended, PendingWait};
pub use lease::{Lease, PrefixMatch};
pub use namespace::{
    HASHING_VERSION, LAYOUT_VERSION, Namespace, NamespaceDescription, Salt, Shard,
};
pub use pipeline::{
    Durability, Extent, Load, LoadOptions, LoadReport, LookAhead, LookAheadLimits, LookAheadReport,
    PagesFree, Prefetch, PrefetchGoal, PrefetchReport, Priority, Save, SaveReport,
};
pub use placement::{Choice, Verdict};
pub use stats::{
    CodecStats, DeviceStats, DiskStats, StageStats, Stats, TierStats, TreeStats, Warming,
};
/// Bytes and how they move: devices, tiers, engine pages.
pub use stemkv_store as store;
pub use stemkv_store::{Error, ErrorKind, Result};
