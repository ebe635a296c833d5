//! What a person may write in a file: plain data, every field with its unit.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::{self, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use stemkv_store::KvGeometry;

use crate::{Error, Result};

/// How a [`Cache`](crate::Cache) is set up.
///
/// ```
/// let config = stemkv::Config::from_toml(r#"
///     [geometry]
///     layers = 32
///     planes = [{ heads = 8, head_bytes = 256 }, { heads = 8, head_bytes = 256 }]
///     block_tokens = 16
///     dtype = "bf16"
///
///     [host]
///     capacity_bytes = "8 GiB"
///
///     [disk]
///     path = "/var/cache/stemkv"
///     capacity_bytes = "200 GiB"
/// "#)?;
/// assert_eq!(config.host.capacity_bytes, 8 << 30);
/// # Ok::<(), stemkv::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// How the KV of one block is laid out. One store has one geometry.
    pub geometry: KvGeometry,
    /// The device tier; without it chunks go from RAM into the engine's pages alone.
    #[serde(default)]
    pub device: DeviceConfig,
    /// The host tier.
    pub host: HostConfig,
    /// The disk tier; without it nothing survives a restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskConfig>,
    /// What the engine says about itself.
    #[serde(default)]
    pub engine: EngineConfig,
}

/// The device tier: an arena in each device's own memory, apart from the engine's pages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceConfig {
    /// Bytes of the arena on each device: a whole number, or a string such as `"4 GiB"`. 0 for none, else
    /// at least one chunk.
    #[serde(default, deserialize_with = "bytes")]
    pub capacity_bytes: u64,
}

/// The host tier: one arena in RAM, sized at open.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Bytes of the arena: a whole number, or a string such as `"8 GiB"`. At least four chunks.
    #[serde(deserialize_with = "bytes")]
    pub capacity_bytes: u64,
    /// How saves put chunks there.
    #[serde(default)]
    pub codec: HostCodec,
}

/// How saves put chunks into RAM. Whatever is chosen, what comes back is the same to the bit. Chunks
/// that are encoded there are written to disk as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HostCodec {
    /// Encoded where the device encodes and decodes as fast as it copies, and, on the CPU, where RAM is
    /// full; `Stats` says which and why.
    #[default]
    Auto,
    /// Always encoded, where the device encodes and decodes.
    Lossless,
    /// As the engine had them.
    Raw,
}

impl HostConfig {
    /// The defaults, with an arena of `capacity_bytes`.
    pub fn new(capacity_bytes: u64) -> Self {
        HostConfig {
            capacity_bytes,
            codec: HostCodec::default(),
        }
    }
}

/// The disk tier: RocksDB in a folder of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The store's folder. It is made where it is missing.
    pub path: PathBuf,
    /// The bound on real bytes on disk: a whole number, or a string such as `"200 GiB"`. At least 16 MiB.
    /// Writes never pass it; a store that holds more when it opens evicts first.
    #[serde(deserialize_with = "bytes")]
    pub capacity_bytes: u64,
    /// A batch of records is written when it has this many bytes, and has no more. 1 MiB to 1 GiB.
    #[serde(default = "DiskConfig::batch_bytes", deserialize_with = "bytes")]
    pub batch_bytes: u64,
    /// … or when its oldest record has waited this long, in milliseconds. At most 60,000.
    #[serde(default = "DiskConfig::batch_delay_ms")]
    pub batch_delay_ms: u64,
    /// Bytes of chunks that may wait to be written; of a save that does not fit, the leading blocks are taken
    /// and the others stay in RAM alone until nothing waits. Host memory that is not evicted meanwhile. At
    /// least `batch_bytes`.
    #[serde(default = "DiskConfig::queue_bytes", deserialize_with = "bytes")]
    pub queue_bytes: u64,
    /// Reads in flight at once, 1 to 64.
    #[serde(default = "DiskConfig::reads_in_flight")]
    pub reads_in_flight: usize,
    /// How chunks are written.
    #[serde(default)]
    pub codec: DiskCodec,
    /// Bytes of records that are brought into RAM in the background after opening, those of the prefixes
    /// that were used last; nothing is evicted for them. 0, the default, for none.
    #[serde(default, deserialize_with = "bytes")]
    pub warm_bytes: u64,
}

/// How chunks that are raw in RAM are written to disk. Whatever is chosen, what comes back is the same to the bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskCodec {
    /// Encoded where the device decodes and encoding keeps up with the disk; `Stats` says which
    /// and why.
    #[default]
    Auto,
    /// Always encoded, where the device decodes.
    Lossless,
    /// As the engine had them.
    Raw,
}

