//! Compiled kernels on disk, so that a program compiles them once a machine and not once a run.

use super::write_atomic;
use crate::error::Result;
use sha2::{Digest, Sha256};
use std::path::PathBuf;

/// Names the folder; unset, the user's cache folder is taken.
const VARIABLE: &str = "ATTN2D_CACHE";

/// The folder of compiled kernels: `$ATTN2D_CACHE`, or `attn2d` in the user's cache folder. `None` where neither is known.
pub(crate) fn folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set(VARIABLE).or_else(|| {
        let base = if cfg!(windows) {
            set("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            set("HOME").map(|home| home.join("Library/Caches"))
        } else {
            set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))
        };
        base.map(|base| base.join("attn2d"))
    })
}

/// What names a compiled kernel: a readable part, and a hash of everything that its code depends on.
pub(crate) struct Key(String);

impl Key {
    /// `label` is made of letters, digits, `_` and `-`.
    pub(crate) fn new(label: &str, depends_on: &[&str]) -> Self {
        let mut hash = Sha256::new();
        for part in depends_on {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(format!("{label}-{}.bin", hex(&hash.finalize()[..16])))
    }

    fn path(&self) -> Option<PathBuf> {
        Some(folder()?.join(&self.0))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Bytes of the checksum that a file begins with.
const CHECKSUM: usize = 32;

/// What was stored under the key; `None` where nothing was, or where the file is damaged.
pub(crate) fn read(key: &Key) -> Option<Vec<u8>> {
    let file = std::fs::read(key.path()?).ok()?;
    let (checksum, content) = file.split_at_checked(CHECKSUM)?;
    (checksum == &Sha256::digest(content)[..]).then(|| content.to_vec())
}

/// Stores bytes under the key.
///
/// # Errors
/// [`crate::Error::Io`] where the folder or the file cannot be written.
pub(crate) fn write(key: &Key, content: &[u8]) -> Result<()> {
    let Some(path) = key.path() else { return Ok(()) };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| crate::Error::io(folder, e))?;
    }
    let mut file = Sha256::digest(content).to_vec();
    file.extend_from_slice(content);
    write_atomic(&path, &file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_every_part() {
        let name = |parts: &[&str]| Key::new("conv2d-sm_80", parts).0;
        assert!(name(&["a"]).starts_with("conv2d-sm_80-"));
        assert_eq!(name(&["a", "b"]), name(&["a", "b"]));
        for other in [&["ab", ""][..], &["a", "c"], &["a"], &["a", "b", ""]] {
            assert_ne!(name(&["a", "b"]), name(other), "{other:?}");
        }
    }
}
