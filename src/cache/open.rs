//! A store is put together and opened: devices, tiers, the tree.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use stemkv_store::transfer::QueueLimits;
use stemkv_store::{
    Clock, CpuDevice, Device, DiskTier, HostArena, KvGeometry, RecordId, SystemClock, TransferQueue,
};
use tokio::runtime::Handle;

use super::Cache;
use crate::config::{Config, DiskConfig};
use crate::index::Index;
use crate::pipeline::{self, DeviceSide, DiskSide, Driven, Meter, Pace, Shared, Tasks};
use crate::stats::Stats;
use crate::{Error, Result};

/// What may wait for the device on each road, and how long a copy may take before the device is taken for dead.
const TRANSFER_LIMITS: QueueLimits = QueueLimits {
    jobs: 4096,
    fence_timeout: Duration::from_secs(30),
};

/// The devices that one store drives, at most.
const DEVICES_MAX: usize = 64;

/// Puts a [`Cache`] together: the configuration is plain data, what does the work comes here.
#[must_use = "a builder does nothing until it is opened"]
pub struct CacheBuilder {
    config: Config,
    devices: Option<Vec<Arc<dyn Device>>>,
    disk: Option<Arc<dyn DiskTier>>,
    clock: Option<Arc<dyn Clock>>,
    runtime: Option<Handle>,
    /// Only a simulation has it.
    inline: Option<Box<pipeline::Latency>>,
    progress: Box<dyn Fn(usize, usize) + Sync>,
}

impl CacheBuilder {
    pub(super) fn new(config: Config) -> CacheBuilder {
        CacheBuilder {
            config,
            devices: None,
            disk: None,
            clock: None,
            runtime: None,
            inline: None,
            progress: Box::new(|_, _| ()),
        }
    }

    /// Moves KV with this device instead of the CPU.
    pub fn device(self, device: Arc<dyn Device>) -> Self {
        self.devices([device])
    }

    /// Moves KV with several devices, one for each GPU say, over one host tier: see [`Cache::on_device`].
    /// A device's number is its place here. Each gets its own transfer threads and, with
    /// `config.device.capacity_bytes`, a device tier of so many bytes.
    pub fn devices(mut self, devices: impl IntoIterator<Item = Arc<dyn Device>>) -> Self {
        self.devices = Some(devices.into_iter().collect());
        self
    }

    /// Keeps KV in this disk tier instead of RocksDB at `config.disk.path`; the other settings of
    /// `config.disk` apply to it.
    pub fn disk(mut self, disk: Arc<dyn DiskTier>) -> Self {
        self.disk = Some(disk);
        self
    }

