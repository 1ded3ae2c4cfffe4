//! `attn2d verify`: prints the op-by-device table.

use crate::error::Result;
use crate::verify::{Options, run};
use std::io::IsTerminal;

/// Verifies and prints; whether everything passed.
///
/// # Errors
/// As [`crate::verify::run`].
pub fn verify(options: &Options) -> Result<bool> {
    let terminal = std::io::stderr().is_terminal();
    let outcome = run(options, &mut |what| {
        if terminal {
            eprint!("\r\x1b[K{what}"); // one line, overwritten
        }
    });
    if terminal {
        eprint!("\r\x1b[K");
    }
    let outcome = outcome?;
    println!("{outcome}");
    Ok(outcome.passed())
}
