//! The forward pass: bit-equal with and without reused KV, however a prompt is cut and whatever
//! shares a batch; and close to candle's own implementation. On a tiny random model that the tests
//! write, and on SmolLM2 where `tools/fetch-model` has put it.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::path::Path;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama;
use stemkv_serve::model::{Gguf, Message, Model, Rows, Tokenizer};
use stemkv_store::{HostPages, LayerId, PageId};
use support::Random;

const PAGE_TOKENS: u32 = 16;
const PAGES: u32 = 64;
const TOKENS: usize = 300;

fn pages(model: &Model) -> HostPages {
    HostPages::new(&model.geometry(64).unwrap(), PAGE_TOKENS, PAGES).unwrap()
}

/// Pages in an order of their own, so that nothing relies on neighbours.
fn table(first: u32, step: u32) -> Vec<PageId> {
    (0..20)
        .map(|i| PageId((first + i * step) % PAGES))
        .collect()
}

fn prompt(seed: u64) -> Vec<u32> {
    let mut random = Random(seed);
    (0..TOKENS).map(|_| random.below(256)).collect()
}

/// Computes `tokens[from..]`, cut after every `cut` tokens, and returns the last logits' bits.
fn prefill(
    model: &Model,
    kv: &HostPages,
    table: &[PageId],
    tokens: &[u32],
    from: usize,
    cut: usize,
) -> Vec<u32> {
    let mut logits = Vec::new();
    let mut start = from;
    while start < tokens.len() {
        let end = (start + cut).min(tokens.len());
        let rows = Rows {
            tokens: &tokens[start..end],
            start,
            pages: table,
            logits: end == tokens.len(),
        };
        logits = model.forward(kv, &[rows], &mut ()).unwrap();
        start = end;
    }
    logits[0].iter().map(|x| x.to_bits()).collect()
}

/// The KV bytes of the first `tokens` tokens.
fn kv_bytes(model: &Model, kv: &HostPages, table: &[PageId], tokens: usize) -> Vec<u8> {
    let token_bytes = model.geometry(64).unwrap().planes[0].token_bytes();
    let mut bytes = Vec::new();
    for layer in 0..model.config().layers as u32 {
        kv.read(LayerId(layer), |planes| {
            for plane in planes {
                for token in 0..tokens {
                    let page = table[token / PAGE_TOKENS as usize].0 as usize;
                    let slot = page * PAGE_TOKENS as usize + token % PAGE_TOKENS as usize;
                    bytes.extend_from_slice(&plane[slot * token_bytes..][..token_bytes]);
                }
            }
        });
    }
    bytes
}

#[test]
fn logits_and_kv_have_the_same_bits_however_the_prompt_is_cut() {
    let (model, _) = support::tiny();
    let tokens = prompt(5);
    let table = table(3, 3);
    let whole = pages(&model);
    let expected = prefill(&model, &whole, &table, &tokens, 0, TOKENS);
    let expected_kv = kv_bytes(&model, &whole, &table, TOKENS);
    // A cut of 1 is decode.
    for cut in [1, 7, 64, 100, 256] {
        let kv = pages(&model);
        let logits = prefill(&model, &kv, &table, &tokens, 0, cut);
        assert!(logits == expected, "logits differ with cut {cut}");
        let bytes = kv_bytes(&model, &kv, &table, TOKENS);
        assert!(bytes == expected_kv, "KV differs with cut {cut}");
    }
}

#[test]
fn logits_have_the_same_bits_with_and_without_reused_kv() {
    let (model, _) = support::tiny();
    let tokens = prompt(6);
    let source_table = table(0, 1);
    let source = pages(&model);
    let expected = prefill(&model, &source, &source_table, &tokens, 0, 64);
    for reused in [64, 128, 256, TOKENS - 1] {
        // Other pages, full of NaN but for the reused tokens: what was there before must not matter.
        let table = table(17, 7);
        let kv = pages(&model);
        let token_bytes = model.geometry(64).unwrap().planes[0].token_bytes();
        let slot = |table: &[PageId], token: usize| {
            let page = table[token / PAGE_TOKENS as usize].0 as usize;
            (page * PAGE_TOKENS as usize + token % PAGE_TOKENS as usize) * token_bytes
        };
        for layer in (0..model.config().layers as u32).map(LayerId) {
            let saved: Vec<Vec<u8>> =
                source.read(layer, |planes| planes.iter().map(|p| p.to_vec()).collect());
            kv.write(layer, |planes| {
                for (plane, saved) in planes.iter_mut().zip(&saved) {
                    plane.fill(0xff);
                    for token in 0..reused {
                        plane[slot(&table, token)..][..token_bytes]
                            .copy_from_slice(&saved[slot(&source_table, token)..][..token_bytes]);
                    }
                }
            });
        }
        let logits = prefill(&model, &kv, &table, &tokens, reused, 64);
        assert!(
            logits == expected,
            "logits differ with {reused} reused tokens"
        );
    }
}

