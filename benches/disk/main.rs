//! What a disk can do, and what the disk tier makes of it, in one run: `make bench-disk DIR=…`.
//!
//! | file | figures |
//! |---|---|
//! | `raw.rs` | the ceiling: plain O_DIRECT with `preadv` and io_uring |
//! | `depth.rs` | `disk.depth`: plain reads by size and number under way |
//! | `read.rs` | `disk.read_*`, `disk.cpu_read`: cold reads of runs, verified |
//! | `open.rs` | `disk.open`, `disk.index_memory`: a million records in 8,000 files come back |
//! | `warm.rs` | `disk.warm*`: what was used last comes into RAM after a restart |
//! | `tail.rs` | `disk.tail`: how long reads take while the store writes and cleans |
//! | `reclaim.rs` | `disk.reclaim`: how soon space that is asked for is free on a full store |
//! | `write.rs` | `disk.write`, `disk.write_amplification`, `disk.cpu_write`: batches to durable |
//! | `replay.rs` | `disk.write_amplification_*`, `disk.hits_below_lru_*`: traces on a full disk |
//!
//! All of it stands in one table at the end (`../harness/table.rs`); `--rows FILE table` prints that of several
//! programs.
//!
//! Topics can be named: `… -- --dir /mnt read`; `replay` takes minutes and wants the traces, so it runs
//! only where it is named. Everything is put into folders of their own below `--dir`, which are removed
//! at the end.

#[path = "../harness/mod.rs"]
mod harness;

mod chunks;
mod cpu;
mod depth;
mod open;
mod raw;
mod read;
mod reclaim;
mod replay;
mod tail;
mod warm;
mod write;

use std::path::{Path, PathBuf};

use harness::table;

/// What a run was asked for.
struct Settings {
    dir: PathBuf,
    topics: Vec<String>,
    /// Small and short, for a look at whether it works.
    is_test: bool,
}

impl Settings {
    fn from_arguments() -> Settings {
        let mut settings = Settings {
            dir: std::env::temp_dir(),
            topics: Vec::new(),
            is_test: harness::is_test(),
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--bench" | "--test" => {}
                "--rows" => drop(arguments.next()),
                "--dir" => settings.dir = arguments.next().expect("--dir FOLDER").into(),
                topic => settings.topics.push(topic.to_owned()),
            }
        }
        settings
    }

    fn wants(&self, topic: &str) -> bool {
        self.topics.is_empty() || self.topics.iter().any(|wanted| wanted == topic)
    }

    /// A fresh folder for one topic, removed when it is dropped.
    fn folder(&self, topic: &str) -> Folder {
        let path = self.dir.join(format!("stemkv-bench-{topic}"));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("--dir names a folder to write to");
        Folder(path)
    }
}

struct Folder(PathBuf);

impl Folder {
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn main() {
    let settings = Settings::from_arguments();
    if settings.topics == ["table"] {
        let rows = harness::argument("--rows").expect("--rows FILE");
        return table::print_file(rows.as_ref());
    }
    if settings.wants("depth") {
        depth::run(&settings);
    }
    if settings.wants("read") {
        read::run(&settings);
    }
    if settings.wants("write") {
        write::run(&settings);
    }
    if settings.wants("open") {
        open::run(&settings);
    }
    if settings.wants("reclaim") {
        reclaim::run(&settings);
    }
    if settings.wants("tail") {
        tail::run(&settings);
    }
    if settings.wants("warm") {
        warm::run(&settings);
    }
    if settings.is_test || settings.topics.iter().any(|topic| topic == "replay") {
        replay::run(&settings);
    }
    table::end();
}
