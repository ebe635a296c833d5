use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use stemkv_store::transfer::QueueLimits;
use stemkv_store::{
    Clock, CpuDevice, Device, DiskTier, DiskUsage, HostArena, Key, PageTable, RecordId,
    SystemClock, Tier, TransferQueue,
};
use tokio::runtime::Handle;

use crate::config::Config;
use crate::hash::{HashPath, Prompt};
use crate::index::{Index, Matched, PendingWait};
use crate::lease::{Lease, PrefixMatch};
use crate::namespace::{Namespace, NamespaceDescription};
use crate::pipeline::{
    self, DeviceSide, DiskSide, Driven, HashedPath, Load, LoadOptions, LookAhead, LookAheadLimits,
    Meter, Pace, Prefetch, PrefetchGoal, Save, Shared, Tasks, make_room,
};
use crate::stats::{Counter, DeviceStats, DiskStats, Stage, Stats, TierStats, TreeStats};
use crate::{Error, Result};

/// What may wait for the device, and how long a copy may take before the device is taken for dead.
const TRANSFER_LIMITS: QueueLimits = QueueLimits {
    jobs: 4096,
    fence_timeout: Duration::from_secs(30),
};

/// The devices that one store drives, at most.
const DEVICES_MAX: usize = 64;

/// How long a close waits for what is under way.
const CLOSE_LIMIT: Duration = Duration::from_secs(60);

/// The store. Clones are the same store.
///
/// Every method is safe to call from any thread, takes no longer than the index mutex and the
/// hashing of its prompt unless it is `async` or says `blocking`, and fails open: what cannot be
/// had is a miss.
///
/// Dropped without [`Cache::close`], a store finishes what it has begun in the background.
///
/// A store may drive several devices ([`CacheBuilder::devices`]): host tier, disk and tree are one, and what
/// was saved from one device's pages is loaded into another's. A `Cache` acts for one of them, at first for
/// device 0: its pages are what it saves and loads, and what it has in its own tier is what matches count as
/// `device_tokens` and prefetches bring there. [`Cache::on_device`] gives the same store for another one.
#[derive(Clone)]
pub struct Cache {
    shared: Arc<Shared>,
    /// The device that this handle acts for.
    on: Arc<Driven>,
}

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

    /// Runs background work on this runtime (its timer enabled) instead of one of the store's own.
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
    /// or the folder holds a store of another geometry or format (named; the store is not touched);
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
            (Some(runtime), _) => Tasks::on(runtime),
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
            config: self.config,
        });
        let on = shared.devices[0].clone();
        let cache = Cache { shared, on };
        cache.restore()?;
        pipeline::warm(&cache.shared);
        Ok(cache)
    }
}

impl Cache {
    /// Opens a store on the CPU, with RocksDB where `config.disk` is set. See
    /// [`CacheBuilder::open`], also for the errors.
    ///
    /// # Errors
    /// As [`CacheBuilder::open`].
    pub fn open(config: Config) -> Result<Cache> {
        Self::builder(config).open()
    }

