//! EfficientNet-B0 to B2 (Tan and Le 2019), as torchvision builds and names them, with attention in chosen blocks.

use super::attention::{Place, Spatial, appended};
use super::resnet::shrink;
use super::spec::{MbStage, Spec};
use crate::error::Result;
use crate::nn::{
    Conv, ConvNorm, Dropout, Init, Layer, Linear, Mode, Module, Slot, SqueezeExcite,
    StochasticDepth, join,
};
use crate::ops::{self, Activation};
use crate::tensor::Tensor;

const SILU: Activation = Activation::Silu;

/// Stem, stages of MBConv blocks, 1x1 convolution, global average pool, dropout, classifier.
pub struct EfficientNet {
    stem: ConvNorm,
    stages: Vec<Vec<MbConv>>,
    last: ConvNorm,
    dropout: Dropout,
    classifier: Linear,
}

/// 1x1 expansion, depthwise convolution, squeeze-excite, 1x1 projection; a residual branch where it keeps the shape. Attention may
/// stand for the depthwise convolution or follow the block.
struct MbConv {
    /// Absent where the expansion is 1.
    expand: Option<ConvNorm>,
    depthwise: Spatial,
    squeeze_excite: SqueezeExcite,
    project: ConvNorm,
    /// Present where the block is a residual branch.
    depth: Option<StochasticDepth>,
    appended: Option<Box<dyn Module>>,
}

/// Where a block is and what enters it.
struct At {
    stage: usize,
    block: usize,
    /// Blocks before it, and in the whole net.
    before: usize,
    of: usize,
    map: (usize, usize),
}

impl EfficientNet {
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
        let (channels, table) = spec.mb_stages();
        let conv = Conv::new(init, 3, channels, 3, 2)?;
        let stem = ConvNorm::new(init, conv, channels, SILU, ["0", "1"])?;
        let of = table.iter().map(|stage| stage.layers).sum();
        let mut at = At { stage: 0, block: 0, before: 0, of, map: shrink(image, 3, 2) };
        let mut stages = Vec::new();
        let mut inputs = channels;
        for row in &table {
            at.stage += 1;
            let mut blocks = Vec::new();
            for block in 0..row.layers {
                at.block = block;
                blocks.push(MbConv::new(init, spec, row, &at)?);
                at.map = if block == 0 { shrink(at.map, row.kernel, row.stride) } else { at.map };
                at.before += 1;
            }
            inputs = row.outputs;
            stages.push(blocks);
        }
        let outputs = 4 * inputs;
        let conv = Conv::new(init, inputs, outputs, 1, 1)?;
        let last = ConvNorm::new(init, conv, outputs, SILU, ["0", "1"])?;
        // torchvision draws it by the number of classes, not of inputs.
        let bound = 1.0 / (num_classes as f32).sqrt();
        let weight = init.uniform(&[num_classes, outputs], bound)?;
        let classifier = Linear::from_parts(weight, init.constant(&[num_classes], 0.0)?);
        Ok(Self { stem, stages, last, dropout: Dropout::new(spec.dropout, 0), classifier })
    }
}

impl Module for EfficientNet {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let mut x = self.stem.forward(x, mode)?;
        for block in self.stages.iter().flatten() {
            x = block.forward(&x, mode)?;
        }
        let x = ops::global_avg_pool(&self.last.forward(&x, mode)?)?;
        self.classifier.forward(&self.dropout.forward(&x, mode)?, mode)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let features = |i: usize| join(prefix, &format!("features.{i}"));
        let mut y = self.stem.describe(&features(0), input, rows);
        for (stage, blocks) in (1..).zip(&self.stages) {
            for (i, block) in blocks.iter().enumerate() {
                y = block.describe(&join(&features(stage), &i.to_string()), &y, rows);
            }
        }
        y = self.last.describe(&features(self.stages.len() + 1), &y, rows);
        rows.push(Layer::new(&join(prefix, "avgpool"), "global average pool", &y[2..], 0));
        self.classifier.describe(&join(prefix, "classifier.1"), &y[2..], rows)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        let features = |i: usize| join(prefix, &format!("features.{i}"));
        self.stem.visit(&features(0), f);
        for (stage, blocks) in (1..).zip(&mut self.stages) {
            for (i, block) in blocks.iter_mut().enumerate() {
                block.visit(&join(&features(stage), &i.to_string()), f);
            }
        }
        self.last.visit(&features(self.stages.len() + 1), f);
        self.classifier.visit(&join(prefix, "classifier.1"), f);
    }
}

