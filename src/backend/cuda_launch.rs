//! What every device that runs the CUDA kernels does with a launch before it hands it over: one code for the hardware and
//! for the emulated device, so that a wrong grid or plan is found where there is no GPU.

use super::{Caps, Slot};
use crate::error::{Error, Result};
use crate::kernel::{CudaPlan, CudaText, Element, Kernel, entry_for};
use crate::tensor::DType;

/// A planned launch.
#[derive(Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) text: CudaText,
    /// For which type of storage the text is compiled.
    pub(crate) stored: DType,
    pub(crate) entry: &'static str,
    pub(crate) plan: CudaPlan,
}

const MAX_GRID_X: u32 = i32::MAX as u32;
const MAX_GRID_YZ: u32 = 65_535;

impl PartialEq for Launch {
    /// An entry point has one text.
    fn eq(&self, other: &Self) -> bool {
        self.entry == other.entry && self.plan == other.plan
    }
}

impl Launch {
    /// Plans a launch and checks the plan against what the device can do.
    pub(crate) fn new(
        kernel: &'static Kernel,
        slots: &[Slot<'_>],
        params: &[u8],
        caps: &Caps,
    ) -> Result<Self> {
        let Some(cuda) = &kernel.cuda else {
            let message = format!("{} is unsupported: it has no CUDA kernel", kernel.name);
            return Err(Error::device(&caps.name, message));
        };
        let mut types = slots.iter().zip(kernel.bindings);
        let stored = types.find(|(_, b)| b.2 == Element::Stored).map(|(slot, _)| slot.dtype);
        let stored = stored.unwrap_or(DType::F32);
        let plan = match (stored, cuda.half) {
            (DType::F16 | DType::BF16, Some(plan)) => plan(params, caps),
            _ => (cuda.plan)(params, caps),
        };
        let text = plan.text.unwrap_or(cuda.text);
        let entry = entry_for(kernel.entry_of(plan.entry), stored);
        let refuse =
            |what: String| Err(Error::device(&caps.name, format!("kernel {entry}: {what}")));
        if plan == CudaPlan::REFUSED {
            let file = text.name;
            return refuse(format!(
                "the problem is beyond its limits, which kernels/{file}.cu states"
            ));
        }
        if plan.block == 0 || plan.block > caps.max_invocations {
            let most = caps.max_invocations;
            return refuse(format!(
                "a block of {} threads, the device allows 1 to {most}",
                plan.block
            ));
        }
        if plan.shared > caps.workgroup_memory {
            return refuse(format!(
                "{} bytes of shared memory a block, the device has {}",
                plan.shared, caps.workgroup_memory
            ));
        }
        let [x, y, z] = plan.grid;
        if [x, y, z].contains(&0) || x > MAX_GRID_X || y > MAX_GRID_YZ || z > MAX_GRID_YZ {
            return refuse(format!(
                "a grid of {:?} blocks, allowed are 1 to {MAX_GRID_X} along x and {MAX_GRID_YZ} along y and z",
                plan.grid
            ));
        }
        Ok(Self { text, stored, entry, plan })
    }
}
