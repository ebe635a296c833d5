//! The slab checksum: 64 bits, computed in independent 4 KiB pieces.
//!
//! Pieces may be summed in any order, so SIMD lanes, threads and GPU blocks all arrive at the same
//! value. Each 8-byte word is folded into two sums: a keyed product of its halves (as in NH, Black
//! et al., UMAC, 1999), which notices a word in the wrong place, and the plain sum, which notices
//! every single flipped bit for certain. `docs/format.md` specifies it to the bit.

/// Bytes of one independent piece.
const PIECE: usize = 4096;
const WORDS: usize = PIECE / 8;

/// Keys for the words of a piece: splitmix64 (Steele et al., 2014) from a fixed seed.
static KEYS: [u64; WORDS] = {
    let mut keys = [0; WORDS];
    let mut state = 0x7374_656d_6b76_2d30; // "stemkv-0"
    let mut i = 0;
    while i < WORDS {
        state = u64::wrapping_add(state, 0x9e37_79b9_7f4a_7c15);
        keys[i] = mix(state);
        i += 1;
    }
    keys
};

/// By word: what zeros from there to the end of a piece add to its keyed product.
static ZEROS: [u64; WORDS + 1] = {
    let mut zeros = [0; WORDS + 1];
    let mut i = WORDS;
    while i > 0 {
        i -= 1;
        zeros[i] = u64::wrapping_add(zeros[i + 1], product_of(KEYS[i]));
    }
    zeros
};

/// What a word adds to the keyed product.
const fn product_of(keyed: u64) -> u64 {
    (keyed & 0xffff_ffff).wrapping_mul(keyed >> 32)
}

/// splitmix64's finaliser: a bijection on 64 bits.
const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The checksum of a run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Checksum(pub u64);

/// Computes a [`Checksum`], in one go or while the bytes pass.
#[derive(Debug, Default)]
pub struct Checksummer {
    sum: u64,
    bytes: u64,
}

impl Checksummer {
    /// Bytes that [`Checksummer::update`] wants at a time, but for the last.
    pub const PIECE_BYTES: usize = PIECE;

    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> Checksum {
        let mut summer = Checksummer::default();
        summer.update(bytes);
        summer.finish()
    }

    /// The checksum of a piece that starts with `bytes`, whole words, and is zero behind them, without a
    /// look at the zeros.
    ///
    /// # Panics
    /// Where that is more than a piece.
    pub(crate) fn of_zero_padded(bytes: &[u8]) -> Checksum {
        let (words, rest) = bytes.as_chunks();
        debug_assert!(rest.is_empty(), "whole words");
        let (product, plain) = sums_of_words(words);
        let mut summer = Checksummer::default();
        summer.fold_sums(product.wrapping_add(ZEROS[words.len()]), plain);
        summer.finish()
    }

    /// Adds `bytes`. All calls but the last must bring a multiple of
    /// [`Checksummer::PIECE_BYTES`].
    ///
    /// # Panics
    /// Where a call follows one that did not.
    pub fn update(&mut self, bytes: &[u8]) {
        assert!(
            self.bytes.is_multiple_of(PIECE as u64),
            "a short piece ends the run"
        );
        let (pieces, rest) = bytes.as_chunks::<PIECE>();
        for piece in pieces {
            self.fold(piece);
        }
        if !rest.is_empty() {
            let mut piece = [0; PIECE];
            piece[..rest.len()].copy_from_slice(rest);
            self.fold(&piece);
            self.bytes = self.bytes - PIECE as u64 + rest.len() as u64;
        }
    }

    fn fold(&mut self, piece: &[u8; PIECE]) {
        let (product, plain) = sums(piece);
        self.fold_sums(product, plain);
    }

    fn fold_sums(&mut self, product: u64, plain: u64) {
        let index = self.bytes / PIECE as u64;
        let piece_sum = mix(product.wrapping_add(mix(plain ^ mix(index))));
        self.sum = self.sum.wrapping_add(piece_sum);
        self.bytes += PIECE as u64;
    }

    /// The checksum of everything that was added. The length is part of it.
    pub fn finish(self) -> Checksum {
        Checksum(mix(self.sum ^ mix(self.bytes)))
    }

    /// The checksum of `bytes` bytes whose pieces sum to `sum`: a GPU sums those.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_pieces(sum: u64, bytes: usize) -> Checksum {
        let bytes = bytes as u64;
        Checksummer { sum, bytes }.finish()
    }
}

/// The keyed product and the plain sum of a piece's words.
fn sums(piece: &[u8; PIECE]) -> (u64, u64) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has the one feature that the function enables.
        return unsafe { sums_with_avx2(piece) };
    }
    portable_sums(piece)
}

/// Twice as fast in the first-level cache as what every x86-64 processor has.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sums_with_avx2(piece: &[u8; PIECE]) -> (u64, u64) {
    portable_sums(piece)
}

