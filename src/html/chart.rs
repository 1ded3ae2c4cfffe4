//! Charts as inline SVG with a title and a description, coloured by the page's style.

use super::escape;

const WIDTH: f64 = 460.0;
/// Classes of the page's style, one for each kind of mark.
const KINDS: [&str; 3] = ["a", "b", "c"];

/// A character's width at the size of labels, somewhat more than it is on average.
pub(super) const CHARACTER: f64 = 6.6;
/// The same of titles.
const TITLE_CHARACTER: f64 = 8.6;

/// Powers of ten that an axis shows at least.
const LEAST_DECADES: f64 = 0.9;

/// A line of [`dots`]: a value with its spread, and maybe a part of it.
#[derive(Clone, Debug)]
pub struct Dot {
    /// What it is of.
    pub label: String,
    /// Which of the chart's kinds.
    pub kind: usize,
    /// The value, above 0.
    pub value: f64,
    /// From where to where most samples lie.
    pub spread: (f64, f64),
    /// A part of the value, above 0.
    pub part: Option<f64>,
}

/// A line of [`lines`]: points, and the power that was fitted to them.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// x and y, above 0.
    pub points: Vec<(f64, f64)>,
    /// Factor and exponent of y = factor x^exponent.
    pub power: Option<(f64, f64)>,
}

/// A line of [`shares`].
#[derive(Clone, Debug)]
pub struct Share {
    /// What it is of.
    pub label: String,
    /// Which of the chart's kinds.
    pub kind: usize,
    /// Percent.
    pub percent: f64,
}

/// Values of several things on one logarithmic axis: a full mark with its spread, a hollow one for its part.
pub fn dots(title: &str, description: &str, unit: &str, dots: &[Dot]) -> String {
    let (left, right, top, step) = (112.0, 60.0, 30.0, 19.0);
    let values =
        dots.iter().flat_map(|d| [d.value, d.spread.0, d.spread.1].into_iter().chain(d.part));
    let axis = Log::over(values, left, WIDTH - right);
    let bottom = top + step * dots.len() as f64 + 4.0;
    let mut body = axis.grid(top, bottom, unit);
    for (i, dot) in dots.iter().enumerate() {
        let y = top + step * (i as f64 + 0.6);
        let (class, x) = (class(dot.kind), axis.at(dot.value));
        body += &text(left - 8.0, y + 4.0, "end", "", &dot.label);
        let (from, to) = (axis.at(dot.spread.0), axis.at(dot.spread.1));
        body += &format!("<path class=\"{class} whisker\" d=\"M{from:.1} {y:.1}H{to:.1}\"/>\n");
        if let Some(part) = dot.part {
            body += &mark(dot.kind, axis.at(part), y, " hollow");
        }
        body += &mark(dot.kind, x, y, "");
        body += &text(WIDTH - right + 8.0, y + 4.0, "start", "faint", &short(dot.value));
    }
    figure(title, description, bottom + 34.0, &body)
}

/// Lines over logarithmic axes, each with the power that was fitted to it.
pub fn lines(title: &str, description: &str, axes: (&str, &str), series: &[Series]) -> String {
    let (left, right, top, bottom) = (56.0, 14.0, 50.0, 250.0);
    let points = || series.iter().flat_map(|s| s.points.iter());
    let x = Log::over(points().map(|p| p.0), left, WIDTH - right);
    let y = Log::over(points().map(|p| p.1), bottom, top);
    let mut body = x.grid(top, bottom, axes.0) + &y.rules(left, WIDTH - right, axes.1, top);
    for (i, s) in series.iter().enumerate() {
        if let (Some((factor, exponent)), Some(first), Some(last)) =
            (s.power, s.points.first(), s.points.last())
        {
            let at = |v: f64| (x.at(v), y.at(factor * v.powf(exponent)));
            let ((x1, y1), (x2, y2)) = (at(first.0), at(last.0));
            let class = class(i);
            body +=
                &format!("<path class=\"{class} line\" d=\"M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}\"/>\n");
        }
        for p in &s.points {
            body += &mark(i, x.at(p.0), y.at(p.1), "");
        }
        let at = left + 170.0 * i as f64;
        let name = match s.power {
            Some((_, exponent)) => format!("{}: exponent {exponent:.2}", s.name),
            None => s.name.clone(),
        };
        body += &mark(i, at + 5.0, 36.0, "");
        body += &text(at + 14.0, 40.0, "start", "faint", &name);
    }
    figure(title, description, bottom + 34.0, &body)
}

