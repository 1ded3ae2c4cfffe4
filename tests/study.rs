//! Studies as processes: they end with a report, whatever is killed meanwhile and however many work on them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// Two models on pictures so few and small that a trial takes well under a second: 4 + 2 settings and 3 seeds each.
const STUDY: &str = r#"
name = "tiny"
seeds = 3

[search]
trials = 4
epochs = [1, 2]
eta = 2

[search.space]
"optim.lr" = { from = 1e-3, to = 1e-1, log = true }
"optim.weight_decay" = { from = 1e-6, to = 1e-2, log = true }
"augment.policy" = ["none", "flips"]

[config.data]
img_size = 16
synthetic_count = 90
synthetic_size = 32
val_fraction = 0.3
test_fraction = 0.3

[config.train]
epochs = 2
batch_size = 16
device = "cpu"
checkpoint_every = 1

[[datasets]]
name = "long range"
config.data = { path = "synthetic:longrange" }

[[models]]
name = "plain"
spec = "resnet18:w8,stages=1,stem=small"

[[models]]
name = "GA"
spec = ["resnet18:w8,stages=1,stem=small+ga@1:heads=1", "resnet18:w8,stages=1,stem=small+ga@1:heads=2"]
"#;
const TRIALS: usize = 18;

struct Place {
    _root: tempfile::TempDir,
    config: PathBuf,
    folder: PathBuf,
}

fn place(study: &str) -> Place {
    let root = tempfile::tempdir().expect("a temporary directory");
    let (config, folder) = (root.path().join("tiny.toml"), root.path().join("out"));
    fs::write(&config, study).expect("written");
    Place { _root: root, config, folder }
}

fn command(place: &Place, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attn2d"));
    command.arg("study").arg(&place.config).arg("--output").arg(&place.folder).args(words);
    command
}

fn study(place: &Place, words: &[&str]) -> Output {
    command(place, words).output().expect("the program starts")
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

fn start(place: &Place, words: &[&str]) -> Child {
    command(place, words)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts")
}

/// Everything that a finished study says of its models, which is the same however it was come by: files by name.
fn results(folder: &Path) -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    for name in ["models.csv", "seeds.csv", "search.csv", "comparisons.csv"] {
        files.insert(name.to_owned(), fs::read_to_string(folder.join(name)).expect(name));
    }
    for entry in fs::read_dir(folder.join("trials")).expect("trials") {
        let dir = entry.expect("an entry").path();
        for name in ["summary.json", "metrics.csv"] {
            let text = fs::read_to_string(dir.join(name)).expect(name);
            files.insert(format!("{}/{name}", dir.file_name().unwrap().to_string_lossy()), text);
        }
    }
    files
}

/// How often a run was started or taken up again in each trial's directory.
fn starts(folder: &Path) -> Vec<usize> {
    let trials = fs::read_dir(folder.join("trials")).expect("trials");
    let log = |entry: std::io::Result<fs::DirEntry>| {
        fs::read_to_string(entry.expect("an entry").path().join("log.txt")).expect("a log")
    };
    trials.map(|entry| log(entry).lines().filter(|line| line.starts_with("$ ")).count()).collect()
}

#[test]
fn a_study_ends_with_a_report_and_is_then_done() {
    let place = place(STUDY);
    let list = succeeds(&study(&place, &["--list"]));
    assert_eq!(list.lines().count(), TRIALS + 2, "{list}");
    assert_eq!(list.matches("ready").count(), 8, "{list}");
    assert!(!place.folder.exists(), "a list makes nothing");
    let said = succeeds(&study(&place, &[]));
    assert!(said.contains("18 trials run, 0 failed, 0 open"), "{said}");
    let list = succeeds(&study(&place, &["--list"]));
    assert_eq!(list.matches("done").count(), TRIALS, "{list}");
    for name in ["report.html", "report.md", "models.csv", "seeds.csv", "study.toml"] {
        assert!(fs::metadata(place.folder.join(name)).is_ok_and(|file| file.len() > 0), "{name}");
    }
    let seeds = fs::read_to_string(place.folder.join("seeds.csv")).expect("seeds");
    assert!(seeds.contains("test"), "{seeds}");
    let said = succeeds(&study(&place, &[]));
    assert!(said.contains("0 trials run, 0 failed, 0 open"), "{said}");
    assert_eq!(starts(&place.folder), [1; TRIALS]);
    // Runs of the search know nothing of the test part; those that judge do.
    let mut judged = 0;
    for entry in fs::read_dir(place.folder.join("trials")).expect("trials") {
        let dir = entry.expect("an entry").path();
        let config = fs::read_to_string(dir.join("config.toml")).expect("a config");
        let sealed = config.contains("seal_test = true");
        assert_eq!(dir.join("predictions_test.csv").exists(), !sealed, "{}", dir.display());
        assert_eq!(dir.join("best").exists(), !sealed, "weights of the search are not kept");
        judged += usize::from(!sealed);
    }
    assert_eq!(judged, 6);
}

