//! `stemkv verify`: reads and re-checks every record.

use std::error::Error as _;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use serde::Serialize;
use stemkv_store::{Error, ErrorKind, KvGeometry, RecordHeader, RecordInfo, Result};

use crate::inspect::CodecTally;
use crate::read::Reader;
use crate::store::{Access, Store};
use crate::text::{self, Column, Table, field};
use crate::tree::Tree;
use crate::{Exit, Report};

/// How far a long command is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Records done.
    pub records: u64,
    /// … of so many.
    pub of_records: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Records that did not verify.
    pub corrupt: u64,
}

/// What every record of a store said.
#[derive(Debug, Serialize)]
pub struct Verification {
    path: String,
    access: Access,
    records: u64,
    bytes: u64,
    sound: u64,
    /// Entries that are damaged, so that their record is not known.
    damaged_entries: u64,
    /// Records that cannot be reached from a first block.
    unreachable: u64,
    /// Records that the process beside us removed, or moved, meanwhile.
    gone: u64,
    corrupt: Vec<Bad>,
    unreadable: Vec<Bad>,
    codecs: String,
}

/// A record that did not verify or could not be read.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Bad {
    key: String,
    record: u64,
    namespace: String,
    depth: u32,
    bytes: u32,
    why: String,
}

impl Bad {
    fn new(record: &RecordInfo, error: &Error) -> Self {
        Bad {
            key: record.key.to_hex(),
            record: record.id.0.get(),
            namespace: record.namespace.to_hex(),
            depth: record.depth,
            bytes: record.bytes,
            why: match error.is_mismatch().then(|| error.source()).flatten() {
                Some(cause) => format!("{error}: {cause}"),
                None => error.to_string(),
            },
        }
    }
}

/// What came of reading every record.
#[derive(Default)]
pub(crate) struct Findings {
    pub(crate) bytes: u64,
    pub(crate) sound: u64,
    pub(crate) corrupt: Vec<(RecordInfo, Bad)>,
    pub(crate) unreadable: Vec<Bad>,
    pub(crate) codecs: CodecTally,
}

impl Findings {
    fn add(&mut self, record: &RecordInfo, read: Result<RecordHeader>, geometry: &KvGeometry) {
        self.bytes += u64::from(record.bytes);
        match read {
            Ok(header) => {
                self.sound += 1;
                self.codecs.add(&header, geometry);
            }
            Err(error) => {
                let bad = Bad::new(record, &error);
                match error.kind() {
                    ErrorKind::Corrupt if !error.is_mismatch() => {
                        self.corrupt.push((record.clone(), bad));
                    }
                    // It is sound, and another's.
                    _ => self.unreadable.push(bad),
                }
            }
        }
    }
}

/// Progress is told each time so many bytes were read.
const PROGRESS_BYTES: u64 = 32 << 20;

/// Threads that read, each a batch of its own: while one checks, the other's reads are under way.
const READERS: usize = 2;

/// What comes next, and how much was asked for before.
struct Turn {
    next: usize,
    bytes: u64,
}

