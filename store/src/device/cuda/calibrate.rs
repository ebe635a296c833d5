//! Measures the link at attach, in free slots of the arena that will be used.
//!
//! The link of a virtual machine has slow moments, which only ever make a figure smaller: whatever is
//! compared is measured in turns, again and again, and each counts with its best turn. All of it takes
//! about a quarter of a second.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::driver::{Event, Place, Rows, copy_rows};
use super::fence::poll;
use super::kernels::{ALWAYS_ZERO, Job, Move, PIECE, PLANES_MAX, Plane, magic, vector_for};
use super::lane::{ENCODED_SLOTS, Lane, Shared};
use super::pin::{PinnedArena, crossing};
use super::prepared::Descriptors;
use super::rates::{Calibration, LinkRates};
use crate::{
    Direction, Dtype, Error, Filling, HostArena, KvGeometry, LayerId, RecordHeader, Result,
};

/// Slots to measure in, and bytes in them, at most.
const SLOTS_MAX: usize = 256;
const SPAN_MAX: usize = 512 << 20;
/// Fewer bytes are gone before they can be timed.
const COPY_BYTES_MIN: usize = 2 << 20;
const COPY_BYTES_MAX: usize = 16 << 20;
const ROW_BYTES: Range<usize> = 4 << 10..1 << 20;
/// Values that are encoded over and over.
const VALUE_BYTES_MAX: usize = 1 << 20;
/// Each figure is the best of this many turns.
const TURNS: usize = 6;
/// Timed together, so that the time to start one and to see its end counts little.
const IN_A_ROW: usize = 4;
/// The same for kernels that are over in microseconds.
const SHORT_IN_A_ROW: usize = 16;
/// A kernel that sums must be this much faster than the link: then it is done long before the next
/// slice has arrived.
const SUMS_MUST_WIN: f64 = 4.0;
/// Also under a debugger that runs kernels a thousand times slower.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// A slab, of one token, of the kernels' measurement.
const PIECE_BYTES: usize = 32 << 10;

/// Free slots that lie one after the other, and where.
struct Bench<'a> {
    shared: &'a Shared,
    pinned: &'a PinnedArena,
    _slots: Vec<Filling>,
    /// From the base of the mapping.
    start: u64,
    pitch: usize,
    rows: usize,
    layer_bytes: usize,
    layers: usize,
    geometry: KvGeometry,
    /// At `start`, values like those of KV.
    value_bytes: usize,
}

/// `None` where the arena has no room to measure in.
pub(super) fn calibrate(
    shared: &Shared,
    pinned: &PinnedArena,
    arena: &HostArena,
    lanes: [&Lane; 2],
) -> Result<Option<Calibration>> {
    let Some(bench) = Bench::new(shared, pinned, arena) else {
        return Ok(None);
    };
    let defaults = Calibration::default();
    let [load, save] = lanes;
    let loads = bench.rates(load, &defaults)?;
    let saves = bench.rates(save, &defaults)?;
    let blocks = defaults.staging_blocks;
    let scatter = [
        bench.scatter(load, blocks, false)?,
        bench.scatter(load, blocks, true)?,
    ];
    let best = bench.best(&scatter)?;
    let can_encode = arena.geometry().dtype == Dtype::Bf16
        && arena.geometry().planes.len() <= PLANES_MAX
        && save.slabs_at_once(arena.geometry()) > 0;
    let encode = if can_encode { bench.encode(save)? } else { 0.0 };
    Ok(Some(Calibration {
        sums: best[1] >= SUMS_MUST_WIN * loads.contiguous,
        scatter: best[0],
        scatter_summed: best[1],
        encode,
        load: loads,
        save: saves,
        ..defaults
    }))
}

/// Something to be timed.
struct Run<'a> {
    bytes: usize,
    /// Put on the stream together.
    in_a_row: usize,
    enqueue: Box<dyn Fn() -> Result<Event> + 'a>,
}

