//! Max pooling over windows of an image.
//!
//! `y[n, p, q, c]` is the largest of `x[n, p * stride + i - padding, q * stride + j - padding, c]` over the places (i, j) of
//! the window that lie inside the image. Among equals the first in reading order is taken, and NaN is larger than
//! anything: PyTorch's rules. The place taken is saved, one byte each where the window has at most 256 places, and the
//! backward asks, for every input pixel, the windows that cover it: no atomics, a fixed order of additions.

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use super::columns::HALF_WIDE;
use crate::cpu::max_pool2d as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, Cuda, CudaPlan, Kernel, Plan, Stored, U32, cuda_text, params, require_float,
};
use crate::tape;
use crate::tensor::{DType, Tensor};
use bytemuck::{Pod, Zeroable};

const OP: &str = "max_pool2d";
const WGSL: &str = concat!(
    include_str!("../../shaders/pool2d.wgsl"),
    include_str!("../../shaders/max_pool2d.wgsl")
);

/// Options of [`max_pool2d`]; pairs are (along H, along W).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaxPool2d {
    /// Size of the window.
    pub kernel: (usize, usize),
    /// Steps between windows.
    pub stride: (usize, usize),
    /// Pixels of border that windows may hang over; at most half of the kernel.
    pub padding: (usize, usize),
}

impl Default for MaxPool2d {
    /// Windows of 2 x 2 side by side.
    fn default() -> Self {
        Self { kernel: (2, 2), stride: (2, 2), padding: (0, 0) }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct MaxPool2dParams {
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
    /// Whether a place takes a word (1) or a byte (0).
    pub(crate) wide: u32,
}

static FWD: Kernel = Kernel {
    name: "max_pool2d_fwd_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("y", Access::Write, Stored),
        ("places", Access::Write, U32),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("max_pool2d"),
        half: Some(|bytes, _| CudaPlan::items(out_len(&params(bytes)), HALF_WIDE, 256)),
        plan: |bytes, _| CudaPlan::items(out_len(&params(bytes)), 4, 256),
    }),
    plan: |bytes, _| {
        let p: MaxPool2dParams = params(bytes);
        // Four elements an invocation: their places fill a word.
        Plan::items(out_len(&p).div_ceil(4), 64)
    },
};

static BWD: Kernel = Kernel {
    name: "max_pool2d_bwd_f32",
    bindings: &[
        ("dy", Access::Read, Stored),
        ("places", Access::Read, U32),
        ("dx", Access::Write, Stored),
    ],
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("max_pool2d"),
        half: Some(|bytes, _| CudaPlan::items(in_len(&params(bytes)), HALF_WIDE, 256)),
        plan: |bytes, _| CudaPlan::items(in_len(&params(bytes)), 4, 256),
    }),
    plan: |bytes, _| Plan::items(in_len(&params(bytes)), 256),
};

fn in_len(p: &MaxPool2dParams) -> usize {
    [p.n, p.h, p.w, p.c].iter().map(|&v| v as usize).product()
}

fn out_len(p: &MaxPool2dParams) -> usize {
    [p.n, p.oh, p.ow, p.c].iter().map(|&v| v as usize).product()
}

/// The maximum of each window: `x [N, H, W, C] -> [N, (H + 2 padding - kernel) / stride + 1, .., C]` (rounded down).
///
/// x may be f32, f16 or bf16; y and dx are stored as it is.
///
/// # Errors
/// [`Error::Shape`] where x is not an image of floats, the window does not fit it, a stride or kernel is 0, or the padding is
/// more than half the kernel (a window could lie outside the image altogether).
pub fn max_pool2d(x: &Tensor, opt: MaxPool2d) -> Result<Tensor> {
    let p = check(x, opt)?;
    let y = Tensor::uninit(x.device(), &[p.n, p.oh, p.ow, p.c].map(|v| v as usize), x.dtype())?;
    let words = if p.wide != 0 { out_len(&p) } else { out_len(&p).div_ceil(4) };
    let places = Tensor::uninit(x.device(), &[words], DType::U32)?;
    FWD.launch(&p, &[x, &y, &places])?;
    let shape = x.shape().to_vec();
    Ok(tape::record(OP, &[x], y, move |dy, _| {
        let dx = Tensor::uninit(dy.device(), &shape, dy.dtype())?;
        BWD.launch(&p, &[dy, &places, &dx])?;
        Ok(vec![Some(dx)])
    }))
}

