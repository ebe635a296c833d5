//! The command line of stemkv, as a library: `main` has nothing but a call of [`run`].
//!
//! Rules of all commands but `compact`: never change the store, show as much of a broken one as can
//! be decoded, and throw nothing away silently: what is left out is counted. A command makes a
//! report from a [`Store`]; a report is shown as tables or as JSON, and knows its [`Exit`].
//!
//! | file | question |
//! |---|---|
//! | `args.rs` | what may be asked? |
//! | `open.rs`, `salvage.rs` | how is a store opened, as far as it opens? |
//! | `store.rs`, `tree.rs`, `read.rs` | what is in it? |
//! | `inspect/`, `why.rs`, `verify.rs`, `compact.rs`, `stats.rs`, `warm.rs` | one command each |
//! | `prompt.rs` | what is `why` asked about? |
//! | `text.rs` | how do numbers and tables look? |

#![forbid(unsafe_code)]

mod args;
mod compact;
mod inspect;
mod open;
mod prompt;
mod read;
mod salvage;
mod stats;
mod store;
mod text;
mod tree;
mod verify;
mod warm;
mod why;

use std::ffi::OsString;
use std::io::{self, ErrorKind as IoErrorKind, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser as _;
use serde::Serialize;
use stemkv_store::{Clock, Error, ErrorKind, SystemClock};

pub use open::{for_reading, for_writing};
pub use store::{Access, Store};
pub use verify::Progress;

use args::{Arguments, Command};

/// How a command ended: the process's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Fine.
    Fine = 0,
    /// Problems were found, or not everything matched.
    Problems = 1,
    /// Wrong usage.
    Usage = 2,
    /// The store cannot be opened, or fails.
    CannotOpen = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// What a command found out.
trait Report {
    fn exit(&self) -> Exit;

    /// Writes it for people.
    fn show(&self, out: &mut dyn Write) -> io::Result<()>;
}

enum Failure {
    /// What was asked for is not there.
    Nothing(String),
    Store(Error),
    Write(io::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Store(error)
    }
}

/// Runs a command line, the program's name first. Answers go to `out`, progress and errors to `err`.
pub fn run(
    arguments: impl IntoIterator<Item = OsString>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Exit {
    run_at(arguments, out, err, Arc::new(SystemClock::default()))
}

/// [`run`] at the time of another clock.
pub fn run_at(
    arguments: impl IntoIterator<Item = OsString>,
    out: &mut dyn Write,
    err: &mut dyn Write,
    clock: Arc<dyn Clock>,
) -> Exit {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(message) => {
            // Help and version are answers too, and what cannot be told is told to nobody.
            let _ = match message.use_stderr() {
                true => write!(err, "{message}"),
                false => write!(out, "{message}"),
            };
            return if message.use_stderr() {
                Exit::Usage
            } else {
                Exit::Fine
            };
        }
    };
    match answer(&arguments.command, out, err, clock) {
        Ok(exit) => exit,
        // Whoever reads has read enough.
        Err(Failure::Write(error)) if error.kind() == IoErrorKind::BrokenPipe => Exit::Fine,
        Err(Failure::Write(error)) => {
            let _ = writeln!(err, "stemkv: cannot write the answer: {error}");
            Exit::CannotOpen
        }
        Err(Failure::Nothing(what)) => {
            let _ = writeln!(err, "stemkv: {what}");
            Exit::Problems
        }
        Err(Failure::Store(error)) => {
            let _ = writeln!(err, "stemkv: {error:?}");
            match error.kind() {
                ErrorKind::Invalid => Exit::Usage,
                _ => Exit::CannotOpen,
            }
        }
    }
}

fn answer(
    command: &Command,
    out: &mut dyn Write,
    err: &mut dyn Write,
    clock: Arc<dyn Clock>,
) -> Result<Exit, Failure> {
    match command {
        Command::Inspect(args) => {
            let store = open_store(&args.common, &clock)?;
            match (&args.prefix, &args.record) {
                (Some(key), _) => finish(&inspect::path(&store, key)?, &args.common, out),
                (None, Some(key)) => finish(&inspect::record(&store, key)?, &args.common, out),
                (None, None) => finish(&inspect::store(&store)?, &args.common, out),
            }
        }
        Command::Why(args) => {
            let question = match &args.prompt {
                args::Prompt {
                    tokens: Some(tokens),
                    ..
                } => prompt::tokens(tokens)?,
                args::Prompt {
                    hashes: Some(hashes),
                    ..
                } => prompt::hashes(hashes)?,
                args::Prompt { text, .. } => {
                    let given = text.as_ref().zip(args.tokenizer.as_ref());
                    let (text, tokenizer) =
                        given.ok_or_else(|| Error::invalid("--text needs --tokenizer"))?;
                    prompt::text(text, tokenizer)?
                }
            };
            let whose = prompt::whose(args.namespace.as_deref())?;
            let store = open_store(&args.common, &clock)?;
            finish(&why::why(&store, &question, &whose)?, &args.common, out)
        }
        Command::Verify(args) => {
            let store = open_store(&args.common, &clock)?;
            let limit = args.limit_mb_s.map(|mb| mb * 1_000_000);
            let mut progress = progress_lines(err, &*clock);
            let verification = verify::verify(&store, limit, &mut progress)?;
            finish(&verification, &args.common, out)
        }
        Command::Compact(args) => {
            open::refuse_held(&args.common.path)?;
            let store = match args.yes {
                true => open::for_writing(&args.common.path, clock.clone()).map_err(cannot_open)?,
                false => open_store(&args.common, &clock)?,
            };
            let mut progress = progress_lines(err, &*clock);
            let compaction = compact::compact(&store, args.free, !args.yes, &mut progress)?;
            finish(&compaction, &args.common, out)
        }
        Command::Stats(args) => {
            let store = open_store(&args.common, &clock)?;
            finish(&stats::stats(&store)?, &args.common, out)
        }
        Command::Warm(args) => {
            let store = open_store(&args.common, &clock)?;
            finish(&warm::warm(&store, args.bytes)?, &args.common, out)
        }
    }
}

fn open_store(common: &args::Common, clock: &Arc<dyn Clock>) -> Result<Store, Failure> {
    open::for_reading(&common.path, clock.clone()).map_err(cannot_open)
}

fn cannot_open(error: Error) -> Failure {
    Failure::Store(match error.kind() {
        // A store of another version is no wrong usage.
        ErrorKind::Invalid => Error::unavailable("the store cannot be opened").caused_by(error),
        _ => error,
    })
}

fn finish(
    report: &(impl Report + Serialize),
    common: &args::Common,
    out: &mut dyn Write,
) -> Result<Exit, Failure> {
    let written = match common.json {
        true => serde_json::to_writer_pretty(&mut *out, report)
            .map_err(io::Error::from)
            .and_then(|()| writeln!(out)),
        false => report.show(out),
    };
    written.and_then(|()| out.flush()).map_err(Failure::Write)?;
    Ok(report.exit())
}

/// A line of progress every few seconds, the first after the first of them.
fn progress_lines<'a>(err: &'a mut dyn Write, clock: &'a dyn Clock) -> impl FnMut(Progress) + 'a {
    const EVERY: Duration = Duration::from_secs(2);
    let begun = clock.now();
    let mut told = begun;
    move |progress| {
        let now = clock.now();
        if now.saturating_sub(told) < EVERY {
            return;
        }
        told = now;
        let seconds = now.saturating_sub(begun).as_secs_f64();
        let rate = progress.bytes as f64 / seconds;
        // Nobody listening is no reason to stop.
        let _ = writeln!(
            err,
            "{} of {} records, {}, {}/s, {} corrupt",
            text::count(progress.records),
            text::count(progress.of_records),
            text::bytes(progress.bytes),
            text::bytes(rate as u64),
            text::count(progress.corrupt),
        );
    }
}
