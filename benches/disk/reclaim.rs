//! How soon space comes back on a full store: from asking for it until the files take so much less.
//!
//! Asked is as `Cache::compact` asks: the tier gives what it can, and the coldest records go until it is
//! enough. Of those that go two thirds are the oldest, so that whole files die, and a third from anywhere,
//! so that files become sparse. Then the store is filled again. First a sixteenth of the store is asked for,
//! again and again, which makes it as ragged as it comes to be; then half of it.
//!
//! What the files take is what the file system has allocated for them, and for those that are unlinked and
//! still open.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier as _, HostArena, RecordHeader, RecordId, Slot, SystemClock};

use crate::chunks::Random;
use crate::harness::{Goal, Samples, figure};
use crate::{Settings, chunks, table};

const CHUNK_BYTES: usize = 1 << 20;
const IMAGE_BYTES: usize = CHUNK_BYTES + RecordHeader::BYTES;
const BATCH_CHUNKS: u32 = 32;

/// Sizes of one run of the benchmark.
struct Sizes {
    capacity_bytes: u64,
    /// How often a sixteenth is asked for, and half.
    small_rounds: usize,
    half_rounds: usize,
}

/// How long it took, in seconds.
#[derive(Default)]
struct Outcome {
    gone: Samples,
    answered: Samples,
}

pub fn run(settings: &Settings) {
    let sizes = match settings.is_test {
        true => Sizes {
            capacity_bytes: 256 << 20,
            small_rounds: 2,
            half_rounds: 1,
        },
        false => Sizes {
            capacity_bytes: 4 << 30,
            small_rounds: 32,
            half_rounds: 5,
        },
    };
    let geometry = chunks::geometry(CHUNK_BYTES);
    let arena_bytes = BATCH_CHUNKS as usize * IMAGE_BYTES;
    let arena = HostArena::open(&geometry, arena_bytes, |_, _| {}).expect("memory");
    let batch = chunks::chain(&arena, 0, 0..BATCH_CHUNKS);
    let folder = settings.folder("reclaim");
    let clock = Arc::new(SystemClock::default());
    let tier = RocksDisk::open(folder.path(), &geometry, sizes.capacity_bytes, clock);
    let tier = tier.expect("opened");
    let mut store = Store {
        tier: &tier,
        batch: &batch,
        live: BTreeSet::new(),
        random: Random(11),
    };
    let (mut small, mut half) = <(Outcome, Outcome)>::default();
    for _ in 0..sizes.small_rounds {
        store.ask(sizes.capacity_bytes / 16, &mut small);
    }
    for _ in 0..sizes.half_rounds {
        store.ask(sizes.capacity_bytes / 2, &mut half);
    }
    let usage = tier.usage();
    tier.close().expect("closed");
    println!(
        "reclaim: of a full store of {} MiB; {:.3} bytes moved a byte written",
        sizes.capacity_bytes >> 20,
        usage.rewritten_bytes as f64 / usage.written_bytes as f64,
    );
    for (outcome, rounds, share, name) in [
        (&small, sizes.small_rounds, 16, "disk.reclaim"),
        (&half, sizes.half_rounds, 2, "disk.reclaim_half"),
    ] {
        let Outcome { gone, answered } = outcome;
        let mib = (sizes.capacity_bytes / share) >> 20;
        let worst = gone.values().fold(0.0, f64::max);
        println!(
            "  {mib} MiB, {rounds} times: gone after {:.0} ms, at most {:.0} (answered after {:.0}, at most {:.0})",
            1e3 * gone.median(),
            1e3 * worst,
            1e3 * answered.median(),
            1e3 * answered.values().fold(0.0, f64::max),
        );
        table::row(
            format!("{mib} MiB given back, the longest of {rounds} times"),
            String::new(),
            format!("{worst:.2} s"),
            String::new(),
        );
        figure(&format!("{name}_median"), gone.median(), "s", Goal::None);
        figure(name, worst, "s", Goal::AtMost(1.0));
    }
}

/// A store that is filled and asked for space.
struct Store<'a> {
    tier: &'a RocksDisk,
    batch: &'a [Slot],
    live: BTreeSet<RecordId>,
    random: Random,
}

impl Store<'_> {
    /// Fills the store, and asks it for so many bytes.
    fn ask(&mut self, bytes: u64, outcome: &mut Outcome) {
        let (tier, dir) = (self.tier, self.tier.path());
        while let Ok(ids) = tier.write(self.batch).expect("the disk works") {
            self.live.extend(ids);
        }
        let before = taken_bytes(dir);
        let wanted = tier.reclaim(0).expect("the disk works") + bytes;
        let begun = Instant::now();
        let mut free = tier.reclaim(wanted).expect("the disk works");
        while free < wanted {
            let count = (wanted - free).div_ceil(IMAGE_BYTES as u64);
            let gone = self.coldest(count as usize);
            tier.remove(&gone).expect("the disk works");
            free = tier.reclaim(wanted).expect("the disk works");
        }
        outcome.answered.push(begun.elapsed().as_secs_f64());
        while taken_bytes(dir) + bytes > before {
            let late = begun.elapsed() > Duration::from_secs(60);
            assert!(!late, "it does not come");
            std::thread::yield_now();
        }
        outcome.gone.push(begun.elapsed().as_secs_f64());
    }

    fn coldest(&mut self, count: usize) -> Vec<RecordId> {
        let mut gone = Vec::with_capacity(count);
        for _ in 0..count.min(self.live.len()) {
            let at = match self.random.below(3) {
                0 => self.random.below(self.live.len()),
                _ => 0,
            };
            let id = *self.live.iter().nth(at).expect("there are more");
            self.live.remove(&id);
            gone.push(id);
        }
        gone
    }
}

/// Bytes that the file system has allocated for what is in a folder, and for files from there that are
/// unlinked and still open.
fn taken_bytes(dir: &Path) -> u64 {
    let (mut bytes, mut folders) = (0, vec![dir.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("ours").flatten() {
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => folders.push(entry.path()),
                Ok(meta) => bytes += meta.blocks() * 512,
                // Gone since it was listed.
                Err(_) => {}
            }
        }
    }
    for descriptor in std::fs::read_dir("/proc/self/fd").expect("Linux").flatten() {
        let target = std::fs::read_link(descriptor.path()).unwrap_or_default();
        let is_unlinked = target.to_string_lossy().ends_with(" (deleted)");
        if is_unlinked
            && target.starts_with(dir)
            && let Ok(meta) = std::fs::metadata(descriptor.path())
        {
            bytes += meta.blocks() * 512;
        }
    }
    bytes
}
