//! Self-attention over an image, with its projections.

use super::{Conv, Init, Layer, Mode, Module, Slot, join, parameter, product};
use crate::error::{Error, Result};
use crate::ops::case::Layout;
use crate::ops::{self, Border, GlobalAttention, LocalAttention};
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

/// Position tables of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// None.
    None,
    /// A row of all channels for each vertical and for each horizontal offset; a pixel's are added.
    Sum,
    /// Rows of half the channels: those of vertical offsets belong to the first half of the channels, those of horizontal ones to
    /// the second, before the channels are split into heads. So with several heads, one head sees rows' offsets only, another
    /// columns'. As the original stand-alone self-attention.
    Concat,
    /// Rows of a head's channels, the same for every head, scaled as q.k is: as BoTNet.
    Shared,
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
    /// Learned relative positions.
    pub tables: Tables,
    /// Whether q.k is divided by the root of a head's channels.
    pub scaled: bool,
}

impl AttentionConfig {
    /// Channels of a head.
    pub fn head_channels(&self) -> usize {
        self.channels / self.heads
    }

    fn scale(&self) -> f32 {
        if self.scaled { 1.0 / (self.head_channels() as f32).sqrt() } else { 1.0 }
    }

    /// Attention of projected q, k and v `[N, H, W, channels]`, with tables of rows of all channels.
    ///
    /// # Errors
    /// As [`ops::global_attention`] and [`ops::local_attention`].
    pub fn attend(
        &self,
        [q, k, v]: [&Tensor; 3],
        rel: Option<&(Tensor, Tensor)>,
    ) -> Result<Tensor> {
        let [n, h, w, c] = q.dims("attention", "q")?;
        let split = |x: &Tensor| x.reshape(&[n, h, w, self.heads, self.head_channels()]);
        let (q, k, v) = (split(q)?, split(k)?, split(v)?);
        let (rel_h, rel_w) = (rel.map(|r| &r.0), rel.map(|r| &r.1));
        let scale = Some(self.scale());
        let y = match self.reach {
            Reach::Global { .. } => {
                let opt = GlobalAttention { scale, rel_h, rel_w, ..Default::default() };
                ops::global_attention(&q, &k, &v, opt)?
            }
            Reach::Local { window, border } => {
                let opt =
                    LocalAttention { window, border, scale, rel_h, rel_w, ..Default::default() };
                ops::local_attention(&q, &k, &v, opt)?
            }
        };
        y.reshape(&[n, h, w, c])
    }
}

impl AttentionConfig {
    /// The row of the attention itself, without projections, in a layer table.
    pub(super) fn describe(&self, prefix: &str, input: &[usize], parameters: usize) -> Layer {
        let (h, w) = (input.first().copied().unwrap_or(1), input.get(1).copied().unwrap_or(1));
        let (what, keys) = match self.reach {
            Reach::Global { .. } => ("global attention".to_string(), h * w),
            Reach::Local { window: (kh, kw), .. } => {
                (format!("{kh}x{kw} local attention"), kh * kw)
            }
        };
        let heads = if self.heads == 1 { "1 head".into() } else { format!("{} heads", self.heads) };
        let kind = format!("{what}, {heads}");
        let layer = Layer::new(prefix, kind, &[h, w, self.channels], parameters);
        let pairs = product(&[self.heads, h, w, keys]);
        Layer { pairs, ..layer }.with_flop(4.0 * pairs * self.head_channels() as f64)
    }
}

/// Self-attention `[N, H, W, C] -> [N, H, W, C]`: `softmax(s q.k + q.(rel_h + rel_w)) v` with s = 1 / sqrt(d), or 1 where it is not
/// scaled; with [`Tables::Shared`] positions are multiplied by s too. q, k, v are 1x1 convolutions of x without bias (`q.weight`, `k.weight`, `v.weight`). With position tables it owns `rel_h` and `rel_w`,
/// a row for each vertical and horizontal offset: `2H - 1` and `2W - 1` for the whole map, the window's height and
/// width for a window; [`Tables`] says how wide rows are.
pub struct Attention {
    config: AttentionConfig,
    q: Conv,
    k: Conv,
    v: Conv,
    rel: Option<Positions>,
}

/// Tables, and what makes rows of all channels of theirs.
struct Positions {
    rel_h: Tensor,
    rel_w: Tensor,
    /// `[channels, row]` each, of zeros and the factor of the positions; none where the tables' rows have all channels.
    spread: Option<(Tensor, Tensor)>,
}

