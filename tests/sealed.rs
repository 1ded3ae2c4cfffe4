//! Runs on parts that were given, and runs that must not look at their test: whatever stands there, they end with the same bits.

use std::fs;
use std::path::{Path, PathBuf};

use attn2d::config::{Config, Normalize};
use attn2d::data::{Part, Split};
use attn2d::train::cost::Cost;
use attn2d::train::images::{self, Images};
use attn2d::train::log::{STEPS, read_steps};
use attn2d::train::{self, Progress, Score};

/// A picture of one of two classes, other pixels for every number.
fn picture(path: &Path, number: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let pixel = |x: u32, y: u32| image::Rgb([(x * 9 + number) as u8, (y * 11) as u8, number as u8]);
    image::RgbImage::from_fn(16, 16, pixel).save(path).unwrap();
}

/// Twenty pictures a class: a folder for each, and a `labels.csv` of them elsewhere.
fn pictures(root: &Path) {
    let mut table = String::from("path,label\n");
    for (class, first) in [("cat", 0), ("dog", 100)] {
        for number in 0..20 {
            let name = format!("{class}/{number}.png");
            picture(&root.join(&name), first + number);
            table += &format!("{name},{class}\n");
        }
    }
    // A copy of a test picture would tell what is in it: it is left out, and nobody reads it either.
    fs::copy(root.join("cat/3.png"), root.join("cat/copy.png")).unwrap();
    fs::write(root.join("labels.csv"), table + "cat/copy.png,cat\n").unwrap();
}

/// A run of a few steps on these data. Statistics of the training part are of pixels too.
fn config(data: &Path, format: &str, dir: &Path) -> Config {
    let mut config = Config::default();
    config.data.path = data.display().to_string();
    config.data.format = format.into();
    config.data.img_size = 16;
    config.data.normalize = Normalize::Data;
    config.model.name = "resnet18:w8,stages=1,stem=small".into();
    config.train.batch_size = 8;
    config.train.epochs = 2;
    config.train.device = "cpu".into();
    config.output.dir = dir.display().to_string();
    config
}

fn sealed(config: &Config, split: &Path, dir: &Path) -> Config {
    let mut config = config.clone();
    config.data.split_file = split.display().to_string();
    config.data.seal_test = true;
    config.output.dir = dir.display().to_string();
    config
}

#[track_caller]
fn assert_says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is missing in: {message}");
    }
}

/// The same bits in all that a run writes down about what it learnt.
#[track_caller]
fn assert_same(a: &Path, b: &Path) {
    let files = ["last/model.safetensors", "best/model.safetensors", "last/optim.safetensors"];
    for name in files.iter().chain(&["metrics.csv", "split.csv", "predictions_val.csv"]) {
        let read = |dir: &Path| fs::read(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(read(a) == read(b), "{name} differs");
    }
}

/// Files of everything that a split does not learn from: the test, and copies that were left out.
fn hidden_files(config: &Config, split: &Path) -> Vec<PathBuf> {
    let dataset = images::open(config).unwrap();
    let split = Split::read(&dataset, split).unwrap();
    assert_eq!(split.dropped.len(), 1, "the copy");
    let learnt = split.learnt_from();
    let hidden = (0..dataset.len()).filter(|index| !learnt.contains(index));
    let files: Vec<PathBuf> = hidden.map(|index| dataset.items[index].file.to_path_buf()).collect();
    assert_eq!(files.len(), split.test.len() + 1);
    assert!(split.test.len() >= 4, "{}", split.test.len());
    files
}

#[test]
fn a_sealed_run_never_opens_a_test_picture() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    pictures(&data);
    let at = |name: &str| root.path().join(name);
    for format in ["imagefolder", "csv"] {
        let open = config(&data, format, &at(&format!("{format}-open")));
        let whole = train::run(&open, Progress::Quiet).expect("an open run");
        assert_eq!(whole.parts.iter().map(|p| &*p.part).collect::<Vec<_>>(), ["val", "test"]);
        let split = whole.dir.join("split.csv");
        let intact = sealed(&open, &split, &at(&format!("{format}-intact")));
        let summary = train::run(&intact, Progress::Quiet).expect("a sealed run");
        assert_eq!(summary.parts.iter().map(|p| &*p.part).collect::<Vec<_>>(), ["val"]);
        assert_same(&whole.dir, &summary.dir);
        assert!(!summary.dir.join("predictions_test.csv").exists());

        let hidden = hidden_files(&open, &split);
        let kept: Vec<Vec<u8>> = hidden.iter().map(|file| fs::read(file).unwrap()).collect();
        hidden.iter().for_each(|file| fs::write(file, "no picture").unwrap());
        for skip_bad in [false, true] {
            let mut blind = sealed(&open, &split, &at(&format!("{format}-{skip_bad}")));
            blind.data.skip_bad = skip_bad;
            let summary = train::run(&blind, Progress::Quiet).expect("nobody looks");
            assert_same(&whole.dir, &summary.dir);
        }
        // An open run on the same split does see what became of the test.
        let mut control = sealed(&open, &split, &at(&format!("{format}-control")));
        control.data.seal_test = false;
        let error = train::run(&control, Progress::Quiet).unwrap_err().to_string();
        assert_says(&error, &[".png", "cannot be decoded"]);
        hidden.iter().zip(kept).for_each(|(file, bytes)| fs::write(file, bytes).unwrap());
    }
}

