//! Fused optimiser steps over flat buffers: one launch reads every gradient once and writes parameters and state in place.
//!
//! SGD with momentum as PyTorch does it (dampening 0; the state starts at zero):
//!
//! ```text
//! g = grad + decay * param      momentum = mu * momentum + g      param -= lr * (momentum, or g + mu * momentum with nesterov)
//! ```
//!
//! AdamW (Loshchilov and Hutter 2019), step t = 1, 2, ..:
//!
//! ```text
//! param -= lr * decay * param      m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
//! param -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)
//! ```
//!
//! A mask, where there is one, multiplies the decay of each parameter: 0 spares norms and biases. A control
//! ([`super::clip_grad_norm()`]), where there is one, has the factor that each gradient is multiplied by first; 0 skips the step.

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use crate::cpu::optim_step as cpu;
use crate::error::{Error, Result};
use crate::kernel::{Access, Cuda, CudaPlan, F32, Kernel, Plan, cuda_text, params, require_f32};
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

const WGSL: &str = include_str!("../../shaders/optim_step.wgsl");

/// Options of [`sgd_step`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f32,
    /// mu, the share of the old momentum that is kept.
    pub momentum: f32,
    /// Multiple of the parameter added to its gradient.
    pub weight_decay: f32,
    /// Look ahead along the momentum (Nesterov, as PyTorch writes it).
    pub nesterov: bool,
}

impl Default for Sgd {
    /// Learning rate 0.1, momentum 0.9, no decay.
    fn default() -> Self {
        Self { lr: 0.1, momentum: 0.9, weight_decay: 0.0, nesterov: false }
    }
}

/// Options of [`adamw_step`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f32,
    /// Shares of the old means of gradient and squared gradient that are kept.
    pub betas: (f32, f32),
    /// Added to the root of the mean square.
    pub eps: f32,
    /// Share of a parameter taken off per unit of learning rate, apart from the gradient.
    pub weight_decay: f32,
}

impl Default for AdamW {
    /// PyTorch's defaults.
    fn default() -> Self {
        Self { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01 }
    }
}

/// What a step may be told beside gradients, state and settings. A mask alone may be given as an `Option`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guide<'a> {
    /// Multiplies the decay of each element; of the parameters' length.
    pub mask: Option<&'a Tensor>,
    /// What [`super::clip_grad_norm()`] made of the gradients: the step multiplies them by its factor, and does nothing where that is 0.
    pub control: Option<&'a Tensor>,
}

impl<'a> From<Option<&'a Tensor>> for Guide<'a> {
    fn from(mask: Option<&'a Tensor>) -> Self {
        Self { mask, control: None }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct SgdParams {
    pub(crate) len: u32,
    /// Whether a mask is bound (1) or not (0), and a control.
    pub(crate) masked: u32,
    pub(crate) controlled: u32,
    pub(crate) nesterov: u32,
    pub(crate) lr: f32,
    pub(crate) momentum: f32,
    pub(crate) weight_decay: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct AdamWParams {
    pub(crate) len: u32,
    pub(crate) masked: u32,
    pub(crate) controlled: u32,
    pub(crate) lr: f32,
    /// lr / (1 - beta1^t)
    pub(crate) step_size: f32,
    pub(crate) beta2: f32,
    /// 1 - beta1 and 1 - beta2, taken in f64: in f32 half of the digits of 1 - 0.999 are lost.
    pub(crate) rest1: f32,
    pub(crate) rest2: f32,
    /// 1 / sqrt(1 - beta2^t)
    pub(crate) inv_root: f32,
    pub(crate) eps: f32,
    pub(crate) weight_decay: f32,
}

static SGD: Kernel = Kernel {
    name: "sgd_step_f32",
    bindings: &[
        ("grad", Access::Read, F32),
        ("mask", Access::Read, F32),
        ("control", Access::Read, F32),
        ("param", Access::ReadWrite, F32),
        ("momentum", Access::ReadWrite, F32),
    ],
    cpu: cpu::sgd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("optim_step"),
        half: None,
        plan: |bytes, _| CudaPlan::items(params::<SgdParams>(bytes).len as usize, 4, 256),
    }),
    plan: |bytes, _| Plan::items(params::<SgdParams>(bytes).len as usize, 256),
};

