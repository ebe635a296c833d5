//! Saves that encode with `exp` on the GPU.
//!
//! A kernel encodes a slice of slabs out of the pages into staging memory; how long they have become is told
//! to the host, which puts the copies into the slots on the link: evenly spaced rows as wide as the
//! longest, so the slabs of a layer start at one place in every slot of the slice. Slices are encoded
//! ahead while earlier ones cross, so the link does not wait for the host's turn, nor the engine for
//! either.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::driver::{Event, Place, Rows, copy_rows};
use super::encode::{Encoder, Layout, SLABS_MAX};
use super::exp::too_large;
use super::fence::poll;
use super::lane::{HOST_WAIT_MAX, Lane, Work};
use super::pin::crossing;
use super::prepared::Answers;
use super::runs::{Run, runs};
use crate::device::EncodedSave;
use crate::{Checksummer, Error, KvGeometry, Result, SlabEntry, SlabMove};

/// A slice is encoded while as many before it are, or wait for the host.
const ENCODED_AHEAD: usize = 2;

/// What a lane says of the slabs of some layers.
#[derive(Clone)]
pub(super) enum Told {
    /// To be asked for behind the fence.
    Sums(Answers),
    /// From the first layer on, by move.
    Stored(Arc<Vec<Vec<SlabEntry>>>, u32),
}

/// A slice that is being encoded.
struct Slice {
    slot: usize,
    moves: Range<usize>,
    layout: Layout,
    encoded: Event,
}

impl Lane {
    /// Encodes some layers of a save and puts them on the link; what is stored of each, by layer and
    /// move. Waits until the last slice is encoded.
    pub(super) fn save_encoded(
        &mut self,
        work: &Work<'_>,
        encoded: &EncodedSave,
    ) -> Result<Vec<Vec<SlabEntry>>> {
        let count = work.transfer.moves().len();
        encoded.fill(work.layers.clone(), count, |ends| {
            self.encode_layers(work, ends)
        })
    }

    fn encode_layers(
        &mut self,
        work: &Work<'_>,
        ends: &mut [Option<usize>],
    ) -> Result<Vec<Vec<SlabEntry>>> {
        let (layers, step) = (&work.layers, work.step());
        if step > self.slot_bytes {
            let half = layers.start + layers.len() as u32 / 2;
            if half == layers.start {
                return Err(too_large(step, self.slot_bytes));
            }
            let mut stored = self.encode_layers(&work.of(layers.start..half), ends)?;
            stored.extend(self.encode_layers(&work.of(half..layers.end), ends)?);
            return Ok(stored);
        }
        let mut stored = vec![vec![SlabEntry::default(); ends.len()]; layers.len()];
        let slice_bytes = self.slot_bytes.min(work.calibration.slice_bytes);
        let per_slice = (slice_bytes / step).min(SLABS_MAX / layers.len()).max(1);
        let mut ahead = VecDeque::new();
        for start in (0..ends.len()).step_by(per_slice) {
            ahead.push_back(self.encode_slice(work, start..ends.len().min(start + per_slice))?);
            if ahead.len() > ENCODED_AHEAD
                && let Some(first) = ahead.pop_front()
            {
                self.store(work, &first, ends, &mut stored)?;
            }
        }
        for slice in ahead {
            self.store(work, &slice, ends, &mut stored)?;
        }
        Ok(stored)
    }

