//! Giving space back. First what costs nothing but the call: `space.rs` drops files in which nothing is live,
//! `holes.rs` makes holes of removed records. Then a file with few live records is emptied by moving those into a
//! new one (greedy cleaning, after Rosenblum and Ousterhout, *The Design and Implementation of a
//! Log-Structured File System*, 1992, without their age term: recency is the index's matter, a file's age says
//! nothing of its records).
//!
//! No more is moved than gives the space that was asked for: what is left sparse goes on dying, and
//! moving it later moves less. Survivors get a file of their own, away from fresh records, which die
//! sooner.
//!
//! The number of files is bounded too ([`files_max`]): over the bound the smallest are put together.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::disk::verify::RECORD_ALIGN;

/// Live bytes that one cleaning step moves, but for a single file with more. They are in memory
/// meanwhile.
const STEP_BYTES: u64 = 32 << 20;

/// The longest that cleaning stands back for foreground reads before each of its own.
const STAND_BACK: Duration = Duration::from_millis(20);

/// What emptying a file must gain, of its bytes. Below, evicting costs less.
const GAIN_SHARE_MIN: f64 = 0.1;

/// The same where removed records leave holes: what else there is to gain is padding and directories, and
/// no more is moved for it than comes back.
const GAIN_SHARE_MIN_BESIDE_HOLES: f64 = 0.5;

/// The share of the room for payload that records should take at most where they must be moved. The rest is
/// dead, and makes the files that are cleaned sparse. `docs/decisions/0009` says what other shares cost.
const LIVE_SHARE_MAX: f64 = 0.95;

/// Files that are put together in one step.
const MERGE_FILES_MAX: usize = 256;

/// Steps of one call that read nothing, before it gives up.
const FAILED_STEPS_MAX: usize = 3;

/// Records of the smallest batch for which the answer of a reclaim holds.
const PROMISED_BATCH: usize = 8;

/// Payload files of a store, at most: of 32 MiB each on average where there are many. A batch that is
/// being written, by each writer, comes on top.
pub(super) fn files_max(capacity_bytes: u64) -> usize {
    1024 + (capacity_bytes >> 25) as usize
}

/// Counts the reads that others than cleaning have under way.
#[derive(Default)]
pub(super) struct Foreground(AtomicUsize);

