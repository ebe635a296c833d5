//! The order in which the model thread computes, seen in what several requests have got at one moment.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use stemkv_serve::model::Sampling;
use stemkv_serve::scheduler::{Event, Limits, Request, Scheduler};
use tokio::sync::mpsc::UnboundedReceiver;

/// Tokens of one pass, as the scheduler documents it.
const PASS: usize = 256;

fn submit(scheduler: &Scheduler, tokens: usize, max_tokens: usize) -> UnboundedReceiver<Event> {
    let mut random = support::Random(tokens as u64);
    let request = Request {
        prompt: (0..tokens).map(|_| random.below(256)).collect(),
        max_tokens,
        sampling: Sampling {
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
        },
        stop: Vec::new(),
    };
    scheduler.submit(request).unwrap()
}

/// Tokens that have come and were not counted before.
fn tokens_so_far(events: &mut UnboundedReceiver<Event>) -> usize {
    let tokens = std::iter::from_fn(|| events.try_recv().ok());
    tokens
        .filter(|event| matches!(event, Event::Token { .. }))
        .count()
}

#[test]
fn who_has_begun_gets_a_token_between_any_two_passes_of_a_long_prompt() {
    const PASSES: usize = 8;
    let (model, tokenizer) = support::tiny();
    let limits = Limits {
        kv_tokens: 4096,
        context_tokens: 4096,
        running_max: 2,
        waiting_max: 4,
    };
    let scheduler = Scheduler::start(model, tokenizer, None, limits).unwrap();
    // Has all pages until both others wait, so that those begin together, the short one first.
    let mut first = submit(&scheduler, 1, 4095);
    first.blocking_recv().unwrap();
    let mut short = submit(&scheduler, 10, 64);
    let mut long = submit(&scheduler, PASSES * PASS, 4);
    assert_eq!(scheduler.occupancy().waiting, 2);
    drop(first);

    let begun = long.blocking_recv().unwrap();
    assert!(matches!(begun, Event::Token { .. }), "{begun:?}");
    let tokens = tokens_so_far(&mut short);
    // One when its prompt was computed, and one behind each pass but the last.
    assert!(tokens >= PASSES, "{tokens} tokens beside {PASSES} passes");
}
