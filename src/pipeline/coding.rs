//! Which codec chunks are written to disk with, and chunks for devices that do not decode.
//!
//! A batch is encoded where that is no slower than the disk takes it: the codec's own speed and the
//! disk's are measured with every batch. Where the disk is faster, batches go as they are, and one in
//! [`RETRY_BATCHES`] is encoded to see whether that still holds.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use stemkv_store::{CodecId, RecordHeader, Slot};

use crate::config::DiskCodec;
use crate::pipeline::{DiskSide, Shared};
use crate::stats::Counter;
use crate::{Error, Result};

/// How often the decision against the codec is tried again.
const RETRY_BATCHES: u32 = 16;

/// Threads that encode one batch, at most: the engine computes beside them.
const THREADS_MAX: usize = 4;

/// Less than this is encoded by the calling thread.
const ALONE_BYTES: u64 = 4 << 20;

/// A batch of less says little about how fast the codec is: it costs about as much to begin one.
const MEASURED_BYTES: u64 = 1 << 20;

/// What has been measured so far.
#[derive(Default)]
pub(crate) struct Coding(Mutex<Measured>);

#[derive(Clone, Copy, Default)]
struct Measured {
    /// Raw bytes a second.
    encoding: Option<f64>,
    /// Stored bytes a second.
    writing: Option<f64>,
    /// Batches since one was encoded.
    raw_batches: u32,
    /// Has one been encoded? The first is slow, since its threads and their memory are new: a store that
    /// goes by it alone writes raw for as long as [`RETRY_BATCHES`] take.
    is_warm: bool,
}

impl Measured {
    /// A batch of `bytes` raw bytes was encoded.
    fn encoded(&mut self, bytes: u64, took: Duration) {
        let is_warm = std::mem::replace(&mut self.is_warm, true);
        if is_warm && bytes >= MEASURED_BYTES && !took.is_zero() {
            let rate = bytes as f64 / took.as_secs_f64();
            self.encoding = Some(blend(self.encoding, rate));
        }
    }

    /// Is the next batch better encoded, and why?
    fn encodes(&self) -> (bool, String) {
        let gb = |rate: f64| format!("{:.2} GB/s", rate / 1e9);
        match (self.encoding, self.writing) {
            (Some(encoding), Some(writing)) if encoding < writing => {
                let (encoding, writing) = (gb(encoding), gb(writing));
                let why = format!("encoding at {encoding} would hold up a disk of {writing}");
                (false, why)
            }
            (Some(encoding), Some(writing)) => {
                let (encoding, writing) = (gb(encoding), gb(writing));
                let why = format!("encoding at {encoding} keeps up with a disk of {writing}");
                (true, why)
            }
            _ => (true, "not compared with the disk's speed yet".to_owned()),
        }
    }
}

impl Coding {
    fn measured(&self) -> MutexGuard<'_, Measured> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A batch of `bytes` stored bytes became durable.
    pub(crate) fn wrote(&self, bytes: u64, took: Duration) {
        if !took.is_zero() {
            let rate = bytes as f64 / took.as_secs_f64();
            let writing = &mut self.measured().writing;
            *writing = Some(blend(*writing, rate));
        }
    }
}

/// The newer half as much as all before it.
fn blend(old: Option<f64>, new: f64) -> f64 {
    old.map_or(new, |old| (old + new) / 2.0)
}

/// The codec of the next batch, and why.
pub(crate) fn choice(shared: &Shared, disk: &DiskSide) -> (CodecId, String) {
    let codec = CodecId::lossless(shared.config.geometry.dtype);
    let raw = |why: &str| (CodecId::Raw, format!("raw: {why}"));
    if disk.config.codec == DiskCodec::Raw {
        return raw("as configured");
    }
    if !shared.decodes(codec) {
        return raw("the device does not decode");
    }
    let name = format!("{codec:?}").to_lowercase();
    if disk.config.codec == DiskCodec::Lossless {
        return (codec, format!("{name}: as configured"));
    }
    match disk.coding.measured().encodes() {
        (true, why) => (codec, format!("{name}: {why}")),
        (false, why) => raw(&why),
    }
}

/// The chunks of a batch as they will be written: encoded where that pays and helps, else the same
/// slots, as are those that are encoded already. Blocks.
pub(crate) fn encode(shared: &Shared, disk: &DiskSide, slots: &[Slot]) -> Vec<Slot> {
    let is_raw = |slot: &&Slot| slot.codec() == CodecId::Raw;
    let raw: Vec<Slot> = slots.iter().filter(is_raw).cloned().collect();
    let mut coded = encode_raw(shared, disk, &raw).into_iter();
    let slots = slots.iter().map(|slot| match is_raw(&slot) {
        true => coded.next().unwrap_or_else(|| slot.clone()),
        false => slot.clone(),
    });
    slots.collect()
}

