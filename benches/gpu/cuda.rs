//! The engine's side of the GPU: raw driver calls, and cuBLAS if the machine has it.
//!
//! A benchmark may end the process on any failure, so calls check and panic.

use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr;

use cudarc::driver::sys;

pub(crate) fn check(code: sys::CUresult) {
    assert_eq!(code, sys::CUresult::CUDA_SUCCESS, "the CUDA driver failed");
}

/// Makes the primary context of GPU 0 current on this thread.
pub(crate) fn enter() {
    let (mut device, mut context) = (0, ptr::null_mut());
    // SAFETY: the caller knows that there is a driver; the calls write to locals, and the context is
    // kept until the process ends.
    unsafe {
        check(sys::cuInit(0));
        check(sys::cuDeviceGet(&mut device, 0));
        check(sys::cuDevicePrimaryCtxRetain(&mut context, device));
        check(sys::cuCtxSetCurrent(context));
    }
}

/// GPU memory, freed when dropped.
pub(crate) struct Memory {
    pub(crate) address: u64,
    pub(crate) bytes: usize,
}

impl Memory {
    pub(crate) fn new(bytes: usize) -> Memory {
        let mut address = 0;
        // SAFETY: writes a local.
        check(unsafe { sys::cuMemAlloc_v2(&mut address, bytes) });
        Memory { address, bytes }
    }

    pub(crate) fn fill(&self, byte: u8) {
        // SAFETY: all of our own memory.
        check(unsafe { sys::cuMemsetD8_v2(self.address, byte, self.bytes) });
        synchronize();
    }

    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.bytes);
        // SAFETY: within our own memory; the call returns when the bytes have been read.
        check(unsafe {
            sys::cuMemcpyHtoD_v2(
                self.address + offset as u64,
                bytes.as_ptr().cast(),
                bytes.len(),
            )
        });
        synchronize();
    }

    pub(crate) fn read(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset + bytes.len() <= self.bytes);
        // SAFETY: within our own memory, into a slice of that length.
        check(unsafe {
            sys::cuMemcpyDtoH_v2(
                bytes.as_mut_ptr().cast(),
                self.address + offset as u64,
                bytes.len(),
            )
        });
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`; the call waits for the device.
        let _ = unsafe { sys::cuMemFree_v2(self.address) };
    }
}

pub(crate) fn synchronize() {
    // SAFETY: no arguments.
    check(unsafe { sys::cuCtxSynchronize() });
}

/// Pinned host memory; lives until the process ends.
pub(crate) fn pinned(bytes: usize) -> u64 {
    let mut address: *mut c_void = ptr::null_mut();
    // SAFETY: writes a local.
    check(unsafe { sys::cuMemHostAlloc(&mut address, bytes, sys::CU_MEMHOSTALLOC_PORTABLE) });
    // SAFETY: fresh memory of that length.
    unsafe { address.cast::<u8>().write_bytes(1, bytes) };
    address as u64
}

/// A point on a stream that knows when it was reached.
pub(crate) struct Event(sys::CUevent);

impl Event {
    pub(crate) fn new() -> Event {
        let mut raw = ptr::null_mut();
        // SAFETY: writes a local.
        check(unsafe { sys::cuEventCreate(&mut raw, 0) });
        Event(raw)
    }

    pub(crate) fn record(&self, stream: Stream) {
        // SAFETY: both are alive.
        check(unsafe { sys::cuEventRecord(self.0, stream.raw()) });
    }

    pub(crate) fn synchronize(&self) {
        // SAFETY: a live event.
        check(unsafe { sys::cuEventSynchronize(self.0) });
    }

    /// Both were reached.
    pub(crate) fn seconds_since(&self, start: &Event) -> f64 {
        let mut ms = 0.0;
        // SAFETY: two live events; writes a local.
        check(unsafe { sys::cuEventElapsedTime(&mut ms, start.0, self.0) });
        f64::from(ms) / 1e3
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new`.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// A stream; lives until the process ends.
#[derive(Clone, Copy)]
pub(crate) struct Stream(pub(crate) u64);

impl Stream {
    pub(crate) fn new() -> Stream {
        let mut raw = ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes a local.
        check(unsafe { sys::cuStreamCreateWithPriority(&mut raw, flags, 0) });
        Stream(raw as u64)
    }

    pub(crate) fn raw(self) -> sys::CUstream {
        self.0 as usize as sys::CUstream
    }

