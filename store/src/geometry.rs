use serde::{Deserialize, Serialize};
use std::fmt;

use crate::{Checksummer, Error, Result};

/// The number of a layer within the store's own layers, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(pub u32);

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The type of one KV element, as the engine stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Dtype {
    /// bfloat16, two bytes.
    Bf16,
    /// IEEE half precision, two bytes.
    F16,
    /// IEEE single precision, four bytes.
    F32,
    /// FP8 with 4 exponent bits, one byte.
    Fp8E4m3,
    /// FP8 with 5 exponent bits, one byte.
    Fp8E5m2,
    /// Bytes that only the engine understands (quantised KV with its scales inside, say).
    Opaque,
}

impl Dtype {
    /// Bytes of one element; 1 for [`Dtype::Opaque`].
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
            Dtype::Fp8E4m3 | Dtype::Fp8E5m2 | Dtype::Opaque => 1,
        }
    }
}

/// One plane of a layer's KV: K, V, or MLA's single latent.
///
/// A token's part of a plane is `heads × head_bytes` bytes. The split into heads matters only for
/// engines whose pages keep heads apart (HND layouts); a chunk always holds tokens whole (NHD).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plane {
    /// KV heads of this shard; 1 for a latent plane.
    pub heads: u32,
    /// Bytes of one head of one token.
    pub head_bytes: u32,
}

impl Plane {
    /// Bytes of one token in this plane.
    pub const fn token_bytes(&self) -> usize {
        self.heads as usize * self.head_bytes as usize
    }
}

/// How the KV of one block is laid out as a chunk. A store has exactly one geometry.
///
/// A chunk is layer-major: slab 0, slab 1, …, each slab one layer, each slab its planes one after
/// the other, each plane its tokens in order. Slabs start on multiples of
/// [`KvGeometry::SLAB_ALIGN`] within the payload.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvGeometry {
    /// Layers of this shard, at least 1.
    pub layers: u32,
    /// Planes of every layer: two for K and V, one for MLA.
    pub planes: Vec<Plane>,
    /// Tokens of one block, at least 1. Choose it so that a chunk has 0.5–4 MiB.
    pub block_tokens: u32,
    /// Element type.
    pub dtype: Dtype,
}

impl KvGeometry {
    /// Slabs start on multiples of this many bytes.
    pub const SLAB_ALIGN: usize = 256;
    /// The largest number of layers: a record's slab table must fit its header page.
    pub const LAYERS_MAX: u32 = 240;

    /// A geometry with a K and a V plane of equal size (MHA, MQA, GQA).
    ///
    /// # Errors
    /// `Invalid` as [`KvGeometry::validate`].
    pub fn gqa(
        layers: u32,
        kv_heads: u32,
        head_dim: u32,
        dtype: Dtype,
        block_tokens: u32,
    ) -> Result<Self> {
        let plane = Plane {
            heads: kv_heads,
            head_bytes: head_dim.saturating_mul(dtype.bytes() as u32),
        };
        let geometry = KvGeometry {
            layers,
            planes: vec![plane, plane],
            block_tokens,
            dtype,
        };
        geometry.validate().map(|()| geometry)
    }

    /// A geometry with one latent plane of `latent_dim` elements a token (MLA).
    ///
    /// # Errors
    /// `Invalid` as [`KvGeometry::validate`].
    pub fn mla(layers: u32, latent_dim: u32, dtype: Dtype, block_tokens: u32) -> Result<Self> {
        let plane = Plane {
            heads: 1,
            head_bytes: latent_dim.saturating_mul(dtype.bytes() as u32),
        };
        let geometry = KvGeometry {
            layers,
            planes: vec![plane],
            block_tokens,
            dtype,
        };
        geometry.validate().map(|()| geometry)
    }

