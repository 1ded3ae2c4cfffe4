//! Camelyon17-WILDS: 96x96 patches of lymph-node tissue from five hospitals, for learning in some and testing in another.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::files::{Problems, Table, file_dataset, list};
use super::{Dataset, Format, Item, Part};
use crate::Result;

const CLASSES: [&str; 2] = ["normal", "tumour"];
const NOTES: [&str; 2] = [
    "Camelyon17-WILDS: CC0. Cite Bandi et al. 2019 and Koh et al. 2021 (arXiv 2012.07421). Research only, not for diagnosis.",
    "Official parts: train = hospitals 0, 3, 4; id_test = WILDS' id_val (same hospitals); val = hospital 1; test = hospital 2.",
];

/// The folder with `metadata.csv`: `path` itself, or the folder in it that the archive unpacks to.
fn folder(path: &Path) -> PathBuf {
    let inner = path.join("camelyon17_v1.0");
    if inner.is_dir() { inner } else { path.to_path_buf() }
}

pub(super) fn detect(path: &Path) -> bool {
    let folder = folder(path);
    folder.join("metadata.csv").is_file() && folder.join("patches").is_dir()
}

/// Reads `metadata.csv` (`,patient,node,x_coord,y_coord,tumor,slide,center,split`).
pub(super) fn open(path: &Path, problems: &mut Problems) -> Result<Dataset> {
    let root = folder(path);
    let csv = root.join("metadata.csv");
    let table =
        Table::read(&csv, &["patient", "node", "x_coord", "y_coord", "tumor", "center", "split"])?;
    let mut listing = Listing::default();
    let mut items = Vec::with_capacity(table.len());
    for row in 0..table.len() {
        match item(&root, &table, row, &mut listing) {
            Ok(item) => items.push(item),
            Err(error) => problems.report(error)?,
        }
    }
    Ok(file_dataset(Format::Camelyon17, &root, &CLASSES, items, &NOTES))
}

fn item(root: &Path, table: &Table, row: usize, listing: &mut Listing) -> Result<Item> {
    let cell = |column| table.cell(row, column);
    let label = match cell("tumor") {
        "0" => 0,
        "1" => 1,
        other => return Err(table.error(row, format!("tumor is {other:?}, expected 0 or 1"))),
    };
    // The hospitals held out override the column `split`, which only tells training from in-distribution validation.
    let official = match (cell("center"), cell("split")) {
        ("1", _) => Part::Val,
        ("2", _) => Part::Test,
        ("0" | "3" | "4", "0") => Part::Train,
        ("0" | "3" | "4", "1") => Part::IdTest,
        (center, split) => return Err(table.error(
            row,
            format!(
                "center {center:?} with split {split:?}, expected center 0 to 4 and split 0 or 1"
            ),
        )),
    };
    // The patient is a zero-padded text ("004"), also in file names.
    let (patient, node) = (cell("patient"), cell("node"));
    let place = format!("patient_{patient}_node_{node}");
    let id = format!("{place}_x_{}_y_{}", cell("x_coord"), cell("y_coord"));
    let file = root.join("patches").join(&place).join(format!("patch_{id}.png"));
    if !listing.has(&file) {
        return Err(table.error(
            row,
            format!("no picture {}. Fetch it, or leave it out with --skip-bad", file.display()),
        ));
    }
    let (group, domain) = (
        Some(format!("patient_{patient}").into()),
        Some(format!("center_{}", cell("center")).into()),
    );
    Ok(Item { id, label, group, domain, official: Some(official), file: file.into() })
}

/// Which files are there, one listing a folder instead of one question a file: there are 455,954 of them.
#[derive(Default)]
struct Listing(HashMap<PathBuf, HashSet<OsString>>);

impl Listing {
    fn has(&mut self, file: &Path) -> bool {
        let (Some(folder), Some(name)) = (file.parent(), file.file_name()) else { return false };
        if !self.0.contains_key(folder) {
            let names = list(folder)
                .unwrap_or_default()
                .iter()
                .filter_map(|path| path.file_name().map(OsString::from))
                .collect();
            self.0.insert(folder.to_path_buf(), names);
        }
        self.0.get(folder).is_some_and(|names| names.contains(name))
    }
}
