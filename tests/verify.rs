//! `attn2d verify` as its users meet it: what passes, what fails, and the words for it.

use attn2d::verify::{Options, Outcome, run};
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Writes a case file of f32 tensors.
fn write(path: &Path, metadata: &[(&str, &str)], tensors: &[(&str, &[usize], &[f32])]) {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|t| t.2.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|(t, b)| (t.0, TensorView::new(Dtype::F32, t.1.to_vec(), b).unwrap()));
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    std::fs::write(path, serialize(views, Some(metadata)).unwrap()).unwrap();
}

/// A case of relu on the CPU: x = [-1, 2], upstream gradient [3, 4].
fn relu(metadata: &[(&str, &str)], y: &[f32], dx: &[f32]) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("case.safetensors");
    write(
        &path,
        metadata,
        &[
            ("in.x", &[2], &[-1.0, 2.0]),
            ("out.y", &[y.len()], y),
            ("gout.y", &[2], &[3.0, 4.0]),
            ("gin.x", &[2], dx),
        ],
    );
    files(vec![path])
}

fn files(cases: Vec<PathBuf>) -> Outcome {
    let options =
        Options { devices: "cpu".into(), op: Some("relu".into()), cases, ..Options::default() };
    run(&options, &mut |_| {}).unwrap()
}

/// The one failure of an outcome.
fn failure(outcome: &Outcome) -> String {
    assert!(!outcome.passed());
    let failures: Vec<_> = outcome.failures().collect();
    assert_eq!(failures.len(), 1, "{outcome}");
    failures[0].failure.clone().unwrap()
}

#[test]
fn a_right_case_passes() {
    let outcome = relu(&[("op", "relu"), ("attrs", "{}")], &[0.0, 2.0], &[0.0, 4.0]);
    assert!(outcome.passed(), "{outcome}");
    assert!(
        outcome.records.iter().any(|r| r.case == "case" && r.device == "cpu" && r.error == 0.0)
    );
    assert!(outcome.to_string().contains("relu"), "{outcome}");
}

#[test]
fn a_wrong_output_gradient_or_shape_fails_and_is_named() {
    let meta = [("op", "relu")];
    assert!(failure(&relu(&meta, &[0.0, 2.1], &[0.0, 4.0])).starts_with("y[1] is 2.0"));
    assert!(failure(&relu(&meta, &[0.0, 2.0], &[0.1, 4.0])).starts_with("the gradient of x[0]"));
    assert!(
        failure(&relu(&meta, &[0.0, 2.0, 0.0], &[0.0, 4.0])).contains("shape [2], expected [3]")
    );
    let tolerant = [("op", "relu"), ("rtol", "0.1"), ("atol", "0.2")];
    assert!(relu(&tolerant, &[0.0, 2.1], &[0.1, 4.0]).passed());
}

