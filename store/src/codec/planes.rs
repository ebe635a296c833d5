//! `planes`: every dtype, for the disk. Values are cut into byte planes; those that shrink go
//! through zstd's Huffman stage, the noise of mantissas stays as it is.

use std::cell::RefCell;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, ParamSwitch, Strategy};

use super::exp;
use crate::{Error, KvGeometry, Result};

/// Shorter pieces are not worth a zstd frame.
const SHORTEST: usize = 256;

/// Bytes that are looked at before a piece is given to zstd.
const SAMPLE: usize = 2048;

/// What a geometry says about its slabs: their planes, and the bytes of a value.
#[derive(Clone, Debug)]
pub struct PlanesShape {
    /// Values of each plane.
    planes: Vec<usize>,
    /// 1, 2 or 4.
    value_bytes: usize,
}

impl PlanesShape {
    /// The shape of the slabs of `geometry`.
    pub fn new(geometry: &KvGeometry) -> PlanesShape {
        let value_bytes = geometry.dtype.bytes();
        let planes = geometry.planes.iter();
        PlanesShape {
            planes: planes
                .map(|plane| plane.token_bytes() * geometry.block_tokens as usize / value_bytes)
                .collect(),
            value_bytes,
        }
    }

    /// Bytes of a raw slab.
    pub fn raw_bytes(&self) -> usize {
        self.value_bytes * self.planes.iter().sum::<usize>()
    }

    fn header_bytes(&self) -> usize {
        4 * self.value_bytes * self.planes.len()
    }
}

/// What a thread keeps: contexts have tables and the pieces memory, which are dear to make for every slab.
struct Kept {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
    /// The pieces of one plane.
    pieces: Vec<u8>,
}

thread_local! {
    static KEPT: RefCell<Option<Kept>> = const { RefCell::new(None) };
}

impl Kept {
    fn new() -> std::io::Result<Kept> {
        let mut compressor = Compressor::new(1)?;
        // Exponents hardly repeat in sequences, but runs do. A match must be long, is looked for in few
        // places and in a small table, so that nearly all that remains is Huffman coding, which zstd would
        // leave out at such a speed.
        for parameter in [
            CParameter::Strategy(Strategy::ZSTD_fast),
            CParameter::WindowLog(17),
            CParameter::HashLog(6),
            CParameter::MinMatch(7),
            CParameter::TargetLength(32),
            CParameter::LiteralCompressionMode(ParamSwitch::Enable),
            CParameter::ContentSizeFlag(false),
        ] {
            compressor.set_parameter(parameter)?;
        }
        Ok(Kept {
            compressor,
            decompressor: Decompressor::new()?,
            pieces: Vec::new(),
        })
    }

    /// Calls `run` with what this thread keeps; `None` where there is no memory for it.
    fn with<R>(run: impl FnOnce(&mut Kept) -> R) -> Option<R> {
        KEPT.with_borrow_mut(|kept| {
            if kept.is_none() {
                *kept = Kept::new().ok();
            }
            kept.as_mut().map(run)
        })
    }
}

/// Encodes a raw slab into the front of `out` and returns how many bytes that took; `None` where it
/// would not become smaller, or does not fit: keep it raw.
///
/// # Panics
/// Where `raw` has another length than `shape` says.
pub fn encode(shape: &PlanesShape, raw: &[u8], out: &mut [u8]) -> Option<usize> {
    assert_eq!(raw.len(), shape.raw_bytes(), "a whole raw slab");
    let room = out.len().min(raw.len() - 1);
    Kept::with(|kept| encode_with(kept, shape, raw, &mut out[..room])).flatten()
}

fn encode_with(kept: &mut Kept, shape: &PlanesShape, raw: &[u8], out: &mut [u8]) -> Option<usize> {
    let Kept {
        compressor, pieces, ..
    } = kept;
    let mut end = shape.header_bytes();
    let mut start = 0;
    for (plane, &values) in shape.planes.iter().enumerate() {
        let plane_raw = &raw[start..start + values * shape.value_bytes];
        start += plane_raw.len();
        // A plane of bytes is its only piece.
        let pieces = match shape.value_bytes {
            1 => plane_raw,
            _ => {
                let pieces = at_least(pieces, plane_raw.len());
                split_bytes(shape.value_bytes, plane_raw, pieces);
                pieces
            }
        };
        for (index, piece) in pieces.chunks_exact(values).enumerate() {
            let stored = squeeze(compressor, piece, out.get_mut(end..)?)?;
            let at = 4 * (plane * shape.value_bytes + index);
            out[at..at + 4].copy_from_slice(&(stored as u32).to_le_bytes());
            end += stored;
        }
    }
    Some(end)
}

