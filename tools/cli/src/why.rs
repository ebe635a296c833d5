//! `stemkv why`: how far a prompt matches, and what ended the match.

use std::io::{self, Write};

use serde::Serialize;
use stemkv::{HashPath, Namespace, Prompt};
use stemkv_store::{Error, ErrorKind, Key, Result};

use crate::read::Reader;
use crate::store::{Metas, Store};
use crate::text::{self, field};
use crate::tree::Tree;
use crate::{Exit, Report};

/// What is asked about.
pub(crate) enum Question {
    /// Token ids.
    Tokens(Vec<u32>),
    /// Sequence hashes, each the child of the one before it.
    Hashes(Vec<Key>),
}

/// Whose prompt it is.
pub(crate) enum Whose {
    /// All namespaces are tried.
    Any,
    /// The one whose root begins with this, or whose model contains it.
    Named(String),
    /// All fields, read from a file.
    Exactly(Box<Namespace>),
}

/// The answer.
#[derive(Debug, Serialize)]
pub struct Answer {
    path: String,
    namespace: String,
    name: String,
    /// Tokens of the prompt; of hashes, as many as their blocks have.
    tokens: u64,
    /// Tokens behind the last full block: never stored, always computed.
    tail_tokens: u64,
    blocks: u64,
    matched_blocks: u64,
    matched_tokens: u64,
    reason: Reason,
    /// Other namespaces in which the same tokens match further.
    other_namespaces: Vec<Other>,
}

/// What ended the match.
#[derive(Debug, Serialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
enum Reason {
    /// Every full block matched.
    Complete,
    /// The prompt has no full block.
    TooShort,
    /// The block is not there.
    Missing {
        block: u64,
        key: String,
        /// What speaks for one cause or the other.
        evidence: Vec<String>,
    },
    /// The block is not there, but blocks behind it are: it was stored, and was lost since.
    Lost {
        block: u64,
        key: String,
        later_blocks: u64,
    },
    /// The same tokens match further in another namespace: a field of the namespace differs.
    OtherNamespace { block: u64, key: String },
    /// The block is there and does not verify.
    Corrupt {
        block: u64,
        key: String,
        error: String,
    },
    /// The block is there and could not be read.
    Unreadable {
        block: u64,
        key: String,
        error: String,
    },
}

#[derive(Debug, Serialize)]
struct Other {
    namespace: String,
    name: String,
    matched_blocks: u64,
    matched_tokens: u64,
    /// `field: "a" here, "b" there`: here is what was asked for.
    difference: Vec<String>,
}

/// Leading keys that have a record of the right parent.
fn matched(tree: &Tree, root: &Key, keys: &[Key]) -> usize {
    let mut parent = *root;
    for (i, key) in keys.iter().enumerate() {
        match tree.get(key) {
            Some(found) if found.namespace == *root && found.parent == parent => parent = *key,
            _ => return i,
        }
    }
    keys.len()
}

/// Reads the first `blocks` blocks; the first that does not come, and why.
fn first_bad(store: &Store, tree: &Tree, keys: &[Key]) -> Result<Option<(usize, Reason)>> {
    let records: Vec<_> = keys.iter().filter_map(|key| tree.get(key)).collect();
    if records.is_empty() {
        return Ok(None);
    }
    let reader = Reader::new(&*store.tier, &store.geometry)?;
    let mut done = 0;
    let mut bad: Option<(usize, Key, Error)> = None;
    while done < records.len() && bad.is_none() {
        let batch = reader.batch_of(&records[done..]);
        let first = done;
        done += batch.records.len();
        // Answers come in any order: what counts is the first block of the prompt.
        reader.read(batch, &mut |i, record, answer| {
            if let Err(error) = answer
                && bad.as_ref().is_none_or(|(block, ..)| first + i < *block)
            {
                bad = Some((first + i, record.key, error));
            }
        });
    }
    Ok(bad.map(|(block, key, error)| {
        let (number, key, text) = (block as u64, key.to_hex(), error.to_string());
        let reason = match error.kind() {
            ErrorKind::Corrupt => Reason::Corrupt {
                block: number,
                key,
                error: text,
            },
            _ => Reason::Unreadable {
                block: number,
                key,
                error: text,
            },
        };
        (block, reason)
    }))
}

struct Candidate {
    root: Key,
    keys: Vec<Key>,
    matched: usize,
}

