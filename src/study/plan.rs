//! What is to be done, and in which order: a pure function of the study and of what its trials have reached so far.
//!
//! The places of a study are counted once and for all (`--list`, `--index`): for each cell the rungs of its search, then its seeds. Which
//! setting stands at a place of a later rung, and which the seeds train, follows from the validation scores of the rung before; until those
//! are there the place waits. Nothing is written down of this: whoever sees the same outcomes makes the same plan.

use super::config::{Cell, Study};
use super::space::{Setting, draw, name_number};
use crate::config::Config;
use crate::{Error, Result};

/// A place in the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The model and the data set.
    pub cell: Cell,
    /// What of it.
    pub stage: Stage,
}

/// What is done at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// One of the settings of a rung of the search, best of the rung before first.
    Search {
        /// The rung, from 0.
        rung: usize,
        /// The place in it, from 0.
        place: usize,
    },
    /// The winner with a fresh seed, from 0.
    Seed(usize),
}

/// A trial: a run with all its settings.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    /// The place that it is for.
    pub place: Place,
    /// Number of its setting in the search.
    pub number: usize,
    /// What was drawn.
    pub setting: Setting,
    /// The run's config, but for its directory and its split.
    pub config: Config,
    /// The name of its directory: the first 16 digits of [`Config::identity`].
    pub id: String,
}

/// What stands at a place.
#[derive(Debug, Clone, PartialEq)]
pub enum Task {
    /// A trial, done or not.
    Trial(Box<Trial>),
    /// Nothing yet: its setting is to be asked for ([`super::optuna`]).
    Ask,
    /// Nothing yet: trials at these places decide.
    Waits(Vec<usize>),
    /// Nothing ever: too few trials of the rung before succeeded.
    Void,
}

impl Task {
    /// Whether nothing is left to do; `done` says so of a trial's id.
    pub fn is_done(&self, done: &dyn Fn(&str) -> bool) -> bool {
        match self {
            Self::Trial(trial) => done(&trial.id),
            Self::Ask | Self::Waits(_) => false,
            Self::Void => true,
        }
    }
}

/// What a trial came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reached {
    /// Its best validation balanced accuracy.
    Val(f64),
    /// It failed.
    Failed,
}

/// What a plan depends on beside the study.
pub struct Known<'a> {
    /// What became of the trial of an id; `None` where it is not done.
    pub reached: &'a dyn Fn(&str) -> Result<Option<Reached>>,
    /// The setting that was asked for, for a number of a cell's search; `None` where none was. Only studies that ask need it.
    pub asked: &'a dyn Fn(Cell, usize) -> Result<Option<Setting>>,
}

/// Every place of a study, in the order in which they are worked on.
pub struct Plan<'a> {
    study: &'a Study,
    places: Vec<Place>,
}

impl<'a> Plan<'a> {
    /// Counts the places of a study.
    pub fn new(study: &'a Study) -> Result<Self> {
        let mut places = Vec::new();
        for cell in study.cells() {
            for (rung, size) in sizes(study, cell)?.into_iter().enumerate() {
                places.extend(
                    (0..size).map(|place| Place { cell, stage: Stage::Search { rung, place } }),
                );
            }
            places.extend((0..study.seeds).map(|n| Place { cell, stage: Stage::Seed(n) }));
        }
        Ok(Self { study, places })
    }

    /// All of them.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// What stands at each place.
    ///
    /// Errors: those of a config that a drawn setting breaks.
    pub fn tasks(&self, known: &Known) -> Result<Vec<Task>> {
        // Places of a rung stand before those that wait for it.
        let mut tasks = Vec::with_capacity(self.places.len());
        for place in &self.places {
            let task = match self.setting(*place, &tasks, known)? {
                Ok((number, setting)) => {
                    Task::Trial(Box::new(self.trial(*place, number, setting)?))
                }
                Err(task) => task,
            };
            tasks.push(task);
        }
        Ok(tasks)
    }

