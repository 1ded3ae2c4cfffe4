//! From the `[data]` section of a config to loaders: opens the data set, splits it, counts class weights.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use crate::config::{ClassWeights, Config, Normalize, Policy};
use crate::data::{self, Dataset, Loader, LoaderOptions, Part, Split, SplitOptions, Transform};
use crate::{Error, Result};

/// The images of a run.
pub struct Images {
    /// The data set.
    pub dataset: Arc<Dataset>,
    /// Which items train, validate and test.
    pub split: Split,
    /// Mean and standard deviation that pixels are normalised with, by channel.
    pub normalize: ([f32; 3], [f32; 3]),
}

/// Opens the data set of a config, without splitting it.
pub fn open(config: &Config) -> Result<Dataset> {
    open_some(config, None)
}

/// Opens the data set of a config with only these ids open, where not all are.
fn open_some(config: &Config, readable: Option<HashSet<String>>) -> Result<Dataset> {
    let format = match config.data.format.as_str() {
        "auto" => None,
        name => Some(data::Format::parse(name)?),
    };
    let options = data::Options {
        format,
        skip_bad: config.data.skip_bad,
        readable,
        synthetic_size: config.data.synthetic_size,
        synthetic_count: config.data.synthetic_count,
        synthetic_seed: config.data.synthetic_seed,
    };
    data::open(&config.data.path, &options)
}

/// Splits a data set as a config says.
pub fn split(config: &Config, dataset: &Dataset) -> Result<Split> {
    let domain = &config.data.holdout_domain;
    let options = SplitOptions {
        seed: config.data.split_seed,
        val: config.data.val_fraction,
        test: config.data.test_fraction,
        official: config.data.official_split,
        dedup: config.data.dedup,
        holdout_domain: (!domain.is_empty()).then(|| domain.clone()),
    };
    data::split(dataset, &options)
}

impl Images {
    /// Opens the data of a new run, and splits them or takes `data.split_file`.
    ///
    /// Errors: `Usage` where the test is to be sealed and something else in the config would read it; those of opening and splitting.
    pub fn new(config: &Config) -> Result<Self> {
        let data = &config.data;
        if !data.split_file.is_empty() {
            return Self::with_split_file(config, Path::new(&data.split_file));
        }
        if data.seal_test && (data.dedup || data.skip_bad) {
            return Err(Error::usage(
                "config: data.seal_test = true, but without data.split_file a split is made anew, for which data.dedup and data.skip_bad \
                 read every picture, also those of the test; give a split.csv as data.split_file, or set both to false",
            ));
        }
        let dataset = open(config)?;
        let split = split(config, &dataset)?;
        Self::with_split(config, dataset, split)
    }

    /// Opens the data with the split in `file`: a run's `split.csv`.
    pub fn with_split_file(config: &Config, file: &Path) -> Result<Self> {
        let readable = config.data.seal_test.then(|| Split::learnt_from_ids(file)).transpose()?;
        let dataset = open_some(config, readable)?;
        let split = Split::read(&dataset, file)?;
        Self::with_split(config, dataset, split)
    }

    fn with_split(config: &Config, mut dataset: Dataset, split: Split) -> Result<Self> {
        if config.data.seal_test {
            dataset.seal_all_but(&split.learnt_from());
        }
        let normalize = match config.data.normalize {
            Normalize::Imagenet => (data::IMAGENET_MEAN, data::IMAGENET_STD),
            Normalize::None => ([0.0; 3], [1.0; 3]),
            Normalize::Data => data::statistics(&dataset, &split.train)?,
        };
        Ok(Self { dataset: Arc::new(dataset), split, normalize })
    }

    /// Batches of the training part, shuffled and augmented. A last batch that is not full is left out (batch norm does
    /// not like it) unless it is the only one.
    pub fn train_loader(&self, config: &Config) -> Result<Loader> {
        let augment = match config.augment.policy {
            Policy::Auto => self.dataset.augment.clone(),
            Policy::Flips => data::Augment::flips(),
            Policy::None => data::Augment::none(),
            Policy::Custom => config.augment.custom.clone(),
        };
        let (mean, std) = self.normalize;
        let transform = Transform { mean, std, ..Transform::train(config.data.img_size, &augment) };
        let items = self.split.train.clone();
        let options = LoaderOptions {
            shuffle: true,
            drop_last: items.len() >= config.train.batch_size,
            ..loader_options(config)
        };
        Loader::new(Arc::clone(&self.dataset), items, transform, options)
    }

