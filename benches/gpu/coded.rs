//! Encoded KV over the link: loads of slots that hold encoded slabs, and saves that encode.

use std::thread;

use stemkv_store::codec::exp::{self, ExpShape};
use stemkv_store::device::{Calibration, CudaDevice};
use stemkv_store::*;

use crate::compute::encoded_beside_compute;
use crate::kv::{Sample, layers_of};
use crate::link::Ceiling;
use crate::report::{Goal, figure_of, median};
use crate::store::{
    Model, Pages, Random, encoded_save, execute, header, load_transfer, models, open_arena, rate,
    save, save_transfer, seal_encoded, take_all,
};

const REPEATS: usize = 7;
/// What loads and saves are to reach, of one contiguous copy of the raw bytes.
const GOAL: f64 = 1.30;

/// The chunks encoded by the CPU, as a save by a GPU lays them out: slots of one length, and in all of
/// them a layer's slab starts behind the longest one of the layer before.
fn encoded_run(arena: &HostArena, raw: &[Slot]) -> Vec<Slot> {
    let geometry = arena.geometry();
    let shape = ExpShape::new(geometry).expect("bf16");
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let part = raw.len().div_ceil(threads);
    let in_parts = |work: &(dyn Fn(&Slot) -> Vec<Vec<u8>> + Sync)| -> Vec<Vec<Vec<u8>>> {
        thread::scope(|scope| {
            let parts: Vec<_> = raw
                .chunks(part)
                .map(|slots| scope.spawn(move || slots.iter().map(work).collect::<Vec<_>>()))
                .collect();
            let parts = parts.into_iter();
            parts
                .flat_map(|part| part.join().expect("no panic"))
                .collect()
        })
    };
    let chunks = in_parts(&|slot| {
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
    });
    let mut starts = vec![0];
    for layer in 0..geometry.layers as usize {
        let longest = chunks.iter().map(|slabs| slabs[layer].len()).max();
        let end = starts[layer] + longest.expect("some chunks");
        starts.push(end.next_multiple_of(KvGeometry::SLAB_ALIGN));
    }
    let fillings = arena.allocate(starts[starts.len() - 1], raw.len());
    let sealed = fillings.expect("room").into_iter().zip(chunks);
    let sealed = sealed.map(|(mut filling, slabs)| {
        let table = slabs.iter().zip(&starts).map(|(slab, &offset)| SlabEntry {
            offset: offset as u32,
            bytes: slab.len() as u32,
            checksum: Checksummer::of(slab),
        });
        let header = RecordHeader {
            codec: CodecId::Exp,
            slabs: table.collect(),
            ..header(geometry)
        };
        let image = filling.image_mut().expect("sole");
        image[..RecordHeader::BYTES].copy_from_slice(&header.encode()[..]);
        for (slab, start) in slabs.iter().zip(&starts) {
            image[RecordHeader::BYTES + start..][..slab.len()].copy_from_slice(slab);
        }
        filling.seal_image(|_| Ok(())).expect("verifies")
    });
    sealed.collect()
}

/// Bytes of the slabs that are stored.
fn stored_bytes(slots: &[Slot]) -> f64 {
    let bytes = slots.iter().flat_map(|slot| {
        let layers = slot.arena().geometry().layer_ids();
        layers.map(|layer| f64::from(slot.slab(layer).expect("there").bytes))
    });
    bytes.sum()
}

pub(crate) fn encoded() {
    let Some(sample) = Sample::open() else { return };
    let ceiling = Ceiling::new(1 << 30);
    for model in models() {
        one_model(&model, &sample, &ceiling);
    }
}

/// Encoded loads and saves beside compute.
pub(crate) fn beside_compute() {
    let Some(sample) = Sample::open() else { return };
    let geometry = KvGeometry::gqa(32, 8, 128, Dtype::Bf16, 16).expect("valid");
    encoded_beside_compute(
        |pages| {
            layers_of(pages, &geometry, &sample, |at, bytes| {
                pages.memory.write(at, bytes);
            });
        },
        encoded_run,
    );
}

/// GB/s of raw bytes, median, of saves of all blocks that `make` makes.
fn save_rate(
    device: &CudaDevice,
    bytes: usize,
    make: &dyn Fn() -> (Transfer, Vec<Filling>),
) -> f64 {
    let mut rates: Vec<f64> = (0..=REPEATS)
        .map(|_| {
            let (transfer, _fillings) = make();
            bytes as f64 / execute(device, &transfer).as_nanos() as f64
        })
        .skip(1)
        .collect();
    median(&mut rates)
}

