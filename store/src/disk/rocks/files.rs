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
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

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
    /// Files that are being opened, without the lock: a disk that hangs hangs whoever reads, and nobody
    /// else. What is put in says that the file was dropped meanwhile.
    opening: HashMap<u64, Arc<OnceLock<Arc<Unlinked>>>>,
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
                opening: HashMap::new(),
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

    /// Looks for the number of the file `inode`, which was taken in; is it found?
    pub(super) fn taken_in(&self, first: u64, inode: u64) -> bool {
        let from = self.state().number_max + 1;
        let found = (from..from + NUMBERS_BETWEEN_MAX).find(|&number| {
            let path = payload_path(&self.dir, number);
            fs::metadata(path).is_ok_and(|meta| meta.ino() == inode)
        });
        found.inspect(|&number| self.know(first, number)).is_some()
    }

    /// RocksDB's number of a file.
    pub(super) fn number(&self, first: u64) -> Option<u64> {
        self.state().numbers.get(&first).copied()
    }

    /// Forgets a file of so many bytes whose name is gone. Where it is open, or being opened, its bytes
    /// count as unlinked from here on, until the answer is dropped and every read of it has ended.
    pub(super) fn forget(&self, first: u64, bytes: u64) -> Option<Arc<DirectFile>> {
        let mut state = self.state();
        state.numbers.remove(&first);
        let ours = state.open.pop(&first);
        let open = state.held.remove(&first).and_then(|held| held.upgrade());
        let opening = state.opening.remove(&first);
        if open.is_some() || opening.is_some() {
            self.unlinked_bytes.fetch_add(bytes, Ordering::Relaxed);
            let unlinked = Arc::new(Unlinked {
                bytes,
                total: self.unlinked_bytes.clone(),
            });
            if let Some(open) = &open {
                open.attach(unlinked.clone());
            }
            if let Some(opening) = opening {
                let _ = opening.set(unlinked);
            }
        }
        drop(state);
        drop(ours);
        open
    }

    /// Forgets all files.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.numbers.clear();
        state.open.clear();
        state.held.clear();
        state.opening.clear();
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
        let (number, opening) = {
            let mut state = self.state();
            if let Some(open) = state.open.get(&first) {
                return Ok(open.clone());
            }
            let number = *state.numbers.get(&first).ok_or(io::ErrorKind::NotFound)?;
            let held = state.held.get(&first).and_then(Weak::upgrade);
            if let Some(file) = held.filter(|file| file.is_direct() == direct) {
                state.open.put(first, file.clone());
                return Ok(file);
            }
            (number, state.opening.entry(first).or_default().clone())
        };
        let opened = DirectFile::open(&payload_path(&self.dir, number), direct).map(Arc::new);
        let file = {
            let mut state = self.state();
            // Two may open one file at once; the last of them takes the note away.
            if let Some(noted) = state.opening.get(&first)
                && Arc::ptr_eq(noted, &opening)
                && Arc::strong_count(noted) == 2
            {
                state.opening.remove(&first);
            }
            let file = opened?;
            let held = state.held.get(&first).and_then(Weak::upgrade);
            match opening.get() {
                // Read to its end, and counted until then.
                Some(unlinked) => {
                    file.attach(unlinked.clone());
                    file
                }
                None if state.numbers.contains_key(&first) => {
                    // One descriptor a file: the other one would not be counted.
                    let is_same = |held: &Arc<DirectFile>| held.is_direct() == file.is_direct();
                    let file = held.filter(is_same).unwrap_or(file);
                    state.held.insert(first, Arc::downgrade(&file));
                    state.open.put(first, file.clone());
                    file
                }
                // All are forgotten: the store is closed.
                None => file,
            }
        };
        if direct && !file.is_direct() {
            self.refuse_direct();
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    //! Shown: an opening that hangs holds nobody else, and a file that is dropped meanwhile counts until
    //! it is closed. How: in the place of a payload file there is a pipe, which opens when it is written
    //! to.

    use super::*;
    use std::process::Command;
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    const LATE: Duration = Duration::from_secs(20);

    #[test]
    fn a_file_whose_opening_hangs_is_dropped_and_counted() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = payload_path(dir.path(), 7);
        fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        let made = Command::new("mkfifo").arg(&path).status().expect("mkfifo");
        assert!(made.success());
        let files = Arc::new(Files::new(dir.path()));
        files.refuse_direct();
        files.know(1, 7);
        let opening = {
            let files = files.clone();
            std::thread::spawn(move || files.open(1))
        };
        let begun = Instant::now();
        while !files
            .state
            .try_lock()
            .is_ok_and(|state| !state.opening.is_empty())
        {
            assert!(begun.elapsed() < LATE, "the lock is held meanwhile");
            std::thread::yield_now();
        }
        let (tell, told) = mpsc::channel();
        std::thread::spawn({
            let files = files.clone();
            move || {
                drop(files.forget(1, 100));
                let _ = tell.send(files.number(1));
            }
        });
        let forgotten = told.recv_timeout(LATE);
        assert_eq!(forgotten, Ok(None), "it waits for the file that hangs");
        assert_eq!(files.unlinked_bytes(), 100);
        let pipe = fs::File::options().write(true).open(&path).expect("there");
        let file = opening.join().expect("no panic").expect("opened");
        assert_eq!(files.unlinked_bytes(), 100);
        drop(file);
        assert_eq!(files.unlinked_bytes(), 0);
        assert!(files.open(1).is_err(), "it is not known any more");
        drop(pipe);
    }
}
