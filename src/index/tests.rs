//! Shown: what `tests/index_model/` cannot say by itself: small spaces exhausted, many threads,
//! waiting for another's save, flat keys, the order of eviction, what is remembered of uses.

use std::num::NonZeroU64;
use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Waker};

use stemkv_store::{RecordId, SimClock, SlotId, Tier};

use super::*;
use crate::hash::Prompt;

const ROOT: Key = Key([4; 32]);

fn index() -> Arc<Index> {
    Arc::new(Index::new(Arc::new(SimClock::default())))
}

fn path(tokens: &[u32]) -> Prompt<'_> {
    Prompt::tokens(ROOT, 1, tokens)
}

fn matched(index: &Index, tokens: &[u32]) -> usize {
    index.match_prefix(&mut path(tokens)).blocks
}

/// Saves a path; slots are 100 × its length + position.
fn save(index: &Arc<Index>, tokens: &[u32]) {
    let mut claim = index.claim(&mut path(tokens), tokens.len());
    for i in claim.positions().to_vec() {
        claim.publish(i, SlotId((100 * tokens.len() + i) as u32));
    }
}

fn record(id: u64) -> RecordId {
    RecordId(NonZeroU64::new(id).expect("not 0"))
}

fn evict_keys(index: &Index, pool: Pool, want: usize) -> Vec<Key> {
    let evicted = index.evict(pool, want);
    evicted.iter().map(|evicted| evicted.key).collect()
}

/// Every order of `steps` that keeps the order within each pair (an acquisition, its release).
fn orders(pairs: usize, mut each: impl FnMut(&[(usize, bool)])) -> usize {
    type Each<'a> = &'a mut dyn FnMut(&[(usize, bool)]);
    fn go(done: &mut Vec<(usize, bool)>, state: &mut [u8], each: Each<'_>) -> usize {
        let mut count = 0;
        if state.iter().all(|&steps| steps == 2) {
            each(done);
            return 1;
        }
        for i in 0..state.len() {
            if state[i] < 2 {
                done.push((i, state[i] == 0));
                state[i] += 1;
                count += go(done, state, each);
                state[i] -= 1;
                done.pop();
            }
        }
        count
    }
    go(&mut Vec::new(), &mut vec![0; pairs], &mut each)
}

/// Two pins and a claim over three blocks (all lengths of each), all 90 orders of begin and end, all
/// that can be evicted taken after every step: what is held stays, and nothing is left at the end.
#[test]
fn three_blocks_two_pins_and_a_claim_in_every_order() {
    let tokens = [1, 2, 3];
    let mut runs = 0;
    for lens in (0..64).map(|n| [n / 16 % 4, n / 4 % 4, n % 4]) {
        runs += orders(3, |steps| {
            let index = index();
            save(&index, &tokens[..2]);
            let mut pins = [None, None];
            let mut claim: Option<Claim> = None;
            for &(who, begin) in steps {
                match (who, begin) {
                    (2, true) => {
                        claim = Some(index.claim(&mut path(&tokens[..lens[2]]), lens[2]));
                    }
                    (2, false) => {
                        let mut claim = claim.take().expect("begun before");
                        for i in claim.positions().to_vec() {
                            claim.publish(i, SlotId(i as u32));
                        }
                        drop(claim);
                    }
                    (_, true) => pins[who] = Some(index.pin(&mut path(&tokens[..lens[who]])).0),
                    (_, false) => pins[who] = None,
                }
                index.check();
                let held = pins.iter().flatten().map(Pin::blocks).max().unwrap_or(0);
                let open = claim.as_ref().map_or(0, |claim| claim.positions().len());
                let pinned = claim.as_ref().map_or(held, |_| held.max(lens[2]));
                index.evict(Pool::Host, usize::MAX);
                index.check();
                let stats = index.stats().total;
                assert_eq!(stats.pinned_blocks, pinned);
                assert_eq!(stats.blocks, pinned, "all that is not pinned went");
                assert_eq!(stats.pending_blocks, open);
                assert!(matched(&index, &tokens) >= held, "what is pinned stays");
            }
            assert_eq!(index.stats(), IndexStats::default());
        });
    }
    assert_eq!(runs, 64 * 90);
}

