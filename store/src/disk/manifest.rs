//! The two small files of ours in a store's folder: what the store is, and who has it open.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{path, thread};

use serde::{Deserialize, Serialize};

use crate::{Error, FORMAT_VERSION, KvGeometry, Result};

const MANIFEST: &str = "stemkv.json";
const LOCK: &str = "stemkv.lock";

/// How long the lock is tried for: [`StoreLock::holder`] takes it for a moment, too.
const LOOK_MAX: Duration = Duration::from_millis(200);

/// What a store is: `stemkv.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) format_version: u16,
    pub(super) created_unix_ms: u64,
    /// The folder of the RocksDB database within the store's folder. A rebuilt store moves to
    /// another one: replacing this file is the switch.
    pub(super) database: String,
    pub(super) geometry: KvGeometry,
}

#[derive(Deserialize)]
struct VersionOnly {
    format_version: u16,
}

impl Manifest {
    /// Reads the manifest of the store in `dir`; `None` where there is no such file.
    ///
    /// # Errors
    /// `Invalid`, naming both versions, for another version; `Corrupt` where it does not parse.
    pub(super) fn load(dir: &Path) -> Result<Option<Manifest>> {
        let path = dir.join(MANIFEST);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(damaged(&path, error));
            }
            Err(error) => return Err(unreadable(&path, error)),
        };
        let version: VersionOnly = serde_json::from_str(&text).map_err(|e| damaged(&path, e))?;
        if version.format_version != FORMAT_VERSION {
            return Err(Error::invalid(
                "the store has another format version: use the release that wrote it, or another folder",
            )
            .with("store_version", version.format_version)
            .with("our_version", FORMAT_VERSION)
            .with("path", path.display()));
        }
        let manifest: Manifest = serde_json::from_str(&text).map_err(|e| damaged(&path, e))?;
        manifest
            .geometry
            .validate()
            .map_err(|e| damaged(&path, e))?;
        let name_is_ours = manifest
            .database
            .strip_prefix("db-")
            .is_some_and(|number| number.parse::<u32>().is_ok());
        match name_is_ours {
            true => Ok(Some(manifest)),
            false => Err(damaged(&path, format!("database={}", manifest.database))),
        }
    }

    /// Puts this manifest in the place of an earlier one, atomically and durably.
    ///
    /// # Errors
    /// `Unavailable` where the folder cannot be written.
    pub(super) fn store(&self, dir: &Path) -> Result<()> {
        let path = dir.join(MANIFEST);
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::internal("cannot write the manifest as JSON").caused_by(e))?;
        let fresh = dir.join("stemkv.json.new");
        let written = File::create(&fresh)
            .and_then(|mut file| {
                file.write_all(text.as_bytes())
                    .and_then(|()| file.sync_all())
            })
            .and_then(|()| fs::rename(&fresh, &path))
            .and_then(|()| sync_folder(dir));
        written.map_err(|e| unwritable(&path, e))
    }

    /// Is the store of this geometry?
    ///
    /// # Errors
    /// `Invalid`, with what differs.
    pub(super) fn check_geometry(&self, geometry: &KvGeometry, dir: &Path) -> Result<()> {
        if &self.geometry == geometry {
            return Ok(());
        }
        let difference = geometry.difference(&self.geometry).join("; ");
        Err(Error::invalid(
            "the store has another geometry: open it with that one, or another folder",
        )
        .with("difference", difference)
        .with("path", dir.display()))
    }
}

/// The folder's path from the root on: it leads there whatever the working folder becomes.
///
/// # Errors
/// `Invalid` for an empty path; `Unavailable` where there is no working folder.
pub(super) fn whole_path(dir: &Path) -> Result<PathBuf> {
    path::absolute(dir).map_err(|error| match dir.as_os_str().is_empty() {
        true => Error::invalid("the store's folder has an empty path"),
        false => unreadable(dir, error),
    })
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Makes a folder and what is missing above it, durably: a power cut takes no folder away from
/// under what was synced in it.
pub(super) fn make_folder(dir: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|dir| !dir.exists()).collect();
    fs::create_dir_all(dir)?;
    for made in missing {
        // A relative path of one part is in the working folder.
        let above = made.parent().filter(|above| !above.as_os_str().is_empty());
        sync_folder(above.unwrap_or(Path::new(".")))?;
    }
    Ok(())
}

fn damaged(path: &Path, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::corrupt("the store's manifest is damaged: open it with the engine, which knows the geometry of its records and makes it again; else restore it, or move the folder away")
        .with("path", path.display())
        .caused_by(cause)
}

pub(super) fn unreadable(path: &Path, cause: io::Error) -> Error {
    Error::unavailable("cannot read")
        .with("path", path.display())
        .caused_by(cause)
}

pub(super) fn unwritable(path: &Path, cause: io::Error) -> Error {
    Error::unavailable("cannot write")
        .with("path", path.display())
        .caused_by(cause)
}

