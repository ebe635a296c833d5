//! Which bytes go where: computed once for a job, the same for each of its layers.

use crate::{PageTable, Result};

/// Rows of bytes that are evenly spaced on both sides.
///
/// Row `r` is at `slab_offset + r × pitch` of the slab and `page_offset + r × pitch` from the base
/// of its plane and layer, with the pitches of [`Plan::pitch`]. Pieces that are contiguous on
/// both sides have one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The plane.
    pub plane: u32,
    /// Number of rows, at least 1.
    pub rows: u32,
    /// Bytes of one row.
    pub row_bytes: u32,
    /// Where the first row is in the raw slab.
    pub slab_offset: u32,
    /// Where the first row is from the plane's base in the layer.
    pub page_offset: u64,
}

/// Distances between the rows of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pitch {
    /// In the slab.
    pub slab: usize,
    /// In the pages.
    pub page: usize,
}

/// The pieces of each move, for any one layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pieces: Vec<Piece>,
    /// Where the pieces of each move end.
    ends: Vec<usize>,
    /// By plane.
    pitches: Vec<Pitch>,
}

impl Plan {
    /// Plans the move of whole blocks whose first tokens are at prompt positions `blocks`, but for
    /// tokens below `from_token`.
    ///
    /// Pieces come in the order of the slab, so that a slab can be summed while it is copied; only
    /// the heads of one run of tokens, where pages keep heads apart, take turns.
    ///
    /// # Errors
    /// `Invalid` where the table does not cover a token that moves.
    pub fn new(
        table: &PageTable,
        blocks: impl IntoIterator<Item = u32>,
        from_token: u32,
    ) -> Result<Plan> {
        let geometry = table.kv.geometry();
        let page_tokens = u64::from(table.kv.page_tokens());
        let lanes: Vec<Lane> = (0..geometry.planes.len())
            .map(|plane| Lane::new(table, plane))
            .collect();
        let mut plan = Plan {
            pieces: Vec::new(),
            ends: Vec::new(),
            pitches: lanes.iter().map(|lane| lane.pitch).collect(),
        };
        for block in blocks {
            let block = u64::from(block);
            let end = block + u64::from(geometry.block_tokens);
            let tokens = block.max(u64::from(from_token)).min(end)..end;
            table.check(tokens.clone())?;
            for lane in &lanes {
                let mut run: Option<Run> = None;
                let mut at = tokens.start;
                while at < tokens.end {
                    let page = table.pages[(at / page_tokens) as usize];
                    let count = (page_tokens - at % page_tokens).min(tokens.end - at);
                    let next = Run {
                        token: (at - block) as usize,
                        page_offset: lane.page_offset(page.0, at % page_tokens),
                        tokens: count as usize,
                    };
                    run = match run {
                        Some(run) if run.is_followed_by(&next, lane.pitch.page) => Some(Run {
                            tokens: run.tokens + next.tokens,
                            ..run
                        }),
                        ended => {
                            lane.push(&mut plan.pieces, ended);
                            Some(next)
                        }
                    };
                    at += count;
                }
                lane.push(&mut plan.pieces, run);
            }
            plan.ends.push(plan.pieces.len());
        }
        Ok(plan)
    }

    /// Number of moves.
    pub fn moves(&self) -> usize {
        self.ends.len()
    }

    /// The pieces of one move; none where all of its tokens are left alone.
    pub fn pieces(&self, index: usize) -> &[Piece] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.pieces[start..self.ends[index]]
    }

    /// The distances between the rows of pieces of `plane`.
    pub fn pitch(&self, plane: u32) -> Pitch {
        self.pitches[plane as usize]
    }

    /// Bytes that move in one layer.
    pub fn bytes(&self) -> u64 {
        let bytes = |piece: &Piece| u64::from(piece.rows) * u64::from(piece.row_bytes);
        self.pieces.iter().map(bytes).sum()
    }
}

/// Tokens of one block that are evenly spaced in the pages.
#[derive(Clone, Copy)]
struct Run {
    /// The first one's number within the block.
    token: usize,
    /// Where it is, from the plane's base.
    page_offset: u64,
    tokens: usize,
}

impl Run {
    fn is_followed_by(&self, next: &Run, pitch: usize) -> bool {
        self.page_offset + (self.tokens * pitch) as u64 == next.page_offset
    }
}

/// One plane on both sides.
struct Lane {
    plane: u32,
    /// The plane's start in a raw slab.
    slab_start: usize,
    /// Bytes that lie next to each other on both sides in every token, and how many of them.
    part_bytes: usize,
    parts: usize,
    /// Bytes between the parts of a token in the pages.
    part_stride: usize,
    page_stride: usize,
    /// From one token to the next.
    pitch: Pitch,
}

