//! Pictures of your own: a folder for each class, or a `labels.csv`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::files::{Problems, Table, file_dataset, is_picture, list, pictures_below};
use super::{Dataset, Format, Item, Part};
use crate::{Error, Result};

/// The folder names understood as parts.
fn part_of(name: &str) -> Option<Part> {
    match name {
        "train" | "training" => Some(Part::Train),
        "val" | "valid" | "validation" => Some(Part::Val),
        "test" => Some(Part::Test),
        _ => None,
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn folders(root: &Path) -> Result<Vec<PathBuf>> {
    Ok(list(root)?
        .into_iter()
        .filter(|path| path.is_dir() && !file_name(path).starts_with('.'))
        .collect())
}

/// Whether `root` has class folders with pictures, directly or inside `train`.
pub(super) fn detect(root: &Path) -> bool {
    let has_picture = |folder: &PathBuf| {
        list(folder).is_ok_and(|paths| paths.iter().any(|path| is_picture(path)))
    };
    let has_classes =
        |root: &Path| folders(root).is_ok_and(|folders| folders.iter().any(has_picture));
    root.is_dir()
        && (has_classes(root)
            || folders(root).is_ok_and(|parts| parts.iter().any(|part| has_classes(part))))
}

/// `root/{train,val,test}/<class>/*` or `root/<class>/*`. Classes are the folders' names in alphabetical order; ids are paths below `root`.
pub(super) fn open(root: &Path) -> Result<Dataset> {
    if !root.is_dir() {
        return Err(Error::file(
            root,
            "not a folder; expected a folder with a folder for each class in it",
        ));
    }
    let parts: Vec<(PathBuf, Option<Part>)> = folders(root)?
        .into_iter()
        .filter_map(|path| part_of(&file_name(&path)).map(|part| (path, Some(part))))
        .collect();
    let has_train = parts.iter().any(|(_, part)| *part == Some(Part::Train));
    let parts = if has_train { parts } else { vec![(root.to_path_buf(), None)] };
    let mut found = Vec::new();
    for (folder, part) in &parts {
        for class in folders(folder)? {
            found.extend(
                pictures_below(&class, 3)?.into_iter().map(|path| (path, file_name(&class), *part)),
            );
        }
    }
    let classes: Vec<String> = found
        .iter()
        .map(|(_, class, _)| class.clone())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    if classes.len() < 2 {
        let found = classes.join(", ");
        return Err(Error::file(
            root,
            format!(
                "expected at least two class folders with pictures (png, jpg, tif, bmp), found [{found}]"
            ),
        ));
    }
    let item = |(path, class, official): (PathBuf, String, Option<Part>)| Item {
        id: id_of(root, &path),
        label: classes.binary_search(&class).unwrap_or_default() as u32,
        group: None,
        domain: None,
        official,
        file: path.into(),
    };
    let items = found.into_iter().map(item).collect();
    Ok(file_dataset(Format::ImageFolder, root, &classes, items, &[]))
}

/// The path below `root`, with `/` on every system, so that split files can travel.
fn id_of(root: &Path, path: &Path) -> String {
    let below = path.strip_prefix(root).unwrap_or(path);
    below.components().map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/")
}

/// `labels.csv` with the columns `path,label` and optionally `split`, `group`, `domain`; paths are relative to its folder, labels are names.
pub(super) fn open_csv(root: &Path, problems: &mut Problems) -> Result<Dataset> {
    let csv = if root.is_file() { root.to_path_buf() } else { root.join("labels.csv") };
    let root = csv.parent().unwrap_or(Path::new("")).to_path_buf();
    let table = Table::read(&csv, &["path", "label"])?;
    let names: BTreeSet<&str> = (0..table.len())
        .map(|row| table.cell(row, "label"))
        .filter(|name| !name.is_empty())
        .collect();
    let classes: Vec<&str> = names.into_iter().collect();
    let mut items = Vec::with_capacity(table.len());
    for row in 0..table.len() {
        match csv_item(&root, &table, row, &classes) {
            Ok(item) => items.push(item),
            Err(error) => problems.report(error)?,
        }
    }
    Ok(file_dataset(Format::Csv, &root, &classes, items, &[]))
}

fn csv_item(root: &Path, table: &Table, row: usize, classes: &[&str]) -> Result<Item> {
    let (id, label) = (table.cell(row, "path"), table.cell(row, "label"));
    let Ok(class) = classes.binary_search(&label) else {
        return Err(table
            .error(row, format!("{id} has no label; expected a class name in the column label")));
    };
    let file = root.join(id);
    if !file.is_file() {
        return Err(table.error(
            row,
            format!("no picture {}. Fetch it, or leave it out with --skip-bad", file.display()),
        ));
    }
    let split = table.cell(row, "split");
    let official = match split {
        "" => None,
        "id_test" => Some(Part::IdTest),
        name => Some(part_of(name).ok_or_else(|| {
            table.error(
                row,
                format!("split is {name:?}, expected train, val, test, id_test or nothing"),
            )
        })?),
    };
    let (group, domain) = (table.optional(row, "group"), table.optional(row, "domain"));
    Ok(Item { id: id.to_string(), label: class as u32, group, domain, official, file: file.into() })
}
