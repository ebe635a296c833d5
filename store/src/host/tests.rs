//! Shown: the life of a slot in every order of dropping its handles, that nothing of an earlier
//! chunk is left in a sealed image, and that the books balance at every moment under ten threads.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::*;
use crate::{
    Checksum, Checksummer, CodecId, Dtype, Error, ErrorKind, Key, KvGeometry, LayerId,
    RecordHeader, SlabEntry,
};

/// Slabs of 160 B at a stride of 256: with gaps.
fn geometry() -> KvGeometry {
    KvGeometry::gqa(3, 2, 10, Dtype::Bf16, 2).expect("valid")
}

fn open(slots: usize) -> HostArena {
    HostArena::open(&geometry(), slots * 8192, |_, _| {}).expect("small")
}

fn header(key: u8) -> RecordHeader {
    RecordHeader {
        namespace: Key([1; 32]),
        parent: Key([2; 32]),
        key: Key([key; 32]),
        depth: 0,
        tokens: 2,
        geometry: geometry().fingerprint(),
        layers: 0..3,
        codec: CodecId::Raw,
        slabs: Vec::new(),
    }
}

fn filled(arena: &HostArena, byte: u8) -> Filling {
    let bytes = geometry().payload_bytes();
    let mut filling = arena.allocate(bytes, 1).expect("room").remove(0);
    let writer = filling.writer();
    for layer in geometry().layer_ids() {
        let sum = writer.write_slab(layer, |slab| {
            slab.fill(byte);
            Checksummer::of(slab)
        });
        filling.set_slab(layer, sum.expect("fits"));
    }
    filling
}

/// Bytes from the mapping's start to the slot's image.
fn offset(filling: &Filling) -> usize {
    filling.writer().payload().0 - RecordHeader::BYTES
}

fn sealed(arena: &HostArena, byte: u8) -> Slot {
    filled(arena, byte).seal(header(byte)).expect("complete")
}

#[test]
fn open_reports_progress_to_the_end_and_every_page_is_there() {
    let last = AtomicUsize::new(0);
    let arena = HostArena::open(&geometry(), (70 << 20) + 5, |touched, total| {
        assert_eq!(total, 70 << 20);
        last.fetch_max(touched, Ordering::Relaxed);
    })
    .expect("room");
    assert_eq!(last.into_inner(), 70 << 20);
    assert_eq!(arena.usage().capacity_bytes, 70 << 20);
    assert_eq!(arena.mapping().1, 70 << 20);
}

#[test]
fn silly_sizes_are_refused_with_a_reason() {
    for bytes in [0, 4096, 8191, usize::MAX / 2, 1 << 42] {
        let error = HostArena::open(&geometry(), bytes, |_, _| {}).expect_err("silly");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("host tier"), "{error}");
    }
}

#[test]
fn slots_of_one_allocation_are_consecutive_and_all_or_nothing() {
    let arena = open(4);
    let bytes = geometry().payload_bytes();
    assert!(arena.allocate(bytes, 5).is_none());
    assert!(arena.allocate(usize::MAX, 1).is_none());
    assert!(arena.allocate(bytes, usize::MAX).is_none());
    let mut fillings = arena.allocate(bytes, 4).expect("room");
    let offsets: Vec<_> = fillings.iter().map(offset).collect();
    assert_eq!(offsets, [0, 8192, 16384, 24576]);
    assert!(arena.allocate(bytes, 1).is_none());
    fillings.remove(1);
    assert_eq!(arena.usage().largest_free_bytes, 8192);
    assert_eq!(offset(&arena.allocate(bytes, 1).expect("a hole")[0]), 8192);
}

