//! A kernel is data: its name, what it binds, its text for each kind of device, and the plan that maps a problem to a
//! grid. Backends run kernels; they have no list of them.

use crate::backend::{Buffer, Caps, Slot};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use bytemuck::Pod;
use std::cell::Cell;

/// How a kernel uses a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read.
    Read,
    /// Every element the tensor has is written; nothing is read.
    Write,
    /// Read and changed in place (parameters, running statistics).
    ReadWrite,
}

/// One kernel on every kind of device.
pub struct Kernel {
    /// `<op>_<pass>[_<variant>]_<dtype>`: the entry point in every language, the profiler's label and the bench id.
    pub name: &'static str,
    /// Names and uses of the bindings: inputs, then saved tensors, then outputs. At most 8 (WebGPU's default limit).
    pub bindings: &'static [(&'static str, Access)],
    /// The CPU kernel.
    pub cpu: fn(&CpuArgs<'_>),
    /// WGSL text; `shaders/common.wgsl` is put before it. Binding 0 is the parameter block (uniform), then the bindings.
    pub wgsl: &'static str,
    /// The CUDA kernel, or `None` while the op has none: it then refuses to run on a CUDA device.
    pub cuda: Option<Cuda>,
    /// Chooses variant and grid for WGSL from the parameter block and the device.
    pub plan: fn(params: &[u8], caps: &Caps) -> Plan,
}

/// A kernel in CUDA. Its arguments are the parameter block by value, then a pointer for each binding.
#[derive(Clone, Copy)]
pub struct Cuda {
    /// The text of its file.
    pub text: CudaText,
    /// Chooses variant, grid, block and shared memory from the parameter block and the device.
    pub plan: fn(params: &[u8], caps: &Caps) -> CudaPlan,
}

/// A file of CUDA kernels, with its includes resolved.
#[derive(Clone, Copy)]
pub struct CudaText {
    /// The file's name without folder and `.cu`.
    pub name: &'static str,
    /// What is compiled. Kernels are `extern "C"` and need no header.
    pub source: &'static str,
}

/// The text of `kernels/<name>.cu` as `build.rs` made it.
macro_rules! cuda_text {
    ($name:literal) => {
        $crate::kernel::CudaText {
            name: $name,
            source: include_str!(concat!(env!("OUT_DIR"), "/kernels/", $name, ".cu")),
        }
    };
}
pub(crate) use cuda_text;

/// What to launch on a CUDA device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaPlan {
    /// Entry point of a variant; empty for the kernel's own name.
    pub entry: &'static str,
    /// Blocks along x (at most 2^31 - 1), y and z (at most 65,535 each).
    pub grid: [u32; 3],
    /// Threads of a block, along x.
    pub block: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl CudaPlan {
    /// For a problem beyond what the kernel can do: the launch is an error.
    pub const REFUSED: Self = Self { entry: "", grid: [0; 3], block: 0, shared: 0 };

    /// One-dimensional work: `n` items in blocks of `block` threads, `per_thread` items a thread.
    pub fn items(n: usize, per_thread: u32, block: u32) -> Self {
        let blocks = n.div_ceil(per_thread as usize * block as usize).max(1);
        Self { entry: "", grid: [blocks as u32, 1, 1], block, shared: 0 }
    }

    /// A grid of blocks.
    pub fn grid(grid: [u32; 3], block: u32) -> Self {
        Self { entry: "", grid, block, shared: 0 }
    }

    /// The same with dynamic shared memory.
    pub fn shared(self, bytes: u32) -> Self {
        Self { shared: bytes, ..self }
    }

    /// The same with another entry point.
    pub fn entry(self, entry: &'static str) -> Self {
        Self { entry, ..self }
    }
}

/// What to launch in WGSL: an entry point and the number of workgroups along x, y, z.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Entry point of a variant; empty for the kernel's own name.
    pub entry: &'static str,
    /// Workgroups along x, y and z, each at most 65,535.
    pub grid: [u32; 3],
}