    /// The setting of a place, by number in the search and values, or what stands there instead.
    fn setting(
        &self,
        place: Place,
        tasks: &[Task],
        known: &Known,
    ) -> Result<Result<(usize, Setting), Task>> {
        let cell = place.cell;
        let rungs = sizes(self.study, cell)?.len();
        let (before, rank) = match place.stage {
            Stage::Search { rung: 0, place } => {
                let drawn = self.drawn(cell, place, known)?;
                return Ok(drawn.map(|setting| (place, setting)).ok_or(Task::Ask));
            }
            Stage::Seed(_) if rungs == 0 => {
                let drawn = self.drawn(cell, 0, known)?;
                return Ok(drawn.map(|setting| (0, setting)).ok_or(Task::Ask));
            }
            Stage::Search { rung, place } => (rung - 1, place),
            Stage::Seed(_) => (rungs - 1, 0),
        };
        let in_it = |p: &Place| {
            p.cell == cell && matches!(p.stage, Stage::Search { rung, .. } if rung == before)
        };
        let (mut scores, mut waits) = (Vec::new(), Vec::new());
        for (index, task) in tasks.iter().enumerate().filter(|(i, _)| in_it(&self.places[*i])) {
            match task {
                Task::Void => {}
                Task::Ask | Task::Waits(_) => waits.push(index),
                Task::Trial(trial) => match (known.reached)(&trial.id)? {
                    None => waits.push(index),
                    Some(Reached::Failed) => {}
                    Some(Reached::Val(score)) => scores.push((score, trial)),
                },
            }
        }
        if !waits.is_empty() {
            return Ok(Err(Task::Waits(waits)));
        }
        // Of equal scores the setting that was drawn first: any fixed rule will do.
        scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.number.cmp(&b.1.number)));
        let found = scores.get(rank).map(|(_, trial)| (trial.number, trial.setting.clone()));
        Ok(found.ok_or(Task::Void))
    }

    fn drawn(&self, cell: Cell, number: usize, known: &Known) -> Result<Option<Setting>> {
        let search = &self.study.search;
        if search.optuna.is_some() {
            return (known.asked)(cell, number);
        }
        Ok(Some(draw(search.seed, number, &search.space, self.study.models[cell.model].spec.all())))
    }

    fn trial(&self, place: Place, number: usize, setting: Setting) -> Result<Trial> {
        let study = self.study;
        let mut config = study.config(place.cell)?;
        for (key, value) in &setting.values {
            config = super::space::set(&config, key, value.clone())?;
        }
        config.model.name.clone_from(&setting.spec);
        // The search's seed is none of those that judge.
        let seed = match place.stage {
            Stage::Search { rung, .. } => {
                config.train.epochs = study.rungs(place.cell)?[rung];
                config.data.seal_test = true;
                0
            }
            Stage::Seed(n) => n as u64 + 1,
        };
        config.train.seed = first_seed(study, place.cell) + seed;
        config.output.dir.clear();
        config.check()?;
        let id = config.identity()[..16].to_owned();
        Ok(Trial { place, number, setting, config, id })
    }
}

/// Trials in each rung of a cell's search; none where there is nothing to choose.
fn sizes(study: &Study, cell: Cell) -> Result<Vec<usize>> {
    let search = &study.search;
    if search.trials == 1 {
        return Ok(Vec::new());
    }
    let divide = |n: &usize| Some((n / search.eta).max(1));
    Ok(std::iter::successors(Some(search.trials), divide).take(study.rungs(cell)?.len()).collect())
}

/// The seed of a cell's search; those that judge follow it. It comes from the names of data set and model, so that another model in the study
/// changes nothing for this one, and no two models share their luck.
fn first_seed(study: &Study, cell: Cell) -> u64 {
    let (data, model) = (&study.datasets[cell.dataset].name, &study.models[cell.model].name);
    name_number(&format!("{data}\n{model}")) % 1_000_000 * 1000
}

