//! One transfer: between slots of the host tier and pages.

use super::*;

/// Submits one layer and waits for it.
pub(crate) fn move_layer(
    device: &dyn Device,
    transfer: &Transfer,
    layer: LayerId,
) -> Option<Vec<Checksum>> {
    let submitted = device.submit(transfer, layer, &[]).expect("a sound device");
    let arrived = submitted.fence.point().wait(Duration::from_secs(30));
    assert!(arrived.expect("a sound device"), "the fence arrives");
    match submitted.sums {
        SlabSums::Unknown => None,
        SlabSums::Known(sums) => Some(sums),
        SlabSums::AfterFence(ask) => Some(ask().expect("a sound device")),
        SlabSums::Stored(_) => panic!("no save was to be encoded"),
        SlabSums::Compared(ask) => {
            let first_wrong = ask().expect("a sound device");
            assert_eq!(first_wrong, None, "what was saved is what is loaded");
            None
        }
    }
}

/// Saves the blocks at `positions` out of `pages`, one layer after the other, and seals them.
pub(crate) fn save(
    device: &dyn Device,
    arena: &HostArena,
    pages: &Pages,
    table: &[PageId],
    positions: &[usize],
) -> Vec<Slot> {
    let geometry = &pages.geometry;
    let mut fillings = arena
        .allocate(geometry.payload_bytes(), positions.len())
        .expect("room");
    for filling in &mut fillings {
        filling.image_mut().expect("sole").fill(0xa5);
    }
    let moves = positions.iter().zip(&fillings);
    let moves = moves.map(|(&token, filling)| SlabMove::Save {
        slot: filling.writer(),
        token: token as u32,
    });
    let table = PageTable {
        kv: pages.kv.clone(),
        pages: table.into(),
    };
    let transfer = Transfer::new(Direction::Save, table, moves.collect(), 0).expect("valid");
    let sums: Vec<_> = geometry
        .layer_ids()
        .map(|layer| move_layer(device, &transfer, layer))
        .collect();
    drop(transfer);
    let seal = |(number, mut filling): (usize, Filling)| {
        let image = filling.image_mut().expect("the transfer is gone").to_vec();
        for layer in geometry.layer_ids() {
            let start = RecordHeader::BYTES + layer.0 as usize * geometry.slab_stride();
            let sum = Checksummer::of(&image[start..start + geometry.slab_bytes()]);
            if let Some(sums) = &sums[layer.0 as usize] {
                assert_eq!(sums[number], sum, "what the device saw is what it stored");
            }
            filling.set_slab(layer, sum);
        }
        filling.seal(header(geometry, number as u8)).expect("whole")
    };
    fillings.into_iter().enumerate().map(seal).collect()
}

pub(crate) fn load(
    slots: &[Slot],
    pages: &Pages,
    table: &[PageId],
    at: &[usize],
    from: usize,
) -> Transfer {
    let moves = slots.iter().zip(at).map(|(slot, &token)| SlabMove::Load {
        slot: slot.clone(),
        token: token as u32,
    });
    let table = PageTable {
        kv: pages.kv.clone(),
        pages: table.into(),
    };
    Transfer::new(Direction::Load, table, moves.collect(), from as u32).expect("valid")
}

