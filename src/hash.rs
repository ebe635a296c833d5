//! From tokens to sequence hashes: a chain of keyed blake3, 256 bits a block.
//!
//! | block | key of the hash | message |
//! |---|---|---|
//! | tokens | parent's hash; first block: the namespace root | the tokens, `u32` little-endian |
//! | tokens under extra keys | the same | the tokens, then for each extra key its first token, end (`u64`), length (`u32`) and bytes |
//! | foreign, with its chain | parent's hash; first block: the foreign root | the engine's bytes |
//! | foreign, flat | the flat root | the engine's bytes |
//!
//! The foreign and the flat root are derived from the namespace root in blake3's key-derivation
//! mode, each with a context of its own. The parent as the key costs nothing (a key takes the place
//! of blake3's initial value), so a block of 16 tokens is exactly one compression and one of 64 is
//! four: there is no domain byte that would spill into one more.
//!
//! **Why no two different paths have the same hash.** Suppose that blake3 has no collision over
//! (mode, key, message). Then a hash determines the mode, the key and the message that made it.
//! The message determines the block's content: within one namespace all blocks have the same number
//! of tokens (`block_tokens` is part of the root), so a longer message starts with the tokens and
//! the rest reads back as a sequence of length-prefixed extra keys in one way only. The key is the
//! parent's hash or a root, and determines its own making in turn, up to the root; roots are made in
//! key-derivation mode and everything below in keyed mode, so a root is never a block's hash, and
//! the three roots of a namespace, and those of any two namespaces, differ. So equal hashes have
//! equal roots, hence equal domains and namespaces, and equal blocks all along the path.

use std::ops::Range;

use stemkv_store::{Error, Key, Result};

/// The sequence hashes of a prompt, computed only as far as somebody asks: a miss at block 0 hashes
/// one block.
pub trait HashPath {
    /// The namespace root.
    fn root(&self) -> Key;

    /// Full blocks of the prompt, hashed or not.
    fn blocks(&self) -> usize;

    /// The hashes computed so far, from block 0 on.
    fn hashed(&self) -> &[Key];

    /// Computes hashes until `blocks` are there, or all.
    fn hash_to(&mut self, blocks: usize);

    /// Are the keys flat: each a child of the root, none an ancestor of another?
    fn is_flat(&self) -> bool {
        false
    }

    /// Tokens of one block, where the path knows: a store with others refuses it. `None` takes the store's on
    /// trust.
    fn block_tokens(&self) -> Option<u32> {
        None
    }

    /// The hash of block `i`; `None` past the last full block.
    fn get(&mut self, i: usize) -> Option<Key> {
        self.hash_to(i + 1);
        self.hashed().get(i).copied()
    }
}

/// Something besides tokens that the KV of `tokens` depends on: a multimodal item's content hash
/// over its placeholder tokens, say. It enters the hash of every block that it covers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExtraKey {
    /// First token that it covers.
    pub start: usize,
    /// One past the last token that it covers. Give the item's true end even where the prompt is
    /// cut before it, or the cut prompt's hashes will be others.
    pub end: usize,
    /// The item's identity.
    pub bytes: Vec<u8>,
}

impl ExtraKey {
    /// An extra key over a range of the prompt's tokens.
    pub fn new(tokens: Range<usize>, bytes: impl Into<Vec<u8>>) -> Self {
        ExtraKey {
            start: tokens.start,
            end: tokens.end,
            bytes: bytes.into(),
        }
    }
}

/// Longest key that an engine may supply, bytes.
pub const FOREIGN_KEY_BYTES_MAX: usize = 128;

/// A prompt as the store sees it: blocks of tokens, or keys that an engine supplies, hashed lazily.
///
/// Only full blocks count; the tokens behind the last one are never looked at.
#[derive(Clone, Debug)]
pub struct Prompt<'a> {
    root: Key,
    /// `None` for keys of which nobody said.
    block_tokens: Option<u32>,
    source: Source<'a>,
    keys: Vec<Key>,
    /// One block's message, reused from block to block.
    message: Vec<u8>,
}

