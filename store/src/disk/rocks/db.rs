//! RocksDB as the tier uses it: a payload column family that is a log of ingested SST files, and a
//! small index column family.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBPath,
    DBPinnableSlice, Direction, IngestExternalFileOptions, IteratorMode, LogLevel, Options,
    ReadOptions, WriteBatch, WriteOptions,
};

use crate::disk::entry::{self, FileRecord};
use crate::disk::manifest::{sync_folder, unwritable};
use crate::{Error, Result};

const PAYLOAD: &str = "payload";
const INDEX: &str = "index";

/// Descriptors that RocksDB may hold: reads go through the tier's own.
const OPEN_FILES_MAX: i32 = 256;

/// Sizes that follow from the capacity, so that a small store keeps small files beside its payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizing {
    write_buffer_bytes: u64,
    manifest_bytes_max: u64,
}

impl Sizing {
    pub(super) fn of(capacity_bytes: u64) -> Sizing {
        Sizing {
            write_buffer_bytes: (capacity_bytes / 512).clamp(64 << 10, 8 << 20),
            manifest_bytes_max: (capacity_bytes / 256).clamp(64 << 10, 16 << 20),
        }
    }

    /// Bytes by which the files beside the payload may grow between two measurements: two write
    /// buffers and their logs, a second manifest, and the index column family written once more by
    /// a compaction.
    pub(super) fn growth_bytes(&self, index_bytes: u64) -> u64 {
        4 * self.write_buffer_bytes + self.manifest_bytes_max + index_bytes
    }
}

/// A payload file as RocksDB knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LivePayload {
    /// The smallest key in it.
    pub(super) first: u64,
    /// The largest key: its directory's place.
    pub(super) last: u64,
    pub(super) number: u64,
    pub(super) disk_bytes: u64,
}

/// A key and its value.
pub(super) type KeyValue = (Box<[u8]>, Box<[u8]>);

pub(super) struct Db {
    db: DB,
    dir: PathBuf,
    opened_in: Duration,
}

/// Is an opening refused because of what is in the folder, and not of what is around it?
pub(super) fn is_damage(error: &Error) -> bool {
    use rocksdb::ErrorKind::{Corruption, InvalidArgument};
    let source =
        std::error::Error::source(error).and_then(|source| source.downcast_ref::<rocksdb::Error>());
    source.is_some_and(|error| {
        let text = error.to_string();
        // The first is said where a file could be opened at the second attempt and not at the first: it is
        // opened the same way both times here. The second where the database's folder may not be listed.
        let refused = ["Direct I/O is not supported", "wal_dir not found"];
        if refused.iter().any(|words| text.contains(words)) {
            return false;
        }
        // RocksDB calls it corruption, too, where the system refused to open or read a file, and not found
        // where it refused to list a folder.
        match text.contains("IO error") {
            true => text.contains("No such file"),
            false => matches!(error.kind(), Corruption | InvalidArgument),
        }
    })
}

/// Is a file refused that may be sound: for places, say, which another one has?
pub(super) fn is_refused(error: &Error) -> bool {
    let source =
        std::error::Error::source(error).and_then(|source| source.downcast_ref::<rocksdb::Error>());
    let kind = source.map(rocksdb::Error::kind);
    is_damage(error) && kind == Some(rocksdb::ErrorKind::InvalidArgument)
}

/// Is it for want of a file?
pub(super) fn is_missing(error: &Error) -> bool {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes
        .filter_map(|cause| cause.downcast_ref::<rocksdb::Error>())
        .any(|error| error.as_ref().contains("No such file"))
}

/// Did the medium not give what was read (`EIO`)? A write that failed is none.
pub(super) fn is_unreadable(error: &Error) -> bool {
    let source =
        std::error::Error::source(error).and_then(|source| source.downcast_ref::<rocksdb::Error>());
    let is_rocksdbs = source.is_some_and(|error| {
        // RocksDB gives no number, but the system's words.
        let text = error.to_string();
        let reading = [
            "While pread",
            "While reading",
            "for random read",
            "sequentially read",
        ];
        text.contains(IO_ERROR) && reading.iter().any(|what| text.contains(what))
    });
    is_rocksdbs || error.is_unreadable()
}

/// The system's words for `EIO`.
const IO_ERROR: &str = "Input/output error";

/// Can an opening not go on with what is in the folder, and could without it?
pub(super) fn is_lost(error: &Error) -> bool {
    is_damage(error) || is_unreadable(error)
}

pub(super) fn unavailable(what: &str) -> impl FnOnce(rocksdb::Error) -> Error + '_ {
    move |error| Error::unavailable(what).caused_by(error)
}

