//! How fast a stage is: measured while it works, for decisions.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::placement::Speed;

/// Once a stage was busy for this long, what was measured counts half.
const MEMORY: Duration = Duration::from_secs(2);
/// A speed that was not measured for this long says nothing any more: what it once spoke against is
/// tried again.
pub(crate) const STALE: Duration = Duration::from_secs(60);

/// Bytes over the time in which anything was under way, the last seconds counting most; and what is
/// waiting.
#[derive(Default)]
pub(crate) struct Meter(Mutex<State>);

#[derive(Default)]
struct State {
    under_way: usize,
    busy_since: Duration,
    bytes: f64,
    busy_seconds: f64,
    measured: Option<Duration>,
    queued_bytes: u64,
}

impl Meter {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something begins to move.
    pub(crate) fn begin(&self, now: Duration) {
        let mut state = self.state();
        if state.under_way == 0 {
            state.busy_since = now;
        }
        state.under_way += 1;
    }

    /// Of what is under way `bytes` have moved.
    pub(crate) fn moved(&self, now: Duration, bytes: u64) {
        self.state().count(now, bytes);
    }

    /// It has ended, and `bytes` more were moved.
    pub(crate) fn end(&self, now: Duration, bytes: u64) {
        let mut state = self.state();
        state.count(now, bytes);
        state.under_way -= 1;
    }

    /// `bytes` more are waiting or under way.
    pub(crate) fn queue(&self, bytes: u64) {
        self.state().queued_bytes += bytes;
    }

    /// So many are not any more.
    pub(crate) fn unqueue(&self, bytes: u64) {
        self.state().queued_bytes -= bytes;
    }

    /// Bytes a second; `None` before anything was measured.
    pub(crate) fn bytes_per_second(&self) -> Option<f64> {
        self.state().rate()
    }

    /// What a decision at `now` goes by.
    pub(crate) fn speed(&self, now: Duration) -> Speed {
        let state = self.state();
        let is_fresh = state.measured.is_some_and(|at| now < at + STALE);
        Speed {
            bytes_per_second: state.rate().filter(|_| is_fresh),
            queued_bytes: state.queued_bytes,
        }
    }
}

impl State {
    fn count(&mut self, now: Duration, bytes: u64) {
        self.busy_seconds += now.saturating_sub(self.busy_since).as_secs_f64();
        self.busy_since = now;
        if bytes == 0 {
            return;
        }
        self.bytes += bytes as f64;
        self.measured = Some(now);
        if self.busy_seconds > MEMORY.as_secs_f64() {
            self.busy_seconds /= 2.0;
            self.bytes /= 2.0;
        }
    }

    fn rate(&self) -> Option<f64> {
        (self.bytes > 0.0 && self.busy_seconds > 0.0).then(|| self.bytes / self.busy_seconds)
    }
}

/// Shown: what overlaps is counted once, and what is old goes.
#[cfg(test)]
mod tests {
    use super::*;

    const fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn two_at_once_are_as_fast_as_both_together() {
        let meter = Meter::default();
        assert_eq!(meter.bytes_per_second(), None);
        meter.begin(at(1000));
        meter.begin(at(1050));
        meter.end(at(1100), 5_000);
        meter.end(at(1100), 5_000);
        let rate = meter.bytes_per_second().expect("measured");
        assert!((rate - 100_000.0).abs() < 1e-6, "{rate}");
        // Idle time does not count.
        meter.begin(at(9000));
        meter.end(at(9100), 10_000);
        let rate = meter.bytes_per_second().expect("measured");
        assert!((rate - 100_000.0).abs() < 1e-6, "{rate}");
    }

    #[test]
    fn the_last_seconds_count_most_and_after_a_minute_nothing_does() {
        let meter = Meter::default();
        for (start, bytes) in [(0, 100), (2, 100), (4, 900), (6, 900), (8, 900), (10, 900)] {
            meter.begin(Duration::from_secs(start));
            meter.end(Duration::from_secs(start + 2), bytes);
        }
        let rate = meter.bytes_per_second().expect("measured");
        assert!(rate > 350.0, "{rate} after eight seconds of 450");
        assert!(
            meter
                .speed(Duration::from_secs(71))
                .bytes_per_second
                .is_some()
        );
        assert!(
            meter
                .speed(Duration::from_secs(72))
                .bytes_per_second
                .is_none()
        );
        assert!(
            meter.bytes_per_second().is_some(),
            "as an estimate it will do"
        );
    }
}
