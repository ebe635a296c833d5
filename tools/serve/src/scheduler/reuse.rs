//! Where stemkv meets the scheduler: everything that reuses or saves KV goes through here.
//!
//! Nothing of it can fail a request: what the store cannot do is a miss.

use std::time::{Duration, Instant};

use stemkv::{
    Cache, Lease, Load, LoadOptions, OpenNamespace, PagesFree, Prefetch, PrefetchGoal, Save,
};
use stemkv_store::{Fence, LayerId, PageTable, Result};

use crate::model::LayerHooks;

/// How long a request waits for KV that is on disk alone; what is late is computed.
const DISK_DEADLINE: Duration = Duration::from_secs(5);

/// The store, as the scheduler uses it.
pub struct Reuse {
    /// The store itself.
    pub cache: Cache,
    /// The model's namespace.
    pub namespace: OpenNamespace,
    /// Compute each layer as soon as its own KV has been loaded, rather than when all has.
    pub overlap: bool,
}

/// A waiting request's hold on what is known of its prompt: pinned, and on its way into RAM.
pub(super) struct Hold {
    prefetch: Option<Prefetch>,
    _lease: Lease,
}

impl Hold {
    /// Is everything in RAM that will be?
    pub(super) fn is_ready(&self) -> bool {
        self.prefetch.as_ref().is_none_or(Prefetch::is_finished)
    }
}

impl Reuse {
    /// Pins what is known of a prompt and brings it into RAM.
    pub(super) fn hold(&self, tokens: &[u32]) -> Option<Hold> {
        let lease = self.lease(tokens)?;
        let prefetch = (lease.matched().disk_tokens > 0)
            .then(|| known(self.cache.prefetch(&lease, PrefetchGoal::default())))
            .flatten();
        Some(Hold {
            prefetch,
            _lease: lease,
        })
    }

    /// Begins to load what is known of a prompt, but for its last token, whose logits are needed.
    pub(super) fn load(&self, tokens: &[u32], table: PageTable) -> Option<Load> {
        let lease = self.lease(tokens)?;
        let options = LoadOptions {
            deadline: Some(DISK_DEADLINE),
            ..LoadOptions::default()
        };
        known(self.cache.load(&lease, table, options))
    }

    /// Begins to save the full blocks of `tokens`; `None` where there is nothing new among them. What is
    /// computed from a load that is still under way counts once that is whole.
    pub(super) fn save(
        &self,
        tokens: &[u32],
        table: PageTable,
        under_way: Option<&Load>,
    ) -> Option<Save> {
        let save = known(self.cache.save(&mut self.namespace.prompt(tokens), table))?;
        if let Some(load) = under_way {
            known(save.computed_from(load))?;
        }
        (save.report().new_blocks > 0).then_some(save)
    }

    /// Tokens of full blocks among `tokens`.
    pub(super) fn whole(&self, tokens: usize) -> usize {
        let block = self.cache.config().geometry.block_tokens as usize;
        tokens / block * block
    }

    fn lease(&self, tokens: &[u32]) -> Option<Lease> {
        let (_, known_part) = tokens.split_last()?;
        let lease = known(self.cache.lease(&mut self.namespace.prompt(known_part)))?;
        (lease.tokens() > 0).then_some(lease)
    }
}

/// Logs what the store could not do.
fn known<T>(result: Result<T>) -> Option<T> {
    result
        .inspect_err(|error| tracing::warn!(?error, "going on without the store"))
        .ok()
}

/// One pass of a prefill: waits for each layer that is being loaded, hands over each layer that is
/// being saved.
pub(super) struct PassHooks<'a> {
    pub(super) load: Option<&'a Load>,
    pub(super) save: Option<&'a Save>,
    /// Time spent waiting for loaded layers.
    pub(super) waited: Duration,
}

impl LayerHooks for PassHooks<'_> {
    fn before_attention(&mut self, layer: LayerId) -> Result<()> {
        let Some(load) = self.load else {
            return Ok(());
        };
        let begun = Instant::now();
        let loaded = load.layer_blocking(layer.0);
        self.waited += begun.elapsed();
        loaded
    }

    fn written(&mut self, layer: LayerId) {
        if let Some(save) = self.save {
            known(save.layer(layer.0, Fence::reached()));
        }
    }
}

/// Copies that may still touch a sequence's pages.
#[derive(Default)]
pub(super) struct Copies {
    under_way: Vec<PagesFree>,
    lost: bool,
}

impl Copies {
    pub(super) fn add(&mut self, pages_free: PagesFree) {
        self.under_way.push(pages_free);
    }

    /// Is none of them under way any more, as far as will ever be known?
    pub(super) fn are_done(&mut self) -> bool {
        self.under_way.retain(|pages| {
            let is_lost = pages.is_lost();
            self.lost |= is_lost;
            !is_lost && !pages.is_free()
        });
        self.under_way.is_empty()
    }

    /// Did one of those that are done never end? The device may touch the pages for ever.
    pub(super) fn is_any_lost(&self) -> bool {
        self.lost
    }
}
