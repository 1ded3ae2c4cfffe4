//! A kernel is data: its name, what it binds, its text for each kind of device, and the plan that maps a problem to a
//! grid. Backends run kernels; they have no list of them.

use crate::backend::{Buffer, Caps, Slot};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};
use bytemuck::Pod;
use std::cell::Cell;
#[cfg(any(feature = "cuda", feature = "cuda-emu", feature = "wgpu"))]
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

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

/// How the elements of a binding are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// As the launch's: f32, f16 or bf16, the same for every such binding.
    Stored,
    /// Always f32: sums, statistics, tables and gradients of parameters.
    F32,
    /// Always u32: labels, saved indices.
    U32,
}

pub use Element::{F32, Stored, U32};

/// Name, use and elements of a binding.
pub type Binding = (&'static str, Access, Element);

/// One kernel on every kind of device.
pub struct Kernel {
    /// `<op>_<pass>[_<variant>]_f32`: the entry point in every language, the profiler's label and the bench id. With tensors in
    /// half precision the last part is `f16` or `bf16`.
    pub name: &'static str,
    /// The bindings: inputs, then saved tensors, then outputs. At most 8 (WebGPU's default limit).
    pub bindings: &'static [Binding],
    /// The CPU kernel. It computes in f32: what is stored in half precision is widened before and rounded after.
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
    /// The same for tensors in half precision, where that differs (tensor cores, more elements an access).
    pub half: Option<fn(params: &[u8], caps: &Caps) -> CudaPlan>,
}

/// A file of CUDA kernels, with its includes resolved. It is compiled once for each type of storage, see `kernels/common.cuh`.
#[derive(Clone, Copy, PartialEq, Eq)]
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

impl std::fmt::Debug for CudaText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "kernels/{}.cu", self.name)
    }
}

impl CudaText {
    /// What is compiled for tensors of a type.
    #[cfg(feature = "cuda")]
    pub(crate) fn source_for(&self, stored: DType) -> String {
        format!("#define STORED_{}\n{}", stored.suffix().to_uppercase(), self.source)
    }
}