impl Positions {
    /// Tables start normal with standard deviation 0.02, small beside a pixel's own logit: our choice (published layers start
    /// theirs anywhere between that and 1). BoTNet's start at `1 / sqrt(d)`, as its authors have them.
    fn new(init: &mut Init, config: &AttentionConfig) -> Result<Option<Self>> {
        let (c, d) = (config.channels, config.head_channels());
        let offsets = match config.reach {
            Reach::Global { map: (h, w) } => (2 * h - 1, 2 * w - 1),
            Reach::Local { window, .. } => window,
        };
        let (row, std) = match config.tables {
            Tables::None => return Ok(None),
            Tables::Sum => (c, 0.02),
            Tables::Concat => (c / 2, 0.02),
            Tables::Shared => (d, 1.0 / (d as f32).sqrt()),
        };
        let rel_h = init.normal(&[offsets.0, row], std)?;
        let rel_w = init.normal(&[offsets.1, row], std)?;
        let mut spread = |place: &dyn Fn(usize, usize) -> bool, factor: f32| {
            let at = |i: usize| if place(i / row, i % row) { factor } else { 0.0 };
            init.fixed(&[c, row], &(0..c * row).map(at).collect::<Vec<_>>())
        };
        let spread = match config.tables {
            Tables::Concat => {
                Some((spread(&|c, i| c == i, 1.0)?, spread(&|c, i| c == i + row, 1.0)?))
            }
            Tables::Shared => {
                let all = spread(&|c, i| c % row == i, config.scale())?;
                Some((all.clone(), all))
            }
            Tables::None | Tables::Sum => None,
        };
        Ok(Some(Self { rel_h, rel_w, spread }))
    }

    /// Rows of all channels. A product with zeros and one factor is exact.
    fn rows(&self) -> Result<(Tensor, Tensor)> {
        match &self.spread {
            None => Ok((self.rel_h.clone(), self.rel_w.clone())),
            Some((h, w)) => {
                Ok((ops::linear(&self.rel_h, h, None)?, ops::linear(&self.rel_w, w, None)?))
            }
        }
    }
}

impl Attention {
    /// Projections start like any other convolution.
    ///
    /// # Errors
    /// [`Error::Usage`] where `heads` does not divide the channels or halves of an odd number are asked for, else as
    /// [`Tensor::uninit`].
    pub fn new(init: &mut Init, config: AttentionConfig) -> Result<Self> {
        let AttentionConfig { channels, heads, .. } = config;
        if heads == 0 || !channels.is_multiple_of(heads) {
            return Err(Error::usage(format!(
                "{heads} attention heads do not divide {channels} channels; choose heads=N with N a divisor of {channels}"
            )));
        }
        if config.tables == Tables::Concat && !channels.is_multiple_of(2) {
            return Err(Error::usage(format!(
                "tables=concat needs an even number of channels, not {channels}"
            )));
        }
        let mut projection = || Conv::new(init, channels, channels, 1, 1);
        let (q, k, v) = (projection()?, projection()?, projection()?);
        Ok(Self { config, q, k, v, rel: Positions::new(init, &config)? })
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

impl Module for Attention {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let [_, h, w, _] = x.dims("attention", "x")?;
        self.check_map(h, w)?;
        let rel = self.rel.as_ref().map(Positions::rows).transpose()?;
        if let Reach::Local { .. } = self.config.reach {
            let project = |conv: &Conv| conv.forward(x, mode);
            let (q, k, v) = (project(&self.q)?, project(&self.k)?, project(&self.v)?);
            return self.config.attend([&q, &k, &v], rel.as_ref());
        }
        // Over a small map the projections and the attention are one launch.
        let weight = |conv: &Conv| conv.weight_as(x.dtype());
        let (q, k, v) = (weight(&self.q)?, weight(&self.k)?, weight(&self.v)?);
        let block = ops::AttentionBlock {
            heads: self.config.heads,
            scale: Some(self.config.scale()),
            qkv: [&q, &k, &v],
            proj: None,
            rel_h: rel.as_ref().map(|r| &r.0),
            rel_w: rel.as_ref().map(|r| &r.1),
            residual: false,
        };
        ops::attention_block(x, block)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        for (name, conv) in [("q", &self.q), ("k", &self.k), ("v", &self.v)] {
            conv.describe(&join(prefix, name), input, rows);
        }
        let tables = self.rel.as_ref().map_or(0, |rel| rel.rel_h.numel() + rel.rel_w.numel());
        rows.push(self.config.describe(prefix, input, tables));
        input.to_vec()
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        for (name, conv) in [("q", &mut self.q), ("k", &mut self.k), ("v", &mut self.v)] {
            conv.visit(&join(prefix, name), f);
        }
        if let Some(Positions { rel_h, rel_w, .. }) = &mut self.rel {
            parameter(f, prefix, "rel_h", rel_h, Layout::Plain, true);
            parameter(f, prefix, "rel_w", rel_w, Layout::Plain, true);
        }
    }
}
