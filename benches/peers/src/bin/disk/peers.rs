//! The contestants.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use foyer::{
    BlockEngineConfig, DeviceBuilder as _, FsDeviceBuilder, HybridCache, HybridCacheBuilder,
    HybridCachePolicy,
};
use rocksdb::{DB, Options, WriteBatch, WriteOptions};
use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier as _, Filling, HostArena, RecordHeader, RecordId, Slot, SystemClock};

use crate::{Contestant, Show, Work, chunks};

/// Threads that read for those who do not bring their own.
const READERS: usize = 4;

/// What keeps the disk busiest.
const RAW_READERS: usize = 16;

/// Room on disk for everything, with much to spare.
const CAPACITY_BYTES: usize = 4 << 30;

fn slots(arena: &HostArena, count: usize) -> Vec<Filling> {
    let bytes = arena.geometry().payload_bytes();
    arena.allocate(bytes, count).expect("room for one run")
}

/// Fills slots on several threads, and shows them.
fn read_into(
    readers: usize,
    arena: &HostArena,
    chunks: usize,
    show: Show<'_>,
    fill: impl Fn(usize, &mut [u8]) + Sync,
) {
    let mut slots = slots(arena, chunks);
    let queue = Mutex::new(slots.iter_mut().enumerate());
    std::thread::scope(|scope| {
        for _ in 0..readers {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().expect("nobody panics under it").next();
                    let Some((chunk, slot)) = next else { return };
                    fill(chunk, slot.image_mut().expect("ours alone"));
                }
            });
        }
    });
    for (chunk, slot) in slots.iter_mut().enumerate() {
        show(chunk, slot.image_mut().expect("ours alone"));
    }
}

fn direct() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_DIRECT);
    options
}

struct Raw {
    file: File,
    run_bytes: u64,
}

pub fn raw(dir: &Path, work: &Work) -> Box<dyn Contestant> {
    let run_bytes: usize = work.runs[0].iter().map(|slot| slot.image().len()).sum();
    let mut options = direct();
    let file = options.read(true).write(true).create(true);
    let file = file.open(dir.join("raw")).expect("O_DIRECT");
    file.set_len((run_bytes * work.runs.len()) as u64)
        .expect("space");
    Box::new(Raw {
        file,
        run_bytes: run_bytes as u64,
    })
}

impl Contestant for Raw {
    fn write(&self, run: usize, chunks: &[Slot]) {
        let slices: Vec<_> = chunks
            .iter()
            .map(|slot| IoSlice::new(slot.image()))
            .collect();
        let offset = run as u64 * self.run_bytes;
        let written = rustix::io::pwritev(&self.file, &slices, offset).expect("space");
        assert_eq!(written as u64, self.run_bytes);
        self.file.sync_data().expect("the disk works");
    }

    fn read(&self, run: usize, chunks: usize, arena: &HostArena, show: Show<'_>) {
        let start = run as u64 * self.run_bytes;
        let bytes = self.run_bytes / chunks as u64;
        read_into(RAW_READERS, arena, chunks, show, |chunk, image| {
            let offset = start + chunk as u64 * bytes;
            self.file.read_exact_at(image, offset).expect("written");
        });
    }
}

struct Stemkv {
    tier: RocksDisk,
    ids: Mutex<Vec<(usize, Vec<RecordId>)>>,
}

pub fn stemkv(dir: &Path, _: &Work) -> Box<dyn Contestant> {
    let clock = Arc::new(SystemClock::default());
    let geometry = chunks::geometry(1 << 20);
    let tier = RocksDisk::open(&dir.join("store"), &geometry, CAPACITY_BYTES as u64, clock);
    Box::new(Stemkv {
        tier: tier.expect("a fresh store"),
        ids: Mutex::default(),
    })
}

impl Contestant for Stemkv {
    fn write(&self, run: usize, chunks: &[Slot]) {
        let ids = self
            .tier
            .write(chunks)
            .expect("the disk works")
            .expect("it fits");
        self.ids.lock().expect("nobody panics").push((run, ids));
    }

    fn read(&self, run: usize, chunks: usize, arena: &HostArena, show: Show<'_>) {
        let ids = self.ids.lock().expect("nobody panics");
        let (_, ids) = ids.iter().find(|(of, _)| *of == run).expect("written");
        let bytes = arena.geometry().payload_bytes() + RecordHeader::BYTES;
        let reads = (0..).zip(ids).zip(slots(arena, chunks));
        let reads = reads.map(|((depth, id), slot)| {
            let above = |depth| chunks::key(run as u64, depth);
            let info = stemkv_store::RecordInfo {
                id: *id,
                namespace: chunks::root(),
                parent: u32::checked_sub(depth, 1).map_or(chunks::root(), above),
                key: chunks::key(run as u64, depth),
                depth,
                bytes: bytes as u32,
                last_use_ms: 0,
            };
            (info, slot)
        });
        self.tier.read(reads.collect(), &mut |chunk, slot| {
            show(chunk, slot.expect("it verifies").image());
        });
    }
}

struct Files {
    dir: PathBuf,
    direct: bool,
}

pub fn files_direct(dir: &Path, _: &Work) -> Box<dyn Contestant> {
    Box::new(Files {
        dir: dir.to_owned(),
        direct: true,
    })
}

pub fn files_buffered(dir: &Path, _: &Work) -> Box<dyn Contestant> {
    Box::new(Files {
        dir: dir.to_owned(),
        direct: false,
    })
}

