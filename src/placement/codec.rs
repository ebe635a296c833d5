//! Raw or encoded in RAM: a pure function of measured speeds and need.

/// Bytes of KV a second, as the engine counts them, one way and the other. Of saves from the call to the end.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Of raw chunks; `None` where nothing was measured.
    pub raw: Option<f64>,
    /// Of encoded ones.
    pub encoded: Option<f64>,
}

/// What the choice goes by.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CodecCosts {
    /// Does the CPU encode and decode, which the engine computes with?
    pub by_cpu: bool,
    /// Pages → RAM.
    pub save: Rates,
    /// RAM → pages.
    pub load: Rates,
    /// Raw bytes for a stored one, of what was encoded lately.
    pub ratio: Option<f64>,
    /// Does something else have to go for what is saved?
    pub is_full: bool,
    /// Bytes of KV a second that come from disk; `None` where there is none, or nothing was measured.
    pub disk: Option<f64>,
}

/// Below this the codec does not pay.
const RATIO_MIN: f64 = 1.05;
/// Loads slower than this part of raw ones are slower: measurements scatter.
const LOADS_AS_FAST: f64 = 0.97;
/// Saves must be faster than raw ones by this much: those find slots in pieces and have more chunks to evict
/// where most chunks are encoded, so they are measured slower there than they are in a store that stays raw (by up
/// to 5 % in `link.never_worse`).
const SAVES_FASTER: f64 = 1.05;

/// Are saves better encoded, and why.
pub fn encodes(costs: &CodecCosts) -> (bool, String) {
    let gb = |rate: f64| format!("{:.2} GB/s", rate / 1e9);
    let ratio = costs.ratio;
    if let Some(ratio) = ratio.filter(|&ratio| ratio < RATIO_MIN) {
        return (
            false,
            format!("chunks shrink by a factor of {ratio:.2} only"),
        );
    }
    let more = match ratio {
        Some(ratio) => format!("{ratio:.2} times as much fits"),
        None => "more fits".to_owned(),
    };
    if costs.by_cpu {
        if !costs.is_full {
            let why = "RAM is not full, and the CPU copies faster than it encodes";
            return (false, why.to_owned());
        }
        return match (costs.load.encoded, costs.disk) {
            (Some(decoding), Some(disk)) if decoding < disk => (
                false,
                format!(
                    "RAM is full, but the disk gives {}, and decoding {}",
                    gb(disk),
                    gb(decoding)
                ),
            ),
            _ => (true, format!("RAM is full, and {more}")),
        };
    }
    let both = [
        (costs.save, SAVES_FASTER, "saving"),
        (costs.load, LOADS_AS_FAST, "loading"),
    ];
    for (rates, least, what) in both {
        if let Rates {
            raw: Some(raw),
            encoded: Some(encoded),
        } = rates
            && encoded < raw * least
        {
            let only = if encoded < raw { "" } else { "only " };
            let why = format!(
                "{what} encoded reaches {only}{}, raw {}",
                gb(encoded),
                gb(raw)
            );
            return (false, why);
        }
    }
    match (costs.save.encoded, costs.save.raw) {
        (Some(encoded), Some(raw)) => (
            true,
            format!(
                "{more}, and saving reaches {}, raw {}",
                gb(encoded),
                gb(raw)
            ),
        ),
        _ => (true, format!("{more}; the speeds were not compared yet")),
    }
}

/// Shown: every verdict, with its words.
#[cfg(test)]
mod tests {
    use super::*;

    const fn rates(raw: f64, encoded: f64) -> Rates {
        Rates {
            raw: Some(raw),
            encoded: Some(encoded),
        }
    }

    fn check(costs: CodecCosts, expected: bool, words: &str) {
        let (encoded, why) = encodes(&costs);
        assert_eq!((encoded, why.as_str()), (expected, words));
    }

    #[test]
    fn a_link_device_encodes_unless_that_is_slower_or_gains_nothing() {
        let unknown = CodecCosts::default();
        check(unknown, true, "more fits; the speeds were not compared yet");
        let fast = CodecCosts {
            save: rates(55e9, 70e9),
            load: rates(54e9, 71e9),
            ratio: Some(1.38),
            ..unknown
        };
        check(
            fast,
            true,
            "1.38 times as much fits, and saving reaches 70.00 GB/s, raw 55.00 GB/s",
        );
        let slow_save = CodecCosts {
            save: rates(55e9, 49e9),
            ..fast
        };
        check(
            slow_save,
            false,
            "saving encoded reaches 49.00 GB/s, raw 55.00 GB/s",
        );
        let slow_load = CodecCosts {
            load: rates(54e9, 40e9),
            ..fast
        };
        check(
            slow_load,
            false,
            "loading encoded reaches 40.00 GB/s, raw 54.00 GB/s",
        );
        // Less than raw saves would gain in a store that stays raw.
        let close_save = CodecCosts {
            save: rates(55e9, 57e9),
            ..fast
        };
        check(
            close_save,
            false,
            "saving encoded reaches only 57.00 GB/s, raw 55.00 GB/s",
        );
        // Within what measurements scatter.
        let close_load = CodecCosts {
            load: rates(55e9, 54e9),
            ..fast
        };
        assert!(encodes(&close_load).0);
        let noise = CodecCosts {
            ratio: Some(1.01),
            ..fast
        };
        check(noise, false, "chunks shrink by a factor of 1.01 only");
    }

    #[test]
    fn the_cpu_encodes_only_where_ram_is_full_and_the_disk_is_no_faster() {
        let roomy = CodecCosts {
            by_cpu: true,
            save: rates(8e9, 2e9),
            load: rates(9e9, 4e9),
            ratio: Some(1.4),
            ..CodecCosts::default()
        };
        check(
            roomy,
            false,
            "RAM is not full, and the CPU copies faster than it encodes",
        );
        let full = CodecCosts {
            is_full: true,
            ..roomy
        };
        check(full, true, "RAM is full, and 1.40 times as much fits");
        let slow_disk = CodecCosts {
            disk: Some(1.5e9),
            ..full
        };
        assert!(encodes(&slow_disk).0);
        let fast_disk = CodecCosts {
            disk: Some(6e9),
            ..full
        };
        check(
            fast_disk,
            false,
            "RAM is full, but the disk gives 6.00 GB/s, and decoding 4.00 GB/s",
        );
    }
}
