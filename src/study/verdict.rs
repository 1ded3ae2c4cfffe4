//! What a study's comparisons say, in sentences.
//!
//! A difference that is not significant is told with what could have been shown, since runs that do not show a difference do not show
//! that there is none.

use super::compare::{Comparison, Findings, JUDGED, Judged, POWER, Verdict};
use super::results::Results;
use crate::stats::Interval;

/// The verdict on a study.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Words {
    /// What to know before the rest, such as that the study is not finished.
    pub before: Vec<String>,
    /// For each kind of part, in distribution first: a headline, and what is behind it.
    pub families: Vec<(String, Vec<String>)>,
    /// What is less than was planned: seeds that failed or are missing, predictions that cannot be read.
    pub gaps: Vec<String>,
}

impl Words {
    /// Everything, a line each.
    pub fn lines(&self) -> Vec<String> {
        let family = |(headline, rest): &(String, Vec<String>)| {
            let rest = rest.iter().map(|line| format!("  {line}"));
            std::iter::once(headline.clone()).chain(rest).collect::<Vec<_>>()
        };
        let families = self.families.iter().flat_map(family);
        self.before.iter().cloned().chain(families).chain(self.gaps.iter().cloned()).collect()
    }
}

/// The verdict on a study.
pub fn study(results: &Results, findings: &Findings) -> Words {
    let mut before = Vec::new();
    if results.open > 0 {
        before.push(format!(
            "The study is not finished: {} {} open. What follows is of the runs that are done; it may change, and a test that is looked at \
             before its time is wrong more often than it says.",
            results.open,
            are(results.open, "trial")
        ));
    }
    if findings.comparisons.is_empty() {
        before.push("No model of this study has a baseline, so nothing is tested.".into());
    }
    let families = JUDGED.iter().filter_map(|judged| family(results, findings, *judged));
    Words { before, families: families.collect(), gaps: gaps(results, findings) }
}

/// The verdict on the comparisons of one kind of part.
fn family(results: &Results, findings: &Findings, judged: Judged) -> Option<(String, Vec<String>)> {
    let all = || findings.comparisons.iter().filter(move |c| c.judged == judged);
    let with = |verdict: Verdict| all().filter(|c| c.verdict == verdict).collect::<Vec<_>>();
    let [better, worse, not, untested] =
        [Verdict::Better, Verdict::Worse, Verdict::NotSignificant, Verdict::Untested].map(with);
    let count = all().count();
    let (name, baseline) =
        (judged.name(), if count == 1 { "its baseline" } else { "their baselines" });
    let headline = match (better.len(), worse.len()) {
        _ if count == 0 => return None,
        _ if untested.len() == count => format!("nothing can be tested of {}", comparisons(count)),
        (0, 0) => format!("no significant difference in {}", comparisons(count - untested.len())),
        (b, w) => {
            let words = [
                (b, "significantly better"),
                (w, "significantly worse"),
                (not.len(), "without a significant difference"),
            ];
            let some = words.iter().filter(|(n, _)| *n > 0).map(|(n, word)| format!("{n} {word}"));
            format!(
                "of {} of models with {baseline}, {}",
                comparisons(count),
                some.collect::<Vec<_>>().join(", ")
            )
        }
    };
    let (first, rest) = name.split_at(1);
    let mut lines: Vec<String> =
        better.into_iter().chain(worse).map(|c| sentence(results, c)).collect();
    let list = |all: &[&Comparison], of: &dyn Fn(&Comparison) -> String| {
        let one = |c: &&Comparison| {
            let (model, baseline, data) = names(results, c);
            format!("{model} against {baseline} on {data}{}", of(c))
        };
        all.iter().map(one).collect::<Vec<_>>().join("; ")
    };
    match not.as_slice() {
        [] => {}
        [one] => lines.push(sentence(results, one)),
        several => {
            let points = |c: &Comparison| {
                c.welch.map_or(String::new(), |w| format!(" ({} points)", signed(w.difference)))
            };
            let list = list(several, &points);
            lines.push(format!("No significant difference: {list}. {}", shown(several)));
        }
    }
    let (constant, few): (Vec<_>, Vec<_>) = untested.into_iter().partition(|c| c.samples.is_some());
    lines.extend(constant.into_iter().map(|c| sentence(results, c)));
    match few.as_slice() {
        [] => {}
        [one] => lines.push(sentence(results, one)),
        several => {
            let list = list(several, &|_| String::new());
            lines.push(format!("Not tested, which takes two seeds of each: {list}."));
        }
    }
    Some((format!("{}{rest}: {headline}.", first.to_uppercase()), lines))
}

