//! Plots over linear axes as inline SVG: samples of several things, curves, a scatter of costs, a matrix of shares.
//!
//! Every figure is told in its description too; things are told apart by place, shape, dash or number, never by colour alone.

use super::chart::{CHARACTER, Log, class, cut, figure_of, mark, text, x_axis, y_axis};

const WIDTH: f64 = 400.0;

/// A row of [`samples`].
#[derive(Clone, Debug)]
pub struct Samples {
    /// What they are of.
    pub label: String,
    /// Which kind of mark.
    pub kind: usize,
    /// All values.
    pub values: Vec<f64>,
    /// Their mean.
    pub mean: Option<f64>,
    /// The mean's interval.
    pub interval: Option<(f64, f64)>,
}

/// A family of [`curves`]: several runs of one thing.
#[derive(Clone, Debug)]
pub struct Curves {
    /// What they are of.
    pub label: String,
    /// Which kind of line.
    pub kind: usize,
    /// Runs, drawn thin.
    pub each: Vec<Vec<(f64, f64)>>,
    /// Their mean, drawn bold.
    pub mean: Vec<(f64, f64)>,
}

/// A point of [`scatter`].
#[derive(Clone, Debug)]
pub struct Point {
    /// What it is.
    pub label: String,
    /// Which kind of mark.
    pub kind: usize,
    /// Place along x, above 0.
    pub x: f64,
    /// Place along y.
    pub y: f64,
    /// Interval along y.
    pub interval: Option<(f64, f64)>,
}

/// All values of several things on one axis, each above its mean with the mean's interval.
pub fn samples(title: &str, description: &str, unit: &str, rows: &[Samples]) -> String {
    let (left, right, top, step) = (10.0, WIDTH - 44.0, 26.0, 46.0);
    let of = |r: &Samples| r.values.iter().copied().chain(ends(r.interval)).collect::<Vec<_>>();
    let axis = Linear::over(rows.iter().flat_map(of), left, right);
    let bottom = top + step * rows.len() as f64;
    let mut body = axis.grid(top, bottom, unit);
    for (i, row) in rows.iter().enumerate() {
        let y = top + step * i as f64;
        body += &text(left, y + 13.0, "start", "", &cut(&row.label, WIDTH - 20.0, CHARACTER));
        // Dots of like values lie side by side in three lines.
        for (k, value) in row.values.iter().enumerate() {
            let y = y + 24.0 + 3.5 * (k % 3) as f64;
            body += &mark(row.kind, axis.at(*value), y, " seed");
        }
        let (class, y) = (class(row.kind), y + 39.0);
        if let Some((from, to)) = row.interval {
            let (from, to) = (axis.at(from), axis.at(to));
            body += &format!(
                "<path class=\"{class} whisker\" d=\"M{from:.1} {:.1}v6M{from:.1} {y:.1}H{to:.1}M{to:.1} {:.1}v6\"/>\n",
                y - 3.0,
                y - 3.0
            );
        }
        if let Some(mean) = row.mean {
            let x = axis.at(mean);
            body += &format!(
                "<path class=\"{class}\" d=\"M{x:.1} {:.1}l4 5l-4 5l-4 -5z\"/>\n",
                y - 5.0
            );
            body += &text(WIDTH - 4.0, y + 4.0, "end", "", &format!("{mean:.1}"));
        }
    }
    figure_of(title, description, (WIDTH, bottom + 34.0), &body)
}