static ADAMW: Kernel = Kernel {
    name: "adamw_step_f32",
    bindings: &[
        ("grad", Access::Read, F32),
        ("mask", Access::Read, F32),
        ("control", Access::Read, F32),
        ("param", Access::ReadWrite, F32),
        ("mean", Access::ReadWrite, F32),
        ("square", Access::ReadWrite, F32),
    ],
    cpu: cpu::adamw,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("optim_step"),
        half: None,
        plan: |bytes, _| CudaPlan::items(params::<AdamWParams>(bytes).len as usize, 4, 256),
    }),
    plan: |bytes, _| Plan::items(params::<AdamWParams>(bytes).len as usize, 256),
};

/// One SGD step, in place: `param` and `momentum` change; all are flat f32 tensors of one length.
///
/// # Errors
/// [`Error::Shape`] where lengths or dtypes differ or tensors share memory.
pub fn sgd_step<'a>(
    param: &Tensor,
    grad: &Tensor,
    momentum: &Tensor,
    guide: impl Into<Guide<'a>>,
    opt: Sgd,
) -> Result<()> {
    let Guide { mask, control } = guide.into();
    check("sgd_step", param, &[("grad", grad), ("momentum", momentum)], mask, control)?;
    let p = SgdParams {
        len: param.numel() as u32,
        masked: u32::from(mask.is_some()),
        controlled: u32::from(control.is_some()),
        nesterov: u32::from(opt.nesterov),
        lr: opt.lr,
        momentum: opt.momentum,
        weight_decay: opt.weight_decay,
    };
    SGD.launch(&p, &[grad, mask.unwrap_or(grad), control.unwrap_or(grad), param, momentum])
}

/// One AdamW step, in place: `param`, `mean` (of the gradient) and `square` (mean of its square) change. `step` counts
/// from 1. All are flat f32 tensors of one length.
///
/// # Errors
/// [`Error::Shape`] where lengths or dtypes differ, tensors share memory, or the step is 0.
pub fn adamw_step<'a>(
    param: &Tensor,
    grad: &Tensor,
    (mean, square): (&Tensor, &Tensor),
    guide: impl Into<Guide<'a>>,
    opt: AdamW,
    step: u64,
) -> Result<()> {
    let Guide { mask, control } = guide.into();
    let others = [("grad", grad), ("mean", mean), ("square", square)];
    check("adamw_step", param, &others, mask, control)?;
    if step == 0 {
        return Err(Error::shape("adamw_step", "steps count from 1, but step 0 was given"));
    }
    // 1 - beta^t in f64: for the first steps of beta2 = 0.999 the difference is small.
    let correction = |beta: f32| 1.0 - f64::from(beta).powf(step as f64);
    let p = AdamWParams {
        len: param.numel() as u32,
        masked: u32::from(mask.is_some()),
        controlled: u32::from(control.is_some()),
        lr: opt.lr,
        step_size: (f64::from(opt.lr) / correction(opt.betas.0)) as f32,
        beta2: opt.betas.1,
        rest1: (1.0 - f64::from(opt.betas.0)) as f32,
        rest2: (1.0 - f64::from(opt.betas.1)) as f32,
        inv_root: (1.0 / correction(opt.betas.1).sqrt()) as f32,
        eps: opt.eps,
        weight_decay: opt.weight_decay,
    };
    let (mask, control) = (mask.unwrap_or(grad), control.unwrap_or(grad));
    ADAMW.launch(&p, &[grad, mask, control, param, mean, square])
}

