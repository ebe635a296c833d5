//! Payload files that the medium does not give: not lost, as far as anybody knows. They lie in `unread/`,
//! count, are tried again by the next opening, and are the first to go when room is needed.

use super::*;
use folder::entries_of;

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

/// Takes those in that can be read again, and drops those that turn out to be damaged. The others stay.
///
/// # Errors
/// `Unavailable` where it is not the files' fault.
pub(super) fn take_back(dir: &Path, db: &Db) -> Result<()> {
    for (path, _) in files_aside(dir)? {
        match db.ingest(&[&path]) {
            Ok(()) => tracing::info!(file = %path.display(), "a payload file can be read again"),
            Err(error) if db::is_unreadable(&error) => {
                tracing::warn!(%error, file = %path.display(), "a payload file cannot be read still");
            }
            // In the database already, too, where that was not known to be durable.
            Err(error) if db::is_damage(&error) => {
                tracing::warn!(%error, file = %path.display(), "a payload file is lost");
                fs::remove_file(&path).map_err(|error| unwritable(&path, error))?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl RocksDisk {
    /// Gives up what cannot be read, for room is needed. Was there anything?
    pub(super) fn drop_unread(&self) -> bool {
        let unread = std::mem::take(&mut self.state().unread);
        let any = !unread.is_empty();
        for (path, bytes) in unread {
            self.discard(path, bytes);
        }
        any
    }
}
