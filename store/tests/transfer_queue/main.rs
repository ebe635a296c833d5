//! The rules of the transfer queue: every accepted job ends exactly once, whatever the device does,
//! and holds its slots no longer than it must, and no shorter.
//!
//! Most run on an inline queue over the simulated device: no threads and no time but the test's own,
//! so each shows an exact order of events. `Log::finish` checks that `Done` came once and last.

#![cfg(feature = "sim")]

#[path = "../device_suite/mod.rs"]
mod device_suite;
mod encoded;
mod ends;
mod faults;
mod order;

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use device_suite::jobs::{Log, job, limits, load_job};
use device_suite::moves::save;
use device_suite::pages::{Layout, Pages};
use device_suite::*;
use stemkv_store::transfer::QueueLimits;
use stemkv_store::*;

const LAYERS: u32 = 4;

const TIMEOUT: Duration = Duration::from_secs(5);

/// A queue over a device, pages with random bytes, and an arena of four slots.
struct Bench {
    clock: Arc<SimClock>,
    queue: TransferQueue,
    arena: HostArena,
    pages: Pages,
    table: Vec<PageId>,
}

impl Bench {
    fn new(device: impl Device, jobs: usize) -> Self {
        Self::over(Arc::new(device), jobs)
    }

    fn over(device: Arc<dyn Device>, jobs: usize) -> Self {
        Self::timed(device, jobs, Arc::default())
    }

    fn timed(device: Arc<dyn Device>, jobs: usize, clock: Arc<SimClock>) -> Self {
        let geometry = KvGeometry::gqa(LAYERS, 2, 16, Dtype::Bf16, 8).expect("valid");
        let subject = Subject {
            device: Arc::clone(&device),
            allocate: &|bytes| Arc::new(HostMemory::new(bytes)),
        };
        let pages = Pages::new(&subject, &geometry, Layout::Nhd, 4, 8);
        let bytes = Random(1).bytes(pages.memory.read().len());
        pages.memory.write(&bytes);
        let limits = QueueLimits {
            jobs,
            fence_timeout: TIMEOUT,
        };
        Bench {
            queue: TransferQueue::inline(device, clock.clone(), limits),
            clock,
            arena: arena(&geometry, 4),
            pages,
            table: (0..8).map(PageId).collect(),
        }
    }

    /// Sealed slots for the blocks at positions 0, 8, …, saved by the CPU.
    fn slots(&self, count: usize) -> Vec<Slot> {
        save(
            &CpuDevice::new(),
            &self.arena,
            &self.pages,
            &self.table,
            &Self::at(count),
        )
    }

    fn at(count: usize) -> Vec<usize> {
        (0..count).map(|block| block * 8).collect()
    }

    fn load(&self, slots: &[Slot], log: &Arc<Log>) -> Job {
        load_job(
            slots,
            &self.pages,
            &self.table,
            &Self::at(slots.len()),
            0,
            log,
        )
    }

    fn save(&self, fillings: &[Filling], log: &Arc<Log>) -> Job {
        let moves = fillings.iter().zip(Self::at(fillings.len()));
        let moves = moves.map(|(filling, token)| SlabMove::Save {
            slot: filling.writer(),
            token: token as u32,
        });
        job(
            Direction::Save,
            &self.pages,
            &self.table,
            moves.collect(),
            0,
            log,
        )
    }

    fn fillings(&self, count: usize) -> Vec<Filling> {
        let bytes = self.pages.geometry.payload_bytes();
        self.arena.allocate(bytes, count).expect("room")
    }

    fn is_empty(&self) -> bool {
        let usage = self.arena.usage();
        usage.free_bytes == usage.capacity_bytes
    }
}

/// A fence that the test reaches.
#[derive(Clone, Default)]
struct Gate(Arc<AtomicBool>);

impl FencePoint for Gate {
    fn is_reached(&self) -> Result<bool> {
        Ok(self.0.load(Ordering::SeqCst))
    }
    fn wait(&self, _: Duration) -> Result<bool> {
        self.is_reached()
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Lines of a job of which layer `bad` fails.
fn up_to(bad: u64, failed: &str, end: &str) -> Vec<String> {
    let layers = (0..bad).map(|layer| format!("layer {layer}"));
    let failed = format!("failed {bad} after {failed}");
    layers
        .chain([failed, format!("done, settled {end}")])
        .collect()
}

/// A device that compares a load's sums on the way, as a GPU does: it moves the bytes at once, and
/// says behind the fence which move of which layer is wrong.
struct Compares {
    wrong: (LayerId, usize),
    fence: Gate,
}

impl Device for Compares {
    fn info(&self) -> DeviceInfo {
        CpuDevice::new().info()
    }
    fn attach(&self, _: &HostArena) -> Result<()> {
        Ok(())
    }
    fn record(&self, stream: Stream) -> Result<Fence> {
        CpuDevice::new().record(stream)
    }
    fn order(&self, stream: Stream, fence: &Fence) -> Result<()> {
        CpuDevice::new().order(stream, fence)
    }
    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted> {
        CpuDevice::new().submit(transfer, layer, after)?;
        let first_wrong = (layer == self.wrong.0).then_some(self.wrong.1);
        Ok(Submitted {
            fence: Fence::new(self.fence.clone()),
            sums: SlabSums::Compared(Box::new(move || Ok(first_wrong))),
        })
    }
}
