//! The ceiling: consecutive bytes of a plain file with O_DIRECT, in reads of one size, so many of them
//! under way.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Mutex;

use io_uring::{IoUring, opcode, types};
use stemkv_store::{Filling, HostArena, RecordHeader};

use super::chunks::Random;

/// How plain reads are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawWay {
    Ring,
    Preadv,
}

/// A file of random bytes.
pub struct RawFile {
    file: File,
}

impl RawFile {
    /// Writes it with O_DIRECT, through the memory of one slot.
    pub fn create(path: &Path, bytes: u64, arena: &HostArena) -> RawFile {
        const STEP: usize = 4 << 20;
        let mut slot = slot(arena, STEP);
        let image = slot.image_mut().expect("ours alone");
        let direct = || {
            let mut options = File::options();
            options.custom_flags(libc::O_DIRECT);
            options
        };
        let file = direct().write(true).create(true).truncate(true).open(path);
        let file = file.expect("a file system with O_DIRECT");
        let mut random = Random(bytes);
        for offset in (0..bytes).step_by(STEP) {
            let length = STEP.min((bytes - offset) as usize);
            random.fill(&mut image[..length]);
            file.write_all_at(&image[..length], offset).expect("space");
        }
        file.sync_all().expect("the disk works");
        RawFile {
            file: direct().read(true).open(path).expect("written"),
        }
    }

    /// Reads `memory.len()` bytes from `offset` on, in reads of `piece` bytes, `depth` of them under
    /// way.
    pub fn read(
        &self,
        way: RawWay,
        ring: &mut IoUring,
        memory: &mut [u8],
        offset: u64,
        piece: usize,
        depth: usize,
    ) {
        match way {
            RawWay::Ring => self.read_ring(ring, memory, offset, piece, depth),
            RawWay::Preadv => self.read_threads(memory, offset, piece, depth),
        }
    }

    fn read_ring(
        &self,
        ring: &mut IoUring,
        memory: &mut [u8],
        offset: u64,
        piece: usize,
        depth: usize,
    ) {
        let file = types::Fd(self.file.as_raw_fd());
        let mut pieces = memory.chunks_mut(piece).zip((offset..).step_by(piece));
        let (mut under_way, mut submitted_all) = (0, false);
        loop {
            while under_way < depth && !submitted_all {
                let Some((bytes, offset)) = pieces.next() else {
                    submitted_all = true;
                    break;
                };
                let read = opcode::Read::new(file, bytes.as_mut_ptr(), bytes.len() as u32)
                    .offset(offset)
                    .build()
                    .user_data(bytes.len() as u64);
                // SAFETY: the bytes are borrowed mutably for this call, each piece is given away
                // once, and the call returns only after every read has ended (a failing ring
                // panics, and a panic here ends the program).
                unsafe { ring.submission().push(&read) }.expect("as many entries as depth");
                under_way += 1;
            }
            if under_way == 0 {
                return;
            }
            if let Err(error) = ring.submit_and_wait(1) {
                eprintln!("io_uring fails: {error}");
                std::process::abort();
            }
            for entry in ring.completion() {
                assert_eq!(entry.result() as u64, entry.user_data(), "a whole read");
                under_way -= 1;
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
                self.file.read_exact_at(bytes, offset)?;
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

/// A ring for [`RawFile::read`].
pub fn ring(depth: usize) -> IoUring {
    let entries = (depth as u32).next_power_of_two();
    let ring = IoUring::builder().setup_coop_taskrun().build(entries);
    ring.expect("io_uring is allowed: the ceiling is to be known")
}

/// A slot of at least `bytes` in all, as memory to read into.
pub fn slot(arena: &HostArena, bytes: usize) -> Filling {
    let slots = arena.allocate(bytes - RecordHeader::BYTES, 1);
    slots.and_then(|mut slots| slots.pop()).expect("room")
}