    /// Puts the kernel that encodes a slice on the stream.
    fn encode_slice(&mut self, work: &Work<'_>, moves: Range<usize>) -> Result<Slice> {
        let geometry = work.transfer.table().kv.geometry();
        let slot = self.take_slot();
        if let Some(emptied) = &self.emptied[slot] {
            emptied.order(self.kernels.as_stream())?;
        }
        let (job, vector) = work.prepared.job(work.transfer, &moves, &work.layers)?;
        let rows = self.slot_address(slot);
        let job = self
            .encoder()?
            .job(geometry, job, work.step(), slot, rows)?;
        // SAFETY: the pages are valid by `PagedKv::register`'s promises, and the plan lies within them; the
        // raw slabs of a slice fit into a staging slot, so the encoded ones, which are no longer, do. All
        // kernels of this lane's encoder run on one stream, and the staging slot is this slice's alone by
        // the streams' order; answers are read before the slot's next turn. There is room for `SLABS_MAX`
        // answers and `LAYERS_MAX` layers. The caller keeps the transfer until the kernel has ended.
        unsafe {
            work.shared
                .exp_save
                .launch(&self.kernels, vector, &job, work.layers.len() as u32)?;
        }
        Ok(Slice {
            slot,
            moves,
            layout: job.layout(vector),
            encoded: work.shared.events.record(self.kernels.as_stream())?,
        })
    }

    /// Waits until a slice is encoded, notes where its slabs go, and puts the copies on the link.
    fn store(
        &mut self,
        work: &Work<'_>,
        slice: &Slice,
        ends: &mut [Option<usize>],
        stored: &mut [Vec<SlabEntry>],
    ) -> Result<()> {
        if !poll(HOST_WAIT_MAX, || slice.encoded.is_reached())? {
            return Err(Error::unavailable("the GPU does not finish encoding")
                .with("seconds", HOST_WAIT_MAX.as_secs()));
        }
        let columns = self.place(work, slice, ends, stored)?;
        if columns.iter().all(|column| column.widest == 0) {
            return Ok(());
        }
        self.take_turn(work)?;
        for column in &columns {
            let rows = 0..column.starts.len();
            let evenly = runs(&column.starts, rows, column.widest, |index| {
                column.bytes[index] == 0
            });
            for run in &evenly {
                self.copy_encoded(work, slice.slot, column, run)?;
            }
        }
        let stream = self.copies[self.turn].as_stream();
        self.copied.push_back(work.shared.events.record(stream)?);
        self.emptied[slice.slot] = Some(work.shared.events.record(stream)?);
        Ok(())
    }

    /// Where the slabs of an encoded slice go.
    fn place(
        &self,
        work: &Work<'_>,
        slice: &Slice,
        ends: &mut [Option<usize>],
        stored: &mut [Vec<SlabEntry>],
    ) -> Result<Vec<Column>> {
        let (encoder, count) = (self.encoder()?, slice.moves.len());
        let geometry = work.transfer.table().kv.geometry();
        let ends = &mut ends[slice.moves.clone()];
        let slots = work.transfer.moves()[slice.moves.clone()]
            .iter()
            .map(|slab_move| match slab_move {
                SlabMove::Save { slot, .. } => Ok(slot.payload()),
                _ => Err(Error::internal("chunks are encoded into the host tier")),
            })
            .collect::<Result<Vec<_>>>()?;
        let first = ends.iter().flatten().copied().max().unwrap_or(0);
        let first = first.next_multiple_of(KvGeometry::SLAB_ALIGN);
        let mut start = first;
        let mut columns = Vec::new();
        for (layer, stored) in stored.iter_mut().enumerate() {
            let staged = match slice.layout {
                Layout::Packed => start - first,
                Layout::Apart => layer * geometry.slab_stride(),
            };
            if columns.is_empty() || slice.layout == Layout::Apart {
                columns.push(Column::new(staged, start, &slots));
            }
            let column = columns.last_mut().expect("pushed above");
            let mut longest = 0;
            let stored = &mut stored[slice.moves.clone()];
            for (index, (stored, end)) in stored.iter_mut().zip(ends.iter_mut()).enumerate() {
                let answer = encoder.answer(slice.slot, layer * count + index);
                if answer.bytes == 0
                    || answer.bytes > geometry.slab_bytes()
                    || answer.offset != staged
                {
                    return Err(Error::internal(
                        "the GPU encodes a slab to an impossible length or place",
                    ));
                }
                longest = longest.max(answer.bytes);
                let slab_end = start + answer.bytes;
                if end.is_none() || slab_end > slots[index].1 {
                    *end = None;
                    continue;
                }
                *stored = SlabEntry {
                    offset: start as u32,
                    bytes: answer.bytes as u32,
                    checksum: Checksummer::of_pieces(answer.sum, answer.bytes),
                };
                column.reach(index, slab_end);
                *end = Some(slab_end);
            }
            start += longest.next_multiple_of(KvGeometry::SLAB_ALIGN);
        }
        Ok(columns)
    }