impl DiskConfig {
    /// The defaults, in `path` with a bound of `capacity_bytes`.
    pub fn new(path: impl Into<PathBuf>, capacity_bytes: u64) -> Self {
        DiskConfig {
            path: path.into(),
            capacity_bytes,
            batch_bytes: Self::batch_bytes(),
            batch_delay_ms: Self::batch_delay_ms(),
            queue_bytes: Self::queue_bytes(),
            reads_in_flight: Self::reads_in_flight(),
            codec: DiskCodec::default(),
            warm_bytes: 0,
        }
    }

    fn batch_bytes() -> u64 {
        32 << 20
    }

    fn batch_delay_ms() -> u64 {
        50
    }

    fn queue_bytes() -> u64 {
        512 << 20
    }

    fn reads_in_flight() -> usize {
        2
    }
}

/// What the engine says about itself, for decisions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineConfig {
    /// Tokens a second of a prefill, for the recompute estimate of a match. Unknown: no estimate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_second: Option<f64>,
}

impl Config {
    /// A store in RAM alone.
    pub fn in_memory(geometry: KvGeometry, capacity_bytes: u64) -> Self {
        Config {
            geometry,
            device: DeviceConfig::default(),
            host: HostConfig::new(capacity_bytes),
            disk: None,
            engine: EngineConfig::default(),
        }
    }

    /// The same with a disk tier.
    #[must_use]
    pub fn with_disk(mut self, disk: DiskConfig) -> Self {
        self.disk = Some(disk);
        self
    }

    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// `Invalid`, naming the field and what is allowed.
    pub fn from_toml(text: &str) -> Result<Self> {
        let config: Config = toml::from_str(text)
            .map_err(|error| Error::invalid(error.to_string().trim_end().to_owned()))?;
        config.validate().map(|()| config)
    }

    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// `Unavailable` where it cannot be read; `Invalid` as [`Config::from_toml`].
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::unavailable("cannot read the configuration")
                .with("path", path.display())
                .caused_by(error)
        })?;
        Self::from_toml(&text)
    }

    /// Checks every field's range.
    ///
    /// # Errors
    /// `Invalid`, naming the field and what is allowed.
    pub fn validate(&self) -> Result<()> {
        fn check(
            ok: bool,
            field: &str,
            allowed: &str,
            value: impl std::fmt::Display,
        ) -> Result<()> {
            match ok {
                true => Ok(()),
                false => {
                    Err(Error::invalid(format!("{field} must be {allowed}")).with("value", value))
                }
            }
        }
        self.geometry.validate()?;
        let slot = image_bytes(&self.geometry);
        let floor = 4 * slot;
        check(
            self.host.capacity_bytes >= floor,
            "host.capacity_bytes",
            &format!("at least four chunks, {floor} bytes"),
            self.host.capacity_bytes,
        )?;
        let chunk = self.geometry.payload_bytes() as u64;
        check(
            self.device.capacity_bytes == 0 || self.device.capacity_bytes >= chunk,
            "device.capacity_bytes",
            &format!("0, or at least one chunk, {chunk} bytes"),
            self.device.capacity_bytes,
        )?;
        if let Some(disk) = &self.disk {
            let floor = (16 << 20).max(8 * slot);
            check(
                disk.capacity_bytes >= floor,
                "disk.capacity_bytes",
                &format!("at least 16 MiB and eight chunks, {floor} bytes"),
                disk.capacity_bytes,
            )?;
            let batch = 1 << 20..=1 << 30;
            check(
                batch.contains(&disk.batch_bytes),
                "disk.batch_bytes",
                "1 MiB to 1 GiB",
                disk.batch_bytes,
            )?;
            check(
                disk.batch_delay_ms <= 60_000,
                "disk.batch_delay_ms",
                "at most 60000",
                disk.batch_delay_ms,
            )?;
            check(
                disk.queue_bytes >= disk.batch_bytes,
                "disk.queue_bytes",
                "at least disk.batch_bytes",
                disk.queue_bytes,
            )?;
            let reads = 1..=64;
            check(
                reads.contains(&disk.reads_in_flight),
                "disk.reads_in_flight",
                "1 to 64",
                disk.reads_in_flight,
            )?;
        }
        if let Some(rate) = self.engine.prefill_tokens_per_second {
            check(
                rate.is_finite() && rate > 0.0,
                "engine.prefill_tokens_per_second",
                "a number above 0",
                rate,
            )?;
        }
        Ok(())
    }
}

