//! Softmax cross-entropy with class weights and label smoothing.
//!
//! As PyTorch weights the mean, with `logp = log softmax(logits)`, weights `w` (all 1 where none are given), smoothing `s`
//! and K classes:
//!
//! ```text
//! loss = sum over n of [ (1 - s) * w[y_n] * -logp[n, y_n]  +  s / K * sum over k of w[k] * -logp[n, k] ]  /  sum over n of w[y_n]
//! dlogits[n, j] = dloss / sum w[y_n] * [ softmax[n, j] * ((1 - s) * w[y_n] + s / K * sum w[k])
//!                                        - (1 - s) * w[y_n] * (j == y_n) - s / K * w[j] ]
//! ```

use super::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors, need};
use super::columns::HALF_WIDE;
use crate::Device;
use crate::cpu::cross_entropy as cpu;
use crate::error::{Error, Result};
use crate::kernel::{
    Access, Cuda, CudaPlan, F32, Kernel, Plan, Stored, U32, cuda_text, params, require_f32,
    require_float,
};
use crate::tape;
use crate::tensor::{DType, Tensor};
use bytemuck::{Pod, Zeroable};

const OP: &str = "cross_entropy";
const WGSL: &str = include_str!("../../shaders/cross_entropy.wgsl");

/// Options of [`cross_entropy`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropy {
    /// Share of the target that is spread evenly over all classes, 0 to 1.
    pub label_smoothing: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct CrossEntropyParams {
    pub(crate) rows: u32,
    pub(crate) classes: u32,
    /// Whether class weights are bound (1) or not (0).
    pub(crate) weighted: u32,
    pub(crate) smoothing: f32,
    /// Not a number: what the loss of a label that is no class becomes. (WGSL cannot write it down.)
    pub(crate) nan: f32,
}

const fn cuda(plan: fn(&[u8], &crate::Caps) -> CudaPlan) -> Cuda {
    Cuda { text: cuda_text!("cross_entropy"), half: None, plan }
}

/// Logits.
fn elements(bytes: &[u8]) -> usize {
    let p: CrossEntropyParams = params(bytes);
    p.rows as usize * p.classes as usize
}

static FWD: Kernel = Kernel {
    name: "cross_entropy_fwd_f32",
    bindings: &[
        ("logits", Access::Read, Stored),
        ("labels", Access::Read, U32),
        ("class_weight", Access::Read, F32),
        ("rows", Access::Write, F32),
    ],
    cpu: cpu::fwd,
    wgsl: WGSL,
    cuda: Some(cuda(|bytes, _| {
        // One warp a row, eight a block.
        CudaPlan::items(params::<CrossEntropyParams>(bytes).rows as usize * 32, 1, 256)
    })),
    plan: |bytes, _| Plan::items(params::<CrossEntropyParams>(bytes).rows as usize, 64),
};

static FINISH: Kernel = Kernel {
    name: "cross_entropy_finish_f32",
    bindings: &[
        ("rows", Access::Read, F32),
        ("class_weight", Access::Read, F32),
        ("loss", Access::Write, F32),
        ("totals", Access::Write, F32),
    ],
    cpu: cpu::finish,
    wgsl: WGSL,
    cuda: Some(cuda(|_, _| CudaPlan::grid([1, 1, 1], 256))),
    plan: |_, _| Plan { entry: "", grid: [1, 1, 1] },
};

static BWD: Kernel = Kernel {
    name: "cross_entropy_bwd_f32",
    bindings: &[
        ("logits", Access::Read, Stored),
        ("labels", Access::Read, U32),
        ("class_weight", Access::Read, F32),
        ("rows", Access::Read, F32),
        ("totals", Access::Read, F32),
        ("dloss", Access::Read, F32),
        ("dlogits", Access::Write, Stored),
    ],
    cpu: cpu::bwd,
    wgsl: WGSL,
    cuda: Some(Cuda {
        half: Some(|bytes, _| CudaPlan::items(elements(bytes), HALF_WIDE, 256)),
        ..cuda(|bytes, _| CudaPlan::items(elements(bytes), 4, 256))
    }),
    plan: |bytes, _| Plan::items(elements(bytes), 256),
};

