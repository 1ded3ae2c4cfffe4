//! PatchCamelyon: 96x96 patches of lymph-node tissue; the label says whether the middle 32x32 pixels contain tumour. Two editions: Kaggle's
//! (TIFF files, duplicates removed, no official validation part) and the original HDF5 arrays.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hdf5_reader::{Hdf5File, SliceInfo, SliceInfoElem};

use super::files::{Problems, Table, dataset, file_dataset, list, pictures_by_stem};
use super::{Dataset, Format, Image, Item, Part};
use crate::{Error, Result};

const CLASSES: [&str; 2] = ["normal", "tumour"];
const NOTES: [&str; 2] = [
    "PatchCamelyon: CC0. Cite Veeling et al. 2018 (arXiv 1806.03962) and Ehteshami Bejnordi et al. 2017. Research only, not for diagnosis.",
    "The label tells of the middle 32x32 pixels of a patch: crops must keep the middle third.",
];

pub(super) fn detect_kaggle(root: &Path) -> bool {
    root.join("train_labels.csv").is_file() && root.join("train").is_dir()
}

/// The Kaggle edition: `train_labels.csv` (`id,label`) and `train/<id>.tif`. The unlabelled `test/` is not used.
pub(super) fn open_kaggle(root: &Path, problems: &mut Problems) -> Result<Dataset> {
    let (csv, folder) = (root.join("train_labels.csv"), root.join("train"));
    let table = Table::read(&csv, &["id", "label"])?;
    let pictures = pictures_by_stem(&folder)?;
    let mut items = Vec::with_capacity(table.len());
    for row in 0..table.len() {
        let (id, label) = (table.cell(row, "id"), table.cell(row, "label"));
        let label = match label {
            "0" => 0,
            "1" => 1,
            _ => {
                problems.report(
                    table.error(row, format!("{id} has the label {label:?}, expected 0 or 1")),
                )?;
                continue;
            }
        };
        let Some(file) = pictures.get(id) else {
            let folder = folder.display();
            problems.report(table.error(row, format!("no picture for the id {id}: {id}.tif is not in {folder}. Fetch it, or leave it out with --skip-bad")))?;
            continue;
        };
        items.push(Item {
            id: id.to_string(),
            label,
            group: None,
            domain: None,
            official: None,
            file: file.clone(),
        });
    }
    let mut set = file_dataset(Format::PcamKaggle, root, &CLASSES, items, &NOTES);
    set.notes.push("Kaggle's edition does not say which slide a patch is from: a random split can put one slide into two parts.".into());
    Ok(set)
}

/// The names that the HDF5 edition gives to its parts.
const H5_PARTS: [(&str, Part); 3] =
    [("train", Part::Train), ("valid", Part::Val), ("test", Part::Test)];

/// The folder that holds the HDF5 files: `path`, or the folder of the file `path`.
fn h5_folder(path: &Path) -> PathBuf {
    if path.is_file() {
        path.parent().map(Path::to_path_buf).unwrap_or_default()
    } else {
        path.to_path_buf()
    }
}

/// The file of one part, `axis` x (pictures) or y (labels).
fn h5_file(folder: &Path, part: &str, axis: char) -> PathBuf {
    folder.join(format!("camelyonpatch_level_2_split_{part}_{axis}.h5"))
}

pub(super) fn detect_h5(path: &Path) -> bool {
    let folder = h5_folder(path);
    let packed = |part| h5_file(&folder, part, 'x').with_extension("h5.gz").is_file();
    H5_PARTS.iter().any(|(part, _)| h5_file(&folder, part, 'x').is_file() || packed(part))
}

/// One part's pictures, read from the file when they are asked for.
struct H5Pictures {
    path: Arc<Path>,
    data: hdf5_reader::Dataset,
    height: usize,
    width: usize,
}

