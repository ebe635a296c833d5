//! Where every record is, in memory: at most 100 bytes a record.
//!
//! A record's id is the place where it was written first, and stays; cleaning gives it another
//! location. So all but those that were moved are found in their file by their id alone.

use std::collections::{BTreeMap, HashMap};

use crate::RecordId;
use crate::disk::entry::{encode_live, own_id};

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
}

// With its id in its file. If it was moved, also an entry of a hash table that is half empty after it
// grew.
const _: () = assert!(size_of::<Image>() + 8 + (8 + 16 + 1) * 16 / 7 <= 100);

/// One image of a payload file.
#[derive(Clone, Copy, Debug)]
struct Image {
    last_use_ms: u64,
    page: u32,
    bytes: u32,
    holds: Holds,
}

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    /// The record was moved elsewhere, or its bytes are given back.
    Nothing,
    /// A record that was removed, whose bytes may take space still.
    Removed,
    /// A live record that was written there first.
    Own,
    /// A live record that was moved there.
    Moved,
}

impl Image {
    const DEAD: Image = Image {
        last_use_ms: 0,
        page: 0,
        bytes: 0,
        holds: Holds::Nothing,
    };

    fn is_live(&self) -> bool {
        matches!(self.holds, Holds::Own | Holds::Moved)
    }
}

impl Location {
    /// The key of its image in the payload column family.
    pub(super) fn place(&self) -> u64 {
        image_place(self.file, self.slot)
    }
}

/// No store gets so far. A larger one is damage, or somebody's doing.
pub(super) const PLACE_MAX: u64 = 1 << 60;

/// Two places a record: padding, then the image. Place `first` is padding.
pub(super) fn image_place(first: u64, slot: u32) -> u64 {
    own_id(first, slot as usize)
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
    /// Bytes of the images of removed records.
    removed_bytes: u64,
    /// By slot; what is behind the last is dead.
    images: Vec<Image>,
}

/// The image of a removed record.
pub(super) struct RemovedImage {
    pub(super) slot: u32,
    /// Where it starts in the file, in pages of 4 KiB.
    pub(super) page: u32,
    pub(super) bytes: u32,
}

impl PayloadFile {
    /// A file without live records, whose directory is at the place `last`.
    pub(super) fn new(last: u64, disk_bytes: u64) -> PayloadFile {
        PayloadFile {
            last,
            disk_bytes,
            ..PayloadFile::default()
        }
    }

    /// Records that were written into it, live or not.
    fn records(&self, first: u64) -> u64 {
        (self.last - first) / 2
    }

    /// The share of them which are not live any more. `first` is its first place.
    pub(super) fn dead_share(&self, first: u64) -> f64 {
        1.0 - self.live.len() as f64 / self.records(first).max(1) as f64
    }

    /// Bytes that it would take less without the images of removed records, at most: an earlier opening may
    /// have given some back.
    pub(super) fn removed_bytes(&self) -> u64 {
        let not_live = self.disk_bytes.saturating_sub(self.live_bytes);
        self.removed_bytes.min(not_live)
    }

    /// The images of removed records.
    pub(super) fn removed(&self) -> impl Iterator<Item = RemovedImage> {
        let images = (0..).zip(&self.images);
        let removed = images.filter(|(_, image)| image.holds == Holds::Removed);
        removed.map(|(slot, image)| RemovedImage {
            slot,
            page: image.page,
            bytes: image.bytes,
        })
    }

    /// When the record at `slot` was last used; `None` where none is live there.
    pub(super) fn last_use_ms(&self, slot: usize) -> Option<u64> {
        let image = self.images.get(slot);
        let live = image.filter(|image| image.is_live());
        live.map(|image| image.last_use_ms)
    }

    /// The image at `slot` of the file that starts at `first`.
    fn image_mut(&mut self, first: u64, slot: usize) -> &mut Image {
        if self.images.len() <= slot {
            if self.images.capacity() == 0 {
                let records = self.records(first) as usize;
                self.images.reserve_exact(records);
                self.live.reserve_exact(records);
            }
            self.images.resize(slot + 1, Image::DEAD);
        }
        &mut self.images[slot]
    }
}

/// Files one behind the other.
pub(super) struct Run {
    /// Their first places: at least one.
    pub(super) firsts: Vec<u64>,
    /// The last place of the last one.
    pub(super) last: u64,
}

