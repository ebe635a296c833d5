//! Where SmolLM2 is, which no test downloads.

use std::io::Write as _;
use std::path::{Path, PathBuf};

/// The GGUF that `STEMKV_TEST_MODEL` names, or the one that `tools/fetch-model` (so `make demo`) has fetched.
pub fn find() -> Option<PathBuf> {
    let named = std::env::var_os("STEMKV_TEST_MODEL").map(PathBuf::from);
    named.or_else(|| fetched().filter(|path| path.is_file()))
}

/// As [`find`]; where there is none, says that `what` is skipped, also where the tests' output is captured.
#[allow(dead_code, reason = "benchmarks have their own words")]
pub fn or_skip(what: &str) -> Option<PathBuf> {
    let found = find();
    if found.is_none() {
        let how = "run tools/fetch-model, or name its GGUF with STEMKV_TEST_MODEL";
        let _ = writeln!(std::io::stderr(), "SKIPPED {what} on SmolLM2: {how}");
    }
    found
}

/// Where `tools/fetch-model` puts it.
fn fetched() -> Option<PathBuf> {
    let folder = |name: &str| {
        let value = std::env::var_os(name).filter(|value| !value.is_empty());
        value.map(PathBuf::from)
    };
    let caches = || folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    let cache = folder("STEMKV_CACHE").or_else(|| Some(caches()?.join("stemkv")))?;
    Some(cache.join(Path::new("models/SmolLM2-135M-Instruct.Q4_1.gguf")))
}
