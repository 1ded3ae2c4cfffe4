//! One trial: a child process that trains, watched to its end.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use super::config::Keep;
use super::folder::{Folder, Outcome};
use super::plan::{Stage, Trial};
use crate::io::{Locked, machine};
use crate::train::{Scores, checkpoint, run_dir};
use crate::{Error, Result};

/// How often a run whose process was killed is taken up again before it counts as failed: a machine out of memory kills, and would again.
const ATTEMPTS: usize = 3;

/// How trials are run.
#[derive(Debug, Clone)]
pub struct Runner {
    /// The program, which has the verb `train`.
    pub program: PathBuf,
    /// Instead of the device that the study names.
    pub device: Option<String>,
    /// Threads of a run; 0 for as many as the machine has.
    pub threads: usize,
    /// Which weights stay.
    pub keep: Keep,
}

impl Runner {
    /// Runs a trial that this process has claimed, from its beginning or from where it was stopped, and writes down what it came to.
    ///
    /// A run that fails by itself is an outcome, not an error. Errors: those of files, of a program that does not start, and of a run that
    /// failed for what surrounds it.
    pub fn run(&self, folder: &Folder, trial: &Trial, split: &Path) -> Result<Outcome> {
        let dir = folder.trial(&trial.id);
        let config = folder.write_trial(trial, split, self.device.as_deref())?;
        let mut attempts = 0;
        let (val, error) = loop {
            attempts += 1;
            let (status, said) = self.train(&dir, &config)?;
            if status.success() {
                break match val(&Scores::read(&dir)?) {
                    Some(val) => (Some(val), None),
                    None => (None, Some("the validation part has no balanced accuracy".into())),
                };
            }
            match status.code() {
                Some(code) => {
                    let said = said.unwrap_or_else(|| format!("{status}; see log.txt"));
                    if !is_the_models(code, &said) {
                        return Err(Error::Training(format!(
                            "{}: {said}. That is no fault of the model: the trial stays open; mend the cause and start the study again",
                            dir.display()
                        )));
                    }
                    break (None, Some(said));
                }
                None if attempts < ATTEMPTS => {}
                None => {
                    let often = format!("the process was killed {attempts} times ({status})");
                    break (None, Some(format!("{often}; is there too little memory?")));
                }
            }
        };
        let by = format!("{} {}", machine::name(), std::process::id());
        let outcome = Outcome { val_balanced_accuracy: val, error, attempts, by };
        folder.finish(&trial.id, &outcome)?;
        self.clean(&dir, trial.place.stage)?;
        Ok(outcome)
    }

    /// Trains in a process of its own; its exit status, and the error that it named.
    fn train(&self, dir: &Path, config: &Path) -> Result<(ExitStatus, Option<String>)> {
        // What an earlier worker left behind stops as soon as it sees that its parent is gone.
        while matches!(run_dir::try_lock(dir)?, Locked::Busy) {
            std::thread::sleep(Duration::from_millis(100));
        }
        let path = dir.join("log.txt");
        let io = |e| Error::io(&path, e);
        let mut log = File::options().create(true).append(true).open(&path).map_err(io)?;
        let start = log.seek(SeekFrom::End(0)).map_err(io)?;
        let mut command = Command::new(&self.program);
        command.args(["train", "--stop-with-parent"]);
        if dir.join(checkpoint::CONFIG).exists() {
            command.arg("--resume").arg(dir);
            command.args(self.device.iter().flat_map(|device| ["--device", device]));
        } else {
            command.arg("--config").arg(config);
        }
        if self.threads > 0 {
            command.env("RAYON_NUM_THREADS", self.threads.to_string());
        }
        writeln!(log, "\n$ {command:?}").map_err(io)?;
        command
            .stdin(Stdio::piped())
            .stdout(log.try_clone().map_err(io)?)
            .stderr(log.try_clone().map_err(io)?);
        let mut child = command.spawn().map_err(|e| Error::io(&self.program, e))?;
        let stays_open = child.stdin.take();
        let status = child.wait().map_err(|e| Error::io(&self.program, e))?;
        drop(stays_open);
        let text = fs::read(&path).map_err(io)?;
        let said =
            String::from_utf8_lossy(text.get(start as usize..).unwrap_or_default()).into_owned();
        let error =
            said.lines().rev().find_map(|line| line.strip_prefix("error: ")).map(str::to_owned);
        Ok((status, error))
    }

    /// Takes away weights that are not to stay.
    fn clean(&self, dir: &Path, stage: Stage) -> Result<()> {
        let remove = |path: PathBuf| match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
            _ => Ok(()),
        };
        let judges = matches!(stage, Stage::Seed(_));
        match self.keep {
            Keep::All => Ok(()),
            Keep::Best if judges => {
                let optimizer = dir.join(checkpoint::BEST).join(checkpoint::OPTIM);
                match fs::remove_file(&optimizer) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        return Err(Error::io(optimizer, e));
                    }
                    _ => {}
                }
                remove(dir.join(checkpoint::LAST))
            }
            _ => [checkpoint::LAST, checkpoint::BEST]
                .into_iter()
                .try_for_each(|name| remove(dir.join(name))),
        }
    }
}

/// A run's balanced accuracy on the validation part.
fn val(scores: &Scores) -> Option<f64> {
    scores.parts.iter().find(|p| p.part == "val")?.balanced_accuracy
}

/// Whether a run failed for what it is (its settings, its model, its hunger for memory) and would again, rather than for what surrounds it:
/// a full disk, a picture that cannot be read, a device that is gone.
fn is_the_models(code: i32, said: &str) -> bool {
    const USAGE: i32 = 2;
    const PANIC: i32 = 101;
    [USAGE, PANIC].contains(&code) || said.starts_with("training: ") || said.contains("memory")
}
