//! Squeeze and excitation as one unit (Hu et al. 2018, with SiLU as EfficientNet has it): every channel of an image is multiplied by a
//! gate that two small linear layers make of the channels' means.
//!
//! ```text
//! m = mean over h, w of x      z = w1 m + b1      g = sigmoid(w2 silu(z) + b2)      y = x * g
//! ```
//!
//! Three launches: sums over blocks of pixels, both layers for an image at a time, and the product. Saved are m, z with silu(z), and g.
//! Backward, in four launches, with P pixels an image:
//!
//! ```text
//! u = g (1 - g) * sum over h, w of dy * x          (the gradient before the sigmoid)      db2 = sum u      dw2 = sum u silu(z)^T
//! v = silu'(z) * w2^T u                            (the gradient of z)                    db1 = sum v      dw1 = sum v m^T
//! dx = dy * g + (w1^T v) / P                       (sums of the parameters' gradients are over the images, in order)
//! ```

use super::columns::{HALF_WIDE, half_column_chunks};
use super::reduce::{Blocks, GROUP, column_chunks};
use crate::Caps;
use crate::cpu::squeeze_excite as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, Cuda, CudaPlan, F32, Kernel, Plan, Stored, cuda_text, params, require_f32,
    require_float, require_same,
};
use crate::tape;
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

mod spec;

pub(crate) use spec::SPEC;

const OP: &str = "squeeze_excite";
const WGSL: &str = include_str!("../../shaders/squeeze_excite.wgsl");

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct SqueezeExciteParams {
    pub(crate) images: u32,
    /// Of an image.
    pub(crate) pixels: u32,
    pub(crate) channels: u32,
    /// Numbers between the two layers.
    pub(crate) squeezed: u32,
    /// How an image's pixels are cut for the sums.
    pub(crate) pixels_per_block: u32,
    pub(crate) blocks: u32,
}

fn elements(bytes: &[u8]) -> usize {
    let p: SqueezeExciteParams = params(bytes);
    [p.images, p.pixels, p.channels].iter().map(|&v| v as usize).product()
}

fn plan_elements(bytes: &[u8], _: &Caps) -> Plan {
    Plan::items(elements(bytes), 256)
}

/// An invocation for each channel of each block of pixels.
fn plan_sums(bytes: &[u8], _: &Caps) -> Plan {
    let p: SqueezeExciteParams = params(bytes);
    Plan::items([p.images, p.blocks, p.channels].iter().map(|&v| v as usize).product(), GROUP)
}

/// A workgroup an image.
fn plan_images(bytes: &[u8], _: &Caps) -> Plan {
    Plan::items(params::<SqueezeExciteParams>(bytes).images as usize, 1)
}

const fn cuda(plan: fn(&[u8], &Caps) -> CudaPlan) -> Cuda {
    Cuda { text: cuda_text!("squeeze_excite"), half: None, plan }
}

/// A block for some pixels of an image and some channels.
const CUDA_SUMS: Option<Cuda> = Some(Cuda {
    half: Some(|bytes, _| {
        let p: SqueezeExciteParams = params(bytes);
        CudaPlan::grid([p.images * p.blocks * half_column_chunks(p.channels), 1, 1], 256)
    }),
    ..cuda(|bytes, _| {
        let p: SqueezeExciteParams = params(bytes);
        CudaPlan::grid([p.images * p.blocks * column_chunks(p.channels), 1, 1], 256)
    })
});

/// A block an image.
const CUDA_IMAGES: Option<Cuda> =
    Some(cuda(|bytes, _| CudaPlan::grid([params::<SqueezeExciteParams>(bytes).images, 1, 1], 256)));

/// A thread for 16 bytes of the image.
const CUDA_ELEMENTS: Option<Cuda> = Some(Cuda {
    half: Some(|bytes, _| CudaPlan::items(elements(bytes), HALF_WIDE, 256)),
    ..cuda(|bytes, _| CudaPlan::items(elements(bytes), 4, 256))
});

