//! An engine small enough for tests: its "KV" of a token is a function of every token up to it, so
//! that bytes of any other prefix, layer, plane or position are noticed.

#![allow(
    dead_code,
    reason = "each test binary uses its own part of the support"
)]

pub mod devices;
#[cfg(feature = "rocksdb")]
pub mod filecalls;
#[cfg(feature = "sim")]
pub mod machine;
#[cfg(feature = "rocksdb")]
pub mod medium;

use std::sync::Mutex;

use stemkv::{Config, Namespace, OpenNamespace};
use stemkv_store::{Dtype, HostPages, KvGeometry, LayerId, PageId, PageTable};

/// Blocks of 4 tokens, 3 layers, K and V of 2 heads of 16 bytes: a chunk of 768 bytes.
pub fn geometry() -> KvGeometry {
    KvGeometry::gqa(3, 2, 8, Dtype::Bf16, 4).expect("a valid geometry")
}

/// A host tier of `chunks` chunks.
pub fn config(chunks: u64) -> Config {
    let slot = 4096 + geometry().payload_bytes().next_multiple_of(4096) as u64;
    Config::in_memory(geometry(), chunks * slot)
}

pub fn namespace() -> Namespace {
    Namespace::new("test-model", "1", "bytes", geometry())
}

/// Paged KV with an allocator, and the function that stands for a forward pass.
pub struct Engine {
    pub pages: HostPages,
    geometry: KvGeometry,
    page_tokens: usize,
    free: Mutex<Vec<PageId>>,
}

/// What a page is filled with before anything is computed or loaded.
pub const POISON: u8 = 0xA5;

impl Engine {
    /// `pages` pages of 2 tokens, poisoned.
    pub fn new(pages: u32) -> Self {
        Self::with_geometry(&geometry(), pages, 2)
    }

    pub fn with_geometry(geometry: &KvGeometry, pages: u32, page_tokens: u32) -> Self {
        let memory = HostPages::new(geometry, page_tokens, pages).expect("pages");
        let engine = Engine {
            pages: memory,
            geometry: geometry.clone(),
            page_tokens: page_tokens as usize,
            // Handed out backwards and with a stride, so that a prompt's pages are not in order.
            free: Mutex::new(
                (0..pages)
                    .rev()
                    .map(|page| PageId(page ^ 1))
                    .filter(|page| page.0 < pages)
                    .collect(),
            ),
        };
        for layer in engine.geometry.layer_ids() {
            engine.pages.write(layer, |planes| {
                planes.iter_mut().for_each(|plane| plane.fill(POISON))
            });
        }
        engine
    }

    /// Pages for `tokens` tokens, in no order.
    pub fn table(&self, tokens: usize) -> PageTable {
        let mut free = self
            .free
            .lock()
            .expect("no test panics while it holds this");
        let pages =
            (0..tokens.div_ceil(self.page_tokens)).map(|_| free.pop().expect("enough pages"));
        PageTable {
            kv: self.pages.paged(),
            pages: pages.collect(),
        }
    }

    /// Gives a table's pages back, poisoned.
    pub fn free(&self, table: PageTable) {
        for layer in self.geometry.layer_ids() {
            self.pages.write(layer, |planes| {
                for (plane, bytes) in planes.iter_mut().enumerate() {
                    let page_bytes = self.geometry.planes[plane].token_bytes() * self.page_tokens;
                    for page in table.pages.iter() {
                        bytes[page.0 as usize * page_bytes..][..page_bytes].fill(POISON);
                    }
                }
            });
        }
        self.free
            .lock()
            .expect("no test panics while it holds this")
            .extend(table.pages.iter());
    }

    /// "Computes" the KV of tokens `from..` of a prompt in every layer.
    pub fn compute(&self, table: &PageTable, tokens: &[u32], from: usize) {
        for layer in self.geometry.layer_ids() {
            self.compute_layer(table, tokens, from, layer);
        }
    }

    pub fn compute_layer(&self, table: &PageTable, tokens: &[u32], from: usize, layer: LayerId) {
        let states = prefix_states(tokens);
        self.pages.write(layer, |planes| {
            for (plane, bytes) in planes.iter_mut().enumerate() {
                let token_bytes = self.geometry.planes[plane].token_bytes();
                for (token, &state) in states.iter().enumerate().skip(from) {
                    let at = self.position(table, token, token_bytes);
                    fill(&mut bytes[at..at + token_bytes], state, layer, plane);
                }
            }
        });
    }

    /// Panics unless tokens `range` of the prompt have exactly the KV that [`Engine::compute`] gives.
    #[track_caller]
    pub fn verify(&self, table: &PageTable, tokens: &[u32], range: std::ops::Range<usize>) {
        for layer in self.geometry.layer_ids() {
            self.verify_layer(table, tokens, range.clone(), layer);
        }
    }

