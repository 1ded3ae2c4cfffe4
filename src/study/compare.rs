//! What a study's runs amount to: means with intervals, and every model held against its baseline.
//!
//! A data set has up to two parts to judge on. In distribution, where test images come from where the training images do: `id_test`
//! where a domain is held out, else `test`. Out of distribution: `test` where a domain is held out. The comparisons of a study on one kind of part,
//! over all data sets and models, are one family for Holm's correction; in distribution is the primary one. Comparisons that are planned but
//! have no p yet count in their family, so that nothing becomes significant because a study is unfinished.
//!
//! The verdict follows from Welch's test of the seeds' balanced accuracies, corrected. All else is beside it, to be read with it.

use super::answers::{self, Answers};
use super::results::{DataResults, ModelResults, Results, Scores};
use crate::stats::{self, Effect, Interval, MannWhitney, Sample, Welch};
use crate::train::PartMetrics;

/// The probability with which the smallest detectable difference would have been found.
pub const POWER: f64 = 0.8;

/// Where test images come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judged {
    /// From where the training images come.
    InDistribution,
    /// From a domain that no image was trained or chosen on.
    OutOfDistribution,
}

/// Both kinds, the primary one first.
pub const JUDGED: [Judged; 2] = [Judged::InDistribution, Judged::OutOfDistribution];

impl Judged {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::InDistribution => "in distribution",
            Self::OutOfDistribution => "out of distribution",
        }
    }

    /// In a few letters, for tables.
    pub fn short(self) -> &'static str {
        match self {
            Self::InDistribution => "ID",
            Self::OutOfDistribution => "OOD",
        }
    }

    /// The part of a data set that is of this kind, where it has one.
    pub fn part(self, data: &DataResults) -> Option<&'static str> {
        let has_id_test = data.images.iter().any(|(part, _)| part == "id_test");
        match (self, has_id_test) {
            (Self::InDistribution, true) => Some("id_test"),
            (Self::InDistribution, false) => data.holdout_domain.is_none().then_some("test"),
            (Self::OutOfDistribution, true) => Some("test"),
            (Self::OutOfDistribution, false) => data.holdout_domain.as_ref().map(|_| "test"),
        }
    }
}

/// What a model reached on a part of a data set.
#[derive(Debug, Clone)]
pub struct Reached {
    /// The part's kind.
    pub judged: Judged,
    /// Its name: `test` or `id_test`.
    pub part: &'static str,
    /// Seeds with their balanced accuracy, in the order of the runs.
    pub seeds: Vec<(u64, f64)>,
    /// Runs that failed, or have no balanced accuracy on the part.
    pub failed: usize,
    /// Mean over the seeds.
    pub mean: Option<f64>,
    /// Standard deviation over the seeds.
    pub sd: Option<f64>,
    /// Student's interval of the mean, over seeds.
    pub interval: Option<Interval>,
    /// Bootstrap interval of the mean, over test images.
    pub images: Option<Interval>,
}

/// A model on a data set.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Place of the data set in the results.
    pub dataset: usize,
    /// Place of the model in the data set.
    pub model: usize,
    /// For each part that is judged.
    pub reached: Vec<Reached>,
}

/// What the corrected test says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Significantly better than the baseline.
    Better,
    /// Significantly worse.
    Worse,
    /// No significant difference, which is not the same as none.
    NotSignificant,
    /// There is no test: fewer than two seeds of either, or no spread in either.
    Untested,
}

/// Paired answers of two models' majority votes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Votes {
    /// Images that only the model's vote got right.
    pub only_model: u64,
    /// Images that only the baseline's vote got right.
    pub only_baseline: u64,
    /// McNemar's exact p.
    pub p: f64,
}