impl Lane {
    fn new(table: &PageTable, plane: usize) -> Lane {
        let geometry = table.kv.geometry();
        let strides = table.kv.strides(plane);
        let shape = &geometry.planes[plane];
        let (head_bytes, heads) = (shape.head_bytes as usize, shape.heads as usize);
        let whole = heads == 1 || strides.head == head_bytes;
        Lane {
            plane: plane as u32,
            slab_start: geometry.plane_offset(plane),
            part_bytes: if whole {
                shape.token_bytes()
            } else {
                head_bytes
            },
            parts: if whole { 1 } else { heads },
            part_stride: strides.head,
            page_stride: strides.page,
            pitch: Pitch {
                slab: shape.token_bytes(),
                // In pages of one token the next token is the next page.
                page: match table.kv.page_tokens() {
                    1 => strides.page,
                    _ => strides.token,
                },
            },
        }
    }

    fn page_offset(&self, page: u32, token: u64) -> u64 {
        u64::from(page) * self.page_stride as u64 + token * self.pitch.page as u64
    }

    /// Appends the pieces of a run: one where tokens are contiguous on both sides, else one of a
    /// row for each token, for each part.
    fn push(&self, pieces: &mut Vec<Piece>, run: Option<Run>) {
        let Some(run) = run else { return };
        let slab_offset = self.slab_start + run.token * self.pitch.slab;
        let contiguous = self.part_bytes == self.pitch.slab && self.part_bytes == self.pitch.page;
        let (rows, row_bytes) = match contiguous {
            true => (1, run.tokens * self.part_bytes),
            false => (run.tokens, self.part_bytes),
        };
        pieces.extend((0..self.parts).map(|part| Piece {
            plane: self.plane,
            rows: rows as u32,
            row_bytes: row_bytes as u32,
            slab_offset: (slab_offset + part * self.part_bytes) as u32,
            page_offset: run.page_offset + (part * self.part_stride) as u64,
        }));
    }
}

