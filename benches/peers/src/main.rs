//! stemkv's index beside its peers', on the same sequences, in one binary, on one thread.
//!
//! | program | what it is | what its lease is | what its insert is |
//! |---|---|---|---|
//! | stemkv `Index` | radix tree with pins, payload and recency | `pin` | `claim` + publish + release |
//! | kvbm-logical `BlockManager` | hash map of blocks with pins and recency: the fair comparison | `match_blocks` | `match_blocks` + `allocate_blocks` + `stage` + `register_blocks` + release |
//! | dynamo-kv-router `RadixTree` | which worker has which block: neither pins nor payload | `find_matches` | `apply_event` of the new blocks alone |
//!
//! Hashes are made before the clock starts. Bytes a block are live heap bytes after the tree was
//! built; the `BlockManager` allocates for its whole capacity, so its bytes are divided by that.
//! Small unless it is run with `--bench`.

#[path = "../../support/mod.rs"]
mod support;

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dynamo_kv_router::RadixTree;
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, RouterEvent,
};
use dynamo_tokens::PositionalLineageHash;
use kvbm_logical::{BlockManager, BlockRegistry};
use stemkv::Prompt;
use stemkv::index::Index;
use stemkv_store::{Key, SlotId, SystemClock};

use support::{LEASE_BLOCKS, live_bytes, quantile, random, requests};

const ROOT: Key = Key([1; 32]);
const BLOCK_TOKENS: usize = 64;

fn main() {
    let is_large = std::env::args().any(|argument| argument == "--bench");
    let (blocks, leases, inserts) = if is_large {
        (1_000_000, 4000, 500)
    } else {
        (20_000, 50, 10)
    };
    for source in ["claude-code", "mooncake-conversation"] {
        let work = Work::new(source, blocks, leases, inserts);
        println!(
            "{source}: blocks={} leases={leases} inserts={inserts}",
            work.unique
        );
        measure::<Ours>("stemkv", &work);
        measure::<Kvbm>("kvbm-logical 1.6.1 BlockManager", &work);
        measure::<Router>("dynamo-kv-router 1.6.1 RadixTree", &work);
    }
}

/// What every program is given: block ids, each naming its block and all before it.
struct Work {
    requests: Vec<Vec<u64>>,
    leases: Vec<Vec<u64>>,
    /// A known prefix and what is new behind it.
    inserts: Vec<(Vec<u64>, usize)>,
    unique: usize,
    capacity: usize,
}

impl Work {
    fn new(source: &str, blocks: usize, leases: usize, inserts: usize) -> Self {
        let requests = requests(source, blocks);
        let unique = requests
            .iter()
            .flatten()
            .max()
            .map_or(0, |&id| id as usize + 1);
        let is_long = |request: &&Vec<u64>| request.len() >= LEASE_BLOCKS.start;
        let long: Vec<&Vec<u64>> = requests.iter().filter(is_long).collect();
        let mut state = 11;
        let mut known = || {
            let request = long[random(&mut state, 0..long.len())];
            let end = LEASE_BLOCKS.end.min(request.len() + 1);
            request[..random(&mut state, LEASE_BLOCKS.start..end)].to_vec()
        };
        let leases = (0..leases).map(|_| known()).collect();
        let mut fresh = unique as u64;
        let mut seed = 13;
        let inserts: Vec<(Vec<u64>, usize)> = (0..inserts)
            .map(|_| {
                let mut path = known();
                path.truncate(path.len() / 2);
                let (at, new) = (path.len(), random(&mut seed, LEASE_BLOCKS) as u64);
                path.extend(fresh..fresh + new);
                fresh += new;
                (path, at)
            })
            .collect();
        Work {
            requests,
            leases,
            inserts,
            unique,
            capacity: fresh as usize,
        }
    }
}

/// A program under measurement.
trait Program {
    /// A path in its own form.
    type Path;
    fn new(capacity: usize) -> Self;
    fn path(ids: &[u64], known: usize) -> Self::Path;
    /// Finds a known path; its blocks, and the time without the release.
    fn lease(&mut self, path: Self::Path) -> (usize, Duration);
    fn insert(&mut self, path: Self::Path);
    /// Blocks that its memory was allocated for.
    fn blocks(work: &Work) -> usize {
        work.unique
    }
}

fn measure<P: Program>(name: &str, work: &Work) {
    let before = live_bytes();
    let mut program = P::new(work.capacity);
    let mut seen = 0;
    for request in &work.requests {
        // Ids are dense in order of first appearance: the known part is what was seen before.
        let known = request.partition_point(|&id| id < seen);
        seen = request.iter().map(|&id| id + 1).fold(seen, u64::max);
        program.insert(P::path(request, known));
    }
    let bytes = (live_bytes() - before) as f64 / P::blocks(work) as f64;
    let mut leases: Vec<f64> = Vec::new();
    for ids in &work.leases {
        let (blocks, time) = program.lease(P::path(ids, ids.len()));
        assert_eq!(blocks, ids.len(), "{name} knows the whole path");
        leases.push(time.as_nanos() as f64 / blocks as f64);
    }
    let mut inserts: Vec<f64> = Vec::new();
    for (ids, known) in &work.inserts {
        let path = P::path(ids, *known);
        let start = Instant::now();
        program.insert(path);
        inserts.push(start.elapsed().as_nanos() as f64 / (ids.len() - known) as f64);
    }
    println!(
        "  {name:<34} lease {:>7.1} ns/block (p99 {:>7.1})  insert {:>7.1} ns/block (p99 {:>7.1})  {bytes:>6.1} B/block",
        quantile(&mut leases, 0.5),
        quantile(&mut leases, 0.99),
        quantile(&mut inserts, 0.5),
        quantile(&mut inserts, 0.99),
    );
}

