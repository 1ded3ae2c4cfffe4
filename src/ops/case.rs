//! Conformance cases: how an op is tried, on any device, against a plain f64 reference or an expected output in a file.

use crate::error::{Error, Result};
use crate::tensor::philox::Philox;
use crate::tensor::{DType, Tensor, narrow, widen};
use crate::{Caps, Device};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Named tensors on a device, in the crate's layouts.
pub type Tensors = BTreeMap<String, Tensor>;
/// Named arrays of the reference, in the crate's layouts.
pub type Arrays = BTreeMap<String, Array>;

/// A plain f64 array, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Sizes along each axis.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Vec<f64>,
}

impl Array {
    /// An array of zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), data: vec![0.0; shape.iter().product()] }
    }

    /// The position of an element in [`Array::data`].
    pub fn at(&self, index: &[usize]) -> usize {
        debug_assert_eq!(index.len(), self.shape.len());
        index.iter().zip(&self.shape).fold(0, |sum, (i, n)| sum * n + i)
    }

    /// The element at an index.
    pub fn get(&self, index: &[usize]) -> f64 {
        self.data[self.at(index)]
    }

    /// Sets the element at an index.
    pub fn set(&mut self, index: &[usize], value: f64) {
        let at = self.at(index);
        self.data[at] = value;
    }
}

/// How a tensor lies in a case file and how it lies here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// An image: NCHW in files, NHWC here.
    Image,
    /// A convolution weight: OIHW in files, OHWI here.
    Weight,
    /// The same in both.
    Plain,
    /// Class labels: i64 in files, u32 here.
    Labels,
}

/// An input or output of an op.
#[derive(Clone, Copy, Debug)]
pub struct Port {
    /// Its name in case files.
    pub name: &'static str,
    /// Its layout.
    pub layout: Layout,
    /// Whether a case may leave it out.
    pub optional: bool,
    /// Inputs: a gradient is given. Outputs: an upstream gradient is taken.
    pub grad: bool,
    /// How it may be stored.
    pub storage: Storage,
}

/// How a port's tensor may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In f32 (labels: u32) whatever the precision.
    F32,
    /// In the precision of the run: f32, f16 or bf16.
    Any,
    /// In the precision of the run, which is f16 or bf16.
    Half,
}

impl Port {
    /// A differentiable tensor that is always there.
    pub const fn new(name: &'static str, layout: Layout) -> Self {
        Self { name, layout, optional: false, grad: true, storage: Storage::F32 }
    }

    /// The same, but a case may leave it out.
    pub const fn optional(self) -> Self {
        Self { optional: true, ..self }
    }

    /// The same, stored in the precision of the run.
    pub const fn stored(self) -> Self {
        Self { storage: Storage::Any, ..self }
    }

    /// The same, stored in half precision; the op has no f32 case.
    pub const fn half_only(self) -> Self {
        Self { storage: Storage::Half, ..self }
    }

    /// The dtype in a run of the given precision.
    pub fn dtype(&self, precision: DType) -> DType {
        if self.storage == Storage::F32 { DType::F32 } else { precision }
    }

    /// The same, without a gradient.
    pub const fn no_grad(self) -> Self {
        Self { grad: false, ..self }
    }
}

/// What the conformance machinery knows of an op.
pub struct OpSpec {
    /// The op's name in case files.
    pub name: &'static str,
    /// Inputs, in the order of the public function.
    pub inputs: &'static [Port],
    /// Outputs; the first takes the upstream gradient.
    pub outputs: &'static [Port],
    /// Attribute names that a case may set.
    pub attrs: &'static [&'static str],
    /// The built-in cases.
    pub cases: fn() -> Vec<Case>,
    /// Runs the public op, so that the tape gives gradients.
    pub run: fn(&Attrs, &Tensors) -> Result<Tensors>,
    /// The forward in f64, by plain loops: the truth, and by finite differences the truth of the gradients.
    pub reference: fn(&Attrs, &Arrays) -> Result<Arrays>,
}

impl OpSpec {
    /// Whether the op has cases in this precision.
    pub fn has(&self, precision: DType) -> bool {
        let some = |storage| self.inputs.iter().any(|port| port.storage == storage);
        match precision {
            DType::F32 => !some(Storage::Half),
            _ => some(Storage::Half) || some(Storage::Any),
        }
    }
}

/// A built-in case: shapes and how to fill them.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is special about it.
    pub label: String,
    /// The op's options.
    pub attrs: Attrs,
    /// Inputs in the crate's layouts.
    pub inputs: Vec<Input>,
    /// Allowed relative error.
    pub rtol: f64,
    /// Allowed absolute error, in units of the expected tensor's largest magnitude.
    pub atol: f64,
    /// Whether gradients are checked by finite differences (small cases); else they are compared with the CPU's.
    pub gradcheck: bool,
    /// Whether any are wanted: an op may go another way where none are.
    pub gradients: bool,
    /// Which devices can run it.
    pub able: fn(&Caps) -> bool,
}

