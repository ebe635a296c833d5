//! The host tier: one shared mapping that a GPU can pin, and the slots cut out of it.
//!
//! A slot holds one chunk *image*: the 4 KiB record header page, then the payload. It starts on
//! 4 KiB and is rounded up to it. Its life:
//!
//! ```text
//! allocate ─→ Filling ──seal──→ Slot (shared, read-only) ──last clone dropped──→ free
//!                └────────────────dropped────────────────────────────────────────→ free
//! ```
//!
//! Free + filling + published bytes are the capacity, at every moment ([`HostArena::usage`]).

mod arena;
pub(crate) mod coded;
mod extent;
mod mapping;
mod slot;
mod table;
#[cfg(test)]
mod tests;

pub use arena::{ArenaUsage, HostArena, SlotId};
pub use slot::{Filling, FillingRef, Slot};
