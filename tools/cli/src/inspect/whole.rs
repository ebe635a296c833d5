//! A whole store: its namespaces, bytes, tree and heat.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;
use stemkv::NamespaceDescription;
use stemkv_store::{Key, KvGeometry, RecordInfo, Result, Tier};

use super::codecs::{CodecBytes, CodecTally};
use crate::read::Reader;
use crate::store::{Access, Metas, Store};
use crate::text::{self, Column, Table, bar, field};
use crate::tree::{Shape, Tree};
use crate::{Exit, Report};

/// Records whose header is read to learn the codecs: reading all would read the whole store.
const CODEC_SAMPLE: usize = 32;

/// Seconds since the last use, up to which a row of the heat table counts.
const HEAT: [(u64, &str); 5] = [
    (60, "last minute"),
    (3600, "last hour"),
    (86_400, "last day"),
    (604_800, "last week"),
    (u64::MAX / 1000, "before that"),
];

/// A whole store.
#[derive(Debug, Serialize)]
pub struct Inspection {
    path: String,
    access: Access,
    geometry: KvGeometry,
    chunk_bytes: u64,
    records: u64,
    damaged: u64,
    files: u64,
    live_bytes: u64,
    used_bytes: u64,
    unread_files: u64,
    unread_bytes: u64,
    tiers: Vec<TierBytes>,
    codecs: Vec<CodecBytes>,
    codec_sample: u64,
    namespaces: Vec<NamespaceReport>,
    /// Descriptions, statistics and calibrations of another version, left out.
    unreadable_values: u64,
    tree: Shape,
    heat: Vec<Heat>,
}

/// What a tier holds. The host tier as the process that had the store last told of it.
#[derive(Debug, Serialize)]
struct TierBytes {
    tier: &'static str,
    blocks: u64,
    bytes: u64,
    capacity_bytes: Option<u64>,
    /// Of the last flush or close, for the host tier.
    as_of_unix_ms: Option<u64>,
}

#[derive(Debug, Serialize)]
struct NamespaceReport {
    root: String,
    name: String,
    description: Option<NamespaceDescription>,
    blocks: u64,
    tokens: u64,
    bytes: u64,
    last_use_unix_ms: u64,
    last_use: String,
}

#[derive(Debug, Serialize)]
struct Heat {
    used_within_seconds: Option<u64>,
    label: &'static str,
    blocks: u64,
    bytes: u64,
}

pub(crate) fn store(store: &Store) -> Result<Inspection> {
    let (tree, scan) = store.tree()?;
    let metas = store.metas();
    let (usage, now_ms) = (store.tier.usage(), store.now_ms());
    let (codecs, codec_sample) = codecs(store, &tree)?;
    let mut tiers = vec![TierBytes {
        tier: Tier::Disk.name(),
        blocks: scan.records,
        bytes: tree
            .records
            .iter()
            .map(|record| u64::from(record.bytes))
            .sum(),
        capacity_bytes: None,
        as_of_unix_ms: None,
    }];
    if let Some(stats) = &metas.stats {
        tiers.insert(
            0,
            TierBytes {
                tier: Tier::Host.name(),
                blocks: stats.index.host_blocks,
                bytes: stats.host.published_bytes,
                capacity_bytes: Some(stats.host.capacity_bytes),
                as_of_unix_ms: Some(stats.unix_ms),
            },
        );
    }
    Ok(Inspection {
        path: store.path_words(),
        access: store.access.clone(),
        geometry: store.geometry.clone(),
        chunk_bytes: store.geometry.payload_bytes() as u64,
        records: scan.records,
        damaged: scan.dropped,
        files: usage.files,
        live_bytes: usage.live_bytes,
        used_bytes: usage.used_bytes,
        unread_files: usage.unread_files,
        unread_bytes: usage.unread_bytes,
        tiers,
        codecs,
        codec_sample,
        namespaces: namespaces(store, &tree, &metas, now_ms),
        unreadable_values: metas.unreadable,
        tree: tree.shape(),
        heat: heat(&tree.records, now_ms),
    })
}

