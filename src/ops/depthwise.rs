//! Kernels of depthwise convolutions, where every channel has a kernel of its own; [`super::conv2d`] has the public function.

use super::conv2d::Conv2dParams;
use crate::Caps;
use crate::cpu::depthwise as cpu;
use crate::kernel::{
    Access, Cuda, CudaPlan, F32, Kernel, MAX_GROUPS, Plan, Stored, cuda_text, params,
};

const WGSL: &str = concat!(
    include_str!("../../shaders/conv2d_params.wgsl"),
    include_str!("../../shaders/depthwise.wgsl")
);

/// Forward, input gradient and weight gradient: in place of the dense ones.
pub(super) const KERNELS: [&Kernel; 3] = [&FWD, &DGRAD, &WGRAD];

static FWD: Kernel = Kernel {
    name: "depthwise_fwd_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("w", Access::Read, Stored),
        ("bias", Access::Read, F32),
        ("y", Access::Write, Stored),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("depthwise"),
        half: Some(|bytes, _| fwd_plan(&params(bytes), 8)),
        plan: |bytes, _| fwd_plan(&params(bytes), 4),
    }),
    plan: |bytes, _: &Caps| {
        let p: Conv2dParams = params(bytes);
        if p.c.is_multiple_of(4) {
            let packs = [p.n, p.p, p.q.div_ceil(WGSL_TILE), p.c / 4];
            Plan::items(product(&packs), 64).entry("depthwise_fwd_vec4_f32")
        } else {
            Plan::items(product(&[p.n, p.p, p.q, p.c]), 64)
        }
    },
};

static DGRAD: Kernel = Kernel {
    name: "depthwise_dgrad_f32",
    bindings: &[
        ("dy", Access::Read, Stored),
        ("w", Access::Read, Stored),
        ("dx", Access::Write, Stored),
    ],
    cpu: cpu::dgrad,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("depthwise"),
        half: Some(|bytes, _| dgrad_plan(&params(bytes), 8)),
        plan: |bytes, _| dgrad_plan(&params(bytes), 4),
    }),
    plan: |bytes, _: &Caps| {
        let p: Conv2dParams = params(bytes);
        if p.c.is_multiple_of(4) {
            // A tile has pixels a stride apart.
            let tiles = p.stride_w * p.w.div_ceil(p.stride_w * WGSL_TILE);
            Plan::items(product(&[p.n, p.h, tiles, p.c / 4]), 64).entry("depthwise_dgrad_vec4_f32")
        } else {
            Plan::items(product(&[p.n, p.h, p.w, p.c]), 64)
        }
    },
};

/// Its output has `parts` copies of the weight, which are added up by another launch.
static WGRAD: Kernel = Kernel {
    name: "depthwise_wgrad_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("dy", Access::Read, Stored),
        ("dw", Access::Write, F32),
    ],
    cpu: cpu::wgrad,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("depthwise"),
        half: Some(|bytes, _| wgrad_plan(&params(bytes), 8)),
        plan: |bytes, _| wgrad_plan(&params(bytes), 4),
    }),
    plan: |bytes, _: &Caps| {
        let p: Conv2dParams = params(bytes);
        if p.c.is_multiple_of(4) {
            let owners = [p.parts, p.kh, p.kw.div_ceil(WGSL_TAPS), p.c / 4];
            Plan::items(product(&owners), 64).entry("depthwise_wgrad_vec4_f32")
        } else {
            Plan::items(product(&[p.parts, p.weights()]), 64)
        }
    },
};

/// Outputs, and taps of a weight gradient, that an invocation has in the shader.
const WGSL_TILE: u32 = 8;
const WGSL_TAPS: u32 = 5;

/// As in kernels/depthwise.cu: outputs of a tile, threads of a block, lanes along the channels at most (for weight gradients).
const TILE: u32 = 4;
const THREADS: u32 = 256;
const LANES: u32 = 32;
const WEIGHT_LANES: u32 = 16;

fn product(counts: &[u32]) -> usize {
    counts.iter().map(|&v| v as usize).product()
}

