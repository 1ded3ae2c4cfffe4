//! Locally enhanced self-attention (LESA, Yang et al. 2021): attention over the whole map beside a convolution, and a gate between them.

use super::{BatchNorm, Conv, Init, Layer, Mode, Module, Slot, join, parameter, product};
use crate::DType;
use crate::error::{Error, Result};
use crate::ops::case::Layout;
use crate::ops::{self, Activation, AvgPool2d, Conv2d};
use crate::tensor::Tensor;

/// What a [`Lesa`] is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LesaConfig {
    /// Channels in.
    pub inputs: usize,
    /// Channels out: a multiple of twice the heads, and of the groups.
    pub channels: usize,
    /// Heads; published: 8. Queries and keys have `channels / (2 heads)` numbers, values twice as many.
    pub heads: usize,
    /// Groups of the 3x3 convolution; published: 8. They divide `inputs` too.
    pub groups: usize,
    /// Height and width of the map, at most [`ops::LESA_MAX_PIXELS`] pixels: position rows are made for it.
    pub map: (usize, usize),
}

/// `unary + gate * context` on `[N, H, W, inputs]`, to `[N, H, W, channels]`; a stride is an average pool after it.
///
/// ```text
/// unary = bn(1x1(3x3(x, 8 groups)))
/// qkv = bn(1x1(x))    logits = sum of the three kinds of bn([q.k, q.r_q, k.r_k])    A = softmax over keys
/// context = bn([A v, A r_v]), both summed
/// gate = sigmoid(bn(1x1(relu(bn(1x1(relu([unary; context])))))))
/// ```
///
/// It owns, in this order, where a norm `bn` has what [`BatchNorm`] has:
///
/// | name | shape, in files | what |
/// |---|---|---|
/// | `qkv.weight`, `bn_qkv` | `[2 C, inputs, 1, 1]` | projections; of each head q, k, v one after the other |
/// | `relative` | `[2 H W - 1, 2 C / heads]` | rows by flattened offset from the most negative: r_q, r_k, r_v (published: transposed) |
/// | `bn_similarity` | `3 heads` channels | kinds one after the other, heads within |
/// | `bn_output` | `2 C` channels | first of `A v`, then of `A r_v` (published: in turns) |
/// | `unary1.weight`, `unary2.weight`, `bn_unary` | `[C, inputs / groups, 3, 3]`, `[C, C, 1, 1]` | the local term |
/// | `gate_unary.weight`, `gate_context.weight`, `bn_gate1` | `[C, C, 1, 1]` each | the gate's first layer (published: one weight) |
/// | `gate.weight`, `bn_gate2` | `[C, C, 1, 1]` | the second layer |
pub struct Lesa {
    config: LesaConfig,
    qkv: Conv,
    bn_qkv: BatchNorm,
    relative: Tensor,
    bn_similarity: BatchNorm,
    bn_output: BatchNorm,
    unary: [Conv; 2],
    bn_unary: BatchNorm,
    gate_unary: Conv,
    gate_context: Conv,
    bn_gate1: BatchNorm,
    gate: Conv,
    bn_gate2: BatchNorm,
}

