//! `disk.verify`: the command `stemkv verify` over a whole store, beside plain O_DIRECT reads of its files
//! in the same round, both past the page cache.
//!
//! A program of its own because the command line is above the library that the other topics measure.

#[path = "../harness/mod.rs"]
mod harness;

#[allow(dead_code, reason = "each benchmark uses its own part")]
mod chunks;
#[allow(dead_code, reason = "each benchmark uses its own part")]
mod raw;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use harness::{Goal, Samples, argument, figure, is_test, table};
use raw::{RawFile, RawWay, ring, slot};
use stemkv_cli::Exit;
use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier, HostArena, RecordHeader, SystemClock};

const CHUNK: usize = 1 << 20;
/// Plain reads: of so many bytes, so many of them under way, into memory that the kernel knows.
const PIECE: usize = 512 << 10;
const DEPTH: usize = 16;

fn main() {
    let dir = argument("--dir").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = dir.join("stemkv-bench-verify");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("--dir names a folder to write to");
    measure(&dir);
    std::fs::remove_dir_all(&dir).expect("ours");
    table::end();
}

fn measure(dir: &Path) {
    let (total, rounds) = if is_test() {
        (64 << 20, 1)
    } else {
        (2 << 30, 7)
    };
    let geometry = chunks::geometry(CHUNK);
    let arena_bytes = 3 * (32 << 20) + (4 << 20) + 64 * RecordHeader::BYTES;
    let arena = HostArena::open(&geometry, arena_bytes, |_, _| {}).expect("memory");
    let store = dir.join("store");
    let clock = Arc::new(SystemClock::default());
    let tier = RocksDisk::open(&store, &geometry, 2 * total as u64 + (1 << 30), clock);
    let tier = tier.expect("a fresh one");
    for family in 0..(total / (32 * CHUNK)) as u64 {
        let written = tier.write(&chunks::chain(&arena, family, 0..32));
        written.expect("the disk works").expect("room");
    }
    tier.close().expect("the disk works");
    let plain = RawFile::of_store(&store, PIECE);
    let mut memory = slot(&arena, 32 << 20);
    let memory = &mut memory.image_mut().expect("ours alone")[..32 << 20];
    let mut ring = ring(DEPTH);
    ring.know(memory);
    let [mut ours, mut raw, mut ratios] = [(); 3].map(|()| Samples::default());
    for round in 0..rounds {
        let mut verify = || {
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let command = [
                "stemkv".into(),
                "verify".into(),
                store.clone().into_os_string(),
            ];
            let exit = ours.time(|| stemkv_cli::run(command, &mut out, &mut err));
            assert_eq!(exit, Exit::Fine, "{}", String::from_utf8_lossy(&out));
        };
        let mut read = || {
            let begun = Instant::now();
            for offset in (0..plain.bytes()).step_by(memory.len()) {
                let bytes = memory.len().min((plain.bytes() - offset) as usize);
                let part = &mut memory[..bytes];
                plain.read(RawWay::Ring, &mut ring, part, offset, PIECE, DEPTH);
            }
            // As if it were as many bytes as are verified.
            let share = total as f64 / plain.bytes() as f64;
            raw.push(begun.elapsed().as_secs_f64() * share);
        };
        // They take turns in going first.
        if round % 2 == 0 {
            verify();
            read();
        } else {
            read();
            verify();
        }
        ratios.push(raw.last() / ours.last());
    }
    let rate = |samples: &Samples| total as f64 / samples.median() / 1e9;
    println!(
        "stemkv verify of {} GiB of {} MiB chunks: {:.2} GB/s, plain reads {:.2} GB/s",
        total as f64 / f64::from(1 << 30),
        CHUNK >> 20,
        rate(&ours),
        rate(&raw)
    );
    table::row(
        "stemkv verify of a whole store",
        table::rate(rate(&raw) * 1e9),
        table::rate(rate(&ours) * 1e9),
        table::percent(ratios.median()),
    );
    figure("disk.verify", ratios.median(), "of raw", Goal::AtLeast(0.9));
}