    pub(crate) fn synchronize(self) {
        // SAFETY: a live stream.
        check(unsafe { sys::cuStreamSynchronize(self.raw()) });
    }

    /// Orders what comes behind what is on `other` now.
    pub(crate) fn order_behind(self, other: Stream) {
        let mut event = ptr::null_mut();
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: live streams; the driver keeps a destroyed event while it is waited for.
        unsafe {
            check(sys::cuEventCreate(&mut event, flags));
            check(sys::cuEventRecord(event, other.raw()));
            check(sys::cuStreamWaitEvent(self.raw(), event, 0));
            check(sys::cuEventDestroy_v2(event));
        }
    }

    /// Puts a copy on the stream; the driver tells host and device by the address.
    ///
    /// # Safety
    /// Both sides are valid until the copy has ended.
    pub(crate) unsafe fn copy(self, to: u64, from: u64, bytes: usize) {
        // SAFETY: the caller's promise.
        check(unsafe { sys::cuMemcpyAsync(to, from, bytes, self.raw()) });
    }
}

pub(crate) struct Kernels(sys::CUmodule);

impl Kernels {
    pub(crate) fn load(ptx: &str) -> Kernels {
        let ptx = CString::new(ptx).expect("no zero byte");
        let mut module = ptr::null_mut();
        // SAFETY: reads a C string, writes a local.
        check(unsafe { sys::cuModuleLoadData(&mut module, ptx.as_ptr().cast()) });
        Kernels(module)
    }

    /// Machine code or PTX from a file; `None` where it is not there or not for this GPU.
    pub(crate) fn open(path: &str) -> Option<Kernels> {
        let path = CString::new(path).ok()?;
        let mut module = ptr::null_mut();
        // SAFETY: reads a C string, writes a local.
        let code = unsafe { sys::cuModuleLoad(&mut module, path.as_ptr()) };
        (code == sys::CUresult::CUDA_SUCCESS).then_some(Kernels(module))
    }

