//! The store's state at one moment.

use stemkv_store::{DiskUsage, Tier};

use super::Cache;
use crate::index::Index;
use crate::pipeline::{self, DiskSide, Driven, Shared};
use crate::stats::{DeviceStats, DiskStats, Stats, TierStats, TreeStats};

impl Cache {
    /// State and counts since opening.
    pub fn stats(&self) -> Stats {
        let shared = &self.shared;
        // Before the tiers that it brings chunks into: who sees that warming has ended sees all of it.
        let disk = shared.disk.as_ref().map(|disk| disk_stats(shared, disk));
        let usage = shared.arena.usage();
        let blocks = shared.index.device_blocks();
        let devices = shared.devices.iter().zip(blocks);
        let devices: Vec<DeviceStats> = devices
            .map(|(on, blocks)| device_stats(shared, on, blocks))
            .collect();
        Stats {
            unix_ms: shared.clock.unix_ms(),
            index: tree_stats(&shared.index),
            device: devices
                .iter()
                .filter_map(|device| device.tier.clone())
                .reduce(TierStats::plus),
            host: TierStats {
                capacity_bytes: usage.capacity_bytes as u64,
                free_bytes: usage.free_bytes as u64,
                filling_bytes: usage.filling_bytes as u64,
                published_bytes: usage.published_bytes as u64,
                raw_bytes: pipeline::raw_bytes(shared),
            },
            codec: pipeline::packing_stats(shared, &shared.devices[0]),
            devices,
            disk,
            counters: shared.recorder.counters(),
            stages: shared.recorder.stages(),
        }
    }

    /// Keeps the statistics in the store, for `stemkv stats` to show. Best effort.
    pub(super) fn keep_stats(&self) {
        let Some(disk) = &self.shared.disk else {
            return;
        };
        let text = serde_json::to_vec(&self.stats()).expect("plain data can be written as JSON");
        if let Err(error) = disk.tier.put_meta(&Stats::META_KEY, &text) {
            tracing::warn!(%error, "the statistics could not be kept");
        }
    }
}

fn tree_stats(index: &Index) -> TreeStats {
    let stats = index.stats();
    TreeStats {
        blocks: (stats.total.blocks - stats.total.pending_blocks - stats.total.hole_blocks) as u64,
        device_blocks: stats.total.tier_blocks(Tier::Device) as u64,
        host_blocks: stats.total.tier_blocks(Tier::Host) as u64,
        disk_blocks: stats.total.tier_blocks(Tier::Disk) as u64,
        pending_blocks: stats.total.pending_blocks as u64,
        holes: stats.total.hole_blocks as u64,
        nodes: stats.runs as u64,
        pins: stats.pins as u64,
    }
}

fn disk_stats(shared: &Shared, disk: &DiskSide) -> DiskStats {
    let usage: DiskUsage = disk.tier.usage();
    DiskStats {
        capacity_bytes: usage.capacity_bytes,
        used_bytes: usage.used_bytes,
        live_bytes: usage.live_bytes,
        records: usage.records,
        files: usage.files,
        written_bytes: usage.written_bytes,
        rewritten_bytes: usage.rewritten_bytes,
        unread_files: usage.unread_files,
        unread_bytes: usage.unread_bytes,
        read_depth: usage.read_depth,
        queued_bytes: disk.writer.queued_bytes(),
        codec: pipeline::codec_choice(shared, disk).1,
        paused: [&disk.reads, &disk.writes].map(|health| health.is_paused(shared.clock.now()))
            != [false; 2]
            || disk.reader.is_overdue(),
        warming: disk.warmer.warming(),
    }
}

fn device_stats(shared: &Shared, on: &Driven, blocks: usize) -> DeviceStats {
    let codec = pipeline::packing_stats(shared, on);
    DeviceStats {
        name: on.device.info().name,
        tier: on.tier.as_ref().map(|tier| {
            let usage = tier.arena.usage();
            TierStats {
                capacity_bytes: usage.capacity_bytes,
                free_bytes: usage.free_bytes,
                filling_bytes: usage.filling_bytes,
                published_bytes: usage.published_bytes,
                raw_bytes: usage.published_bytes,
            }
        }),
        blocks: blocks as u64,
        save: codec.save,
        load: codec.load,
        link_bytes_per_second: on.link.bytes_per_second(),
    }
}
