//! Transfers: one thread for each device takes jobs and submits them layer by layer.
//!
//! Rules of the queue:
//! - A job is the unit of cancellation. Cancelling takes effect between two layers; what was
//!   submitted is carried through, and the job's last event comes after it.
//! - Every job that was accepted ends with exactly one [`JobEvent::Done`], after which its pages
//!   and slots are no longer touched; also when it was cancelled or failed, and when the device
//!   panics. A fence that does not arrive in time fails its job (see [`JobEvent::Done`]).
//! - Loads go before saves; within a kind, first come first served.
//! - The queue is bounded: a job over the bound is refused (`Busy`), never waited for.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::{
    Checksum, Clock, Device, Direction, Error, Fence, LayerId, PageTable, Result, SlabMove,
};

mod plan;

pub use plan::{Piece, Pitch, Plan};

/// Some layers of some chunks, in one direction.
pub struct Job {
    /// Which way.
    pub direction: Direction,
    /// Which layers, ascending.
    pub layers: Range<u32>,
    /// The engine's side.
    pub table: PageTable,
    /// The host's side, in prompt order.
    pub moves: Vec<SlabMove>,
    /// Tokens below this prompt position are left alone.
    pub from_token: u32,
    /// Fences to be reached before the first byte moves.
    pub after: Vec<Fence>,
    /// Where the events go. Called from the transfer thread: must not block.
    pub events: Box<dyn FnMut(JobEvent) + Send>,
    /// Set to stop after the layer under way.
    pub cancelled: Arc<AtomicBool>,
}

/// What a job reports.
pub enum JobEvent {
    /// A load: the layer was submitted (and is verified where the device verifies); order the
    /// engine's stream behind `fence` before it reads the layer.
    /// A save: the layer has *arrived* in the slots, with these checksums, one for each move.
    Layer {
        /// Which layer.
        layer: LayerId,
        /// Reached when the bytes have arrived.
        fence: Fence,
        /// One for each move; empty for loads.
        checksums: Vec<Checksum>,
    },
    /// The layer failed, and no later layer of the job was moved. `good_moves` leading moves of
    /// this layer are whole.
    Failed {
        /// Which layer.
        layer: LayerId,
        /// Leading moves that verified.
        good_moves: usize,
        /// Why.
        error: Error,
    },
    /// The last event.
    Done {
        /// Has every byte that was submitted arrived or failed? `false` where a fence did not arrive
        /// in time or the device panicked: a copy may still be running, so the job's slots are
        /// never used again, and its pages must not be either before the device is reset.
        settled: bool,
    },
}

/// The bounds of a [`TransferQueue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// Jobs that are accepted and not done.
    pub jobs: usize,
    /// How long a layer may take from its submission to its fence.
    pub fence_timeout: Duration,
}

/// The queue in front of one device.
#[derive(Clone)]
pub struct TransferQueue(());

impl TransferQueue {
    /// Starts the device's transfer thread.
    ///
    /// # Errors
    /// `Unavailable` where the system gives no thread.
    pub fn spawn(
        device: Arc<dyn Device>,
        clock: Arc<dyn Clock>,
        limits: QueueLimits,
    ) -> Result<TransferQueue> {
        let _ = (device, clock, limits);
        unimplemented!()
    }

    /// A queue without a thread, for simulations: jobs run in the thread that submits them.
    #[cfg(any(test, feature = "sim"))]
    pub fn inline(
        device: Arc<dyn Device>,
        clock: Arc<dyn Clock>,
        limits: QueueLimits,
    ) -> TransferQueue {
        let _ = (device, clock, limits);
        unimplemented!()
    }

    /// Hands a job over.
    ///
    /// # Errors
    /// `Invalid` where the job does not fit together (see [`crate::Transfer::new`]), `Busy` over the bound,
    /// `Closed` after close; the job's events are not called then.
    pub fn submit(&self, job: Job) -> Result<()> {
        let _ = job;
        unimplemented!()
    }

    /// Finishes the jobs that have begun, ends the others (`Done` alone), and returns when the
    /// transfer thread has ended. From within an event it does not wait.
    pub fn close(&self) {
        unimplemented!()
    }
}
