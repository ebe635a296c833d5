//! What the index and the hashes cost: nanoseconds and bytes a block.
//!
//! Small by default, so that it runs as a test and does not rot; `cargo bench --bench index` runs
//! it at full size: a tree of a million blocks built from the traces in `../shared/traces`
//! (`claude-code`, then `mooncake-conversation`), or from generated sessions where they are absent.
//!
//! - `index.lease`: match + pin + touch of a random known prefix of 64–512 blocks, its hashes ready.
//! - `index.unpin`: the end of that lease (no goal of its own).
//! - `index.insert`: claim + publish of 64–512 new blocks behind a random known prefix; the time for
//!   the known part is counted in.
//! - `index.memory`: live heap bytes a block after the tree was built, everything that the index
//!   owns counted, by a counting allocator.
//! - `index.hash_16`, `index.hash_64`: a prompt of 131,072 tokens, beside the bare chain of blake3
//!   compressions over the same bytes (its ceiling) in the same run.
//!
//! Not measured: contention of more threads than there are cores (8 threads are run all the same),
//! eviction, restoring.

mod harness;
mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use stemkv::index::Index;
use stemkv::{HashPath, Prompt};
use stemkv_store::{Key, SlotId, SystemClock};

use harness::{Goal, figure};
use support::{LEASE_BLOCKS, key, live_bytes, quantile, random, requests};

const ROOT: Key = Key([1; 32]);

fn main() {
    let is_large = std::env::args().any(|argument| argument == "--bench");
    let size = match is_large {
        true => Size {
            blocks: 1_000_000,
            leases: 4000,
            hash_runs: 101,
        },
        false => Size {
            blocks: 20_000,
            leases: 50,
            hash_runs: 3,
        },
    };
    println!("size: blocks={} leases={}", size.blocks, size.leases);
    hashes(&size);
    for source in ["claude-code", "mooncake-conversation"] {
        let requests = requests(source, size.blocks);
        tree(&size, source, requests);
    }
}

struct Size {
    blocks: usize,
    leases: usize,
    hash_runs: usize,
}

fn insert(index: &Arc<Index>, path: &mut Prompt<'_>, slots: &mut Vec<(usize, SlotId)>) -> usize {
    let mut claim = index.claim(path, usize::MAX);
    slots.clear();
    slots.extend(claim.positions().iter().map(|&i| (i, SlotId(i as u32))));
    claim.publish_all(slots);
    slots.len()
}

fn tree(size: &Size, source: &str, requests: Vec<Vec<u64>>) {
    let unique = requests
        .iter()
        .flatten()
        .max()
        .map_or(0, |&id| id as usize + 1);
    let keys: Vec<Key> = (0..unique as u64).map(key).collect();
    let path = |ids: &[u64]| -> Vec<Key> { ids.iter().map(|&id| keys[id as usize]).collect() };
    let mut slots = Vec::with_capacity(1 << 16);

    let before = live_bytes();
    let index = Arc::new(Index::new(Arc::new(SystemClock::default())));
    for request in &requests {
        insert(
            &index,
            &mut Prompt::from_hashes(ROOT, path(request)),
            &mut slots,
        );
    }
    let bytes = live_bytes() - before;
    let stats = index.stats();
    let blocks = stats.total.blocks;
    println!(
        "{source}: blocks={blocks} runs={} requests={}",
        stats.runs,
        requests.len()
    );
    figure(
        &format!("index.memory/{source}"),
        bytes as f64 / blocks as f64,
        "B/block",
        Goal::AtMost(100.0),
    );

    // Random known prefixes of 4k to 32k tokens, their hashes ready.
    let long: Vec<&Vec<u64>> = requests
        .iter()
        .filter(|request| request.len() >= LEASE_BLOCKS.start)
        .collect();
    let mut state = 11;
    let mut known_path = || {
        let request = long[random(&mut state, 0..long.len())];
        let len = random(
            &mut state,
            LEASE_BLOCKS.start..LEASE_BLOCKS.end.min(request.len() + 1),
        );
        path(&request[..len])
    };
    for threads in [1, 8] {
        let paths: Vec<Vec<Vec<Key>>> = (0..threads)
            .map(|_| (0..size.leases).map(|_| known_path()).collect())
            .collect();
        let mut leases = Vec::new();
        let mut ends = Vec::new();
        std::thread::scope(|scope| {
            let lease_all = |paths: Vec<Vec<Key>>| {
                let index = &index;
                move || {
                    let mut times = Vec::with_capacity(paths.len());
                    for path in paths {
                        let blocks = path.len();
                        let mut path = Prompt::from_hashes(ROOT, path);
                        let start = Instant::now();
                        let (pin, matched) = index.pin(&mut path);
                        let leased = start.elapsed();
                        assert_eq!(matched.blocks, blocks);
                        let start = Instant::now();
                        drop(pin);
                        let ended = start.elapsed();
                        let by_block =
                            |time: std::time::Duration| time.as_nanos() as f64 / blocks as f64;
                        times.push((by_block(leased), by_block(ended)));
                    }
                    times
                }
            };
            let workers: Vec<_> = paths
                .into_iter()
                .map(|paths| scope.spawn(lease_all(paths)))
                .collect();
            for worker in workers {
                let times = worker.join().expect("no lease panics");
                leases.extend(times.iter().map(|&(lease, _)| lease));
                ends.extend(times.iter().map(|&(_, end)| end));
            }
        });
        let name = format!("index.lease/{source}/{threads}_threads");
        figure(
            &name,
            quantile(&mut leases, 0.5),
            "ns/block",
            Goal::AtMost(60.0),
        );
        println!(
            "  p99 {:.1} ns/block; index.unpin {:.2} ns/block",
            quantile(&mut leases, 0.99),
            quantile(&mut ends, 0.5)
        );
    }

    let mut fresh = 1u64 << 40;
    for threads in [1, 8] {
        let mut work: Vec<Vec<Vec<Key>>> = Vec::new();
        for _ in 0..threads {
            let mut paths = Vec::new();
            for _ in 0..(size.leases / 8 / threads).max(10) {
                let mut path = known_path();
                let new = random(&mut fresh.clone(), LEASE_BLOCKS);
                path.truncate(path.len() / 2);
                path.extend((fresh..fresh + new as u64).map(key));
                fresh += new as u64;
                paths.push(path);
            }
            work.push(paths);
        }
        let mut times = Vec::new();
        std::thread::scope(|scope| {
            let insert_all = |paths: Vec<Vec<Key>>| {
                let index = &index;
                move || {
                    let mut slots = Vec::with_capacity(LEASE_BLOCKS.end * 2);
                    let time = |path: Vec<Key>| {
                        let mut path = Prompt::from_hashes(ROOT, path);
                        let start = Instant::now();
                        let blocks = insert(index, &mut path, &mut slots);
                        start.elapsed().as_nanos() as f64 / blocks as f64
                    };
                    paths.into_iter().map(time).collect::<Vec<_>>()
                }
            };
            let workers: Vec<_> = work
                .into_iter()
                .map(|paths| scope.spawn(insert_all(paths)))
                .collect();
            for worker in workers {
                times.extend(worker.join().expect("no insert panics"));
            }
        });
        let name = format!("index.insert/{source}/{threads}_threads");
        figure(
            &name,
            quantile(&mut times, 0.5),
            "ns/block",
            Goal::AtMost(250.0),
        );
        println!("  p99 {:.1} ns/block", quantile(&mut times, 0.99));
    }
    index.check();
}

