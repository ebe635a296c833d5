//! The disk seam: where chunks survive a restart.

use std::num::NonZeroU64;

use crate::{Filling, HostArena, Key, Result, Slot};

#[cfg(feature = "rocksdb")]
mod direct;
#[cfg(feature = "rocksdb")]
mod directory;
#[cfg(feature = "rocksdb")]
mod entry;
#[cfg(feature = "rocksdb")]
mod manifest;
#[cfg(feature = "rocksdb")]
mod rocks;
#[cfg(any(test, feature = "sim"))]
mod sim;
#[cfg(any(test, feature = "sim", feature = "rocksdb"))]
mod verify;

#[cfg(feature = "rocksdb")]
pub use direct::ReadSizes;
#[cfg(feature = "rocksdb")]
pub use rocks::{ReadWay, RocksDisk};

#[cfg(any(test, feature = "sim"))]
pub use sim::{SimDisk, SimDiskCall, SimMedium};

/// A record's handle, valid until it is removed or the tier is closed. It stays the same when the
/// tier moves the bytes. Ascending in the order of writing within one opening of a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordId(pub NonZeroU64);

/// A batch's place in the order in which batches become durable, within one opening of a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(pub u64);

/// What is known of a record without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordInfo {
    /// Its handle.
    pub id: RecordId,
    /// The namespace root it was saved under.
    pub namespace: Key,
    /// Its parent's key; the namespace root for a first block.
    pub parent: Key,
    /// Its own key.
    pub key: Key,
    /// Position in its prefix.
    pub depth: u32,
    /// Bytes of the image on disk.
    pub bytes: u32,
    /// When it was last used, milliseconds since 1970, as of the last [`DiskTier::touch`].
    pub last_use_ms: u64,
}

/// Where the bytes of a disk tier are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct DiskUsage {
    /// The bound. Writes never pass it; a store that was opened with a smaller one, or rebuilt, may start
    /// above it until enough was evicted.
    pub capacity_bytes: u64,
    /// Real bytes on disk: allocated blocks of every file of the store, unlinked ones that are
    /// still open included.
    pub used_bytes: u64,
    /// Bytes of records that can be read.
    pub live_bytes: u64,
    /// Records that can be read.
    pub records: u64,
    /// Files that hold records.
    pub files: u64,
    /// Payload bytes written since open, by saves.
    pub written_bytes: u64,
    /// Payload bytes written since open, by cleaning and by putting small files together.
    pub rewritten_bytes: u64,
    /// Files that could not be read at opening. They take room until they are given up
    /// ([`DiskTier::drop_unread`]), and the next opening tries them again.
    pub unread_files: u64,
    /// Bytes of those files.
    pub unread_bytes: u64,
    /// Reads kept under way for one call, as many as were found to suit the disk by now. 0 where the tier
    /// leaves that to others.
    pub read_depth: u64,
}

/// A batch that does not fit now: nothing of it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchTooLarge {
    /// Record bytes that should be removed first: at least what makes it fit, and what keeps the tier
    /// from moving records a lot to make room for it. None where [`DiskTier::reclaim`] is enough.
    pub missing_bytes: u64,
}

/// The longest value that [`DiskTier::put_meta`] takes.
pub const META_BYTES_MAX: usize = 64 << 10;

/// What a scan found.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct DiskScan {
    /// Records reported.
    pub records: u64,
    /// Records that were left out because their entry or file did not verify.
    pub dropped: u64,
}

