//! A tiny random Llama with a byte tokenizer, written as a GGUF: the tests need no download.

// Every test binary compiles this module and uses its own part of it.
#![allow(dead_code)]

pub(crate) mod smollm2;

use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use stemkv_serve::model::{Gguf, Model, Tokenizer};

pub(crate) const LAYERS: usize = 3;
pub(crate) const WIDTH: usize = 64;
pub(crate) const FEED_FORWARD: usize = 96;
pub(crate) const QUERY_HEADS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;
pub(crate) const HEAD_DIM: usize = 16;
pub(crate) const CONTEXT: usize = 8192;
/// `<end>` ends an answer; `<start>` starts a message.
pub(crate) const END: u32 = 256;

const TEMPLATE: &str = "{% for message in messages %}{% if message['role'] == 'nobody' %}\
{{ raise_exception('nobody may speak') }}{% endif %}\
{{ '<start>' + message['role'] + '\n' + message['content'] + '<end>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}";

/// Writes the model into `folder`; `pre` names the pre-tokenizer.
pub(crate) fn write_model(folder: &Path, pre: &str) -> PathBuf {
    let tokens = vocabulary();
    let vocab = tokens.len();
    let kinds = (0..vocab).map(|id| Value::I32(if id < 256 { 1 } else { 3 }));
    let text = |text: &str| Value::String(text.to_owned());
    let number = |n: usize| Value::U32(n as u32);
    let metadata = [
        ("general.architecture", text("llama")),
        ("general.name", text("tiny")),
        ("llama.block_count", number(LAYERS)),
        ("llama.embedding_length", number(WIDTH)),
        ("llama.feed_forward_length", number(FEED_FORWARD)),
        ("llama.attention.head_count", number(QUERY_HEADS)),
        ("llama.attention.head_count_kv", number(KV_HEADS)),
        ("llama.context_length", number(CONTEXT)),
        ("llama.rope.dimension_count", number(HEAD_DIM)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text(pre)),
        (
            "tokenizer.ggml.tokens",
            Value::Array(tokens.into_iter().map(Value::String).collect()),
        ),
        ("tokenizer.ggml.token_type", Value::Array(kinds.collect())),
        ("tokenizer.ggml.merges", Value::Array(vec![])),
        ("tokenizer.ggml.eos_token_id", number(END as usize)),
        ("tokenizer.chat_template", text(TEMPLATE)),
    ];
    let kv = KV_HEADS * HEAD_DIM;
    let mut random = Random(1);
    let mut tensors = vec![
        ("token_embd.weight".to_owned(), random.matrix(vocab, WIDTH)),
        ("output_norm.weight".to_owned(), random.norm()),
        ("output.weight".to_owned(), random.output(vocab)),
    ];
    for layer in 0..LAYERS {
        for (name, rows, columns) in [
            ("attn_q", QUERY_HEADS * HEAD_DIM, WIDTH),
            ("attn_k", kv, WIDTH),
            ("attn_v", kv, WIDTH),
            ("attn_output", WIDTH, QUERY_HEADS * HEAD_DIM),
            ("ffn_gate", FEED_FORWARD, WIDTH),
            ("ffn_up", FEED_FORWARD, WIDTH),
            ("ffn_down", WIDTH, FEED_FORWARD),
        ] {
            let name = format!("blk.{layer}.{name}.weight");
            tensors.push((name, random.matrix(rows, columns)));
        }
        for name in ["attn_norm", "ffn_norm"] {
            tensors.push((format!("blk.{layer}.{name}.weight"), random.norm()));
        }
    }
    let path = folder.join("tiny.gguf");
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, v)| (*key, v)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut file = File::create(&path).unwrap();
    gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    path
}

/// The tiny model and its tokenizer, loaded.
pub(crate) fn tiny() -> (Model, Tokenizer) {
    let folder = tempfile::tempdir().unwrap();
    let mut gguf = Gguf::open(&write_model(folder.path(), "gpt-2")).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    (Model::load(&mut gguf, CONTEXT).unwrap(), tokenizer)
}

/// The 256 bytes as byte-level BPE spells them, then the special tokens.
fn vocabulary() -> Vec<String> {
    let mut next = 0x100;
    let mut tokens: Vec<String> = (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte).to_string(),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap().to_string()
            }
        })
        .collect();
    tokens.extend(["<end>".to_owned(), "<start>".to_owned()]);
    tokens
}

/// A linear congruential generator: fixed numbers, nothing more.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as u32) % bound
    }

    fn tensor(&mut self, shape: &[usize], scale: f32, offset: f32, dtype: GgmlDType) -> QTensor {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| (self.below(2001) as f32 / 1000.0 - 1.0) * scale + offset)
            .collect();
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        QTensor::quantize(&tensor, dtype).unwrap()
    }

    /// Special tokens get the logit 0: greedy answers do not end by themselves.
    fn output(&mut self, vocab: usize) -> QTensor {
        let matrix = self.matrix(vocab, WIDTH).dequantize(&Device::Cpu).unwrap();
        let bytes = matrix.narrow(0, 0, 256).unwrap();
        let special = matrix.narrow(0, 256, vocab - 256).unwrap();
        let output = Tensor::cat(&[bytes, special.zeros_like().unwrap()], 0).unwrap();
        QTensor::quantize(&output, GgmlDType::F16).unwrap()
    }

    fn matrix(&mut self, rows: usize, columns: usize) -> QTensor {
        // Large enough that attention is far from uniform.
        self.tensor(&[rows, columns], 0.35, 0.0, GgmlDType::F16)
    }

    fn norm(&mut self) -> QTensor {
        self.tensor(&[WIDTH], 0.2, 1.0, GgmlDType::F32)
    }
}