fn encode_raw(shared: &Shared, disk: &DiskSide, slots: &[Slot]) -> Vec<Slot> {
    if slots.is_empty() {
        return Vec::new();
    }
    let codec = {
        let (chosen, _) = choice(shared, disk);
        let mut measured = disk.coding.measured();
        let may = disk.config.codec == DiskCodec::Auto;
        let lossless = CodecId::lossless(shared.config.geometry.dtype);
        let retry = may && measured.raw_batches >= RETRY_BATCHES;
        match chosen {
            CodecId::Raw if !(retry && shared.decodes(lossless)) => {
                measured.raw_batches = measured.raw_batches.saturating_add(1);
                return slots.to_vec();
            }
            _ => {
                measured.raw_batches = 0;
                lossless
            }
        }
    };
    let begun = shared.clock.now();
    let threads = thread::available_parallelism().map_or(1, |n| n.get().min(THREADS_MAX));
    let part = slots.len().div_ceil(threads).max(1);
    let some =
        |part: &[Slot]| -> Vec<Slot> { part.iter().map(|slot| one(shared, slot, codec)).collect() };
    let coded = match slots.len() as u64 * shared.config.image_bytes() < ALONE_BYTES {
        true => some(slots),
        false => thread::scope(|scope| {
            let spawn = |part| {
                let builder = thread::Builder::new().name("stemkv-encode".into());
                builder.spawn_scoped(scope, move || some(part))
            };
            let parts: Vec<_> = slots.chunks(part).map(spawn).collect();
            let parts = parts.into_iter().zip(slots.chunks(part));
            let parts = parts.map(|(coded, raw)| match coded {
                // A thread that panicked leaves its part raw.
                Ok(coded) => coded.join().unwrap_or_else(|_| raw.to_vec()),
                // Where no thread can be had, this one does the work.
                Err(_) => some(raw),
            });
            parts.collect::<Vec<Vec<Slot>>>().concat()
        }),
    };
    let took = shared.clock.now().saturating_sub(begun);
    let bytes = slots.len() as u64 * shared.config.image_bytes();
    disk.coding.measured().encoded(bytes, took);
    let shrunk = coded.iter().zip(slots);
    let (mut count, mut saved) = (0, 0);
    for (coded, raw) in shrunk {
        count += usize::from(coded.codec() != CodecId::Raw);
        saved += raw.image().len() - coded.image().len();
    }
    shared.recorder.add(Counter::EncodedBlocks, count);
    shared.recorder.add(Counter::EncodedBytesSaved, saved);
    coded
}

fn one(shared: &Shared, slot: &Slot, codec: CodecId) -> Slot {
    let room = |payload: usize| {
        let image = (RecordHeader::BYTES + payload) as u64;
        shared.allocate_images(std::iter::once(image)).pop()
    };
    match slot.encoded(codec, room) {
        Ok(coded) => coded.unwrap_or_else(|| slot.clone()),
        Err(error) => {
            // What is damaged is found out by whoever reads it: it is written as it is.
            tracing::warn!(%error, "a chunk could not be encoded");
            slot.clone()
        }
    }
}

/// The chunk in a form that every device loads.
///
/// # Errors
/// `Corrupt` where it does not decode; `Busy` where there is no room for the raw chunk.
pub(crate) fn loadable(shared: &Shared, slot: Slot) -> Result<Slot> {
    if shared.decodes(slot.codec()) {
        return Ok(slot);
    }
    let room = shared.allocate(1).pop().ok_or_else(|| {
        Error::busy("no room to decode a chunk for a device that does not").with("key", slot.key())
    })?;
    slot.decoded(room)
}

/// Shown: what is measured, and every verdict with its words.
#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: u64 = 64 << 20;

    /// As long as a batch takes at so many MB/s.
    fn at(rate: f64) -> Duration {
        Duration::from_secs_f64(BATCH as f64 / rate / 1e6)
    }

    #[test]
    fn a_batch_is_encoded_where_that_keeps_up_with_the_disk() {
        let coding = Coding::default();
        let verdict = || coding.measured().encodes();
        let unknown = (true, "not compared with the disk's speed yet".to_owned());
        assert_eq!(verdict(), unknown);
        coding.wrote(BATCH, at(1400.0));
        assert_eq!(verdict(), unknown);
        coding.measured().encoded(BATCH, at(100.0));
        coding.measured().encoded(MEASURED_BYTES - 1, at(100.0));
        assert_eq!(
            verdict(),
            unknown,
            "neither the first nor a small one counts"
        );
        coding.measured().encoded(BATCH, at(5000.0));
        let words = "encoding at 5.00 GB/s keeps up with a disk of 1.40 GB/s";
        assert_eq!(verdict(), (true, words.to_owned()));
        coding.wrote(BATCH, at(12_600.0));
        let words = "encoding at 5.00 GB/s would hold up a disk of 7.00 GB/s";
        assert_eq!(verdict(), (false, words.to_owned()));
    }
}
