//! Cuts what is wanted into reads: neighbours in a file become one long read, long ones are cut so
//! that several are under way.

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

/// The reads for `extents`, in their order, each of at most `piece_bytes`. No read begins or ends
/// with a gap.
pub(super) fn plan(extents: &[Extent], piece_bytes: usize) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    // The file and end of the last piece, and how much more it may take.
    let (mut file, mut end, mut room) = (usize::MAX, 0, 0);
    for (index, extent) in extents.iter().enumerate() {
        let gap = (extent.file == file)
            .then(|| extent.offset.checked_sub(end))
            .flatten()
            .and_then(|gap| usize::try_from(gap).ok())
            .filter(|&gap| gap <= GAP_BYTES_MAX && gap + PAGE <= room);
        match (gap, pieces.last_mut()) {
            (Some(0), Some(_)) => {}
            (Some(gap), Some(piece)) => {
                piece.parts.push(Part::Gap { bytes: gap });
                room -= gap;
            }
            _ => room = 0,
        }
        let mut from = 0;
        while from < extent.bytes {
            if room < PAGE {
                pieces.push(Piece {
                    offset: extent.offset + from as u64,
                    parts: Vec::new(),
                });
                room = piece_bytes;
            }
            let bytes = (extent.bytes - from).min(room);
            if let Some(piece) = pieces.last_mut() {
                piece.parts.push(Part::Image { index, from, bytes });
            }
            from += bytes;
            room -= bytes;
        }
        (file, end) = (extent.file, extent.offset + extent.bytes as u64);
    }
    pieces
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
            plan(&extents, 100 * PAGE),
            [Piece {
                offset: PAGE as u64,
                parts: vec![image(0), gap, image(1), gap, image(2)],
            }]
        );
    }

    #[test]
    fn distant_records_other_files_and_steps_back_begin_a_read() {
        for second in [extent(0, 8, 4), extent(1, 6, 4), extent(0, 0, 4)] {
            assert_eq!(plan(&[extent(0, 1, 4), second], 100 * PAGE).len(), 2);
        }
    }

    proptest! {
        /// Every byte that is wanted is read exactly once, from where it is; reads begin in order.
        #[test]
        fn every_byte_is_read_once_from_where_it_is(
            steps in prop::collection::vec((0_usize..3, 0_u64..5, 1_usize..9), 0..20),
            piece_pages in 1_usize..12,
        ) {
            let mut at = [0; 3];
            let extents: Vec<_> = steps.iter().map(|&(file, gap, pages)| {
                let extent = extent(file, at[file] + gap, pages);
                at[file] += gap + pages as u64;
                extent
            }).collect();
            let pieces = plan(&extents, piece_pages * PAGE);
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