impl<'a> Bench<'a> {
    fn new(shared: &'a Shared, pinned: &'a PinnedArena, arena: &HostArena) -> Option<Self> {
        let geometry = arena.geometry();
        let payload = geometry.payload_bytes();
        let fit = arena.usage().largest_free_bytes.min(SPAN_MAX) / (payload + 8192);
        let mut slots = arena.allocate(payload, fit.min(SLOTS_MAX))?;
        let value_bytes = payload.min(VALUE_BYTES_MAX);
        let image = slots.first_mut()?.image_mut().ok()?;
        like_kv(&mut image[RecordHeader::BYTES..][..value_bytes]);
        let offsets: Vec<u64> = slots
            .iter()
            .filter_map(|slot| slot.writer().slab_offset(LayerId(0)))
            .map(|offset| offset as u64)
            .collect();
        let start = *offsets.first()?;
        let pitch = offsets.get(1)?.checked_sub(start)?;
        let even = (1..)
            .zip(&offsets[1..])
            .take_while(|&(i, &at)| at == start + i * pitch);
        let mut rows = 1 + even.count();
        while crossing(&(start..start + rows as u64 * pitch)).is_some() {
            rows /= 2;
        }
        (rows * payload >= COPY_BYTES_MIN).then_some(Bench {
            shared,
            pinned,
            _slots: slots,
            start,
            pitch: pitch as usize,
            rows,
            layer_bytes: geometry.slab_stride(),
            layers: geometry.layers as usize,
            geometry: geometry.clone(),
            value_bytes,
        })
    }

    fn rates(&self, lane: &Lane, defaults: &Calibration) -> Result<LinkRates> {
        let contiguous = (self.rows * self.pitch).min(COPY_BYTES_MAX);
        let mut widths: Vec<usize> = [1, 2, 4]
            .into_iter()
            .filter(|cuts| self.layer_bytes.is_multiple_of(cuts * 256))
            .map(|cuts| self.layer_bytes / cuts)
            .chain((1..=4).map(|bit| self.layer_bytes << bit))
            .filter(|&width| ROW_BYTES.contains(&width) && width <= self.layer_bytes * self.layers)
            .filter(|&width| width * self.rows >= COPY_BYTES_MIN)
            .collect();
        widths.sort_unstable();
        let mut runs = vec![
            self.copy(lane, contiguous, 1),
            self.kernel(lane, contiguous, defaults.direct_blocks)?,
        ];
        runs.extend(
            widths
                .iter()
                .map(|&width| self.copy(lane, width, self.rows)),
        );
        let best = self.best(&runs)?;
        Ok(LinkRates {
            contiguous: best[0],
            direct: best[1],
            pitched: widths.into_iter().zip(best[2..].iter().copied()).collect(),
            call_us: defaults.load.call_us,
        })
    }

    /// Pitched copies with rows of `row_bytes`.
    fn copy<'b>(&'b self, lane: &'b Lane, row_bytes: usize, rows: usize) -> Run<'b> {
        let rows = rows.min(COPY_BYTES_MAX.min(lane.staging.len()) / row_bytes);
        let host = Place::Host(self.pinned.base() + self.start);
        let device = Place::Device(lane.staging.address());
        let (from, to, from_pitch, to_pitch) = match lane.direction {
            Direction::Load => (host, device, self.pitch, row_bytes),
            Direction::Save => (device, host, row_bytes, self.pitch),
        };
        let rows = Rows {
            row_bytes,
            rows,
            from_pitch,
            to_pitch,
        };
        Run {
            bytes: row_bytes * rows.rows,
            in_a_row: IN_A_ROW,
            enqueue: Box::new(move || {
                // SAFETY: the rows lie in slots that are ours and free, within one pinned segment,
                // and in the lane's staging memory, which nothing uses yet.
                unsafe { copy_rows(&lane.copies[0], from, to, rows)? };
                self.shared.events.record(lane.copies[0].as_stream())
            }),
        }
    }

    /// A kernel over pinned memory, with staging memory as its pages.
    fn kernel<'b>(&'b self, lane: &'b Lane, bytes: usize, blocks: u32) -> Result<Run<'b>> {
        let base = self.pinned.base() + self.start;
        self.move_slabs(lane, base, 0, bytes, blocks, false, IN_A_ROW)
    }

