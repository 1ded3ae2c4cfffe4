//! `attn2d train`: timm's spellings, laid over a config file, laid over the defaults.

use std::path::PathBuf;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use toml::Value;

use crate::Result;
use crate::config::{
    ClassWeights, Config, Layers, OptimName, Policy, Precision, SchedName, Setting,
};
use crate::io::paths;
use crate::train::{self, Progress, run_dir};

const EXAMPLES: &str = "Examples:
  attn2d train
      a ResNet18 with global attention on built-in pictures; a first look that needs no download
  attn2d train --data path/to/images --model resnet18+la7@3,4 --img-size 96 --epochs 20
      your own images: ISIC 2017, PatchCamelyon, MedMNIST .npz, or a folder for each class
  attn2d train --data isic2017 --class-weights balanced --pretrained weights.safetensors --drop-head
      uneven classes, weights from torchvision
  attn2d train --resume runs/my-run
      go on where a run was stopped
  attn2d train --config configs/default.toml --set optim.betas=[0.9,0.99]
      every key of a run; `--set` reaches those without a flag";

/// Train a model and leave a run directory with checkpoints, metrics and pictures
#[derive(Debug, Default, Args)]
#[command(after_help = EXAMPLES, allow_negative_numbers = true, args_override_self = true)]
pub struct Options {
    /// Folder or file of images, or synthetic:dermoscopy, synthetic:longrange
    #[arg(long, visible_alias = "data-dir", value_name = "PATH", help_heading = "Data")]
    data: Option<String>,
    /// The reader, where it cannot be recognised: isic2017, pcam-kaggle, medmnist, imagefolder, ...
    #[arg(long, value_name = "NAME", help_heading = "Data")]
    data_format: Option<String>,
    /// Height and width in pixels that images are brought to
    #[arg(long, value_name = "N", help_heading = "Data")]
    img_size: Option<u32>,
    /// Share of images for validation, where the data has no validation part
    #[arg(long, value_name = "X", help_heading = "Data")]
    val_fraction: Option<f64>,
    /// Share of images for the final test, where the data has no test part
    #[arg(long, value_name = "X", help_heading = "Data")]
    test_fraction: Option<f64>,
    /// Weights of the classes in the loss
    #[arg(
        long,
        value_enum,
        value_name = "none|balanced",
        hide_possible_values = true,
        help_heading = "Data"
    )]
    class_weights: Option<ClassWeights>,
    /// Random changes to training images
    #[arg(
        long,
        value_enum,
        value_name = "auto|flips|none|custom",
        hide_possible_values = true,
        help_heading = "Data"
    )]
    augment: Option<Policy>,
    /// No random changes to training images
    #[arg(long, conflicts_with = "augment", help_heading = "Data")]
    no_aug: bool,
    /// Leave out images that cannot be read, and count them
    #[arg(long, help_heading = "Data")]
    skip_bad: bool,
    /// Threads that read and prepare images
    #[arg(short = 'j', long, value_name = "N", help_heading = "Data")]
    workers: Option<u32>,

    /// Model string, such as resnet18, resnet18+la7@3,4 or resnet18+ga@4:append
    #[arg(long, value_name = "MODEL", help_heading = "Model")]
    model: Option<String>,
    /// Number of classes; as many as the data has, if not given
    #[arg(long, value_name = "N", help_heading = "Model")]
    num_classes: Option<u32>,
    /// Safetensors file with torchvision's names to start from
    #[arg(long, value_name = "FILE", value_parser = not_empty(), help_heading = "Model")]
    pretrained: Option<String>,
    /// Leave out the classifier of that file, also where it has as many classes
    #[arg(long, help_heading = "Model")]
    drop_head: bool,
    /// Parameters that are not trained: names with * and ?, or backbone for all but the classifier
    #[arg(long, value_name = "GLOB,..", value_delimiter = ',', help_heading = "Model")]
    freeze: Vec<String>,

    /// Passes over the training images
    #[arg(long, value_name = "N", help_heading = "Training")]
    epochs: Option<u32>,
    /// Stop after this many optimiser steps
    #[arg(long, value_name = "N", help_heading = "Training")]
    max_steps: Option<u32>,
    /// Images in an optimiser step
    #[arg(short, long, value_name = "N", help_heading = "Training")]
    batch_size: Option<u32>,
    /// Optimiser
    #[arg(
        long,
        value_enum,
        value_name = "sgd|adamw",
        hide_possible_values = true,
        help_heading = "Training"
    )]
    opt: Option<OptimName>,
    /// Peak learning rate
    #[arg(long, value_name = "X", help_heading = "Training")]
    lr: Option<f64>,
    /// Weight decay
    #[arg(long, value_name = "X", help_heading = "Training")]
    weight_decay: Option<f64>,
    /// Momentum of sgd
    #[arg(long, value_name = "X", help_heading = "Training")]
    momentum: Option<f64>,
    /// Learning rate schedule
    #[arg(
        long,
        value_enum,
        value_name = "cosine|step|constant",
        hide_possible_values = true,
        help_heading = "Training"
    )]
    sched: Option<SchedName>,
    /// Epochs of linear warm-up; may be a fraction
    #[arg(long, value_name = "X", help_heading = "Training")]
    warmup_epochs: Option<f64>,
    /// Learning rate at the end of a cosine
    #[arg(long, value_name = "X", help_heading = "Training")]
    min_lr: Option<f64>,
    /// Label smoothing
    #[arg(long, value_name = "X", help_heading = "Training")]
    smoothing: Option<f64>,
    /// Largest norm of all gradients together; 0 for no limit
    #[arg(long, value_name = "X", help_heading = "Training")]
    clip_grad: Option<f64>,
    /// Validate and keep a moving average of the weights with this decay, such as 0.999; 0 for none
    #[arg(long, value_name = "DECAY", help_heading = "Training")]
    ema: Option<f64>,
    /// How activations are stored; weights and sums stay f32
    #[arg(
        long,
        value_enum,
        value_name = "f32|bf16|f16",
        hide_possible_values = true,
        help_heading = "Training"
    )]
    precision: Option<Precision>,
    /// Seed of weights, order, augmentation and dropout
    #[arg(long, value_name = "N", help_heading = "Training")]
    seed: Option<u32>,
    /// auto, cpu, wgpu, wgpu:1, wgpu:nvidia, cuda:0
    #[arg(long, value_name = "DEVICE", help_heading = "Training")]
    device: Option<String>,

    /// The run directory; a new one below runs/ if not given
    #[arg(long, value_name = "DIR", value_parser = not_empty(), help_heading = "Run")]
    output: Option<String>,
    /// Go on with a run that was stopped
    #[arg(long, value_name = "RUN_DIR", conflicts_with_all = ["output", "config"], help_heading = "Run")]
    resume: Option<PathBuf>,
    /// Also save a checkpoint every so many steps
    #[arg(long, value_name = "STEPS", help_heading = "Run")]
    checkpoint_every: Option<u32>,
    /// TOML file of settings; flags win over it
    #[arg(short, long, value_name = "FILE", help_heading = "Run")]
    config: Option<PathBuf>,
    /// Set any key of the config; wins over flags and file
    #[arg(long, value_name = "KEY=VALUE", help_heading = "Run")]
    set: Vec<String>,
    /// Print nothing but errors
    #[arg(short, long, help_heading = "Run")]
    quiet: bool,
    /// Stop when the standard input ends, as it does when the program that started this one ends
    #[arg(long, hide = true)]
    stop_with_parent: bool,
}

