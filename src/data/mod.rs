//! Pictures with labels: readers for the data sets people have, splits that do not leak, augmentation and a threaded loader.
//!
//! ```no_run
//! use std::sync::Arc;
//! use attn2d::data::{self, Loader, LoaderOptions, Options, SplitOptions, Transform};
//!
//! # fn main() -> attn2d::Result<()> {
//! let dataset = Arc::new(data::open("synthetic:dermoscopy", &Options::default())?);
//! let split = data::split(&dataset, &SplitOptions::default())?;
//! let transform = Transform::train(64, &dataset.augment);
//! let loader = Loader::new(dataset, split.train, transform, LoaderOptions { shuffle: true, ..Default::default() })?;
//! for batch in loader.epoch(0, 0)? {
//!     let batch = batch?; // batch.images is [n, 64, 64, 3] in f32, batch.labels has n class numbers
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A [`Dataset`] is plain data (classes, one [`Item`] per picture) and one closure that decodes picture `i`; a reader is a function that
//! makes one from a path. Adding a format is a file with such a function and a line in [`Format`] and [`open`].
//! `docs/data.md` says where to get each data set and how it must lie on the disk.

mod camelyon17;
mod files;
mod image_folder;
mod info;
mod isic;
mod loader;
mod medmnist;
mod pcam;
mod random;
mod resize;
mod split;
mod synthetic;
mod transform;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use info::{info, statistics};
pub use loader::{Batch, Batches, Loader, LoaderOptions};
pub use random::Draws;
pub use split::{Dropped, Split, SplitOptions, split};
pub use transform::{Augment, IMAGENET_MEAN, IMAGENET_STD, Transform};

use crate::{Error, Result};

/// A decoded picture: RGB, one byte a channel, rows from the top, `[height, width, 3]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub pixels: Vec<u8>,
}

/// A part of a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Weights are fitted on it.
    Train,
    /// Models and epochs are chosen on it.
    Val,
    /// Looked at once, at the end. Where a domain is held out (another hospital, another source), it is that domain.
    Test,
    /// A test from the same sources as `Train`, beside a `Test` from another one. Most data sets have none.
    IdTest,
}

impl Part {
    /// All parts, in the order in which they are printed.
    pub const ALL: [Part; 4] = [Part::Train, Part::Val, Part::Test, Part::IdTest];

    /// `train`, `val`, `test`, `id_test`.
    pub fn name(self) -> &'static str {
        match self {
            Part::Train => "train",
            Part::Val => "val",
            Part::Test => "test",
            Part::IdTest => "id_test",
        }
    }
}

/// One picture of a data set, without its pixels.
#[derive(Debug, Clone)]
pub struct Item {
    /// Its name, unique in the data set: an image id, a relative path, or `train/17` in an array file.
    pub id: String,
    /// Its class, an index into [`Dataset::classes`].
    pub label: u32,
    /// Pictures of one group (patient, lesion, slide) never go to different parts of a split.
    pub group: Option<Arc<str>>,
    /// Where it comes from (hospital, camera, archive), for tests outside the training distribution.
    pub domain: Option<Arc<str>>,
    /// The part the publishers put it in.
    pub official: Option<Part>,
    /// The file that holds its pixels; the file's name appears in messages.
    pub file: Arc<Path>,
}

/// The function behind [`Dataset::image`]: decodes picture `i`, `i < items.len()`.
pub type Decode = Box<dyn Fn(usize) -> Result<Image> + Send + Sync>;

/// A set of labelled pictures.
pub struct Dataset {
    /// What it is called in messages, a data set's or a folder's name.
    pub name: String,
    /// How it is stored.
    pub format: Format,
    /// Where it was read from; empty for built-in data.
    pub root: PathBuf,
    /// Class names; a label is an index into them.
    pub classes: Vec<String>,
    /// One entry a picture.
    pub items: Vec<Item>,
    /// The augmentation that keeps this data set's labels true (the default for training).
    pub augment: Augment,
    /// What its users should know: licence, caveats. Printed by [`info`].
    pub notes: Vec<String>,
    /// What was wrong with entries that [`Options::skip_bad`] left out, a line each.
    pub skipped: Vec<String>,
    decode: Decode,
    /// By item, whether nobody may read its pixels; empty where all may be read.
    sealed: Vec<bool>,
}

impl std::fmt::Debug for Dataset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, format, root, classes, items, .. } = self;
        write!(
            f,
            "Dataset {{ {name}, {format:?}, {}, {} classes, {} items }}",
            root.display(),
            classes.len(),
            items.len()
        )
    }
}

