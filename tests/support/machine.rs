//! What outlives a store's process: a disk, a clock, a device; and what is promised of a store that
//! nobody uses.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stemkv::{Cache, CacheBuilder, DiskConfig, OpenNamespace};
use stemkv_store::{Device, SimClock, SimDevice, SimDisk, SimDiskCall, SimMedium};
use tokio::runtime::Handle;

/// How a store's work is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As in production: a runtime, blocking threads and a transfer thread of its own.
    Threads,
    /// All in the order of one thread.
    Inline,
}

pub const MODES: [Mode; 2] = [Mode::Threads, Mode::Inline];

/// A simulated machine. A store on it can be closed, or lost, and opened again.
#[derive(Clone)]
pub struct Machine {
    pub mode: Mode,
    pub medium: SimMedium,
    pub clock: Arc<SimClock>,
    pub device: SimDevice,
    /// The devices behind that one.
    pub further: Vec<SimDevice>,
    /// Chunks that the host tier holds.
    pub host_chunks: u64,
    /// Chunks that the disk tier holds.
    pub disk_chunks: u64,
    pub disk: DiskConfig,
    /// Chunks that each device's tier holds; 0 for none.
    pub device_chunks: u64,
    /// What the engine says of its prefill, tokens a second.
    pub prefill: Option<f64>,
}

/// Bytes of a chunk with its header, in RAM and on disk.
pub const CHUNK: u64 = 8192;

/// Bytes of a chunk in the device tier: no header, nothing rounded up.
pub const DEVICE_CHUNK: u64 = 768;

impl Machine {
    pub fn new(mode: Mode, host_chunks: u64, disk_chunks: u64) -> Self {
        let mut disk = DiskConfig::new("simulated", 16 << 20);
        disk.batch_delay_ms = 0;
        disk.batch_bytes = 1 << 20;
        disk.queue_bytes = 1 << 20;
        Machine {
            mode,
            medium: SimMedium::default(),
            clock: Arc::default(),
            device: SimDevice::sound(),
            further: Vec::new(),
            host_chunks,
            disk_chunks,
            disk,
            device_chunks: 0,
            prefill: None,
        }
    }

    /// One with a device tier of so many chunks.
    pub fn with_device_tier(mode: Mode, device_chunks: u64, host_chunks: u64) -> Self {
        Machine {
            device_chunks,
            ..Machine::new(mode, host_chunks, 64)
        }
    }

    /// The same with another disk in it.
    pub fn with_medium(&self, medium: SimMedium) -> Self {
        Machine {
            medium,
            ..self.clone()
        }
    }

    /// Opens the store. From within a runtime, which an inline store then runs on.
    pub fn open(&self) -> (Cache, OpenNamespace) {
        let builder = match self.mode {
            Mode::Threads => self.builder(),
            Mode::Inline => self
                .builder()
                .inline_on(Handle::current(), || Duration::ZERO),
        };
        self.open_with(builder)
    }

    /// Opens the store as a builder of this machine says.
    pub fn open_with(&self, builder: CacheBuilder) -> (Cache, OpenNamespace) {
        let cache = builder.open().expect("a valid configuration");
        let namespace = cache
            .namespace(&super::namespace())
            .expect("the store's geometry");
        (cache, namespace)
    }

    /// What opens the store, with this machine's disk.
    pub fn builder(&self) -> CacheBuilder {
        self.builder_on(Arc::new(self.open_disk()))
    }

    /// This machine's disk, opened for one store.
    pub fn open_disk(&self) -> SimDisk {
        let bytes = self.disk_chunks * CHUNK;
        let geometry = super::geometry();
        SimDisk::open(&self.medium, &geometry, bytes, self.clock.clone())
            .expect("the disk is not open")
    }

    /// What opens the store on a disk that the test keeps a hand on.
    pub fn builder_on(&self, disk: Arc<SimDisk>) -> CacheBuilder {
        let mut config = super::config(self.host_chunks).with_disk(self.disk.clone());
        config.device.capacity_bytes = self.device_chunks * DEVICE_CHUNK;
        config.engine.prefill_tokens_per_second = self.prefill;
        let devices = std::iter::once(&self.device).chain(&self.further);
        let devices = devices.map(|device| Arc::new(device.clone()) as Arc<dyn Device>);
        Cache::builder(config)
            .devices(devices)
            .disk(disk)
            .clock(self.clock.clone())
    }

    /// Lets the pause after a failure of the disk pass.
    pub fn forgive(&self) {
        self.clock.advance(Duration::from_secs(60));
    }
}

/// Keeps the next call of one kind to a disk from being executed until the gate is dropped.
pub struct Gate {
    entered: Receiver<()>,
    /// Dropped, it lets everything through.
    _closed: Sender<()>,
}

impl Gate {
    pub fn close(medium: &SimMedium, kind: SimDiskCall) -> Self {
        let (enter, entered) = channel();
        let (closed, opened) = channel::<()>();
        let opened = Mutex::new(Some(opened));
        medium.on_call(move |call| {
            let take = |opened: &Mutex<Option<_>>| opened.lock().ok()?.take();
            if call == kind
                && let Some(opened) = take(&opened)
            {
                let _ = enter.send(());
                // Ends with an error once the gate has gone.
                let _: Result<(), _> = Receiver::recv(&opened);
            }
        });
        Gate {
            entered,
            _closed: closed,
        }
    }

    /// Has a call come to the gate since this was last asked?
    pub fn has_come(&self) -> bool {
        self.entered.try_recv().is_ok()
    }

    /// Waits until a call stands before the gate.
    pub fn wait(&self) {
        self.entered
            .recv_timeout(Duration::from_secs(20))
            .expect("a call comes to the gate");
    }
}

/// What is to end without anybody's help, for tests that would hang where it does not.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("it ends by itself")
}

/// Panics unless a store that nobody uses holds nothing: no pin, no pending block, no filling slot,
/// and no slot that is not a block's.
#[track_caller]
pub fn assert_balanced(cache: &Cache) {
    // Chunks may still be on their way into the device tier; nobody is told when they are there.
    let late = Instant::now() + Duration::from_secs(20);
    while cache.stats().device.is_some() && cache.stats().index.pins > 0 && Instant::now() < late {
        std::thread::yield_now();
    }
    cache.check();
    let stats = cache.stats();
    for device in &stats.devices {
        let Some(tier) = &device.tier else { continue };
        assert_eq!(tier.filling_bytes, 0, "{stats:?}");
        let published = device.blocks * DEVICE_CHUNK;
        assert_eq!(tier.published_bytes, published, "{stats:?}");
        let used = tier.filling_bytes + tier.published_bytes;
        assert_eq!(tier.free_bytes + used, tier.capacity_bytes);
    }
    assert_eq!(
        (
            stats.index.pins,
            stats.index.pending_blocks,
            stats.host.filling_bytes
        ),
        (0, 0, 0),
        "pins, pending blocks and filling bytes of {stats:?}"
    );
    assert_eq!(
        stats.host.published_bytes,
        stats.index.host_blocks * CHUNK,
        "every slot is a block's: {stats:?}"
    );
}
