//! The server over real connections on the loopback, with a tiny random model: answers, streams,
//! errors, reuse of KV, several clients at once, and clients that go away.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stemkv::{DiskConfig, HostCodec, Warming};
use stemkv_serve::demo::client::{self, Answer};
use stemkv_serve::http;
use stemkv_serve::scheduler::{Limits, Occupancy};
use stemkv_serve::server::{Server, ServerConfig, StoreConfig};
use tokio::runtime::Runtime;

const BLOCK: usize = 64;

struct Running {
    address: SocketAddr,
    server: Arc<Server>,
    _runtime: Runtime,
    folder: Arc<tempfile::TempDir>,
}

const LIMITS: Limits = Limits {
    kv_tokens: 16_384,
    context_tokens: support::CONTEXT,
    running_max: 4,
    waiting_max: 8,
};

fn start(store: bool, overlap: bool, limits: Limits) -> Running {
    let store = store.then_some(StoreConfig {
        host_bytes: 64 << 20,
        host_codec: HostCodec::Lossless,
        disk: None,
    });
    start_in(tempfile::tempdir().unwrap().into(), store, overlap, limits)
}

fn start_in(
    folder: Arc<tempfile::TempDir>,
    store: Option<StoreConfig>,
    overlap: bool,
    limits: Limits,
) -> Running {
    http::install_metrics();
    let server = Server::start(ServerConfig {
        model: support::write_model(folder.path(), "gpt-2"),
        store,
        overlap,
        limits,
    });
    let server = Arc::new(server.unwrap());
    let runtime = Runtime::new().unwrap();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = listener.local_addr().unwrap();
    let router = http::router(Arc::clone(&server));
    runtime.spawn(async move { axum::serve(listener, router).await });
    Running {
        address,
        server,
        _runtime: runtime,
        folder,
    }
}

impl Running {
    fn post(&self, path: &str, body: &Value) -> Answer {
        client::send(self.address, "POST", path, &body.to_string()).unwrap()
    }

    fn complete(&self, body: &Value) -> Value {
        let answer = self.post("/v1/completions", body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        serde_json::from_str(&answer.body).unwrap()
    }

    /// Every event of a stream, `[DONE]` left out.
    fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut events = Vec::new();
        let done = client::stream(self.address, path, body, |data| match data {
            "[DONE]" => ControlFlow::Break(()),
            data => {
                events.push(serde_json::from_str(data).unwrap());
                ControlFlow::Continue(())
            }
        });
        assert_eq!(done.unwrap(), Some(()), "the stream must end with [DONE]");
        events
    }

    /// Waits until `reached`; fails after ten seconds.
    fn wait_for(&self, what: &str, reached: impl Fn(Occupancy) -> bool) {
        let begun = Instant::now();
        loop {
            let occupancy = self.server.scheduler().occupancy();
            if reached(occupancy) {
                return;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "never {what}: {occupancy:?}"
            );
            std::thread::yield_now();
        }
    }

    fn wait_until_empty(&self) {
        self.wait_for("empty", |now| {
            now.running == 0 && now.waiting == 0 && now.pages_free == now.pages
        });
    }
}

/// A long prompt, another one for each seed.
fn prompt(seed: u64, tokens: usize) -> Vec<u32> {
    let mut random = support::Random(seed);
    (0..tokens).map(|_| random.below(256)).collect()
}

fn completion(prompt: &[u32], max_tokens: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "return_token_ids": true})
}

fn cached(answer: &Value) -> usize {
    let details = &answer["usage"]["prompt_tokens_details"];
    details["cached_tokens"].as_u64().unwrap() as usize
}

#[test]
fn a_streamed_answer_is_the_whole_one_in_pieces() {
    let running = start(true, true, LIMITS);
    let mut body = json!({
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        "max_tokens": 24,
        "return_token_ids": true,
    });
    let answer = running.post("/v1/chat/completions", &body);
    assert_eq!(answer.status, 200, "{}", answer.body);
    let whole: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!(whole["usage"]["completion_tokens"], 24);
    // `<start>` and `<end>` are one token each, everything else one a byte.
    let text = "^system\nYou are brief.$\n^user\nHello$\n^assistant\n";
    assert_eq!(whole["usage"]["prompt_tokens"], text.len());

    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let events = running.stream("/v1/chat/completions", &body);
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let pieces: String = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str())
        .collect();
    assert_eq!(pieces, whole["choices"][0]["message"]["content"]);
    let tokens: Vec<&Value> = events
        .iter()
        .filter_map(|event| event["choices"][0]["token_ids"].as_array())
        .flatten()
        .collect();
    let expected = whole["choices"][0]["token_ids"].as_array().unwrap();
    assert_eq!(tokens, expected.iter().collect::<Vec<_>>());
    let [.., last, usage] = &events[..] else {
        panic!("a stream has more than two events")
    };
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 24);
    running.wait_until_empty();
}

