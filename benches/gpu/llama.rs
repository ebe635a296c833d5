//! The matrix products and the attention of Llama-3-8B's shape, with random weights.
//!
//! Attention is one fused kernel where `attention.py` has made it and the rows fill its blocks, else
//! batched products with a softmax between them.

use std::ffi::CString;

use crate::cuda::{Blas, Kernel, Kernels, Matrix, Memory, Stream};

pub(crate) const LAYERS: usize = 32;
const HIDDEN: usize = 4096;
const QKV: usize = 6144;
const FFN: usize = 14336;
const DIM: usize = 128;
const KV_HEADS: usize = 8;
const GROUP: usize = 4;
const LAYER_ELEMENTS: usize = HIDDEN * (QKV + HIDDEN + 3 * FFN);

pub(crate) struct Llama {
    blas: Blas,
    pub(crate) stream: Stream,
    weights: Memory,
    rows_max: usize,
    hidden: Memory,
    normed: Memory,
    qkv: Memory,
    queries: Memory,
    attended: Memory,
    joined: Memory,
    projected: Memory,
    ffn: Memory,
    gated: Memory,
    scores: Memory,
    kernels: Set,
    fused: Option<Fused>,
}

/// The kernel of `attention.py`.
struct Fused {
    kernel: Kernel,
    shared_bytes: u32,
    threads: u32,
    /// Rows of a block.
    rows: usize,
}

impl Fused {
    /// From the folder that the benchmark was started in; `None` where it is not there.
    fn open() -> Option<Fused> {
        let text = std::fs::read_to_string("attention.txt").ok()?;
        let words: Vec<&str> = text.split_whitespace().collect();
        let [name, shared, threads, rows] = words[..] else {
            return None;
        };
        let kernel = Kernels::open("attention.cubin")?.get(&CString::new(name).ok()?);
        let shared_bytes = shared.parse().ok()?;
        kernel.allow_shared(shared_bytes);
        Some(Fused {
            kernel,
            shared_bytes,
            threads: threads.parse().ok()?,
            rows: rows.parse().ok()?,
        })
    }
}

struct Set {
    norm: Kernel,
    gate: Kernel,
    softmax: Kernel,
    split: Kernel,
    join: Kernel,
    turn_page: Kernel,
    fill: Kernel,
}

/// Tokens in pages: the numbers of their pages on the GPU, in the order of the prompt.
#[derive(Clone, Copy)]
pub(crate) struct Paging {
    pub(crate) table: u64,
    pub(crate) page_bytes: usize,
}

/// The last product of a model: from activations to logits.
pub(crate) struct Head {
    weights: Memory,
    logits: Memory,
}

const VOCABULARY: usize = 32_000;

/// Where K and V of a layer are: tokens one after the other.
#[derive(Clone, Copy)]
pub(crate) struct LayerKv {
    pub(crate) keys: u64,
    pub(crate) values: u64,
}

impl Llama {
    /// For steps of up to `rows_max` tokens over `columns_max` tokens; `None` without cuBLAS.
    pub(crate) fn new(rows_max: usize, columns_max: usize) -> Option<Llama> {
        let stream = Stream::new();
        let blas = Blas::load(stream)?;
        let module = Kernels::load(include_str!("engine.ptx"));
        let rows = |columns: usize| Memory::new(rows_max * columns * 2);
        let llama = Llama {
            blas,
            stream,
            weights: Memory::new(LAYERS * LAYER_ELEMENTS * 2),
            rows_max,
            hidden: rows(HIDDEN),
            normed: rows(HIDDEN),
            qkv: rows(QKV),
            queries: rows(HIDDEN),
            attended: rows(HIDDEN),
            joined: rows(HIDDEN),
            projected: rows(HIDDEN),
            ffn: rows(2 * FFN),
            gated: rows(FFN),
            scores: Memory::new(KV_HEADS * GROUP * rows_max * columns_max.max(8) * 2),
            kernels: Set {
                norm: module.get(c"rms_norm"),
                gate: module.get(c"gate"),
                softmax: module.get(c"softmax"),
                split: module.get(c"split"),
                join: module.get(c"join"),
                turn_page: module.get(c"turn_page"),
                fill: module.get(c"fill"),
            },
            fused: Fused::open(),
        };
        // As large as keeps activations near 1: uniform, of variance 1 / columns.
        llama.fill(llama.weights.address, LAYERS * LAYER_ELEMENTS, 1, 1774);
        Some(llama)
    }