impl MbConv {
    fn new(init: &mut Init, spec: &Spec, row: &MbStage, at: &At) -> Result<Self> {
        let first = at.block == 0;
        let (inputs, stride) = if first { (row.inputs, row.stride) } else { (row.outputs, 1) };
        let inner = inputs * row.expand;
        let expand = if row.expand == 1 {
            None
        } else {
            let conv = Conv::new(init, inputs, inner, 1, 1)?;
            Some(ConvNorm::new(init, conv, inner, SILU, ["0", "1"])?)
        };
        let attention = spec.attention_at(at.stage, at.block);
        let place =
            Place { attention, channels: inner, map: at.map, stride, act: SILU, names: ["0", "1"] };
        let depthwise =
            Spatial::new(init, place, |init| Conv::depthwise(init, inner, row.kernel, stride))?;
        let squeeze_excite = SqueezeExcite::new(init, inner, (inputs / 4).max(1))?;
        let conv = Conv::new(init, inner, row.outputs, 1, 1)?;
        let project = ConvNorm::new(init, conv, row.outputs, Activation::None, ["0", "1"])?;
        let p = spec.stochastic_depth * at.before as f32 / at.of as f32;
        // Stream 0 is the classifier's dropout.
        let depth = (stride == 1 && inputs == row.outputs)
            .then(|| StochasticDepth::new(p, 1 + at.before as u32));
        let map = shrink(at.map, row.kernel, stride);
        let appended = appended(init, attention, row.outputs, map)?;
        Ok(Self { expand, depthwise, squeeze_excite, project, depth, appended })
    }

    fn branch(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let expanded = self.expand.as_ref().map(|e| e.forward(x, mode)).transpose()?;
        let y = self.depthwise.forward_residual(expanded.as_ref().unwrap_or(x), None, mode)?;
        self.squeeze_excite.forward(&y, mode)
    }
}

impl Module for MbConv {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let y = self.branch(x, mode)?;
        let y = match &self.depth {
            Some(depth) if depth.acts(mode) => {
                depth.add(&self.project.forward(&y, mode)?, x, mode)?
            }
            Some(_) => self.project.forward_residual(&y, Some(x), mode)?,
            None => self.project.forward(&y, mode)?,
        };
        match &self.appended {
            Some(appended) => appended.forward(&y, mode),
            None => Ok(y),
        }
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let first = usize::from(self.expand.is_some());
        let part = |i: usize| join(prefix, &format!("block.{i}"));
        let mut y = input.to_vec();
        if let Some(expand) = &self.expand {
            y = expand.describe(&part(0), &y, rows);
        }
        y = self.depthwise.describe(&part(first), &y, rows);
        y = self.squeeze_excite.describe(&part(first + 1), &y, rows);
        y = self.project.describe(&part(first + 2), &y, rows);
        match &self.appended {
            Some(appended) => appended.describe(&join(prefix, "attn"), &y, rows),
            None => y,
        }
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        let mut i = 0;
        let mut next = || {
            i += 1;
            join(prefix, &format!("block.{}", i - 1))
        };
        if let Some(expand) = &mut self.expand {
            expand.visit(&next(), f);
        }
        self.depthwise.visit(&next(), f);
        self.squeeze_excite.visit(&next(), f);
        self.project.visit(&next(), f);
        if let Some(appended) = &mut self.appended {
            appended.visit(&join(prefix, "attn"), f);
        }
    }
}
