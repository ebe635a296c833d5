//! Saves that the device encodes.

use super::*;

/// The layers of one encoded save, each a job of its own.
fn encoded_jobs(bench: &Bench, fillings: &[Filling], log: &Arc<Log>) -> Vec<Job> {
    let encoded = EncodedSave::new(CodecId::Exp);
    let layers = 0..bench.pages.geometry.layers;
    let job = |layer| Job {
        layers: layer..layer + 1,
        encoded: Some(encoded.clone()),
        ..bench.save(fillings, log)
    };
    layers.map(job).collect()
}

#[test]
fn the_layers_of_an_encoded_save_arrive_in_order_however_they_were_handed_over() {
    let devices: [Arc<dyn Device>; 2] = [Arc::new(CpuDevice::new()), Arc::new(SimDevice::sound())];
    for device in devices {
        let bench = Bench::over(device, 16);
        let logs: Vec<_> = (0..2).map(|_| Log::new()).collect();
        let fillings = [bench.fillings(2), bench.fillings(1)];
        let mut first = encoded_jobs(&bench, &fillings[0], &logs[0]);
        let mut second = encoded_jobs(&bench, &fillings[1], &logs[1]);
        let layers = first.len();
        first.reverse();
        second.rotate_left(1);
        // Two saves at once do not get into each other's way.
        for job in first.into_iter().zip(second).flat_map(|(a, b)| [a, b]) {
            bench.queue.submit(job).expect("room");
        }
        for (log, moves) in logs.iter().zip([2, 1]) {
            let arrived = log.slabs();
            let order: Vec<u32> = arrived.iter().map(|(layer, _)| layer.0).collect();
            assert_eq!(order, (0..layers as u32).collect::<Vec<_>>());
            assert!(arrived.iter().all(|(_, slabs)| slabs.len() == moves));
        }
        drop(fillings);
        assert!(bench.is_empty());
    }
}

#[test]
fn a_layer_of_an_encoded_save_that_is_not_coming_fails_those_behind_it_and_nobody_waits() {
    // Refused by the device, cancelled, over the bound, and invalid.
    for way in 0..4 {
        let script = move |number| (way == 0 && number == 0).then_some(SimDeviceFault::Submit);
        let device = Arc::new(SimDevice::new(true, script));
        let bench = Bench::over(device.clone(), if way == 2 { 2 } else { 16 });
        let log = Log::new();
        let fillings = bench.fillings(1);
        let mut jobs = encoded_jobs(&bench, &fillings, &log);
        let last = jobs.pop().expect("more than one layer");
        let middle = jobs.pop().expect("more than one layer");
        let mut first = jobs.swap_remove(0);
        if way == 3 {
            first.layers.end = u32::MAX;
        }
        if way == 1 {
            first
                .cancelled
                .store(true, std::sync::atomic::Ordering::Relaxed);
        }
        bench.queue.submit(last).expect("room");
        bench.queue.submit(middle).expect("room");
        let answer = bench.queue.submit(first);
        assert_eq!(answer.is_err(), way >= 2);
        bench.queue.turn();
        let lines = log.lines();
        let done = lines.iter().filter(|line| **line == "done, settled true");
        assert_eq!(done.count(), if way >= 2 { 2 } else { 3 }, "{lines:?}");
        assert!(log.slabs().is_empty());
        drop((fillings, jobs));
        assert!(bench.is_empty());
    }
}

#[test]
fn a_device_that_does_not_encode_is_not_asked_to() {
    let device = Compares {
        wrong: (LayerId(0), 0),
        fence: Gate::default(),
    };
    let bench = Bench::new(device, 16);
    let log = Log::new();
    let fillings = bench.fillings(1);
    let job = encoded_jobs(&bench, &fillings, &log).remove(0);
    let error = bench.queue.submit(job).expect_err("it copies raw slabs");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(log.lines().is_empty());
}
