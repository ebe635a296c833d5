//! How far a load is: which blocks are in which job, which layers of it are on their way.

use std::ops::Range;

use stemkv_store::{Fence, LayerId, Tier};

use crate::ErrorKind;

/// What is known of one load. Every block is in one state; nothing here waits or moves.
pub(super) struct Progress {
    /// The position of the first block.
    first: usize,
    /// From `first` on.
    blocks: Vec<Block>,
    parts: Vec<Part>,
    /// By layer.
    fences: Vec<Vec<Fence>>,
    /// One past the last block that is coming; known once everything has arrived or failed.
    pub(super) target: Option<usize>,
    pub(super) cut: Option<ErrorKind>,
    /// A copy did not end in time.
    pub(super) lost: bool,
}

#[derive(Clone, Copy)]
enum Block {
    /// Nothing has been submitted of it.
    Waiting,
    /// In a job, as its move `index`: all of its layers will be, or none.
    In {
        part: usize,
        index: usize,
        from: Tier,
    },
    /// The engine computed it before it was submitted.
    Computed,
}

/// One job of the transfer queue.
struct Part {
    blocks: usize,
    /// Layers that were reported, from 0 on.
    layers: u32,
    is_open: bool,
    /// The first layer that failed.
    failed: Option<(LayerId, ErrorKind)>,
    /// Leading blocks of which nothing is known to be wrong.
    good: usize,
}

/// The answer for one layer.
pub(super) enum Answer {
    Later,
    /// Behind these.
    Ready(Vec<Fence>),
    Failed(ErrorKind),
    /// The load ended without it.
    Missing,
}

impl Progress {
    pub(super) fn new(blocks: Range<usize>, layers: u32) -> Self {
        Progress {
            first: blocks.start,
            blocks: vec![Block::Waiting; blocks.len()],
            parts: Vec::new(),
            fences: vec![Vec::new(); layers as usize],
            target: None,
            cut: None,
            lost: false,
        }
    }

    fn layers(&self) -> u32 {
        self.fences.len() as u32
    }

    /// Opens a job with those of `blocks` (positions, and where they came from) that still wait. Says
    /// which they are, and the job's number; `None` where none does.
    pub(super) fn open(&mut self, blocks: &[(usize, Tier)]) -> Option<(usize, Vec<usize>)> {
        let part = self.parts.len();
        let mut taken = Vec::with_capacity(blocks.len());
        for &(position, from) in blocks {
            let block = &mut self.blocks[position - self.first];
            if matches!(block, Block::Waiting) {
                let index = taken.len();
                *block = Block::In { part, index, from };
                taken.push(position);
            }
        }
        if taken.is_empty() {
            return None;
        }
        self.parts.push(Part {
            blocks: taken.len(),
            good: taken.len(),
            layers: 0,
            is_open: true,
            failed: None,
        });
        Some((part, taken))
    }

    /// The job opened last was not accepted: its blocks wait again.
    pub(super) fn take_back(&mut self, part: usize) {
        debug_assert_eq!(part + 1, self.parts.len(), "one job is submitted at a time");
        self.parts.pop();
        for block in &mut self.blocks {
            if matches!(block, Block::In { part: of, .. } if *of == part) {
                *block = Block::Waiting;
            }
        }
    }

    /// Blocks were declined that count as coming: a job that failed before it began.
    pub(super) fn refuse(&mut self, blocks: &[(usize, Tier)], kind: ErrorKind) {
        if let Some((part, _)) = self.open(blocks) {
            self.fail(part, LayerId(0), 0, kind);
            self.close(part);
        }
    }

    pub(super) fn layer(&mut self, part: usize, layer: LayerId, fence: Fence) {
        self.parts[part].layers = layer.0 + 1;
        self.fences[layer.0 as usize].push(fence);
    }

    /// A layer of the job failed: at most its first `good` blocks will be whole.
    pub(super) fn fail(&mut self, part: usize, layer: LayerId, good: usize, kind: ErrorKind) {
        let part = &mut self.parts[part];
        part.good = part.good.min(good);
        match part.failed {
            Some((first, _)) if first <= layer => {}
            _ => part.failed = Some((layer, kind)),
        }
    }

    pub(super) fn close(&mut self, part: usize) {
        self.parts[part].is_open = false;
    }

    /// The engine computed everything below `position`: what waits there is not loaded any more.
    /// Returns the positions just below it that are the engine's.
    pub(super) fn computed(&mut self, position: usize) -> Range<usize> {
        let end = position.clamp(self.first, self.first + self.blocks.len());
        let end = end.min(self.target.unwrap_or(end));
        let below = &mut self.blocks[..end - self.first];
        for block in below.iter_mut() {
            if matches!(block, Block::Waiting) {
                *block = Block::Computed;
            }
        }
        let own = below.iter().rev();
        let own = own.take_while(|block| matches!(block, Block::Computed));
        end - own.count()..end
    }

    pub(super) fn is_computed(&self, position: usize) -> bool {
        matches!(self.blocks[position - self.first], Block::Computed)
    }

    pub(super) fn is_settled(&self) -> bool {
        self.target.is_some() && self.parts.iter().all(|part| !part.is_open)
    }