    /// Puts the copies of one run into its slots on the stream.
    fn copy_encoded(&self, work: &Work<'_>, slot: usize, rows: &Column, run: &Run) -> Result<()> {
        let step = work.step();
        let staged = self.slot_address(slot) + rows.staged as u64;
        let copy = |index: usize, skip: u64, bytes: u64, count: usize| {
            let from = staged + (index * step) as u64 + skip;
            let to = work.pinned.base() + rows.starts[index] + skip;
            let of_copy = Rows {
                row_bytes: bytes as usize,
                rows: count,
                from_pitch: step,
                to_pitch: run.step as usize,
            };
            // SAFETY: the rows lie within what is left of the transfer's slots (see below), which are
            // being filled and whose payload behind the slabs before is this save's to write, in one
            // pinned segment (see `runs` and `crossing`), and within a staging slot that is this
            // slice's alone until the stream has come past. The submission's fence keeps the slots.
            unsafe {
                copy_rows(
                    &self.copies[self.turn],
                    Place::Device(from),
                    Place::Host(to),
                    of_copy,
                )
            }
        };
        let of_run = run.first..run.first + run.count;
        let width = of_run.clone().map(|index| rows.bytes[index]).max();
        let width = width.unwrap_or(0);
        if run.count > 1 && of_run.clone().all(|index| width <= rows.rooms[index]) {
            return copy(run.first, 0, width, run.count);
        }
        of_run.into_iter().try_for_each(|index| {
            let (start, bytes) = (rows.starts[index], rows.bytes[index]);
            match crossing(&(start..start + bytes)) {
                None => copy(index, 0, bytes, 1),
                Some(cut) => {
                    copy(index, 0, cut - start, 1)?;
                    copy(index, cut - start, start + bytes - cut, 1)
                }
            }
        })
    }

    pub(super) fn encoder(&self) -> Result<&Encoder> {
        let encoder = self.encoder.as_ref();
        encoder.ok_or_else(|| Error::internal("only saves are encoded"))
    }
}

/// What comes out of one column of the rows in staging memory to each slot, by move of the slice.
struct Column {
    /// In the row.
    staged: usize,
    /// In the payload.
    payload: usize,
    /// Where in the mapping.
    starts: Vec<u64>,
    bytes: Vec<u64>,
    /// Bytes to the slot's end.
    rooms: Vec<u64>,
    widest: u64,
}

impl Column {
    /// What starts at `staged` in its row and goes to `payload` in the slots: nothing yet.
    fn new(staged: usize, payload: usize, slots: &[(usize, usize)]) -> Column {
        let slots = slots.iter();
        let (starts, rooms) = slots
            .map(|&(start, room)| {
                let left = room.saturating_sub(payload);
                ((start + payload) as u64, left as u64)
            })
            .unzip();
        let mut column = Column {
            staged,
            payload,
            starts,
            bytes: Vec::new(),
            rooms,
            widest: 0,
        };
        column.bytes.resize(column.starts.len(), 0);
        column
    }

    /// The row of a move goes on to `end` in the payload.
    fn reach(&mut self, index: usize, end: usize) {
        // Copies of odd lengths are slow, and a slot goes on to the next multiple.
        let bytes = (end - self.payload).next_multiple_of(KvGeometry::SLAB_ALIGN) as u64;
        self.bytes[index] = bytes;
        self.widest = self.widest.max(bytes);
    }
}
