//! The command line: one file a verb.

pub mod doctor;
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
    /// Run every op's conformance cases on every device and print an op-by-device table
    Verify(crate::verify::Options),
    /// Show devices, drivers and limits, what is missing and how to get it
    Doctor,
}

/// The program: exit code 0 for success, 1 for a failure, 2 for a wrong command line or configuration.
pub fn main() -> ExitCode {
    match run(&Cli::parse().verb) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Runs a verb; `false` where it ran, but what it looked at is not as it should be.
fn run(verb: &Verb) -> Result<bool> {
    match verb {
        Verb::Verify(options) => verify::verify(options),
        Verb::Doctor => {
            print!("{}", doctor::report());
            Ok(true)
        }
    }
}
