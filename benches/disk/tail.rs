//! `disk.tail`: how long a run takes to read while the store writes at half of the disk's speed and
//! cleans as it goes, beside the same reads from a quiet store.
//!
//! Reads come one after the other with pauses, so that they alone take a quarter of the disk's time.
//! The store is full. Of each batch that leaves it one record in four stays for another round, so that
//! files come to be sparse and cleaning moves a third of what is written. What the disk itself makes of such a mixture is shown by plain
//! reads beside plain writes at the same pace, in the same round.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use stemkv_store::{DiskTier as _, RecordId, Slot};

use crate::chunks::{self, Random};
use crate::harness::{Goal, Samples, figure};
use crate::raw::{RawWay, ring, slot};
use crate::read::{RUN, Stage};
use crate::{Settings, table, write};

const CHUNK_BYTES: usize = 1 << 20;
const BATCH_BYTES: usize = RUN * CHUNK_BYTES;
/// Of plain writes.
const PIECE_BYTES: usize = 4 << 20;
const DEPTH: usize = 16;
/// Batches that room is made for at once.
const ROOM_BATCHES: u64 = 4;

/// Sizes of one run of the benchmark.
struct Sizes {
    /// Runs that are read, and stay.
    runs: usize,
    /// Room for as many batches that come and go.
    batches: usize,
    rounds: usize,
    /// Of each side in a round.
    quiet_reads: usize,
    busy_reads: usize,
    raw_bytes: u64,
}

/// What one side came to, of all rounds.
#[derive(Default)]
struct Outcome {
    quiet: Samples,
    busy: Samples,
    /// Bytes a second that were written beside the reads, and their share of what was asked for.
    rates: Samples,
    shares: Samples,
}

