//! Codecs on real KV: how much smaller, and how fast on one core.
//!
//! Computes the KV of whole conversations of `../shared/traces` with SmolLM2 (of the demo's text
//! where there are none), cuts it into chunks and gives every slab to each codec. Beside them in the
//! same run: memcpy, zstd -1 of the bytes as they are, and zstd -1 of plain byte planes. Every
//! round trip is compared.
//!
//! The KV of another model: `--kv FILE` reads `[layer][plane][token][head][value]`, as the options
//! `--layers`, `--planes`, `--heads`, `--head-dim`, `--dtype` and `--block-tokens` say.
//! `--dump FILE` writes what was computed that way.
//!
//! `--dir FOLDER`: only how fast all of it comes from the disk of that folder (`effective.rs`).
//!
//! Not measured: more than one core at a time.

#[path = "../harness/mod.rs"]
mod harness;

mod conversations;
mod effective;
mod kv;
mod whole;

use std::cell::RefCell;
use std::time::Instant;

use harness::{Goal, Samples, figure, is_test};
use kv::Kv;
use stemkv_store::codec::exp::{self, Decoder, ExpShape, Vectors};
use stemkv_store::codec::planes::{self, PlanesShape};
use stemkv_store::{Checksummer, KvGeometry};
use zstd::zstd_safe::{CParameter, ParamSwitch, Strategy};

fn main() {
    if let Some(path) = kv::argument("--whole") {
        whole::run(path.as_ref());
        return;
    }
    let all = Kv::from_arguments(is_test());
    if let Some(dir) = kv::argument("--dir") {
        effective::run(dir.as_ref(), &all, if is_test() { 1 } else { 7 });
        harness::table::end();
        return;
    }
    whole::print(&all.iter().map(whole::measure).collect::<Vec<_>>());
    let geometry = all[0].geometry.clone();
    let mut slabs: Vec<Vec<u8>> = all.iter().flat_map(Kv::slabs).collect();
    let total: usize = slabs.iter().map(Vec::len).sum();
    println!(
        "{} slabs of {} bytes, {:.1} MB",
        slabs.len(),
        geometry.slab_bytes(),
        total as f64 / 1e6
    );
    assert!(!slabs.is_empty(), "longer than one block");
    let coders = coders(&geometry);
    ratios(&coders, &slabs);
    // Speed on a part of them, far larger than the second-level cache.
    let wanted = if is_test() { 1 << 20 } else { 64 << 20 };
    let keep = (wanted / geometry.slab_bytes()).clamp(1, slabs.len());
    let step = slabs.len() / keep;
    let mut index = 0;
    slabs.retain(|_| {
        index += 1;
        index % step == 0
    });
    slabs.truncate(keep);
    speeds(&coders, &slabs, if is_test() { 1 } else { 9 });
}

type Encode = dyn Fn(&[u8], &mut [u8]) -> Option<usize>;
type Decode = dyn Fn(&[u8], &mut [u8]);

/// `encode` answers with the bytes that it wrote; `None` where the slab stays raw.
struct Coder {
    name: &'static str,
    encode: Box<Encode>,
    decode: Box<Decode>,
}

fn coders(geometry: &KvGeometry) -> Vec<Coder> {
    let mut coders = Vec::new();
    if let Some(shape) = ExpShape::new(geometry) {
        // The first is what a store takes on this machine.
        let mut all = Vectors::available().rev();
        coders.extend(all.next().map(|vectors| exp_with("exp", &shape, vectors)));
        coders.extend(all.map(|vectors| match vectors {
            Vectors::Avx512 => unreachable!("there is nothing faster"),
            Vectors::Avx2 => exp_with("exp with AVX2", &shape, vectors),
            Vectors::Ssse3 => exp_with("exp with SSSE3", &shape, vectors),
            Vectors::Portable => exp_with("exp, portable", &shape, vectors),
        }));
        coders.push(squeezed(&shape));
    }
    let shape = PlanesShape::new(geometry);
    let decoding = shape.clone();
    coders.push(Coder {
        name: "planes",
        encode: Box::new(move |raw, out| planes::encode(&shape, raw, out)),
        decode: Box::new(move |stored, out| planes::decode(&decoding, stored, out).expect("ours")),
    });
    coders.push(Coder {
        name: "zstd -1",
        encode: Box::new(|raw, out| zstd::bulk::compress_to_buffer(raw, out, 1).ok()),
        decode: Box::new(|stored, out| {
            zstd::bulk::decompress_to_buffer(stored, out).expect("ours");
        }),
    });
    let value_bytes = geometry.dtype.bytes();
    coders.push(Coder {
        name: "byte planes + zstd -1",
        encode: Box::new(move |raw, out| {
            let split: Vec<u8> = (0..value_bytes)
                .flat_map(|byte| raw[byte..].iter().step_by(value_bytes))
                .copied()
                .collect();
            zstd::bulk::compress_to_buffer(&split, out, 1).ok()
        }),
        decode: Box::new(move |stored, out| {
            let split = zstd::bulk::decompress(stored, out.len()).expect("ours");
            for (byte, plane) in split.chunks_exact(out.len() / value_bytes).enumerate() {
                let targets = out[byte..].iter_mut().step_by(value_bytes);
                targets
                    .zip(plane)
                    .for_each(|(target, byte)| *target = *byte);
            }
        }),
    });
    coders
}

