//! `stemkv-serve demo`: one scripted conversation, three times. Several sessions share a long system
//! prompt and take turns: without the store, warm from RAM, and from disk after the process was
//! stopped and started again. Servers are real child processes, asked over HTTP.

pub mod client;
mod peer;
mod process;
mod report;
mod talk;
mod text;

pub use text::handbook;

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use stemkv_store::{Error, Result};

use crate::model::{Gguf, Message, Model, Tokenizer};
use process::{ServerProcess, Store};
use report::{Overlap, Report, Split, Turn};
use talk::Answered;

/// The shared prefix has at least this many tokens.
const PREFIX_TOKENS_MIN: usize = 2_048;
/// Hits that are measured with and without overlap, of each kind.
const OVERLAP_ROUNDS: usize = 3;

/// `stemkv-serve demo`.
#[derive(Args)]
pub(crate) struct DemoArgs {
    /// A Llama-architecture GGUF file with a chat template.
    #[arg(long)]
    model: PathBuf,
}

/// Runs the demo; `false` where an answer differed or nothing was reused.
pub(crate) fn run(args: &DemoArgs) -> Result<bool> {
    let folder = tempfile::tempdir().map_err(|error| {
        Error::unavailable("cannot make a folder for the store").caused_by(error)
    })?;
    let demo = Demo {
        model: &args.model,
        store: folder.path().join("store"),
        system: text::handbook(),
    };
    let report = demo.run()?;
    say(report.to_string())?;
    Ok(report.is_good())
}

struct Demo<'a> {
    model: &'a Path,
    store: PathBuf,
    system: String,
}

impl Demo<'_> {
    fn run(&self) -> Result<Report> {
        let mut gguf = Gguf::open(self.model)?;
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let prefix = tokenizer.render_chat(&[message("system", &self.system)])?;
        let prefix = tokenizer.encode(&prefix)?;
        if prefix.len() < PREFIX_TOKENS_MIN {
            return Err(Error::invalid(
                "this model's tokenizer makes the shared prefix too short for the demo",
            )
            .with("tokens", prefix.len()));
        }
        progress("the same cold prefill by candle's quantized_llama and by ours")?;
        let model = Model::load(&mut gguf, prefix.len())?;
        let peer = peer::prefills(&model, self.model, &prefix)?;
        drop(model);

        progress("without the store: every prompt is computed")?;
        let server = ServerProcess::start(self.model, Store::None)?;
        let cold = self.converse(|messages, _| talk::ask(&server, messages))?;
        server.stop()?;

        progress("with an empty store: the first conversation fills it")?;
        let server = self.server(true)?;
        let token_bytes = server.health()?["kv_token_bytes"].as_u64().unwrap_or(0);
        let filling = self.converse(|messages, _| talk::ask(&server, messages))?;
        progress("warm from RAM: the same conversation again")?;
        let ram = self.converse(|messages, _| talk::ask(&server, messages))?;
        server.stop()?;

        progress("from disk: the process is started anew before each request")?;
        let mut disk_blocks = 0.0;
        let disk = self.converse(|messages, _| {
            let server = self.server(true)?;
            let answered = talk::ask(&server, messages)?;
            disk_blocks += server.metric("serve_loaded_blocks_total{tier=\"disk\"}")?;
            server.stop()?;
            Ok(answered)
        })?;

        progress("overlap of load and compute, on and off")?;
        let on = self.overlap(true, &cold)?;
        let off = self.overlap(false, &cold)?;

        let turns = cold
            .into_iter()
            .zip(filling.iter().zip(ram.into_iter().zip(disk)))
            .map(|(cold, (filling, (ram, disk)))| Turn {
                equal: [filling, &ram, &disk]
                    .iter()
                    .all(|other| other.token_ids == cold.token_ids && other.text == cold.text),
                cold,
                ram,
                disk,
            })
            .collect();
        Ok(Report {
            turns,
            questions: text::SESSIONS[0].len(),
            prefix_tokens: prefix.len(),
            token_bytes,
            disk_blocks: disk_blocks as u64,
            on,
            off,
            peer,
        })
    }

    fn server(&self, overlap: bool) -> Result<ServerProcess> {
        let folder = &self.store;
        ServerProcess::start(self.model, Store::Disk { folder, overlap })
    }

    /// All sessions take turns; answers in the order of the questions: turn by turn, session by
    /// session.
    fn converse(
        &self,
        mut ask: impl FnMut(&[Message], usize) -> Result<Answered>,
    ) -> Result<Vec<Answered>> {
        let mut chats = text::SESSIONS.map(|_| vec![message("system", &self.system)]);
        let mut answers = Vec::new();
        for turn in 0..text::SESSIONS[0].len() {
            for (session, (chat, questions)) in chats.iter_mut().zip(text::SESSIONS).enumerate() {
                chat.push(message("user", questions[turn]));
                let answered = ask(chat, session)?;
                say(format!(
                    "  session {} turn {}: first token after {:>6.0} ms, {} of {} prompt tokens reused\n",
                    session + 1,
                    turn + 1,
                    answered.first_token.as_secs_f64() * 1e3,
                    answered.cached_tokens,
                    answered.prompt_tokens,
                ))?;
                chat.push(message("assistant", &answered.text));
                answers.push(answered);
            }
        }
        Ok(answers)
    }

    /// The first question again and again, each time by a fresh process: once from disk, once from
    /// RAM.
    fn overlap(&self, overlap: bool, cold: &[Answered]) -> Result<Overlap> {
        let chat = [
            message("system", &self.system),
            message("user", text::SESSIONS[0][0]),
        ];
        let mut rounds = Overlap {
            disk: Vec::new(),
            ram: Vec::new(),
            equal: true,
        };
        for _ in 0..OVERLAP_ROUNDS {
            let server = self.server(overlap)?;
            for from_disk in [true, false] {
                let before = Spent::read(&server)?;
                let answered = talk::ask(&server, &chat)?;
                let spent = Spent::read(&server)?;
                rounds.equal &= answered.token_ids == cold[0].token_ids;
                let split = Split {
                    first_token: answered.first_token.as_secs_f64(),
                    load: spent.load - before.load,
                    compute: (spent.pass - before.pass) - (spent.waited - before.waited),
                };
                if from_disk {
                    rounds.disk.push(split);
                } else {
                    rounds.ram.push(split);
                }
            }
            server.stop()?;
        }
        Ok(rounds)
    }
}

/// Seconds that a server has spent so far.
struct Spent {
    load: f64,
    pass: f64,
    waited: f64,
}

impl Spent {
    fn read(server: &ServerProcess) -> Result<Spent> {
        Ok(Spent {
            load: server.metric("serve_load_seconds_sum")?,
            pass: server.metric("serve_prefill_pass_seconds_sum")?,
            waited: server.metric("serve_load_wait_seconds_sum")?,
        })
    }
}

fn message(role: &str, content: &str) -> Message {
    Message {
        role: role.to_owned(),
        content: content.to_owned(),
    }
}

fn progress(what: &str) -> Result<()> {
    say(format!("{what} …\n"))
}

/// Nobody is told any more where this fails: no reason to go on.
fn say(text: String) -> Result<()> {
    let mut out = std::io::stdout();
    let said = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    said.map_err(|error| Error::unavailable("cannot write to standard output").caused_by(error))
}
