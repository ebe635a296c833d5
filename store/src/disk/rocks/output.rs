//! How the bytes of a payload file get to the disk: two writes under way at a time, so that it does not
//! stand still between two of them, and each image is hashed by whoever writes what follows it, while
//! the other write is under way.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::{thread, vec};

use super::sst::{BlockSum, ONE_RESTART, entry_head};

/// Bytes of one write, at least. A sync elsewhere waits for all that is queued at the disk before it:
/// two of these.
const WRITE_BYTES: usize = 2 << 20;

/// Threads that write one file, with the caller's.
const WRITERS: usize = 2;

/// A value that is an image, in a block of its own.
#[derive(Clone, Copy)]
pub(super) struct ImageBlock<'a> {
    pub(super) place: u64,
    pub(super) image: &'a [u8],
}

/// Consecutive bytes of a file: whole pages, then an image.
pub(super) struct Stretch<'a> {
    /// The image in front of it: its block ends at the start of `pages`, where its checksum is still
    /// missing.
    pub(super) before: Option<ImageBlock<'a>>,
    pub(super) pages: &'a mut [u8],
    pub(super) image: &'a [u8],
}

impl Stretch<'_> {
    fn bytes(&self) -> usize {
        self.pages.len() + self.image.len()
    }

    fn seal(&mut self) {
        let Some(ImageBlock { place, image }) = self.before else {
            return;
        };
        let mut sum = BlockSum::new();
        for bytes in [&entry_head(place, image.len()), image, &ONE_RESTART] {
            sum.add(bytes);
        }
        let trailer = sum.trailer();
        self.pages[..ONE_RESTART.len()].copy_from_slice(&ONE_RESTART);
        self.pages[ONE_RESTART.len()..][..trailer.len()].copy_from_slice(&trailer);
    }
}

/// Makes a file of the stretches. `flags` are of the opening.
///
/// # Errors
/// The first of the system's.
pub(super) fn write(path: &Path, flags: i32, stretches: Vec<Stretch<'_>>) -> io::Result<()> {
    let bytes = stretches.iter().map(Stretch::bytes).sum::<usize>() as u64;
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(flags);
    let file = options.clone().create(true).truncate(true).open(path)?;
    reserve(&file, bytes)?;
    let queue = Queue(Mutex::new(Waiting {
        stretches: stretches.into_iter(),
        offset: 0,
        failed: None,
    }));
    thread::scope(|scope| {
        for _ in 1..WRITERS.min(bytes.div_ceil(WRITE_BYTES as u64) as usize) {
            let queue = &queue;
            let other = || options.open(path).map(|file| queue.work(file));
            // Without it the caller's thread does all.
            let _ = thread::Builder::new()
                .name("stemkv-write".into())
                .spawn_scoped(scope, other);
        }
        queue.work(file);
    });
    match queue.waiting().failed.take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Sets space aside where the file system can: then its writes change nothing but bytes, and may be
/// under way side by side.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    // SAFETY: a call on an open descriptor, without pointers.
    let answer = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes as libc::off_t) };
    if answer == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::EINTR) => file.set_len(bytes),
        _ => Err(error),
    }
}

/// Gives a stretch of a file back to the file system: it reads as zeros, and the file is as long as before.
///
/// # Errors
/// The system's; `Unsupported` where the file system cannot.
pub(super) fn make_hole(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (offset, bytes) = (offset as libc::off_t, bytes as libc::off_t);
    loop {
        // SAFETY: a call on an open descriptor, without pointers.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, bytes) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => return Err(io::ErrorKind::Unsupported.into()),
            _ => return Err(error),
        }
    }
}

/// Is there a hole in a stretch of a file? Not where the file system does not say.
pub(super) fn has_hole(file: &impl AsRawFd, offset: u64, bytes: u64) -> bool {
    // SAFETY: a call on an open descriptor, without pointers.
    let hole = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, libc::SEEK_HOLE) };
    hole >= 0 && (hole as u64) < offset + bytes
}

/// The writes of one file that nobody has begun.
struct Queue<'a>(Mutex<Waiting<'a>>);

struct Waiting<'a> {
    stretches: vec::IntoIter<Stretch<'a>>,
    offset: u64,
    failed: Option<io::Error>,
}

impl<'a> Queue<'a> {
    fn waiting(&self) -> MutexGuard<'_, Waiting<'a>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes until nothing is left, or a write failed.
    fn work(&self, mut file: File) {
        while let Some((offset, mut stretches)) = self.next() {
            stretches.iter_mut().for_each(Stretch::seal);
            if let Err(error) = write_at(&mut file, offset, &stretches) {
                self.waiting().failed.get_or_insert(error);
                return;
            }
        }
    }

    /// The stretches of the next write, and where they go.
    fn next(&self) -> Option<(u64, Vec<Stretch<'a>>)> {
        let mut waiting = self.waiting();
        if waiting.failed.is_some() {
            return None;
        }
        let (offset, mut bytes, mut stretches) = (waiting.offset, 0, Vec::new());
        while bytes < WRITE_BYTES {
            let Some(stretch) = waiting.stretches.next() else {
                break;
            };
            bytes += stretch.bytes();
            stretches.push(stretch);
        }
        waiting.offset += bytes as u64;
        (!stretches.is_empty()).then_some((offset, stretches))
    }
}

fn write_at(file: &mut File, offset: u64, stretches: &[Stretch<'_>]) -> io::Result<()> {
    let mut slices = Vec::with_capacity(2 * stretches.len());
    for stretch in stretches {
        slices.push(IoSlice::new(stretch.pages));
        slices.push(IoSlice::new(stretch.image));
    }
    file.seek(SeekFrom::Start(offset))?;
    let mut rest = &mut slices[..];
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        match file.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut rest, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
