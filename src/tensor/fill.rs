//! Tensors of equal elements, made on the device: nothing is uploaded, so a step may make them too.

use super::Tensor;
use crate::cpu;
use crate::error::Result;
use crate::kernel::{Access, Cuda, CudaPlan, Kernel, Plan, Stored, cuda_text, params};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct FillParams {
    pub(crate) len: u32,
    pub(crate) value: f32,
}

/// y = value, elementwise.
static FILL: Kernel = Kernel {
    name: "fill_fwd_f32",
    bindings: &[("y", Access::Write, Stored)],
    cpu: cpu::fill::fill,
    wgsl: include_str!("../../shaders/fill.wgsl"),
    cuda: Some(Cuda {
        text: cuda_text!("fill"),
        plan: |bytes, _| CudaPlan::items(params::<FillParams>(bytes).len as usize, 4, 256),
        half: Some(|bytes, _| CudaPlan::items(params::<FillParams>(bytes).len as usize, 8, 256)),
    }),
    plan: |bytes, _| Plan::items(params::<FillParams>(bytes).len as usize, 256),
};

/// Overwrites a tensor of numbers.
pub(super) fn fill(y: &Tensor, value: f32) -> Result<()> {
    FILL.launch(&FillParams { len: y.numel() as u32, value }, &[y])
}

#[cfg(test)]
mod tests {
    use crate::backend::{Device, device_reports};
    use crate::tensor::Tensor;

    #[test]
    fn every_device_fills_every_element() {
        for report in device_reports().iter().filter(|r| r.caps.is_some()) {
            let device = Device::new(&report.name).unwrap();
            for len in [1, 3, 4, 257, 4099] {
                let y = Tensor::full(&device, &[len], -2.5).unwrap().to_f32().unwrap();
                assert!(y.len() == len && y.iter().all(|v| *v == -2.5), "{} {len}", report.name);
            }
        }
    }
}