    /// Takes the time from here.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = Some(clock);
        self
    }

    /// Runs background work on this runtime (its timer enabled) instead of one of the store's own. Calls to the
    /// disk are blocking tasks there, and dropping a runtime waits for those: shut it down with
    /// `shutdown_timeout`, for one may hang in the kernel. When it has ended, what is in RAM is still saved and
    /// loaded, and the store can be closed.
    ///
    /// Methods that end in `_blocking` wait for what runs there: call them neither from the only thread that drives
    /// the runtime, nor from the last of its threads for blocking calls.
    pub fn runtime(mut self, runtime: Handle) -> Self {
        self.runtime = Some(runtime);
        self
    }

    /// Runs everything in the order of one thread, on this runtime: for simulations. A blocking
    /// call, to the disk say, takes as long as `latency` says of it.
    #[cfg(feature = "sim")]
    pub fn inline_on(
        mut self,
        runtime: Handle,
        latency: impl Fn() -> Duration + Send + Sync + 'static,
    ) -> Self {
        self.runtime = Some(runtime);
        self.inline = Some(Box::new(latency));
        self
    }

    /// Reports how much of the host tier is ready, as `(bytes, of bytes)`: tens of GiB take a while.
    pub fn progress(mut self, progress: impl Fn(usize, usize) + Sync + 'static) -> Self {
        self.progress = Box::new(progress);
        self
    }

    /// Opens the store.
    ///
    /// # Errors
    /// `Invalid` where the configuration is wrong, there is no device, one device twice or more than 64,
    /// the runtime has no timer, or the folder holds a store of another geometry or format (named; the store is not touched);
    /// `Busy` where another process has it open; `Unavailable` where memory, a device (named by its
    /// number) or disk cannot be had.
    pub fn open(self) -> Result<Cache> {
        self.config.validate()?;
        let geometry = &self.config.geometry;
        let devices = self
            .devices
            .unwrap_or_else(|| vec![Arc::new(CpuDevice::default())]);
        check_devices(&devices)?;
        let arena = HostArena::open(
            geometry,
            self.config.host.capacity_bytes as usize,
            &self.progress,
        )?;
        let clock = self
            .clock
            .unwrap_or_else(|| Arc::new(SystemClock::default()));
        let disk = match (&self.config.disk, self.disk) {
            (None, None) => None,
            (None, Some(_)) => {
                return Err(Error::invalid(
                    "a disk tier needs its settings: set config.disk",
                ));
            }
            (Some(config), Some(tier)) => Some(DiskSide::new(config.clone(), tier)),
            (Some(config), None) => Some(DiskSide::new(
                config.clone(),
                open_rocks(geometry, config, clock.clone())?,
            )),
        };
        attach(&devices, &arena, disk.as_ref())?;
        let drive = |(number, device): (usize, Arc<dyn Device>)| {
            let tier = match self.config.device.capacity_bytes {
                0 => None,
                bytes => Some(DeviceSide::new(device.arena(geometry, bytes)?)),
            };
            Ok(Arc::new(Driven {
                number,
                transfers: transfer_queue(device.clone(), clock.clone(), self.inline.is_some())?,
                device,
                tier,
                local: Meter::default(),
                link: Meter::default(),
                pace: Pace::default(),
            }))
        };
        let driven = devices.into_iter().enumerate().map(|(number, device)| {
            drive((number, device)).map_err(|error: Error| error.with("device", number))
        });
        let devices = driven.collect::<Result<Vec<Arc<Driven>>>>()?;
        let tasks = match (self.runtime, self.inline) {
            (None, _) => Tasks::own_runtime()?,
            #[cfg(feature = "sim")]
            (Some(runtime), Some(latency)) => Tasks::inline_on(runtime, latency),
            (Some(runtime), _) => Tasks::on(runtime)?,
        };
        let shared = Arc::new(Shared {
            index: Arc::new(Index::for_devices(clock.clone(), devices.len())),
            arena,
            devices,
            disk,
            recorder: Default::default(),
            disk_meter: Meter::default(),
            packing: Default::default(),
            clock,
            tasks,
            closed: AtomicBool::new(false),
            closing: Default::default(),
            config: self.config,
        });
        let on = shared.devices[0].clone();
        restore(&shared)?;
        pipeline::trim(&shared);
        pipeline::warm(&shared);
        Ok(Cache { shared, on })
    }
}

/// Builds the tree from the records on disk. Payloads are not read.
fn restore(shared: &Shared) -> Result<()> {
    let Some(disk) = &shared.disk else {
        return Ok(());
    };
    let mut records = Vec::with_capacity(disk.tier.usage().records as usize);
    let scan = disk.tier.scan(&mut |record| records.push(record))?;
    let unreachable: Vec<RecordId> = shared.index.restore(records);
    tracing::info!(
        records = scan.records,
        dropped = scan.dropped,
        unreachable = unreachable.len(),
        "the tree was built from the disk tier"
    );
    if unreachable.is_empty() {
        return Ok(());
    }
    // What leads to them may be read again tomorrow.
    if disk.tier.usage().unread_files > 0 {
        disk.removing.with_unread(unreachable);
        return Ok(());
    }
    // What cannot be removed now is met again at the next opening.
    if let Err(error) = disk.tier.remove(&unreachable) {
        tracing::warn!(%error, "records that cannot be reached could not be removed");
    }
    Ok(())
}

