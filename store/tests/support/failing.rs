//! A process whose calls can fail, and the store in it.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test binary uses a part of this"
)]

#[path = "../../../tests/support/filecalls.rs"]
mod filecalls;

use std::path::{Path, PathBuf};
use std::{env, fs};

use stemkv_store::disk::RocksDisk;
use stemkv_store::{ErrorKind, Result};

#[allow(unused_imports, reason = "each test binary uses a part of this")]
pub use filecalls::{Fault, HANGS, fail, failed, heal};

use crate::support::{geometry, sim_clock};

const CHILD_DIR: &str = "STEMKV_FAULTS_DIR";
pub const CAPACITY: u64 = 16 << 20;

pub fn open(dir: &Path) -> Result<RocksDisk> {
    RocksDisk::open(dir, &geometry(), CAPACITY, sim_clock())
}

/// Runs the test `name` of this file in a process whose calls below `scratch` can fail. Returns what it
/// printed.
pub fn run_child(name: &str, scratch: &Path) -> String {
    let (marks, root) = (scratch.join("marks"), scratch.join("root"));
    fs::create_dir(&root).unwrap();
    let output = filecalls::child(name, &root, None, &marks)
        .env(CHILD_DIR, &root)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{error}");
    text
}

/// In a child: its store's folder. `None` in any other process.
pub fn store_of_child() -> Option<PathBuf> {
    let dir = env::var_os(CHILD_DIR).filter(|_| filecalls::is_child())?;
    Some(Path::new(&dir).join("store"))
}

/// A fault that does not end by itself.
pub fn lasting(class: &'static str, path: &'static str, errno: i32) -> Fault {
    Fault {
        class,
        path,
        nth: 1,
        times: None,
        errno,
    }
}

pub fn assert_unavailable<T>(answer: Result<T>) {
    let error = answer.err().expect("it cannot be done");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
}
