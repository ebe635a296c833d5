//! The device half of the contract suite over a GPU, with each way of copying; see `device_suite`.
//!
//! On a machine without a GPU every test says so and shows only that opening one fails in order.
//! The binary needs neither cargo nor files: copy it to a GPU machine and run it there, also under
//! `compute-sanitizer`.
#![cfg(feature = "cuda")]

mod device_suite;

use std::env;
use std::fs::File;
use std::mem;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;
use device_suite::jobs::{Log, limits, load_job};
use device_suite::moves::{load, save};
use device_suite::pages::{Layout, Pages};
use device_suite::*;
use stemkv_store::device::{Calibration, CudaDevice};
use stemkv_store::*;

const LONG: Duration = Duration::from_secs(30);

/// GPU memory of the primary context of one GPU.
struct GpuMemory {
    gpu: i32,
    address: u64,
    bytes: usize,
}

fn check(code: sys::CUresult) {
    assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
}

fn enter(gpu: i32) {
    let (mut device, mut context) = (0, ptr::null_mut());
    // SAFETY: `CudaDevice::open` went well, so there is a driver and such a GPU; the calls write to
    // locals. The context is kept until the process ends.
    unsafe {
        check(sys::cuDeviceGet(&mut device, gpu));
        check(sys::cuDevicePrimaryCtxRetain(&mut context, device));
        check(sys::cuCtxSetCurrent(context));
    }
}

impl GpuMemory {
    fn new(bytes: usize) -> Self {
        Self::on(0, bytes)
    }

    fn on(gpu: i32, bytes: usize) -> Self {
        enter(gpu);
        let mut address = 0;
        // SAFETY: writes a local.
        check(unsafe { sys::cuMemAlloc_v2(&mut address, bytes) });
        GpuMemory {
            gpu,
            address,
            bytes,
        }
    }
}

impl DeviceMemory for GpuMemory {
    fn address(&self) -> u64 {
        self.address
    }

    fn read(&self) -> Vec<u8> {
        enter(self.gpu);
        let mut bytes = vec![0; self.bytes];
        // SAFETY: all of our own memory into a vector as long.
        unsafe {
            check(sys::cuCtxSynchronize());
            check(sys::cuMemcpyDtoH_v2(
                bytes.as_mut_ptr().cast(),
                self.address,
                self.bytes,
            ));
        }
        bytes
    }

    fn write(&self, bytes: &[u8]) {
        enter(self.gpu);
        assert!(bytes.len() <= self.bytes);
        // SAFETY: within our own memory; complete when the second call returns.
        unsafe {
            check(sys::cuMemcpyHtoD_v2(
                self.address,
                bytes.as_ptr().cast(),
                bytes.len(),
            ));
            check(sys::cuCtxSynchronize());
        }
    }
}

