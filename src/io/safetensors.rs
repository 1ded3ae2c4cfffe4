//! The safetensors format: 8 bytes of header length, a JSON header, raw little-endian arrays.

use super::write_atomic;
use crate::error::{Error, Result};
use crate::nn::{Data, StateArray, StateDict};
use ::safetensors::tensor::{Dtype, SafeTensors, TensorView};
use half::{bf16, f16};
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Reads a state dict. Arrays of other float types become f32, those of other integer types i64.
///
/// # Errors
/// [`Error::Io`] where the file cannot be read, [`Error::File`] where it is not safetensors, is cut short, or holds an
/// array of a type without a number for each element.
pub fn read(path: impl AsRef<Path>) -> Result<StateDict> {
    let path = path.as_ref();
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    let mut dict = from_bytes(&bytes).map_err(|message| Error::file(path, message))?;
    dict.source = path.to_path_buf();
    Ok(dict)
}

/// Parses the content of a safetensors file; the error says what is wrong with it.
fn from_bytes(bytes: &[u8]) -> Result<StateDict, String> {
    let refuse = |e| {
        let hint = match bytes.get(..2) {
            Some(b"PK") => {
                "; it looks like a PyTorch .pth file: load it in Python and save it with safetensors.torch.save_file"
            }
            _ => "; it is cut short, or another kind of file",
        };
        format!("not a safetensors file ({e}){hint}")
    };
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(refuse)?;
    let file = SafeTensors::deserialize(bytes).map_err(refuse)?;
    let mut dict = StateDict::default();
    if let Some(text) = header.metadata() {
        dict.metadata.extend(text.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
    // In order of name, so that of several wrong arrays the same one is always named.
    for (name, view) in file.iter().collect::<BTreeMap<_, _>>() {
        let data = convert(&view).ok_or_else(|| {
            format!(
                "'{name}' has elements of type {}, which are not read here; store it as F32",
                view.dtype()
            )
        })?;
        dict.arrays.insert(name.into(), StateArray { shape: view.shape().to_vec(), data });
    }
    Ok(dict)
}

/// The elements of an array as f32 or i64; `None` for a type that is neither.
fn convert(view: &TensorView<'_>) -> Option<Data> {
    /// Cuts bytes into elements of N bytes.
    fn each<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks().0.iter().map(|chunk| read(*chunk)).collect()
    }
    let bytes = view.data();
    Some(match view.dtype() {
        Dtype::F32 => Data::F32(each(bytes, f32::from_le_bytes)),
        Dtype::F64 => Data::F32(each(bytes, |b| f64::from_le_bytes(b) as f32)),
        Dtype::F16 => Data::F32(each(bytes, |b| f16::from_le_bytes(b).to_f32())),
        Dtype::BF16 => Data::F32(each(bytes, |b| bf16::from_le_bytes(b).to_f32())),
        Dtype::I64 => Data::I64(each(bytes, i64::from_le_bytes)),
        Dtype::I32 => Data::I64(each(bytes, |b| i32::from_le_bytes(b).into())),
        Dtype::I16 => Data::I64(each(bytes, |b| i16::from_le_bytes(b).into())),
        Dtype::U8 => Data::I64(each(bytes, |[b]: [u8; 1]| b.into())),
        _ => return None,
    })
}

/// The content of a safetensors file with this state dict; the same dict gives the same bytes. (The `safetensors` crate
/// writes metadata in an order that differs from run to run, so the header is made here.)
pub fn to_bytes(dict: &StateDict) -> Vec<u8> {
    let mut header = Map::new();
    if !dict.metadata.is_empty() {
        header.insert("__metadata__".into(), json!(dict.metadata));
    }
    // Eight-byte elements first, so that everything is aligned.
    let wide = dict.arrays.iter().filter(|(_, a)| matches!(a.data, Data::I64(_)));
    let narrow = dict.arrays.iter().filter(|(_, a)| matches!(a.data, Data::F32(_)));
    let mut body = Vec::new();
    for (name, array) in wide.chain(narrow) {
        let start = body.len();
        let dtype = match &array.data {
            Data::F32(v) => {
                body.extend(v.iter().flat_map(|x| x.to_le_bytes()));
                "F32"
            }
            Data::I64(v) => {
                body.extend(v.iter().flat_map(|x| x.to_le_bytes()));
                "I64"
            }
        };
        let offsets = [start, body.len()];
        let entry = json!({"dtype": dtype, "shape": array.shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
    }
    let mut text = serde_json::Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes.append(&mut body);
    bytes
}

/// Writes a state dict, whole or not at all.
///
/// # Errors
/// As [`write_atomic`].
pub fn write(path: impl AsRef<Path>, dict: &StateDict) -> Result<()> {
    write_atomic(path.as_ref(), &to_bytes(dict))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> StateDict {
        let mut dict = StateDict::default();
        dict.metadata.insert("model".into(), "resnet18".into());
        dict.metadata.insert("classes".into(), "a \"b\"".into());
        dict.arrays.insert("w".into(), StateArray::f32(&[2, 1], vec![1.5, f32::MIN_POSITIVE]));
        dict.arrays.insert("n".into(), StateArray::count(1 << 40));
        dict
    }

    #[test]
    fn a_file_comes_back_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let mut dict = example();
        write(&path, &dict).unwrap();
        dict.source = path.clone();
        assert_eq!(read(&path).unwrap(), dict);
        assert_eq!(fs::read(&path).unwrap(), to_bytes(&dict));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn half_and_double_precision_are_converted() {
        let file = |dtype: Dtype, bytes: &[u8]| {
            let view = TensorView::new(dtype, vec![2], bytes).unwrap();
            let bytes = ::safetensors::serialize([("x", view)], None).unwrap();
            from_bytes(&bytes).map(|dict| dict.arrays["x"].to_f32())
        };
        let wanted = Ok(vec![1.5, -2.0]);
        let f16s = [f16::from_f32(1.5), f16::from_f32(-2.0)].map(f16::to_le_bytes).concat();
        assert_eq!(file(Dtype::F16, &f16s), wanted);
        let bf16s = [bf16::from_f32(1.5), bf16::from_f32(-2.0)].map(bf16::to_le_bytes).concat();
        assert_eq!(file(Dtype::BF16, &bf16s), wanted);
        assert_eq!(file(Dtype::F64, &[1.5f64, -2.0].map(f64::to_le_bytes).concat()), wanted);
        assert_eq!(
            file(Dtype::I32, &[1i32, -2].map(i32::to_le_bytes).concat()),
            Ok(vec![1.0, -2.0])
        );
        assert!(file(Dtype::BOOL, &[1, 0]).is_err_and(|e| e.contains("'x'") && e.contains("BOOL")));
    }

    #[test]
    fn what_is_not_whole_is_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let bytes = to_bytes(&example());
        let mut flipped = bytes.clone();
        flipped[9] = b'}';
        for (bad, expected) in [
            (&bytes[..bytes.len() - 1], "cut short"),
            (&bytes[..20], "cut short"),
            (&bytes[..0], "cut short"),
            (&flipped[..], "not a safetensors file"),
            (&b"PK\x03\x04 and so on"[..], "PyTorch .pth"),
        ] {
            fs::write(&path, bad).unwrap();
            let message = read(&path).unwrap_err().to_string();
            assert!(message.contains("a.safetensors: ") && message.contains(expected), "{message}");
            assert_eq!(message.lines().count(), 1);
        }
        let message = read(dir.path().join("none")).unwrap_err().to_string();
        assert!(message.contains("none: "), "{message}");
    }

    #[test]
    fn a_failed_write_names_the_file_and_keeps_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        write(&path, &example()).unwrap();
        // A directory in the temporary file's place stands for any failed write.
        fs::create_dir(dir.path().join("a.safetensors.new")).unwrap();
        let message = write(&path, &StateDict::default()).unwrap_err().to_string();
        assert!(message.contains("a.safetensors: "), "{message}");
        assert_eq!(read(&path).unwrap().arrays, example().arrays);
    }
}