fn codecs(store: &Store, tree: &Tree) -> Result<(Vec<CodecBytes>, u64)> {
    let step = tree.records.len().div_ceil(CODEC_SAMPLE).max(1);
    let sample: Vec<_> = tree.records.iter().step_by(step).collect();
    if sample.is_empty() {
        return Ok((Vec::new(), 0));
    }
    let reader = Reader::new(&*store.tier, &store.geometry)?;
    let mut tally = CodecTally::default();
    let mut rest = &sample[..];
    while !rest.is_empty() {
        let batch = reader.batch_of(rest);
        rest = &rest[batch.records.len()..];
        reader.read(batch, &mut |_, _, answer| {
            // What does not verify is `verify`'s to tell.
            if let Ok(header) = answer.and_then(|slot| slot.header()) {
                tally.add(&header, &store.geometry);
            }
        });
    }
    Ok((tally.into_rows(), sample.len() as u64))
}

fn namespaces(store: &Store, tree: &Tree, metas: &Metas, now_ms: u64) -> Vec<NamespaceReport> {
    let mut by_root: BTreeMap<Key, (u64, u64, u64)> = metas
        .namespaces
        .keys()
        .map(|&root| (root, Default::default()))
        .collect();
    for record in &tree.records {
        let found = by_root.entry(record.namespace).or_default();
        found.0 += 1;
        found.1 += u64::from(record.bytes);
        found.2 = found.2.max(record.last_use_ms);
    }
    let mut rows: Vec<_> = by_root
        .into_iter()
        .map(|(root, (blocks, bytes, last_use_ms))| NamespaceReport {
            root: root.to_hex(),
            name: metas.name(&root),
            description: metas.namespaces.get(&root).cloned(),
            blocks,
            tokens: blocks * u64::from(store.geometry.block_tokens),
            bytes,
            last_use_unix_ms: last_use_ms,
            last_use: text::last_use(now_ms, last_use_ms),
        })
        .collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.bytes));
    rows
}

fn heat(records: &[RecordInfo], now_ms: u64) -> Vec<Heat> {
    let mut rows: Vec<Heat> = HEAT
        .iter()
        .enumerate()
        .map(|(i, &(seconds, label))| Heat {
            used_within_seconds: (i + 1 < HEAT.len()).then_some(seconds),
            label,
            blocks: 0,
            bytes: 0,
        })
        .collect();
    let mut unknown = Heat {
        used_within_seconds: None,
        label: "unknown",
        blocks: 0,
        bytes: 0,
    };
    for record in records {
        if record.last_use_ms == 0 {
            unknown.blocks += 1;
            unknown.bytes += u64::from(record.bytes);
            continue;
        }
        let age_ms = now_ms.saturating_sub(record.last_use_ms);
        let row = HEAT
            .iter()
            .position(|(seconds, _)| age_ms <= seconds * 1000);
        let row = &mut rows[row.unwrap_or(HEAT.len() - 1)];
        row.blocks += 1;
        row.bytes += u64::from(record.bytes);
    }
    rows.extend((unknown.blocks > 0).then_some(unknown));
    rows
}

/// A geometry in words.
pub(crate) fn geometry_words(geometry: &KvGeometry) -> String {
    let planes: Vec<String> = geometry
        .planes
        .iter()
        .map(|plane| format!("{}×{} B", plane.heads, plane.head_bytes))
        .collect();
    format!(
        "{} layers of [{}] a token, {}, blocks of {} tokens: chunks of {}",
        geometry.layers,
        planes.join(", "),
        format!("{:?}", geometry.dtype).to_lowercase(),
        geometry.block_tokens,
        text::bytes(geometry.payload_bytes() as u64)
    )
}

impl Report for Inspection {
    fn exit(&self) -> Exit {
        match (&self.access, self.damaged + self.tree.unreachable) {
            (Access::Salvaged { .. }, _) | (_, 1..) => Exit::Problems,
            _ => Exit::Fine,
        }
    }