/// Shown: that the pieces name every byte that moves once and at its place, against a model that asks
/// for one byte at a time; and how few there are where memory is contiguous.
#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::{Dtype, KvGeometry, PageId, PagedKv, Plane, PlaneStrides};

    /// A table over memory that does not exist.
    fn table(
        planes: &[Plane],
        block_tokens: u32,
        page_tokens: u32,
        strides: fn(&Plane, u32) -> PlaneStrides,
        ids: &[u32],
    ) -> PageTable {
        let geometry = KvGeometry {
            layers: 1,
            planes: planes.to_vec(),
            block_tokens,
            dtype: Dtype::Opaque,
        };
        let strides: Vec<_> = planes
            .iter()
            .map(|plane| strides(plane, page_tokens))
            .collect();
        let bases: Vec<u64> = (1..=planes.len() as u64).map(|plane| plane << 32).collect();
        // SAFETY: no transfer is made of it, so nothing is ever read or written there.
        let kv = unsafe { PagedKv::register(&geometry, page_tokens, PAGES, &strides, &bases) };
        PageTable {
            kv: kv.expect("does not overlap"),
            pages: ids.iter().copied().map(PageId).collect(),
        }
    }

    const PAGES: u32 = 64;
    const PLANE: Plane = Plane {
        heads: 4,
        head_bytes: 32,
    };

    fn pieces(table: &PageTable, block: u32, from: u32) -> Vec<(u32, u32)> {
        let plan = Plan::new(table, [block], from).expect("covered");
        let pieces = plan.pieces(0).iter();
        pieces.map(|piece| (piece.rows, piece.row_bytes)).collect()
    }

    #[test]
    fn what_is_contiguous_on_both_sides_is_one_piece() {
        let in_order: Vec<u32> = (3..19).collect();
        let nhd = table(&[PLANE], 64, 16, PlaneStrides::nhd, &in_order);
        assert_eq!(pieces(&nhd, 64, 0), [(1, 64 * 128)]);
        assert_eq!(pieces(&nhd, 8, 0), [(1, 64 * 128)], "not aligned to a page");
        assert_eq!(
            pieces(&nhd, 64, 100),
            [(1, 28 * 128)],
            "from within a block"
        );
        assert_eq!(pieces(&nhd, 64, 128), [], "all of it is left alone");
        let apart = table(&[PLANE], 64, 16, PlaneStrides::nhd, &[3, 4, 9, 8]);
        assert_eq!(
            pieces(&apart, 0, 0),
            [(1, 32 * 128), (1, 16 * 128), (1, 16 * 128)]
        );
        let larger = table(&[PLANE, PLANE], 16, 64, PlaneStrides::nhd, &[5]);
        assert_eq!(pieces(&larger, 32, 0), [(1, 16 * 128); 2]);
        let single = table(&[PLANE], 8, 1, PlaneStrides::nhd, &in_order);
        assert_eq!(pieces(&single, 0, 0), [(1, 8 * 128)], "pages of one token");
    }

    #[test]
    fn heads_that_are_apart_make_one_piece_each_in_each_run_of_tokens() {
        let hnd = table(&[PLANE], 32, 16, PlaneStrides::hnd, &[3, 4]);
        assert_eq!(pieces(&hnd, 0, 0), [(16, 32); 8]);
        let one_head = Plane { heads: 1, ..PLANE };
        let hnd = table(&[one_head], 32, 16, PlaneStrides::hnd, &[3, 4]);
        assert_eq!(
            pieces(&hnd, 0, 0),
            [(1, 32 * 32)],
            "one head is not apart from any"
        );
    }

    #[test]
    fn tokens_with_something_between_them_make_one_piece_of_rows() {
        let spaced = |plane: &Plane, page_tokens: u32| PlaneStrides {
            page: 2 * plane.token_bytes() * page_tokens as usize,
            token: 2 * plane.token_bytes(),
            head: plane.head_bytes as usize,
        };
        let table = table(&[PLANE], 32, 16, spaced, &[3, 4]);
        assert_eq!(pieces(&table, 0, 0), [(32, 128)]);
    }

    #[test]
    fn a_table_that_does_not_cover_the_tokens_is_invalid() {
        let table = table(&[PLANE], 32, 16, PlaneStrides::nhd, &[3, 4, PAGES]);
        assert!(Plan::new(&table, [0], 0).is_ok());
        assert!(Plan::new(&table, [16], 0).is_err());
        assert!(Plan::new(&table, [0, 16], 48).is_ok(), "nothing moves");
        assert!(Plan::new(&table, [u32::MAX], 0).is_err());
    }

    proptest! {
        #[test]
        fn the_pieces_name_every_byte_once_and_at_its_place(
            heads in 1_u32..4, head_bytes in 1_u32..6, second in any::<bool>(),
            block_tokens in 1_u32..20, page_tokens in 1_u32..12, layout in 0_usize..4,
            ids in Just((0..PAGES).collect::<Vec<u32>>()).prop_shuffle(), in_order in any::<bool>(),
            blocks in prop::collection::vec(0_u32..30, 1..4), from_token in 0_u32..50,
        ) {
            let layouts: [fn(&Plane, u32) -> PlaneStrides; 4] = [
                PlaneStrides::nhd,
                PlaneStrides::hnd,
                // Padded tokens, and heads outermost over all pages.
                |plane, page_tokens| PlaneStrides {
                    page: (plane.token_bytes() + 3) * page_tokens as usize,
                    token: plane.token_bytes() + 3,
                    head: plane.head_bytes as usize,
                },
                |plane, page_tokens| PlaneStrides {
                    page: plane.head_bytes as usize * page_tokens as usize,
                    token: plane.head_bytes as usize,
                    head: plane.head_bytes as usize * (page_tokens * PAGES) as usize,
                },
            ];
            let mut planes = vec![Plane { heads, head_bytes }];
            if second {
                planes.push(Plane { heads: 1, head_bytes: 7 });
            }
            let mut ids = ids;
            if in_order {
                ids.sort_unstable();
            }
            let table = table(&planes, block_tokens, page_tokens, layouts[layout], &ids);
            // The pages hold what may be asked for, or the plan says that they do not.
            let covered = blocks.iter().all(|block| {
                let end = block + block_tokens;
                end <= from_token || end.div_ceil(page_tokens) <= PAGES
            });
            let plan = Plan::new(&table, blocks.iter().copied(), from_token);
            prop_assert_eq!(plan.is_ok(), covered);
            let Ok(plan) = plan else { return Ok(()) };
            prop_assert_eq!(plan.moves(), blocks.len());
            let mut total = 0;
            for (index, &block) in blocks.iter().enumerate() {
                let mut expected = HashMap::new();
                let mut in_slab = 0_u64;
                for (plane, shape) in planes.iter().enumerate() {
                    let strides = table.kv.strides(plane);
                    for token in block..block + block_tokens {
                        for head in 0..shape.heads as usize {
                            for byte in 0..u64::from(shape.head_bytes) {
                                if token >= from_token {
                                    let page = ids[(token / page_tokens) as usize] as usize;
                                    let at = page * strides.page
                                        + (token % page_tokens) as usize * strides.token
                                        + head * strides.head;
                                    expected.insert(in_slab, (plane as u32, at as u64 + byte));
                                }
                                in_slab += 1;
                            }
                        }
                    }
                }
                for piece in plan.pieces(index) {
                    let pitch = plan.pitch(piece.plane);
                    for row in 0..u64::from(piece.rows) {
                        for byte in 0..u64::from(piece.row_bytes) {
                            let slab = u64::from(piece.slab_offset) + row * pitch.slab as u64 + byte;
                            let page = piece.page_offset + row * pitch.page as u64 + byte;
                            prop_assert_eq!(expected.remove(&slab), Some((piece.plane, page)));
                            total += 1;
                        }
                    }
                }
                prop_assert!(expected.is_empty(), "bytes are missing");
            }
            prop_assert_eq!(plan.bytes(), total);
        }
    }
}
