//! Loads of encoded slabs, against the CPU's codec.

use stemkv_store::codec::exp::{self, ExpShape};

use super::*;

/// What the values of a slab look like. `exp` stores noise raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Values {
    /// Exponents that fall off on both sides of a few.
    Kv,
    /// All exponents alike often.
    Noise,
    Constant,
    /// Fifteen exponents: codes of 4 bits.
    Fifteen,
    /// Seven exponents, and a third of the values with any other.
    Escapes,
    /// Only zeros, denormals, infinities and NaN.
    Special,
}

const VALUES: [Values; 6] = [
    Values::Kv,
    Values::Noise,
    Values::Constant,
    Values::Fifteen,
    Values::Escapes,
    Values::Special,
];

impl Values {
    fn next(self, random: &mut Random) -> u16 {
        let (bits, any) = (random.next(), random.next() >> 20);
        let exponent = match self {
            Values::Kv => {
                121 - u64::from((any as u32 | 1 << 20).trailing_zeros()) + (bits >> 60 & 1)
            }
            Values::Noise => any & 0xff,
            Values::Constant => return 0xbf80,
            Values::Fifteen => 100 + any % 15,
            Values::Escapes if bits >> 32 & 3 == 0 => any & 0xff,
            Values::Escapes => 60 + any % 7,
            Values::Special => [0, 255][(any & 1) as usize],
        };
        (bits & 0x807f) as u16 | (exponent as u16) << 7
    }
}

/// Slabs of several whole tiles; of one short one; of one plane with an end that is no whole group;
/// planes of different sizes.
fn shapes() -> Vec<KvGeometry> {
    vec![
        KvGeometry::gqa(3, 3, 128, Dtype::Bf16, 12).expect("valid"),
        KvGeometry::gqa(3, 3, 16, Dtype::Bf16, 12).expect("valid"),
        KvGeometry::mla(2, 576, Dtype::Bf16, 12).expect("valid"),
        KvGeometry {
            layers: 2,
            planes: [(1, 72), (3, 250)]
                .map(|(heads, head_bytes)| Plane { heads, head_bytes })
                .into(),
            block_tokens: 12,
            dtype: Dtype::Bf16,
        },
    ]
}

/// Fills the pages, a kind of values for each block and layer, and saves the blocks raw.
fn saved(
    device: &dyn Device,
    arena: &HostArena,
    pages: &Pages,
    table: &[PageId],
    at: &[usize],
    random: &mut Random,
) -> Vec<Slot> {
    let mut bytes = random.bytes(pages.memory.read().len());
    for layer in 0..pages.geometry.layers as usize {
        for (number, &block) in at.iter().enumerate() {
            let values = VALUES[(number + layer + random.below(2)) % VALUES.len()];
            let mut value = 0_u16;
            for (of, at) in pages.bytes_of(table, layer, block, 0) {
                if of % 2 == 0 {
                    value = values.next(random);
                }
                bytes[at] = value.to_le_bytes()[of % 2];
            }
        }
    }
    pages.memory.write(&bytes);
    save(device, arena, pages, table, at)
}

/// The image of a chunk with these slabs, each where `starts` says; sealed.
fn sealed(arena: &HostArena, like: &Slot, slabs: &[Vec<u8>], starts: &[usize]) -> Slot {
    let table = slabs.iter().zip(starts).map(|(slab, &offset)| SlabEntry {
        offset: offset as u32,
        bytes: slab.len() as u32,
        checksum: Checksummer::of(slab),
    });
    let header = RecordHeader {
        codec: CodecId::Exp,
        slabs: table.collect(),
        ..like.header().expect("sealed")
    };
    // All of one length, so that a run of them is evenly spaced.
    let payload = arena.geometry().payload_bytes();
    let mut filling = arena.allocate(payload, 1).expect("room").remove(0);
    let image = filling.image_mut().expect("sole");
    image[..RecordHeader::BYTES].copy_from_slice(&header.encode()[..]);
    for (slab, start) in slabs.iter().zip(starts) {
        image[RecordHeader::BYTES + start..][..slab.len()].copy_from_slice(slab);
    }
    filling.seal_image(|_| Ok(())).expect("verifies")
}

/// The stored bytes of each slab as `exp` has them.
fn encoded(slot: &Slot) -> Vec<Vec<u8>> {
    let geometry = slot.arena().geometry();
    let shape = ExpShape::new(geometry).expect("bf16");
    let slabs = geometry.layer_ids().map(|layer| {
        let raw = slot.slab_bytes(layer).expect("there");
        let mut out = vec![0; raw.len()];
        match exp::encode(&shape, raw, &mut out) {
            Some(bytes) => out.truncate(bytes),
            None => out.copy_from_slice(raw),
        }
        out
    });
    slabs.collect()
}

