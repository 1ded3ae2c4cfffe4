//! Vision transformers (Dosovitskiy et al. 2020), as torchvision builds and names them.

use super::spec::{Backbone, Spec};
use crate::error::{Error, Result};
use crate::nn::{
    Conv, Dropout, Init, Layer, LayerNorm, Linear, Mode, Module, Slot, StochasticDepth,
    TokenAttention, join, parameter,
};
use crate::ops::case::Layout;
use crate::ops::{self, Conv2d};
use crate::tensor::Tensor;

/// Patches as tokens, a class token and position embeddings, encoder layers, layer norm, classifier of the class token.
pub struct ViT {
    patches: Conv,
    /// Patches along height and width.
    map: (usize, usize),
    patch: usize,
    /// `[1, 1, C]`.
    class_token: Tensor,
    /// `[1, T + 1, C]`, the class token's first.
    positions: Tensor,
    dropout: Dropout,
    layers: Vec<EncoderLayer>,
    norm: LayerNorm,
    head: Linear,
}

/// `x + attention(norm(x))`, then `x + mlp(norm(x))` with a hidden layer of four times the width and GELU.
struct EncoderLayer {
    norm1: LayerNorm,
    attention: TokenAttention,
    norm2: LayerNorm,
    hidden: Linear,
    out: Linear,
    /// After attention, after the hidden layer, after the MLP.
    dropouts: [Dropout; 3],
    depths: [StochasticDepth; 2],
}

/// First values: torchvision's where it has the net (ViT-B), timm's for the others, which are timm's.
#[derive(Clone, Copy, PartialEq)]
enum First {
    Torchvision,
    Timm,
}

const EPS: f32 = 1e-6;
/// Streams of random numbers of one layer.
const STREAMS: u32 = 5;

impl First {
    /// A linear layer of the MLP. (timm's and torchvision's "truncated" normals are cut at 2, which is 50 deviations out and more.)
    fn linear(self, init: &mut Init, inputs: usize, outputs: usize) -> Result<Linear> {
        let (weight, bias) = match self {
            Self::Torchvision => {
                let bound = (6.0 / (inputs + outputs) as f32).sqrt();
                (init.uniform(&[outputs, inputs], bound)?, init.normal(&[outputs], 1e-6)?)
            }
            Self::Timm => (init.normal(&[outputs, inputs], 0.02)?, init.constant(&[outputs], 0.0)?),
        };
        Ok(Linear::from_parts(weight, bias))
    }

    fn attention(self, init: &mut Init, width: usize, heads: usize) -> Result<TokenAttention> {
        let (qkv, out) = match self {
            Self::Torchvision => (
                init.uniform(&[3 * width, width], (6.0 / (4 * width) as f32).sqrt())?,
                init.uniform(&[width, width], 1.0 / (width as f32).sqrt())?,
            ),
            Self::Timm => {
                (init.normal(&[3 * width, width], 0.02)?, init.normal(&[width, width], 0.02)?)
            }
        };
        let out = Linear::from_parts(out, init.constant(&[width], 0.0)?);
        TokenAttention::new(init, heads, qkv, out)
    }

    fn patches(self, init: &mut Init, width: usize, patch: usize) -> Result<Conv> {
        let shape = [width, patch, patch, 3];
        let bound = 1.0 / ((3 * patch * patch) as f32).sqrt();
        let (weight, bias) = match self {
            Self::Torchvision => (init.normal(&shape, bound)?, init.constant(&[width], 0.0)?),
            // PyTorch's default for convolutions.
            Self::Timm => (init.uniform(&shape, bound)?, init.uniform(&[width], bound)?),
        };
        let opt = Conv2d { stride: (patch, patch), ..Conv2d::default() };
        Ok(Conv::from_parts(weight, bias, opt))
    }

    fn head(self, init: &mut Init, width: usize, num_classes: usize) -> Result<Linear> {
        let weight = match self {
            Self::Torchvision => init.constant(&[num_classes, width], 0.0)?,
            Self::Timm => init.normal(&[num_classes, width], 0.02)?,
        };
        Ok(Linear::from_parts(weight, init.constant(&[num_classes], 0.0)?))
    }
}

impl ViT {
    /// Builds the net for images of `image` (height, width), which the patch must divide; there is a position for each patch.
    ///
    /// # Errors
    /// [`Error::Usage`] for images that patches do not fit, else as [`Tensor::uninit`].
    pub fn new(
        init: &mut Init,
        spec: &Spec,
        num_classes: usize,
        image: (usize, usize),
    ) -> Result<Self> {
        let (width, patch) = (spec.width, spec.patch);
        if !image.0.is_multiple_of(patch) || !image.1.is_multiple_of(patch) {
            let near = image.0.max(image.1).next_multiple_of(patch);
            return Err(Error::usage(format!(
                "model '{spec}': images of {}x{} pixels cannot be cut into patches of {patch}x{patch}; take images of a multiple \
                 of {patch}, such as --img-size {near}, or another patch, as in {}:patch=N",
                image.0,
                image.1,
                spec.backbone.name()
            )));
        }
        let first = if spec.backbone == Backbone::ViTB { First::Torchvision } else { First::Timm };
        let map = (image.0 / patch, image.1 / patch);
        let patches = first.patches(init, width, patch)?;
        let class_token = match first {
            First::Torchvision => init.constant(&[1, 1, width], 0.0)?,
            First::Timm => init.normal(&[1, 1, width], 1e-6)?,
        };
        let positions = init.normal(&[1, map.0 * map.1 + 1, width], 0.02)?;
        let layers = (0..spec.depth).map(|i| EncoderLayer::new(init, spec, first, i));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        Ok(Self {
            patches,
            map,
            patch,
            class_token,
            positions,
            dropout: Dropout::new(spec.dropout, 0),
            layers,
            norm: LayerNorm::new(init, width, EPS)?,
            head: first.head(init, width, num_classes)?,
        })
    }
}