/// Stores chunk images by record: one of the three seams.
///
/// All methods block, and may be called from several threads at once; an asynchronous caller gives
/// them threads. A tier verifies what it reads: what it returns is what was written under that
/// record, or an error.
pub trait DiskTier: Send + Sync + 'static {
    /// Writes a batch, parents before children, and returns when it is durable: synced, and found
    /// by the next opening after a power cut. A record is visible to [`DiskTier::read`] from the
    /// return on. Batches become durable in the order in which the calls began, so a child is never
    /// durable before an ancestor that an earlier call wrote; children of a batch that is still under
    /// way, and may fail, are for [`DiskTier::write_after`].
    ///
    /// `Ok(Err(_))` where the capacity would be passed: nothing was written.
    ///
    /// # Errors
    /// `Unavailable` where the disk fails: nothing of the batch is visible; `Closed`.
    fn write(&self, batch: &[Slot]) -> Result<Result<Vec<RecordId>, BatchTooLarge>> {
        self.write_after(batch, None, &mut |_| {})
    }

    /// [`DiskTier::write`] for a caller that has several batches under way: calls `begun` as soon as
    /// the batch has its place in the order, before its bytes are written, so that the next one can
    /// begin behind it. Where nothing is written for want of room, and where the call fails at once,
    /// `begun` is not called.
    ///
    /// `after` names a batch of this opening of which this one holds children: where that one is not
    /// written, this one is not either. Only one that may be under way: of those that ended long ago it
    /// is not known that they were written. A batch that fails takes no others with it, but for those that
    /// are made durable by the same call of the system.
    ///
    /// `begun` must not call the tier.
    ///
    /// # Errors
    /// As [`DiskTier::write`]; `Unavailable` also where `after` was not written.
    fn write_after(
        &self,
        batch: &[Slot],
        after: Option<BatchId>,
        begun: &mut dyn FnMut(BatchId),
    ) -> Result<Result<Vec<RecordId>, BatchTooLarge>>;

    /// Says which arena records are read into from here on, so that the tier can have its memory looked
    /// up once for all reads; it keeps the arena for as long as it lives. To be called once, after
    /// opening; a tier that was not told reads as well, and also into other arenas.
    fn attach(&self, _: &HostArena) {}

    /// Reads records into slots, each verified (identity, header, every slab) before it is sealed,
    /// and hands each over as soon as it is whole, while the rest is still being read: calls
    /// `answer(i, …)` once for each read, `i` being its place in `reads`, on the calling thread.
    /// Reads are begun in the order of the call, so what is needed first comes first there; they may
    /// end in another. Records that were written one after the other are read the fastest in that
    /// order.
    ///
    /// `answer` must not call the tier; a panic in it leaves no read under way.
    ///
    /// # Errors
    /// For each read: `Corrupt` where the bytes do not verify (remove the record) or are of another record
    /// or kind of store ([`Error::is_mismatch`](crate::Error::is_mismatch)), `Unavailable`
    /// where the disk fails or the record is gone, `Closed`. The slot is freed.
    fn read(&self, reads: Vec<(RecordInfo, Filling)>, answer: &mut dyn FnMut(usize, Result<Slot>));

    /// Bytes of the image of the record that `info` names, for a slot that fits; what `info` says of
    /// them is not looked at. Cheap: the tier has it in memory. `None` where the record is gone.
    fn image_bytes(&self, info: &RecordInfo) -> Option<u32>;

    /// Makes records unreadable, durably, and gives their space back, at the latest when it is
    /// asked for ([`DiskTier::reclaim`]). Unknown ids are ignored. Remove children before parents.
    ///
    /// # Errors
    /// `Unavailable` where the disk fails; `Closed`.
    fn remove(&self, ids: &[RecordId]) -> Result<()>;

    /// Gives space back until at least `bytes` could be written, or nothing more can be had without
    /// removing records. Returns the bytes that could be written now.
    ///
    /// # Errors
    /// As [`DiskTier::remove`].
    fn reclaim(&self, bytes: u64) -> Result<u64>;

    /// Gives up the files that could not be read at opening ([`DiskUsage::unread_files`]), and with them what
    /// may be read again tomorrow: for a caller that needs room and would have to remove records for it.
    /// Returns how many they were. Their bytes count until they are gone, which may be later where the system
    /// refuses it now.
    ///
    /// # Errors
    /// `Unavailable` where the tier was opened for reading alone.
    fn drop_unread(&self) -> Result<u64> {
        Ok(0)
    }

    /// Notes when records were last used, so that the next opening knows. Not synced: a crash may
    /// lose it.
    ///
    /// # Errors
    /// As [`DiskTier::remove`].
    fn touch(&self, ids: &[RecordId], last_use_ms: u64) -> Result<()>;

    /// Reports every record, in any order, without reading payloads; one that is being moved meanwhile
    /// may be missed.
    ///
    /// # Errors
    /// `Unavailable` where the index cannot be read at all; what does not verify is left out and
    /// counted. `visit` must not call the tier.
    fn scan(&self, visit: &mut dyn FnMut(RecordInfo)) -> Result<DiskScan>;

    /// Keeps a small value of the caller's under `key`, in place of an earlier one; an empty value
    /// removes it. Durable when the call returns. For what describes the records (a namespace in
    /// words, statistics) and can be made again: a store that had to be rebuilt from its records
    /// has lost it.
    ///
    /// # Errors
    /// `Invalid` for a value of more than [`META_BYTES_MAX`]; `Busy` where it does not fit the
    /// capacity; else as [`DiskTier::remove`].
    fn put_meta(&self, key: &Key, value: &[u8]) -> Result<()>;

    /// Reports every value kept by [`DiskTier::put_meta`], in the order of the keys. `visit` must
    /// not call the tier.
    ///
    /// # Errors
    /// As [`DiskTier::scan`].
    fn scan_meta(&self, visit: &mut dyn FnMut(Key, &[u8])) -> Result<()>;

    /// Where the bytes are. Cheap: kept by the tier, not measured by the call.
    fn usage(&self) -> DiskUsage;

    /// Finishes what has begun and releases the store. Everything after answers `Closed`. Waits for no
    /// call to the system that hangs, but for the last sync.
    ///
    /// # Errors
    /// `Unavailable` where the last sync fails: the tier is closed all the same; or where something that
    /// had begun did not end in time (named): nothing begins any more, and another call tries again.
    fn close(&self) -> Result<()>;
}
