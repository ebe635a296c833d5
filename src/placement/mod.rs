//! Placement: which chunk goes where, and which one goes first.

mod eviction;

pub use eviction::{EvictionPolicy, Recency, RunId, RunUse};
