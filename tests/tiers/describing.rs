//! What describes the namespaces of the records on disk.

use std::collections::BTreeSet;

use stemkv::Salt;
use stemkv_store::Key;

use super::*;

/// The namespaces of a medium's records, and those that are described there.
fn namespaces(machine: &Machine) -> (BTreeSet<Key>, BTreeSet<Key>) {
    let disk = machine.open_disk();
    let (mut of_records, mut described) = (BTreeSet::new(), BTreeSet::new());
    disk.scan(&mut |info| of_records.extend([info.namespace]))
        .expect("readable");
    disk.scan_meta(&mut |key, _| described.extend([key]))
        .expect("readable");
    (of_records, described)
}

#[tokio::test]
async fn a_namespace_is_opened_without_the_disk_and_described_before_its_first_record() {
    for mode in MODES {
        let machine = Machine::new(mode, 64, 256);
        let engine = Engine::new(512);
        let (cache, namespace) = machine.open();
        let mut salted = support::namespace();
        salted.salt = Some(Salt::new("of a tenant"));
        let tenant = cache.namespace(&salted).expect("the store's geometry");
        assert_eq!(machine.medium.calls(), 0, "{mode:?}");
        save_durably(&cache, &namespace, &engine, &prompt(1, 40)).await;
        let calls = machine.medium.calls();
        assert_eq!(calls, 4, "{}", machine.medium.trace());
        cache.namespace(&support::namespace()).expect("open");
        save_durably(&cache, &namespace, &engine, &prompt(2, 40)).await;
        save_durably(&cache, &tenant, &engine, &prompt(1, 40)).await;
        let syncs = machine.medium.syncs();
        assert_eq!(syncs, 5, "{}", machine.medium.trace());
        cache.close().await.expect("nothing hangs");
        let (of_records, described) = namespaces(&machine);
        assert_eq!(
            of_records,
            BTreeSet::from([namespace.root(), tenant.root()])
        );
        assert!(described.is_superset(&of_records));

        // It is known after a restart.
        let calls = machine.medium.calls();
        let (cache, _) = machine.open();
        cache.namespace(&salted).expect("open");
        assert_eq!(machine.medium.calls(), calls);
        cache.close().await.expect("nothing hangs");

        // Whatever is left after a power cut is described.
        for sync in 1..=5 {
            let machine = Machine::new(mode, 64, 256);
            machine.medium.cut_power_at_sync(sync);
            let (cache, namespace) = machine.open();
            let tenant = cache.namespace(&salted).expect("open");
            for namespace in [&namespace, &tenant] {
                save_durably(&cache, namespace, &engine, &prompt(1, 40)).await;
                machine.forgive();
            }
            let _ = cache.close().await;
            for seed in 0..8 {
                let after = machine.with_medium(machine.medium.after_power_cut(seed));
                let (of_records, described) = namespaces(&after);
                assert!(described.is_superset(&of_records), "{sync} {seed} {mode:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_disk_that_hangs_holds_up_no_namespace() {
    let machine = Machine::new(Mode::Threads, 64, 256);
    let engine = Engine::new(512);
    let (cache, namespace) = machine.open();
    let gate = Gate::close(&machine.medium, SimDiskCall::Meta);
    let saved = save(&cache, &namespace, &engine, &prompt(1, 40)).await;
    gate.wait();
    let mut salted = support::namespace();
    salted.salt = Some(Salt::new("of a tenant"));
    let opening = tokio::task::spawn_blocking({
        let cache = cache.clone();
        move || {
            cache.namespace(&support::namespace()).expect("open");
            cache.namespace(&salted).expect("open");
        }
    });
    soon(opening).await.expect("it does not panic");
    drop(gate);
    assert_eq!(soon(saved.durable()).await.durable_blocks, 10);
}

#[tokio::test]
async fn descriptions_are_made_again_after_they_were_lost_and_bounded_in_number() {
    let machine = Machine::new(Mode::Inline, 64, 256);
    let engine = Engine::new(512);
    let (cache, namespace) = machine.open();
    save_durably(&cache, &namespace, &engine, &prompt(1, 40)).await;
    cache.close().await.expect("nothing hangs");
    // The store was rebuilt from its records.
    let disk = machine.open_disk();
    disk.put_meta(&namespace.root(), &[]).expect("writable");
    drop(disk);
    let (cache, _) = machine.open();
    cache.flush().await;
    cache.close().await.expect("nothing hangs");
    let (of_records, described) = namespaces(&machine);
    assert!(described.is_superset(&of_records));

    // As many as are kept at most, of namespaces that have no record.
    let disk = machine.open_disk();
    let others = 16 * 1024 - 1;
    for other in 0..others {
        let mut key = Key([7; 32]);
        key.0[..4].copy_from_slice(&u32::to_le_bytes(other));
        disk.put_meta(&key, b"{}").expect("writable");
    }
    drop(disk);
    let before = namespaces(&machine).1.len();
    let (cache, _) = machine.open();
    let mut salted = support::namespace();
    salted.salt = Some(Salt::new("of a tenant"));
    let tenant = cache.namespace(&salted).expect("the store's geometry");
    save_durably(&cache, &tenant, &engine, &prompt(1, 40)).await;
    cache.close().await.expect("nothing hangs");
    let (of_records, described) = namespaces(&machine);
    assert_eq!(of_records.len(), 2);
    assert!(described.is_superset(&of_records));
    assert_eq!(described.len(), before, "one of the others went");
}
