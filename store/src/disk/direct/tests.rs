//! Shown: whatever is wanted arrives, from where it is, in its own slot, on every transport; what
//! cannot be read fails alone or with its neighbours; no slot is let go of while it is read into.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use super::*;
use crate::{Dtype, HostArena, KvGeometry, RecordHeader};

const SLOTS: usize = 64;

fn arena() -> HostArena {
    let geometry = KvGeometry::gqa(4, 2, 32, Dtype::Bf16, 16).expect("valid");
    HostArena::open(&geometry, SLOTS * 64 * PAGE, |_, _| {}).expect("memory")
}

fn slot(arena: &HostArena, bytes: usize) -> Filling {
    let mut slots = arena.allocate(bytes - RecordHeader::BYTES, 1);
    slots.as_mut().and_then(Vec::pop).expect("room")
}

/// What is in a file at a page of it.
fn word(file: u64, page: u64) -> u64 {
    (file << 32 | page).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// A file of `pages` pages, each filled with its own word.
fn sample(dir: &tempfile::TempDir, number: u64, pages: u64) -> PathBuf {
    let path = dir.path().join(number.to_string());
    let words = (0..pages).flat_map(|page| [word(number, page); PAGE / 8]);
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    fs::write(&path, bytes).expect("space");
    path
}

/// Every way to read into `arena`: both transports, its memory registered or not, past the page cache
/// and through it, cut coarsely and finely.
fn ways(arena: &HostArena) -> impl Iterator<Item = (Direct, bool)> {
    let sizes = [
        ReadSizes::default(),
        ReadSizes {
            depth: 3,
            piece_bytes_max: 5 * PAGE,
            piece_bytes_min: PAGE,
        },
        ReadSizes {
            depth: 1,
            piece_bytes_max: PAGE,
            piece_bytes_min: PAGE,
        },
    ];
    let transports = [Transport::Ring, Transport::Threads];
    sizes.into_iter().flat_map(move |sizes| {
        transports.into_iter().flat_map(move |transport| {
            let ways = [(true, false), (true, true), (false, true)];
            ways.map(|(past_cache, is_attached)| {
                let direct = Direct::with(transport, sizes);
                if is_attached {
                    direct.attach(arena);
                }
                (direct, past_cache)
            })
        })
    })
}

#[test]
fn whatever_is_wanted_arrives_in_its_own_slot_on_every_transport() {
    // Not in /tmp alone: a tmpfs reads past no cache.
    let dir = tempfile::tempdir().expect("a folder");
    let paths = [sample(&dir, 0, 500), sample(&dir, 1, 500)];
    let arena = arena();
    for (direct, past_cache) in ways(&arena) {
        let files = paths
            .each_ref()
            .map(|path| Arc::new(DirectFile::open(path, past_cache).expect("there")));
        // Neighbours, pairs with a page between, steps back, both files.
        let places: Vec<(usize, u64, usize)> = (0..SLOTS as u64)
            .map(|i| {
                (
                    (i / 7 % 2) as usize,
                    (i * 13 + i % 3) % 480,
                    2 + (i % 11) as usize,
                )
            })
            .chain([(0, 0, 4), (0, 5, 4), (0, 9, 4), (0, 13, 60), (0, 74, 2)])
            .collect();
        for places in places.chunks(SLOTS / 2) {
            let wants = places.iter().map(|&(file, page, pages)| Want {
                file: files[file].clone(),
                offset: page * PAGE as u64,
                bytes: pages * PAGE,
                slot: slot(&arena, pages * PAGE),
            });
            let mut arrived = vec![0; places.len()];
            direct.read(wants.collect(), &mut |i, mut slot, outcome| {
                outcome.expect("it is there");
                let (file, page, pages) = places[i];
                let image = slot.image_mut().expect("ours alone");
                for (at, found) in image[..pages * PAGE].chunks_exact(8).enumerate() {
                    let expected = word(file as u64, page + (at / (PAGE / 8)) as u64);
                    assert_eq!(found, expected.to_le_bytes(), "word {at} of want {i}");
                }
                arrived[i] += 1;
            });
            assert_eq!(arrived, vec![1; places.len()]);
        }
        assert_eq!(arena.usage().filling_bytes, 0);
    }
}

#[test]
fn what_lies_behind_the_end_of_a_file_fails_and_what_lies_before_it_does_not() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = sample(&dir, 0, 10);
    // Half a page more: the end is on no page.
    let file = fs::File::options().append(true).open(&path).expect("there");
    file.write_all_at(&[7; PAGE / 2], 10 * PAGE as u64)
        .expect("space");
    let arena = arena();
    for (direct, past_cache) in ways(&arena) {
        let file = Arc::new(DirectFile::open(&path, past_cache).expect("there"));
        let want = |page: u64| Want {
            file: file.clone(),
            offset: page * PAGE as u64,
            bytes: 3 * PAGE,
            slot: slot(&arena, 3 * PAGE),
        };
        let mut outcomes = [None, None, None, None];
        // A file of its own for each read: nothing is merged.
        for (place, page) in [0, 7, 8, 50].into_iter().enumerate() {
            direct.read(vec![want(page)], &mut |_, _, outcome| {
                outcomes[place] = Some(outcome.map_err(|error| error.kind()));
            });
        }
        let end = io::ErrorKind::UnexpectedEof;
        assert_eq!(outcomes, [Ok(()), Ok(()), Err(end), Err(end)].map(Some));
    }
}

