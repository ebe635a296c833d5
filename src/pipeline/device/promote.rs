//! Host → device tier: one job for the chunks that are asked for together.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use stemkv_store::{
    DeviceFilling, Direction, Job, JobEvent, Key, RecordHeader, SlabMove, Slot, Urgency,
};

use super::{DeviceSide, Driven, allocate, publish_one};
use crate::ErrorKind;
use crate::index::Pin;
use crate::pipeline::Shared;
use crate::pipeline::landing::Landing;
use crate::placement::is_worth_promoting;
use crate::stats::{Counter, Stage};

/// How a promotion ended.
#[derive(Clone, Copy)]
pub(crate) enum Promoted {
    /// The chunk is in the device tier.
    Ready,
    /// It is not: no room, late, cancelled or failed.
    Missing,
}

/// One chunk on its way up.
#[derive(Default)]
pub(crate) struct Promotion {
    pub(crate) landing: Landing<Promoted>,
}

/// Promotes, of the blocks that a load brought out of the host tier, those that are hot.
pub(crate) fn promote_hot(
    shared: &Arc<Shared>,
    on: &Arc<Driven>,
    pin: &Arc<Pin>,
    blocks: std::ops::Range<usize>,
) {
    let Some(tier) = &on.tier else {
        return;
    };
    let states = pin.states_on(on.number, blocks.clone());
    let hot = blocks
        .zip(&states)
        .filter(|(_, state)| is_worth_promoting(state));
    let chunks: Vec<_> = hot
        .filter_map(|(position, state)| {
            let slot = state.host.and_then(|id| shared.slot(id, &state.key))?;
            Some((position, slot))
        })
        .collect();
    drop(promote(shared, on, tier, pin, chunks, Limits::default()));
}

/// When a promotion is given up.
#[derive(Clone, Default)]
pub(crate) struct Limits {
    /// What has not begun by then, on the store's clock, does not.
    pub(crate) begin_by: Option<Duration>,
    pub(crate) cancelled: Arc<AtomicBool>,
}

/// Copies chunks out of the host tier into a device's, as one job: an answer for each. Those that
/// are under way already are joined.
pub(crate) fn promote(
    shared: &Arc<Shared>,
    on: &Arc<Driven>,
    tier: &DeviceSide,
    pin: &Arc<Pin>,
    chunks: Vec<(usize, Slot)>,
    limits: Limits,
) -> Vec<Arc<Promotion>> {
    let mut all = Vec::with_capacity(chunks.len());
    // Before the lock: what is dropped in here takes it.
    let mut new = Vec::new();
    {
        let mut promoting = tier.promoting();
        for (position, slot) in chunks {
            let key = slot.key();
            let promotion = promoting.entry(key).or_insert_with(|| {
                let promotion = Arc::new(Promotion::default());
                let rising = Rising {
                    on: on.clone(),
                    key,
                    promotion: promotion.clone(),
                };
                new.push((position, slot, rising));
                promotion
            });
            all.push(promotion.clone());
        }
    }
    if new.is_empty() {
        return all;
    }
    let mut fillings = allocate(shared, on, tier, new.len()).into_iter();
    let mut lift = Lift {
        shared: shared.clone(),
        on: on.clone(),
        pin: pin.clone(),
        chunks: Vec::with_capacity(fillings.len()),
        layers_done: 0,
        good: usize::MAX,
        begun: shared.clock.now(),
    };
    let asked = new.len();
    for (position, slot, rising) in new {
        let header = slot.header().ok();
        if let Some(header) = header.filter(|header| on.can_hold(shared, header))
            && let Some(filling) = fillings.next()
        {
            lift.chunks.push(Lifted {
                position,
                header,
                slot,
                filling: Some(filling),
                rising,
            });
        }
    }
    drop(fillings);
    let declined = asked - lift.chunks.len();
    shared.recorder.add(Counter::DeclinedPromotions, declined);
    if let Err(error) = lift.submit(tier, limits) {
        tracing::debug!(%error, "a promotion was declined");
    }
    all
}

/// A chunk's place among those on their way up. Dropped, by a panic too, it is none of them any more, and
/// whoever waits for it is told that it did not arrive.
struct Rising {
    on: Arc<Driven>,
    key: Key,
    promotion: Arc<Promotion>,
}

impl Rising {
    fn arrived(self) {
        self.promotion.landing.land(Promoted::Ready);
    }
}

impl Drop for Rising {
    fn drop(&mut self) {
        if let Some(tier) = &self.on.tier {
            tier.promoting().remove(&self.key);
        }
        // Where it has landed this changes nothing.
        self.promotion.landing.land(Promoted::Missing);
    }
}

/// One job of promotions.
struct Lift {
    shared: Arc<Shared>,
    on: Arc<Driven>,
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
    rising: Rising,
}

impl Lift {
    fn submit(mut self, tier: &DeviceSide, limits: Limits) -> crate::Result<()> {
        if self.chunks.is_empty() {
            return Ok(());
        }
        let (shared, on) = (self.shared.clone(), self.on.clone());
        let geometry = &shared.config.geometry;
        let (mut fillings, mut moves) = (Vec::new(), Vec::new());
        for (index, chunk) in self.chunks.iter_mut().enumerate() {
            fillings.extend(chunk.filling.take());
            moves.push(SlabMove::Load {
                slot: chunk.slot.clone(),
                token: index as u32 * geometry.block_tokens,
            });
        }
        let table = tier.arena.table_to_fill(&fillings)?;
        for (chunk, filling) in self.chunks.iter_mut().zip(fillings) {
            chunk.filling = Some(filling);
        }
        on.transfers.submit(Job {
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
            JobEvent::Begun => {}
            JobEvent::Layer { .. } => self.layers_done += 1,
            JobEvent::Failed {
                good_moves, error, ..
            } => {
                self.good = self.good.min(good_moves);
                match (error.kind(), self.chunks.get(good_moves)) {
                    (ErrorKind::Corrupt, Some(chunk)) => {
                        let offset = chunk.slot.offset();
                        self.shared
                            .drop_corrupt_host(&self.pin, chunk.position, offset);
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
        let (shared, on) = (self.shared.clone(), self.on.clone());
        let Some(tier) = &on.tier else {
            return;
        };
        let took = shared.clock.now().saturating_sub(self.begun);
        let good = self.good.min(self.chunks.len());
        let bytes = good * shared.config.geometry.payload_bytes();
        shared.recorder.time(Stage::Promote, took, bytes as u64);
        for chunk in self.chunks.drain(..good) {
            let sealed = chunk
                .filling
                .and_then(|filling| filling.seal(chunk.header).ok());
            if let Some(slot) = sealed {
                publish_one(&shared, &on, tier, &self.pin, chunk.position, &slot);
                chunk.rising.arrived();
            }
        }
    }
}