#[test]
fn a_sealed_slot_reads_back_and_holds_nothing_of_an_earlier_chunk() {
    let arena = open(1);
    let mut dirty = arena.allocate(4096, 1).expect("room").remove(0);
    dirty.image_mut().expect("sole").fill(0xee);
    drop(dirty);
    let slot = sealed(&arena, 7);
    let read = slot.header().expect("sealed");
    assert_eq!(read.key, Key([7; 32]));
    let mut expected = vec![0; 8192];
    expected[..4096].copy_from_slice(&read.encode()[..]);
    for layer in geometry().layer_ids() {
        let slab = slot.slab(layer).expect("there");
        assert_eq!(Some(&slab), read.slab(layer));
        let regular = slot.regular_offset().expect("sealed whole and raw");
        let start = slot.offset() + RecordHeader::BYTES + slab.offset as usize;
        assert_eq!(regular + layer.0 as usize * 256, start);
        assert_eq!(slot.slab_bytes(layer), Some(&[7; 160][..]));
        assert_eq!(slab.checksum, Checksummer::of(&[7; 160]));
        expected[4096 + slab.offset as usize..][..160].fill(7);
    }
    assert_eq!(slot.slab(LayerId(3)), None);
    assert_eq!(slot.image(), expected);
}

#[test]
fn a_slot_lives_as_long_as_its_last_handle_or_id() {
    let arena = open(2);
    let slot = sealed(&arena, 1);
    let clone = slot.clone();
    let id = slot.into_id();
    drop(clone);
    assert_eq!(arena.usage().published_slots, 1);
    let again = arena.slot(id);
    arena.release(id);
    assert_eq!(again.header().expect("held").key, Key([1; 32]));
    drop(again);
    assert_eq!(arena.usage().free_bytes, 2 * 8192);
    let gone = thread::scope(|scope| scope.spawn(|| arena.slot(id)).join().is_err());
    assert!(gone, "an id that was given back names nothing");
}

#[test]
fn a_dropped_filling_is_not_reused_while_a_transfer_holds_it() {
    let arena = open(1);
    let mut filling = filled(&arena, 1);
    let writer = filling.writer();
    assert!(filling.image_mut().is_err());
    let error = filling.seal(header(1)).expect_err("a writer exists");
    assert_eq!(error.kind(), ErrorKind::Internal);
    assert_eq!(arena.usage().filling_bytes, 8192);
    assert!(arena.allocate(1, 1).is_none());
    drop(writer);
    assert_eq!(arena.usage().free_bytes, 8192);
}

#[test]
fn a_slot_without_all_of_its_slabs_is_not_sealed() {
    let arena = open(1);
    let mut filling = arena.allocate(4096, 1).expect("room").remove(0);
    filling.set_slab(LayerId(0), Checksum(1));
    filling.set_slab(LayerId(2), Checksum(1));
    let error = filling.seal(header(1)).expect_err("layer 1 is missing");
    assert!(error.to_string().ends_with("layer=1"), "{error}");
    assert_eq!(arena.usage().free_bytes, 8192);
}

#[test]
fn an_image_read_from_elsewhere_is_sealed_only_if_all_of_it_verifies() {
    let arena = open(2);
    let original = sealed(&arena, 5);
    let image = original.image().to_vec();
    let read = |edit: &dyn Fn(&mut [u8])| {
        let mut filling = arena.allocate(4096, 1).expect("room").remove(0);
        let bytes = filling.image_mut().expect("sole");
        bytes.copy_from_slice(&image);
        edit(bytes);
        filling.seal_image(|header| {
            (header.key == Key([5; 32]))
                .then_some(())
                .ok_or_else(|| Error::corrupt("another chunk"))
        })
    };
    // Only what is behind the last slab may differ, and is cleaned.
    let same = read(&|bytes| bytes[8000] = 1).expect("verifies");
    assert_eq!(same.image(), image);
    drop(same);
    for at in [8, 60, 300, 4096, 4096 + 159, 4096 + 256, 4096 + 512 + 159] {
        let error = read(&|bytes| bytes[at] ^= 1).expect_err("damaged");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{at}");
    }
    let other = header(6);
    let page = RecordHeader {
        slabs: original.header().expect("sealed").slabs,
        ..other
    };
    let error = read(&|bytes| bytes[..4096].copy_from_slice(&page.encode()[..]));
    assert!(
        error
            .expect_err("key 6")
            .to_string()
            .contains("another chunk")
    );
    assert_eq!(arena.usage().free_bytes, 8192);
}

