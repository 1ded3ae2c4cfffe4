//! `attn2d export`: a trained model as one file that says all about itself.

use std::path::PathBuf;

use clap::Args;

use crate::Result;
use crate::io::{paths, safetensors};
use crate::train::Trained;

const EXAMPLES: &str = "Examples:
  attn2d export --checkpoint runs/my-run --out model.safetensors
      for `attn2d predict --checkpoint model.safetensors` and other programs
  python examples/load_in_pytorch.py model.safetensors picture.png
      the same model in PyTorch";

/// Write a trained model as one safetensors file with torchvision's names, classes and normalisation
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// RUN_DIR (its best), RUN_DIR/best or RUN_DIR/last
    #[arg(long, value_name = "RUN")]
    checkpoint: PathBuf,
    /// The file to write
    #[arg(long, value_name = "FILE.safetensors")]
    out: PathBuf,
    /// The weights of the last step, where the checkpoint also has their moving average
    #[arg(long)]
    raw_weights: bool,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
}

/// Exports.
///
/// # Errors
/// As [`Trained::open`] and [`Trained::export`]; `Io` where the file cannot be written.
pub fn export(options: &Options) -> Result<()> {
    paths::check_output("--out", &options.out)?;
    let trained = Trained::open(&options.checkpoint, options.raw_weights)?;
    let dict = trained.export()?;
    safetensors::write(&options.out, &dict)?;
    if !options.quiet {
        println!("{}", trained.introduce());
        println!("classes   {}", trained.classes.join(", "));
        println!(
            "images    {0}x{0}, mean {1:?}, std {2:?}",
            trained.img_size, trained.mean, trained.std
        );
        println!("{} arrays are in {}", dict.arrays.len(), options.out.display());
    }
    Ok(())
}