/// Families of curves over whole numbers: each run thin, their mean bold. `over` widens the y axis, so that several plots can share one.
pub fn curves(
    title: &str,
    description: &str,
    axes: (&str, &str),
    over: (f64, f64),
    families: &[Curves],
) -> String {
    let (left, right) = (40.0, WIDTH - 12.0);
    let top = 46.0 + 16.0 * families.len() as f64;
    let bottom = top + 210.0;
    let points = || families.iter().flat_map(|f| f.each.iter().flatten().chain(&f.mean));
    let x = Linear { least_step: 1.0, ..Linear::over(points().map(|p| p.0), left, right) };
    let y = Linear::over(points().map(|p| p.1).chain([over.0, over.1]), bottom, top);
    let mut body = x.grid(top, bottom, axes.0) + &y.rules(left, right, axes.1, top);
    for (i, family) in families.iter().enumerate() {
        let class = class(family.kind);
        let path = |points: &[(f64, f64)], more: &str| {
            let line: Vec<_> =
                points.iter().map(|p| format!("{:.1} {:.1}", x.at(p.0), y.at(p.1))).collect();
            format!("<path class=\"{class} line {more}\" d=\"M{}\"/>\n", line.join("L"))
        };
        for run in family.each.iter().filter(|run| run.len() > 1) {
            body += &path(run, "thin");
        }
        // A single epoch is no line.
        for p in family.each.iter().chain([&family.mean]).filter(|run| run.len() == 1).flatten() {
            body += &mark(family.kind, x.at(p.0), y.at(p.1), " seed");
        }
        if family.mean.len() > 1 {
            body += &path(&family.mean, "bold");
        }
        let row = 34.0 + 16.0 * i as f64;
        body += &format!("<path class=\"{class} line bold\" d=\"M4 {:.1}h24\"/>\n", row - 4.0);
        body += &text(34.0, row, "start", "faint", &cut(&family.label, WIDTH - 40.0, CHARACTER));
    }
    figure_of(title, description, (WIDTH, bottom + 34.0), &body)
}

/// Points over a logarithmic x axis and a linear y axis, numbered, with a list of their names below.
pub fn scatter(title: &str, description: &str, axes: (&str, &str), points: &[Point]) -> String {
    let (left, right, top, bottom) = (40.0, WIDTH - 24.0, 44.0, 240.0);
    let x = Log::over(points.iter().map(|p| p.x), left, right);
    let y = Linear::over(points.iter().flat_map(|p| ends(p.interval).chain([p.y])), bottom, top);
    let mut body = x.grid(top, bottom, axes.0) + &y.rules(left, right, axes.1, top);
    let list = bottom + 52.0;
    for (i, p) in points.iter().enumerate() {
        let (class, px, py) = (class(p.kind), x.at(p.x), y.at(p.y));
        if let Some((from, to)) = p.interval {
            let (from, to) = (y.at(from), y.at(to));
            body +=
                &format!("<path class=\"{class} whisker\" d=\"M{px:.1} {from:.1}V{to:.1}\"/>\n");
        }
        body += &mark(p.kind, px, py, "");
        // By turns on either side, since the costs of models are often close.
        let (shift, anchor) = if i % 2 == 0 { (8.0, "start") } else { (-8.0, "end") };
        let number = (i + 1).to_string();
        body += &text(px + shift, py + 4.0, anchor, "", &number);
        let row = list + 16.0 * i as f64;
        body += &mark(p.kind, 8.0, row - 4.0, "");
        body += &text(
            18.0,
            row,
            "start",
            "",
            &cut(&format!("{number} {}", p.label), WIDTH - 24.0, CHARACTER),
        );
    }
    figure_of(title, description, (WIDTH, list + 16.0 * points.len() as f64), &body)
}

/// Counts of true (rows) against predicted classes (columns) as shares of their row, darker the larger. Columns have the numbers of the rows.
/// Shares are written into the cells where there is room: up to ten classes.
pub fn matrix(title: &str, description: &str, classes: &[String], counts: &[Vec<u64>]) -> String {
    let longest = classes.iter().map(|c| c.chars().count()).max().unwrap_or(0) as f64;
    let (left, top) = ((30.0 + CHARACTER * longest).min(130.0), 56.0);
    let cell = ((WIDTH - left - 4.0) / classes.len().max(1) as f64).min(64.0);
    let small = if classes.len() > 18 { "small faint" } else { "faint" };
    let mut body = text(left, 36.0, "start", "faint", "predicted");
    for (i, class) in classes.iter().enumerate() {
        let (number, at) = (i + 1, cell * (i as f64 + 0.5));
        // Every other number where they would touch.
        if cell > 15.0 || i % 2 == 0 {
            body += &text(left + at, top - 6.0, "middle", small, &number.to_string());
        }
        let name = cut(&format!("{number} {class}"), left - 6.0, CHARACTER);
        if cell > 8.0 {
            body += &text(left - 5.0, top + at + 4.0, "end", small, &name);
        }
    }
    for (i, row) in counts.iter().enumerate() {
        let sum = row.iter().sum::<u64>().max(1) as f64;
        for (j, count) in row.iter().enumerate() {
            let (share, x, y) =
                (*count as f64 / sum, left + cell * j as f64, top + cell * i as f64);
            body += &format!(
                "<rect class=\"a cell\" fill-opacity=\"{:.2}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{cell:.1}\" height=\"{cell:.1}\"/>\n",
                0.03 + 0.5 * share
            );
            if classes.len() <= 10 {
                let (x, y) = (x + 0.5 * cell, y + 0.5 * cell + 4.0);
                body += &text(x, y, "middle", "", &format!("{:.0}", 100.0 * share));
            }
        }
    }
    figure_of(title, description, (WIDTH, top + cell * classes.len() as f64 + 8.0), &body)
}

