//! From a device string to a device.

#[cfg(feature = "wgpu")]
use super::wgpu::Variants;
use super::{Caps, Device};
use crate::error::{Error, Result};

/// One device that could be asked for, as `doctor` shows it.
#[derive(Clone, Debug)]
pub struct DeviceReport {
    /// The device string: `cpu`, `wgpu:0`, `cuda:0`.
    pub name: String,
    /// The hardware's own name, or why the device is not usable and what to do.
    pub detail: String,
    /// What it can do; `None` where it cannot be opened.
    pub caps: Option<Caps>,
}

/// What a device string may be.
const EXPECTED: &str =
    "auto, cpu, wgpu, wgpu:INDEX, wgpu:PART-OF-NAME, wgpu-base, wgpu-tiled, cuda:INDEX or cuda-emu";

/// How to get a Vulkan driver, for messages.
#[cfg(feature = "wgpu")]
const NO_ADAPTER: &str = "no GPU adapter found; install a Vulkan driver (Debian/Ubuntu: `apt-get install mesa-vulkan-drivers` \
     for AMD, Intel and software rendering; NVIDIA: the vendor driver; in containers set NVIDIA_DRIVER_CAPABILITIES=all)";

impl Device {
    /// Opens a device: `auto`, `cpu`, `wgpu`, `wgpu:1` (by index), `wgpu:nvidia` (by part of the adapter's name), `cuda:0`,
    /// `wgpu-base` (an adapter as one without subgroups, for tests of the kernels that all adapters can run), `wgpu-tiled` (software as
    /// if it were hardware, for tests of the kernels with tiles in workgroup memory), or `cuda-emu` (the CUDA kernels on the host, for
    /// tests, in builds with that feature).
    ///
    /// `auto` takes a hardware GPU where there is one, else the CPU.
    ///
    /// # Errors
    /// [`Error::Usage`] for a string of another form, [`Error::Device`] where the device is not there, with what to install.
    pub fn new(name: &str) -> Result<Self> {
        let (kind, which) = name.split_once(':').map_or((name, None), |(k, w)| (k, Some(w)));
        match (kind, which) {
            ("cpu", None) => Ok(Self::cpu()),
            ("auto", None) => Ok(hardware().unwrap_or_else(Self::cpu)),
            ("wgpu" | "wgpu-base" | "wgpu-tiled", _) => open_wgpu(kind, which),
            ("cuda", _) => open_cuda(which),
            ("cuda-emu", None) => open_emulated(),
            _ => Err(Error::usage(format!("unknown device '{name}': expected {EXPECTED}"))),
        }
    }
}

fn hardware() -> Option<Device> {
    let wgpu = || open_wgpu("wgpu", None).ok().filter(|d| !d.caps().software);
    open_cuda(None).ok().or_else(wgpu)
}

#[cfg(feature = "wgpu")]
fn open_wgpu(kind: &str, which: Option<&str>) -> Result<Device> {
    let adapters = super::wgpu_adapters::adapters();
    if adapters.is_empty() {
        return Err(Error::device("wgpu", NO_ADAPTER));
    }
    let name_of = |i: usize| adapters[i].get_info().name;
    let index = match which.map(|w| (w, w.parse::<usize>())) {
        None => Some(0),
        Some((_, Ok(index))) => Some(index).filter(|i| *i < adapters.len()),
        Some((part, Err(_))) => {
            (0..adapters.len()).find(|i| name_of(*i).to_lowercase().contains(&part.to_lowercase()))
        }
    };
    let Some(index) = index else {
        let list: Vec<_> =
            (0..adapters.len()).map(|i| format!("wgpu:{i} = {}", name_of(i))).collect();
        let message = format!("no such adapter; there are: {}", list.join(", "));
        return Err(Error::device(format!("wgpu:{}", which.unwrap_or("0")), message));
    };
    let variants = match kind {
        "wgpu-base" => Variants::Base,
        "wgpu-tiled" => Variants::Tiled,
        _ => Variants::Best,
    };
    let name = format!("{kind}:{index}");
    let backend = super::wgpu::WgpuBackend::open(&name, &adapters[index], variants)?;
    Ok(Device::from_backend(Box::new(backend)))
}

