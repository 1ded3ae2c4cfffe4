//! A fully connected layer.

use super::{Init, Layer, Mode, Module, Slot, parameter, product};
use crate::error::Result;
use crate::ops;
use crate::ops::case::Layout;
use crate::tensor::Tensor;

/// `y = x weight^T + bias`. Owns `weight [O, I]` and `bias [O]`, in f32; x in f16 or bf16 meets a copy of the weight that is stored
/// as x is.
pub struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// `inputs -> outputs`, both weight and bias uniform in `+-1 / sqrt(inputs)`: PyTorch's default.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn new(init: &mut Init, inputs: usize, outputs: usize) -> Result<Self> {
        let bound = 1.0 / (inputs as f32).sqrt();
        let weight = init.uniform(&[outputs, inputs], bound)?;
        Ok(Self { weight, bias: init.uniform(&[outputs], bound)? })
    }

    /// A layer of given first values: weight `[O, I]` and bias `[O]`.
    pub fn from_parts(weight: Tensor, bias: Tensor) -> Self {
        Self { weight, bias }
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor, _: &Mode) -> Result<Tensor> {
        ops::linear(x, &ops::cast(&self.weight, x.dtype())?, Some(&self.bias))
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let mut output = input.to_vec();
        if let Some(last) = output.last_mut() {
            *last = self.bias.numel();
        }
        let parameters = self.weight.numel() + self.bias.numel();
        let flop = 2.0 * product(input) * self.bias.numel() as f64;
        rows.push(Layer::new(prefix, "linear", &output, parameters).with_flop(flop));
        output
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        parameter(f, prefix, "weight", &mut self.weight, Layout::Plain, true);
        parameter(f, prefix, "bias", &mut self.bias, Layout::Plain, false);
    }
}
