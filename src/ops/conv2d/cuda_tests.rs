//! Both tile sizes of the CUDA products, whatever the plan would choose: problems large enough for it to choose the large one
//! are too slow for the emulated device.

use super::*;
use crate::Device;
use crate::tensor::philox::Philox;

/// The kernel with another entry point and tile.
fn forced(kernel: &'static Kernel, plan: fn(&[u8], &Caps) -> CudaPlan) -> &'static Kernel {
    Box::leak(Box::new(Kernel {
        name: kernel.name,
        bindings: kernel.bindings,
        cpu: kernel.cpu,
        wgsl: kernel.wgsl,
        cuda: Some(Cuda { text: cuda_text!("conv2d"), half: None, plan }),
        plan: kernel.plan,
    }))
}

fn grid(rows: u32, columns: u32, copies: u32, tile: u32, entry: &'static str) -> CudaPlan {
    CudaPlan::grid([rows.div_ceil(tile), columns.div_ceil(tile), copies], 256).entry(entry)
}

/// The plans of forward, input and weight gradient with tiles of `$tile`.
macro_rules! plans {
    ($tile:literal, $fwd:literal, $dgrad:literal, $wgrad:literal) => {
        [
            |bytes, _| {
                let p: Conv2dParams = params(bytes);
                grid(p.n * p.p * p.q, p.o, 1, $tile, $fwd)
            },
            |bytes, _| {
                let p: Conv2dParams = params(bytes);
                grid(phase_pixels(&p), p.c, p.stride_h * p.stride_w, $tile, $dgrad)
            },
            |bytes, _| {
                let p: Conv2dParams = params(bytes);
                grid(p.o, p.kh * p.kw * p.c, p.parts, $tile, $wgrad)
            },
        ]
    };
}

/// y, dx and dw (in `parts`) by three kernels on one device.
fn run(kernels: [&'static Kernel; 3], p: Conv2dParams, device: &Device) -> [Vec<f32>; 3] {
    let size = |v: [u32; 4]| v.map(|n| n as usize);
    let x_shape = size([p.n, p.h, p.w, p.c]);
    let (w_shape, y_shape) = (size([p.o, p.kh, p.kw, p.c]), size([p.n, p.p, p.q, p.o]));
    let random = |shape: &[usize], op| {
        Tensor::randn(device, shape, Philox { seed: 11, step: 0, op }).unwrap()
    };
    let (x, w, dy) = (random(&x_shape, 0), random(&w_shape, 1), random(&y_shape, 2));
    let empty = |shape: &[usize]| Tensor::empty(device, shape).unwrap();
    let (y, dx) = (empty(&y_shape), empty(&x_shape));
    let dw = empty(&[p.parts as usize, w.numel()]);
    kernels[0].launch(&p, &[&x, &w, &w, &y]).unwrap();
    kernels[1].launch(&p, &[&dy, &w, &dx]).unwrap();
    kernels[2].launch(&p, &[&x, &dy, &dw]).unwrap();
    [y, dx, dw].map(|t| t.to_f32().unwrap())
}

#[test]
fn both_tile_sizes_agree_with_the_cpu() {
    let (cpu, cuda) = (Device::cpu(), Device::new("cuda-emu").unwrap());
    let sound = [&CONV2D_FWD, &CONV2D_DGRAD, &CONV2D_WGRAD];
    let small: [fn(&[u8], &Caps) -> CudaPlan; 3] =
        plans!(64, "conv2d_fwd_vec4_f32", "conv2d_dgrad_vec4_f32", "conv2d_wgrad_vec4_f32");
    let large: [fn(&[u8], &Caps) -> CudaPlan; 3] = plans!(
        128,
        "conv2d_fwd_vec4_large_f32",
        "conv2d_dgrad_vec4_large_f32",
        "conv2d_wgrad_vec4_large_f32"
    );
    for (stride, y) in [(1, [14, 13]), (2, [7, 7])] {
        // More than a large tile along every side.
        let counts = ([1, 14, 13, 132], [140, 3, 3], y);
        let p = Conv2dParams::from_counts(counts.0, counts.1, counts.2, (stride, stride), (1, 1));
        let want = run(sound, p, &cpu);
        for plans in [small, large] {
            let kernels = [0, 1, 2].map(|i| forced(sound[i], plans[i]));
            let got = run(kernels, p, &cuda);
            for (name, (a, b)) in ["y", "dx", "dw"].iter().zip(want.iter().zip(&got)) {
                let largest = a.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let gap = a.iter().zip(b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(gap < 1e-5 * largest, "{name}, stride {stride}: off by {gap} of {largest}");
            }
        }
    }
}
