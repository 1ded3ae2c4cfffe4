//! A run held against an earlier one: by how much each row's time changed, and whether more than its noise.

use super::measure::Timing;
use super::report::{Measured, Outcome, Reached, Report};
use std::fmt;

/// What became of a pass since the earlier run.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// The row.
    pub name: String,
    /// `forward`, `whole`, or `memory`.
    pub what: &'static str,
    /// The earlier median: milliseconds, or bytes.
    pub old: f64,
    /// The median now.
    pub new: f64,
    /// The least and the greatest ratio that both runs' p20 to p80 allow, widened where samples are few.
    pub band: (f64, f64),
    /// Whether it is more than noise.
    pub verdict: Verdict,
}

/// Whether a change is more than noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Slower, or more memory, by more than noise and tolerance.
    Worse,
    /// Faster, or less memory, by as much.
    Better,
    /// Neither.
    Same,
}

impl Change {
    /// New over old: above 1 it takes longer now.
    pub fn ratio(&self) -> f64 {
        self.new / self.old
    }
}

/// A run against an earlier one.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// Every pass that both have, and the memory of every row.
    pub changes: Vec<Change>,
    /// Rows that were timed then and fail now, and why.
    pub lost: Vec<(String, String)>,
    /// Rows now that the earlier run did not time.
    pub fresh: usize,
    /// Rows that the earlier run timed and this one has not or did not reach.
    pub missing: usize,
}

impl Comparison {
    /// Whether anything got worse, or nothing could be compared.
    pub fn regressed(&self) -> bool {
        self.changes.is_empty()
            || !self.lost.is_empty()
            || self.changes.iter().any(|c| c.verdict == Verdict::Worse)
    }
}

/// Holds rows of the same name against each other. A change counts where the two intervals p20 to p80, widened where samples are few,
/// do not meet and the medians differ by more than `tolerance` (0.05 is 5 %).
pub fn compare(new: &Report, old: &Report, tolerance: f64) -> Comparison {
    let mut all = Comparison::default();
    let timed = |m: &&Measured| matches!(m.outcome, Outcome::Timed(_));
    let here = |m: &&Measured| {
        let same = |now: &&Measured| now.row.name == m.row.name && now.row.subject == m.row.subject;
        new.rows.iter().any(|now| same(&now) && !matches!(now.outcome, Outcome::Skipped { .. }))
    };
    all.missing = old.rows.iter().filter(timed).filter(|m| !here(m)).count();
    for now in &new.rows {
        let then = old.rows.iter().find(|m| m.row.name == now.row.name);
        let then = then.filter(|m| m.row.subject == now.row.subject);
        match (then.map(|m| &m.outcome), &now.outcome) {
            (Some(Outcome::Timed(then)), Outcome::Timed(times)) => {
                let passes = [
                    ("forward", then.forward.as_ref(), times.forward.as_ref()),
                    ("whole", Some(&then.whole), Some(&times.whole)),
                ];
                for (what, then, times) in passes {
                    let both = then.zip(times);
                    all.changes.extend(both.map(|(a, b)| time(now, what, a, b, tolerance)));
                }
                all.changes.extend(memory(now, &then.whole, &times.whole, tolerance));
            }
            (Some(Outcome::Timed(_)), Outcome::Failed { failed }) => {
                all.lost.push((now.row.name.clone(), failed.clone()));
            }
            (_, Outcome::Timed(_)) => all.fresh += 1,
            _ => {}
        }
    }
    all
}

fn verdict(ratio: f64, band: (f64, f64), tolerance: f64) -> Verdict {
    if band.0 > 1.0 && ratio > 1.0 + tolerance {
        Verdict::Worse
    } else if band.1 < 1.0 && ratio < 1.0 / (1.0 + tolerance) {
        Verdict::Better
    } else {
        Verdict::Same
    }
}

/// From p20 to p80, on a logarithmic scale 1 + 30 / n^2 times as far from the median for n samples. Two runs of the same thing have
/// intervals that do not meet in one comparison of 4 with three samples each, of 11 with five, of 100 with ten; widened so, in one of 75,
/// of 150, of 700. With twenty samples and more the interval stays what it is.
fn interval(times: &Timing) -> (f64, f64) {
    let few = times.samples().max(1) as f64;
    let wider = 1.0 + 30.0 / (few * few);
    let away = |p: f64| times.ms * (p / times.ms).powf(wider);
    (away(times.p20_ms), away(times.p80_ms))
}

fn time(
    row: &Measured,
    what: &'static str,
    old: &Reached,
    new: &Reached,
    tolerance: f64,
) -> Change {
    let (old, new) = (&old.timing, &new.timing);
    let (was, is) = (interval(old), interval(new));
    let band = (is.0 / was.1, is.1 / was.0);
    let verdict = verdict(new.ms / old.ms, band, tolerance);
    Change { name: row.row.name.clone(), what, old: old.ms, new: new.ms, band, verdict }
}

