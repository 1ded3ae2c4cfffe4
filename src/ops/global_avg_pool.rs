//! The mean over an image's pixels.

use super::case::{Array, Arrays, Case, Layout, OpSpec, Port, Tensors, need};
use super::reduce::column_chunks;
use crate::cpu::global_avg_pool as cpu;
use crate::error::Result;
use crate::kernel::{Access, Cuda, CudaPlan, F32, Kernel, Plan, cuda_text, params, require_f32};
use crate::tape;
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

const OP: &str = "global_avg_pool";
const WGSL: &str = include_str!("../../shaders/global_avg_pool.wgsl");

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct GlobalAvgPoolParams {
    pub(crate) images: u32,
    pub(crate) pixels: u32,
    pub(crate) channels: u32,
}

static FWD: Kernel = Kernel {
    name: "global_avg_pool_fwd_f32",
    bindings: &[("x", Access::Read, F32), ("y", Access::Write, F32)],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("global_avg_pool"),
        half: None,
        plan: |bytes, _| {
            let p: GlobalAvgPoolParams = params(bytes);
            CudaPlan::grid([p.images * column_chunks(p.channels), 1, 1], 256)
        },
    }),
    plan: |bytes, _| {
        let p: GlobalAvgPoolParams = params(bytes);
        Plan::items(p.images as usize * p.channels as usize, 64)
    },
};

static BWD: Kernel = Kernel {
    name: "global_avg_pool_bwd_f32",
    bindings: &[("dy", Access::Read, F32), ("dx", Access::Write, F32)],
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("global_avg_pool"),
        half: None,
        plan: |bytes, _| {
            let p: GlobalAvgPoolParams = params(bytes);
            CudaPlan::items(
                [p.images, p.pixels, p.channels].iter().map(|&v| v as usize).product(),
                4,
                256,
            )
        },
    }),
    plan: |bytes, _| {
        let p: GlobalAvgPoolParams = params(bytes);
        Plan::items([p.images, p.pixels, p.channels].iter().map(|&v| v as usize).product(), 256)
    },
};

/// `y[n, c] = mean over h, w of x[n, h, w, c]`: `[N, H, W, C] -> [N, C]`.
///
/// # Errors
/// [`crate::Error::Shape`] where x is not an f32 image.
pub fn global_avg_pool(x: &Tensor) -> Result<Tensor> {
    require_f32(OP, "x", x)?;
    let [n, h, w, c] = x.dims(OP, "x")?;
    let p = GlobalAvgPoolParams { images: n as u32, pixels: (h * w) as u32, channels: c as u32 };
    let y = Tensor::empty(x.device(), &[n, c])?;
    FWD.launch(&p, &[x, &y])?;
    Ok(tape::record(OP, &[x], y, move |dy, _| {
        let dx = Tensor::empty(dy.device(), &[n, h, w, c])?;
        BWD.launch(&p, &[dy, &dx])?;
        Ok(vec![Some(dx)])
    }))
}

/// Conformance of [`global_avg_pool`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[Port::new("x", Layout::Image)],
    outputs: &[Port::new("y", Layout::Plain)],
    attrs: &[],
    cases: || {
        let case = |label, shape: &[usize]| Case::new(label).normal("x", shape);
        vec![
            case("odd", &[2, 7, 3, 5]),
            case("one pixel", &[3, 1, 1, 4]),
            case("one channel", &[1, 9, 4, 1]),
            case("129 channels", &[2, 7, 7, 129]).no_gradcheck(),
            case("many pixels", &[1, 65, 33, 3]).no_gradcheck(),
        ]
    },
    run: |_, t: &Tensors| Ok(Tensors::from([("y".into(), global_avg_pool(need(OP, t, "x")?)?)])),
    reference: |_, a: &Arrays| {
        let x = need(OP, a, "x")?;
        let (n, pixels, c) = (x.shape[0], x.shape[1] * x.shape[2], x.shape[3]);
        let mut y = Array::zeros(&[n, c]);
        for (i, value) in x.data.iter().enumerate() {
            y.data[i / (pixels * c) * c + i % c] += value / pixels as f64;
        }
        Ok(Arrays::from([("y".into(), y)]))
    },
};