    #[track_caller]
    pub fn verify_layer(
        &self,
        table: &PageTable,
        tokens: &[u32],
        range: std::ops::Range<usize>,
        layer: LayerId,
    ) {
        let states = prefix_states(tokens);
        let wrong = self.pages.read(layer, |planes| {
            planes.iter().enumerate().find_map(|(plane, bytes)| {
                let token_bytes = self.geometry.planes[plane].token_bytes();
                let mut expected = vec![0; token_bytes];
                range.clone().find_map(|token| {
                    let at = self.position(table, token, token_bytes);
                    fill(&mut expected, states[token], layer, plane);
                    (bytes[at..at + token_bytes] != expected[..]).then_some((plane, token))
                })
            })
        });
        if let Some((plane, token)) = wrong {
            panic!("wrong KV at layer {layer}, plane {plane}, token {token} of {tokens:?}");
        }
    }

    /// Is a token's place still poisoned, in every layer?
    pub fn is_untouched(&self, table: &PageTable, token: usize) -> bool {
        self.geometry.layer_ids().all(|layer| {
            self.pages.read(layer, |planes| {
                planes.iter().enumerate().all(|(plane, bytes)| {
                    let token_bytes = self.geometry.planes[plane].token_bytes();
                    let at = self.position(table, token, token_bytes);
                    bytes[at..at + token_bytes]
                        .iter()
                        .all(|&byte| byte == POISON)
                })
            })
        })
    }

    fn position(&self, table: &PageTable, token: usize, token_bytes: usize) -> usize {
        let page = table.pages[token / self.page_tokens].0 as usize;
        (page * self.page_tokens + token % self.page_tokens) * token_bytes
    }
}

/// One number for each position, of all tokens up to it.
fn prefix_states(tokens: &[u32]) -> Vec<u64> {
    let mut state = 0x5151_5151_u64;
    tokens
        .iter()
        .map(|&token| {
            state = mix(state ^ u64::from(token).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            state
        })
        .collect()
}

fn fill(bytes: &mut [u8], state: u64, layer: LayerId, plane: usize) {
    let mut word = mix(state ^ (u64::from(layer.0) << 32) ^ (plane as u64 + 1));
    for chunk in bytes.chunks_mut(8) {
        word = mix(word);
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
}

pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Tokens of a prompt by name: equal names share, others differ from the first token on.
pub fn prompt(name: u32, tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|i| name * 100_000 + i).collect()
}

/// The prompt of a number: one of so many trunks, left at one of its blocks but the last four.
pub fn tree_prompt(number: u32, trunks: u64, tokens: usize) -> Vec<u32> {
    let random = mix(u64::from(number));
    let mut prompt = prompt((random % trunks) as u32, tokens);
    let fork = 4 * (random >> 8) as usize % (tokens - 16);
    for token in prompt.iter_mut().skip(fork) {
        *token += 1000 * (1 + number);
    }
    prompt
}

/// Saves a whole prompt and waits until its pages are free.
pub async fn save(
    cache: &stemkv::Cache,
    namespace: &OpenNamespace,
    engine: &Engine,
    tokens: &[u32],
) -> stemkv::Save {
    let table = engine.table(tokens.len());
    engine.compute(&table, tokens, 0);
    let save = cache
        .save(&mut namespace.prompt(tokens), table.clone())
        .expect("an open store");
    save.all_layers(stemkv_store::Fence::reached())
        .expect("every layer once");
    save.pages_free().wait().await.expect("the device works");
    engine.free(table);
    save
}

/// Saves a prompt and waits until it is durable; how many of its blocks are?
pub async fn save_durably(
    cache: &stemkv::Cache,
    namespace: &OpenNamespace,
    engine: &Engine,
    tokens: &[u32],
) -> usize {
    let save = save(cache, namespace, engine, tokens).await;
    save.durable().await.durable_blocks
}

/// Loads what is known of a prompt into fresh pages, compares every byte, and returns the report.
pub async fn load(
    cache: &stemkv::Cache,
    namespace: &OpenNamespace,
    engine: &Engine,
    tokens: &[u32],
) -> stemkv::LoadReport {
    let lease = cache
        .lease(&mut namespace.prompt(tokens))
        .expect("an open store");
    let table = engine.table(tokens.len());
    let load = cache
        .load(&lease, table.clone(), stemkv::LoadOptions::default())
        .expect("a valid load");
    let report = load.finish().await;
    engine.verify(&table, tokens, 0..report.tokens);
    engine.free(table);
    // A store without threads gets to what it planned with what came.
    tokio::task::yield_now().await;
    report
}
