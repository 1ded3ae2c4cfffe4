//! Precision, clipping, averaged weights and freezing in whole runs of small models.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use attn2d::Device;
use attn2d::config::{Config, OptimName, Precision};
use attn2d::io::safetensors;
use attn2d::models::Model;
use attn2d::nn::StateArray;
use attn2d::train::log::StepRow;
use attn2d::train::{self, Progress, run_dir};

/// A model and data that train an epoch in a second or so.
fn small(dir: &Path) -> Config {
    let mut config = Config::default();
    config.model.name = "resnet18:w8,stages=2,stem=small+la3@2.1:heads=2".into();
    config.data.synthetic_count = 60;
    config.data.img_size = 16;
    config.train.batch_size = 4;
    config.train.epochs = 2;
    config.train.device = "cpu".into();
    config.output.dir = dir.display().to_string();
    config
}

fn steps(run: &Path) -> Vec<StepRow> {
    let text = fs::read_to_string(run.join("steps.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn arrays(file: impl AsRef<Path>) -> BTreeMap<String, StateArray> {
    safetensors::read(file).expect("weights").arrays
}

/// The model of a config as its run begins.
fn fresh(config: &Config) -> BTreeMap<String, StateArray> {
    let (spec, size) = (config.model.name.parse().unwrap(), config.data.img_size);
    let model = Model::build(&spec, 3, (size, size), &Device::cpu(), config.train.seed).unwrap();
    model.state().unwrap().arrays
}

fn program(words: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_attn2d")).args(words).output().expect("the program starts")
}

/// Goes on with a run through the program and kills it without warning after so many steps.
fn kill_at(run: &Path, count: usize) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_attn2d"))
        .args(["train", "--resume", run.to_str().unwrap(), "--max-steps", "0"])
        .stdout(Stdio::null())
        .spawn()
        .expect("the program starts");
    let start = Instant::now();
    while steps(run).len() < count {
        assert!(start.elapsed() < Duration::from_secs(120), "the run makes no steps");
        assert!(child.try_wait().expect("a child").is_none(), "it ended before it was killed");
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().expect("killed");
    child.wait().expect("gone");
}

/// f16 with a loss scale that overflows at first, clipping and averages: a run that is killed twice ends with the bits of one that
/// is not.
#[test]
fn a_killed_run_in_f16_with_everything_on_ends_with_the_same_bits() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let (whole, killed) = (root.path().join("whole"), root.path().join("killed"));
    let mut config = small(&whole);
    config.train.precision = Precision::F16;
    config.train.ema = 0.9;
    config.optim.clip_grad = 1.0;
    config.train.checkpoint_every = 3;
    config.train.max_steps = 1;
    train::run(&config, Progress::Quiet).expect("the first step");
    // A scale that is far too large, as after thousands of good steps.
    let state = whole.join("last/state.json");
    let text = fs::read_to_string(&state).expect("a state");
    assert!(text.contains("\"exponent\": 16"), "{text}");
    fs::write(&state, text.replace("\"exponent\": 16", "\"exponent\": 28")).expect("written");
    let copied =
        Command::new("cp").args(["-r".as_ref(), whole.as_os_str(), killed.as_os_str()]).status();
    assert!(copied.expect("cp").success());

    let mut config = run_dir::read_config(&whole).expect("its config");
    config.train.max_steps = 0;
    train::resume(&config, Progress::Quiet).expect("the rest");
    kill_at(&killed, 5);
    kill_at(&killed, 13);
    let mut config = run_dir::read_config(&killed).expect("its config");
    config.train.max_steps = 0;
    train::resume(&config, Progress::Quiet).expect("the rest");

    for name in ["model", "ema", "optim"].map(|name| format!("last/{name}.safetensors")) {
        let read = |dir: &Path| fs::read(dir.join(&name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(read(&whole) == read(&killed), "{name} differs");
    }
    let text = |dir: &Path, name| fs::read_to_string(dir.join(name)).expect(name);
    for name in ["last/state.json", "metrics.csv", "predictions_test.csv"] {
        assert_eq!(text(&whole, name), text(&killed, name), "{name}");
    }
    let rows = steps(&whole);
    assert_eq!(rows.len(), 20);
    let left_out = rows.iter().filter(|row| row.left_out).count();
    println!(
        "scales: {:?}",
        rows.iter().map(|row| row.loss_scale.unwrap().log2()).collect::<Vec<_>>()
    );
    assert!((1..15).contains(&left_out), "{left_out} steps were left out");
    for (row, next) in rows[1..].iter().zip(&rows[2..]) {
        let scale = row.loss_scale.expect("a scale");
        let halved = if row.left_out { scale / 2.0 } else { scale };
        assert_eq!(next.loss_scale, Some(halved), "after step {}", row.step);
        assert_eq!(row.grad_norm.is_none(), row.left_out, "step {}", row.step);
    }
    assert!(text(&whole, "last/state.json").contains(&format!("\"left_out\": {left_out}")));
}

/// Losses in 16 bits are near those in f32; a step's weights and their averages are f32.
#[test]
fn half_precision_trains_like_f32() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let losses = |precision, name: &str| {
        let dir = root.path().join(name);
        let mut config = small(&dir);
        config.train.precision = precision;
        config.train.max_steps = 6;
        config.optim.name = OptimName::Sgd;
        config.optim.lr = 0.01;
        train::run(&config, Progress::Quiet).expect(name);
        steps(&dir).iter().map(|row| row.loss).collect::<Vec<_>>()
    };
    let exact = losses(Precision::F32, "f32");
    for (precision, name, allowed) in
        [(Precision::F16, "f16", 5e-3), (Precision::Bf16, "bf16", 4e-2)]
    {
        let half = losses(precision, name);
        println!("{name}: {half:.5?} for {exact:.5?}");
        assert_eq!(half.len(), 6);
        assert_ne!(half, exact);
        for (a, b) in half.iter().zip(&exact) {
            assert!((a - b).abs() < allowed * b, "{name}: {half:?} for {exact:?}");
        }
    }
}

/// A step of plain SGD whose gradients are clipped to a norm is a move of learning rate times norm.
#[test]
fn a_clipped_step_is_as_long_as_it_may_be() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let mut config = small(root.path());
    config.train.max_steps = 1;
    config.optim.name = OptimName::Sgd;
    (config.optim.momentum, config.optim.weight_decay) = (0.0, 0.0);
    config.optim.clip_grad = 0.125;
    config.sched.warmup_epochs = 0.0;
    config.optim.lr = 0.5;
    train::run(&config, Progress::Quiet).expect("a step");
    let row = &steps(root.path())[0];
    assert!(row.grad_norm.expect("a norm") > 0.125 && row.loss_scale.is_none(), "{row:?}");
    let (before, after) = (fresh(&config), arrays(root.path().join("last/model.safetensors")));
    let moved: f64 = before
        .iter()
        .filter(|(name, _)| !name.contains("running") && !name.ends_with("tracked"))
        .flat_map(|(name, a)| a.to_f32().into_iter().zip(after[name].to_f32()))
        .map(|(a, b)| f64::from(b - a).powi(2))
        .sum();
    assert!((moved.sqrt() - 0.5 * 0.125).abs() < 1e-5, "{} for 0.0625", moved.sqrt());
}

/// The average is the recurrence of timm's ModelEmaV2 over all weights and statistics; validation, `eval` and `predict` use it.
#[test]
fn averaged_weights_are_kept_and_used() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let mut config = small(root.path());
    config.train.ema = 0.75;
    config.train.max_steps = 1;
    train::run(&config, Progress::Quiet).expect("a step");
    let mut average: BTreeMap<String, Vec<f64>> = fresh(&config)
        .iter()
        .map(|(name, a)| (name.clone(), a.to_f32().into_iter().map(f64::from).collect()))
        .collect();
    for step in 1..=3 {
        if step > 1 {
            config.train.max_steps = step;
            train::resume(&config, Progress::Quiet).expect("a step");
        }
        let last = root.path().join("last");
        let (raw, got) =
            (arrays(last.join("model.safetensors")), arrays(last.join("ema.safetensors")));
        assert_eq!(raw.len(), got.len());
        for (name, average) in &mut average {
            let (raw, got) = (raw[name].to_f32(), got[name].to_f32());
            for ((average, raw), got) in average.iter_mut().zip(raw).zip(got) {
                *average = match name.ends_with("tracked") {
                    true => f64::from(raw),
                    false => 0.75 * *average + 0.25 * f64::from(raw),
                };
                let off = (*average - f64::from(got)).abs();
                assert!(off <= 1e-6 * average.abs().max(1e-2), "{name}: {got} for {average}");
            }
        }
    }
    // What the run says of its validation part is what the average says, and so does `eval` unless asked otherwise.
    let run = root.path().to_str().unwrap();
    let own = fs::read_to_string(root.path().join("predictions_val.csv")).expect("predictions");
    for (raw, out) in [(false, "a"), (true, "b")] {
        let out = root.path().join(out);
        let mut words =
            vec!["eval", "--checkpoint", run, "--split", "val", "--device", "cpu", "--output"];
        words.push(out.to_str().unwrap());
        if raw {
            words.push("--raw-weights");
        }
        let output = program(&words);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(said.contains("moving average of the weights; --raw-weights"), !raw, "{said}");
        let scored = fs::read_to_string(out.join("predictions_val.csv")).expect("predictions");
        assert_eq!(scored == own, !raw);
    }
}

