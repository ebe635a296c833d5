//! Many requests, one model thread.
//!
//! A request waits in a bounded queue, pinned and prefetched as far as the store knows it. The
//! thread admits it when there are pages for its longest outcome, then alternates: one pass of the
//! oldest prefill that need not wait for the disk, one decode step of all sequences together. The
//! receiver of a request's events is its life line: dropped, the request is cancelled, and its
//! pages are free as soon as no copy touches them.

mod output;
mod pages;
mod reuse;
mod sequence;

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use metrics::{counter, gauge};
use stemkv_store::{Error, HostPages, PageId, Result};
use tokio::sync::mpsc;

use crate::model::{Model, Rows, Sampling, Tokenizer};
use pages::PagePool;
pub use reuse::Reuse;
use sequence::{Engine, Retired, Sequence};

/// Tokens of one page.
pub const PAGE_TOKENS: u32 = 16;

/// Tokens of one block: what SmolLM2's chunks then have, 1.4 MiB, suits a disk, and the part of a
/// prompt behind its last full block stays cheap to compute.
pub const BLOCK_TOKENS: u32 = 64;

/// How long the model thread sleeps while only copies are under way.
const COPY_POLL: Duration = Duration::from_millis(2);

/// The bounds of a scheduler.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of KV in the engine's pages, all sequences together.
    pub kv_tokens: usize,
    /// Tokens of one sequence, its answer included.
    pub context_tokens: usize,
    /// Sequences in the model at once.
    pub running_max: usize,
    /// Requests that may wait.
    pub waiting_max: usize,
}

/// What to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Tokens to generate at most, at least 1.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// The answer ends before the first of these.
    pub stop: Vec<String>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model or a stop string ended it.
    Stop,
    /// `max_tokens` was reached.
    Length,
}

/// Token counts of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Tokens of the prompt whose KV was not computed.
    pub cached_tokens: usize,
}

/// What a request's receiver gets.
#[derive(Debug)]
pub enum Event {
    /// A token was generated.
    Token {
        /// The token.
        token: u32,
        /// The text that it completes, possibly none.
        text: String,
    },
    /// The last event of a request that went well.
    Done {
        /// Text that was held back until now.
        text: String,
        /// Why it ended.
        reason: FinishReason,
        /// Its token counts.
        usage: Usage,
    },
    /// The last event of one that did not.
    Failed(Error),
}

/// A snapshot of what is where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Occupancy {
    /// Requests that wait.
    pub waiting: usize,
    /// Sequences in the model.
    pub running: usize,
    /// Free pages.
    pub pages_free: usize,
    /// All pages, but for those that a hanging device may touch for ever.
    pub pages: usize,
}

/// The front of the model thread.
pub struct Scheduler {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    engine: Engine,
    limits: Limits,
    pool: Arc<PagePool>,
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Sequence>,
    running: usize,
    closed: bool,
}

