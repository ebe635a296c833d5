//! Shown: with one tier and capacity for N blocks, the index hits exactly as often as a
//! least-recently-used list of blocks does, although it keeps recency for runs.
//!
//! How: real request traces are replayed, and the hits counted in `expected.json` beside them must
//! come out to the last one. Where the traces are absent the test says so and a generated trace is
//! compared with a plain list instead, as it always is.

#![cfg(feature = "sim")]

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use stemkv::Prompt;
use stemkv::index::{Index, Pool};
use stemkv_store::{Key, SlotId, SystemClock};

const ROOT: Key = Key([3; 32]);

fn key(id: u64) -> Key {
    let mut key = [0; 32];
    // Spread over the first bytes, as a hash is.
    key[..8].copy_from_slice(&id.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    key[8..16].copy_from_slice(&id.to_le_bytes());
    Key(key)
}

/// Replays requests and returns the hits.
fn replay(requests: &[Vec<u64>], capacity: usize) -> usize {
    let index = Arc::new(Index::new(Arc::new(SystemClock::default())));
    let mut hits = 0;
    let mut resident = 0;
    for request in requests {
        let keys = request.iter().map(|&id| key(id)).collect();
        let mut path = Prompt::from_hashes(ROOT, keys);
        let (pin, matched) = index.pin(&mut path);
        hits += matched.blocks;
        let mut claim = index.claim(&mut path, request.len());
        assert_eq!(claim.positions().len(), request.len() - matched.blocks);
        let slots: Vec<_> = claim
            .positions()
            .iter()
            .map(|&i| (i, SlotId(i as u32)))
            .collect();
        claim.publish_all(&slots);
        resident += slots.len();
        drop((pin, claim));
        let evicted = index.evict(Pool::Host, resident.saturating_sub(capacity));
        resident -= evicted.len();
        assert!(resident <= capacity);
    }
    index.check();
    hits
}

/// A least-recently-used list of blocks: each request touches its blocks from leaf to root.
fn model(requests: &[Vec<u64>], capacity: usize) -> usize {
    let mut last_use: HashMap<u64, u64> = HashMap::new();
    let mut order: BTreeMap<u64, u64> = BTreeMap::new();
    let mut clock = 0;
    let mut hits = 0;
    for request in requests {
        hits += request
            .iter()
            .take_while(|&id| last_use.contains_key(id))
            .count();
        for &id in request.iter().rev() {
            clock += 1;
            if let Some(old) = last_use.insert(id, clock) {
                order.remove(&old);
            }
            order.insert(clock, id);
        }
        while order.len() > capacity {
            let (_, id) = order.pop_first().expect("not empty");
            last_use.remove(&id);
        }
    }
    hits
}

/// Conversations that share a start, go on, branch off and are cut short.
fn generated(seed: u64) -> Vec<Vec<u64>> {
    let mut state = seed;
    let mut random = move |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let mut fresh = 0..;
    let mut sessions: Vec<Vec<u64>> = vec![Vec::new()];
    let mut requests = Vec::new();
    for _ in 0..3000 {
        let mut path = sessions[random(sessions.len())].clone();
        if random(3) == 0 {
            path.truncate(random(path.len() + 1));
        }
        path.extend(fresh.by_ref().take(random(12)));
        if random(4) == 0 {
            sessions.push(path.clone());
        } else {
            let at = random(sessions.len());
            sessions[at] = path.clone();
        }
        requests.push(path);
    }
    requests
}

#[test]
fn hits_are_those_of_a_list_of_blocks_on_generated_requests() {
    for seed in 0..4 {
        let requests = generated(seed);
        for capacity in [1, 10, 100, 1000, usize::MAX] {
            let expected = model(&requests, capacity);
            assert_eq!(
                replay(&requests, capacity),
                expected,
                "seed={seed} capacity={capacity}"
            );
        }
    }
}

fn traces() -> Option<PathBuf> {
    let beside = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/traces");
    beside.join("expected.json").is_file().then_some(beside)
}

fn read_gz(path: &PathBuf) -> String {
    let file = std::fs::File::open(path).expect("the trace is there");
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(file)
        .read_to_string(&mut text)
        .expect("the trace is gzip of text");
    text
}

fn requests(text: &str) -> Vec<Vec<u64>> {
    let ids = |value: &serde_json::Value| value.as_u64().expect("a block id");
    text.lines()
        .map(|line| {
            let request: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
            if let Some(list) = request["hash_ids"].as_array() {
                return list.iter().map(ids).collect();
            }
            let runs = request["hash_runs"].as_array().expect("ids or runs");
            let run = |run: &serde_json::Value| ids(&run[0])..ids(&run[0]) + ids(&run[1]);
            runs.iter().flat_map(run).collect()
        })
        .collect()
}

#[test]
fn hits_on_real_traces_are_exactly_the_expected_ones() {
    let Some(folder) = traces() else {
        eprintln!("SKIPPED: no traces beside the repository; nothing was shown about them");
        return;
    };
    let expected = std::fs::read_to_string(folder.join("expected.json")).expect("it is there");
    let expected: serde_json::Value = serde_json::from_str(&expected).expect("JSON");
    for name in [
        "mooncake-conversation.jsonl.gz",
        "agent-hash-miniswe.jsonl.gz",
        "agent-hash-magagent.jsonl.gz",
        "tau-airline-hash.jsonl.gz",
    ] {
        let requests = requests(&read_gz(&folder.join(name)));
        let hits = &expected[name]["hits"];
        assert_eq!(replay(&requests, usize::MAX) as u64, hits["inf"], "{name}");
        for (capacity, hits) in hits["lru"].as_object().expect("by capacity") {
            let capacity = capacity.parse().expect("a number of blocks");
            assert_eq!(
                replay(&requests, capacity) as u64,
                *hits,
                "{name} at {capacity} blocks"
            );
        }
    }
}
