//! A case made ready for any device, and a run of it.

use super::case_file::CaseFile;
use super::compare::{Atol, Tolerance, same_shape};
use crate::Device;
use crate::error::{Error, Result};
use crate::ops::case::{Array, Arrays, Attrs, Case, Layout, OpSpec, Port, Tensors};
use crate::tensor::philox::Philox;
use crate::tensor::{DType, Tensor};
use rayon::prelude::*;

/// A case of an op: what goes in, what should come out. All arrays in the crate's layouts.
pub(crate) struct Trial {
    pub(crate) spec: &'static OpSpec,
    pub(crate) label: String,
    pub(crate) attrs: Attrs,
    /// How the tensors of stored ports are stored.
    pub(crate) precision: DType,
    pub(crate) inputs: Arrays,
    /// Upstream gradients by output.
    pub(crate) upstream: Arrays,
    pub(crate) expected: Results,
    pub(crate) tolerance: Tolerance,
}

/// What a device gave, or should give.
#[derive(Default)]
pub(crate) struct Results {
    pub(crate) outputs: Arrays,
    /// By input (of a model: by parameter).
    pub(crate) gradients: Arrays,
    /// A model's buffers after a forward in training.
    pub(crate) after: Arrays,
}

impl Trial {
    /// A built-in case. Expected outputs come from the op's f64 reference; gradients from the reference by finite
    /// differences, or for larger cases from the op on the CPU.
    ///
    /// In half precision the inputs are rounded first, so that what is told from the expectation is the op's own rounding;
    /// gradients come from the CPU in f32.
    pub(crate) fn built_in(spec: &'static OpSpec, case: &Case, precision: DType) -> Result<Self> {
        let mut inputs = case.arrays();
        for port in spec.inputs {
            if let Some(array) = inputs.get_mut(port.name) {
                *array = array.rounded(port.dtype(precision));
            }
        }
        let mut outputs = (spec.reference)(&case.attrs, &inputs)?;
        let upstream: Arrays = spec
            .outputs
            .iter()
            .enumerate()
            .filter(|(_, port)| port.grad)
            .filter_map(|(i, port)| {
                let noise = noise(&outputs.get(port.name)?.shape, i as u32);
                Some((port.name.to_string(), noise.rounded(port.dtype(precision))))
            })
            .collect();
        outputs.retain(|name, _| spec.outputs.iter().any(|port| port.name == name));
        let mut trial = Self {
            spec,
            label: case.label.clone(),
            attrs: case.attrs.clone(),
            precision: DType::F32,
            inputs,
            upstream,
            expected: Results { outputs, ..Results::default() },
            tolerance: Tolerance { rtol: case.rtol, atol: Atol::OfLargest(case.atol) },
        };
        if case.gradients && !trial.upstream.is_empty() {
            let gradcheck = case.gradcheck && precision == DType::F32;
            trial.expected.gradients = trial.expected_gradients(gradcheck)?;
        }
        if precision != DType::F32 {
            trial.precision = precision;
            trial.tolerance = Tolerance::half(trial.tolerance, precision);
        }
        Ok(trial)
    }

    fn expected_gradients(&self, gradcheck: bool) -> Result<Arrays> {
        let wanted =
            self.spec.inputs.iter().filter(|port| port.grad && self.inputs.contains_key(port.name));
        if gradcheck {
            return wanted
                .map(|port| Ok((port.name.to_string(), self.finite_differences(port.name)?)))
                .collect();
        }
        let names: Vec<&str> = wanted.map(|port| port.name).collect();
        Ok(guarded(&Device::cpu(), |cpu| self.forward_backward(cpu, &names))?.gradients)
    }

    /// The gradient of `sum(upstream * output)` with respect to one input, element by element, from four values of the
    /// f64 reference: (8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / 12h.
    fn finite_differences(&self, name: &str) -> Result<Array> {
        /// Small, so that few cases meet a kink of relu or max; the error terms h^4 and 1e-16/h are both below 1e-10.
        const H: f64 = 1e-5;
        let Some(x) = self.inputs.get(name) else {
            return Err(Error::usage(format!("{}: no input '{name}'", self.spec.name)));
        };
        let slope = |i: usize| -> Result<f64> {
            let mut inputs = self.inputs.clone();
            let mut value = |offset: f64| -> Result<f64> {
                if let Some(array) = inputs.get_mut(name) {
                    array.data[i] = x.data[i] + offset;
                }
                Ok(dot(&self.upstream, &(self.spec.reference)(&self.attrs, &inputs)?))
            };
            let near = value(H)? - value(-H)?;
            let far = value(2.0 * H)? - value(-2.0 * H)?;
            Ok((8.0 * near - far) / (12.0 * H))
        };
        let data = (0..x.data.len()).into_par_iter().map(slope).collect::<Result<_>>()?;
        Ok(Array { shape: x.shape.clone(), data })
    }

