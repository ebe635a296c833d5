//! Where the KV comes from: a model's forward pass over conversations, or a file.

#[path = "../../tools/serve/tests/support/smollm2.rs"]
mod smollm2;

use std::path::{Path, PathBuf};

use stemkv_serve::model::{Gguf, Model, Rows, Tokenizer};
use stemkv_store::{Dtype, HostPages, KvGeometry, LayerId, PageId, Plane};

use crate::conversations::{Conversation, conversations};

/// One sequence's KV: `[layer][plane][token][token bytes]`.
pub struct Kv {
    pub name: String,
    pub geometry: KvGeometry,
    pub tokens: usize,
    pub bytes: Vec<u8>,
}

impl Kv {
    /// What the command line asks for.
    ///
    /// # Panics
    /// With a message, where that cannot be had.
    pub fn from_arguments(small: bool) -> Vec<Kv> {
        if let Some(path) = argument("--kv") {
            return vec![Kv::read(Path::new(&path))];
        }
        let all = Kv::compute(small);
        if let Some(path) = argument("--dump") {
            std::fs::write(path, Kv::joined(&all)).expect("the dump can be written");
        }
        all
    }

    /// The raw slabs of whole blocks, chunk by chunk.
    pub fn slabs(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        let block = self.geometry.block_tokens as usize;
        (0..self.tokens / block).flat_map(move |chunk| {
            self.geometry.layer_ids().map(move |layer| {
                let planes = (0..self.geometry.planes.len()).map(|plane| {
                    let bytes = self.geometry.planes[plane].token_bytes();
                    let start = self.plane_start(layer, plane) + chunk * block * bytes;
                    &self.bytes[start..start + block * bytes]
                });
                planes.collect::<Vec<_>>().concat()
            })
        })
    }

    /// Where a plane's values of a layer start.
    pub fn plane_start(&self, layer: LayerId, plane: usize) -> usize {
        let before: usize = self.geometry.planes[..plane]
            .iter()
            .map(Plane::token_bytes)
            .sum();
        self.tokens * (layer.0 as usize * self.geometry.token_bytes() + before)
    }

    /// Several sequences as one, in whole blocks.
    fn joined(all: &[Kv]) -> Vec<u8> {
        let geometry = &all[0].geometry;
        let block = geometry.block_tokens as usize;
        let mut joined = Vec::new();
        for layer in geometry.layer_ids() {
            for (plane, shape) in geometry.planes.iter().enumerate() {
                for kv in all {
                    let start = kv.plane_start(layer, plane);
                    let bytes = kv.tokens / block * block * shape.token_bytes();
                    joined.extend_from_slice(&kv.bytes[start..start + bytes]);
                }
            }
        }
        joined
    }

    fn read(path: &Path) -> Kv {
        let number = |name: &str, default: u32| {
            argument(name).map_or(default, |text| text.parse().expect("a number"))
        };
        let dtype = argument("--dtype").unwrap_or("bf16".into());
        let dtype: Dtype =
            serde_json::from_value(dtype.into()).expect("bf16, f16, f32, fp8_e4m3 …");
        let plane = Plane {
            heads: number("--heads", 3),
            head_bytes: number("--head-dim", 64) * dtype.bytes() as u32,
        };
        let geometry = KvGeometry {
            layers: number("--layers", 30),
            planes: vec![plane; number("--planes", 2) as usize],
            block_tokens: number("--block-tokens", 128),
            dtype,
        };
        geometry.validate().expect("a geometry");
        let bytes = std::fs::read(path).expect("the file can be read");
        let token_bytes = geometry.token_bytes() * geometry.layers as usize;
        assert!(
            bytes.len().is_multiple_of(token_bytes),
            "the file holds whole tokens of {token_bytes} bytes"
        );
        Kv {
            name: path.display().to_string(),
            tokens: bytes.len() / token_bytes,
            geometry,
            bytes,
        }
    }