/// Starts that suit every chunk of a run.
fn common_starts(chunks: &[Vec<Vec<u8>>]) -> Vec<usize> {
    let mut end = 0;
    let layers = 0..chunks[0].len();
    let starts = layers.map(|layer| {
        let start = end;
        let longest = chunks.iter().map(|slabs| slabs[layer].len()).max();
        end = (start + longest.unwrap_or(0)).next_multiple_of(KvGeometry::SLAB_ALIGN);
        start
    });
    starts.collect()
}

/// Encoded chunks, raw slabs in them, raw chunks beside them, as runs whose slabs start at common places
/// and each as short as it can be: whatever is loaded, by one layer or several, in every layout and
/// from any token on, is what was saved, and no other byte is written.
pub(crate) fn encoded_slabs_load_as_they_were(subject: &Subject<'_>) {
    let device = &*subject.device;
    let mut seed = 500;
    for geometry in shapes() {
        let at: Vec<usize> = (0..9).map(|block| 12 * block).collect();
        let arena = arena(&geometry, 3 * at.len() + 8);
        device.attach(&arena).expect("a sound device");
        for (layout, page_tokens) in LAYOUTS.into_iter().zip([12, 4, 16, 5, 12, 32, 1]) {
            seed += 1;
            let case = format!("{layout:?}, {page_tokens} a page, seed {seed}, {geometry:?}");
            let mut random = Random(seed);
            let needed = (12 * at.len()).div_ceil(page_tokens);
            let pages = Pages::new(subject, &geometry, layout, page_tokens, needed + 2);
            let table = random.pick(needed, needed + 2);
            let raw = saved(device, &arena, &pages, &table, &at, &mut random);
            let before = pages.memory.read();
            let chunks: Vec<_> = raw.iter().map(encoded).collect();
            let starts = common_starts(&chunks);
            let run: Vec<Slot> = raw
                .iter()
                .zip(&chunks)
                .map(|(slot, slabs)| sealed(&arena, slot, slabs, &starts))
                .collect();
            let short: Vec<Slot> = raw
                .iter()
                .enumerate()
                .map(|(number, slot)| {
                    let room = |bytes| Some(arena.allocate(bytes, 1)?.remove(0));
                    let coded = slot.encoded(CodecId::Exp, room).expect("sound");
                    coded
                        .filter(|_| number != 4)
                        .unwrap_or_else(|| slot.clone())
                })
                .collect();
            for (slots, from) in [
                (&run, 0),
                (&run, 17),
                (&short, 0),
                (&short, 30),
                (&run, 108),
            ] {
                let mut expected = vec![0x5a; before.len()];
                pages.memory.write(&expected);
                let transfer = load(slots, &pages, &table, &at, from);
                let mut next = 0;
                while next < geometry.layers {
                    let layers = next..geometry.layers.min(next + 1 + random.below(2) as u32);
                    next = layers.end;
                    let submitted = device.submit_layers(&transfer, layers.clone(), &[]);
                    for submitted in submitted.expect("a sound device") {
                        let arrived = submitted.fence.point().wait(Duration::from_secs(30));
                        assert!(arrived.expect("a sound device"), "the fence arrives");
                        if let SlabSums::Compared(ask) = submitted.sums {
                            assert_eq!(ask().expect("sound"), None, "{case}, from {from}");
                        }
                    }
                    for layer in layers {
                        for &block in &at {
                            for (_, to) in pages.bytes_of(&table, layer as usize, block, from) {
                                expected[to] = before[to];
                            }
                        }
                    }
                    let case = format!("{case}, from {from}");
                    assert_same(&pages.memory.read()[..before.len()], &expected, &case);
                }
            }
        }
    }
}

/// Which move of a layer fails; `usize::MAX` where the device says so of the layer alone.
fn first_wrong(
    device: &dyn Device,
    transfer: &Transfer,
    layer: LayerId,
    slots: &[Slot],
) -> Option<usize> {
    let Ok(submitted) = device.submit(transfer, layer, &[]) else {
        return Some(usize::MAX);
    };
    match submitted.fence.point().wait(Duration::from_secs(30)) {
        Ok(arrived) => assert!(arrived, "the fence arrives"),
        Err(_) => return Some(usize::MAX),
    }
    let differs = |sums: Vec<Checksum>| {
        let mut all = sums.iter().zip(slots);
        all.position(|(sum, slot)| *sum != slot.slab(layer).expect("there").checksum)
    };
    match submitted.sums {
        SlabSums::Compared(ask) => ask().expect("sound"),
        SlabSums::Known(sums) => differs(sums),
        SlabSums::AfterFence(ask) => differs(ask().expect("sound")),
        _ => panic!("a device that decodes sees the bytes"),
    }
}

