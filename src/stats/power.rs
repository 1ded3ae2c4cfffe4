//! What a number of runs can show.

use super::means::standard_error;
use super::student::{critical, crossing, noncentral};

/// How many values a sample has or will have, and their spread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Number of values.
    pub n: usize,
    /// Standard deviation.
    pub sd: f64,
}

/// Probability that Welch's two-sided test at level `alpha` rejects where the means differ by `difference`, by the noncentral t
/// distribution with Welch's degrees of freedom: exact for equal spreads and sizes, close elsewhere. Both tails count.
///
/// `None` where either sample has fewer than two values, neither has a spread, or `alpha` is not between 0 and 1.
pub fn power(difference: f64, a: Sample, b: Sample, alpha: f64) -> Option<f64> {
    let (se, df) = standard_error((a.n, a.sd), (b.n, b.sd))?;
    Some(noncentral(df, difference / se, critical(df, alpha)?))
}

/// The smallest difference of means that Welch's two-sided test at level `alpha` finds with probability `wanted` (0.8 by custom).
///
/// `None` as for [`power`], and where `wanted` is not between `alpha` and 1.
pub fn detectable(a: Sample, b: Sample, alpha: f64, wanted: f64) -> Option<f64> {
    if !(wanted > alpha && wanted < 1.0) {
        return None;
    }
    let (se, df) = standard_error((a.n, a.sd), (b.n, b.sd))?;
    let t = critical(df, alpha)?;
    Some(se * crossing(|shift| noncentral(df, shift, t) - wanted)?)
}