    fn compute(small: bool) -> Vec<Kv> {
        let Some(path) = model_file() else {
            assert!(
                small,
                "no model: name one with --model, or run tools/fetch-model"
            );
            println!("SKIPPED real KV: there is no model; synthetic values instead");
            return vec![Kv::synthetic()];
        };
        let model = Prefill::load(&path, longest(small));
        let count = if small { 1 } else { 3 };
        let some = conversations().into_iter().take(count);
        some.map(|conversation| model.kv(&conversation)).collect()
    }

    fn of_tokens(name: String, model: &Model, tokens: &[u32]) -> Kv {
        const PAGE_TOKENS: u32 = 16;
        let geometry = model.geometry(128).expect("fits a store");
        let pages = tokens.len().div_ceil(PAGE_TOKENS as usize) as u32;
        let kv = HostPages::new(&geometry, PAGE_TOKENS, pages).expect("memory");
        let table: Vec<PageId> = (0..pages).map(PageId).collect();
        for (index, part) in tokens.chunks(512).enumerate() {
            let rows = Rows {
                tokens: part,
                start: index * 512,
                pages: &table,
                logits: false,
            };
            model.forward(&kv, &[rows], &mut ()).expect("no hooks");
        }
        let mut bytes = Vec::new();
        for layer in geometry.layer_ids() {
            kv.read(layer, |planes| {
                for (plane, shape) in planes.iter().zip(&geometry.planes) {
                    bytes.extend_from_slice(&plane[..tokens.len() * shape.token_bytes()]);
                }
            });
        }
        Kv {
            name,
            geometry,
            tokens: tokens.len(),
            bytes,
        }
    }

    fn synthetic() -> Kv {
        let geometry = KvGeometry::gqa(2, 2, 64, Dtype::Bf16, 16).expect("valid");
        let tokens = 64;
        let values = tokens * geometry.layers as usize * geometry.token_bytes() / 2;
        let value = |i: u32| {
            let noise = i.wrapping_mul(2_654_435_761);
            (0x3f80 - (noise.trailing_zeros() as u16) * 128) ^ (noise >> 16) as u16 & 0x807f
        };
        Kv {
            name: "synthetic".into(),
            geometry,
            tokens,
            bytes: (1..=values as u32)
                .flat_map(|i| value(i).to_le_bytes())
                .collect(),
        }
    }
}

/// A model, and how much of a conversation it takes.
pub struct Prefill {
    tokenizer: Tokenizer,
    model: Model,
    longest: usize,
}

impl Prefill {
    /// Any GGUF of Llama architecture.
    ///
    /// # Panics
    /// With a message, where it is none.
    pub fn load(path: &Path, longest: usize) -> Prefill {
        let mut gguf = Gguf::open(path).expect("a GGUF file");
        let context = gguf.config().expect("a Llama").context;
        let longest = longest.min(context);
        Prefill {
            tokenizer: Tokenizer::from_gguf(&gguf).expect("has a tokenizer"),
            model: Model::load(&mut gguf, longest).expect("a Llama"),
            longest,
        }
    }

    /// The conversation's tokens, up to the model's context, and how many it has in all.
    pub fn tokens(&self, conversation: &Conversation) -> (Vec<u32>, usize) {
        let mut tokens = self.tokenizer.encode(&conversation.text).expect("text");
        let all = tokens.len();
        tokens.truncate(self.longest);
        (tokens, all)
    }

    /// The KV of a conversation.
    pub fn kv(&self, conversation: &Conversation) -> Kv {
        let (tokens, _) = self.tokens(conversation);
        Kv::of_tokens(conversation.name.clone(), &self.model, &tokens)
    }
}

/// `--tokens`: so many of a conversation at most; as many as the model takes where it is not given.
pub fn longest(small: bool) -> usize {
    match small {
        true => 160,
        false => argument("--tokens").map_or(usize::MAX, |text| text.parse().expect("a number")),
    }
}

pub fn argument(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1)
}

/// `--model`, `STEMKV_TEST_MODEL`, or what `tools/fetch-model` has fetched.
pub fn model_file() -> Option<PathBuf> {
    let named = argument("--model").map(PathBuf::from);
    named.or_else(smollm2::find).filter(|path| path.is_file())
}
