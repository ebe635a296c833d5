//! Pages in ordinary host memory.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::{fmt, slice};

use memmap2::{MmapMut, MmapRaw};

use super::{Owner, PagedKv, PlaneStrides, Registration, check_counts};
use crate::{Error, KvGeometry, LayerId, Result};

/// Paged KV in ordinary host memory, for engines that run on the CPU: safe to read and write, and a
/// [`PagedKv`] for the store.
///
/// Each layer has a lock of its own: a transfer holds layer *l* while it copies layer *l*, so an
/// engine computes one layer while the next one is loaded. Do not wait for a transfer of a layer
/// from within a call that holds it.
pub struct HostPages {
    memory: Arc<HostMemory>,
    paged: PagedKv,
}

/// The pages' memory: one anonymous mapping, reached only under the layers' locks.
pub(super) struct HostMemory {
    memory: MmapRaw,
    /// Offset and bytes of each plane in each layer, layer-major.
    areas: Vec<Vec<Range<usize>>>,
    locks: Vec<RwLock<()>>,
}

/// Planes start on multiples of this: a cache line and the widest vector.
const PLANE_ALIGN: usize = 64;

impl HostPages {
    /// Allocates zeroed pages, NHD, page-major: `[page][token][token bytes]` for each plane and
    /// layer.
    ///
    /// # Errors
    /// `Invalid` for zero pages or tokens; `Unavailable` where the memory cannot be had.
    pub fn new(geometry: &KvGeometry, page_tokens: u32, pages: u32) -> Result<HostPages> {
        geometry.validate()?;
        check_counts(page_tokens, pages)?;
        let too_large = || {
            Error::invalid(
                "the pages do not fit into the address space: make fewer or smaller ones",
            )
            .with("page_tokens", page_tokens)
            .with("pages", pages)
        };
        let mut total = 0_usize;
        let mut areas = Vec::with_capacity(geometry.layers as usize);
        for _ in geometry.layer_ids() {
            let mut planes = Vec::with_capacity(geometry.planes.len());
            for plane in &geometry.planes {
                let bytes = plane
                    .token_bytes()
                    .checked_mul(page_tokens as usize)
                    .and_then(|page| page.checked_mul(pages as usize))
                    .ok_or_else(too_large)?;
                let end = total.checked_add(bytes).ok_or_else(too_large)?;
                planes.push(total..end);
                total = end
                    .checked_next_multiple_of(PLANE_ALIGN)
                    .ok_or_else(too_large)?;
            }
            areas.push(planes);
        }
        let memory = MmapMut::map_anon(total).map_err(|cause| {
            Error::unavailable("cannot allocate the pages: make fewer or smaller ones")
                .with("bytes", total)
                .caused_by(cause)
        })?;
        // Copies cross pages in random order: fewer, larger ones cost fewer table walks. Where the
        // system has none to give, ordinary ones do.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        let memory = Arc::new(HostMemory {
            memory: memory.into(),
            locks: areas.iter().map(|_| RwLock::new(())).collect(),
            areas,
        });
        let strides: Vec<_> = geometry
            .planes
            .iter()
            .map(|plane| PlaneStrides::nhd(plane, page_tokens))
            .collect();
        let start = memory.memory.as_mut_ptr().expose_provenance() as u64;
        let bases: Vec<u64> = (0..geometry.planes.len())
            .flat_map(|plane| {
                let areas = memory.areas.iter();
                areas.map(move |planes| start + planes[plane].start as u64)
            })
            .collect();
        let owner = Owner::Pages(Arc::clone(&memory));
        let paged = Registration::check(geometry, page_tokens, pages, &strides, &bases, owner)?;
        Ok(HostPages { memory, paged })
    }

    /// The store's view of the same pages.
    pub fn paged(&self) -> PagedKv {
        self.paged.clone()
    }

    /// Reads one layer: `read(planes)`, where `planes[p]` is plane `p` whole.
    ///
    /// # Panics
    /// Where there is no such layer.
    pub fn read<R>(&self, layer: LayerId, read: impl FnOnce(&[&[u8]]) -> R) -> R {
        let _shared = self.memory.read(layer);
        let planes: Vec<&[u8]> = self.memory.areas[layer.0 as usize]
            .iter()
            .map(|area| {
                // SAFETY: areas lie within the mapping, which is zeroed at first and lives as long
                // as `self`; while the lock is held for reading, nobody writes to this layer.
                unsafe { slice::from_raw_parts(self.memory.at(area.start), area.len()) }
            })
            .collect();
        read(&planes)
    }

    /// Writes one layer: `write(planes)`, where `planes[p]` is plane `p` whole.
    ///
    /// # Panics
    /// Where there is no such layer.
    pub fn write<R>(&self, layer: LayerId, write: impl FnOnce(&mut [&mut [u8]]) -> R) -> R {
        let _exclusive = self.memory.write(layer);
        let mut planes: Vec<&mut [u8]> = self.memory.areas[layer.0 as usize]
            .iter()
            .map(|area| {
                // SAFETY: as in `read`; the areas of a layer do not overlap, and while the lock is
                // held for writing, nobody else reads or writes this layer.
                unsafe { slice::from_raw_parts_mut(self.memory.at(area.start), area.len()) }
            })
            .collect();
        write(&mut planes)
    }
}

impl fmt::Debug for HostPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HostPages").field(&self.paged).finish()
    }
}

impl HostMemory {
    // The locks guard no data that a panic could leave half changed: KV bytes mean nothing to us.
    pub(super) fn read(&self, layer: LayerId) -> RwLockReadGuard<'_, ()> {
        let lock = self.locks[layer.0 as usize].read();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self, layer: LayerId) -> RwLockWriteGuard<'_, ()> {
        let lock = self.locks[layer.0 as usize].write();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < self.memory.len(), "areas lie within the mapping");
        self.memory.as_mut_ptr().wrapping_add(offset)
    }
}

/// Shown: what the layers' locks allow.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn host_pages_start_zeroed_and_aligned_and_keep_what_is_written() {
        let geometry = KvGeometry::gqa(2, 1, 5, Dtype::Bf16, 4).expect("valid");
        let pages = HostPages::new(&geometry, 3, 2).expect("room");
        for layer in geometry.layer_ids() {
            pages.read(layer, |planes| {
                assert_eq!(planes, [[0; 60], [0; 60]]);
                assert!(
                    planes
                        .iter()
                        .all(|plane| (plane.as_ptr() as usize).is_multiple_of(64))
                );
            });
        }
        // One layer is computed while another is loaded.
        pages.write(LayerId(0), |planes| {
            planes[1].fill(7);
            pages.write(LayerId(1), |planes| planes[0].fill(9));
        });
        pages.read(LayerId(0), |planes| assert_eq!(planes, [[0; 60], [7; 60]]));
        pages.read(LayerId(1), |planes| assert_eq!(planes, [[9; 60], [0; 60]]));
    }
}
