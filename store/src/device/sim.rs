//! A device that fails as it is told.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use super::*;

/// What goes wrong with one submitted layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimDeviceFault {
    /// [`Device::submit`] answers `Unavailable`; nothing moves.
    Submit,
    /// As `Submit`, but the device does not know whether bytes still move
    /// ([`Transfer::mark_unsettled`]).
    Stuck,
    /// [`Device::submit`] panics.
    Panic,
    /// The fence answers `Unavailable` instead of being reached; nothing moves.
    Fence,
    /// The fence is never reached.
    Never,
    /// The last move arrives damaged: its checksum is another, and a save's slot has a flipped bit.
    Corrupt,
}

/// Copies like the CPU, but asynchronously: a layer moves when its `after` fences are reached and
/// the device is not held, in order for each direction. Checksums come after the fence, or not at
/// all. Deterministic: what happens depends on the calls alone.
#[derive(Clone)]
pub struct SimDevice(Arc<Sim>);

struct Sim {
    sums: bool,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    script: Box<dyn FnMut(u64) -> Option<SimDeviceFault> + Send>,
    submitted: u64,
    held: bool,
    waiting: VecDeque<Op>,
    /// In which a layer is being moved, by whichever thread looked first.
    moving: Vec<Direction>,
    trace: Vec<String>,
}

struct Op {
    number: u64,
    transfer: Transfer,
    layer: LayerId,
    after: Vec<Fence>,
    fault: Option<SimDeviceFault>,
    answer: Arc<OnceLock<Option<cpu::Copied>>>,
}

impl SimDevice {
    /// A device that sums what it moves (`sums`) or not, and asks `script` what goes wrong with the
    /// n-th layer submitted, from 0.
    pub fn new(
        sums: bool,
        script: impl FnMut(u64) -> Option<SimDeviceFault> + Send + 'static,
    ) -> Self {
        SimDevice(Arc::new(Sim {
            sums,
            state: Mutex::new(State {
                script: Box::new(script),
                submitted: 0,
                held: false,
                waiting: VecDeque::new(),
                moving: Vec::new(),
                trace: Vec::new(),
            }),
            changed: Condvar::new(),
        }))
    }

    /// A device without faults that sums what it moves.
    pub fn sound() -> Self {
        Self::new(true, |_| None)
    }

    /// Keeps layers that are submitted from now on from moving, and their fences from being
    /// reached, until [`SimDevice::release`].
    pub fn hold(&self) {
        self.0.lock().held = true;
    }

    /// Moves what was held.
    pub fn release(&self) {
        self.0.lock().held = false;
        self.0.advance();
    }

    /// What the device did, one line an event.
    pub fn trace(&self) -> Vec<String> {
        self.0.lock().trace.clone()
    }
}

impl fmt::Debug for SimDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDevice").finish_non_exhaustive()
    }
}

impl Device for SimDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            name: "sim".into(),
            blocking: false,
            on_cpu: false,
        }
    }

    fn attach(&self, _: &HostArena) -> Result<()> {
        Ok(())
    }

    fn arena(&self, geometry: &KvGeometry, capacity_bytes: u64) -> Result<DeviceArena> {
        CpuDevice::new().arena(geometry, capacity_bytes)
    }

    fn record(&self, stream: Stream) -> Result<Fence> {
        CpuDevice::new().record(stream)
    }

    fn order(&self, stream: Stream, fence: &Fence) -> Result<()> {
        CpuDevice::new().order(stream, fence)
    }

    fn decodes(&self, _: CodecId) -> bool {
        true
    }

    fn encodes(&self, codec: CodecId) -> bool {
        codec != CodecId::Raw
    }

    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted> {
        transfer.check_layer(layer)?;
        let answer = Arc::new(OnceLock::new());
        {
            let mut state = self.0.lock();
            let number = state.submitted;
            state.submitted += 1;
            let fault = (state.script)(number);
            let note = match fault {
                Some(fault) => format!(", to fail: {fault:?}"),
                None => String::new(),
            };
            let (direction, moves) = (transfer.direction(), transfer.moves().len());
            let line = format!("{number} {direction:?} layer {layer}, {moves} moves{note}");
            state.trace.push(line);
            match fault {
                Some(fault @ (SimDeviceFault::Submit | SimDeviceFault::Stuck)) => {
                    if fault == SimDeviceFault::Stuck {
                        transfer.mark_unsettled();
                    }
                    return Err(
                        Error::unavailable("the simulated device refuses").with("number", number)
                    );
                }
                Some(SimDeviceFault::Panic) => {
                    drop(state);
                    panic!("the simulated device panics");
                }
                _ => {}
            }
            state.waiting.push_back(Op {
                number,
                transfer: transfer.clone(),
                layer,
                after: after.to_vec(),
                fault,
                answer: Arc::clone(&answer),
            });
        }
        self.0.advance();
        // Whoever decodes a slab knows whether it is one.
        let decodes = transfer.moves().iter().any(|slab_move| match slab_move {
            SlabMove::Load { slot, .. } => slot.codec() != CodecId::Raw,
            _ => false,
        });
        let early = || Error::internal("sums were asked for before the fence");
        let asked = Arc::clone(&answer);
        let sums = match (transfer.encoded(), self.0.sums) {
            (Some(_), _) => SlabSums::Stored(Box::new(move || match asked.get() {
                Some(Some(cpu::Copied::Stored(slabs))) => Ok(slabs.clone()),
                _ => Err(early()),
            })),
            (None, false) if !decodes => SlabSums::Unknown,
            (None, _) => SlabSums::AfterFence(Box::new(move || match asked.get() {
                Some(Some(cpu::Copied::Summed(sums))) => Ok(sums.clone()),
                _ => Err(early()),
            })),
        };
        let fence = Fence::new(SimFence {
            sim: Arc::clone(&self.0),
            answer,
        });
        Ok(Submitted { fence, sums })
    }
}