#[test]
fn ten_threads_end_with_nothing_held_and_every_slot_accounted_for() {
    let index = index();
    let barrier = Barrier::new(10);
    let published: usize = std::thread::scope(|scope| {
        let workers: Vec<_> = (0u32..10)
            .map(|worker| {
                let (index, barrier) = (&index, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    let mut balance = 0;
                    for round in 0u32..300 {
                        // Three threads a conversation; they meet on its blocks.
                        let tokens: Vec<u32> = (0..20)
                            .map(|i| (worker / 3 + i) * (round % 7 + 1))
                            .collect();
                        let (pin, found) = index.pin(&mut path(&tokens));
                        let states = pin.states(0..pin.blocks());
                        assert_eq!(states.len(), found.blocks);
                        assert!(states.iter().all(|state| state.host.is_some()));
                        let mut claim = index.claim(&mut path(&tokens), 15);
                        let mine = claim.positions().to_vec();
                        for &i in &mine[..mine.len() - mine.len() / 4] {
                            claim.publish(i, SlotId(i as u32));
                            balance += 1;
                        }
                        drop(claim);
                        drop(pin);
                        if round % 5 == 0 {
                            balance -= index.evict(Pool::Host, 10).len() as isize;
                        }
                    }
                    balance
                })
            })
            .collect();
        let balance: isize = workers
            .into_iter()
            .map(|worker| worker.join().expect("no panic"))
            .sum();
        usize::try_from(balance).expect("evicted no more than was published")
    });
    index.check();
    let stats = index.stats();
    assert_eq!(stats.pins, 0);
    assert_eq!(stats.total.tier_blocks(Tier::Host), published);
    assert_eq!(
        (stats.total.pinned_blocks, stats.total.pending_blocks),
        (0, 0)
    );
    assert_eq!(index.evict(Pool::Host, usize::MAX).len(), published);
    assert_eq!(index.stats(), IndexStats::default());
}

#[test]
fn a_second_claim_gets_what_the_first_does_not_have_and_sees_it_pending() {
    let index = index();
    let mut first = index.claim(&mut path(&[1, 2, 3]), 3);
    assert_eq!(first.positions(), [0, 1, 2]);
    let second = index.claim(&mut path(&[1, 2, 3, 4]), 4);
    assert_eq!(second.positions(), [3]);
    first.publish(0, SlotId(0));
    let found = index.match_prefix(&mut path(&[1, 2, 3, 4, 5]));
    assert_eq!(
        (found.blocks, found.pending_blocks, found.ended),
        (1, 3, Ended::Pending)
    );
    // The second's block needs those before it: they stay as holes, and a third claim fills them.
    drop(first);
    index.check();
    let found = index.match_prefix(&mut path(&[1, 2, 3, 4, 5]));
    assert_eq!(
        (found.blocks, found.pending_blocks, found.ended),
        (1, 0, Ended::Hole)
    );
    let mut second = second;
    second.publish(3, SlotId(3));
    let mut third = index.claim(&mut path(&[1, 2, 3, 4, 5]), 5);
    assert_eq!(third.positions(), [1, 2, 4]);
    third.publish_all(&[(1, SlotId(1)), (2, SlotId(2)), (4, SlotId(4))]);
    assert_eq!(matched(&index, &[1, 2, 3, 4, 5]), 5);
    assert_eq!(third.into_pin().blocks(), 5);
    index.check();
}

