//! A study's folder: where its trials lie, what they came to, who works on them.
//!
//! ```text
//! studies/quick/
//!   study.toml                  the study's file as it was last run
//!   data/<name>-<hash>/split.csv    which images train, choose and judge; made once, before the first trial
//!   trials/<id>/                a run directory, named by the hash of its config, with
//!     trial.toml                  the config, for `attn2d train --config`
//!     log.txt                     what the run said
//!     outcome.json                what it came to; as long as it is not there the trial is not done
//!   report.html, report.md, *.csv
//! ```
//!
//! The folder may be shared by any number of processes and machines: a trial is worked on by who holds the lock on its `.trial.lock`, which
//! the system takes away from a process that ends, however it ends.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::config::Study;
use super::parts::Parts;
use super::plan::{Reached, Trial};
use crate::config::Config;
use crate::data::{Dataset, Split};
use crate::io::{self, Locked, write_atomic, write_json};
use crate::train::{images, run_dir};
use crate::{Error, Result};

/// What a trial came to, as `outcome.json` holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Validation balanced accuracy of the best epoch; none where the trial failed.
    pub val_balanced_accuracy: Option<f64>,
    /// Why it failed.
    pub error: Option<String>,
    /// How often its run was started or taken up again by the process that finished it.
    pub attempts: usize,
    /// Who finished it: host and process.
    pub by: String,
}

/// The folder of a study.
#[derive(Debug, Clone)]
pub struct Folder {
    root: PathBuf,
}

/// A trial that this process alone works on, until it is dropped.
pub struct Claim {
    _file: File,
}

impl Folder {
    /// The folder at a path.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Its path.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Writes down the study as it is run. Two workers that do so at once write the same.
    pub fn write_study(&self, study: &Study) -> Result<()> {
        let path = self.root.join("study.toml");
        let text = toml::to_string(study).map_err(|e| Error::file(&path, e.to_string()))?;
        if std::fs::read_to_string(&path).is_ok_and(|old| old == text) {
            return Ok(());
        }
        let Some(_lock) = self.lock(".study.lock")? else { return Ok(()) };
        write_atomic(&path, text.as_bytes())
    }

    /// The directory of a trial.
    pub fn trial(&self, id: &str) -> PathBuf {
        self.root.join("trials").join(id)
    }

    /// What a trial came to; `None` while it is not done.
    ///
    /// Errors: `File` for an `outcome.json` that cannot be read.
    pub fn outcome(&self, id: &str) -> Result<Option<Outcome>> {
        let path = self.trial(id).join("outcome.json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path, e)),
        };
        let wrong = |e: serde_json::Error| {
            Error::file(&path, format!("{e}; delete it to run the trial again"))
        };
        serde_json::from_str(&text).map(Some).map_err(wrong)
    }

    /// Writes down what a trial came to.
    pub fn finish(&self, id: &str, outcome: &Outcome) -> Result<()> {
        write_json(&self.trial(id).join("outcome.json"), outcome)
    }

    /// Forgets every trial that failed, so that it is tried again from its beginning; those that another process works on are left alone.
    /// How many there were.
    pub fn forget_failed(&self) -> Result<usize> {
        let trials = self.root.join("trials");
        let Ok(entries) = fs::read_dir(&trials) else { return Ok(0) };
        let mut forgotten = 0;
        for entry in entries {
            let dir = entry.map_err(|e| Error::io(&trials, e))?.path();
            let id = dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let failed = || Ok::<_, Error>(self.outcome(&id)?.is_some_and(|o| o.error.is_some()));
            if !failed()? {
                continue;
            }
            let Some(_claim) = self.claim(&id)? else { continue };
            // Another may have run it again meanwhile.
            if failed()? {
                clear(&dir)?;
                forgotten += 1;
            }
        }
        Ok(forgotten)
    }

    /// Takes a trial for this process; `None` where another has it.
    pub fn claim(&self, id: &str) -> Result<Option<Claim>> {
        lock(&self.trial(id), ".trial.lock").map(|file| file.map(|file| Claim { _file: file }))
    }

    /// The file of settings of a trial, written if need be. A path in it that is not absolute is as the study has it.
    pub fn write_trial(
        &self,
        trial: &Trial,
        split: &Path,
        device: Option<&str>,
    ) -> Result<PathBuf> {
        let dir = self.trial(&trial.id);
        let mut config = trial.config.clone();
        config.output.dir = dir.display().to_string();
        config.data.split_file = split.display().to_string();
        if let Some(device) = device {
            config.train.device = device.to_owned();
        }
        let path = dir.join("trial.toml");
        write_atomic(&path, config.to_toml().as_bytes())?;
        Ok(path)
    }

