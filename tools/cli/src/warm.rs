//! `stemkv warm`: what opening with `disk.warm_bytes` would bring into RAM.

use std::io::{self, Write};

use serde::Serialize;
use stemkv_store::Result;

use crate::store::{Access, Store};
use crate::text::{self, Column, Table, field};
use crate::tree::Tree;
use crate::{Exit, Report};

/// What would be brought, the first one first.
#[derive(Debug, Serialize)]
pub struct WarmList {
    path: String,
    access: Access,
    warm_bytes: u64,
    blocks: u64,
    bytes: u64,
    /// Is there more on disk than that?
    is_cut: bool,
    prefixes: Vec<WarmPrefix>,
}

/// Blocks that hang together.
#[derive(Debug, Serialize)]
struct WarmPrefix {
    namespace: String,
    /// The last block.
    key: String,
    /// Positions of the first block and of the one behind the last.
    from: u64,
    to: u64,
    blocks: u64,
    bytes: u64,
    last_use_unix_ms: u64,
    #[serde(skip)]
    last_use: String,
    #[serde(skip)]
    what: String,
}

pub(crate) fn warm(store: &Store, warm_bytes: u64) -> Result<WarmList> {
    let metas = store.metas();
    let (index, _) = Tree::index(store.records()?.0);
    let mut hottest = index.hottest(warm_bytes);
    let mut prefixes = Vec::new();
    while let Some(run) = hottest.next(&*store.tier) {
        let (Some(first), Some(last)) = (run.records.first(), run.records.last()) else {
            continue;
        };
        prefixes.push(WarmPrefix {
            namespace: run.namespace.to_hex(),
            key: run.keys[last.position].to_hex(),
            from: first.position as u64,
            to: last.position as u64 + 1,
            blocks: run.records.len() as u64,
            bytes: run.records.iter().map(|record| record.bytes).sum(),
            last_use_unix_ms: run.last_use_ms,
            last_use: text::last_use(store.now_ms(), run.last_use_ms),
            what: metas.name(&run.namespace),
        });
    }
    Ok(WarmList {
        path: store.path_words(),
        access: store.access.clone(),
        warm_bytes,
        blocks: prefixes.iter().map(|prefix| prefix.blocks).sum(),
        bytes: prefixes.iter().map(|prefix| prefix.bytes).sum(),
        is_cut: hottest.is_cut(),
        prefixes,
    })
}

impl Report for WarmList {
    fn exit(&self) -> Exit {
        self.access.exit()
    }

    fn show(&self, out: &mut dyn Write) -> io::Result<()> {
        field(out, "store", &self.path)?;
        field(out, "opened", &self.access.words())?;
        let would = format!(
            "{}, {} of at most {}; {}",
            text::plural(self.blocks, "block"),
            text::bytes(self.bytes),
            text::bytes(self.warm_bytes),
            if self.is_cut {
                "there is more"
            } else {
                "that is all"
            },
        );
        field(out, "would warm", &would)?;
        if self.prefixes.is_empty() {
            return Ok(());
        }
        writeln!(out)?;
        let mut table = Table::new(&[
            ("up to", Column::Left),
            ("from", Column::Right),
            ("blocks", Column::Right),
            ("bytes", Column::Right),
            ("last use", Column::Right),
            ("what", Column::Left),
        ]);
        for prefix in &self.prefixes {
            table.row([
                text::short(&prefix.key).to_owned(),
                text::count(prefix.from),
                text::count(prefix.blocks),
                text::bytes(prefix.bytes),
                prefix.last_use.clone(),
                prefix.what.clone(),
            ]);
        }
        table.show(out)
    }
}
