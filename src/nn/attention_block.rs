//! Attention and its output projection.

use super::{Attention, AttentionConfig, Conv, Init, Layer, Mode, Module, Slot, join};
use crate::error::Result;
use crate::tensor::Tensor;

/// Attention and the 1x1 convolution behind it, `[N, H, W, C] -> [N, H, W, C]`: `proj(attention(x))`, or that plus x. Owns what
/// [`Attention`] owns, under the same names, and `proj.weight`. On small maps all of it is the two launches of
/// [`crate::ops::attention_block()`].
pub struct AttentionBlock {
    attention: Attention,
    proj: Conv,
    residual: bool,
}

impl AttentionBlock {
    /// `residual`: whether x is added; not where a norm follows, behind which the residual then belongs.
    ///
    /// # Errors
    /// As [`Attention::new`].
    pub fn new(init: &mut Init, config: AttentionConfig, residual: bool) -> Result<Self> {
        let channels = config.channels;
        Ok(Self {
            attention: Attention::new(init, config)?,
            proj: Conv::new(init, channels, channels, 1, 1)?,
            residual,
        })
    }
}

impl Module for AttentionBlock {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        self.attention.block(x, Some(&self.proj), self.residual, mode)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let y = self.attention.describe(prefix, input, rows);
        self.proj.describe(&join(prefix, "proj"), &y, rows)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.attention.visit(prefix, f);
        self.proj.visit(&join(prefix, "proj"), f);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::nn::{Reach, Tables};
    use crate::ops::{self, Border};
    use crate::tensor::philox::Philox;

    #[test]
    fn a_block_is_attention_projection_and_residual() {
        let device = Device::cpu();
        let x = Tensor::randn(&device, &[2, 3, 5, 12], Philox { seed: 1, step: 0, op: 0 }).unwrap();
        let local = Reach::Local { window: (3, 3), border: Border::Mask };
        for reach in [Reach::Global { map: (3, 5) }, local] {
            let config = AttentionConfig {
                channels: 12,
                heads: 3,
                reach,
                tables: Tables::Sum,
                scaled: true,
            };
            let mut init = Init::new(&device, 7);
            let mut block = AttentionBlock::new(&mut init, config, true).unwrap();
            let inner = block.attention.forward(&x, &Mode::EVAL).unwrap();
            let want = ops::add(&block.proj.forward(&inner, &Mode::EVAL).unwrap(), &x).unwrap();
            let got = block.forward(&x, &Mode::EVAL).unwrap().to_f32().unwrap();
            let close = got.iter().zip(want.to_f32().unwrap()).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(close, "{reach:?}");
            let mut names = Vec::new();
            block.visit("attn", &mut |slot| names.push(slot.name));
            let owned = ["q.weight", "k.weight", "v.weight", "rel_h", "rel_w", "proj.weight"];
            assert_eq!(names, owned.map(|name| format!("attn.{name}")));
        }
    }
}
