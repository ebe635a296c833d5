//! How fast a device moves KV raw and encoded, like compared with like.
//!
//! A save is measured whole: what it takes to cut and seal its slots, and to bring once more what did not
//! fit, is different for both ways, too. What the engine computes between its layers is not its time.
//!
//! A small transfer is slower than a large one, and one beside others slower than one alone, raw or
//! encoded. So each is charged its share of the time in which several were under way, and set against
//! those of about its own size; a median keeps a single stall from deciding, and what is old says nothing.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stemkv_store::JobEvent;

use crate::pipeline::meter::STALE;
use crate::pipeline::{Driven, Shared};
use crate::placement::Rates;

/// Transfers of one size that are remembered, each way.
const REMEMBERED: usize = 16;

/// How fast one device moves KV, raw and encoded.
#[derive(Default)]
pub(crate) struct Pace {
    pub(crate) saves: BothWays,
    pub(crate) loads: BothWays,
    /// Saves since one went the way that was not chosen.
    pub(crate) tried: AtomicU32,
}

/// How fast KV moves in one direction, raw and encoded.
#[derive(Default)]
pub(crate) struct BothWays(Mutex<State>);

#[derive(Default)]
struct State {
    under_way: u32,
    /// Seconds that one would have been charged that was under way all the time, and until when.
    charged: f64,
    until: Duration,
    /// By size, in powers of two.
    classes: BTreeMap<u32, Class>,
}

#[derive(Default)]
struct Class {
    raw: Recent,
    encoded: Recent,
}

/// The last transfers of one size.
#[derive(Default)]
struct Recent(VecDeque<Sample>);

struct Sample {
    at: Duration,
    bytes: f64,
    seconds: f64,
}

/// When a transfer began, in seconds that it is charged from.
pub(crate) struct Begun(f64);

impl BothWays {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self, now: Duration) -> Begun {
        let mut state = self.state();
        state.charge(now);
        state.under_way += 1;
        Begun(state.charged)
    }

    /// It has ended; `bytes` of KV were moved, or none where it did not end as it should.
    pub(crate) fn end(&self, now: Duration, begun: Begun, bytes: u64, is_encoded: bool) {
        let seconds = self.charge(now, begun);
        self.measured(now, bytes, seconds, is_encoded);
    }

    /// It has ended; the seconds that it is charged.
    fn charge(&self, now: Duration, begun: Begun) -> f64 {
        let mut state = self.state();
        state.charge(now);
        state.under_way -= 1;
        state.charged - begun.0
    }

    /// `bytes` of KV took so many seconds.
    fn measured(&self, now: Duration, bytes: u64, seconds: f64, is_encoded: bool) {
        // Without a duration there is no rate: a clock may be too coarse.
        if bytes > 0 && seconds > 0.0 {
            let mut state = self.state();
            let class = state.classes.entry(bytes.ilog2()).or_default();
            let recent = match is_encoded {
                true => &mut class.encoded,
                false => &mut class.raw,
            };
            recent.0.truncate(REMEMBERED - 1);
            recent.0.push_front(Sample {
                at: now,
                bytes: bytes as f64,
                seconds,
            });
        }
    }

    /// What both ways reach with transfers of the sizes that went both ways lately. Where there are none,
    /// nothing compares: what encoded ones reach, if there were any, else what raw ones do.
    pub(crate) fn rates(&self, now: Duration) -> Rates {
        let state = self.state();
        let rate = |bytes: f64, seconds: f64| (bytes > 0.0).then(|| bytes / seconds);
        let (mut bytes, mut raw, mut encoded) = (0.0, 0.0, 0.0);
        let mut alone = [(0.0, 0.0); 2];
        for class in state.classes.values() {
            let ways = [&class.raw, &class.encoded].map(|recent| recent.lately(now));
            if let [Some((raw_bytes, of_raw)), Some((encoded_bytes, of_encoded))] = ways {
                let both = raw_bytes + encoded_bytes;
                bytes += both;
                raw += both * of_raw;
                encoded += both * of_encoded;
            }
            for (alone, way) in alone.iter_mut().zip(ways) {
                if let Some((bytes, seconds_a_byte)) = way {
                    alone.0 += bytes;
                    alone.1 += bytes * seconds_a_byte;
                }
            }
        }
        if bytes > 0.0 {
            return Rates {
                raw: rate(bytes, raw),
                encoded: rate(bytes, encoded),
            };
        }
        let [raw, encoded] = alone.map(|(bytes, seconds)| rate(bytes, seconds));
        Rates {
            raw: raw.filter(|_| encoded.is_none()),
            encoded,
        }
    }
}

impl State {
    fn charge(&mut self, now: Duration) {
        if self.under_way > 0 {
            let passed = now.saturating_sub(self.until).as_secs_f64();
            self.charged += passed / f64::from(self.under_way);
        }
        self.until = now.max(self.until);
    }
}

impl Recent {
    /// Bytes that are not too long ago, and the median of their seconds a byte.
    fn lately(&self, now: Duration) -> Option<(f64, f64)> {
        let fresh = self.0.iter().filter(|sample| now < sample.at + STALE);
        let (mut bytes, mut each) = (0.0, Vec::with_capacity(REMEMBERED));
        for sample in fresh {
            bytes += sample.bytes;
            each.push(sample.seconds / sample.bytes);
        }
        each.sort_by(f64::total_cmp);
        let middle = each.len().checked_sub(1)? / 2;
        Some((bytes, each[middle]))
    }
}

