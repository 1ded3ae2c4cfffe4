//! Layer norm along the last axis (Ba, Kiros and Hinton 2016).
//!
//! ```text
//! xhat = (x - mean) / sqrt(var + eps)      y = weight * xhat + bias      (mean and biased variance of each row)
//! g = dy * weight      dx = (g - mean(g) - xhat * mean(g * xhat)) / sqrt(var + eps)
//! dbias = sum over rows of dy      dweight = sum over rows of dy * xhat
//! ```

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use super::columns::half_column_plan;
use super::reduce::{Blocks, GROUP, block_plan, column_plan};
use crate::Caps;
use crate::cpu::layer_norm as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, Cuda, CudaPlan, F32, Kernel, Plan, Stored, cuda_text, params, require_f32,
    require_float,
};
use crate::tape;
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

const OP: &str = "layer_norm";
const WGSL: &str = concat!(
    include_str!("../../shaders/group.wgsl"),
    include_str!("../../shaders/layer_norm.wgsl")
);

/// Options of [`layer_norm`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f32,
}

impl Default for LayerNorm {
    /// PyTorch's default.
    fn default() -> Self {
        Self { eps: 1e-5 }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct LayerNormParams {
    pub(crate) rows: u32,
    pub(crate) channels: u32,
    pub(crate) rows_per_block: u32,
    pub(crate) blocks: u32,
    pub(crate) eps: f32,
}

/// One workgroup a row.
fn plan_rows(bytes: &[u8], _: &Caps) -> Plan {
    Plan::items(params::<LayerNormParams>(bytes).rows as usize, 1)
}

const fn cuda(plan: fn(&[u8], &Caps) -> CudaPlan) -> Cuda {
    Cuda { text: cuda_text!("layer_norm"), half: None, plan }
}

/// One warp a row, eight a block.
fn cuda_rows(bytes: &[u8], _: &Caps) -> CudaPlan {
    CudaPlan::items(params::<LayerNormParams>(bytes).rows as usize * 32, 1, 256)
}

static FWD: Kernel = Kernel {
    name: "layer_norm_fwd_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("weight", Access::Read, F32),
        ("bias", Access::Read, F32),
        ("y", Access::Write, Stored),
        ("stats", Access::Write, F32),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: Some(cuda(cuda_rows)),
    plan: plan_rows,
};

static BWD: Kernel = Kernel {
    name: "layer_norm_bwd_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("dy", Access::Read, Stored),
        ("weight", Access::Read, F32),
        ("stats", Access::Read, F32),
        ("dx", Access::Write, Stored),
    ],
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: Some(cuda(cuda_rows)),
    plan: plan_rows,
};

static BWD_SUMS: Kernel = Kernel {
    name: "layer_norm_bwd_sums_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("dy", Access::Read, Stored),
        ("stats", Access::Read, F32),
        ("part", Access::Write, F32),
    ],
    cpu: cpu::bwd_sums,
    wgsl: WGSL,
    cuda: Some(Cuda {
        half: Some(|bytes, _| {
            let p: LayerNormParams = params(bytes);
            half_column_plan(p.channels, p.blocks)
        }),
        ..cuda(|bytes, _| {
            let p: LayerNormParams = params(bytes);
            column_plan(p.channels, p.blocks)
        })
    }),
    plan: |bytes, _| {
        let p: LayerNormParams = params(bytes);
        block_plan(p.channels, p.blocks)
    },
};

static BWD_FINISH: Kernel = Kernel {
    name: "layer_norm_bwd_finish_f32",
    bindings: &[
        ("part", Access::Read, F32),
        ("dweight", Access::Write, F32),
        ("dbias", Access::Write, F32),
    ],
    cpu: cpu::bwd_finish,
    wgsl: WGSL,
    cuda: Some(cuda(|bytes, _| {
        CudaPlan::items(params::<LayerNormParams>(bytes).channels as usize, 1, 64)
    })),
    plan: |bytes, _| Plan::items(params::<LayerNormParams>(bytes).channels as usize, GROUP),
};

