//! Convolution.

use super::{Init, Mode, Module, Slot, parameter};
use crate::error::Result;
use crate::ops::case::Layout;
use crate::ops::{self, Conv2d};
use crate::tensor::{DType, Tensor};

/// A convolution without bias, as it stands before a batch norm. Owns `weight [O, kh, kw, I]` (OIHW in files), in f32; an image in
/// f16 or bf16 meets a copy of it that is stored as the image is.
pub struct Conv {
    weight: Tensor,
    opt: Conv2d,
}

impl Conv {
    /// A `kernel` x `kernel` convolution `inputs -> outputs` with padding `kernel / 2`, so that stride 1 keeps the size.
    /// Kaiming normal initialisation for ReLU, by fan-out: `std = sqrt(2 / (outputs * kernel^2))`, as torchvision's ResNet.
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
        Ok(Self { weight, opt: Conv2d { stride: (stride, stride), padding, ..Conv2d::default() } })
    }

    /// The weight, stored as `dtype` says.
    pub(super) fn weight_as(&self, dtype: DType) -> Result<Tensor> {
        ops::cast(&self.weight, dtype)
    }
}

impl Module for Conv {
    fn forward(&self, x: &Tensor, _: &Mode) -> Result<Tensor> {
        ops::conv2d(x, &self.weight_as(x.dtype())?, None, self.opt)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        parameter(f, prefix, "weight", &mut self.weight, Layout::Weight, true);
    }
}
