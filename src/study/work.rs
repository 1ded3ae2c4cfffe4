//! Workers: each takes the first trial that is ready and nobody's, until there is none.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::config::Study;
use super::folder::{Folder, Outcome};
use super::gather;
use super::optuna;
use super::plan::{Plan, Stage, Task, Trial};
use super::run::Runner;
use crate::train::Progress;
use crate::train::images;
use crate::{Device, Error, Result};

/// How long a worker rests at first and at most when all that is left is in other hands: a shared disk may have hundreds that wait.
const REST: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// How to work on a study.
#[derive(Debug, Clone)]
pub struct Work {
    /// Trials at a time, each in a process of its own.
    pub workers: usize,
    /// How they are run.
    pub runner: Runner,
    /// Do only what the trial of this place needs, and it.
    pub index: Option<usize>,
    /// How to show the work.
    pub progress: Progress,
}

/// What is left when the work ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Worked {
    /// Trials that this call ran.
    pub ran: usize,
    /// Trials of the study that failed, by whomever.
    pub failed: usize,
    /// Runs that were to judge and never will: failed, or without a winner to train.
    pub unjudged: usize,
    /// Trials of the study that are not done.
    pub open: usize,
}

/// What workers share.
struct Shared<'a> {
    study: &'a Study,
    plan: Plan<'a>,
    folder: &'a Folder,
    work: &'a Work,
    /// The split's file of each data set.
    splits: Vec<PathBuf>,
    stop: AtomicBool,
    ran: Mutex<usize>,
}

impl Work {
    /// Works until every trial is done, or the one that was asked for.
    ///
    /// Errors: `Usage` for a study that cannot run (data that are not there, a model that does not fit its images, a device that is not here),
    /// before any trial; those of files. A trial that fails is an outcome, not an error.
    pub fn run(&self, study: &Study, folder: &Folder) -> Result<Worked> {
        let plan = Plan::new(study)?;
        if let Some(index) = self.index {
            super::plan::check_index(index, plan.places().len())?;
        }
        let splits = prepare(study, folder, &self.runner, self.progress)?;
        folder.write_study(study)?;
        let shared = Shared {
            study,
            plan,
            folder,
            work: self,
            splits,
            stop: AtomicBool::new(false),
            ran: Mutex::new(0),
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> =
                (0..self.workers.max(1)).map(|_| scope.spawn(|| shared.worker())).collect();
            let ended = workers.into_iter().map(|w| {
                w.join().unwrap_or_else(|_| Err(Error::Training("a worker panicked".into())))
            });
            // All of them are waited for before the first error is told.
            ended.collect::<Vec<_>>().into_iter().collect::<Result<()>>()
        })?;
        let (tasks, outcomes) = gather::tasks(study, &shared.plan, folder)?;
        let open =
            tasks.iter().filter(|task| !task.is_done(&|id| outcomes.contains_key(id))).count();
        let failed = outcomes.values().filter(|o| o.error.is_some()).count();
        let judges = shared.plan.places().iter().map(|place| matches!(place.stage, Stage::Seed(_)));
        let lost = |task: &Task| match task {
            Task::Trial(trial) => outcomes.get(&trial.id).is_some_and(|o| o.error.is_some()),
            Task::Ask | Task::Waits(_) => false,
            Task::Void => true,
        };
        let unjudged = judges.zip(&tasks).filter(|(judges, task)| *judges && lost(task)).count();
        let ran = shared.ran.lock().map_or(0, |ran| *ran);
        Ok(Worked { ran, failed, unjudged, open })
    }
}

/// Looks at everything that a trial could stumble over: devices, data, models. Makes the splits.
fn prepare(
    study: &Study,
    folder: &Folder,
    runner: &Runner,
    progress: Progress,
) -> Result<Vec<PathBuf>> {
    let mut splits = vec![PathBuf::new(); study.datasets.len()];
    let mut classes = vec![0; study.datasets.len()];
    for cell in study.cells() {
        let config = study.config(cell)?;
        let (data, model) = (&study.datasets[cell.dataset], &study.models[cell.model]);
        let blame = |e: Error| match e {
            Error::Usage(message) => {
                Error::usage(format!("{} on {}: {message}", model.name, data.name))
            }
            other => other,
        };
        Device::new(runner.device.as_ref().unwrap_or(&config.train.device))?;
        if classes[cell.dataset] == 0 {
            let dataset = images::open(&config)?;
            classes[cell.dataset] = images::num_classes(&config, &dataset)?;
            let (file, parts) = folder.split(&config, &dataset)?;
            splits[cell.dataset] = file;
            let counts = parts.counts().into_iter().map(|(part, n)| format!("{n} {part}"));
            progress.line(&format!(
                "data      {}: {}, {} images ({}), {} classes",
                data.name,
                config.data.path,
                dataset.len(),
                counts.collect::<Vec<_>>().join(", "),
                dataset.classes.len()
            ));
            for (part, names) in parts.absent() {
                progress.line(&format!(
                    "          its {part} part has no images of {}: balanced accuracy there is of the other classes",
                    names.join(", ")
                ));
            }
        }
        let mut sizes = Vec::new();
        for spec in model.spec.all() {
            let (parameters, _) =
                gather::size(spec, classes[cell.dataset], config.data.img_size).map_err(blame)?;
            sizes.push(format!("{spec} ({:.2} M)", parameters as f64 / 1e6));
        }
        progress.line(&format!("model     {} on {}: {}", model.name, data.name, sizes.join(", ")));
    }
    Ok(splits)
}

