//! A device that fails while KV is saved or loaded: every answer is still, token by token, the one
//! without a store, and no page stays taken. Each of the first layers that the device moves is made
//! to fail in turn, in each way.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use stemkv::{Cache, Config, Namespace};
use stemkv_serve::model::{Model, Sampling, Tokenizer};
use stemkv_serve::scheduler::{BLOCK_TOKENS, Event, Limits, Request, Reuse, Scheduler};
use stemkv_store::device::{SimDevice, SimDeviceFault};
use stemkv_store::{ErrorKind, Result};
use tokio::sync::mpsc::UnboundedReceiver;

fn scheduler(store: Option<SimDevice>, overlap: bool) -> Scheduler {
    scheduler_of(2048, store, overlap)
}

/// With room for so many tokens.
fn scheduler_of(kv_tokens: usize, store: Option<SimDevice>, overlap: bool) -> Scheduler {
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
        kv_tokens,
        context_tokens: 1024,
        running_max: 2,
        waiting_max: 4,
    };
    Scheduler::start(model, tokenizer, reuse, limits).unwrap()
}

fn submit(scheduler: &Scheduler, prompt: &[u32]) -> Result<UnboundedReceiver<Event>> {
    scheduler.submit(Request {
        prompt: prompt.to_vec(),
        max_tokens: 12,
        sampling: Sampling {
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
        },
        stop: Vec::new(),
    })
}

/// The tokens of an answer and how many of the prompt's were reused.
fn ask(scheduler: &Scheduler, prompt: &[u32]) -> (Vec<u32>, usize) {
    answer(submit(scheduler, prompt).unwrap()).unwrap()
}

fn answer(mut events: UnboundedReceiver<Event>) -> Result<(Vec<u32>, usize)> {
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv().unwrap() {
            Event::Token { token, .. } => tokens.push(token),
            Event::Done { usage, .. } => return Ok((tokens, usage.cached_tokens)),
            Event::Failed(error) => return Err(error),
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

/// Runs a test that hangs where what it shows is broken, also while its scheduler is dropped: fails then.
fn ends(test: impl FnOnce() + Send + 'static) {
    let (tell, told) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = tell.send(());
    });
    match told.recv_timeout(Duration::from_secs(60)) {
        Err(RecvTimeoutError::Timeout) => panic!("it hangs"),
        _ => {
            if let Err(panic) = thread.join() {
                resume_unwind(panic)
            }
        }
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

/// Of a copy that never ended nobody knows whether it still runs: its pages are lost. The server goes on
/// with the others, says so to who needs more than there are, and ends when it is told to.
#[test]
fn a_copy_that_never_ends_costs_its_pages_and_nobody_waits_for_them() {
    ends(|| {
        let mut random = support::Random(3);
        let mut prompt =
            |tokens: usize| -> Vec<u32> { (0..tokens).map(|_| random.below(256)).collect() };
        let (lost, large, small) = (prompt(300), prompt(400), prompt(100));
        let (go_on, told) = mpsc::channel();
        let device = SimDevice::new(true, move |n| {
            if n == 0 {
                let _ = told.recv();
            }
            (n == 0).then_some(SimDeviceFault::Stuck)
        });
        // 32 pages: the first needs 20, and the second, which waits for some of those, 26.
        let scheduler = scheduler_of(512, Some(device), true);
        let first = submit(&scheduler, &lost).unwrap();
        let second = submit(&scheduler, &large).unwrap();
        go_on.send(()).unwrap();
        answer(first).unwrap();
        let refused = answer(second).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
        assert_eq!(scheduler.occupancy().pages, 12);
        let refused = submit(&scheduler, &large).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
        ask(&scheduler, &small);
        wait_until_empty(&scheduler);
        scheduler.close();
    });
}

/// Nor may anybody compute with pages that a load may still write to.
#[test]
fn a_load_that_never_ends_fails_its_request_alone() {
    ends(|| {
        let mut random = support::Random(4);
        let prompt: Vec<u32> = (0..300).map(|_| random.below(256)).collect();
        for overlap in [true, false] {
            // Behind the layers of the first save.
            let stuck = support::LAYERS as u64;
            let device =
                SimDevice::new(true, move |n| (n == stuck).then_some(SimDeviceFault::Stuck));
            let scheduler = scheduler(Some(device), overlap);
            ask(&scheduler, &prompt);
            wait_until_empty(&scheduler);
            let refused = answer(submit(&scheduler, &prompt).unwrap()).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
            let (_, cached) = ask(&scheduler, &prompt);
            assert_eq!(cached, 256, "{overlap}");
            wait_until_empty(&scheduler);
            assert_eq!(scheduler.occupancy().pages, 108);
        }
    });
}
