//! What a whole run comes to, as one table at its end: what the disk does by itself, and what the store
//! makes of it.

use std::sync::{Mutex, PoisonError};

/// What was measured, what the disk does, what stemkv does, and how the one compares with the other.
type Row = [String; 4];

static ROWS: Mutex<Vec<Row>> = Mutex::new(Vec::new());

/// Adds a line. Where there is nothing to compare with, the column is empty.
pub fn row(what: impl Into<String>, disk: String, stemkv: String, share: String) {
    let mut rows = ROWS.lock().unwrap_or_else(PoisonError::into_inner);
    rows.push([what.into(), disk, stemkv, share]);
}

/// A rate in bytes a second, in words.
pub fn rate(bytes_per_second: f64) -> String {
    format!("{:.2} GB/s", bytes_per_second / 1e9)
}

/// A share in words.
pub fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Prints all lines, in the order in which they were added.
pub fn print() {
    let rows = ROWS.lock().unwrap_or_else(PoisonError::into_inner);
    if rows.is_empty() {
        return;
    }
    let head = ["", "this disk", "stemkv", "of the disk"].map(str::to_owned);
    let lines: Vec<&Row> = [&head].into_iter().chain(rows.iter()).collect();
    let width = |column: usize| {
        let lengths = lines.iter().map(|line| line[column].chars().count());
        lengths.max().unwrap_or(0)
    };
    let [what, disk, stemkv, share] = [0, 1, 2, 3].map(width);
    println!();
    for line in lines {
        let [a, b, c, d] = line;
        println!("{a:<what$}  {b:>disk$}  {c:>stemkv$}  {d:>share$}");
    }
}
