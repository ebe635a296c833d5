//! Opens a store's folder, as far as it opens.

use std::path::Path;
use std::sync::Arc;

use stemkv_store::disk::RocksDisk;
use stemkv_store::{Clock, Error, ErrorKind, Key, RecordHeader, Result};

use crate::salvage::SalvagedDisk;
use crate::store::{Access, Store};

/// A writer may delete files while we look for them: then we look again.
const TRIES: usize = 3;

/// Opens a store for reading, beside the process that writes to it or not. A store that RocksDB does
/// not open is read from its payload files, without RocksDB.
///
/// # Errors
/// `Invalid` for another format version; `Unavailable` or `Corrupt` where there is no store, or not
/// even its geometry can be known.
pub fn for_reading(path: &Path, clock: Arc<dyn Clock>) -> Result<Store> {
    let mut opened = RocksDisk::open_read_only(path, clock.clone());
    for _ in 1..TRIES {
        if opened.is_err() && RocksDisk::holder(path).is_some() {
            opened = RocksDisk::open_read_only(path, clock.clone());
        }
    }
    let because = match opened {
        Ok(disk) => {
            return Ok(Store {
                path: path.to_owned(),
                access: match RocksDisk::holder(path) {
                    Some(pid) => Access::BesideWriter { pid },
                    None => Access::ReadOnly,
                },
                geometry: disk.geometry().clone(),
                tier: Arc::new(disk),
                clock,
            });
        }
        Err(error) if error.kind() == ErrorKind::Invalid => return Err(error),
        Err(error) => error,
    };
    let (Ok(geometry), Ok(disk)) = (RocksDisk::geometry_of(path), SalvagedDisk::open(path)) else {
        return Err(because);
    };
    Ok(Store {
        path: path.to_owned(),
        access: Access::Salvaged {
            because: one_line(&because),
        },
        geometry,
        tier: Arc::new(disk),
        clock,
    })
}

/// Opens a store for writing; a broken one is rebuilt from its payload files by that.
///
/// # Errors
/// `Busy`, naming the process, where another one has it open; `Invalid` also where the records are of
/// another geometry than the store's manifest says; else as [`for_reading`]. A manifest that is damaged is
/// left to the engine: the geometry is known from nowhere else.
pub fn for_writing(path: &Path, clock: Arc<dyn Clock>) -> Result<Store> {
    refuse_held(path)?;
    let geometry = RocksDisk::geometry_of(path)?;
    let broken = RocksDisk::open_read_only(path, clock.clone()).err();
    // The bound belongs to the process that uses the store; nothing is saved here.
    let disk = RocksDisk::open(path, &geometry, u64::MAX / 4, clock.clone())?;
    Ok(Store {
        path: path.to_owned(),
        access: match broken {
            None => Access::ReadWrite,
            Some(because) => Access::Rebuilt {
                because: one_line(&because),
            },
        },
        geometry,
        tier: Arc::new(disk),
        clock,
    })
}

/// An error and its causes.
fn one_line(error: &Error) -> String {
    format!("{error:?}").replace('\n', " ")
}

/// # Errors
/// `Busy`, naming the process, where one has the store open for writing.
pub(crate) fn refuse_held(path: &Path) -> Result<()> {
    match RocksDisk::holder(path) {
        None => Ok(()),
        Some(pid) => Err(Error::busy(
            "another process has the store open: stop it, or let it compact (Cache::compact)",
        )
        .with("pid", pid)
        .with("program", program(pid))
        .with("path", path.display())),
    }
}

/// The name of a process's program.
fn program(pid: u32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    name.map_or_else(|_| "unknown".into(), |name| name.trim().to_owned())
}

/// The header of a record whose payload does not verify, and where it is.
pub(crate) fn header_of(path: &Path, key: &Key) -> Option<(String, RecordHeader)> {
    let mut found = None;
    RocksDisk::salvage(path, &mut |file, offset, header| {
        if header.key == *key {
            found = Some((format!("{} at byte {offset}", file.display()), header));
        }
    })
    .ok()?;
    found
}