/// A model against its baseline on a part.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Place of the data set in the results.
    pub dataset: usize,
    /// Place of the model in the data set.
    pub model: usize,
    /// Place of its baseline in the data set.
    pub baseline: usize,
    /// The part's kind.
    pub judged: Judged,
    /// Its name.
    pub part: &'static str,
    /// How many seeds count, the model's and the baseline's, and their spread; `None` where either has fewer than two.
    pub samples: Option<[Sample; 2]>,
    /// Welch's test: the primary one. Differences are the model's less the baseline's.
    pub welch: Option<Welch>,
    /// Welch's p after Holm's correction over the family.
    pub adjusted: Option<f64>,
    /// Comparisons in the family.
    pub family: usize,
    /// The Mann-Whitney test, which looks at ranks alone.
    pub mann_whitney: Option<MannWhitney>,
    /// Hedges' g.
    pub effect: Option<Effect>,
    /// Difference that the test would have found with a probability of [`POWER`] at the level of the strictest of Holm's steps, alpha / family.
    pub detectable: Option<f64>,
    /// Bootstrap interval of the difference over test images.
    pub images: Option<Interval>,
    /// McNemar's test of the majority votes.
    pub votes: Option<Votes>,
    /// What follows.
    pub verdict: Verdict,
}

/// All that follows from a study's results.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    /// Every model on every data set, in the study's order.
    pub models: Vec<Summary>,
    /// Every comparison that the study asks for: data set after data set, model after model, in distribution first.
    pub comparisons: Vec<Comparison>,
    /// Predictions that could not be read, and what is missing therefore.
    pub notes: Vec<String>,
}

/// A run's metrics on a part.
pub fn part_of<'a>(scores: &'a Scores, part: &str) -> Option<&'a PartMetrics> {
    scores.parts.iter().find(|p| p.part == part)
}

/// Compares everything that a study asks to be compared, as far as its runs are done. Reads the predictions of its runs; what cannot be read is
/// told in [`Findings::notes`].
pub fn compare(results: &Results) -> Findings {
    let mut findings = Findings::default();
    for dataset in 0..results.datasets.len() {
        let data = &results.datasets[dataset];
        let summary = |model| Summary { dataset, model, reached: Vec::new() };
        let mut models: Vec<Summary> = (0..data.models.len()).map(summary).collect();
        for judged in JUDGED {
            if let Some(part) = judged.part(data) {
                judge(results, dataset, (judged, part), &mut models, &mut findings);
            }
        }
        findings.models.extend(models);
    }
    let place = |c: &Comparison| (c.dataset, c.model, c.judged != Judged::InDistribution);
    findings.comparisons.sort_by_key(place);
    correct(results.alpha, &mut findings.comparisons);
    findings
}

