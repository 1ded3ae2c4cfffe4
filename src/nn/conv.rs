//! Convolution.

use super::{Init, Layer, Mode, Module, Slot, parameter, product};
use crate::error::Result;
use crate::ops::case::Layout;
use crate::ops::{self, Conv2d};
use crate::tensor::{DType, Tensor};

/// A convolution. Owns `weight [O, kh, kw, I / groups]` (OIHW in files) and, where it has one, `bias [O]`, in f32; an image in f16 or
/// bf16 meets a copy of the weight that is stored as the image is.
pub struct Conv {
    pub(super) weight: Tensor,
    bias: Option<Tensor>,
    pub(super) opt: Conv2d,
}

impl Conv {
    /// A `kernel` x `kernel` convolution `inputs -> outputs` with padding `kernel / 2`, so that stride 1 keeps the size, and without
    /// bias, as it stands before a batch norm. Kaiming normal initialisation for ReLU, by fan-out:
    /// `std = sqrt(2 / (outputs * kernel^2))`, as torchvision's nets.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn new(
        init: &mut Init,
        inputs: usize,
        outputs: usize,
        kernel: usize,
        stride: usize,
    ) -> Result<Self> {
        let std = (2.0 / (outputs * kernel * kernel) as f32).sqrt();
        let weight = init.normal(&[outputs, kernel, kernel, inputs], std)?;
        let padding = (kernel / 2, kernel / 2);
        let opt = Conv2d { stride: (stride, stride), padding, ..Conv2d::default() };
        Ok(Self::from_weight(weight, opt))
    }

    /// A depthwise convolution: each channel with a kernel of its own. `std = sqrt(2 / (channels * kernel^2))`, since PyTorch
    /// counts the fan-out of all channels.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn depthwise(
        init: &mut Init,
        channels: usize,
        kernel: usize,
        stride: usize,
    ) -> Result<Self> {
        let std = (2.0 / (channels * kernel * kernel) as f32).sqrt();
        let weight = init.normal(&[channels, kernel, kernel, 1], std)?;
        let padding = (kernel / 2, kernel / 2);
        let opt =
            Conv2d { stride: (stride, stride), padding, groups: channels, ..Conv2d::default() };
        Ok(Self::from_weight(weight, opt))
    }

    /// The same convolution with a bias, which starts at zero.
    ///
    /// # Errors
    /// As [`Tensor::uninit`].
    pub fn with_bias(self, init: &mut Init) -> Result<Self> {
        let bias = init.constant(&self.weight.shape()[..1], 0.0)?;
        Ok(Self { bias: Some(bias), ..self })
    }

    /// A convolution that starts with this weight `[O, kh, kw, I / groups]`, without bias.
    pub fn from_weight(weight: Tensor, opt: Conv2d) -> Self {
        Self { weight, bias: None, opt }
    }

    /// A convolution of given first values, with a bias.
    pub fn from_parts(weight: Tensor, bias: Tensor, opt: Conv2d) -> Self {
        Self { weight, bias: Some(bias), opt }
    }

    /// The weight, stored as `dtype` says.
    pub(super) fn weight_as(&self, dtype: DType) -> Result<Tensor> {
        ops::cast(&self.weight, dtype)
    }
}

impl Module for Conv {
    fn forward(&self, x: &Tensor, _: &Mode) -> Result<Tensor> {
        ops::conv2d(x, &self.weight_as(x.dtype())?, self.bias.as_ref(), self.opt)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let &[o, kh, kw, per_group] = self.weight.shape() else { return input.to_vec() };
        let side = |axis: usize, kernel: usize, padding: usize, stride: usize| {
            (input.get(axis).copied().unwrap_or(1) + 2 * padding).saturating_sub(kernel) / stride
                + 1
        };
        let Conv2d { stride, padding, groups, .. } = self.opt;
        let output = [side(0, kh, padding.0, stride.0), side(1, kw, padding.1, stride.1), o];
        let name = match (groups, per_group) {
            (1, _) => "conv",
            (_, 1) => "depthwise",
            _ => "grouped conv",
        };
        let step = if stride.0 > 1 { format!(" /{}", stride.0) } else { String::new() };
        let parameters = self.weight.numel() + self.bias.as_ref().map_or(0, Tensor::numel);
        let flop = 2.0 * product(&output) * product(&[kh, kw, per_group]);
        let kind = format!("{name} {kh}x{kw}{step}");
        rows.push(Layer::new(prefix, kind, &output, parameters).with_flop(flop));
        output.to_vec()
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        parameter(f, prefix, "weight", &mut self.weight, Layout::Weight, true);
        if let Some(bias) = &mut self.bias {
            parameter(f, prefix, "bias", bias, Layout::Plain, false);
        }
    }
}
