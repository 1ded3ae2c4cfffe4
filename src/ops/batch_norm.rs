//! Batch norm fused with what follows it: `y = act(bn(x) + residual)`.
//!
//! With the batch's mean and biased variance in training, the running ones in inference (Ioffe and Szegedy 2015; running
//! statistics as PyTorch keeps them: `new = old + momentum * (batch - old)`, the variance unbiased):
//!
//! ```text
//! xhat = (x - mean) / sqrt(var + eps)      z = weight * xhat + bias + residual      y = act(z)
//! ```
//!
//! What forward and backward need of each channel stands in one small table `[4, C]`: mean, 1 / sqrt(var + eps),
//! weight / sqrt(var + eps), bias. So every pass over the image binds one tensor for all of it, and later changes of
//! weight or running statistics do not reach a backward that is still to come.
//!
//! Backward, with `g = dy * act'(z)`, sums and means over a channel's `rows = N * H * W` values:
//!
//! ```text
//! dbias = sum g     dweight = sum g * xhat     dresidual = g
//! dx = weight / sqrt(var + eps) * (g - mean(g) - xhat * mean(g * xhat))     (inference: without the two means)
//! ```

use super::columns::{HALF_WIDE, half_column_plan};
use super::reduce::{Blocks, GROUP, block_plan, column_plan};
use crate::cpu::batch_norm as cpu;
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
pub(super) use spec::options;

const OP: &str = "batch_norm";
const WGSL: &str = include_str!("../../shaders/batch_norm.wgsl");

/// The activation that a fused op ends with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// `y = z`
    #[default]
    None,
    /// `y = max(z, 0)`
    Relu,
    /// `y = z * sigmoid(z)`
    Silu,
}

pub(crate) const ACT_RELU: u32 = 1;
pub(crate) const ACT_SILU: u32 = 2;

impl Activation {
    /// Its number in parameter blocks.
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Relu => ACT_RELU,
            Self::Silu => ACT_SILU,
        }
    }
}

/// Options of [`batch_norm`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNorm {
    /// Added to the variance.
    pub eps: f32,
    /// Share of the batch in the new running statistics.
    pub momentum: f32,
    /// Normalise with the batch's statistics and update the running ones; else normalise with the running ones.
    pub training: bool,
    /// What follows.
    pub act: Activation,
}

