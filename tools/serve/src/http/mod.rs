//! OpenAI's HTTP interface, as far as one model on a CPU needs it.

mod api;

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::sse::{Event as Sent, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream::{self, Stream};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use serde_json::{Value, json};
use stemkv_store::Error;
use tokio::sync::{Semaphore, mpsc};

use crate::scheduler::Event;
use crate::server::Server;
use api::{ApiError, Endpoint, Envelope, Shape};

/// The largest body that is read: a full context of text is far below it.
const BODY_BYTES_MAX: usize = 4 << 20;

/// Requests that are cut into tokens at once. The longest that are read take some hundred MiB meanwhile.
static READING: Semaphore = Semaphore::const_new(4);

/// The routes of a server.
pub fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/models", get(models))
        .route("/health", get(health))
        .route("/metrics", get(metrics_text))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(server)
}

/// Collects what every server of this process measures. Called once, before the first server starts;
/// later calls change nothing.
pub fn install_metrics() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("the metrics go to another recorder: /metrics stays empty");
        }
        handle
    })
}

async fn chat(
    State(server): State<Arc<Server>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    generate(Endpoint::Chat, &server, body).await
}

async fn completion(
    State(server): State<Arc<Server>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    generate(Endpoint::Completion, &server, body).await
}

async fn generate(
    endpoint: Endpoint,
    server: &Arc<Server>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let body =
        body.map_err(|rejection| ApiError::new(rejection.status(), rejection.body_text()))?;
    // Rendering, tokenizing and hashing take milliseconds: not on a thread that others wait for.
    let reading = READING.acquire().await;
    let prepared = Arc::clone(server);
    let submitted = tokio::task::spawn_blocking(move || {
        let _reading = reading;
        let scheduler = prepared.scheduler();
        let vocabulary = scheduler.model().vocabulary();
        let (request, shape) = api::parse(
            endpoint,
            &body,
            prepared.model_id(),
            scheduler.tokenizer(),
            vocabulary,
            scheduler.context_tokens(),
        )?;
        let events = scheduler.submit(request)?;
        // What is measured waits in memory for somebody to ask for it, and perhaps nobody does.
        install_metrics().run_upkeep();
        Ok::<_, ApiError>((shape, events))
    });
    let (shape, events) = submitted.await.map_err(|error| {
        ApiError::from(Error::internal("reading a request failed").with("cause", error))
    })??;
    let envelope = envelope(server, shape);
    if shape.stream {
        Ok(Sse::new(pieces(envelope, events)).into_response())
    } else {
        whole(envelope, events).await
    }
}

fn envelope(server: &Server, shape: Shape) -> Envelope {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = since.unwrap_or_default();
    let kind = match shape.endpoint {
        Endpoint::Chat => "chatcmpl",
        Endpoint::Completion => "cmpl",
    };
    Envelope {
        shape,
        id: format!(
            "{kind}-{:x}-{}",
            now.as_micros(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ),
        created: now.as_secs(),
        model: server.model_id().to_owned(),
    }
}

/// Waits for the end. Dropped by a client that goes away, and the request with it.
async fn whole(
    envelope: Envelope,
    mut events: mpsc::UnboundedReceiver<Event>,
) -> Result<Response, ApiError> {
    let (mut answer, mut token_ids) = (String::new(), Vec::new());
    loop {
        match events.recv().await {
            Some(Event::Token { token, text }) => {
                answer += &text;
                token_ids.push(token);
            }
            Some(Event::Done {
                text,
                reason,
                usage,
            }) => {
                answer += &text;
                let body = envelope.answer(&answer, &token_ids, reason, usage);
                return Ok(Json(body).into_response());
            }
            Some(Event::Failed(error)) => return Err(error.into()),
            None => return Err(gone().into()),
        }
    }
}

/// The same as server-sent events.
fn pieces(
    envelope: Envelope,
    events: mpsc::UnboundedReceiver<Event>,
) -> impl Stream<Item = Result<Sent, std::convert::Infallible>> {
    struct State {
        envelope: Envelope,
        events: mpsc::UnboundedReceiver<Event>,
        /// Ready to be sent, last first.
        ready: Vec<Sent>,
        first: bool,
        ended: bool,
    }
    let state = State {
        envelope,
        events,
        ready: Vec::new(),
        first: true,
        ended: false,
    };
    stream::unfold(state, |mut state| async move {
        loop {
            if let Some(sent) = state.ready.pop() {
                return Some((Ok(sent), state));
            }
            if state.ended {
                return None;
            }
            let data = |value: &Value| Sent::default().data(value.to_string());
            let event = state.events.recv().await;
            let first = std::mem::take(&mut state.first);
            let envelope = &state.envelope;
            state.ready = match event {
                Some(Event::Token { token, text }) => {
                    // A token that completes no text is sent all the same where its id is asked for.
                    if text.is_empty() && !envelope.shape.token_ids && !first {
                        continue;
                    }
                    vec![data(&envelope.piece(first, Some(&text), &[token], None))]
                }
                Some(Event::Done {
                    text,
                    reason,
                    usage,
                }) => {
                    state.ended = true;
                    let text = (!text.is_empty()).then_some(text.as_str());
                    let mut ready = vec![Sent::default().data("[DONE]")];
                    if envelope.shape.include_usage {
                        ready.push(data(&envelope.usage_piece(usage)));
                    }
                    ready.push(data(&envelope.piece(first, text, &[], Some(reason))));
                    ready
                }
                Some(Event::Failed(error)) => {
                    state.ended = true;
                    vec![data(&ApiError::from(error).body())]
                }
                None => {
                    state.ended = true;
                    vec![data(&ApiError::from(gone()).body())]
                }
            };
        }
    })
}

fn gone() -> Error {
    Error::internal("the model thread ended before the answer did")
}

async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    let context = server.scheduler().context_tokens();
    Json(json!({"object": "list", "data": [{
        "id": server.model_id(),
        "object": "model",
        "created": 0,
        "owned_by": "stemkv-serve",
        "max_model_len": context,
    }]}))
}

/// 503 once nothing is answered any more.
async fn health(State(server): State<Arc<Server>>) -> Response {
    let scheduler = server.scheduler();
    let occupancy = scheduler.occupancy();
    let stats = scheduler.reuse().map(|reuse| reuse.cache.stats());
    let (code, status) = match scheduler.is_closed() {
        false => (StatusCode::OK, "ok"),
        true => (StatusCode::SERVICE_UNAVAILABLE, "closed"),
    };
    let health = json!({
        "status": status,
        "model": server.model_id(),
        "kv_token_bytes": scheduler.model().kv_token_bytes(),
        "waiting": occupancy.waiting,
        "running": occupancy.running,
        "pages_free": occupancy.pages_free,
        "pages": occupancy.pages,
        "store": stats,
    });
    (code, Json(health)).into_response()
}

async fn metrics_text() -> String {
    let handle = install_metrics();
    handle.run_upkeep();
    handle.render()
}

async fn unknown() -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "no such path: try /v1/chat/completions, /v1/completions, /v1/models, /health or /metrics",
    )
}

async fn wrong_method() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "this path takes another method",
    )
}