    /// A store with a device, clock, disk tier or runtime of the caller's.
    pub fn builder(config: Config) -> CacheBuilder {
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

    /// The same store, acting for the device with this number, from 0 on in the order of
    /// [`CacheBuilder::devices`]. A lease, being of the store, serves loads on any of them.
    ///
    /// # Errors
    /// `Invalid` where the store drives no such device.
    pub fn on_device(&self, number: usize) -> Result<Cache> {
        let Some(on) = self.shared.devices.get(number) else {
            return Err(Error::invalid("the store drives no such device")
                .with("device", number)
                .with("devices", self.shared.devices.len()));
        };
        Ok(Cache {
            shared: self.shared.clone(),
            on: on.clone(),
        })
    }

    /// The number of the device that this handle acts for.
    pub fn device(&self) -> usize {
        self.on.number
    }

    /// The configuration it was opened with.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// Opens a namespace. What describes it, the salt left out, is kept in the store, so that a miss
    /// can be explained later.
    ///
    /// # Errors
    /// `Invalid` where its fields are wrong, or its geometry is not the store's (the difference is
    /// named).
    pub fn namespace(&self, namespace: &Namespace) -> Result<OpenNamespace> {
        self.shared.check_open()?;
        namespace.validate()?;
        let difference = namespace.geometry.difference(&self.shared.config.geometry);
        if !difference.is_empty() {
            return Err(Error::invalid(format!(
                "the namespace has another geometry than the store: {}",
                difference.join("; ")
            )));
        }
        let description = namespace.describe();
        let root = namespace.root();
        if let Some(disk) = &self.shared.disk {
            let text = serde_json::to_vec(&description).expect("plain data can be written as JSON");
            // A namespace that cannot be described only makes a later miss harder to explain.
            if let Err(error) = disk.tier.put_meta(&root, &text) {
                tracing::warn!(%error, "a namespace's description could not be kept");
            }
        }
        Ok(OpenNamespace {
            root,
            block_tokens: self.shared.config.geometry.block_tokens,
            description,
        })
    }

    /// How far a prompt's KV is in the store. No I/O, no pin, no effect on what is evicted.
    pub fn match_prefix(&self, prompt: &mut dyn HashPath) -> PrefixMatch {
        let matched = self.shared.index.match_prefix_on(self.on.number, prompt);
        self.report(&matched, prompt.blocks())
    }

    /// Matches a prompt and pins what matched, in one acquisition of the index mutex. A miss is a
    /// lease of 0 tokens.
    ///
    /// # Errors
    /// `Closed`.
    #[tracing::instrument(level = "debug", skip_all)]
    pub fn lease(&self, prompt: &mut dyn HashPath) -> Result<Lease> {
        self.shared.check_open()?;
        let begun = self.shared.clock.now();
        let asked = prompt.blocks();
        let (pin, matched) = self.shared.index.pin_on(self.on.number, prompt);
        let path = HashedPath {
            root: prompt.root(),
            flat: prompt.is_flat(),
            keys: prompt.hashed()[..pin.blocks()].into(),
        };
        let report = self.report(&matched, asked);
        let recorder = &self.shared.recorder;
        recorder.add(Counter::Leases, 1);
        recorder.add(Counter::LeaseTokensAsked, report.tokens_asked);
        recorder.add(Counter::LeaseTokensMatched, report.tokens);
        recorder.time(
            Stage::Lease,
            self.shared.clock.now().saturating_sub(begun),
            0,
        );
        Ok(Lease {
            pin: Arc::new(pin),
            path,
            matched: report,
        })
    }

    /// A wait for the saves in flight right behind a prompt's match (a *delayed hit*); `None` where
    /// there are none. After it, lease again. Nobody is forced to wait: computing on is as right.
    pub fn pending(&self, prompt: &mut dyn HashPath) -> Option<PendingWait> {
        let matched = self.shared.index.match_prefix(prompt);
        let last = (matched.blocks + matched.pending_blocks).checked_sub(1)?;
        match matched.pending_blocks {
            0 => None,
            _ => self.shared.index.wait_pending(prompt, last),
        }
    }

    /// Brings what the lease covers from disk into the host tier, and where the goal says so into the
    /// device tier, ahead of a load. Best effort.
    ///
    /// # Errors
    /// `Closed`.
    #[tracing::instrument(level = "debug", skip_all)]
    pub fn prefetch(&self, lease: &Lease, goal: PrefetchGoal) -> Result<Prefetch> {
        pipeline::prefetch(&self.shared, &self.on, &lease.pin, &lease.path, goal)
    }

    /// A queue of the engine's waiting requests, to be prefetched in their order: see [`LookAhead`].
    pub fn look_ahead(&self, limits: LookAheadLimits) -> LookAhead {
        LookAhead::new(self.shared.clone(), self.on.clone(), limits)
    }

    /// Begins to copy what the lease covers into the engine's pages, layer by layer. Returns at
    /// once; what is on disk alone is fetched first, in the background.
    ///
    /// # Errors
    /// `Invalid` where the page table does not cover the leased tokens or names a page that does not
    /// exist or that the device does not reach, or `from_token` lies behind the lease; `Closed`.
    #[tracing::instrument(level = "debug", skip_all)]
    pub fn load(&self, lease: &Lease, table: PageTable, options: LoadOptions) -> Result<Load> {
        pipeline::load(
            &self.shared,
            &self.on,
            &lease.pin,
            &lease.path,
            table,
            options,
        )
    }

    /// Begins to save the KV of a prompt's full blocks from the engine's pages: those that no tier
    /// has and no other save is bringing. Returns at once. The caller hands the layers over as it
    /// writes them.
    ///
    /// # Errors
    /// `Invalid` where the page table does not cover the prompt's full blocks, or names pages that the
    /// device does not reach; `Closed`. A full store is no error: see [`SaveReport`](crate::SaveReport).
    #[tracing::instrument(level = "debug", skip_all)]
    pub fn save(&self, prompt: &mut dyn HashPath, table: PageTable) -> Result<Save> {
        pipeline::save(&self.shared, &self.on, prompt, table)
    }

    /// Ends the warming that `disk.warm_bytes` began; reads under way, two at most, are finished.
    /// Does not wait.
    /// Without one under way nothing happens.
    pub fn stop_warming(&self) {
        if let Some(disk) = &self.shared.disk {
            disk.warmer.stop();
        }
    }

    /// State and counts since opening.
    pub fn stats(&self) -> Stats {
        let shared = &self.shared;
        // Before the tiers that it brings chunks into: who sees that warming has ended sees all of it.
        let disk = shared.disk.as_ref().map(|disk| disk_stats(shared, disk));
        let usage = shared.arena.usage();
        let blocks = shared.index.device_blocks();
        let devices = shared.devices.iter().zip(blocks);
        let devices: Vec<DeviceStats> = devices
            .map(|(on, blocks)| device_stats(shared, on, blocks))
            .collect();
        Stats {
            unix_ms: shared.clock.unix_ms(),
            index: tree_stats(&shared.index),
            device: devices
                .iter()
                .filter_map(|device| device.tier.clone())
                .reduce(TierStats::plus),
            host: TierStats {
                capacity_bytes: usage.capacity_bytes as u64,
                free_bytes: usage.free_bytes as u64,
                filling_bytes: usage.filling_bytes as u64,
                published_bytes: usage.published_bytes as u64,
                raw_bytes: pipeline::raw_bytes(shared),
            },
            codec: pipeline::packing_stats(shared, &shared.devices[0]),
            devices,
            disk,
            counters: shared.recorder.counters(),
            stages: shared.recorder.stages(),
        }
    }

    /// Waits until every block published so far is durable or declined, and keeps the statistics of
    /// this moment in the store ([`Stats::META_KEY`]).
    ///
    /// # Cancel safety
    /// May be dropped; writing goes on.
    #[tracing::instrument(level = "debug", skip_all)]
    pub async fn flush(&self) {
        if let Some(disk) = &self.shared.disk {
            disk.writer.flush().await;
            let cache = self.clone();
            // It stops only with the runtime, and then there is nobody to tell.
            let _ = self.shared.tasks.blocking(move || cache.keep_stats()).await;
        }
    }

    /// Keeps the statistics in the store, for `stemkv stats` to show. Best effort.
    fn keep_stats(&self) {
        let Some(disk) = &self.shared.disk else {
            return;
        };
        let text = serde_json::to_vec(&self.stats()).expect("plain data can be written as JSON");
        if let Err(error) = disk.tier.put_meta(&Stats::META_KEY, &text) {
            tracing::warn!(%error, "the statistics could not be kept");
        }
    }

    /// [`Cache::flush`] for a thread.
    pub fn flush_blocking(&self) {
        pollster::block_on(self.flush());
    }

    /// Evicts cold records until `free_bytes` more could be written to disk, and gives their space
    /// back to the file system.
    ///
    /// # Errors
    /// `Unavailable` without a disk tier or where the disk fails; `Closed`.
    ///
    /// # Cancel safety
    /// May be dropped; the step under way is finished.
    #[tracing::instrument(level = "debug", skip_all)]
    pub async fn compact(&self, free_bytes: u64) -> Result<CompactReport> {
        self.shared.check_open()?;
        let Some(disk) = &self.shared.disk else {
            return Err(Error::unavailable("the store has no disk tier"));
        };
        let before = disk.tier.usage();
        let tier = disk.tier.clone();
        let mut free = self
            .shared
            .tasks
            .blocking(move || tier.reclaim(free_bytes))
            .await??;
        while free < free_bytes {
            let room = make_room(&self.shared, disk, free_bytes - free, free_bytes).await?;
            // What is left is leased, or more was asked for than there is.
            let is_stuck = room.evicted == 0 && room.free_bytes <= free;
            free = room.free_bytes;
            if is_stuck {
                break;
            }
        }
        let after = disk.tier.usage();
        Ok(CompactReport {
            used_bytes_before: before.used_bytes,
            used_bytes_after: after.used_bytes,
            records_evicted: before.records.saturating_sub(after.records),
            free_bytes: free,
        })
    }

    /// Refuses new work, finishes what is under way, makes it durable and releases the folder. Every
    /// later call answers `Closed` or a miss.
    ///
    /// # Errors
    /// `Unavailable` where the last sync failed, or something still hung after a minute; the store
    /// is closed all the same.
    ///
    /// # Cancel safety
    /// Dropped, the store refuses new work but may keep its folder until it is dropped.
    #[tracing::instrument(level = "debug", skip_all)]
    pub async fn close(&self) -> Result<()> {
        if self.shared.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let shared = &self.shared;
        if let Some(disk) = &shared.disk {
            disk.writer.hurry();
        }
        let idle = shared.tasks.idle(CLOSE_LIMIT).await;
        let last = self.clone();
        let closed = shared.tasks.blocking(move || {
            let shared = &last.shared;
            // All are told before any is waited for.
            let queues = || shared.devices.iter().map(|on| &on.transfers);
            queues().for_each(TransferQueue::refuse);
            queues().for_each(TransferQueue::close);
            shared.disk.as_ref().map_or(Ok(()), |disk| {
                shared.note_uses(disk);
                last.keep_stats();
                disk.tier.close()
            })
        });
        closed.await??;
        match idle {
            true => Ok(()),
            false => Err(Error::unavailable(
                "the store was closed while something still hung",
            )),
        }
    }

    /// [`Cache::close`] for a thread.
    ///
    /// # Errors
    /// As [`Cache::close`].
    pub fn close_blocking(&self) -> Result<()> {
        pollster::block_on(self.close())
    }

    /// Goes on with copies whose fences may have been reached meanwhile: a store that runs inline has
    /// no thread that does.
    #[cfg(feature = "sim")]
    pub fn turn(&self) {
        let devices = self.shared.devices.iter();
        devices.for_each(|on| on.transfers.turn());
    }

    /// Panics where the index's structure or the host tier's books do not hold. For tests: it looks
    /// at every block.
    #[cfg(feature = "sim")]
    pub fn check(&self) {
        self.shared.index.check();
        // Asserts that free + filling + published = capacity.
        self.shared.arena.usage();
    }

    /// Builds the tree from the records on disk. Payloads are not read.
    fn restore(&self) -> Result<()> {
        let Some(disk) = &self.shared.disk else {
            return Ok(());
        };
        let mut records = Vec::with_capacity(disk.tier.usage().records as usize);
        let scan = disk.tier.scan(&mut |record| records.push(record))?;
        let unreachable: Vec<RecordId> = self.shared.index.restore(records);
        tracing::info!(
            records = scan.records,
            dropped = scan.dropped,
            unreachable = unreachable.len(),
            "the tree was built from the disk tier"
        );
        // What cannot be removed now is met again at the next opening.
        if !unreachable.is_empty()
            && let Err(error) = disk.tier.remove(&unreachable)
        {
            tracing::warn!(%error, "records that cannot be reached could not be removed");
        }
        Ok(())
    }

    fn report(&self, matched: &Matched, asked_blocks: usize) -> PrefixMatch {
        let shared = &self.shared;
        let block_tokens = shared.config.geometry.block_tokens as usize;
        let mut report = PrefixMatch::new(matched, asked_blocks, block_tokens);
        let token_bytes = shared.config.image_bytes() as f64 / block_tokens as f64;
        let seconds = |tokens: usize, meter: &Meter| match tokens {
            0 => Some(0.0),
            _ => meter
                .bytes_per_second()
                .map(|rate| tokens as f64 * token_bytes / rate),
        };
        let link = seconds(report.tokens - report.device_tokens, &self.on.link);
        let local = seconds(report.device_tokens, &self.on.local);
        let copy = link.zip(local).map(|(link, local)| link.max(local));
        let read = seconds(report.disk_tokens, &shared.disk_meter);
        // The stages overlap, so the slower one decides.
        report.load_seconds = copy.zip(read).map(|(copy, read)| copy.max(read));
        let rate = shared.config.engine.prefill_tokens_per_second;
        report.recompute_seconds = rate.map(|rate| report.tokens as f64 / rate);
        report
    }
}

fn tree_stats(index: &Index) -> TreeStats {
    let stats = index.stats();
    TreeStats {
        blocks: (stats.total.blocks - stats.total.pending_blocks - stats.total.hole_blocks) as u64,
        device_blocks: stats.total.tier_blocks(Tier::Device) as u64,
        host_blocks: stats.total.tier_blocks(Tier::Host) as u64,
        disk_blocks: stats.total.tier_blocks(Tier::Disk) as u64,
        pending_blocks: stats.total.pending_blocks as u64,
        holes: stats.total.hole_blocks as u64,
        nodes: stats.runs as u64,
        pins: stats.pins as u64,
    }
}

fn disk_stats(shared: &Shared, disk: &DiskSide) -> DiskStats {
    let usage: DiskUsage = disk.tier.usage();
    DiskStats {
        capacity_bytes: usage.capacity_bytes,
        used_bytes: usage.used_bytes,
        live_bytes: usage.live_bytes,
        records: usage.records,
        files: usage.files,
        written_bytes: usage.written_bytes,
        rewritten_bytes: usage.rewritten_bytes,
        queued_bytes: disk.writer.queued_bytes(),
        codec: crate::pipeline::codec_choice(shared, disk).1,
        paused: [&disk.reads, &disk.writes].map(|health| health.is_paused(shared.clock.now()))
            != [false; 2],
        warming: disk.warmer.warming(),
    }
}

fn device_stats(shared: &Shared, on: &Driven, blocks: usize) -> DeviceStats {
    let codec = pipeline::packing_stats(shared, on);
    DeviceStats {
        name: on.device.info().name,
        tier: on.tier.as_ref().map(|tier| {
            let usage = tier.arena.usage();
            TierStats {
                capacity_bytes: usage.capacity_bytes,
                free_bytes: usage.free_bytes,
                filling_bytes: usage.filling_bytes,
                published_bytes: usage.published_bytes,
                raw_bytes: usage.published_bytes,
            }
        }),
        blocks: blocks as u64,
        save: codec.save,
        load: codec.load,
        link_bytes_per_second: on.link.bytes_per_second(),
    }
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
    geometry: &stemkv_store::KvGeometry,
    config: &crate::DiskConfig,
    clock: Arc<dyn Clock>,
) -> Result<Arc<dyn DiskTier>> {
    use stemkv_store::disk::RocksDisk;
    let disk = RocksDisk::open(&config.path, geometry, config.capacity_bytes, clock)?;
    Ok(Arc::new(disk))
}

#[cfg(not(feature = "rocksdb"))]
fn open_rocks(
    _: &stemkv_store::KvGeometry,
    _: &crate::DiskConfig,
    _: Arc<dyn Clock>,
) -> Result<Arc<dyn DiskTier>> {
    Err(Error::unavailable(
        "this build has no RocksDB: enable the feature `rocksdb`",
    ))
}

/// What a [`Cache::compact`] did.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct CompactReport {
    /// Real bytes on disk before.
    pub used_bytes_before: u64,
    /// Real bytes on disk after.
    pub used_bytes_after: u64,
    /// Records that were evicted for it.
    pub records_evicted: u64,
    /// Bytes that can be written now without passing the capacity.
    pub free_bytes: u64,
}

