//! How a tier ends: it waits for what has begun, but for no call that hangs in the kernel.

use super::*;
use std::sync::TryLockError;
use std::time::Instant;

/// How long a close waits for calls that have begun.
pub(super) const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// How often it looks whether a lock is free.
const LOOK_EVERY: Duration = Duration::from_millis(1);

impl RocksDisk {
    /// As [`DiskTier::close`], waiting for what has begun for at most `limit`.
    ///
    /// # Errors
    /// `Unavailable` where the last sync fails, or where calls had not ended by then: it says how many
    /// reads, writes and changes of the index. Then nothing begins any more, but the folder stays this
    /// process's until they have ended and the tier is closed once more, or dropped.
    pub fn close_within(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        if !self.end_line(deadline) {
            return Err(self.hangs());
        }
        let committing = locked(deadline, || self.commit.try_lock());
        let _committing = committing.ok_or_else(|| self.hangs())?;
        if self.state().is_closed {
            return Ok(());
        }
        let database = locked(deadline, || self.db.try_write());
        let mut database = database.ok_or_else(|| self.hangs())?;
        // What can be closed in order comes back in order.
        let unstuck = self.check_place();
        let unstuck = unstuck.and_then(|()| self.unstick_db(&mut database));
        self.state().is_closed = true;
        let db = database.take();
        drop(database);
        let synced = match (db, self.access) {
            (Some(db), Access::ReadWrite) => unstuck.and_then(|()| db.sync()),
            _ => unstuck,
        };
        self.reading.files.close();
        // The database is closed by now; only then may another process have the folder.
        let mut state = self.state();
        (state.place, state.lock) = (None, None);
        drop(state);
        synced
    }

    /// What a close waited for in vain.
    fn hangs(&self) -> Error {
        let changes = match self.commit.try_lock() {
            Err(TryLockError::WouldBlock) => 1,
            _ => 0,
        };
        Error::unavailable("the disk tier cannot be closed: calls to the system have not ended")
            .with("reads", self.foreground.count())
            .with("writes", self.state().line.under_way())
            .with("changes", changes)
            .with("path", self.dir.display())
    }
}

/// Takes a lock as soon as it is free; `None` where it is not by the deadline.
fn locked<G>(
    deadline: Instant,
    attempt: impl Fn() -> std::result::Result<G, TryLockError<G>>,
) -> Option<G> {
    loop {
        match attempt() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOOK_EVERY),
        }
    }
}
