//! Nodes of the tree: runs of blocks, and what hangs below them.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::num::NonZeroU64;
use std::ops::Range;

use stemkv_store::{DeviceSlotId, Key, RecordId, SlotId};

use super::report::NamespaceStats;
use crate::placement::{RunId, RunUse};

/// What holds chunks within a bound of its own, and evicts in an order of its own: one device's part of
/// the device tier, the host tier or the disk tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pool {
    /// The device tier of the device with this number.
    Device(usize),
    /// The host tier.
    Host,
    /// The disk tier.
    Disk,
}

/// The numbers of the pools that every store has; those of the devices behind the first one follow.
pub(super) const DEVICE: usize = 0;
pub(super) const HOST: usize = 1;
pub(super) const DISK: usize = 2;
pub(super) const POOLS: usize = 3;

impl Pool {
    /// Its number among the pools of a tree.
    pub(super) fn number(self) -> usize {
        match self {
            Pool::Device(0) => DEVICE,
            Pool::Device(device) => POOLS - 1 + device,
            Pool::Host => HOST,
            Pool::Disk => DISK,
        }
    }

    /// Every pool of a store that drives so many devices, by their numbers.
    pub(super) fn all(devices: usize) -> impl Iterator<Item = Pool> {
        let further = (1..devices).map(Pool::Device);
        [Pool::Device(0), Pool::Host, Pool::Disk]
            .into_iter()
            .chain(further)
    }
}

/// Hashes what is uniform already (keys) or small (run numbers): the first eight bytes are the hash.
#[derive(Default)]
pub struct KeyHasher(u64);

/// Builds [`KeyHasher`]s.
pub type KeyBuildHasher = BuildHasherDefault<KeyHasher>;

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    /// A slice's length, before its bytes: the same for all keys.
    fn write_usize(&mut self, _: usize) {}

    fn write_u32(&mut self, number: u32) {
        // Run numbers are dense; the table wants its top bits different too.
        self.0 = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Where one block's chunk is, in 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(Rust, packed(4))]
pub(super) struct Chunk {
    /// A record's number; 0 for none.
    record: u64,
    /// A slot's number, [`Chunk::NO_SLOT`] or [`Chunk::PENDING_SLOT`].
    host: u32,
    /// The number of a slot on the first device, [`Chunk::NO_SLOT`] or [`Chunk::ELSEWHERE`].
    device: u32,
}

impl Chunk {
    const NO_SLOT: u32 = u32::MAX;
    const PENDING_SLOT: u32 = u32::MAX - 1;
    /// On another device than the first: its node says which, and in which slot.
    const ELSEWHERE: u32 = u32::MAX - 1;

    /// In no tier, and nobody is filling it.
    pub(super) const HOLE: Chunk = Chunk {
        record: 0,
        host: Self::NO_SLOT,
        device: Self::NO_SLOT,
    };
    /// A claim is filling it.
    pub(super) const PENDING: Chunk = Chunk {
        record: 0,
        host: Self::PENDING_SLOT,
        device: Self::NO_SLOT,
    };

    /// Its slot on the first device.
    pub(super) fn device(self) -> Option<DeviceSlotId> {
        (self.device < Self::ELSEWHERE).then_some(DeviceSlotId(self.device))
    }

    pub(super) fn host(self) -> Option<SlotId> {
        (self.host < Self::PENDING_SLOT).then_some(SlotId(self.host))
    }

    pub(super) fn record(self) -> Option<RecordId> {
        NonZeroU64::new(self.record).map(RecordId)
    }

    pub(super) fn is_pending(self) -> bool {
        self.host == Self::PENDING_SLOT
    }

    pub(super) fn is_resident(self) -> bool {
        self.is_in_ram() || self.record != 0
    }

    /// Is it in the host tier or on any device?
    pub(super) fn is_in_ram(self) -> bool {
        self.is_in_host() || self.is_on_device()
    }

    /// Is it in the host tier?
    pub(super) fn is_in_host(self) -> bool {
        self.host < Self::PENDING_SLOT
    }

    /// Is it on any device?
    pub(super) fn is_on_device(self) -> bool {
        self.device != Self::NO_SLOT
    }

    pub(super) fn is_hole(self) -> bool {
        !self.is_resident() && !self.is_pending()
    }

    /// Is it in `pool`, one of those that every store has?
    pub(super) fn has(self, pool: usize) -> bool {
        match pool {
            DISK => self.record != 0,
            DEVICE => self.device < Self::ELSEWHERE,
            _ => self.host < Self::PENDING_SLOT,
        }
    }

    /// # Panics
    /// For the two highest slot numbers, which stand for something else here.
    pub(super) fn with_host(self, slot: SlotId) -> Self {
        assert!(
            slot.0 < Self::PENDING_SLOT,
            "slot numbers end below {}",
            Self::PENDING_SLOT
        );
        Chunk {
            host: slot.0,
            ..self
        }
    }

    pub(super) fn with_record(self, record: RecordId) -> Self {
        Chunk {
            record: record.0.get(),
            ..self
        }
    }

    pub(super) fn with_pending(self) -> Self {
        Chunk {
            host: Self::PENDING_SLOT,
            ..self
        }
    }

    /// Without its copy in the host tier; that ends pending, too.
    pub(super) fn without_host(self) -> Self {
        Chunk {
            host: Self::NO_SLOT,
            ..self
        }
    }
}

/// Where a block's chunk is to be: what its node's list says, and its slot on one further device.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) chunk: Chunk,
    /// The device's number among the further ones, and the slot's.
    further: Option<(usize, u32)>,
}

