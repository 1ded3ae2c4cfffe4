//! Mixed precision through the public API: activations in f16 or bf16, parameters in f32. The same network in f32 on the CPU says what
//! loss and gradients should be; a gradient's distance from it is that of the vectors, as a share of the length of the right one.

use attn2d::nn::{BatchNorm, Conv, Init, Linear, Mode, Module, Parameters, Slot, join};
use attn2d::ops::{self, Activation, CrossEntropy, LayerNorm, MaxPool2d, Sgd};
use attn2d::tensor::philox::Philox;
use attn2d::{DType, Device, Tensor, models::Model};

const HALF: [DType; 2] = [DType::F16, DType::BF16];

/// Allowed distance of a gradient, in units of the type's rounding; about twice the largest that is seen. A few roundings follow one
/// another in each chain, and where one moves a number across zero, or another pixel ahead in a window, ReLU and pooling send a
/// gradient another way.
const UNITS: f64 = 16.0;

fn devices() -> Vec<Device> {
    let mut devices = vec![Device::cpu()];
    if cfg!(feature = "cuda-emu") {
        devices.push(Device::new("cuda-emu").unwrap());
    }
    devices
}

fn randn(device: &Device, op: u32, shape: &[usize]) -> Tensor {
    Tensor::randn(device, shape, Philox { seed: 11, step: 0, op }).unwrap()
}

