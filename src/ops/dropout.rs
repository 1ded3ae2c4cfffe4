//! Dropout whose mask is a function of (seed, step, op, element): the same on every device, and made again by the
//! backward rather than saved.

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use super::columns::HALF_WIDE;
use crate::cpu::dropout as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, Cuda, CudaPlan, Kernel, Plan, Stored, cuda_text, params, require_float,
};
use crate::tape;
use crate::tensor::Tensor;
use crate::tensor::philox::Philox;
use bytemuck::{Pod, Zeroable};

const OP: &str = "dropout";

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct DropoutParams {
    pub(crate) len: u32,
    /// Random words below this drop their element.
    pub(crate) threshold: u32,
    /// 1 / (1 - probability).
    pub(crate) scale: f32,
    pub(crate) seed_low: u32,
    pub(crate) seed_high: u32,
    pub(crate) step: u32,
    pub(crate) op: u32,
}

static APPLY: Kernel = Kernel {
    name: "dropout_fwd_f32",
    bindings: &[("x", Access::Read, Stored), ("y", Access::Write, Stored)],
    cpu: cpu::apply,
    wgsl: include_str!("../../shaders/dropout.wgsl"),
    cuda: Some(Cuda {
        text: cuda_text!("dropout"),
        half: Some(|bytes, _| {
            CudaPlan::items(params::<DropoutParams>(bytes).len as usize, HALF_WIDE, 256)
        }),
        plan: |bytes, _| CudaPlan::items(params::<DropoutParams>(bytes).len as usize, 4, 256),
    }),
    // Four elements an invocation: one round of Philox gives four words.
    plan: |bytes, _| Plan::items((params::<DropoutParams>(bytes).len as usize).div_ceil(4), 64),
};

/// Sets each element to 0 with the given probability and divides the others by `1 - probability`, so that the mean stays
/// (Srivastava et al. 2014). The gradient goes through the same mask. With probability 0 it is x itself. x may be f32, f16 or bf16:
/// the mask is the same, y and dx are stored as x is.
///
/// # Errors
/// [`Error::Shape`] for a tensor of u32 or a probability outside `0 <= p < 1`.
pub fn dropout(x: &Tensor, probability: f32, stream: Philox) -> Result<Tensor> {
    require_float(OP, "x", x)?;
    check_probability(OP, probability)?;
    if probability == 0.0 {
        return Ok(x.clone());
    }
    let p = DropoutParams {
        len: x.numel() as u32,
        threshold: threshold(probability),
        scale: 1.0 / (1.0 - probability),
        seed_low: stream.seed as u32,
        seed_high: (stream.seed >> 32) as u32,
        step: stream.step,
        op: stream.op,
    };
    let y = apply(&p, x)?;
    Ok(tape::record(OP, &[x], y, move |dy, _| Ok(vec![Some(apply(&p, dy)?)])))
}

pub(super) fn check_probability(op: &'static str, probability: f32) -> Result<()> {
    if (0.0..1.0).contains(&probability) {
        return Ok(());
    }
    let message = format!("the probability must be at least 0 and below 1, not {probability}");
    Err(Error::shape(op, message))
}

/// Random words below this drop.
pub(super) fn threshold(probability: f32) -> u32 {
    (f64::from(probability) * 4_294_967_296.0) as u32
}

fn apply(p: &DropoutParams, x: &Tensor) -> Result<Tensor> {
    let y = x.empty_like()?;
    APPLY.launch(p, &[x, &y])?;
    Ok(y)
}

/// Probability and stream of a case.
pub(super) fn options(attrs: &Attrs) -> Result<(f32, Philox)> {
    let stream = Philox {
        seed: attrs.usize("seed", 0)? as u64,
        step: attrs.usize("step", 0)? as u32,
        op: attrs.usize("op", 0)? as u32,
    };
    Ok((attrs.f64("p", 0.5)? as f32, stream))
}

/// Conformance of [`dropout`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[Port::new("x", Layout::Plain).stored()],
    outputs: &[Port::new("y", Layout::Plain).stored()],
    attrs: &["p", "seed", "step", "op"],
    cases: || {
        let case = |label, shape: &[usize]| Case::new(label).normal("x", shape);
        vec![
            case("one element", &[1]).attr("op", 3),
            case("a half", &[7, 33]).attr("seed", 0x1_2345_6789u64).attr("step", 12),
            case("a fifth", &[3, 5, 7, 2]).attr("p", 0.2).attr("op", 7),
            case("none", &[9]).attr("p", 0.0),
            case("several workgroups", &[129, 65]).attr("p", 0.9).no_gradcheck(),
        ]
    },
    run: |attrs, t: &Tensors| {
        let (probability, stream) = options(attrs)?;
        Ok(Tensors::from([("y".into(), dropout(need(OP, t, "x")?, probability, stream)?)]))
    },
    reference: |attrs, a: &Arrays| {
        let (probability, stream) = options(attrs)?;
        let x = need(OP, a, "x")?;
        let keep = |i: usize| stream.word(i as u64) >= threshold(probability);
        let scale = 1.0 / (1.0 - f64::from(probability));
        let kept = |(i, v): (usize, &f64)| if keep(i) { v * scale } else { 0.0 };
        let data = x.data.iter().enumerate().map(kept).collect();
        Ok(Arrays::from([("y".into(), Array { shape: x.shape.clone(), data })]))
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn drops_the_share_it_is_told_to() {
        let x = Tensor::full(&Device::cpu(), &[40_000], 1.0).unwrap();
        let y = dropout(&x, 0.3, Philox { seed: 1, step: 2, op: 3 }).unwrap().to_f32().unwrap();
        let dropped = y.iter().filter(|&&v| v == 0.0).count() as f32 / 40_000.0;
        assert!((dropped - 0.3).abs() < 0.01, "{dropped}");
        assert!(y.iter().all(|&v| v == 0.0 || (v - 1.0 / 0.7).abs() < 1e-6));
        let other = dropout(&x, 0.3, Philox { seed: 1, step: 3, op: 3 }).unwrap();
        assert_ne!(other.to_f32().unwrap(), y, "another step, another mask");
    }

    #[test]
    fn a_probability_of_one_is_refused() {
        let x = Tensor::zeros(&Device::cpu(), &[2]).unwrap();
        let message = dropout(&x, 1.0, Philox { seed: 0, step: 0, op: 0 }).unwrap_err().to_string();
        assert!(message.contains("below 1"), "{message}");
    }
}