#[derive(Clone, Debug)]
enum Source<'a> {
    Tokens {
        tokens: &'a [u32],
        block_tokens: usize,
        /// Sorted: equal sets of extra keys give equal hashes.
        extras: Vec<ExtraKey>,
    },
    Chained {
        keys: Vec<&'a [u8]>,
        foreign_root: Key,
    },
    Flat {
        keys: Vec<&'a [u8]>,
        flat_root: Key,
    },
    /// All hashes are there.
    Hashed {
        flat: bool,
    },
}

impl<'a> Prompt<'a> {
    /// A prompt of tokens under a namespace root, in blocks of `block_tokens`
    /// (`geometry.block_tokens` of that namespace).
    ///
    /// # Panics
    /// Where `block_tokens` is 0.
    pub fn tokens(root: Key, block_tokens: u32, tokens: &'a [u32]) -> Self {
        assert!(block_tokens > 0, "a block has at least one token");
        let of_blocks = Some(block_tokens);
        let block_tokens = block_tokens as usize;
        Prompt {
            root,
            block_tokens: of_blocks,
            source: Source::Tokens {
                tokens,
                block_tokens,
                extras: Vec::new(),
            },
            keys: Vec::new(),
            message: vec![0; block_tokens * 4],
        }
    }

    /// The same prompt under extra keys, in any order. Replaces earlier ones.
    ///
    /// # Errors
    /// `Invalid` where an extra key covers no token or has more than 4 GiB, or where the prompt is
    /// not one of tokens.
    pub fn with_extra_keys(mut self, mut extra_keys: Vec<ExtraKey>) -> Result<Self> {
        let Source::Tokens { extras, .. } = &mut self.source else {
            return Err(Error::invalid("extra keys belong to a prompt of tokens"));
        };
        for key in &extra_keys {
            if key.start >= key.end {
                return Err(Error::invalid("an extra key must cover at least one token")
                    .with("start", key.start)
                    .with("end", key.end));
            }
            if u32::try_from(key.bytes.len()).is_err() {
                return Err(Error::invalid("an extra key must have less than 4 GiB"));
            }
        }
        extra_keys.sort_unstable();
        *extras = extra_keys;
        self.keys.clear();
        Ok(self)
    }

    /// A path of keys that an engine supplies, each the child of the one before it.
    ///
    /// # Errors
    /// `Invalid` where a key is empty or longer than 128 bytes.
    pub fn chained(root: Key, keys: Vec<&'a [u8]>) -> Result<Self> {
        check_foreign(&keys)?;
        let foreign_root = Key(blake3::derive_key(
            "stemkv 2026 chained foreign keys v1",
            &root.0,
        ));
        Ok(Self::foreign(root, Source::Chained { keys, foreign_root }))
    }

    /// Keys that an engine supplies without their chain: each stands for itself.
    ///
    /// # Errors
    /// As [`Prompt::chained`].
    pub fn flat(root: Key, keys: Vec<&'a [u8]>) -> Result<Self> {
        check_foreign(&keys)?;
        let flat_root = Key(blake3::derive_key(
            "stemkv 2026 flat foreign keys v1",
            &root.0,
        ));
        Ok(Self::foreign(root, Source::Flat { keys, flat_root }))
    }

    fn foreign(root: Key, source: Source<'a>) -> Self {
        Prompt {
            root,
            block_tokens: None,
            source,
            keys: Vec::new(),
            message: Vec::new(),
        }
    }

    /// The same path, each key of which stands for so many tokens.
    pub(crate) fn in_blocks_of(self, tokens: u32) -> Self {
        Prompt {
            block_tokens: Some(tokens),
            ..self
        }
    }

    /// Hashes every block and lets go of what the prompt borrowed.
    pub fn into_hashed(mut self) -> Prompt<'static> {
        self.hash_to(usize::MAX);
        Prompt {
            root: self.root,
            block_tokens: self.block_tokens,
            source: Source::Hashed {
                flat: self.is_flat(),
            },
            keys: self.keys,
            message: Vec::new(),
        }
    }

    /// A path of sequence hashes that are known already, each the child of the one before it. That is
    /// taken on trust: of paths that share a hash, all before it is taken to be the same.
    pub fn from_hashes(root: Key, keys: Vec<Key>) -> Prompt<'static> {
        Prompt {
            root,
            block_tokens: None,
            source: Source::Hashed { flat: false },
            keys,
            message: Vec::new(),
        }
    }
}

