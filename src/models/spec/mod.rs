//! Model strings.
//!
//! ```text
//! model     = backbone [":" options] { "+" attention }
//! attention = variant [window] ["@" places] [":" options]
//! places    = place { "," place }         place = stage | stage "." block      stages from 1, blocks from 0
//! options   = option { "," option }
//! ```
//!
//! Backbones are torchvision's `resnet18`, `resnet34`, `resnet50`, `efficientnet_b0`, `_b1`, `_b2` and `vit_b_16`, and in the same
//! style `vit_ti_16` and `vit_s_16`. timm's names for the same nets are understood too: `vit_tiny_patch16_224`,
//! `vit_small_patch16_224` and `vit_base_patch16_224` (also as `deit_*`), with or without the tag of a set of weights
//! (`.augreg_in21k`). `tf_efficientnet_*` are other nets (their padding and norms differ) and are not.
//!
//! | option of a backbone | meaning | default |
//! |---|---|---|
//! | `w8` | ResNet: channels of stage 1, each later stage has twice as many | `w64` |
//! | | EfficientNet: channels of the stem; all others in proportion, in torchvision's multiples of 8 | `w32` |
//! | | ViT: width of a token | `w192`, `w384`, `w768` |
//! | `stages=2` | leave the last stages out (ResNet, EfficientNet) | `stages=4`, `stages=7` |
//! | `stem=small` | a 3x3 stem at stride 1 without pooling, for images of 28 or 32 pixels (ResNet) | `stem=large` |
//! | `depth=2`, `heads=2`, `patch=8` | layers, heads in each, pixels of a patch's side (ViT) | `depth=12`, `heads=3`, 6, 12, `patch=16` |
//! | `dropout=0.1` | dropout: before the classifier; in a ViT after each sublayer, as torchvision's `dropout` | 0; EfficientNet 0.2, 0.2, 0.3 |
//! | `stochastic_depth=0.1` | p: residual branch l of L is left out with probability p l / L (EfficientNet) or p l / (L - 1) (ViT), l from 0 | EfficientNet 0.2, ViT 0 |
//!
//! | variant | what a query sees | the layer |
//! |---|---|---|
//! | `ga` | the whole map | logit q.k / sqrt(d) + q.(rel_h + rel_w), learned relative positions |
//! | `la` | a window, `la7` for 7x7 | logit q.k / sqrt(d), no position term |
//! | `ela`, `ela-position` | a window | as `la`, with learned relative positions |
//! | `ela-bottleneck` | a window | x + BN(1x1(ReLU(BN(la(ReLU(BN(1x1(x)))))))), `la` at a quarter of the channels |
//! | `ela-gaussian` | a window | as `nonlocal`, but the softmax sees a window |
//! | `nonlocal` | the whole map | x + BN(W y), logit theta.phi, embeddings at half the channels (Wang et al. 2018) |
//! | `lesa` | the whole map | unary + gate * context, a grouped convolution, attention and a gate (Yang et al. 2021); [`crate::nn::Lesa`] |
//! | `botnet` | the whole map | logit (q.k + q.(rel_h + rel_w)) / sqrt(d), tables shared by the heads (Srinivas et al. 2021) |
//!
//! What the paper means by "embedded local" attention is not known, so each reading has a name; `ela` alone is `ela-position`.
//!
//! | option of an attention | meaning | default |
//! |---|---|---|
//! | `replace` | it takes the place of the block's spatial convolution (below) | yes, but for `nonlocal` and `ela-gaussian` |
//! | `append` | it follows the block as a residual branch that starts at zero, so pretrained weights still work | `nonlocal`, `ela-gaussian` |
//! | `heads=4` | number of heads; in `lesa` of its convolution's groups too | 8; `botnet` 4; `nonlocal`, `ela-gaussian` 1 |
//! | `border=zero` | window pixels outside the map stay in the softmax with k = v = 0 (local kinds) | `border=mask` |
//! | `scale=none` | q.k as it is, not divided by sqrt(d) (`ga`, `la`, `ela`, `ela-bottleneck`) | `scale=dim` |
//! | `tables=concat` | tables of half the channels: rows' offsets for the first half, columns' for the second (`ela`) | `tables=sum` |
//! | `sasa` | `ela` with `border=zero`, `scale=none` and `tables=concat` (`la`, `ela`) | |
//! | `pos=none` | no position tables (`ga`) | `pos=rel` |
//!
//! A block's spatial convolution is the second 3x3 of a basic block, the 3x3 of a bottleneck and the depthwise convolution of an
//! MBConv. `sasa` is stand-alone self-attention as its authors have it (Ramachandran et al. 2019): with `tables=concat` the halves are
//! put together before channels are split into heads, so one head sees offsets of rows only, another of columns. Its tables start as
//! all of ours do, normal with deviation 0.02. Widely used ports start them with deviation 1; that the authors did so we could not
//! establish.
//!
//! The window is odd, at most 13, and 7 where none is named; places are the last two stages where none are named. Where the
//! convolution that an attention replaces has stride 2, the attention is at the full size and a 2x2 average pool at stride 2
//! follows, as in stand-alone self-attention and BoTNet; on a map of odd height or width the pool's first window hangs over the
//! edge, so that sizes stay those of the convolution. These defaults are our choice: the paper's placements and sizes are not
//! known.

