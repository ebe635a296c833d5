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

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use stemkv::index::Index;
use stemkv::{HashPath, Prompt};
use stemkv_store::{Key, SlotId, SystemClock};

/// Counts live bytes.
struct Counting;

static LIVE_BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to `System` unchanged; counting touches no memory but a static.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE_BYTES.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's promises about `layout` are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `pointer` came from `alloc` or `realloc` above, hence from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        LIVE_BYTES.fetch_add(new_size, Relaxed);
        LIVE_BYTES.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as `dealloc`; `new_size` is the caller's, as `System` asks for.
        unsafe { System.realloc(pointer, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ROOT: Key = Key([1; 32]);
const LEASE_BLOCKS: std::ops::Range<usize> = 64..512;

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

fn figure(name: &str, value: f64, unit: &str, goal: f64, is_met: bool) {
    let met = if is_met { "met" } else { "short" };
    println!("figure {name} = {value:.3} {unit} (goal {goal} {unit}): {met}");
}

fn at_most(name: &str, value: f64, unit: &str, goal: f64) {
    figure(name, value, unit, goal, value <= goal);
}

/// The value that `part` of the values do not pass.
fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * part).round() as usize]
}

fn random(state: &mut u64, range: std::ops::Range<usize>) -> usize {
    // splitmix64 (Steele, Lea, Flood 2014).
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    range.start + ((z ^ (z >> 31)) % (range.end - range.start) as u64) as usize
}

fn key(id: u64) -> Key {
    Key(*blake3::hash(&id.to_le_bytes()).as_bytes())
}

/// Block ids of requests, until they hold `blocks` different ones.
fn requests(source: &str, blocks: usize) -> Vec<Vec<u64>> {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../shared/traces/{source}.jsonl.gz"));
    let Ok(file) = std::fs::File::open(file) else {
        println!("{source}: generated, as the trace is not there");
        return generated(blocks);
    };
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(file)
        .read_to_string(&mut text)
        .expect("the trace is gzip of text");
    let id = |value: &serde_json::Value| value.as_u64().expect("a block id");
    let mut requests: Vec<Vec<u64>> = Vec::new();
    let mut known = 0;
    for line in text.lines() {
        let request: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        let ids: Vec<u64> = match request["hash_ids"].as_array() {
            Some(list) => list.iter().map(id).collect(),
            None => {
                let runs = request["hash_runs"].as_array().expect("ids or runs");
                let run = |run: &serde_json::Value| id(&run[0])..id(&run[0]) + id(&run[1]);
                runs.iter().flat_map(run).collect()
            }
        };
        // Mooncake's blocks have 512 tokens: eight of ours.
        let ids = match source {
            "mooncake-conversation" => ids.iter().flat_map(|id| id * 8..id * 8 + 8).collect(),
            _ => ids,
        };
        // Ids are dense in order of first appearance.
        known = ids.iter().map(|id| id + 1).fold(known, u64::max);
        requests.push(ids);
        if known as usize >= blocks {
            break;
        }
    }
    requests
}

/// Sessions that share a system prompt of 100 blocks and grow by 20–90 blocks a turn.
fn generated(blocks: usize) -> Vec<Vec<u64>> {
    let mut state = 7;
    let mut fresh = 0u64..;
    let shared: Vec<u64> = fresh.by_ref().take(100).collect();
    let mut sessions = vec![shared.clone(); 64];
    let mut requests = Vec::new();
    while (fresh.start as usize) < blocks {
        let at = random(&mut state, 0..sessions.len());
        if sessions[at].len() > 2000 {
            sessions[at] = shared.clone();
        }
        let more = random(&mut state, 20..90);
        sessions[at].extend(fresh.by_ref().take(more));
        requests.push(sessions[at].clone());
    }
    requests
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

    let before = LIVE_BYTES.load(Relaxed);
    let index = Arc::new(Index::new(Arc::new(SystemClock::default())));
    for request in &requests {
        insert(
            &index,
            &mut Prompt::from_hashes(ROOT, path(request)),
            &mut slots,
        );
    }
    let bytes = LIVE_BYTES.load(Relaxed) - before;
    let stats = index.stats();
    let blocks = stats.total.blocks;
    println!(
        "{source}: blocks={blocks} runs={} requests={}",
        stats.runs,
        requests.len()
    );
    at_most(
        &format!("index.memory/{source}"),
        bytes as f64 / blocks as f64,
        "B/block",
        100.0,
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
        at_most(&name, quantile(&mut leases, 0.5), "ns/block", 60.0);
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
        at_most(&name, quantile(&mut times, 0.5), "ns/block", 250.0);
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
        at_most(&format!("index.hash_{block_tokens}"), ours, "ms", goal_ms);
        let part = bare / ours * 100.0;
        figure(
            &format!("index.hash_{block_tokens}_of_bare"),
            part,
            "%",
            90.0,
            part >= 90.0,
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