/// What is frozen stays to the bit under both optimisers, also where weight decay spares nothing; the rest learns.
#[test]
fn frozen_weights_stay_and_pretrained_ones_are_taken() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let first = root.path().join("first");
    let mut config = small(&first);
    config.train.max_steps = 2;
    train::run(&config, Progress::Quiet).expect("a run");
    let file = first.join("last/model.safetensors");
    let before = arrays(&file);
    for (name, optimiser) in [("sgd", OptimName::Sgd), ("adamw", OptimName::Adamw)] {
        let dir = root.path().join(name);
        let mut config = small(&dir);
        config.model.pretrained = file.display().to_string();
        config.train.freeze = vec!["conv1".into(), "bn1".into(), "layer1.*".into()];
        config.train.max_steps = 3;
        config.train.ema = 0.5;
        config.optim.name = optimiser;
        config.optim.decay_norm_and_bias = true;
        config.optim.clip_grad = 1.0;
        train::run(&config, Progress::Quiet).expect(name);
        for weights in ["model", "ema"] {
            let after = arrays(dir.join(format!("last/{weights}.safetensors")));
            for (name, array) in &before {
                let frozen = !name.starts_with("layer2") && !name.starts_with("fc");
                assert_eq!(*array == after[name], frozen, "{weights} {name}");
            }
        }
        let moments = arrays(dir.join("last/optim.safetensors"));
        let still = |name: &str| moments[name].to_f32().iter().all(|x| *x == 0.0);
        let kind = if optimiser == OptimName::Sgd { "momentum" } else { "mean" };
        assert!(still(&format!("{kind}.layer1.0.conv1.weight")));
        assert!(!still(&format!("{kind}.layer2.0.conv1.weight")));
    }
}
