//! A report as text: lines of a terminal as rows are timed, and tables.

use super::report::{Measured, Outcome, Reached, Report, Times};
use super::row::{Place, Row};
use super::scaling::Straight;
use super::work::Work;
use super::{Ceiling, Precision, peers, suites_of};
use crate::html::Table;

const MIB: f64 = (1 << 20) as f64;

/// What was measured, and against what.
pub fn preface(report: &Report) -> String {
    let e = &report.environment;
    let rate = |c: &Ceiling, unit: &str| {
        format!("{:.1} {unit} ({}: {})", 1e-9 * c.per_second, c.source, c.how)
    };
    let products = match &report.ceilings.multiply_add {
        Some(c) => rate(c, "GFLOP/s"),
        None => "not known for this precision and device".into(),
    };
    let launch =
        |c: &Ceiling| format!("launch: {:.1} µs ({}: {})\n", 1e6 / c.per_second, c.source, c.how);
    let launch = report.ceilings.launch.as_ref().map_or_else(String::new, launch);
    format!(
        "{}: {}, {}, rows '{}', {}\ncopy: {}\nmultiply-add: {products}\n{launch}times: {}; whole = forward + backward, or step; \
         % max = the least time by these two, of the whole\n",
        e.device,
        e.adapter,
        e.precision,
        e.size,
        e.date,
        rate(&report.ceilings.copy, "GB/s"),
        e.clock,
    )
}

/// The head of the lines, with two columns for each peer.
pub fn header(peers: &[String]) -> String {
    let mut head = format!(
        "{:40} {:>10} {:>10} {:>21} {:>8} {:>9} {:>8} {:>6} {:>9} {:>9}",
        "row",
        "forward ms",
        "whole ms",
        "p20 .. p80",
        "launches",
        "GFLOP/s",
        "GB/s",
        "% max",
        "peak MiB",
        "saved MiB"
    );
    for peer in peers {
        head += &format!("  {peer}, ratio");
    }
    head
}

/// A row's line. A peer's ratio is its time over ours: above 1 ours is faster.
pub fn line(measured: &Measured, peers: &[String]) -> String {
    let name = &measured.row.name;
    let times = match &measured.outcome {
        Outcome::Failed { failed } => return format!("{name:40} failed: {failed}"),
        Outcome::Skipped { skipped } => return format!("{name:40} skipped: {skipped}"),
        Outcome::Timed(times) => times,
    };
    let (whole, timing) = (&times.whole, &times.whole.timing);
    let forward = times.forward.as_ref().map_or("-".into(), |f| format!("{:.4}", f.timing.ms));
    let mut line = format!(
        "{name:40} {forward:>10} {:>10.4} {:>21} {:>8} {:>9} {:>8} {:>6} {:>9.2} {:>9}",
        timing.ms,
        format!("{:.4} .. {:.4}", timing.p20_ms, timing.p80_ms),
        timing.launches,
        number(whole.gflop_per_s, 1),
        number(whole.gb_per_s, 1),
        number(whole.percent, 1),
        whole.peak_bytes as f64 / MIB,
        number(times.saved_bytes.map(|b| b as f64 / MIB), 2)
    );
    for peer in peers {
        let [ms, ratio] = beside(measured, peer);
        line += &format!("  {:>w$}", format!("{ms} ms, {ratio}"), w = peer.len() + 7);
    }
    line
}

/// Where the time of a row goes: each entry point's launches, milliseconds and share, and on a CPU what is in no kernel.
pub fn profile(measured: &Measured) -> Option<Table> {
    let Outcome::Timed(times) = &measured.outcome else { return None };
    let timing = &times.whole.timing;
    let mut parts: Vec<(&str, String, f64)> = Vec::new();
    for share in &timing.kernels {
        parts.push((&share.entry, share.launches.to_string(), share.ms));
    }
    let inside: f64 = parts.iter().map(|p| p.2).sum();
    // The host's clock and a GPU's are of different calls.
    if timing.ms == timing.wall.median_ms && inside < timing.ms {
        parts.push(("(no kernel)", "-".into(), timing.ms - inside));
        parts.sort_by(|a, b| b.2.total_cmp(&a.2));
    }
    let all = inside.max(timing.ms);
    let row = |(entry, launches, ms): (&str, String, f64)| {
        vec![entry.into(), launches, format!("{ms:.4}"), format!("{:.1}", 100.0 * ms / all)]
    };
    let rows: Vec<_> = parts.into_iter().map(row).collect();
    let head = ["entry point", "launches", "ms", "% of the whole"].map(String::from).into();
    let caption = format!("{}: where {:.4} ms go", measured.row.name, timing.ms);
    (!timing.kernels.is_empty()).then_some(Table { caption, head, rows })
}