    /// Batches of a part as evaluation sees it, in the order of the data set; `None` for an empty part.
    pub fn eval_loader(&self, config: &Config, part: Part) -> Result<Option<Loader>> {
        let items = self.split.part(part);
        if items.is_empty() { Ok(None) } else { self.loader_of(config, items.to_vec()).map(Some) }
    }

    /// Batches of any items as evaluation sees them.
    pub fn loader_of(&self, config: &Config, items: Vec<usize>) -> Result<Loader> {
        eval_loader(config, &self.dataset, items, self.normalize)
    }

    /// The weight of each class in the loss, or `None` for equal ones.
    pub fn class_weights(&self, config: &Config) -> Option<Vec<f32>> {
        match config.data.class_weights {
            ClassWeights::None => None,
            ClassWeights::Balanced => {
                let counts = self.dataset.class_counts(self.split.train.iter().copied());
                Some(balanced(&counts))
            }
        }
    }

    /// "840 train, 180 val, 180 test", with what was left out.
    pub fn describe(&self) -> String {
        let parts = Part::ALL.iter().map(|part| (self.split.part(*part).len(), part.name()));
        let mut words: Vec<String> =
            parts.filter(|(n, _)| *n > 0).map(|(n, name)| format!("{n} {name}")).collect();
        if !self.split.dropped.is_empty() {
            words
                .push(format!("{} left out (duplicates; see split.csv)", self.split.dropped.len()));
        }
        if !self.dataset.skipped.is_empty() {
            words.push(format!("{} skipped as unreadable", self.dataset.skipped.len()));
        }
        words.join(", ")
    }
}

/// Batches of items as evaluation sees them.
pub fn eval_loader(
    config: &Config,
    dataset: &Arc<Dataset>,
    items: Vec<usize>,
    (mean, std): ([f32; 3], [f32; 3]),
) -> Result<Loader> {
    let transform = Transform { mean, std, ..Transform::eval(config.data.img_size) };
    Loader::new(Arc::clone(dataset), items, transform, loader_options(config))
}

fn loader_options(config: &Config) -> LoaderOptions {
    LoaderOptions {
        batch_size: config.train.batch_size,
        seed: config.train.seed,
        threads: config.data.workers,
        cache_bytes: config.data.cache_mib << 20,
        ..LoaderOptions::default()
    }
}

/// `images / (classes * images of the class)`, so that every class has the same share of the loss; 0 for a class that
/// has no image.
fn balanced(counts: &[usize]) -> Vec<f32> {
    let all: usize = counts.iter().sum();
    let weight = |&n: &usize| if n == 0 { 0.0 } else { all as f32 / (counts.len() * n) as f32 };
    counts.iter().map(weight).collect()
}

/// Checks that a model can tell this data set's classes: at least two, and as many as asked for.
pub fn num_classes(config: &Config, dataset: &Dataset) -> Result<usize> {
    let found = dataset.classes.len();
    if found < 2 {
        return Err(Error::usage(format!(
            "{}: only one class ({}); there is nothing to tell apart",
            dataset.name,
            dataset.classes.join(", ")
        )));
    }
    match config.model.num_classes {
        0 => Ok(found),
        asked if asked == found => Ok(found),
        asked => Err(Error::usage(format!(
            "model.num_classes = {asked}, but {} has {found} classes ({}); leave it at 0",
            dataset.name,
            dataset.classes.join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balanced_weights_by_hand() {
        assert_eq!(balanced(&[1, 3]), [2.0, 2.0 / 3.0]);
        assert_eq!(balanced(&[2, 2, 0]), [2.0 / 3.0, 2.0 / 3.0, 0.0]);
    }

    #[test]
    fn parts_of_the_built_in_data() {
        let mut config = Config::default();
        config.data.synthetic_count = 60;
        config.data.class_weights = ClassWeights::Balanced;
        let images = Images::new(&config).expect("built-in data");
        let total: usize = Part::ALL.iter().map(|p| images.split.part(*p).len()).sum();
        assert_eq!(total + images.split.dropped.len(), 60);
        assert!(images.describe().contains(" train, "), "{}", images.describe());
        let loader = images.train_loader(&config).expect("a loader");
        assert_eq!(loader.batches(), images.split.train.len() / 32);
        let weights = images.class_weights(&config).expect("balanced");
        assert_eq!(weights.len(), images.dataset.classes.len());
        config.model.num_classes = 17;
        let error = num_classes(&config, &images.dataset).expect_err("not 17 classes");
        assert!(error.to_string().contains("model.num_classes = 17"), "{error}");
    }
}
