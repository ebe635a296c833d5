//! Chunks that a device encodes while it saves them, and their loads beside raw ones.

use super::*;

/// A load that mixes raw and encoded chunks writes every byte as it was saved, in every layout; with
/// damage in an encoded slab, the sums differ.
pub(crate) fn raw_and_encoded_chunks_load_side_by_side(subject: &Subject<'_>) {
    let device = &*subject.device;
    for dtype in [Dtype::Bf16, Dtype::F16] {
        if !device.decodes(CodecId::lossless(dtype)) {
            continue;
        }
        for layout in LAYOUTS {
            let geometry = KvGeometry::gqa(2, 3, 80, dtype, 12).expect("valid");
            let arena = arena(&geometry, 12);
            device.attach(&arena).expect("attaches");
            let mut random = Random(layout as u64);
            let source = Pages::new(subject, &geometry, layout, 4, 12);
            let bytes = random.bytes(source.memory.read().len());
            // The high byte of each value keeps few bits, in all but the last third of the pages.
            let kept = bytes.len() * 2 / 3;
            let bytes: Vec<u8> = bytes
                .into_iter()
                .enumerate()
                .map(|(at, byte)| match at < kept && at % 2 == 1 {
                    true => byte & 0x83 | 0x3c,
                    false => byte,
                })
                .collect();
            source.memory.write(&bytes);
            let table: Vec<PageId> = (0..12).map(PageId).collect();
            let raw = save(device, &arena, &source, &table, &[0, 12, 24, 36]);
            let mut encoded = 0;
            let mixed: Vec<Slot> = raw
                .iter()
                .enumerate()
                .map(|(index, slot)| {
                    let room = |bytes| Some(arena.allocate(bytes, 1)?.remove(0));
                    let coded = slot.encoded(CodecId::lossless(dtype), room).expect("sound");
                    encoded += usize::from(coded.is_some() && index != 1);
                    coded.filter(|_| index != 1).unwrap_or_else(|| slot.clone())
                })
                .collect();
            if layout == Layout::Nhd {
                assert!((1..4).contains(&encoded), "{encoded} of 4 are encoded");
            }
            for from in [0, 17] {
                let load_into = |slots: &[Slot]| {
                    let target = Pages::new(subject, &geometry, layout, 4, 12);
                    target.memory.write(&vec![0x77; bytes.len()]);
                    let transfer = load(slots, &target, &table, &[0, 12, 24, 36], from);
                    for layer in geometry.layer_ids() {
                        if let Some(sums) = move_layer(device, &transfer, layer) {
                            for (sum, slot) in sums.iter().zip(slots) {
                                let stored = slot.slab(layer).expect("there").checksum;
                                assert_eq!(*sum, stored, "of what is stored");
                            }
                        }
                    }
                    drop(transfer);
                    target.memory.read()
                };
                let case = format!("{dtype:?} {layout:?} from {from}");
                assert_same(&load_into(&mixed), &load_into(&raw), &case);
            }
        }
    }
}

