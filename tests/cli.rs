//! The program as its users meet it: help, and what it says when something is wrong.

use std::path::Path;
use std::process::{Command, Output};

fn attn2d(dir: &Path, words: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_attn2d");
    Command::new(program).args(words).current_dir(dir).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs words that must fail: the exit code, and the one line on the error stream.
#[track_caller]
fn fails(dir: &Path, words: &[&str], code: i32, expected: &[&str]) {
    let output = attn2d(dir, words);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{words:?}: {error}");
    let lines: Vec<&str> = error.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(lines.len(), 1, "one clear line: {error}");
    for part in expected {
        assert!(lines[0].contains(part), "{words:?}: expected {part:?} in {error}");
    }
    assert!(!error.contains("panicked"), "{error}");
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

#[test]
fn help_shows_verbs_flags_and_examples() {
    let dir = temporary();
    let help = text(&attn2d(dir.path(), &["--help"]).stdout);
    for verb in
        ["train", "eval", "predict", "export", "models", "data", "verify", "bench", "doctor"]
    {
        assert!(help.contains(verb), "{verb} in {help}");
    }
    let help = text(&attn2d(dir.path(), &["train", "--help"]).stdout);
    let flags = "--data --model --batch-size -b --epochs --lr --weight-decay --opt --sched --img-size --seed --device --output \
                 --resume --class-weights --workers -j --config --set --pretrained data-dir --precision --ema --clip-grad \
                 --freeze --warmup-epochs --min-lr";
    for flag in flags.split_whitespace().chain(["Examples:", "attn2d train --resume"]) {
        assert!(help.contains(flag), "{flag} in {help}");
    }
    for (verb, flags) in [
        ("eval", "--checkpoint --precision --raw-weights"),
        ("predict", "--checkpoint --out --device --precision --batch-size -b --skip-bad --logits"),
        ("export", "--checkpoint --out --raw-weights"),
    ] {
        let help = text(&attn2d(dir.path(), &[verb, "--help"]).stdout);
        for flag in flags.split_whitespace().chain(["Examples:"]) {
            assert!(help.contains(flag), "{verb}: {flag} in {help}");
        }
    }
}

#[test]
fn unknown_words_and_keys_name_the_nearest() {
    let dir = temporary();
    fails(dir.path(), &["trian"], 2, &["unrecognized subcommand 'trian'"]);
    let output = attn2d(dir.path(), &["train", "--batchsize", "3"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("'--batch-size'"), "{}", text(&output.stderr));
    fails(dir.path(), &["train", "--set", "optim.lrr=1"], 2, &["did you mean `optim.lr`?"]);
    fails(dir.path(), &["train", "--set", "train.epochs=many"], 2, &["--set train.epochs=many"]);
    std::fs::write(dir.path().join("a.toml"), "[train]\nepochs = 2\nbatchsize = 3\n")
        .expect("written");
    fails(
        dir.path(),
        &["train", "--config", "a.toml"],
        2,
        &["a.toml:3: unknown key `train.batchsize`; did you mean `train.batch_size`?"],
    );
    fails(
        dir.path(),
        &["train", "--config", "b.toml"],
        2,
        &["--config b.toml: there is no such file"],
    );
}

#[test]
fn what_no_run_can_have_is_refused_before_anything_is_written() {
    let dir = temporary();
    let small = "data.synthetic_count=60";
    let train = |words: &[&str], expected: &[&str]| {
        fails(
            dir.path(),
            &[&["train", "--device", "cpu", "--set", small], words].concat(),
            2,
            expected,
        );
    };
    train(&["--pretrained", ""], &["--pretrained"]);
    train(&["--output", ""], &["--output"]);
    train(&["--lr", "-1"], &["optim.lr = -1.0 must be a positive number"]);
    train(&["--model", "resnet19"], &["resnet19", "resnet18"]);
    train(&["--data", "no/such/data"], &["no/such/data"]);
    train(&["--data", "synthetic:dermascopy"], &["synthetic:dermoscopy"]);
    train(&["--device", "abacus"], &["abacus"]);
    train(&["--num-classes", "9"], &["model.num_classes = 9"]);
    train(&["--set", "augment.custom.hue=0.1"], &["augment.policy"]);
    train(&["--ema", "1"], &["train.ema = 1.0 must be at least 0 and below 1"]);
    train(&["--clip-grad", "-1"], &["optim.clip_grad = -1.0 must be finite and not negative"]);
    train(&["--freeze", "layer9.*,conv1"], &["freeze 'layer9.*'", "layer1"]);
    train(&["--freeze", "backbone,fc"], &["nothing is left to train"]);
    let one_value = ["resnet18 at 32x32", "'layer4.0.bn1'", "1x1", "--batch-size 2", "--img-size"];
    train(&["-b", "1", "--img-size", "32", "--model", "resnet18"], &one_value);
    train(&["--set", "train.precision=f8"], &["unknown variant `f8`", "`bf16`"]);
    train(&["--set", "train.freeze=layer1"], &["train.freeze=layer1", "list"]);
    fails(dir.path(), &["train", "--resume", "nowhere"], 2, &["nowhere: not a run directory"]);
    for words in [
        ["eval", "--checkpoint", "nowhere"].as_slice(),
        &["predict", "--checkpoint", "nowhere", "."],
        &["export", "--checkpoint", "nowhere", "--out", "x.safetensors"],
    ] {
        let expected =
            if words[0] == "predict" { ".: no pictures" } else { "nowhere: no checkpoint here" };
        fails(dir.path(), words, 2, &[expected]);
    }
    if ::attn2d::Device::new("wgpu").is_ok() {
        let words = ["train", "--device", "wgpu", "--precision", "bf16", "--set", small];
        fails(dir.path(), &words, 2, &["--precision bf16: wgpu", "use --precision f32"]);
    }
    let left = std::fs::read_dir(dir.path()).expect("read").count();
    assert_eq!(left, 0, "nothing is left behind by a run that could not begin");
}

#[test]
fn data_info_describes_the_built_in_data() {
    let dir = temporary();
    for words in [
        ["data", "info", "synthetic:longrange"].as_slice(),
        &["data", "info", "--data", "synthetic:longrange"],
    ] {
        let output = attn2d(dir.path(), words);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let said = text(&output.stdout);
        assert!(said.contains("longrange") && said.contains("train"), "{said}");
    }
    fails(dir.path(), &["data", "info", "no/such/data"], 2, &["no/such/data"]);
}

#[test]
fn models_are_listed_explained_and_counted() {
    let dir = temporary();
    let list = text(&attn2d(dir.path(), &["models"]).stdout);
    let row = |name: &str| {
        let line = list.lines().find(|l| l.split_whitespace().next() == Some(name));
        line.unwrap_or_else(|| panic!("no {name} in {list}")).to_owned()
    };
    assert!(row("resnet18").contains("11,689,512"), "{list}");
    assert!(row("resnet34").contains("21,797,672"), "{list}");
    assert!(row("resnet18+ga@3,4").contains("global attention"), "{list}");
    assert!(row("resnet18+ela7@3,4").contains("local"), "{list}");
    assert!(list.contains("Model strings") && list.contains("append"), "{list}");

    let one = text(&attn2d(dir.path(), &["models", "RESNET18+ga@4.0,4.1"]).stdout);
    assert!(one.starts_with("model      resnet18+ga@4\n"), "the canonical string: {one}");
    for part in ["stem", "stage 1", "stage 4", "attention", "head", "total", "8,570,408"] {
        assert!(one.contains(part), "{part} in {one}");
    }

    let words =
        ["models", "resnet18+ga@4:append", "--num-classes", "7", "--img-size", "64", "--json"];
    let json: serde_json::Value =
        serde_json::from_slice(&attn2d(dir.path(), &words).stdout).expect("JSON");
    assert_eq!(json["model"], "resnet18+ga@4:append");
    assert_eq!((&json["num_classes"], &json["img_size"]), (&7.into(), &64.into()));
    assert_eq!(json["parts"]["head"], 512 * 7 + 7);
    let parts = json["parts"].as_object().expect("parts");
    let sum: u64 = parts.values().filter_map(|v| v.as_u64()).sum();
    assert_eq!(json["parameters"], sum);
    let json: serde_json::Value =
        serde_json::from_slice(&attn2d(dir.path(), &["models", "--json"]).stdout).expect("JSON");
    assert_eq!(json["models"][0]["parameters"], 11_689_512);

    assert!(row("vit_ti_16").contains("5,717,416") && list.contains("efficientnet_b0+botnet@6,7"));
    let table = text(&attn2d(dir.path(), &["models", "describe", "resnet18+la7@4.1"]).stdout);
    let layer = table.lines().find(|l| l.contains("layer4.1.attn ")).expect("the attention's row");
    assert!(layer.starts_with("* ") && layer.contains("7x7 local attention, 8 heads"), "{layer}");
    // 49 places of 49 keys of 512 channels, 4 operations each.
    assert!(layer.contains("7x7x512") && layer.contains("4.9 M"), "{layer}");
    assert!(table.contains("plain nets of its size") && table.contains("  vit_"), "{table}");
    let words = ["models", "describe", "vit_tiny_patch16_224", "--num-classes", "2", "--json"];
    let json: serde_json::Value =
        serde_json::from_slice(&attn2d(dir.path(), &words).stdout).expect("JSON");
    let layers = json["layers"].as_array().expect("layers");
    let sum: u64 = layers.iter().filter_map(|l| l["parameters"].as_u64()).sum();
    assert_eq!((&json["parameters"], sum), (&sum.into(), 5_717_416 - 998 * 193));

    // 24 GB of parameters, counted in 2 GiB of addresses.
    if cfg!(unix) {
        let program = env!("CARGO_BIN_EXE_attn2d");
        let line = format!("ulimit -v 2097152; exec {program:?} models describe resnet50:w1024");
        let output = Command::new("sh").args(["-c", &line]).output().expect("sh");
        let wide = text(&output.stdout);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let total = wide.lines().find(|l| l.trim_start().starts_with("total")).expect("a total");
        assert!(total.contains("6,035,818,472"), "{total}");
    }

    let words = ["models", "describe", "vit_ti_16", "--img-size", "100"];
    fails(dir.path(), &words, 2, &["100x100", "patches of 16x16", "--img-size 112"]);
    fails(dir.path(), &["models", "resnet18", "--num-classes", "0"], 2, &["0 classes"]);
    let words = ["models", "resnet18+ga@4", "--img-size", "18446744073709551615"];
    fails(dir.path(), &words, 2, &["18446744073709551615", "at most"]);
    let words = ["models", "describe", "vit_b_16", "--img-size", "524288"];
    fails(dir.path(), &words, 2, &["images of 524288x524288", "more than 2^31 - 1 elements"]);
    fails(dir.path(), &["models", "resnet18+ga@4:haeds=4"], 2, &["did you mean 'heads=8'?"]);
}

#[test]
fn bench_lists_times_and_refuses() {
    let dir = temporary();
    fails(
        dir.path(),
        &["bench", "speed"],
        2,
        &["unknown suite 'speed'; there are ops, attention-vs-conv, step, scaling"],
    );
    fails(dir.path(), &["bench", "--filter", "("], 2, &["--filter '('"]);
    fails(
        dir.path(),
        &["bench", "--filter", "zzz"],
        2,
        &["no row matches --filter 'zzz'", "--list"],
    );
    fails(dir.path(), &["bench", "--device", "gpu"], 2, &["unknown device 'gpu'"]);
    for wrong in ["0", "-1", "inf", "NaN"] {
        let words = ["bench", "--device", "cpu", "--min-time", wrong];
        fails(dir.path(), &words, 2, &["--min-time", "expected seconds above 0"]);
    }
    let words =
        ["bench", "--size", "tiny", "--device", "cpu", "--filter", "adamw", "--json", "no/x"];
    fails(dir.path(), &words, 2, &["--json no/x: there is no folder no"]);
    let words = ["bench", "--device", "cpu", "--json", "x", "--html", "x"];
    fails(dir.path(), &words, 2, &["--json and --html name the same file"]);
    let output = attn2d(dir.path(), &["bench", "--precision", "f64"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("f32, f16, bf16"), "{}", text(&output.stderr));

    // A list needs no device and has no times.
    for unused in
        ["--device=cpu", "--min-time=1", "--html=x.html", "--compare=old.json", "--markdown"]
    {
        let output = attn2d(dir.path(), &["bench", "--list", unused]);
        assert_eq!(output.status.code(), Some(2), "{unused}");
        let said = text(&output.stderr);
        assert!(said.contains("--list") && said.contains("cannot be used with"), "{said}");
    }

    let listed = attn2d(dir.path(), &["bench", "ops", "--list", "--json", "rows.json"]);
    assert!(text(&listed.stdout).contains("\nconv2d_3x3_64x56 "), "{}", text(&listed.stdout));
    let rows = std::fs::read_to_string(dir.path().join("rows.json")).expect("written");
    let rows: serde_json::Value = serde_json::from_str(&rows).expect("JSON");
    assert_eq!(rows["rows"][0]["subject"]["op"], "conv2d");
    assert_eq!(rows["rows"][0]["work"]["forward"]["flop"], 2.0 * 8.0 * 3136.0 * 64.0 * 576.0);

    let words = "bench --size tiny --device cpu --filter ^linear --min-time 0.01 --json times.json";
    let timed = attn2d(dir.path(), &words.split(' ').collect::<Vec<_>>());
    assert!(timed.status.success(), "{}", text(&timed.stderr));
    assert!(text(&timed.stdout).contains("\nlinear_4x16_10 "), "{}", text(&timed.stdout));
    let times = std::fs::read_to_string(dir.path().join("times.json")).expect("written");
    let times: serde_json::Value = serde_json::from_str(&times).expect("JSON");
    assert_eq!(times["environment"]["device"], "cpu");
    assert!(times["rows"][0]["whole"]["ms"].as_f64().expect("a time") > 0.0);
}

#[test]
fn bench_shows_compares_and_merges_what_was_timed() {
    let dir = temporary();
    let words = |line: &str| line.split(' ').map(String::from).collect::<Vec<_>>();
    let run = |line: &str| {
        let words = words(line);
        attn2d(dir.path(), &words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let refused = |line: &str, code: i32, wanted: &[&str]| {
        let words = words(line);
        fails(dir.path(), &words.iter().map(String::as_str).collect::<Vec<_>>(), code, wanted);
    };
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).expect("written");
    let write = |name: &str, json: &serde_json::Value| {
        std::fs::write(dir.path().join(name), json.to_string()).expect("a file");
    };
    let timed = run(
        "bench --size tiny --device cpu --filter ^adamw --min-time 0.2 --json now.json --profile",
    );
    assert!(timed.status.success(), "{}", text(&timed.stderr));
    assert!(text(&timed.stdout).contains("| adamw_step_f32 | 1 |"), "{}", text(&timed.stdout));

    let shown = run("bench --from now.json --html page.html --markdown --compare now.json");
    assert!(shown.status.success(), "{}", text(&shown.stderr));
    for words in ["0 worse, 0 better, of 1 compared", "**Suite ops**", "| adamw_tiny |"] {
        assert!(text(&shown.stdout).contains(words), "{words}: {}", text(&shown.stdout));
    }
    assert!(read("page.html").contains("<th scope=\"row\">adamw_tiny</th>"));

    // The same row, ten times as fast before.
    let mut old: serde_json::Value = serde_json::from_str(&read("now.json")).expect("JSON");
    for key in ["ms", "p20_ms", "p80_ms"] {
        let whole = &mut old["rows"][0]["whole"];
        whole[key] = (0.1 * whole[key].as_f64().expect("a time")).into();
    }
    write("old.json", &old);
    let slower = run("bench --from now.json --compare old.json");
    assert_eq!(slower.status.code(), Some(1), "{}", text(&slower.stdout));
    assert!(text(&slower.stdout).contains("SLOWER"), "{}", text(&slower.stdout));
    old["environment"]["size"] = "large".into();
    write("large.json", &old);
    refused("bench --from now.json --compare large.json", 1, &["large.json: its size is 'large'"]);
    refused("bench --from now.json --compare page.html", 1, &["page.html: is no JSON"]);
    refused("bench --from none.json", 1, &["none.json: No such file"]);
    refused("bench step --from now.json", 2, &["no row of these files"]);
    refused("bench --from now.json --tolerance -1", 2, &["--tolerance is -1"]);

    let ways = serde_json::json!({ "eager": { "ms": 1e3 } });
    let row = serde_json::json!({ "name": "adamw_tiny", "subject": old["rows"][0]["subject"], "ways": ways });
    let about =
        serde_json::json!({ "peer": "Peer 1", "device": "cpu", "precision": "f32", "rows": [row] });
    write("peer.json", &about);
    let merged = run("bench --from now.json --merge peer.json --json merged.json --html page.html");
    assert!(text(&merged.stdout).contains("Peer 1 (cpu), ratio"), "{}", text(&merged.stdout));
    assert!(read("page.html").contains("<th scope=\"col\">Peer 1 (cpu) ms</th>"));
    let merged: serde_json::Value = serde_json::from_str(&read("merged.json")).expect("JSON");
    assert_eq!(merged["rows"][0]["peers"]["Peer 1 (cpu)"]["ways"]["eager"]["ms"], 1e3);
    refused("bench --from now.json --merge now.json", 1, &["now.json: missing field `peer`"]);
}

#[test]
fn tables_of_benchmarks_are_those_of_the_measurements() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let page = std::fs::read_to_string(docs.join("benchmarks.md")).expect("a page");
    for file in ["attention_vs_conv.json", "scaling.json", "beside_pytorch.json", "lavapipe.json"] {
        let report =
            attn2d::bench::Report::read(&docs.join("measurements").join(file)).expect(file);
        assert!(report.complete(), "{file}");
        let tables = attn2d::bench::tables(&report);
        let peers = |t: &attn2d::html::Table| t.head.iter().any(|h| h == "its best way");
        let shown = tables.iter().filter(|t| !t.caption.starts_with("Suite ") || peers(t));
        let tables: Vec<String> = shown.map(attn2d::html::markdown).collect();
        assert!(!tables.is_empty(), "{file}");
        for table in tables {
            assert!(page.contains(&table), "run scripts/docs_tables; the page has no\n{table}");
        }
    }
}
