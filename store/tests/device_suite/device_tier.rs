//! Between the device tier, the host tier and pages.

use super::encoded_saves::like_kv;
use super::*;

/// Chunks go from the host tier into device slots, from there into pages, from pages into device slots
/// and back into the host tier, and every byte is the same; nothing else is written.
pub(crate) fn chunks_move_between_the_tiers_and_pages(subject: &Subject<'_>) {
    let device = &*subject.device;
    let mut seed = 1000;
    for geometry in geometries() {
        let block = geometry.block_tokens as usize;
        for (layout, page_tokens) in [
            (Layout::Hnd, 5),
            (Layout::PlanesInToken, 16),
            (Layout::Padded, 1),
        ] {
            seed += 1;
            let case = format!("seed {seed}, {geometry:?}, {layout:?}, pages of {page_tokens}");
            let mut random = Random(seed);
            let (blocks, from) = (3, random.below(2 * block));
            let at: Vec<usize> = (0..blocks).map(|number| number * block).collect();
            let host = arena(&geometry, 2 * blocks);
            device.attach(&host).expect("a sound device");
            let chunk = geometry.payload_bytes() as u64;
            let slots = device
                .arena(&geometry, chunk * (2 * blocks as u64) + 1)
                .expect("a small arena");
            assert_eq!(slots.usage().free_bytes, chunk * 2 * blocks as u64);
            let count = (blocks * block).div_ceil(page_tokens) + 2;
            let pages = Pages::new(subject, &geometry, layout, page_tokens, count);
            let bytes = random.bytes(pages.memory.read().len());
            pages.memory.write(&bytes);
            let table = random.pick(count, count);
            let saved = save(device, &host, &pages, &table, &at);
            // Some slots are in use, so that the others are not in order.
            let mut spare = slots.allocate(2 * blocks);
            let mut fillings: Vec<DeviceFilling> = Vec::new();
            while fillings.len() < blocks {
                fillings.push(spare.swap_remove(random.below(spare.len())));
            }
            drop(spare);

            // Host tier to device slots.
            let moves = saved.iter().zip(&at).map(|(slot, &token)| SlabMove::Load {
                slot: slot.clone(),
                token: token as u32,
            });
            let to_fill = slots.table_to_fill(&fillings).expect("its own");
            let up = Transfer::new(Direction::Load, to_fill, moves.collect(), 0).expect("valid");
            for layer in geometry.layer_ids() {
                move_layer(device, &up, layer);
            }
            drop(up);
            let resident = seal_device(fillings, &saved);

            // Device slots to pages, from within a block on.
            pages.memory.write(&vec![0x5a; bytes.len()]);
            let moves = resident.iter().zip(&at);
            let moves = moves.map(|(slot, &token)| SlabMove::LoadDevice {
                slot: slot.clone(),
                token: token as u32,
            });
            let page_table = || PageTable {
                kv: pages.kv.clone(),
                pages: table.clone().into(),
            };
            let down = Transfer::new(Direction::Load, page_table(), moves.collect(), from as u32);
            let down = down.expect("valid");
            for layer in geometry.layer_ids() {
                if let Some(sums) = move_layer(device, &down, layer) {
                    let expected = resident.iter().map(|slot| slot.checksum(layer));
                    assert!(expected.eq(sums.into_iter().map(Some)), "{case}");
                }
            }
            let mut expected = vec![0x5a; bytes.len()];
            for layer in 0..geometry.layers as usize {
                for &start in &at {
                    for (_, place) in pages.bytes_of(&table, layer, start, from) {
                        expected[place] = bytes[place];
                    }
                }
            }
            assert_same(&pages.memory.read(), &expected, &case);
            drop((down, resident));

            // Pages to device slots, and those to the host tier.
            pages.memory.write(&bytes);
            let fillings = slots.allocate(blocks);
            let moves = fillings.iter().zip(&at);
            let moves = moves.map(|(filling, &token)| SlabMove::SaveDevice {
                slot: filling.writer(),
                token: token as u32,
            });
            let keep = Transfer::new(Direction::Save, page_table(), moves.collect(), 0);
            let keep = keep.expect("valid");
            for layer in geometry.layer_ids() {
                move_layer(device, &keep, layer);
            }
            drop(keep);
            let resident = seal_device(fillings, &saved);
            let mut images = host
                .allocate(geometry.payload_bytes(), blocks)
                .expect("room");
            for image in &mut images {
                image.image_mut().expect("sole").fill(0xa5);
            }
            let moves = images.iter().zip(&at);
            let moves = moves.map(|(filling, &token)| SlabMove::Save {
                slot: filling.writer(),
                token: token as u32,
            });
            let to_read = slots.table_to_read(&resident).expect("its own");
            let back = Transfer::new(Direction::Save, to_read.clone(), moves.collect(), 0);
            let back = back.expect("valid");
            for layer in geometry.layer_ids() {
                move_layer(device, &back, layer);
            }
            drop(back);
            for (mut image, slot) in images.into_iter().zip(&saved) {
                let image = image.image_mut().expect("the transfer is gone").to_vec();
                for layer in geometry.layer_ids() {
                    let start = RecordHeader::BYTES + layer.0 as usize * geometry.slab_stride();
                    let sum = Checksummer::of(&image[start..start + geometry.slab_bytes()]);
                    assert_eq!(
                        Some(sum),
                        slot.slab(layer).map(|slab| slab.checksum),
                        "{case}"
                    );
                }
            }

            // What is sealed does not change, and slots do not go to slots.
            let into_sealed = saved.iter().zip(&at).map(|(slot, &token)| SlabMove::Load {
                slot: slot.clone(),
                token: token as u32,
            });
            let into_sealed = into_sealed.collect();
            let refused = Transfer::new(Direction::Load, to_read.clone(), into_sealed, 0);
            assert_eq!(refused.err().expect("sealed").kind(), ErrorKind::Invalid);
            let within = resident.iter().zip(&at);
            let within = within.map(|(slot, &token)| SlabMove::LoadDevice {
                slot: slot.clone(),
                token: token as u32,
            });
            let refused = Transfer::new(Direction::Load, to_read.clone(), within.collect(), 0);
            assert_eq!(
                refused.err().expect("both are slots").kind(),
                ErrorKind::Invalid
            );
            drop((resident, to_read));
            let usage = slots.usage();
            assert_eq!(usage.free_bytes, usage.capacity_bytes, "{case}");
        }
    }
}

