//! The tokenizer out of a GGUF: exact round trips on a byte vocabulary that the tests write, and the
//! token counts of real traces where SmolLM2 and the traces are there.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::io::Read;
use std::path::Path;

use serde_json::Value;
use stemkv_serve::model::{Decoder, Gguf, Message, Tokenizer};

fn tiny(pre: &str) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let gguf = Gguf::open(&support::write_model(folder.path(), pre)).unwrap();
    Tokenizer::from_gguf(&gguf).unwrap()
}

#[test]
fn text_survives_encoding_and_streaming_decoding() {
    let text = "Zwölf Boxkämpfer\n\tjagen 42 🦊 — и ещё раз, 日本語.  ";
    for pre in ["gpt-2", "smollm"] {
        let tokenizer = tiny(pre);
        let tokens = tokenizer.encode(text).unwrap();
        assert_eq!(tokens.len(), text.len(), "one token a byte");
        assert_eq!(tokenizer.decode(&tokens), text);
        let mut decoder = Decoder::default();
        let mut streamed = String::new();
        for &token in &tokens {
            let piece = decoder.push(&tokenizer, token);
            assert!(!piece.contains('\u{fffd}'), "a character came in parts");
            streamed += &piece;
        }
        streamed += &decoder.finish();
        assert_eq!(streamed, text);
    }
}

#[test]
fn a_character_cut_off_at_the_end_is_replaced() {
    let tokenizer = tiny("gpt-2");
    let mut decoder = Decoder::default();
    let text: String = "€".as_bytes()[..2]
        .iter()
        .map(|&byte| decoder.push(&tokenizer, u32::from(byte)))
        .collect();
    assert_eq!(text, "");
    assert_eq!(decoder.finish(), "\u{fffd}");
}

/// Sampled tokens need not be text: what is wrong is replaced, and no byte of what comes behind it.
#[test]
fn wrong_bytes_are_replaced_as_in_the_whole_and_cost_no_character_behind_them() {
    let tokenizer = tiny("gpt-2");
    let euro = "€".as_bytes();
    for wrong in [&[0xff][..], &euro[..2], &[0xf0, 0x9f, 0xa6], &[0x80, 0xc3]] {
        for text in ["€", "a€", "🦊"] {
            let bytes = [wrong, text.as_bytes()].concat();
            let tokens: Vec<u32> = bytes.iter().map(|&byte| byte.into()).collect();
            let mut decoder = Decoder::default();
            let mut streamed = String::new();
            for &token in &tokens {
                streamed += &decoder.push(&tokenizer, token);
            }
            streamed += &decoder.finish();
            assert_eq!(streamed, tokenizer.decode(&tokens), "{bytes:?}");
            assert!(streamed.ends_with(text), "{streamed:?}");
        }
    }
}

#[test]
fn a_chat_is_rendered_by_the_models_template_and_its_special_tokens_are_single() {
    let tokenizer = tiny("gpt-2");
    let message = |role: &str, content: &str| Message {
        role: role.to_owned(),
        content: content.to_owned(),
    };
    let chat = [message("system", "Be brief."), message("user", "Hi")];
    let text = tokenizer.render_chat(&chat).unwrap();
    assert_eq!(
        text,
        "<start>system\nBe brief.<end>\n<start>user\nHi<end>\n<start>assistant\n"
    );
    let tokens = tokenizer.encode(&text).unwrap();
    assert_eq!(
        tokens.iter().filter(|&&t| tokenizer.is_end(t)).count(),
        2,
        "each <end> is one token"
    );
    let error = tokenizer.render_chat(&[message("nobody", "")]).unwrap_err();
    assert!(
        format!("{error:?}").contains("nobody may speak"),
        "{error:?}"
    );
}

#[test]
fn an_unknown_pre_tokenizer_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = Gguf::open(&support::write_model(folder.path(), "tekken")).unwrap();
    let error = Tokenizer::from_gguf(&gguf).err().unwrap();
    assert!(error.to_string().contains("value=tekken"), "{error}");
}

#[test]
fn token_counts_are_those_of_real_traces() {
    let traces = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/traces");
    if !traces.is_dir() {
        return println!("skipped: needs ../shared/traces");
    }
    let Some(model) = support::smollm2::or_skip("token counts") else {
        return;
    };
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(&model).unwrap()).unwrap();
    for trace in ["magagent", "miniswe"] {
        let texts = lines(&traces.join(format!("agent-text-{trace}.jsonl.gz")));
        let hashes = lines(&traces.join(format!("agent-hash-{trace}.jsonl.gz")));
        assert_eq!(texts.len(), hashes.len());
        for (i, (text, hash)) in texts.iter().zip(&hashes).enumerate().step_by(37) {
            let text = text["input"].as_str().unwrap();
            let tokens = tokenizer.encode(text).unwrap();
            assert_eq!(
                tokens.len() as u64,
                hash["input_length"].as_u64().unwrap(),
                "request {i} of {trace}"
            );
            assert_eq!(tokenizer.decode(&tokens), text, "request {i} of {trace}");
        }
    }
}

fn lines(path: &Path) -> Vec<Value> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(std::fs::File::open(path).unwrap())
        .read_to_string(&mut text)
        .unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}
