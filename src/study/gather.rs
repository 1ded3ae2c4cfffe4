//! From the directories of a study's trials to [`Results`].

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use super::config::{Cell, Study};
use super::folder::{Folder, Outcome};
use super::optuna;
use super::parts::Parts;
use super::plan::{Known, Place, Plan, Stage, Task, Trial};
use super::results::{DataResults, ModelResults, Results, Run, Scores, Tried};
use super::space::{Range, Space};
use crate::Result;
use crate::models::{self, Spec};
use crate::stats::percentile;
use crate::train;
use crate::train::cost::Cost;
use crate::train::log::{self, read_metrics, read_steps};

/// What stands at each place of a plan, and the outcomes of its trials, by id.
///
/// Errors: those of reading the folder's files, and of a config that a setting breaks.
pub(crate) fn tasks(
    study: &Study,
    plan: &Plan,
    folder: &Folder,
) -> Result<(Vec<Task>, BTreeMap<String, Outcome>)> {
    // Many places ask for one outcome.
    let seen = RefCell::new(BTreeMap::new());
    let outcome = |id: &str| -> Result<Option<Outcome>> {
        if let Some(known) = seen.borrow().get(id) {
            return Ok(Clone::clone(known));
        }
        let outcome = folder.outcome(id)?;
        seen.borrow_mut().insert(id.to_owned(), outcome.clone());
        Ok(outcome)
    };
    let reached = |id: &str| Ok(outcome(id)?.as_ref().map(Outcome::reached));
    let asked = |cell: Cell, number: usize| {
        Ok(optuna::asked(study, folder, cell, number)?.map(|asked| asked.setting))
    };
    let tasks = plan.tasks(&Known { reached: &reached, asked: &asked })?;
    let mut outcomes = BTreeMap::new();
    for task in &tasks {
        if let Task::Trial(trial) = task
            && let Some(outcome) = outcome(&trial.id)?
        {
            outcomes.insert(trial.id.clone(), outcome);
        }
    }
    Ok((tasks, outcomes))
}

/// Gathers a study's results, as far as there are any.
///
/// Errors: those of reading the trials' files.
pub fn results(
    study: &Study,
    folder: &Folder,
    environment: Vec<(String, String)>,
) -> Result<Results> {
    let plan = Plan::new(study)?;
    let (tasks, outcomes) = tasks(study, &plan, folder)?;
    let open = |task: &&Task| !task.is_done(&|id| outcomes.contains_key(id));
    let reader =
        Reader { study, folder, places: plan.places(), tasks: &tasks, outcomes: &outcomes };
    let mut environment = environment;
    environment.push(("trials ran on".into(), devices(folder, outcomes.keys())));
    let datasets =
        (0..study.datasets.len()).map(|dataset| reader.dataset(dataset)).collect::<Result<_>>()?;
    let rungs = study.cells().first().map_or(Ok(Vec::new()), |cell| study.rungs(*cell))?;
    Ok(Results {
        name: study.name.clone(),
        about: study.about.clone(),
        alpha: study.alpha,
        seeds: study.seeds,
        left_out: study.left_out.clone(),
        open: tasks.iter().filter(open).count(),
        asked: study.search.optuna.is_some(),
        space: study.search.space.iter().map(|(key, space)| (key.clone(), words(space))).collect(),
        search: (study.search.trials, rungs),
        environment,
        datasets,
    })
}

/// The devices that trials ran on.
fn devices<'a>(folder: &Folder, ids: impl Iterator<Item = &'a String>) -> String {
    let mut names: Vec<String> = Vec::new();
    for id in ids {
        let Ok(Some(cost)) = Cost::read(&folder.trial(id)) else { continue };
        if !names.contains(&cost.device) {
            names.push(cost.device);
        }
    }
    if names.is_empty() { "none yet".into() } else { names.join("; ") }
}

struct Reader<'a> {
    study: &'a Study,
    folder: &'a Folder,
    places: &'a [Place],
    tasks: &'a [Task],
    outcomes: &'a BTreeMap<String, Outcome>,
}

