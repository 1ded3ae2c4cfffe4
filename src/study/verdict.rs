//! What a study's comparisons say, in sentences.
//!
//! A difference that is not significant is told with what could have been shown, since runs that do not show a difference do not show
//! that there is none.

use super::compare::{Comparison, Findings, JUDGED, Judged, POWER, Verdict};
use super::results::Results;
use crate::stats::Interval;

/// The verdict on the study: a paragraph on what is missing from it where something is, then one for each kind of part.
pub fn study(results: &Results, findings: &Findings) -> Vec<String> {
    let mut all = Vec::new();
    if results.open > 0 {
        all.push(format!(
            "The study is not finished: {} {} open. What follows is of the runs that are done; it may change, and a test that is looked at before its \
             time is wrong more often than it says.",
            results.open,
            are(results.open, "trial")
        ));
    }
    let families = JUDGED.iter().filter_map(|judged| family(results, findings, *judged));
    let before = all.len();
    all.extend(families);
    if all.len() == before {
        all.push("No model of this study has a baseline, so nothing is tested.".into());
    }
    all.extend(gaps(results, findings));
    all
}

/// The verdict on the comparisons of one kind of part.
fn family(results: &Results, findings: &Findings, judged: Judged) -> Option<String> {
    let all: Vec<&Comparison> =
        findings.comparisons.iter().filter(|c| c.judged == judged).collect();
    if all.is_empty() {
        return None;
    }
    let with = |verdict: Verdict| -> Vec<&Comparison> {
        all.iter().copied().filter(|c| c.verdict == verdict).collect()
    };
    let mut sentences = Vec::new();
    for (verdict, word) in [(Verdict::Better, "better"), (Verdict::Worse, "worse")] {
        for c in with(verdict) {
            let (model, baseline, data) = names(results, c);
            sentences.push(format!(
                "{model} is significantly {word} than {baseline} on {data}: by {}.",
                difference(results, c, true)
            ));
        }
    }
    let not = with(Verdict::NotSignificant);
    if !not.is_empty() {
        let list: Vec<String> = not
            .iter()
            .map(|c| {
                let (model, baseline, data) = names(results, c);
                format!("{model} against {baseline} on {data}")
            })
            .collect();
        sentences.push(format!("No significant difference: {}. {}", list.join("; "), shown(&not)));
    }
    let untested = with(Verdict::Untested);
    if !untested.is_empty() {
        let count = untested.len();
        sentences.push(format!("{count} {} without a test so far.", are(count, "comparison")));
    }
    let name = judged.name();
    let (first, rest) = name.split_at(1);
    Some(format!("{}{rest}: {}", first.to_uppercase(), sentences.join(" ")))
}

/// What could have been shown by comparisons that show nothing.
fn shown(comparisons: &[&Comparison]) -> String {
    let found: Vec<f64> = comparisons.iter().filter_map(|c| c.detectable).collect();
    let (least, most) = found.iter().fold((f64::MAX, 0.0_f64), |(l, m), d| (l.min(*d), m.max(*d)));
    let range = match (points(least), points(most)) {
        _ if found.is_empty() => return "There may still be one.".into(),
        (least, most) if least == most => format!("{most} points"),
        (least, most) => format!("{least} to {most} points, depending on the comparison,"),
    };
    format!(
        "There may still be one: these seeds show a difference of {range} or more with a probability of {:.0} %, a smaller one less often.",
        100.0 * POWER
    )
}

/// The verdict on one comparison.
pub fn sentence(results: &Results, c: &Comparison) -> String {
    let (model, baseline, data) = names(results, c);
    let on = format!("on {data} {} ({})", c.judged.name(), c.part);
    match c.verdict {
        Verdict::Better => {
            format!(
                "{model} is significantly better than {baseline} {on}: by {}.",
                difference(results, c, true)
            )
        }
        Verdict::Worse => {
            format!(
                "{model} is significantly worse than {baseline} {on}: by {}.",
                difference(results, c, true)
            )
        }
        Verdict::NotSignificant => format!(
            "No significant difference between {model} and {baseline} {on}: {}. {}",
            difference(results, c, false),
            shown(&[c])
        ),
        Verdict::Untested if c.samples.is_none() => {
            format!("{model} against {baseline} {on}: not tested, which takes two seeds of each.")
        }
        Verdict::Untested => format!(
            "{model} against {baseline} {on}: not tested, because each reached the same with all of its seeds, so that there is no spread to hold a \
             difference against."
        ),
    }
}

