//! What `why` is asked about, from arguments and files.

use std::path::Path;

use stemkv::Namespace;
use stemkv_store::{Error, Key, Result};

use crate::why::{Question, Whose};

/// The text itself, or the file behind an `@`.
fn text_or_file(argument: &str) -> Result<String> {
    let Some(path) = argument.strip_prefix('@') else {
        return Ok(argument.to_owned());
    };
    std::fs::read_to_string(path).map_err(|error| {
        Error::invalid("cannot read the file behind @")
            .with("path", path)
            .caused_by(error)
    })
}

/// Items between commas, white space and brackets, so that a JSON array is a list too.
fn items(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c == ',' || c.is_whitespace() || "[]\"".contains(c))
        .filter(|item| !item.is_empty())
}

pub(crate) fn tokens(argument: &str) -> Result<Question> {
    let text = text_or_file(argument)?;
    let tokens = items(&text).map(|item| {
        item.parse().map_err(|_| {
            Error::invalid("a token id is a whole number below 2^32").with("found", item)
        })
    });
    Ok(Question::Tokens(tokens.collect::<Result<_>>()?))
}

pub(crate) fn hashes(argument: &str) -> Result<Question> {
    let text = text_or_file(argument)?;
    let keys = items(&text).map(|item| {
        Key::from_hex(item).ok_or_else(|| {
            Error::invalid("a sequence hash has 64 hexadecimal digits").with("found", item)
        })
    });
    Ok(Question::Hashes(keys.collect::<Result<_>>()?))
}

/// Tokenizes as the serving process must have done: special tokens that are written out are
/// recognised, none are added.
pub(crate) fn text(argument: &str, tokenizer: &Path) -> Result<Question> {
    let text = text_or_file(argument)?;
    let failed = |error| {
        Error::invalid("the tokenizer failed: give the engine's own tokenizer.json")
            .with("path", tokenizer.display())
            .with("cause", error)
    };
    let tokenizer = tokenizers::Tokenizer::from_file(tokenizer).map_err(failed)?;
    let encoding = tokenizer.encode_fast(text, false).map_err(failed)?;
    Ok(Question::Tokens(encoding.get_ids().to_vec()))
}

pub(crate) fn whose(argument: Option<&str>) -> Result<Whose> {
    match argument {
        None => Ok(Whose::Any),
        Some(file) if file.starts_with('@') => {
            let namespace: Namespace = toml::from_str(&text_or_file(file)?).map_err(|error| {
                Error::invalid(error.to_string().trim_end().to_owned()).with("path", &file[1..])
            })?;
            namespace.validate()?;
            Ok(Whose::Exactly(Box::new(namespace)))
        }
        Some(name) => Ok(Whose::Named(name.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_and_hashes_are_read_from_lists_json_and_files() {
        let dir = tempfile::tempdir().expect("tempdir");
        let file = dir.path().join("ids");
        std::fs::write(&file, "[1, 2,\n3]\n").expect("written");
        for argument in ["1,2,3", "1 2 3", "[1,2,3]", &format!("@{}", file.display())] {
            match tokens(argument).expect("a list") {
                Question::Tokens(found) => assert_eq!(found, [1, 2, 3], "{argument}"),
                Question::Hashes(_) => panic!("tokens were asked for"),
            }
        }
        let hex = "0f".repeat(32);
        match hashes(&format!("[\"{hex}\"]")).expect("a list") {
            Question::Hashes(found) => assert_eq!(found, [Key([0x0f; 32])]),
            Question::Tokens(_) => panic!("hashes were asked for"),
        }
        for wrong in [
            tokens("1,x"),
            tokens("-1"),
            hashes("0f"),
            tokens("@/no/such/file"),
        ] {
            let error = wrong.err().expect("refused");
            assert_eq!(error.kind(), stemkv::ErrorKind::Invalid, "{error}");
        }
    }
}
