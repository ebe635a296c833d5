//! What loads and saves do to the matrix products of a prefill.

use super::*;

/// Passes over a prefill's products, a good second, after half of which the GPU's clock no longer changes.
const SETTLING_PASSES: usize = 120;
const SETTLED_ROUNDS: usize = 2;

impl Bed {
    /// What loads and saves do to the products of a prefill. A GPU that gets warm gets slow, so what is
    /// compared is measured in turns.
    pub(super) fn products_figures(
        &self,
        ceiling: &Ceiling,
        load: &(dyn Fn() -> f64 + Sync),
        save: &(dyn Fn() -> f64 + Sync),
    ) {
        let copies = || ceiling.once_up();
        let slices = || ceiling.slices(16 << 20);
        let all: [(&str, &(dyn Fn() -> f64 + Sync)); 4] = [
            ("copies of 1 GiB", &copies),
            ("bare slices of 16 MiB", &slices),
            ("loads", load),
            ("saves at full speed", save),
        ];
        let mut times = all.map(|_| Vec::new());
        let mut rates = all.map(|_| Vec::new());
        let mut all_quiet = Vec::new();
        for _ in 0..ROUNDS {
            for ((_, move_once), (times, rates)) in all.iter().zip(times.iter_mut().zip(&mut rates))
            {
                let before = median(&mut self.prefill(20));
                let (mut passes, rate) = self.beside(move_once, || self.prefill(30));
                let quiet = (before + median(&mut self.prefill(20))) / 2.0;
                times.push(median(&mut passes) / quiet);
                rates.push(rate);
                all_quiet.push(quiet);
            }
        }
        let quiet = median(&mut all_quiet) * 1e3;
        println!("products of 512 tokens, ms: quiet {quiet:.2}");
        for ((name, _), (times, rates)) in all.iter().zip(times.iter_mut().zip(&mut rates)) {
            let (middle, rate) = (median(times), median(rates));
            println!("  beside {name}: {middle:.3} x ({times:.3?}); {rate:.2} GB/s");
        }
        let unit = "x the quiet time";
        figure("gemm_under_slices", times[1][ROUNDS / 2], unit, Goal::None);
        let loads = times[2][ROUNDS / 2];
        figure("gemm_under_load", loads, unit, Goal::AtMost(1.08));
        for (name, move_once) in [("slices", all[1].1), ("load", all[2].1)] {
            let (ratio, rate) = self.settled_products(move_once);
            println!("  the clock settled, beside {name}: {ratio:.3} x; {rate:.2} GB/s");
            figure(
                &format!("gemm_under_{name}_settled"),
                ratio,
                unit,
                Goal::None,
            );
        }
    }

    /// What moving bytes does to the products when it goes on: median over the quiet time, and GB/s. A GPU
    /// at its power limit raises its clock while products wait for memory, but takes its time to do so.
    pub(super) fn settled_products(&self, move_once: &(dyn Fn() -> f64 + Sync)) -> (f64, f64) {
        let settled = || median(&mut self.prefill(SETTLING_PASSES)[SETTLING_PASSES / 2..]);
        let (mut ratios, mut rates) = (Vec::new(), Vec::new());
        let mut before = settled();
        for _ in 0..SETTLED_ROUNDS {
            let (beside, rate) = self.beside(move_once, settled);
            let after = settled();
            ratios.push(beside / ((before + after) / 2.0));
            rates.push(rate);
            before = after;
        }
        (median(&mut ratios), median(&mut rates))
    }

    /// Passes over a prefill's products, each layer saved behind it: seconds of a pass without and
    /// with saves, GB/s of KV.
    pub(super) fn prefill_and_save(&self, device: &CudaDevice) -> (f64, f64, f64) {
        const PASSES: usize = 20;
        let (arena, table, stream) = (&self.arena, &self.shuffled, self.llama.stream);
        let mut quiet = Vec::new();
        let mut beside = Vec::new();
        let mut bytes = 0;
        for saves in [false, true] {
            for _ in 0..PASSES {
                let (layers, written) = mpsc::channel::<(u32, Fence)>();
                let took = thread::scope(|scope| {
                    let saver = scope.spawn(move || {
                        let (transfer, fillings) =
                            save_transfer(arena, table, (CHUNK_TOKENS / 16) as u32);
                        let mut fences = Vec::new();
                        for (layer, after) in written {
                            let submitted = device.submit(&transfer, LayerId(layer), &[after]);
                            fences.push(submitted.expect("a sound GPU").fence);
                        }
                        for fence in &fences {
                            let arrived = fence.point().wait(Duration::from_secs(30));
                            assert!(arrived.expect("a sound GPU"));
                        }
                        drop(fillings);
                        transfer.plan().bytes() * LAYERS as u64
                    });
                    let start = Instant::now();
                    for layer in 0..LAYERS {
                        self.llama.products(layer, CHUNK_TOKENS);
                        let fence = device.record(Stream(stream.0)).expect("a sound GPU");
                        if saves {
                            layers.send((layer as u32, fence)).expect("it listens");
                        }
                    }
                    stream.synchronize();
                    let took = start.elapsed().as_secs_f64();
                    drop(layers);
                    bytes = saver.join().expect("no panic");
                    took
                });
                match saves {
                    false => quiet.push(took),
                    true => beside.push(took),
                }
            }
        }
        let (quiet, beside) = (median(&mut quiet), median(&mut beside));
        (quiet, beside, bytes as f64 / beside / 1e9)
    }
}
