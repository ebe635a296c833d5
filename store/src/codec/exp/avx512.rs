//! Whole tiles with AVX-512 (VBMI2), 64 values at a time. The same bytes as the portable code.

use std::arch::x86_64::*;
use std::sync::LazyLock;

use super::TILE_BYTES;
use super::book::Book;
use super::tile::QUARTER_BYTES;

const VALUES: usize = TILE_BYTES / 2;
const STEP: usize = 64;

/// Has this processor all that the functions here need?
pub(super) fn is_there() -> bool {
    static THERE: LazyLock<bool> = LazyLock::new(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2")
    });
    *THERE
}

/// As `tile::encode`, for a whole tile.
///
/// # Panics
/// Where [`is_there`] says no, a length is not a whole tile's, or `escapes` is too short.
pub(super) fn encode(
    raw: &[u8],
    book: &Book,
    mantissas: &mut [u8],
    codes: &mut [u8],
    escapes: &mut [u8],
) -> usize {
    assert!(is_there(), "the caller asked first");
    let raw: &[u8; TILE_BYTES] = raw.try_into().expect("a whole tile");
    let mantissas: &mut [u8; VALUES] = mantissas.try_into().expect("a whole tile");
    let quarters = codes.as_chunks_mut::<QUARTER_BYTES>().0;
    assert_eq!(quarters.len(), usize::from(book.bits), "a whole tile");
    // SAFETY: `is_there` said above that the processor has every feature the function enables.
    unsafe { encode_tile(raw, book, mantissas, quarters, escapes) }
}