/// An input of a case.
#[derive(Clone, Debug)]
pub struct Input {
    /// The port's name.
    pub name: String,
    /// In the crate's layout.
    pub shape: Vec<usize>,
    /// What it is filled with.
    pub fill: Fill,
}

/// What an input is filled with.
#[derive(Clone, Copy, Debug)]
pub enum Fill {
    /// Standard normal, every 37th element 20 times as large: tests without outliers hide lost precision.
    Normal,
    /// Uniform between two bounds.
    Uniform(f32, f32),
    /// Labels below this number.
    Labels(u32),
}

impl Case {
    /// A case with no inputs yet, rtol 1e-4, atol 1e-5.
    pub fn new(label: &str) -> Self {
        Self {
            label: label.into(),
            attrs: Attrs::default(),
            inputs: Vec::new(),
            rtol: 1e-4,
            atol: 1e-5,
            gradcheck: true,
            gradients: true,
            able: |_| true,
        }
    }

    /// Sets an option of the op.
    pub fn attr(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.attrs.0.insert(name.into(), value.into());
        self
    }

    /// Adds an input of standard normal elements with outliers.
    pub fn normal(self, name: &str, shape: &[usize]) -> Self {
        self.input(name, shape, Fill::Normal)
    }

    /// Adds an input of uniform elements.
    pub fn uniform(self, name: &str, shape: &[usize], low: f32, high: f32) -> Self {
        self.input(name, shape, Fill::Uniform(low, high))
    }

    /// Adds labels in `0..classes`.
    pub fn labels(self, name: &str, shape: &[usize], classes: u32) -> Self {
        self.input(name, shape, Fill::Labels(classes))
    }

    fn input(mut self, name: &str, shape: &[usize], fill: Fill) -> Self {
        self.inputs.push(Input { name: name.into(), shape: shape.into(), fill });
        self
    }

    /// Sets the tolerances (say why where it is more than the default).
    pub fn tolerance(self, rtol: f64, atol: f64) -> Self {
        Self { rtol, atol, ..self }
    }

    /// For shapes too large for finite differences: gradients are compared with the CPU's.
    pub fn no_gradcheck(self) -> Self {
        Self { gradcheck: false, ..self }
    }

    /// For what only some devices have; the others do not count the case.
    pub fn only_where(self, able: fn(&Caps) -> bool) -> Self {
        Self { able, ..self }
    }

    /// For what an op does where no gradient is wanted.
    pub fn no_gradients(self) -> Self {
        Self { gradients: false, ..self }
    }

    /// The inputs on the host, the same on every call and machine.
    pub fn arrays(&self) -> Arrays {
        let seeded = self.inputs.iter().enumerate();
        seeded.map(|(i, input)| (input.name.clone(), input.array(i as u32))).collect()
    }
}

impl Input {
    fn array(&self, stream: u32) -> Array {
        let random = Philox { seed: 2404, step: 12295, op: stream };
        let element = |i: u64| match self.fill {
            Fill::Normal => random.normal(i) * if i % 37 == 36 { 20.0 } else { 1.0 },
            Fill::Uniform(low, high) => low + (high - low) * random.uniform(i),
            Fill::Labels(classes) => (random.word(i) % classes) as f32,
        };
        let len = self.shape.iter().product::<usize>() as u64;
        Array { shape: self.shape.clone(), data: (0..len).map(|i| f64::from(element(i))).collect() }
    }
}

impl Array {
    /// The array on a device: in the given dtype, or u32 for labels.
    ///
    /// # Errors
    /// As [`Tensor::from_f32_as`].
    pub fn to_tensor(&self, device: &Device, layout: Layout, dtype: DType) -> Result<Tensor> {
        if layout == Layout::Labels {
            let labels: Vec<u32> = self.data.iter().map(|v| *v as u32).collect();
            return Tensor::from_u32(device, &self.shape, &labels);
        }
        let data: Vec<f32> = self.data.iter().map(|v| *v as f32).collect();
        Tensor::from_f32_as(device, &self.shape, dtype, &data)
    }

    /// The array with each element rounded to the nearest that `dtype` has.
    pub fn rounded(&self, dtype: DType) -> Self {
        if !dtype.is_half() {
            return self.clone();
        }
        let numbers: Vec<f32> = self.data.iter().map(|v| *v as f32).collect();
        let mut bits = vec![0u16; numbers.len()];
        narrow(dtype, &numbers, &mut bits);
        let data = widen(dtype, &bits).into_iter().map(f64::from).collect();
        Self { shape: self.shape.clone(), data }
    }

