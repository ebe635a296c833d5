//! Copies that stay within the GPU: between the device tier's slots and an engine's pages.
//!
//! One kernel for some layers, on a stream of its own, so that it waits for no load over the link. GPU
//! memory is read once and written once: there is nothing to stage.

use std::collections::VecDeque;
use std::mem;
use std::ops::Range;
use std::time::Duration;

use super::driver::{Event, OwnStream};
use super::fence::CudaFence;
use super::kernels::LAYERS_MAX;
use super::lane::{Shared, drain, order, settle};
use super::prepared::Prepared;
use crate::{DeviceArena, Direction, Error, Fence, FencePoint, Result, Transfer};

/// Blocks of a kernel for each multiprocessor: enough bytes under way to fill the memory's pipes.
const BLOCKS_PER_PROCESSOR: u32 = 4;
/// Bytes of a launch, about: a few tens of microseconds, against a few for the launch itself.
const LAUNCH_BYTES: u64 = 32 << 20;

/// One direction.
pub(super) struct Local {
    direction: Direction,
    stream: OwnStream,
    blocks: u32,
    in_flight: VecDeque<CudaFence>,
}

impl Local {
    pub(super) fn new(
        shared: &Shared,
        direction: Direction,
        priority: i32,
        processors: u32,
    ) -> Result<Local> {
        Ok(Local {
            direction,
            stream: OwnStream::new(&shared.context, priority)?,
            blocks: processors.max(1) * BLOCKS_PER_PROCESSOR,
            in_flight: VecDeque::new(),
        })
    }

    /// Puts some layers of a transfer on the stream. Does not wait.
    pub(super) fn submit(
        &mut self,
        shared: &Shared,
        arena: &DeviceArena,
        transfer: &Transfer,
        layers: Range<u32>,
        after: &[Fence],
    ) -> Result<CudaFence> {
        self.in_flight
            .retain(|fence| matches!(fence.is_reached(), Ok(false)));
        let event = self
            .enqueue(shared, arena, transfer, layers, after)
            .inspect_err(|_| settle([&self.stream], transfer))?;
        let fence = CudaFence::new(event, Some(transfer.clone()));
        self.in_flight.push_back(fence.clone());
        Ok(fence)
    }

    fn enqueue(
        &self,
        shared: &Shared,
        arena: &DeviceArena,
        transfer: &Transfer,
        layers: Range<u32>,
        after: &[Fence],
    ) -> Result<Event> {
        for fence in after {
            order(self.stream.as_stream(), fence)?;
        }
        let prepared =
            transfer.prepared(|| Prepared::new(shared, transfer, &self.stream, 0, false))?;
        if prepared.device != shared.id {
            return Err(Error::invalid(
                "a transfer is executed by the device that took its first layer",
            ));
        }
        let mut next = layers.start;
        while next < layers.end && !prepared.is_empty() {
            let end = layers.end.min(next + LAYERS_MAX as u32);
            let moves = 0..transfer.moves().len();
            let mut job = prepared.job(transfer, &moves, &(next..end))?;
            job.slab_base = arena.base() + u64::from(next) * job.layer_step;
            // SAFETY: the pages are valid by `PagedKv::register`'s promises, and the plan lies within
            // them; the slots lie within the arena's memory, and the fence of this submission keeps
            // them and the descriptors, which this stream uploaded. `width` divides what the job
            // names; the arena starts on more than the widest one.
            unsafe {
                shared.kernels.launch(
                    &self.stream,
                    self.direction,
                    &job,
                    end - next,
                    self.blocks,
                )?;
            }
            next = end;
        }
        shared.events.record(self.stream.as_stream())
    }

    /// Waits until nothing is under way; `false` after `timeout`.
    pub(super) fn drain(&mut self, timeout: Duration) -> bool {
        drain([&self.stream], mem::take(&mut self.in_flight), timeout)
    }
}

/// How many layers of `bytes` each to put into one launch.
pub(super) fn layers_at_once(bytes: u64, layers: u32) -> u32 {
    let enough = LAUNCH_BYTES.div_ceil(bytes.max(1));
    (enough.min(LAYERS_MAX as u64) as u32).min(layers.max(1))
}
