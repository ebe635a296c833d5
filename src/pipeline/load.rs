//! Load: host → pages, layer by layer, with what is on disk alone fetched first.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde::Serialize;
use stemkv_store::{Direction, Fence, Job, JobEvent, LayerId, PageTable, SlabMove, Slot, Stream};
use tokio::sync::watch;

use crate::index::Pin;
use crate::pipeline::reader::{self, Arrival, Ticket};
use crate::pipeline::{HashedPath, Pages, PagesFree, Priority, Shared};
use crate::stats::{Counter, Stage};
use crate::{Error, ErrorKind, Result};

/// What a load is asked for besides the lease.
#[derive(Clone)]
pub struct LoadOptions {
    /// Tokens below this position are in the pages already and are left alone.
    pub from_token: usize,
    /// Fences to be reached before the first byte is written: the pages may still be read until
    /// then.
    pub after: Vec<Fence>,
    /// The engine's stream, to be ordered behind each layer by [`Load::layer`].
    pub stream: Stream,
    /// How long to wait for what is on disk alone; what has not arrived by then is left out.
    pub deadline: Option<Duration>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            from_token: 0,
            after: Vec::new(),
            stream: Stream::HOST,
            deadline: None,
        }
    }
}

/// What became of a load.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoadReport {
    /// Leading tokens whose KV is whole in the pages, in every layer. At least `from_token`.
    pub tokens: usize,
    /// Tokens the lease covers.
    pub tokens_asked: usize,
    /// Blocks that came from the host tier.
    pub host_blocks: usize,
    /// Blocks that had to be fetched from disk first.
    pub disk_blocks: usize,
    /// Slab bytes moved into pages.
    pub bytes: u64,
    /// Why `tokens` is below `tokens_asked`, where it is: the name of an [`ErrorKind`].
    pub cut: Option<String>,
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

/// One load, as its jobs and its gathering task see it.
struct Run {
    shared: Arc<Shared>,
    /// Given up before the pages are reported free: who waited for that finds nothing pinned.
    pin: Mutex<Option<Arc<Pin>>>,
    table: PageTable,
    options: LoadOptions,
    /// The block that `from_token` lies in: the first to be moved.
    first: usize,
    asked: usize,
    begun: Duration,
    cancelled: Arc<AtomicBool>,
    cancel: watch::Sender<bool>,
    progress: watch::Sender<Progress>,
    pages: watch::Sender<Pages>,
    from_disk: AtomicUsize,
    /// From the call to the last byte, once that is known.
    took: OnceLock<Duration>,
}

struct Progress {
    /// One past the last block that is coming; known once everything has arrived or failed.
    target: Option<usize>,
    jobs_open: usize,
    layers: Vec<LayerProgress>,
    /// The first layer that failed, one past the last block that is whole in spite of it, and why.
    failed: Option<(LayerId, usize, ErrorKind)>,
    cut: Option<ErrorKind>,
    /// A copy did not end in time.
    lost: bool,
}

#[derive(Default)]
struct LayerProgress {
    blocks: usize,
    fences: Vec<Fence>,
}

impl Progress {
    fn is_settled(&self) -> bool {
        self.target.is_some() && self.jobs_open == 0
    }

    /// Can the answer for `layer` be given?
    fn is_answered(&self, layer: LayerId, first: usize) -> bool {
        self.failed
            .as_ref()
            .is_some_and(|(failed, ..)| *failed <= layer)
            || self
                .target
                .is_some_and(|target| self.layers[layer.0 as usize].blocks >= target - first)
            || self.is_settled()
    }
}

/// Where a block's chunk comes from.
enum Source {
    Host(Slot),
    Disk(Ticket),
    Missing,
}