fn check(
    op: &'static str,
    param: &Tensor,
    others: &[(&str, &Tensor)],
    mask: Option<&Tensor>,
    control: Option<&Tensor>,
) -> Result<()> {
    require_f32(op, "param", param)?;
    if let Some(control) = control {
        require_f32(op, "control", control)?;
        if control.shape() != [2] {
            let message = format!("control must be [2] (norm, factor), got {:?}", control.shape());
            return Err(Error::shape(op, message));
        }
    }
    for (name, t) in others.iter().copied().chain(mask.map(|mask| ("mask", mask))) {
        require_f32(op, name, t)?;
        if t.numel() != param.numel() {
            let (given, wanted) = (t.numel(), param.numel());
            let message =
                format!("{name} has {given} elements, param {wanted}; they must be equal");
            return Err(Error::shape(op, message));
        }
    }
    Ok(())
}

/// State that must not be negative is named in `square`.
fn case(label: &str, len: usize, state: &[&str], mask: bool) -> Case {
    let mut case = Case::new(label).normal("param", &[len]).normal("grad", &[len]).no_gradcheck();
    for name in state {
        let low = if *name == "square" { 0.0 } else { -1.0 };
        case = case.uniform(name, &[len], low, 1.0);
    }
    if mask { case.uniform("mask", &[len], 0.0, 1.0) } else { case }
}

/// The inputs that change in place, copied: a case's inputs must not.
fn copies<const N: usize>(op: &'static str, names: [&str; N], t: &Tensors) -> Result<[Tensor; N]> {
    let mut out = Vec::new();
    for name in names {
        let t = need(op, t, name)?;
        out.push(t.to_device(t.device())?);
    }
    out.try_into().map_err(|_| Error::shape(op, "one copy a name"))
}

const PARAM: Port = Port::new("param", Layout::Plain).no_grad();
const GRAD: Port = Port::new("grad", Layout::Plain).no_grad();
const MASK: Port = Port::new("mask", Layout::Plain).no_grad().optional();
const CONTROL: Port = Port::new("control", Layout::Plain).no_grad().optional();
const MOMENTUM: Port = Port::new("momentum", Layout::Plain).no_grad();
const MEAN: Port = Port::new("mean", Layout::Plain).no_grad();
const SQUARE: Port = Port::new("square", Layout::Plain).no_grad();

/// Conformance of [`sgd_step`].
pub(crate) static SGD_SPEC: OpSpec = OpSpec {
    name: "sgd_step",
    inputs: &[PARAM, GRAD, MOMENTUM, MASK, CONTROL],
    outputs: &[PARAM, MOMENTUM],
    attrs: &["lr", "momentum", "weight_decay", "nesterov"],
    cases: || {
        vec![
            case("one parameter", 1, &["momentum"], false),
            case("decay", 33, &["momentum"], false).attr("weight_decay", 0.1),
            case("masked decay, nesterov", 129, &["momentum"], true)
                .attr("weight_decay", 0.1)
                .attr("nesterov", true),
            case("several workgroups", 3001, &["momentum"], true).attr("weight_decay", 0.01),
            case("shorter gradients", 33, &["momentum"], true)
                .uniform("control", &[2], 0.2, 0.8)
                .attr("weight_decay", 0.1),
            case("skipped", 7, &["momentum"], false).uniform("control", &[2], 0.0, 0.0),
        ]
    },
    run: |attrs, t: &Tensors| {
        let [param, momentum] = copies("sgd_step", ["param", "momentum"], t)?;
        let opt = sgd_options(attrs)?;
        sgd_step(&param, need("sgd_step", t, "grad")?, &momentum, guide(t), opt)?;
        Ok(Tensors::from([("param".into(), param), ("momentum".into(), momentum)]))
    },
    reference: |attrs, a: &Arrays| {
        let opt = sgd_options(attrs)?;
        let get = |name| need("sgd_step", a, name);
        let (mut param, mut momentum) = (get("param")?.clone(), get("momentum")?.clone());
        let factor = factor(a);
        for (i, grad) in get("grad")?.data.iter().enumerate() {
            let Some(factor) = factor else { break };
            let decay = f64::from(opt.weight_decay) * mask_at(a, i);
            let mu = f64::from(opt.momentum);
            let g = factor * grad + decay * param.data[i];
            momentum.data[i] = mu * momentum.data[i] + g;
            let step = if opt.nesterov { g + mu * momentum.data[i] } else { momentum.data[i] };
            param.data[i] -= f64::from(opt.lr) * step;
        }
        Ok(Arrays::from([("param".into(), param), ("momentum".into(), momentum)]))
    },
};