/// An empty path, as of a shell variable that is not set, is a slip and not the default.
fn not_empty() -> NonEmptyStringValueParser {
    NonEmptyStringValueParser::new()
}

impl Options {
    /// The flags that were given, as settings.
    fn settings(&self) -> Vec<Setting> {
        let text = |v: &Option<String>| v.clone().map(Value::String);
        let whole = |v: Option<u32>| v.map(|v| Value::Integer(v.into()));
        let number = |v: Option<f64>| v.map(Value::Float);
        let yes = |v: bool| v.then_some(Value::Boolean(true));
        let list = |v: &[String]| {
            let texts = v.iter().cloned().map(Value::String).collect();
            (!v.is_empty()).then_some(Value::Array(texts))
        };
        let none = self.no_aug.then(|| Value::String("none".into()));
        let all = [
            ("data.path", text(&self.data), "--data"),
            ("data.format", text(&self.data_format), "--data-format"),
            ("data.img_size", whole(self.img_size), "--img-size"),
            ("data.val_fraction", number(self.val_fraction), "--val-fraction"),
            ("data.test_fraction", number(self.test_fraction), "--test-fraction"),
            ("data.class_weights", choice(&self.class_weights), "--class-weights"),
            ("augment.policy", choice(&self.augment), "--augment"),
            ("augment.policy", none, "--no-aug"),
            ("data.skip_bad", yes(self.skip_bad), "--skip-bad"),
            ("data.workers", whole(self.workers), "--workers"),
            ("model.name", text(&self.model), "--model"),
            ("model.num_classes", whole(self.num_classes), "--num-classes"),
            ("model.pretrained", text(&self.pretrained), "--pretrained"),
            ("model.drop_head", yes(self.drop_head), "--drop-head"),
            ("train.freeze", list(&self.freeze), "--freeze"),
            ("train.epochs", whole(self.epochs), "--epochs"),
            ("train.max_steps", whole(self.max_steps), "--max-steps"),
            ("train.batch_size", whole(self.batch_size), "--batch-size"),
            ("optim.name", choice(&self.opt), "--opt"),
            ("optim.lr", number(self.lr), "--lr"),
            ("optim.weight_decay", number(self.weight_decay), "--weight-decay"),
            ("optim.momentum", number(self.momentum), "--momentum"),
            ("sched.name", choice(&self.sched), "--sched"),
            ("sched.warmup_epochs", number(self.warmup_epochs), "--warmup-epochs"),
            ("sched.min_lr", number(self.min_lr), "--min-lr"),
            ("train.label_smoothing", number(self.smoothing), "--smoothing"),
            ("optim.clip_grad", number(self.clip_grad), "--clip-grad"),
            ("train.ema", number(self.ema), "--ema"),
            ("train.precision", choice(&self.precision), "--precision"),
            ("train.seed", whole(self.seed), "--seed"),
            ("train.device", text(&self.device), "--device"),
            ("output.dir", text(&self.output), "--output"),
            ("train.checkpoint_every", whole(self.checkpoint_every), "--checkpoint-every"),
        ];
        all.into_iter().filter_map(|(key, value, flag)| Some((key, value?, flag))).collect()
    }