/// Labels for [`cross_entropy`], checked while they are still on the host.
///
/// # Errors
/// [`Error::Shape`] naming the first label that is not below `classes`; else as [`Tensor::from_u32`].
pub fn class_labels(device: &Device, labels: &[u32], classes: usize) -> Result<Tensor> {
    if let Some(i) = labels.iter().position(|&label| label as usize >= classes) {
        let message = format!(
            "label {} of row {i} is no class: there are {classes}, counted from 0; check the data set's label map",
            labels[i]
        );
        return Err(Error::shape(OP, message));
    }
    Tensor::from_u32(device, &[labels.len()], labels)
}

/// The mean cross-entropy between `softmax(logits)` and the labels: `logits [N, K]`, `labels [N]` (u32),
/// `class_weight [K]` -> `[1]`. The gradient flows to the logits.
///
/// The logits may be f32, f16 or bf16, and their gradient is stored as they are. Nothing else is rounded to 16 bits: it is the
/// loss of the logits cast to f32, without the cast. The loss and the class weights are f32.
///
/// A label that is no class makes the loss NaN (make labels with [`class_labels`], which refuses them).
///
/// # Errors
/// [`Error::Shape`] where shapes or dtypes do not fit or the smoothing is not between 0 and 1.
pub fn cross_entropy(
    logits: &Tensor,
    labels: &Tensor,
    class_weight: Option<&Tensor>,
    opt: CrossEntropy,
) -> Result<Tensor> {
    let p = check(logits, labels, class_weight, opt)?;
    let device = logits.device();
    let class_weight = match class_weight {
        Some(weight) => weight.detach(),
        None => device.none()?,
    };
    let rows = Tensor::empty(device, &[p.rows as usize, 3])?;
    let (loss, totals) = (Tensor::empty(device, &[1])?, Tensor::empty(device, &[2])?);
    FWD.launch(&p, &[logits, labels, &class_weight, &rows])?;
    FINISH.launch(&p, &[&rows, &class_weight, &loss, &totals])?;
    let (x, labels) = (logits.detach(), labels.clone());
    Ok(tape::record(OP, &[logits], loss, move |dloss, _| {
        let dx = x.empty_like()?;
        BWD.launch(&p, &[&x, &labels, &class_weight, &rows, &totals, dloss, &dx])?;
        Ok(vec![Some(dx)])
    }))
}

fn check(
    logits: &Tensor,
    labels: &Tensor,
    class_weight: Option<&Tensor>,
    opt: CrossEntropy,
) -> Result<CrossEntropyParams> {
    require_float(OP, "logits", logits)?;
    let [rows, classes] = logits.dims(OP, "logits")?;
    if labels.dtype() != DType::U32 || labels.shape() != [rows] {
        let message = format!(
            "labels must be [{rows}] of u32, one a row of logits {:?}, but they are {:?} of {}",
            logits.shape(),
            labels.shape(),
            labels.dtype().suffix()
        );
        return Err(Error::shape(OP, message));
    }
    if let Some(weight) = class_weight {
        require_f32(OP, "class_weight", weight)?;
        if weight.shape() != [classes] {
            let message = format!(
                "class_weight must be [{classes}], one a class, but it is {:?}",
                weight.shape()
            );
            return Err(Error::shape(OP, message));
        }
    }
    if !(0.0..=1.0).contains(&opt.label_smoothing) {
        let message =
            format!("label_smoothing must be between 0 and 1, not {}", opt.label_smoothing);
        return Err(Error::shape(OP, message));
    }
    Ok(CrossEntropyParams {
        rows: rows as u32,
        classes: classes as u32,
        weighted: u32::from(class_weight.is_some()),
        smoothing: opt.label_smoothing,
        nan: f32::NAN,
    })
}

fn cases() -> Vec<Case> {
    let case = |label, rows: usize, classes: usize| {
        Case::new(label).normal("logits", &[rows, classes]).labels(
            "labels",
            &[rows],
            classes as u32,
        )
    };
    let weighted = |case: Case, classes| case.uniform("class_weight", &[classes], 0.2, 2.2);
    vec![
        case("plain", 5, 3),
        weighted(case("weighted", 7, 3), 3),
        case("smooth", 4, 7).attr("label_smoothing", 0.1),
        weighted(case("weighted, smooth", 9, 5).attr("label_smoothing", 0.2), 5),
        weighted(case("one row", 1, 2), 2),
        case("one class", 3, 1),
        case("129 classes", 2, 129).attr("label_smoothing", 0.05),
        // Classes of whole accesses, of 4 and of 8.
        case("12 classes", 3, 12),
        weighted(case("40 classes", 3, 40).attr("label_smoothing", 0.1), 40),
        weighted(case("several workgroups", 131, 33), 33).no_gradcheck(),
    ]
}

