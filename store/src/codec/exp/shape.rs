//! Where the areas and tiles of an encoded slab are.

use std::ops::Range;

use super::{TILE_BYTES, TILE_VALUES, Vectors};
use crate::{Dtype, KvGeometry};

pub(crate) const HEADER_BYTES: usize = 128;

/// Values of a group: one code word of each quarter.
pub(super) const GROUP_VALUES: usize = 32;
const TILE_GROUPS: usize = TILE_VALUES / GROUP_VALUES;

/// What a geometry says about its encoded slabs.
#[derive(Clone, Debug)]
pub struct ExpShape {
    pub(super) planes: Vec<PlaneShape>,
    /// Groups of all planes.
    groups: usize,
    /// Tiles of all planes.
    pub(super) tiles: usize,
    pub(super) vectors: Vectors,
}

#[derive(Clone, Debug)]
pub(crate) struct PlaneShape {
    /// Where the plane is in the raw slab.
    pub(crate) raw: Range<usize>,
    pub(crate) groups: usize,
    /// Groups of the planes before it.
    pub(crate) first_group: usize,
    /// Tiles of the planes before it.
    pub(crate) first_tile: usize,
    tiles: usize,
}

/// One tile, by what the geometry says.
pub(super) struct Tile {
    pub(super) index: usize,
    pub(super) plane: usize,
    /// Where it is in the raw slab.
    pub(super) raw: Range<usize>,
    groups: usize,
    /// Groups before it in its plane, and in the slab.
    group_in_plane: usize,
    first_group: usize,
}

impl Tile {
    /// Where its mantissas are in their area.
    pub(super) fn mantissas(&self) -> Range<usize> {
        let start = GROUP_VALUES * self.first_group;
        start..start + GROUP_VALUES * self.groups
    }
}

/// Where the areas of one slab start, and the codes of each plane within theirs.
pub(super) struct Areas {
    pub(super) codes: usize,
    pub(super) offsets: usize,
    pub(super) escapes: usize,
    /// Start in the area of codes and bytes of a group, by plane.
    planes: Vec<(usize, usize)>,
}

impl Areas {
    /// Where a tile's code words are in their area.
    pub(super) fn codes_of(&self, tile: &Tile) -> Range<usize> {
        let (start, group_bytes) = self.planes[tile.plane];
        let start = start + tile.group_in_plane * group_bytes;
        start..start + tile.groups * group_bytes
    }
}

impl ExpShape {
    /// The shape of the slabs of `geometry`, coded with the fastest instructions that there are; `None`
    /// where they are not bf16.
    pub fn new(geometry: &KvGeometry) -> Option<ExpShape> {
        if geometry.dtype != Dtype::Bf16 {
            return None;
        }
        let mut shape = ExpShape {
            planes: Vec::with_capacity(geometry.planes.len()),
            groups: 0,
            tiles: 0,
            vectors: Vectors::best(),
        };
        for (index, plane) in geometry.planes.iter().enumerate() {
            let start = geometry.plane_offset(index);
            let bytes = plane.token_bytes() * geometry.block_tokens as usize;
            let groups = bytes.div_ceil(2 * GROUP_VALUES);
            let tiles = bytes.div_ceil(TILE_BYTES);
            shape.planes.push(PlaneShape {
                raw: start..start + bytes,
                groups,
                first_group: shape.groups,
                first_tile: shape.tiles,
                tiles,
            });
            shape.groups += groups;
            shape.tiles += tiles;
        }
        Some(shape)
    }

    /// The same, coded with `vectors`: for measuring and for tests.
    ///
    /// # Panics
    /// Where this processor has not got them.
    pub fn with(self, vectors: Vectors) -> ExpShape {
        assert!(vectors.is_there(), "this processor has no {vectors:?}");
        ExpShape { vectors, ..self }
    }

    /// Bytes of a raw slab.
    pub fn raw_bytes(&self) -> usize {
        self.planes.last().map_or(0, |plane| plane.raw.end)
    }

    /// Groups of a slab.
    #[cfg(feature = "cuda")]
    pub(crate) fn groups(&self) -> usize {
        self.groups
    }

    /// Tiles of a slab.
    #[cfg(feature = "cuda")]
    pub(crate) fn tiles(&self) -> usize {
        self.tiles
    }

    /// Where each plane is in the raw slab, and what comes before it in an encoded one.
    #[cfg(feature = "cuda")]
    pub(crate) fn plane_places(&self) -> impl Iterator<Item = &PlaneShape> {
        self.planes.iter()
    }

    /// The areas, where the codes of each plane have so many bits.
    pub(super) fn areas(&self, bits: impl Iterator<Item = u8>) -> Areas {
        let codes = HEADER_BYTES + GROUP_VALUES * self.groups;
        let mut end = 0;
        let planes = self.planes.iter().zip(bits).map(|(plane, bits)| {
            let (start, group_bytes) = (end, 4 * usize::from(bits));
            end += group_bytes * plane.groups;
            (start, group_bytes)
        });
        let planes = planes.collect();
        Areas {
            codes,
            offsets: codes + end,
            escapes: codes + end + 4 * self.tiles,
            planes,
        }
    }

    /// Tile `index` of the slab.
    pub(super) fn tile(&self, index: usize) -> Tile {
        assert!(index < self.tiles, "the slab has so many tiles");
        let after = self
            .planes
            .partition_point(|plane| plane.first_tile <= index);
        // A plane has at least one value, hence a tile, so no two planes begin with the same one.
        self.planes[after - 1].tile(after - 1, index - self.planes[after - 1].first_tile)
    }

    /// All tiles, in order.
    pub(super) fn all_tiles(&self) -> impl Iterator<Item = Tile> + '_ {
        let planes = self.planes.iter().enumerate();
        planes.flat_map(|(plane, shape)| (0..shape.tiles).map(move |tile| shape.tile(plane, tile)))
    }
}

impl PlaneShape {
    fn tile(&self, plane: usize, tile: usize) -> Tile {
        let start = self.raw.start + tile * TILE_BYTES;
        let group_in_plane = tile * TILE_GROUPS;
        Tile {
            index: self.first_tile + tile,
            plane,
            raw: start..(start + TILE_BYTES).min(self.raw.end),
            groups: TILE_GROUPS.min(self.groups - group_in_plane),
            group_in_plane,
            first_group: self.first_group + group_in_plane,
        }
    }
}