mod attention;
mod backbone;
mod parse;

use crate::error::{Error, Result};

pub use attention::{AttentionSpec, Placement, Variant};
pub use backbone::{Backbone, Family, MbStage};

/// What a model string says. `Display` prints it canonically, with defaults left out.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// The net.
    pub backbone: Backbone,
    /// Channels of a ResNet's stage 1, of an EfficientNet's stem, of a transformer's tokens.
    pub width: usize,
    /// Stages of a conv net, from 1.
    pub stages: usize,
    /// The first layers of a ResNet.
    pub stem: Stem,
    /// Layers of a transformer.
    pub depth: usize,
    /// Heads of a transformer's layers where they are not the backbone's.
    pub heads: Option<usize>,
    /// Height and width of a transformer's patches in pixels.
    pub patch: usize,
    /// Probability of dropout.
    pub dropout: f32,
    /// Probability of leaving out a residual branch beyond the deepest (EfficientNet), or the deepest (ViT); others in proportion to depth.
    pub stochastic_depth: f32,
    /// Attention in chosen blocks; no block is named twice.
    pub attention: Vec<AttentionSpec>,
}

/// The first layers of a ResNet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stem {
    /// 7x7 at stride 2 and 3x3 max pooling at stride 2, as torchvision's.
    Large,
    /// 3x3 at stride 1, no pooling.
    Small,
}

impl Spec {
    /// A plain backbone.
    pub fn plain(backbone: Backbone) -> Self {
        Self {
            backbone,
            width: backbone.width(),
            stages: backbone.blocks().len(),
            stem: Stem::Large,
            depth: 12,
            heads: None,
            patch: backbone.patch(),
            dropout: backbone.dropout(),
            stochastic_depth: backbone.stochastic_depth(),
            attention: Vec::new(),
        }
    }

    /// Sets both probabilities of leaving things out in training.
    ///
    /// # Errors
    /// [`Error::Usage`] for one outside `0 <= p < 1`, or stochastic depth of a net that has none.
    pub fn set_random(&mut self, dropout: f64, stochastic_depth: f64) -> Result<()> {
        for (name, p) in [("dropout", dropout), ("stochastic_depth", stochastic_depth)] {
            if !(0.0..1.0).contains(&p) {
                let message = format!("{name} is {p}, expected at least 0 and below 1");
                return Err(Error::usage(format!("model '{self}': {message}")));
            }
        }
        if stochastic_depth != 0.0 && self.backbone.family() == Family::ResNet {
            let message = "has no stochastic depth; it must be 0";
            return Err(Error::usage(format!("model '{self}' {message}")));
        }
        (self.dropout, self.stochastic_depth) = (dropout as f32, stochastic_depth as f32);
        Ok(())
    }

    /// Blocks of a stage (from 1).
    pub fn blocks(&self, stage: usize) -> usize {
        self.backbone.blocks()[stage - 1]
    }

    /// Channels of a ResNet's 3x3 convolutions in a stage (from 1).
    pub fn channels(&self, stage: usize) -> usize {
        self.width << (stage - 1)
    }

    /// Channels of an EfficientNet's stem, and its stages.
    pub fn mb_stages(&self) -> (usize, Vec<MbStage>) {
        backbone::mb_stages(self.backbone, self.width, self.stages)
    }

    /// Heads of a transformer's layers.
    pub fn vit_heads(&self) -> usize {
        self.heads.unwrap_or(self.backbone.heads())
    }

    /// Channels that attention meets in a block (stage from 1, block from 0): `inside`, in place of its spatial convolution,
    /// or after it.
    pub fn block_channels(&self, (stage, block): (usize, usize), inside: bool) -> usize {
        match self.backbone.family() {
            Family::ResNet if inside => self.channels(stage),
            Family::ResNet => self.channels(stage) * self.backbone.expansion(),
            Family::EfficientNet => {
                let stage = self.mb_stages().1[stage - 1];
                let inputs = if block == 0 { stage.inputs } else { stage.outputs };
                if inside { inputs * stage.expand } else { stage.outputs }
            }
            Family::ViT => self.width,
        }
    }

    /// The attention of a block, if it has one.
    pub fn attention_at(&self, stage: usize, block: usize) -> Option<&AttentionSpec> {
        self.attention.iter().find(|a| a.places.contains(&(stage, block)))
    }
}
