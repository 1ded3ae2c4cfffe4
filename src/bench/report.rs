//! The report of a run: a table for people, JSON for programs.

use super::ceiling::{Ceiling, Ceilings};
use super::measure::Timing;
use super::row::{Row, Size};
use super::work::Pass;
use super::{Outcome, Precision};
use crate::error::{Error, Result};
use crate::{DType, Device};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Where and how the times were taken.
#[derive(Clone, Debug, Serialize)]
pub struct Environment {
    /// The crate's version.
    pub version: &'static str,
    /// Canonical device string.
    pub device: String,
    /// The hardware's own name, with its driver.
    pub adapter: String,
    /// Whether software plays a GPU: its times tell nothing of GPUs.
    pub software: bool,
    /// Operating system and architecture.
    pub system: String,
    /// `f32`, `f16` or `bf16`.
    pub precision: &'static str,
    /// Size of the batches.
    pub size: Size,
    /// When, in UTC.
    pub date: String,
    /// The program's words.
    pub command: Vec<String>,
}

impl Environment {
    pub(crate) fn of(device: &Device, dtype: DType, size: Size) -> Self {
        let caps = device.caps();
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        Self {
            version: env!("CARGO_PKG_VERSION"),
            device: caps.name.clone(),
            adapter: caps.adapter.clone(),
            software: caps.software,
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            precision: dtype.suffix(),
            size,
            date: utc(seconds),
            command: std::env::args().collect(),
        }
    }
}

/// `2026-01-31 23:59:59 UTC` of seconds since 1970: days to a date by counting 400-year cycles from a 1 March.
fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = year + 400 * era + next;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// Everything that a run found.
pub struct Report {
    /// Where and how.
    pub environment: Environment,
    /// What the device can do at most.
    pub ceilings: Ceilings,
    /// What became of each row.
    pub rows: Vec<(Row, Outcome)>,
    pub(crate) device: Device,
    pub(crate) dtype: DType,
}

/// What a pass reaches.
struct Rates {
    ms: f64,
    gflop_per_s: Option<f64>,
    gb_per_s: Option<f64>,
    /// The least time by the ceiling that binds, in percent of the time taken.
    percent: Option<f64>,
}

impl Report {
    /// Whether every row was timed.
    pub fn complete(&self) -> bool {
        !self.rows.iter().any(|(_, o)| matches!(o, Outcome::Failed(_)))
    }

    fn rates(&self, timing: &Timing, pass: Pass) -> Rates {
        let ms = timing.summary(&self.device).median_ms;
        let rate = |amount: f64| (amount > 0.0).then_some(1e-6 * amount / ms);
        // AdamW is f32 whatever the tensors are, but has no products to count.
        let products = self.ceilings.multiply_add.as_ref().map(|c| pass.flop / c.per_second);
        let least = (pass.bytes / self.ceilings.copy.per_second).max(products.unwrap_or(0.0));
        // Emulated and software GPUs have no ceilings worth the name.
        let known =
            least > 0.0 && (products.is_some() || pass.flop == 0.0) && !self.environment.software;
        Rates {
            ms,
            gflop_per_s: rate(pass.flop),
            gb_per_s: rate(pass.bytes),
            percent: known.then_some(1e5 * least / ms),
        }
    }

    fn pass_json(&self, timing: &Timing, pass: Pass) -> Value {
        let rates = self.rates(timing, pass);
        let mut json = timing.json();
        json["ms"] = json!(rates.ms);
        json["gflop_per_s"] = json!(rates.gflop_per_s);
        json["gb_per_s"] = json!(rates.gb_per_s);
        json["percent"] = json!(rates.percent);
        json
    }

