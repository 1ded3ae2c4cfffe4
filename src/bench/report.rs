//! The report of a run as data: what is written as JSON, and read again to be shown, joined or compared.

use super::ceiling::Ceilings;
use super::environment::Environment;
use super::measure::Timing;
use super::peers::PeerTime;
use super::row::Row;
use super::scaling::{Fit, fits};
use super::work::{Pass, Work};
use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Everything that a run found.
///
/// As JSON a row has `name`, `suite`, `place`, `subject` and `work`, and either `forward` (null for steps), `whole` and
/// `saved_bytes`, or `failed`, or `skipped` with the reason. A pass has `ms` with `p20_ms` and `p80_ms` (the device's own clock
/// where there is one), the samples behind them, rates, `percent` of the ceiling that `binds` (null where that is not known)
/// and `peak_bytes`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where and how.
    pub environment: Environment,
    /// What the device can do at most.
    pub ceilings: Ceilings,
    /// What became of each row.
    pub rows: Vec<Measured>,
    /// Exponents of the lines of the suite `scaling`.
    pub fits: Vec<Fit>,
}

/// A row and what became of it.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// The row.
    #[serde(flatten)]
    pub row: Row,
    /// What it has to do at least.
    pub work: Work,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// What peers take for it, by their names.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub peers: BTreeMap<String, PeerTime>,
}

/// What became of a row.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Outcome {
    /// It was timed.
    Timed(Box<Times>),
    /// It cannot run on this device or with these elements.
    Failed {
        /// Why.
        failed: String,
    },
    /// There was no time left.
    Skipped {
        /// Why.
        skipped: String,
    },
}

/// What a row takes.
#[derive(Clone, Debug, Serialize)]
pub struct Times {
    /// The forward; none for whole steps.
    pub forward: Option<Reached>,
    /// Forward and backward, or the whole step.
    pub whole: Reached,
    /// Bytes that the tape keeps from the forward until its backward: activations that go in, and what the forward leaves for the
    /// backward; weights are not counted. None where there is no backward.
    pub saved_bytes: Option<usize>,
}

/// A pass's times and what it reaches by them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reached {
    /// Its times.
    #[serde(flatten)]
    pub timing: Timing,
    /// Useful floating-point operations a second, in units of 1e9.
    pub gflop_per_s: Option<f64>,
    /// Least bytes a second, in units of 1e9.
    pub gb_per_s: Option<f64>,
    /// The least time by the ceiling that binds, in percent of the time taken.
    pub percent: Option<f64>,
    /// That ceiling: `multiply-add` or `copy`.
    #[serde(default)]
    pub binds: Option<String>,
    /// Bytes of tensors at the worst moment, beside the row's inputs.
    #[serde(default)]
    pub peak_bytes: usize,
}

impl Reached {
    /// Rates of a pass by the ceilings. Emulated and software GPUs have none worth the name.
    pub(crate) fn of(
        (timing, peak_bytes): (Timing, usize),
        pass: Pass,
        ceilings: &Ceilings,
        software: bool,
    ) -> Self {
        let ms = timing.ms;
        let rate = |amount: f64| (amount > 0.0).then_some(1e-6 * amount / ms);
        // AdamW is f32 whatever the tensors are, but has no products to count.
        let products = ceilings.multiply_add.as_ref().map(|c| pass.flop / c.per_second);
        let moved = pass.bytes / ceilings.copy.per_second;
        let least = moved.max(products.unwrap_or(0.0));
        let known = least > 0.0 && (products.is_some() || pass.flop == 0.0) && !software;
        let binds = if least > moved { "multiply-add" } else { "copy" };
        Self {
            gflop_per_s: rate(pass.flop),
            gb_per_s: rate(pass.bytes),
            percent: known.then_some(1e5 * least / ms),
            binds: known.then(|| binds.into()),
            timing,
            peak_bytes,
        }
    }
}

impl Report {
    /// A report of rows, with the fits that they allow.
    pub fn new(environment: Environment, ceilings: Ceilings, rows: Vec<Measured>) -> Self {
        let fits = fits(&rows);
        Self { environment, ceilings, rows, fits }
    }

    pub(crate) fn push(&mut self, row: Measured) {
        self.rows.push(row);
        self.fits = fits(&self.rows);
    }

    /// Whether every row was timed or left out for want of time.
    pub fn complete(&self) -> bool {
        !self.rows.iter().any(|m| matches!(m.outcome, Outcome::Failed { .. }))
    }

