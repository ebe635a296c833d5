//! The pipelines: save (pages → host → disk), load and prefetch (disk → host → pages), and between
//! pages and host the device tier.
//!
//! ```text
//!            save.rs                     writer.rs
//! pages ──── transfer queue ──→ host ──── batches ──→ disk
//!  ↑ ↑│                          │ ↑                   │
//!  │ └┼───── transfer queue ─────┘ └── single flight ──┘
//!  │  │      load/               │       reader.rs  (load/, prefetch.rs ask)
//!  │  ↓                          ↓
//!  └─ device tier ←── transfer queue, device/
//! ```
//!
//! There are a transfer queue and a device tier for each device that the store drives, on one host tier and
//! one disk. What concerns a device takes a [`Driven`] beside the [`Shared`].
//!
//! Rules, in words first:
//!
//! - **Nothing waits on the engine's thread.** `load`, `save` and `prefetch` take the index mutex,
//!   cut slots, hand jobs over and return. What has to wait is awaited in a task of the store's own
//!   runtime, or by the engine when it asks for a layer.
//! - **Unit of cancellation.** A load or prefetch is cancelled as a whole, by its handle: dropped or
//!   told so. The handle carries the token; every stage looks at it before it begins a piece (a
//!   layer of a transfer, a run of disk reads). A piece that has begun is carried through: that is
//!   the point of no return.
//! - **A cancelled load gives its pages back late, a cancelled prefetch keeps what arrived.** Pages
//!   are free after the last transfer that was submitted ([`PagesFree`]).
//! - **A save** can be cancelled until its last layer is handed over; from then on it completes in
//!   the background whether or not somebody holds its handle.
//! - **Single flight.** One record is read once at a time, whoever asks; a flight is given up when
//!   nobody is interested any more and it has not begun.
//! - **Bounds.** The host arena bounds slots, the transfer queue bounds jobs, the write queue is
//!   bounded in bytes, disk reads in number. Over a bound the answer is *declined*, at once.
//! - **Devices do not wait for each other**, but for a load of what only another one has. One that fails
//!   fails its own jobs.
//! - **Balance.** Pins, slots and counters are RAII: whatever future is dropped wherever, they come
//!   back when the last piece that uses them is done.

mod coding;
mod describing;
mod device;
mod landing;
mod load;
mod look_ahead;
mod meter;
mod pace;
mod packing;
mod prefetch;
mod reader;
mod removing;
mod save;
mod tasks;
mod warm;
mod writer;

pub(crate) use coding::choice as codec_choice;
pub(crate) use describing::opened as namespace_opened;
pub(crate) use device::{DeviceSide, Driven};
pub(crate) use load::load;
pub use load::{Extent, Load, LoadOptions, LoadReport};
pub use look_ahead::{LookAhead, LookAheadLimits, LookAheadReport};
pub(crate) use meter::Meter;
pub(crate) use pace::Pace;
pub(crate) use packing::{raw_bytes, stats as packing_stats};
pub(crate) use prefetch::prefetch;
pub use prefetch::{Prefetch, PrefetchGoal, PrefetchReport};
pub(crate) use save::save;
pub use save::{Durability, Save, SaveReport};
pub(crate) use tasks::{Latency, Tasks};
pub(crate) use warm::warm;
pub(crate) use writer::{flush, make_room, trim};

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use stemkv_store::{
    Clock, CodecId, DiskTier, Filling, HostArena, Key, PagedKv, RecordHeader, Slot, SlotId,
};
use tokio::sync::watch;

use crate::config::{Config, DiskConfig};
use crate::hash::HashPath;
use crate::index::{Evicted, Index, Pin, Pool};
use crate::placement::Costs;
use crate::stats::{Counter, Recorder};
use crate::{Error, Result};

/// Of the slots that are missing, one chunk in so many is evicted for them at a time: it frees no more than its
/// own length and the pieces beside it, each shorter than a slot.
const PART: usize = 4;
/// Rounds of eviction after which one chunk more goes in each.
const PATIENCE: usize = 8;

/// What comes first where work waits: higher first. Loads come before every prefetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Priority(pub u8);

impl Priority {
    /// For what may be needed later.
    pub const LOW: Priority = Priority(0);
    /// For what is next in the waiting queue.
    pub const NORMAL: Priority = Priority(100);
    /// The highest of a prefetch.
    pub const HIGH: Priority = Priority(254);
    /// Of loads.
    pub(crate) const DEMAND: Priority = Priority(255);
}

