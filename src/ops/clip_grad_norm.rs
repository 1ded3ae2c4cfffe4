//! The norm of a flat gradient, and the factor that an optimiser step multiplies it by: clipping by global norm, the unscaling of a
//! scaled loss, and the check that every number is finite, all from one pass over the gradient.
//!
//! ```text
//! norm = sqrt(sum over i of (grad[i] / loss_scale)^2)        factor = min(1, max_norm / (norm + 1e-6)) / loss_scale
//! ```
//!
//! as `torch.nn.utils.clip_grad_norm_` after `GradScaler.unscale_` (Pascanu et al. 2013, arXiv 1211.5063). Where the norm is not finite
//! the factor is 0, which makes [`super::sgd_step`] and [`super::adamw_step`] leave everything as it is: what a step does about an
//! overflow is decided on the device, so a step that is recorded as one graph stays one.
//!
//! Two launches: sums of squares of pieces that the length alone decides, then one block adds them. Bytes: the gradient once.

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use super::optim_step::{Guide, Sgd, sgd_step};
use crate::cpu::clip_grad_norm as cpu;
use crate::error::{Error, Result};
use crate::kernel::{Access, Cuda, CudaPlan, F32, Kernel, Plan, cuda_text, params, require_f32};
use crate::tensor::Tensor;
use bytemuck::{Pod, Zeroable};

const OP: &str = "clip_grad_norm";
const WGSL: &str = concat!(
    include_str!("../../shaders/group.wgsl"),
    include_str!("../../shaders/clip_grad_norm.wgsl")
);

/// Options of [`clip_grad_norm`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipGradNorm {
    /// The norm that gradients are scaled down to where theirs is larger; `None` leaves them as long as they are.
    pub max_norm: Option<f32>,
    /// What the loss was multiplied by.
    pub loss_scale: f32,
}

