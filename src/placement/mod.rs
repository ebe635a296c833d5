//! Placement: which chunk goes where, which one goes first, and how far a load pays.

mod codec;
mod cost;
mod eviction;
mod promotion;

pub use codec::{CodecCosts, Rates, encodes};
pub use cost::{Choice, Costs, Speed, Verdict, what_pays};
pub use eviction::{EvictionPolicy, Recency, RunId, RunUse};
pub use promotion::is_worth_promoting;
