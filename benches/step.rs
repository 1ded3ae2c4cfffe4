//! A training step of whole models on the CPU: forward, loss, backward, SGD with momentum; random pictures of 1000 classes
//! that are on the device already. `cargo bench --bench step [-- FILTER]`.
//!
//! The rows are those of `attn2d bench step` and of `benches/peers/torch_bench.py`, under the same names;
//! `attn2d bench step --profile` tells where the time goes.

use attn2d::bench::{Size, prepare, rows};
use attn2d::{DType, Device};
use criterion::{Criterion, criterion_group, criterion_main};
use std::time::Duration;

fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    for row in rows(&["step".into()], Size::Small, "").expect("the suite has rows") {
        c.bench_function(&row.name, |b| {
            let calls = prepare(&row, &device, DType::F32).expect(&row.name);
            b.iter(|| (calls.whole)().expect(&row.name));
        });
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
