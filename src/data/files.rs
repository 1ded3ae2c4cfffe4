//! What the readers share: decoding a picture file, reading a CSV table, listing folders, and what to do about bad entries.

use std::collections::HashMap;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Augment, Dataset, Decode, Format, Image, Item};
use crate::{Error, Result};

/// Bad entries: either the first one stops the reader, or they are left out and listed.
pub(super) struct Problems {
    pub(super) skip: bool,
    pub(super) list: Vec<String>,
}

impl Problems {
    /// Notes `error` and goes on, or hands it back.
    pub(super) fn report(&mut self, error: Error) -> Result<()> {
        if !self.skip {
            return Err(error);
        }
        self.list.push(error.to_string());
        Ok(())
    }
}

/// A data set whose items have a picture file each.
pub(super) fn file_dataset(
    format: Format,
    root: &Path,
    classes: &[impl AsRef<str>],
    items: Vec<Item>,
    notes: &[&str],
) -> Dataset {
    let paths: Vec<Arc<Path>> = items.iter().map(|item| item.file.clone()).collect();
    let decode: Decode = Box::new(move |index| decode_file(&paths[index]));
    dataset(format, root, classes, items, notes, decode)
}

/// A data set from its parts, named after its folder or file.
pub(super) fn dataset(
    format: Format,
    root: &Path,
    classes: &[impl AsRef<str>],
    items: Vec<Item>,
    notes: &[&str],
    decode: Decode,
) -> Dataset {
    let name = root
        .file_stem()
        .map_or_else(|| format.name().to_string(), |name| name.to_string_lossy().into_owned());
    Dataset {
        name,
        format,
        root: root.to_path_buf(),
        classes: classes.iter().map(|class| class.as_ref().to_string()).collect(),
        items,
        augment: Augment::default(),
        notes: notes.iter().map(|note| note.to_string()).collect(),
        skipped: Vec::new(),
        decode,
        sealed: Vec::new(),
    }
}

/// Decodes a picture file to RGB. Grey is repeated, 16 bits are cut to 8, an alpha channel is dropped, EXIF orientation is not applied.
pub(super) fn decode_file(path: &Path) -> Result<Image> {
    let bytes = fs::read(path).map_err(|source| Error::io(path, source))?;
    let damaged = |what: String| {
        Error::file(
            path,
            format!(
                "{what}; expected a whole PNG, JPEG, TIFF or BMP picture. Fetch the file again, or leave it out with --skip-bad"
            ),
        )
    };
    if bytes.is_empty() {
        return Err(damaged("the file is empty".into()));
    }
    if is_cut_jpeg(&bytes) {
        return Err(damaged("the JPEG is truncated (no end marker after its last scan)".into()));
    }
    // Decoders are fed files from anywhere: should one panic on a malformed file, that is this file's error, not the program's end.
    let decoded = std::panic::catch_unwind(|| {
        let reader = image::ImageReader::new(Cursor::new(&bytes))
            .with_guessed_format()
            .map_err(image::ImageError::IoError)?;
        reader.decode()
    });
    let picture = match decoded {
        Ok(Ok(picture)) => picture.into_rgb8(),
        Ok(Err(error)) => return Err(damaged(format!("the picture cannot be decoded ({error})"))),
        Err(_) => {
            return Err(damaged("the picture cannot be decoded (the decoder gave up)".into()));
        }
    };
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    if width == 0 || height == 0 {
        return Err(damaged("the picture has no pixels".into()));
    }
    Ok(Image { width, height, pixels: picture.into_raw() })
}

/// Whether `bytes` is a JPEG without an end marker after its last start of scan. The decoder fills what is missing with grey and says
/// nothing. Compressed data cannot contain either marker: a 0xff in it is followed by 0x00 or a restart marker.
fn is_cut_jpeg(bytes: &[u8]) -> bool {
    if !bytes.starts_with(&[0xff, 0xd8]) {
        return false;
    }
    for pair in bytes.windows(2).rev() {
        match pair {
            [0xff, 0xd9] => return false,
            [0xff, 0xda] => return true,
            _ => {}
        }
    }
    true
}

/// A CSV file in memory, its cells reached by column name.
pub(super) struct Table {
    path: PathBuf,
    columns: Vec<String>,
    rows: Vec<csv::StringRecord>,
}

impl Table {
    /// Reads `path`, which must have the columns `required`. Errors: `Io`; `File` for a missing column or a row of another length.
    pub(super) fn read(path: &Path, required: &[&str]) -> Result<Self> {
        let bytes = fs::read(path).map_err(|source| Error::io(path, source))?;
        // Spreadsheets put a byte order mark before the first column's name.
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        let wrong = |error: csv::Error| Error::file(path, format!("not a CSV table: {error}"));
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(bytes);
        let columns: Vec<String> =
            reader.headers().map_err(wrong)?.iter().map(String::from).collect();
        for name in required {
            if !columns.iter().any(|column| column == name) {
                let found = columns.join(",");
                return Err(Error::file(
                    path,
                    format!("no column {name:?}; expected {}, found {found}", required.join(",")),
                ));
            }
        }
        let rows = reader.records().collect::<Result<Vec<_>, _>>().map_err(wrong)?;
        Ok(Self { path: path.to_path_buf(), columns, rows })
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The cell of `row` in `column`, trimmed; empty where the table has no such column.
    pub(super) fn cell(&self, row: usize, column: &str) -> &str {
        let index = self.columns.iter().position(|name| name == column);
        index.and_then(|index| self.rows[row].get(index)).unwrap_or("")
    }

    /// A cell as shared text, `None` where it is blank or says that it is not known.
    pub(super) fn optional(&self, row: usize, column: &str) -> Option<Arc<str>> {
        let cell = self.cell(row, column);
        (!matches!(cell, "" | "unknown" | "NA" | "nan")).then(|| cell.into())
    }

    /// An error about `row` that names the file and the line.
    pub(super) fn error(&self, row: usize, message: impl std::fmt::Display) -> Error {
        let line = self.rows[row].position().map_or(row as u64 + 2, csv::Position::line);
        Error::file(&self.path, format!("line {line}: {message}"))
    }
}

const EXTENSIONS: [&str; 6] = ["png", "jpg", "jpeg", "tif", "tiff", "bmp"];

/// Whether `path` is named like a picture that [`decode_file`] reads.
pub(super) fn is_picture(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or("");
    // Names that start with a dot are what some systems leave beside copied files.
    let hidden =
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with('.'));
    !hidden && EXTENSIONS.iter().any(|known| known.eq_ignore_ascii_case(extension))
}

/// The entries of a folder, sorted by name: what a program does must not depend on the order in which a file system lists things.
pub(super) fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|source| Error::io(folder, source))?;
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}

/// All pictures in `folder` and up to `depth` levels of folders below it, sorted by path.
pub(super) fn pictures_below(folder: &Path, depth: usize) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in list(folder)? {
        if is_picture(&path) {
            found.push(path);
        } else if depth > 0 && path.is_dir() {
            found.extend(pictures_below(&path, depth - 1)?);
        }
    }
    Ok(found)
}

/// Pictures below `folder` by file name without extension. Of two with one name the first by path is taken.
pub(super) fn pictures_by_stem(folder: &Path) -> Result<HashMap<String, Arc<Path>>> {
    let mut by_stem = HashMap::new();
    for path in pictures_below(folder, 3)? {
        if let Some(stem) = path.file_stem().and_then(|stem| stem.to_str()) {
            by_stem.entry(stem.to_string()).or_insert_with(|| path.as_path().into());
        }
    }
    Ok(by_stem)
}