fn hashes(size: &Size) {
    const TOKENS: usize = 131_072;
    let tokens: Vec<u32> = (0..TOKENS as u32)
        .map(|i| i.wrapping_mul(2_654_435_761))
        .collect();
    let bytes: Vec<u8> = tokens
        .iter()
        .flat_map(|token| token.to_le_bytes())
        .collect();
    for (block_tokens, goal_ms) in [(16, 0.8), (64, 0.65)] {
        let mut ours = Vec::new();
        let mut bare = Vec::new();
        for _ in 0..size.hash_runs {
            let start = Instant::now();
            let mut prompt = Prompt::tokens(ROOT, block_tokens, black_box(&tokens));
            prompt.hash_to(usize::MAX);
            ours.push(start.elapsed().as_secs_f64() * 1e3);
            let start = Instant::now();
            let chain = bare_chain(block_tokens as usize, black_box(&bytes));
            bare.push(start.elapsed().as_secs_f64() * 1e3);
            assert_eq!(
                prompt.hashed().last().map(|key| key.0),
                Some(chain),
                "the same hashes"
            );
        }
        let (ours, bare) = (quantile(&mut ours, 0.5), quantile(&mut bare, 0.5));
        figure(
            &format!("index.hash_{block_tokens}"),
            ours,
            "ms",
            Goal::AtMost(goal_ms),
        );
        let part = bare / ours * 100.0;
        figure(
            &format!("index.hash_{block_tokens}_of_bare"),
            part,
            "%",
            Goal::AtLeast(90.0),
        );
        println!("  bare chain {bare:.3} ms");
    }
}

/// The compressions alone: blake3's flags for one chunk of a keyed hash, 64 bytes each.
fn bare_chain(block_tokens: usize, bytes: &[u8]) -> [u8; 32] {
    const CHUNK_START: u8 = 1;
    const CHUNK_END: u8 = 2;
    const ROOT_FLAG: u8 = 8;
    const KEYED: u8 = 16;
    let platform = blake3::platform::Platform::detect();
    let mut cv = [u32::from_le_bytes([1; 4]); 8];
    for block in bytes.chunks_exact(block_tokens * 4) {
        let last = block.len() / 64 - 1;
        for (i, part) in block.chunks_exact(64).enumerate() {
            let start = if i == 0 { CHUNK_START } else { 0 };
            let end = if i == last { CHUNK_END | ROOT_FLAG } else { 0 };
            let part = part.try_into().expect("64 bytes");
            platform.compress_in_place(&mut cv, part, 64, 0, KEYED | start | end);
        }
    }
    let mut hash = [0; 32];
    for (bytes, word) in hash.chunks_exact_mut(4).zip(cv) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    hash
}
