//! What one call reads, and the slots that it reads into.
//!
//! The kernel writes into a slot from the submission of a read to its completion, whatever happens
//! on our side. So a [`Transfer`] owns the slots until all reads of a slot have ended, and whoever
//! drives it must not let go of it before: the last resort is to leak it.

use std::cell::UnsafeCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;

use super::plan::{Cut, Extent, GAP_BYTES_MAX, Part, plan};
use super::{DirectFile, PAGE, Want};
use crate::Filling;

/// Where bytes go that nobody wants. Only the kernel ever writes to it, and nobody reads it.
#[repr(C, align(4096))]
struct Nowhere(UnsafeCell<[u8; GAP_BYTES_MAX]>);

// SAFETY: no reference to the bytes is ever made; only their address is given to the kernel.
unsafe impl Sync for Nowhere {}

static NOWHERE: Nowhere = Nowhere(UnsafeCell::new([0; GAP_BYTES_MAX]));

/// One read, as the kernel wants it.
pub(super) struct Read {
    pub(super) file: RawFd,
    pub(super) offset: u64,
    pub(super) bytes: usize,
    vectors: Vec<libc::iovec>,
    /// The first want that it is for, and how many. A read is for consecutive wants.
    first: usize,
    count: usize,
}

// SAFETY: the pointers lead into slots of a shared mapping, which any thread may write to; who may
// when is said at `Transfer::reads`.
unsafe impl Send for Read {}
// SAFETY: as above; nothing is written through a shared `Read`, its pointers are only copied out.
unsafe impl Sync for Read {}

impl Read {
    /// Its vectors: first and number.
    pub(super) fn vectors(&self) -> (*const libc::iovec, u32) {
        // Two parts a record of at least two pages, within `ReadSizes::piece_bytes_max`.
        (self.vectors.as_ptr(), self.vectors.len() as u32)
    }

    /// Where it goes to, if that is one place.
    pub(super) fn single(&self) -> Option<libc::iovec> {
        match self.vectors.as_slice() {
            [only] => Some(*only),
            _ => None,
        }
    }

    /// A read that ended early is an error: the file is shorter than its records say.
    pub(super) fn outcome(&self, answer: io::Result<usize>) -> io::Result<()> {
        match answer {
            Ok(bytes) if bytes == self.bytes => Ok(()),
            Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => Err(error),
        }
    }
}

struct Target {
    /// Until it is handed back.
    slot: Option<Filling>,
    /// Keeps the descriptor that the reads name open.
    _file: Arc<DirectFile>,
    reads_left: usize,
    failed: Option<io::Error>,
}

/// The slots of a call, each until its last read has ended.
pub(super) struct Transfer {
    targets: Vec<Target>,
    /// In the order in which they should begin.
    ///
    /// Each leads into slots of `targets` that have `reads_left`, or were leaked, and no two to the same
    /// bytes. So until [`Transfer::end`] is told of it, a read may be made once; after that, never.
    reads: Arc<[Read]>,
}

impl Transfer {
    /// What cannot be read at all is handed back at once.
    pub(super) fn new(
        wants: Vec<Want>,
        cut: Cut,
        done: &mut dyn FnMut(usize, Filling, io::Result<()>),
    ) -> Transfer {
        let mut numbers = HashMap::new();
        let mut bases = Vec::with_capacity(wants.len());
        let mut extents = Vec::with_capacity(wants.len());
        let mut targets: Vec<Target> = Vec::with_capacity(wants.len());
        for (index, want) in wants.into_iter().enumerate() {
            let number = numbers.len();
            let file = *numbers.entry(want.file.as_raw_fd()).or_insert(number);
            let mut slot = want.slot;
            let fits = want.offset.is_multiple_of(PAGE as u64) && want.bytes.is_multiple_of(PAGE);
            let base = match slot.image_mut() {
                Ok(image) if fits && want.bytes <= image.len() => Some(image.as_mut_ptr()),
                _ => None,
            };
            extents.push(Extent {
                file,
                offset: want.offset,
                bytes: base.map_or(0, |_| want.bytes),
            });
            bases.push(base.unwrap_or(std::ptr::null_mut()));
            targets.push(Target {
                slot: Some(slot),
                _file: want.file,
                reads_left: 0,
                failed: base.is_none().then(|| io::ErrorKind::InvalidInput.into()),
            });
            debug_assert_eq!(targets.len(), index + 1);
        }
        let pieces = plan(&extents, cut);
        let mut reads = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let (mut first, mut last) = (usize::MAX, 0);
            let bytes = piece.bytes();
            let vectors = piece.parts.iter().map(|part| match *part {
                Part::Image { index, from, bytes } => {
                    (first, last) = (first.min(index), index);
                    targets[index].reads_left += 1;
                    libc::iovec {
                        iov_base: bases[index].wrapping_add(from).cast(),
                        iov_len: bytes,
                    }
                }
                Part::Gap { bytes } => libc::iovec {
                    iov_base: NOWHERE.0.get().cast(),
                    iov_len: bytes,
                },
            });
            let vectors = vectors.collect();
            reads.push(Read {
                file: targets[first]._file.as_raw_fd(),
                offset: piece.offset,
                bytes,
                vectors,
                first,
                count: last + 1 - first,
            });
        }
        let mut transfer = Transfer {
            targets,
            reads: reads.into(),
        };
        for index in 0..transfer.targets.len() {
            if transfer.targets[index].reads_left == 0 {
                transfer.hand_over(index, done);
            }
        }
        transfer
    }

    /// The reads to make, see the field.
    pub(super) fn reads(&self) -> Arc<[Read]> {
        self.reads.clone()
    }

    /// Read `number` has ended: hands over the slots that it was the last for.
    pub(super) fn end(
        &mut self,
        number: usize,
        outcome: io::Result<()>,
        done: &mut dyn FnMut(usize, Filling, io::Result<()>),
    ) {
        let wants = self.reads[number].first..self.reads[number].first + self.reads[number].count;
        for index in wants {
            let target = &mut self.targets[index];
            if target.reads_left == 0 {
                // Without a byte to read: handed over at once.
                continue;
            }
            target.reads_left -= 1;
            if let Err(error) = &outcome {
                target.failed = Some(again(error));
            }
            if target.reads_left == 0 {
                self.hand_over(index, done);
            }
        }
    }

    /// Read `number` was begun and will not be heard of again: the slots that it is for are leaked, as the
    /// kernel may still write into them, and never handed over.
    pub(super) fn lose(&mut self, number: usize) {
        let read = &self.reads[number];
        for target in &mut self.targets[read.first..read.first + read.count] {
            std::mem::forget(target.slot.take());
        }
    }

    fn hand_over(&mut self, index: usize, done: &mut dyn FnMut(usize, Filling, io::Result<()>)) {
        let target = &mut self.targets[index];
        let outcome = target.failed.take().map_or(Ok(()), Err);
        if let Some(slot) = target.slot.take() {
            done(index, slot, outcome);
        }
    }
}

/// The same error once more, for another record of the read.
fn again(error: &io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => error.kind().into(),
    }
}
