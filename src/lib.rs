//! stemkv: an embedded prefix-cache store for reusable LLM KV cache.

pub mod index;