/// Saves whose slabs are encoded on the way hold what raw saves of the same pages hold, slab by slab,
/// in the codec's own bytes, beside slabs and chunks that do not shrink; whichever transfers bring the
/// layers; what no slab covers is zero; and they load again.
pub(crate) fn an_encoded_save_stores_what_a_raw_one_does(subject: &Subject<'_>) {
    let device = &*subject.device;
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let codec = CodecId::lossless(dtype);
        if !device.encodes(codec) {
            eprintln!("SKIPPED: the device does not encode {codec:?}");
            continue;
        }
        for (layout, page_tokens) in LAYOUTS.into_iter().zip([4, 12, 5, 32, 1, 4, 12]) {
            let case = format!("{dtype:?} {layout:?} {page_tokens} a page");
            let geometry = KvGeometry::gqa(4, 3, 80, dtype, 12).expect("valid");
            let arena = arena(&geometry, 16);
            device.attach(&arena).expect("attaches");
            let mut random = Random(77 + layout as u64);
            let count = 72_usize.div_ceil(page_tokens);
            let pages = Pages::new(subject, &geometry, layout, page_tokens, count);
            let at = [0, 12, 24, 48];
            let table = random.pick(count, count);
            pages.memory.write(&like_kv(&mut random, &pages, &table));
            let raw = save(device, &arena, &pages, &table, &at);
            let expected: Vec<Slot> = raw
                .iter()
                .map(|slot| {
                    let room = |bytes| Some(arena.allocate(bytes, 1)?.remove(0));
                    let coded = slot.encoded(codec, room).expect("sound");
                    coded.unwrap_or_else(|| slot.clone())
                })
                .collect();
            let kept: Vec<usize> = expected.iter().map(|slot| slot.image().len()).collect();
            let shrunken = kept.iter().filter(|&&bytes| bytes < raw[0].image().len());
            assert_eq!(shrunken.count(), 3, "{case}: {kept:?}");

            let payload = geometry.payload_bytes();
            let mut fillings = arena.allocate(payload, at.len()).expect("room");
            for filling in &mut fillings {
                filling.image_mut().expect("sole").fill(0xa5);
            }
            save_encoded(device, codec, &pages, &table, &at, &mut fillings, 2);
            let slots: Vec<Slot> = fillings
                .into_iter()
                .enumerate()
                .map(|(number, filling)| {
                    let header = RecordHeader {
                        codec,
                        ..header(&geometry, number as u8)
                    };
                    filling.seal(header).expect("whole")
                })
                .collect();
            for (number, slot) in slots.iter().enumerate() {
                let mut uncovered = slot.image().to_vec();
                uncovered[..RecordHeader::BYTES].fill(0);
                let header = slot.header().expect("reads back");
                for layer in geometry.layer_ids() {
                    let slab = header.slab(layer).expect("there");
                    uncovered[RecordHeader::BYTES..][slab.range()].fill(0);
                    let stored = slot.slab_bytes(layer).expect("there");
                    assert_eq!(Checksummer::of(stored), slab.checksum, "{case}");
                    let expected = expected[number].slab_bytes(layer).expect("there");
                    assert_same(stored, expected, &format!("{case}, chunk {number}"));
                }
                assert!(uncovered.iter().all(|&byte| byte == 0), "{case}");
                // What is behind the last slab was given back.
                let end = header.payload_bytes().next_multiple_of(4096);
                assert_eq!(slot.image().len(), RecordHeader::BYTES + end, "{case}");
            }
            let filled: usize = slots.iter().map(|slot| slot.image().len()).sum();
            drop((raw, expected));
            assert_eq!(arena.usage().published_bytes, filled, "{case}");
            assert_eq!(arena.usage().filling_bytes, 0, "{case}");

            if device.decodes(codec) {
                let before = pages.memory.read();
                let mut expected = vec![0x5a; before.len()];
                pages.memory.write(&expected);
                let transfer = load(&slots, &pages, &table, &at, 17);
                for layer in geometry.layer_ids() {
                    move_layer(device, &transfer, layer);
                    for block in at {
                        for (_, at) in pages.bytes_of(&table, layer.0 as usize, block, 17) {
                            expected[at] = before[at];
                        }
                    }
                }
                assert_same(&pages.memory.read(), &expected, &case);
            }
        }
    }
}

/// A slot that is too short for its chunk is said to be, from the slab on that does not fit; what is
/// said to be whole is, and nothing is written behind the slots.
pub(crate) fn an_encoded_chunk_that_does_not_fit_is_told(subject: &Subject<'_>) {
    let device = &*subject.device;
    if !device.encodes(CodecId::Exp) {
        eprintln!("SKIPPED: the device does not encode");
        return;
    }
    let geometry = KvGeometry::gqa(4, 3, 80, Dtype::Bf16, 12).expect("valid");
    let arena = arena(&geometry, 8);
    device.attach(&arena).expect("attaches");
    let pages = Pages::new(subject, &geometry, Layout::Nhd, 12, 6);
    let table: Vec<PageId> = (0..6).map(PageId).collect();
    let mut random = Random(5);
    let bytes = like_kv(&mut random, &pages, &table);
    pages.memory.write(&bytes);
    // Blocks 0 and 24 shrink to less than 80 %, the one at 48 does not.
    let at = [0, 48, 24];
    let room = geometry.payload_bytes() * 8 / 10;
    let mut fillings = arena.allocate(room, 3).expect("room");
    for filling in &mut fillings {
        filling.image_mut().expect("sole").fill(0xa5);
    }
    // Behind the last of them.
    let mut guard = arena.allocate(4096, 1).expect("room").remove(0);
    guard.image_mut().expect("sole").fill(0xa5);
    let slabs = save_encoded(device, CodecId::Exp, &pages, &table, &at, &mut fillings, 1);
    let is_stored = |layer: &Vec<SlabEntry>, chunk: usize| layer[chunk].bytes > 0;
    // A raw one among them pushes nobody else out.
    for chunk in 0..3 {
        let first = slabs.iter().position(|layer| !is_stored(layer, chunk));
        assert_eq!(first.is_none(), chunk != 1, "chunk {chunk}");
        let rest = &slabs[first.unwrap_or(slabs.len())..];
        assert!(!rest.iter().any(|layer| is_stored(layer, chunk)));
    }
    let untouched = guard.image_mut().expect("sole");
    assert!(untouched.iter().all(|&byte| byte == 0xa5));
    for (number, filling) in fillings.into_iter().enumerate() {
        let sealed = filling.seal(RecordHeader {
            codec: CodecId::Exp,
            ..header(&geometry, number as u8)
        });
        match sealed {
            Ok(slot) => {
                let room = arena.allocate(geometry.payload_bytes(), 1).expect("room");
                let raw = slot.decoded(room.into_iter().next().expect("one"));
                let raw = raw.expect("sound");
                for layer in geometry.layer_ids() {
                    let slab = raw.slab_bytes(layer).expect("there");
                    for (of, from) in pages.bytes_of(&table, layer.0 as usize, at[number], 0) {
                        assert_eq!(slab[of], bytes[from], "chunk {number}, layer {layer}");
                    }
                }
            }
            Err(error) => {
                assert!(slabs.iter().any(|layer| !is_stored(layer, number)));
                assert_eq!(error.kind(), ErrorKind::Internal);
            }
        }
    }
}