/// As `tile::decode`, for a whole tile.
///
/// # Panics
/// Where [`is_there`] says no, or a length is not a whole tile's.
pub(super) fn decode(
    book: &Book,
    mantissas: &[u8],
    codes: &[u8],
    escapes: &[u8],
    out: &mut [u8],
) -> bool {
    assert!(is_there(), "the caller asked first");
    let out: &mut [u8; TILE_BYTES] = out.try_into().expect("a whole tile");
    let mantissas: &[u8; VALUES] = mantissas.try_into().expect("a whole tile");
    let quarters = codes.as_chunks::<QUARTER_BYTES>().0;
    assert_eq!(quarters.len(), usize::from(book.bits), "a whole tile");
    // SAFETY: `is_there` said above that the processor has every feature the function enables.
    unsafe { decode_tile(book, mantissas, quarters, escapes, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2")]
fn encode_tile(
    raw: &[u8; TILE_BYTES],
    book: &Book,
    mantissas: &mut [u8; VALUES],
    quarters: &mut [[u8; QUARTER_BYTES]],
    escapes: &mut [u8],
) -> usize {
    let table: [__m512i; 4] = std::array::from_fn(|part| load(&book.codes[64 * part..]));
    let even = even_bytes();
    let low = _mm512_set1_epi16(0x7f);
    let sign = _mm512_set1_epi16(0x80);
    let weights = _mm512_set1_epi16(0x1001);
    let escape = _mm512_set1_epi8(book.escape() as i8);
    let mut nibbles = [0_u8; VALUES / 2];
    let mut used = 0;
    for step in 0..VALUES / STEP {
        let first = load(&raw[2 * STEP * step..]);
        let second = load(&raw[2 * STEP * step + STEP..]);
        // The wanted byte of each value is its lower one; which are then brought together.
        let mantissa = |value| {
            let signed = _mm512_and_si512(_mm512_srli_epi16::<8>(value), sign);
            _mm512_or_si512(signed, _mm512_and_si512(value, low))
        };
        let bytes = _mm512_permutex2var_epi8(mantissa(first), even, mantissa(second));
        store(bytes, &mut mantissas[STEP * step..]);
        let exponents = _mm512_permutex2var_epi8(
            _mm512_srli_epi16::<7>(first),
            even,
            _mm512_srli_epi16::<7>(second),
        );
        // Each permute looks up in half of the table by the lower seven bits.
        let codes = _mm512_mask_blend_epi8(
            _mm512_movepi8_mask(exponents),
            _mm512_permutex2var_epi8(table[0], exponents, table[1]),
            _mm512_permutex2var_epi8(table[2], exponents, table[3]),
        );
        let escaped = _mm512_cmpeq_epi8_mask(codes, escape);
        let count = escaped.count_ones() as usize;
        if count > 0 {
            let room = &mut escapes[used..used + count];
            let packed = _mm512_maskz_compress_epi8(escaped, exponents);
            // SAFETY: only bytes whose bit in the mask is set are written: the first `count`, which
            // `room` has.
            unsafe { _mm512_mask_storeu_epi8(room.as_mut_ptr().cast(), low_bits(count), packed) };
            used += count;
        }
        // First + 16 × second of each pair, which fits the low byte of 16 bits.
        let pairs = _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(codes, weights));
        let half = &mut nibbles[STEP / 2 * step..][..STEP / 2];
        // SAFETY: `half` has the 32 bytes that are stored.
        unsafe { _mm256_storeu_si256(half.as_mut_ptr().cast(), pairs) };
    }
    let nibbles = nibbles.as_chunks::<QUARTER_BYTES>().0;
    match quarters {
        [a, b, c] => {
            for at in (0..QUARTER_BYTES).step_by(64) {
                let last = load(&nibbles[3][at..]);
                let bit = |bit: i8| _mm512_and_si512(last, _mm512_set1_epi8(bit));
                let parts = [
                    (&mut *a, _mm512_slli_epi32::<3>(bit(0x11))),
                    (&mut *b, _mm512_slli_epi32::<2>(bit(0x22))),
                    (&mut *c, _mm512_slli_epi32::<1>(bit(0x44))),
                ];
                for ((words, top), nibbles) in parts.into_iter().zip(nibbles) {
                    store(_mm512_or_si512(load(&nibbles[at..]), top), &mut words[at..]);
                }
            }
        }
        _ => quarters.copy_from_slice(nibbles),
    }
    used
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2")]
fn decode_tile(
    book: &Book,
    mantissas: &[u8; VALUES],
    quarters: &[[u8; QUARTER_BYTES]],
    escapes: &[u8],
    out: &mut [u8; TILE_BYTES],
) -> bool {
    let mut nibbles = [[0_u8; QUARTER_BYTES]; 4];
    match quarters {
        [a, b, c] => {
            for at in (0..QUARTER_BYTES).step_by(64) {
                let words = [a, b, c].map(|words| load(&words[at..]));
                let low = _mm512_set1_epi8(0x77);
                for (words, nibbles) in words.into_iter().zip(&mut nibbles) {
                    store(_mm512_and_si512(words, low), &mut nibbles[at..]);
                }
                let bit = |words, bit: i8| _mm512_and_si512(words, _mm512_set1_epi8(bit));
                let last = _mm512_or_si512(
                    bit(_mm512_srli_epi32::<3>(words[0]), 0x11),
                    _mm512_or_si512(
                        bit(_mm512_srli_epi32::<2>(words[1]), 0x22),
                        bit(_mm512_srli_epi32::<1>(words[2]), 0x44),
                    ),
                );
                store(last, &mut nibbles[3][at..]);
            }
        }
        _ => nibbles.copy_from_slice(quarters),
    }
    let nibbles = nibbles.as_flattened();
    // SAFETY: `exponents` is an array of the 16 bytes that are read.
    let book_lane = unsafe { _mm_loadu_si128(book.exponents.as_ptr().cast()) };
    let table = _mm512_broadcast_i32x4(book_lane);
    let escape = _mm512_set1_epi8(book.escape() as i8);
    let (first_half, second_half) = interleaved_bytes();
    let low = _mm512_set1_epi8(0x7f);
    let mut used = 0;
    for step in 0..VALUES / STEP {
        let half = &nibbles[STEP / 2 * step..][..STEP / 2];
        // SAFETY: `half` has the 32 bytes that are loaded.
        let pairs = _mm512_cvtepu8_epi16(unsafe { _mm256_loadu_si256(half.as_ptr().cast()) });
        let spread = _mm512_or_si512(pairs, _mm512_slli_epi16::<4>(pairs));
        let codes = _mm512_and_si512(spread, _mm512_set1_epi8(0x0f));
        let mut exponents = _mm512_shuffle_epi8(table, codes);
        let escaped = _mm512_cmpeq_epi8_mask(codes, escape);
        let count = escaped.count_ones() as usize;
        if count > 0 {
            let Some(stored) = escapes.get(used..used + count) else {
                return false;
            };
            let mask = low_bits(count);
            // SAFETY: only bytes whose bit in the mask is set are read: the first `count`, which
            // `stored` has.
            let packed = unsafe { _mm512_maskz_loadu_epi8(mask, stored.as_ptr().cast()) };
            exponents = _mm512_mask_expand_epi8(exponents, escaped, packed);
            used += count;
        }
        let mantissas = load(&mantissas[STEP * step..]);
        // Bytes have no shifts: bits that come from a neighbour are masked off.
        let lower = _mm512_or_si512(
            _mm512_and_si512(mantissas, low),
            _mm512_andnot_si512(low, _mm512_slli_epi16::<7>(exponents)),
        );
        let upper = _mm512_or_si512(
            _mm512_andnot_si512(low, mantissas),
            _mm512_and_si512(_mm512_srli_epi16::<1>(exponents), low),
        );
        let values = &mut out[2 * STEP * step..];
        store(_mm512_permutex2var_epi8(lower, first_half, upper), values);
        store(
            _mm512_permutex2var_epi8(lower, second_half, upper),
            &mut values[STEP..],
        );
    }
    used == escapes.len()
}

fn low_bits(count: usize) -> u64 {
    u64::MAX >> (64 - count)
}

#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8]) -> __m512i {
    let bytes = &bytes[..64];
    // SAFETY: the slice was cut to the 64 bytes that are read; any alignment will do.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn store(vector: __m512i, bytes: &mut [u8]) {
    let bytes = &mut bytes[..64];
    // SAFETY: the slice was cut to the 64 bytes that are written; any alignment will do.
    unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), vector) }
}

/// Picks the lower byte of each 16 bits out of two vectors.
#[target_feature(enable = "avx512f")]
fn even_bytes() -> __m512i {
    const INDEX: [u8; 64] = {
        let mut index = [0; 64];
        let mut i = 0;
        while i < 64 {
            index[i] = 2 * i as u8;
            i += 1;
        }
        index
    };
    load(&INDEX)
}

/// Puts the bytes of two vectors in turn: the first 32 pairs, and the last.
#[target_feature(enable = "avx512f")]
fn interleaved_bytes() -> (__m512i, __m512i) {
    const INDEX: [u8; 128] = {
        let mut index = [0; 128];
        let mut i = 0;
        while i < 128 {
            index[i] = (i / 2 + i % 2 * 64) as u8;
            i += 1;
        }
        index
    };
    (load(&INDEX), load(&INDEX[64..]))
}