impl Places {
    /// The pool of the further device, and whether the block is to be there.
    pub(super) fn further(&self) -> Option<(usize, bool)> {
        let (further, slot) = self.further?;
        Some((POOLS + further, slot != Chunk::NO_SLOT))
    }
}

impl From<Chunk> for Places {
    fn from(chunk: Chunk) -> Self {
        Places {
            chunk,
            further: None,
        }
    }
}

/// A pin's number in the pin table.
pub(super) type PinId = u32;

/// A run of blocks: one edge of the path-compressed tree.
///
/// A namespace's root is a node with an empty run, a [`NamespaceRoot`] and no parent.
#[derive(Default)]
pub(super) struct Node {
    pub(super) parent: Option<RunId>,
    /// The node of the namespace's root.
    pub(super) root: Option<RunId>,
    /// Position of the run's first block in its prefix.
    pub(super) depth: u32,
    pub(super) keys: Vec<Key>,
    /// As long as `keys`.
    pub(super) chunks: Vec<Chunk>,
    pub(super) children: Children,
    /// Pins that end in descendants: they cover the whole run.
    pub(super) through: u32,
    /// Pins that end in this run.
    pub(super) ends: Vec<PinId>,
    /// Leading blocks that some pin covers.
    pub(super) pinned: u32,
    pub(super) used: RunUse,
    pub(super) last_use_ms: u64,
    pub(super) books: [Book; POOLS],
    /// Is the run in the pool's eviction policy?
    pub(super) listed: [bool; POOLS],
    /// Of the devices behind the first; `None` where none of them has had anything here or below.
    pub(super) further: Option<Box<FurtherDevices>>,
    pub(super) namespace: Option<Box<NamespaceRoot>>,
}

/// What a run knows of its blocks in one pool.
#[derive(Clone, Copy, Default)]
pub(super) struct Book {
    /// Blocks of the run there.
    pub(super) count: u32,
    /// One past the last of them.
    pub(super) end: u32,
    /// Children with anything there, in themselves or below.
    pub(super) live: u32,
}

/// By their numbers, up to the last one that has had anything.
#[derive(Default)]
pub(super) struct FurtherDevices(Vec<Further>);

