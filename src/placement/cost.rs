//! Load or recompute, and how far: a pure function of measured speeds.
//!
//! The stages of a load overlap, so the slowest one decides how long it takes. Loading and computing
//! are added up, not overlapped: the GPU that would compute beside a load computes for somebody else
//! otherwise.

use serde::Serialize;
use stemkv_store::Tier;

/// How fast chunks come out of one tier, and what is ahead of a new load there.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Speed {
    /// Bytes a second as measured lately; `None` where nothing was measured.
    pub bytes_per_second: Option<f64>,
    /// Bytes that go first.
    pub queued_bytes: u64,
}

impl Speed {
    /// Seconds until `bytes` more are there; nothing where the speed is not known.
    fn seconds(&self, bytes: u64) -> f64 {
        match (bytes, self.bytes_per_second) {
            (0, _) | (_, None) => 0.0,
            (bytes, Some(rate)) => (self.queued_bytes + bytes) as f64 / rate,
        }
    }
}

/// What a decision goes by.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Costs {
    /// Out of our own GPU memory into pages.
    pub device: Speed,
    /// Over the link, from host slots into pages.
    pub host: Speed,
    /// From disk into host slots.
    pub disk: Speed,
    /// Bytes of a block's chunk.
    pub block_bytes: u64,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Tokens a second that the engine computes; `None` where it did not say.
    pub prefill_tokens_per_second: Option<f64>,
}

/// How far a load pays.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// Leading tokens that are worth loading, of those that were looked at.
    pub tokens: usize,
    /// Why it ends there.
    pub verdict: Verdict,
    /// Seconds that loading them should take.
    pub load_seconds: f64,
    /// Seconds that computing them would take; `None` where the engine's rate is not known.
    pub recompute_seconds: Option<f64>,
    /// The tier that the load waits for longest: its name.
    pub slowest: Option<&'static str>,
}

/// Why a load ends where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The engine's rate or a tier's speed is not known: everything is loaded, which measures it.
    Unmeasured,
    /// Everything is faster loaded.
    All,
    /// What comes behind is faster computed.
    Part,
    /// All of it is faster computed.
    Nothing,
}

/// Bytes to come from each tier, for a prefix of a load.
#[derive(Clone, Copy, Default)]
struct Load {
    device: u64,
    host: u64,
    disk: u64,
}

impl Load {
    /// Seconds, and the tier that decides.
    fn seconds(&self, costs: &Costs) -> (f64, Option<Tier>) {
        let stages = [
            (Tier::Device, costs.device.seconds(self.device)),
            // What is on disk passes over the link too.
            (Tier::Host, costs.host.seconds(self.host + self.disk)),
            (Tier::Disk, costs.disk.seconds(self.disk)),
        ];
        stages
            .into_iter()
            .fold((0.0, None), |slowest, (tier, seconds)| {
                match seconds > slowest.0 {
                    true => (seconds, Some(tier)),
                    false => slowest,
                }
            })
    }

    fn is_measured(&self, costs: &Costs) -> bool {
        let known = |bytes: u64, speed: &Speed| bytes == 0 || speed.bytes_per_second.is_some();
        known(self.device, &costs.device)
            && known(self.host + self.disk, &costs.host)
            && known(self.disk, &costs.disk)
    }
}

/// How many of some blocks, first to last, are worth loading, each from the fastest tier that holds
/// it: as many as make loading them and computing the rest the shortest. Of equals the longest load.
pub fn what_pays(blocks: impl IntoIterator<Item = Tier>, costs: &Costs) -> Choice {
    let mut loads = vec![Load::default()];
    for tier in blocks {
        let mut load = *loads.last().expect("never empty");
        match tier {
            Tier::Device => load.device += costs.block_bytes,
            Tier::Host => load.host += costs.block_bytes,
            _ => load.disk += costs.block_bytes,
        }
        loads.push(load);
    }
    let all = loads.len() - 1;
    let rate = costs.prefill_tokens_per_second;
    let compute = |blocks: usize| rate.map(|rate| (blocks * costs.block_tokens) as f64 / rate);
    let choice = |blocks: usize, verdict| {
        let (load_seconds, slowest) = loads[blocks].seconds(costs);
        Choice {
            tokens: blocks * costs.block_tokens,
            verdict,
            load_seconds,
            recompute_seconds: compute(blocks),
            slowest: slowest.map(Tier::name),
        }
    };
    let Some(rate) = rate.filter(|_| loads[all].is_measured(costs)) else {
        return choice(all, Verdict::Unmeasured);
    };
    let total = |blocks: usize| {
        let rest = ((all - blocks) * costs.block_tokens) as f64 / rate;
        loads[blocks].seconds(costs).0 + rest
    };
    let best = (0..=all).fold((f64::INFINITY, 0), |best, blocks| {
        let seconds = total(blocks);
        // Sums that are equal but for rounding count as equal.
        match seconds <= best.0 * (1.0 + 1e-9) {
            true => (seconds.min(best.0), blocks),
            false => best,
        }
    });
    let verdict = match best.1 {
        blocks if blocks == all => Verdict::All,
        0 => Verdict::Nothing,
        _ => Verdict::Part,
    };
    choice(best.1, verdict)
}

