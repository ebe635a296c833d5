//! Devices that lack something.

use stemkv_store::{
    CpuDevice, Device, DeviceInfo, Error, Fence, HostArena, LayerId, PagedKv, Result, Stream,
    Submitted, Transfer,
};

/// Copies like the CPU device, but only raw slabs, as a GPU without the codec's kernels does.
#[derive(Default)]
pub struct RawOnly {
    pub device: CpuDevice,
    /// Memory of so many pages is out of its reach.
    pub unreached_pages: Option<u32>,
}

impl Device for RawOnly {
    fn info(&self) -> DeviceInfo {
        self.device.info()
    }
    fn attach(&self, arena: &HostArena) -> Result<()> {
        self.device.attach(arena)
    }
    fn record(&self, stream: Stream) -> Result<Fence> {
        self.device.record(stream)
    }
    fn order(&self, stream: Stream, fence: &Fence) -> Result<()> {
        self.device.order(stream, fence)
    }
    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted> {
        for index in 0..transfer.moves().len() {
            transfer.slab_offset(index, layer)?;
        }
        self.device.submit(transfer, layer, after)
    }
    fn check_pages(&self, pages: &PagedKv) -> Result<()> {
        match self.unreached_pages == Some(pages.pages()) {
            true => Err(Error::invalid("not this device's")),
            false => Ok(()),
        }
    }
}
