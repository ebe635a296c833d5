//! `disk.read_*` and `disk.cpu_read`: cold reads of 32-chunk runs, verified, beside plain reads of as
//! many bytes in the same round.
//!
//! Both sides go past the page cache and read the same files, each run of a round is another one, and
//! the sides take turns in going first. Only payload bytes count on our side; headers are read on top.

use std::sync::Barrier;
use std::time::Instant;

use stemkv_store::disk::{ReadSizes, RocksDisk};
use stemkv_store::{Checksummer, DiskTier, HostArena, RecordHeader, RecordInfo, SystemClock};

use crate::chunks::{self, Random};
use crate::harness::{Goal, Samples, figure};
use crate::raw::{RawFile, RawWay, ring, slot};
use crate::{Settings, cpu, table};

/// Chunks of a run.
pub const RUN: usize = 32;

/// A store of runs, and plain reads of its files.
pub struct Stage {
    pub tier: RocksDisk,
    pub arena: HostArena,
    /// Of each run, in the order of its prefix.
    pub runs: Vec<Vec<RecordInfo>>,
    pub raw: RawFile,
    pub chunk_bytes: usize,
}

impl Stage {
    /// Writes `runs` runs as the cache does, in batches of 32 MiB.
    pub fn new(
        dir: &std::path::Path,
        chunk_bytes: usize,
        runs: usize,
        readers: usize,
        capacity_bytes: u64,
    ) -> Stage {
        let geometry = chunks::geometry(chunk_bytes);
        let record_bytes = RecordHeader::BYTES + chunk_bytes;
        // Each reader has the memory of one run of ours and one plain run; a writer fills batches.
        let arena_bytes = readers * 2 * RUN * record_bytes + 4 * (40 << 20);
        let arena = HostArena::open(&geometry, arena_bytes, |_, _| {}).expect("memory");
        let store = dir.join("store");
        let clock = std::sync::Arc::new(SystemClock::default());
        let tier = RocksDisk::open(&store, &geometry, capacity_bytes, clock).expect("a fresh one");
        tier.attach(&arena);
        let batch = ((32 << 20) / record_bytes).max(1) as u32;
        for family in 0..runs as u64 {
            for from in (0..RUN as u32).step_by(batch as usize) {
                let depths = from..(from + batch).min(RUN as u32);
                let written = tier.write(&chunks::chain(&arena, family, depths));
                written.expect("the disk works").expect("room");
            }
        }
        let mut found = vec![Vec::new(); runs];
        tier.scan(&mut |info| {
            let family = info.key.0[..8].try_into().map(u64::from_le_bytes);
            found[family.expect("8 bytes") as usize].push(info);
        })
        .expect("the index is there");
        Stage {
            raw: RawFile::of_store(&store, chunk_bytes),
            tier,
            arena,
            runs: found,
            chunk_bytes,
        }
    }

    pub fn run_bytes(&self) -> usize {
        RUN * self.chunk_bytes
    }

    /// Where the plain read of so many bytes begins that stands beside run `run`.
    pub fn raw_offset(&self, run: usize) -> u64 {
        let last = (self.raw.bytes() as usize - self.run_bytes()) / self.chunk_bytes;
        let piece = (run * RUN).min(last);
        (piece * self.chunk_bytes) as u64
    }

    /// Reads a run of ours; panics unless every record arrives.
    pub fn read_run(&self, run: usize) {
        let infos = &self.runs[run];
        let payload = self.arena.geometry().payload_bytes();
        let slots = self.arena.allocate(payload, infos.len()).expect("room");
        let mut arrived = 0;
        let reads = infos.iter().cloned().zip(slots).collect();
        self.tier.read(reads, &mut |_, answer| {
            answer.expect("sound");
            arrived += 1;
        });
        assert_eq!(arrived, RUN);
    }
}

/// What is compared.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Ours,
    Raw(RawWay),
}

const SIDES: [Side; 3] = [
    Side::Ours,
    Side::Raw(RawWay::Ring),
    Side::Raw(RawWay::Preadv),
];

#[derive(Default)]
struct Outcome {
    /// Of all readers together, of each round.
    seconds: Samples,
    /// Of each run.
    run_seconds: Samples,
    cpu_seconds: f64,
}

pub fn run(settings: &Settings) {
    let sizes = ReadSizes::default();
    println!(
        "cold reads of runs of {RUN} chunks, {}; {sizes:?}",
        cpu::name()
    );
    println!(
        "{:>9} {:>7} | {:>22} | {:>11} {:>11} | {:>6} | CPU s/GB {:>6} {:>8} {:>6}",
        "chunk",
        "readers",
        "ours GB/s (P99 run ms)",
        "ring GB/s",
        "preadv GB/s",
        "ratio",
        "ours",
        "checking",
        "raw"
    );
    let (total, rounds) = match settings.is_test {
        true => (64 << 20, 1),
        false => (2 << 30, 15),
    };
    for chunk_bytes in [256 << 10, 1 << 20, 2 << 20] {
        let folder = settings.folder("read");
        let runs = (total / (RUN * chunk_bytes)).max(4);
        let capacity = 4 * total as u64 + (1 << 30);
        let stage = Stage::new(folder.path(), chunk_bytes, runs, 4, capacity);
        let checking = checking_seconds_per_gb(&stage);
        for readers in [1, 4] {
            compare(&stage, readers, rounds, sizes, checking);
        }
        stage.tier.close().expect("the disk works");
    }
}

