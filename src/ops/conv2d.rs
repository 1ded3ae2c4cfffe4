//! 2D convolution: forward, and the gradients of input, weight and bias. [`super::linear`] is made of the same kernels; with
//! groups, [`super::depthwise`] and [`super::grouped`] have the kernels.

use super::reduce::sum_rows;
use super::{depthwise, grouped};
use crate::Caps;
use crate::cpu::conv2d as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, F32, Kernel, MAX_GROUPS, Plan, Stored, params, require_f32, require_float, require_same,
};
use crate::tape;
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

mod cuda;
mod ends;
mod spec;
mod tiles;

pub(super) use ends::{normalised, with_statistics};
pub(crate) use spec::SPEC;
pub(super) use spec::options;
use tiles::{CHANNELS, Entries, phase_pixels, pixel_plan, vectors, weight_grid, weight_plan};

const WGSL: &str = concat!(
    include_str!("../../shaders/conv2d_params.wgsl"),
    include_str!("../../shaders/conv2d.wgsl"),
    include_str!("../../shaders/conv2d_ends.wgsl"),
    include_str!("../../shaders/conv2d_tiled.wgsl"),
    include_str!("../../shaders/conv2d_wide.wgsl")
);

/// Shape of a convolution: the parameter block of its kernels. Counts of pixels or channels.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub(crate) struct Conv2dParams {
    /// Images, input rows, columns and channels.
    pub(crate) n: u32,
    pub(crate) h: u32,
    pub(crate) w: u32,
    pub(crate) c: u32,
    /// Output channels, kernel rows and columns, output rows and columns.
    pub(crate) o: u32,
    pub(crate) kh: u32,
    pub(crate) kw: u32,
    pub(crate) p: u32,
    pub(crate) q: u32,
    pub(crate) stride_h: u32,
    pub(crate) stride_w: u32,
    /// Rows of zeros above and below, columns of zeros left and right.
    pub(crate) pad_h: u32,
    pub(crate) pad_w: u32,
    /// 1 where there is a bias.
    pub(crate) bias: u32,
    /// Weight and bias gradient: into how many parts the pixels are cut.
    pub(crate) parts: u32,
    /// Groups of channels that do not mix: `c / groups` of them feed `o / groups` outputs.
    pub(crate) groups: u32,
    /// A forward that ends in a norm: its activation (0 none, 1 ReLU, 2 SiLU), and whether there is a residual (1) or not.
    pub(crate) act: u32,
    pub(crate) residual: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SumParams {
    len: u32,
    parts: u32,
}

/// Options of [`conv2d`], along height and width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2d {
    /// Input pixels from one output pixel to the next.
    pub stride: (usize, usize),
    /// Rows of zeros above and below, columns of zeros left and right.
    pub padding: (usize, usize),
    /// Input pixels from one kernel tap to the next; only 1 is supported.
    pub dilation: (usize, usize),
    /// Groups of channels that do not mix: the first `C / groups` channels feed the first `O / groups` outputs, and so on. It divides
    /// both; as many groups as channels and outputs is a depthwise convolution.
    pub groups: usize,
}

impl Default for Conv2d {
    fn default() -> Self {
        Self { stride: (1, 1), padding: (0, 0), dilation: (1, 1), groups: 1 }
    }
}

/// One grid axis runs over channels.
const MOST_CHANNELS: usize = MAX_GROUPS as usize * CHANNELS as usize;
/// And one over the columns of the weight, in the weight gradient.
const MOST_COLUMNS: usize = MAX_GROUPS as usize * 64;

static CONV2D_FWD: Kernel = Kernel {
    name: "conv2d_fwd_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("w", Access::Read, Stored),
        ("bias", Access::Read, F32),
        ("y", Access::Write, Stored),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: cuda::FWD,
    plan: |bytes, caps| {
        const ENTRIES: Entries = Entries {
            any: "conv2d_fwd_f32",
            vec4: "conv2d_fwd_vec4_f32",
            wide: "conv2d_fwd_wide_f32",
            wide_vec4: "conv2d_fwd_wide_vec4_f32",
            tiled: "conv2d_fwd_tiled_f32",
        };
        let p: Conv2dParams = params(bytes);
        pixel_plan(caps, [p.n * p.p * p.q, p.o, 1], p.c.is_multiple_of(4), &ENTRIES)
    },
};

