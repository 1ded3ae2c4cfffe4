//! Attention as a residual branch.

use super::{
    Attention, AttentionConfig, BatchNorm, Conv, Init, Layer, Mode, Module, Slot, conv_norm, join,
};
use crate::error::Result;
use crate::ops::Activation;
use crate::tensor::Tensor;

/// `x + norm(proj(attention(x)))`; the norm's weight starts at zero, so at first the branch adds nothing. The projection is a 1x1
/// convolution without bias.
pub struct Appended {
    attention: Attention,
    proj: Conv,
    norm: BatchNorm,
}

impl Appended {
    /// A fresh branch.
    ///
    /// # Errors
    /// As [`Attention::new`].
    pub fn new(init: &mut Init, config: AttentionConfig) -> Result<Self> {
        let channels = config.channels;
        Ok(Self {
            attention: Attention::new(init, config)?,
            proj: Conv::new(init, channels, channels, 1, 1)?,
            norm: BatchNorm::with_weight(init, channels, Activation::None, 0.0)?,
        })
    }
}

impl Module for Appended {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        conv_norm(&self.proj, &self.norm, &self.attention.forward(x, mode)?, Some(x), mode)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let y = self.attention.describe(prefix, input, rows);
        let y = self.proj.describe(&join(prefix, "proj"), &y, rows);
        self.norm.describe(&join(prefix, "norm"), &y, rows)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.attention.visit(prefix, f);
        self.proj.visit(&join(prefix, "proj"), f);
        self.norm.visit(&join(prefix, "norm"), f);
    }
}