impl Lesa {
    /// qkv starts normal with standard deviation `sqrt(1 / inputs)`, position rows with `sqrt(1 / (C / heads))`, other convolutions as
    /// [`Conv::new`], norms as [`BatchNorm::new`].
    ///
    /// # Errors
    /// [`Error::Usage`] where heads or groups do not divide the channels or the map is too large, else as [`Tensor::uninit`].
    pub fn new(init: &mut Init, config: LesaConfig) -> Result<Self> {
        let LesaConfig { inputs, channels: c, heads, groups, map } = config;
        if heads == 0 || !c.is_multiple_of(2 * heads) {
            let message = format!(
                "{heads} heads of LESA need channels that are a multiple of {}, not {c}",
                2 * heads
            );
            return Err(Error::usage(message));
        }
        if groups == 0 || !c.is_multiple_of(groups) || !inputs.is_multiple_of(groups) {
            let message =
                format!("{groups} groups of LESA do not divide {inputs} and {c} channels");
            return Err(Error::usage(message));
        }
        let pixels = map.0 * map.1;
        if pixels == 0 || pixels > ops::LESA_MAX_PIXELS {
            let message = format!(
                "a map of {}x{} is beyond LESA, which stores its logits: at most {} pixels; use it in a later stage",
                map.0,
                map.1,
                ops::LESA_MAX_PIXELS
            );
            return Err(Error::usage(message));
        }
        let std = (1.0 / inputs as f32).sqrt();
        let qkv = init.normal(&[2 * c, 1, 1, inputs], std)?;
        let places = (heads as f32 / c as f32).sqrt();
        let fan_out = (2.0 / (c * 9) as f32).sqrt();
        Ok(Self {
            config,
            qkv: Conv::from_weight(qkv, Conv2d::default()),
            bn_qkv: BatchNorm::new(init, 2 * c, Activation::None)?,
            relative: init.normal(&[2 * pixels - 1, 2 * c / heads], places)?,
            bn_similarity: BatchNorm::new(init, 3 * heads, Activation::None)?,
            bn_output: BatchNorm::new(init, 2 * c, Activation::None)?,
            unary: [
                Conv::from_weight(
                    init.normal(&[c, 3, 3, inputs / groups], fan_out)?,
                    Conv2d { padding: (1, 1), groups, ..Conv2d::default() },
                ),
                Conv::new(init, c, c, 1, 1)?,
            ],
            bn_unary: BatchNorm::new(init, c, Activation::None)?,
            gate_unary: Conv::new(init, c, c, 1, 1)?,
            gate_context: Conv::new(init, c, c, 1, 1)?,
            bn_gate1: BatchNorm::new(init, c, Activation::Relu)?,
            gate: Conv::new(init, c, c, 1, 1)?,
            bn_gate2: BatchNorm::new(init, c, Activation::None)?,
        })
    }

    /// The global term. What belongs to logits is f32 whatever x is.
    fn context(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let [n, h, w, _] = x.dims("lesa", "x")?;
        let (l, c, heads) = (h * w, self.config.channels, self.config.heads);
        let qkv = self.bn_qkv.forward(&self.qkv.forward(x, mode)?, mode)?;
        let qkv = ops::cast(&qkv, DType::F32)?.reshape(&[n, l, heads, 2 * c / heads])?;
        let logits = ops::lesa_logits(&qkv, &self.relative)?;
        let logits = self.bn_similarity.forward(&logits, mode)?;
        let both = ops::lesa_context(&logits, &qkv, &self.relative)?;
        let both = self.bn_output.forward(&both.reshape(&[n, h, w, 2 * c])?, mode)?;
        // Twice the mean of two is their sum, to the bit.
        let pairs = AvgPool2d { kernel: (2, 1), stride: (2, 1), ..AvgPool2d::default() };
        let mean = ops::avg_pool2d(&both.reshape(&[n, 2 * l, 1, c])?, pairs)?;
        ops::cast(&ops::add(&mean, &mean)?.reshape(&[n, h, w, c])?, x.dtype())
    }
}

impl Module for Lesa {
    fn forward(&self, x: &Tensor, mode: &Mode) -> Result<Tensor> {
        let [_, h, w, _] = x.dims("lesa", "x")?;
        let map = self.config.map;
        if map != (h, w) {
            let message = format!(
                "the position rows are for a map of {}x{}, but it is {h}x{w}; \
                 use the image size that the model was built for",
                map.0, map.1
            );
            return Err(Error::shape("lesa", message));
        }
        let local = self.unary[1].forward(&self.unary[0].forward(x, mode)?, mode)?;
        let unary = self.bn_unary.forward(&local, mode)?;
        let context = self.context(x, mode)?;
        let from_unary = self.gate_unary.forward(&ops::relu(&unary)?, mode)?;
        let from_context = self.gate_context.forward(&ops::relu(&context)?, mode)?;
        let hidden = self.bn_gate1.forward(&ops::add(&from_unary, &from_context)?, mode)?;
        let gate = self.bn_gate2.forward(&self.gate.forward(&hidden, mode)?, mode)?;
        ops::add(&unary, &ops::mul(&ops::sigmoid(&gate)?, &context)?)
    }

