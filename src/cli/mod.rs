//! The command line: one file a verb.

pub mod bench;
pub mod data;
mod describe;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod models;
mod notices;
pub mod predict;
pub mod study;
pub mod train;
pub mod verify;

use crate::error::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Fused 2D self-attention and convolution for CNNs: train, evaluate and test models on any device
#[derive(Debug, Parser)]
#[command(name = "attn2d", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train a model and leave a run directory with checkpoints, metrics and pictures
    Train(Box<train::Options>),
    /// Score a checkpoint: metrics, a prediction for each image, a confusion matrix
    Eval(eval::Options),
    /// Predict the classes of pictures: files and folders in, a CSV table out
    Predict(predict::Options),
    /// Write a trained model as one safetensors file with torchvision's names, classes and normalisation
    Export(export::Options),
    /// List models, explain model strings, count a model's parameters
    Models(models::Options),
    /// Look at a data set
    #[command(subcommand)]
    Data(data::Options),
    /// Compare models by experiment: search settings, train many seeds, test statistically, report
    Study(study::Options),
    /// Run every op's conformance cases on every device and print an op-by-device table
    Verify(crate::verify::Options),
    /// Time ops and training steps on a device, beside what it can do at most
    Bench(crate::bench::Options),
    /// Show devices, drivers and limits, what is missing and how to get it
    Doctor,
}

/// The program: exit code 0 for success, 1 for a failure, 2 for a wrong command line or configuration.
pub fn main() -> ExitCode {
    quiet_mesa();
    crate::on_notice(notices::show);
    match run(&Cli::parse().verb) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Where there is no desktop, a layer of Mesa's Vulkan loader looks for one and prints `error: XDG_RUNTIME_DIR is invalid`
/// at every start. It only reorders adapters, which `--device wgpu:..` chooses anyway.
fn quiet_mesa() {
    if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: the first thing that the program does: no other thread reads the environment yet.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}

/// Runs a verb; `false` where it ran, but what it looked at is not as it should be.
fn run(verb: &Verb) -> Result<bool> {
    match verb {
        Verb::Train(options) => train::train(options).map(|()| true),
        Verb::Eval(options) => eval::eval(options).map(|()| true),
        Verb::Predict(options) => predict::predict(options),
        Verb::Export(options) => export::export(options).map(|()| true),
        Verb::Models(options) => models::models(options).map(|()| true),
        Verb::Data(options) => data::data(options).map(|()| true),
        Verb::Study(options) => study::study(options),
        Verb::Verify(options) => verify::verify(options),
        Verb::Bench(options) => bench::bench(options),
        Verb::Doctor => {
            print!("{}", doctor::report());
            Ok(true)
        }
    }
}
