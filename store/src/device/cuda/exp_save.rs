//! Saves that encode with `exp` on the GPU.
//!
//! A kernel encodes a slice of slabs out of the pages into staging memory; how long they have become is told
//! to the host, which puts the copies into the slots on the link: evenly spaced rows as wide as the
//! longest, so the slabs of a layer start at one place in every slot of the slice; but for the few that
//! are much longer than the others, which they would push out of their slots. A slice is encoded
//! while the one before crosses, so the link does not wait for the host's turn, nor the engine for
//! either.
//!
//! Slices are twice as long as others and two staging slots hold one: each kernel, however little it does,
//! holds up those of the engine, and each copy begins slowly (docs/benchmarks.md).

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::driver::{Event, Place, Rows, copy_rows};
use super::encode::{Encoder, Layout, SLABS_MAX};
use super::exp::too_large;
use super::fence::poll;
use super::lane::{ENCODED_SLOTS, HOST_WAIT_MAX, Lane, RING, Work};
use super::pin::crossing;
use super::prepared::Answers;
use super::runs::{Run, runs};
use crate::device::EncodedSave;
use crate::{Checksummer, Error, KvGeometry, Result, SlabEntry, SlabMove};

/// A slice is encoded while as many before it cross. With it they take all of the ring.
const ENCODED_AHEAD: usize = RING / ENCODED_SLOTS - 1;

/// What a lane says of the slabs of some layers.
#[derive(Clone)]
pub(super) enum Told {
    /// To be asked for behind the fence.
    Sums(Answers),
    /// From the first layer on, by move.
    Stored(Arc<Vec<Vec<SlabEntry>>>, u32),
}

/// Of a slice's slabs, one in so many may be stored apart from the others, ...
const FEW: usize = 16;
/// ... where it is longer by more than this part of a raw slab.
const LONGER: usize = 16;

