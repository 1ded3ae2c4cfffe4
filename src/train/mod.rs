//! Training and evaluation: everything between data and a finished run directory.
//!
//! ```no_run
//! use attn2d::config::Config;
//! use attn2d::train::{self, Progress};
//!
//! # fn main() -> attn2d::Result<()> {
//! let mut config = Config::default(); // a ResNet18 with global attention on built-in pictures
//! config.train.epochs = 3;
//! let summary = train::run(&config, Progress::auto())?;
//! println!("{} is in {}", summary.parts[0].balanced_accuracy.unwrap_or(0.0), summary.dir.display());
//! # Ok(())
//! # }
//! ```
//!
//! A run directory holds `config.toml` (every key, resolved), `split.csv`, `metrics.csv` (a row an epoch), `steps.jsonl` (a line a
//! step), TensorBoard events, `curves.svg`, the checkpoints `last/` and `best/` ([`checkpoint`]), and at the end `summary.json`, `cost.json`,
//! `predictions_<part>.csv` and `confusion_<part>.svg` of the best checkpoint.
//!
//! A run that was killed goes on with [`resume`] from `last/` and, on the CPU, ends with the same bits as one that was not:
//! learning rate, order of images, augmentation and dropout are functions of seed, epoch and step; the rest is in the
//! checkpoint.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};

pub mod checkpoint;
pub mod cost;
mod ema;
pub mod evaluate;
pub mod events;
pub mod images;
pub mod log;
pub mod loss_scale;
pub mod metrics;
mod optim;
pub mod plots;
mod predict;
mod progress;
pub mod run_dir;
pub mod schedule;
mod score;
mod session;
mod trained;

pub use evaluate::PartMetrics;
pub use optim::Optimizer;
pub use predict::{Predict, Predicted};
pub use progress::{Progress, Work};
pub use score::{Score, Scored};
pub use trained::Trained;

use crate::config::{Config, Precision};
use crate::data::Format;
use crate::io::{paths, write_atomic, write_json};
use crate::{Error, Result};
use checkpoint::State;
use cost::Cost;
use images::Images;
use log::RunLog;
use session::{Parts, Session};

/// What a run reached, as its `summary.json` holds it: the same for every run of a config.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scores {
    /// The model string.
    pub model: String,
    /// Where the images came from.
    pub data: String,
    /// Learned numbers of the model.
    pub parameters: usize,
    /// Epoch (from 1) of the best checkpoint; none where no epoch was begun.
    pub best_epoch: Option<u64>,
    /// Metrics of the best checkpoint on the parts other than the training part.
    pub parts: Vec<PartMetrics>,
}

/// What came out of a run.
#[derive(Debug, Clone)]
pub struct Summary {
    /// The run directory.
    pub dir: PathBuf,
    /// Epochs that the run was to have.
    pub epochs: usize,
    /// Optimiser steps after which it was to stop; 0 for none.
    pub max_steps: u64,
    /// Epoch (from 1) of the best checkpoint.
    pub best_epoch: u64,
    /// Learned numbers of the model.
    pub parameters: usize,
    /// Metrics of the best checkpoint on the parts other than the training part.
    pub parts: Vec<PartMetrics>,
    /// Seconds that this call took.
    pub seconds: f64,
}

/// Trains a model as the config says, in a new run directory.
///
/// Errors: `Usage` for a config that no run can have or an output directory that holds a run; `Training` where the loss
/// stops being finite; those of data, device and files.
pub fn run(config: &Config, progress: Progress) -> Result<Summary> {
    let start = Instant::now();
    check_pretrained(config)?;
    check_split_file(config)?;
    if !config.output.dir.is_empty() {
        run_dir::check(Path::new(&config.output.dir))?;
    }
    let parts = Parts::new(config, None)?;
    parts.load_pretrained(config, progress)?;
    let dir = run_dir::create(config)?;
    let _lock = run_dir::take(&dir)?;
    begin(config, progress, &dir, parts, start)
}

/// Refuses weights that a run cannot begin with, before the data are looked at.
fn check_pretrained(config: &Config) -> Result<()> {
    let pretrained = &config.model.pretrained;
    if config.model.drop_head && pretrained.is_empty() {
        return Err(Error::usage(
            "--drop-head (model.drop_head) leaves out the classifier of a file of weights, but none is given; name one by \
             --pretrained, or leave --drop-head out",
        ));
    }
    if pretrained.is_empty() {
        return Ok(());
    }
    let expected = "a safetensors file of weights with torchvision's names";
    paths::check_input("--pretrained", Path::new(pretrained), expected)
}

/// Refuses a split file that is not there, before the data are looked at.
fn check_split_file(config: &Config) -> Result<()> {
    match config.data.split_file.as_str() {
        "" => Ok(()),
        file => {
            let expected = "a CSV with the columns split,id,label, such as the split.csv of a run";
            paths::check_input("data.split_file", Path::new(file), expected)
        }
    }
}

