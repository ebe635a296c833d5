//! Lossless codecs for slabs, by [`CodecId`].
//!
//! Every slab is encoded on its own, so a layer is decoded without the others, and one that would
//! not become smaller stays raw. The bytes are specified in `docs/format.md`.

pub mod exp;
#[cfg(test)]
mod guarded;
pub mod planes;

use exp::{Decoder, ExpShape};
use planes::PlanesShape;

use crate::{CodecId, Dtype, Error, KvGeometry, Result};

impl CodecId {
    /// The lossless codec that suits values of `dtype`.
    pub const fn lossless(dtype: Dtype) -> CodecId {
        match dtype {
            Dtype::Bf16 => CodecId::Exp,
            _ => CodecId::Planes,
        }
    }
}

/// Every codec, for the slabs of one geometry.
#[derive(Debug)]
pub(crate) struct SlabCodecs {
    exp: Option<ExpShape>,
    planes: PlanesShape,
}

impl SlabCodecs {
    pub(crate) fn new(geometry: &KvGeometry) -> Self {
        SlabCodecs {
            exp: ExpShape::new(geometry),
            planes: PlanesShape::new(geometry),
        }
    }

    /// Encodes a raw slab into the front of `out` and returns how many bytes that took; `None` where
    /// it would not become smaller or does not fit.
    pub(crate) fn encode(&self, codec: CodecId, raw: &[u8], out: &mut [u8]) -> Option<usize> {
        match codec {
            CodecId::Raw => None,
            CodecId::Exp => exp::encode(self.exp.as_ref()?, raw, out),
            CodecId::Planes => planes::encode(&self.planes, raw, out),
        }
    }

    /// Decodes a slab of a record of `codec`, as hostile input.
    ///
    /// # Errors
    /// `Corrupt` where the bytes are not such a slab.
    pub(crate) fn decode(&self, codec: CodecId, stored: &[u8], out: &mut [u8]) -> Result<()> {
        if stored.len() == out.len() {
            out.copy_from_slice(stored);
            return Ok(());
        }
        match (codec, &self.exp) {
            (CodecId::Exp, Some(shape)) => Decoder::new(shape, stored)?.all(out),
            (CodecId::Planes, _) => planes::decode(&self.planes, stored, out),
            _ => Err(Error::corrupt(
                "a slab is encoded in a way that its dtype has not",
            )),
        }
    }
}
