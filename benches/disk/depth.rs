//! `disk.depth`: plain reads of one size, so many of them under way: what the disk gives by itself, and how
//! much of its best the sizes reach that the store reads with ([`ReadSizes`]).
//!
//! Each cell is the median of interleaved rounds, each a run of 32 MiB out of the store's own files.

use std::time::Instant;

use stemkv_store::DiskTier as _;
use stemkv_store::disk::ReadSizes;

use crate::chunks::Random;
use crate::harness::{Goal, Samples, figure};
use crate::raw::{RawFile, RawWay, ring, slot};
use crate::read::Stage;
use crate::{Settings, cpu, table};

const DEPTHS: [usize; 6] = [1, 2, 4, 8, 16, 32];
const PIECES: [usize; 5] = [128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20];
const RUN_BYTES: usize = 32 << 20;
const CHUNK_BYTES: usize = 2 << 20;

pub fn run(settings: &Settings) {
    let (runs, rounds) = match settings.is_test {
        true => (2, 1),
        false => (32, 9),
    };
    let folder = settings.folder("depth");
    let capacity = 4 * (runs * 32 * CHUNK_BYTES) as u64 + (1 << 30);
    let stage = Stage::new(folder.path(), CHUNK_BYTES, runs, 1, capacity);
    let plain = RawFile::of_store(folder.path(), CHUNK_BYTES);
    let mut memory = slot(&stage.arena, RUN_BYTES);
    let memory = &mut memory.image_mut().expect("ours alone")[..RUN_BYTES];
    let cells = PIECES.map(|piece| DEPTHS.map(|depth| (piece, depth)));
    let mut cells: Vec<_> = cells
        .concat()
        .into_iter()
        .map(|(piece, depth)| (piece, depth, Samples::default(), 0.0))
        .collect();
    let mut random = Random(9);
    let last = (plain.bytes() as usize - RUN_BYTES) / CHUNK_BYTES;
    for round in 0..rounds {
        for turn in 0..cells.len() {
            // In another order each time: a disk that swings swings for all of them.
            let index = (turn * 7 + round * 11) % cells.len();
            let (piece, depth, samples, cpu_seconds) = &mut cells[index];
            let offset = (random.below(last + 1) * CHUNK_BYTES) as u64;
            let mut ring = ring(*depth);
            let (before, begun) = (cpu::spent(), Instant::now());
            plain.read(RawWay::Ring, &mut ring, memory, offset, *piece, *depth);
            samples.add(begun.elapsed());
            *cpu_seconds += (cpu::spent() - before).sum();
        }
    }
    let bytes = RUN_BYTES as f64 / 1e9;
    let rate = |samples: &Samples| bytes / samples.median();
    print!("plain reads, GB/s (CPU s/GB); under way:");
    DEPTHS.iter().for_each(|depth| print!(" {depth:>12}"));
    println!();
    for row in cells.chunks(DEPTHS.len()) {
        print!("{:>31} KiB     ", row[0].0 >> 10);
        for (_, _, samples, cpu_seconds) in row {
            let cpu = cpu_seconds / (bytes * f64::from(rounds as u32));
            print!(" {:>5.2} ({cpu:.2})", rate(samples));
        }
        println!();
    }
    let sizes = ReadSizes::default();
    let best = cells.iter().map(|cell| rate(&cell.2)).fold(0.0, f64::max);
    let ours = cells
        .iter()
        .find(|cell| (cell.0, cell.1) == (sizes.piece_bytes_max, sizes.depth))
        .map_or(0.0, |cell| rate(&cell.2));
    table::row(
        "plain reads, as the store reads and the best of all",
        table::rate(best * 1e9),
        table::rate(ours * 1e9),
        table::percent(ours / best),
    );
    figure(
        "disk.depth",
        ours / best,
        "of the best depth and size",
        Goal::None,
    );
    stage.tier.close().expect("the disk works");
}