impl Drop for GpuMemory {
    fn drop(&mut self) {
        enter(self.gpu);
        // SAFETY: allocated in `new`; the call waits for the device.
        let _ = unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// Runs `case` with a GPU, or says aloud that there is none.
fn on_gpu(open: impl Fn() -> Result<CudaDevice>, case: impl Fn(&Subject<'_>)) {
    match open() {
        Ok(device) => case(&Subject {
            device: Arc::new(device),
            allocate: &|bytes| Arc::new(GpuMemory::new(bytes)),
        }),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unavailable);
            assert!(!error.to_string().contains('\n'), "one line");
            eprintln!("SKIPPED, NOT SHOWN ON A GPU: {error}");
        }
    }
}

/// Rates that make every transfer go by a kernel over pinned memory.
fn direct() -> Result<CudaDevice> {
    let mut calibration = Calibration::default();
    for rates in [&mut calibration.load, &mut calibration.save] {
        rates.direct = 1e9;
        rates.contiguous = 1e-3;
        rates.pitched = vec![(4096, 1e-3)];
    }
    CudaDevice::with_calibration(0, calibration)
}

/// Rates that make every transfer go by staging memory, in slices of few slabs, rows cut in two where
/// they can be.
fn staged() -> Result<CudaDevice> {
    let mut calibration = Calibration {
        slice_bytes: 20 << 10,
        ..Calibration::default()
    };
    for rates in [&mut calibration.load, &mut calibration.save] {
        rates.direct = 1e-9;
        rates.call_us = 0.0;
        rates.pitched = vec![(256, 50.0), (1 << 20, 1.0)];
    }
    CudaDevice::with_calibration(0, calibration)
}

macro_rules! suite {
    ($name:ident, $open:expr) => {
        mod $name {
            use super::*;

            #[test]
            fn a_move_writes_every_byte_of_its_tokens_and_no_other() {
                on_gpu(
                    $open,
                    device_suite::moves::a_move_writes_every_byte_of_its_tokens_and_no_other,
                );
            }

            #[test]
            fn a_layer_that_is_not_there_is_invalid_and_moves_nothing() {
                on_gpu(
                    $open,
                    device_suite::moves::a_layer_that_is_not_there_is_invalid_and_moves_nothing,
                );
            }

            #[test]
            fn handles_may_be_dropped_while_a_layer_is_under_way() {
                on_gpu(
                    $open,
                    device_suite::moves::handles_may_be_dropped_while_a_layer_is_under_way,
                );
            }

            #[test]
            fn a_recorded_point_is_reached_and_orders_a_stream() {
                on_gpu(
                    $open,
                    device_suite::moves::a_recorded_point_is_reached_and_orders_a_stream,
                );
            }

            #[test]
            fn chunks_move_between_the_tiers_and_pages() {
                on_gpu($open, device_suite::device_tier::chunks_move_between_the_tiers_and_pages);
            }

            #[test]
            fn everything_of_a_device_transfer_may_be_leaked() {
                on_gpu(
                    $open,
                    device_suite::device_tier::everything_of_a_device_transfer_may_be_leaked,
                );
            }

            #[test]
            fn ten_threads_share_a_queue() {
                on_gpu($open, device_suite::jobs::ten_threads_share_a_queue);
            }

            #[test]
            fn raw_and_encoded_chunks_load_side_by_side() {
                on_gpu(
                    $open,
                    device_suite::encoded_saves::raw_and_encoded_chunks_load_side_by_side,
                );
            }

            #[test]
            fn an_encoded_save_stores_what_a_raw_one_does() {
                on_gpu(
                    $open,
                    device_suite::encoded_saves::an_encoded_save_stores_what_a_raw_one_does,
                );
            }

            #[test]
            fn an_encoded_chunk_that_does_not_fit_is_told() {
                on_gpu(
                    $open,
                    device_suite::encoded_saves::an_encoded_chunk_that_does_not_fit_is_told,
                );
            }

            #[test]
            fn the_layers_of_an_encoded_save_come_in_order() {
                on_gpu(
                    $open,
                    device_suite::encoded_saves::the_layers_of_an_encoded_save_come_in_order,
                );
            }

            #[test]
            fn encoded_chunks_rise_into_the_device_tier_and_sink_again() {
                on_gpu(
                    $open,
                    device_suite::device_tier::encoded_chunks_rise_into_the_device_tier_and_sink_again,
                );
            }

            #[test]
            fn encoded_slabs_load_as_they_were() {
                on_gpu($open, device_suite::encoded_loads::encoded_slabs_load_as_they_were);
            }

            #[test]
            fn a_flipped_bit_in_an_encoded_slab_fails_it() {
                on_gpu($open, |subject| {
                    device_suite::encoded_loads::a_flipped_bit_in_an_encoded_slab_fails_it(subject, &flip);
                });
            }

            #[test]
            fn a_malformed_slab_fails_and_writes_nowhere_else() {
                on_gpu(
                    $open,
                    device_suite::encoded_loads::a_malformed_slab_fails_and_writes_nowhere_else,
                );
            }

            #[test]
            fn a_save_is_summed_and_a_load_compared_on_the_way() {
                on_gpu(
                    $open,
                    super::a_save_is_summed_and_a_load_compared_on_the_way,
                );
            }

            #[test]
            fn a_flipped_bit_in_a_slot_fails_its_layer() {
                on_gpu($open, super::a_flipped_bit_in_a_slot_fails_its_layer);
            }

            #[test]
            fn leaked_handles_keep_what_a_copy_uses() {
                on_gpu($open, super::leaked_handles_keep_what_a_copy_uses);
            }
        }
    };
}

suite!(measured, || CudaDevice::open(0));
suite!(by_kernel_alone, direct);
suite!(by_staging, staged);

/// Flips one bit of the arena behind everybody's back: through the file that it maps.
fn flip(arena: &HostArena, offset: usize, bit: u8) {
    let file = File::from(arena.as_fd().try_clone_to_owned().expect("a descriptor"));
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset as u64)
        .expect("mapped");
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, offset as u64).expect("mapped");
}