fn seal_device(fillings: Vec<DeviceFilling>, saved: &[Slot]) -> Vec<DeviceSlot> {
    let seal = |(filling, slot): (DeviceFilling, &Slot)| {
        let header = slot.header().expect("sealed");
        filling.seal(header).expect("whole")
    };
    fillings.into_iter().zip(saved).map(seal).collect()
}

/// Everything of a load out of the device tier is leaked in the middle of it, and the bytes arrive.
pub(crate) fn everything_of_a_device_transfer_may_be_leaked(subject: &Subject<'_>) {
    let device = &*subject.device;
    let geometry = &KvGeometry::gqa(4, 8, 128, Dtype::Bf16, 16).expect("valid");
    let chunk = geometry.payload_bytes() as u64;
    let host = arena(geometry, 32);
    device.attach(&host).expect("a sound device");
    let slots = device.arena(geometry, 32 * chunk).expect("small");
    let pages = Pages::new(subject, geometry, Layout::Nhd, 16, 32);
    let bytes = Random(11).bytes(pages.memory.read().len());
    pages.memory.write(&bytes);
    let table = Random(12).pick(32, 32);
    let at: Vec<usize> = (0..32).map(|block| block * 16).collect();
    let saved = save(device, &host, &pages, &table, &at);
    let fillings = slots.allocate(32);
    let page_table = || PageTable {
        kv: pages.kv.clone(),
        pages: table.clone().into(),
    };
    let moves = fillings.iter().zip(&at);
    let moves = moves.map(|(filling, &token)| SlabMove::SaveDevice {
        slot: filling.writer(),
        token: token as u32,
    });
    let keep = Transfer::new(Direction::Save, page_table(), moves.collect(), 0).expect("valid");
    for layer in geometry.layer_ids() {
        move_layer(device, &keep, layer);
    }
    drop(keep);
    let resident = seal_device(fillings, &saved);
    pages.memory.write(&vec![0x5a; bytes.len()]);
    let moves = resident.into_iter().zip(&at);
    let moves = moves.map(|(slot, &token)| SlabMove::LoadDevice {
        slot,
        token: token as u32,
    });
    let load = Transfer::new(Direction::Load, page_table(), moves.collect(), 0).expect("valid");
    let mut last = None;
    for layer in geometry.layer_ids() {
        let submitted = device.submit(&load, layer, &[]).expect("sound");
        std::mem::forget(last.replace(submitted.fence));
    }
    std::mem::forget((load, slots));
    let arrived = last.expect("four layers");
    let arrived = arrived.point().wait(Duration::from_secs(30));
    assert!(arrived.expect("a sound device"));
    assert_same(&pages.memory.read(), &bytes, "a leaked load");
}

