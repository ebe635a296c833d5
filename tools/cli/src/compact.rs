//! `stemkv compact`: gives space back and drops what does not verify.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::sync::Arc;

use serde::Serialize;
use stemkv::index::{Index, Pool};
use stemkv_store::{RecordId, Result};

use crate::store::{Access, Store};
use crate::text::{self, field};
use crate::tree::Tree;
use crate::verify::{Bad, Progress, read_all, show_bad};
use crate::{Exit, Report};

/// Blocks taken out of the index at once.
const EVICT_BLOCKS: usize = 64;

/// What a compaction did, or would do.
#[derive(Debug, Serialize)]
pub struct Compaction {
    path: String,
    access: Access,
    /// Nothing was changed.
    dry_run: bool,
    records: u64,
    live_bytes: u64,
    used_bytes_before: u64,
    /// Not known of a dry run.
    used_bytes_after: Option<u64>,
    /// Dropped because they do not verify.
    corrupt: Vec<Bad>,
    /// Dropped because they cannot be reached from a first block, those behind corrupt ones among
    /// them.
    unreachable: u64,
    /// Kept although they could not be read now, or are not what the store says of them.
    unreadable: Vec<Bad>,
    /// Files that could not be read at opening, and their bytes: kept, or given up for `free_bytes`.
    unread_files: u64,
    unread_bytes: u64,
    /// They were given up.
    unread_given_up: bool,
    /// Kept although they cannot be reached: what leads to them may be in those files.
    unreachable_kept: u64,
    /// Asked to be given back.
    free_bytes: u64,
    /// Coldest records that go for it.
    evicted: u64,
    evicted_bytes: u64,
}

/// What goes in any case, and what could.
struct Plan {
    /// Children before parents.
    drop: Vec<RecordId>,
    dropped_bytes: u64,
    unreachable: u64,
    /// Not to be reached, and what leads to them may be in files that cannot be read: they go with those.
    kept: Vec<RecordId>,
    corrupt: Vec<Bad>,
    unreadable: Vec<Bad>,
    /// The records that stay, coldest leaves first to go.
    index: Arc<Index>,
    bytes: HashMap<RecordId, u64>,
}

impl Plan {
    fn make(store: &Store, progress: &mut dyn FnMut(Progress)) -> Result<Plan> {
        let (records, _) = store.records()?;
        let findings = read_all(store, &records, None, progress)?;
        let corrupt: HashSet<_> = findings
            .corrupt
            .iter()
            .map(|(record, _)| record.id)
            .collect();
        let places: HashMap<_, _> = records
            .iter()
            .map(|record| (record.id, (record.depth, u64::from(record.bytes))))
            .collect();
        let sound = records
            .into_iter()
            .filter(|record| !corrupt.contains(&record.id));
        let (index, unreachable) = Tree::index(sound.collect());
        let children_first = |ids: &mut Vec<RecordId>| {
            ids.sort_by_key(|id| std::cmp::Reverse((places[id].0, *id)));
        };
        let (unreachable, mut kept) = match store.tier.usage().unread_files {
            0 => (unreachable, Vec::new()),
            _ => (Vec::new(), unreachable),
        };
        let mut drop: Vec<_> = corrupt
            .into_iter()
            .chain(unreachable.iter().copied())
            .collect();
        children_first(&mut drop);
        children_first(&mut kept);
        Ok(Plan {
            dropped_bytes: drop.iter().map(|id| places[id].1).sum(),
            drop,
            unreachable: unreachable.len() as u64,
            kept,
            corrupt: findings.corrupt.into_iter().map(|(_, bad)| bad).collect(),
            unreadable: findings.unreadable,
            index,
            bytes: places
                .into_iter()
                .map(|(id, (_, bytes))| (id, bytes))
                .collect(),
        })
    }

    fn kept_bytes(&self) -> u64 {
        self.kept.iter().map(|id| self.bytes[id]).sum()
    }

    /// Takes the coldest leaves out of the index until they have `bytes`, or none is left.
    fn evict(&self, bytes: u64) -> (Vec<RecordId>, u64) {
        let (mut evicted, mut sum) = (Vec::new(), 0);
        while sum < bytes {
            // One at a time where a few would be too many.
            let average = self.bytes.values().sum::<u64>() / self.bytes.len().max(1) as u64;
            let want = ((bytes - sum) / average.max(1)).clamp(1, EVICT_BLOCKS as u64);
            let more = self.index.evict(Pool::Disk, want as usize);
            if more.is_empty() {
                break;
            }
            for id in more.iter().filter_map(|evicted| evicted.record) {
                sum += self.bytes.get(&id).copied().unwrap_or(0);
                evicted.push(id);
            }
        }
        (evicted, sum)
    }
}

