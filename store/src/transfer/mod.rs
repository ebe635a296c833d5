//! Transfers: a device's threads take jobs and submit them layer by layer. There is one for each road:
//! loads over the link, saves over the link, and what stays within the device. Jobs on different roads
//! do not wait for each other.
//!
//! Rules of the queue:
//! - A job is the unit of cancellation. Cancelling takes effect between two layers; what was
//!   submitted is carried through, and the job's last event comes after it.
//! - Every job that was accepted ends with exactly one [`JobEvent::Done`], after which its pages
//!   and slots are no longer touched; also when it was cancelled or failed, and when the device or the
//!   transfer thread panics. A fence that does not arrive in time fails its job (see [`JobEvent::Done`]).
//! - On each road, what an engine waits for goes before what is for later, also between two layers.
//!   Of several jobs the one goes first that would have ended first, had each had the road to itself
//!   since it came: so a small load does not wait for the rest of a large one, equal ones end one after
//!   the other instead of all together at the end, and a job is overtaken only by what comes within
//!   the time that it takes itself. One whose `after` fences have not been reached holds nobody up,
//!   but for an encoded save on a GPU, which other saves wait for.
//! - A slab of a load that does not verify spoils its block and those behind it: the job goes on for
//!   the sake of those before.
//! - Each road is bounded: a job over its bound is refused (`Busy`), never waited for. Saves that wait for
//!   what the engine still computes cost no load its place.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::{Direction, EncodedSave, Error, Fence, LayerId, PageTable, SlabEntry, SlabMove};

mod plan;
mod queue;
mod worker;

pub use plan::{Piece, Pitch, Plan};
pub use queue::{QueueLimits, TransferQueue};

/// Some layers of some chunks, in one direction.
pub struct Job {
    /// Which way.
    pub direction: Direction,
    /// Which layers, ascending.
    pub layers: Range<u32>,
    /// The engine's side.
    pub table: PageTable,
    /// The store's side, in prompt order.
    pub moves: Vec<SlabMove>,
    /// Does somebody wait for it?
    pub urgency: Urgency,
    /// Tokens below this prompt position are left alone.
    pub from_token: u32,
    /// The save that it is a part of, where its slabs are to be stored encoded: the layers of all jobs
    /// of that save are submitted in ascending order, and once one of them is not coming, the jobs of
    /// later ones fail.
    pub encoded: Option<EncodedSave>,
    /// Fences to be reached before the first byte moves.
    pub after: Vec<Fence>,
    /// A job of which no layer was submitted by this time of the queue's clock is given up: it fails
    /// with `Busy` and moves nothing.
    pub begin_by: Option<Duration>,
    /// Where the events go. Called from the road's thread: must not block.
    pub events: Box<dyn FnMut(JobEvent) + Send>,
    /// Set to stop after the layer under way.
    pub cancelled: Arc<AtomicBool>,
}

/// Whether somebody waits for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Urgency {
    /// An engine does.
    #[default]
    Demand,
    /// Nobody yet: it moves chunks between the tiers ahead of their use.
    Later,
}

/// What a job reports.
pub enum JobEvent {
    /// The device takes its first layer, and its `after` fences are reached: from here on nothing but the
    /// transfers themselves takes time. Once at most; for a device that waits for fences itself, maybe
    /// behind the first [`JobEvent::Layer`] of a load.
    Begun,
    /// A load: the layer was submitted; order the engine's stream behind `fence` before it reads the
    /// layer. A device that looks at the bytes when it takes them has verified it; one that does so on
    /// their way says later whether they are right, so what is computed from the layer may be used
    /// only once the job is done without a failure.
    /// A save: the layer has *arrived* in the slots; `slabs` says where each move's slab is.
    Layer {
        /// Which layer.
        layer: LayerId,
        /// Reached when the bytes have arrived.
        fence: Fence,
        /// One for each move, with 0 bytes where an encoded slab did not fit; empty for loads, and for
        /// saves into the device tier whose checksums the device does not know.
        slabs: Vec<SlabEntry>,
    },
    /// The layer failed: of this transfer at most the first `good_moves` moves will be whole. Where that
    /// is none, or the device refused the layer because of the move behind them, the job reports no later
    /// layer; else it goes on, and what it reports of this and later layers is said of those moves alone.
    /// May come again with fewer. For a load, a layer that was
    /// reported may still fail while it is under way or when it has arrived.
    Failed {
        /// Which layer.
        layer: LayerId,
        /// Leading moves of which nothing is known to be wrong.
        good_moves: usize,
        /// Why.
        error: Error,
    },
    /// The last event.
    Done {
        /// Has every byte that was submitted arrived or failed? `false` where a fence did not arrive
        /// in time, the device or the transfer thread panicked, or the device failed and could not wait for what it had begun: a copy may still be running, so the job's slots are
        /// never used again, and its pages must not be either before the device is reset.
        settled: bool,
    },
}
