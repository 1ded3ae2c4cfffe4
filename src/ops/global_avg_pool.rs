//! The mean over an image's pixels.

use super::case::{Array, Arrays, Case, Layout, OpSpec, Port, Tensors, need};
use super::columns::{HALF_WIDE, half_column_chunks};
use super::reduce::column_chunks;
use crate::cpu::global_avg_pool as cpu;
use crate::error::Result;
use crate::kernel::{
    Access, Cuda, CudaPlan, Kernel, Plan, Stored, cuda_text, params, require_float,
};
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
    bindings: &[("x", Access::Read, Stored), ("y", Access::Write, Stored)],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("global_avg_pool"),
        half: Some(|bytes, _| {
            let p: GlobalAvgPoolParams = params(bytes);
            CudaPlan::grid([p.images * half_column_chunks(p.channels), 1, 1], 256)
        }),
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
    bindings: &[("dy", Access::Read, Stored), ("dx", Access::Write, Stored)],
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("global_avg_pool"),
        half: Some(|bytes, _| CudaPlan::items(elements(bytes), HALF_WIDE, 256)),
        plan: |bytes, _| CudaPlan::items(elements(bytes), 4, 256),
    }),
    plan: |bytes, _| Plan::items(elements(bytes), 256),
};

/// Elements of the image.
fn elements(bytes: &[u8]) -> usize {
    let p: GlobalAvgPoolParams = params(bytes);
    [p.images, p.pixels, p.channels].iter().map(|&v| v as usize).product()
}

/// `y[n, c] = mean over h, w of x[n, h, w, c]`: `[N, H, W, C] -> [N, C]`.
///
/// x may be f32, f16 or bf16; the mean is taken in f32, y and dx are stored as x is.
///
/// # Errors
/// [`crate::Error::Shape`] where x is not an image of floats.
pub fn global_avg_pool(x: &Tensor) -> Result<Tensor> {
    require_float(OP, "x", x)?;
    let [n, h, w, c] = x.dims(OP, "x")?;
    let p = GlobalAvgPoolParams { images: n as u32, pixels: (h * w) as u32, channels: c as u32 };
    let y = Tensor::uninit(x.device(), &[n, c], x.dtype())?;
    FWD.launch(&p, &[x, &y])?;
    Ok(tape::record(OP, &[x], y, move |dy, _| {
        let dx = Tensor::uninit(dy.device(), &[n, h, w, c], dy.dtype())?;
        BWD.launch(&p, &[dy, &dx])?;
        Ok(vec![Some(dx)])
    }))
}

/// Conformance of [`global_avg_pool`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[Port::new("x", Layout::Image).stored()],
    outputs: &[Port::new("y", Layout::Plain).stored()],
    attrs: &[],
    cases: || {
        let case = |label, shape: &[usize]| Case::new(label).normal("x", shape);
        vec![
            case("odd", &[2, 7, 3, 5]),
            case("one pixel", &[3, 1, 1, 4]),
            case("8 channels", &[2, 5, 3, 8]),
            case("264 channels", &[2, 5, 7, 264]).no_gradcheck(),
            case("one channel", &[1, 9, 4, 1]),
            case("129 channels", &[2, 7, 7, 129]).no_gradcheck(),
            // Of one sign and size: a sum that is kept in 16 bits stops growing, or grows by too much.
            Case::new("long sums").uniform("x", &[1, 240, 160, 1], 0.30, 0.31).no_gradcheck(),
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
