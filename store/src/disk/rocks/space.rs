//! What a store takes on disk, and how whole files go.
//!
//! Every byte counts once: payload files in the table; those that were dropped while their names are
//! still in the folder, because RocksDB deletes them when it is done with them; those that have no name
//! any more, because a read has them open; files that are being written, with the most they can take;
//! those beside the database that are kept for a while or could not be removed; and everything beside the
//! payload, measured after every change. Where a folder cannot be listed, what was known of it counts on.

use super::*;
use crate::disk::verify::RECORD_ALIGN;

/// Files that were dropped and whose names may still be there.
pub(super) struct Lingering {
    /// Their bytes, by their first places.
    files: BTreeMap<u64, u64>,
    /// Bytes in the folder beyond the files of the table, as last measured.
    bytes: u64,
    /// There may be others in the folder: all of it must be looked at, not these files alone.
    has_strangers: bool,
}

impl Default for Lingering {
    fn default() -> Self {
        Lingering {
            files: BTreeMap::new(),
            bytes: 0,
            has_strangers: true,
        }
    }
}

impl Lingering {
    /// Adds a file that is in no table (any more). It counts until the next measurement says that it
    /// is gone.
    pub(super) fn add(&mut self, first: u64, bytes: u64) {
        if self.files.insert(first, bytes).is_none() {
            self.bytes += bytes;
        }
    }

    /// RocksDB was opened again: what it left of files that it did not take in is not known.
    pub(super) fn look_for_strangers(&mut self) {
        self.has_strangers = true;
    }

    fn is_empty(&self) -> bool {
        self.files.is_empty() && self.bytes == 0
    }
}

impl RocksDisk {
    /// Bytes of the folder itself, its manifest and its lock.
    const FOLDER_BYTES: u64 = 32 << 10;

    /// Kept free of saves, so that cleaning can move records also when the store is full: no file is longer,
    /// but for one of a single record.
    pub(super) fn reserve_bytes(&self) -> u64 {
        let layers = self.geometry.layers as usize;
        let record = batch::bytes_max(1, self.geometry.payload_bytes() + 2 * RECORD_ALIGN, layers);
        (self.capacity_bytes / 16).min(64 << 20).max(record)
    }

    /// Bytes that may still be written without passing the capacity.
    pub(super) fn free_bytes(&self, state: &State) -> u64 {
        self.capacity_bytes.saturating_sub(self.taken_bytes(state))
    }

    /// Bytes that are used, and those by which the files beside the payload may grow.
    pub(super) fn taken_bytes(&self, state: &State) -> u64 {
        self.used_bytes(state) + self.growth_bytes(state)
    }

    /// Bytes by which the files beside the payload may grow until they are measured again.
    fn growth_bytes(&self, state: &State) -> u64 {
        // The index grows by about its own size in memory while it is compacted.
        let index_bytes = 256 * state.table.len() as u64;
        self.sizing.growth_bytes(index_bytes)
    }

    /// Notes what the files beside the payload take now; where that could not be measured, the most they
    /// may have grown to.
    pub(super) fn note_other_bytes(&self, state: &mut State, measured: io::Result<u64>) {
        state.other_bytes = measured.unwrap_or_else(|error| {
            tracing::warn!(%error, "what the index takes on disk cannot be measured now");
            state.other_bytes + self.growth_bytes(state)
        });
    }