    fn describe(&self, prefix: &str, input: &[usize], rows: &mut Vec<Layer>) -> Vec<usize> {
        let LesaConfig { channels: c, heads, map: (h, w), .. } = self.config;
        let l = h * w;
        let qkv = self.qkv.describe(&join(prefix, "qkv"), input, rows);
        self.bn_qkv.describe(&join(prefix, "bn_qkv"), &qkv, rows);
        // Logits are two products of queries and one of keys with C / 2 channels, sums are two of C.
        let pairs = product(&[heads, l, l]);
        let parameters =
            self.relative.numel() + self.bn_similarity.parameters() + self.bn_output.parameters();
        let kind = format!("global attention, {heads} heads, norms");
        let attention = Layer { pairs, ..Layer::new(prefix, kind, &[h, w, c], parameters) };
        rows.push(attention.with_flop(7.0 * product(&[l, l, c])));
        let y = self.unary[0].describe(&join(prefix, "unary1"), input, rows);
        let y = self.unary[1].describe(&join(prefix, "unary2"), &y, rows);
        let y = self.bn_unary.describe(&join(prefix, "bn_unary"), &y, rows);
        self.gate_unary.describe(&join(prefix, "gate_unary"), &y, rows);
        self.gate_context.describe(&join(prefix, "gate_context"), &y, rows);
        self.bn_gate1.describe(&join(prefix, "bn_gate1"), &y, rows);
        self.gate.describe(&join(prefix, "gate"), &y, rows);
        self.bn_gate2.describe(&join(prefix, "bn_gate2"), &y, rows)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.qkv.visit(&join(prefix, "qkv"), f);
        self.bn_qkv.visit(&join(prefix, "bn_qkv"), f);
        parameter(f, prefix, "relative", &mut self.relative, Layout::Plain, true);
        self.bn_similarity.visit(&join(prefix, "bn_similarity"), f);
        self.bn_output.visit(&join(prefix, "bn_output"), f);
        let [unary1, unary2] = &mut self.unary;
        unary1.visit(&join(prefix, "unary1"), f);
        unary2.visit(&join(prefix, "unary2"), f);
        self.bn_unary.visit(&join(prefix, "bn_unary"), f);
        self.gate_unary.visit(&join(prefix, "gate_unary"), f);
        self.gate_context.visit(&join(prefix, "gate_context"), f);
        self.bn_gate1.visit(&join(prefix, "bn_gate1"), f);
        self.gate.visit(&join(prefix, "gate"), f);
        self.bn_gate2.visit(&join(prefix, "bn_gate2"), f);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::nn::Parameters;
    use crate::tensor::philox::Philox;

    const CONFIG: LesaConfig =
        LesaConfig { inputs: 16, channels: 16, heads: 2, groups: 8, map: (3, 5) };

    #[test]
    fn every_parameter_takes_part() {
        let device = Device::cpu();
        let mut layer = Lesa::new(&mut Init::new(&device, 7), CONFIG).unwrap();
        let parameters = Parameters::flatten(&mut layer).unwrap();
        // qkv and its norm, positions, norms of logits and of the context, the unary term, the gate.
        let counts = [32 * 16 + 64, 29 * 16, 12, 64, 16 * 2 * 9 + 256 + 32, 3 * 256 + 64];
        assert_eq!(parameters.count(), counts.iter().sum::<usize>());
        let random = Philox { seed: 3, step: 0, op: 0 };
        let x = Tensor::randn(&device, &[2, 3, 5, 16], random).unwrap();
        let y = layer.forward(&x, &Mode::train(0, 1)).unwrap();
        assert_eq!(y.shape(), [2, 3, 5, 16]);
        let dy = Tensor::randn(&device, y.shape(), Philox { op: 1, ..random }).unwrap();
        let grads = y.backward_with(&dy).unwrap();
        // A softmax does not see what all of its keys have in common.
        for name in parameters.parameter_names().filter(|name| *name != "bn_similarity.bias") {
            let grad = grads.get(parameters.parameter(name).unwrap());
            let grad = grad.unwrap_or_else(|| panic!("no gradient of {name}")).to_f32().unwrap();
            assert!(grad.iter().any(|v| v.abs() > 1e-7), "{name}: {grad:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let build = |config| Lesa::new(&mut Init::blank(), config);
        let refused = |config| build(config).err().expect("refused").to_string();
        assert!(refused(LesaConfig { heads: 3, ..CONFIG }).contains("a multiple of 6, not 16"));
        assert!(refused(LesaConfig { groups: 3, ..CONFIG }).contains("3 groups"));
        assert!(refused(LesaConfig { map: (33, 32), ..CONFIG }).contains("33x32"));
        let layer = build(CONFIG).unwrap();
        let x = Tensor::zeros(&Device::cpu(), &[1, 5, 3, 16]).unwrap();
        let message = layer.forward(&x, &Mode::EVAL).unwrap_err().to_string();
        assert!(message.contains("3x5, but it is 5x3"), "{message}");
    }
}
