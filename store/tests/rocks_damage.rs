//! Damage to the files of the RocksDB tier, of each kind and in each part, while it is closed and while it
//! is open: what comes of it, what is lost, and that nothing wrong is ever served. `docs/operations.md` has
//! the table.

#![cfg(all(feature = "rocksdb", feature = "sim"))]
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use stemkv_store::disk::RocksDisk;
use stemkv_store::{DiskTier, ErrorKind, HostArena, Key, RecordHeader, RecordInfo, Result};
use support::*;

const CAPACITY: u64 = 64 << 20;

fn open(dir: &Path) -> Result<RocksDisk> {
    RocksDisk::open(dir, &geometry(), CAPACITY, sim_clock())
}

fn sample_of(dir: &Path, arena: &HostArena) -> BTreeSet<Key> {
    sample(dir, arena, |dir| open(dir).unwrap())
}

/// Reads what a scan reports. Each is right, or is answered with an error and counted.
fn right_or_refused(tier: &RocksDisk, arena: &HostArena) -> (BTreeSet<Key>, usize) {
    let (mut right, mut refused) = (BTreeSet::new(), 0);
    for info in scan(tier).0 {
        match read(tier, arena, &info) {
            Ok(slot) => {
                assert_right(&slot, &info);
                right.insert(info.key);
            }
            Err(error) => {
                let kinds = [ErrorKind::Corrupt, ErrorKind::Unavailable];
                assert!(kinds.contains(&error.kind()), "{error}");
                refused += 1;
            }
        }
    }
    (right, refused)
}

/// The keys of the records in a payload file.
fn keys_in(dir: &Path, file: &Path) -> BTreeSet<Key> {
    let mut keys = BTreeSet::new();
    RocksDisk::salvage(dir, &mut |path, _, header| {
        if path == dir.join(file) {
            keys.insert(header.key);
        }
    })
    .unwrap();
    keys
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    Delete,
    Empty,
    Halve,
    Flip(u64),
}

fn damage(path: &Path, damage: Damage) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let length = file.metadata().unwrap().len();
    match damage {
        Damage::Delete => fs::remove_file(path).unwrap(),
        Damage::Empty => file.set_len(0).unwrap(),
        Damage::Halve => file.set_len(length / 2).unwrap(),
        Damage::Flip(_) if length == 0 => {}
        Damage::Flip(seed) => {
            let bit = Random(seed).below(length as usize * 8) as u64;
            let mut byte = [0];
            file.read_exact_at(&mut byte, bit / 8).unwrap();
            file.write_all_at(&[byte[0] ^ (1 << (bit % 8))], bit / 8)
                .unwrap();
        }
    }
}

/// Each file of the store, one after the other, is deleted, emptied, cut in half, and has bits
/// flipped; each time the store opens, serves the records of all other files, and takes more.
#[test]
fn damage_to_any_file_of_the_database_loses_at_most_the_records_in_it() {
    let arena = arena(128);
    let pristine = tempfile::tempdir().unwrap();
    let keys = sample_of(pristine.path(), &arena);
    let of_database = files(pristine.path())
        .into_iter()
        .filter(|file| file.starts_with("db-0"));
    let of_database: Vec<_> = of_database.collect();
    for part in ["CURRENT", "MANIFEST", ".log", "payload/", ".sst"] {
        let has = |file: &&PathBuf| file.to_string_lossy().contains(part);
        assert!(
            of_database.iter().any(|file| has(&file)),
            "no {part} in {of_database:?}"
        );
    }
    for file in &of_database {
        let is_payload = file
            .parent()
            .is_some_and(|folder| folder.ends_with("payload"));
        let lost = match is_payload {
            true => keys_in(pristine.path(), file),
            false => BTreeSet::new(),
        };
        let flips = (0..4).map(Damage::Flip);
        for kind in [Damage::Delete, Damage::Empty, Damage::Halve]
            .into_iter()
            .chain(flips)
        {
            let what = format!("{kind:?} of {}", file.display());
            let dir = tempfile::tempdir().unwrap();
            copy(pristine.path(), dir.path());
            damage(&dir.path().join(file), kind);
            let tier = open(dir.path()).unwrap_or_else(|error| panic!("{what}: {error:?}"));
            let (right, _) = right_or_refused(&tier, &arena);
            let missing: Vec<_> = keys
                .difference(&right)
                .filter(|key| !lost.contains(*key))
                .collect();
            assert!(missing.is_empty(), "{what}: {missing:?} are missing");
            tier.write(&chain(&arena, 1000, 3))
                .unwrap_or_else(|error| panic!("{what}: {error:?}"))
                .unwrap();
            tier.close().unwrap();
            let (again, _) = right_or_refused(&open(dir.path()).unwrap(), &arena);
            let new: BTreeSet<Key> = (0..3).map(|depth| key(1000, depth)).collect();
            assert!(
                again.is_superset(&new) && again.is_superset(&right),
                "{what}"
            );
        }
    }
}