    /// A tensor's elements.
    ///
    /// # Errors
    /// As [`Tensor::to_f32`].
    pub fn from_tensor(t: &Tensor) -> Result<Self> {
        let data = match t.dtype() {
            DType::U32 => t.to_u32()?.into_iter().map(f64::from).collect(),
            _ => t.to_f32()?.into_iter().map(f64::from).collect(),
        };
        Ok(Self { shape: t.shape().to_vec(), data })
    }

    /// From a file's layout to the crate's.
    pub fn from_file_layout(&self, layout: Layout) -> Self {
        match (layout, self.shape.len()) {
            (Layout::Image | Layout::Weight, 4) => self.permute([0, 2, 3, 1]),
            _ => self.clone(),
        }
    }

    /// From the crate's layout to a file's.
    pub fn to_file_layout(&self, layout: Layout) -> Self {
        match (layout, self.shape.len()) {
            (Layout::Image | Layout::Weight, 4) => self.permute([0, 3, 1, 2]),
            _ => self.clone(),
        }
    }

    fn permute(&self, axes: [usize; 4]) -> Self {
        let mut out = Self::zeros(&axes.map(|a| self.shape[a]));
        let [a, b, c, d] = [0, 1, 2, 3].map(|i| out.shape[i]);
        let mut to = 0;
        for i in 0..a {
            for j in 0..b {
                for k in 0..c {
                    for l in 0..d {
                        let mut from = [0; 4];
                        for (axis, index) in axes.iter().zip([i, j, k, l]) {
                            from[*axis] = index;
                        }
                        out.data[to] = self.get(&from);
                        to += 1;
                    }
                }
            }
        }
        out
    }
}

/// Looks up an input that must be there.
///
/// # Errors
/// [`Error::Shape`] naming the op and the input.
pub fn need<'m, T>(op: &'static str, inputs: &'m BTreeMap<String, T>, name: &str) -> Result<&'m T> {
    inputs.get(name).ok_or_else(|| {
        let given: Vec<_> = inputs.keys().collect();
        Error::shape(op, format!("input '{name}' is missing; given: {given:?}"))
    })
}

/// An op's options in a case: JSON with typed access.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attrs(pub Map<String, Value>);

impl Attrs {
    fn typed<T>(
        &self,
        name: &str,
        default: T,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => read(value).ok_or_else(|| {
                Error::usage(format!("attribute '{name}' is {value}, expected {expected}"))
            }),
        }
    }

    /// A number.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the attribute where it is something else; so for all of these.
    pub fn f64(&self, name: &str, default: f64) -> Result<f64> {
        self.typed(name, default, "a number", Value::as_f64)
    }

    /// A number that may be absent or null.
    ///
    /// # Errors
    /// As [`Attrs::f64`].
    pub fn opt_f64(&self, name: &str) -> Result<Option<f64>> {
        self.typed(name, None, "a number", |v| v.as_f64().map(Some))
    }

    /// A count.
    ///
    /// # Errors
    /// As [`Attrs::f64`].
    pub fn usize(&self, name: &str, default: usize) -> Result<usize> {
        self.typed(name, default, "a whole number", |v| v.as_u64().map(|n| n as usize))
    }

    /// A switch.
    ///
    /// # Errors
    /// As [`Attrs::f64`].
    pub fn bool(&self, name: &str, default: bool) -> Result<bool> {
        self.typed(name, default, "true or false", Value::as_bool)
    }

    /// A word.
    ///
    /// # Errors
    /// As [`Attrs::f64`].
    pub fn str(&self, name: &str, default: &str) -> Result<String> {
        self.typed(name, default.to_string(), "a word", |v| v.as_str().map(str::to_string))
    }

    /// Two counts, along H and W; one number stands for both.
    ///
    /// # Errors
    /// As [`Attrs::f64`].
    pub fn pair(&self, name: &str, default: [usize; 2]) -> Result<(usize, usize)> {
        let pair = self.typed(name, default, "a whole number or a list of two", |v| match v {
            Value::Array(list) if list.len() == 2 => {
                Some([list[0].as_u64()? as usize, list[1].as_u64()? as usize])
            }
            _ => v.as_u64().map(|n| [n as usize; 2]),
        })?;
        Ok((pair[0], pair[1]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_layouts_round_trip() {
        let data = (0..120).map(f64::from).collect();
        let nchw = Array { shape: vec![2, 3, 4, 5], data };
        let nhwc = nchw.from_file_layout(Layout::Image);
        assert_eq!(nhwc.shape, [2, 4, 5, 3]);
        assert_eq!(nhwc.get(&[1, 2, 3, 0]), nchw.get(&[1, 0, 2, 3]));
        assert_eq!(nhwc.to_file_layout(Layout::Image), nchw);
    }

    #[test]
    fn a_wrong_attribute_names_itself() {
        let case = Case::new("").attr("stride", "two");
        let message = case.attrs.pair("stride", [1, 1]).unwrap_err().to_string();
        assert!(message.contains("'stride'") && message.contains("\"two\""), "{message}");
    }
}