/// How far closing a store came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Closing {
    #[default]
    Open,
    /// Something did not end in time.
    Hanging,
    /// Nothing is under way, and the folder is released.
    Closed,
}

/// Everything the pipelines share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) index: Arc<Index>,
    pub(crate) arena: HostArena,
    /// By their numbers; at least one.
    pub(crate) devices: Vec<Arc<Driven>>,
    pub(crate) disk: Option<DiskSide>,
    pub(crate) recorder: Recorder,
    /// How fast chunks come from disk.
    pub(crate) disk_meter: Meter,
    pub(crate) packing: packing::Packing,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) tasks: Tasks,
    pub(crate) closed: AtomicBool,
    /// How far closes came; held by the one that is under way.
    pub(crate) closing: Arc<tokio::sync::Mutex<Closing>>,
}

/// The disk tier with what stands before it.
pub(crate) struct DiskSide {
    pub(crate) config: DiskConfig,
    pub(crate) tier: Arc<dyn DiskTier>,
    /// Apart: a disk that is full or read-only may be read.
    pub(crate) reads: Health,
    pub(crate) writes: Health,
    pub(crate) removing: removing::Removing,
    pub(crate) reader: reader::Reader,
    pub(crate) writer: writer::Writer,
    pub(crate) coding: coding::Coding,
    pub(crate) descriptions: describing::Descriptions,
    pub(crate) warmer: warm::Warmer,
}

impl DiskSide {
    pub(crate) fn new(config: DiskConfig, tier: Arc<dyn DiskTier>) -> Self {
        DiskSide {
            config,
            tier,
            reads: Health::default(),
            writes: Health::default(),
            removing: removing::Removing::default(),
            reader: reader::Reader::default(),
            writer: writer::Writer::default(),
            coding: coding::Coding::default(),
            descriptions: describing::Descriptions::default(),
            warmer: warm::Warmer::default(),
        }
    }
}

impl Shared {
    pub(crate) fn check_open(&self) -> Result<()> {
        match self.closed.load(Ordering::Acquire) {
            true => Err(Error::closed()),
            false => Ok(()),
        }
    }

    /// Is it a path in this store's blocks, of no more tokens than a transfer counts?
    pub(crate) fn check_path(&self, path: &dyn HashPath) -> Result<()> {
        let own = self.config.geometry.block_tokens;
        if let Some(others) = path.block_tokens().filter(|&tokens| tokens != own) {
            return Err(Error::invalid(
                "the prompt is in blocks of another length: it is of another store's namespace",
            )
            .with("block_tokens", others)
            .with("of_the_store", own));
        }
        let blocks = path.blocks();
        if blocks > (u32::MAX / own) as usize {
            return Err(Error::invalid("a prompt has less than 2^32 tokens")
                .with("blocks", blocks)
                .with("block_tokens", own));
        }
        Ok(())
    }

    /// Is it a pin of this store's blocks?
    pub(crate) fn check_lease(&self, pin: &Pin) -> Result<()> {
        match pin.is_of(&self.index) {
            true => Ok(()),
            false => Err(Error::invalid("the lease is of another store")),
        }
    }

    /// Are they pages for this store's chunks that the device reaches?
    pub(crate) fn check_pages(&self, on: &Driven, pages: &PagedKv) -> Result<()> {
        let difference = pages.geometry().difference(&self.config.geometry);
        if !difference.is_empty() {
            return Err(Error::invalid(format!(
                "the pages have another geometry than the store: {}",
                difference.join("; ")
            )));
        }
        on.device.check_pages(pages)
    }

    /// Do all devices decode it? What is in the host tier or on disk is for any of them.
    pub(crate) fn decodes(&self, codec: CodecId) -> bool {
        self.devices.iter().all(|on| on.device.decodes(codec))
    }

    /// What a decision for a device goes by at this moment.
    pub(crate) fn costs(&self, on: &Driven) -> Costs {
        let now = self.clock.now();
        let mut disk_speed = self.disk_meter.speed(now);
        if let Some(disk) = &self.disk {
            let chunks = disk.reader.chunks_ahead(Priority::DEMAND);
            disk_speed.queued_bytes = chunks as u64 * self.config.image_bytes();
        }
        Costs {
            device: on.local.speed(now),
            host: on.link.speed(now),
            disk: disk_speed,
            block_bytes: self.config.image_bytes(),
            block_tokens: self.config.geometry.block_tokens as usize,
            prefill_tokens_per_second: self.config.engine.prefill_tokens_per_second,
        }
    }

