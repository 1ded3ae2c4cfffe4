//! NVIDIA GPUs through the CUDA driver, loaded at run time.
//!
//! One stream a device: launches and copies happen in order, so pooled memory can be handed out again while earlier work
//! still runs. Uploads go through two pinned buffers in turn, so that the host does not wait for the GPU. Inside a step, launches
//! and copies on the device are kept and run as a graph (`recorded.rs`, `cuda_graph.rs`).

use super::cuda_compile::Target;
use super::cuda_graph::{Graph, Runner};
use super::cuda_launch::Launch;
use super::pool::{Pool, size_class};
use super::recorded::{Node, Recorder};
use super::{Backend, Buffer, Caps, GraphCounts, KernelTime, Slot};
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::tensor::DType;
use cudarc::driver::sys::{
    CUdevice_attribute as Attribute, CUdeviceptr, CUevent_flags, CUfunction_attribute,
};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, DriverError, PinnedHostSlice,
    result,
};
use cudarc::nvrtc::Ptx;
use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a pinned buffer: larger copies go in pieces.
const STAGING: usize = 8 << 20;

/// The CUDA devices by name, or why there are none.
///
/// cudarc panics when asked for a library that is not there, so its presence is asked first.
pub(crate) fn probe() -> Result<Vec<String>, String> {
    // SAFETY: only tries to open the library; cudarc marks every `sys` call unsafe.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("no CUDA driver (libcuda) found; install NVIDIA's driver".into());
    }
    result::init().map_err(|e| format!("cuInit failed: {:?}", e.0))?;
    let count = result::device::get_count().map_err(|e| format!("no device count: {:?}", e.0))?;
    if count == 0 {
        return Err("the CUDA driver finds no GPU".into());
    }
    (0..count)
        .map(|i| {
            let device = result::device::get(i).map_err(|e| format!("device {i}: {:?}", e.0))?;
            result::device::get_name(device).map_err(|e| format!("device {i}: {:?}", e.0))
        })
        .collect()
}

pub(crate) struct CudaBackend {
    caps: Caps,
    target: Target,
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    pool: Arc<Pool<Memory>>,
    state: Mutex<State>,
}

struct State {
    /// By file and type of storage.
    modules: HashMap<(&'static str, DType), Arc<CudaModule>>,
    functions: HashMap<&'static str, CudaFunction>,
    steps: Recorder<CUdeviceptr, Graph>,
    staging: Staging,
    /// Launches and their start and end, while somebody wants their times.
    profile: Option<Vec<(&'static str, CudaEvent, CudaEvent)>>,
}

/// Device memory, freed in stream order.
struct Memory {
    pointer: CUdeviceptr,
    bytes: usize,
    stream: Arc<CudaStream>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // A device that is gone has freed it already.
        let _ = self.stream.context().bind_to_thread();
        // SAFETY: allocated by `malloc_async` on this stream and freed once; earlier work on the stream comes first.
        let _ = unsafe { result::free_async(self.pointer, self.stream.cu_stream()) };
    }
}

/// Memory lent from the pool.
struct Block {
    memory: Option<Memory>,
    pool: Arc<Pool<Memory>>,
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.give(memory.bytes, memory);
        }
    }
}

fn address(buffer: &Buffer, offset: usize) -> CUdeviceptr {
    match &buffer.block::<Block>().memory {
        Some(memory) => memory.pointer + offset as CUdeviceptr,
        None => unreachable!("memory leaves its block only on drop"),
    }
}

/// Two pinned buffers in turn; a copy out of one may still run while the other is filled.
struct Staging {
    buffers: [PinnedHostSlice<u8>; 2],
    /// When the last copy out of each is done.
    done: [CudaEvent; 2],
    next: usize,
}

impl Staging {
    fn new(context: &Arc<CudaContext>) -> Result<Self, DriverError> {
        // SAFETY: no byte is read before it is written: `write` fills what it copies, `read` waits for the device's bytes.
        let pinned = || unsafe { context.alloc_pinned_with_flags::<u8>(STAGING, 0) };
        let event = || context.new_event(None);
        Ok(Self { buffers: [pinned()?, pinned()?], done: [event()?, event()?], next: 0 })
    }
}

