//! The command line.

use std::io::{IsTerminal, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use stemkv::{DiskConfig, HostCodec};
use stemkv_store::{Error, Result};
use tokio::net::TcpListener;

use crate::demo::{self, DemoArgs};
use crate::http;
use crate::scheduler::Limits;
use crate::server::{Server, ServerConfig, StoreConfig};

/// How long a server that ends waits for clients: all answers have ended by then, but who sends a request has no
/// reason to, and who takes an answer may be slow.
const LAST_BYTES: Duration = Duration::from_secs(5);

/// A small OpenAI-compatible server on the CPU that reuses KV cache across requests and restarts.
#[derive(Parser)]
#[command(name = "stemkv-serve", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a model over HTTP.
    Serve(ServeArgs),
    /// Show what reuse does: one conversation without the store, from RAM, and from disk after a restart.
    Demo(DemoArgs),
}

/// `stemkv-serve serve`.
#[derive(Args)]
struct ServeArgs {
    /// A Llama-architecture GGUF file.
    #[arg(long)]
    model: PathBuf,
    /// Address and port; port 0 lets the system choose.
    #[arg(long, default_value = "127.0.0.1:8000")]
    listen: SocketAddr,
    /// Compute everything: no store.
    #[arg(long)]
    no_store: bool,
    /// Size of the store's host tier.
    #[arg(long, default_value = "1 GiB", value_parser = bytes)]
    host_bytes: u64,
    /// How KV is kept there: raw, lossless (more tokens in the same memory), or auto (lossless once it is full).
    #[arg(long, default_value = "auto", value_parser = host_codec)]
    host_codec: HostCodec,
    /// Folder of the store's disk tier; without it nothing survives a restart.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Bound on the real bytes in that folder.
    #[arg(long, default_value = "8 GiB", value_parser = bytes)]
    disk_bytes: u64,
    /// After the start, bring up to so many bytes of the prefixes that were used last from disk into the host
    /// tier, in the background; closing the server ends it.
    #[arg(long, default_value = "0", value_parser = bytes, requires = "disk")]
    warm_bytes: u64,
    /// Load all of a prefix before computing, instead of layer by layer beside it.
    #[arg(long)]
    no_overlap: bool,
    /// Tokens of KV in the engine's pages, all sequences together.
    #[arg(long, default_value_t = 32_768)]
    kv_tokens: usize,
    /// Tokens of one sequence, its answer included; at most what the model was trained for.
    #[arg(long, default_value_t = 8_192)]
    context_tokens: usize,
    /// Sequences in the model at once.
    #[arg(long, default_value_t = 8)]
    running_max: usize,
    /// Requests that may wait; more are answered 429.
    #[arg(long, default_value_t = 64)]
    waiting_max: usize,
    /// End when standard input does: for a parent process.
    #[arg(long, hide = true)]
    until_stdin_ends: bool,
}

impl ServeArgs {
    fn store(&self) -> Option<StoreConfig> {
        let disk = |path| DiskConfig {
            warm_bytes: self.warm_bytes,
            ..DiskConfig::new(path, self.disk_bytes)
        };
        (!self.no_store).then(|| StoreConfig {
            host_bytes: self.host_bytes,
            host_codec: self.host_codec,
            disk: self.disk.as_ref().map(disk),
        })
    }
}

fn bytes(text: &str) -> std::result::Result<u64, String> {
    stemkv::parse_bytes(text).ok_or_else(|| "must be a number of bytes, such as 8 GiB".to_owned())
}

fn host_codec(text: &str) -> std::result::Result<HostCodec, String> {
    match text {
        "auto" => Ok(HostCodec::Auto),
        "lossless" => Ok(HostCodec::Lossless),
        "raw" => Ok(HostCodec::Raw),
        _ => Err("must be auto, lossless or raw".to_owned()),
    }
}