impl Default for BatchNorm {
    /// PyTorch's defaults, in training mode.
    fn default() -> Self {
        Self { eps: 1e-5, momentum: 0.1, training: true, act: Activation::None }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct BatchNormParams {
    pub(crate) rows: u32,
    pub(crate) channels: u32,
    pub(crate) rows_per_block: u32,
    pub(crate) blocks: u32,
    /// 0 none, 1 ReLU, 2 SiLU.
    pub(crate) act: u32,
    /// Whether there is a residual (1) or not (0); so for the next two.
    pub(crate) residual: u32,
    pub(crate) residual_grad: u32,
    pub(crate) training: u32,
    pub(crate) eps: f32,
    pub(crate) momentum: f32,
}

impl BatchNormParams {
    /// Whether the backward reads a third image, see [`third`].
    pub(crate) fn has_third(&self) -> bool {
        self.residual != 0 && self.act != 0
    }
}

fn plan_blocks(bytes: &[u8], _: &crate::Caps) -> Plan {
    let p: BatchNormParams = params(bytes);
    block_plan(p.channels, p.blocks)
}

fn plan_channels(bytes: &[u8], _: &crate::Caps) -> Plan {
    Plan::items(params::<BatchNormParams>(bytes).channels as usize, GROUP)
}

fn plan_elements(bytes: &[u8], _: &crate::Caps) -> Plan {
    Plan::items(elements(bytes), 256)
}

const fn cuda(plan: fn(&[u8], &crate::Caps) -> CudaPlan) -> Cuda {
    Cuda { text: cuda_text!("batch_norm"), half: None, plan }
}

/// A block for some rows and channels.
const CUDA_BLOCKS: Option<Cuda> = Some(Cuda {
    half: Some(|bytes, _| {
        let p: BatchNormParams = params(bytes);
        half_column_plan(p.channels, p.blocks)
    }),
    ..cuda(|bytes, _| {
        let p: BatchNormParams = params(bytes);
        column_plan(p.channels, p.blocks)
    })
});

/// Channels whose blocks a workgroup (CUDA: a block of 32 rows of threads) joins.
const FINISHED: u32 = 8;

/// A thread a channel; all in f32.
const CUDA_CHANNELS: Option<Cuda> = Some(cuda(|bytes, _| {
    CudaPlan::items(params::<BatchNormParams>(bytes).channels as usize, 1, 64)
}));

/// A thread for 16 bytes of the image.
const CUDA_ELEMENTS: Option<Cuda> = Some(Cuda {
    half: Some(|bytes, _| CudaPlan::items(elements(bytes), HALF_WIDE, 256)),
    ..cuda(|bytes, _| CudaPlan::items(elements(bytes), 4, 256))
});

fn elements(bytes: &[u8]) -> usize {
    let p: BatchNormParams = params(bytes);
    p.rows as usize * p.channels as usize
}

static STATS: Kernel = Kernel {
    name: "batch_norm_stats_f32",
    bindings: &[("x", Access::Read, Stored), ("part", Access::Write, F32)],
    cpu: cpu::stats,
    wgsl: WGSL,
    cuda: CUDA_BLOCKS,
    plan: plan_blocks,
};

static FINISH: Kernel = Kernel {
    name: "batch_norm_finish_f32",
    bindings: &[
        ("part", Access::Read, F32),
        ("weight", Access::Read, F32),
        ("bias", Access::Read, F32),
        ("running_mean", Access::ReadWrite, F32),
        ("running_var", Access::ReadWrite, F32),
        ("table", Access::Write, F32),
    ],
    cpu: cpu::finish,
    wgsl: WGSL,
    cuda: Some(cuda(|bytes, _| {
        let channels = params::<BatchNormParams>(bytes).channels;
        CudaPlan::grid([channels.div_ceil(FINISHED), 1, 1], FINISHED * 32)
    })),
    plan: |bytes, _| Plan::items(params::<BatchNormParams>(bytes).channels as usize, FINISHED),
};

static TABLE: Kernel = Kernel {
    name: "batch_norm_table_f32",
    bindings: &[
        ("weight", Access::Read, F32),
        ("bias", Access::Read, F32),
        ("running_mean", Access::Read, F32),
        ("running_var", Access::Read, F32),
        ("table", Access::Write, F32),
    ],
    cpu: cpu::table,
    wgsl: WGSL,
    cuda: CUDA_CHANNELS,
    plan: plan_channels,
};

static FWD: Kernel = Kernel {
    name: "batch_norm_fwd_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("residual", Access::Read, Stored),
        ("table", Access::Read, F32),
        ("y", Access::Write, Stored),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: CUDA_ELEMENTS,
    plan: plan_elements,
};

static BWD_SUMS: Kernel = Kernel {
    name: "batch_norm_bwd_sums_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("dy", Access::Read, Stored),
        ("third", Access::Read, Stored),
        ("table", Access::Read, F32),
        ("part", Access::Write, F32),
    ],
    cpu: cpu::bwd_sums,
    wgsl: WGSL,
    cuda: CUDA_BLOCKS,
    plan: plan_blocks,
};

static BWD_FINISH: Kernel = Kernel {
    name: "batch_norm_bwd_finish_f32",
    bindings: &[
        ("part", Access::Read, F32),
        ("dweight", Access::Write, F32),
        ("dbias", Access::Write, F32),
    ],
    cpu: cpu::bwd_finish,
    wgsl: WGSL,
    cuda: CUDA_CHANNELS,
    plan: plan_channels,
};

static BWD: Kernel = Kernel {
    name: "batch_norm_bwd_f32",
    bindings: &[
        ("x", Access::Read, Stored),
        ("dy", Access::Read, Stored),
        ("third", Access::Read, Stored),
        ("table", Access::Read, F32),
        ("dweight", Access::Read, F32),
        ("dbias", Access::Read, F32),
        ("dx", Access::Write, Stored),
        ("dresidual", Access::Write, Stored),
    ],
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: CUDA_ELEMENTS,
    plan: plan_elements,
};

/// `act(bn(x) + residual)`: `x [.., C]` (an image is `[N, H, W, C]`), `weight`, `bias` and the running statistics `[C]`,
/// the residual shaped as x. In training `running_mean` and `running_var` are updated in place.
///
/// x and the residual may be f32, f16 or bf16, both the same; y and their gradients are stored as they are. All that is one number
/// a channel, gradients too, is f32.
///
/// # Errors
/// [`Error::Shape`] where shapes or dtypes do not fit, or a training batch has one value a channel (it has no variance).
pub fn batch_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    running_mean: &Tensor,
    running_var: &Tensor,
    residual: Option<&Tensor>,
    opt: BatchNorm,
) -> Result<Tensor> {
    let norm = [
        ("weight", weight),
        ("bias", bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ];
    let p = check(OP, ("x", x), norm, residual, opt)?;
    if !opt.training {
        return normalise(x, norm.map(|n| n.1), residual, p, None);
    }
    let part = Tensor::empty(x.device(), &[p.blocks as usize, 2, p.channels as usize])?;
    STATS.launch(&p, &[x, &part])?;
    normalise(x, norm.map(|n| n.1), residual, p, Some((&part, p.rows_per_block)))
}

/// All that follows the statistics, on the tape: with the means and sums of squared deviations of blocks of so many rows
/// (`[blocks, 2, C]`, as [`STATS`] gives them) in training, else with the running statistics.
pub(super) fn normalise(
    x: &Tensor,
    norm: [&Tensor; 4],
    residual: Option<&Tensor>,
    p: BatchNormParams,
    part: Option<(&Tensor, u32)>,
) -> Result<Tensor> {
    let table = table(x, norm, p, part)?;
    let y = x.empty_like()?;
    FWD.launch(&p, &[x, residual.unwrap_or(x), &table, &y])?;

    let [weight, bias, ..] = norm;
    let mut inputs = vec![x, weight, bias];
    inputs.extend(residual);
    let saved = Saved { p, x: x.detach(), third: third(x, residual, &y, p.act), table };
    Ok(tape::record(OP, &inputs, y, move |dy, needs| saved.backward(dy, needs)))
}

/// The table `[4, C]` for an image on the device of `x`; with `part`, the running statistics are updated.
pub(super) fn table(
    x: &Tensor,
    [weight, bias, mean, var]: [&Tensor; 4],
    p: BatchNormParams,
    part: Option<(&Tensor, u32)>,
) -> Result<Tensor> {
    let table = Tensor::empty(x.device(), &[4, p.channels as usize])?;
    match part {
        Some((part, rows_per_block)) => {
            let blocks = p.rows.div_ceil(rows_per_block);
            let p = BatchNormParams { rows_per_block, blocks, ..p };
            FINISH.launch(&p, &[part, weight, bias, mean, var, &table])?;
        }
        None => TABLE.launch(&p, &[weight, bias, mean, var, &table])?,
    }
    Ok(table)
}

/// The image that the activation's slope depends on beside x: with ReLU and a residual the output, with SiLU and a
/// residual the residual. Otherwise x alone decides, and stands in where something has to be bound.
fn third(x: &Tensor, residual: Option<&Tensor>, y: &Tensor, act: u32) -> Tensor {
    match (act, residual) {
        (ACT_RELU, Some(_)) => y.detach(),
        (ACT_SILU, Some(residual)) => residual.detach(),
        _ => x.detach(),
    }
}

struct Saved {
    p: BatchNormParams,
    x: Tensor,
    third: Tensor,
    table: Tensor,
}

impl Saved {
    /// Gradients of x, weight, bias and, where there is one, the residual.
    fn backward(self, dy: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Self { mut p, x, third, table } = self;
        let device = dy.device();
        let channels = p.channels as usize;
        let wants_residual = needs.get(3) == Some(&true);
        // Without an activation the residual's gradient is dy itself.
        p.residual_grad = u32::from(wants_residual && p.act != 0);

        let dweight = Tensor::empty(device, &[channels])?;
        let dbias = Tensor::empty(device, &[channels])?;
        if p.training != 0 || needs[1] || needs[2] {
            let part = Tensor::empty(device, &[p.blocks as usize, 2, channels])?;
            BWD_SUMS.launch(&p, &[&x, dy, &third, &table, &part])?;
            BWD_FINISH.launch(&p, &[&part, &dweight, &dbias])?;
        }
        let mut dresidual = wants_residual.then(|| dy.clone());
        let mut dx = None;
        if needs[0] || p.residual_grad != 0 {
            let image = x.empty_like()?;
            let residual = match p.residual_grad {
                0 => Tensor::uninit(device, &[4], x.dtype())?,
                _ => x.empty_like()?,
            };
            BWD.launch(&p, &[&x, dy, &third, &table, &dweight, &dbias, &image, &residual])?;
            dx = Some(image);
            if p.residual_grad != 0 {
                dresidual = Some(residual);
            }
        }
        Ok(vec![dx, Some(dweight), Some(dbias), dresidual])
    }
}

/// The parameter block, where the shapes fit: the one place where they are checked. The image and what is one number a channel
/// (weight, bias, running mean and variance) come with their names in errors of `op`.
pub(super) fn check(
    op: &'static str,
    (name_x, x): (&str, &Tensor),
    per_channel: [(&str, &Tensor); 4],
    residual: Option<&Tensor>,
    opt: BatchNorm,
) -> Result<BatchNormParams> {
    require_float(op, name_x, x)?;
    let (Some(&channels), true) = (x.shape().last(), x.shape().len() >= 2) else {
        let message = format!("{name_x} must be [N, .., C], but its shape is {:?}", x.shape());
        return Err(Error::shape(op, message));
    };
    for (name, t) in per_channel {
        require_f32(op, name, t)?;
        if t.shape() != [channels] {
            let (given, x) = (t.shape(), x.shape());
            let message = format!(
                "{name} must be [{channels}], one number a channel of {name_x} {x:?}, but it is {given:?}"
            );
            return Err(Error::shape(op, message));
        }
    }
    if let Some(residual) = residual {
        require_same(op, (name_x, x), "residual", residual)?;
        if residual.shape() != x.shape() {
            let message = format!(
                "residual must be shaped as {name_x}, {:?}, but it is {:?}",
                x.shape(),
                residual.shape()
            );
            return Err(Error::shape(op, message));
        }
    }
    let rows = x.numel() / channels;
    if opt.training && rows == 1 {
        let message = format!(
            "training needs more than one value a channel, but {name_x} is {:?}; use a larger batch or image, or evaluation mode",
            x.shape()
        );
        return Err(Error::shape(op, message));
    }
    let Blocks { rows, channels, rows_per_block, blocks } = Blocks::new(rows, channels);
    Ok(BatchNormParams {
        rows,
        channels,
        rows_per_block,
        blocks,
        act: opt.act.code(),
        residual: u32::from(residual.is_some()),
        residual_grad: 0,
        training: u32::from(opt.training),
        eps: opt.eps,
        momentum: opt.momentum,
    })
}
