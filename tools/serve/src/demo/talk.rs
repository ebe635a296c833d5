//! One conversation with a server, timed.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stemkv_store::{Error, Result};

use super::client;
use super::process::ServerProcess;
use crate::model::Message;

/// Tokens of an answer at most.
const ANSWER_TOKENS: usize = 24;

/// One answer.
#[derive(Clone, Debug)]
pub(super) struct Answered {
    /// From sending the request to the first token.
    pub(super) first_token: Duration,
    pub(super) token_ids: Vec<u64>,
    pub(super) text: String,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
}

/// Asks for the next message of a chat.
pub(super) fn ask(server: &ServerProcess, messages: &[Message]) -> Result<Answered> {
    let request = json!({
        "messages": messages,
        "max_tokens": ANSWER_TOKENS,
        "stream": true,
        "stream_options": {"include_usage": true},
        "return_token_ids": true,
    });
    let begun = Instant::now();
    let mut first_token = None;
    let (mut token_ids, mut text, mut usage) = (Vec::new(), String::new(), Value::Null);
    let mut failure = None;
    let done = client::stream(server.address, "/v1/chat/completions", &request, |data| {
        if data == "[DONE]" {
            return ControlFlow::Break(());
        }
        first_token.get_or_insert_with(|| begun.elapsed());
        let event: Value = serde_json::from_str(data).unwrap_or_default();
        if event.get("error").is_some() {
            failure = Some(data.to_owned());
        }
        let choice = &event["choices"][0];
        let ids = choice["token_ids"].as_array().into_iter().flatten();
        token_ids.extend(ids.filter_map(Value::as_u64));
        text += choice["delta"]["content"].as_str().unwrap_or_default();
        if event["usage"].is_object() {
            usage = event["usage"].clone();
        }
        ControlFlow::Continue(())
    });
    let unanswered = || Error::unavailable("the server did not answer a question");
    let done = done.map_err(|error| unanswered().caused_by(error))?;
    match (failure, done, first_token) {
        (None, Some(()), Some(first_token)) => Ok(Answered {
            first_token,
            token_ids,
            text,
            prompt_tokens: usage["prompt_tokens"].as_u64().unwrap_or(0),
            cached_tokens: usage["prompt_tokens_details"]["cached_tokens"]
                .as_u64()
                .unwrap_or(0),
        }),
        (failure, ..) => Err(unanswered().with("answer", failure.unwrap_or_default())),
    }
}