struct Ours(Arc<Index>);

impl Program for Ours {
    type Path = Prompt<'static>;

    fn new(_: usize) -> Self {
        Ours(Arc::new(Index::new(Arc::new(SystemClock::default()))))
    }

    fn path(ids: &[u64], _: usize) -> Self::Path {
        Prompt::from_hashes(ROOT, ids.iter().map(|&id| support::key(id)).collect())
    }

    fn lease(&mut self, mut path: Self::Path) -> (usize, Duration) {
        let start = Instant::now();
        let (_pin, matched) = self.0.pin(&mut path);
        (matched.blocks, start.elapsed())
    }

    fn insert(&mut self, mut path: Self::Path) {
        let mut claim = self.0.claim(&mut path, usize::MAX);
        let slots: Vec<_> = claim
            .positions()
            .iter()
            .map(|&i| (i, SlotId(i as u32)))
            .collect();
        claim.publish_all(&slots);
    }
}

fn hash64(id: u64) -> u64 {
    let bytes = support::key(id).0;
    u64::from_le_bytes(*bytes.first_chunk().expect("32 bytes"))
}

struct Kvbm(BlockManager<()>);

impl Program for Kvbm {
    type Path = Vec<PositionalLineageHash>;

    fn new(capacity: usize) -> Self {
        let manager = BlockManager::builder()
            .block_count(capacity)
            .block_size(BLOCK_TOKENS)
            .registry(BlockRegistry::new())
            .with_lru_backend()
            .build();
        Kvbm(manager.expect("a valid configuration"))
    }

    fn path(ids: &[u64], _: usize) -> Self::Path {
        let hash = |i: usize| {
            let parent = i.checked_sub(1).map(|parent| hash64(ids[parent]));
            PositionalLineageHash::new(hash64(ids[i]), parent, i as u64)
        };
        (0..ids.len()).map(hash).collect()
    }

    fn lease(&mut self, path: Self::Path) -> (usize, Duration) {
        let start = Instant::now();
        let blocks = self.0.match_blocks(&path);
        (blocks.len(), start.elapsed())
    }

    fn insert(&mut self, path: Self::Path) {
        let matched = self.0.match_blocks(&path);
        let new = &path[matched.len()..];
        let blocks = self.0.allocate_blocks(new.len()).expect("enough for all");
        let staged = blocks.into_iter().zip(new).map(|(block, &hash)| {
            let staged = block.stage(hash, BLOCK_TOKENS);
            staged.unwrap_or_else(|_| unreachable!("the block size is the manager's"))
        });
        black_box(self.0.register_blocks(staged.collect()));
    }

    fn blocks(work: &Work) -> usize {
        work.capacity
    }
}

struct Router {
    tree: RadixTree,
    events: u64,
}

struct RouterPath {
    local: Vec<LocalBlockHash>,
    store: KvCacheStoreData,
}

impl Program for Router {
    type Path = RouterPath;

    fn new(_: usize) -> Self {
        Router {
            tree: RadixTree::new(),
            events: 0,
        }
    }

    fn path(ids: &[u64], known: usize) -> Self::Path {
        let external = |&id: &u64| ExternalSequenceBlockHash(hash64(id));
        let local = |&id: &u64| LocalBlockHash(hash64(id));
        RouterPath {
            local: ids.iter().map(local).collect(),
            store: KvCacheStoreData {
                parent_hash: known.checked_sub(1).map(|parent| external(&ids[parent])),
                start_position: None,
                blocks: ids[known..]
                    .iter()
                    .map(|id| KvCacheStoredBlockData {
                        block_hash: external(id),
                        tokens_hash: local(id),
                        mm_extra_info: None,
                    })
                    .collect(),
            },
        }
    }

    fn lease(&mut self, path: Self::Path) -> (usize, Duration) {
        let start = Instant::now();
        let scores = self.tree.find_matches(path.local, false);
        let time = start.elapsed();
        let blocks = scores.scores.values().copied().max();
        (blocks.unwrap_or(0) as usize, time)
    }

    fn insert(&mut self, path: Self::Path) {
        if path.store.blocks.is_empty() {
            return;
        }
        self.events += 1;
        let event = KvCacheEvent {
            event_id: self.events,
            data: KvCacheEventData::Stored(path.store),
            dp_rank: 0,
        };
        let applied = self.tree.apply_event(RouterEvent::new(0, event));
        applied.expect("the parent was stored before");
    }
}