/// Slabs of 12,800 B, so that an encoded chunk takes fewer granules.
fn large() -> KvGeometry {
    KvGeometry::gqa(3, 2, 100, Dtype::Bf16, 16).expect("valid")
}

/// A filling full of an earlier chunk, with slabs of so many bytes of 7 at such offsets.
fn coded(arena: &HostArena, slabs: &[(u32, u32)]) -> Filling {
    let bytes = large().payload_bytes();
    let mut filling = arena.allocate(bytes, 1).expect("room").remove(0);
    let image = filling.image_mut().expect("sole");
    image.fill(0xee);
    for &(offset, bytes) in slabs {
        image[RecordHeader::BYTES + offset as usize..][..bytes as usize].fill(7);
    }
    for (layer, &(offset, bytes)) in large().layer_ids().zip(slabs) {
        filling.set_stored(layer, coded_entry(offset, bytes));
    }
    filling
}

fn coded_entry(offset: u32, bytes: u32) -> SlabEntry {
    SlabEntry {
        offset,
        bytes,
        checksum: Checksummer::of(&vec![7; bytes as usize]),
    }
}

#[test]
fn a_slot_of_an_encoded_chunk_gives_its_tail_back_and_shows_nothing_of_an_earlier_one() {
    let bytes = large().payload_bytes();
    let arena = HostArena::open(&large(), 4096 + bytes.next_multiple_of(4096), |_, _| {});
    let arena = arena.expect("small");
    let header = RecordHeader {
        codec: CodecId::Exp,
        geometry: large().fingerprint(),
        ..header(3)
    };
    // The last slab is raw, and starts where a longer neighbour's would.
    let slabs = [(0, 700), (1024, 900), (2560, 12_800)];
    let sealed = coded(&arena, &slabs)
        .seal(header.clone())
        .expect("lies right");
    assert_eq!(sealed.image().len(), 4096 + 16_384);
    let mut expected = vec![0; 16_384];
    for (offset, bytes) in slabs {
        expected[offset as usize..][..bytes as usize].fill(7);
    }
    assert!(sealed.image()[4096..] == expected);
    assert_eq!(sealed.header().expect("reads back").codec, CodecId::Exp);
    assert!(sealed.is_raw(&sealed.slab(LayerId(2)).expect("there")));
    assert_eq!(sealed.regular_offset(), None);
    let usage = arena.usage();
    assert_eq!(usage.published_bytes, 4096 + 16_384);
    assert_eq!(usage.free_bytes, usage.capacity_bytes - 4096 - 16_384);
    assert_eq!(usage.largest_free_bytes, usage.free_bytes);
    drop(sealed);
    assert_eq!(arena.usage().largest_free_bytes, usage.capacity_bytes);

    // Raw after all, in its places: the codec is not needed.
    let stride = large().slab_stride() as u32;
    let raw = [(0, 12_800), (stride, 12_800), (2 * stride, 12_800)];
    let sealed = coded(&arena, &raw).seal(header.clone()).expect("whole");
    assert_eq!(sealed.codec(), CodecId::Raw);
    assert!(sealed.regular_offset().is_some());
    drop(sealed);

    // Unaligned, overlapping, behind the raw place, longer than raw, not stored, behind the end.
    for wrong in [
        [(0, 700), (1000, 900), (2560, 100)],
        [(0, 1100), (1024, 900), (2560, 100)],
        [(0, 700), (1024, 900), (2 * stride + 256, 100)],
        [(0, 700), (1024, 12_801), (stride + 256, 100)],
        [(0, 700), (1024, 0), (2560, 100)],
        [(256, 700), (1024, 900), (2560, 100)],
    ] {
        let error = coded(&arena, &wrong)
            .seal(header.clone())
            .expect_err("lies wrong");
        assert_eq!(error.kind(), ErrorKind::Internal, "{wrong:?}");
        assert_eq!(arena.usage().free_bytes, usage.capacity_bytes);
    }
}

