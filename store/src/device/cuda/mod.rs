//! The device of engines that compute on an NVIDIA GPU.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::CUdevice_attribute_enum as Attribute;

use super::*;
mod calibrate;
mod driver;
mod encode;
mod exp;
mod exp_save;
mod fence;
mod kernels;
mod lane;
mod local;
mod pin;
mod prepared;
mod rates;
mod runs;

use driver::{Context, DeviceBuffer, EventPool};
use encode::SaveKernels;
use exp::ExpKernels;
use exp_save::Told;
use fence::CudaFence;
use kernels::Kernels;
use lane::{Lane, Shared};
use local::Local;
use pin::PinnedArena;
use prepared::DescriptorPool;
pub use rates::{Calibration, LinkRates};

/// Copies between pinned host memory and the paged KV of an engine on one NVIDIA GPU.
///
/// The driver is loaded at run time. Copies run in the GPU's primary context, which PyTorch and the
/// CUDA runtime use too, on streams of their own. The kernels that move slabs sum them on the way:
/// a load is compared with what its slots say (the answer comes behind the fence), a save needs no
/// sum of the host's. A load does not compete with the engine's own
/// small copies: it goes in slices, between which they come in. [`Device::submit`] puts only a few of
/// them there ahead and blocks until the last one is, for about as long as its layers take on the
/// link; it may be called by one thread for each direction at once.
///
/// A [`Stream`] is a `CUstream` of the same context, alive during the call. CUDA's null stream is
/// [`Stream::HOST`] here; name the legacy default stream by its constant, 1, and the per-thread
/// default stream by 2. The engine may capture CUDA graphs on other streams meanwhile; one that is being
/// captured can be neither recorded nor ordered: load and save outside of the capture.
///
/// Dropping the device waits for what is under way; where that does not end, memory is leaked rather
/// than freed under a copy.
pub struct CudaDevice(ManuallyDrop<Inner>);

/// Fields are dropped from top to bottom: first who uses, then what is used.
struct Inner {
    load: Mutex<Lane>,
    save: Mutex<Lane>,
    local_load: Mutex<Local>,
    local_save: Mutex<Local>,
    attached: Mutex<Vec<Arc<Attached>>>,
    shared: Shared,
    name: String,
    /// Given at open: nothing is measured then.
    given: Option<Calibration>,
    /// Of an earlier opening.
    recalled: Mutex<Option<Calibration>>,
}

/// An arena that copies can reach.
struct Attached {
    pinned: Arc<PinnedArena>,
    calibration: Calibration,
}

/// How long dropping a device waits for what is under way.
const DRAIN_MAX: Duration = Duration::from_secs(10);

impl CudaDevice {
    /// Opens GPU `ordinal` of this machine, as the driver counts them.
    ///
    /// # Errors
    /// `Unavailable`, in one line, where there is no driver or no such GPU, the driver is too old for
    /// the kernels, or the GPU has too little free memory for the staging buffers (129 MiB).
    pub fn open(ordinal: u32) -> Result<CudaDevice> {
        Self::new(ordinal, None)
    }

    /// As [`CudaDevice::open`], but with the answers of an earlier measurement on the same machine.
    ///
    /// # Errors
    /// As [`CudaDevice::open`]; `Invalid` for a slice of no bytes or of more than 1 GiB.
    pub fn with_calibration(ordinal: u32, calibration: Calibration) -> Result<CudaDevice> {
        if !(256..=1 << 30).contains(&calibration.slice_bytes) {
            return Err(Error::invalid("a slice has 256 B to 1 GiB")
                .with("slice_bytes", calibration.slice_bytes));
        }
        Self::new(ordinal, Some(calibration))
    }

