//! `attn2d bench`: what ops and training steps take on a device, beside what it can do at most.
//!
//! A row is data ([`Subject`]); its suite is a function that lists rows. The same table is behind criterion's benches, this
//! verb and the peers in `benches/peers/`, which read it from `attn2d bench --list --json`. A run is a [`Report`], which is data
//! too: it is written as JSON, read again, joined with others, compared with an earlier one, and shown as text, Markdown or a page.

mod ceiling;
mod compare;
mod environment;
mod make;
mod measure;
mod page;
mod peers;
mod report;
mod row;
mod rows;
mod run;
mod scaling;
mod stages;
mod stats;
mod table;
#[cfg(test)]
mod tests;
mod work;

pub use crate::config::Precision;
pub(crate) use ceiling::PeakParams;
pub use ceiling::{Ceiling, Ceilings};
pub use compare::{Change, Comparison, Verdict, compare};
pub use environment::Environment;
pub use make::{Call, Calls};
pub use measure::{Share, Timing};
pub use page::page;
pub(crate) use peers::names as peer_names;
pub use peers::{Peer, PeerTime, Way};
pub use report::{Measured, Outcome, Reached, Report, Times};
pub use row::{Outside, Place, Position, Row, Size, Subject};
pub use run::{Beside, run};
pub use scaling::{Fit, Power, Straight};
pub use stats::Summary;
pub use table::{header, line, list, preface, profile, summary, tables};
pub use work::{Pass, Work};

use crate::error::{Error, Result};
use crate::{DType, Device};
use regex::Regex;
use std::path::PathBuf;

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
pub const SUITES: [Suite; 4] = [
    Suite { name: "ops", about: "each op, forward and backward", rows: rows::ops },
    Suite {
        name: "attention-vs-conv",
        about: "attention and convolution of the same output shape, at each stage of ResNet18 and EfficientNet-B0",
        rows: stages::rows,
    },
    Suite { name: "step", about: "training steps of whole models", rows: rows::step },
    Suite {
        name: "scaling",
        about: "attention over growing maps, windows, heads, channels and batches",
        rows: scaling::rows,
    },
];

/// What to time: the options of `attn2d bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// ops (each op, forward and backward), attention-vs-conv (both at each stage of ResNet18 and EfficientNet-B0), step (training
    /// steps of whole models), scaling (attention over growing sizes); all if none is given
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
    /// Write a page with tables and charts to this file
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Print the tables as Markdown at the end
    #[arg(long)]
    pub markdown: bool,
    /// Print where the time of each row goes, by kernel
    #[arg(long)]
    pub profile: bool,
    /// Hold the times against those that an earlier run wrote with --json; exit with 1 where one is worse by more than noise
    #[arg(long, value_name = "OLD.json")]
    pub compare: Option<PathBuf>,
    /// Percent by which a median may differ in --compare, whatever the noise
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0, allow_negative_numbers = true)]
    pub tolerance: f64,
    /// Put the times of peers beside ours: files written by the programs in benches/peers/
    #[arg(long, value_name = "PEER.json", num_args = 1..)]
    pub merge: Vec<PathBuf>,
    /// Time nothing: show what earlier runs on one device wrote with --json, joined
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["list", "device", "precision", "size", "min_time", "budget"])]
    pub from: Vec<PathBuf>,
    /// List the rows and what they have to do at least; time nothing
    #[arg(long, conflicts_with_all = ["device", "min_time", "budget", "html", "markdown", "profile", "compare", "tolerance", "merge"])]
    pub list: bool,
}

/// The suites that a report has rows of: ours in their order, then those that only its file knows.
pub(crate) fn suites_of(report: &Report) -> Vec<&str> {
    let ours = SUITES.iter().map(|s| s.name);
    let mut all: Vec<&str> =
        ours.filter(|name| report.rows.iter().any(|m| m.row.suite == *name)).collect();
    for m in &report.rows {
        if !all.contains(&m.row.suite.as_str()) {
            all.push(&m.row.suite);
        }
    }
    all
}

/// The rows that are asked for, in the order of the suites.
///
/// # Errors
/// [`Error::Usage`] for a suite that is not one, a filter that is no regular expression, or where no row is left.
pub fn rows(suites: &[String], size: Size, filter: &str) -> Result<Vec<Row>> {
    let wanted = wanted(suites, filter)?;
    let rows: Vec<Row> = SUITES.iter().flat_map(|s| (s.rows)(size)).filter(wanted).collect();
    if rows.is_empty() {
        return Err(Error::usage(format!(
            "no row matches --filter '{filter}'; `attn2d bench --list` shows them all"
        )));
    }
    Ok(rows)
}

/// Whether a row is asked for.
///
/// # Errors
/// [`Error::Usage`] for a suite that is not one and a filter that is no regular expression.
pub(crate) fn wanted(suites: &[String], filter: &str) -> Result<impl Fn(&Row) -> bool> {
    let names = || SUITES.iter().map(|s| s.name).collect::<Vec<_>>().join(", ");
    if let Some(other) = suites.iter().find(|name| SUITES.iter().all(|s| s.name != **name)) {
        return Err(Error::usage(format!("unknown suite '{other}'; there are {}", names())));
    }
    let expression = Regex::new(filter).map_err(|e| {
        let message = e.to_string(); // several lines, of which the last says what is wrong
        let why = message.lines().last().unwrap_or_default().trim_start_matches("error: ");
        Error::usage(format!("--filter '{filter}' is no regular expression: {why}"))
    })?;
    let suites = suites.to_vec();
    Ok(move |row: &Row| {
        (suites.is_empty() || suites.contains(&row.suite)) && expression.is_match(&row.name)
    })
}

/// The passes of a row, ready to be called.
///
/// # Errors
/// Those of the op that refuses, [`Error::Device`] when memory runs out.
pub fn prepare(row: &Row, device: &Device, dtype: DType) -> Result<Calls> {
    make::make(&row.subject, device, dtype)
}
