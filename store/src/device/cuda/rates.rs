//! What was measured of the link, and which way of copying follows from it. Pure.

use serde::{Deserialize, Serialize};

/// How fast each way of copying is on this machine, as measured when the arena was attached. Rates
/// are in GB/s (10⁹ bytes).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Host slots → GPU.
    pub load: LinkRates,
    /// GPU → host slots.
    pub save: LinkRates,
    /// Bytes of one DMA slice; one slice is under way at a time.
    pub slice_bytes: usize,
    /// DMA slices that are put on the link ahead, each behind the one before.
    pub ahead: usize,
    /// Blocks of a kernel that reads or writes pinned memory.
    pub direct_blocks: u32,
    /// Blocks of a kernel between staging memory and pages. Many: the engine's next kernel waits for it,
    /// so what counts is that it is over soon (docs/benchmarks.md).
    pub staging_blocks: u32,
    /// Such a kernel's rate on the GPU alone, without and with sums.
    pub scatter: f64,
    /// See `scatter`.
    pub scatter_summed: f64,
    /// The rate at which it encodes raw slabs of the arena's geometry with `exp`; 0 where it cannot.
    pub encode: f64,
    /// Are slabs summed on the GPU? Yes, where that is several times as fast as the link. Where not, encoded slabs
    /// of a load are still checked for their form.
    pub sums: bool,
}

/// Encoding must be this much faster than the link, since it takes the GPU from the engine for that part of the
/// time: on an H100, where it goes at 640 to 830 GB/s, saves are 1.1 to 1.3 times as fast as raw ones.
const ENCODE_MUST_WIN: f64 = 5.0;

impl Calibration {
    /// Is a save that encodes faster than a raw one?
    pub(super) fn encodes(&self) -> bool {
        self.encode >= ENCODE_MUST_WIN * self.save.contiguous
    }
}

/// A calibration with what it holds for.
#[derive(Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) device: String,
    /// Of the one GPU among several of that name.
    pub(super) uuid: String,
    pub(super) driver: i32,
    pub(super) calibration: Calibration,
}

/// The rates of one direction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkRates {
    /// One contiguous copy: the ceiling.
    pub contiguous: f64,
    /// A kernel that reads or writes pinned memory itself.
    pub direct: f64,
    /// Pitched copies over consecutive slots: bytes of a row, rate. Ascending.
    pub pitched: Vec<(usize, f64)>,
    /// What each copy call costs besides, in microseconds.
    pub call_us: f64,
}

impl Default for Calibration {
    /// Typical of PCIe 5: for an arena that is too small to measure with.
    fn default() -> Self {
        let pitched = [
            (4 << 10, 31.0),
            (16 << 10, 47.0),
            (32 << 10, 53.0),
            (64 << 10, 46.0),
            (128 << 10, 53.0),
        ];
        let rates = |direct| LinkRates {
            contiguous: 54.5,
            direct,
            pitched: pitched.to_vec(),
            call_us: 4.0,
        };
        Calibration {
            load: rates(51.0),
            save: rates(52.0),
            slice_bytes: 16 << 20,
            ahead: 3,
            direct_blocks: 8,
            staging_blocks: 256,
            scatter: 1400.0,
            scatter_summed: 1400.0,
            encode: 440.0,
            sums: true,
        }
    }
}

/// How one layer, or several at once, is copied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Way {
    /// DMA between slots and staging, each row cut into `cuts` equal parts that are copied by a
    /// call each; a kernel between staging and pages.
    Staged { cuts: usize },
    /// A kernel between pinned memory and pages.
    Direct,
}

/// What is to be copied: `rows` rows of `row_bytes`, in `runs` runs that are evenly spaced.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) row_bytes: usize,
    pub(super) rows: usize,
    pub(super) runs: usize,
}

/// A kernel over pinned memory takes multiprocessors from the engine's own kernels (see
/// docs/benchmarks.md), a DMA copy does not: it must be this much faster to be preferred.
const DIRECT_MUST_WIN: f64 = 1.25;

/// Rows as long as this go at full speed also while the engine's kernels keep the GPU's memory busy;
/// shorter ones lose up to a fifth (see docs/benchmarks.md).
pub(super) const ROW_BYTES_BUSY: usize = 256 << 10;

/// What encoded saves bring in a row, at least: twice as long rows make them 2 % faster, though copies alone are as
/// fast with either (see docs/benchmarks.md).
pub(super) const ROW_BYTES_ENCODED: usize = 512 << 10;

/// Rates as near as this to the best are as good: what was measured is no more exact than that, and of
/// equals the first one, with the fewest copies, is to be taken every time.
const NEAR_BEST: f64 = 0.97;

/// Rows are cut into this many parts at most.
const CUTS: [usize; 3] = [1, 2, 4];

impl LinkRates {
    /// The rate of pitched copies with rows of `bytes`, between the two nearest measured ones.
    fn pitched_rate(&self, bytes: usize) -> f64 {
        let after = self.pitched.partition_point(|&(row, _)| row < bytes);
        let at = |index: usize| self.pitched.get(index).copied();
        match (after.checked_sub(1).and_then(at), at(after)) {
            (Some((low, slow)), Some((high, fast))) => {
                let share = (bytes as f64 / low as f64).ln() / (high as f64 / low as f64).ln();
                slow + (fast - slow) * share
            }
            (None, Some((row, rate))) => rate * bytes as f64 / row as f64,
            (Some((_, rate)), None) => rate,
            (None, None) => self.contiguous,
        }
    }