impl Module for ViT {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let [_, h, w, _] = x.dims("vit", "images")?;
        let (rows, columns) = (self.map.0 * self.patch, self.map.1 * self.patch);
        if (h, w) != (rows, columns) {
            let message = format!(
                "the position embeddings are for images of {rows}x{columns}, but these are {h}x{w}; use the image size that \
                 the model was built for"
            );
            return Err(Error::shape("vit", message));
        }
        let x = self.patches.forward(x, mode)?;
        let [n, h, w, c] = x.dims("vit", "patches")?;
        let positions = self.positions.reshape(&[h * w + 1, c])?;
        let tokens = x.reshape(&[n, h * w, c])?;
        let x = ops::embed_tokens(&tokens, &self.class_token.reshape(&[c])?, &positions)?;
        let mut x = self.dropout.forward(&x, mode)?;
        for layer in &self.layers {
            x = layer.forward(&x, mode)?;
        }
        // The class token alone goes on: the norm is each token's own.
        let x = self.norm.forward(&ops::first_token(&x)?, mode)?;
        self.head.forward(&x, mode)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let patches = self.patches.describe(&join(prefix, "conv_proj"), input, rows);
        let mut y = vec![patches[0] * patches[1] + 1, patches[2]];
        let (encoder, parameters) = (join(prefix, "encoder"), self.positions.numel());
        let name = join(&encoder, "pos_embedding");
        rows.push(Layer::new(&name, "positions, class token", &y, parameters + patches[2]));
        for (i, layer) in self.layers.iter().enumerate() {
            y = layer.describe(&join(&encoder, &format!("layers.encoder_layer_{i}")), &y, rows);
        }
        let y = self.norm.describe(&join(&encoder, "ln"), &y[1..], rows);
        self.head.describe(&join(prefix, "heads.head"), &y, rows)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        parameter(f, prefix, "class_token", &mut self.class_token, Layout::Plain, false);
        self.patches.visit(&join(prefix, "conv_proj"), f);
        let encoder = join(prefix, "encoder");
        parameter(f, &encoder, "pos_embedding", &mut self.positions, Layout::Plain, false);
        for (i, layer) in self.layers.iter_mut().enumerate() {
            layer.visit(&join(&encoder, &format!("layers.encoder_layer_{i}")), f);
        }
        self.norm.visit(&join(&encoder, "ln"), f);
        self.head.visit(&join(prefix, "heads.head"), f);
    }
}

impl EncoderLayer {
    fn new(init: &mut Init, spec: &Spec, first: First, index: usize) -> Result<Self> {
        let width = spec.width;
        // Stream 0 is the embeddings' dropout.
        let stream = |i: u32| 1 + STREAMS * index as u32 + i;
        let dropout = |i| Dropout::new(spec.dropout, stream(i));
        // From 0 in the first layer to the whole in the last, as timm has it.
        let p = spec.stochastic_depth * index as f32 / (spec.depth.max(2) - 1) as f32;
        let depth = |i| StochasticDepth::new(p, stream(i));
        Ok(Self {
            norm1: LayerNorm::new(init, width, EPS)?,
            attention: first.attention(init, width, spec.vit_heads())?,
            norm2: LayerNorm::new(init, width, EPS)?,
            hidden: first.linear(init, width, 4 * width)?,
            out: first.linear(init, 4 * width, width)?,
            dropouts: [dropout(0), dropout(1), dropout(2)],
            depths: [depth(3), depth(4)],
        })
    }
}

impl Module for EncoderLayer {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let y = self.attention.forward(&self.norm1.forward(x, mode)?, mode)?;
        let x = self.depths[0].add(&self.dropouts[0].forward(&y, mode)?, x, mode)?;
        let y = self.hidden.forward(&self.norm2.forward(&x, mode)?, mode)?;
        let y = self.dropouts[1].forward(&ops::gelu(&y)?, mode)?;
        let y = self.dropouts[2].forward(&self.out.forward(&y, mode)?, mode)?;
        self.depths[1].add(&y, &x, mode)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let y = self.norm1.describe(&join(prefix, "ln_1"), input, rows);
        let y = self.attention.describe(&join(prefix, "self_attention"), &y, rows);
        let y = self.norm2.describe(&join(prefix, "ln_2"), &y, rows);
        let y = self.hidden.describe(&join(prefix, "mlp.0"), &y, rows);
        self.out.describe(&join(prefix, "mlp.3"), &y, rows)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.norm1.visit(&join(prefix, "ln_1"), f);
        self.attention.visit(&join(prefix, "self_attention"), f);
        self.norm2.visit(&join(prefix, "ln_2"), f);
        self.hidden.visit(&join(prefix, "mlp.0"), f);
        self.out.visit(&join(prefix, "mlp.3"), f);
    }
}