impl Dataset {
    /// A data set of your own: classes, items, and a function that decodes item `i`. Labels must be below `classes.len()` and ids unique;
    /// errors: `Usage`.
    pub fn new(
        name: impl Into<String>,
        classes: Vec<String>,
        items: Vec<Item>,
        decode: Decode,
    ) -> Result<Self> {
        let dataset = Self {
            name: name.into(),
            format: Format::Custom,
            root: PathBuf::new(),
            classes,
            items,
            augment: Augment::default(),
            notes: Vec::new(),
            skipped: Vec::new(),
            decode,
            sealed: Vec::new(),
        };
        dataset.check()?;
        Ok(dataset)
    }

    /// The number of pictures.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there are no pictures. [`open`] never returns such a set.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Seals the pixels of all items but `readable`: from now on whatever would look at them ([`Dataset::image`], loaders, the search for
    /// duplicates) ends with an error instead, and their files are not opened. What is sealed stays so.
    pub fn seal_all_but(&mut self, readable: &[usize]) {
        let readable: HashSet<usize> = readable.iter().copied().collect();
        let sealed = |index| self.is_sealed(index) || !readable.contains(&index);
        self.sealed = (0..self.len()).map(sealed).collect();
    }

    /// Whether the pixels of item `index` may not be read.
    pub fn is_sealed(&self, index: usize) -> bool {
        self.sealed.get(index).is_some_and(|&sealed| sealed)
    }

    /// What everything asks that is about to read the pixels of item `index`. Errors: `Usage` where they are sealed.
    fn check_readable(&self, index: usize) -> Result<()> {
        if !self.is_sealed(index) {
            return Ok(());
        }
        Err(Error::usage(format!(
            "{}: {} is sealed and cannot be read; a run with data.seal_test = true reads its train and val parts only",
            self.name, self.items[index].id
        )))
    }

    /// Decodes picture `index`. Errors: `Usage` for an index outside or a sealed item, `File` or `Io` for a file that is missing or damaged.
    pub fn image(&self, index: usize) -> Result<Image> {
        if index >= self.items.len() {
            return Err(Error::usage(format!(
                "{}: there is no item {index}, the data set has {}",
                self.name,
                self.items.len()
            )));
        }
        self.check_readable(index)?;
        (self.decode)(index)
    }

    /// How messages name item `index`: its id, and its file where the id does not say it.
    pub fn describe(&self, index: usize) -> String {
        match self.items.get(index) {
            Some(item) => format!("{} ({})", item.id, item.file.display()),
            None => format!("item {index}"),
        }
    }

    /// How many items each class has among `indices`.
    pub fn class_counts(&self, indices: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let mut counts = vec![0; self.classes.len()];
        for index in indices {
            counts[self.items[index].label as usize] += 1;
        }
        counts
    }

    /// What every reader promises: at least one item, labels in range, ids unique.
    fn check(&self) -> Result<()> {
        if self.items.is_empty() {
            return Err(Error::usage(format!(
                "{}: no labelled pictures found in {}",
                self.name,
                self.root.display()
            )));
        }
        let mut ids = std::collections::HashSet::with_capacity(self.items.len());
        for item in &self.items {
            if item.label as usize >= self.classes.len() {
                let (label, classes) = (item.label, self.classes.len());
                return Err(Error::usage(format!(
                    "{}: item {} has label {label}, but there are {classes} classes",
                    self.name, item.id
                )));
            }
            if !ids.insert(item.id.as_str()) {
                return Err(Error::usage(format!(
                    "{}: two items have the id {}; ids must be unique",
                    self.name, item.id
                )));
            }
        }
        Ok(())
    }

    /// Decodes everything once that is not sealed, and leaves out what does not decode, with a line for each in `skipped`.
    fn drop_undecodable(self) -> Result<Self> {
        use rayon::prelude::*;
        let error_of = |index: usize| match self.is_sealed(index) {
            true => None,
            false => self.image(index).err().map(|error| error.to_string()),
        };
        let errors: Vec<Option<String>> = (0..self.len()).into_par_iter().map(error_of).collect();
        if errors.iter().all(Option::is_none) {
            return Ok(self);
        }
        let kept: Vec<usize> = (0..self.len()).filter(|&index| errors[index].is_none()).collect();
        let Self { items, decode, mut skipped, sealed, .. } = self;
        skipped.extend(errors.into_iter().flatten());
        let kept_items = kept.iter().map(|&index| items[index].clone()).collect();
        let kept_seals = kept.iter().filter_map(|&index| sealed.get(index).copied()).collect();
        let dataset = Self {
            items: kept_items,
            skipped,
            sealed: kept_seals,
            decode: Box::new(move |index| decode(kept[index])),
            ..self
        };
        dataset.check()?;
        Ok(dataset)
    }
}