#[test]
fn what_nobody_knows_is_a_failure_by_name() {
    let right = ([0.0, 2.0], [0.0, 4.0]);
    let attrs = relu(&[("op", "relu"), ("attrs", r#"{"slope": 0.1}"#)], &right.0, &right.1);
    assert!(failure(&attrs).contains("unknown attribute 'slope'"));
    assert!(
        failure(&relu(&[("op", "relu"), ("attrs", "slope")], &right.0, &right.1))
            .contains("not a JSON object")
    );
    assert!(
        failure(&relu(&[("op", "relu"), ("rtol", "tight")], &right.0, &right.1))
            .contains("'rtol' is 'tight'")
    );
    assert!(failure(&relu(&[("author", "me")], &right.0, &right.1)).contains("no 'op'"));

    let dir = tempfile::tempdir().unwrap();
    let one: (&[usize], &[f32]) = (&[1], &[1.0]);
    for (i, (names, words)) in [
        (["in.x", "out.z"], "unknown tensor 'out.z'"),
        (["in.q", "out.y"], "unknown tensor 'in.q'"),
        (["gout.y", "out.y"], "'in.x' is missing"),
        (["in.x", "gin.x"], "need the upstream gradient 'gout.y'"),
        (["in.x", "gout.y"], "nothing to check"),
        (["in.x", "y"], "names begin with"),
        (["in.x", "state.fc"], "only 'model' cases"),
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(format!("{i}.safetensors"));
        write(&path, &[("op", "relu")], &names.map(|name| (name, one.0, one.1)));
        let message = failure(&files(vec![path]));
        assert!(message.contains(words), "{names:?}: {message}");
    }
}

/// A model's case file must be whole too; that right ones pass and are compared is for `tests/golden.rs`.
#[test]
fn what_is_wrong_with_a_model_case_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let image: (&[usize], &[f32]) = (&[1, 3, 1, 1], &[0.0; 3]);
    let one: (&[usize], &[f32]) = (&[1], &[0.0]);
    let attrs = r#"{"model": "resnet18:w1,stages=1,stem=small", "num_classes": 2}"#;
    let meta = [("op", "model"), ("attrs", attrs)];
    for (i, (extra, words)) in [
        (vec![("out.loss", one)], "'in.labels' is missing"),
        (vec![("in.labels", one), ("in.mask", one)], "unknown tensor 'in.mask'"),
        (vec![("in.labels", one), ("gout.loss", one)], "unknown tensor 'gout.loss'"),
        (vec![("in.labels", one)], "nothing to check"),
        (vec![("in.labels", one), ("out.loss", one)], "conv1.weight"),
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(format!("{i}.safetensors"));
        let mut tensors = vec![("in.image", image.0, image.1)];
        tensors.extend(extra.iter().map(|(name, t)| (*name, t.0, t.1)));
        write(&path, &meta, &tensors);
        let options = Options {
            devices: "cpu".into(),
            cases: vec![path],
            no_builtin: true,
            ..Options::default()
        };
        let message = failure(&run(&options, &mut |_| {}).unwrap());
        assert!(message.contains(words), "{words}: {message}");
    }
}

#[test]
fn an_unknown_op_fails_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("case.safetensors");
    write(&path, &[("op", "relux")], &[("in.x", &[1], &[1.0]), ("out.y", &[1], &[1.0])]);
    let options = Options { devices: "cpu".into(), cases: vec![path], ..Options::default() };
    let outcome = run(&options, &mut |_| {}).unwrap();
    let failed: Vec<_> = outcome.failures().filter(|r| r.op == "relux").collect();
    assert_eq!(failed.len(), 1);
    assert!(
        failed[0]
            .failure
            .as_ref()
            .is_some_and(|f| f.contains("unknown op 'relux'") && f.contains("relu"))
    );
    assert!(
        !outcome.passed() && outcome.to_string().contains("FAIL relux, case 'case'"),
        "{outcome}"
    );
}

#[test]
fn a_damaged_file_is_one_failure_and_the_rest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("b_whole.safetensors");
    write(
        &whole,
        &[("op", "relu")],
        &[("in.x", &[3], &[1.0, -1.0, 2.0]), ("out.y", &[3], &[1.0, 0.0, 2.0])],
    );
    let bytes = std::fs::read(&whole).unwrap();
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let damaged = [
        &bytes[..0],
        &bytes[..5],
        &bytes[..60],
        &bytes[..bytes.len() - 1],
        &huge,
        b"not a case at all",
    ];
    for (i, content) in damaged.iter().enumerate() {
        std::fs::write(dir.path().join(format!("a{i}.safetensors")), content).unwrap();
    }
    let outcome = files(vec![dir.path().to_path_buf()]);
    assert_eq!(outcome.failures().count(), damaged.len());
    for r in outcome.failures() {
        let words = r.failure.as_deref().unwrap();
        assert!(words.contains("not a whole safetensors file") && !words.contains('\n'), "{words}");
    }
    assert!(outcome.records.iter().any(|r| r.case == "b_whole" && r.failure.is_none()));

    let (devices, op, cases) = ("cpu".into(), Some("relu".into()), vec![dir.path().into()]);
    let first = Options { devices, op, cases, fail_fast: true, ..Options::default() };
    let outcome = run(&first, &mut |_| {}).unwrap();
    assert_eq!(outcome.failures().count(), 1, "it stops there: {outcome}");
    assert!(outcome.records.iter().any(|r| r.failure.is_none()), "what came before is told");
    assert!(outcome.records.iter().all(|r| r.case != "b_whole"));
}

