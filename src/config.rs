//! The configuration of a run: one TOML file whose dotted keys are also the names for `--set`.
//!
//! Later layers win: the defaults below, `--config FILE`, command line flags, `--set a.b=c`. A key that does not
//! exist is an error that names the nearest one. The result is written into the run directory as `config.toml`, from
//! which the run can be resumed or repeated. Every key has a default, so `attn2d train` alone is a whole run.
//!
//! The defaults are this project's choices for a quick first run; none of them is a value from the paper.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{DType, Result};

mod check;
mod layers;
pub use layers::{Layers, Setting, parse_file, parse_value};

/// Everything that decides a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Which images, how they are split and prepared.
    pub data: Data,
    /// Random changes to training images.
    pub augment: Augment,
    /// Which network.
    pub model: Model,
    /// How long, on what, with which random numbers.
    pub train: Train,
    /// The optimiser.
    pub optim: Optim,
    /// The learning rate over time.
    pub sched: Sched,
    /// Where results go.
    pub output: Output,
}

/// `[data]`: which images, how they are split and prepared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Data {
    /// A folder or file of images, or `synthetic:dermoscopy` / `synthetic:longrange`.
    pub path: String,
    /// The reader, or `auto` to recognise it from the path.
    pub format: String,
    /// Height and width in pixels that every image is brought to.
    pub img_size: usize,
    /// Share of the images for validation where the data set has no validation split of its own.
    pub val_fraction: f64,
    /// Share of the images for the test split where the data set has none of its own.
    pub test_fraction: f64,
    /// Seed of the split, apart from `train.seed` so that many seeds can be trained on one split.
    pub split_seed: u64,
    /// How pixel values are scaled for the network.
    pub normalize: Normalize,
    /// Threads that read and decode images.
    pub workers: usize,
    /// Leave out images that cannot be read (and count them) instead of stopping.
    pub skip_bad: bool,
    /// Weight of each class in the loss.
    pub class_weights: ClassWeights,
    /// Keep to the publishers' train, validation and test parts where there are any.
    pub official_split: bool,
    /// Leave out pictures that occur twice.
    pub dedup: bool,
    /// A domain (hospital, camera) to test on and never train on, or several between commas; empty for none.
    pub holdout_domain: String,
    /// A CSV as a run's `split.csv` to take the parts from, instead of splitting anew; empty for none.
    pub split_file: String,
    /// Never read a picture of the test parts; the run is scored on its validation part alone.
    pub seal_test: bool,
    /// Memory for decoded pictures between epochs, in MiB.
    pub cache_mib: usize,
    /// Built-in data: number of pictures.
    pub synthetic_count: usize,
    /// Built-in data: side of the pictures in pixels before they are brought to `img_size`.
    pub synthetic_size: usize,
    /// Built-in data: seed of the pictures.
    pub synthetic_seed: u64,
}

/// `[augment]`: random changes to training images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Augment {
    /// Which changes.
    pub policy: Policy,
    /// The changes of `policy = "custom"`.
    pub custom: crate::data::Augment,
}

/// Which random changes training images get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Those that keep the data set's labels true, as its reader knows them.
    Auto,
    /// Mirroring and quarter turns.
    Flips,
    /// No change at all.
    None,
    /// Those of `[augment.custom]`.
    Custom,
}

/// How pixel values are scaled for the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Normalize {
    /// ImageNet's mean and standard deviation, as pretrained weights expect.
    Imagenet,
    /// Mean and standard deviation of the training split.
    Data,
    /// Values in 0..=1 as they are.
    None,
}

/// Weight of each class in the loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ClassWeights {
    /// All ones.
    None,
    /// `images / (classes * images of the class)`, counted on the training split.
    Balanced,
}

/// `[model]`: which network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Model {
    /// A model string such as `resnet18`, `resnet18+la7@3,4` or `resnet18+ga@4:append`.
    pub name: String,
    /// Number of classes; 0 takes it from the data.
    pub num_classes: usize,
    /// A safetensors file with torchvision's names to start from; empty starts from random weights.
    pub pretrained: String,
    /// Leave the classifier of the pretrained file out (it has other classes).
    pub drop_head: bool,
}

