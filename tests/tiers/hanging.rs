//! Calls to the disk that do not return: nobody waits for them without bound.

use super::*;

/// Lets what is ready run until `is` so.
async fn until(what: &str, is: impl Fn() -> bool) {
    let late = Instant::now() + Duration::from_secs(20);
    while !is() {
        assert!(Instant::now() < late, "{what}");
        tokio::task::yield_now().await;
    }
}

fn is_paused(cache: &Cache) -> bool {
    cache.stats().disk.expect("there is one").paused
}

#[tokio::test(start_paused = true)]
async fn a_read_that_never_returns_is_a_miss_and_so_is_what_is_asked_for_meanwhile() {
    let mut machine = Machine::new(Mode::Threads, 64, 256);
    machine.disk.reads_in_flight = 1;
    let engine = Engine::new(512);
    let (cache, namespace) = machine.open();
    for name in 1..=3 {
        save_durably(&cache, &namespace, &engine, &prompt(name, 40)).await;
    }
    cache.close().await.expect("nothing hangs");

    // On the test's own time.
    let (cache, namespace) = machine.open_with(machine.builder().runtime(Handle::current()));
    let gate = Gate::close(&machine.medium, SimDiskCall::Read);
    let begin = |name| {
        let lease = cache.lease(&mut namespace.prompt(&prompt(name, 40)));
        let options = LoadOptions {
            deadline: None,
            ..LoadOptions::default()
        };
        let load = cache.load(&lease.expect("open"), engine.table(40), options);
        load.expect("valid")
    };
    let (hung, queued) = (begin(1), begin(2));
    until("the read is asked for", || gate.has_come()).await;
    tokio::time::advance(Duration::from_secs(29)).await;
    assert!(!is_paused(&cache));
    tokio::time::advance(Duration::from_secs(2)).await;
    for load in [hung, queued] {
        let report = load.finish().await;
        assert_eq!(
            (report.tokens, report.cut.as_deref()),
            (0, Some("unavailable"))
        );
    }
    // The pause after a failure is over, and the call has still not returned.
    machine.forgive();
    assert!(is_paused(&cache));
    let skipped = cache.stats().counter("disk_skipped");
    let report = begin(3).finish().await;
    assert_eq!(
        (report.tokens, report.cut.as_deref()),
        (0, Some("unavailable"))
    );
    assert_eq!(cache.stats().counter("disk_skipped"), skipped + 10);
    assert_eq!(
        reads(&machine.medium),
        0,
        "nothing else was asked of the disk"
    );

    drop(gate);
    until("the disk is used again", || !is_paused(&cache)).await;
    for name in 1..=3 {
        let report = load_all(&cache, &namespace, &prompt(name, 40)).await;
        assert_eq!((report.tokens, report.cut), (40, None));
    }
    assert_eq!(reads(&machine.medium), 30, "what came late was kept");
    assert_balanced(&cache);
    cache.close().await.expect("nothing hangs");
}

#[test]
fn nobody_waits_without_bound_who_did_not_ask_for_it() {
    assert!(LoadOptions::default().deadline.is_some());
    assert!(PrefetchGoal::default().deadline.is_some());
}