impl Foreground {
    /// One more, until the answer is dropped.
    pub(super) fn begin(&self) -> impl Drop + '_ {
        struct Begun<'a>(&'a AtomicUsize);
        impl Drop for Begun<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.0.fetch_add(1, Ordering::Relaxed);
        Begun(&self.0)
    }

    pub(super) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Waits until there are none, but not for ever: who waits for space has a reader waiting too.
    pub(super) fn stand_back(&self) {
        let begun = Instant::now();
        while self.0.load(Ordering::Relaxed) > 0 && begun.elapsed() < STAND_BACK {
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}

/// What a step of cleaning came to.
pub(super) enum Step {
    /// Files were emptied, or lost what could not be used.
    Gained,
    /// No file is worth it, or there is no room to move what is in it.
    Nothing,
    /// Not one record could be read. Its files are left alone for a while.
    Unreadable(Error),
}

impl RocksDisk {
    /// See [`DiskTier::reclaim`].
    pub(super) fn clean(&self, bytes: u64) -> Result<u64> {
        let _cleaning = self.cleaning.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = self.in_files(bytes).saturating_add(self.reserve_bytes());
        let mut failed_steps = 0;
        loop {
            self.drop_dead()?;
            let taken = self.taken_bytes(&self.state());
            let free = self.capacity_bytes.saturating_sub(taken);
            let short = taken
                .saturating_add(wanted)
                .saturating_sub(self.capacity_bytes);
            if short > 0 && self.make_holes(short) > 0 {
                continue;
            }
            let step = match short {
                0 => Step::Nothing,
                short => self.clean_step(short)?,
            };
            match step {
                Step::Gained => {}
                Step::Nothing => {
                    return Ok(self.in_records(free.saturating_sub(self.reserve_bytes())));
                }
                Step::Unreadable(error) => {
                    failed_steps += 1;
                    if failed_steps == FAILED_STEPS_MAX {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Record bytes that should go before a batch can be written for which `short` bytes of files are
    /// not free: so many that cleaning finds what it takes without moving much. None where cleaning
    /// alone is enough.
    pub(super) fn bytes_to_go(&self, short: u64) -> u64 {
        let state = self.state();
        let taken = self.taken_bytes(&state);
        let (mut live_files, mut sparse) = (0.0, 0.0);
        let live_share_max = match state.makes_holes {
            true => 1.0,
            false => LIVE_SHARE_MAX,
        };
        for (first, file) in state.table.files() {
            let by_holes = self.by_holes(&state, first, file);
            let by_moving = self.gain(&state, first, file);
            live_files += (file.disk_bytes - by_holes.max(by_moving)) as f64;
            // Above the capacity there is no room to move anything.
            let fits = taken < self.capacity_bytes
                && moved_bytes_max(file, &self.geometry) <= self.reserve_bytes();
            sparse += match fits && by_moving as f64 >= gain_min(&state, file) {
                true => by_holes.max(by_moving),
                false => by_holes,
            } as f64;
        }
        // Negative where more is taken than there is.
        let free = self.capacity_bytes as f64 - (taken + self.reserve_bytes()) as f64;
        let written = state.table.disk_bytes() + state.line.reserved_bytes();
        let room = free + written as f64;
        let wanted = (state.line.reserved_bytes() + short) as f64 + free;
        let over = live_files + wanted - live_share_max * room;
        let go = over.max(short as f64 - sparse).min(live_files).max(0.0);
        (go * state.table.live_bytes() as f64 / live_files.max(1.0)).ceil() as u64
    }

    /// Puts small files together where there are too many. Best effort: a store without room for it
    /// has few bytes in them.
    pub(super) fn merge_small_files(&self) -> Result<()> {
        if self.state().table.file_count() < self.files_max {
            return Ok(());
        }
        // Whoever cleans now makes them fewer.
        let Ok(_cleaning) = self.cleaning.try_lock() else {
            return Ok(());
        };
        self.drop_dead()?;
        let victims = {
            let state = self.state();
            if state.table.file_count() < self.files_max {
                return Ok(());
            }
            let mut files: Vec<_> = state.table.files().collect();
            files.sort_by_key(|(first, file)| (file.live_bytes, *first));
            files.truncate(MERGE_FILES_MAX);
            self.take(&state, files.into_iter(), |_, _| true)
        };
        if victims.len() > 1 {
            if let Step::Unreadable(error) = self.empty(victims)? {
                return Err(error);
            }
            self.drop_dead()?;
        }
        Ok(())
    }

    /// Bytes of whole records that fit `bytes` of files, in batches of at least
    /// [`PROMISED_BATCH`]: small records lose much to padding and directory.
    fn in_records(&self, bytes: u64) -> u64 {
        let (records, file) = self.promised_batch();
        (u128::from(bytes) * records / file) as u64
    }

    /// The opposite of [`Self::in_records`].
    fn in_files(&self, bytes: u64) -> u64 {
        let (records, file) = self.promised_batch();
        let files = (u128::from(bytes) * file).div_ceil(records);
        files.try_into().unwrap_or(u64::MAX)
    }

    /// Bytes of the records of a batch, and of its file.
    fn promised_batch(&self) -> (u128, u128) {
        let layers = self.geometry.layers as usize;
        let record =
            (RecordHeader::BYTES + self.geometry.payload_bytes()).next_multiple_of(RECORD_ALIGN);
        let records = PROMISED_BATCH * record;
        let file = batch::bytes_max(PROMISED_BATCH, records, layers);
        (records as u128, u128::from(file))
    }

    /// Bytes that come back where a file's live records are moved out of it, beside those of others. What
    /// padding and directory take comes again in the new file, so a file without a dead record has next to
    /// nothing to give.
    fn gain(&self, state: &State, first: u64, file: &PayloadFile) -> u64 {
        match state.makes_holes {
            // What is dead may be a hole by now.
            true => {
                let padding = file.live.len() as u64 * RECORD_ALIGN as u64;
                file.disk_bytes.saturating_sub(file.live_bytes + padding)
            }
            false => (file.disk_bytes as f64 * file.dead_share(first)) as u64,
        }
    }

    /// Empties the sparsest files, for `wanted` bytes or as many as one step gives.
    fn clean_step(&self, wanted: u64) -> Result<Step> {
        let victims = {
            let state = self.state();
            // The more together, the fewer new files: and only what is hardly more than padding is moved then.
            let wanted = match state.makes_holes {
                true => u64::MAX,
                false => wanted,
            };
            let mut files: Vec<_> = state
                .table
                .files()
                .map(|(first, file)| (self.gain(&state, first, file), first, file))
                .filter(|(gain, _, file)| *gain as f64 >= gain_min(&state, file))
                .map(|(gain, first, file)| (gain as f64 / file.disk_bytes as f64, first, file))
                .collect();
            files.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            let mut gained = 0;
            let files = files.into_iter().map(|(_, first, file)| (first, file));
            let victims = self.take(&state, files, |first, file| {
                let is_enough = gained >= wanted;
                gained += self.gain(&state, first, file);
                !is_enough
            });
            match state.makes_holes && !self.is_less_together(&state, &victims) {
                true => Vec::new(),
                false => victims,
            }
        };
        match victims.is_empty() {
            true => Ok(Step::Nothing),
            false => self.empty(victims),
        }
    }

    /// Does the file that takes what is live in some files take fewer bytes than they do?
    fn is_less_together(&self, state: &State, files: &[u64]) -> bool {
        let (mut now, mut records, mut bytes) = (0, 0, 0);
        for file in files.iter().filter_map(|first| state.table.file(*first)) {
            now += file.disk_bytes;
            records += file.live.len();
            bytes += file.live_bytes as usize;
        }
        batch::bytes_max(records, bytes, self.geometry.layers as usize) < now
    }

    /// Of `files` those that `wants` and that can be moved together: within a step, and within what
    /// is free for the new file.
    fn take<'a>(
        &self,
        state: &State,
        files: impl Iterator<Item = (u64, &'a PayloadFile)>,
        mut wants: impl FnMut(u64, &PayloadFile) -> bool,
    ) -> Vec<u64> {
        let free = self.free_bytes(state);
        let now = self.clock.now();
        let is_left_alone =
            |first: &u64| state.set_aside.get(first).is_some_and(|until| now < *until);
        let (mut victims, mut bytes) = (Vec::new(), 0);
        for (first, file) in files.filter(|(first, _)| !is_left_alone(first)) {
            let more = moved_bytes_max(file, &self.geometry);
            let fits = bytes + more <= free && (bytes + more <= STEP_BYTES || victims.is_empty());
            if fits && wants(first, file) {
                bytes += more;
                victims.push(first);
            }
        }
        victims
    }
}

/// Bytes that moving a file's live records must give back.
fn gain_min(state: &State, file: &PayloadFile) -> f64 {
    let share = match state.makes_holes {
        true => GAIN_SHARE_MIN_BESIDE_HOLES,
        false => GAIN_SHARE_MIN,
    };
    // At least a byte: dead files are dropped, and an empty one gives nothing.
    (file.disk_bytes as f64 * share).max(1.0)
}

/// Bytes of the file that takes a file's live records, at most.
fn moved_bytes_max(file: &PayloadFile, geometry: &KvGeometry) -> u64 {
    let layers = geometry.layers as usize;
    batch::bytes_max(file.live.len(), file.live_bytes as usize, layers)
}

#[cfg(test)]
mod tests {
    //! Shown: what cleaning moves keeps its bytes and lies in the order of prefixes, what does not
    //! verify is taken out, the number of files is bounded, and what a refused batch asks for is what
    //! it needs. How: small stores, looked at from inside.

    use super::*;
    use crate::{Dtype, SystemClock};
    use std::os::unix::fs::FileExt as _;

    struct Bench {
        disk: RocksDisk,
        arena: HostArena,
        dir: tempfile::TempDir,
    }

    fn bench(capacity_bytes: u64) -> Bench {
        let geometry = KvGeometry::gqa(2, 2, 32, Dtype::Bf16, 16).expect("valid");
        let dir = tempfile::tempdir().expect("tempdir");
        let clock = Arc::new(SystemClock::default());
        let disk = RocksDisk::open(dir.path(), &geometry, capacity_bytes, clock).expect("opened");
        Bench {
            disk: disk.without_holes(),
            arena: HostArena::open(&geometry, 8 << 20, |_, _| {}).expect("opened"),
            dir,
        }
    }

    fn key(family: u8, depth: u32) -> Key {
        let mut key = [family; 32];
        key[0] = depth as u8;
        Key(key)
    }

    impl Bench {
        fn slot(&self, family: u8, depth: u32) -> Slot {
            let parent = depth.checked_sub(1);
            let parent = parent.map_or(Key([255; 32]), |above| key(family, above));
            let byte = family ^ depth as u8;
            test_chunk(&self.arena, parent, key(family, depth), depth, byte)
        }

        fn write(&self, blocks: &[(u8, u32)]) -> Vec<RecordId> {
            let slots: Vec<_> = blocks.iter().map(|&(f, d)| self.slot(f, d)).collect();
            self.disk.write(&slots).expect("written").expect("fits")
        }

        /// The blocks of all files, in the order of their places.
        fn blocks(&self) -> Vec<(u64, (u8, u32))> {
            let mut blocks = Vec::new();
            let mut infos = Vec::new();
            self.disk.scan(&mut |info| infos.push(info)).expect("scan");
            for info in infos {
                let at = self.disk.state().table.get(info.id).expect("live");
                let slot = self
                    .arena
                    .allocate(at.bytes as usize - RecordHeader::BYTES, 1);
                let slot = slot.and_then(|mut slots| slots.pop()).expect("room");
                let family = info.key.0[1];
                self.disk
                    .read(vec![(info.clone(), slot)], &mut |_, answer| {
                        let slot = answer.expect("readable");
                        let byte = slot.image()[RecordHeader::BYTES];
                        assert_eq!(byte, family ^ info.depth as u8);
                    });
                blocks.push((at.place(), (family, info.depth)));
            }
            blocks.sort_unstable();
            blocks
        }
    }

    #[test]
    fn survivors_of_several_files_lie_in_the_order_of_their_prefixes() {
        let bench = bench(64 << 20);
        let mut gone = Vec::new();
        for round in 0..3 {
            let blocks = [(1, round), (9, round), (2, round), (8, round)];
            let ids = bench.write(&blocks);
            gone.extend([ids[1], ids[3]]);
        }
        bench.disk.remove(&gone).expect("removed");
        bench.disk.reclaim(u64::MAX).expect("cleaned");
        let usage = bench.disk.usage();
        assert_eq!((usage.files, usage.records), (1, 6));
        assert_eq!(usage.rewritten_bytes, usage.live_bytes);
        let order: Vec<_> = bench.blocks().into_iter().map(|(_, block)| block).collect();
        assert_eq!(order, [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]);
        // Nothing is sparse any more.
        bench.disk.reclaim(u64::MAX).expect("cleaned");
        assert_eq!(bench.disk.usage(), usage);
    }

    #[test]
    fn no_more_is_moved_than_gives_what_was_asked_for() {
        let bench = bench(16 << 20);
        let mut gone = Vec::new();
        let mut family = 0;
        while let Ok(ids) = {
            let slots: Vec<_> = (0..8).map(|depth| bench.slot(family, depth)).collect();
            bench.disk.write(&slots).expect("written")
        } {
            // The first files are the sparsest.
            gone.extend(&ids[8 - (6 - usize::from(family) / 32).min(6)..]);
            family += 1;
        }
        bench.disk.remove(&gone).expect("removed");
        let free = bench.disk.reclaim(0).expect("cleaned");
        let before = bench.disk.usage();
        let more = bench.disk.reclaim(free + (256 << 10)).expect("cleaned");
        assert!(more >= free + (256 << 10), "{free} then {more}");
        let after = bench.disk.usage();
        let moved = after.rewritten_bytes - before.rewritten_bytes;
        assert!((1..=512 << 10).contains(&moved), "{moved} bytes were moved");
    }

    #[test]
    fn a_record_that_rotted_is_taken_out_and_the_rest_of_its_file_is_moved() {
        let bench = bench(64 << 20);
        let ids = bench.write(&[(1, 0), (1, 1), (1, 2), (1, 3)]);
        bench.disk.remove(&ids[3..]).expect("removed");
        RocksDisk::salvage(bench.dir.path(), &mut |path, offset, header| {
            if header.depth == 1 {
                let file = fs::File::options().write(true).open(path).expect("there");
                let at = offset + RecordHeader::BYTES as u64 + 100;
                file.write_all_at(&[0xff], at).expect("rotted");
            }
        })
        .expect("files");
        bench.disk.reclaim(u64::MAX).expect("cleaned");
        let left: Vec<_> = bench.blocks().into_iter().map(|(_, block)| block).collect();
        assert_eq!(left, [(1, 0), (1, 2)]);
        assert_eq!(bench.disk.usage().files, 1);
    }

    #[test]
    fn a_record_that_is_touched_while_it_is_moved_stays_touched() {
        let bench = bench(64 << 20);
        let ids = bench.write(&[(1, 0), (1, 1), (1, 2), (1, 3)]);
        bench.disk.remove(&ids[2..]).expect("removed");
        let lane = bench.disk.lane.lock().expect("free");
        std::thread::scope(|scope| {
            let cleaning = scope.spawn(|| bench.disk.reclaim(u64::MAX));
            // It has read them, and waits for the lane.
            while bench.disk.state().line.is_at_rest() {
                std::thread::yield_now();
            }
            bench.disk.touch(&ids[..1], 7).expect("touched");
            drop(lane);
            cleaning.join().expect("no panic").expect("cleaned");
        });
        assert_eq!(bench.disk.usage().files, 1);
        assert!(bench.disk.usage().rewritten_bytes > 0);
        let Bench { disk, dir, arena } = bench;
        let used = |disk: &RocksDisk| {
            let mut used = BTreeMap::new();
            disk.scan(&mut |info| _ = used.insert(info.depth, info.last_use_ms))
                .expect("readable");
            used
        };
        let before = used(&disk);
        assert_eq!(before[&0], 7);
        assert!(before[&1] > 7);
        disk.close().expect("closed");
        // The index says so, too.
        let clock = Arc::new(SystemClock::default());
        let disk = RocksDisk::open(dir.path(), arena.geometry(), 64 << 20, clock);
        assert_eq!(used(&disk.expect("opened")), before);
    }

    #[test]
    fn the_copy_of_a_record_that_is_removed_while_it_is_moved_gives_its_space_back() {
        let bench = bench(64 << 20);
        let ids = bench.write(&[(1, 0), (1, 1)]);
        let disk = &bench.disk;
        let first = disk.state().table.get(ids[0]).expect("there").file;
        let lane = disk.lane.lock().expect("free");
        std::thread::scope(|scope| {
            let moving = scope.spawn(|| disk.empty(vec![first]));
            // It has read them, and waits for the lane.
            while disk.state().line.is_at_rest() {
                std::thread::yield_now();
            }
            disk.remove(&ids[1..]).expect("removed");
            drop(lane);
            let moved = moving.join().expect("no panic");
            assert!(matches!(moved, Ok(Step::Gained)));
        });
        let state = disk.state();
        let now = state.table.get(ids[0]).expect("there").file;
        assert_ne!(now, first);
        let copy = state.table.file(now).expect("its file");
        assert_eq!(copy.removed().count(), 1);
        let image = u64::from(state.table.get(ids[0]).expect("there").bytes);
        assert_eq!(copy.removed_bytes(), image);
    }

    #[test]
    fn small_files_are_put_together_where_there_are_many() {
        let mut bench = bench(64 << 20);
        bench.disk.files_max = 10;
        for family in 0..60 {
            bench.write(&[(family, 0), (family, 1)]);
            let files = bench.disk.usage().files;
            assert!(files <= 10, "{files} files");
        }
        assert_eq!(bench.blocks().len(), 120);
        let usage = bench.disk.usage();
        assert!(usage.rewritten_bytes < 8 * usage.written_bytes, "{usage:?}");
    }

    #[test]
    fn a_refused_batch_asks_for_nothing_where_cleaning_is_enough() {
        let bench = bench(16 << 20);
        let write = |family: u8| {
            let slots: Vec<_> = (0..16).map(|depth| bench.slot(family, depth)).collect();
            bench.disk.write(&slots).expect("written")
        };
        let mut ids = Vec::new();
        let asked = (0..).find_map(|family| match write(family) {
            Ok(more) => {
                ids.push(more);
                None
            }
            Err(asked) => Some(asked),
        });
        let asked = asked.expect("full at some time");
        let bytes = bench.disk.usage().live_bytes / bench.disk.usage().records;
        // The batch, and what is over the share that may be live.
        let (least, most) = (16 * bytes, bench.disk.usage().live_bytes / 10);
        assert!(
            (least..=most).contains(&asked.missing_bytes),
            "{asked:?}: {least} to {most}"
        );
        // Half of each file goes: much is dead, nothing is free.
        for file in &ids {
            bench.disk.remove(&file[8..]).expect("removed");
        }
        let asked = (200..).find_map(|family| write(family).err());
        let asked = asked.expect("full");
        assert_eq!(asked.missing_bytes, 0);
        let wanted = 16 * bytes;
        assert!(bench.disk.reclaim(wanted).expect("cleaned") >= wanted);
    }
}
