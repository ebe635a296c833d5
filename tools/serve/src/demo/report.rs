//! The demo's tables and its last line.

use std::fmt;

use super::peer::Prefills;
use super::talk::Answered;

/// One question, asked three times.
pub(super) struct Turn {
    pub(super) cold: Answered,
    pub(super) ram: Answered,
    pub(super) disk: Answered,
    /// Are all answers, token by token, those of the cold run?
    pub(super) equal: bool,
}

/// Where the time of one hit went, in seconds.
#[derive(Clone, Copy)]
pub(super) struct Split {
    pub(super) first_token: f64,
    /// From the load's begin to its last byte.
    pub(super) load: f64,
    /// The model's part, waiting left out.
    pub(super) compute: f64,
}

/// Hits with overlap on, or off.
pub(super) struct Overlap {
    pub(super) disk: Vec<Split>,
    pub(super) ram: Vec<Split>,
    pub(super) equal: bool,
}

/// Everything that was measured.
pub(super) struct Report {
    /// Turn by turn, session by session.
    pub(super) turns: Vec<Turn>,
    /// Turns of a session.
    pub(super) questions: usize,
    pub(super) prefix_tokens: usize,
    pub(super) token_bytes: u64,
    /// Blocks that came from disk in the disk run.
    pub(super) disk_blocks: u64,
    pub(super) on: Overlap,
    pub(super) off: Overlap,
    pub(super) peer: Prefills,
}

impl Report {
    /// Was something reused, everywhere, and every answer equal?
    pub(super) fn is_good(&self) -> bool {
        let reused = |answered: &Answered| answered.cached_tokens > 0;
        self.is_equal()
            && self.disk_blocks > 0
            && self
                .turns
                .iter()
                .all(|turn| reused(&turn.ram) && reused(&turn.disk))
    }

    fn is_equal(&self) -> bool {
        self.turns.iter().all(|turn| turn.equal) && self.on.equal && self.off.equal
    }

    fn median_ms(&self, which: impl Fn(&Turn) -> &Answered) -> f64 {
        median(self.turns.iter().map(|turn| first_token_ms(which(turn))))
    }

    fn hit_rate(&self, which: impl Fn(&Turn) -> &Answered) -> f64 {
        let sum = |count: fn(&Answered) -> u64| -> u64 {
            self.turns.iter().map(|turn| count(which(turn))).sum()
        };
        100.0 * sum(|answered| answered.cached_tokens) as f64
            / sum(|answered| answered.prompt_tokens).max(1) as f64
    }
}

fn first_token_ms(answered: &Answered) -> f64 {
    answered.first_token.as_secs_f64() * 1e3
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sessions = self.turns.len() / self.questions;
        writeln!(
            f,
            "\nTime to first token, ms\nsession turn     cold      RAM     disk   tokens reused    MiB   hit rate   equal"
        )?;
        for session in 0..sessions {
            for turn in 0..self.questions {
                let row = &self.turns[turn * sessions + session];
                let reused = row.disk.cached_tokens;
                writeln!(
                    f,
                    "{:>7} {:>4} {:>8.0} {:>8.0} {:>8.0} {:>7} of {:>4} {:>6.1} {:>8.1} %   {}",
                    session + 1,
                    turn + 1,
                    first_token_ms(&row.cold),
                    first_token_ms(&row.ram),
                    first_token_ms(&row.disk),
                    reused,
                    row.disk.prompt_tokens,
                    mib(reused * self.token_bytes),
                    100.0 * reused as f64 / row.disk.prompt_tokens.max(1) as f64,
                    if row.equal { "yes" } else { "NO" },
                )?;
            }
        }
        let cold = self.median_ms(|turn| &turn.cold);
        let ram = self.median_ms(|turn| &turn.ram);
        let disk = self.median_ms(|turn| &turn.disk);
        writeln!(
            f,
            " median      {cold:>8.0} {ram:>8.0} {disk:>8.0}   sooner: {:.1}x from RAM, {:.1}x from disk; \
             hit rate {:.1} % and {:.1} %, {} blocks read from disk",
            cold / ram,
            cold / disk,
            self.hit_rate(|turn| &turn.ram),
            self.hit_rate(|turn| &turn.disk),
            self.disk_blocks,
        )?;
        writeln!(
            f,
            "\nOverlap of load and compute (session 1 turn 1, medians, ms)\nhit        on      off     load  compute   max(load, compute)"
        )?;
        for (name, on, off) in [
            ("RAM ", &self.on.ram, &self.off.ram),
            ("disk", &self.on.disk, &self.off.disk),
        ] {
            let of =
                |splits: &[Split], part: fn(&Split) -> f64| 1e3 * median(splits.iter().map(part));
            // Without overlap the two do not disturb each other.
            let load = of(off, |split| split.load);
            let compute = of(off, |split| split.compute);
            writeln!(
                f,
                "{name} {:>8.1} {:>8.1} {load:>8.1} {compute:>8.1} {:>20.1}   bound by {}",
                of(on, |split| split.first_token),
                of(off, |split| split.first_token),
                load.max(compute),
                if load > compute {
                    "the load"
                } else {
                    "computing the tokens behind the hit"
                },
            )?;
        }
        for (name, on, off) in [
            ("ram", &self.on.ram, &self.off.ram),
            ("disk", &self.on.disk, &self.off.disk),
        ] {
            let of = |splits: &[Split], part: fn(&Split) -> f64| median(splits.iter().map(part));
            let overlapped = of(on, |split| split.first_token);
            let one_after_the_other = of(off, |split| split.first_token);
            let bound = of(off, |split| split.load).max(of(off, |split| split.compute));
            writeln!(
                f,
                "figure serve.overlap_{name} = {:.3} of load-then-compute\n\
                 figure serve.overlap_{name}_bound = {:.3} of max(load, compute)",
                overlapped / one_after_the_other,
                overlapped / bound,
            )?;
        }
        let (ours, candle) = (self.peer.ours.as_secs_f64(), self.peer.candle.as_secs_f64());
        writeln!(
            f,
            "\nCold prefill of {} tokens: ours {:.0} ms, candle's quantized_llama {:.0} ms ({:.2}x)",
            self.prefix_tokens,
            ours * 1e3,
            candle * 1e3,
            candle / ours
        )?;
        writeln!(
            f,
            "The disk run starts the process anew before each request: nothing is in its RAM, but the \
             system's page cache may hold the files.\n"
        )?;
        writeln!(
            f,
            "demo: {} prefix_tokens={} cold_ttft_ms={cold:.0} ram_ttft_ms={ram:.0} disk_ttft_ms={disk:.0} equal={}",
            if self.is_good() { "ok" } else { "FAILED" },
            self.prefix_tokens,
            self.is_equal()
        )
    }
}