/// One part of one data set: what each model reached, and its comparisons without what follows from all of them.
fn judge(
    results: &Results,
    dataset: usize,
    (judged, part): (Judged, &'static str),
    models: &mut [Summary],
    findings: &mut Findings,
) {
    let data = &results.datasets[dataset];
    let level = 1.0 - results.alpha;
    let mut answers = Vec::new();
    for (model, summary) in data.models.iter().zip(&mut *models) {
        let said = answers::read(model, part).unwrap_or_else(|error| {
            findings.notes.push(format!(
                "{} on {}, {part}: no interval over test images and no McNemar test, because predictions cannot be read: {error}",
                model.name, data.name
            ));
            None
        });
        summary.reached.push(reached(model, (judged, part), level, said.as_ref()));
        answers.push(said);
    }
    for (model, baseline) in
        data.models.iter().enumerate().filter_map(|(i, m)| Some((i, m.baseline?)))
    {
        let of =
            |place: usize| models[place].reached.last().map(|r| r.values()).unwrap_or_default();
        let (ours, theirs) = (of(model), of(baseline));
        let said = answers[model].as_ref().zip(answers[baseline].as_ref());
        let said =
            said.filter(|(ours, theirs)| ours.ids == theirs.ids && ours.labels == theirs.labels);
        findings.comparisons.push(Comparison {
            dataset,
            model,
            baseline,
            judged,
            part,
            samples: sample(&ours).zip(sample(&theirs)).map(<[Sample; 2]>::from),
            welch: stats::welch(&ours, &theirs, level),
            adjusted: None,
            family: 0,
            mann_whitney: stats::mann_whitney(&ours, &theirs),
            effect: stats::hedges(&ours, &theirs, level, 0),
            detectable: None,
            images: said.and_then(|(ours, theirs)| {
                let difference: Vec<f64> =
                    ours.right.iter().zip(&theirs.right).map(|(a, b)| a - b).collect();
                stats::balanced_interval(&ours.labels, &difference, level, 0)
            }),
            votes: said.map(|(ours, theirs)| votes(ours, theirs)),
            verdict: Verdict::Untested,
        });
    }
}

fn reached(
    model: &ModelResults,
    (judged, part): (Judged, &'static str),
    level: f64,
    said: Option<&Answers>,
) -> Reached {
    let score = |scores: &Scores| part_of(scores, part)?.balanced_accuracy;
    let seed = |run: &super::results::Run| Some((run.seed, score(run.scores.as_ref().ok()?)?));
    let seeds: Vec<(u64, f64)> = model.runs.iter().filter_map(seed).collect();
    let values: Vec<f64> = seeds.iter().map(|s| s.1).collect();
    Reached {
        judged,
        part,
        failed: model.runs.len() - seeds.len(),
        mean: stats::mean(&values),
        sd: stats::sd(&values),
        interval: stats::mean_interval(&values, level),
        images: said.and_then(|a| stats::balanced_interval(&a.labels, &a.right, level, 0)),
        seeds,
    }
}

impl Reached {
    /// Balanced accuracies without their seeds.
    pub fn values(&self) -> Vec<f64> {
        self.seeds.iter().map(|s| s.1).collect()
    }
}

fn sample(values: &[f64]) -> Option<Sample> {
    Some(Sample { n: values.len(), sd: stats::sd(values)? })
}

fn votes(ours: &Answers, theirs: &Answers) -> Votes {
    let rights = ours.voted.iter().zip(&theirs.voted).zip(&ours.labels);
    let (mut only_model, mut only_baseline) = (0, 0);
    for ((a, b), label) in rights {
        only_model += u64::from(a == label && b != label);
        only_baseline += u64::from(b == label && a != label);
    }
    Votes { only_model, only_baseline, p: stats::mcnemar(only_model, only_baseline) }
}

/// What follows from all comparisons of a family.
fn correct(alpha: f64, comparisons: &mut [Comparison]) {
    for judged in JUDGED {
        let mut family: Vec<&mut Comparison> =
            comparisons.iter_mut().filter(|c| c.judged == judged).collect();
        let p: Vec<f64> = family.iter().map(|c| c.welch.map_or(1.0, |w| w.p)).collect();
        let size = family.len();
        for (comparison, adjusted) in family.iter_mut().zip(stats::holm(&p)) {
            comparison.family = size;
            comparison.detectable = comparison
                .samples
                .and_then(|[a, b]| stats::detectable(a, b, alpha / size as f64, POWER));
            let Some(welch) = comparison.welch else { continue };
            comparison.adjusted = Some(adjusted);
            comparison.verdict = match adjusted < alpha {
                true if welch.difference > 0.0 => Verdict::Better,
                true => Verdict::Worse,
                false => Verdict::NotSignificant,
            };
        }
    }
}

impl Findings {
    /// What a model reached on a kind of part.
    pub fn reached(&self, dataset: usize, model: usize, judged: Judged) -> Option<&Reached> {
        let summary = self.models.iter().find(|m| m.dataset == dataset && m.model == model)?;
        summary.reached.iter().find(|r| r.judged == judged)
    }

    /// A model's comparison on a kind of part.
    pub fn comparison(&self, dataset: usize, model: usize, judged: Judged) -> Option<&Comparison> {
        let same = |c: &&Comparison| (c.dataset, c.model, c.judged) == (dataset, model, judged);
        self.comparisons.iter().find(same)
    }
}
