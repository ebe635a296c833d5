//! The cold prefill beside candle's own Llama, on the same prompt in the same process.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use stemkv_store::{Error, HostPages, PageId, Result};

use crate::model::{Model, Rows};
use crate::scheduler::{BLOCK_TOKENS, PAGE_TOKENS};

/// Seconds of one prefill.
pub(super) struct Prefills {
    pub(super) ours: Duration,
    pub(super) candle: Duration,
}

/// Computes `tokens` once with each.
pub(super) fn prefills(model: &Model, path: &Path, tokens: &[u32]) -> Result<Prefills> {
    let pages = tokens.len().div_ceil(PAGE_TOKENS as usize) as u32;
    let kv = HostPages::new(&model.geometry(BLOCK_TOKENS)?, PAGE_TOKENS, pages)?;
    let pages: Vec<PageId> = (0..pages).map(PageId).collect();
    let pass = |start: usize, end: usize| {
        let rows = Rows {
            tokens: &tokens[start..end],
            start,
            pages: &pages,
            logits: end == tokens.len(),
        };
        model.forward(&kv, &[rows], &mut ())
    };
    // Once untimed, so that no page of the weights is touched for the first time.
    pass(0, tokens.len().min(64))?;
    let begun = Instant::now();
    for start in (0..tokens.len()).step_by(256) {
        pass(start, tokens.len().min(start + 256))?;
    }
    let ours = begun.elapsed();
    let candle = candle(path, tokens).map_err(|error| {
        Error::unavailable("candle's own Llama cannot run this model").caused_by(error)
    })?;
    Ok(Prefills { ours, candle })
}

fn candle(path: &Path, tokens: &[u32]) -> candle_core::Result<Duration> {
    let mut file = File::open(path)?;
    let content = Content::read(&mut file)?;
    let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
    let input = |tokens: &[u32]| Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0);
    model.forward(&input(&tokens[..tokens.len().min(64)])?, 0)?;
    let begun = Instant::now();
    model.forward(&input(tokens)?, 0)?;
    Ok(begun.elapsed())
}