/// Measures a save: its jobs, each from when nothing stands before it to its end, and what the store does
/// before the first and behind the last of them.
pub(crate) struct TimedSave {
    shared: Arc<Shared>,
    on: Arc<Driven>,
    is_encoded: bool,
    seconds: Mutex<f64>,
}

impl TimedSave {
    /// Of a save that began at `begun`, whose slots are cut by now.
    pub(crate) fn new(
        shared: &Arc<Shared>,
        on: &Arc<Driven>,
        begun: Duration,
        is_encoded: bool,
    ) -> Self {
        let timed = TimedSave {
            shared: shared.clone(),
            on: on.clone(),
            is_encoded,
            seconds: Mutex::default(),
        };
        timed.worked_since(begun);
        timed
    }

    fn now(&self) -> Duration {
        self.shared.clock.now()
    }

    fn add(&self, seconds: f64) {
        *self.seconds.lock().unwrap_or_else(PoisonError::into_inner) += seconds;
    }

    /// Since then the store has worked for the save.
    pub(crate) fn worked_since(&self, since: Duration) {
        self.add(self.now().saturating_sub(since).as_secs_f64());
    }

    /// A measurement of one of its jobs, which its events are told.
    pub(crate) fn job(self: &Arc<Self>) -> TimedJob {
        TimedJob {
            save: self.clone(),
            begun: None,
        }
    }

    /// `bytes` of KV were saved, and nothing is left to be done.
    pub(crate) fn saved(&self, bytes: u64) {
        let seconds = *self.seconds.lock().unwrap_or_else(PoisonError::into_inner);
        let saves = &self.on.pace.saves;
        saves.measured(self.now(), bytes, seconds, self.is_encoded);
    }
}

/// Measures one job of a save.
pub(crate) struct TimedJob {
    save: Arc<TimedSave>,
    begun: Option<Begun>,
}

impl TimedJob {
    pub(crate) fn event(&mut self, event: &JobEvent) {
        match event {
            JobEvent::Begun => {
                self.begun = Some(self.save.on.pace.saves.begin(self.save.now()));
            }
            JobEvent::Layer { .. } | JobEvent::Failed { .. } => {}
            JobEvent::Done { .. } => self.stop(),
        }
    }

    fn stop(&mut self) {
        if let Some(begun) = self.begun.take() {
            let saves = &self.save.on.pace.saves;
            self.save.add(saves.charge(self.save.now(), begun));
        }
    }
}

impl Drop for TimedJob {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Shown: what does not compare is not compared, and neither a stall nor what is long ago decides.
#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    const fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// A transfer of so many milliseconds alone.
    fn one(pace: &BothWays, start: u64, millis: u64, bytes: u64, is_encoded: bool) {
        let begun = pace.begin(at(start));
        pace.end(at(start + millis), begun, bytes, is_encoded);
    }

    fn mib_a_second(rates: Rates) -> [Option<u64>; 2] {
        [rates.raw, rates.encoded].map(|rate| rate.map(|rate| (rate / MIB as f64).round() as u64))
    }

    #[test]
    fn transfers_are_compared_with_those_of_their_size() {
        let pace = BothWays::default();
        assert_eq!(mib_a_second(pace.rates(at(0))), [None, None]);
        // The encoded ones were short prompts: that they are slower says nothing.
        one(&pace, 0, 100, 100 * MIB, false);
        assert_eq!(mib_a_second(pace.rates(at(100))), [Some(1000), None]);
        one(&pace, 100, 10, 2 * MIB, true);
        assert_eq!(mib_a_second(pace.rates(at(200))), [None, Some(200)]);
        one(&pace, 200, 20, 2 * MIB, false);
        assert_eq!(mib_a_second(pace.rates(at(300))), [Some(100), Some(200)]);
    }

    #[test]
    fn transfers_beside_each_other_share_the_time() {
        let pace = BothWays::default();
        let raw = pace.begin(at(0));
        let encoded = pace.begin(at(0));
        pace.end(at(100), encoded, 10 * MIB, true);
        pace.end(at(150), raw, 10 * MIB, false);
        assert_eq!(mib_a_second(pace.rates(at(200))), [Some(100), Some(200)]);
        // What was given up is no measure of anything.
        let begun = pace.begin(at(200));
        pace.end(at(900), begun, 0, true);
        assert_eq!(mib_a_second(pace.rates(at(1000))), [Some(100), Some(200)]);
    }

    #[test]
    fn one_stall_does_not_decide_and_a_minute_later_nothing_does() {
        let pace = BothWays::default();
        for turn in 0..3 {
            one(&pace, 100 * turn, 10, 10 * MIB, false);
            one(&pace, 100 * turn + 10, 5, 10 * MIB, true);
        }
        one(&pace, 300, 9000, 10 * MIB, true);
        assert_eq!(mib_a_second(pace.rates(at(9300))), [Some(1000), Some(2000)]);
        for turn in 0..REMEMBERED as u64 {
            one(&pace, 10_000 + 50 * turn, 40, 10 * MIB, true);
        }
        assert_eq!(
            mib_a_second(pace.rates(at(12_000))),
            [Some(1000), Some(250)]
        );
        assert_eq!(mib_a_second(pace.rates(at(60_300))), [None, Some(250)]);
        assert_eq!(mib_a_second(pace.rates(at(80_000))), [None, None]);
    }
}