/// How a data set is stored. The names are the values of `--data-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `isic2017`: the challenge's CSV files and picture folders.
    Isic2017,
    /// `isic2018`: task 3 of the challenge, or HAM10000.
    Isic2018,
    /// `isic2019`.
    Isic2019,
    /// `isic2020`.
    Isic2020,
    /// `pcam-kaggle`: PatchCamelyon as on Kaggle, `train_labels.csv` and `train/<id>.tif`.
    PcamKaggle,
    /// `pcam-h5`: PatchCamelyon's own HDF5 files.
    PcamH5,
    /// `camelyon17`: Camelyon17-WILDS.
    Camelyon17,
    /// `medmnist`: one `.npz` file.
    MedMnist,
    /// `csv`: `labels.csv` with `path,label` and optional `split,group,domain`.
    Csv,
    /// `imagefolder`: a folder for each class, perhaps inside `train`, `val`, `test`.
    ImageFolder,
    /// `synthetic`: generated, see [`open`].
    Synthetic,
    /// Made by [`Dataset::new`].
    Custom,
}

/// The formats that [`open`] reads from a disk, by name, in the order in which [`detect`] tries them.
const ON_DISK: [(&str, Format); 10] = [
    ("isic2017", Format::Isic2017),
    ("isic2018", Format::Isic2018),
    ("isic2019", Format::Isic2019),
    ("isic2020", Format::Isic2020),
    ("pcam-kaggle", Format::PcamKaggle),
    ("pcam-h5", Format::PcamH5),
    ("camelyon17", Format::Camelyon17),
    ("medmnist", Format::MedMnist),
    ("csv", Format::Csv),
    ("imagefolder", Format::ImageFolder),
];

impl Format {
    /// The format called `name`. Errors: `Usage` with the nearest name.
    pub fn parse(name: &str) -> Result<Self> {
        let known = || ON_DISK.iter().map(|(name, _)| *name);
        if let Some((_, format)) = ON_DISK.iter().find(|(known, _)| *known == name) {
            return Ok(*format);
        }
        let nearest = known()
            .max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)))
            .unwrap_or_default();
        let all = known().collect::<Vec<_>>().join(", ");
        Err(Error::usage(format!(
            "unknown data format {name:?}, did you mean {nearest:?}? Known: {all}"
        )))
    }

    /// Its name, as `--data-format` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Synthetic => "synthetic",
            Format::Custom => "custom",
            _ => ON_DISK
                .iter()
                .find(|(_, format)| *format == self)
                .map_or("custom", |(name, _)| name),
        }
    }
}

/// How to open a data set.
#[derive(Debug, Clone)]
pub struct Options {
    /// The format; `None` finds it out from the files.
    pub format: Option<Format>,
    /// Leave out entries that cannot be used (missing or damaged picture, bad label) instead of stopping at the first. Decodes every
    /// picture once, to know. What was left out is listed in [`Dataset::skipped`].
    pub skip_bad: bool,
    /// Ids of the items whose pixels may be read, where not all may: the others are sealed ([`Dataset::seal_all_but`]) before anything is
    /// decoded, also for `skip_bad`.
    pub readable: Option<HashSet<String>>,
    /// Built-in data: side of the pictures in pixels, at least 32.
    pub synthetic_size: usize,
    /// Built-in data: number of pictures.
    pub synthetic_count: usize,
    /// Built-in data: the seed of the pictures (not the training's seed: all runs see the same data set).
    pub synthetic_seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            format: None,
            skip_bad: false,
            readable: None,
            synthetic_size: 64,
            synthetic_count: 1200,
            synthetic_seed: 0,
        }
    }
}

