//! Kernels of convolutions whose channels stand in groups, any number of channels and outputs a group; [`super::conv2d`] has the public
//! function. One launch does all groups.

use super::conv2d::Conv2dParams;
use crate::cpu::grouped as cpu;
use crate::kernel::{
    Access, Cuda, CudaPlan, F32, Kernel, MAX_GROUPS, Plan, Stored, cuda_text, params,
};

const WGSL: &str = concat!(
    include_str!("../../shaders/conv2d_params.wgsl"),
    include_str!("../../shaders/grouped.wgsl")
);

/// Forward, input gradient and weight gradient: in place of the dense ones.
pub(super) const KERNELS: [&Kernel; 3] = [&FWD, &DGRAD, &WGRAD];

static FWD: Kernel = Kernel {
    name: "grouped_fwd_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("w", Access::Read, Stored),
        ("bias", Access::Read, F32),
        ("y", Access::Write, Stored),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: cuda(|bytes, _| CudaPlan::items(y_len(&params(bytes)), 1, 256)),
    plan: |bytes, _| Plan::items(y_len(&params(bytes)), 256),
};

static DGRAD: Kernel = Kernel {
    name: "grouped_dgrad_f32",
    bindings: &[
        ("dy", Access::Read, Stored),
        ("w", Access::Read, Stored),
        ("dx", Access::Write, Stored),
    ],
    cpu: cpu::dgrad,
    wgsl: WGSL,
    cuda: cuda(|bytes, _| CudaPlan::items(x_len(&params(bytes)), 1, 256)),
    plan: |bytes, _| Plan::items(x_len(&params(bytes)), 256),
};

/// Its output has `parts` copies of the weight, which are added up by another launch.
static WGRAD: Kernel = Kernel {
    name: "grouped_wgrad_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("dy", Access::Read, Stored),
        ("dw", Access::Write, F32),
    ],
    cpu: cpu::wgrad,
    wgsl: WGSL,
    cuda: cuda(|bytes, _| CudaPlan::items(sums_len(&params(bytes)), 1, 256)),
    plan: |bytes, _| Plan::items(sums_len(&params(bytes)), 256),
};

const fn cuda(plan: fn(&[u8], &crate::Caps) -> CudaPlan) -> Option<Cuda> {
    Some(Cuda { text: cuda_text!("grouped"), half: None, plan })
}

fn x_len(p: &Conv2dParams) -> usize {
    [p.n, p.h, p.w, p.c].iter().map(|&v| v as usize).product()
}

fn y_len(p: &Conv2dParams) -> usize {
    [p.n, p.p, p.q, p.o].iter().map(|&v| v as usize).product()
}

fn sums_len(p: &Conv2dParams) -> usize {
    p.parts as usize * p.weights() as usize
}

/// Into how many parts a GPU cuts the pixels of a weight gradient: enough threads to fill a large one, no part so long that its sum
/// loses precision or so short that the parts are more work than the products.
pub(super) fn weight_parts(p: &Conv2dParams) -> u32 {
    const THREADS: u32 = 1 << 17;
    const LONGEST: u32 = 4096;
    const SHORTEST: u32 = 64;
    let pixels = p.n * p.p * p.q;
    (THREADS / p.weights())
        .max(pixels.div_ceil(LONGEST))
        .clamp(1, pixels.div_ceil(SHORTEST).min(MAX_GROUPS))
}
