//! Load: device tier and host → pages, layer by layer, with what is on disk alone fetched first.
//!
//! | file | question |
//! |---|---|
//! | `run.rs` | which jobs move it? |
//! | `gather.rs` | what is waited for? |
//! | `progress.rs` | how far is it? |

mod gather;
mod progress;
mod run;

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use serde::Serialize;
use stemkv_store::{Fence, LayerId, PageTable, Stream, Tier};
use tokio::sync::watch;

use self::gather::{Gathering, gather};
use self::progress::{Answer, Progress};
use self::run::{Chunk, Run, Source, Submitted, sources};
use crate::index::{BlockState, Pin};
use crate::pipeline::{Driven, HashedPath, Pages, PagesFree, Shared};
use crate::placement::{Choice, what_pays};
use crate::stats::Counter;
use crate::{Error, ErrorKind, Result};

/// Nobody waits longer where nothing else is said.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// What a load is asked for besides the lease.
#[derive(Clone)]
pub struct LoadOptions {
    /// Tokens below this position are in the pages already and are left alone.
    pub from_token: usize,
    /// How much of the rest to load.
    pub extent: Extent,
    /// Fences to be reached before the first byte is written: the pages may still be read until
    /// then.
    pub after: Vec<Fence>,
    /// The engine's stream, to be ordered behind each layer by [`Load::layer`].
    pub stream: Stream,
    /// What has not begun to be copied by then, from the call on, is left out: on disk, waiting for
    /// `after`, or behind other loads. What has begun is carried through, in every layer. 30 s by default.
    pub deadline: Option<Duration>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            from_token: 0,
            extent: Extent::All,
            after: Vec::new(),
            stream: Stream::HOST,
            deadline: Some(DEADLINE),
        }
    }
}

/// How much of what a lease covers a load takes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Extent {
    /// All of it.
    #[default]
    All,
    /// The prefix of it that is faster loaded than computed, by the speeds measured lately, what is
    /// waiting for each tier now, and the engine's stated prefill rate. What is not measured yet is
    /// loaded. See [`LoadReport::choice`].
    WhatPays,
}

/// What became of a load.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoadReport {
    /// Leading tokens whose KV is whole in the pages, in every layer, counting those that the engine
    /// computed itself ([`Load::computed_up_to`]). At least `from_token`.
    pub tokens: usize,
    /// Tokens the lease covers.
    pub tokens_asked: usize,
    /// Blocks that came from the device tier.
    pub device_blocks: usize,
    /// Blocks that came from the host tier.
    pub host_blocks: usize,
    /// Blocks that had to be fetched from disk first.
    pub disk_blocks: usize,
    /// Blocks that were left to the engine, which had computed them.
    pub computed_blocks: usize,
    /// Slab bytes moved into pages.
    pub bytes: u64,
    /// Why `tokens` is below what the load took on, where it is: the name of an [`ErrorKind`].
    pub cut: Option<String>,
    /// What was taken on and why, for [`Extent::WhatPays`]; its tokens count from `from_token`'s
    /// block on.
    pub choice: Option<Choice>,
    /// From the call to the last byte, seconds.
    pub seconds: f64,
}

/// A load under way. Dropping it cancels it.
///
/// The engine asks for layers in order, each just before it computes that layer. All of it works
/// without a runtime of the caller's own.
#[must_use = "a dropped load is cancelled"]
pub struct Load {
    run: Arc<Run>,
    progress: watch::Receiver<Progress>,
}