#[test]
fn what_is_not_aligned_or_too_long_for_its_slot_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = sample(&dir, 0, 10);
    let arena = arena();
    for (direct, past_cache) in ways(&arena) {
        let file = Arc::new(DirectFile::open(&path, past_cache).expect("there"));
        let want = |offset, bytes| Want {
            file: file.clone(),
            offset,
            bytes,
            slot: slot(&arena, 2 * PAGE),
        };
        let wants = vec![
            want(1, PAGE),
            want(0, 100),
            want(0, 3 * PAGE),
            want(0, 2 * PAGE),
        ];
        let mut outcomes = [None, None, None, None];
        direct.read(wants, &mut |i, _, outcome| {
            outcomes[i] = Some(outcome.map_err(|error| error.kind()));
        });
        let refused = Some(Err(io::ErrorKind::InvalidInput));
        assert_eq!(outcomes, [refused, refused, refused, Some(Ok(()))]);
    }
}

#[test]
fn a_panic_of_the_caller_ends_the_reads_and_frees_the_slots() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = sample(&dir, 0, 500);
    let arena = arena();
    for (direct, past_cache) in ways(&arena) {
        let file = Arc::new(DirectFile::open(&path, past_cache).expect("there"));
        let want = |i: u64| Want {
            file: file.clone(),
            offset: i * 11 * PAGE as u64,
            bytes: 8 * PAGE,
            slot: slot(&arena, 8 * PAGE),
        };
        let wants: Vec<_> = (0..40).map(want).collect();
        let mut answers = 0;
        let unwound = catch_unwind(AssertUnwindSafe(|| {
            direct.read(wants, &mut |_, _, _| {
                answers += 1;
                assert!(answers < 5, "the caller's own");
            });
        }));
        assert!(unwound.is_err());
        assert_eq!(arena.usage().filling_bytes, 0);
        // Nothing still writes: what is put there stays.
        let mut all = slot(&arena, SLOTS * 64 * PAGE);
        all.image_mut().expect("ours alone").fill(0);
        let mut arrived = 0;
        drop(all);
        direct.read((0..4).map(want).collect(), &mut |_, _, outcome| {
            outcome.expect("it is there");
            arrived += 1;
        });
        assert_eq!(arrived, 4);
    }
}

/// Refuses this thread to enter rings: always, or where it does not wait, which it does for its first reads.
fn refuse_rings(also_waiting: bool) {
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let (load, equals) = (
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
    );
    let answer = libc::BPF_RET | libc::BPF_K;
    let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    // `struct seccomp_data`: the call's number, and from byte 16 on its arguments.
    let mut filter = vec![
        statement(load, 0, 0, 0),
        statement(equals, libc::SYS_io_uring_enter as u32, 1, 0),
        statement(answer, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    if !also_waiting {
        filter.extend([
            // The third argument: completions to wait for.
            statement(load, 32, 0, 0),
            statement(equals, 0, 1, 0),
            statement(answer, libc::SECCOMP_RET_ALLOW, 0, 0),
        ]);
    }
    filter.push(statement(answer, refused, 0, 0));
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: both calls read their arguments alone, which live through them; what they change is what
    // this thread may ask the system for.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        let answer = libc::syscall(libc::SYS_seccomp, mode, 0, &raw const program);
        assert_eq!(answer, 0, "{}", io::Error::last_os_error());
    }
}

#[test]
fn where_a_ring_fails_threads_make_the_reads_that_it_has_not_begun_and_all_later_ones() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = sample(&dir, 0, 300);
    let sizes = ReadSizes {
        depth: 3,
        piece_bytes_max: 4 * PAGE,
        piece_bytes_min: PAGE,
    };
    // At once, and with reads under way.
    for at_once in [true, false] {
        let arena = arena();
        let direct = Direct::with(Transport::Ring, sizes);
        if direct.transport() != Transport::Ring {
            return println!("io_uring is refused here");
        }
        let file = Arc::new(DirectFile::open(&path, true).expect("there"));
        let read = || {
            let pages = 7;
            let wants = (0..30).map(|i| Want {
                file: file.clone(),
                offset: i * 10 * PAGE as u64,
                bytes: pages * PAGE,
                slot: slot(&arena, pages * PAGE),
            });
            let mut arrived = 0;
            direct.read(wants.collect(), &mut |i, mut slot, outcome| {
                outcome.expect("it is there");
                let image = slot.image_mut().expect("ours alone");
                for page in 0..pages {
                    let expected = word(0, (i * 10 + page) as u64).to_le_bytes();
                    assert_eq!(image[page * PAGE..][..8], expected, "page {page} of {i}");
                }
                arrived += 1;
            });
            assert_eq!(arrived, 30, "refused at once: {at_once}");
            assert_eq!(arena.usage().filling_bytes, 0);
        };
        // The filter is a thread's until its end.
        std::thread::scope(|scope| {
            let refused = scope.spawn(|| {
                refuse_rings(at_once);
                read();
            });
            refused.join().expect("no panic");
        });
        assert_eq!(direct.transport(), Transport::Threads);
        read();
    }
}

#[test]
fn a_ring_that_may_be_made_and_not_entered_is_not_taken() {
    let refused = std::thread::spawn(|| {
        refuse_rings(true);
        Direct::new().transport()
    });
    assert_eq!(refused.join().expect("no panic"), Transport::Threads);
}
