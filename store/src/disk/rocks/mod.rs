//! The disk tier on RocksDB: a payload column family that is a log of ingested SST files, and a
//! small index column family. `docs/format.md` specifies the bytes and the crash contract.
//!
//! | file | question |
//! |---|---|
//! | `batch.rs` | what does a payload file look like? |
//! | `output.rs` | how do the bytes of a payload file get to the disk? |
//! | `sst.rs` | what does RocksDB take for one of its files? |
//! | `line.rs` | in which order do writes become durable? |
//! | `table.rs` | where is every record? |
//! | `db.rs` | what is asked of RocksDB? |
//! | `open.rs` | how does a store come back, also when RocksDB alone would not? |
//! | `space.rs` | what does a store take on disk? |
//! | `clean.rs` | which records are moved so that space comes back? |
//! | `read.rs` | how do bytes come back up? |
//! | `files.rs` | which descriptors of payload files are open? |
//!
//! Locks, in this order: `cleaning` (one at a time moves records), `lane` (one file on its way to the
//! disk), `commit` (one change of index and table at a time, across its sync), the
//! database handle (shared, but for reopening and closing), `state` (short, no I/O).

mod batch;
mod clean;
mod db;
mod files;
mod line;
mod open;
mod output;
mod read;
mod space;
mod sst;
mod table;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use super::direct::DirectFile;
use super::directory::DirectoryEntry;
use super::entry::{self, FILE, FileRecord, META};
use super::manifest::{StoreLock, unreadable, unwritable};
use super::verify::{record_of, seal_record};
use super::{
    BatchId, BatchTooLarge, DiskScan, DiskTier, DiskUsage, META_BYTES_MAX, RecordId, RecordInfo,
};
use crate::{
    Clock, Error, ErrorKind, Filling, HostArena, Key, KvGeometry, RecordHeader, Result, Slot,
};

use batch::{NewRecord, file_bytes_max, lay_out, places};
use clean::{Foreground, files_max};
use db::{Db, IndexBatch, Sizing, payload_dir};
use files::Files;
use line::{Line, Turn, WrittenFile};
pub use read::ReadWay;
use read::Reading;
use space::Lingering;
use table::{Location, PLACE_MAX, PayloadFile, Table, image_place};

/// Files whose index entries may wait for a sync: the next opening may have to read as many
/// directories.
const UNSYNCED_FILES_MAX: u64 = 64;

/// A [`DiskTier`] in a folder, on RocksDB.
///
/// One process at a time has a folder open for writing; others may read it beside
/// ([`RocksDisk::open_read_only`]).
pub struct RocksDisk {
    dir: PathBuf,
    geometry: KvGeometry,
    capacity_bytes: u64,
    sizing: Sizing,
    clock: Arc<dyn Clock>,
    access: Access,
    /// Payload files over which small ones are put together.
    files_max: usize,
    cleaning: Mutex<()>,
    commit: Mutex<()>,
    /// The database's folder.
    database: PathBuf,
    /// `None` once closed, or while it cannot be opened again after a failure.
    db: RwLock<Option<Db>>,
    reading: Reading,
    foreground: Foreground,
    state: Mutex<State>,
    turned: Condvar,
    /// Held while the bytes of a payload file go to the disk and, where it is its turn, while it is
    /// committed: one file after the other, each as fast as the disk can. Before `commit`.
    lane: Mutex<()>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    ReadWrite,
    ReadOnly,
}

struct State {
    table: Table,
    next_place: u64,
    line: Line,
    /// Of everything beside the payload files, as last measured.
    other_bytes: u64,
    lingering: Lingering,
    /// Files that cleaning could not read, until when it leaves them alone.
    set_aside: HashMap<u64, Duration>,
    written_bytes: u64,
    rewritten_bytes: u64,
    /// Records that were left out at opening.
    dropped: u64,
    /// Files whose index entries a power cut may take: the next opening reads their directories.
    unsynced_files: u64,
    /// A write to the index failed: RocksDB takes no more until it is opened again.
    is_stuck: bool,
    /// Second names of files whose ingestion failed, in their order.
    spares: Vec<PathBuf>,
    /// What the index may have of changes that were answered with an error.
    unsure: Unsure,
    /// Nothing begins any more; what has begun is waited for.
    is_closing: bool,
    is_closed: bool,
    lock: Option<StoreLock>,
}

