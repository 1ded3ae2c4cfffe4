//! Data sets made up on the spot: every layout that is read, and everything that can be wrong with one. A wrong file must end in
//! one message that names it and says what was expected, never in a panic.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use attn2d::data::{
    self, Augment, Dataset, Format, Image, Item, Loader, LoaderOptions, Options, Part, Split,
    SplitOptions, Transform,
};
use tempfile::TempDir;

mod npz;
mod splits;

/// Writes `text` to `root/name`, with the folders on the way.
fn write(root: &Path, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, text).unwrap();
    path
}

/// Writes a picture that differs for every `number`; the format follows the name.
fn picture(root: &Path, name: &str, number: u32) -> PathBuf {
    let path = write(root, name, "");
    let pixel =
        |x: u32, y: u32| image::Rgb([(x * 5 + number) as u8, (y * 7) as u8, (number >> 8) as u8]);
    image::RgbImage::from_fn(20, 16, pixel).save(&path).unwrap();
    path
}

fn open(root: &Path) -> Dataset {
    data::open(root, &Options::default()).unwrap()
}

fn skip_bad() -> Options {
    Options { skip_bad: true, ..Options::default() }
}

fn refusal(root: &Path) -> String {
    data::open(root, &Options::default()).unwrap_err().to_string()
}

/// `message` must have all of `words`.
#[track_caller]
fn assert_says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is missing in: {message}");
    }
}

/// Folders of pictures for two classes, `count` each.
fn two_classes(root: &Path, count: u32) {
    for number in 0..count {
        picture(root, &format!("cat/{number}.png"), number);
        picture(root, &format!("dog/{number}.jpg"), 1000 + number);
    }
}

// ---- layouts -----------------------------------------------------------------------------------------------------------------------

#[test]
fn image_folders_with_and_without_parts() {
    let dir = TempDir::new().unwrap();
    for (class, part, name) in [
        ("a", "train", "x.png"),
        ("a", "val", "y.bmp"),
        ("b", "train", "x.tif"),
        ("b", "test", "z.JPG"),
    ] {
        picture(dir.path(), &format!("{part}/{class}/{name}"), 1);
    }
    write(dir.path(), "train/a/notes.txt", "not a picture");
    let set = open(dir.path());
    assert_eq!((set.format, set.len()), (Format::ImageFolder, 4));
    assert_eq!(set.classes, ["a", "b"]);
    let ids: Vec<&str> = set.items.iter().map(|item| item.id.as_str()).collect();
    assert_eq!(ids, ["test/b/z.JPG", "train/a/x.png", "train/b/x.tif", "val/a/y.bmp"]);
    assert_eq!(set.items[0].official, Some(Part::Test));
    for index in 0..4 {
        let image = set.image(index).unwrap();
        assert_eq!((image.width, image.height, image.pixels.len()), (20, 16, 960));
    }

    let bare = TempDir::new().unwrap();
    two_classes(bare.path(), 5);
    let set = open(bare.path());
    assert_eq!((set.len(), set.items[0].official), (10, None));
}

