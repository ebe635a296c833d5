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
        let mut pieces = bytes.chunks_exact(PIECE);
        for piece in &mut pieces {
            self.fold(piece);
        }
        let rest = pieces.remainder();
        if !rest.is_empty() {
            let mut piece = [0; PIECE];
            piece[..rest.len()].copy_from_slice(rest);
            self.fold(&piece);
            self.bytes = self.bytes - PIECE as u64 + rest.len() as u64;
        }
    }

    fn fold(&mut self, piece: &[u8]) {
        let index = self.bytes / PIECE as u64;
        let (mut product, mut plain) = (0_u64, 0_u64);
        for (word, key) in piece.chunks_exact(8).zip(&KEYS) {
            let word = u64::from_le_bytes(word.try_into().expect("chunks of 8"));
            let keyed = word ^ key;
            product = product.wrapping_add((keyed & 0xffff_ffff).wrapping_mul(keyed >> 32));
            plain = plain.wrapping_add(word);
        }
        let piece_sum = mix(product.wrapping_add(mix(plain ^ mix(index))));
        self.sum = self.sum.wrapping_add(piece_sum);
        self.bytes += PIECE as u64;
    }

    /// The checksum of everything that was added. The length is part of it.
    pub fn finish(self) -> Checksum {
        Checksum(mix(self.sum ^ mix(self.bytes)))
    }
}
