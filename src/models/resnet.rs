//! ResNet18 and ResNet34 (He et al. 2015), as torchvision builds and names them, with attention in chosen blocks.

use super::spec::{AttentionSpec, Placement, Spec, Stem, Variant};
use crate::error::Result;
use crate::nn::{
    Attention, AttentionConfig, BatchNorm, Conv, Init, Linear, Mode, Module, Reach, Slot,
    conv_norm, join,
};
use crate::ops::{self, Activation, MaxPool2d};
use crate::tensor::Tensor;

/// A residual net of basic blocks: stem, stages of blocks, global average pool, classifier.
pub struct ResNet {
    conv1: Conv,
    bn1: BatchNorm,
    pool: Option<MaxPool2d>,
    stages: Vec<Vec<Block>>,
    fc: Linear,
}

/// Two 3x3 convolutions round a shortcut; attention may stand for the second, or follow the block.
struct Block {
    conv1: Conv,
    bn1: BatchNorm,
    second: Second,
    bn2: BatchNorm,
    /// 1x1 convolution and norm where the block changes the shape.
    downsample: Option<(Conv, BatchNorm)>,
    appended: Option<Appended>,
}

enum Second {
    Conv(Conv),
    Attention(Attention),
}

/// `x + norm(proj(attention(x)))`; the norm's weight starts at zero, so at first the branch adds nothing.
struct Appended {
    attention: Attention,
    proj: Conv,
    norm: BatchNorm,
}

/// Height and width after a convolution or pooling with padding `kernel / 2`.
fn shrink((h, w): (usize, usize), kernel: usize, stride: usize) -> (usize, usize) {
    let side = |n: usize| (n + 2 * (kernel / 2) - kernel) / stride + 1;
    (side(h), side(w))
}

impl ResNet {
    /// Builds the net for images of `image` (height, width); global position tables depend on it.
    ///
    /// # Errors
    /// As [`Tensor::uninit`], and [`crate::Error::Usage`] where heads do not divide channels.
    pub fn new(
        init: &mut Init,
        spec: &Spec,
        num_classes: usize,
        image: (usize, usize),
    ) -> Result<Self> {
        let (kernel, stride) = if spec.stem == Stem::Large { (7, 2) } else { (3, 1) };
        let conv1 = Conv::new(init, 3, spec.width, kernel, stride)?;
        let bn1 = BatchNorm::new(init, spec.width, Activation::Relu)?;
        let mut map = shrink(image, kernel, stride);
        let pool = (spec.stem == Stem::Large).then_some(MaxPool2d {
            kernel: (3, 3),
            stride: (2, 2),
            padding: (1, 1),
        });
        if pool.is_some() {
            map = shrink(map, 3, 2);
        }
        let mut stages = Vec::new();
        let mut inputs = spec.width;
        for stage in 1..=spec.stages {
            let mut blocks = Vec::new();
            for block in 0..spec.backbone.blocks()[stage - 1] {
                let stride = if stage > 1 && block == 0 { 2 } else { 1 };
                map = shrink(map, 3, stride);
                let channels = (inputs, spec.channels(stage));
                let attention = spec.attention_at(stage, block);
                blocks.push(Block::new(init, channels, stride, attention, map)?);
                inputs = spec.channels(stage);
            }
            stages.push(blocks);
        }
        let fc = Linear::new(init, inputs, num_classes)?;
        Ok(Self { conv1, bn1, pool, stages, fc })
    }
}

impl Module for ResNet {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let mut x = conv_norm(&self.conv1, &self.bn1, x, None, mode)?;
        if let Some(pool) = self.pool {
            x = ops::max_pool2d(&x, pool)?;
        }
        for block in self.stages.iter().flatten() {
            x = block.forward(&x, mode)?;
        }
        self.fc.forward(&ops::global_avg_pool(&x)?, mode)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.conv1.visit(&join(prefix, "conv1"), f);
        self.bn1.visit(&join(prefix, "bn1"), f);
        for (stage, blocks) in self.stages.iter_mut().enumerate() {
            for (i, block) in blocks.iter_mut().enumerate() {
                block.visit(&join(prefix, &format!("layer{}.{i}", stage + 1)), f);
            }
        }
        self.fc.visit(&join(prefix, "fc"), f);
    }
}

