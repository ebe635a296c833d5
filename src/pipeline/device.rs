//! Host ⇄ device tier: chunks are promoted into our own GPU memory ahead of their use, and moved down
//! where the device tier holds their only copy.
//!
//! Both are jobs of the transfer queue that nobody waits for: loads and saves go first. A chunk is
//! promoted once at a time, whoever asks. Eviction drops copies at once; an only copy is moved down
//! first, in the background, and whoever wanted its room meanwhile does without.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stemkv_store::{
    DeviceArena, DeviceFilling, DeviceSlot, Direction, EncodedSave, Filling, Job, JobEvent, Key,
    RecordHeader, SlabEntry, SlabMove, Slot, Tier, Urgency,
};

use crate::ErrorKind;
use crate::index::{BlockState, Evicted, Pin};
use crate::pipeline::landing::Landing;
use crate::pipeline::{HashedPath, Shared};
use crate::placement::is_worth_promoting;
use crate::stats::{Counter, Stage};

/// Chunks that are moved down at a time.
const DEMOTED_AT_ONCE: usize = 32;

/// The device tier.
pub(crate) struct DeviceSide {
    pub(crate) arena: DeviceArena,
    promoting: Mutex<HashMap<Key, Arc<Promotion>>>,
    is_demoting: AtomicBool,
}

/// How a promotion ended.
#[derive(Clone)]
pub(crate) enum Promoted {
    /// The chunk is in the device tier.
    Ready(DeviceSlot),
    /// It is not: no room, late, cancelled or failed.
    Missing,
}

/// One chunk on its way up.
#[derive(Default)]
pub(crate) struct Promotion {
    /// Has any layer been submitted?
    begun: AtomicBool,
    pub(crate) landing: Landing<Promoted>,
}

impl DeviceSide {
    pub(crate) fn new(arena: DeviceArena) -> Self {
        DeviceSide {
            arena,
            promoting: Mutex::default(),
            is_demoting: AtomicBool::new(false),
        }
    }

    fn promoting(&self) -> MutexGuard<'_, HashMap<Key, Arc<Promotion>>> {
        self.promoting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A handle to the device slot of a block.
    pub(crate) fn slot(&self, state: &BlockState) -> Option<DeviceSlot> {
        state.device.and_then(|id| self.arena.find(id, &state.key))
    }

    /// A promotion of `key` whose copy has begun: it is there sooner than another copy of it.
    pub(crate) fn under_way(&self, key: &Key) -> Option<Arc<Promotion>> {
        let promoting = self.promoting();
        let promotion = promoting.get(key)?;
        let has_begun = promotion.begun.load(Ordering::Acquire);
        has_begun.then(|| promotion.clone())
    }
}

/// Takes up to `count` device slots, evicting colder copies for them.
pub(crate) fn allocate(
    shared: &Arc<Shared>,
    device: &DeviceSide,
    count: usize,
) -> Vec<DeviceFilling> {
    let mut fillings = device.arena.allocate(count);
    let missing = count - fillings.len();
    if missing > 0 {
        let evicted = shared.index.evict_copies(Tier::Device, missing);
        let room = evicted.len();
        release(shared, device, &evicted);
        fillings.extend(device.arena.allocate(room));
        if room < missing {
            demote(shared);
        }
    }
    fillings
}

fn release(shared: &Shared, device: &DeviceSide, evicted: &[Evicted]) {
    let slots = evicted.iter().filter_map(|evicted| evicted.device);
    shared.recorder.add(Counter::EvictedDevice, evicted.len());
    slots.for_each(|slot| device.arena.release(slot));
}

/// A device copy did not verify: it is dropped there. Others stay.
pub(crate) fn drop_corrupt(shared: &Shared, pin: &Pin, position: usize) {
    shared.recorder.add(Counter::CorruptBlocks, 1);
    let lost = pin.lost(position, Tier::Device);
    if let (Some(device), Some(slot)) = (&shared.device_tier, lost.and_then(|lost| lost.device)) {
        device.arena.release(slot);
    }
}

