//! What a run writes down while it trains: `metrics.csv` (a row an epoch), `steps.jsonl` (a line a step) and TensorBoard
//! events. A resumed run cuts away what lies beyond the step that it resumes from, and appends.
//!
//! `metrics.csv` holds no times, so that two runs of the same config can be compared byte by byte; times are in
//! `steps.jsonl`.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::events::{self, Events};
use crate::io::write_atomic;
use crate::{Error, Result};

/// The file of epochs in a run directory.
pub const METRICS: &str = "metrics.csv";
/// The file of steps in a run directory.
pub const STEPS: &str = "steps.jsonl";

const COLUMNS: [&str; 10] = [
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_accuracy",
    "train_balanced_accuracy",
    "val_loss",
    "val_accuracy",
    "val_balanced_accuracy",
    "val_auc",
];

/// One row of `metrics.csv`. `None` is an empty cell: no such split, or a metric that is not defined on it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EpochRow {
    /// Epochs done, 1 for the first row.
    pub epoch: u64,
    /// Optimiser steps done.
    pub step: u64,
    /// Learning rate of the last step.
    pub lr: f64,
    /// Mean loss over the epoch's training batches, weights changing meanwhile.
    pub train_loss: f64,
    /// Accuracy over the same batches.
    pub train_accuracy: Option<f64>,
    /// Balanced accuracy over the same batches.
    pub train_balanced_accuracy: Option<f64>,
    /// Mean validation loss, with the training loss's class weights and label smoothing.
    pub val_loss: Option<f64>,
    /// Validation accuracy.
    pub val_accuracy: Option<f64>,
    /// Validation balanced accuracy: the number that `best/` is chosen by.
    pub val_balanced_accuracy: Option<f64>,
    /// Validation area under the ROC curve.
    pub val_auc: Option<f64>,
    /// Validation recall of each class.
    pub val_recall: Vec<Option<f64>>,
}

impl EpochRow {
    fn cells(&self) -> Vec<String> {
        let mut cells = vec![
            self.epoch.to_string(),
            self.step.to_string(),
            self.lr.to_string(),
            self.train_loss.to_string(),
        ];
        let optional = [
            self.train_accuracy,
            self.train_balanced_accuracy,
            self.val_loss,
            self.val_accuracy,
            self.val_balanced_accuracy,
            self.val_auc,
        ];
        let text = |v: &Option<f64>| v.map(|v| v.to_string()).unwrap_or_default();
        cells.extend(optional.iter().chain(&self.val_recall).map(text));
        cells
    }

    fn from_cells(cells: &[&str]) -> Option<Self> {
        let number = |i: usize| cells.get(i)?.parse::<f64>().ok();
        let optional = |i: usize| match *cells.get(i)? {
            "" => Some(None),
            text => text.parse::<f64>().ok().map(Some),
        };
        Some(Self {
            epoch: cells.first()?.parse().ok()?,
            step: cells.get(1)?.parse().ok()?,
            lr: number(2)?,
            train_loss: number(3)?,
            train_accuracy: optional(4)?,
            train_balanced_accuracy: optional(5)?,
            val_loss: optional(6)?,
            val_accuracy: optional(7)?,
            val_balanced_accuracy: optional(8)?,
            val_auc: optional(9)?,
            val_recall: (COLUMNS.len()..cells.len()).map(optional).collect::<Option<_>>()?,
        })
    }

    /// The row's values with the tags that TensorBoard shows them under.
    fn scalars(&self) -> Vec<(&'static str, f64)> {
        let all = [
            ("epoch/train_loss", Some(self.train_loss)),
            ("epoch/train_accuracy", self.train_accuracy),
            ("epoch/train_balanced_accuracy", self.train_balanced_accuracy),
            ("epoch/val_loss", self.val_loss),
            ("epoch/val_accuracy", self.val_accuracy),
            ("epoch/val_balanced_accuracy", self.val_balanced_accuracy),
            ("epoch/val_auc", self.val_auc),
        ];
        all.into_iter().filter_map(|(tag, value)| Some((tag, value?))).collect()
    }
}

/// One line of `steps.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRow {
    /// Optimiser steps done, 1 for the first line.
    pub step: u64,
    /// The epoch it belongs to, from 1.
    pub epoch: u64,
    /// Loss of the batch.
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Milliseconds spent waiting for the batch.
    pub data_ms: f64,
    /// Milliseconds of forward, backward and update.
    pub step_ms: f64,
    /// Images over the sum of both.
    pub images_per_s: f64,
    /// Norm of all gradients before clipping, where it is taken (clipping, f16); `None` too where it was not finite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// What the loss was multiplied by, in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Whether the step was left out because a gradient was not finite.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left_out: bool,
}

/// The open logs of a run.
#[derive(Debug)]
pub struct RunLog {
    metrics: (PathBuf, File),
    steps: (PathBuf, File),
    events: Events,
    rows: Vec<EpochRow>,
}

