//! Batch norm, fused with what follows it and with the convolution before it.

use super::{Conv, Counter, Init, Layer, Mode, Module, Slot, Value, join, parameter};
use crate::error::Result;
use crate::ops::case::Layout;
use crate::ops::{self, Activation};
use crate::tensor::Tensor;

/// Batch norm over the last axis, then an optional residual, then an activation. Owns `weight`, `bias`, `running_mean`,
/// `running_var` (all `[C]`) and `num_batches_tracked`. eps 1e-5 and momentum 0.1, PyTorch's defaults.
pub struct BatchNorm {
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Counter,
    act: Activation,
}

impl BatchNorm {
    /// `channels` channels with weight 1, bias 0 and running statistics 0 and 1, ending in `act`.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn new(init: &mut Init, channels: usize, act: Activation) -> Result<Self> {
        Self::with_weight(init, channels, act, 1.0)
    }

    /// As [`BatchNorm::new`], with another first weight: 0 makes a branch that adds nothing yet.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn with_weight(
        init: &mut Init,
        channels: usize,
        act: Activation,
        weight: f32,
    ) -> Result<Self> {
        Ok(Self {
            weight: init.constant(&[channels], weight)?,
            bias: init.constant(&[channels], 0.0)?,
            running_mean: init.constant(&[channels], 0.0)?,
            running_var: init.constant(&[channels], 1.0)?,
            batches: Counter::default(),
            act,
        })
    }

    /// `act(bn(x) + residual)`. A norm that is frozen ([`super::Parameters::freeze`]) takes its running statistics in training too.
    ///
    /// # Errors
    /// As [`ops::batch_norm`].
    pub fn forward_residual(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        mode: &Mode,
    ) -> Result<Tensor> {
        let (mean, var) = (&self.running_mean, &self.running_var);
        let opt = self.options(mode);
        let y = ops::batch_norm(x, &self.weight, &self.bias, mean, var, residual, opt)?;
        self.count(mode);
        Ok(y)
    }

    fn options(&self, mode: &Mode) -> ops::BatchNorm {
        ops::BatchNorm { training: self.learns(mode), act: self.act, ..Default::default() }
    }

    /// Whether it takes a batch's own statistics: a frozen norm does not.
    fn learns(&self, mode: &Mode) -> bool {
        mode.training && !self.batches.is_frozen()
    }

    /// One more batch seen, in training.
    fn count(&self, mode: &Mode) {
        if self.learns(mode) {
            self.batches.increment();
        }
    }
}

/// `act(norm(conv(x)) + residual)` as one op: the convolution gathers the statistics of the norm while its output is at hand, and an
/// evaluation without gradients is one launch with the norm folded in. The modules keep their own names in state dicts.
///
/// # Errors
/// As [`ops::conv_block`].
pub fn conv_norm(
    conv: &Conv,
    norm: &BatchNorm,
    x: &Tensor,
    residual: Option<&Tensor>,
    mode: &Mode,
) -> Result<Tensor> {
    let weight = conv.weight_as(x.dtype())?;
    let of_norm = ops::ConvBlockNorm {
        weight: &norm.weight,
        bias: &norm.bias,
        running_mean: &norm.running_mean,
        running_var: &norm.running_var,
    };
    let opt = ops::ConvBlock { conv: conv.opt, norm: norm.options(mode) };
    let y = ops::conv_block(x, &weight, of_norm, residual, opt)?;
    norm.count(mode);
    Ok(y)
}

impl BatchNorm {
    /// What it does, in words: `norm, relu`.
    pub(super) fn kind(&self) -> &'static str {
        match self.act {
            Activation::None => "norm",
            Activation::Relu => "norm, relu",
            Activation::Silu => "norm, silu",
        }
    }

    /// Learned numbers.
    pub(super) fn parameters(&self) -> usize {
        2 * self.weight.numel()
    }
}

impl Module for BatchNorm {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        self.forward_residual(x, None, mode)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let layer = Layer::new(prefix, self.kind(), input, self.parameters());
        rows.push(Layer { batch_norm: Some(prefix.into()), ..layer });
        input.to_vec()
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        parameter(f, prefix, "weight", &mut self.weight, Layout::Plain, false);
        parameter(f, prefix, "bias", &mut self.bias, Layout::Plain, false);
        let mut buffer =
            |name, tensor| f(Slot { name: join(prefix, name), value: Value::Buffer(tensor) });
        buffer("running_mean", &mut self.running_mean);
        buffer("running_var", &mut self.running_var);
        let name = join(prefix, "num_batches_tracked");
        f(Slot { name, value: Value::Counter(&mut self.batches) });
    }
}
