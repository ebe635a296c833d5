//! The portable code on x86-64: compiled once more for AVX2, and with the one instruction that compilers do not
//! find.

use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_movemask_epi8, _mm_set_epi64x, _mm_set1_epi8};

use super::book::Book;
use super::tile;

/// Has this processor AVX2, and what has always come with it?
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
}

/// As `tile::encode`.
///
/// # Panics
/// Where [`has_avx2`] says no, or a length is not the tile's.
pub(super) fn encode(
    raw: &[u8],
    book: &Book,
    mantissas: &mut [u8],
    codes: &mut [u8],
    escapes: &mut [u8],
) -> usize {
    assert!(has_avx2(), "the caller asked first");
    // SAFETY: `has_avx2` said above that the processor has every feature the function enables.
    unsafe { encode_with_avx2(raw, book, mantissas, codes, escapes) }
}

/// As `tile::decode`.
///
/// # Panics
/// As [`encode`].
pub(super) fn decode(
    book: &Book,
    mantissas: &[u8],
    codes: &[u8],
    escapes: &[u8],
    out: &mut [u8],
) -> bool {
    assert!(has_avx2(), "the caller asked first");
    // SAFETY: `has_avx2` said above that the processor has every feature the function enables.
    unsafe { decode_with_avx2(book, mantissas, codes, escapes, out) }
}

#[target_feature(enable = "avx2,bmi1,bmi2")]
fn encode_with_avx2(
    raw: &[u8],
    book: &Book,
    mantissas: &mut [u8],
    codes: &mut [u8],
    escapes: &mut [u8],
) -> usize {
    tile::encode_portable(raw, book, mantissas, codes, escapes)
}

#[target_feature(enable = "avx2,bmi1,bmi2")]
fn decode_with_avx2(
    book: &Book,
    mantissas: &[u8],
    codes: &[u8],
    escapes: &[u8],
    out: &mut [u8],
) -> bool {
    tile::decode_portable(book, mantissas, codes, escapes, out)
}

/// As `tile::equal_mask_of_words`.
#[inline(always)]
pub(super) fn equal_mask(block: &[u8; 64], wanted: u8) -> u64 {
    let mut mask = 0;
    for (sixteen, at) in block.as_chunks::<16>().0.iter().zip((0..).step_by(16)) {
        let all = i128::from_le_bytes(*sixteen);
        // SAFETY: all three need SSE2 alone, which every x86-64 processor has.
        let equal = unsafe {
            let bytes = _mm_set_epi64x((all >> 64) as i64, all as i64);
            _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8(wanted as i8)))
        };
        mask |= u64::from(equal as u16) << at;
    }
    mask
}