/// Stores a piece, compressed or as it is; `None` where there is no room.
fn squeeze(compressor: &mut Compressor<'static>, piece: &[u8], room: &mut [u8]) -> Option<usize> {
    if piece.len() >= SHORTEST && looks_compressible(piece) {
        let limit = room.len().min(piece.len() - 1);
        // An error says that it does not fit, so that it is worth nothing.
        if let Ok(stored) = compressor.compress_to_buffer(piece, &mut room[..limit]) {
            return Some(stored);
        }
    }
    room.get_mut(..piece.len())?.copy_from_slice(piece);
    Some(piece.len())
}

/// Does a sample of the piece have less than 7.8 bits of entropy a byte?
fn looks_compressible(piece: &[u8]) -> bool {
    const RUN: usize = 64;
    let runs = (SAMPLE / RUN).min(piece.len() / RUN);
    let mut counts = [0_u32; 256];
    for run in 0..runs {
        let start = run * (piece.len() - RUN) / runs;
        for &byte in &piece[start..start + RUN] {
            counts[usize::from(byte)] += 1;
        }
    }
    let total = (runs * RUN) as f32;
    let counted = counts.into_iter().filter(|&count| count > 0);
    let bits: f32 = counted
        .map(|count| count as f32 * (total / count as f32).log2())
        .sum();
    bits / total < ENTROPY_MAX
}

/// A sample of 2 KiB of noise has about 7.91 bits.
const ENTROPY_MAX: f32 = 7.8;

/// Decodes a slab, as hostile input.
///
/// # Errors
/// `Corrupt` where the bytes are not an encoded slab; what is in `out` then means nothing.
///
/// # Panics
/// Where `out` has another length than the raw slab.
pub fn decode(shape: &PlanesShape, stored: &[u8], out: &mut [u8]) -> Result<()> {
    assert_eq!(out.len(), shape.raw_bytes(), "a whole raw slab");
    Kept::with(|kept| decode_with(kept, shape, stored, out))
        .unwrap_or_else(|| Err(Error::unavailable("there is no memory to decompress with")))
}

fn decode_with(kept: &mut Kept, shape: &PlanesShape, stored: &[u8], out: &mut [u8]) -> Result<()> {
    let Kept {
        decompressor,
        pieces,
        ..
    } = kept;
    let wrong = |what: &str| Error::corrupt(format!("an encoded slab {what}"));
    let (header, mut rest) = stored
        .split_at_checked(shape.header_bytes())
        .ok_or_else(|| wrong("is shorter than its header"))?;
    let mut lengths = header.as_chunks::<4>().0.iter();
    let mut start = 0;
    for &values in &shape.planes {
        let plane_out = &mut out[start..start + values * shape.value_bytes];
        start += plane_out.len();
        let mut next = || {
            let bytes = lengths.next().expect("the header has one for each piece");
            let (stored, behind) = rest
                .split_at_checked(u32::from_le_bytes(*bytes) as usize)
                .ok_or_else(|| wrong("is shorter than its pieces"))?;
            rest = behind;
            Ok(stored)
        };
        let mut decompress = |stored: &[u8], piece: &mut [u8]| {
            let made = decompressor.decompress_to_buffer(stored, &mut *piece);
            match made.map_err(|error| wrong("does not decompress").caused_by(error))? {
                made if made == values => Ok(()),
                _ => Err(wrong("decompresses to another length")),
            }
        };
        // A plane of bytes is its only piece.
        if shape.value_bytes == 1 {
            match next()? {
                stored if stored.len() == values => plane_out.copy_from_slice(stored),
                stored => decompress(stored, plane_out)?,
            }
            continue;
        }
        // Pieces that are stored as they are are read where they lie.
        let mut sources: [&[u8]; 4] = [&[]; 4];
        let pieces = at_least(pieces, plane_out.len());
        for (piece, source) in pieces.chunks_exact_mut(values).zip(&mut sources) {
            let stored = next()?;
            *source = match stored.len() == values {
                true => stored,
                false => {
                    decompress(stored, piece)?;
                    piece
                }
            };
        }
        join_bytes(shape.value_bytes, sources, plane_out);
    }
    match rest.is_empty() {
        true => Ok(()),
        false => Err(wrong("is longer than its pieces")),
    }
}

