//! A training step of whole models on the CPU: forward, loss, backward, SGD with momentum; random pictures of 1000 classes
//! that are on the device already. `cargo bench --bench step [-- FILTER]`.
//!
//! The rows are those of `attn2d bench step` and of `benches/peers/torch_bench.py`, under the same names. With
//! `ATTN2D_PROFILE=1` each row also prints how long the kernels of one step took, by entry point, and how much of the step was
//! spent in none of them.

use attn2d::bench::{Calls, Row, Size, prepare, rows};
use attn2d::{DType, Device, Result};
use criterion::{Criterion, criterion_group, criterion_main};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Prints where the time of a step goes, from the sum over a few steps.
fn print_profile(name: &str, calls: &Calls, device: &Device) -> Result<()> {
    const STEPS: usize = 5;
    device.set_profiling(true)?;
    let start = Instant::now();
    for _ in 0..STEPS {
        (calls.whole)()?;
    }
    let whole = start.elapsed().as_secs_f64();
    let (mut by_kernel, mut inside) = (BTreeMap::<_, (usize, f64)>::new(), 0.0);
    for time in device.take_profile()? {
        let entry = by_kernel.entry(time.entry).or_default();
        *entry = (entry.0 + 1, entry.1 + time.seconds);
        inside += time.seconds;
    }
    device.set_profiling(false)?;
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

fn bench(c: &mut Criterion) {
    let device = Device::cpu();
    let profile = std::env::var_os("ATTN2D_PROFILE").is_some();
    let ready = |row: &Row| prepare(row, &device, DType::F32).expect(&row.name);
    for row in rows(&["step".into()], Size::Small, "").expect("the suite has rows") {
        c.bench_function(&row.name, |b| {
            let calls = ready(&row);
            b.iter(|| (calls.whole)().expect(&row.name));
        });
        if profile {
            print_profile(&row.name, &ready(&row), &device).expect(&row.name);
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
