//! What describes the namespaces of the records on disk, in words.
//!
//! A description is kept there before the first record of its namespace is written: of what is durable it can be
//! told what it is. Whoever opens a namespace waits for no disk.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use stemkv_store::{Key, META_BYTES_MAX};

use crate::namespace::NamespaceDescription;
use crate::pipeline::{DiskSide, Shared};

/// Descriptions that are kept on disk, at most: all are read at opening.
const KEPT_MAX: usize = 16 << 10;

/// Namespaces that were opened and of which nothing was written, at most.
const OPENED_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// What is described on disk, and what can be.
pub(crate) struct Descriptions(Mutex<State>);

struct State {
    kept: HashSet<Key>,
    /// The last ones that were opened, with their texts.
    opened: LruCache<Key, Arc<[u8]>>,
}

impl Default for Descriptions {
    fn default() -> Self {
        Descriptions(Mutex::new(State {
            kept: HashSet::new(),
            opened: LruCache::new(OPENED_MAX),
        }))
    }
}

impl Descriptions {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The description of this namespace was found on disk.
    pub(crate) fn found(&self, root: Key) {
        self.state().kept.insert(root);
    }

    /// Keeps the descriptions of namespaces of which records are about to be written, where they are not on
    /// disk yet. Best effort: without one, a later miss is harder to explain. Blocks.
    pub(crate) fn keep(&self, shared: &Shared, disk: &DiskSide, roots: &HashSet<Key>) {
        for root in roots {
            let text = {
                let mut state = self.state();
                match state.kept.contains(root) {
                    true => None,
                    false => state.opened.get(root).cloned(),
                }
            };
            let Some(text) = text else { continue };
            if !self.has_room(shared, disk) {
                tracing::debug!(%root, "too many namespaces have records for another description");
                continue;
            }
            match disk.tier.put_meta(root, &text) {
                Ok(()) => {
                    let mut state = self.state();
                    state.kept.insert(*root);
                    state.opened.pop(root);
                }
                Err(error) => {
                    tracing::warn!(%error, "a namespace's description could not be kept");
                }
            }
        }
    }

    /// May one more be kept? One of a namespace of which nothing is left makes room.
    fn has_room(&self, shared: &Shared, disk: &DiskSide) -> bool {
        let kept: Vec<Key> = {
            let state = self.state();
            if state.kept.len() < KEPT_MAX {
                return true;
            }
            state.kept.iter().copied().collect()
        };
        let Some(left) = kept.iter().find(|root| !shared.index.has_namespace(root)) else {
            return false;
        };
        self.state().kept.remove(left);
        let removed = disk.tier.put_meta(left, &[]);
        if removed.is_err() {
            self.state().kept.insert(*left);
        }
        removed.is_ok()
    }
}

/// A namespace was opened. Does not wait.
pub(crate) fn opened(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    root: Key,
    description: &NamespaceDescription,
) {
    {
        let mut state = disk.descriptions.state();
        if state.kept.contains(&root) || state.opened.get(&root).is_some() {
            return;
        }
    }
    let text = serde_json::to_vec(description).expect("plain data can be written as JSON");
    if text.len() > META_BYTES_MAX {
        tracing::warn!(%root, "a namespace's description is too long to be kept");
        return;
    }
    disk.descriptions.state().opened.put(root, text.into());
    // A store that was rebuilt from its records has lost the descriptions.
    if shared.index.has_namespace(&root) {
        let shared = shared.clone();
        shared.clone().tasks.spawn(async move {
            let keeping = shared.clone();
            let keep = move || {
                if let Some(disk) = &keeping.disk {
                    let roots = HashSet::from([root]);
                    disk.descriptions.keep(&keeping, disk, &roots);
                }
            };
            if let Err(error) = shared.tasks.blocking(keep).await {
                tracing::warn!(%error, "a namespace's description was not kept");
            }
        });
    }
}
