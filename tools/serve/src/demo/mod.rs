//! `stemkv-serve demo`.

pub mod client;