impl Default for ClipGradNorm {
    /// No clipping of the gradient of an unscaled loss: its norm and whether it is finite.
    fn default() -> Self {
        Self { max_norm: None, loss_scale: 1.0 }
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct PartsParams {
    pub(crate) len: u32,
    /// Elements of a piece, a multiple of 1024.
    pub(crate) piece: u32,
    pub(crate) inv_scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct FinishParams {
    pub(crate) parts: u32,
    /// 0 for no clipping.
    pub(crate) max_norm: f32,
    pub(crate) inv_scale: f32,
}

/// One block adds this many sums at most.
const MAX_PARTS: usize = 1024;

impl PartsParams {
    fn new(len: usize, loss_scale: f32) -> Self {
        let piece = len.div_ceil(MAX_PARTS).next_multiple_of(1024);
        Self { len: len as u32, piece: piece as u32, inv_scale: 1.0 / loss_scale }
    }

    fn parts(&self) -> u32 {
        self.len.div_ceil(self.piece)
    }
}

static PARTS: Kernel = Kernel {
    name: "clip_grad_norm_parts_f32",
    bindings: &[("grad", Access::Read, F32), ("parts", Access::Write, F32)],
    cpu: cpu::parts,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("clip_grad_norm"),
        half: None,
        plan: |bytes, _| CudaPlan::grid([params::<PartsParams>(bytes).parts(), 1, 1], 256),
    }),
    plan: |bytes, _| Plan { entry: "", grid: [params::<PartsParams>(bytes).parts(), 1, 1] },
};

static FINISH: Kernel = Kernel {
    name: "clip_grad_norm_finish_f32",
    bindings: &[("parts", Access::Read, F32), ("control", Access::Write, F32)],
    cpu: cpu::finish,
    wgsl: WGSL,
    cuda: Some(Cuda {
        text: cuda_text!("clip_grad_norm"),
        half: None,
        plan: |_, _| CudaPlan::grid([1, 1, 1], 256),
    }),
    plan: |_, _| Plan { entry: "", grid: [1, 1, 1] },
};

/// The control of an optimiser step, `[2]`: the norm of `grad / loss_scale` over all elements, and the factor that the step
/// multiplies `grad` by (0: it changes nothing, because the norm is not finite; a norm above 1.8e19, whose square f32 does not
/// hold, counts so too). `grad` is left as it is. Off the tape.
///
/// # Errors
/// [`Error::Shape`] where `grad` is not f32, [`Error::Usage`] for a largest norm or a loss scale that is not above 0.
pub fn clip_grad_norm(grad: &Tensor, opt: ClipGradNorm) -> Result<Tensor> {
    require_f32(OP, "grad", grad)?;
    let positive = |x: f32| x.is_finite() && x > 0.0;
    if !positive(opt.loss_scale) || !opt.max_norm.is_none_or(positive) {
        return Err(Error::usage(format!(
            "{OP}: max_norm {:?} and loss_scale {} must be numbers above 0",
            opt.max_norm, opt.loss_scale
        )));
    }
    let p = PartsParams::new(grad.numel(), opt.loss_scale);
    let parts = Tensor::empty(grad.device(), &[p.parts() as usize])?;
    PARTS.launch(&p, &[grad, &parts])?;
    let finish = FinishParams {
        parts: p.parts(),
        max_norm: opt.max_norm.unwrap_or(0.0),
        inv_scale: p.inv_scale,
    };
    let control = Tensor::empty(grad.device(), &[2])?;
    FINISH.launch(&finish, &[&parts, &control])?;
    Ok(control)
}

fn options(attrs: &Attrs) -> Result<ClipGradNorm> {
    let max_norm = attrs.opt_f64("max_norm")?.map(|v| v as f32);
    Ok(ClipGradNorm { max_norm, loss_scale: attrs.f64("loss_scale", 1.0)? as f32 })
}

/// Conformance of [`clip_grad_norm`]: the norm, and the gradient as a step meets it (one of SGD from zero with a learning rate of
/// -1 writes it down).
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[Port::new("grad", Layout::Plain).no_grad()],
    outputs: &[
        Port::new("norm", Layout::Plain).no_grad(),
        Port::new("clipped", Layout::Plain).no_grad(),
    ],
    attrs: &["max_norm", "loss_scale"],
    cases: || {
        let case = |label, len: usize| Case::new(label).normal("grad", &[len]).no_gradcheck();
        vec![
            case("one element", 1).attr("max_norm", 0.1),
            case("short enough already", 33).attr("max_norm", 1000.0),
            case("clipped", 129).attr("max_norm", 1.0),
            case("unscaled", 1023).attr("loss_scale", 1024.0),
            case("several pieces, clipped and unscaled", 5003)
                .attr("max_norm", 0.5)
                .attr("loss_scale", 65536.0),
        ]
    },
    run: |attrs, t: &Tensors| {
        let grad = need(OP, t, "grad")?;
        let control = clip_grad_norm(grad, options(attrs)?)?;
        let clipped = Tensor::zeros(grad.device(), grad.shape())?;
        let momentum = Tensor::zeros(grad.device(), grad.shape())?;
        let by = Guide { mask: None, control: Some(&control) };
        let opt = Sgd { lr: -1.0, momentum: 0.0, ..Sgd::default() };
        sgd_step(&clipped, grad, &momentum, by, opt)?;
        let norm = Tensor::from_f32(grad.device(), &[1], &control.to_f32()?[..1])?;
        Ok(Tensors::from([("norm".into(), norm), ("clipped".into(), clipped)]))
    },
    reference: |attrs, a: &Arrays| {
        let (grad, opt) = (need(OP, a, "grad")?, options(attrs)?);
        let scale = 1.0 / f64::from(opt.loss_scale);
        let norm = grad.data.iter().map(|g| (g * scale).powi(2)).sum::<f64>().sqrt();
        let clip = opt.max_norm.map_or(1.0, |max| (f64::from(max) / (norm + 1e-6)).min(1.0));
        let clipped = grad.data.iter().map(|g| g * scale * clip).collect();
        Ok(Arrays::from([
            ("norm".into(), Array { shape: vec![1], data: vec![norm] }),
            ("clipped".into(), Array { shape: grad.shape.clone(), data: clipped }),
        ]))
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::ops::{AdamW, adamw_step};

    /// Whatever is not finite, and wherever, the factor is 0, and steps leave parameters and state to the bit as they are.
    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        let mut devices = vec![Device::cpu()];
        if cfg!(feature = "cuda-emu") {
            devices.push(Device::new("cuda-emu").unwrap());
        }
        devices.extend(Device::new("wgpu"));
        for device in &devices {
            for (at, bad) in [(0, f32::NAN), (1500, f32::INFINITY), (2999, f32::NEG_INFINITY)] {
                let mut data = vec![0.25f32; 3000];
                data[at] = bad;
                let grad = Tensor::from_f32(device, &[3000], &data).unwrap();
                let opt = ClipGradNorm { max_norm: Some(1.0), loss_scale: 2.0 };
                let control = clip_grad_norm(&grad, opt).unwrap();
                let [norm, factor] = control.to_f32().unwrap()[..] else { panic!("two numbers") };
                assert!(!norm.is_finite() && factor == 0.0, "{}: {norm} {factor}", device.name());
                let [param, mean, square] =
                    [1.5f32, -0.5, 0.125].map(|v| Tensor::full(device, &[3000], v).unwrap());
                let by = Guide { control: Some(&control), ..Guide::default() };
                sgd_step(&param, &grad, &mean, by, Sgd::default()).unwrap();
                adamw_step(&param, &grad, (&mean, &square), by, AdamW::default(), 7).unwrap();
                for (t, v) in [(&param, 1.5), (&mean, -0.5), (&square, 0.125)] {
                    assert!(t.to_f32().unwrap().iter().all(|x| *x == v), "{}", device.name());
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let grad = Tensor::zeros(&Device::cpu(), &[3]).unwrap();
        for (max_norm, loss_scale) in [(Some(0.0), 1.0), (Some(f32::NAN), 1.0), (None, 0.0)] {
            let error = clip_grad_norm(&grad, ClipGradNorm { max_norm, loss_scale }).unwrap_err();
            assert!(error.to_string().contains("must be numbers above 0"), "{error}");
        }
    }
}
