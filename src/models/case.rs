//! Whole models in conformance cases (op `model`): logits, loss, every gradient and the norms' statistics afterwards.

use super::{Load, Model, Spec};
use crate::Device;
use crate::error::{Error, Result};
use crate::nn::{Data, Mode, StateArray, StateDict};
use crate::ops::case::{Array, Arrays, Attrs, Layout, need};
use crate::ops::{self, CrossEntropy, Sgd};
use crate::tensor::{DType, Tensor};

/// Attribute names that a `model` case may set.
const ATTRS: &[&str] = &["model", "training", "num_classes", "dropout", "stochastic_depth", "sgd"];

/// What a model gave for a case, all in the layouts of files.
#[derive(Clone, Debug, Default)]
pub struct CaseResult {
    /// `logits` and `loss`; with attribute `sgd`, `step_losses`.
    pub outputs: Arrays,
    /// Gradients of the loss by parameter name.
    pub gradients: Arrays,
    /// In training, running statistics and `num_batches_tracked` after one forward, by name.
    pub after: Arrays,
}

/// The attribute `sgd`: so many steps of SGD on the same batch.
struct Steps {
    steps: usize,
    sgd: Sgd,
}

/// Runs a `model` case on a device. `inputs` are `image` (NCHW) and `labels`, `state` the whole state dict, both as in
/// the case's file. Attributes: `model` (a model string), `num_classes`, `training`, `sgd` (`steps`, `lr`, `momentum`,
/// `weight_decay`: then `step_losses` has the loss before each step and after the last), `dropout` and `stochastic_depth`
/// (probabilities in place of the model string's).
///
/// # Errors
/// [`Error::Usage`] for a wrong attribute, [`Error::Shape`] for a missing or wrong input, [`Error::File`] for a state that
/// does not fit the model.
pub fn run_case(
    device: &Device,
    attrs: &Attrs,
    inputs: &Arrays,
    state: &Arrays,
) -> Result<CaseResult> {
    if let Some(name) = attrs.0.keys().find(|name| !ATTRS.contains(&name.as_str())) {
        return Err(Error::usage(format!("model: unknown attribute '{name}' (known: {ATTRS:?})")));
    }
    let mut spec: Spec = attrs.str("model", "")?.parse()?;
    spec.set_random(
        attrs.f64("dropout", f64::from(spec.dropout))?,
        attrs.f64("stochastic_depth", f64::from(spec.stochastic_depth))?,
    )?;
    let image = need("model", inputs, "image")?;
    let &[_, 3, h, w] = image.shape.as_slice() else {
        let message = format!("image must be [N, 3, H, W], but its shape is {:?}", image.shape);
        return Err(Error::shape("model", message));
    };
    let labels = need("model", inputs, "labels")?.to_tensor(device, Layout::Labels, DType::U32)?;
    let images =
        image.from_file_layout(Layout::Image).to_tensor(device, Layout::Image, DType::F32)?;
    let model = Model::build(&spec, attrs.usize("num_classes", 1000)?, (h, w), device, 0)?;
    model.load(&state_dict(state), Load::Exact)?;
    let training = attrs.bool("training", true)?;
    run(&model, &images, &labels, training, steps(attrs)?)
}

fn run(
    model: &Model,
    images: &Tensor,
    labels: &Tensor,
    training: bool,
    steps: Option<Steps>,
) -> Result<CaseResult> {
    let parameters = model.parameters();
    let mode = |step| if training { Mode::train(0, step) } else { Mode::EVAL };
    let forward = |step| {
        let logits = model.forward(images, &mode(step))?;
        let loss = ops::cross_entropy(&logits, labels, None, CrossEntropy::default())?;
        Ok::<_, Error>((logits, loss))
    };
    let (logits, loss) = forward(1)?;
    parameters.gather(&loss.backward()?)?;
    let mut result = CaseResult::default();
    result.outputs.insert("logits".into(), Array::from_tensor(&logits)?);
    result.outputs.insert("loss".into(), Array::from_tensor(&loss)?);
    result.gradients = arrays(parameters.export(parameters.gradients())?);
    if training {
        result.after = arrays(parameters.state()?);
        result.after.retain(|name, _| parameters.parameter(name).is_none());
    }
    if let Some(Steps { steps, sgd }) = steps {
        let momentum =
            Tensor::zeros(model.parameters().values().device(), parameters.values().shape())?;
        let mut losses = vec![f64::from(loss.item()?)];
        for step in 1..=steps {
            ops::sgd_step(parameters.values(), parameters.gradients(), &momentum, None, sgd)?;
            let (_, loss) = forward(step as u32 + 1)?;
            parameters.gather(&loss.backward()?)?;
            losses.push(f64::from(loss.item()?));
        }
        let losses = Array { shape: vec![losses.len()], data: losses };
        result.outputs.insert("step_losses".into(), losses);
    }
    Ok(result)
}

fn steps(attrs: &Attrs) -> Result<Option<Steps>> {
    let Some(value) = attrs.0.get("sgd") else { return Ok(None) };
    let object = value.as_object().ok_or_else(|| {
        Error::usage(format!("attribute 'sgd' is {value}, expected an object with steps, lr, ..."))
    })?;
    let attrs = Attrs(object.clone());
    let sgd = Sgd {
        lr: attrs.f64("lr", 0.0)? as f32,
        momentum: attrs.f64("momentum", 0.0)? as f32,
        weight_decay: attrs.f64("weight_decay", 0.0)? as f32,
        ..Sgd::default()
    };
    Ok(Some(Steps { steps: attrs.usize("steps", 1)?, sgd }))
}

fn state_dict(arrays: &Arrays) -> StateDict {
    let mut dict = StateDict { source: "state".into(), ..StateDict::default() };
    for (name, array) in arrays {
        let data = if name.ends_with(".num_batches_tracked") {
            Data::I64(array.data.iter().map(|v| *v as i64).collect())
        } else {
            Data::F32(array.data.iter().map(|v| *v as f32).collect())
        };
        dict.arrays.insert(name.clone(), StateArray { shape: array.shape.clone(), data });
    }
    dict
}

fn arrays(dict: StateDict) -> Arrays {
    let to_f64 = |array: StateArray| {
        let data = match array.data {
            Data::F32(v) => v.into_iter().map(f64::from).collect(),
            Data::I64(v) => v.into_iter().map(|n| n as f64).collect(),
        };
        Array { shape: array.shape, data }
    };
    dict.arrays.into_iter().map(|(name, array)| (name, to_f64(array))).collect()
}
