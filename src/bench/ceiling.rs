//! What the device can do at most: bytes copied, f32 multiply-adds and launches a second, measured before the rows; for 16-bit
//! elements, whose tensor cores no kernel here can saturate, the maker's figure where it is known.

use super::make::Call;
use super::measure::{is_hardware_gpu, wall};
use crate::cpu::peak as cpu;
use crate::kernel::{Access, Cuda, CudaPlan, F32, Kernel, Plan, cuda_text, params};
use crate::{DType, Device, Result, Tensor};
use bytemuck::{Pod, Zeroable};
use serde::{Deserialize, Serialize};

/// A rate, and where it comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceiling {
    /// Bytes, floating-point operations or launches a second.
    pub per_second: f64,
    /// `measured` here and now, or `spec`: the maker's figure, which no program reaches.
    pub source: String,
    /// How it was measured, or whose figure it is.
    pub how: String,
}

/// The ceilings of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Bytes read and written a second by a copy on the device.
    pub copy: Ceiling,
    /// Floating-point operations a second (a multiply-add is two); `None` where nothing is known.
    pub multiply_add: Option<Ceiling>,
    /// Launches a second of a kernel that has next to nothing to do; `None` in older files.
    #[serde(default)]
    pub launch: Option<Ceiling>,
}

/// The parameter block of the multiply-add kernel.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct PeakParams {
    /// Chains, and multiply-adds of each.
    pub(crate) len: u32,
    pub(crate) rounds: u32,
    /// v = a v + b.
    pub(crate) a: f32,
    pub(crate) b: f32,
}

/// y[i] = i, then `rounds` times a y[i] + b: registers only, so nothing but the multiply-add units can bind.
static PEAK: Kernel = Kernel {
    name: "peak_fma_f32",
    bindings: &[("y", Access::Write, F32)],
    cpu: cpu::fma,
    wgsl: include_str!("../../shaders/peak.wgsl"),
    cuda: Some(Cuda {
        text: cuda_text!("peak"),
        half: None,
        plan: |bytes, _| CudaPlan::items(params::<PeakParams>(bytes).len as usize, CHAINS, 256),
    }),
    plan: |bytes, _| Plan::items(params::<PeakParams>(bytes).len as usize, 256 * CHAINS),
};

/// Chains of a GPU's thread: enough to hide the latency of one.
const CHAINS: u32 = 16;

/// Measures the ceilings in about `seconds`.
///
/// # Errors
/// [`crate::Error::Device`] when memory runs out or the device is lost.
pub(crate) fn ceilings(device: &Device, dtype: DType, seconds: f64) -> Result<Ceilings> {
    let copy = copy(device, seconds / 3.0)?;
    let multiply_add = match dtype {
        DType::F32 => Some(multiply_add(device, seconds / 3.0)?),
        _ => tensor_cores(&device.caps().adapter),
    };
    let launch = Some(launch(device, seconds / 3.0)?);
    Ok(Ceilings { copy, multiply_add, launch })
}

/// What a launch costs beside its kernel's work: checks, encoding, submission, and the device's own start of a kernel.
fn launch(device: &Device, seconds: f64) -> Result<Ceiling> {
    const LAUNCHES: usize = 256;
    let y = Tensor::empty(device, &[1])?;
    let p = PeakParams { len: 1, rounds: 0, a: 0.0, b: 0.0 };
    let call: Call = Box::new(move || (0..LAUNCHES).try_for_each(|_| PEAK.launch(&p, &[&y])));
    let best = wall(device, &call, seconds)?;
    let how = format!(
        "{LAUNCHES} launches of a kernel of one number, one after the other, best of {}",
        best.samples
    );
    Ok(Ceiling { per_second: 1e3 * LAUNCHES as f64 / best.best_ms, source: "measured".into(), how })
}

/// Of ever larger jobs the first that takes long beside its launch, or the last: software ranges from drivers that use every vector unit to
/// an emulator that runs one thread after another.
fn long_enough<T: Copy>(
    device: &Device,
    sizes: &[T],
    job: impl Fn(&T) -> Result<Call>,
) -> Result<(T, Call)> {
    const LONG_MS: f64 = 8.0;
    let mut last = None;
    for size in sizes {
        let call = job(size)?;
        let long = sizes.len() > 1 && wall(device, &call, 0.0)?.best_ms >= LONG_MS;
        last = Some((*size, call));
        if long {
            break;
        }
    }
    last.ok_or_else(|| crate::Error::usage("no size to measure a ceiling with"))
}

