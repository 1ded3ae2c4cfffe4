//! Whole runs of small models, through the program where that matters: kills, full disks, foreign checkpoints.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use attn2d::config::{Config, OptimName};
use attn2d::train::log::{StepRow, read_metrics};
use attn2d::train::{self, Progress};

/// A model and data that train an epoch in a second or so.
fn small(dir: &Path) -> Config {
    let mut config = Config::default();
    config.model.name = "resnet18:w8,stages=2,stem=small+ga@2:heads=2".into();
    config.data.synthetic_count = 120;
    config.data.img_size = 32;
    config.train.batch_size = 8;
    config.train.epochs = 3;
    config.train.device = "cpu".into();
    config.train.checkpoint_every = 4;
    config.output.dir = dir.display().to_string();
    config
}

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attn2d"));
    command.args(words).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(words: &[&str]) -> Output {
    command(words).output().expect("the program starts")
}

/// Both streams.
fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &error_of(output)
}

fn error_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Writes a config where the program can read it.
fn write(config: &Config) -> PathBuf {
    let path = PathBuf::from(format!("{}.toml", config.output.dir));
    fs::write(&path, config.to_toml()).expect("written");
    path
}

fn steps(run: &Path) -> Vec<StepRow> {
    let text = fs::read_to_string(run.join("steps.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Kills a run without warning as soon as it has made so many steps.
fn kill_after(run: &Path, mut child: Child, count: usize) {
    let start = Instant::now();
    while steps(run).len() < count {
        assert!(start.elapsed() < Duration::from_secs(120), "the run makes no steps");
        let ended = child.try_wait().expect("a child");
        assert!(ended.is_none(), "the run ended before it could be killed");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().expect("killed");
    child.wait().expect("gone");
}

#[test]
fn a_run_killed_and_resumed_ends_with_the_same_bits() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let (whole, killed) = (root.path().join("whole"), root.path().join("killed"));
    let file = write(&small(&whole));
    let output = run(&["train", "--config", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}", error_of(&output));
    let per_epoch = steps(&whole).len() / 3;
    assert!(per_epoch > 6, "epochs long enough to be killed in: {per_epoch}");

    let file = write(&small(&killed));
    let child = command(&["train", "--config", file.to_str().unwrap()]).spawn().expect("started");
    // Before the first checkpoint, in the second epoch, in the third.
    kill_after(&killed, child, 2);
    for at in [per_epoch + 2, 2 * per_epoch + 6] {
        let child =
            command(&["train", "--resume", killed.to_str().unwrap()]).spawn().expect("started");
        kill_after(&killed, child, at);
    }
    let output = run(&["train", "--resume", killed.to_str().unwrap()]);
    assert!(output.status.success(), "{}", error_of(&output));

    for name in [
        "last/model.safetensors",
        "last/optim.safetensors",
        "last/state.json",
        "best/model.safetensors",
        "metrics.csv",
        "split.csv",
        "predictions_val.csv",
        "predictions_test.csv",
    ] {
        let read = |dir: &Path| fs::read(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(read(&whole) == read(&killed), "{name} differs");
    }
    let losses =
        |dir| steps(dir).iter().map(|s| (s.step, s.epoch, s.loss, s.lr)).collect::<Vec<_>>();
    assert_eq!(losses(&whole), losses(&killed), "no step is missing, doubled or other");
    for name in [
        "curves.svg",
        "confusion_test.svg",
        "summary.json",
        "config.toml",
        "events.out.tfevents.attn2d",
    ] {
        assert!(killed.join(name).metadata().expect(name).len() > 0, "{name}");
    }
}

/// `--max-steps` evaluates in the middle of an epoch. Whoever goes on from there gets what a run gets that was never stopped.
#[test]
fn a_run_stopped_within_epochs_and_resumed_ends_with_the_same_bits() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let (whole, stopped) = (root.path().join("whole"), root.path().join("stopped"));
    let config = |dir: &Path, max_steps| {
        let mut config = small(dir);
        config.model.name = "resnet18:w8,stages=1,stem=small".into();
        config.data.img_size = 16;
        config.train.epochs = 2;
        config.train.max_steps = max_steps;
        config
    };
    train::run(&config(&whole, 0), Progress::Quiet).expect("a run");
    let per_epoch = steps(&whole).len() as u64 / 2;
    let rows = |dir: &Path| {
        let rows = read_metrics(&dir.join("metrics.csv")).expect("metrics");
        rows.iter().map(|row| (row.epoch, row.step)).collect::<Vec<_>>()
    };
    train::run(&config(&stopped, 3), Progress::Quiet).expect("its first steps");
    assert_eq!(rows(&stopped), [(1, 3)]);
    for (max_steps, expected) in [
        (3, vec![(1, 3)]), // nothing to do: what was written stands
        (per_epoch - 1, vec![(1, per_epoch - 1)]),
        (per_epoch + 2, vec![(1, per_epoch), (2, per_epoch + 2)]),
    ] {
        let summary = train::resume(&config(&stopped, max_steps), Progress::Quiet).expect("more");
        assert_eq!(rows(&stopped), expected);
        assert_eq!(summary.best_epoch, 1);
    }
    train::resume(&config(&stopped, 0), Progress::Quiet).expect("the rest");
    assert_eq!(rows(&stopped), [(1, per_epoch), (2, 2 * per_epoch)]);
    for name in ["metrics.csv", "last/state.json", "best/model.safetensors", "summary.json"] {
        let read = |dir: &Path| fs::read(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(read(&whole) == read(&stopped), "{name} differs");
    }
}

#[test]
fn a_run_does_not_go_back() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let dir = root.path().join("run");
    let mut config = small(&dir);
    config.model.name = "resnet18:w8,stages=1,stem=small".into();
    config.data.img_size = 16;
    config.train.epochs = 2;
    train::run(&config, Progress::Quiet).expect("a run");
    let per_epoch = steps(&dir).len() / 2;
    let resume = |words: &[&str]| {
        let output = run(&[&["train", "--resume", dir.to_str().unwrap()], words].concat());
        (output.status.code(), said(&output))
    };
    let read = |name: &str| fs::read(dir.join(name)).expect(name);
    let names = ["config.toml", "metrics.csv", "steps.jsonl", "last/state.json"];
    let before = names.map(read);
    for (words, why) in
        [(["--epochs", "1"], "--epochs 1: "), (["--max-steps", "3"], "--max-steps 3: ")]
    {
        let (code, said) = resume(&words);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(why) && said.contains("give as many or more"), "{said}");
        assert!(names.map(read) == before, "{words:?} leaves the run as it was");
    }
    let (code, said) = resume(&["--max-steps", &(2 * per_epoch + 1).to_string(), "--epochs", "3"]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = resume(&["--max-steps", "0", "--epochs", "2"]);
    assert!(code == Some(2) && said.contains("has begun epoch 3"), "{said}");

    // The first epoch's best is saved before its last: a kill in between leaves it alone. A later one's is not.
    fs::remove_dir_all(dir.join("last")).expect("removed");
    let state = fs::read_to_string(dir.join("best/state.json")).expect("a state");
    let mut state: serde_json::Value = serde_json::from_str(&state).expect("JSON");
    state["epoch"] = 2.into();
    fs::write(dir.join("best/state.json"), state.to_string()).expect("written");
    let (code, said) = resume(&[]);
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("best/ of a later epoch but no last/") && dir.join("best").exists(),
        "{said}"
    );
    state["epoch"] = 1.into();
    fs::write(dir.join("best/state.json"), state.to_string()).expect("written");
    let (code, said) = resume(&[]);
    assert!(code == Some(0) && said.contains("no last/ yet: the run begins again"), "{said}");
    assert_eq!(steps(&dir).len(), 2 * per_epoch + 1);
}

#[test]
fn the_loss_falls_and_eval_repeats_the_score() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let dir = root.path().join("run");
    let mut config = small(&dir);
    config.data.synthetic_count = 240;
    config.train.epochs = 6;
    config.optim.name = OptimName::Sgd;
    config.optim.lr = 0.05;
    let summary = train::run(&config, Progress::Quiet).expect("a run");
    let rows = read_metrics(&dir.join("metrics.csv")).expect("metrics");
    assert_eq!(rows.len(), 6);
    let (first, last) = (rows[0].train_loss, rows[5].train_loss);
    assert!(last < 0.9 * first, "from {first} to {last}");
    let test = summary.parts.iter().find(|p| p.part == "test").expect("a test part");

    let best = dir.join("best");
    let output = run(&["eval", "--checkpoint", best.to_str().unwrap(), "--device", "cpu"]);
    assert!(output.status.success(), "{}", error_of(&output));
    let results =
        fs::read_dir(dir.join("eval")).expect("results").next().expect("one").expect("one").path();
    let scored = fs::read_to_string(results.join("predictions_test.csv")).expect("predictions");
    assert_eq!(scored, fs::read_to_string(dir.join("predictions_test.csv")).expect("predictions"));
    assert_eq!(scored.lines().count(), test.images + 1);

    let other = [
        "eval",
        "--checkpoint",
        best.to_str().unwrap(),
        "--device",
        "cpu",
        "--data",
        "synthetic:longrange",
    ];
    let output = run(&other);
    assert_eq!(output.status.code(), Some(2), "classes of other data: {}", error_of(&output));
    assert!(error_of(&output).contains("is none of the model's"), "{}", error_of(&output));
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_and_names_the_step() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let dir = root.path().join("run");
    let mut config = small(&dir);
    config.optim.name = OptimName::Sgd;
    config.optim.lr = 1e20;
    config.sched.warmup_epochs = 0.0;
    let output = run(&["train", "--config", write(&config).to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", error_of(&output));
    let error = error_of(&output);
    assert!(error.contains("error: training: ") && error.contains("step"), "{error}");
    assert!(error.contains("--lr"), "says what to do: {error}");
}

#[cfg(unix)]
#[test]
fn a_full_disk_leaves_the_old_checkpoint() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let dir = root.path().join("run");
    let mut config = small(&dir);
    config.train.max_steps = 3;
    train::run(&config, Progress::Quiet).expect("a run");
    let before = fs::read(dir.join("last/model.safetensors")).expect("a checkpoint");
    // No file may grow beyond 32 KiB from here on, which is less than the model: every write past it fails, as on a
    // full disk.
    let program = env!("CARGO_BIN_EXE_attn2d");
    let line = format!(
        "trap '' XFSZ; ulimit -f 64; exec {program:?} train --resume {dir:?} --set train.max_steps=5"
    );
    let output = Command::new("sh").args(["-c", &line]).output().expect("sh");
    let error = error_of(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains(".new/model.safetensors: File too large"), "{error}");
    assert_eq!(error.lines().filter(|l| l.starts_with("error")).count(), 1, "{error}");
    assert!(fs::read(dir.join("last/model.safetensors")).expect("still there") == before);
    assert!(!dir.join("last.new").exists());
    let resumed = run(&["train", "--resume", dir.to_str().unwrap(), "--set", "train.max_steps=5"]);
    assert!(resumed.status.success(), "and with space it goes on: {}", error_of(&resumed));
}

#[test]
fn foreign_checkpoints_and_configs_are_refused() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let (a, b) = (root.path().join("a"), root.path().join("b"));
    let mut config = small(&a);
    config.train.max_steps = 1;
    train::run(&config, Progress::Quiet).expect("a run");
    let mut other = small(&b);
    other.train.max_steps = 1;
    other.model.name = "resnet18:w8,stages=2,stem=small".into();
    train::run(&other, Progress::Quiet).expect("a run");

    let output = run(&["train", "--config", write(&config).to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(error_of(&output).contains("holds a run already"), "{}", error_of(&output));

    let output = run(&["train", "--resume", a.to_str().unwrap(), "--lr", "0.5"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(error_of(&output).contains("optim.lr would change it"), "{}", error_of(&output));

    fs::copy(b.join("last/model.safetensors"), a.join("last/model.safetensors")).expect("swapped");
    let output = run(&["train", "--resume", a.to_str().unwrap(), "--set", "train.max_steps=2"]);
    assert_eq!(output.status.code(), Some(1));
    let error = error_of(&output);
    assert!(error.contains("last/model.safetensors: does not fit model"), "{error}");

    let whole = fs::read(b.join("last/optim.safetensors")).expect("read");
    fs::write(b.join("last/optim.safetensors"), &whole[..whole.len() / 2]).expect("cut");
    let output = run(&["train", "--resume", b.to_str().unwrap(), "--set", "train.max_steps=2"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(error_of(&output).contains("last/optim.safetensors: "), "{}", error_of(&output));
}

/// Twenty steps. By SGD: AdamW's first steps are signs, which make a whole step of a difference in the last bit of a gradient near
/// zero.
#[test]
fn a_gpu_has_the_losses_of_the_cpu() {
    let root = tempfile::tempdir().expect("a temporary directory");
    if let Err(error) = attn2d::Device::new("wgpu") {
        assert!(std::env::var_os("ATTN2D_REQUIRE_WGPU").is_none(), "{error}");
        eprintln!("skipped: {error}");
        return;
    }
    let losses = |device: &str| {
        let dir = root.path().join(device);
        let mut config = small(&dir);
        config.train.device = device.into();
        config.train.max_steps = 20;
        config.train.checkpoint_every = 0;
        config.optim.name = attn2d::config::OptimName::Sgd;
        config.optim.lr = 1e-4;
        train::run(&config, Progress::Quiet).expect(device);
        steps(&dir).iter().map(|s| s.loss).collect::<Vec<_>>()
    };
    let (cpu, wgpu) = (losses("cpu"), losses("wgpu"));
    assert_eq!((cpu.len(), wgpu.len()), (20, 20));
    for (step, (a, b)) in cpu.iter().zip(&wgpu).enumerate() {
        println!("step {:2}: {a:.7} {b:.7}", step + 1);
        assert!((a - b).abs() <= 1e-3 * a.abs(), "step {}: {a} on the CPU, {b} on wgpu", step + 1);
    }
}

/// The positive control: these pictures can only be told apart by relating distant places. Global attention in the second of
/// two stages does, the plain net of the same stages (which has more parameters) stays near chance.
#[test]
fn global_attention_solves_what_a_local_net_cannot() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let test_score = |model: &str| {
        let dir = root.path().join(model);
        let out = dir.to_str().expect("text");
        let words = ["train", "--data", "synthetic:longrange", "--device", "cpu", "--epochs", "15"];
        let output = run(&[&words[..], &["--model", model, "--output", out]].concat());
        assert!(output.status.success(), "{}", error_of(&output));
        let text = fs::read_to_string(dir.join("summary.json")).expect("a summary");
        let summary: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let parts = summary["parts"].as_array().expect("parts");
        let test = parts.iter().find(|p| p["part"] == "test").expect("a test part");
        test["balanced_accuracy"].as_f64().expect("a number")
    };
    let attention = test_score("resnet18:w16,stages=2+ga@2");
    assert!(attention > 0.9, "with attention: {attention}");
    let plain = test_score("resnet18:w16,stages=2");
    assert!((0.3..0.7).contains(&plain), "without attention: {plain}");
}