/// A slice that is being encoded.
struct Slice {
    slots: Range<usize>,
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
        let slice_bytes = ENCODED_SLOTS * self.slot_bytes.min(work.calibration.slice_bytes);
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
        let slots = self.take_encoded_slots();
        for emptied in self.emptied[slots.clone()].iter().flatten() {
            emptied.order(self.kernels.as_stream())?;
        }
        let job = work.prepared.job(work.transfer, &moves, &work.layers)?;
        let rows = self.slot_address(slots.start);
        let job = self
            .encoder()?
            .job(geometry, job, work.step(), slots.start, rows)?;
        // SAFETY: the pages are valid by `PagedKv::register`'s promises, and the plan lies within them; the
        // raw slabs of a slice fit into its staging slots, so the encoded ones, which are no longer, do. All
        // kernels of this lane's encoder run on one stream, and the slots are this slice's alone by the
        // streams' order; answers are read before their next turn. There is room for `SLABS_MAX`
        // answers and `LAYERS_MAX` layers. The caller keeps the transfer until the kernel has ended.
        unsafe {
            work.shared
                .exp_save
                .launch(&self.kernels, &job, work.layers.len() as u32)?;
        }
        Ok(Slice {
            slots,
            moves,
            layout: job.layout(),
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
                self.copy_encoded(work, slice.slots.start, column, run)?;
            }
        }
        let stream = self.copies[self.turn].as_stream();
        self.copied.push_back(work.shared.events.record(stream)?);
        for slot in slice.slots.clone() {
            self.emptied[slot] = Some(work.shared.events.record(stream)?);
        }
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
        let slab_bytes = geometry.slab_bytes();
        let slots = work.transfer.moves()[slice.moves.clone()]
            .iter()
            .map(|slab_move| match slab_move {
                SlabMove::Save { slot, .. } => Ok(slot.payload()),
                _ => Err(Error::internal("chunks are encoded into the host tier")),
            })
            .collect::<Result<Vec<_>>>()?;
        let mut apart: Vec<bool> = ends.iter().map(Option::is_none).collect();
        let known: Vec<usize> = ends.iter().map(|end| end.unwrap_or(0)).collect();
        mark_longer(&known, slab_bytes / LONGER, &mut apart);
        // Checked before anything is said to be stored.
        let mut staged = Vec::with_capacity(stored.len());
        let mut next = 0;
        for layer in 0..stored.len() {
            let at = match slice.layout {
                Layout::Packed => next,
                Layout::Apart => layer * geometry.slab_stride(),
            };
            let answer = |index| encoder.answer(slice.slots.start, layer * count + index);
            let answers = (0..count).map(answer);
            let lengths = answers.map(|answer| {
                let is_possible = (1..=slab_bytes).contains(&answer.bytes) && answer.offset == at;
                is_possible.then_some(answer.bytes).ok_or_else(|| {
                    Error::internal("the GPU encodes a slab to an impossible length or place")
                })
            });
            let lengths = lengths.collect::<Result<Vec<usize>>>()?;
            mark_longer(&lengths, slab_bytes / LONGER, &mut apart);
            let longest = lengths.iter().copied().max().unwrap_or(0);
            next = at + longest.next_multiple_of(KvGeometry::SLAB_ALIGN);
            staged.push(at);
        }
        let mut columns = Vec::new();
        let is_shared = |index: &usize| !apart[*index];
        let shared: Vec<usize> = (0..count).filter(is_shared).collect();
        let alone = (0..count).filter(|&index| apart[index] && ends[index].is_some());
        let alone: Vec<Vec<usize>> = alone.map(|index| vec![index]).collect();
        for moves in std::iter::once(shared).chain(alone) {
            let reached = moves.iter().filter_map(|&index| ends[index]).max();
            let mut start = reached.unwrap_or(0);
            let mut column: Option<Column> = None;
            for (layer, stored) in stored.iter_mut().enumerate() {
                start = start.next_multiple_of(KvGeometry::SLAB_ALIGN);
                let is_next = |column: &Column| {
                    slice.layout == Layout::Packed
                        && staged[layer] - column.staged == start - column.payload
                };
                if !column.as_ref().is_some_and(is_next) {
                    columns.extend(column.replace(Column::new(staged[layer], start, &slots)));
                }
                let stored = &mut stored[slice.moves.clone()];
                let mut longest = 0;
                for &index in &moves {
                    let answer = encoder.answer(slice.slots.start, layer * count + index);
                    longest = longest.max(answer.bytes);
                    let slab_end = start + answer.bytes;
                    if ends[index].is_none() || slab_end > slots[index].1 {
                        ends[index] = None;
                        continue;
                    }
                    stored[index] = SlabEntry {
                        offset: start as u32,
                        bytes: answer.bytes as u32,
                        checksum: Checksummer::of_pieces(answer.sum, answer.bytes),
                    };
                    if let Some(column) = &mut column {
                        column.reach(index, slab_end);
                    }
                    ends[index] = Some(slab_end);
                }
                start += longest;
            }
            columns.extend(column);
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
            // pinned segment (see `runs` and `crossing`), and within staging slots that are this
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

/// Of a slice's moves that share their starts, marks the few whose value is larger than the others' by more
/// than `slack`.
fn mark_longer(values: &[usize], slack: usize, apart: &mut [bool]) {
    let of_shared = values.iter().zip(&*apart).filter(|&(_, &apart)| !apart);
    let mut shared: Vec<usize> = of_shared.map(|(&value, _)| value).collect();
    let few = (values.len() / FEW).max(1);
    let (Some(&least), Some(&most)) = (shared.iter().min(), shared.iter().max()) else {
        return;
    };
    let Some(usual) = shared.len().checked_sub(few + 1) else {
        return;
    };
    if most - least > slack {
        let (_, &mut usual, _) = shared.select_nth_unstable(usual);
        for (apart, &value) in apart.iter_mut().zip(values) {
            *apart |= value > usual + slack;
        }
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

/// Shown: who shares the others' starts.
#[cfg(test)]
mod tests {
    use super::*;

    fn apart(values: &[usize]) -> Vec<usize> {
        let mut apart = vec![false; values.len()];
        mark_longer(values, 10, &mut apart);
        (0..values.len()).filter(|&index| apart[index]).collect()
    }

    #[test]
    fn the_few_that_are_much_longer_are_apart() {
        const NONE: [usize; 0] = [];
        assert_eq!(apart(&[]), NONE);
        assert_eq!(apart(&[70]), NONE);
        assert_eq!(apart(&[70, 100]), [1]);
        assert_eq!(apart(&[70, 100, 72]), [1]);
        assert_eq!(apart(&[70, 80, 72]), NONE, "not much");
        assert_eq!(apart(&[100, 100, 72]), NONE, "not few");
        let mut many = vec![70; 64];
        many[7..11].fill(100);
        assert_eq!(apart(&many), [7, 8, 9, 10]);
        many[20] = 100;
        assert_eq!(apart(&many), NONE);
    }

    #[test]
    fn what_is_apart_already_does_not_count() {
        let mut apart = [true, false, false, false];
        mark_longer(&[500, 70, 100, 71], 10, &mut apart);
        assert_eq!(apart, [true, false, true, false]);
    }
}