/// A write to the index that failed may be in its log all the same, and be there again once RocksDB is
/// reopened: the table, which has nothing of it, says what is right.
#[derive(Default)]
struct Unsure {
    /// Files that are not in the table, and whose entries must go before they do: what was moved into
    /// one is known by that entry, until its old file's says again that it is there.
    files: BTreeSet<u64>,
    /// Files whose records were about to be moved or removed.
    left: BTreeSet<u64>,
}

impl RocksDisk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn committing(&self) -> MutexGuard<'_, ()> {
        self.commit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn db(&self) -> RwLockReadGuard<'_, Option<Db>> {
        self.db.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_writable(&self) -> Result<()> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(Error::unavailable("the store was opened for reading alone")),
        }
    }

    /// The folder of files that are being written.
    fn staging_dir(&self) -> PathBuf {
        self.dir.join("staging")
    }

    /// The store's folder.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The geometry of its records.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// How long RocksDB itself took of the last opening.
    pub fn database_opened_in(&self) -> Duration {
        self.db().as_ref().map_or(Duration::ZERO, Db::opened_in)
    }

    /// The process that has the store in `dir` open for writing, if one has.
    pub fn holder(dir: &Path) -> Option<u32> {
        StoreLock::holder(dir)
    }

    /// Writes records as one file and makes it and its index entries durable, in turn.
    fn write_records(
        &self,
        turn: Turn<'_>,
        records: Vec<NewRecord<'_>>,
        moved_from: Option<HashMap<RecordId, u64>>,
    ) -> Result<Vec<DirectoryEntry>> {
        let first = turn.first;
        let (mut layout, entries) = lay_out(first, records)?;
        let staging = self.staging_dir();
        let path = staging.join(format!("{first:020}.sst"));
        let lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        // There already, unless somebody took it away.
        let _ = fs::create_dir(staging);
        let disk_bytes = layout.write(&path).inspect_err(|_| {
            let _ = fs::remove_file(&path);
        })?;
        let file = WrittenFile {
            first,
            path,
            entries,
            disk_bytes,
            reserved_bytes: turn.reserved_bytes,
            moved_from,
        };
        turn.commit(file, lane)
    }

    /// Makes files a part of the store, together or not at all, and puts their records into the
    /// index.
    ///
    /// They are durable once RocksDB has them, before their index entries are: a file without an
    /// entry is adopted from its directory. So the log of the index is synced only now and then, for
    /// a quick opening; removing syncs it always, and what is in it before the removal with it.
    fn commit_files(&self, files: &[WrittenFile]) -> Result<()> {
        let _committing = self.committing();
        self.unstick()?;
        let guard = self.db();
        let db = guard.as_ref().ok_or_else(Error::closed)?;
        let inode = |file: &WrittenFile| {
            let meta = fs::metadata(&file.path).map_err(|error| unreadable(&file.path, error));
            meta.map(|meta| meta.ino())
        };
        let inodes = files.iter().map(inode).collect::<Result<Vec<_>>>()?;
        let paths: Vec<&Path> = files.iter().map(|file| &*file.path).collect();
        db.ingest(&paths).inspect_err(|_| self.keep_spares(files))?;
        for (file, inode) in files.iter().zip(inodes) {
            self.reading.files.taken_in(file.first, inode);
        }
        if db.has_undroppable_payload() {
            tracing::error!("a payload file landed on level 0: its space cannot be given back");
        }
        let mut changes = db.index_batch();
        let mut placed = Vec::new();
        let mut left: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        let sync = {
            let mut state = self.state();
            for file in files {
                let mut uses = Vec::with_capacity(file.entries.len());
                for (slot, entry) in (0_u32..).zip(&file.entries) {
                    let now = state.table.get(entry.id);
                    let is_wanted = file.moved_from.as_ref().is_none_or(|from| {
                        now.is_some_and(|now| from.get(&entry.id) == Some(&now.file))
                    });
                    // It may have been touched while it was moved.
                    let last_use_ms = state.table.last_use_ms(entry.id);
                    let last_use_ms = last_use_ms.unwrap_or(entry.last_use_ms);
                    uses.push(is_wanted.then_some(last_use_ms));
                    if is_wanted {
                        placed.push((entry.id, locate(file.first, slot, entry), last_use_ms));
                        if let Some(now) = now {
                            left.entry(now.file).or_default().push(now.slot);
                        }
                    }
                }
                put_file(
                    &mut changes,
                    file.first,
                    &file.entries,
                    &uses,
                    state.next_place,
                );
            }
            for (file, slots) in &left {
                let entry = state.table.live_entry(*file, slots);
                changes.put(&entry::live_key(*file), &entry);
            }
            state.unsynced_files += files.len() as u64;
            state.unsynced_files >= UNSYNCED_FILES_MAX
        };
        if let Err(error) = self.apply(changes, sync) {
            // They go when RocksDB is opened again, once the index has nothing of them any more. Where it
            // comes to no reopening here, the next opening of the store finds all of the change, or none.
            let mut state = self.state();
            for file in files {
                state.lingering.add(file.first, file.disk_bytes);
                state.unsure.files.insert(file.first);
            }
            state.unsure.left.extend(left.into_keys());
            return Err(error);
        }
        let mut state = self.state();
        for file in files {
            state.line.release(file.reserved_bytes);
            state
                .table
                .add_file(file.first, PayloadFile::new(file.last(), file.disk_bytes));
        }
        for (id, location, last_use_ms) in placed {
            state.table.place(id, location, last_use_ms);
        }
        Ok(())
    }

    /// After a failed write RocksDB refuses all others until the database is opened again: does
    /// that. Where that fails too (the disk is full, say), records can be read all the same if they
    /// can be at all, and the next call that changes something tries again. The caller holds
    /// `commit`.
    fn unstick(&self) -> Result<()> {
        if !self.state().is_stuck {
            return Ok(());
        }
        let mut guard = self.db.write().unwrap_or_else(PoisonError::into_inner);
        if self.state().is_closed {
            return Err(Error::closed());
        }
        drop(guard.take());
        match self.open_again() {
            Ok(db) => {
                *guard = Some(db);
                let mut state = self.state();
                state.lingering.look_for_strangers();
                state.is_stuck = false;
                Ok(())
            }
            Err(error) => {
                tracing::warn!(%error, "the database cannot be opened again now");
                *guard = Db::open_read_only(&self.database).ok();
                Err(error)
            }
        }
    }

    /// RocksDB deletes files whose ingestion failed, though its manifest may have them already, and
    /// would not open without them.
    fn keep_spares(&self, files: &[WrittenFile]) {
        let spares = files.iter().filter_map(|file| {
            let spare = file.path.with_extension("spare");
            // Without it the next opening of the store rebuilds it.
            fs::hard_link(&file.path, &spare).ok().map(|()| spare)
        });
        let spares: Vec<_> = spares.collect();
        let mut state = self.state();
        state.spares = spares;
        state.is_stuck = true;
    }

    fn open_again(&self) -> Result<Db> {
        let db =
            Db::open(&self.database, self.sizing).or_else(|error| self.open_with_spares(error))?;
        for spare in std::mem::take(&mut self.state().spares) {
            let _ = fs::remove_file(spare);
        }
        self.make_sure(&db)?;
        for file in db.live_payload()? {
            // Its call was answered with an error: it must not come back.
            if self.state().table.file(file.first).is_none() {
                db.drop_payload(file.first, file.last)?;
            }
        }
        Ok(db)
    }

    /// Has the index say what the table says, durably, of all that a failed write to it may have changed.
    fn make_sure(&self, db: &Db) -> Result<()> {
        let mut changes = db.index_batch();
        {
            let state = self.state();
            for first in &state.unsure.files {
                changes.delete(&entry::file_key(*first));
                changes.delete(&entry::live_key(*first));
            }
            for first in &state.unsure.left {
                let entry = state.table.live_entry(*first, &[]);
                changes.put(&entry::live_key(*first), &entry);
            }
        }
        self.apply(changes, true)?;
        self.state().unsure = Unsure::default();
        Ok(())
    }

    /// Opens the database for want of files whose ingestion failed. They were given consecutive numbers,
    /// in their order; of which of them `error` tells is not known. RocksDB compares each with what its
    /// manifest says of it. What is put back is dropped afterwards.
    fn open_with_spares(&self, mut error: Error) -> Result<Db> {
        let Some(missing) = db::missing_payload(&error, &self.database) else {
            return Err(error);
        };
        let spares = self.state().spares.clone();
        for before in 0..spares.len() as u64 {
            let numbers = missing.saturating_sub(before)..;
            let paths = numbers.map(|number| db::payload_path(&self.database, number));
            let mut linked = Vec::new();
            let put_back = spares.iter().zip(paths).try_for_each(|(spare, path)| {
                fs::hard_link(spare, &path)?;
                linked.push(path);
                Ok::<_, io::Error>(())
            });
            let opened = match put_back {
                Ok(()) => Db::open(&self.database, self.sizing),
                Err(cause) => Err(unwritable(&self.database, cause)),
            };
            error = match opened {
                Ok(db) => return Ok(db),
                Err(error) => error,
            };
            for path in linked {
                let _ = fs::remove_file(path);
            }
        }
        Err(error)
    }

    /// Why there is no database.
    fn no_database(&self) -> Error {
        match self.state().is_closed {
            true => Error::closed(),
            false => Error::unavailable("the database could not be opened again after a failure"),
        }
    }

    /// Applies changes to the index, and measures what it takes now; a failure asks for a reopening. The
    /// caller holds `commit`.
    fn apply(&self, changes: IndexBatch<'_>, sync: bool) -> Result<()> {
        let db = changes.db();
        let applied = changes.apply(sync);
        let other_bytes = db.other_bytes();
        let mut state = self.state();
        state.other_bytes = other_bytes;
        match applied {
            // The log is one file after the other: what was written before is synced too.
            Ok(()) if sync => state.unsynced_files = 0,
            Ok(()) => {}
            Err(_) => state.is_stuck = true,
        }
        applied
    }
}