/// Promotes, of the blocks that a load brought out of the host tier, those that are hot.
pub(crate) fn promote_hot(shared: &Arc<Shared>, pin: &Arc<Pin>, blocks: std::ops::Range<usize>) {
    let Some(device) = &shared.device_tier else {
        return;
    };
    let states = pin.states(blocks.clone());
    let hot = blocks
        .zip(&states)
        .filter(|(_, state)| is_worth_promoting(state));
    let chunks: Vec<_> = hot
        .filter_map(|(position, state)| {
            let slot = state.host.and_then(|id| shared.slot(id, &state.key))?;
            Some((position, slot))
        })
        .collect();
    drop(promote(shared, device, pin, chunks, Limits::default()));
}

/// When a promotion is given up.
#[derive(Clone, Default)]
pub(crate) struct Limits {
    /// What has not begun by then, on the store's clock, does not.
    pub(crate) begin_by: Option<Duration>,
    pub(crate) cancelled: Arc<AtomicBool>,
}

/// Copies chunks out of the host tier into the device tier, as one job: an answer for each. Those that
/// are under way already are joined.
pub(crate) fn promote(
    shared: &Arc<Shared>,
    device: &DeviceSide,
    pin: &Arc<Pin>,
    chunks: Vec<(usize, Slot)>,
    limits: Limits,
) -> Vec<Arc<Promotion>> {
    let mut all = Vec::with_capacity(chunks.len());
    let mut new = Vec::new();
    {
        let mut promoting = device.promoting();
        for (position, slot) in chunks {
            let key = slot.key();
            let promotion = promoting.entry(key).or_insert_with(|| {
                let promotion = Arc::new(Promotion::default());
                new.push((position, slot, promotion.clone()));
                promotion
            });
            all.push(promotion.clone());
        }
    }
    if new.is_empty() {
        return all;
    }
    let mut lift = Lift {
        shared: shared.clone(),
        pin: pin.clone(),
        chunks: Vec::with_capacity(new.len()),
        layers_done: 0,
        good: usize::MAX,
        begun: shared.clock.now(),
    };
    let mut fillings = allocate(shared, device, new.len()).into_iter();
    let mut declined = Vec::new();
    for (position, slot, promotion) in new {
        let header = slot.header().ok().filter(|header| can_rise(shared, header));
        match (header, fillings.len() > 0) {
            (Some(header), true) => lift.chunks.push(Lifted {
                position,
                header,
                slot,
                filling: fillings.next(),
                promotion,
            }),
            _ => declined.push((slot.key(), promotion)),
        }
    }
    drop(fillings);
    shared
        .recorder
        .add(Counter::DeclinedPromotions, declined.len());
    end(device, declined);
    if let Err(error) = lift.submit(device, limits) {
        tracing::debug!(%error, "a promotion was declined");
    }
    all
}

/// Can the device tier hold it? A whole chunk, decoded on its way up where it is encoded.
fn can_rise(shared: &Shared, header: &RecordHeader) -> bool {
    let is_whole = header.layers == (0..shared.config.geometry.layers);
    is_whole && shared.device.decodes(header.codec)
}

fn end(device: &DeviceSide, promotions: Vec<(Key, Arc<Promotion>)>) {
    if promotions.is_empty() {
        return;
    }
    let mut promoting = device.promoting();
    for (key, _) in &promotions {
        promoting.remove(key);
    }
    drop(promoting);
    for (_, promotion) in promotions {
        promotion.landing.land(Promoted::Missing);
    }
}

/// One job of promotions. Dropped, whatever has not landed is missing.
struct Lift {
    shared: Arc<Shared>,
    pin: Arc<Pin>,
    chunks: Vec<Lifted>,
    layers_done: u32,
    /// Leading chunks of which nothing is known to be wrong.
    good: usize,
    begun: Duration,
}

