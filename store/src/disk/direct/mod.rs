//! Long reads of files straight into host slots, past the page cache.
//!
//! | file | question |
//! |---|---|
//! | `depth.rs` | how many reads does this disk want at once? |
//! | `plan.rs` | which records are read together, and where is a read cut? |
//! | `file.rs` | does the file system take O_DIRECT? |
//! | `transfer.rs` | who owns a slot while the kernel writes into it? |
//! | `ring.rs` | io_uring: many reads under way from one thread |
//! | `threads.rs` | the same with `preadv`, where io_uring is refused |
//!
//! A call to [`Direct::read`] keeps up to `depth` reads of at most `piece_bytes` under way and hands
//! each record over as soon as it is whole, so that whoever called verifies one while the next come.

mod depth;
mod file;
mod plan;
mod ring;
mod threads;
mod transfer;

use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Instant;

use crate::{Filling, HostArena};

use depth::{Begun, Depth};
pub(super) use file::{DirectFile, is_refusal};
use plan::Cut;
use ring::Rings;
use transfer::Transfer;

/// Everything is read in multiples of this, at multiples of it, into memory that starts on it.
const PAGE: usize = 4096;

/// Reads under way for one call that are tried where the kernel makes them: [`Depth`].
const DEPTHS: RangeInclusive<usize> = 4..=64;

/// How much is asked of a disk at once. `docs/decisions/0007` says how the numbers were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadSizes {
    /// Reads under way for one call, at most. A tier begins with the default, and finds out what its disk
    /// wants ([`DiskUsage::read_depth`](crate::DiskUsage::read_depth)).
    pub depth: usize,
    /// Bytes of one read, at most.
    pub piece_bytes_max: usize,
    /// A call for less than `depth` of the longest reads is cut into shorter ones, down to this. Shorter
    /// images are read together with their neighbours.
    pub piece_bytes_min: usize,
}

impl Default for ReadSizes {
    fn default() -> Self {
        ReadSizes {
            depth: 16,
            piece_bytes_max: 512 << 10,
            piece_bytes_min: 256 << 10,
        }
    }
}

impl ReadSizes {
    /// How to cut `bytes` that are wanted together.
    fn cut(&self, bytes: usize) -> Cut {
        let piece = bytes.div_ceil(self.depth).next_multiple_of(PAGE);
        let least = self.piece_bytes_min.next_multiple_of(PAGE).max(PAGE);
        Cut {
            piece_bytes: piece.clamp(least, self.piece_bytes_max.max(least)),
            alone_bytes: least,
        }
    }
}

/// Who makes the reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    /// io_uring.
    Ring,
    /// `preadv` on a few threads.
    Threads,
}

/// One image that is wanted: `bytes` from `offset` of `file`, into the start of `slot`.
pub(super) struct Want {
    pub(super) file: Arc<DirectFile>,
    /// A multiple of 4 KiB.
    pub(super) offset: u64,
    /// A multiple of 4 KiB; at most the slot's length.
    pub(super) bytes: usize,
    pub(super) slot: Filling,
}

/// Reads files into slots. May be used from several threads at once.
pub(super) struct Direct {
    sizes: ReadSizes,
    depth: Depth,
    /// What `depth` counts from.
    since: Instant,
    /// `None` where io_uring is refused.
    rings: Option<Rings>,
}

impl Direct {
    /// Takes io_uring where it can be had, and finds out how many reads suit the disk.
    pub(super) fn new() -> Direct {
        Self::within(Transport::Ring, ReadSizes::default(), DEPTHS)
    }

    /// Takes what is asked for, or [`Transport::Threads`] where io_uring is refused, and reads with these
    /// sizes.
    pub(super) fn with(transport: Transport, sizes: ReadSizes) -> Direct {
        Self::within(transport, sizes, sizes.depth..=sizes.depth)
    }

    fn within(transport: Transport, sizes: ReadSizes, depths: RangeInclusive<usize>) -> Direct {
        let rings = match transport {
            Transport::Ring => Rings::probe(*depths.end())
                .inspect_err(|error| tracing::info!(%error, "io_uring is refused: threads read"))
                .ok(),
            Transport::Threads => None,
        };
        let depths = match rings {
            Some(_) => depths,
            None => threads::within(depths),
        };
        Direct {
            sizes,
            depth: Depth::new(sizes.depth, depths),
            since: Instant::now(),
            rings,
        }
    }

    /// Reads that are kept under way for one call, as far as is known by now.
    pub(super) fn depth(&self) -> usize {
        self.depth.best()
    }

    pub(super) fn transport(&self) -> Transport {
        match &self.rings {
            Some(rings) if rings.work() => Transport::Ring,
            _ => Transport::Threads,
        }
    }

    /// Has the kernel look the memory of `arena` up now, rather than with each read into it, where it
    /// does that. Once, for one arena; others are read into as before.
    pub(super) fn attach(&self, arena: &HostArena) {
        let registered = self.rings.as_ref().map(|rings| rings.register(arena));
        if let Some(Err(error)) = registered {
            // Often the limit of locked memory.
            tracing::info!(%error, "the host tier is not registered for reads: they take more CPU");
        }
    }

    /// Reads what is wanted and hands each slot back as soon as it holds its image, or why it does
    /// not (then it holds anything): `done(i, …)` once for each want, `i` being its place, on the
    /// calling thread. Reads begin in the order of `wants`; short neighbours in one file that are no more
    /// than two pages apart are read together.
    ///
    /// Returns when nothing is under way any more, also by a panic of `done`. Where the kernel's ring
    /// itself fails, threads make what reads it has not begun, and all later ones; slots whose reads it
    /// began and never ended are not handed back.
    pub(super) fn read(
        &self,
        wants: Vec<Want>,
        done: &mut dyn FnMut(usize, Filling, io::Result<()>),
    ) {
        let bytes_of: Vec<usize> = wants.iter().map(|want| want.bytes).collect();
        let bytes = bytes_of.iter().sum();
        let mut counted = Counted::begin(self, bytes);
        let depth = counted.begun.depth;
        let sizes = ReadSizes {
            depth,
            ..self.sizes
        };
        let done = &mut |index, slot, outcome: io::Result<()>| {
            counted.arrived(bytes_of[index], outcome.is_ok());
            done(index, slot, outcome);
        };
        let transfer = Transfer::new(wants, sizes.cut(bytes), done);
        let ring = self.rings.as_ref().and_then(Rings::take);
        match (ring, &self.rings) {
            (Some(ring), Some(rings)) => {
                if let Some((transfer, next)) = rings.read(ring, transfer, depth, done) {
                    threads::read(transfer, next, depth, done);
                }
            }
            _ => threads::read(transfer, 0, depth, done),
        }
    }
}

/// A call, from its beginning to its end, however that comes.
struct Counted<'a> {
    direct: &'a Direct,
    begun: Begun,
    failed: bool,
}

impl<'a> Counted<'a> {
    fn begin(direct: &'a Direct, bytes: usize) -> Self {
        let begun = direct.depth.begin(direct.since.elapsed(), bytes as u64);
        Counted {
            direct,
            begun,
            failed: false,
        }
    }

    fn arrived(&mut self, bytes: usize, whole: bool) {
        self.direct.depth.arrived(&self.begun, bytes as u64);
        self.failed |= !whole;
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let Direct { depth, since, .. } = self.direct;
        let failed = self.failed || std::thread::panicking();
        depth.end(since.elapsed(), self.begun, failed);
    }
}

#[cfg(test)]
mod tests;
