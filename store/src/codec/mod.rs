//! Lossless codecs for slabs, by [`CodecId`](crate::CodecId).
//!
//! Every slab is encoded on its own, so a layer is decoded without the others, and one that would
//! not become smaller stays raw. The bytes are specified in `docs/format.md`.

pub mod exp;
pub mod planes;
