//! Wrong files and wrong words through the program: each ends in one clear line and exit code 1 or 2, never in a panic.
//!
//! A full disk while checkpointing, damaged checkpoints and configs are in `tests/train.rs`; what else can be wrong with a data
//! set is in `tests/data_fixtures/`.

use std::fs;
use std::path::Path;
use std::process::Command;

use attn2d::config::Config;
use attn2d::train::{self, Progress};

/// Runs words that must fail with `code`, in one line of error that has all of `parts`.
#[track_caller]
fn fails(dir: &Path, words: &[&str], code: i32, parts: &[&str]) {
    let program = env!("CARGO_BIN_EXE_attn2d");
    let output = Command::new(program).args(words).current_dir(dir).output().expect("it starts");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{words:?}: {error}");
    assert_eq!(error.lines().count(), 1, "{words:?}: one line: {error}");
    assert!(error.starts_with("error: ") && !error.contains("panicked"), "{words:?}: {error}");
    for part in parts {
        assert!(error.contains(part), "{words:?}: expected {part:?} in {error}");
    }
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// A training run that takes a second.
const TRAIN: &[&str] = &[
    "train",
    "--device",
    "cpu",
    "--model",
    "resnet18:w8,stages=1,stem=small",
    "--img-size",
    "16",
    "-b",
    "4",
    "--epochs",
    "1",
    "--output",
    "run",
];

fn train(more: &[&'static str]) -> Vec<&'static str> {
    [TRAIN, more].concat()
}

/// Saves a picture that differs for every `number`.
fn picture(path: &Path, number: u32) {
    fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    let pixel = |x: u32, y: u32| image::Rgb([(9 * x + number) as u8, (7 * y) as u8, number as u8]);
    image::RgbImage::from_fn(20, 16, pixel).save(path).expect("saved");
}

#[test]
fn a_truncated_jpeg() {
    let dir = temporary();
    for number in 0..10 {
        picture(&dir.path().join(format!("images/cat/{number}.jpg")), number);
        picture(&dir.path().join(format!("images/dog/{number}.jpg")), 100 + number);
    }
    let path = dir.path().join("images/dog/3.jpg");
    let whole = fs::read(&path).expect("read");
    fs::write(&path, &whole[..whole.len() * 2 / 3]).expect("cut");
    let said = &["dog/3.jpg", "truncated", "--skip-bad"];
    fails(dir.path(), &["data", "info", "images"], 1, said);
    fails(dir.path(), &train(&["--data", "images"]), 1, said);

    let words = train(&["--data", "images", "--skip-bad", "--output", "skipped"]);
    let output = Command::new(env!("CARGO_BIN_EXE_attn2d"))
        .args(words)
        .current_dir(dir.path())
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("1 skipped as unreadable"), "{said}");
}

#[test]
fn a_table_with_an_unknown_id() {
    let dir = temporary();
    picture(&dir.path().join("isic/ISIC-2017_Training_Data/ISIC_0000001.jpg"), 1);
    let table = "ISIC-2017_Training_Part3_GroundTruth.csv";
    fs::write(
        dir.path().join("isic").join(table),
        "image_id,melanoma,seborrheic_keratosis\nISIC_0000001,0.0,1.0\nISIC_0000009,1.0,0.0\n",
    )
    .expect("written");
    let said = &[table, "line 3", "ISIC_0000009"];
    fails(dir.path(), &["data", "info", "isic"], 1, said);
    fails(dir.path(), &train(&["--data", "isic"]), 1, said);
    assert!(!dir.path().join("run").exists(), "no run directory for a run that could not begin");
}

#[test]
fn an_npz_with_a_missing_key() {
    let dir = temporary();
    let mut file = npyz::npz::NpzWriter::create(dir.path().join("some.npz")).expect("made");
    let mut array = |name: &str, shape: &[u64]| {
        use npyz::WriterBuilder;
        let count: u64 = shape.iter().product();
        let builder = file.array(name, Default::default()).expect("a member").default_dtype();
        let mut writer = builder.shape(shape).begin_nd().expect("begun");
        writer.extend((0..count).map(|i| (i % 2) as u8)).expect("written");
        writer.finish().expect("finished");
    };
    for part in ["train", "val", "test"] {
        array(&format!("{part}_images"), &[10, 4, 4]);
        if part != "val" {
            array(&format!("{part}_labels"), &[10, 1]);
        }
    }
    drop(file);
    let said = &[
        "some.npz",
        "no array \"val_labels\"",
        "found [test_images, test_labels, train_images, train_labels, val_images]",
    ];
    fails(dir.path(), &["data", "info", "some.npz"], 1, said);
    fails(dir.path(), &train(&["--data", "some.npz"]), 1, said);
}

#[test]
fn a_model_string_with_a_typo() {
    let dir = temporary();
    for (typo, hint) in [
        ("resnet81", "did you mean 'resnet18'?"),
        ("resnet18+gaa@4", "did you mean 'ga'?"),
        ("resnet18+ga@5", "stages are 1 to 4"),
        ("resnet18+ga@4:apend", "did you mean 'append'?"),
        ("resnet18:steem=small", "unknown option of resnet18 'steem=small'"),
    ] {
        fails(dir.path(), &["models", typo], 2, &[typo, hint]);
        fails(dir.path(), &["train", "--device", "cpu", "--model", typo], 2, &[typo, hint]);
    }
}

#[test]
fn a_checkpoint_of_another_model() {
    let dir = temporary();
    let run = |name: &str, model: &str| {
        let mut config = Config::default();
        config.model.name = model.into();
        config.data.synthetic_count = 60;
        config.data.img_size = 16;
        config.train.device = "cpu".into();
        config.train.max_steps = 1;
        config.output.dir = dir.path().join(name).display().to_string();
        train::run(&config, Progress::Quiet).expect("a run");
    };
    let narrow = "resnet18:w8,stages=1,stem=small";
    run("narrow", narrow);
    run("wide", "resnet18:w16,stages=1,stem=small");
    let weights = "wide/best/model.safetensors";
    let said =
        &["model.safetensors: does not fit model", narrow, "the file holds model 'resnet18:w16"];
    fails(dir.path(), &train(&["--pretrained", weights]), 1, said);
    fs::copy(dir.path().join(weights), dir.path().join("narrow/best/model.safetensors"))
        .expect("swapped");
    fails(dir.path(), &["eval", "--checkpoint", "narrow", "--device", "cpu"], 1, said);

    let cut = dir.path().join("cut.safetensors");
    let whole = fs::read(dir.path().join(weights)).expect("read");
    fs::write(&cut, &whole[..whole.len() / 2]).expect("cut");
    let said = &["cut.safetensors: not a safetensors file", "cut short"];
    fails(dir.path(), &train(&["--pretrained", "cut.safetensors"]), 1, said);
    fails(
        dir.path(),
        &["eval", "--checkpoint", "wide", "--output", "cut.safetensors"],
        2,
        NO_FOLDER,
    );
    fs::remove_file(dir.path().join("wide/best/model.safetensors")).expect("removed");
    let said = &["wide/best/model.safetensors: is missing", "give another"];
    fails(dir.path(), &["predict", "--checkpoint", "wide", "cut.safetensors"], 1, said);
}

const NO_FOLDER: &[&str] = &["--output cut.safetensors", "is a file; expected a folder"];

#[test]
fn paths_that_will_not_do_are_named_with_their_option() {
    let dir = temporary();
    fs::write(dir.path().join("file"), "").expect("written");
    fs::create_dir(dir.path().join("folder")).expect("made");
    for (words, parts) in [
        (
            &["train", "--pretrained", "none"][..],
            &["--pretrained none: there is no such file", "safetensors"][..],
        ),
        (
            &["train", "--pretrained", "folder"],
            &["--pretrained folder: is a folder", "safetensors"],
        ),
        (&["train", "--drop-head"], &["--drop-head", "--pretrained"]),
        (&["train", "--output", "file"], &["--output file: file is a file", "expected a folder"]),
        (&["train", "--output", "file/run"], &["--output file/run: file is a file"]),
        (&["train", "--config", "none"], &["--config none: there is no such file", "TOML"]),
        (&["train", "--config", "folder"], &["--config folder: is a folder", "TOML"]),
        (&["train", "--resume", "file"], &["file: not a run directory"]),
        (&["train", "--data", "none"], &["none: there is nothing at this path"]),
        (&["eval", "--checkpoint", "file"], &["file: no checkpoint here"]),
        (&["export", "--checkpoint", "folder", "--out", "folder"], &["--out folder: is a folder"]),
        (&["verify", "--cases", "none"], &["--cases none: there is no such file", "a case file"]),
        (&["verify", "--op", "relu", "--json", "folder"], &["--json folder: is a folder"]),
        (&["verify", "--op", "relu", "--json", "no/x"], &["--json no/x: there is no folder no"]),
    ] {
        fails(dir.path(), words, 2, parts);
    }
    assert_eq!(fs::read_dir(dir.path()).expect("read").count(), 2, "nothing is written");
}
