//! Shown on KV that a model computed (`data/README.md`): `exp` and `planes` give every slab back bit for bit,
//! as bf16 and with the same bytes taken for any other dtype; they gain on it what they are there for; all sets
//! of instructions that this processor has write and read the same bytes; and every layer of a chunk, and every
//! tile of a slab, decodes without the others.

#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::HashSet;

use stemkv_store::codec::exp::{self, Decoder, ExpShape, TILE_BYTES, Vectors};
use stemkv_store::codec::planes::{self, PlanesShape};
use stemkv_store::{Checksummer, CodecId, Dtype, HostArena, Key, KvGeometry, RecordHeader, Slot};

/// `[layer][key, value][token][head][value]`.
static SAMPLE: &[u8] = include_bytes!("data/smollm2.kv");

const LAYERS: u32 = 4;
const HEADS: u32 = 3;
const HEAD_DIM: u32 = 64;
const TOKENS: usize = 64;
const PLANE_BYTES: usize = TOKENS * (HEADS * HEAD_DIM) as usize * 2;

const DTYPES: [Dtype; 6] = [
    Dtype::Bf16,
    Dtype::F16,
    Dtype::F32,
    Dtype::Fp8E4m3,
    Dtype::Fp8E5m2,
    Dtype::Opaque,
];

/// In blocks of so many tokens, as if the bytes were values of `dtype`.
fn geometry(block_tokens: u32, dtype: Dtype) -> KvGeometry {
    let geometry = KvGeometry::gqa(LAYERS, HEADS, HEAD_DIM, Dtype::Bf16, block_tokens);
    KvGeometry {
        dtype,
        ..geometry.unwrap()
    }
}

/// The raw slabs, chunk by chunk, layer by layer.
fn slabs(block_tokens: u32) -> Vec<Vec<u8>> {
    assert_eq!(SAMPLE.len(), 2 * LAYERS as usize * PLANE_BYTES);
    let part = PLANE_BYTES / TOKENS * block_tokens as usize;
    let slab = |chunk: usize, layer: usize| {
        let planes = [0, 1].map(|plane| (2 * layer + plane) * PLANE_BYTES + chunk * part);
        planes.map(|start| &SAMPLE[start..start + part]).concat()
    };
    let chunks = 0..TOKENS / block_tokens as usize;
    let chunks = chunks.map(|chunk| (0..LAYERS as usize).map(move |layer| slab(chunk, layer)));
    chunks.flatten().collect()
}

/// Dirty, so that a byte that is not written shows.
fn room(bytes: usize) -> Vec<u8> {
    vec![0xa5; bytes]
}

#[test]
fn exp_gives_every_slab_back_and_gains_with_all_instructions_alike() {
    for block_tokens in [16, 32, 64] {
        let shape = ExpShape::new(&geometry(block_tokens, Dtype::Bf16)).unwrap();
        let (mut raw_bytes, mut stored_bytes) = (0, 0);
        for (index, raw) in slabs(block_tokens).iter().enumerate() {
            let what = format!("slab {index} of blocks of {block_tokens}");
            let all: Vec<Vec<u8>> = Vectors::available()
                .map(|vectors| {
                    let mut out = room(raw.len());
                    let shape = shape.clone().with(vectors);
                    let bytes = exp::encode(&shape, raw, &mut out);
                    out.truncate(bytes.unwrap_or_else(|| panic!("{what} does not shrink")));
                    out
                })
                .collect();
            for (vectors, stored) in Vectors::available().zip(&all) {
                assert!(*stored == all[0], "{what}: {vectors:?} writes other bytes");
                let shape = shape.clone().with(vectors);
                let mut back = room(raw.len());
                Decoder::new(&shape, stored)
                    .unwrap()
                    .all(&mut back)
                    .unwrap();
                assert!(back == *raw, "{what}: {vectors:?}");
            }
            raw_bytes += raw.len();
            stored_bytes += all[0].len();
        }
        let ratio = raw_bytes as f64 / stored_bytes as f64;
        println!("exp, blocks of {block_tokens} tokens: {ratio:.4}");
        assert!(ratio >= 1.30, "blocks of {block_tokens}: {ratio}");
    }
}

#[test]
fn planes_give_every_slab_back_as_any_dtype_and_gain() {
    for dtype in DTYPES {
        for block_tokens in [16, 32, 64] {
            let shape = PlanesShape::new(&geometry(block_tokens, dtype));
            let (mut raw_bytes, mut stored_bytes) = (0, 0);
            for (index, raw) in slabs(block_tokens).iter().enumerate() {
                let mut out = room(raw.len());
                raw_bytes += raw.len();
                let Some(bytes) = planes::encode(&shape, raw, &mut out) else {
                    stored_bytes += raw.len();
                    continue;
                };
                stored_bytes += bytes;
                let mut back = room(raw.len());
                planes::decode(&shape, &out[..bytes], &mut back).unwrap();
                assert!(
                    back == *raw,
                    "{dtype:?}: slab {index} of blocks of {block_tokens}"
                );
            }
            let ratio = raw_bytes as f64 / stored_bytes as f64;
            println!("planes as {dtype:?}, blocks of {block_tokens} tokens: {ratio:.4}");
            // The bytes are bf16; of what they are not, nothing is promised but that it comes back.
            if dtype == Dtype::Bf16 {
                assert!(ratio >= 1.30, "blocks of {block_tokens}: {ratio}");
            }
        }
    }
}

