//! How a store comes back.
//!
//! The index column family is a cache of the files' directories: an entry without its file is
//! dropped, a file without its entry is adopted from its directory.

use super::*;
use crate::disk::directory;
use crate::disk::manifest::Manifest;
use commit::{locate, put_file};
use folder::{check_folder, check_records, empty_staging, payload_files};
use rebuild::{open_as_it_is, rebuild};
use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use unread::{TakenBack, insistently, put_aside, take_back};

/// Directories that are read before their records are taken in, and by how many threads at most.
const DIRECTORIES_AT_ONCE: usize = 64;
const DIRECTORY_READERS: usize = 16;

/// Places that are left to the files that cannot be read, where nothing else says which they have: more than a
/// store comes to by writing.
const UNREAD_PLACES: u64 = 1 << 32;

/// Openings beside a process that writes, of which each but the last may meet files that are just being
/// dropped.
const OPENED_BESIDE_MAX: usize = 16;

impl RocksDisk {
    /// Opens the store in `dir`, or makes one where the folder is empty or missing.
    ///
    /// # Errors
    /// `Invalid` where the store has another geometry or format version (named), or the folder holds
    /// something else; `Busy` where another process has it open (named); `Corrupt` where the
    /// manifest is damaged and no record tells that the store is of this geometry and version;
    /// `Unavailable` where the disk fails. Nothing is touched then.
    pub fn open(
        dir: &Path,
        geometry: &KvGeometry,
        capacity_bytes: u64,
        clock: Arc<dyn Clock>,
    ) -> Result<RocksDisk> {
        geometry.validate()?;
        let dir = &whole_path(dir)?;
        make_folder(dir).map_err(|error| unwritable(dir, error))?;
        check_folder(dir, geometry)?;
        let lock = StoreLock::take(dir)?;
        // Again: another process may have made or rebuilt the store before it let the lock go.
        let (found, is_remade) = check_folder(dir, geometry)?;
        match &found {
            Some(manifest) if is_remade => {
                tracing::warn!(path = %dir.display(), "the store's manifest is made again from its records");
                manifest.store(dir)?;
            }
            // Behind the lock: a read may hang in whoever holds it.
            Some(manifest) => check_records(dir, manifest)?,
            None => {}
        }
        let mut leftovers = empty_staging(dir)?;
        let sizing = Sizing::of(capacity_bytes);
        let manifest = match found {
            Some(manifest) => manifest,
            None => {
                let manifest = Manifest {
                    format_version: crate::FORMAT_VERSION,
                    created_unix_ms: clock.unix_ms(),
                    database: "db-0".into(),
                    geometry: geometry.clone(),
                };
                manifest.store(dir)?;
                manifest
            }
        };
        let load = |db| {
            let taken_back = take_back(dir, &db)?;
            let access = Access::ReadWrite;
            let disk = Self::new(dir, geometry, capacity_bytes, clock.clone(), access, db);
            disk.load(taken_back).map(|()| disk)
        };
        // RocksDB reads most of the index only when it is asked for it.
        let opened = insistently(|| {
            let db = open_as_it_is(dir, &manifest, sizing)?;
            db.map(load).transpose()
        });
        let disk = match opened {
            Ok(Some(disk)) => disk,
            Err(error) if !db::is_lost(&error) => return Err(error),
            cannot => {
                if let Err(error) = cannot {
                    tracing::warn!(%error, "the database does not open: it is rebuilt from its files");
                }
                let (db, left) = rebuild(dir, manifest, sizing)?;
                leftovers.extend(left);
                load(db)?
            }
        };
        let place = fs::File::open(&disk.database);
        let place = place.map_err(|error| unreadable(&disk.database, error))?;
        let mut state = disk.state();
        state.lock = Some(lock);
        state.place = Some(Arc::new(place));
        state.leftovers.append(&mut leftovers);
        drop(state);
        Ok(disk)
    }

