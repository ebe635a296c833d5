//! Warming: the prefixes that were used last come from disk into the host tier after opening, behind
//! everything that somebody asks for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use stemkv_store::ErrorKind;

use crate::index::{HotRecord, HotRun, Hottest};
use crate::pipeline::reader::{self, Arrival};
use crate::pipeline::{DiskSide, HashedPath, Priority, Shared};
use crate::stats::{Counter, Warming};

/// Bytes that are asked for at once: one read call. No more is under way when warming is to end.
const WINDOW_BYTES: u64 = 32 << 20;

/// The part of the host tier that stays free for saves and loads: one in so many bytes.
const RESERVE: u64 = 8;

/// How far warming is.
#[derive(Default)]
pub(crate) struct Warmer {
    warming: Mutex<Warming>,
    is_stopped: AtomicBool,
}

impl Warmer {
    pub(crate) fn warming(&self) -> Warming {
        *self.warming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, warming: Warming) {
        *self.warming.lock().unwrap_or_else(PoisonError::into_inner) = warming;
    }

    pub(crate) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Release);
    }
}

/// Begins to warm the host tier, where the configuration says so.
pub(crate) fn warm(shared: &Arc<Shared>) {
    let Some(disk) = &shared.disk else { return };
    if disk.config.warm_bytes == 0 {
        return;
    }
    disk.warmer.set(Warming::UnderWay);
    // Not held between two windows: a store that nobody has any more is not kept open for this.
    let store = Arc::downgrade(shared);
    shared.tasks.spawn(async move {
        let ended = run(&store).await;
        if let Some(shared) = store.upgrade()
            && let Some(disk) = &shared.disk
        {
            disk.warmer.set(ended);
            tracing::info!(?ended, "the host tier was warmed");
        }
    });
}

async fn run(store: &Weak<Shared>) -> Warming {
    let Some(mut hottest) = list(store).await else {
        return Warming::Stopped;
    };
    loop {
        let Some(shared) = store.upgrade() else {
            return Warming::Stopped;
        };
        let Some(disk) = &shared.disk else {
            return Warming::Stopped;
        };
        let Some(run) = hottest.next(&*disk.tier) else {
            return match hottest.is_cut() {
                true => Warming::Limit,
                false => Warming::Complete,
            };
        };
        if let Err(ended) = bring(&shared, disk, &mut hottest, run).await {
            return ended;
        }
    }
}

async fn list(store: &Weak<Shared>) -> Option<Hottest> {
    let shared = store.upgrade()?;
    let bytes = shared.disk.as_ref()?.config.warm_bytes;
    let index = shared.index.clone();
    let listed = shared.tasks.blocking(move || index.hottest(bytes));
    listed.await.ok()
}

/// Brings one run, window by window, as far as its records can be had. The error is why warming ends.
async fn bring(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    hottest: &mut Hottest,
    run: HotRun,
) -> Result<(), Warming> {
    let pin = Arc::new(run.pin);
    let path = HashedPath {
        root: run.namespace,
        flat: false,
        keys: run.keys.into(),
    };
    let mut rest = run.records.as_slice();
    while !rest.is_empty() {
        if shared.check_open().is_err() || disk.warmer.is_stopped.load(Ordering::Acquire) {
            return Err(Warming::Stopped);
        }
        let (window, behind) = rest.split_at(rest.len().min(window(shared)?));
        rest = behind;
        let wanted: Vec<_> = window
            .iter()
            .map(|record| (record.position, record.record))
            .collect();
        let tickets = reader::request(shared, disk, &pin, &path, &wanted, Priority::LOW);
        let mut missing = None;
        for (ticket, record) in tickets.iter().zip(window) {
            match ticket.arrival().await {
                Arrival::Ready(_) => {
                    shared.recorder.add(Counter::WarmedBlocks, 1);
                    shared
                        .recorder
                        .add(Counter::WarmedBytes, record.bytes as usize);
                }
                Arrival::Missing(kind) => {
                    hottest.give_back(record.bytes);
                    missing = missing.or(Some(kind));
                }
            }
        }
        let Some(kind) = missing else { continue };
        if kind == ErrorKind::Busy {
            return Err(Warming::NoRoom);
        }
        if disk.health.is_paused(shared.clock.now()) {
            return Err(Warming::DiskFailed);
        }
        // What is behind a gap is of no use.
        hottest.give_back(rest.iter().map(|record: &HotRecord| record.bytes).sum());
        return Ok(());
    }
    Ok(())
}

/// Records that may be asked for now without anything being evicted for them.
fn window(shared: &Shared) -> Result<usize, Warming> {
    let (usage, image) = (shared.arena.usage(), shared.config.image_bytes());
    let reserve = (usage.capacity_bytes as u64 / RESERVE).max(image);
    let room = (usage.free_bytes as u64).saturating_sub(reserve) / image;
    match room.min((WINDOW_BYTES / image).max(1)) {
        0 => Err(Warming::NoRoom),
        records => Ok(records as usize),
    }
}
