//! What the store did, counted: for [`Cache::stats`](crate::Cache::stats) and for any exporter of
//! the `metrics` facade.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use stemkv_store::{Key, Tier};

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Something that happened, by name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Counter {
            $($(#[$doc])* $variant,)*
        }

        impl Counter {
            const ALL: &[Counter] = &[$(Counter::$variant,)*];

            /// The name in [`Stats::counters`]; exporters see it as `stemkv_NAME_total`.
            pub(crate) const fn name(self) -> &'static str {
                match self { $(Counter::$variant => $name,)* }
            }

            const fn metric(self) -> &'static str {
                match self { $(Counter::$variant => concat!("stemkv_", $name, "_total"),)* }
            }
        }
    };
}

counters! {
    /// Leases taken.
    Leases = "leases",
    /// Tokens that leases asked for.
    LeaseTokensAsked = "lease_tokens_asked",
    /// Tokens that leases matched.
    LeaseTokensMatched = "lease_tokens_matched",
    /// Loads begun.
    Loads = "loads",
    /// Tokens that loads brought into pages, whole.
    LoadedTokens = "loaded_tokens",
    /// Loads that brought fewer tokens than they were asked for.
    LoadsCut = "loads_cut",
    /// Saves begun.
    Saves = "saves",
    /// Blocks that became readable in the host tier through a save.
    SavedBlocks = "saved_blocks",
    /// Blocks that a save had to leave out: no room that was not leased, or a full queue.
    DeclinedBlocks = "declined_blocks",
    /// Blocks whose save began and was given up.
    AbandonedBlocks = "abandoned_blocks",
    /// Blocks that became durable.
    DurableBlocks = "durable_blocks",
    /// Blocks that stayed in RAM alone: the write queue or the disk was full, or the disk failed.
    UndurableBlocks = "undurable_blocks",
    /// Blocks that were counted as undurable and were written later, when there was room.
    DurableLaterBlocks = "durable_later_blocks",
    /// Chunks promoted from disk to host.
    PromotedBlocks = "promoted_blocks",
    /// Promotions that found no room in the tier above.
    DeclinedPromotions = "declined_promotions",
    /// Chunks that came into the device tier, by a save or from the host tier.
    DeviceBlocks = "device_blocks",
    /// Chunks that moved from the device tier into the host tier, where the device held the only copy.
    DemotedBlocks = "demoted_blocks",
    /// Chunks evicted from the device tier.
    EvictedDevice = "evicted_device_blocks",
    /// Chunks evicted from the host tier.
    EvictedHost = "evicted_host_blocks",
    /// Chunks evicted from the disk tier.
    EvictedDisk = "evicted_disk_blocks",
    /// Files of the disk tier that could not be read at opening and were given up for room.
    DroppedUnreadFiles = "dropped_unread_files",
    /// Chunks that did not verify and were dropped.
    CorruptBlocks = "corrupt_blocks",
    /// Chunks that the disk failed to give again and again while it gave others, and that were dropped.
    UnreadableBlocks = "unreadable_blocks",
    /// Disk reads that failed.
    DiskReadErrors = "disk_read_errors",
    /// Disk writes that failed.
    DiskWriteErrors = "disk_write_errors",
    /// Reads and writes that were not tried, because the disk had just failed.
    DiskSkipped = "disk_skipped",
    /// Blocks that saves brought into the host tier encoded.
    SavedEncodedBlocks = "saved_encoded_blocks",
    /// Blocks that did not fit encoded in the slots cut for them, and were saved again raw.
    ResavedBlocks = "resaved_blocks",
    /// Chunks that were encoded before they were written to disk.
    EncodedBlocks = "encoded_blocks",
    /// Bytes that encoding saved on disk.
    EncodedBytesSaved = "encoded_bytes_saved",
    /// Chunks that warming brought from disk to host.
    WarmedBlocks = "warmed_blocks",
    /// Bytes of their records.
    WarmedBytes = "warmed_bytes",
    /// Transfers between pages and slots that failed.
    TransferErrors = "transfer_errors",
}

