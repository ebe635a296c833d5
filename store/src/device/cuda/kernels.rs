//! The kernels of `kernels/pages.cu` and their parameters.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use super::driver::{Context, Function, Module, OwnStream, launch};
use crate::{Checksummer, Direction, Error, Result};

const PTX: &str = include_str!("../../../kernels/pages.ptx");

/// As in `slab.cuh`.
pub(super) const PLANES_MAX: usize = 4;
pub(super) const LAYERS_MAX: usize = 32;
pub(super) const WARP: u32 = 32;
/// Bytes that one warp moves at a time: a piece of the slab checksum.
pub(super) const PIECE: u32 = Checksummer::PIECE_BYTES as u32;
/// Threads of a block.
pub(super) const THREADS: u32 = 512;

/// `Move` of `slab.cuh`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Move {
    pub(super) slab_offset: u64,
    pub(super) header_offset: u64,
    pub(super) token: u32,
    pub(super) moved: u32,
}

impl Move {
    pub(super) const BYTES: usize = size_of::<Move>();

    /// As the GPU reads it.
    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.slab_offset.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.header_offset.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.token.to_le_bytes());
        bytes[20..].copy_from_slice(&self.moved.to_le_bytes());
        bytes
    }
}

/// `Plane` of `slab.cuh`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Plane {
    pub(super) page_step: u64,
    pub(super) token_step: u64,
    pub(super) head_step: u64,
    pub(super) token_magic: u64,
    pub(super) head_magic: u64,
    pub(super) slab_start: u32,
    pub(super) token_bytes: u32,
    pub(super) head_bytes: u32,
    pub(super) unused: u32,
}

/// `Job` of `slab.cuh`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Job {
    pub(super) moves: u64,
    pub(super) pages: u64,
    pub(super) sums: u64,
    pub(super) slab_base: u64,
    pub(super) slab_step: u64,
    pub(super) layer_step: u64,
    pub(super) page_magic: u64,
    pub(super) page_tokens: u32,
    pub(super) first_page: u32,
    pub(super) from_token: u32,
    pub(super) first_move: u32,
    pub(super) count: u32,
    pub(super) all_moves: u32,
    pub(super) first_layer: u32,
    pub(super) planes: u32,
    pub(super) slab_bytes: u32,
    pub(super) long_runs: u32,
    /// One of [`VECTORS`].
    pub(super) width: u32,
    pub(super) unused: u32,
    pub(super) plane: [Plane; PLANES_MAX],
    pub(super) page_bases: [[u64; PLANES_MAX]; LAYERS_MAX],
}

/// `Slots` of `pages.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Slots {
    pub(super) moves: u64,
    pub(super) expected: u64,
    pub(super) stored: u64,
    pub(super) base: u64,
    pub(super) count: u32,
    pub(super) layers: u32,
    pub(super) layers_at: u32,
    pub(super) slabs_at: u32,
    pub(super) entry_bytes: u32,
    pub(super) unused: u32,
}

/// `Ends` of `pages.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Ends {
    pub(super) moves: u64,
    pub(super) sums: u64,
    pub(super) expected: u64,
    pub(super) stored: u64,
    pub(super) answers: u64,
    pub(super) slab_bytes: u32,
    pub(super) count: u32,
    pub(super) first_layer: u32,
    pub(super) are_summed: u32,
}

/// Widths of the vectors that the kernels move, widest first.
const VECTORS: [u32; 4] = [16, 4, 2, 1];

/// A kernel for the widest vectors, and one for all others, which is slower and many times smaller than one for each of
/// them: what the driver has to compile at open counts.
pub(super) struct OfWidths {
    pub(super) wide: Function,
    pub(super) narrow: Function,
}

impl OfWidths {
    pub(super) fn get(module: &Module, wide: &CStr, narrow: &CStr) -> Result<OfWidths> {
        Ok(OfWidths {
            wide: module.function(wide)?,
            narrow: module.function(narrow)?,
        })
    }

    pub(super) fn of(&self, job: &Job) -> Function {
        match job.is_wide() {
            true => self.wide,
            false => self.narrow,
        }
    }
}

impl Job {
    /// Do the pages allow the widest vectors?
    pub(super) fn is_wide(&self) -> bool {
        self.width == VECTORS[0]
    }
}

pub(super) struct Kernels {
    _module: Module,
    scatter: OfWidths,
    gather: OfWidths,
    expect: Function,
    finish: Function,
}

impl Kernels {
    pub(super) fn new(context: &Arc<Context>) -> Result<Kernels> {
        let ptx = CString::new(PTX).map_err(|_| Error::internal("the PTX has a zero byte"))?;
        let module = Module::new(context, &ptx).map_err(|error| {
            Error::unavailable("the CUDA driver does not take the store's kernels: CUDA 12.4 or later and a GPU from the A100 on are needed").caused_by(error)
        })?;
        Ok(Kernels {
            scatter: OfWidths::get(&module, c"scatter", c"scatter_narrow")?,
            gather: OfWidths::get(&module, c"gather", c"gather_narrow")?,
            expect: module.function(c"expect")?,
            finish: module.function(c"finish")?,
            _module: module,
        })
    }