    fn new(ordinal: u32, given: Option<Calibration>) -> Result<CudaDevice> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let context = Context::open(ordinal)?;
        for attribute in [
            Attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING,
            Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM,
        ] {
            if context.attribute(attribute)? == 0 {
                return Err(
                    Error::unavailable("the GPU does not share the host's address space")
                        .with("name", context.name()),
                );
            }
        }
        let shared = Shared {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            kernels: Kernels::new(&context)?,
            exp: ExpKernels::new(&context)?,
            exp_save: SaveKernels::new(&context)?,
            events: EventPool::new(&context),
            descriptors: DescriptorPool::new(&context)?,
            context,
        };
        let slot_bytes = given.as_ref().map_or_else(
            || Calibration::default().slice_bytes,
            |given| given.slice_bytes.next_multiple_of(256),
        );
        let (lowest, highest) = shared.context.priorities()?;
        let lane = |direction, priority| Lane::new(&shared, direction, slot_bytes, priority);
        let processors = Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = shared.context.attribute(processors)?.max(1) as u32;
        let local = |direction, priority| Local::new(&shared, direction, priority, processors);
        Ok(CudaDevice(ManuallyDrop::new(Inner {
            local_load: Mutex::new(local(Direction::Load, highest)?),
            local_save: Mutex::new(local(Direction::Save, lowest)?),
            // A load's kernels are short and the engine waits for them; a save's can wait.
            load: Mutex::new(lane(Direction::Load, highest)?),
            save: Mutex::new(lane(Direction::Save, lowest)?),
            attached: Mutex::default(),
            name: shared.context.name(),
            shared,
            given,
            recalled: Mutex::default(),
        })))
    }

    /// What was measured of the link, or given; `None` before an arena is attached.
    pub fn calibration(&self) -> Option<Calibration> {
        let attached = self.attached();
        Some(attached.first()?.calibration.clone())
    }

    fn attached(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Attached>>> {
        let attached = self.0.attached.lock();
        attached.unwrap_or_else(PoisonError::into_inner)
    }

    fn attached_of(&self, arena: &HostArena) -> Option<Arc<Attached>> {
        let attached = self.attached();
        let found = attached
            .iter()
            .find(|attached| attached.pinned.is_of(arena));
        found.cloned()
    }

    /// [`Device::attach`], calling `progress(pinned, total)` now and then.
    ///
    /// # Errors
    /// As [`Device::attach`].
    pub fn attach_with(&self, arena: &HostArena, progress: impl Fn(usize, usize)) -> Result<()> {
        let inner = &*self.0;
        if self.attached_of(arena).is_some() {
            return Ok(());
        }
        let pinned = PinnedArena::new(&inner.shared.context, arena, progress)?;
        // Measured once, while nothing else uses the staging memory.
        let recalled = lock(&inner.recalled).clone();
        let known = inner.given.clone().or(recalled);
        let known = known.or_else(|| self.calibration());
        let calibration = match known {
            Some(known) => known,
            None => {
                let (load, save) = (lock(&inner.load), lock(&inner.save));
                let lanes = [&*load, &*save];
                calibrate::calibrate(&inner.shared, &pinned, arena, lanes)?.unwrap_or_default()
            }
        };
        self.attached().push(Arc::new(Attached {
            pinned,
            calibration,
        }));
        Ok(())
    }
}

impl CudaDevice {
    fn enqueue(
        &self,
        transfer: &Transfer,
        layers: Range<u32>,
        after: &[Fence],
    ) -> Result<(Fence, Option<Told>)> {
        let inner = &*self.0;
        let kv = &transfer.table().kv;
        if layers.end > kv.geometry().layers {
            return Err(Error::invalid("the geometry has no such layer")
                .with("layers", format_args!("{layers:?}")));
        }
        if kv.is_host_memory() {
            return Err(Error::invalid(
                "a cuda device copies pages in GPU memory: register those, or use the cpu device",
            ));
        }
        let codec = transfer.encoded().map(EncodedSave::codec);
        if codec.is_some_and(|codec| codec != CodecId::Exp) {
            return Err(Error::invalid("a cuda device encodes with exp alone"));
        }
        if let Some(arena) = transfer.device_arena() {
            if arena.is_host_memory() {
                return Err(Error::invalid("the device slots are another device's"));
            }
            let local = match transfer.direction() {
                Direction::Load => &inner.local_load,
                Direction::Save => &inner.local_save,
            };
            let fence = lock(local).submit(&inner.shared, arena, transfer, layers, after)?;
            return Ok((Fence::new(fence), None));
        }
        let Some(arena) = transfer.arena() else {
            return Ok((Fence::reached(), None));
        };
        let attached = self
            .attached_of(arena)
            .ok_or_else(|| Error::invalid("attach the arena before the first transfer"))?;
        let lane = match transfer.direction() {
            Direction::Load => &inner.load,
            Direction::Save => &inner.save,
        };
        let (fence, answers) = lock(lane).submit(
            &inner.shared,
            &attached.pinned,
            &attached.calibration,
            transfer,
            layers,
            after,
        )?;
        Ok((Fence::new(fence), answers))
    }
}