/// Memory has no noise.
fn memory(row: &Measured, old: &Reached, new: &Reached, tolerance: f64) -> Option<Change> {
    let (old, new) = (old.peak_bytes as f64, new.peak_bytes as f64);
    let ratio = new / old;
    ratio.is_finite().then(|| Change {
        name: row.row.name.clone(),
        what: "memory",
        old,
        new,
        band: (ratio, ratio),
        verdict: verdict(ratio, (ratio, ratio), tolerance),
    })
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["row", "what", "then", "now", "ratio", "noise band"];
        let [name, what, then, now, ratio, band] = head;
        writeln!(f, "{name:40} {what:8} {then:>11} {now:>11} {ratio:>7} {band:>15}")?;
        for c in self.changes.iter().filter(|c| c.what != "memory" || c.verdict != Verdict::Same) {
            let unit = |v: f64| match c.what {
                "memory" => format!("{:.2} MiB", v / f64::from(1 << 20)),
                _ => format!("{v:.4} ms"),
            };
            let word = match c.verdict {
                Verdict::Worse if c.what == "memory" => "  MORE MEMORY",
                Verdict::Worse => "  SLOWER",
                Verdict::Better => "  better",
                Verdict::Same => "",
            };
            let band = format!("{:.3} .. {:.3}", c.band.0, c.band.1);
            let (old, new, ratio) = (unit(c.old), unit(c.new), c.ratio());
            let (name, what) = (&c.name, c.what);
            writeln!(f, "{name:40} {what:8} {old:>11} {new:>11} {ratio:>7.3} {band:>15}{word}")?;
        }
        for (name, why) in &self.lost {
            writeln!(f, "{name:40} FAILS NOW: {why}")?;
        }
        let count = |v| self.changes.iter().filter(|c| c.verdict == v).count();
        let (worse, better) = (count(Verdict::Worse) + self.lost.len(), count(Verdict::Better));
        write!(f, "{worse} worse, {better} better, of {} compared", self.changes.len())?;
        if self.fresh > 0 {
            write!(f, "; {} rows were not timed then", self.fresh)?;
        }
        if self.missing > 0 {
            write!(f, "; {} rows that were timed then are not here", self.missing)?;
        }
        match self.changes.is_empty() {
            true => write!(f, ": nothing is compared, which counts as a failure"),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::stats::Summary;
    use super::*;
    use crate::tensor::philox::Philox;

    /// Times of `samples` runs of something that takes 10 ms times `factor`, with noise of 5 %.
    fn timing(samples: u64, factor: f64, run: u32) -> Timing {
        let noise = Philox { seed: 1, step: run, op: 0 };
        let sample = |i| 0.01 * factor * (0.05 * f64::from(noise.normal(i))).exp();
        let wall = Summary::of(&(0..samples).map(sample).collect::<Vec<_>>()).unwrap();
        let Summary { median_ms: ms, p20_ms, p80_ms, .. } = wall;
        Timing { ms, p20_ms, p80_ms, wall, device: None, launches: 1, kernels: Vec::new() }
    }

    /// The share of 2000 comparisons without tolerance in which the second run counts as slower or faster.
    fn called(samples: u64, factor: f64, interval: fn(&Timing) -> (f64, f64)) -> f64 {
        let differs = |run: &u32| {
            let (old, new) = (timing(samples, 1.0, 2 * run), timing(samples, factor, 2 * run + 1));
            let (was, is) = (interval(&old), interval(&new));
            verdict(new.ms / old.ms, (is.0 / was.1, is.1 / was.0), 0.0) != Verdict::Same
        };
        (0..2000).filter(differs).count() as f64 / 2000.0
    }

    #[test]
    fn few_samples_are_no_verdict() {
        let narrow = |t: &Timing| (t.p20_ms, t.p80_ms);
        for (samples, as_they_are, widened) in [(3, 0.2, 0.025), (5, 0.07, 0.015), (20, 0.0, 0.005)]
        {
            let (before, now) = (called(samples, 1.0, narrow), called(samples, 1.0, interval));
            println!(
                "{samples} samples: {before} of equal runs differ, {now} with wider intervals"
            );
            assert!(before >= as_they_are && now <= widened, "{samples}: {before}, {now}");
        }
        // What is really slower is still found, by more samples the better.
        let found = [5, 10, 20].map(|samples| called(samples, 1.3, interval));
        assert!(found[0] > 0.9 && found[1] > 0.99 && found[2] > 0.999, "{found:?}");
    }

    #[test]
    fn samples_are_those_behind_the_median() {
        let host = timing(5, 1.0, 0);
        let device = timing(20, 0.5, 1);
        let own = Timing { device: Some(device.wall), wall: host.wall, ..device.clone() };
        assert_eq!((host.samples(), own.samples()), (5, 20));
        let on_cpu = Timing { device: Some(device.wall), ..host };
        assert_eq!(on_cpu.samples(), 5);
    }
}
