//! A runtime that the store was given: what it needs of it, how little is enough, and what is left when it ends.
#![cfg(feature = "sim")]

mod support;

use stemkv::ErrorKind;
use support::machine::{CHUNK, Machine, Mode, assert_balanced};
use support::{Engine, load, prompt, save, save_durably};

const TOKENS: usize = 24;

#[test]
fn a_store_whose_runtime_has_ended_is_closed_all_the_same() {
    let machine = Machine::new(Mode::Threads, 64, 64);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_time()
        .build()
        .expect("threads");
    let builder = machine.builder().runtime(runtime.handle().clone());
    let (cache, namespace) = machine.open_with(builder);
    let engine = Engine::new(64);
    let tokens = prompt(1, TOKENS);
    let durable = save_durably(&cache, &namespace, &engine, &tokens);
    assert_eq!(pollster::block_on(durable), 6);
    drop(runtime);
    // What is in RAM needs no runtime.
    let report = pollster::block_on(load(&cache, &namespace, &engine, &tokens));
    assert_eq!(report.tokens, TOKENS);
    cache.flush_blocking();
    cache.close_blocking().expect("nothing hangs");
    cache.close_blocking().expect("it is closed");
    assert_balanced(&cache);
    // Its disk is released although the handle lives.
    let (again, namespace) = machine.open();
    let report = pollster::block_on(load(&again, &namespace, &engine, &tokens));
    assert_eq!(report.tokens, TOKENS);
    again.close_blocking().expect("nothing hangs");
}

#[test]
fn a_runtime_without_a_timer_is_refused() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .build()
        .expect("threads");
    let machine = Machine::new(Mode::Threads, 64, 64);
    let opened = machine.builder().runtime(runtime.handle().clone()).open();
    let error = opened.err().expect("its deadlines would never pass");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("timer"), "{error}");
}

/// One thread for tasks and one for calls to the disk, and a store that is full all the time.
#[test]
fn a_runtime_of_one_thread_with_one_for_blocking_calls_is_enough() {
    let machine = Machine::new(Mode::Threads, 16, 40);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .max_blocking_threads(1)
        .build()
        .expect("threads");
    let handle = runtime.handle().clone();
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let driver = std::thread::spawn(move || runtime.block_on(ended));
    let (cache, namespace) = machine.open_with(machine.builder().runtime(handle));
    let engines: Vec<_> = (0..4)
        .map(|thread| {
            let (cache, namespace) = (cache.clone(), namespace.clone());
            std::thread::spawn(move || {
                let engine = Engine::new(64);
                for turn in 0..20 {
                    let tokens = prompt(1 + (thread + turn) % 7, TOKENS);
                    let saved = pollster::block_on(save(&cache, &namespace, &engine, &tokens));
                    if turn % 3 == 0 {
                        saved.durable_blocking();
                    }
                    if turn % 5 == 0 {
                        cache.flush_blocking();
                    }
                    let report = pollster::block_on(load(&cache, &namespace, &engine, &tokens));
                    assert!(report.tokens <= TOKENS);
                    let mut prompt = namespace.prompt(&tokens);
                    let lease = cache.lease(&mut prompt).expect("open");
                    let prefetch = cache.prefetch(&lease, Default::default()).expect("open");
                    prefetch.finish_blocking();
                }
                pollster::block_on(cache.compact(CHUNK)).expect("the disk works");
            })
        })
        .collect();
    for engine in engines {
        engine.join().expect("no panic");
    }
    cache.close_blocking().expect("nothing hangs");
    assert_balanced(&cache);
    drop(end);
    drop(driver.join());
}
