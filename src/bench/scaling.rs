//! How time and memory of attention grow: lines over one size, all else fixed, and the exponents fitted to them.

use super::report::{Measured, Outcome};
use super::row::{Outside, Place, Position, Row, Size, Subject};
use serde::{Deserialize, Serialize};

/// Images, map, heads, channels of a head and window that a line holds fixed.
#[derive(Clone, Copy)]
struct Base {
    n: usize,
    size: usize,
    heads: usize,
    d: usize,
    window: usize,
}

/// A line: the size that it is over, its values, the base with that value and x, and the exponents that arithmetic has.
type Line = (&'static str, &'static [usize], fn(Base, usize) -> (Base, f64), (f64, f64));

const LOCAL: Base = Base { n: 8, size: 28, heads: 8, d: 16, window: 7 };
const GLOBAL: Base = Base { n: 4, size: 14, heads: 8, d: 32, window: 0 };

const LOCAL_LINES: [Line; 5] = [
    ("H*W", &[14, 20, 28, 40, 56], by_map, (1.0, 1.0)),
    ("k*k", &[3, 5, 7, 9, 11, 13], by_window, (1.0, 0.0)),
    ("heads", &[2, 4, 8, 16], by_heads, (1.0, 1.0)),
    ("d", &[8, 16, 32, 64], by_d, (1.0, 1.0)),
    ("batch", &[2, 4, 8, 16], by_batch, (1.0, 1.0)),
];
const GLOBAL_LINES: [Line; 4] = [
    ("H*W", &[10, 14, 20, 28, 40], by_map, (2.0, 1.0)),
    ("heads", &[2, 4, 8, 16], by_heads, (1.0, 1.0)),
    ("d", &[16, 32, 64, 128], by_d, (1.0, 1.0)),
    ("batch", &[2, 4, 8, 16], by_batch, (1.0, 1.0)),
];

fn by_map(base: Base, size: usize) -> (Base, f64) {
    (Base { size, ..base }, (size * size) as f64)
}

fn by_window(base: Base, window: usize) -> (Base, f64) {
    (Base { window, ..base }, (window * window) as f64)
}

fn by_heads(base: Base, heads: usize) -> (Base, f64) {
    (Base { heads, ..base }, heads as f64)
}

fn by_d(base: Base, d: usize) -> (Base, f64) {
    (Base { d, ..base }, d as f64)
}

fn by_batch(base: Base, n: usize) -> (Base, f64) {
    (Base { n, ..base }, n as f64)
}

/// The suite `scaling`. Large has eight times the images; tiny has the lines over the map and the window alone, at three values.
pub(crate) fn rows(size: Size) -> Vec<Row> {
    let base = |base: Base| match size {
        Size::Tiny => Base { n: 1, size: 8, heads: 2, d: 8, ..base },
        Size::Small => base,
        Size::Large => Base { n: 8 * base.n, ..base },
    };
    let mut rows = Vec::new();
    let kinds = [("local", LOCAL, &LOCAL_LINES[..]), ("global", GLOBAL, &GLOBAL_LINES[..])];
    for (kind, fixed, lines) in kinds {
        for (against, values, change, expected) in lines {
            let (values, lines_of_tiny) = match (size, *against) {
                (Size::Tiny, "H*W") => (&[4, 6, 8][..], true),
                (Size::Tiny, "k*k") => (&[3, 5, 7][..], true),
                _ => (*values, size != Size::Tiny),
            };
            for &value in values.iter().filter(|_| lines_of_tiny) {
                let (at, x) = change(base(fixed), value);
                rows.push(row(kind, against, value, at, x, *expected));
            }
        }
    }
    rows
}

fn row(kind: &str, against: &str, value: usize, at: Base, x: f64, expected: (f64, f64)) -> Row {
    let short = match against {
        "H*W" => "map",
        "k*k" => "window",
        other => other,
    };
    let (Base { n, size, heads, d, window }, position) = (at, Position::None);
    let border = Outside::Mask;
    let subject = match kind {
        "local" => Subject::LocalAttention { n, size, heads, d, window, border, position },
        _ => Subject::GlobalAttention { n, size, heads, d, position },
    };
    Row {
        name: format!("scaling_{kind}_{short}_{value}"),
        suite: "scaling".into(),
        place: Place::Line { line: kind.into(), against: against.into(), x, expected },
        subject,
    }
}

