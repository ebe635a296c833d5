//! Causal attention over paged bf16 KV, computed tile by tile with a running softmax.
//!
//! A tile holds the query rows (query × head of the group) that share one KV head, as vector lanes;
//! it walks the keys in blocks of [`KEYS`] that start at absolute multiples of [`KEYS`] from the
//! prompt's first token. Every lane does the same steps whatever its neighbours are, so the result
//! for a query does not depend on what else is computed with it (see [`super::kernels`]):
//! a block that is masked for one lane and needed by another changes the first by nothing, as its
//! weights there are exactly 0 and its rescaling factor exactly 1.

use rayon::prelude::*;
use stemkv_store::PageId;

use super::kernels::{exp, tile4};

/// Keys of one block.
const KEYS: usize = 64;
/// Width of one register tile.
const WIDTH: usize = 16;
/// Lanes of a tile in prefill, and in decode, where few query rows share a head.
const LANES_MANY: usize = 48;
const LANES_FEW: usize = 16;

/// Sizes that every layer shares.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    /// Query heads.
    pub(super) query: usize,
    /// KV heads.
    pub(super) kv: usize,
    /// Elements of one head, a multiple of 16.
    pub(super) dim: usize,
}

impl Heads {
    fn group(&self) -> usize {
        self.query / self.kv
    }
}

/// One layer's K and V of one sequence.
#[derive(Clone, Copy)]
pub(super) struct Kv<'a> {
    /// The planes whole: `[page][token][KV head][element]`, bf16.
    pub(super) keys: &'a [u8],
    pub(super) values: &'a [u8],
    /// Token `t` is in `pages[t / page_tokens]`.
    pub(super) pages: &'a [PageId],
    pub(super) page_tokens: usize,
}

/// Queries of one sequence.
pub(super) struct Queries<'a> {
    /// `[query][head][element]`, rotated and scaled.
    pub(super) rows: &'a [f32],
    /// Position of the first query; the others follow.
    pub(super) start: usize,
    pub(super) kv: Kv<'a>,
}

/// Attends for several sequences. `out` has their query rows one after the other.
pub(super) fn attend(heads: Heads, sequences: &[Queries<'_>], out: &mut [f32]) {
    let row_width = heads.query * heads.dim;
    let mut tasks = Vec::new();
    let mut out_row = 0;
    for sequence in sequences {
        let queries = sequence.rows.len() / row_width;
        for kv_head in 0..heads.kv {
            let lanes = queries * heads.group();
            for first in (0..lanes).step_by(LANES_MANY) {
                tasks.push(Task {
                    heads,
                    sequence,
                    kv_head,
                    first,
                    lanes: LANES_MANY.min(lanes - first),
                    out_row,
                });
            }
        }
        out_row += queries;
    }
    let tiles: Vec<Vec<f32>> = tasks
        .par_iter()
        .map(|task| {
            if task.lanes <= LANES_FEW {
                task.run::<LANES_FEW>()
            } else {
                task.run::<LANES_MANY>()
            }
        })
        .collect();
    for (task, tile) in tasks.iter().zip(&tiles) {
        for (lane, values) in tile.chunks_exact(heads.dim).enumerate() {
            let (query, head) = task.query_head(lane);
            let at = (task.out_row + query) * row_width + head * heads.dim;
            out[at..at + heads.dim].copy_from_slice(values);
        }
    }
}

/// Some query rows of one sequence that share a KV head.
struct Task<'a> {
    heads: Heads,
    sequence: &'a Queries<'a>,
    kv_head: usize,
    /// The first row, counted in queries × heads of the group.
    first: usize,
    lanes: usize,
    /// The sequence's first row in the output.
    out_row: usize,
}

