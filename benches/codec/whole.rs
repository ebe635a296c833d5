//! `link.ratio` over many whole conversations, one of them in memory at a time.
//!
//! `--whole FILE`: each conversation of the traces goes through the model (as far as its context
//! reaches), its KV through the codec and through a store with `host.codec = lossless`, and what was
//! found is appended to FILE as a line of JSON. Conversations that are there already are not computed again, so
//! the work may be ended at any moment and gone on with. `--conversations N` ends it after so many new
//! ones; with 0 it only prints what FILE holds.

use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use stemkv::{Cache, Config, HostCodec, LoadOptions, Namespace};
use stemkv_store::{Fence, KvGeometry};

use crate::conversations::conversations;
use crate::effective::Sequence;
use crate::harness::{Goal, figure};
use crate::kv::{self, Kv, Prefill};
use crate::{Coder, coders};

/// What was found of one conversation.
#[derive(Serialize, Deserialize)]
pub struct Found {
    model: String,
    name: String,
    /// Tokens that were computed, and that the conversation has.
    tokens: usize,
    of_tokens: usize,
    codec: String,
    slabs: usize,
    /// Slabs that stay raw.
    raw_slabs: usize,
    raw_bytes: usize,
    bytes: usize,
    /// With `planes`.
    planes_bytes: usize,
    /// `exp` alone: values without a code; planes of slabs with codes of 3 bits.
    escapes: usize,
    planes_of_3_bits: usize,
    /// What its chunks take in RAM raw, and in the slots of an encoding store.
    image_bytes: u64,
    slot_bytes: u64,
    /// Bytes of each plane of each layer, each by itself.
    layers: Vec<Vec<usize>>,
    layer_plane_bytes: Vec<usize>,
}

pub fn run(path: &Path) {
    let mut all: Vec<Found> = match std::fs::read_to_string(path) {
        Ok(text) => text
            .lines()
            .map(|line| serde_json::from_str(line).expect("a line of an earlier run"))
            .collect(),
        Err(_) => Vec::new(),
    };
    let more =
        kv::argument("--conversations").map_or(usize::MAX, |text| text.parse().expect("a number"));
    if more > 0 {
        extend(&mut all, path, more);
    }
    print(&all);
    figure("link.ratio", ratio(&all), "x", Goal::AtLeast(1.38));
}

fn extend(all: &mut Vec<Found>, path: &Path, more: usize) {
    let model_path = kv::model_file().expect("name a model with --model, or run tools/fetch-model");
    let model = model_path.file_name().unwrap_or_default().to_string_lossy();
    let prefill = Prefill::load(&model_path, kv::longest(false));
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .expect("the file can be written");
    let is_new = |all: &[Found], name: &str| {
        let is_same = |found: &Found| found.model == model && found.name == name;
        !all.iter().any(is_same)
    };
    let mut left = more;
    for conversation in conversations() {
        if left == 0 {
            break;
        }
        let (tokens, of_tokens) = prefill.tokens(&conversation);
        if !is_new(all, &conversation.name) || tokens.len() < 128 {
            continue;
        }
        let begun = std::time::Instant::now();
        let kv = prefill.kv(&conversation);
        let mut found = measure(&kv);
        found.model = model.to_string();
        found.of_tokens = of_tokens;
        let line = serde_json::to_string(&found).expect("plain data");
        writeln!(file, "{line}").expect("the file can be written");
        println!("{}: {:.0} s", found.line(), begun.elapsed().as_secs_f64());
        all.push(found);
        left -= 1;
    }
}

