//! `attn2d verify`: every op against its expected results, on every device.
//!
//! Built-in cases (each op's [`OpSpec::cases`]) are compared with the op's plain f64 reference, their gradients with finite
//! differences of it. Case files bring their own expectations. On each device a case runs twice, with fresh memory
//! poisoned and guard words round every tensor: the two runs must agree to the bit.

mod case_file;
mod compare;
mod model;
mod report;
mod trial;
#[cfg(all(test, feature = "wgpu"))]
mod wgsl_tests;

pub use case_file::CaseFile;
pub use compare::{Atol, Gap, Tolerance, compare};

use crate::backend::{Device, device_reports};
use crate::error::{Error, Result};
use crate::io::paths;
use crate::ops::case::{Arrays, OpSpec};
use crate::ops::specs;
use crate::tensor::DType;
use model::ModelTrial;
use std::path::{Path, PathBuf};
use trial::{Results, Trial};

/// The op of a case file that holds a whole model.
pub const MODEL: &str = "model";

/// What to verify: the options of `attn2d verify`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    /// Devices to run on: all, or a list such as cpu,wgpu:0
    #[arg(long = "device", value_name = "LIST", default_value = "all")]
    pub devices: String,
    /// Devices whose absence is a failure, such as wgpu (any adapter)
    #[arg(long, value_name = "LIST", default_value = "")]
    pub require: String,
    /// Case files, or folders of them, to run beside the built-in cases
    #[arg(long, value_name = "FILE|DIR", num_args = 1..)]
    pub cases: Vec<PathBuf>,
    /// Only the case files, not the built-in cases
    #[arg(long, requires = "cases")]
    pub no_builtin: bool,
    /// Types of storage to try the built-in cases in: all, or a list such as f32,bf16
    #[arg(long, value_name = "LIST", default_value = "all")]
    pub precision: String,
    /// Only this op
    #[arg(long, value_name = "NAME")]
    pub op: Option<String>,
    /// Stop at the first case that fails
    #[arg(long)]
    pub fail_fast: bool,
    /// Also write the outcome as JSON to this file
    #[arg(long, value_name = "OUT")]
    pub json: Option<PathBuf>,
}

/// One case on one device.
#[derive(Clone, Debug)]
pub struct Record {
    /// The op's name.
    pub op: String,
    /// The device's name; empty where the case could not be run on any.
    pub device: String,
    /// The case's label, or its file's name.
    pub case: String,
    /// The largest error, as [`Gap::error`] counts it.
    pub error: f64,
    /// What is wrong, if anything.
    pub failure: Option<String>,
}

/// What was verified.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Names of the devices that took part and of their hardware.
    pub devices: Vec<(String, String)>,
    /// Devices that are not there, and why.
    pub skipped: Vec<(String, String)>,
    /// Required devices that are not there.
    pub absent: Vec<String>,
    /// Every case on every device.
    pub records: Vec<Record>,
}

impl Outcome {
    /// Whether every case passed and every required device is there.
    pub fn passed(&self) -> bool {
        self.absent.is_empty() && self.failures().next().is_none()
    }

    /// The records that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Record> {
        self.records.iter().filter(|r| r.failure.is_some())
    }
}

/// Runs the crate's own cases and the case files on the devices, and writes [`Options::json`]. `progress` is told what is
/// about to run.
///
/// # Errors
/// As [`run_ops`].
pub fn run(options: &Options, progress: &mut dyn FnMut(&str)) -> Result<Outcome> {
    run_ops(&specs(), options, progress)
}