    /// Microseconds of the best staged copy, and its cuts.
    fn staged(&self, load: Load) -> (f64, usize) {
        let bytes = (load.row_bytes * load.rows) as f64;
        let single = load.rows <= load.runs;
        let time = |cuts: usize| {
            let rate = match single {
                true => self.contiguous,
                false => self.pitched_rate(load.row_bytes / cuts),
            };
            bytes / rate / 1e3 + self.call_us * (load.runs * cuts) as f64
        };
        let times = CUTS
            .into_iter()
            .filter(|&cuts| cuts == 1 || !single && load.row_bytes.is_multiple_of(cuts * 256))
            .map(|cuts| (time(cuts), cuts));
        let best = times.clone().map(|(time, _)| time).fold(f64::MAX, f64::min);
        times
            .into_iter()
            .find(|&(time, _)| time <= best / NEAR_BEST)
            .unwrap_or((best, 1))
    }

    pub(super) fn choose(&self, load: Load) -> Way {
        let (staged, cuts) = self.staged(load);
        let direct = (load.row_bytes * load.rows) as f64 / self.direct / 1e3 + self.call_us;
        match direct * DIRECT_MUST_WIN < staged {
            true => Way::Direct,
            false => Way::Staged { cuts },
        }
    }

    /// How many layers of `layer_bytes` in each of `rows` consecutive slots to copy at once: the
    /// fewest that are near the best rate, fill a slice and make rows of `row_bytes_min`, as far as
    /// `layers_max` go.
    pub(super) fn layers_at_once(
        &self,
        layer_bytes: usize,
        rows: usize,
        row_bytes_min: usize,
        slice_bytes: usize,
        layers_max: usize,
    ) -> usize {
        let rate = |layers: usize| {
            let load = Load {
                row_bytes: layer_bytes * layers,
                rows,
                runs: 1,
            };
            (load.row_bytes * load.rows) as f64 / self.staged(load).0
        };
        let powers = || (0..).map(|bit| 1 << bit);
        let sizes = || powers().take_while(|&n| n < layers_max).chain([layers_max]);
        let best = sizes().map(rate).fold(0.0, f64::max);
        sizes()
            .find(|&layers| {
                let row_bytes = layers * layer_bytes;
                rate(layers) >= NEAR_BEST * best
                    && row_bytes * rows >= slice_bytes / 2
                    && row_bytes >= row_bytes_min
            })
            .or(sizes().last())
            .unwrap_or(1)
    }
}

/// Shown: the choices that the measured tables ask for.
#[cfg(test)]
mod tests {
    use super::*;

    fn rates() -> LinkRates {
        Calibration::default().load
    }

    #[test]
    fn consecutive_slots_go_by_dma_and_scattered_small_rows_by_kernel() {
        let load = |row_bytes, runs| Load {
            row_bytes,
            rows: 512,
            runs,
        };
        assert_eq!(rates().choose(load(32 << 10, 2)), Way::Staged { cuts: 1 });
        assert_eq!(rates().choose(load(8 << 10, 512)), Way::Direct);
        assert_eq!(rates().choose(load(4 << 20, 512)), Way::Staged { cuts: 1 });
    }

    #[test]
    fn rows_are_cut_where_shorter_ones_are_faster() {
        let load = Load {
            row_bytes: 64 << 10,
            rows: 256,
            runs: 1,
        };
        assert_eq!(rates().choose(load), Way::Staged { cuts: 2 });
    }

    /// What two measurements of one machine saw, a few percent apart, leads to one choice.
    #[test]
    fn noise_does_not_change_what_is_chosen() {
        let with = |row_256k: f64, row_512k: f64| LinkRates {
            pitched: vec![
                (64 << 10, 46.0),
                (128 << 10, 53.0),
                (256 << 10, row_256k),
                (512 << 10, row_512k),
            ],
            ..rates()
        };
        let load = Load {
            row_bytes: 256 << 10,
            rows: 64,
            runs: 1,
        };
        for rates in [with(53.9, 52.8), with(52.8, 53.9)] {
            assert_eq!(
                rates.layers_at_once(64 << 10, 2048, ROW_BYTES_BUSY, 16 << 20, 16),
                4
            );
            assert_eq!(rates.choose(load), Way::Staged { cuts: 1 });
        }
        let slow = with(45.0, 53.9);
        assert_eq!(
            slow.layers_at_once(64 << 10, 2048, ROW_BYTES_BUSY, 16 << 20, 16),
            4,
            "cut in two"
        );
        assert_eq!(slow.choose(load), Way::Staged { cuts: 2 });
    }

    #[test]
    fn thin_layers_are_copied_together() {
        let of_rows = |layer_bytes, rows, row_bytes| {
            rates().layers_at_once(layer_bytes, rows, row_bytes, 16 << 20, 16)
        };
        let at_once = |layer_bytes, rows| of_rows(layer_bytes, rows, ROW_BYTES_BUSY);
        assert_eq!(at_once(512 << 10, 2048), 1);
        assert_eq!(at_once(64 << 10, 2048), 4);
        assert_eq!(at_once(8 << 10, 2048), 16);
        assert_eq!(at_once(64 << 10, 1), 16);
        assert_eq!(at_once(48 << 10, 2048), 8);
        assert_eq!(of_rows(48 << 10, 2048, ROW_BYTES_ENCODED), 16);
        let all = rates().layers_at_once(24 << 10, 2048, ROW_BYTES_ENCODED, 16 << 20, 28);
        assert_eq!(all, 28, "no power of two makes such rows");
    }

    #[test]
    fn rates_between_two_measured_rows_lie_between_them() {
        let rate = rates().pitched_rate(24 << 10);
        assert!((47.0..53.0).contains(&rate), "{rate}");
        assert!(rates().pitched_rate(1 << 10) < 31.0);
        assert_eq!(rates().pitched_rate(1 << 20), 53.0);
    }
}