/// Encodes every slab of whole blocks, and puts them into a store that encodes.
pub fn measure(kv: &Kv) -> Found {
    let geometry = &kv.geometry;
    let all = coders(geometry);
    let coder = &all[0];
    let planes = all
        .iter()
        .find(|coder| coder.name == "planes")
        .expect("for every dtype");
    let alone: Vec<Coder> = geometry
        .planes
        .iter()
        .map(|plane| {
            let geometry = KvGeometry {
                planes: vec![*plane],
                ..geometry.clone()
            };
            coders(&geometry).swap_remove(0)
        })
        .collect();
    let block = geometry.block_tokens as usize;
    let plane_bytes: Vec<usize> = geometry
        .planes
        .iter()
        .map(|plane| plane.token_bytes() * block)
        .collect();
    let blocks = kv.tokens / block;
    let mut found = Found {
        model: String::new(),
        name: kv.name.clone(),
        tokens: blocks * block,
        of_tokens: kv.tokens,
        codec: coder.name.into(),
        slabs: 0,
        raw_slabs: 0,
        raw_bytes: 0,
        bytes: 0,
        planes_bytes: 0,
        escapes: 0,
        planes_of_3_bits: 0,
        image_bytes: 0,
        slot_bytes: 0,
        layers: vec![vec![0; plane_bytes.len()]; geometry.layers as usize],
        layer_plane_bytes: plane_bytes.iter().map(|bytes| bytes * blocks).collect(),
    };
    let mut out = vec![0; geometry.slab_bytes()];
    let mut back = vec![0; geometry.slab_bytes()];
    for (slab, layer) in kv.slabs().zip((0..geometry.layers as usize).cycle()) {
        found.slabs += 1;
        found.raw_bytes += slab.len();
        match (coder.encode)(&slab, &mut out) {
            Some(bytes) => {
                (coder.decode)(&out[..bytes], &mut back);
                assert!(back == slab, "a round trip");
                found.bytes += bytes;
                if coder.name == "exp" {
                    let escapes = out.first_chunk().expect("a header");
                    found.escapes += u32::from_le_bytes(*escapes) as usize;
                    let bits = &out[4..4 + plane_bytes.len()];
                    found.planes_of_3_bits += bits.iter().filter(|&&bits| bits == 3).count();
                }
            }
            None => {
                found.raw_slabs += 1;
                found.bytes += slab.len();
            }
        }
        found.planes_bytes += (planes.encode)(&slab, &mut out).unwrap_or(slab.len());
        let mut start = 0;
        for (plane, coder) in alone.iter().enumerate() {
            let raw = &slab[start..start + plane_bytes[plane]];
            start += raw.len();
            let bytes = (coder.encode)(raw, &mut out).unwrap_or(raw.len());
            found.layers[layer][plane] += bytes;
        }
    }
    if blocks > 0 {
        (found.image_bytes, found.slot_bytes) = in_ram(kv);
    }
    found
}

/// What a store's arena holds of it raw and encoded; what comes back is compared.
fn in_ram(kv: &Kv) -> (u64, u64) {
    let geometry = &kv.geometry;
    let sequence = Sequence::of(kv, 0);
    let room = kv.bytes.len() + kv.bytes.len() / 8 + (64 << 20);
    let mut config = Config::in_memory(geometry.clone(), room as u64);
    config.host.codec = HostCodec::Lossless;
    let cache = Cache::open(config).expect("a valid configuration");
    let namespace = Namespace::new("a model", "1", "none", geometry.clone());
    let namespace = cache.namespace(&namespace).expect("its geometry");
    let save = cache
        .save(
            &mut namespace.prompt(&sequence.tokens),
            sequence.table.clone(),
        )
        .expect("open");
    save.all_layers(Fence::reached()).expect("once");
    save.pages_free().wait_blocking().expect("memory");
    let lease = cache
        .lease(&mut namespace.prompt(&sequence.tokens))
        .expect("open");
    let target = Sequence::new(geometry, sequence.tokens.clone());
    let load = cache.load(&lease, target.table.clone(), LoadOptions::default());
    let report = load.expect("valid").finish_blocking();
    assert_eq!(report.tokens, sequence.tokens.len(), "{report:?}");
    sequence.assert_same(geometry, &target);
    let host = cache.stats().host;
    drop(lease);
    cache.close_blocking().expect("nothing hangs");
    (host.raw_bytes, host.published_bytes)
}

