//! Which instructions tiles are coded with.

/// A set of instructions. Each writes the same bytes and refuses the same ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// What the program was compiled for.
    Portable,
    /// x86-64 with SSSE3.
    Ssse3,
    /// x86-64 with AVX2 and BMI.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL, VBMI and VBMI2.
    Avx512,
}

impl Vectors {
    const ALL: [Vectors; 4] = [
        Vectors::Portable,
        Vectors::Ssse3,
        Vectors::Avx2,
        Vectors::Avx512,
    ];

    /// Those that this processor has, the fastest last.
    pub fn available() -> impl DoubleEndedIterator<Item = Vectors> {
        Vectors::ALL
            .into_iter()
            .filter(|vectors| vectors.is_there())
    }

    pub(super) fn best() -> Vectors {
        Vectors::available()
            .next_back()
            .unwrap_or(Vectors::Portable)
    }

    pub(super) fn is_there(self) -> bool {
        match self {
            Vectors::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Vectors::Ssse3 => super::x86::has_ssse3(),
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx2 => super::x86::has_avx2(),
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => super::avx512::is_there() && super::x86::has_avx2(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}
