//! What OpenAI's clients send and expect: requests checked, answers shaped.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use stemkv_store::{Error, ErrorKind};

use crate::model::{Message, Sampling, Tokenizer};
use crate::scheduler::{FinishReason, Request, Usage};

/// Tokens that an answer may have where the request does not say, if there is room for them.
const CHAT_TOKENS: usize = 256;
const COMPLETION_TOKENS: usize = 16;
/// Stop strings of one request, as OpenAI limits them.
const STOPS_MAX: usize = 4;

/// An error as OpenAI shapes it.
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    message: String,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError {
            status,
            kind: if status.is_server_error() {
                "server_error"
            } else {
                "invalid_request_error"
            },
            code: None,
            message: message.into(),
        }
    }

    pub(super) fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, message)
    }

    pub(super) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": null,
            "code": self.code,
        }})
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> ApiError {
        let status = match error.kind() {
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::Busy => StatusCode::TOO_MANY_REQUESTS,
            ErrorKind::Closed | ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        match error.kind() {
            // Clients know of no store.
            ErrorKind::Closed => ApiError::new(status, "the server is closing"),
            _ => ApiError::new(status, error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(self.body())).into_response()
    }
}

/// The fields that both kinds of request share. Unknown ones are ignored, as clients send many; null is as
/// good as nothing, as some send it for all that they do not set.
#[derive(Deserialize)]
struct Common {
    model: Option<String>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<i64>,
    stop: Option<Stop>,
    n: Option<u64>,
    best_of: Option<u64>,
    return_token_ids: Option<bool>,
    #[serde(flatten)]
    other: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "stop must be a string or a list of strings")]
enum Stop {
    One(String),
    Some(Vec<String>),
}

#[derive(Deserialize)]
struct ChatBody {
    messages: Vec<ChatMessage>,
    max_completion_tokens: Option<usize>,
    #[serde(flatten)]
    common: Common,
}

#[derive(Deserialize)]
struct ChatMessage {
    role: String,
    content: Content,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "a message's content must be a string or a list of parts"
)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    r#type: String,
    text: Option<String>,
}

#[derive(Deserialize)]
struct CompletionBody {
    prompt: PromptBody,
    #[serde(flatten)]
    common: Common,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "prompt must be a string or a list of token ids")]
enum PromptBody {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
}

/// How an answer is to be given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) endpoint: Endpoint,
    pub(super) stream: bool,
    /// Send a last chunk with the token counts.
    pub(super) include_usage: bool,
    /// Send each choice's token ids (an extension that vLLM has, too).
    pub(super) token_ids: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    Chat,
    Completion,
}

/// Reads and checks a request.
pub(super) fn parse(
    endpoint: Endpoint,
    body: &[u8],
    model_id: &str,
    tokenizer: &Tokenizer,
    vocabulary: usize,
    context_tokens: usize,
) -> Result<(Request, Shape), ApiError> {
    let wrong = |error: serde_json::Error| ApiError::invalid(format!("wrong request: {error}"));
    // What nobody asked for is no reason to refuse a long prompt.
    let unasked = |tokens: usize, prompt: &[u32]| {
        tokens
            .min(context_tokens.saturating_sub(prompt.len()))
            .max(1)
    };
    let (prompt, max_tokens, common) = match endpoint {
        Endpoint::Chat => {
            let body: ChatBody = serde_json::from_slice(body).map_err(wrong)?;
            if body.messages.is_empty() {
                return Err(ApiError::invalid("messages must not be empty"));
            }
            let messages = body
                .messages
                .into_iter()
                .map(message)
                .collect::<Result<Vec<_>, _>>()?;
            let text = tokenizer.render_chat(&messages)?;
            let prompt = tokenizer.encode(&text)?;
            let max_tokens = body.max_completion_tokens.or(body.common.max_tokens);
            let max_tokens = max_tokens.unwrap_or_else(|| unasked(CHAT_TOKENS, &prompt));
            (prompt, max_tokens, body.common)
        }
        Endpoint::Completion => {
            let body: CompletionBody = serde_json::from_slice(body).map_err(wrong)?;
            let prompt = match body.prompt {
                PromptBody::Text(text) => tokenizer.encode(&text)?,
                PromptBody::Tokens(tokens) => tokens,
                PromptBody::Texts(texts) => match &texts[..] {
                    [text] => tokenizer.encode(text)?,
                    _ => return Err(ApiError::invalid("prompt must be a single one")),
                },
            };
            if let Some(token) = prompt.iter().find(|&&token| token as usize >= vocabulary) {
                return Err(ApiError::invalid(format!(
                    "prompt has token {token}, the model's are below {vocabulary}"
                )));
            }
            let max_tokens = body.common.max_tokens;
            let max_tokens = max_tokens.unwrap_or_else(|| unasked(COMPLETION_TOKENS, &prompt));
            (prompt, max_tokens, body.common)
        }
    };
    common.check(model_id)?;
    if prompt.is_empty() {
        return Err(ApiError::invalid("the prompt must have at least one token"));
    }
    if max_tokens == 0 {
        return Err(ApiError::invalid("max_tokens must be at least 1"));
    }
    let shape = Shape {
        endpoint,
        stream: common.stream == Some(true),
        include_usage: common
            .stream_options
            .as_ref()
            .is_some_and(|options| options.include_usage == Some(true)),
        token_ids: common.return_token_ids == Some(true),
    };
    let request = Request {
        prompt,
        max_tokens,
        sampling: common.sampling()?,
        stop: common.stops()?,
    };
    Ok((request, shape))
}