fn run(attrs: &Attrs, t: &Tensors) -> Result<Tensors> {
    let opt = CrossEntropy { label_smoothing: attrs.f64("label_smoothing", 0.0)? as f32 };
    let (logits, labels) = (need(OP, t, "logits")?, need(OP, t, "labels")?);
    let loss = cross_entropy(logits, labels, t.get("class_weight"), opt)?;
    Ok(Tensors::from([("loss".into(), loss)]))
}

fn reference(attrs: &Attrs, a: &Arrays) -> Result<Arrays> {
    let (logits, labels) = (need(OP, a, "logits")?, need(OP, a, "labels")?);
    let smoothing = attrs.f64("label_smoothing", 0.0)?;
    let classes = logits.shape[1];
    let weight = |k: usize| a.get("class_weight").map_or(1.0, |w| w.data[k]);
    let (mut sum, mut weights) = (0.0, 0.0);
    for (row, label) in logits.data.chunks(classes).zip(&labels.data) {
        let label = *label as usize;
        let max = row.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(v));
        let lse = max + row.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
        let spread: f64 = (0..classes).map(|k| weight(k) * (lse - row[k])).sum();
        sum += (1.0 - smoothing) * weight(label) * (lse - row[label]);
        sum += smoothing / classes as f64 * spread;
        weights += weight(label);
    }
    Ok(Arrays::from([("loss".into(), Array { shape: vec![1], data: vec![sum / weights] })]))
}

/// Conformance of [`cross_entropy`].
pub(crate) static SPEC: OpSpec = OpSpec {
    name: OP,
    inputs: &[
        Port::new("logits", Layout::Plain).stored(),
        Port::new("labels", Layout::Labels).no_grad(),
        Port::new("class_weight", Layout::Plain).optional().no_grad(),
    ],
    outputs: &[Port::new("loss", Layout::Plain)],
    attrs: &["label_smoothing"],
    cases,
    run,
    reference,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_that_are_no_class_are_refused_or_seen() {
        let device = Device::cpu();
        let message = class_labels(&device, &[0, 2, 3], 3).unwrap_err().to_string();
        assert!(message.contains("label 3 of row 2"), "{message}");
        let logits = Tensor::zeros(&device, &[2, 3]).unwrap();
        let labels = Tensor::from_u32(&device, &[2], &[0, 3]).unwrap();
        let loss = cross_entropy(&logits, &labels, None, CrossEntropy::default()).unwrap();
        assert!(loss.item().unwrap().is_nan());
    }

    #[test]
    fn wrong_shapes_are_named() {
        let device = Device::cpu();
        let logits = Tensor::zeros(&device, &[2, 3]).unwrap();
        let labels = class_labels(&device, &[0, 1, 2], 3).unwrap();
        let refused = |labels: &Tensor, weight: Option<&Tensor>, label_smoothing| {
            let result = cross_entropy(&logits, labels, weight, CrossEntropy { label_smoothing });
            result.unwrap_err().to_string()
        };
        assert!(refused(&labels, None, 0.0).contains("labels must be [2] of u32"));
        let labels = class_labels(&device, &[0, 1], 3).unwrap();
        let weight = Tensor::zeros(&device, &[2]).unwrap();
        assert!(refused(&labels, Some(&weight), 0.0).contains("class_weight must be [3]"));
        assert!(refused(&labels, None, 1.5).contains("label_smoothing"));
    }

    #[test]
    fn huge_logits_stay_finite() {
        let device = Device::cpu();
        let logits = Tensor::from_f32(&device, &[1, 2], &[3e4, -3e4]).unwrap().requires_grad();
        let labels = class_labels(&device, &[1], 2).unwrap();
        let loss = cross_entropy(&logits, &labels, None, CrossEntropy::default()).unwrap();
        assert_eq!(loss.item().unwrap(), 6e4);
        let grads = loss.backward().unwrap();
        assert_eq!(grads.get(&logits).unwrap().to_f32().unwrap(), [1.0, -1.0]);
    }
}
