//! Figures, one line each.

/// Prints `figure gpu.NAME = VALUE UNIT (goal GOAL): met|short`.
pub(crate) fn figure(name: &str, value: f64, unit: &str, goal: Goal) {
    figure_of("gpu", name, value, unit, goal);
}

/// The same for another area.
pub(crate) fn figure_of(area: &str, name: &str, value: f64, unit: &str, goal: Goal) {
    let (met, text) = match goal {
        Goal::AtLeast(goal) => (value >= goal, format!(">= {goal:.2}")),
        Goal::AtMost(goal) => (value <= goal, format!("<= {goal:.2}")),
        Goal::None => {
            println!("figure {area}.{name} = {value:.3} {unit}");
            return;
        }
    };
    let met = if met { "met" } else { "short" };
    println!("figure {area}.{name} = {value:.3} {unit} (goal {text}): {met}");
}

#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
    None,
}

pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