    /// `environment`, `ceilings` and `rows`: a row has what [`Row::json`] says and either `forward` (null for steps), `whole`
    /// and `peak_bytes`, or `failed`, or `skipped` with the reason. A pass has `ms` (the device's own clock where there is
    /// one), the samples behind it, rates, and `percent` of the ceiling that binds (null where that is not known).
    pub fn json(&self) -> Value {
        let row = |(row, outcome): &(Row, Outcome)| {
            let mut json = row.json(self.dtype.bytes());
            let work = row.work(self.dtype.bytes());
            match outcome {
                Outcome::Failed(why) => json["failed"] = json!(why),
                Outcome::Skipped(why) => json["skipped"] = json!(why),
                Outcome::Timed { forward, whole, peak_bytes } => {
                    json["forward"] =
                        forward.as_ref().map_or(Value::Null, |t| self.pass_json(t, work.forward));
                    json["whole"] = self.pass_json(whole, work.whole);
                    json["peak_bytes"] = json!(peak_bytes);
                }
            }
            json
        };
        let rows: Vec<_> = self.rows.iter().map(row).collect();
        json!({ "environment": self.environment, "ceilings": self.ceilings, "rows": rows })
    }

    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        std::fs::write(path, format!("{:#}\n", self.json())).map_err(|e| Error::io(path, e))
    }

    /// The head of the table, and one line of it.
    pub fn header() -> String {
        format!(
            "{:36} {:>10} {:>10} {:>21} {:>8} {:>9} {:>8} {:>6} {:>9}",
            "row",
            "forward ms",
            "whole ms",
            "p20 .. p80",
            "launches",
            "GFLOP/s",
            "GB/s",
            "% max",
            "peak MiB"
        )
    }

    /// A line of the table.
    pub fn line(&self, row: &Row, outcome: &Outcome) -> String {
        let (forward, whole, peak_bytes) = match outcome {
            Outcome::Failed(why) => return format!("{:36} failed: {why}", row.name),
            Outcome::Skipped(why) => return format!("{:36} skipped: {why}", row.name),
            Outcome::Timed { forward, whole, peak_bytes } => (forward, whole, *peak_bytes),
        };
        let number = |v: Option<f64>| v.map_or("-".into(), |v| format!("{v:.1}"));
        let rates = self.rates(whole, row.work(self.dtype.bytes()).whole);
        let forward = forward.as_ref().map(|t| t.summary(&self.device).median_ms);
        let summary = whole.summary(&self.device);
        format!(
            "{:36} {:>10} {:>10.4} {:>21} {:>8} {:>9} {:>8} {:>6} {:>9.1}",
            row.name,
            forward.map_or("-".into(), |ms| format!("{ms:.4}")),
            rates.ms,
            format!("{:.4} .. {:.4}", summary.p20_ms, summary.p80_ms),
            whole.launches,
            number(rates.gflop_per_s),
            number(rates.gb_per_s),
            number(rates.percent),
            peak_bytes as f64 / f64::from(1 << 20)
        )
    }

    /// What was measured, and against what.
    pub fn preface(&self) -> String {
        let e = &self.environment;
        let rate = |c: &Ceiling, unit: &str| {
            format!("{:.1} {unit} ({}: {})", 1e-9 * c.per_second, c.source, c.how)
        };
        let products = match &self.ceilings.multiply_add {
            Some(c) => rate(c, "GFLOP/s"),
            None => "not known for this precision and device".into(),
        };
        let clock = match self.device.caps() {
            caps if caps.max_invocations == 1 => "host's clock",
            caps if caps.software => "software plays the GPU: no measure of one",
            caps if caps.timestamps => "sum of kernels on the device's clock, caches cold",
            _ => "host's clock, caches warm",
        };
        format!(
            "{}: {}, {}, rows '{:?}', {}\ncopy: {}\nmultiply-add: {products}\ntimes: {clock}; whole = forward + backward, or step; \
             % max = the least time by these two, of the whole\n",
            e.device,
            e.adapter,
            e.precision,
            e.size,
            e.date,
            rate(&self.ceilings.copy, "GB/s"),
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n{}", self.preface(), Self::header())?;
        self.rows.iter().try_for_each(|(row, outcome)| writeln!(f, "{}", self.line(row, outcome)))
    }
}

/// The rows as `attn2d bench --list` shows them.
pub(crate) fn list(rows: &[Row], precision: Precision) -> String {
    let mut out = format!("{:36} {:6} {:>14} {:>12}\n", "row", "suite", "whole GFLOP", "whole MB");
    for row in rows {
        let whole = row.work(precision.dtype().bytes()).whole;
        let (gflop, mb) = (1e-9 * whole.flop, 1e-6 * whole.bytes);
        out += &format!("{:36} {:6} {gflop:>14.4} {mb:>12.3}\n", row.name, row.suite);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_000_000_000), "2001-09-09 01:46:40 UTC");
        assert_eq!(utc(4_107_542_399), "2100-02-28 23:59:59 UTC");
        assert_eq!(utc(4_107_542_400), "2100-03-01 00:00:00 UTC");
    }
}