impl Reader<'_> {
    fn dataset(&self, dataset: usize) -> Result<DataResults> {
        let cells: Vec<Cell> =
            self.study.cells().into_iter().filter(|c| c.dataset == dataset).collect();
        let models =
            cells.iter().map(|cell| self.model(*cell, &cells)).collect::<Result<Vec<_>>>()?;
        let config = match cells.first() {
            Some(cell) => self.study.config(*cell)?,
            None => crate::config::Config::default(),
        };
        let split = self.folder.split_path(&config);
        let parts = if split.exists() { Parts::read(&split)? } else { Parts::default() };
        let of_a_run = models.iter().flat_map(|m| &m.runs).find_map(|run| run.scores.as_ref().ok());
        let classes = of_a_run.and_then(|s| s.parts.first()).map(|p| p.classes.clone());
        Ok(DataResults {
            name: self.study.datasets[dataset].name.clone(),
            holdout_domain: (!config.data.holdout_domain.is_empty())
                .then(|| config.data.holdout_domain.clone()),
            images: parts.counts(),
            absent: parts.absent(),
            path: config.data.path,
            classes: classes.unwrap_or_default(),
            models,
        })
    }

    /// Trials of a cell with what they came to, those that are done.
    fn done(&self, cell: Cell) -> impl Iterator<Item = (&Trial, &Outcome)> {
        let here = self.places.iter().zip(self.tasks).filter(move |(place, _)| place.cell == cell);
        here.filter_map(|(_, task)| match task {
            Task::Trial(trial) => Some((&**trial, self.outcomes.get(&trial.id)?)),
            _ => None,
        })
    }

    fn model(&self, cell: Cell, cells: &[Cell]) -> Result<ModelResults> {
        let baseline = self.study.baseline(cell).and_then(|b| cells.iter().position(|c| *c == b));
        let mut tried = Vec::new();
        let mut runs = Vec::new();
        for (trial, outcome) in self.done(cell) {
            let dir = self.folder.trial(&trial.id);
            let error = || outcome.error.clone().unwrap_or_default();
            match trial.place.stage {
                Stage::Search { rung, .. } => tried.push(Tried {
                    rung,
                    epochs: trial.config.train.epochs,
                    number: trial.number,
                    setting: trial.setting.clone(),
                    val: outcome.val_balanced_accuracy.ok_or_else(error),
                    seconds: cost(&dir)?.0,
                    dir,
                }),
                Stage::Seed(_) => runs.push(Run {
                    seed: trial.config.train.seed,
                    scores: match outcome.val_balanced_accuracy {
                        // A file that was damaged since is one run less, not the end of the report.
                        Some(_) => scores(&dir).map_err(|e| e.to_string()),
                        None => Err(error()),
                    },
                    dir,
                }),
            }
        }
        let mut here = self.places.iter().zip(self.tasks).filter(|(place, _)| place.cell == cell);
        let winner = here.find_map(|(place, task)| match (place.stage, task) {
            (Stage::Seed(_), Task::Trial(trial)) => Some(trial),
            _ => None,
        });
        let classes = runs
            .iter()
            .find_map(|run| Some(run.scores.as_ref().ok()?.parts.first()?.classes.len()));
        let (parameters, flop) = match winner {
            Some(trial) => {
                size(&trial.setting.spec, classes.unwrap_or(2), trial.config.data.img_size)?
            }
            None => (0, 0.0),
        };
        Ok(ModelResults {
            name: self.study.models[cell.model].name.clone(),
            baseline,
            tried,
            winner: winner.map(|trial| trial.setting.clone()),
            parameters,
            flop,
            runs,
        })
    }
}

/// Learned numbers of a model, and FLOP of its products for one image forward.
pub(super) fn size(spec: &str, classes: usize, side: usize) -> Result<(usize, f64)> {
    let spec: Spec = spec.parse()?;
    let layers = models::layers(&spec, classes, (side, side))?;
    Ok((layers.iter().map(|l| l.parameters).sum(), layers.iter().map(|l| l.flop).sum()))
}

fn scores(dir: &Path) -> Result<Scores> {
    let train::Scores { best_epoch, parts, .. } = train::Scores::read(dir)?;
    let curve = read_metrics(&dir.join(log::METRICS))?;
    let mut steps: Vec<f64> =
        read_steps(&dir.join(log::STEPS))?.iter().map(|s| s.step_ms).collect();
    steps.sort_by(f64::total_cmp);
    let step_ms = percentile(&steps, 0.5).unwrap_or(0.0);
    let (seconds, peak_bytes) = cost(dir)?;
    Ok(Scores { best_epoch: best_epoch.unwrap_or(0), parts, curve, step_ms, seconds, peak_bytes })
}

/// Seconds of a run's steps, and most bytes of its tensors; zeros where it failed.
fn cost(dir: &Path) -> Result<(f64, u64)> {
    Ok(Cost::read(dir)?.map_or((0.0, 0), |cost| (cost.step_seconds, cost.memory_peak_bytes as u64)))
}

/// A space in words.
fn words(space: &Space) -> String {
    match space {
        Space::Choice(values) => {
            values.iter().map(|v| v.to_string()).collect::<Vec<_>>().join(", ")
        }
        Space::Range(Range { from, to, log }) => {
            format!("{from} to {to}{}", if *log { ", uniform in the logarithm" } else { "" })
        }
    }
}
