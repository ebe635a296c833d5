//! How numbers, times and tables look to people.

use std::io::{self, Write};

use stemkv_store::Key;

/// `1536` → `1.5 KiB`: at most one digit behind the point, the unit always there.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // What would be printed as 1024.0 is one of the next unit.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `1234567` → `1,234,567`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number of things: `1 block`, `2 blocks`.
pub(crate) fn plural(number: u64, one: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{} {one}{s}", count(number))
}

/// What is said behind a store's bytes of files that could not be read.
pub(crate) fn unread(files: u64, unread_bytes: u64) -> String {
    format!(
        "; {} of {} could not be read and wait in unread/",
        plural(files, "file"),
        bytes(unread_bytes)
    )
}

/// How long ago a time was, roughly.
pub(crate) fn ago(now_ms: u64, then_ms: u64) -> String {
    let seconds = now_ms.saturating_sub(then_ms) / 1000;
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// How long ago a record was used; one of a broken store has no last use.
pub(crate) fn last_use(now_ms: u64, last_use_ms: u64) -> String {
    match last_use_ms {
        0 => "unknown".into(),
        _ => ago(now_ms, last_use_ms),
    }
}

/// Microseconds with a unit that fits.
pub(crate) fn micros(us: f64) -> String {
    match us {
        us if us < 1.0 => format!("{:.0} ns", us * 1e3),
        us if us < 1e3 => format!("{us:.1} µs"),
        us if us < 1e6 => format!("{:.1} ms", us / 1e3),
        us => format!("{:.1} s", us / 1e6),
    }
}

/// A key of 64 hexadecimal digits, shortened as [`Key`] shortens itself.
pub(crate) fn short(hex: &str) -> &str {
    hex.get(..8).unwrap_or(hex)
}

/// How a cell stands in its column.
#[derive(Clone, Copy)]
pub(crate) enum Column {
    Left,
    Right,
}

/// Rows of cells, printed in columns as wide as their widest cell.
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with a line of names on top.
    pub(crate) fn new(columns: &[(&str, Column)]) -> Self {
        Table {
            columns: columns.iter().map(|&(_, column)| column).collect(),
            rows: vec![columns.iter().map(|&(name, _)| name.to_owned()).collect()],
        }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub(crate) fn show(&self, out: &mut dyn Write) -> io::Result<()> {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        for row in &self.rows {
            let mut line = String::new();
            for (i, (cell, column)) in row.iter().zip(&self.columns).enumerate() {
                let padding = " ".repeat(width(i) - cell.chars().count());
                if i > 0 {
                    line.push_str("  ");
                }
                match column {
                    Column::Left => line.extend([cell, padding.as_str()]),
                    Column::Right => line.extend([padding.as_str(), cell]),
                }
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// `name` and what belongs to it, in a column of names.
pub(crate) fn field(out: &mut dyn Write, name: &str, value: &str) -> io::Result<()> {
    // One that is too long for its column is still apart.
    writeln!(out, "{name:<11} {value}")
}

/// A bar as long as `part` of `whole`, at most 40 wide; something is never nothing.
pub(crate) fn bar(part: u64, whole: u64) -> String {
    let length = (part * 40).div_ceil(whole.max(1)) as usize;
    "#".repeat(length)
}

/// Reads the leading digits of a key; `None` for anything but 4 to 64 hexadecimal digits.
pub(crate) fn key_digits(text: &str) -> Option<String> {
    let fits = (4..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    fits.then(|| text.to_ascii_lowercase())
}

/// Does `key` begin with these digits?
pub(crate) fn begins_with(key: &Key, digits: &str) -> bool {
    key.to_hex().starts_with(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_carry_their_units_and_the_largest_that_fits() {
        let sizes = [0, 1023, 1024, 1536, (1 << 20) - 1, 1 << 20, u64::MAX];
        let texts = sizes.map(bytes);
        let expected = [
            "0 B",
            "1023 B",
            "1.0 KiB",
            "1.5 KiB",
            "1.0 MiB",
            "1.0 MiB",
            "16384.0 PiB",
        ];
        assert_eq!(texts, expected);
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(count),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(plural(1, "block"), "1 block");
        assert_eq!(plural(0, "block"), "0 blocks");
        let us = [0.25, 12.34, 5_600.0, 7_800_000.0].map(micros);
        assert_eq!(us, ["250 ns", "12.3 µs", "5.6 ms", "7.8 s"]);
    }

    #[test]
    fn times_are_rounded_down_and_never_in_the_future() {
        let texts = [59, 60, 3599, 3600, 172_800].map(|s| ago(s * 1000, 0));
        assert_eq!(
            texts,
            [
                "59 s ago",
                "1 min ago",
                "59 min ago",
                "1 h ago",
                "2 days ago"
            ]
        );
        assert_eq!(ago(0, 5000), "0 s ago");
    }

    #[test]
    fn a_name_is_apart_from_its_value_however_long_it_is() {
        let mut out = Vec::new();
        for name in ["host", "would evict", "device tier 0"] {
            field(&mut out, name, "1.5 GiB").expect("memory");
        }
        let shown = String::from_utf8(out).expect("text");
        let expected = "host        1.5 GiB\nwould evict 1.5 GiB\ndevice tier 0 1.5 GiB\n";
        assert_eq!(shown, expected);
    }

    #[test]
    fn columns_line_up_by_characters_and_no_line_ends_in_spaces() {
        let mut table = Table::new(&[("µs", Column::Right), ("a", Column::Left)]);
        table.row(["1".to_owned(), "long".to_owned()]);
        let mut out = Vec::new();
        table.show(&mut out).expect("memory");
        let shown = String::from_utf8(out).expect("text");
        assert_eq!(shown, "µs  a\n 1  long\n");
    }
}
