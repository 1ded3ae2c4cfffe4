//! MedMNIST: one `.npz` file (a zip of `.npy` arrays, stored or deflated) with `{train,val,test}_{images,labels}`.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use npyz::npz::NpzArchive;
use npyz::{DType, NpyHeader, Order, TypeChar};

use super::files::{dataset, list};
use super::{Dataset, Format, Image, Item, Part};
use crate::{Error, Result};

const PARTS: [(&str, Part); 3] = [("train", Part::Train), ("val", Part::Val), ("test", Part::Test)];

/// Class names of the sets whose files have numbers only, by the beginning of the file's name.
const CLASS_NAMES: [(&str, &[&str]); 5] = [
    ("pneumoniamnist", &["normal", "pneumonia"]),
    ("breastmnist", &["malignant", "normal or benign"]),
    (
        "dermamnist",
        &[
            "actinic keratosis",
            "basal cell carcinoma",
            "benign keratosis",
            "dermatofibroma",
            "melanoma",
            "nevus",
            "vascular lesion",
        ],
    ),
    (
        "pathmnist",
        &[
            "adipose",
            "background",
            "debris",
            "lymphocytes",
            "mucus",
            "smooth muscle",
            "normal mucosa",
            "stroma",
            "adenocarcinoma",
        ],
    ),
    (
        "bloodmnist",
        &[
            "basophil",
            "eosinophil",
            "erythroblast",
            "immature granulocyte",
            "lymphocyte",
            "monocyte",
            "neutrophil",
            "platelet",
        ],
    ),
];

/// The `.npz` file at `path`, or the only one in the folder `path`.
fn file_at(path: &Path) -> Option<PathBuf> {
    let is_npz = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("npz"))
    };
    if path.is_file() {
        return Some(path.to_path_buf()).filter(is_npz);
    }
    let mut files: Vec<PathBuf> = list(path).ok()?.into_iter().filter(is_npz).collect();
    if files.len() == 1 { files.pop() } else { None }
}

pub(super) fn detect(path: &Path) -> bool {
    file_at(path).is_some()
}

/// An array of bytes as stored: raw little-endian data, its shape, and bytes an element.
struct Array {
    shape: Vec<usize>,
    element: usize,
    /// Empty where only the header was read.
    bytes: Vec<u8>,
}

/// Reads all parts into memory: pictures u8 `[N, S, S]` (grey, repeated to RGB when decoded) or `[N, S, S, 3]`, labels `[N, 1]`. Of a
/// part without any of the ids `readable` the pictures are left in the file.
pub(super) fn open(path: &Path, readable: Option<&HashSet<String>>) -> Result<Dataset> {
    let Some(file) = file_at(path) else {
        return Err(Error::file(
            path,
            "expected a MedMNIST .npz file, or a folder with exactly one in it; name the file you mean",
        ));
    };
    let mut archive = NpzArchive::open(&file).map_err(|error| {
        Error::file(&file, format!("not a readable .npz archive ({error}); fetch the file again"))
    })?;
    let (mut arrays, mut items, mut places, mut classes) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let shared: Arc<Path> = file.as_path().into();
    for (name, part) in PARTS {
        let (images, labels) = (format!("{name}_images"), format!("{name}_labels"));
        let prefix = format!("{name}/");
        let wanted = readable.is_none_or(|ids| ids.iter().any(|id| id.starts_with(&prefix)));
        let pictures = read(&mut archive, &file, &images, wanted)?;
        check_pictures(&file, &images, &pictures)?;
        let labels = read_labels(&mut archive, &file, &labels, pictures.shape[0])?;
        for (row, label) in labels.into_iter().enumerate() {
            classes = classes.max(label + 1);
            places.push((arrays.len(), row));
            let id = format!("{name}/{row}");
            items.push(Item {
                id,
                label,
                group: None,
                domain: None,
                official: Some(part),
                file: shared.clone(),
            });
        }
        arrays.push(pictures);
    }
    let classes = class_names(&file, classes as usize);
    let notes = [
        "MedMNIST v2: CC BY 4.0 (DermaMNIST CC BY-NC 4.0). Cite Yang et al. 2023, doi 10.1038/s41597-022-01721-8, and the set's source.",
    ];
    let decode = Box::new(move |index: usize| {
        let (part, row): (usize, usize) = places[index];
        Ok(arrays[part].picture(row))
    });
    Ok(dataset(Format::MedMnist, &file, &classes, items, &notes, decode))
}

fn class_names(file: &Path, count: usize) -> Vec<String> {
    let stem =
        file.file_stem().map(|stem| stem.to_string_lossy().to_lowercase()).unwrap_or_default();
    let known =
        CLASS_NAMES.iter().find(|(flag, names)| stem.starts_with(flag) && names.len() >= count);
    match known {
        Some((_, names)) => names.iter().map(|name| name.to_string()).collect(),
        None => (0..count).map(|class| format!("class {class}")).collect(),
    }
}

