//! Device tier → host: what a device holds alone, before it goes or for another device.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use stemkv_store::{
    DeviceSlot, Direction, EncodedSave, Filling, Job, JobEvent, Key, SlabMove, Slot, Urgency,
};

use super::{DeviceSide, Driven, drop_corrupt, release};
use crate::Result;
use crate::index::Pin;
use crate::pipeline::Shared;
use crate::pipeline::landing::Landing;
use crate::stats::Counter;

/// Chunks that are moved down at a time.
const DEMOTED_AT_ONCE: usize = 32;

/// One chunk on its way down; lands as `None` where it does not arrive.
pub(crate) type Lowering = Landing<Option<Slot>>;

/// Moves the coldest only copies of a device's tier down into the host tier, in the background, one lot
/// at a time; where the host tier has no room for them they are dropped.
pub(super) fn demote(shared: &Arc<Shared>, on: &Arc<Driven>) {
    let Some(tier) = &on.tier else {
        return;
    };
    if tier.is_demoting.swap(true, Ordering::AcqRel) {
        return;
    }
    let lot = Lot(on.clone());
    let coldest = shared.index.coldest_only_copies(on.pool(), DEMOTED_AT_ONCE);
    let Some((pin, positions)) = coldest.filter(|(_, positions)| !positions.is_empty()) else {
        return;
    };
    let chunks = slots_of(on, tier, &pin, &positions);
    let fillings = shared.allocate(chunks.len());
    let missing = chunks.len() - fillings.len();
    if fillings.is_empty() {
        drop(pin);
        let evicted = shared.index.evict(on.pool(), missing);
        release(shared, tier, &evicted);
        return;
    }
    // The last ones go first, so those in front may do without room.
    let chunks = chunks.into_iter().skip(missing).zip(fillings);
    let chunks = chunks.map(|((position, slot), filling)| Lowered {
        position,
        slot,
        filling,
        landing: Arc::default(),
    });
    let lower = Lower {
        shared: shared.clone(),
        on: on.clone(),
        _lot: Some(lot),
        pin: Arc::new(pin),
        chunks: chunks.collect(),
        layers_done: 0,
        failed: false,
    };
    if let Err(error) = lower.submit(tier, Urgency::Later) {
        tracing::debug!(%error, "a move out of the device tier was declined");
    }
}

/// Copies chunks that this device has, and the host tier does not, down there, for another device: an
/// answer for each of `positions`. Those that are under way already are joined.
pub(crate) fn fetch_down(
    shared: &Arc<Shared>,
    on: &Arc<Driven>,
    pin: &Arc<Pin>,
    positions: &[usize],
) -> Vec<Arc<Lowering>> {
    let (Some(tier), Some(&first), Some(&last)) = (&on.tier, positions.first(), positions.last())
    else {
        return positions.iter().map(|_| missing()).collect();
    };
    let states = pin.states_on(on.number, first..last + 1);
    let mut new = Vec::new();
    let all: Vec<Arc<Lowering>> = {
        let mut lowering = tier.lowering();
        let mut one = |&position: &usize| {
            let state = &states[position - first];
            if let Some(coming) = lowering.get(&state.key) {
                return coming.clone();
            }
            let Some(slot) = tier.slot(state) else {
                return missing();
            };
            let landing = Arc::new(Lowering::default());
            lowering.insert(state.key, landing.clone());
            new.push((position, slot, landing.clone()));
            landing
        };
        positions.iter().map(&mut one).collect()
    };
    if new.is_empty() {
        return all;
    }
    let mut lower = Lower {
        shared: shared.clone(),
        on: on.clone(),
        _lot: None,
        pin: pin.clone(),
        chunks: Vec::with_capacity(new.len()),
        layers_done: 0,
        failed: false,
    };
    let mut fillings = shared.allocate(new.len()).into_iter();
    for (position, slot, landing) in new {
        match fillings.next() {
            Some(filling) => lower.chunks.push(Lowered {
                position,
                slot,
                filling,
                landing,
            }),
            None => {
                shared.recorder.add(Counter::DeclinedPromotions, 1);
                land(tier, &slot.key(), &landing, None);
            }
        }
    }
    if !lower.chunks.is_empty()
        && let Err(error) = lower.submit(tier, Urgency::Demand)
    {
        tracing::debug!(%error, "a move out of the device tier was declined");
    }
    all
}

/// What has gone in the meantime.
fn missing() -> Arc<Lowering> {
    let landing = Lowering::default();
    landing.land(None);
    Arc::new(landing)
}

/// Nobody joins it any more, and those who did are told.
fn land(tier: &DeviceSide, key: &Key, landing: &Arc<Lowering>, arrived: Option<Slot>) {
    let mut lowering = tier.lowering();
    // Moves down that nobody asked for are in no map, and may be of the same chunk.
    if lowering
        .get(key)
        .is_some_and(|coming| Arc::ptr_eq(coming, landing))
    {
        lowering.remove(key);
    }
    drop(lowering);
    landing.land(arrived);
}

