//! `disk.read_*` and `disk.cpu_read`: cold reads of 32-chunk runs, verified, beside plain reads of as
//! many bytes in the same round.
//!
//! Both sides go past the page cache and read the same files, each run of a round is another one, and
//! the sides take turns in going first. Only payload bytes count on our side; headers are read on top.
//!
//! What the checksums take by themselves is measured in the same rounds, of bytes that plain reads bring in
//! the same way. Plain reads with a ring are into memory that the kernel knows, as ours are.

use std::sync::Barrier;
use std::time::Instant;

use stemkv_store::disk::{ReadSizes, RocksDisk};
use stemkv_store::{Checksummer, DiskTier, HostArena, RecordHeader, RecordInfo, SystemClock};

use crate::chunks::{self, Random};
use crate::cpu::CpuSeconds;
use crate::harness::{Goal, Samples, figure};
use crate::raw::{RawFile, RawWay, ring, slot};
use crate::{Settings, cpu, table};

/// Chunks of a run.
pub const RUN: usize = 32;

/// Of one reader's runs in a round.
const ROUND_BYTES: usize = 64 << 20;

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

    /// Runs that a reader reads in a round: as many as make the same bytes of any chunk.
    fn runs_a_round(&self) -> usize {
        (ROUND_BYTES / self.run_bytes()).max(1)
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
    /// Plain reads with a ring, each piece checked as it arrives: for what checking takes.
    Checked,
}

const SIDES: [Side; 4] = [
    Side::Ours,
    Side::Raw(RawWay::Ring),
    Side::Raw(RawWay::Preadv),
    Side::Checked,
];

#[derive(Default)]
struct Outcome {
    /// Of all readers together, of each round.
    seconds: Samples,
    /// Of each run.
    run_seconds: Samples,
    cpu: CpuSeconds,
    /// Of the checksums, as their threads saw it.
    checking_seconds: f64,
}

pub fn run(settings: &Settings) {
    let sizes = ReadSizes::default();
    println!(
        "cold reads of runs of {RUN} chunks, {}; {sizes:?}",
        cpu::name()
    );
    println!(
        "{:>9} {:>7} | {:>22} | {:>9} {:>11} | {:>6} | CPU s/GB {:>21} {:>12} | {:>21}",
        "chunk",
        "readers",
        "ours GB/s (P99 run ms)",
        "ring GB/s",
        "preadv GB/s",
        "ratio",
        "ours (user + system)",
        "for checking",
        "ring (user + system)"
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
        for readers in [1, 4] {
            compare(&stage, readers, rounds, sizes);
        }
        stage.tier.close().expect("the disk works");
    }
}

fn compare(stage: &Stage, readers: usize, rounds: usize, sizes: ReadSizes) {
    let mut outcomes = SIDES.map(|_| Outcome::default());
    let mut random = Random(readers as u64);
    for round in 0..rounds {
        for turn in 0..SIDES.len() {
            let side = (round + turn) % SIDES.len();
            let mut pick = || random.below(stage.runs.len());
            let picks: Vec<Vec<usize>> = (0..readers)
                .map(|_| (0..stage.runs_a_round()).map(|_| pick()).collect())
                .collect();
            measure(stage, SIDES[side], &picks, sizes, &mut outcomes[side]);
        }
    }
    let [ours, rings, preadv, checked] = &outcomes;
    let raw = match rings.seconds.median() <= preadv.seconds.median() {
        true => rings,
        false => preadv,
    };
    let mut ratios = Samples::default();
    for (ours, raw) in ours.seconds.values().zip(raw.seconds.values()) {
        ratios.push(raw / ours);
    }
    let bytes = (readers * stage.runs_a_round() * stage.run_bytes()) as f64;
    let rate = |outcome: &Outcome| bytes / outcome.seconds.median() / 1e9;
    let gigabytes = bytes * rounds as f64 / 1e9;
    let checking = checked.checking_seconds / gigabytes;
    let cpu = |outcome: &Outcome| {
        let CpuSeconds { user, system } = outcome.cpu;
        let (user, system) = (user / gigabytes, system / gigabytes);
        format!("{:.3} ({user:.3} + {system:.3})", user + system)
    };
    let reading = ours.cpu.sum() / gigabytes - checking;
    let plain = rings.cpu.sum() / gigabytes;
    let kib = stage.chunk_bytes >> 10;
    println!(
        "{kib:>5} KiB {readers:>7} | {:>13.2} ({:>6.1}) | {:>9.2} {:>11.2} | {:>6.3} | {:>30} {checking:>12.3} | {:>21}",
        rate(ours),
        ours.run_seconds.p99() * 1e3,
        rate(rings),
        rate(preadv),
        ratios.median(),
        cpu(ours),
        cpu(rings),
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
            reading,
            "CPU s/GB without checking",
            Goal::AtMost(0.1),
        );
        figure(
            &format!("disk.cpu_read_{kib}k_of_raw"),
            reading / plain,
            "of plain reads with io_uring",
            Goal::None,
        );
        table::row(
            format!("… CPU seconds a GB, {checking:.3} for checking apart"),
            format!("{plain:.3} s"),
            format!("{reading:.3} s"),
            table::percent(reading / plain),
        );
    }
}