/// Shown: what is chosen is the best of all prefixes, and where it ends in cases known beforehand.
#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn speed(bytes_per_second: f64, queued_bytes: u64) -> Speed {
        Speed {
            bytes_per_second: Some(bytes_per_second),
            queued_bytes,
        }
    }

    /// Blocks of 16 tokens and 2 MB; 25,000 tokens a second compute one in 640 µs.
    fn costs() -> Costs {
        Costs {
            device: speed(1e12, 0),
            host: speed(50e9, 0),
            disk: speed(2e9, 0),
            block_bytes: 2_000_000,
            block_tokens: 16,
            prefill_tokens_per_second: Some(25_000.0),
        }
    }

    #[test]
    fn a_disk_that_is_slower_than_the_engine_is_left_alone_and_the_host_tier_is_not() {
        let blocks = [vec![Tier::Host; 10], vec![Tier::Disk; 10]].concat();
        let choice = what_pays(blocks, &costs());
        // One more is read while the others pass over the link.
        assert_eq!((choice.tokens, choice.verdict), (176, Verdict::Part));
        assert_eq!(choice.slowest, Some("disk"));
        let choice = what_pays([Tier::Disk; 10], &costs());
        assert_eq!((choice.tokens, choice.verdict), (0, Verdict::Nothing));
        let fast = Costs {
            disk: speed(5e9, 0),
            ..costs()
        };
        let choice = what_pays([Tier::Disk; 10], &fast);
        assert_eq!((choice.tokens, choice.verdict), (160, Verdict::All));
        assert_eq!(choice.slowest, Some("disk"));
        assert!((choice.load_seconds - 0.004).abs() < 1e-9, "{choice:?}");
        assert!((choice.recompute_seconds.expect("known") - 0.0064).abs() < 1e-9);
    }

    #[test]
    fn a_long_queue_makes_a_short_load_not_worth_it() {
        let busy = Costs {
            host: speed(50e9, 1_000_000_000),
            ..costs()
        };
        assert_eq!(what_pays([Tier::Host; 8], &busy).verdict, Verdict::Nothing);
        assert_eq!(what_pays([Tier::Host; 80], &busy).verdict, Verdict::All);
        assert_eq!(what_pays([Tier::Device; 8], &busy).verdict, Verdict::All);
    }

    #[test]
    fn what_is_not_measured_is_loaded() {
        let unknown = Costs {
            disk: Speed::default(),
            ..costs()
        };
        let choice = what_pays([Tier::Disk; 8], &unknown);
        assert_eq!((choice.tokens, choice.verdict), (128, Verdict::Unmeasured));
        assert_eq!(what_pays([Tier::Host; 8], &unknown).verdict, Verdict::All);
        let silent = Costs {
            prefill_tokens_per_second: None,
            ..costs()
        };
        assert_eq!(
            what_pays([Tier::Host; 8], &silent).verdict,
            Verdict::Unmeasured
        );
        assert_eq!(what_pays([], &costs()).verdict, Verdict::All);
    }

    proptest! {
        #[test]
        fn no_other_prefix_would_be_faster(
            blocks in prop::collection::vec(0_usize..3, 0..40),
            rates in prop::array::uniform3(1e8_f64..1e12), queues in prop::array::uniform3(0_u64..1 << 28),
            prefill in 100.0_f64..1e6,
        ) {
            let costs = Costs {
                device: speed(rates[0], queues[0]),
                host: speed(rates[1], queues[1]),
                disk: speed(rates[2], queues[2]),
                prefill_tokens_per_second: Some(prefill),
                ..costs()
            };
            let choice = what_pays(blocks.iter().map(|&tier| Tier::ALL[tier]), &costs);
            let total = |n: usize| {
                let on = |tier: usize| blocks[..n].iter().filter(|&&at| at == tier).count() as u64 * 2_000_000;
                let bytes = [on(0), on(1) + on(2), on(2)];
                let stage = |i: usize| match bytes[i] {
                    0 => 0.0,
                    bytes => (bytes + queues[i]) as f64 / rates[i],
                };
                stage(0).max(stage(1)).max(stage(2)) + ((blocks.len() - n) * 16) as f64 / prefill
            };
            let chosen = total(choice.tokens / 16);
            for n in 0..=blocks.len() {
                prop_assert!(chosen <= total(n) * (1.0 + 1e-6), "{n} blocks would take {}", total(n));
            }
        }
    }
}
