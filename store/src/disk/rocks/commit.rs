//! How a payload file and its index entries become a part of the store, durably.

use super::*;
use crate::disk::verify::record_bytes;

/// Files whose index entries may wait for a sync: the next opening may have to read as many
/// directories.
const UNSYNCED_FILES_MAX: u64 = 64;

impl RocksDisk {
    /// Writes records into the files of their turn and makes those and their index entries durable, in turn.
    pub(super) fn write_records(
        &self,
        turn: Turn<'_>,
        records: Vec<NewRecord<'_>>,
        moved_from: Option<HashMap<RecordId, u64>>,
    ) -> Result<Vec<DirectoryEntry>> {
        let moved_from = moved_from.map(Arc::new);
        let mut records = records.into_iter();
        let mut layouts = Vec::with_capacity(turn.files.len());
        for file in &turn.files {
            let records = records.by_ref().take(file.records).collect();
            layouts.push((*file, lay_out(file.first, records)?));
        }
        let staging = self.staging_dir();
        let lane = self.lane.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_place()?;
        // There already, unless somebody took it away.
        let _ = fs::create_dir(&staging);
        let mut files: Vec<WrittenFile> = Vec::with_capacity(layouts.len());
        for (file, (mut layout, entries)) in layouts {
            let path = staging.join(format!("{:020}.sst", file.first));
            let disk_bytes = layout.write(&path).inspect_err(|_| {
                self.discard(path.clone(), file.reserved_bytes);
                for file in &files {
                    self.discard(file.path.clone(), file.disk_bytes);
                }
            })?;
            files.push(WrittenFile {
                first: file.first,
                path,
                entries,
                disk_bytes,
                reserved_bytes: file.reserved_bytes,
                moved_from: moved_from.clone(),
            });
        }
        turn.commit(files, lane)
    }

    /// Makes files a part of the store, together or not at all, and puts their records into the
    /// index.
    ///
    /// They are durable once RocksDB has them, before their index entries are: a file without an
    /// entry is adopted from its directory. So the log of the index is synced only now and then, for
    /// a quick opening; removing syncs it always, and what is in it before the removal with it.
    pub(super) fn commit_files(&self, files: &[WrittenFile]) -> Result<()> {
        let _committing = self.begin_change()?;
        let guard = self.db();
        let db = guard.as_ref().ok_or_else(Error::closed)?;
        let inode = |file: &WrittenFile| {
            let meta = fs::metadata(&file.path).map_err(|error| unreadable(&file.path, error));
            meta.map(|meta| meta.ino())
        };
        let inodes = files.iter().map(inode).collect::<Result<Vec<_>>>()?;
        let paths: Vec<&Path> = files.iter().map(|file| &*file.path).collect();
        db.ingest(&paths).inspect_err(|_| self.keep_spares(files))?;
        let unfound = |(file, inode): (&WrittenFile, u64)| {
            let is_found = self.reading.files.taken_in(file.first, inode);
            (!is_found).then_some(file.first)
        };
        let unfound: Vec<u64> = files.iter().zip(inodes).filter_map(unfound).collect();
        if !unfound.is_empty() {
            self.ask_for_numbers(db, &unfound);
        }
        if db.has_undroppable_payload() {
            tracing::error!("a payload file landed on level 0: its space cannot be given back");
        }
        let mut changes = db.index_batch();
        let (mut placed, mut dead) = (Vec::new(), Vec::new());
        let mut left: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        let sync = {
            let mut state = self.state();
            for file in files {
                let mut uses = Vec::with_capacity(file.entries.len());
                for (slot, entry) in (0_u32..).zip(&file.entries) {
                    let now = state.table.get(entry.id);
                    let is_wanted = file.moved_from.as_ref().is_none_or(|from| {
                        now.is_some_and(|now| from.get(&entry.id) == Some(&now.file))
                    });
                    // It may have been touched while it was moved.
                    let last_use_ms = state.table.last_use_ms(entry.id);
                    let last_use_ms = last_use_ms.unwrap_or(entry.last_use_ms);
                    uses.push(is_wanted.then_some(last_use_ms));
                    let location = locate(file.first, slot, entry);
                    if !is_wanted {
                        dead.push(location);
                        continue;
                    }
                    placed.push((entry.id, location, last_use_ms));
                    if let Some(now) = now {
                        left.entry(now.file).or_default().push(now.slot);
                    }
                }
                put_file(
                    &mut changes,
                    file.first,
                    &file.entries,
                    &uses,
                    state.next_place,
                );
            }
            for (file, slots) in &left {
                let entry = state.table.live_entry(*file, slots);
                changes.put(&entry::live_key(*file), &entry);
            }
            state.unsynced_files += files.len() as u64;
            state.unsynced_files >= UNSYNCED_FILES_MAX
        };
        if let Err(error) = self.apply(changes, sync) {
            // They go when RocksDB is opened again, once the index has nothing of them any more. Where it
            // comes to no reopening here, the next opening of the store finds all of the change, or none.
            let mut state = self.state();
            for file in files {
                state.lingering.add(file.first, file.disk_bytes);
                state.unsure.files.insert(file.first);
            }
            state.unsure.left.extend(left.into_keys());
            return Err(error);
        }
        let mut state = self.state();
        for file in files {
            state.line.release(file.reserved_bytes);
            state
                .table
                .add_file(file.first, PayloadFile::new(file.last(), file.disk_bytes));
        }
        for (id, location, last_use_ms) in placed {
            state.table.place(id, location, last_use_ms);
        }
        for location in dead {
            state.table.note_removed(location);
        }
        Ok(())
    }