fn guide(t: &Tensors) -> Guide<'_> {
    Guide { mask: t.get("mask"), control: t.get("control") }
}

/// What gradients are multiplied by; `None` for a step that is skipped.
fn factor(a: &Arrays) -> Option<f64> {
    let factor = a.get("control").map_or(1.0, |control: &Array| control.data[1]);
    (factor != 0.0).then_some(factor)
}

fn mask_at(a: &Arrays, i: usize) -> f64 {
    a.get("mask").map_or(1.0, |mask: &Array| mask.data[i])
}

fn sgd_options(attrs: &Attrs) -> Result<Sgd> {
    Ok(Sgd {
        lr: attrs.f64("lr", 0.1)? as f32,
        momentum: attrs.f64("momentum", 0.9)? as f32,
        weight_decay: attrs.f64("weight_decay", 0.0)? as f32,
        nesterov: attrs.bool("nesterov", false)?,
    })
}

/// Conformance of [`adamw_step`].
pub(crate) static ADAMW_SPEC: OpSpec = OpSpec {
    name: "adamw_step",
    inputs: &[PARAM, GRAD, MEAN, SQUARE, MASK, CONTROL],
    outputs: &[PARAM, MEAN, SQUARE],
    attrs: &["lr", "beta1", "beta2", "eps", "weight_decay", "step"],
    cases: || {
        let state = ["mean", "square"];
        vec![
            case("first step", 33, &state, false),
            case("masked decay", 129, &state, true).attr("weight_decay", 0.1).attr("step", 10),
            case("several workgroups", 3001, &state, true).attr("step", 1000).attr("lr", 0.01),
            case("shorter gradients", 33, &state, true).uniform("control", &[2], 0.2, 0.8),
            case("skipped", 7, &state, false).uniform("control", &[2], 0.0, 0.0),
        ]
    },
    run: |attrs, t: &Tensors| {
        let [param, mean, square] = copies("adamw_step", ["param", "mean", "square"], t)?;
        let (opt, step) = adamw_options(attrs)?;
        let grad = need("adamw_step", t, "grad")?;
        adamw_step(&param, grad, (&mean, &square), guide(t), opt, step)?;
        Ok([("param", param), ("mean", mean), ("square", square)]
            .map(|(n, t)| (n.into(), t))
            .into())
    },
    reference: |attrs, a: &Arrays| {
        let (opt, step) = adamw_options(attrs)?;
        let get = |name| need("adamw_step", a, name);
        let (mut param, mut mean) = (get("param")?.clone(), get("mean")?.clone());
        let mut square = get("square")?.clone();
        let [lr, b1, b2, eps] = [opt.lr, opt.betas.0, opt.betas.1, opt.eps].map(f64::from);
        let factor = factor(a);
        for (i, g) in get("grad")?.data.iter().enumerate() {
            let Some(g) = factor.map(|factor| factor * g) else { break };
            let (m, v) = (&mut mean.data[i], &mut square.data[i]);
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            let m_hat = *m / (1.0 - b1.powf(step as f64));
            let v_hat = *v / (1.0 - b2.powf(step as f64));
            let decay = lr * f64::from(opt.weight_decay) * mask_at(a, i);
            param.data[i] = param.data[i] * (1.0 - decay) - lr * m_hat / (v_hat.sqrt() + eps);
        }
        let out = [("param", param), ("mean", mean), ("square", square)];
        Ok(out.map(|(n, v)| (n.into(), v)).into())
    },
};

fn adamw_options(attrs: &Attrs) -> Result<(AdamW, u64)> {
    let opt = AdamW {
        lr: attrs.f64("lr", 1e-3)? as f32,
        betas: (attrs.f64("beta1", 0.9)? as f32, attrs.f64("beta2", 0.999)? as f32),
        eps: attrs.f64("eps", 1e-8)? as f32,
        weight_decay: attrs.f64("weight_decay", 0.01)? as f32,
    };
    Ok((opt, attrs.usize("step", 1)? as u64))
}
