//! How an open store goes on after a write that failed.
//!
//! RocksDB takes no more writes then until it is opened again, and it deletes files whose ingestion
//! failed though its manifest may name them: a second name of each, a *spare*, is kept until it is open.

use super::*;

/// A write to the index that failed may be in its log all the same, and be there again once RocksDB is
/// reopened: the table, which has nothing of it, says what is right.
#[derive(Default)]
pub(super) struct Unsure {
    /// Files that are not in the table, and whose entries must go before they do: what was moved into
    /// one is known by that entry, until its old file's says again that it is there.
    pub(super) files: BTreeSet<u64>,
    /// Files whose records were about to be moved or removed.
    pub(super) left: BTreeSet<u64>,
}

impl RocksDisk {
    /// After a failed write RocksDB refuses all others until the database is opened again: does
    /// that. Where that fails too (the disk is full, say), records can be read all the same if they
    /// can be at all, and the next call that changes something tries again. The caller holds
    /// `commit`.
    pub(super) fn unstick(&self) -> Result<()> {
        if !self.state().is_stuck {
            return Ok(());
        }
        let mut guard = self.db.write().unwrap_or_else(PoisonError::into_inner);
        self.unstick_db(&mut guard)
    }

    /// See [`Self::unstick`].
    pub(super) fn unstick_db(&self, db: &mut Option<Db>) -> Result<()> {
        let (is_stuck, is_closed) = {
            let state = self.state();
            (state.is_stuck, state.is_closed)
        };
        if is_closed {
            return Err(Error::closed());
        }
        if !is_stuck {
            return Ok(());
        }
        drop(db.take());
        match self.open_again() {
            Ok(opened) => {
                *db = Some(opened);
                let mut state = self.state();
                state.lingering.look_for_strangers();
                state.is_stuck = false;
                Ok(())
            }
            Err(error) => {
                tracing::warn!(%error, "the database cannot be opened again now");
                *db = Db::open_read_only(&self.database).ok();
                Err(error)
            }
        }
    }

    /// RocksDB deletes files whose ingestion failed, though its manifest may have them already, and
    /// would not open without them.
    pub(super) fn keep_spares(&self, files: &[WrittenFile]) {
        let spares = files.iter().filter_map(|file| {
            let spare = file.path.with_extension("spare");
            // Without it the next opening of the store rebuilds it.
            let kept = fs::hard_link(&file.path, &spare).ok();
            kept.map(|()| (spare, file.disk_bytes))
        });
        let spares: Vec<_> = spares.collect();
        let mut state = self.state();
        state.spares = spares;
        state.is_stuck = true;
    }

    fn open_again(&self) -> Result<Db> {
        let db =
            Db::open(&self.database, self.sizing).or_else(|error| self.open_with_spares(error))?;
        self.make_sure(&db)?;
        for file in db.live_payload()? {
            // Its call was answered with an error: it must not come back.
            if self.state().table.file(file.first).is_none() {
                db.drop_payload(file.first, file.last)?;
                self.state().lingering.add(file.first, file.disk_bytes);
            }
        }
        let spares = std::mem::take(&mut self.state().spares);
        for (spare, bytes) in spares {
            self.discard(spare, bytes);
        }
        Ok(db)
    }

    /// Has the index say what the table says, durably, of all that a failed write to it may have changed.
    fn make_sure(&self, db: &Db) -> Result<()> {
        let mut changes = db.index_batch();
        {
            let state = self.state();
            for first in &state.unsure.files {
                changes.delete(&entry::file_key(*first));
                changes.delete(&entry::live_key(*first));
            }
            for first in &state.unsure.left {
                let entry = state.table.live_entry(*first, &[]);
                changes.put(&entry::live_key(*first), &entry);
            }
        }
        self.apply(changes, true)?;
        self.state().unsure = Unsure::default();
        Ok(())
    }

    /// Opens the database for want of files whose ingestion failed. They were given consecutive numbers,
    /// in their order; of which of them `error` tells is not known. RocksDB compares each with what its
    /// manifest says of it. What is put back is dropped afterwards.
    fn open_with_spares(&self, mut error: Error) -> Result<Db> {
        let Some(missing) = db::missing_payload(&error, &self.database) else {
            return Err(error);
        };
        let spares = self.state().spares.clone();
        for before in 0..spares.len() as u64 {
            let numbers = missing.saturating_sub(before)..;
            let paths = numbers.map(|number| db::payload_path(&self.database, number));
            let mut linked = Vec::new();
            let put_back = spares.iter().zip(paths).try_for_each(|((spare, _), path)| {
                fs::hard_link(spare, &path)?;
                linked.push(path);
                Ok::<_, io::Error>(())
            });
            let opened = match put_back {
                Ok(()) => Db::open(&self.database, self.sizing),
                Err(cause) => Err(unwritable(&self.database, cause)),
            };
            error = match opened {
                Ok(db) => return Ok(db),
                Err(error) => error,
            };
            for path in linked {
                let _ = fs::remove_file(path);
            }
        }
        Err(error)
    }

    /// Why there is no database.
    pub(super) fn no_database(&self) -> Error {
        let state = self.state();
        match state.is_closing || state.is_closed {
            true => Error::closed(),
            false => Error::unavailable("the database could not be opened again after a failure"),
        }
    }
}
