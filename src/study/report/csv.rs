//! The CSV files of a report. Shares are between 0 and 1, numbers have all their digits, and an empty cell is a number that there is none of.

use std::path::Path;

use super::tables::{place, verdict};
use crate::stats::Interval;
use crate::study::compare::{Comparison, Findings, JUDGED, Judged};
use crate::study::results::{DataResults, ModelResults, Results, Run};
use crate::study::space::Setting;
use crate::study::verdict::names;

fn text(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut writer = ::csv::Writer::from_writer(Vec::new());
    let head = head.iter().map(ToString::to_string).collect();
    for row in std::iter::once(head).chain(rows) {
        writer.write_record(&row).expect("a vector takes every record");
    }
    let bytes = writer.into_inner().expect("a vector takes every byte");
    String::from_utf8(bytes).expect("made of strings")
}

fn cell(value: Option<impl ToString>) -> String {
    value.map(|v| v.to_string()).unwrap_or_default()
}

fn low(interval: Option<Interval>) -> String {
    cell(interval.map(|i| i.low))
}

fn high(interval: Option<Interval>) -> String {
    cell(interval.map(|i| i.high))
}

/// A row a model and data set.
pub(super) fn models(results: &Results, findings: &Findings) -> String {
    let mut head: Vec<String> =
        ["dataset", "model", "baseline", "spec", "settings", "parameters", "flop"]
            .map(String::from)
            .into();
    let columns = [
        "part",
        "seeds",
        "failed",
        "mean",
        "sd",
        "low",
        "high",
        "images_low",
        "images_high",
        "p",
        "p_holm",
    ];
    for judged in JUDGED {
        let kind = judged.short().to_lowercase();
        head.extend(columns.iter().map(|column| format!("{kind}_{column}")));
    }
    let mut rows = Vec::new();
    for summary in &findings.models {
        let data = &results.datasets[summary.dataset];
        let model = &data.models[summary.model];
        let winner = model.winner.as_ref();
        let mut row = vec![
            data.name.clone(),
            model.name.clone(),
            cell(model.baseline.map(|b| &data.models[b].name)),
            cell(winner.map(|w| &w.spec)),
            cell(winner.map(Setting::text)),
            cell(winner.map(|_| model.parameters)),
            cell(winner.map(|_| model.flop)),
        ];
        for judged in JUDGED {
            let Some(r) = findings.reached(summary.dataset, summary.model, judged) else {
                row.extend(columns.map(|_| String::new()));
                continue;
            };
            let c = findings.comparison(summary.dataset, summary.model, judged);
            row.extend([
                r.part.to_string(),
                r.seeds.len().to_string(),
                r.failed.to_string(),
                cell(r.mean),
                cell(r.sd),
                low(r.interval),
                high(r.interval),
                low(r.images),
                high(r.images),
                cell(c.and_then(|c| c.welch).map(|w| w.p)),
                cell(c.and_then(|c| c.adjusted)),
            ]);
        }
        rows.push(row);
    }
    text(&head.iter().map(String::as_str).collect::<Vec<_>>(), rows)
}

/// A row a run and part; one for a run that failed.
pub(super) fn seeds(results: &Results, dir: &Path) -> String {
    let head = [
        "dataset",
        "model",
        "seed",
        "run",
        "best_epoch",
        "part",
        "judged",
        "images",
        "loss",
        "accuracy",
        "balanced_accuracy",
        "auc",
        "error",
    ];
    let mut rows = Vec::new();
    for data in &results.datasets {
        let judged =
            |part: &str| JUDGED.into_iter().find(|j| j.part(data) == Some(part)).map(Judged::short);
        let runs = data.models.iter().flat_map(|m| m.runs.iter().map(move |run| (m, run)));
        for (model, run) in runs {
            let start = [&data.name, &model.name, &run.seed.to_string(), &place(&run.dir, dir)]
                .map(String::clone);
            match &run.scores {
                Err(error) => {
                    let empty = std::iter::repeat_n(String::new(), head.len() - start.len() - 1);
                    rows.push(start.into_iter().chain(empty).chain([error.clone()]).collect());
                }
                Ok(scores) => rows.extend(scores.parts.iter().map(|p| {
                    let cells = [
                        scores.best_epoch.to_string(),
                        p.part.clone(),
                        cell(judged(&p.part)),
                        p.images.to_string(),
                        p.loss.to_string(),
                        cell(p.accuracy),
                        cell(p.balanced_accuracy),
                        cell(p.auc),
                        String::new(),
                    ];
                    start.iter().cloned().chain(cells).collect()
                })),
            }
        }
    }
    text(&head, rows)
}

