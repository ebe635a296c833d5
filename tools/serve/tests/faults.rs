//! A device that fails while KV is saved or loaded: every answer is still, token by token, the one
//! without a store, and no page stays taken. Each of the first layers that the device moves is made
//! to fail in turn, in each way.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use stemkv::{Cache, Config, Namespace};
use stemkv_serve::model::{Model, Sampling, Tokenizer};
use stemkv_serve::scheduler::{BLOCK_TOKENS, Event, Limits, Request, Reuse, Scheduler};
use stemkv_store::device::{SimDevice, SimDeviceFault};

fn scheduler(store: Option<SimDevice>, overlap: bool) -> Scheduler {
    let (model, tokenizer): (Model, Tokenizer) = support::tiny();
    let reuse = store.map(|device| {
        let geometry = model.geometry(BLOCK_TOKENS).unwrap();
        let config = Config::in_memory(geometry.clone(), 64 << 20);
        let cache = Cache::builder(config)
            .device(Arc::new(device))
            .open()
            .unwrap();
        let namespace = cache
            .namespace(&Namespace::new("tiny", "1", "bytes", geometry))
            .unwrap();
        Reuse {
            cache,
            namespace,
            overlap,
        }
    });
    let limits = Limits {
        kv_tokens: 2048,
        context_tokens: 1024,
        running_max: 2,
        waiting_max: 4,
    };
    Scheduler::start(model, tokenizer, reuse, limits).unwrap()
}

/// The tokens of an answer and how many of the prompt's were reused.
fn ask(scheduler: &Scheduler, prompt: &[u32]) -> (Vec<u32>, usize) {
    let mut events = scheduler
        .submit(Request {
            prompt: prompt.to_vec(),
            max_tokens: 12,
            sampling: Sampling {
                temperature: 0.0,
                top_p: 1.0,
                seed: 0,
            },
            stop: Vec::new(),
        })
        .unwrap();
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv().unwrap() {
            Event::Token { token, .. } => tokens.push(token),
            Event::Done { usage, .. } => return (tokens, usage.cached_tokens),
            Event::Failed(error) => panic!("{error:?}"),
        }
    }
}

fn wait_until_empty(scheduler: &Scheduler) {
    let begun = Instant::now();
    loop {
        let now = scheduler.occupancy();
        if now.pages_free == now.pages && now.running == 0 {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{now:?}");
        std::thread::yield_now();
    }
}

#[test]
fn a_failing_device_changes_no_token_and_keeps_no_page() {
    let mut random = support::Random(3);
    let mut prompt = || -> Vec<u32> { (0..300).map(|_| random.below(256)).collect() };
    let (prompt, other) = (prompt(), prompt());
    let plain = scheduler(None, true);
    let (expected, _) = ask(&plain, &prompt);
    let whole = 300 / BLOCK_TOKENS as usize * BLOCK_TOKENS as usize;
    for overlap in [true, false] {
        // Two saves and a load, layer by layer; other ones follow where something failed.
        let mut cut = 0;
        for failing in 0..3 * support::LAYERS {
            for fault in [
                SimDeviceFault::Submit,
                SimDeviceFault::Fence,
                SimDeviceFault::Corrupt,
            ] {
                let device = SimDevice::new(true, move |n| (n == failing as u64).then_some(fault));
                let scheduler = scheduler(Some(device), overlap);
                for round in 0..3 {
                    let (tokens, cached) = ask(&scheduler, &prompt);
                    // Takes the same pages, so that none holds the right KV by chance.
                    ask(&scheduler, &other);
                    assert_eq!(
                        tokens, expected,
                        "overlap {overlap}, layer {failing}, {fault:?}, round {round}"
                    );
                    cut += usize::from(round == 1 && cached < whole);
                    wait_until_empty(&scheduler);
                }
            }
        }
        assert!(cut > 0, "no fault ever cost a hit: the test shows nothing");
    }
}
