//! The emulated CUDA device: the texts of `kernels/*.cu`, compiled for the host by `build.rs`, run block by block with fibres
//! for threads (`kernels/emu/`). For tests on machines without an NVIDIA GPU; never fast.
//!
//! Every launch runs under several thread schedules, whose results must agree to the bit, on copies of its bindings that lie
//! between pages nobody may touch. What a kernel does wrong comes back as an error that names kernel, block and thread.

use super::cuda_launch::Launch;
use super::pool::{Pool, size_class};
use super::recorded::{Graphs, Node, Recorder, Refusal};
use super::{Backend, Buffer, Caps, GraphCounts, KernelTime, Slot};
use crate::error::{Error, Result};
use crate::kernel::{Access, Binding, Kernel};
use crate::tensor::DType;
use std::any::Any;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Schedules of a launch: forward, reverse, and two shuffles by their seeds.
const SCHEDULES: [u64; 4] = [0, 1, 2, 3];
/// Chooses other schedules: `forward`, `reverse`, `all`, or the seed of a shuffle (2 or more).
const SCHEDULE_VARIABLE: &str = "ATTN2D_EMU_SCHEDULE";

pub(crate) struct EmulatedBackend {
    caps: Caps,
    schedules: Vec<u64>,
    pool: Arc<Pool<Arc<Memory>>>,
    steps: Mutex<Recorder<Range, Vec<Node<Range>>>>,
    /// Times of the launches, while somebody wants them.
    profile: Mutex<Option<Vec<KernelTime>>>,
}

/// Host memory that stands for device memory.
struct Memory {
    class: usize,
    bytes: Mutex<Vec<u8>>,
}

impl Memory {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        // A panic elsewhere cannot leave bytes half-changed in a way that matters.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory lent from the pool: as on the hardware, what is freed inside a step is soon somebody else's.
struct Block {
    memory: Arc<Memory>,
    pool: Arc<Pool<Arc<Memory>>>,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.give(self.memory.class, self.memory.clone());
    }
}

fn memory(buffer: &Buffer) -> &Arc<Memory> {
    &buffer.block::<Block>().memory
}

/// Where a binding lies; it says as much as a pointer, and more for messages.
#[derive(Clone)]
struct Range {
    memory: Arc<Memory>,
    offset: usize,
    bytes: usize,
    dtype: DType,
    access: Access,
    name: &'static str,
}

impl PartialEq for Range {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory)
            && (self.offset, self.bytes) == (other.offset, other.bytes)
    }
}

impl Range {
    fn copied(buffer: &Buffer, offset: usize, bytes: usize, access: Access) -> Self {
        Self {
            memory: memory(buffer).clone(),
            offset,
            bytes,
            dtype: DType::U32,
            access,
            name: "copy",
        }
    }

    fn load(&self) -> Vec<u8> {
        self.memory.bytes()[self.offset..][..self.bytes].to_vec()
    }

    fn store(&self, data: &[u8]) {
        self.memory.bytes()[self.offset..][..self.bytes].copy_from_slice(data);
    }
}

/// As `emu_slot` of `kernels/emu/machine.h`.
#[repr(C)]
struct EmuSlot {
    name: *const c_char,
    data: *mut u8,
    bytes: usize,
    /// Bytes of an element.
    element: u32,
    access: u32,
}

/// As `emu_launch` there.
#[repr(C)]
struct EmuLaunch {
    kernel: *const c_char,
    grid: [u32; 3],
    block: u32,
    shared: u32,
    params: *const c_void,
    param_bytes: usize,
    slots: *mut EmuSlot,
    slot_count: usize,
    schedules: *const u64,
    schedule_count: usize,
}

unsafe extern "C" {
    fn attn2d_emu_launch(launch: *const EmuLaunch, error: *mut c_char, error_bytes: usize)
    -> c_int;
}

