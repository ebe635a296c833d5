//! Which granules of the arena are free: extents by offset (to coalesce) and by size (to fit).

use std::collections::{BTreeMap, BTreeSet};

/// Free extents of a range of granules. No two of them touch.
#[derive(Debug)]
pub(super) struct FreeExtents {
    by_offset: BTreeMap<u32, u32>,
    by_size: BTreeSet<(u32, u32)>,
    free: u32,
}

impl FreeExtents {
    /// All of `granules` free.
    pub(super) fn new(granules: u32) -> Self {
        let mut extents = FreeExtents {
            by_offset: BTreeMap::new(),
            by_size: BTreeSet::new(),
            free: granules,
        };
        extents.insert(0, granules);
        extents
    }

    /// Free granules.
    pub(super) fn free(&self) -> u32 {
        self.free
    }

    /// Granules of the largest extent.
    pub(super) fn largest(&self) -> u32 {
        self.by_size.last().map_or(0, |&(granules, _)| granules)
    }

    /// Offsets of `count` slots of `granules` each, in ascending runs: one run in the tightest
    /// extent that holds them all, else the largest extents until the rest fits in one. All or
    /// nothing.
    pub(super) fn take(&mut self, granules: u32, count: u32) -> Option<Vec<u32>> {
        let wanted = u64::from(granules) * u64::from(count);
        if wanted > u64::from(self.free) {
            return None;
        }
        // Decide first, then change: the plan may turn out short.
        let mut runs = Vec::new();
        let mut rest = count;
        for &(size, offset) in self.by_size.iter().rev() {
            if rest == 0 {
                break;
            }
            let need = u64::from(granules) * u64::from(rest);
            if u64::from(size) >= need {
                // The tightest fit is no larger than this one, so no earlier run is in it.
                let &(_, offset) = self.by_size.range((need as u32, 0)..).next()?;
                runs.push((offset, rest));
                rest = 0;
            } else {
                let slots = size / granules;
                if slots == 0 {
                    break;
                }
                runs.push((offset, slots));
                rest -= slots;
            }
        }
        if rest > 0 {
            return None;
        }
        let mut offsets = Vec::with_capacity(count as usize);
        for (offset, slots) in runs {
            let size = self.remove(offset);
            let used = slots * granules;
            if size > used {
                self.insert(offset + used, size - used);
            }
            self.free -= used;
            offsets.extend((0..slots).map(|slot| offset + slot * granules));
        }
        Some(offsets)
    }

    /// How many slots of `granules` each could be taken, counted no further than `most`.
    pub(super) fn room(&self, granules: u32, most: usize) -> usize {
        let mut room = 0;
        for &(size, _) in self.by_size.iter().rev() {
            if size < granules || room >= most {
                break;
            }
            room += (size / granules) as usize;
        }
        room.min(most)
    }

    /// Gives pieces back, offsets and granules, joined with each other and with the free neighbours. They
    /// ascend.
    pub(super) fn give_back(&mut self, pieces: impl IntoIterator<Item = (u32, u32)>) {
        let mut pieces = pieces.into_iter().peekable();
        while let Some((offset, granules)) = pieces.next() {
            self.free += granules;
            let (mut start, mut end) = (offset, offset + granules);
            if let Some((&before, &len)) = self.by_offset.range(..=offset).next_back() {
                debug_assert!(before + len <= offset, "freed twice");
                if before + len == offset {
                    self.remove(before);
                    start = before;
                }
            }
            // What is freed and what was free take turns: a run of slots with their tails is one extent.
            loop {
                if let Some((_, granules)) = pieces.next_if(|&(offset, _)| offset == end) {
                    self.free += granules;
                    end += granules;
                } else if let Some(len) = self.by_offset.remove(&end) {
                    self.by_size.remove(&(len, end));
                    end += len;
                } else {
                    break;
                }
            }
            let after = self.by_offset.range(start..).next();
            debug_assert!(after.is_none_or(|(&after, _)| end < after), "freed twice");
            self.insert(start, end - start);
        }
    }