fn one_model(model: &Model, sample: &Sample, ceiling: &Ceiling) {
    let geometry = &model.geometry;
    let blocks = model.tokens / geometry.block_tokens;
    let count = model.tokens / model.page_tokens;
    let arena = open_arena(geometry, 3 * blocks as usize + 64);
    let device = CudaDevice::open(0).expect("there was one a moment ago");
    device.attach(&arena).expect("pinned");
    let calibration = device.calibration().expect("attached");
    println!("{}: encodes at {:.0} GB/s", model.name, calibration.encode);
    let pages = Pages::new(geometry, model.page_tokens, count);
    layers_of(&pages, geometry, sample, |at, bytes| {
        pages.memory.write(at, bytes);
    });
    let mut ids: Vec<PageId> = (0..count).map(PageId).collect();
    let mut random = Random(1);
    random.shuffle(&mut ids);
    let source = pages.table(ids.clone());
    random.shuffle(&mut ids);
    let target = pages.table(ids);

    let raw = save(&device, &arena, &source, blocks);
    let by_cpu = encoded_run(&arena, &raw);
    let (transfer, fillings) = encoded_save(&arena, &source, blocks);
    let layers = take_all(&device, &transfer);
    drop(transfer);
    let run = seal_encoded(layers, fillings);
    for (ours, expected) in run.iter().zip(&by_cpu) {
        for layer in geometry.layer_ids() {
            let is_same = ours.slab_bytes(layer) == expected.slab_bytes(layer);
            assert!(is_same, "{}: the GPU encodes other bytes", model.name);
        }
    }
    drop(by_cpu);
    let ratio = pages.memory.bytes as f64 / stored_bytes(&run);
    let slot_ratio = raw[0].image().len() as f64 / run[0].image().len() as f64;
    println!(
        "{}: {:.2} GB as {blocks} chunks; ratio {ratio:.3}, of slots {slot_ratio:.3}; the GPU's bytes \
         are the CPU's",
        model.name,
        pages.memory.bytes as f64 / 1e9
    );
    // Back to where they were, over poison.
    pages.memory.fill(0x5a);
    execute(&device, &load_transfer(&run, &source));
    layers_of(&pages, geometry, sample, |at, bytes| {
        let mut got = vec![0; bytes.len()];
        pages.memory.read(at, &mut got);
        assert!(
            got == bytes,
            "{}: other bytes in the layer at {at}",
            model.name
        );
    });

    let load = |slots: &[Slot]| {
        let make = || load_transfer(slots, &target);
        ceiling.beside(true, || rate(&device, &make, REPEATS))
    };
    let (raw_share, raw_rate, up) = load(&raw);
    let (share, encoded_rate, _) = load(&run);
    println!(
        "  load: raw {raw_rate:.2}, encoded {encoded_rate:.2} of {up:.2} GB/s; raw {raw_share:.3}"
    );
    let unit = "of a contiguous copy of the raw bytes";
    let goal = Goal::AtLeast(GOAL);
    figure_of("link", &format!("load_{}", model.name), share, unit, goal);
    if model.name == "llama3_8b" {
        let unsummed = Calibration {
            sums: false,
            ..calibration.clone()
        };
        let unsummed = CudaDevice::with_calibration(0, unsummed).expect("there is a GPU");
        unsummed.attach(&arena).expect("pinned");
        let without = ceiling.beside(true, || {
            rate(&unsummed, &|| load_transfer(&run, &target), REPEATS)
        });
        println!("  load without sums {:.2} GB/s", without.1);
        let unit = "x a load without sums";
        figure_of(
            "link",
            "sums_cost",
            share / without.0,
            unit,
            Goal::AtLeast(0.99),
        );
    }
    drop(run);
    let save = |make: &dyn Fn() -> (Transfer, Vec<Filling>)| {
        ceiling.beside(false, || save_rate(&device, pages.memory.bytes, make))
    };
    let (raw_share, raw_rate, down) = save(&|| save_transfer(&arena, &source, blocks));
    let (share, encoded_rate, _) = save(&|| encoded_save(&arena, &source, blocks));
    println!(
        "  save: raw {raw_rate:.2}, encoded {encoded_rate:.2} of {down:.2} GB/s; raw {raw_share:.3}"
    );
    figure_of("link", &format!("save_{}", model.name), share, unit, goal);
}
