//! One request on its way through the model.

use std::time::Instant;

use metrics::{counter, histogram};
use stemkv::{Load, Save};
use stemkv_store::{Error, Fence, HostPages, PageTable, Result};
use tokio::sync::mpsc;

use super::output::Output;
use super::pages::Pages;
use super::reuse::{Copies, Hold, PassHooks, Reuse};
use super::{Event, FinishReason, Request, Usage};
use crate::model::{Model, Rows, Sampler, Tokenizer};

/// Tokens that a prefill computes in one pass at most. Passes end at absolute multiples of it.
const PASS_TOKENS: usize = 256;

/// What a sequence needs from the engine around it.
pub(super) struct Engine {
    pub(super) model: Model,
    pub(super) tokenizer: Tokenizer,
    pub(super) kv: HostPages,
    pub(super) reuse: Option<Reuse>,
}

pub(super) struct Sequence {
    /// The prompt, then what was generated.
    tokens: Vec<u32>,
    prompt_tokens: usize,
    max_tokens: usize,
    /// Tokens whose KV is in the pages.
    computed: usize,
    cached_tokens: usize,
    /// Was the store asked for its KV?
    begun: bool,
    sampler: Sampler,
    output: Output,
    events: mpsc::UnboundedSender<Event>,
    submitted: Instant,
    hold: Option<Hold>,
    running: Option<Running>,
    finished: bool,
}

/// What a sequence has once it was admitted.
struct Running {
    load: Option<Load>,
    save: Option<Save>,
    copies: Copies,
    /// May a load that never ended still write to the pages?
    is_overwritten: bool,
    /// Last, so that everything that names them goes first.
    pages: Pages,
}

/// Pages that a copy may still touch: kept until it is done, and lost where it never ends.
pub(super) struct Retired {
    copies: Copies,
    pages: Pages,
}

impl Retired {
    pub(super) fn is_done(&mut self) -> bool {
        let done = self.copies.are_done();
        if done && self.copies.is_any_lost() {
            tracing::error!(
                pages = self.pages.ids().len(),
                "pages are lost: a copy that touches them did not end"
            );
            self.pages.lose();
        }
        done
    }
}

impl Sequence {
    pub(super) fn new(
        request: Request,
        events: mpsc::UnboundedSender<Event>,
        hold: Option<Hold>,
    ) -> Sequence {
        Sequence {
            prompt_tokens: request.prompt.len(),
            tokens: request.prompt,
            max_tokens: request.max_tokens,
            computed: 0,
            cached_tokens: 0,
            begun: false,
            sampler: Sampler::new(request.sampling),
            output: Output::new(request.stop),
            events,
            submitted: Instant::now(),
            hold,
            running: None,
            finished: false,
        }
    }

    /// Positions that it may need.
    pub(super) fn tokens_max(&self) -> usize {
        self.prompt_tokens + self.max_tokens
    }