/// Bars from 0 to 100 percent, with a legend of their kinds.
pub fn shares(title: &str, description: &str, kinds: &[&str], rows: &[Share]) -> String {
    let (left, right, top, step) = (250.0, 50.0, 48.0, 17.0);
    let (width, total) = (2.0 * WIDTH, top + step * rows.len() as f64);
    let full = rows.iter().map(|r| r.percent).fold(100.0, f64::max);
    let at = |percent: f64| left + (width - left - right) * percent / full;
    let mut body = String::new();
    for (i, kind) in kinds.iter().enumerate() {
        let x = left + 160.0 * i as f64;
        body += &format!(
            "<rect class=\"{}\" x=\"{x:.1}\" y=\"26\" width=\"10\" height=\"10\"/>\n",
            class(i)
        );
        body += &text(x + 16.0, 35.0, "start", "faint", kind);
    }
    for percent in [0.0, 25.0, 50.0, 75.0, 100.0] {
        let x = at(percent);
        body += &format!("<path class=\"axis\" d=\"M{x:.1} {top}V{total:.1}\"/>\n");
        body += &text(x, total + 16.0, "middle", "faint", &format!("{percent} %"));
    }
    for (i, row) in rows.iter().enumerate() {
        let y = top + step * i as f64 + 3.0;
        let (class, long) = (class(row.kind), at(row.percent) - left);
        body += &text(left - 8.0, y + 10.0, "end", "", &row.label);
        body += &format!(
            "<rect class=\"{class}\" x=\"{left}\" y=\"{y:.1}\" width=\"{long:.1}\" height=\"11\"/>\n"
        );
        body +=
            &text(left + long + 6.0, y + 10.0, "start", "faint", &format!("{:.0}", row.percent));
    }
    figure_of(title, description, (width, total + 26.0), &body)
}

/// A logarithmic axis from one place of the picture to another.
pub(super) struct Log {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Log {
    /// Over values above 0, with some room at both ends.
    pub(super) fn over(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for v in values.filter(|v| *v > 0.0).map(f64::log10) {
            (low, high) = (low.min(v), high.max(v));
        }
        if !low.is_finite() {
            (low, high) = (0.0, 1.0);
        }
        // Values that hardly differ shall look so.
        let room = (0.06 * (high - low)).max((LEAST_DECADES - (high - low)) / 2.0);
        Self { low: low - room, high: high + room, from, to }
    }

    pub(super) fn at(&self, v: f64) -> f64 {
        let part = (v.max(1e-300).log10() - self.low) / (self.high - self.low);
        self.from + (self.to - self.from) * part
    }

    /// Round values between both ends: powers of ten, and 2 and 5 times these where there are few.
    fn ticks(&self) -> Vec<f64> {
        let steps: &[f64] = match self.high - self.low {
            range if range < 2.5 => &[1.0, 2.0, 5.0],
            _ => &[1.0],
        };
        let decades = self.low.floor() as i32..=self.high.ceil() as i32;
        let all = decades.flat_map(|p| steps.iter().map(move |s| s * 10f64.powi(p)));
        all.filter(|v| (self.low..=self.high).contains(&v.log10())).collect()
    }

    /// The axis along x.
    pub(super) fn grid(&self, top: f64, bottom: f64, label: &str) -> String {
        let ticks = self.ticks().into_iter().map(|v| (v, self.at(v)));
        x_axis(ticks, (self.from, self.to), (top, bottom), label)
    }

    /// The axis along y.
    fn rules(&self, left: f64, right: f64, label: &str, top: f64) -> String {
        y_axis(self.ticks().into_iter().map(|v| (v, self.at(v))), (left, right))
            + &text(left - 6.0, top - 10.0, "end", "faint", label)
    }
}

/// An axis along x of values at their places: rules from top to bottom with the values below, and what they are of.
pub(super) fn x_axis(
    ticks: impl Iterator<Item = (f64, f64)>,
    (from, to): (f64, f64),
    (top, bottom): (f64, f64),
    label: &str,
) -> String {
    let tick = |(v, x): (f64, f64)| {
        format!("<path class=\"axis\" d=\"M{x:.1} {top}V{bottom:.1}\"/>\n")
            + &text(x, bottom + 14.0, "middle", "faint", &short(v))
    };
    let label = text((from + to) / 2.0, bottom + 30.0, "middle", "faint", label);
    ticks.map(tick).collect::<String>() + &label
}

/// An axis along y: rules from left to right with the values before them.
pub(super) fn y_axis(ticks: impl Iterator<Item = (f64, f64)>, (left, right): (f64, f64)) -> String {
    let tick = |(v, y): (f64, f64)| {
        format!("<path class=\"axis\" d=\"M{left} {y:.1}H{right:.1}\"/>\n")
            + &text(left - 6.0, y + 4.0, "end", "faint", &short(v))
    };
    ticks.map(tick).collect()
}

pub(super) fn class(kind: usize) -> &'static str {
    KINDS[kind % KINDS.len()]
}

