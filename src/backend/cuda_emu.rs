//! The emulated CUDA device: the texts of `kernels/*.cu`, compiled for the host by `build.rs`, run block by block with fibres
//! for threads (`kernels/emu/`). For tests on machines without an NVIDIA GPU; never fast.
//!
//! Every launch runs under several thread schedules, whose results must agree to the bit, on copies of its bindings that lie
//! between pages nobody may touch. What a kernel does wrong comes back as an error that names kernel, block and thread.

use super::cuda_launch::Launch;
use super::{Backend, Buffer, Caps, KernelTime, Slot};
use crate::error::{Error, Result};
use crate::kernel::{Access, Kernel};
use crate::tensor::DType;
use std::any::Any;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Schedules of a launch: forward, reverse, and two shuffles by their seeds.
const SCHEDULES: [u64; 4] = [0, 1, 2, 3];
/// Chooses other schedules: `forward`, `reverse`, `all`, or the seed of a shuffle (2 or more).
const SCHEDULE_VARIABLE: &str = "ATTN2D_EMU_SCHEDULE";

pub(crate) struct EmulatedBackend {
    caps: Caps,
    schedules: Vec<u64>,
    /// Times of the launches, while somebody wants them.
    profile: Mutex<Option<Vec<KernelTime>>>,
}

/// Host memory that stands for device memory.
struct Block(Mutex<Vec<u8>>);

fn memory(buffer: &Buffer) -> MutexGuard<'_, Vec<u8>> {
    // A panic elsewhere cannot leave bytes half-changed in a way that matters.
    buffer.block::<Block>().0.lock().unwrap_or_else(PoisonError::into_inner)
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
            f16: true,
            half: true,
            max_binding: u64::MAX,
            timestamps: true,
        };
        Ok(Self { caps, schedules, profile: Mutex::new(None) })
    }

    fn profile(&self) -> MutexGuard<'_, Option<Vec<KernelTime>>> {
        self.profile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a planned launch on copies of its bindings; those it writes come back changed.
    fn run(
        &self,
        launch: &Launch,
        names: &[&str],
        params: &[u8],
        data: &mut [(Vec<u8>, Access, DType)],
    ) -> Result<()> {
        let fail =
            |what: &str| Error::device(&self.caps.name, format!("kernel {}: {what}", launch.entry));
        let text = |s: &str| CString::new(s).map_err(|_| fail("its name holds a zero byte"));
        let names = names.iter().map(|n| text(n)).collect::<Result<Vec<_>>>()?;
        let kernel = text(launch.entry)?;
        let mut slots: Vec<EmuSlot> = data
            .iter_mut()
            .zip(&names)
            .map(|((bytes, access, dtype), name)| EmuSlot {
                name: name.as_ptr(),
                data: bytes.as_mut_ptr(),
                bytes: bytes.len(),
                element: dtype.bytes() as u32,
                access: match access {
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
        if failed == 0 {
            return Ok(());
        }
        let end = message.iter().position(|b| *b == 0).unwrap_or(message.len());
        Err(fail(&String::from_utf8_lossy(&message[..end])))
    }
}

impl Backend for EmulatedBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(Block(Mutex::new(vec![0; bytes]))))
    }

    fn write(&self, dst: &Buffer, offset: usize, data: &[u8]) -> Result<()> {
        memory(dst)[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn read(&self, src: &Buffer, offset: usize, out: &mut [u8]) -> Result<()> {
        out.copy_from_slice(&memory(src)[offset..offset + out.len()]);
        Ok(())
    }

    fn copy(&self, src: &Buffer, from: usize, dst: &Buffer, to: usize, bytes: usize) -> Result<()> {
        // By way of a copy: source and destination may be one buffer.
        let data = memory(src)[from..from + bytes].to_vec();
        self.write(dst, to, &data)
    }

    fn launch(&self, kernel: &'static Kernel, params: &[u8], slots: &[Slot<'_>]) -> Result<()> {
        let launch = Launch::new(kernel, slots, params, &self.caps)?;
        let names: Vec<&str> = kernel.bindings.iter().map(|(name, _, _)| *name).collect();
        let mut data: Vec<(Vec<u8>, Access, DType)> = slots
            .iter()
            .map(|s| (memory(s.buffer)[s.offset..s.offset + s.bytes].to_vec(), s.access, s.dtype))
            .collect();
        let start = Instant::now();
        self.run(&launch, &names, params, &mut data)?;
        if let Some(profile) = &mut *self.profile() {
            profile
                .push(KernelTime { entry: launch.entry, seconds: start.elapsed().as_secs_f64() });
        }
        for (slot, (bytes, access, _)) in slots.iter().zip(&data) {
            if *access != Access::Read {
                self.write(slot.buffer, slot.offset, bytes)?;
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn set_profiling(&self, on: bool) -> Result<()> {
        *self.profile() = on.then(Vec::new);
        Ok(())
    }

    fn take_profile(&self) -> Result<Vec<KernelTime>> {
        Ok(self.profile().as_mut().map(std::mem::take).unwrap_or_default())
    }

    fn watches_bounds(&self) -> bool {
        true
    }
}

#[cfg(test)]
#[path = "cuda_emu_tests.rs"]
mod tests;