static CONV2D_DGRAD: Kernel = Kernel {
    name: "conv2d_dgrad_f32",
    bindings: &[
        ("dy", Access::Read, Stored),
        ("w", Access::Read, Stored),
        ("dx", Access::Write, Stored),
    ],
    cpu: cpu::dgrad,
    wgsl: WGSL,
    cuda: cuda::DGRAD,
    plan: |bytes, caps| {
        const ENTRIES: Entries = Entries {
            any: "conv2d_dgrad_f32",
            vec4: "conv2d_dgrad_vec4_f32",
            wide: "conv2d_dgrad_f32",
            wide_vec4: "conv2d_dgrad_wide_vec4_f32",
            tiled: "conv2d_dgrad_tiled_f32",
        };
        let p: Conv2dParams = params(bytes);
        let extent = [phase_pixels(&p), p.c, p.stride_h * p.stride_w];
        pixel_plan(caps, extent, vectors(&p), &ENTRIES)
    },
};

/// Its output has `parts` copies of the weight, which `CONV2D_SUM` adds up.
static CONV2D_WGRAD: Kernel = Kernel {
    name: "conv2d_wgrad_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("dy", Access::Read, Stored),
        ("dw", Access::Write, F32),
    ],
    cpu: cpu::wgrad,
    wgsl: WGSL,
    cuda: cuda::WGRAD,
    plan: |bytes, caps| weight_plan(caps, &params(bytes)),
};

/// Its output has `parts` copies of the bias.
static CONV2D_DBIAS: Kernel = Kernel {
    name: "conv2d_dbias_f32",
    bindings: &[("dy", Access::Read, F32), ("db", Access::Write, F32)],
    cpu: cpu::dbias,
    wgsl: WGSL,
    cuda: cuda::DBIAS,
    plan: |bytes, _: &Caps| {
        let p: Conv2dParams = params(bytes);
        Plan { entry: "", grid: [p.o.div_ceil(64), p.parts, 1] }
    },
};

static CONV2D_SUM: Kernel = Kernel {
    name: "conv2d_sum_f32",
    bindings: &[("sums", Access::Read, F32), ("out", Access::Write, F32)],
    cpu: cpu::sum,
    wgsl: WGSL,
    cuda: cuda::SUM,
    plan: |bytes, _: &Caps| Plan::items(params::<SumParams>(bytes).len as usize, 256),
};

/// Into how many parts a GPU cuts the pixels of a weight gradient: enough to fill a large GPU (the weight of an early
/// layer is small), and none so long that its sum loses precision. Depends on the shape and the kernel alone, so that results do not
/// differ between GPUs of a kind by it. The CPU needs no parts.
fn weight_parts(p: &Conv2dParams, x: &Tensor) -> u32 {
    if x.device().name() == "cpu" {
        return 1;
    }
    if p.groups > 1 {
        return if p.depthwise() { depthwise::weight_parts(p) } else { grouped::weight_parts(p) };
    }
    if x.dtype().is_half() {
        return cuda::half_parts(p);
    }
    const WORKGROUPS: u32 = 1024;
    const LONGEST: u32 = 4096;
    const SHORTEST: u32 = 64;
    let pixels = p.n * p.p * p.q;
    let [x, y] = weight_grid(x.device().caps(), p);
    (WORKGROUPS / (x * y))
        .max(pixels.div_ceil(LONGEST))
        .clamp(1, pixels.div_ceil(SHORTEST).min(MAX_GROUPS))
}

