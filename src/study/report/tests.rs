//! Reports of made-up studies of many shapes.

use std::fs;
use std::path::Path;

use super::write;
use crate::study::example_tests::{Example, Made};
use crate::study::results::Results;

const LONG: &str = "resnet18 with global attention at every stage and a name that no column is wide enough for, second variant";

/// Studies by name: an ordinary one, one with little, one with much of everything, one that has only begun.
fn studies(dir: &Path) -> Vec<(&'static str, Results)> {
    let ordinary: [Made; 4] = [
        ("plain", None, 0.80, 0.70),
        ("GA", Some(0), 0.90, 0.70),
        ("LA", Some(0), 0.805, 0.69),
        ("LESA", Some(0), 0.76, 0.6),
    ];
    let example = |name, models| Example {
        name,
        classes: 2,
        models,
        seeds: 10,
        holdout: false,
        images: 60,
        spread: 0.015,
        dir: Some(dir),
        seed: 1,
    };
    let mut whole = Example { classes: 3, ..example("built-in pictures", &ordinary) }.results();
    whole.datasets.push(
        Example { holdout: true, classes: 7, images: 20, ..example("two hospitals", &ordinary) }
            .data(),
    );
    let mut failing = Example { seeds: 2, ..example("little", &ordinary[..2]) }.results();
    failing.datasets[0].models[1].runs[0].scores = Err("the process was killed <3 times>".into());
    let many: Vec<Made> = (0..10)
        .map(|i| {
            (if i == 3 { LONG } else { ["a", "b", "c"][i % 3] }, (i > 0).then_some(0), 0.5, 0.5)
        })
        .collect();
    let mut large =
        Example { seeds: 60, classes: 30, images: 3, ..example("large", &many) }.results();
    for i in 0..9 {
        let name = ["one", "two", "three", LONG][i % 4];
        large.datasets.push(example(name, &ordinary[..2]).data());
    }
    let mut begun = example("begun", &ordinary).results();
    begun.open = 76;
    let data = &mut begun.datasets[0];
    (data.classes, data.images) = (Vec::new(), Vec::new());
    for model in &mut data.models {
        model.runs.clear();
        model.tried.clear();
        (model.winner, model.parameters, model.flop) = (None, 0, 0.0);
    }
    let mut alone = Example { seeds: 3, ..example("alone", &ordinary[..1]) }.results();
    alone.about = "A model without a baseline.".into();
    vec![
        ("whole", whole),
        ("failing", failing),
        ("large", large),
        ("begun", begun),
        ("alone", alone),
    ]
}

fn read(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

const FILES: [&str; 7] = [
    "report.html",
    "report.md",
    "models.csv",
    "seeds.csv",
    "search.csv",
    "comparisons.csv",
    "costs.csv",
];

#[test]
fn reports_of_many_shapes() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    // For a look at them: ATTN2D_KEEP_REPORTS=DIR scripts/look_at_report
    let keep = std::env::var_os("ATTN2D_KEEP_REPORTS").map(std::path::PathBuf::from);
    let reports = keep.unwrap_or_else(|| dir.path().join("reports"));
    for (name, results) in studies(dir.path()) {
        let out = reports.join(name);
        fs::create_dir_all(&out).expect("a directory");
        let verdict = write(&results, &out).expect("written");
        let page = read(&out, "report.html");
        for file in FILES {
            let text = read(&out, file);
            for bad in ["NaN", "inf,", ",inf", "None", "Some("] {
                assert!(!text.contains(bad), "{name}: {bad} in {file}");
            }
        }
        let first = verdict.lines().next().expect("a verdict");
        let (head, _) = page.split_once("<h2>Models</h2>").expect("models come after the verdict");
        assert!(
            head.contains("<h2>Verdict</h2>") && head.contains(&crate::html::escape(first)),
            "{name}"
        );
        // Nothing from outside, and every figure has a name and a description.
        for word in ["src=", "href=", "@import", "url(", "<script"] {
            assert!(!page.contains(word), "{name}: {word}");
        }
        let count = |what: &str| page.matches(what).count();
        assert_eq!(count("<svg"), count("</title>\n<desc>"), "{name}");
        assert!(count("<section>") >= 4, "{name}");
    }
}