impl Block {
    fn new(
        init: &mut Init,
        (inputs, outputs): (usize, usize),
        stride: usize,
        attention: Option<&AttentionSpec>,
        map: (usize, usize),
    ) -> Result<Self> {
        let conv1 = Conv::new(init, inputs, outputs, 3, stride)?;
        let bn1 = BatchNorm::new(init, outputs, Activation::Relu)?;
        let (replace, append) = match attention {
            Some(a) if a.placement == Placement::Replace => (Some(config(a, outputs, map)), None),
            Some(a) => (None, Some(config(a, outputs, map))),
            None => (None, None),
        };
        let second = match replace {
            Some(config) => Second::Attention(Attention::new(init, config)?),
            None => Second::Conv(Conv::new(init, outputs, outputs, 3, 1)?),
        };
        let bn2 = BatchNorm::new(init, outputs, Activation::Relu)?;
        let downsample = if stride != 1 || inputs != outputs {
            let conv = Conv::new(init, inputs, outputs, 1, stride)?;
            Some((conv, BatchNorm::new(init, outputs, Activation::None)?))
        } else {
            None
        };
        let appended = append.map(|config| Appended::new(init, config)).transpose()?;
        Ok(Self { conv1, bn1, second, bn2, downsample, appended })
    }
}

impl Module for Block {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let y = conv_norm(&self.conv1, &self.bn1, x, None, mode)?;
        let shortcut = match &self.downsample {
            Some((conv, norm)) => conv_norm(conv, norm, x, None, mode)?,
            None => x.clone(),
        };
        let y = match &self.second {
            Second::Conv(conv) => conv_norm(conv, &self.bn2, &y, Some(&shortcut), mode)?,
            Second::Attention(attention) => {
                let y = attention.forward(&y, mode)?;
                self.bn2.forward_residual(&y, Some(&shortcut), mode)?
            }
        };
        match &self.appended {
            Some(appended) => appended.forward(&y, mode),
            None => Ok(y),
        }
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.conv1.visit(&join(prefix, "conv1"), f);
        self.bn1.visit(&join(prefix, "bn1"), f);
        match &mut self.second {
            Second::Conv(conv) => conv.visit(&join(prefix, "conv2"), f),
            Second::Attention(attention) => attention.visit(&join(prefix, "attn"), f),
        }
        self.bn2.visit(&join(prefix, "bn2"), f);
        if let Some((conv, norm)) = &mut self.downsample {
            conv.visit(&join(prefix, "downsample.0"), f);
            norm.visit(&join(prefix, "downsample.1"), f);
        }
        if let Some(appended) = &mut self.appended {
            appended.visit(&join(prefix, "attn"), f);
        }
    }
}

impl Appended {
    fn new(init: &mut Init, config: AttentionConfig) -> Result<Self> {
        let channels = config.channels;
        Ok(Self {
            attention: Attention::new(init, config)?,
            proj: Conv::new(init, channels, channels, 1, 1)?,
            norm: BatchNorm::with_weight(init, channels, Activation::None, 0.0)?,
        })
    }
}

impl Module for Appended {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        conv_norm(&self.proj, &self.norm, &self.attention.forward(x, mode)?, Some(x), mode)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.attention.visit(prefix, f);
        self.proj.visit(&join(prefix, "proj"), f);
        self.norm.visit(&join(prefix, "norm"), f);
    }
}

fn config(a: &AttentionSpec, channels: usize, map: (usize, usize)) -> AttentionConfig {
    let reach = match a.variant {
        Variant::Global => Reach::Global { map },
        Variant::Local | Variant::EmbeddedLocal => {
            Reach::Local { window: (a.window, a.window), border: a.border }
        }
    };
    AttentionConfig { channels, heads: a.heads, reach, position: a.position }
}
