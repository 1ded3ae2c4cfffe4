//! What burn takes for the rows of `attn2d bench`, in milliseconds: a peer beside PyTorch.
//!
//! ```text
//! attn2d bench ops --list --json rows.json
//! cargo run --release -- flex rows.json burn.json [--only TEXT] [--samples 7] [--threads 2]
//! attn2d bench ops --merge burn.json
//! ```
//!
//! `flex` is burn's own CPU back end; with `--features wgpu` there is `wgpu` too, whose first call of each shape compiles and tunes for
//! up to minutes. Writes the file that `attn2d bench --merge` reads and keeps what it had before. A row is one forward and the gradients
//! of all inputs and weights for a fixed upstream gradient, and the forward alone; a step is a training step of a ResNet18. Numbers are
//! medians with p20 and p80 over samples, each of as many calls as fill 0.2 s. Results are read back once and must be finite: burn's GPU
//! back end tells of a buffer that it could not make only then. What burn has no way for has its reason.

mod models;
mod ops;

use burn::tensor::Device;
use serde_json::{Map, Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

/// A pass of a row: runs it and gives something of the result to look at.
pub type Call = Box<dyn FnMut() -> burn::tensor::Tensor<1>>;

/// The forward (none for steps) and the whole.
pub struct Calls {
    pub forward: Option<Call>,
    pub whole: Call,
}

struct Options {
    backend: String,
    rows: String,
    out: String,
    only: String,
    samples: usize,
    threads: usize,
}

fn main() {
    if let Err(message) = options().and_then(|options| run(&options)) {
        eprintln!("error: {message}");
        std::process::exit(1);
    }
}

fn options() -> Result<Options, String> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let usage = "expected: burn_bench flex|wgpu ROWS.json OUT.json [--only TEXT] [--samples N] [--threads N]";
    let [backend, rows, out, more @ ..] = &words[..] else { return Err(usage.into()) };
    let mut options = Options {
        backend: backend.clone(),
        rows: rows.clone(),
        out: out.clone(),
        only: String::new(),
        samples: 7,
        threads: 2,
    };
    for pair in more.chunks(2) {
        let [name, value] = pair else { return Err(format!("{}: no value; {usage}", pair[0])) };
        let number = || value.parse::<usize>().ok().filter(|n| *n > 0).ok_or(format!("{name} {value}: expected a number above 0"));
        match name.as_str() {
            "--only" => options.only = value.clone(),
            "--samples" => options.samples = number()?,
            "--threads" => options.threads = number()?,
            _ => return Err(format!("{name}: {usage}")),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), String> {
    // Before the first use of the thread pool, which reads it once.
    // SAFETY: no other thread is running yet.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", options.threads.to_string()) };
    let device = device(&options.backend)?;
    let text = std::fs::read_to_string(&options.rows).map_err(|e| format!("{}: {e}", options.rows))?;
    let listed: Value = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", options.rows))?;
    let listed = listed["rows"].as_array().ok_or(format!("{}: no list 'rows'; write it with `attn2d bench --list --json`", options.rows))?;
    let place = if options.backend == "flex" { format!("flex, {} threads", options.threads) } else { options.backend.clone() };
    let about = json!({ "peer": "burn 0.22.1", "device": place, "precision": "f32" });
    let mut rows = known_rows(&options.out, &about)?;
    for row in listed {
        let name = row["name"].as_str().unwrap_or_default();
        if !name.contains(&options.only) {
            continue;
        }
        let entry = measure(name, &row["subject"], &device, options.samples);
        println!("{name} {}", entry.get("ways").or(entry.get("failed")).unwrap_or(&Value::Null));
        rows.retain(|r| r["name"] != name);
        rows.push(Value::Object(entry));
        let mut file = about.clone();
        file["rows"] = json!(rows);
        std::fs::write(&options.out, format!("{file:#}\n")).map_err(|e| format!("{}: {e}", options.out))?;
    }
    Ok(())
}

fn device(name: &str) -> Result<Device, String> {
    match name {
        #[cfg(feature = "flex")]
        "flex" => Ok(Device::flex()),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        _ => Err(format!("no back end '{name}' in this build; there are the features flex and wgpu")),
    }
}

/// The rows of an earlier run of the same peer.
fn known_rows(path: &str, about: &Value) -> Result<Vec<Value>, String> {
    let Ok(text) = std::fs::read_to_string(path) else { return Ok(Vec::new()) };
    let mut file: Value = serde_json::from_str(&text).map_err(|e| format!("{path}: {e}"))?;
    let rows = file["rows"].take();
    let same = ["peer", "device", "precision"].iter().all(|key| file[*key] == about[*key]);
    match rows {
        Value::Array(rows) if same => Ok(rows),
        _ => Err(format!("{path} has times of another peer or device: name another file")),
    }
}

/// The row's entry: its times, or why there are none.
fn measure(name: &str, subject: &Value, device: &Device, samples: usize) -> Map<String, Value> {
    let mut entry = Map::new();
    entry.insert("name".into(), json!(name));
    entry.insert("subject".into(), subject.clone());
    let timed = catch_unwind(AssertUnwindSafe(|| -> Result<Value, String> {
        let mut calls = if subject["op"] == "step" { models::step(subject, device)? } else { ops::calls(subject, device)? };
        let look: Vec<f32> = (calls.whole)().into_data().try_to_vec::<f32>().map_err(|e| format!("{e:?}"))?;
        if !look.iter().all(|v| v.is_finite()) {
            return Err("its results are not finite".into());
        }
        let [ms, p20, p80] = time(&mut calls.whole, device, samples)?;
        let mut way = json!({ "ms": ms, "p20_ms": p20, "p80_ms": p80 });
        if let Some(forward) = &mut calls.forward {
            way["forward_ms"] = json!(time(forward, device, samples)?[0]);
        }
        Ok(way)
    }));
    match timed {
        Ok(Ok(way)) => entry.insert("ways".into(), json!({ "eager": way })),
        Ok(Err(why)) => entry.insert("failed".into(), json!(why)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            let why = text.and_then(|t| t.lines().next()).unwrap_or("it panicked");
            entry.insert("failed".into(), json!(why))
        }
    };
    entry
}

/// Median, p20 and p80 of a call in milliseconds.
fn time(call: &mut Call, device: &Device, samples: usize) -> Result<[f64; 3], String> {
    let mut sample = |calls: usize| -> Result<f64, String> {
        let start = Instant::now();
        for _ in 0..calls {
            drop(call());
        }
        device.sync().map_err(|e| format!("{e:?}"))?;
        Ok(1e3 * start.elapsed().as_secs_f64() / calls as f64)
    };
    sample(1)?; // compiles and tunes
    let one = sample(1)?;
    let calls = (200.0 / one).round().max(1.0) as usize;
    let mut times = (0..samples).map(|_| sample(calls)).collect::<Result<Vec<_>, _>>()?;
    times.sort_by(f64::total_cmp);
    let at = |share: f64| {
        let place = share * (samples - 1) as f64;
        let (low, part) = (place.floor() as usize, place.fract());
        times[low] + part * (times[(low + 1).min(samples - 1)] - times[low])
    };
    Ok([at(0.5), at(0.2), at(0.8)])
}