struct Lifted {
    position: usize,
    header: RecordHeader,
    slot: Slot,
    filling: Option<DeviceFilling>,
    promotion: Arc<Promotion>,
}

impl Lift {
    fn submit(mut self, device: &DeviceSide, limits: Limits) -> crate::Result<()> {
        if self.chunks.is_empty() {
            return Ok(());
        }
        let shared = self.shared.clone();
        let geometry = &shared.config.geometry;
        let (mut fillings, mut moves) = (Vec::new(), Vec::new());
        for (index, chunk) in self.chunks.iter_mut().enumerate() {
            fillings.extend(chunk.filling.take());
            moves.push(SlabMove::Load {
                slot: chunk.slot.clone(),
                token: index as u32 * geometry.block_tokens,
            });
        }
        let table = device.arena.table_to_fill(&fillings)?;
        for (chunk, filling) in self.chunks.iter_mut().zip(fillings) {
            chunk.filling = Some(filling);
        }
        shared.transfers.submit(Job {
            direction: Direction::Load,
            layers: 0..geometry.layers,
            table,
            moves,
            urgency: Urgency::Later,
            from_token: 0,
            encoded: None,
            after: Vec::new(),
            begin_by: limits.begin_by,
            cancelled: limits.cancelled,
            events: Box::new(move |event| self.event(event)),
        })
    }

    fn event(&mut self, event: JobEvent) {
        match event {
            JobEvent::Layer { .. } => {
                self.layers_done += 1;
                for chunk in &self.chunks {
                    chunk.promotion.begun.store(true, Ordering::Release);
                }
            }
            JobEvent::Failed {
                good_moves, error, ..
            } => {
                self.good = self.good.min(good_moves);
                match (error.kind(), self.chunks.get(good_moves)) {
                    (ErrorKind::Corrupt, Some(chunk)) => {
                        self.shared.drop_corrupt_host(&self.pin, chunk.position);
                    }
                    // Late.
                    (ErrorKind::Busy, _) => {}
                    _ => self.shared.recorder.add(Counter::TransferErrors, 1),
                }
            }
            JobEvent::Done { settled } => {
                let is_whole = self.layers_done == self.shared.config.geometry.layers;
                if settled && is_whole {
                    self.publish();
                }
            }
        }
    }

    /// Publish last: every layer has arrived. What did not verify, and what is behind it, goes.
    fn publish(&mut self) {
        let shared = self.shared.clone();
        let Some(device) = &shared.device_tier else {
            return;
        };
        let took = shared.clock.now().saturating_sub(self.begun);
        let good = self.good.min(self.chunks.len());
        let bytes = good * shared.config.geometry.payload_bytes();
        shared.recorder.time(Stage::Promote, took, bytes as u64);
        for chunk in self.chunks.drain(..good) {
            let key = chunk.slot.key();
            let sealed = chunk
                .filling
                .and_then(|filling| filling.seal(chunk.header).ok());
            let promoted = match sealed {
                Some(slot) => {
                    publish_one(&shared, device, &self.pin, chunk.position, &slot);
                    Promoted::Ready(slot)
                }
                None => Promoted::Missing,
            };
            device.promoting().remove(&key);
            chunk.promotion.landing.land(promoted);
        }
    }
}

/// Publishes a sealed device slot; one that comes second goes.
pub(crate) fn publish_one(
    shared: &Shared,
    device: &DeviceSide,
    pin: &Pin,
    position: usize,
    slot: &DeviceSlot,
) {
    let id = slot.clone().into_id();
    match pin.set_device(position, id) {
        true => shared.recorder.add(Counter::DeviceBlocks, 1),
        false => device.arena.release(id),
    }
}

impl Drop for Lift {
    fn drop(&mut self) {
        if let Some(device) = &self.shared.device_tier {
            let left = self.chunks.drain(..);
            let left = left.map(|chunk| (chunk.slot.key(), chunk.promotion));
            end(device, left.collect());
        }
    }
}