#[test]
fn a_sequence_has_the_same_bits_whatever_shares_its_batch() {
    let (model, _) = support::tiny();
    let (one, other) = (prompt(7), prompt(8));
    let (one_table, other_table) = (table(0, 1), table(20, 1));
    let kv = pages(&model);
    prefill(&model, &kv, &one_table, &one[..200], 0, 64);
    prefill(&model, &kv, &other_table, &other[..90], 0, 64);
    fn step<'a>(tokens: &'a [u32], start: usize, pages: &'a [PageId]) -> Rows<'a> {
        Rows {
            tokens,
            start,
            pages,
            logits: true,
        }
    }
    let first = || step(&one[200..201], 200, &one_table);
    let second = || step(&other[90..170], 90, &other_table);
    let alone = [
        model.forward(&kv, &[first()], &mut ()).unwrap(),
        model.forward(&kv, &[second()], &mut ()).unwrap(),
    ]
    .concat();
    let together = model.forward(&kv, &[first(), second()], &mut ()).unwrap();
    assert!(alone == together);
}

#[test]
fn logits_are_close_to_candles_own_llama() {
    let folder = tempfile::tempdir().unwrap();
    let path = support::write_model(folder.path(), "gpt-2");
    let model = Model::load(&mut Gguf::open(&path).unwrap(), support::CONTEXT).unwrap();
    let tokens = prompt(9);
    let ours: Vec<f32> = prefill(&model, &pages(&model), &table(3, 3), &tokens, 0, 64)
        .into_iter()
        .map(f32::from_bits)
        .collect();
    let theirs = candle_logits(&path, &tokens);
    let spread = theirs.iter().fold(0.0f32, |spread, x| spread.max(x.abs()));
    for (token, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        // bf16 KV keeps 8 bits; candle keeps 24.
        assert!(
            (ours - theirs).abs() < 0.02 * spread,
            "token {token}: {ours} against {theirs}, spread {spread}"
        );
    }
}

fn candle_logits(path: &Path, tokens: &[u32]) -> Vec<f32> {
    let mut file = std::fs::File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let mut model =
        quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
    let input = Tensor::new(tokens, &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap();
    let logits = model.forward(&input, 0).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn smollm2_answers_as_it_is_known_to() {
    let Some(path) = support::smollm2::or_skip("an answer") else {
        return;
    };
    let mut gguf = Gguf::open(&path).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    let model = Model::load(&mut gguf, 64).unwrap();
    let question = Message {
        role: "user".to_owned(),
        content: "What is the capital of France?".to_owned(),
    };
    let text = tokenizer.render_chat(&[question]).unwrap();
    let mut tokens = tokenizer.encode(&text).unwrap();
    let prompt = tokens.len();
    let (kv, table) = (pages(&model), table(0, 1));
    loop {
        let start = if tokens.len() == prompt {
            0
        } else {
            tokens.len() - 1
        };
        let rows = Rows {
            tokens: &tokens[start..],
            start,
            pages: &table,
            logits: true,
        };
        let logits = model.forward(&kv, &[rows], &mut ()).unwrap().remove(0);
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        let token = best.unwrap() as u32;
        if tokenizer.is_end(token) {
            break;
        }
        tokens.push(token);
    }
    assert_eq!(tokens[prompt..], [504, 3575, 282, 4649, 314, 7042, 30]);
    let answer = tokenizer.decode(&tokens[prompt..]);
    assert_eq!(answer, "The capital of France is Paris.");
}
