//! Sustained writes, each batch to durable, beside plain O_DIRECT writes of as many bytes.
//!
//! Both fill fresh files in interleaved rounds; the ratio is that of each pair. The plain writer has
//! one preallocated file a thread and syncs once at its end, which is the most that the disk gives;
//! the store makes every batch durable before the next one of that thread.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier as _, HostArena, RecordHeader, Slot, SystemClock};

use crate::harness::{Goal, Samples, figure};
use crate::{Settings, chunks, cpu, raw, table};

const CHUNK_BYTES: usize = 2 << 20;
/// Of a plain write: the better of this and a quarter of it counts.
const PIECE_BYTES_MAX: usize = 16 << 20;

/// Sizes of one run of the benchmark.
struct Sizes {
    /// With two writers, and with one.
    rounds: [usize; 2],
    /// Payload of a round, of all writers together.
    round_bytes: u64,
    batch_chunks: u32,
}

/// What one round of the store came to.
struct Round {
    gigabytes_a_second: f64,
    cpu_seconds: f64,
    /// Bytes of all files, as the file system allocated them.
    disk_bytes: u64,
    /// Bytes that this process sent to the disk.
    sent_bytes: u64,
}

pub fn run(settings: &Settings) {
    let sizes = match settings.is_test {
        true => Sizes {
            rounds: [1, 1],
            round_bytes: 64 << 20,
            batch_chunks: 8,
        },
        false => Sizes {
            rounds: [5, 3],
            round_bytes: 2 << 30,
            batch_chunks: 32,
        },
    };
    let geometry = chunks::geometry(CHUNK_BYTES);
    let image_bytes = CHUNK_BYTES + RecordHeader::BYTES;
    let slots = 2 * sizes.batch_chunks as usize;
    let arena_bytes = slots * image_bytes + 2 * (PIECE_BYTES_MAX + RecordHeader::BYTES);
    let arena = HostArena::open(&geometry, arena_bytes, |_, _| {}).expect("memory");
    let batches: Vec<Vec<Slot>> = (0..2)
        .map(|writer| chunks::chain(&arena, writer, 0..sizes.batch_chunks))
        .collect();
    let mut plain: Vec<_> = (0..2).map(|_| raw::slot(&arena, PIECE_BYTES_MAX)).collect();
    let memory: Vec<&[u8]> = plain
        .iter_mut()
        .map(|slot| {
            let image = slot.image_mut().expect("ours alone");
            chunks::Random(7).fill(image);
            &*image
        })
        .collect();
    println!(
        "write: {} MiB a round, batches of {} MiB, each to durable",
        sizes.round_bytes >> 20,
        (u64::from(sizes.batch_chunks) * image_bytes as u64) >> 20,
    );
    let folder = settings.folder("write");
    for (writers, rounds) in [2, 1].into_iter().zip(sizes.rounds) {
        let (mut raw, mut ours, mut ratio) = <(Samples, Samples, Samples)>::default();
        let (mut cpu_seconds, mut files, mut sent) = <(Samples, Samples, Samples)>::default();
        for _ in 0..rounds {
            let best = [PIECE_BYTES_MAX / 4, PIECE_BYTES_MAX]
                .map(|piece| raw_round(folder.path(), &memory, writers, sizes.round_bytes, piece));
            raw.push(best.into_iter().fold(0.0, f64::max));
            let round = store_round(folder.path(), &batches[..writers], sizes.round_bytes);
            ours.push(round.gigabytes_a_second);
            ratio.push(100.0 * ours.last() / raw.last());
            let payload = sizes.round_bytes as f64;
            cpu_seconds.push(round.cpu_seconds / (payload / 1e9));
            files.push(round.disk_bytes as f64 / payload);
            sent.push(round.sent_bytes as f64 / payload);
        }
        println!(
            "  {writers} writer(s): raw {:.2} GB/s, ours {:.2} GB/s ({:.0} %), {:.3} CPU s/GB, \
             files {:.4} and bytes sent {:.4} of the payload",
            raw.median(),
            ours.median(),
            ratio.median(),
            cpu_seconds.median(),
            files.median(),
            sent.median(),
        );
        let who = match writers {
            1 => "one writer".to_owned(),
            _ => format!("{writers} writers"),
        };
        table::row(
            format!("writes to durable, {who}"),
            table::rate(raw.median() * 1e9),
            table::rate(ours.median() * 1e9),
            table::percent(ratio.median() / 100.0),
        );
        match writers {
            1 => figure("disk.write_1", ratio.median(), "% of raw", Goal::None),
            _ => {
                figure(
                    "disk.write",
                    ratio.median(),
                    "% of raw",
                    Goal::AtLeast(80.0),
                );
                let amplification = sent.median().max(files.median());
                figure(
                    "disk.write_amplification",
                    amplification,
                    "bytes a payload byte",
                    Goal::AtMost(1.05),
                );
                figure(
                    "disk.cpu_write",
                    cpu_seconds.median(),
                    "CPU s/GB",
                    Goal::AtMost(0.6),
                );
            }
        }
    }
}

