//! The one error type of the crate. Every message names the thing at fault, what was expected and what to do.

use std::path::{Path, PathBuf};

/// What can go wrong, sorted by who can mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong shape or dtype for an operation.
    #[error("{op}: {message}")]
    Shape {
        /// The operation that refused.
        op: &'static str,
        /// What was given and what is expected.
        message: String,
    },
    /// A device is missing, lost or refuses a request.
    #[error("device {device}: {message}")]
    Device {
        /// The device string or adapter name.
        device: String,
        /// What happened and what to do.
        message: String,
    },
    /// The tape was used in a way that has no gradient.
    #[error("autograd: {0}")]
    Autograd(String),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word on it.
        source: std::io::Error,
    },
    /// A file was read but its content is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong in it, what was expected, what to do.
        message: String,
    },
    /// The user's options do not fit together (exit code 2).
    #[error("{0}")]
    Usage(String),
    /// Training cannot go on (a loss that is not finite, say).
    #[error("training: {0}")]
    Training(String),
}

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A shape error of `op`.
    pub fn shape(op: &'static str, message: impl Into<String>) -> Self {
        Self::Shape { op, message: message.into() }
    }

    /// A device error.
    pub fn device(device: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Device { device: device.into(), message: message.into() }
    }

    /// An IO error that names its file.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_path_buf(), source }
    }

    /// A file whose content is wrong.
    pub fn file(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// Options that do not fit.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    /// The process exit code for this error: 2 where the command line or config is at fault, else 1.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::Usage(_)) { 2 } else { 1 }
    }
}
