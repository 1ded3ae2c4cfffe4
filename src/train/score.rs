//! `attn2d eval`: scores a checkpoint on its own held-out images or on other ones.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::checkpoint::{self, State};
use super::evaluate::{self, Evaluator, LossOptions, PartMetrics};
use super::images;
use super::progress::Progress;
use super::run_dir;
use super::session::open_device;
use crate::config::Config;
use crate::data::{Dataset, Part, Split};
use crate::io::{paths, safetensors, write_json};
use crate::models::{Load, Model, Spec};
use crate::{Device, Error, Result};

/// What to score, and on what.
#[derive(Debug, Clone)]
pub struct Score {
    /// The checkpoint directory, or a run directory, which stands for its `best/`.
    pub checkpoint: PathBuf,
    /// The config of that checkpoint ([`Score::read_config`]), with the data, device and batch size to use.
    pub config: Config,
    /// The weights of the last step also where the checkpoint has an average of them.
    pub raw_weights: bool,
    /// The part to score: `train`, `val`, `test`, `id_test` or `all`. `None` takes `test` of the data that the model was trained on (`val`
    /// where there is none, or where the run sealed it), and all images of other data.
    pub part: Option<String>,
    /// Where results go; `None` for a folder below `eval/` in the run directory: named after the data set and what is not as in
    /// `eval --checkpoint RUN` (`-last`, `-raw`, `-f16`, `-cuda-0`), and numbered where one of that name has results of other data.
    pub output: Option<PathBuf>,
}

/// What users of a checkpoint with averaged weights are told.
pub(super) const AVERAGED: &str =
    "          the moving average of the weights; --raw-weights takes those of the last step";

/// What the results in a folder are of, beside the part.
const SUBJECT: &str = "eval.json";

/// The scores of a checkpoint.
#[derive(Debug, Clone)]
pub struct Scored {
    /// Where predictions and pictures were written.
    pub dir: PathBuf,
    /// The metrics.
    pub metrics: PartMetrics,
}

/// The checkpoint behind what a user gave, after undoing a save that was cut short.
pub(super) fn find(given: &Path) -> Result<PathBuf> {
    let best = given.join(checkpoint::BEST);
    let candidates =
        if given.join(checkpoint::CONFIG).exists() && !given.join(checkpoint::STATE).exists() {
            [best.clone(), given.join(checkpoint::LAST)]
        } else {
            [given.to_path_buf(), best]
        };
    for dir in &candidates {
        if checkpoint::recover(dir)? && dir.join(checkpoint::STATE).exists() {
            return Ok(dir.clone());
        }
    }
    Err(Error::usage(format!(
        "{}: no checkpoint here; give RUN_DIR/best, RUN_DIR/last or RUN_DIR",
        given.display()
    )))
}

impl Score {
    /// The config that the checkpoint at `given` was made under.
    ///
    /// Errors: `Usage` where there is no checkpoint, else those of reading the file.
    pub fn read_config(given: &Path) -> Result<Config> {
        Config::load(&find(given)?.join(checkpoint::CONFIG))
    }

    /// Scores the checkpoint and writes `predictions_<part>.csv`, `confusion_<part>.svg` and `metrics_<part>.json`, and what they are
    /// of as `eval.json`.
    ///
    /// Errors: `Usage` for data whose classes the model does not know, a part that is empty, or the run's own data where `split.csv` does
    /// not tell their parts; `File` where the weights do not fit; those of data, device and files.
    pub fn run(&self, progress: Progress) -> Result<Scored> {
        let checkpoint = find(&self.checkpoint)?;
        let state = State::load(&checkpoint)?;
        let config = &self.config;
        config.check()?;
        if let Some(output) = &self.output {
            paths::check_output_folder("--output", output)?;
        }
        let spec: Spec = state.model.parse()?;
        let device = open_device(&config.train.device, config.train.precision)?;
        let dataset = Arc::new(images::open(config)?);
        let label_of = class_map(&dataset, &state.classes)?;
        let run = run_dir::of(&checkpoint);
        let trained = Config::load(&checkpoint.join(checkpoint::CONFIG))?;
        let (part, items, note) = self.items(&dataset, &run.join(run_dir::SPLIT), &trained)?;
        let size = (config.data.img_size, config.data.img_size);
        let model = Model::build(&spec, state.classes.len(), size, &device, config.train.seed)?;
        let weights = checkpoint::weights(&checkpoint, self.raw_weights)?;
        model.load(&safetensors::read(&weights)?, Load::Exact)?;
        let loader = images::eval_loader(config, &dataset, items, (state.mean, state.std))?;
        progress.line(&format!("model     {spec} from {}", weights.display()));
        if weights.ends_with(checkpoint::EMA) {
            progress.line(AVERAGED);
        }
        progress.line(&format!("data      {}: {} images ({part})", config.data.path, loader.len()));
        note.iter().for_each(|note| progress.line(&format!("          {note}")));
        progress.line(&format!("device    {}", device.name()));
        // Plain cross-entropy: weights and smoothing belong to training.
        let loss = LossOptions::default();
        let evaluator = Evaluator {
            model: &model,
            device: &device,
            precision: config.train.precision,
            loss: &loss,
            dataset: &dataset,
            progress,
        };
        let evaluation = evaluator.run(&part, &loader, |label| label_of[label as usize])?;
        let device = (device.name(), self.is_of(&trained, &device));
        let (name, subject) = self.subject(&checkpoint, &weights, &dataset.name, &trained, device);
        let dir = self.output.clone().unwrap_or_else(|| folder(&run.join("eval"), &name, &subject));
        std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        write_json(&dir.join(SUBJECT), &subject)?;
        let metrics = evaluation.write(&dir, &part, &dataset, &state.classes)?;
        write_json(&dir.join(format!("metrics_{part}.json")), &metrics)?;
        progress.line(&evaluate::table(std::slice::from_ref(&metrics)));
        progress.line(&format!("Predictions and confusion matrix are in {}/", dir.display()));
        Ok(Scored { dir, metrics })
    }