    /// Puts one job, over `layers` layers, on `stream`.
    ///
    /// # Safety
    /// Everything that `job` names is valid for the kernel until it has ended, and its `width` divides
    /// every address, offset, pitch and row of it.
    pub(super) unsafe fn launch(
        &self,
        stream: &OwnStream,
        direction: Direction,
        job: &Job,
        layers: u32,
        blocks_max: u32,
    ) -> Result<()> {
        debug_assert!(layers as usize <= LAYERS_MAX);
        let function = match direction {
            Direction::Load => self.scatter.of(job),
            Direction::Save => self.gather.of(job),
        };
        let tasks = u64::from(job.count) * u64::from(job.slab_bytes.div_ceil(PIECE));
        let grid = grid(tasks, layers, blocks_max);
        // SAFETY: `Job` mirrors the parameter; the rest is the caller's promise.
        unsafe { launch(stream, function, grid, THREADS, job) }
    }

    /// Puts the kernel on `stream` that fetches what slots say of their slabs.
    ///
    /// # Safety
    /// As [`Kernels::launch`]; the slots' header pages are as they were sealed.
    pub(super) unsafe fn expect(&self, stream: &OwnStream, slots: &Slots) -> Result<()> {
        let blocks = slots.count.div_ceil(THREADS / WARP).min(EXPECT_BLOCKS);
        // SAFETY: `Slots` mirrors the parameter; the rest is the caller's promise.
        unsafe { launch(stream, self.expect, (blocks, 1), THREADS, slots) }
    }

    /// Puts the kernel on `stream` that compares the sums of `layers` layers of a load.
    ///
    /// # Safety
    /// As [`Kernels::launch`].
    pub(super) unsafe fn finish(&self, stream: &OwnStream, ends: &Ends, layers: u32) -> Result<()> {
        // SAFETY: `Ends` mirrors the parameter; the rest is the caller's promise.
        unsafe { launch(stream, self.finish, (layers, 1), THREADS, ends) }
    }
}

/// Blocks of the kernel that fetches what slots say: the host's memory is far, not busy.
const EXPECT_BLOCKS: u32 = 32;

/// The factor by which the kernels divide by `divisor` (see `divide` of `slab.cuh`).
pub(super) const fn magic(divisor: u32) -> u64 {
    match divisor {
        0 | 1 => 0,
        _ => ((1_u128 << 64) / divisor as u128) as u64 + 1,
    }
}

/// A factor with which every quotient is 0.
pub(super) const ALWAYS_ZERO: u64 = 1;

/// Blocks for so many warps' tasks in each of `layers` layers, `blocks_max` in all.
pub(super) fn grid(tasks: u64, layers: u32, blocks_max: u32) -> (u32, u32) {
    let blocks = tasks.div_ceil(u64::from(THREADS / WARP));
    let most = u64::from(blocks_max.div_ceil(layers)).max(1);
    (blocks.clamp(1, most) as u32, layers)
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
pub(super) mod tests {
    use super::*;

    /// The first line of the PTX that `store/kernels/build.py` makes of `source`.
    pub(in super::super) fn source_line(source: &[u8]) -> String {
        let codec = include_bytes!("../../../kernels/exp.cuh");
        let slab = include_bytes!("../../../kernels/slab.cuh");
        let bytes = source.iter().chain(codec).chain(slab);
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        format!("// source fnv1a {hash:016x}")
    }

    #[test]
    fn the_ptx_names_the_hash_of_its_source() {
        let source = include_bytes!("../../../kernels/pages.cu");
        assert_eq!(PTX.lines().next(), Some(&*source_line(source)));
        for name in ["scatter", "scatter_narrow", "gather", "gather_narrow"] {
            assert!(PTX.contains(&format!(".entry {name}(")), "{name}");
        }
    }

    #[test]
    fn parameters_are_as_large_as_the_kernels_take() {
        let kernels = |bytes: usize| PTX.matches(&format!("_param_0[{bytes}]")).count();
        assert_eq!(kernels(size_of::<Job>()), 4);
        assert_eq!(kernels(size_of::<Slots>()), 2, "two have this size");
        assert_eq!(size_of::<Slots>(), size_of::<Ends>());
        assert_eq!((Move::BYTES, size_of::<Plane>()), (24, 56));
    }

    #[test]
    fn magic_factors_divide_exactly() {
        let divide = |n: u32, magic: u64| match magic {
            0 => n,
            _ => ((u128::from(n) * u128::from(magic)) >> 64) as u32,
        };
        let divisors = [
            1,
            2,
            3,
            5,
            7,
            12,
            13,
            16,
            576,
            1000,
            1152,
            (1 << 20) - 1,
            1 << 31,
        ];
        for divisor in divisors {
            for n in [0, 1, 2, 4095, 4096, 65_535, 1 << 30, u32::MAX - 1, u32::MAX] {
                let edges = [
                    n,
                    n / divisor * divisor,
                    (n / divisor * divisor).wrapping_sub(1),
                ];
                for n in edges {
                    assert_eq!(divide(n, magic(divisor)), n / divisor, "{n} / {divisor}");
                }
            }
        }
        assert_eq!(divide(u32::MAX, ALWAYS_ZERO), 0);
    }

    #[test]
    fn vectors_are_as_wide_as_everything_allows() {
        assert_eq!(vector_for(0x1000 | 48), 16);
        assert_eq!(vector_for(0x1000 | 8), 4);
        assert_eq!(vector_for(6), 2);
        assert_eq!(vector_for(0x1001), 1);
    }
}
