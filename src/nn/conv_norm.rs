//! A convolution and the batch norm that follows it.

use super::{BatchNorm, Conv, Init, Layer, Mode, Module, Slot, conv_norm, join};
use crate::error::Result;
use crate::ops::Activation;
use crate::tensor::Tensor;

/// `act(norm(conv(x)))`, of `residual` added before the activation where there is one.
pub struct ConvNorm {
    conv: Conv,
    norm: BatchNorm,
    names: [&'static str; 2],
}

impl ConvNorm {
    /// Puts a convolution to `outputs` channels before a new norm; `names` are those of both in a state dict.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn new(
        init: &mut Init,
        conv: Conv,
        outputs: usize,
        act: Activation,
        names: [&'static str; 2],
    ) -> Result<Self> {
        Ok(Self { conv, norm: BatchNorm::new(init, outputs, act)?, names })
    }

    /// `act(norm(conv(x)) + residual)`.
    ///
    /// # Errors
    /// As [`crate::ops::conv_block`].
    pub fn forward_residual(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        mode: &Mode,
    ) -> Result<Tensor> {
        conv_norm(&self.conv, &self.norm, x, residual, mode)
    }
}

impl Module for ConvNorm {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        self.forward_residual(x, None, mode)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let output = self.conv.describe(&join(prefix, self.names[0]), input, rows);
        if let Some(row) = rows.last_mut() {
            row.kind += &format!(", {}", self.norm.kind());
            row.parameters += self.norm.parameters();
            row.batch_norm = Some(join(prefix, self.names[1]));
        }
        output
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.conv.visit(&join(prefix, self.names[0]), f);
        self.norm.visit(&join(prefix, self.names[1]), f);
    }
}
