//! Every op, forward + backward through the tape, on the CPU: `cargo bench --bench ops [-- FILTER]`.
//!
//! The rows are those of `benches/peers/torch_bench.py`, under the same names, so that both can be run one after the
//! other on one machine. A row is a name and a function that makes its inputs and returns what is to be timed; add
//! rows to the list of your op, or a list to [`rows`].

use attn2d::ops::{Conv2d, conv2d, linear};
use attn2d::tensor::philox::Philox;
use attn2d::{Device, Result, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};

/// What is timed: one forward and one backward.
type Step = Box<dyn Fn() -> Result<()>>;
type Row = (String, Box<dyn Fn(&Device) -> Result<Step>>);

fn rows() -> Vec<Row> {
    [conv2d_rows(), linear_rows()].into_iter().flatten().collect()
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

criterion_group!(benches, bench);
criterion_main!(benches);