/// The kernels with a size in their name: which of 3x3, 3x3 at step 2, 5x5 and 5x5 at step 2 it is.
fn sized(p: &Conv2dParams) -> Option<usize> {
    match (p.kh, p.kw, p.stride_h, p.stride_w) {
        (3, 3, 1, 1) => Some(0),
        (3, 3, 2, 2) => Some(1),
        (5, 5, 1, 1) => Some(2),
        (5, 5, 2, 2) => Some(3),
        _ => None,
    }
}

/// How the threads of a block stand: chunks of channels, and lanes of one. `wide` is the most numbers of an access, but 4 under 5x5.
fn lanes(p: &Conv2dParams, wide: u32, most: u32) -> (u32, u32) {
    let (channels, wide) = (p.c, if p.kh == 5 { 4 } else { wide });
    let numbers = [wide, 4].into_iter().find(|n| channels.is_multiple_of(*n)).unwrap_or(1);
    let packs = channels / numbers;
    let chunks = packs.div_ceil(most);
    (chunks, packs.div_ceil(chunks))
}

/// Blocks for `tiles` tiles of each channel: enough to fill a large GPU several times over, and then few enough that a block uses its
/// taps for many tiles.
fn tile_plan(p: &Conv2dParams, wide: u32, tiles: usize) -> CudaPlan {
    const BLOCKS: u32 = 4096;
    let (chunks, lanes) = lanes(p, wide, LANES);
    let rows = (THREADS / lanes) as usize;
    let blocks = tiles.div_ceil(rows).clamp(1, BLOCKS.div_ceil(chunks) as usize);
    CudaPlan::grid([chunks, blocks as u32, 1], THREADS)
}

fn fwd_plan(p: &Conv2dParams, wide: u32) -> CudaPlan {
    let tiles = product(&[p.n, p.p, p.q.div_ceil(TILE)]);
    let plan = tile_plan(p, wide, tiles);
    match sized(p) {
        Some(0) => plan.entry("depthwise_fwd_k3_f32"),
        Some(1) => plan.entry("depthwise_fwd_k3_s2_f32"),
        Some(2) => plan.entry("depthwise_fwd_k5_f32"),
        Some(_) => plan.entry("depthwise_fwd_k5_s2_f32"),
        None => CudaPlan::items(product(&[p.n, p.p, p.q, p.c]), wide, THREADS),
    }
}

fn dgrad_plan(p: &Conv2dParams, wide: u32) -> CudaPlan {
    // At step 2 a tile begins where column + pad is even.
    let before = if p.stride_w == 2 { p.pad_w % 2 } else { 0 };
    let tiles = product(&[p.n, p.h, (p.w + before).div_ceil(TILE)]);
    let plan = tile_plan(p, wide, tiles);
    match sized(p) {
        Some(0) => plan.entry("depthwise_dgrad_k3_f32"),
        Some(1) => plan.entry("depthwise_dgrad_k3_s2_f32"),
        Some(2) => plan.entry("depthwise_dgrad_k5_f32"),
        Some(_) => plan.entry("depthwise_dgrad_k5_s2_f32"),
        None => CudaPlan::items(product(&[p.n, p.h, p.w, p.c]), wide, THREADS),
    }
}

fn wgrad_plan(p: &Conv2dParams, wide: u32) -> CudaPlan {
    let (chunks, _) = lanes(p, wide, WEIGHT_LANES);
    let plan = CudaPlan::grid([chunks, p.parts, 1], THREADS);
    match sized(p) {
        Some(0) => plan.entry("depthwise_wgrad_k3_f32"),
        Some(1) => plan.entry("depthwise_wgrad_k3_s2_f32"),
        Some(2) => plan.entry("depthwise_wgrad_k5_f32"),
        Some(_) => plan.entry("depthwise_wgrad_k5_s2_f32"),
        None => CudaPlan::items(product(&[p.parts, p.weights()]), 1, THREADS),
    }
}

/// Into how many parts a GPU cuts the pixels of a weight gradient, where a block has 16 packs of channels of one: enough blocks to
/// fill a large GPU, no part so short that its sums are more work than its products.
pub(super) fn weight_parts(p: &Conv2dParams) -> u32 {
    const BLOCKS: u32 = 528;
    const SHORTEST: u32 = 256;
    let (chunks, _) = lanes(p, 4, WEIGHT_LANES);
    let pixels = p.n * p.p * p.q;
    BLOCKS.div_ceil(chunks).clamp(1, pixels.div_ceil(SHORTEST).min(MAX_GROUPS))
}