/// A step whose duration is recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Match and pin, hashing included.
    Lease,
    /// Engine pages → host slots, from the first layer's hand-over to publication.
    SaveCopy,
    /// Host slots → engine pages, from submission to the last layer.
    LoadCopy,
    /// Device slots → engine pages, from submission to the last layer.
    DeviceCopy,
    /// Host slots → device slots, from submission to the last layer.
    Promote,
    /// One read call of the disk tier.
    DiskRead,
    /// One durable batch of the disk tier.
    DiskWrite,
    /// A whole load, from the call to the last byte.
    Load,
}

impl Stage {
    const ALL: [Stage; 8] = [
        Stage::Lease,
        Stage::SaveCopy,
        Stage::LoadCopy,
        Stage::DeviceCopy,
        Stage::Promote,
        Stage::DiskRead,
        Stage::DiskWrite,
        Stage::Load,
    ];

    const fn name(self) -> &'static str {
        match self {
            Stage::Lease => "lease",
            Stage::SaveCopy => "save_copy",
            Stage::LoadCopy => "load_copy",
            Stage::DeviceCopy => "device_copy",
            Stage::Promote => "promote",
            Stage::DiskRead => "disk_read",
            Stage::DiskWrite => "disk_write",
            Stage::Load => "load",
        }
    }

    const fn tier(self) -> &'static str {
        match self {
            Stage::Lease | Stage::Load => "all",
            Stage::SaveCopy | Stage::LoadCopy => Tier::Host.name(),
            Stage::DeviceCopy | Stage::Promote => Tier::Device.name(),
            Stage::DiskRead | Stage::DiskWrite => Tier::Disk.name(),
        }
    }
}

/// Tells the process's exporter something. It is not ours: where it panics, what was counted goes on.
fn export(tell: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(tell)).is_err() {
        tracing::error!("the recorder of the metrics facade panicked");
    }
}

/// Counts as things happen. Cheap enough for every lease; never blocks on an exporter of ours.
pub(crate) struct Recorder {
    counters: Vec<AtomicU64>,
    stages: Vec<Mutex<StageRecord>>,
}

struct StageRecord {
    bytes: u64,
    nanoseconds: Histogram<u64>,
}

impl Default for Recorder {
    fn default() -> Self {
        let stage = || {
            // 1 ns to 1000 s at two digits: 30 KiB a stage.
            let nanoseconds = Histogram::new_with_bounds(1, 1_000_000_000_000, 2)
                .expect("constant bounds are valid");
            Mutex::new(StageRecord {
                bytes: 0,
                nanoseconds,
            })
        };
        Recorder {
            counters: Counter::ALL.iter().map(|_| AtomicU64::new(0)).collect(),
            stages: Stage::ALL.iter().map(|_| stage()).collect(),
        }
    }
}

impl Recorder {
    pub(crate) fn add(&self, counter: Counter, count: usize) {
        if count > 0 {
            self.counters[counter as usize].fetch_add(count as u64, Relaxed);
            export(|| metrics::counter!(counter.metric()).increment(count as u64));
        }
    }

    pub(crate) fn time(&self, stage: Stage, took: Duration, bytes: u64) {
        let mut record = self.stage(stage);
        record.bytes += bytes;
        record.nanoseconds.saturating_record(took.as_nanos() as u64);
        drop(record);
        let (name, tier) = (stage.name(), stage.tier());
        export(|| {
            metrics::histogram!("stemkv_stage_seconds", "stage" => name, "tier" => tier)
                .record(took);
            if bytes > 0 {
                metrics::counter!("stemkv_stage_bytes_total", "stage" => name, "tier" => tier)
                    .increment(bytes);
            }
        });
    }