/// Refuses an index that no place has.
pub fn check_index(index: usize, places: usize) -> Result<()> {
    if index < places {
        return Ok(());
    }
    Err(Error::usage(format!(
        "--index {index}: the study has {places} trials, numbered from 0; --list shows them"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn study(search: &str) -> Study {
        let text = format!(
            "name = \"s\"\nseeds = 2\n[search]\n{search}\n[search.space]\n\"optim.lr\" = {{ from = 1e-4, to = 0.1, log = true }}\n\
             [[datasets]]\nname = \"d\"\nconfig.data = {{ img_size = 32 }}\n[[datasets]]\nname = \"e\"\nconfig.data = {{ img_size = 48 }}\n\
             [[models]]\nname = \"plain\"\nspec = \"resnet18:w8\"\n\
             [[models]]\nname = \"ga\"\nspec = [\"resnet18:w8+ga@4\", \"resnet18:w8+ga@3,4\"]\ndatasets = [\"d\"]\n"
        );
        toml::from_str(&text).unwrap()
    }

    fn tasks_of(plan: &Plan, reached: &dyn Fn(&str) -> Option<Reached>) -> Result<Vec<Task>> {
        plan.tasks(&Known { reached: &|id| Ok(reached(id)), asked: &|_, _| Ok(None) })
    }

    fn trials(tasks: &[Task]) -> Vec<&Trial> {
        fn of(task: &Task) -> Option<&Trial> {
            match task {
                Task::Trial(trial) => Some(trial),
                _ => None,
            }
        }
        tasks.iter().filter_map(of).collect()
    }

    #[test]
    fn places_of_a_study() {
        let study = study("trials = 9\nepochs = [1, 3, 9]");
        let plan = Plan::new(&study).unwrap();
        // Three cells, each 9 + 3 + 1 trials of search and 2 seeds.
        assert_eq!(plan.places().len(), 3 * 15);
        let tasks = tasks_of(&plan, &|_| None).unwrap();
        assert_eq!(trials(&tasks).len(), 27, "the first rungs");
        assert_eq!(tasks[9], Task::Waits((0..9).collect()));
        assert_eq!(tasks[12], Task::Waits((9..12).collect()));
        assert_eq!(tasks[13], Task::Waits(vec![12]));
        let ids: std::collections::HashSet<_> =
            trials(&tasks).iter().map(|t| t.id.clone()).collect();
        assert_eq!(ids.len(), 27, "no two trials share a directory");
        assert!(
            trials(&tasks).iter().all(|t| t.config.data.seal_test && t.config.train.epochs == 1)
        );
        let lr = |t: &&Trial| t.config.optim.lr;
        let all = trials(&tasks);
        assert_eq!(
            all[..9].iter().map(lr).collect::<Vec<_>>(),
            all[9..18].iter().map(lr).collect::<Vec<_>>(),
            "equal budgets, equal draws"
        );
    }

    /// Runs a study whose validation scores are a function of the setting.
    fn finish(study: &Study, score: impl Fn(&Trial) -> Reached) -> Vec<Task> {
        let plan = Plan::new(study).unwrap();
        let mut reached = HashMap::new();
        loop {
            let tasks = tasks_of(&plan, &|id: &str| reached.get(id).copied()).unwrap();
            let new: Vec<_> = trials(&tasks)
                .into_iter()
                .filter(|t| !reached.contains_key(&t.id))
                .map(|t| (t.id.clone(), score(t)))
                .collect();
            if new.is_empty() {
                return tasks;
            }
            // One at a time, in whatever order: the plan is the same.
            reached.extend(new.into_iter().next_back());
        }
    }

    #[test]
    fn the_best_go_on_and_the_winner_gets_fresh_seeds() {
        let study = study("trials = 9\nepochs = [1, 3, 9]");
        let tasks = finish(&study, |t| Reached::Val(t.config.optim.lr));
        let all = trials(&tasks);
        assert_eq!(all.len(), 45);
        let first: Vec<f64> = all[..9].iter().map(|t| t.config.optim.lr).collect();
        let mut sorted = first.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        assert_eq!(all[9..12].iter().map(|t| t.config.optim.lr).collect::<Vec<_>>(), sorted[..3]);
        assert_eq!(all[12].config.optim.lr, sorted[0]);
        assert_eq!(all[12].config.train.epochs, 9);
        let seeds: Vec<_> = all[13..15]
            .iter()
            .map(|t| (t.config.train.seed, t.config.optim.lr, t.config.data.seal_test))
            .collect();
        let search = all[0].config.train.seed;
        assert_eq!(seeds, [(search + 1, sorted[0], false), (search + 2, sorted[0], false)]);
        assert_eq!(all[13].config.train.epochs, 5, "as many as the config says");
    }

    #[test]
    fn equal_scores_go_to_the_first_drawn_and_failures_leave_gaps() {
        let study = study("trials = 3\nepochs = [1, 3]\neta = 2");
        let tasks = finish(&study, |_| Reached::Val(0.5));
        assert_eq!(trials(&tasks)[3].number, 0);
        let tasks =
            finish(&study, |t| if t.number == 0 { Reached::Failed } else { Reached::Val(0.5) });
        assert_eq!(trials(&tasks)[3].number, 1);
        let tasks = finish(&study, |_| Reached::Failed);
        assert_eq!(
            tasks[3..6],
            [Task::Void, Task::Void, Task::Void],
            "no winner, nothing to judge"
        );
        let tasks = finish(&study, |t| {
            if t.config.train.epochs == 3 { Reached::Failed } else { Reached::Val(0.5) }
        });
        assert_eq!(tasks[4], Task::Void);
    }

    #[test]
    fn a_study_without_a_search_is_its_seeds() {
        let study = study("trials = 1");
        let plan = Plan::new(&study).unwrap();
        let tasks = tasks_of(&plan, &|_| None).unwrap();
        assert_eq!(trials(&tasks).len(), 6);
        assert!(
            check_index(6, plan.places().len())
                .unwrap_err()
                .to_string()
                .contains("numbered from 0")
        );
    }

    #[test]
    fn another_model_changes_nothing_for_the_others() {
        let study = study("trials = 1");
        let mut more = study.clone();
        more.models.insert(
            0,
            super::super::config::Model { name: "new".into(), ..study.models[0].clone() },
        );
        let ids = |study: &Study| {
            let tasks = tasks_of(&Plan::new(study).unwrap(), &|_| None).unwrap();
            trials(&tasks).iter().map(|t| t.id.clone()).collect::<Vec<_>>()
        };
        let (before, after) = (ids(&study), ids(&more));
        assert!(before.iter().all(|id| after.contains(id)));
        assert_eq!(
            after.len(),
            before.len() + 4,
            "equal models under two names have seeds of their own"
        );
    }
}