fn locate(first: u64, slot: u32, entry: &DirectoryEntry) -> Location {
    Location {
        file: first,
        slot,
        page: entry.page,
        bytes: super::verify::record_bytes(&entry.header) as u32,
    }
}

/// Puts a file into the index, with the records of it that are live (`uses`: there).
fn put_file(
    changes: &mut IndexBatch<'_>,
    first: u64,
    entries: &[DirectoryEntry],
    uses: &[Option<u64>],
    next_place: u64,
) {
    let records: Vec<_> = entries.iter().map(file_record).collect();
    changes.put(
        &entry::file_key(first),
        &entry::encode_file(first, &records),
    );
    let as_written =
        |(used, entry): (&Option<u64>, &DirectoryEntry)| *used == Some(entry.last_use_ms);
    if !uses.iter().zip(entries).all(as_written) {
        changes.put(&entry::live_key(first), &entry::encode_live(uses));
    }
    changes.put(&[entry::NEXT], &next_place.to_le_bytes());
}

fn file_record(entry: &DirectoryEntry) -> FileRecord {
    let header = &entry.header;
    FileRecord {
        info: RecordInfo {
            id: entry.id,
            namespace: header.namespace,
            parent: header.parent,
            key: header.key,
            depth: header.depth,
            bytes: super::verify::record_bytes(header) as u32,
            last_use_ms: entry.last_use_ms,
        },
        page: entry.page,
    }
}

