//! `attn2d predict` and `attn2d export`: tables of predictions, pictures that cannot be read, exported files, and the same logits in
//! PyTorch where it is installed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use attn2d::config::{Config, Precision};
use attn2d::io::safetensors;
use attn2d::models::{Load, Model};
use attn2d::nn::{Mode, StateArray};
use attn2d::tensor::philox::Philox;
use attn2d::train::{self, Progress, Trained};
use attn2d::{Device, Tensor, tape};

fn attn2d(dir: &Path, words: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_attn2d");
    Command::new(program).args(words).current_dir(dir).output().expect("the program starts")
}

/// Both streams.
fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &error_of(output)
}

fn error_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Writes a picture that differs for every `number`.
fn picture(path: &Path, number: u32, (width, height): (u32, u32)) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let pixel = |x: u32, y: u32| {
        let wave = |k: u32| ((x * k + y * (k + 3) + number * 29) % 256) as u8;
        image::Rgb([wave(3), wave(5), wave(2)])
    };
    image::RgbImage::from_fn(width, height, pixel).save(path).unwrap();
}

/// Two classes of eight pictures each, and a run of one step on them.
fn trained(root: &Path, change: impl Fn(&mut Config)) -> Config {
    for number in 0..8 {
        picture(&root.join(format!("data/cat/{number}.png")), number, (24, 18));
        picture(&root.join(format!("data/dog/{number}.png")), 100 + number, (16, 16));
    }
    let mut config = Config::default();
    config.data.path = root.join("data").display().to_string();
    config.data.img_size = 16;
    (config.data.val_fraction, config.data.test_fraction) = (0.25, 0.25);
    config.data.normalize = attn2d::config::Normalize::Data;
    config.model.name = "resnet18:w8,stages=2,stem=small+ga@2.1:append,heads=2".into();
    config.train.batch_size = 4;
    config.train.max_steps = 1;
    config.train.device = "cpu".into();
    config.output.dir = root.join("run").display().to_string();
    change(&mut config);
    train::run(&config, Progress::Quiet).expect("a run");
    config
}

/// Rows by the first cell, each cell by its column.
fn table(text: &str) -> BTreeMap<String, BTreeMap<String, String>> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let columns = reader.headers().expect("a header").clone();
    let row = |record: csv::Result<csv::StringRecord>| {
        let record = record.expect("a row");
        let cells = columns.iter().zip(record.iter());
        (record[0].to_owned(), cells.map(|(c, v)| (c.to_owned(), v.to_owned())).collect())
    };
    reader.records().map(row).collect()
}

