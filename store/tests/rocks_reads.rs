//! Reads of the RocksDB tier straight out of its files, where the files change under them.

#![cfg(all(feature = "rocksdb", feature = "sim"))]
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use stemkv_store::disk::{ReadSizes, ReadWay, RocksDisk};
use stemkv_store::{DiskTier, ErrorKind};
use support::*;

const WAYS: [ReadWay; 4] = [
    ReadWay::Ring,
    ReadWay::Threads,
    ReadWay::Buffered,
    ReadWay::Get,
];

fn open(dir: &Path, way: ReadWay) -> RocksDisk {
    let tier = RocksDisk::open(dir, &geometry(), 256 << 20, sim_clock()).unwrap();
    tier.with_read_way(way, ReadSizes::default())
}

/// The payload files, oldest first.
fn payload_files(dir: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(dir.join("db-0/payload")).unwrap();
    let mut files: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn a_file_cut_short_under_an_open_store_is_refused_where_it_is_short_and_read_before() {
    for way in WAYS {
        let dir = tempfile::tempdir().unwrap();
        let arena = arena(64);
        let tier = open(dir.path(), way);
        let ids = tier.write(&chain(&arena, 1, 8)).unwrap().unwrap();
        let infos = infos_of(&tier, &ids);
        let file = &payload_files(dir.path())[0];
        // In the middle of the fifth record.
        let mut places = Vec::new();
        RocksDisk::salvage(dir.path(), &mut |_, offset, _| places.push(offset)).unwrap();
        let file = fs::File::options().write(true).open(file).unwrap();
        file.set_len(places[4] + RECORD_BYTES / 2).unwrap();
        let reads = infos
            .iter()
            .map(|info| (info.clone(), filling(&arena, info)));
        let answers = read_all(&tier, reads.collect());
        for (i, (answer, info)) in answers.iter().zip(&infos).enumerate() {
            match answer {
                Ok(slot) => {
                    assert!(i < 4, "{way:?}: record {i} is cut off");
                    assert_right(slot, info);
                }
                Err(error) => {
                    assert!(i >= 4, "{way:?}: record {i} is whole: {error:?}");
                    // So that whoever asked drops it.
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                }
            }
        }
    }
}

/// The file's bytes count until the read that holds it open has ended.
#[test]
fn a_file_that_is_dropped_while_it_is_read_is_read_to_its_end_and_counted_until_then() {
    for way in [ReadWay::Ring, ReadWay::Threads, ReadWay::Buffered] {
        let dir = tempfile::tempdir().unwrap();
        let arena = arena(128);
        let tier = open(dir.path(), way);
        let ids = tier.write(&chain(&arena, 1, 40)).unwrap().unwrap();
        let infos = infos_of(&tier, &ids);
        let before = tier.usage();
        let file_bytes = 40 * RECORD_BYTES;
        let reads: Vec<_> = infos
            .iter()
            .map(|info| (info.clone(), filling(&arena, info)))
            .collect();
        let (first, has_begun) = mpsc::channel();
        let (go_on, wait) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let (tier, infos) = (&tier, &infos);
            let reader = scope.spawn(move || {
                let mut answers = 0;
                tier.read(reads, &mut |i, answer| {
                    assert_right(&answer.unwrap(), &infos[i]);
                    answers += 1;
                    if answers == 1 {
                        first.send(()).unwrap();
                        wait.recv().unwrap();
                    }
                });
                answers
            });
            has_begun.recv().unwrap();
            tier.remove(&ids).unwrap();
            let during = tier.usage();
            assert_eq!(during.records, 0);
            assert!(
                during.used_bytes + (64 << 10) > before.used_bytes,
                "{way:?}: {during:?} after {before:?}"
            );
            go_on.send(()).unwrap();
            assert_eq!(reader.join().unwrap(), 40, "{way:?}");
        });
        let after = tier.usage();
        assert!(
            after.used_bytes + file_bytes < before.used_bytes + (64 << 10),
            "{way:?}: {after:?} after {before:?}"
        );
    }
}

#[test]
fn many_files_are_read_with_few_descriptors() {
    let dir = tempfile::tempdir().unwrap();
    let arena = arena(400);
    let tier = open(dir.path(), ReadWay::Ring);
    for family in 0..300 {
        tier.write(&chain(&arena, family, 1)).unwrap().unwrap();
    }
    for opened in [false, true] {
        let fresh;
        let tier = if opened {
            tier.close().unwrap();
            fresh = open(dir.path(), ReadWay::Ring);
            &fresh
        } else {
            &tier
        };
        assert_eq!(assert_all_right(tier, &arena).len(), 300);
        let payload = dir.path().join("db-0/payload").canonicalize().unwrap();
        // RocksDB has its own, through the page cache.
        let past_cache = |descriptor: &std::ffi::OsStr| {
            let info = fs::read_to_string(Path::new("/proc/self/fdinfo").join(descriptor));
            let info = info.unwrap_or_default();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
            flags.unwrap_or(0) & libc::O_DIRECT != 0
        };
        let descriptors = fs::read_dir("/proc/self/fd").unwrap();
        let ours = descriptors
            .map(|entry| entry.unwrap())
            .filter(|entry| {
                let target = fs::read_link(entry.path()).unwrap_or_default();
                target.parent() == Some(&payload) && past_cache(&entry.file_name())
            })
            .count();
        assert!((1..=128).contains(&ours), "{ours} descriptors");
    }
}

