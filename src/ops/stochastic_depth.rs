//! Stochastic depth: a residual branch that is left out for some of the images (Huang et al. 2016), in one pass with the sum.
//!
//! `y[n] = shortcut[n] + branch[n] / (1 - p)`, or `y[n] = shortcut[n]` with probability p. Which images keep the branch is a
//! function of (seed, step, op, n), as in [`super::dropout()`]: the same on every device, and made again by the backward.

use super::case::{Array, Arrays, Case, Layout, OpSpec, Port, Tensors, need};
use super::columns::HALF_WIDE;
use super::dropout::{check_probability, options, threshold};
use super::elementwise;
use crate::Caps;
use crate::cpu::stochastic_depth as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, Cuda, CudaPlan, Kernel, Plan, Stored, cuda_text, params, require_float, require_same,
};
use crate::tape;
use crate::tensor::Tensor;
use crate::tensor::philox::Philox;
use bytemuck::{Pod, Zeroable};

const OP: &str = "stochastic_depth";
const WGSL: &str = include_str!("../../shaders/stochastic_depth.wgsl");

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct StochasticDepthParams {
    pub(crate) len: u32,
    /// Elements of an image.
    pub(crate) sample: u32,
    /// Images whose random word is below this lose the branch.
    pub(crate) threshold: u32,
    /// 1 / (1 - probability).
    pub(crate) scale: f32,
    pub(crate) seed_low: u32,
    pub(crate) seed_high: u32,
    pub(crate) step: u32,
    pub(crate) op: u32,
}

const CUDA: Option<Cuda> = Some(Cuda {
    text: cuda_text!("stochastic_depth"),
    half: Some(|bytes, _| CudaPlan::items(len(bytes), HALF_WIDE, 256)),
    plan: |bytes, _| CudaPlan::items(len(bytes), 4, 256),
});

fn len(bytes: &[u8]) -> usize {
    params::<StochasticDepthParams>(bytes).len as usize
}

/// Four elements an invocation: they share the random word.
fn plan(bytes: &[u8], _: &Caps) -> Plan {
    Plan::items(len(bytes).div_ceil(4), 64)
}

