//! Do pages, tokens, heads, planes and layers share a byte anywhere?

use std::ops::Range;

use super::PlaneStrides;
use crate::{Error, Plane, Result};

/// A stride and how often it is taken, plus one.
type Axis = (u64, u64);

/// What one plane of one layer covers, from its base.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    /// Bytes from the first to behind the last.
    pub(super) bytes: u64,
    head_bytes: u64,
    /// Pages, tokens, heads.
    axes: [Axis; 3],
}

impl Shape {
    pub(super) fn new(
        plane: &Plane,
        page_tokens: u32,
        pages: u32,
        strides: &PlaneStrides,
    ) -> Result<Self> {
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
pub(super) fn check_apart(areas: &mut [(Range<u64>, Shape)]) -> Result<()> {
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
