//! The tokenizer and the chat template that a GGUF carries.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, context};
use serde::{Deserialize, Serialize};
use stemkv_store::{Error, Result};
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer as Encoder};

use super::Gguf;

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the model's template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

/// Text to tokens, chats to text, tokens to bytes.
pub struct Tokenizer {
    encoder: Encoder,
    /// The bytes that each token stands for; control tokens stand for none.
    bytes: Vec<Vec<u8>>,
    /// Put before every prompt, where the model wants it.
    begin: Option<u32>,
    ends: Vec<u32>,
    templates: Environment<'static>,
    begin_text: String,
    end_text: String,
}

const TEMPLATE: &str = "chat";
const TOKEN_CONTROL: i64 = 3;
const TOKEN_USER_DEFINED: i64 = 4;

impl Tokenizer {
    /// Builds the tokenizer from a GGUF's metadata.
    ///
    /// # Errors
    /// `Invalid` where the metadata is incomplete or of a kind that is not supported, named.
    pub fn from_gguf(gguf: &Gguf) -> Result<Tokenizer> {
        let tokens = strings(gguf, "tokenizer.ggml.tokens")?;
        let merges = strings(gguf, "tokenizer.ggml.merges")?
            .into_iter()
            .map(|merge| {
                merge
                    .split_once(' ')
                    .map(|(left, right)| (left.to_owned(), right.to_owned()))
                    .ok_or_else(|| {
                        Error::invalid("a merge must be two tokens").with("merge", merge)
                    })
            })
            .collect::<Result<Vec<_>>>()?;
        let types: Vec<i64> = gguf
            .array("tokenizer.ggml.token_type")
            .unwrap_or_default()
            .iter()
            .map(|value| match value {
                Value::I32(n) => i64::from(*n),
                Value::U32(n) => i64::from(*n),
                _ => 0,
            })
            .collect();
        let kind = |id: usize| types.get(id).copied().unwrap_or(0);

        let vocabulary: Vec<(String, u32)> =
            tokens.iter().map(|t| (*t).to_owned()).zip(0..).collect();
        let model = BPE::builder()
            .vocab_and_merges(vocabulary.into_iter().collect::<Vocab>(), merges)
            .build()
            .map_err(|error| {
                Error::invalid("the model's merges do not fit its tokens").caused_by(error)
            })?;
        let mut encoder = Encoder::new(model);
        encoder.with_pre_tokenizer(Some(pre_tokenizer(gguf)?));
        let added = tokens.iter().enumerate().filter_map(|(id, token)| {
            let special = kind(id) == TOKEN_CONTROL;
            (special || kind(id) == TOKEN_USER_DEFINED)
                .then(|| AddedToken::from(*token, special).normalized(false))
        });
        encoder.add_tokens(added).map_err(|error| {
            Error::invalid("the model's special tokens are wrong").caused_by(error)
        })?;

        let alphabet = byte_alphabet();
        let bytes = tokens
            .iter()
            .enumerate()
            .map(|(id, token)| match kind(id) {
                TOKEN_CONTROL => Vec::new(),
                TOKEN_USER_DEFINED => token.as_bytes().to_vec(),
                _ => token
                    .chars()
                    .filter_map(|c| alphabet.get(&c).copied())
                    .collect(),
            })
            .collect();
        let special = |key: &str| {
            let id = gguf.integer(key).ok().filter(|&id| id < tokens.len())?;
            u32::try_from(id).ok()
        };
        let begin = special("tokenizer.ggml.bos_token_id");
        let end = special("tokenizer.ggml.eos_token_id");
        let text = |id: Option<u32>| id.map_or(String::new(), |id| tokens[id as usize].to_owned());
        let mut templates = Environment::new();
        // As the reference implementation of chat templates sets them.
        templates.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .expect("only whitespace differs from the default syntax"),
        );
        templates.add_function("raise_exception", |message: String| {
            Err::<String, _>(minijinja::Error::new(
                minijinja::ErrorKind::InvalidOperation,
                message,
            ))
        });
        if let Some(template) = gguf.string("tokenizer.chat_template") {
            templates
                .add_template_owned(TEMPLATE, template.to_owned())
                .map_err(|error| {
                    Error::invalid("the model's chat template is not understood").caused_by(error)
                })?;
        }
        Ok(Tokenizer {
            begin: begin.filter(|_| gguf.boolean("tokenizer.ggml.add_bos_token") == Some(true)),
            ends: end
                .into_iter()
                .chain(special("tokenizer.ggml.eot_token_id"))
                .collect(),
            begin_text: text(begin),
            end_text: text(end),
            encoder,
            bytes,
            templates,
        })
    }

    /// The tokens of a text; special tokens are recognised in it.
    ///
    /// # Errors
    /// `Internal` where the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.encoder.encode_fast(text, false).map_err(|error| {
            Error::internal("the tokenizer failed on this text").caused_by(error)
        })?;
        let tokens = encoding.get_ids();
        Ok(match self.begin {
            Some(begin) if tokens.first() != Some(&begin) => [&[begin], tokens].concat(),
            _ => tokens.to_vec(),
        })
    }

    /// The text that the model continues with the assistant's answer.
    ///
    /// # Errors
    /// `Invalid` where the model has no template or the template refuses the messages.
    pub fn render_chat(&self, messages: &[Message]) -> Result<String> {
        let template = self
            .templates
            .get_template(TEMPLATE)
            .map_err(|_| Error::invalid("the model has no chat template: use /v1/completions"))?;
        template
            .render(context! {
                messages => Serde(messages),
                add_generation_prompt => true,
                bos_token => self.begin_text.as_str(),
                eos_token => self.end_text.as_str(),
            })
            .map_err(|error| {
                Error::invalid("the model's chat template refuses these messages").caused_by(error)
            })
    }

    /// Does this token end an answer?
    pub fn is_end(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// The text of some tokens; special tokens have none.
    pub fn decode(&self, tokens: &[u32]) -> String {
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|&t| self.bytes_of(t))
            .copied()
            .collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn bytes_of(&self, token: u32) -> &[u8] {
        self.bytes.get(token as usize).map_or(&[], Vec::as_slice)
    }
}

