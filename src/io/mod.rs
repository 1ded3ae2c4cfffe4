//! Files: state dicts as safetensors, compiled kernels, paths that users give.

#[cfg(feature = "cuda")]
pub(crate) mod kernel_cache;
pub(crate) mod machine;
pub mod paths;
pub mod safetensors;

use crate::error::{Error, Result};
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Writes a file whole or not at all: to `<path>.new`, synced, then renamed. What was there before stays until then.
///
/// # Errors
/// [`Error::Io`] naming the file that could not be written.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let fresh = PathBuf::from(name);
    let write = || {
        let mut file = File::create(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, path)
    };
    write().map_err(|e| {
        // Half a file is of no use, and on a full disk its space is.
        let _ = fs::remove_file(&fresh);
        Error::io(path, e)
    })
}

/// Writes a value as JSON for people and programs, whole or not at all.
///
/// # Errors
/// As [`write_atomic`]; [`Error::File`] for a value that JSON does not have.
pub(crate) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::file(path, e.to_string()))?;
    write_atomic(path, (text + "\n").as_bytes())
}

/// A file locked by this process, until it is dropped or the process ends, however it ends.
pub(crate) enum Locked {
    /// Nobody else has it.
    Held(File),
    /// Another process, or another thread, has it.
    Busy,
    /// The file system has no locks, for this reason.
    Unable(std::io::Error),
}

/// Locks a file, making it where it is not there.
///
/// # Errors
/// [`Error::Io`] where the file can neither be opened nor made.
pub(crate) fn lock(path: &Path) -> Result<Locked> {
    let open = File::options().create(true).truncate(false).write(true).open(path);
    let file = open.map_err(|e| Error::io(path, e))?;
    Ok(match file.try_lock() {
        Ok(()) => Locked::Held(file),
        Err(TryLockError::WouldBlock) => Locked::Busy,
        Err(TryLockError::Error(e)) => Locked::Unable(e),
    })
}
