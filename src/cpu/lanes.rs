//! Eight numbers side by side, and the few operations that kernels need on them.
//!
//! Everything is `#[inline(always)]` so that inside `simd::vectorise!` each operation is one or a few AVX2
//! instructions; elsewhere the compiler uses what the target has.

/// Numbers in an [`F32x8`].
pub(crate) const LANES: usize = 8;

/// Eight `f32`, aligned for the vector unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(32))]
pub(crate) struct F32x8(pub [f32; LANES]);

impl F32x8 {
    pub(crate) const ZERO: Self = Self([0.0; LANES]);

    #[inline(always)]
    pub(crate) fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    /// `self * b + c`, rounded once.
    #[inline(always)]
    pub(crate) fn mul_add(self, b: Self, c: Self) -> Self {
        let mut out = Self::ZERO;
        for l in 0..LANES {
            out.0[l] = self.0[l].mul_add(b.0[l], c.0[l]);
        }
        out
    }

    #[inline(always)]
    pub(crate) fn add(self, b: Self) -> Self {
        let mut out = Self::ZERO;
        for l in 0..LANES {
            out.0[l] = self.0[l] + b.0[l];
        }
        out
    }

    #[inline(always)]
    pub(crate) fn sub(self, b: Self) -> Self {
        let mut out = Self::ZERO;
        for l in 0..LANES {
            out.0[l] = self.0[l] - b.0[l];
        }
        out
    }

    #[inline(always)]
    pub(crate) fn mul(self, b: Self) -> Self {
        let mut out = Self::ZERO;
        for l in 0..LANES {
            out.0[l] = self.0[l] * b.0[l];
        }
        out
    }

    /// The larger of each pair; `b` where `self` is NaN (one instruction, unlike `f32::max`).
    #[inline(always)]
    pub(crate) fn max(self, b: Self) -> Self {
        let mut out = Self::ZERO;
        for l in 0..LANES {
            out.0[l] = if self.0[l] > b.0[l] { self.0[l] } else { b.0[l] };
        }
        out
    }
}

/// e to the power of every number, in place; see [`exp`]. One flat loop, which the compiler turns into vectors better
/// than a long function of eight lanes.
#[inline(always)]
pub(crate) fn exp_all(values: &mut [F32x8]) {
    for x in bytemuck::cast_slice_mut::<F32x8, f32>(values) {
        *x = exp(*x);
    }
}

/// e^x to within 2 units in the last place, without a branch or a table, so that a loop over it becomes vector code.
///
/// x = n ln 2 + r with |r| <= ln(2) / 2; e^r by its Taylor series to r^7 (the next term is below 6e-9 of the sum),
/// times 2^n put together from exponent bits. Results below 2^-125 are 0 (no denormals); above the largest float, infinity; NaN
/// stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // Added and subtracted, it rounds to an integer; meanwhile the integer stands in the low bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    // ln 2 in two parts; the first has few bits, so that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;

    // The ends of the range, so that n stays within -126..=128; NaN fails both comparisons and stays.
    let x = if x < -87.4 { -87.4 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut sum = 1.0 / 5040.0;
    sum = r.mul_add(sum, 1.0 / 720.0);
    sum = r.mul_add(sum, 1.0 / 120.0);
    sum = r.mul_add(sum, 1.0 / 24.0);
    sum = r.mul_add(sum, 1.0 / 6.0);
    sum = r.mul_add(sum, 0.5);
    sum = r.mul_add(sum, 1.0);
    sum = r.mul_add(sum, 1.0);
    // 2^(n-1), doubled at the end, so that n = 128 is within reach; n = -126 gives the bits of 0.
    let integer = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let power = f32::from_bits(integer.wrapping_add(126) << 23);
    sum * power * 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_the_whole_range() {
        let mut worst = 0.0f64;
        for i in -866_000..=887_000 {
            let x = i as f32 * 1e-4;
            let truth = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - truth).abs() / truth);
        }
        assert!(worst < 2.4e-7, "relative error {worst:e}");
    }

    #[test]
    fn exp_at_the_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp_of_vectors_is_exp_of_each() {
        let x = [0.0, 1.0, -1.0, 2.0, -100.0, 0.5, -0.5, 30.0];
        let mut y = [F32x8(x); 3];
        crate::cpu::simd::vectorise!(|| exp_all(&mut y));
        for (x, y) in x.iter().zip(y[2].0) {
            assert!((y - x.exp()).abs() <= 2.4e-7 * x.exp() + 1e-37, "{x}: {y}");
        }
    }
}