    pub(super) fn answer(&self, layer: LayerId) -> Answer {
        let failures = self.parts.iter().filter_map(|part| part.failed);
        let failed = failures.filter(|(failed, _)| *failed <= layer);
        if let Some((_, kind)) = failed.min_by_key(|(failed, _)| *failed) {
            return Answer::Failed(kind);
        }
        let is_on_its_way = self.parts.iter().all(|part| part.layers > layer.0);
        match is_on_its_way && self.target.is_some() {
            true => Answer::Ready(self.fences[layer.0 as usize].clone()),
            false if self.is_settled() => Answer::Missing,
            false => Answer::Later,
        }
    }

    /// Leading blocks that are whole, in every layer: one past the last one.
    pub(super) fn whole(&self) -> usize {
        let target = self.target.unwrap_or(self.first);
        let coming = &self.blocks[..target.max(self.first) - self.first];
        let is_whole = |block: &&Block| match block {
            Block::Waiting => false,
            Block::Computed => true,
            Block::In { part, index, .. } => {
                let part = &self.parts[*part];
                *index < part.good && part.layers == self.layers()
            }
        };
        self.first + coming.iter().take_while(is_whole).count()
    }

    /// Is everything whole that was said to be coming?
    pub(super) fn is_whole(&self) -> bool {
        self.target.is_some_and(|target| self.whole() >= target)
    }

    /// Why less is whole than was asked for, if it is so.
    pub(super) fn why(&self, asked: usize) -> Option<ErrorKind> {
        let failures = self.parts.iter().filter_map(|part| part.failed);
        match failures.min_by_key(|(layer, _)| *layer) {
            Some((_, kind)) => Some(kind),
            None if self.whole() < asked => Some(self.cut.unwrap_or(ErrorKind::Unavailable)),
            None => None,
        }
    }

    /// Of the blocks below `end`, those that came from `tier`.
    pub(super) fn came_from(&self, tier: Tier, end: usize) -> usize {
        let below = self.blocks[..end - self.first].iter();
        let came = |block: &&Block| matches!(block, Block::In { from, .. } if *from == tier);
        below.filter(came).count()
    }

    /// Of the blocks below `end`, those that the engine computed.
    pub(super) fn own(&self, end: usize) -> usize {
        let below = self.blocks[..end - self.first].iter();
        below
            .filter(|block| matches!(block, Block::Computed))
            .count()
    }

    /// Slabs that were moved.
    pub(super) fn slabs(&self) -> usize {
        let slabs = |part: &Part| part.blocks * part.layers as usize;
        self.parts.iter().map(slabs).sum()
    }
}

/// Shown: what is whole, and what a layer answers, as jobs come, fail and are overtaken.
#[cfg(test)]
mod tests {
    use super::*;

    fn ready(progress: &Progress, layer: u32) -> bool {
        matches!(progress.answer(LayerId(layer)), Answer::Ready(_))
    }

    #[test]
    fn a_layer_is_ready_once_every_job_has_it_and_a_block_is_whole_once_its_job_has_all() {
        let mut progress = Progress::new(2..6, 2);
        let (one, taken) = progress
            .open(&[(2, Tier::Host), (3, Tier::Host)])
            .expect("they wait");
        assert_eq!(taken, [2, 3]);
        progress.layer(one, LayerId(0), Fence::reached());
        assert!(!ready(&progress, 0), "more may come");
        let (two, _) = progress
            .open(&[(4, Tier::Disk), (5, Tier::Disk)])
            .expect("they wait");
        progress.target = Some(6);
        assert!(!ready(&progress, 0));
        progress.layer(two, LayerId(0), Fence::reached());
        assert!(ready(&progress, 0) && !ready(&progress, 1));
        progress.layer(two, LayerId(1), Fence::reached());
        assert_eq!(progress.whole(), 2, "the first ones are not");
        progress.layer(one, LayerId(1), Fence::reached());
        assert!(ready(&progress, 1));
        assert_eq!(progress.whole(), 6);
        assert_eq!(progress.came_from(Tier::Disk, 6), 2);
        assert_eq!(progress.slabs(), 8);
        progress.fail(two, LayerId(1), 1, ErrorKind::Corrupt);
        assert_eq!(progress.whole(), 5, "those before the wrong one are");
        progress.fail(two, LayerId(1), 0, ErrorKind::Unavailable);
        assert_eq!(
            progress.whole(),
            4,
            "a layer may fail while it is under way"
        );
        assert!(matches!(progress.answer(LayerId(1)), Answer::Failed(_)));
        assert!(ready(&progress, 0));
    }

    #[test]
    fn what_waits_below_the_watermark_becomes_the_engines_and_what_was_submitted_does_not() {
        let mut progress = Progress::new(0..6, 1);
        let (one, _) = progress
            .open(&[0, 1].map(|at| (at, Tier::Host)))
            .expect("they wait");
        assert_eq!(progress.computed(4), 2..4);
        assert_eq!(progress.computed(1), 1..1, "in a job already");
        let (two, taken) = progress
            .open(&[3, 4, 5].map(|at| (at, Tier::Host)))
            .expect("two wait");
        assert_eq!(taken, [4, 5]);
        progress.take_back(two);
        assert_eq!(progress.computed(5), 2..5);
        assert!(progress.open(&[(4, Tier::Host)]).is_none());
        progress.layer(one, LayerId(0), Fence::reached());
        progress.target = Some(5);
        assert_eq!(progress.computed(6), 2..5, "nothing comes behind the end");
        assert!(ready(&progress, 0));
        assert_eq!((progress.whole(), progress.own(5)), (5, 3));
        assert!(!progress.is_settled());
        progress.close(one);
        assert!(progress.is_settled());
    }
}
