//! The tables of a report.

use std::path::Path;

use crate::html::Table;
use crate::stats;
use crate::study::compare::{Comparison, Findings, JUDGED, Judged, Verdict};
use crate::study::results::{DataResults, ModelResults, Results, Scores, Tried};
use crate::study::verdict::{names, p_value, points, signed, span};

const MIB: f64 = (1 << 20) as f64;

fn table(caption: String, head: &[&str], rows: Vec<Vec<String>>) -> Table {
    Table { caption, head: head.iter().map(ToString::to_string).collect(), rows }
}

/// A run directory as seen from the study's folder.
pub(super) fn place(run: &Path, dir: &Path) -> String {
    run.strip_prefix(dir).unwrap_or(run).display().to_string()
}

/// The median over a model's seeds of something that is above 0 where it is known.
pub(super) fn median(model: &ModelResults, of: impl Fn(&Scores) -> f64) -> Option<f64> {
    let known = model.runs.iter().filter_map(|run| Some(of(run.scores.as_ref().ok()?)));
    let mut values: Vec<f64> = known.filter(|v| *v > 0.0).collect();
    values.sort_by(f64::total_cmp);
    stats::percentile(&values, 0.5)
}

fn or_dash(value: Option<f64>, text: impl Fn(f64) -> String) -> String {
    value.map_or("-".into(), text)
}

/// Seconds in words.
pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// p without its sign of equality.
fn bare(p: f64) -> String {
    p_value(p).trim_start_matches("= ").into()
}

/// The models of a data set: size, cost, and what they reached.
pub(super) fn models(results: &Results, findings: &Findings, dataset: usize) -> Table {
    let data = &results.datasets[dataset];
    let parts: Vec<Judged> = JUDGED.into_iter().filter(|j| j.part(data).is_some()).collect();
    let mut head = vec!["model".to_string()];
    for judged in &parts {
        head.push(format!("{} balanced accuracy", judged.short()));
        head.push(format!("{} p", judged.short()));
    }
    let costs = ["seeds", "parameters", "GFLOP", "ms a step", "peak MiB"];
    head.extend(costs.map(String::from));
    let row = |(i, model): (usize, &ModelResults)| {
        let mut cells = vec![model.name.clone()];
        for judged in &parts {
            let reached = findings.reached(dataset, i, *judged);
            let mean = or_dash(reached.and_then(|r| r.mean), points);
            cells.push(match reached.and_then(|r| r.interval) {
                Some(interval) => format!("{mean} ({})", span(Some(interval), points)),
                None => mean,
            });
            let adjusted = findings.comparison(dataset, i, *judged).and_then(|c| c.adjusted);
            cells.push(or_dash(adjusted, bare));
        }
        let known = model.winner.is_some();
        let done = model.runs.iter().filter(|run| run.scores.is_ok()).count();
        cells.extend([
            format!("{done} of {}", results.seeds),
            or_dash(known.then_some(model.parameters as f64), |p| format!("{:.3} M", 1e-6 * p)),
            or_dash(known.then_some(model.flop), |f| format!("{:.3}", 1e-9 * f)),
            or_dash(median(model, |s| s.step_ms), |ms| format!("{ms:.1}")),
            or_dash(median(model, |s| s.peak_bytes as f64), |b| format!("{:.0}", b / MIB)),
        ]);
        cells
    };
    let rows = data.models.iter().enumerate().map(row).collect();
    Table { caption: format!("Models on {}", data.name), head, rows }
}

/// Every comparison on a kind of part: the test that decides, and what is beside it. None where there are no comparisons.
pub(super) fn comparisons(results: &Results, findings: &Findings, judged: Judged) -> Vec<Table> {
    let all: Vec<&Comparison> =
        findings.comparisons.iter().filter(|c| c.judged == judged).collect();
    if all.is_empty() {
        return Vec::new();
    }
    let rank = if judged == Judged::InDistribution { "primary" } else { "a family of its own" };
    let decides =
        ["comparison", "verdict", "difference", "over seeds", "p", "Holm", "seeds", "detectable"];
    let beside = ["comparison", "ranks p", "g", "over images", "votes", "votes p"];
    let rows = |of: &dyn Fn(&Comparison) -> Vec<String>| {
        let row = |c: &&Comparison| {
            let (model, baseline, data) = names(results, c);
            std::iter::once(format!("{model} against {baseline} on {data}")).chain(of(c)).collect()
        };
        all.iter().map(row).collect()
    };
    vec![
        table(
            format!("Comparisons {} ({rank})", judged.name()),
            &decides,
            rows(&|c| deciding(findings, c)),
        ),
        table(format!("Beside the test, {}", judged.name()), &beside, rows(&besides)),
    ]
}

fn deciding(findings: &Findings, c: &Comparison) -> Vec<String> {
    let seeds = |model| findings.reached(c.dataset, model, c.judged).map_or(0, |r| r.seeds.len());
    vec![
        verdict(c.verdict).into(),
        or_dash(c.welch.map(|w| w.difference), signed),
        span(c.welch.map(|w| w.interval), signed),
        or_dash(c.welch.map(|w| w.p), bare),
        or_dash(c.adjusted, bare),
        format!("{}, {}", seeds(c.model), seeds(c.baseline)),
        or_dash(c.detectable, points),
    ]
}

