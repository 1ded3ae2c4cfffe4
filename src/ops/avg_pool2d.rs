//! Average pooling over windows of an image.
//!
//! `y[n, p, q, c]` is the sum of `x[n, p * stride + i - padding, q * stride + j - padding, c]` over the places (i, j) of the window that
//! lie inside the image, divided by all places of the window (`count_include_pad`) or by those inside. The backward asks, for every
//! input pixel, the windows that cover it: no atomics, a fixed order of additions.

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use super::columns::HALF_WIDE;
use super::max_pool2d::windows;
use crate::cpu::avg_pool2d as cpu;
use crate::error::Result;
use crate::kernel::{
    Access, Cuda, CudaPlan, Kernel, Plan, Stored, cuda_text, params, require_float,
};
use crate::tape;
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

const OP: &str = "avg_pool2d";
const WGSL: &str = concat!(
    include_str!("../../shaders/pool2d.wgsl"),
    include_str!("../../shaders/avg_pool2d.wgsl")
);

/// Options of [`avg_pool2d`], as `torch.nn.AvgPool2d` has them; pairs are (along H, along W).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AvgPool2d {
    /// Size of the window.
    pub kernel: (usize, usize),
    /// Steps between windows.
    pub stride: (usize, usize),
    /// Pixels of border that windows may hang over; at most half of the kernel.
    pub padding: (usize, usize),
    /// Whether places of the border count as zeros; else the mean is over the places inside the image.
    pub count_include_pad: bool,
}

impl Default for AvgPool2d {
    /// Windows of 2 x 2 side by side.
    fn default() -> Self {
        Self { kernel: (2, 2), stride: (2, 2), padding: (0, 0), count_include_pad: true }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct AvgPool2dParams {
    pub(crate) n: u32,
    pub(crate) h: u32,
    pub(crate) w: u32,
    pub(crate) c: u32,
    pub(crate) oh: u32,
    pub(crate) ow: u32,
    pub(crate) kh: u32,
    pub(crate) kw: u32,
    pub(crate) sh: u32,
    pub(crate) sw: u32,
    pub(crate) ph: u32,
    pub(crate) pw: u32,
    /// Whether places outside the image count (1) or not (0).
    pub(crate) include_pad: u32,
}

static FWD: Kernel = Kernel {
    name: "avg_pool2d_fwd_f32",
    bindings: &[("x", Access::Read, Stored), ("y", Access::Write, Stored)],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("avg_pool2d"),
        half: Some(|bytes, _| CudaPlan::items(out_len(bytes), HALF_WIDE, 256)),
        plan: |bytes, _| CudaPlan::items(out_len(bytes), 4, 256),
    }),
    plan: |bytes, _| Plan::items(out_len(bytes), 256),
};

static BWD: Kernel = Kernel {
    name: "avg_pool2d_bwd_f32",
    bindings: &[("dy", Access::Read, Stored), ("dx", Access::Write, Stored)],
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("avg_pool2d"),
        half: Some(|bytes, _| CudaPlan::items(in_len(bytes), HALF_WIDE, 256)),
        plan: |bytes, _| CudaPlan::items(in_len(bytes), 4, 256),
    }),
    plan: |bytes, _| Plan::items(in_len(bytes), 256),
};

fn in_len(bytes: &[u8]) -> usize {
    let p: AvgPool2dParams = params(bytes);
    [p.n, p.h, p.w, p.c].iter().map(|&v| v as usize).product()
}

fn out_len(bytes: &[u8]) -> usize {
    let p: AvgPool2dParams = params(bytes);
    [p.n, p.oh, p.ow, p.c].iter().map(|&v| v as usize).product()
}

/// The mean of each window: `x [N, H, W, C] -> [N, (H + 2 padding - kernel) / stride + 1, .., C]` (rounded down).
///
/// x may be f32, f16 or bf16; means are taken in f32, y and dx are stored as x is.
///
/// # Errors
/// [`crate::Error::Shape`] where x is not an image of floats, the window does not fit it, a stride or kernel is 0, or the padding is
/// more than half the kernel (a window could lie outside the image altogether).
pub fn avg_pool2d(x: &Tensor, opt: AvgPool2d) -> Result<Tensor> {
    require_float(OP, "x", x)?;
    let [n, h, w, c] = x.dims(OP, "x")?;
    let oh = windows(OP, "H", h, [opt.kernel.0, opt.stride.0, opt.padding.0])?;
    let ow = windows(OP, "W", w, [opt.kernel.1, opt.stride.1, opt.padding.1])?;
    let pair = |(a, b): (usize, usize)| (a as u32, b as u32);
    let ((kh, kw), (sh, sw), (ph, pw)) = (pair(opt.kernel), pair(opt.stride), pair(opt.padding));
    let include_pad = u32::from(opt.count_include_pad);
    let y = Tensor::uninit(x.device(), &[n, oh, ow, c], x.dtype())?;
    let [n, h, w, c, oh, ow] = [n, h, w, c, oh, ow].map(|v| v as u32);
    let p = AvgPool2dParams { n, h, w, c, oh, ow, kh, kw, sh, sw, ph, pw, include_pad };
    FWD.launch(&p, &[x, &y])?;
    let shape = x.shape().to_vec();
    Ok(tape::record(OP, &[x], y, move |dy, _| {
        let dx = Tensor::uninit(dy.device(), &shape, dy.dtype())?;
        BWD.launch(&p, &[dy, &dx])?;
        Ok(vec![Some(dx)])
    }))
}