static SUMS: Kernel = Kernel {
    name: "squeeze_excite_sums_f32",
    bindings: &[("x", Access::Read, Stored), ("part", Access::Write, F32)],
    cpu: cpu::sums,
    wgsl: WGSL,
    cuda: CUDA_SUMS,
    plan: plan_sums,
};

static GATE: Kernel = Kernel {
    name: "squeeze_excite_gate_f32",
    bindings: &[
        ("part", Access::Read, F32),
        ("w1", Access::Read, Stored),
        ("b1", Access::Read, F32),
        ("w2", Access::Read, Stored),
        ("b2", Access::Read, F32),
        ("mean", Access::Write, F32),
        ("hidden", Access::Write, F32),
        ("gate", Access::Write, F32),
    ],
    cpu: cpu::gate,
    wgsl: WGSL,
    cuda: CUDA_IMAGES,
    plan: plan_images,
};

static FWD: Kernel = Kernel {
    name: "squeeze_excite_fwd_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("gate", Access::Read, F32),
        ("y", Access::Write, Stored),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: CUDA_ELEMENTS,
    plan: plan_elements,
};

static BWD_SUMS: Kernel = Kernel {
    name: "squeeze_excite_bwd_sums_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("dy", Access::Read, Stored),
        ("part", Access::Write, F32),
    ],
    cpu: cpu::bwd_sums,
    wgsl: WGSL,
    cuda: CUDA_SUMS,
    plan: plan_sums,
};

static BWD_GATE: Kernel = Kernel {
    name: "squeeze_excite_bwd_gate_f32",
    bindings: &[
        ("part", Access::Read, F32),
        ("w1", Access::Read, Stored),
        ("w2", Access::Read, Stored),
        ("hidden", Access::Read, F32),
        ("gate", Access::Read, F32),
        ("u", Access::Write, F32),
        ("v", Access::Write, F32),
        ("dmean", Access::Write, F32),
    ],
    cpu: cpu::bwd_gate,
    wgsl: WGSL,
    cuda: CUDA_IMAGES,
    plan: plan_images,
};

static BWD_WEIGHTS: Kernel = Kernel {
    name: "squeeze_excite_bwd_weights_f32",
    bindings: &[
        ("u", Access::Read, F32),
        ("v", Access::Read, F32),
        ("mean", Access::Read, F32),
        ("hidden", Access::Read, F32),
        ("dw1", Access::Write, F32),
        ("db1", Access::Write, F32),
        ("dw2", Access::Write, F32),
        ("db2", Access::Write, F32),
    ],
    cpu: cpu::bwd_weights,
    wgsl: WGSL,
    cuda: Some(cuda(|bytes, _| CudaPlan::items(weights(bytes), 1, 256))),
    plan: |bytes, _| Plan::items(weights(bytes), 256),
};

/// Elements of both weights.
fn weights(bytes: &[u8]) -> usize {
    let p: SqueezeExciteParams = params(bytes);
    2 * p.channels as usize * p.squeezed as usize
}

static BWD: Kernel = Kernel {
    name: "squeeze_excite_bwd_f32",
    bindings: &[
        ("dy", Access::Read, Stored),
        ("gate", Access::Read, F32),
        ("dmean", Access::Read, F32),
        ("dx", Access::Write, Stored),
    ],
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: CUDA_ELEMENTS,
    plan: plan_elements,
};

