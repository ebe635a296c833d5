//! KV that is encoded in RAM (`host.codec = lossless`) on the CPU: the same logits, bit for bit, and more tokens in the
//! same memory. On a tiny random model, and on SmolLM2 where `tools/fetch-model` has put it.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use stemkv::{Cache, Config, HostCodec, LoadOptions, Namespace, OpenNamespace};
use stemkv_serve::demo;
use stemkv_serve::model::{Gguf, Model, Rows, Tokenizer};
use stemkv_serve::scheduler::{BLOCK_TOKENS, PAGE_TOKENS};
use stemkv_store::codec::exp::{self, Decoder, ExpShape, Vectors};
use stemkv_store::codec::planes::{self, PlanesShape};
use stemkv_store::{Dtype, Fence, HostPages, KvGeometry, PageId, PageTable};

/// Tokens of the prompt; whole blocks.
const TOKENS: usize = 4 * BLOCK_TOKENS as usize;

/// A model, a prompt and its KV in an engine's pages.
struct Computed {
    name: &'static str,
    model: Model,
    prompt: Vec<u32>,
    pages: HostPages,
}

impl Computed {
    fn new(name: &'static str, model: Model, prompt: Vec<u32>) -> Computed {
        let computed = Computed {
            pages: pages(&model.geometry(BLOCK_TOKENS).unwrap()),
            name,
            model,
            prompt,
        };
        computed.logits(&computed.pages, 0);
        computed
    }

    /// The tiny one, and SmolLM2 where it is there.
    fn all() -> Vec<Computed> {
        let (model, _) = support::tiny();
        let mut random = support::Random(3);
        let prompt = (0..TOKENS).map(|_| random.below(256)).collect();
        let mut all = vec![Computed::new("tiny", model, prompt)];
        if let Some(path) = support::smollm2::or_skip("encoded KV") {
            let mut gguf = Gguf::open(&path).unwrap();
            let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
            let model = Model::load(&mut gguf, TOKENS).unwrap();
            let mut prompt = tokenizer.encode(&demo::handbook()).unwrap();
            prompt.truncate(TOKENS);
            all.push(Computed::new("SmolLM2", model, prompt));
        }
        all
    }

    fn geometry(&self) -> KvGeometry {
        self.model.geometry(BLOCK_TOKENS).unwrap()
    }

    /// The bits of the last logits, computed from `start` on over KV that is in `pages`.
    fn logits(&self, pages: &HostPages, start: usize) -> Vec<u32> {
        let table = table();
        let rows = Rows {
            tokens: &self.prompt[start..],
            start,
            pages: &table,
            logits: true,
        };
        let logits = self.model.forward(pages, &[rows], &mut ()).unwrap();
        logits[0].iter().map(|x| x.to_bits()).collect()
    }

    /// The raw slabs of its blocks.
    fn slabs(&self) -> Vec<Vec<u8>> {
        let geometry = self.geometry();
        let block = BLOCK_TOKENS as usize;
        let mut slabs = Vec::new();
        for layer in geometry.layer_ids() {
            self.pages.read(layer, |planes| {
                for first in (0..TOKENS).step_by(block) {
                    let parts = planes.iter().zip(&geometry.planes).map(|(plane, shape)| {
                        let bytes = shape.token_bytes();
                        &plane[first * bytes..(first + block) * bytes]
                    });
                    slabs.push(parts.collect::<Vec<_>>().concat());
                }
            });
        }
        slabs
    }
}

fn pages(geometry: &KvGeometry) -> HostPages {
    HostPages::new(geometry, PAGE_TOKENS, table().len() as u32).unwrap()
}

fn table() -> Vec<PageId> {
    (0..TOKENS as u32 / PAGE_TOKENS).map(PageId).collect()
}

fn page_table(pages: &HostPages) -> PageTable {
    PageTable {
        kv: pages.paged(),
        pages: table().into(),
    }
}

fn open(geometry: &KvGeometry, host_bytes: u64, codec: HostCodec) -> (Cache, OpenNamespace) {
    let mut config = Config::in_memory(geometry.clone(), host_bytes);
    config.host.codec = codec;
    let cache = Cache::open(config).unwrap();
    let namespace = Namespace::new("a model", "1", "bytes", geometry.clone());
    let namespace = cache.namespace(&namespace).unwrap();
    (cache, namespace)
}

fn save(cache: &Cache, namespace: &OpenNamespace, tokens: &[u32], pages: &HostPages) {
    let save = cache
        .save(&mut namespace.prompt(tokens), page_table(pages))
        .unwrap();
    save.all_layers(Fence::reached()).unwrap();
    save.pages_free().wait_blocking().unwrap();
}