/// What follows the lines: the fitted exponents, if there are any.
pub fn summary(report: &Report) -> String {
    match fit_table(report) {
        Some(table) => format!("\n{}", crate::html::aligned(&table)),
        None => String::new(),
    }
}

/// Every table of a report: attention against convolution, exponents, then each suite's rows.
pub fn tables(report: &Report) -> Vec<Table> {
    let mut tables = Vec::new();
    let mut stages = |what: &str, cell: fn(&Work, &Times) -> String| {
        tables.extend(stage_table(report, what, cell));
    };
    stages("forward and backward, ms", |_, t| three(t.whole.timing.ms));
    stages("forward, ms", |_, t| t.forward.as_ref().map_or("-".into(), |f| three(f.timing.ms)));
    stages("useful GFLOP, forward and backward", |work, _| three(1e-9 * work.whole.flop));
    stages("least MiB moved, forward and backward", |work, _| three(work.whole.bytes / MIB));
    stages("peak MiB, forward and backward", |_, t| three(t.whole.peak_bytes as f64 / MIB));
    stages("MiB saved for the backward", |_, t| {
        t.saved_bytes.map_or("-".into(), |b| three(b as f64 / MIB))
    });
    tables.extend(fit_table(report));
    tables.extend(suites_of(report).iter().map(|suite| suite_table(report, suite)));
    tables
}

/// Stages down, what can stand there across.
fn stage_table(report: &Report, what: &str, cell: fn(&Work, &Times) -> String) -> Option<Table> {
    let mut units: Vec<&str> = Vec::new();
    let mut stages: Vec<(String, Vec<(&str, String)>)> = Vec::new();
    for m in &report.rows {
        let Place::Stage { net, shape, unit } = &m.row.place else { continue };
        let text = match &m.outcome {
            Outcome::Timed(times) => cell(&m.work, times),
            _ => "-".into(),
        };
        if !units.contains(&unit.as_str()) {
            units.push(unit);
        }
        let stage = format!("{net} {shape}");
        match stages.iter_mut().find(|s| s.0 == stage) {
            Some(known) => known.1.push((unit, text)),
            None => stages.push((stage, vec![(unit, text)])),
        }
    }
    let head = ["stage"].into_iter().chain(units.iter().copied()).map(heading).collect();
    let row = |(stage, cells): (String, Vec<(&str, String)>)| {
        let at = |unit: &&str| cells.iter().find(|c| c.0 == *unit).map_or("-", |c| &c.1).into();
        std::iter::once(stage).chain(units.iter().map(at)).collect()
    };
    let caption = format!("Attention against convolution: {what}");
    let rows: Vec<Vec<String>> = stages.into_iter().map(row).collect();
    (!rows.is_empty()).then_some(Table { caption, head, rows })
}

fn heading(unit: &str) -> String {
    unit.replace('_', " ")
}

fn fit_table(report: &Report) -> Option<Table> {
    let head = [
        "attention",
        "over",
        "of",
        "exponent",
        "standard error",
        "by arithmetic",
        "as a straight line",
        "off by",
        "points",
    ];
    let row = |fit: &super::Fit| {
        let (first, last) = (fit.points.first(), fit.points.last());
        let end = |p: Option<&(f64, f64)>| p.map_or(0.0, |p| p.0);
        vec![
            fit.line.clone(),
            fit.against.clone(),
            fit.of.clone(),
            format!("{:.3}", fit.power.exponent),
            number(fit.power.standard_error, 3),
            number(Some(fit.expected), 0),
            fit.straight.map_or("-".into(), |line| straight(&line, &fit.of)),
            fit.straight.map_or("-".into(), |line| format!("{:.1} %", 100.0 * line.off)),
            format!("{} from {} to {}", fit.points.len(), end(first), end(last)),
        ]
    };
    let rows: Vec<_> = report.fits.iter().map(row).collect();
    let caption = "How attention grows: fitted exponents".into();
    (!rows.is_empty()).then_some(Table { caption, head: head.map(String::from).into(), rows })
}

