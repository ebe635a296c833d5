//! Payload files that the medium does not give: not lost, as far as anybody knows. They lie in `unread/`,
//! count, are tried again by the next opening, and go when somebody gives them up for room.

use super::*;
use folder::entries_of;
use std::collections::HashSet;

/// How often something is read that the medium does not give, and how long between two attempts, before it
/// counts as unreadable.
const ATTEMPTS: usize = 3;
const PAUSE: Duration = Duration::from_millis(50);

/// Tries again where the medium gave no bytes: it may have been a moment's trouble.
pub(super) fn insistently<T>(what: impl Fn() -> Result<T>) -> Result<T> {
    for _ in 1..ATTEMPTS {
        match what() {
            Err(error) if db::is_unreadable(&error) => std::thread::sleep(PAUSE),
            answer => return answer,
        }
    }
    what()
}

fn folder_of(dir: &Path) -> PathBuf {
    dir.join("unread")
}

/// Gives a payload file a second name in the folder of those that cannot be read, for its other one goes
/// with its database. Durable on return.
///
/// # Errors
/// `Unavailable` where that cannot be done.
pub(super) fn put_aside(dir: &Path, path: &Path) -> Result<PathBuf> {
    let folder = folder_of(dir);
    let part = |path: Option<&Path>| {
        let name = path.and_then(Path::file_name);
        name.map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    // Its number alone may come again, in another database.
    let database = part(path.ancestors().nth(2));
    let aside = folder.join(format!("{database}-{}", part(Some(path))));
    let linked = make_folder(&folder)
        .and_then(|()| match fs::hard_link(path, &aside) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked,
        })
        .and_then(|()| sync_folder(&folder));
    linked.map_err(|error| unwritable(&aside, error))?;
    Ok(aside)
}

/// The files that lie there, with their bytes.
///
/// # Errors
/// `Unavailable` where they cannot be listed.
pub(super) fn files_aside(dir: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let paths = entries_of(&folder_of(dir))?.into_iter();
    let with_bytes = paths.map(|path| {
        let meta = fs::symlink_metadata(&path).map_err(|error| unreadable(&path, error))?;
        Ok((path, meta.blocks() * 512))
    });
    with_bytes.collect()
}

/// Payload files that lay there and are in the database again.
#[derive(Default)]
pub(super) struct TakenBack {
    /// Their names there, which stay until the index has their records: an opening that is cut off before is
    /// followed by one that finds them here.
    names: HashSet<PathBuf>,
    /// Their first places.
    pub(super) firsts: HashSet<u64>,
}

impl TakenBack {
    /// This file cannot be read after all and was put aside anew, under this name.
    pub(super) fn is_aside_again(&mut self, name: &Path) {
        self.names.remove(name);
    }

    /// Those that lie there and are not in the database.
    ///
    /// # Errors
    /// As [`files_aside`].
    pub(super) fn others(&self, dir: &Path) -> Result<Vec<(PathBuf, u64)>> {
        let mut others = files_aside(dir)?;
        others.retain(|(path, _)| !self.names.contains(path));
        Ok(others)
    }

    /// Their records are in the index, durably.
    pub(super) fn are_known(self, dir: &Path) {
        let any = !self.names.is_empty();
        for path in self.names {
            if let Err(error) = fs::remove_file(&path) {
                // It takes no room of its own, and is met again by the next opening.
                tracing::warn!(%error, path = %path.display(), "what should be gone is still there");
            }
        }
        // A name that came back with a power cut would bring back what is removed from here on.
        if any && let Err(error) = sync_folder(&folder_of(dir)) {
            tracing::warn!(%error, "files that were taken back may be taken back again");
        }
    }
}

/// Takes those in that can be read again, and drops those that turn out to be damaged. The others stay.
///
/// # Errors
/// `Unavailable` where it is not the files' fault.
pub(super) fn take_back(dir: &Path, db: &Db) -> Result<TakenBack> {
    let mut taken = TakenBack::default();
    let aside = files_aside(dir)?;
    if aside.is_empty() {
        return Ok(taken);
    }
    // Of an opening that was cut off.
    let before = inodes(db)?;
    let mut inside = Vec::new();
    for (path, _) in aside {
        let inode = inode_of(&path)?;
        if before.contains_key(&inode) {
            inside.push((path, inode));
            continue;
        }
        // RocksDB takes the name that it is given.
        let name = path.file_name().unwrap_or_default();
        let staged = dir.join("staging").join(name);
        fs::hard_link(&path, &staged).map_err(|error| unwritable(&staged, error))?;
        let ingested = db.ingest(&[&staged]);
        if ingested.is_err() {
            // Else the next opening does: it takes no room of its own.
            let _ = fs::remove_file(&staged);
        }
        match ingested {
            Ok(()) => {
                tracing::info!(file = %path.display(), "a payload file can be read again");
                inside.push((path, inode));
            }
            Err(error) if db::is_unreadable(&error) => {
                tracing::warn!(%error, file = %path.display(), "a payload file cannot be read still");
            }
            Err(error) if db::is_refused(&error) => {
                tracing::warn!(%error, file = %path.display(), "a payload file cannot be taken in now");
            }
            Err(error) if db::is_damage(&error) => {
                tracing::warn!(%error, file = %path.display(), "a payload file is lost");
                fs::remove_file(&path).map_err(|error| unwritable(&path, error))?;
            }
            Err(error) => return Err(error),
        }
    }
    let now = inodes(db)?;
    for (path, inode) in inside {
        taken.firsts.extend(now.get(&inode));
        taken.names.insert(path);
    }
    Ok(taken)
}

/// The first places of the payload files, by the files' inodes.
fn inodes(db: &Db) -> Result<HashMap<u64, u64>> {
    let files = db.live_payload()?.into_iter();
    let inodes = files.map(|file| Ok((inode_of(&db.payload_path(file.number))?, file.first)));
    inodes.collect()
}

fn inode_of(path: &Path) -> Result<u64> {
    let meta = fs::metadata(path).map_err(|error| unreadable(path, error))?;
    Ok(meta.ino())
}

impl RocksDisk {
    /// See [`DiskTier::drop_unread`].
    pub(super) fn give_up_unread(&self) -> u64 {
        let unread = std::mem::take(&mut self.state().unread);
        let files = unread.len() as u64;
        for (path, bytes) in unread {
            tracing::warn!(file = %path.display(), bytes, "a payload file that could not be read is given up");
            self.discard(path, bytes);
        }
        files
    }
}
