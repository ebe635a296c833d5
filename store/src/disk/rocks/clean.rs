//! Giving space back: whole files where nothing in them is live, and files with few live records by
//! moving those into a new one (cost-benefit cleaning, after Rosenblum and Ousterhout, *The Design
//! and Implementation of a Log-Structured File System*, 1992, without their age term: recency is the
//! index's matter, a file's age says nothing of its records).

use memmap2::MmapMut;

use super::*;
use crate::disk::verify::RECORD_ALIGN;

/// Live bytes that one cleaning step moves at most.
const STEP_BYTES: u64 = 32 << 20;

/// Records of the smallest batch for which the answer of a reclaim holds.
const PROMISED_BATCH: usize = 8;

/// One record on its way to another file.
struct Moving {
    id: RecordId,
    from: u64,
    last_use_ms: u64,
    header: RecordHeader,
    /// On a page of memory, as direct I/O wants it.
    image: MmapMut,
}

impl RocksDisk {
    /// See [`DiskTier::reclaim`].
    pub(super) fn clean(&self, bytes: u64) -> Result<u64> {
        loop {
            {
                let _committing = self.committing();
                self.unstick()?;
                let guard = self.db();
                self.drop_dead_files(guard.as_ref().ok_or_else(Error::closed)?)?;
            }
            let free = self.free_bytes(&self.state());
            let free = self.in_records(free.saturating_sub(self.reserve_bytes()));
            if free >= bytes || !self.clean_step()? {
                return Ok(free);
            }
        }
    }

    /// Bytes of whole records that fit `bytes` of files, in batches of at least
    /// [`PROMISED_BATCH`]: small records lose much to padding and directory.
    fn in_records(&self, bytes: u64) -> u64 {
        let layers = self.geometry.layers as usize;
        let record =
            (RecordHeader::BYTES + self.geometry.payload_bytes()).next_multiple_of(RECORD_ALIGN);
        let file = batch::bytes_max(PROMISED_BATCH, PROMISED_BATCH * record, layers);
        (u128::from(bytes) * (PROMISED_BATCH * record) as u128 / u128::from(file)) as u64
    }

    /// Empties the sparsest files that fit one step; was there anything to gain?
    fn clean_step(&self) -> Result<bool> {
        let victims = self.choose();
        let moved = self.move_out(&victims);
        let mut state = self.state();
        for first in &victims {
            if let Some(file) = state.table.file_mut(*first) {
                file.cleaning = false;
            }
        }
        drop(state);
        moved.map(|moved| moved > 0)
    }

    /// Takes the files whose emptying gives back most for what it costs.
    fn choose(&self) -> Vec<u64> {
        let mut state = self.state();
        let budget = self.free_bytes(&state).min(STEP_BYTES);
        let mut files: Vec<_> = state
            .table
            .files()
            .filter(|(_, file)| !file.cleaning)
            // By records and not by bytes: what padding and directory take comes again in the new
            // file, so a file without a dead record has nothing to give.
            .map(|(first, file)| {
                let share = file.live.len() as f64 / file.records(first).max(1) as f64;
                (share, first, file.live_bytes)
            })
            .filter(|(share, ..)| *share < 0.9)
            .collect();
        files.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let (mut victims, mut live) = (Vec::new(), 0);
        for (_, first, file_live) in files {
            // A quarter more for alignment, directory and index.
            if (live + file_live) * 5 / 4 + (64 << 10) > budget {
                break;
            }
            live += file_live;
            victims.push(first);
        }
        for first in &victims {
            if let Some(file) = state.table.file_mut(*first) {
                file.cleaning = true;
            }
        }
        victims
    }

    fn move_out(&self, victims: &[u64]) -> Result<usize> {
        if victims.is_empty() {
            return Ok(0);
        }
        let moving = self.read_live(victims)?;
        if moving.is_empty() {
            return Ok(victims.len());
        }
        let headers: Vec<_> = moving.iter().map(|moving| &moving.header).collect();
        let Ok(turn) = self.begin(&headers, 0, false) else {
            return Ok(0);
        };
        let bytes: u64 = moving.iter().map(|moving| moving.image.len() as u64).sum();
        let records = moving.iter().map(|moving| NewRecord {
            id: moving.id,
            last_use_ms: moving.last_use_ms,
            header: moving.header.clone(),
            image: &moving.image,
        });
        let from = moving
            .iter()
            .map(|moving| (moving.id, moving.from))
            .collect();
        self.write_records(turn, records.collect(), Some(from))?;
        self.state().rewritten_bytes += bytes;
        Ok(victims.len())
    }

