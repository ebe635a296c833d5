//! `stemkv`: looks into stores and cleans them. Everything is in the library.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let (mut out, mut err) = (std::io::stdout().lock(), std::io::stderr());
    stemkv_cli::run(std::env::args_os(), &mut out, &mut err).into()
}