fn check_devices(devices: &[Arc<dyn Device>]) -> Result<()> {
    if devices.is_empty() || devices.len() > DEVICES_MAX {
        return Err(
            Error::invalid(format!("a store drives 1 to {DEVICES_MAX} devices"))
                .with("devices", devices.len()),
        );
    }
    for (number, device) in devices.iter().enumerate() {
        // By their addresses alone: of what kind they are does not matter.
        let is_same =
            |other: &Arc<dyn Device>| std::ptr::addr_eq(Arc::as_ptr(other), Arc::as_ptr(device));
        if let Some(first) = devices[..number].iter().position(is_same) {
            return Err(
                Error::invalid("one device was given twice: open it once for each place")
                    .with("device", number)
                    .with("first", first),
            );
        }
    }
    Ok(())
}

/// Attaches the devices, one after the other, each with what it measured at an earlier opening where that
/// was kept and still holds; keeps what it measures now.
fn attach(devices: &[Arc<dyn Device>], arena: &HostArena, disk: Option<&DiskSide>) -> Result<()> {
    let mut kept: Vec<(usize, String)> = Vec::new();
    if let Some(disk) = disk {
        disk.tier.scan_meta(&mut |key, value| {
            let number = Stats::calibrated_device(&key);
            let text = String::from_utf8(value.to_vec()).ok();
            if number.is_none() && key != Stats::META_KEY {
                disk.descriptions.found(key);
            }
            kept.extend(number.zip(text));
        })?;
    }
    for (number, device) in devices.iter().enumerate() {
        // What is its own may be kept under another number: the devices' order may have changed.
        kept.sort_by_key(|&(of, _)| (of != number, of));
        let recalled = kept.iter().find(|(_, text)| device.recall(text));
        if recalled.is_none() && !kept.is_empty() {
            tracing::info!(
                number,
                "what was measured of devices is of others, or their driver's"
            );
        }
        device
            .attach(arena)
            .map_err(|error| error.with("device", number))?;
        let measured = device.calibration();
        let own = kept.iter().find(|&&(of, _)| of == number);
        if let (Some(disk), Some(measured)) = (disk, measured)
            && own.map(|(_, text)| text) != Some(&measured)
            && let Err(error) = disk
                .tier
                .put_meta(&Stats::calibration_key(number), measured.as_bytes())
        {
            tracing::warn!(%error, number, "what was measured of a device could not be kept");
        }
    }
    // After the devices, which cannot do without locked memory.
    if let Some(disk) = disk {
        disk.tier.attach(arena);
    }
    Ok(())
}

fn transfer_queue(
    device: Arc<dyn Device>,
    clock: Arc<dyn Clock>,
    _inline: bool,
) -> Result<TransferQueue> {
    #[cfg(feature = "sim")]
    if _inline {
        return Ok(TransferQueue::inline(device, clock, TRANSFER_LIMITS));
    }
    TransferQueue::spawn(device, clock, TRANSFER_LIMITS)
}

#[cfg(feature = "rocksdb")]
fn open_rocks(
    geometry: &KvGeometry,
    config: &DiskConfig,
    clock: Arc<dyn Clock>,
) -> Result<Arc<dyn DiskTier>> {
    use stemkv_store::disk::RocksDisk;
    let disk = RocksDisk::open(&config.path, geometry, config.capacity_bytes, clock)?;
    Ok(Arc::new(disk))
}

#[cfg(not(feature = "rocksdb"))]
fn open_rocks(_: &KvGeometry, _: &DiskConfig, _: Arc<dyn Clock>) -> Result<Arc<dyn DiskTier>> {
    Err(Error::unavailable(
        "this build has no RocksDB: enable the feature `rocksdb`",
    ))
}
