//! An engine's paged KV memory: where each page of each layer is.

mod apart;
mod host;
mod table;

use std::fmt;
use std::sync::{Arc, RwLockReadGuard, RwLockWriteGuard};

use apart::{Shape, check_apart};
use host::HostMemory;
pub use host::HostPages;
pub use table::PageTable;

use crate::device::SlotPages;
use crate::{Error, KvGeometry, LayerId, Plane, Result};

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

impl PlaneStrides {
    /// Pages of `page_tokens` whole tokens, one after the other: `[page][token][head]`.
    pub fn nhd(plane: &Plane, page_tokens: u32) -> Self {
        PlaneStrides {
            page: plane.token_bytes() * page_tokens as usize,
            token: plane.token_bytes(),
            head: plane.head_bytes as usize,
        }
    }

    /// Pages whose heads are apart: `[page][head][token]`.
    pub fn hnd(plane: &Plane, page_tokens: u32) -> Self {
        PlaneStrides {
            page: plane.token_bytes() * page_tokens as usize,
            token: plane.head_bytes as usize,
            head: plane.head_bytes as usize * page_tokens as usize,
        }
    }
}

/// Engine pages as the store sees them. Clones share the registration.
#[derive(Clone)]
pub struct PagedKv(Arc<Registration>);

struct Registration {
    geometry: KvGeometry,
    page_tokens: u32,
    pages: u32,
    strides: Vec<PlaneStrides>,
    bases: Vec<u64>,
    owner: Owner,
}

/// Whose memory it is.
enum Owner {
    /// The engine's, as it promised.
    Engine,
    /// [`HostPages`].
    Pages(Arc<HostMemory>),
    /// Slots of the device tier.
    Slots(SlotPages),
}

impl PagedKv {
    /// Registers memory that an engine owns: one stride for each plane and one base address for
    /// each (plane, layer), plane-major, in the address space of the device that will copy.
    ///
    /// Pages, tokens and heads may nest in any order, and planes and layers may be interleaved at
    /// the same strides or within one page (K and V in one allocation, say).
    ///
    /// # Errors
    /// `Invalid` where strides overlap, a count is off or `page_tokens` is 0.
    ///
    /// # Safety
    /// Until every clone of the result and every transfer that names it is gone (also one whose
    /// handle was leaked):
    /// - each base is valid for reads and writes over `pages` pages at these strides, and the
    ///   memory is none of the store's;
    /// - the engine does not touch a page between handing it to a load or save and the fence that
    ///   gives it back, but to write a save's layer before its `written` fence, and reads a loaded
    ///   layer only behind that layer's fence;
    /// - it hands a page to a load only while no other transfer has it.
    pub unsafe fn register(
        geometry: &KvGeometry,
        page_tokens: u32,
        pages: u32,
        strides: &[PlaneStrides],
        bases: &[u64],
    ) -> Result<PagedKv> {
        Registration::check(geometry, page_tokens, pages, strides, bases, Owner::Engine)
    }

    /// The geometry of what the pages hold.
    pub fn geometry(&self) -> &KvGeometry {
        &self.0.geometry
    }

    /// Tokens of one page.
    pub fn page_tokens(&self) -> u32 {
        self.0.page_tokens
    }

    /// Number of pages.
    pub fn pages(&self) -> u32 {
        self.0.pages
    }

    /// The strides of `plane`, in every layer.
    pub fn strides(&self, plane: usize) -> PlaneStrides {
        self.0.strides[plane]
    }

    /// The address of `plane`'s first page in `layer`.
    pub fn base(&self, plane: usize, layer: LayerId) -> u64 {
        self.0.bases[plane * self.0.geometry.layers as usize + layer.0 as usize]
    }

