//! What others take for our rows: files that the programs in `benches/peers/` write.
//!
//! Such a file has `peer` (a name with a version), `device`, `precision` and `rows`; a row has `name`, the `subject` that was timed,
//! and `ways` (each with `ms` for forward and backward or a whole step, maybe `p20_ms`, `p80_ms` and `forward_ms`) or `failed`.

use super::report::{Measured, Outcome, read_json, twice};
use super::row::Subject;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a way of a peer takes, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Way {
    /// Forward and backward, or the whole step: the median.
    pub ms: f64,
    /// A fifth of the samples is below.
    #[serde(default)]
    pub p20_ms: Option<f64>,
    /// Four fifths of the samples are below.
    #[serde(default)]
    pub p80_ms: Option<f64>,
    /// The forward alone.
    #[serde(default)]
    pub forward_ms: Option<f64>,
}

/// What a peer takes for a row: every way that it has, or why there is none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PeerTime {
    /// Its ways.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub ways: BTreeMap<String, Way>,
    /// Why it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl PeerTime {
    /// Whether it has a time that none can be.
    pub(crate) fn wrong(&self) -> bool {
        let times = |w: &Way| [Some(w.ms), w.p20_ms, w.p80_ms, w.forward_ms];
        self.ways.values().flat_map(times).flatten().any(|ms| !(ms.is_finite() && ms > 0.0))
    }

    /// The way that takes least.
    pub fn best(&self) -> Option<(&str, &Way)> {
        let least = self.ways.iter().min_by(|a, b| a.1.ms.total_cmp(&b.1.ms));
        least.map(|(name, way)| (name.as_str(), way))
    }

    /// The peer's least time over ours, forward and backward: above 1 ours is faster.
    pub fn ratio(&self, ours: &Outcome) -> Option<f64> {
        match ours {
            Outcome::Timed(times) => Some(self.best()?.1.ms / times.whole.timing.ms),
            _ => None,
        }
    }
}

/// A peer's file.
#[derive(Debug)]
pub struct Peer {
    /// Its name, version and device.
    pub name: String,
    path: PathBuf,
    rows: BTreeMap<String, PeerRow>,
}

#[derive(Debug, Deserialize)]
struct PeerRow {
    name: String,
    subject: Subject,
    #[serde(flatten)]
    time: PeerTime,
}

#[derive(Deserialize)]
struct PeerFile {
    peer: String,
    device: String,
    precision: String,
    rows: Vec<Value>,
}

impl Peer {
    /// Reads a peer's file, whose times must be of elements of `precision`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::File`] where it is no such file or of another precision.
    pub fn read(path: &Path, precision: &str) -> Result<Self> {
        let file: PeerFile = serde_json::from_value(read_json(path)?).map_err(|e| {
            let ours = "expected a file of times that a program in benches/peers/ wrote";
            Error::file(path, format!("{e}; {ours}"))
        })?;
        if file.precision != precision {
            let message = format!("its times are in {}, ours in {precision}", file.precision);
            return Err(Error::file(path, message));
        }
        let row = |(i, row): (usize, &Value)| {
            let name = row.get("name").and_then(Value::as_str).unwrap_or("without a name");
            serde_json::from_value::<PeerRow>(row.clone())
                .map_err(|e| Error::file(path, format!("row {i} ({name}): {e}")))
        };
        let rows = file.rows.iter().enumerate().map(row).collect::<Result<Vec<_>>>()?;
        if let Some(row) = rows.iter().find(|r| r.time.wrong()) {
            return Err(Error::file(path, format!("{}: a time that is not above 0", row.name)));
        }
        if let Some(name) = twice(rows.iter().map(|r| &r.name)) {
            return Err(Error::file(path, format!("the row {name} stands there twice")));
        }
        let rows = rows.into_iter().map(|row| (row.name.clone(), row)).collect();
        let name = format!("{} ({})", file.peer, file.device);
        Ok(Self { name, path: path.into(), rows })
    }

    /// Puts the peer's time beside ours, where it has the row. Two files of one peer are joined way by way.
    ///
    /// # Errors
    /// [`Error::File`] where the peer timed something else under the row's name.
    pub fn put_beside(&self, ours: &mut Measured) -> Result<()> {
        let Some(theirs) = self.rows.get(&ours.row.name) else { return Ok(()) };
        if theirs.subject != ours.row.subject {
            let message = format!(
                "{}: it timed {:?}, ours is {:?}; time it again with the rows that `attn2d bench --list --json` writes now",
                ours.row.name, theirs.subject, ours.row.subject
            );
            return Err(Error::file(&self.path, message));
        }
        let time = ours.peers.entry(self.name.clone()).or_default();
        time.ways.extend(theirs.time.ways.clone());
        time.failed = theirs.time.failed.clone().filter(|_| time.ways.is_empty());
        Ok(())
    }
}

/// The names of all peers that some row has, in order.
pub(crate) fn names<'r>(rows: impl IntoIterator<Item = &'r Measured>) -> Vec<String> {
    let all = rows.into_iter().flat_map(|m| m.peers.keys().cloned());
    all.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
}
