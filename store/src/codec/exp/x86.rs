//! What compilers do not find on x86-64: looking sixteen bytes up at once, a mask of those that are equal, and
//! asking memory for what comes next.
//! The rest of the portable code is compiled once more for AVX2.

use std::arch::x86_64::*;

use super::TILE_VALUES;
use super::book::Book;
use super::tile::{self, Comparing, LookUp};

/// Has this processor SSSE3? Nearly all without AVX2 have.
pub(super) fn has_ssse3() -> bool {
    is_x86_feature_detected!("ssse3")
}

/// Has this processor AVX2, and what has always come with it?
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
}

/// As `tile::encode`.
///
/// # Panics
/// Where [`has_ssse3`] says no, or a length is not the tile's.
pub(super) fn encode_with_ssse3(
    raw: &[u8],
    book: &Book,
    mantissas: &mut [u8],
    codes: &mut [u8],
    escapes: &mut [u8],
) -> usize {
    tile::encode_with::<Ssse3>(raw, book, mantissas, codes, escapes)
}

/// As `tile::decode`.
///
/// # Panics
/// As [`encode_with_ssse3`].
pub(super) fn decode_with_ssse3(
    book: &Book,
    mantissas: &[u8],
    codes: &[u8],
    escapes: &[u8],
    out: &mut [u8],
) -> bool {
    tile::decode_with::<Ssse3>(book, mantissas, codes, escapes, out)
}

/// As `tile::encode`.
///
/// # Panics
/// Where [`has_avx2`] says no, or a length is not the tile's.
pub(super) fn encode_with_avx2(
    raw: &[u8],
    book: &Book,
    mantissas: &mut [u8],
    codes: &mut [u8],
    escapes: &mut [u8],
) -> usize {
    #[target_feature(enable = "avx2,bmi1,bmi2")]
    fn compiled(
        raw: &[u8],
        book: &Book,
        mantissas: &mut [u8],
        codes: &mut [u8],
        escapes: &mut [u8],
    ) -> usize {
        tile::encode_with::<Avx2>(raw, book, mantissas, codes, escapes)
    }
    assert!(has_avx2(), "the caller asked first");
    // SAFETY: `has_avx2` said above that the processor has every feature the function enables.
    unsafe { compiled(raw, book, mantissas, codes, escapes) }
}

/// As `tile::decode`.
///
/// # Panics
/// As [`encode_with_avx2`].
pub(super) fn decode_with_avx2(
    book: &Book,
    mantissas: &[u8],
    codes: &[u8],
    escapes: &[u8],
    out: &mut [u8],
) -> bool {
    #[target_feature(enable = "avx2,bmi1,bmi2")]
    fn compiled(
        book: &Book,
        mantissas: &[u8],
        codes: &[u8],
        escapes: &[u8],
        out: &mut [u8],
    ) -> bool {
        tile::decode_with::<Avx2>(book, mantissas, codes, escapes, out)
    }
    assert!(has_avx2(), "the caller asked first");
    // SAFETY: `has_avx2` said above that the processor has every feature the function enables.
    unsafe { compiled(book, mantissas, codes, escapes, out) }
}

/// The book by exponent, where all that have codes are within sixteen of each other, as KV's nearly always are.
struct Window {
    first: u8,
    escape: u8,
    /// By distance from `first`: the code, with the bits of the escape turned over, so that 0 is the escape.
    table: [u8; 16],
}

impl Window {
    fn of(book: &Book) -> Option<Window> {
        let escape = book.escape();
        let coded = &book.exponents[..usize::from(escape)];
        let first = *coded.iter().min()?;
        let mut table = [0; 16];
        for (code, exponent) in (0..escape).zip(coded) {
            *table.get_mut(usize::from(exponent - first))? = code ^ escape;
        }
        Some(Window {
            first,
            escape,
            table,
        })
    }
}

/// Sixteen at once.
struct Ssse3;

impl LookUp for Ssse3 {
    fn codes(book: &Book, exponents: &[u8; TILE_VALUES], codes: &mut [u8; TILE_VALUES]) {
        #[target_feature(enable = "ssse3")]
        fn look_up(window: &Window, exponents: &[u8; TILE_VALUES], codes: &mut [u8; TILE_VALUES]) {
            let table = load(&window.table);
            let first = _mm_set1_epi8(window.first as i8);
            let escape = _mm_set1_epi8(window.escape as i8);
            let (exponents, codes) = (exponents.as_chunks().0, codes.as_chunks_mut().0);
            for (exponents, codes) in exponents.iter().zip(codes) {
                let distance = _mm_sub_epi8(load(exponents), first);
                // Beyond the window the top bit is set, for which 0 is found.
                let index = _mm_adds_epu8(distance, _mm_set1_epi8(0x70));
                store(_mm_xor_si128(_mm_shuffle_epi8(table, index), escape), codes);
            }
        }
        match Window::of(book) {
            Some(window) => {
                assert!(has_ssse3(), "the caller asked first");
                // SAFETY: `has_ssse3` said above that the processor has what the function enables.
                unsafe { look_up(&window, exponents, codes) }
            }
            None => Comparing::codes(book, exponents, codes),
        }
    }