#[test]
fn paths_ops_and_devices_that_are_not_there_are_errors() {
    let fails = |options: Options| run(&options, &mut |_| {}).unwrap_err().to_string();
    let cpu = || Options { devices: "cpu".into(), op: Some("relu".into()), ..Options::default() };
    assert!(
        fails(Options { cases: vec!["no/such/folder".into()], ..cpu() }).contains("no/such/folder")
    );
    let empty = tempfile::tempdir().unwrap();
    assert!(
        fails(Options { cases: vec![empty.path().into()], ..cpu() }).contains("no *.safetensors")
    );
    assert!(fails(Options { op: Some("reloo".into()), ..cpu() }).contains("unknown op 'reloo'"));
    assert!(
        fails(Options { devices: "cpu,vulkan".into(), ..cpu() })
            .contains("unknown device 'vulkan'")
    );
    assert!(fails(Options { devices: "cuda:99".into(), ..cpu() }).contains("no device to verify"));
}

#[test]
fn an_absent_device_is_skipped_by_name_or_fails_where_required() {
    let relu =
        Options { devices: "cpu,cuda:99".into(), op: Some("relu".into()), ..Options::default() };
    let outcome = run(&relu, &mut |_| {}).unwrap();
    assert!(outcome.passed() && outcome.skipped[0].0 == "cuda:99", "{outcome}");
    let outcome = run(&Options { require: "cpu,cuda:99".into(), ..relu }, &mut |_| {}).unwrap();
    assert!(!outcome.passed() && outcome.absent == ["cuda:99"]);
    assert!(outcome.to_string().contains("FAIL required device cuda:99"), "{outcome}");
}

#[test]
fn the_outcome_is_written_as_json() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("outcome.json");
    let options = Options {
        devices: "cpu".into(),
        op: Some("relu".into()),
        json: Some(json.clone()),
        ..Options::default()
    };
    let outcome = run(&options, &mut |_| {}).unwrap();
    let value: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(value["passed"], true);
    assert_eq!(value["records"].as_array().unwrap().len(), outcome.records.len());
    assert_eq!(value["records"][0]["op"], "relu");
    assert_eq!(value["devices"][0]["name"], "cpu");
}

#[test]
fn the_program_prints_the_table_and_its_exit_code_tells() {
    let program = |args: &[&str]| {
        let out = std::process::Command::new(env!("CARGO_BIN_EXE_attn2d"))
            .arg("verify")
            .args(args)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (out.status.code(), text(&out.stdout), text(&out.stderr))
    };
    let (code, table, _) = program(&["--device", "cpu", "--op", "relu"]);
    assert!(code == Some(0) && table.contains("relu  ") && table.contains("passed"), "{table}");

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("wrong.safetensors");
    write(&path, &[("op", "relu")], &[("in.x", &[1], &[1.0]), ("out.y", &[1], &[2.0])]);
    let (code, table, _) =
        program(&["--device", "cpu", "--op", "relu", "--cases", path.to_str().unwrap()]);
    assert!(code == Some(1) && table.contains("FAIL relu on cpu, case 'wrong'"), "{table}");

    let (code, _, error) = program(&["--device", "cpu", "--op", "reloo"]);
    assert!(code == Some(2) && error.starts_with("error: unknown op 'reloo'"), "{error}");
    let (code, table, _) = program(&["--device", "cpu", "--op", "relu", "--require", "cuda:99"]);
    assert!(code == Some(1) && table.contains("FAIL required device cuda:99"), "{table}");
}