/// Predictions are those of the run's own evaluation, by a run, a checkpoint or an exported file, at any batch size.
#[test]
fn predictions_are_those_of_the_runs_evaluation() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let dir = root.path();
    trained(dir, |config| config.train.ema = 0.5);
    let own = fs::read_to_string(dir.join("run/predictions_val.csv")).expect("predictions");
    let own = table(&own);
    assert_eq!(own.len(), 4);

    let words = ["export", "--checkpoint", "run", "--out", "model.safetensors"];
    let output = attn2d(dir, &words);
    assert!(output.status.success(), "{}", error_of(&output));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("ema.safetensors") && said.contains("moving average"), "{said}");
    let file = safetensors::read(dir.join("model.safetensors")).expect("whole");
    assert_eq!(file.metadata["classes"], "[\"cat\",\"dog\"]");
    assert_eq!(file.metadata["image_size"], "16x16");
    assert!(file.arrays.contains_key("layer2.1.attn.proj.weight"));

    let mut tables = Vec::new();
    for (checkpoint, batch) in [
        ("run", "32"),
        ("run/best", "3"),
        ("model.safetensors", "1"),
        ("run/best/ema.safetensors", "5"),
    ] {
        let words = ["predict", "--checkpoint", checkpoint, "-b", batch, "--device", "cpu", "data"];
        let output = attn2d(dir, &words);
        assert!(output.status.success(), "{checkpoint}: {}", error_of(&output));
        let said = error_of(&output);
        assert_eq!(said.contains("moving average"), checkpoint != "model.safetensors", "{said}");
        tables.push(String::from_utf8(output.stdout).expect("text"));
    }
    assert!(tables.iter().all(|t| *t == tables[0]), "{tables:?}");
    let predicted = table(&tables[0]);
    assert_eq!(predicted.len(), 16);
    assert!(tables[0].starts_with("path,predicted,p_cat,p_dog\ndata/cat/0.png,"), "{}", tables[0]);
    for (id, row) in &own {
        let ours = &predicted[&format!("data/{id}")];
        for column in ["predicted", "p_cat", "p_dog"] {
            assert_eq!(ours[column], row[column], "{id}");
        }
    }

    // The weights of the last step are others, and so is half precision, if little.
    let raw = ["predict", "--checkpoint", "run", "--raw-weights", "--device", "cpu", "data", "-q"];
    let output = attn2d(dir, &raw);
    assert!(output.status.success() && output.stderr.is_empty(), "{}", error_of(&output));
    assert_ne!(String::from_utf8(output.stdout).expect("text"), tables[0]);
    let half = ["predict", "--checkpoint", "run", "--precision", "bf16", "--device", "cpu", "data"];
    let output = attn2d(dir, &half);
    assert!(output.status.success(), "{}", error_of(&output));
    let half = table(&String::from_utf8(output.stdout).expect("text"));
    for (path, row) in &half {
        let p = |row: &BTreeMap<String, String>| row["p_cat"].parse::<f64>().expect("a number");
        assert!((p(row) - p(&predicted[path])).abs() < 0.05, "{path}");
    }
}

/// An evaluation of other weights, in another precision or of other data never writes over another's results; the same one does.
#[test]
fn each_evaluation_has_a_folder_of_its_own() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let dir = root.path();
    trained(dir, |config| config.train.ema = 0.5);
    for number in 0..2 {
        picture(&dir.join(format!("other/data/cat/{number}.png")), 50 + number, (16, 16));
        picture(&dir.join(format!("other/data/dog/{number}.png")), 60 + number, (16, 16));
    }
    let mut folders: Vec<String> = Vec::new();
    for (words, folder) in [
        (&[][..], "data"),
        (&["--checkpoint", "run/best", "--split", "val"], "data"),
        (&["--raw-weights"], "data-raw"),
        (&["--precision", "bf16"], "data-bf16"),
        (&["--precision", "f32"], "data"),
        (&["--checkpoint", "run/last", "--raw-weights", "--precision", "f16"], "data-last-raw-f16"),
        (&["--data", "other/data"], "data-2"),
        (&["--data", "other/../other/data"], "data-2"),
        (&["--data", "data"], "data"),
        (&["--output", "mine"], ""),
        (&["--device", "wgpu"], "data-wgpu-0"),
    ] {
        if words.contains(&"wgpu") && Device::new("wgpu").is_err() {
            println!("skipped, no adapter: {words:?}");
            continue;
        }
        let given = |option: &str| words.contains(&option);
        let checkpoint: &[&str] =
            if given("--checkpoint") { &[] } else { &["--checkpoint", "run"] };
        let device: &[&str] = if given("--device") { &[] } else { &["--device", "cpu"] };
        let output = attn2d(dir, &[&["eval"], checkpoint, device, words].concat());
        assert!(output.status.success(), "{words:?}: {}", error_of(&output));
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let place = if folder.is_empty() { "mine/".into() } else { format!("run/eval/{folder}/") };
        assert!(said.contains(&format!(" are in {place}\n")), "{words:?}: {said}");
        if !folder.is_empty() {
            folders.push(folder.into());
        }
        let found = fs::read_dir(dir.join("run/eval")).expect("results").count();
        folders.sort();
        folders.dedup();
        assert_eq!(found, folders.len(), "{words:?}");
    }
    let of = fs::read_to_string(dir.join("run/eval/data-last-raw-f16/eval.json")).expect("what of");
    for part in
        ["\"checkpoint\": \"last\"", "\"model.safetensors\"", "\"f16\"", "\"device\": \"cpu\""]
    {
        assert!(of.contains(part), "{part} in {of}");
    }
}

