//! What a prompt's match says, and the lease that keeps it there.

use std::sync::Arc;

use crate::index::{Ended, Matched, Pin};
use crate::pipeline::{Driven, HashedPath, Meter, Shared};
use serde::Serialize;

/// How far a prompt's KV is in the store: a report, without any effect.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PrefixMatch {
    /// Leading tokens whose KV is in some tier; a whole number of blocks.
    pub tokens: usize,
    /// Of those, tokens in the tier of the device that the report is for ([`Cache::on_device`]).
    ///
    /// [`Cache::on_device`]: crate::Cache::on_device
    pub device_tokens: usize,
    /// Of those, tokens that come over that device's link: in the host tier, or on another device and not
    /// on disk.
    pub host_tokens: usize,
    /// Of those, tokens that are read from disk: neither on that device nor in the host tier.
    pub disk_tokens: usize,
    /// Tokens right behind the match that another request is saving at this moment.
    pub pending_tokens: usize,
    /// Tokens in full blocks of the prompt: the most that could match.
    pub tokens_asked: usize,
    /// What stands at the first block that did not match.
    pub ended: Ended,
    /// Seconds that loading the match would take, by the speeds measured so far; `None` before
    /// there is anything to go by.
    pub load_seconds: Option<f64>,
    /// Seconds that computing the matched tokens would take, by the engine's stated prefill rate.
    pub recompute_seconds: Option<f64>,
}

impl PrefixMatch {
    pub(crate) fn new(
        shared: &Shared,
        on: &Driven,
        matched: &Matched,
        asked_blocks: usize,
    ) -> Self {
        let block_tokens = shared.config.geometry.block_tokens as usize;
        let mut report = PrefixMatch {
            tokens: matched.blocks * block_tokens,
            device_tokens: matched.device_blocks * block_tokens,
            host_tokens: (matched.blocks - matched.disk_only_blocks - matched.device_blocks)
                * block_tokens,
            disk_tokens: matched.disk_only_blocks * block_tokens,
            pending_tokens: matched.pending_blocks * block_tokens,
            tokens_asked: asked_blocks * block_tokens,
            ended: matched.ended,
            load_seconds: None,
            recompute_seconds: None,
        };
        report.estimate(shared, on);
        report
    }

    /// What the speeds measured so far say of loading it and of computing it.
    fn estimate(&mut self, shared: &Shared, on: &Driven) {
        let token_bytes =
            shared.config.image_bytes() as f64 / f64::from(shared.config.geometry.block_tokens);
        let seconds = |tokens: usize, meter: &Meter| match tokens {
            0 => Some(0.0),
            _ => meter
                .bytes_per_second()
                .map(|rate| tokens as f64 * token_bytes / rate),
        };
        let link = seconds(self.tokens - self.device_tokens, &on.link);
        let local = seconds(self.device_tokens, &on.local);
        let copy = link.zip(local).map(|(link, local)| link.max(local));
        let read = seconds(self.disk_tokens, &shared.disk_meter);
        // The stages overlap, so the slower one decides.
        self.load_seconds = copy.zip(read).map(|(copy, read)| copy.max(read));
        let rate = shared.config.engine.prefill_tokens_per_second;
        self.recompute_seconds = rate.map(|rate| self.tokens as f64 / rate);
    }
}

/// A pin of a prompt's matched prefix: what it covers is not evicted until the lease, and every
/// load and prefetch made with it, is gone. It may still turn out unreadable; then the load is cut.
///
/// Clones are the same lease.
#[derive(Clone)]
pub struct Lease {
    pub(crate) pin: Arc<Pin>,
    pub(crate) path: HashedPath,
    pub(crate) matched: PrefixMatch,
}

impl Lease {
    /// Leading tokens that the lease covers; a whole number of blocks, 0 on a miss.
    pub fn tokens(&self) -> usize {
        self.matched.tokens
    }

    /// How the prompt matched when the lease was taken.
    pub fn matched(&self) -> &PrefixMatch {
        &self.matched
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease")
            .field("matched", &self.matched)
            .finish_non_exhaustive()
    }
}