/// What went since it was opened is gone, and not damaged: it was removed, or moved.
#[test]
fn a_reader_beside_a_writer_that_removes_finds_records_gone_and_none_corrupt() {
    reads_beside_a_writer_that_removes(|writer| writer);
    reads_beside_a_writer_that_removes(RocksDisk::without_holes);
}

fn reads_beside_a_writer_that_removes(way: impl Fn(RocksDisk) -> RocksDisk) {
    let dir = tempfile::tempdir().unwrap();
    let arena = arena(64);
    let writer = way(open(dir.path(), ReadWay::Ring));
    let mut ids = Vec::new();
    for family in 0..60 {
        ids.extend(writer.write(&chain(&arena, family, 2)).unwrap().unwrap());
    }
    let reader = RocksDisk::open_read_only(dir.path(), sim_clock()).unwrap();
    let (infos, _) = scan(&reader);
    // A third is removed, of a third the second block: the first one is moved, or stays beside a hole.
    let gone = ids
        .chunks(2)
        .enumerate()
        .flat_map(|(family, ids)| match family % 3 {
            0 => ids,
            1 => &ids[1..],
            _ => &[],
        });
    writer.remove(&gone.copied().collect::<Vec<_>>()).unwrap();
    writer.reclaim(u64::MAX).unwrap();
    let (mut there, mut not_there) = (0, 0);
    for info in &infos {
        match read(&reader, &arena, info) {
            Ok(slot) => {
                assert_right(&slot, info);
                there += 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
                not_there += 1;
            }
        }
    }
    assert!(
        there >= 40 && not_there > 20,
        "{there} there, {not_there} gone"
    );
}

/// A record that is read in several parts: some before it became a hole, some after.
#[test]
fn a_record_that_becomes_a_hole_under_a_reader_is_gone_and_not_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    let arena = arena(8);
    let writer = open(dir.path(), ReadWay::Ring);
    let ids = writer.write(&chain(&arena, 1, 4)).unwrap().unwrap();
    for way in [ReadWay::Ring, ReadWay::Get] {
        let reader = RocksDisk::open_read_only(dir.path(), sim_clock())
            .unwrap()
            .with_read_way(way, ReadSizes::default());
        let infos = infos_of(&reader, &ids);
        // The second half of a record, and a bit of another one, which is damage.
        let mut places = std::collections::HashMap::new();
        RocksDisk::salvage(dir.path(), &mut |path, offset, header| {
            places.insert(header.key, (path.to_owned(), offset));
        })
        .unwrap();
        let (path, offset) = &places[&key(1, 1)];
        let file = fs::File::options().write(true).open(path).unwrap();
        use std::os::fd::AsRawFd as _;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let half = *offset as libc::off_t + 3 * 4096;
        // SAFETY: a call on an open descriptor, without pointers.
        let made = unsafe { libc::fallocate(file.as_raw_fd(), mode, half, 2 * 4096) };
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
        if way == ReadWay::Ring {
            flip_record_bit(dir.path(), &key(1, 2), 8 * 5000);
        }
        let error = read(&reader, &arena, &infos[1]).expect_err("half of it is there");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{way:?}: {error:?}");
        let error = read(&reader, &arena, &infos[2]).expect_err("it is damaged");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{way:?}: {error:?}");
        assert_right(&read(&reader, &arena, &infos[3]).unwrap(), &infos[3]);
        if way == ReadWay::Get {
            writer.remove(&ids[..3]).unwrap();
            writer.reclaim(u64::MAX).unwrap();
            writer.remove(&ids[3..]).unwrap();
            assert_eq!(writer.usage().files, 0);
            let error = read(&reader, &arena, &infos[0]).expect_err("its file is gone, too");
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
        }
    }
}

#[test]
fn a_reader_opens_and_counts_nothing_as_lost_while_files_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let writer = open(dir.path(), ReadWay::Ring);
    let done = std::sync::atomic::AtomicBool::new(false);
    let came = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let arena = arena(8);
            let mut live = std::collections::VecDeque::new();
            for family in 0.. {
                live.extend(writer.write(&chain(&arena, family, 1)).unwrap().unwrap());
                if live.len() > 40 {
                    writer.remove(&[live.pop_front().unwrap()]).unwrap();
                }
                came.store(family, std::sync::atomic::Ordering::Relaxed);
                if done.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
            }
        });
        let arena = arena(1);
        let opened = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut openings = 0;
            while openings < 60 || came.load(std::sync::atomic::Ordering::Relaxed) <= 100 {
                openings += 1;
                assert!(!writing.is_finished(), "nothing comes any more");
                let reader = RocksDisk::open_read_only(dir.path(), sim_clock()).unwrap();
                let (infos, found) = scan(&reader);
                assert_eq!(found.dropped, 0);
                for info in &infos {
                    match read(&reader, &arena, info) {
                        Ok(slot) => assert_right(&slot, info),
                        Err(error) => assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}"),
                    }
                }
            }
        }));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        writing.join().unwrap();
        opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}