    /// Opens the store in `dir` for reading, beside a process that writes to it or not, as it is at
    /// this moment. The geometry is the store's own.
    ///
    /// # Errors
    /// `Invalid` for another format version; `Unavailable` where there is no store, or its database
    /// cannot be read: see [`RocksDisk::salvage`].
    pub fn open_read_only(dir: &Path, clock: Arc<dyn Clock>) -> Result<RocksDisk> {
        let dir = &whole_path(dir)?;
        let manifest = Manifest::load(dir)?.ok_or_else(|| {
            Error::unavailable("there is no store in the folder").with("path", dir.display())
        })?;
        let open = || {
            let db = Db::open_read_only(&dir.join(&manifest.database))?;
            let access = Access::ReadOnly;
            let disk = Self::new(dir, &manifest.geometry, u64::MAX, clock.clone(), access, db);
            disk.load(TakenBack::default()).map(|()| disk)
        };
        for _ in 1..OPENED_BESIDE_MAX {
            match open() {
                // It went between the look into the manifest and the one at the file.
                Err(error) if db::is_missing(&error) && Self::holder(dir).is_some() => {}
                opened => return opened,
            }
        }
        open()
    }

    /// The geometry of the store in `dir`.
    ///
    /// # Errors
    /// As [`RocksDisk::open_read_only`].
    pub fn geometry_of(dir: &Path) -> Result<KvGeometry> {
        let manifest = Manifest::load(dir)?.ok_or_else(|| {
            Error::unavailable("there is no store in the folder").with("path", dir.display())
        })?;
        Ok(manifest.geometry)
    }

    /// Looks for record headers in the payload files of a store, without RocksDB: what can still be
    /// said of a store that does not open. Calls `found` with the file, the offset of the record in
    /// it and its header. Payloads are not read.
    ///
    /// # Errors
    /// As [`RocksDisk::geometry_of`]. Files that cannot be read are left out.
    pub fn salvage(dir: &Path, found: &mut dyn FnMut(&Path, u64, RecordHeader)) -> Result<()> {
        use std::os::unix::fs::FileExt as _;
        let geometry = Self::geometry_of(dir)?;
        for path in payload_files(dir)? {
            let Ok(file) = fs::File::open(&path) else {
                continue;
            };
            let length = file.metadata().map_or(0, |meta| meta.len());
            let mut page = vec![0; RecordHeader::BYTES];
            let mut offset = 0;
            while offset + RecordHeader::BYTES as u64 <= length
                && file.read_exact_at(&mut page, offset).is_ok()
            {
                offset += match RecordHeader::decode(&page, &geometry) {
                    Ok(header) => {
                        let bytes = super::super::verify::record_bytes(&header) as u64;
                        found(&path, offset, header);
                        bytes
                    }
                    Err(_) => RecordHeader::BYTES as u64,
                };
            }
        }
        Ok(())
    }

    fn new(
        dir: &Path,
        geometry: &KvGeometry,
        capacity_bytes: u64,
        clock: Arc<dyn Clock>,
        access: Access,
        db: Db,
    ) -> RocksDisk {
        RocksDisk {
            dir: dir.to_owned(),
            geometry: geometry.clone(),
            capacity_bytes,
            sizing: Sizing::of(capacity_bytes),
            clock,
            access,
            files_max: files_max(capacity_bytes),
            cleaning: Mutex::new(()),
            commit: Mutex::new(()),
            database: db.dir().to_owned(),
            reading: Reading::new(db.dir()),
            foreground: Foreground::default(),
            db: RwLock::new(Some(db)),
            state: Mutex::new(State {
                table: Table::default(),
                next_place: 1,
                line: Line::default(),
                other_bytes: 0,
                lingering: Lingering::default(),
                makes_holes: true,
                holes_refused: HashMap::new(),
                set_aside: HashMap::new(),
                written_bytes: 0,
                rewritten_bytes: 0,
                dropped: 0,
                unsynced_files: 0,
                is_stuck: false,
                spares: Vec::new(),
                unsure: Unsure::default(),
                unread: Vec::new(),
                leftovers: Vec::new(),
                is_closing: false,
                is_closed: false,
                lock: None,
                place: None,
            }),
            turned: Condvar::new(),
            lane: Mutex::new(()),
        }
    }