fn besides(c: &Comparison) -> Vec<String> {
    let effect = c.effect.map_or("-".into(), |e| match e.interval {
        Some(i) => format!("{:.2} ({:.2} to {:.2})", e.g, i.low, i.high),
        None => format!("{:.2}", e.g),
    });
    vec![
        or_dash(c.mann_whitney.map(|m| m.p), bare),
        effect,
        span(c.images, signed),
        c.votes.map_or("-".into(), |v| format!("{}, {}", v.only_model, v.only_baseline)),
        or_dash(c.votes.map(|v| v.p), bare),
    ]
}

/// A verdict in a few words.
pub(super) fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Better => "significantly better",
        Verdict::Worse => "significantly worse",
        Verdict::NotSignificant => "no significant difference",
        Verdict::Untested => "not tested",
    }
}

/// What the searches of a data set chose; `None` before any has.
pub(super) fn winners(data: &DataResults) -> Option<Table> {
    let row = |m: &ModelResults| {
        let winner = m.winner.as_ref()?;
        let seeds: f64 = m.runs.iter().filter_map(|r| Some(r.scores.as_ref().ok()?.seconds)).sum();
        let search: f64 = m.tried.iter().map(|t| t.seconds).sum();
        Some(vec![
            m.name.clone(),
            winner.spec.clone(),
            winner.text(),
            duration(search),
            duration(seeds),
        ])
    };
    let rows: Vec<_> = data.models.iter().filter_map(row).collect();
    let head = ["model", "winner", "settings", "time of the search", "time of the seeds"];
    (!rows.is_empty()).then(|| table(format!("Winners on {}", data.name), &head, rows))
}

/// The best of a rung: the first of the highest.
fn best<'a>(rung: &[&'a Tried]) -> Option<(&'a Tried, f64)> {
    let known = rung.iter().filter_map(|t| Some((*t, *t.val.as_ref().ok()?)));
    known.reduce(|best, t| if t.1 > best.1 { t } else { best })
}

/// Each rung of each search on a data set.
pub(super) fn rungs(data: &DataResults) -> Option<Table> {
    let mut rows = Vec::new();
    for model in &data.models {
        let last = model.tried.iter().map(|t| t.rung + 1).max().unwrap_or(0);
        for rung in 0..last {
            let all: Vec<&Tried> = model.tried.iter().filter(|t| t.rung == rung).collect();
            let (Some(first), best) = (all.first(), best(&all)) else { continue };
            let failed = all.iter().filter(|t| t.val.is_err()).count();
            rows.push(vec![
                format!("{}, rung {}", model.name, rung + 1),
                first.epochs.to_string(),
                all.len().to_string(),
                failed.to_string(),
                or_dash(best.map(|b| b.1), points),
                best.map_or("-".into(), |(t, _)| {
                    format!("{}: {}, {}", t.number, t.setting.spec, t.setting.text())
                }),
                duration(all.iter().map(|t| t.seconds).sum()),
            ]);
        }
    }
    let head = ["rung", "epochs", "tried", "failed", "best on val", "its setting", "time"];
    (!rows.is_empty()).then(|| table(format!("Rungs on {}", data.name), &head, rows))
}

/// Every setting that was tried on a data set.
pub(super) fn tried(data: &DataResults, dir: &Path) -> Option<Table> {
    let row = |m: &ModelResults, t: &Tried| {
        vec![
            m.name.clone(),
            (t.rung + 1).to_string(),
            t.number.to_string(),
            t.setting.spec.clone(),
            t.setting.text(),
            t.val.as_ref().map_or("failed".into(), |v| points(*v)),
            duration(t.seconds),
            place(&t.dir, dir),
        ]
    };
    let rows: Vec<_> =
        data.models.iter().flat_map(|m| m.tried.iter().map(move |t| row(m, t))).collect();
    let head = ["model", "rung", "setting", "model string", "values", "on val", "time", "run"];
    (!rows.is_empty()).then(|| table(format!("Tried on {}", data.name), &head, rows))
}

/// The data sets: where from, classes, images by part.
pub(super) fn data(results: &Results) -> Table {
    let row = |d: &DataResults| {
        let images: Vec<String> = d.images.iter().map(|(part, n)| format!("{part} {n}")).collect();
        let classes = if d.classes.is_empty() { "-".into() } else { d.classes.join(", ") };
        vec![
            d.name.clone(),
            d.path.clone(),
            d.holdout_domain.clone().unwrap_or("-".into()),
            if images.is_empty() { "-".into() } else { images.join(", ") },
            classes,
        ]
    };
    let head = ["data set", "images from", "domain held out", "images", "classes"];
    table("Data sets".into(), &head, results.datasets.iter().map(row).collect())
}

/// Counts of true against predicted classes.
pub(super) fn confusion(caption: String, classes: &[String], counts: &[Vec<u64>]) -> Table {
    let head = std::iter::once("true class".to_string()).chain(classes.iter().cloned()).collect();
    let row = |(class, counts): (&String, &Vec<u64>)| {
        std::iter::once(class.clone()).chain(counts.iter().map(u64::to_string)).collect()
    };
    Table { caption, head, rows: classes.iter().zip(counts).map(row).collect() }
}
