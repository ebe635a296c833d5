//! An engine's paged KV memory: where each page of each layer is.

use std::sync::Arc;

use crate::{KvGeometry, LayerId, Result};

/// The number of a page in the engine's own paged memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(pub u32);

/// Byte distances within one layer of one plane.
///
/// The byte of (page, token, head) is at `page × page + token × token + head × head` from the
/// layer's base. Heads that lie next to each other (NHD: `head` = head bytes, `token` = token bytes)
/// make a page one piece; HND layouts have `head` > `token`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlaneStrides {
    /// Bytes from one page to the next.
    pub page: usize,
    /// Bytes from one token to the next within a page.
    pub token: usize,
    /// Bytes from one head to the next within a token.
    pub head: usize,
}

/// Engine pages as the store sees them. Clones share the registration.
#[derive(Clone)]
pub struct PagedKv(Arc<()>);

impl PagedKv {
    /// Registers memory that an engine owns: one base address for each (plane, layer), plane-major,
    /// in the address space of the device that will copy.
    ///
    /// # Errors
    /// `Invalid` where strides overlap, a count is off or `page_tokens` is 0.
    ///
    /// # Safety
    /// Until every clone of the result and every transfer that names it is gone (also one whose
    /// handle was leaked):
    /// - each base is valid for reads and writes over `pages` pages at these strides;
    /// - the engine does not touch a page between handing it to a load or save and the fence that
    ///   gives it back, but to write a save's layer before its `written` fence, and reads a loaded
    ///   layer only behind that layer's fence.
    pub unsafe fn register(
        geometry: &KvGeometry,
        page_tokens: u32,
        pages: u32,
        strides: &[PlaneStrides],
        bases: &[u64],
    ) -> Result<PagedKv> {
        let _ = (geometry, page_tokens, pages, strides, bases);
        unimplemented!()
    }

    /// Tokens of one page.
    pub fn page_tokens(&self) -> u32 {
        unimplemented!()
    }

    /// Number of pages.
    pub fn pages(&self) -> u32 {
        unimplemented!()
    }
}

/// Paged KV in ordinary host memory, for engines that run on the CPU: safe to read and write, and a
/// [`PagedKv`] for the store.
///
/// Each layer has a lock of its own: a transfer holds layer *l* while it copies layer *l*, so an
/// engine computes one layer while the next one is loaded.
pub struct HostPages(());

impl HostPages {
    /// Allocates zeroed pages, NHD, page-major: `[page][token][token bytes]` for each plane and
    /// layer.
    ///
    /// # Errors
    /// `Invalid` for zero pages or tokens.
    pub fn new(geometry: &KvGeometry, page_tokens: u32, pages: u32) -> Result<HostPages> {
        let _ = (geometry, page_tokens, pages);
        unimplemented!()
    }

    /// The store's view of the same pages.
    pub fn paged(&self) -> PagedKv {
        unimplemented!()
    }

    /// Reads one layer: `read(planes)`, where `planes[p]` is plane `p` whole.
    pub fn read<R>(&self, layer: LayerId, read: impl FnOnce(&[&[u8]]) -> R) -> R {
        let _ = (layer, read);
        unimplemented!()
    }

    /// Writes one layer: `write(planes)`, where `planes[p]` is plane `p` whole.
    pub fn write<R>(&self, layer: LayerId, write: impl FnOnce(&mut [&mut [u8]]) -> R) -> R {
        let _ = (layer, write);
        unimplemented!()
    }
}

/// Which pages hold a prompt: token `t` lives in `pages[t / page_tokens]`, at `t % page_tokens`.
#[derive(Clone)]
pub struct PageTable {
    /// The memory that the ids name.
    pub kv: PagedKv,
    /// In prompt order, from the prompt's first token.
    pub pages: Arc<[PageId]>,
}
