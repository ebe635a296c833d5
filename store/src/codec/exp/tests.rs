//! Shown: bit-exact for every value and shape; the bytes are those of the format, whichever code
//! writes them; every tile decodes on its own; and hostile bytes never do harm.

mod paths;

use proptest::prelude::*;

use super::*;
use crate::{Dtype, ErrorKind, KvGeometry, Plane};

fn shape(planes: &[u32], block_tokens: u32) -> ExpShape {
    let plane = |&head_bytes: &u32| Plane {
        heads: 1,
        head_bytes,
    };
    ExpShape::new(&KvGeometry {
        layers: 1,
        planes: planes.iter().map(plane).collect(),
        block_tokens,
        dtype: Dtype::Bf16,
    })
    .expect("bf16")
}

fn bytes(values: impl IntoIterator<Item = u16>) -> Vec<u8> {
    values.into_iter().flat_map(u16::to_le_bytes).collect()
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Values whose exponents fall off on both sides of `centre` by a factor of two to three, as KV's.
fn like_kv(count: usize, centre: u8, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    bytes((0..count).map(|_| {
        let random = random(&mut state);
        let below = ((random >> 32) as u32 | 1 << 31).trailing_zeros();
        let exponent = u64::from(centre) + (random >> 8 & 1) - u64::from(below.min(20));
        (exponent << 7 | random & 0x807f) as u16
    }))
}

fn encode(shape: &ExpShape, raw: &[u8]) -> Option<Vec<u8>> {
    // Dirty, so that a byte which is not written shows.
    let mut out = vec![0xa5; raw.len() + 64];
    let bytes = super::encode(shape, raw, &mut out)?;
    assert!(out[bytes..].iter().all(|&byte| byte == 0xa5));
    out.truncate(bytes);
    Some(out)
}

fn decode(shape: &ExpShape, stored: &[u8]) -> Result<Vec<u8>> {
    let mut out = vec![0x5a; shape.raw_bytes()];
    Decoder::new(shape, stored)?.all(&mut out)?;
    Ok(out)
}

/// The format page once more, value by value, without a thought for speed.
fn by_the_page(shape_planes: &[usize], raw: &[u8]) -> Vec<u8> {
    let values: Vec<u16> = raw
        .chunks(2)
        .map(|v| u16::from_le_bytes([v[0], v[1]]))
        .collect();
    let (mut header, mut mantissas, mut words) = (vec![0; 128], Vec::new(), Vec::new());
    let (mut offsets, mut escapes) = (Vec::new(), Vec::new());
    let mut start = 0;
    for (plane, &count) in shape_planes.iter().enumerate() {
        let plane_values = &values[start..start + count];
        start += count;
        let exponent = |value: u16| (value >> 7 & 0xff) as u8;
        let counts = |i: usize| i % 8 == ((i / 8 * 0xcc9e_2d51) >> 29) % 8;
        let counted: Vec<u8> = (0..count)
            .filter(|&i| count < 8192 || counts(i))
            .map(|i| exponent(plane_values[i]))
            .collect();
        let weight = if count < 8192 { 1 } else { 8 };
        let often = |e: u8| weight * counted.iter().filter(|&&other| other == e).count();
        let count = weight * counted.len();
        let mut order: Vec<(usize, u8)> = (0..=255).map(|e| (count - often(e), e)).collect();
        order.sort_unstable();
        let beyond =
            |codes: usize| -> usize { order[codes..].iter().map(|(rest, _)| count - rest).sum() };
        let groups = count.div_ceil(32);
        let bits = if 12 * groups + beyond(7) <= 16 * groups + beyond(15) {
            3
        } else {
            4
        };
        let escape = (1 << bits) - 1;
        header[4 + plane] = bits;
        for code in 0..escape {
            header[16 + 16 * plane + code] = order[code].1;
        }
        for tile in plane_values.chunks(1024) {
            offsets.extend((escapes.len() as u32).to_le_bytes());
            let n = tile.len().div_ceil(32);
            let mut codes = vec![0; 32 * n];
            for (at, &value) in tile.iter().enumerate() {
                let e = exponent(value);
                let code = order[..escape].iter().position(|(_, other)| *other == e);
                codes[at] = code.unwrap_or(escape) as u32;
                if code.is_none() {
                    escapes.push(e);
                }
                mantissas.push((value >> 8 & 0x80 | value & 0x7f) as u8);
            }
            mantissas.extend(std::iter::repeat_n(0, 32 * n - tile.len()));
            let stored = usize::from(bits).min(4);
            for quarter in 0..stored {
                for i in 0..n {
                    let mut word = 0;
                    for k in 0..8 {
                        word |= codes[8 * n * quarter + 8 * i + k] << (4 * k);
                        if bits == 3 {
                            let other = codes[24 * n + 8 * i + k];
                            word |= (other >> quarter & 1) << (4 * k + 3);
                        }
                    }
                    words.extend(word.to_le_bytes());
                }
            }
        }
    }
    header[..4].copy_from_slice(&(escapes.len() as u32).to_le_bytes());
    [header, mantissas, words, offsets, escapes].concat()
}

/// Exponents that are hard on a codebook, by what they are.
fn adversarial(count: usize) -> Vec<(&'static str, Vec<u8>)> {
    let exponents =
        |exponent: &dyn Fn(usize) -> usize| {
            bytes((0..count).map(|i| {
                ((exponent(i) as u16 & 0xff) << 7) | ((i as u16).wrapping_mul(37) & 0x807f)
            }))
        };
    let tile = |i: usize| i / TILE_VALUES;
    vec![
        ("each as often as the others", exponents(&|i| i)),
        ("eight as often as each other", exponents(&|i| 120 + i % 8)),
        (
            "sixteen as often as each other",
            exponents(&|i| 16 * (i % 16)),
        ),
        ("one in each tile", exponents(&|i| 7 * tile(i))),
        (
            "escapes in the last tile alone",
            exponents(&|i| match tile(i) == tile(count - 1) {
                true => 30 + i % 200,
                false => 3,
            }),
        ),
        (
            "escapes at the ends of vectors",
            exponents(&|i| match i % 64 {
                0 => 200 + i / 64 % 20,
                63 => 220 + i / 64 % 20,
                _ => i % 3,
            }),
        ),
        ("zeros", vec![0; 2 * count]),
        ("ones", vec![0xff; 2 * count]),
        (
            "infinities",
            bytes((0..count).map(|i| 0x7f80 | ((i as u16 & 1) << 15))),
        ),
        (
            "NaN and denormals",
            bytes((0..count).map(|i| match i % 3 {
                0 => 0x7fc0 | i as u16 & 0x803f,
                _ => i as u16 & 0x807f,
            })),
        ),
        ("noise", {
            let mut state = 11;
            bytes((0..count).map(|_| random(&mut state) as u16))
        }),
    ]
}

/// Planes of 1 to 3 tiles and a bit, also shorter than a group; and those just not and just so long that
/// only some of their values count, and some that do not end with a vector.
const SHAPES: [(&[u32], u32); 9] = [
    (&[16_382, 16_384], 1),
    (&[2048], 16),
    (&[17_994, 2, 40_006], 1),
    (&[2048, 2048], 3),
    (&[1152], 4),
    (&[128, 128], 16),
    (&[6, 2, 4000, 90], 1),
    (&[2, 2], 33),
    (&[5000, 70], 1),
];

#[test]
fn the_bytes_are_those_of_the_format() {
    for (index, (planes, tokens)) in SHAPES.into_iter().enumerate() {
        let shape = shape(planes, tokens);
        let counts: Vec<usize> = planes.iter().map(|p| (p * tokens / 2) as usize).collect();
        let total = counts.iter().sum();
        for raw in [
            like_kv(total, 120, index as u64 + 1),
            // Twelve exponents equally often: codes of 4 bits.
            bytes((0..total as u16).map(|i| ((i * 7 % 12 + 100) << 7) | (i % 128))),
        ]
        .into_iter()
        .chain(adversarial(total).into_iter().map(|(_, raw)| raw))
        {
            let expected = by_the_page(&counts, &raw);
            match encode(&shape, &raw) {
                Some(stored) => assert!(stored == expected, "shape {index}"),
                None => assert!(expected.len() >= raw.len(), "shape {index}"),
            }
        }
    }
}

#[test]
fn every_bf16_value_comes_back() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    // Each among many of a kind, so that the slab gains and each is an escape once and coded once.
    for coded in [0_u16, 0x7f80, 0x3f80, 0xff80] {
        for some in all.chunks(4096) {
            let plain = (0..12_288).map(|i| coded | i & 0x7f);
            let raw = bytes(plain.clone().chain(some.iter().copied()).chain(plain));
            let shape = shape(&[raw.len() as u32], 1);
            let stored = encode(&shape, &raw).expect("most values are of a kind");
            assert!(decode(&shape, &stored).expect("ours") == raw);
        }
    }
}

