//! stemkv: an embedded prefix-cache store for reusable LLM KV cache.

#![forbid(unsafe_code)]

pub mod hash;
pub mod index;
pub mod namespace;
pub mod placement;

pub use hash::{ExtraKey, FOREIGN_KEY_BYTES_MAX, HashPath, Prompt};
pub use namespace::{
    HASHING_VERSION, LAYOUT_VERSION, Namespace, NamespaceDescription, Salt, Shard,
};