/// What a run has on a device behind the first.
#[derive(Default)]
struct Further {
    book: Book,
    listed: bool,
    /// The slots of the run's leading blocks, or [`Chunk::NO_SLOT`]; blocks behind have none.
    slots: Vec<u32>,
}

impl Further {
    fn slot(&self, at: usize) -> u32 {
        self.slots.get(at).copied().unwrap_or(Chunk::NO_SLOT)
    }
}

/// What only a namespace's root has.
pub(super) struct NamespaceRoot {
    pub(super) key: Key,
    pub(super) stats: NamespaceStats,
}

impl Node {
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn is_root(&self) -> bool {
        self.namespace.is_some()
    }

    fn further_devices(&self) -> &[Further] {
        self.further.as_ref().map_or(&[], |further| &further.0)
    }

    /// The numbers of the pools that anything is known of.
    pub(super) fn pools(&self) -> Range<usize> {
        0..POOLS + self.further_devices().len()
    }

    /// Those of them that not every store has.
    pub(super) fn further_pools(&self) -> Range<usize> {
        POOLS..POOLS + self.further_devices().len()
    }

    pub(super) fn book(&self, pool: usize) -> Book {
        match pool.checked_sub(POOLS) {
            None => self.books[pool],
            Some(further) => self
                .further_devices()
                .get(further)
                .map(|it| it.book)
                .unwrap_or_default(),
        }
    }

    pub(super) fn book_mut(&mut self, pool: usize) -> &mut Book {
        match pool.checked_sub(POOLS) {
            None => &mut self.books[pool],
            Some(further) => &mut self.further(further).book,
        }
    }

    pub(super) fn is_listed(&self, pool: usize) -> bool {
        match pool.checked_sub(POOLS) {
            None => self.listed[pool],
            Some(further) => self
                .further_devices()
                .get(further)
                .is_some_and(|it| it.listed),
        }
    }

    pub(super) fn listed_mut(&mut self, pool: usize) -> &mut bool {
        match pool.checked_sub(POOLS) {
            None => &mut self.listed[pool],
            Some(further) => &mut self.further(further).listed,
        }
    }

    fn further(&mut self, device: usize) -> &mut Further {
        let further = &mut self.further.get_or_insert_default().0;
        if further.len() <= device {
            further.resize_with(device + 1, Further::default);
        }
        &mut further[device]
    }

    /// Is block `at` in `pool`?
    pub(super) fn has(&self, at: usize, pool: usize) -> bool {
        match pool.checked_sub(POOLS) {
            None => self.chunks[at].has(pool),
            Some(further) => self.further_slot(at, further).is_some(),
        }
    }

    fn further_slot(&self, at: usize, further: usize) -> Option<DeviceSlotId> {
        let slot = self.further_devices().get(further)?.slot(at);
        (slot != Chunk::NO_SLOT).then_some(DeviceSlotId(slot))
    }

    /// The slot of block `at` on a device.
    pub(super) fn device_slot(&self, at: usize, device: usize) -> Option<DeviceSlotId> {
        match device.checked_sub(1) {
            None => self.chunks[at].device(),
            Some(further) => self.further_slot(at, further),
        }
    }

    /// The first device, but for `but`, that has block `at`.
    pub(super) fn device_of(&self, at: usize, but: Option<usize>) -> Option<usize> {
        self.chunks[at]
            .is_on_device()
            .then_some(0..=self.further_devices().len())?
            .find(|&device| Some(device) != but && self.device_slot(at, device).is_some())
    }

    /// Block `at`, with this slot on a device.
    ///
    /// # Panics
    /// For the two highest slot numbers, which stand for something else here.
    pub(super) fn with_device(&self, at: usize, device: usize, slot: DeviceSlotId) -> Places {
        assert!(
            slot.0 < Chunk::ELSEWHERE,
            "device slot numbers end below {}",
            Chunk::ELSEWHERE
        );
        self.places(at, device, slot.0)
    }