/// Normalises every row of `x [.., C]` to mean 0 and variance 1, then scales and shifts by `weight` and `bias [C]`.
///
/// x may be f32, f16 or bf16; y and dx are stored as it is. Weight, bias and their gradients are f32.
///
/// # Errors
/// [`Error::Shape`] where weight or bias do not have the length of the last axis or are not f32, or x is u32.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, opt: LayerNorm) -> Result<Tensor> {
    let p = check(x, weight, bias, opt)?;
    let channels = p.channels as usize;
    let y = x.empty_like()?;
    let stats = Tensor::empty(x.device(), &[p.rows as usize, 2])?;
    FWD.launch(&p, &[x, weight, bias, &y, &stats])?;
    let (x_saved, weight_saved) = (x.detach(), weight.detach());
    Ok(tape::record(OP, &[x, weight, bias], y, move |dy, needs| {
        let (x, device) = (x_saved, dy.device());
        let mut grads = vec![None, None, None];
        if needs[0] {
            let dx = x.empty_like()?;
            BWD.launch(&p, &[&x, dy, &weight_saved, &stats, &dx])?;
            grads[0] = Some(dx);
        }
        if needs[1] || needs[2] {
            let part = Tensor::empty(device, &[p.blocks as usize, 2, channels])?;
            let dweight = Tensor::empty(device, &[channels])?;
            let dbias = Tensor::empty(device, &[channels])?;
            BWD_SUMS.launch(&p, &[&x, dy, &stats, &part])?;
            BWD_FINISH.launch(&p, &[&part, &dweight, &dbias])?;
            (grads[1], grads[2]) = (Some(dweight), Some(dbias));
        }
        Ok(grads)
    }))
}

fn check(x: &Tensor, weight: &Tensor, bias: &Tensor, opt: LayerNorm) -> Result<LayerNormParams> {
    require_float(OP, "x", x)?;
    let channels = x.shape().last().copied().unwrap_or(1);
    for (name, t) in [("weight", weight), ("bias", bias)] {
        require_f32(OP, name, t)?;
        if t.shape() != [channels] {
            let (given, x) = (t.shape(), x.shape());
            let message = format!(
                "{name} must be [{channels}], the last axis of x {x:?}, but it is {given:?}"
            );
            return Err(Error::shape(OP, message));
        }
    }
    let Blocks { rows, channels, rows_per_block, blocks } =
        Blocks::new(x.numel() / channels, channels);
    Ok(LayerNormParams { rows, channels, rows_per_block, blocks, eps: opt.eps })
}

fn cases() -> Vec<Case> {
    let case = |label, shape: &[usize]| with_weights(Case::new(label).normal("x", shape), shape);
    let offset = Case::new("mean 1000, deviation 1").uniform("x", &[3, 48], 998.0, 1002.0);
    vec![
        case("tokens", &[2, 5, 16]),
        case("odd", &[7, 33]).attr("eps", 1e-6),
        case("129 channels", &[2, 1, 129]),
        case("12 channels", &[3, 12]),
        case("264 channels", &[9, 264]).no_gradcheck(),
        case("two channels", &[5, 2]).attr("eps", 1e-3),
        // x itself has 6e-5 of rounding at 1000, and dividing by the deviation keeps it.
        with_weights(offset, &[3, 48]).tolerance(1e-3, 1e-3),
        case("several blocks", &[300, 65]).no_gradcheck(),
    ]
}

fn with_weights(case: Case, shape: &[usize]) -> Case {
    let channels = &shape[shape.len() - 1..];
    case.uniform("weight", channels, 0.5, 1.5).uniform("bias", channels, -1.0, 1.0)
}

fn run(attrs: &Attrs, t: &Tensors) -> Result<Tensors> {
    let opt = LayerNorm { eps: attrs.f64("eps", 1e-5)? as f32 };
    let y = layer_norm(need(OP, t, "x")?, need(OP, t, "weight")?, need(OP, t, "bias")?, opt)?;
    Ok(Tensors::from([("y".into(), y)]))
}

fn reference(attrs: &Attrs, a: &Arrays) -> Result<Arrays> {
    let (x, weight, bias) = (need(OP, a, "x")?, need(OP, a, "weight")?, need(OP, a, "bias")?);
    let eps = attrs.f64("eps", 1e-5)?;
    let channels = weight.data.len();
    let mut data = Vec::new();
    for row in x.data.chunks(channels) {
        let mean = row.iter().sum::<f64>() / channels as f64;
        let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / channels as f64;
        let xhat = row.iter().map(|v| (v - mean) / (var + eps).sqrt());
        data.extend(xhat.enumerate().map(|(c, xhat)| weight.data[c] * xhat + bias.data[c]));
    }
    Ok(Arrays::from([("y".into(), Array { shape: x.shape.clone(), data })]))
}

/// Conformance of [`layer_norm`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[
        Port::new("x", Layout::Plain).stored(),
        Port::new("weight", Layout::Plain),
        Port::new("bias", Layout::Plain),
    ],
    outputs: &[Port::new("y", Layout::Plain).stored()],
    attrs: &["eps"],
    cases,
    run,
    reference,
};