    /// Whether this is the device that the run was trained on, as far as this machine has it.
    fn is_of(&self, trained: &Config, device: &Device) -> bool {
        let was = &trained.train.device;
        *was == self.config.train.device
            || Device::new(was).is_ok_and(|d| d.name() == device.name())
    }

    /// A name for the folder of results, and what they are of. `device`: its name, and whether it is the run's own.
    fn subject(
        &self,
        checkpoint: &Path,
        weights: &Path,
        data: &str,
        trained: &Config,
        (device, own): (&str, bool),
    ) -> (String, Value) {
        let precision = self.config.train.precision;
        let raw = checkpoint.join(checkpoint::EMA).exists() && !weights.ends_with(checkpoint::EMA);
        let mut name = run_dir::file_name(data);
        for (differs, how) in [
            (checkpoint.ends_with(checkpoint::LAST), checkpoint::LAST),
            (raw, "raw"),
            (precision != trained.train.precision, precision.dtype().suffix()),
            (!own, &run_dir::file_name(device)),
        ] {
            if differs {
                name += &format!("-{how}");
            }
        }
        let file_name = |path: &Path| path.file_name().map(|n| n.to_string_lossy().into_owned());
        let subject = json!({
            "checkpoint": file_name(checkpoint),
            "weights": file_name(weights),
            "precision": precision.dtype().suffix(),
            "device": device,
            "data": place(&self.config.data.path).to_string_lossy(),
        });
        (name, subject)
    }

    /// Name and items of the part to score, and what is to be said of them.
    ///
    /// The run's own split decides wherever it knows the data, under whatever path they are given, so that images that the
    /// model was trained on are not scored by mistake. Of the run's own data it must know the parts, unless all are asked for.
    fn items(
        &self,
        dataset: &Dataset,
        file: &Path,
        trained: &Config,
    ) -> Result<(String, Vec<usize>, Option<String>)> {
        let all = |note| ("all".to_owned(), (0..dataset.len()).collect(), note);
        if self.part.as_deref() == Some("all") {
            return Ok(all(None));
        }
        let (split, note) = match own_split(dataset, file) {
            Ok(split) => (Some(split), None),
            Err(why) if place(&self.config.data.path) == place(&trained.data.path) => {
                let message = format!(
                    "{why}; without it nobody knows which images the model was trained on: restore the file, or score every image by \
                     --split all"
                );
                return Err(Error::usage(message));
            }
            Err(why) => (None, Some(why)),
        };
        let (split, asked) = match (split, self.part.as_deref()) {
            (None, None) => {
                return Ok(all(note.map(|why| format!("all images, for {why}"))));
            }
            (Some(split), None) => {
                let sealed = self.config.data.seal_test;
                let part = if sealed || split.test.is_empty() { Part::Val } else { Part::Test };
                (split, part.name())
            }
            (Some(split), Some(asked)) => (split, asked),
            (None, Some(asked)) => (images::split(&self.config, dataset)?, asked),
        };
        let Some(part) = Part::ALL.into_iter().find(|part| part.name() == asked) else {
            let message = format!("--split {asked}: expected train, val, test, id_test or all");
            return Err(Error::usage(message));
        };
        let items = split.part(part).to_vec();
        if items.is_empty() {
            return Err(Error::usage(format!(
                "--split {asked}: {} has no images in that part",
                dataset.name
            )));
        }
        let note = note.map(|why| format!("split anew, for {why}"));
        Ok((asked.to_owned(), items, note))
    }
}

/// The run's split of these data, or why there is none.
fn own_split(dataset: &Dataset, file: &Path) -> Result<Split, String> {
    if !file.exists() {
        return Err(format!("{} is missing", file.display()));
    }
    let split = Split::read(dataset, file).map_err(|e| e.to_string())?;
    match Part::ALL.into_iter().all(|part| split.part(part).is_empty()) {
        true => Err(format!("{} lists no images", file.display())),
        false => Ok(split),
    }
}

/// Where data lie: one data set may be given by several paths, and several may have one name.
fn place(data: &str) -> PathBuf {
    Path::new(data).canonicalize().unwrap_or_else(|_| data.into())
}

/// The folder of that name which has results of this subject already, or else the first that is not there yet.
fn folder(parent: &Path, name: &str, subject: &Value) -> PathBuf {
    let of = |dir: &Path| -> Option<Value> {
        serde_json::from_str(&std::fs::read_to_string(dir.join(SUBJECT)).ok()?).ok()
    };
    run_dir::numbered(parent, name, |dir| !dir.exists() || of(dir).as_ref() == Some(subject))
}

/// For each class of the data, its number in the model, by name.
fn class_map(dataset: &Dataset, known: &[String]) -> Result<Vec<u32>> {
    let number = |class: &String| {
        known.iter().position(|k| k == class).map(|i| i as u32).ok_or_else(|| {
            Error::usage(format!(
                "{}: class {class:?} is none of the model's ({}); rename the classes of the data",
                dataset.name,
                known.join(", ")
            ))
        })
    };
    dataset.classes.iter().map(number).collect()
}
