//! A fresh database out of an old one's payload files, where RocksDB refuses to open (a file missing or
//! cut short, a damaged manifest of its own) or its index cannot be read: every file that is sound is taken
//! in, and the store's manifest is switched over. Files that cannot be read or taken in now are put aside.

use super::*;
use crate::disk::manifest::Manifest;
use folder::{database_name, databases, next_number, payload_files};
use unread::{insistently, put_aside};

/// Payload files that are taken into a fresh database by one call. RocksDB writes its manifest, and
/// looks at all its files, once for each call.
const INGESTED_AT_ONCE: usize = 256;

/// Opens the database that the manifest names; `None` where it must be rebuilt before it can be.
///
/// # Errors
/// As [`Db::open`].
pub(super) fn open_as_it_is(dir: &Path, manifest: &Manifest, sizing: Sizing) -> Result<Option<Db>> {
    let database = dir.join(&manifest.database);
    let databases = databases(dir)?;
    // A rebuilding that was cut off.
    if databases.iter().any(|(_, path)| *path != database) {
        return Ok(None);
    }
    // Without CURRENT RocksDB would make a new database and delete every payload file as unknown.
    let current = database.join("CURRENT");
    let is_there = current.try_exists().map_err(|e| unreadable(&current, e))?;
    match is_there || payload_files(dir)?.is_empty() {
        true => Db::open(&database, sizing).map(Some),
        false => Ok(None),
    }
}

/// What became of the payload files of the old database.
#[derive(Default)]
struct Taken {
    sound: usize,
    lost: usize,
    unread: Vec<PathBuf>,
}

/// Takes in those of some files that RocksDB accepts.
///
/// # Errors
/// `Unavailable` where that is not the files' fault: the old database stays as it is for the next try.
fn ingest_sound(db: &Db, files: &[PathBuf], taken: &mut Taken) -> Result<()> {
    let paths: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let ingest = || db.ingest(&paths);
    let ingested = match files.len() {
        1 => insistently(ingest),
        _ => ingest(),
    };
    match ingested {
        Ok(()) => taken.sound += files.len(),
        Err(error) if !db::is_lost(&error) => return Err(error),
        Err(error) if files.len() == 1 => {
            tracing::warn!(%error, file = %files[0].display(), "a payload file is lost");
            // One that is refused may be inside already, by another name: then the next step finds that.
            match db::is_unreadable(&error) || db::is_refused(&error) {
                true => taken.unread.extend_from_slice(files),
                false => taken.lost += 1,
            }
        }
        // All of them or none: halves, until those at fault are alone.
        Err(_) => {
            let (some, others) = files.split_at(files.len() / 2);
            ingest_sound(db, some, taken)?;
            ingest_sound(db, others, taken)?;
        }
    }
    Ok(())
}

/// Returns the database, and folders that should be gone and could not be removed, with their bytes.
pub(super) fn rebuild(
    dir: &Path,
    mut manifest: Manifest,
    sizing: Sizing,
) -> Result<(Db, Vec<(PathBuf, u64)>)> {
    let old = databases(dir)?;
    let number = next_number(dir, &old)?;
    let files = payload_files(dir)?;
    manifest.database = database_name(number);
    let database = dir.join(&manifest.database);
    let db = Db::open(&database, sizing).inspect_err(|_| {
        // Nothing was moved yet: the next opening need not find two.
        let _ = fs::remove_dir_all(&database);
    })?;
    let mut taken = Taken::default();
    for files in files.chunks(INGESTED_AT_ONCE) {
        ingest_sound(&db, files, &mut taken)?;
    }
    for path in &taken.unread {
        put_aside(dir, path)?;
    }
    // The switch. Before it, the next opening finds two databases and begins again with the files of
    // both; after it, what is left of the old one is only space.
    db.sync()?;
    manifest.store(dir)?;
    let mut leftovers = Vec::new();
    for (_, path) in old {
        if fs::remove_dir_all(&path).is_err() {
            let bytes = db::database_bytes(&path).map_err(|error| unreadable(&path, error))?;
            leftovers.push((path, bytes));
        }
    }
    let (sound, lost, unread) = (taken.sound, taken.lost, taken.unread.len());
    tracing::warn!(
        sound,
        lost,
        unread,
        "the store was rebuilt from its payload files"
    );
    metrics::counter!("stemkv_store_rebuilds_total").increment(1);
    Ok((db, leftovers))
}