/// A loss and its gradients by name.
struct Walk {
    loss: f32,
    gradients: Vec<(&'static str, Tensor)>,
}

/// Whether a walk in half precision is near enough to the one in f32.
fn compare(what: &str, dtype: DType, half: &Walk, exact: &Walk) {
    let allowed = UNITS * dtype.epsilon();
    let off = f64::from((half.loss - exact.loss).abs() / exact.loss);
    println!("{what}: loss {} for {}, off by {off:.1e}", half.loss, exact.loss);
    assert!(off < allowed, "{what}: loss {} for {}", half.loss, exact.loss);
    assert_eq!(half.gradients.len(), exact.gradients.len());
    for ((name, got), (_, want)) in half.gradients.iter().zip(&exact.gradients) {
        let off = distance(got, want);
        println!("    {name:12} {:4} off by {off:.1e}", got.dtype().suffix());
        assert!(off < allowed, "{what}: the gradient of {name} is off by {off}");
    }
}

fn distance(got: &Tensor, want: &Tensor) -> f64 {
    let (got, want) = (got.to_f32().unwrap(), want.to_f32().unwrap());
    assert_eq!(got.len(), want.len());
    let length = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let off = length(&mut got.iter().zip(&want).map(|(a, b)| f64::from(a - b)));
    let all = length(&mut want.iter().map(|b| f64::from(*b)));
    assert!(all > 0.0, "there is a gradient");
    off / all
}

/// Norm with residual and ReLU, pooling, mean, layer norm, loss: what is bound by memory.
fn norms_and_pools(device: &Device, dtype: DType) -> Walk {
    let shape = [4, 13, 9, 16];
    let image = |op| ops::cast(&randn(device, op, &shape), dtype).unwrap().requires_grad();
    let (x, residual) = (image(0), image(1));
    let channels = |value: f32| Tensor::full(device, &[16], value).unwrap();
    let leaf = |value: f32| channels(value).requires_grad();
    let (weight, bias, scale, shift) = (leaf(1.5), leaf(0.25), leaf(3.0), leaf(0.0));
    let (mean, var) = (channels(0.0), channels(1.0));
    let norm = ops::BatchNorm { act: Activation::Relu, ..Default::default() };
    let y = ops::batch_norm(&x, &weight, &bias, &mean, &var, Some(&residual), norm).unwrap();
    let pool = MaxPool2d { kernel: (3, 3), stride: (2, 2), padding: (1, 1) };
    let y = ops::max_pool2d(&y, pool).unwrap();
    assert_eq!(y.shape(), [4, 7, 5, 16]);
    let y = ops::dropout(&y, 0.1, Philox { seed: 5, step: 1, op: 2 }).unwrap();
    let y = ops::global_avg_pool(&y).unwrap();
    let logits = ops::layer_norm(&y, &scale, &shift, LayerNorm::default()).unwrap();
    assert_eq!(logits.dtype(), dtype);
    let labels = ops::class_labels(device, &[3, 0, 15, 7], 16).unwrap();
    let loss = ops::cross_entropy(&logits, &labels, None, CrossEntropy::default()).unwrap();
    assert_eq!(loss.dtype(), DType::F32);
    let grads = loss.backward().unwrap();
    let named = [("x", &x), ("residual", &residual), ("weight", &weight), ("bias", &bias)];
    let named = named.into_iter().chain([("scale", &scale), ("shift", &shift)]);
    let gradients = named.map(|(name, leaf)| {
        let grad = grads.get(leaf).unwrap();
        assert_eq!(grad.dtype(), leaf.dtype(), "the gradient of {name}");
        (name, grad.clone())
    });
    Walk { loss: loss.item().unwrap(), gradients: gradients.collect() }
}

#[test]
fn norms_and_pools_keep_near_f32() {
    let exact = norms_and_pools(&Device::cpu(), DType::F32);
    for device in devices() {
        for dtype in HALF {
            let half = norms_and_pools(&device, dtype);
            let what = format!("{} on {}", dtype.suffix(), device.name());
            compare(&what, dtype, &half, &exact);
        }
    }
}

/// A loss with another dtype than what follows needs is refused, and the message says what to do.
#[test]
fn mixed_up_storage_is_refused_by_name() {
    let device = Device::cpu();
    let x = randn(&device, 0, &[2, 3, 3, 4]);
    let half = ops::cast(&x, DType::F16).unwrap();
    let channels = Tensor::full(&device, &[4], 1.0).unwrap();
    let norm = |x: &Tensor, weight: &Tensor, residual: &Tensor| {
        let (mean, var) = (channels.clone(), channels.clone());
        let opt = ops::BatchNorm { training: false, ..Default::default() };
        let y = ops::batch_norm(x, weight, &channels, &mean, &var, Some(residual), opt);
        y.unwrap_err().to_string()
    };
    let message = norm(&half, &channels, &x);
    assert!(message.contains("residual must be f16 as x is, but it is f32"), "{message}");
    assert!(message.contains("attn2d::ops::cast"), "{message}");
    let half_channels = ops::cast(&channels, DType::BF16).unwrap();
    let message = norm(&x, &half_channels, &x);
    assert!(message.contains("weight must be f32, but it is bf16"), "{message}");
}

/// Convolution, norm, ReLU, pooling, mean, classifier: a network of the crate's layers.
struct Net {
    conv: Conv,
    norm: BatchNorm,
    head: Linear,
}

impl Net {
    fn new(device: &Device) -> (Self, Parameters) {
        let init = &mut Init::new(device, 3);
        let mut net = Self {
            conv: Conv::new(init, 3, 16, 3, 1).unwrap(),
            norm: BatchNorm::new(init, 16, Activation::Relu).unwrap(),
            head: Linear::new(init, 16, 5).unwrap(),
        };
        let parameters = Parameters::flatten(&mut net).unwrap();
        (net, parameters)
    }
}

impl Module for Net {
    fn forward(&self, x: &Tensor, mode: &Mode) -> attn2d::Result<Tensor> {
        let y = self.norm.forward(&self.conv.forward(x, mode)?, mode)?;
        let y = ops::max_pool2d(&y, MaxPool2d::default())?;
        self.head.forward(&ops::global_avg_pool(&y)?, mode)
    }