fn check_foreign(keys: &[&[u8]]) -> Result<()> {
    match keys
        .iter()
        .position(|key| !(1..=FOREIGN_KEY_BYTES_MAX).contains(&key.len()))
    {
        None => Ok(()),
        Some(position) => Err(Error::invalid("a key must have 1 to 128 bytes")
            .with("position", position)
            .with("bytes", keys[position].len())),
    }
}

impl HashPath for Prompt<'_> {
    fn root(&self) -> Key {
        self.root
    }

    fn blocks(&self) -> usize {
        match &self.source {
            Source::Tokens {
                tokens,
                block_tokens,
                ..
            } => tokens.len() / block_tokens,
            Source::Chained { keys, .. } | Source::Flat { keys, .. } => keys.len(),
            Source::Hashed { .. } => self.keys.len(),
        }
    }

    fn hashed(&self) -> &[Key] {
        &self.keys
    }

    fn hash_to(&mut self, blocks: usize) {
        let (from, to) = (self.keys.len(), blocks.min(self.blocks()));
        if from >= to {
            return;
        }
        self.keys.reserve(to - from);
        let mut parent = *self.keys.last().unwrap_or(&self.root);
        match &self.source {
            Source::Tokens {
                tokens,
                block_tokens,
                extras,
            } => {
                let blocks =
                    tokens[from * block_tokens..to * block_tokens].chunks_exact(*block_tokens);
                if extras.is_empty() {
                    // Extra keys that were replaced may have made it longer.
                    self.message.truncate(block_tokens * 4);
                    for block in blocks {
                        write_tokens(&mut self.message, block);
                        parent = keyed(&parent, &self.message);
                        self.keys.push(parent);
                    }
                } else {
                    for (i, block) in blocks.enumerate() {
                        self.message.resize(block_tokens * 4, 0);
                        write_tokens(&mut self.message, block);
                        let start = (from + i) * block_tokens;
                        write_extras(&mut self.message, extras, start..start + block_tokens);
                        parent = keyed(&parent, &self.message);
                        self.keys.push(parent);
                    }
                }
            }
            Source::Chained { keys, foreign_root } => {
                if from == 0 {
                    parent = *foreign_root;
                }
                for key in &keys[from..to] {
                    parent = keyed(&parent, key);
                    self.keys.push(parent);
                }
            }
            Source::Flat { keys, flat_root } => {
                let hashes = keys[from..to].iter().map(|key| keyed(flat_root, key));
                self.keys.extend(hashes);
            }
            Source::Hashed { .. } => {}
        }
    }

    fn is_flat(&self) -> bool {
        matches!(
            self.source,
            Source::Flat { .. } | Source::Hashed { flat: true }
        )
    }

    fn block_tokens(&self) -> Option<u32> {
        self.block_tokens
    }
}

fn keyed(key: &Key, message: &[u8]) -> Key {
    Key(*blake3::keyed_hash(&key.0, message).as_bytes())
}

fn write_tokens(message: &mut [u8], tokens: &[u32]) {
    for (bytes, token) in message.chunks_exact_mut(4).zip(tokens) {
        bytes.copy_from_slice(&token.to_le_bytes());
    }
}

/// Appends the extra keys that cover any token of `block`.
fn write_extras(message: &mut Vec<u8>, extras: &[ExtraKey], block: Range<usize>) {
    let covering = extras
        .iter()
        .take_while(|key| key.start < block.end)
        .filter(|key| key.end > block.start);
    for key in covering {
        message.extend_from_slice(&(key.start as u64).to_le_bytes());
        message.extend_from_slice(&(key.end as u64).to_le_bytes());
        message.extend_from_slice(&(key.bytes.len() as u32).to_le_bytes());
        message.extend_from_slice(&key.bytes);
    }
}

#[cfg(test)]
mod tests {
    //! Shown: hashes depend on exactly what they must and nothing else. How: fixed vectors, then
    //! random prompts whose hashes are compared block by block with those of changed prompts.

    use proptest::prelude::*;