    /// Defaults or the run to go on with, then the file, the flags and the assignments.
    fn config(&self) -> Result<Config> {
        let mut layers = match &self.resume {
            Some(given) => Layers::from_config(&run_dir::read_config(&run_dir::of(given))?),
            None => Layers::new(),
        };
        if let Some(file) = &self.config {
            paths::check_input("--config", file, "a TOML file such as configs/default.toml")?;
            layers.file(file)?;
        }
        for setting in self.settings() {
            layers.flag(setting)?;
        }
        for assignment in &self.set {
            layers.set(assignment)?;
        }
        layers.finish()
    }
}

/// A choice by the name that the command line and the config file share.
fn choice<T: clap::ValueEnum>(value: &Option<T>) -> Option<Value> {
    let name = value.as_ref()?.to_possible_value()?.get_name().to_owned();
    Some(Value::String(name))
}

/// Trains.
///
/// # Errors
/// As [`train::run`] and [`train::resume`]; `Usage` for settings that do not exist or do not fit.
pub fn train(options: &Options) -> Result<()> {
    if options.stop_with_parent {
        std::thread::spawn(|| {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            std::process::exit(1);
        });
    }
    let config = options.config()?;
    let progress = if options.quiet { Progress::Quiet } else { Progress::auto() };
    match options.resume {
        Some(_) => train::resume(&config, progress)?,
        None => train::run(&config, progress)?,
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        options: Options,
    }

    fn parse(words: &[&str]) -> Config {
        let all = std::iter::once("attn2d").chain(words.iter().copied());
        Program::try_parse_from(all).expect("good words").options.config().expect("a good config")
    }

    #[test]
    fn no_words_are_the_defaults() {
        assert_eq!(parse(&[]), Config::default());
    }

    #[test]
    fn every_flag_reaches_its_key() {
        let words = "--data-dir d --data-format csv --img-size 96 --val-fraction 0.2 --test-fraction 0.1 --class-weights balanced \
                     --augment flips --skip-bad -j 3 --model resnet34 --num-classes 7 --pretrained p --drop-head --epochs 9 \
                     --max-steps 5 -b 8 --opt sgd --lr 0.1 --weight-decay 0.01 --momentum 0.8 --sched step --warmup-epochs 1.5 \
                     --min-lr 1e-5 --smoothing 0.1 --clip-grad 1.5 --ema 0.99 --precision bf16 --freeze layer1.*,bn1 --seed 4 --device cpu --output o --checkpoint-every 6 --set sched.decay_rate=0.3";
        let config = parse(&words.split_whitespace().collect::<Vec<_>>());
        let table = toml::Table::try_from(&config).expect("a table");
        let default = toml::Table::try_from(Config::default()).expect("a table");
        let get = |t: &toml::Table, key: &str| {
            let (section, name) = key.split_once('.').expect("a dotted key");
            t[section][name].clone()
        };
        let options = Options {
            no_aug: false,
            ..Program::try_parse_from(std::iter::once("x").chain(words.split_whitespace()))
                .expect("good")
                .options
        };
        let settings = options.settings();
        assert_eq!(settings.len(), 32, "all flags but --no-aug");
        for (key, value, flag) in settings {
            assert_eq!(get(&table, key), value, "{flag}");
            assert_ne!(
                get(&default, key),
                value,
                "{flag} must differ from the default to be tested"
            );
        }
        assert_eq!(config.sched.decay_rate, 0.3);
        assert_eq!(parse(&["--no-aug"]).augment.policy, Policy::None);
        assert_eq!(parse(&["--lr", "0.1", "--set", "optim.lr=0.2"]).optim.lr, 0.2);
    }
}