/// The small files beside the database: what the records say again is made again, and what they
/// contradict is refused and left as it is.
#[test]
fn damage_to_the_manifest_or_the_lock_loses_nothing() {
    let arena = arena(128);
    let pristine = tempfile::tempdir().unwrap();
    let keys = sample_of(pristine.path(), &arena);
    let flips = (0..40).map(Damage::Flip);
    let kinds = [Damage::Delete, Damage::Empty, Damage::Halve];
    for kind in kinds.into_iter().chain(flips) {
        for name in ["stemkv.json", "stemkv.lock"] {
            let what = format!("{kind:?} of {name}");
            let dir = tempfile::tempdir().unwrap();
            copy(pristine.path(), dir.path());
            damage(&dir.path().join(name), kind);
            let manifest = || fs::read(dir.path().join("stemkv.json")).ok();
            let before = manifest();
            let tier = match open(dir.path()) {
                Ok(tier) => tier,
                Err(error) => {
                    // Another version or geometry, spelt right.
                    assert!(matches!(kind, Damage::Flip(_)), "{what}: {error:?}");
                    assert_eq!(error.kind(), ErrorKind::Invalid, "{what}: {error:?}");
                    assert_eq!(manifest(), before, "{what}");
                    continue;
                }
            };
            let (right, refused) = right_or_refused(&tier, &arena);
            assert!(right.is_superset(&keys) && refused == 0, "{what}");
            drop(tier);
            open(dir.path()).unwrap_or_else(|error| panic!("{what}: {error:?}"));
        }
    }
    // Made again for the geometry of its records alone.
    let mut other = geometry();
    other.block_tokens = 32;
    let dir = tempfile::tempdir().unwrap();
    copy(pristine.path(), dir.path());
    damage(&dir.path().join("stemkv.json"), Damage::Halve);
    let before = files(dir.path());
    let error = RocksDisk::open(dir.path(), &other, CAPACITY, sim_clock());
    assert_eq!(error.err().unwrap().kind(), ErrorKind::Invalid);
    assert_eq!(files(dir.path()), before);
}

/// Everything that the database keeps about itself is gone, the payload is there.
#[test]
fn a_store_comes_back_from_its_payload_files_alone() {
    let arena = arena(64);
    let dir = tempfile::tempdir().unwrap();
    let keys = sample_of(dir.path(), &arena);
    for file in files(dir.path()) {
        let is_payload = file
            .parent()
            .is_some_and(|folder| folder.ends_with("payload"));
        if file.starts_with("db-0") && !is_payload {
            fs::remove_file(dir.path().join(file)).unwrap();
        }
    }
    let tier = open(dir.path()).unwrap();
    let (right, refused) = right_or_refused(&tier, &arena);
    assert!(right.is_superset(&keys), "{:?}", keys.difference(&right));
    assert_eq!(refused, 0);
}