/// The first `bytes` of memory that is kept, which hold anything.
fn at_least(kept: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if kept.len() < bytes {
        kept.resize(bytes, 0);
    }
    &mut kept[..bytes]
}

/// Byte planes of values of more than one byte, the highest first; the sign goes to the lowest bit, so that the
/// exponent of bf16 and f32 fills the highest byte.
fn split_bytes(value_bytes: usize, raw: &[u8], split: &mut [u8]) {
    let values = raw.len() / value_bytes;
    match value_bytes {
        2 => {
            let (high, low) = split.split_at_mut(values);
            for ((raw, high), low) in raw.as_chunks::<2>().0.iter().zip(high).zip(low) {
                [*high, *low] = u16::from_le_bytes(*raw).rotate_left(1).to_be_bytes();
            }
        }
        _ => {
            let mut planes = split.chunks_exact_mut(values);
            let [Some(a), Some(b), Some(c), Some(d)] = [(); 4].map(|()| planes.next()) else {
                return;
            };
            let targets = a.iter_mut().zip(b).zip(c.iter_mut().zip(d));
            for (raw, ((a, b), (c, d))) in raw.as_chunks::<4>().0.iter().zip(targets) {
                [*a, *b, *c, *d] = u32::from_le_bytes(*raw).rotate_left(1).to_be_bytes();
            }
        }
    }
}

/// Values that are joined together: a line of the cache of each byte plane.
const STEP: usize = LINE;
const LINE: usize = 64;

/// Bytes that memory is asked for ahead of what is joined, where it may be slower than the processor.
const AHEAD: usize = 1024;

fn join_bytes(value_bytes: usize, [a, b, c, d]: [&[u8]; 4], raw: &mut [u8]) {
    match value_bytes {
        2 => {
            let (steps, rest) = raw.as_chunks_mut::<{ 2 * STEP }>();
            let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<STEP>(), b.as_chunks::<STEP>());
            for ((raw, a), b) in steps.iter_mut().zip(a).zip(b) {
                fetch_ahead(raw);
                fetch_ahead(b);
                join_pairs(a, b, raw);
            }
            join_pairs(a_rest, b_rest, rest);
        }
        _ => {
            let (steps, rest) = raw.as_chunks_mut::<{ 4 * STEP }>();
            let [a, b, c, d] = [a, b, c, d].map(|source| source.as_chunks::<STEP>());
            let sources = a.0.iter().zip(b.0).zip(c.0.iter().zip(d.0));
            for (raw, ((a, b), (c, d))) in steps.iter_mut().zip(sources) {
                fetch_ahead(raw);
                [b, c, d].into_iter().for_each(|source| fetch_ahead(source));
                join_fours([a, b, c, d], raw);
            }
            join_fours([a.1, b.1, c.1, d.1], rest);
        }
    }
}

#[inline(always)]
fn join_pairs(a: &[u8], b: &[u8], raw: &mut [u8]) {
    for ((raw, high), low) in raw.as_chunks_mut::<2>().0.iter_mut().zip(a).zip(b) {
        *raw = u16::from_be_bytes([*high, *low])
            .rotate_right(1)
            .to_le_bytes();
    }
}

#[inline(always)]
fn join_fours([a, b, c, d]: [&[u8]; 4], raw: &mut [u8]) {
    let sources = a.iter().zip(b).zip(c.iter().zip(d));
    for (raw, ((a, b), (c, d))) in raw.as_chunks_mut::<4>().0.iter_mut().zip(sources) {
        *raw = u32::from_be_bytes([*a, *b, *c, *d])
            .rotate_right(1)
            .to_le_bytes();
    }
}

/// Has what lies so far behind `bytes` brought into the cache.
#[inline(always)]
fn fetch_ahead(bytes: &[u8]) {
    for line in bytes.chunks(LINE) {
        exp::fetch(line.as_ptr().wrapping_add(AHEAD));
    }
}

