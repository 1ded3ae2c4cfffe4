//! The `attn2d` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    attn2d::cli::main()
}