/// WebGPU's limit on workgroups along one axis.
pub const MAX_GROUPS: u32 = 65_535;

impl Plan {
    /// One-dimensional work: `n` items, `per_group` a workgroup. Past 65,535 groups the grid goes on along y, and the
    /// kernel finds its item by `flat_id` of `common.wgsl`; items past `n` are the kernel's to skip.
    pub fn items(n: usize, per_group: u32) -> Self {
        let groups = (n as u64).div_ceil(u64::from(per_group)).max(1);
        let y = groups.div_ceil(u64::from(MAX_GROUPS));
        let x = groups.div_ceil(y);
        Self { entry: "", grid: [x as u32, y as u32, 1] }
    }

    /// The same grid with another entry point.
    pub fn entry(self, entry: &'static str) -> Self {
        Self { entry, ..self }
    }
}

/// The parameter block that a `plan` function is given, as its type.
pub fn params<P: Pod>(bytes: &[u8]) -> P {
    bytemuck::pod_read_unaligned(bytes)
}

impl Kernel {
    /// Runs the kernel on the device of its tensors; `bindings` in the order of [`Kernel::bindings`].
    ///
    /// The tensors' shapes are the op's business: it has checked them against `params` before it calls this.
    ///
    /// # Errors
    /// [`Error::Shape`] where the bindings do not fit the kernel (number, device, a written tensor that is bound twice),
    /// [`Error::Device`] where the device refuses (out of memory, lost, a kernel that does not compile).
    pub fn launch<P: Pod>(&'static self, params: &P, bindings: &[&Tensor]) -> Result<()> {
        let device = self.check(bindings)?;
        let slots: Vec<Slot<'_>> = bindings
            .iter()
            .zip(self.bindings)
            .map(|(t, (_, access))| Slot {
                buffer: t.buffer(),
                offset: t.offset(),
                bytes: t.numel() * t.dtype().bytes(),
                access: *access,
            })
            .collect();
        let bytes = bytemuck::bytes_of(params);
        device.count_launch();
        device.backend().launch(self, bytes, &slots)
    }

    /// The entry point that a plan's `entry` means.
    pub fn entry_of(&self, entry: &'static str) -> &'static str {
        if entry.is_empty() { self.name } else { entry }
    }

    fn check<'t>(&self, bindings: &[&'t Tensor]) -> Result<&'t crate::Device> {
        let fail = |message: String| Error::Shape { op: self.name, message };
        if bindings.len() != self.bindings.len() {
            return Err(fail(format!(
                "{} bindings given, {} expected: {:?}",
                bindings.len(),
                self.bindings.len(),
                self.bindings.iter().map(|b| b.0).collect::<Vec<_>>()
            )));
        }
        let device = match bindings.first() {
            Some(t) => t.device(),
            None => return Err(fail("a kernel needs at least one binding".into())),
        };
        for (i, t) in bindings.iter().enumerate() {
            let (name, access) = self.bindings[i];
            if !t.device().same(device) {
                return Err(fail(format!(
                    "{name} is on {}, {} is on {}; move one of them with Tensor::to_device",
                    t.device().name(),
                    self.bindings[0].0,
                    device.name()
                )));
            }
            // WebGPU forbids a buffer to be read and written in one launch, and the CPU kernels hold it as a slice: one rule for all.
            for (j, u) in bindings.iter().enumerate().skip(i + 1) {
                let other = self.bindings[j].1;
                let mixed = access != other && (access != Access::Read || other != Access::Read);
                let written = access != Access::Read || other != Access::Read;
                if std::ptr::eq(t.buffer(), u.buffer()) && (mixed || written && overlap(t, u)) {
                    return Err(fail(format!(
                        "{name} and {} share memory and one of them is written",
                        self.bindings[j].0
                    )));
                }
            }
        }
        Ok(device)
    }
}

fn overlap(a: &Tensor, b: &Tensor) -> bool {
    let end = |t: &Tensor| t.offset() + t.numel() * t.dtype().bytes();
    a.offset() < end(b) && b.offset() < end(a)
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel")
            .field("name", &self.name)
            .field("bindings", &self.bindings)
            .finish()
    }
}

