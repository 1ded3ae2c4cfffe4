//! Settings asked of Optuna, by its command line: `ask` before a trial of the search's first rung, `tell` after it.
//!
//! Each cell is an Optuna study of its own, named `STUDY / DATA SET / MODEL / SPACE`, the last a hash of
//! what is searched. What was asked is kept in the study's folder
//! (`asked/<cell>/<number>.json`), so that a trial that was stopped goes on with the setting that it began with, and is told once.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde::{Deserialize, Serialize};
use serde_json::json;
use toml::Value;

use super::config::{Cell, Study};
use super::folder::{Folder, Outcome};
use super::plan::{Stage, Task};
use super::space::{Range, Setting, Space, name_number};
use crate::io::write_json;
use crate::{Error, Result};

/// `[search.optuna]`: where settings are asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Optuna {
    /// The program.
    pub command: String,
    /// Its storage, as in `sqlite:///optuna.db`; empty for `optuna.db` in the study's folder.
    pub storage: String,
    /// Its sampler; empty for its own choice (TPE).
    pub sampler: String,
    /// The sampler's options as JSON, as in `{"seed": 1}`.
    pub sampler_kwargs: String,
}

impl Default for Optuna {
    fn default() -> Self {
        Self {
            command: "optuna".into(),
            storage: String::new(),
            sampler: String::new(),
            sampler_kwargs: String::new(),
        }
    }
}

/// A setting that Optuna gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Asked {
    /// The number of Optuna's trial.
    trial: u64,
    /// What it said.
    pub(super) setting: Setting,
    /// Whether it knows what became of it.
    told: bool,
}

/// Names the cell and its space: answers about another space are of no use.
fn cell_name(study: &Study, cell: Cell) -> String {
    let specs = study.models[cell.model].spec.all();
    let space = format!("{:?} {specs:?}", study.search.space);
    let space = name_number(&space) >> 32;
    let name = format!(
        "{} / {} / {}",
        study.name, study.datasets[cell.dataset].name, study.models[cell.model].name
    );
    format!("{name} / {space:08x}")
}

fn dir(study: &Study, folder: &Folder, cell: Cell) -> PathBuf {
    folder.root().join("asked").join(format!("{:016x}", name_number(&cell_name(study, cell))))
}

/// The setting of a number of a cell's search; `None` where it was not asked for yet.
pub(super) fn asked(
    study: &Study,
    folder: &Folder,
    cell: Cell,
    number: usize,
) -> Result<Option<Asked>> {
    let path = dir(study, folder, cell).join(format!("{number}.json"));
    match fs::read_to_string(&path) {
        Ok(text) => {
            serde_json::from_str(&text).map(Some).map_err(|e| Error::file(&path, e.to_string()))
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, e)),
    }
}

fn write(study: &Study, folder: &Folder, cell: Cell, number: usize, asked: &Asked) -> Result<()> {
    let path = dir(study, folder, cell).join(format!("{number}.json"));
    write_json(&path, asked)
}

/// Asks for the setting of a number of a cell's search. `false` where another worker is at this cell.
///
/// Errors: `Training` where Optuna does not answer as it should.
pub(super) fn ask(study: &Study, folder: &Folder, cell: Cell, number: usize) -> Result<bool> {
    let Some(_lock) = folder.lock_in(&dir(study, folder, cell))? else { return Ok(false) };
    if asked(study, folder, cell, number)?.is_some() {
        return Ok(true);
    }
    let optuna = Cli::new(study, folder, cell);
    optuna.run("create-study", &["--direction", "maximize", "--skip-if-exists"])?;
    let specs = study.models[cell.model].spec.all();
    let mut space: serde_json::Map<_, _> =
        study.search.space.iter().map(|(key, space)| (key.clone(), distribution(space))).collect();
    space.insert(
        "model.name".into(),
        distribution(&Space::Choice(specs.iter().cloned().map(Value::String).collect())),
    );
    let space = serde_json::Value::Object(space).to_string();
    let mut words = vec!["--format", "json", "--search-space", &space];
    let kwargs = with_own_seed(&optuna.options.sampler_kwargs, number).map_err(|e| {
        Error::usage(format!(
            "search.optuna.sampler_kwargs: {e}; expected JSON as in {{\"seed\": 1}}"
        ))
    })?;
    for (option, value) in [("--sampler", &optuna.options.sampler), ("--sampler-kwargs", &kwargs)] {
        if !value.is_empty() {
            words.extend([option, value]);
        }
    }
    let said = optuna.run("ask", &words)?;
    let asked = read(&said)
        .map_err(|message| optuna.failed("ask", &format!("{message}: {}", said.trim())))?;
    write(study, folder, cell, number, &asked)?;
    Ok(true)
}