impl DiskTier for RocksDisk {
    fn write_after(
        &self,
        batch: &[Slot],
        after: Option<BatchId>,
        begun: &mut dyn FnMut(BatchId),
    ) -> Result<Result<Vec<RecordId>, BatchTooLarge>> {
        self.check_writable()?;
        if self.state().is_closing {
            return Err(Error::closed());
        }
        if batch.is_empty() {
            return Ok(Ok(Vec::new()));
        }
        let records = batch.iter().map(record_of).collect::<Result<Vec<_>>>()?;
        let headers: Vec<_> = records.iter().map(|(header, _)| header).collect();
        if let Err(error) = self.merge_small_files() {
            tracing::warn!(%error, "small files were not put together");
        }
        let after = after.map(|after| after.0);
        let turn = match self.begin(&headers, self.reserve_bytes(), after)? {
            Ok(turn) => turn,
            Err(short) => {
                return Ok(Err(BatchTooLarge {
                    missing_bytes: self.bytes_to_go(short.missing_bytes),
                }));
            }
        };
        begun(BatchId(turn.number));
        let now = self.clock.unix_ms();
        let records: Vec<_> = (0_u32..)
            .zip(records)
            .map(|(slot, (header, image))| {
                // Where it is written first is a number that no other record ever has.
                let place = image_place(turn.first, slot)
                    .try_into()
                    .expect("places start at 1");
                NewRecord {
                    id: RecordId(place),
                    last_use_ms: now,
                    header,
                    image,
                }
            })
            .collect();
        let bytes: u64 = records.iter().map(|record| record.image.len() as u64).sum();
        let entries = self.write_records(turn, records, None)?;
        self.state().written_bytes += bytes;
        Ok(Ok(entries.into_iter().map(|entry| entry.id).collect()))
    }