impl CudaBackend {
    /// Opens GPU `ordinal`; `name` is its canonical device string. The driver must be there (see [`probe`]).
    pub(crate) fn open(name: &str, ordinal: usize) -> Result<Self> {
        let fail = |what: &str, e: DriverError| Error::device(name, format!("{what}: {:?}", e.0));
        let context = CudaContext::new(ordinal).map_err(|e| fail("cannot be opened", e))?;
        let stream = context.new_stream().map_err(|e| fail("no stream", e))?;
        // SAFETY: all work goes to one stream, so nothing has to be ordered by events.
        unsafe { context.disable_event_tracking() };
        let ask = |a| context.attribute(a).map_err(|e| fail("an attribute", e));
        let mut driver = 0;
        // SAFETY: the pointer is to a number of ours.
        unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut driver) }
            .result()
            .map_err(|e| fail("no driver version", e))?;
        let capability = 10 * ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let target = Target { capability, driver };
        let hardware = context.name().map_err(|e| fail("no name", e))?;
        target
            .check()
            .map_err(|why| Error::device(name, format!("{hardware} is there, but {why}")))?;
        let shared = ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let threads = ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?;
        let memory = context.total_mem().map_err(|e| fail("no memory size", e))?;
        let caps = Caps {
            name: name.into(),
            adapter: format!(
                "{hardware} (compute capability {}.{}, {} GiB, driver for CUDA {}.{})",
                capability / 10,
                capability % 10,
                memory >> 30,
                driver / 1000,
                driver % 1000 / 10
            ),
            software: false,
            workgroup_memory: shared as u32,
            max_invocations: threads as u32,
            subgroup: Some((32, 32)),
            tiles: false,
            f16: true,
            half: if capability >= 80 { &[DType::F16, DType::BF16] } else { &[] },
            max_binding: memory as u64,
            timestamps: true,
        };
        let staging = Staging::new(&context).map_err(|e| fail("no pinned memory", e))?;
        let state = State {
            modules: HashMap::new(),
            functions: HashMap::new(),
            steps: Recorder::new(),
            staging,
            profile: None,
        };
        let (pool, state) = (Arc::new(Pool::new()), Mutex::new(state));
        Ok(Self { caps, target, context, stream, pool, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, what: &str, e: DriverError) -> Error {
        Error::device(&self.caps.name, format!("{what}: {:?}", e.0))
    }

    /// Makes the device current for this thread: drivers keep that by thread.
    fn enter(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| self.error("the device is lost", e))
    }

    /// The steps of the device, and what runs them.
    fn steps<'a>(
        &'a self,
        state: &'a mut State,
    ) -> (&'a mut Recorder<CUdeviceptr, Graph>, Runner<'a>) {
        let runner = Runner {
            device: &self.caps.name,
            driver: self.target.driver,
            stream: &self.stream,
            functions: &state.functions,
        };
        (&mut state.steps, runner)
    }

    /// Hands over what a step has kept, before anything that must come after it.
    fn flush(&self, state: &mut State) -> Result<()> {
        let (steps, mut runner) = self.steps(state);
        steps.flush(&mut runner)
    }

    fn new_memory(&self, bytes: usize) -> Result<Memory, DriverError> {
        // SAFETY: the stream is alive; the memory is written before it is read (or poisoned, in guard mode).
        let pointer = unsafe { result::malloc_async(self.stream.cu_stream(), bytes) }?;
        Ok(Memory { pointer, bytes, stream: self.stream.clone() })
    }

    /// Sees to it that the function of an entry point is there: compiled, loaded and allowed all shared memory at its first use.
    fn load(&self, state: &mut State, launch: &Launch) -> Result<()> {
        let Launch { text, stored, entry, .. } = *launch;
        if state.functions.contains_key(entry) {
            return Ok(());
        }
        let refuse = |what: String| {
            let (file, arch) = (text.name, self.target.capability);
            let place = format!("kernel {entry} (kernels/{file}.cu) for sm_{arch}");
            Error::device(&self.caps.name, format!("{place}: {what}"))
        };
        let module = match state.modules.get(&(text.name, stored)) {
            Some(module) => module.clone(),
            None => {
                let image = self.target.image(text, stored).map_err(refuse)?;
                let module = self
                    .context
                    .load_module(Ptx::from_binary(image))
                    .map_err(|e| refuse(format!("the driver refuses its code: {:?}", e.0)))?;
                state.modules.insert((text.name, stored), module.clone());
                module
            }
        };
        let function = module
            .load_function(entry)
            .map_err(|e| refuse(format!("is not in its module: {:?}", e.0)))?;
        let fixed = function.shared_size_bytes().map_err(|e| self.error(entry, e))?;
        let most = self.caps.workgroup_memory as i32 - fixed;
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function
            .set_attribute(attribute, most)
            .map_err(|e| refuse(format!("{most} bytes of shared memory: {:?}", e.0)))?;
        state.functions.insert(entry, function);
        Ok(())
    }
}