impl Conv2dParams {
    /// A linear layer on `rows` rows: 1x1 over images of one pixel.
    pub(super) fn pointwise(rows: usize, c: usize, o: usize, bias: bool) -> Result<Self> {
        if o > MOST_CHANNELS || c > MOST_CHANNELS {
            let message =
                format!("at most {MOST_CHANNELS} features are supported, got {c} and {o}");
            return Err(Error::shape("linear", message));
        }
        let one = Self::from_counts([rows, 1, 1, c], [o, 1, 1], [1, 1], (1, 1), (0, 0));
        Ok(Self { bias: u32::from(bias), ..one })
    }

    fn from_counts(
        x: [usize; 4],
        w: [usize; 3],
        y: [usize; 2],
        stride: (usize, usize),
        pad: (usize, usize),
    ) -> Self {
        let ([n, h, width, c], [o, kh, kw], [p, q]) =
            (x.map(|v| v as u32), w.map(|v| v as u32), y.map(|v| v as u32));
        Self {
            n,
            h,
            w: width,
            c,
            o,
            kh,
            kw,
            p,
            q,
            stride_h: stride.0 as u32,
            stride_w: stride.1 as u32,
            pad_h: pad.0 as u32,
            pad_w: pad.1 as u32,
            bias: 0,
            parts: 1,
            groups: 1,
            act: 0,
            residual: 0,
        }
    }

    /// Whether every channel has a kernel of its own.
    fn depthwise(&self) -> bool {
        self.groups == self.c && self.c == self.o
    }

    /// Numbers of the weight.
    pub(super) fn weights(&self) -> u32 {
        self.o * self.kh * self.kw * (self.c / self.groups)
    }
}