impl Shared<'_> {
    fn worker(&self) -> Result<()> {
        let result = self.trials();
        // Others finish the trial that they have, and begin none.
        if result.is_err() {
            self.stop.store(true, Ordering::Relaxed);
        }
        result
    }

    fn trials(&self) -> Result<()> {
        let mut rest = REST.0;
        while !self.stop.load(Ordering::Relaxed) {
            let (tasks, outcomes) = gather::tasks(self.study, &self.plan, self.folder)?;
            let done = |id: &str| outcomes.contains_key(id);
            if self.study.search.optuna.is_some() {
                optuna::tell(self.study, self.folder, &tasks, |id| outcomes.get(id).cloned())?;
            }
            let wanted = self.wanted(&tasks);
            if wanted.iter().all(|&index| tasks[index].is_done(&done)) {
                return Ok(());
            }
            let mut took = false;
            for index in wanted {
                took = match &tasks[index] {
                    Task::Trial(trial) => !done(&trial.id) && self.take(index, trial)?,
                    Task::Ask => self.ask(index)?,
                    Task::Waits(_) | Task::Void => false,
                };
                if took {
                    break;
                }
            }
            if took {
                rest = REST.0;
            } else {
                std::thread::sleep(rest);
                rest = (rest * 3 / 2).min(REST.1);
            }
        }
        Ok(())
    }

    /// Places to work on: all, or the one that was asked for with all that it waits for.
    fn wanted(&self, tasks: &[Task]) -> Vec<usize> {
        let Some(index) = self.work.index else { return (0..tasks.len()).collect() };
        let mut wanted = vec![index];
        let mut next = 0;
        while next < wanted.len() {
            if let Task::Waits(others) = &tasks[wanted[next]] {
                let new: Vec<usize> =
                    others.iter().copied().filter(|i| !wanted.contains(i)).collect();
                wanted.extend(new);
            }
            next += 1;
        }
        wanted.sort_unstable();
        wanted
    }

    /// Asks for the setting of a place; `false` where another worker is asking.
    fn ask(&self, index: usize) -> Result<bool> {
        let place = self.plan.places()[index];
        match place.stage {
            Stage::Search { place: number, .. } => {
                optuna::ask(self.study, self.folder, place.cell, number)
            }
            Stage::Seed(_) => Ok(false),
        }
    }

    /// Runs a trial; `false` where another worker has it.
    fn take(&self, index: usize, trial: &Trial) -> Result<bool> {
        let Some(_claim) = self.folder.claim(&trial.id)? else { return Ok(false) };
        // Another may have finished it since the plan was made.
        if self.folder.outcome(&trial.id)?.is_some() {
            return Ok(true);
        }
        let start = Instant::now();
        let outcome =
            self.work.runner.run(self.folder, trial, &self.splits[trial.place.cell.dataset])?;
        if let Ok(mut ran) = self.ran.lock() {
            *ran += 1;
        }
        self.say(index, trial, &outcome, start.elapsed());
        Ok(true)
    }

    fn say(&self, index: usize, trial: &Trial, outcome: &Outcome, took: Duration) {
        let (data, model) = (
            &self.study.datasets[trial.place.cell.dataset],
            &self.study.models[trial.place.cell.model],
        );
        let result = match (&outcome.val_balanced_accuracy, &outcome.error) {
            (Some(val), _) => format!("val bal. acc. {val:.3}"),
            (None, error) => format!("FAILED: {}", error.as_deref().unwrap_or("no reason given")),
        };
        self.work.progress.line(&format!(
            "[{index:>3} of {}]  {}  {}  {}: {result}  {:.0} s  ({}; {})",
            self.plan.places().len(),
            data.name,
            model.name,
            stage(trial),
            took.as_secs_f64(),
            trial.setting.spec,
            trial.setting.text()
        ));
    }
}

/// A trial's stage in words.
pub fn stage(trial: &Trial) -> String {
    match trial.place.stage {
        Stage::Search { rung, place } => {
            format!("search, rung {rung}.{place}, {} epochs", trial.config.train.epochs)
        }
        Stage::Seed(n) => format!("seed {} ({})", n + 1, trial.config.train.seed),
    }
}
