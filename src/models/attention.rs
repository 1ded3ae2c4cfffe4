//! The attention of a model string as layers in blocks.

use super::spec::{AttentionSpec, Placement, Variant};
use crate::error::Result;
use crate::nn::{
    Appended, Attention, AttentionBottleneck, AttentionConfig, BatchNorm, Conv, ConvNorm, Init,
    Layer, Lesa, LesaConfig, Mode, Module, NonLocal, Reach, Slot, join,
};
use crate::ops::{self, Activation, AvgPool2d};
use crate::tensor::Tensor;

/// The spatial part of a block with the norm after it: its convolution, or attention in the convolution's place.
pub(super) enum Spatial {
    Conv(ConvNorm),
    Attention {
        layer: Box<dyn Module>,
        norm: BatchNorm,
        /// Its name in a state dict; the attention's is `attn`.
        norm_name: &'static str,
        /// 2: an average pool halves the map after the attention, as the convolution's stride would have.
        stride: usize,
    },
}

/// What a block needs to make its spatial part.
pub(super) struct Place<'a> {
    /// The block's attention, if it has one.
    pub(super) attention: Option<&'a AttentionSpec>,
    /// Channels of the convolution that may be replaced.
    pub(super) channels: usize,
    /// Height and width of the map that enters it.
    pub(super) map: (usize, usize),
    pub(super) stride: usize,
    /// What follows its norm.
    pub(super) act: Activation,
    /// Names of convolution and norm.
    pub(super) names: [&'static str; 2],
}

impl Spatial {
    /// The attention that replaces the convolution, or the convolution that `conv` makes.
    pub(super) fn new(
        init: &mut Init,
        place: Place<'_>,
        conv: impl FnOnce(&mut Init) -> Result<Conv>,
    ) -> Result<Self> {
        let Place { channels, map, stride, act, names, .. } = place;
        match place.attention.filter(|a| a.placement == Placement::Replace) {
            Some(a) => {
                let layer = layer(init, a, channels, map)?;
                let norm = BatchNorm::new(init, channels, act)?;
                Ok(Self::Attention { layer, norm, norm_name: names[1], stride })
            }
            None => {
                let conv = conv(init)?;
                Ok(Self::Conv(ConvNorm::new(init, conv, channels, act, names)?))
            }
        }
    }

    /// `act(norm(spatial(x)) + residual)`.
    pub(super) fn forward_residual(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        mode: &Mode,
    ) -> Result<Tensor> {
        match self {
            Self::Conv(conv) => conv.forward_residual(x, residual, mode),
            Self::Attention { layer, norm, stride, .. } => {
                let y = layer.forward(x, mode)?;
                let y = if *stride == 1 { y } else { halve(&y)? };
                norm.forward_residual(&y, residual, mode)
            }
        }
    }

    pub(super) fn describe(
        &self,
        prefix: &str,
        input: &[usize],
        rows: &mut Vec<Layer>,
    ) -> Vec<usize> {
        match self {
            Self::Conv(conv) => conv.describe(prefix, input, rows),
            Self::Attention { layer, norm, norm_name, stride } => {
                let mut y = layer.describe(&join(prefix, "attn"), input, rows);
                if *stride == 2 {
                    let (h, w) = (y[0].div_ceil(2), y[1].div_ceil(2));
                    y = vec![h, w, y[2]];
                    rows.push(Layer::new(prefix, "average pool 2x2 /2", &y, 0));
                }
                norm.describe(&join(prefix, norm_name), &y, rows)
            }
        }
    }

    pub(super) fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        match self {
            Self::Conv(conv) => conv.visit(prefix, f),
            Self::Attention { layer, norm, norm_name, .. } => {
                layer.visit(&join(prefix, "attn"), f);
                norm.visit(&join(prefix, norm_name), f);
            }
        }
    }
}

/// 2x2 average pool at stride 2 to `ceil(H / 2) x ceil(W / 2)`, the size that a convolution with stride 2 and padding
/// `kernel / 2` gives: on a side of odd length the first window hangs over the edge, and only pixels of the map count.
fn halve(x: &Tensor) -> Result<Tensor> {
    let [_, h, w, _] = x.dims("attention", "x")?;
    let opt = AvgPool2d {
        kernel: (2, 2),
        stride: (2, 2),
        padding: (h % 2, w % 2),
        count_include_pad: false,
    };
    ops::avg_pool2d(x, opt)
}

/// The branch after a block, where its attention is appended.
pub(super) fn appended(
    init: &mut Init,
    a: Option<&AttentionSpec>,
    channels: usize,
    map: (usize, usize),
) -> Result<Option<Box<dyn Module>>> {
    let Some(a) = a.filter(|a| a.placement == Placement::Append) else { return Ok(None) };
    if a.variant == Variant::Lesa {
        let layer = lesa(init, a, channels, map)?;
        return Ok(Some(Box::new(Appended::around(init, layer, channels)?)));
    }
    let plain = matches!(
        a.variant,
        Variant::Global | Variant::Local | Variant::EmbeddedLocal | Variant::BotNet
    );
    if plain {
        return Ok(Some(Box::new(Appended::new(init, config(a, channels, map))?)));
    }
    layer(init, a, channels, map).map(Some) // it is a residual branch itself
}

/// The layer of a variant, `[N, H, W, channels]` in and out.
fn layer(
    init: &mut Init,
    a: &AttentionSpec,
    channels: usize,
    map: (usize, usize),
) -> Result<Box<dyn Module>> {
    let config = config(a, channels, map);
    Ok(match a.variant {
        Variant::Global | Variant::Local | Variant::EmbeddedLocal | Variant::BotNet => {
            Box::new(Attention::new(init, config)?)
        }
        Variant::Bottleneck => Box::new(AttentionBottleneck::new(init, channels, config)?),
        Variant::Lesa => Box::new(lesa(init, a, channels, map)?),
        Variant::Gaussian | Variant::NonLocal => Box::new(NonLocal::new(init, channels, config)?),
    })
}

/// As many groups as heads: both are 8 as published.
fn lesa(init: &mut Init, a: &AttentionSpec, channels: usize, map: (usize, usize)) -> Result<Lesa> {
    let config = LesaConfig { inputs: channels, channels, heads: a.heads, groups: a.heads, map };
    Lesa::new(init, config)
}

fn config(a: &AttentionSpec, channels: usize, map: (usize, usize)) -> AttentionConfig {
    let reach = if a.variant.is_local() {
        Reach::Local { window: (a.window, a.window), border: a.border }
    } else {
        Reach::Global { map }
    };
    let channels = channels / a.variant.reduction();
    AttentionConfig { channels, heads: a.heads, reach, tables: a.tables, scaled: a.scaled }
}
