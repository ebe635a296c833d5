//! What is in a store's folder, and whether it is one.

use super::*;
use crate::disk::manifest::Manifest;
use unread::insistently;

/// The manifest of the store in `dir`, and whether it had to be made again; `None` where the folder is
/// free to become one.
pub(super) fn check_folder(dir: &Path, geometry: &KvGeometry) -> Result<(Option<Manifest>, bool)> {
    match insistently(|| Manifest::load(dir)) {
        Ok(Some(manifest)) => {
            manifest.check_geometry(geometry, dir)?;
            Ok((Some(manifest), false))
        }
        Ok(None) if databases(dir)?.is_empty() => match stranger(dir)? {
            None => Ok((None, false)),
            Some(stranger) => Err(Error::invalid(
                "the folder holds something else than a store: give an empty one",
            )
            .with("path", dir.display())
            .with("found", stranger)),
        },
        Ok(None) => {
            let lost = Error::corrupt("the store's manifest is lost").with("path", dir.display());
            Ok((Some(remake(dir, geometry, lost)?), true))
        }
        Err(error) if error.kind() == ErrorKind::Corrupt || error.is_unreadable() => {
            Ok((Some(remake(dir, geometry, error)?), true))
        }
        Err(error) => Err(error),
    }
}

/// Payload files whose first records are looked at.
const FILES_ASKED_MAX: usize = 8;

/// A manifest that reads well may be wrong all the same: then no record is what it says.
///
/// # Errors
/// `Invalid`, with what differs, where none of the first records is of its geometry and version, and one is
/// of another.
pub(super) fn check_records(dir: &Path, manifest: &Manifest) -> Result<()> {
    let mut other = None;
    // What cannot be listed or read says nothing against it.
    let files = payload_files_of(&dir.join(&manifest.database)).unwrap_or_default();
    for path in files.iter().take(FILES_ASKED_MAX) {
        for found in first_headers(path, &manifest.geometry).unwrap_or_default() {
            match found {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Invalid => other = other.or(Some(error)),
                Err(_) => {}
            }
        }
    }
    let Some(other) = other else { return Ok(()) };
    let why = "the store's records are not what its manifest says: put that right, or open them with the \
        geometry and release that they name";
    Err(Error::invalid(why)
        .with("path", dir.display())
        .with("found", &other))
}

/// What the first pages of a payload file are as record headers of this geometry.
fn first_headers(path: &Path, geometry: &KvGeometry) -> Result<Vec<Result<RecordHeader>>> {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::open(path).map_err(|error| unreadable(path, error))?;
    let mut page = [0; RecordHeader::BYTES];
    // Behind the shortest paddings.
    let offsets = (0..4).map(|number| number * RecordHeader::BYTES as u64);
    let headers = offsets.map_while(|offset| {
        file.read_exact_at(&mut page, offset).ok()?;
        Some(RecordHeader::decode(&page, geometry))
    });
    Ok(headers.collect())
}

/// A manifest in the place of one that is lost, if the records are of this geometry and version: each
/// names both.
///
/// # Errors
/// `Invalid` where a record is of another; `why` where there is none that tells.
fn remake(dir: &Path, geometry: &KvGeometry, why: Error) -> Result<Manifest> {
    let (files, mut tells) = (payload_files(dir)?, false);
    for path in &files {
        for found in first_headers(path, geometry)? {
            match found {
                Ok(_) => tells = true,
                Err(error) if error.kind() == ErrorKind::Invalid => {
                    return Err(error.with("path", dir.display()));
                }
                Err(_) => {}
            }
        }
    }
    let databases = databases(dir)?;
    match databases.last() {
        Some((number, _)) if tells || files.is_empty() => Ok(Manifest {
            format_version: crate::FORMAT_VERSION,
            // Not known any more.
            created_unix_ms: 0,
            database: database_name(*number),
            geometry: geometry.clone(),
        }),
        _ => Err(why),
    }
}

