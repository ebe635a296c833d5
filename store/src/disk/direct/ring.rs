//! io_uring: one ring for each call under way, kept for the next call.
//!
//! The host tier's memory is registered with the rings, where the kernel lets us: it then finds the
//! pages of a read once for all, not each time, which is half of what a read costs the processor.

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};

use super::transfer::{Read, Transfer};
use crate::{Filling, HostArena};

/// Rings that are kept for later calls.
const IDLE_RINGS_MAX: usize = 8;

/// How long reads are waited for after the ring itself has failed. They end by themselves.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// Bytes of one registered buffer: the kernel takes no longer ones. Tests want several.
const BUFFER_BYTES: usize = if cfg!(test) { 1 << 20 } else { 1 << 30 };

/// Rings without a user.
pub(super) struct Rings {
    entries: u32,
    /// One failed: no more are taken. A policy of the container that came late, say, holds for all.
    have_failed: AtomicBool,
    idle: Mutex<Vec<Ring>>,
    /// Dropped after the rings.
    registered: OnceLock<Registered>,
}

/// A ring, and whether it knows the registered memory.
pub(super) struct Ring {
    ring: IoUring,
    is_registered: bool,
}

/// The memory that rings know.
struct Registered {
    /// Keeps the mapping, so that no other memory comes to its addresses.
    arena: HostArena,
    /// The ring that it was registered with, which is never closed before this is dropped: others
    /// take it from there.
    source: RawFd,
}

impl Registered {
    /// The number of the buffer that `bytes` from address `at` on lie in, if it is one.
    fn buffer(&self, at: usize, bytes: usize) -> Option<u16> {
        let (base, length) = self.arena.mapping();
        let from = at.checked_sub(base.as_ptr() as usize)?;
        let last = from.checked_add(bytes.checked_sub(1)?)?;
        let buffer = from / BUFFER_BYTES;
        let fits = last < length && buffer == last / BUFFER_BYTES;
        u16::try_from(buffer).ok().filter(|_| fits)
    }
}

impl Rings {
    /// # Errors
    /// Where the kernel or its container refuses io_uring.
    pub(super) fn probe(depth: usize) -> io::Result<Rings> {
        let entries = u32::try_from(depth)
            .ok()
            .and_then(u32::checked_next_power_of_two)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let mut ring = make(entries)?;
        try_out(&mut ring)?;
        Ok(Rings {
            entries,
            have_failed: AtomicBool::new(false),
            idle: Mutex::new(vec![ring]),
            registered: OnceLock::new(),
        })
    }