/// Without the run's split nobody knows which images it was trained on: of its own data nothing but everything is scored then, and of
/// others it is told.
#[test]
fn an_evaluation_without_the_split_of_the_run_says_so() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let dir = root.path();
    trained(dir, |_| {});
    for number in 0..2 {
        picture(&dir.join(format!("other/cat/{number}.png")), 50 + number, (16, 16));
        picture(&dir.join(format!("other/dog/{number}.png")), 60 + number, (16, 16));
    }
    let eval = |words: &[&str]| {
        let output =
            attn2d(dir, &[&["eval", "--checkpoint", "run", "--device", "cpu"], words].concat());
        (output.status.code(), said(&output))
    };
    let split = dir.join("run/split.csv");
    let (code, said) = eval(&["--data", "other"]);
    assert!(code == Some(0) && said.contains("4 images (all)"), "{said}");
    assert!(said.contains("all images, for run/split.csv: line 2: unknown id"), "{said}");
    for (text, why) in [
        (None, "run/split.csv is missing"),
        (Some(""), "run/split.csv"),
        (Some("split,id,label,note\n"), "run/split.csv lists no images"),
        (Some("split,id,label,note\ntest,cat/99.png,cat,\n"), "unknown id"),
    ] {
        match text {
            None => fs::remove_file(&split).expect("removed"),
            Some(text) => fs::write(&split, text).expect("written"),
        }
        for words in [&[][..], &["--split", "val"], &["--data", "run/../data"]] {
            let (code, said) = eval(words);
            assert_eq!(code, Some(2), "{words:?}: {said}");
            assert!(
                said.contains(why) && said.contains("score every image by --split all"),
                "{said}"
            );
        }
        let (code, said) = eval(&["--split", "all"]);
        assert!(code == Some(0) && said.contains("16 images (all)"), "{said}");
        let (code, said) = eval(&["--data", "other"]);
        assert!(
            code == Some(0) && said.contains("all images, for ") && said.contains(why),
            "{said}"
        );
    }
}

/// Whether pictures cannot be read is in the exit code, which they are and why on the error stream.
#[test]
fn pictures_that_cannot_be_read_are_listed() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let dir = root.path();
    trained(dir, |config| config.train.precision = Precision::Bf16);
    picture(&dir.join("new/a.png"), 3, (40, 30));
    picture(&dir.join("new/deep/er/b.bmp"), 4, (9, 50));
    fs::write(dir.join("new/deep/empty.png"), "").expect("written");
    fs::write(dir.join("new/notes.txt"), "no picture").expect("written");
    let whole = fs::read(dir.join("new/a.png")).expect("read");
    fs::write(dir.join("new/cut.png"), &whole[..whole.len() / 2]).expect("written");
    let words = ["predict", "--checkpoint", "run", "new", "--out", "p.csv", "--device", "cpu"];
    for (skip, code) in [(false, 1), (true, 0)] {
        let words = if skip { [&words[..], &["--skip-bad"]].concat() } else { words.to_vec() };
        let output = attn2d(dir, &words);
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(error.contains("not read: new/deep/empty.png: the file is empty"), "{error}");
        assert!(
            error.contains("not read: new/cut.png: ") && error.contains("2 of 4 pictures"),
            "{error}"
        );
        let rows = table(&fs::read_to_string(dir.join("p.csv")).expect("a table"));
        assert_eq!(rows.keys().collect::<Vec<_>>(), ["new/a.png", "new/deep/er/b.bmp"]);
        fs::remove_file(dir.join("p.csv")).expect("removed");
    }
    // A file is taken at its word, whatever it is called.
    let output =
        attn2d(dir, &["predict", "--checkpoint", "run", "new/notes.txt", "--device", "cpu"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        error_of(&output).contains("new/notes.txt: the picture cannot be decoded"),
        "{}",
        error_of(&output)
    );
    assert_eq!(String::from_utf8_lossy(&output.stdout), "path,predicted,p_cat,p_dog\n");
}

