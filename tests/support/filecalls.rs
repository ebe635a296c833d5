//! A child process whose file calls are recorded, or made to fail: `filecalls.c`, compiled by the
//! system's C compiler and preloaded.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test binary uses its own part of the support"
)]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

const MARKS: &str = "STEMKV_FILECALLS_MARKS";
const ROOT: &str = "STEMKV_FILECALLS_ROOT";

/// One call that changed something below the recorded folder, in the order of the calls.
#[derive(Clone, Debug)]
pub enum Call {
    Create {
        path: PathBuf,
        inode: u64,
    },
    Write {
        inode: u64,
        offset: u64,
        bytes: Vec<u8>,
        /// Past the page cache.
        direct: bool,
    },
    Truncate {
        inode: u64,
        length: u64,
    },
    /// Of a file, or of a folder.
    Sync {
        path: PathBuf,
        inode: u64,
    },
    SyncAll,
    Link {
        from: PathBuf,
        to: PathBuf,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    Unlink {
        path: PathBuf,
    },
    MakeFolder {
        path: PathBuf,
    },
    RemoveFolder {
        path: PathBuf,
    },
    /// What the child said with [`mark`].
    Mark(String),
}

/// The preloaded library, compiled once for a test binary.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("filecalls-{}.so", env!("CARGO_CRATE_NAME")));
        let fresh = target.with_extension(std::process::id().to_string());
        let mut compiler = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-x", "c", "-", "-o"])
            .arg(&fresh)
            .args(["-ldl", "-lpthread"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("a C compiler, which RocksDB's build needs as well");
        let mut source = compiler.stdin.take().unwrap();
        source.write_all(include_bytes!("filecalls.c")).unwrap();
        drop(source);
        assert!(compiler.wait().unwrap().success(), "it compiles");
        fs::rename(fresh, &target).unwrap();
        target
    })
}

/// This test binary again, running the test `name` alone, with its file calls below `root` recorded
/// into `log` (or only open to [`fail`]) and its marks going to `marks`.
pub fn child(name: &str, root: &Path, log: Option<&Path>, marks: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("LD_PRELOAD", library())
        .env(ROOT, root)
        .env(MARKS, marks);
    if let Some(log) = log {
        command.env("STEMKV_FILECALLS_LOG", log);
    }
    fs::write(marks, "").unwrap();
    command
}

/// Runs the test `name` of this file in a process whose calls below a folder in `scratch` can fail, which it
/// is told by [`store_of_child`]. Returns what it printed: look there whether it did anything.
pub fn run_child(name: &str, scratch: &Path) -> String {
    let (marks, root) = (scratch.join("marks"), scratch.join("root"));
    fs::create_dir(&root).unwrap();
    let output = child(name, &root, None, &marks).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{error}");
    text
}

/// In a child: where its store goes. `None` in any other process.
pub fn store_of_child() -> Option<PathBuf> {
    std::env::var_os(MARKS)?;
    let root = std::env::var_os(ROOT).expect("set by the parent");
    Some(Path::new(&root).join("store"))
}

fn say(text: &str) {
    let path = std::env::var_os(MARKS).expect("set by the parent");
    let mut file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// In a child: puts a mark into the log, behind all calls that have returned.
pub fn mark(text: &str) {
    say(text);
}

/// Calls that fail with this hang until [`heal`], and then do what they should.
pub const HANGS: i32 = 0;

/// Which calls fail.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// `open`, `list` (the opening of a folder to list it, which `open` includes), `read`, `write`, `allocate`, `sync`, `rename`, `link`, `unlink`, `mkdir`, `truncate`,
    /// `any` of them, `change` for all that a read-only file system refuses, or `thread`.
    pub class: &'static str,
    /// Part of the path.
    pub path: &'static str,
    /// The first that fails, from 1.
    pub nth: usize,
    /// How many; `None` for all from there on.
    pub times: Option<usize>,
    /// What they fail with; [`HANGS`] for none.
    pub errno: i32,
}

/// In a child: makes calls fail until [`heal`].
pub fn fail(fault: Fault) {
    let times = fault.times.map_or(-1, |times| times as i64);
    say(&format!(
        "!fault {} {} {} {times} {}",
        fault.class, fault.path, fault.nth, fault.errno
    ));
}

/// In a child: ends the faults. Returns how many calls matched, and how many of them failed.
pub fn heal() -> (usize, usize) {
    say("!clear");
    counts()
}

/// In a child: how many calls have failed so far, or hang.
pub fn failed() -> usize {
    say("!count");
    counts().1
}

fn counts() -> (usize, usize) {
    let path = std::env::var_os(MARKS).expect("set by the parent");
    let text = fs::read_to_string(path).unwrap();
    let mut numbers = text.split_whitespace().map(|n| n.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

const ENTRY_BYTES: usize = 32;

/// Reads a log. The order of the kinds is that of `enum kind` in `filecalls.c`.
pub fn calls(log: &Path) -> Vec<Call> {
    let bytes = fs::read(log).unwrap();
    let mut rest = &bytes[..];
    let mut calls = Vec::new();
    while let Some((entry, behind)) = rest.split_at_checked(ENTRY_BYTES) {
        let word = |at: usize| u32::from_le_bytes(*entry[at..].first_chunk().unwrap());
        let long = |at: usize| u64::from_le_bytes(*entry[at..].first_chunk().unwrap());
        let (path, behind) = behind.split_at(word(4) as usize);
        let (data, behind) = behind.split_at(word(8) as usize);
        rest = behind;
        let path = PathBuf::from(std::str::from_utf8(path).unwrap());
        let text = || std::str::from_utf8(data).unwrap();
        let (inode, offset) = (long(16), long(24));
        calls.push(match word(0) {
            0 => Call::Create { path, inode },
            1 => Call::Write {
                inode,
                offset,
                bytes: data.to_vec(),
                direct: word(12) != 0,
            },
            2 => Call::Truncate {
                inode,
                length: offset,
            },
            3 => Call::Sync { path, inode },
            4 => Call::SyncAll,
            5 => Call::Link {
                from: path,
                to: text().into(),
            },
            6 => Call::Rename {
                from: path,
                to: text().into(),
            },
            7 => Call::Unlink { path },
            8 => Call::MakeFolder { path },
            9 => Call::RemoveFolder { path },
            10 => Call::Mark(text().to_owned()),
            _ => panic!("the child changed files in a way that is not recorded: {path:?}"),
        });
    }
    assert!(rest.is_empty(), "the log ends within an entry");
    calls
}
