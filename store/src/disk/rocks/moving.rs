//! Moves the live records of some files into a new one, each verified on its way.

use super::clean::Step;
use super::commit::file_record;
use super::*;
use crate::HostArena;
use crate::disk::verify::RECORD_ALIGN;

/// Bytes that cleaning reads before it looks for foreground reads again.
const READ_BYTES: u64 = 4 << 20;

/// How long cleaning leaves a file alone that it could not read: a disk may try for seconds, and a
/// damaged sector stays damaged.
const SET_ASIDE: Duration = Duration::from_secs(60);

/// What is read of the files that are emptied.
#[derive(Default)]
struct Found {
    moving: Vec<Moving>,
    /// What does not verify.
    lost: Vec<RecordId>,
    /// Files of records that could not be read, and why.
    failed: Vec<(u64, Error)>,
}

/// One record on its way to another file.
struct Moving {
    id: RecordId,
    from: Location,
    last_use_ms: u64,
    header: RecordHeader,
    image: Slot,
}

impl RocksDisk {
    /// Moves what is live in some files to a new one, but for what cannot be read.
    pub(super) fn empty(&self, victims: Vec<u64>) -> Result<Step> {
        let (moving, failed) = self.read_live(&victims)?;
        if moving.is_empty() {
            return Ok(failed.map_or(Step::Gained, Step::Unreadable));
        }
        let moving = in_order_of_prefixes(moving);
        let headers: Vec<_> = moving.iter().map(|moving| &moving.header).collect();
        let Ok(turn) = self.begin(&headers, 0, None)? else {
            return Ok(Step::Nothing);
        };
        let mut bytes = 0;
        let mut records = Vec::with_capacity(moving.len());
        for moving in &moving {
            let (header, image) = record_of(&moving.image)?;
            bytes += image.len() as u64;
            records.push(NewRecord {
                id: moving.id,
                last_use_ms: moving.last_use_ms,
                header,
                image,
            });
        }
        let from = moving
            .iter()
            .map(|moving| (moving.id, moving.from.file))
            .collect();
        self.foreground.stand_back();
        self.write_records(turn, records, Some(from))?;
        self.state().rewritten_bytes += bytes;
        Ok(Step::Gained)
    }

