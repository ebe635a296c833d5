//! `stemkv-serve` as a process: what its clients and whoever started it may do to it.

#![allow(missing_docs, clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stemkv_serve::demo::client;

/// Far longer than anything takes that ends at all.
const LONG: Duration = Duration::from_secs(60);

struct Serving {
    child: Child,
    /// The server ends with this test, however that ends.
    _stdin: Option<ChildStdin>,
    address: SocketAddr,
}

impl Serving {
    /// It logs everything, and nobody reads that.
    fn start(folder: &Path) -> Serving {
        let mut child = Command::new(env!("CARGO_BIN_EXE_stemkv-serve"))
            .args(["serve", "--listen", "127.0.0.1:0", "--until-stdin-ends"])
            .args(["--host-bytes", "64 MiB"])
            .arg("--model")
            .arg(support::write_model(folder, "gpt-2"))
            .arg("--disk")
            .arg(folder.join("store"))
            .env("RUST_LOG", "trace")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stderr.take());
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("listening on http://");
        let address = address.expect("it starts").parse().unwrap();
        Serving {
            _stdin: child.stdin.take(),
            child,
            address,
        }
    }

    fn tell(&self, signal: i32) {
        // SAFETY: the child has not been waited for, so the number is its.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    fn status(mut self) -> ExitStatus {
        let (tell, told) = mpsc::channel();
        let pid = self.child.id() as i32;
        std::thread::spawn(move || tell.send(self.child.wait().unwrap()));
        told.recv_timeout(LONG).unwrap_or_else(|_| {
            // SAFETY: it was waited for until now, and did not end.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            panic!("the server does not end");
        })
    }

    fn complete(&self) {
        let body = json!({"prompt": vec![7; 200], "max_tokens": 2}).to_string();
        let answer = client::send(self.address, "POST", "/v1/completions", &body).unwrap();
        assert_eq!(answer.status, 200, "{}", answer.body);
        let answer: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!(answer["usage"]["completion_tokens"], 2);
    }

    /// A connection on which so much was sent and, where it is asked for, the server waits for more.
    fn begun(&self, sent: &str, answer: &str) -> TcpStream {
        let mut connection = TcpStream::connect(self.address).unwrap();
        connection.write_all(sent.as_bytes()).unwrap();
        let mut come = vec![0; answer.len()];
        connection.read_exact(&mut come).unwrap();
        assert_eq!(String::from_utf8_lossy(&come), answer);
        connection
    }
}

#[test]
fn clients_that_never_finish_a_request_do_not_keep_it_from_ending() {
    let folder = tempfile::tempdir().unwrap();
    let serving = Serving::start(folder.path());
    let idle = serving.begun("", "");
    let head = serving.begun("POST /v1/completions HTTP/1.1\r\nhost: he", "");
    let body = serving.begun(
        "POST /v1/completions HTTP/1.1\r\nhost: here\r\nexpect: 100-continue\r\ncontent-length: 100\r\n\r\n",
        "HTTP/1.1 100 Continue\r\n\r\n",
    );
    // Behind them, so that they were taken.
    serving.complete();
    serving.tell(libc::SIGTERM);
    assert!(serving.status().success());
    drop((idle, head, body));
    // And what was answered before is durable.
    let serving = Serving::start(folder.path());
    let text = client::send(serving.address, "GET", "/health", "")
        .unwrap()
        .body;
    let health: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(health["store"]["index"]["disk_blocks"], 3, "{health}");
    serving.tell(libc::SIGINT);
    assert!(serving.status().success());
}

#[test]
fn who_tells_it_twice_does_not_wait_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let serving = Serving::start(folder.path());
    // Would keep it for seconds.
    let head = serving.begun("POST /v1/completions HTTP/1.1\r\nhost: he", "");
    serving.complete();
    serving.tell(libc::SIGINT);
    // It was heard once nobody is taken any more.
    let begun = Instant::now();
    while TcpStream::connect(serving.address).is_ok() {
        assert!(begun.elapsed() < LONG);
        std::thread::yield_now();
    }
    serving.tell(libc::SIGINT);
    assert_eq!(serving.status().code(), Some(1));
    drop(head);
    // What was closed like that opens.
    let serving = Serving::start(folder.path());
    serving.complete();
    serving.tell(libc::SIGTERM);
    assert!(serving.status().success());
}

#[test]
fn a_demo_that_nobody_watches_ends_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = Command::new(env!("CARGO_BIN_EXE_stemkv-serve"))
        .args(["demo", "--model"])
        .arg(support::write_model(folder.path(), "gpt-2"))
        .stdout(writer)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot write"), "{said}");
}
