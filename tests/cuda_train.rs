//! Training on the CUDA kernels: a small attention network, step by step beside the CPU.
#![cfg(feature = "cuda-emu")]

use attn2d::config::Config;
use attn2d::train::log::StepRow;
use std::path::Path;
use std::process::Command;

/// Losses of twenty steps on a device, through the program.
fn losses(dir: &Path, device: &str) -> Vec<f64> {
    let run = dir.join(device);
    let mut config = Config::default();
    config.model.name = "resnet18:w8,stem=small+la7@3,4:heads=2".into();
    config.data.synthetic_count = 60;
    config.data.img_size = 32;
    config.train.batch_size = 4;
    config.train.epochs = 10;
    config.train.max_steps = 20;
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

/// A network of eight channels over batches of four is chaotic: a difference in the last bit grows tenfold in two or three steps, on
/// any pair of devices. So the first six steps have to agree, and the rest only to stay finite.
#[test]
fn first_steps_agree_with_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let [cpu, cuda] = ["cpu", "cuda-emu"].map(|device| losses(dir.path(), device));
    assert_eq!((cpu.len(), cuda.len()), (20, 20));
    for (step, (a, b)) in cpu.iter().zip(&cuda).enumerate() {
        println!("step {:2}: {a:.7} {b:.7}", step + 1);
    }
    assert!(cuda.iter().all(|loss| loss.is_finite()));
    for (step, (a, b)) in cpu.iter().zip(&cuda).enumerate().take(6) {
        assert!((a - b).abs() < 1e-3 * a.abs(), "step {}: {a} on the CPU, {b} in CUDA", step + 1);
    }
}