    /// Do both name one registration?
    pub fn is_same(&self, other: &PagedKv) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Slots of the device tier as pages of one block: a whole chunk each, every layer in it.
    pub(crate) fn of_slots(slots: SlotPages, base: u64, pages: u32) -> PagedKv {
        let geometry = slots.arena.geometry().clone();
        let strides = geometry.planes.iter().map(|plane| PlaneStrides {
            page: geometry.payload_bytes(),
            token: plane.token_bytes(),
            head: plane.head_bytes as usize,
        });
        let strides = strides.collect();
        let bases = (0..geometry.planes.len()).flat_map(|plane| {
            let (offset, stride) = (geometry.plane_offset(plane), geometry.slab_stride());
            (0..geometry.layers as usize).map(move |layer| base + (layer * stride + offset) as u64)
        });
        let bases = bases.collect();
        PagedKv(Arc::new(Registration {
            page_tokens: geometry.block_tokens,
            pages,
            strides,
            bases,
            geometry,
            owner: Owner::Slots(slots),
        }))
    }

    /// Is this memory that no GPU reaches?
    #[cfg(feature = "cuda")]
    pub(crate) fn is_host_memory(&self) -> bool {
        match &self.0.owner {
            Owner::Engine => false,
            Owner::Pages(_) => true,
            Owner::Slots(slots) => slots.arena.is_host_memory(),
        }
    }

    /// Are these slots of the device tier?
    pub(crate) fn are_slots(&self) -> bool {
        matches!(self.0.owner, Owner::Slots(_))
    }

    /// May a load write to them? Not to sealed slots.
    pub(crate) fn is_writable(&self) -> bool {
        match &self.0.owner {
            Owner::Engine | Owner::Pages(_) => true,
            Owner::Slots(slots) => slots.is_writable,
        }
    }

    /// Keeps everybody else out of `layer` while it is written. Of memory that is not ours the
    /// registration's promises do that.
    pub(crate) fn lock_for_writing(&self, layer: LayerId) -> Option<RwLockWriteGuard<'_, ()>> {
        match &self.0.owner {
            Owner::Engine => None,
            Owner::Pages(memory) => Some(memory.write(layer)),
            Owner::Slots(slots) => slots.arena.write(layer),
        }
    }

    /// Keeps writers out of `layer` while it is read.
    pub(crate) fn lock_for_reading(&self, layer: LayerId) -> Option<RwLockReadGuard<'_, ()>> {
        match &self.0.owner {
            Owner::Engine => None,
            Owner::Pages(memory) => Some(memory.read(layer)),
            Owner::Slots(slots) => slots.arena.read(layer),
        }
    }
}

impl fmt::Debug for PagedKv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagedKv")
            .field("pages", &self.0.pages)
            .field("page_tokens", &self.0.page_tokens)
            .field("strides", &self.0.strides)
            .finish_non_exhaustive()
    }
}

impl Registration {
    fn check(
        geometry: &KvGeometry,
        page_tokens: u32,
        pages: u32,
        strides: &[PlaneStrides],
        bases: &[u64],
        owner: Owner,
    ) -> Result<PagedKv> {
        geometry.validate()?;
        check_counts(page_tokens, pages)?;
        let planes = geometry.planes.len();
        let addresses = planes * geometry.layers as usize;
        if strides.len() != planes || bases.len() != addresses {
            return Err(Error::invalid(
                "paged KV needs one stride for each plane and one base for each plane and layer",
            )
            .with("strides", strides.len())
            .with("planes", planes)
            .with("bases", bases.len())
            .with("planes_times_layers", addresses));
        }
        let mut areas = Vec::with_capacity(addresses);
        for (index, (plane, strides)) in geometry.planes.iter().zip(strides).enumerate() {
            let shape = Shape::new(plane, page_tokens, pages, strides)
                .map_err(|error| error.with("plane", index))?;
            let layers = geometry.layers as usize;
            for &base in &bases[index * layers..(index + 1) * layers] {
                let end = base.checked_add(shape.bytes).filter(|_| base != 0);
                let end = end.ok_or_else(|| {
                    Error::invalid("a base address of paged KV is null or leaves the address space")
                        .with("plane", index)
                        .with("base", format_args!("{base:#x}"))
                })?;
                areas.push((base..end, shape));
            }
        }
        check_apart(&mut areas)?;
        Ok(PagedKv(Arc::new(Registration {
            geometry: geometry.clone(),
            page_tokens,
            pages,
            strides: strides.to_vec(),
            bases: bases.to_vec(),
            owner,
        })))
    }
}

