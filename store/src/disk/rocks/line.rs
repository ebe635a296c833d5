//! The line of writes: batches, of one file or several, are written side by side and become durable in the
//! order in which their calls began, as many at once as are ready.
//!
//! Whoever finds the head of the line ready and nobody at it commits all that is ready there, for
//! itself and for those behind it; the others wait for their answer. So while one group is being
//! synced the next one gathers.

use super::*;
use std::time::Instant;

/// One batch that is being written: its place in line, and its files' places and bytes. Dropped, it is given
/// up.
pub(super) struct Turn<'a> {
    disk: &'a RocksDisk,
    pub(super) number: u64,
    pub(super) files: Vec<NewFile>,
    reserved_bytes: u64,
    /// The turn without whose file this one must not be there.
    after: Option<u64>,
    answered: bool,
}

/// A file to write.
#[derive(Clone, Copy)]
pub(super) struct NewFile {
    pub(super) first: u64,
    pub(super) records: usize,
    /// The most that it takes.
    pub(super) reserved_bytes: u64,
}

/// A file that was written and waits for its turn.
pub(super) struct WrittenFile {
    pub(super) first: u64,
    pub(super) path: PathBuf,
    pub(super) entries: Vec<DirectoryEntry>,
    pub(super) disk_bytes: u64,
    /// Of the line, until the file is in the table.
    pub(super) reserved_bytes: u64,
    /// For records that were moved: the file that each was read from. One that is no longer there
    /// was removed or moved again in the meantime, and its copy is dead on arrival.
    pub(super) moved_from: Option<Arc<HashMap<RecordId, u64>>>,
}

impl WrittenFile {
    pub(super) fn last(&self) -> u64 {
        self.first + 2 * self.entries.len() as u64
    }
}

pub(super) type Committed = Result<Vec<DirectoryEntry>>;

#[derive(Default)]
pub(super) struct Line {
    given: u64,
    /// The turn at the head.
    head: u64,
    /// By turn: what to commit, or that it was given up.
    ready: BTreeMap<u64, Ready>,
    answers: HashMap<u64, Committed>,
    is_led: bool,
    /// Of the last [`REMEMBERED`] turns, those whose files are not there.
    failed: BTreeSet<u64>,
    reserved_bytes: u64,
}

/// Turns whose failure is remembered; older ones count as failed.
const REMEMBERED: u64 = 1024;

struct Ready {
    files: Option<Vec<WrittenFile>>,
    after: Option<u64>,
}

impl Line {
    fn fail(&mut self, number: u64) {
        self.failed.insert(number);
        self.failed = self
            .failed
            .split_off(&self.given.saturating_sub(REMEMBERED));
    }

    /// Is the file of that turn not there? Its outcome is known.
    fn has_failed(&self, number: u64) -> bool {
        self.failed.contains(&number) || number + REMEMBERED < self.given
    }

    /// Is nothing under way?
    pub(super) fn is_at_rest(&self) -> bool {
        self.head == self.given && !self.is_led
    }

    /// Writes that have begun and not ended.
    pub(super) fn under_way(&self) -> u64 {
        self.given - self.head
    }

    /// Files that are being written count with the most they can take.
    pub(super) fn reserved_bytes(&self) -> u64 {
        self.reserved_bytes
    }

    /// A file of the line is in the table, which counts its bytes from here on.
    pub(super) fn release(&mut self, bytes: u64) {
        self.reserved_bytes -= bytes;
    }
}