/// One-hot tables, lesions and patients of the later ISIC releases.
#[test]
fn isic_2018_to_2020_and_ham10000() {
    let dir = TempDir::new().unwrap();
    let head = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n";
    let rows = "ISIC_1,0.0,1.0,0,0,0,0,0\nISIC_2,1.0,0.0,0,0,0,0,0\n";
    write(
        dir.path(),
        "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv",
        format!("{head}{rows}"),
    );
    write(
        dir.path(),
        "HAM10000_metadata.csv",
        "lesion_id,image_id,dx\nHAM_7,ISIC_1,nv\nHAM_7,ISIC_2,mel\n",
    );
    picture(dir.path(), "ISIC2018_Task3_Training_Input/ISIC_1.jpg", 1);
    picture(dir.path(), "ISIC2018_Task3_Training_Input/ISIC_2.jpg", 2);
    let set = open(dir.path());
    assert_eq!((set.format, set.items[0].label, set.items[1].label), (Format::Isic2018, 1, 0));
    assert_eq!(
        (set.items[0].group.as_deref(), set.items[0].official),
        (Some("HAM_7"), Some(Part::Train))
    );

    let ham = TempDir::new().unwrap();
    write(
        ham.path(),
        "HAM10000_metadata.csv",
        "lesion_id,image_id,dx,dataset\nHAM_1,ISIC_1,vasc,rosendahl\n",
    );
    picture(ham.path(), "HAM10000_images_part_2/ISIC_1.jpg", 1);
    let set = open(ham.path());
    assert_eq!(
        (set.format, set.items[0].label, set.items[0].domain.as_deref()),
        (Format::Isic2018, 6, Some("rosendahl"))
    );

    let dir = TempDir::new().unwrap();
    write(
        dir.path(),
        "ISIC_2019_Training_GroundTruth.csv",
        "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\nISIC_3_downsampled,0,0,0,0,0,0,0,1,0\n",
    );
    write(
        dir.path(),
        "ISIC_2019_Training_Metadata.csv",
        "image,age_approx,anatom_site_general,lesion_id,sex\nISIC_3_downsampled,,,,\n",
    );
    picture(dir.path(), "ISIC_2019_Training_Input/ISIC_3_downsampled.jpg", 3);
    let set = open(dir.path());
    assert_eq!(
        (set.format, set.items[0].label, set.items[0].group.clone()),
        (Format::Isic2019, 7, None)
    );

    let rows = [
        "ISIC_1,30,,HAM_0000118,",
        "ISIC_2,,,BCN_0003884,male",
        "ISIC_4,,,MSK4_0011169,",
        "ISIC_5,,,,",
    ];
    let (mut truth, mut metadata) = (
        String::from("image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n"),
        String::from("image,age_approx,anatom_site_general,lesion_id,sex\n"),
    );
    for (number, row) in rows.into_iter().enumerate() {
        let id = row.split(',').next().unwrap();
        truth += &format!("{id},0,1,0,0,0,0,0,0,0\n");
        metadata += &format!("{row}\n");
        picture(dir.path(), &format!("ISIC_2019_Training_Input/{id}.jpg"), number as u32);
    }
    write(dir.path(), "ISIC_2019_Training_GroundTruth.csv", truth);
    write(dir.path(), "ISIC_2019_Training_Metadata.csv", metadata);
    let set = open(dir.path());
    let archives: Vec<_> = set.items.iter().map(|item| item.domain.as_deref()).collect();
    assert_eq!(archives, [Some("HAM"), Some("BCN"), Some("MSK"), None]);

    let dir = TempDir::new().unwrap();
    let head = "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target\n";
    write(
        dir.path(),
        "ISIC_2020_Training_GroundTruth.csv",
        format!("{head}ISIC_4,IP_9,male,45.0,torso,unknown,malignant,1\n"),
    );
    picture(dir.path(), "train/ISIC_4.jpg", 4);
    let set = open(dir.path());
    assert_eq!(
        (set.format, set.items[0].label, set.items[0].group.as_deref()),
        (Format::Isic2020, 1, Some("IP_9"))
    );
}

/// A Camelyon17-WILDS folder: six patients in five hospitals, four patches each.
fn camelyon(root: &Path) {
    let mut csv = String::from(",patient,node,x_coord,y_coord,tumor,slide,center,split\n");
    for (number, (patient, center)) in
        [("004", 0), ("017", 0), ("020", 1), ("040", 2), ("060", 3), ("088", 4)]
            .into_iter()
            .enumerate()
    {
        for patch in 0..4 {
            let (x, y, split) = (3328 + patch, 21792, u32::from(patch == 3));
            csv.push_str(&format!(
                "{number},{patient},4,{x},{y},{},{number},{center},{split}\n",
                patch % 2
            ));
            let place = format!("patient_{patient}_node_4");
            let path = picture(
                root,
                &format!("camelyon17_v1.0/patches/{place}/patch_{place}_x_{x}_y_{y}.png"),
                number as u32 * 10 + patch,
            );
            // The real patches carry an alpha channel.
            image::open(&path).unwrap().to_rgba8().save(&path).unwrap();
        }
    }
    write(root, "camelyon17_v1.0/metadata.csv", csv);
}