/// How many windows stand along an axis of `size` pixels.
pub(super) fn windows(
    op: &'static str,
    name: &str,
    size: usize,
    [kernel, stride, padding]: [usize; 3],
) -> Result<usize> {
    let fail = |what: String| Err(Error::shape(op, format!("along {name}: {what}")));
    if kernel == 0 || stride == 0 {
        return fail(format!("kernel {kernel} and stride {stride} must be at least 1"));
    }
    if padding > kernel / 2 {
        return fail(format!("padding {padding} is more than half of kernel {kernel}"));
    }
    if size + 2 * padding < kernel {
        return fail(format!("kernel {kernel} does not fit {size} pixels with padding {padding}"));
    }
    Ok((size + 2 * padding - kernel) / stride + 1)
}

fn check(x: &Tensor, opt: MaxPool2d) -> Result<MaxPool2dParams> {
    require_float(OP, "x", x)?;
    let [n, h, w, c] = x.dims(OP, "x")?;
    let axis =
        |name, size, kernel, stride, padding| windows(OP, name, size, [kernel, stride, padding]);
    let oh = axis("H", h, opt.kernel.0, opt.stride.0, opt.padding.0)?;
    let ow = axis("W", w, opt.kernel.1, opt.stride.1, opt.padding.1)?;
    let wide = opt.kernel.0 * opt.kernel.1 > 256;
    let sizes = [n, h, w, c, oh, ow, opt.kernel.0, opt.kernel.1, opt.stride.0, opt.stride.1];
    let [n, h, w, c, oh, ow, kh, kw, sh, sw] = sizes.map(|v| v as u32);
    let (ph, pw) = (opt.padding.0 as u32, opt.padding.1 as u32);
    Ok(MaxPool2dParams { n, h, w, c, oh, ow, kh, kw, sh, sw, ph, pw, wide: u32::from(wide) })
}

fn cases() -> Vec<Case> {
    let case =
        |label, shape: &[usize], kernel: [usize; 2], stride: [usize; 2], padding: [usize; 2]| {
            let case = Case::new(label).normal("x", shape);
            case.attr("kernel", kernel.to_vec())
                .attr("stride", stride.to_vec())
                .attr("padding", padding.to_vec())
        };
    vec![
        case("3x3 stride 2", &[2, 9, 7, 3], [3, 3], [2, 2], [1, 1]),
        case("3x3 stride 2, even", &[1, 8, 6, 5], [3, 3], [2, 2], [1, 1]),
        case("2x2, last row dropped", &[1, 7, 5, 4], [2, 2], [2, 2], [0, 0]),
        case("overlapping", &[1, 6, 7, 1], [3, 3], [1, 1], [1, 1]),
        case("2x3, strides 1 and 2", &[1, 5, 7, 2], [2, 3], [1, 2], [0, 1]),
        case("stride past the kernel", &[1, 9, 9, 3], [2, 2], [3, 4], [1, 0]),
        case("one pixel", &[2, 1, 1, 7], [3, 3], [2, 2], [1, 1]),
        case("more than 256 places", &[1, 17, 17, 1], [17, 17], [1, 1], [8, 8]),
        case("8 channels", &[2, 7, 5, 8], [3, 3], [2, 2], [1, 1]),
        case("12 channels", &[1, 5, 3, 12], [2, 2], [1, 1], [0, 0]),
        case("8 channels of more than 256 places", &[1, 17, 18, 8], [17, 17], [1, 1], [8, 8])
            .no_gradcheck(),
        case("33 channels", &[2, 17, 15, 33], [3, 3], [2, 2], [1, 1]).no_gradcheck(),
    ]
}

