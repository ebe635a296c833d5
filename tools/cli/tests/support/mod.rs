//! A small store whose every byte and time is known, and a way to run a command on it.

#![allow(
    dead_code,
    reason = "each test binary uses its own part of the support"
)]

#[allow(
    unexpected_cfgs,
    reason = "features of the package whose tests these are"
)]
#[path = "../../../../tests/support/mod.rs"]
pub mod engine;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use engine::{Engine, config, geometry, namespace, prompt, save};
use stemkv::{Cache, DiskConfig, HashPath as _, Namespace, Prompt};
use stemkv_cli::{Exit, run_at};
use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier as _, Key, RecordHeader, RecordInfo, SimClock};

const CAPACITY: u64 = 64 << 20;

/// A folder with a store in it, and the clock by which it was written.
pub struct Home {
    dir: tempfile::TempDir,
    pub clock: Arc<SimClock>,
}

pub fn adapted() -> Namespace {
    let mut adapted = namespace();
    adapted.adapter = Some("lora-7".into());
    adapted
}

/// The prompts of the store: two that share three blocks of six and five, one under an adapter.
pub fn first() -> Vec<u32> {
    prompt(1, 24)
}

pub fn fork() -> Vec<u32> {
    let mut fork = first()[..20].to_vec();
    fork[12..].fill(9);
    fork
}

pub fn under_adapter() -> Vec<u32> {
    prompt(3, 8)
}

/// The keys of a prompt's blocks in a namespace.
pub fn keys(namespace: &Namespace, tokens: &[u32]) -> Vec<Key> {
    let mut prompt = Prompt::tokens(namespace.root(), namespace.geometry.block_tokens, tokens);
    prompt.hash_to(usize::MAX);
    prompt.hashed().to_vec()
}

impl Home {
    /// Ten blocks: the fork two hours old, the adapter's half an hour, the first prompt ten seconds.
    pub async fn new() -> Home {
        let home = Home {
            dir: tempfile::tempdir().expect("a temporary folder"),
            clock: Arc::new(SimClock::default()),
        };
        let cache = home.cache();
        let plain = cache.namespace(&namespace()).expect("the store's geometry");
        let other = cache.namespace(&adapted()).expect("the store's geometry");
        let engine = Engine::new(64);
        let minutes = |minutes: u64| home.clock.advance(Duration::from_secs(60 * minutes));
        let saves = [
            (&plain, fork(), 90),
            (&other, under_adapter(), 30),
            (&plain, first(), 0),
        ];
        for (namespace, tokens, then_minutes) in saves {
            drop(save(&cache, namespace, &engine, &tokens).await);
            cache.flush().await;
            minutes(then_minutes);
        }
        cache.close().await.expect("nothing hangs");
        home.clock.advance(Duration::from_secs(10));
        home
    }

    pub fn cache(&self) -> Cache {
        let config = config(64).with_disk(DiskConfig::new(self.path(), CAPACITY));
        Cache::builder(config)
            .disk(Arc::new(self.disk()))
            .clock(self.clock.clone())
            .open()
            .expect("a valid configuration")
    }

    /// The store, open for writing.
    pub fn disk(&self) -> RocksDisk {
        RocksDisk::open(self.path(), &geometry(), CAPACITY, self.clock.clone())
            .expect("nobody else has it open")
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn records(&self) -> Vec<RecordInfo> {
        let mut records = Vec::new();
        let disk = self.disk();
        disk.scan(&mut |record| records.push(record))
            .expect("readable");
        records
    }

    /// Takes a block's record out, as if it had been lost.
    pub fn remove(&self, key: &Key) {
        let record = self.records().into_iter().find(|record| record.key == *key);
        let id = record.expect("it was stored").id;
        self.disk().remove(&[id]).expect("writable");
    }

    /// Where a block lies on disk, and its header.
    fn find(&self, key: &Key) -> (fs::File, u64, RecordHeader) {
        let mut place = None;
        RocksDisk::salvage(self.path(), &mut |path, offset, header| {
            if header.key == *key {
                place = Some((path.to_owned(), offset, header));
            }
        })
        .expect("readable");
        let (path, offset, header) = place.expect("it was stored");
        let file = fs::File::options().read(true).write(true).open(path);
        (file.expect("a file"), offset, header)
    }

    /// Changes a block's header where it lies on disk, its own checksum with it.
    pub fn change_header(&self, key: &Key, change: impl FnOnce(&mut RecordHeader)) -> Header {
        let (file, offset, header) = self.find(key);
        let mut changed = header.clone();
        change(&mut changed);
        file.write_all_at(&changed.encode()[..], offset)
            .expect("in the file");
        Header {
            file,
            offset,
            header,
        }
    }

    /// Flips a bit of a block's payload where it lies on disk.
    pub fn damage(&self, key: &Key) {
        let (file, offset, _) = self.find(key);
        let offset = offset + RecordHeader::BYTES as u64;
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).expect("in the file");
        file.write_all_at(&[byte[0] ^ 1], offset)
            .expect("in the file");
    }