/// Turns tokens into text as they come: bytes wait until their character is complete.
#[derive(Default)]
pub struct Decoder {
    pending: Vec<u8>,
}

impl Decoder {
    /// The text that this token completes, possibly none.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> String {
        self.pending.extend_from_slice(tokenizer.bytes_of(token));
        // A character that may still be completed waits; wrong bytes are replaced.
        let last = self.pending.utf8_chunks().last();
        let last = last.map_or(&[][..], |chunk| chunk.invalid());
        let waits = match std::str::from_utf8(last) {
            Err(error) if error.error_len().is_none() => last.len(),
            _ => 0,
        };
        let rest = self.pending.split_off(self.pending.len() - waits);
        let done = std::mem::replace(&mut self.pending, rest);
        String::from_utf8_lossy(&done).into_owned()
    }

    /// What is left at the end: an incomplete character, replaced.
    pub fn finish(&mut self) -> String {
        let rest = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&rest).into_owned()
    }
}

fn strings<'a>(gguf: &'a Gguf, key: &str) -> Result<Vec<&'a str>> {
    let missing = || Error::invalid(format!("the model's metadata must have {key}"));
    gguf.array(key)
        .ok_or_else(missing)?
        .iter()
        .map(|value| value.to_string().map(String::as_str).map_err(|_| missing()))
        .collect()
}

fn pre_tokenizer(gguf: &Gguf) -> Result<PreTokenizerWrapper> {
    let bytes = PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true));
    match gguf.string("tokenizer.ggml.pre").unwrap_or("default") {
        "smollm" => Ok(PreTokenizerWrapper::Sequence(Sequence::new(vec![
            PreTokenizerWrapper::Digits(Digits::new(true)),
            bytes,
        ]))),
        "gpt-2" | "default" => Ok(bytes),
        other => Err(Error::invalid(
            "of tokenizer.ggml.pre, smollm, gpt-2 and default are supported",
        )
        .with("value", other)),
    }
}

/// Byte-level BPE writes each byte as one printable character: those that are printable in Latin-1
/// as themselves, the others as the characters from U+0100 on, in order.
fn byte_alphabet() -> HashMap<char, u8> {
    let mut next = 0x100;
    (0..=255u8)
        .map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let code = if printable {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            let character = char::from_u32(code).expect("codes below U+0200 are characters");
            (character, byte)
        })
        .collect()
}