#[test]
fn reused_kv_gives_the_same_tokens_and_is_counted() {
    let cold = start(false, true, LIMITS);
    for overlap in [true, false] {
        let warm = start(true, overlap, LIMITS);
        for tokens in [BLOCK - 1, BLOCK, BLOCK + 1, 300, 5 * BLOCK] {
            let prompt = prompt(tokens as u64, tokens);
            let expected = cold.complete(&completion(&prompt, 40));
            assert_eq!(cached(&expected), 0);
            for round in 0..2 {
                let answer = warm.complete(&completion(&prompt, 40));
                assert_eq!(
                    answer["choices"][0]["token_ids"], expected["choices"][0]["token_ids"],
                    "{tokens} tokens, round {round}"
                );
                // The last token is always computed: its logits are needed.
                let whole_blocks = (tokens - 1) / BLOCK * BLOCK;
                assert_eq!(cached(&answer), if round == 0 { 0 } else { whole_blocks });
                warm.wait_until_empty();
            }
        }
    }
}

#[test]
fn a_server_that_was_restarted_brings_what_was_used_last_into_ram() {
    let prompt = prompt(5, 300);
    let mut folder = Arc::new(tempfile::tempdir().unwrap());
    for (warm_bytes, warmed) in [(0, 0), (64 << 20, 4)] {
        let disk = DiskConfig {
            warm_bytes,
            ..DiskConfig::new(folder.path().join("store"), 64 << 20)
        };
        let store = StoreConfig {
            host_bytes: 64 << 20,
            host_codec: HostCodec::Raw,
            disk: Some(disk),
        };
        let running = start_in(folder, Some(store), true, LIMITS);
        let cache = &running.server.scheduler().reuse().unwrap().cache;
        let begun = Instant::now();
        let stats = loop {
            let stats = cache.stats();
            if stats.disk.as_ref().unwrap().warming != Warming::UnderWay {
                break stats;
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "{stats:?}");
            std::thread::yield_now();
        };
        let counted = (stats.counter("warmed_blocks"), stats.index.host_blocks);
        assert_eq!(counted, (warmed, warmed));
        let answer = running.complete(&completion(&prompt, 1));
        assert_eq!(cached(&answer), BLOCK * warmed as usize);
        running.wait_until_empty();
        running.server.close().unwrap();
        folder = running.folder;
    }
}

#[test]
fn the_next_turn_reuses_what_was_generated() {
    let cold = start(false, true, LIMITS);
    let warm = start(true, true, LIMITS);
    let first = prompt(1, 100);
    let answer = warm.complete(&completion(&first, 2 * BLOCK));
    let generated: Vec<u32> =
        serde_json::from_value(answer["choices"][0]["token_ids"].clone()).unwrap();
    assert_eq!(generated.len(), 2 * BLOCK, "the model must not end early");
    warm.wait_until_empty();
    let next = [first, generated, prompt(2, 20)].concat();
    let answer = warm.complete(&completion(&next, 20));
    let expected = cold.complete(&completion(&next, 20));
    assert_eq!(
        answer["choices"][0]["token_ids"],
        expected["choices"][0]["token_ids"]
    );
    // The last generated token's KV was not computed.
    assert_eq!(cached(&answer), (100 + 2 * BLOCK - 1) / BLOCK * BLOCK);
}

#[test]
fn clients_at_once_get_what_each_gets_alone() {
    let alone = start(false, true, LIMITS);
    let together = start(true, true, LIMITS);
    let shared = prompt(3, 200);
    let requests: Vec<Value> = (0..8)
        .map(|i| {
            let prompt = [shared.clone(), prompt(10 + i, 30 + 20 * i as usize)].concat();
            let mut request = completion(&prompt, 30);
            request["temperature"] = json!(if i % 2 == 0 { 0.0 } else { 0.8 });
            request["seed"] = json!(i);
            request
        })
        .collect();
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let clients: Vec<_> = requests
            .iter()
            .map(|request| scope.spawn(|| together.complete(request)))
            .collect();
        clients.into_iter().map(|c| c.join().unwrap()).collect()
    });
    for (request, answer) in requests.iter().zip(&answers) {
        let expected = alone.complete(request);
        assert_eq!(
            answer["choices"][0]["token_ids"],
            expected["choices"][0]["token_ids"]
        );
    }
    together.wait_until_empty();
}

