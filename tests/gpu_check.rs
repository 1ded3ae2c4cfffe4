//! `scripts/gpu_check` on machines without a GPU: on the CPU's tiny rows with a stand-in for PyTorch, and on a stand-in for the
//! program that says what a GPU machine could say.
#![cfg(unix)]

use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Runs the script; `None`, said aloud, where there is no Python to run it.
fn gpu_check(dir: &Path, words: &[&str]) -> Option<Output> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/gpu_check");
    let output = Command::new("python3").arg(script).args(words).current_dir(dir).output();
    if output.is_err() {
        eprintln!("skipped: scripts/gpu_check needs python3, which is not there");
    }
    output.ok()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A shell script to stand for a program.
fn program(dir: &Path, name: &str, lines: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{lines}")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn report(dir: &Path) -> (Value, String) {
    let json = fs::read_to_string(dir.join("gpu_check/gpu_check.json")).unwrap();
    let markdown = fs::read_to_string(dir.join("gpu_check/gpu_check.md")).unwrap();
    (serde_json::from_str(&json).unwrap(), markdown)
}

/// Stands for PyTorch: known times for one row, one way of each kind.
const PYTORCH: &str = r#"[ "$1" = -c ] && { echo 9.9; exit 0; }
cat > "$3" <<'END'
{"machine": {"torch": "9.9", "copy_bytes_per_s": 1e3, "matmul_flop_per_s": {"f32": 1e3}, "matmul_size": 512}, "cut": false,
 "rows": {"f32": {"linear_4x16_10": {"slow": {"ms": 3.0}, "fast": {"ms": 7.0, "graph_ms": 2.0, "forward_ms": 1.0},
  "false": {"ms": 0.5, "reason": "wrong: differs"}, "some_tf32": {"ms": 0.1}, "none": {"reason": "no kernel | here"}}}}}
END
"#;

#[test]
fn on_the_cpu_everything_is_run_and_compared() {
    let dir = tempfile::tempdir().unwrap();
    let python = program(dir.path(), "python", PYTORCH);
    let words = ["--device", "cpu", "--quick", "--precision", "f32", "--python"];
    let words = [&words[..], &[python.to_str().unwrap(), "--binary", env!("CARGO_BIN_EXE_attn2d")]];
    let Some(output) = gpu_check(dir.path(), &words.concat()) else { return };
    assert_eq!(output.status.code(), Some(0), "{}{}", text(&output.stdout), text(&output.stderr));
    let (json, markdown) = report(dir.path());

    let verified = &json["verify"][0];
    assert_eq!((&verified["device"], &verified["passed"]), (&"cpu".into(), &true.into()));
    assert!(verified["cases"].as_u64().unwrap() > 100, "{verified}");
    assert_eq!(json["cut"], Value::Array(Vec::new()));

    let rows = json["rows"]["f32"].as_array().unwrap();
    assert!(rows.len() > 10);
    for row in rows {
        assert!(row["ours_ms"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["ours_percent"].as_f64().unwrap() > 0.0, "{row}");
        assert!(markdown.contains(&format!("| {} |", row["row"].as_str().unwrap())), "{markdown}");
    }
    // The best way is the fastest that is right and no TF32; every other is listed with its reason.
    let row = rows.iter().find(|r| r["row"] == "linear_4x16_10").unwrap();
    let ours = row["ours_ms"].as_f64().unwrap();
    assert_eq!((&row["best_way"], &row["best_ms"]), (&"fast".into(), &2.0.into()));
    assert!((row["ratio"].as_f64().unwrap() - 2.0 / ours).abs() < 1e-6 / ours, "{row}");
    assert!(markdown.contains("no kernel \\| here") && markdown.contains("wrong: differs"));

    // The roofline by hand: 4 x 16 by 16 x 10 forward, two such products and five tensors backward.
    let rate = |name: &str| json["ceilings"]["f32"][name][0].as_f64().unwrap();
    let least = |flop: f64, bytes: f64| (flop / rate("products")).max(bytes / rate("copy"));
    let (x, w, y) = (4.0 * 64.0, 4.0 * 160.0, 4.0 * 40.0);
    let floor = 1e3 * (least(1280.0, x + w + y) + least(2560.0, 2.0 * x + 2.0 * w + y));
    assert!((row["floor_ms"].as_f64().unwrap() / floor - 1.0).abs() < 1e-9, "{row}: {floor}");
}

/// Stands for the program on a machine with two GPUs of which software plays one, where a kernel is wrong and benches hang.
const PROGRAM: &str = r#"
case "$*" in
doctor) cat <<'END'
[ ok ] cpu      2 threads
                first kernel 0 ms; the reference of every other device
