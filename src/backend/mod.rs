//! Devices: memory, copies and kernel launches. A backend knows no op by name.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
pub(crate) mod cuda_compile;
#[cfg(feature = "cuda-emu")]
pub(crate) mod cuda_emu;
#[cfg(feature = "cuda")]
mod cuda_graph;
#[cfg(any(feature = "cuda", feature = "cuda-emu"))]
pub(crate) mod cuda_launch;
mod notice;
pub(crate) mod pool;
#[cfg(any(feature = "cuda", feature = "cuda-emu"))]
mod recorded;
mod select;
mod shapes;
#[cfg(feature = "wgpu")]
pub(crate) mod wgpu;
#[cfg(feature = "wgpu")]
pub(crate) mod wgpu_adapters;
#[cfg(feature = "wgpu")]
mod wgpu_pipelines;
#[cfg(feature = "wgpu")]
pub(crate) mod wgsl_half;

pub use notice::{Notice, on_notice};
pub use select::{DeviceReport, device_reports};

use crate::error::Result;
use crate::kernel::{Access, Kernel};
use crate::tensor::DType;
use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Where the machine code of the CUDA kernels comes from, in words.
pub(crate) fn cuda_kernels() -> String {
    #[cfg(feature = "cuda")]
    return cuda_compile::origin();
    #[cfg(not(feature = "cuda"))]
    "not in this build; build with `--features cuda`".into()
}

/// What a device is and can do; `plan` functions choose kernel variants by it.
#[derive(Clone, Debug)]
pub struct Caps {
    /// Canonical device string: `cpu`, `wgpu:0`, `wgpu-base:0`, `wgpu-tiled:0`, `cuda:0`, `cuda-emu`.
    pub name: String,
    /// The hardware's own name.
    pub adapter: String,
    /// Whether it is a GPU driven by a software rasteriser.
    pub software: bool,
    /// Bytes of memory shared by a workgroup (WebGPU's default is 16 KiB).
    pub workgroup_memory: u32,
    /// Invocations (threads) a workgroup may have (WebGPU's default is 256).
    pub max_invocations: u32,
    /// Subgroup (warp) sizes, least and greatest, where kernels may use subgroup operations.
    pub subgroup: Option<(u32, u32)>,
    /// Whether WGSL kernels gain by sharing tiles in workgroup memory, and have room for them: hardware.
    pub tiles: bool,
    /// Whether kernels may compute with 16-bit floats.
    pub f16: bool,
    /// The 16-bit types that kernels take tensors in: f16 and bf16, f16 alone, or none.
    pub half: &'static [DType],
    /// Bytes that one kernel binding may span.
    pub max_binding: u64,
    /// Whether [`Device::take_profile`] gives device-side times.
    pub timestamps: bool,
}

impl Caps {
    /// Whether kernels gain by reading what a subgroup shares once and broadcasting it: software reads memory invocation by
    /// invocation, so that a shared read costs as much as one each. The kernels that do so are made for subgroups of eight, which is
    /// what AVX2 gives.
    pub(crate) fn broadcasts(&self) -> bool {
        self.software && self.subgroup == Some((8, 8))
    }
}

/// Bytes of tensor memory on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes of live tensors.
    pub live: usize,
    /// The most bytes ever live since the last [`Device::reset_peak`].
    pub peak: usize,
}

/// A kernel's time on the device, as [`Device::take_profile`] gives it.
#[derive(Clone, Debug)]
pub struct KernelTime {
    /// The entry point that ran.
    pub entry: &'static str,
    /// Seconds on the device.
    pub seconds: f64,
}

/// What became of the steps of a device, as [`Device::graph_counts`] tells it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GraphCounts {
    /// Graphs that were built.
    pub built: usize,
    /// Runs of a graph, the first of each included.
    pub runs: usize,
    /// Launches and copies in these runs.
    pub nodes: usize,
    /// Those of them that had other arguments than in the run before.
    pub updated: usize,
}

/// One buffer range handed to a launch.
pub(crate) struct Slot<'a> {
    pub(crate) buffer: &'a Buffer,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
    pub(crate) dtype: DType,
    pub(crate) access: Access,
}

