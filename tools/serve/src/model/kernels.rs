//! The arithmetic of the forward pass, row by row.
//!
//! **Row independence.** What a function here computes for one row (one token of one sequence)
//! depends on that row's inputs alone: every output element is one chain of fused multiply-adds in
//! ascending order of the inner dimension, whatever else is in the batch, however the work is cut
//! into tiles and however many threads share it. Rust never reassociates floating point, and
//! `mul_add` rounds once everywhere, so the bits are the same too. This is what makes logits with and
//! without reused KV bit-equal (`tests/model.rs`).
//!
//! The tiles are sized for sixteen 256-bit registers; the compiler turns the fixed-size arrays into
//! vector registers.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// Columns of one weight panel: two 256-bit registers. Four rows of accumulators, four broadcast inputs and
/// the weights fill fourteen of the sixteen; wider tiles spill.
const PANEL: usize = 16;
/// Inner elements that are unpacked at a time: a panel of this depth stays in the first-level cache.
const DEPTH: usize = 192;

/// `acc[r][c] += Σ_k a[r][k] · b[k][c]`, ascending in k.
#[inline(always)]
pub(super) fn tile4<const W: usize>(acc: &mut [[f32; W]; 4], a: [&[f32]; 4], b: &[[f32; W]]) {
    let mut sums = *acc;
    let [a0, a1, a2, a3] = a;
    for ((((b, &a0), &a1), &a2), &a3) in b.iter().zip(a0).zip(a1).zip(a2).zip(a3) {
        for c in 0..W {
            sums[0][c] = a0.mul_add(b[c], sums[0][c]);
            sums[1][c] = a1.mul_add(b[c], sums[1][c]);
            sums[2][c] = a2.mul_add(b[c], sums[2][c]);
            sums[3][c] = a3.mul_add(b[c], sums[3][c]);
        }
    }
    *acc = sums;
}

/// [`tile4`] for a single row.
#[inline(always)]
pub(super) fn tile1<const W: usize>(acc: &mut [f32; W], a: &[f32], b: &[[f32; W]]) {
    let mut sums = *acc;
    for (b, &a) in b.iter().zip(a) {
        for c in 0..W {
            sums[c] = a.mul_add(b[c], sums[c]);
        }
    }
    *acc = sums;
}

/// A weight matrix `[outputs][inputs]`, packed for [`Linear::apply`]: panels of [`PANEL`] outputs,
/// each `[inputs][PANEL]`, as f16 (half the traffic of f32, which bounds decode).
pub(super) struct Linear {
    inputs: usize,
    outputs: usize,
    panels: Vec<f16>,
}

impl Linear {
    /// Packs row-major `[outputs][inputs]` matrices, stacked along the outputs.
    pub(super) fn pack(inputs: usize, matrices: &[Vec<f32>]) -> Linear {
        let rows: Vec<&[f32]> = matrices
            .iter()
            .flat_map(|matrix| matrix.chunks_exact(inputs))
            .collect();
        let outputs = rows.len();
        let mut panels = vec![f16::ZERO; outputs.div_ceil(PANEL) * PANEL * inputs];
        panels
            .par_chunks_mut(PANEL * inputs)
            .zip(rows.par_chunks(PANEL))
            .for_each(|(panel, rows)| {
                for (c, row) in rows.iter().enumerate() {
                    for (k, &value) in row.iter().enumerate() {
                        panel[k * PANEL + c] = f16::from_f32(value);
                    }
                }
            });
        Linear {
            inputs,
            outputs,
            panels,
        }
    }

    /// Length of an output row.
    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    /// `out[row] = W · x[row]` for every row. `sums` is scratch.
    pub(super) fn apply(&self, x: &[f32], out: &mut Vec<f32>, sums: &mut Vec<f32>) {
        let rows = x.len() / self.inputs;
        let stripe = rows * PANEL;
        sums.clear();
        sums.resize(self.outputs.div_ceil(PANEL) * stripe, 0.0);
        sums.par_chunks_mut(stripe)
            .zip(self.panels.par_chunks(PANEL * self.inputs))
            .with_min_len(4)
            .for_each(|(sums, panel)| panel_product(x, self.inputs, panel, sums));
        out.resize(rows * self.outputs, 0.0);
        out.par_chunks_mut(self.outputs)
            .with_min_len(16)
            .enumerate()
            .for_each(|(row, out)| {
                for (panel, out) in out.chunks_mut(PANEL).enumerate() {
                    let at = panel * stripe + row * PANEL;
                    out.copy_from_slice(&sums[at..at + out.len()]);
                }
            });
    }
}

fn panel_product(x: &[f32], inputs: usize, panel: &[f16], sums: &mut [f32]) {
    let (sums, _) = sums.as_chunks_mut::<PANEL>();
    let mut unpacked = [[0.0; PANEL]; DEPTH];
    for (block, packed) in panel.chunks(DEPTH * PANEL).enumerate() {
        let depth = packed.len() / PANEL;
        let weights = &mut unpacked[..depth];
        packed.convert_to_f32_slice(weights.as_flattened_mut());
        let row = |r: usize| &x[r * inputs + block * DEPTH..][..depth];
        let (fours, rest) = sums.as_chunks_mut::<4>();
        let done = fours.len() * 4;
        for (i, acc) in fours.iter_mut().enumerate() {
            let r = i * 4;
            tile4(acc, [row(r), row(r + 1), row(r + 2), row(r + 3)], weights);
        }
        for (i, acc) in rest.iter_mut().enumerate() {
            tile1(acc, row(done + i), weights);
        }
    }
}

/// e^x to within 2 units in the last place for |x| ≤ 87, clamped to that range; exactly 1 at 0.
///
/// Branch-free, so that a loop over it becomes vector code.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // x = n·ln 2 + r with |r| ≤ ln 2 / 2; ln 2 in two parts, so that r keeps its last bits.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5·2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 87.0);
    let n = x.mul_add(std::f32::consts::LOG2_E, ROUND) - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    // The Taylor series: its next term, r^8/8!, is below half a unit in the last place.
    let mut sum = 1.0 / 5040.0;
    for coefficient in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        sum = r.mul_add(sum, coefficient);
    }
    sum * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// `out = x / rms(x) · weight`, row by row.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut Vec<f32>) {
    const LANES: usize = 16;
    out.resize(x.len(), 0.0);
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let (blocks, rest) = x.as_chunks::<LANES>();
        let mut squares = [0.0f32; LANES];
        for block in blocks {
            for (square, &x) in squares.iter_mut().zip(block) {
                *square = x.mul_add(x, *square);
            }
        }
        for (square, &x) in squares.iter_mut().zip(rest) {
            *square = x.mul_add(x, *square);
        }
        let mean = squares.iter().sum::<f32>() / width as f32;
        let scale = 1.0 / (mean + epsilon).sqrt();
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

/// `out = silu(gate) · up`, where each row of `x` is `gate` followed by `up`.
pub(super) fn gated(x: &[f32], width: usize, out: &mut Vec<f32>) {
    out.resize(x.len() / 2, 0.0);
    out.par_chunks_mut(width)
        .zip(x.par_chunks(2 * width))
        .with_min_len(16)
        .for_each(|(out, x)| {
            let (gate, up) = x.split_at(width);
            for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        });
}

/// `x += y`.
pub(super) fn add(x: &mut [f32], y: &[f32]) {
    for (x, &y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
