//! Codebooks: which exponents of a plane have codes.

use super::counts::Counts;

/// The codes of one plane.
#[derive(Clone, Debug)]
pub(super) struct Book {
    /// 3 or 4.
    pub(super) bits: u8,
    /// By code; zero behind the last, and for the escape.
    pub(super) exponents: [u8; 16],
    /// By exponent: its code, or the escape.
    pub(super) codes: [u8; 256],
}

impl Book {
    /// The book of a plane of `groups` groups whose exponents come so often.
    pub(super) fn choose(counts: &Counts, groups: usize) -> Book {
        let Counts { of: counts, weight } = counts;
        let mut order: [u8; 256] = std::array::from_fn(|exponent| exponent as u8);
        let key = |&exponent: &u8| (u32::MAX - counts[usize::from(exponent)], exponent);
        order.select_nth_unstable_by_key(15, key);
        order[..15].sort_unstable_by_key(key);
        let total: u32 = counts.iter().sum();
        let beyond = |codes: usize| {
            let coded = order[..codes].iter();
            let coded: u32 = coded.map(|&exponent| counts[usize::from(exponent)]).sum();
            weight * (total - coded) as usize
        };
        let bits = match 12 * groups + beyond(7) <= 16 * groups + beyond(15) {
            true => 3,
            false => 4,
        };
        let mut exponents = [0; 16];
        let used = (1 << bits) - 1;
        exponents[..used].copy_from_slice(&order[..used]);
        let mut codes = [used as u8; 256];
        for (code, &exponent) in order[..used].iter().enumerate() {
            codes[usize::from(exponent)] = code as u8;
        }
        Book {
            bits,
            exponents,
            codes,
        }
    }

    /// The book that decodes what was encoded with these.
    pub(super) fn read(bits: u8, exponents: [u8; 16]) -> Book {
        Book {
            bits,
            exponents,
            codes: [0; 256],
        }
    }

    /// The code that stands for an escape.
    pub(super) fn escape(&self) -> u8 {
        (1 << self.bits) - 1
    }
}