/// A layer whose turn it is not is refused.
pub(crate) fn the_layers_of_an_encoded_save_come_in_order(subject: &Subject<'_>) {
    let device = &*subject.device;
    if !device.encodes(CodecId::Exp) {
        eprintln!("SKIPPED: the device does not encode");
        return;
    }
    let geometry = KvGeometry::gqa(3, 3, 80, Dtype::Bf16, 12).expect("valid");
    let arena = arena(&geometry, 1);
    device.attach(&arena).expect("attaches");
    let pages = Pages::new(subject, &geometry, Layout::Nhd, 12, 1);
    let fillings = arena.allocate(geometry.payload_bytes(), 1).expect("room");
    let encoded = EncodedSave::new(CodecId::Exp);
    let transfer = encoded_transfer(&pages, &[PageId(0)], &[0], &fillings, &encoded);
    let submit = |layer| {
        let submitted = device.submit(&transfer, LayerId(layer), &[])?;
        let arrived = submitted.fence.point().wait(Duration::from_secs(30))?;
        assert!(arrived, "the fence arrives");
        Ok::<_, Error>(())
    };
    submit(0).expect("the first");
    assert!(submit(2).is_err(), "layer 1 is missing");
    assert!(submit(0).is_err(), "it was there");
}

/// Random bytes in every page, of which the values of all blocks but that at token 48 have few
/// exponents, but for layer 1 of the block at token 12.
pub(super) fn like_kv(random: &mut Random, pages: &Pages, table: &[PageId]) -> Vec<u8> {
    let mut bytes = random.bytes(pages.memory.read().len());
    for layer in 0..pages.geometry.layers as usize {
        for block in [0, 12, 24] {
            if (layer, block) == (1, 12) {
                continue;
            }
            for (of, at) in pages.bytes_of(table, layer, block, 0) {
                if of % 2 == 1 {
                    bytes[at] = bytes[at] & 0x83 | 0x3c;
                }
            }
        }
    }
    bytes
}

fn encoded_transfer(
    pages: &Pages,
    table: &[PageId],
    at: &[usize],
    fillings: &[Filling],
    encoded: &EncodedSave,
) -> Transfer {
    let moves = at
        .iter()
        .zip(fillings)
        .map(|(&token, filling)| SlabMove::Save {
            slot: filling.writer(),
            token: token as u32,
        });
    let table = PageTable {
        kv: pages.kv.clone(),
        pages: table.into(),
    };
    Transfer::encoded_save(table, moves.collect(), encoded.clone()).expect("valid")
}

/// Saves encoded, `at_once` layers a transfer, and notes what the device answers; by layer.
fn save_encoded(
    device: &dyn Device,
    codec: CodecId,
    pages: &Pages,
    table: &[PageId],
    at: &[usize],
    fillings: &mut [Filling],
    at_once: u32,
) -> Vec<Vec<SlabEntry>> {
    let encoded = EncodedSave::new(codec);
    let mut all = Vec::new();
    let layers = pages.geometry.layers;
    for first in (0..layers).step_by(at_once as usize) {
        let transfer = encoded_transfer(pages, table, at, fillings, &encoded);
        let group = first..layers.min(first + at_once);
        let submitted = device.submit_layers(&transfer, group, &[]).expect("sound");
        for submitted in submitted {
            let arrived = submitted.fence.point().wait(Duration::from_secs(30));
            assert!(arrived.expect("a sound device"), "the fence arrives");
            let SlabSums::Stored(ask) = submitted.sums else {
                panic!("the device does not say where it put the slabs");
            };
            all.push(ask().expect("a sound device"));
        }
    }
    for (layer, slabs) in pages.geometry.layer_ids().zip(&all) {
        assert_eq!(slabs.len(), fillings.len(), "an answer for each move");
        for (filling, slab) in fillings.iter_mut().zip(slabs) {
            filling.set_stored(layer, *slab);
        }
    }
    all
}
