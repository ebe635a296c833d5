//! Where every record is, in memory: at most 100 bytes a record.
//!
//! A record's id stays; cleaning gives it another location.

use std::collections::{BTreeMap, HashMap};

use crate::RecordId;

/// Where a record's image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    /// The first place of its payload file.
    pub(super) file: u64,
    /// Its number within the file.
    pub(super) slot: u32,
    /// Where its image starts in the file, in pages of 4 KiB.
    pub(super) page: u32,
    /// Bytes of the image.
    pub(super) bytes: u32,
    /// Its depth: with the id, the key of its index entry.
    pub(super) depth: u32,
}

// With 8 bytes of id, a hash table that is half empty after it grew, and 8 bytes in its file.
const _: () = assert!((size_of::<Location>() + 8 + 1) * 16 / 7 + 8 <= 100);

impl Location {
    /// The key of its image in the payload column family.
    pub(super) fn place(&self) -> u64 {
        image_place(self.file, self.slot)
    }
}

/// Two places a record: padding, then the image. Place `first` is padding.
pub(super) fn image_place(first: u64, slot: u32) -> u64 {
    first + 2 * u64::from(slot) + 1
}

/// One payload file.
#[derive(Clone, Debug, Default)]
pub(super) struct PayloadFile {
    /// The place of its directory.
    pub(super) last: u64,
    /// Allocated bytes.
    pub(super) disk_bytes: u64,
    /// The records that are live in it.
    pub(super) live: Vec<RecordId>,
    /// Bytes of their images.
    pub(super) live_bytes: u64,
    /// Its records are being moved: it is nobody else's to clean.
    pub(super) cleaning: bool,
}

impl PayloadFile {
    /// Records that were written into it, live or not.
    pub(super) fn records(&self, first: u64) -> u64 {
        (self.last - first) / 2
    }
}

#[derive(Default)]
pub(super) struct Table {
    records: HashMap<RecordId, Location>,
    files: BTreeMap<u64, PayloadFile>,
    live_bytes: u64,
    disk_bytes: u64,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    pub(super) fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// Allocated bytes of all payload files.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    pub(super) fn get(&self, id: RecordId) -> Option<Location> {
        self.records.get(&id).copied()
    }

    pub(super) fn files(&self) -> impl Iterator<Item = (u64, &PayloadFile)> {
        self.files.iter().map(|(first, file)| (*first, file))
    }

    pub(super) fn file(&self, first: u64) -> Option<&PayloadFile> {
        self.files.get(&first)
    }

    pub(super) fn file_mut(&mut self, first: u64) -> Option<&mut PayloadFile> {
        self.files.get_mut(&first)
    }

    pub(super) fn file_count(&self) -> usize {
        self.files.len()
    }

    /// Adds a file without records.
    pub(super) fn add_file(&mut self, first: u64, file: PayloadFile) {
        self.disk_bytes += file.disk_bytes;
        let before = self.files.insert(first, file);
        debug_assert!(before.is_none(), "places are never used twice");
    }

    /// Forgets a file. Its records must have been moved or removed.
    pub(super) fn drop_file(&mut self, first: u64) {
        if let Some(file) = self.files.remove(&first) {
            debug_assert!(file.live.is_empty());
            self.disk_bytes -= file.disk_bytes;
        }
    }

    /// Puts a record where `location` says, from wherever it was before. Its file must be known.
    pub(super) fn place(&mut self, id: RecordId, location: Location) {
        self.take(id);
        let Some(file) = self.files.get_mut(&location.file) else {
            return;
        };
        file.live.push(id);
        file.live_bytes += u64::from(location.bytes);
        self.live_bytes += u64::from(location.bytes);
        self.records.insert(id, location);
    }

    /// Takes a record out. Its file stays, be it empty.
    pub(super) fn take(&mut self, id: RecordId) -> Option<Location> {
        let location = self.records.remove(&id)?;
        self.live_bytes -= u64::from(location.bytes);
        if let Some(file) = self.files.get_mut(&location.file) {
            file.live_bytes -= u64::from(location.bytes);
            // A file holds some tens of records.
            file.live.retain(|other| *other != id);
        }
        Some(location)
    }

    /// Files without a live record.
    pub(super) fn dead_files(&self) -> Vec<u64> {
        let dead = self
            .files()
            .filter(|(_, file)| file.live.is_empty() && !file.cleaning);
        dead.map(|(first, _)| first).collect()
    }
}
