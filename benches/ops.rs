//! Every op, forward + backward through the tape, on the CPU: `cargo bench --bench ops [-- FILTER]`.
//!
//! The rows are those of `benches/peers/torch_bench.py`, under the same names; `benches/peers/compare.py` runs both, one
//! row after the other. A row is a name and a function that makes its inputs and returns what is to be timed; add rows
//! to the list of your op, or a list to [`rows`].

use attn2d::ops::{
    Activation, BatchNorm, Border, Conv2d, GlobalAttention, LocalAttention, MaxPool2d, batch_norm,
    conv2d, global_attention, linear, local_attention, max_pool2d,
};
use attn2d::tensor::philox::Philox;
use attn2d::{Device, Result, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use std::time::Duration;

/// What is timed: one forward and one backward.
type Step = Box<dyn Fn() -> Result<()>>;
type Row = (String, Box<dyn Fn(&Device) -> Result<Step>>);

fn rows() -> Vec<Row> {
    let of_ops = [
        conv2d_rows(),
        linear_rows(),
        batch_norm_rows(),
        max_pool_rows(),
        global_attention_rows(),
        local_attention_rows(),
    ];
    of_ops.into_iter().flatten().collect()
}

/// N = 8, the convolutions of ResNet18 at 224 x 224; the stem without an input gradient, as in training.
fn conv2d_rows() -> Vec<Row> {
    let row = |name: &str, x: [usize; 4], out: usize, kernel: usize, stride: usize| -> Row {
        let padding = (kernel / 2, kernel / 2);
        let options = Conv2d { stride: (stride, stride), padding, ..Conv2d::default() };
        let make = move |device: &Device| {
            let image = random(device, &x, 0)?;
            let image = if x[3] == 3 { image } else { image.requires_grad() };
            let w = random(device, &[out, kernel, kernel, x[3]], 1)?.requires_grad();
            step(move || conv2d(&image, &w, None, options))
        };
        (format!("conv2d_{name}"), Box::new(make))
    };
    vec![
        row("3x3_64x56", [8, 56, 56, 64], 64, 3, 1),
        row("3x3_128x28", [8, 28, 28, 128], 128, 3, 1),
        row("3x3_256x14", [8, 14, 14, 256], 256, 3, 1),
        row("3x3_512x7", [8, 7, 7, 512], 512, 3, 1),
        row("3x3_s2_64_128x56", [8, 56, 56, 64], 128, 3, 2),
        row("1x1_s2_64_128x56", [8, 56, 56, 64], 128, 1, 2),
        row("stem_7x7_s2", [8, 224, 224, 3], 64, 7, 2),
    ]
}

fn linear_rows() -> Vec<Row> {
    let make = |device: &Device| {
        let x = random(device, &[32, 512], 0)?.requires_grad();
        let w = random(device, &[1000, 512], 1)?.requires_grad();
        step(move || linear(&x, &w, None))
    };
    vec![("linear_32x512_1000".into(), Box::new(make))]
}

/// N = 8, training, fused with ReLU; the last row also with a residual, as the second norm of a ResNet block.
fn batch_norm_rows() -> Vec<Row> {
    let row = |name: &str, size: usize, channels: usize, residual: bool| -> Row {
        let make = move |device: &Device| {
            let x = random(device, &[8, size, size, channels], 0)?.requires_grad();
            let r = random(device, &[8, size, size, channels], 1)?.requires_grad();
            let full = |value| Tensor::full(device, &[channels], value);
            let (weight, bias) = (full(1.0)?.requires_grad(), full(0.0)?.requires_grad());
            let (mean, var) = (full(0.0)?, full(1.0)?);
            let options = BatchNorm { act: Activation::Relu, ..BatchNorm::default() };
            step(move || {
                batch_norm(&x, &weight, &bias, &mean, &var, residual.then_some(&r), options)
            })
        };
        (format!("batch_norm_{name}"), Box::new(make))
    };
    vec![
        row("relu_64x56", 56, 64, false),
        row("relu_256x14", 14, 256, false),
        row("add_relu_64x56", 56, 64, true),
    ]
}

/// N = 8, the pool behind a ResNet's stem.
fn max_pool_rows() -> Vec<Row> {
    let row = |size: usize| -> Row {
        let options = MaxPool2d { kernel: (3, 3), stride: (2, 2), padding: (1, 1) };
        let make = move |device: &Device| {
            let x = random(device, &[8, size, size, 64], 0)?.requires_grad();
            step(move || max_pool2d(&x, options))
        };
        (format!("max_pool2d_3x3_s2_64x{size}"), Box::new(make))
    };
    vec![row(112), row(56)]
}

/// N = 8, 8 heads of d channels on square maps; `rel` with tables of row and column offsets, which get gradients too.
fn global_attention_rows() -> Vec<Row> {
    let row = |size: usize, d: usize, rel: bool| -> Row {
        let name = if rel { "global_attention_rel" } else { "global_attention" };
        let make = move |device: &Device| {
            let shape = [8, size, size, 8, d];
            let input = |stream| Ok(random(device, &shape, stream)?.requires_grad());
            let (q, k, v) = (input(0)?, input(1)?, input(2)?);
            let table =
                |stream| Ok(random(device, &[2 * size - 1, 8 * d], stream)?.requires_grad());
            let (rel_h, rel_w) = (table(3)?, table(4)?);
            step(move || {
                let (rel_h, rel_w) = (rel.then_some(&rel_h), rel.then_some(&rel_w));
                let options = GlobalAttention { rel_h, rel_w, ..GlobalAttention::default() };
                global_attention(&q, &k, &v, options)
            })
        };
        (format!("{name}_t{}_d{d}", size * size), Box::new(make))
    };
    vec![
        row(7, 64, false),
        row(14, 32, false),
        row(14, 64, false),
        row(28, 32, false),
        row(28, 64, false),
        row(14, 32, true),
        row(28, 32, true),
    ]
}

/// N = 8, 8 heads, zero border and both tables, as the `unfold` formulation has it.
fn local_attention_rows() -> Vec<Row> {
    let row = |channels: usize, size: usize, k: usize| -> Row {
        let make = move |device: &Device| {
            let shape = [8, size, size, 8, channels / 8];
            let input = |stream| Ok(random(device, &shape, stream)?.requires_grad());
            let (q, k_, v) = (input(0)?, input(1)?, input(2)?);
            let table = |stream| Ok(random(device, &[k, channels], stream)?.requires_grad());
            let (rel_h, rel_w) = (table(3)?, table(4)?);
            step(move || {
                let options = LocalAttention {
                    window: (k, k),
                    border: Border::Zero,
                    rel_h: Some(&rel_h),
                    rel_w: Some(&rel_w),
                    ..LocalAttention::default()
                };
                local_attention(&q, &k_, &v, options)
            })
        };
        (format!("local_attention_k{k}_{channels}x{size}"), Box::new(make))
    };
    vec![
        row(128, 28, 7),
        row(128, 28, 3),
        row(128, 28, 13),
        row(64, 56, 7),
        row(256, 14, 7),
        row(512, 7, 7),
    ]
}

/// Standard normal numbers.
fn random(device: &Device, shape: &[usize], stream: u32) -> Result<Tensor> {
    Tensor::randn(device, shape, Philox { seed: 1, step: 0, op: stream })
}

/// Times `forward` and the backward from a fixed random upstream gradient.
fn step(forward: impl Fn() -> Result<Tensor> + 'static) -> Result<Step> {
    let y = forward()?;
    let dy = random(y.device(), y.shape(), 99)?;
    Ok(Box::new(move || forward()?.backward_with(&dy).map(drop)))
}

fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    for (name, make) in rows() {
        c.bench_function(&name, |b| {
            let step = make(&device).expect(&name);
            b.iter(|| step().expect(&name));
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3));
    targets = bench
}
criterion_main!(benches);
