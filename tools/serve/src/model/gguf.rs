//! Reading a Llama-architecture GGUF: hyperparameters and dequantised tensors.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use stemkv_store::{Error, Result};

use super::attention::Heads;

/// What the forward pass needs to know of a model.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// `general.name`.
    pub name: String,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// Width of the feed-forward part.
    pub feed_forward: usize,
    /// Query heads.
    pub query_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Positions the model was trained for.
    pub context: usize,
    /// RoPE's base frequency.
    pub rope_base: f64,
    /// Added to the mean square in RMS normalisation.
    pub norm_epsilon: f32,
}

impl ModelConfig {
    pub(super) fn heads(&self) -> Heads {
        Heads {
            query: self.query_heads,
            kv: self.kv_heads,
            dim: self.head_dim,
        }
    }
}

/// An open GGUF file.
pub struct Gguf {
    content: Content,
    file: BufReader<File>,
}

impl Gguf {
    /// Opens a file and reads its metadata.
    ///
    /// # Errors
    /// `Unavailable` where the file cannot be read; `Invalid` where it is no GGUF.
    pub fn open(path: &Path) -> Result<Gguf> {
        let file = File::open(path).map_err(|error| {
            Error::unavailable("cannot open the model: give a GGUF file with --model")
                .with("path", path.display())
                .caused_by(error)
        })?;
        let mut file = BufReader::new(file);
        let content = Content::read(&mut file).map_err(|error| {
            Error::invalid("the model is not a readable GGUF file")
                .with("path", path.display())
                .caused_by(error)
        })?;
        Ok(Gguf { content, file })
    }

    /// The hyperparameters.
    ///
    /// # Errors
    /// `Invalid` where the architecture is not a plain Llama, naming what is not supported.
    pub fn config(&self) -> Result<ModelConfig> {
        let architecture = self.string("general.architecture").unwrap_or_default();
        if architecture != "llama" {
            return Err(Error::invalid("general.architecture must be llama")
                .with("general.architecture", architecture));
        }
        for (key, plain) in [
            ("llama.rope.scaling.type", "none"),
            ("tokenizer.ggml.model", "gpt2"),
        ] {
            match self.string(key) {
                Some(value) if value != plain => {
                    return Err(
                        Error::invalid(format!("of {key}, only {plain} is supported"))
                            .with("value", value),
                    );
                }
                _ => {}
            }
        }
        if self.integer("llama.expert_count").is_ok_and(|n| n > 1) {
            return Err(Error::invalid("mixtures of experts are not supported"));
        }
        if self.content.tensor_infos.contains_key("blk.0.attn_q.bias") {
            return Err(Error::invalid("attention biases are not supported"));
        }
        let width = self.integer("llama.embedding_length")?;
        let query_heads = self.integer("llama.attention.head_count")?;
        let head_dim = match self.integer("llama.attention.key_length") {
            Ok(dim) => dim,
            Err(_) => width / query_heads.max(1),
        };
        let config = ModelConfig {
            name: self
                .string("general.name")
                .unwrap_or("unnamed llama")
                .to_owned(),
            layers: self.integer("llama.block_count")?,
            width,
            feed_forward: self.integer("llama.feed_forward_length")?,
            query_heads,
            kv_heads: self
                .integer("llama.attention.head_count_kv")
                .unwrap_or(query_heads),
            head_dim,
            context: self.integer("llama.context_length")?,
            rope_base: self.float("llama.rope.freq_base").unwrap_or(10_000.0),
            norm_epsilon: self.float("llama.attention.layer_norm_rms_epsilon")? as f32,
        };
        let rotated = self
            .integer("llama.rope.dimension_count")
            .unwrap_or(head_dim);
        if head_dim % 16 != 0 || head_dim == 0 || rotated != head_dim {
            return Err(
                Error::invalid("heads must be a multiple of 16 wide and rotated whole")
                    .with("head_dim", head_dim)
                    .with("rotated", rotated),
            );
        }
        if config.kv_heads == 0 || query_heads % config.kv_heads != 0 {
            return Err(
                Error::invalid("query heads must be a multiple of the KV heads")
                    .with("query_heads", query_heads)
                    .with("kv_heads", config.kv_heads),
            );
        }
        Ok(config)
    }

    /// A string of the metadata.
    pub fn string(&self, key: &str) -> Option<&str> {
        let value = self.content.metadata.get(key)?;
        value.to_string().ok().map(String::as_str)
    }

    /// An array of the metadata.
    pub fn array(&self, key: &str) -> Option<&[Value]> {
        let value = self.content.metadata.get(key)?;
        value.to_vec().ok().map(Vec::as_slice)
    }

    /// A boolean of the metadata.
    pub fn boolean(&self, key: &str) -> Option<bool> {
        self.content.metadata.get(key)?.to_bool().ok()
    }

    /// A non-negative integer of the metadata, of any width.
    ///
    /// # Errors
    /// `Invalid` where it is missing or something else.
    pub fn integer(&self, key: &str) -> Result<usize> {
        let value = self.content.metadata.get(key);
        let number = value.and_then(|value| match value {
            Value::I32(n) => usize::try_from(*n).ok(),
            value => value.to_u64().ok().and_then(|n| usize::try_from(n).ok()),
        });
        number.ok_or_else(|| Error::invalid(format!("the model's metadata must have {key}")))
    }

    fn float(&self, key: &str) -> Result<f64> {
        let value = self.content.metadata.get(key);
        let number = value.and_then(|value| match value {
            Value::F32(x) => Some(f64::from(*x)),
            Value::F64(x) => Some(*x),
            _ => None,
        });
        number.ok_or_else(|| Error::invalid(format!("the model's metadata must have {key}")))
    }

    /// Is there a tensor of this name?
    pub fn has(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// A tensor as row-major f32.
    ///
    /// # Errors
    /// `Invalid` where it is missing, or of another shape than `shape`.
    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let read = || -> candle_core::Result<_> {
            let tensor = self
                .content
                .tensor(&mut self.file, name, &Device::Cpu)?
                .dequantize(&Device::Cpu)?;
            Ok((
                tensor.dims().to_vec(),
                tensor.flatten_all()?.to_vec1::<f32>()?,
            ))
        };
        let (found, values) = { read }().map_err(|error| {
            Error::invalid("cannot read a tensor of the model")
                .with("tensor", name)
                .caused_by(error)
        })?;
        if found != shape {
            return Err(Error::invalid("a tensor of the model has another shape")
                .with("tensor", name)
                .with("expected", format!("{shape:?}"))
                .with("found", format!("{found:?}")));
        }
        Ok(values)
    }
}