#[test]
fn what_cannot_be_predicted_is_one_clear_line() {
    let root = tempfile::tempdir().expect("a temporary directory");
    let dir = root.path();
    trained(dir, |_| {});
    fs::create_dir(dir.join("none")).expect("made");
    let mut dict = safetensors::read(dir.join("run/best/model.safetensors")).expect("whole");
    for (file, key, value) in [
        ("odd", "std", "0.2"),
        ("zero", "std", "[0.2, 0, 0.2]"),
        ("huge", "image_size", "99999999x99999999"),
        ("other", "model", "resnet19"),
    ] {
        let mut dict = dict.clone();
        dict.metadata.insert(key.into(), value.into());
        let file = dir.join(format!("{file}.safetensors"));
        safetensors::write(file, &dict).expect("written");
    }
    dict.metadata.clear();
    safetensors::write(dir.join("plain.safetensors"), &dict).expect("written");
    fs::write(dir.join("text.safetensors"), "no weights").expect("written");
    let cases: [(&[&str], i32, &str); 11] = [
        (&["--checkpoint", "run", "missing"], 2, "missing: there is nothing at this path"),
        (&["--checkpoint", "run", "none"], 2, "none: no pictures (png, jpg, tif, bmp)"),
        (&["--checkpoint", "none", "data"], 2, "none: no checkpoint here"),
        (&["--checkpoint", "plain.safetensors", "data"], 1, "its metadata has no 'model'"),
        (&["--checkpoint", "odd.safetensors", "data"], 1, "metadata 'std' is 0.2"),
        (&["--checkpoint", "zero.safetensors", "data"], 1, "expected numbers above 0"),
        (&["--checkpoint", "huge.safetensors", "data"], 1, "up to 4096x4096"),
        (
            &["--checkpoint", "other.safetensors", "data"],
            1,
            "other.safetensors: metadata 'model': ",
        ),
        (&["--checkpoint", "text.safetensors", "data"], 1, "not a safetensors file"),
        (&["--checkpoint", "run", "data", "-b", "0"], 2, "--batch-size 0"),
        (
            &["--checkpoint", "run", "data", "--out", "no/such/p.csv"],
            2,
            "there is no folder no/such",
        ),
    ];
    for (words, code, expected) in cases {
        let output = attn2d(dir, &[&["predict", "--device", "cpu"], words].concat());
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {error}");
        let lines: Vec<&str> = error.lines().filter(|l| l.starts_with("error: ")).collect();
        assert!(lines.len() == 1 && lines[0].contains(expected), "{words:?}: {error}");
    }
}

/// A Python with PyTorch: `$ATTN2D_PYTHON`, else `python3`. `None` where it cannot import what the script needs.
fn python() -> Option<PathBuf> {
    let python = std::env::var_os("ATTN2D_PYTHON").map_or("python3".into(), PathBuf::from);
    let output = Command::new(&python).args(["-c", "import torch, torchvision, PIL"]).output();
    if output.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    let required = std::env::var_os("ATTN2D_REQUIRE_PYTORCH").is_some();
    assert!(!required, "{}: no torch, torchvision and PIL", python.display());
    eprintln!(
        "SKIPPED: {} has no torch, torchvision and PIL; $ATTN2D_PYTHON names another",
        python.display()
    );
    None
}