/// Held by the one process that may write: `stemkv.lock`, locked as `flock` does, its number inside.
pub(super) struct StoreLock(File);

impl Drop for StoreLock {
    fn drop(&mut self) {
        // Closing the file is not enough: a process that was forked meanwhile, and has not yet called
        // `exec`, shares it and would keep the lock. A failure leaves just that.
        let _ = self.0.unlock();
    }
}

impl StoreLock {
    /// Takes the lock.
    ///
    /// # Errors
    /// `Busy`, naming the holder's process, where it is taken.
    pub(super) fn take(dir: &Path) -> Result<StoreLock> {
        let path = dir.join(LOCK);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| unwritable(&path, e))?;
        let begun = Instant::now();
        let locked = loop {
            match file.try_lock() {
                // It may be a look at who holds it.
                Err(TryLockError::WouldBlock) if begun.elapsed() < LOOK_MAX => {
                    thread::sleep(Duration::from_millis(2));
                }
                locked => break locked,
            }
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                return Err(Error::busy(
                    "another process has the store open: use it through that one, or stop it",
                )
                .with("pid", pid.trim())
                .with("path", dir.display()));
            }
            Err(TryLockError::Error(error)) => return Err(unwritable(&path, error)),
        }
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|e| unwritable(&path, e))?;
        Ok(StoreLock(file))
    }

    /// The process that has the store in `dir` open for writing, if one has.
    pub(super) fn holder(dir: &Path) -> Option<u32> {
        let mut file = File::open(dir.join(LOCK)).ok()?;
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid).ok()?;
                pid.trim().parse().ok()
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, ErrorKind};
    use std::sync::atomic::Ordering::Relaxed;

    fn manifest() -> Manifest {
        Manifest {
            format_version: FORMAT_VERSION,
            created_unix_ms: 7,
            database: "db-0".into(),
            geometry: KvGeometry::gqa(4, 2, 32, Dtype::Bf16, 8).expect("valid"),
        }
    }

    #[test]
    fn a_manifest_reads_back_and_a_missing_one_is_none() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert_eq!(Manifest::load(dir.path()).expect("readable"), None);
        manifest().store(dir.path()).expect("stored");
        assert_eq!(
            Manifest::load(dir.path()).expect("readable"),
            Some(manifest())
        );
    }

    #[test]
    fn another_version_and_another_geometry_are_refused_by_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        let other = Manifest {
            format_version: 41,
            ..manifest()
        };
        other.store(dir.path()).expect("stored");
        let error = Manifest::load(dir.path()).expect_err("version 41");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(
            error
                .to_string()
                .contains("store_version=41, our_version=0"),
            "{error}"
        );

        let mut geometry = manifest().geometry;
        geometry.block_tokens = 16;
        let error = manifest()
            .check_geometry(&geometry, dir.path())
            .expect_err("another");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(
            error.to_string().contains("block_tokens: 16 here, 8 there"),
            "{error}"
        );
    }

    #[test]
    fn a_damaged_manifest_is_corrupt_and_left_as_it_is() {
        let dir = tempfile::tempdir().expect("tempdir");
        for text in ["", "{", "{\"format_version\": 0}", "\u{0}"] {
            fs::write(dir.path().join(MANIFEST), text).expect("written");
            let error = Manifest::load(dir.path()).expect_err("damaged");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{text:?}");
            assert_eq!(
                fs::read_to_string(dir.path().join(MANIFEST)).expect("there"),
                text
            );
        }
    }

    #[test]
    fn who_asks_for_the_holder_keeps_nobody_from_becoming_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        drop(StoreLock::take(dir.path()).expect("free"));
        let done = std::sync::atomic::AtomicBool::new(false);
        let asked = std::sync::atomic::AtomicUsize::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    StoreLock::holder(dir.path());
                    asked.fetch_add(1, Relaxed);
                }
            });
            let mut refused = 0;
            for until in 0..300 {
                while asked.load(Relaxed) <= until {
                    thread::yield_now();
                }
                refused += usize::from(StoreLock::take(dir.path()).is_err());
            }
            done.store(true, Relaxed);
            assert_eq!(refused, 0);
        });
    }

    #[test]
    fn a_lock_is_taken_once_and_names_its_holder() {
        let dir = tempfile::tempdir().expect("tempdir");
        let held = StoreLock::take(dir.path()).expect("free");
        let error = StoreLock::take(dir.path()).err().expect("taken");
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(
            error
                .to_string()
                .contains(&format!("pid={}", std::process::id())),
            "{error}"
        );
        assert_eq!(StoreLock::holder(dir.path()), Some(std::process::id()));
        // What a process that was forked, and has not called `exec` yet, has of it.
        let shared = held.0.try_clone().expect("a descriptor");
        drop(held);
        assert_eq!(StoreLock::holder(dir.path()), None);
        drop(StoreLock::take(dir.path()).expect("free, though the file is open still"));
        drop(shared);
        StoreLock::take(dir.path()).expect("free again");
    }
}