impl Sim {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves every layer that can move.
    fn advance(&self) {
        while let Some(op) = self.next() {
            let answer = match op.fault {
                Some(SimDeviceFault::Fence) => None,
                fault => cpu::copy_layer(&op.transfer, op.layer)
                    .ok()
                    .map(|copied| match fault {
                        Some(SimDeviceFault::Corrupt) => corrupted(&op, copied),
                        _ => copied,
                    }),
            };
            let outcome = if answer.is_some() {
                "arrived"
            } else {
                "failed"
            };
            let (number, direction) = (op.number, op.transfer.direction());
            let reached = Arc::clone(&op.answer);
            // Before the fence, so that whoever sees it finds the slots let go.
            drop(op);
            let mut state = self.lock();
            state.trace.push(format!("{number} {outcome}"));
            let first = reached.set(answer).is_ok();
            debug_assert!(first, "an operation runs once");
            state.moving.retain(|&moving| moving != direction);
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Takes the first layer that can move: in order for each direction.
    fn next(&self) -> Option<Op> {
        let mut state = self.lock();
        if state.held {
            return None;
        }
        let mut blocked = state.moving.clone();
        let index = state.waiting.iter().position(|op| {
            let direction = op.transfer.direction();
            let ready = op.fault != Some(SimDeviceFault::Never)
                && !blocked.contains(&direction)
                && op.after.iter().all(|fence| {
                    let point = fence.point();
                    let own = point.as_any().downcast_ref::<SimFence>();
                    match own {
                        Some(own) => own.answer.get().is_some(),
                        None => point.is_reached().unwrap_or(true),
                    }
                });
            if !ready && op.fault != Some(SimDeviceFault::Never) {
                blocked.push(direction);
            }
            ready
        })?;
        let op = state.waiting.remove(index)?;
        state.moving.push(op.transfer.direction());
        Some(op)
    }
}

/// The last move of a layer is damaged where it arrived, and so is what is said of it.
fn corrupted(op: &Op, mut copied: cpu::Copied) -> cpu::Copied {
    let start = match &copied {
        cpu::Copied::Stored(slabs) => slabs.last().map(|slab| slab.offset as usize),
        cpu::Copied::Summed(_) => None,
    };
    match (op.transfer.moves().last(), start) {
        (Some(SlabMove::Save { slot, .. }), Some(start)) => {
            slot.write_from(start, |room| room[0] ^= 1);
        }
        (Some(SlabMove::Save { slot, .. }), None) => {
            slot.write_slab(op.layer, |slab| slab[0] ^= 1);
        }
        (Some(SlabMove::SaveDevice { slot, .. }), _) => {
            slot.write_slab(op.layer, |slab| slab[0] ^= 1);
        }
        _ => {}
    }
    let sum = match &mut copied {
        cpu::Copied::Summed(sums) => sums.last_mut(),
        cpu::Copied::Stored(slabs) => slabs.last_mut().map(|slab| &mut slab.checksum),
    };
    if let Some(sum) = sum {
        sum.0 ^= 1;
    }
    copied
}

struct SimFence {
    sim: Arc<Sim>,
    answer: Arc<OnceLock<Option<cpu::Copied>>>,
}

impl FencePoint for SimFence {
    fn is_reached(&self) -> Result<bool> {
        self.sim.advance();
        match self.answer.get() {
            None => Ok(false),
            Some(Some(_)) => Ok(true),
            Some(None) => Err(Error::unavailable(
                "the simulated device failed before the fence",
            )),
        }
    }

    fn wait(&self, timeout: Duration) -> Result<bool> {
        self.sim.advance();
        let state = self.sim.lock();
        let waiting = |_: &mut State| self.answer.get().is_none();
        drop(
            self.sim
                .changed
                .wait_timeout_while(state, timeout, waiting)
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.is_reached()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