/// Goes on with the run in `config.output.dir`; `config` is that run's own ([`run_dir::read_config`]), changed at most in
/// [`crate::config::MAY_CHANGE_ON_RESUME`]. A run that has no checkpoint yet begins again.
///
/// Errors: as [`run`]; `Usage` where the config is another than the run's or ends before where the run stands, and where `last/` is lost.
pub fn resume(config: &Config, progress: Progress) -> Result<Summary> {
    let start = Instant::now();
    let dir = PathBuf::from(&config.output.dir);
    let changed = run_dir::read_config(&dir)?.differences(config);
    if !changed.is_empty() {
        return Err(Error::usage(format!(
            "--resume goes on with {} as it was begun, and {} would change it; start a new run with --config {}",
            dir.display(),
            changed.join(", "),
            dir.join(checkpoint::CONFIG).display()
        )));
    }
    let _lock = run_dir::take(&dir)?;
    let last = dir.join(checkpoint::LAST);
    checkpoint::recover(&dir.join(checkpoint::BEST))?;
    let resumable = checkpoint::recover(&last)?;
    if !resumable {
        check_pretrained(config)?;
        check_best_alone(&dir)?;
    }
    let split = dir.join(run_dir::SPLIT);
    let parts = Parts::new(config, split.exists().then_some(&*split))?;
    if !resumable {
        progress.line(&format!("no {}/ yet: the run begins again", checkpoint::LAST));
        parts.load_pretrained(config, progress)?;
        return begin(config, progress, &dir, parts, start);
    }
    let mut state = State::load(&last)?;
    let classes = &parts.images.dataset.classes;
    if state.config_sha256 != config.fingerprint() || state.classes != *classes {
        return Err(Error::file(
            last.join(checkpoint::STATE),
            "was written under another config or for other classes than this run has now; restore its config.toml and data",
        ));
    }
    check_length(config, &state, &dir)?;
    write_config(config, &dir)?;
    // A stop within an epoch left a row and perhaps a best of it. They stand as long as it goes no further.
    if session::goes_on(config, &state) {
        state.best = state.best.filter(|best| best.epoch <= state.epoch);
    }
    let epochs = state.epoch + u64::from(!session::goes_on(config, &state));
    let log = RunLog::resume(&dir, classes, state.step, epochs)?;
    introduce(config, progress, &dir, &parts);
    progress.line(&format!("resumed   after {} epochs and {} steps", state.epoch, state.step));
    let mut session = Session::new(config, progress, &dir, parts, log, state)?;
    session.restore(&last)?;
    finish(session, config, progress, &dir, start)
}

/// Refuses to begin a run again that has come further than its first epoch, whose best checkpoint is written before its last: only then
/// may the best stand alone, and is written again with the same bits.
fn check_best_alone(dir: &Path) -> Result<()> {
    let best = dir.join(checkpoint::BEST);
    if !best.join(checkpoint::STATE).exists() || State::load(&best)?.epoch <= 1 {
        return Ok(());
    }
    let (shown, last) = (dir.display(), checkpoint::LAST);
    Err(Error::usage(format!(
        "{shown} has {best}/ of a later epoch but no {last}/, which a run goes on from, and beginning again would write over it: restore \
         {last}/, or start a new run with --config {shown}/{config} --output ANOTHER",
        best = checkpoint::BEST,
        config = checkpoint::CONFIG,
    )))
}

/// Refuses an end that a run has already passed.
fn check_length(config: &Config, state: &State, dir: &Path) -> Result<()> {
    let (epochs, max_steps) = (config.train.epochs as u64, config.train.max_steps);
    let begun = state.epoch + u64::from(state.epoch_step > 0);
    let passed = match (epochs < begun, max_steps > 0 && max_steps < state.step) {
        (true, _) => format!("--epochs {epochs}: {} has begun epoch {begun}", dir.display()),
        (_, true) => format!("--max-steps {max_steps}: {} has done {}", dir.display(), state.step),
        _ => return Ok(()),
    };
    Err(Error::usage(format!("{passed}; give as many or more, or leave the option out")))
}

/// Writes the first files of a run and trains it from the beginning.
fn begin(
    config: &Config,
    progress: Progress,
    dir: &Path,
    parts: Parts,
    start: Instant,
) -> Result<Summary> {
    let dataset = &parts.images.dataset;
    parts.images.split.write(dataset, dir.join(run_dir::SPLIT))?;
    let log = RunLog::create(dir, &dataset.classes)?;
    let mut state = State::new(config, &dataset.classes);
    (state.mean, state.std) = parts.images.normalize;
    introduce(config, progress, dir, &parts);
    // Last of the first files: from now on the directory is a run that can be resumed.
    write_config(config, dir)?;
    let session = Session::new(config, progress, dir, parts, log, state)?;
    finish(session, config, progress, dir, start)
}

fn write_config(config: &Config, dir: &Path) -> Result<()> {
    write_atomic(&dir.join(checkpoint::CONFIG), config.to_toml().as_bytes())
}

