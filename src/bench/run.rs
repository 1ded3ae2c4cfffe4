//! A run: ceilings, then each row.

use super::compare::{Comparison, compare};
use super::environment::Environment;
use super::measure::{peak, saved, time};
use super::peers::Peer;
use super::report::{Measured, Outcome, Reached, Report, Times};
use super::{Ceilings, Options, Row, ceiling, prepare, rows};
use crate::error::{Error, Result};
use crate::{DType, Device};
use std::path::PathBuf;
use std::time::Instant;

/// What a run is held against: read before anything is timed, so that a wrong file costs no time.
#[derive(Debug, Default)]
pub struct Beside {
    /// An earlier run, and its file.
    pub old: Option<(PathBuf, Report)>,
    /// Peers.
    pub peers: Vec<Peer>,
}

impl Beside {
    /// Reads the files of [`Options::compare`] and [`Options::merge`], whose times must be of elements of `precision`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`] for a file that is not what it should be.
    pub fn read(options: &Options, precision: &str) -> Result<Self> {
        let old = options.compare.as_ref().map(|path| Ok((path.clone(), Report::read(path)?)));
        let peers = options.merge.iter().map(|path| Peer::read(path, precision));
        Ok(Self { old: old.transpose()?, peers: peers.collect::<Result<_>>()? })
    }

    /// Whether the earlier run is of this device, precision and size.
    pub(crate) fn check(&self, environment: &Environment) -> Result<()> {
        let old = self.old.as_ref();
        old.map_or(Ok(()), |(path, old)| old.environment.comparable(environment, path))
    }

    /// Puts the peers' times beside a row.
    pub(crate) fn put_peers(&self, row: &mut Measured) -> Result<()> {
        self.peers.iter().try_for_each(|peer| peer.put_beside(row))
    }

    /// The report against the earlier run, if there is one; a change within `tolerance` percent is none.
    pub fn compared(&self, report: &Report, tolerance: f64) -> Option<Comparison> {
        self.old.as_ref().map(|(_, old)| compare(report, old, tolerance / 100.0))
    }
}

/// Measures ceilings and rows and writes [`Options::json`]; `progress` is told each row as it is done.
///
/// # Errors
/// [`Error::Usage`] as [`rows`] and for times that are none, [`Error::Device`] for a device that is not there, [`Error::File`]
/// where the earlier run or a peer is not of these rows, [`Error::Io`] for a JSON file that cannot be written. A row that fails is
/// part of the report.
pub fn run(
    options: &Options,
    beside: &Beside,
    progress: &mut dyn FnMut(&Report),
) -> Result<Report> {
    let mut rows: Vec<Measured> = rows(&options.suites, options.size, &options.filter)?
        .into_iter()
        .map(|row| Measured::waiting(row, options.precision.dtype()))
        .collect();
    rows.iter_mut().try_for_each(|row| beside.put_peers(row))?;
    let min_time = seconds("--min-time", options.min_time)?;
    let budget = options.budget.map(|s| seconds("--budget", s)).transpose()?;
    let start = Instant::now();
    let device = Device::new(&options.device)?;
    let dtype = options.precision.dtype();
    let environment = Environment::of(&device, dtype, options.size);
    beside.check(&environment)?;
    let ceilings = ceiling::ceilings(&device, dtype, min_time.min(0.5))?;
    let mut report = Report::new(environment, ceilings, Vec::new());
    for mut row in rows {
        row.outcome = match budget.filter(|b| start.elapsed().as_secs_f64() > *b) {
            Some(b) => Outcome::Skipped { skipped: format!("the {b} s of --budget are used up") },
            None => measure(&row, &device, dtype, &report.ceilings, min_time)
                .unwrap_or_else(|e| Outcome::Failed { failed: e.to_string() }),
        };
        report.push(row);
        if let Some(path) = &options.json {
            report.write(path)?;
        }
        progress(&report);
    }
    Ok(report)
}

fn seconds(what: &str, s: f64) -> Result<f64> {
    match s.is_finite() && s > 0.0 && s <= 86_400.0 {
        true => Ok(s),
        false => Err(Error::usage(format!("{what} is {s}, expected seconds above 0, up to 86400"))),
    }
}

impl Measured {
    fn waiting(row: Row, dtype: DType) -> Self {
        let (work, peers) = (row.work(dtype.bytes()), Default::default());
        let outcome = Outcome::Skipped { skipped: "not reached".into() };
        Self { row, work, outcome, peers }
    }
}

fn measure(
    measured: &Measured,
    device: &Device,
    dtype: DType,
    ceilings: &Ceilings,
    seconds: f64,
) -> Result<Outcome> {
    let (calls, work) = (prepare(&measured.row, device, dtype)?, measured.work);
    let software = device.caps().software;
    let forward = match &calls.forward {
        Some(call) => {
            let forward = (time(device, call, seconds)?, peak(device, call)?);
            Some(Reached::of(forward, work.forward, ceilings, software))
        }
        None => None,
    };
    let whole = (time(device, &calls.whole, seconds)?, peak(device, &calls.whole)?);
    let whole = Reached::of(whole, work.whole, ceilings, software);
    let saved_bytes = calls.taped.as_ref().map(|taped| saved(device, taped)).transpose()?;
    Ok(Outcome::Timed(Box::new(Times { forward, whole, saved_bytes })))
}