    /// The live records of some files, in the order of their ids: parents come before children.
    /// What cannot be read or has no sound header is lost, and taken out.
    fn read_live(&self, victims: &[u64]) -> Result<Vec<Moving>> {
        let mut ids: Vec<(RecordId, Location)> = {
            let state = self.state();
            let files = victims.iter().filter_map(|first| state.table.file(*first));
            let live = files.flat_map(|file| file.live.iter());
            live.filter_map(|id| Some((*id, state.table.get(*id)?)))
                .collect()
        };
        ids.sort_by_key(|(id, location)| (location.depth, *id));
        let (mut moving, mut lost) = (Vec::new(), Vec::new());
        {
            let guard = self.db();
            let db = guard.as_ref().ok_or_else(Error::closed)?;
            for (id, location) in ids {
                let value = db.value(location.place())?;
                let image = value.as_deref().unwrap_or_default();
                let page = image.get(..RecordHeader::BYTES).unwrap_or_default();
                match RecordHeader::decode(page, &self.geometry) {
                    Ok(header) if image.len() == location.bytes as usize => {
                        let last_use_ms = self.state().table.last_use_ms(id).unwrap_or(0);
                        let mut aligned = MmapMut::map_anon(image.len()).map_err(|e| {
                            Error::unavailable("no memory to move a record").caused_by(e)
                        })?;
                        aligned.copy_from_slice(image);
                        moving.push(Moving {
                            id,
                            from: location.file,
                            last_use_ms,
                            header,
                            image: aligned,
                        });
                    }
                    _ => lost.push(id),
                }
            }
        }
        if !lost.is_empty() {
            tracing::warn!(
                records = lost.len(),
                "records that do not verify were met while cleaning"
            );
            self.remove(&lost)?;
        }
        Ok(moving)
    }

    /// Drops the files in which nothing is live. The caller holds `commit`.
    pub(super) fn drop_dead_files(&self, db: &Db) -> Result<()> {
        let dead: Vec<_> = {
            let state = self.state();
            let dead = state.table.dead_files().into_iter();
            dead.filter_map(|first| Some((first, state.table.file(first)?.last)))
                .collect()
        };
        if dead.is_empty() && self.state().lingering_bytes == 0 {
            return Ok(());
        }
        // What was moved out of them must be found elsewhere also after a power cut, and what was
        // removed nowhere.
        if self.state().unsynced_files > 0 {
            db.sync().inspect_err(|_| self.state().is_stuck = true)?;
            self.state().unsynced_files = 0;
        }
        let mut changes = db.index_batch();
        for (first, last) in &dead {
            // The file first: an entry without its file is dropped at opening, a file without its
            // entry would be adopted with records that were removed.
            db.drop_payload(*first, *last)
                .inspect_err(|_| self.state().is_stuck = true)?;
            changes.delete(&entry::file_key(*first));
            changes.delete(&entry::live_key(*first));
        }
        self.apply(changes, false)?;
        let payload_bytes = allocated_bytes(&payload_dir(db.dir()));
        let other_bytes = db.other_bytes();
        let mut state = self.state();
        for (first, _) in dead {
            let bytes = state.table.file(first).map_or(0, |file| file.disk_bytes);
            self.reading.files.forget(first, bytes);
            state.table.drop_file(first);
        }
        state.other_bytes = other_bytes;
        state.lingering_bytes = payload_bytes
            .saturating_sub(
                fs::metadata(payload_dir(db.dir())).map_or(0, |folder| allocated(&folder)),
            )
            .saturating_sub(state.table.disk_bytes());
        Ok(())
    }
}

fn allocated(meta: &fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    meta.blocks() * 512
}
