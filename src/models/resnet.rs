//! ResNet18, ResNet34 and ResNet50 (He et al. 2015), as torchvision builds and names them, with attention in chosen blocks.

use super::attention::{Place, Spatial, appended};
use super::spec::{Spec, Stem};
use crate::error::Result;
use crate::nn::{Conv, ConvNorm, Dropout, Init, Layer, Linear, Mode, Module, Slot, join};
use crate::ops::{self, Activation, MaxPool2d};
use crate::tensor::Tensor;

/// A residual net: stem, stages of blocks, global average pool, classifier.
pub struct ResNet {
    stem: ConvNorm,
    pool: Option<MaxPool2d>,
    stages: Vec<Vec<Block>>,
    dropout: Dropout,
    fc: Linear,
}

/// Convolutions round a shortcut: two 3x3 in a basic block, 1x1, 3x3 and 1x1 in a bottleneck. Attention may stand for the
/// second convolution or follow the block.
struct Block {
    first: ConvNorm,
    /// The second 3x3 of a basic block, which ends it, or the 3x3 of a bottleneck, which has the block's stride.
    second: Spatial,
    /// A bottleneck's last 1x1, which ends it.
    third: Option<ConvNorm>,
    /// 1x1 convolution and norm where the block changes the shape.
    downsample: Option<ConvNorm>,
    appended: Option<Box<dyn Module>>,
}

/// Sizes of a block.
#[derive(Clone, Copy)]
struct Shape {
    inputs: usize,
    channels: usize,
    /// Channels out, as a multiple of `channels`: 4 in a bottleneck, else 1.
    expansion: usize,
    stride: usize,
    /// Height and width that enter.
    map: (usize, usize),
}

/// Height and width after a convolution or pooling with padding `kernel / 2`.
pub(super) fn shrink((h, w): (usize, usize), kernel: usize, stride: usize) -> (usize, usize) {
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
        let conv = Conv::new(init, 3, spec.width, kernel, stride)?;
        let stem = ConvNorm::new(init, conv, spec.width, Activation::Relu, ["conv1", "bn1"])?;
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
            for block in 0..spec.blocks(stage) {
                let stride = if stage > 1 && block == 0 { 2 } else { 1 };
                let (channels, expansion) = (spec.channels(stage), spec.backbone.expansion());
                let shape = Shape { inputs, channels, expansion, stride, map };
                blocks.push(Block::new(init, spec, (stage, block), shape)?);
                map = shrink(map, 3, stride);
                inputs = channels * expansion;
            }
            stages.push(blocks);
        }
        let fc = Linear::new(init, inputs, num_classes)?;
        Ok(Self { stem, pool, stages, dropout: Dropout::new(spec.dropout, 0), fc })
    }
}

impl Module for ResNet {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let mut x = self.stem.forward(x, mode)?;
        if let Some(pool) = self.pool {
            x = ops::max_pool2d(&x, pool)?;
        }
        for block in self.stages.iter().flatten() {
            x = block.forward(&x, mode)?;
        }
        let x = self.dropout.forward(&ops::global_avg_pool(&x)?, mode)?;
        self.fc.forward(&x, mode)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let mut y = self.stem.describe(prefix, input, rows);
        if self.pool.is_some() {
            let (h, w) = shrink((y[0], y[1]), 3, 2);
            y = vec![h, w, y[2]];
            rows.push(Layer::new(&join(prefix, "maxpool"), "max pool 3x3 /2", &y, 0));
        }
        for (stage, blocks) in self.stages.iter().enumerate() {
            for (i, block) in blocks.iter().enumerate() {
                y = block.describe(&join(prefix, &format!("layer{}.{i}", stage + 1)), &y, rows);
            }
        }
        rows.push(Layer::new(&join(prefix, "avgpool"), "global average pool", &y[2..], 0));
        self.fc.describe(&join(prefix, "fc"), &y[2..], rows)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.stem.visit(prefix, f);
        for (stage, blocks) in self.stages.iter_mut().enumerate() {
            for (i, block) in blocks.iter_mut().enumerate() {
                block.visit(&join(prefix, &format!("layer{}.{i}", stage + 1)), f);
            }
        }
        self.fc.visit(&join(prefix, "fc"), f);
    }
}

impl Block {
    fn new(init: &mut Init, spec: &Spec, at: (usize, usize), shape: Shape) -> Result<Self> {
        let Shape { inputs, channels, expansion, stride, map } = shape;
        let attention = spec.attention_at(at.0, at.1);
        let bottleneck = expansion > 1;
        let relu = Activation::Relu;
        // The stride is the first 3x3 convolution's.
        let (kernel, strides) = if bottleneck { (1, (1, stride)) } else { (3, (stride, 1)) };
        let conv = Conv::new(init, inputs, channels, kernel, strides.0)?;
        let first = ConvNorm::new(init, conv, channels, relu, ["conv1", "bn1"])?;
        let place = Place {
            attention,
            channels,
            map: shrink(map, kernel, strides.0),
            stride: strides.1,
            act: relu,
            names: ["conv2", "bn2"],
        };
        let second =
            Spatial::new(init, place, |init| Conv::new(init, channels, channels, 3, strides.1))?;
        let outputs = channels * expansion;
        let mut pointwise = |inputs, stride, act, names| {
            let conv = Conv::new(init, inputs, outputs, 1, stride)?;
            ConvNorm::new(init, conv, outputs, act, names)
        };
        let third =
            bottleneck.then(|| pointwise(channels, 1, relu, ["conv3", "bn3"])).transpose()?;
        let names = ["downsample.0", "downsample.1"];
        let downsample = (stride != 1 || inputs != outputs)
            .then(|| pointwise(inputs, stride, Activation::None, names))
            .transpose()?;
        let appended = appended(init, attention, outputs, shrink(map, 3, stride))?;
        Ok(Self { first, second, third, downsample, appended })
    }
}

impl Module for Block {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let y = self.first.forward(x, mode)?;
        let shortcut = match &self.downsample {
            Some(downsample) => downsample.forward(x, mode)?,
            None => x.clone(),
        };
        let y = match &self.third {
            Some(third) => {
                let y = self.second.forward_residual(&y, None, mode)?;
                third.forward_residual(&y, Some(&shortcut), mode)?
            }
            None => self.second.forward_residual(&y, Some(&shortcut), mode)?,
        };
        match &self.appended {
            Some(appended) => appended.forward(&y, mode),
            None => Ok(y),
        }
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let y = self.first.describe(prefix, input, rows);
        let mut y = self.second.describe(prefix, &y, rows);
        if let Some(third) = &self.third {
            y = third.describe(prefix, &y, rows);
        }
        if let Some(downsample) = &self.downsample {
            downsample.describe(prefix, input, rows);
        }
        match &self.appended {
            Some(appended) => appended.describe(&join(prefix, "attn"), &y, rows),
            None => y,
        }
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.first.visit(prefix, f);
        self.second.visit(prefix, f);
        if let Some(third) = &mut self.third {
            third.visit(prefix, f);
        }
        if let Some(downsample) = &mut self.downsample {
            downsample.visit(prefix, f);
        }
        if let Some(appended) = &mut self.appended {
            appended.visit(&join(prefix, "attn"), f);
        }
    }
}
