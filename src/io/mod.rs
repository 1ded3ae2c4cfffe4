//! Files: state dicts as safetensors, compiled kernels, paths that users give.

#[cfg(feature = "cuda")]
pub(crate) mod kernel_cache;
pub(crate) mod machine;
pub mod paths;
pub mod safetensors;

use crate::error::{Error, Result};
use std::fs::{self, File};
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
