//! stemkv-serve: a small OpenAI-compatible server on the CPU that embeds stemkv.

#![forbid(unsafe_code)]

pub mod model;
