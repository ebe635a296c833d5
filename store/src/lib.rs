//! Bytes and how they move: the lower half of stemkv.
//!
//! This crate stores *chunks* (the KV bytes of one block, all layers) in pinned host memory and on
//! disk, and moves them between those tiers and an engine's paged KV memory. It has never heard of
//! a token, a prefix or a policy: a chunk is named by a 32-byte [`Key`], and whoever calls decides
//! what is kept and where it goes.
//!
//! | question | where |
//! |---|---|
//! | how is a chunk laid out? | [`KvGeometry`] |
//! | how do its bytes become fewer? | [`codec`] |
//! | where does an engine keep its KV? | [`PagedKv`], [`HostPages`] |
//! | where do bytes wait in RAM? | [`HostArena`], [`Filling`], [`Slot`] |
//! | who copies between the two? | [`Device`] and the [`TransferQueue`] in front of it |
//! | where do bytes survive a restart? | [`DiskTier`] |
//! | what time is it? | [`Clock`] |
//!
//! The three traits are the only seams. Each has a real and a simulated implementation under one
//! contract suite (`tests/device_contract.rs`, `tests/disk_contract/`).

mod checksum;
mod clock;
mod error;
mod geometry;
mod key;
mod paged;
mod record;
mod tier;

pub mod codec;
pub mod device;
pub mod disk;
pub mod host;
pub mod transfer;

pub use checksum::{Checksum, Checksummer};
#[cfg(any(test, feature = "sim"))]
pub use clock::SimClock;
pub use clock::{Clock, SystemClock};
pub use device::{
    CpuDevice, Device, DeviceArena, DeviceArenaUsage, DeviceFilling, DeviceFillingRef, DeviceInfo,
    DeviceSlot, DeviceSlotId, Direction, EncodedSave, Fence, FencePoint, SlabMove, SlabSums,
    Stream, Submitted, Transfer,
};
#[cfg(any(test, feature = "sim"))]
pub use device::{SimDevice, SimDeviceFault};
pub use disk::{
    BatchId, BatchTooLarge, DiskScan, DiskTier, DiskUsage, META_BYTES_MAX, RecordId, RecordInfo,
};
#[cfg(any(test, feature = "sim"))]
pub use disk::{SimDisk, SimDiskCall, SimMedium};
pub use error::{Error, ErrorKind, Result};
pub use geometry::{Dtype, KvGeometry, LayerId, Plane};
pub use host::{ArenaUsage, Filling, FillingRef, HostArena, Slot, SlotId};
pub use key::Key;
pub use paged::{HostPages, PageId, PageTable, PagedKv, PlaneStrides};
pub use record::{CodecId, FORMAT_VERSION, RecordHeader, SlabEntry};
pub use tier::{Residency, Tier};
pub use transfer::{Job, JobEvent, QueueLimits, TransferQueue, Urgency};
