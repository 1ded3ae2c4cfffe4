//! Where and how times were taken.

use super::row::Size;
use crate::error::{Error, Result};
use crate::io::machine;
use crate::{Caps, DType, Device};
use serde::{Deserialize, Serialize};
use std::path::Path;

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
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            device: caps.name.clone(),
            adapter: caps.adapter.clone(),
            software: caps.software,
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            host: machine::host(),
            clock: clock(caps).into(),
            precision: dtype.suffix().into(),
            size,
            date: machine::now(),
            command: machine::command(),
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