    /// May rings still be taken?
    pub(super) fn work(&self) -> bool {
        !self.have_failed.load(Ordering::Relaxed)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Ring>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers the memory of the first arena that it is called with.
    ///
    /// # Errors
    /// Where the kernel has no such thing, or locks no more memory for this process: all reads go on
    /// as before.
    pub(super) fn register(&self, arena: &HostArena) -> io::Result<()> {
        let mut ring = make(self.entries)?;
        let (base, length) = arena.mapping();
        let buffers: Vec<_> = (0..length)
            .step_by(BUFFER_BYTES)
            .map(|from| libc::iovec {
                iov_base: base.as_ptr().wrapping_add(from).cast(),
                iov_len: BUFFER_BYTES.min(length - from),
            })
            .collect();
        let registered = Registered {
            arena: arena.clone(),
            source: ring.ring.as_raw_fd(),
        };
        // SAFETY: the buffers are the arena's mapping, which stays where it is while a clone of the
        // arena exists. `self.registered` keeps one for longer than the idle rings (order of fields),
        // and a ring that is in use has a borrow of `self` beside it (`Session`); one that was leaked
        // makes no further reads.
        unsafe { ring.ring.submitter().register_buffers(&buffers) }?;
        if self.registered.set(registered).is_ok() {
            ring.is_registered = true;
            self.idle().push(ring);
        }
        Ok(())
    }

    /// `None` where no further ring can be had: out of descriptors or of locked memory, or one failed.
    pub(super) fn take(&self) -> Option<Ring> {
        if !self.work() {
            return None;
        }
        let mut idle = self.idle();
        let best = idle.iter().rposition(|ring| ring.is_registered);
        // Where the kernel does not pass registered memory on, one ring alone has it.
        let ring = match best {
            Some(best) => Some(idle.swap_remove(best)),
            None => idle.pop(),
        };
        drop(idle);
        ring.or_else(|| self.another())
    }

    fn another(&self) -> Option<Ring> {
        let mut ring = make(self.entries).ok()?;
        if let Some(registered) = self.registered.get() {
            ring.is_registered = clone_buffers(registered.source, &ring.ring).is_ok();
        }
        Some(ring)
    }

    fn give_back(&self, ring: Ring) {
        let is_source = |registered: &Registered| registered.source == ring.ring.as_raw_fd();
        let is_source = self.registered.get().is_some_and(is_source);
        let mut idle = self.idle();
        if idle.len() < IDLE_RINGS_MAX || is_source {
            idle.push(ring);
        }
    }

    /// See [`super::Direct::read`]. Where the ring fails, the answer is what is left, and the number of
    /// the first read that was not begun.
    pub(super) fn read(
        &self,
        ring: Ring,
        transfer: Transfer,
        depth: usize,
        done: &mut dyn FnMut(usize, Filling, io::Result<()>),
    ) -> Option<(Transfer, usize)> {
        let mut session = Session {
            rings: self,
            ring: Some(ring),
            transfer: Some(transfer),
            next: 0,
            under_way: Vec::with_capacity(depth),
            is_over: false,
        };
        let Err(error) = session.run(depth, done) else {
            return None;
        };
        self.have_failed.store(true, Ordering::Relaxed);
        tracing::error!(%error, "io_uring fails: threads read from now on");
        session.give_up(done)
    }
}

/// Sends the ring through the kernel once, with nothing to do: some let a ring be made, and not used.
fn try_out(ring: &mut Ring) -> io::Result<()> {
    let nothing = opcode::Nop::new().build();
    // SAFETY: it names no memory.
    unsafe { ring.ring.submission().push(&nothing) }.map_err(io::Error::other)?;
    loop {
        ring.ring.submit_and_wait(1).map(drop).or_else(passing)?;
        let answer = ring.ring.completion().next();
        match answer.map(|answer| answer.result()) {
            Some(0..) => return Ok(()),
            Some(error) => return Err(io::Error::from_raw_os_error(-error)),
            None => {}
        }
    }
}

fn make(entries: u32) -> io::Result<Ring> {
    // Completions need not interrupt us: we come for them ourselves. Since Linux 5.19.
    let ring = IoUring::builder()
        .dontfork()
        .setup_coop_taskrun()
        .build(entries)
        .or_else(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => IoUring::builder().dontfork().build(entries),
            _ => Err(error),
        })?;
    Ok(Ring {
        ring,
        is_registered: false,
    })
}

/// Has `to` know the memory that is registered with the ring of descriptor `from`, without another
/// copy of its page tables. Since Linux 6.12.
fn clone_buffers(from: RawFd, to: &IoUring) -> io::Result<()> {
    /// `IORING_REGISTER_CLONE_BUFFERS`, and `struct io_uring_clone_buffers` of `linux/io_uring.h`.
    const CLONE_BUFFERS: libc::c_uint = 30;
    #[repr(C)]
    #[derive(Default)]
    struct CloneBuffers {
        source: u32,
        flags: u32,
        source_offset: u32,
        offset: u32,
        /// 0: all of them.
        count: u32,
        padding: [u32; 3],
    }
    let argument = CloneBuffers {
        source: from as u32,
        ..CloneBuffers::default()
    };
    // SAFETY: the argument lives through the call, which only reads it; both descriptors are rings. What
    // is passed on was registered under `Rings::register`'s conditions, which hold for every ring of
    // theirs.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            to.as_raw_fd(),
            CLONE_BUFFERS,
            &raw const argument,
            1,
        )
    };
    match answer {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One call's ring and slots. Dropped only when nothing is under way; leaked where that cannot be
/// known.
struct Session<'a> {
    rings: &'a Rings,
    /// Both there until the end.
    ring: Option<Ring>,
    transfer: Option<Transfer>,
    /// The first read that was not given to the ring.
    next: usize,
    /// Reads that were given to the ring and have not come back.
    under_way: Vec<usize>,
    /// The ring failed. It must not be entered again: what the kernel has not seen of it is made elsewhere.
    is_over: bool,
}