#[test]
fn an_answer_ends_before_its_stop_string() {
    let running = start(false, true, LIMITS);
    let prompt = prompt(4, 40);
    let whole = running.complete(&completion(&prompt, 60));
    let text = whole["choices"][0]["text"].as_str().unwrap();
    let from = text.char_indices().nth(10).unwrap().0;
    let stop: String = text[from..].chars().take(3).collect();
    let mut body = completion(&prompt, 60);
    body["stop"] = json!([stop]);
    let stopped = running.complete(&body);
    let before = &text[..text.find(&stop).unwrap()];
    assert_eq!(stopped["choices"][0]["text"], before);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    body["stream"] = json!(true);
    let pieces: String = running
        .stream("/v1/completions", &body)
        .iter()
        .filter_map(|event| event["choices"][0]["text"].as_str())
        .collect();
    assert_eq!(pieces, before);
}

#[test]
fn what_is_wrong_is_refused_in_words() {
    let running = start(false, true, LIMITS);
    let chat = |extra: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        let fields = body.as_object_mut().unwrap();
        fields.extend(extra.as_object().unwrap().clone());
        body.to_string()
    };
    let cases = [
        ("{".to_owned(), 400, "EOF"),
        ("{}".to_owned(), 400, "messages"),
        (chat(json!({"messages": []})), 400, "empty"),
        (
            chat(json!({"messages": [{"role": "nobody", "content": ""}]})),
            400,
            "template",
        ),
        (chat(json!({"model": "other"})), 404, "other"),
        (chat(json!({"n": 2})), 400, "n and best_of"),
        (chat(json!({"temperature": 3})), 400, "temperature"),
        (chat(json!({"top_p": 0})), 400, "top_p"),
        (chat(json!({"max_tokens": 0})), 400, "max_tokens"),
        (chat(json!({"max_tokens": 50_000})), 400, "context=8192"),
        (chat(json!({"stop": ["a", ""]})), 400, "stop"),
        (chat(json!({"tools": [{"type": "function"}]})), 400, "tools"),
        (chat(json!({"stream_options": {}})), 400, "stream_options"),
        (chat(json!({"logit_bias": {"7": 5}})), 400, "logit_bias"),
        (
            chat(json!({"presence_penalty": 1})),
            400,
            "presence_penalty",
        ),
        (
            chat(json!({"messages": [{"role": "user", "content": null}]})),
            400,
            "content must be a string",
        ),
        (" ".repeat(5 << 20), 413, "limit"),
    ];
    for (body, status, words) in cases {
        let shown = &body[..body.len().min(100)];
        let answer = client::send(running.address, "POST", "/v1/chat/completions", &body).unwrap();
        assert_eq!(answer.status, status, "{shown}: {}", answer.body);
        let error: Value = serde_json::from_str(&answer.body).unwrap();
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{shown}: {message}");
        assert_eq!(error["error"]["type"], "invalid_request_error");
    }
    for (prompt, words) in [
        (json!([1, 99_999]), "prompt has token 99999"),
        (
            json!([[1, 2]]),
            "prompt must be a string or a list of token ids",
        ),
    ] {
        let answer = running.post("/v1/completions", &json!({"prompt": prompt}));
        assert_eq!(answer.status, 400, "{}", answer.body);
        assert!(answer.body.contains(words), "{}", answer.body);
    }
    for (method, path, status) in [("GET", "/v1/completions", 405), ("POST", "/nowhere", 404)] {
        let answer = client::send(running.address, method, path, "").unwrap();
        assert_eq!(answer.status, status);
        assert!(answer.body.contains("\"error\""), "{}", answer.body);
    }
}

/// Clients' libraries send all fields that they know, unset.
#[test]
fn what_is_null_or_says_nothing_is_as_if_it_were_not_there() {
    let running = start(false, true, LIMITS);
    let mut body = completion(&prompt(12, 20), 3);
    let expected = running.complete(&body);
    for field in [
        "model",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "n",
        "best_of",
        "logprobs",
        "tools",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "suffix",
        "user",
    ] {
        body[field] = Value::Null;
    }
    let chosen = |answer: &Value| answer["choices"][0]["token_ids"].clone();
    assert_eq!(chosen(&running.complete(&body)), chosen(&expected));
    body["presence_penalty"] = json!(0);
    body["frequency_penalty"] = json!(0.0);
    body["logit_bias"] = json!({});
    body["stream"] = json!(false);
    assert_eq!(chosen(&running.complete(&body)), chosen(&expected));
    body["return_token_ids"] = Value::Null;
    assert_eq!(chosen(&running.complete(&body)), Value::Null);
}