fn exp_with(name: &'static str, shape: &ExpShape, vectors: Vectors) -> Coder {
    let shape = shape.clone().with(vectors);
    let decoding = shape.clone();
    Coder {
        name,
        encode: Box::new(move |raw, out| exp::encode(&shape, raw, out)),
        decode: Box::new(move |stored, out| {
            let decoder = Decoder::new(&decoding, stored).expect("ours");
            decoder.all(out).expect("ours");
        }),
    }
}

/// `exp` with all behind its mantissas through zstd as `planes` uses it: what the disk could have besides
/// (`docs/decisions/`).
fn squeezed(shape: &ExpShape) -> Coder {
    let (shape, decoding) = (shape.clone(), shape.clone());
    let mut compressor = zstd::bulk::Compressor::new(1).expect("memory");
    for parameter in [
        CParameter::Strategy(Strategy::ZSTD_fast),
        CParameter::HashLog(6),
        CParameter::MinMatch(7),
        CParameter::TargetLength(32),
        CParameter::LiteralCompressionMode(ParamSwitch::Enable),
    ] {
        compressor.set_parameter(parameter).expect("a parameter");
    }
    let decompressor = zstd::bulk::Decompressor::new().expect("memory");
    let compressor = RefCell::new((compressor, Vec::new()));
    let decompressor = RefCell::new((decompressor, Vec::new()));
    // Blocks of 128 tokens: planes are whole groups of 32 values, and have as many mantissa bytes.
    let kept = move |raw: usize| 128 + raw / 2;
    Coder {
        name: "exp, squeezed",
        encode: Box::new(move |raw, out| {
            let (compressor, encoded) = &mut *compressor.borrow_mut();
            encoded.resize(raw.len(), 0);
            let bytes = exp::encode(&shape, raw, encoded)?;
            encoded.truncate(bytes);
            let (first, rest) = encoded.split_at(kept(raw.len()));
            out[..first.len()].copy_from_slice(first);
            out[first.len()..first.len() + 4].copy_from_slice(&(rest.len() as u32).to_le_bytes());
            let start = first.len() + 4;
            let bytes = compressor
                .compress_to_buffer(rest, &mut out[start..])
                .ok()?;
            Some(start + bytes)
        }),
        decode: Box::new(move |stored, out| {
            let (decompressor, encoded) = &mut *decompressor.borrow_mut();
            let (first, rest) = stored.split_at(kept(out.len()));
            let (length, rest) = rest.split_first_chunk().expect("ours");
            let length = u32::from_le_bytes(*length) as usize;
            encoded.resize(first.len() + length, 0);
            encoded[..first.len()].copy_from_slice(first);
            let made = decompressor.decompress_to_buffer(rest, &mut encoded[first.len()..]);
            assert_eq!(made.expect("ours"), length);
            let decoder = Decoder::new(&decoding, encoded).expect("ours");
            decoder.all(out).expect("ours");
        }),
    }
}