fn comparisons(count: usize) -> String {
    if count == 1 { "1 comparison".into() } else { format!("{count} comparisons") }
}

/// What could have been shown by comparisons that show nothing.
fn shown(comparisons: &[&Comparison]) -> String {
    let found: Vec<f64> = comparisons.iter().filter_map(|c| c.detectable).collect();
    let (least, most) = found.iter().fold((f64::MAX, 0.0_f64), |(l, m), d| (l.min(*d), m.max(*d)));
    let range = match (points(least), points(most)) {
        _ if found.is_empty() => return "There may still be one.".into(),
        _ if least >= 1.0 => {
            return "There may still be one: as few seeds with as much spread show no difference that there can be.".into();
        }
        (least, most) if least == most => format!("{most} points"),
        (least, most) => format!("{least} to {most} points, depending on the comparison,"),
    };
    format!(
        "There may still be one: as many seeds with as much spread show a difference of {range} with a probability of {:.0} %, a smaller \
         one less often.",
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
            "{model} against {baseline} {on}: not tested, because each reached the same with all of its seeds, so that there is no spread \
             to hold a difference against."
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
    let (mut failures, mut fewer, mut hopeless) = (Vec::new(), Vec::new(), Vec::new());
    let mut unsearched = Vec::new();
    for data in &results.datasets {
        for model in &data.models {
            let failed = model.runs.iter().filter(|run| run.scores.is_err()).count();
            let (here, planned) = (format!("{} on {}", model.name, data.name), results.seeds);
            let lost = model.tried.iter().filter(|tried| tried.val.is_err()).count();
            if lost > 0 && model.winner.is_some() {
                unsearched.push(format!("{lost} of {} of {here}", model.tried.len()));
            }
            if failed > 0 {
                failures.push(format!("{failed} of {planned} seeds of {here}"));
            }
            if model.winner.is_none() && results.open == 0 {
                hopeless.push(here);
            } else if model.runs.len() < planned {
                fewer.push(format!("{here} has {}", model.runs.len()));
            }
        }
    }
    let mut all = Vec::new();
    if !results.left_out.is_empty() {
        all.push(format!(
            "Left out of the study's file, and not corrected for: {}.",
            results.left_out.join(", ")
        ));
    }
    for data in &results.datasets {
        for (part, classes) in &data.absent {
            all.push(format!(
                "The {part} part of {} has no images of {}: balanced accuracy there is the mean over the other classes.",
                data.name,
                classes.join(", ")
            ));
        }
    }
    if !unsearched.is_empty() {
        all.push(format!(
            "Trials of the search that failed, so that the winner is one of the others: {}.",
            unsearched.join("; ")
        ));
    }
    if !failures.is_empty() {
        all.push(format!(
            "Seeds that failed, so that the numbers are of the others alone: {}.",
            failures.join("; ")
        ));
    }
    if !hopeless.is_empty() {
        all.push(format!(
            "No setting of the search could be trained to its end: {}.",
            hopeless.join("; ")
        ));
    }
    if !fewer.is_empty() {
        all.push(format!(
            "Fewer seeds so far than the {} planned: {}.",
            results.seeds,
            fewer.join("; ")
        ));
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