fn check_counts(page_tokens: u32, pages: u32) -> Result<()> {
    if page_tokens == 0 || pages == 0 {
        return Err(
            Error::invalid("paged KV needs at least one page of at least one token")
                .with("page_tokens", page_tokens)
                .with("pages", pages),
        );
    }
    Ok(())
}

/// Shown: which memory may be registered, against a set of every byte that it covers.
#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::{Dtype, ErrorKind};

    fn register(
        geometry: &KvGeometry,
        page_tokens: u32,
        pages: u32,
        strides: &[PlaneStrides],
        bases: &[u64],
    ) -> Result<PagedKv> {
        // SAFETY: no transfer is made of it, so nothing is ever read or written there.
        unsafe { PagedKv::register(geometry, page_tokens, pages, strides, bases) }
    }

    /// Every byte of every plane and layer; `None` where one comes twice.
    fn bytes(
        geometry: &KvGeometry,
        page_tokens: u32,
        pages: u32,
        strides: &[PlaneStrides],
        bases: &[u64],
    ) -> Option<HashSet<u64>> {
        let mut all = HashSet::new();
        for (plane, shape) in geometry.planes.iter().enumerate() {
            for layer in 0..geometry.layers as usize {
                for page in 0..u64::from(pages) {
                    for token in 0..u64::from(page_tokens) {
                        for head in 0..u64::from(shape.heads) {
                            let start = bases[plane * geometry.layers as usize + layer]
                                + page * strides[plane].page as u64
                                + token * strides[plane].token as u64
                                + head * strides[plane].head as u64;
                            for byte in start..start + u64::from(shape.head_bytes) {
                                all.insert(byte).then_some(())?;
                            }
                        }
                    }
                }
            }
        }
        Some(all)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]
        /// Small numbers, so that many cases overlap and many do not.
        #[test]
        fn memory_that_is_accepted_has_no_byte_twice(
            heads in 1_u32..3, head_bytes in 1_u32..4, page_tokens in 1_u32..4, pages in 1_u32..4,
            steps in prop::collection::vec((1_usize..40, 1_usize..40, 1_usize..40), 2),
            same in any::<bool>(),
            bases in prop::collection::vec(1_u64..300, 4),
        ) {
            let plane = Plane { heads, head_bytes };
            let geometry = KvGeometry {
                layers: 2, planes: vec![plane, plane], block_tokens: 4, dtype: Dtype::Opaque,
            };
            let mut strides: Vec<_> = steps.into_iter()
                .map(|(page, token, head)| PlaneStrides { page, token, head })
                .collect();
            if same {
                strides[1] = strides[0];
            }
            let accepted = register(&geometry, page_tokens, pages, &strides, &bases).is_ok();
            let sound = bytes(&geometry, page_tokens, pages, &strides, &bases).is_some();
            prop_assert!(sound || !accepted);
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused_with_a_reason() {
        let geometry = KvGeometry::gqa(2, 2, 8, Dtype::Bf16, 4).expect("valid");
        let good = [PlaneStrides::nhd(&geometry.planes[0], 4); 2];
        let bases = [1000, 2000, 3000, 4000];
        assert!(register(&geometry, 4, 5, &good, &bases).is_ok());
        let short = PlaneStrides {
            token: 31,
            ..good[0]
        };
        let cases: [(&str, Result<PagedKv>); 7] = [
            (
                "at least one page",
                register(&geometry, 0, 5, &good, &bases),
            ),
            (
                "at least one page",
                register(&geometry, 4, 0, &good, &bases),
            ),
            (
                "one stride for each plane",
                register(&geometry, 4, 5, &good[1..], &bases),
            ),
            (
                "one stride for each plane",
                register(&geometry, 4, 5, &good, &bases[1..]),
            ),
            (
                "heads overlap",
                register(&geometry, 4, 5, &[short, good[1]], &bases),
            ),
            (
                "layers of paged KV overlap",
                register(&geometry, 4, 5, &good, &[1000, 2000, 3000, 3639]),
            ),
            (
                "address space",
                register(&geometry, 4, 5, &good, &[0, 2000, 3000, u64::MAX - 8]),
            ),
        ];
        for (reason, answer) in cases {
            let error = answer.expect_err(reason);
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(reason), "{reason}: {error}");
        }
    }
}