/// Options of the payload column family, whose files come by ingestion alone.
fn payload_options() -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.disable_cache();
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_compression_type(DBCompressionType::None);
    options.set_disable_auto_compactions(true);
    options.set_write_buffer_size(64 << 10);
    options
}

fn index_options(sizing: Sizing) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_size(16 << 10);
    blocks.set_block_cache(&Cache::new_lru_cache(8 << 20));
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_compression_type(DBCompressionType::None);
    options.set_write_buffer_size(sizing.write_buffer_bytes as usize);
    options.set_max_write_buffer_number(2);
    options.set_target_file_size_base(sizing.write_buffer_bytes.max(1 << 20));
    options
}

fn db_options(sizing: Sizing) -> Result<Options> {
    // Without preallocation, which would count as used bytes and has no setter of its own.
    let mut options = Options::default()
        .get_options_from_string("allow_fallocate=false;max_open_files=256")
        .map_err(|e| Error::internal("RocksDB refuses our options").caused_by(e))?;
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_max_total_wal_size(2 * sizing.write_buffer_bytes);
    options.set_max_manifest_file_size(sizing.manifest_bytes_max as usize);
    options.set_log_level(LogLevel::Fatal);
    options.set_keep_log_file_num(1);
    options.set_max_log_file_size(64 << 10);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options.set_skip_stats_update_on_db_open(true);
    options.set_max_background_jobs(2);
    Ok(options)
}

fn column_families(dir: &Path, sizing: Sizing) -> Result<[ColumnFamilyDescriptor; 3]> {
    let mut payload = payload_options();
    let path = DBPath::new(payload_dir(dir), u64::MAX)
        .map_err(|e| Error::internal("RocksDB refuses the payload's folder").caused_by(e))?;
    payload.set_cf_paths(&[path]);
    Ok([
        ColumnFamilyDescriptor::new("default", Options::default()),
        ColumnFamilyDescriptor::new(PAYLOAD, payload),
        ColumnFamilyDescriptor::new(INDEX, index_options(sizing)),
    ])
}

/// The folder of the payload files of the database in `dir`.
pub(super) fn payload_dir(dir: &Path) -> PathBuf {
    dir.join("payload")
}

/// The path of a payload file of the database in `dir`.
pub(super) fn payload_path(dir: &Path, number: u64) -> PathBuf {
    payload_dir(dir).join(format!("{number:06}.sst"))
}

/// The number of the payload file for want of which the database in `dir` does not open.
pub(super) fn missing_payload(error: &Error, dir: &Path) -> Option<u64> {
    let text = std::error::Error::source(error)?.to_string();
    let folder = format!("{}/", payload_dir(dir).display());
    let (name, why) = text.split_once(&folder)?.1.split_once(".sst")?;
    why.contains("No such file").then(|| name.parse().ok())?
}

impl Db {
    /// Opens or makes the database in `dir`.
    ///
    /// # Errors
    /// `Unavailable` where RocksDB refuses: a file is missing, cut short or damaged.
    pub(super) fn open(dir: &Path, sizing: Sizing) -> Result<Db> {
        let begun = Instant::now();
        let db = DB::open_cf_descriptors(&db_options(sizing)?, dir, column_families(dir, sizing)?)
            .map_err(unavailable("cannot open the store's database"))?;
        // RocksDB syncs what it puts into its folders, but not the folders' own names.
        for folder in [Some(dir), dir.parent()].into_iter().flatten() {
            sync_folder(folder).map_err(|error| unwritable(folder, error))?;
        }
        Ok(Db {
            db,
            dir: dir.to_owned(),
            opened_in: begun.elapsed(),
        })
    }

    /// Opens the database in `dir` as it is now, beside a process that writes.
    ///
    /// # Errors
    /// As [`Db::open`].
    pub(super) fn open_read_only(dir: &Path) -> Result<Db> {
        let sizing = Sizing::of(0);
        let mut options = db_options(sizing)?;
        options.create_if_missing(false);
        options.create_missing_column_families(false);
        let families = column_families(dir, sizing)?;
        let begun = Instant::now();
        let db = DB::open_cf_descriptors_read_only(&options, dir, families, false)
            .map_err(unavailable("cannot open the store's database for reading"))?;
        Ok(Db {
            db,
            dir: dir.to_owned(),
            opened_in: begun.elapsed(),
        })
    }

    /// The path of a payload file.
    pub(super) fn payload_path(&self, number: u64) -> PathBuf {
        payload_path(&self.dir, number)
    }

