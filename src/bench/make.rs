//! From a row to what is called: inputs on the device, and functions that run a pass of it.

use super::CLASSES;
use super::row::{Outside, Position, Subject};
use crate::models::Model;
use crate::nn::Mode;
use crate::ops::{
    self, Activation, AdamW, AttentionBlock, BatchNorm, Border, Conv2d, CrossEntropy,
    GlobalAttention, LocalAttention, MaxPool2d, Sgd, adamw_step, batch_norm, class_labels, conv2d,
    cross_entropy, global_attention, linear, local_attention, max_pool2d, sgd_step, squeeze_excite,
};
use crate::tensor::philox::Philox;
use crate::{DType, Device, Result, Tensor};
use std::rc::Rc;
use std::sync::OnceLock;

/// Runs one pass; what it asked of the device may not be done yet.
pub type Call = Box<dyn Fn() -> Result<()>>;

/// The passes of a row on a device.
pub struct Calls {
    /// The forward as in training, with what it saves for a backward; none for whole steps.
    pub forward: Option<Call>,
    /// Forward and backward from a fixed random upstream gradient, or the whole step.
    pub whole: Call,
    /// What the tape keeps can be told by this; none where nothing is put on it (optimisers).
    pub(crate) taped: Option<Taped>,
}

/// A forward whose output still hangs on its tape.
pub(crate) struct Taped {
    pub(crate) output: Box<dyn Fn() -> Result<Tensor>>,
    /// Bytes of activations among its inputs, which the tape keeps too: weights and tables live anyway.
    pub(crate) inputs: usize,
}

/// Makes the inputs of a row with elements of `dtype`; parameters of norms, statistics and optimisers are f32 always.
///
/// # Errors
/// Those of the op that refuses, [`crate::Error::Device`] when memory runs out.
pub(crate) fn make(subject: &Subject, device: &Device, dtype: DType) -> Result<Calls> {
    let random = |shape: &[usize], stream| random(device, shape, stream, dtype);
    match *subject {
        Subject::Conv2d { n, size, channels, out, kernel, stride } => {
            let padding = (kernel / 2, kernel / 2);
            let options = Conv2d { stride: (stride, stride), padding, ..Conv2d::default() };
            let x = random(&[n, size, size, channels], 0)?;
            let x = if channels == 3 { x } else { x.requires_grad() };
            let w = random(&[out, kernel, kernel, channels], 1)?.requires_grad();
            passes(bytes(&[&x]), move || conv2d(&x, &w, None, options))
        }
        Subject::Depthwise { n, size, channels, kernel, stride } => {
            let (padding, stride) = ((kernel / 2, kernel / 2), (stride, stride));
            let options = Conv2d { stride, padding, groups: channels, ..Conv2d::default() };
            let x = random(&[n, size, size, channels], 0)?.requires_grad();
            let w = random(&[channels, kernel, kernel, 1], 1)?.requires_grad();
            passes(bytes(&[&x]), move || conv2d(&x, &w, None, options))
        }
        Subject::SqueezeExcite { n, size, channels, squeezed } => {
            let shapes: [&[usize]; 3] =
                [&[n, size, size, channels], &[squeezed, channels], &[channels, squeezed]];
            let [x, w1, w2] = [0, 1, 2].map(|i| random(shapes[i], i as u32));
            let [b1, b2] = [squeezed, channels].map(|len| Tensor::zeros(device, &[len]));
            let (x, w1, b1, w2, b2) = (x?, w1?, b1?, w2?, b2?);
            let [x, w1, b1, w2, b2] = [x, w1, b1, w2, b2].map(|t| t.requires_grad());
            passes(bytes(&[&x]), move || squeeze_excite(&x, &w1, &b1, &w2, &b2))
        }
        Subject::Linear { rows, inputs, outputs } => {
            let x = random(&[rows, inputs], 0)?.requires_grad();
            let w = random(&[outputs, inputs], 1)?.requires_grad();
            passes(bytes(&[&x]), move || linear(&x, &w, None))
        }
        Subject::BatchNorm { n, size, channels, residual } => {
            let x = random(&[n, size, size, channels], 0)?.requires_grad();
            let r = if residual { Some(random(x.shape(), 1)?.requires_grad()) } else { None };
            let full = |value| Tensor::full(device, &[channels], value);
            let (weight, bias) = (full(1.0)?.requires_grad(), full(0.0)?.requires_grad());
            let (mean, var) = (full(0.0)?, full(1.0)?);
            let options = BatchNorm { act: Activation::Relu, ..BatchNorm::default() };
            let inputs = bytes(&[&x]) + r.as_ref().map_or(0, |r| bytes(&[r]));
            passes(inputs, move || batch_norm(&x, &weight, &bias, &mean, &var, r.as_ref(), options))
        }
        Subject::MaxPool2d { n, size, channels } => {
            let options = MaxPool2d { kernel: (3, 3), stride: (2, 2), padding: (1, 1) };
            let x = random(&[n, size, size, channels], 0)?.requires_grad();
            passes(bytes(&[&x]), move || max_pool2d(&x, options))
        }
        Subject::GlobalAttention { .. } | Subject::LocalAttention { .. } => {
            attention(subject, device, dtype)
        }
        Subject::AttentionBlock { n, size, heads, d } => {
            attention_block([n, size, heads, d], device, dtype)
        }
        Subject::Adamw { len } => adamw(device, len),
        Subject::Step { ref model, size, n } => {
            let training = Rc::new(Training::new(device, model, size, n, dtype)?);
            let (inputs, again) = (bytes(&[&training.images]), training.clone());
            let taped = Some(Taped { output: Box::new(move || again.loss()), inputs });
            Ok(Calls { forward: None, whole: Box::new(move || training.step()), taped })
        }
    }
}

