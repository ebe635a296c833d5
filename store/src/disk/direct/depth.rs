//! How many reads a disk is given at once: found out from the reads that are made anyway.
//!
//! What a disk wants is known of none beforehand: a local one is at its best with few, one behind a network
//! may want many. So now and then twice as many are kept under way for a while, or half, and kept if that was
//! faster. Nothing is read for it.
//!
//! Disks swing, and others use them too. So stretches with the one and the other number take turns, each is
//! set against the one beside it alone, which of the two comes first changes from pair to pair, and nearly all
//! pairs must agree. A trial that can no longer win is given up at once.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Calls for less say nothing: they are over before a number makes a difference.
pub(super) const COUNTED_BYTES_MIN: u64 = 8 << 20;

/// Bytes of one stretch.
const STRETCH_BYTES: u64 = 64 << 20;

/// Pairs of stretches that decide, and how many of them must be won.
const PAIRS: u32 = 8;
const PAIRS_WON_MIN: u32 = 7;

/// A pair is won by so much: less is not worth a change.
const GAIN: f64 = 1.05;

/// Bytes between a trial that changed nothing and the next one: twice as many each time, so that a disk which
/// is known is hardly ever bothered.
const REST_BYTES: RangeInclusive<u64> = 1 << 30..=16 << 30;

/// Bytes before the first trial: what is read right after opening is waited for.
const FIRST_REST_BYTES: u64 = 256 << 20;

/// The number of reads to keep under way for one call. Cheap: a short lock at a call's beginning and end.
pub(super) struct Depth {
    bounds: RangeInclusive<usize>,
    /// Bytes that calls have brought.
    arrived: AtomicU64,
    state: Mutex<State>,
}

struct State {
    /// What was found so far.
    best: usize,
    trial: Option<Trial>,
    /// Bytes until the next trial, and between it and the one after it, should it change nothing.
    rest_bytes: u64,
    next_rest_bytes: u64,
    /// Does the next trial take more rather than less?
    is_upward: bool,
    stretch: Stretch,
    /// Calls under way, and up to when the stretch knows of them.
    calls: usize,
    until: Duration,
}

/// `other` beside the best, in pairs of stretches.
struct Trial {
    other: usize,
    /// Bytes a second of the pair's first stretch, once that is over.
    first: Option<f64>,
    pairs: u32,
    won: u32,
}

/// Calls with one number.
#[derive(Default)]
struct Stretch {
    number: u64,
    /// Calls of earlier ones that are still under way. It is measured from when they have ended: beside each
    /// other, those with more reads under way get more of the disk.
    before: usize,
    /// What had arrived then.
    arrived: u64,
    /// How long calls were under way since.
    busy: Duration,
}

/// A call that has begun.
#[derive(Clone, Copy)]
pub(super) struct Begun {
    /// Reads to keep under way for it.
    pub(super) depth: usize,
    /// Of what stretch it is; `None` where it does not count.
    stretch: Option<u64>,
}