    /// Fills the table from the index, and makes index and files agree.
    fn load(&self, mut taken_back: TakenBack) -> Result<()> {
        let guard = self.db();
        let db = guard.as_ref().ok_or_else(Error::closed)?;
        let live = db.live_payload()?.into_iter();
        let (live, strange): (Vec<_>, Vec<_>) = live.partition(|file| file.last <= PLACE_MAX);
        let live: HashMap<u64, db::LivePayload> =
            live.into_iter().map(|file| (file.first, file)).collect();
        let mut state = self.state();
        for file in strange {
            tracing::warn!(file = file.number, "a payload file of no store is dropped");
            state.dropped += 1;
            if self.access == Access::ReadWrite {
                db.drop_payload(file.first, file.last)?;
            }
        }
        let mut changes = db.index_batch();
        for file in live.values() {
            self.reading.files.know(file.first, file.number);
            state.next_place = state.next_place.max(file.last + 1);
            state
                .table
                .add_file(file.first, PayloadFile::new(file.last, file.disk_bytes));
        }
        let mut index_is_new = true;
        for found in db.index_entries(entry::NEXT) {
            let (_, value) = found?;
            index_is_new = false;
            let next = value.as_ref().try_into().map_or(1, u64::from_le_bytes);
            // Else it is damaged, and the files say enough.
            if next <= PLACE_MAX {
                state.next_place = state.next_place.max(next);
            }
        }
        let index = self.load_files(db, &mut state, &live, &mut changes)?;
        let mut unknown: Vec<_> = live
            .values()
            .filter(|file| !index.known.contains(&file.first))
            .collect();
        unknown.sort_by_key(|file| file.first);
        // In the order of writing; each is in memory with its records until it is taken in.
        let directories = unknown
            .chunks(DIRECTORIES_AT_ONCE)
            .flat_map(|files| files.iter().zip(self.directories(db, files)));
        for (file, directory) in directories {
            let uses = index.unreadable.get(&file.first);
            // What cleaning moved into the file is known by its old place, unless it was removed
            // meanwhile: then it must not come back. Of a file that could not be read for a while nobody knows
            // any more: what its entry said went when it was put aside.
            let is_missed = |slot: usize, id: RecordId| match uses {
                // Its entry was damaged. Where the other one is sound, that says what is live.
                Some(Some(uses)) => uses.get(slot).is_some_and(Option::is_some),
                Some(None) => true,
                None => {
                    let was_moved = !(file.first..=file.last).contains(&id.0.get());
                    let is_known_to_be = index_is_new || index.homeless.contains(&id);
                    !was_moved || is_known_to_be || taken_back.firsts.contains(&file.first)
                }
            };
            let aside = self.adopt(&mut state, file, directory, is_missed, &mut changes)?;
            aside.inspect(|name| taken_back.is_aside_again(name));
        }
        state.unread = taken_back.others(&self.dir)?;
        if !state.unread.is_empty() {
            if index_is_new {
                state.next_place += UNREAD_PLACES;
            }
            // The next opening does not see these files' places.
            changes.put(&[entry::NEXT], &state.next_place.to_le_bytes());
        }
        drop(state);
        if self.access == Access::ReadWrite {
            let measured = db.other_bytes();
            self.state().other_bytes = measured.map_err(|error| unreadable(db.dir(), error))?;
            self.apply(changes, true)?;
            taken_back.are_known(&self.dir);
            self.drop_dead_files(db)?;
        }
        Ok(())
    }

    /// Fills the table from the entries of files that are there.
    fn load_files(
        &self,
        db: &Db,
        state: &mut State,
        live: &HashMap<u64, db::LivePayload>,
        changes: &mut IndexBatch<'_>,
    ) -> Result<Loaded> {
        let mut loaded = Loaded::default();
        let mut entries = db.index_entries(entry::FILE).peekable();
        while let Some(found) = entries.next() {
            let (key, value) = found?;
            let Some(first) = entry::file_of_key(&key) else {
                // What became of a file that is not known.
                changes.delete(&key);
                continue;
            };
            let live_key = entry::live_key(first);
            let is_its = |next: &Result<db::KeyValue>| {
                next.as_ref().is_ok_and(|(key, _)| key[..] == live_key)
            };
            let became = entries.next_if(is_its).transpose()?;
            let uses = became.as_ref().map(|(_, value)| entry::decode_live(value));
            let records = entry::decode_file(first, &value);
            match (live.get(&first), records) {
                (Some(file), Some(records))
                    if file.last == image_place(first, records.len() as u32) - 1 =>
                {
                    loaded.known.insert(first);
                    // Without a sound word of what became of them, they are as they were written.
                    let uses = uses.flatten().filter(|uses| uses.len() == records.len());
                    for (slot, record) in (0_u32..).zip(&records) {
                        let last_use_ms = match &uses {
                            Some(uses) => uses[slot as usize],
                            None => Some(record.info.last_use_ms),
                        };
                        let location = Location {
                            file: first,
                            slot,
                            page: record.page,
                            bytes: record.info.bytes,
                        };
                        match last_use_ms {
                            Some(used) => state.table.place(record.info.id, location, used),
                            // Or moved, and durable there.
                            None => state.table.note_removed(location),
                        }
                    }
                }
                (Some(file), _) => {
                    tracing::warn!(
                        file = file.number,
                        "the index entry of a payload file is damaged"
                    );
                    loaded.unreadable.insert(first, uses.flatten());
                }
                (None, records) => {
                    changes.delete(&key);
                    changes.delete(&live_key);
                    let uses = uses.flatten();
                    let was_live = |slot: usize| match &uses {
                        Some(uses) => uses.get(slot).is_some_and(Option::is_some),
                        None => true,
                    };
                    let records = records.unwrap_or_default().into_iter().enumerate();
                    let lost = records.filter(|(slot, _)| was_live(*slot));
                    let before = loaded.homeless.len();
                    loaded
                        .homeless
                        .extend(lost.map(|(_, record)| record.info.id));
                    // Beside a process that writes it is a newer file than those that were looked at, or
                    // one that was dropped since.
                    if self.access == Access::ReadWrite {
                        state.dropped += (loaded.homeless.len() - before) as u64;
                    }
                }
            }
        }
        Ok(loaded)
    }