/// y = factor x^exponent, fitted by least squares in logarithms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Power {
    /// The exponent.
    pub exponent: f64,
    /// Its standard error, by the scatter of the points; none for two points.
    pub standard_error: Option<f64>,
    /// y at x = 1.
    pub factor: f64,
}

impl Power {
    /// Through points of positive x and y; `None` for fewer than two different x.
    pub fn fit(points: &[(f64, f64)]) -> Option<Self> {
        let logs: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
        let n = logs.len() as f64;
        let (mean_x, mean_y) =
            (logs.iter().map(|p| p.0).sum::<f64>() / n, logs.iter().map(|p| p.1).sum::<f64>() / n);
        let xx: f64 = logs.iter().map(|p| (p.0 - mean_x).powi(2)).sum();
        let xy: f64 = logs.iter().map(|p| (p.0 - mean_x) * (p.1 - mean_y)).sum();
        let exponent = xy / xx;
        if logs.len() < 2 || !exponent.is_finite() {
            return None;
        }
        let at = |x: f64| mean_y + exponent * (x - mean_x);
        let rest: f64 = logs.iter().map(|p| (p.1 - at(p.0)).powi(2)).sum();
        let standard_error = (logs.len() > 2).then(|| (rest / (n - 2.0) / xx).sqrt());
        Some(Self { exponent, standard_error, factor: at(0.0).exp() })
    }
}

/// y = fixed + slope x, fitted by least squares of the relative differences.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Straight {
    /// y at x = 0: what no x changes.
    pub fixed: f64,
    /// What one more of x adds.
    pub slope: f64,
    /// The largest difference of a point from the line, relative to the point.
    pub off: f64,
}

impl Straight {
    /// Through points of positive y; `None` for fewer than three different x, through which any line goes.
    pub fn fit(points: &[(f64, f64)]) -> Option<Self> {
        let mut different: Vec<f64> = points.iter().map(|p| p.0).collect();
        different.sort_by(f64::total_cmp);
        different.dedup();
        if different.len() < 3 || points.iter().any(|p| p.1 <= 0.0) {
            return None;
        }
        // Weights 1 / y^2.
        let sum = |of: fn(f64, f64) -> f64| -> f64 {
            points.iter().map(|&(x, y)| of(x, y) / (y * y)).sum()
        };
        let [w, wx, wxx] = [sum(|_, _| 1.0), sum(|x, _| x), sum(|x, _| x * x)];
        let [wy, wxy] = [sum(|_, y| y), sum(|x, y| x * y)];
        let slope = (w * wxy - wx * wy) / (w * wxx - wx * wx);
        let fixed = (wy - slope * wx) / w;
        let off = points.iter().map(|(x, y)| ((fixed + slope * x) / y - 1.0).abs());
        Some(Self { fixed, slope, off: off.fold(0.0, f64::max) })
    }
}

/// What was fitted to a line of the suite `scaling`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// `local` or `global`.
    pub line: String,
    /// What the line is over.
    pub against: String,
    /// `time` (forward and backward) or `memory` (its peak beside the inputs).
    pub of: String,
    /// The points: size, and milliseconds or bytes.
    pub points: Vec<(f64, f64)>,
    /// What they follow.
    pub power: Power,
    /// The same as a straight line, where arithmetic has one and there are points enough.
    pub straight: Option<Straight>,
    /// The exponent that the arithmetic has.
    pub expected: f64,
}

