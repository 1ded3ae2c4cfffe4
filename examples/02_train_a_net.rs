//! A net of your own, trained through the library: a module, its parameters, backward, an optimiser step.
//!
//!     cargo run --release --example 02_train_a_net                      on the CPU
//!     cargo run --release --example 02_train_a_net -- wgpu              on a GPU
//!
//! The task: tell horizontal, vertical and diagonal stripes apart, under noise, at any width and phase.

use attn2d::nn::{
    Attention, AttentionConfig, BatchNorm, Conv, Init, Linear, Mode, Module, Parameters, Reach,
    Slot, Tables, join,
};
use attn2d::ops::{self, Activation, AdamW, CrossEntropy};
use attn2d::tensor::philox::Philox;
use attn2d::{Device, Result, Tensor, tape};

const SIDE: usize = 16;
const CLASSES: usize = 3;
const BATCH: usize = 32;
const STEPS: u32 = 60;
const SEED: u64 = 7;

/// 3x3 convolution at stride 2, norm and ReLU; attention round a shortcut; pooling; a classifier.
struct StripeNet {
    conv: Conv,
    norm: BatchNorm,
    attention: Attention,
    attention_norm: BatchNorm,
    head: Linear,
}

impl StripeNet {
    fn new(init: &mut Init) -> Result<Self> {
        let (channels, heads, map) = (16, 4, (SIDE / 2, SIDE / 2));
        let attention = AttentionConfig {
            channels,
            heads,
            reach: Reach::Global { map },
            tables: Tables::Sum,
            scaled: true,
        };
        Ok(Self {
            conv: Conv::new(init, 3, channels, 3, 2)?,
            norm: BatchNorm::new(init, channels, Activation::Relu)?,
            attention: Attention::new(init, attention)?,
            attention_norm: BatchNorm::new(init, channels, Activation::Relu)?,
            head: Linear::new(init, channels, CLASSES)?,
        })
    }
}

impl Module for StripeNet {
    /// Images `[N, 16, 16, 3]` to logits `[N, 3]`.
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let x = self.norm.forward(&self.conv.forward(x, mode)?, mode)?;
        let y = self.attention.forward(&x, mode)?;
        let x = self.attention_norm.forward_residual(&y, Some(&x), mode)?;
        self.head.forward(&ops::global_avg_pool(&x)?, mode)
    }

    /// Names everything the net owns; these are the names in its state dict.
    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.conv.visit(&join(prefix, "conv"), f);
        self.norm.visit(&join(prefix, "norm"), f);
        self.attention.visit(&join(prefix, "attention"), f);
        self.attention_norm.visit(&join(prefix, "attention_norm"), f);
        self.head.visit(&join(prefix, "head"), f);
    }
}

fn main() -> Result<()> {
    let device = Device::new(&std::env::args().nth(1).unwrap_or_else(|| "cpu".into()))?;
    let mut net = StripeNet::new(&mut Init::new(&device, SEED))?;
    // From here on all parameters stand in one buffer, and so do their gradients.
    let parameters = Parameters::flatten(&mut net)?;
    println!("device     {} ({})", device.name(), device.caps().adapter);
    println!("parameters {}", parameters.count());

    let zeros = || Tensor::zeros(&device, parameters.values().shape());
    let (mean, square) = (zeros()?, zeros()?);
    for step in 1..=STEPS {
        let (images, labels) = batch(&device, step)?;
        let logits = net.forward(&images, &Mode::train(SEED, step))?;
        let loss = ops::cross_entropy(&logits, &labels, None, CrossEntropy::default())?;
        parameters.gather(&loss.backward()?)?;
        ops::adamw_step(
            parameters.values(),
            parameters.gradients(),
            (&mean, &square),
            Some(parameters.decay_mask()),
            AdamW { lr: 5e-3, ..AdamW::default() },
            step.into(),
        )?;
        if step == 1 || step % 10 == 0 {
            println!("step {step:3}   loss {:.4}", loss.item()?);
        }
    }

    let (mut right, mut all) = (0, 0);
    for step in STEPS + 1..=STEPS + 4 {
        let (images, labels) = batch(&device, step)?;
        let logits = tape::no_grad(|| net.forward(&images, &Mode::EVAL))?.to_f32()?;
        for (row, label) in logits.chunks(CLASSES).zip(labels.to_u32()?) {
            let best = (0..CLASSES).max_by(|&a, &b| row[a].total_cmp(&row[b]));
            right += usize::from(best == Some(label as usize));
            all += 1;
        }
    }
    println!("{right} of {all} new pictures are told right");
    Ok(())
}

/// The pictures of a step, `[32, 16, 16, 3]`, and their labels.
fn batch(device: &Device, step: u32) -> Result<(Tensor, Tensor)> {
    let draw = Philox { seed: SEED, step, op: 100 };
    let noise = Philox { op: 101, ..draw };
    let mut pixels = Vec::with_capacity(BATCH * SIDE * SIDE * 3);
    let mut labels = Vec::with_capacity(BATCH);
    for image in 0..BATCH as u64 {
        let label = draw.word(4 * image) % CLASSES as u32;
        let frequency = 0.8 + draw.uniform(4 * image + 1);
        let phase = std::f32::consts::TAU * draw.uniform(4 * image + 2);
        let (along_y, along_x) = [(1.0, 0.0), (0.0, 1.0), (0.7, 0.7)][label as usize];
        for place in 0..SIDE * SIDE {
            let (y, x) = ((place / SIDE) as f32, (place % SIDE) as f32);
            let stripe = (frequency * (along_y * y + along_x * x) + phase).sin();
            pixels.extend([stripe; 3]);
        }
        labels.push(label);
    }
    for (i, pixel) in pixels.iter_mut().enumerate() {
        *pixel += 0.5 * noise.normal(i as u64);
    }
    let images = Tensor::from_f32(device, &[BATCH, SIDE, SIDE, 3], &pixels)?;
    Ok((images, ops::class_labels(device, &labels, CLASSES)?))
}
