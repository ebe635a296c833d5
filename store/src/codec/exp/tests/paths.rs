//! Every set of instructions that this processor has writes the same bytes, and reads and refuses the same
//! ones, without touching anything outside of what it was given.
//!
//! Where there is only the portable one, what is compared is the same code and only the rest is shown.

use super::*;
use crate::codec::guarded::Guarded;

/// Whole tiles and shorter ones.
const PLANES: [(&[u32], u32); 5] = [
    (&[1152], 16),
    (&[384, 384], 16),
    (&[2048, 2048], 3),
    (&[6, 2, 4000, 90], 1),
    (&[5000, 70], 1),
];

/// The encoded slab, which each writes into just as much memory.
fn encode_on_all(shape: &ExpShape, raw: &[u8], what: &str) -> Option<Vec<u8>> {
    let raw = Guarded::copy_of(raw);
    let all = Vectors::available().map(|vectors| {
        let shape = shape.clone().with(vectors);
        let mut out = Guarded::zeroed(raw.len());
        let bytes = super::super::encode(&shape, &raw, &mut out)?;
        let mut exact = Guarded::zeroed(bytes);
        assert_eq!(super::super::encode(&shape, &raw, &mut exact), Some(bytes));
        assert!(exact[..] == out[..bytes], "{what}");
        let mut short = Guarded::zeroed(bytes - 1);
        assert_eq!(super::super::encode(&shape, &raw, &mut short), None);
        Some(exact.to_vec())
    });
    let all: Vec<_> = all.collect();
    assert!(all.iter().all(|stored| *stored == all[0]), "{what}");
    all.into_iter().next_back().flatten()
}

/// What each reads; what it refuses, it refuses for the same reason.
fn decode_on_all(shape: &ExpShape, stored: &[u8], what: &str) -> Result<Vec<u8>, String> {
    let stored = Guarded::copy_of(stored);
    let all = Vectors::available().map(|vectors| {
        let shape = shape.clone().with(vectors);
        let mut out = Guarded::zeroed(shape.raw_bytes());
        let decoded = Decoder::new(&shape, &stored).and_then(|slab| slab.all(&mut out));
        decoded.map(|()| out.to_vec()).map_err(|error| {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}");
            error.to_string()
        })
    });
    let all: Vec<_> = all.collect();
    assert!(all.iter().all(|read| *read == all[0]), "{what}");
    all.into_iter().next_back().expect("the portable one")
}

#[test]
fn they_agree_on_whatever_is_encoded() {
    for (planes, tokens) in PLANES {
        let shape = shape(planes, tokens);
        let count = shape.raw_bytes() / 2;
        let mut slabs = adversarial(count);
        slabs.extend((0..40).map(|seed| {
            // From one exponent to all of them.
            let (kinds, mut state) = (1 + 7 * seed, seed | 1);
            let value = |_| {
                let random = random(&mut state);
                let common = 100 + (random >> 32) % (4 + seed % 13);
                let exponent = match random & 7 == 0 {
                    true => (random >> 40) % kinds,
                    false => common,
                };
                ((exponent & 0xff) << 7 | random >> 8 & 0x807f) as u16
            };
            ("a mixture", bytes((0..count).map(value)))
        }));
        for (what, raw) in slabs {
            if let Some(stored) = encode_on_all(&shape, &raw, what) {
                let read = decode_on_all(&shape, &stored, what);
                assert!(read.as_deref() == Ok(&raw[..]), "{what}");
            }
        }
    }
}

/// Damage that leaves the header, the length and the offsets plausible gets furthest: some of it decodes
/// to something, and then to the same everywhere.
#[test]
fn they_agree_on_malformed_slabs() {
    let mut state = 19;
    let (mut read, mut refused) = (0, 0);
    for round in 0..3000 {
        let (planes, tokens) = PLANES[round % PLANES.len()];
        let shape = shape(planes, tokens);
        let raw = like_kv(shape.raw_bytes() / 2, 120, round as u64 + 1);
        let mut stored = encode(&shape, &raw).expect("gains");
        let mut below = |bound: usize| (random(&mut state) >> 20) as usize % bound.max(1);
        let offsets = {
            let decoder = Decoder::new(&shape, &stored).expect("ours");
            decoder.areas.offsets..decoder.areas.escapes
        };
        match round / PLANES.len() % 6 {
            // Other mantissas, codes, escapes.
            0 => (0..1 + below(3)).for_each(|_| {
                let at = HEADER_BYTES + below(stored.len() - HEADER_BYTES);
                if !offsets.contains(&at) {
                    stored[at] = below(256) as u8;
                }
            }),
            // All codes are escapes, or none is.
            1 => {
                let fill = [0, 0x77, 0xff][below(3)];
                stored[HEADER_BYTES..offsets.start].fill(fill);
            }
            // Other offsets, near to where they were.
            2 => {
                let at = offsets.start + 4 * below(offsets.len() / 4);
                let moved = u32::from_le_bytes(*stored[at..].first_chunk().expect("an offset"));
                let moved = moved.wrapping_add(below(9) as u32).wrapping_sub(4);
                stored[at..at + 4].copy_from_slice(&moved.to_le_bytes());
            }
            // More or fewer escapes than the codes want, and a header that says so.
            3 => {
                let escapes = stored.len() - offsets.end;
                let other = below(2 * escapes + 2000);
                stored.resize(offsets.end + other, 0x41);
                stored[..4].copy_from_slice(&(other as u32).to_le_bytes());
            }
            // Another codebook, or codes of another size in a slab of that length.
            4 => {
                let plane = below(planes.len());
                stored[16 + 16 * plane + below(7)] = below(256) as u8;
                stored[4 + plane] = 3 + below(2) as u8;
                let bits = stored[4..4 + planes.len()].iter().copied();
                let length = shape.areas(bits).escapes;
                let escapes = below(3000);
                stored.resize(length + escapes, 0);
                stored[..4].copy_from_slice(&(escapes as u32).to_le_bytes());
            }
            // Anything at all behind a sound header.
            _ => stored[HEADER_BYTES..]
                .iter_mut()
                .for_each(|byte| *byte = below(256) as u8),
        }
        match decode_on_all(&shape, &stored, &format!("round {round}")) {
            Ok(_) => read += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(
        read > 100 && refused > 100,
        "both are tried: {read}, {refused}"
    );
}

#[test]
fn a_slab_that_is_cut_short_is_refused_on_all() {
    let shape = shape(&[384, 384], 16);
    let raw = like_kv(shape.raw_bytes() / 2, 120, 3);
    let stored = encode(&shape, &raw).expect("gains");
    for bytes in (0..stored.len()).step_by(13).chain([stored.len() - 1]) {
        assert!(decode_on_all(&shape, &stored[..bytes], "cut").is_err());
    }
}

#[test]
fn both_ways_of_finding_equal_codes_find_the_same() {
    let mut state = 23;
    for _ in 0..500 {
        let random_codes = [(); 64].map(|()| (random(&mut state) >> 20) as u8 & 15);
        for wanted in [0, 7, 15] {
            let expected = (0..64)
                .filter(|&at| random_codes[at] == wanted)
                .fold(0, |mask, at| mask | 1 << at);
            assert_eq!(tile::equal_mask_of_words(&random_codes, wanted), expected);
            assert_eq!(tile::equal_mask(&random_codes, wanted), expected);
        }
    }
}