#[test]
fn noise_is_kept_raw() {
    let mut state = 3;
    let shape = shape(&[2048], 16);
    let noise: Vec<u8> = (0..32_768).map(|_| random(&mut state) as u8).collect();
    assert!(encode(&shape, &noise).is_none());
}

/// A plane of 8192 values whose counted ones are all of one exponent, and of the others the last `escapes` of
/// two hundred different ones.
fn hidden(escapes: usize) -> Vec<u8> {
    let counts = |i: usize| i % 8 == counts::counted_in(i / 8);
    let mut values: Vec<u16> = (0..8192).map(|i| 0x3f80 | i & 0x7f).collect();
    let others = (0..8192).rev().filter(|&i| !counts(i)).take(escapes);
    for (at, number) in others.zip(0_u16..) {
        values[at] = (number % 100 + 10 + number % 2 * 130) << 7 | number & 0x807f;
    }
    bytes(values)
}

#[test]
fn what_the_counted_values_hide_costs_bytes_and_never_more_than_raw() {
    let shape = shape(&[16_384], 1);
    // 128 of header, 32 + 12 a group, 4 a tile: so many escapes make it as long as raw.
    let most = 16_384 - 128 - 256 * 44 - 4 * 8;
    for escapes in [0, 1, 1000, most - 1, most, most + 1, 7168] {
        let raw = hidden(escapes);
        let expected = by_the_page(&[8192], &raw);
        match encode(&shape, &raw) {
            Some(stored) => {
                assert!(escapes < most && stored == expected, "{escapes}");
                assert_eq!(stored.len(), raw.len() - (most - escapes));
                assert!(decode(&shape, &stored).expect("ours") == raw);
            }
            None => assert!(escapes >= most && expected.len() >= raw.len(), "{escapes}"),
        }
    }
}