/// Parses the command line and does what it says.
pub fn run() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // Would be told on standard error, and panic in whichever thread logs where nobody reads that.
        .log_internal_errors(false)
        .init();
    let done = match Cli::parse().command {
        Command::Serve(args) => serve(&args).map(|()| true),
        Command::Demo(args) => demo::run(&args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "stemkv-serve: {error:?}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &ServeArgs) -> Result<()> {
    http::install_metrics();
    let server = Arc::new(Server::start(ServerConfig {
        model: args.model.clone(),
        store: args.store(),
        overlap: !args.no_overlap,
        limits: Limits {
            kv_tokens: args.kv_tokens,
            context_tokens: args.context_tokens,
            running_max: args.running_max,
            waiting_max: args.waiting_max,
        },
    })?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::unavailable("cannot start a runtime").caused_by(error))?;
    runtime.block_on(async {
        let listener = TcpListener::bind(args.listen).await.map_err(|error| {
            Error::unavailable("cannot listen there: choose another --listen")
                .with("listen", args.listen)
                .caused_by(error)
        })?;
        let address = listener
            .local_addr()
            .map_err(|error| Error::unavailable("cannot listen").caused_by(error))?;
        announce(address);
        let (stopping, stopped) = tokio::sync::oneshot::channel();
        let stop = stop_signal(args.until_stdin_ends, Arc::clone(&server));
        let stop = async {
            stop.await;
            let _ = stopping.send(());
        };
        let served = axum::serve(listener, http::router(Arc::clone(&server)))
            .with_graceful_shutdown(stop)
            .into_future();
        let cut_off = async {
            match stopped.await {
                Ok(()) => tokio::time::sleep(LAST_BYTES).await,
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            served = served => {
                served.map_err(|error| Error::unavailable("the server failed").caused_by(error))
            }
            () = cut_off => {
                tracing::warn!("connections were cut off: their clients did not finish");
                Ok(())
            }
        }
    })?;
    server.close()
}

/// Whoever started this may have closed its standard output: not a reason to end.
fn announce(address: SocketAddr) {
    let mut out = std::io::stdout();
    let _ = writeln!(
        out,
        "listening on http://{address}\n\
         try: curl http://{address}/v1/chat/completions -H 'content-type: application/json' \
         -d '{{\"messages\": [{{\"role\": \"user\", \"content\": \"What is the capital of France?\"}}]}}'"
    );
    let _ = out.flush();
}

/// Resolves on ctrl-c, on SIGTERM, or at the end of standard input; requests under way end then. Told once
/// more, the process ends at once: the store need not be closed, and a disk that hangs holds that up.
async fn stop_signal(until_stdin_ends: bool, server: Arc<Server>) {
    tokio::select! {
        () = told_to_end() => {}
        () = stdin_ended(), if until_stdin_ends => {}
    }
    tokio::spawn(async {
        told_to_end().await;
        tracing::warn!("ending at once: what was not yet on disk is lost");
        std::process::exit(1);
    });
    // Streams end, so that the connections can.
    let closed = tokio::task::spawn_blocking(move || server.scheduler().close());
    if let Err(error) = closed.await {
        tracing::warn!(%error, "the scheduler did not close");
    }
}

async fn told_to_end() {
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminated() => {}
    }
}

/// A thread of its own waits: a read of standard input cannot be cancelled.
async fn stdin_ended() {
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = ended.send(());
    });
    let _ = end.await;
}

#[cfg(unix)]
async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut signal) => {
            signal.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}

#[cfg(not(unix))]
async fn terminated() {
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(options: &[&str]) -> std::result::Result<Option<StoreConfig>, clap::Error> {
        let command = ["stemkv-serve", "serve", "--model", "model.gguf"];
        match Cli::try_parse_from(command.iter().chain(options))?.command {
            Command::Serve(args) => Ok(args.store()),
            Command::Demo(_) => panic!("another command"),
        }
    }

    #[test]
    fn what_is_to_be_warmed_is_said_beside_the_disk_tier_it_comes_from() {
        let warm_bytes = |options: &[&str]| {
            let store = store(options).expect("valid").expect("a store");
            store
                .disk
                .map(|disk| (disk.capacity_bytes, disk.warm_bytes))
        };
        assert_eq!(warm_bytes(&[]), None);
        assert_eq!(warm_bytes(&["--disk", "kv"]), Some((8 << 30, 0)));
        let warm = [
            "--disk",
            "kv",
            "--disk-bytes",
            "2 GiB",
            "--warm-bytes",
            "1 GiB",
        ];
        assert_eq!(warm_bytes(&warm), Some((2 << 30, 1 << 30)));
        store(&["--warm-bytes", "1 GiB"]).expect_err("there is nothing to bring it from");
        assert!(store(&["--no-store"]).expect("valid").is_none());
    }
}