fn run(attrs: &Attrs, t: &Tensors) -> Result<Tensors> {
    let kernel = attrs.pair("kernel", [2, 2])?;
    let stride = attrs.pair("stride", [kernel.0, kernel.1])?;
    let opt = MaxPool2d { kernel, stride, padding: attrs.pair("padding", [0, 0])? };
    Ok(Tensors::from([("y".into(), max_pool2d(need(OP, t, "x")?, opt)?)]))
}

fn reference(attrs: &Attrs, a: &Arrays) -> Result<Arrays> {
    let x = need(OP, a, "x")?;
    let (kh, kw) = attrs.pair("kernel", [2, 2])?;
    let (sh, sw) = attrs.pair("stride", [kh, kw])?;
    let (ph, pw) = attrs.pair("padding", [0, 0])?;
    let [n, h, w, c] = [0, 1, 2, 3].map(|axis| x.shape[axis]);
    let (oh, ow) = ((h + 2 * ph - kh) / sh + 1, (w + 2 * pw - kw) / sw + 1);
    let mut y = Array { shape: vec![n, oh, ow, c], data: vec![f64::NEG_INFINITY; n * oh * ow * c] };
    for to in 0..y.data.len() {
        let (image, p, q, channel) = (to / (oh * ow * c), to / (ow * c) % oh, to / c % ow, to % c);
        for (i, j) in (0..kh).flat_map(|i| (0..kw).map(move |j| (i, j))) {
            let (row, column) = (p * sh + i, q * sw + j);
            if (ph..h + ph).contains(&row) && (pw..w + pw).contains(&column) {
                y.data[to] = y.data[to].max(x.get(&[image, row - ph, column - pw, channel]));
            }
        }
    }
    Ok(Arrays::from([("y".into(), y)]))
}

/// Conformance of [`max_pool2d`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[Port::new("x", Layout::Image).stored()],
    outputs: &[Port::new("y", Layout::Image).stored()],
    attrs: &["kernel", "stride", "padding"],
    cases,
    run,
    reference,
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn the_first_of_equals_takes_the_gradient() {
        let device = Device::cpu();
        let data = [1.0, 1.0, 0.0, 1.0, 1.0, f32::NAN, 2.0, 2.0, 2.0];
        let x = Tensor::from_f32(&device, &[1, 3, 3, 1], &data).unwrap().requires_grad();
        let opt = MaxPool2d { kernel: (2, 2), stride: (1, 1), padding: (0, 0) };
        let y = max_pool2d(&x, opt).unwrap();
        let got = y.to_f32().unwrap();
        assert_eq!((got[0], got[2]), (1.0, 2.0));
        assert!(got[1].is_nan() && got[3].is_nan());
        let dy = Tensor::from_f32(&device, &[1, 2, 2, 1], &[1.0, 10.0, 100.0, 1000.0]).unwrap();
        let grads = y.backward_with(&dy).unwrap();
        let want = [1.0, 0.0, 0.0, 0.0, 0.0, 1010.0, 100.0, 0.0, 0.0];
        assert_eq!(grads.get(&x).unwrap().to_f32().unwrap(), want);
    }

    #[test]
    fn windows_that_do_not_fit_are_refused() {
        let x = Tensor::zeros(&Device::cpu(), &[1, 4, 4, 1]).unwrap();
        let refused = |kernel, stride, padding| {
            max_pool2d(&x, MaxPool2d { kernel, stride, padding }).unwrap_err().to_string()
        };
        assert!(
            refused((5, 2), (1, 1), (0, 0)).contains("along H: kernel 5 does not fit 4 pixels")
        );
        assert!(refused((2, 2), (1, 0), (0, 0)).contains("along W"));
        assert!(refused((3, 3), (1, 1), (2, 0)).contains("more than half"));
    }
}
