//! The device seam: who copies between host slots and an engine's pages.

use std::sync::Arc;
use std::time::Duration;

use crate::{Checksum, FillingRef, HostArena, LayerId, PageTable, Result, Slot};

mod cpu;
#[cfg(any(test, feature = "sim"))]
mod sim;

pub use cpu::CpuDevice;
#[cfg(any(test, feature = "sim"))]
pub use sim::{SimDevice, SimDeviceFaults};

/// An engine's stream (a `CUstream` as an integer); [`Stream::HOST`] for engines on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream(pub u64);

impl Stream {
    /// The calling thread itself: ordering it behind a fence means waiting.
    pub const HOST: Stream = Stream(0);
}

/// A recorded point on a stream. Clones are the same point.
#[derive(Clone)]
pub struct Fence(Arc<dyn FencePoint>);

/// What a device promises of its fences.
pub trait FencePoint: Send + Sync + 'static {
    /// Has the point been reached?
    ///
    /// # Errors
    /// `Unavailable` where the device failed before it.
    fn is_reached(&self) -> Result<bool>;

    /// Waits on the host until the point is reached; `false` after `timeout`.
    ///
    /// # Errors
    /// As [`FencePoint::is_reached`].
    fn wait(&self, timeout: Duration) -> Result<bool>;

    /// For the device that made it.
    fn as_any(&self) -> &dyn std::any::Any;
}

impl Fence {
    /// Wraps a device's own point.
    pub fn new(point: impl FencePoint) -> Fence {
        Fence(Arc::new(point))
    }

    /// A point that has been reached already: for engines on the CPU, whose writes are done when
    /// they say so.
    pub fn reached() -> Fence {
        struct Reached;
        impl FencePoint for Reached {
            fn is_reached(&self) -> Result<bool> {
                Ok(true)
            }
            fn wait(&self, _: Duration) -> Result<bool> {
                Ok(true)
            }
            fn as_any(&self) -> &dyn std::any::Any {
                self
            }
        }
        Fence::new(Reached)
    }

    /// The device's own point.
    pub fn point(&self) -> &dyn FencePoint {
        &*self.0
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Host slots → engine pages.
    Load,
    /// Engine pages → host slots.
    Save,
}

/// The host side of one slab's move.
#[derive(Clone)]
pub enum SlabMove {
    /// Read from a sealed slot.
    Load {
        /// The chunk.
        slot: Slot,
        /// The prompt position of the chunk's first token.
        token: u32,
    },
    /// Write into a slot that is being filled.
    Save {
        /// The chunk.
        slot: FillingRef,
        /// The prompt position of the chunk's first token.
        token: u32,
    },
}

/// One layer of some chunks, to be moved in one direction: what a [`Device`] executes.
pub struct Transfer<'a> {
    /// Which way. Every move has the same.
    pub direction: Direction,
    /// Which layer.
    pub layer: LayerId,
    /// The engine's side.
    pub table: &'a PageTable,
    /// The host's side, in prompt order.
    pub moves: &'a [SlabMove],
    /// Tokens below this prompt position are left alone (the engine has them already).
    pub from_token: u32,
}

/// What a device says of a transfer that it took.
pub struct Submitted {
    /// Reached when the bytes have arrived.
    pub fence: Fence,
    /// The checksum of each move's slab, in order, where computing it was free; `None` where the
    /// device moved the bytes without looking at them.
    pub checksums: Option<Vec<Checksum>>,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// For people: `cpu`, `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Are transfers done when [`Device::submit`] returns?
    pub synchronous: bool,
}

/// Moves slabs between host slots and engine pages: one of the three seams.
///
/// One thread calls [`Device::submit`] for a device; the other methods may come from any thread. No
/// method calls back, and none blocks but where it says so.
pub trait Device: Send + Sync + 'static {
    /// What this device is.
    fn info(&self) -> DeviceInfo;

    /// Makes the arena's memory reachable (pins it). Called once, before the first transfer. The
    /// arena outlives the device's last transfer: the device keeps a clone.
    ///
    /// # Errors
    /// `Unavailable`, with the remedy (the limit on locked memory, say).
    fn attach(&self, arena: &HostArena) -> Result<()>;

    /// Records where `stream` is now. For [`Stream::HOST`] the fence is reached already.
    ///
    /// # Errors
    /// `Unavailable` where the device fails.
    fn record(&self, stream: Stream) -> Result<Fence>;

    /// Orders everything that is put on `stream` from now on behind `fence`. Does not wait on the
    /// host, but for [`Stream::HOST`].
    ///
    /// # Errors
    /// `Unavailable` where the device fails.
    fn order(&self, stream: Stream, fence: &Fence) -> Result<()>;

    /// Takes a transfer, to be executed once every fence of `after` is reached. Bytes that do not
    /// belong to the moved tokens are not touched. The device keeps what it copies from and to
    /// alive until the fence.
    ///
    /// # Errors
    /// `Invalid` where a page id or token is out of range (nothing was moved); `Unavailable` where
    /// the device fails (some bytes may have moved).
    fn submit(&self, transfer: &Transfer<'_>, after: &[Fence]) -> Result<Submitted>;
}
