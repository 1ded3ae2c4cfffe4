//! Convolution, batch norm, activation and residual as one op: `y = act(bn(conv(x)) + residual)`.
//!
//! It has no kernels of its own: it puts those of `conv2d.rs` and `batch_norm.rs` together.
//!
//! * **Training**: the convolution gathers the norm's statistics tile by tile while its output is at hand, a small launch joins them, and one
//!   pass normalises, adds and activates. What is saved for backward is what the two parts save.
//! * **Evaluation** where no gradient is wanted: the norm is folded into the convolution. One launch of a few numbers a channel, then
//!   one that does everything. The scale is applied to the sums in f32 and not to the weights: as cheap, and in half precision
//!   no weight is rounded again.
//! * Evaluation where one is wanted, and grouped convolutions: the two parts one after the other.

use super::batch_norm::{self, BatchNorm};
use super::conv2d::{self, Conv2d};
use crate::error::Result;
use crate::tape;
use crate::tensor::Tensor;

mod spec;

pub(crate) use spec::SPEC;

/// What [`conv_block`]'s batch norm owns, each `[O]` and f32. In training the running statistics are updated in place.
#[derive(Clone, Copy)]
pub struct ConvBlockNorm<'a> {
    /// Multiplies what is normalised.
    pub weight: &'a Tensor,
    /// Added to it.
    pub bias: &'a Tensor,
    /// Mean of each channel over the batches seen.
    pub running_mean: &'a Tensor,
    /// Unbiased variance of each channel over the batches seen.
    pub running_var: &'a Tensor,
}

/// Options of [`conv_block`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ConvBlock {
    /// Of the convolution.
    pub conv: Conv2d,
    /// Of the norm, and the activation at the end.
    pub norm: BatchNorm,
}

/// `act(bn(conv(x, w)) + residual)`: x `[N, H, W, C]`, w `[O, kh, kw, C / groups]`, the residual (if any) and y `[N, P, Q, O]`. What the two
/// parts are, their gradients and how they may be stored: [`conv2d()`](super::conv2d()) and [`batch_norm()`](super::batch_norm()).
///
/// # Errors
/// [`crate::Error::Shape`] where shapes, storage or options do not fit, naming what is expected.
pub fn conv_block(
    x: &Tensor,
    w: &Tensor,
    norm: ConvBlockNorm<'_>,
    residual: Option<&Tensor>,
    opt: ConvBlock,
) -> Result<Tensor> {
    const OP: &str = "conv_block";
    let ConvBlockNorm { weight, bias, running_mean: mean, running_var: var } = norm;
    if opt.conv.groups != 1 {
        let y = conv2d::conv2d(x, w, None, opt.conv)?;
        return batch_norm::batch_norm(&y, weight, bias, mean, var, residual, opt.norm);
    }
    let p = opt.conv.check(x, w, None)?;
    let y = Tensor::uninit(x.device(), &[p.n, p.p, p.q, p.o].map(|v| v as usize), x.dtype())?;
    let named = [
        ("norm.weight", weight),
        ("norm.bias", bias),
        ("norm.running_mean", mean),
        ("norm.running_var", var),
    ];
    let of_norm = batch_norm::check(OP, ("the output", &y), named, residual, opt.norm)?;
    let per_channel = named.map(|n| n.1);
    if opt.norm.training {
        let (y, part, rows) = conv2d::with_statistics(p, x, w, y)?;
        return batch_norm::normalise(&y, per_channel, residual, of_norm, Some((&part, rows)));
    }
    let mut inputs = vec![x, w, weight, bias];
    inputs.extend(residual);
    if tape::is_recording(&inputs) {
        let y = conv2d::conv2d(x, w, None, opt.conv)?;
        return batch_norm::normalise(&y, per_channel, residual, of_norm, None);
    }
    let table = batch_norm::table(&y, per_channel, of_norm, None)?;
    conv2d::normalised(p, x, w, &table, (residual, of_norm.act), &y)?;
    Ok(y)
}
