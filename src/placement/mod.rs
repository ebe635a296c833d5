//! Placement: which chunk goes where, which one goes first, and how far a load pays.

mod cost;
mod eviction;
mod promotion;

pub use cost::{Choice, Costs, Speed, Verdict, what_pays};
pub use eviction::{EvictionPolicy, Recency, RunId, RunUse};
pub use promotion::is_worth_promoting;
