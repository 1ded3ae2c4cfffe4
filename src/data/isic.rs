//! The ISIC challenges of 2017 to 2020 and HAM10000: skin lesions under a dermatoscope, ground truth in CSV files.
//!
//! Pictures are found by their id anywhere below the root, so that all the ways in which the archives unpack are understood.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::{Problems, Table, file_dataset, pictures_by_stem};
use super::{Dataset, Format, Item, Part};
use crate::{Error, Result};

const CLASSES_2017: [&str; 3] = ["nevus", "melanoma", "seborrheic_keratosis"];
const CLASSES_2018: [&str; 7] = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"];
const CLASSES_2019: [&str; 8] = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"];
const CLASSES_2020: [&str; 2] = ["benign", "malignant"];

/// Ground-truth files of the release and the part that each one describes.
fn ground_truths(format: Format) -> &'static [(&'static str, Option<Part>)] {
    match format {
        Format::Isic2017 => &[
            ("ISIC-2017_Training_Part3_GroundTruth.csv", Some(Part::Train)),
            ("ISIC-2017_Validation_Part3_GroundTruth.csv", Some(Part::Val)),
            ("ISIC-2017_Test_v2_Part3_GroundTruth.csv", Some(Part::Test)),
        ],
        Format::Isic2018 => &[
            ("ISIC2018_Task3_Training_GroundTruth.csv", Some(Part::Train)),
            ("ISIC2018_Task3_Validation_GroundTruth.csv", Some(Part::Val)),
            ("ISIC2018_Task3_Test_GroundTruth.csv", Some(Part::Test)),
        ],
        Format::Isic2019 => &[("ISIC_2019_Training_GroundTruth.csv", None)],
        _ => &[
            ("ISIC_2020_Training_GroundTruth_v2.csv", None),
            ("ISIC_2020_Training_GroundTruth.csv", None),
        ],
    }
}

/// The file `name` in `root` or in a folder named like it, as some of the archives unpack.
fn find(root: &Path, name: &str) -> Option<PathBuf> {
    let folder = name.strip_suffix(".csv").unwrap_or(name);
    [root.join(name), root.join(folder).join(name)].into_iter().find(|path| path.is_file())
}

pub(super) fn detect(root: &Path, format: Format) -> bool {
    ground_truths(format).iter().any(|(name, _)| find(root, name).is_some())
        || is_ham10000(root, format)
}

/// HAM10000 as published outside the challenge: no one-hot table, the diagnosis is in the metadata.
fn is_ham10000(root: &Path, format: Format) -> bool {
    format == Format::Isic2018 && ham_metadata(root).is_some()
}

fn ham_metadata(root: &Path) -> Option<PathBuf> {
    // The Harvard Dataverse file has no extension, other copies have.
    ["HAM10000_metadata.csv", "HAM10000_metadata"]
        .iter()
        .map(|name| root.join(name))
        .find(|path| path.is_file())
}

pub(super) fn open(root: &Path, format: Format, problems: &mut Problems) -> Result<Dataset> {
    let pictures = pictures_by_stem(root)?;
    let extra = extras(root, format)?;
    let mut reader = Reader { root, pictures, extra, items: Vec::new() };
    let tables: Vec<_> = ground_truths(format)
        .iter()
        .filter_map(|(name, part)| find(root, name).map(|path| (path, *part)))
        .collect();
    for (path, part) in &tables {
        reader.read(path, format, *part, problems)?;
        if format == Format::Isic2020 {
            break; // v2 replaces the first edition
        }
    }
    if tables.is_empty() && is_ham10000(root, format) {
        reader.read_ham10000(problems)?;
    } else if tables.is_empty() {
        let expected = ground_truths(format)[0].0;
        return Err(Error::file(
            root,
            format!("no {expected} here; docs/data.md shows the layout of {}", format.name()),
        ));
    }
    let classes: &[&str] = match format {
        Format::Isic2017 => &CLASSES_2017,
        Format::Isic2018 => &CLASSES_2018,
        Format::Isic2019 => &CLASSES_2019,
        _ => &CLASSES_2020,
    };
    let notes: &[&str] = match format {
        Format::Isic2017 => &[
            "ISIC 2017: CC0. Cite Codella et al. 2018, arXiv 1710.05006. Research only, not for diagnosis.",
            "ISIC 2017 has no patient or lesion ids: pictures of one patient may lie in different parts.",
        ],
        Format::Isic2018 => &[
            "HAM10000: CC BY-NC 4.0. Cite Tschandl et al. 2018, doi 10.1038/sdata.2018.161. Split by lesion.",
        ],
        Format::Isic2019 => &[
            "ISIC 2019: CC BY-NC 4.0. Cite Tschandl 2018, Codella 2017, Combalia 2019. Split by lesion where it is known.",
        ],
        _ => &[
            "ISIC 2020: CC BY-NC 4.0. Cite Rotemberg et al. 2021, doi 10.1038/s41597-021-00815-z. Split by patient; 1.8 % malignant.",
        ],
    };
    Ok(file_dataset(format, root, classes, reader.items, notes))
}

/// What other tables say about an image.
#[derive(Default, Clone)]
struct Extra {
    group: Option<Arc<str>>,
    domain: Option<Arc<str>>,
}

