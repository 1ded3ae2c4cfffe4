//! What a study found: gathered from its trials' directories into plain data, from which tables, tests and the report are made.

use std::path::PathBuf;

use super::space::Setting;
use crate::train::PartMetrics;
use crate::train::log::EpochRow;

/// A study's results, finished or not.
#[derive(Debug, Clone)]
pub struct Results {
    /// The study's name.
    pub name: String,
    /// What its file says of it.
    pub about: String,
    /// Significance level after Holm's correction.
    pub alpha: f64,
    /// Seeds that each winner is to have.
    pub seeds: usize,
    /// Models of the study's file that were left out.
    pub left_out: Vec<String>,
    /// Trials that are not done.
    pub open: usize,
    /// Whether settings were asked of Optuna instead of drawn.
    pub asked: bool,
    /// What was searched, a line a key: `optim.lr`, `0.0001 to 0.1, log`.
    pub space: Vec<(String, String)>,
    /// Settings drawn for each model, and epochs of the rungs.
    pub search: (usize, Vec<usize>),
    /// Machine, device, versions, commands.
    pub environment: Vec<(String, String)>,
    /// One for each data set.
    pub datasets: Vec<DataResults>,
}

/// What was found on a data set.
#[derive(Debug, Clone)]
pub struct DataResults {
    /// Its name in the study.
    pub name: String,
    /// Where its images came from.
    pub path: String,
    /// The domain that `test` consists of, where one is held out.
    pub holdout_domain: Option<String>,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// Number of images by part, parts without images left out.
    pub images: Vec<(String, usize)>,
    /// Classes that are trained on and have no image in a part by which models are chosen or judged: part and classes.
    pub absent: Vec<(String, Vec<String>)>,
    /// One for each model, in the study's order.
    pub models: Vec<ModelResults>,
}

/// What a model reached on a data set.
#[derive(Debug, Clone)]
pub struct ModelResults {
    /// Its name in the study.
    pub name: String,
    /// The place, among the data set's models, of the one that it is compared with.
    pub baseline: Option<usize>,
    /// What the search tried, rung after rung.
    pub tried: Vec<Tried>,
    /// The winner of the search, once it is known.
    pub winner: Option<Setting>,
    /// Learned numbers of the winner.
    pub parameters: usize,
    /// FLOP of the winner's products for one image forward, a multiply-add counted as two.
    pub flop: f64,
    /// The runs of the winner, a fresh seed each.
    pub runs: Vec<Run>,
}

/// A trial of the search.
#[derive(Debug, Clone)]
pub struct Tried {
    /// Rung of successive halving, from 0.
    pub rung: usize,
    /// Epochs that it ran.
    pub epochs: usize,
    /// Number of its setting in the search.
    pub number: usize,
    /// What was drawn.
    pub setting: Setting,
    /// Best validation balanced accuracy over its epochs, or why there is none.
    pub val: Result<f64, String>,
    /// Seconds of its steps, waiting for data included.
    pub seconds: f64,
    /// Its run directory.
    pub dir: PathBuf,
}

/// A run of a winner.
#[derive(Debug, Clone)]
pub struct Run {
    /// The run's `train.seed`.
    pub seed: u64,
    /// Its run directory, with `predictions_<part>.csv`.
    pub dir: PathBuf,
    /// What it reached, or why it failed.
    pub scores: Result<Scores, String>,
}

/// What a run reached.
#[derive(Debug, Clone)]
pub struct Scores {
    /// The epoch (from 1) that was best on `val`, whose weights these scores are of.
    pub best_epoch: u64,
    /// `val`, `test`, and `id_test` where there is one.
    pub parts: Vec<PartMetrics>,
    /// A row an epoch.
    pub curve: Vec<EpochRow>,
    /// Median milliseconds of a training step, without waiting for data.
    pub step_ms: f64,
    /// Seconds of all steps, waiting for data included.
    pub seconds: f64,
    /// Most bytes that tensors took on the device; 0 where not known.
    pub peak_bytes: u64,
}
