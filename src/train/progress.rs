//! What a run shows while it works: bars on a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a plain line says how far a long piece of work is.
const EVERY: Duration = Duration::from_secs(15);

/// How a program shows what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Bars on the terminal, results as lines.
    Bars,
    /// Lines only.
    Lines,
    /// Nothing.
    Quiet,
}

impl Progress {
    /// Bars where the error stream is a terminal, else lines.
    pub fn auto() -> Self {
        if std::io::stderr().is_terminal() { Self::Bars } else { Self::Lines }
    }

    /// Prints a line of result. A reader that has gone away (`| head`) is no fault.
    pub fn line(self, text: &str) {
        if self != Self::Quiet {
            let _ = writeln!(std::io::stdout(), "{text}");
        }
    }

    /// Starts work of `total` steps, named `what`.
    pub fn start(self, what: &str, total: u64) -> Work {
        let bar = (self == Self::Bars).then(|| {
            let style =
                ProgressStyle::with_template("{prefix}  {bar:30}  {pos}/{len}  {msg}  {eta} left");
            let bar =
                ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(8));
            bar.with_style(style.expect("a template that is right")).with_prefix(what.to_owned())
        });
        Work { progress: self, bar, what: what.to_owned(), total, said: Instant::now() }
    }
}

/// Work in progress; the bar goes when it is dropped.
#[derive(Debug)]
pub struct Work {
    progress: Progress,
    bar: Option<ProgressBar>,
    what: String,
    total: u64,
    said: Instant,
}

impl Work {
    /// Says that `done` steps are done.
    pub fn at(&mut self, done: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(message.to_owned());
        } else if self.said.elapsed() >= EVERY && done < self.total {
            self.progress.line(&format!("{}  {done}/{}  {message}", self.what, self.total));
            self.said = Instant::now();
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