/// Handles to the slots of some blocks, as far as they are still there.
fn slots_of(
    on: &Driven,
    tier: &DeviceSide,
    pin: &Pin,
    positions: &[usize],
) -> Vec<(usize, DeviceSlot)> {
    let (Some(&first), Some(&last)) = (positions.first(), positions.last()) else {
        return Vec::new();
    };
    let states = pin.states_on(on.number, first..last + 1);
    let slot = |&position: &usize| Some((position, tier.slot(&states[position - first])?));
    positions.iter().filter_map(slot).collect()
}

/// Another lot may begin once this is dropped.
struct Lot(Arc<Driven>);

impl Drop for Lot {
    fn drop(&mut self) {
        if let Some(tier) = &self.0.tier {
            tier.is_demoting.store(false, Ordering::Release);
        }
    }
}

/// One job of chunks that move down. Dropped, whatever has not landed does not arrive.
struct Lower {
    shared: Arc<Shared>,
    on: Arc<Driven>,
    _lot: Option<Lot>,
    pin: Arc<Pin>,
    chunks: Vec<Lowered>,
    layers_done: u32,
    failed: bool,
}

struct Lowered {
    position: usize,
    slot: DeviceSlot,
    filling: Filling,
    landing: Arc<Lowering>,
}

impl Lower {
    fn submit(mut self, tier: &DeviceSide, urgency: Urgency) -> Result<()> {
        let (shared, on) = (self.shared.clone(), self.on.clone());
        let geometry = &shared.config.geometry;
        let moves = self.chunks.iter().enumerate();
        let moves = moves.map(|(index, chunk)| SlabMove::Save {
            slot: chunk.filling.writer(),
            token: index as u32 * geometry.block_tokens,
        });
        let moves = moves.collect();
        let slots: Vec<DeviceSlot> = self.chunks.iter().map(|it| it.slot.clone()).collect();
        let table = tier.arena.table_to_read(&slots)?;
        // Back to what they were, where they were encoded: what arrives is then compared by its checksums.
        let codec = slots.first().map(|slot| slot.header().codec);
        let codec = codec.filter(|&codec| {
            let are_alike = slots.iter().all(|slot| slot.header().codec == codec);
            are_alike && on.device.encodes(codec)
        });
        drop(slots);
        on.transfers.submit(Job {
            direction: Direction::Save,
            layers: 0..geometry.layers,
            table,
            moves,
            urgency,
            from_token: 0,
            encoded: codec.map(EncodedSave::new),
            after: Vec::new(),
            begin_by: None,
            cancelled: Arc::default(),
            events: Box::new(move |event| self.event(event)),
        })
    }

    fn event(&mut self, event: JobEvent) {
        match event {
            JobEvent::Begun => {}
            JobEvent::Layer { layer, slabs, .. } => {
                self.layers_done += 1;
                for (chunk, &slab) in self.chunks.iter_mut().zip(&slabs) {
                    chunk.filling.set_stored(layer, slab);
                }
            }
            JobEvent::Failed { .. } => {
                self.failed = true;
                self.shared.recorder.add(Counter::TransferErrors, 1);
            }
            JobEvent::Done { settled } => {
                let is_whole = self.layers_done == self.shared.config.geometry.layers;
                if settled && is_whole && !self.failed {
                    self.publish();
                }
            }
        }
    }

    fn publish(&mut self) {
        let (shared, on) = (self.shared.clone(), self.on.clone());
        let Some(tier) = &on.tier else {
            return;
        };
        for chunk in self.chunks.drain(..) {
            let (position, header) = (chunk.position, chunk.slot.header());
            let key = header.key;
            let sealed = chunk.filling.seal(header.clone());
            let sealed = sealed.and_then(|sealed| Ok((sealed.holds(header)?, sealed)));
            let arrived = match sealed {
                // What arrives is what was once saved, or the device's copy was damaged.
                Ok((true, sealed)) => {
                    let id = sealed.clone().into_id();
                    match self.pin.set_host(position, id) {
                        true => shared.recorder.add(Counter::DemotedBlocks, 1),
                        false => shared.arena.release(id),
                    }
                    Some(sealed)
                }
                _ => {
                    drop_corrupt(&shared, &self.on, &self.pin, position);
                    None
                }
            };
            land(tier, &key, &chunk.landing, arrived);
        }
    }
}

impl Drop for Lower {
    fn drop(&mut self) {
        let Some(tier) = &self.on.tier else {
            return;
        };
        for chunk in self.chunks.drain(..) {
            let (key, landing) = (chunk.slot.key(), chunk.landing.clone());
            // Whoever waits finds nothing held for it.
            drop(chunk);
            land(tier, &key, &landing, None);
        }
    }
}