/// `[train]`: how long, on what, with which random numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Train {
    /// Passes over the training split.
    pub epochs: usize,
    /// Images in one optimiser step.
    pub batch_size: usize,
    /// Seed of the weights, the order of images, augmentation and dropout.
    pub seed: u64,
    /// `auto`, `cpu`, `wgpu`, `wgpu:1`, `wgpu:nvidia`, `cuda:0`.
    pub device: String,
    /// On a CUDA device, send each step as one graph. The results are the same to the bit.
    pub graph: bool,
    /// Probability mass that the loss spreads evenly over all classes.
    pub label_smoothing: f64,
    /// Stop after this many optimiser steps; 0 runs all epochs.
    pub max_steps: u64,
    /// Also save `last/` every so many steps inside an epoch; 0 saves at the end of each epoch only.
    pub checkpoint_every: u64,
    /// How activations are stored. Weights, their gradients, statistics and the loss are f32 whatever it is.
    pub precision: Precision,
    /// Decay of a moving average of the weights, which is then what is validated and kept as the best; 0 for none.
    pub ema: f64,
    /// Parameters that are not trained: patterns of their names such as `layer1.*`, or `backbone` for all but the classifier.
    pub freeze: Vec<String>,
}

/// How the activations of a run are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Single precision.
    #[default]
    F32,
    /// Half precision: 11 significant bits, at most 65,504; training scales the loss so that small gradients do not vanish.
    F16,
    /// bfloat16: 8 significant bits, the range of f32.
    Bf16,
}

impl Precision {
    /// The tensors' type.
    pub const fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// `[optim]`: the optimiser.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Optim {
    /// `sgd` or `adamw`.
    pub name: OptimName,
    /// Peak learning rate.
    pub lr: f64,
    /// Momentum of SGD.
    pub momentum: f64,
    /// SGD looks ahead along the momentum.
    pub nesterov: bool,
    /// Decay rates of AdamW's two averages.
    pub betas: [f64; 2],
    /// AdamW's small term under the fraction.
    pub eps: f64,
    /// Weight decay: added to the gradient by SGD, decoupled in AdamW.
    pub weight_decay: f64,
    /// Decay biases and norm parameters too; timm and this default leave one-dimensional parameters out.
    pub decay_norm_and_bias: bool,
    /// Largest norm of all gradients together; longer ones are scaled down to it. 0 for no limit.
    pub clip_grad: f64,
}

/// The optimisers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OptimName {
    /// Stochastic gradient descent with momentum.
    Sgd,
    /// Adam with decoupled weight decay.
    Adamw,
}

/// `[sched]`: the learning rate over time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sched {
    /// `cosine`, `step` or `constant`.
    pub name: SchedName,
    /// Epochs of linear warm-up from near zero; may be a fraction.
    pub warmup_epochs: f64,
    /// The learning rate that `cosine` ends at, and below which `step` does not go.
    pub min_lr: f64,
    /// `step`: epochs between two drops.
    pub decay_epochs: f64,
    /// `step`: factor of each drop.
    pub decay_rate: f64,
}

/// The schedules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SchedName {
    /// Half a cosine from the peak to `min_lr`.
    Cosine,
    /// A drop by `decay_rate` every `decay_epochs`.
    Step,
    /// The peak all the time.
    Constant,
}

/// `[output]`: where results go.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Output {
    /// The run directory; empty makes a new one below `runs/`, named after model and data.
    pub dir: String,
}

impl Default for Data {
    fn default() -> Self {
        Self {
            path: "synthetic:dermoscopy".into(),
            format: "auto".into(),
            img_size: 64,
            val_fraction: 0.15,
            test_fraction: 0.15,
            split_seed: 0,
            normalize: Normalize::Imagenet,
            workers: 2,
            skip_bad: false,
            class_weights: ClassWeights::None,
            official_split: true,
            dedup: true,
            holdout_domain: String::new(),
            split_file: String::new(),
            seal_test: false,
            cache_mib: 1024,
            synthetic_count: 1200,
            synthetic_size: 64,
            synthetic_seed: 0,
        }
    }
}

impl Default for Augment {
    fn default() -> Self {
        Self { policy: Policy::Auto, custom: crate::data::Augment::default() }
    }
}

impl Default for Model {
    fn default() -> Self {
        Self {
            name: "resnet18+ga@4".into(),
            num_classes: 0,
            pretrained: String::new(),
            drop_head: false,
        }
    }
}

impl Default for Train {
    fn default() -> Self {
        Self {
            epochs: 5,
            batch_size: 32,
            seed: 0,
            device: "auto".into(),
            graph: true,
            label_smoothing: 0.0,
            max_steps: 0,
            checkpoint_every: 0,
            precision: Precision::F32,
            ema: 0.0,
            freeze: Vec::new(),
        }
    }
}

