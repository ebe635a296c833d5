//! Real request traces through a whole store whose disk is full: what is written for each byte that
//! is kept, and how often blocks hit beside an exact list.
//!
//! Each request is leased, and its new blocks are saved, in file order; nothing is loaded, for that
//! writes nothing. The list is of blocks, least recently used first, each request touching its own from
//! the last to the first (so that no block outlives its parent). It has as many blocks as are live on
//! disk on average once that is full, and those of the host tier, which is small. What a list of the
//! disk's whole capacity would hit is printed beside it.
//!
//! A block of the trace is one chunk of 256 KiB here, less than a model's KV of so many tokens, so that
//! a replay takes minutes; payload files have 8 MiB then: 32 blocks, of two to four requests. With 32
//! MiB and the KV of a model of 8B a file holds half a block of the trace, and cleaning has less to do.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::path::Path;
use std::time::Instant;

use stemkv::{Cache, Config, DiskCodec, DiskConfig, HostCodec, Namespace};
use stemkv_store::{Dtype, Fence, HostPages, KvGeometry, PageId, PageTable, RecordHeader};

use crate::harness::{Goal, figure};
use crate::{Settings, write};

const BLOCK_TOKENS: u32 = 16;

/// Bytes of a batch, hence of a payload file.
const BATCH_BYTES: u64 = 8 << 20;

struct Trace {
    name: &'static str,
    /// As in a figure's name.
    short: &'static str,
    /// Blocks of the trace that are one chunk here.
    group: usize,
    /// The share of its unique blocks that the disk has room for.
    share: f64,
    /// Blocks of requests whose saves may wait: they are pinned in the host tier.
    waiting_max: usize,
}

const TRACES: [Trace; 2] = [
    Trace {
        name: "mooncake-conversation",
        short: "mooncake",
        group: 1,
        share: 0.1,
        waiting_max: 512,
    },
    Trace {
        name: "claude-code",
        short: "claude_code",
        group: 16,
        share: 0.05,
        waiting_max: 1024,
    },
];

pub fn run(settings: &Settings) {
    for trace in &TRACES {
        match requests(trace) {
            Some(mut requests) => {
                if settings.is_test {
                    requests.truncate(150);
                }
                replay(settings, trace, &requests);
            }
            None => println!("replay: {} is not there", trace.name),
        }
    }
}

fn geometry() -> KvGeometry {
    KvGeometry::gqa(4, 8, 128, Dtype::Bf16, BLOCK_TOKENS).expect("valid")
}

/// Block ids of each request; `None` where the trace is not there.
fn requests(trace: &Trace) -> Option<Vec<Vec<u32>>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/traces");
    let file = std::fs::File::open(folder.join(format!("{}.jsonl.gz", trace.name))).ok()?;
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(file)
        .read_to_string(&mut text)
        .expect("gzip of text");
    let id = |value: &serde_json::Value| value.as_u64().expect("a block id") as u32;
    let request = |line: &str| {
        let request: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
        let ids: Vec<u32> = match request["hash_ids"].as_array() {
            Some(ids) => ids.iter().map(id).collect(),
            None => {
                let runs = request["hash_runs"].as_array().expect("ids or runs");
                let run = |run: &serde_json::Value| id(&run[0])..id(&run[0]) + id(&run[1]);
                runs.iter().flat_map(run).collect()
            }
        };
        // An id names all that is before it, too.
        let whole = ids.chunks_exact(trace.group);
        whole.map(|group| group[trace.group - 1]).collect()
    };
    Some(text.lines().map(request).collect())
}