impl Files {
    fn open(&self, run: usize, chunk: usize, options: &mut OpenOptions) -> File {
        if self.direct {
            options.custom_flags(libc::O_DIRECT);
        }
        let path = self.dir.join(format!("{run}-{chunk}"));
        options.open(path).expect("the disk works")
    }
}

impl Contestant for Files {
    fn write(&self, run: usize, chunks: &[Slot]) {
        for (chunk, slot) in chunks.iter().enumerate() {
            let mut options = OpenOptions::new();
            let file = self.open(run, chunk, options.write(true).create(true));
            file.write_all_at(slot.image(), 0).expect("space");
            file.sync_all().expect("the disk works");
        }
        let folder = File::open(&self.dir).expect("ours");
        folder.sync_all().expect("the disk works");
    }

    fn read(&self, run: usize, chunks: usize, arena: &HostArena, show: Show<'_>) {
        read_into(READERS, arena, chunks, show, |chunk, image| {
            let file = self.open(run, chunk, OpenOptions::new().read(true));
            file.read_exact_at(image, 0).expect("written");
        });
    }
}

struct Rocks {
    db: DB,
    wal: bool,
}

fn rocks(dir: &Path, wal: bool, tune: impl FnOnce(&mut Options)) -> Box<dyn Contestant> {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_compression_type(rocksdb::DBCompressionType::None);
    options.set_use_direct_reads(true);
    options.set_use_direct_io_for_flush_and_compaction(true);
    options.set_write_buffer_size(64 << 20);
    options.set_max_write_buffer_number(4);
    options.set_max_background_jobs(4);
    let mut blocks = rocksdb::BlockBasedOptions::default();
    blocks.disable_cache();
    options.set_block_based_table_factory(&blocks);
    tune(&mut options);
    let db = DB::open(&options, dir.join("rocks")).expect("a fresh database");
    Box::new(Rocks { db, wal })
}

pub fn rocks_blobs(dir: &Path, _: &Work) -> Box<dyn Contestant> {
    rocks(dir, false, |options| {
        options.set_enable_blob_files(true);
        options.set_min_blob_size(4096);
        options.set_blob_file_size(256 << 20);
    })
}

pub fn rocks_plain(dir: &Path, _: &Work) -> Box<dyn Contestant> {
    rocks(dir, true, |_| {})
}

fn rocks_key(run: usize, chunk: usize) -> [u8; 16] {
    ((run as u128) << 64 | chunk as u128).to_be_bytes()
}

impl Contestant for Rocks {
    fn write(&self, run: usize, chunks: &[Slot]) {
        let mut batch = WriteBatch::default();
        for (chunk, slot) in chunks.iter().enumerate() {
            batch.put(rocks_key(run, chunk), slot.image());
        }
        let mut options = WriteOptions::default();
        match self.wal {
            true => options.set_sync(true),
            false => options.disable_wal(true),
        }
        self.db.write_opt(batch, &options).expect("space");
        if !self.wal {
            self.db.flush().expect("space");
        }
    }

    fn settle(&self) {
        self.db.flush().expect("space");
    }

    fn read(&self, run: usize, chunks: usize, arena: &HostArena, show: Show<'_>) {
        read_into(READERS, arena, chunks, show, |chunk, image| {
            let value = self.db.get_pinned(rocks_key(run, chunk));
            let value = value.expect("the disk works").expect("written");
            image[..value.len()].copy_from_slice(&value);
        });
    }
}

struct Foyer {
    runtime: tokio::runtime::Runtime,
    cache: HybridCache<u64, Vec<u8>>,
}

pub fn foyer(dir: &Path, _: &Work) -> Box<dyn Contestant> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("threads");
    let device = FsDeviceBuilder::new(dir)
        .with_capacity(CAPACITY_BYTES)
        .with_direct(true)
        .build()
        .expect("O_DIRECT");
    let engine = BlockEngineConfig::new(device)
        .with_block_size(64 << 20)
        .with_flushers(2)
        .with_buffer_pool_size(512 << 20)
        .with_submit_queue_size_threshold(2 << 30);
    // As good as no memory: what is read was not there before.
    let cache = runtime.block_on(
        HybridCacheBuilder::new()
            .with_policy(HybridCachePolicy::WriteOnInsertion)
            .memory(1)
            .with_weighter(|_, value: &Vec<u8>| value.len())
            .storage()
            .with_engine_config(engine)
            .build(),
    );
    Box::new(Foyer {
        cache: cache.expect("a fresh cache"),
        runtime,
    })
}

impl Contestant for Foyer {
    fn write(&self, run: usize, chunks: &[Slot]) {
        let _inside = self.runtime.enter();
        for (chunk, slot) in chunks.iter().enumerate() {
            let key = (run * 1000 + chunk) as u64;
            self.cache.insert(key, slot.image().to_vec());
        }
        self.runtime.block_on(self.cache.storage().wait());
    }

    fn read(&self, run: usize, chunks: usize, _: &HostArena, show: Show<'_>) {
        let entries: Vec<_> = self.runtime.block_on(async {
            let gets = (0..chunks).map(|chunk| {
                let cache = self.cache.clone();
                tokio::spawn(async move { cache.get(&((run * 1000 + chunk) as u64)).await })
            });
            let gets: Vec<_> = gets.collect();
            let mut entries = Vec::new();
            for get in gets {
                entries.push(get.await.expect("no panic"));
            }
            entries
        });
        for (chunk, entry) in entries.into_iter().enumerate() {
            show(chunk, &entry.expect("the disk works").expect("kept"));
        }
    }
}