    /// Removes a file of `bytes` that is in no database; where that fails, it counts until a later attempt
    /// works.
    pub(super) fn discard(&self, path: PathBuf, bytes: u64) {
        let removed = match path.is_dir() {
            true => fs::remove_dir_all(&path),
            false => fs::remove_file(&path),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, path = %path.display(), "what should be gone is still there");
                self.state().leftovers.push((path, bytes));
            }
            _ => {}
        }
    }

    pub(super) fn used_bytes(&self, state: &State) -> u64 {
        state.table.disk_bytes()
            + state.line.reserved_bytes()
            + state.lingering.bytes
            + self.reading.files.unlinked_bytes()
            + beside_bytes(state)
            + state.other_bytes
            + Self::FOLDER_BYTES
    }

    /// Drops the files in which nothing is live.
    pub(super) fn drop_dead(&self) -> Result<()> {
        let _committing = self.begin_change()?;
        let guard = self.db();
        self.drop_dead_files(guard.as_ref().ok_or_else(Error::closed)?)
    }

    /// Drops the files in which nothing is live. The caller holds `commit`.
    pub(super) fn drop_dead_files(&self, db: &Db) -> Result<()> {
        let leftovers = std::mem::take(&mut self.state().leftovers);
        for (path, bytes) in leftovers {
            self.discard(path, bytes);
        }
        let dead = self.state().table.dead_runs();
        if dead.is_empty() && self.state().lingering.is_empty() {
            return Ok(());
        }
        // What was moved out of them must be found elsewhere also after a power cut, and what was
        // removed nowhere.
        if self.state().unsynced_files > 0 {
            db.sync().inspect_err(|_| self.state().is_stuck = true)?;
            self.state().unsynced_files = 0;
        }
        let mut changes = db.index_batch();
        for run in &dead {
            // The files first: an entry without its file is dropped at opening, a file without its
            // entry would be adopted with records that were removed.
            db.drop_payload(run.firsts[0], run.last)
                .inspect_err(|_| self.state().is_stuck = true)?;
            for first in &run.firsts {
                changes.delete(&entry::file_key(*first));
                changes.delete(&entry::live_key(*first));
            }
        }
        self.apply(changes, false)?;
        let dead: Vec<u64> = dead.into_iter().flat_map(|run| run.firsts).collect();
        let in_folder = self.look(db, &dead);
        // Closed once the state is free again.
        let mut closing = Vec::new();
        let mut guard = self.state();
        let state = &mut *guard;
        for first in dead {
            if let Some(file) = state.table.drop_file(first) {
                state.lingering.add(first, file.disk_bytes);
            }
            state.set_aside.remove(&first);
            state.holes_refused.remove(&first);
        }
        // Where nobody knows, what was dropped counts on.
        if let Some(in_folder) = in_folder {
            let Lingering { files, .. } = &mut state.lingering;
            files.retain(|&first, &mut bytes| {
                let is_there = in_folder.files.contains(&first);
                if !is_there {
                    // A read may have it open.
                    closing.push(self.reading.files.forget(first, bytes));
                }
                is_there
            });
            let known: u64 = files.values().sum();
            state.lingering.bytes = match in_folder.bytes {
                Some(bytes) => bytes.saturating_sub(state.table.disk_bytes()),
                None => known,
            };
            state.lingering.has_strangers = state.lingering.bytes > known;
        }
        drop(guard);
        Ok(())
    }

    /// Looks which files of those that were dropped, now or before, are in the folder still; `None` where
    /// it cannot be listed. The caller holds `commit`.
    fn look(&self, db: &Db, dead: &[u64]) -> Option<InFolder> {
        let (dropped, all) = {
            let state = self.state();
            let before = state.lingering.files.keys();
            let dropped: Vec<u64> = before.chain(dead).copied().collect();
            (dropped, state.lingering.has_strangers)
        };
        let numbers: Vec<_> = dropped
            .iter()
            .filter_map(|&first| Some((first, self.reading.files.number(first)?)))
            .collect();
        if all || numbers.len() < dropped.len() {
            let there = db.payload_bytes().inspect_err(
                |error| tracing::warn!(%error, "the payload files cannot be listed now"),
            );
            let there = there.ok()?;
            let files = numbers
                .into_iter()
                .filter(|(_, number)| there.contains_key(number));
            return Some(InFolder {
                files: files.map(|(first, _)| first).collect(),
                bytes: Some(there.values().sum()),
            });
        }
        // A folder of a large store has tens of thousands of files.
        let is_there = |number: u64| {
            let meta = fs::metadata(db.payload_path(number));
            !meta.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        let files = numbers.into_iter().filter(|(_, number)| is_there(*number));
        Some(InFolder {
            files: files.map(|(first, _)| first).collect(),
            bytes: None,
        })
    }
}