#[test]
fn logits_have_the_same_bits_over_kv_that_was_encoded() {
    for computed in Computed::all() {
        let geometry = computed.geometry();
        let (cache, namespace) = open(&geometry, 64 << 20, HostCodec::Lossless);
        let prompt = &computed.prompt;
        save(&cache, &namespace, prompt, &computed.pages);
        let host = cache.stats().host;
        assert!(
            host.published_bytes < host.raw_bytes,
            "{}: it is encoded",
            computed.name
        );
        let loaded = pages(&geometry);
        let lease = cache.lease(&mut namespace.prompt(prompt)).unwrap();
        let load = cache.load(&lease, page_table(&loaded), LoadOptions::default());
        assert_eq!(load.unwrap().finish_blocking().tokens, TOKENS);
        let start = TOKENS - 5;
        let expected = computed.logits(&computed.pages, start);
        assert!(
            computed.logits(&loaded, start) == expected,
            "{}",
            computed.name
        );
        cache.close_blocking().unwrap();
    }
}

#[test]
fn the_same_ram_holds_more_tokens_encoded() {
    for computed in Computed::all() {
        let geometry = computed.geometry();
        // Room for ten such prompts, of which forty are saved.
        let chunk = (geometry.payload_bytes() + 4096).next_multiple_of(4096);
        let host_bytes = (10 * TOKENS / BLOCK_TOKENS as usize * chunk) as u64;
        let held = [HostCodec::Raw, HostCodec::Lossless].map(|codec| {
            let (cache, namespace) = open(&geometry, host_bytes, codec);
            let prompts: Vec<Vec<u32>> = (0..40)
                .map(|number| (0..TOKENS as u32).map(|i| number << 16 | i).collect())
                .collect();
            for prompt in &prompts {
                save(&cache, &namespace, prompt, &computed.pages);
            }
            let held: usize = prompts
                .iter()
                .map(|prompt| {
                    cache
                        .match_prefix(&mut namespace.prompt(prompt))
                        .host_tokens
                })
                .sum();
            cache.close_blocking().unwrap();
            held
        });
        let [raw, encoded] = held;
        let gain = encoded as f64 / raw as f64;
        println!(
            "{}: {host_bytes} bytes of RAM hold {raw} tokens raw and {encoded} encoded, {gain:.3} times as many",
            computed.name
        );
        // In whole pages of 4 KiB a chunk of the tiny model gains nothing.
        let least = if computed.name == "tiny" { 1.0 } else { 1.25 };
        assert!(gain >= least, "{}: {gain}", computed.name);
    }
}

#[test]
fn every_slab_comes_back_from_every_codec() {
    for computed in Computed::all() {
        let geometry = computed.geometry();
        let slabs = computed.slabs();
        let (mut raw, mut exp) = (0, 0);
        for slab in &slabs {
            let mut stored = Vec::new();
            for vectors in Vectors::available() {
                let shape = ExpShape::new(&geometry).unwrap().with(vectors);
                let mut out = vec![0xa5; slab.len()];
                let bytes = exp::encode(&shape, slab, &mut out).expect("real KV shrinks");
                out.truncate(bytes);
                let mut back = vec![0x5a; slab.len()];
                Decoder::new(&shape, &out).unwrap().all(&mut back).unwrap();
                assert!(back == *slab, "{}, {vectors:?}", computed.name);
                assert!(
                    stored.is_empty() || stored == out,
                    "{}, {vectors:?}",
                    computed.name
                );
                stored = out;
            }
            raw += slab.len();
            exp += stored.len();
            // The same bytes as if they were of each dtype that goes to disk with planes.
            for dtype in [
                Dtype::Bf16,
                Dtype::F16,
                Dtype::F32,
                Dtype::Fp8E4m3,
                Dtype::Opaque,
            ] {
                let shape = PlanesShape::new(&KvGeometry {
                    dtype,
                    ..geometry.clone()
                });
                let mut out = vec![0; slab.len()];
                if let Some(bytes) = planes::encode(&shape, slab, &mut out) {
                    let mut back = vec![0x5a; slab.len()];
                    planes::decode(&shape, &out[..bytes], &mut back).unwrap();
                    assert!(back == *slab, "{}, {dtype:?}", computed.name);
                }
            }
        }
        let ratio = raw as f64 / exp as f64;
        println!("{}: {} slabs, exp {ratio:.4}", computed.name, slabs.len());
        assert!(computed.name == "tiny" || ratio > 1.38, "{ratio}");
    }
}
