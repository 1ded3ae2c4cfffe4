//! Data sets on a disk: the real ones in `../shared/data` (or `$ATTN2D_DATA`), where they are there.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use attn2d::data::{
    self, Augment, Dataset, Format, Loader, LoaderOptions, Options, Split, SplitOptions, Transform,
};

/// A data set of the shared folder, or `None` with a line that says which path was missed.
fn real(name: &str) -> Option<PathBuf> {
    let shared = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
    let path = std::env::var_os("ATTN2D_DATA").map_or_else(shared, PathBuf::from).join(name);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: no data at {}", path.display());
    None
}

fn open(path: &PathBuf) -> Dataset {
    data::open(path, &Options::default()).unwrap()
}

fn sizes(split: &Split) -> [usize; 5] {
    [&split.train, &split.val, &split.test, &split.id_test]
        .map(Vec::len)
        .into_iter()
        .chain([split.dropped.len()])
        .collect::<Vec<_>>()
        .try_into()
        .unwrap()
}

/// Every item is in exactly one part or dropped.
fn assert_partition(set: &Dataset, split: &Split) {
    let all = [&split.train, &split.val, &split.test, &split.id_test].into_iter().flatten();
    let mut all: Vec<usize> =
        all.copied().chain(split.dropped.iter().map(|dropped| dropped.index)).collect();
    all.sort_unstable();
    assert_eq!(all, (0..set.len()).collect::<Vec<_>>());
}

#[test]
fn isic2017_in_the_challenge_layout() {
    let Some(path) = real("isic2017") else { return };
    let set = open(&path);
    assert_eq!(set.format, Format::Isic2017);
    assert_eq!(set.classes, ["nevus", "melanoma", "seborrheic_keratosis"]);
    assert_eq!(set.class_counts(0..set.len()), [1450, 404, 296]);
    let domains: BTreeSet<_> = set.items.iter().filter_map(|item| item.domain.as_deref()).collect();
    assert_eq!(domains.into_iter().collect::<Vec<_>>(), ["UDA-1", "other"]);
    let image = set.image(0).unwrap();
    assert_eq!((image.width, image.height, image.pixels.len()), (256, 256, 256 * 256 * 3));

    let split = data::split(&set, &SplitOptions::default()).unwrap();
    assert_partition(&set, &split);
    // The official validation part stays what it is; the test part comes out of the 2000 training pictures.
    assert!(split.val.len() >= 148, "{:?}", sizes(&split));
    assert!((290..=300).contains(&split.test.len()), "{:?}", sizes(&split));
    assert!(!split.dropped.is_empty(), "this release has byte-identical pictures");
    let shares = |indices: &[usize]| {
        let counts = set.class_counts(indices.iter().copied());
        counts.into_iter().map(|count| count as f64 / indices.len() as f64).collect::<Vec<_>>()
    };
    for (train, test) in shares(&split.train).into_iter().zip(shares(&split.test)) {
        assert!((train - test).abs() < 0.005, "stratified: {train} in train, {test} in test");
    }

    let away = SplitOptions { holdout_domain: Some("UDA-1".into()), ..SplitOptions::default() };
    let away = data::split(&set, &away).unwrap();
    let source = |index: &usize| set.items[*index].domain.as_deref() == Some("UDA-1");
    assert!(away.test.iter().all(source) && away.test.len() > 400);
    assert!(!away.train.iter().chain(&away.val).chain(&away.id_test).any(source));
    println!("{}", data::info(&set, &split).unwrap());
}

#[test]
fn pcam_as_on_kaggle() {
    let Some(path) = real("pcam_kaggle") else { return };
    let set = open(&path);
    assert_eq!((set.format, set.len()), (Format::PcamKaggle, 600));
    assert_eq!(set.class_counts(0..600), [300, 300]);
    assert_eq!((set.image(599).unwrap().width, set.image(599).unwrap().height), (96, 96));
    let split = data::split(&set, &SplitOptions::default()).unwrap();
    assert_partition(&set, &split);
    assert_eq!(set.class_counts(split.val.iter().copied()), [45, 45]);
    assert_eq!(set.class_counts(split.test.iter().copied()), [45, 45]);
    println!("{}", data::info(&set, &split).unwrap());
}