fn cases() -> Vec<Case> {
    let case = |label, shape: &[usize], [kernel, stride, padding]: [[usize; 2]; 3]| {
        let case = Case::new(label).normal("x", shape);
        case.attr("kernel", kernel.to_vec())
            .attr("stride", stride.to_vec())
            .attr("padding", padding.to_vec())
    };
    let inside = |case: Case| case.attr("count_include_pad", false);
    vec![
        case("2x2, last row dropped", &[1, 7, 5, 4], [[2, 2], [2, 2], [0, 0]]),
        case("3x3 stride 2, padded", &[2, 9, 7, 3], [[3, 3], [2, 2], [1, 1]]),
        inside(case("3x3 stride 2, inside", &[2, 9, 7, 3], [[3, 3], [2, 2], [1, 1]])),
        inside(case("overlapping, 8 channels", &[1, 6, 7, 8], [[3, 3], [1, 1], [1, 1]])),
        case("2x3, strides 1 and 2", &[1, 5, 7, 12], [[2, 3], [1, 2], [0, 1]]),
        case("stride past the kernel", &[1, 9, 9, 3], [[2, 2], [3, 4], [1, 0]]),
        inside(case("one pixel", &[2, 1, 1, 7], [[3, 3], [2, 2], [1, 1]])),
        inside(case("33 channels", &[2, 17, 15, 33], [[3, 3], [2, 2], [1, 1]])).no_gradcheck(),
    ]
}

fn options(attrs: &Attrs) -> Result<AvgPool2d> {
    let kernel = attrs.pair("kernel", [2, 2])?;
    Ok(AvgPool2d {
        kernel,
        stride: attrs.pair("stride", [kernel.0, kernel.1])?,
        padding: attrs.pair("padding", [0, 0])?,
        count_include_pad: attrs.bool("count_include_pad", true)?,
    })
}

fn reference(attrs: &Attrs, a: &Arrays) -> Result<Arrays> {
    let (x, opt) = (need(OP, a, "x")?, options(attrs)?);
    let [n, h, w, c] = [0, 1, 2, 3].map(|i| x.shape[i]);
    let [(kh, kw), (sh, sw), (ph, pw)] = [opt.kernel, opt.stride, opt.padding];
    let mut y = Array::zeros(&[n, (h + 2 * ph - kh) / sh + 1, (w + 2 * pw - kw) / sw + 1, c]);
    let (oh, ow) = (y.shape[1], y.shape[2]);
    for (e, y) in y.data.iter_mut().enumerate() {
        let (image, top, left) = (e / c / ow / oh, e / c / ow % oh * sh, e / c % ow * sw);
        let mut inside = 0;
        for (i, j) in (0..kh).flat_map(|i| (0..kw).map(move |j| (i, j))) {
            let (row, column) = ((top + i).wrapping_sub(ph), (left + j).wrapping_sub(pw));
            if row < h && column < w {
                *y += x.get(&[image, row, column, e % c]);
                inside += 1;
            }
        }
        *y /= if opt.count_include_pad { kh * kw } else { inside } as f64;
    }
    Ok(Arrays::from([("y".into(), y)]))
}

/// Conformance of [`avg_pool2d`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[Port::new("x", Layout::Image).stored()],
    outputs: &[Port::new("y", Layout::Image).stored()],
    attrs: &["kernel", "stride", "padding", "count_include_pad"],
    cases,
    run: |attrs, t: &Tensors| {
        let y = avg_pool2d(need(OP, t, "x")?, options(attrs)?)?;
        Ok(Tensors::from([("y".into(), y)]))
    },
    reference,
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn windows_that_do_not_fit_are_refused() {
        let x = Tensor::zeros(&Device::cpu(), &[1, 3, 3, 1]).unwrap();
        let refused = |opt| avg_pool2d(&x, opt).unwrap_err().to_string();
        let opt = AvgPool2d { kernel: (4, 2), ..AvgPool2d::default() };
        assert!(refused(opt).contains("along H: kernel 4 does not fit 3 pixels"));
        let opt = AvgPool2d { padding: (0, 2), ..AvgPool2d::default() };
        assert!(refused(opt).contains("along W: padding 2"));
    }
}
