//! What a run comes to, as one table at its end: what the disk does by itself, and what the store makes of
//! it. Behind it the figures, one a line.
//!
//! Several programs make one table: each is told `--rows FILE` and adds there what it finds, as soon as it
//! does, so that nothing is lost where one is interrupted; and one of them prints it at the end
//! ([`print_file`]).

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Rows, their columns with tabs between them, and figures.
static LINES: Mutex<Vec<String>> = Mutex::new(Vec::new());

const FIGURE: &str = "figure ";

fn lines() -> MutexGuard<'static, Vec<String>> {
    LINES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds a line to `--rows`, or to what is printed at the end.
fn add(line: String) {
    let mut lines = lines();
    match super::argument("--rows") {
        Some(path) => {
            let file = File::options().append(true).create(true).open(path);
            let mut file = file.expect("--rows names a file to write to");
            writeln!(file, "{line}").expect("space");
        }
        None => lines.push(line),
    }
}

/// Adds what was measured, what the disk does, what stemkv does, and how the one compares with the other.
/// Where there is nothing to compare with, the column is empty.
pub fn row(what: impl Into<String>, disk: String, stemkv: String, share: String) {
    add([what.into(), disk, stemkv, share].join("\t"));
}

/// Adds a figure's line where several programs make the table. It was printed already.
pub(super) fn figure(line: &str) {
    if super::argument("--rows").is_some() {
        add(line.to_owned());
    }
}

/// A rate in bytes a second, in words.
pub fn rate(bytes_per_second: f64) -> String {
    format!("{:.2} GB/s", bytes_per_second / 1e9)
}

/// A share in words.
pub fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Prints the table, where it is this program's alone.
pub fn end() {
    print(&std::mem::take(&mut *lines()));
}

/// Prints what several programs have added to `path`.
pub fn print_file(path: &Path) {
    let text = fs::read_to_string(path).expect("what was measured before");
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    print(&lines);
}

/// In the order in which they were added, the rows first.
fn print(lines: &[String]) {
    let (figures, rows): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line.starts_with(FIGURE));
    let rows = rows.into_iter().map(|row| row.split('\t').collect());
    let head = vec!["", "this disk", "stemkv", "of the disk"];
    let rows: Vec<Vec<&str>> = [head].into_iter().chain(rows).collect();
    if rows.len() > 1 {
        let width = |column: usize| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths = [0, 1, 2, 3].map(width);
        println!();
        for row in &rows {
            let [what, disk, stemkv, share] = widths;
            let cell = |column: usize| row.get(column).copied().unwrap_or_default();
            println!(
                "{:<what$}  {:>disk$}  {:>stemkv$}  {:>share$}",
                cell(0),
                cell(1),
                cell(2),
                cell(3)
            );
        }
    }
    if !figures.is_empty() {
        println!();
        figures.iter().for_each(|figure| println!("{figure}"));
    }
}