/// A file as `attn2d export` writes it of a model with fresh weights, made so that no part of it is without effect: branches that start at
/// nothing and small tables are larger, and the statistics of norms have begun to move.
fn exported(file: &Path, model: &str, size: usize) {
    let spec: attn2d::models::Spec = model.parse().expect(model);
    let device = Device::cpu();
    let net = Model::build(&spec, 2, (size, size), &device, 7).expect(model);
    let mut weights = net.state().expect("weights");
    for (name, array) in &mut weights.arrays {
        let old = array.to_f32();
        let small = old.iter().all(|x| x.abs() < 0.2);
        let ends = |end: &str| name.ends_with(end);
        let new = if ends(".attn.norm.weight") || ends(".attn.norm3.weight") {
            vec![1.0; old.len()]
        } else if small && (ends(".rel_h") || ends(".rel_w")) {
            old.iter().map(|x| 10.0 * x).collect()
        } else {
            continue;
        };
        *array = StateArray::f32(&array.shape, new);
    }
    net.load(&weights, Load::Exact).expect("its own weights");
    let noise = Philox { seed: 7, step: 0, op: u32::MAX };
    let images = Tensor::randn(&device, &[4, size, size, 3], noise).expect("images");
    tape::no_grad(|| net.forward(&images, &Mode::train(7, 1))).expect("statistics");
    let weights = net.state().expect("weights");
    let (classes, mean, std) =
        (vec!["cat".into(), "dog".into()], [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]);
    let trained = Trained { spec, classes, img_size: size, mean, std, precision: None, weights };
    safetensors::write(file, &trained.export().expect("exported")).expect("written");
}

/// The script of the examples builds exported models in PyTorch: the same logits to 1e-4.
#[test]
fn exported_models_have_the_same_logits_in_pytorch() {
    let Some(python) = python() else { return };
    let root = tempfile::tempdir().expect("a temporary directory");
    let dir = root.path();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/load_in_pytorch.py");
    // Not of the models' size: the script resizes as the program does.
    picture(&dir.join("new/large.png"), 7, (130, 101));
    picture(&dir.join("new/small.png"), 8, (24, 18));
    let run = |expect: &str| {
        let words = [script, "m.safetensors", "--expect", expect];
        Command::new(&python).args(words).current_dir(dir).output().expect("Python starts")
    };
    // Strides of 2 on maps of even and odd sides are among them.
    for model in [
        "resnet18+ela3@3.1:heads=4,border=zero+botnet@2.1+ela-gaussian3@3.0+ga@4:append+la3@2.0:tables=sum",
        "resnet50+ela5@4.0:sasa+nonlocal@3.5+lesa@3.2+ela-bottleneck3@3.1:append,heads=4",
        "efficientnet_b0+la3@6.0:heads=4+botnet@4.0+ga@5.1:append,pos=none+lesa@5.2:append",
        "vit_ti_16:w48,heads=2,depth=2,patch=8,dropout=0.1",
    ] {
        exported(&dir.join("m.safetensors"), model, 48);
        let words = "predict --checkpoint m.safetensors new --logits --out p.csv --device cpu";
        let output = attn2d(dir, &words.split(' ').collect::<Vec<_>>());
        assert!(output.status.success(), "{model}: {}", error_of(&output));
        let output = run("p.csv");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        println!("{model}: {said}");
        assert!(output.status.success(), "{model}: {said}{}", error_of(&output));
        assert!(said.contains("new/large.png: ") && said.contains("new/small.png: "), "{said}");
    }
    // And a logit that is off is told.
    let text = fs::read_to_string(dir.join("p.csv")).expect("a table");
    let last = text.trim_end().rsplit(',').next().expect("a logit");
    let off = text.replace(last, &(last.parse::<f64>().expect("a number") + 0.001).to_string());
    fs::write(dir.join("off.csv"), off).expect("written");
    assert_eq!(run("off.csv").status.code(), Some(1));
}