/// The HDF5 edition: for each part `x` (u8, N x 96 x 96 x 3) and `y` (u8, N x 1 x 1 x 1). Parts that are not there are left out.
pub(super) fn open_h5(path: &Path) -> Result<Dataset> {
    let folder = h5_folder(path);
    let (mut parts, mut items, mut places) = (Vec::new(), Vec::new(), Vec::new());
    for (name, part) in H5_PARTS {
        let file = h5_file(&folder, name, 'x');
        if !file.is_file() {
            continue;
        }
        let (pictures, count) = open_pictures(&file)?;
        let labels = read_labels(&h5_file(&folder, name, 'y'), count)?;
        for (row, label) in labels.into_iter().enumerate() {
            places.push((parts.len(), row));
            let id = format!("{name}/{row}");
            items.push(Item {
                id,
                label,
                group: None,
                domain: None,
                official: Some(part),
                file: pictures.path.clone(),
            });
        }
        parts.push(pictures);
    }
    if parts.is_empty() {
        let packed = list(&folder)?
            .iter()
            .any(|path| path.extension().is_some_and(|extension| extension == "gz"));
        let hint = if packed { "; unpack the .gz files first (gunzip *.h5.gz)" } else { "" };
        return Err(Error::file(
            &folder,
            format!("no camelyonpatch_level_2_split_{{train,valid,test}}_x.h5 here{hint}"),
        ));
    }
    let decode = Box::new(move |index: usize| {
        let (part, row): (usize, usize) = places[index];
        parts[part].read(row)
    });
    Ok(dataset(Format::PcamH5, &folder, &CLASSES, items, &NOTES, decode))
}

fn open_array(path: &Path, key: &str) -> Result<hdf5_reader::Dataset> {
    let file = Hdf5File::open(path).map_err(|error| {
        Error::file(
            path,
            format!(
                "not a readable HDF5 file ({error}); fetch it again, and unpack it if it is a .gz"
            ),
        )
    })?;
    file.dataset(key).map_err(|error| {
        Error::file(
            path,
            format!(
                "no readable data set {key:?} in it ({error}); expected PatchCamelyon's layout"
            ),
        )
    })
}

fn open_pictures(path: &Path) -> Result<(H5Pictures, usize)> {
    let data = open_array(path, "x")?;
    let [count, height, width, 3] = *data.shape() else {
        return Err(Error::file(
            path,
            format!("x has the shape {:?}, expected [N, 96, 96, 3]", data.shape()),
        ));
    };
    if data.raw_element_size().ok() != Some(1) {
        return Err(Error::file(path, format!("x has the type {:?}, expected u8", data.dtype())));
    }
    Ok((
        H5Pictures { path: path.into(), data, height: height as usize, width: width as usize },
        count as usize,
    ))
}

fn read_labels(path: &Path, count: usize) -> Result<Vec<u32>> {
    if !path.is_file() {
        return Err(Error::file(path, "missing; the labels stand beside the pictures' _x.h5 file"));
    }
    let data = open_array(path, "y")?;
    let labels = data
        .read_array::<u8>()
        .map_err(|error| Error::file(path, format!("y cannot be read as u8 ({error})")))?;
    if labels.len() != count {
        return Err(Error::file(
            path,
            format!("y has {} labels for {count} pictures", labels.len()),
        ));
    }
    match labels.iter().position(|&label| label > 1) {
        Some(row) => Err(Error::file(
            path,
            format!("label {} in row {row}, expected 0 or 1", labels.iter().nth(row).unwrap_or(&0)),
        )),
        None => Ok(labels.iter().map(|&label| u32::from(label)).collect()),
    }
}

impl H5Pictures {
    fn read(&self, row: usize) -> Result<Image> {
        let all = SliceInfoElem::Slice { start: 0, end: u64::MAX, step: 1 };
        let selection = SliceInfo {
            selections: vec![SliceInfoElem::Index(row as u64), all.clone(), all.clone(), all],
        };
        let wrong = |what: String| {
            Error::file(&self.path, format!("row {row} of x {what}; fetch the file again"))
        };
        let pixels = self
            .data
            .read_slice::<u8>(&selection)
            .map_err(|error| wrong(format!("cannot be read ({error})")))?;
        let pixels: Vec<u8> = pixels.iter().copied().collect();
        if pixels.len() != self.height * self.width * 3 {
            return Err(wrong(format!(
                "has {} bytes, expected {}",
                pixels.len(),
                self.height * self.width * 3
            )));
        }
        Ok(Image { width: self.width, height: self.height, pixels })
    }
}