    use super::*;

    const ROOT: Key = Key([7; 32]);

    fn all(mut path: impl HashPath) -> Vec<Key> {
        path.hash_to(usize::MAX);
        path.hashed().to_vec()
    }

    fn hashes(root: Key, block_tokens: u32, tokens: &[u32]) -> Vec<Key> {
        all(Prompt::tokens(root, block_tokens, tokens))
    }

    fn with_extras(tokens: &[u32], extras: Vec<ExtraKey>) -> Vec<Key> {
        let prompt = Prompt::tokens(ROOT, 4, tokens).with_extra_keys(extras);
        all(prompt.expect("valid extra keys"))
    }

    /// Changing any of these changes every store on disk: raise `HASHING_VERSION` with it.
    #[test]
    fn fixed_prompts_have_fixed_hashes() {
        let tokens: Vec<u32> = (0..40).collect();
        let items = vec![ExtraKey::new(2..6, *b"cat"), ExtraKey::new(6..7, *b"dog")];
        let vectors = [
            hashes(ROOT, 16, &tokens)[1],
            with_extras(&tokens, items)[1],
            all(Prompt::chained(ROOT, vec![b"a", b"b"]).expect("valid"))[1],
            all(Prompt::flat(ROOT, vec![b"a", b"b"]).expect("valid"))[1],
        ];
        assert_eq!(vectors.map(|key| key.to_hex()), VECTORS);
    }
    const VECTORS: [&str; 4] = [
        "13a5e1abd27db8d3400b7403799d3a022a3e7c4e8b00d7e42afddb00c89ee510",
        "96fab61c9b447145ed9527ae5f457a531ae6dd560b879b026b825ccd7b0f547d",
        "982f022b26f00cbbdfb1f2774cd378b821105a79271e1f3360f44aba2b40ce96",
        "1e18c838768cfbd0eade770dddc8a3ac8d6b6bce873ebc2fb4959e8e8dd36e19",
    ];

    #[test]
    fn a_prompt_hashes_no_more_blocks_than_asked_for() {
        let tokens: Vec<u32> = (0..70).collect();
        let mut prompt = Prompt::tokens(ROOT, 16, &tokens);
        assert_eq!((prompt.blocks(), prompt.hashed().len()), (4, 0));
        let first = prompt.get(0).expect("four blocks");
        assert_eq!(prompt.hashed(), [first]);
        prompt.hash_to(3);
        assert_eq!(prompt.hashed().len(), 3);
        assert_eq!(prompt.get(4), None);
        assert_eq!(prompt.hashed(), hashes(ROOT, 16, &tokens));
        assert_eq!(all(prompt.into_hashed()), hashes(ROOT, 16, &tokens));
    }

