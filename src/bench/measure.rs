//! Times of calls: on the host's clock over many calls, and on the device's own clock kernel by kernel.

use super::make::{Call, Taped};
use super::stats::Summary;
use crate::{Device, Result, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// A sample on the host's clock is of as many calls as fill this many seconds, then one wait for the device.
const SAMPLE: f64 = 5e-3;
/// Samples even where one takes longer than the time given. Fewer say next to nothing of their noise.
const LEAST_SAMPLES: usize = 5;
/// Bytes written between two calls on a GPU's own clock, more than any cache holds.
const FLUSH: usize = 256 << 20;

/// An entry point's part of a pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// The entry point.
    pub entry: String,
    /// Its launches in a call.
    pub launches: usize,
    /// Median milliseconds of them all together.
    pub ms: f64,
}

/// What one pass takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Median: the device's own time on a GPU; on the CPU, and where there are no timestamps, the host's.
    pub ms: f64,
    /// A fifth of the same samples is below.
    pub p20_ms: f64,
    /// Four fifths of them are below.
    pub p80_ms: f64,
    /// A call on the host's clock, back to back with others: inputs may lie in caches.
    pub wall: Summary,
    /// The sum of its kernels on the device's clock, on a hardware GPU with cold caches; `None` without timestamps.
    pub device: Option<Summary>,
    /// Kernel launches of a call.
    pub launches: usize,
    /// By entry point, the longest first.
    pub kernels: Vec<Share>,
}

impl Timing {
    /// How many samples are behind `ms`, `p20_ms` and `p80_ms`.
    pub fn samples(&self) -> usize {
        match &self.device {
            Some(device) if self.ms != self.wall.median_ms => device.samples,
            _ => self.wall.samples,
        }
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
    let is_gpu = device.caps().max_invocations > 1;
    let (own, kernels) = match device.caps().timestamps {
        true => on_device(device, call, seconds / 3.0)?,
        false => (None, Vec::new()),
    };
    let Summary { median_ms: ms, p20_ms, p80_ms, .. } = own.filter(|_| is_gpu).unwrap_or(wall);
    Ok(Timing { ms, p20_ms, p80_ms, wall, device: own, launches, kernels })
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

/// Samples of the sum of a call's kernels on the device's clock, and each entry point's part.
fn on_device(device: &Device, call: &Call, seconds: f64) -> Result<(Option<Summary>, Vec<Share>)> {
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
    let share = |(entry, (launches, times)): (&str, (usize, Vec<f64>))| Share {
        entry: entry.into(),
        launches,
        ms: median(&times),
    };
    let mut kernels: Vec<Share> = parts.into_iter().map(share).collect();
    kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    Ok((Summary::of(&sums), kernels))
}

/// Bytes of tensors at the worst moment of a call, beside what is live before it.
pub(crate) fn peak(device: &Device, call: &Call) -> Result<usize> {
    let live = device.memory().live;
    device.reset_peak();
    call()?;
    device.sync()?;
    Ok(device.memory().peak - live)
}

/// Bytes that the tape keeps from a forward until its backward: activations that go in, and what the forward leaves behind for
/// the backward (an output that it needs, statistics, log-sum-exps). Weights, tables and an output that only the caller
/// holds are not counted.
pub(crate) fn saved(device: &Device, taped: &Taped) -> Result<usize> {
    let before = device.memory().live;
    let y = (taped.output)()?;
    let node = y.node().cloned();
    drop(y);
    let left = device.memory().live - before;
    drop(node);
    Ok(taped.inputs + left)
}
