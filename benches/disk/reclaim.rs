//! How soon space comes back on a full store: from asking for it until the files take so much less.
//!
//! Asked is as `Cache::compact` asks: the tier gives what cleaning gives, and the coldest records go until
//! it is enough. Of those that go two thirds are the oldest, so that whole files die, and a third from
//! anywhere, so that others become sparse and are moved. Then the store is filled again.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier as _, HostArena, RecordHeader, RecordId, SystemClock};

use crate::chunks::Random;
use crate::harness::{Goal, Samples, figure};
use crate::write::allocated_bytes;
use crate::{Settings, chunks, table};

const CHUNK_BYTES: usize = 1 << 20;
const BATCH_CHUNKS: u32 = 32;

/// Sizes of one run of the benchmark.
struct Sizes {
    capacity_bytes: u64,
    asked_bytes: u64,
    rounds: usize,
}

pub fn run(settings: &Settings) {
    let sizes = match settings.is_test {
        true => Sizes {
            capacity_bytes: 256 << 20,
            asked_bytes: 32 << 20,
            rounds: 2,
        },
        false => Sizes {
            capacity_bytes: 4 << 30,
            asked_bytes: 256 << 20,
            rounds: 60,
        },
    };
    let geometry = chunks::geometry(CHUNK_BYTES);
    let image_bytes = CHUNK_BYTES + RecordHeader::BYTES;
    let arena_bytes = BATCH_CHUNKS as usize * image_bytes;
    let arena = HostArena::open(&geometry, arena_bytes, |_, _| {}).expect("memory");
    let batch = chunks::chain(&arena, 0, 0..BATCH_CHUNKS);
    let folder = settings.folder("reclaim");
    let dir = folder.path().join("store");
    let clock = Arc::new(SystemClock::default());
    let tier = RocksDisk::open(&dir, &geometry, sizes.capacity_bytes, clock).expect("opened");
    let (mut live, mut random) = (BTreeSet::new(), Random(11));
    let (mut took, mut answered) = <(Samples, Samples)>::default();
    for _ in 0..sizes.rounds {
        while let Ok(ids) = tier.write(&batch).expect("the disk works") {
            live.extend(ids);
        }
        let before = allocated_bytes(&dir);
        let wanted = tier.reclaim(0).expect("the disk works") + sizes.asked_bytes;
        let begun = Instant::now();
        let mut free = tier.reclaim(wanted).expect("the disk works");
        while free < wanted {
            let count = (wanted - free).div_ceil(image_bytes as u64);
            let gone = coldest(&mut live, count as usize, &mut random);
            tier.remove(&gone).expect("the disk works");
            free = tier.reclaim(wanted).expect("the disk works");
        }
        answered.push(begun.elapsed().as_secs_f64());
        while allocated_bytes(&dir) + sizes.asked_bytes > before {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "it does not come"
            );
            std::thread::yield_now();
        }
        took.push(begun.elapsed().as_secs_f64());
    }
    let usage = tier.usage();
    tier.close().expect("closed");
    let (median, worst) = (took.median(), took.p99());
    println!(
        "reclaim: {} MiB of a full store of {} MiB, {} times: gone after {:.0} ms, P99 {:.0} ms \
         (answered after {:.0}, {:.0}); {:.3} bytes moved a byte written",
        sizes.asked_bytes >> 20,
        sizes.capacity_bytes >> 20,
        sizes.rounds,
        1e3 * median,
        1e3 * worst,
        1e3 * answered.median(),
        1e3 * answered.p99(),
        usage.rewritten_bytes as f64 / usage.written_bytes as f64,
    );
    table::row(
        format!("{} MiB given back, P99", sizes.asked_bytes >> 20),
        String::new(),
        format!("{worst:.2} s"),
        String::new(),
    );
    figure("disk.reclaim_median", median, "s", Goal::None);
    figure("disk.reclaim", worst, "s", Goal::AtMost(1.0));
}

fn coldest(live: &mut BTreeSet<RecordId>, count: usize, random: &mut Random) -> Vec<RecordId> {
    let mut gone = Vec::with_capacity(count);
    for _ in 0..count.min(live.len()) {
        let at = match random.below(3) {
            0 => random.below(live.len()),
            _ => 0,
        };
        let id = *live.iter().nth(at).expect("there are more");
        live.remove(&id);
        gone.push(id);
    }
    gone
}