    /// Cuts up to `count` slots for raw chunks, evicting cold chunks for them. Fewer where what is
    /// left is leased or in use.
    pub(crate) fn allocate(&self, count: usize) -> Vec<Filling> {
        self.allocate_slots(self.config.geometry.payload_bytes(), count)
    }

    /// As [`Shared::allocate`], of slots with so many bytes of payload.
    pub(crate) fn allocate_slots(&self, payload: usize, count: usize) -> Vec<Filling> {
        if let Some(fillings) = self.arena.allocate(payload, count) {
            return fillings;
        }
        let wanted = count as u64 * (RecordHeader::BYTES + payload) as u64;
        for round in 0.. {
            let missing = count - self.arena.room(payload, count);
            if missing == 0 {
                break;
            }
            // As many as it takes at least: were every free piece of use and each chunk as long as a raw one,
            // or a part of those that are missing. And more and more, so that free pieces that are too short
            // for a slot end the loop, too, after few rounds.
            let short = wanted.saturating_sub(self.arena.free_bytes() as u64);
            let needed = short.div_ceil(self.config.image_bytes()) as usize;
            let part = missing / PART;
            let few = 1 + round / PATIENCE;
            let evicted = self.index.evict(Pool::Host, needed.max(part).max(few));
            if evicted.is_empty() {
                break;
            }
            self.release_evicted(&evicted);
        }
        // Others may have been faster.
        loop {
            match self.arena.room(payload, count) {
                0 => return Vec::new(),
                room => match self.arena.allocate(payload, room) {
                    Some(fillings) => return fillings,
                    None => continue,
                },
            }
        }
    }

    /// Cuts slots for images of so many bytes, in order, until there is no room for one. Raw chunks
    /// of one call are consecutive where they can be.
    pub(crate) fn allocate_images(&self, bytes: impl Iterator<Item = u64> + Clone) -> Vec<Filling> {
        if bytes
            .clone()
            .all(|bytes| bytes >= self.config.image_bytes())
        {
            return self.allocate(bytes.count());
        }
        let mut fillings = Vec::new();
        'images: for bytes in bytes {
            let payload = (bytes as usize).saturating_sub(RecordHeader::BYTES);
            loop {
                if let Some(more) = self.arena.allocate(payload, 1) {
                    fillings.extend(more);
                    break;
                }
                let evicted = self.index.evict(Pool::Host, 1);
                if evicted.is_empty() {
                    break 'images;
                }
                self.release_evicted(&evicted);
            }
        }
        fillings
    }

    /// Gives back what eviction took out of the host tier.
    fn release_evicted(&self, evicted: &[Evicted]) {
        let slots: Vec<SlotId> = evicted.iter().filter_map(|evicted| evicted.host).collect();
        self.recorder.add(Counter::EvictedHost, slots.len());
        if !slots.is_empty() {
            self.packing.evicted(self.clock.now());
        }
        self.arena.release_all(slots);
    }

    /// A handle to the slot that the index names for `key`; `None` where the slot has gone or holds
    /// another chunk by now (the block was lost between the two looks).
    pub(crate) fn slot(&self, id: SlotId, key: &Key) -> Option<Slot> {
        self.arena.find(id).filter(|slot| slot.key() == *key)
    }

    /// Tells the disk tier which records were used, so that the next opening knows what is hot.
    /// Blocks.
    pub(crate) fn note_uses(&self, disk: &DiskSide) {
        const AT_ONCE: usize = 4096;
        loop {
            let records = self.index.take_touched(AT_ONCE);
            if records.is_empty() {
                return;
            }
            if let Err(error) = disk.tier.touch(&records, self.clock.unix_ms()) {
                tracing::debug!(%error, "the last uses of some records were not noted");
                return;
            }
        }
    }

    /// A chunk in the host tier, at this offset of the arena, did not verify: it is dropped there. A copy on disk
    /// stays, and so does one that has taken its place since: who held the damaged one finds out late.
    pub(crate) fn drop_corrupt_host(&self, pin: &Pin, position: usize, offset: usize) {
        let states = pin.states(position..position + 1);
        // By its place, not by its key: the damage may be there.
        let slot = states[0].host.and_then(|id| self.arena.find(id));
        if slot.is_none_or(|slot| slot.offset() != offset) {
            return;
        }
        self.recorder.add(Counter::CorruptBlocks, 1);
        if let Some(slot) = pin.lost(position, Pool::Host).and_then(|lost| lost.host) {
            self.arena.release(slot);
        }
    }
}

