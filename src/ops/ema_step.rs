//! A step of an exponential moving average over a flat buffer, in place: one launch for all weights of a model.
//!
//! ```text
//! average += (1 - decay) * (value - average)
//! ```
//!
//! which is timm's `decay * average + (1 - decay) * value`, written so that an average that equals the value stays it to the bit.

use super::case::{Arrays, Case, Layout, OpSpec, Port, Tensors, need};
use crate::cpu::ema_step as cpu;
use crate::error::{Error, Result};
use crate::kernel::{Access, Cuda, CudaPlan, F32, Kernel, Plan, cuda_text, params, require_f32};
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

const OP: &str = "ema_step";

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct EmaParams {
    pub(crate) len: u32,
    /// 1 - decay, taken in f64.
    pub(crate) rest: f32,
}

static EMA: Kernel = Kernel {
    name: "ema_step_f32",
    bindings: &[("value", Access::Read, F32), ("average", Access::ReadWrite, F32)],
    cpu: cpu::step,
    wgsl: include_str!("../../shaders/ema_step.wgsl"),
    cuda: Some(Cuda {
        text: cuda_text!("ema_step"),
        half: None,
        plan: |bytes, _| CudaPlan::items(params::<EmaParams>(bytes).len as usize, 4, 256),
    }),
    plan: |bytes, _| Plan::items(params::<EmaParams>(bytes).len as usize, 256),
};

/// Moves `average` by a share `1 - decay` of the way to `value`, in place; both are f32 tensors of one length. Off the tape.
///
/// # Errors
/// [`Error::Shape`] where lengths or dtypes differ or both share memory, [`Error::Usage`] for a decay outside 0..=1.
pub fn ema_step(average: &Tensor, value: &Tensor, decay: f64) -> Result<()> {
    require_f32(OP, "average", average)?;
    require_f32(OP, "value", value)?;
    if average.numel() != value.numel() {
        let (a, b) = (average.numel(), value.numel());
        let message = format!("average has {a} elements, value {b}; they must be equal");
        return Err(Error::shape(OP, message));
    }
    if !(0.0..=1.0).contains(&decay) {
        return Err(Error::usage(format!("{OP}: decay {decay} must lie in 0..=1")));
    }
    let p = EmaParams { len: value.numel() as u32, rest: (1.0 - decay) as f32 };
    EMA.launch(&p, &[value, average])
}

const VALUE: Port = Port::new("value", Layout::Plain).no_grad();
const AVERAGE: Port = Port::new("average", Layout::Plain).no_grad();

/// Conformance of [`ema_step`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[AVERAGE, VALUE],
    outputs: &[AVERAGE],
    attrs: &["decay"],
    cases: || {
        let case = |label, len: usize| {
            Case::new(label).normal("average", &[len]).normal("value", &[len]).no_gradcheck()
        };
        vec![
            case("one element", 1).attr("decay", 0.5),
            case("slow", 33).attr("decay", 0.9999),
            case("several workgroups", 3001).attr("decay", 0.9),
        ]
    },
    run: |attrs, t: &Tensors| {
        let average = need(OP, t, "average")?;
        let average = average.to_device(average.device())?;
        ema_step(&average, need(OP, t, "value")?, attrs.f64("decay", 0.999)?)?;
        Ok(Tensors::from([("average".into(), average)]))
    },
    reference: |attrs, a: &Arrays| {
        let (mut average, decay) = (need(OP, a, "average")?.clone(), attrs.f64("decay", 0.999)?);
        for (average, value) in average.data.iter_mut().zip(&need(OP, a, "value")?.data) {
            *average = decay * *average + (1.0 - decay) * value;
        }
        Ok(Arrays::from([("average".into(), average)]))
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn an_average_that_has_arrived_stays() {
        let device = Device::cpu();
        let numbers = [0.1f32, -3.0e30, 1.0e-40];
        let [average, value] = [0, 1].map(|_| Tensor::from_f32(&device, &[3], &numbers).unwrap());
        ema_step(&average, &value, 0.999).unwrap();
        assert_eq!(average.to_f32().unwrap(), numbers);
        let error = ema_step(&average, &value, 1.5).unwrap_err().to_string();
        assert!(error.contains("decay 1.5 must lie in 0..=1"), "{error}");
        let short = Tensor::zeros(&device, &[2]).unwrap();
        let error = ema_step(&average, &short, 0.5).unwrap_err().to_string();
        assert!(error.contains("average has 3 elements, value 2"), "{error}");
    }
}
