//! A namespace of an open store.

use stemkv_store::Key;

use crate::Result;
use crate::hash::Prompt;
use crate::namespace::NamespaceDescription;

/// A namespace of an open store: makes prompts.
#[derive(Clone, Debug)]
pub struct OpenNamespace {
    root: Key,
    block_tokens: u32,
    description: NamespaceDescription,
}

impl OpenNamespace {
    pub(super) fn new(root: Key, block_tokens: u32, description: NamespaceDescription) -> Self {
        OpenNamespace {
            root,
            block_tokens,
            description,
        }
    }

    /// The namespace root.
    pub fn root(&self) -> Key {
        self.root
    }

    /// The namespace in words, without its salt.
    pub fn description(&self) -> &NamespaceDescription {
        &self.description
    }

    /// A prompt of tokens. Its hashes are computed once, as far as they are needed.
    pub fn prompt<'a>(&self, tokens: &'a [u32]) -> Prompt<'a> {
        Prompt::tokens(self.root, self.block_tokens, tokens)
    }

    /// A prompt of keys that the engine supplies, each the child of the one before it: one key a
    /// block, 1 to 128 bytes each.
    ///
    /// # Errors
    /// `Invalid` for a key of another length.
    pub fn chained_keys<'a>(&self, keys: Vec<&'a [u8]>) -> Result<Prompt<'a>> {
        let prompt = Prompt::chained(self.root, keys)?;
        Ok(prompt.in_blocks_of(self.block_tokens))
    }

    /// Keys that the engine supplies without their chain: each stands for itself.
    ///
    /// # Errors
    /// `Invalid` for a key that does not have 1 to 128 bytes.
    pub fn flat_keys<'a>(&self, keys: Vec<&'a [u8]>) -> Result<Prompt<'a>> {
        let prompt = Prompt::flat(self.root, keys)?;
        Ok(prompt.in_blocks_of(self.block_tokens))
    }
}