#[derive(Default)]
pub(super) struct Table {
    files: BTreeMap<u64, PayloadFile>,
    /// File and slot of the records that were moved.
    moved: HashMap<RecordId, (u64, u32)>,
    records: usize,
    live_bytes: u64,
    disk_bytes: u64,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.records
    }

    pub(super) fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// Allocated bytes of all payload files.
    pub(super) fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    pub(super) fn get(&self, id: RecordId) -> Option<Location> {
        let (file, slot) = self.find(id)?;
        let image = self.files.get(&file)?.images.get(slot as usize)?;
        Some(Location {
            file,
            slot,
            page: image.page,
            bytes: image.bytes,
        })
    }

    /// File and slot of a live record.
    fn find(&self, id: RecordId) -> Option<(u64, u32)> {
        if let Some(place) = self.moved.get(&id) {
            return Some(*place);
        }
        let (&first, file) = self.files.range(..id.0.get()).next_back()?;
        let slot = (id.0.get() - first - 1) / 2;
        let image = file.images.get(slot as usize)?;
        // Places of padding and directories are no ids, and one of an image that was moved there is
        // no record's.
        let is_it = image.holds == Holds::Own && own_id(first, slot as usize) == id.0.get();
        is_it.then_some((first, slot as u32))
    }

    /// When a record was last used.
    pub(super) fn last_use_ms(&self, id: RecordId) -> Option<u64> {
        let (file, slot) = self.find(id)?;
        self.files.get(&file)?.last_use_ms(slot as usize)
    }

    /// Notes a use of a record; returns its file.
    pub(super) fn touch(&mut self, id: RecordId, last_use_ms: u64) -> Option<u64> {
        let (file, slot) = self.find(id)?;
        let image = self.files.get_mut(&file)?.images.get_mut(slot as usize)?;
        image.last_use_ms = last_use_ms;
        Some(file)
    }

    /// What became of the records of a file, for its entry in the index, once those at the slots
    /// `without` are gone too.
    pub(super) fn live_entry(&self, first: u64, without: &[u32]) -> Vec<u8> {
        let Some(file) = self.files.get(&first) else {
            return encode_live(&[]);
        };
        let use_of = |slot: u64| match without.contains(&(slot as u32)) {
            true => None,
            false => file.last_use_ms(slot as usize),
        };
        let uses: Vec<_> = (0..file.records(first)).map(use_of).collect();
        encode_live(&uses)
    }

    pub(super) fn files(&self) -> impl Iterator<Item = (u64, &PayloadFile)> {
        self.files.iter().map(|(first, file)| (*first, file))
    }

    pub(super) fn file(&self, first: u64) -> Option<&PayloadFile> {
        self.files.get(&first)
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
    pub(super) fn drop_file(&mut self, first: u64) -> Option<PayloadFile> {
        let file = self.files.remove(&first)?;
        debug_assert!(file.live.is_empty());
        self.disk_bytes -= file.disk_bytes;
        Some(file)
    }

    /// Puts a record where `location` says, from wherever it was before. Its file must be known.
    pub(super) fn place(&mut self, id: RecordId, location: Location, last_use_ms: u64) {
        self.leave(id, Holds::Nothing);
        let Some(file) = self.files.get_mut(&location.file) else {
            return;
        };
        let slot = location.slot as usize;
        let is_own = own_id(location.file, slot) == id.0.get();
        *file.image_mut(location.file, slot) = Image {
            last_use_ms,
            page: location.page,
            bytes: location.bytes,
            holds: if is_own { Holds::Own } else { Holds::Moved },
        };
        file.live.push(id);
        file.live_bytes += u64::from(location.bytes);
        self.live_bytes += u64::from(location.bytes);
        self.records += 1;
        if !is_own {
            self.moved.insert(id, (location.file, location.slot));
        }
    }

    /// Notes that the record which was written to `location` was removed. Its file must be known.
    pub(super) fn note_removed(&mut self, location: Location) {
        if let Some(file) = self.files.get_mut(&location.file) {
            *file.image_mut(location.file, location.slot as usize) = Image {
                last_use_ms: 0,
                page: location.page,
                bytes: location.bytes,
                holds: Holds::Removed,
            };
            file.removed_bytes += u64::from(location.bytes);
        }
    }

    /// Notes that removed records at `slots` of a file take no space any more, as far as can be had, and
    /// what the file takes now. Returns how much less that is.
    pub(super) fn note_holes(&mut self, first: u64, slots: &[u32], disk_bytes: u64) -> u64 {
        let Some(file) = self.files.get_mut(&first) else {
            return 0;
        };
        for slot in slots {
            let image = &mut file.images[*slot as usize];
            file.removed_bytes -= u64::from(image.bytes);
            *image = Image::DEAD;
        }
        let gained = file.disk_bytes.saturating_sub(disk_bytes);
        file.disk_bytes -= gained;
        self.disk_bytes -= gained;
        gained
    }

    /// Takes a record out: it was removed. Its file stays, be it empty.
    pub(super) fn take(&mut self, id: RecordId) -> Option<Location> {
        self.leave(id, Holds::Removed)
    }

    /// Takes a record out of its place, which holds `leaves` from then on.
    fn leave(&mut self, id: RecordId, leaves: Holds) -> Option<Location> {
        let location = self.get(id)?;
        self.moved.remove(&id);
        self.records -= 1;
        self.live_bytes -= u64::from(location.bytes);
        if let Some(file) = self.files.get_mut(&location.file) {
            let image = &mut file.images[location.slot as usize];
            image.holds = leaves;
            file.live_bytes -= u64::from(location.bytes);
            if leaves == Holds::Removed {
                file.removed_bytes += u64::from(location.bytes);
            }
            // A file holds some tens of records.
            file.live.retain(|other| *other != id);
        }
        Some(location)
    }

    /// Files without a live record, those together between which there is no other.
    pub(super) fn dead_runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut goes_on = false;
        for (first, file) in self.files() {
            let is_dead = file.live.is_empty();
            match runs.last_mut() {
                Some(run) if is_dead && goes_on => {
                    run.firsts.push(first);
                    run.last = file.last;
                }
                _ if is_dead => runs.push(Run {
                    firsts: vec![first],
                    last: file.last,
                }),
                _ => {}
            }
            goes_on = is_dead;
        }
        runs
    }
}