#[test]
fn what_is_cleared_while_slabs_are_on_their_way_is_the_same() {
    let bytes = large().payload_bytes();
    let arena = HostArena::open(&large(), 4 * (4096 + 40_960), |_, _| {}).expect("small");
    let header = RecordHeader {
        codec: CodecId::Exp,
        geometry: large().fingerprint(),
        ..header(4)
    };
    let slabs = [(0, 700), (1024, 900), (2560, 12_800)];
    let expected = coded(&arena, &slabs).seal(header.clone()).expect("right");
    for known in 0..=3 {
        let mut filling = arena.allocate(bytes, 1).expect("room").remove(0);
        filling.image_mut().expect("sole").fill(0xee);
        let writer = filling.writer();
        for (number, (offset, bytes)) in slabs.into_iter().enumerate() {
            if number == known {
                filling.clear_ahead();
                filling.clear_ahead();
            }
            writer.write_from(offset as usize, |room| room[..bytes as usize].fill(7));
            let layer = LayerId(number as u32);
            filling.set_stored(layer, coded_entry(offset, bytes));
        }
        if known == 3 {
            filling.clear_ahead();
        }
        drop(writer);
        let slot = filling.seal(header.clone()).expect("right");
        assert!(slot.image() == expected.image(), "{known}");
    }
    // Whoever is given the whole image may write anywhere again.
    let mut filling = coded(&arena, &slabs);
    filling.clear_ahead();
    let image = filling.image_mut().expect("sole");
    image[300..4096].fill(0xee);
    image[4096 + 700..4096 + 1024].fill(0xee);
    let slot = filling.seal(header.clone()).expect("right");
    assert!(slot.image() == expected.image());
    // One that is noted again, elsewhere.
    let mut filling = coded(&arena, &[(0, 700), (1536, 900), (2560, 12_800)]);
    filling.clear_ahead();
    let writer = filling.writer();
    writer.write_from(1024, |room| room[..900].fill(7));
    drop(writer);
    filling.set_stored(LayerId(1), coded_entry(1024, 900));
    let slot = filling.seal(header.clone()).expect("right");
    assert!(slot.image() == expected.image());
    // Slabs that do not lie right are left to `seal`.
    for (wrong, offset, bytes) in [(0, 0, 1100), (1, 512, 900), (2, 41_216, 100)] {
        let mut filling = coded(&arena, &slabs);
        filling.set_stored(LayerId(wrong), coded_entry(offset, bytes));
        filling.clear_ahead();
        assert!(filling.seal(header.clone()).is_err(), "slab {wrong}");
    }
}