/// Every slab, round trip compared; where a slab stays raw it counts as it is.
fn ratios(coders: &[Coder], slabs: &[Vec<u8>]) {
    let mut out = vec![0; slabs[0].len()];
    let mut back = vec![0; slabs[0].len()];
    for coder in coders {
        let (mut raw_bytes, mut stored_bytes, mut raw_slabs) = (0, 0, 0);
        for slab in slabs {
            raw_bytes += slab.len();
            match (coder.encode)(slab, &mut out) {
                Some(bytes) => {
                    (coder.decode)(&out[..bytes], &mut back);
                    assert!(back == *slab, "{}: a round trip", coder.name);
                    stored_bytes += bytes;
                }
                None => {
                    raw_slabs += 1;
                    stored_bytes += slab.len();
                }
            }
        }
        let ratio = raw_bytes as f64 / stored_bytes as f64;
        println!("{}: ratio {ratio:.4}, {raw_slabs} slabs raw", coder.name);
        match coder.name {
            "exp" => figure("link.ratio", ratio, "x", Goal::AtLeast(1.38)),
            "planes" => figure("disk.codec_ratio", ratio, "x", Goal::AtLeast(1.38)),
            _ => {}
        }
    }
}

/// From memory to memory, one core, rounds of all in turn.
fn speeds(coders: &[Coder], slabs: &[Vec<u8>], rounds: usize) {
    let slab_bytes = slabs[0].len();
    let raw_bytes = slabs.len() * slab_bytes;
    let mut copy = Samples::default();
    let mut sum = Samples::default();
    let mut encode: Vec<Samples> = coders.iter().map(|_| Samples::default()).collect();
    let mut decode: Vec<Samples> = coders.iter().map(|_| Samples::default()).collect();
    let mut stored = vec![0_u8; raw_bytes];
    let mut back = vec![0_u8; raw_bytes];
    let mut checked = 0;
    for _ in 0..rounds {
        copy.time(|| {
            for (slab, target) in slabs.iter().zip(back.chunks_exact_mut(slab_bytes)) {
                target.copy_from_slice(slab);
            }
        });
        sum.time(|| {
            for slab in slabs {
                checked ^= Checksummer::of(slab).0;
            }
        });
        for ((coder, encode), decode) in coders.iter().zip(&mut encode).zip(&mut decode) {
            let begun = Instant::now();
            let lengths: Vec<Option<usize>> = slabs
                .iter()
                .zip(stored.chunks_exact_mut(slab_bytes))
                .map(|(slab, out)| (coder.encode)(slab, out))
                .collect();
            encode.add(begun.elapsed());
            decode.time(|| {
                for ((stored, out), length) in stored
                    .chunks_exact(slab_bytes)
                    .zip(back.chunks_exact_mut(slab_bytes))
                    .zip(&lengths)
                {
                    match length {
                        Some(length) => (coder.decode)(&stored[..*length], out),
                        None => out.copy_from_slice(stored),
                    }
                }
            });
        }
    }
    let rate = |samples: &Samples| raw_bytes as f64 / samples.median() / 1e9;
    println!(
        "{} MB, {rounds} rounds, one core, GB/s of raw bytes: memcpy {:.2}, checksum {:.2} (check value {checked:x})",
        raw_bytes / 1_000_000,
        rate(&copy),
        rate(&sum)
    );
    if cfg!(target_arch = "x86_64") {
        let baseline = if cfg!(target_feature = "avx2") {
            "AVX2"
        } else {
            "SSE2"
        };
        println!("the portable code is compiled for {baseline}");
    }
    for ((coder, encode), decode) in coders.iter().zip(&encode).zip(&decode) {
        let (encode, decode) = (rate(encode), rate(decode));
        println!("{}: encode {encode:.2}, decode {decode:.2}", coder.name);
        let (area, goals) = match coder.name {
            "exp" => ("link.cpu", [2.0, 4.0]),
            "exp with AVX2" => ("link.cpu_avx2", [2.0, 4.0]),
            "exp with SSSE3" => ("link.cpu_ssse3", [2.0, 4.0]),
            "exp, portable" => ("link.cpu_portable", [2.0, 4.0]),
            "planes" => ("disk.codec_speed", [1.0, 3.0]),
            _ => continue,
        };
        figure(
            &format!("{area}_encode"),
            encode,
            "GB/s",
            Goal::AtLeast(goals[0]),
        );
        figure(
            &format!("{area}_decode"),
            decode,
            "GB/s",
            Goal::AtLeast(goals[1]),
        );
    }
}
