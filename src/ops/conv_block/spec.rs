//! Conformance of [`conv_block`]: cases, and the references of its two parts put together.

use super::{ConvBlock, ConvBlockNorm, conv_block};
use crate::error::Result;
use crate::ops::case::{Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use crate::ops::{batch_norm, conv2d};

const OP: &str = "conv_block";

/// Conformance of [`conv_block`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[
        Port::new("x", Layout::Image).stored(),
        Port::new("weight", Layout::Weight).stored(),
        Port::new("gamma", Layout::Plain),
        Port::new("beta", Layout::Plain),
        Port::new("running_mean", Layout::Plain).no_grad(),
        Port::new("running_var", Layout::Plain).no_grad(),
        Port::new("residual", Layout::Image).stored().optional(),
    ],
    outputs: &[
        Port::new("y", Layout::Image).stored(),
        Port::new("running_mean", Layout::Plain).no_grad(),
        Port::new("running_var", Layout::Plain).no_grad(),
    ],
    attrs: &["stride", "padding", "dilation", "groups", "training", "eps", "momentum", "act"],
    cases,
    run,
    reference,
};

/// x `[n, h, w, c]` under a kernel of `k` x `k` to `o` channels, padding `k / 2`.
struct Shape {
    x: [usize; 4],
    o: usize,
    k: usize,
    stride: usize,
}

impl Shape {
    fn y(&self) -> [usize; 4] {
        let [n, h, w, _] = self.x;
        let side = |size: usize| (size + 2 * (self.k / 2) - self.k) / self.stride + 1;
        [n, side(h), side(w), self.o]
    }
}

fn case(label: &str, s: Shape, training: bool, act: &str, residual: bool) -> Case {
    let (k, o) = (s.k, s.o);
    let case = Case::new(label)
        .attr("stride", vec![s.stride; 2])
        .attr("padding", vec![k / 2; 2])
        .attr("training", training)
        .attr("act", act)
        .normal("x", &s.x)
        .uniform("weight", &[o, k, k, s.x[3]], -0.5, 0.5)
        .uniform("gamma", &[o], 0.5, 1.5)
        .uniform("beta", &[o], -1.0, 1.0)
        .uniform("running_mean", &[o], -1.0, 1.0)
        .uniform("running_var", &[o], 0.5, 2.0);
    if residual { case.normal("residual", &s.y()) } else { case }
}

fn cases() -> Vec<Case> {
    let shape = |x, o, k, stride| Shape { x, o, k, stride };
    let mut cases = vec![
        case("training, ReLU", shape([2, 5, 4, 4], 8, 3, 1), true, "relu", false),
        case("training, ReLU, residual", shape([1, 6, 5, 3], 7, 3, 1), true, "relu", true),
        case("training, SiLU, 1x1", shape([2, 3, 3, 8], 12, 1, 1), true, "silu", false),
        case("training, residual, stride 2", shape([2, 7, 5, 4], 5, 3, 2), true, "none", true),
        case("training, 1x1, stride 2", shape([2, 5, 7, 8], 8, 1, 2), true, "none", false),
        case(
            "training, few pixels, one channel",
            shape([5, 1, 1, 5], 1, 1, 1),
            true,
            "none",
            false,
        )
        .attr("momentum", 0.9),
        // No ReLU: among many numbers some lie so near its kink that rounding takes them across.
        case("training, several tiles", shape([2, 13, 11, 16], 72, 3, 1), true, "none", true)
            .no_gradcheck(),
        case("training, several tiles, odd", shape([1, 19, 15, 5], 67, 1, 1), true, "silu", true)
            .no_gradcheck(),
        case("evaluation, ReLU, residual", shape([1, 5, 4, 4], 8, 3, 1), false, "relu", true),
        case("evaluation, SiLU, one pixel", shape([1, 1, 1, 3], 5, 3, 1), false, "silu", false),
    ];
    // Without gradients, so that the norm is folded.
    for (label, shape, act, residual) in [
        ("folded", shape([1, 5, 4, 4], 8, 3, 1), "none", false),
        ("folded, ReLU, residual, odd", shape([2, 5, 7, 3], 7, 3, 2), "relu", true),
        ("folded, SiLU, several tiles", shape([2, 13, 11, 16], 72, 1, 1), "silu", true),
        ("folded, one pixel", shape([1, 1, 1, 9], 33, 1, 1), "silu", false),
    ] {
        cases.push(case(label, shape, false, act, residual).attr("eps", 1e-3).no_gradients());
    }
    cases
}

fn run(attrs: &Attrs, t: &Tensors) -> Result<Tensors> {
    let get = |name| need(OP, t, name);
    // Copies: the running statistics change in place, and a case's inputs must not.
    let (mean, var) = (get("running_mean")?, get("running_var")?);
    let (mean, var) = (mean.to_device(mean.device())?, var.to_device(var.device())?);
    let norm = ConvBlockNorm {
        weight: get("gamma")?,
        bias: get("beta")?,
        running_mean: &mean,
        running_var: &var,
    };
    let opt = ConvBlock { conv: conv2d::options(attrs)?, norm: batch_norm::options(attrs)? };
    let y = conv_block(get("x")?, get("weight")?, norm, t.get("residual"), opt)?;
    Ok([("y", y), ("running_mean", mean), ("running_var", var)].map(|(n, t)| (n.into(), t)).into())
}

fn reference(attrs: &Attrs, a: &Arrays) -> Result<Arrays> {
    let convolved = (conv2d::SPEC.reference)(attrs, &pick(a, &["x", "weight"]))?;
    let names = ["running_mean", "running_var", "residual"];
    let mut norm = pick(a, &names);
    for (name, from) in [("weight", "gamma"), ("bias", "beta")] {
        norm.insert(name.into(), need(OP, a, from)?.clone());
    }
    norm.insert("x".into(), need(OP, &convolved, "y")?.clone());
    (batch_norm::SPEC.reference)(attrs, &norm)
}

/// Those of the arrays that have one of these names.
fn pick(a: &Arrays, names: &[&str]) -> Arrays {
    let named = |(name, array): (&String, &_)| (name.clone(), Clone::clone(array));
    a.iter().filter(|(name, _)| names.contains(&name.as_str())).map(named).collect()
}
