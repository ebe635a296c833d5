//! Which evictable run goes first.

use std::collections::BTreeSet;

use lru::LruCache;

use crate::index::KeyBuildHasher;

/// A run of blocks in the index, for as long as it is evictable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RunId(pub(crate) u32);

/// How a run was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct RunUse {
    /// When it was last used: a count of all uses in the index. A run's is never below that of a
    /// run behind it.
    pub tick: u64,
    /// How many leases covered it.
    pub hits: u32,
}

/// The order in which the evictable runs of one tier go. Each tier has its own.
///
/// The index tells it which runs are evictable and takes chunks from the tail of
/// [`EvictionPolicy::coldest`] until the run is empty, pinned, or nothing more is wanted. A run in
/// use is pinned, hence not evictable: a lease is one `remove` at its start and one `insert` at its
/// end, whatever its length. Called under the index lock: keep it short.
pub trait EvictionPolicy: Send + 'static {
    /// `run` is evictable from now on. It was not before.
    fn insert(&mut self, run: RunId, used: RunUse);

    /// `run` is no longer evictable. `used` is what it was inserted with.
    fn remove(&mut self, run: RunId, used: RunUse);

    /// The run that goes first; `None` where there is none. It is not taken out.
    fn coldest(&self) -> Option<RunId>;

    /// Evictable runs.
    fn len(&self) -> usize;

    /// Is nothing evictable?
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Least recently used first: the default.
///
/// With runs taken from their tails, this is exactly the order of a least-recently-used list of
/// blocks in which every use touches a path from its end to its root.
#[derive(Debug)]
pub struct Recency {
    /// Runs that became evictable in the order of their use, by far the most: those whose lease
    /// ended.
    recent: LruCache<RunId, u64, KeyBuildHasher>,
    /// Runs that became evictable out of order: their last descendant went, long after their use.
    late: BTreeSet<(u64, RunId)>,
}

impl Default for Recency {
    fn default() -> Self {
        Recency {
            recent: LruCache::unbounded_with_hasher(KeyBuildHasher::default()),
            late: BTreeSet::new(),
        }
    }
}

impl EvictionPolicy for Recency {
    fn insert(&mut self, run: RunId, used: RunUse) {
        let in_order = match self.recent.peek_mru() {
            Some((_, &newest)) => newest <= used.tick,
            None => true,
        };
        if in_order {
            self.recent.push(run, used.tick);
        } else {
            self.late.insert((used.tick, run));
        }
    }

    fn remove(&mut self, run: RunId, used: RunUse) {
        if self.recent.pop(&run).is_none() {
            self.late.remove(&(used.tick, run));
        }
    }

    fn coldest(&self) -> Option<RunId> {
        let recent = self.recent.peek_lru().map(|(&run, &tick)| (tick, run));
        let late = self.late.first().copied();
        let coldest = match (recent, late) {
            (Some(recent), Some(late)) => Some(recent.min(late)),
            (recent, late) => recent.or(late),
        };
        coldest.map(|(_, run)| run)
    }

    fn len(&self) -> usize {
        self.recent.len() + self.late.len()
    }
}

#[cfg(test)]
mod tests {
    //! Shown: recency gives runs back in the order of their ticks, whatever the order in which they
    //! became evictable. How: against a sorted list.

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_coldest_run_is_the_least_recently_used_one(
            steps in proptest::collection::vec((any::<bool>(), 0u32..20, 0u64..50), 1..200),
        ) {
            let mut policy = Recency::default();
            let mut model: Vec<(u64, RunId)> = Vec::new();
            for (insert, run, tick) in steps {
                let run = RunId(run);
                match model.iter().position(|&(_, listed)| listed == run) {
                    None if insert => {
                        policy.insert(run, RunUse { tick, hits: 0 });
                        model.push((tick, run));
                    }
                    Some(at) if !insert => {
                        let (tick, run) = model.swap_remove(at);
                        policy.remove(run, RunUse { tick, hits: 0 });
                    }
                    _ => {}
                }
                model.sort_unstable();
                prop_assert_eq!(policy.len(), model.len());
                let coldest = policy.coldest().map(|run| {
                    model.iter().find(|&&(_, listed)| listed == run).expect("listed").0
                });
                prop_assert_eq!(coldest, model.first().map(|&(tick, _)| tick));
            }
        }
    }
}
