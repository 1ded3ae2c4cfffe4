//! `attn2d predict`: classes of pictures without labels.

use std::path::PathBuf;

use clap::Args;

use crate::Result;
use crate::config::Precision;
use crate::train::{Predict, Progress};

const EXAMPLES: &str = "Examples:
  attn2d predict --checkpoint runs/my-run pictures/ --out predictions.csv
      every picture in a folder and the folders below it, by the best checkpoint of a run
  attn2d predict --checkpoint model.safetensors a.png b.jpg
      two pictures by an exported model; the table goes to the standard output";

/// Predict the classes of pictures: files and folders in, a CSV table out
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// RUN_DIR (its best), RUN_DIR/best, RUN_DIR/last, or a file of `attn2d export`
    #[arg(long, value_name = "RUN_OR_FILE")]
    checkpoint: PathBuf,
    /// Pictures, and folders that are searched for them at any depth
    #[arg(value_name = "IMAGES", required = true)]
    inputs: Vec<PathBuf>,
    /// The table: path, predicted class, a probability for each class; standard output if not given
    #[arg(long, value_name = "FILE.csv")]
    out: Option<PathBuf>,
    /// Write the logits too
    #[arg(long)]
    logits: bool,
    /// auto, cpu, wgpu, wgpu:1, wgpu:nvidia, cuda:0
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// How activations are stored; as in training, if not given
    #[arg(long, value_enum, value_name = "f32|bf16|f16", hide_possible_values = true)]
    precision: Option<Precision>,
    /// Pictures that go through the model at once
    #[arg(short, long, value_name = "N", default_value_t = 32)]
    batch_size: usize,
    /// Threads that read and prepare pictures
    #[arg(short = 'j', long, value_name = "N", default_value_t = 2)]
    workers: usize,
    /// The weights of the last step, where the checkpoint also has their moving average
    #[arg(long)]
    raw_weights: bool,
    /// Succeed although pictures could not be read
    #[arg(long)]
    skip_bad: bool,
    /// Print nothing but the table and errors
    #[arg(short, long)]
    quiet: bool,
}

/// Predicts. Pictures that cannot be read are listed on the error stream; `false` where there are any and `--skip-bad` does not
/// allow it.
///
/// # Errors
/// As [`Predict::run`].
pub fn predict(options: &Options) -> Result<bool> {
    let predict = Predict {
        checkpoint: options.checkpoint.clone(),
        inputs: options.inputs.clone(),
        out: options.out.clone(),
        device: options.device.clone(),
        precision: options.precision,
        batch_size: options.batch_size,
        workers: options.workers,
        logits: options.logits,
        raw_weights: options.raw_weights,
    };
    let progress = if options.quiet { Progress::Quiet } else { Progress::auto() };
    let done = predict.run(progress)?;
    let bad = done.unreadable.len();
    for (_, reason) in &done.unreadable {
        eprintln!("not read: {reason}");
    }
    if bad > 0 {
        eprintln!("{bad} of {} pictures could not be read", bad + done.images);
    }
    Ok(bad == 0 || options.skip_bad)
}