/// A part of a store's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Of a payload file: the bytes of one record's slabs.
    Slabs,
    RecordHeader,
    Padding,
    Directory,
    /// RocksDB's index of the payload file.
    BlockIndex,
    Footer,
    /// A whole payload file.
    Payload,
    IndexTable,
    Wal,
    Manifest,
    Current,
    Options,
    Identity,
    DatabaseLock,
    InfoLog,
    StoreManifest,
    StoreLock,
    /// A file that was being written when the process died.
    Staged,
    StagingFolder,
}

impl Part {
    /// Its file, and where in it this part is.
    fn find(self, dir: &Path) -> (PathBuf, std::ops::Range<u64>) {
        let named = |is: &dyn Fn(&str) -> bool| {
            let found = files(dir).into_iter().filter(|file| {
                let folder = file.parent().unwrap();
                folder == Path::new("db-0") && is(file.file_name().unwrap().to_str().unwrap())
            });
            let path = dir.join(found.last().expect("the sample has one"));
            let length = fs::metadata(&path).unwrap().len();
            (path, 0..length)
        };
        let of_ours = |name: &str| {
            let path = dir.join(name);
            let length = fs::metadata(&path).map_or(0, |meta| meta.len());
            (path, 0..length)
        };
        match self {
            Part::IndexTable => named(&|name| name.ends_with(".sst")),
            Part::Wal => named(&|name| name.ends_with(".log")),
            Part::Manifest => named(&|name| name.starts_with("MANIFEST-")),
            Part::Current => named(&|name| name == "CURRENT"),
            Part::Options => named(&|name| name.starts_with("OPTIONS-")),
            Part::Identity => named(&|name| name == "IDENTITY"),
            Part::DatabaseLock => named(&|name| name == "LOCK"),
            Part::InfoLog => named(&|name| name == "LOG"),
            Part::StoreManifest => of_ours("stemkv.json"),
            Part::StoreLock => of_ours("stemkv.lock"),
            Part::StagingFolder => of_ours("staging"),
            Part::Staged => {
                let (path, _) = of_ours("staging/00000000000000009999.sst");
                fs::create_dir_all(dir.join("staging")).unwrap();
                fs::write(&path, b"half of a file").unwrap();
                (path, 0..14)
            }
            _ => self.find_in_payload(dir),
        }
    }

    fn find_in_payload(self, dir: &Path) -> (PathBuf, std::ops::Range<u64>) {
        let mut records = Vec::new();
        RocksDisk::salvage(dir, &mut |path, offset, header| {
            records.push((path.to_owned(), offset, header));
        })
        .unwrap();
        let victim = key(VICTIM, 1);
        let (path, image, header) = records
            .into_iter()
            .find(|(_, _, header)| header.key == victim)
            .expect("it is in the sample");
        let bytes = fs::read(&path).unwrap();
        let length = bytes.len() as u64;
        let found = bytes.windows(8).position(|eight| eight == b"stemkvDR");
        let directory = found.expect("a directory") as u64;
        let directory_bytes = 24 + 4 * (24 + 256 + 16 * u64::from(header.layers.end));
        let slabs = image + RecordHeader::BYTES as u64;
        let range = match self {
            Part::Slabs => slabs..slabs + geometry().payload_bytes() as u64,
            Part::RecordHeader => image..slabs,
            // Behind the head of the block, up to the one of the image.
            Part::Padding => image - 1000..image - 100,
            Part::Directory => directory..directory + directory_bytes,
            // Behind restarts and checksum; five times two bytes, a key, and where the block is.
            Part::BlockIndex => {
                let index = directory + directory_bytes + 13;
                index..index + 60
            }
            Part::Footer => length - 8..length,
            _ => 0..length,
        };
        (path, range)
    }
}

/// The family whose file is damaged: four records, of which three are live.
const VICTIM: u64 = 10;

/// Families that are written before and after a damage to an open store.
const BEFORE: u64 = 2000;
const AFTER: u64 = 3000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Closed,
    /// The damage happens while the store is open; it is closed and opened again afterwards.
    Open,
}

