//! Bytes by codec.

use std::collections::BTreeMap;

use serde::Serialize;
use stemkv_store::{KvGeometry, RecordHeader};

use crate::text;

#[derive(Debug, Serialize)]
pub(super) struct CodecBytes {
    pub(super) codec: String,
    pub(super) records: u64,
    pub(super) stored_bytes: u64,
    pub(super) raw_bytes: u64,
}

/// Stored and raw bytes by codec.
#[derive(Default)]
pub(crate) struct CodecTally(BTreeMap<String, (u64, u64, u64)>);

impl CodecTally {
    pub(crate) fn add(&mut self, header: &RecordHeader, geometry: &KvGeometry) {
        let of_codec = self.0.entry(codec_name(header)).or_default();
        of_codec.0 += 1;
        of_codec.1 += stored_bytes(header);
        of_codec.2 +=
            (geometry.token_bytes() * header.tokens as usize * header.layers.len()) as u64;
    }

    pub(super) fn into_rows(self) -> Vec<CodecBytes> {
        let row = |(codec, (records, stored_bytes, raw_bytes))| CodecBytes {
            codec,
            records,
            stored_bytes,
            raw_bytes,
        };
        self.0.into_iter().map(row).collect()
    }

    /// `raw: 7 records, 5.2 KiB`, one for each codec.
    pub(crate) fn words(&self) -> String {
        let part = |(codec, (records, stored, _)): (&String, &(u64, u64, u64))| {
            format!(
                "{codec}: {}, {}",
                text::plural(*records, "record"),
                text::bytes(*stored)
            )
        };
        self.0.iter().map(part).collect::<Vec<_>>().join("; ")
    }
}

pub(super) fn codec_name(header: &RecordHeader) -> String {
    format!("{:?}", header.codec).to_lowercase()
}

fn stored_bytes(header: &RecordHeader) -> u64 {
    header.slabs.iter().map(|slab| u64::from(slab.bytes)).sum()
}