/// Compacts an open store, or tells what would be done. `free_bytes` are given back to the file
/// system at least, where that many can be had.
pub(crate) fn compact(
    store: &Store,
    free_bytes: u64,
    dry_run: bool,
    progress: &mut dyn FnMut(Progress),
) -> Result<Compaction> {
    let before = store.tier.usage();
    let mut plan = Plan::make(store, progress)?;
    let (mut evicted, mut evicted_bytes) = (0, 0);
    let mut unread_given_up = false;
    let mut used_bytes_after = None;
    if dry_run {
        // What is not live may come back whole, at best.
        let beside = before.live_bytes + before.unread_bytes;
        let mut slack = before.used_bytes.saturating_sub(beside) + plan.dropped_bytes;
        if slack < free_bytes && before.unread_files > 0 {
            unread_given_up = true;
            slack += before.unread_bytes + plan.kept_bytes();
        }
        let (ids, bytes) = plan.evict(free_bytes.saturating_sub(slack));
        (evicted, evicted_bytes) = (ids.len() as u64, bytes);
    } else {
        let tier = &*store.tier;
        if !plan.drop.is_empty() {
            tier.remove(&plan.drop)?;
        }
        loop {
            tier.reclaim(u64::MAX)?;
            let used = tier.usage().used_bytes;
            used_bytes_after = Some(used);
            let given_back = before.used_bytes.saturating_sub(used);
            // Before anything that can be read.
            if given_back < free_bytes && tier.usage().unread_files > 0 {
                unread_given_up = true;
                tier.remove(&plan.kept)?;
                tier.drop_unread()?;
                continue;
            }
            let (ids, bytes) = plan.evict(free_bytes.saturating_sub(given_back));
            if ids.is_empty() {
                break;
            }
            tier.remove(&ids)?;
            evicted += ids.len() as u64;
            evicted_bytes += bytes;
        }
        tier.close()?;
    }
    if unread_given_up {
        plan.unreachable += plan.kept.len() as u64;
        plan.kept.clear();
    }
    Ok(Compaction {
        path: store.path_words(),
        access: store.access.clone(),
        dry_run,
        records: before.records,
        live_bytes: before.live_bytes,
        used_bytes_before: before.used_bytes,
        used_bytes_after,
        corrupt: plan.corrupt,
        unreachable: plan.unreachable,
        unreadable: plan.unreadable,
        unread_files: before.unread_files,
        unread_bytes: before.unread_bytes,
        unread_given_up,
        unreachable_kept: plan.kept.len() as u64,
        free_bytes,
        evicted,
        evicted_bytes,
    })
}

impl Compaction {
    /// What was given back, once it was; by how much that is less than asked.
    fn given_back(&self) -> Option<(u64, u64)> {
        let given = self
            .used_bytes_before
            .saturating_sub(self.used_bytes_after?);
        Some((given, self.free_bytes.saturating_sub(given)))
    }
}

impl Report for Compaction {
    fn exit(&self) -> Exit {
        let is_short = self.given_back().is_some_and(|(_, missing)| missing > 0);
        match is_short || !self.unreadable.is_empty() || self.unread_files > 0 {
            false => Exit::Fine,
            true => Exit::Problems,
        }
    }

    fn show(&self, out: &mut dyn Write) -> io::Result<()> {
        field(out, "store", &self.path)?;
        field(out, "opened", &self.access.words())?;
        if let (true, Access::Salvaged { .. }) = (self.dry_run, &self.access) {
            field(
                out,
                "would",
                "rebuild the store from its payload files first",
            )?;
        }
        let before = format!(
            "{}, {} live of {} on disk",
            text::plural(self.records, "record"),
            text::bytes(self.live_bytes),
            text::bytes(self.used_bytes_before)
        );
        field(out, "before", &before)?;
        let verb = if self.dry_run {
            "would drop"
        } else {
            "dropped"
        };
        let dropped = format!(
            "{} that did not verify, {} out of reach",
            text::plural(self.corrupt.len() as u64, "record"),
            text::count(self.unreachable)
        );
        field(out, verb, &dropped)?;
        if self.unread_files > 0 {
            let mut words = format!(
                "{} of {} that could not be read: ",
                text::plural(self.unread_files, "file"),
                text::bytes(self.unread_bytes)
            );
            words += match (self.unread_given_up, self.dry_run) {
                (false, _) => "kept",
                (true, false) => "given up",
                (true, true) => "would be given up",
            };
            if self.unreachable_kept > 0 {
                words += &format!(
                    ", with {} out of reach without",
                    text::plural(self.unreachable_kept, "record")
                );
            }
            field(out, "unread", &words)?;
        }
        if self.free_bytes > 0 {
            let verb = if self.dry_run {
                "would evict"
            } else {
                "evicted"
            };
            let evicted = format!(
                "{}, {}, coldest first, to give back {}",
                text::plural(self.evicted, "record"),
                text::bytes(self.evicted_bytes),
                text::bytes(self.free_bytes)
            );
            field(out, verb, &evicted)?;
        }
        match self.used_bytes_after.zip(self.given_back()) {
            None => field(out, "changed", "nothing: give --yes to do it")?,
            Some((after, (given, missing))) => {
                let mut words = format!(
                    "{} on disk, {} given back",
                    text::bytes(after),
                    text::bytes(given)
                );
                if missing > 0 {
                    words += &format!(
                        "; {} less than asked: no more records to evict",
                        text::bytes(missing)
                    );
                }
                field(out, "after", &words)?;
            }
        }
        show_bad(out, self.corrupt.iter().chain(&self.unreadable))
    }
}
