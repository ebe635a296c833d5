//! Copies that do not read the destination into the cache first: a third less memory traffic for
//! bytes that nobody looks at soon.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
use std::ptr;

/// Shorter copies stay in the cache: streaming pays by the full line.
#[cfg(target_arch = "x86_64")]
const SHORTEST: usize = 1024;
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Copies `bytes` from `from` to `to`. Other threads see them after [`finish`].
///
/// # Safety
/// As [`ptr::copy_nonoverlapping`], and the caller calls [`finish`] before it tells anybody.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    if bytes < SHORTEST {
        // SAFETY: the caller promises what `copy_nonoverlapping` asks for.
        return unsafe { ptr::copy_nonoverlapping(from, to, bytes) };
    }
    let head = to.align_offset(LINE).min(bytes);
    let lines = (bytes - head) / LINE;
    let tail = head + lines * LINE;
    // SAFETY: head, lines and tail are the whole of `bytes`, in which both sides are valid and do
    // not overlap; `to + head` is aligned to a line, and SSE2 is part of x86-64.
    unsafe {
        ptr::copy_nonoverlapping(from, to, head);
        for at in (head..tail).step_by(LINE) {
            let source = from.add(at).cast::<__m128i>();
            let target = to.add(at).cast::<__m128i>();
            let line = [0, 1, 2, 3].map(|part| _mm_loadu_si128(source.add(part)));
            for (part, value) in line.into_iter().enumerate() {
                _mm_stream_si128(target.add(part), value);
            }
        }
        ptr::copy_nonoverlapping(from.add(tail), to.add(tail), bytes - tail);
    }
}

/// Orders every [`copy`] of this thread before whatever it does next.
#[cfg(target_arch = "x86_64")]
pub(super) fn finish() {
    // SAFETY: a fence that touches no memory; its SSE is part of x86-64.
    unsafe { _mm_sfence() }
}

/// Copies `bytes` from `from` to `to`.
///
/// # Safety
/// As [`ptr::copy_nonoverlapping`].
#[cfg(not(target_arch = "x86_64"))]
pub(super) unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: the caller promises what `copy_nonoverlapping` asks for.
    unsafe { ptr::copy_nonoverlapping(from, to, bytes) }
}

/// Nothing to order: [`copy`] is an ordinary one.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn finish() {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every alignment of both ends, around the shortest length that is streamed.
    #[test]
    fn every_byte_arrives_and_no_other_changes_at_any_alignment() {
        let source: Vec<u8> = (0..3000_u32).map(|i| (i * 7 + i / 256) as u8).collect();
        for start in 0..64 {
            for bytes in [0, 1, 63, 1023, 1024, 1025, 1087, 1088, 2048 + start] {
                let from = start * 5 % 64;
                let mut target = vec![0xa5; 3000];
                // SAFETY: both ranges are within their vectors, which do not overlap.
                unsafe {
                    copy(source[from..].as_ptr(), target[start..].as_mut_ptr(), bytes);
                }
                finish();
                let mut expected = vec![0xa5; 3000];
                expected[start..start + bytes].copy_from_slice(&source[from..from + bytes]);
                assert!(target == expected, "{bytes} bytes to {start}");
            }
        }
    }
}
