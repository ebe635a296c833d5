//! The `stemkv-serve` binary.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    stemkv_serve::cli::run()
}
