//! Keeps the invariants that `ARCHITECTURE.md` states: who may import whom, where an op's files lie, that entry points
//! named in Rust exist in the kernel text, and that nothing unfinished is committed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Text files below a folder, by their path from the repository's root.
fn files(folder: &str, extensions: &[&str]) -> BTreeMap<String, String> {
    fn walk(dir: &Path, extensions: &[&str], out: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, extensions, out);
            } else if path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)) {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                out.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut out = BTreeMap::new();
    walk(&root().join(folder), extensions, &mut out);
    assert!(!out.is_empty(), "{folder} has no {extensions:?} files");
    out
}

/// The code of a file without its unit tests, comments and documentation.
fn code(text: &str) -> String {
    let end = text.find("#[cfg(test)]\nmod ").unwrap_or(text.len());
    let lines = text[..end].lines().filter(|l| !l.trim_start().starts_with("//"));
    lines.map(|l| l.split(" // ").next().unwrap_or(l)).collect::<Vec<_>>().join("\n")
}

/// Every file that breaks a rule, with the rule's words.
fn report(broken: Vec<String>) {
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn arrows_only_go_down() {
    // (folder or file, what it must not mention)
    let rules: [(&str, &[&str]); 11] = [
        (
            "src/backend/",
            &[
                "crate::ops",
                "crate::nn",
                "crate::models",
                "crate::train",
                "crate::data",
                "crate::cli",
            ],
        ),
        (
            "src/tensor/",
            &["crate::ops", "crate::nn", "crate::models", "crate::train", "crate::cli"],
        ),
        ("src/tape.rs", &["crate::ops", "crate::nn", "crate::models", "crate::train"]),
        ("src/kernel.rs", &["crate::ops", "crate::nn", "crate::models", "crate::train"]),
        (
            "src/ops/",
            &[
                "CpuBackend",
                "WgpuBackend",
                "crate::backend",
                "crate::nn",
                "crate::models",
                "crate::train",
                "crate::data",
            ],
        ),
        (
            "src/cpu/",
            &[
                "crate::tensor::Tensor",
                "crate::backend",
                "crate::nn",
                "crate::models",
                "crate::train",
            ],
        ),
        (
            "src/nn/",
            &["crate::backend", "crate::models", "crate::train", "crate::data", "crate::cli"],
        ),
        ("src/html/", &["crate::"]),
        ("src/models/", &["crate::backend", "crate::train", "crate::data", "crate::cli"]),
        ("src/train/", &["crate::study", "crate::bench", "crate::cli"]),
        ("src/stats/", &["crate::study", "crate::train", "crate::models", "crate::bench"]),
    ];
    let mut broken = Vec::new();
    for (path, text) in files("src", &["rs"]) {
        let text = code(&text);
        for (place, forbidden) in rules.iter().filter(|(place, _)| path.starts_with(place)) {
            for word in forbidden.iter().filter(|w| text.contains(**w)) {
                broken.push(format!("{path}: {place} must not know of {word}"));
            }
        }
    }
    report(broken);
}

#[test]
fn only_programs_print_or_touch_files() {
    let library = [
        "src/backend/",
        "src/tensor/",
        "src/ops/",
        "src/cpu/",
        "src/nn/",
        "src/models/",
        "src/tape.rs",
        "src/kernel.rs",
    ];
    let mut broken = Vec::new();
    for (path, text) in files("src", &["rs"]) {
        if !library.iter().any(|l| path.starts_with(l)) {
            continue;
        }
        let text = code(&text);
        for word in ["println!", "eprintln!", "print!(", "std::fs", "File::"] {
            if text.contains(word) {
                broken
                    .push(format!("{path}: {word} belongs to the programs (cli, train, data, io)"));
            }
        }
    }
    report(broken);
}

/// What an op says whose kernels are for the 16-bit types alone, which no shader takes.
const NO_WGSL: &str = "wgsl: \"\"";

#[test]
fn an_op_is_one_name() {
    let mut broken = Vec::new();
    for (path, text) in files("src/ops", &["rs"]) {
        if !code(&text).contains(": Kernel = Kernel {") {
            continue;
        }
        let name = path.trim_start_matches("src/ops/").trim_end_matches(".rs");
        let name = name.split('/').next().unwrap_or(name);
        let cpu = [format!("src/cpu/{name}.rs"), format!("src/cpu/{name}/mod.rs")];
        if !cpu.iter().any(|p| root().join(p).exists()) {
            broken.push(format!("{path} has kernels, but there is no {}", cpu[0]));
        }
        let any = |names: &[String]| names.iter().any(|name| root().join(name).exists());
        let shader = format!("shaders/{name}.wgsl");
        if !code(&text).contains(NO_WGSL) && !any(std::slice::from_ref(&shader)) {
            broken.push(format!("{path} has kernels, but there is no {shader}"));
        }
        let cuda = [format!("kernels/{name}.cu"), format!("kernels/{name}_mma.cu")];
        if !any(&cuda) {
            broken.push(format!("{path} has kernels, but there is no {}", cuda[0]));
        }
    }
    report(broken);
}

/// The string literals that follow a marker, as in `name: "relu_fwd_f32"`.
fn literals_after<'t>(text: &'t str, marker: &str) -> Vec<&'t str> {
    text.match_indices(marker)
        .filter_map(|(at, _)| text[at + marker.len()..].split('"').next())
        .filter(|name| !name.is_empty())
        .collect()
}