    fn stage(&self, stage: Stage) -> MutexGuard<'_, StageRecord> {
        self.stages[stage as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn counters(&self) -> Vec<(String, u64)> {
        Counter::ALL
            .iter()
            .map(|&counter| {
                (
                    counter.name().to_owned(),
                    self.counters[counter as usize].load(Relaxed),
                )
            })
            .collect()
    }

    pub(crate) fn stages(&self) -> Vec<StageStats> {
        Stage::ALL
            .iter()
            .map(|&stage| {
                let record = self.stage(stage);
                let us = |quantile| record.nanoseconds.value_at_quantile(quantile) as f64 / 1e3;
                StageStats {
                    stage: stage.name().to_owned(),
                    tier: stage.tier().to_owned(),
                    count: record.nanoseconds.len(),
                    bytes: record.bytes,
                    latency_us_p50: if record.nanoseconds.is_empty() {
                        0.0
                    } else {
                        us(0.5)
                    },
                    latency_us_p99: if record.nanoseconds.is_empty() {
                        0.0
                    } else {
                        us(0.99)
                    },
                    latency_us_max: record.nanoseconds.max() as f64 / 1e3,
                }
            })
            .collect()
    }
}

/// A store's state and what it did since it was opened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Wall clock of the snapshot, milliseconds since 1970.
    pub unix_ms: u64,
    /// The tree.
    pub index: TreeStats,
    /// The device tier, where there is one: that of all devices together.
    #[serde(default)]
    pub device: Option<TierStats>,
    /// The devices, by their numbers.
    #[serde(default)]
    pub devices: Vec<DeviceStats>,
    /// The host tier.
    pub host: TierStats,
    /// What is encoded between pages and RAM, and why; by the first device where there are several.
    #[serde(default)]
    pub codec: CodecStats,
    /// The disk tier, where there is one.
    pub disk: Option<DiskStats>,
    /// Event counts by name.
    pub counters: Vec<(String, u64)>,
    /// Durations by stage.
    pub stages: Vec<StageStats>,
}

impl Stats {
    /// Where [`Cache::flush`](crate::Cache::flush) and [`Cache::close`](crate::Cache::close) keep a
    /// store's statistics as JSON, among the values of [`DiskTier::put_meta`]. Never a namespace
    /// root: those are hashes, this is text.
    ///
    /// [`DiskTier::put_meta`]: stemkv_store::DiskTier::put_meta
    pub const META_KEY: Key = Key(*b"stemkv statistics of the process");

    /// Where a store keeps what its first device measured of itself ([`Device::calibration`]), as JSON.
    ///
    /// [`Device::calibration`]: stemkv_store::Device::calibration
    pub const CALIBRATION_KEY: Key = Key(*b"stemkv calibration of the device");

    const CALIBRATION_OF: &[u8; 29] = b"stemkv calibration of device ";

    /// The same for the device with this number.
    ///
    /// # Panics
    /// For numbers from 1000 on.
    pub fn calibration_key(device: usize) -> Key {
        if device == 0 {
            return Self::CALIBRATION_KEY;
        }
        let mut key = [0; 32];
        let (words, number) = key.split_at_mut(Self::CALIBRATION_OF.len());
        words.copy_from_slice(Self::CALIBRATION_OF);
        number.copy_from_slice(format!("{device:03}").as_bytes());
        Key(key)
    }

    /// The number of the device whose calibration is kept there, if that is what is.
    pub fn calibrated_device(key: &Key) -> Option<usize> {
        if *key == Self::CALIBRATION_KEY {
            return Some(0);
        }
        let number = key.0.strip_prefix(Self::CALIBRATION_OF)?;
        std::str::from_utf8(number).ok()?.parse().ok()
    }

    /// One counter by its name; 0 for a name that does not exist.
    pub fn counter(&self, name: &str) -> u64 {
        self.counters
            .iter()
            .find(|(counter, _)| counter == name)
            .map_or(0, |&(_, value)| value)
    }
}

/// The tree's shape.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TreeStats {
    /// Blocks whose chunk is in some tier.
    pub blocks: u64,
    /// Blocks in the device tier, of one device or several.
    #[serde(default)]
    pub device_blocks: u64,
    /// Blocks in the host tier.
    pub host_blocks: u64,
    /// Blocks in the disk tier.
    pub disk_blocks: u64,
    /// Blocks whose save is in flight.
    pub pending_blocks: u64,
    /// Blocks whose chunk was lost and that still have descendants.
    pub holes: u64,
    /// Path-compressed nodes.
    pub nodes: u64,
    /// Leases, loads and saves that hold a pin.
    pub pins: u64,
}

/// The bytes of a tier in RAM: free + filling + published = capacity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the fields are named by the sentence above")]
pub struct TierStats {
    pub capacity_bytes: u64,
    pub free_bytes: u64,
    pub filling_bytes: u64,
    pub published_bytes: u64,
    /// What the published chunks would take raw, headers included.
    #[serde(default)]
    pub raw_bytes: u64,
}

