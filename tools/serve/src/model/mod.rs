//! A Llama model on the CPU, with its KV in an engine's pages.
//!
//! candle reads the GGUF and dequantises it; the forward pass is ours, because it has to work over
//! paged KV layer by layer and to give every token the same bits whatever is computed beside it
//! (row independence: `kernels.rs`).

mod attention;
mod gguf;
mod kernels;
mod sampling;
mod tokenizer;

use attention::{Kv, Queries};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use stemkv_store::{Dtype, HostPages, KvGeometry, LayerId, PageId, Result};

pub use gguf::{Gguf, ModelConfig};
use kernels::Linear;
pub use sampling::{Sampler, Sampling};
pub use tokenizer::{Decoder, Message, Tokenizer};

/// The weights.
pub struct Model {
    config: ModelConfig,
    /// `[token][width]`.
    embedding: Vec<f16>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    output: Linear,
    /// cos and sin of `[position][head_dim / 2]`.
    rotations: Vec<(f32, f32)>,
}

struct Layer {
    attention_norm: Vec<f32>,
    query_key_value: Linear,
    attention_output: Linear,
    feed_forward_norm: Vec<f32>,
    gate_up: Linear,
    down: Linear,
}

/// Some consecutive tokens of one sequence, to be computed in one pass.
pub struct Rows<'a> {
    /// The tokens, at least one.
    pub tokens: &'a [u32],
    /// Position of the first one.
    pub start: usize,
    /// Token `t` of the sequence lives in `pages[t / page_tokens]`.
    pub pages: &'a [PageId],
    /// Are the logits after the last token wanted?
    pub logits: bool,
}

/// What a pass waits for and reports, layer by layer.
pub trait LayerHooks {
    /// Returns once the layer's KV of earlier positions may be read.
    ///
    /// # Errors
    /// Any error ends the pass; what it computed must be discarded.
    fn before_attention(&mut self, layer: LayerId) -> Result<()>;

    /// The layer's KV of this pass's tokens is in the pages.
    fn written(&mut self, layer: LayerId);
}

/// For passes whose earlier KV is there already.
impl LayerHooks for () {
    fn before_attention(&mut self, _: LayerId) -> Result<()> {
        Ok(())
    }

    fn written(&mut self, _: LayerId) {}
}