impl RunLog {
    /// Starts the logs of a new run in `dir`, which must exist. `classes` names the recall columns.
    pub fn create(dir: &Path, classes: &[String]) -> Result<Self> {
        write_metrics(&dir.join(METRICS), classes, &[])?;
        let steps = dir.join(STEPS);
        File::create(&steps).map_err(|e| Error::io(&steps, e))?;
        let events = Events::create(&dir.join(events::FILE_NAME))?;
        Self::open(dir, events, Vec::new())
    }

    /// Continues the logs of a run after optimiser step `step`; rows beyond it are cut away, and so is the row of an epoch later than
    /// number `epoch` (from 1): one that a stop within it left behind, and that is written again when the epoch is over.
    pub fn resume(dir: &Path, classes: &[String], step: u64, epoch: u64) -> Result<Self> {
        let metrics = dir.join(METRICS);
        let mut rows = if metrics.exists() { read_metrics(&metrics)? } else { Vec::new() };
        rows.retain(|row| row.step <= step);
        let written = rows.len();
        rows.retain(|row| row.epoch <= epoch);
        write_metrics(&metrics, classes, &rows)?;
        cut_steps(&dir.join(STEPS), step)?;
        let events = Events::resume(&dir.join(events::FILE_NAME), step, rows.len() == written)?;
        Self::open(dir, events, rows)
    }

    fn open(dir: &Path, events: Events, rows: Vec<EpochRow>) -> Result<Self> {
        let append = |name: &str| {
            let path = dir.join(name);
            let file = OpenOptions::new().append(true).create(true).open(&path);
            file.map(|f| (path.clone(), f)).map_err(|e| Error::io(&path, e))
        };
        Ok(Self { metrics: append(METRICS)?, steps: append(STEPS)?, events, rows })
    }

    /// The epochs so far.
    pub fn rows(&self) -> &[EpochRow] {
        &self.rows
    }

    /// Writes down a step.
    pub fn step(&mut self, row: &StepRow) -> Result<()> {
        let mut line =
            serde_json::to_string(row).map_err(|e| Error::file(&self.steps.0, e.to_string()))?;
        line.push('\n');
        // One call a line, so that a kill cannot leave half of it.
        self.steps.1.write_all(line.as_bytes()).map_err(|e| Error::io(&self.steps.0, e))?;
        let values = [
            ("train/loss", row.loss),
            ("train/lr", row.lr),
            ("train/images_per_s", row.images_per_s),
        ];
        let optional = [("train/grad_norm", row.grad_norm), ("train/loss_scale", row.loss_scale)];
        let some = optional.into_iter().filter_map(|(tag, value)| Some((tag, value?)));
        self.events.scalars(row.step, &values.into_iter().chain(some).collect::<Vec<_>>())
    }

    /// Writes down an epoch.
    pub fn epoch(&mut self, row: EpochRow) -> Result<()> {
        let line = csv_text(&[row.cells()]);
        self.metrics.1.write_all(line.as_bytes()).map_err(|e| Error::io(&self.metrics.0, e))?;
        self.events.scalars(row.step, &row.scalars())?;
        self.rows.push(row);
        Ok(())
    }

    /// Waits until everything written is on the disk; call before a checkpoint that counts on it.
    pub fn sync(&self) -> Result<()> {
        for (path, file) in [&self.metrics, &self.steps] {
            file.sync_data().map_err(|e| Error::io(path, e))?;
        }
        self.events.sync()
    }
}

/// Reads `metrics.csv` back.
pub fn read_metrics(path: &Path) -> Result<Vec<EpochRow>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    // A last line without its end was being written when the run was killed.
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    let mut rows = Vec::new();
    for record in csv::Reader::from_reader(whole.as_bytes()).records() {
        let record = record.map_err(|e| Error::file(path, e.to_string()))?;
        let cells: Vec<&str> = record.iter().collect();
        let line = record.position().map_or(0, csv::Position::line);
        rows.push(EpochRow::from_cells(&cells).ok_or_else(|| {
            Error::file(path, format!("line {line} is not a row of epoch metrics: {cells:?}"))
        })?);
    }
    Ok(rows)
}

/// Reads `steps.jsonl` back, up to a line that was being written when the run was killed.
pub fn read_steps(path: &Path) -> Result<Vec<StepRow>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..=end]);
    let row = |(line, text): (usize, &str)| {
        serde_json::from_str(text)
            .map_err(|e| Error::file(path, format!("line {} is not a step: {e}", line + 1)))
    };
    whole.lines().enumerate().map(row).collect()
}

fn write_metrics(path: &Path, classes: &[String], rows: &[EpochRow]) -> Result<()> {
    let mut header: Vec<String> = COLUMNS.iter().map(ToString::to_string).collect();
    header.extend(classes.iter().map(|class| format!("val_recall_{class}")));
    let mut lines = vec![header];
    lines.extend(rows.iter().map(EpochRow::cells));
    write_atomic(path, csv_text(&lines).as_bytes())
}

