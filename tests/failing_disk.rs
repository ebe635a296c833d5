//! A disk that fails in part: what can still be read is read, what cannot be is dropped by itself, and
//! nothing takes room that nobody can evict.
#![cfg(feature = "sim")]

mod support;

use stemkv::{Cache, HashPath as _, OpenNamespace};
use stemkv_store::{Key, SimDiskCall};
use support::machine::{Machine, Mode, assert_balanced, soon};
use support::{Engine, load, prompt, save};

/// Ten blocks each.
const TOKENS: usize = 40;

async fn save_prompt(cache: &Cache, namespace: &OpenNamespace, name: u32) -> usize {
    let saved = save(cache, namespace, &Engine::new(64), &prompt(name, TOKENS)).await;
    soon(saved.durable()).await.durable_blocks
}

async fn load_prompt(cache: &Cache, namespace: &OpenNamespace, name: u32) -> usize {
    let tokens = prompt(name, TOKENS);
    let report = soon(load(cache, namespace, &Engine::new(64), &tokens)).await;
    report.tokens
}

/// A machine whose disk holds prompts 1 to `prompts`, and whose RAM is empty.
async fn with_prompts_on_disk(prompts: u32, disk_chunks: u64) -> Machine {
    let machine = Machine::new(Mode::Threads, 64, disk_chunks);
    let (cache, namespace) = machine.open();
    for name in 1..=prompts {
        assert_eq!(save_prompt(&cache, &namespace, name).await, 10);
    }
    soon(cache.close()).await.expect("nothing hangs");
    machine
}

fn key_of(namespace: &OpenNamespace, name: u32, block: usize) -> Key {
    let tokens = prompt(name, TOKENS);
    let mut prompt = namespace.prompt(&tokens);
    prompt.hash_to(block + 1);
    prompt.hashed()[block]
}

#[tokio::test]
async fn a_bad_sector_costs_its_own_record_alone_and_a_later_save_mends_it() {
    for block in [0, 6, 9] {
        let machine = with_prompts_on_disk(2, 256).await;
        let (cache, namespace) = machine.open();
        let key = key_of(&namespace, 1, block);
        machine.medium.spoil(&key, true);
        // Alone in its call, it may be the disk that fails: no more than a pause comes of that.
        for _ in 0..3 {
            assert_eq!(load_prompt(&cache, &namespace, 1).await, 4 * block);
            machine.forgive();
            assert_eq!(load_prompt(&cache, &namespace, 2).await, TOKENS);
        }
        let stats = cache.stats();
        assert_eq!(stats.counter("unreadable_blocks"), 1, "{stats:?}");
        assert_eq!(stats.counter("corrupt_blocks"), 0, "{stats:?}");
        machine.medium.spoil(&key, false);
        // What is behind it counts again.
        assert_eq!(save_prompt(&cache, &namespace, 1).await, 1);
        assert_balanced(&cache);
        soon(cache.close()).await.expect("nothing hangs");
        let (cache, namespace) = machine.open();
        assert_eq!(load_prompt(&cache, &namespace, 1).await, TOKENS);
        soon(cache.close()).await.expect("nothing hangs");
    }
}

#[tokio::test]
async fn a_disk_of_which_nothing_can_be_read_loses_no_record() {
    let machine = with_prompts_on_disk(1, 256).await;
    let (cache, namespace) = machine.open();
    let keys: Vec<Key> = (0..10).map(|block| key_of(&namespace, 1, block)).collect();
    keys.iter().for_each(|key| machine.medium.spoil(key, true));
    for _ in 0..3 {
        assert_eq!(load_prompt(&cache, &namespace, 1).await, 0);
        machine.forgive();
    }
    let stats = cache.stats();
    assert!(stats.counter("disk_read_errors") >= 3, "{stats:?}");
    assert_eq!(stats.counter("unreadable_blocks"), 0, "{stats:?}");
    keys.iter().for_each(|key| machine.medium.spoil(key, false));
    // A load ends with its first miss, so another call may still be failing.
    let all = async {
        while load_prompt(&cache, &namespace, 1).await != TOKENS {
            machine.forgive();
        }
    };
    soon(all).await;
    soon(cache.close()).await.expect("nothing hangs");
}

#[tokio::test]
async fn a_disk_that_takes_no_writes_is_read_at_once() {
    let machine = with_prompts_on_disk(2, 256).await;
    let (cache, namespace) = machine.open();
    let medium = machine.medium.clone();
    let writes_fail = move |call| medium.fail_all(call != SimDiskCall::Read);
    machine.medium.on_call(writes_fail);
    assert_eq!(save_prompt(&cache, &namespace, 3).await, 0);
    assert!(cache.stats().disk.expect("it has one").paused);
    for name in 1..3 {
        assert_eq!(load_prompt(&cache, &namespace, name).await, TOKENS);
    }
    let stats = cache.stats();
    assert_eq!(stats.counter("disk_write_errors"), 1, "{stats:?}");
    assert_eq!(stats.counter("disk_skipped"), 0, "{stats:?}");
    machine.medium.on_call(|_| {});
    machine.medium.fail_all(false);
    soon(cache.close()).await.expect("nothing hangs");
}

#[tokio::test]
async fn records_that_could_not_be_removed_are_removed_later_and_no_more_are_evicted_meanwhile() {
    let machine = with_prompts_on_disk(2, 20).await;
    let (cache, namespace) = machine.open();
    let medium = machine.medium.clone();
    let writes_fail = move |call| medium.fail_all(call != SimDiskCall::Read);
    machine.medium.on_call(writes_fail);
    let mut evicted = Vec::new();
    for name in 3..7 {
        assert_eq!(save_prompt(&cache, &namespace, name).await, 0);
        evicted.push(cache.stats().counter("evicted_disk_blocks"));
        machine.forgive();
    }
    assert!(evicted[0] > 0, "{evicted:?}");
    assert!(
        evicted.iter().all(|&count| count == evicted[0]),
        "{evicted:?}"
    );
    machine.medium.on_call(|_| {});
    machine.medium.fail_all(false);
    machine.forgive();
    assert_eq!(save_prompt(&cache, &namespace, 7).await, 10);
    soon(cache.close()).await.expect("nothing hangs");
    let stats = cache.stats();
    let disk = stats.disk.as_ref().expect("it has one");
    assert_eq!(disk.records, stats.index.disk_blocks, "{stats:?}");
}