    /// A case of a file. Every name and attribute must be one that the op knows.
    pub(crate) fn from_file(spec: &'static OpSpec, file: &CaseFile) -> Result<Self> {
        let wrong = |message: String| Error::file(&file.path, format!("{}: {message}", spec.name));
        if let Some(attr) = file.attrs.0.keys().find(|key| !spec.attrs.contains(&key.as_str())) {
            return Err(wrong(format!("unknown attribute '{attr}'; this op has {:?}", spec.attrs)));
        }
        let take = |group: &str, ports: &'static [Port], grad: bool| -> Result<Arrays> {
            let mut arrays = file.group(group);
            for (name, array) in &mut arrays {
                let port = ports.iter().find(|port| port.name == name).ok_or_else(|| {
                    let known: Vec<_> = ports.iter().map(|port| port.name).collect();
                    wrong(format!("unknown tensor '{group}.{name}'; this op has {known:?}"))
                })?;
                if grad && !port.grad {
                    return Err(wrong(format!("tensor '{group}.{name}': {name} has no gradient")));
                }
                *array = array.from_file_layout(port.layout);
                check_labels(port, array).map_err(&wrong)?;
            }
            Ok(arrays)
        };
        let inputs = take("in", spec.inputs, false)?;
        let outputs = take("out", spec.outputs, false)?;
        let mut upstream = take("gout", spec.outputs, true)?;
        let gradients = take("gin", spec.inputs, true)?;
        for group in ["state", "after"] {
            if let Some(name) = file.group(group).keys().next() {
                return Err(wrong(format!(
                    "tensor '{group}.{name}': only 'model' cases have these"
                )));
            }
        }
        if let Some(port) =
            spec.inputs.iter().find(|port| !port.optional && !inputs.contains_key(port.name))
        {
            return Err(wrong(format!("tensor 'in.{}' is missing", port.name)));
        }
        if let Some(name) = gradients.keys().find(|name| !inputs.contains_key(*name)) {
            return Err(wrong(format!("'gin.{name}' is given, but 'in.{name}' is not")));
        }
        if outputs.is_empty() && gradients.is_empty() {
            return Err(wrong(
                "nothing to check: the file has no 'out.' and no 'gin.' tensor".into(),
            ));
        }
        if upstream.is_empty() && !gradients.is_empty() {
            let name = spec.outputs[0].name;
            match outputs.get(name) {
                Some(y) if y.data.len() == 1 => {
                    upstream.insert(name.into(), Array { shape: y.shape.clone(), data: vec![1.0] });
                }
                _ => {
                    return Err(wrong(format!(
                        "'gin.' tensors need the upstream gradient 'gout.{name}'"
                    )));
                }
            }
        }
        let tolerance = Tolerance {
            rtol: file.rtol.unwrap_or(Tolerance::DEFAULT.rtol),
            atol: file.atol.map_or(Tolerance::DEFAULT.atol, Atol::Fixed),
        };
        let (label, attrs) = (file.label(), file.attrs.clone());
        let expected = Results { outputs, gradients, ..Results::default() };
        let precision = DType::F32;
        Ok(Self { spec, label, attrs, precision, inputs, upstream, expected, tolerance })
    }

    /// The op, and the precision where that is not f32: a row of the report's table.
    pub(crate) fn name(&self) -> String {
        match self.precision {
            DType::F32 => self.spec.name.into(),
            half => format!("{} {}", self.spec.name, half.suffix()),
        }
    }

    /// Runs forward, and backward to the inputs whose gradients are expected.
    pub(crate) fn run(&self, device: &Device) -> Result<Results> {
        let wanted: Vec<&str> = self.expected.gradients.keys().map(String::as_str).collect();
        guarded(device, |device| self.forward_backward(device, &wanted))
    }

    pub(super) fn forward_backward(&self, device: &Device, wanted: &[&str]) -> Result<Results> {
        let mut results = Results::default();
        if wanted.is_empty() {
            let outputs = (self.spec.run)(&self.attrs, &self.upload(device, wanted)?)?;
            device.check_guards()?;
            results.outputs = download(&outputs)?;
        }
        // The tape is used up by a backward, so each upstream gradient gets a run of its own (all ops have just one).
        for (name, dy) in self.upstream.iter().filter(|_| !wanted.is_empty()) {
            let inputs = self.upload(device, wanted)?;
            let outputs = (self.spec.run)(&self.attrs, &inputs)?;
            let y = outputs
                .get(name)
                .ok_or_else(|| Error::usage(format!("{}: no output '{name}'", self.spec.name)))?;
            if !same_shape(&dy.shape, y.shape()) {
                let message =
                    format!("gout.{name} has shape {:?}, the output {:?}", dy.shape, y.shape());
                return Err(Error::shape(self.spec.name, message));
            }
            let dy = Array { shape: y.shape().to_vec(), data: dy.data.clone() };
            let grads = y.backward_with(&dy.to_tensor(device, Layout::Plain, y.dtype())?)?;
            device.check_guards()?;
            for name in wanted {
                let grad = grads.get(&inputs[*name]).ok_or_else(|| {
                    Error::Autograd(format!(
                        "{}: no gradient reached input '{name}'",
                        self.spec.name
                    ))
                })?;
                sum_into(&mut results.gradients, name, Array::from_tensor(grad)?);
            }
            results.outputs = download(&outputs)?;
        }
        Ok(results)
    }

    fn upload(&self, device: &Device, wanted: &[&str]) -> Result<Tensors> {
        let mut tensors = Tensors::new();
        for port in self.spec.inputs {
            if let Some(array) = self.inputs.get(port.name) {
                let t = array.to_tensor(device, port.layout, port.dtype(self.precision))?;
                let t = if wanted.contains(&port.name) { t.requires_grad() } else { t };
                tensors.insert(port.name.into(), t);
            }
        }
        Ok(tensors)
    }
}

