//! `stemkv stats`: where the bytes are, and what the process that has or had the store counted.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;
use stemkv::{Stats, Warming};
use stemkv_store::Result;

use crate::store::{Access, Store};
use crate::text::{self, Column, Table, field};
use crate::{Exit, Report};

/// A store's numbers.
#[derive(Debug, Serialize)]
pub struct StoreStats {
    path: String,
    access: Access,
    records: u64,
    files: u64,
    live_bytes: u64,
    used_bytes: u64,
    unread_files: u64,
    unread_bytes: u64,
    /// What the devices measured of themselves, where they do, by their numbers.
    calibrations: BTreeMap<usize, serde_json::Value>,
    /// Of the last flush or close of the process that writes.
    process: Option<Stats>,
    /// Are there some, of another version?
    process_is_unreadable: bool,
    #[serde(skip)]
    process_age: String,
}

pub(crate) fn stats(store: &Store) -> Result<StoreStats> {
    let (usage, metas) = (store.tier.usage(), store.metas());
    let process = metas.stats;
    Ok(StoreStats {
        path: store.path_words(),
        access: store.access.clone(),
        records: usage.records,
        files: usage.files,
        live_bytes: usage.live_bytes,
        used_bytes: usage.used_bytes,
        unread_files: usage.unread_files,
        unread_bytes: usage.unread_bytes,
        process_age: process.as_ref().map_or_else(String::new, |stats| {
            text::ago(store.now_ms(), stats.unix_ms)
        }),
        process,
        process_is_unreadable: metas.stats_are_unreadable,
        calibrations: metas.calibrations,
    })
}

/// A device's calibration in one line: its name, and the fastest way in each direction.
fn device_words(calibration: &serde_json::Value) -> String {
    let name = calibration["device"].as_str().unwrap_or("unnamed");
    let rate = |way: &str| {
        let rate = calibration["calibration"][way]["contiguous"].as_f64();
        rate.map_or_else(|| "?".to_owned(), |rate| format!("{rate:.1} GB/s"))
    };
    format!(
        "{name}: {} up, {} down as measured",
        rate("load"),
        rate("save")
    )
}

fn warming_words(warming: Warming) -> Option<&'static str> {
    match warming {
        Warming::Off => None,
        Warming::UnderWay => Some("under way"),
        Warming::Complete => Some("all that is on disk"),
        Warming::Limit => Some("up to disk.warm_bytes"),
        Warming::NoRoom => Some("until RAM had no room to spare"),
        Warming::DiskFailed => Some("until the disk failed"),
        Warming::Stopped => Some("until it was stopped"),
    }
}

impl Report for StoreStats {
    fn exit(&self) -> Exit {
        self.access.exit()
    }

    fn show(&self, out: &mut dyn Write) -> io::Result<()> {
        field(out, "store", &self.path)?;
        field(out, "opened", &self.access.words())?;
        let mut disk = format!(
            "{} in {}: {} live of {} on disk",
            text::plural(self.records, "record"),
            text::plural(self.files, "file"),
            text::bytes(self.live_bytes),
            text::bytes(self.used_bytes)
        );
        if self.unread_files > 0 {
            disk += &text::unread(self.unread_files, self.unread_bytes);
        }
        field(out, "disk", &disk)?;
        let devices = self
            .process
            .as_ref()
            .map_or(0, |process| process.devices.len());
        let is_one = devices.max(self.calibrations.len()) <= 1;
        // With its number where there are several.
        let of = |what: &str, device: usize| match is_one {
            true => what.to_owned(),
            false => format!("{what} {device}"),
        };
        for (&device, calibration) in &self.calibrations {
            field(out, &of("device", device), &device_words(calibration))?;
        }
        let Some(process) = &self.process else {
            let why = match self.process_is_unreadable {
                true => "kept its statistics in another version's form: they cannot be shown",
                false => "has not kept its statistics (a flush or close does)",
            };
            return field(out, "process", why);
        };
        field(
            out,
            "process",
            &format!(
                "statistics of its last flush or close, {}",
                self.process_age
            ),
        )?;
        for (number, device) in process.devices.iter().enumerate() {
            let Some(tier) = &device.tier else { continue };
            let tier = format!(
                "{} published, {} filling, {} free of {}; {}",
                text::bytes(tier.published_bytes),
                text::bytes(tier.filling_bytes),
                text::bytes(tier.free_bytes),
                text::bytes(tier.capacity_bytes),
                text::plural(device.blocks, "block"),
            );
            field(out, &of("device tier", number), &tier)?;
        }
        let host = format!(
            "{} published (raw {}), {} filling, {} free of {}",
            text::bytes(process.host.published_bytes),
            text::bytes(process.host.raw_bytes),
            text::bytes(process.host.filling_bytes),
            text::bytes(process.host.free_bytes),
            text::bytes(process.host.capacity_bytes)
        );
        field(out, "host", &host)?;
        for (number, device) in process.devices.iter().enumerate() {
            field(out, &of("saves", number), &device.save)?;
            field(out, &of("loads", number), &device.load)?;
        }
        if let Some(disk) = &process.disk {
            let written = format!(
                "{} by saves, {} by cleaning; bound {}{}",
                text::bytes(disk.written_bytes),
                text::bytes(disk.rewritten_bytes),
                text::bytes(disk.capacity_bytes),
                if disk.paused {
                    "; PAUSED after a failure"
                } else {
                    ""
                }
            );
            field(out, "written", &written)?;
            field(out, "disk codec", &disk.codec)?;
            if let Some(how) = warming_words(disk.warming) {
                let warmed = format!(
                    "{how}: {} brought into RAM, {}",
                    text::plural(process.counter("warmed_blocks"), "block"),
                    text::bytes(process.counter("warmed_bytes"))
                );
                field(out, "warming", &warmed)?;
            }
        }
        let index = &process.index;
        let on_devices = match process.device {
            Some(_) => format!("device {}, ", text::count(index.device_blocks)),
            None => String::new(),
        };
        let tree = format!(
            "{} in {}; {on_devices}host {}, disk {}, pending {}, holes {}, pins {}",
            text::plural(index.blocks, "block"),
            text::plural(index.nodes, "run"),
            text::count(index.host_blocks),
            text::count(index.disk_blocks),
            text::count(index.pending_blocks),
            text::count(index.holes),
            text::count(index.pins)
        );
        field(out, "tree", &tree)?;
        let asked = process.counter("lease_tokens_asked");
        if asked > 0 {
            let matched = process.counter("lease_tokens_matched");
            let rate = format!(
                "{:.1} % of {} tokens",
                100.0 * matched as f64 / asked as f64,
                text::count(asked)
            );
            field(out, "hit rate", &rate)?;
        }
        writeln!(out)?;
        let mut table = Table::new(&[("counter", Column::Left), ("since open", Column::Right)]);
        for (name, value) in &process.counters {
            table.row([name.clone(), text::count(*value)]);
        }
        table.show(out)?;
        writeln!(out)?;
        let mut table = Table::new(&[
            ("stage", Column::Left),
            ("tier", Column::Left),
            ("count", Column::Right),
            ("bytes", Column::Right),
            ("p50", Column::Right),
            ("p99", Column::Right),
            ("max", Column::Right),
        ]);
        for stage in process.stages.iter().filter(|stage| stage.count > 0) {
            table.row([
                stage.stage.clone(),
                stage.tier.clone(),
                text::count(stage.count),
                text::bytes(stage.bytes),
                text::micros(stage.latency_us_p50),
                text::micros(stage.latency_us_p99),
                text::micros(stage.latency_us_max),
            ]);
        }
        table.show(out)
    }
}
