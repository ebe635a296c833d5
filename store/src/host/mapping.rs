//! The arena's memory: a shared mapping of a `memfd`, touched before anybody uses it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use memmap2::{Advice, MmapOptions, MmapRaw};

use crate::{Error, Result};

/// Touched at a time by one thread: small enough for smooth progress.
const STEP: usize = 32 << 20;
/// More threads than this wait for the kernel's page allocator, not for memory.
const THREADS_MAX: usize = 16;

/// Memory that other processes and a GPU can map; its address does not change.
#[derive(Debug)]
pub(super) struct Mapping {
    memory: MmapRaw,
    file: File,
}

impl Mapping {
    /// `bytes` of memory, all of it present.
    pub(super) fn new(bytes: usize, progress: impl Fn(usize, usize) + Sync) -> Result<Self> {
        if let Some(limit) = memory_limit()
            && bytes as u64 > limit
        {
            return Err(Error::invalid(
                "the host tier is larger than the memory of this machine or container: give it \
                 fewer bytes",
            )
            .with("capacity_bytes", bytes)
            .with("memory_bytes", limit));
        }
        let unavailable = |cause: io::Error| {
            Error::unavailable(
                "cannot get the host tier's memory: give it fewer bytes, or this process more",
            )
            .with("capacity_bytes", bytes)
            .caused_by(cause)
        };
        let file = memfd().map_err(unavailable)?;
        file.set_len(bytes as u64).map_err(unavailable)?;
        let memory = MmapOptions::new()
            .len(bytes)
            .map_raw(&file)
            .map_err(unavailable)?;
        // Fewer TLB misses and faster pinning where the system allows it for shared memory.
        let _ = memory.advise(Advice::HugePage);
        touch(&memory, progress).map_err(unavailable)?;
        Ok(Mapping { memory, file })
    }

    pub(super) fn base(&self) -> NonNull<u8> {
        NonNull::new(self.memory.as_mut_ptr()).expect("a mapping does not start at 0")
    }

    pub(super) fn len(&self) -> usize {
        self.memory.len()
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn memfd() -> io::Result<File> {
    // SAFETY: the name is a C string; the call touches no other memory of ours.
    let fd = unsafe { libc::memfd_create(c"stemkv-host".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Has the kernel make every page now: a page that cannot be had is an error here, a signal later.
fn touch(memory: &MmapRaw, progress: impl Fn(usize, usize) + Sync) -> io::Result<()> {
    let total = memory.len();
    let threads = thread::available_parallelism()
        .map_or(1, usize::from)
        .min(THREADS_MAX)
        .min(total.div_ceil(STEP));
    let next = AtomicUsize::new(0);
    let touched = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let work = || {
        loop {
            let start = next.fetch_add(STEP, Ordering::Relaxed);
            if start >= total {
                return;
            }
            let len = STEP.min(total - start);
            if let Err(error) = populate(memory, start, len) {
                next.store(total, Ordering::Relaxed);
                *failure.lock().expect("nothing panics under it") = Some(error);
                return;
            }
            progress(touched.fetch_add(len, Ordering::Relaxed) + len, total);
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // Without it the others do all.
            let _ = thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    match failure.into_inner().expect("nothing panics under it") {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn populate(memory: &MmapRaw, start: usize, len: usize) -> io::Result<()> {
    match memory.advise_range(Advice::PopulateWrite, start, len) {
        // Before Linux 5.14: touch by hand.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            for offset in (start..start + len).step_by(super::arena::GRANULE) {
                // SAFETY: within the mapping, which nobody else knows of yet; a zero over the zero
                // that a fresh memfd holds.
                unsafe { memory.as_mut_ptr().add(offset).write_volatile(0) };
            }
            Ok(())
        }
        answer => answer,
    }
}

/// The memory that this process could have at all: the machine's, or its container's where that is
/// less. `None` where neither can be read.
fn memory_limit() -> Option<u64> {
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib * 1024)
    });
    let container = fs::read_to_string("/sys/fs/cgroup/memory.max")
        .ok()
        .and_then(|text| text.trim().parse().ok());
    [total, container].into_iter().flatten().min()
}