/// How a store comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comes {
    AsItWas,
    /// In a fresh database, from its payload files.
    Rebuilt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lost {
    Nothing,
    /// One record: it is listed, and answered with `Corrupt` when it is read.
    OneRecord,
    /// The records of the damaged file: they are not listed any more.
    ItsFile,
    /// Records that were written and moved by cleaning since the index was last flushed: the log knew of
    /// them, and it is gone.
    MovedSince,
    /// Other than all that.
    Else(usize, usize),
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Flip,
    Cut,
    Empty,
    Delete,
}

fn spoil(dir: &Path, part: Part, kind: Kind, seed: u64) {
    let (path, range) = part.find(dir);
    if part == Part::StagingFolder {
        // A copy of a closed store has none.
        return drop(fs::remove_dir_all(path));
    }
    match kind {
        Kind::Cut => damage(&path, Damage::Halve),
        Kind::Empty => damage(&path, Damage::Empty),
        Kind::Delete => damage(&path, Damage::Delete),
        // Of a file that is empty nothing can rot.
        Kind::Flip if range.is_empty() => {}
        Kind::Flip => {
            let file = fs::File::options()
                .read(true)
                .write(true)
                .open(path)
                .unwrap();
            let bit = Random(seed).below((range.end - range.start) as usize * 8) as u64;
            let (at, mut byte) = (range.start + bit / 8, [0]);
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ (1 << (bit % 8))], at)
                .unwrap();
        }
    }
}

/// What a tier serves of `keys`, and how it loses the rest.
fn losses(tier: &RocksDisk, arena: &HostArena, keys: &BTreeSet<Key>) -> (usize, Lost) {
    losses_of(tier, arena, keys, &scan(tier).0)
}

/// The same of records that were listed before.
fn losses_of(
    tier: &RocksDisk,
    arena: &HostArena,
    keys: &BTreeSet<Key>,
    infos: &[RecordInfo],
) -> (usize, Lost) {
    let (mut right, mut corrupt) = (BTreeSet::new(), 0);
    for info in infos {
        match read(tier, arena, info) {
            Ok(slot) => {
                assert_right(&slot, info);
                right.insert(info.key);
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
                corrupt += 1;
            }
        }
    }
    let missing: BTreeSet<_> = keys.difference(&right).copied().collect();
    let of_file: BTreeSet<_> = (0..4).map(|depth| key(VICTIM, depth)).collect();
    let of_file: BTreeSet<_> = of_file.intersection(keys).copied().collect();
    let lost = match (missing.len(), corrupt) {
        (0, 0) => Lost::Nothing,
        (1, 1) if missing == [key(VICTIM, 1)].into() => Lost::OneRecord,
        (_, 0) if missing == of_file => Lost::ItsFile,
        (_, 0) if missing == (0..3).map(|depth| key(AFTER, depth)).collect() => Lost::MovedSince,
        (missing, corrupt) => Lost::Else(missing, corrupt),
    };
    (right.intersection(keys).count(), lost)
}

/// Every kind of change.
fn change(tier: &RocksDisk, arena: &HostArena) -> Result<()> {
    let ids = tier.write(&chain(arena, AFTER, 4))?.expect("room");
    tier.touch(&ids, 7)?;
    tier.remove(&ids[3..])?;
    tier.put_meta(&root(), b"another")?;
    tier.reclaim(CAPACITY).map(drop)
}

