//! Every op, forward + backward through the tape, on the CPU: `cargo bench --bench ops [-- FILTER]`.
//!
//! The rows are those of the suites `ops`, `attention-vs-conv` and `scaling` of `attn2d bench` (`src/bench/`) and of
//! `benches/peers/torch_bench.py`, under the same names; `benches/peers/compare.py` runs both, one row after the other.

use attn2d::bench::{Size, prepare, rows};
use attn2d::{DType, Device};
use criterion::{Criterion, criterion_group, criterion_main};
use std::time::Duration;

const SUITES: [&str; 3] = ["ops", "attention-vs-conv", "scaling"];

fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    for row in rows(&SUITES.map(String::from), Size::Small, "").expect("the suite has rows") {
        c.bench_function(&row.name, |b| {
            let calls = prepare(&row, &device, DType::F32).expect(&row.name);
            b.iter(|| (calls.whole)().expect(&row.name));
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