/// Tells Optuna of trials that ended and that it does not know of.
pub(super) fn tell(
    study: &Study,
    folder: &Folder,
    tasks: &[Task],
    outcome: impl Fn(&str) -> Option<Outcome>,
) -> Result<()> {
    for task in tasks {
        let Task::Trial(trial) = task else { continue };
        let (cell, number) = (trial.place.cell, trial.number);
        if !matches!(trial.place.stage, Stage::Search { rung: 0, .. }) {
            continue;
        }
        let Some(outcome) = outcome(&trial.id) else { continue };
        if asked(study, folder, cell, number)?.is_none_or(|a| a.told) {
            continue;
        }
        let Some(_lock) = folder.lock_in(&dir(study, folder, cell))? else { continue };
        let Some(asked) = asked(study, folder, cell, number)?.filter(|a| !a.told) else { continue };
        let (trial, value) =
            (asked.trial.to_string(), outcome.val_balanced_accuracy.map(|v| v.to_string()));
        let mut words = vec!["--trial-number", &trial, "--skip-if-finished"];
        match &value {
            Some(value) => words.extend(["--state", "complete", "--values", value]),
            None => words.extend(["--state", "fail"]),
        }
        Cli::new(study, folder, cell).run("tell", &words)?;
        write(study, folder, cell, number, &Asked { told: true, ..asked })?;
    }
    Ok(())
}

/// A sampler's options for one of several questions. Each is put by a process of its own, and with one seed all would have one answer.
fn with_own_seed(kwargs: &str, number: usize) -> Result<String, serde_json::Error> {
    if kwargs.is_empty() {
        return Ok(String::new());
    }
    let mut options: serde_json::Map<String, serde_json::Value> = serde_json::from_str(kwargs)?;
    if let Some(seed) = options.get("seed").and_then(serde_json::Value::as_u64) {
        options.insert("seed".into(), (seed + number as u64).into());
    }
    Ok(serde_json::Value::Object(options).to_string())
}

/// What `ask` printed.
fn read(said: &str) -> Result<Asked, String> {
    #[derive(Deserialize)]
    struct Answer {
        number: u64,
        params: serde_json::Map<String, serde_json::Value>,
    }
    let Answer { number, params } = serde_json::from_str(said.trim()).map_err(|e| e.to_string())?;
    let (mut values, mut spec) = (Vec::new(), String::new());
    for (key, value) in params {
        let value = Value::try_from(&value).map_err(|e| format!("{key}: {e}"))?;
        match (key.as_str(), value) {
            ("model.name", Value::String(text)) => spec = text,
            (_, value) => values.push((key, value)),
        }
    }
    Ok(Asked { trial: number, setting: Setting { values, spec }, told: false })
}

/// A space in Optuna's words.
fn distribution(space: &Space) -> serde_json::Value {
    match space {
        Space::Choice(values) => {
            json!({"name": "CategoricalDistribution", "attributes": {"choices": values}})
        }
        Space::Range(Range { from, to, log }) => {
            json!({"name": "FloatDistribution", "attributes": {"low": from, "high": to, "log": log, "step": null}})
        }
    }
}

/// Optuna's program for one of its studies.
struct Cli {
    options: Optuna,
    storage: String,
    name: String,
}

impl Cli {
    fn new(study: &Study, folder: &Folder, cell: Cell) -> Self {
        let options = study.search.optuna.clone().unwrap_or_default();
        let own = || {
            let path =
                std::path::absolute(folder.root()).unwrap_or_else(|_| folder.root().to_path_buf());
            format!("sqlite:///{}", path.join("optuna.db").display())
        };
        let storage = if options.storage.is_empty() { own() } else { options.storage.clone() };
        Self { options, storage, name: cell_name(study, cell) }
    }

    /// Runs a verb and returns what it printed.
    fn run(&self, verb: &str, words: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.options.command);
        command.args([verb, "--storage", &self.storage, "--study-name", &self.name]).args(words);
        let output = command.output().map_err(|e| {
            self.failed(verb, &format!("{e}; install Optuna (pip install optuna), or name its program as search.optuna.command"))
        })?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(self
                .failed(verb, error.trim_end().lines().next_back().unwrap_or("no reason given")));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn failed(&self, verb: &str, message: &str) -> Error {
        Error::Training(format!(
            "{} {verb} for {:?} in {}: {message}",
            self.options.command, self.name, self.storage
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_and_answers() {
        let range = Space::Range(Range { from: 1e-4, to: 0.1, log: true });
        assert_eq!(
            distribution(&range).to_string(),
            r#"{"name":"FloatDistribution","attributes":{"low":0.0001,"high":0.1,"log":true,"step":null}}"#
        );
        let choice = Space::Choice(vec![Value::String("a".into()), Value::Integer(3)]);
        assert_eq!(
            distribution(&choice).to_string(),
            r#"{"name":"CategoricalDistribution","attributes":{"choices":["a",3]}}"#
        );
        let asked = read("{\"number\": 7, \"params\": {\"optim.lr\": 0.00659, \"model.name\": \"resnet18\", \"data.workers\": 3}}\n").unwrap();
        assert_eq!((asked.trial, asked.setting.spec.as_str(), asked.told), (7, "resnet18", false));
        assert_eq!(
            asked.setting.values,
            [
                ("optim.lr".into(), Value::Float(0.00659)),
                ("data.workers".into(), Value::Integer(3))
            ]
        );
        assert!(read("Asked").is_err());
        assert_eq!(
            with_own_seed("{\"seed\": 1, \"multivariate\": true}", 3).unwrap(),
            "{\"seed\":4,\"multivariate\":true}"
        );
        assert_eq!(with_own_seed("", 3).unwrap(), "");
        assert!(with_own_seed("seed=1", 3).is_err());
    }
}