impl Task<'_> {
    /// The query (within the sequence's queries) and the head of a lane.
    fn query_head(&self, lane: usize) -> (usize, usize) {
        let group = self.heads.group();
        let row = self.first + lane;
        (row / group, self.kv_head * group + row % group)
    }

    /// `[lane][element]`.
    fn run<const LANES: usize>(&self) -> Vec<f32> {
        let dim = self.heads.dim;
        let row_width = self.heads.query * dim;
        // Queries as `[lanes / WIDTH][element][WIDTH]`.
        let mut queries = vec![[0.0f32; WIDTH]; LANES / WIDTH * dim];
        let mut positions = [0i32; LANES];
        for (lane, position) in positions.iter_mut().enumerate().take(self.lanes) {
            let (query, head) = self.query_head(lane);
            *position = (self.sequence.start + query) as i32;
            let row = &self.sequence.rows[query * row_width + head * dim..][..dim];
            let panel = &mut queries[lane / WIDTH * dim..][..dim];
            for (slot, &value) in panel.iter_mut().zip(row) {
                slot[lane % WIDTH] = value;
            }
        }
        let first_position = positions[0];
        let last_position = positions[self.lanes - 1];
        positions[self.lanes..].fill(last_position);

        let mut state = Softmax::<LANES>::new(dim);
        let mut keys = vec![0.0f32; KEYS * dim];
        let mut values = vec![[0.0f32; WIDTH]; KEYS * dim / WIDTH];
        let mut scores = [[0.0f32; LANES]; KEYS];
        for block in (0..=last_position as usize).step_by(KEYS) {
            let limit = KEYS.min(last_position as usize + 1 - block);
            self.unpack(block, limit, &mut keys, &mut values);
            for (panel, queries) in queries.chunks_exact(dim).enumerate() {
                for (four, scores) in scores.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let mut acc = [[0.0; WIDTH]; 4];
                    let key = |k: usize| &keys[(four * 4 + k) * dim..][..dim];
                    tile4(&mut acc, [key(0), key(1), key(2), key(3)], queries);
                    for (scores, acc) in scores.iter_mut().zip(&acc) {
                        scores[panel * WIDTH..][..WIDTH].copy_from_slice(acc);
                    }
                }
            }
            let masked = block + KEYS > first_position as usize + 1;
            state.add(
                &mut scores,
                masked.then_some((&positions, block as i32)),
                &values,
                self.lanes,
            );
        }
        state.finish(self.lanes)
    }

    /// Reads keys `block..block + limit` as `[key][element]` and their values as
    /// `[element / WIDTH][key][WIDTH]`. What lies beyond may be stale and is not read: an earlier
    /// block's keys stay there, which every lane masks.
    fn unpack(&self, block: usize, limit: usize, keys: &mut [f32], values: &mut [[f32; WIDTH]]) {
        let kv = &self.sequence.kv;
        let head_bytes = self.heads.dim * 2;
        let token_bytes = self.heads.kv * head_bytes;
        for key in 0..limit {
            let token = block + key;
            let page = kv.pages[token / kv.page_tokens].0 as usize;
            let at = (page * kv.page_tokens + token % kv.page_tokens) * token_bytes
                + self.kv_head * head_bytes;
            let out = &mut keys[key * self.heads.dim..][..self.heads.dim];
            widen(&kv.keys[at..at + head_bytes], out);
            let packed = &kv.values[at..at + head_bytes];
            for (panel, packed) in packed.chunks_exact(2 * WIDTH).enumerate() {
                widen(packed, &mut values[panel * KEYS + key]);
            }
        }
    }
}

fn widen(packed: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(packed.as_chunks::<2>().0) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}

/// The running softmax of a tile.
struct Softmax<const LANES: usize> {
    dim: usize,
    /// Largest score so far.
    max: [f32; LANES],
    /// Sum of weights, relative to `max`.
    sum: [f32; LANES],
    /// Weighted values, relative to `max`: `[element / WIDTH][lane][WIDTH]`.
    out: Vec<[f32; WIDTH]>,
}

