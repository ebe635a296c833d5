//! Which pages are free.

use std::sync::{Arc, Mutex, PoisonError};

use stemkv_store::PageId;

/// The free pages.
pub(super) struct PagePool {
    free: Mutex<Vec<PageId>>,
    total: usize,
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
            total: pages as usize,
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

    pub(super) fn total(&self) -> usize {
        self.total
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
}

impl Drop for Pages {
    fn drop(&mut self) {
        let free = &self.pool.free;
        free.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(&self.ids);
    }
}
