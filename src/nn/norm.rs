//! Batch norm, fused with what follows it.

use super::{Counter, Init, Mode, Module, Slot, Value, join, parameter};
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
        let training = mode.training && !self.batches.is_frozen();
        let opt = ops::BatchNorm { training, act: self.act, ..Default::default() };
        let (mean, var) = (&self.running_mean, &self.running_var);
        let y = ops::batch_norm(x, &self.weight, &self.bias, mean, var, residual, opt)?;
        if training {
            self.batches.increment();
        }
        Ok(y)
    }
}

impl Module for BatchNorm {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        self.forward_residual(x, None, mode)
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
