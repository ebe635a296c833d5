//! Whether saves encode, how long their slots are cut, and what that came to.
//!
//! What a chunk takes encoded is known only when it is, so slots are cut a little longer than chunks
//! took lately and give their tails back; a chunk that does not fit is saved again, raw, before its
//! pages are free.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stemkv_store::{CodecId, Filling, RecordHeader, Slot};

use crate::config::HostCodec;
use crate::pipeline::{Driven, Shared};
use crate::placement::{CodecCosts, encodes};
use crate::stats::CodecStats;

/// How often the way that was not chosen is tried, to see whether that was right.
const RETRY_SAVES: u32 = 16;
/// RAM counts as full for so long after something had to go.
const FULL_FOR: Duration = Duration::from_secs(60);
/// Slots are cut longer than the last chunks by this part of them.
const MARGIN: usize = 32;
/// Where no more than one chunk in so many does not fit, it is cheaper to save those again than to cut every
/// slot longer.
const FEW: usize = 8;

/// What has been measured so far of the chunks, whichever device brought them.
#[derive(Default)]
pub(crate) struct Packing(Mutex<State>);

#[derive(Clone, Copy, Default)]
struct State {
    /// Raw bytes for a stored one.
    ratio: Option<f64>,
    /// Payload bytes that encoded chunks take.
    payload: Option<usize>,
    evicted: Option<Duration>,
}

impl Packing {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something had to go out of RAM.
    pub(crate) fn evicted(&self, now: Duration) {
        self.state().evicted = Some(now);
    }

    /// `chunks` of a save's `all` did not fit in the slots that were cut for them.
    pub(crate) fn did_not_fit(&self, chunks: usize, all: usize, raw_payload: usize) {
        if chunks * FEW > all {
            self.state().payload = Some(raw_payload);
        }
    }

    /// An encoded save is published.
    pub(crate) fn published(&self, raw_payload: usize, slots: &[(usize, Slot)]) {
        let stored = |(_, slot): &(usize, Slot)| slot.image().len() - RecordHeader::BYTES;
        if slots.is_empty() {
            return;
        }
        let all: usize = slots.iter().map(stored).sum();
        // A chunk that does not shrink says nothing of those that do.
        let shrunken = slots
            .iter()
            .filter(|(_, slot)| slot.codec() != CodecId::Raw);
        let most = shrunken.map(stored).max();
        let ratio = (raw_payload * slots.len()) as f64 / all.max(1) as f64;
        let mut state = self.state();
        // The newest counts a quarter; the longest at once, and shorter ones little by little.
        state.ratio = Some(state.ratio.map_or(ratio, |old| (3.0 * old + ratio) / 4.0));
        if let Some(most) = most {
            state.payload = Some(match state.payload {
                Some(old) if old > most => (3 * old + most) / 4,
                _ => most,
            });
        }
    }

    /// Payload bytes of a slot to be cut for an encoded chunk.
    fn slot_payload(&self, raw_payload: usize) -> usize {
        let usual = self.state().payload.unwrap_or(raw_payload);
        (usual + usual / MARGIN).min(raw_payload)
    }
}

/// The codec that suits the store's values.
fn lossless(shared: &Shared) -> CodecId {
    CodecId::lossless(shared.config.geometry.dtype)
}

/// Would a save of `blocks` blocks by a device be encoded now, and why? Is that to be tried out now and
/// then?
fn choice(shared: &Shared, on: &Driven, blocks: usize) -> (bool, String, bool) {
    let codec = lossless(shared);
    let device = &on.device;
    let fixed = |encoded, why: &str| (encoded, why.to_owned(), false);
    if shared.config.host.codec == HostCodec::Raw {
        return fixed(false, "as configured");
    }
    if !device.encodes(codec) {
        return fixed(
            false,
            "the device does not encode, or not fast enough for its link",
        );
    }
    if !device.decodes(codec) {
        return fixed(false, "the device does not decode");
    }
    if !shared.decodes(codec) {
        return fixed(false, "another device does not decode");
    }
    if shared.config.host.codec == HostCodec::Lossless {
        return fixed(true, "as configured");
    }
    let now = shared.clock.now();
    let State { ratio, evicted, .. } = *shared.packing.state();
    let needed = blocks as u64 * shared.config.image_bytes();
    let by_cpu = device.info().on_cpu;
    let costs = CodecCosts {
        by_cpu,
        save: on.pace.saves.rates(now),
        load: on.pace.loads.rates(now),
        ratio,
        is_full: evicted.is_some_and(|at| now < at + FULL_FOR)
            || (shared.arena.usage().free_bytes as u64) < needed,
        disk: shared.disk_meter.bytes_per_second(),
    };
    let (encoded, why) = encodes(&costs);
    // The CPU never encodes as fast as it copies: all there is to be found out is whether chunks shrink.
    let is_tried = !by_cpu || costs.is_full && !encoded;
    (encoded, why, is_tried)
}

/// The codec of a device's next save, of `blocks` blocks; `None` for raw.
pub(crate) fn next(shared: &Shared, on: &Driven, blocks: usize) -> Option<CodecId> {
    let (chosen, _, is_tried) = choice(shared, on, blocks);
    let saves = on.pace.tried.fetch_add(1, Relaxed) + 1;
    let other = is_tried && saves >= RETRY_SAVES;
    if other {
        on.pace.tried.store(0, Relaxed);
    }
    (chosen != other).then(|| lossless(shared))
}

/// Cuts slots for `count` chunks of a save.
pub(crate) fn allocate(shared: &Shared, codec: Option<CodecId>, count: usize) -> Vec<Filling> {
    let raw_payload = shared.config.geometry.payload_bytes();
    match codec {
        None => shared.allocate(count),
        Some(_) => shared.allocate_slots(shared.packing.slot_payload(raw_payload), count),
    }
}

/// What was chosen for a device, and why.
pub(crate) fn stats(shared: &Shared, on: &Driven) -> CodecStats {
    let name = format!("{:?}", lossless(shared)).to_lowercase();
    let (encoded, why, _) = choice(shared, on, 1);
    let rate = |rate: Option<f64>| match rate {
        Some(rate) => format!("{:.2} GB/s", rate / 1e9),
        None => "not measured yet".to_owned(),
    };
    let loads = on.pace.loads.rates(shared.clock.now());
    let usage = shared.arena.usage();
    let raw = raw_bytes(shared);
    CodecStats {
        save: format!("{}: {why}", if encoded { &name } else { "raw" }),
        load: match shared.decodes(lossless(shared)) {
            true => format!(
                "{name} chunks, decoded by the device: {}; raw chunks: {}",
                rate(loads.encoded),
                rate(loads.raw)
            ),
            false => {
                format!("{name} chunks are decoded on the CPU first: the device does not decode")
            }
        },
        ram: format!(
            "{raw} bytes of raw chunks are held in {}, a factor of {:.2}",
            usage.published_bytes,
            raw as f64 / usage.published_bytes.max(1) as f64
        ),
    }
}

/// What the chunks in RAM would take raw.
pub(crate) fn raw_bytes(shared: &Shared) -> u64 {
    shared.arena.usage().published_slots as u64 * shared.config.image_bytes()
}