fn compare(stage: &Stage, readers: usize, rounds: usize, sizes: ReadSizes, checking: f64) {
    let mut outcomes = SIDES.map(|_| Outcome::default());
    let mut random = Random(readers as u64);
    for round in 0..rounds {
        for turn in 0..SIDES.len() {
            let side = (round + turn) % SIDES.len();
            let picks: Vec<_> = (0..readers)
                .map(|_| random.below(stage.runs.len()))
                .collect();
            measure(stage, SIDES[side], &picks, sizes, &mut outcomes[side]);
        }
    }
    let [ours, rings, preadv] = &outcomes;
    let raw = match rings.seconds.median() <= preadv.seconds.median() {
        true => rings,
        false => preadv,
    };
    let mut ratios = Samples::default();
    for (ours, raw) in ours.seconds.values().zip(raw.seconds.values()) {
        ratios.push(raw / ours);
    }
    let bytes = (readers * stage.run_bytes()) as f64;
    let rate = |outcome: &Outcome| bytes / outcome.seconds.median() / 1e9;
    let cpu = |outcome: &Outcome| outcome.cpu_seconds / (bytes * rounds as f64) * 1e9;
    let kib = stage.chunk_bytes >> 10;
    println!(
        "{kib:>5} KiB {readers:>7} | {:>13.2} ({:>6.1}) | {:>11.2} {:>11.2} | {:>6.3} | {:>15.3} {checking:>8.3} {:>6.3}",
        rate(ours),
        ours.run_seconds.p99() * 1e3,
        rate(rings),
        rate(preadv),
        ratios.median(),
        cpu(ours),
        cpu(raw),
    );
    let who = match readers {
        1 => "one reader".to_owned(),
        _ => format!("{readers} readers"),
    };
    table::row(
        format!("cold reads, runs of {RUN} × {kib} KiB, {who}"),
        table::rate(rate(raw) * 1e9),
        table::rate(rate(ours) * 1e9),
        table::percent(ratios.median()),
    );
    figure(
        &format!("disk.read_{kib}k_{readers}"),
        ratios.median(),
        "of raw",
        Goal::AtLeast(0.9),
    );
    if readers == 1 {
        figure(
            &format!("disk.cpu_read_{kib}k"),
            cpu(ours) - checking,
            "CPU s/GB without checking",
            Goal::AtMost(0.1),
        );
    }
}

/// Each reader reads one run on one side, all at once. A round lasts from the first reader's beginning to
/// the last one's end, as they saw it: the thread that waits for them may wake up late.
fn measure(stage: &Stage, side: Side, picks: &[usize], sizes: ReadSizes, outcome: &mut Outcome) {
    let start = Barrier::new(picks.len() + 1);
    let end = Barrier::new(picks.len() + 1);
    let times = std::thread::scope(|scope| {
        let readers = picks.iter().map(|pick| {
            let (start, end) = (&start, &end);
            scope.spawn(move || {
                let bytes = stage.run_bytes();
                let mut ring = ring(sizes.depth);
                let mut memory = matches!(side, Side::Raw(_)).then(|| slot(&stage.arena, bytes));
                start.wait();
                let begun = Instant::now();
                match (side, &mut memory) {
                    (Side::Raw(way), Some(memory)) => {
                        let memory = &mut memory.image_mut().expect("ours alone")[..bytes];
                        let offset = stage.raw_offset(*pick);
                        let piece = stage.chunk_bytes;
                        stage
                            .raw
                            .read(way, &mut ring, memory, offset, piece, sizes.depth);
                    }
                    _ => stage.read_run(*pick),
                }
                let ended = Instant::now();
                end.wait();
                (begun, ended)
            })
        });
        let readers: Vec<_> = readers.collect();
        let cpu_before = cpu::seconds();
        start.wait();
        end.wait();
        outcome.cpu_seconds += cpu::seconds() - cpu_before;
        let times = readers.into_iter().map(|reader| reader.join());
        times
            .collect::<Result<Vec<_>, _>>()
            .expect("no reader panics")
    });
    let first = times.iter().map(|(begun, _)| *begun).min();
    let last = times.iter().map(|(_, ended)| *ended).max();
    if let (Some(first), Some(last)) = (first, last) {
        outcome.seconds.add(last - first);
    }
    for (begun, ended) in times {
        outcome.run_seconds.add(ended - begun);
    }
}

/// CPU seconds that the checksums of a GB take by themselves, of bytes that the disk has just put into
/// memory.
fn checking_seconds_per_gb(stage: &Stage) -> f64 {
    let bytes = stage.run_bytes();
    let mut memory = slot(&stage.arena, bytes);
    let memory = &mut memory.image_mut().expect("ours alone")[..bytes];
    let slab = stage.arena.geometry().slab_bytes();
    let (mut ring, mut samples) = (ring(1), Samples::default());
    for run in (0..stage.runs.len()).cycle().take(20) {
        let mut offset = stage.raw_offset(run);
        let mut seconds = 0.0;
        // As much at a time as a read of ours brings.
        for part in memory.chunks_mut((512 << 10).min(stage.chunk_bytes)) {
            let length = part.len();
            let way = RawWay::Ring;
            stage.raw.read(way, &mut ring, part, offset, length, 1);
            offset += length as u64;
            let begun = Instant::now();
            for slab in part.chunks_exact(slab) {
                std::hint::black_box(Checksummer::of(slab));
            }
            seconds += begun.elapsed().as_secs_f64();
        }
        samples.push(seconds);
    }
    samples.median() / bytes as f64 * 1e9
}