#[test]
fn a_prompt_that_leaves_little_room_is_answered_where_no_length_is_asked_for() {
    let limits = Limits {
        kv_tokens: 64,
        ..LIMITS
    };
    let running = start(false, true, limits);
    let mut body = json!({"prompt": prompt(13, 60)});
    let answer = running.complete(&body);
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    let models = client::send(running.address, "GET", "/v1/models", "").unwrap();
    let models: Value = serde_json::from_str(&models.body).unwrap();
    assert_eq!(models["data"][0]["max_model_len"], 64);
    for (tokens, max_tokens) in [(60, json!(5)), (64, Value::Null)] {
        body = json!({"prompt": prompt(13, tokens), "max_tokens": max_tokens});
        let refused = running.post("/v1/completions", &body);
        assert_eq!(refused.status, 400, "{}", refused.body);
        assert!(refused.body.contains("context=64"), "{}", refused.body);
    }
}

#[test]
fn clients_that_go_away_leave_nothing_behind() {
    let running = start(
        true,
        true,
        Limits {
            running_max: 1,
            ..LIMITS
        },
    );
    let mut body = completion(&prompt(5, 200), 7000);
    body["stream"] = json!(true);
    // One goes away while it generates, with another one waiting behind it that goes away, too.
    client::stream(running.address, "/v1/completions", &body, |_| {
        let waits = std::thread::scope(|scope| {
            let gone = scope.spawn(|| {
                let connection = std::net::TcpStream::connect(running.address).unwrap();
                let text = body.to_string();
                use std::io::Write;
                write!(
                    &connection,
                    "POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n\
                     content-length: {}\r\n\r\n{text}",
                    text.len()
                )
                .unwrap();
                running.wait_for("waiting", |now| now.waiting == 1);
            });
            gone.join()
        });
        waits.unwrap();
        ControlFlow::Break(())
    })
    .unwrap();
    running.wait_until_empty();
    // And it still answers.
    running.complete(&completion(&prompt(6, 10), 3));
}

#[test]
fn too_many_requests_are_turned_away() {
    let running = start(
        false,
        true,
        Limits {
            running_max: 1,
            waiting_max: 1,
            ..LIMITS
        },
    );
    let mut body = completion(&prompt(7, 100), 8000);
    body["stream"] = json!(true);
    let (one, other) = (completion(&prompt(8, 10), 2), completion(&prompt(9, 10), 2));
    std::thread::scope(|scope| {
        // With one request in the model and one that waits, the third is refused.
        let waiting = client::stream(running.address, "/v1/completions", &body, |_| {
            let waiting = scope.spawn(|| running.complete(&one));
            running.wait_for("waiting", |now| now.waiting == 1);
            let refused = running.post("/v1/completions", &other);
            assert_eq!(refused.status, 429, "{}", refused.body);
            ControlFlow::Break(waiting)
        });
        // The first one has gone away: the second is answered.
        let answer = waiting.unwrap().unwrap().join().unwrap();
        assert_eq!(answer["usage"]["completion_tokens"], 2);
    });
    running.wait_until_empty();
}

#[test]
fn a_closed_server_answers_so() {
    let running = start(true, true, LIMITS);
    running.server.close().unwrap();
    let answer = running.post("/v1/completions", &completion(&prompt(1, 10), 2));
    assert_eq!(answer.status, 503, "{}", answer.body);
    assert!(answer.body.contains("the server is closing"));
    let health = client::send(running.address, "GET", "/health", "").unwrap();
    assert_eq!(health.status, 503, "{}", health.body);
    assert!(
        health.body.contains("\"status\":\"closed\""),
        "{}",
        health.body
    );
}

#[test]
fn models_health_and_metrics_are_told() {
    let running = start(true, true, LIMITS);
    let prompt = prompt(11, 100);
    running.complete(&completion(&prompt, 2));
    let get = |path: &str| client::send(running.address, "GET", path, "").unwrap();
    let models: Value = serde_json::from_str(&get("/v1/models").body).unwrap();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][0]["max_model_len"], support::CONTEXT);
    let health: Value = serde_json::from_str(&get("/health").body).unwrap();
    assert_eq!(health["status"], "ok");
    let token = 2 * 2 * support::LAYERS * support::KV_HEADS * support::HEAD_DIM;
    assert_eq!(health["kv_token_bytes"], token);
    let metrics = get("/metrics").body;
    for name in [
        "serve_time_to_first_token_seconds",
        "serve_pages_free",
        "stemkv_",
    ] {
        assert!(metrics.contains(name), "{name} is missing in {metrics}");
    }
}