/// Runs `f` with every new tensor poisoned and between guard words, and checks them: in the end those of tensors that
/// were dropped, and before by [`Device::check_guards`] wherever `f` asks for it.
pub(super) fn guarded<R>(device: &Device, f: impl FnOnce(&Device) -> Result<R>) -> Result<R> {
    device.set_guarded(true);
    let results = f(device);
    device.set_guarded(false);
    let late = device.check_guards();
    let results = results?;
    late?;
    Ok(results)
}

fn download(tensors: &Tensors) -> Result<Arrays> {
    tensors
        .iter()
        .map(|(name, t): (&String, &Tensor)| Ok((name.clone(), Array::from_tensor(t)?)))
        .collect()
}

fn sum_into(sums: &mut Arrays, name: &str, more: Array) {
    match sums.get_mut(name) {
        Some(sum) => sum.data.iter_mut().zip(more.data).for_each(|(a, b)| *a += b),
        None => {
            sums.insert(name.into(), more);
        }
    }
}

/// The upstream gradient of a built-in case: standard normal, the same on every machine.
fn noise(shape: &[usize], stream: u32) -> Array {
    let random = Philox { seed: 823_543, step: 1, op: stream };
    let len = shape.iter().product::<usize>() as u64;
    Array { shape: shape.to_vec(), data: (0..len).map(|i| f64::from(random.normal(i))).collect() }
}

fn dot(weights: &Arrays, values: &Arrays) -> f64 {
    let pairs = weights.iter().filter_map(|(name, w)| Some((w, values.get(name)?)));
    pairs.map(|(w, v)| w.data.iter().zip(&v.data).map(|(a, b)| a * b).sum::<f64>()).sum()
}

/// Labels become u32 on a device: a negative or fractional one would be another label without a word.
pub(super) fn check_labels(port: &Port, array: &Array) -> Result<(), String> {
    let wrong = |v: &&f64| v.fract() != 0.0 || !(0.0..=f64::from(u32::MAX)).contains(*v);
    match array.data.iter().find(wrong) {
        Some(value) if port.layout == Layout::Labels => {
            Err(format!("{} holds {value}, which is no class label (they count from 0)", port.name))
        }
        _ => Ok(()),
    }
}
