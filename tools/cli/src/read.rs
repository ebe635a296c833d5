//! Reads records through the tier, which verifies them, into a small arena.

use stemkv_store::{
    DiskTier, Error, HostArena, KvGeometry, RecordHeader, RecordInfo, Result, Slot,
};

/// Bytes that are read at once, at least.
const ARENA_BYTES: usize = 32 << 20;

/// Where records are read to.
pub(crate) struct Reader<'a> {
    tier: &'a dyn DiskTier,
    arena: HostArena,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(tier: &'a dyn DiskTier, geometry: &KvGeometry) -> Result<Self> {
        let slot = RecordHeader::BYTES + geometry.payload_bytes().next_multiple_of(4096);
        let arena = HostArena::open(geometry, ARENA_BYTES.max(2 * slot), |_, _| ())?;
        Ok(Reader { tier, arena })
    }

    /// Reads as many of `records` as fit at once, at least one, and hands over each answer, in
    /// any order. Returns how many there were.
    pub(crate) fn read_some<'r>(
        &self,
        records: &[&'r RecordInfo],
        answer: &mut dyn FnMut(&'r RecordInfo, Result<Slot>),
    ) -> usize {
        let mut reads = Vec::new();
        for record in records {
            let payload = (record.bytes as usize).saturating_sub(RecordHeader::BYTES);
            match self
                .arena
                .allocate(payload, 1)
                .and_then(|mut slots| slots.pop())
            {
                Some(slot) => reads.push(((*record).clone(), slot)),
                None => break,
            }
        }
        if reads.is_empty() {
            if let Some(record) = records.first() {
                let error = Error::corrupt("a record is longer than any chunk of this geometry");
                answer(record, Err(error.with("bytes", record.bytes)));
            }
            return records.len().min(1);
        }
        let count = reads.len();
        self.tier
            .read(reads, &mut |i, read| answer(records[i], read));
        count
    }

    pub(crate) fn read_one(&self, record: &RecordInfo) -> Result<Slot> {
        let mut read = Err(Error::internal("the tier did not answer"));
        self.read_some(&[record], &mut |_, answer| read = answer);
        read
    }
}