/// What the GPU will have said of a layer behind its fence.
fn sums(transfer: &Transfer, layer: u32, told: Option<&Told>) -> SlabSums {
    let answers = match told.cloned() {
        None => return SlabSums::Unknown,
        Some(Told::Stored(layers, first)) => {
            let stored = layers.get((layer - first) as usize).cloned();
            return SlabSums::Stored(Box::new(move || Ok(stored.unwrap_or_default())));
        }
        Some(Told::Sums(answers)) => answers,
    };
    match transfer.direction() {
        Direction::Load => SlabSums::Compared(Box::new(move || Ok(answers.first_wrong(layer)))),
        Direction::Save => SlabSums::AfterFence(Box::new(move || Ok(answers.sums(layer)))),
    }
}

fn lock<T>(lane: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic in between leaves at worst a slice unpaced or a staging slot unordered with a kernel
    // that was not launched.
    lane.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        let begun = Instant::now();
        let left = || DRAIN_MAX.saturating_sub(begun.elapsed());
        let lanes = [&self.0.load, &self.0.save];
        let locals = [&self.0.local_load, &self.0.local_save];
        let drained = lanes.map(|lane| lock(lane).drain(left()));
        let drained_too = locals.map(|local| lock(local).drain(left()));
        if (drained, drained_too) == ([true; 2], [true; 2]) {
            // SAFETY: `drop` runs once and nothing else drops the field. All streams of the four lanes are
            // idle, also of what failed, so no copy or kernel is under way that uses what goes now.
            unsafe { ManuallyDrop::drop(&mut self.0) }
        }
    }
}

