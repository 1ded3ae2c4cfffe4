//! Attention as a residual branch.

use super::{
    Attention, AttentionConfig, BatchNorm, Conv, Init, Layer, Mode, Module, Slot, conv_norm, join,
};
use crate::error::Result;
use crate::ops::Activation;
use crate::tensor::Tensor;

/// `x + norm(proj(attention(x)))`; the norm's weight starts at zero, so at first the branch adds nothing. The projection is a 1x1
/// convolution without bias.
pub struct Appended<M = Attention> {
    attention: M,
    proj: Conv,
    norm: BatchNorm,
}

impl Appended<Attention> {
    /// A fresh branch.
    ///
    /// # Errors
    /// As [`Attention::new`].
    pub fn new(init: &mut Init, config: AttentionConfig) -> Result<Self> {
        let attention = Attention::new(init, config)?;
        Self::around(init, attention, config.channels)
    }
}

impl<M: Module> Appended<M> {
    /// A branch round a layer of `channels` channels in and out.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn around(init: &mut Init, attention: M, channels: usize) -> Result<Self> {
        Ok(Self {
            attention,
            proj: Conv::new(init, channels, channels, 1, 1)?,
            norm: BatchNorm::with_weight(init, channels, Activation::None, 0.0)?,
        })
    }
}

impl<M: Module> Module for Appended<M> {
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