/// No bytes pass unseen: neither way leaves the sums to the host.
fn a_save_is_summed_and_a_load_compared_on_the_way(subject: &Subject<'_>) {
    let device = &subject.device;
    let geometry = &geometries()[0];
    let arena = arena(geometry, 2);
    device.attach(&arena).expect("a sound device");
    let pages = Pages::new(subject, geometry, Layout::Nhd, 12, 2);
    let table = [PageId(1), PageId(0)];
    let filling = arena.allocate(geometry.payload_bytes(), 1).expect("room");
    let moves = vec![SlabMove::Save {
        slot: filling[0].writer(),
        token: 0,
    }];
    let whole = PageTable {
        kv: pages.kv.clone(),
        pages: table.into(),
    };
    let transfer = Transfer::new(Direction::Save, whole, moves, 0).expect("valid");
    let submitted = device.submit(&transfer, LayerId(0), &[]).expect("sound");
    assert!(matches!(submitted.sums, SlabSums::AfterFence(_)));
    assert!(submitted.fence.point().wait(LONG).expect("sound"));
    drop((transfer, submitted, filling));

    let slots = save(&**device, &arena, &pages, &table, &[0, 12]);
    let transfer = load(&slots, &pages, &table, &[0, 12], 0);
    let submitted = device.submit(&transfer, LayerId(0), &[]).expect("sound");
    assert!(matches!(submitted.sums, SlabSums::Compared(_)));
    assert!(submitted.fence.point().wait(LONG).expect("sound"));
}

/// A bit that flips in a sealed slot, anywhere in a slab that is read, is seen and named: in its layer,
/// with the number of leading moves that are whole. A slab of which nothing moves is not looked at.
/// Through a queue the job fails as corrupt, once, and ends.
fn a_flipped_bit_in_a_slot_fails_its_layer(subject: &Subject<'_>) {
    let device = &subject.device;
    // Slabs of several pieces with a short one at the end, and of one short piece.
    let long = KvGeometry::gqa(3, 3, 176, Dtype::Bf16, 5).expect("valid");
    for geometry in [&long, &geometries()[4]] {
        let arena = arena(geometry, 4);
        device.attach(&arena).expect("a sound device");
        let pages = Pages::new(subject, geometry, Layout::Nhd, 5, 16);
        let mut random = Random(3);
        pages.memory.write(&random.bytes(pages.memory.read().len()));
        let block = geometry.block_tokens as usize;
        let at = [0, block, 2 * block, 3 * block];
        let table = random.pick((4 * block).div_ceil(5), 16);
        let slots = save(&**device, &arena, &pages, &table, &at);
        let bytes = geometry.slab_bytes();
        let places = [0, 7, bytes / 2, bytes - 1];
        for (number, place) in places.into_iter().enumerate() {
            let (broken, layer) = (number % 4, LayerId(number as u32 % 2));
            let start = slots[broken].offset() + RecordHeader::BYTES;
            let offset = start + layer.0 as usize * geometry.slab_stride() + place;
            flip(&arena, offset, number as u8);
            // All tokens; from within the broken block; from behind it.
            for from in [0, broken * block + 1, (broken + 1) * block] {
                let transfer = load(&slots, &pages, &table, &at, from);
                for this in geometry.layer_ids() {
                    let submitted = device.submit(&transfer, this, &[]).expect("sound");
                    assert!(submitted.fence.point().wait(LONG).expect("sound"));
                    let first_wrong = match submitted.sums {
                        SlabSums::Compared(ask) => ask().expect("sound"),
                        SlabSums::Unknown if from >= 4 * block => None,
                        _ => panic!("a GPU compares what it loads"),
                    };
                    let seen = this == layer && from < (broken + 1) * block;
                    assert_eq!(first_wrong, seen.then_some(broken), "from {from}, {this}");
                }
            }
            let clock = Arc::new(SystemClock::default());
            let queue =
                TransferQueue::spawn(Arc::clone(device), clock, limits(4)).expect("a thread");
            let log = Log::new();
            let job = load_job(&slots, &pages, &table, &at, 0, &log);
            queue.submit(job).expect("room");
            let lines = log.finish();
            let failed: Vec<_> = lines
                .iter()
                .filter(|line| line.starts_with("failed"))
                .collect();
            assert_eq!(failed, [&format!("failed {layer} after {broken}: corrupt")]);
            assert_eq!(lines.last().expect("an end"), "done, settled true");
            flip(&arena, offset, number as u8);
        }
    }
}

