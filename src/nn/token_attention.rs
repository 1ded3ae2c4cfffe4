//! Self-attention of tokens, with PyTorch's names.

use super::{Init, Layer, Linear, Mode, Module, Slot, join, parameter, product};
use crate::error::{Error, Result};
use crate::ops::case::Layout;
use crate::ops::{self, GlobalAttention};
use crate::tensor::Tensor;

/// `out_proj(softmax(q.k / sqrt(d)) v)` of tokens `[N, T, C]`, as `torch.nn.MultiheadAttention` computes it: q, k and v are one
/// projection `in_proj_weight [3 C, C]` with `in_proj_bias`.
pub struct TokenAttention {
    heads: usize,
    weight: Tensor,
    bias: Tensor,
    out: Linear,
}

impl TokenAttention {
    /// Heads, the weight `[3 C, C]` of q, k and v, and the output projection; their bias starts at zero.
    ///
    /// # Errors
    /// [`Error::Usage`] where `heads` does not divide C, else as [`Tensor::uninit`].
    pub fn new(init: &mut Init, heads: usize, weight: Tensor, out: Linear) -> Result<Self> {
        let channels = weight.shape()[0] / 3;
        if heads == 0 || !channels.is_multiple_of(heads) {
            let message = format!("{heads} attention heads do not divide {channels} channels");
            return Err(Error::usage(message));
        }
        let bias = init.constant(&[3 * channels], 0.0)?;
        Ok(Self { heads, weight, bias, out })
    }
}

impl Module for TokenAttention {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let [n, t, c] = x.dims("attention", "x [N, T, C]")?;
        let weights = ops::split_rows(&ops::cast(&self.weight, x.dtype())?, 3)?;
        let biases = ops::split_rows(&self.bias, 3)?;
        // Tokens as a map of one row.
        let project = |i: usize| {
            let y = ops::linear(x, &weights[i], Some(&biases[i]))?;
            y.reshape(&[n, 1, t, self.heads, c / self.heads])
        };
        let (q, k, v) = (project(0)?, project(1)?, project(2)?);
        let y = ops::global_attention(&q, &k, &v, GlobalAttention::default())?;
        self.out.forward(&y.reshape(&[n, t, c])?, mode)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let (c, t) = (self.bias.numel() / 3, input.first().copied().unwrap_or(1));
        let parameters = self.weight.numel() + self.bias.numel();
        let projection = Layer::new(&join(prefix, "in_proj"), "q, k, v", &[t, 3 * c], parameters);
        rows.push(projection.with_flop(2.0 * product(&[t, c, 3 * c])));
        let kind = format!("global attention, {} heads", self.heads);
        let pairs = product(&[self.heads, t, t]);
        let attention = Layer { pairs, ..Layer::new(prefix, kind, input, 0) };
        rows.push(attention.with_flop(4.0 * product(&[t, t, c])));
        self.out.describe(&join(prefix, "out_proj"), input, rows)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        parameter(f, prefix, "in_proj_weight", &mut self.weight, Layout::Plain, true);
        parameter(f, prefix, "in_proj_bias", &mut self.bias, Layout::Plain, false);
        self.out.visit(&join(prefix, "out_proj"), f);
    }
}
