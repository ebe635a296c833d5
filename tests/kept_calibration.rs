//! What a device measured of itself is kept in the store and given back to the same device at the next
//! opening; another device measures anew.
#![cfg(feature = "sim")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use stemkv::Stats;
use stemkv_store::*;
use support::machine::{Machine, Mode};

/// A CPU device that "measures" when it is attached, unless it recalls.
struct Measuring {
    cpu: CpuDevice,
    name: &'static str,
    recalled: AtomicUsize,
    measured: AtomicUsize,
}

impl Measuring {
    fn new(name: &'static str) -> Arc<Self> {
        Arc::new(Measuring {
            cpu: CpuDevice::new(),
            name,
            recalled: AtomicUsize::new(0),
            measured: AtomicUsize::new(0),
        })
    }

    fn text(&self) -> String {
        format!(r#"{{"device":"{}"}}"#, self.name)
    }

    /// Times that it measured, and that it recalled.
    fn counts(&self) -> (usize, usize) {
        let count = |count: &AtomicUsize| count.load(Ordering::SeqCst);
        (count(&self.measured), count(&self.recalled))
    }
}

impl Device for Measuring {
    fn info(&self) -> DeviceInfo {
        self.cpu.info()
    }
    fn attach(&self, arena: &HostArena) -> Result<()> {
        if self.recalled.load(Ordering::SeqCst) == 0 {
            self.measured.fetch_add(1, Ordering::SeqCst);
        }
        self.cpu.attach(arena)
    }
    fn calibration(&self) -> Option<String> {
        Some(self.text())
    }
    fn recall(&self, calibration: &str) -> bool {
        let is_same = calibration == self.text();
        self.recalled
            .fetch_add(usize::from(is_same), Ordering::SeqCst);
        is_same
    }
    fn record(&self, stream: Stream) -> Result<Fence> {
        self.cpu.record(stream)
    }
    fn order(&self, stream: Stream, fence: &Fence) -> Result<()> {
        self.cpu.order(stream, fence)
    }
    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted> {
        self.cpu.submit(transfer, layer, after)
    }
}

/// Of several, each recalls its own, also where another one has its place now.
#[tokio::test]
async fn devices_recall_their_own_in_any_order() {
    let machine = Machine::new(Mode::Threads, 16, 64);
    let orders = [
        (["a", "b", "c"], [(1, 0); 3]),
        (["a", "b", "c"], [(0, 1); 3]),
        (["c", "a", "b"], [(0, 1); 3]),
        (["b", "d", "a"], [(0, 1), (1, 0), (0, 1)]),
        (["d", "a", "b"], [(0, 1); 3]),
    ];
    for (names, expected) in orders {
        let devices = names.map(Measuring::new);
        let all = devices.clone().map(|device| device as Arc<dyn Device>);
        let (cache, _) = machine.open_with(machine.builder().devices(all));
        let counts = devices.each_ref().map(|device| device.counts());
        assert_eq!(counts, expected, "{names:?}");
        cache.close().await.expect("nothing hangs");
    }
}

#[tokio::test]
async fn a_calibration_is_given_back_to_the_device_that_made_it_and_to_no_other() {
    let machine = Machine::new(Mode::Threads, 16, 64);
    for (name, expected) in [
        ("one", (1, 0)),
        ("one", (0, 1)),
        ("two", (1, 0)),
        ("two", (0, 1)),
    ] {
        let device = Measuring::new(name);
        let (cache, _) = machine.open_with(machine.builder().device(device.clone()));
        assert_eq!(device.counts(), expected, "{name}");
        cache.close().await.expect("nothing hangs");
    }
    let bytes = machine.disk_chunks * support::machine::CHUNK;
    let disk = SimDisk::open(
        &machine.medium,
        &support::geometry(),
        bytes,
        machine.clock.clone(),
    );
    let mut kept = None;
    let disk = disk.expect("not open");
    disk.scan_meta(&mut |key, value| {
        if key == Stats::CALIBRATION_KEY {
            kept = Some(value.to_vec());
        }
    })
    .expect("readable");
    assert_eq!(kept.as_deref(), Some(&br#"{"device":"two"}"#[..]));
}
