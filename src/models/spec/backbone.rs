//! The nets that models are built on: their names, families and sizes.

/// A net without the attention that a model string adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backbone {
    /// Two basic blocks in each of four stages.
    ResNet18,
    /// 3, 4, 6 and 3 basic blocks.
    ResNet34,
    /// 3, 4, 6 and 3 bottleneck blocks.
    ResNet50,
    /// Sixteen MBConv blocks in seven stages.
    EfficientNetB0,
    /// As B0, 1.1 times as deep.
    EfficientNetB1,
    /// As B0, 1.2 times as deep and 1.1 times as wide.
    EfficientNetB2,
    /// Patches of 16 pixels, width 192, 3 heads.
    ViTTi,
    /// Patches of 16 pixels, width 384, 6 heads.
    ViTS,
    /// Patches of 16 pixels, width 768, 12 heads.
    ViTB,
}

/// What a net is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Residual blocks of convolutions.
    ResNet,
    /// MBConv blocks: a depthwise convolution between two 1x1, and squeeze-excite.
    EfficientNet,
    /// Vision transformers: patches as tokens.
    ViT,
}

impl Family {
    /// How the names of the classifier's parameters begin in torchvision's state dicts.
    pub const fn head(self) -> &'static str {
        match self {
            Self::ResNet => "fc.",
            Self::EfficientNet => "classifier.",
            Self::ViT => "heads.",
        }
    }

    /// One line on it.
    pub const fn about(self) -> &'static str {
        match self {
            Self::ResNet => "residual blocks of convolutions",
            Self::EfficientNet => "MBConv blocks: depthwise convolutions and squeeze-excite",
            Self::ViT => "vision transformer: patches as tokens, attention throughout",
        }
    }
}

/// A stage of EfficientNet: `layers` MBConv blocks, the first with the stride.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MbStage {
    /// Channels inside a block, as a multiple of those that enter it.
    pub expand: usize,
    /// Height and width of the depthwise kernel.
    pub kernel: usize,
    /// Stride of the first block.
    pub stride: usize,
    /// Channels that enter the stage.
    pub inputs: usize,
    /// Channels of each block's output.
    pub outputs: usize,
    /// Blocks.
    pub layers: usize,
}

/// Name, and where it differs timm's and other usual names of the very same net.
const NAMES: [(Backbone, &str, &[&str]); 9] = [
    (Backbone::ResNet18, "resnet18", &[]),
    (Backbone::ResNet34, "resnet34", &[]),
    (Backbone::ResNet50, "resnet50", &[]),
    (Backbone::EfficientNetB0, "efficientnet_b0", &[]),
    (Backbone::EfficientNetB1, "efficientnet_b1", &[]),
    (Backbone::EfficientNetB2, "efficientnet_b2", &[]),
    (
        Backbone::ViTTi,
        "vit_ti_16",
        &["vit_tiny_patch16_224", "vit_tiny_patch16", "deit_tiny_patch16_224"],
    ),
    (
        Backbone::ViTS,
        "vit_s_16",
        &["vit_small_patch16_224", "vit_small_patch16", "deit_small_patch16_224"],
    ),
    (
        Backbone::ViTB,
        "vit_b_16",
        &["vit_base_patch16_224", "vit_base_patch16", "deit_base_patch16_224"],
    ),
];

/// EfficientNet-B0's stages (Tan and Le 2019, table 1): expand, kernel, stride, outputs.
const B0: [(usize, usize, usize, usize); 7] = [
    (1, 3, 1, 16),
    (6, 3, 2, 24),
    (6, 5, 2, 40),
    (6, 3, 2, 80),
    (6, 5, 1, 112),
    (6, 5, 2, 192),
    (6, 3, 1, 320),
];

impl Backbone {
    /// Every backbone.
    pub const ALL: [Self; 9] = [
        Self::ResNet18,
        Self::ResNet34,
        Self::ResNet50,
        Self::EfficientNetB0,
        Self::EfficientNetB1,
        Self::EfficientNetB2,
        Self::ViTTi,
        Self::ViTS,
        Self::ViTB,
    ];

