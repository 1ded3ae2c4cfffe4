//! `attn2d bench`: what ops and training steps take on a device, beside what it can do at most.
//!
//! A row is data ([`Subject`]); its suite is a function that lists rows. The same table is behind criterion's benches, this
//! verb and the peers in `benches/peers/`, which read it from `attn2d bench --list --json`.

mod ceiling;
mod make;
mod measure;
mod report;
mod row;
mod rows;
mod stats;
mod work;

pub use crate::config::Precision;
pub(crate) use ceiling::PeakParams;
pub use ceiling::{Ceiling, Ceilings};
pub use make::{Call, Calls};
pub use measure::Timing;
pub(crate) use report::list;
pub use report::{Environment, Report};
pub use row::{Outside, Position, Row, Size, Subject};
pub use stats::Summary;
pub use work::{Pass, Work};

use crate::error::{Error, Result};
use crate::{DType, Device};
use regex::Regex;
use std::path::PathBuf;
use std::time::Instant;

/// Classes of the models whose steps are timed.
pub(crate) const CLASSES: usize = 1000;

/// Rows that belong together.
pub struct Suite {
    /// What the command line calls it.
    pub name: &'static str,
    /// What is in it.
    pub about: &'static str,
    /// Its rows.
    pub rows: fn(Size) -> Vec<Row>,
}

/// Every suite.
pub const SUITES: [Suite; 2] = [
    Suite { name: "ops", about: "each op, forward and backward", rows: rows::ops },
    Suite { name: "step", about: "training steps of whole models", rows: rows::step },
];

/// What to time: the options of `attn2d bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// ops (each op, forward and backward), step (training steps of whole models); all if none is given
    #[arg(value_name = "SUITE")]
    pub suites: Vec<String>,
    /// auto, cpu, wgpu, wgpu:1, wgpu:nvidia, cuda:0
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// How elements are stored
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f32")]
    pub precision: Precision,
    /// Batches: tiny to see that it runs, small for CPUs, large for GPUs
    #[arg(long, value_enum, value_name = "SIZE", default_value = "small")]
    pub size: Size,
    /// Only rows whose name this regular expression finds
    #[arg(long, value_name = "REGEX", default_value = "")]
    pub filter: String,
    /// Seconds for each of a row's passes
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, allow_negative_numbers = true)]
    pub min_time: f64,
    /// Seconds after which no row is begun; those left are reported as skipped
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub budget: Option<f64>,
    /// Write rows, environment and ceilings to this file, after every row
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// List the rows and what they have to do at least; time nothing
    #[arg(long)]
    pub list: bool,
}

/// What became of a row.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It was timed.
    Timed {
        /// The forward; none for whole steps.
        forward: Option<Box<Timing>>,
        /// Forward and backward, or the whole step.
        whole: Box<Timing>,
        /// Bytes of tensors at the worst moment of a whole pass, beside its inputs.
        peak_bytes: usize,
    },
    /// It cannot run on this device or with these elements.
    Failed(String),
    /// There was no time left.
    Skipped(String),
}

/// The rows that are asked for, in the order of the suites.
///
/// # Errors
/// [`Error::Usage`] for a suite that is not one, a filter that is no regular expression, or where no row is left.
pub fn rows(suites: &[String], size: Size, filter: &str) -> Result<Vec<Row>> {
    let names = || SUITES.iter().map(|s| s.name).collect::<Vec<_>>().join(", ");
    if let Some(other) = suites.iter().find(|name| SUITES.iter().all(|s| s.name != **name)) {
        return Err(Error::usage(format!("unknown suite '{other}'; there are {}", names())));
    }
    let expression = Regex::new(filter).map_err(|e| {
        let message = e.to_string(); // several lines, of which the last says what is wrong
        let why = message.lines().last().unwrap_or_default().trim_start_matches("error: ");
        Error::usage(format!("--filter '{filter}' is no regular expression: {why}"))
    })?;
    let wanted = |s: &&Suite| suites.is_empty() || suites.iter().any(|name| name == s.name);
    let all = SUITES.iter().filter(wanted).flat_map(|s| (s.rows)(size));
    let rows: Vec<Row> = all.filter(|row| expression.is_match(&row.name)).collect();
    if rows.is_empty() {
        return Err(Error::usage(format!(
            "no row matches --filter '{filter}'; `attn2d bench --list` shows them all"
        )));
    }
    Ok(rows)
}

/// The passes of a row, ready to be called.
///
/// # Errors
/// Those of the op that refuses, [`Error::Device`] when memory runs out.
pub fn prepare(row: &Row, device: &Device, dtype: DType) -> Result<Calls> {
    make::make(&row.subject, device, dtype)
}

