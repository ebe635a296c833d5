//! Cuts what is wanted into reads: short neighbours in a file become one read, long images are cut so
//! that several reads are under way.
//!
//! A long image is not read together with its neighbours: a read into one place alone is what the
//! kernel makes with the least work, and what is between two images need not be read for it.

use super::PAGE;

/// Bytes between two images that are read rather than skipped. What RocksDB puts there (the end of
/// one block, padding, the head of the next) is one page, at most two.
pub(super) const GAP_BYTES_MAX: usize = 2 * PAGE;

/// One image that is wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// Equal for extents of one file.
    pub(super) file: usize,
    pub(super) offset: u64,
    pub(super) bytes: usize,
}

/// One read: consecutive bytes of a file, into several places.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) parts: Vec<Part>,
}

/// Where consecutive bytes of a read go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Into extent `index`, from its byte `from` on.
    Image {
        index: usize,
        from: usize,
        bytes: usize,
    },
    /// Nowhere.
    Gap { bytes: usize },
}

impl Part {
    pub(super) fn bytes(&self) -> usize {
        match *self {
            Part::Image { bytes, .. } | Part::Gap { bytes } => bytes,
        }
    }
}

impl Piece {
    pub(super) fn bytes(&self) -> usize {
        self.parts.iter().map(Part::bytes).sum()
    }
}

/// How long reads are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Bytes of one read, at most.
    pub(super) piece_bytes: usize,
    /// Images of so many bytes are read by themselves.
    pub(super) alone_bytes: usize,
}

/// The reads for `extents`, in their order. No read begins or ends with a gap.
pub(super) fn plan(extents: &[Extent], cut: Cut) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    // The file and end of the last piece, and how much more it may take.
    let (mut file, mut end, mut room) = (usize::MAX, 0, 0);
    for (index, extent) in extents.iter().enumerate() {
        if extent.bytes >= cut.alone_bytes || extent.bytes > cut.piece_bytes {
            pieces.extend(alone(index, extent, cut.piece_bytes));
            file = usize::MAX;
            continue;
        }
        let gap = (extent.file == file)
            .then(|| extent.offset.checked_sub(end))
            .flatten()
            .and_then(|gap| usize::try_from(gap).ok())
            .filter(|&gap| gap <= GAP_BYTES_MAX && gap + extent.bytes <= room);
        let image = Part::Image {
            index,
            from: 0,
            bytes: extent.bytes,
        };
        match (gap, pieces.last_mut()) {
            _ if extent.bytes == 0 => continue,
            (Some(gap), Some(piece)) => {
                if gap > 0 {
                    piece.parts.push(Part::Gap { bytes: gap });
                }
                piece.parts.push(image);
                room -= gap + extent.bytes;
            }
            _ => {
                pieces.push(Piece {
                    offset: extent.offset,
                    parts: vec![image],
                });
                room = cut.piece_bytes - extent.bytes;
            }
        }
        (file, end) = (extent.file, extent.offset + extent.bytes as u64);
    }
    pieces
}

/// One image in reads of about the same length.
fn alone(index: usize, extent: &Extent, piece_bytes: usize) -> impl Iterator<Item = Piece> + use<> {
    let (offset, whole) = (extent.offset, extent.bytes);
    let count = whole.div_ceil(piece_bytes).max(1);
    let step = whole.div_ceil(count).next_multiple_of(PAGE);
    (0..whole).step_by(step).map(move |from| Piece {
        offset: offset + from as u64,
        parts: vec![Part::Image {
            index,
            from,
            bytes: step.min(whole - from),
        }],
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent(file: usize, page: u64, pages: usize) -> Extent {
        Extent {
            file,
            offset: page * PAGE as u64,
            bytes: pages * PAGE,
        }
    }

    fn cut(piece_pages: usize, alone_pages: usize) -> Cut {
        Cut {
            piece_bytes: piece_pages * PAGE,
            alone_bytes: alone_pages * PAGE,
        }
    }

    #[test]
    fn neighbours_become_one_read_with_what_is_between_them() {
        let extents = [extent(0, 1, 4), extent(0, 6, 4), extent(0, 11, 4)];
        let image = |index| Part::Image {
            index,
            from: 0,
            bytes: 4 * PAGE,
        };
        let gap = Part::Gap { bytes: PAGE };
        assert_eq!(
            plan(&extents, cut(100, 100)),
            [Piece {
                offset: PAGE as u64,
                parts: vec![image(0), gap, image(1), gap, image(2)],
            }]
        );
    }

    #[test]
    fn distant_records_other_files_and_steps_back_begin_a_read() {
        for second in [extent(0, 8, 4), extent(1, 6, 4), extent(0, 0, 4)] {
            assert_eq!(plan(&[extent(0, 1, 4), second], cut(100, 100)).len(), 2);
        }
    }

    #[test]
    fn a_long_image_is_read_by_itself_in_parts_of_one_length() {
        let extents = [extent(0, 1, 2), extent(0, 4, 9), extent(0, 14, 2)];
        let pieces = plan(&extents, cut(4, 3));
        let lengths: Vec<_> = pieces.iter().map(|piece| piece.bytes() / PAGE).collect();
        assert_eq!(lengths, [2, 3, 3, 3, 2]);
        assert!(pieces.iter().all(|piece| piece.parts.len() == 1));
    }

    proptest! {
        /// Every byte that is wanted is read exactly once, from where it is; reads begin in order.
        #[test]
        fn every_byte_is_read_once_from_where_it_is(
            steps in prop::collection::vec((0_usize..3, 0_u64..5, 1_usize..9), 0..20),
            piece_pages in 1_usize..12,
            alone_pages in 1_usize..12,
        ) {
            let mut at = [0; 3];
            let extents: Vec<_> = steps.iter().map(|&(file, gap, pages)| {
                let extent = extent(file, at[file] + gap, pages);
                at[file] += gap + pages as u64;
                extent
            }).collect();
            let pieces = plan(&extents, cut(piece_pages, alone_pages));
            let mut read: Vec<_> = extents.iter().map(|_| 0).collect();
            let mut first = 0;
            for piece in &pieces {
                prop_assert!((1..=piece_pages * PAGE).contains(&piece.bytes()));
                let ends = [piece.parts.first(), piece.parts.last()];
                for part in ends {
                    let is_image = matches!(part, Some(Part::Image { .. }));
                    prop_assert!(is_image);
                }
                let mut offset = piece.offset;
                for part in &piece.parts {
                    prop_assert!(part.bytes() % PAGE == 0 && part.bytes() > 0);
                    if let Part::Image { index, from, .. } = *part {
                        prop_assert!(index >= first, "order");
                        first = index;
                        prop_assert_eq!(read[index], from);
                        prop_assert_eq!(extents[index].offset + from as u64, offset);
                        read[index] += part.bytes();
                    }
                    offset += part.bytes() as u64;
                }
            }
            for (read, extent) in read.iter().zip(&extents) {
                prop_assert_eq!(*read, extent.bytes);
            }
        }
    }
}