impl Session<'_> {
    /// # Errors
    /// Where the ring itself fails.
    fn run(
        &mut self,
        depth: usize,
        done: &mut dyn FnMut(usize, Filling, io::Result<()>),
    ) -> io::Result<()> {
        let (Some(ring), Some(transfer)) = (&mut self.ring, &mut self.transfer) else {
            return Ok(());
        };
        let reads = transfer.reads();
        let mut ended = Vec::with_capacity(depth);
        loop {
            while self.under_way.len() < depth && self.next < reads.len() {
                let entry = entry(self.rings, ring, &reads[self.next]);
                let entry = entry.user_data(self.next as u64);
                // SAFETY: the read's vectors lead into slots that the transfer owns until it has
                // ended, or to `NOWHERE`, and no two reads into the same bytes
                // (`Transfer::reads`). The transfer keeps the vectors and the descriptor, and is
                // let go of only when nothing is under way, but for what is leaked (`give_up`, `Drop`).
                // `next` ascends: each is made once. What `take_back` takes back the kernel never sees,
                // as the ring is not entered again (`is_over`).
                let pushed = unsafe { ring.ring.submission().push(&entry) };
                if pushed.is_err() {
                    break;
                }
                self.under_way.push(self.next);
                self.next += 1;
            }
            if self.under_way.is_empty() && ended.is_empty() {
                return Ok(());
            }
            // What has ended is verified by `done` while the reads behind it are under way.
            let submitted = match ended.is_empty() {
                true => ring.ring.submit_and_wait(1),
                false => ring.ring.submit(),
            };
            for (number, outcome) in ended.drain(..) {
                transfer.end(number, outcome, done);
            }
            submitted.map(drop).or_else(passing)?;
            reap(ring, transfer, &mut self.under_way, &mut ended);
        }
    }

    /// After the ring has failed: waits for what the kernel has begun, for a bounded time, and answers
    /// what is left and the number of the first read that it has not begun.
    fn give_up(
        mut self,
        done: &mut dyn FnMut(usize, Filling, io::Result<()>),
    ) -> Option<(Transfer, usize)> {
        self.take_back();
        let since = Instant::now();
        let mut ended = Vec::new();
        {
            let (ring, transfer) = (self.ring.as_mut()?, self.transfer.as_mut()?);
            loop {
                // A read's end is written to memory that we share, without the ring being entered.
                reap(ring, transfer, &mut self.under_way, &mut ended);
                for (number, outcome) in ended.drain(..) {
                    transfer.end(number, outcome, done);
                }
                if self.under_way.is_empty() || since.elapsed() > LAST_WAIT {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let (ring, mut transfer) = (self.ring.take()?, self.transfer.take()?);
        if !self.under_way.is_empty() {
            lost(self.under_way.len());
            for number in self.under_way.drain(..) {
                transfer.lose(number);
            }
            std::mem::forget((ring, transfer.reads()));
        }
        Some((transfer, self.next))
    }

    /// The ring has failed: what the kernel has not seen of it is not under way.
    fn take_back(&mut self) {
        self.is_over = true;
        if let Some(ring) = &mut self.ring {
            // The kernel takes entries in their order, and only when the ring is entered.
            self.next -= ring.ring.submission().len();
            self.under_way.retain(|number| *number < self.next);
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        // Here after a panic of `done`, or with nothing under way.
        let mut failing_since = None;
        loop {
            let (Some(ring), Some(transfer)) = (&mut self.ring, &self.transfer) else {
                return;
            };
            reap(ring, transfer, &mut self.under_way, &mut Vec::new());
            if self.under_way.is_empty() {
                break;
            }
            if !self.is_over {
                if ring
                    .ring
                    .submit_and_wait(1)
                    .map(drop)
                    .or_else(passing)
                    .is_err()
                {
                    self.take_back();
                }
                continue;
            }
            let since = *failing_since.get_or_insert_with(Instant::now);
            if since.elapsed() > LAST_WAIT {
                lost(self.under_way.len());
                std::mem::forget((self.ring.take(), self.transfer.take()));
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.transfer = None;
        if let Some(ring) = self.ring.take().filter(|_| !self.is_over) {
            self.rings.give_back(ring);
        }
    }
}

/// Slots are leaked: the kernel may still write into them.
fn lost(reads: usize) {
    tracing::error!(reads, "reads never ended: their slots are lost");
}

/// What the ring is told of a read: one into registered memory, if it is that.
fn entry(rings: &Rings, ring: &Ring, read: &Read) -> squeue::Entry {
    let file = types::Fd(read.file);
    let registered = rings.registered.get();
    let fixed = registered
        .filter(|_| ring.is_registered)
        .zip(read.single())
        .and_then(|(registered, place)| {
            let buffer = registered.buffer(place.iov_base as usize, place.iov_len)?;
            let bytes = u32::try_from(place.iov_len).ok()?;
            let entry = opcode::ReadFixed::new(file, place.iov_base.cast(), bytes, buffer);
            Some(entry.offset(read.offset).build())
        });
    fixed.unwrap_or_else(|| {
        let (vectors, count) = read.vectors();
        opcode::Readv::new(file, vectors, count)
            .offset(read.offset)
            .build()
    })
}

/// Takes what has ended off the ring.
fn reap(
    ring: &mut Ring,
    transfer: &Transfer,
    under_way: &mut Vec<usize>,
    ended: &mut Vec<(usize, io::Result<()>)>,
) {
    let reads = transfer.reads();
    for entry in ring.ring.completion() {
        let number = entry.user_data() as usize;
        let answer = usize::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        ended.push((number, reads[number].outcome(answer)));
        under_way.retain(|other| *other != number);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, KvGeometry};

    fn arena() -> HostArena {
        let geometry = KvGeometry::gqa(4, 2, 32, Dtype::Bf16, 16).expect("valid");
        HostArena::open(&geometry, 3 * BUFFER_BYTES + 8192, |_, _| {}).expect("memory")
    }

    #[test]
    fn only_what_lies_in_one_buffer_is_read_as_registered_memory() {
        let registered = Registered {
            arena: arena(),
            source: -1,
        };
        let base = registered.arena.mapping().0.as_ptr() as usize;
        let buffer = |from: usize, bytes| registered.buffer(base.wrapping_add(from), bytes);
        assert_eq!(buffer(0, BUFFER_BYTES), Some(0));
        assert_eq!(buffer(BUFFER_BYTES - 4096, 4096), Some(0));
        assert_eq!(buffer(BUFFER_BYTES - 4096, 8192), None);
        assert_eq!(buffer(BUFFER_BYTES, 4096), Some(1));
        assert_eq!(buffer(3 * BUFFER_BYTES, 8192), Some(3));
        assert_eq!(buffer(3 * BUFFER_BYTES + 4096, 8192), None);
        assert_eq!(buffer(4096_usize.wrapping_neg(), 4096), None);
        assert_eq!(buffer(0, 0), None);
    }

    #[test]
    fn every_ring_that_is_taken_knows_the_registered_memory() {
        let rings = match Rings::probe(4) {
            Ok(rings) => rings,
            Err(error) => return println!("io_uring is refused here: {error}"),
        };
        let before = rings.take().expect("probed");
        assert!(!before.is_registered);
        if let Err(error) = rings.register(&arena()) {
            return println!("this process may not register memory: {error}");
        }
        let first = rings.take().expect("registered");
        assert!(first.is_registered);
        let second = rings.take().expect("descriptors");
        let passes_on = make(4).and_then(|ring| {
            let source = rings.registered.get().expect("registered").source;
            clone_buffers(source, &ring.ring)
        });
        match passes_on {
            Ok(()) => assert!(second.is_registered),
            Err(error) => println!("one ring alone has the memory here: {error}"),
        }
        // The one that others take it from is kept, however many are idle, and taken first.
        for _ in 0..IDLE_RINGS_MAX {
            rings.give_back(make(4).expect("descriptors"));
        }
        rings.give_back(first);
        rings.give_back(before);
        assert!(rings.take().expect("idle").is_registered);
    }
}
