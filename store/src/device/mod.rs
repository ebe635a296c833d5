//! The device seam: who copies between the store's slots and an engine's pages.

#[cfg(feature = "cuda")]
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
#[cfg(feature = "cuda")]
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::transfer::Plan;
use crate::{
    Checksum, CodecId, Error, FillingRef, HostArena, KvGeometry, LayerId, PageTable, PagedKv,
    RecordHeader, Result, SlabEntry, Slot,
};

mod arena;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod encoded;
#[cfg(any(test, feature = "sim"))]
mod sim;
mod streaming;

pub(crate) use arena::SlotPages;
pub use arena::{
    DeviceArena, DeviceArenaUsage, DeviceFilling, DeviceFillingRef, DeviceSlot, DeviceSlotId,
};
pub use cpu::CpuDevice;
#[cfg(feature = "cuda")]
pub use cuda::{Calibration, CudaDevice, LinkRates};
pub use encoded::EncodedSave;
#[cfg(any(test, feature = "sim"))]
pub use sim::{SimDevice, SimDeviceFault};

/// An engine's stream (a `CUstream` as an integer); [`Stream::HOST`] for engines on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream(pub u64);

impl Stream {
    /// The calling thread itself: ordering it behind a fence means waiting.
    pub const HOST: Stream = Stream(0);
}

/// A recorded point on a stream. Clones are the same point.
#[derive(Clone)]
pub struct Fence(Arc<dyn FencePoint>);

/// What a device promises of its fences. A point that cannot be reached any more answers with an
/// error only once nothing before it touches memory; until then it is just not reached.
pub trait FencePoint: Send + Sync + 'static {
    /// Has the point been reached?
    ///
    /// # Errors
    /// `Unavailable` where the device failed before it.
    fn is_reached(&self) -> Result<bool>;

    /// Waits on the host until the point is reached; `false` after `timeout`.
    ///
    /// # Errors
    /// As [`FencePoint::is_reached`].
    fn wait(&self, timeout: Duration) -> Result<bool>;

    /// For the device that made it.
    fn as_any(&self) -> &dyn std::any::Any;
}

impl Fence {
    /// Wraps a device's own point.
    pub fn new(point: impl FencePoint) -> Fence {
        Fence(Arc::new(point))
    }

    /// A point that has been reached already: for engines on the CPU, whose writes are done when
    /// they say so.
    pub fn reached() -> Fence {
        struct Reached;
        impl FencePoint for Reached {
            fn is_reached(&self) -> Result<bool> {
                Ok(true)
            }
            fn wait(&self, _: Duration) -> Result<bool> {
                Ok(true)
            }
            fn as_any(&self) -> &dyn std::any::Any {
                self
            }
        }
        Fence::new(Reached)
    }

