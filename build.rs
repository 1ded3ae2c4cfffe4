//! Makes the CUDA texts ready: resolves their includes (NVRTC has no include path), compiles them where there is an nvcc,
//! and with the feature `cuda-emu` compiles them for the host too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("kernels");
    fs::create_dir_all(&out).unwrap_or_else(|e| panic!("{}: {e}", out.display()));
    let mut texts = Vec::new();
    for path in sources() {
        let (name, text) = (stem(&path), resolve(&path, &mut BTreeSet::new()));
        write(&out.join(format!("{name}.cu")), &text);
        texts.extend(instances(&name, &text));
    }
    for (name, text) in &texts {
        write(&out.join(format!("{name}.cu")), text);
    }
    write(&out.join("texts.rs"), &list(&texts, &out));
    write(&out.join("embedded.rs"), &embedded(&texts, &out));
    #[cfg(feature = "cuda-emu")]
    {
        // Faulty kernels that only the emulator's tests run.
        let faults = resolve(Path::new("kernels/emu/faults.cu"), &mut BTreeSet::new());
        let all: Vec<_> = texts.into_iter().chain(instances("faults", &faults)).collect();
        emulator::compile(&all, &out);
    }
}

/// A text for each type of storage that it is compiled for, under the name `<file>_<type>`: kernels whose names are made by
/// `OF(..)` come in all three, files of tensor-core kernels (`*_mma.cu`) in the two of half precision, others in f32 alone.
fn instances(name: &str, text: &str) -> Vec<(String, String)> {
    let types: &[&str] = match (name.ends_with("_mma"), text.contains(") OF(")) {
        (true, _) => &["f16", "bf16"],
        (false, true) => &["f32", "f16", "bf16"],
        (false, false) => &["f32"],
    };
    let instance = |stored: &&str| {
        let define = format!("#define STORED_{}\n", stored.to_uppercase());
        (format!("{name}_{stored}"), define + text)
    };
    types.iter().map(instance).collect()
}

/// A Rust table of every text, for tests of them all.
fn list(texts: &[(String, String)], out: &Path) -> String {
    let mut table = "static TEXTS: &[(&str, &str)] = &[\n".to_string();
    for (name, _) in texts {
        let path = out.join(format!("{name}.cu")).display().to_string();
        table += &format!("    ({name:?}, include_str!({path:?})),\n");
    }
    table + "];\n"
}

/// What machine code is embedded for, unless `ATTN2D_CUDA_CODE` lists less or more: Ampere, Ada and Hopper by themselves, and PTX
/// that later GPUs' drivers translate. (PTX of compute_90a would run on Hopper alone.)
const CODE: &str = "sm_80,sm_86,sm_89,sm_90a,compute_90";

/// The targets that code is embedded for.
fn targets() -> Vec<String> {
    println!("cargo::rerun-if-env-changed=ATTN2D_CUDA_CODE");
    let list = env::var("ATTN2D_CUDA_CODE").unwrap_or_else(|_| CODE.into());
    let targets: Vec<String> = list.split(',').map(|target| target.trim().to_string()).collect();
    if let Some(wrong) =
        targets.iter().find(|t| !t.starts_with("sm_") && !t.starts_with("compute_"))
    {
        panic!("ATTN2D_CUDA_CODE has '{wrong}'; expected a list such as {CODE}");
    }
    targets
}

