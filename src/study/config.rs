//! The file that describes a study: which models on which data, what is searched, how many seeds judge.
//!
//! ```toml
//! name = "quick"
//! seeds = 10
//!
//! [search]
//! trials = 9                # settings drawn for each model on each data set
//! epochs = [2, 4, 12]       # successive halving: all settings for 2 epochs, the best third for 4, ...
//!
//! [search.space]            # any key of a run's config
//! "optim.lr" = { from = 1e-4, to = 1e-1, log = true }
//! "augment.policy" = ["none", "flips"]
//!
//! [config.train]            # settings of every run, laid over the defaults of `attn2d train`
//! batch_size = 32
//!
//! [[datasets]]
//! name = "long range"
//! config.data = { path = "synthetic:longrange", synthetic_count = 600 }
//!
//! [[models]]
//! name = "plain"
//! spec = "resnet18"
//!
//! [[models]]
//! name = "GA"
//! spec = ["resnet18+ga@4", "resnet18+ga@4:heads=4"]     # which of them is searched too
//! baseline = "plain"
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::Table;

use super::optuna::Optuna;
use super::space::{Space, is_a_matter_of_the_run};
use crate::config::{Config, Layers, parse_file};
use crate::models::Spec;
use crate::{Error, Result};

/// A study as its file says it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// What the report calls it, and the folder's name where none is given.
    pub name: String,
    /// A sentence or more for the head of the report.
    #[serde(default)]
    pub about: String,
    /// The folder of trials and results; empty for `studies/<name>`.
    #[serde(default)]
    pub output: String,
    /// Runs of each winner with fresh seeds, which are what is compared. At least 2.
    #[serde(default = "seeds")]
    pub seeds: usize,
    /// Significance level of the verdict, after Holm's correction.
    #[serde(default = "alpha")]
    pub alpha: f64,
    /// Which files of weights stay when a trial is done.
    #[serde(default)]
    pub keep: Keep,
    /// The search for each model's settings.
    #[serde(default)]
    pub search: Search,
    /// Settings of every run, as in a run's config file.
    #[serde(default)]
    pub config: Table,
    /// The data sets.
    pub datasets: Vec<Data>,
    /// The models.
    pub models: Vec<Model>,
    /// Names of models of the file that this call leaves out.
    #[serde(skip)]
    pub left_out: Vec<String>,
}

/// `[search]`: what is tried before the seeds. The same for every model on every data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Search {
    /// Settings drawn at random; 1 with an empty space trains the settings of the file.
    pub trials: usize,
    /// Successive halving: epochs of each rung. All settings run the first, the best share of them the next, each from new weights with a
    /// whole schedule of that length. One number is plain random search.
    pub epochs: Vec<usize>,
    /// One of how many goes on to the next rung.
    pub eta: usize,
    /// Seed of the draws.
    pub seed: u64,
    /// Keys and what they are drawn from.
    pub space: BTreeMap<String, Space>,
    /// Ask Optuna for the settings instead of drawing them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub optuna: Option<Optuna>,
}

/// Which files of weights stay when a trial is done. The numbers always stay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// None.
    None,
    /// Of the seeds that judge, the weights of the best epoch; of the search none.
    #[default]
    Best,
    /// Every checkpoint of every trial.
    All,
}

/// `[[datasets]]`: images, and what of a run's settings depends on them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// What the report calls it; unique.
    pub name: String,
    /// Laid over the study's `config`.
    pub config: Table,
}

/// `[[models]]`: a row of the report on each data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// What the report calls it; unique.
    pub name: String,
    /// A model string, or several of which the search draws one: placements, windows, heads.
    pub spec: OneOrMore,
    /// The model that it is compared with; the study's first where none is named.
    #[serde(default)]
    pub baseline: Option<String>,
    /// The data sets that it is trained on; all where none are named.
    #[serde(default)]
    pub datasets: Vec<String>,
    /// Laid over the data set's `config`.
    #[serde(default)]
    pub config: Table,
}

/// A text or a list of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMore {
    /// One.
    One(String),
    /// Several.
    More(Vec<String>),
}

impl OneOrMore {
    /// All of them.
    pub fn all(&self) -> &[String] {
        match self {
            Self::One(text) => std::slice::from_ref(text),
            Self::More(texts) => texts,
        }
    }
}

fn seeds() -> usize {
    10
}

fn alpha() -> f64 {
    0.05
}

impl Default for Search {
    fn default() -> Self {
        Self {
            trials: 1,
            epochs: Vec::new(),
            eta: 3,
            seed: 0,
            space: BTreeMap::new(),
            optuna: None,
        }
    }
}

/// A model on a data set, by their places in the study.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    /// Place in [`Study::datasets`].
    pub dataset: usize,
    /// Place in [`Study::models`].
    pub model: usize,
}

impl Study {
    /// Reads a study's file, lays assignments such as `seeds=3`, `search.trials=9`, `config.data.img_size=64` or
    /// `datasets.NAME.config.data.path=PATH` over it, and checks it. Errors (exit code 2) name file, line and key, or the assignment.
    pub fn load(path: &Path, assignments: &[String]) -> Result<Self> {
        let mut study: Self = parse_file(path)?;
        for assignment in assignments {
            study = study.with(assignment)?;
        }
        if study.output.is_empty() {
            study.output = format!("studies/{}", crate::train::run_dir::file_name(&study.name));
        }
        let blame = |e: Error| Error::usage(format!("{}: {e}", path.display()));
        study.check().map_err(blame)?;
        Ok(study)
    }

