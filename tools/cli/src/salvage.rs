//! A disk tier over the payload files of a store that does not open.

use std::collections::BTreeMap;
use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use stemkv_store::disk::RocksDisk;
use stemkv_store::{
    BatchId, BatchTooLarge, DiskScan, DiskTier, DiskUsage, Error, Filling, Key, RecordHeader,
    RecordId, RecordInfo, Result, Slot,
};

/// Records found by their headers. Nothing can be written.
pub(crate) struct SalvagedDisk {
    /// In the order of a scan.
    records: Vec<(RecordInfo, PathBuf, u64)>,
    files: u64,
}

fn read_only<T>() -> Result<T> {
    Err(Error::unavailable(
        "the store is broken and was opened for reading alone",
    ))
}

impl SalvagedDisk {
    /// # Errors
    /// As [`RocksDisk::salvage`].
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let mut newest: BTreeMap<Key, (RecordHeader, PathBuf, u64)> = BTreeMap::new();
        let mut files = std::collections::BTreeSet::new();
        RocksDisk::salvage(dir, &mut |path, offset, header| {
            files.insert(path.to_owned());
            // Files come in the order of their making: a later copy is the newer one.
            newest.insert(header.key, (header, path.to_owned(), offset));
        })?;
        let mut found: Vec<_> = newest.into_values().collect();
        found.sort_by_key(|(header, ..)| header.depth);
        let records = (1..).filter_map(NonZeroU64::new).zip(found);
        let records = records.map(|(id, (header, path, offset))| {
            let bytes = RecordHeader::BYTES + header.payload_bytes().next_multiple_of(4096);
            let info = RecordInfo {
                id: RecordId(id),
                namespace: header.namespace,
                parent: header.parent,
                key: header.key,
                depth: header.depth,
                bytes: bytes as u32,
                last_use_ms: 0,
            };
            (info, path, offset)
        });
        Ok(SalvagedDisk {
            records: records.collect(),
            files: files.len() as u64,
        })
    }

    fn read_one(&self, info: &RecordInfo, mut filling: Filling) -> Result<Slot> {
        let gone = || Error::unavailable("the record is gone").with("record", info.id.0);
        let at = info.id.0.get() as usize - 1;
        let (_, path, offset) = self.records.get(at).ok_or_else(gone)?;
        let image = filling.image_mut()?;
        let image = image.get_mut(..info.bytes as usize).ok_or_else(gone)?;
        let read = File::open(path).and_then(|file| file.read_exact_at(image, *offset));
        read.map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Error::corrupt("a payload file is cut short"),
            _ => Error::unavailable("cannot read a payload file").caused_by(error),
        })?;
        filling.seal_image(|header| match header.key == info.key {
            true => Ok(()),
            false => Err(Error::corrupt("a record is another than its header said")),
        })
    }
}

impl DiskTier for SalvagedDisk {
    fn write_after(
        &self,
        _: &[Slot],
        _: Option<BatchId>,
        _: &mut dyn FnMut(BatchId),
    ) -> Result<Result<Vec<RecordId>, BatchTooLarge>> {
        read_only()
    }

    fn read(&self, reads: Vec<(RecordInfo, Filling)>, answer: &mut dyn FnMut(usize, Result<Slot>)) {
        for (i, (info, filling)) in reads.into_iter().enumerate() {
            answer(i, self.read_one(&info, filling));
        }
    }

    fn image_bytes(&self, info: &RecordInfo) -> Option<u32> {
        let at = info.id.0.get() as usize - 1;
        self.records.get(at).map(|(info, ..)| info.bytes)
    }

    fn remove(&self, _: &[RecordId]) -> Result<()> {
        read_only()
    }

    fn reclaim(&self, _: u64) -> Result<u64> {
        read_only()
    }

    fn touch(&self, _: &[RecordId], _: u64) -> Result<()> {
        read_only()
    }

    fn scan(&self, visit: &mut dyn FnMut(RecordInfo)) -> Result<DiskScan> {
        self.records
            .iter()
            .for_each(|(info, ..)| visit(info.clone()));
        Ok(DiskScan {
            records: self.records.len() as u64,
            dropped: 0,
        })
    }

    fn put_meta(&self, _: &Key, _: &[u8]) -> Result<()> {
        read_only()
    }

    fn scan_meta(&self, _: &mut dyn FnMut(Key, &[u8])) -> Result<()> {
        Ok(())
    }

    fn usage(&self) -> DiskUsage {
        let bytes = self
            .records
            .iter()
            .map(|(info, ..)| u64::from(info.bytes))
            .sum();
        DiskUsage {
            used_bytes: bytes,
            live_bytes: bytes,
            records: self.records.len() as u64,
            files: self.files,
            ..DiskUsage::default()
        }
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}
