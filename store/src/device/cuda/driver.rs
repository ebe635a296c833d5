//! What this crate needs of the CUDA driver, with owners for what must be freed.
//!
//! The driver is loaded at run time. Every call runs in the device's primary context, which is the
//! one that engines and their runtime use too; the caller's own context is put back afterwards.
//!
//! An engine may be capturing a CUDA graph meanwhile. As long as it does, the driver by default refuses every
//! thread of the process much of what is called here, even to ask for an event, and the capture is lost with
//! it. So every call runs in the *relaxed* capture mode, and the caller's own is put back with its context.

use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys;

use crate::{Error, Result, Stream};

/// Turns the driver's answer into a result; `what` says what was tried.
pub(super) fn check(code: sys::CUresult, what: &'static str) -> Result<()> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name = ptr::null();
    // SAFETY: the driver writes a pointer to a static string, or null.
    let known = unsafe { sys::cuGetErrorName(code, &mut name) } == sys::CUresult::CUDA_SUCCESS;
    let name = match known && !name.is_null() {
        // SAFETY: a C string that lives as long as the driver.
        true => unsafe { CStr::from_ptr(name) }
            .to_string_lossy()
            .into_owned(),
        false => format!("error {}", code as u32),
    };
    Err(Error::unavailable("the CUDA driver failed")
        .with("call", what)
        .with("error", name))
}

/// What the driver answers when it is asked whether something has ended.
fn is_done(code: sys::CUresult, what: &'static str) -> Result<bool> {
    match is_no_end(code) {
        true => Ok(false),
        false => check(code, what).map(|()| true),
    }
}

/// Neither an end nor an error of the context. Where the driver does not say because a graph is being captured,
/// copies run as before.
fn is_no_end(code: sys::CUresult) -> bool {
    use sys::CUresult::*;
    matches!(
        code,
        CUDA_ERROR_NOT_READY
            | CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
            | CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
            | CUDA_ERROR_STREAM_CAPTURE_ISOLATION
            | CUDA_ERROR_STREAM_CAPTURE_IMPLICIT
            | CUDA_ERROR_CAPTURED_EVENT
    )
}

/// The primary context of one GPU, kept while this lives.
pub(super) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
}

// SAFETY: a context may be used from any thread, as the driver's documentation says; it is bound to
// the calling thread only between `enter` and the guard's end.
unsafe impl Send for Context {}
// SAFETY: the driver locks what calls on one context share, and both fields stay as they are.
unsafe impl Sync for Context {}

/// The context is the thread's current one until this is dropped, and a capture of an engine's none of its
/// concern.
pub(super) struct Entered<'a> {
    /// The thread's own, where it was exchanged.
    capture_mode: Option<sys::CUstreamCaptureMode>,
    _context: &'a Context,
    /// Not `Send`.
    _thread: std::marker::PhantomData<*const ()>,
}

/// Makes `mode` the calling thread's and returns the one before; `None` where the driver does not.
fn exchange_capture_mode(mode: sys::CUstreamCaptureMode) -> Option<sys::CUstreamCaptureMode> {
    let mut mode = mode;
    // SAFETY: reads and writes the local; what changes is the calling thread's alone.
    let code = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
    (code == sys::CUresult::CUDA_SUCCESS).then_some(mode)
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let _ = self.capture_mode.and_then(exchange_capture_mode);
        let mut previous = ptr::null_mut();
        // SAFETY: pops what `Context::enter` pushed in this thread (the guard is not `Send`).
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut previous) };
    }
}

