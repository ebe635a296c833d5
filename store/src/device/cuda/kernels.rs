//! The kernels of `kernels/pages.cu` and their parameters.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use super::driver::{Context, Function, Module, OwnStream, launch};
use crate::{Direction, Error, Result};

const PTX: &str = include_str!("../../../kernels/pages.ptx");

/// As in `pages.cu`.
pub(super) const PLANES_MAX: usize = 4;
pub(super) const LAYERS_MAX: usize = 16;
const WARP: u32 = 32;
const BATCH: u32 = 8;
/// Threads of a block.
pub(super) const THREADS: u32 = 512;

/// `Piece` of `pages.cu`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Piece {
    pub(super) page_offset: u64,
    pub(super) slab_offset: u32,
    pub(super) slab: u32,
    pub(super) rows: u32,
    pub(super) row_bytes: u32,
    pub(super) plane: u32,
    pub(super) unused: u32,
}

impl Piece {
    pub(super) const BYTES: usize = size_of::<Piece>();

    /// As the GPU reads it.
    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.page_offset.to_le_bytes());
        let words = [
            self.slab_offset,
            self.slab,
            self.rows,
            self.row_bytes,
            self.plane,
            self.unused,
        ];
        for (word, place) in words.into_iter().zip(bytes[8..].chunks_exact_mut(4)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// `Job` of `pages.cu`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Job {
    pub(super) pieces: u64,
    pub(super) slab_offsets: u64,
    pub(super) slab_base: u64,
    pub(super) slab_step: u64,
    pub(super) layer_step: u64,
    pub(super) first_slab: u32,
    pub(super) count: u32,
    pub(super) tasks: u32,
    pub(super) unused: u32,
    pub(super) page_pitch: [u64; PLANES_MAX],
    pub(super) slab_pitch: [u64; PLANES_MAX],
    pub(super) page_bases: [[u64; PLANES_MAX]; LAYERS_MAX],
}

/// Widths of the vectors that the kernels move, widest first.
pub(super) const VECTORS: [u32; 4] = [16, 4, 2, 1];

pub(super) struct Kernels {
    _module: Module,
    /// By [`VECTORS`].
    scatter: [Function; 4],
    gather: [Function; 4],
}

impl Kernels {
    pub(super) fn new(context: &Arc<Context>) -> Result<Kernels> {
        let ptx = CString::new(PTX).map_err(|_| Error::internal("the PTX has a zero byte"))?;
        let module = Module::new(context, &ptx).map_err(|error| {
            Error::unavailable("the CUDA driver does not take the store's kernels: CUDA 12.4 or later and a GPU from the A100 on are needed").caused_by(error)
        })?;
        let get = |names: [&CStr; 4]| -> Result<[Function; 4]> {
            let [a, b, c, d] = names;
            Ok([
                module.function(a)?,
                module.function(b)?,
                module.function(c)?,
                module.function(d)?,
            ])
        };
        Ok(Kernels {
            scatter: get([c"scatter_16", c"scatter_4", c"scatter_2", c"scatter_1"])?,
            gather: get([c"gather_16", c"gather_4", c"gather_2", c"gather_1"])?,
            _module: module,
        })
    }

    /// Puts one job, over `layers` layers, on `stream`.
    ///
    /// # Safety
    /// Everything that `job` names is valid for the kernel until it has ended, and `vector` divides
    /// every address, offset, pitch and row of it.
    pub(super) unsafe fn launch(
        &self,
        stream: &OwnStream,
        direction: Direction,
        vector: u32,
        job: &Job,
        layers: u32,
        blocks_max: u32,
    ) -> Result<()> {
        debug_assert!(layers as usize <= LAYERS_MAX);
        let index = VECTORS
            .iter()
            .position(|&width| width == vector)
            .ok_or_else(|| Error::internal("no kernel has vectors of this width"))?;
        let function = match direction {
            Direction::Load => self.scatter[index],
            Direction::Save => self.gather[index],
        };
        let warps = u64::from(THREADS / WARP);
        let blocks = (u64::from(job.count) * u64::from(job.tasks)).div_ceil(warps);
        let blocks = blocks.clamp(1, u64::from(blocks_max.div_ceil(layers)).max(1)) as u32;
        // SAFETY: `Job` mirrors the parameter; the rest is the caller's promise.
        unsafe { launch(stream, function, (blocks, layers), THREADS, job) }
    }
}

/// Tasks of a piece with `bytes` bytes in vectors of `vector`.
pub(super) fn tasks(bytes: u64, vector: u32) -> u32 {
    bytes.div_ceil(u64::from(vector * WARP * BATCH)) as u32
}

/// The widest vector that divides `bits`, which is the bitwise or of everything it must divide.
pub(super) fn vector_for(bits: u64) -> u32 {
    VECTORS
        .into_iter()
        .find(|&width| bits.is_multiple_of(u64::from(width)))
        .expect("1 divides everything")
}

/// Shown: the PTX was made from the source beside it, and parameters have the sizes of `pages.cu`.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ptx_names_the_hash_of_its_source() {
        let source = include_bytes!("../../../kernels/pages.cu");
        let hash = source
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        let first = PTX.lines().next().expect("not empty");
        assert_eq!(
            first,
            format!("// source fnv1a {hash:016x}"),
            "run store/kernels/build.py"
        );
        for name in ["scatter_16", "scatter_1", "gather_16", "gather_2"] {
            assert!(PTX.contains(&format!(".entry {name}(")), "{name}");
        }
    }

    #[test]
    fn parameters_are_as_large_as_the_kernels_take() {
        let sizes = PTX
            .matches(&format!("_param_0[{}]", size_of::<Job>()))
            .count();
        assert!(sizes >= 8, "every kernel takes a Job");
        assert_eq!(Piece::BYTES, 32);
    }

    #[test]
    fn vectors_are_as_wide_as_everything_allows() {
        assert_eq!(vector_for(0x1000 | 48), 16);
        assert_eq!(vector_for(0x1000 | 8), 4);
        assert_eq!(vector_for(6), 2);
        assert_eq!(vector_for(0x1001), 1);
        assert_eq!(tasks(4096, 16), 1);
        assert_eq!(tasks(4097, 16), 2);
    }
}