#[test]
fn entry_points_named_in_rust_exist_in_the_kernel_text() {
    let shaders: String = files("shaders", &["wgsl"]).into_values().collect();
    let cuda: String = files("kernels", &["cu"]).into_values().collect();
    let in_wgsl = |name: &str| shaders.contains(&format!("fn {name}("));
    let in_cuda = |name: &str| {
        let of = name.strip_suffix("_f32").map(|base| format!(") OF({base})("));
        let named =
            |l: &str| l.contains(&format!(") {name}(")) || of.iter().any(|of| l.contains(of));
        cuda.lines().any(|l| l.starts_with("KERNEL(") && named(l))
    };
    let mut entries = 0;
    let mut broken = Vec::new();
    for (path, text) in files("src", &["rs"]) {
        let text = code(&text);
        if !text.contains(": Kernel = Kernel {") {
            continue;
        }
        let kernels = text
            .split(": Kernel = Kernel {")
            .skip(1)
            .flat_map(|k| literals_after(k, "name: \"").into_iter().take(1));
        let variants = literals_after(&text, ".entry(\"")
            .into_iter()
            .chain(literals_after(&text, "entry: \""));
        for (name, variant) in kernels.map(|k| (k, false)).chain(variants.map(|v| (v, true))) {
            entries += 1;
            // A variant may be one language's alone.
            if !(in_wgsl(name) || variant && in_cuda(name) || text.contains(NO_WGSL)) {
                broken.push(format!("{path}: no WGSL entry point {name}"));
            }
            if !(in_cuda(name) || variant && in_wgsl(name)) {
                broken.push(format!("{path}: no CUDA entry point {name}"));
            }
            if !["_f32", "_f16", "_bf16", "_u32"].iter().any(|s| name.ends_with(s)) {
                broken.push(format!("{path}: {name} does not end in its dtype"));
            }
        }
    }
    assert!(entries > 0, "no kernels found: the test looks in the wrong place");
    report(broken);
}

#[test]
fn nothing_unfinished_is_committed() {
    let mut broken = Vec::new();
    for (path, text) in files("src", &["rs"]) {
        for word in ["todo!", "unimplemented!", "dbg!(", "#[ignore", "FIXME", "XXX"] {
            if text.contains(word) {
                broken.push(format!("{path}: {word}"));
            }
        }
        // Unit tests may stand in a file of their own.
        let tests = path.ends_with("tests.rs");
        for (i, line) in code(&text).lines().enumerate().filter(|_| !tests) {
            if line.contains(".unwrap()") {
                broken.push(format!(
                    "{path}: unwrap() outside tests (code line {}): {}",
                    i + 1,
                    line.trim()
                ));
            }
        }
        if text.lines().count() > 550 {
            broken.push(format!(
                "{path}: {} lines; a file that wants more than 550 has two jobs",
                text.lines().count()
            ));
        }
    }
    let kernels = files("kernels", &["cu", "cuh", "cpp", "h"]);
    let tests = files("tests", &["rs"]);
    for (path, text) in files("shaders", &["wgsl"]).into_iter().chain(kernels).chain(tests) {
        if text.lines().count() > 550 {
            broken.push(format!("{path}: {} lines", text.lines().count()));
        }
    }
    report(broken);
}

/// The kernels run on a driver alone, and on the emulated device: what either cannot do stands in the portable layer.
#[test]
fn cuda_kernels_keep_to_the_portable_layer() {
    let mut broken = Vec::new();
    for (path, text) in files("kernels", &["cu", "cuh"]) {
        if ["kernels/common.cuh", "kernels/tensor_cores.cuh"].contains(&path.as_str()) {
            continue;
        }
        for word in ["asm", "#include <", "__shared__", "__global__", "__device__"] {
            if code(&text).contains(word) {
                broken.push(format!("{path}: {word} belongs to kernels/common.cuh"));
            }
        }
    }
    report(broken);
}
