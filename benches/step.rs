//! A training step of whole models on the CPU: forward, loss, backward, SGD with momentum; random pictures of 1000 classes
//! that are on the device already. `cargo bench --bench step [-- FILTER]`.
//!
//! The rows are those of `benches/peers/torch_bench.py`, under the same names. With `ATTN2D_PROFILE=1` each row also prints
//! how long the kernels of one step took, by entry point, and how much of the step was spent in none of them.

use attn2d::models::Model;
use attn2d::nn::Mode;
use attn2d::ops::{CrossEntropy, Sgd, class_labels, cross_entropy, sgd_step};
use attn2d::tensor::philox::Philox;
use attn2d::{Device, Result, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Name, model string, image size, batch.
const ROWS: [(&str, &str, usize, usize); 6] = [
    ("resnet18_step_64_b32", "resnet18", 64, 32),
    ("resnet18_step_224_b8", "resnet18", 224, 8),
    ("resnet18_ga_step_64_b32", "resnet18+ga@3,4", 64, 32),
    ("resnet18_ga_step_224_b8", "resnet18+ga@3,4", 224, 8),
    ("resnet18_la7_step_64_b32", "resnet18+ela7@3,4:border=zero", 64, 32),
    ("resnet18_la7_step_224_b8", "resnet18+ela7@3,4:border=zero", 224, 8),
];
const CLASSES: usize = 1000;

/// A model in training.
struct Training {
    model: Model,
    images: Tensor,
    labels: Tensor,
    momentum: Tensor,
}

impl Training {
    fn new(device: &Device, model: &str, size: usize, batch: usize) -> Result<Self> {
        let model = Model::build(&model.parse()?, CLASSES, (size, size), device, 0)?;
        let shape = [batch, size, size, 3];
        let images = Tensor::randn(device, &shape, Philox { seed: 1, step: 0, op: 0 })?;
        let labels: Vec<u32> = (0..batch).map(|i| (i * 37 % CLASSES) as u32).collect();
        let labels = class_labels(device, &labels, CLASSES)?;
        let momentum = Tensor::zeros(device, model.parameters().values().shape())?;
        Ok(Self { model, images, labels, momentum })
    }

    fn step(&self) -> Result<f32> {
        let work = || {
            let logits = self.model.forward(&self.images, &Mode::train(0, 1))?;
            let loss = cross_entropy(&logits, &self.labels, None, CrossEntropy::default())?;
            let parameters = self.model.parameters();
            parameters.gather(&loss.backward()?)?;
            let sgd = Sgd { lr: 0.01, momentum: 0.9, ..Sgd::default() };
            let (values, gradients) = (parameters.values(), parameters.gradients());
            sgd_step(values, gradients, &self.momentum, None, sgd)?;
            Ok(loss)
        };
        self.images.device().step(work)?.item()
    }

    /// Prints where the time of a step goes, from the sum over a few steps.
    fn print_profile(&self, name: &str, device: &Device) -> Result<()> {
        const STEPS: usize = 5;
        device.set_profiling(true)?;
        let start = Instant::now();
        for _ in 0..STEPS {
            self.step()?;
        }
        let whole = start.elapsed().as_secs_f64();
        device.set_profiling(false)?;
        let (mut by_kernel, mut inside) = (BTreeMap::<_, (usize, f64)>::new(), 0.0);
        for time in device.take_profile()? {
            let entry = by_kernel.entry(time.entry).or_default();
            *entry = (entry.0 + 1, entry.1 + time.seconds);
            inside += time.seconds;
        }
        let mut rows: Vec<_> = by_kernel.into_iter().collect();
        rows.push(("(no kernel)", (STEPS, whole - inside)));
        rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
        println!("\n| {name} | launches | ms a step | share |\n|---|---|---|---|");
        for (entry, (launches, seconds)) in rows {
            let (launches, ms) = (launches / STEPS, 1e3 * seconds / STEPS as f64);
            println!("| {entry} | {launches} | {ms:.2} | {:.1} % |", 100.0 * seconds / whole);
        }
        Ok(())
    }
}

fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let profile = std::env::var_os("ATTN2D_PROFILE").is_some();
    for (name, model, size, batch) in ROWS {
        c.bench_function(name, |b| {
            let training = Training::new(&device, model, size, batch).expect(name);
            b.iter(|| training.step().expect(name));
        });
        if profile {
            let training = Training::new(&device, model, size, batch).expect(name);
            training.print_profile(name, &device).expect(name);
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(2))
        .measurement_time(Duration::from_secs(6));
    targets = bench
}
criterion_main!(benches);