/// Every geometry, layout and size of page against a block of 12 tokens; blocks that are not aligned
/// to pages; tables in order and at random; loads that start at, before, within and behind blocks.
pub(crate) fn a_move_writes_every_byte_of_its_tokens_and_no_other(subject: &Subject<'_>) {
    let device = &*subject.device;
    let mut seed = 0;
    for geometry in geometries() {
        let block = geometry.block_tokens as usize;
        let arena = arena(&geometry, 3);
        device.attach(&arena).expect("a sound device");
        for layout in LAYOUTS {
            for page_tokens in [1, 5, 12, 32] {
                seed += 1;
                let case = format!("{layout:?}, {page_tokens} a page, seed {seed}, {geometry:?}");
                let mut random = Random(seed);
                let at = [block, 2 * block, 4 * block];
                let needed = (5 * block).div_ceil(page_tokens);
                let count = needed + 2;
                let pages = Pages::new(subject, &geometry, layout, page_tokens, count);
                let table = |random: &mut Random| match random.below(3) {
                    0 => (0..needed as u32).map(PageId).collect(),
                    _ => random.pick(needed, count),
                };

                let before = random.bytes(pages.memory.read().len());
                pages.memory.write(&before);
                let source = table(&mut random);
                let slots = save(device, &arena, &pages, &source, &at);
                assert_same(&pages.memory.read()[..before.len()], &before, &case);
                for (slot, &block) in slots.iter().zip(&at) {
                    for layer in geometry.layer_ids() {
                        let mut expected = vec![0; geometry.slab_bytes()];
                        for (to, from) in pages.bytes_of(&source, layer.0 as usize, block, 0) {
                            expected[to] = before[from];
                        }
                        assert_same(slot.slab_bytes(layer).expect("there"), &expected, &case);
                    }
                }

                for from in [0, block, block + 5, 3 * block, 5 * block - 1, 5 * block] {
                    let mut expected = vec![0x5a; before.len()];
                    pages.memory.write(&expected);
                    let target = table(&mut random);
                    let transfer = load(&slots, &pages, &target, &at, from);
                    for layer in geometry.layer_ids().rev() {
                        let sums = move_layer(device, &transfer, layer);
                        for (index, (slot, &block)) in slots.iter().zip(&at).enumerate() {
                            let slab = slot.slab_bytes(layer).expect("there");
                            for (of, to) in pages.bytes_of(&target, layer.0 as usize, block, from) {
                                expected[to] = slab[of];
                            }
                            if let Some(sums) = &sums {
                                let whole = slot.slab(layer).expect("there").checksum;
                                assert_eq!(sums[index], whole, "{case}, from {from}");
                            }
                        }
                        // After each layer: the others are not touched.
                        let got = pages.memory.read();
                        assert_same(
                            &got[..expected.len()],
                            &expected,
                            &format!("{case}, from {from}"),
                        );
                    }
                }
            }
        }
    }
}

/// A slot that does not hold the layer is refused before anything moves.
pub(crate) fn a_layer_that_is_not_there_is_invalid_and_moves_nothing(subject: &Subject<'_>) {
    let device = &*subject.device;
    let geometry = &geometries()[0];
    let arena = arena(geometry, 2);
    device.attach(&arena).expect("a sound device");
    let pages = Pages::new(subject, geometry, Layout::Nhd, 12, 2);
    let table = [PageId(1), PageId(0)];
    let slots = save(device, &arena, &pages, &table, &[0, 12]);
    let poison = vec![0x5a; pages.memory.read().len()];
    pages.memory.write(&poison);
    let transfer = load(&slots, &pages, &table, &[0, 12], 0);
    let answer = device.submit(&transfer, LayerId(geometry.layers), &[]);
    let error = answer.err().expect("no such layer");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(pages.memory.read(), poison);
}

/// The device's own clone of a transfer keeps slots alive; dropping every other handle right after
/// the submission changes nothing.
pub(crate) fn handles_may_be_dropped_while_a_layer_is_under_way(subject: &Subject<'_>) {
    let device = &*subject.device;
    let geometry = &geometries()[0];
    let arena = arena(geometry, 1);
    device.attach(&arena).expect("a sound device");
    let pages = Pages::new(subject, geometry, Layout::Nhd, 12, 1);
    let bytes = Random(7).bytes(pages.memory.read().len());
    pages.memory.write(&bytes);
    let slots = save(device, &arena, &pages, &[PageId(0)], &[0]);
    pages.memory.write(&vec![0x5a; bytes.len()]);
    let transfer = load(&slots, &pages, &[PageId(0)], &[0], 0);
    drop(slots);
    let fences: Vec<_> = geometry
        .layer_ids()
        .map(|layer| device.submit(&transfer, layer, &[]).expect("sound").fence)
        .collect();
    drop(transfer);
    for fence in fences {
        let arrived = fence.point().wait(Duration::from_secs(30));
        assert!(arrived.expect("a sound device"));
    }
    assert_eq!(pages.memory.read(), bytes);
    assert_eq!(arena.usage().free_bytes, arena.usage().capacity_bytes);
}

/// Fences are reached in the end, and streams can be ordered behind them.
pub(crate) fn a_recorded_point_is_reached_and_orders_a_stream(subject: &Subject<'_>) {
    let fence = subject.device.record(Stream::HOST).expect("sound");
    assert!(fence.point().is_reached().expect("sound"));
    subject.device.order(Stream::HOST, &fence).expect("sound");
}