#[test]
fn a_sealed_run_that_was_stopped_stays_sealed_and_scores_val_unless_asked() {
    let root = tempfile::tempdir().unwrap();
    let (data, at) = (root.path().join("data"), |name: &str| root.path().join(name));
    pictures(&data);
    let open = config(&data, "imagefolder", &at("open"));
    let whole = train::run(&open, Progress::Quiet).expect("an open run");
    let given = at("given.csv");
    fs::copy(whole.dir.join("split.csv"), &given).unwrap();
    let hidden = hidden_files(&open, &given);
    hidden.iter().for_each(|file| fs::write(file, "no picture").unwrap());

    let mut stopped = sealed(&open, &given, &at("stopped"));
    stopped.train.max_steps = 2;
    train::run(&stopped, Progress::Quiet).expect("its first steps");
    let first = Cost::read(&at("stopped")).unwrap().expect("the call ended");
    fs::remove_file(&given).unwrap();
    stopped.train.max_steps = 0;
    train::resume(&stopped, Progress::Quiet).expect("by its own split.csv");
    assert_same(&whole.dir, &at("stopped"));

    let cost = Cost::read(&at("stopped")).unwrap().expect("it ended");
    let steps = read_steps(&at("stopped").join(STEPS)).unwrap();
    let step_seconds: f64 = steps.iter().map(|s| (s.data_ms + s.step_ms) / 1e3).sum();
    assert!((cost.step_seconds - step_seconds).abs() < 1e-9 && steps.len() == 6, "{cost:?}");
    assert!(cost.seconds > first.seconds && cost.step_seconds > first.step_seconds, "{cost:?}");
    assert!(cost.seconds > cost.step_seconds, "evaluation is in it: {cost:?}");
    let parameters = 4 * fs::metadata(at("stopped/last/model.safetensors")).unwrap().len() / 5;
    assert!(cost.memory_peak_bytes as u64 > parameters, "weights and gradients: {cost:?}");
    assert!(cost.memory_peak_bytes >= first.memory_peak_bytes);

    let score = |part: Option<&str>| {
        let config = Score::read_config(&at("stopped")).unwrap();
        let (checkpoint, part) = (at("stopped"), part.map(String::from));
        let score = Score { checkpoint, config, raw_weights: false, part, output: None };
        score.run(Progress::Quiet).map(|scored| scored.metrics.part)
    };
    assert_says(&score(Some("test")).unwrap_err().to_string(), &[".png", "cannot be decoded"]);
    assert_eq!(score(None).unwrap(), "val");
}

#[test]
fn what_is_sealed_is_refused_whoever_asks() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    pictures(&data);
    let open = config(&data, "imagefolder", &root.path().join("open"));
    let split = Images::new(&open).unwrap().split;
    let file = root.path().join("split.csv");
    split.write(&images::open(&open).unwrap(), &file).unwrap();

    let config = sealed(&open, &file, &root.path().join("sealed"));
    let images = Images::new(&config).unwrap();
    assert_eq!(images.split, split);
    let refused = |result: attn2d::Result<()>| {
        assert_says(&result.unwrap_err().to_string(), &["is sealed", "data.seal_test"]);
    };
    for &index in split.test.iter().chain(split.dropped.iter().map(|dropped| &dropped.index)) {
        refused(images.dataset.image(index).map(drop));
    }
    refused(attn2d::data::statistics(&images.dataset, &split.test).map(drop));
    refused(images::split(&config, &images.dataset).map(drop));
    refused(attn2d::data::info(&images.dataset, &split).map(drop));
    let loader = images.eval_loader(&config, Part::Test).unwrap().expect("a test part");
    refused(loader.epoch(0, 0).unwrap().collect::<attn2d::Result<Vec<_>>>().map(drop));
    for index in split.learnt_from() {
        images.dataset.image(index).expect("open");
    }

    // Without a file the parts are drawn first, which must not look at pictures.
    let mut anew = open.clone();
    anew.data.seal_test = true;
    let error = Images::new(&anew).err().unwrap();
    assert_says(&error.to_string(), &["data.split_file", "data.dedup"]);
    assert_eq!(error.exit_code(), 2);
    anew.data.dedup = false;
    let images = Images::new(&anew).unwrap();
    refused(images.dataset.image(images.split.test[0]).map(drop));
    assert!(images.dataset.image(images.split.val[0]).is_ok());
}

#[test]
fn split_files_that_do_not_fit_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("data");
    pictures(&data);
    let open = config(&data, "csv", &root.path().join("run"));
    let refusal = |file: &Path| {
        let error = train::run(&sealed(&open, file, &root.path().join("run")), Progress::Quiet);
        assert!(!root.path().join("run").exists(), "nothing is begun");
        error.unwrap_err().to_string()
    };
    assert_says(&refusal(&root.path().join("none.csv")), &["data.split_file", "no such file"]);
    assert_says(&refusal(&data), &["data.split_file", "is a folder", "split,id,label"]);
    assert_says(&refusal(&data.join("labels.csv")), &["labels.csv", "no column \"split\""]);
    let file = root.path().join("split.csv");
    fs::write(&file, "split,id,label\ntrain,cat/99.png,cat\n").unwrap();
    assert_says(&refusal(&file), &["split.csv", "line 2", "cat/99.png"]);
    // A reader that asks whether a picture is there goes on asking.
    fs::remove_file(data.join("dog/7.png")).unwrap();
    assert_says(&refusal(&file), &["labels.csv", "no picture", "dog/7.png"]);
}