/// A fit of time and one of memory for each line that has points enough.
pub(crate) fn fits(rows: &[Measured]) -> Vec<Fit> {
    let mut lines: Vec<(&str, &str, (f64, f64))> = Vec::new();
    for m in rows {
        if let Place::Line { line, against, expected, .. } = &m.row.place
            && !lines.iter().any(|l| (l.0, l.1) == (line, against))
        {
            lines.push((line, against, *expected));
        }
    }
    let mut fits = Vec::new();
    for (line, against, (time, memory)) in lines {
        for (of, expected) in [("time", time), ("memory", memory)] {
            let points = points(rows, line, against, of);
            if let Some(power) = Power::fit(&points) {
                let straight = Straight::fit(&points).filter(|_| expected == 1.0);
                let (line, against, of) = (line.into(), against.into(), of.into());
                fits.push(Fit { line, against, of, points, power, straight, expected });
            }
        }
    }
    fits
}

fn points(rows: &[Measured], of_line: &str, over: &str, what: &str) -> Vec<(f64, f64)> {
    let point = |m: &Measured| match (&m.row.place, &m.outcome) {
        (Place::Line { line, against, x, .. }, Outcome::Timed(t))
            if line == of_line && against == over =>
        {
            let y = if what == "time" { t.whole.timing.ms } else { t.whole.peak_bytes as f64 };
            (y > 0.0).then_some((*x, y))
        }
        _ => None,
    };
    rows.iter().filter_map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_is_found_with_its_error() {
        let exact: Vec<(f64, f64)> =
            [1.0, 2.0, 5.0, 9.0].map(|x: f64| (x, 3.0 * x.powf(1.5))).into();
        let fit = Power::fit(&exact).unwrap();
        assert!((fit.exponent - 1.5).abs() < 1e-12 && (fit.factor - 3.0).abs() < 1e-12, "{fit:?}");
        assert!(fit.standard_error.unwrap() < 1e-12);
        // Points off the line by +-10 %; slope and error as an ordinary least-squares program gives them for these logarithms.
        let noisy = [(1.0, 1.1), (2.0, 1.8), (4.0, 4.4), (8.0, 7.2)];
        let fit = Power::fit(&noisy).unwrap();
        assert!((fit.exponent - 0.942_099).abs() < 1e-5, "{fit:?}");
        assert!((fit.standard_error.unwrap() - 0.081_885).abs() < 1e-5, "{fit:?}");
        assert_eq!(Power::fit(&[(2.0, 1.0), (2.0, 3.0)]), None);
        assert_eq!(Power::fit(&[(2.0, 1.0)]), None);
        assert_eq!(Power::fit(&[(1.0, 1.0), (2.0, 4.0)]).unwrap().standard_error, None);
    }

    #[test]
    fn a_straight_line_is_found_with_its_fixed_part() {
        let exact: Vec<(f64, f64)> = [1.0, 4.0, 9.0].map(|x| (x, 2.0 + 0.5 * x)).into();
        let line = Straight::fit(&exact).unwrap();
        assert!((line.fixed - 2.0).abs() < 1e-12 && (line.slope - 0.5).abs() < 1e-12, "{line:?}");
        assert!(line.off < 1e-12);
        // By numpy.polyfit(x, y, 1, w=1/y).
        let line = Straight::fit(&[(1.0, 1.1), (2.0, 1.8), (4.0, 4.4), (8.0, 7.2)]).unwrap();
        assert!(
            (line.fixed - 0.148_776_8).abs() < 1e-6 && (line.slope - 0.915_062_1).abs() < 1e-6,
            "{line:?}"
        );
        assert!((line.off - 0.134_312_5).abs() < 1e-6, "{line:?}");
        assert_eq!(Straight::fit(&[(1.0, 1.0), (1.0, 1.1), (2.0, 2.0)]), None);
    }

    #[test]
    fn a_line_changes_one_size() {
        let rows = rows(Size::Small);
        let of = |start: &str| rows.iter().filter(|r| r.name.starts_with(start)).count();
        assert_eq!((of("scaling_local_"), of("scaling_global_")), (23, 17));
        let window = rows.iter().find(|r| r.name == "scaling_local_window_13").unwrap();
        let Place::Line { x, expected, .. } = &window.place else { panic!("{window:?}") };
        assert_eq!((*x, *expected), (169.0, (1.0, 0.0)));
    }
}
