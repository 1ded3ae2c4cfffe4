//! Layer norm.

use super::{Init, Layer, Mode, Module, Slot, parameter};
use crate::error::Result;
use crate::ops;
use crate::ops::case::Layout;
use crate::tensor::Tensor;

/// Layer norm over the last axis. Owns `weight` and `bias`.
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    opt: ops::LayerNorm,
}

impl LayerNorm {
    /// Weight 1, bias 0.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn new(init: &mut Init, channels: usize, eps: f32) -> Result<Self> {
        let weight = init.constant(&[channels], 1.0)?;
        Ok(Self { weight, bias: init.constant(&[channels], 0.0)?, opt: ops::LayerNorm { eps } })
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor, _: &Mode) -> Result<Tensor> {
        ops::layer_norm(x, &self.weight, &self.bias, self.opt)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        rows.push(Layer::new(prefix, "layer norm", input, 2 * self.weight.numel()));
        input.to_vec()
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        parameter(f, prefix, "weight", &mut self.weight, Layout::Plain, false);
        parameter(f, prefix, "bias", &mut self.bias, Layout::Plain, false);
    }
}