fn csv_text(lines: &[Vec<String>]) -> String {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for line in lines {
        writer.write_record(line).expect("a vector takes every record");
    }
    let bytes = writer.into_inner().expect("a vector takes every byte");
    String::from_utf8(bytes).expect("made of strings")
}

fn cut_steps(path: &Path, step: u64) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let keep = |line: &&str| {
        let row: Option<StepRow> = serde_json::from_str(line).ok();
        line.ends_with('\n') && row.is_some_and(|row| row.step <= step)
    };
    let kept: String = text.split_inclusive('\n').take_while(keep).collect();
    if kept.len() == text.len() { Ok(()) } else { write_atomic(path, kept.as_bytes()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step_row(step: u64) -> StepRow {
        StepRow {
            step,
            epoch: 1 + step / 10,
            loss: 1.0 / step as f64,
            lr: 0.1,
            data_ms: 1.0,
            step_ms: 2.0,
            images_per_s: 3.0,
            grad_norm: step.is_multiple_of(2).then_some(0.5),
            loss_scale: None,
            left_out: step == 3,
        }
    }

    fn epoch_row(epoch: u64) -> EpochRow {
        EpochRow {
            epoch,
            step: 10 * epoch,
            lr: 1e-3,
            train_loss: 0.1 + 0.2,
            train_accuracy: Some(1.0 / 3.0),
            val_balanced_accuracy: Some(0.75),
            val_recall: vec![Some(0.5), None],
            ..EpochRow::default()
        }
    }

    fn classes() -> Vec<String> {
        vec!["nevus".into(), "melanoma, in situ".into()]
    }

    #[test]
    fn rows_come_back_to_the_bit() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut log = RunLog::create(dir.path(), &classes()).expect("new logs");
        log.epoch(epoch_row(1)).expect("written");
        log.epoch(epoch_row(2)).expect("written");
        log.sync().expect("on disk");
        let path = dir.path().join(METRICS);
        assert_eq!(read_metrics(&path).expect("read"), [epoch_row(1), epoch_row(2)]);
        assert_eq!(log.rows().len(), 2);
        let text = std::fs::read_to_string(&path).expect("read");
        let header = text.lines().next().expect("a header");
        assert!(header.contains(
            "val_balanced_accuracy,val_auc,val_recall_nevus,\"val_recall_melanoma, in situ\""
        ));
        assert_eq!(
            text.lines().nth(1),
            Some("1,10,0.001,0.30000000000000004,0.3333333333333333,,,,0.75,,0.5,")
        );
    }

    #[test]
    fn resuming_cuts_what_lies_beyond() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut log = RunLog::create(dir.path(), &classes()).expect("new logs");
        for step in 1..=25 {
            log.step(&step_row(step)).expect("written");
            if step % 10 == 0 {
                log.epoch(epoch_row(step / 10)).expect("written");
            }
        }
        drop(log);
        let tear = |name: &str, text: &str| {
            let mut file =
                OpenOptions::new().append(true).open(dir.path().join(name)).expect("open");
            file.write_all(text.as_bytes()).expect("half a line");
        };
        tear(STEPS, "{\"step\":26,\"epo");
        tear(METRICS, "3,30,0.0");
        let mut log = RunLog::resume(dir.path(), &classes(), 13, 1).expect("resumed");
        assert_eq!(log.rows(), [epoch_row(1)]);
        log.step(&step_row(14)).expect("written");
        log.epoch(epoch_row(2)).expect("written");
        let text = std::fs::read_to_string(dir.path().join(STEPS)).expect("read");
        let line = |step| serde_json::to_string(&step_row(step)).expect("a line");
        assert_eq!(text.lines().collect::<Vec<_>>(), (1..=14).map(line).collect::<Vec<_>>());
        let rows = read_metrics(&dir.path().join(METRICS)).expect("read");
        assert_eq!(rows, [epoch_row(1), epoch_row(2)]);
        let read = read_steps(&dir.path().join(STEPS)).expect("whole lines");
        assert_eq!(read, (1..=14).map(step_row).collect::<Vec<_>>());
        drop(log);
        // The second epoch was stopped in its middle: it will have another row.
        let log = RunLog::resume(dir.path(), &classes(), 20, 1).expect("resumed");
        assert_eq!(log.rows(), [epoch_row(1)]);
        assert_eq!(read_metrics(&dir.path().join(METRICS)).expect("read"), [epoch_row(1)]);
    }

    #[test]
    fn damage_in_the_middle_names_file_and_line() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join(METRICS);
        std::fs::write(&path, "epoch,step,lr,train_loss\n1,ten,0,0\n").expect("written");
        let error = read_metrics(&path).expect_err("not a number").to_string();
        assert!(error.contains("metrics.csv: line 2"), "{error}");
        let error = RunLog::create(Path::new("no/such/dir"), &[]).expect_err("no directory");
        assert!(error.to_string().starts_with("no/such/dir/metrics.csv"), "{error}");
    }
}