impl Conv2d {
    /// The parameter block, where the shapes fit: the one place where they are checked.
    pub(super) fn check(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Conv2dParams> {
        const OP: &str = "conv2d";
        let fail = |message: String| Err(Error::shape(OP, message));
        require_float(OP, "x", x)?;
        require_same(OP, ("x", x), "weight", w)?;
        let [n, h, width, c] = x.dims(OP, "x")?;
        let [o, kh, kw, wc] = w.dims(OP, "weight")?;
        if self.dilation != (1, 1) {
            return fail(format!(
                "dilation = (1, 1) is supported, got dilation = {:?}",
                self.dilation
            ));
        }
        self.check_groups(x, w)?;
        if let Some(bias) = bias {
            require_f32(OP, "bias", bias)?;
            if bias.shape() != [o] {
                return fail(format!("bias must be [{o}], got {:?}", bias.shape()));
            }
        }
        let p = output_size("height", h, kh, self.stride.0, self.padding.0)?;
        let q = output_size("width", width, kw, self.stride.1, self.padding.1)?;
        if c > MOST_CHANNELS || o > MOST_CHANNELS {
            return fail(format!(
                "at most {MOST_CHANNELS} channels are supported, got {c} and {o}"
            ));
        }
        if kh * kw * wc > MOST_COLUMNS {
            return fail(format!(
                "at most {MOST_COLUMNS} weights an output are supported, weight is {:?}",
                w.shape()
            ));
        }
        let counts = ([n, h, width, c], [o, kh, kw], [p, q]);
        let p = Conv2dParams::from_counts(counts.0, counts.1, counts.2, self.stride, self.padding);
        Ok(Conv2dParams { bias: u32::from(bias.is_some()), groups: self.groups as u32, ..p })
    }

    /// Whether the channels of x and the weight, four axes each, go together.
    fn check_groups(&self, x: &Tensor, w: &Tensor) -> Result<()> {
        let (c, o, wc, groups) = (x.shape()[3], w.shape()[0], w.shape()[3], self.groups);
        let fail = |message: String| Err(Error::shape("conv2d", message));
        if groups == 0 || !c.is_multiple_of(groups) || !o.is_multiple_of(groups) {
            return fail(format!(
                "groups = {groups} must divide the {c} channels of x {:?} (last axis) and the {o} outputs of weight {:?} (first axis)",
                x.shape(),
                w.shape()
            ));
        }
        if c / groups != wc {
            let each = if groups == 1 { String::new() } else { format!(" / {groups} groups") };
            return fail(format!(
                "x {:?} has {c} channels (last axis){each}, weight {:?} expects {wc} (its last axis)",
                x.shape(),
                w.shape()
            ));
        }
        Ok(())
    }
}

fn output_size(
    axis: &str,
    size: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
) -> Result<usize> {
    // Far beyond any network, and small enough that no sum of them overflows.
    const MOST_STRIDE: usize = 64;
    const MOST_PADDING: usize = 1 << 16;
    if stride == 0 || stride > MOST_STRIDE || padding > MOST_PADDING {
        return Err(Error::shape(
            "conv2d",
            format!(
                "{axis}: stride must be 1 to {MOST_STRIDE} and padding at most {MOST_PADDING}, got {stride} and {padding}"
            ),
        ));
    }
    if kernel > size + 2 * padding {
        return Err(Error::shape(
            "conv2d",
            format!(
                "{axis}: a kernel of {kernel} does not fit an input of {size} with padding {padding}"
            ),
        ));
    }
    Ok((size + 2 * padding - kernel) / stride + 1)
}

/// `y[n,p,q,o] = bias[o] + sum over r,s,c of x[n, p*stride+r-padding, q*stride+s-padding, c] * w[o,r,s,c]`, where x is
/// zero outside.
///
/// x `[N, H, W, C]`, w `[O, kh, kw, C / groups]`, bias `[O]`, y `[N, P, Q, O]` with `P = (H + 2*padding - kh) / stride + 1`
/// and Q likewise. With groups, output o belongs to group `o / (O / groups)`, c runs over the channels of that group alone, and the weight's
/// last axis counts them from the group's first. Gradients for x, w and bias. x and w may be stored in half precision (both alike); y and the gradient of x are
/// then too, the bias, all sums and the gradients of w and bias are f32.
///
/// # Errors
/// [`Error::Shape`] where shapes, storage or options do not fit, naming what is supported.
pub fn conv2d(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, options: Conv2d) -> Result<Tensor> {
    let p = options.check(x, w, bias)?;
    let shape = [p.n, p.p, p.q, p.o].map(|v| v as usize);
    forward("conv2d", p, &shape, x, w, bias)
}

/// The convolution `p` on the tape as `op`, with an output of `shape` (as many elements as [N, P, Q, O] has).
pub(super) fn forward(
    op: &'static str,
    p: Conv2dParams,
    shape: &[usize],
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let y = Tensor::uninit(x.device(), shape, x.dtype())?;
    let unused;
    let bound = match bias {
        Some(bias) => bias,
        None => {
            // Something in f32 has to be bound; the kernels do not look at it.
            unused = Tensor::empty(x.device(), &[1])?;
            &unused
        }
    };
    let [fwd, ..] = kernels(&p);
    fwd.launch(&p, &[x, w, bound, &y])?;
    Ok(recorded(op, p, x, w, bias, y))
}

/// y, the convolution `p` of x, on the tape as `op`.
fn recorded(
    op: &'static str,
    p: Conv2dParams,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    y: Tensor,
) -> Tensor {
    let mut inputs = vec![x, w];
    inputs.extend(bias);
    let saved = (x.detach(), w.detach());
    tape::record(op, &inputs, y, move |dy, needs| {
        let (x, w) = saved;
        let mut grads = gradients(p, (&x, &w), dy, [needs[0], needs[1]])?.to_vec();
        if needs.get(2) == Some(&true) {
            grads.push(Some(bias_gradient(p, dy)?));
        } else {
            grads.push(None);
        }
        Ok(grads)
    })
}

/// Forward, input gradient and weight gradient.
fn kernels(p: &Conv2dParams) -> [&'static Kernel; 3] {
    match p.groups {
        1 => [&CONV2D_FWD, &CONV2D_DGRAD, &CONV2D_WGRAD],
        _ if p.depthwise() => depthwise::KERNELS,
        _ => grouped::KERNELS,
    }
}

/// Gradients of x and w off the tape; each where it is wanted.
pub(super) fn gradients(
    p: Conv2dParams,
    (x, w): (&Tensor, &Tensor),
    dy: &Tensor,
    wanted: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    let [_, dgrad, wgrad] = kernels(&p);
    let mut grads = [None, None];
    if wanted[0] {
        let dx = x.empty_like()?;
        dgrad.launch(&p, &[dy, w, &dx])?;
        grads[0] = Some(dx);
    }
    if wanted[1] {
        let parts = weight_parts(&p, x);
        grads[1] = Some(in_parts(p, parts, w.shape(), wgrad, &[x, dy])?);
    }
    Ok(grads)
}

fn bias_gradient(p: Conv2dParams, dy: &Tensor) -> Result<Tensor> {
    if dy.dtype().is_half() {
        return sum_rows(dy);
    }
    let parts = match dy.device().name() {
        "cpu" => 1,
        _ => (p.n * p.p * p.q).div_ceil(256).min(1024),
    };
    in_parts(p, parts, &[p.o as usize], &CONV2D_DBIAS, &[dy])
}

/// Runs a gradient kernel that leaves `parts` partial sums, and adds them up.
fn in_parts(
    p: Conv2dParams,
    parts: u32,
    shape: &[usize],
    kernel: &'static Kernel,
    inputs: &[&Tensor],
) -> Result<Tensor> {
    let p = Conv2dParams { parts, ..p };
    let device = inputs[0].device();
    let mut bindings = inputs.to_vec();
    if parts == 1 {
        let out = Tensor::empty(device, shape)?;
        bindings.push(&out);
        kernel.launch(&p, &bindings)?;
        return Ok(out);
    }
    let len = shape.iter().product();
    let sums = Tensor::empty(device, &[parts as usize, len])?;
    bindings.push(&sums);
    kernel.launch(&p, &bindings)?;
    if p.groups > 1 {
        // Few weights and many parts: one thread a weight would take long.
        return sum_rows(&sums)?.reshape(shape);
    }
    let out = Tensor::empty(device, shape)?;
    CONV2D_SUM.launch(&SumParams { len: len as u32, parts }, &[&sums, &out])?;
    Ok(out)
}

#[cfg(all(test, feature = "cuda-emu"))]
mod cuda_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let device = Device::cpu();
        let ones = |shape: &[usize]| Tensor::full(&device, shape, 1.0).unwrap();
        let (x, w) = (ones(&[1, 4, 4, 2]), ones(&[3, 3, 3, 2]));
        let message = |x: &Tensor, w: &Tensor, b: Option<&Tensor>, options: Conv2d| {
            conv2d(x, w, b, options).expect_err("refused").to_string()
        };
        let plain = Conv2d::default();
        assert!(message(&x, &ones(&[3, 3, 3, 5]), None, plain).contains("2 channels"));
        assert!(message(&x, &w, Some(&ones(&[2])), plain).contains("bias must be [3]"));
        assert!(
            message(&x, &w, None, Conv2d { groups: 2, ..plain }).contains("groups = 2 must divide")
        );
        assert!(
            message(&x, &w, None, Conv2d { groups: 0, ..plain }).contains("groups = 0 must divide")
        );
        let four = ones(&[4, 3, 3, 2]);
        assert!(
            message(&x, &four, None, Conv2d { groups: 2, ..plain })
                .contains("2 channels (last axis) / 2 groups")
        );
        assert!(message(&x, &w, None, Conv2d { dilation: (2, 1), ..plain }).contains("dilation"));
        assert!(message(&x, &w, None, Conv2d { stride: (0, 1), ..plain }).contains("stride"));
        assert!(message(&x, &ones(&[3, 5, 3, 2]), None, plain).contains("does not fit"));
        assert!(message(&ones(&[4, 4, 2]), &w, None, plain).contains("4 axes"));
    }
}