impl Depth {
    /// Looks for it within `bounds`, by doubling and halving, from `start` on.
    pub(super) fn new(start: usize, bounds: RangeInclusive<usize>) -> Depth {
        Depth {
            state: Mutex::new(State {
                best: start.clamp(*bounds.start(), *bounds.end()),
                trial: None,
                rest_bytes: FIRST_REST_BYTES,
                next_rest_bytes: *REST_BYTES.start(),
                is_upward: true,
                stretch: Stretch::default(),
                calls: 0,
                until: Duration::ZERO,
            }),
            bounds,
            arrived: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was found so far.
    pub(super) fn best(&self) -> usize {
        self.state().best
    }

    /// A call for `bytes` begins. `now` is any clock's that does not go back.
    pub(super) fn begin(&self, now: Duration, bytes: u64) -> Begun {
        let mut state = self.state();
        let counts = bytes >= COUNTED_BYTES_MIN && self.bounds.start() < self.bounds.end();
        if counts {
            state.charge(now);
            state.calls += 1;
        }
        Begun {
            depth: state.depth(),
            stretch: counts.then_some(state.stretch.number),
        }
    }

    /// So much of a call's bytes is there.
    pub(super) fn arrived(&self, begun: &Begun, bytes: u64) {
        if begun.stretch.is_some() {
            self.arrived.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// The call has ended, or reads of it `failed`, which says nothing of how fast the disk is.
    pub(super) fn end(&self, now: Duration, begun: Begun, failed: bool) {
        let Some(number) = begun.stretch else { return };
        let arrived = self.arrived.load(Ordering::Relaxed);
        let mut state = self.state();
        state.charge(now);
        state.calls -= 1;
        let stretch = &mut state.stretch;
        if number != stretch.number {
            stretch.before -= 1;
            if stretch.before == 0 {
                stretch.arrived = arrived;
            }
            return;
        }
        if failed {
            return state.give_up(arrived, &self.bounds);
        }
        if stretch.before > 0 {
            return;
        }
        let bytes = arrived - stretch.arrived;
        let wanted = match state.trial {
            Some(_) => STRETCH_BYTES,
            None => state.rest_bytes,
        };
        if bytes >= wanted && state.stretch.busy > Duration::ZERO {
            let rate = bytes as f64 / state.stretch.busy.as_secs_f64();
            state.stretch_ended(rate, &self.bounds);
            state.next_stretch(arrived);
        }
    }
}

impl State {
    /// What the stretch that goes on has under way.
    fn depth(&self) -> usize {
        match &self.trial {
            Some(trial) if trial.is_with_other() => trial.other,
            _ => self.best,
        }
    }

    fn charge(&mut self, now: Duration) {
        if self.calls > 0 && self.stretch.before == 0 {
            self.stretch.busy += now.saturating_sub(self.until);
        }
        self.until = now.max(self.until);
    }

    fn stretch_ended(&mut self, rate: f64, bounds: &RangeInclusive<usize>) {
        match &mut self.trial {
            None => self.begin_trial(bounds),
            Some(trial) => {
                if let Some(is_won) = trial.stretch_ended(rate) {
                    self.decide(is_won, bounds);
                }
            }
        }
    }

    /// Reads fail: nothing is tried on such a disk.
    fn give_up(&mut self, arrived: u64, bounds: &RangeInclusive<usize>) {
        if self.trial.is_some() {
            self.decide(false, bounds);
            self.next_stretch(arrived);
        }
    }

    fn next_stretch(&mut self, arrived: u64) {
        self.stretch = Stretch {
            number: self.stretch.number + 1,
            before: self.calls,
            arrived,
            busy: Duration::ZERO,
        };
    }

    fn begin_trial(&mut self, bounds: &RangeInclusive<usize>) {
        let other = |is_upward| match is_upward {
            true => self.best * 2,
            false => self.best / 2,
        };
        self.is_upward ^= !bounds.contains(&other(self.is_upward));
        let other = other(self.is_upward);
        self.trial = bounds.contains(&other).then_some(Trial {
            other,
            first: None,
            pairs: 0,
            won: 0,
        });
    }

    fn decide(&mut self, is_won: bool, bounds: &RangeInclusive<usize>) {
        let Some(trial) = self.trial.take() else {
            return;
        };
        if is_won {
            // On in the same direction.
            self.best = trial.other;
            self.next_rest_bytes = *REST_BYTES.start();
            tracing::info!(depth = self.best, "reads under way for one call");
            return self.begin_trial(bounds);
        }
        self.is_upward = !self.is_upward;
        self.rest_bytes = self.next_rest_bytes;
        self.next_rest_bytes = (2 * self.rest_bytes).min(*REST_BYTES.end());
    }
}

impl Trial {
    /// Is it the other number's turn?
    fn is_with_other(&self) -> bool {
        self.first.is_some() ^ self.pairs.is_multiple_of(2)
    }

    /// Did the other one win? `None` where that is not known yet.
    fn stretch_ended(&mut self, rate: f64) -> Option<bool> {
        let with_other = self.is_with_other();
        let Some(first) = self.first.take() else {
            self.first = Some(rate);
            return None;
        };
        let gain = match with_other {
            true => rate / first,
            false => first / rate,
        };
        self.pairs += 1;
        self.won += u32::from(gain >= GAIN);
        let lost = self.pairs - self.won;
        match () {
            () if lost > PAIRS - PAIRS_WON_MIN => Some(false),
            () if self.pairs == PAIRS => Some(true),
            () => None,
        }
    }
}

/// Shown on disks of which it is known what they want: it is found, whichever it is and however the disk swings;
/// where it makes no difference hardly anything is tried; what is no measure is not taken for one.
#[cfg(test)]
mod tests {
    use super::*;

    const CALL_BYTES: u64 = 32 << 20;
    const START: usize = 16;
    const BOUNDS: RangeInclusive<usize> = 4..=64;

    struct Random(u64);

    impl Random {
        /// 0 to 1.
        fn next(&mut self) -> f64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) as f64 / (1_u64 << 53) as f64
        }
    }

    /// A disk that is shared by the calls under way: bytes a second by reads under way for each.
    struct Disk<'a> {
        rate: &'a dyn Fn(f64) -> f64,
        /// A call is faster or slower than that by up to such a share.
        noise: f64,
        /// And all of them are for some seconds.
        swing: f64,
        readers: usize,
    }

    /// What came of it.
    struct Outcome {
        best: usize,
        changes: usize,
        /// The share of calls that had another number than the best one then.
        tried: f64,
    }

    impl Disk<'_> {
        /// As many calls, each reader's one after the other.
        fn run(&self, calls: usize, seed: u64) -> Outcome {
            let depth = Depth::new(START, BOUNDS);
            let mut random = Random(seed | 1);
            let mut now = 0.0_f64;
            let at = Duration::from_secs_f64;
            // Bytes that are left, as if each went at the pace that its noise says.
            let mut under_way: Vec<(Begun, f64)> = Vec::new();
            let (mut best, mut changes, mut tried) = (START, 0, 0);
            let (mut swing, mut swing_ends) = (1.0, 0.0);
            for _ in 0..calls {
                while under_way.len() < self.readers {
                    let begun = depth.begin(at(now), CALL_BYTES);
                    tried += usize::from(begun.depth != depth.best());
                    let noise = 1.0 + self.noise * (2.0 * random.next() - 1.0);
                    under_way.push((begun, CALL_BYTES as f64 * noise));
                }
                if now >= swing_ends {
                    swing = 1.0 + self.swing * random.next();
                    swing_ends = now + 5.0 * random.next();
                }
                // The disk sees all that is under way, and serves each call by its part of that.
                let all: usize = under_way.iter().map(|(begun, _)| begun.depth).sum();
                let pace = (self.rate)(all as f64) / swing;
                let shares: Vec<f64> = under_way
                    .iter()
                    .map(|(begun, _)| pace * begun.depth as f64 / all as f64)
                    .collect();
                let ends = under_way
                    .iter()
                    .zip(&shares)
                    .map(|((_, left), share)| left / share);
                let (first, seconds) = ends
                    .enumerate()
                    .min_by(|a, b| a.1.total_cmp(&b.1))
                    .expect("a reader");
                now += seconds;
                for ((begun, left), share) in under_way.iter_mut().zip(&shares) {
                    *left -= share * seconds;
                    depth.arrived(begun, (share * seconds) as u64);
                }
                let (begun, _) = under_way.remove(first);
                depth.end(at(now), begun, false);
                changes += usize::from(depth.best() != best);
                best = depth.best();
            }
            Outcome {
                best,
                changes,
                tried: tried as f64 / calls as f64,
            }
        }
    }