    /// The device's own point.
    pub fn point(&self) -> &dyn FencePoint {
        &*self.0
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The store's slots → engine pages.
    Load,
    /// Engine pages → the store's slots.
    Save,
}

/// The store's side of one slab's move.
#[derive(Clone)]
pub enum SlabMove {
    /// Read from a sealed slot of the host tier.
    Load {
        /// The chunk.
        slot: Slot,
        /// The prompt position of the chunk's first token.
        token: u32,
    },
    /// Write into a slot of the host tier that is being filled.
    Save {
        /// The chunk.
        slot: FillingRef,
        /// The prompt position of the chunk's first token.
        token: u32,
    },
    /// Read from a sealed slot of the device tier.
    LoadDevice {
        /// The chunk.
        slot: DeviceSlot,
        /// The prompt position of the chunk's first token.
        token: u32,
    },
    /// Write into a slot of the device tier that is being filled.
    SaveDevice {
        /// The chunk.
        slot: DeviceFillingRef,
        /// The prompt position of the chunk's first token.
        token: u32,
    },
}

/// The arena of a move's slot.
#[derive(Clone, Copy)]
enum Home<'a> {
    Host(&'a HostArena),
    Device(&'a DeviceArena),
}

impl Home<'_> {
    fn is_same(&self, other: &Home<'_>) -> bool {
        match (self, other) {
            (Home::Host(arena), Home::Host(other)) => arena.is_same(other),
            (Home::Device(arena), Home::Device(other)) => arena.is_same(other),
            _ => false,
        }
    }

    fn geometry(&self) -> &KvGeometry {
        match self {
            Home::Host(arena) => arena.geometry(),
            Home::Device(arena) => arena.geometry(),
        }
    }
}

/// Some chunks to be moved in one direction, checked and planned: what a [`Device`] executes, layer
/// by layer. Clones share it, and keep its slots alive.
#[derive(Clone)]
pub struct Transfer(Arc<Parts>);

struct Parts {
    direction: Direction,
    table: PageTable,
    moves: Vec<SlabMove>,
    from_token: u32,
    encoded: Option<EncodedSave>,
    plan: Plan,
    is_unsettled: AtomicBool,
    /// What a device keeps with the transfer.
    #[cfg(feature = "cuda")]
    prepared: OnceLock<Box<dyn Any + Send + Sync>>,
}

impl Transfer {
    /// Checks that everything fits together and plans the pieces, once for all layers.
    ///
    /// A load leaves tokens below prompt position `from_token` alone (the engine has them already).
    /// A save moves whole blocks: it has no tokens below its first move to leave out.
    ///
    /// # Errors
    /// `Invalid` where a move has another direction, a slot another geometry than the pages or
    /// another arena than the first one, the page table does not cover a token that moves, or a
    /// save starts within a block.
    pub fn new(
        direction: Direction,
        table: PageTable,
        moves: Vec<SlabMove>,
        from_token: u32,
    ) -> Result<Transfer> {
        Self::checked(direction, table, moves, from_token, None)
    }

    /// As [`Transfer::new`], for a save into slots of the host tier in which every slab is stored
    /// encoded where that makes it smaller. The slots may be shorter than a raw chunk.
    ///
    /// # Errors
    /// As [`Transfer::new`], and where a slot is not of the host tier.
    pub fn encoded_save(
        table: PageTable,
        moves: Vec<SlabMove>,
        encoded: EncodedSave,
    ) -> Result<Transfer> {
        let into_host = |slab_move: &SlabMove| matches!(slab_move, SlabMove::Save { .. });
        if !moves.iter().all(into_host) {
            return Err(Error::invalid(
                "chunks are encoded on their way into the host tier",
            ));
        }
        Self::checked(Direction::Save, table, moves, 0, Some(encoded))
    }

    fn checked(
        direction: Direction,
        table: PageTable,
        moves: Vec<SlabMove>,
        from_token: u32,
        encoded: Option<EncodedSave>,
    ) -> Result<Transfer> {
        for slab_move in &moves {
            if slab_move.direction() != direction {
                return Err(Error::invalid(
                    "a transfer moves every chunk in one direction",
                ));
            }
            if !slab_move.home().is_same(&moves[0].home()) {
                return Err(Error::invalid("a transfer moves the chunks of one arena"));
            }
            if direction == Direction::Save && slab_move.token() < from_token {
                return Err(
                    Error::invalid("a save moves whole blocks: leave out those below it")
                        .with("from_token", from_token)
                        .with("token", slab_move.token()),
                );
            }
        }
        if let Some(first) = moves.first() {
            let difference = first.home().geometry().difference(table.kv.geometry());
            if !difference.is_empty() {
                return Err(
                    Error::invalid("the pages have another geometry than the store")
                        .with("difference", difference.join("; ")),
                );
            }
        }
        let is_local = matches!(moves.first().map(SlabMove::home), Some(Home::Device(_)));
        if is_local && table.kv.are_slots() {
            return Err(Error::invalid(
                "a chunk goes from the device tier to an engine's pages or to the host tier",
            ));
        }
        if direction == Direction::Load && !table.kv.is_writable() {
            return Err(Error::invalid("a sealed device slot does not change"));
        }
        let plan = Plan::new(&table, moves.iter().map(SlabMove::token), from_token)?;
        Ok(Transfer(Arc::new(Parts {
            direction,
            table,
            moves,
            from_token,
            encoded,
            plan,
            is_unsettled: AtomicBool::new(false),
            #[cfg(feature = "cuda")]
            prepared: OnceLock::new(),
        })))
    }

