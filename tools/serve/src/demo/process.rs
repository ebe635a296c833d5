//! A server in a process of its own.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use stemkv_store::{Error, Result};

use super::client;

/// How long a server may take to start and to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running `stemkv-serve serve`.
pub(super) struct ServerProcess {
    child: Child,
    /// The server ends when this is closed, also when we crash.
    stdin: Option<ChildStdin>,
    pub(super) address: SocketAddr,
}

/// Which store a server has.
#[derive(Clone, Copy)]
pub(super) enum Store<'a> {
    None,
    Disk { folder: &'a Path, overlap: bool },
}

impl ServerProcess {
    /// Starts a server and waits until it is healthy.
    pub(super) fn start(model: &Path, store: Store<'_>) -> Result<ServerProcess> {
        let failed = |error: std::io::Error| {
            Error::unavailable("cannot start a server process").caused_by(error)
        };
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--until-stdin-ends"])
            .arg("--model")
            .arg(model)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        match store {
            Store::None => {
                command.arg("--no-store");
            }
            Store::Disk { folder, overlap } => {
                command.arg("--disk").arg(folder);
                if !overlap {
                    command.arg("--no-overlap");
                }
            }
        }
        let mut child = command.spawn().map_err(failed)?;
        let stdin = child.stdin.take();
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            let mut stdout = BufReader::new(stdout);
            stdout.read_line(&mut line).map_err(failed)?;
            // The rest is for people; read it, so that the server never waits for us.
            std::thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
        }
        let address = line.trim_end().strip_prefix("listening on http://");
        let Some(address) = address.and_then(|address| address.parse().ok()) else {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Error::unavailable(
                "the server did not start: see its message above",
            ));
        };
        let server = ServerProcess {
            child,
            stdin,
            address,
        };
        server.health()?;
        Ok(server)
    }

    /// What `/health` says.
    pub(super) fn health(&self) -> Result<Value> {
        let text = self.get("/health")?;
        serde_json::from_str(&text)
            .map_err(|error| Error::internal("the server's health cannot be read").caused_by(error))
    }

    /// A sum of seconds, bytes or counts out of `/metrics`, all labels together; 0 where it was
    /// never recorded.
    pub(super) fn metric(&self, name: &str) -> Result<f64> {
        let text = self.get("/metrics")?;
        Ok(text
            .lines()
            .filter_map(|line| line.strip_prefix(name))
            .filter(|rest| rest.starts_with([' ', '{']))
            .filter_map(|rest| rest.rsplit(' ').next()?.parse::<f64>().ok())
            .sum())
    }

    fn get(&self, path: &str) -> Result<String> {
        let answer = client::send(self.address, "GET", path, "")
            .map_err(|error| Error::unavailable("the server does not answer").caused_by(error))?;
        Ok(answer.body)
    }

    /// Stops the server in good order: everything is durable then.
    pub(super) fn stop(mut self) -> Result<()> {
        self.stdin = None;
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            match self.child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                _ => break,
            }
        }
        Err(Error::unavailable(
            "a server process did not stop in good order",
        ))
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // Both fail only where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