    /// The directories of some files, read side by side: a disk has an answer for each at about the
    /// same time.
    fn directories(&self, db: &Db, files: &[&db::LivePayload]) -> Vec<Result<Vec<DirectoryEntry>>> {
        let (next, read) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
        let work = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(file) = files.get(number) else {
                    return;
                };
                let directory = insistently(|| self.directory(db, file.last));
                let mut read = read.lock().unwrap_or_else(PoisonError::into_inner);
                read.insert(number, directory);
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..DIRECTORY_READERS.min(files.len()) {
                // Without it the others do all.
                let _ = std::thread::Builder::new()
                    .name("stemkv-open".into())
                    .spawn_scoped(scope, work);
            }
            work();
        });
        let read = read.into_inner().unwrap_or_else(PoisonError::into_inner);
        read.into_values().collect()
    }

    /// The directory at the place `last`.
    ///
    /// # Errors
    /// `Corrupt` where it is damaged, `Unavailable` where it cannot be read.
    pub(super) fn directory(&self, db: &Db, last: u64) -> Result<Vec<DirectoryEntry>> {
        let value = db.value(last)?;
        let value = value.ok_or_else(|| Error::corrupt("a payload file has no directory"))?;
        directory::decode(&value, &self.geometry)
    }

    /// Takes those of a file's records in from its directory that are missed, have no entry
    /// elsewhere and are there still. A file whose directory the medium does not give is put aside, and its
    /// name there is the answer.
    ///
    /// # Errors
    /// `Unavailable` where the system lets nobody read the directory.
    fn adopt(
        &self,
        state: &mut State,
        file: &db::LivePayload,
        directory: Result<Vec<DirectoryEntry>>,
        is_missed: impl Fn(usize, RecordId) -> bool,
        changes: &mut IndexBatch<'_>,
    ) -> Result<Option<PathBuf>> {
        let directory = directory.and_then(|entries| {
            match image_place(file.first, entries.len() as u32) == file.last + 1 {
                true => Ok(entries),
                false => Err(Error::corrupt("a directory is of another file")),
            }
        });
        let entries = match directory {
            Ok(entries) => entries,
            Err(error) if db::is_unreadable(&error) => {
                tracing::warn!(%error, file = file.number, "a payload file cannot be read and is put aside");
                return match self.access {
                    Access::ReadOnly => Ok(None),
                    Access::ReadWrite => {
                        let path = changes.db().payload_path(file.number);
                        put_aside(&self.dir, &path).map(Some)
                    }
                };
            }
            // Not the file's fault: nothing is dropped for it.
            Err(error) if error.kind() == ErrorKind::Unavailable => return Err(error),
            // Dropped by the process that writes.
            Err(error) if self.access == Access::ReadOnly && db::is_missing(&error) => {
                return Ok(None);
            }
            Err(error) => {
                tracing::warn!(%error, file = file.number, "a payload file without a sound directory is dropped");
                state.dropped += 1;
                return Ok(None);
            }
        };
        let mut uses = Vec::with_capacity(entries.len());
        // They had been removed, whatever the index has lost.
        let holes = self.holes_in(&changes.db().payload_path(file.number), &entries);
        for (slot, entry) in (0_u32..).zip(&entries) {
            let is_hole = holes.contains(&(slot as usize));
            let is_taken = is_missed(slot as usize, entry.id)
                && state.table.get(entry.id).is_none()
                && !is_hole;
            uses.push(is_taken.then_some(entry.last_use_ms));
            let location = locate(file.first, slot, entry);
            match is_taken {
                true => state.table.place(entry.id, location, entry.last_use_ms),
                false if is_hole => {}
                // Or there is another one of it.
                false => state.table.note_removed(location),
            }
        }
        let next_place = state.next_place.max(file.last + 1);
        // Of what the index may have of it, nothing stays.
        changes.delete(&entry::live_key(file.first));
        put_file(changes, file.first, &entries, &uses, next_place);
        Ok(None)
    }
}

