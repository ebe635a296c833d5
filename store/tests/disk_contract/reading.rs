//! What a read answers.

use super::*;

pub(super) fn every_read_is_answered_once_under_its_own_number(home: &dyn Home) {
    let arena = arena(64);
    let tier = home.open(ROOMY).unwrap();
    for family in 0..5 {
        tier.write(&chain(&arena, family, 4)).unwrap().unwrap();
    }
    let (mut records, _) = scan(&*tier);
    let mut random = Random(7);
    for i in (1..records.len()).rev() {
        records.swap(i, random.below(i + 1));
    }
    let reads = records
        .iter()
        .map(|info| (info.clone(), filling(&arena, info)))
        .collect();
    let answers = read_all(&*tier, reads);
    for (answer, info) in answers.iter().zip(&records) {
        assert_right(answer.as_ref().unwrap(), info);
    }
}

/// Records of several lengths and codecs between each other, as adaptive encoding leaves them.
pub(super) fn encoded_records_come_back_as_they_were_written_whatever_their_length(
    home: &dyn Home,
) {
    let arena = arena(200);
    let tier = home.open(ROOMY).unwrap();
    let raw: Vec<_> = (0..40)
        .map(|depth| kv_chunk(&arena, 1, depth, depth as usize % 8))
        .collect();
    let codecs = [CodecId::Raw, CodecId::Planes, CodecId::Planes];
    let batch: Vec<_> = (0..)
        .zip(&raw)
        .map(|(depth, slot)| {
            let room = |bytes| arena.allocate(bytes, 1)?.pop();
            let coded = slot.encoded(codecs[depth % 3], room).unwrap();
            assert_eq!(coded.is_some(), depth % 3 != 0, "chunk {depth}");
            coded.unwrap_or_else(|| slot.clone())
        })
        .collect();
    let ids = tier.write(&batch).unwrap().unwrap();
    before_and_after_reopening(home, tier, |tier, reopened| {
        let infos = match reopened {
            false => infos_of(tier, &ids),
            true => scan(tier).0,
        };
        assert_eq!(infos.len(), batch.len());
        let lengths: HashSet<u32> = infos.iter().map(|info| info.bytes).collect();
        assert!(lengths.len() > 2, "{lengths:?}");
        // Each into a slot that it just fits, and into one for a whole chunk.
        for is_tight in [true, false] {
            let reads = infos.iter().map(|info| {
                assert_eq!(tier.image_bytes(info), Some(info.bytes));
                let bytes = match is_tight {
                    true => info.bytes,
                    false => RECORD_BYTES as u32,
                };
                let slot = RecordInfo {
                    bytes,
                    ..info.clone()
                };
                (info.clone(), filling(&arena, &slot))
            });
            for (i, answer) in read_all(tier, reads.collect()).into_iter().enumerate() {
                let slot = answer.unwrap();
                let bytes = infos[i].bytes as usize;
                assert!(
                    slot.image()[..bytes] == batch[i].image()[..bytes],
                    "record {i}, tight: {is_tight}"
                );
                let decoded = match slot.codec() {
                    CodecId::Raw => slot,
                    _ => slot
                        .decoded(filling(
                            &arena,
                            &RecordInfo {
                                bytes: RECORD_BYTES as u32,
                                ..infos[i].clone()
                            },
                        ))
                        .unwrap(),
                };
                assert!(decoded.image() == raw[i].image(), "record {i}");
            }
        }
    });
}

pub(super) fn records_are_handed_over_while_the_rest_is_still_filling(home: &dyn Home) {
    let arena = arena(64);
    let tier = home.open(ROOMY).unwrap();
    let ids = tier.write(&chain(&arena, 1, 40)).unwrap().unwrap();
    let infos = infos_of(&*tier, &ids);
    let reads = infos
        .iter()
        .map(|info| (info.clone(), filling(&arena, info)));
    let mut filling_bytes = Vec::new();
    tier.read(reads.collect(), &mut |i, answer| {
        assert_right(&answer.unwrap(), &infos[i]);
        filling_bytes.push(arena.usage().filling_bytes as u64);
    });
    let expected: Vec<_> = (0..40).rev().map(|left| left * RECORD_BYTES).collect();
    assert_eq!(filling_bytes, expected);
}

pub(super) fn a_panic_in_the_answer_frees_every_slot(home: &dyn Home) {
    let arena = arena(64);
    let tier = home.open(ROOMY).unwrap();
    let ids = tier.write(&chain(&arena, 1, 40)).unwrap().unwrap();
    let infos = infos_of(&*tier, &ids);
    let reads = infos
        .iter()
        .map(|info| (info.clone(), filling(&arena, info)));
    let reads = reads.collect();
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        tier.read(reads, &mut |_, _| panic!("the caller's own"));
    }));
    assert!(unwound.is_err());
    let usage = arena.usage();
    assert_eq!((usage.filling_bytes, usage.published_bytes), (0, 0));
    assert_eq!(assert_all_right(&*tier, &arena).len(), 40);
}

/// One bit in each kind of region: magic, version, every identity field, the tables, each slab.
pub(super) fn a_flipped_bit_in_any_region_of_a_record_is_corrupt_and_the_rest_stays(
    home: &dyn Home,
) {
    let arena = arena(64);
    let header_bytes = [
        0, 8, 10, 16, 24, 56, 88, 120, 124, 128, 136, 140, 200, 256, 268, 319, 4000,
    ];
    let payload_bytes = (0..4).flat_map(|slab| [4096 + slab * 4096, 4096 + slab * 4096 + 4095]);
    let at_bytes: Vec<usize> = header_bytes.into_iter().chain(payload_bytes).collect();
    let tier = home.open(ROOMY).unwrap();
    for (family, _) in at_bytes.iter().enumerate() {
        tier.write(&[chunk(&arena, family as u64, 0)])
            .unwrap()
            .unwrap();
    }
    let healthy = tier.write(&chain(&arena, 1000, 1)).unwrap().unwrap();
    let (records, _) = scan(&*tier);
    for (family, at) in at_bytes.iter().enumerate() {
        home.flip_bit(&key(family as u64, 0), at * 8 + family % 8);
    }
    for info in &records {
        if info.id == healthy[0] {
            assert_right(&read(&*tier, &arena, info).unwrap(), info);
            continue;
        }
        let error = read(&*tier, &arena, info).expect_err("a flipped bit");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert_eq!(arena.usage().filling_bytes, 0);
        tier.remove(&[info.id]).unwrap();
    }
    assert_eq!(assert_all_right(&*tier, &arena).len(), 1);
    drop(tier);
    assert_eq!(
        assert_all_right(&*home.open(ROOMY).unwrap(), &arena).len(),
        1
    );
}

/// A record is asked for with the wrong identity, as a caller's bug or a stale entry would.
pub(super) fn a_record_is_not_served_under_another_identity(home: &dyn Home) {
    let arena = arena(8);
    let tier = home.open(ROOMY).unwrap();
    let ids = tier.write(&chain(&arena, 1, 2)).unwrap().unwrap();
    let right = infos_of(&*tier, &ids)[1].clone();
    let mut wrong = vec![right.clone(); 3];
    wrong[0].key = key(7, 7);
    wrong[1].parent = key(7, 7);
    wrong[2].namespace = key(7, 7);
    for info in &wrong {
        let error = read(&*tier, &arena, info).expect_err("another identity");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
    assert_right(&read(&*tier, &arena, &right).unwrap(), &right);
}