impl RocksDisk {
    /// Takes a place in line and the bytes for a batch, leaving `leave_bytes` free. Where the files of
    /// the turn `after` do not get there, this one's do not either.
    ///
    /// # Errors
    /// `Closed`.
    pub(super) fn begin(
        &self,
        headers: &[&RecordHeader],
        leave_bytes: u64,
        after: Option<u64>,
    ) -> Result<Result<Turn<'_>, BatchTooLarge>> {
        let mut files = Vec::new();
        let mut rest = headers;
        for records in batch::parts(headers.iter().copied(), self.reserve_bytes()) {
            let (now, later) = rest.split_at(records);
            rest = later;
            files.push(NewFile {
                first: 0,
                records,
                reserved_bytes: file_bytes_max(now.iter().copied()),
            });
        }
        let need: u64 = files.iter().map(|file| file.reserved_bytes).sum();
        let mut state = self.state();
        if state.is_closing {
            return Err(Error::closed());
        }
        // More than the capacity may be taken already: it was larger before, or the store was rebuilt.
        let taken = self.taken_bytes(&state) + leave_bytes + need;
        if taken > self.capacity_bytes {
            return Ok(Err(BatchTooLarge {
                missing_bytes: taken - self.capacity_bytes,
            }));
        }
        for file in &mut files {
            file.first = state.next_place;
            state.next_place += places(file.records);
        }
        let number = state.line.given;
        state.line.given += 1;
        state.line.reserved_bytes += need;
        Ok(Ok(Turn {
            disk: self,
            number,
            files,
            reserved_bytes: need,
            after,
            answered: false,
        }))
    }

    /// Lets nobody begin any more, and waits for all that have until the deadline: what they write would
    /// lie in the folder of whoever opens the store next. Have they ended?
    pub(super) fn end_line(&self, deadline: Instant) -> bool {
        let mut state = self.state();
        state.is_closing = true;
        loop {
            // Turns that were given up may be all that is left.
            let led;
            (state, led) = self.lead(state);
            if state.line.is_at_rest() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !led && left.is_zero() {
                return false;
            }
            if !led {
                let turned = self.turned.wait_timeout(state, left);
                (state, _) = turned.unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Commits what is ready at the head of the line, if nobody does. Was there anything?
    fn lead<'a>(&'a self, mut state: MutexGuard<'a, State>) -> (MutexGuard<'a, State>, bool) {
        let line = &mut state.line;
        if line.is_led || !line.ready.contains_key(&line.head) {
            return (state, false);
        }
        line.is_led = true;
        let mut group = Group {
            disk: self,
            outcomes: Vec::new(),
        };
        let (mut files, mut lost) = (Vec::new(), Vec::new());
        let mut number = line.head;
        while let Some(ready) = line.ready.remove(&number) {
            let is_lost = ready.after.is_some_and(|after| line.has_failed(after));
            let outcome = match ready.files {
                Some(files) if is_lost => {
                    line.fail(number);
                    lost.extend(files.into_iter().map(|file| (file.path, file.disk_bytes)));
                    Outcome::Answer(Err(Error::unavailable(
                        "the batch that this one was to follow was not written",
                    )))
                }
                Some(written) => {
                    let turn = group.outcomes.len();
                    files.extend(written.into_iter().map(|file| (turn, file)));
                    Outcome::Open
                }
                None => {
                    line.fail(number);
                    Outcome::GivenUp
                }
            };
            group.outcomes.push(outcome);
            number += 1;
        }
        drop(state);
        for (path, bytes) in lost {
            self.discard(path, bytes);
        }
        group.commit(files);
        drop(group);
        (self.state(), true)
    }
}

/// What is committed together; ends the lead when it is dropped, whatever happens.
struct Group<'a> {
    disk: &'a RocksDisk,
    /// For each turn from the head on.
    outcomes: Vec<Outcome>,
}

enum Outcome {
    Open,
    Answer(Committed),
    /// Nobody waits for an answer.
    GivenUp,
}

impl Group<'_> {
    fn commit(&mut self, files: Vec<(usize, WrittenFile)>) {
        if files.is_empty() {
            return;
        }
        let (turns, files): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        match self.disk.commit_files(&files) {
            Ok(()) => {
                for (turn, file) in turns.into_iter().zip(files) {
                    match &mut self.outcomes[turn] {
                        Outcome::Answer(Ok(entries)) => entries.extend(file.entries),
                        outcome => *outcome = Outcome::Answer(Ok(file.entries)),
                    }
                }
            }
            Err(error) => {
                for file in files {
                    // Ingestion moves the file; what is left of a failure goes.
                    self.disk.discard(file.path, file.disk_bytes);
                }
                let cause = format!("{error:?}");
                let mut error = Some(error);
                for turn in turns {
                    let again =
                        || Error::unavailable("a batch was not written").with("cause", &cause);
                    let error = error.take().unwrap_or_else(again);
                    self.outcomes[turn] = Outcome::Answer(Err(error));
                }
            }
        }
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        let line = &mut state.line;
        for outcome in self.outcomes.drain(..) {
            let answer = match outcome {
                Outcome::Open => Some(Err(Error::internal("a commit panicked"))),
                Outcome::Answer(answer) => Some(answer),
                Outcome::GivenUp => None,
            };
            if matches!(answer, Some(Err(_))) {
                line.fail(line.head);
            }
            line.answers
                .extend(answer.map(|answer| (line.head, answer)));
            line.head += 1;
        }
        line.is_led = false;
        drop(state);
        self.disk.turned.notify_all();
    }
}

