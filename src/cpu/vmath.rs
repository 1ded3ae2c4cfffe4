//! Functions of one number without branches or calls, so that loops over them become vector code under
//! [`super::simd::vectorise`]; their base is [`exp`].

use super::lanes::exp;

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The standard normal's upper tail, `0.5 * erfc(z / sqrt 2)`, for `z >= 0`, to a relative error below 3e-7.
///
/// Written as `e^(-z^2/2) * t * P(t)` with `t = 1 / (1 + 0.28 z)`: the tail falls off as `e^(-z^2/2) / z`, so what is left
/// for the polynomial is nearly flat. `P` (degree 8) interpolates the exact ratio at Chebyshev nodes for z in 0..13.
#[inline(always)]
pub(crate) fn normal_tail(z: f32) -> f32 {
    let t = 1.0 / z.mul_add(0.28, 1.0);
    let mut p = TAIL[8];
    for &c in TAIL[..8].iter().rev() {
        p = t.mul_add(p, c);
    }
    t * p * exp(-0.5 * z * z)
}

/// Coefficients of `P` in [`normal_tail`], lowest degree first; `shaders/elementwise.wgsl` has the same.
const TAIL: [f32; 9] = [
    0.111_675_51,
    0.112_196_43,
    0.099_479_21,
    0.097_808_8,
    0.039_661_884,
    0.040_743_675,
    0.052_199_695,
    -0.074_773_245,
    0.021_008_056,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sigmoid_has_its_limits() {
        assert_eq!(sigmoid(0.0), 0.5);
        assert_eq!(sigmoid(200.0), 1.0);
        assert_eq!(sigmoid(-200.0), 0.0);
    }

    #[test]
    fn normal_tail_matches_tables() {
        // Known values of the upper tail of the standard normal distribution.
        let known = [
            (0.0, 0.5),
            (0.5, 0.308_537_538_725_986_9),
            (1.0, 0.158_655_253_931_457_05),
            (2.0, 0.022_750_131_948_179_2),
            (3.0, 0.001_349_898_031_630_1),
            (5.0, 2.866_515_718_791_939e-7),
            (8.0, 6.220_960_574_271_785e-16),
        ];
        for (z, want) in known {
            let error = (f64::from(normal_tail(z)) / want - 1.0).abs();
            // e^(-z^2/2) itself loses z^2/2 ulp to the rounding of its argument.
            let allowed = 4e-7 + f64::from(z * z) * 6e-8;
            assert!(error < allowed, "tail({z}): relative error {error:e}");
        }
    }
}