impl Context {
    /// Loads the driver and takes the primary context of GPU `ordinal`.
    pub(super) fn open(ordinal: u32) -> Result<Arc<Context>> {
        // SAFETY: loads and unloads a library whose initialisers are the driver's own.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::unavailable(
                "no CUDA driver is installed: libcuda.so was not found",
            ));
        }
        // SAFETY: `is_culib_present` found the driver; 0 is the only flag.
        let code = unsafe { sys::cuInit(0) };
        check(code, "cuInit")?;
        let mut count = 0;
        // SAFETY: `cuInit` went well; the call writes one integer, the local.
        let code = unsafe { sys::cuDeviceGetCount(&mut count) };
        check(code, "cuDeviceGetCount")?;
        if i64::from(ordinal) >= i64::from(count) {
            return Err(Error::unavailable("no such GPU")
                .with("ordinal", ordinal)
                .with("gpus", count));
        }
        let mut device = 0;
        // SAFETY: writes one handle, the local; the ordinal is below the count.
        let code = unsafe { sys::cuDeviceGet(&mut device, ordinal as i32) };
        check(code, "cuDeviceGet")?;
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle, released in `drop`.
        let code = unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device) };
        check(code, "cuDevicePrimaryCtxRetain")?;
        Ok(Arc::new(Context { device, raw }))
    }

    /// Makes this the thread's current context for a while.
    pub(super) fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: the context is retained as long as `self`.
        let code = unsafe { sys::cuCtxPushCurrent_v2(self.raw) };
        check(code, "cuCtxPushCurrent")?;
        let relaxed = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        Ok(Entered {
            capture_mode: exchange_capture_mode(relaxed),
            _context: self,
            _thread: std::marker::PhantomData,
        })
    }

    /// Is nothing captured of what is put on `stream`, which is an engine's? What waits for a point in a
    /// capture, or is waited for in one, would become a part of the graph.
    ///
    /// # Errors
    /// `Invalid` where it is captured; `Unavailable` where the driver does not say.
    pub(super) fn check_not_captured(&self, stream: Stream) -> Result<()> {
        let _entered = self.enter()?;
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: writes one number; the stream by the promise of whoever made it. No capture is touched.
        let code = unsafe { sys::cuStreamIsCapturing(raw_stream(stream), &mut status) };
        check(code, "cuStreamIsCapturing")?;
        match status {
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(()),
            _ => Err(Error::invalid(
                "the stream is being captured into a CUDA graph: load and save outside of the capture",
            )),
        }
    }

    pub(super) fn name(&self) -> String {
        let mut name = [0_u8; 128];
        // SAFETY: writes at most the given length, terminated.
        let code = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 127, self.device) };
        match (
            check(code, "cuDeviceGetName"),
            CStr::from_bytes_until_nul(&name),
        ) {
            (Ok(()), Ok(name)) => name.to_string_lossy().into_owned(),
            _ => "CUDA device".into(),
        }
    }

    /// The GPU's identity, the same whatever its ordinal; empty where the driver does not say.
    pub(super) fn uuid(&self) -> String {
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: writes one identity.
        let code = unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, self.device) };
        match check(code, "cuDeviceGetUuid") {
            Ok(()) => uuid
                .bytes
                .map(|byte| format!("{:02x}", byte as u8))
                .concat(),
            Err(_) => String::new(),
        }
    }

    /// Is what lies at `address` in this GPU's memory? `None` where the driver knows of no GPU's.
    pub(super) fn owns(&self, address: u64) -> Result<Option<bool>> {
        let _entered = self.enter()?;
        let mut ordinal: std::ffi::c_int = -1;
        // SAFETY: the attribute is one integer, and that is written; the address is not accessed.
        let code = unsafe {
            sys::cuPointerGetAttribute(
                (&raw mut ordinal).cast(),
                sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                address,
            )
        };
        let is_known = code == sys::CUresult::CUDA_SUCCESS && ordinal >= 0;
        Ok(is_known.then_some(ordinal == self.device))
    }

    /// The driver's version, as it counts: 13000 for CUDA 13.0.
    pub(super) fn driver_version(&self) -> i32 {
        let mut version = 0;
        // SAFETY: writes one integer.
        let code = unsafe { sys::cuDriverGetVersion(&mut version) };
        check(code, "cuDriverGetVersion").map_or(0, |()| version)
    }

    pub(super) fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: writes one integer.
        let code = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, self.device) };
        check(code, "cuDeviceGetAttribute")?;
        Ok(value)
    }

    /// The lowest and the highest stream priority, as the driver numbers them.
    pub(super) fn priorities(&self) -> Result<(i32, i32)> {
        let _entered = self.enter()?;
        let (mut lowest, mut highest) = (0, 0);
        // SAFETY: writes two integers.
        let code = unsafe { sys::cuCtxGetStreamPriorityRange(&mut lowest, &mut highest) };
        check(code, "cuCtxGetStreamPriorityRange")?;
        Ok((lowest, highest))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`. What else uses the context has retained it itself.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A stream of ours.
pub(super) struct OwnStream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

// SAFETY: a stream belongs to its context, not to a thread; every call enters the context first.
unsafe impl Send for OwnStream {}
// SAFETY: the driver locks what calls on one stream share; the handle stays as it is until `drop`.
unsafe impl Sync for OwnStream {}

impl OwnStream {
    pub(super) fn new(context: &Arc<Context>, priority: i32) -> Result<OwnStream> {
        let _entered = context.enter()?;
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one handle, destroyed in `drop`.
        let code = unsafe { sys::cuStreamCreateWithPriority(&mut raw, flags, priority) };
        check(code, "cuStreamCreateWithPriority")?;
        Ok(OwnStream {
            context: Arc::clone(context),
            raw,
        })
    }

    /// Has everything ended that was put on it? An error is one of the whole context: the driver runs
    /// nothing in it any more.
    pub(super) fn is_idle(&self) -> Result<bool> {
        let _entered = self.context.enter()?;
        // SAFETY: made in `new`, destroyed in `drop`.
        is_done(unsafe { sys::cuStreamQuery(self.raw) }, "cuStreamQuery")
    }

    pub(super) fn as_stream(&self) -> Stream {
        Stream(self.raw as usize as u64)
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        let entered = self.context.enter();
        // SAFETY: made in `new`. The driver lets work that is under way end first.
        let _ = entered.map(|_entered| unsafe { sys::cuStreamDestroy_v2(self.raw) });
    }
}

/// Events are made once and used again.
pub(super) struct EventPool {
    context: Arc<Context>,
    free: Mutex<Vec<EventHandle>>,
}

struct EventHandle(sys::CUevent);

// SAFETY: an event belongs to its context, not to a thread; every call enters the context first.
unsafe impl Send for EventHandle {}
// SAFETY: the driver locks what calls on one event share; the handle stays as it is.
unsafe impl Sync for EventHandle {}

impl EventPool {
    pub(super) fn new(context: &Arc<Context>) -> Arc<EventPool> {
        Arc::new(EventPool {
            context: Arc::clone(context),
            free: Mutex::new(Vec::new()),
        })
    }

    /// Records where `stream` is now. The stream must be one of ours or, by the promise of whoever
    /// made the [`Stream`], one of the engine's in the same device's primary context.
    pub(super) fn record(self: &Arc<Self>, stream: Stream) -> Result<Event> {
        let _entered = self.context.enter()?;
        let free = self.lock().pop();
        let handle = match free {
            Some(handle) => handle,
            None => {
                let mut raw = ptr::null_mut();
                let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
                // SAFETY: writes one handle, destroyed with the pool.
                let code = unsafe { sys::cuEventCreate(&mut raw, flags) };
                check(code, "cuEventCreate")?;
                EventHandle(raw)
            }
        };
        let event = Event {
            pool: Arc::clone(self),
            handle: Some(handle),
        };
        // SAFETY: both handles are alive: see above and `CudaDevice`'s sentence about streams.
        let code = unsafe { sys::cuEventRecord(event.raw(), raw_stream(stream)) };
        check(code, "cuEventRecord")?;
        Ok(event)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<EventHandle>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for EventPool {
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else {
            return;
        };
        for handle in self.lock().drain(..) {
            // SAFETY: made in `record`; an event that is still pending is freed by the driver later.
            let _ = unsafe { sys::cuEventDestroy_v2(handle.0) };
        }
    }
}

/// A recorded event; it goes back to its pool.
pub(super) struct Event {
    pool: Arc<EventPool>,
    handle: Option<EventHandle>,
}

impl Event {
    fn raw(&self) -> sys::CUevent {
        self.handle.as_ref().expect("taken only in drop").0
    }

    pub(super) fn is_reached(&self) -> Result<bool> {
        let _entered = self.pool.context.enter()?;
        // SAFETY: the handle was made by `cuEventCreate` and goes with its pool, which `self` keeps.
        is_done(unsafe { sys::cuEventQuery(self.raw()) }, "cuEventQuery")
    }

    /// Orders `stream` behind this event. Streams as for [`EventPool::record`].
    pub(super) fn order(&self, stream: Stream) -> Result<()> {
        let _entered = self.pool.context.enter()?;
        // SAFETY: the event as in `is_reached`; the stream by the promise in `EventPool::record`.
        let code = unsafe { sys::cuStreamWaitEvent(raw_stream(stream), self.raw(), 0) };
        check(code, "cuStreamWaitEvent")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // A wait that was put on a stream refers to the recording, not to the handle.
        self.pool.lock().extend(self.handle.take());
    }
}

pub(super) fn raw_stream(stream: Stream) -> sys::CUstream {
    stream.0 as usize as sys::CUstream
}

/// GPU memory.
pub(super) struct DeviceBuffer {
    context: Arc<Context>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

impl DeviceBuffer {
    /// Not initialised.
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<DeviceBuffer> {
        let _entered = context.enter()?;
        let mut address = 0;
        // SAFETY: writes one address, freed in `drop`.
        let code = unsafe { sys::cuMemAlloc_v2(&mut address, bytes) };
        if code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(Error::unavailable(
                "the GPU has too little free memory for the store's buffers: leave it some",
            )
            .with("bytes", bytes));
        }
        check(code, "cuMemAlloc")?;
        Ok(DeviceBuffer {
            context: Arc::clone(context),
            address,
            bytes,
        })
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn len(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        let entered = self.context.enter();
        // SAFETY: made in `new`; whoever owns the buffer has waited for what uses it, and the driver
        // waits for the device besides.
        let _ = entered.map(|_entered| unsafe { sys::cuMemFree_v2(self.address) });
    }
}

/// Host memory that the driver allocated and pinned.
pub(super) struct PinnedBuffer {
    context: Arc<Context>,
    address: *mut u8,
    bytes: usize,
}

// SAFETY: it alone owns the memory, which the driver lets any thread use and free.
unsafe impl Send for PinnedBuffer {}
// SAFETY: through `&self` nothing but the address is to be had; bytes are reached through `&mut self`.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<PinnedBuffer> {
        let _entered = context.enter()?;
        let mut address = MaybeUninit::<*mut c_void>::uninit();
        // SAFETY: writes one address, freed in `drop`.
        let code = unsafe {
            sys::cuMemHostAlloc(address.as_mut_ptr(), bytes, sys::CU_MEMHOSTALLOC_PORTABLE)
        };
        check(code, "cuMemHostAlloc")?;
        // SAFETY: written by the successful call.
        let address: *mut u8 = unsafe { address.assume_init() }.cast();
        // SAFETY: `bytes` bytes of fresh memory; from here on it is initialised.
        unsafe { address.write_bytes(0, bytes) };
        Ok(PinnedBuffer {
            context: Arc::clone(context),
            address,
            bytes,
        })
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: our own initialised memory, borrowed mutably; a copy out of it that is under way
        // only reads, and its owner does not write before that has ended.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }

    /// Four bytes that the GPU may have written.
    pub(super) fn word(&self, offset: usize) -> u32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.bytes);
        // SAFETY: four aligned bytes within our own initialised memory; volatile because the GPU
        // writes to it behind the compiler's back.
        unsafe { self.address.add(offset).cast::<u32>().read_volatile() }
    }

    pub(super) fn address(&self) -> u64 {
        self.address as usize as u64
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        let entered = self.context.enter();
        // SAFETY: made in `new`; whoever owns the buffer has waited for what uses it.
        let _ = entered.map(|_entered| unsafe { sys::cuMemFreeHost(self.address.cast()) });
    }
}

/// One side of a copy.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Host(u64),
    Device(u64),
}

/// Rows of a copy: evenly spaced on both sides.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) row_bytes: usize,
    pub(super) rows: usize,
    pub(super) from_pitch: usize,
    pub(super) to_pitch: usize,
}

/// Puts a copy on `stream`.
///
/// # Safety
/// Both places are valid over all rows, host memory is pinned in one piece, and neither is used
/// otherwise, but by what the stream orders, until the copy has ended.
pub(super) unsafe fn copy_rows(
    stream: &OwnStream,
    from: Place,
    to: Place,
    rows: Rows,
) -> Result<()> {
    let _entered = stream.context.enter()?;
    let whole =
        rows.rows == 1 || (rows.row_bytes == rows.from_pitch && rows.row_bytes == rows.to_pitch);
    if whole {
        let bytes = rows.row_bytes * rows.rows;
        let address = |place| match place {
            Place::Host(address) | Place::Device(address) => address,
        };
        // SAFETY: the caller's promise; in the unified address space the driver tells host from
        // device by the address.
        let code = unsafe { sys::cuMemcpyAsync(address(to), address(from), bytes, stream.raw) };
        return check(code, "cuMemcpyAsync");
    }
    // SAFETY: zeros are valid for every field (null pointers, no array); memory types follow.
    let mut copy: sys::CUDA_MEMCPY2D = unsafe {
        let mut copy = MaybeUninit::<sys::CUDA_MEMCPY2D>::zeroed();
        (*copy.as_mut_ptr()).srcMemoryType = sys::CUmemorytype_enum::CU_MEMORYTYPE_HOST;
        (*copy.as_mut_ptr()).dstMemoryType = sys::CUmemorytype_enum::CU_MEMORYTYPE_HOST;
        copy.assume_init()
    };
    match from {
        Place::Host(address) => copy.srcHost = address as usize as *const c_void,
        Place::Device(address) => {
            copy.srcMemoryType = sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE;
            copy.srcDevice = address;
        }
    }
    match to {
        Place::Host(address) => copy.dstHost = address as usize as *mut c_void,
        Place::Device(address) => {
            copy.dstMemoryType = sys::CUmemorytype_enum::CU_MEMORYTYPE_DEVICE;
            copy.dstDevice = address;
        }
    }
    copy.srcPitch = rows.from_pitch;
    copy.dstPitch = rows.to_pitch;
    copy.WidthInBytes = rows.row_bytes;
    copy.Height = rows.rows;
    // SAFETY: the rows are valid by the caller's promise; the driver copies the description itself
    // before it returns.
    let code = unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream.raw) };
    check(code, "cuMemcpy2DAsync")
}

/// Puts zeros on `stream`.
///
/// # Safety
/// The memory is the GPU's, valid, and not used otherwise, but by what the stream orders, until they
/// are there.
pub(super) unsafe fn zero(stream: &OwnStream, address: u64, bytes: usize) -> Result<()> {
    let _entered = stream.context.enter()?;
    // SAFETY: by the caller's promise the bytes are the GPU's and used by nobody else.
    let code = unsafe { sys::cuMemsetD8Async(address, 0, bytes, stream.raw) };
    check(code, "cuMemsetD8Async")
}

/// Loaded machine code.
pub(super) struct Module {
    context: Arc<Context>,
    raw: sys::CUmodule,
}

/// One kernel of a module.
#[derive(Clone, Copy)]
pub(super) struct Function(sys::CUfunction);

// SAFETY: a module belongs to its context, not to a thread; every call enters the context first.
unsafe impl Send for Module {}
// SAFETY: the driver locks what calls on one module share; the handle stays as it is until `drop`.
unsafe impl Sync for Module {}
// SAFETY: a function is a part of its module, for which the same holds.
unsafe impl Send for Function {}
// SAFETY: as for `Send`; launches only read the handle.
unsafe impl Sync for Function {}

impl Module {
    /// Has the driver compile `ptx`.
    pub(super) fn new(context: &Arc<Context>, ptx: &CStr) -> Result<Module> {
        let _entered = context.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: reads a C string and writes one handle, unloaded in `drop`.
        let code = unsafe { sys::cuModuleLoadData(&mut raw, ptx.as_ptr().cast()) };
        check(code, "cuModuleLoadData")?;
        Ok(Module {
            context: Arc::clone(context),
            raw,
        })
    }

    pub(super) fn function(&self, name: &CStr) -> Result<Function> {
        let _entered = self.context.enter()?;
        let mut raw = ptr::null_mut();
        // SAFETY: reads a C string and writes one handle that lives as long as the module.
        let code = unsafe { sys::cuModuleGetFunction(&mut raw, self.raw, name.as_ptr()) };
        check(code, "cuModuleGetFunction")?;
        Ok(Function(raw))
    }

    /// Lets blocks of `function`, which is of this module, have so many bytes of shared memory, its own
    /// besides.
    pub(super) fn allow_shared(&self, function: Function, bytes: u32) -> Result<()> {
        let _entered = self.context.enter()?;
        // SAFETY: the function lives as long as its module.
        let code = unsafe {
            sys::cuFuncSetAttribute(
                function.0,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                bytes as i32,
            )
        };
        check(code, "cuFuncSetAttribute")
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let entered = self.context.enter();
        // SAFETY: made in `new`; its kernels have ended, see `Lane`.
        let _ = entered.map(|_entered| unsafe { sys::cuModuleUnload(self.raw) });
    }
}

/// Puts a kernel with one parameter on `stream`.
///
/// # Safety
/// `P` is the kernel's parameter, bit for bit, and what it points at is valid until the kernel has
/// ended, and used otherwise only by what the stream orders.
pub(super) unsafe fn launch<P: Copy>(
    stream: &OwnStream,
    function: Function,
    grid: (u32, u32),
    threads: u32,
    parameter: &P,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { launch_with(stream, function, grid, threads, 0, parameter) }
}

/// The same, each block with so many bytes of shared memory besides the kernel's own.
///
/// # Safety
/// As [`launch`].
pub(super) unsafe fn launch_with<P: Copy>(
    stream: &OwnStream,
    function: Function,
    grid: (u32, u32),
    threads: u32,
    shared_bytes: u32,
    parameter: &P,
) -> Result<()> {
    let _entered = stream.context.enter()?;
    let mut parameters = [ptr::from_ref(parameter).cast_mut().cast::<c_void>()];
    // SAFETY: the driver copies the parameter before it returns; the rest is the caller's promise.
    let code = unsafe {
        sys::cuLaunchKernel(
            function.0,
            grid.0,
            grid.1,
            1,
            threads,
            1,
            1,
            shared_bytes,
            stream.raw,
            parameters.as_mut_ptr(),
            ptr::null_mut(),
        )
    };
    check(code, "cuLaunchKernel")
}

/// Pins `bytes` from `address` on.
///
/// # Safety
/// The memory is mapped, and stays so until [`unpin`].
pub(super) unsafe fn pin(context: &Context, address: u64, bytes: usize) -> Result<()> {
    let _entered = context.enter()?;
    // SAFETY: by the caller's promise the bytes are mapped for as long as they are registered.
    let code = unsafe {
        sys::cuMemHostRegister_v2(
            address as usize as *mut c_void,
            bytes,
            sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP,
        )
    };
    check(code, "cuMemHostRegister").map_err(|error| {
        Error::unavailable(
            "cannot pin the host tier: raise the limit on locked memory (ulimit -l unlimited; in \
             containers --ulimit memlock=-1), or give the host tier fewer bytes",
        )
        .with("bytes", bytes)
        .caused_by(error)
    })
}

/// Undoes [`pin`].
pub(super) fn unpin(context: &Context, address: u64) {
    let address = address as usize as *mut c_void;
    let entered = context.enter();
    // SAFETY: the driver refuses what is not registered; copies have ended, see `CudaDevice`.
    let _ = entered.map(|_entered| unsafe { sys::cuMemHostUnregister(address) });
}

/// Shown: which answers of the driver end a wait. That an engine's capture and transfers do not meet is for a GPU.
#[cfg(test)]
mod tests {
    use super::*;
    use sys::CUresult::*;

    #[test]
    fn a_capture_ends_nothing_that_is_waited_for() {
        for pending in [
            CUDA_ERROR_NOT_READY,
            CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
            CUDA_ERROR_CAPTURED_EVENT,
        ] {
            assert_eq!(is_done(pending, "cuEventQuery").ok(), Some(false));
        }
        assert_eq!(is_done(CUDA_SUCCESS, "cuEventQuery").ok(), Some(true));
        for broken in [CUDA_ERROR_ILLEGAL_ADDRESS, CUDA_ERROR_DEINITIALIZED] {
            assert!(!is_no_end(broken));
        }
    }
}