    /// Asks RocksDB for the numbers of files that it was just given: it counts what it tried in vain, too, and
    /// may be far beyond the last one that is known.
    fn ask_for_numbers(&self, db: &Db, firsts: &[u64]) {
        match db.live_payload() {
            Ok(live) => live
                .iter()
                .filter(|file| firsts.contains(&file.first))
                .for_each(|file| self.reading.files.know(file.first, file.number)),
            Err(error) => tracing::warn!(%error, "payload files are read through RocksDB alone"),
        }
    }

    /// Applies changes to the index, and measures what it takes now; a failure asks for a reopening. The
    /// caller holds `commit`.
    pub(super) fn apply(&self, changes: IndexBatch<'_>, sync: bool) -> Result<()> {
        let db = changes.db();
        let applied = changes.apply(sync);
        let measured = db.other_bytes();
        let mut state = self.state();
        self.note_other_bytes(&mut state, measured);
        match applied {
            // The log is one file after the other: what was written before is synced too.
            Ok(()) if sync => state.unsynced_files = 0,
            Ok(()) => {}
            Err(_) => state.is_stuck = true,
        }
        applied
    }
}

pub(super) fn locate(first: u64, slot: u32, entry: &DirectoryEntry) -> Location {
    Location {
        file: first,
        slot,
        page: entry.page,
        bytes: record_bytes(&entry.header) as u32,
    }
}

/// Puts a file into the index, with the records of it that are live (`uses`: there).
pub(super) fn put_file(
    changes: &mut IndexBatch<'_>,
    first: u64,
    entries: &[DirectoryEntry],
    uses: &[Option<u64>],
    next_place: u64,
) {
    let records: Vec<_> = entries.iter().map(file_record).collect();
    changes.put(
        &entry::file_key(first),
        &entry::encode_file(first, &records),
    );
    let as_written =
        |(used, entry): (&Option<u64>, &DirectoryEntry)| *used == Some(entry.last_use_ms);
    if !uses.iter().zip(entries).all(as_written) {
        changes.put(&entry::live_key(first), &entry::encode_live(uses));
    }
    changes.put(&[entry::NEXT], &next_place.to_le_bytes());
}

pub(super) fn file_record(entry: &DirectoryEntry) -> FileRecord {
    let header = &entry.header;
    FileRecord {
        info: RecordInfo {
            id: entry.id,
            namespace: header.namespace,
            parent: header.parent,
            key: header.key,
            depth: header.depth,
            bytes: record_bytes(header) as u32,
            last_use_ms: entry.last_use_ms,
        },
        page: entry.page,
    }
}