pub(crate) fn load(
    shared: &Arc<Shared>,
    on: &Arc<Driven>,
    pin: &Arc<Pin>,
    path: &HashedPath,
    table: PageTable,
    options: LoadOptions,
) -> Result<Load> {
    shared.check_open()?;
    shared.check_lease(pin)?;
    shared.check_pages(on, &table.kv)?;
    let block_tokens = shared.config.geometry.block_tokens as usize;
    let leased = pin.blocks();
    if options.from_token > leased * block_tokens {
        return Err(
            Error::invalid("from_token lies behind what the lease covers")
                .with("from_token", options.from_token)
                .with("leased_tokens", leased * block_tokens),
        );
    }
    table.check(options.from_token as u64..(leased * block_tokens) as u64)?;
    let first = options.from_token / block_tokens;
    let mut states = pin.states_on(on.number, first..leased);
    let choice = match options.extent {
        Extent::All => None,
        Extent::WhatPays => Some(choose(shared, on, &states)),
    };
    if let Some(choice) = &choice {
        states.truncate(choice.tokens / block_tokens);
    }
    let asked = first + states.len();
    let progress = Progress::new(first..asked, shared.config.geometry.layers);
    let (progress, receiver) = watch::channel(progress);
    let run = Arc::new(Run {
        shared: shared.clone(),
        on: on.clone(),
        pin: Mutex::new(Some(pin.clone())),
        table,
        options,
        leased,
        asked,
        choice,
        begun: shared.clock.now(),
        cancelled: Arc::default(),
        cancel: watch::Sender::new(false),
        watermark: watch::Sender::new(0),
        progress,
        pages: watch::Sender::new(Pages::InUse),
        took: OnceLock::new(),
    });
    shared.recorder.add(Counter::Loads, 1);

    let mut sources = sources(shared, on, pin, path, first, &states);
    let at_once = sources
        .iter()
        .take_while(|(_, source)| matches!(source, Source::Host(_) | Source::Device(_)))
        .count();
    let rest = sources.split_off(at_once);
    let chunks = sources.into_iter().filter_map(|(position, source)| {
        let from = source.tier();
        let at = source.ready()?;
        Some(Chunk { position, from, at })
    });
    let reached = first + at_once;
    match run.submit(chunks.collect()) {
        Submitted::All if rest.is_empty() => run.settle_target(reached, None),
        Submitted::All => {
            let gathering = Gathering::new(run.clone(), reached);
            shared.tasks.spawn(gather(gathering, rest));
        }
        Submitted::Part => run.settle_target(reached, Some(ErrorKind::Busy)),
        Submitted::Nothing => run.settle_target(first, Some(ErrorKind::Busy)),
    }
    Ok(Load {
        run,
        progress: receiver,
    })
}

/// How many of some blocks are worth loading now.
fn choose(shared: &Shared, on: &Driven, states: &[BlockState]) -> Choice {
    let fastest = |state: &BlockState| match state.residency().fastest() {
        Some(tier) => tier,
        // On another device alone: it comes by the host tier.
        None => Tier::Host,
    };
    what_pays(states.iter().map(fastest), &shared.costs(on))
}