/// A row a tried setting.
pub(super) fn search(results: &Results, dir: &Path) -> String {
    let head = [
        "dataset",
        "model",
        "rung",
        "epochs",
        "setting",
        "spec",
        "settings",
        "val_balanced_accuracy",
        "won",
        "run",
        "error",
    ];
    let mut rows = Vec::new();
    let tried = of_models(results).flat_map(|(d, m)| m.tried.iter().map(move |t| (d, m, t)));
    for (data, model, t) in tried {
        let last = model.tried.iter().map(|t| t.rung).max();
        let won = Some(t.rung) == last && model.winner.as_ref() == Some(&t.setting);
        rows.push(vec![
            data.name.clone(),
            model.name.clone(),
            (t.rung + 1).to_string(),
            t.epochs.to_string(),
            t.number.to_string(),
            t.setting.spec.clone(),
            t.setting.text(),
            cell(t.val.as_ref().ok()),
            won.to_string(),
            place(&t.dir, dir),
            cell(t.val.as_ref().err()),
        ]);
    }
    text(&head, rows)
}

/// Every model of every data set.
fn of_models(results: &Results) -> impl Iterator<Item = (&DataResults, &ModelResults)> {
    results.datasets.iter().flat_map(|data| data.models.iter().map(move |model| (data, model)))
}

/// A row a comparison.
pub(super) fn comparisons(results: &Results, findings: &Findings) -> String {
    let head = [
        "dataset",
        "model",
        "baseline",
        "judged",
        "part",
        "verdict",
        "seeds_model",
        "seeds_baseline",
        "difference",
        "low",
        "high",
        "t",
        "df",
        "p",
        "p_holm",
        "family",
        "mann_whitney_u",
        "mann_whitney_p",
        "hedges_g",
        "hedges_low",
        "hedges_high",
        "detectable",
        "images_low",
        "images_high",
        "only_model_right",
        "only_baseline_right",
        "mcnemar_p",
    ];
    let row = |c| comparison(results, findings, c);
    text(&head, findings.comparisons.iter().map(row).collect())
}

fn comparison(results: &Results, findings: &Findings, c: &Comparison) -> Vec<String> {
    let (model, baseline, data) = names(results, c);
    let seeds = |model| findings.reached(c.dataset, model, c.judged).map(|r| r.seeds.len());
    let (w, m, e) = (c.welch, c.mann_whitney, c.effect);
    let effect = e.and_then(|e| e.interval);
    vec![
        data.into(),
        model.into(),
        baseline.into(),
        c.judged.short().into(),
        c.part.into(),
        verdict(c.verdict).into(),
        cell(seeds(c.model)),
        cell(seeds(c.baseline)),
        cell(w.map(|w| w.difference)),
        low(w.map(|w| w.interval)),
        high(w.map(|w| w.interval)),
        cell(w.map(|w| w.t)),
        cell(w.map(|w| w.df)),
        cell(w.map(|w| w.p)),
        cell(c.adjusted),
        c.family.to_string(),
        cell(m.map(|m| m.u)),
        cell(m.map(|m| m.p)),
        cell(e.map(|e| e.g)),
        low(effect),
        high(effect),
        cell(c.detectable),
        low(c.images),
        high(c.images),
        cell(c.votes.map(|v| v.only_model)),
        cell(c.votes.map(|v| v.only_baseline)),
        cell(c.votes.map(|v| v.p)),
    ]
}

/// Times and memory, a row a trial: rung 1 and up for the search, seed for the runs of the winner.
pub(super) fn costs(results: &Results, dir: &Path) -> String {
    let head =
        ["dataset", "model", "rung", "setting", "seed", "run", "seconds", "step_ms", "peak_bytes"];
    let mut rows = Vec::new();
    for (data, model) in of_models(results) {
        let start = || [data.name.clone(), model.name.clone()].into_iter();
        rows.extend(model.tried.iter().map(|t| {
            let cells = [
                (t.rung + 1).to_string(),
                t.number.to_string(),
                String::new(),
                place(&t.dir, dir),
                t.seconds.to_string(),
            ];
            start().chain(cells).chain([String::new(), String::new()]).collect()
        }));
        let run = |run: &Run| {
            let scores = run.scores.as_ref().ok();
            let cells = [
                String::new(),
                String::new(),
                run.seed.to_string(),
                place(&run.dir, dir),
                cell(scores.map(|s| s.seconds)),
                cell(scores.map(|s| s.step_ms)),
                cell(scores.map(|s| s.peak_bytes).filter(|b| *b > 0)),
            ];
            start().chain(cells).collect()
        };
        rows.extend(model.runs.iter().map(run));
    }
    text(&head, rows)
}
