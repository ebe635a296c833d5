//! Transfers: one thread for each device takes jobs and submits them layer by layer.
//!
//! Rules of the queue:
//! - A job is the unit of cancellation. Cancelling takes effect between two layers; what was
//!   submitted is carried through, and the job's last event comes after it.
//! - Every job ends with exactly one [`JobEvent::Done`], after which its pages and slots are no
//!   longer touched; also when it was cancelled, refused or failed.
//! - Loads go before saves; within a kind, first come first served.
//! - The queue is bounded: a job over the bound is refused (`Busy`), never waited for.

use crate::{Checksum, Direction, Fence, LayerId, PageTable, Result, SlabMove};
use std::ops::Range;

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
    pub cancelled: std::sync::Arc<std::sync::atomic::AtomicBool>,
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
        error: crate::Error,
    },
    /// The last event: every byte that was submitted has arrived or failed.
    Done,
}

/// The queue in front of one device.
#[derive(Clone)]
pub struct TransferQueue(());

impl TransferQueue {
    /// Hands a job over.
    ///
    /// # Errors
    /// `Busy` over the bound, `Closed` after close; the job's events are not called then.
    pub fn submit(&self, job: Job) -> Result<()> {
        let _ = job;
        unimplemented!()
    }
}
