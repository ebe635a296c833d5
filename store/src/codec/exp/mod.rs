//! `exp`: bf16 with the commonest exponents as codes of 3 or 4 bits.
//!
//! The mantissas of KV are noise, but its exponents are few: seven of them cover 96 % of a plane of
//! real KV. They become nibbles, so that a byte permute looks four or more of them up at once; the
//! rest are escapes. Everything is at a place that does not depend on what was decoded before, so
//! any tile of 1024 values decodes on its own: `docs/format.md`, "`exp`".

#[cfg(target_arch = "x86_64")]
mod avx512;
mod book;
mod counts;
mod shape;
mod tile;
mod vectors;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use book::Book;
use counts::Counts;
pub use shape::ExpShape;
pub(crate) use shape::HEADER_BYTES;
use shape::Tile;
pub use vectors::Vectors;
#[cfg(target_arch = "x86_64")]
pub(super) use x86::fetch;

use crate::{Error, Result};

/// Nothing: what compilers have no word for is left to the processor.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn fetch(_: *const u8) {}

/// Values of a whole tile.
pub const TILE_VALUES: usize = 1024;

/// Raw bytes of a whole tile.
pub const TILE_BYTES: usize = 2 * TILE_VALUES;

/// Encodes a raw slab into the front of `out` and returns how many bytes that took: fewer than it has raw.
/// `None` where it would not become smaller, or does not fit; what is in `out` then means nothing.
///
/// How long it becomes is known in the end only: who gives as much room as the raw slab takes has
/// enough for either.
///
/// # Panics
/// Where `raw` has another length than `shape` says.
pub fn encode(shape: &ExpShape, raw: &[u8], out: &mut [u8]) -> Option<usize> {
    assert_eq!(raw.len(), shape.raw_bytes(), "a whole raw slab");
    let room = out.len().min(raw.len().saturating_sub(1));
    let planes = shape.planes.iter();
    let books: Vec<Book> = planes
        .map(|plane| Book::choose(&Counts::of(&raw[plane.raw.clone()]), plane.groups))
        .collect();
    let areas = shape.areas(books.iter().map(|book| book.bits));
    let (front, escapes) = out[..room].split_at_mut_checked(areas.escapes)?;
    let (header, rest) = front.split_at_mut(HEADER_BYTES);
    let (mantissas, rest) = rest.split_at_mut(areas.codes - HEADER_BYTES);
    let (codes, offsets) = rest.split_at_mut(areas.offsets - areas.codes);

    let mut used = 0;
    for (tile, offset) in shape.all_tiles().zip(offsets.chunks_exact_mut(4)) {
        offset.copy_from_slice(&(used as u32).to_le_bytes());
        let mut code = |escapes: &mut [u8]| {
            tile::encode(
                shape.vectors,
                &raw[tile.raw.clone()],
                &books[tile.plane],
                &mut mantissas[tile.mantissas()],
                &mut codes[areas.codes_of(&tile)],
                escapes,
            )
        };
        let left = &mut escapes[used..];
        used += match left.len() < TILE_VALUES {
            true => {
                let mut own = [0; TILE_VALUES];
                let count = code(&mut own);
                left.get_mut(..count)?.copy_from_slice(&own[..count]);
                count
            }
            false => code(left),
        };
    }
    header.fill(0);
    header[..4].copy_from_slice(&(used as u32).to_le_bytes());
    for (plane, book) in books.iter().enumerate() {
        header[4 + plane] = book.bits;
        header[16 + 16 * plane..][..16].copy_from_slice(&book.exponents);
    }
    Some(areas.escapes + used)
}

/// An encoded slab whose header and length are right: decodes any tile of it.
pub struct Decoder<'a> {
    shape: &'a ExpShape,
    stored: &'a [u8],
    areas: shape::Areas,
    books: Vec<Book>,
}