    /// A kernel from one half of staging memory to the other.
    fn scatter<'b>(&'b self, lane: &'b Lane, blocks: u32, sums: bool) -> Result<Run<'b>> {
        let half = lane.staging.len() / 2 / PIECE_BYTES * PIECE_BYTES;
        let bytes = half.min(COPY_BYTES_MAX);
        let base = lane.staging.address();
        self.move_slabs(lane, base, half, bytes, blocks, sums, SHORT_IN_A_ROW)
    }

    /// So many moves of one block each, and their pages, one after the other; behind them, from where the answer
    /// says on, room for sums.
    fn descriptors(
        &self,
        lane: &Lane,
        count: usize,
        block_tokens: u32,
    ) -> Result<(Descriptors, usize)> {
        let mut list = Vec::with_capacity(count * (Move::BYTES + 4) + 4);
        for index in 0..count as u32 {
            let slab = Move {
                token: index * block_tokens,
                moved: 1,
                ..Move::default()
            };
            list.extend_from_slice(&slab.to_bytes());
        }
        for page in 0..count as u32 {
            list.extend_from_slice(&page.to_le_bytes());
        }
        let sums_at = list.len().next_multiple_of(8);
        let bytes = sums_at + count * 8;
        let descriptors = &self.shared.descriptors;
        Ok((descriptors.upload(&list, bytes, &lane.kernels)?, sums_at))
    }