    /// As much as reads of 512 KiB give that take a millisecond each, up to a limit.
    fn far(most: f64) -> impl Fn(f64) -> f64 {
        move |depth| (depth * 524e6).min(most)
    }

    #[test]
    fn a_disk_that_wants_many_gets_them_and_one_that_wants_few_gets_few() {
        let thrashing = |depth: f64| 2e8 / (1.0 + depth / 16.0);
        for readers in [1, 2, 4] {
            let wants = |most: f64| move |depth: f64| far(most * readers as f64)(depth);
            let cases: [(&dyn Fn(f64) -> f64, usize); 3] =
                [(&wants(30e9), 64), (&wants(15e9), 32), (&thrashing, 4)];
            for (rate, expected) in cases {
                let found = (0..20).filter(|&seed| {
                    let disk = Disk {
                        rate,
                        noise: 0.1,
                        swing: 0.5,
                        readers,
                    };
                    disk.run(3000, seed).best == expected
                });
                // Once in a while noise looks like a gain.
                let found = found.count();
                assert!(found >= 19, "{readers} readers, {expected}: {found} of 20");
            }
        }
    }

    #[test]
    fn where_it_makes_no_difference_little_is_tried_and_nothing_changed() {
        for readers in [1, 2, 4] {
            let (mut changes, mut tried) = (0, 0.0_f64);
            for seed in 0..50 {
                let disk = Disk {
                    rate: &|_| 2e9,
                    noise: 0.2,
                    swing: 2.0,
                    readers,
                };
                let outcome = disk.run(3000, seed);
                changes += outcome.changes;
                tried = tried.max(outcome.tried);
            }
            // Of 50 stores that read 100 GB each.
            assert!(changes <= 10, "{readers} readers: {changes} changes");
            assert!(tried < 0.05, "{readers} readers: {tried}");
        }
    }

