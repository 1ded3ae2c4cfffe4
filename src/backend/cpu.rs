//! The CPU as a device: pooled, aligned host memory; kernels run at once, on rayon's threads.

use super::pool::{Pool, size_class};
use super::{Backend, Buffer, Caps, KernelTime, Slot};
use crate::error::{Error, Result};
use crate::kernel::{Access, CpuArgs, CpuSlot, Kernel, host_slot, host_slot_of};
use crate::tensor::{DType, narrow, widen};
use rayon::prelude::*;
use std::alloc::Layout;
use std::any::Any;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A cache line, and what AVX-512 would want.
const ALIGNMENT: usize = 64;

pub(crate) struct CpuBackend {
    caps: Caps,
    pool: Arc<Pool<Memory>>,
    profiling: AtomicBool,
    profile: Mutex<Vec<KernelTime>>,
}

/// Bytes from which a copy is shared among the threads: one alone does not reach the memory's speed.
const LARGE: usize = 1 << 20;

/// Aligned host memory.
struct Memory {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is owned; who may touch it when is the launch's business (calls on a device happen in order).
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(bytes: usize) -> Option<Self> {
        let layout = Layout::from_size_align(bytes, ALIGNMENT).ok()?;
        // SAFETY: size classes are never zero. Zeroed, so that no kernel can read uninitialised memory.
        let pointer = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        Some(Self { pointer, layout })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { std::alloc::dealloc(self.pointer.as_ptr(), self.layout) }
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
            self.pool.give(memory.layout.size(), memory);
        }
    }
}

fn base(buffer: &Buffer) -> *mut u8 {
    match &buffer.block::<Block>().memory {
        Some(memory) => memory.pointer.as_ptr(),
        None => unreachable!("memory leaves its block only on drop"),
    }
}

impl CpuBackend {
    pub(crate) fn new() -> Self {
        let caps = Caps {
            name: "cpu".into(),
            adapter: format!(
                "{} threads, {}",
                rayon::current_num_threads(),
                crate::cpu::simd::description()
            ),
            software: false,
            workgroup_memory: 0,
            max_invocations: 1,
            subgroup: None,
            tiles: false,
            f16: false,
            half: &[DType::F16, DType::BF16],
            max_binding: u64::MAX,
            timestamps: true,
        };
        Self {
            caps,
            pool: Arc::new(Pool::new()),
            profiling: AtomicBool::new(false),
            profile: Mutex::new(Vec::new()),
        }
    }
}

impl Backend for CpuBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Any + Send + Sync>> {
        let class = size_class(bytes);
        let memory = self.pool.take(class).or_else(|| Memory::new(class)).or_else(|| {
            self.pool.trim();
            Memory::new(class)
        });
        match memory {
            Some(memory) => Ok(Box::new(Block { memory: Some(memory), pool: self.pool.clone() })),
            None => Err(Error::device(
                "cpu",
                format!("out of memory: {class} bytes; use a smaller batch or image"),
            )),
        }
    }

    fn write(&self, dst: &Buffer, offset: usize, data: &[u8]) -> Result<()> {
        // SAFETY: tensors stay inside their buffers, and launches on this device are over (they run at once).
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), base(dst).add(offset), data.len()) };
        Ok(())
    }

    fn read(&self, src: &Buffer, offset: usize, out: &mut [u8]) -> Result<()> {
        // SAFETY: as in `write`.
        unsafe {
            std::ptr::copy_nonoverlapping(base(src).add(offset), out.as_mut_ptr(), out.len())
        };
        Ok(())
    }

    fn copy(&self, src: &Buffer, from: usize, dst: &Buffer, to: usize, bytes: usize) -> Result<()> {
        if std::ptr::eq(src, dst) || bytes < LARGE {
            // SAFETY: as in `write`; `copy` allows the ranges to overlap.
            unsafe { std::ptr::copy(base(src).add(from), base(dst).add(to), bytes) };
            return Ok(());
        }
        // SAFETY: as in `write`; the buffers are two, so the ranges do not overlap.
        let (src, dst) = unsafe {
            (
                std::slice::from_raw_parts(base(src).add(from), bytes),
                std::slice::from_raw_parts_mut(base(dst).add(to), bytes),
            )
        };
        let parts = dst.par_chunks_mut(LARGE / 4).zip(src.par_chunks(LARGE / 4));
        parts.for_each(|(dst, src)| dst.copy_from_slice(src));
        Ok(())
    }

    fn launch(&self, kernel: &'static Kernel, params: &[u8], slots: &[Slot<'_>]) -> Result<()> {
        let mut wide = Widened::new(slots);
        let slots = wide.host_slots(slots);
        // SAFETY: buffers are 64-byte aligned, zeroed when made and alive through the slots' borrow; `Kernel::launch` has
        // refused written slots that overlap others.
        let args = unsafe { CpuArgs::new(params, &slots) };
        let start = Instant::now();
        (kernel.cpu)(&args);
        wide.round();
        if self.profiling.load(Ordering::Relaxed) {
            let time = KernelTime { entry: kernel.name, seconds: start.elapsed().as_secs_f64() };
            self.profile.lock().unwrap_or_else(PoisonError::into_inner).push(time);
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn set_profiling(&self, on: bool) -> Result<()> {
        self.profiling.store(on, Ordering::Relaxed);
        Ok(())
    }

    fn take_profile(&self) -> Result<Vec<KernelTime>> {
        Ok(std::mem::take(&mut self.profile.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// Bindings in half precision, widened for a kernel that computes in f32.
struct Widened {
    /// By binding; empty where it is not in half precision.
    numbers: Vec<Vec<f32>>,
    /// Where the numbers of each written one go.
    back: Vec<Option<(*mut u8, DType)>>,
}

impl Widened {
    fn new(slots: &[Slot<'_>]) -> Self {
        let (mut numbers, mut back) = (Vec::new(), Vec::new());
        for slot in slots {
            // SAFETY: a tensor's offset lies inside its buffer.
            let place = unsafe { base(slot.buffer).add(slot.offset) };
            let half = slot.dtype.is_half();
            // SAFETY: as for `CpuArgs::new`; nothing is changed while the slice lives.
            let bits = unsafe { std::slice::from_raw_parts(place.cast::<u16>(), slot.bytes / 2) };
            numbers.push(if half { widen(slot.dtype, bits) } else { Vec::new() });
            back.push((half && slot.access != Access::Read).then_some((place, slot.dtype)));
        }
        Self { numbers, back }
    }

    /// What the kernel is given: the widened numbers, or the tensors themselves.
    fn host_slots(&mut self, slots: &[Slot<'_>]) -> Vec<CpuSlot> {
        let given = slots.iter().zip(&mut self.numbers);
        given
            .map(|(slot, wide)| match slot.dtype.is_half() {
                true => host_slot_of(wide, slot.access),
                false => host_slot(slot, base),
            })
            .collect()
    }

    /// Rounds what was written and puts it in place.
    fn round(&self) {
        for (numbers, back) in self.numbers.iter().zip(&self.back) {
            let Some((place, dtype)) = back else { continue };
            // SAFETY: the tensor has as many elements, and `Kernel::launch` has refused written slots that overlap others.
            let bits =
                unsafe { std::slice::from_raw_parts_mut(place.cast::<u16>(), numbers.len()) };
            narrow(*dtype, numbers, bits);
        }
    }
}