fn attention(subject: &Subject, device: &Device, dtype: DType) -> Result<Calls> {
    let (n, size, heads, d, offsets, position) = match *subject {
        Subject::GlobalAttention { n, size, heads, d, position } => {
            (n, size, heads, d, 2 * size - 1, position)
        }
        Subject::LocalAttention { n, size, heads, d, window, position, .. } => {
            (n, size, heads, d, window, position)
        }
        _ => return Err(crate::Error::usage("not an attention")),
    };
    let wanted =
        |shape: &[usize], stream, dtype| Ok(random(device, shape, stream, dtype)?.requires_grad());
    let qkv = |stream| wanted(&[n, size, size, heads, d], stream, dtype);
    let (q, k, v) = (qkv(0)?, qkv(1)?, qkv(2)?);
    let table = |there: bool, shape: &[usize], stream| -> Result<Option<Tensor>> {
        if there { wanted(shape, stream, DType::F32).map(Some) } else { Ok(None) }
    };
    let rel = position == Position::Rel;
    let rel_h = table(rel, &[offsets, heads * d], 3)?;
    let rel_w = table(rel, &[offsets, heads * d], 4)?;
    let bias = table(position == Position::Bias, &[heads, offsets, offsets], 5)?;
    if let Subject::LocalAttention { window, border, .. } = *subject {
        let border = if border == Outside::Zero { Border::Zero } else { Border::Mask };
        return passes(bytes(&[&q, &k, &v]), move || {
            let (rel_h, rel_w, bias) = (rel_h.as_ref(), rel_w.as_ref(), bias.as_ref());
            let window = (window, window);
            let options = LocalAttention { window, border, scale: None, rel_h, rel_w, bias };
            local_attention(&q, &k, &v, options)
        });
    }
    passes(bytes(&[&q, &k, &v]), move || {
        let (rel_h, rel_w, bias) = (rel_h.as_ref(), rel_w.as_ref(), bias.as_ref());
        global_attention(&q, &k, &v, GlobalAttention { scale: None, rel_h, rel_w, bias })
    })
}

/// Weights are scaled so that q, k and v are as large as x.
fn attention_block(sizes: [usize; 4], device: &Device, dtype: DType) -> Result<Calls> {
    let [n, size, heads, d] = sizes;
    let c = heads * d;
    let x = random(device, &[n, size, size, c], 0, dtype)?.requires_grad();
    let weight = |stream| -> Result<Tensor> {
        let numbers = random(device, &[c, c], stream, DType::F32)?.to_f32()?;
        let numbers: Vec<f32> = numbers.iter().map(|v| v / (c as f32).sqrt()).collect();
        Ok(Tensor::from_f32_as(device, &[c, c], dtype, &numbers)?.requires_grad())
    };
    let (q, k, v, proj) = (weight(1)?, weight(2)?, weight(3)?, weight(4)?);
    let table = |stream| -> Result<Tensor> {
        Ok(random(device, &[2 * size - 1, c], stream, DType::F32)?.requires_grad())
    };
    let (rel_h, rel_w) = (table(5)?, table(6)?);
    passes(bytes(&[&x]), move || {
        let (proj, rel_h, rel_w) = (Some(&proj), Some(&rel_h), Some(&rel_w));
        let qkv = [&q, &k, &v];
        let block = AttentionBlock { heads, scale: None, qkv, proj, rel_h, rel_w, residual: true };
        ops::attention_block(&x, block)
    })
}

