//! Times of calls: on the host's clock over many calls, and on the device's own clock kernel by kernel.

use super::make::Call;
use super::stats::Summary;
use crate::{Device, Result, Tensor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Instant;

/// A sample on the host's clock is of as many calls as fill this many seconds, then one wait for the device.
const SAMPLE: f64 = 5e-3;
/// Samples even where one takes longer than the time given.
const LEAST_SAMPLES: usize = 3;
/// Bytes written between two calls on a GPU's own clock, more than any cache holds.
const FLUSH: usize = 256 << 20;

/// What one pass takes.
#[derive(Clone, Debug)]
pub struct Timing {
    /// A call on the host's clock, back to back with others: inputs may lie in caches.
    pub wall: Summary,
    /// The sum of its kernels on the device's clock, on a hardware GPU with cold caches; `None` without timestamps.
    pub device: Option<Summary>,
    /// Kernel launches of a call.
    pub launches: usize,
    /// By entry point: launches and median milliseconds of a call.
    pub kernels: Vec<(&'static str, usize, f64)>,
}

impl Timing {
    /// The device's own time on a GPU; on the CPU, and where there are no timestamps, the host's.
    pub fn summary(&self, device: &Device) -> Summary {
        let own = self.device.filter(|_| device.caps().max_invocations > 1);
        own.unwrap_or(self.wall)
    }

    pub(crate) fn json(&self) -> Value {
        let kernel = |(entry, launches, ms): &(&str, usize, f64)| json!({ "entry": entry, "launches": launches, "ms": ms });
        let kernels: Vec<_> = self.kernels.iter().map(kernel).collect();
        json!({ "wall": self.wall, "device": self.device, "launches": self.launches, "kernels": kernels })
    }
}

/// Whether it is a GPU and no software plays it.
pub(crate) fn is_hardware_gpu(device: &Device) -> bool {
    device.caps().max_invocations > 1 && !device.caps().software
}

/// Times `call` for about `seconds`, a third of it on the device's clock.
pub(crate) fn time(device: &Device, call: &Call, seconds: f64) -> Result<Timing> {
    let before = device.launches();
    call()?; // kernels are compiled at their first use
    device.sync()?;
    let launches = device.launches() - before;
    let wall = wall(device, call, seconds * 2.0 / 3.0)?;
    let (device, kernels) = match device.caps().timestamps {
        true => on_device(device, call, seconds / 3.0)?,
        false => (None, Vec::new()),
    };
    Ok(Timing { wall, device, launches, kernels })
}

/// Samples of a call on the host's clock, in about `seconds` after a fifth of that to warm up.
pub(crate) fn wall(device: &Device, call: &Call, seconds: f64) -> Result<Summary> {
    let sample = |calls: usize| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..calls {
            call()?;
        }
        device.sync()?;
        Ok(start.elapsed().as_secs_f64() / calls as f64)
    };
    let start = Instant::now();
    let mut one = sample(1)?;
    while start.elapsed().as_secs_f64() < 0.2 * seconds {
        one = one.min(sample(1)?);
    }
    let calls = (SAMPLE / one).ceil().clamp(1.0, 1e6) as usize;
    let mut samples = Vec::new();
    let start = Instant::now();
    while samples.len() < LEAST_SAMPLES || start.elapsed().as_secs_f64() < 0.8 * seconds {
        samples.push(sample(calls)?);
    }
    Summary::of(&samples).ok_or_else(|| crate::Error::usage("no samples"))
}

type Kernels = Vec<(&'static str, usize, f64)>;

/// Samples of the sum of a call's kernels on the device's clock, and each entry point's part.
fn on_device(device: &Device, call: &Call, seconds: f64) -> Result<(Option<Summary>, Kernels)> {
    let flush = match is_hardware_gpu(device) {
        true => {
            let half = || Tensor::empty(device, &[FLUSH / 8]);
            Some((half()?, half()?))
        }
        false => None,
    };
    let (mut sums, mut parts) = (Vec::new(), BTreeMap::<_, (usize, Vec<f64>)>::new());
    device.set_profiling(true)?;
    let start = Instant::now();
    while sums.len() < LEAST_SAMPLES || start.elapsed().as_secs_f64() < seconds {
        if let Some((to, from)) = &flush {
            to.copy_from(from)?; // a copy is no kernel: it is not in the profile
        }
        call()?;
        let profile = device.take_profile()?;
        let mut by_entry = BTreeMap::<_, (usize, f64)>::new();
        for kernel in &profile {
            let sum = by_entry.entry(kernel.entry).or_default();
            *sum = (sum.0 + 1, sum.1 + kernel.seconds);
        }
        for (entry, (launches, seconds)) in by_entry {
            let part = parts.entry(entry).or_default();
            part.0 = launches;
            part.1.push(seconds);
        }
        sums.push(profile.iter().map(|k| k.seconds).sum());
    }
    device.set_profiling(false)?;
    let median = |times: &[f64]| Summary::of(times).map_or(0.0, |s| s.median_ms);
    let mut kernels: Kernels =
        parts.into_iter().map(|(entry, (n, times))| (entry, n, median(&times))).collect();
    kernels.sort_by(|a, b| b.2.total_cmp(&a.2));
    Ok((Summary::of(&sums), kernels))
}
