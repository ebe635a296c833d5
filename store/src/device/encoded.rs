//! Saves whose slabs are stored encoded: where each slab goes is known only once it is encoded.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{CodecId, Error, LayerId, Result};

/// What the transfers of one save have in common where its chunks are stored encoded. Clones are the
/// same save.
///
/// Slab *l* of a chunk lies behind its slab *l* − 1, so the layers are submitted in ascending order,
/// each once, whichever transfer brings it, and always with the same moves. The
/// [`TransferQueue`](crate::TransferQueue) sees to that, in whatever order jobs come.
#[derive(Clone)]
pub struct EncodedSave(Arc<Inner>);

struct Inner {
    codec: CodecId,
    /// The layer to be submitted next.
    next: AtomicU32,
    given_up: AtomicBool,
    filled: Mutex<Filled>,
}

/// How far the slots are full.
struct Filled {
    /// The layer that comes next.
    layer: u32,
    /// By move: where its last slab ends in the payload; `None` once one did not fit.
    ends: Vec<Option<usize>>,
}

impl EncodedSave {
    /// A save of which no layer was submitted yet.
    pub fn new(codec: CodecId) -> Self {
        EncodedSave(Arc::new(Inner {
            codec,
            next: AtomicU32::new(0),
            given_up: AtomicBool::new(false),
            filled: Mutex::new(Filled {
                layer: 0,
                ends: Vec::new(),
            }),
        }))
    }

    /// What its slabs are encoded with, where that makes them smaller.
    pub fn codec(&self) -> CodecId {
        self.0.codec
    }

    /// Is it the turn of `layer`?
    pub(crate) fn is_next(&self, layer: u32) -> bool {
        self.0.next.load(Ordering::Relaxed) == layer
    }

    /// The layers below `end` were submitted.
    pub(crate) fn submitted(&self, end: u32) {
        self.0.next.store(end, Ordering::Relaxed);
    }

    /// A layer will not come, so none behind it can.
    pub(crate) fn give_up(&self) {
        self.0.given_up.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.0.given_up.load(Ordering::Relaxed)
    }

    /// Calls `encode` with where the last slab of each of `moves` moves ends in its payload (`None` once one
    /// did not fit), once it is the turn of `layers`. After an error no later layer has its turn.
    pub(super) fn fill<R>(
        &self,
        layers: Range<u32>,
        moves: usize,
        encode: impl FnOnce(&mut [Option<usize>]) -> Result<R>,
    ) -> Result<R> {
        let mut filled: MutexGuard<'_, Filled> =
            self.0.filled.lock().unwrap_or_else(PoisonError::into_inner);
        if filled.layer == 0 {
            filled.ends = vec![Some(0); moves];
        }
        if filled.layer != layers.start || filled.ends.len() != moves {
            return Err(Error::invalid(
                "the layers of an encoded save come in ascending order, each with the same moves",
            )
            .with("layer", LayerId(layers.start))
            .with("next_layer", filled.layer));
        }
        filled.layer = u32::MAX;
        let answer = encode(&mut filled.ends)?;
        filled.layer = layers.end;
        Ok(answer)
    }
}

impl fmt::Debug for EncodedSave {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EncodedSave").field(&self.0.codec).finish()
    }
}