/// One damage to one store. Returns how it came back, what was lost, and records served before and
/// after.
fn damaged(
    pristine: &Path,
    keys: &BTreeSet<Key>,
    part: Part,
    kind: Kind,
    when: When,
    seed: u64,
) -> (Comes, Lost, usize, usize) {
    let arena = arena(64);
    let dir = tempfile::tempdir().unwrap();
    copy(pristine, dir.path());
    let mut known = keys.clone();
    if when == When::Open {
        // What cleaning moves is in one more place to be damaged.
        let tier = open(dir.path()).unwrap().without_holes();
        tier.write(&chain(&arena, BEFORE, 3)).unwrap().unwrap();
        known.extend((0..3).map(|depth| key(BEFORE, depth)));
        let (infos, _) = scan(&tier);
        spoil(dir.path(), part, kind, seed);
        // Whatever it was: what is served is right, and all but the damaged file is.
        let (served, lost) = losses_of(&tier, &arena, &known, &infos);
        assert!(served + 4 >= known.len(), "{lost:?}");
        let changed = change(&tier, &arena);
        if changed.is_ok() {
            known.extend((0..3).map(|depth| key(AFTER, depth)));
        }
        match (part, changed) {
            // RocksDB takes no more with a damaged index; the next opening mends that.
            (Part::IndexTable, Err(error)) => {
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
            }
            (Part::IndexTable, Ok(())) => {}
            (_, changed) => {
                changed.unwrap();
                let (served, lost) = losses(&tier, &arena, &known);
                assert!(served + 4 >= known.len(), "{lost:?}");
            }
        }
        let closed = tier.close();
        assert!(closed.is_ok() || part == Part::IndexTable, "{closed:?}");
    } else {
        spoil(dir.path(), part, kind, seed);
    }
    let tier = open(dir.path()).unwrap();
    let (served, lost) = losses(&tier, &arena, &known);
    let comes = match dir.path().join("db-1").exists() {
        true => Comes::Rebuilt,
        false => Comes::AsItWas,
    };
    // It takes more, cleans, and comes back again as it is.
    tier.write(&chain(&arena, 1000, 3)).unwrap().unwrap();
    tier.reclaim(CAPACITY).unwrap();
    tier.close().unwrap();
    let tier = open(dir.path()).unwrap();
    known.extend((0..3).map(|depth| key(1000, depth)));
    let (again, _) = losses(&tier, &arena, &known);
    assert_eq!(again, served + 3);
    (comes, lost, known.len() - 3, served)
}