pub(crate) fn why(store: &Store, question: &Question, whose: &Whose) -> Result<Answer> {
    let (tree, _) = store.tree()?;
    let metas = store.metas();
    let block_tokens = u64::from(store.geometry.block_tokens);
    let mut roots: Vec<Key> = metas.namespaces.keys().copied().collect();
    roots.extend(tree.records.iter().map(|record| record.namespace));
    roots.sort_unstable();
    roots.dedup();

    let candidate = |root: Key| {
        let keys = match question {
            Question::Hashes(keys) => keys.clone(),
            Question::Tokens(tokens) => {
                let mut prompt = Prompt::tokens(root, store.geometry.block_tokens, tokens);
                prompt.hash_to(usize::MAX);
                prompt.hashed().to_vec()
            }
        };
        let matched = matched(&tree, &root, &keys);
        Candidate {
            root,
            keys,
            matched,
        }
    };
    let mut others: Vec<Candidate> = roots.iter().copied().map(candidate).collect();
    others.sort_by_key(|candidate| std::cmp::Reverse(candidate.matched));
    let here = match whose {
        Whose::Exactly(namespace) => candidate(namespace.root()),
        Whose::Named(text) => candidate(named(&metas, &roots, text)?),
        // The one that matches furthest; of a store without any, a root that nobody has.
        Whose::Any => candidate(others.first().map_or(Key::ZERO, |best| best.root)),
    };
    let description = match whose {
        Whose::Exactly(namespace) => Some(namespace.describe()),
        _ => metas.namespaces.get(&here.root).cloned(),
    };

    let bad = first_bad(store, &tree, &here.keys[..here.matched])?;
    let matched = bad.as_ref().map_or(here.matched, |(block, _)| *block);
    let further = others
        .iter()
        .filter(|other| other.root != here.root && other.matched > here.matched);
    let other_namespaces: Vec<Other> = further
        .map(|other| Other {
            namespace: other.root.to_hex(),
            name: metas.name(&other.root),
            matched_blocks: other.matched as u64,
            matched_tokens: other.matched as u64 * block_tokens,
            difference: match (&description, metas.namespaces.get(&other.root)) {
                (Some(here), Some(there)) => here.difference(there),
                _ => vec!["one of the two is not described in this store".into()],
            },
        })
        .collect();
    let reason = match bad {
        Some((_, reason)) => reason,
        None if here.keys.is_empty() => Reason::TooShort,
        None if matched == here.keys.len() => Reason::Complete,
        None => {
            let (block, key) = (matched as u64, here.keys[matched].to_hex());
            let later = here.keys[matched + 1..].iter();
            let later_blocks = later.filter(|key| tree.get(key).is_some()).count() as u64;
            match (later_blocks, other_namespaces.is_empty()) {
                (1.., _) => Reason::Lost {
                    block,
                    key,
                    later_blocks,
                },
                (0, false) => Reason::OtherNamespace { block, key },
                (0, true) => Reason::Missing {
                    block,
                    key,
                    evidence: evidence(&tree, &metas, &here, matched),
                },
            }
        }
    };
    let tokens = match question {
        Question::Tokens(tokens) => tokens.len() as u64,
        Question::Hashes(keys) => keys.len() as u64 * block_tokens,
    };
    Ok(Answer {
        path: store.path_words(),
        namespace: here.root.to_hex(),
        name: match &description {
            Some(_) if !metas.namespaces.contains_key(&here.root) => {
                "as given; the store has nothing of it".into()
            }
            _ => metas.name(&here.root),
        },
        tokens,
        tail_tokens: tokens % block_tokens,
        blocks: here.keys.len() as u64,
        matched_blocks: matched as u64,
        matched_tokens: matched as u64 * block_tokens,
        reason,
        other_namespaces,
    })
}