/// Hits of a list of `capacity` blocks.
fn hits_of_a_list(requests: &[Vec<u32>], capacity: usize) -> usize {
    let (mut last_use, mut order) = (HashMap::new(), BTreeMap::new());
    let (mut clock, mut hits) = (0_u64, 0);
    for request in requests {
        let known = request.iter().take_while(|id| last_use.contains_key(*id));
        hits += known.count();
        for &id in request.iter().rev() {
            clock += 1;
            if let Some(before) = last_use.insert(id, clock) {
                order.remove(&before);
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

/// What a full tier has written and holds.
#[derive(Default)]
struct Full {
    sent_bytes: u64,
    written_bytes: u64,
    /// Sums over requests, for means.
    requests: u64,
    live_bytes: u64,
    used_bytes: u64,
    records: u64,
    files_most: u64,
}

fn replay(settings: &Settings, trace: &Trace, requests: &[Vec<u32>]) {
    let geometry = geometry();
    let image_bytes = (geometry.payload_bytes() + RecordHeader::BYTES) as u64;
    let unique = requests.iter().flatten().max().map_or(0, |max| max + 1) as usize / trace.group;
    let capacity_bytes = ((unique as f64 * trace.share) as u64 * image_bytes).max(64 << 20);
    let longest = requests.iter().map(Vec::len).max().unwrap_or(0);
    let folder = settings.folder("replay");
    let mut disk = DiskConfig::new(folder.path().join("store"), capacity_bytes);
    disk.codec = DiskCodec::Raw;
    disk.batch_bytes = BATCH_BYTES;
    // Batches are sealed by size: a server's requests come faster than its files are written.
    disk.batch_delay_ms = 1000;
    let host_blocks = trace.waiting_max + longest;
    let mut config =
        Config::in_memory(geometry.clone(), host_blocks as u64 * image_bytes).with_disk(disk);
    config.host.codec = HostCodec::Raw;
    let cache = Cache::open(config).expect("opened");
    let namespace = cache
        .namespace(&Namespace::new("replay", "1", "ids", geometry.clone()))
        .expect("of this geometry");
    let pages = HostPages::new(&geometry, BLOCK_TOKENS, longest as u32).expect("memory");
    let table = |blocks: usize| PageTable {
        kv: pages.paged(),
        pages: (0..blocks as u32).map(PageId).collect(),
    };

    let begun = Instant::now();
    let (mut waiting, mut hits, mut full) = (0, 0, None::<Full>);
    let (mut sent_before, mut written_before) = (0, 0);
    for (number, request) in requests.iter().enumerate() {
        let tokens: Vec<u32> = request
            .iter()
            .flat_map(|&id| [id; BLOCK_TOKENS as usize])
            .collect();
        let mut prompt = namespace.prompt(&tokens);
        let lease = cache.lease(&mut prompt).expect("open");
        hits += lease.tokens() / BLOCK_TOKENS as usize;
        drop(lease);
        let save = cache.save(&mut prompt, table(request.len())).expect("open");
        save.all_layers(Fence::reached()).expect("each once");
        save.pages_free().wait_blocking().expect("a sound device");
        drop(save);
        waiting += request.len();
        if waiting > trace.waiting_max {
            cache.flush_blocking();
            waiting = 0;
        }
        if number % 16 == 0 {
            let stats = cache.stats();
            let usage = stats.disk.as_ref().expect("there is one");
            if full.is_none() && stats.counter("evicted_disk_blocks") > 0 {
                full = Some(Full::default());
                (sent_before, written_before) = (write::sent_bytes(), usage.written_bytes);
            }
            if let Some(full) = &mut full {
                full.sent_bytes = write::sent_bytes() - sent_before;
                full.written_bytes = usage.written_bytes - written_before;
                full.requests += 1;
                full.live_bytes += usage.live_bytes;
                full.used_bytes += usage.used_bytes;
                full.records += usage.records;
                full.files_most = full.files_most.max(usage.files);
            }
        }
    }
    cache.flush_blocking();
    let took = begun.elapsed().as_secs_f64();
    let stats = cache.stats();
    let usage = stats.disk.clone().expect("there is one");
    cache.close_blocking().expect("closed");
    let kept_out = ["declined_blocks", "undurable_blocks", "abandoned_blocks"];
    let kept_out = kept_out.map(|name| stats.counter(name));

    let full = full.unwrap_or_default();
    let mean = |sum: u64| sum as f64 / full.requests.max(1) as f64;
    let touches = requests.iter().map(Vec::len).sum::<usize>() as f64;
    let percent = |hits: usize| 100.0 * hits as f64 / touches;
    let same_blocks = mean(full.records) as usize + host_blocks;
    let of_same = percent(hits_of_a_list(requests, same_blocks));
    let capacity_blocks = (capacity_bytes / image_bytes) as usize;
    let of_capacity = percent(hits_of_a_list(requests, capacity_blocks));
    println!(
        "replay: {} in {took:.0} s, room for {capacity_blocks} of {unique} blocks; once full: {:.1} % of it \
         on disk, {:.1} % live, at most {} files",
        trace.name,
        100.0 * mean(full.used_bytes) / capacity_bytes as f64,
        100.0 * mean(full.live_bytes) / capacity_bytes as f64,
        full.files_most,
    );
    println!(
        "  saved {:.1} GB, cleaning moved {:.1} GB; blocks not kept {kept_out:?}; hits {:.2} %, of a list of as \
         many bytes {of_same:.2} %, of the capacity {of_capacity:.2} %",
        usage.written_bytes as f64 / 1e9,
        usage.rewritten_bytes as f64 / 1e9,
        percent(hits),
    );
    // Of the payload alone: header pages, padding, directories, index and log are amplification.
    let payload = full.written_bytes as f64 * geometry.payload_bytes() as f64 / image_bytes as f64;
    figure(
        &format!("disk.write_amplification_{}", trace.short),
        full.sent_bytes as f64 / payload,
        "bytes a payload byte",
        Goal::AtMost(1.3),
    );
    figure(
        &format!("disk.hits_below_lru_{}", trace.short),
        of_same - percent(hits),
        "points",
        Goal::AtMost(1.0),
    );
}