    fn attach(&self, arena: &HostArena) {
        self.reading.direct.attach(arena);
    }

    fn read(&self, reads: Vec<(RecordInfo, Filling)>, answer: &mut dyn FnMut(usize, Result<Slot>)) {
        let _foreground = self.foreground.begin();
        match &*self.db() {
            Some(db) => self.read_records(db, reads, answer),
            None => {
                for (i, (_, slot)) in reads.into_iter().enumerate() {
                    drop(slot);
                    answer(i, Err(self.no_database()));
                }
            }
        }
    }

    fn image_bytes(&self, info: &RecordInfo) -> Option<u32> {
        let location = self.state().table.get(info.id);
        location.map(|location| location.bytes)
    }

    fn remove(&self, ids: &[RecordId]) -> Result<()> {
        self.check_writable()?;
        let _committing = self.committing();
        self.unstick()?;
        let guard = self.db();
        let db = guard.as_ref().ok_or_else(Error::closed)?;
        let known: Vec<_> = {
            let state = self.state();
            ids.iter()
                .filter_map(|&id| Some((id, state.table.get(id)?)))
                .collect()
        };
        let mut left: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for (_, location) in &known {
            left.entry(location.file).or_default().push(location.slot);
        }
        let mut changes = db.index_batch();
        for (file, slots) in &left {
            let entry = self.state().table.live_entry(*file, slots);
            changes.put(&entry::live_key(*file), &entry);
        }
        self.apply(changes, true)
            .inspect_err(|_| self.state().unsure.left.extend(left.into_keys()))?;
        let mut state = self.state();
        for (id, _) in known {
            state.table.take(id);
        }
        drop(state);
        self.drop_dead_files(db)
    }

    fn reclaim(&self, bytes: u64) -> Result<u64> {
        self.check_writable()?;
        self.clean(bytes)
    }

    fn touch(&self, ids: &[RecordId], last_use_ms: u64) -> Result<()> {
        self.check_writable()?;
        let _committing = self.committing();
        self.unstick()?;
        let guard = self.db();
        let db = guard.as_ref().ok_or_else(Error::closed)?;
        let mut changes = db.index_batch();
        {
            let mut state = self.state();
            let touched = ids
                .iter()
                .filter_map(|id| state.table.touch(*id, last_use_ms));
            let files: BTreeSet<u64> = touched.collect();
            for file in files {
                changes.put(&entry::live_key(file), &state.table.live_entry(file, &[]));
            }
        }
        self.apply(changes, false)
    }

