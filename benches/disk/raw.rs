//! The ceiling: consecutive bytes of files with O_DIRECT, in reads of one size, so many of them under way.
//!
//! The files are the store's own where there is one: a virtual disk may be twice as fast in one place as
//! in another, and a plain file beside the store would be a matter of luck.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use io_uring::{IoUring, opcode, squeue, types};
use stemkv_store::{Filling, HostArena, RecordHeader};

/// How plain reads are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawWay {
    Ring,
    Preadv,
}

/// Files, one after the other.
pub struct RawFile {
    files: Vec<Part>,
}

struct Part {
    file: File,
    /// Of the bytes that are read, and where they begin among those of all files.
    bytes: u64,
    start: u64,
}

impl RawFile {
    /// The payload files of the store in `folder`, as far as each goes in whole reads of `piece` bytes.
    pub fn of_store(folder: &Path, piece: usize) -> RawFile {
        let mut paths = Vec::new();
        payload_files(folder, &mut paths);
        paths.sort();
        let mut files = Vec::new();
        let mut start = 0;
        for path in paths {
            let mut options = File::options();
            let file = options.read(true).custom_flags(libc::O_DIRECT).open(&path);
            let file = file.expect("a file system with O_DIRECT");
            let length = file.metadata().expect("open").len();
            let bytes = length / piece as u64 * piece as u64;
            files.push(Part { file, bytes, start });
            start += bytes;
        }
        RawFile { files }
    }

    /// Of all files.
    pub fn bytes(&self) -> u64 {
        self.files.last().map_or(0, |last| last.start + last.bytes)
    }

    /// The file that byte `offset` is in, and where.
    fn at(&self, offset: u64) -> (&File, u64) {
        let next = self.files.partition_point(|part| part.start <= offset);
        let part = &self.files[next - 1];
        (&part.file, offset - part.start)
    }

    /// Reads `memory.len()` bytes from `offset` on, in reads of `piece` bytes, `depth` of them under
    /// way. `offset` is a multiple of `piece`.
    pub fn read(
        &self,
        way: RawWay,
        ring: &mut RawRing,
        memory: &mut [u8],
        offset: u64,
        piece: usize,
        depth: usize,
    ) {
        match way {
            RawWay::Ring => self.read_ring(ring, memory, offset, piece, depth, &mut |_| ()),
            RawWay::Preadv => self.read_threads(memory, offset, piece, depth),
        }
    }

    /// As [`RawFile::read`] with a ring; `arrived` gets each piece as soon as it is there, while the next
    /// ones are under way.
    pub fn read_ring(
        &self,
        ring: &mut RawRing,
        memory: &mut [u8],
        offset: u64,
        piece: usize,
        depth: usize,
        arrived: &mut dyn FnMut(&mut [u8]),
    ) {
        let pieces = memory.chunks_mut(piece).zip((offset..).step_by(piece));
        let mut pieces: Vec<_> = pieces.map(Some).collect();
        let (mut next, mut under_way) = (0, 0);
        // Given away until they have arrived.
        let mut given: Vec<Option<&mut [u8]>> = pieces.iter().map(|_| None).collect();
        loop {
            while under_way < depth && next < pieces.len() {
                let (bytes, offset) = pieces[next].take().expect("each once");
                let (file, offset) = self.at(offset);
                let read = ring.read(file, bytes, offset).user_data(next as u64);
                given[next] = Some(bytes);
                // SAFETY: the bytes are borrowed mutably for this call, each piece is given away
                // once and touched only after its read has ended, and the call returns only after every
                // read has ended (a failing ring ends the program, and so does a panic here).
                unsafe { ring.ring.submission().push(&read) }.expect("as many entries as depth");
                next += 1;
                under_way += 1;
            }
            if under_way == 0 {
                return;
            }
            if let Err(error) = ring.ring.submit_and_wait(1) {
                eprintln!("io_uring fails: {error}");
                std::process::abort();
            }
            let ended: Vec<_> = ring.ring.completion().collect();
            for entry in ended {
                let bytes = given[entry.user_data() as usize].take();
                let bytes = bytes.expect("each once");
                assert_eq!(entry.result() as usize, bytes.len(), "a whole read");
                under_way -= 1;
                arrived(bytes);
            }
        }
    }

    fn read_threads(&self, memory: &mut [u8], offset: u64, piece: usize, depth: usize) {
        let pieces = memory.chunks_mut(piece).zip((offset..).step_by(piece));
        let pieces = Mutex::new(pieces);
        let work = || -> io::Result<()> {
            loop {
                let next = pieces.lock().expect("nothing panics under it").next();
                let Some((bytes, offset)) = next else {
                    return Ok(());
                };
                let (file, offset) = self.at(offset);
                file.read_exact_at(bytes, offset)?;
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..depth {
                scope.spawn(|| work().expect("the disk works"));
            }
            work().expect("the disk works");
        });
    }
}

/// Files of a store below `folder` that hold payload: its other files are small.
fn payload_files(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("the store's").flatten() {
        let path = entry.path();
        let is_payload = || path.extension().is_some_and(|extension| extension == "sst");
        if path.is_dir() {
            payload_files(&path, paths);
        } else if is_payload() && entry.metadata().is_ok_and(|meta| meta.len() > 1 << 20) {
            paths.push(path);
        }
    }
}

/// A ring for [`RawFile::read`].
pub struct RawRing {
    ring: IoUring,
    /// Addresses that the kernel knows the pages of.
    known: Range<usize>,
}

/// One for `depth` reads under way.
pub fn ring(depth: usize) -> RawRing {
    let entries = (depth as u32).next_power_of_two();
    let ring = IoUring::builder().setup_coop_taskrun().build(entries);
    RawRing {
        ring: ring.expect("io_uring is allowed: the ceiling is to be known"),
        known: 0..0,
    }
}

impl RawRing {
    /// Has the kernel look the pages of `memory` up now and not with each read: the least that a read can
    /// cost.
    pub fn know(&mut self, memory: &mut [u8]) {
        let from = memory.as_mut_ptr() as usize;
        let buffer = libc::iovec {
            iov_base: memory.as_mut_ptr().cast(),
            iov_len: memory.len(),
        };
        // SAFETY: the kernel holds the pages itself from here on; reads into them are made only of
        // slices that are borrowed mutably for that long.
        unsafe { self.ring.submitter().register_buffers(&[buffer]) }.expect("memory to lock");
        self.known = from..from + memory.len();
    }

    fn read(&self, file: &File, bytes: &mut [u8], offset: u64) -> squeue::Entry {
        let file = types::Fd(file.as_raw_fd());
        let (at, length) = (bytes.as_mut_ptr(), bytes.len() as u32);
        let from = at as usize;
        match self.known.contains(&from) && from + bytes.len() <= self.known.end {
            true => opcode::ReadFixed::new(file, at, length, 0)
                .offset(offset)
                .build(),
            false => opcode::Read::new(file, at, length).offset(offset).build(),
        }
    }
}

/// A slot of at least `bytes` in all, as memory to read into.
pub fn slot(arena: &HostArena, bytes: usize) -> Filling {
    let slots = arena.allocate(bytes - RecordHeader::BYTES, 1);
    slots.and_then(|mut slots| slots.pop()).expect("room")
}