fn adamw(device: &Device, len: usize) -> Result<Calls> {
    let flat = |stream| random(device, &[len], stream, DType::F32);
    let (param, grad) = (flat(0)?, flat(1)?);
    let (mean, square) = (Tensor::zeros(device, &[len])?, Tensor::zeros(device, &[len])?);
    let options = AdamW::default();
    let step = move || adamw_step(&param, &grad, (&mean, &square), None, options, 1);
    Ok(Calls { forward: None, whole: Box::new(step), taped: None })
}

/// Standard normal numbers, rounded to `dtype`.
pub(crate) fn random(
    device: &Device,
    shape: &[usize],
    stream: u32,
    dtype: DType,
) -> Result<Tensor> {
    // A prime number of them, again and again, from a place that depends on the stream: hundreds of millions of fresh ones
    // would take the host longer than the row.
    const PERIOD: usize = 1_000_003;
    static NUMBERS: OnceLock<Vec<f32>> = OnceLock::new();
    let numbers = NUMBERS.get_or_init(|| {
        let random = Philox { seed: 1, step: 0, op: 0 };
        (0..PERIOD as u64).map(|i| random.normal(i)).collect()
    });
    let start = stream as usize * 104_729 % PERIOD;
    let len = shape.iter().product();
    let data: Vec<f32> = numbers.iter().cycle().skip(start).take(len).copied().collect();
    Tensor::from_f32_as(device, shape, dtype, &data)
}

fn bytes(tensors: &[&Tensor]) -> usize {
    tensors.iter().map(|t| t.numel() * t.dtype().bytes()).sum()
}

/// The passes of a differentiable function, among whose inputs are `inputs` bytes of activations.
fn passes(inputs: usize, f: impl Fn() -> Result<Tensor> + 'static) -> Result<Calls> {
    let y = f()?;
    let dy = random(y.device(), y.shape(), 99, y.dtype())?;
    let f = Rc::new(f);
    let (forward, output) = (f.clone(), f.clone());
    Ok(Calls {
        forward: Some(Box::new(move || forward().map(drop))),
        whole: Box::new(move || f()?.backward_with(&dy).map(drop)),
        taped: Some(Taped { output: Box::new(move || output()), inputs }),
    })
}

/// A model in training on random pictures that are on the device already.
struct Training {
    model: Model,
    images: Tensor,
    labels: Tensor,
    momentum: Tensor,
}

impl Training {
    fn new(device: &Device, model: &str, size: usize, n: usize, dtype: DType) -> Result<Self> {
        if dtype != DType::F32 {
            let message = format!("models train in f32; --precision {} is for ops", dtype.suffix());
            return Err(crate::Error::usage(message));
        }
        let model = Model::build(&model.parse()?, CLASSES, (size, size), device, 0)?;
        let images = random(device, &[n, size, size, 3], 0, dtype)?;
        let labels: Vec<u32> = (0..n).map(|i| (i * 37 % CLASSES) as u32).collect();
        let labels = class_labels(device, &labels, CLASSES)?;
        let momentum = Tensor::zeros(device, model.parameters().values().shape())?;
        Ok(Self { model, images, labels, momentum })
    }

    fn loss(&self) -> Result<Tensor> {
        let logits = self.model.forward(&self.images, &Mode::train(0, 1))?;
        cross_entropy(&logits, &self.labels, None, CrossEntropy::default())
    }

    /// Forward, loss, backward, SGD with momentum; the loss stays on the device.
    fn step(&self) -> Result<()> {
        self.images.device().step(|| {
            let parameters = self.model.parameters();
            parameters.gather(&self.loss()?.backward()?)?;
            let sgd = Sgd { lr: 0.01, momentum: 0.9, ..Sgd::default() };
            let (values, gradients) = (parameters.values(), parameters.gradients());
            sgd_step(values, gradients, &self.momentum, None, sgd)
        })
    }
}