#[inline(always)]
fn portable_sums(piece: &[u8; PIECE]) -> (u64, u64) {
    sums_of_words(piece.as_chunks().0)
}

/// Of the first words of a piece.
#[inline(always)]
fn sums_of_words(words: &[[u8; 8]]) -> (u64, u64) {
    let (mut product, mut plain) = (0_u64, 0_u64);
    for (word, key) in words.iter().zip(&KEYS) {
        let word = u64::from_le_bytes(*word);
        product = product.wrapping_add(product_of(word ^ key));
        plain = plain.wrapping_add(word);
    }
    (product, plain)
}

/// Shown: what a checksum notices, and that its value is the format's. Exhaustive where no seed is
/// named.
#[cfg(test)]
mod tests {
    use super::*;

    /// Two whole pieces and a short one.
    fn sample() -> Vec<u8> {
        (0..2 * PIECE as u64 + 1003).map(|i| mix(i) as u8).collect()
    }

    #[test]
    fn every_single_flipped_bit_is_noticed() {
        let mut bytes = sample();
        let sum = Checksummer::of(&bytes);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(Checksummer::of(&bytes), sum, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert_eq!(Checksummer::of(&bytes), sum);
    }

    #[test]
    fn words_and_pieces_that_change_places_are_noticed() {
        let bytes = sample();
        let sum = Checksummer::of(&bytes);
        let swapped = |a: usize, b: usize, len: usize| {
            let mut bytes = bytes.clone();
            let (left, right) = bytes.split_at_mut(b);
            left[a..a + len].swap_with_slice(&mut right[..len]);
            Checksummer::of(&bytes)
        };
        for word in 1..bytes.len() / 8 {
            assert_ne!(swapped(8 * (word - 1), 8 * word, 8), sum, "word {word}");
            assert_ne!(swapped(0, 8 * word, 8), sum, "word {word} and the first");
        }
        for word in 0..WORDS {
            assert_ne!(
                swapped(8 * word, PIECE + 8 * word, 8),
                sum,
                "word {word} of two pieces"
            );
        }
        assert_ne!(swapped(0, PIECE, PIECE), sum);
    }

    #[test]
    fn zeros_at_the_end_are_noticed() {
        let mut sums = std::collections::HashSet::new();
        let mut bytes = vec![1, 2, 3];
        for len in 3..3 * PIECE {
            bytes.resize(len, 0);
            assert!(sums.insert(Checksummer::of(&bytes)), "{len} bytes");
        }
    }

    #[test]
    fn pieces_that_arrive_one_by_one_give_the_same_as_all_at_once() {
        let bytes = sample();
        for step in [PIECE, 2 * PIECE] {
            let mut summer = Checksummer::default();
            bytes.chunks(step).for_each(|part| summer.update(part));
            assert_eq!(summer.finish(), Checksummer::of(&bytes), "{step} at a time");
        }
    }

    /// Where the processor has no AVX2, both are the same code.
    #[test]
    fn pieces_are_summed_alike_with_and_without_avx2() {
        let bytes: Vec<u8> = (0..64 * PIECE as u64)
            .map(|i| (mix(i) >> 32) as u8)
            .collect();
        let extremes = [[0; PIECE], [0xff; PIECE]];
        for piece in bytes.as_chunks::<PIECE>().0.iter().chain(&extremes) {
            assert_eq!(sums(piece), portable_sums(piece));
        }
    }

    #[test]
    fn zeros_need_not_be_looked_at() {
        let bytes = sample();
        for len in (0..=PIECE).step_by(8) {
            let mut piece = [0; PIECE];
            piece[..len].copy_from_slice(&bytes[..len]);
            let sum = Checksummer::of_zero_padded(&piece[..len]);
            assert_eq!(sum, Checksummer::of(&piece), "{len} bytes");
        }
    }

    #[test]
    #[should_panic(expected = "a short piece ends the run")]
    fn nothing_follows_a_short_piece() {
        let mut summer = Checksummer::default();
        summer.update(&[1; 100]);
        summer.update(&[1; PIECE]);
    }

    /// These values are the format's: a change of any of them is a new format version.
    #[test]
    fn the_values_are_those_of_the_format() {
        let counting: Vec<u8> = (0..10_000_u32).map(|i| i as u8).collect();
        let vectors: [(&[u8], u64); 6] = [
            (&[], 0),
            (&[0], 0xd332_8422_b923_623c),
            (b"stemkv", 0x63fa_a6a1_b72b_2659),
            (&[0; PIECE], 0x2017_b7fd_e3a9_eaa4),
            (&[0xff; PIECE + 1], 0x510b_729c_311f_5719),
            (&counting, 0xe144_4765_aae7_5bb2),
        ];
        for (bytes, expected) in vectors {
            let sum = Checksummer::of(bytes).0;
            assert_eq!(
                format!("{sum:#018x}"),
                format!("{expected:#018x}"),
                "{} bytes",
                bytes.len()
            );
        }
    }
}
