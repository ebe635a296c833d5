//! Reads records: straight out of RocksDB's own files, and through RocksDB where that does not go.
//!
//! An image is one aligned piece of an ingested file, whose place is known since it was written. So
//! it is read from the file itself, past RocksDB and the page cache, into the slot. Whatever goes
//! wrong with that (a file that cannot be opened, a descriptor too many, an I/O error, an end too
//! early) is tried once more through `Get`, whose answer counts.

use std::io;

use super::*;
use crate::disk::direct::{Direct, ReadSizes, Transport, Want, is_refusal};
use crate::disk::verify::RECORD_ALIGN;
use output::has_hole;

/// How records are read. A tier takes the first that the system allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadWay {
    /// io_uring, past the page cache.
    Ring,
    /// `preadv` on a few threads, past the page cache.
    Threads,
    /// `preadv` on a few threads, through the page cache.
    Buffered,
    /// RocksDB's `Get`.
    Get,
}

/// What a tier reads with.
pub(super) struct Reading {
    pub(super) direct: Direct,
    pub(super) files: Files,
    /// Everything goes through RocksDB.
    get_only: bool,
}

impl Reading {
    pub(super) fn new(database: &Path) -> Reading {
        Reading {
            direct: Direct::new(),
            files: Files::new(database),
            get_only: false,
        }
    }
}

/// A read that is under way.
struct Asked {
    /// Its place in the call.
    index: usize,
    info: RecordInfo,
    location: Location,
}

impl RocksDisk {
    /// Reads in that way from here on, or the next one that the system allows, with these sizes: for
    /// tests and benchmarks. A tier is opened with the best way.
    #[must_use]
    pub fn with_read_way(mut self, way: ReadWay, sizes: ReadSizes) -> Self {
        let transport = match way {
            ReadWay::Ring => Transport::Ring,
            ReadWay::Threads | ReadWay::Buffered | ReadWay::Get => Transport::Threads,
        };
        self.reading.direct = Direct::with(transport, sizes);
        self.reading.get_only = way == ReadWay::Get;
        if way == ReadWay::Buffered {
            self.reading.files.refuse_direct();
        }
        self
    }

    /// How records are read, as far as is known by now.
    pub fn read_way(&self) -> ReadWay {
        let direct = self.reading.files.is_direct();
        match (self.reading.get_only, self.reading.direct.transport()) {
            (true, _) => ReadWay::Get,
            (false, _) if !direct => ReadWay::Buffered,
            (false, Transport::Ring) => ReadWay::Ring,
            (false, Transport::Threads) => ReadWay::Threads,
        }
    }

    /// See [`DiskTier::read`].
    pub(super) fn read_records(
        &self,
        db: &Db,
        reads: Vec<(RecordInfo, Filling)>,
        answer: &mut dyn FnMut(usize, Result<Slot>),
    ) {
        let (mut wants, mut asked, mut rest) = (Vec::new(), Vec::new(), Vec::new());
        for (index, (info, slot)) in reads.into_iter().enumerate() {
            let location = self.state().table.get(info.id);
            let Some(location) = location else {
                answer(index, Err(gone(&info)));
                continue;
            };
            let read = Asked {
                index,
                info,
                location,
            };
            match self.file_of(&read, &slot) {
                Some(file) => {
                    wants.push(Want {
                        file,
                        offset: u64::from(location.page) * RECORD_ALIGN as u64,
                        bytes: location.bytes as usize,
                        slot,
                    });
                    asked.push(Some(read));
                }
                None => rest.push((read, slot)),
            }
        }
        if !wants.is_empty() {
            self.reading.direct.read(wants, &mut |i, slot, outcome| {
                let Some(read) = asked[i].take() else { return };
                match outcome {
                    Ok(()) => answer(read.index, self.seal(&read, slot)),
                    Err(error) => {
                        self.note_failure(&read, &error);
                        rest.push((read, slot));
                    }
                }
            });
        }
        for (read, slot) in rest {
            let index = read.index;
            answer(index, self.get(db, read, slot));
        }
        // The kernel's ring failed under them.
        for read in asked.into_iter().flatten() {
            let error = Error::unavailable("a read never ended").with("record", read.info.id.0);
            answer(read.index, Err(error));
        }
    }

    /// The file to read from; `None` where RocksDB must be asked.
    fn file_of(&self, read: &Asked, slot: &Filling) -> Option<Arc<DirectFile>> {
        let fits = read.location.bytes as usize <= RecordHeader::BYTES + slot.payload_capacity();
        if self.reading.get_only || !fits {
            return None;
        }
        let opened = self.reading.files.open(read.location.file);
        opened
            .inspect_err(|error| self.note_failure(read, error))
            .ok()
    }

    fn note_failure(&self, read: &Asked, error: &io::Error) {
        if is_refusal(error) {
            self.reading.files.refuse_direct();
        }
        metrics::counter!("stemkv_disk_fallback_reads_total").increment(1);
        tracing::debug!(%error, record = read.info.id.0, "a record is read through RocksDB");
    }

    /// Seals what was read, if it is the record. A record that cleaning moved meanwhile is as good in
    /// its old place: the descriptor keeps the file's bytes as they were.
    fn seal(&self, read: &Asked, slot: Filling) -> Result<Slot> {
        let info = RecordInfo {
            bytes: read.location.bytes,
            ..read.info.clone()
        };
        seal_record(&info, slot).map_err(|error| {
            let now = self.state().table.get(read.info.id);
            match now == Some(read.location) && !self.was_given_back(&read.location) {
                true => error,
                // Not the record's fault: what was read is not its place any more.
                false => gone(&read.info).caused_by(error),
            }
        })
    }

    /// Has the process that writes, beside this one, removed the record there and given its space back, be it
    /// between two parts of a read?
    fn was_given_back(&self, at: &Location) -> bool {
        if self.access == Access::ReadWrite {
            return false;
        }
        let offset = u64::from(at.page) * RECORD_ALIGN as u64;
        match self.reading.files.open(at.file) {
            Ok(file) => has_hole(&*file, offset, at.bytes.into()),
            // And the rest of its file; RocksDB has that open still.
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    fn get(&self, db: &Db, mut read: Asked, mut slot: Filling) -> Result<Slot> {
        let value = loop {
            let value = db.value(read.location.place()).map_err(|error| {
                match self.access == Access::ReadOnly && db::is_missing(&error) {
                    // The process that writes has removed what was in it, or moved it.
                    true => gone(&read.info).caused_by(error),
                    false => error,
                }
            });
            if let Some(value) = value? {
                break value;
            }
            // Cleaning may have moved it since it was looked up: then it is there.
            let now = self.state().table.get(read.info.id);
            let moved = now.filter(|now| *now != read.location);
            read.location = moved.ok_or_else(|| gone(&read.info))?;
        };
        let image = slot.image_mut()?;
        let image = image
            .get_mut(..value.len())
            .filter(|image| image.len() == read.location.bytes as usize)
            .ok_or_else(|| {
                Error::corrupt("a record has another length than its entry says")
                    .with("key", read.info.key)
            })?;
        image.copy_from_slice(&value);
        drop(value);
        self.seal(&read, slot)
    }
}

fn gone(info: &RecordInfo) -> Error {
    Error::unavailable("the record is gone").with("record", info.id.0)
}