/// Opens the data set at `spec`: a path, or `synthetic:dermoscopy` or `synthetic:longrange`. Reads labels, not pictures (arrays in
/// `.npz` files excepted, which are held in memory, but for parts that are sealed as a whole).
///
/// Errors: `Usage` where nothing is there, the format cannot be told or nothing in it can be used; `File` and `Io` name the file at fault.
pub fn open(spec: impl AsRef<Path>, options: &Options) -> Result<Dataset> {
    let mut dataset = read_labels(spec.as_ref(), options)?;
    if let Some(ids) = &options.readable {
        let may = |index: &usize| ids.contains(&dataset.items[*index].id);
        let readable: Vec<usize> = (0..dataset.len()).filter(may).collect();
        dataset.seal_all_but(&readable);
    }
    // Built-in pictures are drawn, and always can be.
    let skip_bad = options.skip_bad && dataset.format != Format::Synthetic;
    if skip_bad { dataset.drop_undecodable() } else { Ok(dataset) }
}

/// The data set at `spec`, before any picture of it is decoded.
fn read_labels(spec: &Path, options: &Options) -> Result<Dataset> {
    if let Some(name) = spec.to_str().and_then(|spec| spec.strip_prefix("synthetic:")) {
        return synthetic::open(name, options);
    }
    let format = match options.format {
        Some(format) => format,
        None => detect(spec)?,
    };
    exists(spec)?;
    let mut problems = files::Problems { skip: options.skip_bad, list: Vec::new() };
    let mut dataset = match format {
        Format::Isic2017 | Format::Isic2018 | Format::Isic2019 | Format::Isic2020 => {
            isic::open(spec, format, &mut problems)?
        }
        Format::PcamKaggle => pcam::open_kaggle(spec, &mut problems)?,
        Format::PcamH5 => pcam::open_h5(spec)?,
        Format::Camelyon17 => camelyon17::open(spec, &mut problems)?,
        Format::MedMnist => medmnist::open(spec, options.readable.as_ref())?,
        Format::Csv => image_folder::open_csv(spec, &mut problems)?,
        Format::ImageFolder => image_folder::open(spec)?,
        Format::Synthetic => {
            return Err(Error::usage(
                "built-in data has no path: say synthetic:dermoscopy or synthetic:longrange",
            ));
        }
        Format::Custom => {
            return Err(Error::usage(
                "a custom data set is made with Dataset::new, not opened from a path",
            ));
        }
    };
    dataset.skipped = problems.list;
    dataset.check()?;
    Ok(dataset)
}

/// The pictures at a path: a file itself, whatever it is called, or every file in a folder and those below it that is named like a
/// picture, sorted. Errors: `Usage` where nothing is there, `Io` for a folder that cannot be listed.
pub fn pictures(path: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    let path = path.as_ref();
    if path.is_dir() {
        return files::pictures_below(path, 32);
    }
    match path.exists() {
        true => Ok(vec![path.to_path_buf()]),
        false => Err(Error::usage(format!("{}: there is nothing at this path", path.display()))),
    }
}

/// Decodes a picture file. Errors: `File` or `Io` for one that is missing, damaged or no picture.
pub fn read_picture(path: impl AsRef<Path>) -> Result<Image> {
    files::decode_file(path.as_ref())
}

/// Finds out which format the data at `path` has. Errors: `Usage` where nothing is there or nothing fits, saying what was looked for.
pub fn detect(path: impl AsRef<Path>) -> Result<Format> {
    let path = path.as_ref();
    exists(path)?;
    let fits = |format: Format| match format {
        Format::Isic2017 | Format::Isic2018 | Format::Isic2019 | Format::Isic2020 => {
            isic::detect(path, format)
        }
        Format::PcamKaggle => pcam::detect_kaggle(path),
        Format::PcamH5 => pcam::detect_h5(path),
        Format::Camelyon17 => camelyon17::detect(path),
        Format::MedMnist => medmnist::detect(path),
        Format::Csv => path.join("labels.csv").is_file(),
        Format::ImageFolder => image_folder::detect(path),
        Format::Synthetic | Format::Custom => false,
    };
    match ON_DISK.iter().find(|(_, format)| fits(*format)) {
        Some((_, format)) => Ok(*format),
        None => Err(Error::usage(format!(
            "{}: cannot tell what kind of data this is. Looked for: an ISIC ground-truth CSV, train_labels.csv with train/, \
             camelyonpatch_*_x.h5, metadata.csv with patches/, a .npz file, labels.csv (path,label), or folders of pictures named by class. \
             docs/data.md shows each layout; --data-format forces one",
            path.display()
        ))),
    }
}

fn exists(path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{}: there is nothing at this path; give a data set's folder or file, or synthetic:dermoscopy",
        path.display()
    )))
}
