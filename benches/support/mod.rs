//! What the benchmarks of the index and of its peers share: sequences, counting, printing.

#![allow(
    unreachable_pub,
    dead_code,
    reason = "a module of two programs, neither of which uses all of it"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use stemkv_store::Key;

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

/// Bytes on the heap now.
pub fn live_bytes() -> usize {
    LIVE_BYTES.load(Relaxed)
}

/// Where the traces are, from the folder of either program.
const TRACES: [&str; 2] = ["../shared/traces", "../../../shared/traces"];

/// Blocks of a lease: 4k to 32k tokens in blocks of 64.
pub const LEASE_BLOCKS: std::ops::Range<usize> = 64..512;

/// The value that `part` of the values do not pass.
pub fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * part).round() as usize]
}

/// A number out of `range`, from a state that is its seed.
pub fn random(state: &mut u64, range: std::ops::Range<usize>) -> usize {
    // splitmix64 (Steele, Lea, Flood 2014).
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    range.start + ((z ^ (z >> 31)) % (range.end - range.start) as u64) as usize
}

/// The key of a trace's block.
pub fn key(id: u64) -> Key {
    Key(*blake3::hash(&id.to_le_bytes()).as_bytes())
}

/// Block ids of requests, until they hold `blocks` different ones.
pub fn requests(source: &str, blocks: usize) -> Vec<Vec<u64>> {
    let open = |folder| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        std::fs::File::open(folder.join(format!("{source}.jsonl.gz"))).ok()
    };
    let Some(file) = TRACES.into_iter().find_map(open) else {
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