pub fn run(settings: &Settings) {
    let sizes = match settings.is_test {
        true => Sizes {
            runs: 2,
            batches: 6,
            rounds: 1,
            quiet_reads: 2,
            busy_reads: 4,
            raw_bytes: 64 << 20,
        },
        false => Sizes {
            runs: 32,
            batches: 64,
            rounds: 5,
            quiet_reads: 30,
            busy_reads: 80,
            raw_bytes: 1 << 30,
        },
    };
    let folder = settings.folder("tail");
    let capacity = ((sizes.runs + sizes.batches) * BATCH_BYTES + (64 << 20)) as u64;
    let stage = Stage::new(folder.path(), CHUNK_BYTES, sizes.runs, 2, capacity);
    let batch = chunks::chain(&stage.arena, 1 << 20, 0..RUN as u32);

    let [mut memory, mut source] = [(); 2].map(|()| slot(&stage.arena, BATCH_BYTES));
    let memory = &mut memory.image_mut().expect("ours alone")[..BATCH_BYTES];
    let source = &mut source.image_mut().expect("ours alone")[..BATCH_BYTES];
    Random(7).fill(source);
    let source = &*source;
    let file = direct_file(folder.path(), sizes.raw_bytes);
    let offset = AtomicU64::new(0);
    let write_plainly = || {
        for piece in source.chunks_exact(PIECE_BYTES) {
            let offset = offset.fetch_add(piece.len() as u64, Ordering::Relaxed);
            let written = file.write_all_at(piece, offset % sizes.raw_bytes);
            written.expect("space");
        }
        file.sync_data().expect("the disk works");
    };
    let mut ring = ring(DEPTH);
    let mut read_plainly = |run: usize| {
        let offset = stage.raw_offset(run);
        stage
            .raw
            .read(RawWay::Ring, &mut ring, memory, offset, CHUNK_BYTES, DEPTH);
    };

    let churn = Churn::new(&stage, &batch);
    churn.fill();
    let mut random = Random(3);
    let mut read = |count: usize, pause: Duration, read_run: &mut dyn FnMut(usize)| {
        let mut samples = Samples::default();
        for _ in 0..count {
            let run = random.below(sizes.runs);
            samples.time(|| read_run(run));
            std::thread::sleep(pause);
        }
        samples
    };
    let pause = |quiet: &Samples| Duration::from_secs_f64(3.0 * quiet.median());
    let [mut plain, mut ours] = [(); 2].map(|()| Outcome::default());
    let mut paces = Samples::default();
    let before = stage.tier.usage();
    for round in 0..sizes.rounds {
        let raw = write::raw_round(folder.path(), &[source], 1, sizes.raw_bytes, PIECE_BYTES);
        let pace = raw / 2.0 * 1e9;
        paces.push(pace);
        for turn in 0..2 {
            let is_ours = (round + turn) % 2 == 1;
            let read_run: &mut dyn FnMut(usize) = match is_ours {
                true => &mut |run| stage.read_run(run),
                false => &mut read_plainly,
            };
            let quiet = read(sizes.quiet_reads, Duration::ZERO, read_run);
            let mut read = || read(sizes.busy_reads, pause(&quiet), read_run);
            let (side, (busy, rate)) = match is_ours {
                true => (&mut ours, beside(2, pace, &|| churn.write(), &mut read)),
                false => (&mut plain, beside(1, pace, &write_plainly, &mut read)),
            };
            quiet.values().for_each(|seconds| side.quiet.push(seconds));
            busy.values().for_each(|seconds| side.busy.push(seconds));
            side.rates.push(rate);
            side.shares.push(rate / pace);
        }
    }
    let after = stage.tier.usage();
    let written = after.written_bytes - before.written_bytes;
    let moved = after.rewritten_bytes - before.rewritten_bytes;

    println!(
        "a run of {} MiB while writes of {:.2} GB/s (half of raw) are asked for, ms",
        BATCH_BYTES >> 20,
        paces.median() / 1e9,
    );
    println!(
        "{:>22} | {:>9} {:>9} | {:>9} {:>9} {:>9} | writes GB/s",
        "", "quiet P50", "quiet P99", "busy P50", "busy P99", "longest"
    );
    for (name, side) in [("plain reads and writes", &plain), ("ours", &ours)] {
        let longest = side.busy.values().fold(0.0, f64::max);
        println!(
            "{name:>22} | {:>9.1} {:>9.1} | {:>9.1} {:>9.1} {:>9.1} | {:.2}, {:.0} % of the pace",
            side.quiet.median() * 1e3,
            side.quiet.p99() * 1e3,
            side.busy.median() * 1e3,
            side.busy.p99() * 1e3,
            longest * 1e3,
            side.rates.median() / 1e9,
            side.shares.median() * 100.0,
        );
    }
    let parts = PARTS.iter().zip(&churn.took).map(|(part, took)| {
        let took = took.lock().expect("nobody panics under it");
        let (times, seconds) = (took.values().count(), took.values().sum::<f64>());
        format!(
            "{part} {times} × {:.1} (together {:.1} s)",
            took.median() * 1e3,
            seconds
        )
    });
    let parts: Vec<_> = parts.collect();
    println!("  a writer's time, ms: {}", parts.join(", "));
    println!(
        "  cleaning moved {:.2} bytes a byte that was written",
        moved as f64 / written as f64
    );
    let milliseconds = |samples: &Samples| {
        let (most, usual) = (samples.p99() * 1e3, samples.median() * 1e3);
        format!("{most:.0} ms (median {usual:.0})")
    };
    table::row(
        format!("P99 of a {} MiB run beside writes", BATCH_BYTES >> 20),
        milliseconds(&plain.busy),
        milliseconds(&ours.busy),
        table::percent(plain.busy.p99() / ours.busy.p99()),
    );
    let mut of_plain = Samples::default();
    for (ours, plain) in ours.rates.values().zip(plain.rates.values()) {
        of_plain.push(ours / plain);
    }
    table::row(
        "… the writes beside them, the store full",
        table::rate(plain.rates.median()),
        table::rate(ours.rates.median()),
        table::percent(of_plain.median()),
    );
    figure(
        "disk.tail",
        ours.busy.p99() / ours.quiet.median(),
        "of the quiet median",
        Goal::AtMost(3.0),
    );
    figure(
        "disk.tail_plain",
        plain.busy.p99() / plain.quiet.median(),
        "of the quiet median",
        Goal::None,
    );
    figure(
        "disk.tail_writes",
        ours.shares.median(),
        "of the pace asked for",
        Goal::None,
    );
    figure(
        "disk.tail_writes_of_plain",
        of_plain.median(),
        "of plain writes beside plain reads",
        Goal::None,
    );
    stage.tier.close().expect("the disk works");
}

