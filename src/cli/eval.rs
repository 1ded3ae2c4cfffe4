//! `attn2d eval`: scores a checkpoint.

use std::path::PathBuf;

use clap::Args;

use crate::Result;
use crate::config::Precision;
use crate::train::{Progress, Score};

const EXAMPLES: &str = "Examples:
  attn2d eval --checkpoint runs/my-run/best
      the test part of the data that the run was trained on
  attn2d eval --checkpoint runs/my-run/best --data path/to/other/images
      images from elsewhere with the same class names";

/// Score a checkpoint: metrics, a prediction for each image, a confusion matrix
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// RUN_DIR/best, RUN_DIR/last, or RUN_DIR for its best
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Other images than the run's own
    #[arg(long, visible_alias = "data-dir", value_name = "PATH")]
    data: Option<String>,
    /// The reader, where it cannot be recognised
    #[arg(long, value_name = "NAME")]
    data_format: Option<String>,
    /// train, val, test, id_test or all; if not given, the test part of the run's own data (val where the run sealed it) or all of other data
    #[arg(long, value_name = "PART")]
    split: Option<String>,
    /// Images that go through the model at once
    #[arg(short, long, value_name = "N")]
    batch_size: Option<usize>,
    /// auto, cpu, wgpu, wgpu:1, wgpu:nvidia, cuda:0
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// How activations are stored; as in training, if not given
    #[arg(long, value_enum, value_name = "f32|bf16|f16", hide_possible_values = true)]
    precision: Option<Precision>,
    /// The weights of the last step, where the checkpoint also has their moving average
    #[arg(long)]
    raw_weights: bool,
    /// Threads that read and prepare images
    #[arg(short = 'j', long, value_name = "N")]
    workers: Option<usize>,
    /// Leave out images that cannot be read, and count them
    #[arg(long)]
    skip_bad: bool,
    /// Where results go; RUN_DIR/eval/DATA_SET if not given, with -last, -raw, -f16 or -cpu where these differ from the run's best
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// Scores.
///
/// # Errors
/// As [`Score::run`].
pub fn eval(options: &Options) -> Result<()> {
    let mut config = Score::read_config(&options.checkpoint)?;
    if let Some(path) = &options.data {
        config.data.path.clone_from(path);
        config.data.format = "auto".into();
    }
    if let Some(format) = &options.data_format {
        config.data.format.clone_from(format);
    }
    if let Some(device) = &options.device {
        config.train.device.clone_from(device);
    }
    config.train.precision = options.precision.unwrap_or(config.train.precision);
    config.train.batch_size = options.batch_size.unwrap_or(config.train.batch_size);
    config.data.workers = options.workers.unwrap_or(config.data.workers);
    config.data.skip_bad |= options.skip_bad;
    let score = Score {
        checkpoint: options.checkpoint.clone(),
        config,
        raw_weights: options.raw_weights,
        part: options.split.clone(),
        output: options.output.clone(),
    };
    let progress = if options.quiet { Progress::Quiet } else { Progress::auto() };
    score.run(progress)?;
    Ok(())
}
