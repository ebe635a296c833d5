//! What every benchmark shares: medians, and the line that a figure ends as.

#![allow(dead_code, reason = "each benchmark uses its own part")]

pub mod table;

use std::time::{Duration, Instant};

/// Small sizes, as a test (`cargo test`, `cargo bench -- --test`), so that a benchmark never rots.
pub fn is_test() -> bool {
    std::env::args().any(|argument| argument == "--test")
        || !std::env::args().any(|argument| argument == "--bench")
}

/// What follows `name` on the command line.
pub fn argument(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1)
}

/// Durations of one thing, measured again and again.
#[derive(Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Measures one run.
    pub fn time<R>(&mut self, run: impl FnOnce() -> R) -> R {
        let begun = Instant::now();
        let result = run();
        self.add(begun.elapsed());
        result
    }

    pub fn add(&mut self, took: Duration) {
        self.0.push(took.as_secs_f64());
    }

    /// Adds any number: a ratio of a pair of runs, say.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub fn last(&self) -> f64 {
        self.0.last().copied().unwrap_or(f64::NAN)
    }

    /// In the order of measuring.
    pub fn values(&self) -> impl Iterator<Item = f64> + '_ {
        self.0.iter().copied()
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub fn p99(&self) -> f64 {
        self.quantile(0.99)
    }

    fn quantile(&self, quantile: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            count => sorted[((count - 1) as f64 * quantile).round() as usize],
        }
    }
}

/// What a figure should reach.
pub enum Goal {
    AtMost(f64),
    AtLeast(f64),
    /// Only to be known.
    None,
}

/// Prints a figure the way `docs/benchmarks.md` quotes it; again behind a table that several programs make.
pub fn figure(name: &str, value: f64, unit: &str, goal: Goal) {
    let (goal, verdict) = match goal {
        Goal::AtMost(most) => (format!("at most {most}"), value <= most),
        Goal::AtLeast(least) => (format!("at least {least}"), value >= least),
        Goal::None => return tell(format!("figure {name} = {value:.3} {unit}")),
    };
    let verdict = if verdict { "met" } else { "short" };
    tell(format!(
        "figure {name} = {value:.3} {unit} (goal {goal}): {verdict}"
    ));
}

fn tell(figure: String) {
    println!("{figure}");
    table::figure(&figure);
}