/// Plain writes with O_DIRECT, in pieces of one size; GB a second, one sync at the end of each file
/// included.
pub fn raw_round(folder: &Path, memory: &[&[u8]], writers: usize, bytes: u64, piece: usize) -> f64 {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for writer in 0..writers {
            let path = folder.join(format!("raw-{writer}"));
            let memory = &memory[writer][..piece];
            scope.spawn(move || {
                let mut options = File::options();
                options.write(true).create(true).truncate(true);
                let file = options.custom_flags(libc::O_DIRECT).open(path);
                let file = file.expect("a file system with O_DIRECT");
                let bytes = bytes / writers as u64;
                set_aside(&file, bytes);
                for offset in (0..bytes).step_by(piece) {
                    let part = &memory[..piece.min((bytes - offset) as usize)];
                    file.write_all_at(part, offset).expect("space");
                }
                file.sync_data().expect("the disk works");
            });
        }
    });
    let took = begun.elapsed().as_secs_f64();
    for writer in 0..writers {
        let _ = std::fs::remove_file(folder.join(format!("raw-{writer}")));
    }
    bytes as f64 / took / 1e9
}

fn store_round(folder: &Path, batches: &[Vec<Slot>], bytes: u64) -> Round {
    let dir = folder.join("store");
    let geometry = chunks::geometry(CHUNK_BYTES);
    let clock = Arc::new(SystemClock::default());
    let tier = RocksDisk::open(&dir, &geometry, 4 * bytes + (1 << 30), clock).expect("opened");
    let batch_bytes = batches[0].len() as u64 * CHUNK_BYTES as u64;
    let count = bytes / batches.len() as u64 / batch_bytes;
    let (sent, cpu, begun) = (sent_bytes(), cpu::spent(), Instant::now());
    std::thread::scope(|scope| {
        for batch in batches {
            scope.spawn(|| {
                for _ in 0..count {
                    tier.write(batch).expect("the disk works").expect("it fits");
                }
            });
        }
    });
    let took = begun.elapsed().as_secs_f64();
    let round = Round {
        gigabytes_a_second: bytes as f64 / took / 1e9,
        cpu_seconds: (cpu::spent() - cpu).sum(),
        disk_bytes: allocated_bytes(&dir),
        sent_bytes: sent_bytes() - sent,
    };
    tier.close().expect("closed");
    std::fs::remove_dir_all(&dir).expect("ours");
    round
}

/// Bytes that this process has sent to disks, from `/proc/self/io`.
pub fn sent_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// Allocated bytes of everything in a folder.
pub fn allocated_bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).expect("ours").flatten();
    let bytes = entries.map(|entry| {
        let meta = entry.metadata().expect("nobody deletes meanwhile");
        let below = match meta.is_dir() {
            true => allocated_bytes(&entry.path()),
            false => 0,
        };
        below + meta.blocks() * 512
    });
    bytes.sum()
}

/// Takes the space of a file before it is written, as the store does.
pub fn set_aside(file: &File, bytes: u64) {
    // SAFETY: the descriptor is open through the call, which touches no memory of ours.
    let answer = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes as libc::off_t) };
    assert_eq!(answer, 0, "space");
}
