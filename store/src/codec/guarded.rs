//! Memory that is followed by a page which nobody may touch: reading or writing past its end ends the test.

use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};

/// Bytes whose last one is the last before such a page.
pub(super) struct Guarded {
    map: NonNull<u8>,
    map_bytes: usize,
    bytes: usize,
}

impl Guarded {
    pub(super) fn zeroed(bytes: usize) -> Guarded {
        // SAFETY: asks the system for a number.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let map_bytes = bytes.next_multiple_of(page) + page;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, wherever the system likes.
        let map = unsafe { libc::mmap(null_mut(), map_bytes, protection, flags, -1, 0) };
        assert_ne!(map, libc::MAP_FAILED, "memory");
        let last = map.wrapping_byte_add(map_bytes - page);
        // SAFETY: the last page of the mapping made above, which nothing points to yet.
        let guard = unsafe { libc::mprotect(last, page, libc::PROT_NONE) };
        assert_eq!(guard, 0, "a page can be closed");
        Guarded {
            map: NonNull::new(map.cast()).expect("a mapping is never at 0"),
            map_bytes,
            bytes,
        }
    }

    pub(super) fn copy_of(bytes: &[u8]) -> Guarded {
        let mut guarded = Guarded::zeroed(bytes.len());
        guarded.copy_from_slice(bytes);
        guarded
    }

    fn start(&self) -> NonNull<u8> {
        // SAFETY: sysconf as above; the bytes end where the last page begins, inside the mapping.
        unsafe {
            let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
            self.map.add(self.map_bytes - page - self.bytes)
        }
    }
}

impl Deref for Guarded {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` is followed by `bytes` mapped bytes that the system zeroed, which go with
        // `self` alone (`Drop`) and are written through `deref_mut` only.
        unsafe { NonNull::slice_from_raw_parts(self.start(), self.bytes).as_ref() }
    }
}

impl DerefMut for Guarded {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `self` is borrowed mutably as long as the slice lives.
        unsafe { NonNull::slice_from_raw_parts(self.start(), self.bytes).as_mut() }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the whole mapping, to which no borrow is left.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.map_bytes) };
    }
}
