//! What a caller may ask of a store.

mod namespace;
mod open;
mod stats;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

pub use namespace::OpenNamespace;
pub use open::CacheBuilder;
use stemkv_store::{PageTable, TransferQueue};

use crate::config::Config;
use crate::hash::HashPath;
use crate::index::{Ended, Matched, PendingWait};
use crate::lease::{Lease, PrefixMatch};
use crate::namespace::Namespace;
use crate::pipeline::{
    self, Closing, Driven, HashedPath, Load, LoadOptions, LookAhead, LookAheadLimits, Prefetch,
    PrefetchGoal, Save, Shared, Tasks, make_room,
};
use crate::stats::{Counter, Stage};
use crate::{Error, ErrorKind, Result};

/// How long a close waits for what is under way.
const CLOSE_LIMIT: Duration = Duration::from_secs(60);

/// How long it waits then for what is done last.
const LAST_LIMIT: Duration = Duration::from_secs(60);

/// How long a disk tier that could not be closed is left alone before it is tried again.
const CLOSE_AGAIN: Duration = Duration::from_secs(1);

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
        CacheBuilder::new(config)
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

    /// Opens a namespace. What describes it, the salt left out, is kept in the store with its first record, so
    /// that a miss can be explained later.
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
            pipeline::namespace_opened(&self.shared, disk, root, &description);
        }
        let block_tokens = self.shared.config.geometry.block_tokens;
        Ok(OpenNamespace::new(root, block_tokens, description))
    }

    /// How far a prompt's KV is in the store. No I/O, no pin, no effect on what is evicted. Where
    /// [`Cache::lease`] fails, it is nothing.
    pub fn match_prefix(&self, prompt: &mut dyn HashPath) -> PrefixMatch {
        let matched = match self.check_path(prompt) {
            Ok(()) => self.shared.index.match_prefix_on(self.on.number, prompt),
            Err(_) => Matched {
                ended: Ended::Unknown,
                ..Matched::default()
            },
        };
        PrefixMatch::new(&self.shared, &self.on, &matched, prompt.blocks())
    }

    /// Is the store open, and the prompt one for it?
    fn check_path(&self, prompt: &dyn HashPath) -> Result<()> {
        self.shared.check_open()?;
        self.shared.check_path(prompt)
    }

    /// Matches a prompt and pins what matched, in one acquisition of the index mutex. A miss is a
    /// lease of 0 tokens.
    ///
    /// # Errors
    /// `Invalid` where the prompt is in blocks of another length than the store's
    /// ([`HashPath::block_tokens`]), or has 2^32 tokens or more; `Closed`.
    #[tracing::instrument(level = "debug", skip_all)]
    pub fn lease(&self, prompt: &mut dyn HashPath) -> Result<Lease> {
        self.check_path(prompt)?;
        let begun = self.shared.clock.now();
        let asked = prompt.blocks();
        let (pin, matched) = self.shared.index.pin_on(self.on.number, prompt);
        let path = HashedPath {
            root: prompt.root(),
            flat: prompt.is_flat(),
            keys: prompt.hashed()[..pin.blocks()].into(),
        };
        let report = PrefixMatch::new(&self.shared, &self.on, &matched, asked);
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
    /// there are none, and where [`Cache::lease`] fails. After it, lease again. Nobody is forced to wait:
    /// computing on is as right.
    pub fn pending(&self, prompt: &mut dyn HashPath) -> Option<PendingWait> {
        self.check_path(prompt).ok()?;
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
    /// `Invalid` where the lease is of another store; `Closed`.
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
    /// `Invalid` where the lease is of another store, the page table does not cover the leased tokens or names
    /// a page that does not exist or that the device does not reach, where the pages have another geometry than the store (the
    /// difference is named), or `from_token` lies behind the lease; `Closed`.
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
    /// `Invalid` where the prompt is not one for [`Cache::lease`], or the page table does not cover its full
    /// blocks, or names pages that the device does not reach or that have another geometry than the store (the
    /// difference is named); `Closed`. A full store is no error: see [`SaveReport`](crate::SaveReport).
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

    /// Waits until every block published so far is durable or declined, and keeps the statistics of
    /// this moment in the store ([`Stats::META_KEY`](crate::Stats::META_KEY)). Blocks that were declined are
    /// written later, in the background, if there is room while they are in RAM; that is not waited for.
    ///
    /// # Cancel safety
    /// May be dropped; writing goes on.
    #[tracing::instrument(level = "debug", skip_all)]
    pub async fn flush(&self) {
        if let Some(disk) = &self.shared.disk {
            let flushing = pipeline::flush(&self.shared, disk).await;
            let cache = self.clone();
            // Without its runtime, or a thread, they are kept at the next flush or close, if there is one.
            let _ = self.shared.tasks.blocking(move || cache.keep_stats()).await;
            drop(flushing);
        }
    }

    /// [`Cache::flush`] for a thread.
    pub fn flush_blocking(&self) {
        pollster::block_on(self.flush());
    }

    /// Evicts cold records until `free_bytes` more could be written to disk, and gives their space
    /// back to the file system. Before the first of them, files that could not be read at opening are given
    /// up; none is where cleaning alone gives what was asked for.
    ///
    /// # Errors
    /// `Unavailable` without a disk tier, where the disk fails or where no thread can be had; `Closed`.
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
            let room = make_room(&self.shared, disk, free_bytes - free, free_bytes, &[]).await?;
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
            unread_files_dropped: before.unread_files.saturating_sub(after.unread_files),
            free_bytes: free,
        })
    }

    /// [`Cache::compact`] for a thread.
    ///
    /// # Errors
    /// As [`Cache::compact`].
    pub fn compact_blocking(&self, free_bytes: u64) -> Result<CompactReport> {
        pollster::block_on(self.compact(free_bytes))
    }

    /// Refuses new work, finishes what is under way, makes it durable and releases the folder. Every
    /// later call answers `Closed` or a miss. Another close waits as this one does, and is `Ok` once nothing hangs
    /// and the folder is released. What the disk tier declined and has not written since is not kept.
    ///
    /// # Errors
    /// `Unavailable` where the last sync failed, or something still hung after a minute, or what is done last
    /// (the last uses and counters are kept, the disk tier is closed) after a minute more, or another close for as
    /// long as both: the store is closed all the same. What hangs is named as far as it is known, and left to its
    /// thread; the folder is this process's until it ends, and is released then, in the background. Also where no
    /// thread can be had for what is done last: then the store refuses new work, and closing once more
    /// releases the folder.
    ///
    /// # Cancel safety
    /// Dropped, the store refuses new work but may keep its folder until it is closed again, or dropped.
    #[tracing::instrument(level = "debug", skip_all)]
    pub async fn close(&self) -> Result<()> {
        let shared = &self.shared;
        shared.closed.store(true, Ordering::Release);
        if let Some(disk) = &shared.disk {
            disk.writer.hurry();
        }
        let hung = |what: &str| {
            Error::unavailable("the store was closed while something still hung").with("what", what)
        };
        // Where the caller's runtime has ended, what is done last is done on one of the store's own.
        let of_its_own = match shared.tasks.have_ended().await {
            true => Some(Tasks::own_runtime()?),
            false => None,
        };
        let tasks = of_its_own.as_ref().unwrap_or(&shared.tasks);
        // One after the other: what one has ended, the next one finds so.
        let mut closing = match shared.closing.clone().try_lock_owned() {
            Ok(closing) => closing,
            Err(_) => {
                let first = shared.closing.clone().lock_owned();
                let first = tasks.within(CLOSE_LIMIT + LAST_LIMIT, first);
                first.await.ok_or_else(|| hung("another close"))?
            }
        };
        if *closing == Closing::Closed {
            return Ok(());
        }
        let idle = shared.tasks.idle(CLOSE_LIMIT).await;
        let last = self.clone();
        // After the first time the tier may be closed already.
        let is_first = *closing == Closing::Open;
        let closed = tasks.blocking_within(LAST_LIMIT, move || {
            let shared = &last.shared;
            // All are told before any is waited for.
            let queues = || shared.devices.iter().map(|on| &on.transfers);
            queues().for_each(TransferQueue::refuse);
            queues().for_each(TransferQueue::close);
            shared.disk.as_ref().map_or(Ok(()), |disk| {
                // A tier in which something hangs may hang here too.
                if idle && is_first {
                    shared.note_uses(disk);
                    last.keep_stats();
                }
                disk.tier.close()
            })
        });
        let closed = closed.await;
        *closing = match &closed {
            Ok(Some(Ok(()))) if idle => Closing::Closed,
            // No thread could be had for it, so all of it is still to be done.
            Err(error) if is_first && error.kind() == ErrorKind::Unavailable => Closing::Open,
            _ => Closing::Hanging,
        };
        if is_first
            && *closing == Closing::Hanging
            && !matches!(closed, Ok(Some(Ok(()))))
            && let Some(disk) = &shared.disk
        {
            let tier = Arc::downgrade(&disk.tier);
            let close = move || tier.upgrade().is_none_or(|tier| tier.close().is_ok());
            tasks.repeat(CLOSE_AGAIN, close);
        }
        match closed? {
            None => Err(hung("closing the devices' queues and the disk tier")),
            Some(Err(error)) => Err(error),
            Some(Ok(())) if !idle => Err(hung("a task")),
            Some(Ok(())) => Ok(()),
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
    /// Files that could not be read at opening and were given up for it.
    pub unread_files_dropped: u64,
    /// Bytes that can be written now without passing the capacity.
    pub free_bytes: u64,
}