static FWD: Kernel = Kernel {
    name: "stochastic_depth_fwd_f32",
    bindings: &[
        ("branch", Access::Read, Stored),
        ("shortcut", Access::Read, Stored),
        ("y", Access::Write, Stored),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: CUDA,
    plan,
};

static BWD: Kernel = Kernel {
    name: "stochastic_depth_bwd_f32",
    bindings: &[("dy", Access::Read, Stored), ("dbranch", Access::Write, Stored)],
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: CUDA,
    plan,
};

/// `shortcut[n] + branch[n] * keep[n] / (1 - p)`, with `keep[n]` drawn for each index n of the first axis (torchvision's mode
/// "row"). Both tensors have one shape `[N, ..]`. With p = 0 it is their sum. An image that loses its branch is its shortcut to the bit.
///
/// They may be f32, f16 or bf16, both the same; y and the gradients are stored as they are.
///
/// # Errors
/// [`Error::Shape`] where shapes or storage differ, or p lies outside `0 <= p < 1`.
pub fn stochastic_depth(
    branch: &Tensor,
    shortcut: &Tensor,
    p: f32,
    random: Philox,
) -> Result<Tensor> {
    require_float(OP, "branch", branch)?;
    require_same(OP, ("branch", branch), "shortcut", shortcut)?;
    check_probability(OP, p)?;
    if branch.shape() != shortcut.shape() {
        let message = format!(
            "branch {:?} and shortcut {:?} must have one shape",
            branch.shape(),
            shortcut.shape()
        );
        return Err(Error::shape(OP, message));
    }
    if p == 0.0 {
        return elementwise::add(branch, shortcut);
    }
    let samples = branch.shape().first().copied().unwrap_or(1);
    let block = StochasticDepthParams {
        len: branch.numel() as u32,
        sample: (branch.numel() / samples) as u32,
        threshold: threshold(p),
        scale: 1.0 / (1.0 - p),
        seed_low: random.seed as u32,
        seed_high: (random.seed >> 32) as u32,
        step: random.step,
        op: random.op,
    };
    let y = branch.empty_like()?;
    FWD.launch(&block, &[branch, shortcut, &y])?;
    Ok(tape::record(OP, &[branch, shortcut], y, move |dy, needs| {
        let mut grads = vec![None, Some(dy.clone())];
        if needs[0] {
            let dbranch = dy.empty_like()?;
            BWD.launch(&block, &[dy, &dbranch])?;
            grads[0] = Some(dbranch);
        }
        Ok(grads)
    }))
}

/// Conformance of [`stochastic_depth`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[
        Port::new("branch", Layout::Image).stored(),
        Port::new("shortcut", Layout::Image).stored(),
    ],
    outputs: &[Port::new("y", Layout::Image).stored()],
    attrs: &["p", "seed", "step", "op"],
    cases: || {
        let case = |label, shape: &[usize]| {
            Case::new(label).normal("branch", shape).normal("shortcut", shape)
        };
        vec![
            case("none", &[3, 2, 2, 3]).attr("p", 0.0),
            case("one element an image", &[33, 1]).attr("op", 3),
            case("odd images", &[7, 3, 5, 3]).attr("seed", 0x1_2345_6789u64).attr("step", 12),
            case("packs", &[9, 2, 3, 8]).attr("p", 0.2).attr("op", 7),
            case("several workgroups", &[13, 7, 9, 12]).attr("p", 0.8).no_gradcheck(),
        ]
    },
    run: |attrs, t: &Tensors| {
        let (p, random) = options(attrs)?;
        let y = stochastic_depth(need(OP, t, "branch")?, need(OP, t, "shortcut")?, p, random)?;
        Ok(Tensors::from([("y".into(), y)]))
    },
    reference: |attrs, a: &Arrays| {
        let (p, random) = options(attrs)?;
        let (branch, shortcut) = (need(OP, a, "branch")?, need(OP, a, "shortcut")?);
        let sample = branch.data.len() / branch.shape[0];
        let keep = |i: usize| random.word((i / sample) as u64) >= threshold(p);
        let both = branch.data.iter().zip(&shortcut.data).enumerate();
        let kept = |i, b: &f64| if keep(i) { b / (1.0 - f64::from(p)) } else { 0.0 };
        let data = both.map(|(i, (b, s))| s + kept(i, b)).collect();
        Ok(Arrays::from([("y".into(), Array { shape: branch.shape.clone(), data })]))
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn whole_images_lose_their_branch() {
        let device = Device::cpu();
        let ones = Tensor::full(&device, &[2000, 3], 1.0).unwrap();
        let zeros = Tensor::zeros(&device, &[2000, 3]).unwrap();
        let random = Philox { seed: 1, step: 2, op: 3 };
        let y = stochastic_depth(&ones, &zeros, 0.2, random).unwrap().to_f32().unwrap();
        let images = y.chunks(3);
        assert!(images.clone().all(|v| v == [0.0; 3] || v == [1.25; 3]));
        let kept = images.filter(|v| v[0] > 0.0).count() as f32 / 2000.0;
        assert!((kept - 0.8).abs() < 0.03, "{kept}");
        let other = stochastic_depth(&ones, &zeros, 0.2, Philox { step: 3, ..random }).unwrap();
        assert_ne!(other.to_f32().unwrap(), y, "another step, other images");
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let ones = |shape: &[usize]| Tensor::full(&Device::cpu(), shape, 1.0).unwrap();
        let random = Philox { seed: 0, step: 0, op: 0 };
        let refused = |a: &Tensor, b: &Tensor, p| {
            stochastic_depth(a, b, p, random).expect_err("refused").to_string()
        };
        assert!(refused(&ones(&[2, 3]), &ones(&[3, 2]), 0.1).contains("must have one shape"));
        assert!(refused(&ones(&[2]), &ones(&[2]), 1.0).contains("below 1"));
    }
}