    /// Its name in model strings.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|row| row.0 == self).map_or("", |row| row.1)
    }

    /// Other names by which model strings may call it: timm's, for the same net.
    pub fn aliases(self) -> &'static [&'static str] {
        NAMES.iter().find(|row| row.0 == self).map_or(&[], |row| row.2)
    }

    /// The backbone of a name or alias. timm's names may end in the tag of a set of weights, which names the images that it has seen
    /// (`.augreg_in21k`) and says nothing of the net.
    pub fn find(name: &str) -> Option<Self> {
        let weights =
            |tag: &str| ["in1k", "in12k", "in21k", "in22k"].iter().any(|set| tag.ends_with(set));
        let name =
            name.split_once('.').filter(|(_, tag)| weights(tag)).map_or(name, |(net, _)| net);
        NAMES.iter().find(|row| row.1 == name || row.2.contains(&name)).map(|row| row.0)
    }

    /// What it is made of.
    pub const fn family(self) -> Family {
        match self {
            Self::ResNet18 | Self::ResNet34 | Self::ResNet50 => Family::ResNet,
            Self::EfficientNetB0 | Self::EfficientNetB1 | Self::EfficientNetB2 => {
                Family::EfficientNet
            }
            Self::ViTTi | Self::ViTS | Self::ViTB => Family::ViT,
        }
    }

    /// Blocks in each stage; a transformer has one stage of 12.
    pub const fn blocks(self) -> &'static [usize] {
        match self {
            Self::ResNet18 => &[2, 2, 2, 2],
            Self::ResNet34 | Self::ResNet50 => &[3, 4, 6, 3],
            Self::EfficientNetB0 => &[1, 2, 2, 3, 3, 4, 1],
            // ceil(1.1 n) and ceil(1.2 n) are the same for these n.
            Self::EfficientNetB1 | Self::EfficientNetB2 => &[2, 3, 3, 4, 4, 5, 2],
            Self::ViTTi | Self::ViTS | Self::ViTB => &[12],
        }
    }

    /// The `w` option's default: channels of a ResNet's stage 1, of an EfficientNet's stem (before its own factor), of a
    /// transformer's tokens.
    pub const fn width(self) -> usize {
        match self {
            Self::ResNet18 | Self::ResNet34 | Self::ResNet50 => 64,
            Self::EfficientNetB0 | Self::EfficientNetB1 | Self::EfficientNetB2 => 32,
            Self::ViTTi => 192,
            Self::ViTS => 384,
            Self::ViTB => 768,
        }
    }

    /// Pixels of the side of a transformer's patches.
    pub const fn patch(self) -> usize {
        16
    }

    /// Heads of a transformer's blocks.
    pub const fn heads(self) -> usize {
        self.width() / 64
    }

    /// Channels that leave a ResNet's block, as a multiple of its 3x3 convolution's.
    pub const fn expansion(self) -> usize {
        if matches!(self, Self::ResNet50) { 4 } else { 1 }
    }

    /// Dropout before the classifier, as torchvision has it.
    pub const fn dropout(self) -> f32 {
        match self {
            Self::EfficientNetB0 | Self::EfficientNetB1 => 0.2,
            Self::EfficientNetB2 => 0.3,
            _ => 0.0,
        }
    }

    /// Stochastic depth of the deepest block.
    pub const fn stochastic_depth(self) -> f32 {
        match self.family() {
            Family::EfficientNet => 0.2,
            Family::ResNet | Family::ViT => 0.0,
        }
    }
}

/// The multiple of 8 nearest to `channels`, at least 8 and not below nine tenths of it: torchvision's `_make_divisible`.
fn divisible(channels: f64) -> usize {
    let new = ((channels + 4.0) as usize / 8 * 8).max(8);
    if (new as f64) < 0.9 * channels { new + 8 } else { new }
}

/// Channels of an EfficientNet's stem, of its stages and of its head for a base width of `width`.
pub(super) fn mb_stages(backbone: Backbone, width: usize, stages: usize) -> (usize, Vec<MbStage>) {
    let own = if backbone == Backbone::EfficientNetB2 { 1.1 } else { 1.0 };
    let scaled = |channels: usize| {
        // Exact at the full width, where the published factor alone decides.
        let reduced = (channels * width) as f64 / backbone.width() as f64;
        divisible(reduced * own)
    };
    let stem = scaled(32);
    let mut inputs = stem;
    let rows = B0.iter().zip(backbone.blocks()).take(stages);
    let stages = rows.map(|(&(expand, kernel, stride, outputs), &layers)| {
        let stage = MbStage { expand, kernel, stride, inputs, outputs: scaled(outputs), layers };
        inputs = stage.outputs;
        stage
    });
    (stem, stages.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_and_tags_of_weights_ignored() {
        for backbone in Backbone::ALL {
            assert_eq!(Backbone::find(backbone.name()), Some(backbone));
        }
        let tiny = Backbone::find("vit_tiny_patch16_224.augreg_in21k_ft_in1k");
        assert_eq!(tiny, Some(Backbone::ViTTi));
        assert_eq!(Backbone::find("vit_tiny_patch32_224"), None);
    }

    #[test]
    fn efficientnets_widths_are_the_published_ones() {
        let outputs = |b| mb_stages(b, 32, 7).1.iter().map(|s| s.outputs).collect::<Vec<_>>();
        assert_eq!(outputs(Backbone::EfficientNetB0), [16, 24, 40, 80, 112, 192, 320]);
        assert_eq!(outputs(Backbone::EfficientNetB2), [16, 24, 48, 88, 120, 208, 352]);
        assert_eq!(mb_stages(Backbone::EfficientNetB2, 32, 7).0, 32);
        // A quarter of the width: 2.5 and 10 channels are rounded up to 8 and 16.
        let (stem, narrow) = mb_stages(Backbone::EfficientNetB0, 8, 3);
        assert_eq!((stem, narrow.len(), narrow[0].outputs, narrow[2].outputs), (8, 3, 8, 16));
    }
}