    /// Slabs of `bytes` in all from `base` on go to staging memory from `to` on.
    #[expect(clippy::too_many_arguments)]
    fn move_slabs<'b>(
        &'b self,
        lane: &'b Lane,
        base: u64,
        to: usize,
        bytes: usize,
        blocks: u32,
        sums: bool,
        in_a_row: usize,
    ) -> Result<Run<'b>> {
        let count = bytes / PIECE_BYTES;
        let (descriptors, sums_at) = self.descriptors(lane, count, 1)?;
        let mut job = Job {
            moves: descriptors.address(),
            pages: descriptors.address() + (count * Move::BYTES) as u64,
            sums: match sums {
                true => descriptors.address() + sums_at as u64,
                false => 0,
            },
            slab_base: base,
            slab_step: PIECE_BYTES as u64,
            page_tokens: 1,
            count: count as u32,
            all_moves: count as u32,
            planes: 1,
            slab_bytes: PIECE_BYTES as u32,
            long_runs: 1,
            width: 16,
            ..Job::default()
        };
        job.plane[0] = Plane {
            page_step: PIECE_BYTES as u64,
            token_magic: magic(PIECE_BYTES as u32),
            head_magic: ALWAYS_ZERO,
            token_bytes: PIECE_BYTES as u32,
            ..Plane::default()
        };
        job.page_bases[0][0] = lane.staging.address() + to as u64;
        Ok(Run {
            bytes,
            in_a_row,
            enqueue: Box::new(move || {
                // The closure keeps them.
                let _ = &descriptors;
                // SAFETY: slabs lie in slots that are ours and free, or in the lane's staging
                // memory, as the pages do, which nothing uses yet, and the two do not overlap;
                // everything is a multiple of 256.
                unsafe {
                    self.shared
                        .kernels
                        .launch(&lane.kernels, lane.direction, &job, 1, blocks)?;
                }
                self.shared.events.record(lane.kernels.as_stream())
            }),
        })
    }

    /// GB/s of raw slabs that are encoded on the GPU, out of pages in some staging slots into rows in others:
    /// always a slice of them, whatever the arena's size.
    fn encode(&self, lane: &Lane) -> Result<f64> {
        let (geometry, step) = (&self.geometry, self.geometry.slab_stride());
        let count = lane.slabs_at_once(geometry);
        let (rows, pages) = (lane.slot_address(0), lane.slot_address(ENCODED_SLOTS));
        self.fill(lane, pages, ENCODED_SLOTS * lane.slot_bytes)?;
        let (descriptors, _) = self.descriptors(lane, count, geometry.block_tokens)?;
        let mut job = Job {
            moves: descriptors.address(),
            pages: descriptors.address() + (count * Move::BYTES) as u64,
            page_magic: magic(geometry.block_tokens),
            page_tokens: geometry.block_tokens,
            count: count as u32,
            all_moves: count as u32,
            planes: geometry.planes.len() as u32,
            slab_bytes: geometry.slab_bytes() as u32,
            long_runs: 1,
            ..Job::default()
        };
        let mut bits = 0;
        for (index, shape) in geometry.planes.iter().enumerate().take(PLANES_MAX) {
            let token_bytes = shape.token_bytes();
            let start = geometry.plane_offset(index);
            let page_step = token_bytes * geometry.block_tokens as usize;
            job.plane[index] = Plane {
                page_step: page_step as u64,
                token_step: token_bytes as u64,
                token_magic: magic(token_bytes as u32),
                head_magic: ALWAYS_ZERO,
                slab_start: start as u32,
                token_bytes: token_bytes as u32,
                head_bytes: token_bytes as u32,
                ..Plane::default()
            };
            job.page_bases[0][index] = pages + (start * count) as u64;
            bits |= (start | (start * count) | token_bytes | page_step) as u64;
            if page_step < PIECE as usize || !start.is_multiple_of(PIECE as usize) {
                job.long_runs = 0;
            }
        }
        job.width = vector_for(bits);
        let run = Run {
            bytes: count * geometry.slab_bytes(),
            in_a_row: IN_A_ROW,
            enqueue: Box::new(move || {
                // The closure keeps them.
                let _ = &descriptors;
                let encode = lane.encoder()?.job(geometry, job, step, 0, rows)?;
                // SAFETY: pages and rows are slots of the lane's staging memory, which nothing else uses
                // yet, and all slabs fit into either; all kernels of the lane's encoder run on this stream.
                unsafe {
                    let exp_save = &self.shared.exp_save;
                    exp_save.launch(&lane.kernels, &encode, 1)?;
                }
                self.shared.events.record(lane.kernels.as_stream())
            }),
        };
        Ok(self.best(&[run])?[0])
    }

    /// Brings values like those of KV into `bytes` of staging memory at `to`, over and over.
    fn fill(&self, lane: &Lane, to: u64, bytes: usize) -> Result<()> {
        for start in (0..bytes).step_by(self.value_bytes) {
            let row_bytes = self.value_bytes.min(bytes - start);
            let rows = Rows {
                row_bytes,
                rows: 1,
                from_pitch: row_bytes,
                to_pitch: row_bytes,
            };
            let from = Place::Host(self.pinned.base() + self.start);
            let to = Place::Device(to + start as u64);
            // SAFETY: the first slot is ours, and lies in one pinned segment as all of them do; the
            // staging memory is used by nothing else yet.
            unsafe { copy_rows(&lane.kernels, from, to, rows)? };
        }
        Ok(())
    }

    /// GB/s of each, in its best turn.
    fn best(&self, runs: &[Run<'_>]) -> Result<Vec<f64>> {
        // Once for nothing: the first copy wakes the link.
        if let Some(first) = runs.first() {
            time(first)?;
        }
        let mut best = vec![Duration::MAX; runs.len()];
        for _ in 0..TURNS {
            for (run, best) in runs.iter().zip(&mut best) {
                *best = time(run)?.min(*best);
            }
        }
        let rate = |(run, best): (&Run<'_>, &Duration)| {
            (run.bytes * run.in_a_row) as f64 / best.as_nanos().max(1) as f64
        };
        Ok(runs.iter().zip(&best).map(rate).collect())
    }
}

/// bf16 values with few exponents.
fn like_kv(bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for value in bytes.as_chunks_mut::<2>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let below = ((state >> 32) as u32 | 1 << 20).trailing_zeros();
        let exponent = 121 - u64::from(below) + (state >> 8 & 1);
        *value = ((state & 0x807f) as u16 | (exponent as u16) << 7).to_le_bytes();
    }
}

fn time(run: &Run<'_>) -> Result<Duration> {
    let start = Instant::now();
    for _ in 1..run.in_a_row {
        (run.enqueue)()?;
    }
    let event = (run.enqueue)()?;
    match poll(WAIT_MAX, || event.is_reached())? {
        true => Ok(start.elapsed()),
        false => Err(Error::unavailable("the GPU does not finish a copy")
            .with("bytes", run.bytes)
            .with("seconds", WAIT_MAX.as_secs())),
    }
}
