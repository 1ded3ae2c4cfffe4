//! Training on the CUDA kernels: small attention networks, step by step beside the CPU.
#![cfg(feature = "cuda-emu")]

use attn2d::config::{Config, OptimName, Precision};
use attn2d::train::log::StepRow;
use std::path::Path;
use std::process::Command;

/// Losses of a run on a device, through the program.
fn losses(dir: &Path, device: &str, mut config: Config) -> Vec<f64> {
    let run = dir.join(device);
    config.data.synthetic_count = 48;
    config.train.epochs = 10;
    config.train.device = device.into();
    config.output.dir = run.display().to_string();
    let file = dir.join(format!("{device}.toml"));
    std::fs::write(&file, config.to_toml()).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_attn2d"))
        .args(["train", "--config", file.to_str().unwrap()])
        // The parity tests run every schedule; here one is enough.
        .env("ATTN2D_EMU_SCHEDULE", "reverse")
        .output()
        .unwrap();
    assert!(output.status.success(), "{device}: {}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(run.join("steps.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str::<StepRow>(line).unwrap().loss).collect()
}

/// Losses on the CPU and in CUDA.
fn both(config: &Config) -> [Vec<f64>; 2] {
    let dir = tempfile::tempdir().unwrap();
    ["cpu", "cuda-emu"].map(|device| losses(dir.path(), device, config.clone()))
}

fn assert_equal(cpu: &[f64], cuda: &[f64], steps: usize) {
    assert_eq!((cpu.len(), cuda.len()), (steps, steps));
    for (step, (a, b)) in cpu.iter().zip(cuda).enumerate() {
        println!("step {:2}: {a:.7} {b:.7}", step + 1);
        assert!((a - b).abs() < 1e-3 * a.abs(), "step {}: {a} on the CPU, {b} in CUDA", step + 1);
    }
}

/// All four stages, attention in the last two. Where the last maps are one pixel, eight channels multiply a difference a
/// hundredfold a step at the learning rate of a training (wgpu and CUDA part from the CPU, and from each other, at the same pace),
/// and AdamW's first steps are signs; so the steps are small and few.
#[test]
fn first_steps_of_four_stages_agree_with_the_cpu() {
    let mut config = Config::default();
    config.model.name = "resnet18:w8,stem=small+la7@3,4:heads=2".into();
    config.train.batch_size = 8;
    config.data.img_size = 32;
    config.train.max_steps = 8;
    config.optim.name = OptimName::Sgd;
    config.optim.lr = 1e-5;
    let [cpu, cuda] = both(&config);
    assert_equal(&cpu, &cuda, 8);
}

/// Both 16-bit types with everything a step can have: scaled loss, clipping, averages. Losses are rounded to 11 and 8 bits a number,
/// on both devices in the same places.
#[test]
fn steps_in_half_precision_agree_with_the_cpu() {
    for (precision, allowed) in [(Precision::F16, 5e-3), (Precision::Bf16, 4e-2)] {
        let mut config = Config::default();
        config.model.name = "resnet18:w8,stages=2,stem=small+la3@2:heads=2".into();
        config.data.img_size = 16;
        config.train.batch_size = 4;
        config.train.max_steps = 5;
        config.train.precision = precision;
        config.train.ema = 0.9;
        config.optim.name = OptimName::Sgd;
        config.optim.lr = 0.01;
        config.optim.clip_grad = 1.0;
        let [cpu, cuda] = both(&config);
        assert_eq!((cpu.len(), cuda.len()), (5, 5));
        for (step, (a, b)) in cpu.iter().zip(&cuda).enumerate() {
            println!("{precision:?} step {}: {a:.6} {b:.6}", step + 1);
            assert!((a - b).abs() < allowed * a, "{precision:?} step {}: {a} and {b}", step + 1);
        }
    }
}

/// Two stages and small steps of SGD, which keep a difference small: twenty steps.
#[test]
fn twenty_steps_agree_with_the_cpu() {
    let mut config = Config::default();
    config.model.name = "resnet18:w8,stages=2,stem=small+la7@2:heads=2".into();
    config.data.img_size = 16;
    config.train.batch_size = 8;
    config.train.max_steps = 20;
    config.optim.name = OptimName::Sgd;
    config.optim.lr = 0.001;
    let [cpu, cuda] = both(&config);
    assert_equal(&cpu, &cuda, 20);
    // The steps are not so small that gradients would not matter: without them the losses are others.
    config.optim.lr = 1e-9;
    let dir = tempfile::tempdir().unwrap();
    let still = losses(dir.path(), "cpu", config);
    let moved = cpu.iter().zip(&still).map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max);
    println!("largest difference that the steps make: {moved:.4}");
    assert!(moved > 5e-3, "{cpu:?} with steps, {still:?} without");
}
