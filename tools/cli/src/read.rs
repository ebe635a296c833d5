//! Reads records through the tier, which verifies them, into a small arena.

use stemkv_store::{
    DiskTier, Error, Filling, HostArena, KvGeometry, RecordHeader, RecordInfo, Result, Slot,
};

/// Bytes that are read at once, at least.
const ARENA_BYTES: usize = 32 << 20;

/// Where records are read to.
pub(crate) struct Reader<'a> {
    tier: &'a dyn DiskTier,
    arena: HostArena,
}

/// Records that are read at once, with a slot for each; without any for a record that is too long.
pub(crate) struct Batch<'r> {
    pub(crate) records: Vec<&'r RecordInfo>,
    slots: Vec<Filling>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(tier: &'a dyn DiskTier, geometry: &KvGeometry) -> Result<Self> {
        let slot = RecordHeader::BYTES + geometry.payload_bytes().next_multiple_of(4096);
        let arena = HostArena::open(geometry, ARENA_BYTES.max(2 * slot), |_, _| ())?;
        Ok(Reader { tier, arena })
    }

    /// The first of `records`, as many as fit at once: at least one where there are any.
    pub(crate) fn batch_of<'r>(&self, records: &[&'r RecordInfo]) -> Batch<'r> {
        let mut slots = Vec::new();
        for record in records {
            let payload = (record.bytes as usize).saturating_sub(RecordHeader::BYTES);
            match self.arena.allocate(payload, 1) {
                Some(slot) => slots.extend(slot),
                None => break,
            }
        }
        let count = slots.len().max(1).min(records.len());
        Batch {
            records: records[..count].to_vec(),
            slots,
        }
    }

    /// Reads a batch and hands over each answer with its place in the batch, in any order.
    pub(crate) fn read<'r>(
        &self,
        batch: Batch<'r>,
        answer: &mut dyn FnMut(usize, &'r RecordInfo, Result<Slot>),
    ) {
        let Batch { records, slots } = batch;
        if slots.is_empty() {
            for (i, record) in records.into_iter().enumerate() {
                let error = Error::corrupt("a record is longer than any chunk of this geometry");
                answer(i, record, Err(error.with("bytes", record.bytes)));
            }
            return;
        }
        let reads = records
            .iter()
            .map(|record| (*record).clone())
            .zip(slots)
            .collect();
        self.tier
            .read(reads, &mut |i, read| answer(i, records[i], read));
    }

    pub(crate) fn read_one(&self, record: &RecordInfo) -> Result<Slot> {
        let mut read = Err(Error::internal("the tier did not answer"));
        let batch = self.batch_of(&[record]);
        self.read(batch, &mut |_, _, answer| read = answer);
        read
    }
}
