//! Squeeze-excite.

use super::{Init, Layer, Mode, Module, Slot, join, parameter, product};
use crate::error::Result;
use crate::ops;
use crate::ops::case::Layout;
use crate::tensor::Tensor;

/// A gate for each channel from the mean of all (Hu et al. 2018): `x * sigmoid(fc2 silu(fc1 mean(x)))`. Owns `fc1` and `fc2`, weight
/// and bias each; their weights are 1x1 convolutions in files.
pub struct SqueezeExcite {
    fc1: (Tensor, Tensor),
    fc2: (Tensor, Tensor),
}

impl SqueezeExcite {
    /// `channels` channels, squeezed to `squeeze`. Weights start as those of any convolution, biases at zero.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn new(init: &mut Init, channels: usize, squeeze: usize) -> Result<Self> {
        let mut pointwise = |inputs, outputs| {
            let std = (2.0 / outputs as f32).sqrt();
            let weight = init.normal(&[outputs, 1, 1, inputs], std)?;
            Ok::<_, crate::Error>((weight, init.constant(&[outputs], 0.0)?))
        };
        Ok(Self { fc1: pointwise(channels, squeeze)?, fc2: pointwise(squeeze, channels)? })
    }
}

impl Module for SqueezeExcite {
    fn forward(&self, x: &Tensor, _: &Mode) -> Result<Tensor> {
        let (c, s) = (self.fc2.1.numel(), self.fc1.1.numel());
        let (w1, w2) = (self.fc1.0.reshape(&[s, c])?, self.fc2.0.reshape(&[c, s])?);
        ops::squeeze_excite(x, &w1, &self.fc1.1, &w2, &self.fc2.1)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let (c, s) = (self.fc2.1.numel(), self.fc1.1.numel());
        let layer = Layer::new(prefix, format!("squeeze-excite to {s}"), input, 2 * c * s + c + s);
        rows.push(layer.with_flop(4.0 * product(&[c, s])));
        input.to_vec()
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        for (name, (weight, bias)) in [("fc1", &mut self.fc1), ("fc2", &mut self.fc2)] {
            let prefix = join(prefix, name);
            parameter(f, &prefix, "weight", weight, Layout::Weight, true);
            parameter(f, &prefix, "bias", bias, Layout::Plain, false);
        }
    }
}