    /// Which way. Every move has the same.
    pub fn direction(&self) -> Direction {
        self.0.direction
    }

    /// The engine's side.
    pub fn table(&self) -> &PageTable {
        &self.0.table
    }

    /// The store's side, in prompt order.
    pub fn moves(&self) -> &[SlabMove] {
        &self.0.moves
    }

    /// Tokens below this prompt position are left alone.
    pub fn from_token(&self) -> u32 {
        self.0.from_token
    }

    /// The save that it is a part of, where its slabs are stored encoded.
    pub fn encoded(&self) -> Option<&EncodedSave> {
        self.0.encoded.as_ref()
    }

    /// For a device whose submission fails, and that could not wait until what it had begun of it has
    /// ended: whoever submitted it then uses the slots never again, and does not give the pages back.
    pub fn mark_unsettled(&self) {
        self.0.is_unsettled.store(true, Ordering::Release);
    }

    pub(crate) fn is_unsettled(&self) -> bool {
        self.0.is_unsettled.load(Ordering::Acquire)
    }

    /// Which bytes go where in each layer.
    pub fn plan(&self) -> &Plan {
        &self.0.plan
    }

    /// What the device made for this transfer, made now if it is the first time. Only the thread that
    /// submits makes it.
    #[cfg(feature = "cuda")]
    fn prepared<T: Any + Send + Sync>(&self, make: impl FnOnce() -> Result<T>) -> Result<&T> {
        if self.0.prepared.get().is_none() {
            let made = Box::new(make()?);
            let _ = self.0.prepared.set(made);
        }
        self.0
            .prepared
            .get()
            .and_then(|prepared| prepared.downcast_ref())
            .ok_or_else(|| Error::invalid("a transfer is executed by the device that began it"))
    }

    /// The arena of the slots in the host tier; `None` where nothing moves, or within the device.
    pub fn arena(&self) -> Option<&HostArena> {
        match self.0.moves.first()?.home() {
            Home::Host(arena) => Some(arena),
            Home::Device(_) => None,
        }
    }

    /// The arena of the slots in the device tier; `None` where nothing moves, or over the link.
    pub fn device_arena(&self) -> Option<&DeviceArena> {
        match self.0.moves.first()?.home() {
            Home::Host(_) => None,
            Home::Device(arena) => Some(arena),
        }
    }

    /// Where the slab of `layer` is, in bytes from the start of [`HostArena::mapping`] or of the device
    /// arena's first slot, for move `index`.
    ///
    /// # Errors
    /// `Invalid` where the slot does not hold that layer, or not as raw bytes.
    pub fn slab_offset(&self, index: usize, layer: LayerId) -> Result<usize> {
        let offset = match &self.0.moves[index] {
            SlabMove::Save { slot, .. } => {
                let is_raw = self.0.encoded.is_none();
                is_raw.then(|| slot.slab_offset(layer)).flatten()
            }
            SlabMove::LoadDevice { slot, .. } => slot.slab_offset(layer),
            SlabMove::SaveDevice { slot, .. } => slot.slab_offset(layer),
            SlabMove::Load { slot, .. } => slot
                .slab(layer)
                .filter(|slab| slab.bytes as usize == slot.arena().geometry().slab_bytes())
                .map(|slab| slot.offset() + RecordHeader::BYTES + slab.offset as usize),
        };
        offset.ok_or_else(|| {
            Error::invalid("a slot of the transfer does not hold the layer as raw bytes")
                .with("move", index)
                .with("layer", layer)
        })
    }

