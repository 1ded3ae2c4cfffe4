//! The page of a report: charts, every table, the environment, how to repeat it.

use super::report::{Measured, Outcome, Report};
use super::row::Place;
use super::{suites_of, table};
use crate::html::chart::{Dot, Series, Share, dots, lines, shares};
use crate::html::{self, facts, grid, paragraph, section};

/// What binds, in the order of the chart's kinds.
const BINDS: [&str; 2] = ["multiply-add", "copy"];

/// The report as one HTML file without anything from outside.
pub fn page(report: &Report) -> String {
    let e = &report.environment;
    let mut body = about(report);
    body += &stages(report);
    body += &scaling(report);
    body += &ceilings(report);
    body += &profiles(report);
    let tables: String = table::tables(report).iter().map(html::table).collect();
    body += &section("All numbers", &(paragraph(COLUMNS) + &tables));
    body += &repeat(report);
    html::page(
        &format!("attn2d bench: {} on {}, {}", suites_of(report).join(", "), e.device, e.precision),
        &body,
    )
}

const COLUMNS: &str = "whole: forward and backward, or a training step; p20 .. p80: a fifth of the samples is below the first, a \
    fifth above the second; GFLOP/s and GB/s: useful products and the least bytes over the time of the whole; % of ceiling: the least time \
    by the ceiling that binds over the time; peak: tensors at the worst moment beside the row's inputs; saved: what the tape keeps from the \
    forward until its backward, activations that go in included, weights not; a peer's ratio: its time over ours, above 1 ours is faster.";

fn about(report: &Report) -> String {
    let (e, c) = (&report.environment, &report.ceilings);
    let copy = format!("{:.1} GB/s ({}: {})", 1e-9 * c.copy.per_second, c.copy.source, c.copy.how);
    let products = c.multiply_add.as_ref().map_or("not known".into(), |c| {
        format!("{:.1} GFLOP/s ({}: {})", 1e-9 * c.per_second, c.source, c.how)
    });
    let launch = c.launch.as_ref().map_or("not measured".into(), |c| {
        format!("{:.1} µs ({}: {})", 1e6 / c.per_second, c.source, c.how)
    });
    let size = e.size.to_string();
    let pairs = [
        ("device", e.device.as_str()),
        ("adapter", &e.adapter),
        ("host", &e.host),
        ("system", &e.system),
        ("elements", &e.precision),
        ("rows", &size),
        ("times", &e.clock),
        ("copy", &copy),
        ("multiply-add", &products),
        ("launch", &launch),
        ("attn2d", &e.version),
        ("begun", &e.date),
    ];
    section("Where and how", &facts(&pairs))
}

/// A chart for each stage of a net.
fn stages(report: &Report) -> String {
    let mut stages: Vec<(String, Vec<Dot>)> = Vec::new();
    for m in &report.rows {
        let Place::Stage { net, shape, .. } = &m.row.place else { continue };
        let (stage, Some(dot)) = (format!("{net}, {shape}"), stage_dot(m)) else { continue };
        match stages.iter_mut().find(|s| s.0 == stage) {
            Some(known) => known.1.push(dot),
            None => stages.push((stage, vec![dot])),
        }
    }
    if stages.is_empty() {
        return String::new();
    }
    let chart = |(stage, all): &(String, Vec<Dot>)| {
        let text = |d: &Dot| format!("{} {:.3} ms", d.label, d.value);
        let list = all.iter().map(text).collect::<Vec<_>>().join(", ");
        dots(
            stage,
            &format!("Milliseconds of forward and backward: {list}."),
            "ms, logarithmic",
            all,
        )
    };
    let charts: Vec<String> = stages.iter().map(chart).collect();
    let words = "Everything that could stand at a stage and gives an output of the same shape (channels x map). Circles: \
        convolutions; squares: attention. Full marks: forward and backward, with p20 to p80; hollow marks: the forward alone. local: windows \
        without positions; embedded: with learned relative positions; global: the whole map, with them; block: projections, global attention, \
        output projection and residual together. Local and global rows are attention itself, without the 1x1 projections that a layer puts \
        before it (a conv 1x1 each).";
    section("Attention against convolution", &(paragraph(words) + &grid(&charts)))
}

