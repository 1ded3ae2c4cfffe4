//! Means, their spread, and Welch's test of two of them.

use super::student::{critical, two_sided};

/// From where to where a quantity lies at some confidence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

/// The arithmetic mean; `None` without values. The mean of equal values is that value to the bit.
pub fn mean(values: &[f64]) -> Option<f64> {
    let first = *values.first()?;
    let beyond: f64 = values.iter().map(|v| v - first).sum();
    Some(first + beyond / values.len() as f64)
}

/// The standard deviation with n - 1 below the fraction; `None` for fewer than two values. 0 only where all values are equal.
pub fn sd(values: &[f64]) -> Option<f64> {
    let mean = mean(values)?;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() - 1) as f64).sqrt())
}

/// Student's interval of a mean, mean +- t sd / sqrt(n); `None` for fewer than two values.
pub fn mean_interval(values: &[f64], level: f64) -> Option<Interval> {
    let (mean, sd, n) = (mean(values)?, sd(values)?, values.len() as f64);
    let half = critical(n - 1.0, 1.0 - level)? * sd / n.sqrt();
    Some(Interval { low: mean - half, high: mean + half })
}

/// The value below which `share` of the sorted values lie, linear between two of them; `None` without values.
pub fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let place = share * last as f64;
    let (low, part) = (place.floor() as usize, place.fract());
    Some(sorted[low] + part * (sorted[(low + 1).min(last)] - sorted[low]))
}

/// What [`welch`] finds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Welch {
    /// Mean of the first less mean of the second.
    pub difference: f64,
    /// Interval of the difference.
    pub interval: Interval,
    /// The difference in units of its standard error.
    pub t: f64,
    /// Degrees of freedom by Welch and Satterthwaite.
    pub df: f64,
    /// Probability of so large a |t| where both means are equal.
    pub p: f64,
}

/// The standard error of a difference of means and its degrees of freedom, of two samples' sizes and standard deviations:
/// se^2 = s_a^2 / n_a + s_b^2 / n_b and df = se^4 / (s_a^4 / (n_a^2 (n_a - 1)) + s_b^4 / (n_b^2 (n_b - 1))) (Welch 1947).
/// `None` for fewer than two values, no spread in either, or numbers that are not finite.
pub(super) fn standard_error(a: (usize, f64), b: (usize, f64)) -> Option<(f64, f64)> {
    if a.0 < 2 || b.0 < 2 {
        return None;
    }
    let ((na, sa), (nb, sb)) = ((a.0 as f64, a.1), (b.0 as f64, b.1));
    let (va, vb) = (sa * sa / na, sb * sb / nb);
    let variance = va + vb;
    // In shares of the whole, so that no square of a small variance vanishes.
    let (ka, kb) = (va / variance, vb / variance);
    let df = 1.0 / (ka * ka / (na - 1.0) + kb * kb / (nb - 1.0));
    (variance > 0.0 && variance.is_finite() && df.is_finite()).then(|| (variance.sqrt(), df))
}

/// Welch's test of two means, which does not take the spreads for equal, with the interval of their difference.
///
/// `None` where a sample has fewer than two values, a value is not finite, or both samples are constant: without any spread there is
/// nothing to hold a difference against.
pub fn welch(a: &[f64], b: &[f64], level: f64) -> Option<Welch> {
    let difference = mean(a)? - mean(b)?;
    let (se, df) = standard_error((a.len(), sd(a)?), (b.len(), sd(b)?))?;
    let t = difference / se;
    let half = critical(df, 1.0 - level)? * se;
    let interval = Interval { low: difference - half, high: difference + half };
    Some(Welch { difference, interval, t, df, p: two_sided(df, t) })
}