    /// Checks the ranges of every field.
    ///
    /// # Errors
    /// `Invalid`, naming the field and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, field: &'static str, allowed: &str| match ok {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "geometry.{field} must be {allowed}"
            ))),
        };
        check(
            (1..=Self::LAYERS_MAX).contains(&self.layers),
            "layers",
            "1 to 240",
        )?;
        check(
            (1..=4).contains(&self.planes.len()),
            "planes",
            "a list of 1 to 4 planes",
        )?;
        check(
            (1..=4096).contains(&self.block_tokens),
            "block_tokens",
            "1 to 4096",
        )?;
        for plane in &self.planes {
            check(
                (1..=65_536).contains(&plane.heads),
                "planes.heads",
                "1 to 65536",
            )?;
            check(
                (1..=1 << 20).contains(&plane.head_bytes),
                "planes.head_bytes",
                "1 to 1048576",
            )?;
            check(
                (plane.head_bytes as usize).is_multiple_of(self.dtype.bytes()),
                "planes.head_bytes",
                "a multiple of the dtype's size",
            )?;
        }
        check(
            self.payload_bytes() <= 1 << 30,
            "block_tokens",
            "small enough that a chunk has at most 1 GiB",
        )
    }

    /// Bytes of one token in all planes of one layer.
    pub fn token_bytes(&self) -> usize {
        self.planes.iter().map(Plane::token_bytes).sum()
    }

    /// Bytes of one raw slab, without padding.
    pub fn slab_bytes(&self) -> usize {
        self.token_bytes() * self.block_tokens as usize
    }

    /// Distance between the starts of two raw slabs in a payload.
    pub fn slab_stride(&self) -> usize {
        self.slab_bytes().next_multiple_of(Self::SLAB_ALIGN)
    }

    /// Bytes of a raw chunk, padding between slabs included.
    pub fn payload_bytes(&self) -> usize {
        self.slab_stride() * self.layers as usize
    }

    /// Offset of a plane within its raw slab.
    pub fn plane_offset(&self, plane: usize) -> usize {
        self.planes[..plane]
            .iter()
            .map(Plane::token_bytes)
            .sum::<usize>()
            * self.block_tokens as usize
    }

    /// All layers, in order.
    pub fn layer_ids(&self) -> impl DoubleEndedIterator<Item = LayerId> + use<> {
        (0..self.layers).map(LayerId)
    }

    /// 64 bits that differ, but for chance, where anything in the geometry differs. Stored in each
    /// record next to the namespace root, which holds the geometry in 256 bits.
    pub fn fingerprint(&self) -> u64 {
        let mut bytes = Vec::new();
        for field in [
            self.layers,
            self.block_tokens,
            self.dtype as u32,
            self.planes.len() as u32,
        ] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        for plane in &self.planes {
            bytes.extend_from_slice(&plane.heads.to_le_bytes());
            bytes.extend_from_slice(&plane.head_bytes.to_le_bytes());
        }
        Checksummer::of(&bytes).0
    }

    /// What differs between two geometries, one line a field: `block_tokens: 64 here, 128 there`.
    pub fn difference(&self, other: &KvGeometry) -> Vec<String> {
        fn field<T: PartialEq + fmt::Debug>(
            lines: &mut Vec<String>,
            name: &str,
            here: &T,
            there: &T,
        ) {
            if here != there {
                lines.push(format!("{name}: {here:?} here, {there:?} there"));
            }
        }
        let mut lines = Vec::new();
        field(&mut lines, "layers", &self.layers, &other.layers);
        field(&mut lines, "planes", &self.planes, &other.planes);
        field(
            &mut lines,
            "block_tokens",
            &self.block_tokens,
            &other.block_tokens,
        );
        field(&mut lines, "dtype", &self.dtype, &other.dtype);
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_8b_has_the_known_sizes() {
        let geometry = KvGeometry::gqa(32, 8, 128, Dtype::Bf16, 16).expect("valid");
        assert_eq!(geometry.token_bytes(), 4096);
        assert_eq!(geometry.slab_bytes(), 64 << 10);
        assert_eq!(geometry.payload_bytes(), 2 << 20);
        assert_eq!(geometry.plane_offset(1), 32 << 10);
    }

    #[test]
    fn every_field_changes_the_fingerprint_and_is_named_in_the_difference() {
        let base = KvGeometry::gqa(4, 2, 32, Dtype::Bf16, 8).expect("valid");
        let mut others = vec![base.clone(); 5];
        others[0].layers = 5;
        others[1].block_tokens = 16;
        others[2].dtype = Dtype::F16;
        others[3].planes[1].heads = 1;
        others[4].planes.pop();
        for other in others {
            assert_ne!(base.fingerprint(), other.fingerprint(), "{other:?}");
            assert_eq!(base.difference(&other).len(), 1, "{other:?}");
        }
        assert!(base.difference(&base).is_empty());
    }

    #[test]
    fn a_wrong_field_is_named_with_what_is_allowed() {
        let error = KvGeometry::gqa(0, 2, 32, Dtype::Bf16, 8).expect_err("no layers");
        assert_eq!(
            error.to_string(),
            "invalid: geometry.layers must be 1 to 240"
        );
    }
}
