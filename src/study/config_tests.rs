//! Tests of a study's file and of its changes from the command line.

use std::path::Path;

use toml::Value;

use super::config::Study;
use super::space::Space;
use crate::Result;
use crate::config::Config;

const GOOD: &str = "name = \"s t\"\n[config.train]\nepochs = 3\n[[datasets]]\nname = \"d\"\nconfig.data = { img_size = 48 }\n\
                        [[models]]\nname = \"plain\"\nspec = \"resnet18\"\nconfig.optim = { lr = 0.5 }\n\
                        [[models]]\nname = \"ga\"\nspec = [\"resnet18+ga@4\", \"resnet18+ga@3\"]\n";

fn load(text: &str) -> Result<Study> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("study.toml");
    std::fs::write(&path, text).unwrap();
    Study::load(&path, &[])
}

#[test]
fn layers_of_a_study() {
    let study = load(GOOD).unwrap();
    assert_eq!((study.output.as_str(), study.seeds, study.alpha), ("studies/s-t", 10, 0.05));
    let cells = study.cells();
    let config = study.config(cells[0]).unwrap();
    assert_eq!((config.train.epochs, config.data.img_size, config.optim.lr), (3, 48, 0.5));
    assert_eq!(study.config(cells[1]).unwrap().optim.lr, Config::default().optim.lr);
    assert_eq!(study.baseline(cells[0]), None);
    assert_eq!(study.baseline(cells[1]), Some(cells[0]));
    assert_eq!(study.rungs(cells[0]).unwrap(), [3]);
}

#[test]
fn what_is_wrong_with_a_study_is_said() {
    let with = |from: &str, to: &str| GOOD.replacen(from, to, 1);
    for (text, expected) in [
        (with("name = \"s t\"", "name = \"s\"\nsedes = 3"), "study.toml:2: unknown field `sedes`"),
        (with("name = \"s t\"", "name = \"s\"\nseeds = 1"), "seeds = 1: must be at least 2"),
        (with("name = \"s t\"", "name = \"s\"\nalpha = 5.0"), "alpha = 5"),
        (
            with("epochs = 3", "epoch = 3"),
            "config: unknown key `train.epoch`; did you mean `train.epochs`?",
        ),
        (with("epochs = 3", "epochs = \"x\""), "config: train.epochs: invalid type"),
        (with("img_size = 48", "img_size = 4"), "data.img_size"),
        (with("lr = 0.5", "lrr = 0.5"), "config of the model \"plain\": unknown key `optim.lrr`"),
        (with("\"ga\"", "\"plain\""), "[[models]] name = \"plain\": names must be unique"),
        (with("\"resnet18+ga@4\"", "\"resnet18+gaga@4\""), "gaga"),
        (with("spec = \"resnet18\"", "spec = []"), "spec is an empty list"),
        (
            format!("{GOOD}baseline = \"plian\"\n"),
            "model \"ga\": baseline \"plian\" is none of the study's",
        ),
        (
            format!("{GOOD}datasets = [\"x\"]\n"),
            "model \"ga\": data set \"x\" is none of the study's",
        ),
        (
            format!("{GOOD}[search]\nepochs = [3, 1]\n"),
            "[search] epochs must be numbers above 0 that grow",
        ),
        (format!("{GOOD}[search]\ntrials = 0\n"), "[search] trials must be at least 1"),
        (format!("{GOOD}[search.space]\n\"optim.lrr\" = [1.0]\n"), "did you mean `optim.lr`?"),
        (with("[[datasets]]", "[[dataset]]"), "study.toml:4: unknown field `dataset`"),
    ] {
        let error = load(&text).expect_err(&text).to_string();
        assert!(error.contains(expected) && error.contains("study.toml"), "{expected}: {error}");
    }
    let error = Study::load(Path::new("no/such.toml"), &[]).unwrap_err().to_string();
    assert!(error.starts_with("no/such.toml: "), "{error}");
}

#[test]
fn assignments_reach_every_part() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("study.toml");
    std::fs::write(&path, format!("{GOOD}[search.space]\n\"optim.lr\" = [0.1]\n")).unwrap();
    let load = |words: &[&str]| {
        Study::load(&path, &words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>())
    };
    let study = load(&[
        "seeds=3",
        "search.epochs=[1, 2]",
        "search.space.optim.lr=[0.5]",
        "config.train.batch_size = 8",
        "datasets.d.config.data.path=some/where",
        "models.ga.spec=resnet34",
    ])
    .unwrap();
    assert_eq!((study.seeds, &*study.search.epochs), (3, &[1, 2][..]));
    assert_eq!(study.search.space["optim.lr"], Space::Choice(vec![Value::Float(0.5)]));
    let config = study.config(study.cells()[1]).unwrap();
    assert_eq!(
        (config.train.batch_size, &*config.data.path, &*config.model.name),
        (8, "some/where", "resnet34")
    );
    for (word, expected) in [
        ("seeds", "--set seeds: expected key=value"),
        ("sedes=3", "--set sedes=3: unknown field `sedes`"),
        ("seeds=many", "--set seeds=many: invalid type"),
        ("seeds.x=1", "there is no key \"x\" below a value"),
        ("datasets.e.config.data.path=x", "none of the names d"),
        ("config.data.pth=x", "unknown key `data.pth`"),
    ] {
        let error = load(&[word]).expect_err(word).to_string();
        assert!(error.contains(expected), "{word}: {error}");
    }
}

#[test]
fn some_of_the_models() {
    let text = format!(
        "{GOOD}[[models]]\nname = \"b0\"\nspec = \"efficientnet_b0\"\n[[models]]\nname = \"b0 ga\"\nspec = \"efficientnet_b0+ga@7\"\nbaseline = \"b0\"\n"
    );
    let names = |only: &[&str]| -> Result<Vec<String>> {
        let study = load(&text)?.only(&only.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>())?;
        Ok(study.models.into_iter().map(|m| m.name).collect())
    };
    assert_eq!(names(&[]).unwrap(), ["plain", "ga", "b0", "b0 ga"]);
    assert_eq!(names(&["b0 ga"]).unwrap(), ["b0", "b0 ga"]);
    assert_eq!(names(&["ga"]).unwrap(), ["plain", "ga"]);
    let error = names(&["gaga"]).unwrap_err().to_string();
    assert!(
        error.contains("--only \"gaga\": the study's models are plain, ga, b0, b0 ga"),
        "{error}"
    );
}
