//! A store as the commands see it: a disk tier, where it is, and how it could be opened.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use stemkv::{NamespaceDescription, Stats};
use stemkv_store::{Clock, DiskScan, DiskTier, Key, KvGeometry, RecordInfo, Result};

use crate::Exit;
use crate::tree::Tree;

/// How a store was opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "how", rename_all = "snake_case")]
pub enum Access {
    /// For reading; no process has it open.
    ReadOnly,
    /// For reading, beside the process that writes to it.
    BesideWriter {
        /// That process.
        pid: u32,
    },
    /// For reading and writing.
    ReadWrite,
    /// For reading and writing, after it was rebuilt from its payload files.
    Rebuilt {
        /// Why it did not open.
        because: String,
    },
    /// It does not open: what is shown comes from the headers found in its payload files. Records
    /// that were removed may be among them.
    Salvaged {
        /// Why it does not open.
        because: String,
    },
}

impl Access {
    /// What a command ends with that looked at it and found nothing else wrong.
    pub(crate) fn exit(&self) -> Exit {
        match self {
            Access::Salvaged { .. } => Exit::Problems,
            _ => Exit::Fine,
        }
    }

    pub(crate) fn words(&self) -> String {
        match self {
            Access::ReadOnly => "for reading; no process has it open".into(),
            Access::BesideWriter { pid } => format!("for reading, beside process {pid}"),
            Access::ReadWrite => "for writing".into(),
            Access::Rebuilt { because } => {
                format!("for writing, REBUILT from its payload files: {because}")
            }
            Access::Salvaged { because } => {
                format!("BROKEN, read from its payload files alone: {because}")
            }
        }
    }
}

/// A store that a command looks at.
pub struct Store {
    /// Its folder.
    pub path: PathBuf,
    /// How it was opened.
    pub access: Access,
    /// The geometry of its records.
    pub geometry: KvGeometry,
    /// Where its records are.
    pub tier: Arc<dyn DiskTier>,
    /// For ages.
    pub clock: Arc<dyn Clock>,
}

/// What describes the records of a store.
#[derive(Default)]
pub(crate) struct Metas {
    pub(crate) namespaces: BTreeMap<Key, NamespaceDescription>,
    pub(crate) stats: Option<Stats>,
    /// Are there statistics, of another version?
    pub(crate) stats_are_unreadable: bool,
    /// By the numbers of the devices, as they wrote them.
    pub(crate) calibrations: BTreeMap<usize, serde_json::Value>,
    /// Values that nobody of this version wrote, statistics among them.
    pub(crate) unreadable: u64,
}

impl Metas {
    /// A namespace in a few words.
    pub(crate) fn name(&self, root: &Key) -> String {
        match self.namespaces.get(root) {
            None => "(not described)".into(),
            Some(found) => {
                let optional = [
                    found
                        .adapter
                        .as_ref()
                        .map(|adapter| format!("adapter {adapter}")),
                    found
                        .kv_quantization
                        .as_ref()
                        .map(|kind| format!("KV {kind}")),
                    found
                        .rope_scaling
                        .as_ref()
                        .map(|scaling| format!("RoPE {scaling}")),
                    found
                        .salt_fingerprint
                        .as_ref()
                        .map(|print| format!("salt {print:.8}")),
                ];
                let mut name = format!("{} @ {}", found.model, short_revision(&found.revision));
                for part in optional.into_iter().flatten() {
                    name.push_str(", ");
                    name.push_str(&part);
                }
                name
            }
        }
    }
}

/// A revision that is a hash, as files and repositories have them, by its first digits.
fn short_revision(revision: &str) -> &str {
    match revision.len() >= 40 && revision.bytes().all(|b| b.is_ascii_hexdigit()) {
        true => &revision[..12],
        false => revision,
    }
}

impl Store {
    pub(crate) fn records(&self) -> Result<(Vec<RecordInfo>, DiskScan)> {
        let mut records = Vec::new();
        let scan = self.tier.scan(&mut |record| records.push(record))?;
        Ok((records, scan))
    }

    pub(crate) fn tree(&self) -> Result<(Tree, DiskScan)> {
        let (records, scan) = self.records()?;
        Ok((Tree::new(records), scan))
    }

    /// What is described; nothing where it cannot be read: the records speak for themselves.
    pub(crate) fn metas(&self) -> Metas {
        let mut metas = Metas::default();
        let read = self.tier.scan_meta(&mut |key, value| {
            if key == Stats::META_KEY {
                match serde_json::from_slice(value) {
                    Ok(stats) => metas.stats = Some(stats),
                    Err(_) => {
                        metas.stats_are_unreadable = true;
                        metas.unreadable += 1;
                    }
                }
                return;
            }
            if let Some(device) = Stats::calibrated_device(&key) {
                match serde_json::from_slice(value) {
                    Ok(calibration) => drop(metas.calibrations.insert(device, calibration)),
                    Err(_) => metas.unreadable += 1,
                }
                return;
            }
            match serde_json::from_slice(value) {
                Ok(description) => drop(metas.namespaces.insert(key, description)),
                Err(_) => metas.unreadable += 1,
            }
        });
        if read.is_err() {
            metas.unreadable += 1;
        }
        metas
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.clock.unix_ms()
    }

    pub(crate) fn path_words(&self) -> String {
        self.path.display().to_string()
    }

    /// Does another process write to it meanwhile?
    pub(crate) fn has_writer(&self) -> bool {
        matches!(self.access, Access::BesideWriter { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_revision_that_is_a_hash_is_shortened() {
        assert_eq!(short_revision(&"5f4fa13b".repeat(8)), "5f4fa13b5f4f");
        for whole in ["1", "main", &"5f4fa13b".repeat(4), &"version-1".repeat(8)] {
            assert_eq!(short_revision(whole), whole);
        }
    }
}
