//! What a power cut leaves of a folder, from the calls that changed it.
//!
//! The model. A file's bytes and the names in folders are kept apart, as file systems do:
//!
//! - `fsync` and `fdatasync` of a file make its bytes and length durable as they are then, and the
//!   names that it was given; of a folder, all changes of names in it so far. Nothing else makes
//!   anything durable: neither does the sync of a file keep the names of the folders above it, nor
//!   that of a folder the bytes of what is in it, nor `sync_file_range` anything at all.
//! - A cut leaves what is durable, and of all else any part:
//!   - of a write each sector of 512 bytes by itself, in no order; a sector that did not arrive keeps
//!     what was durable there, or is zero where the file was shorter;
//!   - a change of length (by writing behind the end, or by truncating) or not;
//!   - each change of names by itself, in no order but for changes of the same name. A rename is one
//!     change: never both names, never none.
//!
//! This takes more away than ext4 and xfs do: both keep changes of names in order, and the sync of
//! any file takes all earlier ones along. POSIX promises less of a file's names; RocksDB counts on
//! that much when it ingests into a folder of a column family's own, which it does not sync.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::support::filecalls::Call;
use crate::support::mix;

const SECTOR_BYTES: usize = 512;

/// A file or folder, by number; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Node {
    File(usize),
    Folder(usize),
}

#[derive(Clone, Debug)]
enum Change {
    Write(u64, Vec<u8>),
    Truncate(u64),
}

#[derive(Default)]
struct File {
    durable: Vec<u8>,
    unsynced: Vec<Change>,
}

type Name = (usize, OsString);
type Names = BTreeMap<Name, Node>;

/// Names that change together. `None` removes one.
struct Renaming(Vec<(Name, Option<Node>)>);

impl Renaming {
    fn apply(&self, names: &mut Names) {
        for (name, node) in &self.0 {
            match node {
                Some(node) => drop(names.insert(name.clone(), *node)),
                None => drop(names.remove(name)),
            }
        }
    }

    fn gives(&self, node: Node) -> bool {
        self.0.iter().any(|(_, given)| *given == Some(node))
    }

    fn is_in(&self, folder: usize) -> bool {
        self.0.iter().any(|((parent, _), _)| *parent == folder)
    }
}

/// The folder as the process sees it, and as the medium has it.
pub struct Medium {
    root: PathBuf,
    files: Vec<File>,
    folders: usize,
    /// The kernel's numbers come again; the latest meaning counts.
    inodes: HashMap<u64, usize>,
    now: Names,
    durable: Names,
    unsynced: Vec<Renaming>,
}

/// What a power cut left: paths below the root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    folders: Vec<PathBuf>,
    /// Each file's paths, as hard links of one.
    files: Vec<(Vec<PathBuf>, Vec<u8>)>,
}

/// How much of what was not synced has arrived all the same: a seed, or nothing, or all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Luck {
    None,
    All,
    Seed(u64),
}

/// How likely one part of something is to have arrived, of 256.
struct Odds {
    seed: u64,
    of_256: u64,
}

impl Odds {
    /// For a file, or for all names: some are unlucky, some lucky, some as may be.
    fn of(luck: Luck, what: u64) -> Odds {
        let seed = match luck {
            Luck::Seed(seed) => mix(seed ^ mix(what)),
            _ => what,
        };
        let of_256 = match luck {
            Luck::None => 0,
            Luck::All => 256,
            Luck::Seed(_) => [0, 16, 128, 240, 256][(seed >> 32) as usize % 5],
        };
        Odds { seed, of_256 }
    }

    fn next(&mut self) -> bool {
        self.seed = mix(self.seed);
        self.seed % 256 < self.of_256
    }
}

impl Medium {
    /// An empty folder, which is durable itself.
    pub fn new(root: &Path) -> Medium {
        Medium {
            root: root.to_owned(),
            files: Vec::new(),
            folders: 1,
            inodes: HashMap::new(),
            now: Names::new(),
            durable: Names::new(),
            unsynced: Vec::new(),
        }
    }

    /// Calls that a sync must still cover.
    pub fn unsynced(&self) -> usize {
        let of_files: usize = self.files.iter().map(|file| file.unsynced.len()).sum();
        of_files + self.unsynced.len()
    }

    /// Does what a call did.
    pub fn apply(&mut self, call: &Call) {
        match call {
            Call::Create { path, inode } => {
                let file = self.files.len();
                self.files.push(File::default());
                self.inodes.insert(*inode, file);
                let name = self.name(path);
                self.rename(vec![(name, Some(Node::File(file)))]);
            }
            Call::Write {
                inode,
                offset,
                bytes,
                ..
            } => self.change(*inode, Change::Write(*offset, bytes.clone())),
            Call::Truncate { inode, length } => self.change(*inode, Change::Truncate(*length)),
            Call::Sync { path, inode } => match self.inodes.get(inode) {
                // The root, and a folder, has no number among the files.
                Some(&file) if self.folder(path).is_none() => {
                    self.files[file].sync();
                    self.sync_names(|renaming| renaming.gives(Node::File(file)));
                }
                _ => {
                    let folder = self.folder(path).expect("a file or folder of ours");
                    self.sync_names(|renaming| renaming.is_in(folder));
                }
            },
            Call::SyncAll => {
                self.files.iter_mut().for_each(File::sync);
                self.sync_names(|_| true);
            }
            Call::Link { from, to } => {
                let node = self.node(from).expect("a link is to something");
                let to = self.name(to);
                self.rename(vec![(to, Some(node))]);
            }
            Call::Rename { from, to } => {
                let node = self.node(from).expect("something is renamed");
                let (from, to) = (self.name(from), self.name(to));
                self.rename(vec![(from, None), (to, Some(node))]);
            }
            Call::Unlink { path } | Call::RemoveFolder { path } => {
                let name = self.name(path);
                self.rename(vec![(name, None)]);
            }
            Call::MakeFolder { path } => {
                let folder = self.folders;
                self.folders += 1;
                let name = self.name(path);
                self.rename(vec![(name, Some(Node::Folder(folder)))]);
            }
            Call::Mark(_) => {}
        }
    }