impl Default for Optim {
    fn default() -> Self {
        Self {
            name: OptimName::Adamw,
            lr: 1e-3,
            momentum: 0.9,
            nesterov: false,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.02,
            decay_norm_and_bias: false,
            clip_grad: 0.0,
        }
    }
}

impl Default for Sched {
    fn default() -> Self {
        Self {
            name: SchedName::Cosine,
            warmup_epochs: 0.5,
            min_lr: 0.0,
            decay_epochs: 30.0,
            decay_rate: 0.1,
        }
    }
}

/// Keys that a resumed run may change: they decide where and how long, not what is learnt up to a given step (a longer
/// run does stretch a cosine from there on).
pub const MAY_CHANGE_ON_RESUME: [&str; 9] = [
    "train.epochs",
    "train.max_steps",
    "train.device",
    "train.graph",
    "train.checkpoint_every",
    "data.path",
    "data.workers",
    "data.cache_mib",
    "output.dir",
];

/// Keys that say where a run's work is done and where its files lie.
const PLACES: [&str; 7] = [
    "train.device",
    "train.graph",
    "train.checkpoint_every",
    "data.workers",
    "data.cache_mib",
    "data.split_file",
    "output.dir",
];

/// Keys that the first runs did not have.
const ADDED_LATER: [&str; 6] = [
    "train.precision",
    "train.ema",
    "train.freeze",
    "optim.clip_grad",
    "data.split_file",
    "data.seal_test",
];

impl Config {
    /// Reads a config file over the defaults. Errors (exit code 2) name file and line.
    pub fn load(path: &Path) -> Result<Self> {
        let mut layers = Layers::new();
        layers.file(path)?;
        layers.finish()
    }

    /// The config as TOML text, every key written out.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a plain struct of numbers and strings is always valid TOML")
    }

    /// SHA-256 in hex over everything that a resumed run must share with its beginning.
    pub fn fingerprint(&self) -> String {
        self.digest(&MAY_CHANGE_ON_RESUME)
    }

    /// SHA-256 in hex over everything that a run's results depend on: all but where it runs and where its files lie.
    pub fn identity(&self) -> String {
        self.digest(&PLACES)
    }

    /// SHA-256 in hex over all keys but these.
    fn digest(&self, without: &[&str]) -> String {
        let mut table = layers::table_of(self);
        without.iter().for_each(|key| layers::remove(&mut table, key));
        // Runs that were begun before these keys existed go on with them at their defaults.
        let default = layers::table_of(&Self::default());
        for key in ADDED_LATER {
            if layers::get(&table, key) == layers::get(&default, key) {
                layers::remove(&mut table, key);
            }
        }
        let text = toml::to_string(&table).expect("a table taken from a config is valid TOML");
        Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The keys in which two configs differ, leaving out those that a resumed run may change.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let (a, b) = (layers::table_of(self), layers::table_of(other));
        let differ = |key: &String| layers::get(&a, key) != layers::get(&b, key);
        let fixed = |key: &String| !MAY_CHANGE_ON_RESUME.contains(&key.as_str());
        layers::keys(&a).into_iter().filter(fixed).filter(differ).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_survives_its_own_text() {
        let mut config = Config::default();
        config.optim.lr = 0.1;
        config.data.class_weights = ClassWeights::Balanced;
        let back: Config = toml::from_str(&config.to_toml()).expect("own text parses");
        assert_eq!(back, config);
        assert!(config.to_toml().contains("lr = 0.1\n"), "{}", config.to_toml());
    }

    #[test]
    fn the_commented_default_file_is_the_default() {
        let text = include_str!("../configs/default.toml");
        let table: toml::Table = text.parse().expect("configs/default.toml parses");
        assert_eq!(
            layers::keys(&table),
            layers::keys(&layers::table_of(&Config::default())),
            "write every key out"
        );
        let config: Config = toml::from_str(text).expect("configs/default.toml is a config");
        assert_eq!(config, Config::default(), "with its default");
    }

    #[test]
    fn the_fingerprint_ignores_what_a_resumed_run_may_change() {
        let first = Config::default();
        let mut longer = first.clone();
        longer.train.epochs += 1;
        longer.output.dir = "elsewhere".into();
        assert_eq!(first.fingerprint(), longer.fingerprint());
        assert!(first.differences(&longer).is_empty());
        let mut other = first.clone();
        other.optim.lr *= 2.0;
        assert_ne!(first.fingerprint(), other.fingerprint());
        assert_eq!(first.differences(&other), ["optim.lr"]);
        assert_eq!(first.fingerprint().len(), 64);
    }
}
