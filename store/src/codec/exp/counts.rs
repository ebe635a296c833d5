//! How often each exponent comes in a plane.
//!
//! Of a long plane one value of each 16-byte vector counts, which finds nearly the same codebook for an
//! eighth of the work. A vector's place says which of its eight values: were it always the same one, only
//! some of the channels would ever be seen, and which exponents are common differs from channel to channel.

/// Counts of exponents.
pub(super) struct Counts {
    pub(super) of: [u32; 256],
    /// Values of the plane for a counted one.
    pub(super) weight: usize,
}

/// Values of the shortest plane of which only some count.
pub(super) const SAMPLED_FROM: usize = 8192;

const VECTOR_VALUES: usize = 8;

/// Which of its values counts of a vector: by a multiplication, for rows of every usual length would meet
/// any simple turn at the same place again.
pub(super) fn counted_in(vector: usize) -> usize {
    ((vector as u32).wrapping_mul(0xcc9e_2d51) >> 29) as usize
}

impl Counts {
    /// Of the values of a raw plane.
    pub(super) fn of(raw: &[u8]) -> Counts {
        match raw.len() < 2 * SAMPLED_FROM {
            true => Counts {
                of: all(raw),
                weight: 1,
            },
            false => Counts {
                of: sampled(raw),
                weight: VECTOR_VALUES,
            },
        }
    }
}

/// Four tables, so that a run of one exponent does not wait for its own counter.
type Tables = [[u32; 256]; 4];

fn sampled(raw: &[u8]) -> [u32; 256] {
    let mut tables: Tables = [[0; 256]; 4];
    let (vectors, rest) = raw.as_chunks::<{ 2 * VECTOR_VALUES }>();
    for (index, vector) in vectors.iter().enumerate() {
        let at = 2 * counted_in(index);
        tables[index % 4][exponent([vector[at], vector[at + 1]])] += 1;
    }
    if let Some(value) = rest.as_chunks().0.get(counted_in(vectors.len())) {
        tables[0][exponent(*value)] += 1;
    }
    sum(tables)
}

fn all(raw: &[u8]) -> [u32; 256] {
    let mut tables: Tables = [[0; 256]; 4];
    let (words, rest) = raw.as_chunks::<8>();
    for word in words {
        let word = u64::from_le_bytes(*word);
        for (value, table) in tables.iter_mut().enumerate() {
            table[(word >> (16 * value + 7) & 0xff) as usize] += 1;
        }
    }
    for value in rest.as_chunks().0 {
        tables[0][exponent(*value)] += 1;
    }
    sum(tables)
}

fn exponent(value: [u8; 2]) -> usize {
    usize::from(u16::from_le_bytes(value) >> 7 & 0xff)
}

fn sum(tables: Tables) -> [u32; 256] {
    let [mut sum, others @ ..] = tables;
    for table in others {
        sum.iter_mut().zip(table).for_each(|(sum, n)| *sum += n);
    }
    sum
}