    pub(crate) fn get(&self, name: &CStr) -> Kernel {
        let mut function = ptr::null_mut();
        // SAFETY: reads a C string, writes a local.
        check(unsafe { sys::cuModuleGetFunction(&mut function, self.0, name.as_ptr()) });
        Kernel(function)
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Kernel(sys::CUfunction);

impl Kernel {
    /// Lets launches have `bytes` of shared memory.
    pub(crate) fn allow_shared(self, bytes: u32) {
        let attribute =
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a kernel of a loaded module.
        check(unsafe { sys::cuFuncSetAttribute(self.0, attribute, bytes as i32) });
    }

    /// # Safety
    /// The parameters are the kernel's, and what they point at is valid until it has ended.
    pub(crate) unsafe fn launch(
        self,
        stream: Stream,
        blocks: u32,
        threads: u32,
        parameters: &[u64],
    ) {
        // SAFETY: the caller's promise.
        unsafe { self.launch_in(stream, (blocks, 1), threads, 0, parameters) }
    }

    /// # Safety
    /// As [`Kernel::launch`].
    pub(crate) unsafe fn launch_in(
        self,
        stream: Stream,
        blocks: (u32, u32),
        threads: u32,
        shared_bytes: u32,
        parameters: &[u64],
    ) {
        let mut pointers: Vec<*mut c_void> = parameters
            .iter()
            .map(|parameter| ptr::from_ref(parameter).cast_mut().cast())
            .collect();
        // SAFETY: parameters of at most eight bytes each are copied before the call returns.
        check(unsafe {
            sys::cuLaunchKernel(
                self.0,
                blocks.0,
                blocks.1,
                1,
                threads,
                1,
                1,
                shared_bytes,
                stream.raw(),
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        });
    }
}

type GemmEx = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;
type GemmBatched = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    i64,
    *const c_void,
    c_int,
    c_int,
    i64,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    i64,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// cuBLAS on one stream.
pub(crate) struct Blas {
    handle: *mut c_void,
    gemm: GemmEx,
    batched: GemmBatched,
}

const BF16: c_int = 14;
const COMPUTE_F32: c_int = 68;
const DEFAULT_ALGO: c_int = -1;

/// One matrix of a product, column-major as cuBLAS counts.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) address: u64,
    pub(crate) leading: i32,
    /// From one of the batch to the next, in elements.
    pub(crate) step: i64,
    pub(crate) transposed: bool,
}

impl Blas {
    /// `None` where the machine has no cuBLAS.
    pub(crate) fn load(stream: Stream) -> Option<Blas> {
        let mut names = vec![
            "libcublas.so.13".to_owned(),
            "libcublas.so.12".to_owned(),
            "/usr/local/cuda/lib64/libcublas.so".to_owned(),
        ];
        names.extend(std::env::var("CUBLAS").ok());
        let library = names.iter().find_map(|name| {
            let name = CString::new(name.as_str()).ok()?;
            let flags = libc::RTLD_NOW | libc::RTLD_GLOBAL;
            // SAFETY: the name is a C string; the initialisers that run are those of a library that
            // is cuBLAS by its name.
            let library = unsafe { libc::dlopen(name.as_ptr(), flags) };
            (!library.is_null()).then_some(library)
        })?;
        let symbol = |name: &CStr| {
            // SAFETY: a library that is open.
            let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
            assert!(!symbol.is_null(), "cuBLAS lacks {name:?}");
            symbol
        };
        type Create = unsafe extern "C" fn(*mut *mut c_void) -> c_int;
        type SetStream = unsafe extern "C" fn(*mut c_void, sys::CUstream) -> c_int;
        type SetWorkspace = unsafe extern "C" fn(*mut c_void, *mut c_void, usize) -> c_int;
        let mut handle = ptr::null_mut();
        let workspace = std::mem::ManuallyDrop::new(Memory::new(64 << 20));
        // SAFETY: the signatures are those of cublas_api.h; the workspace is never freed.
        unsafe {
            let create: Create = std::mem::transmute(symbol(c"cublasCreate_v2"));
            let set_stream: SetStream = std::mem::transmute(symbol(c"cublasSetStream_v2"));
            let set_workspace: SetWorkspace = std::mem::transmute(symbol(c"cublasSetWorkspace_v2"));
            assert_eq!(create(&mut handle), 0, "cublasCreate");
            assert_eq!(set_stream(handle, stream.raw()), 0, "cublasSetStream");
            let address = workspace.address as usize as *mut c_void;
            assert_eq!(set_workspace(handle, address, workspace.bytes), 0);
            Some(Blas {
                handle,
                gemm: std::mem::transmute::<*mut c_void, GemmEx>(symbol(c"cublasGemmEx")),
                batched: std::mem::transmute::<*mut c_void, GemmBatched>(symbol(
                    c"cublasGemmStridedBatchedEx",
                )),
            })
        }
    }

    /// `c = scale × a × b` in bf16 with f32 sums, `batch` times.
    ///
    /// # Safety
    /// The matrices are valid, at these sizes, until the product has been computed.
    pub(crate) unsafe fn gemm(
        &self,
        (m, n, k): (usize, usize, usize),
        scale: f32,
        a: Matrix,
        b: Matrix,
        c: Matrix,
        batch: usize,
    ) {
        let zero = 0.0_f32;
        let (m, n, k) = (m as c_int, n as c_int, k as c_int);
        let (one, zero) = (ptr::from_ref(&scale).cast(), ptr::from_ref(&zero).cast());
        let op = |matrix: Matrix| c_int::from(matrix.transposed);
        let at = |matrix: Matrix| matrix.address as usize as *mut c_void;
        // SAFETY: the caller's promise; scalars are read before the call returns.
        let code = unsafe {
            match batch {
                1 => (self.gemm)(
                    self.handle,
                    op(a),
                    op(b),
                    m,
                    n,
                    k,
                    one,
                    at(a),
                    BF16,
                    a.leading,
                    at(b),
                    BF16,
                    b.leading,
                    zero,
                    at(c),
                    BF16,
                    c.leading,
                    COMPUTE_F32,
                    DEFAULT_ALGO,
                ),
                _ => (self.batched)(
                    self.handle,
                    op(a),
                    op(b),
                    m,
                    n,
                    k,
                    one,
                    at(a),
                    BF16,
                    a.leading,
                    a.step,
                    at(b),
                    BF16,
                    b.leading,
                    b.step,
                    zero,
                    at(c),
                    BF16,
                    c.leading,
                    c.step,
                    batch as c_int,
                    COMPUTE_F32,
                    DEFAULT_ALGO,
                ),
            }
        };
        assert_eq!(code, 0, "cuBLAS failed");
    }
}