impl Device for CudaDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            name: self.0.name.clone(),
            blocking: true,
            on_cpu: false,
        }
    }

    fn attach(&self, arena: &HostArena) -> Result<()> {
        self.attach_with(arena, |_, _| {})
    }

    fn calibration(&self) -> Option<String> {
        let kept = rates::Kept {
            device: self.0.name.clone(),
            uuid: self.0.shared.context.uuid(),
            driver: self.0.shared.context.driver_version(),
            calibration: CudaDevice::calibration(self)?,
        };
        serde_json::to_string(&kept).ok()
    }

    fn recall(&self, calibration: &str) -> bool {
        let inner = &*self.0;
        let kept: Option<rates::Kept> = serde_json::from_str(calibration).ok();
        let kept = kept.filter(|kept| {
            kept.device == inner.name
                && kept.uuid == inner.shared.context.uuid()
                && kept.driver == inner.shared.context.driver_version()
                && (256..=1 << 30).contains(&kept.calibration.slice_bytes)
        });
        let is_same = kept.is_some();
        *lock(&inner.recalled) = kept.map(|kept| kept.calibration);
        is_same
    }

    /// A kernel that touched another GPU's memory would take the whole context down.
    fn check_pages(&self, pages: &PagedKv) -> Result<()> {
        let context = &self.0.shared.context;
        let is_ours = match pages.is_host_memory() {
            true => Some(false),
            false => context.owns(pages.base(0, LayerId(0)))?,
        };
        match is_ours {
            Some(false) => Err(Error::invalid(
                "the pages are not in this GPU's memory: use the device whose they are",
            )
            .with("gpu", &self.0.name)),
            _ => Ok(()),
        }
    }

    fn arena(&self, geometry: &KvGeometry, capacity_bytes: u64) -> Result<DeviceArena> {
        let slots = arena::slots_in(geometry, capacity_bytes)?;
        let bytes = slots as usize * geometry.payload_bytes();
        let memory = DeviceBuffer::new(&self.0.shared.context, bytes)?;
        let base = memory.address();
        // SAFETY: the buffer has so many bytes of GPU memory, is ours, and goes with the box.
        Ok(unsafe { DeviceArena::over(geometry, base, slots, false, Box::new(memory)) })
    }

    fn record(&self, stream: Stream) -> Result<Fence> {
        if stream == Stream::HOST {
            return Ok(Fence::reached());
        }
        self.0.shared.context.check_not_captured(stream)?;
        let event = self.0.shared.events.record(stream)?;
        Ok(Fence::new(CudaFence::new(event, None)))
    }

    fn order(&self, stream: Stream, fence: &Fence) -> Result<()> {
        match stream {
            Stream::HOST => lane::wait_on_host(fence.point()),
            stream => {
                self.0.shared.context.check_not_captured(stream)?;
                lane::order(stream, fence)
            }
        }
    }

    fn encodes(&self, codec: CodecId) -> bool {
        let calibration = CudaDevice::calibration(self);
        codec == CodecId::Exp && calibration.is_none_or(|measured| measured.encodes())
    }

    fn decodes(&self, codec: CodecId) -> bool {
        matches!(codec, CodecId::Raw | CodecId::Exp)
    }

    fn submit(&self, transfer: &Transfer, layer: LayerId, after: &[Fence]) -> Result<Submitted> {
        let layers = layer.0..layer.0.saturating_add(1);
        let (fence, answers) = self.enqueue(transfer, layers, after)?;
        let sums = sums(transfer, layer.0, answers.as_ref());
        Ok(Submitted { fence, sums })
    }

    /// Few at the ends of a load, where the engine waits for the first layers or the last have to be computed.
    fn layers_at_once(&self, transfer: &Transfer, first: u32) -> u32 {
        if transfer.device_arena().is_some() {
            let layers = transfer.table().kv.geometry().layers;
            return local::layers_at_once(transfer.plan().bytes(), layers);
        }
        let Some(attached) = transfer.arena().and_then(|arena| self.attached_of(arena)) else {
            return 1;
        };
        let calibration = &attached.calibration;
        let of_link = match transfer.direction() {
            Direction::Load => &calibration.load,
            Direction::Save => &calibration.save,
        };
        let geometry = transfer.table().kv.geometry();
        // Encoded rows are shorter by a quarter and more.
        let (layer_bytes, row_bytes_min) = match transfer.encoded() {
            Some(_) => (geometry.slab_stride() / 4 * 3, rates::ROW_BYTES_ENCODED),
            None => (geometry.slab_stride(), rates::ROW_BYTES_BUSY),
        };
        let most = of_link.layers_at_once(
            layer_bytes,
            transfer.moves().len().max(1),
            row_bytes_min,
            calibration.slice_bytes,
            kernels::LAYERS_MAX.min(geometry.layers as usize),
        );
        if transfer.direction() == Direction::Save {
            return most as u32;
        }
        let left = geometry.layers.saturating_sub(first);
        (most as u32).min(first.max(1)).min((left / 2).max(1))
    }

    /// All of them arrive together.
    fn submit_layers(
        &self,
        transfer: &Transfer,
        layers: Range<u32>,
        after: &[Fence],
    ) -> Result<Vec<Submitted>> {
        let (fence, answers) = self.enqueue(transfer, layers.clone(), after)?;
        let submitted = layers.map(|layer| Submitted {
            fence: fence.clone(),
            sums: sums(transfer, layer, answers.as_ref()),
        });
        Ok(submitted.collect())
    }
}
