//! CPU kernels of [`crate::ops::elementwise`].

use std::f32::consts::PI;

use super::lanes::exp;
use super::{rows, vmath};
use crate::kernel::CpuArgs;
use crate::ops::elementwise::AddBiasParams;

/// `map!(x, y, |x| ..)`: `y[i] = f(x[i])`. Macros, so that no function is called for an element: see [`rows::each!`].
macro_rules! map {
    ($x:expr, $y:expr, |$v:ident| $f:expr) => {{
        let (x, slab): (&[f32], _) = ($x, rows::slab_len(1));
        rows::each!($y, slab, x.len(), |i, y| {
            for (y, &$v) in y.iter_mut().zip(&x[i * slab..]) {
                *y = $f;
            }
        });
    }};
}

/// `map2!(a, b, y, |a, b| ..)`: `y[i] = f(a[i], b[i])`.
macro_rules! map2 {
    ($a:expr, $b:expr, $y:expr, |$v:ident, $w:ident| $f:expr) => {{
        let (a, b, slab): (&[f32], &[f32], _) = ($a, $b, rows::slab_len(1));
        rows::each!($y, slab, a.len(), |i, y| {
            for ((y, &$v), &$w) in y.iter_mut().zip(&a[i * slab..]).zip(&b[i * slab..]) {
                *y = $f;
            }
        });
    }};
}

/// `y = a + b`.
pub(crate) fn add_fwd(a: &CpuArgs<'_>) {
    map2!(a.f32(0), a.f32(1), a.f32_mut(2), |a, b| a + b);
}

/// `y = a * b`.
pub(crate) fn mul_fwd(a: &CpuArgs<'_>) {
    map2!(a.f32(0), a.f32(1), a.f32_mut(2), |a, b| a * b);
}

/// `y = max(x, 0)`.
pub(crate) fn relu_fwd(a: &CpuArgs<'_>) {
    map!(a.f32(0), a.f32_mut(1), |x| relu(x));
}

/// `dx = dy` where y > 0, else 0.
pub(crate) fn relu_bwd(a: &CpuArgs<'_>) {
    map2!(a.f32(0), a.f32(1), a.f32_mut(2), |y, dy| if y > 0.0 { dy } else { 0.0 });
}

/// `y = 1 / (1 + e^-x)`.
pub(crate) fn sigmoid_fwd(a: &CpuArgs<'_>) {
    map!(a.f32(0), a.f32_mut(1), |x| vmath::sigmoid(x));
}

/// `dx = dy * y * (1 - y)`.
pub(crate) fn sigmoid_bwd(a: &CpuArgs<'_>) {
    map2!(a.f32(0), a.f32(1), a.f32_mut(2), |y, dy| dy * y * (1.0 - y));
}

/// `y = x * sigmoid(x)`.
pub(crate) fn silu_fwd(a: &CpuArgs<'_>) {
    map!(a.f32(0), a.f32_mut(1), |x| silu(x));
}

/// `dx = dy * silu'(x)`.
pub(crate) fn silu_bwd(a: &CpuArgs<'_>) {
    map2!(a.f32(0), a.f32(1), a.f32_mut(2), |x, dy| dy * silu_slope(x));
}

/// `y = x * cdf(x)`, the exact GELU.
pub(crate) fn gelu_fwd(a: &CpuArgs<'_>) {
    map!(a.f32(0), a.f32_mut(1), |x| x * normal_cdf(x));
}

/// `dx = dy * (cdf(x) + x * density(x))`.
pub(crate) fn gelu_bwd(a: &CpuArgs<'_>) {
    let peak = 1.0 / (2.0 * PI).sqrt();
    map2!(a.f32(0), a.f32(1), a.f32_mut(2), |x, dy| {
        let density = exp(-0.5 * x * x) * peak;
        dy * x.mul_add(density, normal_cdf(x))
    });
}

/// `max(x, 0)`; NaN stays NaN, as in PyTorch.
#[inline(always)]
pub(crate) fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x * vmath::sigmoid(x)
}

/// The derivative of [`silu`].
#[inline(always)]
pub(crate) fn silu_slope(x: f32) -> f32 {
    let s = vmath::sigmoid(x);
    s * x.mul_add(1.0 - s, 1.0)
}

/// The standard normal distribution function, from the tail that is small, so that both ends keep their accuracy.
#[inline(always)]
fn normal_cdf(x: f32) -> f32 {
    let tail = vmath::normal_tail(x.abs());
    if x > 0.0 { 1.0 - tail } else { tail }
}

/// `y[r, c] = x[r, c] + bias[c]`.
pub(crate) fn add_bias_fwd(a: &CpuArgs<'_>) {
    let p: AddBiasParams = a.params();
    let c = p.channels as usize;
    let (x, bias) = (a.f32(0), &a.f32(1)[..c]);
    let slab = rows::slab_len(c);
    rows::each!(a.f32_mut(2), slab, x.len(), |i, y| {
        for (y, x) in y.chunks_exact_mut(c).zip(x[i * slab..].chunks_exact(c)) {
            for ((y, &x), &b) in y.iter_mut().zip(x).zip(bias) {
                *y = x + b;
            }
        }
    });
}