impl<'a> Decoder<'a> {
    /// Checks the header and the length of `stored`, as hostile input.
    ///
    /// # Errors
    /// `Corrupt` where they are wrong.
    pub fn new(shape: &'a ExpShape, stored: &'a [u8]) -> Result<Self> {
        let header: &[u8; HEADER_BYTES] = stored
            .first_chunk()
            .ok_or_else(|| wrong("is shorter than its header"))?;
        let planes = shape.planes.len();
        let bits = &header[4..4 + planes];
        let reserved = [&header[4 + planes..16], &header[16 + 16 * planes..]];
        if bits.iter().any(|bits| !(3..=4).contains(bits)) {
            return Err(wrong("has codes of another size"));
        }
        if reserved.into_iter().flatten().any(|&byte| byte != 0) {
            return Err(wrong("has bytes where there must be zeros"));
        }
        let books: Vec<Book> = bits
            .iter()
            .zip(header[16..].as_chunks::<16>().0)
            .map(|(&bits, exponents)| Book::read(bits, *exponents))
            .collect();
        let mut unused = books
            .iter()
            .flat_map(|book| &book.exponents[usize::from(book.escape())..]);
        if unused.any(|&byte| byte != 0) {
            return Err(wrong("has bytes where there must be zeros"));
        }
        let escapes = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let areas = shape.areas(bits.iter().copied());
        if areas.escapes.checked_add(escapes as usize) != Some(stored.len()) {
            return Err(wrong("has another length than its header says"));
        }
        Ok(Decoder {
            shape,
            stored,
            areas,
            books,
        })
    }

    /// Number of tiles.
    pub fn tiles(&self) -> usize {
        self.shape.tiles
    }

    /// Where tile `index` is in the raw slab.
    pub fn raw_range(&self, index: usize) -> Range<usize> {
        self.shape.tile(index).raw
    }

    /// Decodes tile `index` into the first bytes of `out`, and returns how many these are.
    ///
    /// # Errors
    /// `Corrupt` where its escapes do not add up; what is in `out` then means nothing.
    ///
    /// # Panics
    /// Where there is no such tile.
    pub fn tile(&self, index: usize, out: &mut [u8; TILE_BYTES]) -> Result<usize> {
        let tile = self.shape.tile(index);
        let bytes = tile.raw.len();
        self.decode(&tile, &mut out[..bytes])?;
        Ok(bytes)
    }

    /// Decodes the whole slab.
    ///
    /// # Errors
    /// As [`Decoder::tile`].
    ///
    /// # Panics
    /// Where `out` has another length than the raw slab.
    pub fn all(&self, out: &mut [u8]) -> Result<()> {
        assert_eq!(out.len(), self.shape.raw_bytes(), "a whole raw slab");
        let mut tiles = self.shape.all_tiles();
        tiles.try_for_each(|tile| self.decode(&tile, &mut out[tile.raw.clone()]))
    }

    fn decode(&self, tile: &Tile, out: &mut [u8]) -> Result<()> {
        let (codes, areas) = (self.areas.codes_of(tile), &self.areas);
        let escapes = self.escapes(tile.index)?;
        let whole = tile::decode(
            self.shape.vectors,
            &self.books[tile.plane],
            &self.stored[HEADER_BYTES..areas.codes][tile.mantissas()],
            &self.stored[areas.codes..areas.offsets][codes],
            escapes,
            out,
        );
        match whole {
            true => Ok(()),
            false => Err(wrong("has another number of escapes than a tile wants")),
        }
    }

    /// The escapes of a tile.
    fn escapes(&self, index: usize) -> Result<&'a [u8]> {
        let offsets = self.stored[self.areas.offsets..self.areas.escapes]
            .as_chunks::<4>()
            .0;
        let all = &self.stored[self.areas.escapes..];
        let at = |index: usize| {
            offsets
                .get(index)
                .map(|at| u32::from_le_bytes(*at) as usize)
        };
        let start = at(index).expect("the shape has the tile");
        let end = at(index + 1).unwrap_or(all.len());
        match all.get(start..end) {
            Some(escapes) if index > 0 || start == 0 => Ok(escapes),
            _ => Err(wrong("has escapes that are out of order")),
        }
    }
}

fn wrong(what: &str) -> Error {
    Error::corrupt(format!("an encoded slab {what}"))
}

#[cfg(test)]
mod tests;
