//! The disk tier on RocksDB: a payload column family that is a log of ingested SST files, and a
//! small index column family. `docs/format.md` specifies the bytes and the crash contract.
//!
//! | file | question |
//! |---|---|
//! | `batch.rs` | what does a payload file look like? |
//! | `output.rs` | how do the bytes of a payload file get to the disk? |
//! | `sst.rs` | what does RocksDB take for one of its files? |
//! | `line.rs` | in which order do writes become durable? |
//! | `commit.rs` | how does a file become a part of the store? |
//! | `reopen.rs` | how does an open store go on after a write that failed? |
//! | `table.rs` | where is every record? |
//! | `db.rs` | what is asked of RocksDB? |
//! | `folder.rs` | what is in a store's folder? |
//! | `open.rs` | how does a store come back? |
//! | `rebuild.rs` | how does it when RocksDB alone would not? |
//! | `unread.rs` | what becomes of payload files that cannot be read now? |
//! | `close.rs` | how does it end, also while a call hangs? |
//! | `space.rs` | what does a store take on disk? |
//! | `holes.rs` | how does the space of removed records come back without moving others? |
//! | `clean.rs` | which files are emptied so that space comes back? |
//! | `moving.rs` | how do records get from one file to another? |
//! | `read.rs` | how do bytes come back up? |
//! | `files.rs` | which descriptors of payload files are open? |
//!
//! Locks, in this order: `cleaning` (one at a time moves records), `lane` (one file on its way to the
//! disk), `commit` (one change of index and table at a time, across its sync), the
//! database handle (shared, but for reopening and closing), `state` (short, no I/O).

mod batch;
mod clean;
mod close;
mod commit;
mod db;
mod files;
mod folder;
mod holes;
mod line;
mod moving;
mod open;
mod output;
mod read;
mod rebuild;
mod reopen;
mod space;
mod sst;
mod table;
mod unread;

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
use super::manifest::{StoreLock, make_folder, sync_folder, unreadable, unwritable, whole_path};
use super::verify::{record_of, seal_record};
use super::{
    BatchId, BatchTooLarge, DiskScan, DiskTier, DiskUsage, META_BYTES_MAX, RecordId, RecordInfo,
};
use crate::{
    Clock, Error, ErrorKind, Filling, HostArena, Key, KvGeometry, RecordHeader, Result, Slot,
};

use batch::{NewRecord, file_bytes_max, lay_out, places};
use clean::{Foreground, files_max};
use close::CLOSE_LIMIT;
use db::{Db, IndexBatch, Sizing, payload_dir};
use files::Files;
use line::{Line, Turn, WrittenFile};
pub use read::ReadWay;
use read::Reading;
use reopen::Unsure;
use space::Lingering;
use table::{Location, PLACE_MAX, PayloadFile, Table, image_place};

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
    /// As far as is known, the file system can.
    makes_holes: bool,
    /// Files in which a hole could not be made, until when that is not tried again.
    holes_refused: HashMap<u64, Duration>,
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
    /// What the index may have of changes that were answered with an error.
    unsure: Unsure,
    /// Second names of files whose ingestion failed, in their order, and their bytes.
    spares: Vec<(PathBuf, u64)>,
    /// Payload files that could not be read, or taken in, at opening, with their bytes.
    unread: Vec<(PathBuf, u64)>,
    /// Files that should be gone and could not be removed, with their bytes.
    leftovers: Vec<(PathBuf, u64)>,
    /// Nothing begins any more; what has begun is waited for.
    is_closing: bool,
    is_closed: bool,
    lock: Option<StoreLock>,
    /// The database's folder, while the store is open for writing: held, so that no other gets its number.
    place: Option<Arc<fs::File>>,
}

impl RocksDisk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn committing(&self) -> MutexGuard<'_, ()> {
        self.commit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `commit`, for a change of what the store holds.
    ///
    /// # Errors
    /// `Unavailable` where nothing can be changed now.
    fn begin_change(&self) -> Result<MutexGuard<'_, ()>> {
        let committing = self.committing();
        self.check_place()?;
        self.unstick()?;
        Ok(committing)
    }

    /// Is the folder that was opened still where its path leads? What is there else is not ours: the folder
    /// below a disk that was unmounted, say, or the store of whoever started anew.
    ///
    /// # Errors
    /// `Unavailable` where it is not.
    fn check_place(&self) -> Result<()> {
        let place = self.state().place.clone();
        match place.is_none_or(|place| folder::is_at(&place, &self.database)) {
            true => Ok(()),
            false => Err(Error::unavailable(
                "the store's folder was taken away, or another one is in its place: put it back, or open the store \
                 again",
            )
            .with("path", self.dir.display())),
        }
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
        let records: Vec<_> = turn
            .ids()
            .zip(records)
            .map(|(id, (header, image))| NewRecord {
                id,
                last_use_ms: now,
                header,
                image,
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
        let guard = self.db();
        // A close waits for those that have begun, and would for ever if others went on to.
        let is_closing = self.state().is_closing;
        match guard.as_ref().filter(|_| !is_closing) {
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
        let _committing = self.begin_change()?;
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

    fn drop_unread(&self) -> Result<u64> {
        self.check_writable()?;
        Ok(self.give_up_unread())
    }

    fn touch(&self, ids: &[RecordId], last_use_ms: u64) -> Result<()> {
        self.check_writable()?;
        let _committing = self.begin_change()?;
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
        let _committing = self.begin_change()?;
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
            unread_files: state.unread.len() as u64,
            unread_bytes: state.unread.iter().map(|(_, bytes)| bytes).sum(),
            read_depth: self.reading.direct.depth() as u64,
        }
    }

    fn close(&self) -> Result<()> {
        self.close_within(CLOSE_LIMIT)
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
