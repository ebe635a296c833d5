//! A system that gives the process no more threads: calls of the engine are answered, and a store that
//! could not be closed for that reason is closed by the next call.
//!
//! How: a child process in which `pthread_create` is made to fail.
#![cfg(all(feature = "rocksdb", feature = "sim"))]

mod support;

use std::path::Path;

use stemkv::{Cache, DiskConfig, ErrorKind};
use stemkv_store::disk::RocksDisk;
use support::filecalls::{Fault, fail, heal, run_child, store_of_child};
use support::{Engine, config, load, namespace, prompt, save};

fn open(store: &Path) -> Cache {
    let config = config(64).with_disk(DiskConfig::new(store, 64 << 20));
    Cache::open(config).expect("it opens")
}

#[test]
fn child() {
    let Some(store) = store_of_child() else {
        return;
    };
    let cache = open(&store);
    let namespace_of_child = cache.namespace(&namespace()).expect("valid");
    let engine = Engine::new(64);
    let fault = Fault {
        class: "thread",
        path: "/",
        nth: 1,
        times: None,
        errno: libc::EAGAIN,
    };
    fail(fault);
    cache.flush_blocking();
    let compacted = cache.compact_blocking(1);
    let refused = compacted.expect_err("no thread can do it");
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
    // Saves and loads out of RAM need none.
    let tokens = prompt(1, 16);
    drop(pollster::block_on(save(
        &cache,
        &namespace_of_child,
        &engine,
        &tokens,
    )));
    let report = pollster::block_on(load(&cache, &namespace_of_child, &engine, &tokens));
    assert_eq!(report.tokens, 16);
    for _ in 0..2 {
        let refused = cache.close_blocking().expect_err("no thread can do it");
        assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
        let mut late = namespace_of_child.prompt(&tokens);
        let Err(late) = cache.lease(&mut late) else {
            panic!("it refuses work");
        };
        assert_eq!(late.kind(), ErrorKind::Closed);
        assert!(RocksDisk::holder(&store).is_some());
    }
    assert!(heal().1 >= 4, "threads were refused");
    cache.close_blocking().expect("there are threads again");
    assert!(RocksDisk::holder(&store).is_none());
    cache.close_blocking().expect("it is closed");
    println!("the child did it");
}

#[test]
fn an_engine_that_can_have_no_thread_is_answered() {
    let scratch = tempfile::tempdir().expect("a folder");
    let text = run_child("child", scratch.path());
    assert!(text.contains("the child did it"), "{text}");
}