pub(crate) fn load(
    shared: &Arc<Shared>,
    pin: &Arc<Pin>,
    path: &HashedPath,
    table: PageTable,
    options: LoadOptions,
) -> Result<Load> {
    shared.check_open()?;
    let block_tokens = shared.config.geometry.block_tokens as usize;
    let asked = pin.blocks();
    if options.from_token > asked * block_tokens {
        return Err(
            Error::invalid("from_token lies behind what the lease covers")
                .with("from_token", options.from_token)
                .with("leased_tokens", asked * block_tokens),
        );
    }
    table.check(options.from_token as u64..(asked * block_tokens) as u64)?;
    let first = options.from_token / block_tokens;
    let layers = (0..shared.config.geometry.layers)
        .map(|_| LayerProgress::default())
        .collect();
    let progress = Progress {
        target: None,
        jobs_open: 0,
        layers,
        failed: None,
        cut: None,
        lost: false,
    };
    let (progress, receiver) = watch::channel(progress);
    let run = Arc::new(Run {
        shared: shared.clone(),
        pin: Mutex::new(Some(pin.clone())),
        table,
        options,
        first,
        asked,
        begun: shared.clock.now(),
        cancelled: Arc::default(),
        cancel: watch::Sender::new(false),
        progress,
        pages: watch::Sender::new(Pages::InUse),
        from_disk: AtomicUsize::new(0),
        took: OnceLock::new(),
    });
    shared.recorder.add(Counter::Loads, 1);

    let mut sources = run.sources(pin, path);
    let on_host = sources
        .iter()
        .take_while(|source| matches!(source, Source::Host(_)))
        .count();
    let rest = sources.split_off(on_host);
    let slots = sources.into_iter().filter_map(|source| match source {
        Source::Host(slot) => Some(slot),
        Source::Disk(_) | Source::Missing => None,
    });
    let loaded = run.submit(first, slots.collect());
    match rest.is_empty() || !loaded {
        true => run.settle_target(
            if loaded { first + on_host } else { first },
            (!loaded).then_some(ErrorKind::Busy),
        ),
        false => {
            let gathering = Gathering {
                run: run.clone(),
                submitted: first + on_host,
                cut: Some(ErrorKind::Unavailable),
            };
            shared.tasks.spawn(gather(gathering, rest));
        }
    }
    Ok(Load {
        run,
        progress: receiver,
    })
}

impl Run {
    fn pin(&self) -> MutexGuard<'_, Option<Arc<Pin>>> {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where each block from `first` on comes from; asks for those on disk.
    fn sources(&self, pin: &Arc<Pin>, path: &HashedPath) -> Vec<Source> {
        let states = pin.states(self.first..self.asked);
        let host = |state: &crate::index::BlockState| {
            state.host.and_then(|id| self.shared.slot(id, &state.key))
        };
        let mut sources: Vec<Option<Source>> = states
            .iter()
            .map(|state| host(state).map(Source::Host))
            .collect();
        let wanted: Vec<_> = states
            .iter()
            .enumerate()
            .filter(|(i, _)| sources[*i].is_none())
            .map_while(|(i, state)| state.record.map(|record| (self.first + i, record)))
            .collect();
        if let Some(disk) = self.shared.disk.as_ref().filter(|_| !wanted.is_empty()) {
            let tickets = reader::request(&self.shared, disk, pin, path, &wanted, Priority::DEMAND);
            for ((position, _), ticket) in wanted.iter().zip(tickets) {
                sources[position - self.first] = Some(Source::Disk(ticket));
            }
        }
        sources
            .into_iter()
            .map(|source| source.unwrap_or(Source::Missing))
            .collect()
    }

    /// Hands a run of chunks to the transfer queue; `false` where it is full or closed.
    fn submit(self: &Arc<Self>, from: usize, slots: Vec<Slot>) -> bool {
        if slots.is_empty() {
            return true;
        }
        let (blocks, block_tokens) = (slots.len(), self.shared.config.geometry.block_tokens);
        let moves = slots.into_iter().enumerate();
        let moves = moves.map(|(i, slot)| SlabMove::Load {
            slot,
            token: (from + i) as u32 * block_tokens,
        });
        self.progress
            .send_modify(|progress| progress.jobs_open += 1);
        let (run, submitted) = (self.clone(), self.shared.clock.now());
        let mut layers_moved = 0;
        let job = Job {
            direction: Direction::Load,
            layers: 0..self.shared.config.geometry.layers,
            table: self.table.clone(),
            moves: moves.collect(),
            from_token: self.options.from_token as u32,
            after: self.options.after.clone(),
            events: Box::new(move |event| {
                layers_moved += u64::from(matches!(event, JobEvent::Layer { .. }));
                run.event(from, blocks, layers_moved, submitted, event);
            }),
            cancelled: self.cancelled.clone(),
        };
        let accepted = self.shared.transfers.submit(job);
        if let Err(error) = &accepted {
            tracing::debug!(%error, "a load was declined");
            self.progress
                .send_modify(|progress| progress.jobs_open -= 1);
        }
        accepted.is_ok()
    }

