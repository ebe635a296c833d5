//! Which slabs lie evenly spaced in the arena. Pure.

use std::ops::Range;

use super::pin::crossing;

/// Slabs that one pitched copy can move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first move's number.
    pub(super) first: usize,
    pub(super) count: usize,
    /// Where the first slab is in the mapping, and from each to the next.
    pub(super) offset: u64,
    pub(super) step: u64,
}

/// Splits `moves` into runs of rows with `row_bytes` at `offsets`; what `skips` says is left out. No
/// run of several rows crosses two pinned segments.
pub(super) fn runs(
    offsets: &[u64],
    moves: Range<usize>,
    row_bytes: u64,
    skips: impl Fn(usize) -> bool,
) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for index in moves {
        if skips(index) {
            continue;
        }
        let offset = offsets[index];
        if let Some(run) = runs.last_mut() {
            let step = match run.count {
                1 => offset.wrapping_sub(run.offset),
                _ => run.step,
            };
            let follows = run.first + run.count == index
                && (row_bytes..1 << 30).contains(&step)
                && run.offset + step * run.count as u64 == offset
                && crossing(&(run.offset..offset + row_bytes)).is_none();
            if follows {
                run.step = step;
                run.count += 1;
                continue;
            }
        }
        runs.push(Run {
            first: index,
            count: 1,
            offset,
            step: row_bytes,
        });
    }
    runs
}

/// Shown: what belongs to one pitched copy and what does not.
#[cfg(test)]
mod tests {
    use super::*;

    fn shape(offsets: &[u64]) -> Vec<(usize, usize, u64)> {
        let runs = runs(offsets, 0..offsets.len(), 64, |_| false);
        runs.iter()
            .map(|run| (run.first, run.count, run.step))
            .collect()
    }

    #[test]
    fn evenly_spaced_slabs_are_one_run_and_others_are_not() {
        assert_eq!(shape(&[0, 100, 200]), [(0, 3, 100)]);
        assert_eq!(shape(&[0, 100, 250, 400]), [(0, 2, 100), (2, 2, 150)]);
        assert_eq!(shape(&[200, 100, 0]), [(0, 1, 64), (1, 1, 64), (2, 1, 64)]);
        assert_eq!(shape(&[0, 63]), [(0, 1, 64), (1, 1, 64)]);
    }

    #[test]
    fn a_run_ends_where_a_move_is_left_out() {
        let runs = runs(&[0, 100, 200, 300], 0..4, 64, |index| index == 1);
        assert_eq!(runs.len(), 2);
        assert_eq!((runs[1].first, runs[1].count), (2, 2));
    }

    #[test]
    fn a_run_ends_where_a_pinned_segment_ends() {
        let at = (1 << 30) - 128;
        assert_eq!(
            shape(&[at, at + 100, at + 200]),
            [(0, 1, 64), (1, 1, 64), (2, 1, 64)]
        );
        assert_eq!(shape(&[at, at + 128, at + 256]), [(0, 1, 64), (1, 2, 128)]);
    }
}
