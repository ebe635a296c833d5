//! `stemkv inspect`: what is in a store.

mod codecs;
mod path;
mod record;
mod whole;

pub(crate) use codecs::CodecTally;
pub(crate) use path::path;
pub(crate) use record::record;
use stemkv_store::{Error, RecordInfo};
pub(crate) use whole::store;

use crate::tree::Tree;
use crate::{Failure, text};

/// The one record whose key begins with these digits.
fn one<'a>(tree: &'a Tree, digits: &str) -> Result<&'a RecordInfo, Failure> {
    let too_short =
        || Error::invalid("a key is given by 4 to 64 of its leading hexadecimal digits");
    let found = tree.find(&text::key_digits(digits).ok_or_else(too_short)?);
    match found[..] {
        [one] => Ok(one),
        [] => Err(Failure::Nothing(format!("no record has the key {digits}"))),
        _ => Err(
            Error::invalid("several records have such a key: give more digits")
                .with("key", digits)
                .with("records", found.len())
                .into(),
        ),
    }
}