impl Scheduler {
    /// Starts the model thread.
    ///
    /// # Errors
    /// `Invalid` where a limit is too low, named; `Unavailable` where memory or the thread
    /// cannot be had.
    pub fn start(
        model: Model,
        tokenizer: Tokenizer,
        reuse: Option<Reuse>,
        limits: Limits,
    ) -> Result<Scheduler> {
        for (name, value, least) in [
            ("kv_tokens", limits.kv_tokens, PAGE_TOKENS as usize),
            (
                "context_tokens",
                limits.context_tokens,
                PAGE_TOKENS as usize,
            ),
            ("running_max", limits.running_max, 1),
            ("waiting_max", limits.waiting_max, 1),
        ] {
            if value < least {
                return Err(
                    Error::invalid(format!("{name} must be at least {least}")).with("value", value)
                );
            }
        }
        let pages = limits.kv_tokens.div_ceil(PAGE_TOKENS as usize) as u32;
        let kv = HostPages::new(&model.geometry(BLOCK_TOKENS)?, PAGE_TOKENS, pages)?;
        let engine = Engine {
            model,
            tokenizer,
            kv,
            reuse,
        };
        warm_up(&engine)?;
        let shared = Arc::new(Shared {
            engine,
            limits,
            pool: PagePool::new(pages),
            queue: Mutex::default(),
            wake: Condvar::new(),
        });
        let engine = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("model".to_owned())
            .spawn(move || engine.run())
            .map_err(|error| {
                Error::unavailable("cannot start the model thread").caused_by(error)
            })?;
        Ok(Scheduler {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Queues a request. Dropping the receiver cancels it.
    ///
    /// # Errors
    /// `Invalid` where it cannot fit, with the numbers; `Busy` where too many wait; `Closed`.
    pub fn submit(&self, request: Request) -> Result<mpsc::UnboundedReceiver<Event>> {
        let shared = &self.shared;
        let tokens = request.prompt.len().saturating_add(request.max_tokens);
        let (limits, fits) = (&shared.limits, self.context_tokens());
        if request.prompt.is_empty() || request.max_tokens == 0 {
            return Err(Error::invalid(
                "a request needs a prompt, and at least one token to generate",
            ));
        }
        if tokens > fits {
            return Err(Error::invalid(
                "the prompt and its answer do not fit the context: shorten the prompt or max_tokens",
            )
            .with("prompt_tokens", request.prompt.len())
            .with("max_tokens", request.max_tokens)
            .with("context", fits));
        }
        // Looked at before the store is asked, and again when the place is taken.
        self.shared.lock().check(limits)?;
        let hold = shared
            .engine
            .reuse
            .as_ref()
            .and_then(|reuse| reuse.hold(&request.prompt));
        let (events, receiver) = mpsc::unbounded_channel();
        let sequence = Sequence::new(request, events, hold);
        let mut queue = shared.lock();
        queue.check(limits)?;
        queue.waiting.push_back(sequence);
        drop(queue);
        counter!("serve_requests_total").increment(1);
        shared.wake.notify_one();
        Ok(receiver)
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.shared.engine.tokenizer
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.shared.engine.model
    }

    /// The store, where there is one.
    pub fn reuse(&self) -> Option<&Reuse> {
        self.shared.engine.reuse.as_ref()
    }

    /// Tokens of the longest sequence that fits, its answer included. Less once pages are lost.
    pub fn context_tokens(&self) -> usize {
        let pages = self.shared.pool.total();
        let limit = self.shared.limits.context_tokens;
        limit.min(pages * PAGE_TOKENS as usize)
    }

    /// Does it take no requests any more, because it was closed or its thread has ended?
    pub fn is_closed(&self) -> bool {
        self.shared.lock().closed
    }

    /// What is where now.
    pub fn occupancy(&self) -> Occupancy {
        let queue = self.shared.lock();
        Occupancy {
            waiting: queue.waiting.len(),
            running: queue.running,
            pages_free: self.shared.pool.free(),
            pages: self.shared.pool.total(),
        }
    }

    /// Refuses new requests, ends those under way with `Closed`, and waits for the model thread.
    pub fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.wake.notify_one();
        let thread = &self.thread;
        let thread = thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the model thread had panicked");
        }
    }
}

/// Computes one page of tokens for nobody: starts the threads and brings the weights near, so that
/// the first request does not pay for it. What it leaves in the page is overwritten by whoever gets
/// that page.
fn warm_up(engine: &Engine) -> Result<()> {
    let rows = Rows {
        tokens: &[0; PAGE_TOKENS as usize],
        start: 0,
        pages: &[PageId(0)],
        logits: true,
    };
    engine.model.forward(&engine.kv, &[rows], &mut ())?;
    Ok(())
}

/// Pages of its longest outcome.
fn pages_for(sequence: &Sequence) -> usize {
    sequence.tokens_max().div_ceil(PAGE_TOKENS as usize)
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.close();
    }
}