/// Everything of a load but its pages is leaked in the middle of it, the device's handle is dropped,
/// and the bytes arrive all the same.
fn leaked_handles_keep_what_a_copy_uses(subject: &Subject<'_>) {
    let device = &subject.device;
    let geometry = &KvGeometry::gqa(4, 8, 128, Dtype::Bf16, 16).expect("valid");
    let arena = arena(geometry, 64);
    device.attach(&arena).expect("a sound device");
    let pages = Pages::new(subject, geometry, Layout::Nhd, 16, 64);
    let bytes = Random(9).bytes(pages.memory.read().len());
    pages.memory.write(&bytes);
    let table = Random(10).pick(64, 64);
    let at: Vec<usize> = (0..64).map(|block| block * 16).collect();
    let slots = save(&**device, &arena, &pages, &table, &at);
    pages.memory.write(&vec![0x5a; bytes.len()]);
    let transfer = load(&slots, &pages, &table, &at, 0);
    let mut last = None;
    for layer in geometry.layer_ids() {
        let submitted = device.submit(&transfer, layer, &[]).expect("sound");
        mem::forget(last.replace(submitted.fence));
    }
    mem::forget((transfer, slots, arena));
    let arrived = last
        .expect("four layers")
        .point()
        .wait(Duration::from_secs(30));
    assert!(arrived.expect("a sound device"));
    assert_eq!(pages.memory.read(), bytes);
}

/// Ordinary host memory is not what a GPU copies, and it is told so before anything moves.
#[test]
fn pages_in_host_memory_are_refused() {
    on_gpu(
        || CudaDevice::open(0),
        |subject| {
            let geometry = &geometries()[0];
            let arena = arena(geometry, 1);
            subject.device.attach(&arena).expect("a sound device");
            let pages = HostPages::new(geometry, 12, 1).expect("small");
            let filling = arena
                .allocate(geometry.payload_bytes(), 1)
                .expect("room")
                .remove(0);
            let table = PageTable {
                kv: pages.paged(),
                pages: [PageId(0)].into(),
            };
            let moves = vec![SlabMove::Save {
                slot: filling.writer(),
                token: 0,
            }];
            let transfer = Transfer::new(Direction::Save, table, moves, 0).expect("valid");
            let error = subject.device.submit(&transfer, LayerId(0), &[]).err();
            assert_eq!(error.expect("refused").kind(), ErrorKind::Invalid);
        },
    );
}