/// A mark at a place; kinds differ in shape too.
pub(super) fn mark(kind: usize, x: f64, y: f64, more: &str) -> String {
    let class = class(kind);
    match kind % KINDS.len() {
        0 => format!("<circle class=\"{class}{more}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"/>\n"),
        1 => {
            let (x, y) = (x - 3.7, y - 3.7);
            format!(
                "<rect class=\"{class}{more}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"7.4\" height=\"7.4\"/>\n"
            )
        }
        _ => {
            let y = y - 5.0;
            format!("<path class=\"{class}{more}\" d=\"M{x:.1} {y:.1}l4.6 8.4h-9.2z\"/>\n")
        }
    }
}

pub(super) fn text(x: f64, y: f64, anchor: &str, class: &str, content: &str) -> String {
    let content = escape(content);
    format!(
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{content}</text>\n"
    )
}

/// A label that fits into a width, with an ellipsis in its middle: names often differ at their ends.
pub(super) fn cut(label: &str, width: f64, character: f64) -> String {
    let room = (width / character).max(3.0) as usize;
    let all: Vec<char> = label.chars().collect();
    if all.len() <= room {
        return label.to_owned();
    }
    let (first, last) = (room / 2, room - room / 2 - 1);
    all[..first].iter().chain(&['…']).chain(&all[all.len() - last..]).collect()
}

/// A number in few characters.
pub(super) fn short(v: f64) -> String {
    match v.abs() {
        a if a >= 1e6 => format!("{}M", trimmed(v / 1e6)),
        a if a >= 1e4 => format!("{}k", trimmed(v / 1e3)),
        _ => trimmed(v),
    }
}

/// Three significant digits, without zeros at the end.
fn trimmed(v: f64) -> String {
    let digits = (2 - v.abs().max(1e-9).log10().floor() as i32).clamp(0, 6) as usize;
    let text = format!("{v:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').into(),
        false => text,
    }
}

fn figure(title: &str, description: &str, height: f64, body: &str) -> String {
    figure_of(title, description, (WIDTH, height), body)
}

/// The title is a chart's name for who cannot see it, and its heading for who can.
pub(super) fn figure_of(
    title: &str,
    description: &str,
    (width, height): (f64, f64),
    body: &str,
) -> String {
    let (name, description) = (escape(title), escape(description));
    format!(
        "<figure>\n<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height:.0}\" role=\"img\">\n<title>{name}</title>\n\
         <desc>{description}</desc>\n{}{body}</svg>\n</figure>\n",
        text(2.0, 16.0, "start", "title", &cut(title, width - 4.0, TITLE_CHARACTER))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_is_logarithmic() {
        let axis = Log::over([1.0, 10.0, 100.0].into_iter(), 0.0, 112.0);
        let [a, b, c] = [1.0, 10.0, 100.0].map(|v| axis.at(v));
        assert!((b - a - (c - b)).abs() < 1e-9 && a > 0.0 && c < 112.0);
        assert_eq!(axis.ticks(), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        let empty = Log::over(std::iter::empty(), 0.0, 1.0);
        assert!(empty.at(5.0).is_finite());
    }

    #[test]
    fn labels_keep_both_ends() {
        assert_eq!(cut("short", 100.0, CHARACTER), "short");
        assert_eq!(cut("resnet18+ga@4:heads=4", 66.0, CHARACTER), "resne…ds=4");
    }

    #[test]
    fn short_numbers() {
        let all = [0.05, 1.0, 12.34, 250.0, 3136.0, 12_544.0, 2.5e6];
        assert_eq!(all.map(short), ["0.05", "1", "12.3", "250", "3136", "12.5k", "2.5M"]);
    }
}