fn stage_dot(m: &Measured) -> Option<Dot> {
    let (Place::Stage { unit, .. }, Outcome::Timed(times)) = (&m.row.place, &m.outcome) else {
        return None;
    };
    let timing = &times.whole.timing;
    Some(Dot {
        label: unit.replace('_', " "),
        kind: usize::from(!unit.contains("conv") && !unit.contains("depthwise")),
        value: timing.ms,
        spread: (timing.p20_ms, timing.p80_ms),
        part: times.forward.as_ref().map(|f| f.timing.ms),
    })
}

/// A chart of time and one of memory for each size that lines are over.
fn scaling(report: &Report) -> String {
    let mut over: Vec<&str> = Vec::new();
    for fit in &report.fits {
        if !over.contains(&fit.against.as_str()) {
            over.push(&fit.against);
        }
    }
    let mut charts = Vec::new();
    for against in over {
        for (of, unit, scale) in [("time", "ms", 1.0), ("memory", "MiB", 1.0 / f64::from(1 << 20))]
        {
            let fits = report.fits.iter().filter(|f| f.against == against && f.of == of);
            let series = |f: &super::Fit| Series {
                name: f.line.clone(),
                points: f.points.iter().map(|p| (p.0, scale * p.1)).collect(),
                power: Some((scale * f.power.factor, f.power.exponent)),
            };
            let text = |f: &super::Fit| {
                let error = f.power.standard_error.map_or(String::new(), |e| format!(" +- {e:.3}"));
                format!(
                    "{}: exponent {:.3}{error}, by arithmetic {}",
                    f.line, f.power.exponent, f.expected
                )
            };
            let words = fits.clone().map(text).collect::<Vec<_>>().join("; ");
            let all: Vec<Series> = fits.map(series).collect();
            let title =
                format!("{} over {against}", if of == "time" { "Time" } else { "Peak memory" });
            charts.push(lines(&title, &words, (against, unit), &all));
        }
    }
    if charts.is_empty() {
        return String::new();
    }
    let words = "One size grows, all else stays. Time is that of forward and backward, memory its peak beside the inputs; both axes are \
        logarithmic, so a power is a straight line and its slope the exponent, fitted by least squares. Local attention: linear in the map and \
        in the window's k x k, its memory the same for every window. Global attention: time with the square of the map, memory linear.";
    section("How attention grows", &(paragraph(words) + &grid(&charts)))
}

/// How far each row is from what the device can do.
fn ceilings(report: &Report) -> String {
    let mut body = String::new();
    for suite in suites_of(report) {
        let share = |m: &Measured| match &m.outcome {
            Outcome::Timed(times) if m.row.suite == suite => Some(Share {
                label: m.row.name.clone(),
                kind: usize::from(times.whole.binds.as_deref() != Some(BINDS[0])),
                percent: times.whole.percent?,
            }),
            _ => None,
        };
        let all: Vec<Share> = report.rows.iter().filter_map(share).collect();
        if all.is_empty() {
            continue;
        }
        let text = |s: &Share| format!("{} {:.0} %", s.label, s.percent);
        let list = all.iter().map(text).collect::<Vec<_>>().join(", ");
        let chart = shares(&format!("Suite {suite}: percent of the ceiling"), &list, &BINDS, &all);
        let short = all.len() <= 60;
        body += &if short {
            chart
        } else {
            html::details(&format!("Suite {suite}: {} rows", all.len()), &chart)
        };
    }
    if body.is_empty() {
        return body;
    }
    let words = "The least time of a row by the device's own rates (products over the multiply-add rate, or bytes over the copy rate, whichever \
        is longer) in percent of the time that its forward and backward take. Small rows may pass 100 % of the copy rate where their tensors \
        lie in caches.";
    section("Share of the ceiling", &(paragraph(words) + &body))
}

fn profiles(report: &Report) -> String {
    let steps = report.rows.iter().filter(|m| m.row.suite == "step");
    let tables: String = steps.filter_map(table::profile).map(|t| html::table(&t)).collect();
    match tables.is_empty() {
        true => tables,
        false => {
            section("Where the time of a training step goes", &html::details("By kernel", &tables))
        }
    }
}

fn repeat(report: &Report) -> String {
    let e = &report.environment;
    let words = "Times of one machine on one day: compare rows within a run, and runs of one machine with --compare, which knows their noise.";
    let again = format!(
        "{}\nattn2d bench --compare OLD.json   # against an earlier run's --json",
        e.command.join(" ")
    );
    section("How to repeat it", &(paragraph(words) + &html::code(&again)))
}