/// As [`run`], with other ops than the crate's: those of a program of your own.
///
/// # Errors
/// [`Error::Usage`] for an unknown op or device string, a `cases` path that is not there or a JSON file that cannot be,
/// [`Error::Device`] where no device is left to verify, [`Error::Io`] and [`Error::File`] for files that cannot be read or written. What
/// fails in a case is part of the outcome.
pub fn run_ops(
    ops: &[&'static OpSpec],
    options: &Options,
    progress: &mut dyn FnMut(&str),
) -> Result<Outcome> {
    let only = options.op.as_deref();
    if let Some(op) = only.filter(|op| *op != MODEL) {
        find_op(ops, op).map_err(Error::usage)?;
    }
    let mut files = Vec::new();
    for path in &options.cases {
        files.extend(case_file::find(path)?);
    }
    if let Some(path) = &options.json {
        paths::check_output("--json", path)?;
    }
    let (devices, mut outcome) = open_devices(options)?;
    run_cases(ops, &files, options, &devices, &mut outcome, progress)?;
    if let Some(path) = &options.json {
        std::fs::write(path, format!("{:#}\n", outcome.to_json()))
            .map_err(|e| Error::io(path, e))?;
    }
    Ok(outcome)
}

/// The built-in cases, then those of the files, until the first failure where that is enough.
fn run_cases(
    ops: &[&'static OpSpec],
    files: &[PathBuf],
    options: &Options,
    devices: &[Device],
    outcome: &mut Outcome,
    progress: &mut dyn FnMut(&str),
) -> Result<()> {
    let only = options.op.as_deref();
    let enough = |outcome: &Outcome| options.fail_fast && outcome.failures().next().is_some();
    let wanted = |spec: &&OpSpec| !options.no_builtin && only.is_none_or(|op| op == spec.name);
    for precision in precisions(&options.precision)? {
        // A device without 16-bit kernels has nothing to try then; the table says so by a dash.
        let able = |d: &&Device| precision == DType::F32 || d.caps().half.contains(&precision);
        let devices: Vec<Device> = devices.iter().filter(able).cloned().collect();
        for spec in ops.iter().copied().filter(wanted).filter(|spec| spec.has(precision)) {
            progress(spec.name);
            for case in (spec.cases)() {
                let able = |d: &&Device| (case.able)(d.caps());
                let devices: Vec<Device> = devices.iter().filter(able).cloned().collect();
                match Trial::built_in(spec, &case, precision) {
                    Ok(trial) => try_on(&devices, &Subject::Op(trial), outcome),
                    Err(e) => outcome.records.push(broken(spec.name, &case.label, &e)),
                }
                if enough(outcome) {
                    return Ok(());
                }
            }
        }
    }
    for file in files {
        progress(&file.display().to_string());
        check_file(file, ops, only, devices, outcome);
        if enough(outcome) {
            break;
        }
    }
    Ok(())
}

/// The types of a list with commas; all for an empty one.
fn precisions(list: &str) -> Result<Vec<DType>> {
    const ALL: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
    let mut wanted = Vec::new();
    for name in names(list) {
        match ALL.into_iter().find(|dtype| dtype.suffix() == name) {
            _ if name == "all" => wanted.extend(ALL),
            Some(dtype) => wanted.push(dtype),
            None => {
                let message =
                    format!("--precision '{name}': expected all, or a list of f32, f16, bf16");
                return Err(Error::usage(message));
            }
        }
    }
    Ok(wanted)
}

fn check_file(
    path: &Path,
    ops: &[&'static OpSpec],
    only: Option<&str>,
    devices: &[Device],
    outcome: &mut Outcome,
) {
    let label = path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned());
    let file = match CaseFile::read(path) {
        Ok(file) => file,
        Err(e) => return outcome.records.push(broken("(unreadable)", &label, &e)),
    };
    if only.is_some_and(|op| op != file.op) {
        return;
    }
    match Subject::from_file(ops, &file) {
        Ok(subject) => try_on(devices, &subject, outcome),
        Err(e) => outcome.records.push(broken(&file.op, &label, &e)),
    }
}

fn try_on(devices: &[Device], subject: &Subject, outcome: &mut Outcome) {
    outcome.records.extend(devices.iter().map(|device| subject.check(device)));
}

/// A case that no device could be asked for.
fn broken(op: &str, case: &str, error: &Error) -> Record {
    Record {
        op: op.into(),
        device: String::new(),
        case: case.into(),
        error: f64::INFINITY,
        failure: Some(error.to_string()),
    }
}

fn find_op(ops: &[&'static OpSpec], name: &str) -> Result<&'static OpSpec, String> {
    if let Some(spec) = ops.iter().find(|spec| spec.name == name) {
        return Ok(spec);
    }
    let names: Vec<_> = ops.iter().map(|spec| spec.name).chain([MODEL]).collect();
    Err(format!("unknown op '{name}'; there are {}", names.join(", ")))
}

/// Something to run on devices, with what it should give.
enum Subject {
    Op(Trial),
    Model(ModelTrial),
}

impl Subject {
    fn from_file(ops: &[&'static OpSpec], file: &CaseFile) -> Result<Self> {
        if file.op == MODEL {
            return ModelTrial::from_file(file).map(Self::Model);
        }
        let spec = find_op(ops, &file.op).map_err(|message| Error::file(&file.path, message))?;
        Trial::from_file(spec, file).map(Self::Op)
    }

    fn run(&self, device: &Device) -> Result<Results> {
        match self {
            Self::Op(trial) => trial.run(device),
            Self::Model(trial) => trial.run(device),
        }
    }

    /// Runs the case twice and compares the first run with the expectation and the second with the first (unless the device
    /// itself compares the runs of every launch).
    fn check(&self, device: &Device) -> Record {
        let (op, label, expected, tolerance) = match self {
            Self::Op(t) => (t.name(), &t.label, &t.expected, t.tolerance),
            Self::Model(t) => (MODEL.to_string(), &t.label, &t.expected, t.tolerance),
        };
        let (error, failure) = match self.run(device) {
            Ok(first) => {
                let gap = judge(&first, expected, tolerance);
                let again = || match self.run(device) {
                    Ok(second) => first_difference(&first, &second),
                    Err(e) => Some(format!("the second run failed: {e}")),
                };
                let once = device.compares_runs();
                (gap.error, gap.failure.or_else(|| if once { None } else { again() }))
            }
            Err(e) => (f64::INFINITY, Some(e.to_string())),
        };
        Record { op, device: device.name().into(), case: label.clone(), error, failure }
    }
}

/// Compares all expected outputs and gradients; the first failure counts.
fn judge(given: &Results, expected: &Results, tolerance: Tolerance) -> Gap {
    let mut worst = Gap::default();
    let sides = [
        ("", &expected.outputs, &given.outputs),
        ("the gradient of ", &expected.gradients, &given.gradients),
        ("after the forward ", &expected.after, &given.after),
    ];
    for (prefix, expected, given) in sides {
        for (name, want) in expected {
            let gap = match given.get(name) {
                Some(got) => compare(&format!("{prefix}{name}"), got, want, tolerance),
                None => Gap {
                    error: f64::INFINITY,
                    failure: Some(format!("there is no {prefix}{name}")),
                },
            };
            worst.error = worst.error.max(gap.error);
            worst.failure = worst.failure.or(gap.failure);
        }
    }
    worst
}

/// Names the first value that differs by a bit between two runs.
fn first_difference(first: &Results, second: &Results) -> Option<String> {
    let differs = |a: &Arrays, b: &Arrays, what: &str| {
        a.iter().find_map(|(name, x)| {
            let y = &b.get(name)?.data;
            let at = x.data.iter().zip(y).position(|(p, q)| p.to_bits() != q.to_bits())?;
            Some(format!(
                "not deterministic: {what}{name} element {at} was {:e}, then {:e}",
                x.data[at], y[at]
            ))
        })
    };
    differs(&first.outputs, &second.outputs, "")
        .or_else(|| differs(&first.gradients, &second.gradients, "the gradient of "))
        .or_else(|| differs(&first.after, &second.after, "after the forward "))
}

/// Opens what was asked for; what is not there is skipped by name, or absent where it is required.
fn open_devices(options: &Options) -> Result<(Vec<Device>, Outcome)> {
    let mut outcome = Outcome::default();
    let mut devices: Vec<Device> = Vec::new();
    for name in names(&options.devices) {
        if name == "all" {
            for report in device_reports() {
                match report.caps {
                    Some(_) => open(&report.name, &mut devices, &mut outcome)?,
                    None => outcome.skipped.push((report.name, report.detail)),
                }
            }
        } else {
            open(&name, &mut devices, &mut outcome)?;
        }
    }
    for name in names(&options.require).into_iter().filter(|_| !options.require.is_empty()) {
        let is = |d: &Device| d.name() == name || d.name().starts_with(&format!("{name}:"));
        if !devices.iter().any(is) && !covered(&name, &devices)? {
            outcome.absent.push(name);
        }
    }
    if devices.is_empty() {
        let why: Vec<_> =
            outcome.skipped.iter().map(|(name, why)| format!("{name}: {why}")).collect();
        return Err(Error::device(
            &options.devices,
            format!("no device to verify ({})", why.join("; ")),
        ));
    }
    outcome.devices = devices.iter().map(|d| (d.name().into(), d.caps().adapter.clone())).collect();
    Ok((devices, outcome))
}

/// Whether a device string such as `auto` or `wgpu:nvidia` means one of these devices.
fn covered(name: &str, devices: &[Device]) -> Result<bool> {
    match Device::new(name) {
        Ok(device) => Ok(devices.iter().any(|d| d.name() == device.name())),
        Err(Error::Device { .. }) => Ok(false),
        Err(other) => Err(other),
    }
}

fn open(name: &str, devices: &mut Vec<Device>, outcome: &mut Outcome) -> Result<()> {
    match Device::new(name) {
        Ok(device) if devices.iter().any(|d| d.name() == device.name()) => {}
        Ok(device) => devices.push(device),
        Err(Error::Device { message, .. }) => outcome.skipped.push((name.into(), message)),
        Err(other) => return Err(other),
    }
    Ok(())
}

/// The names of a list with commas; `all` for an empty one.
fn names(list: &str) -> Vec<String> {
    let names: Vec<_> =
        list.split(',').map(str::trim).filter(|n| !n.is_empty()).map(String::from).collect();
    if names.is_empty() { vec!["all".into()] } else { names }
}

/// A verifier is worth what it finds: ops with one fault each.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::{Access, CpuArgs, F32, Kernel, Plan};
    use crate::ops::case::{Array, Attrs, Case, Layout, Port, Tensors};
    use crate::ops::{add, relu};
    use crate::tape;
    use crate::tensor::Tensor;
    use std::sync::atomic::{AtomicU32, Ordering};

    const X: &[Port] = &[Port::new("x", Layout::Plain)];
    const Y: &[Port] = &[Port::new("y", Layout::Plain)];

    fn spec(run: fn(&Attrs, &Tensors) -> Result<Tensors>) -> &'static OpSpec {
        Box::leak(Box::new(OpSpec {
            name: "relu",
            inputs: X,
            outputs: Y,
            attrs: &[],
            cases: || vec![Case::new("small").normal("x", &[3, 3])],
            run,
            reference: |_, inputs| {
                let x = &inputs["x"];
                let data = x.data.iter().map(|v| v.max(0.0)).collect();
                Ok(Arrays::from([("y".into(), Array { shape: x.shape.clone(), data })]))
            },
        }))
    }

    /// The failure of an op's one case on the CPU.
    fn fault(run: fn(&Attrs, &Tensors) -> Result<Tensors>) -> Option<String> {
        let spec = spec(run);
        let trial = Trial::built_in(spec, &(spec.cases)()[0], DType::F32).unwrap();
        Subject::Op(trial).check(&Device::cpu()).failure
    }

    fn only(y: Tensor) -> Result<Tensors> {
        Ok(Tensors::from([("y".into(), y)]))
    }

    /// What a kernel with one binding does to it.
    fn launch(y: &Tensor, cpu: fn(&CpuArgs<'_>)) -> Result<()> {
        let kernel = Kernel {
            name: "faulty_fwd_f32",
            bindings: &[("y", Access::ReadWrite, F32)],
            cpu,
            wgsl: "",
            cuda: None,
            plan: |_, _| Plan::items(1, 1),
        };
        Box::leak(Box::new(kernel)).launch(&0u32, &[y])
    }

    #[test]
    fn a_sound_op_passes() {
        assert_eq!(fault(|_, t| only(relu(&t["x"])?)), None);
    }

    #[test]
    fn a_wrong_forward_is_found() {
        assert!(fault(|_, t| only(add(&t["x"], &t["x"])?)).unwrap().starts_with("y["));
    }

    #[test]
    fn a_wrong_or_missing_gradient_is_found() {
        let double = fault(|_, t| {
            let y = relu(&t["x"])?.detach();
            only(tape::record("relu", &[&t["x"]], y, |dy, _| Ok(vec![Some(add(dy, dy)?)])))
        });
        assert!(double.unwrap().starts_with("the gradient of x["));
        assert!(
            fault(|_, t| only(relu(&t["x"])?.detach()))
                .unwrap()
                .contains("nothing to differentiate")
        );
    }

    #[test]
    fn a_write_out_of_bounds_is_found() {
        let failure = fault(|_, t| {
            let y = relu(&t["x"])?;
            launch(&y, |args| {
                let after = args.f32_mut(0).as_mut_ptr_range().end;
                // SAFETY: in guard mode the word after a tensor is the device's.
                unsafe { *after = 1.0 };
            })?;
            only(y)
        });
        assert!(failure.unwrap().contains("word 9 of a tensor of 9 words"));
    }

    #[test]
    fn an_output_left_unwritten_is_found() {
        let failure = fault(|_, t| {
            let y = Tensor::empty(t["x"].device(), t["x"].shape())?;
            only(add(&relu(&t["x"])?, &y)?)
        });
        assert!(failure.unwrap().contains("is NaN"));
    }

    #[test]
    fn two_runs_that_differ_are_found() {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        let failure = fault(|_, t| {
            let y = relu(&t["x"])?;
            launch(&y, |args| {
                let first = &mut args.f32_mut(0)[0];
                *first =
                    f32::from_bits(first.to_bits() ^ (RUNS.fetch_add(1, Ordering::Relaxed) & 1));
            })?;
            only(y)
        });
        assert!(failure.unwrap().contains("not deterministic: y element 0"));
    }
}