    fn change(&mut self, inode: u64, change: Change) {
        let file = self.inodes.get(&inode).expect("a file of ours");
        self.files[*file].unsynced.push(change);
    }

    fn rename(&mut self, names: Vec<(Name, Option<Node>)>) {
        let renaming = Renaming(names);
        renaming.apply(&mut self.now);
        self.unsynced.push(renaming);
    }

    fn sync_names(&mut self, is_synced: impl Fn(&Renaming) -> bool) {
        // What happened to the same names before goes along.
        let mut names: HashSet<Name> = HashSet::new();
        let mut is_along = |renaming: &Renaming| {
            let along =
                is_synced(renaming) || renaming.0.iter().any(|(name, _)| names.contains(name));
            if along {
                names.extend(renaming.0.iter().map(|(name, _)| name.clone()));
            }
            along
        };
        let mut along: Vec<bool> = self.unsynced.iter().rev().map(&mut is_along).collect();
        let unsynced = std::mem::take(&mut self.unsynced).into_iter();
        let (synced, rest): (Vec<_>, _) = unsynced.partition(|_| along.pop() == Some(true));
        self.unsynced = rest;
        for renaming in synced {
            renaming.apply(&mut self.durable);
        }
    }

    fn node(&self, path: &Path) -> Option<Node> {
        let path = path.strip_prefix(&self.root).expect("below the root");
        path.iter()
            .try_fold(Node::Folder(0), |node, name| match node {
                Node::Folder(folder) => self.now.get(&(folder, name.to_owned())).copied(),
                Node::File(_) => None,
            })
    }

    fn folder(&self, path: &Path) -> Option<usize> {
        match self.node(path)? {
            Node::Folder(folder) => Some(folder),
            Node::File(_) => None,
        }
    }

    fn name(&self, path: &Path) -> Name {
        let parent = path.parent().and_then(|parent| self.folder(parent));
        let name = path.file_name().expect("a path below the root");
        (parent.expect("a known folder"), name.to_owned())
    }

    /// What a power cut now leaves.
    pub fn cut(&self, luck: Luck) -> Image {
        let mut names = self.durable.clone();
        let mut odds = Odds::of(luck, u64::MAX);
        for renaming in &self.unsynced {
            if odds.next() {
                renaming.apply(&mut names);
            }
        }
        let mut image = Image::default();
        let mut paths: HashMap<usize, Vec<PathBuf>> = HashMap::new();
        let mut open = vec![(0, PathBuf::new())];
        while let Some((folder, path)) = open.pop() {
            for ((_, name), node) in names
                .range((folder, OsString::new())..)
                .take_while(|((parent, _), _)| *parent == folder)
            {
                let path = path.join(name);
                match node {
                    Node::Folder(folder) => {
                        image.folders.push(path.clone());
                        open.push((*folder, path));
                    }
                    Node::File(file) => paths.entry(*file).or_default().push(path),
                }
            }
        }
        image.files = paths
            .into_iter()
            .map(|(file, paths)| (paths, self.files[file].cut(luck, file as u64)))
            .collect();
        image
    }
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Change::Write(offset, new) => {
                let (from, to) = (*offset as usize, *offset as usize + new.len());
                if bytes.len() < to {
                    bytes.resize(to, 0);
                }
                bytes[from..to].copy_from_slice(new);
            }
            Change::Truncate(length) => bytes.resize(*length as usize, 0),
        }
    }
}

impl File {
    fn sync(&mut self) {
        for change in std::mem::take(&mut self.unsynced) {
            change.apply(&mut self.durable);
        }
    }

    fn cut(&self, luck: Luck, number: u64) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let mut odds = Odds::of(luck, number);
        for change in &self.unsynced {
            match change {
                Change::Truncate(_) if odds.next() => change.apply(&mut bytes),
                Change::Truncate(_) => {}
                Change::Write(offset, new) => {
                    let mut at = *offset as usize;
                    let end = at + new.len();
                    while at < end {
                        let next = (at + 1).next_multiple_of(SECTOR_BYTES).min(end);
                        if odds.next() {
                            let part = &new[at - *offset as usize..next - *offset as usize];
                            Change::Write(at as u64, part.to_vec()).apply(&mut bytes);
                        }
                        at = next;
                    }
                    // The length may have arrived and the bytes not.
                    if bytes.len() < end && odds.next() {
                        bytes.resize(end, 0);
                    }
                }
            }
        }
        bytes
    }
}

impl Image {
    /// Puts it into an empty folder.
    pub fn write(&self, dir: &Path) {
        for folder in &self.folders {
            fs::create_dir_all(dir.join(folder)).unwrap();
        }
        for (paths, bytes) in &self.files {
            let (first, others) = paths.split_first().expect("a file without a name is gone");
            fs::write(dir.join(first), bytes).unwrap();
            for other in others {
                fs::hard_link(dir.join(first), dir.join(other)).unwrap();
            }
        }
    }

    /// Paths and bytes, for a test of the model.
    pub fn contents(&self) -> BTreeMap<&Path, &[u8]> {
        let files = self.files.iter();
        files
            .flat_map(|(paths, bytes)| paths.iter().map(move |path| (path.as_path(), &bytes[..])))
            .collect()
    }
}