/// What the store tells about a block that is not there: an eviction leaves nothing behind on disk.
fn evidence(tree: &Tree, metas: &Metas, here: &Candidate, matched: usize) -> Vec<String> {
    let mut evidence = Vec::new();
    let parent = matched
        .checked_sub(1)
        .map_or(here.root, |last| here.keys[last]);
    match tree.children(&parent) {
        0 if matched == 0 => evidence.push("the store has no block of this namespace".into()),
        0 => evidence.push("nothing follows the last block that matched".into()),
        children => {
            let blocks = text::plural(children, "other block");
            let verb = if children == 1 { "stands" } else { "stand" };
            evidence.push(format!(
                "{blocks} {verb} in its place: this prompt may differ from a stored one from here on"
            ));
        }
    }
    if let Some(stats) = &metas.stats {
        let of = |name| stats.counter(name);
        evidence.push(match of("evicted_disk_blocks") {
            0 => "the process that last kept statistics had evicted nothing from disk since it opened the store".into(),
            evicted => format!(
                "the process that last kept statistics had evicted {} from disk",
                text::plural(evicted, "block")
            ),
        });
        let in_ram = of("undurable_blocks").saturating_sub(of("durable_later_blocks"));
        let lost = of("declined_blocks") + in_ram + of("abandoned_blocks");
        if lost > 0 {
            evidence.push(format!(
                "of its saves, {} were declined, given up or stayed in RAM alone",
                text::plural(lost, "block")
            ));
        }
    }
    evidence
}

fn named(metas: &Metas, roots: &[Key], text: &str) -> Result<Key> {
    let digits = text::key_digits(text);
    let fits = |root: &&Key| {
        digits
            .as_ref()
            .is_some_and(|digits| text::begins_with(root, digits))
            || metas
                .namespaces
                .get(root)
                .is_some_and(|found| found.model.contains(text))
    };
    let found: Vec<&Key> = roots.iter().filter(fits).collect();
    let list = || {
        let names = roots
            .iter()
            .map(|root| format!("{root} ({})", metas.name(root)));
        names.collect::<Vec<_>>().join(", ")
    };
    match found[..] {
        [one] => Ok(*one),
        [] => Err(
            stemkv::Error::invalid("no namespace of the store is called that")
                .with("namespace", text)
                .with("there_are", list()),
        ),
        _ => Err(
            stemkv::Error::invalid("several namespaces are called that: give its root")
                .with("namespace", text)
                .with("there_are", list()),
        ),
    }
}

impl Report for Answer {
    fn exit(&self) -> Exit {
        match self.reason {
            Reason::Complete => Exit::Fine,
            _ => Exit::Problems,
        }
    }

    fn show(&self, out: &mut dyn Write) -> io::Result<()> {
        field(out, "store", &self.path)?;
        field(
            out,
            "namespace",
            &format!("{}  {}", text::short(&self.namespace), self.name),
        )?;
        let mut prompt = format!(
            "{}, {}",
            text::plural(self.tokens, "token"),
            text::plural(self.blocks, "full block")
        );
        if self.tail_tokens > 0 {
            let tail = text::plural(self.tail_tokens, "token");
            prompt += &format!(" (the last {tail} are no full block and never stored)");
        }
        field(out, "prompt", &prompt)?;
        let matched = format!(
            "{} of {}, {}",
            text::count(self.matched_blocks),
            text::plural(self.blocks, "block"),
            text::plural(self.matched_tokens, "token")
        );
        field(out, "matched", &matched)?;
        let at = |block: &u64, key: &str| format!("block {block} ({})", text::short(key));
        let why = match &self.reason {
            Reason::Complete => "every full block matched".to_owned(),
            Reason::TooShort => "the prompt has no full block".to_owned(),
            Reason::Missing { block, key, .. } => {
                format!("{} is not there: never stored, or evicted", at(block, key))
            }
            Reason::Lost {
                block,
                key,
                later_blocks,
            } => format!(
                "{} is not there, but {} behind it: it was stored, and was lost since",
                at(block, key),
                match later_blocks {
                    1 => "1 block is".to_owned(),
                    many => format!("{} blocks are", text::count(*many)),
                }
            ),
            Reason::OtherNamespace { block, key } => {
                format!("{} is there in another namespace only", at(block, key))
            }
            Reason::Corrupt { block, key, error } => {
                format!("{} does not verify: {error}", at(block, key))
            }
            Reason::Unreadable { block, key, error } => {
                format!("{} could not be read: {error}", at(block, key))
            }
        };
        field(out, "why", &why)?;
        if let Reason::Missing { evidence, .. } = &self.reason {
            for line in evidence {
                field(out, "", line)?;
            }
        }
        for other in &self.other_namespaces {
            writeln!(out)?;
            let words = format!(
                "{} matches {}  {}",
                text::short(&other.namespace),
                text::plural(other.matched_tokens, "token"),
                other.name
            );
            field(out, "elsewhere", &words)?;
            for line in &other.difference {
                field(out, "", line)?;
            }
        }
        Ok(())
    }
}
