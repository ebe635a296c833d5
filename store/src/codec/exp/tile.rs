//! One tile, in portable code that compilers turn into vectors, but for looking codes and exponents up: `x86`
//! has instructions for that, and compiles the rest again for AVX2. `avx512` has whole tiles in its own way.

use super::book::Book;
use super::shape::GROUP_VALUES;
#[cfg(target_arch = "x86_64")]
pub(super) use super::x86::equal_mask;
use super::{TILE_BYTES, TILE_VALUES, Vectors};
#[cfg(not(target_arch = "x86_64"))]
pub(super) use equal_mask_of_words as equal_mask;

/// Code words of a quarter of a whole tile, in bytes.
pub(super) const QUARTER_BYTES: usize = 128;

/// Encodes a tile and returns the number of its escapes. `mantissas` and `codes` have the tile's
/// length, `escapes` room for one of each value.
pub(super) fn encode(
    vectors: Vectors,
    raw: &[u8],
    book: &Book,
    mantissas: &mut [u8],
    codes: &mut [u8],
    escapes: &mut [u8],
) -> usize {
    match vectors {
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx512 if raw.len() == TILE_BYTES => {
            super::avx512::encode(raw, book, mantissas, codes, escapes)
        }
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2 | Vectors::Avx512 => {
            super::x86::encode_with_avx2(raw, book, mantissas, codes, escapes)
        }
        #[cfg(target_arch = "x86_64")]
        Vectors::Ssse3 => super::x86::encode_with_ssse3(raw, book, mantissas, codes, escapes),
        _ => encode_with::<Comparing>(raw, book, mantissas, codes, escapes),
    }
}

/// Decodes a tile into `out`, which has as many bytes as the tile has raw. `false` where `escapes`
/// are not exactly those that its codes want.
pub(super) fn decode(
    vectors: Vectors,
    book: &Book,
    mantissas: &[u8],
    codes: &[u8],
    escapes: &[u8],
    out: &mut [u8],
) -> bool {
    match vectors {
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx512 if out.len() == TILE_BYTES => {
            super::avx512::decode(book, mantissas, codes, escapes, out)
        }
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2 | Vectors::Avx512 => {
            super::x86::decode_with_avx2(book, mantissas, codes, escapes, out)
        }
        #[cfg(target_arch = "x86_64")]
        Vectors::Ssse3 => super::x86::decode_with_ssse3(book, mantissas, codes, escapes, out),
        _ => decode_with::<Comparing>(book, mantissas, codes, escapes, out),
    }
}

/// How codes and exponents are looked up, a tile at a time.
pub(super) trait LookUp {
    /// The code of each exponent, the escape where it has none.
    fn codes(book: &Book, exponents: &[u8; TILE_VALUES], codes: &mut [u8; TILE_VALUES]);

    /// The exponent of each code; 0 for escapes.
    fn exponents(book: &Book, codes: &[u8; TILE_VALUES], exponents: &mut [u8; TILE_VALUES]);
}

/// Each value with each entry of the book, at most one of which is equal: faster in vectors than looking one
/// value up after the other.
pub(super) struct Comparing;

impl LookUp for Comparing {
    #[inline(always)]
    fn codes(book: &Book, exponents: &[u8; TILE_VALUES], codes: &mut [u8; TILE_VALUES]) {
        let escape = book.escape();
        codes.fill(escape);
        for (coded, wanted) in (0..escape).zip(book.exponents) {
            for (code, &exponent) in codes.iter_mut().zip(exponents) {
                *code ^= if exponent == wanted {
                    coded ^ escape
                } else {
                    0
                };
            }
        }
    }

    #[inline(always)]
    fn exponents(book: &Book, codes: &[u8; TILE_VALUES], exponents: &mut [u8; TILE_VALUES]) {
        exponents.fill(0);
        for (coded, wanted) in (0..book.escape()).zip(book.exponents) {
            for (exponent, &code) in exponents.iter_mut().zip(codes) {
                *exponent |= if code == coded { wanted } else { 0 };
            }
        }
    }
}