/// Encoded chunks go up into device slots, where they are raw, from there into pages, and back down
/// encoded or raw; what comes down is known to be what went up, and what is not that is noticed.
pub(crate) fn encoded_chunks_rise_into_the_device_tier_and_sink_again(subject: &Subject<'_>) {
    let device = &*subject.device;
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let codec = CodecId::lossless(dtype);
        if !device.decodes(codec) {
            continue;
        }
        let geometry = KvGeometry::gqa(4, 3, 80, dtype, 12).expect("valid");
        let host = arena(&geometry, 16);
        device.attach(&host).expect("attaches");
        let chunk = geometry.payload_bytes() as u64;
        let slots = device.arena(&geometry, 4 * chunk).expect("small");
        let pages = Pages::new(subject, &geometry, Layout::Hnd, 5, 15);
        let mut random = Random(31);
        let (table, at) = (random.pick(15, 15), [0, 12, 24, 48]);
        let bytes = like_kv(&mut random, &pages, &table);
        pages.memory.write(&bytes);
        let raw = save(device, &host, &pages, &table, &at);
        let coded = raw.iter().map(|slot| {
            let room = |bytes| Some(host.allocate(bytes, 1)?.remove(0));
            let coded = slot.encoded(codec, room).expect("sound");
            coded.unwrap_or_else(|| slot.clone())
        });
        let coded: Vec<Slot> = coded.collect();
        let fillings = slots.allocate(4);
        let moves = coded.iter().zip(&at).map(|(slot, &token)| SlabMove::Load {
            slot: slot.clone(),
            token: token as u32,
        });
        let to_fill = slots.table_to_fill(&fillings).expect("its own");
        let token = |index: usize| index as u32 * 12;
        let moves = moves.enumerate().map(|(index, slab_move)| match slab_move {
            SlabMove::Load { slot, .. } => SlabMove::Load {
                slot,
                token: token(index),
            },
            other => other,
        });
        let up = Transfer::new(Direction::Load, to_fill, moves.collect(), 0).expect("valid");
        for layer in geometry.layer_ids() {
            move_layer(device, &up, layer);
        }
        drop(up);
        let resident = seal_device(fillings, &coded);
        for (slot, raw) in resident.iter().zip(&raw) {
            for layer in geometry.layer_ids() {
                let known = slot.checksum(layer);
                let expected = raw.slab(layer).expect("there").checksum;
                assert!(known.is_none_or(|known| known == expected));
            }
        }

        pages.memory.write(&vec![0x5a; bytes.len()]);
        let moves = resident.iter().zip(&at);
        let moves = moves.map(|(slot, &token)| SlabMove::LoadDevice {
            slot: slot.clone(),
            token: token as u32,
        });
        let page_table = PageTable {
            kv: pages.kv.clone(),
            pages: table.clone().into(),
        };
        let load = Transfer::new(Direction::Load, page_table, moves.collect(), 0).expect("valid");
        let mut expected = vec![0x5a; bytes.len()];
        for layer in geometry.layer_ids() {
            move_layer(device, &load, layer);
            for start in at {
                for (_, place) in pages.bytes_of(&table, layer.0 as usize, start, 0) {
                    expected[place] = bytes[place];
                }
            }
        }
        assert_same(&pages.memory.read(), &expected, "out of the device tier");
        drop(load);

        for is_encoded in [false, true] {
            if is_encoded && !device.encodes(codec) {
                eprintln!("SKIPPED: the device does not encode {codec:?}");
                continue;
            }
            let mut fillings = host.allocate(chunk as usize, 4).expect("room");
            let moves = fillings.iter().enumerate();
            let moves = moves.map(|(index, filling)| SlabMove::Save {
                slot: filling.writer(),
                token: token(index),
            });
            let (moves, to_read) = (moves.collect(), slots.table_to_read(&resident));
            let to_read = to_read.expect("its own");
            let down = match is_encoded {
                false => Transfer::new(Direction::Save, to_read, moves, 0),
                true => Transfer::encoded_save(to_read, moves, EncodedSave::new(codec)),
            };
            let down = down.expect("valid");
            for layer in geometry.layer_ids() {
                let submitted = device.submit(&down, layer, &[]).expect("sound");
                let arrived = submitted.fence.point().wait(Duration::from_secs(30));
                assert!(arrived.expect("sound"));
                if let SlabSums::Stored(ask) = submitted.sums {
                    for (filling, slab) in fillings.iter_mut().zip(ask().expect("sound")) {
                        filling.set_stored(layer, slab);
                    }
                    continue;
                }
                for (filling, slot) in fillings.iter_mut().zip(&raw) {
                    filling.set_slab(layer, slot.slab(layer).expect("there").checksum);
                }
            }
            drop(down);
            for (number, filling) in fillings.into_iter().enumerate() {
                let slot = filling.seal(resident[number].header().clone());
                let slot = slot.expect("whole");
                // The last one does not shrink.
                assert_eq!(slot.codec() != CodecId::Raw, is_encoded && number < 3);
                for (other, header) in resident.iter().map(DeviceSlot::header).enumerate() {
                    assert_eq!(slot.holds(header).expect("sound"), number == other);
                }
                let mut damaged = resident[number].header().clone();
                damaged.slabs[2].checksum.0 ^= 1;
                assert!(!slot.holds(&damaged).expect("sound"));
            }
        }
    }
}