    fn places(&self, at: usize, device: usize, slot: u32) -> Places {
        let mut chunk = self.chunks[at];
        let is_on_other = self.device_of(at, Some(device)).is_some();
        let elsewhere = match is_on_other || slot != Chunk::NO_SLOT {
            true => Chunk::ELSEWHERE,
            false => Chunk::NO_SLOT,
        };
        match device.checked_sub(1) {
            None => {
                chunk.device = if slot == Chunk::NO_SLOT {
                    elsewhere
                } else {
                    slot
                }
            }
            Some(_) if chunk.device().is_some() => {}
            Some(_) => chunk.device = elsewhere,
        }
        Places {
            chunk,
            further: device.checked_sub(1).map(|further| (further, slot)),
        }
    }

    /// Block `at`, without its copy in `pool`.
    pub(super) fn without(&self, at: usize, pool: Pool) -> Places {
        let chunk = self.chunks[at];
        match pool {
            Pool::Device(device) => self.places(at, device, Chunk::NO_SLOT),
            Pool::Host => chunk.without_host().into(),
            Pool::Disk => Chunk { record: 0, ..chunk }.into(),
        }
    }

    /// Puts block `at` where it is to be, and keeps the books. Returns what it was.
    pub(super) fn put(&mut self, at: usize, new: Places) -> Chunk {
        let old = std::mem::replace(&mut self.chunks[at], new.chunk);
        for pool in 0..POOLS {
            self.note(at, pool, old.has(pool), new.chunk.has(pool));
        }
        if let Some((further, slot)) = new.further {
            let had = self.further_slot(at, further).is_some();
            let slots = &mut self.further(further).slots;
            if slots.len() <= at {
                slots.resize(at + 1, Chunk::NO_SLOT);
            }
            slots[at] = slot;
            self.note(at, POOLS + further, had, slot != Chunk::NO_SLOT);
        }
        old
    }

    fn note(&mut self, at: usize, pool: usize, had: bool, has: bool) {
        match (had, has) {
            (false, true) => {
                let book = self.book_mut(pool);
                book.count += 1;
                book.end = book.end.max(at as u32 + 1);
            }
            (true, false) => {
                let is_last = self.book(pool).end == at as u32 + 1;
                let end = is_last.then(|| self.end_below(pool, at));
                let book = self.book_mut(pool);
                book.count -= 1;
                book.end = end.unwrap_or(book.end);
            }
            _ => {}
        }
    }

    /// Is anything of it, or below it, in `pool`?
    pub(super) fn is_live(&self, pool: usize) -> bool {
        let book = self.book(pool);
        book.count > 0 || book.live > 0
    }

    /// May the last block of the run in `pool` leave it? Descendants' copies in the pool go first;
    /// and where it is the block's only copy, nothing in any pool may be behind it (I2).
    pub(super) fn is_evictable(&self, pool: usize) -> bool {
        let Book { count, end, live } = self.book(pool);
        if count == 0 || live > 0 || end <= self.pinned {
            return false;
        }
        let ends_there = |other| self.book(other).end <= end && self.book(other).live == 0;
        !self.is_only_copy(end as usize - 1, pool) || self.pools().all(ends_there)
    }

    /// Is the copy of block `at` in `pool` the only one, and nobody fills another?
    fn is_only_copy(&self, at: usize, pool: usize) -> bool {
        let chunk = self.chunks[at];
        let in_others = match pool {
            DISK => chunk.is_in_ram(),
            HOST => chunk.is_on_device() || chunk.record != 0,
            _ => {
                let device = pool.checked_sub(POOLS).map_or(0, |further| further + 1);
                chunk.host != Chunk::NO_SLOT
                    || chunk.record != 0
                    || self.device_of(at, Some(device)).is_some()
            }
        };
        !(in_others || pool == DISK && chunk.is_pending())
    }

