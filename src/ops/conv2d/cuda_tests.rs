//! Every tile of the CUDA products, whatever the plan would choose: problems large enough for it to choose the large ones are
//! too slow for the emulated device.

use super::cuda::{Tile, tile_grid};
use super::ends::{CONV2D_NORM, CONV2D_STATS};
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

/// The plans of a forward with statistics and with a norm, in tiles of so many rows.
struct Ends {
    rows: u32,
    stored: DType,
    plans: [PlanOf; 2],
}

/// The plans of [`Ends`] in f32 with tiles of `$tile`.
macro_rules! ends {
    ($tile:literal, $stats:literal, $norm:literal) => {{
        fn plan(bytes: &[u8], entry: &'static str) -> CudaPlan {
            let p: Conv2dParams = params(bytes);
            grid(p.n * p.p * p.q, p.o, 1, ($tile, $tile), entry).text(cuda_text!("conv2d_ends"))
        }
        let plans: [PlanOf; 2] = [|bytes, _| plan(bytes, $stats), |bytes, _| plan(bytes, $norm)];
        Ends { rows: 64, stored: DType::F32, plans }
    }};
}

/// The same on tensor cores.
macro_rules! half_ends {
    ($tile:expr, $stats:literal, $norm:literal) => {{
        fn plan(bytes: &[u8], entry: &'static str) -> CudaPlan {
            let p: Conv2dParams = params(bytes);
            let plan = tile_grid(p.n * p.p * p.q, p.o, 1, $tile).entry(entry);
            plan.text(cuda_text!("conv2d_ends_mma"))
        }
        let plans: [PlanOf; 2] = [|bytes, _| plan(bytes, $stats), |bytes, _| plan(bytes, $norm)];
        Ends { rows: $tile.0 / 2, stored: DType::F16, plans }
    }};
}

/// The largest gap between two lists as a share of the second's largest number.
fn gap(got: &[f32], want: &[f32]) -> f32 {
    let largest = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    got.iter().zip(want).fold(0.0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

#[test]
fn every_tile_ends_in_statistics_or_a_norm() {
    let p = Conv2dParams::from_counts([1, 14, 13, 72], [136, 3, 3], [14, 13], (1, 1), (1, 1));
    let (cpu, cuda) = (Device::cpu(), Device::new("cuda-emu").unwrap());
    let random = |device: &Device, shape: &[usize], op, stored| {
        let t = Tensor::randn(device, shape, Philox { seed: 11, step: 0, op }).unwrap();
        crate::ops::cast(&t, stored).unwrap()
    };
    let norm = |kernel: &'static Kernel, device: &Device, stored| {
        let like = |shape: &[usize], op| random(device, shape, op, stored);
        let (x, w, residual) =
            (like(&[1, 14, 13, 72], 0), like(&[136, 3, 3, 72], 1), like(&[1, 14, 13, 136], 2));
        let table = random(device, &[4, 136], 3, DType::F32);
        let y = residual.empty_like().unwrap();
        let p = Conv2dParams { act: 2, residual: 1, ..p };
        kernel.launch(&p, &[&x, &w, &table, &residual, &y]).unwrap();
        y.to_f32().unwrap()
    };
    for Ends { rows, stored, plans } in [
        ends!(64, "conv2d_stats_vec4_f32", "conv2d_norm_vec4_f32"),
        ends!(128, "conv2d_stats_vec4_large_f32", "conv2d_norm_vec4_large_f32"),
        half_ends!((64, 64), "conv2d_stats_f32", "conv2d_norm_f32"),
        half_ends!((128, 64), "conv2d_stats_vec8_tall_f32", "conv2d_norm_vec8_tall_f32"),
        half_ends!((128, 128), "conv2d_stats_vec8_large_f32", "conv2d_norm_vec8_large_f32"),
    ] {
        let entry = plans.map(|plan| plan(bytemuck::bytes_of(&p), cuda.caps()).entry);
        let tolerance = if stored == DType::F32 { 1e-5 } else { 1.0 / 256.0 };
        let (got, want) =
            (norm(forced(&CONV2D_NORM, plans[1]), &cuda, stored), norm(&CONV2D_NORM, &cpu, stored));
        assert!(gap(&got, &want) < tolerance, "{} {stored:?}: {}", entry[1], gap(&got, &want));

        let (x, w) = (
            random(&cuda, &[1, 14, 13, 72], 0, stored),
            random(&cuda, &[136, 3, 3, 72], 1, stored),
        );
        let y = Tensor::uninit(&cuda, &[182, 136], stored).unwrap();
        let part = Tensor::empty(&cuda, &[182usize.div_ceil(rows as usize), 2, 136]).unwrap();
        forced(&CONV2D_STATS, plans[0]).launch(&p, &[&x, &w, &part, &y]).unwrap();
        // Of what is stored.
        let mut want = Vec::new();
        for block in y.to_f32().unwrap().chunks(rows as usize * 136) {
            let column = |c: usize| block.iter().skip(c).step_by(136).map(|v| f64::from(*v));
            let n = (block.len() / 136) as f64;
            let means: Vec<f64> = (0..136).map(|c| column(c).sum::<f64>() / n).collect();
            want.extend(means.iter().map(|m| *m as f32));
            want.extend(
                (0..136).map(|c| column(c).map(|v| (v - means[c]).powi(2)).sum::<f64>() as f32),
            );
        }
        let got = part.to_f32().unwrap();
        assert!(gap(&got, &want) < 1e-6, "{} {stored:?}: {}", entry[0], gap(&got, &want));
        // The means are small beside the squares: alone.
        let means = |v: &[f32]| v.chunks(272).flat_map(|b| b[..136].to_vec()).collect::<Vec<_>>();
        assert!(gap(&means(&got), &means(&want)) < 1e-5, "means of {}", entry[0]);
    }
}