impl Backend for CudaBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Any + Send + Sync>> {
        self.enter()?;
        let class = size_class(bytes);
        let found = match self.pool.take(class) {
            Some(memory) => Ok(memory),
            None => self.new_memory(class),
        };
        let memory = match found {
            Ok(memory) => memory,
            Err(_) => {
                // What is free in other classes goes back to the driver, once the GPU is done with it; a step may have kept
                // launches that use it.
                self.flush(&mut self.state())?;
                self.pool.trim();
                self.stream.synchronize().and_then(|()| self.new_memory(class)).map_err(|e| {
                    let what =
                        format!("cannot allocate {class} bytes; use a smaller batch or image");
                    self.error(&what, e)
                })?
            }
        };
        Ok(Box::new(Block { memory: Some(memory), pool: self.pool.clone() }))
    }

    fn write(&self, dst: &Buffer, offset: usize, data: &[u8]) -> Result<()> {
        self.enter()?;
        let mut state = self.state();
        self.flush(&mut state)?;
        let staging = &mut state.staging;
        let mut send = |at: usize, piece: &[u8]| -> Result<(), DriverError> {
            let i = staging.next;
            staging.next = 1 - i;
            staging.done[i].synchronize()?;
            let pinned = &mut staging.buffers[i].as_mut_slice()?[..piece.len()];
            pinned.copy_from_slice(piece);
            let to = address(dst, offset + at);
            // SAFETY: the range lies in the buffer, and the pinned bytes stay until `done`.
            unsafe { result::memcpy_htod_async(to, pinned, self.stream.cu_stream()) }?;
            staging.done[i].record(&self.stream)
        };
        for (i, piece) in data.chunks(STAGING).enumerate() {
            send(i * STAGING, piece).map_err(|e| self.error("cannot copy to the device", e))?;
        }
        Ok(())
    }

    fn read(&self, src: &Buffer, offset: usize, out: &mut [u8]) -> Result<()> {
        self.enter()?;
        let mut state = self.state();
        self.flush(&mut state)?;
        let staging = &mut state.staging;
        let mut fetch = |at: usize, piece: &mut [u8]| -> Result<(), DriverError> {
            staging.done[0].synchronize()?;
            let pinned = &mut staging.buffers[0].as_mut_slice()?[..piece.len()];
            let from = address(src, offset + at);
            // SAFETY: the range lies in the buffer, and the stream is waited for before the bytes are read.
            unsafe { result::memcpy_dtoh_async(&mut *pinned, from, self.stream.cu_stream()) }?;
            self.stream.synchronize()?;
            piece.copy_from_slice(pinned);
            Ok(())
        };
        for (i, piece) in out.chunks_mut(STAGING).enumerate() {
            fetch(i * STAGING, piece)
                .map_err(|e| self.error("cannot copy from the device (or a kernel failed)", e))?;
        }
        Ok(())
    }

    fn copy(&self, src: &Buffer, from: usize, dst: &Buffer, to: usize, bytes: usize) -> Result<()> {
        self.enter()?;
        let mut state = self.state();
        let (steps, mut runner) = self.steps(&mut state);
        let node = Node::Copy { from: address(src, from), to: address(dst, to), bytes };
        steps.ask(node, &mut runner)
    }

    fn launch(&self, kernel: &'static Kernel, params: &[u8], slots: &[Slot<'_>]) -> Result<()> {
        let launch = Launch::new(kernel, slots, params, &self.caps)?;
        self.enter()?;
        let mut state = self.state();
        self.load(&mut state, &launch)?;
        let fail = |e: DriverError| self.error(&format!("kernel {}", launch.entry), e);
        let mark = |on: bool| -> Result<Option<CudaEvent>> {
            let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
            let record = || self.stream.record_event(flags);
            on.then(record).transpose().map_err(fail)
        };
        let timed = state.profile.is_some();
        let start = mark(timed)?;
        let bindings = slots.iter().map(|s| address(s.buffer, s.offset)).collect();
        let (steps, mut runner) = self.steps(&mut state);
        steps.ask(Node::Kernel { launch, params: params.to_vec(), bindings }, &mut runner)?;
        let end = mark(timed)?;
        if let (Some(profile), Some(start), Some(end)) = (&mut state.profile, start, end) {
            profile.push((launch.entry, start, end));
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.enter()?;
        self.flush(&mut self.state())?;
        self.stream.synchronize().map_err(|e| self.error("a kernel failed", e))
    }

    fn set_profiling(&self, on: bool) -> Result<()> {
        self.enter()?;
        let mut state = self.state();
        // A graph has no times of its kernels: a step that has begun goes on without one.
        self.flush(&mut state)?;
        state.steps.cancel();
        state.profile = on.then(Vec::new);
        Ok(())
    }

    fn begin_step(&self) -> bool {
        let mut state = self.state();
        let begins = state.profile.is_none() && state.steps.begin();
        if begins {
            self.pool.settle(|memory| memory.pointer);
        }
        begins
    }

    fn end_step(&self) -> Result<()> {
        self.enter()?;
        let mut state = self.state();
        let done = self.flush(&mut state);
        state.steps.cancel();
        done
    }

    fn cancel_step(&self) {
        self.state().steps.cancel();
    }

    fn graph_counts(&self) -> GraphCounts {
        self.state().steps.counts()
    }

    fn take_profile(&self) -> Result<Vec<KernelTime>> {
        self.sync()?;
        let taken = self.state().profile.as_mut().map(std::mem::take).unwrap_or_default();
        let time = |(entry, start, end): (&'static str, CudaEvent, CudaEvent)| {
            let ms = start.elapsed_ms(&end).map_err(|e| self.error("no time", e))?;
            Ok(KernelTime { entry, seconds: f64::from(ms) * 1e-3 })
        };
        taken.into_iter().map(time).collect()
    }
}