    #[test]
    fn the_same_bytes_in_different_domains_are_different_blocks() {
        let tokens = [1, 2, 3, 4, 5, 6, 7, 8];
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|token: &u32| token.to_le_bytes())
            .collect();
        let keys = || bytes.chunks(16).collect::<Vec<_>>();
        let mut seen = hashes(ROOT, 4, &tokens);
        seen.extend(all(Prompt::chained(ROOT, keys()).expect("valid")));
        seen.extend(all(Prompt::flat(ROOT, keys()).expect("valid")));
        seen.extend(with_extras(&tokens, vec![ExtraKey::new(0..8, *b"")]));
        let count = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!((count, seen.len()), (8, 8));
    }

    #[test]
    fn where_one_item_ends_and_the_next_begins_matters() {
        let tokens = [9; 8];
        let item = |range, bytes: &str| ExtraKey::new(range, bytes);
        let different = [
            vec![item(0..8, "a")],
            vec![item(0..4, "a"), item(4..8, "a")],
            vec![item(0..3, "a"), item(3..8, "b")],
            vec![item(0..5, "a"), item(5..8, "b")],
            vec![item(0..5, "ab"), item(5..8, "")],
        ]
        .map(|extras| with_extras(&tokens, extras)[1]);
        for (i, here) in different.iter().enumerate() {
            assert!(!different[..i].contains(here), "case {i}");
        }
        let forwards = vec![item(0..5, "a"), item(2..8, "b")];
        let backwards = forwards.iter().rev().cloned().collect();
        assert_eq!(
            with_extras(&tokens, forwards),
            with_extras(&tokens, backwards)
        );
    }

    #[test]
    fn extra_keys_that_were_replaced_leave_nothing_behind() {
        let tokens: Vec<u32> = (0..16).collect();
        let prompt = Prompt::tokens(ROOT, 4, &tokens);
        let image = vec![ExtraKey::new(0..16, *b"image")];
        let mut replaced = prompt.with_extra_keys(image).expect("valid");
        replaced.hash_to(2);
        let replaced = replaced.with_extra_keys(Vec::new()).expect("valid");
        assert_eq!(all(replaced), hashes(ROOT, 4, &tokens));
    }

    #[test]
    fn keys_out_of_bounds_are_refused() {
        for key in [vec![], vec![0; 129]] {
            let error = Prompt::flat(ROOT, vec![b"ok", &key]).expect_err("length");
            assert!(error.to_string().contains("position=1"), "{error}");
            assert!(Prompt::chained(ROOT, vec![&key]).is_err());
        }
        let key = [0; 128];
        assert!(Prompt::chained(ROOT, vec![&key]).is_ok());
        #[expect(clippy::reversed_empty_ranges, reason = "what is refused")]
        let empty = [ExtraKey::new(3..3, *b""), ExtraKey::new(4..3, *b"")];
        for extra in empty {
            let prompt = Prompt::tokens(ROOT, 4, &[0; 8]);
            assert!(prompt.with_extra_keys(vec![extra]).is_err());
        }
    }

    proptest! {
        #[test]
        fn a_changed_token_changes_its_block_and_all_later_ones_and_no_earlier_one(
            tokens in proptest::collection::vec(any::<u32>(), 4..100),
            block_tokens in 1u32..9,
            at in any::<prop::sample::Index>(),
            other in 1u32..,
        ) {
            let at = at.index(tokens.len());
            let before = hashes(ROOT, block_tokens, &tokens);
            let mut changed = tokens.clone();
            changed[at] = changed[at].wrapping_add(other);
            let after = hashes(ROOT, block_tokens, &changed);
            for (i, (before, after)) in before.iter().zip(&after).enumerate() {
                prop_assert_eq!(before == after, i < at / block_tokens as usize, "block {}", i);
            }
        }

        #[test]
        fn a_prefix_has_the_same_hashes_and_another_root_shares_none(
            tokens in proptest::collection::vec(any::<u32>(), 0..100),
            block_tokens in 1u32..9,
            cut in any::<prop::sample::Index>(),
        ) {
            let long = hashes(ROOT, block_tokens, &tokens);
            let short = hashes(ROOT, block_tokens, &tokens[..cut.index(tokens.len() + 1)]);
            prop_assert_eq!(&long[..short.len()], &short[..]);
            let elsewhere = hashes(Key([8; 32]), block_tokens, &tokens);
            prop_assert!(long.iter().all(|key| !elsewhere.contains(key)));
        }

        #[test]
        fn an_extra_key_changes_the_hashes_from_its_first_block_on(
            start in 0usize..30,
            length in 1usize..30,
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let tokens = [3; 32];
            let plain = hashes(ROOT, 4, &tokens);
            let under = with_extras(&tokens, vec![ExtraKey::new(start..start + length, bytes)]);
            for i in 0..8 {
                prop_assert_eq!(plain[i] == under[i], i < start / 4, "block {}", i);
            }
        }

        #[test]
        fn flat_keys_depend_on_themselves_alone_and_chained_ones_on_all_before(
            keys in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..129), 2..10),
        ) {
            let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
            let tail = keys[1..].to_vec();
            let flat = all(Prompt::flat(ROOT, keys.clone()).expect("valid"));
            prop_assert_eq!(&flat[1..], &all(Prompt::flat(ROOT, tail.clone()).expect("valid"))[..]);
            let chained = all(Prompt::chained(ROOT, keys).expect("valid"));
            let other = all(Prompt::chained(ROOT, tail).expect("valid"));
            prop_assert!(chained[1..].iter().all(|key| !other.contains(key)));
        }
    }
}