fn straight(line: &Straight, of: &str) -> String {
    let (unit, scale) = if of == "time" { ("ms", 1.0) } else { ("MiB", 1.0 / MIB) };
    // What is left of sums that cancel is zero.
    let least = 1e-9 * (line.fixed.abs() + line.slope.abs());
    let text = |v: f64| three(if v.abs() < least { 0.0 } else { v * scale });
    let (fixed, slope) = (text(line.fixed), text(line.slope));
    format!("{fixed} {unit} + {slope} {unit} x")
}

/// Every row of a suite with all that was measured.
fn suite_table(report: &Report, suite: &str) -> Table {
    let rows: Vec<&Measured> = report.rows.iter().filter(|m| m.row.suite == suite).collect();
    let peers = peers::names(rows.iter().copied());
    let mut head: Vec<String> = [
        "row",
        "forward ms",
        "whole ms",
        "p20 .. p80",
        "launches",
        "GFLOP/s",
        "GB/s",
        "% of ceiling",
        "which binds",
        "peak MiB",
        "saved MiB",
    ]
    .map(String::from)
    .into();
    for peer in &peers {
        head.extend([format!("{peer} ms"), "its best way".into(), "ratio".into()]);
    }
    let columns = head.len();
    let cells = |m: &Measured| {
        let mut cells = vec![m.row.name.clone()];
        match &m.outcome {
            Outcome::Timed(times) => cells.extend(timed_cells(times)),
            Outcome::Failed { failed: why } | Outcome::Skipped { skipped: why } => {
                cells.push(why.clone());
                cells.resize(11, String::new());
            }
        }
        for peer in &peers {
            let best = m.peers.get(peer).and_then(|p| p.best());
            let [ms, ratio] = beside(m, peer);
            cells.extend([ms, best.map_or("-", |b| b.0).replace('_', " "), ratio]);
        }
        cells.resize(columns, String::new());
        cells
    };
    let rows: Vec<_> = rows.into_iter().map(cells).collect();
    Table { caption: format!("Suite {suite}"), head, rows }
}

fn timed_cells(times: &Times) -> [String; 10] {
    let Reached { timing, gflop_per_s, gb_per_s, percent, binds, peak_bytes } = &times.whole;
    [
        times.forward.as_ref().map_or("-".into(), |f| three(f.timing.ms)),
        three(timing.ms),
        format!("{} .. {}", three(timing.p20_ms), three(timing.p80_ms)),
        timing.launches.to_string(),
        number(*gflop_per_s, 1),
        number(*gb_per_s, 1),
        number(*percent, 1),
        binds.clone().unwrap_or("-".into()),
        three(*peak_bytes as f64 / MIB),
        times.saved_bytes.map_or("-".into(), |b| three(b as f64 / MIB)),
    ]
}

/// A peer's time and ratio, or why there is none.
fn beside(measured: &Measured, peer: &str) -> [String; 2] {
    let Some(time) = measured.peers.get(peer) else { return ["-".into(), "-".into()] };
    let ms = match (time.best(), &time.failed) {
        (Some((_, way)), _) => three(way.ms),
        (None, Some(why)) => why.clone(),
        (None, None) => "-".into(),
    };
    [ms, number(time.ratio(&measured.outcome), 2)]
}

fn number(v: Option<f64>, digits: usize) -> String {
    v.map_or("-".into(), |v| format!("{v:.digits$}"))
}

/// Three significant digits, without an exponent.
fn three(v: f64) -> String {
    if v == 0.0 {
        return "0".into();
    }
    let digits = 2 - v.abs().max(1e-9).log10().floor() as i32;
    format!("{v:.*}", digits.clamp(0, 6) as usize)
}

/// The rows as `attn2d bench --list` shows them.
pub fn list(rows: &[Row], precision: Precision) -> String {
    let mut out = format!("{:40} {:17} {:>14} {:>12}\n", "row", "suite", "whole GFLOP", "whole MB");
    for row in rows {
        let whole = row.work(precision.dtype().bytes()).whole;
        let (gflop, mb) = (1e-9 * whole.flop, 1e-6 * whole.bytes);
        out += &format!("{:40} {:17} {gflop:>14.4} {mb:>12.3}\n", row.name, row.suite);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits() {
        let all = [0.0, 0.001_234, 0.1234, 1.0, 12.34, 123.4, 12_345.6];
        let want = ["0", "0.00123", "0.123", "1.00", "12.3", "123", "12346"];
        assert_eq!(all.map(three), want);
    }
}