#[test]
fn camelyon17_holds_out_hospitals_and_keeps_patients_together() {
    let dir = TempDir::new().unwrap();
    camelyon(dir.path());
    let set = open(dir.path());
    assert_eq!((set.format, set.len()), (Format::Camelyon17, 24));
    assert_eq!(set.items[0].id, "patient_004_node_4_x_3328_y_21792");
    assert_eq!(set.image(0).unwrap().pixels.len(), 20 * 16 * 3);
    let split = data::split(&set, &SplitOptions::default()).unwrap();
    let centers = |indices: &[usize]| {
        indices
            .iter()
            .map(|&index| set.items[index].domain.clone().unwrap())
            .collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(
        (split.train.len(), split.id_test.len(), split.val.len(), split.test.len()),
        (12, 4, 4, 4)
    );
    assert_eq!(centers(&split.val).into_iter().collect::<Vec<_>>(), ["center_1".into()]);
    assert_eq!(centers(&split.test).into_iter().collect::<Vec<_>>(), ["center_2".into()]);

    let anew = data::split(
        &set,
        &SplitOptions { official: false, val: 0.2, test: 0.2, ..SplitOptions::default() },
    )
    .unwrap();
    let patients = |part: Part| {
        anew.part(part)
            .iter()
            .map(|&index| set.items[index].group.clone().unwrap())
            .collect::<std::collections::BTreeSet<_>>()
    };
    for (a, b) in [(Part::Train, Part::Val), (Part::Train, Part::Test), (Part::Val, Part::Test)] {
        assert!(patients(a).is_disjoint(&patients(b)), "{a:?} and {b:?} share a patient");
    }
    assert!(!anew.val.is_empty() && !anew.test.is_empty());
}

#[test]
fn labels_csv_with_parts_groups_and_domains() {
    let dir = TempDir::new().unwrap();
    picture(dir.path(), "p/one.png", 1);
    picture(dir.path(), "p/two.png", 2);
    write(
        dir.path(),
        "labels.csv",
        "\u{feff}path,label,split,group,domain\np/one.png,benign,train,g1,x\np/two.png,\"malignant, rare\",test,g2,\n",
    );
    let set = open(dir.path());
    assert_eq!(
        (set.format, set.classes.clone()),
        (Format::Csv, vec!["benign".to_string(), "malignant, rare".to_string()])
    );
    assert_eq!(
        (set.items[1].official, set.items[1].group.as_deref(), set.items[1].domain.clone()),
        (Some(Part::Test), Some("g2"), None)
    );
    write(dir.path(), "labels.csv", "path,label,split\np/one.png,a,trian\n");
    assert_says(&refusal(dir.path()), &["labels.csv", "line 2", "trian", "expected train"]);
}

// ---- HDF5 --------------------------------------------------------------------------------------------------------------------------

#[test]
fn damaged_hdf5_files() {
    let dir = TempDir::new().unwrap();
    write(dir.path(), "camelyonpatch_level_2_split_train_x.h5.gz", "packed");
    assert_says(&refusal(dir.path()), &["no camelyonpatch_level_2_split", "gunzip"]);
    write(dir.path(), "camelyonpatch_level_2_split_train_x.h5", "this is no HDF5");
    assert_says(&refusal(dir.path()), &["split_train_x.h5", "not a readable HDF5 file"]);
}

// ---- bad entries -------------------------------------------------------------------------------------------------------------------

/// Folders with five good pictures a class and three bad ones.
fn with_bad_pictures(root: &Path) {
    two_classes(root, 5);
    let whole = fs::read(root.join("dog/0.jpg")).unwrap();
    write(root, "dog/cut.jpg", &whole[..whole.len() * 2 / 3]);
    write(root, "cat/noise.png", b"\x89PNG\r\n\x1a\n and then nothing sensible");
    write(root, "cat/empty.tif", "");
}

#[test]
fn damaged_pictures_stop_the_loader_by_name_or_are_left_out() {
    let dir = TempDir::new().unwrap();
    with_bad_pictures(dir.path());
    let set = Arc::new(open(dir.path()));
    assert_eq!(set.len(), 13);
    for (name, words) in
        [("cut.jpg", "truncated"), ("noise.png", "cannot be decoded"), ("empty.tif", "empty")]
    {
        let index = set.items.iter().position(|item| item.id.ends_with(name)).unwrap();
        assert_says(&set.image(index).unwrap_err().to_string(), &[name, words, "--skip-bad"]);
    }
    let options = LoaderOptions { batch_size: 2, ..LoaderOptions::default() };
    let loader = Loader::new(set.clone(), (0..13).collect(), Transform::eval(8), options).unwrap();
    let batches: Vec<_> = loader.epoch(0, 0).unwrap().collect();
    assert!(batches.len() < 7, "the first error ends the epoch");
    assert_says(&batches.last().unwrap().as_ref().unwrap_err().to_string(), &["empty.tif"]);

    let kept = data::open(dir.path(), &skip_bad()).unwrap();
    assert_eq!((kept.len(), kept.skipped.len()), (10, 3));
    assert!((0..10).all(|index| kept.image(index).is_ok()));
    let split = data::split(&kept, &SplitOptions::default()).unwrap();
    assert_says(&data::info(&kept, &split).unwrap(), &["skipped    3", "cut.jpg", "noise.png"]);
}

#[test]
fn a_picture_that_vanishes_is_an_error_with_its_name() {
    let dir = TempDir::new().unwrap();
    two_classes(dir.path(), 4);
    let set = open(dir.path());
    fs::remove_file(dir.path().join("cat/2.png")).unwrap();
    assert_says(&set.image(2).unwrap_err().to_string(), &["2.png"]);
    assert_says(&data::split(&set, &SplitOptions::default()).unwrap_err().to_string(), &["2.png"]);
    assert_says(&set.image(99).unwrap_err().to_string(), &["no item 99"]);
}

/// A table in which one row is bad stops with the file and line, or goes on without that row.
#[track_caller]
fn assert_bad_row(root: &Path, words: &[&str], left: usize) {
    assert_says(&refusal(root), words);
    let kept = data::open(root, &skip_bad()).unwrap();
    assert_eq!((kept.len(), kept.skipped.len()), (left, 1));
    assert_says(&kept.skipped[0], words);
}

#[test]
fn bad_rows_of_the_kaggle_table() {
    let dir = TempDir::new().unwrap();
    ["a", "b"].iter().enumerate().for_each(|(number, id)| {
        drop(picture(dir.path(), &format!("train/{id}.tif"), number as u32))
    });
    write(dir.path(), "train_labels.csv", "id,label\na,0\nb,1\nghost,1\n");
    assert_bad_row(dir.path(), &["train_labels.csv", "line 4", "ghost", "--skip-bad"], 2);
    write(dir.path(), "train_labels.csv", "id,label\na,0\nb,tumour\n");
    assert_bad_row(dir.path(), &["train_labels.csv", "line 3", "\"tumour\"", "expected 0 or 1"], 1);
    write(dir.path(), "train_labels.csv", "id,class\na,0\n");
    assert_says(
        &refusal(dir.path()),
        &["train_labels.csv", "no column \"label\"", "found id,class"],
    );
    write(dir.path(), "train_labels.csv", "id,label\na,0,7\n");
    assert_says(&refusal(dir.path()), &["train_labels.csv", "not a CSV table"]);
    write(dir.path(), "train_labels.csv", "id,label\na,0\na,0\n");
    assert_says(&refusal(dir.path()), &["two items have the id a"]);
    write(dir.path(), "train_labels.csv", "id,label\n");
    assert_says(&refusal(dir.path()), &["no labelled pictures"]);
}

#[test]
fn bad_rows_of_isic_2017() {
    let dir = TempDir::new().unwrap();
    picture(dir.path(), "ISIC-2017_Training_Data/ISIC_1.jpg", 1);
    let csv = "ISIC-2017_Training_Part3_GroundTruth.csv";
    let rows = |row: &str| {
        write(
            dir.path(),
            csv,
            format!("image_id,melanoma,seborrheic_keratosis\nISIC_1,0.0,1.0\n{row}\n"),
        )
    };
    rows("ISIC_2,0.0,0.0");
    assert_bad_row(dir.path(), &[csv, "line 3", "ISIC_2", "nowhere below"], 1);
    rows("ISIC_1,1.0,1.0");
    assert_bad_row(dir.path(), &[csv, "line 3", "two classes"], 1);
    rows("ISIC_1,maybe,0.0");
    assert_bad_row(dir.path(), &[csv, "line 3", "melanoma is \"maybe\"", "expected 0 or 1"], 1);
    rows("ISIC_1,,0.0");
    assert_bad_row(dir.path(), &[csv, "line 3", "melanoma is \"\""], 1);
}

#[test]
fn bad_rows_of_camelyon17() {
    let dir = TempDir::new().unwrap();
    camelyon(dir.path());
    let csv = dir.path().join("camelyon17_v1.0/metadata.csv");
    let text = fs::read_to_string(&csv).unwrap();
    fs::write(&csv, text.replacen(",004,4,3328,", ",004,4,9999,", 1)).unwrap();
    assert_bad_row(dir.path(), &["metadata.csv", "line 2", "x_9999"], 23);
    fs::write(&csv, format!("{text}99,004,4,1,1,0,0,7,0\n")).unwrap();
    assert_bad_row(dir.path(), &["metadata.csv", "line 26", "center \"7\""], 24);
}

#[test]
fn paths_and_formats_that_are_nothing() {
    let dir = TempDir::new().unwrap();
    assert_says(&refusal(&dir.path().join("nowhere")), &["nowhere", "nothing at this path"]);
    assert_says(&refusal(dir.path()), &["cannot tell what kind of data", "docs/data.md"]);
    let error = Format::parse("isic2071").unwrap_err();
    assert_says(&error.to_string(), &["isic2071", "did you mean \"isic2017\""]);
    assert_eq!(error.exit_code(), 2);
    for format in [
        "isic2017",
        "isic2020",
        "pcam-kaggle",
        "pcam-h5",
        "camelyon17",
        "medmnist",
        "csv",
        "imagefolder",
    ] {
        let parsed = Format::parse(format).unwrap();
        assert_eq!(parsed.name(), format);
        let error = data::open(dir.path(), &Options { format: Some(parsed), ..Options::default() })
            .unwrap_err();
        assert!(error.to_string().contains(&*dir.path().to_string_lossy()), "{format}: {error}");
    }
}
