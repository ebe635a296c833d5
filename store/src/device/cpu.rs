//! The device of engines that compute on the CPU: plain copies, summed while the bytes are in the
//! first-level cache.

use std::ops::Range;
use std::time::Duration;
use std::{ptr, slice};

use super::{streaming, *};
use crate::host::coded::with_scratch;
use crate::transfer::Piece;
use crate::{Checksummer, SlabEntry};

/// Copies with the CPU: for engines whose pages are in host memory.
#[derive(Debug, Default)]
pub struct CpuDevice(());

impl CpuDevice {
    /// A CPU device.
    pub fn new() -> Self {
        Self::default()
    }

    /// How long [`Device::order`] and [`Device::submit`] wait for a fence before they give up.
    pub const WAIT_MAX: Duration = Duration::from_secs(60);
}

impl Device for CpuDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            name: "cpu".into(),
            blocking: true,
            on_cpu: true,
        }
    }

    fn attach(&self, _: &HostArena) -> Result<()> {
        Ok(())
    }

    fn arena(&self, geometry: &KvGeometry, capacity_bytes: u64) -> Result<DeviceArena> {
        DeviceArena::in_host_memory(geometry, capacity_bytes)
    }

    fn record(&self, stream: Stream) -> Result<Fence> {
        check_stream(stream).map(|()| Fence::reached())
    }

    fn order(&self, stream: Stream, fence: &Fence) -> Result<()> {
        check_stream(stream)?;
        wait(fence)
    }

    fn decodes(&self, _: CodecId) -> bool {
        true
    }

    fn encodes(&self, codec: CodecId) -> bool {
        codec != CodecId::Raw
    }

    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted> {
        after.iter().try_for_each(wait)?;
        let sums = match copy_layer(transfer, layer)? {
            Copied::Summed(sums) => SlabSums::Known(sums),
            Copied::Stored(slabs) => SlabSums::Stored(Box::new(move || Ok(slabs))),
        };
        Ok(Submitted {
            sums,
            fence: Fence::reached(),
        })
    }
}

fn check_stream(stream: Stream) -> Result<()> {
    match stream {
        Stream::HOST => Ok(()),
        Stream(other) => Err(
            Error::invalid("the cpu device knows no stream but the host's").with("stream", other),
        ),
    }
}

fn wait(fence: &Fence) -> Result<()> {
    match fence.point().wait(CpuDevice::WAIT_MAX)? {
        true => Ok(()),
        false => Err(Error::unavailable("a fence did not arrive in time")
            .with("seconds", CpuDevice::WAIT_MAX.as_secs())),
    }
}

/// What is known of a layer that was copied, for each move.
pub(super) enum Copied {
    Summed(Vec<Checksum>),
    Stored(Vec<SlabEntry>),
}

/// Copies one layer and sums every slab, whole, also where only some of its tokens move.
pub(super) fn copy_layer(transfer: &Transfer, layer: LayerId) -> Result<Copied> {
    let kv = &transfer.table().kv;
    transfer.check_layer(layer)?;
    if transfer
        .device_arena()
        .is_some_and(|arena| !arena.is_host_memory())
    {
        return Err(Error::invalid("the CPU does not reach the device slots"));
    }
    // Held until the end: see `PagedKv::register` and `HostPages` for who else may come.
    let (_exclusive, _shared) = match transfer.direction() {
        Direction::Load => (kv.lock_for_writing(layer), None),
        Direction::Save => (None, kv.lock_for_reading(layer)),
    };
    let bases: Vec<*mut u8> = (0..kv.geometry().planes.len())
        .map(|plane| ptr::with_exposed_provenance_mut(kv.base(plane, layer) as usize))
        .collect();
    let pages_of = |index| Pages {
        transfer,
        pieces: transfer.plan().pieces(index),
        bases: &bases,
    };
    let moves = transfer.moves().iter().enumerate();
    if let Some(encoded) = transfer.encoded() {
        let slabs = encoded.fill(layer.0..layer.0 + 1, moves.len(), |ends| {
            let slabs = moves.zip(ends).map(|((index, slab_move), end)| {
                let SlabMove::Save { slot, .. } = slab_move else {
                    return Err(Error::internal("chunks are encoded into the host tier"));
                };
                Ok(pages_of(index).save_encoded(slot, encoded.codec(), end))
            });
            slabs.collect()
        });
        return slabs.map(Copied::Stored);
    }
    let sums = moves.map(|(index, slab_move)| {
        let pages = pages_of(index);
        match slab_move {
            SlabMove::Load { slot, .. } => {
                let slab = slot.slab(layer).zip(slot.slab_bytes(layer));
                match slab {
                    Some((entry, stored)) if !slot.is_raw(&entry) => {
                        return pages.load_encoded(slot, &entry, stored);
                    }
                    slab => slab.map(|(_, raw)| pages.load(raw)),
                }
            }
            SlabMove::Save { slot, .. } => slot.write_slab(layer, |slab| pages.save(slab)),
            SlabMove::LoadDevice { slot, .. } => slot.read_slab(layer, |slab| pages.load(slab)),
            SlabMove::SaveDevice { slot, .. } => slot.write_slab(layer, |slab| pages.save(slab)),
        }
        .ok_or_else(|| Error::internal("a slab that was there is gone").with("layer", layer))
    });
    let sums: Result<Vec<Checksum>> = sums.collect();
    sums.map(Copied::Summed)
}

