//! Student's t distribution, central and not. The incomplete beta function and the error function are those of `statrs`.

use statrs::function::beta::checked_beta_reg;
use statrs::function::erf;
use statrs::function::gamma::checked_gamma_lr;

/// Probability of a |t| as large or larger, with `df` > 0 degrees of freedom: I_x(df / 2, 1 / 2) at x = df / (df + t^2)
/// (Abramowitz and Stegun 26.7.1 and 26.5.27). NaN for arguments that are none.
pub(super) fn two_sided(df: f64, t: f64) -> f64 {
    checked_beta_reg(0.5 * df, 0.5, df / (df + t * t)).unwrap_or(f64::NAN)
}

/// The t that is passed in size with probability `alpha`; `None` unless `df` > 0 and 0 < `alpha` < 1.
pub(super) fn critical(df: f64, alpha: f64) -> Option<f64> {
    if !(df > 0.0 && df.is_finite() && alpha > 0.0 && alpha < 1.0) {
        return None;
    }
    crossing(|t| alpha - two_sided(df, t))
}

/// Where a growing function that is below 0 at 0 comes to 0: the bracket is doubled until it holds the place, then halved until it
/// shrinks no more. `None` where the function stays below 0.
pub(super) fn crossing(f: impl Fn(f64) -> f64) -> Option<f64> {
    let mut high = 1.0;
    while f(high) < 0.0 {
        high *= 2.0;
        if high > 1e300 {
            return None;
        }
    }
    let mut low = 0.0;
    loop {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            return Some(middle);
        }
        if f(middle) < 0.0 { low = middle } else { high = middle }
    }
}

/// Probability that a standard normal number is below `z`.
pub(super) fn normal(z: f64) -> f64 {
    0.5 * erf::erfc(-z * std::f64::consts::FRAC_1_SQRT_2)
}

/// The number that a standard normal one is below with probability `p`; infinite at 0 and 1.
pub(super) fn normal_quantile(p: f64) -> f64 {
    -std::f64::consts::SQRT_2 * erf::erfc_inv(2.0 * p)
}

/// Probability that |T| > `t` > 0 for T = (Z + `shift`) / sqrt(V / `df`), Z standard normal and V chi-squared with `df` degrees of
/// freedom: Student's t, not central.
pub(super) fn noncentral(df: f64, shift: f64, t: f64) -> f64 {
    above(df, shift, t) + above(df, -shift, t)
}

/// Probability that T > `t`, which is that V / df < (x / t)^2 at x = Z + `shift` > 0: the mean of chi-squared's distribution function over Z.
///
/// It is integrated over y = 2 ln(x / t) by the trapezoid rule, whose error falls exponentially with the step because the integrand is smooth
/// and vanishes at both ends.
fn above(df: f64, shift: f64, t: f64) -> f64 {
    const FAR: f64 = 9.0; // in standard deviations of Z
    let place = |x: f64| 2.0 * (x / t).ln();
    // There chi-squared's distribution function is below e^-40.
    let least = -(1.0 + 80.0 / df);
    let from = if shift > FAR { least.max(place(shift - FAR)) } else { least };
    let to = place(shift.max(0.0) + FAR);
    let step = 0.2 * (2.0 / df).sqrt().min(2.0 / (shift.abs() + 2.0));
    let steps = ((to - from) / step).ceil().max(0.0) as usize;
    let integrand = |i: usize| {
        let y = from + step * i as f64;
        let x = t * (0.5 * y).exp();
        let below = checked_gamma_lr(0.5 * df, 0.5 * df * y.exp()).unwrap_or(f64::NAN);
        below * x * (-0.5 * (x - shift).powi(2)).exp()
    };
    let sum: f64 = (0..=steps).map(integrand).sum();
    0.5 * step * sum / std::f64::consts::TAU.sqrt()
}
