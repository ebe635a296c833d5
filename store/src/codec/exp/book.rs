//! Codebooks: which exponents of a plane have codes.

/// The codes of one plane.
#[derive(Clone, Debug)]
pub(super) struct Book {
    /// 3 or 4.
    pub(super) bits: u8,
    /// By code; zero behind the last, and for the escape.
    pub(super) exponents: [u8; 16],
    /// By exponent: its code, or the escape.
    pub(super) codes: [u8; 256],
    /// Values of the plane without a code. Only known to who chose.
    pub(super) escapes: usize,
}

impl Book {
    /// The book of a plane of `groups` groups whose exponents come so often.
    pub(super) fn choose(counts: &[u32; 256], groups: usize) -> Book {
        let mut order: [u8; 256] = std::array::from_fn(|exponent| exponent as u8);
        let key = |&exponent: &u8| (u32::MAX - counts[usize::from(exponent)], exponent);
        order.select_nth_unstable_by_key(15, key);
        order[..15].sort_unstable_by_key(key);
        let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
        let escapes = |codes: usize| {
            let coded = order[..codes].iter();
            let coded: u64 = coded.map(|&e| u64::from(counts[usize::from(e)])).sum();
            (total - coded) as usize
        };
        let (three, four) = (escapes(7), escapes(15));
        let (bits, escapes) = match 12 * groups + three <= 16 * groups + four {
            true => (3, three),
            false => (4, four),
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
            escapes,
        }
    }

    /// The book that decodes what was encoded with these.
    pub(super) fn read(bits: u8, exponents: [u8; 16]) -> Book {
        Book {
            bits,
            exponents,
            codes: [0; 256],
            escapes: 0,
        }
    }

    /// The code that stands for an escape.
    pub(super) fn escape(&self) -> u8 {
        (1 << self.bits) - 1
    }
}
