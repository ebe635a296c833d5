//! One tile, in portable code that compilers turn into vectors; whole tiles go to `avx512` where the
//! processor has it.

use super::TILE_BYTES;
use super::book::Book;
use super::shape::GROUP_VALUES;

/// Code words of a quarter of a whole tile, in bytes.
pub(super) const QUARTER_BYTES: usize = 128;

/// How often each exponent comes in `raw`.
pub(super) fn count(raw: &[u8]) -> [u32; 256] {
    #[cfg(target_arch = "x86_64")]
    if raw.len() >= 4 * TILE_BYTES && super::avx512::is_there() {
        // The first tile says which exponents are common: those are counted by comparing.
        let (first, rest) = raw.split_at(TILE_BYTES);
        let (tiles, last) = rest.split_at(rest.len() / TILE_BYTES * TILE_BYTES);
        let mut counts = count_portable(first);
        for (count, more) in counts.iter_mut().zip(count_portable(last)) {
            *count += more;
        }
        super::avx512::count(tiles, &mut counts);
        return counts;
    }
    count_portable(raw)
}

pub(super) fn count_portable(raw: &[u8]) -> [u32; 256] {
    // Four tables, so that a run of one exponent does not wait for its own counter.
    let mut tables = [[0_u32; 256]; 4];
    let (words, rest) = raw.as_chunks::<8>();
    for word in words {
        let word = u64::from_le_bytes(*word);
        for (value, table) in tables.iter_mut().enumerate() {
            table[(word >> (16 * value + 7) & 0xff) as usize] += 1;
        }
    }
    for value in rest.as_chunks::<2>().0 {
        tables[0][usize::from(u16::from_le_bytes(*value) >> 7 & 0xff)] += 1;
    }
    let [mut sum, others @ ..] = tables;
    for table in others {
        sum.iter_mut().zip(table).for_each(|(sum, n)| *sum += n);
    }
    sum
}

/// Encodes a tile and returns the number of its escapes. `mantissas` and `codes` have the tile's
/// length, `escapes` at least as many bytes as the tile has escapes.
pub(super) fn encode(
    raw: &[u8],
    book: &Book,
    mantissas: &mut [u8],
    codes: &mut [u8],
    escapes: &mut [u8],
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if raw.len() == TILE_BYTES && super::avx512::is_there() {
        return super::avx512::encode(raw, book, mantissas, codes, escapes);
    }
    encode_portable(raw, book, mantissas, codes, escapes)
}

/// Decodes a tile into `out`, which has as many bytes as the tile has raw. `false` where `escapes`
/// are not exactly those that its codes want.
pub(super) fn decode(
    book: &Book,
    mantissas: &[u8],
    codes: &[u8],
    escapes: &[u8],
    out: &mut [u8],
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if out.len() == TILE_BYTES && super::avx512::is_there() {
        return super::avx512::decode(book, mantissas, codes, escapes, out);
    }
    decode_portable(book, mantissas, codes, escapes, out)
}

pub(super) fn encode_portable(
    raw: &[u8],
    book: &Book,
    mantissas: &mut [u8],
    words: &mut [u8],
    escapes: &mut [u8],
) -> usize {
    let values = raw.as_chunks::<2>().0;
    let escape = book.escape();
    let mut codes = [0_u8; TILE_BYTES / 2];
    let mut used = 0;
    mantissas[values.len()..].fill(0);
    for ((value, mantissa), code) in values.iter().zip(mantissas).zip(&mut codes) {
        let value = u16::from_le_bytes(*value);
        *mantissa = (value >> 8 & 0x80 | value & 0x7f) as u8;
        *code = book.codes[usize::from(value >> 7 & 0xff)];
    }
    // Escapes are few: eight codes at a time are looked at for one.
    for (eight, at) in codes.as_chunks::<8>().0.iter().zip((0..).step_by(8)) {
        if eight.contains(&escape) {
            for value in (at..at + 8).filter(|&value| codes[value] == escape) {
                escapes[used] = exponent(&values[value]);
                used += 1;
            }
        }
    }
    let quarter = words.len() / usize::from(book.bits);
    let mut nibbles = [0_u8; TILE_BYTES / 4];
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

pub(super) fn decode_portable(
    book: &Book,
    mantissas: &[u8],
    words: &[u8],
    escapes: &[u8],
    out: &mut [u8],
) -> bool {
    let escape = book.escape();
    let quarter = words.len() / usize::from(book.bits);
    let mut nibbles = [0_u8; TILE_BYTES / 4];
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
    let mut exponents = [0_u8; TILE_BYTES / 2];
    let mut escapes = escapes.iter();
    let mut enough = true;
    let pairs = exponents.as_chunks_mut::<2>().0;
    for (pair, nibbles) in pairs.iter_mut().zip(nibbles).take(2 * quarter * 2) {
        let codes = [nibbles & 15, nibbles >> 4];
        *pair = codes.map(|code| book.exponents[usize::from(code)]);
        if codes.contains(&escape) {
            for (exponent, _) in pair.iter_mut().zip(codes).filter(|(_, c)| *c == escape) {
                match escapes.next() {
                    Some(stored) => *exponent = *stored,
                    None => enough = false,
                }
            }
        }
    }
    let values = out.as_chunks_mut::<2>().0.iter_mut();
    for ((value, &mantissa), &exponent) in values.zip(mantissas).zip(&exponents) {
        let mantissa = u16::from(mantissa);
        *value =
            (mantissa << 8 & 0x8000 | u16::from(exponent) << 7 | mantissa & 0x7f).to_le_bytes();
    }
    enough && escapes.next().is_none()
}

fn exponent(value: &[u8; 2]) -> u8 {
    (u16::from_le_bytes(*value) >> 7) as u8
}

const _: () = assert!(TILE_BYTES / 2 == 4 * 8 * QUARTER_BYTES / 4 && GROUP_VALUES == 4 * 8);