/// Reads the tables that stand beside the ground truth, where they are there: lesion or patient, and source.
fn extras(root: &Path, format: Format) -> Result<HashMap<String, Extra>> {
    let (path, id, group, domain) = match format {
        Format::Isic2017 => (find(root, "source.csv"), "image_id", "lesion_id", "source"),
        Format::Isic2018 => (ham_metadata(root), "image_id", "lesion_id", "dataset"),
        Format::Isic2019 => {
            (find(root, "ISIC_2019_Training_Metadata.csv"), "image", "lesion_id", "source")
        }
        _ => return Ok(HashMap::new()), // 2020 has the patient in the ground truth itself
    };
    let Some(path) = path else { return Ok(HashMap::new()) };
    let table = Table::read(&path, &[id])?;
    let extra = |row| {
        let group = table.optional(row, group);
        let archive = || match (format, &group) {
            (Format::Isic2019, Some(lesion)) => archive_of(lesion).map(Arc::from),
            _ => None,
        };
        let domain = table.optional(row, domain).or_else(archive);
        Extra { group, domain }
    };
    Ok((0..table.len()).map(|row| (table.cell(row, id).to_string(), extra(row))).collect())
}

/// The archive that a lesion of ISIC 2019 is from: `HAM` of `HAM_0000118`, `BCN` of `BCN_0003884`, `MSK` of `MSK4_0011169`.
fn archive_of(lesion: &str) -> Option<&str> {
    let (archive, _) = lesion.split_once('_')?;
    Some(archive.trim_end_matches(|c: char| c.is_ascii_digit())).filter(|name| !name.is_empty())
}

struct Reader<'a> {
    root: &'a Path,
    pictures: HashMap<String, Arc<Path>>,
    extra: HashMap<String, Extra>,
    items: Vec<Item>,
}

impl Reader<'_> {
    /// Adds the items of one ground-truth table.
    fn read(
        &mut self,
        path: &Path,
        format: Format,
        official: Option<Part>,
        problems: &mut Problems,
    ) -> Result<()> {
        let (id, columns): (&str, &[&str]) = match format {
            Format::Isic2017 => ("image_id", &CLASSES_2017[1..]),
            Format::Isic2018 => ("image", &CLASSES_2018),
            Format::Isic2019 => ("image", &CLASSES_2019),
            _ => ("image_name", &["target"]),
        };
        let table = Table::read(path, &[&[id], columns].concat())?;
        for row in 0..table.len() {
            let label = match format {
                // Neither of the two diseases is a nevus; `target` 0 is benign.
                Format::Isic2017 | Format::Isic2020 => {
                    hot(&table, row, columns).map(|hot| hot.map_or(0, |class| class as u32 + 1))
                }
                _ => hot(&table, row, columns).and_then(|hot| {
                    hot.map(|class| class as u32).ok_or_else(|| {
                        table.error(row, "no class has a 1, expected one of the columns to")
                    })
                }),
            };
            let patient = table.optional(row, "patient_id");
            match label.and_then(|label| self.item(&table, row, table.cell(row, id), label)) {
                Ok(item) => self.items.push(Item {
                    official,
                    group: item.group.clone().or(patient),
                    ..item
                }),
                Err(error) => problems.report(error)?,
            }
        }
        Ok(())
    }

    /// Adds the items of HAM10000's metadata table, whose `dx` is the class in small letters.
    fn read_ham10000(&mut self, problems: &mut Problems) -> Result<()> {
        let Some(path) = ham_metadata(self.root) else { return Ok(()) };
        let table = Table::read(&path, &["lesion_id", "image_id", "dx"])?;
        for row in 0..table.len() {
            let diagnosis = table.cell(row, "dx");
            let class = CLASSES_2018.iter().position(|class| class.eq_ignore_ascii_case(diagnosis));
            let label = class.map(|class| class as u32).ok_or_else(|| {
                let known = CLASSES_2018.join(", ").to_lowercase();
                table.error(
                    row,
                    format!("unknown diagnosis dx = {diagnosis:?}, expected one of {known}"),
                )
            });
            match label.and_then(|label| self.item(&table, row, table.cell(row, "image_id"), label))
            {
                Ok(item) => self.items.push(item),
                Err(error) => problems.report(error)?,
            }
        }
        Ok(())
    }

    /// The item of image `id`, whose picture must be there.
    fn item(&self, table: &Table, row: usize, id: &str, label: u32) -> Result<Item> {
        let Some(file) = self.pictures.get(id) else {
            let (root, name) = (self.root.display(), if id.is_empty() { "(blank)" } else { id });
            return Err(table.error(row, format!("no picture for the id {name}: {name}.jpg is nowhere below {root}. Fetch it, or leave it out with --skip-bad")));
        };
        let Extra { group, domain } = self.extra.get(id).cloned().unwrap_or_default();
        Ok(Item { id: id.to_string(), label, group, domain, official: None, file: file.clone() })
    }
}

/// The column of `columns` that holds a 1, `None` where all hold 0. Errors: `File` where a cell is neither or several are 1.
fn hot(table: &Table, row: usize, columns: &[&str]) -> Result<Option<usize>> {
    let mut found = None;
    for (index, column) in columns.iter().enumerate() {
        let cell = table.cell(row, column);
        match cell.parse::<f64>() {
            Ok(0.0) => {}
            Ok(1.0) if found.is_none() => found = Some(index),
            Ok(1.0) => return Err(table.error(row, "two classes have a 1, expected one at most")),
            _ => return Err(table.error(row, format!("{column} is {cell:?}, expected 0 or 1"))),
        }
    }
    Ok(found)
}