fn poll(future: &mut (impl Future<Output = ()> + Unpin)) -> Poll<()> {
    std::pin::Pin::new(future).poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn waits_end_with_publish_and_with_abandon_and_not_before() {
    let index = index();
    let tokens = [1, 2, 3];
    let mut claim = index.claim(&mut path(&tokens), 3);
    let waits: Vec<PendingWait> = (0..3)
        .map(|i| index.wait_pending(&mut path(&tokens), i).expect("pending"))
        .collect();
    assert!(index.wait_pending(&mut path(&[1, 9]), 1).is_none());
    assert_eq!(index.stats().waited_blocks, 3);
    let mut first = Box::pin(waits[0].wait());
    assert_eq!(poll(&mut first), Poll::Pending);
    // Begun, not polled: it may not miss the end either.
    let mut second = Box::pin(waits[1].wait());
    claim.publish(0, SlotId(0));
    assert_eq!(poll(&mut first), Poll::Ready(()));
    assert!(!waits[1].is_over());
    assert!(
        index.wait_pending(&mut path(&tokens), 0).is_none(),
        "published"
    );
    claim.abandon_from(2);
    assert!(waits[2].is_over() && !waits[1].is_over());
    drop(claim);
    assert!(waits[1].is_over());
    assert_eq!(poll(&mut second), Poll::Ready(()));
    assert_eq!(
        poll(&mut Box::pin(waits[1].wait())),
        Poll::Ready(()),
        "again"
    );
    assert_eq!(index.stats().waited_blocks, 0);
    index.check();
}

#[test]
#[should_panic(expected = "only a block that this claim is to fill")]
fn publishing_a_block_twice_panics() {
    let index = index();
    let mut claim = index.claim(&mut path(&[1]), 1);
    claim.publish(0, SlotId(0));
    claim.publish(0, SlotId(1));
}

#[test]
fn the_least_recently_leased_run_goes_first_from_its_tail() {
    let index = index();
    for tokens in [[1, 1, 1], [1, 2, 2], [3, 3, 3]] {
        save(&index, &tokens);
    }
    drop(index.pin(&mut path(&[1, 1])));
    let key = |tokens: &[u32]| path(tokens).get(tokens.len() - 1).expect("not empty");
    let order = [
        key(&[1, 1, 1]),
        key(&[1, 2, 2]),
        key(&[1, 2]),
        key(&[3, 3, 3]),
        key(&[3, 3]),
        key(&[3]),
        key(&[1, 1]),
        key(&[1]),
    ];
    assert_eq!(evict_keys(&index, Pool::Host, 3), order[..3]);
    index.check();
    assert_eq!(evict_keys(&index, Pool::Host, usize::MAX), order[3..]);
}

#[test]
fn host_copies_of_what_is_on_disk_go_although_descendants_stay() {
    let index = index();
    let tokens = [1, 2, 3];
    save(&index, &tokens);
    let (pin, _) = index.pin(&mut path(&tokens));
    for i in 0..3 {
        assert!(pin.set_record(i, record(i as u64 + 1)));
        assert!(!pin.set_record(i, record(9)), "it has one");
    }
    assert!(index.evict(Pool::Host, 9).is_empty(), "pinned");
    drop(pin);
    let evicted = index.evict(Pool::Host, 2);
    assert!(
        evicted
            .iter()
            .all(|evicted| !evicted.forgotten && evicted.record.is_none())
    );
    let found = index.match_prefix(&mut path(&tokens));
    assert_eq!(
        (found.blocks, found.ram_blocks, found.disk_only_blocks),
        (3, 1, 2)
    );
    // The first block's only copy is now its record's: it may not go before those behind it.
    index.evict(Pool::Host, 1);
    let evicted = index.evict(Pool::Disk, 9);
    let ids: Vec<_> = evicted.iter().map(|evicted| evicted.record).collect();
    assert_eq!(ids, [3, 2, 1].map(|id| Some(record(id))));
    assert_eq!(index.stats(), IndexStats::default());
}

#[test]
fn a_lost_block_is_a_hole_until_it_is_saved_again() {
    let index = index();
    let tokens = [1, 2, 3];
    save(&index, &tokens);
    let (pin, _) = index.pin(&mut path(&tokens));
    let lost = pin.lost(1, Pool::Host).expect("it was there");
    assert!(lost.forgotten && lost.host == Some(SlotId(301)));
    assert_eq!(pin.lost(1, Pool::Host), None);
    assert_eq!(pin.lost(1, Pool::Device(0)), None);
    drop(pin);
    let found = index.match_prefix(&mut path(&tokens));
    assert_eq!((found.blocks, found.ended), (1, Ended::Hole));
    assert_eq!(index.stats().total.hole_blocks, 1);
    save(&index, &tokens);
    assert_eq!(matched(&index, &tokens), 3);
    // A hole ages out with what is behind it.
    let (pin, _) = index.pin(&mut path(&tokens));
    assert!(pin.lost(1, Pool::Host).is_some());
    drop(pin);
    assert_eq!(index.evict(Pool::Host, 1).len(), 1);
    index.check();
    assert_eq!(index.stats().total.blocks, 1);
}

#[test]
fn flat_keys_stand_for_themselves() {
    let index = index();
    let names: [&[u8]; 4] = [b"a", b"b", b"c", b"b"];
    let flat = |names: &[&'static [u8]]| Prompt::flat(ROOT, names.to_vec()).expect("valid");
    let mut claim = index.claim(&mut flat(&names), 4);
    assert_eq!(
        claim.positions(),
        [0, 1, 2],
        "the second b is pending already"
    );
    claim.publish_all(&[(0, SlotId(0)), (1, SlotId(1))]);
    claim.abandon_from(2);
    drop(claim);
    index.check();
    // Without `a`, `b` is still there; with `c` before it, a leading run ends at `c`.
    assert_eq!(index.match_prefix(&mut flat(&names[1..])).blocks, 1);
    let found = index.match_prefix(&mut flat(&[b"c", b"b"]));
    assert_eq!((found.blocks, found.ended), (0, Ended::Unknown));
    let (pin, found) = index.pin(&mut flat(&names));
    assert_eq!((pin.blocks(), found.ended), (2, Ended::Unknown));
    assert!(pin.set_record(1, record(7)));
    assert_eq!(pin.states(1..2)[0].record, Some(record(7)));
    assert!(index.evict(Pool::Host, 9).is_empty(), "pinned");
    drop(pin);
    let (pin, _) = index.pin(&mut flat(&[b"b"]));
    let evicted = index.evict(Pool::Host, 9);
    assert_eq!(
        evicted.len(),
        1,
        "`a` goes though `b`, after it in the list, is pinned"
    );
    drop(pin);
    index.check();
}

#[test]
fn the_salted_twin_of_a_namespace_shares_nothing() {
    let index = index();
    save(&index, &[1, 2]);
    let mut other = Prompt::tokens(Key([5; 32]), 1, &[1, 2]);
    assert_eq!(index.match_prefix(&mut other).ended, Ended::Unknown);
    let claim = index.claim(&mut other, 2);
    assert_eq!(claim.positions(), [0, 1]);
    let mut counts = index.namespaces();
    counts.sort_by_key(|&(root, _)| root);
    assert_eq!(counts[0].1.tier_blocks(Tier::Host), 2);
    assert_eq!((counts[1].1.blocks, counts[1].1.pending_blocks), (2, 2));
}

#[test]
fn what_was_leased_is_told_once() {
    let index = index();
    save(&index, &[1, 2]);
    save(&index, &[3]);
    for (tokens, ids) in [(&[1, 2][..], &[1, 2][..]), (&[3], &[3])] {
        let (pin, _) = index.pin(&mut path(tokens));
        for (i, &id) in ids.iter().enumerate() {
            pin.set_record(i, record(id));
        }
    }
    let mut touched = index.take_touched(usize::MAX);
    touched.sort_unstable();
    assert_eq!(touched, [1, 2, 3].map(record));
    assert!(index.take_touched(usize::MAX).is_empty());
    index.check();
    drop(index.pin(&mut path(&[1])));
    assert_eq!(index.take_touched(usize::MAX), [record(1)]);
    let mut hits = Vec::new();
    index.visit(&mut |run| hits.push((run.depth, run.blocks.len(), run.hits)));
    hits.sort_unstable();
    assert_eq!(hits, [(0, 1, 1), (0, 1, 2), (1, 1, 1)]);
}

#[test]
fn a_miss_hashes_one_block_and_a_hit_not_many_more_than_it_has() {
    let index = index();
    let tokens: Vec<u32> = (0..1000).collect();
    let mut prompt = path(&tokens);
    assert_eq!(index.pin(&mut prompt).1.blocks, 0);
    assert_eq!(prompt.hashed().len(), 1);
    save(&index, &tokens[..100]);
    let mut prompt = path(&tokens);
    assert_eq!(index.pin(&mut prompt).1.blocks, 100);
    assert_eq!(prompt.hashed().len(), 256);
}

#[test]
fn long_paths_are_cut_into_runs_and_join_again_up_to_the_bound() {
    let index = index();
    let tokens: Vec<u32> = (0..1000).collect();
    for len in [100, 300, 301, 1000] {
        save(&index, &tokens[..len]);
        index.check();
    }
    assert_eq!(
        index.stats().runs,
        1000_usize.div_ceil(tree::RUN_BLOCKS_MAX)
    );
    let mut pins = Vec::new();
    for len in [999, 1, 257, 255, 511, 512, 513, 700, 256] {
        pins.push(index.pin(&mut path(&tokens[..len])).0);
        index.check();
        drop(index.pin(&mut path(&tokens)));
        index.check();
    }
    assert!(index.stats().runs <= 2 * 1000 / tree::RUN_BLOCKS_MAX + 1);
    for (pin, len) in pins
        .drain(..)
        .zip([999, 1, 257, 255, 511, 512, 513, 700, 256])
    {
        assert_eq!(pin.blocks(), len);
        assert_eq!(
            pin.states(len - 1..len)[0].key,
            path(&tokens).get(len - 1).expect("known")
        );
        drop(pin);
        index.check();
    }
    assert_eq!(index.evict(Pool::Host, usize::MAX).len(), 1000);
    index.check();
}

#[test]
fn a_run_left_with_one_child_joins_it_when_the_sibling_is_evicted() {
    let index = index();
    save(&index, &[1, 4]);
    save(&index, &[1, 2, 3]);
    assert_eq!(index.stats().runs, 3);
    assert_eq!(index.evict(Pool::Host, 1).len(), 1);
    index.check();
    assert_eq!(index.stats().runs, 1);
    assert_eq!(matched(&index, &[1, 2, 3]), 3);
}

#[test]
fn memory_stays_flat_under_churn() {
    let index = index();
    let mut nodes = 0;
    for round in 0u32..2000 {
        let tokens: Vec<u32> = (0..30)
            .map(|i| if i < 10 { i } else { round * 30 + i })
            .collect();
        save(&index, &tokens);
        drop(index.pin(&mut path(&tokens[..(round % 30) as usize])));
        let blocks = index.stats().total.blocks;
        index.evict(Pool::Host, blocks.saturating_sub(200));
        if round == 200 {
            nodes = index.lock().nodes.len();
        }
    }
    index.check();
    let tree = index.lock();
    assert!(
        tree.nodes.len() <= nodes + nodes / 4,
        "{nodes} then {}",
        tree.nodes.len()
    );
    assert!(tree.pins.len() <= 2 && tree.touched.len() <= tree.nodes.len());
}

#[test]
fn what_is_pinned_to_be_moved_is_not_used_by_that() {
    let index = index();
    save(&index, &[1, 2, 3]);
    save(&index, &[4, 5]);
    let mut colder = path(&[1, 2, 3]);
    colder.hash_to(3);
    let pin = index.pin_to_move(&ROOT, colder.hashed(), false);
    assert_eq!(pin.blocks(), 3);
    index.check();
    assert_eq!(evict_keys(&index, Pool::Host, 2).len(), 2, "the others");
    assert_eq!(index.evict(Pool::Host, 1), [], "the rest is pinned");
    save(&index, &[4, 5]);
    drop(pin);
    index.check();
    let last = colder.hashed()[2];
    assert_eq!(
        evict_keys(&index, Pool::Host, 1),
        [last],
        "still the colder"
    );
    let pin = index.pin_to_move(&ROOT, colder.hashed(), false);
    assert_eq!(pin.blocks(), 2, "as far as it is there");
}

#[test]
fn only_what_is_colder_than_some_pins_goes_for_them() {
    let index = index();
    for first in 1..4 {
        save(&index, &[first, 10]);
    }
    let to_move = |first: u32| {
        let tokens = [first, 10];
        let mut path = path(&tokens);
        path.hash_to(2);
        Arc::new(index.pin_to_move(&ROOT, path.hashed(), false))
    };
    let pins = [to_move(3), to_move(2)];
    assert_eq!(index.evict_colder(Pool::Host, 10, &pins).len(), 2);
    assert_eq!(matched(&index, &[1, 10]), 0);
    drop(pins);
    assert_eq!(index.evict_colder(Pool::Host, 10, &[to_move(2)]), []);
    assert_eq!(index.evict_colder(Pool::Host, 10, &[to_move(3)]).len(), 2);
    assert_eq!(index.evict_colder(Pool::Host, 10, &[]).len(), 2);
    index.check();
}