impl TierStats {
    pub(crate) fn plus(self, other: TierStats) -> TierStats {
        TierStats {
            capacity_bytes: self.capacity_bytes + other.capacity_bytes,
            free_bytes: self.free_bytes + other.free_bytes,
            filling_bytes: self.filling_bytes + other.filling_bytes,
            published_bytes: self.published_bytes + other.published_bytes,
            raw_bytes: self.raw_bytes + other.raw_bytes,
        }
    }
}

/// One of the devices that a store drives.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceStats {
    /// For people: `cpu`, `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Its part of the device tier, where it was given memory.
    pub tier: Option<TierStats>,
    /// Blocks in it.
    pub blocks: u64,
    /// How its next save puts chunks into RAM, and why: `exp: …` or `raw: …`.
    pub save: String,
    /// Who decodes for its loads, and how fast.
    pub load: String,
    /// How fast its loads come over the link, as measured lately; `None` before there was one.
    pub link_bytes_per_second: Option<f64>,
}

/// What is encoded between pages and RAM, in words for people. For the disk: [`DiskStats::codec`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CodecStats {
    /// How the next save puts chunks into RAM, and why: `exp: …` or `raw: …`.
    pub save: String,
    /// Who decodes for loads, and how fast.
    pub load: String,
    /// What that makes of the host tier.
    pub ram: String,
}

/// The disk tier's bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DiskStats {
    /// The bound.
    pub capacity_bytes: u64,
    /// Real bytes on disk.
    pub used_bytes: u64,
    /// Bytes of readable records.
    pub live_bytes: u64,
    /// Readable records.
    pub records: u64,
    /// Files that hold records.
    pub files: u64,
    /// Record bytes written by saves since open.
    pub written_bytes: u64,
    /// Record bytes written by cleaning since open.
    pub rewritten_bytes: u64,
    /// Files that could not be read at opening: they take room until it is needed.
    #[serde(default)]
    pub unread_files: u64,
    /// Bytes of those files.
    #[serde(default)]
    pub unread_bytes: u64,
    /// Reads kept under way for one call, as many as were found to suit the disk since open.
    #[serde(default)]
    pub read_depth: u64,
    /// Bytes that wait to be written.
    pub queued_bytes: u64,
    /// The codec of the next batch, and why: `exp: …` or `raw: …`.
    #[serde(default)]
    pub codec: String,
    /// Is the disk left alone for a while, because it failed?
    pub paused: bool,
    /// Is the host tier being warmed, and why not (any more)?
    #[serde(default)]
    pub warming: Warming,
}

/// The state of the warming that [`DiskConfig::warm_bytes`](crate::DiskConfig::warm_bytes) asks for. What
/// it brought is in the counters `warmed_blocks` and `warmed_bytes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Warming {
    /// It was not asked for.
    #[default]
    Off,
    /// It goes on.
    UnderWay,
    /// All that is on disk and sound is in RAM.
    Complete,
    /// `warm_bytes` were brought.
    Limit,
    /// Going on would have taken the room of others in RAM.
    NoRoom,
    /// The disk failed.
    DiskFailed,
    /// By [`Cache::stop_warming`](crate::Cache::stop_warming), or because the store was closed.
    Stopped,
}

/// One stage's durations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageStats {
    /// Its name.
    pub stage: String,
    /// The tier it works on.
    pub tier: String,
    /// How often it ran.
    pub count: u64,
    /// Bytes it moved.
    pub bytes: u64,
    /// Median, microseconds.
    pub latency_us_p50: f64,
    /// 99th percentile, microseconds.
    pub latency_us_p99: f64,
    /// Longest, microseconds.
    pub latency_us_max: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_stages_report_what_was_recorded() {
        let recorder = Recorder::default();
        recorder.add(Counter::Leases, 3);
        recorder.time(Stage::DiskRead, Duration::from_micros(100), 1 << 20);
        recorder.time(Stage::DiskRead, Duration::from_micros(300), 1 << 20);
        let counters = recorder.counters();
        assert!(counters.contains(&("leases".to_owned(), 3)));
        assert!(counters.contains(&("loads".to_owned(), 0)));
        let read = recorder
            .stages()
            .into_iter()
            .find(|stage| stage.stage == "disk_read")
            .expect("listed");
        assert_eq!((read.count, read.bytes), (2, 2 << 20));
        assert!((99.0..=102.0).contains(&read.latency_us_p50), "{read:?}");
        assert!((297.0..=303.0).contains(&read.latency_us_p99), "{read:?}");
    }
}
