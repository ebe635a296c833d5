use std::fmt;

/// The name of a chunk: 32 opaque bytes, compared whole.
///
/// Above this crate a key is a *sequence hash* (256-bit keyed blake3). It is never truncated as
/// identity: two chunks are the same chunk only where all 32 bytes are equal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Key(pub [u8; 32]);

impl Key {
    /// 32 zero bytes: the parent of a root's first block in records.
    pub const ZERO: Key = Key([0; 32]);

    /// The key as 64 lower-case hexadecimal digits.
    pub fn to_hex(&self) -> String {
        use fmt::Write as _;
        self.0
            .iter()
            .fold(String::with_capacity(64), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            })
    }

    /// Reads 64 hexadecimal digits; `None` for anything else.
    pub fn from_hex(hex: &str) -> Option<Key> {
        if hex.len() != 64 || !hex.is_ascii() {
            return None;
        }
        let mut key = [0; 32];
        for (i, byte) in key.iter_mut().enumerate() {
            *byte = u8::from_str_radix(hex.get(2 * i..2 * i + 2)?, 16).ok()?;
        }
        Some(Key(key))
    }
}

/// The first eight hexadecimal digits, for people. Machines get [`Key::to_hex`].
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4]
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_reads_back_and_refuses_everything_else() {
        let key = Key(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(Key::from_hex(&key.to_hex()), Some(key));
        assert_eq!(Key::from_hex(&key.to_hex()[1..]), None);
        assert_eq!(Key::from_hex(&format!("{}zz", &key.to_hex()[2..])), None);
        assert_eq!(Key::from_hex(&"é".repeat(32)), None);
        assert_eq!(key.to_string(), "00070e15");
    }
}