fn message(message: ChatMessage) -> Result<Message, ApiError> {
    let content = match message.content {
        Content::Text(text) => text,
        Content::Parts(parts) => parts
            .into_iter()
            .map(|part| match (part.r#type.as_str(), part.text) {
                ("text", Some(text)) => Ok(text),
                (kind, _) => Err(ApiError::invalid(format!(
                    "content parts must be text, not {kind}"
                ))),
            })
            .collect::<Result<_, _>>()?,
    };
    Ok(Message {
        role: message.role,
        content,
    })
}

impl Common {
    /// Refuses what would be answered wrongly.
    fn check(&self, model_id: &str) -> Result<(), ApiError> {
        if let Some(model) = self.model.as_ref().filter(|model| *model != model_id) {
            return Err(ApiError {
                code: Some("model_not_found"),
                ..ApiError::new(
                    StatusCode::NOT_FOUND,
                    format!("there is no model {model}: this server has {model_id}"),
                )
            });
        }
        if self.n.is_some_and(|n| n != 1) || self.best_of.is_some_and(|n| n != 1) {
            return Err(ApiError::invalid("n and best_of must be 1"));
        }
        if self.stream != Some(true) && self.stream_options.is_some() {
            return Err(ApiError::invalid("stream_options needs stream to be true"));
        }
        for field in ["logprobs", "tools", "functions", "response_format", "echo"] {
            let set = match self.other.get(field) {
                None | Some(Value::Null | Value::Bool(false)) => false,
                Some(Value::Array(items)) => !items.is_empty(),
                Some(value) => value != &json!({"type": "text"}),
            };
            if set {
                return Err(ApiError::invalid(format!("{field} is not supported")));
            }
        }
        let neutral = [
            ("presence_penalty", json!(0.0)),
            ("frequency_penalty", json!(0.0)),
            ("logit_bias", json!({})),
            ("suffix", json!("")),
        ];
        for (field, neutral) in neutral {
            let same = match self.other.get(field) {
                None | Some(Value::Null) => true,
                Some(Value::Number(number)) => number.as_f64() == neutral.as_f64(),
                Some(value) => value == &neutral,
            };
            if !same {
                return Err(ApiError::invalid(format!("{field} is not supported")));
            }
        }
        Ok(())
    }

    fn sampling(&self) -> Result<Sampling, ApiError> {
        let temperature = self.temperature.unwrap_or(0.0);
        let top_p = self.top_p.unwrap_or(1.0);
        if !(0.0..=2.0).contains(&temperature) {
            return Err(ApiError::invalid("temperature must be 0 to 2"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(ApiError::invalid("top_p must be above 0 and at most 1"));
        }
        Ok(Sampling {
            temperature,
            top_p,
            seed: self.seed.unwrap_or(0).cast_unsigned(),
        })
    }

    fn stops(self) -> Result<Vec<String>, ApiError> {
        let stops = match self.stop {
            None => Vec::new(),
            Some(Stop::One(stop)) => vec![stop],
            Some(Stop::Some(stops)) => stops,
        };
        if stops.len() > STOPS_MAX || stops.iter().any(String::is_empty) {
            return Err(ApiError::invalid(format!(
                "stop must be at most {STOPS_MAX} strings, none of them empty"
            )));
        }
        Ok(stops)
    }
}

/// The parts that every answer to one request shares.
#[derive(Clone, Debug)]
pub(super) struct Envelope {
    pub(super) shape: Shape,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

impl Envelope {
    /// The whole answer at once.
    pub(super) fn answer(
        &self,
        text: &str,
        token_ids: &[u32],
        reason: FinishReason,
        usage: Usage,
    ) -> Value {
        let mut choice = match self.shape.endpoint {
            Endpoint::Chat => json!({"message": {"role": "assistant", "content": text}}),
            Endpoint::Completion => json!({"text": text}),
        };
        choice["index"] = json!(0);
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = json!(reason_name(reason));
        if self.shape.token_ids {
            choice["token_ids"] = json!(token_ids);
        }
        let object = match self.shape.endpoint {
            Endpoint::Chat => "chat.completion",
            Endpoint::Completion => "text_completion",
        };
        let mut answer = self.wrap(object, vec![choice]);
        answer["usage"] = usage_json(usage);
        answer
    }

    /// One piece of a streamed answer; the first of a chat names the role.
    pub(super) fn piece(
        &self,
        first: bool,
        text: Option<&str>,
        token_ids: &[u32],
        reason: Option<FinishReason>,
    ) -> Value {
        let mut choice = match self.shape.endpoint {
            Endpoint::Chat => {
                let mut delta = json!({});
                if first {
                    delta["role"] = json!("assistant");
                }
                if let Some(text) = text {
                    delta["content"] = json!(text);
                }
                json!({"delta": delta})
            }
            Endpoint::Completion => json!({"text": text.unwrap_or_default()}),
        };
        choice["index"] = json!(0);
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = json!(reason.map(reason_name));
        if self.shape.token_ids {
            choice["token_ids"] = json!(token_ids);
        }
        let mut piece = self.wrap(self.piece_object(), vec![choice]);
        if self.shape.include_usage {
            piece["usage"] = Value::Null;
        }
        piece
    }

    /// The last piece of a stream that asked for the token counts.
    pub(super) fn usage_piece(&self, usage: Usage) -> Value {
        let mut piece = self.wrap(self.piece_object(), Vec::new());
        piece["usage"] = usage_json(usage);
        piece
    }

    fn piece_object(&self) -> &'static str {
        match self.shape.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completion => "text_completion",
        }
    }

    fn wrap(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        })
    }
}

fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}
