//! Encodes slabs with `exp` on the GPU: the kernels of `kernels/exp_save.cu`, and what they are told.

use std::cell::Cell;
use std::ffi::CString;
use std::sync::Arc;

use super::driver::{
    Context, DeviceBuffer, Function, Module, OwnStream, PinnedBuffer, launch_with, zero,
};
use super::exp::{CodedPlane, planes_of};
use super::kernels::{Job, LAYERS_MAX, OfWidths, PLANES_MAX, THREADS, WARP};
use super::lane::RING;
use crate::codec::exp::{ExpShape, TILE_BYTES};
use crate::{Error, KvGeometry, Result};

const PTX: &str = include_str!("../../../kernels/exp_save.ptx");
/// Slabs of a slice, at most.
pub(super) const SLABS_MAX: usize = 4096;
/// Bytes of an answer: the sum of a slab's pieces, where it starts in its row, and its length.
const ANSWER_BYTES: usize = 16;
/// Tiles of a slab that a block takes whole, and those of a warp.
pub(super) const TILES_MAX: u32 = 32;
pub(super) const WARP_TILES: u32 = 2;
/// Shared memory that a block needs for each plane.
const PLANE_SHARED_BYTES: u32 = 256 * (4 + 1);

/// `Encode` of `exp_save.cu`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Encode {
    job: Job,
    rows: u64,
    move_step: u64,
    layer_step: u64,
    widths: u64,
    longest: u64,
    known: u64,
    answers: u64,
    plane: [CodedPlane; PLANES_MAX],
    tiles: u32,
    groups: u32,
    epoch: u32,
    unused: u32,
}

/// How the slabs of a row come to lie in staging memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// One layer right behind the longest slab of the layer before.
    Packed,
    /// Each where its raw slab would be.
    Apart,
}

impl Encode {
    pub(super) fn layout(&self) -> Layout {
        match self.job.is_wide() && self.tiles <= TILES_MAX {
            true => Layout::Packed,
            false => Layout::Apart,
        }
    }
}

pub(super) struct SaveKernels {
    _module: Module,
    encode: Function,
    /// For slabs that are too large for that, or pages that do not allow the widest vectors.
    encode_large: OfWidths,
}

impl SaveKernels {
    pub(super) fn new(context: &Arc<Context>) -> Result<SaveKernels> {
        let ptx = CString::new(PTX).map_err(|_| Error::internal("the PTX has a zero byte"))?;
        let module = Module::new(context, &ptx)?;
        let encode = module.function(c"encode")?;
        let tiles_bytes = (TILES_MAX as usize * TILE_BYTES) as u32;
        module.allow_shared(encode, tiles_bytes + PLANES_MAX as u32 * PLANE_SHARED_BYTES)?;
        Ok(SaveKernels {
            encode,
            encode_large: OfWidths::get(&module, c"encode_large", c"encode_narrow")?,
            _module: module,
        })
    }

    /// Puts the encoding of the slabs of `layers` layers on `stream`.
    ///
    /// # Safety
    /// Everything that `job` names is valid for the kernel until it has ended, and its `width` divides what
    /// it names; rows start on multiples of 256 bytes, have room for their raw slabs, and are this
    /// kernel's alone, as the answers are. Kernels of one [`Encoder`] run one after the other.
    pub(super) unsafe fn launch(
        &self,
        stream: &OwnStream,
        job: &Encode,
        layers: u32,
    ) -> Result<()> {
        let grid = (job.job.count, layers);
        let (function, threads, shared) = match job.layout() {
            Layout::Packed => (
                self.encode,
                job.tiles.div_ceil(WARP_TILES) * WARP,
                job.job.slab_bytes.next_multiple_of(16) + job.job.planes * PLANE_SHARED_BYTES,
            ),
            Layout::Apart => (self.encode_large.of(&job.job), THREADS, 0),
        };
        // SAFETY: `Encode` mirrors the parameter; the rest is the caller's promise.
        unsafe { launch_with(stream, function, grid, threads, shared, job) }
    }
}

/// What a lane keeps to encode with.
pub(super) struct Encoder {
    /// By layer: how wide it is, its longest slab, and how many are known.
    layers: DeviceBuffer,
    /// By staging slot, of slices that begin there.
    answers: PinnedBuffer,
    epoch: Cell<u32>,
}

const LONGEST_AT: usize = LAYERS_MAX * 8;
const KNOWN_AT: usize = LONGEST_AT + LAYERS_MAX * 4;
const LAYERS_BYTES: usize = KNOWN_AT + LAYERS_MAX * 4;

impl Encoder {
    /// What is encoded with it runs on `stream`.
    pub(super) fn new(context: &Arc<Context>, stream: &OwnStream) -> Result<Encoder> {
        let layers = DeviceBuffer::new(context, LAYERS_BYTES)?;
        // SAFETY: the whole buffer, which only kernels on this stream use.
        unsafe { zero(stream, layers.address(), LAYERS_BYTES)? };
        Ok(Encoder {
            layers,
            answers: PinnedBuffer::new(context, RING * SLABS_MAX * ANSWER_BYTES)?,
            epoch: Cell::new(0),
        })
    }

    /// The kernel's parameter for the slabs of `job`, into the rows from staging slot `slot` on, which start at
    /// `rows`, `step` bytes apart.
    pub(super) fn job(
        &self,
        geometry: &KvGeometry,
        job: Job,
        step: usize,
        slot: usize,
        rows: u64,
    ) -> Result<Encode> {
        let shape = ExpShape::new(geometry)
            .ok_or_else(|| Error::invalid("only bf16 is encoded with exp"))?;
        let layers = self.layers.address();
        self.epoch.set(self.epoch.get().wrapping_add(1));
        Ok(Encode {
            job,
            rows,
            move_step: step as u64,
            layer_step: geometry.slab_stride() as u64,
            widths: layers,
            longest: layers + LONGEST_AT as u64,
            known: layers + KNOWN_AT as u64,
            answers: self.answers.address() + (slot * SLABS_MAX * ANSWER_BYTES) as u64,
            plane: planes_of(&shape)?,
            tiles: shape.tiles() as u32,
            groups: shape.groups() as u32,
            epoch: self.epoch.get(),
            unused: 0,
        })
    }

    /// What the GPU says of a slab, to be asked for once it has said so.
    pub(super) fn answer(&self, slot: usize, slab: usize) -> Answer {
        let at = (slot * SLABS_MAX + slab) * ANSWER_BYTES;
        let word = |index: usize| self.answers.word(at + 4 * index);
        Answer {
            sum: u64::from(word(0)) | u64::from(word(1)) << 32,
            offset: word(2) as usize,
            bytes: word(3) as usize,
        }
    }
}

pub(super) struct Answer {
    /// Of the slab's pieces.
    pub(super) sum: u64,
    /// In its row.
    pub(super) offset: usize,
    /// None where the kernel gave up.
    pub(super) bytes: usize,
}

/// Shown: the PTX was made from the sources beside it, and its parameter has the size that is passed.
#[cfg(test)]
mod tests {
    use super::super::kernels::tests::source_line;
    use super::*;

    #[test]
    fn the_ptx_names_the_hash_of_its_source() {
        let source = include_bytes!("../../../kernels/exp_save.cu");
        assert_eq!(PTX.lines().next(), Some(&*source_line(source)));
    }

    #[test]
    fn the_parameter_is_as_large_as_the_kernels_take() {
        let size = format!("_param_0[{}]", size_of::<Encode>());
        assert_eq!(PTX.matches(&size).count(), 3);
    }
}