    /// Pseudo-random bf16 of about ±scale / 2¹⁶. Returns when they are there.
    pub(crate) fn fill(&self, address: u64, count: usize, seed: u64, scale: u64) {
        self.put(address, count, seed, scale);
        self.stream.synchronize();
    }

    /// [`Llama::fill`] without waiting.
    fn put(&self, address: u64, count: usize, seed: u64, scale: u64) {
        let parameters = [address, count as u64, seed, scale];
        // SAFETY: the caller names `count` values of its own GPU memory.
        unsafe {
            self.kernels
                .fill
                .launch(self.stream, 1024, 512, &parameters)
        };
    }

    /// Is attention over `rows` new tokens one kernel?
    pub(crate) fn is_fused(&self, rows: usize) -> bool {
        let fused = self.fused.as_ref();
        fused.is_some_and(|fused| rows.is_multiple_of(fused.rows))
    }

    /// Drops the fused kernel if what it computes differs from the products by more than rounding.
    pub(crate) fn check_fused(&mut self, rows: usize, first: usize, kv: LayerKv) {
        if !self.is_fused(rows) {
            println!("no fused attention here: batched products and a softmax");
            return;
        }
        let attended = |llama: &Llama| {
            llama.start(rows);
            llama.layer(0, rows, first, kv);
            llama.stream.synchronize();
            let mut bytes = vec![0; rows * HIDDEN * 2];
            llama.joined.read(0, &mut bytes);
            let value = |pair: &[u8]| {
                f32::from_bits(u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16)
            };
            bytes.chunks_exact(2).map(value).collect::<Vec<f32>>()
        };
        let ours = attended(self);
        let fused = self.fused.take();
        let products = attended(self);
        let size: f32 = products.iter().map(|value| value.abs()).sum();
        let pairs = ours.iter().zip(&products);
        let difference: f32 = pairs.map(|(a, b)| (a - b).abs()).sum::<f32>() / size;
        println!(
            "fused attention differs from products by {:.4} of the mean",
            difference
        );
        if difference < 0.05 {
            self.fused = fused;
        }
    }

    /// New activations at the bottom.
    pub(crate) fn start(&self, rows: usize) {
        self.begin(rows, 0);
        self.stream.synchronize();
    }

    /// [`Llama::start`] without waiting, for other tokens with each `seed`.
    pub(crate) fn begin(&self, rows: usize, seed: u64) {
        self.put(self.hidden.address, rows * HIDDEN, 2 + 2 * seed, 65536);
        self.put(self.projected.address, rows * HIDDEN, 3 + 2 * seed, 6554);
    }

    /// Brings `count` pages of a layer, from number `first` of the prompt on, to contiguous tokens, or
    /// back; does not wait.
    pub(crate) fn turn_pages(
        &self,
        paging: Paging,
        pages: LayerKv,
        tokens: LayerKv,
        (first, count): (usize, usize),
        back: bool,
    ) {
        let skipped = (first * paging.page_bytes) as u64;
        for (pages, tokens) in [(pages.keys, tokens.keys), (pages.values, tokens.values)] {
            let parameters = [
                pages,
                paging.table + first as u64 * 4,
                tokens + skipped,
                paging.page_bytes as u64,
                u64::from(back),
            ];
            if count > 0 {
                // SAFETY: the caller's pages and tokens have these places and live on.
                unsafe {
                    self.kernels
                        .turn_page
                        .launch(self.stream, count as u32, 512, &parameters)
                };
            }
        }
    }