/// What is in the payload folder.
struct InFolder {
    /// Dropped files, by their first places.
    files: BTreeSet<u64>,
    /// Bytes of all files, where all were looked at.
    bytes: Option<u64>,
}

/// Bytes of files that are in no database.
fn beside_bytes(state: &State) -> u64 {
    let beside = state.spares.iter().chain(&state.leftovers);
    let beside = beside.chain(&state.unread);
    beside.map(|(_, bytes)| bytes).sum()
}

#[cfg(test)]
mod tests {
    //! Shown: every byte counts once, however a file that was dropped is still held, and what the index
    //! takes is known after every change. How: a store whose files are held by hand.

    use super::*;
    use crate::{Dtype, HostArena, SystemClock};

    /// A store with two files of four records each, and their ids.
    fn sample(dir: &Path) -> (RocksDisk, Vec<RecordId>) {
        let geometry = KvGeometry::gqa(2, 2, 32, Dtype::Bf16, 16).expect("valid");
        let arena = HostArena::open(&geometry, 1 << 20, |_, _| {}).expect("opened");
        let clock = Arc::new(SystemClock::default());
        let disk = RocksDisk::open(dir, &geometry, 64 << 20, clock).expect("opened");
        let mut ids = Vec::new();
        for keys in [0..4, 4..8] {
            let chunk = |own| test_chunk(&arena, Key([255; 32]), Key([own; 32]), 0, 0);
            let batch: Vec<_> = keys.map(chunk).collect();
            ids.extend(disk.write(&batch).expect("written").expect("room"));
        }
        (disk, ids)
    }

    #[test]
    fn a_dropped_file_counts_once_while_rocksdb_and_a_read_have_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (disk, ids) = sample(dir.path());
        let (first, bytes) = {
            let state = disk.state();
            let (first, file) = state.table.files().next().expect("two");
            (first, file.disk_bytes)
        };
        let counted = || {
            let state = disk.state();
            let lingering = state.lingering.bytes;
            (
                state.table.disk_bytes(),
                lingering,
                disk.reading.files.unlinked_bytes(),
            )
        };
        assert_eq!(counted(), (2 * bytes, 0, 0));
        let read = disk.reading.files.open(first).expect("there");
        let guard = disk.db();
        let held = guard.as_ref().expect("open").hold_files();
        disk.remove(&ids[..4]).expect("removed");
        assert_eq!(counted(), (bytes, bytes, 0));
        // RocksDB deletes it now, and the next look finds that.
        drop(held);
        disk.remove(&[]).expect("nothing to remove");
        assert_eq!(counted(), (bytes, 0, bytes));
        drop(read);
        assert_eq!(counted(), (bytes, 0, 0));
    }

    /// RocksDB numbers what it tries in vain, too: while a disk is full, say.
    #[test]
    fn the_number_of_a_file_is_found_however_many_were_used_up_before_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (disk, _) = sample(dir.path());
        let missing = dir.path().join("missing.sst");
        let missing = vec![&*missing; 5000];
        let tried = disk.db().as_ref().expect("open").ingest(&missing);
        tried.expect_err("there is none");
        let arena = HostArena::open(&disk.geometry, 1 << 20, |_, _| {}).expect("opened");
        for own in [8, 9] {
            let chunk = test_chunk(&arena, Key([255; 32]), Key([own; 32]), 0, 0);
            let ids = disk.write(&[chunk]).expect("written").expect("room");
            let file = disk.state().table.get(ids[0]).expect("there").file;
            assert!(disk.reading.files.number(file).is_some(), "of {own}");
            assert!(disk.reading.files.open(file).is_ok());
        }
    }

    #[test]
    fn what_the_index_takes_is_known_after_every_change() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (disk, ids) = sample(dir.path());
        let measured = || {
            disk.db()
                .as_ref()
                .expect("open")
                .other_bytes()
                .expect("listed")
        };
        let before = measured();
        for now in 0..400 {
            disk.touch(&ids, now).expect("touched");
            assert_eq!(disk.state().other_bytes, measured());
        }
        assert!(measured() > before, "the log does not grow");
        disk.remove(&ids[..1]).expect("removed");
        assert_eq!(disk.state().other_bytes, measured());
    }
}
