//! The examples, run as their readers run them.

use std::path::PathBuf;
use std::process::Command;

/// What an example prints. `cargo test` builds the examples beside the folder of the tests.
#[track_caller]
fn run(name: &str, words: &[&str]) -> String {
    let test = std::env::current_exe().expect("this test's path");
    let profile = test.ancestors().nth(2).expect("target/PROFILE/deps/test");
    let program: PathBuf =
        profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    assert!(
        program.exists(),
        "{} is not built; run `cargo test` without --test, or `cargo build --examples` first",
        program.display()
    );
    let output = Command::new(&program).args(words).output().expect("the example starts");
    let (said, error) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name} {words:?}: {said}{error}");
    said.into_owned()
}

/// Whether there is a GPU to run on; where one is required, its absence fails.
fn wgpu() -> bool {
    match attn2d::Device::new("wgpu") {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("ATTN2D_REQUIRE_WGPU").is_none(), "{error}");
            println!("skipped: {error}");
            false
        }
    }
}

#[test]
fn fused_attention_agrees_with_plain_attention() {
    let mut runs: Vec<&[&str]> = vec![&["cpu", "9"], &["cpu", "14"], &["cpu", "13", "7"]];
    if wgpu() {
        runs.extend([&["wgpu", "7"][..], &["wgpu", "9", "5"]]);
    }
    for words in runs {
        let said = run("01_fused_attention", words);
        assert!(said.contains("fused and plain attention agree"), "{said}");
        assert!(said.contains(&format!("device   {}", words[0])), "{said}");
        let errors: Vec<f64> = said
            .lines()
            .filter_map(|l| l.strip_prefix("error")?.split_whitespace().nth(1)?.parse().ok())
            .collect();
        assert!(errors.len() >= 6 && errors.iter().all(|e| *e < 1e-4), "{said}");
    }
}

/// The losses that `02_train_a_net` prints, and its share of pictures told right.
fn losses(device: &str) -> (Vec<f64>, f64) {
    let said = run("02_train_a_net", &[device]);
    let after = |line: &str, word: &str| line.split_once(word)?.1.trim().parse::<f64>().ok();
    let losses = said.lines().filter_map(|l| after(l, "loss ")).collect();
    let last = said.lines().last().expect("a last line");
    let numbers: Vec<f64> = last.split_whitespace().filter_map(|w| w.parse().ok()).collect();
    (losses, numbers[0] / numbers[1])
}

#[test]
fn the_loss_of_a_net_of_your_own_falls() {
    let (cpu, right) = losses("cpu");
    assert_eq!(cpu.len(), 7);
    assert!(cpu[0] > 0.8 && cpu[6] < 0.3 * cpu[0], "{cpu:?}");
    assert!(right > 0.9, "{right}");
    if wgpu() {
        let (wgpu, _) = losses("wgpu");
        assert!((wgpu[0] - cpu[0]).abs() < 1e-4 && wgpu[6] < 0.3 * wgpu[0], "{wgpu:?}");
    }
}

#[test]
fn an_op_of_your_own_passes_on_every_device() {
    let gpu = wgpu();
    let said = run("03_your_own_op", &[]);
    let devices = if gpu { "passed: 8 cases on 2 devices" } else { "passed: 4 cases on 1 devices" };
    assert!(said.contains(devices), "{said}");
    assert_eq!(said.matches(" 4 ok, ").count(), if gpu { 2 } else { 1 }, "{said}");
    assert!(said.contains("y  = [-2.0000, -0.9242, 0.4898, 1.8103]"), "{said}");
}