    /// How long RocksDB took to open it.
    pub(super) fn opened_in(&self) -> Duration {
        self.opened_in
    }

    /// The database's folder.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The records that were written into the file that starts at place `first`, as the index has them;
    /// none where it has no entry that can be understood.
    ///
    /// # Errors
    /// `Unavailable` where the index cannot be read.
    pub(super) fn file_records(&self, first: u64) -> Result<Vec<FileRecord>> {
        let entry = self.db.get_cf(self.index(), entry::file_key(first));
        let entry = entry.map_err(unavailable("cannot read the store's index"))?;
        let records = entry.and_then(|entry| entry::decode_file(first, &entry));
        Ok(records.unwrap_or_default())
    }

    fn payload(&self) -> &ColumnFamily {
        self.db
            .cf_handle(PAYLOAD)
            .expect("every open names this column family")
    }

    fn index(&self) -> &ColumnFamily {
        self.db
            .cf_handle(INDEX)
            .expect("every open names this column family")
    }

    /// Moves finished files into the payload column family. Durable on return.
    ///
    /// # Errors
    /// `Unavailable` where the disk fails or a file is damaged; none of them is in then.
    pub(super) fn ingest(&self, paths: &[&Path]) -> Result<()> {
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        // No reader relies on a snapshot, and a global sequence number would be written into the
        // file.
        options.set_snapshot_consistency(false);
        options.set_allow_global_seqno(false);
        options.set_allow_blocking_flush(false);
        self.db
            .ingest_external_file_cf_opts(self.payload(), &options, paths.to_vec())
            .map_err(unavailable("cannot add a file to the store"))
    }

    /// Is a payload file on level 0, from where it could never be dropped?
    pub(super) fn has_undroppable_payload(&self) -> bool {
        let level_0 = rocksdb::properties::num_files_at_level(0);
        let files = self.db.property_int_value_cf(self.payload(), level_0);
        !matches!(files, Ok(Some(0)))
    }

    /// The payload files.
    ///
    /// # Errors
    /// `Unavailable` where RocksDB does not say.
    pub(super) fn live_payload(&self) -> Result<Vec<LivePayload>> {
        let files = self
            .db
            .live_files()
            .map_err(unavailable("cannot list the store's files"))?;
        let files = files
            .into_iter()
            .filter(|file| file.column_family_name == PAYLOAD);
        Ok(files
            .filter_map(|file| {
                let place = |key: Option<Vec<u8>>| Some(u64::from_be_bytes(key?.try_into().ok()?));
                let number = file
                    .name
                    .trim_start_matches('/')
                    .strip_suffix(".sst")?
                    .parse()
                    .ok()?;
                let disk_bytes = fs::metadata(payload_path(&self.dir, number))
                    .map_or(file.size as u64, |meta| meta.blocks() * 512);
                Some(LivePayload {
                    first: place(file.start_key)?,
                    last: place(file.end_key)?,
                    number,
                    disk_bytes,
                })
            })
            .collect())
    }

    /// Drops the payload files that lie within the places `first..=last`, with one sync of the manifest.
    ///
    /// # Errors
    /// `Unavailable` where the disk fails.
    pub(super) fn drop_payload(&self, first: u64, last: u64) -> Result<()> {
        self.db
            .delete_file_in_range_cf(self.payload(), first.to_be_bytes(), last.to_be_bytes())
            .map_err(unavailable("cannot drop a payload file"))
    }

    /// Every place and its value, each with RocksDB's own checksum verified.
    #[cfg(test)]
    pub(super) fn verified_payload(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        let entries = self.db.iterator_cf(self.payload(), IteratorMode::Start);
        entries
            .map(|entry| {
                let (key, value) = entry.map_err(unavailable("cannot read the payload"))?;
                let place = key.as_ref().try_into().expect("keys are places");
                Ok((u64::from_be_bytes(place), value.into_vec()))
            })
            .collect()
    }

