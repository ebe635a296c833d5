//! An engine's paged KV memory: where each page of each layer is.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::{fmt, slice};

use memmap2::{MmapMut, MmapRaw};

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

/// A stride and how often it is taken, plus one.
type Axis = (u64, u64);

/// What one plane of one layer covers, from its base.
#[derive(Clone, Copy)]
struct Shape {
    /// Bytes from the first to behind the last.
    bytes: u64,
    head_bytes: u64,
    /// Pages, tokens, heads.
    axes: [Axis; 3],
}

impl Shape {
    fn new(plane: &Plane, page_tokens: u32, pages: u32, strides: &PlaneStrides) -> Result<Self> {
        let axis = |stride: usize, count: u32| (stride as u64, u64::from(count));
        let head_bytes = u64::from(plane.head_bytes);
        let axes = [
            axis(strides.page, pages),
            axis(strides.token, page_tokens),
            axis(strides.head, plane.heads),
        ];
        let bytes = nested_span(head_bytes, &axes).ok_or_else(|| {
            Error::invalid("the strides of paged KV make pages, tokens or heads overlap")
                .with("strides", format_args!("{strides:?}"))
                .with("heads", plane.heads)
                .with("head_bytes", plane.head_bytes)
                .with("page_tokens", page_tokens)
                .with("pages", pages)
        })?;
        Ok(Shape {
            bytes,
            head_bytes,
            axes,
        })
    }

    /// Do the two, the other one `distance` behind this one, share no byte for certain?
    fn is_apart(&self, other: &Shape, distance: u64) -> bool {
        // Interleaved page by page, token by token or head by head: what both repeat along the same
        // axes, one behind the other, must nest within those. Whole steps of the outermost axis
        // change nothing.
        let interleaved = |shared: usize| {
            let (axes, inner) = self.axes.split_at(shared);
            let (other_axes, other_inner) = other.axes.split_at(shared);
            let repeated = axes.iter().filter(|&&(_, count)| count > 1);
            let rest = repeated
                .max()
                .map_or(distance, |(stride, _)| distance % stride);
            let span = nested_span(self.head_bytes, inner);
            let other_span = nested_span(other.head_bytes, other_inner);
            axes == other_axes
                && span.is_some_and(|span| rest >= span)
                && other_span.is_some_and(|span| nested_span(rest + span, axes).is_some())
        };
        distance >= self.bytes || (1..=3).any(interleaved)
    }
}

/// Bytes that items of `bytes` cover which are repeated along `axes`; `None` where they could
/// overlap: each axis must step over everything that the axes of smaller stride cover.
fn nested_span(bytes: u64, axes: &[Axis]) -> Option<u64> {
    let mut axes: Vec<Axis> = axes
        .iter()
        .copied()
        .filter(|&(_, count)| count > 1)
        .collect();
    axes.sort_unstable();
    axes.into_iter().try_fold(bytes, |span, (stride, count)| {
        (stride >= span).then_some(())?;
        stride.checked_mul(count - 1)?.checked_add(span)
    })
}

/// Does no (plane, layer) share a byte with another?
fn check_apart(areas: &mut [(Range<u64>, Shape)]) -> Result<()> {
    areas.sort_by_key(|(area, _)| area.start);
    for (index, (area, shape)) in areas.iter().enumerate() {
        let rest = areas[index + 1..].iter();
        for (other, other_shape) in rest.take_while(|(other, _)| other.start < area.end) {
            if !shape.is_apart(other_shape, other.start - area.start) {
                return Err(Error::invalid(
                    "two planes or layers of paged KV overlap: check the base addresses",
                )
                .with("base", format_args!("{:#x}", area.start))
                .with("other_base", format_args!("{:#x}", other.start)));
            }
        }
    }
    Ok(())
}

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
struct HostMemory {
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
    fn read(&self, layer: LayerId) -> RwLockReadGuard<'_, ()> {
        let lock = self.locks[layer.0 as usize].read();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, layer: LayerId) -> RwLockWriteGuard<'_, ()> {
        let lock = self.locks[layer.0 as usize].write();
        lock.unwrap_or_else(PoisonError::into_inner)
    }

    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < self.memory.len(), "areas lie within the mapping");
        self.memory.as_mut_ptr().wrapping_add(offset)
    }
}

/// Which pages hold a prompt: token `t` lives in `pages[t / page_tokens]`, at `t % page_tokens`.
#[derive(Clone, Debug)]
pub struct PageTable {
    /// The memory that the ids name.
    pub kv: PagedKv,
    /// In prompt order, from the prompt's first token.
    pub pages: Arc<[PageId]>,
}

impl PageTable {
    /// Do the pages of prompt positions `tokens` exist?
    ///
    /// # Errors
    /// `Invalid`, naming the first page that the table lacks or that is out of range. Entries
    /// outside of `tokens` are not looked at.
    pub fn check(&self, tokens: Range<u64>) -> Result<()> {
        if tokens.is_empty() {
            return Ok(());
        }
        let page_tokens = u64::from(self.kv.page_tokens());
        let first = tokens.start / page_tokens;
        let end = tokens.end.div_ceil(page_tokens);
        if end > self.pages.len() as u64 {
            return Err(
                Error::invalid("the page table is too short for the tokens to be moved")
                    .with("pages", self.pages.len())
                    .with("tokens", format_args!("{tokens:?}"))
                    .with("page_tokens", page_tokens),
            );
        }
        for index in first as usize..end as usize {
            if self.pages[index].0 >= self.kv.pages() {
                return Err(
                    Error::invalid("the page table names a page that does not exist")
                        .with("index", index)
                        .with("page", self.pages[index].0)
                        .with("pages", self.kv.pages()),
                );
            }
        }
        Ok(())
    }
}

/// Shown: which memory may be registered, against a set of every byte that it covers; and what the
/// locks of [`HostPages`] allow.
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

    #[test]
    fn a_table_is_checked_only_where_tokens_move() {
        let geometry = KvGeometry::gqa(1, 1, 8, Dtype::Bf16, 4).expect("valid");
        let pages = HostPages::new(&geometry, 4, 3).expect("room");
        let table = PageTable {
            kv: pages.paged(),
            pages: [9, 0, 2, 3].map(PageId).into(),
        };
        assert!(table.check(4..12).is_ok());
        assert!(table.check(16..16).is_ok());
        for (tokens, index) in [(3..5, "index=0"), (11..13, "index=3"), (4..17, "pages=4")] {
            let error = table.check(tokens).expect_err(index);
            assert!(error.to_string().contains(index), "{error}");
        }
    }

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