fn copy(device: &Device, seconds: f64) -> Result<Ceiling> {
    let sizes: &[usize] = match (is_hardware_gpu(device), device.caps().software) {
        (true, _) => &[512 << 20],
        (_, true) => &[1 << 20, 16 << 20, 128 << 20],
        _ => &[128 << 20], // more than a server's last cache
    };
    let (bytes, call) = long_enough(device, sizes, |&bytes| {
        let tensor = || Tensor::zeros(device, &[bytes / 4]);
        let (to, from) = (tensor()?, tensor()?);
        Ok(Box::new(move || to.copy_from(&from)))
    })?;
    let best = wall(device, &call, seconds)?;
    let how = format!(
        "copy of {} MiB on the device, read and written bytes, best of {}",
        bytes >> 20,
        best.samples
    );
    Ok(Ceiling { per_second: 2e3 * bytes as f64 / best.best_ms, source: "measured".into(), how })
}

fn multiply_add(device: &Device, seconds: f64) -> Result<Ceiling> {
    let sizes: &[(usize, u32)] = match (is_hardware_gpu(device), device.caps().software) {
        (true, _) => &[(8 << 20, 2048)],
        (_, true) => &[(8 << 10, 64), (64 << 10, 64), (256 << 10, 256), (256 << 10, 2048)],
        _ => &[(96 << 8, 2048)],
    };
    let ((len, rounds), call) = long_enough(device, sizes, |&(len, rounds)| {
        let y = Tensor::empty(device, &[len])?;
        let p = PeakParams { len: len as u32, rounds, a: 0.999, b: 0.001 };
        Ok(Box::new(move || PEAK.launch(&p, &[&y])))
    })?;
    let flop = 2.0 * len as f64 * f64::from(rounds);
    let best = wall(device, &call, seconds)?;
    let how = format!(
        "f32 multiply-adds in registers, {len} chains of {rounds}, best of {}",
        best.samples
    );
    Ok(Ceiling { per_second: 1e3 * flop / best.best_ms, source: "measured".into(), how })
}

/// Dense 16-bit tensor-core rates with f32 sums by NVIDIA's data sheets, TFLOP/s; the first name that matches counts.
const SHEETS: [(&str, f64); 9] = [
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4 ", 121.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("A10 ", 125.0),
];

fn tensor_cores(adapter: &str) -> Option<Ceiling> {
    let (name, tera) = SHEETS.iter().find(|(name, _)| adapter.contains(name))?;
    let how = format!("data sheet of NVIDIA {}, dense 16-bit products with f32 sums", name.trim());
    Some(Ceiling { per_second: tera * 1e12, source: "spec".into(), how })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The chains end where they should, on every device that is here: a device that skips work would look fast.
    #[test]
    fn the_multiply_adds_are_done() {
        for report in crate::device_reports().iter().filter(|r| r.caps.is_some()) {
            let device = Device::new(&report.name).unwrap();
            for len in [1usize, 95, 97, 5000] {
                let y = Tensor::empty(&device, &[len]).unwrap();
                let p = PeakParams { len: len as u32, rounds: 7, a: 0.5, b: 0.25 };
                PEAK.launch(&p, &[&y]).unwrap();
                for (i, got) in y.to_f32().unwrap().into_iter().enumerate() {
                    let want = (0..7).fold(i as f32, |v, _| v * 0.5 + 0.25);
                    let gap = (got - want).abs();
                    assert!(gap <= 1e-6 * want.abs(), "{}: {i}: {got} {want}", report.name);
                }
            }
        }
    }

    #[test]
    fn ceilings_of_the_cpu_are_plausible() {
        let c = ceilings(&Device::cpu(), DType::F32, 0.05).unwrap();
        assert!(c.copy.per_second > 1e8 && c.copy.per_second < 1e13, "{c:?}");
        let flops = c.multiply_add.unwrap().per_second;
        assert!(flops > 1e8 && flops < 1e14, "{flops}");
        let launches = c.launch.unwrap().per_second;
        assert!(launches > 1e3 && launches < 1e9, "{launches}");
        assert_eq!(ceilings(&Device::cpu(), DType::BF16, 0.02).unwrap().multiply_add, None);
    }

    #[test]
    fn a_data_sheet_is_said_to_be_one() {
        let rate = |name| tensor_cores(name).map(|c| (c.per_second / 1e12, c.source));
        assert_eq!(
            rate("NVIDIA H100 80GB HBM3 (compute capability 9.0)"),
            Some((989.4, "spec".into()))
        );
        assert_eq!(rate("NVIDIA H100 PCIe (compute capability 9.0)"), Some((756.0, "spec".into())));
        assert_eq!(rate("llvmpipe"), None);
    }
}