impl Queue {
    fn check(&mut self, limits: &Limits) -> Result<()> {
        if self.closed {
            return Err(Error::closed());
        }
        self.waiting.retain(|sequence| !sequence.is_cancelled());
        if self.waiting.len() >= limits.waiting_max {
            return Err(Error::busy("too many requests wait: try again later")
                .with("waiting", self.waiting.len()));
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model thread.
    fn run(&self) {
        // Whatever ends this thread, nobody waits for it: their events end with the sequences.
        struct CloseOnExit<'a>(&'a Shared);
        impl Drop for CloseOnExit<'_> {
            fn drop(&mut self) {
                let mut queue = self.0.lock();
                queue.closed = true;
                queue.waiting.clear();
                queue.running = 0;
            }
        }
        let _exit = CloseOnExit(self);
        let mut running: Vec<Sequence> = Vec::new();
        let mut retired: Vec<Retired> = Vec::new();
        while self.admit(&mut running, &mut retired) {
            self.prefill(&mut running);
            self.decode(&mut running);
            let ended = |sequence: &mut Sequence| sequence.is_finished() || sequence.is_cancelled();
            for sequence in running.extract_if(.., ended) {
                if !sequence.is_finished() {
                    counter!("serve_cancelled_total").increment(1);
                }
                retired.extend(sequence.retire(&self.engine));
            }
        }
        for mut sequence in running {
            sequence.fail(Error::closed());
            retired.extend(sequence.retire(&self.engine));
        }
        loop {
            retired.retain_mut(|retired| !retired.is_done());
            if retired.is_empty() {
                return;
            }
            std::thread::sleep(COPY_POLL);
        }
    }

    /// Moves requests from the queue into the model; sleeps while there is nothing to do. `false`
    /// once the scheduler is closed.
    fn admit(&self, running: &mut Vec<Sequence>, retired: &mut Vec<Retired>) -> bool {
        let mut queue = self.lock();
        loop {
            retired.retain_mut(|retired| !retired.is_done());
            queue.waiting.retain_mut(|sequence| {
                let fits = pages_for(sequence) <= self.pool.total();
                if !fits {
                    sequence.fail(Error::unavailable(
                        "so many pages were lost to a hanging device that the request does not fit",
                    ));
                }
                fits && !sequence.is_cancelled()
            });
            while running.len() < self.limits.running_max
                && let Some(next) = queue.waiting.front()
                && let Some(pages) = self.pool.take(pages_for(next))
            {
                running.extend(queue.waiting.pop_front().map(|mut sequence| {
                    sequence.admit(pages);
                    sequence
                }));
            }
            queue.running = running.len();
            gauge!("serve_waiting").set(queue.waiting.len() as f64);
            gauge!("serve_running").set(running.len() as f64);
            gauge!("serve_pages_free").set(self.pool.free() as f64);
            if queue.closed || !running.is_empty() {
                return !queue.closed;
            }
            queue = if retired.is_empty() {
                self.wake
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner)
            } else {
                let woken = self.wake.wait_timeout(queue, COPY_POLL);
                woken.unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    /// One pass of one prefill. A prefill that would wait for the disk does so only when there is
    /// nothing else to compute.
    fn prefill(&self, running: &mut [Sequence]) {
        let idle = running
            .iter()
            .all(|sequence| sequence.is_prefilling() && !sequence.is_ready());
        let next = running
            .iter_mut()
            .find(|sequence| sequence.is_prefilling() && (idle || sequence.is_ready()));
        if let Some(sequence) = next
            && !sequence.is_cancelled()
            && let Err(error) = sequence.prefill(&self.engine)
        {
            sequence.fail(error);
        }
    }

    /// One decode step of every sequence that is there, in one pass.
    fn decode(&self, running: &mut [Sequence]) {
        let mut decoding: Vec<&mut Sequence> = running
            .iter_mut()
            .filter(|sequence| {
                !sequence.is_prefilling() && !sequence.is_finished() && !sequence.is_cancelled()
            })
            .collect();
        let batch: Vec<_> = decoding
            .iter()
            .filter_map(|sequence| sequence.step())
            .collect();
        if batch.is_empty() {
            return;
        }
        match self.engine.model.forward(&self.engine.kv, &batch, &mut ()) {
            Ok(logits) => {
                for (sequence, logits) in decoding.iter_mut().zip(&logits) {
                    sequence.advance(&self.engine.tokenizer, logits);
                }
            }
            Err(error) => {
                for sequence in decoding {
                    sequence.fail(Error::internal("a decode step failed").with("cause", &error));
                }
            }
        }
    }
}
