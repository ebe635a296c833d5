//! Space back at once, without moving anything: the images of removed records become holes in their files.
//!
//! An image is whole pages of its file, which nothing but its record has. What is around it stays: RocksDB's own
//! bytes of its block, the padding, the directory. So a file keeps its places, and the records in it stay
//! where they are.
//!
//! Only what was removed durably becomes a hole: an index that comes back from a power cut does not name it. A
//! read that began before the removal finds zeros, which are no record, and answers that it is gone.

use super::*;
use crate::disk::verify::{RECORD_ALIGN, record_bytes};
use output::{has_hole, make_hole};

/// How long a file is left without holes in which one could not be made.
const LEFT_ALONE: Duration = Duration::from_secs(60);

impl RocksDisk {
    /// Gives space back by moving records alone, as where the file system makes no holes: for tests and
    /// benchmarks.
    #[must_use]
    pub fn without_holes(self) -> Self {
        self.state().makes_holes = false;
        self
    }

    /// Makes holes of removed records for `wanted` bytes, or for as many as there are: in as few files as
    /// that takes. Returns the bytes that came back.
    pub(super) fn make_holes(&self, wanted: u64) -> u64 {
        let mut files: Vec<(u64, u64)> = {
            let state = self.state();
            if !state.makes_holes {
                return 0;
            }
            let files = state.table.files();
            let files = files.map(|(first, file)| (self.by_holes(&state, first, file), first));
            files.filter(|(bytes, _)| *bytes > 0).collect()
        };
        files.sort_unstable_by(|a, b| b.cmp(a));
        let mut gained = 0;
        for (_, first) in files {
            if gained >= wanted || !self.state().makes_holes {
                break;
            }
            gained += self.make_holes_in(first);
        }
        gained
    }

    /// Bytes that come back from a file where holes are made in it, as far as that may be tried now.
    pub(super) fn by_holes(&self, state: &State, first: u64, file: &PayloadFile) -> u64 {
        let refused = state.holes_refused.get(&first);
        let is_left_alone = || refused.is_some_and(|until| self.clock.now() < *until);
        match state.makes_holes && !is_left_alone() {
            true => file.removed_bytes(),
            false => 0,
        }
    }

    /// Makes holes of all that was removed from a file. Where that fails, the rest is tried again after a
    /// while, unless it was moved out of the file by then.
    fn make_holes_in(&self, first: u64) -> u64 {
        // Whoever measures the folder then finds what the table says.
        let _committing = self.committing();
        let (images, mut disk_bytes) = {
            let state = self.state();
            // Closed, the folder is whoever's opens it next.
            let file = state.table.file(first).filter(|_| !state.is_closed);
            let Some(file) = file else {
                return 0;
            };
            (file.removed().collect::<Vec<_>>(), file.disk_bytes)
        };
        let path = self.reading.files.number(first);
        let path = path.map(|number| db::payload_path(&self.database, number));
        if self.check_place().is_err() {
            return 0;
        }
        let mut slots = Vec::with_capacity(images.len());
        let mut punch = || {
            let file = match &path {
                Some(path) => fs::File::options().write(true).open(path)?,
                None => return Err(io::ErrorKind::NotFound.into()),
            };
            let mut made = Vec::with_capacity(images.len());
            let outcome = images.iter().try_for_each(|image| {
                let offset = u64::from(image.page) * RECORD_ALIGN as u64;
                make_hole(&file, offset, u64::from(image.bytes))?;
                made.push(image.slot);
                Ok(())
            });
            // What came back is not known without it, and asked for again.
            disk_bytes = file.metadata()?.blocks() * 512;
            slots = made;
            outcome
        };
        let outcome: io::Result<()> = punch();
        let mut state = self.state();
        match outcome {
            Ok(()) => drop(state.holes_refused.remove(&first)),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                tracing::info!("the file system makes no holes: records are moved for space");
                state.makes_holes = false;
            }
            Err(error) => {
                tracing::warn!(%error, first, "removed records keep their space for now");
                let until = self.clock.now() + LEFT_ALONE;
                state.holes_refused.insert(first, until);
            }
        }
        state.table.note_holes(first, &slots, disk_bytes)
    }

    /// The slots of a file at which there is a hole in the place of a record, or in a part of it: a power cut may
    /// leave any.
    pub(super) fn holes_in(&self, path: &Path, entries: &[DirectoryEntry]) -> BTreeSet<usize> {
        // What cannot be opened is read by nobody.
        let Ok(file) = fs::File::open(path) else {
            return BTreeSet::new();
        };
        let is_gone = |entry: &DirectoryEntry| {
            let offset = u64::from(entry.page) * RECORD_ALIGN as u64;
            has_hole(&file, offset, record_bytes(&entry.header) as u64)
        };
        let entries = entries.iter().enumerate();
        let gone = entries.filter(|(_, entry)| is_gone(entry));
        gone.map(|(slot, _)| slot).collect()
    }
}