    fn scan(&self, visit: &mut dyn FnMut(RecordInfo)) -> Result<DiskScan> {
        let guard = self.db();
        let db = guard.as_ref().ok_or_else(|| self.no_database())?;
        let dropped = self.state().dropped;
        let mut scan = DiskScan {
            records: 0,
            dropped,
        };
        for found in db.index_entries(FILE) {
            let (key, value) = found?;
            // Else it says what became of a file's records, which is in the table.
            let Some(first) = entry::file_of_key(&key) else {
                continue;
            };
            let Some(mut records) = entry::decode_file(first, &value) else {
                scan.dropped += 1;
                continue;
            };
            {
                let state = self.state();
                let Some(file) = state.table.file(first) else {
                    continue;
                };
                let mut slot = 0;
                records.retain_mut(|record| {
                    let last_use_ms = file.last_use_ms(slot);
                    slot += 1;
                    record.info.last_use_ms = last_use_ms.unwrap_or(0);
                    last_use_ms.is_some()
                });
            }
            for record in records {
                scan.records += 1;
                visit(record.info);
            }
        }
        Ok(scan)
    }

    fn put_meta(&self, key: &Key, value: &[u8]) -> Result<()> {
        self.check_writable()?;
        if value.len() > META_BYTES_MAX {
            return Err(Error::invalid("a meta value is too long")
                .with("bytes", value.len())
                .with("bytes_max", META_BYTES_MAX));
        }
        let _committing = self.committing();
        self.unstick()?;
        let guard = self.db();
        let db = guard.as_ref().ok_or_else(Error::closed)?;
        // It passes through the log, a memtable and a table file.
        if self.free_bytes(&self.state()) < 3 * value.len() as u64 {
            return Err(Error::busy("the store is full: a meta value does not fit")
                .with("bytes", value.len()));
        }
        let mut changes = db.index_batch();
        match value.is_empty() {
            true => changes.delete(&entry::meta_key(key)),
            false => changes.put(&entry::meta_key(key), value),
        }
        self.apply(changes, true)
    }

    fn scan_meta(&self, visit: &mut dyn FnMut(Key, &[u8])) -> Result<()> {
        let guard = self.db();
        let db = guard.as_ref().ok_or_else(|| self.no_database())?;
        for meta in db.index_entries(META) {
            let (key, value) = meta?;
            if let Some(key) = entry::meta_of_key(&key) {
                visit(key, &value);
            }
        }
        Ok(())
    }

    fn usage(&self) -> DiskUsage {
        let state = self.state();
        DiskUsage {
            capacity_bytes: self.capacity_bytes,
            used_bytes: self.used_bytes(&state),
            live_bytes: state.table.live_bytes(),
            records: state.table.len() as u64,
            files: state.table.file_count() as u64,
            written_bytes: state.written_bytes,
            rewritten_bytes: state.rewritten_bytes,
        }
    }

    fn close(&self) -> Result<()> {
        self.end_line();
        let _committing = self.committing();
        if self.state().is_closed {
            return Ok(());
        }
        // What can be closed in order comes back in order.
        let unstuck = self.unstick();
        self.state().is_closed = true;
        let db = self
            .db
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let synced = match (db, self.access) {
            (Some(db), Access::ReadWrite) => unstuck.and_then(|()| db.sync()),
            _ => unstuck,
        };
        self.reading.files.close();
        // The database is closed by now; only then may another process have the folder.
        self.state().lock = None;
        synced
    }
}

impl std::fmt::Debug for RocksDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RocksDisk")
            .field("dir", &self.dir)
            .field("usage", &self.usage())
            .finish_non_exhaustive()
    }
}

/// A chunk of a test, every byte of it `byte`, of the root `Key([255; 32])`.
#[cfg(test)]
fn test_chunk(arena: &crate::HostArena, parent: Key, key: Key, depth: u32, byte: u8) -> Slot {
    let geometry = arena.geometry();
    let slots = arena.allocate(geometry.payload_bytes(), 1);
    let mut slot = slots.and_then(|mut slots| slots.pop()).expect("room");
    let payload = &mut slot.image_mut().expect("ours")[RecordHeader::BYTES..];
    payload.fill(byte);
    let sum = crate::Checksummer::of(&payload[..geometry.slab_bytes()]);
    for layer in geometry.layer_ids() {
        slot.set_slab(layer, sum);
    }
    let header = RecordHeader {
        namespace: Key([255; 32]),
        parent,
        key,
        depth,
        tokens: geometry.block_tokens,
        geometry: geometry.fingerprint(),
        layers: 0..geometry.layers,
        codec: crate::CodecId::Raw,
        slabs: Vec::new(),
    };
    slot.seal(header).expect("sealed")
}
