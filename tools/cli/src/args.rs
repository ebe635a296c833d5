//! The command line itself.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

const EXITS: &str = "Exit codes:
  0  fine
  1  problems were found, or not everything matched
  2  wrong usage
  3  the store cannot be opened, or fails
A closed pipe (| head) is no error.";

/// Looks into stemkv stores and cleans them.
#[derive(Parser)]
#[command(name = "stemkv", version, after_help = EXITS)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Shows what is in a store: namespaces, bytes, the tree's shape, heat
    ///
    /// Works on a closed store, beside the process that has it open, and on a broken one as far as
    /// it can be decoded. Changes nothing.
    #[command(after_help = "Examples:
  stemkv inspect /var/cache/stemkv
  stemkv inspect /var/cache/stemkv --prefix 3fb2a1c0     the blocks up to that one
  stemkv inspect /var/cache/stemkv --record 3fb2a1c0 --json")]
    Inspect(Inspect),
    /// Tells how far a prompt matches, and what ended the match
    ///
    /// The blocks that match are read and verified. Without --namespace all namespaces are tried,
    /// and the one that matches furthest is shown.
    #[command(after_help = "Examples:
  stemkv why /var/cache/stemkv --tokens 504,3575,282,4649
  stemkv why /var/cache/stemkv --tokens @ids.json --namespace SmolLM2
  stemkv why /var/cache/stemkv --text @prompt.txt --tokenizer tokenizer.json --namespace @namespace.toml")]
    Why(Why),
    /// Reads and re-checks every record
    ///
    /// Changes nothing: `compact` drops what does not verify. Progress goes to standard error.
    #[command(after_help = "Example:
  stemkv verify /var/cache/stemkv --limit-mb-s 200")]
    Verify(Verify),
    /// Gives space back and drops what does not verify
    ///
    /// Shows what it would do unless --yes is given. Refused while a process has the store open.
    #[command(after_help = "Examples:
  stemkv compact /var/cache/stemkv                         what would be done
  stemkv compact /var/cache/stemkv --free \"10 GiB\" --yes   evicts the coldest records too")]
    Compact(Compact),
    /// Shows where the bytes are, and what the process that uses the store counted
    ///
    /// Counters and latencies are those of that process's last flush or close.
    #[command(after_help = "Example:
  stemkv stats /var/cache/stemkv --json")]
    Stats(Stats),
    /// Lists what opening with `disk.warm_bytes` would bring into RAM, in its order
    ///
    /// Warms nothing itself: RAM is the process's that opens the store, which does it in the background where
    /// `disk.warm_bytes` says so (`stemkv-serve serve --warm-bytes`), and ends it on `Cache::stop_warming` or
    /// when it closes. Room in RAM may end it sooner. Nothing is read but the index.
    #[command(after_help = "Example:
  stemkv warm /var/cache/stemkv --bytes \"10 GiB\"")]
    Warm(Warm),
}

#[derive(Args)]
pub(crate) struct Common {
    /// The store's folder
    pub(crate) path: PathBuf,
    /// Answers as JSON, with hashes in full
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct Inspect {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Shows the blocks of the prefix that ends in this one (its key, or 4 digits of it and more)
    #[arg(long, value_name = "KEY", conflicts_with = "record")]
    pub(crate) prefix: Option<String>,
    /// Reads this record and shows its header
    #[arg(long, value_name = "KEY")]
    pub(crate) record: Option<String>,
}

#[derive(Args)]
pub(crate) struct Why {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(flatten)]
    pub(crate) prompt: Prompt,
    /// The engine's tokenizer.json, for --text. No special tokens are added
    #[arg(long, value_name = "FILE", requires = "text")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// A namespace of the store, by its root's first digits or part of its model's name; or a TOML
    /// file with all its fields (salt included), as @FILE
    #[arg(long, value_name = "NAME|@FILE")]
    pub(crate) namespace: Option<String>,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Prompt {
    /// The prompt as text, or @FILE
    #[arg(long, value_name = "TEXT|@FILE", requires = "tokenizer")]
    pub(crate) text: Option<String>,
    /// The prompt as token ids, or @FILE (a list or a JSON array)
    #[arg(long, value_name = "IDS|@FILE")]
    pub(crate) tokens: Option<String>,
    /// The prompt as sequence hashes, one a block, or @FILE
    #[arg(long, value_name = "HEX|@FILE")]
    pub(crate) hashes: Option<String>,
}

#[derive(Args)]
pub(crate) struct Verify {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Reads at most this many MB (1,000,000 B) a second
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) limit_mb_s: Option<u64>,
}

#[derive(Args)]
pub(crate) struct Compact {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Gives back at least this much ("10 GiB"): where it must, gives up files that could not be read, and
    /// then evicts the coldest records
    #[arg(long, value_name = "BYTES", value_parser = size, default_value = "0")]
    pub(crate) free: u64,
    /// Does it
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Args)]
pub(crate) struct Stats {
    #[command(flatten)]
    pub(crate) common: Common,
}

#[derive(Args)]
pub(crate) struct Warm {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Up to so many bytes of records ("10 GiB")
    #[arg(long, value_name = "BYTES", value_parser = size)]
    pub(crate) bytes: u64,
}

fn size(text: &str) -> Result<u64, String> {
    stemkv::parse_bytes(text)
        .ok_or_else(|| "write a whole number of bytes, or one with KiB, MiB, GiB or TiB".into())
}
