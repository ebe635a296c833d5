//! `--record`: one record's header, and whether all of it verifies.

use std::io::{self, Write};

use serde::Serialize;
use stemkv_store::{RecordHeader, SlabEntry};

use super::codecs::codec_name;
use super::one;
use crate::read::Reader;
use crate::store::Store;
use crate::text::{self, Column, Table, field};
use crate::{Exit, Failure, Report, open};

/// One record in full.
#[derive(Debug, Serialize)]
pub struct Record {
    key: String,
    parent: String,
    namespace: String,
    name: String,
    record: u64,
    depth: u32,
    bytes: u32,
    children: u64,
    last_use_unix_ms: u64,
    last_use: String,
    /// Why it does not verify, where it does not.
    damage: Option<String>,
    /// Where its header was found when its payload did not verify.
    found_in: Option<String>,
    header: Option<Header>,
}

#[derive(Debug, Serialize)]
struct Header {
    tokens: u32,
    codec: String,
    geometry: String,
    layers_from: u32,
    layers_to: u32,
    payload_bytes: u64,
    slabs: Vec<Slab>,
}

#[derive(Debug, Serialize)]
struct Slab {
    layer: u32,
    offset: u32,
    bytes: u32,
    checksum: String,
}

pub(crate) fn record(store: &Store, digits: &str) -> Result<Record, Failure> {
    let (tree, _) = store.tree()?;
    let info = one(&tree, digits)?;
    let read = Reader::new(&*store.tier, &store.geometry)?.read_one(info);
    let (mut header, mut damage, mut found_in) = (None, None, None);
    match read.and_then(|slot| slot.header()) {
        Ok(found) => header = Some(found),
        Err(error) => {
            damage = Some(error.to_string());
            if let Some((place, found)) = open::header_of(&store.path, &info.key) {
                found_in = Some(place);
                header = Some(found);
            }
        }
    }
    Ok(Record {
        key: info.key.to_hex(),
        parent: info.parent.to_hex(),
        namespace: info.namespace.to_hex(),
        name: store.metas().name(&info.namespace),
        record: info.id.0.get(),
        depth: info.depth,
        bytes: info.bytes,
        children: tree.children(&info.key),
        last_use_unix_ms: info.last_use_ms,
        last_use: text::last_use(store.now_ms(), info.last_use_ms),
        damage,
        found_in,
        header: header.as_ref().map(Header::new),
    })
}

impl Header {
    fn new(header: &RecordHeader) -> Self {
        let slab = |(layer, slab): (u32, &SlabEntry)| Slab {
            layer,
            offset: slab.offset,
            bytes: slab.bytes,
            checksum: format!("{:016x}", slab.checksum.0),
        };
        Header {
            tokens: header.tokens,
            codec: codec_name(header),
            geometry: format!("{:016x}", header.geometry),
            layers_from: header.layers.start,
            layers_to: header.layers.end,
            payload_bytes: header.payload_bytes() as u64,
            slabs: header.layers.clone().zip(&header.slabs).map(slab).collect(),
        }
    }
}

impl Report for Record {
    fn exit(&self) -> Exit {
        match self.damage {
            None => Exit::Fine,
            Some(_) => Exit::Problems,
        }
    }

    fn show(&self, out: &mut dyn Write) -> io::Result<()> {
        field(out, "key", &self.key)?;
        field(out, "parent", &self.parent)?;
        field(
            out,
            "namespace",
            &format!("{}  {}", self.namespace, self.name),
        )?;
        let record = format!(
            "{}, at depth {}, {}, {}, last use {}",
            self.record,
            self.depth,
            text::bytes(self.bytes.into()),
            text::plural(self.children, "child").replace("childs", "children"),
            self.last_use
        );
        field(out, "record", &record)?;
        match &self.damage {
            None => field(out, "verified", "header and every slab")?,
            Some(damage) => field(out, "DAMAGED", damage)?,
        }
        if let Some(place) = &self.found_in {
            field(out, "header in", place)?;
        }
        let Some(header) = &self.header else {
            return Ok(());
        };
        let words = format!(
            "{} tokens, codec {}, layers {}..{}, {} of payload, geometry {}",
            header.tokens,
            header.codec,
            header.layers_from,
            header.layers_to,
            text::bytes(header.payload_bytes),
            header.geometry
        );
        field(out, "header", &words)?;
        writeln!(out)?;
        let mut table = Table::new(&[
            ("layer", Column::Right),
            ("offset", Column::Right),
            ("bytes", Column::Right),
            ("checksum", Column::Left),
        ]);
        for slab in &header.slabs {
            table.row([
                slab.layer.to_string(),
                slab.offset.to_string(),
                slab.bytes.to_string(),
                slab.checksum.clone(),
            ]);
        }
        table.show(out)
    }
}