impl EmulatedBackend {
    /// # Errors
    /// [`Error::Usage`] where `ATTN2D_EMU_SCHEDULE` names no schedule.
    pub(crate) fn open() -> Result<Self> {
        let wanted = std::env::var(SCHEDULE_VARIABLE).unwrap_or_else(|_| "all".into());
        let schedules = match (wanted.as_str(), wanted.parse::<u64>()) {
            ("all" | "", _) => SCHEDULES.to_vec(),
            ("forward", _) => vec![0],
            ("reverse", _) => vec![1],
            (_, Ok(seed)) if seed >= 2 => vec![seed],
            _ => {
                let message = format!(
                    "{SCHEDULE_VARIABLE} is '{wanted}', expected forward, reverse, all, or the seed of a shuffle from 2 on"
                );
                return Err(Error::usage(message));
            }
        };
        let caps = Caps {
            name: "cuda-emu".into(),
            adapter: format!("CUDA kernels on the host, {} schedules a launch", schedules.len()),
            software: true,
            // The least that compute capabilities 8.0 to 9.0 have.
            workgroup_memory: 99 * 1024,
            max_invocations: 1024,
            subgroup: Some((32, 32)),
            tiles: false,
            f16: true,
            half: &[DType::F16, DType::BF16],
            max_binding: u64::MAX,
            timestamps: true,
        };
        let (pool, steps) = (Arc::new(Pool::new()), Mutex::new(Recorder::new()));
        Ok(Self { caps, schedules, pool, steps, profile: Mutex::new(None) })
    }

    fn profile(&self) -> MutexGuard<'_, Option<Vec<KernelTime>>> {
        self.profile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn steps(&self) -> MutexGuard<'_, Recorder<Range, Vec<Node<Range>>>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs what a step has kept, before anything that must come after it.
    fn flush(&self) -> Result<()> {
        self.steps().flush(&mut &*self)
    }

    /// Runs a planned launch on copies of its bindings; those it writes come back changed.
    fn emulate(&self, launch: &Launch, params: &[u8], bindings: &[Range]) -> Result<()> {
        let fail =
            |what: &str| Error::device(&self.caps.name, format!("kernel {}: {what}", launch.entry));
        let text = |s: &str| CString::new(s).map_err(|_| fail("its name holds a zero byte"));
        let names = bindings.iter().map(|b| text(b.name)).collect::<Result<Vec<_>>>()?;
        let kernel = text(launch.entry)?;
        let mut data: Vec<Vec<u8>> = bindings.iter().map(Range::load).collect();
        let mut slots: Vec<EmuSlot> = data
            .iter_mut()
            .zip(bindings)
            .zip(&names)
            .map(|((bytes, binding), name)| EmuSlot {
                name: name.as_ptr(),
                data: bytes.as_mut_ptr(),
                bytes: bytes.len(),
                element: binding.dtype.bytes() as u32,
                access: match binding.access {
                    Access::Read => 0,
                    Access::Write => 1,
                    Access::ReadWrite => 2,
                },
            })
            .collect();
        let call = EmuLaunch {
            kernel: kernel.as_ptr(),
            grid: launch.plan.grid,
            block: launch.plan.block,
            shared: launch.plan.shared,
            params: params.as_ptr().cast(),
            param_bytes: params.len(),
            slots: slots.as_mut_ptr(),
            slot_count: slots.len(),
            schedules: self.schedules.as_ptr(),
            schedule_count: self.schedules.len(),
        };
        let mut message = [0u8; 512];
        // SAFETY: every pointer is valid for its length until the call returns, and the message is ended by a zero byte.
        let failed =
            unsafe { attn2d_emu_launch(&call, message.as_mut_ptr().cast(), message.len()) };
        if failed != 0 {
            let end = message.iter().position(|b| *b == 0).unwrap_or(message.len());
            return Err(fail(&String::from_utf8_lossy(&message[..end])));
        }
        for (binding, bytes) in bindings.iter().zip(&data) {
            if binding.access != Access::Read {
                binding.store(bytes);
            }
        }
        Ok(())
    }
}

/// A graph is its own copy of the nodes, which changes by `update` alone: what is not updated runs with its old arguments.
impl Graphs<Range> for &EmulatedBackend {
    type Graph = Vec<Node<Range>>;

