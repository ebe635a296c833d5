//! An engine's pages in the device's memory, with the address of every byte.

use super::*;

/// How an engine lays its pages out in one allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[layer][plane][page][token][head]`
    Nhd,
    /// `[layer][plane][page][head][token]`
    Hnd,
    /// `[layer][plane][head][page][token]`
    HeadsOutermost,
    /// `[layer][page][plane][token][head]`: K and V of a page in one allocation.
    PlanesInPage,
    /// `[layer][page][token][plane][head]`: K and V of a token side by side.
    PlanesInToken,
    /// `[page][layer][plane][token][head]`: a page holds every layer.
    LayersInPage,
    /// As `Nhd`, with 48 unused bytes behind each token and 80 behind each page.
    Padded,
}

pub(crate) const LAYOUTS: [Layout; 7] = [
    Layout::Nhd,
    Layout::Hnd,
    Layout::HeadsOutermost,
    Layout::PlanesInPage,
    Layout::PlanesInToken,
    Layout::LayersInPage,
    Layout::Padded,
];

/// Paged memory of a device, with the address of every single byte.
pub(crate) struct Pages {
    pub(crate) geometry: KvGeometry,
    pub(crate) page_tokens: usize,
    shape: Shape,
    pub(crate) memory: Arc<dyn DeviceMemory>,
    pub(crate) kv: PagedKv,
}

impl Pages {
    pub(crate) fn new(
        subject: &Subject<'_>,
        geometry: &KvGeometry,
        layout: Layout,
        page_tokens: usize,
        pages: usize,
    ) -> Self {
        let shape = Shape::of(geometry, layout, page_tokens, pages);
        let memory = (subject.allocate)(shape.total);
        let bases: Vec<u64> = shape
            .starts
            .iter()
            .flatten()
            .map(|&start| memory.address() + start as u64)
            .collect();
        // SAFETY: `Shape` keeps every byte within the allocation, which `Pages` owns and outlives
        // every transfer: the tests wait for fences before they drop it or look at it.
        let kv = unsafe {
            PagedKv::register(
                geometry,
                page_tokens as u32,
                pages as u32,
                &shape.strides,
                &bases,
            )
        };
        Pages {
            geometry: geometry.clone(),
            page_tokens,
            shape,
            memory,
            kv: kv.unwrap_or_else(|error| panic!("{layout:?}: {error}")),
        }
    }

    /// Where a byte of a token is in the allocation.
    fn at(&self, layer: usize, plane: usize, page: PageId, token: usize, byte: usize) -> usize {
        let head_bytes = self.geometry.planes[plane].head_bytes as usize;
        let strides = self.shape.strides[plane];
        self.shape.starts[plane][layer]
            + page.0 as usize * strides.page
            + token * strides.token
            + byte / head_bytes * strides.head
            + byte % head_bytes
    }

    /// (offset in the slab, offset in the allocation) of each byte of the block at prompt position
    /// `block`, but for tokens below `from`.
    pub(crate) fn bytes_of(
        &self,
        table: &[PageId],
        layer: usize,
        block: usize,
        from: usize,
    ) -> Vec<(usize, usize)> {
        let mut bytes = Vec::new();
        let mut in_slab = 0;
        for (plane, shape) in self.geometry.planes.iter().enumerate() {
            for token in block..block + self.geometry.block_tokens as usize {
                let page = table.get(token / self.page_tokens);
                for byte in 0..shape.token_bytes() {
                    if token >= from {
                        let page = *page.expect("the table covers the block");
                        let at = self.at(layer, plane, page, token % self.page_tokens, byte);
                        bytes.push((in_slab, at));
                    }
                    in_slab += 1;
                }
            }
        }
        bytes
    }
}

struct Shape {
    total: usize,
    strides: Vec<PlaneStrides>,
    /// By plane, by layer.
    starts: Vec<Vec<usize>>,
}

impl Shape {
    fn of(geometry: &KvGeometry, layout: Layout, page_tokens: usize, pages: usize) -> Shape {
        let layers = geometry.layers as usize;
        let token = |plane: &Plane| plane.token_bytes();
        let (token_pad, page_pad) = match layout {
            Layout::Padded => (48, 80),
            _ => (0, 0),
        };
        let all = geometry.token_bytes();
        let mut shape = Shape {
            total: 0,
            strides: Vec::new(),
            starts: Vec::new(),
        };
        // Bytes of all planes before this one, in one token.
        let mut before = 0;
        for plane in &geometry.planes {
            let (head, own) = (plane.head_bytes as usize, token(plane));
            let page = (own + token_pad) * page_tokens + page_pad;
            shape.strides.push(match layout {
                Layout::Nhd | Layout::Padded => PlaneStrides {
                    page,
                    token: own + token_pad,
                    head,
                },
                Layout::Hnd => PlaneStrides::hnd(plane, page_tokens as u32),
                Layout::HeadsOutermost => PlaneStrides {
                    page: head * page_tokens,
                    token: head,
                    head: head * page_tokens * pages,
                },
                Layout::PlanesInPage => PlaneStrides {
                    page: all * page_tokens,
                    token: own,
                    head,
                },
                Layout::PlanesInToken => PlaneStrides {
                    page: all * page_tokens,
                    token: all,
                    head,
                },
                Layout::LayersInPage => PlaneStrides {
                    page: all * page_tokens * layers,
                    token: own,
                    head,
                },
            });
            let padded_all = all + token_pad * geometry.planes.len();
            let whole_layer =
                padded_all * page_tokens * pages + page_pad * pages * geometry.planes.len();
            let plane_pads = shape.starts.len() * (token_pad * page_tokens + page_pad) * pages;
            shape.starts.push(
                (0..layers)
                    .map(|layer| match layout {
                        Layout::Nhd | Layout::Hnd | Layout::HeadsOutermost | Layout::Padded => {
                            layer * whole_layer + before * page_tokens * pages + plane_pads
                        }
                        Layout::PlanesInPage => layer * whole_layer + before * page_tokens,
                        Layout::PlanesInToken => layer * whole_layer + before,
                        Layout::LayersInPage => (layer * all + before) * page_tokens,
                    })
                    .collect(),
            );
            shape.total = whole_layer * layers;
            before += own;
        }
        shape
    }
}