/// What a device driver must offer. Calls on one device happen in order; results are seen by [`Backend::read`].
pub(crate) trait Backend: Send + Sync {
    fn caps(&self) -> &Caps;
    /// Memory of at least `bytes` bytes; contents unspecified. Dropping the block gives it back to the pool.
    fn alloc(&self, bytes: usize) -> Result<Box<dyn Any + Send + Sync>>;
    fn write(&self, dst: &Buffer, offset: usize, data: &[u8]) -> Result<()>;
    fn read(&self, src: &Buffer, offset: usize, out: &mut [u8]) -> Result<()>;
    fn copy(&self, src: &Buffer, from: usize, dst: &Buffer, to: usize, bytes: usize) -> Result<()>;
    /// Runs a kernel: plans for its own language, then launches.
    fn launch(&self, kernel: &'static Kernel, params: &[u8], slots: &[Slot<'_>]) -> Result<()>;
    /// Waits until everything asked for so far is done.
    fn sync(&self) -> Result<()>;
    /// Starts or stops timing every launch.
    fn set_profiling(&self, on: bool) -> Result<()>;
    fn take_profile(&self) -> Result<Vec<KernelTime>>;
    /// Starts a step: launches and copies on the device are kept until [`Backend::end_step`] or the next `write`, `read` or `sync`.
    /// `false` where the device does not do that now: it runs everything at once, and no step begins.
    fn begin_step(&self) -> bool {
        false
    }
    /// Ends a step that began: runs what was kept.
    fn end_step(&self) -> Result<()> {
        Ok(())
    }
    /// Ends a step that began: forgets what was kept.
    fn cancel_step(&self) {}
    fn graph_counts(&self) -> GraphCounts {
        GraphCounts::default()
    }
    /// Whether each launch watches its own bindings, so that tensors need no guard words, and runs several times, so that what
    /// differs from run to run is an error already.
    fn watches_launches(&self) -> bool {
        false
    }
}

/// A device that tensors live on; cheap to clone.
#[derive(Clone)]
pub struct Device(Arc<DeviceInner>);

struct DeviceInner {
    backend: Box<dyn Backend>,
    live: AtomicUsize,
    peak: AtomicUsize,
    launches: AtomicUsize,
    guarded: AtomicBool,
    guards: Mutex<Vec<Weak<Buffer>>>,
    /// What the guard words of a dropped tensor told.
    overrun: Mutex<Option<String>>,
}

/// Device memory owned by tensors.
pub(crate) struct Buffer {
    pub(crate) block: Box<dyn Any + Send + Sync>,
    /// Guard words included.
    bytes: usize,
    /// Bytes before and after the tensor's own that nobody may write (0 outside guard mode).
    guard: usize,
    device: Device,
}

/// Guard mode: bytes before and after each tensor, and what they and fresh tensors are filled with (a NaN no kernel makes).
const GUARD: usize = 256;
const POISON: u32 = 0x7fc0_dead;

impl Device {
    /// The CPU: always there.
    pub fn cpu() -> Self {
        Self::from_backend(Box::new(cpu::CpuBackend::new()))
    }

    /// Tensors that have shapes and no memory: nothing can be read from them or computed with them.
    pub(crate) fn shapes() -> Self {
        Self::from_backend(shapes::backend())
    }

    pub(crate) fn from_backend(backend: Box<dyn Backend>) -> Self {
        Self(Arc::new(DeviceInner {
            backend,
            live: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            launches: AtomicUsize::new(0),
            guarded: AtomicBool::new(false),
            guards: Mutex::new(Vec::new()),
            overrun: Mutex::new(None),
        }))
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.0.backend
    }

    /// What this device is and can do.
    pub fn caps(&self) -> &Caps {
        self.0.backend.caps()
    }

    /// Canonical name: `cpu`, `wgpu:0`, `cuda:0`.
    pub fn name(&self) -> &str {
        &self.caps().name
    }

    /// Whether both handles mean the same opened device.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Waits until everything asked of the device so far is done.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device is lost or refused an earlier request.
    pub fn sync(&self) -> Result<()> {
        self.0.backend.sync()
    }

    /// Live and peak bytes of tensors on this device.
    pub fn memory(&self) -> MemoryStats {
        MemoryStats {
            live: self.0.live.load(Ordering::Relaxed),
            peak: self.0.peak.load(Ordering::Relaxed),
        }
    }

