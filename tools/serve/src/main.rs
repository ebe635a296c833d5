//! The `stemkv-serve` binary.

#![forbid(unsafe_code)]

fn main() {}
