//! Whether what a device gave is what was expected.

use crate::ops::case::Array;
use crate::tensor::DType;

/// How far a value may be off: `|got - want| <= rtol * |want| + atol`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Relative to each expected value.
    pub rtol: f64,
    /// The same for all values of a tensor.
    pub atol: Atol,
}

/// The absolute part of a [`Tolerance`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Atol {
    /// A number.
    Fixed(f64),
    /// This share of the tensor's largest expected magnitude, and at least 1e-6: numbers that cancel in a sum leave an
    /// error of the size of the summands.
    OfLargest(f64),
}

impl Tolerance {
    /// What a case file gets that names none, but for models.
    pub const DEFAULT: Self = Self { rtol: 1e-4, atol: Atol::OfLargest(1e-5) };
    /// What a model's case file gets that names none: rounding adds up over its layers.
    pub const MODEL: Self = Self { rtol: 1e-4, atol: Atol::OfLargest(1e-4) };
}

impl Tolerance {
    /// What half precision gets: four units of its rounding beside each value, and four of the largest (a sum of rounded terms
    /// is off by the size of its terms); more where the f32 tolerance is more than usual.
    pub fn half(f32: Self, precision: DType) -> Self {
        let unit = 4.0 * precision.epsilon();
        let more = f32.rtol / Self::DEFAULT.rtol;
        Self { rtol: unit * more.max(1.0), atol: Atol::OfLargest(unit * more.max(1.0)) }
    }
}

/// What a comparison found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gap {
    /// The largest `|got - want|` as a share of the largest `|want|`, or of 0.01 where that is less: what should be zero
    /// has no relative error.
    pub error: f64,
    /// The worst value, described, where one is out of tolerance or the shape differs.
    pub failure: Option<String>,
}

/// Compares a device's result with the expectation. Axes of length one do not count in the shape.
pub fn compare(name: &str, got: &Array, want: &Array, tolerance: Tolerance) -> Gap {
    if !same_shape(&got.shape, &want.shape) {
        let failure = format!("{name} has shape {:?}, expected {:?}", got.shape, want.shape);
        return Gap { error: f64::INFINITY, failure: Some(failure) };
    }
    let largest = want.data.iter().filter(|w| w.is_finite()).fold(0.0, |m: f64, w| m.max(w.abs()));
    let atol = match tolerance.atol {
        Atol::Fixed(atol) => atol,
        Atol::OfLargest(share) => (share * largest).max(1e-6),
    };
    let (mut off, mut worst, mut count) = (0.0, (0, 0.0), 0);
    for (i, (g, w)) in got.data.iter().zip(&want.data).enumerate() {
        let (difference, allowed) = (distance(*g, *w), tolerance.rtol * w.abs() + atol);
        off = f64::max(off, difference);
        if difference > allowed || difference.is_infinite() {
            let ratio = if difference.is_infinite() { f64::INFINITY } else { difference / allowed };
            count += 1;
            if ratio > worst.1 {
                worst = (i, ratio);
            }
        }
    }
    let failure = (count > 0).then(|| {
        let (i, ratio) = worst;
        let (g, w, n) = (got.data[i], want.data[i], want.data.len());
        let at = position(i, &want.shape);
        format!("{name}{at} is {g:.7e}, expected {w:.7e}: {ratio:.1} times the tolerance; {count} of {n} values are off")
    });
    Gap { error: off / largest.max(0.01), failure }
}

/// `|got - want|`; infinite where exactly one is NaN or an infinity is met by anything but itself.
fn distance(got: f64, want: f64) -> f64 {
    if got == want || got.is_nan() && want.is_nan() {
        return 0.0;
    }
    let d = (got - want).abs();
    if d.is_finite() { d } else { f64::INFINITY }
}

/// Whether two shapes are equal but for axes of length one.
pub(crate) fn same_shape(a: &[usize], b: &[usize]) -> bool {
    let long = |shape: &[usize]| shape.iter().copied().filter(|n| *n != 1).collect::<Vec<_>>();
    long(a) == long(b)
}

/// The index of element `i`, as `[1, 0, 3]`.
fn position(mut i: usize, shape: &[usize]) -> String {
    let mut index = vec![0; shape.len()];
    for (slot, n) in index.iter_mut().zip(shape).rev() {
        *slot = i % n;
        i /= n;
    }
    format!("{index:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(data: &[f64]) -> Array {
        Array { shape: vec![data.len()], data: data.to_vec() }
    }

    #[test]
    fn the_worst_value_is_named() {
        let gap =
            compare("y", &array(&[1.0, 2.1, 3.001]), &array(&[1.0, 2.0, 3.0]), Tolerance::DEFAULT);
        let failure = gap.failure.unwrap();
        assert!(failure.starts_with("y[1] is 2.1") && failure.contains("2 of 3"), "{failure}");
        assert!((gap.error - 0.1 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn nan_and_infinity_are_not_close_to_anything_else() {
        for (got, want) in [
            (f64::NAN, 1.0),
            (1.0, f64::NAN),
            (f64::INFINITY, 1e300),
            (f64::NEG_INFINITY, f64::INFINITY),
        ] {
            let gap = compare("y", &array(&[got]), &array(&[want]), Tolerance::DEFAULT);
            assert!(gap.failure.is_some() && gap.error == f64::INFINITY, "{got} {want}");
        }
        let equal = array(&[f64::NAN, f64::INFINITY]);
        assert_eq!(compare("y", &equal, &equal, Tolerance::DEFAULT), Gap::default());
    }

    #[test]
    fn axes_of_length_one_do_not_count() {
        let got = Array { shape: vec![2, 3], data: vec![0.0; 6] };
        let want = Array { shape: vec![2, 3, 1, 1], data: vec![0.0; 6] };
        assert_eq!(compare("y", &got, &want, Tolerance::DEFAULT).failure, None);
        let turned = Array { shape: vec![3, 2], data: vec![0.0; 6] };
        assert!(compare("y", &got, &turned, Tolerance::DEFAULT).failure.is_some());
    }
}
