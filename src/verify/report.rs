//! The outcome as a table to paste in an issue, and as JSON.

use super::{Outcome, Record};
use serde_json::{Value, json};
use std::fmt;

impl fmt::Display for Outcome {
    /// Ops down, devices across; a cell has the number of cases and the largest error. Then every failure, a line each.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, adapter) in &self.devices {
            writeln!(f, "{name}: {adapter}")?;
        }
        for (name, why) in &self.skipped {
            writeln!(f, "skipped {name}: {why}")?;
        }
        writeln!(f)?;
        self.table(f)?;
        writeln!(f)?;
        for r in self.failures() {
            let place =
                if r.device.is_empty() { String::new() } else { format!(" on {}", r.device) };
            writeln!(
                f,
                "FAIL {}{place}, case '{}': {}",
                r.op,
                r.case,
                r.failure.as_deref().unwrap_or_default()
            )?;
        }
        for name in &self.absent {
            writeln!(f, "FAIL required device {name} is not there")?;
        }
        let (failed, all) = (self.failures().count(), self.records.len());
        match (self.passed(), failed) {
            (true, _) => write!(
                f,
                "passed: {all} cases on {} devices, {} skipped",
                self.devices.len(),
                self.skipped.len()
            ),
            (false, 0) => {
                write!(f, "FAILED: a required device is absent; {all} runs passed")
            }
            (false, _) => write!(f, "FAILED: {failed} of {all} runs"),
        }
    }
}

impl Outcome {
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ops: Vec<&str> = Vec::new();
        for r in &self.records {
            if !ops.contains(&r.op.as_str()) {
                ops.push(&r.op);
            }
        }
        let first = ops.iter().map(|op| op.len()).max().unwrap_or(0).max(2);
        write!(f, "{:first$}", "op")?;
        for (name, _) in &self.devices {
            write!(f, "  {name:<20}")?;
        }
        writeln!(f)?;
        for op in ops {
            write!(f, "{op:first$}")?;
            for (name, _) in &self.devices {
                let here = |r: &&Record| r.op == op && (r.device == *name || r.device.is_empty());
                write!(f, "  {:<20}", cell(&self.records.iter().filter(here).collect::<Vec<_>>()))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }

    /// The same as JSON: `passed`, `devices`, `skipped`, `absent`, and `records` with `op`, `device`, `case`, `error`
    /// (null where it is not finite) and `failure` (null where there is none).
    pub fn to_json(&self) -> Value {
        let pairs = |list: &[(String, String)], key: &str| -> Vec<Value> {
            list.iter().map(|(name, text)| json!({ "name": name, key: text })).collect()
        };
        let record = |r: &Record| json!({ "op": r.op, "device": r.device, "case": r.case, "error": r.error, "failure": r.failure });
        json!({
            "passed": self.passed(),
            "devices": pairs(&self.devices, "adapter"),
            "skipped": pairs(&self.skipped, "why"),
            "absent": self.absent,
            "records": self.records.iter().map(record).collect::<Vec<_>>(),
        })
    }
}

/// `12 ok, 3.1e-7`, or how many failed.
fn cell(records: &[&Record]) -> String {
    let failed = records.iter().filter(|r| r.failure.is_some()).count();
    let error = records.iter().map(|r| r.error).fold(0.0, f64::max);
    match (records.len(), failed) {
        (0, _) => "-".into(),
        (n, 0) => format!("{n} ok, {error:.1e}"),
        (n, _) => format!("FAIL {failed}/{n}, {error:.1e}"),
    }
}