#[test]
fn killed_ten_times_it_ends_with_the_same_table() {
    let alone = place(STUDY);
    succeeds(&study(&alone, &[]));
    let killed = place(STUDY);
    // Moments of no pattern, from the first start of a trial into the middle of many.
    for i in 0..10_u64 {
        let mut child = start(&killed, &["--workers", "2"]);
        std::thread::sleep(Duration::from_millis(150 + i * 7919 % 1300));
        // On Unix this is signal 9.
        child.kill().expect("killed");
        child.wait().expect("gone");
    }
    succeeds(&study(&killed, &["--workers", "2"]));
    assert_eq!(results(&alone.folder), results(&killed.folder));
    assert!(starts(&killed.folder).iter().sum::<usize>() > TRIALS, "no kill ever met a trial");
}

#[test]
fn two_workers_do_each_trial_once() {
    let alone = place(STUDY);
    succeeds(&study(&alone, &["--workers", "3"]));
    let shared = place(STUDY);
    let mut both = [start(&shared, &["--workers", "2"]), start(&shared, &[])];
    for child in &mut both {
        assert!(child.wait().expect("ends").success());
    }
    assert_eq!(starts(&shared.folder), [1; TRIALS]);
    assert_eq!(results(&alone.folder), results(&shared.folder));
}

#[test]
fn one_trial_of_the_list_with_what_it_needs() {
    let place = place(STUDY);
    // The last seed of the second model: its whole search, and nothing of the first model.
    let said = succeeds(&study(&place, &["--index", "17"]));
    assert!(said.contains("7 trials run, 0 failed, 11 open"), "{said}");
    let output = study(&place, &["--index", "18"]);
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("--index 18: the study has 18 trials"), "{error}");
    // An array job: every index, several at a time, in any order.
    let mut tasks: Vec<Child> = [16, 3, 9, 8, 0, 15]
        .iter()
        .map(|i: &usize| start(&place, &["--index", &i.to_string()]))
        .collect();
    for task in &mut tasks {
        assert!(task.wait().expect("ends").success());
    }
    let said = succeeds(&study(&place, &[]));
    assert!(said.contains(" 0 failed, 0 open"), "{said}");
    assert_eq!(starts(&place.folder), [1; TRIALS]);
}

#[test]
fn a_trial_that_fails_is_written_down_and_the_rest_goes_on() {
    let text = STUDY.replace("{ from = 1e-3, to = 1e-1, log = true }", "[1e30, 1e-2]").replace(
        "[config.train]",
        "[config.sched]\nwarmup_epochs = 0.0\n[config.optim]\nname = \"sgd\"\n[config.train]",
    );
    let place = place(&text);
    let said = succeeds(&study(&place, &[]));
    assert!(said.contains("FAILED: training: "), "{said}");
    let list = succeeds(&study(&place, &["--list"]));
    let failed = list.matches("failed").count();
    assert!((1..8).contains(&failed), "{list}");
    assert!(said.contains(&format!("{failed} failed, 0 open")), "{said}");
    let report = fs::read_to_string(place.folder.join("report.md")).expect("a report");
    assert!(report.contains("is NaN; try a lower --lr"), "{report}");
    let said = succeeds(&study(&place, &["--retry-failed"]));
    assert!(said.contains(&format!("{failed} trials run, {failed} failed, 0 open")), "{said}");
    // Where all of a model's settings fail, the study says so and its exit status too.
    let text = text.replace("[1e30, 1e-2]", "[1e30, 1e31]");
    let hopeless = self::place(&text);
    let output = study(&hopeless, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(hopeless.folder.join("report.html").exists());
}

#[cfg(unix)]
#[test]
fn a_full_disk_stops_a_study_and_counts_against_no_model() {
    let place = place(STUDY);
    // No file may grow beyond 8 KiB, less than a checkpoint: every write past it fails, as on a full disk.
    let program = env!("CARGO_BIN_EXE_attn2d");
    let (config, folder) = (&place.config, &place.folder);
    let line = format!(
        "trap '' XFSZ; ulimit -f 16; exec {program:?} study {config:?} --output {folder:?}"
    );
    let output = Command::new("sh").args(["-c", &line]).output().expect("sh");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("File too large") && error.contains("no fault of the model"), "{error}");
    let said = succeeds(&study(&place, &[]));
    assert!(said.contains("18 trials run, 0 failed, 0 open"), "{said}");
}

