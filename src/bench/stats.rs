//! Medians and percentiles.

use serde::{Deserialize, Serialize};

use crate::stats::percentile;

/// Times of the same thing, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Half of the samples are below.
    pub median_ms: f64,
    /// A fifth of the samples is below.
    pub p20_ms: f64,
    /// Four fifths of the samples are below.
    pub p80_ms: f64,
    /// The least sample.
    pub best_ms: f64,
    /// How many samples.
    pub samples: usize,
}

impl Summary {
    /// Of samples in seconds; `None` without samples.
    pub fn of(seconds: &[f64]) -> Option<Self> {
        let mut sorted: Vec<f64> = seconds.iter().map(|s| 1e3 * s).collect();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| percentile(&sorted, share);
        Some(Self {
            median_ms: at(0.5)?,
            p20_ms: at(0.2)?,
            p80_ms: at(0.8)?,
            best_ms: *sorted.first()?,
            samples: sorted.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_known_samples() {
        let s = Summary::of(&[0.005, 0.001, 0.002, 0.004, 0.003, 0.1]).unwrap();
        assert!((s.median_ms - 3.5).abs() < 1e-9, "an outlier moves no median: {s:?}");
        assert!((s.p20_ms - 2.0).abs() < 1e-9 && (s.p80_ms - 5.0).abs() < 1e-9, "{s:?}");
        assert!((s.best_ms - 1.0).abs() < 1e-9 && s.samples == 6, "{s:?}");
        assert_eq!(Summary::of(&[]), None);
        let one = Summary::of(&[0.25]).unwrap();
        assert_eq!((one.median_ms, one.p20_ms, one.p80_ms, one.samples), (250.0, 250.0, 250.0, 1));
    }
}
