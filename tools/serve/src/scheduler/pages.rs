//! Which pages are free.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use stemkv_store::PageId;

/// The free pages.
pub(super) struct PagePool {
    free: Mutex<Vec<PageId>>,
    /// But for those that are lost.
    total: AtomicUsize,
}

/// Pages of one sequence; they go back to the pool when it is dropped.
pub(super) struct Pages {
    pool: Arc<PagePool>,
    ids: Arc<[PageId]>,
}

impl PagePool {
    pub(super) fn new(pages: u32) -> Arc<PagePool> {
        Arc::new(PagePool {
            free: Mutex::new((0..pages).rev().map(PageId).collect()),
            total: AtomicUsize::new(pages as usize),
        })
    }

    /// `count` pages, or none at all.
    pub(super) fn take(self: &Arc<Self>, count: usize) -> Option<Pages> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = free.len().checked_sub(count)?;
        Some(Pages {
            ids: free.split_off(rest).into(),
            pool: Arc::clone(self),
        })
    }

    /// All pages that are not lost.
    pub(super) fn total(&self) -> usize {
        self.total.load(Ordering::Relaxed)
    }

    pub(super) fn free(&self) -> usize {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.len()
    }
}

impl Pages {
    pub(super) fn ids(&self) -> &Arc<[PageId]> {
        &self.ids
    }

    /// Nobody may use them again: the pool has so many less.
    pub(super) fn lose(&mut self) {
        let lost = std::mem::take(&mut self.ids);
        self.pool.total.fetch_sub(lost.len(), Ordering::Relaxed);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let free = &self.pool.free;
        free.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(&self.ids);
    }
}
