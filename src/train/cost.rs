//! What a run cost, beside what it reached: times and memory, in a file of their own because no two runs have the same.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::log::{STEPS, read_steps};
use crate::io::write_json;
use crate::{Device, Error, Result};

/// The file in a run directory.
pub const FILE_NAME: &str = "cost.json";

/// What a run cost so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// What the last call computed on: the device's name and what it is called by its maker.
    pub device: String,
    /// Seconds of all optimiser steps and of waiting for their batches, as `steps.jsonl` has them: the training of the whole run without
    /// evaluation and saving, whatever was killed and resumed in between.
    pub step_seconds: f64,
    /// Seconds of the calls that came to their end, from opening the data to the last score; those of a killed call are not known.
    pub seconds: f64,
    /// The most bytes of tensors that were on the device at once, in the calls that came to their end.
    pub memory_peak_bytes: usize,
}

impl Cost {
    /// What the run in `dir` cost until now; `None` where no call came to its end. Errors: `Io`; `File` where it is no such file.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE_NAME);
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let cost = serde_json::from_str(&text).map_err(|e| {
            Error::file(&path, format!("is not what a run wrote ({e}); remove it to go on"))
        })?;
        Ok(Some(cost))
    }

    /// Adds a call of so many seconds on this device to what the run in `dir` cost `before`, and writes it down.
    pub(super) fn add(
        before: Option<Self>,
        seconds: f64,
        device: &Device,
        dir: &Path,
    ) -> Result<()> {
        let milliseconds: f64 =
            read_steps(&dir.join(STEPS))?.iter().map(|row| row.data_ms + row.step_ms).sum();
        let (earlier, peak) =
            before.map_or((0.0, 0), |cost| (cost.seconds, cost.memory_peak_bytes));
        let cost = Self {
            device: format!("{} ({})", device.name(), device.caps().adapter),
            step_seconds: milliseconds / 1e3,
            seconds: earlier + seconds,
            memory_peak_bytes: peak.max(device.memory().peak),
        };
        write_json(&dir.join(FILE_NAME), &cost)
    }
}