/// Reads every record, at most `bytes_per_second` where that is given.
pub(crate) fn read_all(
    store: &Store,
    records: &[RecordInfo],
    bytes_per_second: Option<u64>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Findings> {
    let mut findings = Findings::default();
    if records.is_empty() {
        return Ok(findings);
    }
    let readers: Vec<_> = (0..READERS)
        .map(|_| Reader::new(&*store.tier, &store.geometry))
        .collect::<Result<_>>()?;
    let all: Vec<_> = records.iter().collect();
    let begun = store.clock.now();
    let turn = Mutex::new(Turn { next: 0, bytes: 0 });
    thread::scope(|scope| {
        let (answers, answered) = mpsc::channel();
        for reader in &readers {
            let (answers, all, turn) = (answers.clone(), &all, &turn);
            scope.spawn(move || {
                loop {
                    let batch = {
                        // Who waits for the limit keeps the turn: it holds for all readers.
                        let mut turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
                        if let Some(limit) = bytes_per_second {
                            let elapsed = store.clock.now().saturating_sub(begun);
                            thread::sleep(pause(turn.bytes, limit, elapsed));
                        }
                        let batch = reader.batch_of(&all[turn.next..]);
                        turn.next += batch.records.len();
                        let bytes = batch.records.iter().map(|info| u64::from(info.bytes));
                        turn.bytes += bytes.sum::<u64>();
                        batch
                    };
                    if batch.records.is_empty() {
                        return;
                    }
                    reader.read(batch, &mut |_, record, answer| {
                        let header = answer.and_then(|slot| slot.header());
                        // Nobody listens any more only where the listener has panicked.
                        let _ = answers.send((record, header));
                    });
                }
            });
        }
        drop(answers);
        let mut records = 0;
        let mut shown = 0;
        for (record, header) in answered {
            records += 1;
            findings.add(record, header, &store.geometry);
            if findings.bytes - shown >= PROGRESS_BYTES || records == all.len() as u64 {
                shown = findings.bytes;
                progress(Progress {
                    records,
                    of_records: all.len() as u64,
                    bytes: findings.bytes,
                    corrupt: findings.corrupt.len() as u64,
                });
            }
        }
    });
    // In the order of the index, whoever read them.
    findings.corrupt.sort_by_key(|(record, _)| record.id);
    findings.unreadable.sort_by_key(|bad| bad.record);
    Ok(findings)
}

/// How long to wait, so that `bytes` in all this time are no more than `limit` a second.
fn pause(bytes: u64, limit: u64, elapsed: Duration) -> Duration {
    Duration::from_secs_f64(bytes as f64 / limit.max(1) as f64).saturating_sub(elapsed)
}

pub(crate) fn verify(
    store: &Store,
    bytes_per_second: Option<u64>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Verification> {
    let (records, scan) = store.records()?;
    let findings = read_all(store, &records, bytes_per_second, progress)?;
    let count = records.len() as u64;
    let (_, unreachable) = Tree::index(records);
    // The files of a store that is written to go away under a reader: that is no fault.
    let (gone, unreadable) = match store.has_writer() {
        true => (findings.unreadable.len() as u64, Vec::new()),
        false => (0, findings.unreadable),
    };
    Ok(Verification {
        path: store.path_words(),
        access: store.access.clone(),
        records: count,
        bytes: findings.bytes,
        sound: findings.sound,
        damaged_entries: scan.dropped,
        unreachable: unreachable.len() as u64,
        gone,
        codecs: findings.codecs.words(),
        corrupt: findings.corrupt.into_iter().map(|(_, bad)| bad).collect(),
        unreadable,
    })
}

impl Report for Verification {
    fn exit(&self) -> Exit {
        let bad = self.corrupt.len() + self.unreadable.len();
        match (
            &self.access,
            bad as u64 + self.damaged_entries + self.unreachable,
        ) {
            (Access::Salvaged { .. }, _) | (_, 1..) => Exit::Problems,
            _ => Exit::Fine,
        }
    }

    fn show(&self, out: &mut dyn Write) -> io::Result<()> {
        field(out, "store", &self.path)?;
        field(out, "opened", &self.access.words())?;
        let read = format!(
            "{}, {}",
            text::plural(self.records, "record"),
            text::bytes(self.bytes)
        );
        field(out, "read", &read)?;
        field(out, "codecs", &self.codecs)?;
        field(out, "sound", &text::count(self.sound))?;
        field(out, "corrupt", &text::count(self.corrupt.len() as u64))?;
        let others = [
            ("unreadable", self.unreadable.len() as u64, ""),
            (
                "damaged",
                self.damaged_entries,
                " entries of the index or files, left out",
            ),
            (
                "unreachable",
                self.unreachable,
                " (the next opening for writing drops them)",
            ),
            (
                "gone",
                self.gone,
                " (removed or moved meanwhile by the process that writes)",
            ),
        ];
        for (name, number, note) in others.into_iter().filter(|other| other.1 > 0) {
            field(out, name, &format!("{}{note}", text::count(number)))?;
        }
        show_bad(out, self.corrupt.iter().chain(&self.unreadable))
    }
}

/// A table of what is wrong; nothing where nothing is.
pub(crate) fn show_bad<'a>(
    out: &mut dyn Write,
    bad: impl Iterator<Item = &'a Bad>,
) -> io::Result<()> {
    let mut bad = bad.peekable();
    if bad.peek().is_none() {
        return Ok(());
    }
    writeln!(out)?;
    let mut table = Table::new(&[
        ("key", Column::Left),
        ("record", Column::Right),
        ("namespace", Column::Left),
        ("depth", Column::Right),
        ("bytes", Column::Right),
        ("why", Column::Left),
    ]);
    for bad in bad {
        table.row([
            text::short(&bad.key).to_owned(),
            bad.record.to_string(),
            text::short(&bad.namespace).to_owned(),
            bad.depth.to_string(),
            text::bytes(bad.bytes.into()),
            bad.why.clone(),
        ]);
    }
    table.show(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_waits_for_what_is_ahead_of_it_and_not_when_behind() {
        let second = Duration::from_secs(1);
        assert_eq!(pause(3_000, 1_000, second), 2 * second);
        assert_eq!(pause(3_000, 1_000, 4 * second), Duration::ZERO);
        assert_eq!(pause(0, 0, Duration::ZERO), Duration::ZERO);
    }
}
