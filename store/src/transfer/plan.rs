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