/// A prompt's hashes, as the pipelines keep them.
#[derive(Clone)]
pub(crate) struct HashedPath {
    pub(crate) root: Key,
    pub(crate) flat: bool,
    pub(crate) keys: Arc<[Key]>,
}

impl HashedPath {
    /// The header of the raw chunk at `position`; `seal` fills the slab table in.
    pub(crate) fn header(&self, config: &Config, position: usize) -> RecordHeader {
        self.headers(config)(position)
    }

    /// The same for many positions.
    pub(crate) fn headers<'a>(&'a self, config: &'a Config) -> impl Fn(usize) -> RecordHeader + 'a {
        let geometry = config.geometry.fingerprint();
        move |position| {
            let first = self.flat || position == 0;
            RecordHeader {
                namespace: self.root,
                parent: if first {
                    self.root
                } else {
                    self.keys[position - 1]
                },
                key: self.keys[position],
                depth: if first { 0 } else { position as u32 },
                tokens: config.geometry.block_tokens,
                geometry,
                layers: 0..config.geometry.layers,
                codec: CodecId::Raw,
                slabs: Vec::new(),
            }
        }
    }
}

/// Leaves a failing disk alone for a while: after a failed call reads, or writes, are answered without
/// it, for a pause that doubles with each further failure.
#[derive(Debug, Default)]
pub(crate) struct Health {
    failures: AtomicU64,
    /// Calls that worked.
    works: AtomicU64,
    paused_until_ns: AtomicU64,
}

impl Health {
    const PAUSE_FIRST: Duration = Duration::from_millis(250);
    const PAUSE_MAX: Duration = Duration::from_secs(30);

    pub(crate) fn is_paused(&self, now: Duration) -> bool {
        (now.as_nanos() as u64) < self.paused_until_ns.load(Ordering::Relaxed)
    }

    pub(crate) fn failed(&self, now: Duration) {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).min(16) as u32;
        let pause = (Self::PAUSE_FIRST * 2_u32.pow(failures)).min(Self::PAUSE_MAX);
        self.paused_until_ns
            .store((now + pause).as_nanos() as u64, Ordering::Relaxed);
    }

    pub(crate) fn worked(&self) {
        self.failures.store(0, Ordering::Relaxed);
        self.works.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it worked.
    pub(crate) fn works(&self) -> u64 {
        self.works.load(Ordering::Relaxed)
    }
}

/// Who may touch a load's or save's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    /// The store: copies are under way or still to come.
    InUse,
    /// The engine.
    Free,
    /// A copy never arrived: the device may still write to them.
    Lost,
}

/// Pages that are told to the engine when it is dropped: also by a panic on the way there.
struct GivenBack<'a>(&'a watch::Sender<Pages>, Pages);

impl Drop for GivenBack<'_> {
    fn drop(&mut self) {
        self.0.send_replace(self.1);
    }
}

/// Tells when a load's or save's pages are the engine's again.
///
/// Outlives the handle that it came from; clones tell of the same pages.
#[derive(Clone, Debug)]
pub struct PagesFree(watch::Receiver<Pages>);

impl PagesFree {
    /// Are they?
    pub fn is_free(&self) -> bool {
        *self.0.borrow() == Pages::Free
    }

    /// Did a copy not end in time, so that they never will be before the device is reset?
    pub fn is_lost(&self) -> bool {
        *self.0.borrow() == Pages::Lost
    }

    /// Waits until they are. A transfer has a time limit, so this ends.
    ///
    /// # Errors
    /// `Unavailable` where a copy did not end in time: the device may still touch the pages, which
    /// must not be used again before it is reset.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn wait(&self) -> Result<()> {
        let mut pages = self.0.clone();
        let settled = pages.wait_for(|pages| *pages != Pages::InUse).await;
        match settled.map(|pages| *pages) {
            Ok(Pages::Free) => Ok(()),
            _ => Err(Error::unavailable(
                "a copy did not end in time: the pages must not be used before the device is reset",
            )),
        }
    }

    /// [`PagesFree::wait`] for a thread.
    ///
    /// # Errors
    /// As [`PagesFree::wait`].
    pub fn wait_blocking(&self) -> Result<()> {
        pollster::block_on(self.wait())
    }
}