    /// Has nobody an interest in it any more?
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finished
    }

    pub(super) fn is_prefilling(&self) -> bool {
        self.computed < self.prompt_tokens
    }

    /// Would its next pass begin without waiting for the disk?
    pub(super) fn is_ready(&self) -> bool {
        self.begun || self.hold.as_ref().is_none_or(Hold::is_ready)
    }

    pub(super) fn admit(&mut self, pages: Pages) {
        self.running = Some(Running {
            load: None,
            save: None,
            copies: Copies::default(),
            is_overwritten: false,
            pages,
        });
    }

    /// Computes the next part of the prompt, and the first token behind its end.
    pub(super) fn prefill(&mut self, engine: &Engine) -> Result<()> {
        let Sequence {
            tokens,
            computed,
            begun,
            running: Some(running),
            ..
        } = self
        else {
            return Ok(());
        };
        if !std::mem::replace(begun, true)
            && let Some(reuse) = &engine.reuse
        {
            running.begin(reuse, engine, tokens);
            // The load has a lease of its own.
            self.hold = None;
            *computed = running.loaded(reuse.overlap);
            running.check_pages()?;
            self.cached_tokens = *computed;
            running.save = (reuse.whole(tokens.len()) > *computed)
                .then(|| reuse.save(tokens, running.table(engine), running.load.as_ref()))
                .flatten();
        }
        let end = (*computed / PASS_TOKENS + 1) * PASS_TOKENS;
        let end = end.min(tokens.len());
        // The pass that writes the last full block hands the layers over.
        let saved = engine.reuse.as_ref().map_or(0, |r| r.whole(tokens.len()));
        let saves = *computed < saved && saved <= end;
        let mut hooks = PassHooks {
            load: running.load.as_ref(),
            save: running.save.as_ref().filter(|_| saves),
            waited: Default::default(),
        };
        let started = Instant::now();
        let rows = Rows {
            tokens: &tokens[*computed..end],
            start: *computed,
            pages: running.pages.ids(),
            logits: end == tokens.len(),
        };
        let pass = engine.model.forward(&engine.kv, &[rows], &mut hooks);
        histogram!("serve_load_wait_seconds").record(hooks.waited);
        histogram!("serve_prefill_pass_seconds").record(started.elapsed());
        let whole = running.end_load();
        running.check_pages()?;
        match pass {
            Ok(logits) if whole.is_none_or(|whole| whole >= *computed) => {
                *computed = end;
                if let Some(logits) = logits.first() {
                    histogram!("serve_time_to_first_token_seconds")
                        .record(self.submitted.elapsed());
                    self.choose(&engine.tokenizer, logits);
                }
            }
            // Nothing was waited for that another try could do without.
            Err(error) if whole.is_none() => return Err(error),
            pass => {
                // What was loaded is whole up to here. The pass is discarded, and the save with it.
                let whole = whole.unwrap_or(0).min(*computed);
                tracing::warn!(error = ?pass.err(), whole, "a load was cut: computing the rest");
                running.end_save();
                *computed = whole;
                self.cached_tokens = whole;
            }
        }
        Ok(())
    }

    /// Its next decode step.
    pub(super) fn step(&self) -> Option<Rows<'_>> {
        Some(Rows {
            tokens: &self.tokens[self.computed..],
            start: self.computed,
            pages: self.running.as_ref()?.pages.ids(),
            logits: true,
        })
    }

    /// Takes the logits of its decode step.
    pub(super) fn advance(&mut self, tokenizer: &Tokenizer, logits: &[f32]) {
        self.computed = self.tokens.len();
        self.choose(tokenizer, logits);
    }

    fn choose(&mut self, tokenizer: &Tokenizer, logits: &[f32]) {
        let token = self.sampler.choose(logits);
        if tokenizer.is_end(token) {
            return self.finish(FinishReason::Stop);
        }
        self.tokens.push(token);
        counter!("serve_generated_tokens_total").increment(1);
        let (text, stopped) = self.output.push(tokenizer, token);
        let _ = self.events.send(Event::Token { token, text });
        if stopped {
            self.finish(FinishReason::Stop);
        } else if self.tokens.len() >= self.tokens_max() {
            self.finish(FinishReason::Length);
        }
    }

    fn finish(&mut self, reason: FinishReason) {
        self.finished = true;
        let usage = Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.tokens.len() - self.prompt_tokens,
            cached_tokens: self.cached_tokens,
        };
        counter!("serve_prompt_tokens_total").increment(usage.prompt_tokens as u64);
        counter!("serve_cached_tokens_total").increment(usage.cached_tokens as u64);
        // A receiver that is gone has no use for it.
        let _ = self.events.send(Event::Done {
            text: self.output.finish(),
            reason,
            usage,
        });
    }

    pub(super) fn fail(&mut self, error: Error) {
        self.finished = true;
        let _ = self.events.send(Event::Failed(error));
    }

    /// Ends it. The KV of generated tokens has the same bits as if it had been prefilled, so the
    /// blocks that they filled are saved too, for the next turn.
    pub(super) fn retire(mut self, engine: &Engine) -> Option<Retired> {
        let mut running = self.running.take()?;
        if let Some(load) = running.load.take() {
            running.copies.add(load.cancel());
        }
        running.end_save();
        if let Some(reuse) = &engine.reuse
            && reuse.whole(self.computed) > reuse.whole(self.prompt_tokens)
            && let Some(save) =
                reuse.save(&self.tokens[..self.computed], running.table(engine), None)
        {
            running.copies.add(save.pages_free());
            if let Err(error) = save.all_layers(Fence::reached()) {
                tracing::warn!(?error, "generated tokens were not saved");
            }
        }
        Some(Retired {
            copies: running.copies,
            pages: running.pages,
        })
    }
}

impl Running {
    fn table(&self, engine: &Engine) -> PageTable {
        PageTable {
            kv: engine.kv.paged(),
            pages: self.pages.ids().clone(),
        }
    }

    fn begin(&mut self, reuse: &Reuse, engine: &Engine, tokens: &[u32]) {
        self.load = reuse.load(tokens, self.table(engine));
    }

    /// How many leading tokens need not be computed.
    fn loaded(&mut self, overlap: bool) -> usize {
        match &self.load {
            None => 0,
            Some(load) if overlap => load.tokens_blocking(),
            Some(_) => self.end_load().unwrap_or(0),
        }
    }

    fn check_pages(&self) -> Result<()> {
        match self.is_overwritten {
            false => Ok(()),
            true => Err(Error::unavailable(
                "a load into the request's pages did not end: the device hangs",
            )),
        }
    }

    /// Waits for the end of the load, if there is one; how many leading tokens are whole?
    fn end_load(&mut self) -> Option<usize> {
        let load = self.load.take()?;
        let pages_free = load.pages_free();
        let report = load.finish_blocking();
        self.is_overwritten |= pages_free.is_lost();
        self.copies.add(pages_free);
        histogram!("serve_load_seconds").record(report.seconds);
        counter!("serve_loaded_bytes_total").increment(report.bytes);
        counter!("serve_loaded_blocks_total", "tier" => "host")
            .increment(report.host_blocks as u64);
        counter!("serve_loaded_blocks_total", "tier" => "disk")
            .increment(report.disk_blocks as u64);
        Some(report.tokens)
    }

    fn end_save(&mut self) {
        if let Some(save) = self.save.take() {
            self.copies.add(save.pages_free());
        }
    }
}