    /// Called from the transfer thread.
    fn event(
        &self,
        from: usize,
        blocks: usize,
        layers_moved: u64,
        submitted: Duration,
        event: JobEvent,
    ) {
        match event {
            JobEvent::Layer { layer, fence, .. } => self.progress.send_modify(|progress| {
                let layer = &mut progress.layers[layer.0 as usize];
                layer.blocks += blocks;
                layer.fences.push(fence);
            }),
            JobEvent::Failed {
                layer,
                good_moves,
                error,
            } => {
                tracing::warn!(%error, %layer, "a layer could not be loaded");
                match error.kind() {
                    ErrorKind::Corrupt => {
                        if let Some(pin) = self.pin().clone() {
                            self.shared.drop_corrupt_host(&pin, from + good_moves);
                        }
                    }
                    _ => self.shared.recorder.add(Counter::TransferErrors, 1),
                }
                self.progress.send_modify(|progress| {
                    // Later layers of this job were not moved, so none of its blocks is whole.
                    let whole = progress
                        .failed
                        .map_or(from, |(_, whole, _)| whole.min(from));
                    let earliest = progress
                        .failed
                        .map_or(layer, |(earliest, ..)| earliest.min(layer));
                    progress.failed = Some((earliest, whole, error.kind()));
                });
            }
            JobEvent::Done { settled } => {
                let layer_bytes = self.shared.config.geometry.slab_bytes() as u64;
                self.progress.send_modify(|progress| {
                    progress.jobs_open -= 1;
                    progress.lost |= !settled;
                });
                let took = self.shared.clock.now().saturating_sub(submitted);
                let bytes = layer_bytes * layers_moved * blocks as u64;
                self.shared.recorder.time(Stage::LoadCopy, took, bytes);
                self.settle_pages();
            }
        }
    }

    fn settle_target(&self, target: usize, cut: Option<ErrorKind>) {
        self.progress.send_modify(|progress| {
            progress.target = Some(target);
            progress.cut = cut;
        });
        self.settle_pages();
    }

    /// Once nothing is under way and nothing more will come, the pages are the engine's again.
    fn settle_pages(&self) {
        let pages = match &*self.progress.borrow() {
            progress if !progress.is_settled() => return,
            progress if progress.lost => Pages::Lost,
            _ => Pages::Free,
        };
        // Whoever takes the pin is the one that settles.
        if self.pin().take().is_none() {
            return;
        }
        let took = self.shared.clock.now().saturating_sub(self.begun);
        let took = *self.took.get_or_init(|| took);
        let report = self.report();
        let recorder = &self.shared.recorder;
        recorder.time(Stage::Load, took, report.bytes);
        recorder.add(
            Counter::LoadedTokens,
            report.tokens - self.options.from_token,
        );
        recorder.add(Counter::LoadsCut, usize::from(report.cut.is_some()));
        self.pages.send_replace(pages);
    }

    fn report(&self) -> LoadReport {
        let progress = self.progress.borrow();
        let geometry = &self.shared.config.geometry;
        let block_tokens = geometry.block_tokens as usize;
        let target = progress.target.unwrap_or(self.first);
        // A cancelled job ends without its later layers.
        let layered = progress
            .layers
            .iter()
            .map(|layer| self.first + layer.blocks)
            .min()
            .unwrap_or(target);
        let whole = progress
            .failed
            .map_or(target, |(_, whole, _)| whole.min(target))
            .min(layered.max(self.first));
        let from_disk = self
            .from_disk
            .load(Ordering::Relaxed)
            .min(whole - self.first);
        let cut = match progress.failed {
            Some((_, _, kind)) => Some(kind),
            None if whole < self.asked => progress.cut.or(Some(ErrorKind::Unavailable)),
            None => None,
        };
        let moved: usize = progress.layers.iter().map(|layer| layer.blocks).sum();
        LoadReport {
            tokens: (whole * block_tokens).max(self.options.from_token),
            tokens_asked: self.asked * block_tokens,
            host_blocks: whole - self.first - from_disk,
            disk_blocks: from_disk,
            bytes: (moved * geometry.slab_bytes()) as u64,
            cut: cut.map(|kind| kind.to_string()),
            seconds: self.took.get().map_or(0.0, Duration::as_secs_f64),
        }
    }
}

/// Says what is coming when the gathering ends, also where its runtime ends first.
struct Gathering {
    run: Arc<Run>,
    /// One past the last block that was handed to the transfer queue.
    submitted: usize,
    cut: Option<ErrorKind>,
}

