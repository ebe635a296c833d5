//! Real KV: SmolLM2's from a file (`--kv`, as benches/codec `--dump` writes it, or a file of another model with
//! `--layers`, `--planes`, `--token-bytes`), repeated and laid out over any geometry, layer by layer and
//! plane by plane.

use stemkv_store::KvGeometry;

use crate::store::Pages;

/// KV values, `[layer][plane][token bytes]`.
pub(crate) struct Sample {
    bytes: Vec<u8>,
    layers: usize,
    planes: usize,
}

fn argument(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1)
}

impl Sample {
    /// `None`, said aloud, where there is no file.
    pub(crate) fn open() -> Option<Sample> {
        let path = argument("--kv").unwrap_or("kv.bin".into());
        let number = |name: &str, default: usize| {
            argument(name).map_or(default, |text| text.parse().expect("a number"))
        };
        let (layers, planes) = (number("--layers", 30), number("--planes", 2));
        let Ok(bytes) = std::fs::read(&path) else {
            println!("SKIPPED: no KV in {path}: see benches/gpu/kv.rs");
            return None;
        };
        let token_bytes = number("--token-bytes", 384);
        assert!(bytes.len().is_multiple_of(layers * planes * token_bytes));
        Some(Sample {
            bytes,
            layers,
            planes,
        })
    }

    fn plane(&self, layer: usize, plane: usize) -> &[u8] {
        let bytes = self.bytes.len() / (self.layers * self.planes);
        let start = (layer % self.layers * self.planes + plane % self.planes) * bytes;
        &self.bytes[start..start + bytes]
    }

    /// `out` becomes plane `plane` of layer `layer`, over and over.
    fn fill(&self, layer: usize, plane: usize, out: &mut [u8]) {
        let from = self.plane(layer, plane);
        out.chunks_mut(from.len())
            .for_each(|part| part.copy_from_slice(&from[..part.len()]));
    }
}

/// Calls `each` with every layer's place in the pages and what belongs there.
pub(crate) fn layers_of(
    pages: &Pages,
    geometry: &KvGeometry,
    sample: &Sample,
    each: impl Fn(usize, &[u8]),
) {
    let layers = geometry.layers as usize;
    let mut bytes = vec![0; pages.memory.bytes / layers];
    for layer in 0..layers {
        let mut rest = &mut bytes[..];
        let tokens = rest.len() / geometry.token_bytes();
        for (index, plane) in geometry.planes.iter().enumerate() {
            let (own, others) = rest.split_at_mut(tokens * plane.token_bytes());
            sample.fill(layer, index, own);
            rest = others;
        }
        each(layer * bytes.len(), &bytes);
    }
}