#[test]
fn a_damaged_split_is_not_used() {
    let place = place(STUDY);
    succeeds(&study(&place, &["--index", "0"]));
    let data = fs::read_dir(place.folder.join("data")).expect("data").next().expect("one");
    let split = data.expect("an entry").path().join("split.csv");
    let text = fs::read_to_string(&split).expect("a split");
    let lines: Vec<&str> = text.lines().collect();
    fs::write(&split, lines[..40].join("\n") + "\n").expect("cut");
    let output = study(&place, &["--index", "1"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("split.csv: lists 39 images of 90: it is damaged"), "{error}");
}

#[test]
fn what_cannot_run_is_said_before_any_trial() {
    let with = |from: &str, to: &str| STUDY.replacen(from, to, 1);
    for (text, expected) in [
        (with("synthetic:longrange", "no/such/folder"), "no/such/folder"),
        (with("val_fraction = 0.3", "val_fraction = 0.0"), "set data.val_fraction above 0"),
        (with("device = \"cpu\"", "device = \"abacus\""), "abacus"),
        (
            with("spec = \"resnet18:w8,stages=1,stem=small\"", "spec = \"vit_ti_16:patch=15\""),
            "plain on long range: ",
        ),
    ] {
        let place = place(&text);
        let output = study(&place, &[]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{expected}");
        assert!(error.starts_with("error: ") && error.contains(expected), "{error}");
        assert!(!place.folder.join("trials").exists(), "{expected}");
    }
}

/// Needs Optuna's program, by name in `ATTN2D_OPTUNA` or on the path. Where it is not there the test says so; with `ATTN2D_DEMAND_OPTUNA` it
/// fails.
#[test]
fn settings_asked_of_optuna() {
    let program = std::env::var("ATTN2D_OPTUNA").unwrap_or_else(|_| "optuna".into());
    let there = Command::new(&program).arg("--version").output().is_ok_and(|o| o.status.success());
    if !there {
        assert!(std::env::var_os("ATTN2D_DEMAND_OPTUNA").is_none(), "no Optuna at {program:?}");
        eprintln!(
            "SKIPPED: no Optuna at {program:?} (pip install optuna, or ATTN2D_OPTUNA=path/to/optuna)"
        );
        return;
    }
    let place = place(STUDY);
    let command = format!("search.optuna.command={program}");
    let words =
        ["--only", "plain", "--set", &command, "--set", "search.trials=2", "--set", "seeds=2"];
    let list = succeeds(&study(&place, &[&words[..], &["--list"]].concat()));
    assert_eq!(list.matches("to be asked for").count(), 2, "{list}");
    // Killed at some point between asking, training and telling.
    let mut child = start(&place, &words);
    std::thread::sleep(Duration::from_millis(4500));
    child.kill().expect("killed");
    child.wait().expect("gone");
    let said = succeeds(&study(&place, &words));
    assert!(said.contains("0 failed, 0 open"), "{said}");
    let storage = format!("sqlite:///{}", place.folder.join("optuna.db").display());
    let optuna = |words: &[&str]| -> Vec<serde_json::Value> {
        let always = ["--storage", &storage, "--format", "json"];
        let output = Command::new(&program).args(words).args(always).output().expect("Optuna");
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    let studies = optuna(&["studies"]);
    let name = studies[0]["name"].as_str().expect("a name");
    assert!(studies.len() == 1 && name.starts_with("tiny / long range / plain / "), "{studies:?}");
    let trials = optuna(&["trials", "--study-name", name]);
    let complete: Vec<f64> = trials
        .iter()
        .filter(|t| t["state"] == "COMPLETE")
        .map(|t| t["value"].as_f64().expect("a value"))
        .collect();
    assert_eq!(complete.len(), 2, "{trials:?}");
    let list = succeeds(&study(&place, &[&words[..], &["--list"]].concat()));
    for value in complete {
        assert!(list.contains(&format!("done {value:.3}")), "{value} in {list}");
    }
}

#[test]
fn the_studies_that_come_with_the_program_are_sound() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let mut names = Vec::new();
    for entry in fs::read_dir(&folder).expect("configs") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if name == "default" {
            continue; // settings of a run
        }
        let output = Command::new(env!("CARGO_BIN_EXE_attn2d"))
            .arg("study")
            .arg(&path)
            .arg("--list")
            .output();
        let list = succeeds(&output.expect("the program starts"));
        assert!(list.lines().count() > 100, "{name}: {list}");
        names.push(name);
    }
    names.sort();
    assert_eq!(names, ["camelyon17", "isic2017", "medmnist", "pcam", "quick"]);
}
