//! Fused 2D self-attention and convolution for CNNs: hand-written kernels, forward and backward, on CPUs and GPUs, with a small
//! tensor and autograd core to drive them, models built of them, and the `attn2d` program that trains and compares these.
//!
//! Attention over a feature map costs (H W)^2 scores an image and head when it is written as matrix products. The kernels here
//! never store a score: forward keeps the output and one number a query, backward computes the scores again. Learned relative
//! positions and their gradients are part of the same kernels, and results are equal to the bit from run to run.
//!
//! ```
//! use attn2d::ops::{GlobalAttention, global_attention};
//! use attn2d::{Device, Tensor, tensor::philox::Philox};
//!
//! # fn main() -> attn2d::Result<()> {
//! let device = Device::new("cpu")?; // or "auto", "wgpu", "wgpu:nvidia"
//! let random = |op, shape: &[usize]| Tensor::randn(&device, shape, Philox { seed: 1, step: 0, op });
//! // Queries, keys and values of 2 images, 7 x 9 places, 4 heads of 16 channels: [N, H, W, heads, d].
//! let q = random(0, &[2, 7, 9, 4, 16])?.requires_grad();
//! let (k, v) = (random(1, q.shape())?, random(2, q.shape())?);
//! let rel_h = random(3, &[2 * 7 - 1, 4 * 16])?.requires_grad(); // a row for each vertical offset
//! let y = global_attention(&q, &k, &v, GlobalAttention { rel_h: Some(&rel_h), ..Default::default() })?;
//! assert_eq!(y.shape(), [2, 7, 9, 4, 16]);
//! let gradients = y.backward_with(&Tensor::full(&device, y.shape(), 1.0)?)?;
//! let d_rel_h = gradients.get(&rel_h).expect("rel_h asked for a gradient");
//! assert_eq!(d_rel_h.shape(), rel_h.shape());
//! # Ok(())
//! # }
//! ```
//!
//! # Modules
//!
//! | module | what is in it |
//! |---|---|
//! | [`ops`] | what can be computed: attention, convolution, norms, pooling, losses, optimiser steps; each with its gradient |
//! | [`tensor`], [`tape`] | tensors on a [`Device`]; recording an op and walking back |
//! | [`kernel`] | a kernel as data: names, bindings, its text for each kind of device. For ops of your own |
//! | [`nn`] | layers that own named parameters, and the flat store of these |
//! | [`models`] | ResNet18 and ResNet34 with attention where a model string says: `resnet18+ga@4` |
//! | [`io`] | safetensors with torchvision's names and layouts |
//! | [`data`] | ISIC, PatchCamelyon, Camelyon17, MedMNIST, folders of images; splits, augmentation, a threaded loader |
//! | [`config`], [`train`] | a run's settings; training, evaluation, checkpoints, metrics |
//! | [`verify`] | conformance of every op on every device, and of ops of your own |
//! | [`mod@bench`] | times of ops and training steps beside a device's ceilings |
//! | [`stats`] | tests, intervals and effect sizes for repeated runs of two models |
//! | [`html`] | tables and charts for reports of one file |
//! | [`cli`] | the verbs of the `attn2d` program |
//!
//! `examples/` has three programs to begin with: fused attention on any device, a net of your own, an op of your own.
//! `ARCHITECTURE.md` is the map of the code.
//!
//! # Layouts
//!
//! Everything is contiguous. Images are `[N, H, W, C]`, tokens `[N, H, W, heads, d]`, convolution weights `[O, kh, kw, I]`. Files
//! keep torchvision's names and layouts. Elements are `f32`, `f16` or `bf16` ([`DType`]); class labels are `u32`.
//!
//! # Precision
//!
//! Every op but the optimiser's steps takes activations in `f16` and `bf16` too, on the CUDA devices and on the CPU (which widens them to
//! `f32` and rounds what it writes); `wgpu` has `f16` where the adapter does. Sums, norms, softmax and losses are computed in `f32` whatever
//! the storage. Matrix weights are stored as the activations are; biases, weights of norms, statistics, position tables, and the
//! gradients of all parameters are `f32`. So parameters stay in `f32`, and [`ops::cast`] makes the copies that a step
//! computes with; the layers of [`nn`] do that by themselves, so a model given half-precision images runs in half precision.
//!
//! ```
//! use attn2d::{DType, Device, Tensor, ops};
//!
//! # fn main() -> attn2d::Result<()> {
//! let device = Device::new("cpu")?;
//! assert!(device.caps().half.contains(&DType::BF16));
//! // From numbers on the host, each rounded to the nearest bf16; Tensor::uninit is for what a kernel is to fill.
//! let x = Tensor::from_f32_as(&device, &[1, 2], DType::BF16, &[1.0, 0.3])?;
//! assert_eq!(x.to_f32()?, [1.0, 0.30078125]);
//! assert_eq!(Tensor::uninit(&device, &[2, 2], DType::BF16)?.dtype(), x.dtype());
//! // A master weight in f32, its copy for this step, and an f32 gradient that comes back through the copy.
//! let weight = Tensor::from_f32(&device, &[2, 2], &[0.5, -0.25, 1.0, 2.0])?.requires_grad();
//! let y = ops::linear(&x, &ops::cast(&weight, x.dtype())?, None)?;
//! assert_eq!(y.dtype(), DType::BF16);
//! let gradients = y.backward_with(&Tensor::from_f32_as(&device, &[1, 2], DType::BF16, &[1.0, 1.0])?)?;
//! let dw = gradients.get(&weight).expect("the weight asked for a gradient");
//! assert_eq!((dw.dtype(), dw.to_f32()?), (DType::F32, vec![1.0, 0.30078125, 1.0, 0.30078125]));
//! # Ok(())
//! # }
//! ```
//!
//! # Devices and features
//!
//! [`Device::new`] takes `auto`, `cpu`, `wgpu`, `wgpu:1`, `wgpu:nvidia` (part of an adapter's name) or `cuda:0`. `attn2d doctor` shows
//! what a machine has. `wgpu` and `cuda` are on by default and need nothing when the crate is built: drivers are loaded at run time.
//!
//! | feature | device | what it needs at run time |
//! |---|---|---|
//! | - | `cpu` | nothing; AVX2 with FMA is used where it is there |
//! | `wgpu` | `wgpu` | a driver for Vulkan, Metal or DX12; Mesa's software driver will do to try it |
//! | `cuda` | `cuda:0` | NVIDIA's driver, and its NVRTC library unless `nvcc` was there when the crate was built |
//! | `cuda-emu` (off) | `cuda-emu` | for tests: the CUDA kernels run on the host; a C++17 compiler when the crate is built |
//!
//! # Errors
//!
//! Whatever can fail gives an [`Error`], which names what is at fault, what was expected and what to do. Nothing panics on bad input.
//! No output of the library goes to the terminal, and no file is touched, but by [`io`], [`data`], [`train`], [`verify`], [`mod@bench`] and
//! [`cli`]; and compiled CUDA kernels are kept in a cache folder. [`on_notice`] hears what a device has to say while it works.

mod backend;
pub mod bench;
pub mod cli;
pub mod config;
mod cpu;
pub mod data;
pub mod error;
pub mod html;
pub mod io;
pub mod kernel;
pub mod models;
pub mod nn;
pub mod ops;
pub mod stats;
pub mod study;
pub mod tape;
pub mod tensor;
pub mod train;
pub mod verify;

pub use backend::{
    Caps, Device, DeviceReport, GraphCounts, KernelTime, MemoryStats, Notice, device_reports,
    on_notice,
};
pub use error::{Error, Result};
pub use tensor::{DType, Tensor};

/// The snippet of the README must run too.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
