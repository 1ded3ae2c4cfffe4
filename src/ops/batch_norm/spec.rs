//! Conformance of batch norm: cases, and the formulas of `batch_norm.rs` by plain loops.

use super::{Activation, BatchNorm, OP, batch_norm};
use crate::error::{Error, Result};
use crate::ops::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use crate::tensor::Tensor;

fn case(label: &str, shape: &[usize], training: bool, act: &str, residual: bool) -> Case {
    let case = without_x(label, shape, training, act).normal("x", shape);
    if residual { case.normal("residual", shape) } else { case }
}

fn without_x(label: &str, shape: &[usize], training: bool, act: &str) -> Case {
    let channels = &shape[shape.len() - 1..];
    Case::new(label)
        .attr("training", training)
        .attr("act", act)
        .uniform("weight", channels, 0.5, 1.5)
        .uniform("bias", channels, -1.0, 1.0)
        .uniform("running_mean", channels, -1.0, 1.0)
        .uniform("running_var", channels, 0.5, 2.0)
}

fn cases() -> Vec<Case> {
    let offset = without_x("mean 1000, deviation 1", &[2, 7, 9, 3], true, "none");
    vec![
        case("training", &[2, 3, 5, 7], true, "none", false),
        case("training, ReLU", &[2, 5, 3, 9], true, "relu", false),
        case("training, ReLU, residual", &[3, 3, 3, 8], true, "relu", true),
        case("training, SiLU", &[1, 7, 5, 3], true, "silu", false),
        case("training, SiLU, residual", &[2, 4, 5, 5], true, "silu", true),
        case("training, residual", &[1, 7, 1, 33], true, "none", true),
        case("one channel", &[1, 9, 13, 1], true, "relu", false).attr("momentum", 0.9),
        case("inference", &[2, 3, 5, 7], false, "none", false),
        case("inference, ReLU, residual", &[1, 5, 5, 4], false, "relu", true),
        case("inference, SiLU, residual", &[2, 3, 3, 5], false, "silu", true).attr("eps", 1e-3),
        case("inference, one value", &[1, 1, 1, 4], false, "relu", false),
        // x itself has 6e-5 of rounding at 1000, and dividing by the deviation keeps it.
        offset.uniform("x", &[2, 7, 9, 3], 998.0, 1002.0).tolerance(1e-3, 1e-3),
        case("several blocks", &[3, 33, 29, 65], true, "relu", true).no_gradcheck(),
        // Accesses of 4, and of 8 in more than one chunk of channels.
        case("12 channels", &[2, 5, 3, 12], true, "silu", true),
        case("264 channels", &[1, 9, 13, 264], true, "relu", true).no_gradcheck(),
        case("129 channels", &[2, 9, 7, 129], true, "silu", false).no_gradcheck(),
    ]
}

/// The options that a case's attributes mean.
pub(in crate::ops) fn options(attrs: &Attrs) -> Result<BatchNorm> {
    let act = match attrs.str("act", "none")?.as_str() {
        "none" => Activation::None,
        "relu" => Activation::Relu,
        "silu" => Activation::Silu,
        other => {
            let message = format!("attribute 'act' is '{other}', expected none, relu or silu");
            return Err(Error::usage(message));
        }
    };
    Ok(BatchNorm {
        eps: attrs.f64("eps", 1e-5)? as f32,
        momentum: attrs.f64("momentum", 0.1)? as f32,
        training: attrs.bool("training", true)?,
        act,
    })
}

fn run(attrs: &Attrs, t: &Tensors) -> Result<Tensors> {
    let opt = options(attrs)?;
    let get = |name| need(OP, t, name);
    // Copies: the running statistics change in place, and a case's inputs must not.
    let copy = |t: &Tensor| t.to_device(t.device());
    let (mean, var) = (copy(get("running_mean")?)?, copy(get("running_var")?)?);
    let residual = t.get("residual");
    let y = batch_norm(get("x")?, get("weight")?, get("bias")?, &mean, &var, residual, opt)?;
    Ok([("y", y), ("running_mean", mean), ("running_var", var)].map(|(n, t)| (n.into(), t)).into())
}

fn reference(attrs: &Attrs, a: &Arrays) -> Result<Arrays> {
    let get = |name| need(OP, a, name);
    let (x, weight, bias) = (get("x")?, get("weight")?, get("bias")?);
    let (mut running_mean, mut running_var) =
        (get("running_mean")?.clone(), get("running_var")?.clone());
    let (eps, momentum) = (attrs.f64("eps", 1e-5)?, attrs.f64("momentum", 0.1)?);
    let training = attrs.bool("training", true)?;
    let act: fn(f64) -> f64 = match attrs.str("act", "none")?.as_str() {
        "relu" => |z| z.max(0.0),
        "silu" => |z| z / (1.0 + (-z).exp()),
        _ => |z| z,
    };
    let channels = weight.data.len();
    let rows = (x.data.len() / channels) as f64;
    let mut y = Array::zeros(&x.shape);
    for c in 0..channels {
        let (mut mean, mut var) = (running_mean.data[c], running_var.data[c]);
        if training {
            let values = || x.data.iter().skip(c).step_by(channels);
            mean = values().sum::<f64>() / rows;
            var = values().map(|v| (v - mean).powi(2)).sum::<f64>() / rows;
            running_mean.data[c] += momentum * (mean - running_mean.data[c]);
            running_var.data[c] += momentum * (var * rows / (rows - 1.0) - running_var.data[c]);
        }
        for i in (c..x.data.len()).step_by(channels) {
            let xhat = (x.data[i] - mean) / (var + eps).sqrt();
            let residual = a.get("residual").map_or(0.0, |r| r.data[i]);
            y.data[i] = act(weight.data[c] * xhat + bias.data[c] + residual);
        }
    }
    let out = [("y", y), ("running_mean", running_mean), ("running_var", running_var)];
    Ok(out.map(|(n, v)| (n.into(), v)).into())
}

/// Conformance of [`batch_norm()`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[
        Port::new("x", Layout::Image).stored(),
        Port::new("weight", Layout::Plain),
        Port::new("bias", Layout::Plain),
        Port::new("running_mean", Layout::Plain).no_grad(),
        Port::new("running_var", Layout::Plain).no_grad(),
        Port::new("residual", Layout::Image).stored().optional(),
    ],
    outputs: &[
        Port::new("y", Layout::Image).stored(),
        Port::new("running_mean", Layout::Plain).no_grad(),
        Port::new("running_var", Layout::Plain).no_grad(),
    ],
    attrs: &["training", "eps", "momentum", "act"],
    cases,
    run,
    reference,
};