#[test]
fn pcam_in_its_own_hdf5_files() {
    let Some(path) = real("pcam_h5_sample") else { return };
    let set = open(&path);
    assert_eq!((set.format, set.len()), (Format::PcamH5, 32));
    assert_eq!(set.class_counts(0..32), [16, 16]);
    // The sample's pictures are also among the TIFF files: both readers must give the same pixels and labels.
    let Some(kaggle) = real("pcam_kaggle") else { return };
    let kaggle = open(&kaggle);
    let by_pixels: std::collections::HashMap<Vec<u8>, u32> = (0..kaggle.len())
        .map(|index| (kaggle.image(index).unwrap().pixels, kaggle.items[index].label))
        .collect();
    let known = (0..32).filter_map(|index| {
        by_pixels
            .get(&set.image(index).unwrap().pixels)
            .map(|label| *label == set.items[index].label)
    });
    let known: Vec<bool> = known.collect();
    println!("{} of 32 pictures are also in the Kaggle sample", known.len());
    assert!(known.iter().all(|same| *same));
}

#[test]
fn pneumoniamnist_npz() {
    let Some(path) = real("pneumoniamnist_reassembled.npz") else { return };
    let set = open(&path);
    assert_eq!((set.format, set.len()), (Format::MedMnist, 5856));
    assert_eq!(set.classes, ["normal", "pneumonia"]);
    let image = set.image(5855).unwrap();
    assert_eq!((image.width, image.height, image.pixels.len()), (28, 28, 28 * 28 * 3));
    let split = data::split(&set, &SplitOptions::default()).unwrap();
    assert_partition(&set, &split);
    assert_eq!(split.test.len(), 624, "official parts that judge stay whole");
    println!("{}", data::info(&set, &split).unwrap());
}

#[test]
fn tiny_labels_csv_and_image_folder() {
    let Some(path) = real("tiny") else { return };
    let set = open(&path);
    assert_eq!((set.format, set.len()), (Format::Csv, 50));
    let folders =
        data::open(&path, &Options { format: Some(Format::ImageFolder), ..Options::default() });
    assert_eq!(folders.unwrap().classes, ["isic2017", "pcam"]);
}

#[test]
fn loaders_give_the_same_bits_with_any_threads_and_caches() {
    let set = data::open("synthetic:dermoscopy", &Options::default()).unwrap();
    let set = Arc::new(set);
    let indices: Vec<usize> = (0..100).collect();
    let run = |threads: usize, cache_bytes: usize, epoch: u64, first: usize| {
        let options = LoaderOptions {
            batch_size: 16,
            shuffle: true,
            seed: 5,
            threads,
            cache_bytes,
            ..LoaderOptions::default()
        };
        let transform = Transform::train(32, &Augment::default());
        let loader = Loader::new(set.clone(), indices.clone(), transform, options).unwrap();
        // Twice, so that the second pass reads the cache.
        for _ in 0..2 {
            assert_eq!(loader.epoch(epoch, 0).unwrap().count(), 7);
        }
        loader.epoch(epoch, first).unwrap().collect::<attn2d::Result<Vec<_>>>().unwrap()
    };
    let all = run(1, 0, 3, 0);
    assert_eq!(all.len(), 7);
    assert_eq!(all[0].shape(), [16, 32, 32, 3]);
    assert_eq!(all[6].shape(), [4, 32, 32, 3]);
    assert_eq!(all, run(4, 1 << 30, 3, 0));
    assert_eq!(all, run(3, 60_000, 3, 0));
    assert_eq!(all[4..], run(2, 0, 3, 4), "an epoch can be entered in the middle");
    assert_ne!(all, run(1, 0, 4, 0), "another epoch, another order");
    let mut seen: Vec<usize> = all.iter().flat_map(|batch| batch.indices.clone()).collect();
    seen.sort_unstable();
    assert_eq!(seen, indices);
}