    fn exponents(book: &Book, codes: &[u8; TILE_VALUES], exponents: &mut [u8; TILE_VALUES]) {
        #[target_feature(enable = "ssse3")]
        fn look_up(table: &[u8; 16], codes: &[u8; TILE_VALUES], exponents: &mut [u8; TILE_VALUES]) {
            let table = load(table);
            let (codes, exponents) = (codes.as_chunks().0, exponents.as_chunks_mut().0);
            for (codes, exponents) in codes.iter().zip(exponents) {
                store(_mm_shuffle_epi8(table, load(codes)), exponents);
            }
        }
        assert!(has_ssse3(), "the caller asked first");
        // SAFETY: `has_ssse3` said above that the processor has what the function enables.
        unsafe { look_up(&book.exponents, codes, exponents) }
    }
}

/// Thirty-two at once, sixteen in each half.
struct Avx2;

impl LookUp for Avx2 {
    fn codes(book: &Book, exponents: &[u8; TILE_VALUES], codes: &mut [u8; TILE_VALUES]) {
        #[target_feature(enable = "avx2")]
        fn look_up(window: &Window, exponents: &[u8; TILE_VALUES], codes: &mut [u8; TILE_VALUES]) {
            let table = _mm256_broadcastsi128_si256(load(&window.table));
            let first = _mm256_set1_epi8(window.first as i8);
            let escape = _mm256_set1_epi8(window.escape as i8);
            let (exponents, codes) = (exponents.as_chunks().0, codes.as_chunks_mut().0);
            for (exponents, codes) in exponents.iter().zip(codes) {
                let distance = _mm256_sub_epi8(load_32(exponents), first);
                let index = _mm256_adds_epu8(distance, _mm256_set1_epi8(0x70));
                let found = _mm256_shuffle_epi8(table, index);
                store_32(_mm256_xor_si256(found, escape), codes);
            }
        }
        match Window::of(book) {
            Some(window) => {
                assert!(has_avx2(), "the caller asked first");
                // SAFETY: `has_avx2` said above that the processor has what the function enables.
                unsafe { look_up(&window, exponents, codes) }
            }
            None => Comparing::codes(book, exponents, codes),
        }
    }

    fn exponents(book: &Book, codes: &[u8; TILE_VALUES], exponents: &mut [u8; TILE_VALUES]) {
        #[target_feature(enable = "avx2")]
        fn look_up(table: &[u8; 16], codes: &[u8; TILE_VALUES], exponents: &mut [u8; TILE_VALUES]) {
            let table = _mm256_broadcastsi128_si256(load(table));
            let (codes, exponents) = (codes.as_chunks().0, exponents.as_chunks_mut().0);
            for (codes, exponents) in codes.iter().zip(exponents) {
                store_32(_mm256_shuffle_epi8(table, load_32(codes)), exponents);
            }
        }
        assert!(has_avx2(), "the caller asked first");
        // SAFETY: `has_avx2` said above that the processor has what the function enables.
        unsafe { look_up(&book.exponents, codes, exponents) }
    }
}

#[target_feature(enable = "sse2")]
fn load(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the array has the 16 bytes that are read; any alignment will do.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "sse2")]
fn store(vector: __m128i, bytes: &mut [u8; 16]) {
    // SAFETY: the array has the 16 bytes that are written; any alignment will do.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), vector) }
}

#[target_feature(enable = "avx2")]
fn load_32(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the array has the 32 bytes that are read; any alignment will do.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn store_32(vector: __m256i, bytes: &mut [u8; 32]) {
    // SAFETY: the array has the 32 bytes that are written; any alignment will do.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), vector) }
}

/// Has the processor bring the line of memory at an address, any, into its cache.
#[inline(always)]
pub(in crate::codec) fn fetch(at: *const u8) {
    // SAFETY: it needs SSE alone, which every x86-64 processor has; nothing is read that the program sees, and no
    // address is a fault.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
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