/// A Rust table of machine code for every text, made by nvcc where there is one (`ATTN2D_NVCC` names it; empty: none), what it
/// is for, and the number of texts.
fn embedded(texts: &[(String, String)], out: &Path) -> String {
    println!("cargo::rerun-if-env-changed=ATTN2D_NVCC");
    println!("cargo::rerun-if-env-changed=PATH");
    let nvcc = match env::var_os("ATTN2D_NVCC") {
        Some(path) => Some(PathBuf::from(path)).filter(|path| !path.as_os_str().is_empty()),
        None => env::split_paths(&env::var_os("PATH").unwrap_or_default())
            .map(|folder| folder.join(format!("nvcc{}", env::consts::EXE_SUFFIX)))
            .find(|path| path.is_file()),
    };
    let nvcc = nvcc.filter(|_| env::var_os("CARGO_FEATURE_CUDA").is_some());
    let files = texts.len();
    let texts = if nvcc.is_some() { texts } else { &[] };
    let targets = targets();
    if let Some(nvcc) = &nvcc {
        compile_all(nvcc, &targets, texts, out);
    }
    let mut table = "static FATBINS: &[(&str, &[u8])] = &[\n".to_string();
    for (name, _) in texts {
        let code = out.join(format!("{name}.fatbin")).display().to_string();
        table += &format!("    ({name:?}, include_bytes!({code:?})),\n");
    }
    table += &format!("];\nconst EMBEDDED_FOR: &[&str] = &{targets:?};\n");
    table + &format!("const FILES: usize = {files};\n")
}

/// Compiles the texts, as many at a time as cargo runs jobs.
fn compile_all(nvcc: &Path, targets: &[String], texts: &[(String, String)], out: &Path) {
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let next = AtomicUsize::new(0);
    let work = || -> Result<(), String> {
        while let Some((name, text)) = texts.get(next.fetch_add(1, Ordering::Relaxed)) {
            compile(nvcc, targets, &out.join(format!("{name}.cu")), text)?;
        }
        Ok(())
    };
    let done: Result<(), String> = thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|w| w.join().unwrap_or(Err("a compile thread died".into())))
    });
    if let Err(why) = done {
        panic!("{why}");
    }
}

/// For each virtual architecture that texts are translated for, what is made of its PTX. Machine code of a generation (sm_86, sm_89) is
/// made of the PTX of the first of it that is wanted: no text asks what it is compiled for, and the front end takes half of the time.
fn by_virtual(targets: &[String]) -> BTreeMap<String, Vec<&str>> {
    let number = |target: &String| target.split_once('_')?.1.parse::<u32>().ok();
    let mut all = BTreeMap::<_, Vec<&str>>::new();
    for target in targets {
        let own = target.replace("sm_", "compute_");
        let first = number(target).filter(|_| target.starts_with("sm_")).and_then(|n| {
            let older = targets.iter().filter_map(number).filter(|m| m / 10 == n / 10);
            older.min().map(|m| format!("compute_{m}"))
        });
        all.entry(first.unwrap_or(own)).or_default().push(target);
    }
    all
}

/// A fat binary beside the source, and what ptxas says of it (`.ptxas`), which `scripts/check_cuda --built` reads. Kept while the
/// text stays the same.
fn compile(nvcc: &Path, targets: &[String], source: &Path, text: &str) -> Result<(), String> {
    let (code, made_from) = (source.with_extension("fatbin"), source.with_extension("made_from"));
    let said = source.with_extension("ptxas");
    let recipe = format!("{} {targets:?}\n{text}", nvcc.display());
    let there = code.is_file() && said.is_file();
    if there && fs::read_to_string(&made_from).is_ok_and(|old| old == recipe) {
        return Ok(());
    }
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-O3", "-std=c++17", "-Xptxas", "-v"]);
    command.args(
        by_virtual(targets)
            .iter()
            .map(|(arch, codes)| format!("-gencode=arch={arch},code=[{}]", codes.join(","))),
    );
    let run = command.arg("-o").arg(&code).arg(source).output();
    let run =
        run.map_err(|e| format!("{}: {e}; ATTN2D_NVCC names the compiler", nvcc.display()))?;
    if !run.status.success() {
        return Err(format!(
            "{} fails on {} ({}); set ATTN2D_NVCC to another nvcc, or to nothing to compile at run time\n{}{}",
            nvcc.display(),
            source.display(),
            run.status,
            String::from_utf8_lossy(&run.stdout),
            String::from_utf8_lossy(&run.stderr)
        ));
    }
    write(&said, &String::from_utf8_lossy(&run.stderr));
    write(&made_from, &recipe);
    Ok(())
}

/// The kernel files, in a fixed order.
fn sources() -> Vec<PathBuf> {
    let entries = fs::read_dir("kernels").unwrap_or_else(|e| panic!("kernels: {e}"));
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap_or_else(|e| panic!("kernels: {e}")).path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    paths.sort();
    paths
}