#[test]
fn each_damage_has_the_outcome_that_the_documentation_says() {
    use Comes::{AsItWas, Rebuilt};
    use Kind::{Cut, Delete, Empty, Flip};
    use Lost::{ItsFile, MovedSince, Nothing, OneRecord};
    use Part as P;
    use When::{Closed, Open};
    let rows: &[(Part, &[Kind], When, Comes, Lost)] = &[
        (P::Slabs, &[Flip], Closed, AsItWas, OneRecord),
        (P::Slabs, &[Flip], Open, AsItWas, OneRecord),
        (P::RecordHeader, &[Flip], Closed, AsItWas, OneRecord),
        (P::RecordHeader, &[Flip], Open, AsItWas, OneRecord),
        (P::Padding, &[Flip], Closed, AsItWas, Nothing),
        (P::Padding, &[Flip], Open, AsItWas, Nothing),
        (P::Directory, &[Flip], Closed, AsItWas, Nothing),
        (P::Directory, &[Flip], Open, AsItWas, Nothing),
        (P::BlockIndex, &[Flip], Closed, Rebuilt, ItsFile),
        (P::BlockIndex, &[Flip], Open, Rebuilt, ItsFile),
        (P::Footer, &[Flip], Closed, Rebuilt, ItsFile),
        (P::Footer, &[Flip], Open, Rebuilt, ItsFile),
        (P::Payload, &[Cut, Empty, Delete], Closed, Rebuilt, ItsFile),
        (P::Payload, &[Cut, Empty, Delete], Open, Rebuilt, ItsFile),
        (
            P::IndexTable,
            &[Flip, Cut, Empty, Delete],
            Closed,
            Rebuilt,
            Nothing,
        ),
        (
            P::IndexTable,
            &[Flip, Cut, Empty, Delete],
            Open,
            Rebuilt,
            Nothing,
        ),
        (
            P::Wal,
            &[Flip, Cut, Empty, Delete],
            Closed,
            AsItWas,
            Nothing,
        ),
        (
            P::Wal,
            &[Flip, Cut, Empty, Delete],
            Open,
            AsItWas,
            MovedSince,
        ),
        (
            P::Manifest,
            &[Flip, Cut, Empty, Delete],
            Closed,
            Rebuilt,
            Nothing,
        ),
        (P::Manifest, &[Flip, Cut, Empty], Open, Rebuilt, Nothing),
        // RocksDB writes it again when it is closed.
        (P::Manifest, &[Delete], Open, AsItWas, Nothing),
        (
            P::Current,
            &[Flip, Cut, Empty, Delete],
            Closed,
            Rebuilt,
            Nothing,
        ),
        (
            P::Current,
            &[Flip, Cut, Empty, Delete],
            Open,
            Rebuilt,
            Nothing,
        ),
        (
            P::Options,
            &[Flip, Cut, Empty, Delete],
            Closed,
            AsItWas,
            Nothing,
        ),
        (
            P::Options,
            &[Flip, Cut, Empty, Delete],
            Open,
            AsItWas,
            Nothing,
        ),
        (
            P::Identity,
            &[Flip, Cut, Empty, Delete],
            Closed,
            AsItWas,
            Nothing,
        ),
        (
            P::Identity,
            &[Flip, Cut, Empty, Delete],
            Open,
            AsItWas,
            Nothing,
        ),
        (P::DatabaseLock, &[Delete], Closed, AsItWas, Nothing),
        (P::DatabaseLock, &[Delete], Open, AsItWas, Nothing),
        (
            P::InfoLog,
            &[Flip, Cut, Empty, Delete],
            Closed,
            AsItWas,
            Nothing,
        ),
        (
            P::InfoLog,
            &[Flip, Cut, Empty, Delete],
            Open,
            AsItWas,
            Nothing,
        ),
        (
            P::StoreManifest,
            &[Cut, Empty, Delete],
            Closed,
            AsItWas,
            Nothing,
        ),
        (
            P::StoreManifest,
            &[Cut, Empty, Delete],
            Open,
            AsItWas,
            Nothing,
        ),
        (
            P::StoreLock,
            &[Flip, Cut, Empty, Delete],
            Closed,
            AsItWas,
            Nothing,
        ),
        (
            P::StoreLock,
            &[Flip, Cut, Empty, Delete],
            Open,
            AsItWas,
            Nothing,
        ),
        (
            P::Staged,
            &[Flip, Cut, Empty, Delete],
            Closed,
            AsItWas,
            Nothing,
        ),
        (
            P::Staged,
            &[Flip, Cut, Empty, Delete],
            Open,
            AsItWas,
            Nothing,
        ),
        (P::StagingFolder, &[Delete], Closed, AsItWas, Nothing),
        (P::StagingFolder, &[Delete], Open, AsItWas, Nothing),
    ];
    let pristine = tempfile::tempdir().unwrap();
    let keys = sample_of(pristine.path(), &arena(128));
    let mut wrong = Vec::new();
    for &(part, kinds, when, comes, lost) in rows {
        let (mut least, mut before) = (usize::MAX, 0);
        for kind in kinds {
            let seeds = match kind {
                Flip => 0..6,
                _ => 0..1,
            };
            for seed in seeds {
                let what = format!("{kind:?} of {part:?} while {when:?}, seed {seed}");
                let outcome = std::panic::catch_unwind(|| {
                    damaged(pristine.path(), &keys, part, *kind, when, seed)
                });
                match outcome {
                    Ok((came, lost_now, all, served)) => {
                        (least, before) = (least.min(served), all);
                        if (came, lost_now) != (comes, lost) {
                            wrong.push(format!("{what}: {came:?} {lost_now:?}, {served} of {all}; expected {comes:?} {lost:?}"));
                        }
                    }
                    Err(_) => wrong.push(format!("{what}: panicked")),
                }
            }
        }
        println!(
            "{part:?} {kinds:?} {when:?}: {comes:?}, {lost:?} lost: {least} of {before} served"
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Writes the first record header that a file of the store has for another geometry.
fn make_of_another_kind(dir: &Path, file: &Path) {
    let mut other = None;
    RocksDisk::salvage(dir, &mut |path, offset, header| {
        if path == dir.join(file) && other.is_none() {
            other = Some((offset, header));
        }
    })
    .unwrap();
    let (offset, mut header) = other.unwrap();
    header.geometry ^= 1;
    let file = fs::File::options().write(true).open(dir.join(file));
    file.unwrap()
        .write_all_at(&header.encode()[..], offset)
        .unwrap();
}

/// A manifest may be readable and wrong: then the records say so, and nothing is touched. One record that
/// contradicts it is not enough.
#[test]
fn a_manifest_that_the_records_contradict_is_refused() {
    let arena = arena(128);
    let dir = tempfile::tempdir().unwrap();
    let keys = sample_of(dir.path(), &arena);
    let manifest = dir.path().join("stemkv.json");
    let right = fs::read_to_string(&manifest).unwrap();
    let wrong = right.replace("\"layers\": 4", "\"layers\": 5");
    assert_ne!(right, wrong);
    fs::write(&manifest, &wrong).unwrap();
    let before = files(dir.path());
    let mut other = geometry();
    other.layers = 5;
    let error = RocksDisk::open(dir.path(), &other, CAPACITY, sim_clock());
    let error = error.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let text = error.to_string();
    assert!(text.contains("layers: 0..5 here, 0..4 there"), "{text}");
    assert_eq!(files(dir.path()), before);
    assert_eq!(fs::read_to_string(&manifest).unwrap(), wrong);

    fs::write(&manifest, &right).unwrap();
    let mut payload = files(dir.path()).into_iter();
    let first = payload.find(|file| file.to_string_lossy().contains("payload/"));
    make_of_another_kind(dir.path(), &first.unwrap());
    let tier = open(dir.path()).unwrap();
    let (right, refused) = right_or_refused(&tier, &arena);
    assert_eq!((right.len(), refused), (keys.len() - 1, 1));
}

/// Names like those of databases that no store gave.
#[test]
fn what_is_no_database_of_the_store_is_left_alone() {
    let arena = arena(128);
    let pristine = tempfile::tempdir().unwrap();
    let keys = sample_of(pristine.path(), &arena);
    for name in ["db-7", "db-007", "db-+7", "db-4294967295", "db-4294967296"] {
        for is_folder in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            copy(pristine.path(), dir.path());
            let odd = dir.path().join(name);
            let notes = match is_folder {
                false => odd.clone(),
                true => odd.join("notes"),
            };
            fs::create_dir_all(notes.parent().unwrap()).unwrap();
            fs::write(&notes, "mine").unwrap();
            // As it is, and once it has to be rebuilt.
            for rebuilt in [false, true] {
                if rebuilt {
                    let database = fs::read_to_string(dir.path().join("stemkv.json")).unwrap();
                    assert!(database.contains("\"db-0\""), "it was rebuilt for {name}");
                    fs::remove_file(dir.path().join("db-0/CURRENT")).unwrap();
                }
                let tier = open(dir.path()).unwrap_or_else(|error| panic!("{name}: {error:?}"));
                let (right, refused) = right_or_refused(&tier, &arena);
                assert!(right.is_superset(&keys) && refused == 0, "{name}");
                assert_eq!(fs::read_to_string(&notes).unwrap(), "mine");
                tier.close().unwrap();
            }
            assert!(!dir.path().join("db-0").exists(), "it was not rebuilt");
        }
    }
    // One that is a database, and behind which there is no number left.
    let dir = tempfile::tempdir().unwrap();
    copy(pristine.path(), dir.path());
    copy(
        &pristine.path().join("db-0"),
        &dir.path().join("db-4294967295"),
    );
    let before = files(dir.path());
    let error = open(dir.path()).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("db-4294967295"), "{error}");
    assert_eq!(files(dir.path()), before);
    fs::remove_dir_all(dir.path().join("db-4294967295")).unwrap();
    let (right, refused) = right_or_refused(&open(dir.path()).unwrap(), &arena);
    assert!(right.is_superset(&keys) && refused == 0);
}