/// Measures ceilings and rows and writes [`Options::json`]; `progress` is told each row as it is done.
///
/// # Errors
/// [`Error::Usage`] as [`rows`] and for times that are none, [`Error::Device`] for a device that is not there,
/// [`Error::Io`] for a JSON file that cannot be written. A row that fails is part of the report.
pub fn run(options: &Options, progress: &mut dyn FnMut(&Report)) -> Result<Report> {
    let rows = rows(&options.suites, options.size, &options.filter)?;
    let seconds = |what: &str, s: f64| match s.is_finite() && s > 0.0 && s <= 86_400.0 {
        true => Ok(s),
        false => Err(Error::usage(format!("{what} is {s}, expected seconds above 0, up to 86400"))),
    };
    let min_time = seconds("--min-time", options.min_time)?;
    let budget = options.budget.map(|s| seconds("--budget", s)).transpose()?;
    let start = Instant::now();
    let device = Device::new(&options.device)?;
    let dtype = options.precision.dtype();
    let ceilings = ceiling::ceilings(&device, dtype, min_time.min(0.5))?;
    let mut report = Report {
        environment: Environment::of(&device, dtype, options.size),
        ceilings,
        rows: Vec::new(),
        device: device.clone(),
        dtype,
    };
    for row in rows {
        let outcome = match budget.filter(|b| start.elapsed().as_secs_f64() > *b) {
            Some(b) => Outcome::Skipped(format!("the {b} s of --budget are used up")),
            None => measure(&row, &device, dtype, min_time)
                .unwrap_or_else(|e| Outcome::Failed(e.to_string())),
        };
        report.rows.push((row, outcome));
        if let Some(path) = &options.json {
            report.write(path)?;
        }
        progress(&report);
    }
    Ok(report)
}

fn measure(row: &Row, device: &Device, dtype: DType, seconds: f64) -> Result<Outcome> {
    let calls = prepare(row, device, dtype)?;
    let forward =
        calls.forward.as_ref().map(|call| measure::time(device, call, seconds)).transpose()?;
    let forward = forward.map(Box::new);
    let whole = Box::new(measure::time(device, &calls.whole, seconds)?);
    let live = device.memory().live;
    device.reset_peak();
    (calls.whole)()?;
    device.sync()?;
    let peak_bytes = device.memory().peak - live;
    Ok(Outcome::Timed { forward, whole, peak_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(device: &str, filter: &str) -> Options {
        Options {
            suites: Vec::new(),
            device: device.into(),
            precision: Precision::F32,
            size: Size::Tiny,
            filter: filter.into(),
            min_time: 0.01,
            budget: None,
            json: None,
            list: false,
        }
    }

    #[test]
    fn every_tiny_row_is_timed() {
        let report = run(&options("cpu", ""), &mut |_| {}).unwrap();
        let (device, json) = (&report.device, report.json());
        for ((row, outcome), json) in report.rows.iter().zip(json["rows"].as_array().unwrap()) {
            let Outcome::Timed { forward, whole, .. } = outcome else {
                panic!("{}: {outcome:?}", row.name);
            };
            assert!(whole.launches > 0 && whole.wall.median_ms > 0.0, "{}", row.name);
            assert!(!whole.kernels.is_empty(), "{}: the CPU has a profile", row.name);
            if let Some(forward) = forward {
                assert!(forward.launches < whole.launches, "{}", row.name);
                let (f, w) = (forward.summary(device).p20_ms, whole.summary(device).p80_ms);
                assert!(f < w, "{}: forward {f} ms, whole {w} ms", row.name);
            }
            assert!(json["whole"]["wall"]["median_ms"].as_f64().unwrap() > 0.0);
            assert!(json["whole"]["percent"].as_f64().unwrap() > 0.0, "{json}");
        }
    }

    #[test]
    fn a_row_that_cannot_run_says_why_and_time_that_is_up_is_told() {
        let half = Options {
            precision: Precision::Bf16,
            suites: vec!["step".into()],
            ..options("cpu", "")
        };
        let report = run(&half, &mut |_| {}).unwrap();
        assert!(!report.complete());
        assert!(report.to_string().contains("models train in f32"), "{report}");
        let short = Options { budget: Some(1e-9), ..options("cpu", "") };
        let report = run(&short, &mut |_| {}).unwrap();
        assert!(report.rows.iter().all(|(_, o)| matches!(o, Outcome::Skipped(_))));
        assert!(report.to_string().contains("--budget"), "{report}");
        assert!(report.json()["rows"][0]["skipped"].is_string());
    }
}