impl Config {
    /// Bytes of a raw chunk's image in its slot or record.
    pub(crate) fn image_bytes(&self) -> u64 {
        image_bytes(&self.geometry)
    }
}

impl DiskConfig {
    pub(crate) fn batch_delay(&self) -> Duration {
        Duration::from_millis(self.batch_delay_ms)
    }
}

fn image_bytes(geometry: &KvGeometry) -> u64 {
    (stemkv_store::RecordHeader::BYTES + geometry.payload_bytes().next_multiple_of(4096)) as u64
}

/// A whole number of bytes, or a string with a unit.
fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    struct Bytes;
    impl Visitor<'_> for Bytes {
        type Value = u64;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a whole number of bytes, or a string such as \"8 GiB\"")
        }
        fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<u64, E> {
            Ok(bytes)
        }
        fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<u64, E> {
            u64::try_from(bytes).map_err(|_| E::invalid_value(Unexpected::Signed(bytes), &self))
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
            parse_bytes(text).ok_or_else(|| {
                E::custom(format!(
                    "{text:?} is no size: write a whole number of bytes, or one with KiB, MiB, GiB, TiB, kB, MB, GB or TB"
                ))
            })
        }
    }
    deserializer.deserialize_any(Bytes)
}

/// `"8 GiB"` → 8589934592. `None` for anything that is not a whole number and a known unit.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '_')
        .unwrap_or(text.len());
    let number: u64 = text[..digits].replace('_', "").parse().ok()?;
    let unit: u64 = match text[digits..].trim() {
        "" | "B" => 1,
        "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        host.capacity_bytes = "64 MiB"
        [geometry]
        layers = 2
        planes = [{ heads = 2, head_bytes = 64 }]
        block_tokens = 16
        dtype = "bf16"
        [disk]
        path = "kv"
        capacity_bytes = 1_000_000_000
    "#;

    #[test]
    fn toml_reads_back_with_defaults_and_units() {
        let config = Config::from_toml(GOOD).expect("valid");
        assert_eq!(config.host.capacity_bytes, 64 << 20);
        assert_eq!(config.disk, Some(DiskConfig::new("kv", 1_000_000_000)));
        let text = toml::to_string(&config).expect("plain data");
        assert_eq!(Config::from_toml(&text).expect("valid"), config);
    }

    #[test]
    fn a_wrong_field_is_named_with_what_is_allowed() {
        let cases = [
            (
                "capacity_bytes = 1_000_000_000",
                "capacity_bytes = 5",
                "disk.capacity_bytes must be at least 16 MiB",
            ),
            (
                "\"64 MiB\"",
                "\"64 MB!\"",
                "is no size: write a whole number of bytes",
            ),
            (
                "\"64 MiB\"",
                "-1",
                "invalid value: integer `-1`, expected a whole number of bytes, or a string",
            ),
            (
                "\"64 MiB\"",
                "1.5",
                "invalid type: floating point `1.5`, expected a whole number of bytes",
            ),
            (
                "\"64 MiB\"",
                "12",
                "host.capacity_bytes must be at least four chunks",
            ),
            (
                "layers = 2",
                "layers = 0",
                "geometry.layers must be 1 to 240",
            ),
            (
                "path = \"kv\"",
                "path = \"kv\"\nreads_in_flight = 0",
                "disk.reads_in_flight must be 1 to 64: value=0",
            ),
            (
                "path = \"kv\"",
                "pfad = \"kv\"",
                "unknown field `pfad`, expected one of `path`",
            ),
            (
                "\"bf16\"",
                "\"bf17\"",
                "unknown variant `bf17`, expected one of `bf16`",
            ),
        ];
        for (from, to, expected) in cases {
            let text = GOOD.replace(from, to);
            assert_ne!(text, GOOD, "{from}");
            let error = Config::from_toml(&text).expect_err(to).to_string();
            assert!(
                error.starts_with("invalid: ") && error.contains(expected),
                "{error}"
            );
        }
    }

    #[test]
    fn sizes_are_whole_numbers_with_known_units() {
        assert_eq!(parse_bytes("8 GiB"), Some(8 << 30));
        assert_eq!(parse_bytes(" 1_000kB "), Some(1_000_000));
        assert_eq!(parse_bytes("7"), Some(7));
        for wrong in ["", "GiB", "1.5 GiB", "-1", "1 gib", "99999999999 TiB"] {
            assert_eq!(parse_bytes(wrong), None, "{wrong}");
        }
    }
}