impl<const LANES: usize> Softmax<LANES> {
    fn new(dim: usize) -> Self {
        Softmax {
            dim,
            max: [f32::NEG_INFINITY; LANES],
            sum: [0.0; LANES],
            out: vec![[0.0; WIDTH]; LANES * dim / WIDTH],
        }
    }

    /// Adds one block. `mask` is the position of each lane and of the block's first key, for blocks
    /// that are not visible whole; every lane sees the prompt's first key.
    fn add(
        &mut self,
        scores: &mut [[f32; LANES]; KEYS],
        mask: Option<(&[i32; LANES], i32)>,
        values: &[[f32; WIDTH]],
        lanes: usize,
    ) {
        if let Some((positions, first)) = mask {
            for (key, scores) in (first..).zip(scores.iter_mut()) {
                for (score, &position) in scores.iter_mut().zip(positions) {
                    *score = if key <= position {
                        *score
                    } else {
                        f32::NEG_INFINITY
                    };
                }
            }
        }
        let mut max = self.max;
        for scores in scores.iter() {
            for (max, &score) in max.iter_mut().zip(scores) {
                *max = if score > *max { score } else { *max };
            }
        }
        let mut rescale = [0.0f32; LANES];
        for l in 0..LANES {
            rescale[l] = exp(self.max[l] - max[l]);
            self.sum[l] *= rescale[l];
        }
        self.max = max;
        let mut sum = self.sum;
        for scores in scores.iter_mut() {
            for l in 0..LANES {
                let weight = exp(scores[l] - max[l]);
                // `exp` is clamped; a masked key must weigh nothing at all.
                let weight = if scores[l] == f32::NEG_INFINITY {
                    0.0
                } else {
                    weight
                };
                scores[l] = weight;
                sum[l] += weight;
            }
        }
        self.sum = sum;
        for (out, values) in self
            .out
            .chunks_exact_mut(LANES)
            .zip(values.chunks_exact(KEYS))
        {
            for (four, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                if four * 4 < lanes {
                    weigh(out, scores, four * 4, &rescale, values);
                }
            }
        }
    }

    /// `[lane][element]`. Adding 0 makes −0 and +0 the same bits: masked keys may change the sign
    /// of a zero, and of nothing else.
    fn finish(self, lanes: usize) -> Vec<f32> {
        let mut rows = vec![0.0; lanes * self.dim];
        for (lane, row) in rows.chunks_exact_mut(self.dim).enumerate() {
            for (panel, row) in row.chunks_exact_mut(WIDTH).enumerate() {
                let out = &self.out[panel * LANES + lane];
                for (row, &out) in row.iter_mut().zip(out) {
                    *row = out / self.sum[lane] + 0.0;
                }
            }
        }
        rows
    }
}

/// `out[r] = out[r] · rescale[lane + r] + Σ_key weights[key][lane + r] · values[key]`, ascending.
#[inline(always)]
fn weigh<const LANES: usize>(
    out: &mut [[f32; WIDTH]; 4],
    weights: &[[f32; LANES]; KEYS],
    lane: usize,
    rescale: &[f32; LANES],
    values: &[[f32; WIDTH]],
) {
    let mut sums = *out;
    for (sums, rescale) in sums.iter_mut().zip(&rescale[lane..lane + 4]) {
        for sum in sums {
            *sum *= rescale;
        }
    }
    for (weights, value) in weights.iter().zip(values) {
        let weights: &[f32; 4] = weights[lane..lane + 4]
            .try_into()
            .expect("the slice has four lanes");
        for c in 0..WIDTH {
            sums[0][c] = weights[0].mul_add(value[c], sums[0][c]);
            sums[1][c] = weights[1].mul_add(value[c], sums[1][c]);
            sums[2][c] = weights[2].mul_add(value[c], sums[2][c]);
            sums[3][c] = weights[3].mul_add(value[c], sums[3][c]);
        }
    }
    *out = sums;
}