/// The engine's side of one slab: pieces that lie within the registered memory, in a layer that is
/// locked or that the engine leaves to us.
struct Pages<'a> {
    transfer: &'a Transfer,
    pieces: &'a [Piece],
    /// By plane.
    bases: &'a [*mut u8],
}

impl Pages<'_> {
    fn load(&self, slab: &[u8]) -> Checksum {
        let mut summer = Checksummer::default();
        let mut next = 0;
        for window in self.windows(slab.len()) {
            summer.update(&slab[window.clone()]);
            self.parts(window, &mut next, |range, page| {
                let bytes = &slab[range];
                // SAFETY: `page` starts `bytes.len()` bytes of registered pages that this load may
                // write, by `PagedKv::register`'s promises or by the layer's lock; they are none of
                // the slab's arena's (`Transfer::new` sees to it for slots that are pages), so the
                // two do not overlap.
                unsafe { streaming::copy(bytes.as_ptr(), page, bytes.len()) }
            });
        }
        streaming::finish();
        summer.finish()
    }

    /// Sums what is stored, and decodes it in the second-level cache if it is what it was; else
    /// whoever compares the sums finds out.
    fn load_encoded(&self, slot: &Slot, entry: &SlabEntry, stored: &[u8]) -> Result<Checksum> {
        let sum = Checksummer::of(stored);
        if sum != entry.checksum {
            return Ok(sum);
        }
        with_scratch(slot.arena().geometry().slab_bytes(), |slab| {
            if slot.decode_slab(stored, slab).is_err() {
                // No slab of this codec, whoever wrote it: as wrong as one that does not sum.
                return Ok(Checksum(!entry.checksum.0));
            }
            self.parts(0..slab.len(), &mut 0, |range, page| {
                let bytes = &slab[range];
                // SAFETY: `page` as in `load`; the other side is this thread's own scratch, which overlaps
                // no page.
                unsafe { streaming::copy(bytes.as_ptr(), page, bytes.len()) }
            });
            streaming::finish();
            Ok(sum)
        })
    }

    /// Encodes the slab in the second-level cache, into the slot behind `end`, and moves that.
    fn save_encoded(
        &self,
        slot: &FillingRef,
        codec: CodecId,
        end: &mut Option<usize>,
    ) -> SlabEntry {
        let mut entry = SlabEntry::default();
        let Some(start) = end.map(|end| end.next_multiple_of(KvGeometry::SLAB_ALIGN)) else {
            return entry;
        };
        let (codecs, slab_bytes) = (slot.arena().codecs(), slot.arena().geometry().slab_bytes());
        let stored = slot.write_from(start, |room| {
            with_scratch(slab_bytes, |slab| {
                self.parts(0..slab.len(), &mut 0, |range, page| {
                    let bytes = &mut slab[range];
                    // SAFETY: `page` as in `save`; the other side is this thread's own scratch, which
                    // overlaps no page.
                    unsafe { ptr::copy_nonoverlapping(page, bytes.as_mut_ptr(), bytes.len()) }
                });
                let bytes = match codecs.encode(codec, slab, room) {
                    Some(bytes) => bytes,
                    None => {
                        // It does not shrink, or not even the shrunken one fits.
                        room.get_mut(..slab.len())?.copy_from_slice(slab);
                        slab.len()
                    }
                };
                Some((bytes, Checksummer::of(&room[..bytes])))
            })
        });
        *end = stored.flatten().map(|(bytes, checksum)| {
            entry = SlabEntry {
                offset: start as u32,
                bytes: bytes as u32,
                checksum,
            };
            start + bytes
        });
        entry
    }

    fn save(&self, slab: &mut [u8]) -> Checksum {
        let mut summer = Checksummer::default();
        let mut next = 0;
        let mut cached = [0; Checksummer::PIECE_BYTES];
        for window in self.windows(slab.len()) {
            let start = window.start;
            let small = window.len() <= cached.len();
            let mut whole = false;
            self.parts(window.clone(), &mut next, |range, page| {
                if small && range == window {
                    // The window is one piece: summed where it lies, and streamed from there.
                    whole = true;
                    // SAFETY: `page` starts `range.len()` bytes of registered pages that nobody
                    // writes to before this save gives them back, by `PagedKv::register`'s promises
                    // or by the layer's lock.
                    summer.update(unsafe { slice::from_raw_parts(page, range.len()) });
                    let target = &mut slab[range];
                    // SAFETY: `page` as above; the slab is an arena's that holds no page of this
                    // transfer (`Transfer::new`), so the two do not overlap.
                    unsafe { streaming::copy(page, target.as_mut_ptr(), target.len()) }
                    return;
                }
                // Gathered in the first-level cache and summed there, then streamed out.
                let bytes = match small {
                    true => &mut cached[range.start - start..range.end - start],
                    false => &mut slab[range],
                };
                // SAFETY: `page` as above; neither the cached window, on this stack, nor the slab
                // overlaps it.
                unsafe { ptr::copy_nonoverlapping(page, bytes.as_mut_ptr(), bytes.len()) }
            });
            if small && !whole {
                let gathered = &cached[..window.len()];
                summer.update(gathered);
                let target = &mut slab[window];
                // SAFETY: both have the window's length, and a local array overlaps with nothing.
                unsafe { streaming::copy(gathered.as_ptr(), target.as_mut_ptr(), target.len()) }
            } else if !whole {
                summer.update(&slab[window]);
            }
        }
        streaming::finish();
        summer.finish()
    }

    /// The slab in windows that stay in the first-level cache between copy and sum; in one where
    /// the pieces do not come in the slab's order.
    fn windows(&self, slab_bytes: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let window = match self.pieces.iter().all(|piece| piece.rows == 1) {
            true => Checksummer::PIECE_BYTES,
            false => slab_bytes,
        };
        (0..slab_bytes)
            .step_by(window)
            .map(move |start| start..(start + window).min(slab_bytes))
    }

    /// Calls `copy` with each contiguous part of `window`: its range in the slab and where it is in
    /// the pages. `next` is the first piece that is not done.
    fn parts(
        &self,
        window: Range<usize>,
        next: &mut usize,
        mut copy: impl FnMut(Range<usize>, *mut u8),
    ) {
        while let Some(piece) = self.pieces.get(*next) {
            let row_start = piece.slab_offset as usize;
            if row_start >= window.end {
                return;
            }
            let pitch = self.transfer.plan().pitch(piece.plane);
            let page = self.bases[piece.plane as usize].wrapping_add(piece.page_offset as usize);
            for row in 0..piece.rows as usize {
                let start = row_start + row * pitch.slab;
                let end = start + piece.row_bytes as usize;
                let part = start.max(window.start)..end.min(window.end);
                let skipped = part.start - start;
                copy(part, page.wrapping_add(row * pitch.page + skipped));
            }
            if row_start + piece.row_bytes as usize > window.end {
                return; // A single row, continued in the next window.
            }
            *next += 1;
        }
    }
}
