//! Raw or encoded over the link, for slabs of many sizes and values of three kinds: is what the store chooses
//! ever slower than raw?
//!
//! Raw and encoded transfers of the same chunks take turns, so that a slow moment of the link strikes both.

use stemkv::placement::{CodecCosts, Rates, encodes};
use stemkv_store::device::CudaDevice;
use stemkv_store::{CodecId, Device as _, Dtype, Filling, KvGeometry, PageId, Slot, Transfer};

use crate::kv::{Sample, layers_of};
use crate::report::{Goal, figure_of, median};
use crate::store::{
    Pages, Random, encoded_save, execute, load_transfer, open_arena, save, save_transfer,
    seal_encoded, take_all,
};

/// Bytes of KV in each cell of the table.
const BYTES: usize = 512 << 20;
const LAYERS: u32 = 16;
/// KV heads of 128 values, tokens of a block and of a page: slabs of 4 KiB to 256 KiB.
const SHAPES: [(u32, u32, u32); 5] = [
    (1, 8, 8),
    (1, 16, 16),
    (4, 16, 16),
    (8, 16, 16),
    (8, 64, 16),
];
const REPEATS: usize = 7;

#[derive(Clone, Copy, Debug)]
enum Values {
    Real,
    Noise,
    Constant,
}

/// GB/s, raw and encoded, and the median of encoded over raw in pairs.
struct Pairs {
    raw: f64,
    encoded: f64,
    share: f64,
}

impl Pairs {
    fn new(raw: impl Fn() -> f64, encoded: impl Fn() -> f64) -> Pairs {
        // The first turn makes what later ones use again.
        let turns = (0..=REPEATS).map(|_| (raw(), encoded())).skip(1);
        let (mut raws, mut coded): (Vec<f64>, Vec<f64>) = turns.unzip();
        let mut shares: Vec<f64> = coded.iter().zip(&raws).map(|(a, b)| a / b).collect();
        Pairs {
            raw: median(&mut raws),
            encoded: median(&mut coded),
            share: median(&mut shares),
        }
    }

    fn rates(&self) -> Rates {
        Rates {
            raw: Some(self.raw * 1e9),
            encoded: Some(self.encoded * 1e9),
        }
    }
}

pub(crate) fn never_worse() {
    let Some(sample) = Sample::open() else { return };
    println!("slab KiB, values: ratio; save raw and encoded GB/s, in pairs; load the same; chosen");
    let mut worst = f64::MAX;
    for (heads, block, page) in SHAPES {
        for values in [Values::Real, Values::Noise, Values::Constant] {
            worst = worst.min(one_cell(heads, block, page, values, &sample));
        }
    }
    figure_of(
        "link",
        "never_worse",
        worst,
        "x raw in pairs, the worst of what is chosen",
        Goal::AtLeast(0.97),
    );
}

/// The share of raw that what is chosen reaches, the lower of both directions.
fn one_cell(heads: u32, block: u32, page: u32, values: Values, sample: &Sample) -> f64 {
    let geometry = KvGeometry::gqa(LAYERS, heads, 128, Dtype::Bf16, block).expect("valid");
    let blocks = (BYTES / geometry.payload_bytes()) as u32;
    let count = blocks * block / page;
    let arena = open_arena(&geometry, 3 * blocks as usize + 64);
    let device = CudaDevice::open(0).expect("there was one a moment ago");
    device.attach(&arena).expect("pinned");
    let pages = Pages::new(&geometry, page, count);
    let mut random = Random(3);
    match values {
        Values::Real => layers_of(&pages, &geometry, sample, |at, bytes| {
            pages.memory.write(at, bytes);
        }),
        Values::Noise => {
            let noise: Vec<u8> = (0..1 << 20)
                .flat_map(|_| random.next().to_le_bytes())
                .collect();
            for at in (0..pages.memory.bytes).step_by(noise.len()) {
                pages
                    .memory
                    .write(at, &noise[..noise.len().min(pages.memory.bytes - at)]);
            }
        }
        Values::Constant => pages.memory.fill(0x3f),
    }
    let mut ids: Vec<PageId> = (0..count).map(PageId).collect();
    random.shuffle(&mut ids);
    let table = pages.table(ids);
    let raw = save(&device, &arena, &table, blocks);
    let (transfer, fillings) = encoded_save(&arena, &table, blocks);
    let layers = take_all(&device, &transfer);
    drop(transfer);
    let encoded = seal_encoded(layers, fillings);
    let ratio = stored(&raw) / stored(&encoded);
    let rate = |seconds: std::time::Duration| pages.memory.bytes as f64 / seconds.as_nanos() as f64;
    let load = |slots: &[Slot]| rate(execute(&device, &load_transfer(slots, &table)));
    let loads = Pairs::new(|| load(&raw), || load(&encoded));
    drop((raw, encoded));
    let save = |(transfer, _fillings): (Transfer, Vec<Filling>)| rate(execute(&device, &transfer));
    let saves = Pairs::new(
        || save(save_transfer(&arena, &table, blocks)),
        || save(encoded_save(&arena, &table, blocks)),
    );
    let costs = CodecCosts {
        save: saves.rates(),
        load: loads.rates(),
        ratio: Some(ratio),
        ..CodecCosts::default()
    };
    let (is_chosen, why) = match device.encodes(CodecId::Exp) {
        true => encodes(&costs),
        false => (false, "the device does not encode".to_owned()),
    };
    println!(
        "  {:>3} {values:?}: {ratio:.3}; {:.2} {:.2} {:.3}; {:.2} {:.2} {:.3}; {}: {why}",
        geometry.slab_bytes() >> 10,
        saves.raw,
        saves.encoded,
        saves.share,
        loads.raw,
        loads.encoded,
        loads.share,
        if is_chosen { "exp" } else { "raw" }
    );
    match is_chosen {
        true => saves.share.min(loads.share),
        false => 1.0,
    }
}

/// Bytes of the slabs.
fn stored(slots: &[Slot]) -> f64 {
    let of_slot = |slot: &Slot| -> f64 {
        let layers = slot.arena().geometry().layer_ids();
        layers
            .map(|layer| f64::from(slot.slab(layer).expect("whole").bytes))
            .sum()
    };
    slots.iter().map(of_slot).sum()
}
