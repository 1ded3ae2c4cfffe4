//! Training steps of a ResNet18: plain, or with attention for the second 3x3 of each block of stages 3 and 4.

use crate::ops::{local, random};
use crate::{Call, Calls};
use burn::module::{Module, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::pool::{MaxPool2d, MaxPool2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::optim::momentum::MomentumConfig;
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor};
use serde_json::Value;

const HEADS: usize = 8;
const WINDOW: usize = 7;

/// 1x1 projections and a 7x7 window with relative positions, zeros outside the map.
#[derive(Module, Debug)]
struct LocalAttention {
    qkv: Conv2d,
    rel_h: Param<Tensor<4>>,
    rel_w: Param<Tensor<4>>,
}

#[derive(Module, Debug)]
struct Block {
    conv1: Conv2d,
    norm1: BatchNorm,
    conv2: Option<Conv2d>,
    attention: Option<LocalAttention>,
    norm2: BatchNorm,
    shortcut: Option<Conv2d>,
    shortcut_norm: Option<BatchNorm>,
}

#[derive(Module, Debug)]
struct ResNet18 {
    conv: Conv2d,
    norm: BatchNorm,
    pool: MaxPool2d,
    blocks: Vec<Block>,
    fc: Linear,
}

fn conv(from: usize, to: usize, kernel: usize, stride: usize, device: &Device) -> Conv2d {
    let p = kernel / 2;
    let config = Conv2dConfig::new([from, to], [kernel, kernel]).with_stride([stride, stride]);
    config.with_padding(PaddingConfig2d::Explicit(p, p, p, p)).with_bias(false).init(device)
}

impl LocalAttention {
    fn new(channels: usize, device: &Device) -> Self {
        let table = |shape| Param::from_tensor(random(shape, device) * 0.02);
        let d = channels / HEADS;
        Self { qkv: conv(channels, 3 * channels, 1, 1, device), rel_h: table([HEADS, d, WINDOW, 1]), rel_w: table([HEADS, d, 1, WINDOW]) }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let mut inputs = self.qkv.forward(x).chunk(3, 1);
        inputs.extend([self.rel_h.val(), self.rel_w.val()]);
        local(&inputs, HEADS, WINDOW, None)
    }
}

impl Block {
    fn new(from: usize, to: usize, stride: usize, attention: bool, device: &Device) -> Self {
        let down = stride != 1 || from != to;
        let norm = || BatchNormConfig::new(to).init(device);
        Self {
            conv1: conv(from, to, 3, stride, device),
            norm1: norm(),
            conv2: (!attention).then(|| conv(to, to, 3, 1, device)),
            attention: attention.then(|| LocalAttention::new(to, device)),
            norm2: norm(),
            shortcut: down.then(|| conv(from, to, 1, stride, device)),
            shortcut_norm: down.then(norm),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let mut y = relu(self.norm1.forward(self.conv1.forward(x.clone())));
        if let Some(conv) = &self.conv2 {
            y = conv.forward(y);
        }
        if let Some(attention) = &self.attention {
            y = attention.forward(y);
        }
        let shortcut = match (&self.shortcut, &self.shortcut_norm) {
            (Some(conv), Some(norm)) => norm.forward(conv.forward(x)),
            _ => x,
        };
        relu(self.norm2.forward(y) + shortcut)
    }
}

impl ResNet18 {
    fn new(attention: bool, device: &Device) -> Self {
        let (mut from, mut blocks) = (64, Vec::new());
        for (stage, to) in [64, 128, 256, 512].into_iter().enumerate() {
            for block in 0..2 {
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                blocks.push(Block::new(from, to, stride, attention && stage >= 2, device));
                from = to;
            }
        }
        let padding = PaddingConfig2d::Explicit(1, 1, 1, 1);
        Self {
            conv: conv(3, 64, 7, 2, device),
            norm: BatchNormConfig::new(64).init(device),
            pool: MaxPool2dConfig::new([3, 3]).with_strides([2, 2]).with_padding(padding).init(),
            blocks,
            fc: LinearConfig::new(512, 1000).init(device),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        let x = self.pool.forward(relu(self.norm.forward(self.conv.forward(x))));
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x));
        let [n, c, h, w] = x.dims();
        let x: Tensor<3> = x.reshape([n, c, h * w]);
        self.fc.forward(x.mean_dim(2).reshape([n, c]))
    }
}

/// Forward, cross entropy, backward, SGD with momentum; 1000 classes.
pub fn step(s: &Value, device: &Device) -> Result<Calls, String> {
    let attention = match s["model"].as_str() {
        Some("resnet18") => false,
        Some("resnet18+ela7@3,4:border=zero") => true,
        other => return Err(format!("no peer was written for the model {}", other.unwrap_or("without a name"))),
    };
    let at = |name: &str| s[name].as_u64().unwrap_or_default() as usize;
    let (n, size, device) = (at("n"), at("size"), device.clone().autodiff());
    let mut model = Some(ResNet18::new(attention, &device));
    let pictures: Tensor<4> = random([n, 3, size, size], &device);
    let labels: Vec<i32> = (0..n as i32).map(|i| i * 37 % 1000).collect();
    let labels: Tensor<1, Int> = Tensor::from_ints(labels.as_slice(), &device);
    let mut sgd = SgdConfig::new().with_momentum(Some(MomentumConfig::new())).init();
    let cross_entropy = CrossEntropyLossConfig::new().init(&device);
    let whole: Call = Box::new(move || {
        let Some(now) = model.take() else { panic!("an earlier step failed") };
        let loss = cross_entropy.forward(now.forward(pictures.clone()), labels.clone());
        let gradients = GradientsParams::from_grads(loss.backward(), &now);
        model = Some(sgd.step(0.01, now, gradients));
        loss
    });
    Ok(Calls { forward: None, whole })
}