#[test]
fn any_tile_decodes_without_the_others() {
    let shape = ExpShape::new(&geometry(64, Dtype::Bf16)).unwrap();
    for raw in slabs(64) {
        let mut stored = room(raw.len());
        let bytes = exp::encode(&shape, &raw, &mut stored).unwrap();
        for vectors in Vectors::available() {
            let shape = shape.clone().with(vectors);
            let decoder = Decoder::new(&shape, &stored[..bytes]).unwrap();
            // The last one first.
            for index in (0..decoder.tiles()).rev() {
                let mut out = [0xa5; TILE_BYTES];
                let bytes = decoder.tile(index, &mut out).unwrap();
                assert!(
                    out[..bytes] == raw[decoder.raw_range(index)],
                    "{vectors:?}, tile {index}"
                );
            }
        }
    }
}

/// The sample as one chunk, raw.
fn chunk(arena: &HostArena) -> Slot {
    let geometry = arena.geometry().clone();
    let slots = arena.allocate(geometry.payload_bytes(), 1);
    let mut filling = slots.unwrap().remove(0);
    for (layer, raw) in geometry.layer_ids().zip(slabs(TOKENS as u32)) {
        let start = RecordHeader::BYTES + layer.0 as usize * geometry.slab_stride();
        filling.image_mut().unwrap()[start..start + raw.len()].copy_from_slice(&raw);
        filling.set_slab(layer, Checksummer::of(&raw));
    }
    let header = RecordHeader {
        namespace: Key([1; 32]),
        parent: Key([2; 32]),
        key: Key([3; 32]),
        depth: 0,
        tokens: TOKENS as u32,
        geometry: geometry.fingerprint(),
        layers: 0..LAYERS,
        codec: CodecId::Raw,
        slabs: Vec::new(),
    };
    filling.seal(header).unwrap()
}

#[test]
fn any_layer_of_a_chunk_decodes_without_the_others() {
    for (codec, dtype) in [(CodecId::Exp, Dtype::Bf16)]
        .into_iter()
        .chain(DTYPES.map(|dtype| (CodecId::Planes, dtype)))
    {
        let geometry = geometry(TOKENS as u32, dtype);
        let arena = HostArena::open(&geometry, 1 << 20, |_, _| {}).unwrap();
        let raw = chunk(&arena);
        let room = |bytes| Some(arena.allocate(bytes, 1)?.remove(0));
        let coded = raw.encoded(codec, room).unwrap().expect("it shrinks");
        assert!(coded.image().len() < raw.image().len());
        for layer in geometry.layer_ids() {
            let entry = coded.slab(layer).unwrap();
            let expected = raw.slab_bytes(layer).unwrap();
            // Nothing of the record but this slab, and what its header says of it.
            let start = RecordHeader::BYTES + entry.offset as usize;
            let stored = coded.image()[start..start + entry.bytes as usize].to_vec();
            assert_eq!(Checksummer::of(&stored), entry.checksum);
            let mut back = vec![0xa5; expected.len()];
            if coded.is_raw(&entry) {
                back.copy_from_slice(&stored);
            } else if codec == CodecId::Exp {
                let shape = ExpShape::new(&geometry).unwrap();
                Decoder::new(&shape, &stored)
                    .unwrap()
                    .all(&mut back)
                    .unwrap();
            } else {
                planes::decode(&PlanesShape::new(&geometry), &stored, &mut back).unwrap();
            }
            assert!(back == expected, "{codec:?} as {dtype:?}, {layer:?}");
        }
        let whole = arena
            .allocate(geometry.payload_bytes(), 1)
            .unwrap()
            .remove(0);
        assert!(
            coded.decoded(whole).unwrap().image() == raw.image(),
            "{codec:?} as {dtype:?}"
        );
    }
}

#[test]
fn no_two_keys_of_the_sample_are_alike() {
    // A sample that was cut wrongly would be easy. Keys know their position; values of one token may come again.
    let keys: HashSet<&[u8]> = SAMPLE
        .chunks_exact(PLANE_BYTES)
        .step_by(2)
        .flat_map(|plane| plane.chunks_exact(PLANE_BYTES / TOKENS))
        .collect();
    assert_eq!(keys.len(), LAYERS as usize * TOKENS);
}