/// One bit of a stored slab that flips in memory, wherever it is, fails that slab and no other.
pub(crate) fn a_flipped_bit_in_an_encoded_slab_fails_it(
    subject: &Subject<'_>,
    flip: &dyn Fn(&HostArena, usize, u8),
) {
    let device = &*subject.device;
    let geometry = KvGeometry::gqa(2, 3, 128, Dtype::Bf16, 12).expect("valid");
    let at = [0, 12, 24, 36, 48];
    let arena = arena(&geometry, 2 * at.len());
    device.attach(&arena).expect("a sound device");
    let mut random = Random(70);
    let pages = Pages::new(subject, &geometry, Layout::Nhd, 12, 5);
    let table = random.pick(5, 5);
    let raw = saved(device, &arena, &pages, &table, &at, &mut random);
    let chunks: Vec<_> = raw.iter().map(encoded).collect();
    let starts = common_starts(&chunks);
    let run: Vec<Slot> = raw
        .iter()
        .zip(&chunks)
        .map(|(slot, slabs)| sealed(&arena, slot, slabs, &starts))
        .collect();
    for number in 0..60 {
        let (chunk, layer) = (number % at.len(), LayerId(random.below(2) as u32));
        let slab = run[chunk].slab(layer).expect("there");
        let place = match number {
            // The header: the number of escapes, bits, reserved, codebook.
            0..16 => [0, 1, 4, 5, 6, 9, 16, 31][number % 8],
            _ => random.below(slab.bytes as usize),
        };
        let start = run[chunk].offset() + RecordHeader::BYTES + slab.offset as usize;
        let bit = random.below(8) as u8;
        flip(&arena, start + place, bit);
        for this in geometry.layer_ids() {
            let transfer = load(&run, &pages, &table, &at, 0);
            let wrong = first_wrong(device, &transfer, this, &run);
            let expected = (this == layer).then_some(chunk);
            assert_eq!(wrong, expected, "bit {bit} of byte {place}, chunk {chunk}");
        }
        flip(&arena, start + place, bit);
    }
}

/// Slabs that are not well formed, though they sum to what their slots say: each fails, the others
/// arrive, and nothing is written but the moves' own places.
pub(crate) fn a_malformed_slab_fails_and_writes_nowhere_else(subject: &Subject<'_>) {
    let device = &*subject.device;
    let geometry = KvGeometry::gqa(1, 3, 128, Dtype::Bf16, 12).expect("valid");
    let at = [12, 24, 36];
    let mut random = Random(80);
    let arena = arena(&geometry, 2 * at.len() + 1);
    device.attach(&arena).expect("a sound device");
    // Pages 3 and 4 are nobody's.
    let pages = Pages::new(subject, &geometry, Layout::Nhd, 12, 6);
    let table = [0, 5, 2, 1].map(PageId);
    let raw = saved(device, &arena, &pages, &table, &at, &mut random);
    let whole = encoded(&raw[0]).remove(0);
    assert!(whole.len() < geometry.slab_bytes(), "like KV");
    let shape = ExpShape::new(&geometry).expect("bf16");
    // Of each plane.
    let tiles = 2 * (shape.raw_bytes() / 2).div_ceil(2048);
    let escapes = u32::from_le_bytes(*whole.first_chunk().expect("a header")) as usize;
    let offsets = whole.len() - escapes - 4 * tiles;
    assert!(escapes > 8 && tiles > 2);
    let mut broken: Vec<Vec<u8>> = Vec::new();
    for (place, byte) in [
        (0, whole[0] ^ 1),
        (3, 0xff),
        (4, 5),
        (4, 0),
        (5, whole[5] ^ 7),
        (7, 1),
        (8, 1),
        (31, 1),
        (79, 1),
        (127, 1),
        (offsets, 1),
        (offsets + 3, 0xff),
        (offsets + 4, whole[offsets + 4] ^ 1),
        (offsets + 7, 0x80),
        (offsets + 4 * tiles - 1, 0xff),
    ] {
        let mut slab = whole.clone();
        slab[place] = byte;
        broken.push(slab);
    }
    // Escape codes without escapes, in the last tile and in the first.
    for place in [offsets - 1, 128 + shape.raw_bytes() / 2] {
        let mut slab = whole.clone();
        slab[place] = 0x77 | slab[place] & 0x88;
        if slab[place] == whole[place] {
            slab[place] ^= 0x33;
        }
        broken.push(slab);
    }
    for bytes in [1, 4, 127, 128, 129, offsets, whole.len() - 1] {
        broken.push(whole[..bytes].to_vec());
    }
    broken.push([&whole[..], &[7]].concat());
    for (number, slab) in broken.into_iter().enumerate() {
        let slot = sealed(&arena, &raw[0], &[slab], &[0]);
        let slots = [raw[1].clone(), slot, raw[2].clone()];
        pages.memory.write(&vec![0x5a; pages.memory.read().len()]);
        let transfer = load(&slots, &pages, &table, &at, 0);
        let wrong = first_wrong(device, &transfer, LayerId(0), &slots);
        assert_eq!(wrong, Some(1), "case {number}");
        let got = pages.memory.read();
        let mut may_be_written = vec![false; got.len()];
        for block in at {
            for (_, to) in pages.bytes_of(&table, 0, block, 0) {
                may_be_written[to] = true;
            }
        }
        for (at, byte) in got.iter().enumerate() {
            assert!(
                may_be_written[at] || *byte == 0x5a,
                "case {number}, byte {at}"
            );
        }
    }
}