    #[test]
    fn a_trial_that_loses_is_over_after_two_pairs() {
        let depth = Depth::new(START, BOUNDS);
        let mut now = 0;
        let mut others = 0;
        for _ in 0..(FIRST_REST_BYTES + *REST_BYTES.start()) / CALL_BYTES {
            let begun = depth.begin(Duration::from_millis(now), CALL_BYTES);
            let is_other = begun.depth != START;
            others += u64::from(is_other);
            now += if is_other { 200 } else { 100 };
            depth.arrived(&begun, CALL_BYTES);
            depth.end(Duration::from_millis(now), begun, false);
        }
        assert_eq!(others * CALL_BYTES, 2 * STRETCH_BYTES);
        assert_eq!(depth.best(), START);
    }

    #[test]
    fn short_calls_are_no_measure() {
        // Twice as fast with twice as many, as it seems.
        let depth = Depth::new(START, BOUNDS);
        let mut now = Duration::ZERO;
        for _ in 0..20_000 {
            let begun = depth.begin(now, COUNTED_BYTES_MIN - 1);
            now += Duration::from_millis(1600 / begun.depth as u64);
            depth.arrived(&begun, COUNTED_BYTES_MIN - 1);
            depth.end(now, begun, false);
        }
        assert_eq!(depth.best(), START);
    }

    #[test]
    fn a_number_with_which_reads_fail_is_not_taken_however_soon_they_do() {
        let depth = Depth::new(START, BOUNDS);
        let (mut now, mut failed) = (Duration::ZERO, 0);
        for _ in 0..2000 {
            let begun = depth.begin(now, CALL_BYTES);
            let fails = begun.depth > START;
            now += Duration::from_millis(if fails { 1 } else { 100 });
            depth.arrived(&begun, CALL_BYTES);
            depth.end(now, begun, fails);
            failed += usize::from(fails);
        }
        assert_eq!(depth.best(), START);
        assert!((1..10).contains(&failed), "{failed}");
    }

    #[test]
    fn one_number_is_kept_where_there_is_no_other() {
        let depth = Depth::new(START, 8..=8);
        for call in 0..200 {
            let begun = depth.begin(Duration::from_secs(call), CALL_BYTES);
            assert_eq!(begun.depth, 8);
            depth.arrived(&begun, CALL_BYTES);
            depth.end(Duration::from_secs(call + 1), begun, false);
        }
        assert_eq!(depth.best(), 8);
    }
}