    /// One past the last block before `below` that is in `pool`.
    pub(super) fn end_below(&self, pool: usize, below: usize) -> u32 {
        let last = match pool.checked_sub(POOLS) {
            None => self.chunks[..below]
                .iter()
                .rposition(|chunk| chunk.has(pool)),
            Some(further) => self.further_devices().get(further).and_then(|further| {
                let slots = &further.slots[..below.min(further.slots.len())];
                slots.iter().rposition(|&slot| slot != Chunk::NO_SLOT)
            }),
        };
        last.map_or(0, |last| last as u32 + 1)
    }

    /// Cuts its first `at` blocks off, with their places; the books of both are still to be kept.
    pub(super) fn split_off_front(&mut self, at: usize) -> Node {
        let tail = self.keys.split_off(at);
        let keys = std::mem::replace(&mut self.keys, tail);
        let tail = self.chunks.split_off(at);
        let chunks = std::mem::replace(&mut self.chunks, tail);
        let further = self.further.as_mut().map(|further| {
            let fronts = further.0.iter_mut().map(|further| {
                let tail = further.slots.split_off(at.min(further.slots.len()));
                Further {
                    slots: std::mem::replace(&mut further.slots, tail),
                    ..Further::default()
                }
            });
            Box::new(FurtherDevices(fronts.collect()))
        });
        Node {
            // As long as what is in it.
            keys: keys.into_boxed_slice().into_vec(),
            chunks: chunks.into_boxed_slice().into_vec(),
            further,
            ..Node::default()
        }
    }

    /// Puts the blocks of `front` before its own, with their places and what the books say of them. The
    /// node itself is all that hangs on `front`.
    pub(super) fn prepend(&mut self, front: &mut Node) {
        let shift = front.len();
        let further = front
            .further_devices()
            .len()
            .max(self.further_devices().len());
        for further in 0..further {
            let mut slots = std::mem::take(&mut front.further(further).slots);
            let own = &mut self.further(further).slots;
            if !own.is_empty() {
                slots.resize(shift, Chunk::NO_SLOT);
                slots.append(own);
            }
            *own = slots;
        }
        front.keys.reserve_exact(self.keys.len());
        front.keys.append(&mut self.keys);
        self.keys = std::mem::take(&mut front.keys);
        front.chunks.reserve_exact(self.chunks.len());
        front.chunks.append(&mut self.chunks);
        self.chunks = std::mem::take(&mut front.chunks);
        for pool in self.pools() {
            let before = front.book(pool);
            let book = self.book_mut(pool);
            book.count += before.count;
            book.end = match book.end {
                0 => before.end,
                end => end + shift as u32,
            };
        }
    }

    /// Leaves its first `len` blocks; those behind are in no pool.
    pub(super) fn truncate(&mut self, len: usize) {
        self.keys.truncate(len);
        self.chunks.truncate(len);
        if self.keys.capacity() > len * 2 {
            self.keys.shrink_to_fit();
            self.chunks.shrink_to_fit();
        }
        for further in self.further.iter_mut().flat_map(|further| &mut further.0) {
            further.slots.truncate(len);
        }
    }
}

/// The children of a node, by their first key.
#[derive(Default)]
pub(super) enum Children {
    #[default]
    None,
    One(RunId),
    Many(HashMap<Key, RunId, KeyBuildHasher>),
}

impl Children {
    pub(super) fn len(&self) -> usize {
        match self {
            Children::None => 0,
            Children::One(_) => 1,
            Children::Many(map) => map.len(),
        }
    }

    pub(super) fn only(&self) -> Option<RunId> {
        match self {
            Children::One(child) => Some(*child),
            _ => None,
        }
    }

    pub(super) fn ids(&self) -> Vec<RunId> {
        match self {
            Children::None => Vec::new(),
            Children::One(child) => vec![*child],
            Children::Many(map) => map.values().copied().collect(),
        }
    }
}
