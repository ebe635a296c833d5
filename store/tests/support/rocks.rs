//! Stores of the RocksDB tier: their files, and how to damage them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier, HostArena, Key};

use super::{chain, root, scan};

/// Flips a bit of the image stored under `key`, in RocksDB's own file.
pub fn flip_record_bit(dir: &Path, key: &Key, bit: usize) {
    use std::os::unix::fs::FileExt;
    let mut places = Vec::new();
    RocksDisk::salvage(dir, &mut |path, offset, header| {
        if header.key == *key {
            places.push((path.to_owned(), offset));
        }
    })
    .unwrap();
    assert_eq!(places.len(), 1, "the record is stored once");
    let (path, offset) = &places[0];
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    let at = offset + (bit / 8) as u64;
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ (1 << (bit % 8))], at)
        .unwrap();
}

/// Every file below `dir`, by its path from there.
pub fn files(dir: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
            match entry.file_type().unwrap().is_dir() {
                true => folders.push(entry.path()),
                false => drop(found.insert(entry.path().strip_prefix(dir).unwrap().to_owned())),
            }
        }
    }
    found
}

/// Bytes that the file system has allocated for a folder and everything in it, each file once.
pub fn allocated_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let (mut inodes, mut bytes) = (BTreeSet::new(), 0);
    let mut paths = vec![dir.to_owned()];
    while let Some(path) = paths.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            paths.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        if inodes.insert(meta.ino()) {
            bytes += meta.blocks() * 512;
        }
    }
    bytes
}

/// Copies every file of a folder.
pub fn copy(from: &Path, to: &Path) {
    for file in files(from) {
        fs::create_dir_all(to.join(&file).parent().unwrap()).unwrap();
        fs::copy(from.join(&file), to.join(&file)).unwrap();
    }
}

/// A closed store with several payload files, an index in a table file and more of it in the log.
pub fn sample(dir: &Path, arena: &HostArena, open: impl Fn(&Path) -> RocksDisk) -> BTreeSet<Key> {
    for opening in 0..3 {
        let tier = open(dir);
        for family in 0..2 {
            tier.write(&chain(arena, opening * 10 + family, 4))
                .unwrap()
                .unwrap();
        }
        let (records, _) = scan(&tier);
        tier.remove(&[records.last().unwrap().id]).unwrap();
        tier.touch(&[records[0].id], 5_000_000_000_000).unwrap();
        tier.put_meta(&root(), b"a namespace").unwrap();
    }
    let tier = open(dir);
    tier.write(&chain(arena, 99, 4)).unwrap().unwrap();
    let keys = scan(&tier).0.into_iter().map(|info| info.key).collect();
    tier.close().unwrap();
    keys
}