    /// RocksDB's payload files.
    pub fn payload_files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        RocksDisk::salvage(self.path(), &mut |path, _, _| files.push(path.to_owned()))
            .expect("readable");
        files.sort();
        files.dedup();
        files
    }

    /// Every file of the store and its bytes.
    pub fn bytes(&self) -> Vec<(PathBuf, Vec<u8>)> {
        fn walk(dir: &Path, found: &mut Vec<(PathBuf, Vec<u8>)>) {
            for entry in fs::read_dir(dir).expect("a folder").flatten() {
                let path = entry.path();
                match path.is_dir() {
                    true => walk(&path, found),
                    false => found.push((path.clone(), fs::read(&path).expect("a file"))),
                }
            }
        }
        let mut found = Vec::new();
        walk(self.path(), &mut found);
        found.sort();
        found
    }

    /// Runs `stemkv COMMAND PATH OPTIONS…` in this process.
    pub fn run(&self, command: &str, options: &[&str]) -> Ran {
        let path = self.path().to_str().expect("a path of letters");
        let arguments = ["stemkv", command, path]
            .into_iter()
            .chain(options.iter().copied());
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let exit = run_at(
            arguments.map(Into::into),
            &mut out,
            &mut err,
            self.clock.clone(),
        );
        Ran {
            exit,
            out: String::from_utf8(out)
                .expect("text")
                .replace(path, "/var/cache/stemkv"),
            err: String::from_utf8(err)
                .expect("text")
                .replace(path, "/var/cache/stemkv"),
        }
    }
}

/// A header that was changed, as it was before.
pub struct Header {
    file: fs::File,
    offset: u64,
    header: RecordHeader,
}

impl Header {
    pub fn put_back(self) {
        let page = self.header.encode();
        self.file
            .write_all_at(&page[..], self.offset)
            .expect("in the file");
    }
}

/// What a command answered.
#[derive(Debug)]
pub struct Ran {
    pub exit: Exit,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    #[track_caller]
    pub fn contains(&self, text: &str) {
        assert!(
            self.out.contains(text),
            "no {text:?} in\n{}\n{}",
            self.out,
            self.err
        );
    }
}

/// Compares an answer with the file that shows how it should look. `STEMKV_UPDATE_SNAPSHOTS=1`
/// writes the file: look at what changed before it is committed.
#[track_caller]
pub fn snapshot(name: &str, answer: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/snapshots/{name}.txt"));
    // How much the file system and RocksDB itself take is theirs to say.
    let mut known = String::new();
    for line in answer.lines() {
        match line.split_once(" live of ") {
            Some((before, after)) => {
                let after = after.split_once(" on disk").map_or("", |(_, after)| after);
                known.push_str(&format!("{before} live of N KiB on disk{after}\n"));
            }
            None => known.push_str(&format!("{line}\n")),
        }
    }
    if std::env::var_os("STEMKV_UPDATE_SNAPSHOTS").is_some() {
        fs::write(&path, &known).expect("the source tree is writable");
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        known == expected,
        "{name} looks otherwise:\n{known}\ninstead of\n{expected}"
    );
}