/// Two devices over one arena, of two GPUs where there are two, else twice of one: what one saved both load,
/// at once; the arena stays pinned when the one that pinned it has gone; and where there are two GPUs, each
/// refuses the other's pages and calibration.
#[test]
fn two_devices_share_one_pinned_arena() {
    let Ok(first) = CudaDevice::open(0) else {
        return on_gpu(|| CudaDevice::open(0), |_| ());
    };
    let (gpu, second) = match CudaDevice::open(1) {
        Ok(second) => (1, second),
        Err(_) => (0, CudaDevice::open(0).expect("opened before")),
    };
    eprintln!("on GPUs 0 and {gpu}");
    let devices: [Arc<dyn Device>; 2] = [Arc::new(first), Arc::new(second)];
    let geometry = &KvGeometry::gqa(4, 8, 128, Dtype::Bf16, 16).expect("valid");
    let arena = arena(geometry, 64);
    let pages = [0, 1].map(|number| {
        devices[number].attach(&arena).expect("a sound device");
        let gpu = [0, gpu][number];
        let subject = Subject {
            device: Arc::clone(&devices[number]),
            allocate: &|bytes| Arc::new(GpuMemory::on(gpu, bytes)),
        };
        Pages::new(&subject, geometry, Layout::Nhd, 16, 64)
    });
    let is_one_gpu = gpu == 0;
    for (number, device) in devices.iter().enumerate() {
        device.check_pages(&pages[number].kv).expect("its own");
        let other = device.check_pages(&pages[1 - number].kv);
        assert_eq!(other.map_err(|error| error.kind()).is_ok(), is_one_gpu);
        let measured = devices[1 - number].calibration().expect("attached");
        let fresh = CudaDevice::open([0, gpu as u32][number]).expect("opened before");
        assert_eq!(fresh.recall(&measured), is_one_gpu);
        let own = device.calibration().expect("attached");
        assert!(fresh.recall(&own));
    }
    let on_host = HostPages::new(geometry, 16, 1).expect("small");
    let refused = devices[0]
        .check_pages(&on_host.paged())
        .expect_err("not a GPU's");
    assert_eq!(refused.kind(), ErrorKind::Invalid);

    let bytes = Random(9).bytes(pages[0].memory.read().len());
    pages[0].memory.write(&bytes);
    let table = Random(10).pick(64, 64);
    let at: Vec<usize> = (0..64).map(|block| block * 16).collect();
    let slots = save(&*devices[0], &arena, &pages[0], &table, &at);
    let queues = devices.each_ref().map(|device| {
        let clock = Arc::new(SystemClock::default());
        TransferQueue::spawn(Arc::clone(device), clock, limits(8)).expect("threads")
    });
    for _ in 0..4 {
        let logs = [0, 1].map(|number| {
            pages[number].memory.write(&vec![0x5a; bytes.len()]);
            Log::new()
        });
        for number in [0, 1] {
            let job = load_job(&slots, &pages[number], &table, &at, 0, &logs[number]);
            queues[number].submit(job).expect("room");
        }
        for (number, log) in logs.iter().enumerate() {
            let last = log.finish().pop();
            assert_eq!(
                last.expect("an end"),
                "done, settled true",
                "device {number}"
            );
            assert!(pages[number].memory.read() == bytes, "device {number}");
        }
    }
    let [first, _second] = queues;
    drop(first);
    let [first, second] = devices;
    assert_eq!(Arc::strong_count(&first), 1);
    drop(first);
    pages[1].memory.write(&vec![0x5a; bytes.len()]);
    let transfer = load(&slots, &pages[1], &table, &at, 0);
    for layer in geometry.layer_ids() {
        let submitted = second.submit(&transfer, layer, &[]).expect("sound");
        assert!(submitted.fence.point().wait(LONG).expect("sound"));
    }
    assert!(pages[1].memory.read() == bytes);
}

/// A stream that an engine captures into a graph, in the mode that is usual: the driver refuses all threads of
/// the process what could be meant for the graph, and gives the capture up where one tries.
struct Capture(sys::CUstream);

