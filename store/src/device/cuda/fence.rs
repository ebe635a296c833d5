//! Fences of a CUDA device, and what they keep alive.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{hint, thread};

use super::driver::Event;
use crate::{FencePoint, Result, Transfer};

/// Waits shorter than this are polled without sleeping: a slice of a load ends within it.
const SPIN: Duration = Duration::from_micros(200);
const NAP: Duration = Duration::from_micros(50);

/// An event, and the transfer whose slots, pages and descriptors are in use before it. Clones are
/// the same point.
#[derive(Clone)]
pub(super) struct CudaFence(Arc<Inner>);

struct Inner {
    event: Event,
    /// Given up as soon as somebody sees that the event is reached. The device has a clone of the
    /// fence, so a caller that leaks or drops its own frees nothing too early.
    held: Mutex<Option<Transfer>>,
}

impl CudaFence {
    pub(super) fn new(event: Event, held: Option<Transfer>) -> CudaFence {
        CudaFence(Arc::new(Inner {
            event,
            held: Mutex::new(held),
        }))
    }

    pub(super) fn event(&self) -> &Event {
        &self.0.event
    }
}

impl FencePoint for CudaFence {
    fn is_reached(&self) -> Result<bool> {
        // An error is one of the whole context: the driver runs nothing in it any more.
        let reached = self.0.event.is_reached();
        if !matches!(reached, Ok(false)) {
            let held = {
                let mut held = self.0.held.lock().unwrap_or_else(PoisonError::into_inner);
                held.take()
            };
            drop(held);
        }
        reached
    }

    fn wait(&self, timeout: Duration) -> Result<bool> {
        poll(timeout, || self.is_reached())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Asks until the answer is yes; `false` after `timeout`.
pub(super) fn poll(timeout: Duration, mut ask: impl FnMut() -> Result<bool>) -> Result<bool> {
    let start = Instant::now();
    loop {
        if ask()? {
            return Ok(true);
        }
        let waited = start.elapsed();
        if waited >= timeout {
            return Ok(false);
        }
        if waited < SPIN {
            for _ in 0..64 {
                hint::spin_loop();
            }
        } else {
            thread::sleep(NAP.min(timeout - waited));
        }
    }
}
