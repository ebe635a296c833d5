//! A process whose calls can fail, and the store in it.

#![allow(dead_code, reason = "each test binary uses a part of this")]

#[path = "../../../tests/support/filecalls.rs"]
mod filecalls;

use std::path::Path;

use stemkv_store::disk::RocksDisk;
use stemkv_store::{ErrorKind, Result};

#[allow(unused_imports, reason = "each test binary uses a part of this")]
pub use filecalls::{Fault, HANGS, fail, failed, heal, run_child, store_of_child};

use crate::support::{geometry, sim_clock};

pub const CAPACITY: u64 = 16 << 20;

pub fn open(dir: &Path) -> Result<RocksDisk> {
    RocksDisk::open(dir, &geometry(), CAPACITY, sim_clock())
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