    /// Every model on every data set that it is for, data set after data set.
    pub fn cells(&self) -> Vec<Cell> {
        let of = |dataset: usize| {
            let name = &self.datasets[dataset].name;
            let on_it = move |m: &Model| m.datasets.is_empty() || m.datasets.contains(name);
            let models = self.models.iter().enumerate().filter(move |(_, m)| on_it(m));
            models.map(move |(model, _)| Cell { dataset, model })
        };
        (0..self.datasets.len()).flat_map(of).collect()
    }

    /// The model that another is compared with on a data set, where it has one there: not the first, nor one whose baseline is elsewhere.
    pub fn baseline(&self, cell: Cell) -> Option<Cell> {
        let named = self.models[cell.model].baseline.as_ref();
        let on_it: Vec<Cell> =
            self.cells().into_iter().filter(|c| c.dataset == cell.dataset).collect();
        let found = match named {
            Some(name) => on_it.into_iter().find(|c| self.models[c.model].name == *name),
            None => on_it.into_iter().next(),
        };
        found.filter(|c| *c != cell)
    }

    /// What every run of a cell shares: defaults, the study's, the data set's and the model's settings. The model is the first of its
    /// strings.
    pub fn config(&self, cell: Cell) -> Result<Config> {
        let (data, model) = (&self.datasets[cell.dataset], &self.models[cell.model]);
        let mut layers = Layers::new();
        layers.table("config", &self.config)?;
        layers.table(&format!("config of the data set {:?}", data.name), &data.config)?;
        layers.table(&format!("config of the model {:?}", model.name), &model.config)?;
        let mut config = layers.finish()?;
        config.model.name = model.spec.all().first().cloned().unwrap_or_default();
        Ok(config)
    }

    /// Epochs of the search's rungs; where none are named, one of as many as the seeds have.
    pub fn rungs(&self, cell: Cell) -> Result<Vec<usize>> {
        if self.search.epochs.is_empty() {
            return Ok(vec![self.config(cell)?.train.epochs]);
        }
        Ok(self.search.epochs.clone())
    }

    fn check(&self) -> Result<()> {
        let fail = |message: String| Err(Error::usage(message));
        if !self.name.contains(|c: char| c.is_alphanumeric()) {
            return fail(format!("name = {:?}: must have a letter or a digit", self.name));
        }
        if self.seeds < 2 {
            return fail(format!(
                "seeds = {}: must be at least 2, or nothing can be said of their spread",
                self.seeds
            ));
        }
        if !(self.alpha > 0.0 && self.alpha < 0.5) {
            return fail(format!("alpha = {}: must lie between 0 and 0.5", self.alpha));
        }
        let names = |what: &str, names: Vec<&String>| match names
            .iter()
            .enumerate()
            .find(|(i, n)| names[..*i].contains(n) || n.trim().is_empty())
        {
            _ if names.is_empty() => fail(format!("there are no {what}; add [[{what}]]")),
            Some((_, name)) => {
                fail(format!("[[{what}]] name = {name:?}: names must be unique and not empty"))
            }
            None => Ok(()),
        };
        names("datasets", self.datasets.iter().map(|d| &d.name).collect())?;
        names("models", self.models.iter().map(|m| &m.name).collect())?;
        for model in &self.models {
            let known = |name: &String, among: Vec<&String>, what: &str| match among.contains(&name)
            {
                true => Ok(()),
                false => {
                    fail(format!("model {:?}: {what} {name:?} is none of the study's", model.name))
                }
            };
            if let Some(name) = &model.baseline {
                known(name, self.models.iter().map(|m| &m.name).collect(), "baseline")?;
            }
            for name in &model.datasets {
                known(name, self.datasets.iter().map(|d| &d.name).collect(), "data set")?;
            }
            if model.spec.all().is_empty() {
                return fail(format!("model {:?}: spec is an empty list", model.name));
            }
            for spec in model.spec.all() {
                spec.parse::<Spec>()?;
            }
            if model.baseline.as_ref() == Some(&model.name) {
                return fail(format!("model {:?}: is its own baseline", model.name));
            }
            let data = model.config.get("data").and_then(toml::Value::as_table);
            let keys = data.into_iter().flatten().map(|(key, _)| format!("data.{key}"));
            if let Some(key) = keys.into_iter().find(|key| !is_a_matter_of_the_run(key)) {
                return fail(format!(
                    "model {:?}: config: {key} belongs to a data set: all models have the same images in the same parts",
                    model.name
                ));
            }
        }
        self.check_search()?;
        self.cells().into_iter().try_for_each(|cell| self.config(cell).map(|_| ()))
    }

    fn check_search(&self) -> Result<()> {
        let fail = |message: &str| Err(Error::usage(format!("[search] {message}")));
        let search = &self.search;
        if search.trials == 0 || search.eta < 2 {
            return fail("trials must be at least 1 and eta at least 2");
        }
        if search.epochs.contains(&0) || search.epochs.windows(2).any(|w| w[0] >= w[1]) {
            return fail("epochs must be numbers above 0 that grow, as in [1, 3, 9]");
        }
        let asks = search.optuna.is_some();
        if asks && search.trials == 1 {
            return fail("optuna: trials must be above 1, or there is nothing to ask for");
        }
        for (key, space) in &search.space {
            if asks && space.has_lists() {
                return fail(&format!("space {key:?}: Optuna knows no choice between lists"));
            }
            for cell in self.cells() {
                space.check(key, &self.config(cell)?)?;
            }
        }
        Ok(())
    }
}