    pub(crate) fn head(&self) -> Head {
        let head = Head {
            weights: Memory::new(VOCABULARY * HIDDEN * 2),
            logits: Memory::new(self.rows_max * VOCABULARY * 2),
        };
        self.fill(head.weights.address, VOCABULARY * HIDDEN, 4, 1774);
        head
    }

    /// The logits of every row, in bf16, behind all that is on the stream.
    pub(crate) fn logits(&self, head: &Head, rows: usize) -> Vec<u8> {
        let norm = [
            self.hidden.address,
            self.projected.address,
            self.normed.address,
            HIDDEN as u64,
        ];
        // SAFETY: all buffers were made for `rows_max` rows; everything is on one stream.
        unsafe {
            self.kernels
                .norm
                .launch(self.stream, rows as u32, 512, &norm)
        };
        self.project(
            rows,
            head.weights.address,
            HIDDEN,
            VOCABULARY,
            self.normed.address,
            head.logits.address,
        );
        self.stream.synchronize();
        let mut bytes = vec![0; rows * VOCABULARY * 2];
        head.logits.read(0, &mut bytes);
        bytes
    }

    /// Bytes of [`Llama::result`].
    pub(crate) fn result_bytes(rows: usize) -> usize {
        rows * HIDDEN * 2
    }

    /// Puts a copy of the activations on the stream.
    pub(crate) fn keep(&self, rows: usize, to: &Memory, offset: usize) {
        let bytes = Self::result_bytes(rows);
        assert!(offset + bytes <= to.bytes);
        // SAFETY: within both; the caller keeps `to` until the stream is done.
        unsafe {
            self.stream
                .copy(to.address + offset as u64, self.hidden.address, bytes)
        };
    }

    /// The activations, for comparison.
    pub(crate) fn result(&self, rows: usize) -> Vec<u8> {
        let mut bytes = vec![0; rows * HIDDEN * 2];
        self.stream.synchronize();
        self.hidden.read(0, &mut bytes);
        bytes
    }

    /// `out = in × weightsᵀ`.
    fn project(
        &self,
        rows: usize,
        weights: u64,
        inputs: usize,
        outputs: usize,
        from: u64,
        to: u64,
    ) {
        let matrix = |address, leading: usize, transposed| Matrix {
            address,
            leading: leading as i32,
            step: 0,
            transposed,
        };
        // SAFETY: all of it lies in memory of `self` that was made for `rows_max` rows.
        unsafe {
            self.blas.gemm(
                (outputs, rows, inputs),
                1.0,
                matrix(weights, inputs, true),
                matrix(from, inputs, false),
                matrix(to, outputs, false),
                1,
            );
        }
    }

    /// The products of one layer without attention: a decode step's weight traffic.
    pub(crate) fn products(&self, layer: usize, rows: usize) {
        let weights =
            |offset: usize| self.weights.address + ((layer * LAYER_ELEMENTS + offset) * 2) as u64;
        let (qkv, out) = (0, HIDDEN * QKV);
        let (up, down) = (
            out + HIDDEN * HIDDEN,
            out + HIDDEN * HIDDEN + 2 * HIDDEN * FFN,
        );
        self.project(
            rows,
            weights(qkv),
            HIDDEN,
            QKV,
            self.normed.address,
            self.qkv.address,
        );
        self.project(
            rows,
            weights(out),
            HIDDEN,
            HIDDEN,
            self.joined.address,
            self.projected.address,
        );
        self.project(
            rows,
            weights(up),
            HIDDEN,
            2 * FFN,
            self.normed.address,
            self.ffn.address,
        );
        self.project(
            rows,
            weights(down),
            FFN,
            HIDDEN,
            self.gated.address,
            self.projected.address,
        );
    }