impl Model {
    /// Loads the weights, and prepares positions below `context`.
    ///
    /// Weights are kept as f16: the rounding (2⁻¹¹) is far below that of the quantised file.
    ///
    /// # Errors
    /// `Invalid` where the file is no plain Llama.
    pub fn load(gguf: &mut Gguf, context: usize) -> Result<Model> {
        let config = gguf.config()?;
        let (width, head_dim) = (config.width, config.head_dim);
        let query_width = config.query_heads * head_dim;
        let kv_width = config.kv_heads * head_dim;
        let vocabulary = gguf.array("tokenizer.ggml.tokens").map_or(0, <[_]>::len);
        let embedding = gguf.tensor("token_embd.weight", &[vocabulary, width])?;
        let output = if gguf.has("output.weight") {
            Linear::pack(
                width,
                &[gguf.tensor("output.weight", &[vocabulary, width])?],
            )
        } else {
            Linear::pack(width, std::slice::from_ref(&embedding))
        };
        let mut layers = Vec::with_capacity(config.layers);
        for i in 0..config.layers {
            let mut tensor =
                |name: &str, shape: &[usize]| gguf.tensor(&format!("blk.{i}.{name}.weight"), shape);
            layers.push(Layer {
                attention_norm: tensor("attn_norm", &[width])?,
                query_key_value: Linear::pack(
                    width,
                    &[
                        tensor("attn_q", &[query_width, width])?,
                        tensor("attn_k", &[kv_width, width])?,
                        tensor("attn_v", &[kv_width, width])?,
                    ],
                ),
                attention_output: Linear::pack(
                    query_width,
                    &[tensor("attn_output", &[width, query_width])?],
                ),
                feed_forward_norm: tensor("ffn_norm", &[width])?,
                gate_up: Linear::pack(
                    width,
                    &[
                        tensor("ffn_gate", &[config.feed_forward, width])?,
                        tensor("ffn_up", &[config.feed_forward, width])?,
                    ],
                ),
                down: Linear::pack(
                    config.feed_forward,
                    &[tensor("ffn_down", &[width, config.feed_forward])?],
                ),
            });
        }
        let factors = if gguf.has("rope_freqs.weight") {
            gguf.tensor("rope_freqs.weight", &[head_dim / 2])?
        } else {
            vec![1.0; head_dim / 2]
        };
        let frequencies: Vec<f64> = factors
            .iter()
            .enumerate()
            .map(|(pair, &factor)| {
                let exponent = -2.0 * pair as f64 / head_dim as f64;
                config.rope_base.powf(exponent) / f64::from(factor)
            })
            .collect();
        let rotations = (0..context)
            .flat_map(|position| frequencies.iter().map(move |f| position as f64 * f))
            .map(|angle| (angle.cos() as f32, angle.sin() as f32))
            .collect();
        Ok(Model {
            embedding: embedding.iter().copied().map(f16::from_f32).collect(),
            layers,
            norm: gguf.tensor("output_norm.weight", &[width])?,
            output,
            rotations,
            config,
        })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Token ids are below this.
    pub fn vocabulary(&self) -> usize {
        self.embedding.len() / self.config.width
    }

    /// Bytes of one token's KV, all layers.
    pub fn kv_token_bytes(&self) -> usize {
        let config = &self.config;
        2 * config.layers * config.kv_heads * config.head_dim * Dtype::Bf16.bytes()
    }

    /// How this model's KV is laid out in blocks of `block_tokens`.
    ///
    /// # Errors
    /// `Invalid` where no store can hold it.
    pub fn geometry(&self, block_tokens: u32) -> Result<KvGeometry> {
        KvGeometry::gqa(
            self.config.layers as u32,
            self.config.kv_heads as u32,
            self.config.head_dim as u32,
            Dtype::Bf16,
            block_tokens,
        )
    }

    /// Computes `batch`, writes its K (rotated) and V into `kv` and returns the logits after the
    /// last token of each entry that wants them, in order.
    ///
    /// Attention reads *all* K and V back from the bf16 pages, the fresh ones too. So the bits of a
    /// token's KV and logits depend on the tokens up to it and on nothing else: not on where a
    /// prefill is cut, nor on what else is in the batch, nor on whether the earlier KV was computed
    /// or loaded.
    ///
    /// # Errors
    /// Those of `hooks`: discard what the pass wrote.
    ///
    /// # Panics
    /// Where a position is at or beyond the context that the model was loaded for, or has no page.
    pub fn forward(
        &self,
        kv: &HostPages,
        batch: &[Rows<'_>],
        hooks: &mut dyn LayerHooks,
    ) -> Result<Vec<Vec<f32>>> {
        let config = &self.config;
        let heads = config.heads();
        let page_tokens = kv.paged().page_tokens() as usize;
        let query_width = config.query_heads * config.head_dim;
        let rows: usize = batch.iter().map(|rows| rows.tokens.len()).sum();

        let mut x = self.embed(batch);
        let mut queries = vec![0.0; rows * query_width];
        let mut attended = vec![0.0; rows * query_width];
        let (mut normed, mut wide, mut narrow) = (Vec::new(), Vec::new(), Vec::new());
        let mut sums = Vec::new();
        for (id, layer) in (0..).map(LayerId).zip(&self.layers) {
            kernels::rms_norm(&x, &layer.attention_norm, config.norm_epsilon, &mut normed);
            layer.query_key_value.apply(&normed, &mut wide, &mut sums);
            self.rotate(batch, &mut wide, &mut queries);
            kv.write(id, |planes| self.store(batch, &wide, page_tokens, planes));
            hooks.written(id);
            hooks.before_attention(id)?;
            kv.read(id, |planes| {
                let mut first = 0;
                let sequences: Vec<Queries<'_>> = batch
                    .iter()
                    .map(|rows| {
                        let part = first..first + rows.tokens.len() * query_width;
                        first = part.end;
                        Queries {
                            rows: &queries[part],
                            start: rows.start,
                            kv: Kv {
                                keys: planes[0],
                                values: planes[1],
                                pages: rows.pages,
                                page_tokens,
                            },
                        }
                    })
                    .collect();
                attention::attend(heads, &sequences, &mut attended);
            });
            layer
                .attention_output
                .apply(&attended, &mut narrow, &mut sums);
            kernels::add(&mut x, &narrow);

            kernels::rms_norm(
                &x,
                &layer.feed_forward_norm,
                config.norm_epsilon,
                &mut normed,
            );
            layer.gate_up.apply(&normed, &mut wide, &mut sums);
            kernels::gated(&wide, config.feed_forward, &mut normed);
            layer.down.apply(&normed, &mut narrow, &mut sums);
            kernels::add(&mut x, &narrow);
        }
        Ok(self.logits(batch, &x))
    }

    fn embed(&self, batch: &[Rows<'_>]) -> Vec<f32> {
        let width = self.config.width;
        let tokens = batch.iter().flat_map(|rows| rows.tokens);
        let mut x = vec![0.0; tokens.clone().count() * width];
        for (&token, row) in tokens.zip(x.chunks_exact_mut(width)) {
            self.embedding[token as usize * width..][..width].convert_to_f32_slice(row);
        }
        x
    }

    /// Rotates the queries and keys of `wide` by their positions (interleaved pairs, as GGUF stores
    /// Llama's). Queries go to `queries`, divided by √head_dim; keys stay in place.
    fn rotate(&self, batch: &[Rows<'_>], wide: &mut [f32], queries: &mut [f32]) {
        let config = &self.config;
        let half = config.head_dim / 2;
        let query_width = config.query_heads * config.head_dim;
        let kv_width = config.kv_heads * config.head_dim;
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let positions = batch
            .iter()
            .flat_map(|rows| rows.start..rows.start + rows.tokens.len());
        for ((position, wide), queries) in positions
            .zip(wide.chunks_exact_mut(query_width + 2 * kv_width))
            .zip(queries.chunks_exact_mut(query_width))
        {
            let rotations = &self.rotations[position * half..][..half];
            let (query, rest) = wide.split_at_mut(query_width);
            for head in query.chunks_exact_mut(config.head_dim) {
                rotate_head(head, rotations);
            }
            for (out, &query) in queries.iter_mut().zip(&*query) {
                *out = query * scale;
            }
            for head in rest[..kv_width].chunks_exact_mut(config.head_dim) {
                rotate_head(head, rotations);
            }
        }
    }

    /// Writes the K and V parts of `wide` into the pages, rounded to bf16.
    fn store(
        &self,
        batch: &[Rows<'_>],
        wide: &[f32],
        page_tokens: usize,
        planes: &mut [&mut [u8]],
    ) {
        let query_width = self.config.query_heads * self.config.head_dim;
        let kv_width = self.config.kv_heads * self.config.head_dim;
        let slots = batch.iter().flat_map(|rows| {
            (rows.start..rows.start + rows.tokens.len()).map(|token| {
                let page = rows.pages[token / page_tokens].0 as usize;
                page * page_tokens + token % page_tokens
            })
        });
        for (slot, row) in slots.zip(wide.chunks_exact(query_width + 2 * kv_width)) {
            let parts = row[query_width..].chunks_exact(kv_width);
            for (plane, part) in planes.iter_mut().zip(parts) {
                let out = &mut plane[slot * kv_width * 2..][..kv_width * 2];
                for (out, &value) in out.as_chunks_mut::<2>().0.iter_mut().zip(part) {
                    *out = bf16::from_f32(value).to_le_bytes();
                }
            }
        }
    }

    fn logits(&self, batch: &[Rows<'_>], x: &[f32]) -> Vec<Vec<f32>> {
        let width = self.config.width;
        let mut wanted = Vec::new();
        let mut end = 0;
        for rows in batch {
            end += rows.tokens.len();
            if rows.logits {
                wanted.extend_from_slice(&x[(end - 1) * width..end * width]);
            }
        }
        if wanted.is_empty() {
            return Vec::new();
        }
        let (mut normed, mut logits, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        kernels::rms_norm(&wanted, &self.norm, self.config.norm_epsilon, &mut normed);
        self.output.apply(&normed, &mut logits, &mut sums);
        logits
            .chunks_exact(self.output.outputs())
            .map(<[f32]>::to_vec)
            .collect()
    }
}

fn rotate_head(head: &mut [f32], rotations: &[(f32, f32)]) {
    for (pair, &(cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(rotations) {
        let [even, odd] = *pair;
        *pair = [even * cos - odd * sin, even * sin + odd * cos];
    }
}
