//! What the writer declined, until there is room for it.
//!
//! A run is a prefix's hashes and which of its blocks were declined. Nothing is pinned for one: what is
//! evicted from RAM meanwhile is not written. When nothing else is written the oldest runs are taken up, one lot
//! at a time: those of their chunks that are still in RAM and not on disk are pinned, and written as any others are,
//! ancestors first. Only records that were used before them go for them, so that nothing is written and evicted
//! in turns.
//!
//! After something was not written there is a pause, twice as long each time; after [`FAILURES_MAX`] in a row
//! nothing more is tried before a batch of somebody's save is written, which shows that there is room again.
//! A run that fails although others are written is given up at its third time.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use stemkv_store::Slot;

use super::taken::Taken;
use super::{Answer, WriteItem, resume};
use crate::pipeline::{DiskSide, HashedPath, Shared};

/// Hashes of all runs at most, 8 MiB of them: the oldest runs go first.
const HASHES_MAX: usize = 1 << 18;

/// How often something may fail in a row, and the pauses after it: about two minutes in all.
const FAILURES_MAX: u32 = 8;
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(64);

/// Runs that are looked at for one lot: the store's thread has other things to do too.
const LOOKS_MAX: usize = 256;

/// How often a run may fail although others are written.
const STRIKES: u32 = 3;

/// Blocks of one prefix that are in RAM alone.
pub(super) struct Run {
    path: HashedPath,
    /// Those that have a record by now are left out.
    positions: Range<usize>,
    strikes: u32,
}

impl Run {
    /// The run of some chunks, ascending; `None` where there are none.
    pub(super) fn of(path: &HashedPath, chunks: &[(usize, Slot)]) -> Option<Run> {
        let ((first, _), (last, _)) = (chunks.first()?, chunks.last()?);
        Some(Run {
            path: path.clone(),
            positions: *first..last + 1,
            strikes: 0,
        })
    }

    /// Pins up to `most` chunks of it that are in RAM and have no record, and says which blocks of it are
    /// behind them. `None` where none is left.
    fn pin(&self, shared: &Shared, most: usize) -> Option<(WriteItem, Range<usize>)> {
        let Range { start, end } = self.positions;
        let keys = &self.path.keys[..end];
        let pin = shared
            .index
            .pin_to_move(&self.path.root, keys, self.path.flat);
        let there = end.min(pin.blocks());
        if start >= there {
            return None;
        }
        let mut chunks = Vec::new();
        let mut rest = there..there;
        for (position, state) in (start..).zip(pin.states(start..there)) {
            if state.record.is_some() {
                continue;
            }
            let slot = state.host.and_then(|id| shared.slot(id, &state.key));
            match slot {
                Some(_) if chunks.len() == most => {
                    rest = position..end;
                    break;
                }
                Some(slot) => chunks.push((position, slot)),
                None if self.path.flat => {}
                // Nothing is written behind a gap.
                None => break,
            }
        }
        let blocks = chunks.len();
        let item = WriteItem {
            pin: Arc::new(pin),
            path: self.path.clone(),
            chunks,
            answer: Answer::nobody(blocks),
        };
        (blocks > 0).then_some((item, rest))
    }
}

/// The runs, the oldest first, and when they may be taken up.
#[derive(Default)]
pub(super) struct Declined {
    runs: VecDeque<Run>,
    hashes: usize,
    /// A lot is under way.
    pub(super) is_trying: bool,
    /// Since a batch was last written: lots that failed, and one for saves before the first of them.
    failures: u32,
    is_pausing: bool,
    /// The pause is over.
    is_due: bool,
}

impl Declined {
    /// Notes the run of a new save behind the others.
    pub(super) fn add(&mut self, run: Run) {
        self.hashes += run.path.keys.len();
        self.runs.push_back(run);
        while self.hashes > HASHES_MAX {
            self.take();
        }
    }

    /// Notes a run of a save that others may have been noted of, as one with them.
    fn add_again(&mut self, mut run: Run) {
        let is_same = |other: &Run| Arc::ptr_eq(&other.path.keys, &run.path.keys);
        if let Some(other) = self.runs.iter().position(is_same)
            && let Some(other) = self.runs.remove(other)
        {
            self.hashes -= other.path.keys.len();
            let (one, two) = (&run.positions, &other.positions);
            run.positions = one.start.min(two.start)..one.end.max(two.end);
            run.strikes = run.strikes.max(other.strikes);
        }
        self.add(run);
    }

    fn take(&mut self) -> Option<Run> {
        let run = self.runs.pop_front()?;
        self.hashes -= run.path.keys.len();
        Some(run)
    }

    fn put_back(&mut self, run: Run) {
        self.hashes += run.path.keys.len();
        self.runs.push_front(run);
    }

    pub(super) fn may_be_taken_up(&self) -> bool {
        !self.runs.is_empty() && !self.is_trying && (self.failures == 0 || self.is_due)
    }

    /// A batch was written.
    pub(super) fn written(&mut self) {
        (self.failures, self.is_due) = (0, false);
    }

    /// Of these runs something was to be written with a save, and was not.
    pub(super) fn save_failed(&mut self, failed: Vec<Run>) {
        self.failures = self.failures.max(1);
        failed.into_iter().for_each(|run| self.add_again(run));
    }

