//! Pages → device tier, beside the way of a save into the host tier.

use std::sync::Arc;

use stemkv_store::{DeviceFilling, SlabEntry, SlabMove, Slot};

use super::{Driven, allocate, publish_one};
use crate::index::Pin;
use crate::pipeline::{HashedPath, Shared};

/// The save of one prompt's new blocks into its device's tier, beside that into the host tier.
pub(crate) struct Keeping {
    fillings: Vec<(usize, DeviceFilling)>,
    layers_done: u32,
    /// By layer, where the device knows them.
    slabs: Vec<Vec<SlabEntry>>,
    pub(crate) failed: bool,
}

impl Keeping {
    /// Room for the first of some blocks, as many as there is; `None` where that is none.
    pub(crate) fn new(shared: &Arc<Shared>, on: &Arc<Driven>, positions: &[usize]) -> Option<Self> {
        let tier = on.tier.as_ref()?;
        let fillings = allocate(shared, on, tier, positions.len());
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
        on: &Driven,
        pin: &Pin,
        path: &HashedPath,
        published: &[(usize, Slot)],
    ) {
        let Some(tier) = &on.tier else {
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
            if !on.can_hold(shared, &header) || self.slabs.iter().enumerate().any(differs) {
                continue;
            }
            if let Ok(slot) = filling.seal(header) {
                publish_one(shared, on, tier, pin, position, &slot);
            }
        }
    }
}