#[test]
fn the_files_say_what_was_found() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (_, results) = studies(dir.path()).swap_remove(0);
    let verdict = write(&results, dir.path()).expect("written");
    assert!(
        verdict.contains(
            "GA is significantly better than plain on built-in pictures in distribution (test): by"
        ),
        "{verdict}"
    );
    let page = read(dir.path(), "report.html");
    // 4 models: dots and cost charts of each data set, curves and matrices of each model and part.
    assert_eq!(page.matches("<svg").count(), 3 + 8 + 4 + 12);
    for text in [
        "choices of this study",
        "search, setting 8 for 2 epochs",
        "cpu (made up)",
        "/study.toml --output AGAIN",
    ] {
        assert!(page.contains(text) && read(dir.path(), "report.md").contains(text), "{text}");
    }
    let rows = |name: &str| -> Vec<Vec<String>> {
        let text = read(dir.path(), name);
        let mut reader =
            ::csv::ReaderBuilder::new().has_headers(false).from_reader(text.as_bytes());
        reader.records().map(|r| r.expect("a row").iter().map(String::from).collect()).collect()
    };
    let column = |rows: &[Vec<String>], name: &str| {
        rows[0].iter().position(|c| c == name).unwrap_or_else(|| panic!("column {name}"))
    };
    let models = rows("models.csv");
    assert_eq!(models.len(), 1 + 8);
    let (mean, p) = (column(&models, "id_mean"), column(&models, "ood_p_holm"));
    let scores = results.datasets[1].models[1].runs.iter().map(|run| {
        let parts = &run.scores.as_ref().expect("scores").parts;
        parts.iter().find(|p| p.part == "id_test").expect("a part").balanced_accuracy.expect("one")
    });
    let scores: Vec<f64> = scores.collect();
    let expected = scores.iter().sum::<f64>() / scores.len() as f64;
    let got: f64 = models[6][mean].parse().expect("a number");
    assert!((got - expected).abs() < 1e-12);
    assert!(models[1][p].is_empty() && !models[6][p].is_empty());
    // 10 seeds of 4 models, 2 parts and 3; 13 trials of a search; 3 + 2 * 3 comparisons.
    assert_eq!(rows("seeds.csv").len(), 1 + 40 * 2 + 40 * 3);
    assert_eq!(rows("search.csv").len(), 1 + 8 * 13);
    assert_eq!(rows("comparisons.csv").len(), 1 + 9);
    assert_eq!(rows("costs.csv").len(), 1 + 8 * (13 + 10));
    let search = rows("search.csv");
    let won = column(&search, "won");
    assert_eq!(search.iter().filter(|row| row[won] == "true").count(), 8);
}

#[test]
fn times_are_in_a_file_of_their_own() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (_, results) = studies(dir.path()).swap_remove(0);
    write(&results, dir.path()).expect("written");
    let same = ["models.csv", "seeds.csv", "search.csv", "comparisons.csv"];
    let first = same.map(|file| read(dir.path(), file));
    let costs = read(dir.path(), "costs.csv");
    let mut slower = results.clone();
    for model in slower.datasets.iter_mut().flat_map(|d| &mut d.models) {
        model.tried.iter_mut().for_each(|t| t.seconds *= 2.0);
        for scores in model.runs.iter_mut().filter_map(|run| run.scores.as_mut().ok()) {
            (scores.step_ms, scores.seconds, scores.peak_bytes) = (1.0, 1.0, 1);
        }
    }
    write(&slower, dir.path()).expect("written");
    for (file, first) in same.iter().zip(&first) {
        assert!(read(dir.path(), file) == *first, "{file} differs");
    }
    assert!(read(dir.path(), "costs.csv") != costs);
}

#[test]
fn a_folder_that_is_not_there_is_an_error_with_the_file() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (_, results) = studies(dir.path()).swap_remove(4);
    let error = write(&results, &dir.path().join("no")).expect_err("no folder");
    assert!(error.to_string().contains("report.html"), "{error}");
}
