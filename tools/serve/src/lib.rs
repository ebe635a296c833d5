//! stemkv-serve: a small OpenAI-compatible server on the CPU that embeds stemkv.
//!
//! | question | where |
//! |---|---|
//! | how is a token computed, over paged KV? | [`model`] |
//! | who computes when, and where does stemkv come in? | [`scheduler`] |
//! | what do clients see? | [`http`] |
//! | how does it start? | [`cli`], [`server`] |
//! | what does reuse gain? | [`demo`] |

#![forbid(unsafe_code)]

pub mod cli;
pub mod demo;
pub mod http;
pub mod model;
pub mod scheduler;
pub mod server;