/// Shown: bit-exact for every dtype and every kind of bytes; what does not shrink is left raw; hostile
/// bytes do no harm.
#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Dtype, ErrorKind};

    const DTYPES: [Dtype; 6] = [
        Dtype::Bf16,
        Dtype::F16,
        Dtype::F32,
        Dtype::Fp8E4m3,
        Dtype::Fp8E5m2,
        Dtype::Opaque,
    ];

    fn shape(dtype: Dtype, head_dim: u32, tokens: u32) -> PlanesShape {
        PlanesShape::new(&KvGeometry::gqa(1, 1, head_dim, dtype, tokens).expect("valid"))
    }

    fn noise(bytes: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        };
        (0..bytes).map(|_| next()).collect()
    }

    /// Values with few exponents: noise with some bits of every value held still.
    fn like_kv(dtype: Dtype, bytes: usize, seed: u64) -> Vec<u8> {
        let (still, fixed): (&[u8], &[u8]) = match dtype.bytes() {
            2 => (&[0xff, 0x83], &[0, 0x3c]),
            4 => (&[0xff, 0xff, 0xff, 0x81], &[0, 0, 0, 0x3e]),
            _ => (&[0x8f], &[0x30]),
        };
        let masks = still.iter().cycle().zip(fixed.iter().cycle());
        let bytes = noise(bytes, seed).into_iter().zip(masks);
        bytes
            .map(|(byte, (still, fixed))| byte & still | fixed)
            .collect()
    }

    fn round_trip(shape: &PlanesShape, raw: &[u8]) -> Option<usize> {
        let mut stored = vec![0xa5; raw.len()];
        let bytes = encode(shape, raw, &mut stored)?;
        let mut back = vec![0x5a; raw.len()];
        decode(shape, &stored[..bytes], &mut back).expect("ours");
        assert!(back == raw);
        Some(bytes)
    }

    #[test]
    fn what_shrinks_shrinks_and_comes_back_for_every_dtype() {
        for dtype in DTYPES {
            let shape = shape(dtype, 128, 32);
            let raw = like_kv(dtype, shape.raw_bytes(), 5);
            let bytes = round_trip(&shape, &raw).expect("shrinks");
            assert!(bytes * 10 < raw.len() * 9, "{dtype:?}: {bytes}");
            for byte in [0, 0xff, 0x7f] {
                let raw = vec![byte; raw.len()];
                let bytes = round_trip(&shape, &raw).expect("shrinks");
                assert!(bytes < 500, "{dtype:?} {byte}: {bytes}");
            }
            let noise = noise(raw.len(), 9);
            assert_eq!(encode(&shape, &noise, &mut vec![0; raw.len()]), None);
        }
    }

    #[test]
    fn every_16_bit_value_comes_back() {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let shape = shape(dtype, 65_536, 1);
            let all = (0..=u16::MAX).chain((0..=u16::MAX).map(|_| 0x3f80));
            let raw: Vec<u8> = all.flat_map(u16::to_le_bytes).collect();
            round_trip(&shape, &raw).expect("half of it is one value");
        }
    }

    #[test]
    fn without_room_a_slab_is_kept_raw() {
        let shape = shape(Dtype::Bf16, 128, 32);
        let raw = like_kv(Dtype::Bf16, shape.raw_bytes(), 5);
        let bytes = round_trip(&shape, &raw).expect("shrinks");
        for room in [0, 3, 16, 17, bytes / 2, bytes - 1] {
            assert_eq!(encode(&shape, &raw, &mut vec![0; room]), None, "{room}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_encoded_comes_back(
            dtype in prop::sample::select(DTYPES.to_vec()),
            head_dim in 1_u32..300,
            tokens in 1_u32..20,
            seed: u64,
            noisy: bool,
        ) {
            let shape = shape(dtype, head_dim, tokens);
            let raw = match noisy {
                true => noise(shape.raw_bytes(), seed),
                false => like_kv(dtype, shape.raw_bytes(), seed),
            };
            if let Some(bytes) = round_trip(&shape, &raw) {
                prop_assert!(bytes < raw.len());
            }
        }

        #[test]
        fn hostile_bytes_decode_to_something_or_are_corrupt(
            dtype in prop::sample::select(DTYPES.to_vec()),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            header in prop::collection::vec((0_usize..16, any::<u8>()), 0..3),
            cut in 0_usize..3,
        ) {
            let shape = shape(dtype, 100, 8);
            let raw = like_kv(dtype, shape.raw_bytes(), 7);
            let mut stored = vec![0; raw.len()];
            let bytes = encode(&shape, &raw, &mut stored).unwrap_or(raw.len());
            stored.truncate(bytes);
            for (at, byte) in edits {
                let at = at.index(stored.len());
                stored[at] = byte;
            }
            for (at, byte) in header {
                stored[at] = byte;
            }
            stored.truncate(stored.len() - cut);
            if let Err(error) = decode(&shape, &stored, &mut vec![0; raw.len()]) {
                prop_assert_eq!(error.kind(), ErrorKind::Corrupt);
            }
        }
    }
}