impl Capture {
    fn begin() -> Capture {
        enter(0);
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        // SAFETY: the first call writes a local, and makes what the second one is about.
        unsafe {
            check(sys::cuStreamCreate(&mut stream, flags));
            check(sys::cuStreamBeginCapture_v2(stream, mode));
        }
        Capture(stream)
    }

    fn stream(&self) -> Stream {
        Stream(self.0 as usize as u64)
    }

    /// Fails where anything has disturbed it.
    fn end(self) {
        let mut graph = ptr::null_mut();
        // SAFETY: the calls are about what `begin` made, and the graph that the first one writes.
        unsafe {
            check(sys::cuStreamEndCapture(self.0, &mut graph));
            check(sys::cuGraphDestroy(graph));
            check(sys::cuStreamDestroy_v2(self.0));
        }
    }
}

/// Engines capture graphs while they serve. Transfers, their fences and whatever memory they need meanwhile do
/// not cost the engine its capture, and the capture ends no fence while bytes move. The captured stream itself
/// is refused: what waits for it would become a part of the graph.
#[test]
fn a_capture_and_transfers_do_not_disturb_each_other() {
    const ALONE: &str = "STEMKV_TEST_CAPTURES_ALONE";
    if env::var_os(ALONE).is_none() {
        // In a process of its own: what other tests do with the driver itself would end the capture.
        let program = env::current_exe().expect("this one");
        let name = "a_capture_and_transfers_do_not_disturb_each_other";
        let status = Command::new(program)
            .args(["--exact", name, "--nocapture"])
            .env(ALONE, "1")
            .status();
        return assert!(status.expect("it starts").success());
    }
    on_gpu(staged, |subject| {
        let device = &subject.device;
        let geometry = &KvGeometry::gqa(8, 8, 128, Dtype::Bf16, 16).expect("valid");
        let arena = arena(geometry, 64);
        device.attach(&arena).expect("a sound device");
        let pages = Pages::new(subject, geometry, Layout::Nhd, 16, 64);
        let bytes = Random(9).bytes(pages.memory.read().len());
        pages.memory.write(&bytes);
        let table = Random(10).pick(64, 64);
        let at: Vec<usize> = (0..64).map(|block| block * 16).collect();
        let slots = save(&**device, &arena, &pages, &table, &at);
        pages.memory.write(&vec![0x5a; bytes.len()]);
        let queue = {
            let clock = Arc::new(SystemClock::default());
            TransferQueue::spawn(Arc::clone(device), clock, limits(4)).expect("threads")
        };

        let capture = Capture::begin();
        // In transfer threads, and in the one that captures.
        for _ in 0..4 {
            let log = Log::new();
            let job = load_job(&slots, &pages, &table, &at, 0, &log);
            queue.submit(job).expect("room");
            let lines = log.finish();
            assert!(
                !lines.iter().any(|line| line.starts_with("failed")),
                "{lines:?}"
            );
            assert_eq!(lines.last().expect("an end"), "done, settled true");
        }
        let transfer = load(&slots, &pages, &table, &at, 0);
        for layer in geometry.layer_ids() {
            let submitted = device.submit(&transfer, layer, &[]).expect("sound");
            assert!(submitted.fence.point().wait(LONG).expect("sound"));
        }
        // Buffers that are not there yet.
        drop(staged().expect("opened before"));
        let refused = |answer: Result<()>| answer.expect_err("captured").kind();
        let recorded = device.record(capture.stream()).map(drop);
        assert_eq!(refused(recorded), ErrorKind::Invalid);
        let ordered = device.order(capture.stream(), &Fence::reached());
        assert_eq!(refused(ordered), ErrorKind::Invalid);
        capture.end();
        assert!(pages.memory.read() == bytes);
    });
}

#[test]
fn a_gpu_that_is_not_there_is_unavailable() {
    let error = CudaDevice::open(u32::MAX)
        .err()
        .expect("no machine has so many");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}
