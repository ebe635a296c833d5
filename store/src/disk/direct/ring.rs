//! io_uring: one ring for each call under way, kept for the next call.

use std::io;
use std::mem::ManuallyDrop;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};

use super::transfer::Transfer;
use crate::Filling;

/// Rings that are kept for later calls.
const IDLE_RINGS_MAX: usize = 8;

/// How long reads are waited for after the ring itself has failed.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// Rings without a user.
pub(super) struct Rings {
    entries: u32,
    idle: Mutex<Vec<IoUring>>,
}

impl Rings {
    /// # Errors
    /// Where the kernel or its container refuses io_uring.
    pub(super) fn probe(depth: usize) -> io::Result<Rings> {
        let entries = u32::try_from(depth)
            .ok()
            .and_then(u32::checked_next_power_of_two)
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Rings {
            entries,
            idle: Mutex::new(vec![make(entries)?]),
        })
    }

    /// `None` where no further ring can be had: out of descriptors or of locked memory.
    pub(super) fn take(&self) -> Option<IoUring> {
        let idle = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        idle.or_else(|| make(self.entries).ok())
    }

    fn give_back(&self, ring: IoUring) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_RINGS_MAX {
            idle.push(ring);
        }
    }

    /// See [`super::Direct::read`].
    pub(super) fn read(
        &self,
        ring: IoUring,
        transfer: Transfer,
        depth: usize,
        done: &mut dyn FnMut(usize, Filling, io::Result<()>),
    ) {
        let mut session = Session {
            rings: self,
            ring: ManuallyDrop::new(ring),
            transfer: ManuallyDrop::new(transfer),
            under_way: 0,
        };
        session.run(depth, done);
    }
}

fn make(entries: u32) -> io::Result<IoUring> {
    // Completions need not interrupt us: we come for them ourselves. Since Linux 5.19.
    IoUring::builder()
        .dontfork()
        .setup_coop_taskrun()
        .build(entries)
        .or_else(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => IoUring::builder().dontfork().build(entries),
            _ => Err(error),
        })
}

/// One call's ring and slots. Dropped only when nothing is under way; leaked where that cannot be
/// known.
struct Session<'a> {
    rings: &'a Rings,
    ring: ManuallyDrop<IoUring>,
    transfer: ManuallyDrop<Transfer>,
    /// Reads that were given to the ring and have not come back.
    under_way: usize,
}

impl Session<'_> {
    fn run(&mut self, depth: usize, done: &mut dyn FnMut(usize, Filling, io::Result<()>)) {
        let reads = self.transfer.reads();
        let mut next = 0;
        let mut ended = Vec::with_capacity(depth);
        loop {
            while self.under_way < depth && next < reads.len() {
                let read = &reads[next];
                let (vectors, count) = read.vectors();
                let entry = opcode::Readv::new(types::Fd(read.file), vectors, count)
                    .offset(read.offset)
                    .build()
                    .user_data(next as u64);
                // SAFETY: the vectors lead into slots that the transfer owns until this read has
                // ended, or to `NOWHERE`, and no two reads into the same bytes
                // (`Transfer::reads`). The transfer keeps the vectors and the descriptor, and is
                // let go of only when `under_way` is 0 (`Drop`). `next` ascends: each is made once.
                let pushed = unsafe { self.ring.submission().push(&entry) };
                if pushed.is_err() {
                    break;
                }
                next += 1;
                self.under_way += 1;
            }
            if self.under_way == 0 && ended.is_empty() {
                return;
            }
            // What has ended is verified by `done` while the reads behind it are under way.
            let submitted = match ended.is_empty() {
                true => self.ring.submit_and_wait(1),
                false => self.ring.submit(),
            };
            if let Err(error) = submitted.map(drop).or_else(passing) {
                tracing::error!(%error, "io_uring fails: reads are given up");
                return;
            }
            for (number, outcome) in ended.drain(..) {
                self.transfer.end(number, outcome, done);
            }
            self.reap(&mut ended);
        }
    }

    /// Takes what has ended off the ring.
    fn reap(&mut self, ended: &mut Vec<(usize, io::Result<()>)>) {
        let reads = self.transfer.reads();
        for entry in self.ring.completion() {
            let number = entry.user_data() as usize;
            let answer = usize::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
            ended.push((number, reads[number].outcome(answer)));
            self.under_way -= 1;
        }
    }

    /// Waits for what is under way, for a bounded time where the ring itself fails.
    fn drain(&mut self) {
        let mut ended = Vec::new();
        let mut failing_since = None;
        while self.under_way > 0 {
            let waited = self.ring.submit_and_wait(1).map(drop).or_else(passing);
            self.reap(&mut ended);
            if waited.is_err() {
                let since = *failing_since.get_or_insert_with(Instant::now);
                if since.elapsed() > LAST_WAIT {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.drain();
        if self.under_way > 0 {
            // Leaked: the kernel may still write into the slots.
            tracing::error!(
                reads = self.under_way,
                "reads never ended: their slots are lost"
            );
            return;
        }
        // SAFETY: neither is used after this.
        let (ring, transfer) = unsafe {
            (
                ManuallyDrop::take(&mut self.ring),
                ManuallyDrop::take(&mut self.transfer),
            )
        };
        drop(transfer);
        self.rings.give_back(ring);
    }
}

/// Errors after which the ring works on.
fn passing(error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {
            std::thread::yield_now();
            Ok(())
        }
        _ => Err(error),
    }
}