    /// A lot has ended, and of these runs something was not written.
    pub(super) fn lot_ended(&mut self, failed: Vec<Run>) {
        self.is_trying = false;
        if failed.is_empty() {
            return;
        }
        // Where nothing else is written either it is the disk's fault.
        let strikes = u32::from(self.failures == 0);
        self.failures += 1;
        for run in failed {
            let strikes = run.strikes + strikes;
            if strikes < STRIKES {
                self.add_again(Run { strikes, ..run });
            }
        }
    }

    /// The pause to begin now, where there is something to wait for.
    pub(super) fn pause(&mut self) -> Option<Duration> {
        let waits = !self.runs.is_empty() && !self.is_trying && !self.is_pausing && !self.is_due;
        if !waits || !(1..FAILURES_MAX).contains(&self.failures) {
            return None;
        }
        self.is_pausing = true;
        Some((PAUSE_FIRST * 2_u32.pow(self.failures - 1)).min(PAUSE_MAX))
    }

    /// Forgets all runs.
    pub(super) fn clear(&mut self) {
        *self = Declined {
            is_trying: self.is_trying,
            ..Declined::default()
        };
    }
}

/// The lot of a writer that was just marked as trying; `None` where of the runs it looked at nothing is left
/// to write.
pub(super) fn take_up(shared: &Arc<Shared>, disk: &DiskSide) -> Option<Taken> {
    // Whatever happens from here on, another lot may come once this is dropped.
    let mut lot = Taken::lot(shared);
    let state = || disk.writer.state();
    state().declined.is_due = false;
    // Half of the queue stays for saves.
    let bytes = disk.config.batch_bytes.min(disk.config.queue_bytes / 2);
    let mut most = (bytes / shared.config.image_bytes()).max(1) as usize;
    for _ in 0..LOOKS_MAX {
        if most == 0 {
            break;
        }
        let run = state().declined.take();
        let Some(mut run) = run else { break };
        let Some((item, rest)) = run.pin(shared, most) else {
            continue;
        };
        most -= item.chunks.len();
        if !rest.is_empty() {
            state().declined.put_back(Run {
                path: run.path.clone(),
                positions: rest.clone(),
                ..run
            });
            run.positions.end = rest.start;
        }
        lot.push(disk, item, run);
    }
    (!lot.items.is_empty()).then_some(lot)
}

/// Takes up what was declined after a pause, where the store is still there. Where the disk is being left
/// alone then, that is a failure too.
pub(super) fn resume_after(shared: &Arc<Shared>, pause: Duration) {
    let store = Arc::downgrade(shared);
    shared.tasks.after(pause, move || {
        let Some(shared) = store.upgrade() else {
            return;
        };
        let Some(disk) = &shared.disk else { return };
        let pause = {
            let mut state = disk.writer.state();
            state.declined.is_pausing = false;
            match disk.writes.is_paused(shared.clock.now()) {
                true => state.declined.failures += 1,
                false => state.declined.is_due = true,
            }
            state.declined.pause()
        };
        match pause {
            Some(pause) => resume_after(&shared, pause),
            None => resume(&shared, disk),
        }
    });
}

#[cfg(test)]
mod tests {
    use stemkv_store::Key;

    use super::*;

    fn run(path: &HashedPath, positions: Range<usize>) -> Run {
        Run {
            path: path.clone(),
            positions,
            strikes: 0,
        }
    }

    fn path(blocks: usize) -> HashedPath {
        HashedPath {
            root: Key([1; 32]),
            flat: false,
            keys: vec![Key([2; 32]); blocks].into(),
        }
    }

    #[test]
    fn the_oldest_runs_go_where_there_are_too_many_hashes() {
        let mut declined = Declined::default();
        for start in 0..5 {
            declined.add(run(&path(HASHES_MAX / 4), start..start + 1));
        }
        assert_eq!((declined.runs.len(), declined.hashes), (4, HASHES_MAX));
        assert_eq!(declined.take().map(|run| run.positions), Some(1..2));
        declined.add(run(&path(HASHES_MAX + 1), 0..1));
        assert_eq!((declined.runs.len(), declined.hashes), (0, 0));
    }

    #[test]
    fn what_is_declined_of_one_save_is_one_run_and_goes_behind_the_others() {
        let mut declined = Declined::default();
        let (one, two) = (path(8), path(8));
        declined.add(run(&one, 4..6));
        declined.add(run(&two, 0..8));
        declined.save_failed(vec![run(&one, 0..4)]);
        assert_eq!(declined.hashes, 16);
        let positions: Vec<_> = declined.runs.iter().map(|run| &run.positions).collect();
        assert_eq!(positions, [&(0..8), &(0..6)]);
    }

    /// Whoever's fault it is: the disk's, or the run's.
    #[test]
    fn a_run_that_fails_although_others_are_written_is_given_up_and_one_on_a_failing_disk_is_not() {
        let (mut declined, path) = (Declined::default(), path(8));
        let mut pauses = Vec::new();
        declined.save_failed(vec![run(&path, 0..8)]);
        while let Some(pause) = declined.pause() {
            pauses.push(pause.as_secs());
            declined.is_pausing = false;
            let failed = declined.take().into_iter().collect();
            declined.lot_ended(failed);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64]);
        assert!(!declined.may_be_taken_up());
        for strike in 1..=STRIKES {
            declined.written();
            assert!(declined.may_be_taken_up(), "{strike}");
            let failed = declined.take().into_iter().collect();
            declined.lot_ended(failed);
        }
        assert!(declined.runs.is_empty());
    }
}
