//! Attention between two embeddings of its channels.

use super::{
    Attention, AttentionConfig, BatchNorm, Conv, ConvNorm, Init, Layer, Mode, Module, Slot,
    conv_norm, join,
};
use crate::error::Result;
use crate::ops::Activation;
use crate::tensor::Tensor;

/// `x + norm(expand(relu(norm(attention(relu(norm(reduce(x))))))))` with 1x1 convolutions without bias: the bottleneck of He et al.
/// 2015 with attention as its spatial part. The last norm's weight starts at zero, so the layer starts as the identity.
pub struct AttentionBottleneck {
    reduce: ConvNorm,
    attention: Attention,
    inner: BatchNorm,
    expand: Conv,
    norm: BatchNorm,
}

impl AttentionBottleneck {
    /// A layer of `channels` channels in and out; `config` is of the attention inside.
    ///
    /// # Errors
    /// As [`Attention::new`].
    pub fn new(init: &mut Init, channels: usize, config: AttentionConfig) -> Result<Self> {
        let inner = config.channels;
        let reduce = Conv::new(init, channels, inner, 1, 1)?;
        Ok(Self {
            reduce: ConvNorm::new(init, reduce, inner, Activation::Relu, ["reduce", "norm1"])?,
            attention: Attention::new(init, config)?,
            inner: BatchNorm::new(init, inner, Activation::Relu)?,
            expand: Conv::new(init, inner, channels, 1, 1)?,
            norm: BatchNorm::with_weight(init, channels, Activation::None, 0.0)?,
        })
    }
}

impl Module for AttentionBottleneck {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let y = self.attention.forward(&self.reduce.forward(x, mode)?, mode)?;
        conv_norm(&self.expand, &self.norm, &self.inner.forward(&y, mode)?, Some(x), mode)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let y = self.reduce.describe(prefix, input, rows);
        let y = self.attention.describe(prefix, &y, rows);
        let y = self.inner.describe(&join(prefix, "norm2"), &y, rows);
        let y = self.expand.describe(&join(prefix, "expand"), &y, rows);
        self.norm.describe(&join(prefix, "norm3"), &y, rows)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.reduce.visit(prefix, f);
        self.attention.visit(prefix, f);
        self.inner.visit(&join(prefix, "norm2"), f);
        self.expand.visit(&join(prefix, "expand"), f);
        self.norm.visit(&join(prefix, "norm3"), f);
    }
}