impl Found {
    fn ratio(&self) -> f64 {
        self.raw_bytes as f64 / self.bytes as f64
    }

    /// Raw over encoded of one plane of one layer.
    fn plane_ratios(&self) -> impl Iterator<Item = (f64, usize, usize)> {
        self.layers.iter().enumerate().flat_map(|(layer, planes)| {
            let planes = planes.iter().zip(&self.layer_plane_bytes).enumerate();
            planes.map(move |(plane, (&bytes, &raw))| (raw as f64 / bytes as f64, layer, plane))
        })
    }

    fn line(&self) -> String {
        let place = |(ratio, layer, plane): (f64, usize, usize)| {
            format!("{ratio:.3} (layer {layer} plane {plane})")
        };
        let order = |a: &(f64, usize, usize), b: &(f64, usize, usize)| a.0.total_cmp(&b.0);
        let extremes = [
            self.plane_ratios().min_by(order),
            self.plane_ratios().max_by(order),
        ];
        let [least, most] = extremes.map(|found| found.map(place).unwrap_or_default());
        format!(
            "{}: {} of {} tokens, {} {:.4}, planes {:.4}, slots {:.4}; {} of {} slabs raw, {:.2} % \
             escapes, {} of {} planes in 3 bits; worst {least}, best {most}",
            self.name,
            self.tokens,
            self.of_tokens,
            self.codec,
            self.ratio(),
            self.raw_bytes as f64 / self.planes_bytes as f64,
            self.image_bytes as f64 / self.slot_bytes as f64,
            self.raw_slabs,
            self.slabs,
            200.0 * self.escapes as f64 / self.raw_bytes as f64,
            self.planes_of_3_bits,
            self.slabs * self.layer_plane_bytes.len(),
        )
    }
}

fn ratio(all: &[Found]) -> f64 {
    sum(all, |found| found.raw_bytes) / sum(all, |found| found.bytes)
}

fn sum(all: &[Found], part: impl Fn(&Found) -> usize) -> f64 {
    all.iter().map(part).sum::<usize>() as f64
}

/// A line for each, and all together.
pub fn print(all: &[Found]) {
    for found in all {
        println!("{}", found.line());
    }
    let ratios = all.iter().map(Found::ratio);
    println!(
        "{} conversations, {} tokens: ratio {:.4} (from {:.4} to {:.4}), planes {:.4}, slots in RAM {:.4}; {} of {} \
         slabs raw, {:.2} % escapes",
        all.len(),
        sum(all, |found| found.tokens),
        ratio(all),
        ratios.clone().fold(f64::INFINITY, f64::min),
        ratios.fold(0.0, f64::max),
        sum(all, |found| found.raw_bytes) / sum(all, |found| found.planes_bytes),
        sum(all, |found| found.image_bytes as usize) / sum(all, |found| found.slot_bytes as usize),
        sum(all, |found| found.raw_slabs),
        sum(all, |found| found.slabs),
        200.0 * sum(all, |found| found.escapes) / sum(all, |found| found.raw_bytes),
    );
    for (layer, plane, ratio) in per_plane(all) {
        println!("  layer {layer} plane {plane}: {ratio:.4}");
    }
}

/// Raw over encoded of each plane of each layer, over all conversations of one shape.
fn per_plane(all: &[Found]) -> Vec<(usize, usize, f64)> {
    let Some(first) = all.first() else {
        return Vec::new();
    };
    let alike = |found: &&Found| found.layers.len() == first.layers.len();
    let all: Vec<&Found> = all.iter().filter(alike).collect();
    let mut ratios = Vec::new();
    for (layer, planes) in first.layers.iter().enumerate() {
        for plane in 0..planes.len() {
            let raw: usize = all.iter().map(|found| found.layer_plane_bytes[plane]).sum();
            let bytes: usize = all.iter().map(|found| found.layers[layer][plane]).sum();
            ratios.push((layer, plane, raw as f64 / bytes as f64));
        }
    }
    ratios
}
