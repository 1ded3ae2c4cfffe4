//! Every tile of the CUDA products, whatever the plan would choose: problems large enough for it to choose the large ones are
//! too slow for the emulated device.

use super::cuda::{Tile, tile_grid};
use super::*;
use crate::Device;
use crate::kernel::{Cuda, CudaPlan, cuda_text};
use crate::tensor::DType;
use crate::tensor::philox::Philox;

type PlanOf = fn(&[u8], &Caps) -> CudaPlan;

/// The kernel with another entry point and tile.
fn forced(kernel: &'static Kernel, plan: PlanOf) -> &'static Kernel {
    Box::leak(Box::new(Kernel {
        name: kernel.name,
        bindings: kernel.bindings,
        cpu: kernel.cpu,
        wgsl: kernel.wgsl,
        cuda: Some(Cuda { text: cuda_text!("conv2d"), half: None, plan }),
        plan: kernel.plan,
    }))
}

fn grid(rows: u32, columns: u32, copies: u32, tile: Tile, entry: &'static str) -> CudaPlan {
    let blocks = [rows.div_ceil(tile.0), columns.div_ceil(tile.1), copies];
    CudaPlan::grid(blocks, 256).entry(entry)
}

fn forward_text(plan: CudaPlan) -> CudaPlan {
    plan.text(cuda_text!("conv2d_mma"))
}

fn backward_text(plan: CudaPlan) -> CudaPlan {
    plan.text(cuda_text!("conv2d_bwd_mma"))
}

/// The plans of forward, input and weight gradient in f32 with tiles of `$tile`.
macro_rules! plans {
    ($tile:literal, $fwd:literal, $dgrad:literal, $wgrad:literal) => {
        [
            |bytes, _| {
                let p: Conv2dParams = params(bytes);
                grid(p.n * p.p * p.q, p.o, 1, ($tile, $tile), $fwd)
            },
            |bytes, _| {
                let p: Conv2dParams = params(bytes);
                grid(phase_pixels(&p), p.c, p.stride_h * p.stride_w, ($tile, $tile), $dgrad)
            },
            |bytes, _| {
                let p: Conv2dParams = params(bytes);
                grid(p.o, p.kh * p.kw * p.c, p.parts, ($tile, $tile), $wgrad)
            },
        ]
    };
}

/// The same on tensor cores.
macro_rules! half_plans {
    ($tile:expr, $fwd:literal, $dgrad:literal, $wgrad:literal) => {
        [
            |bytes, _| {
                let p: Conv2dParams = params(bytes);
                forward_text(tile_grid(p.n * p.p * p.q, p.o, 1, $tile)).entry($fwd)
            },
            |bytes, _| {
                let p: Conv2dParams = params(bytes);
                let phases = p.stride_h * p.stride_w;
                backward_text(tile_grid(phase_pixels(&p), p.c, phases, $tile)).entry($dgrad)
            },
            |bytes, _| {
                let p: Conv2dParams = params(bytes);
                backward_text(tile_grid(p.kh * p.kw * p.c, p.o, p.parts, $tile)).entry($wgrad)
            },
        ]
    };
}

/// y, dx and dw (in `parts`) by three kernels on one device.
fn run(
    kernels: [&'static Kernel; 3],
    p: Conv2dParams,
    device: &Device,
    stored: DType,
) -> [Vec<f32>; 3] {
    let size = |v: [u32; 4]| v.map(|n| n as usize);
    let x_shape = size([p.n, p.h, p.w, p.c]);
    let (w_shape, y_shape) = (size([p.o, p.kh, p.kw, p.c]), size([p.n, p.p, p.q, p.o]));
    let random = |shape: &[usize], op| {
        let t = Tensor::randn(device, shape, Philox { seed: 11, step: 0, op }).unwrap();
        crate::ops::cast(&t, stored).unwrap()
    };
    let (x, w, dy) = (random(&x_shape, 0), random(&w_shape, 1), random(&y_shape, 2));
    let bias = Tensor::empty(device, &[p.o as usize]).unwrap();
    let (y, dx) = (dy.empty_like().unwrap(), x.empty_like().unwrap());
    let dw = Tensor::empty(device, &[p.parts as usize, w.numel()]).unwrap();
    kernels[0].launch(&p, &[&x, &w, &bias, &y]).unwrap();
    kernels[1].launch(&p, &[&dy, &w, &dx]).unwrap();
    kernels[2].launch(&p, &[&x, &dy, &dw]).unwrap();
    [y, dx, dw].map(|t| t.to_f32().unwrap())
}

/// Each set of plans against the CPU (whose sums have one part); `tolerance` of y, dx and dw as a share of their largest number.
fn compare(sets: &[[PlanOf; 3]], p: Conv2dParams, stored: DType, tolerance: [f32; 3]) {
    let (cpu, cuda) = (Device::cpu(), Device::new("cuda-emu").unwrap());
    let sound = [&CONV2D_FWD, &CONV2D_DGRAD, &CONV2D_WGRAD];
    let want = run(sound, Conv2dParams { parts: 1, ..p }, &cpu, stored);
    for plans in sets {
        let mut got = run([0, 1, 2].map(|i| forced(sound[i], plans[i])), p, &cuda, stored);
        let weights = want[2].len();
        got[2] = (0..weights).map(|i| got[2].iter().skip(i).step_by(weights).sum()).collect();
        for (i, (a, b)) in want.iter().zip(&got).enumerate() {
            let largest = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let gap = a.iter().zip(b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            let entry = plans[i](bytemuck::bytes_of(&p), cuda.caps()).entry;
            assert!(
                gap <= tolerance[i] * largest,
                "{entry} {stored:?} {p:?}: off by {gap} of {largest}"
            );
        }
    }
}

#[test]
fn both_tile_sizes_agree_with_the_cpu() {
    let small: [PlanOf; 3] =
        plans!(64, "conv2d_fwd_vec4_f32", "conv2d_dgrad_vec4_f32", "conv2d_wgrad_vec4_f32");
    let large: [PlanOf; 3] = plans!(
        128,
        "conv2d_fwd_vec4_large_f32",
        "conv2d_dgrad_vec4_large_f32",
        "conv2d_wgrad_vec4_large_f32"
    );
    for (stride, y) in [(1, [14, 13]), (2, [7, 7])] {
        // More than a large tile along every side.
        let counts = ([1, 14, 13, 132], [140, 3, 3], y);
        let p = Conv2dParams::from_counts(counts.0, counts.1, counts.2, (stride, stride), (1, 1));
        compare(&[small, large], p, DType::F32, [1e-5; 3]);
    }
}

const ANY: [PlanOf; 3] =
    half_plans!((64, 64), "conv2d_fwd_f32", "conv2d_dgrad_f32", "conv2d_wgrad_f32");
const SMALL: [PlanOf; 3] =
    half_plans!((64, 64), "conv2d_fwd_vec8_f32", "conv2d_dgrad_vec8_f32", "conv2d_wgrad_vec8_f32");
const TALL: [PlanOf; 3] = half_plans!(
    (128, 64),
    "conv2d_fwd_vec8_tall_f32",
    "conv2d_dgrad_vec8_tall_f32",
    "conv2d_wgrad_vec8_tall_f32"
);
const LARGE: [PlanOf; 3] = half_plans!(
    (128, 128),
    "conv2d_fwd_vec8_large_f32",
    "conv2d_dgrad_vec8_large_f32",
    "conv2d_wgrad_vec8_large_f32"
);

/// y and dx may be rounded to the other neighbour; the sums differ in their order alone.
const HALF_TOLERANCE: [f32; 3] = [1.0 / 512.0, 1.0 / 512.0, 1e-5];

#[test]
fn every_tile_of_the_tensor_cores_agrees_with_the_cpu() {
    for (stride, y) in [((1, 1), [14, 13]), ((2, 2), [7, 7])] {
        // More than a large tile along every side, channels that end inside one, pixels in parts that end inside a step.
        let p = Conv2dParams::from_counts([1, 14, 13, 72], [136, 3, 3], y, stride, (1, 1));
        let p = Conv2dParams { parts: 2, ..p };
        compare(&[ANY, SMALL, TALL, LARGE], p, DType::F16, HALF_TOLERANCE);
    }
    // Channels innermost that are no multiple of 8, on either side.
    for (c, o) in [(3, 24), (16, 5), (9, 7)] {
        let p = Conv2dParams::from_counts([2, 9, 8, c], [o, 3, 5], [5, 8], (2, 1), (1, 2));
        compare(&[ANY], p, DType::F16, HALF_TOLERANCE);
        compare(&[ANY], p, DType::BF16, [1.0 / 64.0, 1.0 / 64.0, 1e-5]);
    }
}
