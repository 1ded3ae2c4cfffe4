//! `attn2d doctor`: what this machine offers, what is missing, and how to get it.

use crate::tensor::Tensor;
use crate::{Caps, Device, DeviceReport, Result, backend, device_reports, ops};
use std::fmt::Write;
use std::time::Instant;

/// Everything that helps to find out why a device is not used, as text to paste in an issue.
///
/// Each device is opened and runs one kernel, so that a driver that is found but does not work is seen here.
pub fn report() -> String {
    let mut out = String::new();
    line(&mut out, &format!("attn2d {} ({})", env!("CARGO_PKG_VERSION"), features()));
    line(
        &mut out,
        &format!("system: {} {}, {}", std::env::consts::OS, std::env::consts::ARCH, processor()),
    );
    line(&mut out, "");
    let reports = device_reports();
    for report in &reports {
        describe(&mut out, report);
    }
    line(&mut out, "");
    line(&mut out, &format!("CUDA kernels: {}", backend::cuda_kernels()));
    line(&mut out, &format!("--device auto takes: {}", auto()));
    line(&mut out, &data_note());
    line(
        &mut out,
        "next: `attn2d verify` runs every kernel's conformance cases on every device that works",
    );
    out
}

fn line(out: &mut String, text: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{text}");
}

fn features() -> String {
    let has = |on: bool, name: &str| format!("{name} {}", if on { "yes" } else { "no" });
    format!(
        "built with: {}, {}",
        has(cfg!(feature = "wgpu"), "wgpu"),
        has(cfg!(feature = "cuda"), "cuda")
    )
}

/// The processor's name where the system tells it, and the threads that kernels use.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    let name = name.map_or("processor name unknown", |(_, n)| n.trim());
    format!("{name}, {} threads (set RAYON_NUM_THREADS to change)", rayon::current_num_threads())
}

fn describe(out: &mut String, report: &DeviceReport) {
    match &report.caps {
        None => line(out, &format!("[ -- ] {:8} {}", report.name, report.detail)),
        Some(caps) => match try_out(&report.name) {
            Ok(seconds) => {
                line(out, &format!("[ ok ] {:8} {}", report.name, report.detail));
                line(
                    out,
                    &format!(
                        "                first kernel {:.0} ms; {}",
                        seconds * 1e3,
                        limits(caps)
                    ),
                );
            }
            Err(e) => line(out, &format!("[FAIL] {:8} {}: {e}", report.name, report.detail)),
        },
    }
}

fn limits(caps: &Caps) -> String {
    let yes = |on: bool| if on { "yes" } else { "no" };
    let half: Vec<_> = caps.half.iter().map(|dtype| dtype.suffix()).collect();
    let half = if half.is_empty() { "none".into() } else { half.join(", ") };
    let half = format!("kernels in half precision {half}");
    if caps.max_invocations == 1 {
        return format!("the reference of every other device, {half}, by way of f32");
    }
    let subgroup = caps.subgroup.map_or("none".into(), |(least, most)| format!("{least}..{most}"));
    format!(
        "{}workgroup memory {} KiB, {} invocations, binding {} MiB, subgroups {subgroup}, f16 in shaders {}, timestamps {}, {half}",
        if caps.software { "software (right, not fast), " } else { "" },
        caps.workgroup_memory / 1024,
        caps.max_invocations,
        caps.max_binding >> 20,
        yes(caps.f16),
        yes(caps.timestamps)
    )
}

/// Opens the device and runs a kernel; seconds until its result was read.
fn try_out(name: &str) -> Result<f64> {
    let start = Instant::now();
    let device = Device::new(name)?;
    let x = Tensor::from_f32(&device, &[3], &[-1.0, 0.5, 2.0])?;
    let y = ops::relu(&x)?.to_f32()?;
    if y != [0.0, 0.5, 2.0] {
        return Err(crate::Error::device(name, format!("relu([-1, 0.5, 2]) gave {y:?}")));
    }
    Ok(start.elapsed().as_secs_f64())
}

fn auto() -> String {
    Device::new("auto")
        .map_or_else(|e| e.to_string(), |d| format!("{} ({})", d.name(), d.caps().adapter))
}

fn data_note() -> String {
    match std::env::var_os("ATTN2D_DATA") {
        Some(path) => format!("ATTN2D_DATA is {}", path.to_string_lossy()),
        None => "ATTN2D_DATA is not set (tests look for real images there; docs/data.md says where to download them)".into(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_cpu_always_works() {
        let text = super::report();
        assert!(text.contains("[ ok ] cpu"), "{text}");
        assert!(text.contains("kernels in half precision f16, bf16, by way of f32"), "{text}");
        assert!(text.contains("cuda:0") && text.contains("--device auto takes"), "{text}");
        assert!(!text.contains("[FAIL]"), "{text}");
        assert!(text.contains("CUDA kernels: "), "{text}");
    }
}
