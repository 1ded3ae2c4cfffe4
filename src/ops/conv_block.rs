//! Convolution, batch norm, activation and residual as one op: `y = act(bn(conv(x)) + residual)`.
//!
//! It has no kernels of its own: it puts those of [`mod@super::conv2d`] and [`mod@super::batch_norm`] together.

use super::batch_norm::{self, BatchNorm};
use super::conv2d::{self, Conv2d};
use crate::error::Result;
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
    let ConvBlockNorm { weight, bias, running_mean, running_var } = norm;
    let y = conv2d::conv2d(x, w, None, opt.conv)?;
    batch_norm::batch_norm(&y, weight, bias, running_mean, running_var, residual, opt.norm)
}