impl Gathering {
    /// Hands over what has arrived; `false` where the queue is full or closed.
    fn submit(&mut self, ready: &mut Vec<Slot>) -> bool {
        let blocks = ready.len();
        let accepted = self.run.submit(self.submitted, std::mem::take(ready));
        if accepted {
            self.submitted += blocks;
        }
        accepted
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        self.run.settle_target(self.submitted, self.cut);
    }
}

/// Waits for what is on disk, block by block in prompt order, and submits what has arrived.
async fn gather(mut gathering: Gathering, sources: Vec<Source>) {
    let run = gathering.run.clone();
    let mut cancel = run.cancel.subscribe();
    let give_up = async {
        match run.options.deadline {
            Some(deadline) => {
                tokio::select! {
                    _ = cancel.wait_for(|cancelled| *cancelled) => {}
                    () = tokio::time::sleep(deadline) => {}
                }
            }
            None => drop(cancel.wait_for(|cancelled| *cancelled).await),
        }
    };
    tokio::pin!(give_up);
    let (mut ready, mut cut) = (Vec::new(), None);
    for source in sources {
        let arrival = match source {
            Source::Host(slot) => Arrival::Ready(slot),
            Source::Missing => Arrival::Missing(ErrorKind::Unavailable),
            Source::Disk(ticket) => {
                run.from_disk.fetch_add(1, Ordering::Relaxed);
                match ticket.arrived() {
                    Some(arrival) => arrival,
                    None => {
                        if !gathering.submit(&mut ready) {
                            cut = Some(ErrorKind::Busy);
                            break;
                        }
                        tokio::select! {
                            biased;
                            arrival = ticket.arrival() => arrival,
                            () = &mut give_up => Arrival::Missing(ErrorKind::Busy),
                        }
                    }
                }
            }
        };
        match arrival {
            Arrival::Ready(slot) => ready.push(slot),
            Arrival::Missing(kind) => {
                cut = Some(kind);
                break;
            }
        }
    }
    if !gathering.submit(&mut ready) {
        cut = Some(ErrorKind::Busy);
    }
    gathering.cut = cut;
}

impl Load {
    /// How many leading tokens are coming, once that is known: what is on disk alone has arrived,
    /// failed or passed the deadline. The engine computes the rest. At most what the lease covers,
    /// at least `from_token`.
    ///
    /// # Cancel safety
    /// May be dropped and called again.
    pub async fn tokens(&self) -> usize {
        let mut progress = self.progress.clone();
        let target = match progress
            .wait_for(|progress| progress.target.is_some())
            .await
        {
            Ok(progress) => progress.target.unwrap_or(self.run.first),
            Err(_) => self.run.first,
        };
        let block_tokens = self.run.shared.config.geometry.block_tokens as usize;
        (target * block_tokens).max(self.run.options.from_token)
    }

    /// [`Load::tokens`] for a thread.
    pub fn tokens_blocking(&self) -> usize {
        pollster::block_on(self.tokens())
    }

    /// Waits until layer `layer` of all [`Load::tokens`] is verified and on its way, and orders the
    /// engine's stream behind it: on a GPU the stream waits, not the host.
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
        let (layer, first) = (LayerId(layer), self.run.first);
        let mut progress = self.progress.clone();
        let answered = progress
            .wait_for(|progress| progress.is_answered(layer, first))
            .await;
        let fences = match answered {
            Err(_) => return Err(Error::internal("a load ended without an answer")),
            Ok(progress) => {
                let state = &progress.layers[layer.0 as usize];
                let complete = progress
                    .target
                    .is_some_and(|target| state.blocks >= target - first);
                match &progress.failed {
                    Some((failed, _, kind)) if *failed <= layer => {
                        return Err(
                            Error::new(*kind, "the layer could not be loaded").with("layer", layer)
                        );
                    }
                    _ if !complete => {
                        return Err(
                            Error::unavailable("the load was cancelled").with("layer", layer)
                        );
                    }
                    _ => state.fences.clone(),
                }
            }
        };
        fences
            .iter()
            .try_for_each(|fence| self.run.shared.device.order(self.run.options.stream, fence))
    }

    /// [`Load::layer`] for a thread.
    ///
    /// # Errors
    /// As [`Load::layer`].
    pub fn layer_blocking(&self, layer: u32) -> Result<()> {
        pollster::block_on(self.layer(layer))
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

impl Drop for Load {
    fn drop(&mut self) {
        self.run.cancelled.store(true, Ordering::Release);
        self.run.cancel.send_replace(true);
    }
}