impl Load {
    /// How many leading tokens are coming, once that is known: what is on disk alone has arrived,
    /// failed or passed the deadline. The engine computes the rest. At most what the lease covers,
    /// at least `from_token`. Counts those that the engine said it had computed.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn tokens(&self) -> usize {
        let mut progress = self.progress.clone();
        let known = progress.wait_for(|progress| progress.target.is_some());
        let target = known.await.ok().and_then(|progress| progress.target);
        let target = target.unwrap_or(0);
        let block_tokens = self.run.shared.config.geometry.block_tokens as usize;
        (target * block_tokens).max(self.run.options.from_token)
    }

    /// [`Load::tokens`] for a thread.
    pub fn tokens_blocking(&self) -> usize {
        pollster::block_on(self.tokens())
    }

    /// Waits until layer `layer` of all [`Load::tokens`] is verified and on its way, and orders the
    /// engine's stream behind it: on a GPU the stream waits, not the host. A GPU verifies on the way, so
    /// there a damaged layer is known only behind it: use what was computed from the load once
    /// [`Load::finish`] calls its tokens whole.
    ///
    /// # Errors
    /// `Corrupt`, `Unavailable` or `Busy` where the layer did not come: the engine must discard the
    /// forward pass that this load feeds, also what it computed on earlier layers, and compute the
    /// tokens that [`Load::finish`] does not call whole. `Invalid` for a layer out of range.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn layer(&self, layer: u32) -> Result<()> {
        if layer >= self.run.shared.config.geometry.layers {
            return Err(Error::invalid("no such layer").with("layer", layer));
        }
        let layer = LayerId(layer);
        let mut progress = self.progress.clone();
        let answered = progress
            .wait_for(|progress| !matches!(progress.answer(layer), Answer::Later))
            .await;
        let answer = match &answered {
            Ok(progress) => progress.answer(layer),
            Err(_) => Answer::Missing,
        };
        drop(answered);
        match answer {
            Answer::Ready(fences) => {
                let (device, stream) = (&self.run.on.device, self.run.options.stream);
                fences
                    .iter()
                    .try_for_each(|fence| device.order(stream, fence))
            }
            Answer::Failed(kind) => {
                Err(Error::new(kind, "the layer could not be loaded").with("layer", layer))
            }
            Answer::Later | Answer::Missing => {
                Err(Error::unavailable("the load was cancelled").with("layer", layer))
            }
        }
    }

    /// [`Load::layer`] for a thread.
    ///
    /// # Errors
    /// As [`Load::layer`].
    pub fn layer_blocking(&self, layer: u32) -> Result<()> {
        pollster::block_on(self.layer(layer))
    }

    /// The engine has computed, or is about to compute, the tokens below prompt position `tokens`: what
    /// has not been submitted of their blocks is not loaded any more, and not read from disk where
    /// that has not begun.
    ///
    /// Returns the tokens, up to that position, that this load leaves to the engine; of others below it
    /// the copies have begun, or are done. Those are loaded in every layer, and the engine must not
    /// write to their pages before [`Load::pages_free`].
    pub fn computed_up_to(&self, tokens: usize) -> Range<usize> {
        let block_tokens = self.run.shared.config.geometry.block_tokens as usize;
        let watermark = tokens / block_tokens;
        let mut own = 0..0;
        self.run
            .progress
            .send_modify(|progress| own = progress.computed(watermark));
        self.run
            .watermark
            .send_modify(|position| *position = watermark.max(*position));
        own.start * block_tokens..own.end * block_tokens
    }

    /// Whether it comes whole, for who depends on it; outlives the handle.
    pub(in crate::pipeline) fn arrival(&self) -> Arrival {
        Arrival(self.progress.clone())
    }

    /// Waits until the last byte has arrived, and says which tokens are whole.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the load.
    pub async fn finish(self) -> LoadReport {
        // Lost pages are reported by `pages_free`; here they are tokens that did not come.
        let _ = self.pages_free().wait().await;
        self.run.report()
    }

    /// [`Load::finish`] for a thread.
    pub fn finish_blocking(self) -> LoadReport {
        pollster::block_on(self.finish())
    }

    /// Tells when the pages are the engine's again; works also after the load was dropped.
    pub fn pages_free(&self) -> PagesFree {
        PagesFree(self.run.pages.subscribe())
    }

    /// Cancels: nothing that has not begun will. The pages are free a little later.
    pub fn cancel(self) -> PagesFree {
        self.pages_free()
    }
}

/// Tells whether all tokens that a load said were coming are whole.
#[derive(Clone)]
pub(in crate::pipeline) struct Arrival(watch::Receiver<Progress>);

impl Arrival {
    /// `None` while the load is under way. One that vanished did not come.
    pub(in crate::pipeline) fn is_whole(&self) -> Option<bool> {
        let progress = self.0.borrow();
        match progress.is_settled() {
            true => Some(progress.is_whole()),
            false => self.0.has_changed().is_err().then_some(false),
        }
    }

    pub(in crate::pipeline) async fn wait(mut self) -> bool {
        let settled = self.0.wait_for(Progress::is_settled).await;
        settled.is_ok_and(|progress| progress.is_whole())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.run.cancelled.store(true, Ordering::Release);
        self.run.cancel.send_replace(true);
    }
}
