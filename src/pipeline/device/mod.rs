//! The device tier: each device's part of it, and what moves into it and out.
//!
//! A device has its own arena, and its own order in which copies leave it; a chunk may be in several
//! devices' arenas. A load takes what is in its own device's. Chunks are promoted ahead of their use, and
//! moved down where a device holds the only copy.
//!
//! Both are jobs of that device's transfer queue that nobody waits for: loads and saves go first. A chunk is
//! promoted once at a time, whoever asks. Eviction drops copies at once; an only copy is moved down
//! first, in the background, and whoever wanted its room meanwhile does without. What another device
//! asks for, and only this one has, is moved down at once, once for all who ask meanwhile.
//!
//! | file | question |
//! |---|---|
//! | `promote.rs` | how do chunks come up from the host tier? |
//! | `demote.rs` | how do they get down there? |
//! | `keep.rs` | how does a save put them here? |

mod demote;
mod keep;
mod promote;

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stemkv_store::{
    Device, DeviceArena, DeviceFilling, DeviceSlot, Key, RecordHeader, TransferQueue,
};

pub(crate) use self::demote::{Lowering, fetch_down};
pub(crate) use self::keep::Keeping;
pub(crate) use self::promote::{Limits, Promoted, Promotion, promote, promote_hot};
use crate::index::{BlockState, Evicted, Pin, Pool};
use crate::pipeline::Shared;
use crate::pipeline::meter::Meter;
use crate::pipeline::pace::Pace;
use crate::stats::Counter;

/// One of the devices that the store drives, with what each has for itself.
pub(crate) struct Driven {
    /// Its place among them.
    pub(crate) number: usize,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) transfers: TransferQueue,
    /// Its part of the device tier, where it was given memory.
    pub(crate) tier: Option<DeviceSide>,
    /// How fast chunks come out of its tier.
    pub(crate) local: Meter,
    /// How fast they come over its link.
    pub(crate) link: Meter,
    pub(crate) pace: Pace,
}

impl Driven {
    pub(crate) fn pool(&self) -> Pool {
        Pool::Device(self.number)
    }

    /// Can its tier hold the chunk? A whole one, decoded on its way up where it is encoded.
    fn can_hold(&self, shared: &Shared, header: &RecordHeader) -> bool {
        let is_whole = header.layers == (0..shared.config.geometry.layers);
        is_whole && self.device.decodes(header.codec)
    }
}

/// One device's part of the device tier.
pub(crate) struct DeviceSide {
    pub(crate) arena: DeviceArena,
    promoting: Mutex<HashMap<Key, Arc<Promotion>>>,
    /// What comes down for other devices.
    lowering: Mutex<HashMap<Key, Arc<Lowering>>>,
    is_demoting: AtomicBool,
}

impl DeviceSide {
    pub(crate) fn new(arena: DeviceArena) -> Self {
        DeviceSide {
            arena,
            promoting: Mutex::default(),
            lowering: Mutex::default(),
            is_demoting: AtomicBool::new(false),
        }
    }

    fn promoting(&self) -> MutexGuard<'_, HashMap<Key, Arc<Promotion>>> {
        self.promoting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lowering(&self) -> MutexGuard<'_, HashMap<Key, Arc<Lowering>>> {
        self.lowering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A handle to the slot of a block, as this device sees it.
    pub(crate) fn slot(&self, state: &BlockState) -> Option<DeviceSlot> {
        state.device.and_then(|id| self.arena.find(id, &state.key))
    }
}

/// Takes up to `count` slots of a device's tier, evicting colder copies for them.
fn allocate(
    shared: &Arc<Shared>,
    on: &Arc<Driven>,
    tier: &DeviceSide,
    count: usize,
) -> Vec<DeviceFilling> {
    let mut fillings = tier.arena.allocate(count);
    let missing = count - fillings.len();
    if missing > 0 {
        let evicted = shared.index.evict_copies(on.pool(), missing);
        let room = evicted.len();
        release(shared, tier, &evicted);
        fillings.extend(tier.arena.allocate(room));
        if room < missing {
            demote::demote(shared, on);
        }
    }
    fillings
}

fn release(shared: &Shared, tier: &DeviceSide, evicted: &[Evicted]) {
    let slots = evicted.iter().filter_map(|evicted| evicted.device);
    shared.recorder.add(Counter::EvictedDevice, evicted.len());
    slots.for_each(|slot| tier.arena.release(slot));
}

/// A device's copy did not verify: it is dropped there. Others stay.
pub(crate) fn drop_corrupt(shared: &Shared, on: &Driven, pin: &Pin, position: usize) {
    shared.recorder.add(Counter::CorruptBlocks, 1);
    let lost = pin.lost(position, on.pool());
    if let (Some(tier), Some(slot)) = (&on.tier, lost.and_then(|lost| lost.device)) {
        tier.arena.release(slot);
    }
}

/// Publishes a sealed slot of a device's tier; one that comes second goes.
fn publish_one(
    shared: &Shared,
    on: &Driven,
    tier: &DeviceSide,
    pin: &Pin,
    position: usize,
    slot: &DeviceSlot,
) {
    let id = slot.clone().into_id();
    match pin.set_device(position, on.number, id) {
        true => shared.recorder.add(Counter::DeviceBlocks, 1),
        false => tier.arena.release(id),
    }
}