    /// Forgets the peak, so that the next [`Device::memory`] tells the peak of what follows.
    pub fn reset_peak(&self) {
        self.0.peak.store(self.0.live.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Kernel launches since the device was opened.
    pub fn launches(&self) -> usize {
        self.0.launches.load(Ordering::Relaxed)
    }

    pub(crate) fn count_launch(&self) {
        self.0.launches.fetch_add(1, Ordering::Relaxed);
    }

    /// Runs `f`, and on a CUDA device what it launches as one graph: the driver then takes a step of a hundred kernels in one call.
    ///
    /// On other devices, while launches are timed and in guard mode, everything runs as if this were not here. On CUDA, nothing
    /// that `f` launches runs before `f` returns or reads from or writes to the device: each such copy ends a graph, and the next
    /// begins. So upload before, read results after. What `f` did the time before is compared with what it did now, and only the
    /// differences (a learning rate, an address) are told to the driver; other kernels make another graph. A step within a step is
    /// a part of it.
    ///
    /// # Errors
    /// Those of `f`: what it launched since its last copy is then not run. [`crate::Error::Device`] where the work fails.
    ///
    /// ```
    /// # use attn2d::{Device, Tensor, ops};
    /// # fn main() -> attn2d::Result<()> {
    /// let device = Device::new("cpu")?; // or "cuda:0"
    /// let x = Tensor::from_f32(&device, &[2], &[1.0, -1.0])?;
    /// let y = device.step(|| ops::relu(&ops::add(&x, &x)?))?;
    /// assert_eq!(y.to_f32()?, [2.0, 0.0]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn step<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        /// Forgets a step that an error or a panic ends.
        struct Open<'a>(Option<&'a dyn Backend>);
        impl Drop for Open<'_> {
            fn drop(&mut self) {
                if let Some(backend) = self.0 {
                    backend.cancel_step();
                }
            }
        }
        // Guard mode writes to every fresh tensor, and each write would end a graph.
        if self.0.guarded.load(Ordering::Relaxed) || !self.backend().begin_step() {
            return f();
        }
        let mut open = Open(Some(self.backend()));
        let result = f()?;
        open.0 = None;
        self.backend().end_step()?;
        Ok(result)
    }

    /// How the graphs of [`Device::step`] were used since the device was opened; all zero where there are none.
    pub fn graph_counts(&self) -> GraphCounts {
        self.backend().graph_counts()
    }

    /// Starts or stops timing every kernel launch.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the adapter has no timestamps.
    pub fn set_profiling(&self, on: bool) -> Result<()> {
        self.0.backend.set_profiling(on)
    }

    /// Times of the launches since profiling began or was last taken, in order.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device is lost.
    pub fn take_profile(&self) -> Result<Vec<KernelTime>> {
        self.0.backend.take_profile()
    }

    /// From now on fresh tensors are filled with NaN and stand between guard words that [`Device::check_guards`] reads:
    /// for tests, to catch reads of what was never written and writes out of bounds.
    pub fn set_guarded(&self, on: bool) {
        self.0.guarded.store(on, Ordering::Relaxed);
    }

    /// Checks the guard words of every live tensor that was made in guard mode, and reports what was found when a tensor
    /// was dropped since the last check (workspaces and gradients live only inside an op).
    ///
    /// # Errors
    /// [`crate::Error::Device`] naming the first overwritten word.
    pub fn check_guards(&self) -> Result<()> {
        let mut guards = self.0.guards.lock().unwrap_or_else(PoisonError::into_inner);
        guards.retain(|weak| weak.strong_count() > 0);
        let mut found = self.0.overrun.lock().unwrap_or_else(PoisonError::into_inner).take();
        for buffer in guards.iter().filter_map(Weak::upgrade) {
            found = found.or(buffer.overrun()?);
        }
        found.map_or(Ok(()), |message| Err(crate::Error::device(self.name(), message)))
    }

    /// Whether each launch is run several times and compared, so that doing everything twice tells nothing more.
    pub(crate) fn compares_runs(&self) -> bool {
        self.0.backend.watches_launches()
    }

    /// Memory for a tensor of `bytes` bytes, and the offset at which the tensor starts.
    pub(crate) fn alloc(&self, bytes: usize) -> Result<(Arc<Buffer>, usize)> {
        let guarded = self.0.guarded.load(Ordering::Relaxed);
        let guard = if guarded && !self.0.backend.watches_launches() { GUARD } else { 0 };
        let bytes = bytes.next_multiple_of(4) + 2 * guard;
        let block = self.0.backend.alloc(bytes)?;
        let live = self.0.live.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.0.peak.fetch_max(live, Ordering::Relaxed);
        let buffer = Arc::new(Buffer { block, bytes, guard, device: self.clone() });
        if guarded {
            self.backend().write(&buffer, 0, bytemuck::cast_slice(&vec![POISON; bytes / 4]))?;
        }
        if guard > 0 {
            let mut guards = self.0.guards.lock().unwrap_or_else(PoisonError::into_inner);
            guards.push(Arc::downgrade(&buffer));
        }
        Ok((buffer, guard))
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({}: {})", self.name(), self.caps().adapter)
    }
}

impl Buffer {
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// The backend's own block type; a buffer only ever meets the backend that made it.
    pub(crate) fn block<B: 'static>(&self) -> &B {
        match self.block.downcast_ref() {
            Some(block) => block,
            None => unreachable!("a buffer reached another backend: Kernel::launch checks devices"),
        }
    }

    /// Which guard word was overwritten first, if any.
    fn overrun(&self) -> Result<Option<String>> {
        let (guard, len) = (self.guard / 4, (self.bytes - 2 * self.guard) / 4);
        let mut around = vec![0u32; 2 * guard];
        let (before, after) = around.split_at_mut(guard);
        self.device.backend().read(self, 0, bytemuck::cast_slice_mut(before))?;
        self.device.backend().read(
            self,
            self.bytes - self.guard,
            bytemuck::cast_slice_mut(after),
        )?;
        let wrong = around.iter().position(|word| *word != POISON);
        Ok(wrong.map(|i| {
            let word = if i < guard { i as i64 - guard as i64 } else { (len + i - guard) as i64 };
            format!("a kernel wrote outside its tensor: word {word} of a tensor of {len} words")
        }))
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.guard > 0
            && let Ok(Some(message)) = self.overrun()
        {
            *self.device.0.overrun.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
        }
        self.device.0.live.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