    fn build(&mut self, nodes: &[Node<Range>]) -> Result<Self::Graph, Refusal> {
        Ok(nodes.to_vec())
    }

    fn update(
        &mut self,
        graph: &mut Self::Graph,
        index: usize,
        node: &Node<Range>,
    ) -> Result<(), Refusal> {
        graph[index] = node.clone();
        Ok(())
    }

    fn replay(&mut self, graph: &Self::Graph) -> Result<(), Refusal> {
        graph.iter().try_for_each(|node| self.run(node)).map_err(Refusal::Work)
    }

    fn run(&mut self, node: &Node<Range>) -> Result<()> {
        match node {
            Node::Kernel { launch, params, bindings } => self.emulate(launch, params, bindings),
            Node::Copy { from, to, .. } => {
                // By way of a copy: source and destination may be one buffer.
                to.store(&from.load());
                Ok(())
            }
        }
    }
}

impl Backend for EmulatedBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Any + Send + Sync>> {
        let class = size_class(bytes);
        let fresh = || Arc::new(Memory { class, bytes: Mutex::new(vec![0; class]) });
        let memory = self.pool.take(class).unwrap_or_else(fresh);
        Ok(Box::new(Block { memory, pool: self.pool.clone() }))
    }

    fn write(&self, dst: &Buffer, offset: usize, data: &[u8]) -> Result<()> {
        self.flush()?;
        memory(dst).bytes()[offset..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn read(&self, src: &Buffer, offset: usize, out: &mut [u8]) -> Result<()> {
        self.flush()?;
        out.copy_from_slice(&memory(src).bytes()[offset..][..out.len()]);
        Ok(())
    }

    fn copy(&self, src: &Buffer, from: usize, dst: &Buffer, to: usize, bytes: usize) -> Result<()> {
        let from = Range::copied(src, from, bytes, Access::Read);
        let to = Range::copied(dst, to, bytes, Access::Write);
        self.steps().ask(Node::Copy { from, to, bytes }, &mut &*self)
    }

    fn launch(&self, kernel: &'static Kernel, params: &[u8], slots: &[Slot<'_>]) -> Result<()> {
        let launch = Launch::new(kernel, slots, params, &self.caps)?;
        let bind = |(slot, (name, _, _)): (&Slot<'_>, &Binding)| Range {
            memory: memory(slot.buffer).clone(),
            offset: slot.offset,
            bytes: slot.bytes,
            dtype: slot.dtype,
            access: slot.access,
            name,
        };
        let bindings = slots.iter().zip(kernel.bindings).map(bind).collect();
        let node = Node::Kernel { launch, params: params.to_vec(), bindings };
        let start = Instant::now();
        self.steps().ask(node, &mut &*self)?;
        if let Some(profile) = &mut *self.profile() {
            profile
                .push(KernelTime { entry: launch.entry, seconds: start.elapsed().as_secs_f64() });
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.flush()
    }

    fn set_profiling(&self, on: bool) -> Result<()> {
        // A graph has no times of its kernels: a step that has begun goes on without one.
        self.flush()?;
        self.steps().cancel();
        *self.profile() = on.then(Vec::new);
        Ok(())
    }

    fn take_profile(&self) -> Result<Vec<KernelTime>> {
        Ok(self.profile().as_mut().map(std::mem::take).unwrap_or_default())
    }

    fn begin_step(&self) -> bool {
        let begins = self.profile().is_none() && self.steps().begin();
        if begins {
            self.pool.settle(Arc::as_ptr);
        }
        begins
    }

    fn end_step(&self) -> Result<()> {
        let done = self.flush();
        self.steps().cancel();
        done
    }

    fn cancel_step(&self) {
        self.steps().cancel();
    }

    fn graph_counts(&self) -> GraphCounts {
        self.steps().counts()
    }

    fn watches_launches(&self) -> bool {
        true
    }
}

#[cfg(test)]
#[path = "cuda_emu_tests.rs"]
mod tests;