/// The first thing in a folder that no store of ours would have put there.
fn stranger(dir: &Path) -> Result<Option<String>> {
    // What an opening that was cut off before the manifest leaves.
    let ours = ["stemkv.lock", "stemkv.json.new", "staging"];
    let mut names = entries_of(dir)?.into_iter().filter_map(|path| {
        let name = path.file_name()?;
        Some(name.to_string_lossy().into_owned())
    });
    Ok(names.find(|name| !ours.contains(&name.as_str())))
}

/// What is in a folder; nothing where it is not there.
///
/// # Errors
/// `Unavailable`: what cannot be listed must not be taken for empty.
pub(super) fn entries_of(dir: &Path) -> Result<Vec<PathBuf>> {
    let listed = fs::read_dir(dir).and_then(|entries| {
        entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect()
    });
    match listed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        listed => listed.map_err(|error| unreadable(dir, error)),
    }
}

/// Does a path lead to this open folder still? Where the system does not say, it is taken to.
pub(super) fn is_at(folder: &fs::File, path: &Path) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound};
    match (fs::metadata(path), folder.metadata()) {
        (Err(error), _) => !matches!(error.kind(), NotFound | NotADirectory),
        (_, Err(_)) => true,
        (Ok(there), Ok(ours)) => (there.dev(), there.ino()) == (ours.dev(), ours.ino()),
    }
}

/// All databases in a store's folder: a rebuilding that was cut off leaves two. What has such a name and is
/// none is not ours.
pub(super) fn databases(dir: &Path) -> Result<Vec<(u32, PathBuf)>> {
    let number = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        let number: u32 = name.strip_prefix("db-")?.parse().ok()?;
        (name == database_name(number)).then_some(number)
    };
    let mut databases = Vec::new();
    for path in entries_of(dir)? {
        if let Some(number) = number(&path)
            && is_database(&path)?
        {
            databases.push((number, path));
        }
    }
    databases.sort();
    Ok(databases)
}

pub(super) fn database_name(number: u32) -> String {
    format!("db-{number}")
}

/// Is it a folder with something of RocksDB's in it?
fn is_database(path: &Path) -> Result<bool> {
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(unreadable(path, error)),
    }
    let is_its = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| ["CURRENT", "LOCK", "payload"].contains(&name))
            || path.extension().is_some_and(|e| e == "sst")
    };
    Ok(entries_of(path)?.iter().any(is_its))
}

/// The number for a database behind all of these, where nobody has anything yet.
///
/// # Errors
/// `Invalid` where there is none.
pub(super) fn next_number(dir: &Path, databases: &[(u32, PathBuf)]) -> Result<u32> {
    let (next, last) = match databases.last() {
        None => (Some(0), dir),
        Some((number, path)) => (number.checked_add(1), &**path),
    };
    let is_free = |number: &u32| fs::symlink_metadata(dir.join(database_name(*number))).is_err();
    let number = next.and_then(|next| (next..=u32::MAX).find(is_free));
    number.ok_or_else(|| {
        Error::invalid("there is no number left for the store's next database: move this one away")
            .with("path", last.display())
    })
}

pub(super) fn payload_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = Vec::new();
    for (_, database) in databases(dir)? {
        files.extend(payload_files_of(&database)?);
    }
    files.sort();
    Ok(files)
}

/// Those of one database, in order.
fn payload_files_of(database: &Path) -> Result<Vec<PathBuf>> {
    let mut files = entries_of(&payload_dir(database))?;
    files.retain(|path| path.extension().is_some_and(|e| e == "sst"));
    files.sort();
    Ok(files)
}

/// Empties the folder of files that were being written. Returns what could not be removed, with its bytes.
///
/// # Errors
/// `Unavailable` where the folder cannot be made or listed.
pub(super) fn empty_staging(dir: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let staging = dir.join("staging");
    fs::create_dir_all(&staging).map_err(|error| unwritable(&staging, error))?;
    let mut left = Vec::new();
    for path in entries_of(&staging)? {
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(%error, path = %path.display(), "what should be gone is still there");
            let meta = fs::symlink_metadata(&path).map_err(|error| unreadable(&path, error))?;
            left.push((path, meta.blocks() * 512));
        }
    }
    Ok(left)
}