    /// Do the two maps and the counter agree, and is no pair of extents left uncoalesced?
    #[cfg(any(test, debug_assertions, feature = "sim"))]
    pub(super) fn is_consistent(&self) -> bool {
        let mut end = None;
        self.by_offset.len() == self.by_size.len()
            && self.by_offset.values().sum::<u32>() == self.free
            && self.by_offset.iter().all(|(&offset, &size)| {
                let apart = end.is_none_or(|end| end < offset);
                end = Some(offset + size);
                apart && size > 0 && self.by_size.contains(&(size, offset))
            })
    }

    fn insert(&mut self, offset: u32, granules: u32) {
        self.by_offset.insert(offset, granules);
        self.by_size.insert((granules, offset));
    }

    fn remove(&mut self, offset: u32) -> u32 {
        let granules = self
            .by_offset
            .remove(&offset)
            .expect("the caller found it in the map");
        self.by_size.remove(&(granules, offset));
        granules
    }
}

/// Shown: the order in which space is taken, and, against a bitmap, that no granule is ever given
/// out twice or lost.
#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn holes(sizes: &[u32]) -> FreeExtents {
        let mut extents = FreeExtents::new(sizes.iter().map(|size| size + 1).sum());
        let taken = extents.take(1, extents.free()).expect("all free");
        let mut at = 0;
        for &size in sizes {
            for granule in at..at + size {
                extents.give_back([(taken[granule as usize], 1)]);
            }
            at += size + 1;
        }
        extents
    }

    #[test]
    fn a_run_goes_into_the_tightest_extent_that_holds_it() {
        let mut extents = holes(&[8, 4, 6]);
        assert_eq!(extents.take(2, 2), Some(vec![9, 11]));
        assert_eq!(extents.take(2, 3), Some(vec![14, 16, 18]));
        assert_eq!(extents.take(8, 1), Some(vec![0]));
        assert_eq!(extents.free(), 0);
    }

    #[test]
    fn without_such_an_extent_the_largest_ones_are_used_and_the_rest_fits_tightly() {
        let mut extents = holes(&[3, 8, 5, 4]);
        // 4 + 2 slots: the largest extent, then the tightest that holds the last two.
        assert_eq!(extents.take(2, 6), Some(vec![4, 6, 8, 10, 19, 21]));
    }

    #[test]
    fn too_much_takes_nothing() {
        let mut extents = holes(&[3, 3, 3]);
        assert_eq!(extents.take(2, 4), None);
        assert_eq!(extents.take(4, 1), None);
        assert_eq!((extents.free(), extents.largest()), (9, 3));
        assert!(extents.is_consistent());
    }

    proptest! {
        #[test]
        fn no_granule_is_given_out_twice_or_lost(
            steps in prop::collection::vec((any::<bool>(), 1..9_u32, 1..6_u32), 1..200)
        ) {
            const GRANULES: u32 = 96;
            let mut extents = FreeExtents::new(GRANULES);
            let mut taken: Vec<(u32, u32)> = Vec::new();
            for (take, granules, count) in steps {
                if take {
                    let fitting = extents.by_offset.values().map(|size| size / granules).sum::<u32>();
                    let room = extents.room(granules, 1000);
                    prop_assert_eq!(room, fitting as usize);
                    prop_assert_eq!(extents.room(granules, 2), room.min(2));
                    let got = extents.take(granules, count);
                    prop_assert_eq!(got.is_some(), fitting >= count);
                    taken.extend(got.into_iter().flatten().map(|offset| (offset, granules)));
                } else if !taken.is_empty() {
                    let mut pieces: Vec<(u32, u32)> = (0..count.min(taken.len() as u32))
                        .map(|_| taken.swap_remove(granules as usize % taken.len()))
                        .collect();
                    pieces.sort_unstable();
                    extents.give_back(pieces);
                }
                let mut used = [false; GRANULES as usize];
                for &(offset, size) in &taken {
                    for granule in offset..offset + size {
                        prop_assert!(!std::mem::replace(&mut used[granule as usize], true));
                    }
                }
                let free = used.iter().filter(|&&used| !used).count() as u32;
                prop_assert_eq!(extents.free(), free);
                prop_assert!(extents.is_consistent());
            }
        }
    }
}
