//! `preadv` on a few threads, for as long as a call lasts.

use std::io;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;

use super::transfer::{Read, Transfer};
use crate::Filling;

/// Threads of one call: they are made for it, and more of them bring nothing.
const THREADS_MAX: usize = 8;

/// The part of `depths` that can be had.
pub(super) fn within(depths: RangeInclusive<usize>) -> RangeInclusive<usize> {
    let (least, most) = depths.into_inner();
    least.min(THREADS_MAX)..=most.min(THREADS_MAX)
}

/// Makes the reads from number `first` on: see [`super::Direct::read`].
pub(super) fn read(
    mut transfer: Transfer,
    first: usize,
    depth: usize,
    done: &mut dyn FnMut(usize, Filling, io::Result<()>),
) {
    let reads = transfer.reads();
    let next = AtomicUsize::new(first);
    let stop = AtomicBool::new(false);
    let (send, receive) = mpsc::channel();
    thread::scope(|scope| {
        // Where `done` panics, the threads end after the read that each is in.
        let _stopping = StopOnDrop(&stop);
        let work = |send: mpsc::Sender<(usize, io::Result<()>)>| {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(read) = reads.get(number) else {
                    return;
                };
                if stop.load(Ordering::Relaxed) || send.send((number, preadv(read))).is_err() {
                    return;
                }
            }
        };
        let mut threads = 0;
        // One read needs no thread beside the caller's.
        let wanted = depth.min(reads.len() - first).min(THREADS_MAX);
        for _ in 0..wanted.saturating_sub(1) {
            let send = send.clone();
            let spawned = thread::Builder::new()
                .name("stemkv-read".into())
                .spawn_scoped(scope, move || work(send));
            threads += usize::from(spawned.is_ok());
        }
        if threads == 0 {
            for (number, read) in reads.iter().enumerate().skip(first) {
                transfer.end(number, preadv(read), done);
            }
            return;
        }
        drop(send);
        for (number, outcome) in receive {
            transfer.end(number, outcome, done);
        }
    });
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn preadv(read: &Read) -> io::Result<()> {
    let (vectors, count) = read.vectors();
    loop {
        // SAFETY: the vectors lead into slots that the transfer owns until this read has ended, or to
        // `NOWHERE`, and no two reads into the same bytes (`Transfer::reads`); `read` keeps the
        // vectors alive, and its transfer the descriptor. `read` is made once: its number was taken
        // from a counter.
        let answer = unsafe {
            libc::preadv(
                read.file,
                vectors,
                count as libc::c_int,
                read.offset as libc::off_t,
            )
        };
        let answer = usize::try_from(answer).map_err(|_| io::Error::last_os_error());
        match answer {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            answer => return read.outcome(answer),
        }
    }
}
