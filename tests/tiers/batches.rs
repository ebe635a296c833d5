//! How what is saved is cut into batches, and what of a long save gets to disk.

use super::*;

/// Chunks of each batch that was written.
fn batches(medium: &SimMedium) -> Vec<usize> {
    let trace = medium.trace();
    let batches = trace.lines().filter_map(|line| {
        let (_, batch) = line.split_once(" Append records ")?;
        let (_, count) = batch.split_once("× ")?;
        count.split(':').next()?.parse().ok()
    });
    batches.collect()
}

#[tokio::test]
async fn a_save_longer_than_the_write_queue_brings_its_head_to_an_idle_disk() {
    for mode in MODES {
        let machine = Machine::new(mode, 400, 1000);
        let engine = Engine::new(1024);
        let (cache, namespace) = machine.open();
        let saved = save(&cache, &namespace, &engine, &prompt(1, 4 * 200)).await;
        let durability = soon(saved.durable()).await;
        assert_eq!(
            (durability.durable_blocks, durability.undurable_blocks),
            (128, 72),
            "{mode:?}"
        );
        drop(saved);
        cache.close().await.expect("nothing hangs");
        assert_balanced(&cache);
    }
}

#[tokio::test]
async fn a_batch_is_cut_at_its_size_and_its_parts_follow_each_other() {
    for mode in MODES {
        let mut machine = Machine::new(mode, 800, 1000);
        machine.disk.queue_bytes = 400 * CHUNK;
        let engine = Engine::new(2048);
        let (cache, namespace) = machine.open();
        let saved = save(&cache, &namespace, &engine, &prompt(1, 4 * 300)).await;
        assert_eq!(soon(saved.durable()).await.durable_blocks, 300, "{mode:?}");
        assert_eq!(batches(&machine.medium), [128, 128, 44], "{mode:?}");
        drop(saved);
        // What is behind a part that fails is not written.
        machine.medium.fail_call(3);
        let saved = save(&cache, &namespace, &engine, &prompt(2, 4 * 400)).await;
        let durability = soon(saved.durable()).await;
        assert_eq!(
            (durability.durable_blocks, durability.undurable_blocks),
            (128, 272),
            "{mode:?}"
        );
        drop(saved);
        machine.forgive();
        cache.close().await.expect("nothing hangs");
        assert_balanced(&cache);
        let (cache, namespace) = machine.open();
        // The writer may have come back to the second one.
        for (name, tokens, least) in [(1, 4 * 300, 4 * 300), (2, 4 * 400, 4 * 128)] {
            let report = load(&cache, &namespace, &engine, &prompt(name, tokens)).await;
            assert!(report.tokens >= least, "{mode:?}: {report:?}");
        }
        cache.close().await.expect("nothing hangs");
    }
}

#[tokio::test]
async fn ancestors_that_a_save_brings_along_are_bounded_by_the_queue() {
    let machine = Machine::new(Mode::Inline, 800, 1000);
    let engine = Engine::new(2048);
    let (cache, namespace) = machine.open();
    // Nothing of the first gets to a disk that fails.
    machine.medium.fail_all(true);
    save_durably(&cache, &namespace, &engine, &prompt(1, 4 * 400)).await;
    machine.medium.fail_all(false);
    machine.forgive();
    let before = machine.medium.trace().len();
    let longer = save(&cache, &namespace, &engine, &prompt(1, 4 * 401)).await;
    let durability = soon(longer.durable()).await;
    assert_eq!(
        (durability.durable_blocks, durability.undurable_blocks),
        (0, 1),
        "{}",
        &machine.medium.trace()[before..]
    );
    assert_eq!(cache.stats().disk.expect("there is one").records, 128);
    drop(longer);
    // The others follow by themselves, as bounded.
    let rest = async {
        while cache.stats().disk.expect("there is one").records < 401 {
            tokio::task::yield_now().await;
        }
    };
    soon(rest).await;
    assert!(batches(&machine.medium).iter().all(|&chunks| chunks <= 128));
    cache.flush().await;
    assert_balanced(&cache);
    cache.close().await.expect("nothing hangs");
}