/// What the index says of the files.
#[derive(Default)]
struct Loaded {
    /// Files that are there and in the table.
    known: HashSet<u64>,
    /// Files that are there and whose entry is damaged, with what became of their records where that
    /// is known.
    unreadable: HashMap<u64, Option<Vec<Option<u64>>>>,
    /// Records whose file is not there.
    homeless: HashSet<RecordId>,
}

#[cfg(test)]
mod tests {
    //! Shown: what an opening makes of index entries that are damaged, strange or left behind. How:
    //! entries are put by hand, below a store that is then opened again.

    use super::*;
    use crate::{Dtype, HostArena, SystemClock};

    const CAPACITY: u64 = 64 << 20;

    fn geometry() -> KvGeometry {
        KvGeometry::gqa(2, 2, 32, Dtype::Bf16, 16).expect("valid")
    }

    fn open(dir: &Path) -> RocksDisk {
        let clock = Arc::new(SystemClock::default());
        RocksDisk::open(dir, &geometry(), CAPACITY, clock).expect("it opens")
    }

    fn slots(arena: &HostArena, keys: std::ops::Range<u8>) -> Vec<Slot> {
        keys.map(|own| test_chunk(arena, Key([255; 32]), Key([own; 32]), 0, 0))
            .collect()
    }

    /// The records by key, with their last uses.
    fn found(disk: &RocksDisk) -> BTreeMap<u8, u64> {
        let mut found = BTreeMap::new();
        let scan = disk.scan(&mut |info| {
            found.insert(info.key.0[0], info.last_use_ms);
        });
        assert_eq!(scan.expect("readable").records, found.len() as u64);
        found
    }

