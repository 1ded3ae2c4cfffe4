//! The charts of a report, each with the text around it.

use super::heading;
use super::tables::{self, median};
use crate::html::document::Block;
use crate::html::plot::{Curves, Point, Samples, curves, matrix, samples, scatter};
use crate::stats;
use crate::study::compare::{Findings, JUDGED, Judged, part_of};
use crate::study::results::{ModelResults, Results, Scores};
use crate::study::verdict::{percent_level, points};

/// Classes up to which a matrix's cells have their share in them; beyond, a table has the counts.
const CLASSES_IN_CELLS: usize = 10;

fn percent(share: f64) -> f64 {
    100.0 * share
}

/// An interval to draw. Student's interval of few seeds may go beyond what an accuracy can be; the axis does not.
fn both(interval: Option<stats::Interval>) -> Option<(f64, f64)> {
    interval.map(|i| (percent(i.low.max(0.0)), percent(i.high.min(1.0))))
}

fn kind(model: &ModelResults) -> usize {
    usize::from(model.baseline.is_some())
}

/// Balanced accuracy of every seed, a chart a data set and kind of part.
pub(super) fn seeds(results: &Results, findings: &Findings) -> Vec<Block> {
    let mut charts = Vec::new();
    for (dataset, data) in results.datasets.iter().enumerate() {
        for judged in JUDGED {
            let row = |(i, model): (usize, &ModelResults)| {
                let reached = findings.reached(dataset, i, judged)?;
                Some(Samples {
                    label: model.name.clone(),
                    kind: kind(model),
                    values: reached.values().into_iter().map(percent).collect(),
                    mean: reached.mean.map(percent),
                    interval: both(reached.interval),
                })
            };
            let rows: Vec<Samples> = data.models.iter().enumerate().filter_map(row).collect();
            if rows.iter().all(|r| r.values.is_empty()) {
                continue;
            }
            let words = |r: &Samples| match (r.mean, r.interval) {
                (Some(mean), Some((low, high))) => {
                    format!(
                        "{}: {} seeds, mean {mean:.1} ({low:.1} to {high:.1})",
                        r.label,
                        r.values.len()
                    )
                }
                _ => format!("{}: {} seeds", r.label, r.values.len()),
            };
            let list = rows.iter().map(words).collect::<Vec<_>>().join("; ");
            let description = format!("Balanced accuracy of every seed in percent. {list}.");
            let title = format!("{}, {}", data.name, judged.name());
            charts.push(samples(&title, &description, "balanced accuracy, %", &rows));
        }
    }
    if charts.is_empty() {
        return Vec::new();
    }
    let text = format!(
        "Each mark is a run with its own seed; circles are models without a baseline, squares those that are compared with one. Below them \
         the mean and its {} interval.",
        percent_level(results.alpha)
    );
    vec![Block::Text(text), Block::Charts(charts)]
}