impl Turn<'_> {
    /// The numbers of its records: where each is written first is a number that no other ever has.
    pub(super) fn ids(&self) -> impl Iterator<Item = RecordId> + use<> {
        let files = self.files.clone().into_iter();
        let places = files.flat_map(|file| {
            let slots = 0..file.records as u32;
            slots.map(move |slot| image_place(file.first, slot))
        });
        places.map(|place| RecordId(place.try_into().expect("places start at 1")))
    }

    /// Makes the files and their index entries durable, in turn. If it is its turn already, that is done
    /// while no other file is written: a sync takes many times longer beside writes.
    ///
    /// # Errors
    /// `Unavailable` where the disk fails, or the files that these ones follow are not there.
    pub(super) fn commit(mut self, files: Vec<WrittenFile>, lane: MutexGuard<'_, ()>) -> Committed {
        let disk = self.disk;
        let mut state = disk.state();
        state.line.ready.insert(
            self.number,
            Ready {
                files: Some(files),
                after: self.after,
            },
        );
        self.answered = true;
        (state, _) = disk.lead(state);
        drop(lane);
        loop {
            if let Some(answer) = state.line.answers.remove(&self.number) {
                if answer.is_ok() {
                    // Given back when the file came into the table.
                    self.reserved_bytes = 0;
                }
                drop(state);
                return answer;
            }
            let led;
            (state, led) = disk.lead(state);
            if !led {
                let turned = disk.turned.wait(state);
                state = turned.unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        state.line.reserved_bytes -= self.reserved_bytes;
        if self.answered {
            return;
        }
        let given_up = Ready {
            files: None,
            after: self.after,
        };
        state.line.ready.insert(self.number, given_up);
        // Those behind it may all wait already. Its own answer is nobody's.
        drop(self.disk.lead(state));
    }
}

#[cfg(test)]
mod tests {
    //! Shown: what a line promises when a file in it is given up or lost. How: turns taken and left
    //! by hand, around real files.

    use super::*;
    use crate::{Dtype, HostArena, SystemClock};

    struct Bench {
        disk: RocksDisk,
        arena: HostArena,
        _dir: tempfile::TempDir,
    }

    fn bench() -> Bench {
        let geometry = KvGeometry::gqa(2, 2, 32, Dtype::Bf16, 16).expect("valid");
        let dir = tempfile::tempdir().expect("tempdir");
        let clock = Arc::new(SystemClock::default());
        Bench {
            disk: RocksDisk::open(dir.path(), &geometry, 64 << 20, clock).expect("opened"),
            arena: HostArena::open(&geometry, 1 << 20, |_, _| {}).expect("opened"),
            _dir: dir,
        }
    }

    impl Bench {
        fn slot(&self, own: u8) -> Slot {
            test_chunk(&self.arena, Key([255; 32]), Key([own; 32]), 0, 0)
        }

        fn begin(&self, slot: &Slot, after: Option<&Turn<'_>>) -> Turn<'_> {
            let header = slot.header().expect("sealed");
            let after = after.map(|turn| turn.number);
            let begun = self.disk.begin(&[&header], 0, after);
            begun.expect("open").expect("room")
        }

        fn write(&self, turn: Turn<'_>, slot: &Slot) -> Committed {
            let (header, image) = record_of(slot).expect("sealed");
            let record = NewRecord {
                id: turn.ids().next().expect("one record"),
                last_use_ms: 0,
                header,
                image,
            };
            self.disk.write_records(turn, vec![record], None)
        }
    }

    #[test]
    fn what_follows_a_batch_that_was_given_up_fails_and_nothing_else_does() {
        let bench = bench();
        let slots: Vec<_> = (0..6).map(|own| bench.slot(own)).collect();
        let before = bench.begin(&slots[0], None);
        let lost = bench.begin(&slots[1], Some(&before));
        let child = bench.begin(&slots[2], Some(&lost));
        let grandchild = bench.begin(&slots[3], Some(&child));
        let other = bench.begin(&slots[4], Some(&before));
        let (lost_number, child_number) = (lost.number, child.number);
        drop(lost);
        bench.write(before, &slots[0]).expect("began before it");
        bench.write(child, &slots[2]).expect_err("its child");
        bench
            .write(grandchild, &slots[3])
            .expect_err("the child's child");
        bench.write(other, &slots[4]).expect("not of its family");
        // The failure was not heard of yet when this one began.
        for after in [lost_number, child_number] {
            let mut late = bench.begin(&slots[5], None);
            late.after = Some(after);
            bench.write(late, &slots[5]).expect_err("a late child");
        }
        let mut keys = Vec::new();
        bench
            .disk
            .scan(&mut |info| keys.push(info.key))
            .expect("readable");
        assert_eq!(keys, [Key([0; 32]), Key([4; 32])]);
        let staged = fs::read_dir(bench.disk.staging_dir()).expect("there");
        assert_eq!(staged.count(), 0);
        assert_eq!(bench.disk.state().line.reserved_bytes(), 0);
    }

    #[test]
    fn closing_lets_what_has_begun_end_and_nothing_begin() {
        let bench = bench();
        let slots: Vec<_> = (0..3).map(|own| bench.slot(own)).collect();
        let (first, given_up) = (bench.begin(&slots[0], None), bench.begin(&slots[1], None));
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| bench.disk.close());
            while !bench.disk.state().is_closing {
                std::thread::yield_now();
            }
            let late = bench.disk.write(&slots[2..]).expect_err("it is closing");
            assert_eq!(late.kind(), ErrorKind::Closed);
            assert!(bench.disk.db().is_some() && !closing.is_finished());
            bench.write(first, &slots[0]).expect("it had begun");
            drop(given_up);
            closing.join().expect("no panic").expect("closed");
        });
        let Bench { disk, arena, _dir } = bench;
        drop(disk);
        let clock = Arc::new(SystemClock::default());
        let again = RocksDisk::open(_dir.path(), arena.geometry(), 64 << 20, clock);
        assert_eq!(again.expect("opened").usage().records, 1);
    }

    #[test]
    fn only_the_latest_failures_are_remembered_and_older_batches_count_as_failed() {
        let mut line = Line::default();
        for number in 0..3 * REMEMBERED {
            line.given = number + 1;
            if number % 2 == 0 {
                line.fail(number);
            }
        }
        assert!(line.failed.len() as u64 <= REMEMBERED);
        let last = line.given - 1;
        assert!(line.has_failed(last - 1) && !line.has_failed(last));
        assert!(line.has_failed(1));
    }

    #[test]
    fn a_write_waits_for_those_that_began_before_it_and_one_call_commits_them_all() {
        let bench = bench();
        let slots: Vec<_> = (0..3).map(|own| bench.slot(own)).collect();
        let first = bench.begin(&slots[0], None);
        let turns: Vec<_> = slots[1..]
            .iter()
            .map(|slot| bench.begin(slot, None))
            .collect();
        std::thread::scope(|scope| {
            let writers: Vec<_> = turns
                .into_iter()
                .zip(&slots[1..])
                .map(|(turn, slot)| scope.spawn(|| bench.write(turn, slot)))
                .collect();
            while bench.disk.state().line.ready.len() < 2 {
                std::thread::yield_now();
            }
            assert_eq!(bench.disk.usage().records, 0);
            bench.write(first, &slots[0]).expect("written");
            for writer in writers {
                writer.join().expect("no panic").expect("written");
            }
        });
        assert_eq!(
            (bench.disk.usage().records, bench.disk.usage().files),
            (3, 3)
        );
        assert!(bench.disk.state().line.answers.is_empty());
    }
}
