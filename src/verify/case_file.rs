//! Case files: one safetensors file with metadata `op`, `attrs` (JSON) and optional `rtol`, `atol`, and tensors
//! `in.<name>`, `out.<name>`, `gout.<name>`, `gin.<name>` (models also `state.<name>`, `after.<name>`).

use crate::error::{Error, Result};
use crate::io::paths;
use crate::ops::case::{Array, Arrays, Attrs};
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// What a tensor's name may begin with.
const GROUPS: [&str; 6] = ["in", "out", "gout", "gin", "state", "after"];

/// A case as its file has it: nothing permuted, nothing checked against an op yet.
#[derive(Clone, Debug)]
pub struct CaseFile {
    /// Where it was read from.
    pub path: PathBuf,
    /// The op's name.
    pub op: String,
    /// The op's options.
    pub attrs: Attrs,
    /// Relative tolerance, where the file names one.
    pub rtol: Option<f64>,
    /// Absolute tolerance, where the file names one.
    pub atol: Option<f64>,
    tensors: Arrays,
}

impl CaseFile {
    /// Reads a case file.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read, [`Error::File`] where it is truncated, not safetensors, or lacks `op`.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let broken = |e: String| {
            Error::file(path, format!("not a whole safetensors file ({e}); write or copy it again"))
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| broken(e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let file = SafeTensors::deserialize(&bytes).map_err(|e| broken(e.to_string()))?;
        let op = metadata.get("op").ok_or_else(|| {
            Error::file(path, "its metadata has no 'op'; a case file needs `op` and `attrs` (tests/golden/README.md)")
        })?;
        let mut tensors = Arrays::new();
        // In order of name, so that of several wrong tensors the same one is always named.
        for (name, view) in file.iter().collect::<BTreeMap<_, _>>() {
            let group = name.split_once('.').map_or("", |(group, _)| group);
            if !GROUPS.contains(&group) {
                let message = format!(
                    "tensor '{name}': names begin with in., out., gout., gin., state. or after."
                );
                return Err(Error::file(path, message));
            }
            tensors.insert(name.to_string(), array(path, name, &view)?);
        }
        Ok(Self {
            path: path.to_path_buf(),
            op: op.clone(),
            attrs: attrs(path, &metadata)?,
            rtol: number(path, &metadata, "rtol")?,
            atol: number(path, &metadata, "atol")?,
            tensors,
        })
    }

    /// The tensors of one group (`in`, `out`, ...) by their names in it, in the file's layout.
    pub fn group(&self, group: &str) -> Arrays {
        let prefix = format!("{group}.");
        let of_group = |(name, array): (&String, &Array)| {
            Some((name.strip_prefix(&prefix)?.to_string(), array.clone()))
        };
        self.tensors.iter().filter_map(of_group).collect()
    }

    /// The case's name in reports: the file's, without its ending.
    pub fn label(&self) -> String {
        self.path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned())
    }
}

/// The case files that a `--cases` argument means: the file, or a folder's `*.safetensors` in order of name.
///
/// # Errors
/// [`Error::Usage`] where there is nothing at the path, [`Error::Io`] where it cannot be read, [`Error::File`] for a folder without
/// case files.
pub(super) fn find(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        paths::check_input("--cases", path, "a case file or a folder of them")?;
        return Ok(vec![path.to_path_buf()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| Error::io(path, e))? {
        let file = entry.map_err(|e| Error::io(path, e))?.path();
        if file.extension().is_some_and(|e| e == "safetensors") {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(Error::file(
            path,
            "no *.safetensors files here; give a case file or a folder of them",
        ));
    }
    files.sort();
    Ok(files)
}

fn attrs(path: &Path, metadata: &HashMap<String, String>) -> Result<Attrs> {
    let Some(text) = metadata.get("attrs") else { return Ok(Attrs::default()) };
    serde_json::from_str(text).map(Attrs).map_err(|e| {
        Error::file(path, format!("metadata 'attrs' is not a JSON object: {e}: {text}"))
    })
}

fn number(path: &Path, metadata: &HashMap<String, String>, key: &str) -> Result<Option<f64>> {
    let Some(text) = metadata.get(key) else { return Ok(None) };
    match text.trim().parse::<f64>() {
        Ok(value) if value >= 0.0 && value.is_finite() => Ok(Some(value)),
        _ => Err(Error::file(
            path,
            format!("metadata '{key}' is '{text}', expected a number such as 1e-4"),
        )),
    }
}

/// A tensor of the file as f64, whatever it is stored as.
fn array(path: &Path, name: &str, view: &TensorView<'_>) -> Result<Array> {
    /// Decodes little-endian elements of `N` bytes.
    fn each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        bytes.as_chunks::<N>().0.iter().map(|chunk| read(*chunk)).collect()
    }
    let bytes = view.data();
    let data = match view.dtype() {
        Dtype::F32 => each(bytes, |b| f64::from(f32::from_le_bytes(b))),
        Dtype::F64 => each(bytes, f64::from_le_bytes),
        Dtype::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f64()),
        Dtype::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f64()),
        Dtype::I64 => each(bytes, |b| i64::from_le_bytes(b) as f64),
        Dtype::I32 => each(bytes, |b| f64::from(i32::from_le_bytes(b))),
        Dtype::U32 => each(bytes, |b| f64::from(u32::from_le_bytes(b))),
        Dtype::U8 | Dtype::BOOL => each(bytes, |b: [u8; 1]| f64::from(b[0])),
        other => {
            return Err(Error::file(
                path,
                format!("tensor '{name}' is {other:?}; use F32, F64, F16, BF16, I32 or I64"),
            ));
        }
    };
    Ok(Array { shape: view.shape().to_vec(), data })
}
