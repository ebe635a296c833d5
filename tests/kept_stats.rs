//! What a process did can be asked of its store afterwards. Shown by counting on one cache, closing
//! it, and reading the kept value with nothing but the disk tier.
#![cfg(feature = "sim")]

mod support;

use std::sync::Arc;

use stemkv::{Cache, DiskConfig, Stats};
use stemkv_store::{DiskTier, SimClock, SimDisk, SimMedium};
use support::{Engine, config, geometry, namespace, prompt, save};

fn disk(medium: &SimMedium) -> Arc<SimDisk> {
    let clock = Arc::new(SimClock::default());
    Arc::new(SimDisk::open(medium, &geometry(), 32 << 20, clock).expect("not open elsewhere"))
}

fn kept(tier: &dyn DiskTier) -> Option<Stats> {
    let mut kept = None;
    tier.scan_meta(&mut |key, value| {
        if key == Stats::META_KEY {
            kept = serde_json::from_slice(value).ok();
        }
    })
    .expect("an open tier");
    kept
}

#[tokio::test]
async fn flush_and_close_keep_the_statistics_of_that_moment() {
    let medium = SimMedium::default();
    let tier = disk(&medium);
    let cache = Cache::builder(config(64).with_disk(DiskConfig::new("simulated", 32 << 20)))
        .disk(tier.clone())
        .open()
        .expect("a valid configuration");
    let namespace = cache.namespace(&namespace()).expect("the store's geometry");
    let engine = Engine::new(64);
    assert_eq!(kept(&*tier), None);

    drop(save(&cache, &namespace, &engine, &prompt(1, 16)).await);
    cache.flush().await;
    let flushed = kept(&*tier).expect("kept by the flush");
    assert_eq!(
        (flushed.counter("saves"), flushed.counter("durable_blocks")),
        (1, 4)
    );

    drop(save(&cache, &namespace, &engine, &prompt(2, 8)).await);
    cache.close().await.expect("nothing hangs");
    drop((cache, tier));
    let closed = kept(&*disk(&medium)).expect("kept by the close");
    assert_eq!(
        (closed.counter("saves"), closed.counter("durable_blocks")),
        (2, 6)
    );
    assert_eq!(closed.index.pins, 0);
}