/// Validation curves, a chart a model and data set.
pub(super) fn learning(results: &Results) -> Vec<Block> {
    let mut blocks = Vec::new();
    for data in &results.datasets {
        let each: Vec<Vec<Vec<(f64, f64)>>> = data.models.iter().map(runs).collect();
        let all = || each.iter().flatten().flatten().map(|p| p.1);
        let over = (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
        let chart = |(i, model): (usize, &ModelResults)| {
            let mean = mean_curve(&each[i]);
            let last = mean.last()?;
            let mut families = vec![Curves {
                label: format!("{}: mean, each seed thin", model.name),
                kind: 0,
                each: each[i].clone(),
                mean: mean.clone(),
            }];
            if let Some(baseline) = model.baseline {
                families.push(Curves {
                    label: format!("{}: mean", data.models[baseline].name),
                    kind: 1,
                    each: Vec::new(),
                    mean: mean_curve(&each[baseline]),
                });
            }
            let description = format!(
                "Validation balanced accuracy over epochs of {} seeds of {}; their mean ends at {:.1} % after epoch {:.0}.",
                each[i].len(),
                model.name,
                last.1,
                last.0
            );
            let title = format!("{}, {}", model.name, data.name);
            Some(curves(&title, &description, ("epoch", "balanced accuracy, %"), over, &families))
        };
        let charts: Vec<String> = data.models.iter().enumerate().filter_map(chart).collect();
        if !charts.is_empty() {
            blocks.extend(heading(results, data));
            blocks.push(Block::Charts(charts));
        }
    }
    if !blocks.is_empty() {
        let text = "Balanced accuracy on the validation images after each epoch. Test scores are of each run's epoch that was best there.";
        blocks.insert(0, Block::Text(text.into()));
    }
    blocks
}

fn runs(model: &ModelResults) -> Vec<Vec<(f64, f64)>> {
    let curve = |scores: &Scores| -> Vec<(f64, f64)> {
        let point = |r: &crate::train::log::EpochRow| {
            Some((r.epoch as f64, percent(r.val_balanced_accuracy?)))
        };
        scores.curve.iter().filter_map(point).collect()
    };
    model.runs.iter().filter_map(|run| run.scores.as_ref().ok()).map(curve).collect()
}

/// The mean at each epoch that all runs have.
fn mean_curve(runs: &[Vec<(f64, f64)>]) -> Vec<(f64, f64)> {
    let shortest = runs.iter().map(Vec::len).min().unwrap_or(0);
    let at = |i: usize| {
        let values: Vec<f64> = runs.iter().map(|run| run[i].1).collect();
        Some((runs[0][i].0, stats::mean(&values)?))
    };
    (0..shortest).filter_map(at).collect()
}

/// What a model costs, where it is known.
type Cost<'a> = &'a dyn Fn(&ModelResults) -> Option<f64>;

/// What accuracy costs: FLOP of an image, and milliseconds of a step.
pub(super) fn costs(results: &Results, findings: &Findings) -> Vec<Block> {
    let mut charts = Vec::new();
    for (dataset, data) in results.datasets.iter().enumerate() {
        let Some(judged) = JUDGED.into_iter().find(|j| j.part(data).is_some()) else { continue };
        let flop = |m: &ModelResults| Some(1e-9 * m.flop).filter(|f| *f > 0.0);
        let step = |m: &ModelResults| median(m, |s| s.step_ms);
        let of: [(&str, &str, Cost); 2] = [
            ("GFLOP an image", "GFLOP of an image's forward pass, logarithmic", &flop),
            ("ms a step", "ms of a training step, logarithmic", &step),
        ];
        for (what, axis, cost) in of {
            let point = |(i, model): (usize, &ModelResults)| {
                let reached = findings.reached(dataset, i, judged)?;
                Some(Point {
                    label: model.name.clone(),
                    kind: kind(model),
                    x: cost(model)?,
                    y: percent(reached.mean?),
                    interval: both(reached.interval),
                })
            };
            let all: Vec<Point> = data.models.iter().enumerate().filter_map(point).collect();
            if all.is_empty() {
                continue;
            }
            let words = |p: &Point| format!("{}: {:.1} % at {:.3}", p.label, p.y, p.x);
            let list = all.iter().map(words).collect::<Vec<_>>().join("; ");
            let description =
                format!("Mean balanced accuracy {} against {what}. {list}.", judged.name());
            let title = format!("{}, {}", data.name, what);
            charts.push(scatter(&title, &description, (axis, "balanced accuracy, %"), &all));
        }
    }
    if charts.is_empty() {
        return Vec::new();
    }
    let text = "Mean balanced accuracy with its interval, in distribution where there is such a part. Milliseconds are of the machines \
                that ran the trials, with whatever else ran on them.";
    vec![Block::Text(text.into()), Block::Charts(charts)]
}

/// Confusion matrices summed over seeds.
pub(super) fn confusion(results: &Results) -> Vec<Block> {
    let mut blocks = Vec::new();
    for data in &results.datasets {
        let (mut charts, mut counts) = (Vec::new(), Vec::new());
        for judged in JUDGED {
            let Some(part) = judged.part(data) else { continue };
            for model in &data.models {
                let Some((classes, sum, seeds)) = summed(model, part) else { continue };
                let title = format!("{}, {} {}", model.name, data.name, judged.short());
                let description = recalls(&classes, &sum, seeds, judged);
                charts.push(matrix(&title, &description, &classes, &sum));
                if classes.len() > CLASSES_IN_CELLS {
                    counts.push(Block::Table(tables::confusion(title, &classes, &sum)));
                }
            }
        }
        if charts.is_empty() {
            continue;
        }
        blocks.extend(heading(results, data));
        blocks.push(Block::Charts(charts));
        if !counts.is_empty() {
            blocks.push(Block::Folded("The same as counts".into(), counts));
        }
    }
    if !blocks.is_empty() {
        let text = "Rows are true classes, columns what was predicted, by the rows' numbers; shares of the row in percent, summed over seeds.";
        blocks.insert(0, Block::Text(text.into()));
    }
    blocks
}

/// Classes, counts of all seeds, and how many these are; runs with other classes than the first are left out.
fn summed(model: &ModelResults, part: &str) -> Option<(Vec<String>, Vec<Vec<u64>>, usize)> {
    let of = |scores| part_of(scores, part);
    let mut parts = model.runs.iter().filter_map(|run| of(run.scores.as_ref().ok()?));
    let first = parts.next()?;
    let (mut sum, mut seeds) = (first.confusion.clone(), 1);
    for next in parts.filter(|p| p.classes == first.classes) {
        for (sum, count) in sum.iter_mut().flatten().zip(next.confusion.iter().flatten()) {
            *sum += count;
        }
        seeds += 1;
    }
    Some((first.classes.clone(), sum, seeds))
}

fn recalls(classes: &[String], counts: &[Vec<u64>], seeds: usize, judged: Judged) -> String {
    let one = |(i, class): (usize, &String)| {
        let all = counts[i].iter().sum::<u64>();
        let share = (all > 0).then(|| counts[i][i] as f64 / all as f64);
        format!("{class} {}", share.map_or("-".into(), points))
    };
    let list = classes.iter().enumerate().map(one).collect::<Vec<_>>().join(", ");
    format!("Confusion matrix of {seeds} seeds {}. Recall in percent: {list}.", judged.name())
}