#[inline(always)]
pub(super) fn encode_with<L: LookUp>(
    raw: &[u8],
    book: &Book,
    mantissas: &mut [u8],
    words: &mut [u8],
    escapes: &mut [u8],
) -> usize {
    let values = raw.as_chunks::<2>().0;
    let escape = book.escape();
    let mut exponents = [0_u8; TILE_VALUES];
    mantissas[values.len()..].fill(0);
    for ((value, mantissa), exponent) in values.iter().zip(mantissas).zip(&mut exponents) {
        let value = u16::from_le_bytes(*value);
        *mantissa = (value >> 8 & 0x80 | value & 0x7f) as u8;
        *exponent = (value >> 7) as u8;
    }
    let mut codes = [0_u8; TILE_VALUES];
    L::codes(book, &exponents, &mut codes);
    codes[values.len()..].fill(0);
    let mut used = 0;
    for_each_equal(&codes, escape, |at| {
        escapes[used] = exponents[at];
        used += 1;
    });
    let quarter = words.len() / usize::from(book.bits);
    let mut nibbles = [0_u8; TILE_VALUES / 2];
    for (pair, nibbles) in codes.as_chunks::<2>().0.iter().zip(&mut nibbles) {
        *nibbles = pair[0] | pair[1] << 4;
    }
    match book.bits {
        3 => {
            let (first, last) = nibbles[..4 * quarter].split_at(3 * quarter);
            for (bit, (words, nibbles)) in words
                .chunks_exact_mut(quarter)
                .zip(first.chunks_exact(quarter))
                .enumerate()
            {
                for ((word, nibbles), last) in words.iter_mut().zip(nibbles).zip(last) {
                    *word = nibbles | (last >> bit & 0x11) << 3;
                }
            }
        }
        _ => words.copy_from_slice(&nibbles[..4 * quarter]),
    }
    used
}

#[inline(always)]
pub(super) fn decode_with<L: LookUp>(
    book: &Book,
    mantissas: &[u8],
    words: &[u8],
    escapes: &[u8],
    out: &mut [u8],
) -> bool {
    let escape = book.escape();
    let quarter = words.len() / usize::from(book.bits);
    let mut nibbles = [0_u8; TILE_VALUES / 2];
    match book.bits {
        3 => {
            let (first, last) = nibbles[..4 * quarter].split_at_mut(3 * quarter);
            for (bit, (words, nibbles)) in words
                .chunks_exact(quarter)
                .zip(first.chunks_exact_mut(quarter))
                .enumerate()
            {
                for ((word, nibbles), last) in words.iter().zip(nibbles).zip(&mut *last) {
                    *nibbles = word & 0x77;
                    *last |= (word >> 3 & 0x11) << bit;
                }
            }
        }
        _ => nibbles[..4 * quarter].copy_from_slice(words),
    }
    let mut codes = [0_u8; TILE_VALUES];
    for (pair, nibbles) in codes.as_chunks_mut::<2>().0.iter_mut().zip(nibbles) {
        *pair = [nibbles & 15, nibbles >> 4];
    }
    let mut exponents = [0_u8; TILE_VALUES];
    L::exponents(book, &codes, &mut exponents);
    let mut wanted = 0;
    for_each_equal(&codes, escape, |at| {
        // With too few of them the tile is refused in the end.
        exponents[at] = escapes.get(wanted).copied().unwrap_or_default();
        wanted += 1;
    });
    let values = out.as_chunks_mut::<2>().0.iter_mut();
    for ((value, &mantissa), &exponent) in values.zip(mantissas).zip(&exponents) {
        let mantissa = u16::from(mantissa);
        *value =
            (mantissa << 8 & 0x8000 | u16::from(exponent) << 7 | mantissa & 0x7f).to_le_bytes();
    }
    wanted == escapes.len()
}

/// Calls `run` for each place of `codes` that holds `wanted`, in order. These are few: one mask says where
/// they are among 64.
#[inline(always)]
fn for_each_equal(codes: &[u8; TILE_VALUES], wanted: u8, mut run: impl FnMut(usize)) {
    for (block, start) in codes.as_chunks().0.iter().zip((0..).step_by(64)) {
        let mut mask = equal_mask(block, wanted);
        while mask != 0 {
            run(start + mask.trailing_zeros() as usize);
            mask &= mask - 1;
        }
    }
}

/// Bit i says whether byte i of `block` is `wanted`; all of them are below 128.
#[cfg(any(test, not(target_arch = "x86_64")))]
#[inline(always)]
pub(super) fn equal_mask_of_words(block: &[u8; 64], wanted: u8) -> u64 {
    const EACH: u64 = 0x0101_0101_0101_0101;
    let mut mask = 0;
    for (eight, at) in block.as_chunks().0.iter().zip((0..).step_by(8)) {
        let different = u64::from_le_bytes(*eight) ^ (EACH * u64::from(wanted));
        // The top bit of each byte that is equal, then all of these in the highest byte.
        let equal = !(different + 0x7f * EACH) & (0x80 * EACH);
        mask |= (equal >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56 << at;
    }
    mask
}

const _: () = assert!(TILE_VALUES == 4 * 8 * QUARTER_BYTES / 4 && GROUP_VALUES == 4 * 8);
const _: () = assert!(TILE_VALUES.is_multiple_of(64));
