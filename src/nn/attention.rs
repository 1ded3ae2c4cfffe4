//! Self-attention over an image, with its projections.

use super::{Conv, Init, Mode, Module, Slot, join, parameter};
use crate::error::{Error, Result};
use crate::ops::case::Layout;
use crate::ops::{self, Border, LocalAttention};
use crate::tensor::Tensor;

/// Which pixels a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The whole map, whose height and width position tables are made for.
    Global {
        /// Height and width of the map.
        map: (usize, usize),
    },
    /// A window round the query.
    Local {
        /// Height and width of the window, odd and at most [`ops::MAX_WINDOW`].
        window: (usize, usize),
        /// What it sees outside the map.
        border: Border,
    },
}

/// What an [`Attention`] is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionConfig {
    /// Channels in and out, a multiple of `heads`.
    pub channels: usize,
    /// Heads; each has `channels / heads` channels.
    pub heads: usize,
    /// Which pixels a query sees.
    pub reach: Reach,
    /// Whether logits have learned relative position tables.
    pub position: bool,
}

/// Self-attention `[N, H, W, C] -> [N, H, W, C]`: `softmax(q.k / sqrt(d) + q.(rel_h + rel_w)) v`, where q, k, v are 1x1
/// convolutions of x without bias (`q.weight`, `k.weight`, `v.weight`). With position tables it owns `rel_h` and `rel_w`,
/// a row of C for each vertical and horizontal offset: `2H - 1` and `2W - 1` for the whole map, the window's height and
/// width for a window.
pub struct Attention {
    config: AttentionConfig,
    q: Conv,
    k: Conv,
    v: Conv,
    rel: Option<(Tensor, Tensor)>,
}

impl Attention {
    /// Projections start like any other convolution. Tables start normal with standard deviation 0.02, small beside a
    /// pixel's own logit: our choice (published layers start theirs anywhere between that and 1).
    ///
    /// # Errors
    /// [`Error::Usage`] where `heads` does not divide the channels, else as [`Tensor::uninit`].
    pub fn new(init: &mut Init, config: AttentionConfig) -> Result<Self> {
        let AttentionConfig { channels, heads, .. } = config;
        if heads == 0 || !channels.is_multiple_of(heads) {
            return Err(Error::usage(format!(
                "{heads} attention heads do not divide {channels} channels; choose heads=N with N a divisor of {channels}"
            )));
        }
        let offsets = match config.reach {
            Reach::Global { map: (h, w) } => (2 * h - 1, 2 * w - 1),
            Reach::Local { window, .. } => window,
        };
        let mut projection = || Conv::new(init, channels, channels, 1, 1);
        let (q, k, v) = (projection()?, projection()?, projection()?);
        let rel = if config.position {
            let mut table = |offsets| init.normal(&[offsets, channels], 0.02);
            Some((table(offsets.0)?, table(offsets.1)?))
        } else {
            None
        };
        Ok(Self { config, q, k, v, rel })
    }

    fn check_map(&self, h: usize, w: usize) -> Result<()> {
        match self.config.reach {
            Reach::Global { map } if self.rel.is_some() && map != (h, w) => Err(Error::shape(
                "attention",
                format!(
                    "the position tables are for a map of {}x{}, but it is {h}x{w}; \
                     use the image size that the model was built for",
                    map.0, map.1
                ),
            )),
            _ => Ok(()),
        }
    }
}

impl Attention {
    /// The attention's output, through `proj` where there is one, plus x where `residual`.
    fn block(
        &self,
        x: &Tensor,
        proj: Option<&Conv>,
        residual: bool,
        mode: &Mode,
    ) -> Result<Tensor> {
        let [n, h, w, c] = x.dims("attention", "x")?;
        self.check_map(h, w)?;
        let heads = self.config.heads;
        let (rel_h, rel_w) = (self.rel.as_ref().map(|r| &r.0), self.rel.as_ref().map(|r| &r.1));
        let (window, border) = match self.config.reach {
            Reach::Local { window, border } => (window, border),
            Reach::Global { .. } => {
                let weight = |conv: &Conv| conv.weight_as(x.dtype());
                let (q, k, v) = (weight(&self.q)?, weight(&self.k)?, weight(&self.v)?);
                let (qkv, proj) = ([&q, &k, &v], proj.map(weight).transpose()?);
                let proj = proj.as_ref();
                let block =
                    ops::AttentionBlock { heads, scale: None, qkv, proj, rel_h, rel_w, residual };
                return ops::attention_block(x, block);
            }
        };
        let tokens = |conv: &Conv| conv.forward(x, mode)?.reshape(&[n, h, w, heads, c / heads]);
        let (q, k, v) = (tokens(&self.q)?, tokens(&self.k)?, tokens(&self.v)?);
        let opt = LocalAttention { window, border, rel_h, rel_w, ..Default::default() };
        let mut y = ops::local_attention(&q, &k, &v, opt)?.reshape(&[n, h, w, c])?;
        if let Some(proj) = proj {
            y = proj.forward(&y, mode)?;
        }
        if residual { ops::add(&y, x) } else { Ok(y) }
    }
}

impl Module for Attention {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        self.block(x, None, false, mode)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        for (name, conv) in [("q", &mut self.q), ("k", &mut self.k), ("v", &mut self.v)] {
            conv.visit(&join(prefix, name), f);
        }
        if let Some((rel_h, rel_w)) = &mut self.rel {
            parameter(f, prefix, "rel_h", rel_h, Layout::Plain, true);
            parameter(f, prefix, "rel_w", rel_w, Layout::Plain, true);
        }
    }
}

/// Attention and the 1x1 convolution behind it, `[N, H, W, C] -> [N, H, W, C]`: `proj(attention(x))`, or that plus x. Owns what
/// [`Attention`] owns, under the same names, and `proj.weight`. On small maps all of it is the two launches of
/// [`ops::attention_block`].
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

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.attention.visit(prefix, f);
        self.proj.visit(&join(prefix, "proj"), f);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::tensor::philox::Philox;

    #[test]
    fn a_block_is_attention_projection_and_residual() {
        let device = Device::cpu();
        let x = Tensor::randn(&device, &[2, 3, 5, 12], Philox { seed: 1, step: 0, op: 0 }).unwrap();
        let local = Reach::Local { window: (3, 3), border: Border::Mask };
        for reach in [Reach::Global { map: (3, 5) }, local] {
            let config = AttentionConfig { channels: 12, heads: 3, reach, position: true };
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