/// A namespace of an open store: makes prompts.
#[derive(Clone, Debug)]
pub struct OpenNamespace {
    root: Key,
    block_tokens: u32,
    description: NamespaceDescription,
}

impl OpenNamespace {
    /// The namespace root.
    pub fn root(&self) -> Key {
        self.root
    }

    /// The namespace in words, without its salt.
    pub fn description(&self) -> &NamespaceDescription {
        &self.description
    }

    /// A prompt of tokens. Its hashes are computed once, as far as they are needed.
    pub fn prompt<'a>(&self, tokens: &'a [u32]) -> Prompt<'a> {
        Prompt::tokens(self.root, self.block_tokens, tokens)
    }

    /// A prompt of keys that the engine supplies, each the child of the one before it: one key a
    /// block, 1 to 128 bytes each.
    ///
    /// # Errors
    /// `Invalid` for a key of another length.
    pub fn chained_keys<'a>(&self, keys: Vec<&'a [u8]>) -> Result<Prompt<'a>> {
        Prompt::chained(self.root, keys)
    }

    /// Keys that the engine supplies without their chain: each stands for itself.
    ///
    /// # Errors
    /// `Invalid` for a key that does not have 1 to 128 bytes.
    pub fn flat_keys<'a>(&self, keys: Vec<&'a [u8]>) -> Result<Prompt<'a>> {
        Prompt::flat(self.root, keys)
    }
}