    /// Where the split of a config's data lies: in a folder named by all of `[data]`, so that other data never have it.
    pub fn split_path(&self, config: &Config) -> PathBuf {
        let data = Config { data: config.data.clone(), ..Config::default() };
        let last = config
            .data
            .path
            .trim_end_matches('/')
            .rsplit(['/', ':'])
            .next()
            .unwrap_or("data")
            .to_owned();
        let name = format!("{}-{}", run_dir::file_name(&last), &data.identity()[..8]);
        self.root.join("data").join(name).join(run_dir::SPLIT)
    }

    /// The split of a data set, for all of its trials: made by the first who asks, which reads every image, test images too, to leave out
    /// those that occur twice. No trial of a search opens a test image after that. Its file, and what users should know of it.
    ///
    /// Errors: those of opening and splitting the data; `Usage` where there is nothing to choose or to judge by; `File` for a split that
    /// is not whole.
    pub fn split(&self, config: &Config, dataset: &Dataset) -> Result<(PathBuf, Parts)> {
        let path = self.split_path(config);
        let dir = path.parent().unwrap_or(&self.root);
        while !path.exists() {
            let Some(_lock) = lock(dir, ".lock")? else {
                std::thread::sleep(std::time::Duration::from_millis(200));
                continue;
            };
            // Another may have made it since.
            if !path.exists() {
                let split = match config.data.split_file.as_str() {
                    "" => images::split(config, dataset)?,
                    file => Split::read(dataset, file)?,
                };
                split.write(dataset, &path)?;
            }
        }
        let parts = Parts::read(&path)?;
        if parts.rows() != dataset.len() {
            return Err(Error::file(
                &path,
                format!(
                    "lists {} images of {}: it is damaged, or the data are others now; delete it to split anew, or give another --output",
                    parts.rows(),
                    dataset.len()
                ),
            ));
        }
        for (part, what, fraction) in [("val", "choose", "val"), ("test", "judge", "test")] {
            if parts.count(part) == 0 {
                return Err(Error::usage(format!(
                    "{}: no images in the {part} part, without which a study cannot {what}; set data.{fraction}_fraction above 0",
                    config.data.path
                )));
            }
        }
        Ok((path, parts))
    }

    /// Takes a folder of it for this process; `None` where another has it.
    pub(super) fn lock_in(&self, dir: &Path) -> Result<Option<Claim>> {
        lock(dir, ".lock").map(|file| file.map(|file| Claim { _file: file }))
    }

    /// Takes a file of the folder, such as the report, for this process; `None` where another has it.
    pub fn lock(&self, name: &str) -> Result<Option<Claim>> {
        lock(&self.root, name).map(|file| file.map(|file| Claim { _file: file }))
    }
}

impl Outcome {
    /// What plans ask for.
    pub fn reached(&self) -> Reached {
        self.val_balanced_accuracy.map_or(Reached::Failed, Reached::Val)
    }
}

/// Empties a directory but for the lock that is held, the outcome first: without it the rest is a run that was stopped.
fn clear(dir: &Path) -> Result<()> {
    let io = |e| Error::io(dir, e);
    fs::remove_file(dir.join("outcome.json")).map_err(io)?;
    for entry in fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let locks = path.file_name().is_some_and(|n| n == ".trial.lock");
        match path.is_dir() {
            _ if locks => {}
            true => fs::remove_dir_all(&path).map_err(|e| Error::io(&path, e))?,
            false => fs::remove_file(&path).map_err(|e| Error::io(&path, e))?,
        }
    }
    Ok(())
}

/// Locks a file in a directory, making both. `None` where another process, or another thread, has it.
fn lock(dir: &Path, name: &str) -> Result<Option<File>> {
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let path = dir.join(name);
    match io::lock(&path)? {
        Locked::Held(file) => Ok(Some(file)),
        Locked::Busy => Ok(None),
        Locked::Unable(e) => Err(Error::file(
            &path,
            format!(
                "this file system has no locks ({e}), which keep two workers off one trial; put the study's folder on another (--output)"
            ),
        )),
    }
}