    /// Writes the report as JSON, a row a line.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        let json = |value: serde_json::Result<String>| {
            value.map_err(|e| Error::file(path, format!("cannot be written as JSON: {e}")))
        };
        let rows = self.rows.iter().map(|row| json(serde_json::to_string(row)));
        let fits = self.fits.iter().map(|fit| json(serde_json::to_string(fit)));
        let text = format!(
            "{{\n\"environment\": {},\n\"ceilings\": {},\n\"rows\": [\n{}\n],\n\"fits\": [\n{}\n]\n}}\n",
            json(serde_json::to_string(&self.environment))?,
            json(serde_json::to_string(&self.ceilings))?,
            rows.collect::<Result<Vec<_>>>()?.join(",\n"),
            fits.collect::<Result<Vec<_>>>()?.join(",\n"),
        );
        crate::io::write_atomic(path, text.as_bytes())
    }

    /// Reads what [`Report::write`] wrote.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] where it is no such report, naming the row and the field, and for a row that it has twice.
    pub fn read(path: &Path) -> Result<Self> {
        let json = read_json(path)?;
        let fail = |what: String| {
            Error::file(path, format!("{what}; expected a file that `attn2d bench --json` wrote"))
        };
        let rows = json.get("rows").and_then(Value::as_array);
        let rows = rows.ok_or_else(|| fail("no list 'rows'".into()))?;
        let row = |(i, row): (usize, &Value)| {
            let name = row.get("name").and_then(Value::as_str).unwrap_or("without a name");
            Measured::from_json(row).map_err(|e| fail(format!("row {i} ({name}): {e}")))
        };
        let environment = field(&json, "environment").map_err(fail)?;
        let ceilings = field(&json, "ceilings").map_err(fail)?;
        let rows = rows.iter().enumerate().map(row).collect::<Result<Vec<_>>>()?;
        if let Some(name) = twice(rows.iter().map(|m| &m.row.name)) {
            return Err(fail(format!("the row {name} stands there twice")));
        }
        Ok(Self::new(environment, ceilings, rows))
    }

    /// Reads several reports as one; a row that two of them have is the later one's.
    ///
    /// # Errors
    /// As [`Report::read`], and [`Error::File`] for one of another device, precision or size than the first.
    pub fn join(paths: &[impl AsRef<Path>]) -> Result<Option<Self>> {
        let mut all: Option<Self> = None;
        for path in paths {
            let (path, next) = (path.as_ref(), Self::read(path.as_ref())?);
            let Some(so_far) = &mut all else {
                all = Some(next);
                continue;
            };
            next.environment.comparable(&so_far.environment, path)?;
            so_far.rows.retain(|m| next.rows.iter().all(|n| n.row.name != m.row.name));
            so_far.rows.extend(next.rows);
        }
        Ok(all.map(|r| Self::new(r.environment, r.ceilings, r.rows)))
    }
}

impl Measured {
    /// A row of a report's JSON, or what is wrong with it.
    pub(crate) fn from_json(json: &Value) -> Result<Self, String> {
        let row: Row = serde_json::from_value(json.clone()).map_err(|e| e.to_string())?;
        if row.name.is_empty() || row.name.chars().any(char::is_control) {
            return Err("its name is empty or of more than one line".into());
        }
        let there = |name: &str| json.get(name).is_some_and(|value| !value.is_null());
        let outcome = if there("whole") {
            let forward = there("forward").then(|| reached(json, "forward")).transpose()?;
            let whole = reached(json, "whole")?;
            let saved_bytes =
                there("saved_bytes").then(|| field(json, "saved_bytes")).transpose()?;
            Outcome::Timed(Box::new(Times { forward, whole, saved_bytes }))
        } else if there("failed") {
            Outcome::Failed { failed: field(json, "failed")? }
        } else if there("skipped") {
            Outcome::Skipped { skipped: field(json, "skipped")? }
        } else {
            return Err("none of the fields 'whole', 'failed' and 'skipped'".into());
        };
        let peers: BTreeMap<String, PeerTime> =
            there("peers").then(|| field(json, "peers")).transpose()?.unwrap_or_default();
        if let Some((name, _)) = peers.iter().find(|(_, time)| time.wrong()) {
            return Err(format!("a time of {name} is not above 0"));
        }
        Ok(Self { row, work: field(json, "work")?, outcome, peers })
    }
}

/// A pass of a row, with times that can be.
fn reached(json: &Value, name: &str) -> Result<Reached, String> {
    let reached: Reached = field(json, name)?;
    let Timing { ms, p20_ms, p80_ms, .. } = reached.timing;
    match 0.0 < p20_ms && p20_ms <= ms && ms <= p80_ms && p80_ms.is_finite() {
        true => Ok(reached),
        false => Err(format!(
            "field '{name}': p20_ms is {p20_ms}, ms {ms} and p80_ms {p80_ms}, not above 0 and in rising order"
        )),
    }
}

/// A name that comes twice.
pub(crate) fn twice<'n>(names: impl IntoIterator<Item = &'n String>) -> Option<&'n String> {
    let mut seen = BTreeSet::new();
    names.into_iter().find(|name| !seen.insert(*name))
}

/// A field of a JSON object as its type, or what is wrong with it.
fn field<T: DeserializeOwned>(json: &Value, name: &str) -> Result<T, String> {
    let value = json.get(name).ok_or_else(|| format!("no field '{name}'"))?;
    serde_json::from_value(value.clone()).map_err(|e| format!("field '{name}': {e}"))
}

/// A file's JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let json: Value =
        serde_json::from_str(&text).map_err(|e| Error::file(path, format!("is no JSON: {e}")))?;
    match control(&json) {
        None => Ok(json),
        Some(text) => Err(Error::file(
            path,
            format!("the text {text:?} has control characters, which no bench writes"),
        )),
    }
}

/// A text with characters that would do something to a terminal: any but the ends of lines, which stand in errors.
fn control(json: &Value) -> Option<&str> {
    let bad = |text: &&str| text.chars().any(|c| c.is_control() && c != '\n' && c != '\t');
    match json {
        Value::String(text) => Some(text.as_str()).filter(bad),
        Value::Array(all) => all.iter().find_map(control),
        Value::Object(all) => all
            .iter()
            .find_map(|(key, value)| Some(key.as_str()).filter(bad).or_else(|| control(value))),
        _ => None,
    }
}
