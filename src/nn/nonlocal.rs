//! Non-local blocks, of the whole map or of a window.

use super::{AttentionConfig, BatchNorm, Conv, Init, Layer, Mode, Module, Slot, join};
use crate::error::Result;
use crate::ops::Activation;
use crate::tensor::Tensor;

/// `x + norm(proj(y))`, where y is attention without scale and positions of `theta(x)`, `phi(x)` and `g(x)`, 1x1 convolutions with
/// bias to half the channels: the embedded Gaussian form of Wang et al. 2018, "Non-local Neural Networks". `proj` (their W) has a
/// bias too; the norm's weight starts at zero, so the block starts as the identity. With the reach of a window only the softmax
/// changes.
pub struct NonLocal {
    config: AttentionConfig,
    theta: Conv,
    phi: Conv,
    g: Conv,
    proj: Conv,
    norm: BatchNorm,
}

impl NonLocal {
    /// A block of `channels` channels in and out; `config` is of the attention inside, so at half of them.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn new(init: &mut Init, channels: usize, config: AttentionConfig) -> Result<Self> {
        let mut pointwise = |inputs, outputs| {
            let conv = Conv::new(init, inputs, outputs, 1, 1)?;
            conv.with_bias(init)
        };
        let inner = config.channels;
        Ok(Self {
            config,
            theta: pointwise(channels, inner)?,
            phi: pointwise(channels, inner)?,
            g: pointwise(channels, inner)?,
            proj: pointwise(inner, channels)?,
            norm: BatchNorm::with_weight(init, channels, Activation::None, 0.0)?,
        })
    }
}

impl Module for NonLocal {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let embed = |conv: &Conv| conv.forward(x, mode);
        let (theta, phi, g) = (embed(&self.theta)?, embed(&self.phi)?, embed(&self.g)?);
        let y = self.config.attend([&theta, &phi, &g], None)?;
        self.norm.forward_residual(&self.proj.forward(&y, mode)?, Some(x), mode)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        for (name, conv) in [("theta", &self.theta), ("phi", &self.phi), ("g", &self.g)] {
            conv.describe(&join(prefix, name), input, rows);
        }
        let attention = self.config.describe(prefix, input, 0);
        let y = attention.output.clone();
        rows.push(attention);
        let y = self.proj.describe(&join(prefix, "proj"), &y, rows);
        self.norm.describe(&join(prefix, "norm"), &y, rows)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.theta.visit(&join(prefix, "theta"), f);
        self.phi.visit(&join(prefix, "phi"), f);
        self.g.visit(&join(prefix, "g"), f);
        self.proj.visit(&join(prefix, "proj"), f);
        self.norm.visit(&join(prefix, "norm"), f);
    }
}