    /// A store of two files with three records each, the second of each removed, the third used at
    /// 7; then what `spoil` makes of its index, opened again. The first places of the files come with
    /// the database.
    fn reopened(
        spoil: impl FnOnce(&mut IndexBatch<'_>, [u64; 2]),
    ) -> (RocksDisk, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("tempdir");
        let arena = HostArena::open(&geometry(), 1 << 20, |_, _| {}).expect("opened");
        let disk = open(dir.path());
        for keys in [0..3, 3..6] {
            let batch = slots(&arena, keys);
            let ids = disk.write(&batch).expect("written").expect("room");
            disk.remove(&ids[1..2]).expect("removed");
            disk.touch(&ids[2..], 7).expect("touched");
        }
        let files: Vec<u64> = disk.state().table.files().map(|(first, _)| first).collect();
        {
            let guard = disk.db();
            let mut changes = guard.as_ref().expect("open").index_batch();
            spoil(&mut changes, files.try_into().expect("two"));
            changes.apply(true).expect("written");
        }
        disk.close().expect("closed");
        (open(dir.path()), dir)
    }

    #[test]
    fn what_became_of_records_is_found_by_the_next_opening() {
        let (disk, _dir) = reopened(|_, _| ());
        let found = found(&disk);
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), [0, 2, 3, 5]);
        assert_eq!((found[&2], found[&5]), (7, 7));
        assert!(found[&0] > 7);
        assert_eq!((disk.usage().records, disk.usage().files), (4, 2));
    }

    #[test]
    fn a_file_whose_entry_is_damaged_is_adopted_with_what_is_live_in_it() {
        for value in [&b""[..], &[0; 8], &[7; 300]] {
            let (disk, dir) = reopened(|changes, files| {
                changes.put(&entry::file_key(files[0]), value);
            });
            let keys: Vec<_> = found(&disk).into_keys().collect();
            assert_eq!(keys, [0, 2, 3, 5]);
            disk.close().expect("closed");
            // What was adopted is in the index.
            assert_eq!(found(&open(dir.path())).len(), 4);
        }
    }

    /// Also where its entry was damaged: what had been removed from it is not live, and may be a hole.
    #[test]
    fn what_was_removed_from_a_file_that_is_adopted_gives_its_space_back() {
        let (disk, _dir) = reopened(|changes, files| {
            changes.put(&entry::file_key(files[0]), b"");
        });
        let state = disk.state();
        let removed = state.table.files().map(|(_, file)| file.removed().count());
        assert_eq!(removed.collect::<Vec<_>>(), [1, 1]);
        drop(state);
        assert!(disk.make_holes(u64::MAX) > 0);
        assert_eq!(found(&disk).into_keys().collect::<Vec<_>>(), [0, 2, 3, 5]);
    }

    #[test]
    fn a_file_without_a_sound_word_of_what_became_of_it_has_all_its_records() {
        let (disk, _dir) = reopened(|changes, files| {
            changes.put(&entry::live_key(files[0]), &[7; 30]);
            changes.put(&entry::file_key(files[1]), b"");
            changes.put(&entry::live_key(files[1]), &[7; 30]);
        });
        let keys: Vec<_> = found(&disk).into_keys().collect();
        assert_eq!(keys, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn entries_of_files_that_are_not_there_go() {
        let (disk, _dir) = reopened(|changes, files| {
            // What became of a file without what is in it; and both of one that is gone.
            changes.put(&entry::live_key(files[0] - 1), &entry::encode_live(&[None]));
            changes.put(&entry::file_key(1 << 40), &entry::encode_file(1 << 40, &[]));
            changes.put(&entry::live_key(1 << 40), &entry::encode_live(&[]));
            changes.put(&entry::file_key(1 << 41), b"damaged");
            changes.put(&entry::live_key(1 << 41), b"damaged");
        });
        assert_eq!(found(&disk).len(), 4);
        let guard = disk.db();
        let entries = guard.as_ref().expect("open").index_entries(entry::FILE);
        // Each of the two files has both.
        assert_eq!(entries.count(), 4);
    }

    #[test]
    fn numbers_that_no_store_comes_to_are_taken_for_damage() {
        // Which no file has, and the index may not have either.
        let (disk, dir) = reopened(|changes, _| {
            changes.put(&[entry::NEXT], &u64::MAX.to_le_bytes());
        });
        let arena = HostArena::open(&geometry(), 1 << 20, |_, _| {}).expect("opened");
        disk.write(&slots(&arena, 6..7))
            .expect("written")
            .expect("room");
        assert_eq!(found(&disk).len(), 5);
        // A sound directory at a place where it would speak of more records than there is memory for; and
        // one at the last place of all.
        let mut entries = {
            let guard = disk.db();
            let db = guard.as_ref().expect("open");
            let last = disk.state().table.files().next().expect("three").1.last;
            disk.directory(db, last).expect("sound")
        };
        // Of a record that the file could hold, and nobody has.
        entries[0].id = RecordId((1 << 50).try_into().expect("not 0"));
        for (first, last) in [(1 << 40, 1 << 59), (1 << 61, u64::MAX)] {
            let path = dir.path().join("strange.sst");
            let mut options = rocksdb::Options::default();
            options.set_compression_type(rocksdb::DBCompressionType::None);
            let mut writer = rocksdb::SstFileWriter::create(&options);
            writer.open(&path).expect("made");
            writer.put(u64::to_be_bytes(first), b"").expect("written");
            let directory = directory::encode(&entries);
            writer
                .put(u64::to_be_bytes(last), directory)
                .expect("written");
            writer.finish().expect("synced");
            let guard = disk.db();
            let db = guard.as_ref().expect("open");
            db.ingest(&[&path]).expect("RocksDB takes it");
        }
        disk.close().expect("closed");
        let disk = open(dir.path());
        assert_eq!(found(&disk).len(), 5);
        let files = disk.db().as_ref().expect("open").live_payload();
        assert_eq!(files.expect("listed").len(), 3, "the strange ones are gone");
        disk.write(&slots(&arena, 7..8))
            .expect("written")
            .expect("room");
        assert_eq!(found(&disk).len(), 6);
    }

    #[test]
    fn the_entries_of_a_file_go_with_it() {
        let (disk, _dir) = reopened(|_, _| ());
        let mut ids = Vec::new();
        disk.scan(&mut |info| ids.push(info.id)).expect("readable");
        disk.remove(&ids).expect("removed");
        assert_eq!(disk.usage().files, 0);
        let guard = disk.db();
        let entries = guard.as_ref().expect("open").index_entries(entry::FILE);
        assert_eq!(entries.count(), 0);
    }
}
