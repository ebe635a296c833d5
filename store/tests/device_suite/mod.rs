//! What every `Device` must do, as functions over any device and its memory.
//!
//! Each case moves random bytes between slots and pages and compares the whole of both sides, byte by
//! byte, with a model that knows nothing of plans, pieces or pitches: it asks for the address of one
//! byte at a time. Destinations are poisoned first, so that a byte that was not written and a byte
//! that should not have been written both show. Seeds are in the name of each case that fails.

// Each test binary uses its own part of the suite.
#![allow(dead_code)]

pub(crate) mod device_tier;
pub(crate) mod encoded_loads;
pub(crate) mod encoded_saves;
pub(crate) mod jobs;
pub(crate) mod moves;
pub(crate) mod pages;
#[path = "../support/random.rs"]
mod random;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use moves::*;
use pages::*;
pub(crate) use random::Random;
use stemkv_store::*;

/// One allocation in the memory that a device copies from and to.
pub(crate) trait DeviceMemory: Send + Sync {
    /// Its first byte, in the device's address space.
    fn address(&self) -> u64;
    /// All of it, after everything that was submitted before.
    fn read(&self) -> Vec<u8>;
    /// Replaces all of it.
    fn write(&self, bytes: &[u8]);
}

/// A device under test and where its pages come from.
pub(crate) struct Subject<'a> {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) allocate: &'a dyn Fn(usize) -> Arc<dyn DeviceMemory>,
}

/// Ordinary memory, for devices that copy with the CPU.
pub(crate) struct HostMemory(Box<[AtomicU64]>);

impl HostMemory {
    pub(crate) fn new(bytes: usize) -> Self {
        HostMemory((0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect())
    }
}

impl DeviceMemory for HostMemory {
    fn address(&self) -> u64 {
        self.0.as_ptr().expose_provenance() as u64
    }
    fn read(&self) -> Vec<u8> {
        let words = self.0.iter();
        words
            .flat_map(|word| word.load(SeqCst).to_ne_bytes())
            .collect()
    }
    fn write(&self, bytes: &[u8]) {
        for (word, bytes) in self.0.iter().zip(bytes.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(whole), SeqCst);
        }
    }
}

impl Random {
    pub(crate) fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
    /// `count` different numbers below `n`.
    pub(crate) fn pick(&mut self, count: usize, n: usize) -> Vec<PageId> {
        let mut all: Vec<u32> = (0..n as u32).collect();
        for i in 0..count {
            let j = i + self.below(n - i);
            all.swap(i, j);
        }
        all[..count].iter().map(|&id| PageId(id)).collect()
    }
}

pub(crate) fn header(geometry: &KvGeometry, number: u8) -> RecordHeader {
    RecordHeader {
        namespace: Key([1; 32]),
        parent: Key([2; 32]),
        key: Key([number; 32]),
        depth: u32::from(number),
        tokens: geometry.block_tokens,
        geometry: geometry.fingerprint(),
        layers: 0..geometry.layers,
        codec: CodecId::Raw,
        slabs: Vec::new(),
    }
}

/// Geometries with every size of element, one and two planes, planes of different sizes, one head.
pub(crate) fn geometries() -> Vec<KvGeometry> {
    let two_sizes = KvGeometry {
        layers: 2,
        planes: vec![
            Plane {
                heads: 1,
                head_bytes: 72,
            },
            Plane {
                heads: 3,
                head_bytes: 8,
            },
        ],
        block_tokens: 12,
        dtype: Dtype::Bf16,
    };
    let gqa = |heads, dim, dtype| KvGeometry::gqa(2, heads, dim, dtype, 12).expect("valid");
    vec![
        gqa(3, 16, Dtype::Bf16),
        gqa(1, 8, Dtype::F16),
        gqa(2, 96, Dtype::F32),
        gqa(2, 24, Dtype::Fp8E4m3),
        gqa(2, 13, Dtype::Opaque),
        KvGeometry::mla(3, 576, Dtype::Bf16, 12).expect("valid"),
        two_sizes,
    ]
}

pub(crate) fn arena(geometry: &KvGeometry, slots: usize) -> HostArena {
    let slot = RecordHeader::BYTES + geometry.payload_bytes().next_multiple_of(4096);
    HostArena::open(geometry, slots * slot, |_, _| {}).expect("small")
}

fn assert_same(got: &[u8], expected: &[u8], case: &str) {
    if got != expected {
        let at = got
            .iter()
            .zip(expected)
            .position(|(got, expected)| got != expected);
        let wrong = got
            .iter()
            .zip(expected)
            .filter(|(got, expected)| got != expected);
        panic!(
            "{case}: {} bytes differ, the first at {at:?}",
            wrong.count()
        );
    }
}