/// `y = x * sigmoid(w2 silu(w1 m + b1) + b2)` with m the mean of x over an image's pixels: x and y `[N, H, W, C]`, w1 `[S, C]`, b1 `[S]`,
/// w2 `[C, S]`, b2 `[C]`. Gradients for all five.
///
/// x may be f32, f16 or bf16; y and dx are stored as it is. So may the weights, both the same, whatever x is. Biases and the gradients
/// of all parameters are f32; means, layers and gate are computed in f32.
///
/// # Errors
/// [`Error::Shape`] where shapes or storage do not fit.
pub fn squeeze_excite(
    x: &Tensor,
    w1: &Tensor,
    b1: &Tensor,
    w2: &Tensor,
    b2: &Tensor,
) -> Result<Tensor> {
    let p = check(x, [w1, b1, w2, b2])?;
    let [n, c, s] = [p.images, p.channels, p.squeezed].map(|v| v as usize);
    let empty = |shape: &[usize]| Tensor::empty(x.device(), shape);
    let (mean, hidden, gate) = (empty(&[n, c])?, empty(&[n, 2, s])?, empty(&[n, c])?);
    let part = empty(&[n, p.blocks as usize, c])?;
    SUMS.launch(&p, &[x, &part])?;
    GATE.launch(&p, &[&part, w1, b1, w2, b2, &mean, &hidden, &gate])?;
    let y = x.empty_like()?;
    FWD.launch(&p, &[x, &gate, &y])?;
    let saved = Saved { p, x: x.detach(), weights: [w1.detach(), w2.detach()], mean, hidden, gate };
    Ok(tape::record(OP, &[x, w1, b1, w2, b2], y, move |dy, needs| saved.backward(dy, needs)))
}

fn check(x: &Tensor, [w1, b1, w2, b2]: [&Tensor; 4]) -> Result<SqueezeExciteParams> {
    require_float(OP, "x", x)?;
    require_float(OP, "w1", w1)?;
    require_same(OP, ("w1", w1), "w2", w2)?;
    require_f32(OP, "b1", b1)?;
    require_f32(OP, "b2", b2)?;
    let [n, h, w, c] = x.dims(OP, "x")?;
    let [s, _] = w1.dims(OP, "w1")?;
    let wanted: [(_, _, &[usize]); 4] =
        [("w1", w1, &[s, c]), ("b1", b1, &[s]), ("w2", w2, &[c, s]), ("b2", b2, &[c])];
    if let Some((name, t, shape)) = wanted.into_iter().find(|(_, t, shape)| t.shape() != *shape) {
        let message = format!(
            "{name} must be {shape:?} for x {:?} and {s} squeezed channels (the rows of w1), but it is {:?}",
            x.shape(),
            t.shape()
        );
        return Err(Error::shape(OP, message));
    }
    let cut = Blocks::new(h * w, c);
    Ok(SqueezeExciteParams {
        images: n as u32,
        pixels: cut.rows,
        channels: cut.channels,
        squeezed: s as u32,
        pixels_per_block: cut.rows_per_block,
        blocks: cut.blocks,
    })
}

struct Saved {
    p: SqueezeExciteParams,
    x: Tensor,
    weights: [Tensor; 2],
    /// `[N, C]`
    mean: Tensor,
    /// `[N, 2, S]`: z and silu(z).
    hidden: Tensor,
    /// `[N, C]`
    gate: Tensor,
}

impl Saved {
    /// Gradients of x, w1, b1, w2 and b2.
    fn backward(self, dy: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Self { p, x, weights: [w1, w2], mean, hidden, gate } = self;
        let [n, c, s] = [p.images, p.channels, p.squeezed].map(|v| v as usize);
        let empty = |shape: &[usize]| Tensor::empty(dy.device(), shape);
        let part = empty(&[n, p.blocks as usize, c])?;
        BWD_SUMS.launch(&p, &[&x, dy, &part])?;
        let (u, v, dmean) = (empty(&[n, c])?, empty(&[n, s])?, empty(&[n, c])?);
        BWD_GATE.launch(&p, &[&part, &w1, &w2, &hidden, &gate, &u, &v, &dmean])?;
        let mut grads = vec![None; 5];
        if needs[1..].contains(&true) {
            let (dw1, db1) = (empty(&[s, c])?, empty(&[s])?);
            let (dw2, db2) = (empty(&[c, s])?, empty(&[c])?);
            BWD_WEIGHTS.launch(&p, &[&u, &v, &mean, &hidden, &dw1, &db1, &dw2, &db2])?;
            grads = vec![None, Some(dw1), Some(db1), Some(dw2), Some(db2)];
        }
        if needs[0] {
            let dx = dy.empty_like()?;
            BWD.launch(&p, &[dy, &gate, &dmean, &dx])?;
            grads[0] = Some(dx);
        }
        Ok(grads)
    }
}
