//! Chunks of random bytes: no disk, controller or file system can make less of them.

use stemkv_store::{Checksummer, CodecId, Dtype, HostArena, Key, KvGeometry, RecordHeader, Slot};

/// A geometry whose chunks have `bytes` of payload: 256 KiB, 1 MiB or 2 MiB (Llama-3-8B's).
pub fn geometry(bytes: usize) -> KvGeometry {
    let layers = match bytes >> 10 {
        256 => 4,
        1024 => 16,
        2048 => 32,
        other => panic!("no geometry has chunks of {other} KiB"),
    };
    let geometry = KvGeometry::gqa(layers, 8, 128, Dtype::Bf16, 16).expect("valid");
    assert_eq!(geometry.payload_bytes(), bytes);
    geometry
}

pub fn root() -> Key {
    Key([0xbe; 32])
}

pub fn key(family: u64, depth: u32) -> Key {
    let mut key = [0x6b; 32];
    key[..8].copy_from_slice(&family.to_le_bytes());
    key[8..12].copy_from_slice(&depth.to_le_bytes());
    Key(key)
}

/// splitmix64 (Steele et al., 2014).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
    }
}

/// Blocks `depths` of prefix `family`, sealed in `arena`.
pub fn chain(arena: &HostArena, family: u64, depths: std::ops::Range<u32>) -> Vec<Slot> {
    let geometry = arena.geometry().clone();
    let slots = arena
        .allocate(geometry.payload_bytes(), depths.len())
        .expect("the arena is large enough");
    let mut random = Random(family << 32 | u64::from(depths.start));
    let chunks = slots.into_iter().zip(depths).map(|(mut slot, depth)| {
        let image = slot.image_mut().expect("ours alone");
        let payload = &mut image[RecordHeader::BYTES..][..geometry.payload_bytes()];
        random.fill(payload);
        let sums: Vec<_> = payload
            .chunks_exact(geometry.slab_stride())
            .map(|slab| Checksummer::of(&slab[..geometry.slab_bytes()]))
            .collect();
        for (layer, sum) in geometry.layer_ids().zip(sums) {
            slot.set_slab(layer, sum);
        }
        let header = RecordHeader {
            namespace: root(),
            parent: depth
                .checked_sub(1)
                .map_or(root(), |above| key(family, above)),
            key: key(family, depth),
            depth,
            tokens: geometry.block_tokens,
            geometry: geometry.fingerprint(),
            layers: 0..geometry.layers,
            codec: CodecId::Raw,
            slabs: Vec::new(),
        };
        slot.seal(header).expect("complete")
    });
    chunks.collect()
}
