//! CPU seconds of this process, user and system.

use std::fs;

/// CPU seconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuSeconds {
    pub user: f64,
    pub system: f64,
}

impl CpuSeconds {
    pub fn sum(self) -> f64 {
        self.user + self.system
    }
}

impl std::ops::Sub for CpuSeconds {
    type Output = CpuSeconds;

    fn sub(self, before: CpuSeconds) -> CpuSeconds {
        CpuSeconds {
            user: self.user - before.user,
            system: self.system - before.system,
        }
    }
}

impl std::ops::AddAssign for CpuSeconds {
    fn add_assign(&mut self, more: CpuSeconds) {
        self.user += more.user;
        self.system += more.system;
    }
}

/// What this process has taken since its start, all threads, also those that have ended.
pub fn spent() -> CpuSeconds {
    // SAFETY: a struct of plain numbers, for which zeros are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to the struct above, which lives through the call.
    let answer = unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    assert_eq!(answer, 0, "the arguments are right");
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    CpuSeconds {
        user: seconds(usage.ru_utime),
        system: seconds(usage.ru_stime),
    }
}

/// CPU seconds that this thread has taken since its start.
pub fn of_thread() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is to the struct above, which lives through the call.
    let answer = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(answer, 0, "the arguments are right");
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The processor's name, for the head of a table.
pub fn name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let name = name.map(|name| name.trim_start_matches([' ', '\t', ':']));
    let count = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{count} × {}", name.unwrap_or("unknown CPU"))
}