/// Moves the device tier's coldest only copies down into the host tier, in the background, one lot at
/// a time; where the host tier has no room for them they are dropped.
fn demote(shared: &Arc<Shared>) {
    let Some(device) = &shared.device_tier else {
        return;
    };
    if device.is_demoting.swap(true, Ordering::AcqRel) {
        return;
    }
    let lot = Lot(shared.clone());
    let coldest = shared
        .index
        .coldest_only_copies(Tier::Device, DEMOTED_AT_ONCE);
    let Some((pin, positions)) = coldest.filter(|(_, positions)| !positions.is_empty()) else {
        return;
    };
    let chunks: Vec<(usize, DeviceSlot)> = positions
        .into_iter()
        .filter_map(|position| {
            let state = pin.states(position..position + 1).remove(0);
            Some((position, device.slot(&state)?))
        })
        .collect();
    let fillings = shared.allocate(chunks.len());
    let missing = chunks.len() - fillings.len();
    if fillings.is_empty() {
        drop(pin);
        let evicted = shared.index.evict(Tier::Device, missing);
        release(shared, device, &evicted);
        return;
    }
    // The last ones go first, so those in front may do without room.
    let chunks = chunks.into_iter().skip(missing).zip(fillings);
    let geometry = &shared.config.geometry;
    let (mut down, mut slots, mut moves) = (Vec::new(), Vec::new(), Vec::new());
    for (index, ((position, slot), filling)) in chunks.enumerate() {
        moves.push(SlabMove::Save {
            slot: filling.writer(),
            token: index as u32 * geometry.block_tokens,
        });
        slots.push(slot.clone());
        down.push((position, slot, filling));
    }
    let Ok(table) = device.arena.table_to_read(&slots) else {
        return;
    };
    drop(slots);
    // Back to what they were, where they were encoded: what arrives is then compared by its checksums.
    let codec = down.first().map(|(_, slot, _)| slot.header().codec);
    let codec = codec.filter(|&codec| {
        let are_alike = down.iter().all(|(_, slot, _)| slot.header().codec == codec);
        are_alike && shared.device.encodes(codec)
    });
    let mut lower = Lower {
        lot,
        pin,
        chunks: down,
        layers_done: 0,
        failed: false,
    };
    let submitted = shared.transfers.submit(Job {
        direction: Direction::Save,
        layers: 0..geometry.layers,
        table,
        moves,
        urgency: Urgency::Later,
        from_token: 0,
        encoded: codec.map(EncodedSave::new),
        after: Vec::new(),
        begin_by: None,
        cancelled: Arc::default(),
        events: Box::new(move |event| lower.event(event)),
    });
    if let Err(error) = submitted {
        tracing::debug!(%error, "a move out of the device tier was declined");
    }
}

/// Another lot may begin once this is dropped.
struct Lot(Arc<Shared>);

impl Drop for Lot {
    fn drop(&mut self) {
        if let Some(device) = &self.0.device_tier {
            device.is_demoting.store(false, Ordering::Release);
        }
    }
}

/// One job of chunks that move down.
struct Lower {
    lot: Lot,
    pin: Pin,
    chunks: Vec<(usize, DeviceSlot, Filling)>,
    layers_done: u32,
    failed: bool,
}

impl Lower {
    fn event(&mut self, event: JobEvent) {
        match event {
            JobEvent::Layer { layer, slabs, .. } => {
                self.layers_done += 1;
                for ((.., filling), &slab) in self.chunks.iter_mut().zip(&slabs) {
                    filling.set_stored(layer, slab);
                }
            }
            JobEvent::Failed { .. } => {
                self.failed = true;
                self.lot.0.recorder.add(Counter::TransferErrors, 1);
            }
            JobEvent::Done { settled } => {
                let is_whole = self.layers_done == self.lot.0.config.geometry.layers;
                if settled && is_whole && !self.failed {
                    self.publish();
                }
            }
        }
    }

