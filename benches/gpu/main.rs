//! Measures the CUDA device on a GPU machine: needs no cargo there, and no
//! files but the KV for `link` and `link_compute` (`--kv`).
//!
//! `gpu [load] [link] [link_compute] [duplex] [logits] [decode] [ttft] [hits] [open_kernels] [others]
//! [variants]`; without arguments everything but `variants`. Every rate stands beside one contiguous pinned
//! copy measured in the same run. What is measured and why is in docs/benchmarks.md.

mod cuda;
mod llama;
mod report;
mod store;

mod coded;
mod compute;
mod duplex;
mod hits;
mod kv;
mod link;
mod logits;

use stemkv_store::Device;
use stemkv_store::device::CudaDevice;

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .take_while(|argument| !argument.starts_with("--"))
        .collect();
    let device = match CudaDevice::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("SKIPPED: {error}");
            return;
        }
    };
    println!("{}", device.info().name);
    drop(device);
    cuda::enter();
    let wants = |name: &str| match arguments.is_empty() {
        true => name != "variants",
        false => arguments.iter().any(|argument| argument == name),
    };
    if wants("load") {
        link::loads_and_saves();
    }
    if wants("link") {
        coded::encoded();
    }
    if wants("link_compute") {
        coded::beside_compute();
    }
    if wants("duplex") {
        duplex::both_ways();
    }
    if wants("logits") {
        logits::with_and_without_a_load();
    }
    if wants("hits") {
        hits::hits_at_once();
    }
    if wants("decode") || wants("ttft") || wants("variants") {
        compute::beside_compute(wants("decode"), wants("ttft"), wants("variants"));
    }
    if wants("open_kernels") {
        link::open_kernels();
    }
    if wants("others") {
        link::others();
    }
}