    /// The value at a place, unverified, without a copy.
    ///
    /// # Errors
    /// `Corrupt` where its file is gone, cut short or damaged; `Unavailable` where it cannot be read.
    pub(super) fn value(&self, place: u64) -> Result<Option<DBPinnableSlice<'_>>> {
        let mut options = ReadOptions::default();
        options.set_verify_checksums(false);
        options.fill_cache(false);
        self.db
            .get_pinned_cf_opt(self.payload(), place.to_be_bytes(), &options)
            .map_err(|error| {
                if error.as_ref().contains(IO_ERROR) {
                    return Error::unavailable("cannot read a record")
                        .with("rocksdb", &error)
                        .caused_by(io::Error::from_raw_os_error(libc::EIO));
                }
                let error = unavailable("cannot read a record")(error);
                match is_damage(&error) {
                    true => Error::corrupt("the file of a record is damaged").caused_by(error),
                    false => error,
                }
            })
    }

    /// Begins a batch of changes to the index.
    pub(super) fn index_batch(&self) -> IndexBatch<'_> {
        IndexBatch {
            db: self,
            batch: WriteBatch::default(),
        }
    }

    /// Every index entry whose key starts with `tag`, in order.
    ///
    /// # Errors
    /// `Unavailable` where the index cannot be read to its end.
    pub(super) fn index_entries(&self, tag: u8) -> impl Iterator<Item = Result<KeyValue>> {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound([tag + 1]);
        options.set_readahead_size(2 << 20);
        let from = [tag];
        self.db
            .iterator_cf_opt(
                self.index(),
                options,
                IteratorMode::From(&from, Direction::Forward),
            )
            .map(|entry| entry.map_err(unavailable("cannot read the store's index")))
    }

    /// Allocated bytes of everything in the database's folder but the payload files.
    ///
    /// # Errors
    /// Whatever keeps it from being measured.
    pub(super) fn other_bytes(&self) -> io::Result<u64> {
        other_bytes(&self.dir)
    }

    /// Allocated bytes of the payload files whose names are there, by number.
    ///
    /// # Errors
    /// Whatever keeps them from being listed and measured: none may be taken for gone then.
    pub(super) fn payload_bytes(&self) -> io::Result<HashMap<u64, u64>> {
        payload_bytes(&self.dir)
    }

    /// Keeps RocksDB from deleting files that are dropped, until the answer is.
    #[cfg(test)]
    pub(super) fn hold_files(&self) -> impl Sized + '_ {
        self.db.iterator_cf(self.payload(), IteratorMode::Start)
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// `Unavailable` where the disk fails.
    pub(super) fn sync(&self) -> Result<()> {
        self.db
            .flush_wal(true)
            .map_err(unavailable("cannot sync the store's index"))
    }
}

/// See [`Db::other_bytes`].
fn other_bytes(dir: &Path) -> io::Result<u64> {
    let folder = |dir: &Path| match fs::metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        meta => meta.map(|meta| meta.blocks() * 512),
    };
    let mut bytes = folder(dir)? + folder(&payload_dir(dir))?;
    for entry in fs::read_dir(dir)? {
        let meta = metadata_if_there(&entry?)?;
        let file = meta.filter(fs::Metadata::is_file);
        bytes += file.map_or(0, |meta| meta.blocks() * 512);
    }
    Ok(bytes)
}

/// See [`Db::payload_bytes`].
fn payload_bytes(dir: &Path) -> io::Result<HashMap<u64, u64>> {
    let mut files = HashMap::new();
    for entry in fs::read_dir(payload_dir(dir))? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(".sst"));
        let Some(number) = number.and_then(|number| number.parse().ok()) else {
            continue;
        };
        if let Some(meta) = metadata_if_there(&entry)? {
            files.insert(number, meta.blocks() * 512);
        }
    }
    Ok(files)
}

/// Allocated bytes of all that is in the folder of a database.
///
/// # Errors
/// Whatever keeps it from being measured.
pub(super) fn database_bytes(dir: &Path) -> io::Result<u64> {
    let payload = match payload_bytes(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        files => files?.values().sum(),
    };
    Ok(other_bytes(dir)? + payload)
}

/// `None` for a file that is gone by now: it takes no bytes.
fn metadata_if_there(entry: &fs::DirEntry) -> io::Result<Option<fs::Metadata>> {
    match entry.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        meta => meta.map(Some),
    }
}

/// Changes to the index that happen together or not at all.
pub(super) struct IndexBatch<'a> {
    db: &'a Db,
    batch: WriteBatch,
}

impl<'a> IndexBatch<'a> {
    pub(super) fn db(&self) -> &'a Db {
        self.db
    }

    pub(super) fn put(&mut self, key: &[u8], value: &[u8]) {
        self.batch.put_cf(self.db.index(), key, value);
    }

    pub(super) fn delete(&mut self, key: &[u8]) {
        self.batch.delete_cf(self.db.index(), key);
    }

    /// Applies the batch; durable on return where `sync` is set.
    ///
    /// # Errors
    /// `Unavailable` where the disk fails.
    pub(super) fn apply(self, sync: bool) -> Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.db
            .db
            .write_opt(self.batch, &options)
            .map_err(unavailable("cannot write the store's index"))
    }
}