    /// Does every slot hold `layer`, raw or encoded, or can it take it?
    ///
    /// # Errors
    /// `Invalid` where one does not.
    fn check_layer(&self, layer: LayerId) -> Result<()> {
        if layer.0 >= self.0.table.kv.geometry().layers {
            return Err(Error::invalid("the geometry has no such layer").with("layer", layer));
        }
        for (index, slab_move) in self.0.moves.iter().enumerate() {
            match slab_move {
                SlabMove::Save { .. } if self.0.encoded.is_some() => {}
                SlabMove::Load { slot, .. } if slot.slab(layer).is_some() => {}
                _ => drop(self.slab_offset(index, layer)?),
            }
        }
        Ok(())
    }
}

impl SlabMove {
    /// Which way.
    pub fn direction(&self) -> Direction {
        match self {
            SlabMove::Load { .. } | SlabMove::LoadDevice { .. } => Direction::Load,
            SlabMove::Save { .. } | SlabMove::SaveDevice { .. } => Direction::Save,
        }
    }

    /// The prompt position of the chunk's first token.
    pub fn token(&self) -> u32 {
        match self {
            SlabMove::Load { token, .. }
            | SlabMove::Save { token, .. }
            | SlabMove::LoadDevice { token, .. }
            | SlabMove::SaveDevice { token, .. } => *token,
        }
    }

    fn home(&self) -> Home<'_> {
        match self {
            SlabMove::Load { slot, .. } => Home::Host(slot.arena()),
            SlabMove::Save { slot, .. } => Home::Host(slot.arena()),
            SlabMove::LoadDevice { slot, .. } => Home::Device(slot.arena()),
            SlabMove::SaveDevice { slot, .. } => Home::Device(slot.arena()),
        }
    }
}

/// What a device says of a layer that it took.
pub struct Submitted {
    /// Reached when the bytes have arrived.
    pub fence: Fence,
    /// What the slabs sum to, where computing it was free; of an encoded save, where they are.
    pub sums: SlabSums,
}

/// The checksum of each move's whole slab, in order, as the device saw its bytes.
pub enum SlabSums {
    /// The device moved the bytes without looking at them.
    Unknown,
    /// Computed already.
    Known(Vec<Checksum>),
    /// To be asked for once the fence is reached.
    AfterFence(Box<dyn FnOnce() -> Result<Vec<Checksum>> + Send>),
    /// Of a load: the device compares them with what the slots say, before the fence. Once that is
    /// reached, this names the first move whose slab differs. Nobody has to wait for it before the
    /// engine's stream is ordered behind the fence.
    Compared(Box<dyn FnOnce() -> Result<Option<usize>> + Send>),
    /// Of an encoded save, and of none other: what of each move's slab is stored where, to be asked for
    /// once the fence is reached. See [`Device::encodes`].
    Stored(Box<dyn FnOnce() -> Result<Vec<SlabEntry>> + Send>),
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// For people: `cpu`, `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// Does [`Device::submit`] block while bytes move, or until `after` is reached? Whoever calls it
    /// should then see to it first that `after` is.
    pub blocking: bool,
    /// Does the CPU move its bytes, which the engine computes with?
    pub on_cpu: bool,
}