/// Reads one member of the archive, whichever way it is compressed; where it is not `wanted`, only what it holds.
fn read(
    archive: &mut NpzArchive<BufReader<File>>,
    file: &Path,
    key: &str,
    wanted: bool,
) -> Result<Array> {
    // The archive lists its arrays in the order of a hash table.
    let found = archive.array_names().collect::<BTreeSet<_>>();
    if !found.contains(key) {
        let found = found.into_iter().collect::<Vec<_>>().join(", ");
        return Err(Error::file(
            file,
            format!(
                "no array {key:?} in it; expected MedMNIST's {{train,val,test}}_{{images,labels}}, found [{found}]"
            ),
        ));
    }
    let broken = |what: &dyn std::fmt::Display| {
        Error::file(file, format!("array {key:?} cannot be read ({what}); fetch the file again"))
    };
    let mut member =
        archive.zip_archive().by_name(&format!("{key}.npy")).map_err(|error| broken(&error))?;
    let header = NpyHeader::from_reader(&mut member).map_err(|error| broken(&error))?;
    let shape: Vec<usize> = header.shape().iter().map(|&side| side as usize).collect();
    let element = match header.dtype() {
        DType::Plain(kind)
            if matches!(kind.type_char(), TypeChar::Uint | TypeChar::Int)
                && kind.size_field() > 0 =>
        {
            kind.size_field() as usize
        }
        other => {
            return Err(Error::file(
                file,
                format!("array {key:?} has the type {}, expected u8", other.descr()),
            ));
        }
    };
    if header.order() != Order::C {
        return Err(Error::file(
            file,
            format!(
                "array {key:?} is in Fortran order, expected C order; save it again with numpy.ascontiguousarray"
            ),
        ));
    }
    if !wanted {
        return Ok(Array { shape, element, bytes: Vec::new() });
    }
    let length = shape
        .iter()
        .try_fold(element, |length, &side| length.checked_mul(side))
        .ok_or_else(|| broken(&"its size overflows"))?;
    // The buffer grows with what is really there: a header may promise more than memory holds.
    let mut bytes = Vec::new();
    member.read_to_end(&mut bytes).map_err(|error| broken(&error))?;
    if bytes.len() != length {
        return Err(broken(&format!(
            "its shape {shape:?} needs {length} bytes, it has {}",
            bytes.len()
        )));
    }
    Ok(Array { shape, element, bytes })
}

fn check_pictures(file: &Path, key: &str, array: &Array) -> Result<()> {
    if array.element != 1 {
        return Err(Error::file(
            file,
            format!("array {key:?} has {} bytes an element, expected u8", array.element),
        ));
    }
    match *array.shape {
        [_, height, width] | [_, height, width, 3] if height > 0 && width > 0 => Ok(()),
        _ => Err(Error::file(
            file,
            format!(
                "array {key:?} has the shape {:?}, expected [N, S, S] or [N, S, S, 3] (3D sets are not supported)",
                array.shape
            ),
        )),
    }
}

fn read_labels(
    archive: &mut NpzArchive<BufReader<File>>,
    file: &Path,
    key: &str,
    count: usize,
) -> Result<Vec<u32>> {
    let array = read(archive, file, key, true)?;
    match *array.shape {
        [rows] | [rows, 1] if rows == count => {}
        [rows, columns] if rows == count => {
            let message = format!(
                "array {key:?} has {columns} labels a picture; sets with several labels (ChestMNIST) are not supported, one is expected"
            );
            return Err(Error::file(file, message));
        }
        _ => {
            return Err(Error::file(
                file,
                format!("array {key:?} has the shape {:?}, expected [{count}, 1]", array.shape),
            ));
        }
    }
    let mut labels = Vec::with_capacity(count);
    for (row, bytes) in array.bytes.chunks_exact(array.element).enumerate() {
        // Little-endian, any width: the value is the first byte, and all the others must be zero.
        if bytes[1..].iter().any(|&byte| byte != 0) {
            return Err(Error::file(
                file,
                format!(
                    "array {key:?}, row {row}: a label outside 0..255; class numbers start at 0"
                ),
            ));
        }
        labels.push(u32::from(bytes[0]));
    }
    Ok(labels)
}

impl Array {
    fn picture(&self, row: usize) -> Image {
        let (height, width) = (self.shape[1], self.shape[2]);
        let channels = self.shape.get(3).copied().unwrap_or(1);
        let length = height * width * channels;
        let stored = &self.bytes[row * length..(row + 1) * length];
        let pixels = if channels == 3 {
            stored.to_vec()
        } else {
            stored.iter().flat_map(|&grey| [grey; 3]).collect()
        };
        Image { width, height, pixels }
    }
}