    /// One whole layer for `rows` new tokens behind `first` cached ones.
    pub(crate) fn layer(&self, layer: usize, rows: usize, first: usize, kv: LayerKv) {
        assert!(rows <= self.rows_max);
        let weights =
            |offset: usize| self.weights.address + ((layer * LAYER_ELEMENTS + offset) * 2) as u64;
        let out = HIDDEN * QKV;
        let (up, down) = (
            out + HIDDEN * HIDDEN,
            out + HIDDEN * HIDDEN + 2 * HIDDEN * FFN,
        );
        let columns = first + rows;
        let norm = [
            self.hidden.address,
            self.projected.address,
            self.normed.address,
            HIDDEN as u64,
        ];
        let (stream, set) = (self.stream, &self.kernels);
        // SAFETY: all buffers were made for `rows_max` rows, and K and V for `columns` tokens by the
        // caller; everything is on one stream.
        unsafe {
            set.norm.launch(stream, rows as u32, 512, &norm);
            self.project(
                rows,
                weights(0),
                HIDDEN,
                QKV,
                self.normed.address,
                self.qkv.address,
            );
            let parts = [
                self.qkv.address,
                kv.keys,
                kv.values,
                self.queries.address,
                rows as u64,
                first as u64,
            ];
            set.split.launch(stream, rows as u32, 512, &parts);
            match &self.fused {
                Some(fused) if rows.is_multiple_of(fused.rows) => {
                    let blocks = ((rows / fused.rows) as u32, (KV_HEADS * GROUP) as u32);
                    // The last two are Triton's own and unused.
                    let parameters = [
                        self.queries.address,
                        kv.keys,
                        kv.values,
                        self.joined.address,
                        rows as u64,
                        first as u64,
                        0,
                        0,
                    ];
                    let (threads, shared) = (fused.threads, fused.shared_bytes);
                    fused
                        .kernel
                        .launch_in(stream, blocks, threads, shared, &parameters);
                }
                _ => self.attend(rows, columns, kv),
            }
            self.project(
                rows,
                weights(out),
                HIDDEN,
                HIDDEN,
                self.joined.address,
                self.projected.address,
            );
            set.norm.launch(stream, rows as u32, 512, &norm);
            self.project(
                rows,
                weights(up),
                HIDDEN,
                2 * FFN,
                self.normed.address,
                self.ffn.address,
            );
            let gate = [self.ffn.address, self.gated.address, FFN as u64];
            set.gate.launch(stream, rows as u32, 512, &gate);
            self.project(
                rows,
                weights(down),
                FFN,
                HIDDEN,
                self.gated.address,
                self.projected.address,
            );
        }
    }

    /// Attention by batched products.
    ///
    /// # Safety
    /// As for the rest of the layer: K and V have `columns` tokens.
    unsafe fn attend(&self, rows: usize, columns: usize, kv: LayerKv) {
        let (stream, set) = (self.stream, &self.kernels);
        // SAFETY: the caller's promise; the other buffers were made for `rows_max` rows.
        unsafe {
            let matrix = |address, leading: usize, step: usize, transposed| Matrix {
                address,
                leading: leading as i32,
                step: step as i64,
                transposed,
            };
            let heads = matrix(self.queries.address, DIM, GROUP * rows * DIM, false);
            let scores = matrix(self.scores.address, columns, GROUP * rows * columns, false);
            let keys = matrix(kv.keys, KV_HEADS * DIM, DIM, true);
            let values = matrix(kv.values, KV_HEADS * DIM, DIM, false);
            let attended = matrix(self.attended.address, DIM, GROUP * rows * DIM, false);
            let scale = 1.0 / (DIM as f32).sqrt();
            self.blas.gemm(
                (columns, GROUP * rows, DIM),
                scale,
                keys,
                heads,
                scores,
                KV_HEADS,
            );
            let softmax = [self.scores.address, columns as u64, rows as u64];
            set.softmax
                .launch(stream, (KV_HEADS * GROUP * rows) as u32, 512, &softmax);
            self.blas.gemm(
                (DIM, GROUP * rows, columns),
                1.0,
                values,
                scores,
                attended,
                KV_HEADS,
            );
            let join = [self.attended.address, self.joined.address, rows as u64];
            set.join.launch(stream, rows as u32, 512, &join);
        }
    }
}