    fn show(&self, out: &mut dyn Write) -> io::Result<()> {
        field(out, "store", &self.path)?;
        field(out, "opened", &self.access.words())?;
        field(out, "geometry", &geometry_words(&self.geometry))?;
        let mut records = format!(
            "{} in {}: {} live of {} on disk",
            text::plural(self.records, "record"),
            text::plural(self.files, "file"),
            text::bytes(self.live_bytes),
            text::bytes(self.used_bytes)
        );
        if self.damaged > 0 {
            records += &format!("; {} left out as damaged", text::count(self.damaged));
        }
        if self.unread_files > 0 {
            records += &text::unread(self.unread_files, self.unread_bytes);
        }
        field(out, "records", &records)?;
        if self.unreadable_values > 0 {
            let values = text::plural(self.unreadable_values, "value");
            let what = format!("{values} (descriptions, statistics) of another version");
            field(out, "left out", &what)?;
        }

        writeln!(out)?;
        let mut table = Table::new(&[
            ("namespace", Column::Left),
            ("blocks", Column::Right),
            ("tokens", Column::Right),
            ("bytes", Column::Right),
            ("last use", Column::Right),
            ("what", Column::Left),
        ]);
        for row in &self.namespaces {
            table.row([
                text::short(&row.root).to_owned(),
                text::count(row.blocks),
                text::count(row.tokens),
                text::bytes(row.bytes),
                if row.blocks > 0 {
                    row.last_use.clone()
                } else {
                    "-".into()
                },
                row.name.clone(),
            ]);
        }
        table.show(out)?;

        writeln!(out)?;
        let mut table = Table::new(&[
            ("tier", Column::Left),
            ("blocks", Column::Right),
            ("bytes", Column::Right),
            ("", Column::Left),
        ]);
        for row in &self.tiers {
            let note = match row.as_of_unix_ms {
                Some(_) => "as its process last told",
                None => "",
            };
            table.row([
                row.tier.into(),
                text::count(row.blocks),
                text::bytes(row.bytes),
                note.into(),
            ]);
        }
        table.show(out)?;

        writeln!(out)?;
        let sample = format!(
            "(of {} looked at)",
            text::plural(self.codec_sample, "record")
        );
        let mut table = Table::new(&[
            ("codec", Column::Left),
            ("records", Column::Right),
            ("stored", Column::Right),
            ("raw", Column::Right),
            (&sample, Column::Left),
        ]);
        for row in &self.codecs {
            table.row([
                row.codec.clone(),
                text::count(row.records),
                text::bytes(row.stored_bytes),
                text::bytes(row.raw_bytes),
            ]);
        }
        table.show(out)?;

        writeln!(out)?;
        let mut shape = format!(
            "{} in {}, {}",
            text::plural(
                self.tree.branching.iter().map(|row| row.blocks).sum(),
                "block"
            ),
            text::plural(self.tree.runs, "run"),
            text::plural(self.tree.first_blocks, "first block"),
        );
        if self.tree.unreachable > 0 {
            shape += &format!(
                "; {} out of reach",
                text::plural(self.tree.unreachable, "record")
            );
        }
        field(out, "tree", &shape)?;
        let branching: Vec<String> = self
            .tree
            .branching
            .iter()
            .map(|row| match row.children {
                0 => text::plural(row.blocks, "leaf").replace("leafs", "leaves"),
                children => format!("{} with {children}", text::count(row.blocks)),
            })
            .collect();
        field(out, "children", &branching.join(", "))?;

        writeln!(out)?;
        let most = self
            .tree
            .depths
            .iter()
            .map(|row| row.blocks)
            .max()
            .unwrap_or(0);
        let mut table = Table::new(&[
            ("depth", Column::Right),
            ("blocks", Column::Right),
            ("", Column::Left),
        ]);
        for row in &self.tree.depths {
            let range = match row.from == row.to {
                true => row.from.to_string(),
                false => format!("{}–{}", row.from, row.to),
            };
            table.row([range, text::count(row.blocks), bar(row.blocks, most)]);
        }
        table.show(out)?;

        writeln!(out)?;
        let mut table = Table::new(&[
            ("last used", Column::Left),
            ("blocks", Column::Right),
            ("bytes", Column::Right),
            ("", Column::Left),
        ]);
        let most = self.heat.iter().map(|row| row.blocks).max().unwrap_or(0);
        for row in &self.heat {
            table.row([
                row.label.to_owned(),
                text::count(row.blocks),
                text::bytes(row.bytes),
                bar(row.blocks, most),
            ]);
        }
        table.show(out)
    }
}