/// A plain file to write to, preallocated.
fn direct_file(folder: &std::path::Path, bytes: u64) -> File {
    let mut options = File::options();
    options.write(true).create(true).truncate(true);
    let file = options.custom_flags(libc::O_DIRECT);
    let file = file.open(folder.join("beside")).expect("O_DIRECT");
    write::set_aside(&file, bytes);
    file
}

/// `writers` threads write batches at `pace` bytes a second together, or as fast as it goes, while `read`
/// reads; bytes a second that were written.
fn beside(
    writers: usize,
    pace: f64,
    write: &(dyn Fn() + Sync),
    read: &mut dyn FnMut() -> Samples,
) -> (Samples, f64) {
    let stop = AtomicBool::new(false);
    let (begun_batches, batches) = (AtomicU64::new(0), AtomicU64::new(0));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..writers {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let before = begun_batches.fetch_add(1, Ordering::Relaxed) as f64;
                    let due = Duration::from_secs_f64(before * BATCH_BYTES as f64 / pace);
                    std::thread::sleep(due.saturating_sub(begun.elapsed()));
                    write();
                    batches.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // Where reading panics, the writers end too.
        let samples = catch_unwind(AssertUnwindSafe(&mut *read));
        let written = batches.load(Ordering::Relaxed) as f64;
        let rate = written * BATCH_BYTES as f64 / begun.elapsed().as_secs_f64();
        stop.store(true, Ordering::Relaxed);
        let samples = samples.unwrap_or_else(|panic| resume_unwind(panic));
        (samples, rate)
    })
}

/// A batch of records, and whether it has been thinned out already.
type Kept = (Vec<RecordId>, bool);

/// Batches that come and go.
struct Churn<'a> {
    stage: &'a Stage,
    batch: &'a [Slot],
    /// Oldest first.
    kept: Mutex<VecDeque<Kept>>,
    making_room: Mutex<()>,
    took: [Mutex<Samples>; 4],
}

/// What a writer's time goes into.
const PARTS: [&str; 4] = ["writing", "waiting for room", "removing", "reclaiming"];

impl<'a> Churn<'a> {
    fn new(stage: &'a Stage, batch: &'a [Slot]) -> Self {
        Churn {
            stage,
            batch,
            kept: Mutex::default(),
            making_room: Mutex::default(),
            took: Default::default(),
        }
    }

    /// Notes what so much time went into, of a writer's.
    fn note(&self, part: usize, begun: Instant) {
        let mut took = self.took[part].lock().expect("nobody panics under it");
        took.add(begun.elapsed());
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<Kept>> {
        self.kept.lock().expect("nobody panics under it")
    }

    /// Writes until the store is full; the oldest batches are thinned out then.
    fn fill(&self) {
        while self.kept().iter().all(|(_, is_rest)| !is_rest) {
            self.write();
        }
    }

    /// Writes one batch, making room for it first where there is none.
    fn write(&self) {
        loop {
            let begun = Instant::now();
            let written = self.stage.tier.write(self.batch).expect("the disk works");
            match written {
                Ok(ids) => {
                    self.note(0, begun);
                    self.kept().push_back((ids, false));
                    return;
                }
                Err(_) => self.make_room(),
            }
        }
    }

    /// As the cache does: for a few batches at once, one thread for all.
    fn make_room(&self) {
        let begun = Instant::now();
        let _one = self.making_room.lock().expect("nobody panics under it");
        self.note(1, begun);
        let ids = |of: Vec<(usize, RecordId)>| of.into_iter().map(|(_, id)| id).collect::<Vec<_>>();
        let mut go = Vec::new();
        while go.len() < ROOM_BATCHES as usize * self.batch.len() {
            let oldest = self.kept().pop_front();
            let Some((kept, is_rest)) = oldest else { break };
            let (stay, goes): (Vec<_>, Vec<_>) = kept
                .into_iter()
                .enumerate()
                .partition(|(i, _)| !is_rest && i % 4 == 0);
            go.extend(ids(goes));
            if !stay.is_empty() {
                self.kept().push_back((ids(stay), true));
            }
        }
        let begun = Instant::now();
        self.stage.tier.remove(&go).expect("the disk works");
        self.note(2, begun);
        let begun = Instant::now();
        let batch = self.batch.iter().map(|slot| slot.image().len() as u64);
        let wanted = batch.sum::<u64>() * ROOM_BATCHES;
        let reclaimed = self.stage.tier.reclaim(wanted);
        reclaimed.expect("the disk works");
        self.note(3, begun);
    }
}
