//! Descriptors of payload files, for reads that go past RocksDB: a bounded number of them.
//!
//! A file is known by its first place. RocksDB gives it a number of its own when it is taken in,
//! without saying which; it is found by the inode, which a move does not change.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use lru::LruCache;

use super::db::payload_path;
use crate::disk::direct::DirectFile;

/// Descriptors that are kept open. With RocksDB's own a quarter of the usual limit of 1,024.
const OPEN_FILES_MAX: usize = 128;

/// Numbers that RocksDB may have given to other files since the last payload file.
const NUMBERS_BETWEEN_MAX: u64 = 4096;

/// The payload files of one database.
pub(super) struct Files {
    dir: PathBuf,
    /// Past the page cache, as far as the file system lets us.
    direct: AtomicBool,
    state: Mutex<State>,
    /// Bytes of files that were dropped while a read still held them open.
    unlinked_bytes: Arc<AtomicU64>,
}

struct State {
    /// Of each file, by its first place.
    numbers: HashMap<u64, u64>,
    number_max: u64,
    open: LruCache<u64, Arc<DirectFile>>,
    /// Of each file that was opened, also after others pushed it out of `open`: a read may have it
    /// still.
    held: HashMap<u64, Weak<DirectFile>>,
}

/// Bytes of a file that was dropped, counted until it is closed.
struct Unlinked {
    bytes: u64,
    total: Arc<AtomicU64>,
}

impl Drop for Unlinked {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Files {
    /// The files of the database in `dir`, none of them known.
    pub(super) fn new(dir: &Path) -> Files {
        Files {
            dir: dir.to_owned(),
            direct: AtomicBool::new(true),
            state: Mutex::new(State {
                numbers: HashMap::new(),
                number_max: 0,
                open: LruCache::new(NonZeroUsize::new(OPEN_FILES_MAX).expect("a constant above 0")),
                held: HashMap::new(),
            }),
            unlinked_bytes: Arc::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes which number a file has.
    pub(super) fn know(&self, first: u64, number: u64) {
        let mut state = self.state();
        state.number_max = state.number_max.max(number);
        state.numbers.insert(first, number);
    }

    /// Notes that the file `inode` was taken in. Where it is not found, it is read through RocksDB.
    pub(super) fn taken_in(&self, first: u64, inode: u64) {
        let from = self.state().number_max + 1;
        let found = (from..from + NUMBERS_BETWEEN_MAX).find(|&number| {
            let path = payload_path(&self.dir, number);
            fs::metadata(path).is_ok_and(|meta| meta.ino() == inode)
        });
        match found {
            Some(number) => self.know(first, number),
            None => tracing::warn!(first, "a payload file is read through RocksDB alone"),
        }
    }

    /// RocksDB's number of a file.
    pub(super) fn number(&self, first: u64) -> Option<u64> {
        self.state().numbers.get(&first).copied()
    }

    /// Forgets a file of so many bytes whose name is gone. Where it is open, its bytes count as
    /// unlinked from here on, until the answer is dropped and every read of it has ended.
    pub(super) fn forget(&self, first: u64, bytes: u64) -> Option<Arc<DirectFile>> {
        let mut state = self.state();
        state.numbers.remove(&first);
        let ours = state.open.pop(&first);
        let open = state.held.remove(&first).and_then(|held| held.upgrade());
        drop(state);
        drop(ours);
        let open = open?;
        self.unlinked_bytes.fetch_add(bytes, Ordering::Relaxed);
        open.attach(Unlinked {
            bytes,
            total: self.unlinked_bytes.clone(),
        });
        Some(open)
    }

    /// Forgets all files.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.numbers.clear();
        state.open.clear();
        state.held.clear();
    }

    /// Bytes that dropped files still take, because they are being read.
    pub(super) fn unlinked_bytes(&self) -> u64 {
        self.unlinked_bytes.load(Ordering::Relaxed)
    }

    /// Are files read past the page cache?
    pub(super) fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    /// Reads through the page cache from now on: the file system refuses to go past it.
    pub(super) fn refuse_direct(&self) {
        if self.direct.swap(false, Ordering::Relaxed) {
            tracing::info!("the file system refuses O_DIRECT: reads go through the page cache");
            self.state().open.clear();
        }
    }

    /// The file that starts at place `first`.
    ///
    /// # Errors
    /// `NotFound` where it is not known or not there any more; whatever else its opening answers.
    pub(super) fn open(&self, first: u64) -> io::Result<Arc<DirectFile>> {
        let direct = self.is_direct();
        let file = {
            let mut state = self.state();
            if let Some(open) = state.open.get(&first) {
                return Ok(open.clone());
            }
            let number = *state.numbers.get(&first).ok_or(io::ErrorKind::NotFound)?;
            let held = state.held.get(&first).and_then(Weak::upgrade);
            let file = match held.filter(|file| file.is_direct() == direct) {
                Some(file) => file,
                // Under the lock: a file that is dropped is either not found or counted.
                None => Arc::new(DirectFile::open(&payload_path(&self.dir, number), direct)?),
            };
            state.held.insert(first, Arc::downgrade(&file));
            state.open.put(first, file.clone());
            file
        };
        if direct && !file.is_direct() {
            self.refuse_direct();
        }
        Ok(file)
    }
}
