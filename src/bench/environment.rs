//! Where and how times were taken.

use super::row::Size;
use crate::error::{Error, Result};
use crate::{Caps, DType, Device};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Where and how the times were taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// The crate's version.
    pub version: String,
    /// Canonical device string.
    pub device: String,
    /// The hardware's own name, with its driver.
    pub adapter: String,
    /// Whether software plays a GPU: its times tell nothing of GPUs.
    pub software: bool,
    /// Operating system and architecture.
    pub system: String,
    /// The host's processor and how many cores of it this program may use, where the system tells.
    #[serde(default)]
    pub host: String,
    /// Whose clock the times are by, and with what in the caches.
    #[serde(default)]
    pub clock: String,
    /// `f32`, `f16` or `bf16`.
    pub precision: String,
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
            version: env!("CARGO_PKG_VERSION").into(),
            device: caps.name.clone(),
            adapter: caps.adapter.clone(),
            software: caps.software,
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            host: host(),
            clock: clock(caps).into(),
            precision: dtype.suffix().into(),
            size,
            date: utc(seconds),
            command: command(),
        }
    }
}

impl Environment {
    /// Whether times from `self`, which stand in a file, can be held against those from `other`.
    ///
    /// # Errors
    /// [`Error::File`] naming what differs.
    pub(crate) fn comparable(&self, other: &Self, file: &Path) -> Result<()> {
        let both = [
            ("device", self.device.clone(), other.device.clone()),
            ("adapter", self.adapter.clone(), other.adapter.clone()),
            ("precision", self.precision.clone(), other.precision.clone()),
            ("size", self.size.to_string(), other.size.to_string()),
            // Of a GPU too: it plays one that is software, and feeds any other.
            ("host", self.host.clone(), other.host.clone()),
        ];
        match both.into_iter().find(|(_, old, new)| old != new) {
            None => Ok(()),
            Some((what, old, new)) => Err(Error::file(
                file,
                format!(
                    "its {what} is '{old}', here it is '{new}': times of the two say nothing of each other"
                ),
            )),
        }
    }
}

/// What the times of a device are.
fn clock(caps: &Caps) -> &'static str {
    match caps {
        caps if caps.max_invocations == 1 => "host's clock",
        caps if caps.software => "software plays the GPU: no measure of one",
        caps if caps.timestamps => "sum of kernels on the device's clock, caches cold",
        _ => "host's clock, caches warm",
    }
}

/// The program's words, itself by its name alone.
fn command() -> Vec<String> {
    let mut words: Vec<String> = std::env::args().collect();
    let name = words.first().and_then(|w| Path::new(w).file_name()?.to_str().map(String::from));
    if let (Some(first), Some(name)) = (words.first_mut(), name) {
        *first = name;
    }
    words
}

fn host() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    let model = model.map_or("", |(_, name)| name.trim());
    match (std::thread::available_parallelism(), model) {
        (Ok(n), "") => format!("{n} cores"),
        (Ok(n), model) => format!("{model}, {n} cores"),
        (Err(_), model) => model.into(),
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