/// What a CPU kernel is called with: the parameter block and the bound tensors as slices.
pub struct CpuArgs<'a> {
    params: &'a [u8],
    slots: &'a [CpuSlot],
}

/// A binding on the host. `taken` sees to it that a mutable slice is handed out once.
pub(crate) struct CpuSlot {
    pub(crate) pointer: *mut u8,
    pub(crate) bytes: usize,
    pub(crate) access: Access,
    pub(crate) taken: Cell<bool>,
}

impl<'a> CpuArgs<'a> {
    /// # Safety
    /// Each slot's pointer is valid for its bytes as long as `'a`, 4-byte aligned and initialised, and a slot that is not
    /// `Read` overlaps no other slot.
    pub(crate) unsafe fn new(params: &'a [u8], slots: &'a [CpuSlot]) -> Self {
        Self { params, slots }
    }

    /// The parameter block.
    pub fn params<P: Pod>(&self) -> P {
        params(self.params)
    }

    /// Binding `i` as numbers to read.
    pub fn f32(&self, i: usize) -> &'a [f32] {
        self.read(i)
    }

    /// Binding `i` as labels or indices to read.
    pub fn u32(&self, i: usize) -> &'a [u32] {
        self.read(i)
    }

    /// Binding `i`, a `Write` or `ReadWrite` one, as numbers to change. Can be asked for once a launch.
    pub fn f32_mut(&self, i: usize) -> &'a mut [f32] {
        self.write(i)
    }

    /// Binding `i`, a `Write` or `ReadWrite` one, as labels or indices to change. Can be asked for once a launch.
    pub fn u32_mut(&self, i: usize) -> &'a mut [u32] {
        self.write(i)
    }

    fn read<T: Pod>(&self, i: usize) -> &'a [T] {
        let slot = &self.slots[i];
        assert!(slot.access == Access::Read, "binding {i} is written: take it with f32_mut");
        // SAFETY: `new` asks for valid, initialised, aligned memory that no written slot overlaps.
        unsafe { std::slice::from_raw_parts(slot.pointer.cast(), slot.bytes / size_of::<T>()) }
    }

    #[allow(clippy::mut_from_ref, reason = "`taken` allows one mutable slice of a slot")]
    fn write<T: Pod>(&self, i: usize) -> &'a mut [T] {
        let slot = &self.slots[i];
        assert!(slot.access != Access::Read, "binding {i} is declared Read");
        assert!(!slot.taken.replace(true), "binding {i} is taken twice");
        // SAFETY: as in `read`; the slot is handed out once and overlaps no other.
        unsafe { std::slice::from_raw_parts_mut(slot.pointer.cast(), slot.bytes / size_of::<T>()) }
    }
}

/// The buffer of a slot must come from the backend that runs the launch.
pub(crate) fn host_slot(slot: &Slot<'_>, base: impl Fn(&Buffer) -> *mut u8) -> CpuSlot {
    CpuSlot {
        // SAFETY: a tensor's offset lies inside its buffer.
        pointer: unsafe { base(slot.buffer).add(slot.offset) },
        bytes: slot.bytes,
        access: slot.access,
        taken: Cell::new(false),
    }
}

/// The one dtype that kernels compute in today.
pub(crate) fn require_f32(op: &'static str, name: &str, t: &Tensor) -> Result<()> {
    if t.dtype() == DType::F32 {
        return Ok(());
    }
    Err(Error::shape(op, format!("{name} must be f32, but it is {}", t.dtype().suffix())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_stay_inside_webgpu_limits() {
        for n in [1usize, 255, 256, 257, 65_535 * 256, 65_535 * 256 + 1, 1 << 31] {
            let [x, y, z] = Plan::items(n, 256).grid;
            assert!(x <= MAX_GROUPS && y <= MAX_GROUPS && z == 1);
            assert!(u64::from(x) * u64::from(y) * 256 >= n as u64);
        }
    }
}