/// Moves slabs between the store's slots and engine pages: one of the three seams.
///
/// One thread calls [`Device::submit`] for the loads over a device's link, one for the saves, and one for
/// what stays within it; all layers of a transfer come from one of them. The other methods may come
/// from any thread. No method calls back, and none blocks but where it says so.
pub trait Device: Send + Sync + 'static {
    /// What this device is.
    fn info(&self) -> DeviceInfo;

    /// Makes the arena's memory reachable (pins it). Called once, before the first transfer. The
    /// arena outlives the device's last transfer: the device keeps a clone.
    ///
    /// # Errors
    /// `Unavailable`, with the remedy (the limit on locked memory, say).
    fn attach(&self, arena: &HostArena) -> Result<()>;

    /// What it measured of itself when the first arena was attached, with what it holds for, as JSON: to
    /// be kept, and given to [`Device::recall`] at the next opening. `None` where it measures nothing.
    fn calibration(&self) -> Option<String> {
        None
    }

    /// Takes an earlier [`Device::calibration`] instead of measuring anew, if it is of the same device and
    /// driver: is it? To be called before the first arena is attached.
    fn recall(&self, calibration: &str) -> bool {
        let _ = calibration;
        false
    }

    /// Can it copy from and to these pages?
    ///
    /// # Errors
    /// `Invalid` where it is known that it cannot: they are in another device's memory.
    fn check_pages(&self, pages: &PagedKv) -> Result<()> {
        let _ = pages;
        Ok(())
    }

    /// Makes an arena of chunk slots in the device's own memory, as many as fit into
    /// `capacity_bytes`. Its transfers are this device's alone.
    ///
    /// # Errors
    /// `Invalid` for less than one chunk; `Unavailable` where the device has not so much memory, or
    /// holds no chunks at all.
    fn arena(&self, geometry: &KvGeometry, capacity_bytes: u64) -> Result<DeviceArena> {
        let _ = (geometry, capacity_bytes);
        Err(Error::unavailable("this device has no memory for chunks"))
    }

    /// Records where `stream` is now. For [`Stream::HOST`] the fence is reached already.
    ///
    /// # Errors
    /// `Unavailable` where the device fails; `Invalid` where what is put on the stream does not run but is
    /// captured.
    fn record(&self, stream: Stream) -> Result<Fence>;

    /// Orders everything that is put on `stream` from now on behind `fence`. Does not wait on the
    /// host, but for [`Stream::HOST`].
    ///
    /// # Errors
    /// As [`Device::record`].
    fn order(&self, stream: Stream, fence: &Fence) -> Result<()>;

    /// Does it load slabs of this codec? Raw ones it always does; it need not decode others.
    fn decodes(&self, codec: CodecId) -> bool {
        codec == CodecId::Raw
    }

    /// Does it save slabs encoded with this codec ([`Transfer::encoded_save`])? It need not.
    ///
    /// Such a device answers with [`SlabSums::Stored`]: for each move where in the slot's payload its
    /// slab starts, how many bytes of it are stored, and what those sum to. It chooses the places by
    /// these rules, and may use any place that they allow:
    /// - a slab starts on a multiple of [`KvGeometry::SLAB_ALIGN`], behind the chunk's slab before it
    ///   (the first at 0), and no further behind than the raw slab of that layer would. The moves of a
    ///   transfer may share a start, that behind the longest, so that one layer of a run of slots is
    ///   one pitched copy;
    /// - its bytes are those of the codec ([`Slot::encoded`] gives the same), or the raw slab where
    ///   encoding does not make it smaller, which its length tells;
    /// - a slab that does not fit in what is left of its slot, and every later one of that chunk, is not
    ///   stored: its entry has 0 bytes.
    ///
    /// What is between the slabs of the layers that move and behind them means nothing; it may be written to.
    /// What is in front of the first of them may not.
    fn encodes(&self, codec: CodecId) -> bool {
        let _ = codec;
        false
    }

    /// Takes one layer of a transfer, to be executed once every fence of `after` is reached. Bytes
    /// that do not belong to the moved tokens are not touched. The device keeps a clone of the
    /// transfer while bytes move, and has let it go when anybody sees the fence reached. Layers of
    /// one transfer may be under way at once.
    ///
    /// A blocking device waits for `after`, but not for ever; so may one that encodes a save.
    ///
    /// # Errors
    /// `Invalid` where a slot does not hold the layer, or it is not the turn of this layer of an encoded
    /// save (nothing was moved); `Unavailable` where the device fails. With any error, bytes may have
    /// moved but none move any more, unless the device said otherwise ([`Transfer::mark_unsettled`]).
    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted>;

    /// How many layers of `transfer`, from `first` on, are best submitted at once: more than one where a
    /// single layer is too little for the link.
    fn layers_at_once(&self, transfer: &Transfer, first: u32) -> u32 {
        let _ = (transfer, first);
        1
    }

    /// [`Device::submit`] for several layers, at most [`Device::layers_at_once`], with an answer for
    /// each.
    ///
    /// # Errors
    /// As [`Device::submit`], of all of them.
    fn submit_layers(
        &self,
        transfer: &Transfer,
        layers: Range<u32>,
        after: &[Fence],
    ) -> Result<Vec<Submitted>> {
        layers
            .map(|layer| self.submit(transfer, LayerId(layer), after))
            .collect()
    }
}