/// Else a codebook could be that of some channels alone.
#[test]
fn every_channel_has_its_turn_in_a_block() {
    let mut least = 8;
    for head in [64, 80, 96, 112, 128, 192, 256, 512] {
        for heads in [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 32] {
            let vectors = head * heads / 8;
            for tokens in [16, 32, 64, 128] {
                if tokens * vectors * 8 < counts::SAMPLED_FROM {
                    continue;
                }
                for part in 0..vectors {
                    let turns = (0..tokens).map(|token| counts::counted_in(token * vectors + part));
                    let seen = turns
                        .fold(0_u8, |seen, value| seen | 1 << value)
                        .count_ones();
                    let whole = [64, 128, 256].contains(&head) && heads != 5 && heads != 10;
                    assert!(
                        !whole || seen >= 7,
                        "{heads} heads of {head}, {tokens}: {seen}"
                    );
                    least = least.min(seen);
                }
            }
        }
    }
    assert!(least >= 4, "{least}");
}

#[test]
fn other_dtypes_have_no_shape() {
    for dtype in [Dtype::F16, Dtype::F32, Dtype::Fp8E4m3, Dtype::Opaque] {
        let geometry = KvGeometry::gqa(1, 1, 64, dtype, 16).expect("valid");
        assert!(ExpShape::new(&geometry).is_none());
    }
}