/// More chunks than are published at once, of several lengths; some of them stay, one does not lie right.
#[test]
fn chunks_that_are_sealed_and_released_together_keep_the_books() {
    const COUNT: usize = 300;
    let slot = 4096 + large().payload_bytes().next_multiple_of(4096);
    let arena = HostArena::open(&large(), COUNT * slot, |_, _| {}).expect("small");
    let payload = large().payload_bytes();
    assert_eq!(arena.room(payload, 1000), COUNT);
    assert_eq!(arena.room(payload, 7), 7);
    assert_eq!(arena.room(usize::MAX, 7), 0);
    let slabs = |number: usize| match number % 3 {
        _ if number == 200 => [(0, 700), (1000, 900), (2560, 100)],
        0 => [(0, 700), (1024, 900), (2560, 100)],
        1 => [(0, 700), (1024, 900), (2560, 12_800)],
        _ => [(0, 12_800), (12_800, 12_800), (25_600, 12_800)],
    };
    let chunks = (0..COUNT).map(|number| {
        let header = RecordHeader {
            codec: CodecId::Exp,
            geometry: large().fingerprint(),
            ..header(number as u8)
        };
        (coded(&arena, &slabs(number)), header)
    });
    let sealed = arena.seal_all(chunks.collect::<Vec<_>>());
    assert_eq!(sealed.len(), COUNT);
    for (number, slot) in sealed.iter().enumerate() {
        match slot {
            Ok(slot) => {
                assert_eq!(slot.key(), Key([number as u8; 32]));
                let kept = [8192, 4096 + 16_384, 4096 + 40_960][number % 3];
                assert_eq!(slot.image().len(), kept, "{number}");
            }
            Err(error) => assert_eq!((number, error.kind()), (200, ErrorKind::Internal)),
        }
    }
    let slots: Vec<Slot> = sealed.into_iter().flatten().collect();
    let published: usize = slots.iter().map(|slot| slot.image().len()).sum();
    let usage = arena.usage();
    assert_eq!((usage.published_slots, usage.filling_bytes), (COUNT - 1, 0));
    assert_eq!(usage.published_bytes, published);

    // In any order; every tenth is held by somebody else, too.
    let held: Vec<Slot> = slots.iter().step_by(10).cloned().collect();
    let mut ids: Vec<SlotId> = slots.into_iter().map(Slot::into_id).collect();
    ids.rotate_left(77);
    arena.release_all(ids);
    assert_eq!(arena.usage().published_slots, held.len());
    assert!(held.iter().all(|slot| slot.header().is_ok()));
    drop(held);
    let usage = arena.usage();
    assert_eq!(usage.free_bytes, usage.capacity_bytes);
    assert_eq!(usage.largest_free_bytes, usage.capacity_bytes);
}

#[test]
fn a_slot_is_not_sealed_by_another_arena() {
    let (arena, other) = (open(1), open(1));
    let mut sealed = other.seal_all([(filled(&arena, 1), header(1))]);
    let error = sealed.remove(0).expect_err("another's");
    assert_eq!(error.kind(), ErrorKind::Internal);
    assert_eq!(arena.usage().free_bytes, 8192);
}

#[test]
fn the_mapping_outlives_the_arena_while_a_slot_is_held() {
    let arena = open(1);
    let slot = sealed(&arena, 9);
    drop(arena);
    assert_eq!(slot.slab_bytes(LayerId(2)), Some(&[9; 160][..]));
}

#[test]
fn free_filling_and_published_add_up_under_ten_threads() {
    let arena = open(40);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        // `usage` asserts the sum.
        let watcher = scope.spawn(|| {
            let mut looks = 0_u32;
            // One look at least, also where the workers are done before this thread runs.
            loop {
                arena.usage();
                looks += 1;
                if done.load(Ordering::Relaxed) {
                    break looks;
                }
                thread::yield_now();
            }
        });
        let workers: Vec<_> = (0..10_u8)
            .map(|worker| {
                let arena = &arena;
                scope.spawn(move || {
                    for round in 0..200_usize {
                        let bytes = 1 + (round * 977 + usize::from(worker) * 131) % 12_000;
                        let Some(fillings) = arena.allocate(bytes, 1 + round % 3) else {
                            continue;
                        };
                        drop(fillings);
                        let Some(mut fillings) = arena.allocate(4096, 1) else {
                            continue;
                        };
                        drop(fillings.remove(0));
                        if arena.usage().free_bytes < 8192 * 12 {
                            continue;
                        }
                        let slot = sealed(arena, worker);
                        let ids = [slot.clone().into_id(), slot.into_id()];
                        arena.release(ids[0]);
                        let slot = arena.slot(ids[1]);
                        arena.release(ids[1]);
                        assert_eq!(slot.slab_bytes(LayerId(1)), Some(&[worker; 160][..]));
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().expect("no worker panics");
        }
        done.store(true, Ordering::Relaxed);
        assert!(watcher.join().expect("the sum holds") > 0);
    });
    assert_eq!(arena.usage().free_bytes, arena.usage().capacity_bytes);
}