    fn visit(&mut self, prefix: &str, f: &mut dyn FnMut(Slot<'_>)) {
        self.conv.visit(&join(prefix, "conv"), f);
        self.norm.visit(&join(prefix, "norm"), f);
        self.head.visit(&join(prefix, "head"), f);
    }
}

fn net(device: &Device, dtype: DType) -> Walk {
    let (net, parameters) = Net::new(device);
    let x = ops::cast(&randn(device, 0, &[8, 12, 10, 3]), dtype).unwrap().requires_grad();
    let logits = net.forward(&x, &Mode::train(0, 1)).unwrap();
    assert_eq!(logits.dtype(), dtype);
    let labels = ops::class_labels(device, &[0, 1, 2, 3, 4, 0, 1, 2], 5).unwrap();
    let loss = ops::cross_entropy(&logits, &labels, None, CrossEntropy::default()).unwrap();
    let grads = loss.backward().unwrap();
    let names = ["conv.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"];
    let mut gradients: Vec<_> = names
        .into_iter()
        .map(|name| (name, grads.get(parameters.parameter(name).unwrap()).unwrap().clone()))
        .collect();
    assert!(gradients.iter().all(|(_, grad)| grad.dtype() == DType::F32));
    let dx = grads.get(&x).unwrap();
    assert_eq!(dx.dtype(), dtype);
    gradients.push(("x", dx.clone()));
    Walk { loss: loss.item().unwrap(), gradients }
}

#[test]
fn a_network_of_layers_keeps_near_f32() {
    let exact = net(&Device::cpu(), DType::F32);
    for device in devices() {
        for dtype in HALF {
            let half = net(&device, dtype);
            compare(&format!("{} on {}", dtype.suffix(), device.name()), dtype, &half, &exact);
        }
    }
}

/// Losses of some steps on one batch of a small ResNet, and the first step's gradient of all parameters.
fn steps(device: &Device, dtype: DType) -> (Vec<f32>, Tensor) {
    let spec = "resnet18:w8,stages=2,stem=small".parse().unwrap();
    let model = Model::build(&spec, 3, (16, 16), device, 1).unwrap();
    let parameters = model.parameters();
    let x = ops::cast(&randn(device, 0, &[6, 16, 16, 3]), dtype).unwrap();
    let labels = ops::class_labels(device, &[0, 1, 2, 0, 1, 2], 3).unwrap();
    let momentum = Tensor::zeros(device, parameters.values().shape()).unwrap();
    let (mut losses, mut first) = (Vec::new(), None);
    for step in 1..=STEPS {
        let logits = model.forward(&x, &Mode::train(0, step)).unwrap();
        let loss = ops::cross_entropy(&logits, &labels, None, CrossEntropy::default()).unwrap();
        parameters.gather(&loss.backward().unwrap()).unwrap();
        let gradients = parameters.gradients();
        assert_eq!((logits.dtype(), gradients.dtype()), (dtype, DType::F32));
        first.get_or_insert_with(|| gradients.to_device(device).unwrap());
        let opt = Sgd { lr: 0.02, momentum: 0.0, weight_decay: 0.0, nesterov: false };
        ops::sgd_step(parameters.values(), gradients, &momentum, None, opt).unwrap();
        losses.push(loss.item().unwrap());
    }
    (losses, first.unwrap())
}

const STEPS: u32 = 4;

/// Of a network of ten convolutions whose norms see few values the gradient moves ten times as far (by 0.04 in f16), its loss no
/// further.
const DEEP: f64 = 10.0;

/// A model of the crate with images in half precision: f32 master weights, copies of them made at each step.
#[test]
fn a_resnet_learns_in_half_precision() {
    let (exact, gradient) = steps(&Device::cpu(), DType::F32);
    for device in devices() {
        for dtype in HALF {
            let (losses, first) = steps(&device, dtype);
            let what = format!("{} on {}", dtype.suffix(), device.name());
            let off = distance(&first, &gradient);
            println!("{what}: {losses:?} for {exact:?}, the first gradient off by {off:.1e}");
            assert!(off < DEEP * UNITS * dtype.epsilon(), "{what}: {off}");
            assert!(losses[STEPS as usize - 1] < losses[0], "{what}: {losses:?}");
            for (a, b) in losses.iter().zip(&exact) {
                assert!(
                    f64::from((a - b).abs() / b) < UNITS * dtype.epsilon(),
                    "{what}: {losses:?}"
                );
            }
        }
    }
}
