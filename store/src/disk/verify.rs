//! Where a tier believes a record: before its bytes go down, and after they come up.

use crate::{Error, ErrorKind, Filling, RecordHeader, RecordInfo, Result, Slot};

/// Records are stored in multiples of this many bytes, on multiples of it.
pub(super) const RECORD_ALIGN: usize = 4096;

/// Bytes of a record on disk: header page and payload, rounded up.
pub(super) fn record_bytes(header: &RecordHeader) -> usize {
    (RecordHeader::BYTES + header.payload_bytes()).next_multiple_of(RECORD_ALIGN)
}

/// The header of a slot and the part of its image that is stored.
///
/// # Errors
/// `Corrupt` where the header page does not verify any more: memory was damaged.
pub(super) fn record_of(slot: &Slot) -> Result<(RecordHeader, &[u8])> {
    let header = slot.header()?;
    let image = slot.image().get(..record_bytes(&header));
    image
        .map(|image| (header, image))
        .ok_or_else(|| Error::internal("a slot is shorter than its header says"))
}

/// Seals `filling`, into which the image of `info` was read, if it is what `info` names: identity,
/// header and every slab.
///
/// # Errors
/// `Corrupt`, naming the record; a mismatch ([`Error::is_mismatch`]) where its header verifies and is
/// another's. The slot is freed.
pub(super) fn seal_record(info: &RecordInfo, filling: Filling) -> Result<Slot> {
    let sealed = filling.seal_image(|header| {
        let found = (header.namespace, header.parent, header.key, header.depth);
        if found != (info.namespace, info.parent, info.key, info.depth) {
            return Err(Error::invalid("a record is another than its entry says"));
        }
        if record_bytes(header) != info.bytes as usize {
            return Err(Error::invalid(
                "a record has another length than its entry says",
            ));
        }
        Ok(())
    });
    sealed.map_err(|error| {
        // A store's records are all ours: bytes that claim otherwise are not that record.
        let error = match error.kind() {
            ErrorKind::Invalid => {
                Error::corrupt("a record is not what its store says").caused_by(error)
            }
            _ => error,
        };
        error.with("key", info.key).with("record", info.id.0)
    })
}