    fn publish(&mut self) {
        let shared = &self.lot.0;
        for (position, slot, filling) in self.chunks.drain(..) {
            let sealed = filling.seal(slot.header().clone());
            let sealed = sealed.and_then(|sealed| Ok((sealed.holds(slot.header())?, sealed)));
            match sealed {
                // What arrived is what was once saved, or the device's copy was damaged.
                Ok((true, sealed)) => {
                    let id = sealed.into_id();
                    match self.pin.set_host(position, id) {
                        true => shared.recorder.add(Counter::DemotedBlocks, 1),
                        false => shared.arena.release(id),
                    }
                }
                _ => drop_corrupt(shared, &self.pin, position),
            }
        }
    }
}

/// The save of one prompt's new blocks into the device tier, beside that into the host tier.
pub(crate) struct Keeping {
    fillings: Vec<(usize, DeviceFilling)>,
    layers_done: u32,
    /// By layer, where the device knows them.
    slabs: Vec<Vec<SlabEntry>>,
    pub(crate) failed: bool,
}

impl Keeping {
    /// Room for the first of some blocks, as many as there is; `None` where that is none.
    pub(crate) fn new(shared: &Arc<Shared>, positions: &[usize]) -> Option<Self> {
        let device = shared.device_tier.as_ref()?;
        let fillings = allocate(shared, device, positions.len());
        let layers = shared.config.geometry.layers as usize;
        (!fillings.is_empty()).then(|| Keeping {
            fillings: positions.iter().copied().zip(fillings).collect(),
            layers_done: 0,
            slabs: vec![Vec::new(); layers],
            failed: false,
        })
    }

    pub(crate) fn moves(&self, block_tokens: u32) -> Vec<SlabMove> {
        let moves = self.fillings.iter();
        let moves = moves.map(|(position, filling)| SlabMove::SaveDevice {
            slot: filling.writer(),
            token: *position as u32 * block_tokens,
        });
        moves.collect()
    }

    pub(crate) fn layer(&mut self, layer: u32, slabs: Vec<SlabEntry>) {
        self.layers_done += 1;
        self.slabs[layer as usize] = slabs;
    }

    /// Publishes the blocks of `published` that came whole, with what the host tier's copies say.
    pub(crate) fn publish(
        self,
        shared: &Shared,
        pin: &Pin,
        path: &HashedPath,
        published: &[(usize, Slot)],
    ) {
        let Some(device) = &shared.device_tier else {
            return;
        };
        if self.failed || self.layers_done != shared.config.geometry.layers {
            return;
        }
        // Behind another save's pending block the pin ends.
        let pinned = |(position, _): &(usize, DeviceFilling)| *position < pin.blocks();
        let fillings = self.fillings.into_iter().take_while(pinned);
        for (index, (position, filling)) in fillings.enumerate() {
            let of_host = published.binary_search_by_key(&position, |(position, _)| *position);
            let header = of_host.ok().and_then(|at| published[at].1.header().ok());
            let Some(header) = header.filter(|header| header.key == path.keys[position]) else {
                continue;
            };
            let geometry = &shared.config.geometry;
            let differs = |(layer, slabs): (usize, &Vec<SlabEntry>)| {
                // Of a slab that is encoded in the host tier there is nothing to compare.
                let of_host = header.slabs.get(layer).filter(|slab| slab.is_raw(geometry));
                let known = slabs.get(index).zip(of_host);
                known.is_some_and(|(slab, of_host)| slab.checksum != of_host.checksum)
            };
            if !can_rise(shared, &header) || self.slabs.iter().enumerate().any(differs) {
                continue;
            }
            if let Ok(slot) = filling.seal(header) {
                publish_one(shared, device, pin, position, &slot);
            }
        }
    }
}