/// What to launch on a CUDA device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaPlan {
    /// The file, where it is not [`Cuda::text`].
    pub text: Option<CudaText>,
    /// Entry point of a variant, ending in `_f32` whatever the storage; empty for the kernel's own name.
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
    pub const REFUSED: Self = Self { text: None, entry: "", grid: [0; 3], block: 0, shared: 0 };

    /// One-dimensional work: `n` items in blocks of `block` threads, `per_thread` items a thread.
    pub fn items(n: usize, per_thread: u32, block: u32) -> Self {
        let blocks = n.div_ceil(per_thread as usize * block as usize).max(1);
        Self { text: None, entry: "", grid: [blocks as u32, 1, 1], block, shared: 0 }
    }

    /// A grid of blocks.
    pub fn grid(grid: [u32; 3], block: u32) -> Self {
        Self { text: None, entry: "", grid, block, shared: 0 }
    }

    /// The same with dynamic shared memory.
    pub fn shared(self, bytes: u32) -> Self {
        Self { shared: bytes, ..self }
    }

    /// The same with another entry point.
    pub fn entry(self, entry: &'static str) -> Self {
        Self { entry, ..self }
    }

    /// The same from another file.
    pub fn text(self, text: CudaText) -> Self {
        Self { text: Some(text), ..self }
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
    /// [`Error::Shape`] where the bindings do not fit the kernel (number, device, dtype, a written tensor that is bound twice),
    /// [`Error::Device`] where the device refuses (out of memory, lost, a kernel that does not compile).
    pub fn launch<P: Pod>(&'static self, params: &P, bindings: &[&Tensor]) -> Result<()> {
        let (device, stored) = self.check(bindings)?;
        if stored.is_half() && !device.caps().half.contains(&stored) {
            let (name, stored) = (self.name, stored.suffix());
            let message = format!(
                "{name}: this device has no {stored} kernels; use f32, or the cpu, which has all types (`attn2d doctor` tells what each device has)"
            );
            return Err(Error::device(device.name(), message));
        }
        let slots: Vec<Slot<'_>> = bindings
            .iter()
            .zip(self.bindings)
            .map(|(t, (_, access, _))| Slot {
                buffer: t.buffer(),
                offset: t.offset(),
                bytes: t.numel() * t.dtype().bytes(),
                dtype: t.dtype(),
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

    /// What the `Stored` bindings are, f32 where there are none.
    fn stored(&self, bindings: &[&Tensor]) -> Result<DType> {
        let mut stored: Option<(&str, DType)> = None;
        for (t, (name, _, element)) in bindings.iter().zip(self.bindings) {
            let given = t.dtype();
            let expected = match (element, stored) {
                (Element::F32, _) => DType::F32,
                (Element::U32, _) => DType::U32,
                (Element::Stored, Some((_, first))) => first,
                (Element::Stored, None) if given == DType::U32 => DType::F32,
                (Element::Stored, None) => given,
            };
            if given != expected {
                let as_of = stored.filter(|_| *element == Element::Stored);
                let as_of = as_of.map_or_else(String::new, |(first, _)| format!(" as {first} is"));
                let message = format!(
                    "{name} must be {}{as_of}, but it is {}; attn2d::ops::cast makes it so",
                    expected.suffix(),
                    given.suffix()
                );
                return Err(Error::Shape { op: self.name, message });
            }
            if *element == Element::Stored && stored.is_none() {
                stored = Some((name, given));
            }
        }
        Ok(stored.map_or(DType::F32, |(_, dtype)| dtype))
    }

    fn check<'t>(&self, bindings: &[&'t Tensor]) -> Result<(&'t crate::Device, DType)> {
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
            let (name, access, _) = self.bindings[i];
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
        Ok((device, self.stored(bindings)?))
    }
}

/// `entry`, which ends in `_f32`, for another type of storage.
#[cfg(any(feature = "cuda", feature = "cuda-emu", feature = "wgpu"))]
pub(crate) fn entry_for(entry: &'static str, stored: DType) -> &'static str {
    static NAMES: Mutex<BTreeMap<(&str, &str), &str>> = Mutex::new(BTreeMap::new());
    if stored == DType::F32 {
        return entry;
    }
    let suffix = stored.suffix();
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    // One for each kernel and type, for as long as the program runs.
    names.entry((entry, suffix)).or_insert_with(|| {
        let base = entry.strip_suffix("f32").unwrap_or(entry);
        Box::leak(format!("{base}{suffix}").into_boxed_str())
    })
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

/// Numbers of the host's own as a binding.
pub(crate) fn host_slot_of(numbers: &mut [f32], access: Access) -> CpuSlot {
    CpuSlot {
        pointer: numbers.as_mut_ptr().cast(),
        bytes: size_of_val(numbers),
        access,
        taken: Cell::new(false),
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

/// For tensors that may be stored in half precision.
pub(crate) fn require_float(op: &'static str, name: &str, t: &Tensor) -> Result<()> {
    if t.dtype().is_float() {
        return Ok(());
    }
    Err(Error::shape(
        op,
        format!("{name} must be f32, f16 or bf16, but it is {}", t.dtype().suffix()),
    ))
}

/// For tensors that must be stored as the first one is.
pub(crate) fn require_same(
    op: &'static str,
    first: (&str, &Tensor),
    name: &str,
    t: &Tensor,
) -> Result<()> {
    let (wanted, given) = (first.1.dtype().suffix(), t.dtype().suffix());
    if wanted == given {
        return Ok(());
    }
    let message = format!(
        "{name} must be {wanted} as {} is, but it is {given}; attn2d::ops::cast makes it so",
        first.0
    );
    Err(Error::shape(op, message))
}

/// For tensors that are f32 whatever the storage of others.
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