fn introduce(config: &Config, progress: Progress, dir: &Path, parts: &Parts) {
    let dataset = &parts.images.dataset;
    let parameters = parts.model.parameters();
    let millions = |count: usize| count as f64 / 1e6;
    let mut model = format!(
        "model     {} ({:.2} M parameters",
        parts.model.spec(),
        millions(parameters.count())
    );
    if !config.train.freeze.is_empty() {
        let (patterns, left) = (config.train.freeze.join(", "), parameters.count_trained());
        model += &format!("; {patterns} frozen, {:.2} M trained", millions(left));
    }
    progress.line(&format!("{model})"));
    let built_in = dataset.format == Format::Synthetic;
    let hint = if built_in { " (built-in pictures; --data PATH takes yours)" } else { "" };
    progress.line(&format!("data      {}: {}{hint}", config.data.path, parts.images.describe()));
    say_split(config, progress, &parts.images);
    progress.line(&format!("classes   {}", dataset.classes.join(", ")));
    progress.line(&format!("device    {} ({})", parts.device.name(), parts.device.caps().adapter));
    let (train, clip) = (&config.train, config.optim.clip_grad);
    let options = [
        (train.precision != Precision::F32)
            .then(|| format!("activations in {}", train.precision.dtype().suffix())),
        (clip > 0.0).then(|| format!("gradients clipped to a norm of {clip}")),
        (train.ema > 0.0).then(|| {
            format!("validated and kept: the moving average of the weights ({})", train.ema)
        }),
    ];
    let options: Vec<String> = options.into_iter().flatten().collect();
    if !options.is_empty() {
        progress.line(&format!("training  {}", options.join("; ")));
    }
    progress.line(&format!("run       {} (stop with Ctrl-C, go on with --resume)", dir.display()));
}

/// Says where the parts come from if they were given, and which of them are never looked at.
fn say_split(config: &Config, progress: Progress, images: &Images) {
    if !config.data.split_file.is_empty() {
        progress.line(&format!("split     as in {}", config.data.split_file));
    }
    if config.data.seal_test {
        let sealed = images.split.test.len() + images.split.id_test.len();
        progress.line(&format!(
            "sealed    {sealed} test images: not read, and the run is scored on val alone"
        ));
    }
}

fn finish(
    mut session: Session,
    config: &Config,
    progress: Progress,
    dir: &Path,
    start: Instant,
) -> Result<Summary> {
    let earlier = Cost::read(dir)?;
    session.fit()?;
    let parts = session.score_best()?;
    let best = session.best();
    let scores = Scores {
        model: config.model.name.clone(),
        data: config.data.path.clone(),
        parameters: session.parameters(),
        best_epoch: best.map(|b| b.epoch),
        parts,
    };
    write_json(&dir.join(run_dir::SUMMARY), &scores)?;
    let seconds = start.elapsed().as_secs_f64();
    Cost::add(earlier, seconds, session.device(), dir)?;
    let summary = Summary {
        dir: dir.to_path_buf(),
        epochs: config.train.epochs,
        max_steps: config.train.max_steps,
        best_epoch: best.map_or(0, |b| b.epoch),
        parameters: session.parameters(),
        parts: scores.parts,
        seconds,
    };
    summary.print(progress);
    Ok(summary)
}

impl Scores {
    /// Those of the finished run in `dir`. Errors: `Io`; `File` for something that no run wrote.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(run_dir::SUMMARY);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        serde_json::from_str(&text).map_err(|e| Error::file(&path, e.to_string()))
    }
}

impl Summary {
    /// Says where the results lie and what one may do next.
    fn print(&self, progress: Progress) {
        let dir = self.dir.display();
        let program = std::env::args().next().unwrap_or_else(|| "attn2d".into());
        progress.line(&format!("\nDone in {:.0} s. Best epoch {}:", self.seconds, self.best_epoch));
        progress.line(&evaluate::table(&self.parts));
        progress.line(&format!("\nResults are in {dir}/"));
        progress.line("  curves.svg, confusion_*.svg   pictures");
        progress.line("  metrics.csv, summary.json     numbers");
        progress.line("  predictions_*.csv             every image");
        let averaged = self.dir.join(checkpoint::BEST).join(checkpoint::EMA).exists();
        let weights = match averaged {
            true => "  best/ema.safetensors          averaged weights, with torchvision's names",
            false => "  best/model.safetensors        weights, with torchvision's names",
        };
        progress.line(weights);
        progress.line("Next:");
        progress
            .line(&format!("  score other images   {program} eval --checkpoint {dir} --data PATH"));
        progress
            .line(&format!("  name other images    {program} predict --checkpoint {dir} PICTURES"));
        progress.line(&format!(
            "  take it elsewhere    {program} export --checkpoint {dir} --out model.safetensors"
        ));
        progress.line(&format!(
            "  train on             {program} train --resume {dir} --epochs {}{}",
            self.epochs + 5,
            if self.max_steps > 0 { " --max-steps 0" } else { "" }
        ));
        progress.line(&format!("  see the curves       tensorboard --logdir {dir}"));
    }
}
