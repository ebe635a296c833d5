//! Warming: the prefixes that were used last come from disk into the host tier after opening, behind
//! everything that somebody asks for.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use stemkv_store::ErrorKind;

use crate::index::{HotRecord, HotRun, Hottest, Pin};
use crate::pipeline::reader::{self, Arrival, Ticket};
use crate::pipeline::{DiskSide, HashedPath, Priority, Shared};
use crate::stats::{Counter, Warming};

/// Bytes that are asked for at once: one read call.
const WINDOW_BYTES: u64 = 32 << 20;

/// Windows under way: while one is verified, the next is asked of the disk. No more is under way when
/// warming is to end. One read is left to whoever asks meanwhile.
const WINDOWS: usize = 2;

fn windows(disk: &DiskSide) -> usize {
    (disk.config.reads_in_flight - 1).clamp(1, WINDOWS)
}

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
    let mut under_way = UnderWay::default();
    loop {
        let Some(shared) = store.upgrade() else {
            return Warming::Stopped;
        };
        let Some(disk) = &shared.disk else {
            return Warming::Stopped;
        };
        let ended = match hottest.next(&*disk.tier) {
            Some(run) => bring(&shared, disk, &mut hottest, &mut under_way, run).await,
            None if hottest.is_cut() => Err(Warming::Limit),
            None => Err(Warming::Complete),
        };
        let Err(mut ended) = ended else { continue };
        // What has begun is carried through, and counted. The first that went wrong is why it ends.
        while let Some(settled) = under_way.settle(&shared, disk, &mut hottest).await {
            if let (Err(why), Warming::Complete | Warming::Limit) = (settled, ended) {
                ended = why;
            }
        }
        return ended;
    }
}

/// What was asked for and has not been waited for, oldest first.
#[derive(Default)]
struct UnderWay {
    windows: VecDeque<Window>,
    bytes: u64,
}

struct Window {
    /// Of the run that it is of: what the run's next windows stand or fall with.
    pin: Arc<Pin>,
    tickets: Vec<Ticket>,
    records: Vec<HotRecord>,
    bytes: u64,
}

impl UnderWay {
    /// Waits for the oldest window: its run, if something of it is missing. The error is why warming
    /// ends. `None` where nothing is under way.
    async fn settle(
        &mut self,
        shared: &Arc<Shared>,
        disk: &DiskSide,
        hottest: &mut Hottest,
    ) -> Option<Result<Option<Arc<Pin>>, Warming>> {
        let window = self.windows.pop_front()?;
        self.bytes -= window.bytes;
        let mut missing = None;
        for (ticket, record) in window.tickets.iter().zip(&window.records) {
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
        let Some(kind) = missing else {
            return Some(Ok(None));
        };
        if kind == ErrorKind::Busy {
            return Some(Err(Warming::NoRoom));
        }
        if disk.reads.is_paused(shared.clock.now()) || disk.reader.is_overdue() {
            return Some(Err(Warming::DiskFailed));
        }
        Some(Ok(Some(window.pin)))
    }
}

async fn list(store: &Weak<Shared>) -> Option<Hottest> {
    let shared = store.upgrade()?;
    let bytes = shared.disk.as_ref()?.config.warm_bytes;
    let index = shared.index.clone();
    let listed = shared.tasks.blocking(move || index.hottest(bytes));
    listed.await.ok()
}

/// Asks for one run, window by window, as far as its records can be had. The error is why warming ends.
async fn bring(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    hottest: &mut Hottest,
    under_way: &mut UnderWay,
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
        let room = window(shared, under_way.bytes);
        if under_way.windows.len() == windows(disk) || room == 0 {
            let settled = under_way.settle(shared, disk, hottest).await;
            let gap = settled.ok_or(Warming::NoRoom)??;
            if gap.is_some_and(|gap| Arc::ptr_eq(&gap, &pin)) {
                // What is behind a gap is of no use.
                hottest.give_back(rest.iter().map(|record| record.bytes).sum());
                return Ok(());
            }
            continue;
        }
        let (records, behind) = rest.split_at(rest.len().min(room));
        rest = behind;
        let wanted: Vec<_> = records
            .iter()
            .map(|record| (record.position, record.record))
            .collect();
        let bytes = records.len() as u64 * shared.config.image_bytes();
        under_way.bytes += bytes;
        under_way.windows.push_back(Window {
            tickets: reader::request(shared, disk, &pin, &path, &wanted, Priority::LOW),
            pin: pin.clone(),
            records: records.to_vec(),
            bytes,
        });
    }
    Ok(())
}

/// Records that may be asked for now without anything being evicted for them, where `asked` bytes may
/// have no slots yet.
fn window(shared: &Shared, asked: u64) -> usize {
    let (usage, image) = (shared.arena.usage(), shared.config.image_bytes());
    let reserve = (usage.capacity_bytes as u64 / RESERVE).max(image);
    let room = (usage.free_bytes as u64).saturating_sub(reserve + asked) / image;
    room.min((WINDOW_BYTES / image).max(1)) as usize
}