    /// The live records of some files, each verified. What does not verify is lost, and taken out; a
    /// file of which something could not be read is set aside, and the reason comes with the answer.
    fn read_live(&self, victims: &[u64]) -> Result<(Vec<Moving>, Option<Error>)> {
        let mut live: Vec<(RecordId, Location)> = {
            let state = self.state();
            let files = victims.iter().filter_map(|first| state.table.file(*first));
            let live = files.flat_map(|file| file.live.iter());
            live.filter_map(|id| Some((*id, state.table.get(*id)?)))
                .collect()
        };
        live.sort_by_key(|(_, location)| (location.file, location.slot));
        let raw_bytes = RecordHeader::BYTES + self.geometry.payload_bytes();
        let bytes: usize = live.iter().map(|(_, at)| at.bytes as usize).sum();
        let bytes = bytes.max(raw_bytes.next_multiple_of(RECORD_ALIGN));
        let arena = HostArena::open(&self.geometry, bytes, |_, _| {})?;
        let infos = self.infos(victims)?;
        let mut found = Found::default();
        let mut rest = &live[..];
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = rest.iter().take_while(|(_, at)| {
                let fits = bytes == 0 || bytes + u64::from(at.bytes) <= READ_BYTES;
                bytes += u64::from(at.bytes);
                fits
            });
            let (now, later) = rest.split_at(fits.count());
            rest = later;
            self.foreground.stand_back();
            self.read_some(now, &infos, &arena, &mut found)?;
        }
        let Found {
            moving,
            lost,
            failed,
        } = found;
        if !lost.is_empty() {
            tracing::warn!(
                records = lost.len(),
                "records that do not verify were met while cleaning"
            );
            metrics::counter!("stemkv_disk_lost_records_total").increment(lost.len() as u64);
            self.remove(&lost)?;
        }
        let until = self.clock.now() + SET_ASIDE;
        let mut why = None;
        for (file, error) in failed {
            let before = self.state().set_aside.insert(file, until);
            if before.is_none_or(|before| before < until) {
                tracing::warn!(%error, file, "a file cannot be read and is not cleaned for now");
            }
            why.get_or_insert(error);
        }
        Ok((moving, why))
    }

    /// What the index says of the records in some files; where it cannot be read, their directories.
    fn infos(&self, files: &[u64]) -> Result<HashMap<RecordId, RecordInfo>> {
        let guard = self.db();
        let db = guard.as_ref().ok_or_else(|| self.no_database())?;
        let mut infos = HashMap::new();
        for first in files {
            let indexed = db.file_records(*first).unwrap_or_default();
            let records = match indexed.is_empty() {
                true => self.records_by_directory(db, *first)?,
                false => indexed,
            };
            infos.extend(
                records
                    .into_iter()
                    .map(|record| (record.info.id, record.info)),
            );
        }
        Ok(infos)
    }

    /// None where the directory is damaged too.
    fn records_by_directory(&self, db: &Db, first: u64) -> Result<Vec<FileRecord>> {
        let Some(last) = self.state().table.file(first).map(|file| file.last) else {
            return Ok(Vec::new());
        };
        match self.directory(db, last) {
            Ok(entries) => Ok(entries.iter().map(file_record).collect()),
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn read_some(
        &self,
        records: &[(RecordId, Location)],
        infos: &HashMap<RecordId, RecordInfo>,
        arena: &HostArena,
        found: &mut Found,
    ) -> Result<()> {
        let guard = self.db();
        let db = guard.as_ref().ok_or_else(|| self.no_database())?;
        let (mut reads, mut whose) = (Vec::new(), Vec::new());
        for &(id, at) in records {
            let now = self.state().table.get(id);
            let Some(info) = infos.get(&id).filter(|_| now == Some(at)) else {
                // Removed meanwhile, or in neither index nor directory any more.
                if now == Some(at) {
                    found.lost.push(id);
                }
                continue;
            };
            let payload = (at.bytes as usize).saturating_sub(RecordHeader::BYTES);
            let slot = arena.allocate(payload, 1).and_then(|mut slots| slots.pop());
            let slot = slot.ok_or_else(|| Error::internal("no memory to move a record"))?;
            whose.push((id, at));
            reads.push((info.clone(), slot));
        }
        self.read_records(db, reads, &mut |i, answer| {
            let (id, from) = whose[i];
            let last_use_ms = self.state().table.last_use_ms(id).unwrap_or(0);
            let read = answer.and_then(|image| Ok((image.header()?, image)));
            match read {
                Ok((header, image)) => found.moving.push(Moving {
                    id,
                    from,
                    last_use_ms,
                    header,
                    image,
                }),
                // Removed meanwhile.
                Err(_) if self.state().table.get(id) != Some(from) => {}
                // A sound record is not thrown away for what the store says of it.
                Err(error) if error.kind() == ErrorKind::Corrupt && !error.is_mismatch() => {
                    found.lost.push(id);
                }
                Err(error) => found.failed.push((from.file, error)),
            }
        });
        Ok(())
    }
}

/// Blocks of one prefix one behind the other, parents first, prefixes in the order of their places: a
/// prefix is read in few long reads.
fn in_order_of_prefixes(mut moving: Vec<Moving>) -> Vec<Moving> {
    moving.sort_by_key(|moving| (moving.header.depth, moving.id));
    let by_key: HashMap<Key, usize> = moving
        .iter()
        .enumerate()
        .map(|(i, moving)| (moving.header.key, i))
        .collect();
    // Of each, the place of the first block of its prefix that is moved too.
    let mut heads: Vec<(u64, u32)> = Vec::with_capacity(moving.len());
    for (i, of) in moving.iter().enumerate() {
        let parent = by_key.get(&of.header.parent).filter(|parent| **parent < i);
        let own = (of.from.file, of.from.slot);
        heads.push(parent.map_or(own, |parent| heads[*parent]));
    }
    let mut order: Vec<_> = heads.into_iter().zip(moving).collect();
    // Stable: within a prefix they are sorted by depth.
    order.sort_by_key(|(head, _)| *head);
    order.into_iter().map(|(_, moving)| moving).collect()
}
