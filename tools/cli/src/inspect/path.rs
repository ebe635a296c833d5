//! `--prefix`: the blocks up to one.

use std::io::{self, Write};

use serde::Serialize;

use super::one;
use crate::store::Store;
use crate::text::{self, Column, Table, field};
use crate::{Exit, Failure, Report};

/// The blocks from a first block to one of the store's.
#[derive(Debug, Serialize)]
pub struct Path {
    namespace: String,
    name: String,
    /// The ancestor that is missing, so that the path is out of reach.
    missing_ancestor: Option<String>,
    blocks: Vec<PathBlock>,
    /// Blocks that directly follow the last one.
    children: u64,
}

#[derive(Debug, Serialize)]
struct PathBlock {
    depth: u32,
    key: String,
    record: u64,
    bytes: u32,
    children: u64,
    last_use_unix_ms: u64,
    last_use: String,
}

pub(crate) fn path(store: &Store, digits: &str) -> Result<Path, Failure> {
    let (tree, _) = store.tree()?;
    let record = one(&tree, digits)?;
    let (blocks, missing) = tree.path(record);
    let now_ms = store.now_ms();
    Ok(Path {
        namespace: record.namespace.to_hex(),
        name: store.metas().name(&record.namespace),
        missing_ancestor: missing.map(|key| key.to_hex()),
        blocks: blocks
            .into_iter()
            .map(|block| PathBlock {
                depth: block.depth,
                key: block.key.to_hex(),
                record: block.id.0.get(),
                bytes: block.bytes,
                children: tree.children(&block.key),
                last_use_unix_ms: block.last_use_ms,
                last_use: text::last_use(now_ms, block.last_use_ms),
            })
            .collect(),
        children: tree.children(&record.key),
    })
}

impl Report for Path {
    fn exit(&self) -> Exit {
        match self.missing_ancestor {
            None => Exit::Fine,
            Some(_) => Exit::Problems,
        }
    }

    fn show(&self, out: &mut dyn Write) -> io::Result<()> {
        let namespace = format!("{}  {}", text::short(&self.namespace), self.name);
        field(out, "namespace", &namespace)?;
        if let Some(key) = &self.missing_ancestor {
            let what = format!("{} is missing: the path is out of reach", text::short(key));
            field(out, "ancestor", &what)?;
        }
        writeln!(out)?;
        let mut table = Table::new(&[
            ("depth", Column::Right),
            ("key", Column::Left),
            ("record", Column::Right),
            ("bytes", Column::Right),
            ("children", Column::Right),
            ("last use", Column::Right),
        ]);
        for block in &self.blocks {
            table.row([
                block.depth.to_string(),
                text::short(&block.key).to_owned(),
                block.record.to_string(),
                text::bytes(block.bytes.into()),
                text::count(block.children),
                block.last_use.clone(),
            ]);
        }
        table.show(out)
    }
}