#[cfg(not(feature = "wgpu"))]
fn open_wgpu(_: &str, _: Option<&str>) -> Result<Device> {
    Err(Error::device("wgpu", "this build has no wgpu; build with `--features wgpu`"))
}

#[cfg(feature = "cuda-emu")]
fn open_emulated() -> Result<Device> {
    Ok(Device::from_backend(Box::new(super::cuda_emu::EmulatedBackend::open()?)))
}

#[cfg(not(feature = "cuda-emu"))]
fn open_emulated() -> Result<Device> {
    let message = "this build has no emulated CUDA device; build with `--features cuda-emu`";
    Err(Error::device("cuda-emu", message))
}

#[cfg(feature = "cuda")]
fn open_cuda(which: Option<&str>) -> Result<Device> {
    let index = which.unwrap_or("0");
    let name = format!("cuda:{index}");
    let Ok(ordinal) = index.parse::<usize>() else {
        return Err(Error::usage(format!("unknown device '{name}': expected {EXPECTED}")));
    };
    let found = super::cuda::probe().map_err(|why| Error::device(&name, why))?;
    if ordinal >= found.len() {
        let list: Vec<_> =
            found.iter().enumerate().map(|(i, name)| format!("cuda:{i} = {name}")).collect();
        let message = format!("no such device; there are: {}", list.join(", "));
        return Err(Error::device(name, message));
    }
    let backend = super::cuda::CudaBackend::open(&name, ordinal)?;
    Ok(Device::from_backend(Box::new(backend)))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: Option<&str>) -> Result<Device> {
    Err(Error::device("cuda:0", "this build has no CUDA; build with `--features cuda`"))
}

/// How many CUDA devices to report: one where there are none, to say why.
fn cuda_count() -> usize {
    #[cfg(feature = "cuda")]
    return super::cuda::probe().map_or(1, |found| found.len());
    #[cfg(not(feature = "cuda"))]
    1
}

/// Every device this build knows of, usable or not.
pub fn device_reports() -> Vec<DeviceReport> {
    let cpu = Device::cpu();
    let mut reports = vec![usable(&cpu)];
    #[cfg(feature = "wgpu")]
    {
        let adapters = super::wgpu_adapters::adapters();
        if adapters.is_empty() {
            reports.push(missing("wgpu", NO_ADAPTER.into()));
        }
        for (i, adapter) in adapters.iter().enumerate() {
            let name = format!("wgpu:{i}");
            match super::wgpu::WgpuBackend::open(&name, adapter, Variants::Best) {
                Ok(backend) => reports.push(usable(&Device::from_backend(Box::new(backend)))),
                Err(e) => reports.push(missing(&name, e.to_string())),
            }
        }
    }
    for i in 0..cuda_count() {
        reports.push(match open_cuda(Some(&i.to_string())) {
            Ok(device) => usable(&device),
            Err(Error::Device { message, .. }) => missing(&format!("cuda:{i}"), message),
            Err(e) => missing(&format!("cuda:{i}"), e.to_string()),
        });
    }
    // For tests only: a build without it lacks nothing.
    if cfg!(feature = "cuda-emu") {
        reports.push(match open_emulated() {
            Ok(device) => usable(&device),
            Err(e) => missing("cuda-emu", e.to_string()),
        });
    }
    reports
}

fn usable(device: &Device) -> DeviceReport {
    let caps = device.caps().clone();
    DeviceReport { name: caps.name.clone(), detail: caps.adapter.clone(), caps: Some(caps) }
}

fn missing(name: &str, detail: String) -> DeviceReport {
    DeviceReport { name: name.into(), detail, caps: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_device_string_says_what_is_expected() {
        for name in ["gpu", "cpu:1", "auto:2", "", "vulkan", "cuda-emu:0"] {
            match Device::new(name) {
                Err(Error::Usage(message)) => assert!(message.contains("wgpu:INDEX"), "{message}"),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}
