//! Statistics of a few numbers: the tests, intervals and effect sizes that repeated runs of two models are judged by.
//!
//! Plain functions from slices to numbers. What a quantity cannot be computed of (too few values, a value that is not finite, no spread at
//! all) is `None`, never a made-up number. Intervals are two-sided and take a confidence `level` such as 0.95; tests are two-sided and give
//! p. Whatever draws random numbers takes a seed and gives the same bits for the same seed. `scripts/stats_reference` computes
//! the same by SciPy, brute force and exact fractions; the unit tests hold both against each other.
//!
//! ```
//! use attn2d::stats;
//!
//! let (ours, theirs) = ([0.81, 0.84, 0.83, 0.85], [0.80, 0.79, 0.82, 0.80]);
//! let test = stats::welch(&ours, &theirs, 0.95).expect("both have a spread");
//! assert!(test.p < 0.05 && test.interval.low > 0.0);
//! assert_eq!(stats::holm(&[0.01, 0.04, 0.03]), [0.03, 0.06, 0.06]);
//! ```

mod bootstrap;
mod counts;
mod means;
mod power;
mod ranks;
mod student;

pub use bootstrap::{Effect, balanced_interval, hedges};
pub use counts::{holm, mcnemar};
pub use means::{Interval, Welch, mean, mean_interval, percentile, sd, welch};
pub use power::{Sample, detectable, power};
pub use ranks::{MannWhitney, mann_whitney};

#[cfg(test)]
mod tests;