/// Each reader reads some runs on one side, one after the other, all readers at once. A round lasts from
/// the first reader's beginning to the last one's end, as they saw it: the thread that waits for them may
/// wake up late. What comes before and after, threads and rings, counts on neither side.
fn measure(
    stage: &Stage,
    side: Side,
    picks: &[Vec<usize>],
    sizes: ReadSizes,
    outcome: &mut Outcome,
) {
    let barriers = [(); 4].map(|()| Barrier::new(picks.len() + 1));
    let [ready, start, end, seen] = &barriers;
    let times = std::thread::scope(|scope| {
        let readers = picks.iter().map(|picks| {
            scope.spawn(move || {
                let bytes = stage.run_bytes();
                let mut ring = ring(sizes.depth);
                let mut memory = (side != Side::Ours).then(|| slot(&stage.arena, bytes));
                if let Some(memory) = &mut memory {
                    ring.know(&mut memory.image_mut().expect("ours alone")[..bytes]);
                }
                let slab_bytes = stage.arena.geometry().slab_bytes();
                let mut checking = 0.0;
                let mut check = |piece: &mut [u8]| {
                    let before = cpu::of_thread();
                    for slab in piece.chunks_exact(slab_bytes) {
                        std::hint::black_box(Checksummer::of(slab));
                    }
                    checking += cpu::of_thread() - before;
                };
                ready.wait();
                start.wait();
                let mut begun = vec![Instant::now()];
                for &pick in picks {
                    let Some(memory) = &mut memory else {
                        stage.read_run(pick);
                        begun.push(Instant::now());
                        continue;
                    };
                    let memory = &mut memory.image_mut().expect("ours alone")[..bytes];
                    let (offset, piece) = (stage.raw_offset(pick), stage.chunk_bytes);
                    let (raw, depth) = (&stage.raw, sizes.depth);
                    match side {
                        Side::Raw(way) => raw.read(way, &mut ring, memory, offset, piece, depth),
                        _ => raw.read_ring(&mut ring, memory, offset, piece, depth, &mut check),
                    }
                    begun.push(Instant::now());
                }
                end.wait();
                seen.wait();
                (begun, checking)
            })
        });
        let readers: Vec<_> = readers.collect();
        ready.wait();
        let before = cpu::spent();
        start.wait();
        end.wait();
        outcome.cpu += cpu::spent() - before;
        seen.wait();
        let times = readers.into_iter().map(|reader| reader.join());
        times
            .collect::<Result<Vec<_>, _>>()
            .expect("no reader panics")
    });
    let (times, checking): (Vec<_>, Vec<_>) = times.into_iter().unzip();
    outcome.checking_seconds += checking.iter().sum::<f64>();
    let first = times.iter().filter_map(|times| times.first()).min();
    let last = times.iter().filter_map(|times| times.last()).max();
    if let (Some(first), Some(last)) = (first, last) {
        outcome.seconds.add(*last - *first);
    }
    for run in times.iter().flat_map(|times| times.windows(2)) {
        outcome.run_seconds.add(run[1] - run[0]);
    }
}
