use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Time as the store sees it: one of the three seams.
///
/// Nothing else in stemkv asks the operating system for the time, so that a simulation decides it.
pub trait Clock: Send + Sync + 'static {
    /// Time since an arbitrary fixed point. Never goes back.
    fn now(&self) -> Duration;

    /// Wall clock in milliseconds since 1970, for what is kept across restarts. May jump.
    fn unix_ms(&self) -> u64;
}

/// The operating system's clocks.
#[derive(Debug)]
pub struct SystemClock(Instant);

impl Default for SystemClock {
    fn default() -> Self {
        SystemClock(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }

    fn unix_ms(&self) -> u64 {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis() as u64)
    }
}

/// A clock that stands still until it is told to advance.
#[cfg(any(test, feature = "sim"))]
#[derive(Debug, Default)]
pub struct SimClock(std::sync::atomic::AtomicU64);

#[cfg(any(test, feature = "sim"))]
impl SimClock {
    /// Moves the time forward.
    pub fn advance(&self, by: Duration) {
        self.0
            .fetch_add(by.as_nanos() as u64, std::sync::atomic::Ordering::SeqCst);
    }
}

#[cfg(any(test, feature = "sim"))]
impl Clock for SimClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(std::sync::atomic::Ordering::SeqCst))
    }

    fn unix_ms(&self) -> u64 {
        // Starts at a fixed, recognisable date: 2026-01-01.
        1_767_225_600_000 + self.now().as_millis() as u64
    }
}