[ ok ] wgpu:0   A GPU (Vulkan, driver 1)
                first kernel 90 ms; workgroup memory 48 KiB, f16 yes, timestamps yes
[ ok ] wgpu:1   llvmpipe (Vulkan, llvmpipe)
                first kernel 90 ms; software (right, not fast), workgroup memory 32 KiB
[FAIL] wgpu:2   Another GPU: lost
END
;;
"verify --help") echo "--precision <LIST>" ;;
verify*cuda*) for out; do :; done
    echo '{"passed": false, "records": [{"op": "conv2d", "device": "cuda:0", "case": "odd", "error": 1.0, "failure": "y[3] is 2"}, {"failure": null}]}' > "$out"
    echo "FAILED: 1 of 2 runs"; exit 1 ;;
verify*wgpu:0*) for out; do :; done
    echo '{"passed": true, "records": [{"failure": null}]}' > "$out" ;;
verify*) exit 3 ;;
*--list*) ;;
bench*bf16*) echo "error: device cuda:0: no such thing"; exit 1 ;;
bench*) exec sleep 60 ;;
esac
"#;

#[test]
fn a_failure_is_told_and_what_hangs_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let binary = program(dir.path(), "attn2d", PROGRAM);
    let words = ["--precision", "bf16,f32", "--python", "/bin/false", "--budget", "10", "--binary"];
    let start = Instant::now();
    let words = [&words[..], &[binary.to_str().unwrap()]].concat();
    let Some(output) = gpu_check(dir.path(), &words) else { return };
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(output.status.code(), Some(1), "{}{}", text(&output.stdout), text(&output.stderr));
    let (json, markdown) = report(dir.path());
    let verified = json["verify"].as_array().unwrap();
    let devices: Vec<_> = verified.iter().map(|v| v["device"].as_str().unwrap()).collect();
    assert_eq!(devices, ["cuda:0", "wgpu:0"], "hardware alone");
    assert_eq!((&verified[0]["passed"], &verified[1]["passed"]), (&false.into(), &true.into()));
    assert_eq!(verified[0]["precisions"], "f32,f16,bf16");
    for part in ["**FAILED** (1 cases)", "conv2d, case 'odd': y[3] is 2", "no such thing"] {
        assert!(markdown.contains(part), "{part} in {markdown}");
    }
    assert!(json["cut"][0].as_str().unwrap().starts_with("bench_f32 after"), "{}", json["cut"]);
    assert!(markdown.contains("Cut for time") && markdown.contains("cut before its first row"));
    assert!(json["peers"]["reason"].as_str().unwrap().contains("no PyTorch for cuda:0"));
}

#[test]
fn wrong_options_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (words, expected) in [
        (&["--binary", "nowhere"][..], "nowhere is no program"),
        (&["--precision", "f64"], "--precision f64: expected some of bf16, f32, f16"),
        (&["--budget", "-1"], "expected seconds above 0"),
    ] {
        let Some(output) = gpu_check(dir.path(), words) else { return };
        assert_eq!(output.status.code(), Some(2));
        assert!(text(&output.stderr).contains(expected), "{}", text(&output.stderr));
        assert!(!dir.path().join("gpu_check").exists(), "nothing is written");
    }
}