#[test]
fn any_tile_decodes_without_the_others() {
    for (planes, tokens) in SHAPES {
        let shape = shape(planes, tokens);
        let raw = like_kv(shape.raw_bytes() / 2, 120, 9);
        let Some(stored) = encode(&shape, &raw) else {
            assert!(shape.raw_bytes() < 600, "the header eats the gain");
            continue;
        };
        let decoder = Decoder::new(&shape, &stored).expect("ours");
        let mut covered = 0;
        let mut out = [0; TILE_BYTES];
        for index in 0..decoder.tiles() {
            let bytes = decoder.tile(index, &mut out).expect("ours");
            assert_eq!(decoder.raw_range(index), covered..covered + bytes);
            assert!(out[..bytes] == raw[covered..covered + bytes]);
            covered += bytes;
        }
        assert_eq!(covered, raw.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn whatever_is_encoded_comes_back(
        shape_index in 0..SHAPES.len(),
        kinds in 1_u64..40,
        spread in 1_u64..256,
        seed in 1_u64..,
    ) {
        let (planes, tokens) = SHAPES[shape_index];
        let shape = shape(planes, tokens);
        let mut state = seed;
        let raw = bytes((0..shape.raw_bytes() / 2).map(|_| {
            let random = random(&mut state);
            let exponent = ((random >> 40) % kinds * spread) & 0xff;
            (exponent << 7 | random & 0x807f) as u16
        }));
        if let Some(stored) = encode(&shape, &raw) {
            prop_assert!(stored.len() < raw.len());
            prop_assert!(decode(&shape, &stored).expect("ours") == raw);
        }
    }

    /// Any bytes in any place of an encoded slab, which may also be cut short or longer.
    #[test]
    fn hostile_bytes_decode_to_something_or_are_corrupt(
        shape_index in 0..SHAPES.len(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        header in prop::collection::vec((0_usize..128, any::<u8>()), 0..3),
        cut in 0_usize..3,
        more in 0_usize..3,
    ) {
        let (planes, tokens) = SHAPES[shape_index];
        let shape = shape(planes, tokens);
        let raw = like_kv(shape.raw_bytes() / 2, 120, 7);
        let mut stored = encode(&shape, &raw).unwrap_or(vec![3; 200]);
        for (at, byte) in edits {
            let at = at.index(stored.len());
            stored[at] = byte;
        }
        for (at, byte) in header {
            stored[at] = byte;
        }
        stored.truncate(stored.len() - cut);
        stored.extend(std::iter::repeat_n(0, more));
        if let Err(error) = decode(&shape, &stored) {
            prop_assert_eq!(error.kind(), ErrorKind::Corrupt);
        }
    }
}

#[test]
fn each_rule_of_the_reader_is_enforced() {
    let shape = shape(&[2048, 2048], 3);
    let raw = like_kv(6144, 120, 11);
    let stored = encode(&shape, &raw).expect("gains");
    assert_eq!(stored[4..6], [3, 3]);
    let offsets = 128 + 32 * 192 + 12 * 192;
    let cases: [(&str, usize, u8); 9] = [
        ("another length", 0, stored[0] + 1),
        ("another size", 4, 5),
        ("another size", 5, 0),
        ("zeros", 6, 3),
        ("zeros", 8, 1),
        ("zeros", 16 + 7, 1),
        ("zeros", 16 + 32, 1),
        ("out of order", offsets, 1),
        ("escapes", offsets + 4, stored[offsets + 4] + 1),
    ];
    for (reason, at, byte) in cases {
        let mut hostile = stored.clone();
        hostile[at] = byte;
        let error = decode(&shape, &hostile).expect_err(reason);
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(reason), "{at}: {error}");
    }
    for bytes in [0, 127, stored.len() - 1] {
        assert!(decode(&shape, &stored[..bytes]).is_err());
    }
}