fn ends(interval: Option<(f64, f64)>) -> impl Iterator<Item = f64> {
    interval.into_iter().flat_map(|(low, high)| [low, high])
}

/// A linear axis from one place of the picture to another.
struct Linear {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    least_step: f64,
}

impl Linear {
    /// Over finite values, with some room at both ends.
    fn over(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for v in values.filter(|v| v.is_finite()) {
            (low, high) = (low.min(v), high.max(v));
        }
        if !low.is_finite() {
            (low, high) = (0.0, 1.0);
        }
        let room = (0.05 * (high - low)).max(0.01 * low.abs()).max(1e-6);
        Self { low: low - room, high: high + room, from, to, least_step: 0.0 }
    }

    fn at(&self, v: f64) -> f64 {
        self.from + (self.to - self.from) * (v - self.low) / (self.high - self.low)
    }

    /// Four to eight round values between both ends.
    fn ticks(&self) -> Vec<f64> {
        let raw = (self.high - self.low) / 7.0;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|s| s * power).into_iter().find(|s| *s >= raw);
        let step = step.unwrap_or(10.0 * power).max(self.least_step);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }

    /// The axis along x.
    fn grid(&self, top: f64, bottom: f64, label: &str) -> String {
        let ticks = self.ticks().into_iter().map(|v| (v, self.at(v)));
        x_axis(ticks, (self.from, self.to), (top, bottom), label)
    }

    /// The axis along y.
    fn rules(&self, left: f64, right: f64, label: &str, top: f64) -> String {
        y_axis(self.ticks().into_iter().map(|v| (v, self.at(v))), (left, right))
            + &text(2.0, top - 8.0, "start", "faint", label)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_axis() {
        let axis = Linear::over([70.0, 90.0].into_iter(), 0.0, 100.0);
        assert!(axis.at(70.0) > 0.0 && axis.at(90.0) < 100.0);
        assert!((axis.at(80.0) - 50.0).abs() < 1e-9);
        assert_eq!(axis.ticks(), [70.0, 75.0, 80.0, 85.0, 90.0]);
        for values in [vec![], vec![0.0], vec![85.0; 3], vec![f64::NAN, 1.0]] {
            let axis = Linear::over(values.iter().copied(), 0.0, 1.0);
            let count = axis.ticks().len();
            assert!(axis.at(1.0).is_finite() && (2..=9).contains(&count), "{values:?}: {count}");
        }
    }

    #[test]
    fn figures_of_little_or_odd_data() {
        let row = |values: Vec<f64>| Samples {
            label: "<a>".into(),
            kind: 0,
            mean: values.first().copied(),
            values,
            interval: None,
        };
        let family = |n: usize| Curves {
            label: "a".into(),
            kind: 1,
            each: vec![(0..n).map(|i| (i as f64, 0.5)).collect()],
            mean: (0..n).map(|i| (i as f64, 0.5)).collect(),
        };
        let all = [
            samples("t", "d", "%", &[]),
            samples("t", "d", "%", &[row(vec![]), row(vec![1.0])]),
            curves("t", "d", ("x", "y"), (f64::NAN, f64::NAN), &[family(0), family(1), family(3)]),
            scatter("t", "d", ("x", "y"), &[]),
            matrix("t", "d", &[], &[]),
            matrix("t", "d", &["a".to_string(), "b".to_string()], &[vec![0, 0], vec![3, 1]]),
        ];
        for svg in all {
            assert!(
                !svg.contains("NaN") && !svg.contains("inf") && svg.contains("<desc>"),
                "{svg}"
            );
            assert!(!svg.contains("<a>"), "{svg}");
        }
    }
}
