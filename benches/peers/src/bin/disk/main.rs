//! stemkv's disk tier beside its peers, on the same bytes in one run: runs of 32 chunks of 1 MiB,
//! written to durable by two threads and read cold, in interleaved rounds, beside plain O_DIRECT.
//!
//! | contestant | a write is durable by | a read is |
//! |---|---|---|
//! | raw O_DIRECT | one `pwritev` into a file of its length, `fdatasync` | `pread` on 16 threads |
//! | stemkv | one batch | one call, verified |
//! | one file a chunk, O_DIRECT | write, `fsync` of each file and the folder | `pread` on 4 threads |
//! | one file a chunk, buffered | the same | the same, page cache dropped before |
//! | RocksDB BlobDB | a batch without WAL, then a flush | `get` on 4 threads, direct reads |
//! | RocksDB, plain values | a batch with WAL, synced | `get` on 4 threads, direct reads |
//! | foyer hybrid | its flushers have written it (it does not sync) | `get`, 32 at once |
//!
//! Only stemkv verifies what it reads slab by slab within the time; everybody's bytes are compared once,
//! outside it. Small unless it is run with `--bench`; `--dir FOLDER` says where.

#[path = "../../../../disk/chunks.rs"]
#[allow(dead_code, reason = "a part of it is enough here")]
mod chunks;
#[path = "../../../../harness/mod.rs"]
mod harness;
mod peers;

use std::path::{Path, PathBuf};
use std::time::Instant;

use harness::{Goal, Samples, figure};
use stemkv_store::{HostArena, Slot};

/// What is written and read: runs of chunks with the images that the host tier has of them.
struct Work {
    runs: Vec<Vec<Slot>>,
    /// For the reads.
    arena: HostArena,
}

impl Work {
    fn new(runs: u64, chunks: u32) -> Work {
        let geometry = chunks::geometry(1 << 20);
        let image = 4096 + geometry.payload_bytes();
        let arena = |slots: usize| {
            HostArena::open(&geometry, slots * image, |_, _| {}).expect("enough memory")
        };
        let source = arena(runs as usize * chunks as usize);
        Work {
            runs: (0..runs)
                .map(|run| chunks::chain(&source, run, 0..chunks))
                .collect(),
            arena: arena(2 * chunks as usize),
        }
    }

    fn bytes(&self) -> f64 {
        let images = self.runs.iter().flatten();
        images.map(|slot| slot.image().len() as f64).sum()
    }
}

/// One way to keep chunks on disk.
trait Contestant: Sync {
    /// Writes a run; durable on return, as far as it promises that at all.
    fn write(&self, run: usize, chunks: &[Slot]);
    /// What must be done for all to lie in files; not measured.
    fn settle(&self) {}
    /// Reads a run, and shows its bytes, chunk by chunk.
    fn read(&self, run: usize, chunks: usize, arena: &HostArena, show: Show<'_>);
}

type Show<'a> = &'a mut dyn FnMut(usize, &[u8]);

struct Entry {
    name: &'static str,
    open: fn(&Path, &Work) -> Box<dyn Contestant>,
    write: Samples,
    read: Samples,
}

fn main() {
    let is_large = std::env::args().any(|argument| argument == "--bench");
    let mut arguments = std::env::args().skip_while(|argument| argument != "--dir");
    let dir = arguments
        .nth(1)
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let (runs, chunks, rounds) = if is_large { (16, 32, 3) } else { (2, 4, 1) };
    let work = Work::new(runs, chunks);
    let entry = |name, open| Entry {
        name,
        open,
        write: Samples::default(),
        read: Samples::default(),
    };
    let mut entries = [
        entry("raw O_DIRECT", peers::raw),
        entry("stemkv", peers::stemkv),
        entry("one file a chunk, O_DIRECT", peers::files_direct),
        entry("one file a chunk, buffered", peers::files_buffered),
        entry("RocksDB BlobDB", peers::rocks_blobs),
        entry("RocksDB, plain values", peers::rocks_plain),
        entry("foyer 0.22.3 hybrid", peers::foyer),
    ];
    for round in 0..rounds {
        for entry in &mut entries {
            let folder = dir.join("stemkv-bench-peers");
            let _ = std::fs::remove_dir_all(&folder);
            std::fs::create_dir_all(&folder).expect("--dir names a folder to write to");
            measure(entry, &folder, &work, round == 0);
            std::fs::remove_dir_all(&folder).expect("ours");
            rustix::fs::sync();
        }
    }
    report(&entries, work.bytes());
}

fn measure(entry: &mut Entry, folder: &Path, work: &Work, compare: bool) {
    let contestant = (entry.open)(folder, work);
    let contestant = &*contestant;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for writer in 0..2 {
            let runs = work.runs.iter().enumerate().skip(writer).step_by(2);
            scope.spawn(move || runs.for_each(|(run, chunks)| contestant.write(run, chunks)));
        }
    });
    entry.write.add(begun.elapsed());
    contestant.settle();
    drop_cached(folder);
    let begun = Instant::now();
    for (run, chunks) in work.runs.iter().enumerate() {
        contestant.read(run, chunks.len(), &work.arena, &mut |_, _| {});
    }
    entry.read.add(begun.elapsed());
    if compare {
        for (run, chunks) in work.runs.iter().enumerate() {
            let mut seen = 0;
            contestant.read(run, chunks.len(), &work.arena, &mut |chunk, bytes| {
                let expected = chunks[chunk].image();
                assert!(
                    bytes == &expected[..bytes.len()],
                    "{}: other bytes",
                    entry.name
                );
                assert!(bytes.len() > 1 << 20, "{}: too few", entry.name);
                seen += 1;
            });
            assert_eq!(seen, chunks.len(), "{}: chunks are missing", entry.name);
        }
    }
}

/// Takes the files of a folder out of the page cache.
fn drop_cached(folder: &Path) {
    rustix::fs::sync();
    for entry in std::fs::read_dir(folder).expect("ours").flatten() {
        let path = entry.path();
        if path.is_dir() {
            drop_cached(&path);
        } else if let Ok(file) = std::fs::File::open(path) {
            // A file system that keeps nothing need not forget anything.
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        }
    }
}

fn report(entries: &[Entry], bytes: f64) {
    let speed = |samples: &Samples| bytes / samples.median() / 1e9;
    let [raw, ours, peers @ ..] = entries else {
        unreachable!("both are there");
    };
    println!("| contestant | write GB/s | of raw | cold read GB/s | of raw |");
    println!("|---|---|---|---|---|");
    for entry in entries {
        let (write, read) = (speed(&entry.write), speed(&entry.read));
        println!(
            "| {} | {write:.2} | {:.0} % | {read:.2} | {:.0} % |",
            entry.name,
            100.0 * write / speed(&raw.write),
            100.0 * read / speed(&raw.read),
        );
    }
    let best = |of: fn(&Entry) -> &Samples| peers.iter().map(|e| speed(of(e))).fold(0.0, f64::max);
    let write = speed(&ours.write) / best(|entry| &entry.write);
    let read = speed(&ours.read) / best(|entry| &entry.read);
    figure(
        "disk.peers_write",
        write,
        "of the best peer",
        Goal::AtLeast(0.95),
    );
    figure(
        "disk.peers_read",
        read,
        "of the best peer",
        Goal::AtLeast(0.95),
    );
}