fn stem(path: &Path) -> String {
    path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned())
}

/// The text of a file with every `#include "..."` replaced by that file, once each. `#line` keeps compilers' messages true.
fn resolve(path: &Path, seen: &mut BTreeSet<PathBuf>) -> String {
    let name = path.display().to_string().replace('\\', "/");
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut out = format!("#line 1 \"{name}\"\n");
    for (i, line) in text.lines().enumerate() {
        match line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"')) {
            Some(file) => {
                let file = path.with_file_name(file);
                if seen.insert(file.clone()) {
                    out += &resolve(&file, seen);
                }
                out += &format!("#line {} \"{name}\"\n", i + 2);
            }
            None => {
                out += line;
                out.push('\n');
            }
        }
    }
    out
}

fn write(path: &Path, text: &str) {
    // Untouched where nothing changed, so that nothing is compiled again for it.
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return;
    }
    fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

#[cfg(feature = "cuda-emu")]
mod emulator {
    use super::write;
    use std::path::Path;

    /// Compiles every kernel text as C++ with a table of their entry points, and the emulator that runs them.
    pub(super) fn compile(texts: &[(String, String)], out: &Path) {
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .std("c++17")
            .include("kernels/emu")
            .opt_level(2)
            .flag_if_supported("-fno-strict-aliasing")
            .flag_if_supported("-Wno-unused-function")
            // Leaving a fibre by longjmp is what a fault does; the fortified one takes it for an overrun.
            .flag("-U_FORTIFY_SOURCE")
            .file("kernels/emu/emu.cpp")
            .file("kernels/emu/launch.cpp");
        let mut entries = Vec::new();
        for (name, text) in texts {
            let mut whole = format!("#include \"emu.h\"\nnamespace {{\n{text}\n}}\n");
            for (entry, threads) in kernels(name, text) {
                whole += &format!("EMU_EXPORT({entry}, {threads})\n");
                entries.push(entry);
            }
            let path = out.join(format!("emu_{name}.cpp"));
            write(&path, &whole);
            build.file(path);
        }
        let table = out.join("emu_table.cpp");
        write(&table, &table_of(&entries));
        build.file(table);
        build.compile("attn2d_emu");
    }

    /// Names and block sizes of the kernels that an instance exports: `KERNEL(threads) OF(name)(` ends in its type of storage,
    /// `KERNEL(threads) name_f32(` belongs to the f32 one. `KERNEL(threads, blocks)` is read too.
    fn kernels(instance: &str, text: &str) -> Vec<(String, String)> {
        let stored = instance.rsplit('_').next().unwrap_or_default();
        let found = text.lines().filter_map(|line| line.strip_prefix("KERNEL(")).map(|rest| {
            let parsed = rest.split_once(')').and_then(|(bounds, rest)| {
                let threads = bounds.split(',').next()?.to_string();
                let rest = rest.trim_start();
                Some(match rest.strip_prefix("OF(") {
                    Some(rest) => (format!("{}_{stored}", rest.split_once(')')?.0), threads),
                    None => (rest.split_once('(')?.0.to_string(), threads),
                })
            });
            parsed
                .unwrap_or_else(|| panic!("expected `KERNEL(threads) name(`, found KERNEL({rest}"))
        });
        let own = |name: &str| name.ends_with(&format!("_{stored}")) || stored == "f32";
        found.filter(|(name, _)| own(name)).collect()
    }

    fn table_of(entries: &[String]) -> String {
        let mut text = "#include \"emu.h\"\n".to_string();
        for entry in entries {
            text += &format!("extern \"C\" const emu::Kernel attn2d_emu_{entry};\n");
        }
        text += "extern \"C\" const emu::Kernel *const attn2d_emu_kernels[];\n";
        text += "const emu::Kernel *const attn2d_emu_kernels[] = {\n";
        for entry in entries {
            text += &format!("    &attn2d_emu_{entry},\n");
        }
        text + "    nullptr};\n"
    }
}