/// A comparison's difference with interval and p. `size` gives the size of the difference, whose direction is said before.
fn difference(results: &Results, c: &Comparison, size: bool) -> String {
    let Some(w) = c.welch else { return "no test".into() };
    let turned = size && w.difference < 0.0;
    let (value, interval) = match turned {
        true => (-w.difference, Interval { low: -w.interval.high, high: -w.interval.low }),
        false => (w.difference, w.interval),
    };
    let number = |v: f64| if size { points(v) } else { signed(v) };
    let ends = format!("{} to {}", number(interval.low), number(interval.high));
    let level = percent_level(results.alpha);
    let mut p = format!("p {}", p_value(c.adjusted.unwrap_or(w.p)));
    if c.family > 1 {
        let raw = p_value(w.p);
        p += &format!(
            " after Holm's correction for {} comparisons, {} before",
            c.family,
            raw.trim_start_matches("= ")
        );
    }
    format!("{} points of balanced accuracy ({level} interval {ends}; {p})", number(value))
}

/// Everything that makes the study less than was planned.
fn gaps(results: &Results, findings: &Findings) -> Vec<String> {
    let mut all = Vec::new();
    for data in &results.datasets {
        for model in &data.models {
            let failed = model.runs.iter().filter(|run| run.scores.is_err()).count();
            let (done, planned) = (model.runs.len() - failed, results.seeds);
            let (model, data) = (&model.name, &data.name);
            if failed > 0 {
                all.push(format!(
                    "{failed} of {planned} {} of {model} on {data} failed and {} not in its numbers, which are therefore of the others alone.",
                    if planned == 1 { "seed" } else { "seeds" },
                    if failed == 1 { "is" } else { "are" },
                ));
            }
            if done + failed < planned {
                all.push(format!(
                    "{model} on {data} has {} of {planned} planned seeds.",
                    done + failed
                ));
            }
        }
    }
    all.extend(findings.notes.iter().cloned());
    all
}

/// Names of a comparison's model, baseline and data set.
pub fn names<'a>(results: &'a Results, c: &Comparison) -> (&'a str, &'a str, &'a str) {
    let data = &results.datasets[c.dataset];
    (&data.models[c.model].name, &data.models[c.baseline].name, &data.name)
}

fn are(count: usize, word: &str) -> String {
    if count == 1 { format!("{word} is") } else { format!("{word}s are") }
}

/// A share in points of a hundred, with one decimal.
pub fn points(share: f64) -> String {
    let text = format!("{:.1}", 100.0 * share);
    if text == "-0.0" { "0.0".into() } else { text }
}

/// The same with its sign.
pub fn signed(share: f64) -> String {
    let text = points(share);
    if text.starts_with('-') || text == "0.0" { text } else { format!("+{text}") }
}

/// An interval of shares in points, `80.1 to 82.3`.
pub fn span(interval: Option<Interval>, number: fn(f64) -> String) -> String {
    interval.map_or("-".into(), |i| format!("{} to {}", number(i.low), number(i.high)))
}

/// `= 0.023`, `< 0.0001`: two digits that count.
pub fn p_value(p: f64) -> String {
    match p {
        p if p < 1e-4 => "< 0.0001".into(),
        p if p < 1e-3 => format!("= {p:.5}"),
        p if p < 0.01 => format!("= {p:.4}"),
        p if p < 0.1 => format!("= {p:.3}"),
        p => format!("= {p:.2}"),
    }
}

/// The level of intervals beside a test at `alpha`: `95 %`.
pub fn percent_level(alpha: f64) -> String {
    let digits = format!("{:.2}", 100.0 * (1.0 - alpha));
    format!("{} %", digits.trim_end_matches('0').trim_end_matches('.'))
}
